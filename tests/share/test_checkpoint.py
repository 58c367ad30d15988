"""Loading: what is loaded as it is, and every way in which a directory is refused."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.wording import says, whole
from transformers import BertConfig, BloomConfig, T5Config, dynamic_module_utils
from transformers.utils import logging as transformers_logging

from echoatt_exporter import SharingPlan, load_shared, share_attention
from echoatt_exporter.errors import CheckpointError, UnsupportedModelError
from echoatt_exporter.share.checkpoint import load_teacher
from echoatt_exporter.share.weight_files import checkpoint_digest
from echoatt_runtime.errors import PlanError

Models = Callable[..., Any]
WEIGHTS = "model.safetensors"
QUERIES = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_model: Models) -> Path:
    """A tiny Llama teacher's directory; tests work on copies of it."""
    path = tmp_path_factory.mktemp("saved") / "teacher"
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture
def teacher_dir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "teacher"))


@pytest.fixture
def student_dir(tiny_model: Models, plan_for: Models, tmp_path: Path) -> Path:
    share_attention(tiny_model("llama"), plan_for("llama")).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def _edit_config(directory: Path, **fields: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {k: v.clone() for k, v in load_file(directory / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _refused(
    error: type[Exception], directory: Path, *parts: str, plan: SharingPlan | None = None
) -> None:
    """`load_shared` refuses with exactly `error`, in one line that has every part in it."""
    with pytest.raises(error) as caught:
        load_shared(directory, plan)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(directory), *parts):
        assert says(message, part), message


def _shard(directory: Path) -> None:
    """Store the weights as two shards with an index."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = {
        1: [k for k in tensors if "layers.5" not in k],
        2: [k for k in tensors if "layers.5" in k],
    }
    weight_map: dict[str, str] = {}
    for number, held in names.items():
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({k: tensors[k] for k in held}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


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
    _refused(
        PlanError,
        student_dir,
        "is a student with the plan [0, 1, 1, 1, 4, 4], not [0, 1, 2, 3, 4, 4]",
        plan=SharingPlan((0, 1, 2, 3, 4, 4)),
    )
    with pytest.raises(CheckpointError, match="is a student; a teacher is needed here"):
        load_teacher(student_dir)


def test_shards_and_text_paths(teacher_dir: Path) -> None:
    expected = load_shared(teacher_dir, None).state_dict()
    _shard(teacher_dir)
    actual = load_shared(str(teacher_dir), None).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_files_own_whatever_the_config_says(
    stored: torch.dtype, teacher_dir: Path
) -> None:
    _edit_tensors(teacher_dir, lambda t: t.update({k: v.to(stored) for k, v in t.items()}))
    _edit_config(teacher_dir, dtype="float64")
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
    _edit_tensors(tmp_path / "neox", lambda t: t.update({"gpt_neox.layers.0.attention.bias": mask}))
    load_shared(tmp_path / "neox", None)


def test_code_beside_a_known_model_type_is_not_run(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit_config(teacher_dir, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (teacher_dir / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_shared(teacher_dir, None)
    assert not (tmp_path / "ran").exists()


def test_trusted_code_runs_and_must_be_built_like_the_family(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    _edit_config(teacher_dir, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
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
        _edit_tensors(teacher_dir, lambda t: t.pop(QUERIES))
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
    _refused(CheckpointError, tmp_path / "none", "no such directory", "nothing is downloaded")


def test_hub_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_shared("TinyLlama/TinyLlama-1.1B", None)


def test_file_is_refused(teacher_dir: Path) -> None:
    _refused(CheckpointError, teacher_dir / WEIGHTS, "is a file; give the directory")


def test_directory_without_config_is_refused(teacher_dir: Path) -> None:
    (teacher_dir / "config.json").unlink()
    _refused(CheckpointError, teacher_dir, "no config.json; not a Hugging Face model directory")


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
    _refused(CheckpointError, teacher_dir, "config.json", part)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_texts_larger_than_any_are_refused_unread(name: str, teacher_dir: Path) -> None:
    with (teacher_dir / name).open("ab") as file:
        file.truncate(1 << 40)
    _refused(CheckpointError, teacher_dir, f"{name}: has {1 << 40} bytes")


@pytest.mark.parametrize("config", [BertConfig(), T5Config()], ids=["bert", "t5"])
def test_model_that_is_no_decoder_is_refused(config: Any, teacher_dir: Path) -> None:
    if config.model_type == "bert":
        config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(teacher_dir)
    kind = f"not a decoder (model type '{config.model_type}')"
    _refused(UnsupportedModelError, teacher_dir, kind, "EchoAtt knows gemma2")


def test_decoder_of_another_family_is_refused(teacher_dir: Path) -> None:
    BloomConfig(architectures=["BloomForCausalLM"]).save_pretrained(teacher_dir)
    with pytest.raises(UnsupportedModelError, match="model type 'bloom' is not supported"):
        load_shared(teacher_dir, None)
    with pytest.raises(UnsupportedModelError, match="model type 'bloom' is not supported"):
        load_teacher(teacher_dir)


def test_multimodal_gemma3_is_refused(teacher_dir: Path) -> None:
    _edit_config(teacher_dir, model_type="gemma3")
    _refused(UnsupportedModelError, teacher_dir, "only text checkpoints (model type gemma3_text)")


def test_unknown_type_with_its_own_code_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    _edit_config(
        teacher_dir,
        model_type="evil",
        auto_map={"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    )
    (teacher_dir / "configuration_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    _refused(UnsupportedModelError, teacher_dir, "'evil' comes with its own Python code", "trust")
    assert not (tmp_path / "ran").exists()


def test_quantised_checkpoint_is_refused(teacher_dir: Path) -> None:
    _edit_config(teacher_dir, quantization_config={"quant_method": "gptq", "bits": 4})
    _refused(UnsupportedModelError, teacher_dir, "quantised checkpoint (method gptq)", "dense")


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
    _edit_config(student_dir, **fields)
    _refused(CheckpointError, student_dir, part)


# What is refused: weights


def test_pickled_weights_are_refused_unopened(teacher_dir: Path) -> None:
    (teacher_dir / WEIGHTS).rename(teacher_dir / "pytorch_model.bin")
    _refused(CheckpointError, teacher_dir, "pickled (pytorch_model.bin)", "save_pretrained()")


def test_directory_without_weights_is_refused(teacher_dir: Path) -> None:
    (teacher_dir / WEIGHTS).unlink()
    _refused(CheckpointError, teacher_dir, f"no weights; expected {WEIGHTS}")


def test_missing_shard_is_refused(teacher_dir: Path) -> None:
    _shard(teacher_dir)
    (teacher_dir / "model-00002-of-00002.safetensors").unlink()
    _refused(CheckpointError, teacher_dir, "missing: 1 (model-00002-of-00002.safetensors)")


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        (None, '"weight_map" must name a file'),
        ({"a": 1}, '"weight_map" must name a file'),
        ({"a": "../other.safetensors"}, "outside its directory: 1 (../other.safetensors)"),
        ({"a": "x" * 5000}, "weight files that are missing: 1 (xxx"),
    ],
)
def test_bad_index_is_refused(weight_map: Any, part: str, teacher_dir: Path) -> None:
    (teacher_dir / WEIGHTS).unlink()
    (teacher_dir / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _refused(CheckpointError, teacher_dir, part)


def test_tensor_in_two_shards_is_refused(teacher_dir: Path) -> None:
    _shard(teacher_dir)
    first, second = sorted(teacher_dir.glob("*.safetensors"))
    tensors = load_file(second) | {"lm_head.weight": load_file(first)["lm_head.weight"]}
    save_file(tensors, second, metadata={"format": "pt"})
    _refused(CheckpointError, teacher_dir, "holds tensors of another file too: 1 (lm_head.weight)")


@pytest.mark.parametrize("kept", [0, 4, 300, -1], ids=["empty", "length", "header", "one-byte"])
def test_truncated_weights_are_refused(kept: int, teacher_dir: Path) -> None:
    raw = (teacher_dir / WEIGHTS).read_bytes()
    (teacher_dir / WEIGHTS).write_bytes(raw[:kept])
    _refused(CheckpointError, teacher_dir, WEIGHTS, "truncated or corrupt", "download it again")


def test_corrupt_header_is_refused(teacher_dir: Path) -> None:
    raw = bytearray((teacher_dir / WEIGHTS).read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    raw[size // 2] ^= 0xFF
    (teacher_dir / WEIGHTS).write_bytes(raw)
    _refused(CheckpointError, teacher_dir, "truncated or corrupt")


def test_weights_without_tensors_are_refused(teacher_dir: Path) -> None:
    save_file({}, teacher_dir / WEIGHTS)
    _refused(CheckpointError, teacher_dir, "hold no tensors")


def test_missing_tensors_are_refused(teacher_dir: Path) -> None:
    _edit_tensors(teacher_dir, lambda t: t.pop(QUERIES))
    _refused(CheckpointError, teacher_dir, f"missing 1 ({QUERIES})")


def test_missing_head_is_refused_unless_tied(teacher_dir: Path) -> None:
    _edit_tensors(teacher_dir, lambda t: t.pop("lm_head.weight"))
    _refused(CheckpointError, teacher_dir, "missing 1 (lm_head.weight)")


def test_surplus_tensors_are_refused(teacher_dir: Path) -> None:
    _edit_tensors(teacher_dir, lambda t: t.update({"model.layers.2.extra.bias": torch.zeros(3)}))
    _refused(CheckpointError, teacher_dir, "surplus 1 (model.layers.2.extra.bias)")


def test_config_for_fewer_layers_is_refused(teacher_dir: Path) -> None:
    _edit_config(teacher_dir, num_hidden_layers=4)
    _refused(CheckpointError, teacher_dir, "surplus 18 (model.layers.4.input_layernorm.weight, ")


def test_wrongly_shaped_tensors_are_refused(teacher_dir: Path) -> None:
    _edit_tensors(teacher_dir, lambda t: t.update({QUERIES: torch.zeros(32, 48)}))
    part = f"wrongly shaped 1 ({QUERIES} is [32, 48], not [48, 32])"
    _refused(CheckpointError, teacher_dir, part)


def test_every_misfit_is_named_at_once(teacher_dir: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[QUERIES]
        tensors["surplus.weight"] = torch.zeros(2)
        tensors["model.norm.weight"] = torch.zeros(3)

    _edit_tensors(teacher_dir, edit)
    parts = f"missing 1 ({QUERIES}); surplus 1 (surplus.weight); wrongly shaped 1 (model.norm"
    _refused(CheckpointError, teacher_dir, parts)


def test_student_with_a_followers_queries_left_or_values_gone_is_refused(student_dir: Path) -> None:
    name = "decoder.model.layers.2.self_attn"
    _edit_tensors(student_dir, lambda t: t.update({f"{name}.q_proj.weight": torch.zeros(48, 32)}))
    _refused(CheckpointError, student_dir, f"surplus 1 ({name}.q_proj.weight)")
    _edit_tensors(
        student_dir, lambda t: (t.pop(f"{name}.q_proj.weight"), t.pop(f"{name}.v_proj.weight"))
    )
    _refused(CheckpointError, student_dir, f"missing 1 ({name}.v_proj.weight)")


def test_students_weights_under_a_teachers_config_are_refused(
    teacher_dir: Path, student_dir: Path
) -> None:
    """The one that would make a loader fill in queries and keys at random."""
    tensors = {k.removeprefix("decoder."): v for k, v in load_file(student_dir / WEIGHTS).items()}
    save_file(tensors, teacher_dir / WEIGHTS, metadata={"format": "pt"})
    _refused(CheckpointError, teacher_dir, "missing 6 (model.layers.2.self_attn.k_proj.weight, ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_weights_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, kind: str, teacher_dir: Path, student_dir: Path
) -> None:
    directory = {"teacher": teacher_dir, "student": student_dir}[kind]
    name = ("decoder." if kind == "student" else "") + "model.layers.3.mlp.up_proj.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({k: v.to(dtype) for k, v in tensors.items()})
        tensors[name][-1, -1] = value

    _edit_tensors(directory, edit)
    _refused(CheckpointError, directory, f"{name} holds NaN or infinite values", "damaged")


def test_weights_that_overflow_the_wanted_dtype_are_refused(teacher_dir: Path) -> None:
    _edit_tensors(teacher_dir, lambda t: t["model.norm.weight"].fill_(1e5))
    load_shared(teacher_dir, None)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* as float16; try another"):
        load_shared(teacher_dir, None, dtype=torch.float16)


@pytest.mark.parametrize("everything", [True, False])
def test_weights_stored_as_integers_are_refused(everything: bool, teacher_dir: Path) -> None:
    chosen = QUERIES if not everything else "weight"
    _edit_tensors(
        teacher_dir,
        lambda t: t.update({k: v.to(torch.int8) for k, v in t.items() if chosen in k}),
    )
    part = "quantised (I8)" if everything else f"quantised weights: 1 ({QUERIES} is I8)"
    _refused(UnsupportedModelError, teacher_dir, part, "dense checkpoint")


# The digest


def test_digest_covers_config_and_every_shard(teacher_dir: Path) -> None:
    digest = checkpoint_digest(teacher_dir)
    assert len(bytes.fromhex(digest)) == 32
    (teacher_dir / "README.md").write_text("not part of it")
    assert checkpoint_digest(str(teacher_dir)) == digest
    _shard(teacher_dir)
    digests = {digest, checkpoint_digest(teacher_dir)}
    for file in [*sorted(teacher_dir.glob("*.safetensors")), teacher_dir / "config.json"]:
        raw = bytearray(file.read_bytes())
        raw[-2] ^= 1
        file.write_bytes(raw)
        digests.add(checkpoint_digest(teacher_dir))
    assert len(digests) == 5


def test_digest_of_nothing_is_refused(tmp_path: Path, teacher_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint_digest(tmp_path)
    (teacher_dir / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        checkpoint_digest(teacher_dir)
