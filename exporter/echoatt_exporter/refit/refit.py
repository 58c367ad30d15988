"""Solves for a student's weights, layer by layer from below, so that its states meet the teacher's.

What a follower's attention loses by foreign probabilities, its own output projection can make up
for in part, and what is left drifts through the layers above, whose projections can make up for
part of that. Each is a regression with an answer in closed form, on any amount of text. Nobody's
method but in its parts: GPTAQ (arXiv 2504.02692) has the same aim for weights that are rounded.

Shapes in names: W windows, B windows at once, T tokens, E hidden size, K inputs of a projection,
N its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from echoatt_exporter.analyze.divergence import divergences
from echoatt_exporter.families import family_of
from echoatt_exporter.families.projections import is_projection, weight_out_in
from echoatt_exporter.refit.layer_walk import LayerWalk
from echoatt_exporter.refit.least_squares import LeastSquares
from echoatt_exporter.share.lending_attention import lending_attention
from echoatt_exporter.share.lm_head import head_of
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.share.recomputed_attention import RECOMPUTED_NAME

ATTENTION, FEED_FORWARD = "attention output", "feed-forward output"

# By how much a layer's output may differ from a sum of what goes in and what its parts give
_SUM_ERROR = 1e-3

_Projection = nn.Linear | Conv1D


@dataclass(frozen=True, slots=True)
class PartFit:
    """What was found for one projection.

    Attributes:
        part: ATTENTION or FEED_FORWARD.
        left: Share of what was missing that is still missing with the new weight, in mean square on
            text that it was not fitted on.
        ridge: In units of the mean square of an input.
        starved: Whether there were fewer tokens than inputs.
    """

    part: str
    left: float
    ridge: float
    starved: bool

    @property
    def learned(self) -> bool:
        """Whether anything was learned that holds on other text; if not the weight is as it was."""
        return self.left < 1


@dataclass(frozen=True, slots=True)
class LayerFit:
    """What was done with one layer.

    Attributes:
        layer: Its index.
        parts: Its projections that were fitted.
        kl: KL to the teacher on held-out text with the layer's new weights, nats a token.
        applied: Whether they were kept, because that was less than before.
    """

    layer: int
    parts: tuple[PartFit, ...]
    kl: float
    applied: bool


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What a re-fit did.

    Attributes:
        kl_before: KL to the teacher on held-out text, nats a token.
        layers: The layers that were tried, in order.
        tokens: That were fitted on.
        held_out_tokens: That KL was measured on.
    """

    kl_before: float
    layers: tuple[LayerFit, ...]
    tokens: int
    held_out_tokens: int

    @property
    def kl(self) -> float:
        """KL to the teacher on held-out text afterwards, nats a token."""
        kept = [layer.kl for layer in self.layers if layer.applied]
        return kept[-1] if kept else self.kl_before


OnLayer = Callable[[LayerFit, Mapping[str, torch.Tensor]], None]


@torch.no_grad()
def refit_student(
    student: EchoAttForCausalLM,
    teacher: PreTrainedModel,
    windows_WT: torch.Tensor,
    held_out_WT: torch.Tensor,
    *,
    dtype: torch.dtype,
    on_layer: OnLayer,
) -> RefitReport:
    """Re-fit a student in place, from its first follower on.

    Args:
        student: In evaluation mode, in float32.
        teacher: What it was made of, on the same device.
        windows_WT: Text to fit on, int64.
        held_out_WT: Text that says whether a layer's new weights are kept.
        dtype: What the student will be stored in: new weights are rounded to it.
        on_layer: Told after each layer what was done, with the weights that were kept by their
            names in the decoder.
    """
    followers = [layer for layer, source in enumerate(student.sources) if layer != source]
    if not followers:
        return RefitReport(0.0, (), windows_WT.numel(), held_out_WT.numel())
    with ExitStack() as stack:
        for model in (teacher, student.decoder):
            stack.enter_context(lending_attention(model, RECOMPUTED_NAME))
        judge = _Judge(teacher, student, held_out_WT)
        pair = _Pair(teacher, student, windows_WT)
        first = kl = judge.divergence()
        layers = []
        for layer in range(len(student.sources)):
            if layer >= followers[0]:
                found, kl = _refit_layer(student, pair, judge, kl, dtype)
                layers.append(found)
                on_layer(found, pair.weights())
            pair.advance()
            judge.advance()
    return RefitReport(first, tuple(layers), windows_WT.numel(), held_out_WT.numel())


