"""`echoatt generate`: what it hands to the template, and text that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.runtime.conftest import TinyDecoder, tiny_specification, write_bundle

from echoatt_cli import main
from echoatt_runtime import EchoModel, SamplingParams

TEMPLATE = "{{ messages[0].content }}{{ tools | tojson }}{{ enable_thinking }}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    decoder = TinyDecoder.random(tiny_specification())
    return write_bundle(directory, decoder, companions={"chat_template.jinja": TEMPLATE})


def test_the_template_gets_tools_and_arguments(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "f"}]), encoding="utf-8-sig")
    arguments = ["--tools", str(tools), "--chat-template-kwargs", '{"enable_thinking": false}']
    shown = ["generate", str(bundle), "hi", "--max-new-tokens", "8", "--chat", *arguments]
    assert main(shown) == 0
    params = SamplingParams(max_new_tokens=8)
    expected = EchoModel.load(bundle).generate('hi[{"name": "f"}]False', params)[0]
    assert capsys.readouterr() == (expected.text + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--tools", "{tmp}/tools.json"], "no prompt is a chat"),
        (["a", "--chat-template-kwargs", "{}"], "no prompt is a chat"),
        (["a", "--chat", "--tools", "{tmp}/absent"], "absent cannot be read"),
        (["a", "--chat", "--tools", "{tmp}/object.json"], "no list of JSON schemas"),
        (["a", "--chat", "--chat-template-kwargs", "{"], "--chat-template-kwargs is not JSON"),
        (["a", "--chat", "--chat-template-kwargs", "[]"], "chat_template_kwargs are list"),
        # What Python makes of the byte 0xff on a command line
        (["\udcff"], r"no Unicode text (character 0 is '\udcff'"),
        (["\udcff", "--chat"], "no Unicode text"),
        (["a", "--stop", "\udcff"], "no Unicode text"),
    ],
    ids=ascii,
)
def test_bad_input_is_one_line(
    bundle: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tools.json").write_text("[]")
    (tmp_path / "object.json").write_text('{"name": "f"}')
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["generate", str(bundle), *given]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
