"""`echoatt bench OUT.onnx…`: bundles beside other engines on the same work, in one run."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from echoatt_cli.export import add_plan_arguments, read_plan

if TYPE_CHECKING:
    from echoatt_exporter.bench.prepare import Prepared

HELP = "time bundles beside other engines on this machine"

_PEERS = ("genai", "torch", "llama.cpp", "all")
_PHASES = ("prefill", "decode")
_PLANS = ("unshared", "41", "77")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("bundles", metavar="OUT.onnx", nargs="*", help="bundles to measure")
    models = parser.add_argument_group("models")
    models.add_argument(
        "--shape", help="measure random weights of this shape: tinyllama-1.1b, llama-7b, qwen3-0.6b"
    )
    models.add_argument(
        "--dtype", choices=("fp32", "int8", "int4"), default="int4", help="of --shape (int4)"
    )
    models.add_argument(
        "--plans",
        type=_words,
        metavar="LIST",
        help="of --shape: 'unshared' and ratios in percent (unshared,41,77)",
    )
    add_plan_arguments(parser)
    models.add_argument(
        "--against",
        type=_choices(*_PEERS),
        default=[],
        metavar="PEERS",
        help=f"engines to measure beside: {', '.join(_PEERS)} (every installed one)",
    )
    models.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="the unshared checkpoint, for --against"
    )
    models.add_argument(
        "--work", type=Path, metavar="DIR", help="keeps models made (in the user's cache)"
    )
    work = parser.add_argument_group("work")
    work.add_argument("--contexts", type=_numbers, default=[128, 1024, 4096], metavar="LIST")
    work.add_argument("--batch", type=_numbers, default=[1], metavar="LIST", help="rows (1)")
    work.add_argument("--threads", type=_number, help="of every engine (all cores)")
    work.add_argument(
        "--phases",
        type=_choices(*_PHASES),
        default=_PHASES,
        metavar="LIST",
        help="prefill,decode or one of them",
    )
    work.add_argument("--new-tokens", type=_number, default=32, help="steps of a round (32)")
    work.add_argument("--rounds", type=_number, default=5, help="of decoding (5)")
    work.add_argument("--prefill-rounds", type=_number, default=3, help="of prefill (3)")
    work.add_argument(
        "--profile", action="store_true", help="instead: where a step's time goes, by operator"
    )
    report = parser.add_argument_group("report")
    report.add_argument("--out", type=Path, metavar="DIR", help="also write results there")
    report.add_argument("--force", action="store_true", help="overwrite results in DIR")
    report.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print the tables."""
    from echoatt_exporter.bench.machine import usable_cores
    from echoatt_exporter.errors import BenchError

    if bool(arguments.bundles) == bool(arguments.shape):
        raise BenchError("give bundles to measure, or a --shape to make them of, and not both")
    if arguments.threads is None:
        arguments.threads = usable_cores()
    return _profile(arguments) if arguments.profile else _bench(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    from echoatt_exporter.bench.publish import check_free, write_results
    from echoatt_exporter.bench.results import BenchOptions
    from echoatt_exporter.bench.run import bench
    from echoatt_exporter.bench.table import to_markdown

    options = BenchOptions(
        contexts=tuple(arguments.contexts),
        batches=tuple(arguments.batch),
        threads=arguments.threads,
        phases=tuple(arguments.phases),
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        prefill_rounds=arguments.prefill_rounds,
    )
    if arguments.out is not None:
        check_free(arguments.out, force=arguments.force)
    with _status() as say:
        prepared = _prepare(arguments, say)
        results = bench(
            prepared.engines,
            options,
            command=_command(),
            absent=prepared.absent,
            notes=prepared.notes,
            on_turn=lambda what, done, total: say(f"{done}/{total} {what}"),
        )
    if arguments.out is not None:
        write_results(results, arguments.out)
    print(results.to_json() if arguments.json else to_markdown(results), end="")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from echoatt_exporter.bench.profiles import profile_bundles, profiles_json, profiles_markdown

    with _status() as say:
        prepared = _prepare(arguments, say)
        profiles = profile_bundles(
            [engine for engine in prepared.engines if engine.is_bundle],
            contexts=arguments.contexts,
            batches=arguments.batch,
            threads=arguments.threads,
            on_step=say,
        )
    show = profiles_json if arguments.json else profiles_markdown
    print(show(profiles, _command()), end="")
    return 0


def _prepare(arguments: argparse.Namespace, say: Callable[[str], None]) -> Prepared:
    from echoatt_exporter.bench.prepare import (
        ShapeRequest,
        default_work,
        prepare_bundles,
        prepare_shape,
    )

    work = arguments.work or default_work()
    if not arguments.shape:
        return prepare_bundles(
            arguments.bundles, arguments.checkpoint, work, arguments.against, say
        )
    own_plan = read_plan(arguments)
    plans = arguments.plans or (["unshared"] if own_plan else _PLANS)
    request = ShapeRequest(arguments.shape, arguments.dtype, plans, own_plan)
    return prepare_shape(request, work, arguments.against, say)


def _command() -> str:
    return shlex.join(["echoatt", *sys.argv[1:]])


@contextlib.contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """What is being done, on stderr; drawn only on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _numbers(text: str) -> list[int]:
    try:
        return sorted({_number(word) for word in _words(text)})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 128,1024") from None


def _choices(*known: str) -> Callable[[str], list[str]]:
    """A comma-separated list of known words, each once and in the order of `known`."""

    def read(text: str) -> list[str]:
        words = _words(text)
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return [word for word in known if word in words]

    return read