def set_weights(decoder: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a decoder some of its weights, by their names."""
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        module = decoder.get_submodule(path)
        setattr(module, kind, nn.Parameter(weight, getattr(module, kind).requires_grad))


def _refit_layer(
    student: EchoAttForCausalLM, pair: _Pair, judge: _Judge, kl: float, dtype: torch.dtype
) -> tuple[LayerFit, float]:
    """Fit the layer that comes next; keep that if it helps. Gives the divergence afterwards too."""
    before = pair.weights()
    parts = (pair.fit(ATTENTION, dtype), pair.fit(FEED_FORWARD, dtype))
    found = judge.divergence()
    applied = found < kl
    if not applied:
        set_weights(student.decoder, before)
    return LayerFit(judge.layer, parts, found, applied), found if applied else kl


class _Judge:
    """Held-out text in front of the layer that comes next, in both models.

    Attributes:
        layer: That layer.
    """

    def __init__(
        self, teacher: PreTrainedModel, student: EchoAttForCausalLM, windows_WT: torch.Tensor
    ) -> None:
        self.layer = 0
        self._head = head_of(teacher)
        self._vocab_size: int = teacher.config.vocab_size
        self._walk = LayerWalk(student.decoder, student.sources, windows_WT)
        walk = LayerWalk(teacher, range(len(student.sources)), windows_WT)
        self._teacher_BTE = [walk.finish(rows) for rows in walk.batches]

    def divergence(self) -> float:
        """KL(teacher ‖ student), nats a token, with the student's weights as they are."""
        kl = []
        for rows, teacher_BTE in zip(self._walk.batches, self._teacher_BTE, strict=True):
            windows_BT, student_BTE = self._walk.windows_WT[rows], self._walk.finish(rows)
            (found,) = divergences(
                self._head, self._vocab_size, windows_BT, teacher_BTE, [student_BTE]
            )
            kl += found.kl.tolist()
        return sum(kl) / len(kl)

    def advance(self) -> None:
        """Take the text through the layer."""
        self._walk.advance()
        self.layer = self._walk.layer


class _Pair:
    """The text to fit on in front of the layer that comes next, in both models."""

    def __init__(
        self, teacher: PreTrainedModel, student: EchoAttForCausalLM, windows_WT: torch.Tensor
    ) -> None:
        self._family = family_of(teacher.config)
        self._teacher = LayerWalk(teacher, range(len(student.sources)), windows_WT)
        self._student = LayerWalk(student.decoder, student.sources, windows_WT)
        self._layers = [self._family.layers_of(model) for model in (teacher, student.decoder)]
        self._names = {module: name for name, module in student.decoder.named_modules()}

    def advance(self) -> None:
        """Take the text through the layer."""
        self._teacher.advance()
        self._student.advance()

    def fit(self, part: str, dtype: torch.dtype) -> PartFit:
        """Fit one projection of the layer, and give it the new weight, rounded to `dtype`."""
        of_teacher, of_student = (self._parts(layers) for layers in self._layers)
        scale = self._scale()
        projection = of_student[part]
        outputs, inputs = weight_out_in(projection).shape
        device = projection.weight.device
        sums = LeastSquares(inputs + (projection.bias is not None), outputs, device)
        with _recording(of_teacher[part]) as teacher_call, _recording(projection) as student_call:
            for rows in self._student.batches:
                teacher_BTE, student_BTE = self._teacher.run(rows), self._student.run(rows)
                aim_BTN = teacher_call.output
                missing_BTN = aim_BTN - student_call.output
                if scale is not None and part == FEED_FORWARD:
                    aim_BTN = teacher_BTE
                    missing_BTN = (teacher_BTE - student_BTE) / scale
                elif scale is not None:
                    before_BTE = self._teacher.states(rows)
                    aim_BTN = before_BTE + scale * aim_BTN
                    missing_BTN = missing_BTN + (before_BTE - self._student.states(rows)) / scale
                inputs_BTK = student_call.input
                if projection.bias is not None:
                    ones_BT1 = torch.ones_like(inputs_BTK[..., :1])
                    inputs_BTK = torch.cat([inputs_BTK, ones_BT1], dim=-1)
                # A norm comes next: what is lost matters by its share of what is there. Without
                # this the first token decides, whose state is a hundred times the others'.
                weight_BT1 = aim_BTN.square().mean(dim=-1, keepdim=True).rsqrt()
                sums.add(
                    (inputs_BTK * weight_BT1).flatten(0, -2),
                    (missing_BTN * weight_BT1).flatten(0, -2),
                )
        found = sums.solve()
        fit = PartFit(part, found.left, found.ridge, sums.is_starved)
        if fit.learned:
            _add(projection, found.change, dtype)
        return fit

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of what is fitted in the layer, by name in the decoder."""
        found = {}
        for projection in self._parts(self._layers[1]).values():
            for kind, parameter in projection.named_parameters():
                found[f"{self._names[projection]}.{kind}"] = parameter.detach().clone()
        return found

    def _parts(self, layers: nn.ModuleList) -> dict[str, _Projection]:
        """The layer's projections whose outputs go into the stream, of either model."""
        layer = layers[self._student.layer]
        attention = self._family.attention_of(layer)
        return {
            ATTENTION: self._family.output_of(attention),
            FEED_FORWARD: cast(_Projection, layer.get_submodule(self._feed_forward)),
        }

    @cached_property
    def _feed_forward(self) -> str:
        """The name of the feed-forward's output projection in a layer: the last one that runs."""
        layer = self._layers[0][self._teacher.layer]
        inside = set(self._family.attention_of(layer).modules())
        order: list[str] = []
        with ExitStack() as stack:
            for name, module in layer.named_modules():
                if is_projection(module) and module not in inside:
                    hook = module.register_forward_hook(lambda *_, name=name: order.append(name))
                    stack.callback(hook.remove)
            self._teacher.run(self._teacher.batches[0])
        return order[-1]

    def _scale(self) -> float | None:
        """What the layer multiplies its parts' outputs by before it adds them to its input.

        None where it does something else with them: norms them, as Gemma does. Then each part is
        fitted to give what the teacher's gives, and what earlier layers lost stays lost.
        """
        rows = self._teacher.batches[0]
        parts = self._parts(self._layers[0]).values()
        with ExitStack() as stack:
            calls = [stack.enter_context(_recording(part)) for part in parts]
            change_BTE = self._teacher.run(rows) - self._teacher.states(rows)
        given_BTE = calls[0].output + calls[1].output
        scale = float((change_BTE * given_BTE).sum() / given_BTE.square().sum())
        rest = float((change_BTE - scale * given_BTE).norm() / change_BTE.norm())
        return scale if rest < _SUM_ERROR else None


@dataclass(slots=True)
class _Recorded:
    """The last call of a projection."""

    input: torch.Tensor
    output: torch.Tensor


@contextmanager
def _recording(projection: _Projection) -> Iterator[_Recorded]:
    """Keep a projection's last call."""
    nothing = torch.empty(0)
    recorded = _Recorded(nothing, nothing)

    def on_call(_module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        recorded.input, recorded.output = arguments[0], output

    hook = projection.register_forward_hook(on_call)
    try:
        yield recorded
    finally:
        hook.remove()


def _add(projection: _Projection, change_NK: torch.Tensor, dtype: torch.dtype) -> None:
    """Change a weight, and the bias by the last input, and round both as they will be stored."""
    weight_NK = weight_out_in(projection)
    size = weight_NK.shape[1]
    changed_NK = (weight_NK.double() + change_NK[:, :size]).to(dtype).to(weight_NK.dtype)
    own = changed_NK.T if isinstance(projection, Conv1D) else changed_NK
    # Another student's teacher may hold the same memory
    projection.weight = nn.Parameter(own.contiguous(), projection.weight.requires_grad)
    if projection.bias is not None:
        bias_N = (projection.bias.double() + change_NK[:, size]).to(dtype).to(weight_NK.dtype)
        projection.bias = nn.Parameter(bias_N, projection.bias.requires_grad)
