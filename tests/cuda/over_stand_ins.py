"""Tests for a process in which ONNX Runtime's CUDA provider runs over stand-ins; see `test_cuda`.

Copies are made, memory is the host's, and both are logged; kernels do nothing, so no result means
anything.
"""

import ctypes
import gc
from contextlib import contextmanager

import numpy as np
import pytest
from tests.cuda.watching import watch

from echoatt_exporter import SharingPlan, check_parity, export_bundle
from echoatt_exporter.parity.instrumented import choose_device, context_name, open_bundle
from echoatt_runtime import DeviceError, EchoModel, OutOfMemoryError, SamplingParams
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import INPUT_IDS, LOGITS_INDICES, PAST_LENGTHS
from echoatt_runtime.executor import (
    PREFILL_CHUNK,
    cuda_memory,
    decoding,
    device_weights,
    executor_of,
    open_executor,
)
from echoatt_runtime.executor.cuda_memory import CudaMemory
from echoatt_runtime.generation import Batch, TokenSequence
from echoatt_runtime.ort import (
    PROVIDERS,
    Binding,
    OrtSession,
    SessionOptions,
    cuda_library,
    has_cuda,
    import_onnxruntime,
    open_session,
)

CONTEXT = 8300
LOGITS_BYTES = 61 * 4
STEP_INPUTS = (INPUT_IDS, PAST_LENGTHS, LOGITS_INDICES)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    fields = {"num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    tiny_model("llama", **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    out, plan = tmp_path_factory.mktemp("bundle"), SharingPlan((0, 0))
    options = {"dtype": "fp16", "device": "cuda", "verify": False}
    return Bundle.open(export_bundle(checkpoint, out / "model.onnx", plan, **options).model)


@pytest.fixture(scope="module")
def executor(bundle):
    return open_executor(bundle, "cuda")


@pytest.fixture
def read_inputs(monkeypatch):
    """What every run finds where its inputs are bound; on the device, all of it."""
    places, found = {}, []
    bind, run = Binding.bind_input, OrtSession.run

    def bind_input(self, name, device, elements, shape, address):
        places[self, name] = device, tuple(shape), address
        bind(self, name, device, elements, shape, address)

    def read(binding, name):
        device, shape, address = places.get((binding, name), ("nowhere", (), 0))
        assert device == "cuda"
        assert address % 256 == 0
        length = int(np.prod(shape))
        return np.ctypeslib.as_array((ctypes.c_int64 * length).from_address(address)).reshape(shape)

    def run_and_read(self, binding, graph=None):
        found.append([read(binding, name).tolist() for name in STEP_INPUTS])
        run(self, binding, graph)

    monkeypatch.setattr(Binding, "bind_input", bind_input)
    monkeypatch.setattr(OrtSession, "run", run_and_read)
    return found


def test_a_batch_keeps_its_caches_on_the_device(executor, read_inputs):
    def sequence(length, new_tokens):
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        tokens = (np.arange(length) % 61).tolist()
        return TokenSequence(tokens, params, executor.specification, None)

    batch = Batch(executor, 2, prefill_chunk=128)
    short, long = sequence(20, 3), sequence(266, 10)
    with watch() as seen:
        batch.join([short, long])
        while batch.rows:
            batch.step()
    assert (short.length, long.length) == (23, 276)
    # The cache grew once, and the row that was left moved to no other slot, as it had the first
    assert batch.cache.capacity == 288
    past = [lengths for _, lengths, _ in read_inputs]
    assert past[:3] == [[0, 0], [128], [256]]
    assert past[3:] == [[266, 20], [267, 21], *([at] for at in range(268, 275))]
    # Logits of a prompt's end, then tokens and what tells that they mean something
    chosen = [256 + 2 * 4] * 2 + [256 + 4] * 7
    assert seen[0].to_host == [2 * LOGITS_BYTES, LOGITS_BYTES, LOGITS_BYTES, *chosen]
    chunk = 2 * 128 * 8
    assert max(seen[0].to_device) == chunk + 2 * 256


def test_two_sessions_read_the_same_weights(bundle):
    with watch() as seen:
        open_executor(bundle, "cuda")
    size = bundle.weights.stat().st_size
    # Constants of shapes are each session's own
    assert size <= sum(seen[0].to_device) < size + 4096


def test_a_session_full_of_recordings_makes_room(bundle, monkeypatch):
    monkeypatch.setattr(decoding, "_MOST_RECORDINGS", 2)
    executor = open_executor(bundle, "cuda")
    cache, first = executor.new_cache(3, 100), executor.decoding.session
    sessions, replays = [], []
    for rows in (1, 2, 3, 3, 1):
        ones = np.ones((rows, 1), np.int64)
        with watch() as seen:
            executor.choose(cache, ones, np.arange(rows), np.zeros_like(ones))
        sessions.append(executor.decoding.session is first)
        replays.append("capture" not in seen[0].kinds)
    assert sessions == [True, True, False, False, False]
    assert replays == [False, False, False, True, False]


def test_a_cache_moves_inside_the_device(executor):
    cache = executor.new_cache(2, 100)
    with watch() as seen:
        cache.reserve(400, [100, 7])
        cache.move(1, 0, 7)
        cache.clear(1)
        cache.shrink(20, [7])
    assert (seen[0].to_device, seen[0].to_host) == ([], [])
    # Both rows grow, one moves, one shrinks
    assert len(seen[0].on_device) == 4 * len(cache.specs)


def test_logits_of_a_text_in_chunks(bundle, executor, read_inputs):
    tokens = (np.arange(300) % 61).tolist()
    with watch() as seen:
        logits = EchoModel(bundle, executor, prefill_chunk=128).logits(tokens)
    assert logits.shape == (300, 61)
    assert [ids for ids, _, _ in read_inputs] == [[tokens[:128]], [tokens[128:256]], [tokens[256:]]]
    assert [past for _, past, _ in read_inputs] == [[0], [128], [256]]
    # Nothing but logits comes back, nothing but the steps' inputs goes there
    assert seen[0].to_host == [size * LOGITS_BYTES for size in (128, 128, 44)]
    blocks = [2 * size * 8 + 256 for size in (128, 128, 64)]
    assert sorted(size for size in seen[0].to_device if size > 256) == sorted(blocks)


def test_a_long_prompt_takes_no_memory_for_all_its_pairs_of_tokens(executor):
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    tokens = (np.arange(8192) % 61).tolist()
    before = free_bytes()
    batch = Batch(executor, 1)
    batch.join([TokenSequence(tokens, params, executor.specification, None)])
    heads, half = 4, 2
    assert before - free_bytes() < 8192 * 8192 * heads * half / 4
    # Scores and probabilities of a chunk
    assert before - free_bytes() > 2 * batch.cache.capacity * PREFILL_CHUNK * heads * half


def test_a_comparison_with_pytorch_runs_on_the_device(checkpoint, bundle):
    """Whether it passes is for a GPU to say."""
    report = check_parity(checkpoint, bundle.model, max_context=300, device="cuda")
    assert report.provider == PROVIDERS["cuda"]
    assert {case.name for case in report.cases} >= {"prefill", "prefill by 1", "ragged batch"}


def test_extra_outputs_come_to_the_host(bundle):
    executor = open_bundle(bundle, "cuda", contexts=True)
    assert executor.device == "cuda"
    for length in (3, 5):
        token_ids, last = np.ones((1, length), np.int64), np.array([[length - 1]])
        executor.run(executor.new_cache(1, 16), token_ids, np.zeros(1, np.int64), last)
        shapes = [executor.extra[context_name(layer)].shape for layer in range(2)]
        assert shapes == [(1, 2, 2 * length, 12)] * 2


def test_a_gpu_is_found_without_a_session(bundle, monkeypatch):
    monkeypatch.setattr(import_onnxruntime(), "InferenceSession", None)
    with watch() as seen:
        assert has_cuda()
        assert choose_device(bundle.specification) == "cuda"
    assert not {"kernel", "library", "copy"} & set(seen[0].kinds)


def free_bytes():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda_library().cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


def test_memory_is_given_back(executor):
    gc.collect()
    before = free_bytes()
    cache = executor.new_cache(2, 100)
    assert before - free_bytes() == cache.nbytes
    cache.reserve(400, [100, 7])
    assert before - free_bytes() == cache.nbytes
    del cache
    assert free_bytes() == before


@contextmanager
def capture(stream=None):
    """Meanwhile calls are refused that a captured stream forbids: any failure would do."""
    library, graph = cuda_library(), ctypes.c_void_p()
    assert library.cudaStreamBeginCapture(stream, 0) == 0
    try:
        yield
    finally:
        library.cudaStreamEndCapture(stream, ctypes.byref(graph))


def one_line(caught):
    return "\n" not in str(caught.value)


def test_an_allocation_that_fails(executor):
    with pytest.raises(OutOfMemoryError, match=r"on cuda for 1,125,.* code 2\); run") as caught:
        CudaMemory(1 << 50)
    assert one_line(caught)
    cache = executor.new_cache(1, 16)
    executor.run(cache, np.ones((1, 2), np.int64), np.zeros(1, np.int64), np.array([[1]]))


def test_weights_that_do_not_fit(bundle, monkeypatch):
    monkeypatch.setattr(device_weights, "CudaMemory", lambda _: CudaMemory(1 << 50))
    with pytest.raises(
        OutOfMemoryError, match=r"on cuda to load .*model.onnx, whose weights"
    ) as caught:
        open_executor(bundle, "cuda")
    assert one_line(caught)


def test_a_driver_that_is_too_old(bundle, monkeypatch):
    """It is told before anything is read."""
    monkeypatch.setattr(cuda_memory.runtime(), "cudaSetDevice", lambda _: 35)
    with watch() as seen:
        with pytest.raises(DeviceError, match=r"driver is absent or .* 35\); install") as caught:
            open_executor(bundle, "cuda")
        assert one_line(caught)
    assert not {"kernel", "library", "copy", "alloc"} & set(seen[0].kinds)


def test_a_device_that_fails(bundle):
    memory = CudaMemory(10)
    with capture():
        with pytest.raises(DeviceError, match=r"cudaMemsetAsync failed on cuda \(.* 900") as caught:
            memory.clear(0, 10)
        assert one_line(caught)
        with pytest.raises(DeviceError, match=r"cudaMalloc failed on cuda \(.* 900") as caught:
            memory.new(10)
        assert one_line(caught)
        with pytest.raises(DeviceError, match=r"cannot run .* on cuda .*CUDA failure") as caught:
            open_session(bundle.model, SessionOptions(device="cuda"))
        assert one_line(caught)


def test_a_device_that_fails_in_a_run(bundle):
    stream = ctypes.c_void_p()
    assert cuda_library().cudaStreamCreate(ctypes.byref(stream)) == 0
    options = {"has_user_compute_stream": "1", "user_compute_stream": str(stream.value)}
    session = open_session(bundle.model, SessionOptions(device="cuda", provider_options=options))
    executor = executor_of(session, bundle.specification)
    step = np.ones((1, 1), np.int64), np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
    cache = executor.new_cache(1, 16)
    executor.run(cache, *step)
    with capture(stream), pytest.raises(DeviceError, match="cuda failed in a step of") as caught:
        executor.run(cache, *step)
    assert one_line(caught)


def test_a_session_without_memory(bundle):
    def options(limit):
        return SessionOptions(device="cuda", provider_options={"gpu_mem_limit": str(limit)})

    with pytest.raises(OutOfMemoryError, match="no memory left on cuda to load") as caught:
        open_session(bundle.model, options(1000))
    assert one_line(caught)
    session = open_session(bundle.model, options(1_500_000))
    executor = executor_of(session, bundle.specification)
    cache, zeros = executor.new_cache(16, 500), np.zeros(16, np.int64)
    with pytest.raises(OutOfMemoryError, match="no memory left on cuda for a step") as caught:
        executor.run(cache, np.ones((16, 250), np.int64), zeros, zeros[:, None])
    assert one_line(caught)
