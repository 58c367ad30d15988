"""What generation gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from echoatt_runtime.errors import EchoAttError

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """How long a prompt took. The prompts of one batch run together and share the clock.

    Attributes:
        time_to_first_token: Seconds from the call to the first new token.
        decode_seconds: Seconds from the first new token to the last.
        decode_tokens_per_second: New tokens after the first, per second; 0 with one new token.
    """

    time_to_first_token: float
    decode_seconds: float
    decode_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The whole answer to one prompt.

    Attributes:
        text: The new text, without the prompt, special tokens and the stop string. A leading
            space stays where the prompt's text goes on with one.
        token_ids: Every new token, including the one that ended generation.
        finish_reason: "stop" for an end token or a stop string; "length" for `max_new_tokens` or
            the end of the context; "error" where something went wrong with this prompt alone.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Number of `token_ids`.
        timings: How long it took.
        error: What went wrong, where `finish_reason` is "error"; else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int
    timings: Timings
    error: EchoAttError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """A piece of streamed text. The last one may be empty.

    Attributes:
        text: Whole characters; all pieces joined are the result's text.
        token_ids: New tokens since the piece before.
        finish_reason: None until the last piece.
        result: The whole answer, with the last piece only.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    result: GenerationResult | None = None
