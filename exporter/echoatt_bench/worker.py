"""The worker process: one engine, told what to do by JSON lines.

`python -m echoatt_bench.worker` reads a request a line from standard input and writes an answer
a line to what was its standard output: `{"ok": ...}`, or `{"error": "one line"}`. Between
requests it waits in a read, so that it takes no processor time from the engine being measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from echoatt_bench.engine import Engine, Load, package
from echoatt_runtime.errors import one_line


def _engine_class(kind: str) -> type[Engine]:
    """Import only what its own engine needs."""
    if kind == "echoatt":
        from echoatt_bench.bundle import BundleEngine

        return BundleEngine
    if kind == "genai":
        from echoatt_bench.genai import GenaiEngine

        return GenaiEngine
    if kind == "torch":
        from echoatt_bench.pytorch import TorchEngine

        return TorchEngine
    if kind == "llama.cpp":
        from echoatt_bench.llama_cpp import LlamaCppEngine

        return LlamaCppEngine
    raise ValueError(f"there is no engine {kind!r}")


class Worker:
    """What the process can be asked: every public method is a request of that name."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._anonymous_bytes = 0

    def load(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Load an engine, after importing its packages."""
        engine = _engine_class(kind)
        for name in engine.PACKAGES:
            package(name)
        begin = time.perf_counter()
        self._engine = engine(Load(**fields))
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "facts": self._engine.facts()}

    def prefill(self, context: int) -> dict[str, Any]:
        """`Engine.prefill`."""
        return dataclasses.asdict(self._loaded().prefill(context))

    def decode(self, start: int, new_tokens: int) -> dict[str, Any]:
        """`Engine.decode`."""
        return dataclasses.asdict(self._loaded().decode(start, new_tokens))

    def memory_speed(self, threads: int, **size: int) -> float:
        """Bytes a second, by an array that is there for the time of the request."""
        from echoatt_bench.memory import MemoryReader

        return MemoryReader(threads, **size).bytes_per_second()

    def profile(self, **fields: Any) -> list[dict[str, Any]]:
        """Profiles a bundle."""
        from echoatt_bench.profile import profile_bundle

        return profile_bundle(**fields)

    def memory(self) -> dict[str, int]:
        """Most bytes that the process ever held, and most without mapped files after a request."""
        return {
            "peak_bytes": _status_bytes("VmHWM"),
            "anonymous_bytes": self._anonymous_bytes,
        }

    def note_memory(self) -> None:
        """Remembers how much is held, mapped files aside."""
        self._anonymous_bytes = max(self._anonymous_bytes, _status_bytes("RssAnon"))

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise ValueError("nothing is loaded")
        return self._engine


_REQUESTS = ("load", "prefill", "decode", "memory_speed", "profile", "memory")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def serve() -> None:
    """Answers requests until standard input ends."""
    # Libraries print; their words go to standard error and the answers keep a pipe of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Where an engine takes more memory than there is, it goes and nobody else
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("request")
        try:
            if name not in _REQUESTS:
                raise ValueError(f"there is no request {name!r}")
            call: Callable[..., Any] = getattr(worker, name)
            answer = {"ok": call(**request)}
            worker.note_memory()
        except Exception as error:  # noqa: BLE001  # whatever an engine raises is told
            answer = {"error": one_line(error) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
