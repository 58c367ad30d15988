"""One request at work: its tokens, how the next is chosen, its text, its result or its error.

Shapes: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from echoatt_runtime.contract import Specification
from echoatt_runtime.errors import ContextOverflowError, EchoAttError, PromptError
from echoatt_runtime.executor import Logits
from echoatt_runtime.plain_values import as_integer, as_list, kind_of
from echoatt_runtime.results import FinishReason, GenerationResult, TextPiece, Timings
from echoatt_runtime.sampling import Sampler, SamplingParams, not_finite
from echoatt_runtime.text import Detokenizer, StopMatcher, TextTokenizer


class TokenSequence:
    """A prompt and what is generated for it, alone or beside others.

    Nothing in it is shared with another sequence, so that from equal logits it gets what it would
    get alone. What goes wrong in it ends it, and nobody else.

    Attributes:
        params: How tokens are chosen and when it stops.
        prompt_tokens: Tokens of the prompt.
        length: Tokens of prompt and answer so far.
        limit: Most tokens that it will ever have.
        result: The whole answer, once it has finished.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        specification: Specification,
        tokenizer: TextTokenizer | None,
        name: str = "the prompt",
    ) -> None:
        """Take a prompt.

        Args:
            prompt: Its tokens.
            params: How to choose tokens and when to stop.
            specification: Of the model.
            tokenizer: What makes text of tokens; None makes none.
            name: What to call the prompt in an error.

        Raises:
            PromptError: The prompt is empty or has tokens outside the vocabulary.
            ContextOverflowError: It leaves no room for a new token.
        """
        prompt = check_token_ids(prompt, specification.vocab_size, name)
        if len(prompt) >= specification.context_length:
            raise ContextOverflowError(
                f"{name} has {len(prompt)} tokens and the context holds"
                f" {specification.context_length} with at least one new token; shorten the prompt"
            )
        self.params = params
        self.prompt_tokens = self.length = len(prompt)
        self.limit = min(len(prompt) + params.max_new_tokens, specification.context_length)
        self.result: GenerationResult | None = None
        self._tokens = np.empty(self.limit, np.int64)
        self._tokens[: self.length] = prompt
        end_tokens = () if params.ignore_eos else specification.eos_token_ids
        self._end_tokens = frozenset((*end_tokens, *params.stop_token_ids))
        self._sampler = Sampler(params)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt)
        self._matcher = StopMatcher(params.stop)
        self._pieces: list[str] = []
        self._given = self.length
        self._start = self._first = time.perf_counter()

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """Tokens of prompt and answer so far; a view."""
        return self._tokens[: self.length]

    @property
    def last_token(self) -> int:
        """The newest token, which no cache holds yet."""
        return int(self._tokens[self.length - 1])

    @property
    def finished(self) -> bool:
        """Whether it has its result."""
        return self.result is not None

    def take_logits(self, logits_V: Logits) -> TextPiece | None:
        """Choose the next token from its logits.

        Returns:
            What there is to show, or None.
        """
        try:
            token = self._sampler(logits_V, self.token_ids)
        except EchoAttError as error:
            return self.fail(error)
        return self._add(token)

    def take_top(self, token_ids: npt.NDArray[np.int64], logits: Logits) -> TextPiece | None:
        """Choose the next token where `params.enough` of the most probable ones are given.

        Args:
            token_ids: The tokens, and all that are as probable.
            logits: Theirs.
        """
        return self._add(self._sampler.among(token_ids, logits))

    def take_choice(self, token_id: int, finite: bool) -> TextPiece | None:
        """Take the most probable token, where `params.is_greedy` asks for no other.

        Args:
            token_id: The token.
            finite: Whether its logit is a number.
        """
        if not finite:
            return self.fail(not_finite(self.length))
        return self._add(token_id)

    def fail(self, error: EchoAttError) -> TextPiece:
        """End it with an error; what it has so far is its result."""
        return self._give(self._matcher.finish(), "error", time.perf_counter(), error)

    def _add(self, token: int) -> TextPiece | None:
        now = time.perf_counter()
        if self.length == self.prompt_tokens:
            self._first = now
        self._tokens[self.length] = token
        self.length += 1
        reason: FinishReason | None = None
        if token in self._end_tokens:
            reason = "stop"
        elif self.length == self.limit:
            reason = "length"
        try:
            text = self._text_of(token, reason)
        except EchoAttError as error:
            return self.fail(error)
        text = self._matcher.add(text)
        if self._matcher.found:
            reason = "stop"
        elif reason is not None:
            text += self._matcher.finish()
        if reason is None and (not text and self._detokenizer is not None):
            return None
        return self._give(text, reason, now)

    def _text_of(self, token: int, reason: FinishReason | None) -> str:
        """What the newest token makes certain; where it is the last, all that is left too."""
        if self._detokenizer is None:
            return ""
        # An end token is no text, even one that the tokenizer does not call special.
        text = "" if reason == "stop" else self._detokenizer.add(token)
        return text if reason is None else text + self._detokenizer.finish()

    def _give(
        self,
        text: str,
        reason: FinishReason | None,
        now: float,
        error: EchoAttError | None = None,
    ) -> TextPiece:
        self._pieces.append(text)
        token_ids = tuple(self._tokens[self._given : self.length].tolist())
        self._given = self.length
        if reason is not None:
            self.result = self._finish(reason, now, error)
        return TextPiece(text=text, token_ids=token_ids, finish_reason=reason, result=self.result)

    def _finish(
        self, reason: FinishReason, now: float, error: EchoAttError | None
    ) -> GenerationResult:
        new_tokens = self.length - self.prompt_tokens
        decode_seconds = now - self._first
        decoded = new_tokens - 1
        return GenerationResult(
            text="".join(self._pieces),
            token_ids=tuple(self._tokens[self.prompt_tokens : self.length].tolist()),
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            new_tokens=new_tokens,
            timings=Timings(
                time_to_first_token=self._first - self._start,
                decode_seconds=decode_seconds,
                decode_tokens_per_second=decoded / decode_seconds if decoded > 0 else 0.0,
            ),
            error=error,
        )


def check_token_ids(
    prompt: Sequence[int] | npt.NDArray[np.integer[Any]], vocab_size: int, name: str = "the prompt"
) -> list[int]:
    """A prompt's tokens as Python's own: at least one, all of them in the vocabulary.

    Raises:
        PromptError: They are not.
    """
    items = as_list(prompt)
    if items is None:
        raise PromptError(f"{name} is {kind_of(prompt)}; give a list of tokens")
    if not items:
        raise PromptError(f"{name} has no tokens; give at least one")
    tokens = []
    for item in items:
        token = as_integer(item, 0, vocab_size - 1)
        if token is None:
            raise PromptError(
                f"{name} has token {item!r}, outside the vocabulary of {vocab_size}; use the"
                " tokenizer of this checkpoint"
            )
        tokens.append(token)
    return tokens
