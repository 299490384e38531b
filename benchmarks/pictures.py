"""Pictures of results: one column of panels with few bars, legible on a phone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measure import Spread

BLUE, GREY, RED = "#3465a4", "#8c8c8c", "#c02020"
WIDTH = 5.2  # inches: on a phone (390 pixels wide) text of 9 points keeps about its size


@dataclass(frozen=True)
class Bar:
    """One method: its value, with quartiles if it is a Spread. If it is None, `text` gives the reason.

    `own`: the method is one of hypergrad's. `target`: the place of a red tick.
    """

    name: str
    value: float | Spread | None
    text: str = ""
    own: bool = True
    target: float | None = None


@dataclass(frozen=True)
class Panel:
    """The bars of one problem; a vertical line at `line` marks the value that they are compared with."""

    title: str
    bars: Sequence[Bar]
    label: str = ""
    log: bool = False
    line: float | None = None


@contextmanager
def column(path: Path, title: str, heights: Sequence[float], width: float = WIDTH) -> Iterator[list[Any]]:
    """Axes below each other with these heights in inches; the figure is saved when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (width, sum(heights) + 0.5)
    figure, axes = plt.subplots(
        len(heights), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    yield list(axes[:, 0])
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def draw(path: Path, title: str, panels: Sequence[Panel]) -> None:
    with column(path, title, [0.42 * len(panel.bars) + 0.7 for panel in panels]) as axes:
        for axis, panel in zip(axes, panels, strict=True):
            _bars(axis, panel)


def _bars(axis: Any, panel: Panel) -> None:
    left = axis.get_yaxis_transform()
    spreads = [
        b.value if isinstance(b.value, Spread) or b.value is None else Spread(*[b.value] * 3) for b in panel.bars
    ]
    known = [spread for spread in spreads if spread is not None]
    for place, (bar, spread) in enumerate(zip(panel.bars, spreads, strict=True)):
        axis.text(0.01, place - 0.36, bar.name, transform=left, va="center", fontsize=9)
        if spread is None:
            axis.text(0.01, place + 0.05, bar.text, transform=left, va="center", fontsize=9, color=RED)
            continue
        ends = [[max(spread.middle - spread.low, 0)], [max(spread.high - spread.middle, 0)]]
        colour = BLUE if bar.own else GREY
        axis.barh(place + 0.05, spread.middle, 0.42, color=colour, xerr=ends, ecolor="0.2")
        text, end = bar.text or f"{spread.middle:.2f}", spread.high
        if bar.target is not None and 0.9 * end < bar.target < 3 * end:
            end = bar.target
        axis.text(max(end, spread.high), place + 0.05, f"  {text}", va="center", fontsize=9)
        if bar.target is not None:
            axis.plot([bar.target] * 2, [place - 0.2, place + 0.3], color=RED, linewidth=2.5)
    if panel.line is not None:
        axis.axvline(panel.line, color="0.3", linewidth=0.8, zorder=0)
    low, high = min((s.low for s in known), default=0.5), max((s.high for s in known), default=1.0)
    limits = (low / 1.6, high * max(high / low, 4.0) ** 0.6) if panel.log else (0, 1.6 * high)
    axis.set(ylim=(len(panel.bars) - 0.6, -0.7), yticks=[], xlim=limits, xscale="log" if panel.log else "linear")
    if panel.log:
        ticks = [step * 10.0**power for power in range(-6, 7) for step in (1, 2, 5)]
        ticks = [tick for tick in ticks if limits[0] < tick < limits[1]]
        ticks = ticks if len(ticks) < 8 else ticks[:: len(ticks) // 5]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
    axis.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axis.set_xlabel(panel.label, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
