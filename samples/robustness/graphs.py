"""Spoils a bundle's graph through its protobuf, as a faulty exporter or an enemy would."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from random import Random
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from samples.robustness.target import MODEL, SECRET, Target, make_fit

_SIZES: Final = (-1, 0, 1, 2, 7, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
_FEW: Final = (-(2**63), -7, -1, 0, 1, 2, 3, 5, 1000, 2**31, 2**63 - 1)


@dataclasses.dataclass(slots=True)
class Graph:
    """A loaded model, and what in it can be changed."""

    model: onnx.ModelProto
    random: Random

    def nodes(self) -> list[onnx.NodeProto]:
        """Every node, those of branches too."""
        return [node for graph in _graphs(self.model.graph) for node in graph.node]

    def node(self) -> onnx.NodeProto:
        """One of them."""
        return self.random.choice(self.nodes())

    def graph(self) -> onnx.GraphProto:
        """One of the graphs: the whole one, or a branch."""
        return self.random.choice(list(_graphs(self.model.graph)))

    def tensor(self, *, external: bool | None = None) -> onnx.TensorProto:
        """One of the initializers."""
        found: list[onnx.TensorProto] = [
            tensor
            for tensor in self.model.graph.initializer
            if external is None or bool(tensor.external_data) == external
        ]
        return self.random.choice(found)

    def name(self) -> str:
        """The name of some value."""
        names: list[str] = [name for node in self.nodes() for name in node.output if name]
        return self.random.choice(names)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def save(target: Target, model: onnx.ModelProto) -> None:
    """Write a model in a bundle's place, and let its manifest fit."""
    # onnx's own saving would see to data in other files too
    (target.folder / MODEL).write_bytes(model.SerializeToString())
    make_fit(target.folder)


def _open(random: Random, target: Target) -> Graph:
    return Graph(onnx.load(target.folder / MODEL, load_external_data=False), random)


def nodes(random: Random, target: Target) -> str:
    """Drop, repeat, move, rename and rewire nodes."""
    graph = _open(random, target)
    done = [_spoil_node(graph) for _ in range(random.choice((1, 1, 2)))]
    save(target, graph.model)
    return "; ".join(done)


def _spoil_node(graph: Graph) -> str:
    random, node = graph.random, graph.node()
    how = random.choice(
        ("drop", "repeat", "reverse", "type", "domain", "input", "output", "cycle", "arity")
    )
    if how in ("drop", "repeat", "reverse"):
        owner = graph.graph()
        listed = list(owner.node)
        at = random.randrange(len(listed))
        changed = {"drop": listed[:at] + listed[at + 1 :], "repeat": [*listed, listed[at]]}
        del owner.node[:]
        owner.node.extend(changed.get(how, listed[::-1]))
        return f"{how} {listed[at].op_type}"
    was = node.op_type
    if how == "type":
        known = ("Identity", "Loop", "Scan", "If", "MatMul", "NonZero", "Softmax", "Nonsense", "")
        node.op_type = random.choice((*known, "x" * 100_000, random.choice(graph.nodes()).op_type))
    elif how == "domain":
        node.domain = random.choice(("com.microsoft", "ai.onnx.ml", "nowhere", "ai.onnx", "\0"))
    elif how == "input" and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(
            (graph.name(), "nothing", "", "x" * 100_000)
        )
    elif how == "output" and node.output:
        node.output[0] = random.choice((graph.name(), "", "other", "input_ids"))
    elif how == "cycle" and node.input and node.output:
        node.input[0] = node.output[0]
    else:
        node.input.extend([graph.name()] * random.choice((1, 50)))
    return f"{how} of {was}"


