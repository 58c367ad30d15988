"""What a sharing plan costs: the divergence from the teacher, measured without building students.

Windows are run a batch at a time and what a plan costs on each batch is kept, so that a plan that
was measured on the first of them costs only the others when it is to be measured on all.

Shapes in names: W windows, B windows at once, T tokens of a window, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from echoatt_exporter.analyze.divergence import Divergence, divergences
from echoatt_exporter.analyze.measured import Measured
from echoatt_exporter.analyze.sweep import StudentSweep
from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.errors import AnalysisError
from echoatt_exporter.refit.pair_fits import PairFits
from echoatt_exporter.share.lm_head import head_of
from echoatt_runtime.contract import SharingPlan
from echoatt_runtime.measures import perplexity

# Tokens of a batch of windows: fewer leave a layer's products inefficient
_BATCH_TOKENS = 1024
# What a first look at a plan takes, at least
_FEW_TOKENS, _FEW_WINDOWS = 1024, 2
# The most that the states and loans of the plans in one run may take, bytes
_RUN_BYTES = 1 << 30

# A student whose perplexity is this many times its teacher's, or whose distance from it is the
# logarithm of that in nats a token, counts as ruined. What healing was seen to bring back lay at
# two to three times; from five on, next to nothing of what a layer reads is what it was made for.
RUIN = 5.0

# Told after each batch of windows how many runs of a plan on a batch are done of this call's
OnRun = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PlanCost:
    """What a plan costs on the probe's windows, before any training.

    Attributes:
        kl: KL divergence teacher‖student of the next-token distribution, nats, mean over tokens.
        kl_standard_error: Of `kl`, from its spread over the windows.
        perplexity: The student's, of the windows' own next tokens.
        teacher_perplexity: The teacher's, of the same tokens.
        windows: How many windows that is.
    """

    kl: float
    kl_standard_error: float
    perplexity: float
    teacher_perplexity: float
    windows: int

    @property
    def perplexity_ratio(self) -> float:
        """The student's perplexity over the teacher's."""
        return self.perplexity / self.teacher_perplexity

    @property
    def ruined(self) -> bool:
        """Whether little is left of the model; see `RUIN`."""
        return self.perplexity_ratio >= RUIN or self.kl >= math.log(RUIN)


class PlanProbe:
    """Measures sharing plans on one loaded teacher, which is as it was after every measurement.

    Attributes:
        teacher: The model.
        architecture: Its shape.
        teacher_perplexity: Of the windows' own next tokens.
        windows: Token ids, int64 [W, T].
        measured: What was measured so far.
        fits: Followers' output projections; None where they have their own.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        windows: torch.Tensor,
        measured: Measured | None = None,
        fits: PairFits | None = None,
    ) -> None:
        """Run the teacher once.

        Args:
            teacher: A decoder of a supported family, on any device.
            windows: Token ids, int64 [windows, tokens]; at least two of each.
            measured: What an earlier probe of the same teacher, windows and fits measured.
            fits: Followers' output projections; by default they have their own.

        Raises:
            UnsupportedModelError: The teacher's family is not supported.
            AnalysisError: Too few windows, too long ones, token ids that the model lacks, or a
                loss that is not a number.
        """
        self.teacher = teacher
        self.architecture = architecture_of(teacher.config)
        self._check(windows)
        self.windows = windows
        self.measured = Measured() if measured is None else measured
        self.fits = fits
        self._sweep = StudentSweep(teacher, fits)
        self._head = head_of(teacher)
        per_batch = max(1, _BATCH_TOKENS // windows.shape[1])
        self._batches = torch.split(windows.to(teacher.device), per_batch)
        few = max(_FEW_WINDOWS, math.ceil(_FEW_TOKENS / windows.shape[1]))
        self._few = math.ceil(min(few, len(windows)) / per_batch)
        self._outputs: list[torch.Tensor] = []  # by batch: [B, T, E]
        teachers: list[Divergence] = []
        unshared = SharingPlan.unshared(self.architecture.num_layers)
        for batch_BT in self._batches:
            (output_BTE,) = self._sweep.run(batch_BT, [unshared])
            self._outputs.append(output_BTE)
            teachers += self._compare(len(teachers), [output_BTE])
        self._teacher_log_p_W = [one.log_p for one in teachers]
        self.teacher_perplexity = perplexity(np.concatenate(self._teacher_log_p_W))

    def _check(self, windows: torch.Tensor) -> None:
        if windows.ndim != 2 or min(windows.shape) < 2:
            raise AnalysisError(
                f"windows of shape {list(windows.shape)} tell nothing of the spread; give at least"
                " two windows of at least two tokens"
            )
        architecture = self.architecture
        if windows.shape[1] > architecture.context_length:
            raise AnalysisError(
                f"windows of {windows.shape[1]} tokens are longer than the model's context of"
                f" {architecture.context_length}; make them shorter"
            )
        lowest, highest = int(windows.min()), int(windows.max())
        if lowest < 0 or highest >= architecture.vocab_size:
            raise AnalysisError(
                f"token id {highest if lowest >= 0 else lowest} is outside the model's vocabulary"
                f" of {architecture.vocab_size}; use the model's own tokenizer"
            )

    def measure(self, plan: SharingPlan) -> PlanCost:
        """Run the student that `plan` makes on all windows.

        Args:
            plan: Any plan for the teacher, head orders included.

        Raises:
            PlanError: The plan does not fit the teacher.
            AnalysisError: The student's loss is not a number.
        """
        (cost,) = self.measure_all([plan])
        return cost

    def measure_all(
        self, plans: Sequence[SharingPlan], *, few: bool = False, on_run: OnRun | None = None
    ) -> list[PlanCost]:
        """Run the students of many plans, which share what they have in common.

        Args:
            plans: Any plans for the teacher, head orders included.
            few: Run them on the first windows only, about a thousand tokens.
            on_run: Called after each run, with the number of runs done and of those to do.

        Returns:
            The plans' costs on these windows, in the plans' order.

        Raises:
            PlanError: A plan does not fit the teacher.
            AnalysisError: A student's loss is not a number.
        """
        for plan in plans:
            self.architecture.validate_plan(plan)
        batches = range(self._few if few else len(self._batches))
        missing = {
            batch: [plan for plan in dict.fromkeys(plans) if not self.measured.has(plan, batch)]
            for batch in batches
        }
        done, total = 0, sum(map(len, missing.values()))
        for batch, wanted in missing.items():
            for some in self._that_fit(wanted, batch):
                hidden = self._sweep.run(self._batches[batch], some)
                for plan, found in zip(some, self._compare(batch, hidden), strict=True):
                    self.measured.add(plan, batch, found)
                self.measured.keep()
                done += len(some)
                if on_run is not None:
                    on_run(done, total)
        return [self._cost(plan, len(batches)) for plan in plans]

    def _compare(self, batch: int, students_BTE: Sequence[torch.Tensor]) -> list[Divergence]:
        found = divergences(
            self._head,
            self.architecture.vocab_size,
            self._batches[batch],
            self._outputs[batch],
            students_BTE,
        )
        if not all(np.isfinite([one.kl, one.log_p]).all() for one in found):
            raise AnalysisError("the model's loss is not a number: it overflows; try float32")
        return found

    def _that_fit(self, plans: list[SharingPlan], batch: int) -> Iterator[list[SharingPlan]]:
        """The plans in parts that fit in memory together."""
        shape = self.architecture
        tokens = self._batches[batch].numel()
        loan = max(
            (query + key) * size
            for query, key, size in zip(
                shape.query_heads, shape.kv_heads, shape.head_dims, strict=True
            )
        )
        states = 2 * self._outputs[batch].shape[-1]  # in front of a layer and behind it
        part: list[SharingPlan] = []
        taken = 0
        for plan in plans:
            size = states + loan * len(plan.shared_sources)
            taken += size * tokens * self.teacher.dtype.itemsize
            if part and taken > _RUN_BYTES:
                yield part
                part, taken = [], 0
            part.append(plan)
        if part:
            yield part

    def _cost(self, plan: SharingPlan, batches: int) -> PlanCost:
        parts = [self.measured.get(plan, batch) for batch in range(batches)]
        kl_W = np.concatenate([part.kl for part in parts])
        return PlanCost(
            kl=float(kl_W.mean()),
            kl_standard_error=float(kl_W.std(ddof=1)) / math.sqrt(len(kl_W)),
            perplexity=perplexity(np.concatenate([part.log_p for part in parts])),
            teacher_perplexity=perplexity(np.concatenate(self._teacher_log_p_W[:batches])),
            windows=len(kl_W),
        )
