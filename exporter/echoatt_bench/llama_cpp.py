"""llama.cpp through llama-cpp-python's plain bindings, which know several rows at once."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from echoatt_bench.engine import Decode, Load, Prefill, package

# Buffers are made in steps of this many tokens
_BUCKET = 256


class LlamaCppEngine:
    """A GGUF file with llama.cpp's own defaults: a float16 cache, flash attention where it has it.

    Rows are sequences. Tokens are removed from the end of one to go back.
    """

    PACKAGES: ClassVar[tuple[str, ...]] = ("llama_cpp",)

    def __init__(self, load: Load) -> None:
        self._lib: Any = package("llama_cpp")
        lib = self._lib
        # kept, because the library calls it for as long as it lives
        self._silence = lib.llama_log_callback(lambda _level, _text, _data: None)
        lib.llama_log_set(self._silence, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(
            load.path.encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {load.path}")
        params = lib.llama_context_default_params()
        params.n_ctx = load.batch * _BUCKET * -(-load.capacity // _BUCKET)
        params.n_seq_max = load.batch
        params.n_threads = params.n_threads_batch = load.threads
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._most = int(params.n_batch)
        self._batch = lib.llama_batch_init(self._most, 0, 1)
        self._load = load
        self._tokens_BT = load.draw_tokens()
        # tokens that every row holds, and how many of them are the prompt's
        self._position = self._prompt_tokens = 0
        self._chosen: list[int] = []

    def facts(self) -> dict[str, Any]:
        """Versions."""
        return {"version": f"llama-cpp-python {version('llama-cpp-python')}"}

    def prefill(self, context: int) -> Prefill:
        """See `Engine`."""
        self._keep(0)
        begin = time.perf_counter()
        self._chosen = self._prompt(0, context)
        return Prefill(time.perf_counter() - begin, self._chosen)

    def decode(self, start: int, new_tokens: int) -> Decode:
        """See `Engine`."""
        if start != self._position:
            kept = min(self._prompt_tokens, start - 1)
            self._keep(kept)
            self._chosen = self._prompt(kept, start)
        tokens = []
        marks = [time.perf_counter()]
        for _ in range(new_tokens):
            self._chosen = self._step(self._chosen)
            tokens.append(self._chosen[0])
            marks.append(time.perf_counter())
        return Decode(np.diff(marks).tolist(), tokens)

    def _keep(self, tokens: int) -> None:
        memory = self._lib.llama_get_memory(self._context)
        for row in range(self._load.batch):
            self._lib.llama_memory_seq_rm(memory, row, tokens, -1)
        self._position = self._prompt_tokens = tokens

    def _prompt(self, begin: int, end: int) -> list[int]:
        """Run the prompts' tokens, row after row, and chooses what follows each."""
        chosen = []
        for row, tokens_T in enumerate(self._tokens_BT):
            for first in range(begin, end, self._most):
                positions = range(first, min(first + self._most, end))
                self._run(tokens_T[first : positions.stop], positions, [row] * len(positions))
            chosen.append(self._greatest(len(positions) - 1))
        self._position = self._prompt_tokens = end
        return chosen

    def _step(self, tokens: Sequence[int]) -> list[int]:
        rows = range(self._load.batch)
        self._run(tokens, [self._position] * len(rows), rows, every=True)
        self._position += 1
        return [self._greatest(row) for row in rows]

    def _run(
        self,
        tokens: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]],
        positions: Sequence[int],
        rows: Sequence[int],
        *,
        every: bool = False,
    ) -> None:
        """Run tokens at their places; logits of the last, or of `every` one."""
        batch, count = self._batch, len(positions)
        batch.n_tokens = count
        for place in range(count):
            batch.token[place] = int(tokens[place])
            batch.pos[place] = positions[place]
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = rows[place]
            batch.logits[place] = every or place == count - 1
        if code := self._lib.llama_decode(self._context, batch):
            raise ValueError(f"llama_decode ended with {code}")

    def _greatest(self, place: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, place)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._load.vocab_size,))))
