"""The machine and the versions that a result belongs to."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_UNKNOWN = "unknown processor"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where something was measured.

    Attributes:
        processor: Its model's name.
        cores: Processors that this process may use.
        memory_bytes: Of the machine.
        system: Kernel and architecture.
        python: Its version.
    """

    processor: str
    cores: int
    memory_bytes: int
    system: str
    python: str


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def this_machine() -> Machine:
    """The machine that this runs on."""
    return Machine(
        processor=_first("/proc/cpuinfo", "model name") or _UNKNOWN,
        cores=usable_cores(),
        memory_bytes=_kilobytes("MemTotal"),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
    )


def available_memory() -> int:
    """Bytes that new processes may take before the system must give up others' memory."""
    return _kilobytes("MemAvailable")


def _kilobytes(field: str) -> int:
    value = _first("/proc/meminfo", field)
    return int(value.split()[0]) * 1024 if value else 0


def _first(path: str, field: str) -> str | None:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None
