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
import torch
from torch import nn

from echoatt_exporter.families import family_of
from echoatt_exporter.parity.cases import AnyCase, Case, TextRequest, write_script
from echoatt_exporter.parity.instrumented import choose_device, needs_float32
from echoatt_exporter.parity.precision import Precision
from echoatt_exporter.parity.tolerance import TOLERANCES, Tolerance
from echoatt_exporter.parity.yardstick import Floats, Yardstick
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_runtime.contract import Specification
from echoatt_runtime.errors import NumericalError
from echoatt_runtime.executor import Integers

# Bounds the attention probabilities of one layer: 256 MB of float32
_PROBABILITIES_AT_ONCE = 2**26
# Texts up to this length run in one batch
_SHORT = 64


@dataclass(frozen=True, eq=False)
class ReferenceText:
    """What PyTorch computed for one text.

    Attributes:
        tokens: Int64 [S].
        positions: Int64 [p], the positions that were kept.
        logits: Float32 [p, V].
        contexts: Float32 [L, p, H·D], what each layer's attention gives its output projection.
    """

    tokens: Integers
    positions: Integers
    logits: Floats
    contexts: Floats


@dataclass(frozen=True, eq=False)
class UnroundedRun:
    """What PyTorch computes before weights are rounded.

    Attributes:
        case: What the bundle shall run.
        texts: By text of that case, what PyTorch computed.
    """

    case: Case
    texts: Mapping[int, ReferenceText]


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """PyTorch's side of a comparison; the student is not needed any more.

    Attributes:
        specification: Of the bundle that it is for.
        tolerance: What the bundle may differ by.
        cases: What the bundle shall run.
        texts: What PyTorch computed in the tolerance's exact precision.
        yardsticks: By text, what PyTorch lost in the bundle's precision.
        unrounded: What tells how much a quantised bundle differs from the checkpoint; None for
            other bundles.
        device: Where the bundle shall run.
    """

    specification: Specification
    tolerance: Tolerance
    cases: tuple[AnyCase, ...]
    texts: tuple[ReferenceText, ...]
    yardsticks: tuple[Yardstick, ...]
    unrounded: UnroundedRun | None
    device: str


def record_unrounded(
    student: EchoAttForCausalLM,
    specification: Specification,
    *,
    tokenizer_dir: Path | None,
    max_context: int | None = None,
) -> UnroundedRun:
    """Run PyTorch on real prompts with the checkpoint's own weights, before they are rounded.

    Args:
        student: On the CPU, in float32 and in evaluation mode.
        specification: Of the bundle to compare with.
        tokenizer_dir: As in `record_reference`, and so is the other.
        max_context: Chooses the same texts.

    Raises:
        BundleError: The tokenizer's files are damaged.
    """
    script = write_script(specification, tokenizer_dir, max_context)
    requests = [script.texts[index] for index in script.prompts.texts]
    found = _run(student, max(specification.query_heads), requests, Precision(torch.float32))
    return UnroundedRun(script.prompts, dict(zip(script.prompts.texts, found, strict=True)))


def record_reference(
    student: EchoAttForCausalLM,
    specification: Specification,
    *,
    tokenizer_dir: Path | None,
    max_context: int | None = None,
    unrounded: UnroundedRun | None = None,
    device: str | None = None,
) -> ReferenceRun:
    """Run PyTorch on every text: in a precision that loses nothing, and in the bundle's own.

    The bundle is held against the first, not against PyTorch in its own precision: then it answers
    for its own rounding only, and one that rounds less than PyTorch is the nearer one.

    What is kept does not grow with the context: of each text a few dozen rows of logits, and the
    attention outputs at the same positions.

    Args:
        student: On the CPU and in evaluation mode, with weights in the bundle's dtype: for int8 and
            int4 in float32, rounded as the bundle's are.
        specification: Of the bundle to compare with.
        tokenizer_dir: A directory with a `tokenizer.json` for real prompts; without, all texts
            are random tokens.
        max_context: The most tokens of the long text; None goes up to the context length.
        unrounded: What it computed before its weights were rounded, to tell what that costs.
        device: Where the bundle shall run; None is its own device, or the CPU without a GPU.

    Raises:
        NumericalError: PyTorch itself computes NaN or infinities.
        BundleError: The tokenizer's files are damaged.
    """
    script = write_script(specification, tokenizer_dir, max_context)
    device = device or choose_device(specification)
    tolerance = _tolerance(specification, device)
    heads = max(specification.query_heads)
    texts = _run(student, heads, script.texts, Precision(tolerance.exact))
    _check_finite(texts, specification)
    yardsticks = _yardsticks(student, heads, texts, tolerance.rounded)
    return ReferenceRun(
        specification, tolerance, script.cases, texts, yardsticks, unrounded, device
    )


