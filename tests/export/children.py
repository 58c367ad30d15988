"""Forked processes: everything is imported and warmed up, so they start at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from echoatt_cli import main

_LIMIT_S = 180
_FAILED, _NOT_ALLOWED = 70, 77
_NEW_MOUNTS, _NEW_USER = 0x20000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


class NotAllowedError(Exception):
    """This machine lets a test mount nothing."""


class Child:
    """A forked process.

    Attributes:
        pid: Its number.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        """Start it.

        Args:
            work: What it does; an integer is its exit code.
        """
        with warnings.catch_warnings():
            # Later versions of Python warn where there are threads
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid:
            return
        code: object = _FAILED
        try:
            code = work()
        except NotAllowedError:
            code = _NOT_ALLOWED
        except BaseException:  # noqa: BLE001 - nothing may come back into the tests
            traceback.print_exc()
        finally:
            os._exit(code if isinstance(code, int) else 0)

    def kill(self) -> None:
        """End it as nothing can soften."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code when it has ended; negative where a signal ended it."""
        end = time.monotonic() + _LIMIT_S
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                if code == _NOT_ALLOWED:
                    pytest.skip("this machine lets a test mount nothing")
                return code
            if time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                pytest.fail(f"the process did not end in {_LIMIT_S} s")
            time.sleep(0.01)


def run_command(log: Path, *arguments: object) -> int:
    """Run `echoatt` in this process, which must be a child, with its output in a file."""
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)
    return main([str(argument) for argument in arguments])


def mount_small_disk(directory: Path) -> None:
    """Mount an empty file system that only this process sees, with 16 MB.

    Raises:
        NotAllowedError: The machine does not let us.
    """
    _own_mounts()
    _mount("tmpfs", directory, "tmpfs", 0, "size=16m")


def mount_read_only(directory: Path) -> None:
    """Make a directory one that this process cannot write to, whoever runs it.

    Raises:
        NotAllowedError: The machine does not let us.
    """
    _own_mounts()
    _mount(str(directory), directory, None, _BIND, None)
    _mount(None, directory, None, _BIND | _REMOUNT | _READ_ONLY, None)


def leave_room(directory: Path, free: int) -> Path:
    """Fill a small disk up.

    Args:
        directory: On it.
        free: Bytes to leave free.

    Returns:
        The file that takes the rest.
    """
    stat = os.statvfs(directory)
    filler = directory / "filler"
    filler.write_bytes(bytes(stat.f_bavail * stat.f_bsize - free))
    return filler


def _own_mounts() -> None:
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None)
    if libc.unshare(_NEW_MOUNTS):
        if libc.unshare(_NEW_MOUNTS | _NEW_USER):
            raise NotAllowedError
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", Path("/"), None, _RECURSIVE | _PRIVATE, None)


def _mount(
    source: str | None, target: Path, kind: str | None, flags: int, data: str | None
) -> None:
    texts = [text and text.encode() for text in (source, str(target), kind, data)]
    libc = ctypes.CDLL(None)
    if libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]):
        raise NotAllowedError
