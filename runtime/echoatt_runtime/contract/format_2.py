"""Bundles of format 2, which said everything in one flat object and listed one file only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from echoatt_runtime.contract.caches import lay_out_caches
from echoatt_runtime.contract.element_types import DTYPES
from echoatt_runtime.contract.plan import SharingPlan
from echoatt_runtime.contract.specification import to_data

# What such a runtime read from beside the model, if it was there
_COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
_MOVED: Final = ("exporter_version", "verification", "weights_file", "weights_bytes", "format")
_BY_LAYER: Final = {"query_heads": "num_query_heads", "kv_heads": "num_kv_heads"} | {
    "head_dims": "head_dim"
}


def upgrade(data: Mapping[str, Any], format_name: str) -> dict[str, Any]:
    """A manifest of format 2 as the present format has it.

    What is wrong with it stays wrong, and is found when the result is read.

    Args:
        data: The manifest's JSON object.
        format_name: The present format.
    """
    specification = {
        name: value
        for name, value in data.items()
        if name not in (*_MOVED, *_BY_LAYER.values(), "sources", "head_orders")
    }
    sources = data.get("sources")
    count = len(sources) if isinstance(sources, list) else 0
    orders = {"head_orders": data["head_orders"]} if data.get("head_orders") else {}
    specification["plan"] = {"sources": sources, **orders}
    for name, old in _BY_LAYER.items():
        if old in data:
            specification[name] = [data[old]] * count
    specification["caches"] = _caches(data, sources)
    companions = [
        {"name": name, "role": "companion", "bytes": None, "sha256": None} for name in _COMPANIONS
    ]
    weights = {
        "name": data.get("weights_file"),
        "role": "weights",
        "bytes": data.get("weights_bytes"),
        "sha256": None,
    }
    return {
        "format": format_name,
        "requires": [],
        "specification": specification,
        "files": [weights, *companions],
        **{name: data[name] for name in ("exporter_version", "verification") if name in data},
    }


def _caches(data: Mapping[str, Any], sources: Any) -> list[Any]:
    """The caches that such a bundle has; none where its numbers are no numbers."""
    heads, size, dtype = data.get("num_kv_heads"), data.get("head_dim"), data.get("dtype")
    if not isinstance(heads, int) or not isinstance(size, int) or not isinstance(sources, list):
        return []
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return []
    if any(type(source) is not int for source in sources):
        return []
    plan = SharingPlan(tuple(sources))
    count, element_type = plan.num_layers, DTYPES[dtype].compute.name
    caches = lay_out_caches(plan, [heads] * count, [size] * count, element_type)
    return [to_data(cache) for cache in caches]
