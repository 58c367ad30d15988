"""The real CUDA provider over stand-ins for CUDA's libraries, where there is no GPU.

onnxruntime-gpu has the import name of the CPU build, and the stand-ins take the place of libraries:
so both are for child processes only, and are kept in folders of their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".venv"
WHEEL = "onnxruntime-gpu==1.31.1"
WHEEL_VARIABLE = "ECHOATT_ORT_GPU"
_SECONDS = 120


@contextmanager
def _locked(name: str) -> Iterator[Path]:
    """A kept folder's path; no other process makes it meanwhile."""
    KEPT.mkdir(exist_ok=True)
    with (KEPT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield KEPT / name


def _make(folder: Path, *command: str | Path, seconds: int = _SECONDS) -> None:
    """Let a command, whose last argument is a folder, make `folder`: whole, or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as work:
        try:
            done = subprocess.run(
                [*command, Path(work, "new")],
                check=False,
                capture_output=True,
                text=True,
                timeout=seconds,
                # A script's python3 is this one
                env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{folder} could not be made in {seconds} seconds")
        if done.returncode:
            said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
            pytest.skip(f"{folder} could not be made: {said}")
        Path(work, "new").rename(folder)


@pytest.fixture(scope="session")
def stand_ins(shared_dir: Path) -> Path:
    """A folder with stand-ins for CUDA's libraries, built once."""
    source = shared_dir / "tools" / "gpu" / "stub"
    if not source.is_dir():
        pytest.skip(f"{source} is absent: no stand-ins for CUDA's libraries")
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("there is no C compiler to build stand-ins for CUDA's libraries")
    digest = hashlib.sha256()
    for path in sorted(source.iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    with _locked(f"cuda-stand-ins-{digest.hexdigest()[:12]}") as folder:
        if not folder.exists():
            _make(folder, source / "build.sh")
    return folder


@pytest.fixture(scope="session")
def gpu_wheel(stand_ins: Path) -> Path:
    """A folder with onnxruntime-gpu: `ECHOATT_ORT_GPU`, or one of 340 MB that is fetched once.

    The stand-ins come first, for nothing is fetched where they cannot be built.
    """
    named = os.environ.get(WHEEL_VARIABLE)
    if named:
        folder = Path(named)
    else:
        with _locked("ort-gpu") as folder:
            if not folder.exists():
                pip = "install --no-deps --quiet --disable-pip-version-check --no-input"
                quick = "--retries 1 --timeout 20 --only-binary=:all:"
                arguments = [*pip.split(), *quick.split(), WHEEL, "--target"]
                _make(folder, sys.executable, "-m", "pip", *arguments)
    extension = f"onnxruntime_pybind11_state{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not (folder / "onnxruntime" / "capi" / extension).exists():
        pytest.skip(f"{folder} holds no {WHEEL} for this Python")
    return folder


@pytest.fixture
def run_python(gpu_wheel: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python(*arguments, env=...)`: this Python, with the GPU build of ONNX Runtime."""

    def run(*arguments: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
        path = os.pathsep.join(filter(None, [str(gpu_wheel), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *arguments],
            check=False,
            cwd=ROOT,
            env=kept | {"PYTHONPATH": path} | env,
            capture_output=True,
            text=True,
        )

    return run
