"""Opens a bundle for execution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from echoatt_runtime.bundle import Bundle
from echoatt_runtime.cache import HostMemory, Memory
from echoatt_runtime.contract import DEVICES, Specification
from echoatt_runtime.errors import DamagedBundleError, DeviceError
from echoatt_runtime.executor.cuda_memory import CudaMemory
from echoatt_runtime.executor.decoding import Decoding
from echoatt_runtime.executor.device_weights import put_on_device
from echoatt_runtime.executor.executor import Executor
from echoatt_runtime.huge_pages import merge_pages_since, private_memory
from echoatt_runtime.ort import OrtSession, SessionOptions, open_session

# The contract's names of dimensions, where a call has one new token a row
_ONE_TOKEN: Final = {"seq": 1, "n": 1}


def open_executor(
    bundle: Bundle | str | Path,
    device: str = "cpu",
    threads: int | None = None,
    *,
    foreign: bool = False,
    profile: Path | None = None,
) -> Executor:
    """Open a bundle on a device.

    Args:
        bundle: A bundle whose files were checked, or where one is.
        device: "cpu" or "cuda"; a device that does not work is an error, never replaced.
        threads: CPU threads that one operator may use; None leaves it to ONNX Runtime.
        foreign: Whether the device may be another than the one that the bundle was lowered for,
            where it may be slow or lack kernels.
        profile: What the name of a profile's file begins with; None does not profile.

    Raises:
        BundleError: There is no usable bundle; the subclass says why.
        OptionError: `threads` is no positive integer.
        DeviceError: The device is unknown, did not load, or is not the bundle's.
        OutOfMemoryError: There is no room for the model.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    _check_device(bundle, device, foreign=foreign)
    before = private_memory() if device == "cpu" else None
    lent = put_on_device(bundle) if device == "cuda" else None
    options = SessionOptions(device=device, threads=threads, profile=profile, lent=lent)
    session = open_session(bundle.model, options)
    decoding = _open_decoding(bundle, options) if device == "cuda" else None
    if not bundle.is_unchanged():
        raise DamagedBundleError(f"{bundle.model} was replaced while it was opened; open it again")
    if before is not None:
        merge_pages_since(before)
    return executor_of(session, bundle.specification, decoding=decoding)


def executor_of(
    session: OrtSession,
    specification: Specification,
    extra_outputs: Sequence[str] = (),
    decoding: Decoding | None = None,
) -> Executor:
    """An executor of a session that is there already.

    Args:
        session: The graph.
        specification: What it computes.
        extra_outputs: As in `Executor`.
        decoding: As in `Executor`.

    Raises:
        DamagedBundleError: The graph is not as specified.
        DeviceError: The device's own library did not load.
    """
    memory: Memory = HostMemory(0) if session.device == "cpu" else CudaMemory(0)
    return Executor(session, specification, memory, extra_outputs, decoding)


def _open_decoding(bundle: Bundle, options: SessionOptions) -> Decoding:
    """What runs single tokens on a CUDA device; `options` are those of the other session."""
    profile = options.profile
    if profile is not None:
        profile = profile.with_name(f"{profile.name}.decoding")
    own = dataclasses.replace(options, profile=profile, sizes=_ONE_TOKEN, capture=True)

    def open_own() -> OrtSession:
        if not bundle.is_unchanged():
            raise DamagedBundleError(f"{bundle.model} was replaced while in use; load it again")
        return open_session(bundle.model, own)

    return Decoding(open_own, bundle.specification, CudaMemory(0))


def _check_device(bundle: Bundle, device: str, *, foreign: bool) -> None:
    if not isinstance(device, str) or device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}; use one of {', '.join(DEVICES)}")
    specification = bundle.specification
    if device == "cpu" and specification.dtype == "bf16":
        raise DeviceError(
            f"{bundle.model} is a bf16 bundle and ONNX Runtime's CPU provider has no bf16 kernels; "
            "load it with device='cuda', or export with --dtype fp32, int8 or int4"
        )
    if device != specification.device and not foreign:
        raise DeviceError(
            f"{bundle.model} was lowered for {specification.device} and not for {device}; load it "
            f"with device={specification.device!r}, or export it with --device {device}"
        )
