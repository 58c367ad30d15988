"""What only a GPU can show: `make test-gpu`. Without one, everything here is skipped."""

from __future__ import annotations

import pytest

from echoatt_runtime.ort import has_cuda


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """Skip where ONNX Runtime sees no GPU."""
    if not has_cuda():
        pytest.skip("ONNX Runtime sees no GPU here: make test-gpu says more where there is one")
