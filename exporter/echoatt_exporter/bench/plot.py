"""A bench's results as a picture: time against context, a line an engine."""

from __future__ import annotations

import io
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from echoatt_exporter.bench.results import BenchResults, Phase
from echoatt_exporter.bench.statistics import Spread

# 1920 by 1080 pixels
_INCHES: Final = (12.8, 7.2)
_DPI: Final = 150
# Told apart by the colour-blind too (Okabe and Ito); bundles take the strong ones in turn
_BUNDLES: Final = ("#0072b2", "#009e73", "#56b4e9", "#004d40")
_PEERS: Final = ("#d55e00", "#cc79a7", "#e69f00", "#7f7f7f")


def results_png(results: BenchResults) -> bytes:
    """A PNG with a panel for each phase and batch that was measured."""
    figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    panels = [
        (phase, batch) for batch in results.options.batches for phase in results.options.phases
    ]
    columns = len(results.options.phases)
    axes = figure.subplots(len(panels) // columns, columns, squeeze=False).flat
    for axis, (phase, batch) in zip(axes, panels, strict=True):
        _panel(axis, results, phase, batch)
    machine, threads = results.machine, results.options.threads
    figure.suptitle(
        f"{machine.processor}, {threads} threads, {results.started[:10]}; medians and quartiles"
    )
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
    return out.getvalue()


def _panel(axis: Axes, results: BenchResults, phase: Phase, batch: int) -> None:
    colors = {True: iter(_BUNDLES * len(results.engines)), False: iter(_PEERS)}
    for engine in results.engines:
        found = [
            (point.context, Spread.of(measured.samples(phase)))
            for point in results.points
            for measured in point.measured
            if point.batch == batch and measured.engine == engine.name and measured.samples(phase)
        ]
        color = next(colors[engine.is_bundle], "#000000")
        contexts = [context for context, _ in found]
        milliseconds = [spread.median * 1e3 for _, spread in found]
        errors = [
            [(spread.median - spread.low) * 1e3 for _, spread in found],
            [(spread.high - spread.median) * 1e3 for _, spread in found],
        ]
        axis.errorbar(
            contexts, milliseconds, yerr=errors, label=engine.name, color=color, capsize=3,
            marker="o" if engine.is_bundle else "s", ls="-" if engine.is_bundle else "--", lw=2,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    axis.xaxis.set_major_formatter(plain)
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(plain)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xticks(sorted(results.options.contexts))
    axis.set_xlabel("context, tokens")
    axis.set_ylabel("ms a step" if phase == "decode" else "ms to the first token")
    axis.set_title(f"{phase}, batch {batch}")
    axis.grid(which="major", alpha=0.3)
    axis.legend(frameon=False)
