"""The passes of an export, in order, with the reasons."""

from __future__ import annotations

from typing import Final

from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from echoatt_exporter.graph.canonical.fuse_rms_norm import FuseRmsNorm
from echoatt_exporter.graph.canonical.fuse_rotary import FuseRotary
from echoatt_exporter.graph.canonical.join_decode import JoinDecode
from echoatt_exporter.graph.checks.check_contract import CheckContract
from echoatt_exporter.graph.lowering.cpu.split_decode import SplitDecode
from echoatt_exporter.graph.lowering.fuse_skip_rms_norm import FuseSkipRmsNorm
from echoatt_exporter.graph.lowering.gather_early import GatherEarly
from echoatt_exporter.graph.lowering.pack_projections import PackProjections
from echoatt_exporter.graph.lowering.quantize_weights import QuantizeWeights
from echoatt_exporter.graph.lowering.rotate_together import RotateTogether
from echoatt_exporter.graph.lowering.share_tied_table import ShareTiedTable
from echoatt_exporter.graph.run import PassStep
from echoatt_exporter.graph.sharing.cut_packed_weights import CutPackedWeights
from echoatt_exporter.graph.sharing.remove_dead_branches import RemoveDeadBranches
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities
from echoatt_runtime.contract import Specification

# Constants of shapes and axes are this small; norms of real models are not, and stay apart.
_CONSTANT_SIZE: Final = 16


def export_pipeline(specification: Specification) -> list[PassStep]:
    """The passes that turn a graph by the contract into the bundle that is specified.

    The graph may come from a student, whose followers read their source's probabilities already, or
    from an unshared bundle: then the passes apply the plan to the graph. Passes that find their
    work done change nothing.

    Args:
        specification: What is to be built, with the plan that the result shall have.

    Returns:
        The passes, for `run_pipeline`.
    """
    sources = specification.plan.sources
    steps = [
        PassStep(
            transform=JoinDecode(),
            why="first, because a bundle's branches hide its attention from the passes",
        ),
        PassStep(
            transform=IdentityEliminationPass(),
            why="early, because an Identity between two nodes hides a pattern",
        ),
        PassStep(
            transform=LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            why="all constants in one form, so that equal ones can be found",
        ),
        PassStep(
            transform=DeduplicateInitializersPass(size_limit=_CONSTANT_SIZE),
            why="equal constants become one, so that equal computations can be found",
        ),
        PassStep(
            transform=CommonSubexpressionEliminationPass(),
            why="every layer computes the same shapes and masks",
        ),
        PassStep(
            transform=RewireProbabilities(sources),
            why="followers read their source's probabilities",
        ),
        PassStep(
            transform=RemoveDeadBranches(sources),
            why="their query and key branches are not needed any more",
        ),
        PassStep(
            transform=CutPackedWeights(),
            why="queries and keys that are packed with values outlive their branch",
        ),
        PassStep(
            transform=FuseRmsNorm(),
            why="after the removal, so that no dead norm is fused",
        ),
        PassStep(
            transform=FuseRotary(),
            why="likewise; both before packing, whose Split would come between",
        ),
        PassStep(
            transform=FuseSkipRmsNorm(),
            why="needs the fused norms",
        ),
        PassStep(
            transform=PackProjections(),
            why="after the removal, so that only projections that are needed are packed",
        ),
        PassStep(
            transform=RotateTogether(),
            why="after packing, of whose parts it makes one",
        ),
    ]
    bits = specification.weight_dtype.bits
    if bits is not None:
        steps.append(
            PassStep(
                transform=QuantizeWeights(bits),
                why="after packing, so that each packed weight is quantised once",
            )
        )
    else:
        steps.append(
            PassStep(
                transform=ShareTiedTable(),
                why="a tied LM head needs no copy; a quantised one has weights of its own",
            )
        )
    steps.append(
        PassStep(
            transform=GatherEarly(),
            why="after packing and fusing, so that it meets each product and norm in one form",
        )
    )
    if specification.device == "cpu":
        steps.append(
            PassStep(
                transform=SplitDecode(),
                why="after all that looks for patterns, which branches would hide",
            )
        )
    steps += [
        PassStep(
            transform=DeduplicateInitializersPass(size_limit=_CONSTANT_SIZE),
            why="the passes added equal constants to every layer",
        ),
        PassStep(
            transform=RemoveUnusedNodesPass(),
            why="shape computations that only replaced nodes needed",
        ),
        PassStep(
            transform=RemoveUnusedOpsetsPass(),
            why="only operator sets that are used are imported",
        ),
        PassStep(
            transform=ClearMetadataAndDocStringPass(),
            why="traces of source code and its paths do not belong in a bundle",
        ),
        PassStep(
            transform=CheckContract(specification),
            why="last, on the graph as it will be written",
        ),
    ]
    return steps
