"""Whether a bundle fits the disk: roughly before the weights are read, exactly before writing."""

from __future__ import annotations

import shutil
from pathlib import Path

from echoatt_exporter.architecture import specification_fields
from echoatt_exporter.errors import ExportError
from echoatt_exporter.quantise.block_quantizer import BLOCK_SIZE
from echoatt_exporter.share.outline import CheckpointOutline
from echoatt_runtime.contract import DTYPES

_SCALE_BYTES = 4


def check_room(place: Path, needed: int) -> None:
    """Refuse what does not fit.

    Args:
        place: A directory on the disk.
        needed: Bytes of the weights.

    Raises:
        ExportError: There is less room.
    """
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(
            f"{place}: the weights take {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free;"
            " make room or choose another disk"
        )


def least_bytes(outline: CheckpointOutline, dtype: str) -> int:
    """What a checkpoint's weights take at least in a bundle, by its files' headers.

    Args:
        outline: The checkpoint and the plan.
        dtype: A key of `DTYPES`.
    """
    elements: int = sum(tensor.elements for tensor in outline.tensors.values())
    hidden: int = outline.text_config.hidden_size
    shape = specification_fields(outline.architecture)
    # A student's followers have no query and key weights any more
    for layer in () if outline.is_student else outline.plan.followers:
        heads = shape["query_heads"][layer] + shape["kv_heads"][layer]
        elements -= heads * shape["head_dims"][layer] * hidden
    bits = DTYPES[dtype].bits
    compute: int = DTYPES[dtype].compute.bytes
    if bits is None:
        return elements * compute
    # Where the LM head is a copy of the table of embeddings, both are stored as one
    table: int = min(elements, shape["vocab_size"] * hidden)
    once = elements - table
    return once * bits // 8 + once // BLOCK_SIZE * _SCALE_BYTES
