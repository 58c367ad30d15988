"""Gives optimum-cli an `export echoatt` subcommand.

optimum imports every file in the namespace folder `optimum/commands/register`, where the wheel
puts this one. It runs at each start of optimum-cli, so it imports nothing heavy.
"""

from __future__ import annotations

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

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


REGISTER_COMMANDS = [(EchoAttExportCommand, ExportCommand)]
