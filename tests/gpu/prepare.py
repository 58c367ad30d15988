"""Traces of every family, made before: `make prepare-gpu`. The GPU is not to wait for a tracer."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.cuda.bundles import Trace
from tests.tiny_models import TINY_MODELS

KEPT = Path(__file__).resolve().parents[2] / "out" / "gpu" / "traces"


def trace_of(family: str) -> Trace:
    """A family's trace, read where it is kept."""
    return Trace(family, len(TINY_MODELS[family].sources), kept=KEPT / f"{family}.onnx")


def main() -> None:
    """Trace every family anew."""
    shutil.rmtree(KEPT, ignore_errors=True)
    for family in TINY_MODELS:
        trace_of(family)
        print(f"traced {family}", flush=True)


if __name__ == "__main__":
    main()
