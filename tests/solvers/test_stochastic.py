"""Optimizer: torch.optim on the linear system."""

import pytest
import torch

from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    agree,
)
from systems import GRID

OPTIMIZERS = {
    "SGD with a schedule": lambda p: (o := torch.optim.SGD(p, lr=0.5), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
}


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_steps_in_the_users_own_units(build, size):
    """The result is that of the optimizer run by hand on ½xᵀAx − bᵀx, so b must not be scaled before."""
    system = GRID["spd 10"]
    a, b = torch.tensor(system.a), size * system.rhs()
    solution = S.Optimizer(max_steps=6, build=build, on_failure="ignore")(system.operator(), b)
    x = b.clone().requires_grad_()
    built = build([x])
    optimizer, scheduler = built if isinstance(built, tuple) else (built, None)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * x @ a @ x - b @ x
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    agree(solution.value, x.detach(), 1e-10)
    assert solution.steps == 6 and len(solution.trace) == 7
    agree(solution.trace[0], system.residuals(b.numpy() / size)[0] * size, 1e-12)


def test_lbfgs_solves_a_system():
    system = GRID["spd 10"]
    solution = S.Optimizer(
        max_steps=60, rtol=1e-8, build=lambda p: torch.optim.LBFGS(p, tolerance_grad=0, tolerance_change=0)
    )(system.operator(), system.rhs())
    assert solution.status is Status.CONVERGED
    agree(solution.value, system.solutions[0], 1e-7)
