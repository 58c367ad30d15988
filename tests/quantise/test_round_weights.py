from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantisation import to_nearest
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.families.projections import is_projection, weight_out_in
from echoatt_exporter.quantise.block_quantizer import dequantize_blocks, quantize_blocks
from echoatt_exporter.quantise.draw_windows import draw_windows
from echoatt_exporter.quantise.round_weights import (
    has_shared_table,
    round_calibrated,
    round_to_nearest,
)
from echoatt_exporter.share.apply import share_attention
from echoatt_exporter.share.checkpoint import load_shared
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.texts import load_tokenizer, read_texts, sample_windows

# Every way of storing projections and tables: separate, packed, by head, the other way round
FAMILIES = ["llama", "phi3", "gpt_neox", "gpt2", "gemma2"]

Make = Callable[..., EchoAttForCausalLM]


@pytest.fixture
def make(tiny_model: Any, plan_for: Any) -> Make:
    def student(family: str, **fields: Any) -> EchoAttForCausalLM:
        return share_attention(tiny_model(family, **fields), plan_for(family)).eval()

    return student


def _ignore(_done: int, _total: int) -> None:
    pass


def _windows(student: EchoAttForCausalLM, seed: int = 0) -> torch.Tensor:
    size: int = student.decoder.config.vocab_size
    return torch.randint(size, (8, 24), generator=torch.Generator().manual_seed(seed))


