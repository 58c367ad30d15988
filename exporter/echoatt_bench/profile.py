"""Where the time of a bundle's runs goes, from ONNX Runtime's own profiler."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from echoatt_bench.bundle import BundleEngine
from echoatt_bench.engine import Load

_WARM_UP: Final = 2
_KERNEL: Final = "_kernel_time"

Event = Mapping[str, Any]


def profile_bundle(
    path: str, threads: int, batch: int, context: int, vocab_size: int, steps: int
) -> list[dict[str, Any]]:
    """Profile steps of decoding after `context` tokens, and the last chunk of their prefill.

    Args:
        path: The bundle.
        threads: As in `Load`.
        batch: Rows.
        context: Tokens of each row.
        vocab_size: As in `Load`.
        steps: Decoding steps, and as many chunks, after a few that are not counted.

    Returns:
        For `decode` and `prefill` the phase, the tokens of a run, and `summarise`'s fields.
    """
    runs = _WARM_UP + steps
    load = Load(path, threads, batch, context + runs + 1, vocab_size, seed=0)
    with tempfile.TemporaryDirectory(prefix="echoatt-profile-") as folder:
        engine = BundleEngine(load, profile=Path(folder) / "trace")
        engine.decode(context, runs)
        chunk = min(engine.prefill_chunk, context)
        head_dims = frozenset(engine.executor.specification.head_dims)
        for _ in range(runs):
            engine.run_chunk(context - chunk, context)
        trace = engine.executor.session.end_profiling()
        events = json.loads(trace.read_text(encoding="utf-8"))
    by_run = list(runs_of(events))
    return [
        {"phase": "decode", "tokens": 1, **summarise(by_run[_WARM_UP:runs], head_dims)},
        {
            "phase": "prefill",
            "tokens": chunk,
            **summarise(by_run[runs + _WARM_UP :], head_dims),
        },
    ]


def runs_of(events: Sequence[Event]) -> Iterator[tuple[int, list[Event]]]:
    """Microseconds and kernels of each run of the model, in order."""
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: int(e["ts"]))
    # An If's time is that of the kernels in its branch, which are there too
    kernels = [
        e
        for e in events
        if e["cat"] == "Node" and e["name"].endswith(_KERNEL) and e["args"]["op_name"] != "If"
    ]
    for run in runs:
        begin, end = run["ts"], run["ts"] + run["dur"]
        yield int(run["dur"]), [e for e in kernels if begin <= e["ts"] < end]


def summarise(
    runs: Sequence[tuple[int, Sequence[Event]]], head_dims: Container[int]
) -> dict[str, Any]:
    """Medians over runs of the time by kind of operator.

    Args:
        runs: As `runs_of` gives them, at least one.
        head_dims: Sizes of a head.

    Returns:
        `microseconds` of a run, `outside` the kernels, and `operators`: name, kernels a run
        and microseconds a run, the costly first.
    """
    sums: list[dict[str, float]] = []
    counts: dict[str, float] = {}
    for _, kernels in runs:
        total: dict[str, float] = {}
        for event in kernels:
            kind = operator_kind(event["args"], head_dims)
            total[kind] = total.get(kind, 0.0) + event["dur"]
            counts[kind] = counts.get(kind, 0.0) + 1 / len(runs)
        sums.append(total)
    operators = [
        {
            "operator": kind,
            "count": round(count, 3),
            "microseconds": statistics.median(total.get(kind, 0.0) for total in sums),
        }
        for kind, count in counts.items()
    ]
    outside = [whole - sum(total.values()) for (whole, _), total in zip(runs, sums, strict=True)]
    return {
        "microseconds": statistics.median(whole for whole, _ in runs),
        "outside": statistics.median(outside),
        "operators": sorted(operators, key=lambda entry: -float(str(entry["microseconds"]))),
    }


def operator_kind(arguments: Mapping[str, Any], head_dims: Container[int]) -> str:
    """The operator, with matrix products told apart by what they multiply.

    Args:
        arguments: `args` of a kernel's event.
        head_dims: Sizes of a head.
    """
    name = str(arguments["op_name"])
    if "MatMul" not in name or name == "MatMulNBits":
        return name
    shapes = [shape for entry in arguments["input_type_shape"] for shape in entry.values()]
    if len(shapes) < 2 or int(arguments["parameter_size"]) > 0:
        return f"{name} (weights)"
    # A product runs over its first operand's last axis: a head for Q·K, the capacity for P·V
    return f"{name} (Q·K)" if shapes[0][-1] in head_dims else f"{name} (P·V)"
