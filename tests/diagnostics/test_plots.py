"""The pictures show the numbers that they are given."""

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from hypergrad.diagnostics import operator_structure, plot_spectrum
from systems import GRID


def lines(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}


def rendered(figure) -> str:
    """All text of a figure, after it was drawn once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    FigureCanvasAgg(figure).draw()
    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize(
    "name", ["spd 1e3", "symmetric indefinite", "singular symmetric consistent", "negative definite", "zero"]
)
@pytest.mark.parametrize("steps", [6, 50])
def test_real_spectrum(name, steps):
    s = GRID[name]
    found = operator_structure(s.operator(), s.rhs(), steps=steps)
    figure = plot_spectrum(found)
    (axes,) = figure.axes
    (container,) = axes.containers
    np.testing.assert_allclose(np.array(container.lines[0].get_ydata(), float), found.eigenvalues)
    signs = np.sign(np.where(np.abs(found.eigenvalues) <= found.tolerance, 0, found.eigenvalues))
    text = rendered(figure)
    for sign, label in ((1, "positive"), (0, "zero to rounding"), (-1, "negative")):
        assert (f"{label}: {(signs == sign).sum()}" in text) == bool((signs == sign).any())
    assert ("all 20 eigenvalues" in text) == (steps == 50) and "condition number" in text


@pytest.mark.parametrize("name", ["contraction .8", "triangular, far from normal", "cyclic shift"])
def test_complex_spectrum(name):
    s = GRID[name]
    found = operator_structure(s.operator(), s.rhs(), steps=20)
    figure = plot_spectrum(found)
    shown, text = lines(figure.axes[0]), rendered(figure)
    (values,) = [np.array(xy) for label, xy in shown.items() if label.startswith(f"ρ = {found.radius:.4g}")]
    np.testing.assert_allclose(values[0] + 1j * values[1], 1 - np.array(found.eigenvalues))
    np.testing.assert_allclose(np.hypot(*shown["unit circle"]), 1)
    assert "unit circle" in text and "I − A" in text


def test_pyplot_is_left_alone():
    before = "matplotlib.pyplot" in sys.modules
    figure = plot_spectrum(operator_structure(GRID["spd 10"].operator(), GRID["spd 10"].rhs()))
    assert ("matplotlib.pyplot" in sys.modules) == before
    assert to_rgb(figure.get_facecolor()) == (1, 1, 1)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = operator_structure(GRID["spd 10"].operator(), GRID["spd 10"].rhs())
    with pytest.raises(ImportError, match=r"torch-hypergrad\[plots\]"):
        plot_spectrum(found)
