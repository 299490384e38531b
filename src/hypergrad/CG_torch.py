"""HyperTorch's module of conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import operators, solvers
from ._solution import Status
from .hypergradients import cat_list_to_tensor as cat_list_to_tensor


def cg(
    Ax: Callable[[list[Tensor]], Sequence[Tensor]], b: Sequence[Tensor], max_iter: int = 100, epsilon: float = 1.0e-5
) -> list[Tensor]:
    """Solve A x = b for a symmetric positive definite A, given as v ↦ A v on lists, until ‖b − Ax‖ ≤ epsilon ‖b‖.

    The result has no graph. Warns if the method does not apply, or if ‖b − Ax‖ > ‖b‖ / 10 after max_iter steps.

    Example:
        >>> cg(lambda v: [2 * v[0]], [torch.tensor([1.0, 3.0])])
        [tensor([0.5000, 1.5000])]
    """

    def product(v: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            return list(Ax(v))

    solver = solvers.CG(max_steps=max_iter, rtol=epsilon, on_failure="ignore")
    solution = solver(operators.function(product, symmetric=True), list(b))
    if solution.status.value > Status.STAGNATED.value or bool(solution.relative_residual > 0.1):
        solution.report("CG_torch.cg", "warn")
    return solution.value
