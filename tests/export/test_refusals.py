"""What can be refused without the weights is refused before they are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.export.children import Child, leave_room, mount_read_only, mount_small_disk, run_command
from tests.tiny_models import build_tiny_model

from echoatt_cli import main
from echoatt_exporter.bundle import least_bytes
from echoatt_exporter.share.outline import read_outline

TOKENIZER = Path(__file__).parents[1] / "runtime" / "data" / "format-2"

Change = Callable[[Path, Path], object]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer whose weights are NaN, which is seen when they are read."""
    directory = tmp_path_factory.mktemp("damaged")
    model = build_tiny_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(torch.nan)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, directory / name)
    return directory


def _set(name: str, value: object, file: str = "config.json") -> Change:
    def change(checkpoint: Path, _: Path) -> None:
        path = checkpoint / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def _write(name: str, text: str) -> Change:
    """Put a file where the bundle shall go."""
    return lambda _, place: (place / name).write_text(text)


def _damage(name: str) -> Change:
    return lambda checkpoint, _: (checkpoint / name).write_text("{")


def _nothing(_checkpoint: Path, _place: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (_nothing, (), "holds NaN"),
        (_nothing, ("--dtype", "fp16"), "fp16 is not for the CPU"),
        (_nothing, ("--dtype", "bf16"), "bf16 is not for the CPU"),
        (_nothing, ("--share", "1:2"), "not earlier"),
        (_set("model_type", "mamba"), (), "'mamba' is not supported"),
        (_set("quantization_config", {"quant_method": "awq"}), (), "quantised checkpoint"),
        (_set("eos_token_id", [2, "x"], "generation_config.json"), (), "special token 'x'"),
        (_set("pad_token_id", "zero"), (), "not a valid llama config"),
        (_damage("generation_config.json"), (), "not readable as JSON"),
        (_damage("tokenizer.json"), (), "tokenizer cannot be loaded"),
        (_write("o.onnx", "old"), (), "exists; choose another name"),
        (_write("o.onnx.data", "old"), (), "exists; choose another name"),
        (_write("config.json", "{}"), (), "another model's"),
        (_write("tokenizer.json", "{}"), (), "another model's"),
        (_write("generation_config.json", "{}"), (), "another model's"),
        (_write("chat_template.jinja", "{{ 1 }}"), (), "another model's"),
        (lambda _, place: (place / "o.onnx").mkdir(), ("--force",), "is a directory"),
        (lambda _, place: (place / "o.onnx.data").mkdir(), ("--force",), "is a directory"),
        (lambda _, place: (place / "config.json").mkdir(), ("--force",), "is a directory"),
        (lambda _, place: (place.rmdir(), place.touch()), (), "cannot make the directory"),
    ],
)
def test_refused_before_the_weights_are_read(
    change: Change,
    options: tuple[str, ...],
    message: str,
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, place = tmp_path / "checkpoint", tmp_path / "place"
    shutil.copytree(damaged, checkpoint)
    place.mkdir()
    change(checkpoint, place)
    before = sorted(tmp_path.rglob("*"))
    code = main(["export", str(checkpoint), str(place / "o.onnx"), *options])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("echoatt: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda place: (mount_small_disk(place), leave_room(place, 10 * 4096)), "the weights take"),
        (mount_read_only, "Read-only file system"),
    ],
)
def test_disk_is_looked_at_before_the_weights_are_read(
    prepare: Callable[[Path], object], message: str, damaged: Path, tmp_path: Path
) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()

    def export() -> int:
        prepare(place)
        before = sorted(place.iterdir())
        code = run_command(log, "export", damaged, place / "o.onnx")
        return code if sorted(place.iterdir()) == before else 1

    assert Child(export).wait() == 2
    told = log.read_text()
    assert told.count("\n") == 1
    assert message in told


@pytest.mark.parametrize(
    ("dtype", "plan"), [("fp32", None), ("fp32", "2:1"), ("fp16", "2:1"), ("int8", "2:1")]
)
def test_what_weights_take_is_known_beforehand(damaged: Path, dtype: str, plan: str | None) -> None:
    """Hidden size 32, 61 tokens, 3 layers of 4 query and 2 key/value heads of 12.

    Quantised, the LM head may be the table, and is then stored with it.
    """
    table, norms = 61 * 32, 7 * 32
    queries_and_keys, values_and_output = (4 + 2) * 12 * 32, (2 + 4) * 12 * 32
    layers = 3 * (values_and_output + 3 * 32 * 40) + (3 - (plan is not None)) * queries_and_keys
    if dtype == "int8":
        rest = table + layers + norms
        expected = rest + rest // 32 * 4
    else:
        expected = (2 * table + layers + norms) * (4 if dtype == "fp32" else 2)
    assert least_bytes(read_outline(damaged, plan), dtype) == expected
