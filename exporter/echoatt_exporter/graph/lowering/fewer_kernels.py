"""The steps that every lowering has: fewer and larger operators, weights as they are stored."""

from __future__ import annotations

from echoatt_exporter.graph.lowering.fuse_skip_rms_norm import FuseSkipRmsNorm
from echoatt_exporter.graph.lowering.gather_early import GatherEarly
from echoatt_exporter.graph.lowering.pack_projections import PackProjections
from echoatt_exporter.graph.lowering.quantize_table import QuantizeTable
from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights
from echoatt_exporter.graph.lowering.share_tied_table import ShareTiedTable
from echoatt_exporter.graph.run import PassStep
from echoatt_runtime.contract import Specification


def fewer_kernels(specification: Specification) -> list[PassStep]:
    """Steps that fuse and pack operators, and store weights in the bundle's dtype."""
    quantisation = specification.quantisation
    if quantisation is None:
        stored = [PassStep(transform=ShareTiedTable(), why="a tied LM head needs no copy")]
    else:
        stored = [
            PassStep(
                transform=QuantizeTable(quantisation),
                why="first, while it can be seen that the LM head is the same table",
            ),
            PassStep(
                transform=QuantizeWeights(quantisation),
                why="after packing, so that each packed weight is quantised once",
            ),
        ]
    return [
        PassStep(
            transform=FuseSkipRmsNorm(),
            why="needs the fused norms",
        ),
        PassStep(
            transform=PackProjections(),
            why="on what is left of the projections, fused norms and rotations around them",
        ),
        *stored,
        PassStep(
            transform=GatherEarly(),
            why="after packing and fusing, so that it meets each product and norm in one form",
        ),
    ]
