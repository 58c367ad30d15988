"""A tiny decoder as a numpy computation over whole sequences, and as a bundle made by hand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import tokenizers
from echoatt_runtime.executor.session import Session, open_session
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, pre_tokenizers

from echoatt_runtime import EchoModel
from echoatt_runtime.contract import METADATA_KEY, Manifest, SourceCheckpoint

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS = len(BYTES), len(BYTES) + 1

Array = npt.NDArray[Any]


def tiny_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "exporter_version": "0.1.0",
        "family": "llama",
        "sources": (0, 1, 1),
        "head_orders": (),
        "layer_kinds": ("full", "full", "full"),
        "sliding_window": None,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "vocab_size": len(BYTES) + 2,
        "context_length": 600,
        "dtype": "fp32",
        "device": "cpu",
        "bos_token_id": BOS,
        "eos_token_ids": (EOS,),
        "pad_token_id": None,
        "weights_file": "model.onnx.data",
        "weights_bytes": 1,
        "source_checkpoint": SourceCheckpoint(name="tiny", sha256="0" * 64),
        "verification": None,
    }
    return Manifest(**(fields | changes))


@dataclasses.dataclass(frozen=True)
class TinyDecoder:
    """Random weights of a decoder with learned positions and a follower layer.

    Shapes: S tokens, H query heads, N key/value heads, G = H/N, D head size, V vocabulary.
    """

    manifest: Manifest
    weights: dict[str, Array]

    @classmethod
    def random(cls, manifest: Manifest, seed: int = 0) -> TinyDecoder:
        generator = np.random.default_rng(seed)
        hidden = manifest.num_query_heads * manifest.head_dim
        kv_width = manifest.num_kv_heads * manifest.head_dim
        shapes = {
            "embedding": (manifest.vocab_size, hidden),
            "positions": (manifest.context_length, hidden),
            "head": (hidden, manifest.vocab_size),
        }
        for layer in range(manifest.num_layers):
            if not manifest.is_follower(layer):
                shapes[f"{layer}.query"] = (hidden, hidden)
                shapes[f"{layer}.key"] = (hidden, kv_width)
            shapes[f"{layer}.value"] = (hidden, kv_width)
            shapes[f"{layer}.output"] = (hidden, hidden)
        weights = {
            name: generator.normal(0, 0.4, shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        return cls(manifest, weights)

    def logits(self, token_ids: Sequence[int]) -> Array:
        """Logits [S, V] of a whole text, computed at once and without a cache."""
        manifest, weights = (
            self.manifest,
            {k: v.astype(np.float64) for k, v in self.weights.items()},
        )
        length, group = len(token_ids), manifest.num_query_heads // manifest.num_kv_heads

        def heads(x_SE: Array) -> Array:
            return x_SE.reshape(length, -1, manifest.head_dim).transpose(1, 0, 2)

        x_SE = weights["embedding"][list(token_ids)] + weights["positions"][:length]
        probabilities: dict[int, Array] = {}
        for layer, source in enumerate(manifest.sources):
            if source == layer:
                query_HSD = heads(x_SE @ weights[f"{layer}.query"])
                key_HSD = heads(x_SE @ weights[f"{layer}.key"]).repeat(group, axis=0)
                scores_HSS = query_HSD @ key_HSD.transpose(0, 2, 1)
                scores_HSS = np.where(np.tri(length, dtype=bool), scores_HSS, -np.inf)
                exponentials = np.exp(scores_HSS - scores_HSS.max(-1, keepdims=True))
                probabilities[layer] = exponentials / exponentials.sum(-1, keepdims=True)
            value_HSD = heads(x_SE @ weights[f"{layer}.value"]).repeat(group, axis=0)
            context_SHD = (probabilities[source] @ value_HSD).transpose(1, 0, 2)
            x_SE = np.tanh(x_SE + context_SHD.reshape(length, -1) @ weights[f"{layer}.output"])
        return x_SE @ weights["head"]

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(new_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


class _Graph:
    """Collects nodes; every call gives the name of the node's output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op_type: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        output = to or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name


