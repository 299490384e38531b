"""Pictures of a report: functions of numbers that return a matplotlib Figure, and touch no state of pyplot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._report import Report
from ._structure import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#3b6fb6", "#d9822b", "#3d8f5f", "#b5403c", "#777777"
WIDTH, LINE = 8.27, 0.165  # of a page, and the height of a line of its text, in inches
TEXT: dict[str, Any] = {"fontsize": 8.2, "va": "top", "linespacing": 1.35}
MARKERS = 12  # on a curve


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "torch-hypergrad[plots]"') from error
    return Figure(figsize=size, layout="constrained")


def _finish(axes: Axes, heading: str = "", **legend: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(heading, fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, **legend)


def plot_convergence(curves: Mapping[str, Any], *, tolerance: float | None = None, xlabel: str = "step") -> Figure:
    """Norms or errors against steps, on a logarithmic scale: inner and adjoint residuals, the estimated error.

    Args:
        curves: label ↦ values, one a step (a list, or a tensor: a Solution's `trace`; of [steps, B] the worst system),
            or label ↦ (steps, values). Values that are zero, NaN or infinite are left out.
        tolerance: a horizontal line.
        xlabel: what the steps are.

    Returns: a matplotlib Figure.
    Raises: ImportError without matplotlib; ValueError for no curve, or steps and values of different lengths.

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 2.0, 5.0])), symmetric=True)
        >>> solution = hg.solvers.CG(rtol=1e-5)(op, torch.ones(3))
        >>> figure = plot_convergence({"adjoint": solution.trace})
    """
    figure = _figure((6.4, 4.0))
    _convergence(figure.add_subplot(), curves, tolerance, xlabel)
    return figure


def _convergence(axes: Axes, curves: Mapping[str, Any], tolerance: float | None, xlabel: str) -> None:
    if not curves:
        raise ValueError("no curve to plot")
    colours = (BLUE, ORANGE, GREEN, RED, GREY)
    for i, (label, given) in enumerate(curves.items()):
        pairs = [(x, y) for x, y in _points(label, given) if 0 < y < math.inf]
        xs, ys = ([pair[k] for pair in pairs] for k in (0, 1))
        every = max(1, len(xs) // MARKERS)
        axes.semilogy(xs, ys, color=colours[i % 5], marker="os^Dv"[i % 5], markevery=every, ms=4, lw=1.6, label=label)
    if tolerance:
        axes.axhline(tolerance, color=GREY, lw=1, ls="--", label=f"tolerance {tolerance:.0e}")
    axes.set_xlabel(xlabel)
    _finish(axes)


def _points(label: str, given: Any) -> Iterable[tuple[float, float]]:
    pair = isinstance(given, tuple) and len(given) == 2 and hasattr(given[0], "__len__")
    values = _numbers(given[1] if pair else given)
    steps = _numbers(given[0]) if pair else range(len(values))
    if len(steps) != len(values):
        raise ValueError(f"{label}: {len(steps)} steps, but {len(values)} values")
    return zip(steps, values, strict=True)


def _numbers(values: Any) -> list[float]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.reshape(len(values), -1).nan_to_num(0.0).amax(1).tolist()
    return [float(x) for x in values]


def plot_spectrum(structure: Structure) -> Figure:
    """The Ritz values of A with their errors: in rising order where A is symmetric, else those of I − A in the plane.

    In the plane the circle is the unit circle, inside which a map contracts in the long run.

    Args:
        structure: from `structure` or `operator_structure`.

    Returns: a matplotlib Figure.
    Raises: ImportError without matplotlib.
    """
    figure = _figure((5.4, 4.6))
    _spectrum(figure.add_subplot(), structure)
    return figure


def _spectrum(axes: Axes, s: Structure) -> None:
    seen = f"all {s.n} eigenvalues" if s.exact else f"{s.steps} Ritz values, n = {s.n}"
    about = f"condition number {'' if s.exact else '≥ '}{s.condition:.3g}"
    if s.symmetric:
        values = [float(x.real) for x in s.eigenvalues]
        signs = [(x > s.tolerance) - (x < -s.tolerance) for x in values]
        counts = ((1, "positive"), (0, "zero to rounding"), (-1, "negative"))
        label = ", ".join(f"{name}: {signs.count(sign)}" for sign, name in counts if sign in signs)
        steps, style = list(range(1, len(values) + 1)), {"fmt": "o", "ms": 4, "elinewidth": 1, "color": BLUE}
        axes.errorbar(steps, values, yerr=s.eigenvalue_errors, label=label, **style)
        least = min((abs(x) for x in values if abs(x) > s.tolerance), default=1.0)
        scale = {"value": "log", "nonpositive": "clip"} if min(signs) > 0 else {"value": "symlog", "linthresh": least}
        axes.set_yscale(**scale)
        axes.set_xlabel("in rising order")
    else:
        turn = [2 * math.pi * i / 200 for i in range(201)]
        axes.plot([math.cos(t) for t in turn], [math.sin(t) for t in turn], color=BLUE, lw=1, label="unit circle")
        values = [1 - x for x in s.eigenvalues]
        label = f"ρ = {s.radius:.4g}, norm {'' if s.exact else '≥ '}{s.contraction[0]:.4g}"
        axes.plot([x.real for x in values], [x.imag for x in values], "o", ms=4, color=ORANGE, label=label)
        axes.set_aspect("equal")
    _finish(axes, f"{'A' if s.symmetric else 'I − A'}: {seen}", title=about, title_fontsize=8)


def _norms(axes: Axes, report: Report) -> None:
    """Where the error comes from, beside the hypergradient itself."""
    e = report.estimate
    bars = [("by the adjoint residual", e.from_adjoint, GREEN), ("by the inner residual", e.from_inner, ORANGE)]
    bars += [("estimated error", e.error, RED), ("given hypergradient", e.hypergradient_norm, GREY)]
    bars += [("corrected hypergradient", e.corrected_norm, BLUE)]
    sizes = [size if math.isfinite(size) else 0.0 for _, size, _ in bars]
    floor = 1e-17 * max([*sizes, 1e-300])
    for i, ((_, true, colour), size) in enumerate(zip(bars, sizes, strict=True)):
        axes.plot([floor / 3, max(size, floor)], [i, i], color=colour, lw=1.5, alpha=0.5)
        axes.plot([max(size, floor)], [i], "o", ms=8, color=colour)
        at = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(f"{true:.2g}", (max(size, floor), i), **at)
    axes.set_xscale("log")
    axes.locator_params(axis="x", numticks=4)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    axes.set_xlim(floor / 3, 300 * max([*sizes, floor]))
    _finish(axes, "norms")


def plot_report(
    report: Report, *, curves: Mapping[str, Any] | None = None, title: str = "Hypergradient report"
) -> Figure:
    """One page: the table, where the error comes from, spectrum, convergence, and the advice.

    Panels for which the report has nothing are left out.

    Args:
        report: from `check`.
        curves: see `plot_convergence`.
        title: at the top.

    Returns: a matplotlib Figure of the width of A4, as high as it needs to be.
    Raises: ImportError without matplotlib.
    """
    structure = report.structure
    panels: list[Any] = [lambda axes: _norms(axes, report)]
    if structure is not None:
        panels.append(lambda axes: _spectrum(axes, structure))
    if curves:
        panels.append(lambda axes: _convergence(axes, curves, None, "step"))
    table = str(report).removesuffix("\n".join(f"- {line}" for line in report.advice)).rstrip()
    words = "\n".join(textwrap.fill(f"• {line}", 128, subsequent_indent="   ") for line in report.advice)
    rows = math.ceil(len(panels) / 2)
    heights = [0.5 + LINE * (table.count("\n") + 1), 2.9 * rows, 0.2 + LINE * (words.count("\n") + 1)]
    figure = _figure((WIDTH, sum(heights)))
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    top, middle, bottom = parts
    top.text(0.02, 1 - 0.15 / heights[0], title, fontsize=14, fontweight="bold", va="top")
    top.text(0.02, 1 - 0.5 / heights[0], table, family="monospace", **TEXT)
    grid = middle.add_gridspec(rows, 2)
    for i, draw in enumerate(panels):
        alone = len(panels) % 2 and i == len(panels) - 1
        draw(middle.add_subplot(grid[i // 2, :] if alone else grid[i // 2, i % 2]))
    bottom.text(0.02, 1 - 0.05 / heights[2], words, **TEXT)
    return figure
