"""`echoatt export MODEL_DIR OUT`: checkpoint and sharing plan to a verified bundle."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from echoatt_runtime.contract import DEVICES, DTYPES, ROUNDINGS

if TYPE_CHECKING:
    from echoatt_exporter import RoundingChoice, SharingPlan

HELP = "export a checkpoint as a verified bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", help="a student, or any supported Hugging Face directory"
    )
    add_output_arguments(parser)
    add_plan_arguments(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="of the weights (default fp32; int8 and int4 in blocks of 32)",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help="of int8 and int4: by what it does on calibration text (default), or to the nearest",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        nargs="+",
        default=(),
        help="calibration text (default: the model writes it)",
    )
    parser.add_argument(
        "--max-megabytes",
        metavar="N",
        type=float,
        help="let int4 widen the weights that cost most to 8 bits, up to N MB of files in all",
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="what the bundle is for")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare with PyTorch before publishing"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the checkpoint brings"
    )


def add_plan_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Declare `--plan` and `--share`, of which at most one is given, or exactly one."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--plan", metavar="FILE", help="a sharing plan (JSON)")
    group.add_argument("--share", metavar="PAIRS", help="follower:source pairs, such as 3:2,4:2")


def read_plan(arguments: argparse.Namespace) -> SharingPlan | str | None:
    """What `--plan` or `--share` says; None without either."""
    from echoatt_exporter import SharingPlan

    pairs: str | None = arguments.share
    return SharingPlan.load(arguments.plan) if arguments.plan else pairs


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where a bundle goes and how it is reported."""
    parser.add_argument(
        "out", metavar="OUT", help="a .onnx file, or a directory that gets model.onnx"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing bundle")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _rounding(arguments: argparse.Namespace) -> RoundingChoice | None:
    """What was chosen of the rounding; None if nothing was."""
    from echoatt_exporter import RoundingChoice

    chosen = (arguments.rounding, arguments.calibration or None, arguments.max_megabytes)
    if chosen == (None, None, None):
        return None
    return RoundingChoice(
        rounding=arguments.rounding or "calibrated",
        texts=tuple(arguments.calibration),
        max_megabytes=arguments.max_megabytes,
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, and say what was done."""
    from echoatt_cli.console import progress, show_export
    from echoatt_exporter import export_bundle

    with progress(quiet=arguments.json) as on_step:
        report = export_bundle(
            arguments.model_dir,
            arguments.out,
            read_plan(arguments),
            dtype=arguments.dtype,
            device=arguments.device,
            rounding=_rounding(arguments),
            verify=not arguments.no_verify,
            force=arguments.force,
            trust_remote_code=arguments.trust_remote_code,
            on_step=on_step,
        )
    show_export(report, as_json=arguments.json)
    return 0
