"""``echoatt evaluate DIR``: perplexity and bits a byte, of one model or of two side by side."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echoatt_exporter.evaluate.score import ScoreRatio, TextScore
    from echoatt_exporter.texts import Text

HELP = "measure perplexity and bits a byte on text, of one model or of two side by side"

_DEFAULT_LENGTH = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("model_dir", metavar="DIR", help="a student or a teacher")
    parser.add_argument(
        "--against", metavar="DIR", help="another model to compare with, such as the teacher"
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
        help=f"tokens in a window (default the model's context, {_DEFAULT_LENGTH:,} at most)",
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
    parser.add_argument("--device", default="cpu", help="where torch computes (default cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="to compute in (default float32)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoints bring"
    )


def run(arguments: argparse.Namespace) -> int:
    """Score, and print the numbers."""
    from echoatt_exporter.evaluate.perplexity import compare_scores
    from echoatt_exporter.texts import read_texts

    texts = read_texts(arguments.text)
    directories = [arguments.model_dir, *([arguments.against] if arguments.against else [])]
    scores, windows = [], (arguments.length, arguments.stride)
    for directory in directories:
        # The second model is scored with the first one's windows
        score, windows = _score(directory, texts, windows, arguments)
        scores.append(score)
    ratio = compare_scores(*scores) if arguments.against else None
    if arguments.json:
        report = _report(arguments, texts, windows, scores, ratio)
        print(json.dumps(report))
    else:
        _show(directories, texts, windows, scores, ratio)
    return 0


def _score(
    directory: str,
    texts: list[Text],
    windows: tuple[int | None, int | None],
    arguments: argparse.Namespace,
) -> tuple[TextScore, tuple[int, int]]:
    """A model's score, and the length and stride of its windows."""
    import torch

    from echoatt_cli._console import count_progress
    from echoatt_exporter.architecture import architecture_of
    from echoatt_exporter.evaluate.perplexity import score_documents
    from echoatt_exporter.share.checkpoint import load_model
    from echoatt_exporter.texts import load_tokenizer

    trusted = arguments.trust_remote_code
    tokenizer = load_tokenizer(directory, trust_remote_code=trusted)
    dtype = getattr(torch, arguments.dtype)
    model = load_model(directory, dtype=dtype, trust_remote_code=trusted)
    model.to(_device(arguments.device))
    length, stride = windows
    if length is None:
        context = architecture_of(model.config.get_text_config()).context_length
        length = min(context, _DEFAULT_LENGTH)
    stride = max(1, length // 2) if stride is None else stride
    with count_progress(f"scoring with {directory}", quiet=arguments.json) as on_progress:
        score = score_documents(
            model,
            texts,
            tokenizer,
            length=length,
            stride=stride,
            batch_size=arguments.batch_size,
            max_tokens=arguments.max_tokens,
            on_progress=on_progress,
        )
    return score, (length, stride)


def _device(name: str) -> Any:
    import torch

    from echoatt_exporter import AnalysisError

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise AnalysisError(
            f"torch cannot compute on {name!r} here ({str(error).splitlines()[0]}); try cpu"
        ) from error


def _report(
    arguments: argparse.Namespace,
    texts: list[Text],
    windows: tuple[int | None, int | None],
    scores: list[TextScore],
    ratio: ScoreRatio | None,
) -> dict[str, Any]:
    from echoatt_exporter.texts import texts_digest

    def entry(directory: str, score: TextScore) -> dict[str, Any]:
        return {
            "directory": directory,
            "perplexity": score.perplexity,
            "perplexity_interval": score.interval(),
            "nats_per_token": score.nats_per_token,
            "bits_per_byte": score.bits_per_byte,
        }

    return {
        "texts_sha256": texts_digest(texts),
        "documents": len(texts),
        "tokens": scores[0].tokens,
        "bytes": scores[0].bytes,
        "length": windows[0],
        "stride": windows[1],
        "model": entry(arguments.model_dir, scores[0]),
        "against": entry(arguments.against, scores[1]) if ratio else None,
        "perplexity_ratio": ratio.ratio if ratio else None,
        "perplexity_ratio_interval": ratio.interval if ratio else None,
    }


def _show(
    directories: list[str],
    texts: list[Text],
    windows: tuple[int | None, int | None],
    scores: list[TextScore],
    ratio: ScoreRatio | None,
) -> None:
    from rich.table import Table

    from echoatt_cli._console import console

    table = Table()
    table.add_column("model")
    for name in ("perplexity", "95 % interval", "nats a token", "bits a byte"):
        table.add_column(name, justify="right")
    for directory, score in zip(directories, scores, strict=True):
        low, high = score.interval()
        table.add_row(
            directory,
            f"{score.perplexity:.4g}",
            f"{low:.4g} to {high:.4g}",
            f"{score.nats_per_token:.4f}",
            f"{score.bits_per_byte:.4f}",
        )
    console.print(table)
    if ratio is not None:
        console.print(
            f"perplexity ratio {ratio.ratio:.4f} (95 % interval {ratio.interval.low:.4f} to"
            f" {ratio.interval.high:.4f}; paired, token by token)",
            highlight=False,
        )
    console.print(
        f"{scores[0].tokens:,} tokens, {scores[0].bytes:,} bytes of {len(texts):,} documents,"
        f" windows of {windows[0]} tokens by {windows[1]}; intervals by bootstrap over blocks of"
        " consecutive tokens",
        highlight=False,
        soft_wrap=True,
    )
