"""Solves for a student's weights so that its states meet its teacher's, without a gradient.

What a follower's attention gives by foreign probabilities is brought near to what it gave by its
own through another output projection: a regression, with an answer in closed form, on any amount of
text. First each follower by itself, on the teacher's states; then from below on the student's own,
so that a layer also makes up for what the layers in front of it lost.

GPTAQ (arXiv 2504.02692) fits in the same way what is lost by rounding.

Shapes in names: W windows, B windows at once, T tokens, E hidden size, K inputs of a projection,
N its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from echoatt_exporter.analyze.divergence import divergences
from echoatt_exporter.families import Family, family_of
from echoatt_exporter.families.projections import is_projection
from echoatt_exporter.refit.layer_walk import LayerWalk
from echoatt_exporter.refit.projection_calls import Projection, add_to, recording
from echoatt_exporter.refit.weighted_fit import WeightedFit
from echoatt_exporter.share.lending_attention import lending_attention
from echoatt_exporter.share.lm_head import head_of
from echoatt_exporter.share.modeling_echoatt import EchoAttForCausalLM
from echoatt_exporter.share.recomputed_attention import RECOMPUTED_NAME

ALONE, ATTENTION, FEED_FORWARD = "attention alone", "attention", "feed-forward"
"""What is fitted of a follower: its attention's output on the teacher's states, then on the
student's, and its feed-forward's."""

# By how much a layer's output may differ from a sum of what goes in and what its parts give
_SUM_ERROR = 1e-3

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found for one projection.

    Attributes:
        layer: The follower.
        part: ALONE, ATTENTION or FEED_FORWARD.
        left: Share of what was missing that is still missing with the new weight, in mean square on
            text that it was not fitted on.
        ridge: In units of the mean square of an input.
        starved: Whether there were fewer tokens than inputs, so that the ridge decided.
    """

    layer: int
    part: str
    left: float
    ridge: float
    starved: bool

    @property
    def learned(self) -> bool:
        """Whether anything was learned that holds on other text; if not the weight is as it was."""
        return self.left < 1


@dataclass(frozen=True, slots=True)
class Step:
    """What was done in one go, and judged.

    Attributes:
        fits: Of every follower alone, or of one follower on the student's own states.
        refused: The followers that have their old weights again, with which the KL is less.
        kl: KL to the teacher on held-out text afterwards, nats a token.
        weights: What was kept, new or old, by names in the decoder.
    """

    fits: tuple[Fit, ...]
    refused: tuple[int, ...]
    kl: float
    weights: Weights = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class RefitReport:
    """What a re-fit did.

    Attributes:
        kl_before: KL to the teacher on held-out text, nats a token.
        steps: In order: all followers alone, then each again.
        tokens: That were fitted on.
        held_out_tokens: That KL was measured on.
    """

    kl_before: float
    steps: tuple[Step, ...]
    tokens: int
    held_out_tokens: int

    @property
    def kl(self) -> float:
        """KL to the teacher on held-out text afterwards, nats a token."""
        return self.steps[-1].kl if self.steps else self.kl_before

    @property
    def unchanged(self) -> list[int]:
        """The followers of which no new weight was kept."""
        tried = {fit.layer for step in self.steps for fit in step.fits}
        kept = {
            fit.layer
            for step in self.steps
            for fit in step.fits
            if fit.learned and fit.layer not in step.refused
        }
        return sorted(tried - kept)

    @property
    def starved(self) -> bool:
        """Whether some fit had fewer tokens than inputs."""
        return any(fit.starved for step in self.steps for fit in step.fits)


