"""A bundle's files: found, read, and held against what its manifest says of them."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from echoatt_runtime.bundle.onnx_file import (
    ExternalTensor,
    OnnxFile,
    read_metadata,
    read_onnx_file,
)
from echoatt_runtime.contract import (
    ELEMENT_TYPES,
    MODEL_FILE,
    BundleFile,
    Manifest,
    Specification,
)
from echoatt_runtime.errors import BundleNotFoundError, DamagedBundleError

_HASHED_AT_ONCE: Final = 1 << 20
# More than any tokenizer's; what is larger is not read into memory
_LARGEST_COMPANION: Final = 256 << 20
# Of weights that begin at a page of the largest kind
_MOST_PADDING: Final = 64 << 10

# A graph without them runs each of its nodes once, and so comes to an end
_LOOPS: Final = frozenset(("Loop", "Scan", "SequenceMap"))

_ELEMENT_BYTES: Final = {element.onnx: element.bytes for element in ELEMENT_TYPES.values()}


def find_model(path: str | os.PathLike[str]) -> Path:
    """The model file that `path` means: the file itself, or model.onnx in a directory.

    Raises:
        BundleNotFoundError: There is no such file.
    """
    try:
        path = Path(path)
    except TypeError as error:
        raise BundleNotFoundError(
            f"{path!r} is no path; give an .onnx file or a directory that holds {MODEL_FILE}"
        ) from error
    try:
        model_path = path / MODEL_FILE if path.is_dir() else path
        found = model_path.is_file()
    # A name with a null character, or one that is too long
    except (OSError, ValueError):
        model_path, found = path, False
    if not found:
        raise BundleNotFoundError(
            f"there is no bundle at {model_path}; "
            f"give an .onnx file or a directory that holds {MODEL_FILE}"
        )
    return model_path


def read_manifest(path: str | Path) -> Manifest:
    """A bundle's manifest, read without looking at its other files.

    Args:
        path: The .onnx file, or a directory that holds model.onnx.

    Raises:
        BundleError: There is no such file, or it is foreign, newer or damaged.
    """
    model_path = find_model(path)
    return Manifest.from_metadata(read_metadata(model_path), str(model_path))


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are there and fit its manifest.

    Attributes:
        model: The model file.
        manifest: What it says of itself.
        identity: What told its model and weight file from others of the same names when they were
            checked.
    """

    model: Path
    manifest: Manifest
    identity: tuple[tuple[int, int, int], ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Bundle:
        """Find a bundle and check its files.

        Its place is kept as an absolute path: the working directory may change afterwards.

        The graph is always held against its hash, and every file's size. Nothing but the model file
        is read without `verify`.

        Args:
            path: The .onnx file, or a directory that holds model.onnx.
            verify: Hash the files beside the model too, which reads all of them.

        Raises:
            BundleNotFoundError: There is no such file.
            ForeignModelError: The file carries no EchoAtt manifest.
            NewerFormatError: The bundle needs a newer runtime.
            DamagedBundleError: A file is absent, is not what the manifest says, or is outside the
                bundle's directory.
        """
        model = find_model(path).absolute()
        _refuse_link(model, model.lstat())
        first = _identity(model)
        onnx = read_onnx_file(model)
        manifest = Manifest.from_metadata(onnx.metadata, str(model))
        bundle = cls(model, manifest, first + _identity(model.with_name(manifest.weights.name)))
        bundle._check_graph(onnx)
        for file in manifest.files:
            bundle._check(file)
        bundle._check_external(onnx)
        if verify:
            bundle._verify()
        return bundle

    @property
    def specification(self) -> Specification:
        """What the graph computes."""
        return self.manifest.specification

    @property
    def weights(self) -> Path:
        """The external data file."""
        return self.model.with_name(self.manifest.weights.name)

    def companion(self, name: str) -> Path | None:
        """A file that belongs to the bundle; None if it has no such file.

        Whatever else lies beside the model is another's.

        Args:
            name: Such as "tokenizer.json".
        """
        for file in self.manifest.companions:
            path = self.model.with_name(name)
            if file.name == name and (file.bytes is not None or path.is_file()):
                return path
        return None

    def is_unchanged(self) -> bool:
        """Whether model and weight file are still those that were checked."""
        return _identity(self.model, self.weights) == self.identity

    def _check(self, file: BundleFile) -> None:
        path = self.model.with_name(file.name)
        try:
            found = path.lstat()
        except OSError as error:
            if file.bytes is None and isinstance(error, FileNotFoundError):
                return
            raise DamagedBundleError(
                f"{self.model} has lost its file {file.name}; copy it into the same directory"
            ) from error
        _refuse_link(path, found)
        if file.bytes is not None and found.st_size != file.bytes:
            raise DamagedBundleError(
                f"{path} has {found.st_size} bytes instead of {file.bytes}; "
                "it is cut short or belongs to another model: copy or export it again"
            )
        if file.role != self.manifest.weights.role and found.st_size > _LARGEST_COMPANION:
            raise DamagedBundleError(f"{path} has {found.st_size} bytes; export it again")

    def _check_external(self, onnx: OnnxFile) -> None:
        """Check that the weight file is what the graph reads its weights from, no more nor less."""
        size = self.weights.stat().st_size
        used = max((tensor.offset + (tensor.length or 0) for tensor in onnx.external), default=0)
        if size > used + _MOST_PADDING:
            raise DamagedBundleError(
                f"{self.weights} has {size} bytes, and the weights of the graph end at {used};"
                " export it again"
            )
        for tensor in onnx.external:
            for fault in _external_faults(tensor, self.manifest.weights.name, size):
                raise DamagedBundleError(
                    f"the weight {tensor.name!r} of {self.model} {fault}; export it again"
                )

    def _check_graph(self, onnx: OnnxFile) -> None:
        """Check that the graph is the exporter's, by the hash that is there anyway, and ends."""
        expected = self.manifest.graph_sha256
        if expected is not None and onnx.graph_sha256 != expected:
            raise DamagedBundleError(
                f"the graph of {self.model} is not the one that was exported (its hash differs); "
                "copy or export it again"
            )
        if loops := onnx.operators & _LOOPS:
            raise DamagedBundleError(
                f"the graph of {self.model} has loops ({', '.join(sorted(loops))}), which no"
                " decoder of ours has; export it again"
            )

    def _verify(self) -> None:
        for file in self.manifest.files:
            path = self.model.with_name(file.name)
            if file.sha256 is not None and file_sha256(path) != file.sha256:
                raise DamagedBundleError(
                    f"{path} is not the file that was exported (its hash differs); "
                    "copy or export it again"
                )


def _identity(*paths: Path) -> tuple[tuple[int, int, int], ...]:
    """Node, size and time of change of each file; zeros for one that is not there."""
    found = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _refuse_link(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise DamagedBundleError(
            f"{path} is a link or no plain file; a bundle's files lie beside its model: copy the"
            " file itself there"
        )


def _external_faults(tensor: ExternalTensor, weights: str, size: int) -> Iterator[str]:
    if tensor.location != weights:
        location = os.fsencode(tensor.location).decode("ascii", "backslashreplace")
        yield f"is in {location!r} and not in the bundle's {weights}"
    length = tensor.length
    if length is None or tensor.offset < 0 or length < 0 or tensor.offset + length > size:
        yield f"is not inside {weights}"
    elif any(dim < 0 for dim in tensor.dims):
        yield f"has the shape {list(tensor.dims)}"
    elif tensor.element_type not in _ELEMENT_BYTES:
        yield f"has elements of type {tensor.element_type}"
    elif math.prod(tensor.dims) * _ELEMENT_BYTES[tensor.element_type] != length:
        yield f"has {length} bytes for the shape {list(tensor.dims)}"
