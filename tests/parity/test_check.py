"""Directories against bundles, PyTorch's side against the oracle, and what is chosen to compare."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tests.parity import mutants
from tests.parity.conftest import CONTEXT, specify

from echoatt_exporter.errors import CheckpointError, ParityError
from echoatt_exporter.parity import (
    assert_parity,
    check_parity,
    compare,
    record_reference,
    verified_context,
)
from echoatt_exporter.parity.cases import BatchCase, Case, write_script
from echoatt_exporter.parity.feeding import feed
from echoatt_exporter.parity.instrumented import open_bundle
from echoatt_exporter.share.apply import share_attention
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.cache import KVCache, bucket_capacity
from echoatt_runtime.contract import SharingPlan, Specification
from echoatt_runtime.errors import (
    BundleNotFoundError,
    DamagedBundleError,
    NumericalError,
    PlanError,
)
from echoatt_runtime.executor import Executor


@pytest.fixture(scope="module")
def teacher_dir(tiny_model: Any, tmp_path_factory: Any) -> Path:
    """The teacher of the sliding-window student."""
    path: Path = tmp_path_factory.mktemp("teacher")
    fields = {"num_hidden_layers": 4, "max_position_embeddings": CONTEXT}
    tiny_model("mistral", **fields).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(sliding: Any, write: Any) -> Path:
    path: Path = write(ir.load(sliding.graph_file), sliding.specification).model
    return path


@pytest.mark.parametrize("plan", [None, "2:1,3:0", SharingPlan((0, 1, 1, 0))])
def test_a_teachers_directory_with_the_bundles_plan(
    teacher_dir: Path, bundle: Path, plan: Any
) -> None:
    report = check_parity(teacher_dir, bundle, plan, max_context=50)

    assert report.passed
    assert report.cases[-2].name == "context of 50 by 17 and 1"
    assert_parity(teacher_dir, bundle.parent, plan, max_context=50)


def test_a_students_directory(sliding: Any, bundle: Path, tmp_path: Path) -> None:
    sliding.student.save_pretrained(tmp_path)

    assert check_parity(tmp_path, bundle, max_context=50).passed


def test_assert_parity_fails_on_a_fault(
    sliding: Any, write: Any, teacher_dir: Path, bundle: Path
) -> None:
    model = ir.load(sliding.graph_file)
    mutants.use_wrong_source(model, 2, 0)
    wrong = write(model, sliding.specification).model

    with pytest.raises(ParityError, match="layer 2's attention output"):
        assert_parity(teacher_dir, wrong, max_context=50)


def test_another_plan_cannot_be_compared(teacher_dir: Path, bundle: Path) -> None:
    with pytest.raises(PlanError, match=r"could not compare.*\[0, 1, 1, 0\], not \[0, 1, 1, 1\]"):
        check_parity(teacher_dir, bundle, SharingPlan((0, 1, 1, 1)))


def test_a_students_other_plan_cannot_be_compared(
    tiny_model: Any, bundle: Path, tmp_path: Path
) -> None:
    teacher = tiny_model("mistral", num_hidden_layers=4, max_position_embeddings=CONTEXT)
    share_attention(teacher, SharingPlan((0, 1, 1, 1))).save_pretrained(tmp_path)

    with pytest.raises(PlanError):
        check_parity(tmp_path, bundle)


def test_another_shape_cannot_be_compared(tiny_model: Any, bundle: Path, tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 4, "max_position_embeddings": CONTEXT, "sliding_window": 6}
    tiny_model("mistral", **fields).save_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match=r"could not compare.*sliding_window 5 instead of 6"):
        check_parity(tmp_path, bundle)


def test_another_bundle_than_the_reference_is_for_cannot_be_compared(
    sliding: Any, write: Any
) -> None:
    other = dataclasses.replace(sliding.specification, plan=SharingPlan((0, 1, 1, 1)))

    with pytest.raises(CheckpointError, match=r"could not compare.*plan"):
        compare(sliding.reference, write(ir.load(sliding.graph_file), other))


def test_no_bundle_and_no_model(teacher_dir: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleNotFoundError):
        check_parity(teacher_dir, tmp_path / "absent.onnx")
    with pytest.raises(CheckpointError):
        check_parity(tmp_path / "absent", bundle)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(DamagedBundleError):
        check_parity(teacher_dir, tmp_path)


def test_a_model_that_computes_nan_cannot_be_compared(tiny_model: Any) -> None:
    student = share_attention(tiny_model("llama"), SharingPlan.unshared(6))
    torch.nn.init.constant_(student.decoder.lm_head.weight, float("nan"))

    with pytest.raises(NumericalError, match="PyTorch itself"):
        record_reference(student, specify(student), tokenizer_dir=None)


def test_the_reference_is_what_the_oracle_computes(tiny_model: Any, oracle: Any) -> None:
    sources = (0, 1, 1, 1, 4, 4)
    teacher = tiny_model("llama")
    tensors = {name: tensor.numpy() for name, tensor in teacher.state_dict().items()}
    judge = oracle(teacher.config.to_dict(), tensors, sources)
    student = share_attention(teacher, SharingPlan(sources))

    reference = record_reference(student, specify(student), tokenizer_dir=None)

    assert len(reference.texts) == 4
    for text in reference.texts:
        expected = judge.logits(text.tokens)[text.positions]
        np.testing.assert_allclose(text.logits, expected, atol=1e-5 * expected.std())
        # No rotation, whose angles are the checkpoint's float32: nothing but the logits is rounded
        np.testing.assert_allclose(text.logits[0], expected[0], rtol=2e-7, atol=1e-9)


def test_long_texts_run_in_pieces_with_the_same_result(
    sliding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echoatt_exporter.parity import reference as module

    monkeypatch.setattr(module, "_PROBABILITIES_AT_ONCE", 70 * CONTEXT * 4)
    pieces = record_reference(sliding.student, sliding.specification, tokenizer_dir=None)

    for whole, pieced in zip(sliding.reference.texts, pieces.texts, strict=True):
        np.testing.assert_array_equal(whole.tokens, pieced.tokens)
        np.testing.assert_allclose(whole.logits, pieced.logits, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(whole.contexts, pieced.contexts, rtol=1e-6, atol=1e-6)


def test_real_prompts_go_through_the_tokenizer(sliding: Any, stories260k: Path) -> None:
    specification = dataclasses.replace(sliding.specification, vocab_size=512)

    script = write_script(specification, stories260k)
    without = write_script(specification, None)

    assert [case.name for case in script.cases] == [case.name for case in without.cases]
    prompts = [script.texts[index].tokens for index in script.prompts.texts]
    assert prompts[0][:4].tolist() == [1, 403, 407, 261]  # <s> Once upon a
    assert [len(prompt) for prompt in prompts] == [26, 19, 36]
    # Every one of them runs in some way
    run = {index for case in script.cases for index in case.texts}
    assert run == set(range(len(script.texts)))


@pytest.mark.parametrize("context", [8, 20, 41, 193, 280, 300])
def test_no_case_leaves_the_context(sliding: Any, context: int) -> None:
    specification = dataclasses.replace(sliding.specification, context_length=context)

    script = write_script(specification, None)

    for request in script.texts:
        assert request.positions.max() < len(request.tokens) <= context
    for case in script.cases:
        if isinstance(case, BatchCase):
            ends = [(row.text, row.stop) for row in case.rows]
            assert all(0 < row.prompt < row.stop for row in case.rows)
        else:
            taken = np.sum(case.steps, axis=0).tolist()
            ends = list(zip(case.texts, taken, strict=True))
        for text, end in ends:
            assert end <= len(script.texts[text].tokens)


def _long_case(specification: Specification, max_context: int | None) -> tuple[str, list[range]]:
    """The long case's name and the positions that it runs at once, where they are kept."""
    script = write_script(specification, None, max_context)
    (case,) = (case for case in script.cases if case.name.startswith("context of"))
    assert isinstance(case, Case)
    ends = np.cumsum(case.steps).tolist()
    calls = [range(end - count, end) for (count,), end in zip(case.steps, ends, strict=True)]
    kept = set(script.texts[case.texts[0]].positions.tolist())
    return case.name, [call for call in calls if kept & set(call)]


