"""Tiny random models of every supported family, and a sharing plan for each.

Weights are large and everything that usually starts at 0 or 1 is random, so that attention is far
from uniform and no bias, norm or multiplier can be left out unseen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from echoatt_runtime.contract import SharingPlan

VOCAB_SIZE = 61
# Shorter than any sequence in the tests
SLIDING_WINDOW = 5
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class TinyModel:
    """A tiny model's family, config fields and sharing plan.

    Attributes:
        family: The model type.
        sources: A plan with at least 40 % followers that respects the layer kinds.
        fields: What differs from `COMMON`.
    """

    family: str
    sources: tuple[int, ...] = (0, 1, 1, 1, 4, 4)
    fields: dict[str, Any] = field(default_factory=dict)


# 4 heads of 12 are wider than the hidden size, and each pair of them shares keys and values
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

ALTERNATING = {
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "sliding_window": SLIDING_WINDOW,
}

TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("llama"),
    "llama_tied_biased": TinyModel(
        "llama", fields={"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "mistral": TinyModel("mistral", fields={"sliding_window": SLIDING_WINDOW}),
    "qwen2": TinyModel("qwen2"),
    "qwen2_sliding": TinyModel(
        "qwen2",
        (0, 0, 0, 3, 3, 5),
        {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW, "max_window_layers": 3},
    ),
    "qwen3": TinyModel("qwen3"),
    "phi3": TinyModel("phi3", fields={"sliding_window": SLIDING_WINDOW}),
    "phi3_full": TinyModel("phi3"),
    "gpt_neox": TinyModel("gpt_neox", fields={"use_parallel_residual": True}),
    "gpt_neox_serial": TinyModel(
        "gpt_neox", fields={"use_parallel_residual": False, "attention_bias": False}
    ),
    "gemma2": TinyModel(
        "gemma2",
        (0, 1, 0, 1, 0, 5),
        # small caps, so that they bite
        {
            **ALTERNATING,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_text": TinyModel(
        "gemma3_text",
        (0, 0, 2, 0, 4, 2),
        {
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
            "sliding_window": SLIDING_WINDOW,
            "query_pre_attn_scalar": 7,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": TinyModel("olmo2"),
    "granite": TinyModel(
        "granite",
        fields={
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "attention_bias": True,
        },
    ),
    # Layer 3 has no rotary embedding; it lends to layers that have it, layer 1 to one that has not
    "smollm3": TinyModel("smollm3", (0, 1, 1, 3, 3, 1), {"no_rope_layers": [1, 1, 0, 0, 1, 1]}),
    "smollm3_sliding": TinyModel(
        "smollm3",
        (0, 1, 0, 1, 4, 1),
        {
            "no_rope_layers": [1, 0, 1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": [FULL, SLIDING, FULL, SLIDING, FULL, SLIDING],
        },
    ),
}

# For a test with an argument `family`: run it on each of them
every_family = pytest.mark.parametrize("family", list(TINY_MODELS))

# gpt_neox knows neither head sizes of its own nor grouped heads; phi3 no head sizes
_ABSENT = {"gpt_neox": ("num_key_value_heads", "head_dim"), "phi3": ("head_dim",)}


def build_tiny_model(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny random model, the same for the same arguments, in evaluation mode.

    Args:
        name: A key of `TINY_MODELS`: a family or a variant of one.
        seed: For the weights.
        fields: Config fields that differ from the variant's.
    """
    tiny = TINY_MODELS[name]
    common = {k: v for k, v in COMMON.items() if k not in _ABSENT.get(tiny.family, ())}
    config = AutoConfig.for_model(tiny.family, **{**common, **tiny.fields, **fields})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # biases start at 0, norms at 0 or 1
                parameter.add_(noise, alpha=0.3)
            else:
                parameter.copy_(noise * 0.25)
    model.eval()
    return model


def tiny_plan(name: str) -> SharingPlan:
    """The sharing plan of `TINY_MODELS[name]`."""
    return SharingPlan(TINY_MODELS[name].sources)
