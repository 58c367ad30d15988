"""Adds to a bundle's graph what takes all memory, never ends or goes too deep."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from samples.robustness.graphs import save
from samples.robustness.target import MODEL, Target


def absurd(random: Random, target: Target) -> str:
    """Let a step compute something absurd: huge tensors, loops without end, depth."""
    model = onnx.load(target.folder / MODEL, load_external_data=False)
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
    save(target, model)
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
