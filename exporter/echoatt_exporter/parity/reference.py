"""Runs the PyTorch student on every text and keeps only what a bundle is compared with.

Shapes: B batch, S new tokens, T tokens attended to, H query heads, D head size, L layers,
V vocabulary, p positions kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from echoatt_exporter.families import family_of
from echoatt_exporter.parity.arithmetic import float32_arithmetic, quantised_weights
from echoatt_exporter.parity.cases import AnyCase, TextRequest, write_script
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_runtime.contract import Specification
from echoatt_runtime.errors import NumericalError
from echoatt_runtime.executor import Integers

Floats = npt.NDArray[np.float32]

# Bounds the attention probabilities of one layer: 256 MB of float32
_PROBABILITIES_AT_ONCE = 2**26


@dataclass(frozen=True, eq=False)
class ReferenceText:
    """What PyTorch computed for one text, alone in its batch.

    Attributes:
        tokens: Int64 [S], with the tokens that PyTorch appended.
        positions: Int64 [p], the positions that were kept.
        logits: Float32 [p, V].
        contexts: Float32 [L, p, H·D], what each layer's attention gives its output projection.
    """

    tokens: Integers
    positions: Integers
    logits: Floats
    contexts: Floats


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """PyTorch's side of a comparison; the student is not needed any more.

    Attributes:
        specification: Of the bundle that it is for.
        cases: What the bundle shall run.
        texts: What PyTorch computed.
        rounded_cases: The cases that a bundle with quantised weights repeats; none for others.
        rounded_texts: By text, what PyTorch computed from weights rounded as the bundle's are.
    """

    specification: Specification
    cases: tuple[AnyCase, ...]
    texts: tuple[ReferenceText, ...]
    rounded_cases: tuple[AnyCase, ...]
    rounded_texts: Mapping[int, ReferenceText]


def record_reference(
    student: EchoAttForCausalLM,
    specification: Specification,
    *,
    tokenizer_dir: Path | None,
    max_context: int | None = None,
) -> ReferenceRun:
    """Run PyTorch on every case, in float32 arithmetic whatever the weights' dtype.

    What is kept does not grow with the context: of each text a few dozen rows of logits, and the
    attention outputs at the same positions.

    Args:
        student: On the CPU and in evaluation mode, with weights in the bundle's dtype (float32 for
            int8 and int4). It is left as it was.
        specification: Of the bundle to compare with.
        tokenizer_dir: A directory with a `tokenizer.json` for real prompts; without, all texts
            are random tokens.
        max_context: The most tokens of the long text; None goes up to the context length.

    Raises:
        NumericalError: PyTorch itself computes NaN or infinities.
        BundleError: The tokenizer's files are damaged.
    """
    script = write_script(specification, tokenizer_dir, max_context)
    with float32_arithmetic(student):
        texts = tuple(_run_text(student, specification, request) for request in script.texts)
    bits = specification.weight_dtype.bits
    if bits is None:
        return ReferenceRun(specification, script.cases, texts, (), {})
    requests = [script.texts[index].cut(count) for index, count in script.rounded_texts.items()]
    with quantised_weights(student, bits):
        found = _run_together(student, requests)
    rounded_texts = dict(zip(script.rounded_texts, found, strict=True))
    return ReferenceRun(specification, script.cases, texts, script.rounded, rounded_texts)


@torch.inference_mode()
def _run_text(
    student: EchoAttForCausalLM, specification: Specification, request: TextRequest
) -> ReferenceText:
    total = len(request.tokens) + request.greedy
    at_once = max(1, _PROBABILITIES_AT_ONCE // (total * max(specification.query_heads)))
    tokens = torch.from_numpy(request.tokens)[None]
    logits: list[torch.Tensor] = []
    contexts: list[torch.Tensor] = []
    cache: Any = None
    start = 0
    while start < total:
        # Up to the end of what is there; once that is done, one appended token after another
        chunk = tokens[:, start : start + at_once]
        stop = start + chunk.shape[1]
        wanted = request.positions[(request.positions >= start) & (request.positions < stop)]
        kept = torch.from_numpy(wanted - start)
        # The last row is what greedy decoding goes on with
        rows = torch.cat([kept, torch.tensor([chunk.shape[1] - 1])])
        with _recorded_contexts(student, kept) as recorded:
            output = student(
                input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=rows
            )
        cache = output.past_key_values
        found = output.logits[0].float()
        logits.append(found[:-1])
        contexts.append(torch.stack(recorded)[:, 0])
        if stop == tokens.shape[1] < total:
            tokens = torch.cat([tokens, found[-1].argmax().view(1, 1)], dim=1)
        start = stop
    text = ReferenceText(
        tokens[0].numpy(),
        request.positions,
        torch.cat(logits).numpy(),
        torch.cat(contexts, dim=1).numpy(),
    )
    if not np.isfinite(text.logits).all():
        raise NumericalError(
            f"{specification.source_checkpoint.name}: PyTorch itself computes logits that are NaN"
            " or infinite, so there is nothing to compare with; see whether its weights are whole"
        )
    return text


@torch.inference_mode()
def _run_together(
    student: EchoAttForCausalLM, requests: Sequence[TextRequest]
) -> list[ReferenceText]:
    """Run a few short texts in one call, so that every weight is used only once.

    They are padded on the right, which no token of a causal model can see.
    """
    tokens = torch.zeros((len(requests), max(len(r.tokens) for r in requests)), dtype=torch.int64)
    for row, request in enumerate(requests):
        tokens[row, : len(request.tokens)] = torch.from_numpy(request.tokens)
    with _recorded_contexts(student, torch.arange(tokens.shape[1])) as recorded:
        logits = student(input_ids=tokens, use_cache=False).logits.numpy()
    contexts = torch.stack(recorded).numpy()
    return [
        ReferenceText(
            request.tokens,
            request.positions,
            logits[row, request.positions].astype(np.float32),
            contexts[:, row, request.positions],
        )
        for row, request in enumerate(requests)
    ]


@contextmanager
def _recorded_contexts(
    student: EchoAttForCausalLM, kept: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Collect what each layer gives its output projection at positions `kept`: [B, p, H·D]."""
    recorded: list[torch.Tensor] = []

    def record(_module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        recorded.append(arguments[0][:, kept].float())

    hooks = [module.register_forward_pre_hook(record) for module in _output_projections(student)]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _output_projections(student: EchoAttForCausalLM) -> Iterator[nn.Module]:
    family = family_of(student.decoder.config)
    for layer in family.layers_of(student.decoder):
        yield family.output_of(family.attention_of(layer))
