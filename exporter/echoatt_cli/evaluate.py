"""`echoatt evaluate MODEL`: how well a model predicts text, alone or held against another."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from echoatt_exporter.evaluate.score import TextComparison, TextScore
    from echoatt_exporter.texts import Text

HELP = "measure perplexity on text, of one model or of two side by side, and their KL divergence"

_DEFAULT_LENGTH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a student's or teacher's directory, or a bundle's .onnx file or directory",
    )
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="another model to compare with, such as the teacher, or the bundle in fp32",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="FILE",
        help='.txt, .md, .jsonl with a field "text", or folders of them',
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="TOKENS",
        help=f"tokens in a window (default the models' context, {_DEFAULT_LENGTH:,} at most)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="TOKENS",
        help="new tokens a window (default half a window)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="windows at once (default 8)"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="stop after so many tokens (default all)"
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default cpu)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: the libraries' choice)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="that checkpoints are computed in (default float32); a bundle has its own",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoints bring"
    )


def run(arguments: argparse.Namespace) -> int:
    """Score, and print the numbers."""
    import torch

    from echoatt_cli.console import count_progress
    from echoatt_exporter import AnalysisError
    from echoatt_exporter.evaluate.models import open_model
    from echoatt_exporter.evaluate.perplexity import compare_documents, score_documents
    from echoatt_exporter.texts import read_texts

    texts = read_texts(arguments.text)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise AnalysisError(f"{arguments.threads} threads compute nothing; give 1 or more")
        torch.set_num_threads(arguments.threads)
    model, *others = (
        open_model(
            path,
            device=arguments.device,
            dtype=getattr(torch, arguments.dtype),
            threads=arguments.threads,
            trust_remote_code=arguments.trust_remote_code,
        )
        for path in _paths(arguments)
    )
    if arguments.length is None:
        context = min(one.context_length for one in (model, *others))
        arguments.length = min(context, _DEFAULT_LENGTH)
    if arguments.stride is None:
        arguments.stride = max(1, arguments.length // 2)
    options: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("length", "stride", "batch_size", "max_tokens")
    }
    comparison = None
    with count_progress("scoring", quiet=arguments.json) as on_progress:
        options["on_progress"] = on_progress
        if others:
            comparison = compare_documents(model, others[0], texts, **options)
            scores = [comparison.score, comparison.reference]
        else:
            scores = [score_documents(model, texts, **options)]
    if arguments.json:
        print(json.dumps(_report(arguments, texts, scores, comparison)))
    else:
        _show(arguments, texts, scores, comparison)
    return 0


def _paths(arguments: argparse.Namespace) -> list[str]:
    return [arguments.model, *([arguments.against] if arguments.against else [])]


def _report(
    arguments: argparse.Namespace,
    texts: list[Text],
    scores: list[TextScore],
    comparison: TextComparison | None,
) -> dict[str, Any]:
    from echoatt_exporter.texts import texts_digest

    entries = [
        {
            "path": path,
            "perplexity": score.perplexity,
            "perplexity_interval": score.interval(),
            "nats_per_token": score.nats_per_token,
            "bits_per_byte": score.bits_per_byte,
        }
        for path, score in zip(_paths(arguments), scores, strict=True)
    ]
    ratio = comparison.ratio() if comparison else None
    return {
        "texts_sha256": texts_digest(texts),
        "documents": len(texts),
        "tokens": scores[0].tokens,
        "bytes": scores[0].bytes,
        "length": arguments.length,
        "stride": arguments.stride,
        "model": entries[0],
        "against": entries[1] if comparison else None,
        "perplexity_ratio": ratio.ratio if ratio else None,
        "perplexity_ratio_interval": ratio.interval if ratio else None,
        "kl": comparison.kl if comparison else None,
        "kl_interval": comparison.kl_interval() if comparison else None,
        "top1_agreement": comparison.top1_agreement if comparison else None,
    }


def _show(
    arguments: argparse.Namespace,
    texts: list[Text],
    scores: list[TextScore],
    comparison: TextComparison | None,
) -> None:
    from rich.table import Table

    from echoatt_cli.console import console

    table = Table()
    table.add_column("model")
    for name in ("perplexity", "95 % interval", "nats a token", "bits a byte"):
        table.add_column(name, justify="right")
    for path, score in zip(_paths(arguments), scores, strict=True):
        low, high = score.interval()
        table.add_row(
            path,
            f"{score.perplexity:.4g}",
            f"{low:.4g} to {high:.4g}",
            f"{score.nats_per_token:.4f}",
            f"{score.bits_per_byte:.4f}",
        )
    console.print(table)
    if comparison is not None:
        console.print(_comparison_table(comparison))
    console.print(
        f"{scores[0].tokens:,} tokens, {scores[0].bytes:,} bytes of {len(texts):,} documents,"
        f" windows of {arguments.length} tokens by {arguments.stride}; intervals by bootstrap over"
        " blocks of consecutive tokens",
        highlight=False,
        soft_wrap=True,
    )


def _comparison_table(comparison: TextComparison) -> Table:
    """What the first model costs against the second, token by token."""
    from rich.table import Table

    table = Table()
    table.add_column("the first against the second")
    for name in ("", "95 % interval"):
        table.add_column(name, justify="right")
    ratio = comparison.ratio()
    low, high = ratio.interval
    table.add_row("perplexity ratio", f"{ratio.ratio:.4f}", f"{low:.4f} to {high:.4f}")
    low, high = comparison.kl_interval()
    table.add_row("KL, nats a token", f"{comparison.kl:.3g}", f"{low:.3g} to {high:.3g}")
    table.add_row("same most probable token", f"{comparison.top1_agreement:.2%}", "")
    return table
