"""EchoAtt's own engine: a bundle under the runtime, driven as `EchoModel.generate` drives it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from echoatt_bench.engine import Decode, Load, Prefill
from echoatt_runtime import SamplingParams
from echoatt_runtime.bundle import Bundle
from echoatt_runtime.cache import KVCache
from echoatt_runtime.errors import DamagedBundleError
from echoatt_runtime.executor import PREFILL_CHUNK, open_executor
from echoatt_runtime.generation import Batch, TokenSequence
from echoatt_runtime.text import Detokenizer, TextTokenizer

# Keys so small leave the probabilities nearly even: no denormal numbers, which would cost time that
# a text's own keys do not.
_KEY_SPREAD = 0.02


class BundleEngine:
    """A bundle. It decodes with the caches of its last prefill, if that was as long.

    Else they are filled with small random numbers, which takes the time of no prefill.

    Attributes:
        executor: What runs it.
    """

    PACKAGES: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def __init__(self, load: Load, profile: Path | None = None) -> None:
        self._bundle = Bundle.open(load.path)
        self.executor = open_executor(self._bundle, threads=load.threads, profile=profile)
        self._load = load
        self._tokens_BT = load.draw_tokens()
        self._cache: KVCache | None = None
        # tokens of each row that the cache holds
        self._valid = 0
        self._batch: Batch | None = None

    def facts(self) -> dict[str, Any]:
        """Versions, and what is read and kept for a token."""
        return {
            "version": f"EchoAtt {version('echoatt')}, ONNX Runtime {version('onnxruntime')}",
            "cache_bytes_per_token": self._bundle.specification.cache_bytes_per_token,
        }

    def prefill(self, context: int) -> Prefill:
        """See `Engine`."""
        self._cache = self._batch = None
        begin = time.perf_counter()
        batch = Batch(self.executor, self._load.batch)
        sequences = self._sequences(context, 1)
        batch.join(sequences)
        seconds = time.perf_counter() - begin
        self._cache, self._valid = batch.cache, context
        return Prefill(seconds, [sequence.last_token for sequence in sequences])

    def decode(self, start: int, new_tokens: int) -> Decode:
        """See `Engine`; `extra` has the time outside ONNX Runtime, and that of making text."""
        self._cache = self._cache_at(start)
        if self._load.batch == 1 or self._batch is None:
            sequences = self._sequences(start, self._load.capacity - start)
            self._batch = Batch.resume(self.executor, self._cache, sequences)
        batch = self._batch
        # the prompts' last token is run before anything is timed, unless that was done before
        for _ in range(start + 1 - batch.rows[0].length):
            batch.step()
        session = self.executor.session
        inside, marks = [session.run_seconds], [time.perf_counter()]
        for _ in range(new_tokens):
            batch.step()
            marks.append(time.perf_counter())
            inside.append(session.run_seconds)
        outside = np.diff(marks) - np.diff(inside)
        tokens = batch.rows[0].token_ids[-new_tokens:].tolist()
        self._valid = max(self._valid, start + new_tokens)
        extra = {"python": float(np.median(outside))}
        with contextlib.suppress(DamagedBundleError):  # a bundle without a tokenizer
            extra["text"] = self._text_seconds(tokens)
        return Decode(np.diff(marks).tolist(), tokens, extra)

    def run_chunk(self, begin: int, end: int) -> None:
        """Run the prompts' tokens from `begin` to `end` as a prefill does."""
        self._cache = self._cache_at(end)
        rows = np.full(self._load.batch, begin)
        last = np.full((self._load.batch, 1), end - begin - 1)
        self.executor.run(self._cache, self._tokens_BT[:, begin:end], rows, last)

    @property
    def prefill_chunk(self) -> int:
        """Most tokens of a prompt that run at once."""
        return PREFILL_CHUNK

    def _sequences(self, length: int, new_tokens: int) -> list[TokenSequence]:
        """Rows with the first tokens of their texts, and room so that none leaves the batch."""
        params = SamplingParams(max_new_tokens=new_tokens + 1, ignore_eos=True)
        return [
            TokenSequence(row[:length].tolist(), params, self._bundle.specification, None)
            for row in self._tokens_BT
        ]

    def _cache_at(self, tokens: int) -> KVCache:
        """A cache that holds so many tokens, with room for all that will be asked for."""
        capacity = self._load.capacity
        if self._cache is not None and self._valid >= tokens - 1:
            self._cache.limit = max(capacity, self._cache.limit)
            self._cache.reserve(capacity, [self._valid] * self._load.batch)
            return self._cache
        cache = self.executor.new_cache(self._load.batch, capacity, capacity)
        self._valid = capacity
        self._batch = None
        rng = np.random.default_rng(0)
        for index in range(len(cache.specs)):
            buffer = cache.array(index)
            rng.standard_normal(buffer.shape, np.float32, out=buffer)
            buffer *= _KEY_SPREAD
        return cache

    def _text_seconds(self, tokens: Sequence[int]) -> float:
        bundle = self._bundle
        tokenizer = TextTokenizer.from_files(bundle.companion, bundle.model.parent)
        detokenizer = Detokenizer(tokenizer, [])
        begin = time.perf_counter()
        for token in tokens:
            detokenizer.add(token)
        return (time.perf_counter() - begin) / len(tokens)
