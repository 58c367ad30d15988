"""transformers without its log and progress bars."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

# Verbosity and progress bars belong to the whole process
_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log and progress bars, and restore both."""
    with _LOCK:
        verbosity = transformers_logging.get_verbosity()
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()
