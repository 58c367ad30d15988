"""``echoatt rewrite IN OUT``: share attention in an exported graph, without its PyTorch model."""

from __future__ import annotations

import argparse

from echoatt_cli.export import add_plan_arguments

HELP = "apply a sharing plan to an unshared bundle's graph"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("model", metavar="IN", help="an unshared bundle")
    parser.add_argument(
        "out", metavar="OUT", help="a .onnx file, or a directory that gets model.onnx"
    )
    add_plan_arguments(parser)
    parser.add_argument("--force", action="store_true", help="overwrite an existing bundle")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Rewrite, and say what was done."""
    from echoatt_cli._console import progress, show_export
    from echoatt_exporter import SharingPlan, rewrite_bundle

    plan = SharingPlan.load(arguments.plan) if arguments.plan else arguments.share
    with progress(quiet=arguments.json) as on_step:
        report = rewrite_bundle(
            arguments.model, arguments.out, plan, force=arguments.force, on_step=on_step
        )
    show_export(report, as_json=arguments.json)
    return 0
