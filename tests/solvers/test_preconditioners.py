"""The forms of preconditioners, and Nystrom as a solver."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from solver_rows import ROWS, agree
from systems import System, logspace, side, with_spectrum


def test_every_solution_names_its_method():
    op, b = hg.operators.matrix(torch.eye(3), positive_definite=True), torch.ones(3)
    for make in (S.CG, S.MINRES, S.GMRES, S.Dense, S.Nystrom):
        assert make(on_failure="ignore")(op, b).method == make.__name__

    def mine(op, b, x0):
        return b

    assert hg.solvers._solver.solve(mine, op, hg.Vector.of(b, "b"), None).method == "mine"


def test_bad_preconditioners_raise_an_error_that_names_them():
    op, b = hg.operators.matrix(torch.eye(3), symmetric=True), torch.ones(3)
    for make in (S.CG, S.MINRES):
        for bad, said in ((5, "got 5"), ("jacobi", "got 'jacobi'"), (S.Nystrom, "got <class"), (b, r"got tensor\(")):
            with pytest.raises(TypeError, match=f"preconditioner must be a LinearOperator.*{said}"):
                make(preconditioner=bad)(op, b)
        with pytest.raises(ValueError, match="Reused needs a solver with a tolerance"):
            make(max_steps=3, preconditioner=S.Reused(S.Nystrom()))(op, b)
    for bad in (None, 5, S.Nystrom, lambda r: r):
        with pytest.raises(TypeError, match=r"Reused needs a recipe .*, got "):
            S.Reused(bad)
    for seed in ("a", 1.5):
        with pytest.raises(ValueError, match=f"seed must be an integer, got {seed!r}"):
            S.Nystrom(seed=seed)


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
