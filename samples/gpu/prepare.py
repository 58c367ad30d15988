"""Graphs for the bench on a GPU, made where there is none: `make prepare-gpu`.

    python -m samples.gpu.prepare out/gpu [--shape tinyllama-1.1b] [--dtype fp16]

Only graphs are kept, with the sizes of their weight files: random weights are drawn where they are
measured, for gigabytes need not travel.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from echoatt_exporter import export_bundle
from echoatt_exporter.bench.shapes import SHAPES, make_checkpoint
from echoatt_exporter.quantise.quantise import RoundingChoice
from echoatt_runtime.contract import DTYPES

RATIOS = (0, 41, 77)


def main() -> None:
    """Export each ratio and keep what is not weights."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="fp16", choices=("fp16", "bf16", "int8", "int4"))
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    rounding = None
    if DTYPES[arguments.dtype].bits is not None:
        rounding = RoundingChoice(rounding="nearest")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "checkpoint")
        make_checkpoint(shape, checkpoint)
        for ratio in RATIOS:
            own = Path(folder, str(ratio))
            export_bundle(
                checkpoint,
                own / "model.onnx",
                shape.plan(ratio) if ratio else None,
                dtype=arguments.dtype,
                device="cuda",
                rounding=rounding,
                verify=False,
            )
            kept = arguments.out / f"{arguments.dtype}-{ratio}"
            kept.mkdir(parents=True, exist_ok=True)
            sizes: dict[str, int] = {}
            for path in sorted(own.iterdir()):
                sizes[path.name] = path.stat().st_size
                if path.name != "model.onnx.data":
                    path.rename(kept / path.name)
                else:
                    path.unlink()
            kept.joinpath("sizes.json").write_text(json.dumps(sizes) + "\n", encoding="utf-8")
            print(f"{kept}: weights of {sizes['model.onnx.data']:,} bytes left out", flush=True)


if __name__ == "__main__":
    main()
