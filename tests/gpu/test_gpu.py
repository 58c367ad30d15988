"""Numbers on a GPU: every family against PyTorch, and recorded steps against launched ones."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from tests.cuda.bundles import Trace, in_dtype
from tests.gpu.prepare import trace_of
from tests.quantisation import to_nearest
from tests.tiny_models import TINY_MODELS, every_family

from echoatt_exporter.parity import compare, record_reference
from echoatt_exporter.quantise.round_weights import round_to_nearest
from echoatt_exporter.share.apply import share_attention
from echoatt_runtime import EchoModel, SamplingParams
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import DTYPES, SharingPlan
from echoatt_runtime.executor import Executor, executor_of, open_executor

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16, "int4": torch.float32}


@functools.cache
def trace(family: str) -> Trace:
    return trace_of(family)


def bundle_of(family: str, dtype: str, folder: Any) -> Bundle:
    return trace(family).bundle(folder, dtype, SharingPlan(TINY_MODELS[family].sources))


def compared(family: str, dtype: str, folder: Any) -> Any:
    bundle = bundle_of(family, dtype, folder)
    # The same weights: those of the trace, in float16 at first
    teacher = in_dtype(trace(family).teacher(), TORCH[dtype])
    student = share_attention(teacher, bundle.specification.plan)
    if (bits := DTYPES[dtype].bits) is not None:
        round_to_nearest(student, to_nearest(bits), lambda _done, _total: None)
    reference = record_reference(student, bundle.specification, tokenizer_dir=None, device="cuda")
    return compare(reference, bundle)


@every_family
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_family_computes_what_pytorch_does(family: str, dtype: str, tmp_path: Any) -> None:
    report = compared(family, dtype, tmp_path)
    assert report.provider == "CUDAExecutionProvider"
    assert report.passed, report.to_dict()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_int4_computes_what_pytorch_does(family: str, tmp_path: Any) -> None:
    report = compared(family, "int4", tmp_path)
    assert report.passed, report.to_dict()


def steps(executor: Executor, rows: int, count: int) -> np.ndarray:
    """Logits of single tokens behind prompts of several lengths, in caches that grow."""
    generator = np.random.default_rng(0)
    cache = executor.new_cache(rows, 200)
    lengths = np.array([250 - 60 * row for row in range(rows)])
    tokens = generator.integers(0, 61, (rows, 250))
    cache.reserve(250, [0] * rows)
    executor.run(cache, tokens, np.zeros(rows, np.int64), lengths[:, None] - 1)
    found = []
    for _ in range(count):
        cache.reserve(int(lengths.max()) + 1, lengths.tolist())
        one = generator.integers(0, 61, (rows, 1))
        found.append(executor.run(cache, one, lengths, np.zeros((rows, 1), np.int64)))
        lengths = lengths + 1
    return np.concatenate(found, 1)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int4"])
def test_recorded_steps_are_launched_ones(dtype: str, tmp_path: Any) -> None:
    bundle = bundle_of("llama", dtype, tmp_path)
    recorded = open_executor(bundle, "cuda")
    launched = executor_of(recorded.session, bundle.specification)
    found, expected = steps(recorded, 3, 40), steps(launched, 3, 40)
    assert np.isfinite(found).all()
    # The two sum in other orders
    np.testing.assert_allclose(found, expected, atol=0.03 * expected.std(), rtol=0)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "top_k": 20, "seed": 3}], ids=str)
def test_tokens_chosen_there_are_those_of_the_logits(tmp_path: Any, params: Any) -> None:
    """Greedy ones, and drawn ones of the most probable."""
    bundle = bundle_of("qwen3", "fp16", tmp_path)
    prompts = [[1, 2, 3], list(range(40))]
    own = SamplingParams(max_new_tokens=30, ignore_eos=True, **params)
    model = EchoModel(bundle, open_executor(bundle, "cuda"))
    model.tokenizer = None  # type: ignore[assignment]  # a trace has none
    found = model.generate(prompts, own)
    for prompt, result in zip(prompts, found, strict=True):
        tokens = [*prompt, *result.token_ids]
        logits = model.logits(tokens)[len(prompt) - 1 : -1]
        kept = 1 if own.temperature == 0 else own.top_k
        ranks = (logits > logits[np.arange(30), list(result.token_ids)][:, None] + 0.05).sum(1)
        assert (ranks < kept).all()
