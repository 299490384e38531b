"""The products with A that a check may spend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..operators import LinearOperator
from ..solvers import IterativeSolver


class Budget:
    """Counts products with A and Aᵀ.

    Args:
        most: products that may be done, about: a system in progress is ended by its number of steps.

    Attributes:
        left_out: what was not done because the products were spent.
        tight: whether a solver had fewer steps than it would take by itself.
    """

    def __init__(self, most: int):
        self.most, self.tight = most, False
        self.left_out: list[str] = []
        self._before = 0
        self._operator: LinearOperator | None = None

    @property
    def done(self) -> int:
        return self._before + (0 if self._operator is None else self._operator.products)

    @property
    def left(self) -> int:
        return max(self.most - self.done, 0)

    def spend(self, products: int) -> None:
        self._before += products

    def counted(self, operator: LinearOperator) -> LinearOperator:
        """The operator, whose products are counted from here on in place of those of the one before."""
        self._before, self._operator = self.done, operator
        return operator

    def limited(self, solver: Any, systems: int, rtol: float) -> Any:
        """The solver with as many steps as its share of what is left, with so many systems to come."""
        if not isinstance(solver, IterativeSolver):
            return solver
        if solver.rtol is None and solver.atol is None and solver.max_steps is None:
            solver = replace(solver, rtol=rtol)
        share, own = max(1, self.left // systems), 1000 if solver.max_steps is None else solver.max_steps
        self.tight = self.tight or share < own
        return replace(solver, max_steps=min(share, own))
