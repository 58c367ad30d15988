"""Where a bundle goes, and what is refused about that before any work is done."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from echoatt_exporter.errors import ExportError, OutputExistsError
from echoatt_runtime.contract import MODEL_FILE
from echoatt_runtime.errors import one_line


@dataclass(frozen=True, slots=True)
class BundlePath:
    """Where a bundle goes.

    Attributes:
        model: The `.onnx` file.
    """

    model: Path

    @classmethod
    def of(cls, out: str | Path) -> BundlePath:
        """Read a command line's OUT: a `.onnx` file, or a directory for `model.onnx`."""
        path = Path(out)
        return cls(path if path.suffix == ".onnx" else path / MODEL_FILE)

    @property
    def place(self) -> Path:
        """The directory."""
        return self.model.parent

    @property
    def weights(self) -> Path:
        """The external data file."""
        return self.model.with_name(self.model.name + ".data")

    def check_free(self, *, force: bool) -> None:
        """Refuse to overwrite.

        Raises:
            OutputExistsError: Model or weight file exist, and not `force`.
            ExportError: One of them is a directory.
        """
        for path in (self.model, self.weights):
            if path.is_dir():
                raise ExportError(f"{path} is a directory; name another file for the model")
            if path.exists() and not force:
                raise OutputExistsError(f"{path} exists; choose another name or pass --force")


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Tell what the file system refuses as one line about `path`.

    Raises:
        ExportError: Instead of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"{path}: no room left on the disk; make room or choose another disk"
            ) from error
        raise ExportError(f"{path}: cannot write ({one_line(error)})") from error
