"""Sequences, and batches of them that are generated together."""

from echoatt_runtime.generation.batch import Batch, generate
from echoatt_runtime.generation.sequence import TokenSequence, check_token_ids

__all__ = ["Batch", "TokenSequence", "check_token_ids", "generate"]
