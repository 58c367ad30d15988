"""EchoAtt's own engine: a bundle under the runtime, driven as `EchoModel.generate` drives it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from echoatt_bench.engine import Decode, Load, Prefill
from echoatt_runtime.cache.kv_cache import KVCache, bucket_capacity
from echoatt_runtime.errors import DamagedBundleError
from echoatt_runtime.generate import BatchDecoder, Chunk, TokenStep, run_chunk
from echoatt_runtime.model import EchoModel
from echoatt_runtime.sampling import SamplingParams
from echoatt_runtime.text.text_stream import Detokenizer

# Keys so small leave the probabilities nearly even: no denormal numbers, which would cost time that
# a text's own keys do not.
_KEY_SPREAD = 0.02


class TimedSession:
    """An ONNX Runtime session that notes how long its runs take, and is otherwise as it was."""

    def __init__(self, ort_session: Any) -> None:
        self._ort_session = ort_session
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ort_session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        """Run, and add to `seconds`."""
        begin = time.perf_counter()
        self._ort_session.run_with_iobinding(binding)
        self.seconds += time.perf_counter() - begin


class BundleEngine:
    """A bundle. It decodes with the caches of its last prefill, if that was as long.

    Else they are filled with small random numbers, which takes the time of no prefill.
    """

    PACKAGES: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def __init__(self, load: Load) -> None:
        self._model = EchoModel.load(load.path, threads=load.threads)
        self._load = load
        self._tokens_BT = load.draw_tokens()
        session = self._model.session
        self._timed = session._ort_session = TimedSession(session._ort_session)
        self._cache: KVCache | None = None
        # tokens of each row that the cache holds
        self._valid = 0
        self._sequences: list[list[int]] = []

    def facts(self) -> dict[str, Any]:
        """Versions, and what is read and kept for a token."""
        manifest = self._model.manifest
        return {
            "version": f"EchoAtt {version('echoatt')}, ONNX Runtime {version('onnxruntime')}",
            "cache_bytes_per_token": manifest.cache_bytes_per_token,
        }

    def prefill(self, context: int) -> Prefill:
        """See `Engine`."""
        prompts = self._tokens_BT[:, :context].tolist()
        self._cache = None
        begin = time.perf_counter()
        decoder = self._decoder(prompts, 1)
        steps = decoder.step()
        seconds = time.perf_counter() - begin
        self._cache, self._valid, self._sequences = decoder._cache, context, []
        return Prefill(seconds, [step.token_id for step in steps])

    def decode(self, start: int, new_tokens: int) -> Decode:
        """See `Engine`; `extra` has the time outside ONNX Runtime, and that of making text."""
        self._cache = self._cache_at(start)
        if self._load.batch == 1 or not self._sequences:
            self._sequences = self._tokens_BT[:, :start].tolist()
        # the prompts' last token is run before anything is timed, unless that was done before
        untimed = start + 1 - len(self._sequences[0])
        decoder = self._decoder(self._sequences, untimed + new_tokens)
        decoder._cache = self._cache
        for _ in range(untimed):
            self._extend(decoder.step())
        inside, marks = [self._timed.seconds], [time.perf_counter()]
        for _ in range(new_tokens):
            self._extend(decoder.step())
            marks.append(time.perf_counter())
            inside.append(self._timed.seconds)
        outside = np.diff(marks) - np.diff(inside)
        tokens = self._sequences[0][-new_tokens:]
        self._valid = max(self._valid, start + new_tokens)
        extra = {"python": float(np.median(outside))}
        with contextlib.suppress(DamagedBundleError):  # a bundle without a tokenizer
            extra["text"] = self._text_seconds(tokens)
        return Decode(np.diff(marks).tolist(), tokens, extra)

    def run_chunk(self, begin: int, end: int) -> None:
        """Run the prompts' tokens from `begin` to `end` as a prefill does."""
        self._cache = self._cache_at(end)
        lengths = np.full(self._load.batch, end - begin)
        chunk = Chunk(self._tokens_BT[:, begin:end], np.full_like(lengths, begin), lengths)
        run_chunk(self._model.session, self._cache, chunk, lengths[:, None] - 1)

    def end_profiling(self) -> str:
        """End the session's profiling, if it was begun; returns the trace's path."""
        return str(self._timed.end_profiling())

    @property
    def prefill_chunk(self) -> int:
        """Most tokens of a prompt that run at once."""
        return self._model.prefill_chunk

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self._model.manifest.head_dim

    def _extend(self, steps: Sequence[TokenStep]) -> None:
        for row, step in zip(self._sequences, steps, strict=True):
            row.append(step.token_id)

    def _decoder(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchDecoder:
        # one more than is asked for, so that no row leaves the batch within what is timed
        params = SamplingParams(max_new_tokens=new_tokens + 1, ignore_eos=True)
        return BatchDecoder(self._model.session, prompts, params, self._model.prefill_chunk)

    def _capacity(self) -> int:
        return bucket_capacity(self._load.capacity, self._load.capacity)

    def _cache_at(self, tokens: int) -> KVCache:
        """A cache that holds so many tokens, with room for all that will be asked for."""
        if self._cache is not None and self._valid >= tokens - 1:
            self._cache.limit = self._load.capacity
            self._cache.reserve(self._load.capacity, self._valid)
            return self._cache
        cache = self._model.session.new_cache(self._load.batch, self._capacity())
        self._valid = self._load.capacity
        rng = np.random.default_rng(0)
        for buffer in cache.to_host():
            rng.standard_normal(buffer.shape, np.float32, out=buffer)
            buffer *= _KEY_SPREAD
        return cache

    def _text_seconds(self, tokens: Sequence[int]) -> float:
        detokenizer = Detokenizer(self._model.tokenizer, [])
        begin = time.perf_counter()
        for token in tokens:
            detokenizer.add(token)
        return (time.perf_counter() - begin) / len(tokens)
