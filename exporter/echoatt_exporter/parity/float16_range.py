"""Whether a checkpoint's activations are numbers in float16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from echoatt_exporter.parity.cases import write_script
from echoatt_exporter.parity.precision import Precision
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_runtime.contract import Specification
from echoatt_runtime.errors import NumericalError

# Tokens of each text: where activations are massive, they are so at the first ones
_TOKENS = 64


def check_float16_range(
    student: EchoAttForCausalLM, specification: Specification, tokenizer_dir: Path | None
) -> None:
    """Run a few texts as a bundle will that computes in float16.

    Args:
        student: On the CPU and in evaluation mode.
        specification: Of the bundle.
        tokenizer_dir: A directory with a `tokenizer.json` for real prompts; without, all texts are
            random tokens.

    Raises:
        NumericalError: An activation is beyond float16, or none at all.
        BundleError: The tokenizer's files are damaged.
    """
    texts = write_script(specification, tokenizer_dir, _TOKENS).texts
    tokens = torch.zeros((len(texts), max(len(t.tokens) for t in texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text.tokens)] = torch.from_numpy(text.tokens)
    with torch.inference_mode(), Precision(torch.float16), _first_overflow(student) as found:
        student(input_ids=tokens, use_cache=False)
    if found:
        raise NumericalError(
            f"{specification.source_checkpoint.name} does not fit float16, in which a bundle of"
            f" {specification.dtype} computes: {found[0]} goes beyond 65,504; export with --dtype"
            " bf16"
        )


@contextmanager
def _first_overflow(student: EchoAttForCausalLM) -> Iterator[list[str]]:
    """Collect the modules whose results are no numbers, in the order in which they compute."""
    found: list[str] = []

    def look(name: str) -> Any:
        def record(_module: nn.Module, _arguments: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return record

    hooks = [
        module.register_forward_hook(look(name)) for name, module in student.decoder.named_modules()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
