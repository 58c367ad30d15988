"""Plans chosen by similarity alone: the paper's selection, and a plain threshold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from echoatt_exporter.analyze.similarity import LayerSimilarity
from echoatt_exporter.architecture import DecoderArchitecture
from echoatt_exporter.errors import AnalysisError
from echoatt_runtime.contract import SharingPlan

# Less than this left of a cut without the first token, and it was the first token that was cut at
_LEAST_KEPT = 0.5


def layer_importance(
    similarity: LayerSimilarity, *, without_first: bool = False
) -> tuple[float, ...]:
    """Each layer's mean similarity to all the others (EchoAtt, arXiv 2409.14595, section 3).

    A layer that is like the others can do without attention of its own: a high value means that the
    layer matters little.

    Args:
        similarity: Of the layers.
        without_first: Take the maps without the first token in the place of the raw ones.
    """
    mean_LL = similarity.mean_without_first if without_first else similarity.mean
    others = mean_LL.sum(axis=1) - np.diagonal(mean_LL)
    return tuple((others / max(1, len(others) - 1)).tolist())


def paper_plan(
    similarity: LayerSimilarity,
    architecture: DecoderArchitecture,
    ratio: float | None = None,
    *,
    without_first: bool = False,
) -> SharingPlan:
    """The paper's selection (EchoAtt, arXiv 2409.14595, section 3).

    Layers are sorted by `layer_importance` and cut at the largest gap between neighbours. The
    dissimilar ones below it stay sources; each run of similar ones follows the source just before
    it. Runs are formed among layers of one attention kind, and the first layer of each kind stays a
    source, whatever its similarity.

    Args:
        similarity: Of the model that the plan is for.
        architecture: Of the same model.
        ratio: Followers / layers. If given, the cut is made not at the largest gap but where the
            number of followers comes closest to this; the most similar layers follow first.
        without_first: Go by the maps without the first token, which is not the paper's rule.

    Raises:
        AnalysisError: Similarity of another model, or a ratio outside 0 to 1.
    """
    _check_layers(similarity, architecture)
    importance = layer_importance(similarity, without_first=without_first)
    similar = _above_the_cut(importance, architecture, ratio)
    return _follow(architecture, lambda layer, _source: layer in similar)


def kept_without_first(
    similarity: LayerSimilarity, architecture: DecoderArchitecture, ratio: float | None = None
) -> float | None:
    """How much of the paper's cut is left when the first token's column is left out.

    The layers above the cut are, on average, more like the others than those below it. Where heads
    send what they do not need to the first token (an attention sink), that difference may be no
    more than how much of it they send there.

    Args:
        similarity: As in `paper_plan`.
        architecture: As in `paper_plan`.
        ratio: As in `paper_plan`.

    Returns:
        The difference without the first token over the difference with it; None if nothing is cut.

    Raises:
        AnalysisError: As `paper_plan`.
    """
    _check_layers(similarity, architecture)
    raw, rest = (
        np.array(layer_importance(similarity, without_first=without_first))
        for without_first in (False, True)
    )
    above = np.zeros(len(raw), dtype=np.bool_)
    above[list(_above_the_cut(raw.tolist(), architecture, ratio))] = True
    if not above.any() or above.all():
        return None
    difference, left = (float(one[above].mean() - one[~above].mean()) for one in (raw, rest))
    return left / difference if difference > 0 else None


def follows_the_sink(kept: float | None) -> bool:
    """Whether a cut of which so much is kept without the first token is the attention sink's."""
    return kept is not None and kept < _LEAST_KEPT


def _above_the_cut(
    importance: Sequence[float], architecture: DecoderArchitecture, ratio: float | None
) -> set[int]:
    """The layers that are like the others."""
    kinds = architecture.sharing_kinds
    ranked = sorted(range(architecture.num_layers), key=lambda layer: -importance[layer])
    if ratio is None:
        gaps = [importance[a] - importance[b] for a, b in itertools.pairwise(ranked)]
        cut = 1 + gaps.index(max(gaps)) if any(gaps) else 0  # all alike: nothing to cut
    elif 0 <= ratio <= 1:
        ranked = [layer for layer in ranked if kinds.index(kinds[layer]) != layer]
        cut = round(ratio * architecture.num_layers)
    else:
        raise AnalysisError(f"a sharing ratio of {ratio:g} is outside 0 to 1; 0.4 is 40 %")
    return set(ranked[:cut])


def threshold_plan(
    similarity: LayerSimilarity, architecture: DecoderArchitecture, min_similarity: float
) -> SharingPlan:
    """Share where the raw similarity reaches a threshold.

    Along the layers of each attention kind, a layer follows the latest source for as long as it is
    similar enough to that source, and is the next source otherwise.

    Args:
        similarity: Of the model that the plan is for.
        architecture: Of the same model.
        min_similarity: The least cosine similarity of a follower to its source, 0 to 1.

    Raises:
        AnalysisError: Similarity of another model, or a threshold outside 0 to 1.
    """
    _check_layers(similarity, architecture)
    if not 0 <= min_similarity <= 1:
        raise AnalysisError(f"a similarity of {min_similarity:g} is outside 0 to 1")
    mean = similarity.mean
    return _follow(architecture, lambda layer, source: mean[layer, source] >= min_similarity)


def _follow(architecture: DecoderArchitecture, follows: Callable[[int, int], bool]) -> SharingPlan:
    """The plan in which a layer that `follows` the latest source of its kind shares with it."""
    sources: list[int] = []
    latest: dict[Hashable, int] = {}
    for layer, kind in enumerate(architecture.sharing_kinds):
        if kind not in latest or not follows(layer, latest[kind]):
            latest[kind] = layer
        sources.append(latest[kind])
    plan = SharingPlan(tuple(sources))
    architecture.validate_plan(plan)
    return plan


def _check_layers(similarity: LayerSimilarity, architecture: DecoderArchitecture) -> None:
    found = similarity.head_mean.shape[1:]
    wanted = (architecture.num_layers, max(architecture.query_heads))
    if found != wanted:
        raise AnalysisError(
            f"the similarity is of {found[0]} layers of {found[1]} heads and the model has"
            f" {wanted[0]} of {wanted[1]}; measure it on this model"
        )
