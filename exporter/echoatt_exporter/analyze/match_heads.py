"""Lining a follower's heads up with its source's.

A follower's head h reads head h of its source's probabilities, though it may resemble another head
more. Which of its heads stand where is free: reordering them changes nothing in the teacher, and
costs nothing once it is folded into the projections.

Shapes in names: F follower heads, S source heads (both H in number); N key/value groups of G heads.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from echoatt_exporter.analyze.similarity import HeadSimilarity
from echoatt_exporter.architecture import DecoderArchitecture
from echoatt_runtime.contract import SharingPlan


def match_heads(head_pairs_FS: NDArray[np.float32], num_kv_heads: int) -> tuple[int, ...]:
    """The order of a follower's heads that is most like its source's.

    The sum of the similarities is the largest that any order reaches that keeps key/value groups
    whole: heads are assigned inside every pair of groups, and groups by what that gives.

    Args:
        head_pairs_FS: [H, H] similarity of the follower's heads (rows) to the source's (columns).
        num_kv_heads: N, how many groups of equal size the heads form.

    Returns:
        For each of the source's heads, the follower's head to put in its place: the form of
        `SharingPlan.head_orders`.
    """
    N, G = num_kv_heads, len(head_pairs_FS) // num_kv_heads
    blocks_NNGG = head_pairs_FS.reshape(N, G, N, G).transpose(0, 2, 1, 3)
    inner = [[_best_rows(block) for block in row] for row in blocks_NNGG]
    columns = np.arange(G)
    totals_NN = np.array(
        [
            [block[rows, columns].sum() for block, rows in zip(*pair, strict=True)]
            for pair in zip(blocks_NNGG, inner, strict=True)
        ]
    )
    groups = _best_rows(totals_NN)
    return tuple(
        int(group * G + head) for n, group in enumerate(groups) for head in inner[group][n]
    )


def _best_rows(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """For each column of a square matrix the row assigned to it, for the largest total."""
    _, rows = linear_sum_assignment(scores.T, maximize=True)
    return np.asarray(rows, dtype=np.int64)


def align_plan(
    plan: SharingPlan, head_similarity: HeadSimilarity, architecture: DecoderArchitecture
) -> SharingPlan:
    """The same plan with every follower's heads lined up with its source's.

    A layer whose heads stand best as they are has an empty order.

    Args:
        plan: Its sources are kept, its head orders replaced.
        head_similarity: Measured on the teacher.
        architecture: Of the teacher.

    Raises:
        PlanError: The plan does not fit the model.
    """
    architecture.validate_plan(plan)
    orders: list[tuple[int, ...]] = []
    for layer, source in enumerate(plan.sources):
        pairs_FS = head_similarity.head_pairs[layer, :, source, :]
        order = match_heads(pairs_FS, architecture.kv_heads[layer]) if source != layer else ()
        orders.append(() if order == tuple(range(len(order))) else order)
    aligned = replace(plan, head_orders=tuple(orders) if any(orders) else ())
    architecture.validate_plan(aligned)
    return aligned
