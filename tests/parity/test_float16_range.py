"""A checkpoint whose activations leave float16 is found, and one whose stay in it is let pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parity.conftest import specify

from echoatt_exporter.parity import check_float16_range
from echoatt_exporter.share.apply import share_attention
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.errors import NumericalError


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_that_overflow_are_named(tiny_model: Any, dtype: torch.dtype) -> None:
    student = share_attention(tiny_model("llama"), SharingPlan((0, 0, 0, 3, 3, 5))).to(dtype)
    specification = specify(student, "fp16")
    check_float16_range(student, specification, None)
    with torch.no_grad():
        mlp = student.decoder.model.layers[4].mlp
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight *= 200
    with pytest.raises(
        NumericalError, match=r"4\.mlp\.down_proj goes beyond 65,504.*bf16"
    ) as caught:
        check_float16_range(student, specification, None)
    assert "\n" not in str(caught.value)
