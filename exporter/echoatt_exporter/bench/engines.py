"""What is measured: bundles, and the peers beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from echoatt_exporter.bench.weight_bytes import onnx_weight_bytes
from echoatt_exporter.errors import BenchError
from echoatt_runtime.bundle import find_model, read_manifest

# Each peer's packages by import name, and how to get them
PEERS: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "genai": (("onnxruntime_genai", "onnx_ir"), "pip install onnxruntime-genai onnx-ir"),
    "torch": (("torch", "transformers"), "pip install torch transformers"),
    "llama.cpp": (("llama_cpp", "gguf"), "pip install llama-cpp-python gguf"),
}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine with one model.

    Attributes:
        name: As it stands in tables; no two are the same.
        kind: `echoatt`, `genai`, `torch` or `llama.cpp`.
        path: The model that the engine loads.
        dtype: Of its weights.
        sharing: Followers / layers.
        weight_bytes: Bytes of weights that a decoding step reads; None lets the engine say.
        cache_bytes_per_token: Bytes that a token of a row keeps; None lets the engine say.
        context_length: Most tokens of a row.
        vocab_size: Tokens are below this.
    """

    name: str
    kind: str
    path: Path
    dtype: str
    sharing: float
    weight_bytes: int | None
    cache_bytes_per_token: int | None
    context_length: int
    vocab_size: int

    @property
    def is_bundle(self) -> bool:
        """Whether this is EchoAtt itself, and not a peer."""
        return self.kind == "echoatt"


def bundle_engines(paths: Sequence[str | Path]) -> list[EngineSpec]:
    """The engines of bundles.

    Args:
        paths: Model files or their directories.

    Raises:
        BundleError: One of them is none, or is damaged.
        BenchError: A bundle is for a GPU, or they disagree on the vocabulary.
    """
    found = []
    for path in paths:
        model = find_model(path)
        specification = read_manifest(model).specification
        if specification.device != "cpu":
            raise BenchError(
                f"{model} is a bundle for {specification.device}; the bench runs on CPUs"
            )
        sharing = specification.plan.ratio
        found.append(
            EngineSpec(
                name=f"EchoAtt {specification.dtype} {sharing:.0%}",
                kind="echoatt",
                path=model,
                dtype=specification.dtype,
                sharing=sharing,
                weight_bytes=onnx_weight_bytes(model),
                cache_bytes_per_token=specification.cache_bytes_per_token,
                context_length=specification.context_length,
                vocab_size=specification.vocab_size,
            )
        )
    if len({engine.vocab_size for engine in found}) > 1:
        raise BenchError(
            "the bundles have different vocabularies, so that they cannot be given the same tokens;"
            " bench bundles of one model together"
        )
    return _told_apart(found)


def _told_apart(engines: list[EngineSpec]) -> list[EngineSpec]:
    """Engines whose names differ: where they would not, the file's place is added."""
    from dataclasses import replace

    names = [engine.name for engine in engines]
    return [
        replace(engine, name=f"{engine.name} ({engine.path.parent.name}/{engine.path.stem})")
        if names.count(engine.name) > 1
        else engine
        for engine in engines
    ]


def why_absent(peer: str) -> str | None:
    """Why a peer cannot run here, with the command that changes it; None where it can."""
    packages, install = PEERS[peer]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} not installed; {install}"
