"""Every family as a student: the numbers, the parameters that are gone, the gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import TINY_MODELS, TinyModel, every_family
from transformers import DynamicCache, PreTrainedModel

from echoatt_exporter import EchoAttForCausalLM, SharingPlan
from echoatt_exporter.families import FAMILIES, family_of
from echoatt_exporter.families import __path__ as families_path
from echoatt_exporter.share.modeling_echoatt import MaterializedAttention

Models = Callable[..., Any]
Check = Callable[[torch.Tensor, torch.Tensor], None]
# Modules of `families` that are no family
SHARED_FILES = {
    "__init__",
    "attention_kinds",
    "base",
    "gemma_encoders",
    "head_layouts",
    "projections",
    "rotary",
}


def test_every_supported_family_has_a_tiny_model_and_a_large_enough_plan() -> None:
    assert {tiny.family for tiny in TINY_MODELS.values()} == set(FAMILIES)
    files = {path.stem for path in Path(families_path[0]).glob("*.py")}
    assert set(FAMILIES) == files - SHARED_FILES
    assert all(SharingPlan(tiny.sources).ratio >= 0.4 for tiny in TINY_MODELS.values())


@every_family
@torch.no_grad()
def test_unshared_student_equals_eager_teacher(
    family: str, tiny_model: Models, student_of: Models, tokens: torch.Tensor, assert_close: Check
) -> None:
    teacher: PreTrainedModel = tiny_model(family)
    teacher.set_attn_implementation("eager")
    student = student_of(family, SharingPlan.unshared(6))
    assert_close(student(tokens).logits, teacher(tokens).logits)


@every_family
@torch.no_grad()
def test_student_equals_teacher_shared_by_hand(
    family: str,
    tiny_model: Models,
    student_of: Models,
    reference_of: Models,
    tokens: torch.Tensor,
    assert_close: Check,
) -> None:
    student = student_of(family)
    expected = reference_of(family)(tokens).logits
    assert_close(student(tokens, use_cache=False).logits, expected)
    # Sharing must matter far more than the tolerance, or the line above says nothing
    assert (expected - tiny_model(family)(tokens).logits).abs().max() > 0.1


@every_family
@torch.no_grad()
@pytest.mark.parametrize(
    ("chunks", "given"),
    [([17], False), ([1] * 17, False), ([7, 1, 1, 6, 2], True)],
    ids=["all", "ones", "mixed-in-a-given-cache"],
)
def test_cached_chunks_equal_one_pass(
    family: str,
    chunks: list[int],
    given: bool,
    student_of: Models,
    tokens: torch.Tensor,
    assert_close: Check,
) -> None:
    # In float64, because how far float32 rounds apart here depends on the processor
    student: EchoAttForCausalLM = student_of(family).double()
    cache = DynamicCache() if given else None  # the first grows layer by layer, sliding or not
    parts = []
    for chunk in torch.split(tokens, chunks, dim=1):
        output = student(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert cache is not None
    assert cache.get_seq_length() == 17
    assert_close(torch.cat(parts, dim=1), student(tokens, use_cache=False).logits)


@every_family
@torch.no_grad()
def test_cache_holds_no_keys_for_followers(
    family: str, student_of: Models, tokens: torch.Tensor
) -> None:
    student: EchoAttForCausalLM = student_of(family)
    cache = student(tokens).past_key_values
    pairs = zip(cache.layers, student.sources, strict=True)
    for index, (layer, source) in enumerate(pairs):
        assert layer.values.numel() > 0
        assert (layer.keys.numel() == 0) == (index != source), f"layer {index}"


def _removed_by_each_follower(config: Any, tiny: TinyModel) -> int:
    """Elements of a layer's query and key projections, their biases and norms, by formula."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", heads)
    size = getattr(config, "head_dim", None) or hidden // heads
    rows = (heads + kv_heads) * size
    norms = {"none": 0, "head": 2 * size, "all": rows}[tiny.norms]
    return int(rows * hidden + tiny.biased * rows + norms)


@every_family
def test_followers_lose_exactly_queries_and_keys(
    family: str, tiny_model: Models, student_of: Models
) -> None:
    teacher, student = tiny_model(family), student_of(family)
    plan = SharingPlan(tuple(student.sources))
    per_follower = _removed_by_each_follower(teacher.config, TINY_MODELS[family])
    expected = teacher.num_parameters() - len(plan.followers) * per_follower
    assert student.num_parameters() == expected
    known = family_of(teacher.config)
    for layer in plan.followers:
        attention = known.attention_of(known.layers_of(student.decoder)[layer])
        names = {name.partition(".")[0] for name, _ in attention.named_parameters()}
        assert names == {"v_proj", "o_proj"}


@every_family
def test_gradients_equal_those_of_the_teacher_shared_by_hand(
    family: str, student_of: Models, reference_of: Models, tokens: torch.Tensor
) -> None:
    student, reference = student_of(family).train(), reference_of(family).train()
    losses = [model(tokens, labels=tokens).loss for model in (student, reference)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    expected = dict(reference.named_parameters())
    compared = 0
    for name, parameter in student.named_parameters():
        teachers_name = name.removeprefix("decoder.")
        assert parameter.grad is not None, name
        if teachers_name in expected:  # all but values cut out of a fused projection
            other = expected[teachers_name].grad
            torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=1e-5)
            compared += 1
    assert compared >= len(expected) - 9 * 3  # three followers have lost nine tensors at most


@every_family
def test_gradient_reaches_the_source_through_followers(
    family: str, student_of: Models, tokens: torch.Tensor
) -> None:
    """What a source's queries learn changes when its followers' share of it is cut off."""
    student: EchoAttForCausalLM = student_of(family).train()
    source = SharingPlan(tuple(student.sources)).shared_sources[0]
    known = family_of(student.decoder.config)
    attention: Any = known.attention_of(known.layers_of(student.decoder)[source])
    # The first projection of each is that of the queries, or of all three
    queries = next(attention.parameters())

    def gradient(**kwargs: Any) -> torch.Tensor:
        student.zero_grad()
        student(tokens, labels=tokens, use_cache=False, **kwargs).loss.backward()
        result: torch.Tensor = queries.grad.clone()
        return result

    class Cut(MaterializedAttention):
        def follow(self, module: Any, value_BNTD: torch.Tensor) -> torch.Tensor:
            self.probabilities = {s: p.detach() for s, p in self.probabilities.items()}
            return super().follow(module, value_BNTD)

    whole, cut = gradient(), gradient(shared_attention=Cut(student.sources))
    assert (whole - cut).abs().max() > 1e-3 * whole.abs().max()


@every_family
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_stays_near(
    family: str, dtype: torch.dtype, student_of: Models, tokens: torch.Tensor
) -> None:
    expected = student_of(family)(tokens).logits
    actual = student_of(family).to(dtype)(tokens).logits
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().mean() < 0.1 * expected.std()
