"""The arithmetic between samples and tables, on samples made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest

from echoatt_exporter.bench.engines import EngineSpec
from echoatt_exporter.bench.machine import this_machine
from echoatt_exporter.bench.results import BenchOptions, BenchResults, Measured, Point
from echoatt_exporter.bench.statistics import Spread, paired_ratio
from echoatt_exporter.bench.table import to_markdown
from echoatt_exporter.bench.weight_bytes import onnx_weight_bytes


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5, 1, 4, 2, 3]) == Spread(median=3, low=2, high=4, samples=5)
    assert Spread.of([1, 2]) == Spread(median=1.5, low=1.25, high=1.75, samples=2)
    assert Spread.of([7]) == Spread(7, 7, 7, 1)


def test_ratio_is_of_samples_of_one_round_and_not_of_medians() -> None:
    """The machine slowed threefold in the second round and sixfold in the third."""
    ours, theirs = [1.0, 3.0, 6.0], [2.0, 6.0, 9.0]
    assert paired_ratio(theirs, ours) == Spread(median=2, low=1.75, high=2, samples=3)
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio(theirs, ours[:2])


def _engine(name: str, kind: str, dtype: str, sharing: float) -> EngineSpec:
    return EngineSpec(name, kind, Path(name), dtype, sharing, None, None, 64, 320)


@pytest.fixture
def results() -> BenchResults:
    """A shared and an unshared int4 bundle, an fp32 one, and two peers; decode, batch 2."""
    engines = (
        _engine("shared", "echoatt", "int4", 0.5),
        _engine("unshared", "echoatt", "int4", 0.0),
        _engine("float", "echoatt", "fp32", 0.0),
        _engine("genai", "genai", "int4", 0.0),
        _engine("torch", "torch", "fp32", 0.0),
    )
    seconds = {
        "shared": (0.010, 0.020, 0.030),
        "unshared": (0.015, 0.030, 0.045),
        "float": (0.040, 0.080, 0.120),
        "genai": (0.020, 0.030, 0.090),
        "torch": (0.1, 0.2),  # it failed in the third round
    }
    measured = tuple(
        Measured(
            engine=name,
            decode_seconds=samples,
            weight_bytes=10**9,
            cache_bytes_per_token=10**6,
            peak_bytes=2_000_000_000,
            extra_seconds={"python": (0.0001, 0.0003, 0.0002)} if name == "shared" else {},
        )
        for name, samples in seconds.items()
    )
    point = Point(batch=2, context=1000, memory_speed=(1e11, 3e11, 2e11), measured=measured)
    return BenchResults(
        command="echoatt bench x.onnx",
        started="2000-01-01T00:00:00+00:00",
        machine=this_machine(),
        options=BenchOptions(contexts=(1000,), batches=(2,), threads=2, phases=("decode",)),
        engines=engines,
        versions={},
        points=(point,),
        turns=(),
        waiting_share=0.0,
        absent={"llama.cpp": "llama_cpp not installed; pip install llama-cpp-python gguf"},
        notes=("Something to know.",),
    )


def test_floor_is_weights_and_caches_of_all_rows_once(results: BenchResults) -> None:
    point = results.points[0]
    # (1e9 + 2 rows x 1000 tokens x 1e6) bytes at the median of 2e11 a second
    assert point.floor_seconds(point.measured[0]) == pytest.approx(3e9 / 2e11)
    assert point.floor_seconds(Measured(engine="x", weight_bytes=1)) is None


def test_ratios_are_of_bundles_against_peers_and_unshared_bundles_of_one_dtype(
    results: BenchResults,
) -> None:
    found = {(ratio.engine, ratio.against): ratio.ratio.median for ratio in results.ratios()}
    assert found == {
        ("shared", "unshared"): pytest.approx(1.5),
        ("shared", "genai"): pytest.approx(2.0),
        ("unshared", "genai"): pytest.approx(4 / 3),
    }


def test_table_shows_the_numbers(results: BenchResults) -> None:
    lines = to_markdown(results).splitlines()
    # 20 ms, quartiles 15 and 25, two rows a step, floor 15 ms
    assert (
        "| 2 | 1000 | shared | 20.00 | 15.00 to 25.00 | 100.0 | 15.00 | 1.33 | 0.200 | - |" in lines
    )
    assert "| 2 | 1000 | shared | genai | 2.00 | 1.75 to 2.50 |" in lines
    assert "| 2 | 1000 | shared | - | 2,000 | - | 1,000,000 |" in lines
    assert "- not measured: llama.cpp: llama_cpp not installed; pip install" in "\n".join(lines)
    assert "- Something to know." in lines
    assert "`echoatt bench x.onnx`" in lines


def test_weight_bytes_are_of_what_products_read(tmp_path: Path) -> None:
    """Not the table that is looked up, not the norm; a transposed view counts, and once."""
    helper = onnx.helper
    weights = {
        "table": np.zeros((7, 4), np.float32),
        "norm": np.zeros(4, np.float32),
        "packed": np.zeros((5, 1, 16), np.uint8),
        "scales": np.zeros(5, np.float32),
        "head": np.zeros((7, 4), np.float16),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Mul", ["rows", "norm"], ["normed"]),
        helper.make_node("MatMulNBits", ["normed", "packed", "scales"], ["a"], domain="x"),
        helper.make_node("Transpose", ["head"], ["headT"]),
        helper.make_node("MatMul", ["a", "headT"], ["b"]),
        helper.make_node("MatMul", ["b", "headT"], ["c"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert onnx_weight_bytes(tmp_path / "m.onnx") == 5 * 16 + 5 * 4 + 7 * 4 * 2