@torch.no_grad()
def refit_student(
    student: EchoAttForCausalLM,
    teacher: PreTrainedModel,
    windows_WT: torch.Tensor,
    held_out_WT: torch.Tensor,
    *,
    dtype: torch.dtype,
    done: Sequence[Step] = (),
    on_step: Callable[[Step], None] = lambda _step: None,
) -> RefitReport:
    """Re-fit a student in place.

    Args:
        student: In evaluation mode, in float32.
        teacher: What it was made of, on the same device, in float32.
        windows_WT: Text to fit on, int64.
        held_out_WT: Text that says whether new weights are kept.
        dtype: What the student will be stored in: new weights are rounded to it.
        done: Steps of an earlier call of the same arguments, which is gone on with.
        on_step: Told every new step.

    Returns:
        What was done. A student without followers is left as it is.
    """
    followers = [layer for layer, source in enumerate(student.sources) if layer != source]
    tokens, held_out_tokens = windows_WT.numel(), held_out_WT.numel()
    if not followers:
        return RefitReport(0.0, (), tokens, held_out_tokens)
    steps = list(done)

    def judge_step(fits: Sequence[Fit], before: Mapping[int, Weights]) -> None:
        """Keep of some layers' new weights those with which the KL is less."""
        last = steps[-1].kl if steps else judge.before
        after = {layer: _fitted_weights(student, layer) for layer in before}
        kl, refused = judge.divergence(), []
        for layer, weights in before.items():
            set_weights(student.decoder, weights)
            without = last if len(before) == 1 else judge.divergence()
            if without <= kl:
                kl = without
                refused.append(layer)
            else:
                set_weights(student.decoder, after[layer])
        kept = {n: w for layer in before for n, w in _fitted_weights(student, layer).items()}
        steps.append(Step(tuple(fits), tuple(refused), kl, kept))
        on_step(steps[-1])

    with ExitStack() as stack:
        for model in (teacher, student.decoder):
            stack.enter_context(lending_attention(model, RECOMPUTED_NAME))
        judge = _Judge(teacher, student, held_out_WT)
        if not done:
            before = {layer: _fitted_weights(student, layer) for layer in followers}
            judge_step(_fit_alone(student, teacher, windows_WT, dtype), before)
        for step in done:
            set_weights(student.decoder, step.weights)
        models = _Models(teacher, student, windows_WT)
        for layer in range(followers[-1] + 1):
            is_done = any(step.fits[0].layer == layer for step in steps[1:])
            if layer in followers and not is_done:
                before = {layer: _fitted_weights(student, layer)}
                judge_step([models.fit(p, dtype) for p in (ATTENTION, FEED_FORWARD)], before)
            models.advance()
            judge.advance()
    return RefitReport(judge.before, tuple(steps), tokens, held_out_tokens)


def set_weights(decoder: nn.Module, weights: Weights) -> None:
    """Give a decoder some of its weights, by their names."""
    for name, weight in weights.items():
        path, _, kind = name.rpartition(".")
        module = decoder.get_submodule(path)
        setattr(module, kind, nn.Parameter(weight, getattr(module, kind).requires_grad))


def _parts(family: Family, layer: nn.Module) -> dict[str, Projection]:
    """A layer's projections whose outputs go into the stream."""
    attention = family.attention_of(layer)
    inside = set(attention.modules())
    outside = [m for m in layer.modules() if is_projection(m) and m not in inside]
    # Modules stand in the order in which they are used in every family
    return {ATTENTION: family.output_of(attention), FEED_FORWARD: outside[-1]}


def _fitted_weights(student: EchoAttForCausalLM, layer: int) -> dict[str, torch.Tensor]:
    """What is fitted in a layer, by name in the decoder."""
    family = family_of(student.decoder.config)
    names = {module: name for name, module in student.decoder.named_modules()}
    projections = _parts(family, family.layers_of(student.decoder)[layer]).values()
    return {
        f"{names[projection]}.{kind}": parameter.detach()
        for projection in projections
        for kind, parameter in projection.named_parameters()
    }


def _fit_alone(
    student: EchoAttForCausalLM,
    teacher: PreTrainedModel,
    windows_WT: torch.Tensor,
    dtype: torch.dtype,
) -> list[Fit]:
    """Fit every follower's attention on the teacher's states."""
    family = family_of(teacher.config)
    layers = [family.layers_of(model) for model in (teacher, student.decoder)]
    walk = LayerWalk(teacher, student.sources, windows_WT)
    fits = []
    for index, (own, follower) in enumerate(zip(*layers, strict=True)):
        if student.sources[index] != index:
            wanted, projection = (
                family.output_of(family.attention_of(layer)) for layer in (own, follower)
            )
            squares = WeightedFit(projection)
            with recording(wanted) as aim, recording(projection) as call:
                for rows in walk.batches:
                    walk.run(rows)
                    walk.run(rows, follower)
                    squares.add(call.input, aim.output - call.output, aim.output)
            fits.append(_solved(squares, index, ALONE, dtype))
        walk.advance()
    return fits


