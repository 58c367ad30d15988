"""What a decoding step makes a GPU do, by ONNX Runtime's CUDA provider over stand-ins.

Run as `over_stand_ins` is; kernels do nothing, so no result means anything.
"""

import functools
import json

import numpy as np
import pytest
from tests.cuda.bundles import Trace
from tests.cuda.watching import watch

from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.executor import open_executor

# The paper's plan for 22 layers with 41 % followers, and small ones
PLANS = {
    "llama": tuple(1 if 2 <= i <= 9 else 17 if i == 18 else i for i in range(22)),
    "gemma3_text": (0, 0, 2, 0, 4, 2),
    "qwen3": (0, 1, 1, 3),
}
# Kernels and library calls of a token, by family and whether it is shared. The first was 467 with
# copies.
MOST_LAUNCHES = {
    ("llama", True): 360,
    ("llama", False): 420,
    ("gemma3_text", True): 213,
    ("gemma3_text", False): 252,
    ("qwen3", True): 94,
    ("qwen3", False): 103,
}
# Computations of shapes
ON_CPU = {"Concat", "Squeeze", "Mul", "Reshape"}
MOST_ON_CPU = 11
# Tokens, lengths and indices of a few rows
INPUT_BYTES = 3 * 256


@functools.cache
def trace(family):
    return Trace(family, len(PLANS[family]))


def bundle_of(family, dtype, shared, folder):
    sources = PLANS[family]
    plan = SharingPlan(sources) if shared else SharingPlan.unshared(len(sources))
    return trace(family).bundle(folder, dtype, plan)


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    """Of a small model, for what is the same for all."""
    folder = tmp_path_factory.mktemp("bundle")
    return open_executor(bundle_of("qwen3", "fp16", True, folder), "cuda")


def choose(executor, cache, *lengths, first_slot=0, free_behind=0):
    """Run a token of each row, and choose the next ones; gives what was seen of it."""
    tokens = np.array([[length % 61] for length in lengths])
    with watch() as seen:
        executor.choose(
            cache, tokens, np.array(lengths), np.zeros_like(tokens), first_slot, free_behind
        )
    # Tokens, and sums that tell whether they mean something
    rows = len(lengths) + free_behind
    assert seen[0].to_host == [256 + 4 * rows]
    return seen[0]


def records(seen):
    return seen.kinds.count("capture") == 2 and seen.kinds.count("replay") == 1


def replays(seen):
    """Whether a step is a replay, with its inputs in front of it and its results behind."""
    kinds = [kind for kind in seen.kinds if kind != "wait"]
    return (
        kinds == ["copy", "replay", "copy"]
        and seen.to_device == [INPUT_BYTES]
        and not seen.on_device
        # The copy has come before anything is replayed, and everything has ended at the end
        and seen.kinds[: seen.kinds.index("replay")][-2:] == ["copy", "wait"]
        and seen.kinds[-1] == "wait"
    )


@pytest.mark.parametrize("family", list(PLANS))
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int4"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
def test_a_token_takes_few_launches_and_no_copies(family, dtype, shared, tmp_path):
    bundle = bundle_of(family, dtype, shared, tmp_path)
    executor = open_executor(bundle, "cuda", profile=tmp_path / "profile")
    cache = executor.new_cache(3, 100)
    first = choose(executor, cache, 30, 9)
    assert records(first)
    assert first.to_device == [INPUT_BYTES]
    assert not first.on_device
    launches = first.captured["kernel"] + first.captured["library"]
    assert 0 < launches <= MOST_LAUNCHES[family, shared]
    assert not first.captured["copy"]
    assert all(replays(choose(executor, cache, 30 + step, 9 + step)) for step in (1, 2, 3))
    cache.reserve(400, [34, 13, 0])
    assert records(choose(executor, cache, 34, 13))
    assert replays(choose(executor, cache, 35, 14))

    events = json.loads(executor.decoding.session.end_profiling().read_text())
    on_cpu = {
        event["name"]: event["args"]["op_name"]
        for event in events
        if event.get("args", {}).get("provider") == "CPUExecutionProvider"
    }
    assert set(on_cpu.values()) == ON_CPU
    assert len(on_cpu) <= MOST_ON_CPU


def test_what_moves_is_recorded_anew_and_what_is_known_is_not(executor):
    cache = executor.new_cache(4, 100)
    step = functools.partial(choose, executor, cache)
    assert records(step(5, 6))
    assert replays(step(6, 7))
    # Another number of rows, and other rows
    assert records(step(7))
    assert records(step(7, 8, first_slot=2))
    assert replays(step(8, 8))
    # Three rows of four, the fourth of which is nobody's
    assert records(step(7, 8, 9, free_behind=1))
    assert replays(step(8, 9, 10, 3))
    cache.reserve(400, [10, 10, 10, 4])
    assert records(step(10, 10))
    # A prompt in between
    executor.run(cache, np.ones((1, 20), np.int64), np.array([0]), np.array([[19]]), 3)
    assert replays(step(11, 11))


def test_logits_that_are_asked_for_come_whole(executor):
    cache = executor.new_cache(3, 100)
    tokens = np.ones((2, 1), np.int64)
    for _ in range(2):
        with watch() as seen:
            logits = executor.run(cache, tokens, np.array([3, 4]), np.zeros_like(tokens), 0, 1)
    assert logits.shape == (2, 1, 61)
    assert replays(seen[0])
    assert seen[0].to_host == [logits.nbytes]


def test_only_the_most_probable_tokens_cross_for_sampling(executor):
    cache = executor.new_cache(3, 100)
    tokens = np.ones((2, 1), np.int64)
    for _ in range(2):
        with watch() as seen:
            top = executor.top(
                cache, tokens, np.array([3, 4]), np.zeros_like(tokens), number=executor.most_top
            )
    # There are fewer tokens than it gives
    assert top.token_ids.shape == top.logits.shape == (2, 61)
    assert seen[0].kinds.count("replay") == 1
    assert seen[0].to_device == [INPUT_BYTES]
    assert seen[0].to_host == [256 + 2 * 4, 512 + 2 * 61 * 8]
