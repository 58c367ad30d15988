"""Devices of PyTorch."""

from __future__ import annotations

import torch

from echoatt_runtime.errors import DeviceError, one_line


def check_torch_device(device: str) -> None:
    """Refuse a device that PyTorch does not have here.

    Raises:
        DeviceError: The message says why.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch built without CUDA asserts it
        raise DeviceError(f"no device {device!r} to run on ({one_line(error)})") from error
