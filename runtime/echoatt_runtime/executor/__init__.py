"""What runs a bundle's graph: one step over rows of a cache, and texts in chunks."""

from echoatt_runtime.executor.executor import Choice, Executor
from echoatt_runtime.executor.open import executor_of, open_executor
from echoatt_runtime.executor.step_arrays import Integers, Logits
from echoatt_runtime.executor.texts import PREFILL_CHUNK, TextLogits, run_texts, slots_of
from echoatt_runtime.executor.top_rows import TopLogits

__all__ = [
    "PREFILL_CHUNK",
    "Choice",
    "Executor",
    "Integers",
    "Logits",
    "TextLogits",
    "TopLogits",
    "executor_of",
    "open_executor",
    "run_texts",
    "slots_of",
]
