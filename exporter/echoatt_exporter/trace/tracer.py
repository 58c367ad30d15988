"""Student to ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import torch

from echoatt_exporter.families import family_of
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.trace.decoder_graph import DecoderGraph
from echoatt_exporter.trace.lay_out import lay_out_layers
from echoatt_exporter.trace.layer_kinds import find_layer_kinds, only_layers
from echoatt_exporter.trace.scatter_cache import OPSET_VERSION
from echoatt_exporter.trace.simplify import simplify
from echoatt_runtime.contract import (
    DTYPES,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    Specification,
)


def graph_dtype(dtype: str) -> torch.dtype:
    """What a bundle's weights are rounded to before they are traced.

    Block quantisation comes later, and starts from float32.
    """
    found: torch.dtype = getattr(torch, DTYPES[dtype].compute.name)
    return found


def computed_in(specification: Specification) -> torch.dtype:
    """What a bundle's graph computes in, and what is traced."""
    found: torch.dtype = getattr(torch, specification.compute.name)
    return found


# Sizes of the example that is traced. No two may be equal: torch gives equal sizes one symbol.
_EXAMPLE = {"batch": 2, "seq": 3, "n": 5, "capacity": 16}

_AXES: Mapping[str, tuple[str | int, ...]] = {
    INPUT_IDS: ("batch", "seq"),
    PAST_LENGTHS: ("batch",),
    LOGITS_INDICES: ("batch", "n"),
}


def trace_student(student: EchoAttForCausalLM, specification: Specification) -> ir.Model:
    """Trace a student into a graph with the contract's inputs and outputs.

    torch takes seconds for a layer, because it reasons about every symbolic size. Layers that
    differ in their weights only are therefore traced once, and laid out with each one's own.

    The weights are not copied: the model's tensors stay memory-mapped or where they are, until the
    graph is written.

    Args:
        student: In evaluation mode, on the CPU, in the dtype that the graph shall have.
        specification: What is to be built; it names inputs and outputs and says what the layers
            are.

    Returns:
        The graph by the contract, before any pass of ours.
    """
    kinds = find_layer_kinds(student, specification)
    decoder = student.decoder
    family = family_of(decoder.config)
    layers = family.layers_of(decoder)
    with torch.no_grad(), _quiet(), only_layers(decoder, kinds.templates):
        model = _trace(DecoderGraph(student, specification, kinds), student.dtype)
    _name_dimensions(model, specification)
    lay_out_layers(model, specification, kinds, layers, f"decoder.{family.layers}.")
    simplify(model)
    return model


def _trace(module: DecoderGraph, dtype: torch.dtype) -> ir.Model:
    """Run torch's exporter on a module with the contract's inputs and some of its caches."""
    sizes, caches = _EXAMPLE, module.caches
    shapes = [cache.shape(sizes["batch"], sizes["capacity"]) for cache in caches]
    example = (
        torch.zeros((sizes["batch"], sizes["seq"]), dtype=torch.int64),
        torch.tensor([4, 2]),
        torch.zeros((sizes["batch"], sizes["n"]), dtype=torch.int64),
        [torch.zeros(shape, dtype=dtype) for shape in shapes],
    )
    batch, seq, n, capacity = (torch.export.Dim(name) for name in sizes)
    dynamic_shapes = (
        {0: batch, 1: seq},
        {0: batch},
        {0: batch, 1: n},
        [{0: batch, cache.capacity_axis: capacity} for cache in caches],
    )
    program = torch.onnx.export(
        module.eval(),
        example,
        dynamo=True,
        optimize=False,
        opset_version=OPSET_VERSION,
        dynamic_shapes=dynamic_shapes,
        input_names=[
            INPUT_IDS, PAST_LENGTHS, LOGITS_INDICES, *(cache.past_name for cache in caches)
        ],
        output_names=[LOGITS, *(cache.present_name for cache in caches)],
        verbose=False,
    )  # fmt: skip
    assert program is not None  # noqa: S101 - so it is with dynamo=True
    return program.model


def _name_dimensions(model: ir.Model, specification: Specification) -> None:
    """Give the symbolic dimensions the contract's names instead of the tracer's."""
    graph = model.graph
    names: dict[str, str] = {}
    axes = dict(_AXES)
    axes |= {cache.past_name: cache.axes for cache in specification.caches}
    for value in graph.inputs:
        assert value.name is not None  # noqa: S101 - torch names every input
        assert value.shape is not None  # noqa: S101 - and knows its shape
        for dimension, name in zip(value.shape, axes[value.name], strict=True):
            if isinstance(name, str):
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
