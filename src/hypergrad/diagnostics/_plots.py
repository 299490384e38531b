"""Pictures: functions of numbers that return a matplotlib Figure, and touch no state of pyplot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._structure import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _figure(title: str) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "torch-hypergrad[plots]"') from error
    figure = Figure(figsize=(6.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)
    return figure, axes


def plot_convergence(curves: Mapping[str, Any]) -> Figure:
    """Norms or errors against steps, on a logarithmic scale: inner and adjoint residuals, the estimated error.

    Args:
        curves: label ↦ values, one a step: a list, or a tensor such as a Solution's `trace` (of [steps, B] the worst
            system). Values that are zero, NaN or infinite are left out.

    Returns: a matplotlib Figure.
    Raises: ImportError without matplotlib; ValueError for no curve.

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 2.0, 5.0])), symmetric=True)
        >>> solution = hg.solvers.CG(rtol=1e-5)(op, torch.ones(3))
        >>> figure = plot_convergence({"adjoint": solution.trace})
    """
    if not curves:
        raise ValueError("there is no curve to plot")
    figure, axes = _figure("")
    for label, values in curves.items():
        pairs = [(x, y) for x, y in enumerate(_numbers(values)) if 0 < y < math.inf]
        steps, sizes = ([pair[k] for pair in pairs] for k in (0, 1))
        axes.semilogy(steps, sizes, marker="o", markevery=max(1, len(steps) // 12), ms=4, lw=1.6, label=label)
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _numbers(values: Any) -> list[float]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.reshape(len(values), -1).nan_to_num(0.0).amax(1).tolist()
    return [float(x) for x in values]


def plot_spectrum(structure: Structure) -> Figure:
    """The Ritz values of A with their errors: in rising order where A is symmetric, else those of I − A in the plane.

    In the plane the circle is the unit circle, inside which a map contracts in the long run.

    Args:
        structure: from `structure`, `operator_structure` or a report.

    Returns: a matplotlib Figure.
    Raises: ImportError without matplotlib.
    """
    s = structure
    seen = f"all {s.n} eigenvalues" if s.exact else f"{s.steps} Ritz values, n = {s.n}"
    at_least = "" if s.exact else "≥ "
    figure, axes = _figure(f"{'A' if s.symmetric else 'I − A'}: {seen}, condition number {at_least}{s.condition:.3g}")
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
        label = f"ρ = {s.radius:.4g}, norm {at_least}{s.contraction:.4g}"
        axes.plot([x.real for x in values], [x.imag for x in values], "o", ms=4, label=label)
        axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize=8)
    return figure
