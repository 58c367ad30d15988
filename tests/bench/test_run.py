"""Whole runs with real workers: who takes a turn when, what is kept of it, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.wording import says

from echoatt_exporter.bench.engines import EngineSpec, bundle_engines
from echoatt_exporter.bench.process import EngineError
from echoatt_exporter.bench.publish import write_results
from echoatt_exporter.bench.results import BenchOptions, BenchResults
from echoatt_exporter.bench.run import bench
from echoatt_exporter.bench.table import to_markdown
from echoatt_exporter.errors import BenchError

OPTIONS = BenchOptions(
    contexts=(20, 8),
    batches=(1, 2),
    threads=1,
    new_tokens=3,
    rounds=2,
    prefill_rounds=2,
    memory_bytes=2**20,
)


@pytest.fixture(scope="module")
def broken_peer(bundles: list[EngineSpec]) -> EngineSpec:
    """A peer whose model is not there."""
    return EngineSpec("broken", "genai", Path("absent"), "fp32", 0.0, 1, 1, 32_768, 320)


@pytest.fixture(scope="module")
def results(bundles: list[EngineSpec]) -> BenchResults:
    return bench(bundles, OPTIONS, command="echoatt bench", absent={"genai": "is not here"})


def test_engines_take_turns_in_the_stated_order(
    results: BenchResults, bundles: list[EngineSpec]
) -> None:
    a, b = (engine.name for engine in bundles)
    point = [f"load {a}", f"load {b}"]
    for phase in ("prefill", "decode"):
        point += [f"{phase} {a} warm-up", f"{phase} {b} warm-up"]
        for turn in range(2):
            point += [f"{phase} {a} {turn}", f"{phase} {b} {turn}"]
            point.append(f"memory speed after {phase} {turn}")
    assert list(results.turns) == [
        f"batch {batch} context {context} {turn}"
        for batch in (1, 2)
        for context in (8, 20)
        for turn in point
    ]


def test_every_engine_has_every_sample_at_every_point(
    results: BenchResults, bundles: list[EngineSpec]
) -> None:
    assert [(point.batch, point.context) for point in results.points] == [
        (1, 8),
        (1, 20),
        (2, 8),
        (2, 20),
    ]
    for point in results.points:
        assert len(point.memory_speed) == 4
        assert [measured.engine for measured in point.measured] == [e.name for e in bundles]
        for measured, engine in zip(point.measured, bundles, strict=True):
            assert measured.failure is None
            assert measured.load_seconds is not None
            assert len(measured.prefill_seconds) == len(measured.decode_seconds) == 2
            assert len(measured.decode_mean_seconds) == len(measured.extra_seconds["python"]) == 2
            assert measured.cache_bytes_per_token == engine.cache_bytes_per_token
            assert measured.peak_bytes is not None
            assert measured.anonymous_bytes is not None
            assert measured.peak_bytes > measured.anonymous_bytes > 0
    # A follower keeps no keys: half of the layers are without half of their caches
    unshared, shared = (engine.cache_bytes_per_token for engine in bundles)
    assert unshared == 4 * 2 * 2 * 16 * 4
    assert shared == unshared * 3 // 4
    assert results.waiting_share < 0.5


def test_files_hold_every_point(
    results: BenchResults, bundles: list[EngineSpec], tmp_path: Path
) -> None:
    write_results(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "results.json",
        "results.md",
        "results.png",
    ]
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text == to_markdown(results)
    for batch in (1, 2):
        for context in (8, 20):
            for engine in bundles:
                # decode, prefill, loading and memory
                assert text.count(f"\n| {batch} | {context} | {engine.name} | ") >= 3
            pair = f"\n| {batch} | {context} | {bundles[1].name} | {bundles[0].name} | "
            assert text.count(pair) == 2
    assert "not measured: genai: is not here" in text
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    measured = data["points"][3]["measured"][1]
    assert measured["decode"]["samples"] == 2
    assert measured["decode"]["low"] <= measured["decode"]["median"] <= measured["decode"]["high"]
    assert measured["floor_seconds"] > 0
    assert {ratio["phase"] for ratio in data["ratios"]} == {"prefill", "decode"}
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_failing_peer_is_named_and_the_others_go_on(
    bundles: list[EngineSpec], broken_peer: EngineSpec
) -> None:
    options = BenchOptions(
        contexts=(8,), threads=1, phases=("decode",), new_tokens=2, rounds=1, memory_bytes=2**20
    )
    results = bench([broken_peer, bundles[0]], options, command="echoatt bench")
    broken, whole = results.points[0].measured
    assert broken.failure is not None
    assert broken.failure.startswith("broken: load failed: ")
    assert broken.decode_seconds == ()
    assert len(whole.decode_seconds) == 1
    text = to_markdown(results)
    assert "| 1 | 8 | broken | failed |" in text
    assert says(text, f"batch 1, context 8: {broken.failure}")
    assert list(results.ratios()) == []


def test_failing_bundle_ends_the_run(bundles: list[EngineSpec], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(bundles[0].path.read_bytes())
    (lost,) = bundle_engines([tmp_path])
    options = BenchOptions(contexts=(8,), threads=1)
    with pytest.raises(EngineError, match=r"load failed: .* has lost its file"):
        bench([lost], options, command="echoatt bench")


def test_points_that_do_not_fit_are_refused_before_anything_runs(
    bundles: list[EngineSpec],
) -> None:
    with pytest.raises(
        BenchError, match=r"holds 32768 tokens and the longest point needs 32\d\d\d;"
    ):
        bench(bundles, BenchOptions(contexts=(32_768,), threads=1), command="echoatt bench")
