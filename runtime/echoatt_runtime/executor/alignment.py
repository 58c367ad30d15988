"""Where one tensor may begin behind another in one piece of memory."""

from __future__ import annotations

from typing import Final

# Bytes, as CUDA aligns memory itself and its kernels may take for granted
_ALIGNMENT: Final = 256


def aligned(nbytes: int) -> int:
    """Bytes to what comes behind some."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
