"""Finds a lowering by its name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

import echoatt_exporter.graph.lowering as package
from echoatt_exporter.errors import ExportError
from echoatt_exporter.graph.run import PassStep
from echoatt_runtime.contract import Specification


def lowerings() -> list[str]:
    """The names of all lowerings."""
    return sorted(found.name for found in pkgutil.iter_modules(package.__path__) if found.ispkg)


def lowering_steps(specification: Specification) -> list[PassStep]:
    """The passes of the lowering that a specification names.

    Raises:
        ExportError: There is none of that name.
    """
    name = specification.device
    if name not in lowerings():
        raise ExportError(f"there is no lowering {name!r}; choose one of {', '.join(lowerings())}")
    module = importlib.import_module(f"{package.__name__}.{name}")
    return cast(list[PassStep], module.steps(specification))
