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
class _Graph:
    """A loaded model, and what in it can be changed."""

    model: onnx.ModelProto
    random: Random

    def nodes(self) -> list[onnx.NodeProto]:
        """Every node, those of branches too."""
        return [node for graph in _graphs(self.model.graph) for node in graph.node]

    def node(self) -> onnx.NodeProto:
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


def _save(target: Target, model: onnx.ModelProto) -> None:
    # onnx's own saving would see to data in other files too
    (target.folder / MODEL).write_bytes(model.SerializeToString())
    make_fit(target.folder)


def _open(random: Random, target: Target) -> _Graph:
    return _Graph(onnx.load(target.folder / MODEL, load_external_data=False), random)


def nodes(random: Random, target: Target) -> str:
    """Drop, repeat, move, rename and rewire nodes."""
    graph = _open(random, target)
    done = [_spoil_node(graph) for _ in range(random.choice((1, 1, 2)))]
    _save(target, graph.model)
    return "; ".join(done)


def _spoil_node(graph: _Graph) -> str:
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
    _save(target, graph.model)
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
    _save(target, graph.model)
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
    _save(target, graph.model)
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
    _save(target, graph.model)
    return f"{where} in {place[:24]}"


def _hide(graph: _Graph, tensor: onnx.TensorProto) -> str:
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
    _save(target, model)
    return f"{how} of {name}"


def absurd(random: Random, target: Target) -> str:
    """Let a step compute something absurd: huge tensors, loops without end, depth."""
    graph = _open(random, target)
    model = graph.model
    kind = random.choice(sorted(_ABSURD))
    made = _ABSURD[kind](random.choice((2**24, 2**33, 2**40, 2**62, -5)))
    initializers = [part for part in made if isinstance(part, onnx.TensorProto)]
    model.graph.initializer.extend(initializers)
    new = [part for part in made if isinstance(part, onnx.NodeProto)]
    # The logits wait for what is computed, else it would be left out
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "logits_before"
    new += [
        helper.make_node("ReduceMin", ["absurd"], ["absurd_least"], keepdims=0),
        helper.make_node("Cast", ["absurd_least"], ["absurd_float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["logits_before", "absurd_float"], ["logits"]),
    ]
    model.graph.node.extend(new)
    _save(target, model)
    return kind


def _number(name: str, value: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.int64), name)


def _loop(count: int) -> list[Any]:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["a", "a"], ["b"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.INT64, []),
        ],
    )
    yes = numpy_helper.from_array(np.array(True), "absurd_yes")
    start = [_number("absurd_n", abs(count)), yes, _number("absurd_a", 1)]
    return [*start, helper.make_node("Loop", [s.name for s in start], ["absurd"], body=body)]


def _deep(_: int) -> list[Any]:
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["deep0"], value_int=1)],
        "deep",
        [],
        [helper.make_tensor_value_info("deep0", TensorProto.INT64, [])],
    )
    for level in range(1, 30):
        node = helper.make_node(
            "If", ["absurd_yes"], [f"deep{level}"], then_branch=inner, else_branch=inner
        )
        # One branch only goes down, for two would double what is written at each level
        node.attribute[1].g.CopyFrom(
            helper.make_graph(
                [helper.make_node("Constant", [], [f"flat{level}"], value_int=1)],
                "flat",
                [],
                [helper.make_tensor_value_info(f"flat{level}", TensorProto.INT64, [])],
            )
        )
        outputs = [helper.make_tensor_value_info(f"deep{level}", TensorProto.INT64, [])]
        inner = helper.make_graph([node], "deep", [], outputs)
    yes = numpy_helper.from_array(np.array(True), "absurd_yes")
    nodes = list(inner.node)
    nodes[-1].output[0] = "absurd"
    return [yes, *nodes]


def _long(_: int) -> list[Any]:
    nodes = [helper.make_node("Neg", [f"long{n}"], [f"long{n + 1}"]) for n in range(8_000)]
    nodes[-1].output[0] = "absurd"
    return [_number("long0", [1]), *nodes]


_ABSURD: Final[dict[str, Any]] = {
    "ConstantOfShape": lambda n: [
        _number("absurd_n", [n]),
        helper.make_node("ConstantOfShape", ["absurd_n"], ["absurd"]),
    ],
    "Range": lambda n: [
        _number("absurd_0", 0),
        _number("absurd_n", n),
        _number("absurd_1", 1),
        helper.make_node("Range", ["absurd_0", "absurd_n", "absurd_1"], ["absurd"]),
    ],
    "Range of steps of 0": lambda n: [
        _number("absurd_0", 0),
        _number("absurd_n", n),
        helper.make_node("Range", ["absurd_0", "absurd_n", "absurd_0"], ["absurd"]),
    ],
    "Expand": lambda n: [
        _number("absurd_n", [n]),
        helper.make_node("Expand", ["past_lengths", "absurd_n"], ["absurd"]),
    ],
    "Tile": lambda n: [
        _number("absurd_n", [n]),
        helper.make_node("Tile", ["past_lengths", "absurd_n"], ["absurd"]),
    ],
    "Pad": lambda n: [
        _number("absurd_n", [n, n]),
        helper.make_node("Pad", ["past_lengths", "absurd_n"], ["absurd"]),
    ],
    "Reshape": lambda n: [
        _number("absurd_n", [n, -1]),
        helper.make_node("Reshape", ["past_lengths", "absurd_n"], ["absurd"]),
    ],
    "Gather": lambda n: [
        _number("absurd_n", [n]),
        helper.make_node("Gather", ["past_lengths", "absurd_n"], ["absurd"]),
    ],
    "Slice": lambda n: [
        _number("absurd_0", [-n]),
        _number("absurd_n", [n]),
        helper.make_node("Slice", ["past_lengths", "absurd_0", "absurd_n"], ["absurd"]),
    ],
    "Split": lambda n: [
        _number("absurd_n", [n]),
        helper.make_node("Split", ["past_lengths", "absurd_n"], ["absurd"]),
    ],
    "Mod": lambda n: [
        _number("absurd_0", n + 5),
        helper.make_node("Sub", ["absurd_0", "absurd_0"], ["absurd_z"]),
        helper.make_node("Mod", ["past_lengths", "absurd_z"], ["absurd"]),
    ],
    "Div": lambda n: [
        _number("absurd_0", n),
        helper.make_node("Sub", ["past_lengths", "past_lengths"], ["absurd_z"]),
        helper.make_node("Div", ["absurd_0", "absurd_z"], ["absurd"]),
    ],
    "Loop": _loop,
    "branches in branches": _deep,
    "a long chain": _long,
}


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
    _save(target, model)
    return how
