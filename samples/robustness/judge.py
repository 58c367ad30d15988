"""Runs cases, each in a process of its own, and says what came of them."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from samples.robustness.cases import Case
from samples.robustness.confine import Watch, bound, watch_python
from samples.robustness.target import SECRET, Goods, Target

from echoatt_runtime.errors import EchoAttError

LONGEST_MESSAGE: Final = 3000
WORKS: Final = "works"

Step = tuple[str, Callable[[], object]]
# What is to be done with a case, step by step; what comes after a step may depend on how it ended
Use = Callable[[Case, Target], Iterator[Step]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a case may take.

    Attributes:
        memory: Bytes beyond what every case has.
        processor_seconds: Of its process.
        wall_seconds: More than the above: somebody else may be at work on the machine.
    """

    memory: int = 1 << 30
    processor_seconds: int = 20
    wall_seconds: int = 90


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a case.

    Attributes:
        case: The case.
        done: What was wrong with its directory.
        outcome: `WORKS`, or the type of the first error.
        message: Of that error.
        faults: What must not be: empty where all is well.
        seconds: That it took.
        peak_bytes: Memory that it took at most, beyond what every case has.
    """

    case: Case
    done: str
    outcome: str
    message: str
    faults: tuple[str, ...]
    seconds: float
    peak_bytes: int


def judge_all(
    cases: Iterable[Case],
    goods: Goods,
    use: Use,
    work: Path,
    *,
    workers: int = 1,
    limits: Limits | None = None,
    keep: bool = False,
) -> Iterator[Verdict]:
    """Run cases, some at the same time; gives verdicts as they come.

    The calling process should have one thread only: it is forked for every case.

    Args:
        cases: What to run.
        goods: What is spoilt.
        use: What is done with it, in the case's own process.
        work: A directory for them.
        workers: Processes at the same time.
        limits: What each may take.
        keep: Leave the spoilt directories there.
    """
    # What is frozen is not looked at by collections, which would copy it into every child
    gc.freeze()
    waiting = iter(cases)
    running: dict[int, _Child] = {}
    while True:
        while len(running) < workers and (case := next(waiting, None)) is not None:
            place = work / f"{case.seed}-{case.number}"
            child = _Child(case, goods, use, place, limits or Limits())
            running[child.pipe] = child
        if not running:
            return
        nearest = min(child.deadline for child in running.values())
        ready, _, _ = select.select(list(running), [], [], max(0.0, nearest - time.monotonic()))
        late = [pipe for pipe, child in running.items() if child.deadline <= time.monotonic()]
        for pipe in {*ready, *late}:
            if running[pipe].read(is_late=pipe not in ready):
                verdict = running.pop(pipe).verdict()
                if not keep:
                    shutil.rmtree(work / f"{verdict.case.seed}-{verdict.case.number}")
                yield verdict


class _Child:
    """The process of one case."""

    def __init__(self, case: Case, goods: Goods, use: Use, place: Path, limits: Limits) -> None:
        self.case = case
        self.deadline = time.monotonic() + limits.wall_seconds
        self._limits = limits
        self._start = time.monotonic()
        self._place = place
        self._data = b""
        self._is_late = False
        place.mkdir(parents=True)
        self.pipe, end = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            os.close(self.pipe)
            _run_child(case, goods, use, place, limits, end)
        os.close(end)

    def read(self, *, is_late: bool) -> bool:
        """Take what it wrote; gives whether it has ended, and ends it where it is late."""
        if is_late:
            self._is_late = True
            os.kill(self._process, signal.SIGKILL)
            return True
        data = os.read(self.pipe, 1 << 16)
        self._data += data
        return not data

    def verdict(self) -> Verdict:
        """Wait for its end and judge."""
        os.close(self.pipe)
        _, status, usage = os.wait4(self._process, 0)
        lines = self._data.decode().splitlines()
        told: dict[str, Any] = {}
        for line in lines:
            told |= json.loads(line)
        faults = list(told.get("faults", ()))
        outcome = told.get("outcome", "nothing")
        if self._is_late:
            faults.append(f"took more than {self._limits.wall_seconds} s")
        elif os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            is_slow = name in ("SIGXCPU", "SIGKILL")
            faults.append(
                f"took more than {self._limits.processor_seconds} s"
                if is_slow
                else f"died of {name}"
            )
        elif os.WEXITSTATUS(status):
            faults.append(f"ended with code {os.WEXITSTATUS(status)}")
        if "outcome" not in told:
            outcome = "died"
            faults = [f"{fault} in {told.get('step', 'the making')}" for fault in faults]
            faults = faults or ["said nothing"]
        return Verdict(
            case=self.case,
            done=told.get("done", ""),
            outcome=outcome,
            message=told.get("message", ""),
            faults=tuple(faults),
            seconds=time.monotonic() - self._start,
            peak_bytes=max(0, usage.ru_maxrss * 1024 - told.get("before", 0)),
        )


def _run_child(case: Case, goods: Goods, use: Use, place: Path, limits: Limits, pipe: int) -> None:
    """Make a case, use it and tell; does not return."""

    def tell(**what: Any) -> None:
        os.write(pipe, json.dumps(what).encode() + b"\n")

    code = 1
    try:
        output = os.open(place / "output", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        target, done = case.make(goods, place)
        tell(done=done, before=_resident())
        os.chdir(place)
        tell(**_judge(case, target, use(case, target), limits, tell))
        code = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _judge(
    case: Case, target: Target, steps: Iterator[Step], limits: Limits, tell: Any
) -> dict[str, Any]:
    """Do with a spoilt directory what users do; gives the first error, and what must not be."""
    # Where a bundle is, a link leads nowhere. A downloaded checkpoint often consists of links.
    is_bundle = case.kind == "bundle"
    watch = Watch(target.outside)
    opened = watch_python((target.folder, target.stage), follow=is_bundle)
    bound(limits.memory, limits.processor_seconds)
    faults: list[str] = []
    outcome, message = WORKS, ""
    for name, step in steps:
        tell(step=name)
        try:
            step()
        except BaseException as error:  # noqa: BLE001  what comes out is what is judged
            found = type(error).__name__
            faults += [f"{found} in {name} {fault}" for fault in _error_faults(error)]
            if outcome == WORKS:
                outcome, message = found, str(error)[:LONGEST_MESSAGE]
    if is_bundle or case.family != "link":
        faults += [f"opened {name}, which is outside" for name in watch.opened()]
    faults += [f"{what}, which is outside" for what in opened]
    if (target.folder.parent / "ran").exists():
        faults.append("ran a pickle's code")
    return {"outcome": outcome, "message": message, "faults": faults}


def _error_faults(error: BaseException) -> Iterator[str]:
    message = str(error)
    if not isinstance(error, EchoAttError):
        traceback.print_exception(error)
        where = traceback.extract_tb(error.__traceback__)[-1]
        yield f"is no EchoAttError (from {Path(where.filename).name}): {message[:200]!a}"
    elif not message.isprintable():
        yield f"is not one line: {message[:200]!a}"
    elif len(message) > LONGEST_MESSAGE:
        yield f"has {len(message)} characters: {message[:200]!a}"
    if SECRET in message:
        yield "tells what is outside"


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
