"""Opens a bundle and runs its graph: the lowest layer, without tokenizer or sampling.

Shapes: B batch, S new tokens, n wanted logits, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from echoatt_runtime.bundle.onnx_file import read_metadata
from echoatt_runtime.cache.kv_cache import KVCache
from echoatt_runtime.contract.manifest import (
    INPUT_IDS,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    Manifest,
)
from echoatt_runtime.errors import BundleNotFoundError, ContextOverflowError, DamagedBundleError
from echoatt_runtime.executor.step_buffers import Integers, Logits, StepBuffers
from echoatt_runtime.huge_pages import merge_pages_since, private_memory
from echoatt_runtime.ort import check_device, create_ort_session

MODEL_FILE: Final = "model.onnx"

_TENSOR_TYPES: Final = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
}


class Session:
    """A bundle, ready to run on one device. Several caches may be used with one session.

    Attributes:
        path: The model file.
        manifest: What the bundle says of itself.
        device: "cpu" or "cuda".
    """

    def __init__(self, path: Path, manifest: Manifest, device: str, ort_session: Any) -> None:
        self.path = path
        self.manifest = manifest
        self.device = device
        self._ort_session = ort_session

    def new_cache(self, batch: int, capacity: int, limit: int | None = None) -> KVCache:
        """Allocates zeroed caches.

        Args:
            batch: Rows.
            capacity: Tokens that each row has room for. `kv_cache.bucket_capacity` says what is
                sensible; `KVCache.reserve` makes more room later.
            limit: Most tokens that a row will ever hold; None stands for the context.
        """
        if limit is None:
            limit = self.manifest.context_length
        return KVCache(self._ort_session, self.manifest, self.device, batch, capacity, limit)

    def run(
        self, cache: KVCache, token_ids: Integers, past_lengths: Integers, logits_indices: Integers
    ) -> Logits:
        """Run new tokens through the model and writes them into the cache.

        Rows may be padded on the right with any token: the caller passes past lengths that do not
        count the pads, and later tokens overwrite them.

        Args:
            cache: Caches of this session with as many rows.
            token_ids: New tokens, [B, S].
            past_lengths: Valid tokens of each row before these, [B].
            logits_indices: Positions among the new tokens whose logits are wanted, [B, n].

        Returns:
            The logits, [B, n, V], float32, in memory of their own.

        Raises:
            ContextOverflowError: The cache has no room for the new tokens.
        """
        batch, new_tokens = token_ids.shape
        needed = int(past_lengths.max()) + new_tokens
        if needed > cache.capacity:
            raise ContextOverflowError(
                f"{needed} tokens do not fit a cache of {cache.capacity}; call its reserve first"
            )
        buffers = cache.step_buffers
        if buffers is None or not buffers.fit(token_ids, logits_indices):
            wanted, vocab_size = logits_indices.shape[1], self.manifest.vocab_size
            buffers = StepBuffers(cache.binding, batch, new_tokens, wanted, vocab_size)
            # Only decoding comes back with the same shapes, and its logits are small to copy
            cache.step_buffers = buffers if new_tokens == 1 else None
        buffers.fill(token_ids, past_lengths, logits_indices)
        self._ort_session.run_with_iobinding(cache.binding)
        return buffers.logits if cache.step_buffers is None else buffers.logits.copy()


def open_session(path: str | Path, device: str = "cpu", threads: int | None = None) -> Session:
    """Open a bundle.

    Args:
        path: The .onnx file, or a directory that holds model.onnx.
        device: "cpu" or "cuda"; a device that does not work is an error, never replaced.
        threads: CPU threads that one operator may use; None leaves it to ONNX Runtime.

    Raises:
        BundleNotFoundError: There is no such file.
        ForeignModelError: The file carries no EchoAtt manifest.
        NewerFormatError: The bundle needs a newer runtime.
        DamagedBundleError: Manifest, graph and weight file are incomplete or do not agree.
        OptionError: `threads` is not positive.
        DeviceError: The device is unknown, did not load, or cannot run the bundle's dtype.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    model_path = find_model(path)
    manifest = read_manifest(model_path)
    check_device(device, manifest.dtype, str(model_path))
    _check_weights(model_path, manifest)
    before = private_memory() if device == "cpu" else None
    ort_session = create_ort_session(model_path, device, threads)
    if before is not None:
        merge_pages_since(before)
    _check_contract(model_path, manifest, ort_session)
    return Session(model_path, manifest, device, ort_session)


