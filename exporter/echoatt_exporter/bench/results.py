"""What a bench measured, and what follows from it by arithmetic alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from echoatt_exporter.bench.engines import EngineSpec
from echoatt_exporter.bench.machine import Machine
from echoatt_exporter.bench.statistics import Spread, paired_ratio

FORMAT: Final = "echoatt-bench/1"

Phase = Literal["prefill", "decode"]
PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        contexts: Tokens before the first new one.
        batches: Rows.
        threads: For every engine.
        phases: `prefill` and `decode`, or one of them.
        new_tokens: Steps of a decoding round.
        rounds: How often decoding is measured.
        prefill_rounds: How often prefill is measured.
        seed: Of the tokens.
        memory_bytes: Size of the array that the memory's speed is measured on.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    threads: int
    phases: tuple[Phase, ...] = PHASES
    new_tokens: int = 32
    rounds: int = 5
    prefill_rounds: int = 3
    seed: int = 0
    memory_bytes: int = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One engine at one point. Samples stand in the order of the rounds.

    Attributes:
        engine: Its name.
        load_seconds: To open the model; its package was imported before.
        prefill_seconds: To the first token, a sample a round.
        decode_seconds: A step, one a round: the median of the round's steps.
        decode_mean_seconds: A step, one a round: the round's time divided by its steps.
        extra_seconds: What only this engine tells, a step, one a round: `python` is the time
            outside ONNX Runtime, `text` that of turning the token into text.
        weight_bytes: Weights that a step reads.
        cache_bytes_per_token: What a token of one row keeps.
        peak_bytes: Most memory that the process ever held, mapped files included.
        anonymous_bytes: Most that it held without mapped files, looked at after every request.
        failure: Why the engine has no or few samples; None where all went well.
    """

    engine: str
    load_seconds: float | None = None
    prefill_seconds: tuple[float, ...] = ()
    decode_seconds: tuple[float, ...] = ()
    decode_mean_seconds: tuple[float, ...] = ()
    extra_seconds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    weight_bytes: int | None = None
    cache_bytes_per_token: int | None = None
    peak_bytes: int | None = None
    anonymous_bytes: int | None = None
    failure: str | None = None

    def samples(self, phase: Phase) -> tuple[float, ...]:
        """Seconds of a phase, one sample a round."""
        return self.prefill_seconds if phase == "prefill" else self.decode_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Everything measured at one batch and context.

    Attributes:
        batch: Rows.
        context: Tokens of each before the first new one.
        memory_speed: Bytes a second that this machine's memory gave, read between the rounds.
        measured: Each engine, in the order in which they took turns.
    """

    batch: int
    context: int
    memory_speed: tuple[float, ...]
    measured: tuple[Measured, ...]

    def floor_seconds(self, measured: Measured) -> float | None:
        """What reading an engine's weights and caches once takes at the memory's median speed."""
        if measured.weight_bytes is None or measured.cache_bytes_per_token is None:
            return None
        caches = self.batch * self.context * measured.cache_bytes_per_token
        return (measured.weight_bytes + caches) / Spread.of(self.memory_speed).median


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times an engine's time another's is; above 1 the first is faster.

    Attributes:
        phase: `prefill` or `decode`.
        batch: Rows.
        context: Tokens of each.
        engine: The bundle.
        against: What it is compared with.
        ratio: The other's time / the bundle's, paired by round.
    """

    phase: Phase
    batch: int
    context: int
    engine: str
    against: str
    ratio: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResults:
    """A whole run.

    Attributes:
        command: What was typed.
        started: Date and time, ISO 8601.
        machine: Where it ran.
        options: What was asked for.
        engines: What was measured.
        versions: Of each engine by name.
        points: The measurements.
        turns: Every request in the order in which they were made.
        waiting_share: Processor time that waiting engines took, of the time measured in all.
        absent: Peers that were not measured, and why.
        notes: What a reader must know to repeat it.
    """

    command: str
    started: str
    machine: Machine
    options: BenchOptions
    engines: tuple[EngineSpec, ...]
    versions: Mapping[str, str]
    points: tuple[Point, ...]
    turns: tuple[str, ...]
    waiting_share: float
    absent: Mapping[str, str]
    notes: tuple[str, ...]

    def ratios(self) -> Iterator[Ratio]:
        """Every bundle against every peer, and against unshared bundles of the same dtype."""
        for phase in self.options.phases:
            for point in self.points:
                by_name = {measured.engine: measured for measured in point.measured}
                for bundle, other in self._pairs():
                    lower = by_name[bundle].samples(phase)
                    upper = by_name[other].samples(phase)
                    if lower and len(upper) == len(lower):
                        ratio = paired_ratio(upper, lower)
                        yield Ratio(phase, point.batch, point.context, bundle, other, ratio)

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for bundle in self.engines:
            for other in self.engines:
                unshared = other.is_bundle and other.sharing == 0 and bundle.sharing > 0
                comparable = other.dtype == bundle.dtype or other.kind == "torch"
                if bundle.is_bundle and comparable and (unshared or not other.is_bundle):
                    yield bundle.name, other.name

    def to_json(self) -> str:
        """Everything, with medians, quartiles, floors and ratios worked out."""
        data = dataclasses.asdict(self)
        data["format"] = FORMAT
        for engine in data["engines"]:
            del engine["path"]  # of this machine, and of no use elsewhere
        for shown, point in zip(data["points"], self.points, strict=True):
            for entry, measured in zip(shown["measured"], point.measured, strict=True):
                entry["floor_seconds"] = point.floor_seconds(measured)
                for phase in self.options.phases:
                    entry[phase] = _spread(measured.samples(phase))
        data["ratios"] = [dataclasses.asdict(ratio) for ratio in self.ratios()]
        return json.dumps(data, indent=1)


def _spread(samples: Sequence[float]) -> dict[str, Any] | None:
    return dataclasses.asdict(Spread.of(samples)) if samples else None


# Told what is being done, turns done, turns in all
OnTurn = Callable[[str, int, int], None]