def attributes(random: Random, target: Target) -> str:
    """Change, drop and add attributes."""
    graph = _open(random, target)
    with_some = [node for node in graph.nodes() if node.attribute]
    node = random.choice(with_some)
    attribute = random.choice(node.attribute)
    how = random.choice(("number", "number", "type", "drop", "twice", "add"))
    if how == "drop":
        node.attribute.remove(attribute)
    elif how == "twice":
        node.attribute.append(attribute)
    elif how == "add":
        node.attribute.append(helper.make_attribute("axis", random.choice(_SIZES)))
    elif how == "type" or attribute.HasField("g"):
        made: tuple[Any, ...] = (7, 1.5, "text", [1, 2], [1.5], helper.make_graph([], "", [], []))
        name = attribute.name
        node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute(name, random.choice(made)))
    elif attribute.ints:
        attribute.ints[random.randrange(len(attribute.ints))] = random.choice(_SIZES)
    elif attribute.HasField("f"):
        attribute.f = random.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38))
    elif attribute.HasField("s"):
        attribute.s = random.choice((b"", b"linear", b"circular", b"\xff\xfe", b"x" * 100_000))
    else:
        attribute.i = random.choice((*_SIZES, 3, 5, 100))
    save(target, graph.model)
    return f"{how} of {node.op_type}.{attribute.name}"


def constants(random: Random, target: Target) -> str:
    """Put absurd sizes into the small tensors, which say shapes, axes and bounds."""
    graph = _open(random, target)
    small = [
        tensor
        for tensor in graph.model.graph.initializer
        if tensor.data_type == TensorProto.INT64 and not tensor.external_data
    ]
    done = []
    for tensor in random.sample(small, min(len(small), random.choice((1, 1, 3)))):
        values = numpy_helper.to_array(tensor).copy()
        if values.size:
            flat = values.reshape(-1)
            flat[random.randrange(flat.size)] = random.choice((*_SIZES, *_FEW))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            done.append(f"{tensor.name} is {flat[:8].tolist()}")
    save(target, graph.model)
    return "; ".join(done) or "nothing"


def weights(random: Random, target: Target) -> str:
    """Change what is said of weights: dimensions, types, where they are, names that are twice."""
    graph = _open(random, target)
    tensor = graph.tensor(external=random.random() < 0.8)
    how = random.choice(("dims", "type", "entry", "entry", "twice", "raw", "name", "no data"))
    name, done = tensor.name, how
    if how == "dims":
        dims = list(tensor.dims) or [1]
        dims[random.randrange(len(dims))] = random.choice(_SIZES)
        if random.random() < 0.3:
            dims = random.choice(([], [1] * 1000, [2**32, 2**32], [0, -1]))
        tensor.ClearField("dims")
        tensor.dims.extend(dims)
        done = f"dims {dims[:8]}"
    elif how == "type":
        tensor.data_type = random.choice((0, 2, 3, 6, 7, 8, 10, 11, 16, 21, 22, 99, 2**31 - 1))
        done = f"type {tensor.data_type}"
    elif how == "entry" and tensor.external_data:
        entry = random.choice(tensor.external_data)
        entry.value = random.choice(
            ("-1", "0", "1", str(2**63), "9" * 6000, "", "0x10", " 8", "1e3", "\u0663", "8\n", "_1")
        )
        done = f"{entry.key} is {entry.value[:20]!r}"
    elif how == "twice":
        graph.model.graph.initializer.append(tensor)
    elif how == "raw":
        tensor.raw_data = b"1234567"
        if random.random() < 0.5:
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
    elif how == "name":
        tensor.name = random.choice(("", graph.name(), "input_ids", "x" * 1_000_000, "a\nb\x1b"))
    else:
        tensor.ClearField("raw_data")
        tensor.ClearField("external_data")
    save(target, graph.model)
    return f"{name[:40]}: {done}"


def outside(random: Random, target: Target) -> str:
    """Let a weight, wherever ONNX has one, lie outside the bundle's directory."""
    secret = target.outside / "secret"
    secret.write_bytes(SECRET.encode() * 100_000)
    graph = _open(random, target)
    inside = target.folder / "inside.data"
    place = random.choice(
        (
            "../outside/secret",
            str(secret),
            "./../outside/secret",
            "model.onnx.data/../../outside/secret",
            "link/secret",
            "inside.data",
            "/proc/self/environ",
            "../outside/pipe",
            "file://" + str(secret),
            "..\\outside\\secret",
            "*/_ORT_MEM_ADDR_/*",
        )
    )
    (target.folder / "link").symlink_to(target.outside)
    inside.symlink_to(secret)
    tensor = graph.tensor(external=True)
    if random.random() < 0.5:
        tensor = onnx.TensorProto(name="secret", data_type=1, dims=[2], data_location="EXTERNAL")
        tensor.external_data.add(key="length", value="8")
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=place)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="length", value=str(4 * int(np.prod(tensor.dims))))
    where = "initializer"
    if tensor.name == "secret":
        where = _hide(graph, tensor)
    save(target, graph.model)
    return f"{where} in {place[:24]}"