def _weights(student: EchoAttForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in student.named_modules():
        if is_projection(module):
            yield name, weight_out_in(module).detach()


@torch.no_grad()
def _difference(one: EchoAttForCausalLM, other: EchoAttForCausalLM, tokens: torch.Tensor) -> float:
    """KL divergence of the second from the first."""
    tokens = _windows(one, seed=1)
    first, second = (
        model(tokens, use_cache=False).logits.log_softmax(-1) for model in (one, other)
    )
    return float((first.exp() * (first - second)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("calibrated", [True, False])
def test_every_projection_lies_on_levels_that_are_found_again(
    make: Make, family: str, calibrated: bool
) -> None:
    student = make(family)
    own = dict(_weights(copy.deepcopy(student)))
    chosen = to_nearest(4)
    if calibrated:
        round_calibrated(student, chosen, _windows(student), _ignore)
    else:
        round_to_nearest(student, chosen, _ignore)
    rounded = dict(_weights(student))
    assert rounded.keys() == own.keys()
    for name, weight_NK in rounded.items():
        blocks = quantize_blocks(weight_NK.T.numpy(), 4, chosen.block_size)
        again = torch.from_numpy(dequantize_blocks(blocks, 4))[:, : weight_NK.shape[1]]
        torch.testing.assert_close(again, weight_NK, msg=name)
        assert not torch.equal(weight_NK, own[name])
    assert all(
        isinstance(m.weight, torch.nn.Parameter) for m in student.modules() if is_projection(m)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_rounding_loses_less_on_its_text(make: Make, family: str) -> None:
    # What a table is rounded to by its head makes look-ups a little worse
    exact = make(family, tie_word_embeddings=False)
    nearest, calibrated = copy.deepcopy(exact), copy.deepcopy(exact)
    windows = _windows(exact)
    round_to_nearest(nearest, to_nearest(4), _ignore)
    round_calibrated(calibrated, to_nearest(4), windows, _ignore)
    assert _difference(exact, calibrated, windows) < _difference(exact, nearest, windows)


def test_calibrated_rounding_loses_less_on_other_text(stories260k: Path, shared_dir: Path) -> None:
    """A trained model, by text that it wrote itself, on stories."""
    exact = load_shared(stories260k, None, dtype=torch.float32)
    nearest, calibrated = copy.deepcopy(exact), copy.deepcopy(exact)
    round_to_nearest(nearest, to_nearest(4), _ignore)
    own = draw_windows(exact, count=24, length=128, begin=1)
    round_calibrated(calibrated, to_nearest(4), own, _ignore)
    texts = read_texts([shared_dir / "data" / "tinystories.txt"])
    windows = sample_windows(texts, load_tokenizer(stories260k), length=256, count=8)
    assert _difference(exact, calibrated, windows) < 0.8 * _difference(exact, nearest, windows)


def test_the_copy_with_exact_weights_stays_exact(make: Make) -> None:
    """What the regression aims at: the unrounded model's own inputs."""
    student = make("llama")
    exact = copy.deepcopy(student)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, arguments: Any) -> None:
            seen.setdefault(name, arguments[0])

        return hook

    windows = _windows(student)
    modules = dict(exact.named_modules())
    names = [name for name, _ in _weights(exact)]
    for name in names:
        modules[name].register_forward_pre_hook(keep(name))
    with torch.no_grad():
        exact(windows, use_cache=False)
    expected = dict(seen)
    seen.clear()
    for name, module in student.named_modules():
        if name in names:
            module.register_forward_pre_hook(keep(name))
    round_calibrated(student, to_nearest(4), windows, _ignore)
    assert seen.keys() == expected.keys()
    for name, inputs in seen.items():
        own, other = inputs.chunk(2)
        torch.testing.assert_close(own, expected[name], msg=name)
        assert not torch.allclose(other, own), name


@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_one_where_they_were(make: Make, tied: bool) -> None:
    student = make("llama", tie_word_embeddings=tied)
    chosen = dataclasses.replace(to_nearest(4), embedding_bits=4 if tied else 8)
    assert has_shared_table(student) == tied
    table = student.get_input_embeddings().weight.detach().clone()
    round_calibrated(student, chosen, _windows(student), _ignore)
    assert has_shared_table(student) == tied
    lost = (student.get_input_embeddings().weight - table).norm() / table.norm()
    assert (0.05 < lost < 0.5) if tied else lost < 0.02


def test_a_head_with_the_tables_values_is_the_table(make: Make) -> None:
    student = make("llama", tie_word_embeddings=False)
    head, table = student.get_output_embeddings(), student.get_input_embeddings()
    head.weight = torch.nn.Parameter(table.weight.detach().clone())
    assert has_shared_table(student)
    round_to_nearest(student, to_nearest(4), _ignore)
    assert head.weight is table.weight


def test_a_weight_stored_the_other_way_round_is_rounded_alike(make: Make) -> None:
    student = make("gpt2")
    found = next(m for m in student.modules() if isinstance(m, Conv1D))
    own = found.weight.detach().T.clone()
    round_to_nearest(student, to_nearest(4), _ignore)
    blocks = quantize_blocks(own.T.numpy(), 4, 32)
    expected = torch.from_numpy(dequantize_blocks(blocks, 4))[:, : own.shape[1]]
    torch.testing.assert_close(found.weight.detach().T, expected)


def test_forwards_come_back_after_a_failure(make: Make) -> None:
    student = make("llama")
    with pytest.raises(IndexError):
        round_calibrated(student, to_nearest(4), torch.tensor([[10_000, 1]]), _ignore)
    assert not any("forward" in vars(module) for module in student.modules())
    with torch.no_grad():
        assert student(_windows(student), use_cache=False).logits.shape[0] == 8


def test_a_model_writes_the_same_text_again(make: Make) -> None:
    student = make("llama")
    drawn = draw_windows(student, count=3, length=9, begin=4)
    assert drawn.shape == (3, 9)
    assert drawn[:, 0].tolist() == [4, 4, 4]
    torch.testing.assert_close(draw_windows(student, count=3, length=9, begin=4), drawn)
    assert len({tuple(row) for row in drawn.tolist()}) == 3


def test_text_is_drawn_by_the_models_odds(make: Make) -> None:
    student = make("llama")
    head = student.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    head.bias = torch.nn.Parameter(torch.full((len(head.weight),), -50.0))
    head.bias.data[[7, 9]] = 0.0
    drawn = draw_windows(student, count=40, length=12, begin=None)
    assert set(drawn[:, 1:].unique().tolist()) == {7, 9}
    assert 0.4 < (drawn[:, 1:] == 7).float().mean() < 0.6
