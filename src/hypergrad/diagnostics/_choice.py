"""Which linear solvers are valid for a system of known structure, and how many products each would need."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

from .. import solvers
from ._structure import Structure


@dataclass(frozen=True)
class SolverChoice:
    """A solver by name, the products that it needs (None: no bound is known), and why it does not apply, if so."""

    solver: str
    products: float | None
    against: str | None

    @property
    def valid(self) -> bool:
        return self.against is None


def solver_choice(structure: Structure, rtol: float = 1e-6) -> tuple[SolverChoice, ...]:
    """For each solver of hg.solvers, with its default options, whether it applies to a system, and at what cost.

    These are `valid_for` and `products_needed` of the solvers, which name the bounds; unless the structure is `exact`,
    more products may be needed. The valid ones come first, by their products.

    Raises: ValueError for an rtol outside (0, 1).

    Example:
        >>> found = hg.diagnostics.operator_structure(
        ...     hg.operators.matrix(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True), torch.zeros(2)
        ... )
        >>> next(c.products for c in solver_choice(found, 1e-3) if c.solver == "CG")
        7
    """
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol!r}")
    every = []
    for name in solvers.__all__:
        kind = getattr(solvers, name)
        if inspect.isclass(kind) and issubclass(kind, solvers.LinearSolver) and not inspect.isabstract(kind):
            against = kind().valid_for(structure)
            every.append(SolverChoice(name, None if against else kind().products_needed(structure, rtol), against))
    return tuple(sorted(every, key=lambda c: (not c.valid, math.inf if c.products is None else c.products)))


def solver_rows(structure: Structure) -> str:
    """`solver_choice` as three lines of a table."""
    every = solver_choice(structure)
    rows = {
        "products for 1e-06": [f"{c.solver} {c.products:.0f}" for c in every if c.products is not None],
        "no bound": [c.solver for c in every if c.valid and c.products is None],
        "not valid": [c.solver for c in every if not c.valid],
    }
    return "\n".join(f"{name:<22}{', '.join(names)}" for name, names in rows.items() if names)
