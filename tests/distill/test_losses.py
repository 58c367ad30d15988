"""The losses in chunks are the losses written down plainly, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import VOCAB_SIZE, build_tiny_model, every_family, tiny_plan
from torch.nn import functional as F

from echoatt_exporter import EchoAttForCausalLM, SharingPlan, share_attention
from echoatt_exporter.distill import losses
from echoatt_exporter.distill.config import DistillConfig
from echoatt_exporter.distill.healing_student import HealingStudent, block_outputs
from echoatt_exporter.distill.losses import Target
from echoatt_exporter.share.lm_head import head_of

SETTINGS = DistillConfig(
    block_weight=0.7,
    kl_weight=0.9,
    label_weight=0.3,
    temperature=1.7,
    kl_direction="student_teacher",
)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three rows of 12 token ids."""
    return torch.randint(3, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 tokens, which neither rows nor the batch are a multiple of."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * VOCAB_SIZE)


def _plain_losses(
    student: EchoAttForCausalLM, family: str, tokens: torch.Tensor, settings: DistillConfig
) -> dict[str, torch.Tensor]:
    """From whole logits and hidden states, the teacher's by transformers alone."""
    teacher = build_tiny_model(family, seed=3, attn_implementation="eager")
    with torch.no_grad():
        theirs = teacher(tokens, output_hidden_states=True)
    ours = student(tokens, output_hidden_states=True)
    pairs = list(zip(ours.hidden_states, theirs.hidden_states, strict=True))[1:]
    blocks = sum(((a - b) ** 2).mean() for a, b in pairs) / len(pairs)
    heat = settings.temperature
    p, q = (torch.softmax(x.logits / heat, -1) for x in (ours, theirs))
    if settings.kl_direction == "teacher_student":
        p, q = q, p
    kl = heat**2 * (p * (p.log() - q.log())).sum(-1).mean()
    flat = ours.logits.flatten(0, 1)
    labels = F.cross_entropy(flat, theirs.logits.argmax(-1).flatten())
    text = F.cross_entropy(ours.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    total = (
        settings.block_weight * blocks + settings.kl_weight * kl + settings.label_weight * labels
    )
    return {"blocks": blocks, "kl": kl, "labels": labels, "text": text, "loss": total}


def _student(family: str) -> EchoAttForCausalLM:
    student = share_attention(build_tiny_model(family), tiny_plan(family))
    student.train()
    return student


def _target(family: str, tokens: torch.Tensor) -> Target:
    teacher = build_tiny_model(family, seed=3)
    unshared = share_attention(teacher, SharingPlan.unshared(teacher.config.num_hidden_layers))
    with torch.no_grad():
        outputs = block_outputs(unshared.forward, unshared, tokens)
    return Target(outputs, head_of(unshared.decoder))


def _gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss, retain_graph=True)  # the plain losses share one
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.usefixtures("chunked")
@every_family
def test_both_stages(family: str, tokens: torch.Tensor) -> None:
    student = _student(family)
    healing = HealingStudent.of(student, SETTINGS)
    expected = _plain_losses(student, family, tokens, SETTINGS)
    gradients = {
        stage: _gradients(student, loss)
        for stage, loss in (("loss", expected["loss"]), ("text", expected["text"]))
    }
    found = healing(tokens, target=_target(family, tokens))
    _assert_same({n: p.detach() for n, p in found.items()}, _parts(expected, *found))
    _assert_same(_gradients(healing, found["loss"]), gradients["loss"])
    found = healing(tokens, labels=tokens)
    torch.testing.assert_close(found["text"], expected["text"].detach())
    _assert_same(_gradients(healing, found["loss"]), gradients["text"])


def _parts(expected: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: expected[name].detach() for name in names}


@pytest.mark.usefixtures("chunked")
def test_the_other_direction_of_the_kl(tokens: torch.Tensor) -> None:
    settings = DistillConfig(kl_direction="teacher_student")
    student = _student("llama")
    expected = _plain_losses(student, "llama", tokens, settings)
    found = HealingStudent.of(student, settings)(tokens, target=_target("llama", tokens))
    torch.testing.assert_close(found["kl"], expected["kl"].detach())
    torch.testing.assert_close(found["loss"], expected["loss"])
    backwards = _plain_losses(student, "llama", tokens, DistillConfig())
    assert not torch.isclose(backwards["kl"], expected["kl"], rtol=1e-3)


def test_logits_exist_one_chunk_at_a_time(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both heads see 5 tokens at most, forwards and backwards; what fits is not computed twice."""
    healing = HealingStudent.of(_student("llama"), DistillConfig())
    target = _target("llama", tokens)
    sizes: list[int] = []
    healing.decoder.lm_head.register_forward_hook(
        lambda _module, arguments, _output: sizes.append(arguments[0].shape[1])
    )

    def counted(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[1])
        return target.head(hidden)

    def run() -> list[int]:
        sizes.clear()
        healing(tokens, target=Target(target.block_outputs, counted))["loss"].backward()
        return sorted(sizes)

    whole = tokens.numel()
    assert run() == [1, whole, whole]  # 1: the forward pass of the layers asks for one token's
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * VOCAB_SIZE)
    # student and teacher, forwards and backwards, 7 chunks of 5 and one of the last token
    assert run() == [1] + [1] * 4 + [5] * 28
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1)
    assert run() == [1] * (1 + 4 * whole)
