"""`EchoModel`: a bundle with its tokenizer, from prompts to text.

Shapes: S tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from echoatt_runtime.bundle import Bundle
from echoatt_runtime.contract import Manifest
from echoatt_runtime.errors import ContextOverflowError, OptionError
from echoatt_runtime.executor import PREFILL_CHUNK, Executor, open_executor, run_texts
from echoatt_runtime.generation import TokenSequence, check_token_ids, generate
from echoatt_runtime.plain_values import as_integer
from echoatt_runtime.prompts import Prompt, as_batch, encode_prompts, one_each
from echoatt_runtime.results import GenerationResult, TextPiece
from echoatt_runtime.sampling import SamplingParams
from echoatt_runtime.text import TextTokenizer


class EchoModel:
    """A bundle, loaded and ready to generate. `EchoModel.load` makes one from a path.

    Attributes:
        bundle: Its files.
        executor: The lower layer: logits and caches, without text.
        prefill_chunk: Most prompt tokens that run at once.
    """

    def __init__(
        self, bundle: Bundle, executor: Executor, *, prefill_chunk: int = PREFILL_CHUNK
    ) -> None:
        chunk = as_integer(prefill_chunk, 1)
        if chunk is None:
            raise OptionError(f"prefill_chunk is {prefill_chunk!r}; give an integer, at least 1")
        self.bundle = bundle
        self.executor = executor
        self.prefill_chunk = chunk

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str = "cpu",
        threads: int | None = None,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        verify: bool = False,
    ) -> EchoModel:
        """Load a bundle.

        Args:
            path: The .onnx file, or a directory that holds model.onnx.
            device: "cpu" or "cuda", as the bundle was exported for; a device that does not work is
                an error, never replaced.
            threads: CPU threads that one operator may use; None leaves it to ONNX Runtime.
            prefill_chunk: Most prompt tokens to run at once. Attention's memory grows with it.
            verify: Compare every file's hash with the manifest first, which reads all of them. The
                graph's hash and all sizes are always compared.

        Raises:
            BundleError: There is no usable bundle; the subclass says why.
            OptionError: `threads` or `prefill_chunk` is no positive integer.
            DeviceError: The device is unknown, did not load, or is not the bundle's.
            OutOfMemoryError: There is no room for the model.
            MissingDependencyError: ONNX Runtime is not installed.
        """
        bundle = Bundle.open(path, verify=verify)
        return cls(bundle, open_executor(bundle, device, threads), prefill_chunk=prefill_chunk)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The checkpoint's tokenizer, read from beside the model at first use.

        Raises:
            DamagedBundleError: There is none, or it cannot be read.
        """
        return TextTokenizer.from_files(self.bundle.companion, self.bundle.model.parent)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        return_errors: bool = False,
    ) -> list[GenerationResult]:
        """Generate for one prompt or for a batch, whose prompts may differ in length.

        A prompt gets the tokens that it gets alone, but for int4 on x86-64 without AVX-512, where
        a single row and several are multiplied by kernels that round differently. On other
        processors that was not looked at.

        Args:
            prompts: A prompt, or a list of them. A prompt is text, a list or array of tokens, or a
                list of chat messages with "role" and "content".
            params: How to choose tokens and when to stop, for all prompts or one for each; greedy
                without.
            tools: For chats, what the model may call, each a JSON schema.
            chat_template_kwargs: For chats, further arguments of the checkpoint's template, such
                as {"enable_thinking": False}.
            return_errors: Whether what goes wrong with one prompt is left in its result, with
                `finish_reason` "error", instead of being raised when all prompts have ended.

        Returns:
            A result for every prompt, in order.

        Raises:
            PromptError: A prompt is empty, no Unicode text, of a kind that is none, or has tokens
                outside the vocabulary.
            OptionError: There are not as many `params` as prompts, an argument is of another kind,
                or there is no chat for `tools` or `chat_template_kwargs`.
            ContextOverflowError: A prompt leaves no room for a new token.
            ChatTemplateError: There is no chat template, or it refuses the messages.
            NumericalError: The model computed logits that are not numbers.
            OutOfMemoryError: There is no room for what the graph computes.
        """
        batch = encode_prompts(as_batch(prompts), self.tokenizer, tools, chat_template_kwargs)
        sequences = [
            self._sequence(tokens, own, f"prompt {index}")
            for index, (tokens, own) in enumerate(
                zip(batch, one_each(params, len(batch)), strict=True)
            )
        ]
        for _ in generate(self.executor, sequences, self.prefill_chunk):
            pass
        results = [cast(GenerationResult, sequence.result) for sequence in sequences]
        for result in results:
            if result.error is not None and not return_errors:
                raise result.error
        return results

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[TextPiece]:
        """Generate for one prompt and yield text as it becomes certain.

        Args:
            prompt: Text, a list or array of tokens, or a list of chat messages.
            params: How to choose tokens and when to stop; greedy without.
            tools: As in `generate`.
            chat_template_kwargs: As in `generate`.

        Returns:
            An iterator of pieces; the last carries the finish reason and the joined result.

        Raises:
            PromptError: As `generate`, at the call.
            OptionError: As `generate`, at the call.
            ContextOverflowError: As `generate`, at the call.
            ChatTemplateError: As `generate`, at the call.
            NumericalError: As `generate`, while iterating.
            OutOfMemoryError: As `generate`, while iterating.
        """
        # Not a generator itself, so that a bad prompt is an error at the call
        (tokens,) = encode_prompts([prompt], self.tokenizer, tools, chat_template_kwargs)
        (own,) = one_each(params, 1)
        return self._pieces(self._sequence(tokens, own, "the prompt"))

    def logits(
        self, token_ids: Sequence[int] | npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.float32]:
        """Logits at every position of one text, for perplexity and comparisons.

        Args:
            token_ids: At least one token, and no more than the context holds.

        Returns:
            [S, V]; row s has the logits of the token after position s.

        Raises:
            PromptError: No tokens, no integers, or tokens outside the vocabulary.
            ContextOverflowError: More tokens than the context holds.
            OutOfMemoryError: There is no room for what the graph computes.
        """
        specification = self.bundle.specification
        token_ids = check_token_ids(token_ids, specification.vocab_size)
        if len(token_ids) > specification.context_length:
            raise ContextOverflowError(
                f"{len(token_ids)} tokens do not fit the context of"
                f" {specification.context_length}; cut the text into windows"
            )
        first, limit = min(len(token_ids), self.prefill_chunk), len(token_ids)
        cache = self.executor.new_cache(1, first, limit)
        logits_SV = np.empty((len(token_ids), specification.vocab_size), np.float32)
        for (found,) in run_texts(self.executor, cache, [token_ids], [0], self.prefill_chunk):
            logits_SV[found.positions.start : found.positions.stop] = found.logits
        return logits_SV

    def _sequence(self, tokens: list[int], params: SamplingParams, name: str) -> TokenSequence:
        return TokenSequence(tokens, params, self.bundle.specification, self.tokenizer, name)

    def _pieces(self, sequence: TokenSequence) -> Iterator[TextPiece]:
        for _, piece in generate(self.executor, [sequence], self.prefill_chunk):
            if piece.result is not None and piece.result.error is not None:
                raise piece.result.error
            yield piece
