"""Names of the graph contract's inputs and outputs, and of a bundle's files."""

from __future__ import annotations

from typing import Final

METADATA_KEY: Final = "echoatt.manifest"

INPUT_IDS: Final = "input_ids"
PAST_LENGTHS: Final = "past_lengths"
LOGITS_INDICES: Final = "logits_indices"
LOGITS: Final = "logits"
# Of a graph that chooses tokens on its device
CHOICES: Final = "choices"
LOGIT_SUMS: Final = "logit_sums"

# What a bundle's model file is called where only a directory is named
MODEL_FILE: Final = "model.onnx"
