"""`echoatt parity MODEL_DIR BUNDLE`: PyTorch against a bundle, for people and for CI."""

from __future__ import annotations

import argparse
import json

from echoatt_cli.export import add_plan_arguments, read_plan

HELP = "compare a bundle with PyTorch; exit 0 equal, 1 different, 2 not comparable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", help="the checkpoint that the bundle was made from"
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="the bundle's .onnx file or directory")
    add_plan_arguments(parser)
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="TOKENS",
        help="length of the long case (default: the model's context length)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where to run the bundle (default: the device that it is for, or the CPU without it)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoint brings"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print the table."""
    from echoatt_cli.console import console
    from echoatt_exporter import check_parity
    from echoatt_exporter.parity.table import format_report

    report = check_parity(
        arguments.model_dir,
        arguments.bundle,
        read_plan(arguments),
        max_context=arguments.max_context,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        console.print(format_report(report))
    return 0 if report.passed else 1
