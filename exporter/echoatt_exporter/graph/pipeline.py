"""The passes of an export and of a rewrite: canonical form, sharing, lowering, the final check."""

from __future__ import annotations

from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from echoatt_exporter.graph.canonical.assign_roles import AssignRoles
from echoatt_exporter.graph.canonical.fuse_rms_norm import FuseRmsNorm
from echoatt_exporter.graph.canonical.fuse_rotary import FuseRotary
from echoatt_exporter.graph.canonical.join_decode import JoinDecode
from echoatt_exporter.graph.checks.check_contract import CheckContract
from echoatt_exporter.graph.clear_metadata import ClearMetadata
from echoatt_exporter.graph.graph_pass import CommonPass
from echoatt_exporter.graph.lowering.by_name import lowering_steps
from echoatt_exporter.graph.properties import CONSTANT_SIZE, Property
from echoatt_exporter.graph.run import PassStep, Pipeline
from echoatt_exporter.graph.sharing.cut_packed_weights import CutPackedWeights
from echoatt_exporter.graph.sharing.remove_dead_branches import RemoveDeadBranches
from echoatt_exporter.graph.sharing.rewire_probabilities import RewireProbabilities
from echoatt_runtime.contract import SharingPlan, Specification


def export_pipeline(specification: Specification) -> Pipeline:
    """What turns a student's trace into the bundle that is specified.

    A student's followers read their sources' probabilities already and have no queries or keys, so
    nothing is left to share.

    Args:
        specification: What is to be built.

    Raises:
        ExportError: There is no lowering for its device.
    """
    return Pipeline(
        steps=[*_canonical(), *lowering_steps(specification), *_finish(specification)],
        given=frozenset({Property.PLAN_APPLIED, Property.NO_DEAD_KEYS, Property.COLUMNS_CUT}),
    )


def rewrite_pipeline(specification: Specification) -> Pipeline:
    """What applies a plan to an unshared graph by the contract, traced or read from a bundle.

    Passes that find their work done, because the bundle was lowered before, change nothing.

    Args:
        specification: What is to be built, with the plan that the result shall have.

    Raises:
        ExportError: There is no lowering for its device.
    """
    return Pipeline(
        steps=[
            *_canonical(),
            *_sharing(specification.plan),
            *lowering_steps(specification),
            *_finish(specification),
        ]
    )


def _canonical() -> list[PassStep]:
    """One form for everything that later passes look for."""
    return [
        PassStep(
            transform=JoinDecode(),
            why="first, because a bundle's branches hide its attention from the passes",
        ),
        PassStep(
            transform=CommonPass(IdentityEliminationPass(), gives={Property.NO_IDENTITIES}),
            why="early, because an Identity between two nodes hides a pattern",
        ),
        PassStep(
            transform=CommonPass(
                LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
                gives={Property.CONSTANTS_LIFTED},
            ),
            why="all constants in one form, so that equal ones can be found",
        ),
        PassStep(
            transform=CommonPass(
                DeduplicateInitializersPass(size_limit=CONSTANT_SIZE),
                needs={Property.CONSTANTS_LIFTED},
                gives={Property.CONSTANTS_MERGED},
            ),
            why="equal constants become one, so that equal computations can be found",
        ),
        PassStep(
            transform=CommonPass(
                CommonSubexpressionEliminationPass(),
                needs={Property.CONSTANTS_MERGED, Property.NO_IDENTITIES},
                gives={Property.COMPUTED_ONCE},
            ),
            why="every layer computes the same shapes and masks",
        ),
        PassStep(
            transform=FuseRmsNorm(),
            why="after what could come between the parts of a norm",
        ),
        PassStep(
            transform=FuseRotary(),
            why="likewise; both before packing, whose Split would come between",
        ),
        PassStep(
            transform=CommonPass(RemoveUnusedNodesPass(), gives={Property.NOTHING_UNUSED}),
            why="what nothing reads has no role, and would be packed with what is needed",
        ),
        PassStep(
            transform=AssignRoles(),
            why="before anything is packed, cut or replaced, which hands roles on",
        ),
    ]


def _sharing(plan: SharingPlan) -> list[PassStep]:
    """What a graph needs that still computes what followers drop."""
    return [
        PassStep(
            transform=RewireProbabilities(plan.sources),
            why="followers read their source's probabilities",
        ),
        PassStep(
            transform=RemoveDeadBranches(plan.sources),
            why="their query and key branches are not needed any more",
        ),
        PassStep(
            transform=CutPackedWeights(),
            why="queries and keys that are packed with values outlive their branch",
        ),
    ]


def _finish(specification: Specification) -> list[PassStep]:
    """What makes a lowered graph ready to be written."""
    return [
        PassStep(
            transform=CommonPass(DeduplicateInitializersPass(size_limit=CONSTANT_SIZE)),
            why="the passes added equal constants to every layer",
        ),
        PassStep(
            transform=CommonPass(RemoveUnusedNodesPass(), gives={Property.NOTHING_UNUSED}),
            why="shape computations that only replaced nodes needed",
        ),
        PassStep(
            transform=CommonPass(
                RemoveUnusedOpsetsPass(),
                needs={Property.NOTHING_UNUSED},
                gives={Property.OPSETS_USED},
            ),
            why="only operator sets that are used are imported",
        ),
        PassStep(
            transform=CheckContract(specification),
            why="on the graph as it will be written, while it says what its weights are",
        ),
        PassStep(
            transform=ClearMetadata(),
            why="last: traces of source code, its paths and roles do not belong in a bundle",
        ),
    ]
