"""What `samples.gpu.prepare` made, measured on a GPU: `make bench-gpu`.

    python -m samples.gpu.bench out/gpu --out results [--seconds 200]

Each bundle decodes and runs a long prompt through the runtime as `EchoModel` does. A step is held
against its floor: weights and caches read once, at the speed of a copy on the same card. Needs the
runtime, numpy and ONNX Runtime, and neither torch nor a network.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from echoatt_runtime import SamplingParams
from echoatt_runtime.bundle import Bundle, read_onnx_file
from echoatt_runtime.errors import EchoAttError
from echoatt_runtime.executor import Executor, executor_of, open_executor
from echoatt_runtime.executor.cuda_memory import CudaMemory
from echoatt_runtime.generation import Batch, TokenSequence
from echoatt_runtime.ort import has_cuda, import_onnxruntime

# Rows and tokens of each of them
DECODES = ((1, 512), (1, 4096), (16, 2048), (64, 4096))
PROMPT = 8192
CHUNKS = (256, 1024)
_STEPS, _WARM_UP = 60, 5
_COPIED = 1 << 30


def main() -> int:
    """Measure all that there is time for, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundles", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="where the findings go, as JSON")
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing new after it")
    parser.add_argument("--steps", type=int, default=_STEPS)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--decodes", default=",".join(f"{b}x{c}" for b, c in DECODES))
    arguments = parser.parse_args()
    if not has_cuda():
        print("ONNX Runtime sees no GPU here", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    decodes = [tuple(map(int, item.split("x"))) for item in arguments.decodes.split(",")]
    found: dict[str, Any] = {"onnxruntime": str(import_onnxruntime().__version__)}
    for folder in sorted(arguments.bundles.iterdir()):
        if not (folder / "sizes.json").is_file():
            continue
        if time.monotonic() > end:
            found[folder.name] = {"left out": "no time"}
            continue
        try:
            found[folder.name] = _measure(folder, decodes, arguments, found, end)
        except EchoAttError as error:
            found[folder.name] = {"failed": str(error)}
        gc.collect()
        text = json.dumps(found, indent=1) + "\n"
        arguments.out.joinpath("bench-gpu.json").write_text(text, encoding="utf-8")
    _print(found)
    return 0


def _measure(
    folder: Path,
    decodes: list[tuple[int, ...]],
    arguments: argparse.Namespace,
    found: dict[str, Any],
    end: float,
) -> dict[str, Any]:
    """One bundle's times."""
    with tempfile.TemporaryDirectory() as made:
        own = Path(made)
        for path in folder.iterdir():
            own.joinpath(path.name).write_bytes(path.read_bytes())
        sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
        _draw_weights(own / "model.onnx.data", sizes["model.onnx.data"])
        bundle = Bundle.open(own)
        weights = _bytes_read(bundle)
        begin = time.perf_counter()
        executor = open_executor(bundle, "cuda")
        times: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
    if "copy_bytes_per_second" not in found:
        found["copy_bytes_per_second"] = _copy_speed()
    for batch, context in decodes:
        if time.monotonic() > end:
            break
        read = weights + batch * context * executor.specification.cache_bytes_per_token
        recorded = _decode(executor, batch, context, arguments.steps)
        name = f"decode {batch} x {context}"
        times[name] = {
            "recorded_ms": recorded,
            "floor_ms": read / found["copy_bytes_per_second"] * 1e3,
        }
        if batch == 1:
            # Without recordings, and with the branches for any number of tokens
            launched = executor_of(executor.session, executor.specification)
            times[name]["prompts_session_ms"] = _decode(launched, batch, context, arguments.steps)
    for chunk in CHUNKS:
        if time.monotonic() < end:
            times[f"prompt of {arguments.prompt} by {chunk}"] = _prompt(
                executor, arguments.prompt, chunk
            )
    return times


def _draw_weights(path: Path, size: int) -> None:
    """Small random numbers, the same again and again: what they are takes no other time."""
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float16).tobytes()
    with path.open("wb") as file:
        while size > 0:
            file.write(block[:size])
            size -= len(block)


def _copy_speed() -> float:
    """Bytes read and written a second by a copy on the card."""
    source, target = CudaMemory(_COPIED), CudaMemory(_COPIED)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        source.copy_rows(0, _COPIED, _COPIED, target, 0, _COPIED, 1)
        times.append(time.perf_counter() - begin)
    return 2 * _COPIED / min(times)


def _bytes_read(bundle: Bundle) -> int:
    """Of the weights, what a token reads: of a table of embeddings of its own only a row."""
    tensors = read_onnx_file(bundle.model).external
    spans = {tensor.offset: tensor.length or 0 for tensor in tensors}
    tables = {tensor.offset for tensor in tensors if "embed_tokens" in tensor.name}
    return sum(length for offset, length in spans.items() if offset not in tables)


def _decode(executor: Executor, batch: int, context: int, steps: int) -> float:
    """Milliseconds a step, the median."""
    capacity = context + steps + _WARM_UP
    cache = executor.new_cache(batch, capacity, capacity)
    tokens, wanted = np.ones((batch, 1), np.int64), np.zeros((batch, 1), np.int64)
    times = []
    for step in range(_WARM_UP + steps):
        begin = time.perf_counter()
        executor.choose(cache, tokens, np.full(batch, context + step), wanted)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[_WARM_UP:]) * 1e3


def _prompt(executor: Executor, length: int, chunk: int) -> float:
    """Milliseconds of a prompt, the better of two."""
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    tokens = (np.arange(length) % executor.specification.vocab_size).tolist()
    times = []
    for _ in range(2):
        sequence = TokenSequence(tokens, params, executor.specification, None)
        begin = time.perf_counter()
        Batch(executor, 1, chunk).join([sequence])
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3


def _print(found: dict[str, Any]) -> None:
    speed = found.get("copy_bytes_per_second", 0) / 1e12
    print(f"ONNX Runtime {found['onnxruntime']}; a copy moves {speed:.2f} TB/s")
    for name, times in found.items():
        if not isinstance(times, dict):
            continue
        print(name)
        for what, value in times.items():
            if isinstance(value, dict):
                over = value["recorded_ms"] / value["floor_ms"]
                words = ", ".join(f"{kind} {number:.3f}" for kind, number in value.items())
                print(f"    {what:<26} {words}; {over:.2f} times the floor")
            else:
                print(f"    {what:<26} {value if isinstance(value, str) else round(value, 3)}")


if __name__ == "__main__":
    sys.exit(main())
