"""Loading: what is loaded as it is, and the directories and configurations that are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.share.checkpoints import QUERIES, WEIGHTS, edit_config, edit_tensors, refused, shard
from tests.wording import whole
from transformers import BertConfig, BloomConfig, T5Config, dynamic_module_utils
from transformers.utils import logging as transformers_logging

from echoatt_exporter import SharingPlan, load_shared
from echoatt_exporter.errors import CheckpointError, UnsupportedModelError
from echoatt_exporter.share.checkpoint import load_teacher
from echoatt_runtime.errors import PlanError

Models = Callable[..., Any]


# What is loaded


@torch.no_grad()
def test_teacher_and_plan(
    teacher_dir: Path, student_of: Models, plan_for: Models, tokens: torch.Tensor
) -> None:
    plan = plan_for("llama")
    student = load_shared(teacher_dir, plan)
    assert student.sources == list(plan.sources)
    assert not student.training
    assert torch.equal(student(tokens).logits, student_of("llama")(tokens).logits)
    assert load_shared(teacher_dir, None).sources == [0, 1, 2, 3, 4, 5]


@torch.no_grad()
def test_load_teacher_gives_the_plain_model(
    teacher_dir: Path, tiny_model: Models, tokens: torch.Tensor
) -> None:
    teacher = load_teacher(teacher_dir)
    assert type(teacher).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(teacher(tokens).logits, tiny_model("llama")(tokens).logits)


def test_student_directory_brings_its_plan(student_dir: Path, plan_for: Models) -> None:
    own = plan_for("llama")
    assert load_shared(student_dir, None).sources == list(own.sources)
    assert load_shared(student_dir, own).sources == list(own.sources)
    refused(
        PlanError,
        student_dir,
        "is a student with the plan [0, 1, 1, 1, 4, 4], not [0, 1, 2, 3, 4, 4]",
        plan=SharingPlan((0, 1, 2, 3, 4, 4)),
    )
    with pytest.raises(CheckpointError, match="is a student; a teacher is needed here"):
        load_teacher(student_dir)


def test_shards_and_text_paths(teacher_dir: Path) -> None:
    expected = load_shared(teacher_dir, None).state_dict()
    shard(teacher_dir)
    actual = load_shared(str(teacher_dir), None).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_files_own_whatever_the_config_says(
    stored: torch.dtype, teacher_dir: Path
) -> None:
    edit_tensors(teacher_dir, lambda t: t.update({k: v.to(stored) for k, v in t.items()}))
    edit_config(teacher_dir, dtype="float64")
    assert load_shared(teacher_dir, None).dtype == stored
    assert load_shared(teacher_dir, None, dtype=torch.float64).dtype == torch.float64


def test_tied_head_may_be_absent_and_known_leftovers_present(
    tiny_model: Models, tmp_path: Path
) -> None:
    tiny_model("llama_tied_biased").save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / WEIGHTS)
    student = load_shared(tmp_path / "tied", None)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    tiny_model("gpt_neox").save_pretrained(tmp_path / "neox")
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    edit_tensors(tmp_path / "neox", lambda t: t.update({"gpt_neox.layers.0.attention.bias": mask}))
    load_shared(tmp_path / "neox", None)


def test_code_beside_a_known_model_type_is_not_run(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(teacher_dir, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (teacher_dir / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_shared(teacher_dir, None)
    assert not (tmp_path / "ran").exists()


def test_trusted_code_runs_and_must_be_built_like_the_family(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    edit_config(teacher_dir, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    code = "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    pass\n"
    (teacher_dir / "modeling_own.py").write_text(code)
    assert type(load_teacher(teacher_dir)).__name__ == "LlamaForCausalLM"
    assert type(load_teacher(teacher_dir, trust_remote_code=True)).__name__ == "Own"
    student = load_shared(teacher_dir, SharingPlan((0, 1, 1, 1, 4, 4)), trust_remote_code=True)
    assert type(student.decoder).__name__ == "Own"
    code += "    def __init__(self, config):\n        super().__init__(config)\n"
    code += "        self.model.blocks = self.model.__dict__['_modules'].pop('layers')\n"
    (teacher_dir / "modeling_own.py").write_text(code.replace("    pass\n", ""))
    with pytest.raises(UnsupportedModelError, match="its own Own is not built like transformers'"):
        load_teacher(teacher_dir, trust_remote_code=True)


def test_loading_is_silent_and_restores_the_settings(
    teacher_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(logging.INFO)
    transformers_logging.enable_progress_bar()
    try:
        load_shared(teacher_dir, None)
        edit_tensors(teacher_dir, lambda t: t.pop(QUERIES))
        with pytest.raises(CheckpointError):
            load_shared(teacher_dir, None)
        assert capfd.readouterr() == ("", "")
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        with pytest.raises(CheckpointError):
            load_shared(teacher_dir, None)
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


# What is refused: the directory and its config


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    refused(CheckpointError, tmp_path / "none", "no such directory", "nothing is downloaded")


def test_hub_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_shared("TinyLlama/TinyLlama-1.1B", None)


def test_file_is_refused(teacher_dir: Path) -> None:
    refused(CheckpointError, teacher_dir / WEIGHTS, "is a file; give the directory")


def test_directory_without_config_is_refused(teacher_dir: Path) -> None:
    (teacher_dir / "config.json").unlink()
    refused(CheckpointError, teacher_dir, "no config.json; not a Hugging Face model directory")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"{'model_type': 'llama'}", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[1]", "holds no JSON object"),
        (b"{}", 'no "model_type"'),
        (b'{"model_type": 7}', 'no "model_type"'),
        (b'{"model_type": "llama", "hidden_size": "wide"}', "not a valid llama config"),
        (b"[" * 100_000, "not readable as JSON"),
    ],
)
def test_config_that_is_none_is_refused(text: bytes, part: str, teacher_dir: Path) -> None:
    (teacher_dir / "config.json").write_bytes(text)
    refused(CheckpointError, teacher_dir, "config.json", part)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_texts_larger_than_any_are_refused_unread(name: str, teacher_dir: Path) -> None:
    with (teacher_dir / name).open("ab") as file:
        file.truncate(1 << 40)
    refused(CheckpointError, teacher_dir, f"{name}: has {1 << 40} bytes")


@pytest.mark.parametrize("config", [BertConfig(), T5Config()], ids=["bert", "t5"])
def test_model_that_is_no_decoder_is_refused(config: Any, teacher_dir: Path) -> None:
    if config.model_type == "bert":
        config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(teacher_dir)
    kind = f"not a decoder (model type '{config.model_type}')"
    refused(UnsupportedModelError, teacher_dir, kind, "EchoAtt knows gemma2")


def test_decoder_of_another_family_is_refused(teacher_dir: Path) -> None:
    BloomConfig(architectures=["BloomForCausalLM"]).save_pretrained(teacher_dir)
    with pytest.raises(UnsupportedModelError, match="model type 'bloom' is not supported"):
        load_shared(teacher_dir, None)
    with pytest.raises(UnsupportedModelError, match="model type 'bloom' is not supported"):
        load_teacher(teacher_dir)


def test_multimodal_gemma3_is_refused(teacher_dir: Path) -> None:
    edit_config(teacher_dir, model_type="gemma3")
    refused(UnsupportedModelError, teacher_dir, "only text checkpoints (model type gemma3_text)")


def test_unknown_type_with_its_own_code_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    edit_config(
        teacher_dir,
        model_type="evil",
        auto_map={"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    )
    (teacher_dir / "configuration_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(UnsupportedModelError, teacher_dir, "'evil' comes with its own Python code", "trust")
    assert not (tmp_path / "ran").exists()


def test_quantised_checkpoint_is_refused(teacher_dir: Path) -> None:
    edit_config(teacher_dir, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(UnsupportedModelError, teacher_dir, "quantised checkpoint (method gptq)", "dense")


def test_plan_that_does_not_fit_is_refused_before_weights_are_read(teacher_dir: Path) -> None:
    (teacher_dir / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(PlanError, match=whole("the plan has 2 layers and the model 6")):
        load_shared(teacher_dir, SharingPlan((0, 0)))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"sources": None}, '"sources" must be a list'),
        ({"sources": [0, 1, True, 1, 4, 4]}, '"sources" must be a list'),
        ({"sources": [0, 1, 1]}, "the plan has 3 layers and the model 6"),
        ({"sources": [0, 1, 1, 2, 4, 4]}, "layer 3 uses layer 2, which is itself a follower"),
        ({"text_config": None}, '"text_config" must be the teacher\'s configuration'),
        ({"text_config": {"model_type": "nonsense"}}, "not a valid student config"),
    ],
)
def test_damaged_student_config_is_refused(
    fields: dict[str, Any], part: str, student_dir: Path
) -> None:
    edit_config(student_dir, **fields)
    refused(CheckpointError, student_dir, part)
