"""A teacher's attention maps: whose they are, and that the teacher is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny_models import SLIDING_WINDOW, TINY_MODELS, VOCAB_SIZE, every_family
from tests.wording import whole
from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.analyze.attention_maps import attention_maps
from echoatt_exporter.errors import AnalysisError

WINDOW = torch.randint(3, VOCAB_SIZE, (17,), generator=torch.Generator().manual_seed(3))


@every_family
def test_maps_are_the_familys_own(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    teacher = tiny_model(family)
    maps = attention_maps(teacher, WINDOW)
    assert maps.shape == (6, 4, 17, 17)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(6, 4, 17))
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        own = teacher(WINDOW[None], output_attentions=True).attentions
    torch.testing.assert_close(maps, torch.cat(own), rtol=0, atol=1e-6)


def test_sliding_layers_see_nothing_outside_their_window(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    maps = attention_maps(tiny_model("gemma3_text"), WINDOW)
    behind = torch.ones(17, 17).tril(-SLIDING_WINDOW).bool()
    for layer_maps, kind in zip(
        maps, TINY_MODELS["gemma3_text"].fields["layer_types"], strict=True
    ):
        assert layer_maps[:, behind].any() == (kind == "full_attention")


class _Foreign(nn.Module):
    """An attention that uses no attention interface."""

    def forward(self, hidden_states: torch.Tensor, **_unused: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


class _Narrow(_Foreign):
    """One that takes no arguments but what its author knew."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, position_embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return hidden_states, None


@pytest.mark.parametrize(
    ("window", "attention", "words"),
    [
        (WINDOW, None, None),
        (torch.full((65,), 3), None, "windows of 65 tokens .* context of 64"),
        (torch.tensor([3, VOCAB_SIZE]), None, "token 61 is outside .* vocabulary of 61"),
        (WINDOW, _Foreign, r"gives no attention maps .*from layers \[2\]"),
        (WINDOW, _Narrow, "gives no attention maps .*unexpected keyword"),
    ],
    ids=["no-error", "too-long", "foreign-tokens", "foreign-attention", "narrow-attention"],
)
def test_teacher_is_left_as_it_was(
    window: torch.Tensor,
    attention: type[nn.Module] | None,
    words: str | None,
    tiny_model: Callable[..., Any],
) -> None:
    """Its attention and each module's training mode, after an error too."""
    teacher = tiny_model("llama", attention_dropout=0.5)
    teacher.set_attn_implementation("eager")
    expected = attention_maps(teacher, WINDOW)
    teacher.train()
    teacher.model.layers[1].eval()
    if attention is not None:
        teacher.model.layers[2].self_attn = attention()
    modes = [module.training for module in teacher.modules()]
    if words is None:
        assert attention_maps(teacher, window).equal(expected)  # no dropout
    else:
        with pytest.raises(AnalysisError, match=whole(words)) as caught:
            attention_maps(teacher, window)
        assert "\n" not in str(caught.value)
    assert teacher.config._attn_implementation == "eager"
    assert [module.training for module in teacher.modules()] == modes
