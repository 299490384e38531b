"""The products with A that a check may spend, and the progress bar that shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .._basis import Basis
from ..operators import LinearOperator
from ..solvers import IterativeSolver

LONG = 3.0  # seconds after which a bar appears by itself


class Budget:
    """Counts products with A and Aᵀ.

    Args:
        most: products that may be done, about: a system in progress is ended by its number of steps.
        progress: True shows a bar, None after LONG seconds in a terminal if tqdm is installed, False never.

    Attributes:
        left_out: what was not done because the products were spent.
        tight: whether a solver had fewer steps than it would take by itself.
    """

    def __init__(self, most: int, progress: bool | None):
        self.most, self.done, self.tight = most, 0, False
        self.left_out: list[str] = []
        self.bar = None if progress is False else _bar(most, progress)

    @property
    def left(self) -> int:
        return max(self.most - self.done, 0)

    def spend(self, count: int) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def counted(self, op: LinearOperator) -> LinearOperator:
        """The same operator, its products counted here too."""

        def counting(product: Any) -> Any:
            def apply(v: Any) -> Any:
                self.spend(v.m if isinstance(v, Basis) else 1)
                return product(v)

            return apply

        back = op.T if op.has_transpose and not op.symmetric else None
        return LinearOperator(
            counting(op),
            None if back is None else counting(back),
            symmetric=op.symmetric,
            positive_definite=op.positive_definite,
            batch_dims=op.batch_dims,
            many=counting(op.many),
            many_transpose=None if back is None else counting(back.many),
            contraction=counting(op.contract),
        )

    def limited(self, solver: Any, systems: int, rtol: float) -> Any:
        """The solver with as many steps as its share of what is left, with so many systems to come."""
        if not isinstance(solver, IterativeSolver):
            return solver
        if solver.rtol is None and solver.atol is None and solver.max_steps is None:
            solver = replace(solver, rtol=rtol)
        share, own = max(1, int(self.left // systems)), 1000 if solver.max_steps is None else solver.max_steps
        self.tight = self.tight or share < own
        return replace(solver, max_steps=min(share, own))


def _bar(most: int, progress: bool | None) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if progress:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from None
        return None
    quiet: dict[str, Any] = {} if progress else {"delay": LONG, "disable": None}
    return tqdm(total=most, desc="check, at most", unit="product", leave=False, **quiet)