def tiny_graph(decoder: TinyDecoder) -> onnx.ModelProto:
    """The decoder as a graph that keeps the contract, weights inside."""
    manifest = decoder.manifest
    half = manifest.dtype == "fp16"
    element, element_type = (
        (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    )
    kv_heads, head_dim, heads = manifest.num_kv_heads, manifest.head_dim, manifest.num_query_heads
    graph = _Graph()
    add, constant = graph.add, graph.constant
    weights = {name: constant(value, element) for name, value in decoder.weights.items()}
    one, zero = constant(1), constant(0)

    seq = add("Squeeze", add("Shape", "input_ids", start=1, end=2))
    positions = add(
        "Add", add("Unsqueeze", "past_lengths", constant([1])), add("Range", zero, seq, one)
    )
    x = add(
        "Add",
        add("Gather", weights["embedding"], "input_ids"),
        add("Gather", weights["positions"], positions),
    )
    capacity = add("Squeeze", add("Shape", "past_key_values.0.value", start=3, end=4))
    visible = add(
        "LessOrEqual",
        add("Range", zero, capacity, one),
        add("Unsqueeze", positions, constant([1, 3])),
    )
    mask = add("Where", visible, constant(0, element), constant(-1e4, element))

    def split_heads(projected: str, count: int) -> str:
        split = add("Reshape", projected, constant([0, 0, count, head_dim]))
        return add("Transpose", split, perm=[0, 2, 1, 3])

    def cached(layer: int, name: str) -> str:
        new = split_heads(add("MatMul", x, weights[f"{layer}.{name}"]), kv_heads)
        past, present = f"past_key_values.{layer}.{name}", f"present.{layer}.{name}"
        scatter = functools.partial(add, "TensorScatter", past, mode="linear", to=present)
        if name == "key":
            return scatter(new, "past_lengths", axis=-2)
        scatter(add("Transpose", new, perm=[0, 1, 3, 2]), "past_lengths", axis=-1)
        return add("Transpose", present, perm=[0, 1, 3, 2])

    probabilities: dict[int, str] = {}
    for layer, source in enumerate(manifest.sources):
        if source == layer:
            query = split_heads(add("MatMul", x, weights[f"{layer}.query"]), heads)
            query = add("Reshape", query, constant([0, kv_heads, -1, head_dim]))
            key = add("Transpose", cached(layer, "key"), perm=[0, 1, 3, 2])
            scores = add("MatMul", query, key)
            by_head = add("Concat", constant([0, heads, -1]), add("Shape", scores, start=3), axis=0)
            masked = add("Add", add("Reshape", scores, by_head), mask)
            softmax = add("Softmax", masked, axis=-1)
            probabilities[layer] = add("Reshape", softmax, add("Shape", scores))
        context = add("MatMul", probabilities[source], cached(layer, "value"))
        context = add("Reshape", context, constant([0, heads, -1, head_dim]))
        context = add("Transpose", context, perm=[0, 2, 1, 3])
        context = add("Reshape", context, constant([0, 0, heads * head_dim]))
        x = add("Tanh", add("Add", x, add("MatMul", context, weights[f"{layer}.output"])))
    wanted = add("Unsqueeze", "logits_indices", constant([-1]))
    logits = add("MatMul", add("GatherND", x, wanted, batch_dims=1), weights["head"])
    graph.nodes.append(helper.make_node("Cast", [logits], ["logits"], to=TensorProto.FLOAT))

    def cache_info(name: str) -> onnx.ValueInfoProto:
        shape = ["batch", *manifest.cache_dims(name, "capacity")]
        return helper.make_tensor_value_info(name, element_type, shape)

    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("past_lengths", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("logits_indices", TensorProto.INT64, ["batch", "n"]),
        *map(cache_info, manifest.past_names),
    ]
    outputs = [
        helper.make_tensor_value_info(
            "logits", TensorProto.FLOAT, ["batch", "n", manifest.vocab_size]
        ),
        *map(cache_info, manifest.present_names),
    ]
    return helper.make_model(
        helper.make_graph(graph.nodes, "tiny", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )


def tiny_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, so that most characters take several tokens."""
    vocabulary = {text: token for token, text in enumerate(BYTES)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def write_bundle(
    directory: Path,
    decoder: TinyDecoder,
    edit_graph: Callable[[onnx.ModelProto], None] | None = None,
    **manifest_changes: Any,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path, weights_path = directory / "model.onnx", directory / decoder.manifest.weights_file
    model = tiny_graph(decoder)
    if edit_graph is not None:
        edit_graph(model)
    onnx.save(
        model, path, save_as_external_data=True, location=weights_path.name, size_threshold=128
    )
    manifest = dataclasses.replace(
        decoder.manifest, **({"weights_bytes": weights_path.stat().st_size} | manifest_changes)
    )
    model = onnx.load(path, load_external_data=False)
    model.metadata_props.add(key=METADATA_KEY, value=manifest.to_json())
    onnx.save(model, path)
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    return path


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    return tiny_manifest


@pytest.fixture(scope="session")
def decoder() -> TinyDecoder:
    return TinyDecoder.random(tiny_manifest())


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, decoder: TinyDecoder) -> Path:
    """A directory with a whole bundle; tests that change it copy it first."""
    return write_bundle(tmp_path_factory.mktemp("bundle"), decoder).parent


@pytest.fixture(scope="session")
def session(bundle: Path) -> Session:
    return open_session(bundle, threads=1)


@pytest.fixture(scope="session")
def model(session: Session) -> EchoModel:
    return EchoModel(session)


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Builds a bundle of its own: manifest fields and the graph may be changed."""

    def make(
        decoder_manifest: Manifest | None = None,
        edit_graph: Callable[[onnx.ModelProto], None] | None = None,
        weights: dict[str, Array] | None = None,
        **manifest_changes: Any,
    ) -> Path:
        decoder = TinyDecoder.random(decoder_manifest or tiny_manifest())
        decoder = dataclasses.replace(decoder, weights=decoder.weights | (weights or {}))
        return write_bundle(tmp_path / "own", decoder, edit_graph, **manifest_changes).parent

    return make


@pytest.fixture
def byte_tokenizer() -> tokenizers.Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def shared_models() -> Path:
    path = Path(__file__).parents[2].parent / "shared" / "models"
    if not path.is_dir():
        pytest.skip(f"the shared checkpoints are not at {path}")
    return path