def _hide(graph: Graph, tensor: onnx.TensorProto) -> str:
    """Put a tensor somewhere that is read as well."""
    model, where = (
        graph.model,
        graph.random.choice(
            ("initializer", "branch", "Constant", "sparse", "function", "training")
        ),
    )
    constant = helper.make_node("Constant", [], ["secret"], value=tensor)
    if where == "branch":
        branch = helper.make_graph([], "branch", [], [], [tensor])
        model.graph.node.append(
            helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
        )
    elif where == "Constant":
        model.graph.node.append(constant)
    elif where == "sparse":
        indices = numpy_helper.from_array(np.arange(2), "indices")
        model.graph.sparse_initializer.append(
            onnx.SparseTensorProto(values=tensor, indices=indices, dims=[2])
        )
    elif where == "function":
        opset = [helper.make_opsetid("", 24)]
        model.functions.append(helper.make_function("own", "f", [], ["secret"], [constant], opset))
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node.append(helper.make_node("f", [], ["hidden"], domain="own"))
    elif where == "training":
        info = model.training_info.add()
        info.initialization.CopyFrom(helper.make_graph([], "t", [], [], [tensor]))
    else:
        model.graph.initializer.append(tensor)
    return where


def interface(random: Random, target: Target) -> str:
    """Change inputs, outputs and what is said of values."""
    graph = _open(random, target)
    model = graph.model
    listed = random.choice((model.graph.input, model.graph.output))
    value = random.choice(listed)
    name = value.name
    how = random.choice(("drop", "twice", "reverse", "name", "type", "dims", "no type", "many"))
    if how == "drop":
        listed.remove(value)
    elif how == "twice":
        listed.append(value)
    elif how == "reverse":
        values = list(listed)[::-1]
        del listed[:]
        listed.extend(values)
    elif how == "name":
        value.name = random.choice(("", "other", "x" * 1_000_000, graph.name(), "two\nlines"))
    elif how == "type":
        value.type.tensor_type.elem_type = random.choice((0, 1, 2, 7, 8, 10, 16, 99))
    elif how == "dims":
        dims = value.type.tensor_type.shape.dim
        if random.random() < 0.3:
            dims.extend([dims[0]] * random.choice((1, 5000)))
        else:
            dims[random.randrange(len(dims))].dim_value = random.choice(_SIZES)
    elif how == "no type":
        value.ClearField("type")
    else:
        for number in range(20_000):
            listed.add(name=f"x{number}").CopyFrom(value)
    save(target, model)
    return f"{how} of {name}"


def around(random: Random, target: Target) -> str:
    """Change what stands around the graph: versions, operator sets, functions, further metadata."""
    graph = _open(random, target)
    model = graph.model
    how = random.choice(("ir", "opset", "no opset", "function", "metadata", "texts", "graph"))
    if how == "ir":
        model.ir_version = random.choice((0, 1, 3, 99, 2**62, -1))
    elif how == "opset":
        model.opset_import[0].version = random.choice((0, 1, 9, 13, 99, 2**62, -1))
    elif how == "no opset":
        del model.opset_import[:]
    elif how == "function":
        opset = [helper.make_opsetid("", 24)]
        calls_itself = helper.make_node("f", ["x"], ["y"], domain="own")
        model.functions.append(
            helper.make_function("own", "f", ["x"], ["y"], [calls_itself], opset)
        )
        model.opset_import.append(helper.make_opsetid("own", 1))
        node = helper.make_node("f", ["past_lengths"], ["own_y"], domain="own")
        model.graph.node.append(node)
    elif how == "metadata":
        for number in range(50_000):
            model.metadata_props.add(key=f"key {number}", value="x")
    elif how == "texts":
        model.producer_name = "x" * 2_000_000
        model.doc_string = "\n" * 2_000_000
    else:
        model.ClearField("graph")
    save(target, model)
    return how
