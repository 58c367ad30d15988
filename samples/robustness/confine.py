"""Sees what a process reads, and bounds what it may take. All of it is for Linux."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

_IN_ACCESS, _IN_OPEN, _IN_NONBLOCK = 0x1, 0x20, 0o4000
_EVENT: Final = struct.Struct("iIII")
# What runs something else, or talks to somebody
_FORBIDDEN: Final = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
_SYSTEM: Final = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/", "/etc/localtime")


def bound(memory: int, seconds: int) -> None:
    """Bound the memory that this process may take from now on, its processor time, its files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    taken = next(line.split()[1] for line in status.splitlines() if line.startswith("VmData"))
    most = int(taken) * 1024 + memory
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory, memory))


class Watch:
    """Sees every opening of a directory's files, by whatever code, links and libraries included."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(_IN_NONBLOCK)
        mask = _IN_ACCESS | _IN_OPEN
        if (
            self._descriptor < 0
            or libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask) < 0
        ):
            raise OSError(ctypes.get_errno(), "inotify does not work here")

    def opened(self) -> list[str]:
        """Names of the files that were opened or read since the last call."""
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return []
        names, at = set(), 0
        while at < len(data):
            *_, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size
            names.add(os.fsdecode(data[at : at + length].rstrip(b"\0")) or ".")
            at += length
        return sorted(names)


def watch_python(inside: Sequence[Path], *, follow: bool) -> list[str]:
    """Note what Python code opens outside of directories and outside Python's own.

    It cannot be undone.

    Args:
        inside: What may be read.
        follow: Whether a link counts as the place that it leads to.

    Returns:
        A list to which what was opened is added as it happens.
    """
    seen: list[str] = []
    libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path[1:]}
    # Tracebacks quote from here
    libraries.add(str(Path(__file__).parent))
    allowed = tuple(f"{os.path.realpath(path)}{os.sep}" for path in libraries if path)
    allowed += (*_SYSTEM, *(f"{os.path.realpath(path)}{os.sep}" for path in inside))
    resolve: Callable[[str], str] = os.path.realpath if follow else os.path.abspath

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            seen.append(f"{event} {arguments[0]!r}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            try:
                path = resolve(os.fsdecode(arguments[0]))
            except ValueError:  # a null character, which no file has
                return
            if Path(path).name.startswith("<"):  # code without a file, to be quoted
                return
            if not path.startswith(allowed):
                seen.append(f"open {path}")

    sys.addaudithook(hook)
    return seen
