"""Plans chosen by similarity alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.wording import whole

from echoatt_exporter.analyze.choice import Choice
from echoatt_exporter.analyze.select import (
    follows_the_sink,
    kept_without_first,
    layer_importance,
    paper_plan,
    threshold_plan,
)
from echoatt_exporter.analyze.similarity import LayerSimilarity
from echoatt_exporter.architecture import DecoderArchitecture
from echoatt_exporter.errors import AnalysisError
from echoatt_exporter.families import LayerKind


def architecture_with(kinds: Sequence[LayerKind]) -> DecoderArchitecture:
    layers = len(kinds)
    heads = ((4,) * layers, (2,) * layers, (8,) * layers)
    return DecoderArchitecture("llama", tuple(kinds), None, *heads, 100, 64)


def similarity_of(mean: Any) -> LayerSimilarity:
    mean = np.array(mean, dtype=np.float64)
    return LayerSimilarity(
        mean=mean,
        std=np.zeros_like(mean),
        mean_without_first=mean,
        std_without_first=np.zeros_like(mean),
        head_mean=np.repeat(mean[..., None], 4, axis=-1),
        samples=1,
        length=8,
        seed=0,
        text_digest="",
        model="",
        family="llama",
        checkpoint_digest="",
        versions={},
    )


def graded(levels: Sequence[float]) -> LayerSimilarity:
    """Layers as similar to any other as their own level and the other's allow."""
    mean = np.outer(levels, levels)
    np.fill_diagonal(mean, 1)
    return similarity_of(mean)


def full(count: int) -> DecoderArchitecture:
    return architecture_with(["full"] * count)


@pytest.mark.parametrize(
    ("ratio", "front"), [(0.1, 0.3), (None, 0.75), (0.4, 0.75), (0.9, 0.9), (0.02, 0.06)]
)
def test_the_front_goes_some_way_beyond_what_is_asked_for(
    ratio: float | None, front: float
) -> None:
    """Three times as far, and to three quarters of the layers; a quarter is asked for by itself."""
    assert Choice.of("cost", ratio=ratio).front_ratio(full(30)) == pytest.approx(front)
    kinds = architecture_with(["full", "sliding", "full", "sliding", "full"])
    assert Choice.of("cost", ratio=0.4).front_ratio(kinds) == 0.6  # two must be sources
    assert Choice.of("cost", max_kl=1.0).front_ratio(kinds) is None


def test_importance_is_the_mean_similarity_to_the_others() -> None:
    similarity = similarity_of([[1, 0.2, 0.4], [0.2, 1, 0.9], [0.4, 0.9, 1]])
    assert layer_importance(similarity) == pytest.approx((0.3, 0.55, 0.65))
    assert layer_importance(similarity_of([[1]])) == (0,)


# The paper's plans for 22 layers; 2-5 and 7 of them stand out, then 8 and 9, then 18
LEVELS = [0.3] * 22
for _layer, _level in {2: 0.9, 3: 0.91, 4: 0.92, 5: 0.9, 7: 0.89}.items():
    LEVELS[_layer] = _level
LEVELS[6], LEVELS[8], LEVELS[9], LEVELS[18] = 0.6, 0.58, 0.56, 0.54


def test_paper_plan_of_a_quarter_is_that_of_the_paper() -> None:
    """23 %: 2-5 follow 1, and 7 follows 6, from the largest gap and from the ratio alike."""
    expected = [*range(22)]
    expected[2:6] = [1] * 4
    expected[7] = 6
    plan = paper_plan(graded(LEVELS), full(22))
    assert list(plan.sources) == expected
    assert paper_plan(graded(LEVELS), full(22), ratio=0.23) == plan


def test_paper_plan_of_forty_percent_is_that_of_the_paper() -> None:
    """41 %: 2-9 follow 1, and 18 follows 17."""
    plan = paper_plan(graded(LEVELS), full(22), ratio=0.41)
    expected = [*range(22)]
    expected[2:10] = [1] * 8
    expected[18] = 17
    assert list(plan.sources) == expected


