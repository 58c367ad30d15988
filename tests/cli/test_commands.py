"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir
import pytest
from tests.tiny_models import VOCAB_SIZE, build_tiny_model
from tests.wording import says
from tokenizers import Tokenizer, models, pre_tokenizers

from echoatt_cli import main
from echoatt_exporter import EchoAttForCausalLM, rewrite_bundle
from echoatt_exporter.trace.tracer import trace_student
from echoatt_runtime.contract import Specification


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of one-letter words."""
    directory = tmp_path_factory.mktemp("checkpoint")
    build_tiny_model("llama", num_hidden_layers=3).save_pretrained(directory)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        chr(ord("a") + index): index + 3 for index in range(26)
    }
    words |= {f"w{index}": index for index in range(len(words), VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )
    return directory


@pytest.fixture(scope="module")
def exported(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """A bundle made by the installed command, and the report it printed."""
    out = tmp_path_factory.mktemp("out") / "tiny.onnx"
    command = Path(sys.executable).with_name("echoatt-export")
    done = subprocess.run(
        [command, checkpoint, out, "--json"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    report: dict[str, object] = json.loads(done.stdout)
    return out, report


@pytest.fixture
def shared(exported: tuple[Path, dict[str, object]], tmp_path: Path) -> Path:
    return rewrite_bundle(exported[0], tmp_path / "shared.onnx", "2:1").model


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run(*arguments)`: exit code, standard output and standard error of `echoatt`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what the test itself printed before
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


Run = Callable[..., tuple[int, str, str]]


def test_export_as_json_is_one_document(exported: tuple[Path, dict[str, object]]) -> None:
    out, report = exported
    assert report["model"] == str(out)
    parity = report["parity"]
    assert isinstance(parity, dict)
    assert parity["passed"] is True
    assert (out.parent / "tokenizer.json").is_file()
    assert (out.parent / "config.json").is_file()


def test_rewrite_shows_plan_passes_and_summary(
    exported: tuple[Path, dict[str, object]], run: Run, tmp_path: Path
) -> None:
    code, out, err = run("rewrite", exported[0], tmp_path / "o.onnx", "--share", "2:1")
    assert (code, err) == (0, "")
    assert "plan: ● ● 1   (1 of 3 layers follow, 33%" in out
    assert "RemoveDeadBranches" in out
    assert "not verified" in out


def test_plan_file_is_read(
    exported: tuple[Path, dict[str, object]], run: Run, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"format": "echoatt-plan/1", "sources": [0, 0, 2]}')
    code, _, _ = run("rewrite", exported[0], tmp_path / "o.onnx", "--plan", plan)
    assert code == 0


def test_parity_of_a_good_bundle_exits_0(checkpoint: Path, shared: Path, run: Run) -> None:
    code, out, _ = run("parity", checkpoint, shared, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["passed"] is True
    assert report["cases"]


def test_parity_table_names_every_case(checkpoint: Path, shared: Path, run: Run) -> None:
    _, out, _ = run("parity", checkpoint, shared, "--json")
    names = [case["name"] for case in json.loads(out)["cases"]]
    code, table, _ = run("parity", checkpoint, shared)
    assert code == 0
    assert names
    assert table.count("pass") >= len(names)


def test_parity_with_another_model_of_the_same_shape_exits_1(
    shared: Path, run: Run, tmp_path: Path
) -> None:
    build_tiny_model("llama", seed=1, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    code, out, _ = run("parity", tmp_path / "other", shared)
    assert code == 1
    assert "fail" in out


def test_parity_with_a_model_of_another_shape_exits_2(
    shared: Path, run: Run, tmp_path: Path
) -> None:
    build_tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "other")
    code, out, err = run("parity", tmp_path / "other", shared)
    assert (code, out) == (2, "")
    assert err.startswith("echoatt: ")
    assert err.count("\n") == 1


def test_generate_streams_the_continuation(shared: Path, run: Run) -> None:
    arguments = ("generate", shared, "a b c", "--max-new-tokens", 5)
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert run(*arguments)[1] == out
    code, _, err = run(*arguments, "--stats")
    assert code == 0
    assert says(err, "3 prompt tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "{tmp}/absent", "{tmp}/o.onnx"), "no such directory"),
        (("export", "{tmp}", "{tmp}/o.onnx"), "config.json"),
        (("export", "{model}", "{tmp}/o.onnx", "--share", "2-1"), "3:2,4:2"),
        (("export", "{model}", "{tmp}/o.onnx", "--share", "1:2"), "not earlier"),
        (("export", "{model}", "{tmp}/o.onnx", "--plan", "{tmp}/absent.json"), "cannot read"),
        (("export", "{model}", "{tmp}/o.onnx", "--dtype", "fp16"), "--device cuda"),
        (("rewrite", "{tmp}/absent.onnx", "{tmp}/o.onnx", "--share", "2:1"), "absent.onnx"),
        (("rewrite", "{tmp}/noise.onnx", "{tmp}/o.onnx", "--share", "2:1"), "noise.onnx"),
        (("parity", "{model}", "{tmp}/absent.onnx"), "absent.onnx"),
        (("parity", "{model}", "{bundle}", "--share", "2:1"), "plan"),
        (("generate", "{tmp}/absent.onnx", "a"), "absent.onnx"),
        (("generate", "{tmp}/noise.onnx", "a"), "noise.onnx"),
        (("generate", "{bundle}", ""), "prompt"),
        (("generate", "{bundle}", "a", "--top-p", "7"), "top_p"),
        (("generate", "{bundle}", "a", "--device", "npu"), "npu"),
        (("generate", "{bundle}", "a", "--device", "cuda"), "lowered for cpu"),
        (("generate", "{bundle}", "a", "--chat"), "template"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    checkpoint: Path,
    exported: tuple[Path, dict[str, object]],
    run: Run,
    tmp_path: Path,
) -> None:
    (tmp_path / "noise.onnx").write_bytes(bytes(range(256)) * 4)
    places = {"tmp": tmp_path, "model": checkpoint, "bundle": exported[0]}
    code, out, err = run(*(argument.format_map(places) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("echoatt: ")
    assert err.count("\n") == 1
    assert says(err, message)
    assert not (tmp_path / "o.onnx").exists()


def test_bundle_cut_short_is_told(
    exported: tuple[Path, dict[str, object]], run: Run, tmp_path: Path
) -> None:
    for path in exported[0].parent.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    weights = tmp_path / "tiny.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = run("generate", tmp_path / "tiny.onnx", "a")
    assert code == 2
    assert "cut short" in err


@pytest.mark.parametrize("arguments", [(), ("export",), ("export", "a", "b", "--dtype", "int3")])
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2


def test_export_on_a_terminal_takes_nothing_there_for_a_warning(
    checkpoint: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress bar is drawn there, and another thread writes on and on."""
    ours, theirs = os.openpty()
    seen, done = bytearray(), threading.Event()

    def write() -> None:
        while not done.is_set():
            os.write(2, b"busy ")
            time.sleep(0.001)

    def read() -> None:
        while not seen.endswith(b"THE END"):
            seen.extend(os.read(ours, 2**16))

    saved = os.dup(2)
    with (
        ThreadPoolExecutor() as pool,
        contextlib.closing(os.fdopen(theirs, "w", encoding="utf-8")) as terminal,
    ):
        monkeypatch.setattr(sys, "stderr", terminal)
        os.dup2(theirs, 2)
        try:
            threads = [pool.submit(write), pool.submit(read)]
            code, _, _ = run("export", checkpoint, tmp_path / "o.onnx", "--no-verify")
        finally:
            done.set()
            threads[0].result()
            os.write(2, b"THE END")
            threads[1].result()
            os.dup2(saved, 2)
            os.close(saved)
            os.close(ours)
    assert code == 0, seen
    assert b"tracing the graph" in seen
    assert b"busy" in seen


def test_export_that_differs_from_pytorch_exits_1_and_publishes_nothing(
    checkpoint: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is traced from a model whose layer 1 is no longer the one that PyTorch ran."""

    def trace_another(student: EchoAttForCausalLM, specification: Specification) -> ir.Model:
        weight = student.get_parameter("decoder.model.layers.1.self_attn.v_proj.weight")
        weight.data.mul_(1.01)
        return trace_student(student, specification)

    monkeypatch.setattr("echoatt_exporter.export.trace_student", trace_another)
    code, out, err = run("export", checkpoint, tmp_path / "o.onnx")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "bundle and PyTorch disagree" in err
    assert says(err, "layer 1")
    assert list(tmp_path.iterdir()) == []


def test_optimum_offers_the_export(checkpoint: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "echoatt"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--share PAIRS" in shown.stdout
    refused = subprocess.run(
        [*command, checkpoint, tmp_path / "o.onnx", "--share", "1:2"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "not earlier" in refused.stderr
    assert "Traceback" not in refused.stderr
