"""Gives optimum-cli an `export echoatt` subcommand, where the extra `export` is installed.

optimum imports every file in the namespace folder `optimum/commands/register`, where the wheel
puts this one for everybody, users of the runtime alone too. It runs at each start of optimum-cli,
so it imports nothing heavy, and nothing of EchoAtt where the subcommand could not run.
"""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser
from typing import Any, Final

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

# What the extra `export` brings
NEEDED: Final = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "optimum",
    "safetensors",
    "rich",
)


def _commands() -> list[tuple[Any, Any]]:
    """The subcommand and its parent; nothing where a package that it needs is absent."""
    if any(importlib.util.find_spec(name) is None for name in NEEDED):
        return []

    from echoatt_cli import run_command
    from echoatt_cli.export import HELP, add_arguments

    class EchoAttExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is untyped
        """`optimum-cli export echoatt`: the same as `echoatt export`."""

        COMMAND = CommandInfo(name="echoatt", help=HELP)

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            """Declare the subcommand's arguments."""
            add_arguments(parser)

        def run(self) -> None:
            """Export; exits with the same codes as `echoatt`."""
            raise SystemExit(run_command("export", self.args))

    return [(EchoAttExportCommand, ExportCommand)]


REGISTER_COMMANDS = _commands()
