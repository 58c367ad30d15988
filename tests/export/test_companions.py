"""What lies beside a model: a bundle uses what its manifest lists, and is in nobody's way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.tiny_models import build_tiny_model
from transformers import AutoTokenizer

from echoatt_exporter import OutputExistsError, export_bundle, rewrite_bundle
from echoatt_exporter.bundle import BundlePath, copy_checkpoint_files
from echoatt_exporter.share.tokenizer_files import save_tokenizer
from echoatt_runtime import ChatTemplateError, EchoModel, SamplingParams
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.text import TextTokenizer

# Another model's bundle, with a tokenizer and a chat template
STRANGER = Path(__file__).parents[1] / "runtime" / "data" / "format-2"
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]
GREEDY = SamplingParams(max_new_tokens=2, ignore_eos=True)
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer, and without chat template and generation_config.json."""
    directory = tmp_path_factory.mktemp("plain")
    build_tiny_model("llama", num_hidden_layers=3, vocab_size=300).save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    for name in TOKENIZER_FILES:
        shutil.copyfile(STRANGER / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def plain(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle, exported into a directory with another model's template."""
    directory = tmp_path_factory.mktemp("place")
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copyfile(STRANGER / name, directory / name)
    return export_bundle(checkpoint, directory / "a.onnx", verify=False).model


def _is_its_own(path: Path) -> None:
    """Check that the bundle has its own companions, and runs without the stranger's template."""
    bundle = Bundle.open(path, verify=True)
    names = [file.name for file in bundle.manifest.companions]
    assert names == ["config.json", *TOKENIZER_FILES]
    assert bundle.companion("chat_template.jinja") is None
    model = EchoModel.load(path)
    assert len(model.generate("Hello", GREEDY)[0].token_ids) == 2
    with pytest.raises(ChatTemplateError, match="no chat template"):
        model.generate(CHAT, GREEDY)


def test_bundle_does_not_adopt_what_lies_beside_it(plain: Path) -> None:
    _is_its_own(plain)
    # The stranger's own files are as they were
    for name in ("chat_template.jinja", "generation_config.json"):
        assert plain.with_name(name).read_bytes() == (STRANGER / name).read_bytes()


def test_bundle_that_replaces_another_models_does_not_adopt_its_companions(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    shutil.copytree(STRANGER, tmp_path, dirs_exist_ok=True)
    assert len(EchoModel.load(out).generate(CHAT, GREEDY)) == 1
    export_bundle(checkpoint, out, verify=False, force=True)
    _is_its_own(out)


def test_rewrite_takes_along_what_the_bundle_lists_and_nothing_else(
    plain: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(plain.parent, source)
    for name in ("notes.txt", "vocab.txt", "added_tokens.json", "special_tokens_map.json"):
        (source / name).write_text("{}")
    out = tmp_path / "out" / "b.onnx"
    rewrite_bundle(source / "a.onnx", out, "2:1")
    _is_its_own(out)
    expected = ["b.onnx", "b.onnx.data", "config.json", *TOKENIZER_FILES]
    assert sorted(path.name for path in out.parent.iterdir()) == expected


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_models_companion_is_not_replaced_unless_forced(
    plain: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(OutputExistsError, match=rf"{name} exists and differs.*another model"):
        rewrite_bundle(plain, tmp_path / "b.onnx", "2:1")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "{}"
    rewrite_bundle(plain, tmp_path / "b.onnx", "2:1", force=True)
    _is_its_own(tmp_path / "b.onnx")


def test_bundles_of_one_checkpoint_share_a_directory(
    checkpoint: Path, plain: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "int4.onnx"
    shutil.copytree(plain.parent, tmp_path, dirs_exist_ok=True)
    export_bundle(checkpoint, second, dtype="int4", verify=False)
    for path in (first, second):
        _is_its_own(path)
    # One is written again: the other does not notice
    rewrite_bundle(plain, first, "2:1", force=True)
    for path in (first, second):
        _is_its_own(path)
    out = BundlePath.of(first)
    for file in (out.model, out.weights):
        file.unlink()
    _is_its_own(second)


def test_several_chat_templates_come_along_from_a_list_and_from_a_folder(
    checkpoint: Path, tmp_path: Path
) -> None:
    templates = {"default": "plain", "tool_use": "tools", "rag": "é"}
    source, student, beside = tmp_path / "source", tmp_path / "student", tmp_path / "beside"
    shutil.copytree(checkpoint, source)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    path.write_text(json.dumps(config))
    bundle = export_bundle(source, tmp_path / "out" / "a.onnx", verify=False).model
    student.mkdir()
    save_tokenizer(source, student)
    assert (student / "additional_chat_templates" / "tool_use.jinja").is_file()
    beside.mkdir()
    copy_checkpoint_files(student, beside)
    for tokenizer in (EchoModel.load(bundle).tokenizer, TextTokenizer.from_directory(beside)):
        assert (tokenizer.chat_template, tokenizer.tool_template) == ("plain", "tools")
    for place in (bundle.parent, beside):
        assert AutoTokenizer.from_pretrained(place).chat_template == templates
