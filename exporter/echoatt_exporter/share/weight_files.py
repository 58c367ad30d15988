"""The weight files of a model directory: which they are, what they hold, and their digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from echoatt_exporter.errors import CheckpointError, UnsupportedModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# By safetensors' names. What is not here is an integer or an 8-bit float, never a dense weight.
DENSE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# Masks and angles that older versions of transformers saved beside the weights, and compute now
_NO_WEIGHT = re.compile(
    r"(?:^|\.)(?:(?:self_)?(?:attn|attention)\.(?:masked_)?bias"
    r"|rotary_emb\.(?:inv_freq|cos_cached|sin_cached)|position_ids)$"
)
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHERS = {"*.gguf": "of GGUF", "*.onnx": "of an ONNX model", "*.h5": "of TensorFlow"}
_OTHERS |= {"*.msgpack": "of Flax", "*.safetensors": "under other names"}
_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its file's header describes it.

    Attributes:
        dtype: Safetensors' name, `F16` for one.
        shape: Its dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return torch.Size(self.shape).numel()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        CheckpointError: It cannot be read, is not JSON, or is no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return data


def is_weight(name: str) -> bool:
    """Whether a stored tensor may be a weight: what transformers computes by itself is none."""
    return _NO_WEIGHT.search(name) is None


def few(names: Iterable[str]) -> str:
    """The count and the first three of `names`, sorted."""
    found = sorted(names)
    more = ", …" if len(found) > 3 else ""
    return f"{len(found)} ({', '.join(found[:3])}{more})"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers would load from `directory`, in name order.

    Raises:
        CheckpointError: There are none, only pickled ones, or the index and the files disagree.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = directory / INDEX
    if index.is_file():
        return _indexed_files(index)
    pickled = sorted(p.name for pattern in _PICKLE_PATTERNS for p in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory}: its weights are pickled ({pickled[0]}), and unpickling can run any code;"
            " load it once with transformers where you trust it, and save_pretrained() it to get"
            f" {SINGLE}"
        )
    for pattern, kind in _OTHERS.items():
        if others := sorted(path.name for path in directory.glob(pattern)):
            raise CheckpointError(
                f"{directory}: no weights but those {kind} ({others[0]}); expected {SINGLE} or"
                f" {INDEX}, as the Hugging Face checkpoint has"
            )
    raise CheckpointError(
        f"{directory}: no weights; expected {SINGLE} or {INDEX}; download the whole checkpoint"
    )


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise CheckpointError(f'{index}: "weight_map" must name a file for each tensor')
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{index}: names files outside its directory: {few(outside)}")
    # Looking names up would fail for those that no file can have
    there = {path.name for path in index.parent.iterdir() if path.is_file()}
    if missing := [shard for shard in shards if shard not in there]:
        raise CheckpointError(
            f"{index}: names weight files that are missing: {few(missing)}; download them again"
        )
    return [index.parent / shard for shard in shards]


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every weight in `files` by name, from the headers alone.

    Raises:
        CheckpointError: A truncated or corrupt file, or a tensor that two files hold.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                header = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                found = {
                    name: StoredTensor(view.get_dtype(), tuple(view.get_shape()))
                    for name, view in header.items()
                    if is_weight(name)
                }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: truncated or corrupt ({error}); copy or download it again"
            ) from error
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(f"{file}: holds tensors of another file too: {few(twice)}")
        tensors |= found
    return tensors


def stored_dtype(tensors: Mapping[str, StoredTensor], directory: Path) -> torch.dtype:
    """The dtype that most weights of a checkpoint are stored in.

    Raises:
        CheckpointError: There are no tensors.
        UnsupportedModelError: Most weights are integers or 8-bit floats.
    """
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.elements
    if not counts:
        raise CheckpointError(f"{directory}: its weight files hold no tensors")
    name = counts.most_common(1)[0][0]
    if name not in DENSE_DTYPES:
        raise UnsupportedModelError(
            f"{directory}: its weights are quantised ({name}); EchoAtt needs a dense checkpoint"
            f" ({', '.join(DENSE_DTYPES)}) and quantises on export"
        )
    return DENSE_DTYPES[name]


def checkpoint_digest(path: str | Path) -> str:
    """The SHA-256 of a checkpoint: its config.json, then its safetensors files in name order.

    Names and sizes are hashed too, so that bytes cannot move from one file to another unseen.

    Args:
        path: A model directory.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: No config.json, or no weights.
    """
    directory = Path(path)
    digest = hashlib.sha256()
    for file in [directory / "config.json", *weight_files(directory)]:
        try:
            with file.open("rb") as opened:
                digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
                while block := opened.read(_READ_BYTES):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
