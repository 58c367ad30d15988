"""What a message must say, where a number in it must be that number and no longer one."""

from __future__ import annotations

import re


def whole(pattern: str) -> str:
    """The pattern where no digit goes on at either end: 10 is neither in 100 nor in 10.5."""
    return rf"(?<!\d)(?<!\d[.,])(?:{pattern})(?![.,]?\d)"


def says(text: str, words: str) -> bool:
    """Whether `words` stand in `text`, with whole numbers at both ends."""
    return re.search(whole(re.escape(words)), text) is not None
