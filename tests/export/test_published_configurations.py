"""A checkpoint with what is often odd in published ones, as a bundle: transformers' numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny_models import build_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

from echoatt_cli.console import show_export
from echoatt_exporter import ExportReport, export_bundle
from echoatt_runtime import EchoModel, SamplingParams

ODD = {
    "pad_token_id": -1,
    "sliding_window": 8,
    "max_position_embeddings": 128,
    "rope_parameters": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, with a tokenizer that is not its configuration's."""
    directory = tmp_path_factory.mktemp("odd")
    build_tiny_model(
        "llama", num_hidden_layers=2, vocab_size=300, rope_parameters=ODD["rope_parameters"]
    ).save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ODD))
    letters = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    tokenizer = Tokenizer(models.BPE(letters | {newline * 2: 256}, [(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return directory


@pytest.fixture(scope="module")
def report(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_bundle(checkpoint, tmp_path_factory.mktemp("out") / "odd.onnx")


def test_the_bundle_says_what_the_checkpoint_means(report: ExportReport) -> None:
    specification = report.manifest.specification
    assert specification.context_length == 512
    assert specification.layer_kinds == ("full", "full")
    assert specification.sliding_window is None
    assert (specification.eos_token_ids, specification.pad_token_id) == ((2,), None)
    assert report.parity is not None
    assert report.parity.passed


@torch.no_grad()
def test_a_prompt_beyond_the_length_before_scaling_runs(
    report: ExportReport, checkpoint: Path
) -> None:
    """Against transformers' own model, without a cache: it would let a Llama's slide."""
    model = EchoModel.load(report.model)
    tokens = np.random.default_rng(0).integers(3, 300, 300)
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    expected = teacher(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(model.logits(tokens.tolist()), expected, atol=2e-4)
    params = SamplingParams(max_new_tokens=1, ignore_eos=True)
    (result,) = model.generate([tokens.tolist()], params)
    assert result.token_ids == (int(expected[-1].argmax()),)


def test_its_own_tokens_are_used_and_the_others_named(
    report: ExportReport, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = report.model.with_name("tokenizer.json")
    assert beside.read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert 256 in EchoModel.load(report.model).tokenizer.encode("Steps:\n\n1. Mix")
    (note,) = report.notes
    assert "GPT2Tokenizer, which transformers makes for it, gives other tokens" in note
    show_export(report, as_json=False)
    assert capsys.readouterr().err == f"echoatt: note: {note}\n"
    show_export(report, as_json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["notes"] == [note]
    assert printed.err == ""
