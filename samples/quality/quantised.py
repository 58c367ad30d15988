"""What quantised weights cost: perplexity and KL of int8 and int4 bundles against fp32 ones.

    .venv/bin/python -m samples.quality.quantised --student DIR

Exports the teacher and a student in each dtype, rounded to the nearest and by text that the model
writes, and scores every quantised bundle beside the fp32 bundle of the same model on the held-out
books.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samples.evidence.common import HERE, LENGTH, PACKAGES, arguments, held_out, publish, table

from echoatt_exporter import RoundingChoice, SharingPlan, export_bundle
from echoatt_exporter.evaluate.models import open_model
from echoatt_exporter.evaluate.perplexity import compare_documents
from echoatt_exporter.evaluate.score import Interval, TextComparison
from echoatt_exporter.texts import Text, texts_digest
from echoatt_runtime.bundle import read_manifest

EXACT = "fp32"
QUANTISED = {
    f"{dtype}, {rounding}": (dtype, RoundingChoice(rounding=rounding))
    for dtype in ("int8", "int4")
    for rounding in ("nearest", "calibrated")
}
PLAN = HERE / "results" / "plans" / "42-cost-aligned.json"
HEADER = (
    "model",
    "weights",
    "bytes of weights",
    "perplexity",
    "to fp32",
    "KL from fp32, nats a token",
    "same top token",
)


def _options(parser: Any) -> None:
    parser.set_defaults(results=Path(__file__).resolve().parent / "results")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="for bundles")
    parser.add_argument(
        "--student", type=Path, help=f"a healed student (default: the teacher by {PLAN.name})"
    )
    parser.add_argument("--max-tokens", type=int, help="to score (default: all)")


def _export(source: Path, plan: SharingPlan | None, folder: Path) -> dict[str, Path]:
    """The bundle in each dtype, made anew: what lies there may be by another quantiser."""
    exact = export_bundle(source, folder / EXACT, plan, force=True).model
    return {EXACT: exact} | {
        name: export_bundle(
            source,
            folder / name.replace(", ", "-"),
            plan,
            dtype=dtype,
            rounding=rounding,
            force=True,
        ).model
        for name, (dtype, rounding) in QUANTISED.items()
    }


def _compare(
    bundles: dict[str, Path], texts: list[Text], max_tokens: int | None
) -> dict[str, TextComparison]:
    """Each quantised bundle held against the exact one."""
    exact = open_model(bundles[EXACT])
    return {
        name: compare_documents(
            open_model(bundles[name]),
            exact,
            texts,
            length=LENGTH,
            stride=LENGTH // 2,
            max_tokens=max_tokens,
        )
        for name in QUANTISED
    }


def _record(compared: TextComparison) -> dict[str, Any]:
    ratio = compared.ratio()
    return {
        "perplexity": compared.score.perplexity,
        "perplexity_ratio": ratio.ratio,
        "perplexity_ratio_interval": ratio.interval,
        "kl": compared.kl,
        "kl_interval": compared.kl_interval(),
        "top1_agreement": compared.top1_agreement,
    }


def _cells(compared: TextComparison) -> list[str]:
    """A quantised bundle's numbers as people read them."""

    def ranged(value: float, interval: Interval, digits: str) -> str:
        return f"{value:{digits}} ({interval.low:{digits}} to {interval.high:{digits}})"

    ratio = compared.ratio()
    return [
        f"{compared.score.perplexity:.3f}",
        ranged(ratio.ratio, ratio.interval, ".4f"),
        ranged(compared.kl, compared.kl_interval(), ".5f"),
        f"{100 * compared.top1_agreement:.1f} %",
    ]


def main() -> None:
    """Export, score, and write the table."""
    args = arguments(__doc__, _options)
    texts = held_out(args.valid)
    models: dict[str, tuple[Path, SharingPlan | None]] = {"teacher": (args.model, None)}
    if args.student:
        models["healed student"] = (args.student, None)
        origin = "The student is the one of `--student`."
    else:
        models["untrained student"] = (args.model, SharingPlan.load(PLAN))
        origin = f"The student is the teacher by the plan `{PLAN.name}`."
    rows: list[list[str]] = []
    data = dict[str, Any]()
    tokens = 0
    for name, (directory, sharing) in models.items():
        bundles = _export(directory, sharing, args.work / name.replace(" ", "-"))
        manifests = {dtype: read_manifest(bundle) for dtype, bundle in bundles.items()}
        sizes = {dtype: manifest.weights.bytes for dtype, manifest in manifests.items()}
        compared = _compare(bundles, texts, args.max_tokens)
        exact = next(iter(compared.values())).reference
        tokens = exact.tokens
        rows.append([name, EXACT, f"{sizes[EXACT]:,}", f"{exact.perplexity:.3f}", "1", "", ""])
        rows += [
            [name, dtype, f"{sizes[dtype]:,}", *_cells(result)]
            for dtype, result in compared.items()
        ]
        data[name] = {
            "sources": manifests[EXACT].specification.plan.sources,
            "weight_bytes": sizes,
            EXACT: {"perplexity": exact.perplexity},
            **{dtype: _record(result) for dtype, result in compared.items()},
        }
    data |= {"texts_sha256": texts_digest(texts), "tokens": tokens, "length": LENGTH}
    heading = (
        f"Bundles on {tokens:,} tokens of the held-out books, windows of {LENGTH} tokens by"
        f" {LENGTH // 2}; each against the fp32 bundle of the same model, 95 % intervals."
        f" {origin}\n\n"
    )
    packages = (*PACKAGES, "onnxruntime")
    publish(args.results, "quantised", data, heading + table(HEADER, rows), packages)


if __name__ == "__main__":
    main()
