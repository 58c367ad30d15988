"""Makes the models that peers run: the unshared checkpoint in each one's own form, kept on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig

from echoatt_exporter.architecture import DecoderArchitecture, architecture_of
from echoatt_exporter.bench.engines import EngineSpec, why_absent
from echoatt_exporter.bench.gguf_file import TENSOR_TYPES, gguf_weight_bytes, write_gguf
from echoatt_exporter.bench.weight_bytes import onnx_weight_bytes
from echoatt_exporter.errors import BenchError
from echoatt_exporter.quantise.block_quantizer import BLOCK_SIZE

_FLOAT32, _FLOAT16 = 4, 2


def peer_engine(peer: str, checkpoint: Path, work: Path, dtype: str) -> EngineSpec:
    """A peer with the unshared model, made now unless it was made before.

    Args:
        peer: `genai`, `torch` or `llama.cpp`.
        checkpoint: The unshared checkpoint.
        work: A directory of this checkpoint's own, in which models are kept.
        dtype: The bundles' dtype; torch always runs float32.

    Raises:
        BenchError: The peer is not installed or cannot have this model.
    """
    if reason := why_absent(peer):
        raise BenchError(f"{peer} cannot run: {reason}")
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    architecture = architecture_of(config)
    work.mkdir(parents=True, exist_ok=True)
    make = {"genai": _genai, "torch": _torch, "llama.cpp": _llama_cpp}[peer]
    return make(checkpoint, work, dtype, architecture)


def _genai(
    checkpoint: Path, work: Path, dtype: str, architecture: DecoderArchitecture
) -> EngineSpec:
    directory = work / f"genai-{version('onnxruntime-genai')}-{dtype}"
    if not directory.is_dir():
        _build_genai(checkpoint, directory, dtype)
    weight_bytes = onnx_weight_bytes(directory / "model.onnx")
    return _engine("genai", directory, dtype, architecture, weight_bytes, _FLOAT32)


def _build_genai(checkpoint: Path, directory: Path, dtype: str) -> None:
    """Run genai's own builder; quantised weights have our block size and accuracy level."""
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.partial")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(checkpoint), "-o", str(partial / "model")]
    command += ["-p", dtype, "-e", "cpu", "-c", str(partial / "cache")]
    if dtype != "fp32":
        command += ["--extra_options", f"block_size={BLOCK_SIZE}", "accuracy_level=4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(  # noqa: S603  # our own interpreter
            command, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise BenchError(f"onnxruntime-genai's builder failed for {checkpoint}: {last.strip()}")
        (partial / "model").replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _torch(
    checkpoint: Path, _work: Path, _dtype: str, architecture: DecoderArchitecture
) -> EngineSpec:
    return _engine("torch", checkpoint, "fp32", architecture, None, _FLOAT32)


def _llama_cpp(
    checkpoint: Path, work: Path, dtype: str, architecture: DecoderArchitecture
) -> EngineSpec:
    path = work / f"{TENSOR_TYPES[dtype]}.gguf"
    if not path.is_file():
        write_gguf(checkpoint, path, dtype)
    weight_bytes = gguf_weight_bytes(path)
    return _engine("llama.cpp", path, dtype, architecture, weight_bytes, _FLOAT16)


def _engine(
    kind: str,
    path: Path,
    dtype: str,
    architecture: DecoderArchitecture,
    weight_bytes: int | None,
    element_bytes: int,
) -> EngineSpec:
    by_layer = zip(architecture.kv_heads, architecture.head_dims, strict=True)
    rows = sum(heads * size for heads, size in by_layer)
    shown = TENSOR_TYPES[dtype] if kind == "llama.cpp" else dtype
    return EngineSpec(
        name=f"{kind} {shown}",
        kind=kind,
        path=path,
        dtype=dtype,
        sharing=0.0,
        weight_bytes=weight_bytes,
        cache_bytes_per_token=2 * rows * element_bytes,
        context_length=architecture.context_length,
        vocab_size=architecture.vocab_size,
    )
