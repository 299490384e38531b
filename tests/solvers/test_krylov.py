"""GMRES and BiCGStab: where they stop, and how they break down."""

import pytest
import torch

from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    answer,
)
from systems import GRID


@pytest.mark.parametrize("system", ["nonsymmetric 10", "nonsymmetric 1e3", "contraction .8", "spd 1e3"])
def test_gmres_stops_at_the_first_step_that_is_good_enough(system):
    """What it tracks by rotations is the least residual, by dense least squares over the Krylov space."""
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
    """n steps leave what rounding does: the basis stays orthogonal where A is badly conditioned."""
    given = GRID[system]
    x = S.GMRES(max_steps=given.n, restart=given.n)(given.operator(), given.rhs()).value.numpy()
    assert given.residuals(x) <= given.rounding(x)


@pytest.mark.parametrize("system", ["cyclic shift", "skew-symmetric"])
def test_bicgstab_keeps_the_iterate_before_a_breakdown(system):
    solution = answer("BiCGStab", system).solution
    assert solution.status is Status.BREAKDOWN and not solution.value.any()
