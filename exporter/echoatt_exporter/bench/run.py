"""The measuring itself: engines take turns, round after round, and only one works at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from echoatt_exporter.bench.engines import EngineSpec
from echoatt_exporter.bench.machine import available_memory, this_machine
from echoatt_exporter.bench.process import EngineError, WorkerProcess
from echoatt_exporter.bench.results import BenchOptions, BenchResults, Measured, OnTurn, Point
from echoatt_exporter.errors import BenchError

# Prompts that wake caches and thread pools before anything is timed
_WARM_UP_TOKENS: Final = 256
_WARM_UP_STEPS: Final = 2
# After its turn an engine's threads spin a while before they sleep; nobody else works meanwhile.
_SETTLE_SECONDS: Final = 0.05
_MEMORY: Final = "memory"
_READ_BYTES: Final = 2**24


def bench(
    engines: Sequence[EngineSpec],
    options: BenchOptions,
    *,
    command: str,
    absent: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    on_turn: OnTurn = lambda _what, _done, _total: None,
) -> BenchResults:
    """Measure engines against each other.

    At every point (a batch and a context) each engine gets a fresh process, so that its peak
    memory is the point's own. Then engines take turns: A B A B ..., first prefill, then decode,
    and between the rounds the memory's speed is measured. Every turn is a request to one process;
    the others wait for theirs in a read.

    Args:
        engines: At least one.
        options: What to measure.
        command: What was typed, for the record.
        absent: Peers that are not among the engines, and why.
        notes: Further words for the record.
        on_turn: Told what is being done, and how many turns of how many are over.

    Raises:
        BenchError: The points do not fit the models or the memory, or a bundle failed.
    """
    _check(engines, options)
    on_turn("reading the files once", 0, 1)
    read_files_once(engines)
    run = _Run(engines, options, on_turn)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    points = [
        run.point(batch, context)
        for batch in options.batches
        for context in sorted(options.contexts)
    ]
    return BenchResults(
        command=command,
        started=started,
        machine=this_machine(),
        options=options,
        engines=tuple(engines),
        versions=run.versions,
        points=tuple(points),
        turns=tuple(run.turns),
        waiting_share=run.waiting_seconds / run.measured_seconds,
        absent=absent or {},
        notes=tuple(notes),
    )


def needed_tokens(options: BenchOptions, context: int, batch: int) -> int:
    """Tokens that a row needs room for at a point: with several rows decoding goes on and on."""
    rounds = options.rounds if batch > 1 else 1
    # one more is chosen by peers before the first step, and one stays to be run
    return context + _WARM_UP_STEPS + rounds * options.new_tokens + 2


def _check(engines: Sequence[EngineSpec], options: BenchOptions) -> None:
    most = max(
        needed_tokens(options, context, batch)
        for context in options.contexts
        for batch in options.batches
    )
    shortest = min(engines, key=lambda engine: engine.context_length)
    if most > shortest.context_length:
        raise BenchError(
            f"{shortest.name} holds {shortest.context_length} tokens and the longest point needs"
            f" {most}; give shorter --contexts or fewer --new-tokens"
        )
    needed = sum(path.stat().st_size for engine in engines for path in _files(engine))
    if needed > available_memory():
        raise BenchError(
            f"the engines' weights take {needed / 1e9:.1f} GB together and"
            f" {available_memory() / 1e9:.1f} GB of memory are free; bench fewer at once"
        )


def _files(engine: EngineSpec) -> list[Path]:
    """The files that an engine loads; next to nothing but the weights counts."""
    if not engine.path.exists():
        return []
    if engine.path.is_dir():
        return [path for path in engine.path.iterdir() if path.is_file()]
    weights = engine.path.with_name(f"{engine.path.name}.data")
    return [path for path in (engine.path, weights) if path.is_file()]


def read_files_once(engines: Sequence[EngineSpec]) -> None:
    """Bring what engines load into the page cache, so that the first to load it pays no more."""
    for path in {path for engine in engines for path in _files(engine)}:
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass


class _Run:
    """Keeps count over all points: turns, versions, what waiting engines took."""

    def __init__(
        self, engines: Sequence[EngineSpec], options: BenchOptions, on_turn: OnTurn
    ) -> None:
        self.engines = {engine.name: engine for engine in engines}
        self.options = options
        self.versions: dict[str, str] = {}
        self.turns: list[str] = []
        self.waiting_seconds = 0.0
        self.measured_seconds = 0.0
        self._on_turn = on_turn
        self._total = self._count_turns()

    def point(self, batch: int, context: int) -> Point:
        """Measure one point with processes of its own."""
        with contextlib.ExitStack() as stack:
            workers = {
                name: stack.enter_context(WorkerProcess(name, self.options.threads))
                for name in (*self.engines, _MEMORY)
            }
            # each has started when it answers, and starting is no part of anybody's turn
            for worker in workers.values():
                worker.request("memory")
            return _PointRun(self, workers, batch, context).measure()

    def turn(
        self, workers: Mapping[str, WorkerProcess], name: str, request: str, **fields: Any
    ) -> Any:
        """Ask one worker while the others wait, and note what they take."""
        waiting = [worker for other, worker in workers.items() if other != name]
        before = sum(worker.processor_seconds() for worker in waiting)
        begin = time.perf_counter()
        try:
            return workers[name].request(request, **fields)
        finally:
            self.measured_seconds += time.perf_counter() - begin
            self.waiting_seconds += sum(worker.processor_seconds() for worker in waiting) - before
            time.sleep(_SETTLE_SECONDS)

    def note_turn(self, what: str) -> None:
        """Record a turn that is about to begin."""
        self._on_turn(what, len(self.turns), self._total)
        self.turns.append(what)

    def _count_turns(self) -> int:
        options, engines = self.options, len(self.engines)
        each = engines
        for phase in options.phases:
            rounds = options.prefill_rounds if phase == "prefill" else options.rounds
            each += engines + rounds * (engines + 1)
        return each * len(options.batches) * len(options.contexts)


class _PointRun:
    """One point: loads, warms up, lets the engines take turns, and looks at their memory."""

    def __init__(
        self, run: _Run, workers: dict[str, WorkerProcess], batch: int, context: int
    ) -> None:
        self._run, self._workers = run, workers
        self._options = run.options
        self._batch, self._context = batch, context
        self._capacity = needed_tokens(run.options, context, batch)
        self._measured = {name: Measured(engine=name) for name in run.engines}
        self._memory_speed: list[float] = []

    def measure(self) -> Point:
        for name in self._alive():
            self._load(name)
        if "prefill" in self._options.phases:
            self._prefill()
        if "decode" in self._options.phases:
            self._decode()
        for name in self._alive():
            held = self._ask(name, "memory")
            if held is not None:
                self._set(name, **held)
        return Point(
            batch=self._batch,
            context=self._context,
            memory_speed=tuple(self._memory_speed),
            measured=tuple(self._measured.values()),
        )

    def _load(self, name: str) -> None:
        engine = self._run.engines[name]
        self._note("load", name)
        loaded = self._ask(
            name,
            "load",
            kind=engine.kind,
            path=str(engine.path),
            threads=self._options.threads,
            batch=self._batch,
            capacity=self._capacity,
            vocab_size=engine.vocab_size,
            seed=self._options.seed,
        )
        if loaded is None:
            return
        facts = loaded["facts"]
        self._run.versions[name] = facts["version"]
        self._set(
            name,
            load_seconds=loaded["seconds"],
            weight_bytes=engine.weight_bytes or facts.get("weight_bytes"),
            cache_bytes_per_token=engine.cache_bytes_per_token
            or facts.get("cache_bytes_per_token"),
        )

    def _prefill(self) -> None:
        for name in self._alive():
            self._note("prefill", name, "warm-up")
            self._ask(name, "prefill", context=min(self._context, _WARM_UP_TOKENS))
        for turn, name in self._rounds("prefill", self._options.prefill_rounds):
            self._note("prefill", name, turn)
            answer = self._ask(name, "prefill", context=self._context)
            if answer is not None:
                self._add(name, prefill_seconds=answer["seconds"])

    def _decode(self) -> None:
        start, steps = self._context, _WARM_UP_STEPS
        for name in self._alive():
            self._note("decode", name, "warm-up")
            self._ask(name, "decode", start=start, new_tokens=steps)
        previous: object = None
        for turn, name in self._rounds("decode", self._options.rounds):
            if self._batch > 1 and turn != previous:
                start, steps, previous = start + steps, self._options.new_tokens, turn
            self._note("decode", name, turn)
            answer = self._ask(name, "decode", start=start, new_tokens=self._options.new_tokens)
            if answer is not None:
                self._add_decode(name, answer)

    def _add_decode(self, name: str, answer: Mapping[str, Any]) -> None:
        seconds = sorted(answer["step_seconds"])
        middle = len(seconds) // 2
        median = (seconds[middle] + seconds[-middle - 1]) / 2
        self._add(name, decode_seconds=median, decode_mean_seconds=sum(seconds) / len(seconds))
        extra = dict(self._measured[name].extra_seconds)
        for what, value in answer["extra"].items():
            extra[what] = (*extra.get(what, ()), value)
        self._set(name, extra_seconds=extra)

    def _rounds(self, request: str, count: int) -> Iterator[tuple[int, str]]:
        """A B A B ..., with a look at the memory's speed after each round."""
        for turn in range(count):
            for name in self._alive():
                yield turn, name
            self._note("memory speed after", request, turn)
            self._memory_speed.append(
                self._run.turn(
                    self._workers,
                    _MEMORY,
                    "memory_speed",
                    threads=self._options.threads,
                    size=self._options.memory_bytes,
                )
            )

    def _alive(self) -> list[str]:
        return [name for name in self._measured if self._measured[name].failure is None]

    def _ask(self, name: str, request: str, **fields: Any) -> Any:
        """The answer, or None from a peer that failed and is out of the point from here on."""
        try:
            return self._run.turn(self._workers, name, request, **fields)
        except EngineError as error:
            if self._run.engines[name].is_bundle:
                raise
            self._set(name, failure=str(error))
            self._workers.pop(name).close()
            return None

    def _note(self, *words: object) -> None:
        place = f"batch {self._batch} context {self._context}"
        self._run.note_turn(" ".join(str(word) for word in (place, *words)))

    def _set(self, name: str, **fields: Any) -> None:
        self._measured[name] = replace(self._measured[name], **fields)

    def _add(self, name: str, **samples: float) -> None:
        measured = self._measured[name]
        self._set(name, **{key: (*getattr(measured, key), value) for key, value in samples.items()})
