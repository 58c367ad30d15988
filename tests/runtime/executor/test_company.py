"""Whether a row's logits depend on the rows beside it: what the README says, bit for bit."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper
from tests.runtime.conftest import tiny_specification

from echoatt_runtime.cache import KVCache
from echoatt_runtime.executor import Executor, Integers, Logits, open_executor, run_texts

BLOCK = 32
COMPANY = (1, 2, 3, 5, 8)
CPU_FLAGS = Path("/proc/cpuinfo")

# Other processors have other kernels, which nobody has looked at
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="what is claimed was seen on x86-64 only"
)


def quantise(bits: int) -> Callable[[onnx.ModelProto], None]:
    """Products with weights as `MatMulNBits`, as exported bundles have them."""

    def edit(model: onnx.ModelProto) -> None:
        graph = model.graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type != "MatMul" or node.input[1] not in weights:
                continue
            tensor = weights.pop(node.input[1])
            graph.initializer.remove(tensor)
            weight_KN = numpy_helper.to_array(tensor)
            K, N = weight_KN.shape
            blocks = weight_KN.T.reshape(N, K // BLOCK, BLOCK)
            scales = np.abs(blocks).max(-1) / (2 ** (bits - 1) - 1)
            codes = np.rint(blocks / scales[..., None] + 2 ** (bits - 1)).astype(np.uint8)
            if bits == 4:
                codes = codes[..., ::2] | codes[..., 1::2] << 4
            for suffix, array in (("codes", codes), ("scales", scales)):
                graph.initializer.append(numpy_helper.from_array(array, f"{tensor.name}.{suffix}"))
            node.op_type, node.domain = "MatMulNBits", "com.microsoft"
            node.input[1:] = [f"{tensor.name}.codes", f"{tensor.name}.scales"]
            fields = {"K": K, "N": N, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
            node.attribute.extend(helper.make_attribute(*field) for field in fields.items())
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    return edit


@pytest.fixture(params=["fp32", "int8", "int4"])
def in_company(
    request: pytest.FixtureRequest, make_bundle: Callable[..., Path]
) -> tuple[str, dict[int, npt.NDArray[np.float32]]]:
    """The element type, and the same row's logits of one step with each number of rows."""
    edit = None if request.param == "fp32" else quantise(int(request.param[3:]))
    specification = tiny_specification(head_dim=32, dtype=request.param)
    executor = open_executor(make_bundle(specification, edit), threads=1)
    prompt = np.random.default_rng(0).integers(0, 256, (max(COMPANY), 20))
    found = {}
    for rows in COMPANY:
        cache = executor.new_cache(rows, 32)
        past = np.zeros(rows, np.int64)
        executor.run(cache, prompt[:rows], past, np.full((rows, 1), 19))
        step = executor.run(cache, prompt[:rows, :1], past + 20, np.zeros((rows, 1), np.int64))
        found[rows] = step[0, 0]
    return request.param, found


def test_rows_do_not_see_each_other(
    in_company: tuple[str, dict[int, npt.NDArray[np.float32]]],
) -> None:
    dtype, found = in_company
    for rows in COMPANY[1:]:
        assert np.array_equal(found[rows], found[2])
    if dtype != "int4":
        assert np.array_equal(found[1], found[2])
        return
    # The processors that have other kernels for a single row differ in rounding alone
    np.testing.assert_allclose(found[1], found[2], atol=0.05 * found[2].std())
    if CPU_FLAGS.exists() and " avx512bw" in CPU_FLAGS.read_text(encoding="utf-8"):
        assert np.array_equal(found[1], found[2])


@pytest.mark.parametrize(
    ("length", "chunk_size", "limit", "expected"),
    [
        (17, 16, 64, [16, 2]),
        (17, 16, 17, [16, 1]),
        (1, 16, 64, [2]),
        (18, 16, 64, [16, 2]),
        (3, 1, 64, [1, 1, 1]),
    ],
)
def test_a_text_does_not_end_with_a_chunk_of_one_token(
    executor: Executor,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    chunk_size: int,
    limit: int,
    expected: list[int],
) -> None:
    """Graphs attend in another way for one token, which rounds otherwise than beside more."""
    columns, run = [], executor.run

    def recorded(cache: KVCache, token_ids: Integers, *rest: Any) -> Logits:
        columns.append(token_ids.shape[1])
        return run(cache, token_ids, *rest)

    monkeypatch.setattr(executor, "run", recorded)
    text = np.random.default_rng(0).integers(0, 256, length).tolist()
    cache = executor.new_cache(1, 1, limit)
    found = [chunk[0] for chunk in run_texts(executor, cache, [text], [0], chunk_size)]
    assert columns == expected
    assert [position for one in found for position in one.positions] == [*range(length)]
    alone = executor.new_cache(1, length)
    everything = np.arange(length)[None]
    whole = run(alone, np.array([text]), np.zeros(1, np.int64), everything)[0]
    np.testing.assert_allclose(np.concatenate([one.logits for one in found]), whole, atol=1e-5)
