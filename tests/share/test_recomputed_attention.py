"""Recomputed attention gives what materialised probabilities give, gradients too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import TINY_MODELS

from echoatt_exporter import EchoAttForCausalLM
from echoatt_exporter.share.modeling_echoatt import ATTENTION_NAME
from echoatt_exporter.share.recomputed_attention import (
    RECOMPUTED_NAME,
    RecomputedAttention,
    why_not_recomputed,
)

Models = Callable[..., Any]
TOLERANCE = 1e-5
capless = pytest.mark.parametrize("family", [name for name in TINY_MODELS if name != "gemma2"])


def _run(
    student: EchoAttForCausalLM, tokens: torch.Tensor, name: str = ATTENTION_NAME, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter, each scaled to size 1."""
    student.decoder.set_attn_implementation(name)
    student.zero_grad()
    logits = student(tokens, use_cache=False, **kwargs).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.autograd.backward(loss)
    found = {"logits": logits.detach()}
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        found[parameter_name] = parameter.grad
    return {key: tensor / tensor.abs().max().clamp(min=1e-3) for key, tensor in found.items()}


def _assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=TOLERANCE, msg=name)


@capless
def test_outputs_and_gradients_are_the_same(
    family: str, student_of: Models, tokens: torch.Tensor
) -> None:
    """With the student's own masks, and with SDPA's, which are none where that is enough."""
    student: EchoAttForCausalLM = student_of(family).train()
    expected = _run(student, tokens)
    for name in (ATTENTION_NAME, RECOMPUTED_NAME):
        shared = RecomputedAttention(student.sources)
        _assert_same(_run(student, tokens, name, shared_attention=shared), expected)
    student.activation_checkpointing_enable()
    shared = RecomputedAttention(student.sources)
    _assert_same(_run(student, tokens, RECOMPUTED_NAME, shared_attention=shared), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padded_rows_are_the_same(family: str, student_of: Models, tokens: torch.Tensor) -> None:
    student: EchoAttForCausalLM = student_of(family).train()
    mask = torch.ones_like(tokens)
    mask[0, 14:] = 0  # the last query's window still holds two tokens
    expected = _run(student, tokens, attention_mask=mask)
    shared = RecomputedAttention(student.sources)
    actual = _run(student, tokens, RECOMPUTED_NAME, attention_mask=mask, shared_attention=shared)
    _assert_same(actual, expected)


def test_a_full_row_meets_no_mask(
    student_of: Models, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[object] = []
    attend = RecomputedAttention.attend

    def spy(self: RecomputedAttention, *args: Any, **kwargs: Any) -> torch.Tensor:
        masks.append(args[4])
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(RecomputedAttention, "attend", spy)
    student = student_of("llama")
    _run(student, tokens, RECOMPUTED_NAME, shared_attention=RecomputedAttention(student.sources))
    assert masks == [None] * 3  # the sources


def test_what_fused_attention_cannot_do_is_refused(
    student_of: Models, tokens: torch.Tensor
) -> None:
    capped, dropping = student_of("gemma2"), student_of("llama", attention_dropout=0.1).train()
    for student, word in ((capped, "softcap"), (dropping, "dropout")):
        assert why_not_recomputed(student.decoder.config) is not None
        with pytest.raises(ValueError, match=word):
            student(tokens, shared_attention=RecomputedAttention(student.sources))
    assert why_not_recomputed(student_of("llama").decoder.config) is None
