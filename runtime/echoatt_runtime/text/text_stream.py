"""From tokens to text, piece by piece: whole characters only, cut exactly at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from echoatt_runtime.text.tokenizer import TextTokenizer

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_PROMPT_WINDOW: Final = 4


class Detokenizer:
    """Turns one row's new tokens into pieces of text.

    The pieces joined are what decoding prompt and new tokens together adds to decoding the prompt
    alone, so a word's leading space survives. A piece never ends inside a character: tokens
    that leave one unfinished wait for the next.

    Only a window of tokens is decoded at each step. It starts with tokens already given out,
    because decoders treat the beginning of a text differently.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._end_of_prompt(prompt_ids)
        self._given_tokens = len(self._window)
        self._given_text = tokenizer.decode(self._window)
        self._in_byte_run = False

    def add(self, token_id: int) -> str:
        """Take the next token; returns the text that is now certain, often with a delay of one."""
        self._window.append(token_id)
        # Byte tokens in a row are decoded together, and one that does not fit spoils them all.
        # Special tokens are left out before that, so they do not end a row.
        if not self._tokenizer.is_special_token(token_id):
            self._in_byte_run = self._tokenizer.is_byte_token(token_id)
        if self._in_byte_run:
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._give(text)

    def finish(self) -> str:
        """Return what was waiting, after the last token."""
        return self._give(self._tokenizer.decode(self._window))

    def _give(self, text: str) -> str:
        piece = text[len(self._given_text) :]
        if piece:
            self._window = self._window[self._given_tokens :]
            self._given_tokens = len(self._window)
            self._given_text = self._tokenizer.decode(self._window)
        return piece

    def _end_of_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from one that has text and is no byte of a row of them."""
        start = max(len(prompt_ids) - _PROMPT_WINDOW, 0)
        while start and self._may_be_inside_byte_run(prompt_ids[start]):
            start -= 1
        return list(prompt_ids[start:])

    def _may_be_inside_byte_run(self, token_id: int) -> bool:
        tokenizer = self._tokenizer
        return tokenizer.is_byte_token(token_id) or tokenizer.is_special_token(token_id)


class StopMatcher:
    """Cuts a text at the first stop string, wherever the pieces are divided.

    "First" is the one that is complete first, so that the division does not matter. Text that
    may be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """Take the next piece; returns the text before a stop string that is now certain."""
        text = self._held + piece
        ends = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        certain = len(text) - self._possible_beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Return what was held back, after the last piece."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
