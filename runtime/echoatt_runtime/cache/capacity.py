"""How much room a row of the cache gets."""

from __future__ import annotations

from typing import Final

from echoatt_runtime.errors import ContextOverflowError

BUCKET: Final = 256
# A values' row is as long as the capacity. Rows a multiple of 4 KB apart fall into the same few
# sets of a CPU's cache: a layer's context took 471 us at 4,096 tokens and 373 at 4,112. Capacities
# are multiples of this, a cache line, and never of a bucket.
_LINE: Final = 16
_LARGEST_STEP_FRACTION: Final = 16


def bucket_capacity(tokens: int, limit: int) -> int:
    """The capacity to allocate for `tokens` tokens.

    Steps are 256 tokens, because the graph reads a whole buffer at every step, and from 4,096
    tokens a sixteenth, because growing copies a whole buffer; the last step ends at the limit.

    Args:
        tokens: That a row must have room for.
        limit: Most tokens that a row will ever hold: the context, or less where that is known.

    Raises:
        ContextOverflowError: `tokens` is over the limit.
    """
    largest = _round_up(limit, _LINE)
    largest += _LINE if largest % BUCKET == 0 else 0
    if tokens > largest:
        raise ContextOverflowError(
            f"a cache of {tokens} tokens does not fit the limit of {limit}; shorten the prompt"
        )
    even = max(1, tokens - _LINE)
    step = max(BUCKET, _round_up(even // _LARGEST_STEP_FRACTION, BUCKET))
    return min(_round_up(even, step) + _LINE, largest)


def _round_up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step
