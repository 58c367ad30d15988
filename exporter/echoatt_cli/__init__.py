"""The command line: `echoatt` and `echoatt-export`, one file a subcommand.

A package of its own, so that `echoatt generate` starts without importing torch: importing
anything below `echoatt_exporter` registers the student with transformers, which takes torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType

from echoatt_cli.output import complain, guard_output
from echoatt_runtime import EchoAttError

_COMMANDS = (
    "analyze",
    "share",
    "refit",
    "export",
    "rewrite",
    "parity",
    "generate",
    "distill",
    "evaluate",
    "bench",
)

# What a command needs beside what `export,cpu` brings
_EXTRAS = {"analyze": "distill", "distill": "distill", "bench": "bench,cpu"}

# What a shell gives for a process ended by ^C
_INTERRUPTED = 130


def _command(name: str) -> ModuleType:
    """A subcommand's module: `HELP`, `add_arguments(parser)`, `run(arguments) -> code`."""
    return importlib.import_module(f"echoatt_cli.{name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="echoatt",
        description="Export, verify and run language models whose layers share attention.",
    )
    parser.add_argument("--version", action="version", version=f"echoatt {version('echoatt')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        module = _command(name)
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `echoatt`.

    Args:
        arguments: The command line without the program's name; None reads `sys.argv`.

    Returns:
        0 done; 1 compared and found different; 2 bad input or a step that could not be done; 130
        interrupted; 141 the reader of the output has gone.
    """

    def parse_and_run() -> int:
        parsed = _parser().parse_args(arguments)
        return _run(parsed.command, parsed)

    return guard_output(parse_and_run)


def run_command(name: str, arguments: argparse.Namespace) -> int:
    """Run one subcommand and turn what EchoAtt raises into a line and an exit code.

    Args:
        name: The subcommand.
        arguments: What its own `add_arguments` declared.

    Returns:
        As `main`.
    """
    return guard_output(lambda: _run(name, arguments))


def _run(name: str, arguments: argparse.Namespace) -> int:
    # Whatever a library would fetch is a mistake here: models are local directories
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return int(_command(name).run(arguments))
    except EchoAttError as error:
        complain(str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        extras = _EXTRAS.get(name, "export,cpu")
        complain(
            f"{_missing(error)} is not installed, which `echoatt {name}` needs; in EchoAtt's own"
            f" directory, pip install '.[{extras}]'"
        )
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED


def _missing(error: BaseException | None) -> str:
    """The package that could not be imported; libraries raise errors of their own for it."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            return error.name
        error = error.__cause__ or error.__context__
    return "a package"


def export_main() -> int:
    """Run `echoatt-export`, the short form of `echoatt export`."""
    return main(["export", *sys.argv[1:]])
