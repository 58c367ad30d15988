"""Locks that end with the process that holds them, however that ends."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock on a file. It ends when it is released or its process dies.

    Attributes:
        descriptor: The open file.
        certain: Whether the file system keeps others out; one that knows no locks lets everybody
            have them.
    """

    descriptor: int
    certain: bool

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """Take the lock on a file, which is made if need be; do not wait.

        Returns:
            None if another has the lock, or has taken the file or its directory away.

        Raises:
            OSError: The file cannot be made.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            return None
        try:
            certain = _lock(descriptor)
            # Who had it before may have removed the file, and then others lock another one
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return cls(descriptor, certain)
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Let others have it. Whoever wants the file gone removes it before."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file, and tell whether that means anything.

    Raises:
        BlockingIOError: Another has it.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
