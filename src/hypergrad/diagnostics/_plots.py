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

WIDTH, LINE = 8.27, 0.165  # of a page, and the height of a line of its text, in inches
TEXT: dict[str, Any] = {"fontsize": 8.2, "va": "top", "linespacing": 1.35}


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "torch-hypergrad[plots]"') from error
    return Figure(figsize=size, layout="constrained")


def _finish(axes: Axes, heading: str = "", legend: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(heading, fontsize=10)
    if legend:
        axes.legend(frameon=False, fontsize=8)


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
    for label, given in curves.items():
        pairs = [(x, y) for x, y in _points(label, given) if 0 < y < math.inf]
        xs, ys = ([pair[k] for pair in pairs] for k in (0, 1))
        axes.semilogy(xs, ys, marker="o", markevery=max(1, len(xs) // 12), ms=4, lw=1.6, label=label)
    if tolerance:
        axes.axhline(tolerance, color="grey", lw=1, ls="--", label=f"tolerance {tolerance:.0e}")
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
    at_least = "" if s.exact else "≥ "
    if s.symmetric:
        values = [float(x.real) for x in s.eigenvalues]
        signs = [(x > s.tolerance) - (x < -s.tolerance) for x in values]
        counts = ((1, "positive"), (0, "zero to rounding"), (-1, "negative"))
        label = ", ".join(f"{name}: {signs.count(sign)}" for sign, name in counts if sign in signs)
        axes.errorbar(range(1, len(values) + 1), values, yerr=s.eigenvalue_errors, fmt="o", ms=4, label=label)
        least = min((abs(x) for x in values if abs(x) > s.tolerance), default=1.0)
        axes.set_yscale("symlog", linthresh=least)
        axes.set_xlabel("in rising order")
    else:
        turn = [2 * math.pi * i / 200 for i in range(201)]
        axes.plot([math.cos(t) for t in turn], [math.sin(t) for t in turn], lw=1, label="unit circle")
        values = [1 - x for x in s.eigenvalues]
        label = f"ρ = {s.radius:.4g}, norm {at_least}{s.contraction[0]:.4g}"
        axes.plot([x.real for x in values], [x.imag for x in values], "o", ms=4, label=label)
        axes.set_aspect("equal")
    _finish(axes, f"{'A' if s.symmetric else 'I − A'}: {seen}, condition number {at_least}{s.condition:.3g}")


def _norms(axes: Axes, report: Report) -> None:
    """Where the error comes from, beside the hypergradient itself."""
    e = report.estimate
    norms = {
        "by the adjoint residual": e.from_adjoint,
        "by the inner residual": e.from_inner,
        "estimated error": e.error,
        "given hypergradient": e.hypergradient_norm,
        "corrected hypergradient": e.corrected_norm,
    }
    sizes = [size if math.isfinite(size) else 0.0 for size in norms.values()]
    least = 1e-17 * max([*sizes, 1e-300])
    bars = axes.barh(list(norms), [max(size, least) for size in sizes], height=0.4)
    axes.bar_label(bars, [f" {size:.2g}" for size in norms.values()], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(least, 1e4 * max([*sizes, least]))
    _finish(axes, "norms", legend=False)


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
    heights = [0.5 + LINE * (table.count("\n") + 1), 2.6 * len(panels), 0.2 + LINE * (words.count("\n") + 1)]
    figure = _figure((WIDTH, sum(heights)))
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    parts[0].text(0.02, 1 - 0.15 / heights[0], title, fontsize=14, fontweight="bold", va="top")
    parts[0].text(0.02, 1 - 0.5 / heights[0], table, family="monospace", **TEXT)
    for draw, axes in zip(panels, parts[1].subplots(len(panels), squeeze=False)[:, 0], strict=True):
        draw(axes)
    parts[2].text(0.02, 1 - 0.05 / heights[2], words, **TEXT)
    return figure
