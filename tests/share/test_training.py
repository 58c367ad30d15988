"""Nothing mixes anything up: checkpointing, threads, several models, data parallel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.share import ddp_worker
from tests.tiny_models import every_family

from echoatt_exporter import EchoAttForCausalLM, SharingPlan

Models = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


def _gradients(model: EchoAttForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(
    family: str, student_of: Models, tokens: torch.Tensor
) -> None:
    student: EchoAttForCausalLM = student_of(family).train()
    expected = _gradients(student, tokens)
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    followers = [m for m in student.modules() if type(m).__name__ == "FollowerAttention"]
    followers[0].v_proj.register_forward_hook(count)  # type: ignore[union-attr]
    student.activation_checkpointing_enable()
    _assert_same(_gradients(student, tokens), expected)
    assert calls[0] == 2, "the layer was not recomputed"


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_gradient_checkpointing_with_dropout_draws_the_same_masks(
    family: str, student_of: Models, tokens: torch.Tensor
) -> None:
    student: EchoAttForCausalLM = student_of(family, attention_dropout=0.3).train()
    torch.manual_seed(5)
    expected = _gradients(student, tokens)
    student.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    _assert_same(_gradients(student, tokens), expected)
    torch.manual_seed(6)
    other = _gradients(student, tokens)
    assert any(not torch.allclose(other[name], expected[name], rtol=0.01) for name in expected)


def test_dropout_is_off_in_evaluation_and_in_force_on_followers(
    student_of: Models, tokens: torch.Tensor
) -> None:
    plain = student_of("llama")(tokens).logits
    student = student_of("llama", attention_dropout=0.5)
    assert torch.equal(student(tokens).logits, plain)
    for layer, source in enumerate(student.sources):
        if layer == source:  # leave dropout to the followers
            student.decoder.model.layers[layer].self_attn.attention_dropout = 0.0
    assert not torch.allclose(student.train()(tokens).logits, plain, atol=1e-3)


def test_reentrant_checkpointing_is_refused(student_of: Models) -> None:
    student: Any = student_of("llama")
    with pytest.raises(ValueError, match=r"use_reentrant=True loses .* use use_reentrant=False"):
        student.activation_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.warns(FutureWarning, match="deprecated"),
        pytest.raises(ValueError, match="use_reentrant=True loses"),
    ):
        student.gradient_checkpointing_enable({"use_reentrant": True})


def test_reentrant_checkpointing_would_lose_gradients(
    student_of: Models, tokens: torch.Tensor
) -> None:
    """The reason for the refusal above; when this fails the refusal can go."""
    student: EchoAttForCausalLM = student_of("llama").train()
    expected = _gradients(student, tokens)
    student.decoder.activation_checkpointing_enable({"use_reentrant": True})
    embeddings = student.get_input_embeddings()(tokens).detach().requires_grad_()
    student.zero_grad()
    student(inputs_embeds=embeddings, labels=tokens, use_cache=False).loss.backward()
    queries = "decoder.model.layers.1.self_attn.q_proj.weight"
    lost = dict(student.named_parameters())[queries].grad
    assert lost is not None
    assert not torch.allclose(lost, expected[queries], rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_interleaved_models_with_different_plans(
    student_of: Models,
    reference_of: Models,
    tokens: torch.Tensor,
    assert_close: Callable[..., None],
) -> None:
    plans = [SharingPlan((0, 1, 1, 1, 4, 4)), SharingPlan((0, 0, 0, 0, 4, 5))]
    # In float64, because how far float32 rounds apart here depends on the processor
    models = [student_of("llama", plan).double() for plan in plans]
    expected = [reference_of("llama", plan).double()(tokens).logits for plan in plans]
    assert not torch.allclose(expected[0], expected[1], atol=0.1)
    caches: list[Any] = [None, None]
    for position in range(tokens.shape[1]):
        for index, model in enumerate(models):
            step = model(
                tokens[:, position : position + 1], past_key_values=caches[index], use_cache=True
            )
            caches[index] = step.past_key_values
            assert_close(step.logits[:, 0], expected[index][:, position])


def test_concurrent_threads(student_of: Models) -> None:
    """One model in several threads, and models with different plans beside it."""
    plans = [SharingPlan((0, 1, 1, 1, 4, 4)), SharingPlan((0, 0, 0, 0, 4, 5))]
    models: list[EchoAttForCausalLM] = [student_of("llama", plan) for plan in plans]
    generator = torch.Generator().manual_seed(3)
    jobs = [
        (models[n % 2], torch.randint(3, 61, (1 + n % 3, 9 + n % 5), generator=generator))
        for n in range(60)
    ]

    def run(job: tuple[EchoAttForCausalLM, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = job[0](job[1]).logits
        return logits

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(max_workers=6) as pool:
        for actual, wanted in zip(pool.map(run, jobs), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)


def test_distributed_data_parallel_averages_gradients(tmp_path: Path) -> None:
    """Two processes, each with its own rows, end with the gradients of the mean of both."""
    command = [sys.executable, "-m", "tests.share.ddp_worker", str(tmp_path)]
    workers = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=180)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    alone = [_gradients(ddp_worker.model(), ddp_worker.rows(rank)) for rank in range(2)]
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    for rank in range(2):
        _assert_same(torch.load(tmp_path / f"{rank}.pt", weights_only=True), mean)
    queries = "decoder.model.layers.1.self_attn.q_proj.weight"
    assert not torch.allclose(alone[0][queries], mean[queries], rtol=0.01)
