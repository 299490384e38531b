"""FixedPoint and Neumann: what they compute, and divergence."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    ROWS,
    agree,
)
from systems import GRID, System, side, with_singular_values


@pytest.mark.parametrize("options", [{"rtol": 1e-6}, {"max_steps": 10}, {"max_steps": 60}])
@pytest.mark.parametrize(("factor", "make"), [(3.0, lambda q: 4 * np.eye(20)), (1.5, lambda q: np.eye(20) - 1.5 * q)])
def test_the_message_of_divergence_gives_the_growth_rate(factor, make, options):
    q = with_singular_values(np.ones(20), 3)
    system = System("", make(q), side(20))
    with pytest.warns(hg.solvers.HypergradientWarning, match=f"DIVERGED after .* growing by a factor of {factor:g} a"):
        solution = S.FixedPoint(**options)(system.operator(), system.rhs())
    agree(solution.growth_rate, factor, 1e-9)


def test_one_step_gives_b_from_zero_and_one_iteration_from_x0():
    system = GRID["spd 10"]
    op, b, x0 = system.operator(), system.rhs(), system.start()
    solver = S.FixedPoint(max_steps=1, on_failure="ignore")
    assert torch.equal(solver(op, b).value, b)
    agree(solver(op, b, x0).value, x0 + b - op(x0), 1e-15)


@pytest.mark.parametrize("row", ["FixedPoint", "Neumann"])
def test_a_diverging_system_in_a_batch_is_named(row):
    n = 5
    a = np.stack([np.eye(n), -4 * np.eye(n), 0.9 * np.eye(n)])
    system = System("", a, np.stack([side(n, i) for i in range(3)]))
    for options in ({"max_steps": 40}, {"max_steps": 60, "rtol": 1e-6}):
        solution = ROWS[row].solver(**options, on_failure="ignore")(system.operator(), system.rhs())
        done = Status.CONVERGED if "rtol" in options else Status.COMPLETED
        assert solution.statuses == [done, Status.DIVERGED, done]


def test_neumann_is_not_valid_for_a_matrix_of_zeros():
    op = hg.operators.function(lambda v: 0 * v, symmetric=True)
    structure = hg.diagnostics.operator_structure(op, torch.ones(3, dtype=torch.float64))
    assert "does not converge" in S.Neumann().valid_for(structure)
