"""The rules that a manifest's fields obey together; `manifest` reads the fields and asks here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

FORMAT_NUMBER: Final = 2
FORMAT: Final = f"echoatt-bundle/{FORMAT_NUMBER}"
DTYPES: Final = ("fp32", "fp16", "bf16", "int8", "int4")
DEVICES: Final = ("cpu", "cuda")
LAYER_KINDS: Final = ("full", "sliding")

_POSITIVE: Final = ("num_query_heads", "num_kv_heads", "head_dim", "vocab_size", "context_length")


def consistency_faults(values: Mapping[str, Any]) -> list[str]:
    """Every contradiction among those fields that could be read."""
    faults = [
        f"{name} is {values[name]}, which is not positive"
        for name in _POSITIVE
        if name in values and values[name] < 1
    ]
    for name, allowed in (("format", (FORMAT,)), ("dtype", DTYPES), ("device", DEVICES)):
        if name in values and values[name] not in allowed:
            faults.append(f"{name} is {values[name]!r}, not one of {', '.join(allowed)}")
    if "num_query_heads" in values and values.get("num_kv_heads", 0) >= 1:
        query_heads, kv_heads = values["num_query_heads"], values["num_kv_heads"]
        if query_heads % kv_heads:
            faults.append(
                f"{query_heads} query heads do not divide into {kv_heads} key/value heads"
            )
    faults += _plan_faults(values.get("sources"), values.get("layer_kinds"))
    orders, sources = values.get("head_orders"), values.get("sources")
    if orders and sources and len(orders) != len(sources):
        faults.append(f"head_orders has {len(orders)} layers and sources {len(sources)}")
    faults += _kind_faults(values)
    faults += _token_faults(values)
    faults += _weights_faults(values)
    checkpoint = values.get("source_checkpoint")
    if checkpoint and not re.fullmatch(r"[0-9a-f]{64}", checkpoint.sha256):
        faults.append("source_checkpoint.sha256 is not 64 hexadecimal digits")
    return faults


def _plan_faults(sources: tuple[int, ...] | None, kinds: tuple[str, ...] | None) -> list[str]:
    if sources is None:
        return []
    if not sources:
        return ["sources is empty"]
    faults = []
    same_length = kinds is not None and len(kinds) == len(sources)
    if kinds is not None and not same_length:
        faults.append(f"layer_kinds has {len(kinds)} layers and sources {len(sources)}")
    for layer, source in enumerate(sources):
        if source == layer:
            continue
        if not 0 <= source < layer:
            faults.append(f"layer {layer} follows layer {source}, which is not an earlier layer")
        elif sources[source] != source:
            faults.append(f"layer {layer} follows layer {source}, which is itself a follower")
        elif kinds is not None and same_length and kinds[layer] != kinds[source]:
            faults.append(
                f"layer {layer} ({kinds[layer]}) follows layer {source} ({kinds[source]}), "
                "another attention kind"
            )
    return faults


def _kind_faults(values: Mapping[str, Any]) -> list[str]:
    kinds = values.get("layer_kinds", ())
    faults = [
        f"layer_kinds[{layer}] is {kind!r}, not one of {', '.join(LAYER_KINDS)}"
        for layer, kind in enumerate(kinds)
        if kind not in LAYER_KINDS
    ]
    if "sliding_window" in values:
        window = values["sliding_window"]
        if "sliding" in kinds and window is None:
            faults.append("sliding_window is null although layers are sliding")
        elif window is not None and window < 1:
            faults.append(f"sliding_window is {window}, which is not positive")
    return faults


def _token_faults(values: Mapping[str, Any]) -> list[str]:
    vocab_size = values.get("vocab_size")
    if vocab_size is None:
        return []
    tokens = [(name, values.get(name)) for name in ("bos_token_id", "pad_token_id")]
    tokens += [("eos_token_ids", token) for token in values.get("eos_token_ids", ())]
    return [
        f"{name} has {token}, outside the vocabulary of {vocab_size}"
        for name, token in tokens
        if token is not None and not 0 <= token < vocab_size
    ]


def _weights_faults(values: Mapping[str, Any]) -> list[str]:
    faults = []
    name = values.get("weights_file")
    # A bare name keeps a crafted manifest from pointing outside the bundle's directory.
    if name is not None and (name in ("", ".", "..") or re.search(r"[/\\\0]", name)):
        faults.append(f"weights_file is {name!r}, not a bare file name")
    if values.get("weights_bytes", 0) < 0:
        faults.append(f"weights_bytes is {values['weights_bytes']}, which is negative")
    return faults
