"""Perplexity of students without any training: how plans are chosen, with heads lined up or not.

    .venv/bin/python -m samples.evidence.untrained

Plans are chosen on the training books and judged on the held-out ones. Writes each plan to
`results/plans`; `heal.py` takes the cheapest of each ratio from there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from samples.evidence.common import (
    LENGTH,
    RATIOS,
    arguments,
    held_out,
    percent,
    publish,
    score,
    table,
)

from echoatt_exporter import SharingPlan, share_attention
from echoatt_exporter.analyze.candidates import PlanSearch
from echoatt_exporter.analyze.compare_maps import measure_similarity
from echoatt_exporter.analyze.match_heads import align_plan
from echoatt_exporter.analyze.probe import PlanProbe
from echoatt_exporter.analyze.search import search_plans
from echoatt_exporter.analyze.select import paper_plan
from echoatt_exporter.evaluate.score import compare_scores
from echoatt_exporter.share.checkpoint import load_teacher
from echoatt_exporter.share.weight_files import checkpoint_digest
from echoatt_exporter.texts import load_tokenizer, read_texts, sample_windows, texts_digest

SAMPLES, CALIBRATION, SEED = 200, 16, 0


def main() -> None:
    """Choose the plans, write them, and score their students on the held-out books."""
    args = arguments(__doc__)
    teacher = load_teacher(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(args.model)
    texts = read_texts([args.train])
    windows = sample_windows(texts, tokenizer, length=LENGTH, count=SAMPLES, seed=SEED)
    similarity, heads = measure_similarity(
        teacher,
        windows,
        text_digest=texts_digest(texts),
        model=args.model.name,
        checkpoint_digest=checkpoint_digest(args.model),
        seed=SEED,
    )
    probe = PlanProbe(teacher, windows[:CALIBRATION])
    shape = probe.architecture

    shared = [
        search_plans(probe, shape, teacher.config, ratio=RATIOS[-1], head_similarity=aligning)
        for aligning in (None, heads)
    ]
    plans: dict[float, dict[str, SharingPlan]] = {}
    for ratio in RATIOS:
        paper = paper_plan(similarity, shape, ratio)
        plans[ratio] = {"paper": paper, "paper, aligned": align_plan(paper, heads, shape)}
        for name, search in zip(("cost", "cost, aligned"), shared, strict=True):
            plans[ratio][name] = _cheapest(search, len(paper.followers))
        for name, plan in plans[ratio].items():
            kl = probe.measure(plan).kl
            file = args.results / "plans" / f"{percent(ratio)[:2]}-{name.replace(', ', '-')}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f'{plan.to_json()[:-2]}, "kl": {kl}}}\n', encoding="utf-8")
            print(percent(ratio), name, plan.sources, f"KL {kl:.4f}", flush=True)

    valid = held_out(args.valid)
    reference = score(teacher, valid, tokenizer)
    rows, data = [], dict[str, Any]()
    for ratio, chosen in plans.items():
        row = [percent(ratio)]
        for name, plan in chosen.items():
            student = share_attention(copy.deepcopy(teacher), plan)
            result = compare_scores(score(student, valid, tokenizer), reference)
            low, high = result.interval
            row.append(f"{result.ratio:.3f} ({low:.3f} to {high:.3f})")
            data[f"{percent(ratio)}, {name}"] = {
                "sources": plan.sources,
                "perplexity_ratio": result.ratio,
                "interval": result.interval,
            }
            print(percent(ratio), name, row[-1], flush=True)
        rows.append(row)
    header = ["followers", *plans[RATIOS[0]]]
    heading = (
        f"Perplexity over the teacher's ({reference.perplexity:.2f}; {reference.tokens:,} tokens of"
        " the held-out books), with 95 % intervals, before any training:\n\n"
    )
    publish(args.results, "untrained", data, heading + table(header, rows))


def _cheapest(search: PlanSearch, followers: int) -> SharingPlan:
    """The cheapest measured plan with so many followers."""
    of_count = [c for c in search.candidates if len(c.plan.followers) == followers]
    return min(of_count, key=lambda candidate: candidate.cost.kl).plan


if __name__ == "__main__":
    main()
