"""Pictures of an analysis: how alike the layers attend, and what sharing costs.

Drawn on figures of their own, never through pyplot, so that a caller's plots are left alone. A
picture is a slide: 1920 by 1080 pixels, no letter below 8 points.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
)
from numpy.typing import NDArray

from echoatt_exporter.analyze.candidates import PlanCandidate, PlanSearch
from echoatt_exporter.analyze.similarity import LayerSimilarity

# 1920 by 1080 pixels
_INCHES, _DPI = (12.8, 7.2), 150
# Cells of more layers are too small for a readable number
_ANNOTATED_LAYERS = 16
_LABELLED_TICKS = 16
_TITLE_LETTERS = 52
# Perceptually uniform, and told apart by the colour-blind too
_COLORMAP = "viridis"


@dataclass(frozen=True, slots=True)
class _Colors:
    paper: str
    ink: str
    faint: str
    blank: str
    line: str
    mark: str


_LIGHT = _Colors(
    paper="#ffffff", ink="#1a1d21", faint="#646b74", blank="#e4e7eb", line="#1f5fbf", mark="#c2410c"
)
_DARK = _Colors(
    paper="#16191d", ink="#e8eaed", faint="#8f97a1", blank="#343a41", line="#7ab0ff", mark="#ff9a62"
)


def similarity_figure(similarity: LayerSimilarity, *, dark: bool = False) -> Figure:
    """Heat maps of the layers' similarity, raw and without the first token, on one colour scale.

    Args:
        similarity: What was measured.
        dark: Light letters on a dark ground.
    """
    colors = _DARK if dark else _LIGHT
    figure = _figure(colors)
    panels = (
        ("attention maps as they are", similarity.mean),
        ("first token dropped, rows renormalised", similarity.mean_without_first),
    )
    maps = [_without_diagonal(values) for _, values in panels]
    # out to the next twentieth: round numbers at the colour bar's ends
    limits = (
        math.floor(min(float(np.nanmin(values)) for values in maps) * 20) / 20,
        math.ceil(max(float(np.nanmax(values)) for values in maps) * 20) / 20,
    )
    axes = [figure.add_subplot(1, 2, column) for column in (1, 2)]
    images = [
        _heat_map(axis, values, limits, title, colors)
        for axis, values, (title, _) in zip(axes, maps, panels, strict=True)
    ]
    bar = figure.colorbar(images[-1], ax=axes, shrink=0.78, pad=0.02, aspect=28)
    bar.set_label("cosine similarity", color=colors.ink, fontsize=12, labelpad=8)
    bar.ax.tick_params(colors=colors.ink, labelsize=10)
    bar.outline.set_visible(False)
    _title(
        figure,
        f"How alike the layers of {similarity.model} attend",
        f"mean over {similarity.samples:,} samples of {similarity.length:,} tokens;"
        " a layer is 1 to itself",
        colors,
    )
    return figure


def trade_off_figure(search: PlanSearch, *, dark: bool = False) -> Figure:
    """The cost of sharing more: every measured plan, the Pareto front and the chosen plan.

    Args:
        search: The measured plans.
        dark: Light letters on a dark ground.
    """
    colors = _DARK if dark else _LIGHT
    figure = _figure(colors)
    axis = figure.add_subplot()
    _style(axis, colors)
    # the unshared plan costs nothing, which has no place on a logarithmic scale
    measured = [plan for plan in search.candidates if plan.cost.kl > 0]
    front = [plan for plan in search.front if plan.cost.kl > 0]
    axis.plot(
        *_points(measured), "o", color=colors.faint, alpha=0.45, ms=5, mew=0,
        label=f"measured plans ({len(measured)})",
    )  # fmt: skip
    axis.errorbar(
        *_points(front), yerr=[plan.cost.kl_standard_error for plan in front], color=colors.line,
        marker="o", ms=7, lw=2, capsize=3, label="Pareto front (± standard error)",
    )  # fmt: skip
    chosen = search.chosen
    if chosen.cost.kl > 0:
        axis.plot(
            *_points([chosen]), "o", ms=17, mfc="none", mec=colors.mark, mew=2.5,
            label=f"chosen: {len(chosen.plan.followers)} of {chosen.plan.num_layers} layers",
        )  # fmt: skip
    for plan in _labelled(front, chosen):
        axis.annotate(
            times(plan.cost.perplexity_ratio),
            (plan.plan.ratio, plan.cost.kl), xytext=(11, -13), textcoords="offset points",
            color=colors.ink, fontsize=11, fontweight="bold" if plan == chosen else "normal",
        )  # fmt: skip
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MultipleLocator(0.1))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    # room for the last number
    axis.set_xlim(0, 1.1 * max((plan.plan.ratio for plan in measured), default=1.0))
    axis.margins(y=0.1)
    axis.set_xlabel("followers, of all layers", color=colors.ink, fontsize=13)
    axis.set_ylabel("KL to the unshared model, nats a token", color=colors.ink, fontsize=13)
    axis.grid(which="major", color=colors.faint, alpha=0.3, lw=0.8)
    # nothing lies below the front
    axis.legend(loc="lower right", fontsize=12, frameon=False, labelcolor=colors.ink)
    _title(
        figure,
        "What sharing costs, before any training",
        "numbers on the front: perplexity, times the unshared model's",
        colors,
    )
    return figure


def times(ratio: float, decimals: int = 2) -> str:
    """How many times as large something is, for a reader: 1.06x, 1,240x, 3e+08x."""
    if ratio < 100:
        return f"{ratio:.{decimals}f}x"
    return f"{ratio:,.0f}x" if ratio < 1e6 else f"{ratio:.0e}x"


def image_bytes(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """A figure as a file's content: PNG of 1920 by 1080 pixels, or SVG with letters as outlines.

    The same figure gives the same bytes.
    """
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    settings = mpl.rc_context({"svg.hashsalt": "echoatt", "svg.fonttype": "path"})
    with settings, warnings.catch_warnings():
        # a model's name may be in letters that the font lacks: they are drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(
            out, format=kind, dpi=_DPI, facecolor=figure.get_facecolor(),
            metadata={"Date": None} if kind == "svg" else {"Software": None},
        )  # fmt: skip
    return out.getvalue()


def _figure(colors: _Colors) -> Figure:
    # the axes lie below the title and keep off the edges
    layout = ConstrainedLayoutEngine(rect=(0.015, 0.02, 0.97, 0.86))
    return Figure(figsize=_INCHES, dpi=_DPI, facecolor=colors.paper, layout=layout)


def _title(figure: Figure, title: str, subtitle: str, colors: _Colors) -> None:
    for height, line, color, size, weight in (
        (0.945, _clipped(title), colors.ink, 20, "bold"),
        (0.902, subtitle, colors.faint, 13, "normal"),
    ):
        figure.text(
            0.5, height, line, ha="center", va="center", color=color, fontsize=size,
            fontweight=weight, parse_math=False,
        ).set_in_layout(False)  # fmt: skip


def _clipped(line: str) -> str:
    """A title as it fits on the slide; names in it may be long, or broken."""
    line = " ".join(line.split())
    return line if len(line) <= _TITLE_LETTERS else f"{line[: _TITLE_LETTERS - 1]}…"


def _style(axis: Axes, colors: _Colors) -> None:
    axis.set_facecolor(colors.paper)
    axis.tick_params(which="both", colors=colors.ink, labelsize=11)
    for name, spine in axis.spines.items():
        spine.set_color(colors.faint)
        spine.set_visible(name in ("left", "bottom"))


def _without_diagonal(values_LL: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values between different layers; the ones of the diagonal would take up the colours."""
    return np.where(np.eye(len(values_LL), dtype=bool), np.nan, values_LL)


