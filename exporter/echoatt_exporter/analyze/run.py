"""An analysis, from a model directory and texts to a folder with a plan and a report."""

from __future__ import annotations

import datetime as dt
import hashlib
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from echoatt_exporter.analyze.candidates import PlanCandidate, PlanSearch
from echoatt_exporter.analyze.choice import Choice, Method
from echoatt_exporter.analyze.compare_maps import SimilaritySums, measure_similarity
from echoatt_exporter.analyze.findings import AnalysisReport, SinkFinding, head_alignment
from echoatt_exporter.analyze.footprint import footprint_of
from echoatt_exporter.analyze.match_heads import align_plan
from echoatt_exporter.analyze.probe import PlanProbe
from echoatt_exporter.analyze.progress import Progress
from echoatt_exporter.analyze.publish import check_free, published
from echoatt_exporter.analyze.save import save_analysis
from echoatt_exporter.analyze.screen import PairScreen
from echoatt_exporter.analyze.search import pair_plans, screen_for, search_plans
from echoatt_exporter.analyze.select import (
    kept_without_first,
    layer_importance,
    paper_plan,
    threshold_plan,
)
from echoatt_exporter.analyze.similarity import HeadSimilarity, LayerSimilarity
from echoatt_exporter.architecture import architecture_of
from echoatt_exporter.devices import check_torch_device
from echoatt_exporter.errors import AnalysisError, TextError
from echoatt_exporter.refit.pair_fits import PairFits, fit_pairs
from echoatt_exporter.share.checkpoint import load_teacher
from echoatt_exporter.share.outline import read_teacher_outline
from echoatt_exporter.share.weight_files import checkpoint_digest
from echoatt_exporter.texts import load_tokenizer, read_texts, sample_windows, texts_digest
from echoatt_runtime.contract import SharingPlan

# What a new token reads is counted at this context, or the model's own if that is shorter
_DECODE_CONTEXT = 4096

# Of the samples, what pairs are fitted on at most
_FIT_TOKENS = 12_288

# What progress is kept under
_SAMPLES, _SCREEN = "samples", "screen"

# Told what is being done, how much of it is done, and of how much
OnStep = Callable[[str, int, int], None]


def _ignore_step(_name: str, _done: int, _total: int) -> None:
    pass


