"""Whether a graph's inputs and outputs are those of its specification."""

from __future__ import annotations

from collections.abc import Sequence

from echoatt_runtime.contract import (
    CHOICES,
    ELEMENT_TYPES,
    INPUT_IDS,
    LOGIT_SUMS,
    LOGITS,
    LOGITS_INDICES,
    PAST_LENGTHS,
    Specification,
)
from echoatt_runtime.contract.records import join_faults
from echoatt_runtime.errors import DamagedBundleError
from echoatt_runtime.ort import OrtSession, TensorInfo

_Wanted = list[tuple[str, str, tuple[int | None, ...]]]


def check_interface(
    session: OrtSession, specification: Specification, extra_outputs: Sequence[str] = ()
) -> None:
    """Check names, order, types and fixed dimensions of the graph's inputs and outputs.

    Args:
        session: The graph.
        specification: What it should be.
        extra_outputs: Outputs that it has besides, behind the others.

    Raises:
        DamagedBundleError: They differ; the message lists every fault.
    """
    integers = ELEMENT_TYPES["int64"].tensor
    floats = ELEMENT_TYPES["float32"].tensor
    caches = [
        (cache.name, cache.elements.tensor, cache.shape(None, None))
        for cache in specification.caches
    ]
    inputs: _Wanted = [
        (INPUT_IDS, integers, (None, None)),
        (PAST_LENGTHS, integers, (None,)),
        (LOGITS_INDICES, integers, (None, None)),
        *((f"past_key_values.{name}", tensor, dims) for name, tensor, dims in caches),
    ]
    outputs: _Wanted = [
        (LOGITS, floats, (None, None, specification.vocab_size)),
        *((f"present.{name}", tensor, dims) for name, tensor, dims in caches),
    ]
    if specification.choice_names:
        outputs += [(CHOICES, integers, (None, None)), (LOGIT_SUMS, floats, (None, None))]
    found = session.outputs[: len(session.outputs) - len(extra_outputs)]
    faults = [*_faults("input", inputs, session.inputs), *_faults("output", outputs, found)]
    if faults:
        raise DamagedBundleError(
            f"the graph of {session.where} does not keep its manifest's contract: "
            f"{join_faults(faults)}; export it again"
        )


def _faults(kind: str, wanted: _Wanted, found: Sequence[TensorInfo]) -> list[str]:
    wanted_names, found_names = [name for name, _, _ in wanted], [value.name for value in found]
    faults = [f"{kind} {name} is missing" for name in wanted_names if name not in found_names]
    faults += [f"{kind} {name} is surplus" for name in found_names if name not in wanted_names]
    if not faults and wanted_names != found_names:
        faults.append(f"{kind}s are in the wrong order")
    found_by_name = {value.name: value for value in found}
    for name, tensor_type, dims in wanted:
        value = found_by_name.get(name)
        if value is None:
            continue
        if value.type != tensor_type:
            faults.append(f"{kind} {name} is {value.type}, not {tensor_type}")
        # Dimensions that the graph leaves open, or names, agree with any.
        agrees = len(value.shape) == len(dims) and all(
            dim is None or not isinstance(there, int) or there == dim
            for dim, there in zip(dims, value.shape, strict=True)
        )
        if not agrees:
            wanted_dims = ", ".join("?" if dim is None else str(dim) for dim in dims)
            faults.append(f"{kind} {name} has shape {list(value.shape)}, not [{wanted_dims}]")
    return faults