def find_model(path: str | Path) -> Path:
    """The model file that `path` means: the file itself, or model.onnx in a directory.

    Raises:
        BundleNotFoundError: There is no such file.
    """
    path = Path(path)
    model_path = path / MODEL_FILE if path.is_dir() else path
    if not model_path.is_file():
        raise BundleNotFoundError(
            f"there is no bundle at {model_path}; "
            f"give an .onnx file or a directory that holds {MODEL_FILE}"
        )
    return model_path


def read_manifest(path: str | Path) -> Manifest:
    """A bundle's manifest, read without loading the model.

    Args:
        path: The .onnx file, or a directory that holds model.onnx.

    Raises:
        BundleError: As `open_session` does for a file that is not there, foreign, newer or damaged.
    """
    model_path = find_model(path)
    return Manifest.from_metadata(read_metadata(model_path), str(model_path))


def _check_weights(model_path: Path, manifest: Manifest) -> None:
    weights_path = model_path.parent / manifest.weights_file
    if not weights_path.is_file():
        raise DamagedBundleError(
            f"{model_path} has lost its weight file {manifest.weights_file}; "
            "copy it into the same directory"
        )
    size = weights_path.stat().st_size
    if size != manifest.weights_bytes:
        raise DamagedBundleError(
            f"{weights_path} has {size} bytes instead of {manifest.weights_bytes}; "
            "it is cut short or belongs to another model: copy or export it again"
        )


def _check_contract(model_path: Path, manifest: Manifest, ort_session: Any) -> None:
    """Check names, order, types and fixed dimensions of the graph's inputs and outputs."""
    cache_type = _TENSOR_TYPES[manifest.cache_element_type]

    def cache_dims(name: str) -> tuple[int | None, ...]:
        return (None, *manifest.cache_dims(name, None))

    integers = "tensor(int64)"
    inputs: list[tuple[str, str, tuple[int | None, ...]]] = [
        (INPUT_IDS, integers, (None, None)),
        (PAST_LENGTHS, integers, (None,)),
        (LOGITS_INDICES, integers, (None, None)),
        *((name, cache_type, cache_dims(name)) for name in manifest.past_names),
    ]
    outputs: list[tuple[str, str, tuple[int | None, ...]]] = [
        (LOGITS, _TENSOR_TYPES["float32"], (None, None, manifest.vocab_size)),
        *((name, cache_type, cache_dims(name)) for name in manifest.present_names),
    ]
    faults = [
        *_value_faults("input", inputs, ort_session.get_inputs()),
        *_value_faults("output", outputs, ort_session.get_outputs()),
    ]
    if faults:
        raise DamagedBundleError(
            f"the graph of {model_path} does not keep its manifest's contract: "
            f"{'; '.join(faults)}; export it again"
        )


def _value_faults(
    kind: str, wanted: list[tuple[str, str, tuple[int | None, ...]]], found: list[Any]
) -> list[str]:
    wanted_names, found_names = [name for name, _, _ in wanted], [value.name for value in found]
    faults = [f"{kind} {name} is missing" for name in wanted_names if name not in found_names]
    faults += [f"{kind} {name} is surplus" for name in found_names if name not in wanted_names]
    if not faults and wanted_names != found_names:
        faults.append(f"{kind}s are in the wrong order")
    found_by_name = {value.name: value for value in found}
    for name, tensor_type, dims in wanted:
        value = found_by_name.get(name)
        if value is None:
            continue
        if value.type != tensor_type:
            faults.append(f"{kind} {name} is {value.type}, not {tensor_type}")
        # Dimensions that the graph leaves open, or names, agree with any.
        agrees = len(value.shape) == len(dims) and all(
            dim is None or not isinstance(there, int) or there == dim
            for dim, there in zip(dims, value.shape, strict=True)
        )
        if not agrees:
            wanted_dims = ", ".join("?" if dim is None else str(dim) for dim in dims)
            faults.append(f"{kind} {name} has shape {value.shape}, not [{wanted_dims}]")
    return faults
