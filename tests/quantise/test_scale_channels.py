"""C channels, K inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import every_family

from echoatt_exporter.quantise.places import find_places
from echoatt_exporter.quantise.scale_channels import factors, scale_channels
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM

Make = Callable[..., EchoAttForCausalLM]


@pytest.fixture
def make(tiny_model: Any, plan_for: Any) -> Make:
    def student(family: str, **fields: Any) -> EchoAttForCausalLM:
        return share_attention(tiny_model(family, **fields), plan_for(family)).eval()

    return student


def _windows(student: EchoAttForCausalLM) -> torch.Tensor:
    size: int = student.decoder.config.vocab_size
    return torch.randint(size, (4, 24), generator=torch.Generator().manual_seed(3))


def test_factors_are_what_was_worked_out_by_hand() -> None:
    """Roots of inputs over weights are 8, 2, 2 and 1/2, with 2 for their mean.

    A channel that is never filled, and one that nothing reads, stay as they are.
    """
    inputs_C = torch.tensor([16.0, 4.0, 8.0, 1.0, 0.0, 9.0])
    weights_C = torch.tensor([0.25, 1.0, 2.0, 4.0, 1.0, 0.0])
    assert factors(inputs_C**2, weights_C**2).tolist() == [4.0, 1.0, 1.0, 0.25, 1.0, 1.0]


def _places_of_a_layer(student: EchoAttForCausalLM) -> int:
    """In front of attention and feed-forward, values, what is multiplied with a gate."""
    ungated = {"gpt2": 3, "gpt_neox": 3, "starcoder2": 3}
    # OLMo 2's norms are behind the blocks
    return (ungated | {"olmo2": 2}).get(student.decoder.config.model_type, 4)


@torch.no_grad()
@every_family
def test_every_family_computes_what_it_did(make: Make, family: str) -> None:
    student, tokens = make(family), torch.arange(24).view(2, 12)
    before = student(tokens, use_cache=False).logits
    places = find_places(student)
    untied = student.get_output_embeddings().weight is not student.get_input_embeddings().weight
    assert len(places) == 6 * _places_of_a_layer(student) + untied
    random = torch.Generator().manual_seed(4)
    for place in places:
        channels = len(place.outputs)
        place.scale(torch.exp2(torch.randint(-4, 5, (channels,), generator=random)))
    after = student(tokens, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.std()))
    assert scale_channels(student, _windows(student))
    again = student(tokens, use_cache=False).logits
    torch.testing.assert_close(again, before, rtol=0, atol=1e-5 * float(before.std()))


def test_a_student_in_which_something_else_reads_is_left_as_it_was(make: Make) -> None:
    student = make("llama")
    mlp = student.decoder.model.layers[2].mlp
    mlp.up_proj.weight.data[5] *= 64
    assert scale_channels(copy.deepcopy(student), _windows(student))
    mlp.forward = lambda hidden: mlp.down_proj(mlp.act_fn(mlp.up_proj(hidden)))
    own = copy.deepcopy(student.state_dict())
    assert not scale_channels(student, _windows(student))
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, own[name], rtol=0, atol=0)
