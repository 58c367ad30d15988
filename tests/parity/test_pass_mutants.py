"""Each pass's result is compared: a fault planted right after it fails, and is located."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import pytest
from tests.parity import mutants
from tests.parity import pass_mutants as planted
from tests.parity.conftest import PAST_WINDOW, WINDOW
from tests.quantisation import to_nearest

from echoatt_exporter.graph import rewrite_pipeline, run_pipeline
from echoatt_exporter.graph.run import PassStep
from echoatt_exporter.parity import compare, record_reference
from echoatt_exporter.quantise.round_weights import round_to_nearest
from echoatt_runtime.contract import Specification

HEAD_DIM = 12
# What the caches hold before they grow
GROWN = 272

LONG = f"context of {PAST_WINDOW} by 192 and 1"
JOINING = "rows that join and leave"
SHORT = ("prefill", "prefill by 1", "prefill by 13", "decode of 6", "ragged batch")
CASES = (*SHORT, LONG, JOINING)
ROUNDED = ", rounded weights"


@dataclass(frozen=True)
class Mutant:
    """A fault, the pass that it comes after, and what shows it.

    Attributes:
        after: The pass's name.
        plant: Changes the graph.
        layer: The first layer whose attention shows it.
        spared: The cases that do not show it.
        dtypes: Of the bundles in which it is planted.
        time: Which run of that pass it comes after, where there are several.
    """

    after: str
    plant: Callable[[ir.Model], None]
    layer: int | None
    spared: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = field(default=("fp32",), kw_only=True)
    time: int = field(default=1, kw_only=True)


BOTH = ("fp32", "int4")

MUTANTS = {
    "one layer's scores 1 % too large": Mutant(
        "JoinDecode", lambda m: planted.scale_scores(m, 1, 1.01), 1, dtypes=BOTH
    ),
    "two heads' probabilities swapped": Mutant(
        "IdentityEliminationPass", lambda m: mutants.swap_probability_heads(m, 1), 1
    ),
    "window one too wide": Mutant(
        "LiftConstantsToInitializersPass",
        lambda m: mutants.shift_window(m, WINDOW, 1),
        0,
        (*SHORT, JOINING),
    ),
    "values 0.1 % too large": Mutant(
        "DeduplicateInitializersPass",
        lambda m: mutants.scale_weight(m, "model.layers.2.self_attn.v_proj.weight", 1.001),
        2,
        dtypes=BOTH,
    ),
    "mask row dropped": Mutant(
        "CommonSubexpressionEliminationPass",
        lambda m: mutants.drop_mask_row(m, 0, 3),
        0,
        ("prefill by 1",),
    ),
    "two value heads exchanged": Mutant(
        "RewireProbabilities", lambda m: planted.swap_cached_heads(m, 3, "v_proj"), 3
    ),
    "two key heads exchanged": Mutant(
        "RemoveDeadBranches", lambda m: planted.swap_cached_heads(m, 0, "k_proj"), 0
    ),
    "mask of the longest row": Mutant(
        "CutPackedWeights",
        mutants.mask_by_longest_row,
        0,
        ("prefill", "prefill by 1", "prefill by 13", "decode of 6", LONG),
    ),
    "a norm's epsilon too large": Mutant(
        "FuseRmsNorm", lambda m: planted.change_epsilon(m, 1, 1e4), 1, dtypes=BOTH
    ),
    "rotary pairs instead of halves": Mutant(
        "FuseRotary", lambda m: planted.pair_neighbours(m, 1), 1
    ),
    "a norm's weight lost": Mutant(
        "FuseSkipRmsNorm", lambda m: planted.forget_norm_weight(m, 1), 2, dtypes=BOTH
    ),
    "packed keys and values exchanged": Mutant(
        "PackProjections",
        lambda m: planted.exchange_keys_and_values(m, 1),
        1,
        dtypes=BOTH,
    ),
    "two output projections' heads swapped": Mutant(
        "AssignRoles", lambda m: mutants.swap_output_heads(m, 0, HEAD_DIM), 1
    ),
    "queries of two groups exchanged": Mutant(
        "RotateTogether", lambda m: planted.swap_rotated_groups(m, 0), 0
    ),
    "logits 0.1 % too large": Mutant(
        "ShareTiedTable", lambda m: mutants.scale_weight(m, "lm_head.weight", 1.001), None
    ),
    "a looked-up row 5 % too large": Mutant(
        "QuantizeTable", lambda m: planted.scale_row(m, 3, 1.05), 1, dtypes=("int4",)
    ),
    "a block's scale 5 % too large": Mutant(
        "QuantizeWeights",
        lambda m: planted.scale_block(m, 1, 1.05),
        1,
        dtypes=("int4",),
    ),
    "wanted rows sorted": Mutant(
        "GatherEarly", mutants.sort_wanted_rows, None, ("prefill by 1", JOINING)
    ),
    "wanted rows of the residual stream ignored": Mutant(
        "GatherEarly", planted.ignore_wanted_rows, None, ("prefill by 1",)
    ),
    "one token's scores 1 % too large": Mutant(
        "SplitDecode",
        lambda m: planted.scale_one_token(m, 1, 1.01),
        1,
        ("prefill",),
        dtypes=BOTH,
    ),
    "one token's heads swapped": Mutant(
        "SplitDecode", lambda m: planted.swap_one_tokens_heads(m, 2), 2, ("prefill",), dtypes=BOTH
    ),
    "many tokens' scores 1 % too large": Mutant(
        "SplitDecode", lambda m: planted.scale_many_tokens(m, 0, 1.01), 0, ("prefill by 1",)
    ),
    "one token blind behind the first growth": Mutant(
        "SplitDecode",
        lambda m: planted.forget_behind_slot(m, 1, GROWN),
        1,
        SHORT,
        dtypes=BOTH,
    ),
    "one token's window one too wide": Mutant(
        "SplitDecode",
        lambda m: planted.widen_window(m, 0, WINDOW, one_token=True),
        0,
        (*SHORT, JOINING),
    ),
    "many tokens' window one too wide": Mutant(
        "SplitDecode",
        lambda m: planted.widen_window(m, 0, WINDOW, one_token=False),
        0,
        (*SHORT, JOINING),
    ),
    "gate and up exchanged": Mutant(
        "RemoveUnusedNodesPass",
        lambda m: planted.exchange_gate_and_up(m, 3),
        None,
        dtypes=BOTH,
        time=2,
    ),
    "decoded tokens rotated further": Mutant(
        "RemoveUnusedOpsetsPass",
        mutants.rotate_decoded_tokens_further,
        0,
        ("prefill", "prefill by 1"),
    ),
    "two heads' outputs swapped": Mutant(
        "ClearMetadata", lambda m: mutants.swap_output_heads(m, 1, HEAD_DIM), 2
    ),
    # Passes and the contract's check refuse it before
    "wrong source": Mutant(
        "CheckContract", lambda m: planted.use_wrong_source(m, 2, 0), 2, dtypes=BOTH
    ),
    "values written one token early": Mutant(
        "CheckContract",
        lambda m: planted.write_one_token_early(m, "present.2.value"),
        2,
        ("prefill",),
        dtypes=BOTH,
    ),
}


@pytest.fixture(scope="module", params=["fp32", "int4"])
def target(request: Any, unshared: Any) -> Any:
    """The unshared trace, and PyTorch's side of a student's bundle."""
    if request.param == "fp32":
        return unshared
    specification = dataclasses.replace(
        unshared.specification, dtype=request.param, quantisation=to_nearest(4)
    )
    student = copy.deepcopy(unshared.student)
    round_to_nearest(student, to_nearest(4), lambda _done, _total: None)
    reference = record_reference(student, specification, tokenizer_dir=None)
    return dataclasses.replace(unshared, specification=specification, reference=reference)


def _export(target: Any, mutant: Mutant | None) -> ir.Model:
    """The finished graph, with a fault planted after the first pass of its name."""
    model = ir.load(target.graph_file)
    done: list[str] = []

    def plant(step: PassStep | None) -> None:
        """Called before each pass, and after the last."""
        last = done[-1] if done else None
        if mutant is not None and (last, done.count(mutant.after)) == (mutant.after, mutant.time):
            mutant.plant(model)
        if step is not None:
            done.append(step.name)

    run_pipeline(model, rewrite_pipeline(target.specification), plant)
    plant(None)
    return model


def test_a_fault_is_planted_after_every_pass(unshared: Any) -> None:
    def passes(specification: Specification) -> set[str]:
        return {step.name for step in rewrite_pipeline(specification).steps}

    specification = unshared.specification
    int4 = dataclasses.replace(specification, dtype="int4", quantisation=to_nearest(4))
    every = passes(specification) | passes(int4)
    assert {mutant.after for mutant in MUTANTS.values()} == every


def test_the_correct_bundle_passes(target: Any, write: Any) -> None:
    report = compare(target.reference, write(_export(target, None), target.specification))

    assert report.passed, report.to_dict()
    assert tuple(case.name.removesuffix(ROUNDED) for case in report.cases) == CASES
    assert report.worst.excess < 0.2


@pytest.mark.parametrize(
    ("target", "name"),
    [(dtype, name) for name, mutant in MUTANTS.items() for dtype in mutant.dtypes],
    indirect=["target"],
)
def test_a_fault_after_a_pass_fails_and_is_located(target: Any, name: str, write: Any) -> None:
    mutant = MUTANTS[name]

    report = compare(target.reference, write(_export(target, mutant), target.specification))

    failed = {case.name.removesuffix(ROUNDED) for case in report.cases if not case.passed}
    assert failed == set(CASES) - set(mutant.spared)
    # Not by a hair: five times the tolerance
    assert report.worst.excess > 5
    assert report.first_diverging_layer == mutant.layer