@pytest.mark.parametrize("window", [5, 280, 512, 1_060, 4_096])
def test_single_tokens_and_chunks_go_past_a_growth_and_past_a_window(
    sliding: Any, window: int
) -> None:
    fields = {"context_length": 8_192, "sliding_window": window}
    specification = dataclasses.replace(sliding.specification, **fields)
    grown = bucket_capacity(1, 8_192)

    name, exported = _long_case(specification, verified_context(specification))
    whole, calls = _long_case(specification, None)

    assert verified_context(specification) <= 1_100
    assert ("inside the window of 4096" in name) is (window == 4_096)
    assert "inside" not in whole
    past = [(grown, exported), (window, calls)]
    if window < 4_096:
        past.append((window, exported))
    for edge, found in past:
        assert {len(call) == 1 for call in found if call.start > edge} == {True, False}
    assert any(call.start < grown < call.stop - 1 for call in exported)


def test_rows_join_and_leave_while_caches_grow_and_shrink(
    sliding: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []
    run = Executor.run

    def watch(self: Executor, cache: KVCache, token_ids: Any, *arguments: Any) -> Any:
        calls.append((*token_ids.shape, cache.capacity))
        return run(self, cache, token_ids, *arguments)

    monkeypatch.setattr(Executor, "run", watch)
    script = write_script(sliding.specification, None)
    (case,) = (case for case in script.cases if isinstance(case, BatchCase))
    rows = list(feed(open_bundle(Bundle.open(bundle), "cpu"), case, sliding.reference.texts))

    grown = bucket_capacity(1, CONTEXT)
    singles = [(rows, capacity) for rows, tokens, capacity in calls if tokens == 1]
    # Rows at work, and whether the caches are of the first size, larger or smaller
    sizes = [(rows, int(np.sign(capacity - grown))) for rows, capacity in singles]
    stages = [size for size, _ in itertools.groupby(sizes)]
    assert stages == [(1, 0), (3, 0), (3, 1), (2, 1), (1, -1), (2, -1), (1, -1)]
    assert len(rows) == sum(row.stop - row.prompt for row in case.rows)


def test_what_is_kept_does_not_grow_with_the_context(sliding: Any) -> None:
    specification = dataclasses.replace(sliding.specification, context_length=100_000)

    script = write_script(specification, None)

    assert max(len(text.tokens) for text in script.texts) == 100_000
    assert max(len(text.positions) for text in script.texts) < 100
    assert sum(len(text.positions) for text in script.texts) < 200
