"""What is decided and checked before a run begins."""

from __future__ import annotations

import dataclasses
import math

from transformers import PreTrainedConfig

from echoatt_exporter.distill.config import AttentionChoice, DistillConfig
from echoatt_exporter.distill.trainer import Stage
from echoatt_exporter.errors import TrainingError
from echoatt_exporter.share.recomputed_attention import why_not_recomputed

# On the CPU, above this many tokens a row, fused attention trains faster. Seconds of one thread
# for a step of 2,048 tokens of books12 (12 layers, 5 followers; forward and backward), materialised
# and recomputed: rows of 256 tokens 1.13 and 1.13, of 1,024 3.07 and 1.70, of 2,048 5.72 and 2.25.
# On a GPU probabilities cost memory and its bandwidth at any length.
_LONGEST_MATERIALIZED = 256


def resolve_config(
    config: DistillConfig,
    length: int,
    rows: int,
    rows_a_step: int,
    text_config: PreTrainedConfig,
    device: str,
) -> DistillConfig:
    """`config` with everything decided that it leaves open.

    Args:
        config: What the user chose.
        length: Tokens of a row.
        rows: How many rows the text makes.
        rows_a_step: Rows that all processes together take in one step.
        text_config: The teacher's configuration.
        device: The type of the device that trains.

    Returns:
        A configuration with stages in steps, both learning rates and a kind of attention.

    Raises:
        TrainingError: No stage has a step, or the model cannot be trained as asked.
    """
    tokens = rows_a_step * length

    def steps_of(steps: int | None, tokens_asked: int | None) -> int | None:
        return steps if tokens_asked is None else math.ceil(tokens_asked / tokens)

    first = steps_of(config.stage1_steps, config.stage1_tokens)
    second = steps_of(config.stage2_steps, config.stage2_tokens)
    if first is None:
        first = max(1, rows // rows_a_step * 4 // 5)
    if second is None:
        second = math.ceil(first / 4)
    if not first + second:
        raise TrainingError("both stages have 0 steps; give at least one of them some")
    return dataclasses.replace(
        config,
        length=length,
        stage1_steps=first,
        stage1_tokens=None,
        stage2_steps=second,
        stage2_tokens=None,
        stage2_learning_rate=config.stage2_learning_rate or config.learning_rate,
        attention=_attention(config.attention, length, text_config, device),
    )


def stages_of(config: DistillConfig) -> tuple[Stage, Stage]:
    """The two stages of a resolved configuration."""
    rates = (config.learning_rate, config.stage2_learning_rate)
    steps = (config.stage1_steps, config.stage2_steps)
    assert None not in steps and None not in rates  # noqa: S101, PT018 - it is resolved
    return Stage(1, steps[0], rates[0]), Stage(2, steps[1], rates[1])  # type: ignore[arg-type]


def _attention(
    choice: AttentionChoice, length: int, text_config: PreTrainedConfig, device: str
) -> AttentionChoice:
    """The kind of attention, decided.

    Raises:
        TrainingError: Recomputation is asked for, and this model cannot be trained with it.
    """
    reason = why_not_recomputed(text_config)
    if choice == "recomputed" and reason is not None:
        raise TrainingError(f"attention 'recomputed' cannot train this model: {reason}")
    if choice != "auto":
        return choice
    faster = device != "cpu" or length > _LONGEST_MATERIALIZED
    return "recomputed" if faster and reason is None else "materialized"
