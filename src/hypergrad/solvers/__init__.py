"""Linear solvers: frozen configuration, called as solver(op, b, x0=None) → Solution."""

from .._solution import HypergradientWarning, Solution, SolverError, Status
from ._auto import Auto
from ._block import BlockCG
from ._direct import Dense
from ._krylov import CG, GMRES, LSQR, MINRES, BiCGStab, NormalCG
from ._lowrank import Nystrom
from ._preconditioners import Diagonal, Reused
from ._recycled import Recycled
from ._refined import Refined
from ._solver import IterativeSolver, LinearSolver
from ._stationary import FixedPoint, Neumann, OneStep
from ._stochastic import Optimizer

__all__ = [
    # the choice made by what is known of the system
    "Auto",
    # Krylov, symmetric
    "CG",
    "MINRES",
    # Krylov, any
    "GMRES",
    "BiCGStab",
    "LSQR",
    "NormalCG",
    # Krylov, several right hand sides
    "BlockCG",
    # stationary
    "FixedPoint",
    "Neumann",
    "OneStep",
    # direct and low rank
    "Dense",
    "Nystrom",
    # preconditioners (so is Nystrom)
    "Diagonal",
    "Reused",
    # a start from the last solutions
    "Recycled",
    # products in low precision
    "Refined",
    # first order, stochastic
    "Optimizer",
    # their forms and answers
    "LinearSolver",
    "IterativeSolver",
    "Solution",
    "Status",
    "SolverError",
    "HypergradientWarning",
]
