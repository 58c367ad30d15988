"""From tokens to text, piece by piece: whole characters only, cut exactly at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Final

from echoatt_runtime.text.tokenizer import TextTokenizer

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# No more tokens than a character has bytes can be part of it
_PROMPT_WINDOW: Final = 4


class Detokenizer:
    """Turns one row's new tokens into pieces of text.

    The pieces joined are what decoding prompt and new tokens together adds to decoding the prompt
    alone, so a word's leading space survives. A character is given out with its last byte, and one
    that the prompt began is given out whole. Bytes that make no character become U+FFFD, and only
    they do: what was given out before them stays.

    Tokens that are bytes are put together here. The text of others depends on those before them,
    because decoders treat the beginning of a text differently: a window of tokens is decoded, which
    starts with one already given out.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window = self._end_of_prompt(prompt_ids)
        self._given_tokens = len(self._window)
        for token_id in self._window:
            data = tokenizer.bytes_of(token_id)
            self._utf8.decode(data or b"", final=data is None)

    def add(self, token_id: int) -> str:
        """Take the next token; returns the text that is now certain."""
        # Decoders never see it, so it does not part the bytes beside it
        if self._tokenizer.is_left_out(token_id):
            return ""
        data = self._tokenizer.bytes_of(token_id)
        if data is not None:
            waiting = self._decode_window()
            self._window, self._given_tokens = [token_id], 1
            return waiting + self._utf8.decode(data)
        unfinished = self._utf8.decode(b"", final=True)
        self._window.append(token_id)
        text = self._decode_window()
        if text.endswith(_REPLACEMENT):
            return unfinished
        if text:
            self._window = self._window[self._given_tokens :]
            self._given_tokens = len(self._window)
        return unfinished + text

    def finish(self) -> str:
        """Return what was waiting, after the last token."""
        waiting = self._decode_window()
        self._given_tokens = len(self._window)
        return waiting + self._utf8.decode(b"", final=True)

    def _decode_window(self) -> str:
        """What the window's tokens add to those of them that were given out."""
        if self._given_tokens == len(self._window):
            return ""
        given = self._tokenizer.decode(self._window[: self._given_tokens])
        return self._tokenizer.decode(self._window)[len(given) :]

    def _end_of_prompt(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt that are text."""
        window: list[int] = []
        for token_id in reversed(prompt_ids):
            if not self._tokenizer.is_left_out(token_id):
                window.append(token_id)
            if len(window) == _PROMPT_WINDOW:
                break
        return window[::-1]


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
