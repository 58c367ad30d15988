"""Publishing: what is staged moves into place, one publication in a directory at a time.

An older model file is removed first and the new one moves last. Whatever moment the process dies
at, and whatever moment a reader comes at, no model file stands beside weights or companions that
are not its own: the old bundle is whole, or the new one is, or there is no model file. The last is
the state of some microseconds; where it is left behind, `finish` completes the publication.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from echoatt_exporter.bundle.companions import check_companions
from echoatt_exporter.bundle.lock import Lock
from echoatt_exporter.bundle.place import BundlePath
from echoatt_exporter.bundle.stage import PREFIX, Stage
from echoatt_exporter.errors import ExportError

_LOCK_FILE = f"{PREFIX}lock"

# A publication takes milliseconds; what takes longer has stopped
_LONGEST_WAIT_S = 20.0
_POLL_S = 0.02


def publish(stage: Stage, out: BundlePath, *, force: bool) -> None:
    """Move a whole bundle into place.

    Of two exports to one place the later wins whole, or without `force` is refused.

    Args:
        stage: Holds the bundle.
        out: Where it goes.
        force: Overwrite what is there.

    Raises:
        OutputExistsError: Something is there by now, and not `force`.
        ExportError: Another publication there does not end, or something is in the way.
        OSError: The file system refuses.
    """
    with _sole_publication(out.place):
        out.check_free(force=force)
        check_companions(stage.bundle, out.place, force=force)
        stage.begin_publication(out.model.name)
        _move(stage, out)


def finish(stage: Stage) -> None:
    """Complete a publication that was cut off; do nothing if none was.

    Args:
        stage: Of a process that is gone.

    Raises:
        ExportError: Another publication there does not end.
        OSError: The file system refuses.
    """
    if stage.cut_off() is None:
        return
    with _sole_publication(stage.root.parent):
        out = stage.cut_off()
        if out is not None:
            _move(stage, out)


def _move(stage: Stage, out: BundlePath) -> None:
    out.model.unlink(missing_ok=True)
    last = stage.bundle / out.model.name
    for path in sorted(stage.bundle.iterdir(), key=lambda path: path == last):
        path.replace(out.place / path.name)


@contextlib.contextmanager
def _sole_publication(place: Path) -> Iterator[None]:
    path = place / _LOCK_FILE
    end = time.monotonic() + _LONGEST_WAIT_S
    while (lock := Lock.take(path)) is None:
        if time.monotonic() > end:
            raise ExportError(
                f"{place}: another export is publishing there and does not end; try again later"
            )
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
