"""Standard output that cannot take what a command writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest
from tests.tiny_models import build_tiny_model

from echoatt_cli import main

BUNDLE = Path(__file__).parents[1] / "runtime" / "data" / "format-2"

Into = Callable[..., tuple[int, str]]

COMMANDS = {
    "generate": ("generate", BUNDLE, "a", "--max-new-tokens", 20, "--stats"),
    "evaluate": ("evaluate", BUNDLE, "--text", "{text}"),
    "evaluate --json": ("evaluate", BUNDLE, "--text", "{text}", "--json"),
    "share": ("share", "{model}", "{out}", "--share", "1:0"),
    "share --json": ("share", "{model}", "{out}", "--share", "1:0", "--json"),
    "--help": ("--help",),
    "--version": ("--version",),
    "generate --help": ("generate", "--help"),
}


def full_disk(*, unbuffered: bool) -> TextIO:
    return _stream(os.open("/dev/full", os.O_WRONLY), unbuffered=unbuffered)


def closed_pipe(*, unbuffered: bool) -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return _stream(writer, unbuffered=unbuffered)


def _stream(descriptor: int, *, unbuffered: bool) -> TextIO:
    stream = os.fdopen(descriptor, "w", encoding="utf-8")
    stream.reconfigure(write_through=unbuffered, line_buffering=unbuffered)
    return stream


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "text.txt").write_text("a b c " * 20)
    build_tiny_model("llama", num_hidden_layers=2).save_pretrained(folder / "model")
    return {"text": folder / "text.txt", "model": folder / "model"}


@pytest.fixture
def run_into(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Into:
    """`run_into(stream, *arguments)`: exit code, and what is on standard error."""

    def call(stream: TextIO, *arguments: object) -> tuple[int, str]:
        with monkeypatch.context() as patch, stream:
            patch.setattr(sys, "stdout", stream)
            code = main([str(argument) for argument in arguments])
            # As when the process ends
            stream.flush()
        return code, capfd.readouterr().err

    return call


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_in_a_line_or_quietly(
    command: str, unbuffered: bool, inputs: dict[str, Path], run_into: Into, tmp_path: Path
) -> None:
    for open_output, expected, lines in ((full_disk, 2, 1), (closed_pipe, 141, 0)):
        places = inputs | {"out": tmp_path / open_output.__name__}
        arguments = [str(argument).format_map(places) for argument in COMMANDS[command]]
        code, err = run_into(open_output(unbuffered=unbuffered), *arguments)
        assert (code, err.count("\n")) == (expected, lines), err
        if lines:
            assert f"standard output cannot be written ({os.strerror(errno.ENOSPC)})" in err


def test_what_could_not_be_written_does_not_come_later(
    inputs: dict[str, Path], run_into: Into, tmp_path: Path
) -> None:
    lost = ("evaluate", BUNDLE, "--text", inputs["text"])
    assert run_into(closed_pipe(unbuffered=True), *lost)[0] == 141
    shown = tmp_path / "shown.txt"
    share = ("share", inputs["model"], tmp_path / "student", "--share", "1:0")
    assert run_into(shown.open("w", encoding="utf-8"), *share)[0] == 0
    assert shown.read_text(encoding="utf-8").startswith("plan: ")


def test_a_reader_that_leaves_ends_the_process_quietly() -> None:
    command = [sys.executable, "-m", "echoatt_cli", "generate", str(BUNDLE), "a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_without_standard_output_nothing_is_shown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["generate", str(BUNDLE), "a", "--max-new-tokens", "2"]) == 0
    assert capfd.readouterr() == ("", "")


def test_signs_that_an_encoding_lacks_are_replaced(
    inputs: dict[str, Path], run_into: Into, tmp_path: Path
) -> None:
    for arguments, sign in (
        (("share", inputs["model"], tmp_path / "student", "--share", "1:0"), "plan: ? 0"),
        (("generate", BUNDLE, "Hello", "--max-new-tokens", 12), "?"),
    ):
        shown = tmp_path / "shown.txt"
        assert run_into(shown.open("w", encoding="ascii"), *arguments) == (0, "")
        assert sign in shown.read_text(encoding="ascii")
