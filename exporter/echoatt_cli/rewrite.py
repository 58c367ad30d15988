"""`echoatt rewrite IN OUT`: share attention in an exported graph, without its PyTorch model."""

from __future__ import annotations

import argparse

from echoatt_cli.export import add_output_arguments, add_plan_arguments, read_plan

HELP = "apply a sharing plan to an unshared bundle's graph"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("model", metavar="IN", help="an unshared bundle")
    add_output_arguments(parser)
    add_plan_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Rewrite, and say what was done."""
    from echoatt_cli.console import progress, show_export
    from echoatt_exporter import rewrite_bundle

    with progress(quiet=arguments.json) as on_step:
        report = rewrite_bundle(
            arguments.model,
            arguments.out,
            read_plan(arguments),
            force=arguments.force,
            on_step=on_step,
        )
    show_export(report, as_json=arguments.json)
    return 0
