"""A really trained checkpoint through the whole line, against transformers and the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.oracle_llama import LlamaOracle
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from echoatt_exporter import ExportReport, export_bundle, load_shared, rewrite_bundle
from echoatt_runtime import EchoModel, SamplingParams

PROMPTS = ("Once upon a time", "Lily and Ben went to the park", "The big dog was sad because")
PAIRS = "2:1,3:1"
GREEDY_200 = SamplingParams(max_new_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def unshared(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_bundle(stories260k, tmp_path_factory.mktemp("unshared"))


@pytest.fixture(scope="module")
def shared(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_bundle(stories260k, tmp_path_factory.mktemp("shared"), PAIRS)


def _greedy(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        min_new_tokens=200,
        do_sample=False,
        pad_token_id=0,
        # min_new_tokens would forbid the end tokens; the bundle is free to choose them
        eos_token_id=-1,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["unshared", "shared"])
def test_200_greedy_tokens_are_those_of_transformers(
    pairs: str | None, stories260k: Path, request: pytest.FixtureRequest
) -> None:
    report: ExportReport = request.getfixturevalue("shared" if pairs else "unshared")
    torch_model: PreTrainedModel = (
        load_shared(stories260k, pairs)
        if pairs
        else AutoModelForCausalLM.from_pretrained(stories260k)
    )
    bundle = EchoModel.load(report.model)
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    for prompt in PROMPTS:
        expected = _greedy(torch_model, tokenizer(prompt).input_ids)
        [result] = bundle.generate(prompt, GREEDY_200)
        assert list(result.token_ids) == expected


@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["unshared", "shared"])
def test_logits_are_those_of_transformers_and_of_the_oracle(
    pairs: str | None, stories260k: Path, request: pytest.FixtureRequest
) -> None:
    report: ExportReport = request.getfixturevalue("shared" if pairs else "unshared")
    tokens = AutoTokenizer.from_pretrained(stories260k)(" ".join(PROMPTS)).input_ids
    logits = EchoModel.load(report.model).logits(tokens)
    torch_model = (
        load_shared(stories260k, pairs)
        if pairs
        else AutoModelForCausalLM.from_pretrained(stories260k)
    )
    with torch.no_grad():
        expected = torch_model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    oracle = LlamaOracle.from_directory(stories260k, report.manifest.specification.plan.sources)
    np.testing.assert_allclose(logits, oracle.logits(tokens), atol=1e-4, rtol=0)


def test_followers_take_exactly_their_query_and_key_weights_less(
    unshared: ExportReport, shared: ExportReport
) -> None:
    before, after = unshared.manifest, shared.manifest
    heads, kv_heads, head_dim = (
        getattr(after.specification, name)[0] for name in ("query_heads", "kv_heads", "head_dims")
    )
    per_follower = heads * head_dim * (heads + kv_heads) * head_dim
    assert unshared.parameters - shared.parameters == 2 * per_follower
    assert before.weights.bytes is not None
    assert after.weights.bytes is not None
    assert before.weights.bytes - after.weights.bytes == 2 * per_follower * 4
    fewer_cache_bytes = (
        before.specification.cache_bytes_per_token - after.specification.cache_bytes_per_token
    )
    assert fewer_cache_bytes == 2 * kv_heads * head_dim * 4


def test_both_routes_write_the_same_bundle(
    unshared: ExportReport, shared: ExportReport, tmp_path: Path
) -> None:
    rewritten = rewrite_bundle(unshared.model, tmp_path / "out.onnx", PAIRS)
    assert rewritten.parameters == shared.parameters
    assert rewritten.manifest.verification is None
    assert rewritten.manifest.specification == shared.manifest.specification
    assert rewritten.manifest.companions == shared.manifest.companions
    tokens = list(range(3, 60))
    np.testing.assert_allclose(
        EchoModel.load(rewritten.model).logits(tokens),
        EchoModel.load(shared.model).logits(tokens),
        atol=1e-5,
        rtol=0,
    )
