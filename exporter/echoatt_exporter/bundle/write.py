"""Writing a bundle: the model file, its weight file and the tokenizer files, whole or not at all.

Everything is written and verified in a staging directory beside the output and then moved into
place. The model file moves last and is removed first when an older bundle is replaced, so that
whatever moment the process dies at, no model file stands next to weights that are not its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import filecmp
import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from echoatt_exporter.errors import ExportError, OutputExistsError
from echoatt_exporter.graph import check_file
from echoatt_exporter.share.checkpoint import save_tokenizer
from echoatt_runtime.bundle import Bundle, file_sha256, read_onnx_file
from echoatt_runtime.contract import (
    COMPANION,
    METADATA_KEY,
    WEIGHTS,
    BundleFile,
    Manifest,
    Specification,
    Verification,
)
from echoatt_runtime.ort import has_cuda

# Read by people and tools beside the bundle; the runtime itself reads the manifest.
_CONFIG_FILES = ("config.json", "generation_config.json")

# Tensors up to this size stay in the model file: shapes and scalars, needed at once.
_INLINE_BYTES = 1024

# Bounds what is held in memory while lazily evaluated weights are written.
_IN_FLIGHT_BYTES = 256 * 2**20


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
        return cls(path if path.suffix == ".onnx" else path / "model.onnx")

    @property
    def weights(self) -> Path:
        """The external data file."""
        return self.model.with_name(self.model.name + ".data")

    def check_free(self, *, force: bool) -> None:
        """Refuse to overwrite, before any work is done.

        Raises:
            OutputExistsError: Model or weight file exist, and not `force`.
            ExportError: The output's directory cannot be made or is a file.
        """
        if self.model.is_dir():
            raise ExportError(f"{self.model} is a directory; name a file for the model")
        for path in (self.model, self.weights):
            if path.exists() and not force:
                raise OutputExistsError(f"{path} exists; choose another name or pass --force")
        try:
            self.model.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(
                f"{self.model.parent}: cannot make the directory ({error})"
            ) from error


def write_bundle(
    model: ir.Model,
    specification: Specification,
    out: BundlePath,
    copy_files: Callable[[Path], None],
    *,
    force: bool,
    verify: Callable[[Bundle], Verification | None],
    on_weight: Callable[[int, int], None] = lambda _done, _total: None,
) -> Manifest:
    """Write, check, verify and publish a bundle.

    Args:
        model: The finished graph.
        specification: What it computes.
        out: Where it goes.
        copy_files: Puts the files that belong beside the model into a directory.
        force: Overwrite what is there.
        verify: Compares the staged bundle with PyTorch; raises what it must.
        on_weight: Called with (tensors written, tensors in all).

    Returns:
        The manifest as published.

    Raises:
        OutputExistsError: Something is there already, and not `force`.
        ExportError: No room, or the file system refuses.
        ContractError: The written file is not clean.
    """
    out.check_free(force=force)
    with _os_errors(out.model), _staging(out.model.parent) as stage:
        copy_files(stage)
        companions = [_describe(path, COMPANION) for path in sorted(stage.iterdir())]
        _check_companions(stage, out.model.parent, force=force)
        staged = BundlePath(stage / out.model.name)
        _check_room(model, stage)
        _save(model, staged, on_weight)
        manifest = Manifest(
            exporter_version=importlib.metadata.version("echoatt"),
            specification=specification,
            graph_sha256=read_onnx_file(staged.model).graph_sha256,
            files=(_describe(staged.weights, WEIGHTS), *companions),
        )
        bare = staged.model.stat().st_size
        _stamp(staged.model, bare, manifest)
        check_file(staged.model, _checking_device(specification))
        verification = verify(Bundle.open(staged.model, verify=True))
        manifest = dataclasses.replace(manifest, verification=verification)
        _stamp(staged.model, bare, manifest)
        _publish(staged, out)
    return manifest


def _describe(path: Path, role: str) -> BundleFile:
    return BundleFile(
        name=path.name, role=role, bytes=path.stat().st_size, sha256=file_sha256(path)
    )


def copy_checkpoint_files(source: Path, target: Path, *, trust_remote_code: bool = False) -> None:
    """Put tokenizer, chat template and configurations of a checkpoint beside a model.

    Args:
        source: The checkpoint's directory.
        target: An existing directory.
        trust_remote_code: Let a tokenizer run code of the checkpoint's own.

    Raises:
        CheckpointError: There is a tokenizer, and it cannot be loaded.
    """
    save_tokenizer(source, target, trust_remote_code=trust_remote_code)
    for name in _CONFIG_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def copy_companions(bundle: Bundle, target: Path) -> None:
    """Copy what belongs beside a bundle's model to another directory."""
    for file in bundle.manifest.companions:
        if (path := bundle.companion(file.name)) is not None:
            shutil.copyfile(path, target / file.name)


def _save(model: ir.Model, staged: BundlePath, on_weight: Callable[[int, int], None]) -> None:
    # A graph read from a bundle brings that bundle's
    model.metadata_props.pop(METADATA_KEY, None)
    done = 0

    def report(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        nonlocal done
        done += 1
        on_weight(done, info.total)

    ir.save(
        model,
        staged.model,
        external_data=staged.weights.name,
        size_threshold_bytes=_INLINE_BYTES,
        callback=report,
        max_workers=2,
        max_in_flight_bytes=_IN_FLIGHT_BYTES,
    )
    # A graph without a single large tensor still has the file that its manifest names
    staged.weights.touch()


def _checking_device(specification: Specification) -> str | None:
    """The device that loads the written file for the check."""
    if specification.device == "cuda" and has_cuda():
        return "cuda"
    # ONNX Runtime's CPU provider has no bfloat16 MatMul
    return None if specification.dtype == "bf16" else "cpu"


def _stamp(path: Path, bare: int, manifest: Manifest) -> None:
    """Write the manifest behind what a model file has in its first `bare` bytes.

    Fields of a protobuf message may come one after the other in any order, so nothing that is
    there is written again.
    """
    entry = onnx.ModelProto()
    onnx.helper.set_model_props(entry, {METADATA_KEY: manifest.to_json()})
    with path.open("r+b") as file:
        file.truncate(bare)
        file.seek(bare)
        file.write(entry.SerializeToString())


def _check_room(model: ir.Model, stage: Path) -> None:
    needed = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    free = shutil.disk_usage(stage).free
    if free < needed:
        raise ExportError(
            f"{stage.parent}: the weights take {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are"
            " free; make room or choose another disk"
        )


def _check_companions(stage: Path, target: Path, *, force: bool) -> None:
    """Refuse to replace another model's tokenizer."""
    if force:
        return
    for path in stage.iterdir():
        there = target / path.name
        if there.exists() and not filecmp.cmp(path, there, shallow=False):
            raise OutputExistsError(
                f"{there} exists and differs from what goes beside this model (it may be another"
                " model's); choose an empty directory, or pass --force to replace it"
            )


def _publish(staged: BundlePath, out: BundlePath) -> None:
    out.model.unlink(missing_ok=True)
    for path in sorted(staged.model.parent.iterdir(), key=lambda path: path == staged.model):
        path.replace(out.model.parent / path.name)


@contextlib.contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    stage = Path(tempfile.mkdtemp(prefix=".echoatt-", dir=parent))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"{path}: no room left on the disk; nothing was published") from error
        raise ExportError(f"{path}: cannot write ({error}); nothing was published") from error
