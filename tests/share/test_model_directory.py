"""What people give in the place of a checkpoint: each refused by what it is, in one line."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import build_tiny_model
from transformers import AutoModelForCausalLM

from echoatt_exporter import load_shared, load_teacher
from echoatt_exporter.errors import CheckpointError, UnsupportedModelError
from echoatt_exporter.evaluate.models import open_model
from echoatt_exporter.share.outline import read_outline

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
WEIGHTS = "model.safetensors"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    build_tiny_model("llama", num_hidden_layers=2).save_pretrained(directory)
    return directory


def _write(name: str, content: str = "{}") -> Change:
    return lambda directory: (directory / name).write_text(content)


def _only(name: str) -> Change:
    def change(directory: Path) -> None:
        for path in directory.iterdir():
            path.unlink()
        (directory / name).write_text("{}")

    return change


def _config(**fields: Any) -> Change:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _renamed(name: str) -> Change:
    return lambda directory: (directory / WEIGHTS).rename(directory / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_only("model-q4.gguf"), r"holds GGUF files \(model-q4\.gguf\), .* Hugging Face directory"),
        (_only("consolidated.00.pth"), "its maker's own format .* download the Hugging Face"),
        (_only("model_index.json"), "a pipeline of several models"),
        (_only("notes.txt"), r"no config\.json; not a Hugging Face model directory"),
        (_write("config.json", POINTER), r"config\.json: a Git LFS pointer, .* git lfs pull"),
        (_write(WEIGHTS, POINTER), r"model\.safetensors: a Git LFS pointer"),
        (_write("tokenizer.json", POINTER), r"tokenizer\.json: a Git LFS pointer"),
        (_write("tokenizer.model", POINTER), r"tokenizer\.model: a Git LFS pointer"),
        (_renamed("model-q4.gguf"), r"no weights but those of GGUF \(model-q4\.gguf\)"),
        (_renamed("model.onnx"), r"no weights but those of an ONNX model \(model\.onnx\)"),
        (_renamed("tf_model.h5"), r"no weights but those of TensorFlow \(tf_model\.h5\)"),
        (_renamed("flax_model.msgpack"), r"no weights but those of Flax \(flax_model\.msgpack\)"),
        (_renamed("a.safetensors"), r"no weights but those under other names \(a\.safetensors\)"),
        (_renamed("pytorch_model.bin"), r"its weights are pickled \(pytorch_model\.bin\)"),
        (lambda d: (d / WEIGHTS).unlink(), r"no weights; expected .* download the whole"),
    ],
)
def test_what_is_not_here_is_named(
    change: Change, message: str, saved: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "given"))
    change(directory)
    with pytest.raises(CheckpointError, match=message):
        read_outline(directory, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llava", "vision_config": {}}, "a vision-language model, not a decoder"),
        ({"model_type": "qwen2_vl", "vision_start_token_id": 1}, "a vision-language model"),
        ({"model_type": "gemma3"}, r"only text checkpoints \(model type gemma3_text\)"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "a model of audio, not a decoder"),
        ({"model_type": "whisper", "is_encoder_decoder": True}, "an encoder-decoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder-decoder, not a decoder"),
        ({"model_type": "bart", "architectures": ["BartModel"]}, "an encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "an encoder, not a decoder"),
        ({"model_type": "modernbert", "architectures": ["XForMaskedLM"]}, "an encoder, "),
        ({"architectures": ["LlamaForSequenceClassification"]}, "which has no LM head"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"\(method gptq\); .* the dense one"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised checkpoint \(method awq\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"\(method bitsandbytes\)"),
        ({"quantization": {"bits": 4, "group_size": 64}}, r"quantised checkpoint \(method unnamed"),
        ({"is_causal": False}, "bidirectional attention is not supported"),
    ],
)
def test_what_is_no_dense_decoder_is_named(
    fields: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "given"))
    _config(**fields)(directory)
    with pytest.raises(UnsupportedModelError, match=message):
        read_outline(directory, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.gguf", "a GGUF file, .* Hugging Face directory"), ("a.onnx", "an ONNX file; give the")],
)
def test_files_in_the_place_of_a_directory_are_named(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=message):
        read_outline(tmp_path / name, None)


def test_evaluation_names_them_too(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="a GGUF file"):
        open_model(tmp_path / "a.gguf")
    directory = Path(shutil.copytree(saved, tmp_path / "given"))
    _write("adapter_config.json")(directory)
    with pytest.raises(CheckpointError, match="merge it first"):
        open_model(directory)


# Adapters


@pytest.fixture(scope="module")
def adapted(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with weights and an adapter of them, as `peft` leaves it."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    directory = tmp_path_factory.mktemp("adapted") / "both"
    shutil.copytree(saved, directory)
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, lora).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("beside", [True, False], ids=["weights and adapter", "adapter only"])
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_an_adapter_is_refused_with_the_words_that_merge_it(
    beside: bool, adapted: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, alone = Path("both"), Path("alone")
    shutil.copytree(adapted, base)
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(base / name, alone)
    described = json.loads((alone / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(base)
    (alone / "adapter_config.json").write_text(json.dumps(described))
    expected = AutoModelForCausalLM.from_pretrained(base)(torch.arange(3, 20)[None]).logits

    with pytest.raises(CheckpointError, match="merge it first: move the adapter_") as caught:
        load_shared(base if beside else alone, None)
    # What the message says, to the letter
    Path("ADAPTER").mkdir()
    for path in base.glob("adapter_*"):
        path.rename(Path("ADAPTER") / path.name)
    found = re.search(r'python -c "(.*)", and copy', str(caught.value))
    assert found is not None
    exec(found[1], {})  # noqa: S102
    merged = load_shared("MERGED", None)(torch.arange(3, 20)[None]).logits
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    plain = load_shared(saved, None)(torch.arange(3, 20)[None]).logits
    assert (merged - plain).abs().max() > 0.1


# What is no weight


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt_neox", ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")),
        ("gpt2", ("attn.bias", "attn.masked_bias")),
        ("llama", ("self_attn.rotary_emb.inv_freq", "self_attn.rotary_emb.cos_cached")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16])
@torch.no_grad()
def test_masks_and_angles_beside_the_weights_change_nothing(
    family: str, names: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """More of them than weights, as in the first small Pythias."""
    model = build_tiny_model(family)
    model.save_pretrained(tmp_path)
    layers = {"gpt_neox": "gpt_neox.layers", "gpt2": "h", "llama": "model.layers"}[family]
    masks = {f"{layers}.0.{name}": torch.ones(1, 1, 512, 512, dtype=dtype) for name in names}
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors | masks, tmp_path / WEIGHTS, metadata={"format": "pt"})
    tokens = torch.arange(3, 20)[None]
    teacher = load_teacher(tmp_path)
    assert teacher.dtype == torch.float32
    assert torch.equal(teacher(tokens).logits, model(tokens).logits)
    assert read_outline(tmp_path, None).tensors.keys() == tensors.keys()