def _solved(squares: WeightedFit, layer: int, part: str, dtype: torch.dtype) -> Fit:
    """Solve, and give the projection its new weight."""
    found = squares.solve()
    fit = Fit(layer, part, found.left, found.ridge, squares.is_starved)
    if fit.learned:
        add_to(squares.projection, found.change, dtype)
    return fit


class _Judge:
    """Held-out text in front of the layer that comes next.

    Attributes:
        before: KL(teacher ‖ student) before anything was fitted, nats a token.
    """

    def __init__(
        self, teacher: PreTrainedModel, student: EchoAttForCausalLM, windows_WT: torch.Tensor
    ) -> None:
        self._head = head_of(teacher)
        self._vocab_size: int = teacher.config.vocab_size
        walk = LayerWalk(teacher, student.sources, windows_WT)
        self._teacher_BTE = [walk.finish(rows) for rows in walk.batches]
        self._walk = LayerWalk(student.decoder, student.sources, windows_WT)
        self.before = self.divergence()

    def divergence(self) -> float:
        """KL(teacher ‖ student), nats a token, with the student's weights as they are."""
        kl: list[float] = []
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


class _Models:
    """The text to fit on in front of the layer that comes next, in both models."""

    def __init__(
        self, teacher: PreTrainedModel, student: EchoAttForCausalLM, windows_WT: torch.Tensor
    ) -> None:
        self._family = family_of(teacher.config)
        self._walks = [
            LayerWalk(model, student.sources, windows_WT) for model in (teacher, student.decoder)
        ]
        self._layers = [self._family.layers_of(model) for model in (teacher, student.decoder)]
        # In front of the first layer, so that it is the same number wherever a re-fit goes on
        self._scale = self._measure_scale()

    def advance(self) -> None:
        """Take the text through the layer."""
        for walk in self._walks:
            walk.advance()

    def fit(self, part: str, dtype: torch.dtype) -> Fit:
        """Fit one projection of the layer on the student's states."""
        teacher, student = self._walks
        of_teacher, of_student = (self._parts(layers) for layers in self._layers)
        scale = self._scale
        squares = WeightedFit(of_student[part])
        with recording(of_teacher[part]) as aimed, recording(of_student[part]) as call:
            for rows in teacher.batches:
                teacher_BTE, student_BTE = teacher.run(rows), student.run(rows)
                aim_BTN = aimed.output
                missing_BTN = aim_BTN - call.output
                if scale is not None and part == FEED_FORWARD:
                    aim_BTN, missing_BTN = teacher_BTE, (teacher_BTE - student_BTE) / scale
                elif scale is not None:
                    before_BTE = teacher.states(rows)
                    aim_BTN = before_BTE + scale * aim_BTN
                    missing_BTN = missing_BTN + (before_BTE - student.states(rows)) / scale
                squares.add(call.input, missing_BTN, aim_BTN)
        return _solved(squares, student.layer, part, dtype)

    def _parts(self, layers: nn.ModuleList) -> dict[str, Projection]:
        return _parts(self._family, layers[self._walks[0].layer])

    def _measure_scale(self) -> float | None:
        """What a layer multiplies its parts' outputs by before it adds them to its input.

        None where it does something else with them: norms them, as Gemma does. Then each part is
        fitted to give what the teacher's gives, and what earlier layers lost stays lost.
        """
        (walk, _), (layers, _) = self._walks, self._layers
        rows = walk.batches[0]
        with ExitStack() as stack:
            one, other = (
                stack.enter_context(recording(part)) for part in self._parts(layers).values()
            )
            change_BTE = walk.run(rows) - walk.states(rows)
        given_BTE = one.output + other.output
        scale = float((change_BTE * given_BTE).sum() / given_BTE.square().sum())
        rest = float((change_BTE - scale * given_BTE).norm() / change_BTE.norm())
        return scale if rest < _SUM_ERROR else None
