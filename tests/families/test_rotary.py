"""How far scaled rotary embeddings reach, by configurations as they are published."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.errors import UnsupportedModelError

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [2.0]}


def _yarn(factor: float, original: int | None = None) -> dict[str, Any]:
    given = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_type": "yarn", "factor": factor, **given}


@pytest.mark.parametrize(
    ("stated", "rope", "expected"),
    [
        (4096, None, 4096),
        # As the first versions wrote it, and the length before scaling, as transformers asks for
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (128, _yarn(4.0), 512),
        (4096, {"type": "linear", "factor": 2.5}, 10240),
        # Qwen3: neither, but 8,192 more than the length before
        (40960, _yarn(4.0, 32768), 131072),
        # DeepSeek: the length after scaling
        (163840, _yarn(40.0, 4096), 163840),
        # More than the factor says, by whoever wrote it
        (131072, _yarn(2.0, 32768), 131072),
        (16384, {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        # Llama 3.2 and 3.1, whose factors are none of lengths
        (131072, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}, 131072),
        (131072, LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        (8192, LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}, 65536),
        (512, {"rope_type": "proportional", "partial_rotary_factor": 0.5}, 512),
        # Numbers that are none: transformers says so when it computes
        (512, _yarn(float("inf"), 128), 512),
        (512, {"rope_type": "linear", "factor": -1.0}, 512),
    ],
)
def test_context(stated: int, rope: dict[str, Any] | None, expected: int) -> None:
    config = LlamaConfig(max_position_embeddings=stated, rope_parameters=rope)
    assert architecture_of(config).context_length == expected


def test_the_shortest_of_a_layer_kinds_own_embeddings_counts() -> None:
    """Gemma 3 scales those of full layers only, and states the length after it."""
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    config = Gemma3TextConfig(
        max_position_embeddings=131072,
        rope_parameters={"full_attention": rope, "sliding_attention": {"rope_type": "default"}},
    )
    assert architecture_of(config).context_length == 131072


def test_a_table_of_positions_is_not_scaled() -> None:
    config = GPT2Config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1.0})
    assert architecture_of(config).context_length == 1024


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, LONGROPE])
def test_angles_that_depend_on_the_length_are_refused(rope: dict[str, Any]) -> None:
    config = Qwen3Config(max_position_embeddings=4096, rope_parameters=rope)
    with pytest.raises(UnsupportedModelError, match="changes its frequencies with the length"):
        architecture_of(config)
