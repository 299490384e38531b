"""GMRES and BiCGStab: where they stop, and how they break down."""

import numpy as np
import pytest
import torch

from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    answer,
)
from systems import GRID, System, with_spectrum


@pytest.mark.parametrize("system", ["nonsymmetric 10", "nonsymmetric 1e3", "contraction .8", "spd 1e3"])
def test_gmres_stops_at_the_first_step_within_the_tolerance(system):
    """That step is found by dense least squares over the Krylov space, without GMRES's rotations."""
    system = GRID[system]
    op, b = system.operator(), system.rhs()
    rtol, krylov, wanted = 1e-3, [b / b.norm()], 0
    stop = 0.9 * rtol * b.norm()
    while True:
        image = torch.stack([op(v) for v in krylov], -1)
        least = (image @ (torch.linalg.pinv(image) @ b) - b).norm()
        wanted += 1
        if least <= stop:
            break
        q, _ = torch.linalg.qr(torch.stack([*krylov, op(krylov[-1])], -1))
        krylov = list(q.unbind(-1))
    assert wanted > 3
    assert S.GMRES(restart=200, rtol=rtol)(op, b).steps == wanted


@pytest.mark.parametrize("system", ["nonsymmetric 1e8", "spd 1e6", "wide scale", "triangular, far from normal"])
def test_a_whole_cycle_of_gmres_is_backward_stable(system):
    """n steps leave a residual of rounding level, because the basis stays orthogonal for ill-conditioned A too."""
    given = GRID[system]
    x = S.GMRES(max_steps=given.n, restart=given.n)(given.operator(), given.rhs()).value.numpy()
    assert given.residuals(x) <= given.rounding(x)


@pytest.mark.parametrize("system", ["cyclic shift", "skew-symmetric"])
def test_bicgstab_keeps_the_iterate_before_a_breakdown(system):
    solution = answer("BiCGStab", system).solution
    assert solution.status is Status.BREAKDOWN and not solution.value.any()


@pytest.mark.parametrize("options", [{}, {"max_steps": 20}, {"rtol": 1e-9, "restart": 4}])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_gmres_on_a_singular_system_reaches_the_least_residual(n, symmetric, options):
    """A random A of rank n − 1 maps its Krylov space into itself, which then has the least residual of all x."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        if symmetric:
            a = with_spectrum(np.r_[rng.standard_normal(n - 1), 0.0], seed)
        else:
            a = rng.standard_normal((n, n - 1)) @ rng.standard_normal((n - 1, n))
        system = System("", a, rng.standard_normal(n))
        least = system.residuals(system.solutions)[0]
        solution = S.GMRES(on_failure="ignore", **options)(system.operator("none"), system.rhs())
        if "restart" not in options or n <= 4:
            assert system.residuals(solution.value.numpy())[0] <= least * (1 + 1e-6)
            assert solution.status is (Status.STAGNATED if "max_steps" not in options else Status.COMPLETED)
        found = S.Auto(on_failure="ignore")(system.operator("none"), system.rhs())
        assert found.status is Status.STAGNATED and found.method == "LSQR: GMRES ended with STAGNATED"
        assert system.residuals(found.value.numpy())[0] <= least * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bicgstab_on_skew_symmetric_systems_is_no_worse_than_zero(dtype):
    """r̂ᵀv is mostly rounding error; before a check of it, 159 of 200 had residuals of up to 2.5e17 ‖b‖."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        m = rng.standard_normal((12, 12))
        system = System("", m - m.T, rng.standard_normal(12))
        for options in ({}, {"max_steps": 30}):
            solution = S.BiCGStab(on_failure="ignore", **options)(system.operator(dtype=dtype), system.rhs(dtype))
            assert solution.status is Status.BREAKDOWN and solution.relative_residual <= 1
