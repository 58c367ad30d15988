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
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, normalizers, pre_tokenizers

from echoatt_runtime import EchoModel
from echoatt_runtime.bundle import file_sha256, read_onnx_file
from echoatt_runtime.contract import (
    DTYPES,
    METADATA_KEY,
    BundleFile,
    Manifest,
    SharingPlan,
    SourceCheckpoint,
    Specification,
    lay_out_caches,
)
from echoatt_runtime.executor import Executor, open_executor

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BOS, EOS = len(BYTES), len(BYTES) + 1

Array = npt.NDArray[Any]


def tiny_specification(
    sources: Sequence[int] = (0, 1, 1),
    kv_heads: int | tuple[int, ...] = 2,
    head_dim: int = 4,
    dtype: str = "fp32",
    head_orders: Sequence[Sequence[int]] = (),
    **changes: Any,
) -> Specification:
    """Of a decoder with a follower layer; `changes` are its other fields."""
    plan, count = SharingPlan(tuple(sources), tuple(map(tuple, head_orders))), len(sources)
    fields: dict[str, Any] = {
        "family": "llama",
        "plan": plan,
        "layer_kinds": ("full",) * count,
        "sliding_window": None,
        "query_heads": (4,) * count,
        "kv_heads": kv_heads if isinstance(kv_heads, tuple) else (kv_heads,) * count,
        "head_dims": (head_dim,) * count,
        "vocab_size": len(BYTES) + 2,
        "context_length": 600,
        "dtype": dtype,
        "device": "cpu",
        "bos_token_id": BOS,
        "eos_token_ids": (EOS,),
        "pad_token_id": None,
        "source_checkpoint": SourceCheckpoint(name="tiny", sha256="0" * 64),
    }
    fields |= changes
    if "caches" not in fields:
        element_type = DTYPES[dtype].compute.name
        fields["caches"] = lay_out_caches(
            fields["plan"], fields["kv_heads"], fields["head_dims"], element_type
        )
    return Specification(**fields)


def tiny_manifest(specification: Specification | None = None, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "exporter_version": "0.1.0",
        "specification": specification or tiny_specification(),
        "files": (BundleFile(name="model.onnx.data", role="weights", bytes=1, sha256=None),),
    }
    return Manifest(**(fields | changes))


