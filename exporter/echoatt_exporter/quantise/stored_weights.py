"""Gives a student the rounded weights of a bundle.

Rounding to the nearest levels is done again. Calibrated rounding does not come out the same on
another machine, where sums round otherwise: what the bundle holds is taken as it is, after a look
at how far it is from the checkpoint, whose channels are scaled as the bundle's are. That these are
the weights of the export, its hashes say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch

from echoatt_exporter.errors import ParityError
from echoatt_exporter.families.projections import weight_out_in
from echoatt_exporter.graph.weights import separate_names
from echoatt_exporter.quantise.block_quantizer import QuantizedBlocks, dequantize_blocks
from echoatt_exporter.quantise.places import Place, find_places
from echoatt_exporter.quantise.round_weights import (
    has_shared_table,
    replace_weight,
    round_to_nearest,
    tables_of,
)
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import Bits

# Error of a calibrated weight, in its own root mean square: on SmolLM2-135M, Qwen2.5-Coder-0.5B and
# books12 0.001 to 0.010 at 8 bits and 0.08 to 0.18 at 4; 0.04 where a head of 8 bits makes up for
# random layers of 4. Heads in another order are 1.4 away.
_FARTHEST: Final = {8: 0.1, 4: 0.5}


def round_as_stored(student: EchoAttForCausalLM, bundle: Bundle) -> None:
    """Round a student's weights as a bundle's are, in place.

    Args:
        student: Of the bundle's checkpoint and plan, in float32.
        bundle: The bundle, with quantised weights.

    Raises:
        ParityError: The bundle's weights are not what rounding makes of the checkpoint's.
        BundleError: They are not what was exported.
    """
    quantisation = bundle.specification.quantisation
    if quantisation is not None and quantisation.rounding == "nearest":
        round_to_nearest(student, quantisation, lambda _done, _total: None)
    else:
        # A scale that is a little off is no other rounding, but neither is it the file's hash
        _take_stored_weights(student, Bundle.open(bundle.model, verify=True))


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a bundle holds for one module.

    Attributes:
        name: The module's, in the checkpoint.
        bits: A level's.
        blocks: Of this module, and of others that are packed with it.
        rows: Which of the blocks' outputs are the module's.
        inputs: K; the last block may be padded.
    """

    name: str
    bits: Bits
    blocks: QuantizedBlocks
    rows: slice
    inputs: int

    def weight(self) -> torch.Tensor:
        """Float32 [N, K]."""
        own = QuantizedBlocks(self.blocks.packed[self.rows], self.blocks.scales[self.rows])
        rounded = dequantize_blocks(own, self.bits)
        return torch.from_numpy(rounded)[:, : self.inputs].contiguous()


@torch.no_grad()
def _take_stored_weights(student: EchoAttForCausalLM, bundle: Bundle) -> None:
    """Replace weights by what a bundle holds for them, after a look at how far that is."""
    stored = _stored_of_modules(student, bundle)
    quantisation = bundle.specification.quantisation
    if quantisation is not None and quantisation.scaled_channels:
        # A place's weights have their own factors only when those of places before are undone
        for place in find_places(student):
            place.scale(_factors(place, stored))
    tables, shared = tables_of(student), has_shared_table(student)
    for module, found in stored.items():
        own_NK, taken_NK = weight_out_in(module).float(), found.weight()
        distance = float((taken_NK - own_NK).norm() / own_NK.norm().clamp_min(1e-30))
        if not distance <= _FARTHEST[found.bits]:
            raise ParityError(
                f"{bundle.model}: the weights of {found.name} are {distance:.2g} of their size away"
                f" from the checkpoint's, and {found.bits} bits explain {_FARTHEST[found.bits]};"
                " export the model again"
            )
        for same in tables if module in tables and shared else (module,):
            replace_weight(same, taken_NK)


def _stored_of_modules(student: EchoAttForCausalLM, bundle: Bundle) -> dict[Any, _Stored]:
    """What a bundle holds for each projection and table of a student."""
    modules = dict(student.decoder.named_modules())
    stored: dict[Any, _Stored] = {}
    for name, bits, blocks in _quantised(ir.load(bundle.model).graph):
        parts = [part.removesuffix(".weight") for part in separate_names(name)]
        # Of what a rewrite cut out of a packed weight, the student has no modules any more
        found = [(part, modules[part]) for part in parts if part in modules]
        ends = list(accumulate(len(weight_out_in(module)) for _, module in found))
        if not found or ends[-1] != len(blocks.scales):
            raise ParityError(
                f"could not compare: {bundle.model} has a weight {name!r}, which the checkpoint"
                " has not; give the directory that it was exported from"
            )
        for (part, module), begin, end in zip(found, [0, *ends], ends, strict=False):
            inputs = weight_out_in(module).shape[1]
            stored[module] = _Stored(part, bits, blocks, slice(begin, end), inputs)
    return stored


def _factors(place: Place, stored: Mapping[Any, _Stored]) -> torch.Tensor:
    """What a bundle's weights are multiplied with at a place, float32 [C].

    Rounding moves a channel's weights far less, all in all, than to the next power of two.
    """
    own_C, products_C = torch.zeros(2, len(place.outputs))
    for consumer in place.consumers:
        own_NK = weight_out_in(consumer).float()
        own_C += place.over_channels(own_NK.square().sum(0))
        products_C += place.over_channels((stored[consumer].weight() * own_NK).sum(0))
    # Of a channel without weights nothing can be said; another checkpoint's go against each other
    known_C = (own_C > 0) & (products_C > 0)
    return torch.where(known_C, torch.exp2((products_C / own_C).log2().round()), 1)


def _quantised(graph: ir.Graph) -> Iterator[tuple[str, Bits, QuantizedBlocks]]:
    """Each quantised weight once: its name in the checkpoint, its bits and its blocks."""
    seen: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "MatMulNBits":
            packed, scales = node.inputs[1], node.inputs[2]
        elif node.op_type == "GatherBlockQuantized":
            packed, scales = node.inputs[0], node.inputs[2]
        else:
            continue
        if packed is None or scales is None or scales in seen:
            continue
        seen.add(scales)
        bits: Bits = 8 if node.attributes.get_int("bits", 4) == 8 else 4
        scales_NJ = _read(scales)
        packed_NJx = _read(packed).reshape(*scales_NJ.shape, -1)
        name = str(scales.name).removesuffix(".cut").removesuffix(".scales")
        yield name, bits, QuantizedBlocks(packed_NJx, scales_NJ.astype(np.float32))


def _read(value: ir.Value) -> np.ndarray:
    tensor = value.const_value
    assert tensor is not None  # noqa: S101 - a published bundle's weights are initializers
    return np.array(tensor.numpy())
