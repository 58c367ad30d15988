"""The CPU's lowering."""

from __future__ import annotations

from echoatt_exporter.graph.lowering.cpu.rotate_together import RotateTogether
from echoatt_exporter.graph.lowering.cpu.split_decode import SplitDecode
from echoatt_exporter.graph.lowering.fewer_kernels import fewer_kernels
from echoatt_exporter.graph.run import PassStep
from echoatt_runtime.contract import Specification


def steps(specification: Specification) -> list[PassStep]:
    """The passes of this lowering."""
    return [
        *fewer_kernels(specification),
        PassStep(
            transform=RotateTogether(),
            why="after packing, of whose parts it makes one",
        ),
        PassStep(
            transform=SplitDecode(),
            why="after all that looks for patterns, which branches would hide",
        ),
    ]
