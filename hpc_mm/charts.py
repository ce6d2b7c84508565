"""Charts as SVG text that takes its colours from the page around it, so that it is readable in light and dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")

INK = "#010203"  # stands for the page's text colour until the SVG is text
BARS = 40  # of a histogram
COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444")  # on white and on near-black alike
STYLE: dict[Any, object] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """``values`` at optimizer ``steps``."""

    label: str
    steps: list[int]
    values: list[float]


def chart(title: str, unit: str, lines: list[Line]) -> str:
    """An HTML figure: values over steps. Its text alternative tells first and last value of each line."""

    def draw(axes: Axes) -> None:
        for number, line in enumerate(lines):
            marker = "o" if len(line.steps) == 1 else None
            axes.plot(line.steps, line.values, color=COLORS[number % len(COLORS)], label=line.label, marker=marker)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        if len(lines) > 1:
            axes.legend()

    told = "; ".join(
        f"{line.label} from {line.values[0]:.3g} to {line.values[-1]:.3g}" for line in lines if line.values
    )
    return drawn(title, f"{title}, {unit}: {told}", draw)


def histogram(title: str, unit: str, values: Sequence[float]) -> str:
    """An HTML figure: how many of the values lie where, those above the 99th percentile in the last bar."""
    most = float(np.percentile(values, 99, method="higher"))
    told = f"median {np.median(values):,.4g}, 99 % up to {most:,.4g}, largest {max(values):,.4g}"
    whole = all(float(value).is_integer() for value in values) and most - min(values) < BARS

    def draw(axes: Axes) -> None:
        bins = list(np.arange(min(values), most + 2) - 0.5) if whole else BARS
        axes.hist(np.minimum(values, most), bins=bins, color=COLORS[0], rwidth=0.9)
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"{unit}\n{told}")
        axes.set_ylabel("how many")

    return drawn(title, f"{title}, {unit}: {told}", draw)


def drawn(title: str, told: str, draw: Callable[[Axes], None]) -> str:
    """An HTML figure with what ``draw`` puts on its axes; ``told`` is its text alternative."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):  # ids differ between the charts of a page
        figure = Figure(figsize=(5.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.tick_params(length=0)
        if axes.dataLim.ymin >= 0:  # a correlation may be below
            axes.set_ylim(bottom=0)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(told)}"', 1)
    return f'<figure class="card chart"><figcaption>{escape(title)}</figcaption>{svg}</figure>'
