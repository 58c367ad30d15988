"""onnxruntime-genai."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from echoatt_bench.engine import Decode, Load, Prefill, package

# Caches are filled with this many tokens at once. Prefill is timed as genai does it by itself,
# whole; but at 16,384 tokens its attention would take more memory than most machines have.
_FILL = 512


class GenaiEngine:
    """A model that genai's own builder made, with room for exactly the tokens that are asked for.

    It goes back with `rewind_to`, which exists for one row only.
    """

    PACKAGES: ClassVar[tuple[str, ...]] = ("onnxruntime_genai",)

    def __init__(self, load: Load) -> None:
        self._genai = package("onnxruntime_genai")
        config = self._genai.Config(load.path)
        options = {"intra_op_num_threads": load.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = self._genai.Model(config)
        self._load = load
        self._tokens_BT = load.draw_tokens().astype(np.int32)
        self._generator: Any = None
        # of the generator: leading tokens that are the prompt's, and all that it has run
        self._prompt_tokens = self._position = 0

    def facts(self) -> dict[str, Any]:
        """Versions."""
        runtime = version("onnxruntime")
        return {"version": f"onnxruntime-genai {version('onnxruntime-genai')}, ORT {runtime}"}

    def prefill(self, context: int) -> Prefill:
        """See `Engine`; the whole prompt at once, as genai does it unless told otherwise."""
        self._generator = None
        begin = time.perf_counter()
        generator = self._new_generator()
        generator.append_tokens(self._tokens_BT[:, :context])
        generator.generate_next_token()
        tokens = [int(token) for token in generator.get_next_tokens()]
        seconds = time.perf_counter() - begin
        self._generator = generator
        self._prompt_tokens = self._position = context
        return Prefill(seconds, tokens)

    def decode(self, start: int, new_tokens: int) -> Decode:
        """See `Engine`."""
        self._go_to(start)
        generator = self._generator
        tokens = []
        marks = [time.perf_counter()]
        for _ in range(new_tokens):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            marks.append(time.perf_counter())
        self._position = start + new_tokens
        return Decode(np.diff(marks).tolist(), tokens)

    def _new_generator(self) -> Any:
        params = self._genai.GeneratorParams(self._model)
        room = self._load.capacity
        # up to min_length no end token is chosen
        params.set_search_options(
            do_sample=False, batch_size=self._load.batch, max_length=room, min_length=room
        )
        return self._genai.Generator(self._model, params)

    def _go_to(self, start: int) -> None:
        """The state in which the next step runs the token at `start` and chooses another."""
        if self._load.batch > 1:
            # several rows take their prompts in one call and cannot go back
            if self._generator is None or start != self._position:
                self.prefill(start)
            return
        valid = min(self._prompt_tokens, start - 1)
        if self._generator is None:
            self._generator = self._new_generator()
        elif valid < self._position:
            self._generator.rewind_to(valid)
        for begin in range(valid, start, _FILL):
            self._generator.append_tokens(self._tokens_BT[:, begin : min(begin + _FILL, start)])
        # the tokens just appended have been run: this only chooses
        self._generator.generate_next_token()
        self._prompt_tokens = start