def _heat_map(
    axis: Axes,
    values_LL: NDArray[np.float64],
    limits: tuple[float, float],
    title: str,
    colors: _Colors,
) -> AxesImage:
    _style(axis, colors)
    axis.spines[:].set_visible(False)
    colormap = colormaps[_COLORMAP].with_extremes(bad=colors.blank)
    image = axis.imshow(values_LL, cmap=colormap, vmin=limits[0], vmax=limits[1])
    layers = len(values_LL)
    for dimension in (axis.xaxis, axis.yaxis):
        if layers <= _LABELLED_TICKS:
            dimension.set_ticks(range(layers))
        else:
            dimension.set_major_locator(MaxNLocator(_LABELLED_TICKS, integer=True))
    axis.set_title(title, color=colors.ink, fontsize=13, pad=9)
    axis.set_xlabel("layer", color=colors.ink, fontsize=12)
    axis.set_ylabel("layer", color=colors.ink, fontsize=12)
    if layers <= _ANNOTATED_LAYERS:
        size = 8 if layers > 12 else 9 if layers > 10 else 11
        rgba_LLC = image.to_rgba(values_LL)
        for (row, column), value in np.ndenumerate(values_LL):
            if row == column:
                continue
            red, green, blue, _ = rgba_LLC[row, column]
            bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axis.text(
                column, row, f"{value:.2f}".replace("0.", ".", 1), ha="center", va="center",
                fontsize=size, color="#000000" if bright else "#ffffff",
            )  # fmt: skip
    return image


def _points(plans: Sequence[PlanCandidate]) -> tuple[list[float], list[float]]:
    return [plan.plan.ratio for plan in plans], [plan.cost.kl for plan in plans]


def _labelled(front: Sequence[PlanCandidate], chosen: PlanCandidate) -> list[PlanCandidate]:
    """The plans of the front that get a number: so many that the numbers stay apart."""
    step = math.ceil(len(front) / _LABELLED_TICKS)
    return [plan for index, plan in enumerate(front) if plan == chosen or index % step == 0]
