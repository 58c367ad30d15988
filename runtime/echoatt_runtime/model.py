"""`EchoModel`: a bundle with its tokenizer, from prompts to text.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from echoatt_runtime.cache.kv_cache import bucket_capacity
from echoatt_runtime.contract.manifest import Manifest
from echoatt_runtime.errors import ContextOverflowError, OptionError, PromptError
from echoatt_runtime.executor.session import Session, open_session
from echoatt_runtime.generate import (
    PREFILL_CHUNK,
    check_token_ids,
    iter_chunks,
    run_chunk,
    stream_batch,
)
from echoatt_runtime.results import GenerationResult, TextPiece
from echoatt_runtime.sampling import SamplingParams
from echoatt_runtime.text.chat import Message, render_chat
from echoatt_runtime.text.tokenizer import TextTokenizer

# Text, tokens, or the messages of a chat.
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]


class EchoModel:
    """A bundle, loaded and ready to generate. `EchoModel.load` makes one from a path.

    Attributes:
        session: The lower layer: logits and caches, without text.
        prefill_chunk: Most prompt tokens that run at once.
    """

    def __init__(self, session: Session, *, prefill_chunk: int = PREFILL_CHUNK) -> None:
        if prefill_chunk < 1:
            raise OptionError(f"prefill_chunk is {prefill_chunk}; give at least 1")
        self.session = session
        self.prefill_chunk = prefill_chunk

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        threads: int | None = None,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> EchoModel:
        """Load a bundle.

        Args:
            path: The .onnx file, or a directory that holds model.onnx.
            device: "cpu" or "cuda"; a device that does not work is an error, never replaced.
            threads: CPU threads that one operator may use; None leaves it to ONNX Runtime.
            prefill_chunk: Most prompt tokens to run at once. Attention's memory grows with it.

        Raises:
            BundleError: There is no usable bundle; the subclass says why.
            OptionError: `threads` or `prefill_chunk` is not positive.
            DeviceError: The device is unknown, did not load, or cannot run the bundle's dtype.
            MissingDependencyError: ONNX Runtime is not installed.
        """
        return cls(open_session(path, device, threads), prefill_chunk=prefill_chunk)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.session.manifest

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The checkpoint's tokenizer, read from beside the model at first use.

        Raises:
            DamagedBundleError: There is none, or it cannot be read.
        """
        return TextTokenizer.from_directory(self.session.path.parent)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[GenerationResult]:
        """Generate for one prompt or for a batch, whose prompts may differ in length.

        Args:
            prompts: A prompt, or a list of them. A prompt is text, a list of tokens, or a list of
                chat messages with "role" and "content".
            params: How to choose tokens and when to stop; greedy without.

        Returns:
            A result for every prompt, in order.

        Raises:
            PromptError: A prompt is empty or has tokens outside the vocabulary.
            ContextOverflowError: A prompt leaves no room for a new token.
            ChatTemplateError: There is no chat template, or it refuses the messages.
            NumericalError: The model computed logits that are not numbers.
        """
        batch = [self._encode(prompt) for prompt in _as_batch(prompts)]
        results: list[GenerationResult | None] = [None] * len(batch)
        for row, piece in self._stream(batch, params):
            if piece.result is not None:
                results[row] = piece.result
        return cast(list[GenerationResult], results)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TextPiece]:
        """Generate for one prompt and yields text as it becomes certain.

        Args:
            prompt: Text, a list of tokens, or a list of chat messages.
            params: How to choose tokens and when to stop; greedy without.

        Returns:
            An iterator of pieces; the last carries the finish reason and the joined result.

        Raises:
            PromptError: As `generate`, at the call.
            ContextOverflowError: As `generate`, at the call.
            ChatTemplateError: As `generate`, at the call.
            NumericalError: As `generate`, while iterating.
        """
        pieces = self._stream([self._encode(prompt)], params)
        return (piece for _, piece in pieces)

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits at every position of one text, for perplexity and comparisons.

        Args:
            token_ids: At least one token, and no more than the context holds.

        Returns:
            [S, V]; row s has the logits of the token after position s.

        Raises:
            PromptError: No tokens, or tokens outside the vocabulary.
            ContextOverflowError: More tokens than the context holds.
        """
        manifest = self.manifest
        check_token_ids([token_ids], manifest.vocab_size)
        if len(token_ids) > manifest.context_length:
            raise ContextOverflowError(
                f"{len(token_ids)} tokens do not fit the context of {manifest.context_length}; "
                "cut the text into windows"
            )
        first, limit = min(len(token_ids), self.prefill_chunk), len(token_ids)
        cache = self.session.new_cache(1, bucket_capacity(first, limit), limit)
        logits_SV = np.empty((len(token_ids), manifest.vocab_size), np.float32)
        for chunk in iter_chunks([token_ids], self.prefill_chunk):
            start, length = int(chunk.past_lengths[0]), int(chunk.lengths[0])
            positions = np.arange(length, dtype=np.int64)[None]
            logits_SV[start : start + length] = run_chunk(self.session, cache, chunk, positions)[0]
        return logits_SV

    def _stream(
        self, batch: Sequence[Sequence[int]], params: SamplingParams | None
    ) -> Iterator[tuple[int, TextPiece]]:
        return stream_batch(
            self.session, self.tokenizer, batch, params or SamplingParams(), self.prefill_chunk
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty; give at least one character")
            return self.tokenizer.encode(prompt)
        if len(prompt) == 0:
            raise PromptError("the prompt is empty; give at least one token or message")
        if all(isinstance(item, Mapping) for item in prompt):
            text = render_chat(self.tokenizer, cast(Sequence[Message], prompt))
            return self.tokenizer.encode(text, add_special_tokens=False)
        if all(_is_token(item) for item in prompt):
            return [int(token) for token in cast(Sequence[int], prompt)]
        raise PromptError(
            "a prompt mixes kinds; give text, a list of tokens, or a list of chat messages"
        )


def _is_token(item: object) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A single prompt as a batch of one."""
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) == 0:
        raise PromptError("there are no prompts; give at least one")
    if isinstance(prompts[0], Mapping) or _is_token(prompts[0]):
        return [cast(Prompt, prompts)]
    return cast(Sequence[Prompt], prompts)
