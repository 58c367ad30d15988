"""Student to ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch

from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.trace.decoder_graph import DecoderGraph
from echoatt_exporter.trace.scatter_cache import OPSET_VERSION
from echoatt_exporter.trace.simplify import simplify
from echoatt_runtime.manifest import INPUT_IDS, LOGITS_INDICES, PAST_LENGTHS, Manifest

# Sizes of the example that is traced. No two may be equal: torch gives equal sizes one symbol.
_EXAMPLE = {"batch": 2, "seq": 3, "n": 5, "capacity": 16}

_AXES = {
    INPUT_IDS: ("batch", "seq"),
    PAST_LENGTHS: ("batch",),
    LOGITS_INDICES: ("batch", "n"),
}


def trace_student(student: EchoAttForCausalLM, manifest: Manifest) -> ir.Model:
    """Trace a student into a graph with the contract's inputs and outputs.

    The weights are not copied: the model's tensors stay memory-mapped or where they are, until the
    graph is written.

    Args:
        student: in evaluation mode, on the CPU, in the dtype that the graph shall have.
        manifest: the bundle's; it names inputs and outputs and says what the layers are.

    Returns:
        The graph by the contract, before any pass of ours.
    """
    sizes = _EXAMPLE
    cache_shape = (
        sizes["batch"], manifest.num_kv_heads, sizes["capacity"], manifest.head_dim,
    )  # fmt: skip
    caches = [torch.zeros(cache_shape, dtype=student.dtype) for _ in manifest.past_names]
    example = (
        torch.zeros((sizes["batch"], sizes["seq"]), dtype=torch.int64),
        torch.tensor([4, 2]),
        torch.zeros((sizes["batch"], sizes["n"]), dtype=torch.int64),
        caches,
    )
    batch, seq, n, capacity = (torch.export.Dim(name) for name in sizes)
    dynamic_shapes = (
        {0: batch, 1: seq},
        {0: batch},
        {0: batch, 1: n},
        [{0: batch, 2: capacity} for _ in caches],
    )
    module = DecoderGraph(student, manifest).eval()
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            optimize=False,
            opset_version=OPSET_VERSION,
            dynamic_shapes=dynamic_shapes,
            input_names=list(manifest.input_names),
            output_names=list(manifest.output_names),
            verbose=False,
        )
    assert program is not None  # noqa: S101 - so it is with dynamo=True
    model = program.model
    _name_dimensions(model)
    simplify(model)
    return model


def _name_dimensions(model: ir.Model) -> None:
    """Give the symbolic dimensions the contract's names instead of the tracer's."""
    graph = model.graph
    names: dict[str, str] = {}
    for value in graph.inputs:
        assert value.name is not None  # noqa: S101 - torch names every input
        assert value.shape is not None  # noqa: S101 - and knows its shape
        axes = _AXES.get(value.name, ("batch", None, "capacity", None))
        for dimension, name in zip(value.shape, axes, strict=True):
            if name is not None:
                names[str(dimension)] = name
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in (*graph.inputs, *graph.outputs, *(o for node in graph for o in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    d if isinstance(d, int) else symbol.sub(lambda m: names[m[0]], str(d))
                    for d in value.shape
                ]
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporter from talking: it prints steps and logs what does not concern a user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
