"""A sharing plan drawn: one sign a layer for a terminal, boxes and arcs for a page."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from echoatt_runtime.contract import SharingPlan

_BOX_WIDTH, _BOX_HEIGHT, _PITCH = 40, 32, 54
_MARGIN = 10
# An arc rises by a step for each layer it spans, up to a height that leaves a row readable
_RISE, _RISE_A_LAYER, _HIGHEST = 20, 9, 150
_NOTE_HEIGHT = 26


def plan_signs(sources: Sequence[int]) -> str:
    """One sign a layer: a source as ●, a follower as its source's number."""
    signs = ("●" if layer == source else str(source) for layer, source in enumerate(sources))
    return " ".join(signs)


def plan_svg(plan: SharingPlan, caption: str) -> str:
    """An inline SVG element that shows who computes attention and who follows whom.

    Colours come from the page, by the classes `source`, `lone` (a source without followers),
    `follower`, `arc` and `note`.

    Args:
        plan: What is drawn.
        caption: The picture in words, for those who cannot see it.
    """
    spans = [layer - plan.sources[layer] for layer in plan.followers]
    # a curve reaches three quarters of the way to its control points
    top = _MARGIN + 0.75 * _height(max(spans, default=0))
    width = 2 * _MARGIN + _PITCH * (plan.num_layers - 1) + _BOX_WIDTH
    height = top + _BOX_HEIGHT + _NOTE_HEIGHT
    # the widest first, so that the short ones are drawn over them
    followers = sorted(plan.followers, key=lambda layer: plan.sources[layer] - layer)
    parts = [
        f'<svg class="plan" role="img" viewBox="0 0 {width} {height:g}" width="{width}"'
        f' height="{height:g}">',
        f"<title>{escape(caption)}</title>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path class="head" d="M0 0.5 L7.5 4 L0 7.5 Z"/></marker>'
        "</defs>",
        *(_arc(plan.sources[layer], layer, top) for layer in followers),
        *(_box(plan, layer, top) for layer in range(plan.num_layers)),
        "</svg>",
    ]
    return "\n".join(parts)


def _height(span: int) -> float:
    return min(_HIGHEST, _RISE + _RISE_A_LAYER * span) if span else 0


def _middle(layer: int) -> float:
    return _MARGIN + _PITCH * layer + _BOX_WIDTH / 2


def _arc(source: int, follower: int, top: float) -> str:
    start, end = _middle(source) + 5, _middle(follower) - 3
    peak = top - _height(follower - source)
    return (
        f'<path class="arc" marker-end="url(#arrow)" d="M{start:g} {top:g}'
        f' C{start:g} {peak:g} {end:g} {peak:g} {end:g} {top - 2:g}"/>'
    )


def _box(plan: SharingPlan, layer: int, top: float) -> str:
    if plan.is_follower(layer):
        kind, note = "follower", f"\u2190 {plan.sources[layer]}"
    else:
        kind, note = "source" if layer in plan.shared_sources else "lone", ""
    left, middle = _middle(layer) - _BOX_WIDTH / 2, _middle(layer)
    return (
        f'<g class="{kind}"><rect x="{left:g}" y="{top:g}" width="{_BOX_WIDTH}"'
        f' height="{_BOX_HEIGHT}" rx="6"/>'
        f'<text x="{middle:g}" y="{top + 21:g}">{layer}</text>'
        f'<text class="note" x="{middle:g}" y="{top + _BOX_HEIGHT + 16:g}">{note}</text></g>'
    )
