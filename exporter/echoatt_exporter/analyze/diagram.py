"""A sharing plan drawn: one sign a layer for a terminal, boxes and arcs for a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from echoatt_runtime.contract import SharingPlan

# What the report's page is wide inside, in pixels; a wider drawing would be made smaller
_WIDTH = 1056
_MARGIN = 10
# The pitch of the layers and the width of their boxes: as roomy as the layers allow. What does not
# fit at the closest is drawn in several rows.
_ROOMY, _CLOSE = 54, 33
_BOX_SHARE, _BOX_HEIGHT = 0.74, 32
# An arc rises by a step for each layer it spans, up to a height that leaves a row readable
_RISE, _RISE_A_LAYER, _HIGHEST = 20, 9, 150
_NOTE_HEIGHT = 26
# How far above its box the arrow begins that comes from an earlier row
_STUB = 22


def plan_signs(sources: Sequence[int]) -> str:
    """One sign a layer: a source as ●, a follower as its source's number."""
    signs = ("●" if layer == source else str(source) for layer, source in enumerate(sources))
    return " ".join(signs)


def plan_svg(plan: SharingPlan, caption: str) -> str:
    """An inline SVG element that shows who computes attention and who follows whom.

    It is as wide as the report's page at most: the more layers there are, the closer they stand,
    and then they take several rows. A follower of a layer in an earlier row has a short arrow from
    above in the place of an arc. Colours come from the page, by the classes `source`, `lone` (a
    source without followers), `follower`, `arc` and `note`.

    Args:
        plan: What is drawn.
        caption: The picture in words, for those who cannot see it.
    """
    layout = _Layout.of(plan)
    # the widest first, so that the short ones are drawn over them
    followers = sorted(plan.followers, key=lambda layer: plan.sources[layer] - layer)
    width, height = layout.size
    parts = [
        f'<svg class="plan" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
        f' height="{height:g}">',
        f"<title>{escape(caption)}</title>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path class="head" d="M0 0.5 L7.5 4 L0 7.5 Z"/></marker>'
        "</defs>",
        *(layout.arc(plan.sources[layer], layer) for layer in followers),
        *(layout.box(plan, layer) for layer in range(plan.num_layers)),
        "</svg>",
    ]
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the layers stand.

    Attributes:
        per_row: Layers in a row.
        pitch: Pixels from one layer to the next.
        tops: The upper edge of the boxes of each row.
    """

    per_row: int
    pitch: float
    tops: tuple[float, ...]

    @classmethod
    def of(cls, plan: SharingPlan) -> _Layout:
        room = _WIDTH - 2 * _MARGIN
        rows = math.ceil(plan.num_layers * _CLOSE / room)
        per_row = math.ceil(plan.num_layers / rows)
        tops, bottom = [], 0.0
        for row in range(rows):
            rises = [
                # a curve reaches three quarters of the way to its control points
                0.75 * _height(layer - plan.sources[layer])
                if plan.sources[layer] // per_row == row
                else _STUB
                for layer in plan.followers
                if layer // per_row == row
            ]
            tops.append(bottom + _MARGIN + max(rises, default=0))
            bottom = tops[-1] + _BOX_HEIGHT + _NOTE_HEIGHT
        return cls(per_row, min(_ROOMY, room / per_row), tuple(tops))

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the drawing."""
        return (
            2 * _MARGIN + self.pitch * (self.per_row - 1) + self.pitch * _BOX_SHARE,
            self.tops[-1] + _BOX_HEIGHT + _NOTE_HEIGHT,
        )

    def arc(self, source: int, follower: int) -> str:
        """The arrow to a follower."""
        start, end = self._middle(source) + self.pitch / 11, self._middle(follower)
        top = self._top(follower)
        if self._top(source) != top:
            path = f"M{end:g} {top - _STUB:g} L{end:g} {top - 2:g}"
        else:
            end -= self.pitch / 18
            peak = top - _height(follower - source)
            path = f"M{start:g} {top:g} C{start:g} {peak:g} {end:g} {peak:g} {end:g} {top - 2:g}"
        return f'<path class="arc" marker-end="url(#arrow)" d="{path}"/>'

    def box(self, plan: SharingPlan, layer: int) -> str:
        """A layer's box with its number, and below it whom it follows."""
        if plan.is_follower(layer):
            kind, note = "follower", f"\u2190 {plan.sources[layer]}"
        else:
            kind, note = "source" if layer in plan.shared_sources else "lone", ""
        width, middle, top = self.pitch * _BOX_SHARE, self._middle(layer), self._top(layer)
        return (
            f'<g class="{kind}"><rect x="{middle - width / 2:g}" y="{top:g}" width="{width:g}"'
            f' height="{_BOX_HEIGHT}" rx="6"/>'
            f'<text x="{middle:g}" y="{top + 21:g}">{layer}</text>'
            f'<text class="note" x="{middle:g}" y="{top + _BOX_HEIGHT + 16:g}">{note}</text></g>'
        )

    def _middle(self, layer: int) -> float:
        return _MARGIN + self.pitch * (layer % self.per_row) + self.pitch * _BOX_SHARE / 2

    def _top(self, layer: int) -> float:
        return self.tops[layer // self.per_row]


def _height(span: int) -> float:
    return min(_HIGHEST, _RISE + _RISE_A_LAYER * span) if span else 0
