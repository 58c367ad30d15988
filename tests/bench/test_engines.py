"""Every engine in its real worker process, on one tiny model: the same tokens, and sane answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from echoatt_bench.engine import Load
from echoatt_exporter.bench.engines import PEERS, EngineSpec, why_absent
from echoatt_exporter.bench.peers import peer_engine
from echoatt_exporter.bench.process import EngineError, WorkerProcess

CONTEXT, STEPS, CAPACITY = 20, 4, 40
# With these tokens every greedy choice wins by 0.3 or more, which llama.cpp's float16 cache leaves
SEED = 7


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> list[list[int]]:
    """What transformers chooses after the tokens of two rows, in this process and in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = torch.from_numpy(_load(checkpoint, batch=2).draw_tokens()[:, :CONTEXT])
    chosen = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1 + 2 * STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[list[int]] = chosen[:, CONTEXT:].tolist()
    return tokens


@pytest.fixture(scope="module", params=["echoatt", *PEERS])
def engine(
    request: pytest.FixtureRequest,
    bundles: list[EngineSpec],
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> EngineSpec:
    if request.param == "echoatt":
        return bundles[0]
    if reason := why_absent(request.param):
        pytest.skip(reason)
    return peer_engine(request.param, checkpoint, tmp_path_factory.mktemp("peer"), "fp32")


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess("the engine", threads=2) as worker:
        yield worker


def _load(path: Path, batch: int) -> Load:
    return Load(str(path), 1, batch, CAPACITY, vocab_size=320, seed=SEED)


def _ask_to_load(worker: WorkerProcess, engine: EngineSpec, batch: int, threads: int = 1) -> Any:
    return worker.request(
        "load",
        kind=engine.kind,
        path=str(engine.path),
        threads=threads,
        batch=batch,
        capacity=CAPACITY,
        vocab_size=320,
        seed=SEED,
    )


def test_rows_grow_with_the_room_and_begin_alike(checkpoint: Path) -> None:
    rows = _load(checkpoint, batch=2).draw_tokens()
    long = Load(str(checkpoint), 1, 3, 2 * CAPACITY, vocab_size=320, seed=SEED).draw_tokens()
    assert rows.shape == (2, CAPACITY)
    assert np.array_equal(rows, long[:2, :CAPACITY])
    assert not np.array_equal(rows[0], rows[1])


def test_engine_chooses_what_transformers_does(
    engine: EngineSpec, worker: WorkerProcess, greedy: list[list[int]]
) -> None:
    assert len(set(greedy[0])) > 3  # or the test could not tell a wrong state from the right one
    loaded = _ask_to_load(worker, engine, batch=1)
    assert loaded["seconds"] > 0
    assert loaded["facts"]["version"]
    # A shorter prompt before, as in a warm-up, leaves nothing behind
    worker.request("prefill", context=5)
    answer = worker.request("prefill", context=CONTEXT)
    assert answer["seconds"] > 0
    assert answer["first_tokens"] == [greedy[0][0]]
    for _ in range(2):  # the second time the engine has gone back
        answer = worker.request("decode", start=CONTEXT, new_tokens=STEPS)
        assert answer["tokens"] == greedy[0][1 : 1 + STEPS]
        assert len(answer["step_seconds"]) == STEPS
        assert all(seconds > 0 for seconds in answer["step_seconds"])

    _ask_to_load(worker, engine, batch=2)
    answer = worker.request("prefill", context=CONTEXT)
    assert answer["first_tokens"] == [row[0] for row in greedy]
    for start in (0, STEPS):  # several rows go on
        answer = worker.request("decode", start=CONTEXT + start, new_tokens=STEPS)
        assert answer["tokens"] == greedy[0][1 + start : 1 + start + STEPS]

    held = worker.request("memory")
    assert held["peak_bytes"] > held["anonymous_bytes"] > 2**20


def test_decode_alone_makes_its_own_caches(
    engine: EngineSpec, worker: WorkerProcess, greedy: list[list[int]]
) -> None:
    if engine.kind == "torch":
        pytest.skip("takes seconds to start, and the peers' way is the same")
    _ask_to_load(worker, engine, batch=1)
    answer = worker.request("decode", start=CONTEXT, new_tokens=STEPS)
    assert len(answer["step_seconds"]) == STEPS
    # ours are random numbers, which is why it need not run a prefill; a peer's are the prompt's
    assert (answer["tokens"] == greedy[0][1 : 1 + STEPS]) == (engine.kind != "echoatt")


def test_bundle_tells_its_own_time_and_holds_nobody_else(
    bundles: list[EngineSpec], worker: WorkerProcess
) -> None:
    _ask_to_load(worker, bundles[1], batch=1, threads=2)
    answer = worker.request("decode", start=CONTEXT, new_tokens=STEPS)
    assert 0 < answer["extra"]["python"] < max(answer["step_seconds"])
    assert answer["extra"]["text"] > 0
    mapped = Path(f"/proc/{worker.pid}/maps").read_text(encoding="utf-8")
    assert "onnxruntime" in mapped
    assert "torch" not in mapped


def test_waiting_engine_takes_no_processor_time(
    bundles: list[EngineSpec], worker: WorkerProcess
) -> None:
    _ask_to_load(worker, bundles[0], batch=1, threads=2)
    before = worker.processor_seconds()
    worker.request("decode", start=CONTEXT, new_tokens=STEPS)
    assert worker.processor_seconds() > before
    time.sleep(0.1)
    before = worker.processor_seconds()
    time.sleep(0.5)
    assert worker.processor_seconds() - before < 0.05


def test_processor_time_counts_threads_that_end_meanwhile(worker: WorkerProcess) -> None:
    """Each reading of the memory starts and ends threads of its own."""
    worker.request("memory_speed", threads=1, size=2**20)  # has imported what it needs
    size, readings = 2**27, [worker.processor_seconds()]
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(worker.request, "memory_speed", threads=4, size=size)
        while not reading.done():
            readings.append(worker.processor_seconds())
        reading.result()
    readings.append(worker.processor_seconds())
    assert readings == sorted(readings)
    first_thread = Path(f"/proc/{worker.pid}/schedstat").read_text(encoding="ascii").split()[0]
    # Three readings by threads that are gone, of which none reads 100 GB a second
    assert readings[-1] - int(first_thread) / 1e9 > 3 * size / 1e11


def test_processor_time_of_a_process_that_is_gone_is_an_error() -> None:
    with WorkerProcess("the engine", threads=1) as worker:
        pass
    with pytest.raises(EngineError, match="the engine: no processor time to read"):
        worker.processor_seconds()


def test_memory_speed_is_bytes_a_second(worker: WorkerProcess) -> None:
    speed = worker.request("memory_speed", threads=2, size=2**24)
    assert 1e8 < speed < 1e13


def test_refusals_are_one_line_and_the_worker_goes_on(worker: WorkerProcess) -> None:
    with pytest.raises(EngineError, match="the engine: nonsense failed: there is no request"):
        worker.request("nonsense")
    with pytest.raises(EngineError, match="decode failed: nothing is loaded"):
        worker.request("decode", start=1, new_tokens=1)
    absent = EngineSpec("x", "echoatt", Path("absent.onnx"), "fp32", 0.0, None, None, 64, 320)
    with pytest.raises(EngineError, match=r"there is no bundle at absent\.onnx") as error:
        _ask_to_load(worker, absent, batch=1)
    assert "\n" not in str(error.value)
    assert worker.request("memory")["peak_bytes"] > 0


def test_end_of_a_process_is_told() -> None:
    with WorkerProcess("the engine", threads=1) as worker:
        worker._process.kill()
        with pytest.raises(EngineError, match="killed, most likely for want of memory"):
            worker.request("memory")
