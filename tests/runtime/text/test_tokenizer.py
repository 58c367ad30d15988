import json

import pytest

from echoatt_runtime import DamagedBundleError, PromptError
from echoatt_runtime.text.tokenizer import TextTokenizer

TEXTS = ["Once upon a time", " lead", "</s>a <s>", "é ☃ 𝄞\n\n", "a  b\t", "世界"]


@pytest.fixture
def directory(byte_tokenizer, tmp_path):
    byte_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_config(directory, **config):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["stories260k", "books12"])
def test_shared_tokenizers_agree_with_transformers(shared_models, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared_models / name)
    ours = TextTokenizer.from_directory(shared_models / name)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == (
            theirs(text, add_special_tokens=False).input_ids
        )
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
    ],
)
def test_added_tokens_agree_with_transformers(directory, flags):
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    }
    write_config(directory, **config, **flags)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = TextTokenizer.from_directory(directory)
    assert ours.encode("ab") == theirs("ab").input_ids
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_saved_truncation_and_padding_are_not_applied(directory, byte_tokenizer):
    byte_tokenizer.enable_truncation(4)
    byte_tokenizer.enable_padding(length=8)
    byte_tokenizer.save(str(directory / "tokenizer.json"))
    assert len(TextTokenizer.from_directory(directory).encode("abcdef")) == 6


def test_special_tokens_are_read_as_such_and_not_shown(directory):
    tokenizer = TextTokenizer.from_directory(directory)
    ids = tokenizer.encode("a</s>b")
    assert ids[1] == 257
    assert tokenizer.is_left_out(257)
    assert tokenizer.decode(ids) == "ab"


def test_chat_templates_are_found(directory):
    assert TextTokenizer.from_directory(directory).chat_template is None
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    write_config(directory, chat_template=named)
    assert TextTokenizer.from_directory(directory).chat_template == "d"
    write_config(directory, chat_template="plain")
    assert TextTokenizer.from_directory(directory).chat_template == "plain"
    (directory / "chat_template.jinja").write_text("file")
    assert TextTokenizer.from_directory(directory).chat_template == "file"


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer.json", None, "has no tokenizer.json of this model"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is not a JSON object"),
    ],
)
def test_files_that_cannot_be_read(directory, file, content, fault):
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_text(content)
    with pytest.raises(DamagedBundleError, match=fault):
        TextTokenizer.from_directory(directory)


def test_what_the_tokenizer_raises_is_typed(directory):
    """Whatever type it has: tokenizers raises `Exception`, and less than that where Rust panics."""
    path = directory / "tokenizer.json"
    whole = json.loads(path.read_text())
    model = {"type": "WordLevel", "unk_token": "[GONE]", "vocab": {"a": 0}}
    path.write_text(json.dumps(whole | {"model": model, "added_tokens": []}))
    with pytest.raises(PromptError, match=r"refuses the text .*unk|UNK"):
        TextTokenizer.from_directory(directory).encode("zebra")
    decoder = {"type": "Strip", "content": "a", "start": 9, "stop": 9}
    path.write_text(json.dumps(whole | {"decoder": decoder}))
    tokenizer = TextTokenizer.from_directory(directory)
    with pytest.raises(DamagedBundleError, match="cannot make text of tokens"):
        tokenizer.decode(tokenizer.encode("aaa"))


def test_a_tokenizer_whose_text_grows_without_end_is_refused(directory):
    path = directory / "tokenizer.json"
    whole = json.loads(path.read_text())
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    anywhere = {"type": "Replace", "pattern": {"Regex": "|b"}, "content": "a" * 10}
    nested = {"type": "Sequence", "normalizers": [grow] * 12}
    for steps in ([grow] * 12, [anywhere] * 12, [nested]):
        normalizer = {"type": "Sequence", "normalizers": steps}
        path.write_text(json.dumps(whole | {"normalizer": normalizer}))
        with pytest.raises(DamagedBundleError, match="times as long"):
            TextTokenizer.from_directory(directory)
    path.write_text(json.dumps(whole | {"normalizer": grow}))
    assert len(TextTokenizer.from_directory(directory).encode("ab")) == 11
