"""Students on disk: the round trip, what lies beside the weights, all or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import every_family
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from echoatt_exporter import EchoAttConfig, EchoAttForCausalLM, SharingPlan, load_shared
from echoatt_exporter.errors import CheckpointError, ExportError, OutputExistsError
from echoatt_exporter.share.save import save_student

Models = Callable[..., Any]


@torch.no_grad()
@every_family
def test_round_trip_is_bit_equal(
    family: str, student_of: Models, tokens: torch.Tensor, tmp_path: Path
) -> None:
    student: EchoAttForCausalLM = student_of(family)
    expected = student(tokens).logits
    student.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(loaded, EchoAttForCausalLM)
    assert loaded.sources == student.sources
    assert torch.equal(loaded(tokens).logits, expected)
    again = load_shared(tmp_path / "a", None)
    assert torch.equal(again(tokens).logits, expected)
    again.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_family
def test_round_trip_in_half_precision(
    family: str, student_of: Models, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """A dtype that was changed after sharing is the one that comes back, all through."""
    student: EchoAttForCausalLM = student_of(family).to(torch.bfloat16)
    student.save_pretrained(tmp_path)
    logits = []
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_shared(tmp_path, None)):
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], w) for name, w in student.state_dict().items())
        # Not the student's own logits: .to() rounds its rotary frequencies, which loading does not
        logits.append(loaded(tokens).logits)
    assert torch.equal(*logits)


@every_family
def test_the_file_shrinks_by_exactly_the_dropped_tensors(
    family: str, tiny_model: Models, student_of: Models, tmp_path: Path
) -> None:
    teacher, student = tiny_model(family), student_of(family)
    elements = teacher.num_parameters() - student.num_parameters()
    teacher.save_pretrained(tmp_path / "teacher")
    student.save_pretrained(tmp_path / "student")
    sizes = [
        sum(t.nbytes for t in load_file(tmp_path / name / "model.safetensors").values())
        for name in ("teacher", "student")
    ]
    assert elements > 0
    assert sizes[0] - sizes[1] == 4 * elements


@pytest.mark.parametrize("layout", [None, {"layers": "decoder"}], ids=["none", "another"])
def test_a_layout_that_the_file_lacks_or_has_wrong_comes_from_the_family(
    layout: Any, student_of: Models, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Older students have none."""
    student: EchoAttForCausalLM = student_of("phi3")
    student.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    saved = json.loads(file.read_text())
    written = saved.pop("layout")
    file.write_text(json.dumps(saved | ({} if layout is None else {"layout": layout})))
    loaded = load_shared(tmp_path / "a", None)
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    loaded.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["layout"] == written


def test_auto_classes_know_students(student_of: Models, tmp_path: Path) -> None:
    student_of("gemma2").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is EchoAttConfig
    assert config.get_text_config().model_type == "gemma2"
    assert config.sources == [0, 1, 0, 1, 0, 5]


def test_other_attention_implementations_do_not_get_in(
    student_of: Models, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """What a caller asks for in transformers' own words must not switch sharing off."""
    student = student_of("llama")
    expected = student(tokens).logits
    student.save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        torch.testing.assert_close(loaded(tokens).logits, expected)


def test_configuration_leaves_the_callers_dict_alone() -> None:
    text = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "vocab_size": 17,
        "eos_token_id": 5,
        "rope_theta": 500.0,  # transformers writes it into the older dict below
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }
    before = json.dumps(text)
    config = EchoAttConfig(text_config=text)
    assert json.dumps(text) == before
    assert config.sources == [0, 1, 2]
    assert config.eos_token_id == 5
    assert config.get_text_config().vocab_size == 17


@pytest.fixture
def trained(stories260k: Path) -> EchoAttForCausalLM:
    return load_shared(stories260k, SharingPlan((0, 1, 1, 1, 4)))


@torch.no_grad()
def test_saved_directory_is_complete(
    trained: EchoAttForCausalLM, stories260k: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "student"
    trained.generation_config.repetition_penalty = 1.5
    save_student(trained, out, stories260k)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "configuration_echoatt.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_echoatt.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["student"]
    text = "Once upon a time, Lily saw a café."
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (stories260k, out)]
    ids = [tokenizer(text, return_tensors="pt").input_ids for tokenizer in tokenizers]
    assert torch.equal(ids[0], ids[1])
    assert tokenizers[1].decode(ids[1][0]) == tokenizers[0].decode(ids[0][0])
    loaded = load_shared(out, None)
    assert torch.equal(loaded(ids[0]).logits, trained(ids[0]).logits)
    assert loaded.generation_config.repetition_penalty == 1.5
    assert loaded.generation_config.eos_token_id == trained.generation_config.eos_token_id


def test_no_local_path_is_written(
    trained: EchoAttForCausalLM, stories260k: Path, tmp_path: Path
) -> None:
    save_student(trained, tmp_path / "student", stories260k)
    for file in (tmp_path / "student").glob("*.json"):
        text = file.read_text()
        assert "_name_or_path" not in text, file.name
        assert str(stories260k) not in text, file.name
        assert str(tmp_path) not in text, file.name


def test_chat_template_is_taken_over(
    trained: EchoAttForCausalLM, stories260k: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text((stories260k / name).read_text())
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    save_student(trained, tmp_path / "student", source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi!"


def test_inconsistent_generation_config_is_saved_as_it_is(
    student_of: Models, tmp_path: Path
) -> None:
    student: EchoAttForCausalLM = student_of("llama")
    student.generation_config = GenerationConfig(eos_token_id=[2, 9])
    student.generation_config.temperature = 0.6  # without do_sample: transformers would not save it
    with pytest.raises(ValueError, match="temperature"):
        student.save_pretrained(tmp_path / "plain")
    save_student(student, tmp_path / "student", tmp_path)
    written = json.loads((tmp_path / "student/generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert written["eos_token_id"] == [2, 9]
    assert student.generation_config.temperature == 0.6


def test_source_without_tokenizer_gives_a_student_without(
    student_of: Models, tmp_path: Path
) -> None:
    save_student(student_of("llama"), tmp_path / "student", tmp_path)
    assert sorted(p.name for p in (tmp_path / "student").iterdir()) == [
        "config.json",
        "configuration_echoatt.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_echoatt.py",
    ]


def test_existing_output_is_refused(student_of: Models, tmp_path: Path) -> None:
    student, out = student_of("llama"), tmp_path / "student"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match="student: exists; remove it"):
        save_student(student, out, tmp_path)
    with pytest.raises(OutputExistsError, match=r"mine\.txt: exists"):
        save_student(student, out / "mine.txt", tmp_path)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    save_student(student, out, tmp_path)  # an empty directory is no loss
    assert (out / "config.json").is_file()


def test_broken_tokenizer_is_refused_and_nothing_is_left(
    student_of: Models, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        save_student(student_of("llama"), tmp_path / "student", source)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_failure_in_the_middle_leaves_nothing(
    student_of: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up after the weights are written."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    student = student_of("llama")
    monkeypatch.setattr(type(student.generation_config), "to_json_file", full)
    with pytest.raises(ExportError, match=r"cannot write the student \(\[Errno 28\] No space"):
        save_student(student, tmp_path / "student", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_parent_that_is_a_file_is_an_error(student_of: Models, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write the student"):
        save_student(student_of("llama"), tmp_path / "file" / "student", tmp_path)
