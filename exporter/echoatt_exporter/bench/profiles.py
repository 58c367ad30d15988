"""Where a bundle's time goes by operator, measured and shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any, Final

from echoatt_exporter.bench.engines import EngineSpec
from echoatt_exporter.bench.machine import this_machine
from echoatt_exporter.bench.process import WorkerProcess
from echoatt_exporter.bench.run import read_files_once
from echoatt_exporter.errors import BenchError

FORMAT: Final = "echoatt-profile/1"
_STEPS: Final = 10


@dataclass(frozen=True, slots=True)
class Profile:
    """The runs of one bundle in one phase, medians over the runs.

    Attributes:
        engine: The bundle's name.
        phase: `decode` for a step, `prefill` for the last chunk of a prompt.
        batch: Rows.
        context: Tokens of each row before the step, or with the chunk.
        tokens: New ones of each row in a run.
        microseconds: Of a run, the profiler's own work included.
        outside: Of a run, outside all kernels.
        operators: Name, kernels a run and microseconds a run of each kind, the costly first.
    """

    engine: str
    phase: str
    batch: int
    context: int
    tokens: int
    microseconds: float
    outside: float
    operators: tuple[dict[str, Any], ...]


def profile_bundles(
    engines: Sequence[EngineSpec],
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    threads: int,
    steps: int = _STEPS,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Profile]:
    """Profile bundles, each point in a process of its own.

    Args:
        engines: Bundles.
        contexts: Tokens before the step.
        batches: Rows.
        threads: Of the session.
        steps: Runs that the medians are over.
        on_step: Told what is being done.

    Raises:
        BenchError: A context does not fit a bundle, or a bundle failed.
    """
    found = []
    read_files_once(engines)
    for engine in engines:
        if max(contexts) >= engine.context_length - steps:
            raise BenchError(
                f"{engine.name} holds {engine.context_length} tokens; give shorter --contexts"
            )
        for batch in batches:
            for context in contexts:
                on_step(f"profiling {engine.name}, batch {batch}, context {context}")
                with WorkerProcess(engine.name, threads) as worker:
                    answer = worker.request(
                        "profile",
                        path=str(engine.path),
                        threads=threads,
                        batch=batch,
                        context=context,
                        vocab_size=engine.vocab_size,
                        steps=steps,
                    )
                found += [
                    Profile(engine=engine.name, batch=batch, context=context, **fields)
                    for fields in answer
                ]
    return found


def profiles_json(profiles: Sequence[Profile], command: str) -> str:
    """The profiles for a program to read."""
    data = {
        "format": FORMAT,
        "command": command,
        "machine": dataclasses.asdict(this_machine()),
        "profiles": [dataclasses.asdict(profile) for profile in profiles],
    }
    return json.dumps(data, indent=1)


def profiles_markdown(profiles: Sequence[Profile], command: str) -> str:
    """The profiles as tables."""
    machine = this_machine()
    header = (
        f"`{command}`\n\n- {datetime.now().astimezone().isoformat(timespec='seconds')},"
        f" {machine.processor}, {machine.cores} cores, {machine.system}\n"
        f"- EchoAtt {version('echoatt')}, ONNX Runtime {version('onnxruntime')}"
    )
    return "\n\n".join([header, *(_markdown(profile) for profile in profiles)]) + "\n"


def _markdown(profile: Profile) -> str:
    what = "a step" if profile.phase == "decode" else f"a chunk of {profile.tokens}"
    lines = [
        f"### {profile.engine}: {what} of {profile.phase}, batch {profile.batch},"
        f" context {profile.context}: {profile.microseconds / 1e3:,.2f} ms",
        "",
        "| operator | kernels | µs | share |",
        "| --- | --: | --: | --: |",
    ]
    outside = {"operator": "outside kernels", "count": 0, "microseconds": profile.outside}
    rows = (*profile.operators, outside)
    # medians of parts do not add up to the whole's median
    whole = sum(entry["microseconds"] for entry in rows)
    for entry in rows:
        share = entry["microseconds"] / whole
        count = f"{entry['count']:g}" if entry["count"] else ""
        lines.append(
            f"| {entry['operator']} | {count} | {entry['microseconds']:,.0f} | {share:.1%} |"
        )
    return "\n".join(lines)
