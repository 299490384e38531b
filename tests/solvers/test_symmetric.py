"""CG and MINRES: preconditioners, negative curvature, singular systems."""

from typing import Any

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    agree,
    krylov,
)
from systems import GRID, System, logspace, norm, side, with_spectrum

WIDE = System("", with_spectrum(logspace(1e2, 30), 12) * np.outer(*2 * [np.logspace(0, 3, 30)]), side(30))


DIAGONAL = torch.tensor(1 / np.diag(WIDE.a))


PRECONDITIONERS = {
    "operator": hg.operators.matrix(torch.diag(DIAGONAL), positive_definite=True),
    "function": lambda r: DIAGONAL * r,
}


def preconditioned_space(a: np.ndarray, r: np.ndarray, steps: int) -> np.ndarray:
    m = DIAGONAL.numpy()
    return krylov(m[:, None] * a, m * r, steps)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS.values(), ids=PRECONDITIONERS)
def test_value_of_k_preconditioned_steps(preconditioner, steps):
    """CG has the least error in the norm of A over K(M⁻¹A, M⁻¹b), MINRES the least residual in that of M⁻¹."""
    a, b, v = WIDE.a, WIDE.b, preconditioned_space(WIDE.a, WIDE.b, steps)
    options = {"max_steps": steps, "preconditioner": preconditioner, "on_failure": "ignore"}
    cg = S.CG(**options)(WIDE.operator(), WIDE.rhs())
    agree(cg.value, v @ np.linalg.solve(v.T @ a @ v, v.T @ b), 1e-9)
    minres = S.MINRES(**options)(WIDE.operator(), WIDE.rhs())
    root = np.sqrt(DIAGONAL.numpy())
    agree(minres.value, v @ np.linalg.lstsq(root[:, None] * (a @ v), root * b, rcond=None)[0], 1e-9)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
@pytest.mark.parametrize(
    "preconditioner", [*PRECONDITIONERS.values(), S.Nystrom(rank=10)], ids=[*PRECONDITIONERS, "Nystrom"]
)
def test_preconditioned_trace_is_the_true_residual(make, preconditioner):
    for k in range(8):
        options = {"preconditioner": preconditioner, "on_failure": "ignore"}
        solution = make(max_steps=k, **options)(WIDE.operator(), WIDE.rhs())
        traced = make(max_steps=8, **options)(WIDE.operator(), WIDE.rhs()).trace[k]
        agree(traced, WIDE.residuals(solution.value.numpy())[0], 1e-8)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
def test_a_preconditioner_saves_steps_and_keeps_the_answer(make):
    plain = make(rtol=1e-8)(WIDE.operator(), WIDE.rhs())
    for preconditioner in PRECONDITIONERS.values():
        solution = make(rtol=1e-8, preconditioner=preconditioner)(WIDE.operator(), WIDE.rhs())
        assert solution.status is Status.CONVERGED and solution.steps < plain.steps / 2
        assert WIDE.residuals(solution.value.numpy()) <= 1e-8 * norm(WIDE.b) + WIDE.rounding(solution.value.numpy())
    exact = torch.tensor(np.linalg.inv(WIDE.a))
    once = make(rtol=1e-8, preconditioner=lambda r: exact @ r)(WIDE.operator(), WIDE.rhs())
    assert once.status is Status.CONVERGED and once.steps <= 2


def test_a_preconditioner_may_take_pytrees_and_batches():
    system, trees = GRID["batch spd"], (lambda r: {"x": 2 * r["x"]})
    op = hg.operators.function(
        lambda v: {"x": (torch.tensor(system.a) @ v["x"][..., None])[..., 0]}, symmetric=True, batch_dims=1
    )
    solution = S.CG(rtol=1e-10, preconditioner=trees)(op, {"x": system.rhs()})
    plain = S.CG(rtol=1e-10)(op, {"x": system.rhs()})
    agree(solution.value["x"], plain.value["x"], 1e-10)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
def test_nystrom_preconditioner_beats_plain_by_orders_of_magnitude(make):
    """Eigenvalues 10^(−j/3), damping 10⁻³: five steps with a sketch of rank 10 against five plain ones."""
    n, gamma = 200, 1e-3
    system = System("", with_spectrum(10.0 ** (-np.arange(n) / 3), 13), side(n))
    truth = system.damped(gamma).solutions[0]

    def error(preconditioner: Any) -> float:
        op = system.operator()
        solver = make(max_steps=5, damping=gamma, preconditioner=preconditioner, on_failure="ignore")
        value = solver(op, system.rhs()).value.numpy()
        assert op.products == 6 + 10 * (preconditioner is not None)
        return norm(value - truth) / norm(truth)

    assert error(S.Nystrom(rank=10, damping=gamma)) < error(None) / 300
    # Here damping is part of A, so that the sketch sees it too.
    op = system.damped(gamma).operator()
    inside = make(max_steps=5, preconditioner=S.Nystrom(rank=10, damping=gamma))(op, system.rhs()).value.numpy()
    assert norm(inside - truth) / norm(truth) < error(None) / 3


def test_refinement_reaches_the_tolerance_where_the_recursion_alone_does_not():
    """MINRES's own residual is too hopeful at condition 10⁶; the rest of a batch is left as it was."""
    hard, easy = GRID["spd 1e6"], GRID["spd 10"]
    failing = GRID["symmetric indefinite"]
    together = System("", np.stack([hard.a, easy.a, failing.a]), np.stack([hard.b, easy.b, failing.b]))
    for make, last in ((S.MINRES, Status.CONVERGED), (S.CG, Status.NOT_POSITIVE_DEFINITE)):
        solution = make(rtol=1e-10, max_steps=300, on_failure="ignore")(together.operator(), together.rhs())
        assert solution.statuses == [Status.CONVERGED, Status.CONVERGED, last]
        alone = make(rtol=1e-10, max_steps=300, on_failure="ignore")(failing.operator(), failing.rhs())
        agree(solution.value[2], alone.value, 1e-9)
    once = S.MINRES(max_steps=73)(hard.operator(), hard.rhs())
    assert once.residual_norm > 1e-9 * once.rhs_norm  # so the refinement was needed
