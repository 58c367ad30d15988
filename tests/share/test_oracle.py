"""The student against the oracle, which shares no code with the project or transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from echoatt_exporter import SharingPlan, load_shared

Models = Callable[..., Any]
PLANS = [(0, 1, 2, 3, 4), (0, 1, 1, 1, 4), (0, 1, 0, 1, 0)]
PROMPTS = ["Once upon a time", "Lily and Ben went to the park because", "The"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama_tied_biased"])
@pytest.mark.parametrize("shared", [False, True], ids=["unshared", "shared"])
def test_tiny_student_equals_oracle(
    name: str,
    shared: bool,
    student_of: Models,
    plan_for: Callable[[str], SharingPlan],
    tokens: torch.Tensor,
    oracle: Any,
) -> None:
    plan = plan_for(name) if shared else SharingPlan.unshared(6)
    student = student_of(name, plan)
    tensors = {k.removeprefix("decoder."): v.numpy() for k, v in student.state_dict().items()}
    judge = oracle(student.config.text_config.to_dict(), tensors, plan.sources)
    logits = student(tokens).logits
    for row, expected in zip(tokens.tolist(), logits.numpy(), strict=True):
        np.testing.assert_allclose(judge.logits(row), expected, rtol=0, atol=2e-5)
    if shared:  # and the oracle tells plans apart
        other = oracle(judge.config, tensors, (0, 0, 0, 0, 4, 4))
        assert np.abs(other.logits(row) - expected).max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("sources", PLANS, ids=["unshared", "block", "interleaved"])
def test_trained_student_equals_oracle(
    sources: tuple[int, ...], stories260k: Path, oracle: Any
) -> None:
    student: Any = load_shared(stories260k, SharingPlan(sources))
    judge = oracle.from_directory(stories260k, sources)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        judged = judge.logits(ids[0].tolist())
        np.testing.assert_allclose(judged, student(ids).logits[0].numpy(), rtol=0, atol=1e-4)
        made = student.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert made[0, ids.shape[1] :].tolist() == judge.greedy(ids[0].tolist(), 24)