def _tolerance(specification: Specification, device: str) -> Tolerance:
    dtype = specification.dtype
    if specification.weight_dtype.bits is not None:
        # Rounded weights on both sides are multiplied by in what the graph computes in
        dtype = "fp16" if specification.compute.bytes < 4 else "fp32"
    elif needs_float32(specification, device):
        dtype += " computed in float32"
    return TOLERANCES[dtype]


def _check_finite(texts: Sequence[ReferenceText], specification: Specification) -> None:
    if not all(np.isfinite(text.logits).all() for text in texts):
        raise NumericalError(
            f"{specification.source_checkpoint.name}: PyTorch itself computes logits that are NaN"
            " or infinite, so there is nothing to compare with; see whether its weights are whole"
        )


def _yardsticks(
    student: EchoAttForCausalLM, heads: int, exact: Sequence[ReferenceText], dtype: torch.dtype
) -> tuple[Yardstick, ...]:
    """What PyTorch loses in `dtype`: the larger of two losses at each position.

    Where errors are magnified in few directions, one run may come near the exact one by luck. That
    two with sums in different orders do is rare.
    """
    runs = []
    for halves in (False, True):
        found = _run(student, heads, exact, Precision(dtype, halves=halves))
        pairs = zip(exact, found, strict=True)
        runs.append(
            [
                Yardstick.between(one.logits, other.logits, one.contexts, other.contexts)
                for one, other in pairs
            ]
        )
    return tuple(one.or_worse(other) for one, other in zip(*runs, strict=True))


@torch.inference_mode()
def _run(
    student: EchoAttForCausalLM,
    heads: int,
    requests: Sequence[TextRequest | ReferenceText],
    precision: Precision,
) -> tuple[ReferenceText, ...]:
    short = [request for request in requests if len(request.tokens) <= _SHORT]
    with precision:
        together = iter(_run_together(student, short) if short else ())
        return tuple(
            next(together)
            if len(request.tokens) <= _SHORT
            else _run_in_pieces(student, heads, request)
            for request in requests
        )


def _run_in_pieces(
    student: EchoAttForCausalLM, heads: int, request: TextRequest | ReferenceText
) -> ReferenceText:
    total = len(request.tokens)
    at_once = max(1, _PROBABILITIES_AT_ONCE // (total * heads))
    tokens = torch.from_numpy(request.tokens)[None]
    logits: list[Floats] = []
    contexts: list[Floats] = []
    cache: Any = None
    for start in range(0, total, at_once):
        chunk = tokens[:, start : start + at_once]
        stop = start + chunk.shape[1]
        wanted = request.positions[(request.positions >= start) & (request.positions < stop)]
        kept = torch.from_numpy(wanted - start)
        with _recorded_contexts(student, kept) as recorded:
            output = student(
                input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=kept
            )
        cache = output.past_key_values
        logits.append(_floats(output.logits[0]))
        contexts.append(np.stack(recorded)[:, 0])
    return ReferenceText(
        request.tokens,
        request.positions,
        np.concatenate(logits),
        np.concatenate(contexts, axis=1),
    )


def _run_together(
    student: EchoAttForCausalLM, requests: Sequence[TextRequest | ReferenceText]
) -> list[ReferenceText]:
    """Run a few short texts in one call, so that every weight is used only once.

    They are padded on the right, which no token of a causal model can see.
    """
    tokens = torch.zeros((len(requests), max(len(r.tokens) for r in requests)), dtype=torch.int64)
    for row, request in enumerate(requests):
        tokens[row, : len(request.tokens)] = torch.from_numpy(request.tokens)
    with _recorded_contexts(student, torch.arange(tokens.shape[1])) as recorded:
        logits = student(input_ids=tokens, use_cache=False).logits
    contexts = np.stack(recorded)
    return [
        ReferenceText(
            request.tokens,
            request.positions,
            _floats(logits[row, torch.from_numpy(request.positions)]),
            contexts[:, row, request.positions],
        )
        for row, request in enumerate(requests)
    ]


@contextmanager
def _recorded_contexts(student: EchoAttForCausalLM, kept: torch.Tensor) -> Iterator[list[Floats]]:
    """Collect what each layer gives its output projection at positions `kept`: [B, p, H·D]."""
    recorded: list[Floats] = []

    def record(_module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        recorded.append(_floats(arguments[0][:, kept]))

    hooks = [module.register_forward_pre_hook(record) for module in _output_projections(student)]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _floats(values: torch.Tensor) -> Floats:
    # numpy has no bfloat16, and what is computed in float64 stays so in torch
    return values.float().numpy().astype(np.float32)


def _output_projections(student: EchoAttForCausalLM) -> Iterator[nn.Module]:
    family = family_of(student.decoder.config)
    for layer in family.layers_of(student.decoder):
        yield family.output_of(family.attention_of(layer))
