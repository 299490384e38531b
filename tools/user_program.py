"""A user's program for type checkers: they have to infer the types of results and to reject wrong arguments."""

import torch
from torch import Tensor

import hypergrad as hg


def inner_loss(w: Tensor, lam: Tensor) -> Tensor:
    return ((w - lam) ** 2).sum()


def outer_loss(w: Tensor, lam: Tensor) -> Tensor:
    return (w**2).sum()


lam = torch.ones(3, requires_grad=True)
result: hg.Hypergradient = hg.implicit.grad(
    outer_loss, inner_loss=inner_loss, params=torch.ones(3), hparams=lam, solver=hg.solvers.CG(rtol=1e-6)
)
value: Tensor = result.outer_value
status: hg.Status = result.solution.status
print(status.name, float(value), result.solution.ok)
report = hg.diagnostics.check(result)
error: float = report.estimate.relative_error
tracker = hg.bilevel.SOBA([lam], [torch.ones(2, requires_grad=True)], lr=0.1)
wrong: int = result.outer_value  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
