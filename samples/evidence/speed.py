"""Training speed of students beside their teacher, the same batch and in one run.

    .venv/bin/python -m samples.evidence.speed

A step is what training on text does: forward, cross-entropy, backward, AdamW. Every model takes one
step in turn, round after round, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from samples.evidence.common import RATIOS, arguments, percent, publish, table
from transformers import PreTrainedModel

from echoatt_exporter import EchoAttForCausalLM, SharingPlan, share_attention
from echoatt_exporter.analyze.footprint import footprint_of
from echoatt_exporter.distill.healing_student import set_attention
from echoatt_exporter.share.checkpoint import load_teacher
from echoatt_exporter.share.modeling_echoatt import MaterializedAttention
from echoatt_exporter.share.recomputed_attention import RecomputedAttention

ROUNDS, WARM_UP = 12, 2
# Rows and their tokens: the teacher's own training length, and as far as its context goes
BATCHES = ((8, 256), (2, 1024))


def _step(model: PreTrainedModel, tokens: torch.Tensor, **attention: Any) -> Callable[[], float]:
    """A function that trains `model` for one step and tells the seconds it took."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> float:
        start = time.perf_counter()
        shared = {name: make() for name, make in attention.items()}
        model(input_ids=tokens, labels=tokens, use_cache=False, **shared).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step


def _student_step(
    teacher: PreTrainedModel, plan: SharingPlan, tokens: torch.Tensor, *, recomputed: bool
) -> Callable[[], float]:
    student: EchoAttForCausalLM = share_attention(copy.deepcopy(teacher), plan)
    set_attention(student, recomputed=recomputed)
    kind = RecomputedAttention if recomputed else MaterializedAttention
    return _step(student, tokens, shared_attention=lambda: kind(plan.sources))


def main() -> None:
    """Time all models at both lengths and write the table."""
    args = arguments(__doc__)
    teacher = load_teacher(args.model, dtype=torch.float32)
    plans = {
        ratio: SharingPlan.load(args.results / "plans" / f"{percent(ratio)[:2]}-cost.json")
        for ratio in RATIOS
    }
    rows, data = [], []
    for batch, length in BATCHES:
        tokens = torch.randint(2, teacher.config.vocab_size, (batch, length))
        steps: dict[str, Callable[[], float]] = {}
        for name in ("eager", "sdpa"):
            copied = copy.deepcopy(teacher)
            copied.set_attn_implementation(name)
            steps[name] = _step(copied, tokens)
        for ratio, plan in plans.items():
            for recomputed in (False, True):
                steps[f"{ratio} {recomputed}"] = _student_step(
                    teacher, plan, tokens, recomputed=recomputed
                )
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS + WARM_UP):
            for name, step in steps.items():
                seconds[name].append(step())
        kept = {name: times[WARM_UP:] for name, times in seconds.items()}
        speeds = {n: batch * length / statistics.median(times) for n, times in kept.items()}
        for name in ("eager", "sdpa"):
            rows.append([f"teacher, {name}", f"{batch} x {length}", f"{speeds[name]:,.0f}"])
            rows[-1] += ["", "", ""]
        for ratio, plan in plans.items():
            removed = footprint_of(
                teacher.config, plan, context=length
            ).forward_multiply_adds_removed_share
            for recomputed in (False, True):
                key, attention = f"{ratio} {recomputed}", ("materialized", "recomputed")[recomputed]
                to = {
                    name: statistics.median(
                        theirs / ours for theirs, ours in zip(kept[name], kept[key], strict=True)
                    )
                    for name in ("eager", "sdpa")
                }
                rows.append(
                    [
                        f"student {percent(ratio)}, {attention}",
                        f"{batch} x {length}",
                        f"{speeds[key]:,.0f}",
                        f"{to['eager']:.2f}",
                        f"{to['sdpa']:.2f}",
                        f"{100 * removed:.1f} %",
                    ]
                )
        data.append({"batch": batch, "length": length, "seconds": kept})
    header = [
        "model, attention",
        "batch",
        "tokens/s",
        "to the eager teacher",
        "to the SDPA teacher",
        "arithmetic removed",
    ]
    heading = (
        f"Training on text, {torch.get_num_threads()} threads, float32, medians of {ROUNDS} rounds;"
        " ratios are medians over the rounds:\n\n"
    )
    publish(args.results, "speed", data, heading + table(header, rows))


if __name__ == "__main__":
    main()
