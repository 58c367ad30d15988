"""`echoatt bench`: what it makes, prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.bench.conftest import TINY
from tests.wording import says

from echoatt_cli import main
from echoatt_exporter.bench import engines, shapes
from echoatt_exporter.bench.engines import EngineSpec
from echoatt_exporter.bench.gguf_file import _interleaved
from echoatt_exporter.bench.shapes import SHAPES
from echoatt_exporter.errors import BenchError

Run = Callable[..., tuple[int, str, str]]

QUICK = ("--contexts", "8", "--rounds", "1", "--prefill-rounds", "1", "--new-tokens", "2")
QUICK += ("--threads", "1")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: exit code, standard output and standard error of `echoatt bench`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bench", *(str(argument) for argument in arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def no_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without llama.cpp's packages, and without genai's."""
    for peer in ("llama.cpp", "genai"):
        packages, install = engines.PEERS[peer]
        absent = (tuple(f"absent_{name}" for name in packages), install)
        monkeypatch.setitem(engines.PEERS, peer, absent)


def test_shape_is_measured_and_not_made_again(
    run: Run, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    made = {path: path.stat().st_mtime_ns for path in work.glob("tiny/[!c]*/*")}
    assert [path.name for path in made if path.suffix == ".onnx"] == ["model.onnx"]
    arguments = ("--shape", "tiny", "--plans", "unshared", "--dtype", "fp32", *QUICK)
    arguments += ("--work", work, "--phases", "decode")
    code, out, err = run(*arguments, "--out", tmp_path)
    assert (code, err) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert "| 1 | 8 | EchoAtt fp32 0% | " in out
    assert says(out, "max_position_embeddings raised to 32,768")
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == out
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert data["format"] == "echoatt-bench/1"
    (measured,) = data["points"][0]["measured"]
    assert measured["engine"] == "EchoAtt fp32 0%"


def test_absent_peers_are_named_with_the_way_to_get_them(
    run: Run, bundles: list[EngineSpec], checkpoint: Path, tmp_path: Path, no_llama: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # transformers takes seconds to start, and is not what this is about
    monkeypatch.delitem(engines.PEERS, "torch")
    arguments = (bundles[0].path, "--checkpoint", checkpoint, "--work", tmp_path, *QUICK)
    code, out, err = run(*arguments, "--against", "all", "--phases", "decode", "--json")
    assert (code, err) == (0, "")
    absent = json.loads(out)["absent"]
    assert absent["genai"].startswith("genai cannot run: absent_onnxruntime_genai and")
    assert absent["llama.cpp"].endswith("not installed; pip install llama-cpp-python gguf")


def test_profile_is_printed(run: Run, bundles: list[EngineSpec]) -> None:
    code, out, err = run(bundles[1].path, "--profile", "--json", *QUICK)
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert [profile["phase"] for profile in data["profiles"]] == ["decode", "prefill"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give bundles to measure"),
        (("{bundle}", "--shape", "llama-7b"), "not both"),
        (("{tmp}/absent.onnx",), "absent.onnx"),
        (("--shape", "llama-1b"), "choose one of tinyllama-1.1b"),
        (("--shape", "llama-7b", "--plans", "99"), "none of one block"),
        (("--shape", "llama-7b", "--plans", "some"), "'unshared' or a ratio"),
        (("--shape", "llama-7b", "--share", "1:2"), "not earlier"),
        (("--shape", "llama-7b", "--against", "llama.cpp"), "pip install llama-cpp-python"),
        (("{bundle}", "--against", "torch"), "--checkpoint DIR"),
        (("{bundle}", "--against", "genai", "--checkpoint", "{model}"), "pip install onnxruntime"),
        (("{bundle}", "--against", "torch", "--checkpoint", "{tmp}"), "no weights"),
        (("{bundle}", "--contexts", "99999"), "give shorter --contexts"),
        (("{bundle}", "--out", "{taken}"), "pass --force"),
        (("{bundle}", "--profile", "--contexts", "99999"), "give shorter --contexts"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    run: Run,
    bundles: list[EngineSpec],
    checkpoint: Path,
    tmp_path: Path,
    no_llama: None,
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "results.md").write_text("kept")
    places = {"bundle": bundles[0].path, "model": checkpoint, "tmp": tmp_path, "taken": taken}
    work = tmp_path / "work"
    filled = (argument.format_map(places) for argument in arguments)
    code, out, err = run(*filled, "--work", work)
    assert (code, out) == (2, "")
    assert err.startswith("echoatt: ")
    assert err.count("\n") == 1
    assert message in err
    assert not work.exists()
    assert (taken / "results.md").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments",
    [("--contexts", "1,x"), ("--contexts", "0"), ("--against", "vllm"), ("--phases", "load")],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "x.onnx", *arguments])
    assert end.value.code == 2


def test_plans_of_the_paper_and_of_other_ratios() -> None:
    tiny_llama = SHAPES["tinyllama-1.1b"]
    for percent, followers in (
        (23, [2, 3, 4, 5, 7]),
        (41, [2, 3, 4, 5, 6, 7, 8, 9, 18]),
        (77, [*range(1, 15), 16, 17, 18]),
    ):
        plan = tiny_llama.plan(percent)
        plan.validate()
        assert list(plan.followers) == followers
        assert round(100 * plan.ratio) == percent
    assert SHAPES["llama-7b"].plan(25).followers == tuple(range(2, 10))
    with pytest.raises(BenchError, match="none of one block"):
        tiny_llama.plan(100)


def test_rows_for_llama_cpp_are_neighbours_where_transformers_has_halves() -> None:
    import numpy as np

    weight_OI = np.arange(12, dtype=np.float32)[:, None] @ np.ones((1, 3), np.float32)
    rows = _interleaved(weight_OI, heads=2)[:, 0].tolist()
    assert rows == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
