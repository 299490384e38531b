"""Nystrom as a solver."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from solver_rows import (
    ROWS,
    agree,
)
from systems import System, logspace, side, with_spectrum


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("Nystrom")])
def test_nystrom_of_full_rank_is_the_damped_inverse(row):
    n = 10
    system = System("", with_spectrum(logspace(1e3, n), 3), side(n)).damped(0.3)
    solution = ROWS[row].solver(damping=0.3)(System("", system.a - 0.3 * np.eye(n), system.b).operator(), system.rhs())
    agree(solution.value, system.solutions[0], 1e-11)


def test_nystrom_of_an_exactly_low_rank_operator_is_the_damped_inverse():
    n = 30
    a = with_spectrum(np.r_[np.linspace(1, 5, 8), np.zeros(n - 8)], 3)
    system = System("", a, side(n)).damped(0.1)
    solution = S.Nystrom(rank=10, damping=0.1)(hg.operators.matrix(torch.tensor(a), symmetric=True), system.rhs())
    agree(solution.value, system.solutions[0], 1e-11)
    assert solution.relative_residual < 1e-11
