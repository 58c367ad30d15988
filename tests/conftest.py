"""Fixtures for every test folder.

Nothing here imports torch until a fixture that needs it is used: the runtime's tests run without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# Read once, when transformers is imported
os.environ["HF_HUB_OFFLINE"] = "1"
# Read once, when torch is imported. Tiny models gain nothing from more threads, and where other
# work runs beside the tests the threads' waiting for each other takes most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

if TYPE_CHECKING:
    from tests.oracle_llama import LlamaOracle
    from transformers import PreTrainedModel

    from echoatt_runtime.contract import SharingPlan


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together what shares an exported model, where pytest-xdist spreads the tests.

    The families' tests share nothing and take longest, so each goes to whoever is free.
    """
    for item in items:
        if item.path.name != "test_families.py" or item.path.parent.name != "export":
            whole_folder = item.path.parent.name in ("parity", "bench")
            shares = item.path.parent if whole_folder else item.path
            item.add_marker(pytest.mark.xdist_group(str(shares)))


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with checkpoints and texts beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: no trained checkpoints or texts to test with")
    return SHARED


@pytest.fixture(scope="session")
def stories260k(shared_dir: Path) -> Path:
    """The directory of a small trained Llama checkpoint."""
    path = shared_dir / "models" / "stories260k"
    if not path.is_dir():
        pytest.skip(f"{path} is absent: no trained checkpoint to test with")
    return path


@pytest.fixture(scope="session")
def oracle() -> type[LlamaOracle]:
    """The class of the oracle, an independent Llama decoder with shared probabilities."""
    from tests.oracle_llama import LlamaOracle

    return LlamaOracle


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model(name, seed=0, **config_fields)`: see `tests.tiny_models`."""
    from tests.tiny_models import build_tiny_model

    return build_tiny_model


@pytest.fixture(scope="session")
def plan_for() -> Callable[[str], SharingPlan]:
    """`plan_for(name)`: a plan with at least 40 % followers for a tiny model."""
    from tests.tiny_models import tiny_plan

    return tiny_plan
