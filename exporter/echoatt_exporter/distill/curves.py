"""The loss curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TITLES = {1: "stage 1: distillation", 2: "stage 2: cross-entropy on the text"}
_PARTS = {
    "loss": "loss",
    "blocks": "MSE of the block outputs",
    "kl": "KL",
    "labels": "CE to the teacher's argmax",
    "text": "CE",
}


def draw_curves(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the losses of both stages over the tokens seen.

    Args:
        lines: The log's lines.
        path: The PNG file.
    """
    stages = sorted({line["stage"] for line in lines})
    figure = Figure(figsize=(5.5 * max(1, len(stages)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, stage in enumerate(stages):
        axes = figure.add_subplot(1, len(stages), index + 1)
        own = [line for line in lines if line["stage"] == stage]
        tokens = [line["tokens"] / 1e6 for line in own]
        names = ["text"] if stage == 2 else ["loss", "blocks", "kl", "labels"]
        for name in names:
            axes.plot(
                tokens,
                [line[name] for line in own],
                label=_PARTS[name],
                linewidth=2 if name == "loss" else 1.2,
            )
        if stage == 1:
            axes.set_yscale("log")
        axes.set(
            xlabel="million tokens", ylabel="nats a token, or mean square", title=_TITLES[stage]
        )
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
