"""A picture of a structure, as a matplotlib Figure; no state of pyplot is touched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._structure import Structure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_spectrum(structure: Structure) -> Figure:
    """The Ritz values of A with their errors: in rising order where A is symmetric, else those of I − A in the plane.

    In the plane the circle is the unit circle, inside which a map contracts in the long run.

    Args:
        structure: from `structure`, `operator_structure` or a report.

    Returns: a matplotlib Figure.
    Raises: ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "torch-hypergrad[plots]"') from error
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes, s = figure.add_subplot(), structure
    seen = f"all {s.n} eigenvalues" if s.exact else f"{s.steps} Ritz values, n = {s.n}"
    at_least = "" if s.exact else "≥ "
    if s.symmetric:
        values = [float(x.real) for x in s.eigenvalues]
        signs = [(x > s.tolerance) - (x < -s.tolerance) for x in values]
        counts = ((1, "positive"), (0, "zero to rounding"), (-1, "negative"))
        label = ", ".join(f"{name}: {signs.count(sign)}" for sign, name in counts if sign in signs)
        axes.errorbar(range(1, len(values) + 1), values, yerr=s.eigenvalue_errors, fmt="o", ms=4, label=label)
        axes.set_yscale("symlog", linthresh=min((abs(x) for x in values if abs(x) > s.tolerance), default=1.0))
        axes.set_xlabel("in rising order")
    else:
        turn = [2 * math.pi * i / 200 for i in range(201)]
        axes.plot([math.cos(t) for t in turn], [math.sin(t) for t in turn], lw=1, label="unit circle")
        values = [1 - x for x in s.eigenvalues]
        label = f"ρ = {s.radius:.4g}, norm {at_least}{s.contraction:.4g}"
        axes.plot([x.real for x in values], [x.imag for x in values], "o", ms=4, label=label)
        axes.set_aspect("equal")
    title = f"{'A' if s.symmetric else 'I − A'}: {seen}, condition number {at_least}{s.condition:.3g}"
    axes.set_title(title, fontsize=10)
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.legend(frameon=False, fontsize=8)
    return figure
