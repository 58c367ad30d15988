"""Students under transformers' `generate`: caches, beams, padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import every_family
from transformers import DynamicCache, StaticCache

from echoatt_exporter import EchoAttForCausalLM, SharingPlan

Models = Callable[..., Any]

# No end-of-sequence token: every run makes its full count of tokens
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def _generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> list[list[int]]:
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    rows: list[list[int]] = model.generate(ids, **{**GREEDY, **kwargs})[:, ids.shape[1] :].tolist()
    return rows


@every_family
def test_generate_equals_teacher_shared_by_hand_with_and_without_cache(
    family: str, student_of: Models, reference_of: Models, tokens: torch.Tensor
) -> None:
    student = student_of(family)
    expected = _generate(reference_of(family), tokens, use_cache=False)
    assert _generate(student, tokens) == expected
    assert _generate(student, tokens, use_cache=False) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_beam_search_reorders_followers_caches(
    family: str, student_of: Models, reference_of: Models, tokens: torch.Tensor
) -> None:
    expected = _generate(reference_of(family), tokens, use_cache=False, num_beams=3)
    assert _generate(student_of(family), tokens, num_beams=3) == expected
    assert expected != _generate(student_of(family), tokens)  # the beams found something else


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "smollm3"])
def test_left_padded_rows_equal_rows_alone(
    family: str, student_of: Models, tokens: torch.Tensor
) -> None:
    student = student_of(family)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    padded = tokens.masked_fill(mask == 0, 0)
    together = _generate(student, padded, attention_mask=mask)
    assert together == _generate(student, tokens[:1]) + _generate(student, tokens[1:, 6:])


def test_a_conversation_goes_on_in_the_same_cache(student_of: Models, tokens: torch.Tensor) -> None:
    student = student_of("gemma2")
    cache = DynamicCache(config=student.decoder.config)
    first = student.generate(tokens, past_key_values=cache, **GREEDY)
    longer = torch.cat([first, tokens[:, :3]], dim=1)
    resumed = _generate(student, longer, past_key_values=cache)
    assert resumed == _generate(student, longer, use_cache=False)


def test_static_cache_is_refused(student_of: Models, tokens: torch.Tensor) -> None:
    student: EchoAttForCausalLM = student_of("llama")
    cache = StaticCache(config=student.decoder.config, max_cache_len=32)
    with pytest.raises(ValueError, match=r"layer 2 of the cache is a StaticLayer; .*DynamicCache"):
        student(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="'dynamic'"):
        _generate(student, tokens, cache_implementation="static")


def test_a_cache_that_the_teacher_filled_is_refused(
    tiny_model: Models, student_of: Models, tokens: torch.Tensor
) -> None:
    cache = tiny_model("llama")(tokens).past_key_values
    with pytest.raises(ValueError, match="layer 2 of the cache holds another model's keys"):
        student_of("llama")(tokens, past_key_values=cache)


@torch.no_grad()
def test_an_unshared_student_takes_the_teachers_cache(
    tiny_model: Models, student_of: Models, tokens: torch.Tensor, assert_close: Callable[..., None]
) -> None:
    teacher, student = tiny_model("llama"), student_of("llama", SharingPlan.unshared(6))
    cache = teacher(tokens[:, :9]).past_key_values
    expected = teacher(tokens).logits[:, 9:]
    assert_close(student(tokens[:, 9:], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_inputs_embeds_and_logits_to_keep(student_of: Models, tokens: torch.Tensor) -> None:
    student: EchoAttForCausalLM = student_of("llama")
    whole = student(tokens).logits
    embedded = student(inputs_embeds=student.get_input_embeddings()(tokens), logits_to_keep=2)
    torch.testing.assert_close(embedded.logits, whole[:, -2:], rtol=0, atol=1e-6)