def analyze_model(
    model_dir: str | Path,
    text_paths: Sequence[str | Path],
    out: str | Path,
    *,
    method: Method = "cost",
    ratio: float | None = None,
    max_kl: float | None = None,
    min_similarity: float | None = None,
    align_heads: bool = True,
    refit: bool = False,
    length: int = 512,
    samples: int = 200,
    calibration_windows: int = 16,
    seed: int = 0,
    device: str = "cpu",
    force: bool = False,
    trust_remote_code: bool = False,
    on_step: OnStep = _ignore_step,
) -> AnalysisReport:
    """Measure which layers of a model may share attention, choose a plan, and write it all down.

    Writes `similarity.json`, `similarity.png`, `plan.json` and `report.html`; with the cost
    method also `search.json`, and in `front` a plan file for each point of the Pareto front; with
    the paper's also the plan of its rule on maps without the first token.

    Until then `out` holds a folder `progress`, from which the same call goes on where it was
    stopped, to the same result.

    Args:
        model_dir: A teacher's directory, with its tokenizer.
        text_paths: Files and folders, as `echoatt_exporter.texts.read_texts` takes them.
        out: The folder to write; what it is to hold appears in it at once or not at all.
        method: `cost` searches plans by the KL to the teacher on the text; `paper` is the
            selection of EchoAtt (arXiv 2409.14595), and `threshold` a least similarity.
        ratio: Followers / layers, for `cost` and `paper`. Without it (and `max_kl`), `cost`
            shares a quarter of the layers, and `paper` cuts at the largest gap.
        max_kl: Share as much as costs at most this KL, nats a token; for `cost`.
        min_similarity: Of a follower to its source, 0 to 1; for `threshold`, which needs it.
        align_heads: Line the followers' heads up with their sources'.
        refit: Judge plans by what they cost once each follower's attention is re-fitted, on samples
            that costs are not measured on; for `cost`.
        length: Tokens of a sample.
        samples: Samples for the similarity; fewer are taken if the text holds no more.
        calibration_windows: How many of the samples costs are measured on.
        seed: Which samples are drawn.
        device: Where the model runs, as torch names it.
        force: Replace an earlier analysis in `out`.
        trust_remote_code: Run code that the checkpoint brings.
        on_step: Told (step, done, total) as the analysis goes on; the steps are `load`, `resumed`
            (with the plans that are measured already), `samples`, and, by cost, `screen`, `pairs`,
            `plans` and `best plans`, with `refit` also `fits`.

    Returns:
        What was found and written.

    Raises:
        EchoAttError: Bad input, typed and in one line; nothing was written but progress.
    """
    start = time.perf_counter()
    choice = Choice.of(
        method, ratio=ratio, max_kl=max_kl, min_similarity=min_similarity, refit=refit
    )
    if samples < 2 or calibration_windows < 2:
        raise AnalysisError("give at least two samples and two calibration windows")
    source, target = Path(model_dir), Path(out)
    check_free(target, force=force)
    texts = read_texts(text_paths)
    on_step("load", 0, 1)
    read_teacher_outline(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    teacher = _load(source, device, trust_remote_code)
    architecture = architecture_of(teacher.config)
    choice.check(architecture)
    if not 2 <= length <= architecture.context_length:
        raise AnalysisError(
            f"samples of {length} tokens do not fit the model's context of"
            f" {architecture.context_length}; give a length of 2 to {architecture.context_length}"
        )
    windows = sample_windows(texts, tokenizer, length=length, count=samples, seed=seed)
    if len(windows) < 2:
        raise TextError(
            f"too little text: it fills one sample of {length} tokens, and how far costs spread"
            " takes two to tell; give more text, or a smaller length"
        )
    on_step("load", 1, 1)
    digests = {
        "text_digest": texts_digest(texts),
        "checkpoint_digest": checkpoint_digest(source),
    }
    origin = {
        **digests,
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "length": length,
        "calibration_windows": calibration_windows,
        "align_heads": align_heads,
        "refit": refit,
        "device": device,
        "versions": {name: version(name) for name in ("echoatt", "torch", "transformers")},
    }
    progress = Progress(target, origin, force=force)
    if len(progress.measured):
        on_step("resumed", len(progress.measured), len(progress.measured))
    try:
        similarity, heads = _compare(
            teacher, windows, progress, on_step, model=source.resolve().name, seed=seed, **digests
        )
        aligning = heads if align_heads else None
        fits = _fit(teacher, windows[calibration_windows:], aligning, on_step) if refit else None
        probe = PlanProbe(teacher, windows[:calibration_windows], progress.measured, fits)
        chosen, search, sink = _choose(choice, probe, similarity, aligning, progress, on_step)
        report = AnalysisReport(
            model_dir=source,
            out=target,
            text_paths=tuple(map(Path, text_paths)),
            documents=len(texts),
            architecture=architecture,
            method=choice.method,
            selection=choice.in_words,
            similarity=similarity,
            importance=layer_importance(similarity),
            chosen=chosen,
            search=search,
            sink=sink,
            alignment=None if aligning is None else head_alignment(chosen.plan, aligning),
            calibration_windows=min(len(windows), calibration_windows),
            refit=refit,
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            seconds=time.perf_counter() - start,
        )
        with published(target, force=force) as stage:
            save_analysis(report, stage)
    except BaseException:  # whoever stops it, what it measured is kept
        progress.flush()
        raise
    return report


def _load(source: Path, device: str, trust_remote_code: bool) -> PreTrainedModel:
    check_torch_device(device)
    # attention maps are compared as float32 whatever the weights are stored in
    teacher = load_teacher(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
    torch.nn.Module.to(teacher, device)  # transformers types its own as if it took no device
    return teacher


def _compare(
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    progress: Progress,
    on_step: OnStep,
    **record: Any,
) -> tuple[LayerSimilarity, HeadSimilarity]:
    """Compare the layers, going on from what was compared."""
    sums = SimilaritySums(progress.arrays(_SAMPLES))

    def on_sample(done: int) -> None:
        progress.keep(_SAMPLES, sums.arrays())
        on_step("samples", done, len(windows))

    return measure_similarity(teacher, windows, sums=sums, on_sample=on_sample, **record)


def _fit(
    teacher: PreTrainedModel,
    windows: torch.Tensor,
    heads: HeadSimilarity | None,
    on_step: OnStep,
) -> PairFits:
    """Fit every pair."""
    if not len(windows):
        raise TextError(
            "too little text: costs are measured on all samples of it, and a re-fit takes others;"
            " give more text, fewer --calibration-windows, or a smaller length"
        )
    windows = windows[: max(1, _FIT_TOKENS // windows.shape[1])].to(teacher.device)

    def on_layer(done: int, total: int) -> None:
        on_step("fits", done, total)

    return fit_pairs(teacher, windows, pair_plans(architecture_of(teacher.config), heads), on_layer)


def _choose(
    choice: Choice,
    probe: PlanProbe,
    similarity: LayerSimilarity,
    heads: HeadSimilarity | None,
    progress: Progress,
    on_step: OnStep,
) -> tuple[PlanCandidate, PlanSearch | None, SinkFinding | None]:
    """The plan and its cost; by cost, everything else that was measured; by the paper, the sink."""
    architecture, config = probe.architecture, probe.teacher.config
    context = min(_DECODE_CONTEXT, architecture.context_length)
    if choice.method == "cost":
        search = search_plans(
            probe,
            architecture,
            config,
            ratio=choice.ratio,
            max_kl=choice.max_kl,
            max_ratio=choice.front_ratio(architecture),
            head_similarity=heads,
            context=context,
            screen=_screen(probe, heads, progress, on_step),
            on_step=on_step,
        )
        return search.chosen, search, None

    def judged(plan: SharingPlan) -> PlanCandidate:
        if heads is not None:
            plan = align_plan(plan, heads, architecture)
        footprint = footprint_of(config, plan, context=context)
        return PlanCandidate(plan, probe.measure(plan), footprint)

    on_step("best plans", 0, 1)
    if choice.min_similarity is not None:
        return judged(threshold_plan(similarity, architecture, choice.min_similarity)), None, None
    sink = SinkFinding(
        kept=kept_without_first(similarity, architecture, choice.ratio),
        beside=judged(paper_plan(similarity, architecture, choice.ratio, without_first=True)),
    )
    return judged(paper_plan(similarity, architecture, choice.ratio)), None, sink


def _screen(
    probe: PlanProbe, heads: HeadSimilarity | None, progress: Progress, on_step: OnStep
) -> PairScreen:
    """Estimate what pairs cost, going on from what was estimated."""
    found = progress.arrays(_SCREEN)

    def on_batch(done: int, total: int, gram_PP: NDArray[np.float64]) -> None:
        progress.keep(_SCREEN, {"done": np.array(float(done)), "gram": gram_PP})
        on_step("screen", done, total)

    begun = None if found is None else (int(found["done"]), found["gram"])
    return screen_for(probe, heads, begun=begun, on_batch=on_batch)
