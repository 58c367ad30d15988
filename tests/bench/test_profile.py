"""Profiles: sums of a trace made by hand, and a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from echoatt_bench.profile import operator_kind, runs_of, summarise
from echoatt_exporter.bench.engines import EngineSpec
from echoatt_exporter.bench.profiles import profile_bundles, profiles_markdown
from echoatt_exporter.errors import BenchError


def _run(begin: int, duration: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": begin, "dur": duration}


def _kernel(begin: int, duration: int, op: str, **arguments: Any) -> dict[str, Any]:
    name, details = f"node_{begin}_kernel_time", {"op_name": op, **arguments}
    return {"cat": "Node", "name": name, "ts": begin, "dur": duration, "args": details}


# Three runs of 100, 130 and 160 µs; an event of loading before them belongs to none
TRACE = [
    {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 90},
    _kernel(10, 70, "Transpose"),
    *(_run(100, 100), _kernel(110, 20, "Add"), _kernel(140, 30, "Softmax"), _kernel(180, 5, "Add")),
    *(_run(300, 130), _kernel(310, 40, "Add"), _kernel(360, 10, "Softmax"), _kernel(380, 1, "Add")),
    *(_run(500, 160), _kernel(510, 9, "Add"), _kernel(530, 60, "Softmax"), _kernel(600, 9, "Add")),
]


def test_runs_have_their_own_kernels() -> None:
    runs = list(runs_of(list(reversed(TRACE))))
    assert [whole for whole, _ in runs] == [100, 130, 160]
    assert [sum(event["dur"] for event in kernels) for _, kernels in runs] == [55, 51, 78]


def test_medians_over_runs_of_the_sums_by_operator() -> None:
    assert summarise(list(runs_of(TRACE)), {64}) == {
        "microseconds": 130,
        "outside": 79,  # of 45, 79 and 82
        "operators": [
            {"operator": "Softmax", "count": 1, "microseconds": 30},  # of 30, 10 and 60
            {"operator": "Add", "count": 2, "microseconds": 25},  # of 25, 41 and 18
        ],
    }


def test_operators_of_one_run_add_up_to_the_trace() -> None:
    (run, *_) = runs_of(TRACE)
    summary = summarise([run], {64})
    parts = sum(entry["microseconds"] for entry in summary["operators"])
    assert parts == sum(event["dur"] for event in run[1])
    assert parts + summary["outside"] == summary["microseconds"]


@pytest.mark.parametrize(
    ("op", "parameters", "shapes", "kind"),
    [
        ("MatMul", 4096, [[1, 1, 64]], "MatMul (weights)"),
        ("MatMul", 0, [[1, 4, 8, 512], [1, 4, 512, 64]], "MatMul (P·V)"),
        ("MatMul", 0, [[1, 4, 8, 64], [1, 4, 64, 512]], "MatMul (Q·K)"),
        ("FusedMatMul", 0, [[1, 4, 8, 64], [1, 4, 512, 64]], "FusedMatMul (Q·K)"),
        ("FusedMatMul", 0, [[1, 4, 512, 64], [1, 4, 8, 64]], "FusedMatMul (Q·K)"),
        ("FusedMatMul", 0, [[1, 4, 64, 272], [1, 4, 8, 272]], "FusedMatMul (P·V)"),
        ("FusedMatMul", 0, [[1, 4, 64, 144], [1, 4, 8, 144]], "FusedMatMul (P·V)"),
        ("MatMulNBits", 4096, [[1, 1, 64], [64, 2]], "MatMulNBits"),
        ("Softmax", 0, [[1, 4, 8, 512]], "Softmax"),
    ],
)
def test_products_are_told_apart(
    op: str, parameters: int, shapes: list[list[int]], kind: str
) -> None:
    arguments = {
        "op_name": op,
        "parameter_size": str(parameters),
        "input_type_shape": [{"float": shape} for shape in shapes],
    }
    assert operator_kind(arguments, {64}) == kind


def test_profile_of_a_bundle(
    bundles: list[EngineSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    unshared, shared = bundles
    profiles = profile_bundles([unshared, shared], contexts=[300], batches=[1], threads=1, steps=3)
    assert [(profile.engine, profile.phase, profile.tokens) for profile in profiles] == [
        (unshared.name, "decode", 1),
        (unshared.name, "prefill", 256),
        (shared.name, "decode", 1),
        (shared.name, "prefill", 256),
    ]
    counts = [
        {entry["operator"]: entry["count"] for entry in profile.operators} for profile in profiles
    ]
    for step, sources in zip(counts, (4, 4, 2, 2), strict=True):
        assert step["Softmax"] == sources
        assert sum(count for name, count in step.items() if "P·V" in name) == 4
        assert sum(count for name, count in step.items() if "Q·K" in name) == sources
        assert "If" not in step
    # A single token's contexts are computed from the left, a chunk's are not
    assert [step.get("FusedMatMul (P·V)", 0) for step in counts] == [4, 0, 4, 0]
    assert counts[0]["TensorScatter"] == counts[1]["TensorScatter"] == 2 * 4
    for profile in profiles:
        parts = sum(entry["microseconds"] for entry in profile.operators)
        assert 0 < parts < 2 * profile.microseconds
    assert list(tmp_path.glob("echoatt*")) == []

    text = profiles_markdown(profiles, "echoatt bench --profile")
    assert text.count("### ") == 4
    assert f"### {shared.name}: a chunk of 256 of prefill, batch 1, context 300: " in text
    assert "| outside kernels |" in text


def test_context_beyond_the_bundle_is_refused(bundles: list[EngineSpec]) -> None:
    with pytest.raises(BenchError, match="holds 32768 tokens"):
        profile_bundles(bundles, contexts=[32_768], batches=[1], threads=1)