@pytest.mark.parametrize("ratio", [0, 0.25, 0.42, 0.75, 1])
def test_ratio_is_met_as_closely_as_layers_allow(ratio: float) -> None:
    levels = np.random.default_rng(0).uniform(0.2, 0.9, 12).tolist()
    plan = paper_plan(graded(levels), full(12), ratio=ratio)
    assert len(plan.followers) == min(round(12 * ratio), 11)


def test_most_similar_first_layer_stays_a_source() -> None:
    similarity = graded([0.9, 0.88, 0.2, 0.9, 0.2])
    assert paper_plan(similarity, full(5)).sources == (0, 0, 2, 2, 4)
    assert paper_plan(similarity, full(5), ratio=0.4).sources == (0, 0, 2, 2, 4)


def test_layers_all_alike_have_no_gap_to_cut_at() -> None:
    assert paper_plan(similarity_of(np.ones((4, 4))), full(4)).followers == ()
    assert paper_plan(similarity_of([[1]]), full(1)).sources == (0,)


def test_blocks_stay_within_one_kind_of_attention() -> None:
    kinds: list[LayerKind] = ["sliding", "full"] * 3
    architecture = architecture_with(kinds)
    similarity = graded([0.3, 0.3, 0.9, 0.9, 0.9, 0.3])
    assert paper_plan(similarity, architecture).sources == (0, 1, 0, 1, 0, 5)
    assert paper_plan(similarity, architecture, ratio=1).sources == (0, 1, 0, 1, 0, 1)
    alike = similarity_of(np.ones((6, 6)))
    assert threshold_plan(alike, architecture, 1).sources == (0, 1, 0, 1, 0, 1)


def with_first_token(levels: Sequence[float], sinks: Sequence[float]) -> LayerSimilarity:
    """Layers as alike as their levels say, which look as alike as the sinks say."""
    raw, rest = graded(sinks), graded(levels)
    return replace(raw, mean_without_first=rest.mean)


def test_a_cut_at_the_attention_sink_is_told_from_one_that_is_not() -> None:
    levels, sinks = [0.5, 0.3, 0.52, 0.51, 0.5, 0.3], [0.3, 0.3, 0.9, 0.9, 0.92, 0.91]
    sink = with_first_token(levels, sinks)
    assert paper_plan(sink, full(6)).sources == (0, 1, 1, 1, 1, 1)
    assert paper_plan(sink, full(6), without_first=True).sources == (0, 1, 1, 1, 1, 5)
    kept = kept_without_first(sink, full(6))
    # Layers 2 to 5 are above the cut: 0.60302 less 0.2358, and without the first token 0.19712
    # less 0.1764
    assert kept == pytest.approx(0.02072 / 0.36722)
    assert follows_the_sink(kept)
    none = with_first_token(LEVELS, LEVELS)
    assert kept_without_first(none, full(22)) == pytest.approx(1)
    assert not follows_the_sink(1.0)
    alike = similarity_of(np.ones((4, 4)))
    assert kept_without_first(alike, full(4)) is None
    assert not follows_the_sink(None)


def test_threshold_compares_with_the_source_of_the_run() -> None:
    """Layer 3 is like its neighbour 2, and not like 2's source."""
    mean = np.eye(5)
    for a, b, value in [(0, 1, 0.8), (0, 2, 0.7), (2, 3, 0.9), (0, 3, 0.69), (3, 4, 0.71)]:
        mean[a, b] = mean[b, a] = value
    similarity = similarity_of(mean)
    assert threshold_plan(similarity, full(5), 0.7).sources == (0, 0, 0, 3, 3)
    assert threshold_plan(similarity, full(5), 0.8).sources == (0, 0, 2, 2, 4)
    assert threshold_plan(similarity, full(5), 0).sources == (0,) * 5
    assert threshold_plan(similarity, full(5), 1).followers == ()


def test_what_cannot_be_chosen_is_an_error() -> None:
    similarity = graded([0.5] * 4)
    with pytest.raises(AnalysisError, match=whole("4 layers of 4 heads and the model has 5 of 4")):
        paper_plan(similarity, full(5))
    with pytest.raises(AnalysisError, match=whole("ratio of 40 is outside 0 to 1")):
        paper_plan(similarity, full(4), ratio=40)
    with pytest.raises(AnalysisError, match=whole(r"similarity of 1\.5 is outside 0 to 1")):
        threshold_plan(similarity, full(4), 1.5)