@dataclasses.dataclass(frozen=True)
class TinyDecoder:
    """Random weights of a decoder with learned positions and a follower layer.

    Shapes: S tokens, H query heads, N key/value heads, G = H/N, D head size, V vocabulary.
    """

    specification: Specification
    weights: dict[str, Array]

    @classmethod
    def random(cls, specification: Specification, seed: int = 0) -> TinyDecoder:
        generator = np.random.default_rng(seed)
        head_dim = specification.head_dims[0]
        hidden = specification.query_heads[0] * head_dim
        kv_width = specification.kv_heads[0] * head_dim
        shapes = {
            "embedding": (specification.vocab_size, hidden),
            "positions": (specification.context_length, hidden),
            "head": (hidden, specification.vocab_size),
        }
        for layer in range(specification.num_layers):
            if not specification.plan.is_follower(layer):
                shapes[f"{layer}.query"] = (hidden, hidden)
                shapes[f"{layer}.key"] = (hidden, kv_width)
            shapes[f"{layer}.value"] = (hidden, kv_width)
            shapes[f"{layer}.output"] = (hidden, hidden)
        weights = {
            name: generator.normal(0, 0.4, shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        return cls(specification, weights)

    def logits(self, token_ids: Sequence[int]) -> Array:
        """Logits [S, V] of a whole text, computed at once and without a cache."""
        specification = self.specification
        weights = {k: v.astype(np.float64) for k, v in self.weights.items()}
        length, head_dim = len(token_ids), specification.head_dims[0]
        group = specification.query_heads[0] // specification.kv_heads[0]

        def heads(x_SE: Array) -> Array:
            return x_SE.reshape(length, -1, head_dim).transpose(1, 0, 2)

        x_SE = weights["embedding"][list(token_ids)] + weights["positions"][:length]
        probabilities: dict[int, Array] = {}
        for layer, source in enumerate(specification.plan.sources):
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
    specification = decoder.specification
    half = specification.dtype == "fp16"
    element, element_type = (
        (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    )
    kv_heads, head_dim, heads = (
        of_layer[0]
        for of_layer in (
            specification.kv_heads,
            specification.head_dims,
            specification.query_heads,
        )
    )
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
    for layer, source in enumerate(specification.plan.sources):
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

    def cache_infos(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(name, element_type, list(cache.axes))
            for name, cache in zip(names, specification.caches, strict=True)
        ]

    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("past_lengths", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("logits_indices", TensorProto.INT64, ["batch", "n"]),
        *cache_infos(specification.past_names),
    ]
    outputs = [
        helper.make_tensor_value_info(
            "logits", TensorProto.FLOAT, ["batch", "n", specification.vocab_size]
        ),
        *cache_infos(specification.present_names),
    ]
    if specification.choice_names:
        choices, sums = specification.choice_names
        add("ArgMax", "logits", to=choices, axis=-1, keepdims=0)
        add("ReduceSum", "logits", constant([-1]), to=sums, keepdims=0)
        outputs += [
            helper.make_tensor_value_info(choices, TensorProto.INT64, ["batch", "n"]),
            helper.make_tensor_value_info(sums, TensorProto.FLOAT, ["batch", "n"]),
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


def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """In the manner of Llama 2: words with a leading space mark, bytes for everything else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁the", "é"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: token for token, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def write_bundle(
    directory: Path,
    decoder: TinyDecoder,
    edit_graph: Callable[[onnx.ModelProto], None] | None = None,
    described: Specification | None = None,
    companions: dict[str, str] | None = None,
) -> Path:
    """A bundle of `decoder`; its manifest may describe another model than its graph."""
    directory.mkdir(parents=True, exist_ok=True)
    path, weights_path = directory / "model.onnx", directory / "model.onnx.data"
    model = tiny_graph(decoder)
    if edit_graph is not None:
        edit_graph(model)
    onnx.save(
        model, path, save_as_external_data=True, location=weights_path.name, size_threshold=128
    )
    tiny_tokenizer().save(str(directory / "tokenizer.json"))
    for name, text in (companions or {}).items():
        (directory / name).write_text(text, encoding="utf-8")
    roles = {weights_path.name: "weights", "tokenizer.json": "companion"}
    roles |= dict.fromkeys(companions or {}, "companion")
    files = tuple(
        BundleFile(
            name=name,
            role=role,
            bytes=(directory / name).stat().st_size,
            sha256=file_sha256(directory / name),
        )
        for name, role in roles.items()
    )
    manifest = tiny_manifest(
        described or decoder.specification,
        graph_sha256=read_onnx_file(path).graph_sha256,
        files=files,
    )
    stamp(path, manifest.to_json())
    return path


def stamp(path: Path, manifest: str | None) -> None:
    """Put a manifest's text in the place of a model file's own, or take it away."""
    model = onnx.load(path, load_external_data=False)
    del model.metadata_props[:]
    if manifest is not None:
        model.metadata_props.add(key=METADATA_KEY, value=manifest)
    onnx.save(model, path)


@pytest.fixture
def make_specification() -> Callable[..., Specification]:
    return tiny_specification


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    return tiny_manifest


@pytest.fixture(scope="session")
def decoder() -> TinyDecoder:
    return TinyDecoder.random(tiny_specification())


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, decoder: TinyDecoder) -> Path:
    """A directory with a whole bundle; tests that change it copy it first."""
    return write_bundle(tmp_path_factory.mktemp("bundle"), decoder).parent


@pytest.fixture(scope="session")
def executor(bundle: Path) -> Executor:
    return open_executor(bundle, threads=1)


@pytest.fixture(scope="session")
def model(bundle: Path) -> EchoModel:
    return EchoModel.load(bundle, threads=1)


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Builds a bundle of its own: the decoder, the graph and what is said of it may be changed."""

    def make(
        specification: Specification | None = None,
        edit_graph: Callable[[onnx.ModelProto], None] | None = None,
        weights: dict[str, Array] | None = None,
        described: Specification | None = None,
        companions: dict[str, str] | None = None,
    ) -> Path:
        decoder = TinyDecoder.random(specification or tiny_specification())
        decoder = dataclasses.replace(decoder, weights=decoder.weights | (weights or {}))
        path = write_bundle(tmp_path / "own", decoder, edit_graph, described, companions)
        return path.parent

    return make


@pytest.fixture
def restamp() -> Callable[[Path, str | None], None]:
    return stamp


@pytest.fixture
def byte_tokenizer() -> tokenizers.Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def shared_models() -> Path:
    path = Path(__file__).parents[2].parent / "shared" / "models"
    if not path.is_dir():
        pytest.skip(f"the shared checkpoints are not at {path}")
    return path
