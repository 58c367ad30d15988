"""The families of decoders that EchoAtt knows, one file each.

A module of this package with a `FAMILY` is a family; nothing lists them. What most families have in
common are the defaults of `families.base.Family`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from transformers import PreTrainedConfig

from echoatt_exporter.errors import UnsupportedModelError
from echoatt_exporter.families.attention_kinds import LayerKind
from echoatt_exporter.families.base import Family
from echoatt_exporter.families.head_layouts import LayerHeads

__all__ = ["FAMILIES", "Family", "LayerHeads", "LayerKind", "family_of", "known_families"]


def _find() -> dict[str, Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    found: list[Family] = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in found}


FAMILIES: Mapping[str, Family] = _find()


def known_families() -> str:
    """The supported model types, for a message."""
    return ", ".join(sorted(FAMILIES))


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a teacher's configuration.

    Raises:
        UnsupportedModelError: It is none that EchoAtt knows.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} is not supported; EchoAtt knows {known_families()}"
        )
    return family
