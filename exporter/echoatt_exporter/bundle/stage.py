"""Staging: a folder beside a bundle's place, in which the bundle is made whole.

Being on the same file system, what is in it can be moved into place without copying. It is locked
for as long as its process lives, so that whoever finds it knows whether it is still needed.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from echoatt_exporter.bundle.lock import Lock
from echoatt_exporter.bundle.place import BundlePath, writing_to
from echoatt_exporter.errors import ExportError

PREFIX = ".echoatt-"

# Another export may sweep a folder away in the moment before it is locked
_TRIES = 20


@dataclass(frozen=True, slots=True)
class Stage:
    """A staging folder.

    Attributes:
        root: The folder itself, which goes away as a whole.
    """

    root: Path

    @property
    def bundle(self) -> Path:
        """The directory of what is to be published, and of nothing else."""
        return self.root / "bundle"

    @property
    def lock_file(self) -> Path:
        """The file whose lock says that the stage is in use."""
        return self.root / "lock"

    def begin_publication(self, model: str) -> None:
        """Note that the bundle is whole and may be moved into place.

        Args:
            model: Name of its model file.
        """
        self._note.write_text(model, encoding="utf-8")

    def cut_off(self) -> BundlePath | None:
        """Where a bundle belongs whose publication began and did not end; None without one.

        A model file that is there says that nothing is amiss: the bundle's own, which moves last;
        the one before it, which is removed first; or one that somebody put there since.
        """
        try:
            name = self._note.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        out = BundlePath(self.root.parent / name)
        whole = (self.bundle / name).is_file() and not out.model.exists()
        return out if whole else None

    @property
    def _note(self) -> Path:
        return self.root / "publishing"


@contextlib.contextmanager
def open_stage(place: Path) -> Iterator[Stage]:
    """Make a staging folder, and remove it in the end.

    It stays only where a publication from it was cut off: the next export there completes it.

    Args:
        place: The directory beside whose files it is needed; made if need be, and removed again if
            nothing came into it.

    Raises:
        ExportError: The directory cannot be made or written to.
    """
    missing = [path for path in (place, *place.parents) if not path.exists()]
    try:
        with writing_to(place):
            stage, lock = _make(place)
        try:
            yield stage
        finally:
            if stage.cut_off() is None:
                shutil.rmtree(stage.root, ignore_errors=True)
            lock.release()
    finally:
        for directory in missing:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _make(place: Path) -> tuple[Stage, Lock]:
    for _ in range(_TRIES):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"{place}: cannot make the directory ({error})") from error
        # The directory may have gone again, with an export that had made it and failed
        with contextlib.suppress(FileNotFoundError):
            stage = Stage(Path(tempfile.mkdtemp(prefix=PREFIX, dir=place)))
            if (lock := _lock(stage)) is not None:
                return stage, lock
    raise ExportError(f"{place}: cannot keep a staging folder there; something removes it")


def _lock(stage: Stage) -> Lock | None:
    try:
        lock = Lock.take(stage.lock_file)
        if lock is not None:
            stage.bundle.mkdir()
    except OSError:
        shutil.rmtree(stage.root, ignore_errors=True)
        raise
    return lock
