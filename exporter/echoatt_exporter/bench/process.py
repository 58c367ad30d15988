"""A worker process seen from outside: requests, answers, its end, the processor time it takes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Any, cast

from echoatt_exporter.errors import BenchError


class EngineError(BenchError):
    """An engine could not do what it was asked, or its process ended."""


class WorkerProcess:
    """One `echoatt_bench.worker`; a context manager that ends the process.

    Args:
        name: The engine's name, for messages.
        threads: What libraries that read the environment are told.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            # only torch may use OpenMP, and numpy's BLAS would keep threads of its own
            "OPENBLAS_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "echoatt_bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=environment,
            text=True,
        )
        # pipes, because pipes were asked for
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def request(self, request: str, **fields: Any) -> Any:
        """Ask and wait for the answer.

        Args:
            request: The name of the request.
            fields: Its arguments, as JSON can hold them.

        Raises:
            EngineError: The engine refused, or the process is gone.
        """
        try:
            self._requests.write(json.dumps({"request": request, **fields}) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        except OSError:  # the pipe is broken
            line = ""
        if not line:
            raise EngineError(f"{self.name}: {request} failed: {self._end()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {request} failed: {answer['error']}")
        return answer["ok"]

    def processor_seconds(self) -> float:
        """Processor time that the process took so far, in nanosecond steps.

        Threads that have ended count too, which the kernel's own clock of the process knows and a
        walk over its threads does not.

        Raises:
            EngineError: The process has ended and was waited for.
        """
        clock = ctypes.c_int()
        fault = ctypes.CDLL(None).clock_getcpuclockid(self.pid, ctypes.byref(clock))
        if fault:
            raise EngineError(f"{self.name}: no processor time to read ({os.strerror(fault)})")
        return time.clock_gettime(clock.value)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._answers.close()
        with contextlib.suppress(BrokenPipeError):  # what was not read any more
            self._requests.close()
        self._words.close()

    def _end(self) -> str:
        """Why the process is gone, in a phrase."""
        code = self._process.wait()
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip()
        last = f" ({' '.join(words.splitlines()[-1].split())})" if words else ""
        if code == -signal.SIGKILL:
            return f"its process was killed, most likely for want of memory{last}"
        return f"its process ended with {code}{last}"
