"""A correct trace passes; each fault planted in it fails, in the cases that can see it.

Most kinds of faults are planted after the passes: see `test_pass_mutants`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from tests.parity import mutants
from tests.tiny_models import SLIDING_WINDOW

from echoatt_exporter.errors import ParityError
from echoatt_exporter.parity import compare

HEAD_DIM = 12
LONG = "context of 300 by 192 and 1"


@dataclass(frozen=True)
class Mutant:
    """A fault, the first layer whose attention shows it, and the cases that it spares."""

    plant: Callable[[ir.Model], None]
    layer: int | None
    spared: tuple[str, ...] = ()


MUTANTS = {
    "a follower's heads swapped": Mutant(lambda m: mutants.swap_probability_heads(m, 2), 2),
    # The context of the layer itself is right
    "heads' outputs swapped in the last layer": Mutant(
        lambda m: mutants.swap_output_heads(m, 3, HEAD_DIM), None
    ),
    "one future token seen": Mutant(
        lambda m: mutants.see_one_future_token(m, 1, 2), 1, ("prefill by 1",)
    ),
    "window one too narrow": Mutant(lambda m: mutants.shift_window(m, SLIDING_WINDOW, -1), 0),
    "wrong source": Mutant(lambda m: mutants.use_wrong_source(m, 2, 0), 2),
    "one token rotated further": Mutant(
        lambda m: mutants.rotate_one_token_further(m, 4), 0, ("prefill by 1",)
    ),
    "written to another row's place": Mutant(
        lambda m: mutants.write_to_first_rows_place(m, 1),
        1,
        ("prefill", "prefill by 1", "prefill by 13", "decode of 6", LONG),
    ),
    "slots beyond a bucket lost": Mutant(
        lambda m: mutants.forget_after_bucket(m, 1, 256),
        1,
        ("prefill", "prefill by 1", "prefill by 13", "decode of 6", "ragged batch"),
    ),
    "values 0.1 % too large": Mutant(
        lambda m: mutants.scale_weight(m, "model.layers.2.self_attn.v_proj.weight", 1.001), 2
    ),
}

CASES = (
    "prefill",
    "prefill by 1",
    "prefill by 13",
    "decode of 6",
    "ragged batch",
    LONG,
    "rows that join and leave",
)


def test_a_correct_bundle_passes_far_from_the_tolerance(sliding: Any, write: Any) -> None:
    report = compare(sliding.reference, write(ir.load(sliding.graph_file), sliding.specification))

    assert report.passed
    assert tuple(case.name for case in report.cases) == CASES
    # A fifth: rounding differs from machine to machine
    assert report.worst.excess < 0.2
    assert all(case.first_diverging_token is None for case in report.cases)
    assert all(case.top1_agreement == 1 for case in report.cases)
    assert (report.first_diverging_layer, report.divergence) == (None, "")
    report.raise_on_mismatch()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_fails_in_every_case_that_can_see_it(name: str, sliding: Any, write: Any) -> None:
    mutant = MUTANTS[name]
    model = ir.load(sliding.graph_file)
    mutant.plant(model)

    report = compare(sliding.reference, write(model, sliding.specification))

    failed = {case.name for case in report.cases if not case.passed}
    assert failed == set(CASES) - set(mutant.spared)
    # Not by a hair: ten times the tolerance
    assert report.worst.excess > 10
    assert report.first_diverging_layer == mutant.layer
    with pytest.raises(ParityError) as caught:
        report.raise_on_mismatch()
    message = str(caught.value)
    assert "\n" not in message
    assert report.worst.name in message
    assert (
        "after the last layer" if mutant.layer is None else f"layer {mutant.layer}'s"
    ) in message


def test_a_difference_of_rounding_passes(sliding: Any, write: Any) -> None:
    model = ir.load(sliding.graph_file)
    mutants.raise_epsilon(model)

    report = compare(sliding.reference, write(model, sliding.specification))

    assert report.passed
    assert report.worst.excess > 0.1  # it was planted


def test_nan_fails_and_is_counted(sliding: Any, write: Any) -> None:
    model = ir.load(sliding.graph_file)
    mutants.scale_weight(model, "model.layers.1.self_attn.v_proj.weight", float("nan"))

    report = compare(sliding.reference, write(model, sliding.specification))

    vocabulary = sliding.specification.vocab_size
    assert [case.nan_count for case in report.cases] == [
        case.rows * vocabulary for case in report.cases
    ]
    assert report.first_diverging_layer == 1
    assert report.to_dict()["cases"][0]["max_abs_error"] is None
    with pytest.raises(ParityError, match="logits are NaN or infinite"):
        report.raise_on_mismatch()


def test_one_fault_after_another_reports_the_first_layer(
    sliding: Any, write: Callable[..., Path]
) -> None:
    model = ir.load(sliding.graph_file)
    mutants.scale_weight(model, "model.layers.3.self_attn.v_proj.weight", 2.0)
    mutants.scale_weight(model, "model.layers.1.self_attn.v_proj.weight", 2.0)

    report = compare(sliding.reference, write(model, sliding.specification))

    assert report.first_diverging_layer == 1
