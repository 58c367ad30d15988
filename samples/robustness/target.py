"""What cases are made of: good directories, the copy that is spoilt, and its manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import onnx
from google.protobuf.message import DecodeError

from echoatt_runtime.bundle import file_sha256, read_manifest, read_onnx_file
from echoatt_runtime.contract import METADATA_KEY
from echoatt_runtime.errors import BundleError

MODEL: Final = "model.onnx"
SECRET: Final = "OUTSIDE-SECRET"  # noqa: S105  what must never be seen


# Fields that format 2 had by the same names
_KEPT: Final = (
    "family",
    "layer_kinds",
    "sliding_window",
    "vocab_size",
    "context_length",
    "dtype",
    "device",
    "bos_token_id",
    "eos_token_ids",
    "pad_token_id",
)


@dataclass(frozen=True, slots=True)
class Goods:
    """Whole directories, by name.

    Attributes:
        bundles: Exported ones: shared in fp32, and unshared in int4.
        checkpoints: A teacher in one file, one in shards, and a student.
    """

    bundles: dict[str, Path]
    checkpoints: dict[str, Path]


def find_goods(folder: Path) -> Goods:
    """What `samples.robustness.goods` made in a folder."""
    return Goods(
        {name: folder / name for name in ("fp32", "int4")},
        {name: folder / name for name in ("teacher", "shards", "student")},
    )


@dataclass(frozen=True, slots=True)
class Target:
    """Where a case happens.

    Attributes:
        folder: A copy of a good directory, which is changed.
        other: A good directory of another model, which is not.
        outside: A directory beside the first that nobody may read from.
    """

    folder: Path
    other: Path
    outside: Path

    @property
    def stage(self) -> Path:
        """A place beside the first for what is written."""
        return self.folder.parent / "stage"

    def files(self) -> list[Path]:
        """The plain files that there are, by name."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def some_file(self, random: Random) -> Path:
        """One of the files; the ones that matter most, most often."""
        files = self.files()
        weights = [3 if path.suffix in (".onnx", ".safetensors") else 1 for path in files]
        return random.choices(files, weights)[0]


Mutation = Callable[[Random, Target], str]
"""Changes a target's directory; gives a few words on what it did."""


def read_manifest_text(folder: Path) -> str:
    """The manifest of a bundle, as it stands in the model file."""
    return read_onnx_file(folder / MODEL).metadata[METADATA_KEY]


def write_manifest_text(folder: Path, *texts: str) -> None:
    """Put manifests in the place of a bundle's own: one, none or several."""
    model = onnx.load(folder / MODEL, load_external_data=False)
    del model.metadata_props[:]
    for text in texts:
        # Text that is no Unicode cannot be in the file
        model.metadata_props.add(key=METADATA_KEY, value=text.encode("utf-8", "replace").decode())
    (folder / MODEL).write_bytes(model.SerializeToString())


def format_2(bundle: Path) -> dict[str, Any]:
    """A bundle's manifest as the format before the present one had it."""
    manifest = read_manifest(bundle)
    specification = manifest.specification
    return {
        "format": "echoatt-bundle/2",
        "exporter_version": manifest.exporter_version,
        **{name: getattr(specification, name) for name in _KEPT},
        "sources": specification.plan.sources,
        "num_query_heads": specification.query_heads[0],
        "num_kv_heads": specification.kv_heads[0],
        "head_dim": specification.head_dims[0],
        "source_checkpoint": {
            "name": specification.source_checkpoint.name,
            "sha256": specification.source_checkpoint.sha256,
        },
        "weights_file": manifest.weights.name,
        "weights_bytes": manifest.weights.bytes,
        "verification": None,
    }


def make_fit(folder: Path) -> None:
    """Let a bundle's manifest say the sizes and hashes that its files have now.

    It is what somebody does who plants a fault on purpose. What cannot be read stays as it is.
    """
    if not (folder / MODEL).is_file():  # a pipe would be waited for
        return
    try:
        manifest: dict[str, Any] = json.loads(read_manifest_text(folder))
        manifest["graph_sha256"] = _graph_sha256(folder / MODEL)
        for file in manifest["files"]:
            path = folder / file["name"]
            if path.is_file():
                file["bytes"] = path.stat().st_size
                # A sparse file of gigabytes would take its time
                file["sha256"] = file_sha256(path) if file["bytes"] < 1 << 26 else "0" * 64
        write_manifest_text(folder, json.dumps(manifest))
    except (BundleError, DecodeError, KeyError, ValueError, TypeError, OSError):
        return


def _graph_sha256(path: Path) -> str:
    """The hash of the graph's bytes as they will be written."""
    model = onnx.load(path, load_external_data=False)
    return hashlib.sha256(model.graph.SerializeToString()).hexdigest()
