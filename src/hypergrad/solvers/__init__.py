"""Linear solvers: frozen configuration, called as solver(op, b, x0=None) → Solution."""

from .._solution import HypergradientWarning, Solution, SolverError, Status
from ._at_once import solve_at_once as solve_at_once
from ._at_once import solves_at_once as solves_at_once
from ._auto import Auto
from ._block import BlockCG
from ._direct import Dense
from ._kept import Kept as Kept
from ._kept import Recycled, Reused
from ._krylov import GMRES, BiCGStab
from ._normal import LSQR, NormalCG
from ._preconditioners import Nystrom
from ._preconditioners import is_recipe as is_recipe  # used by hypergrad.influence
from ._shifted import shifted
from ._solver import IterativeSolver, LinearSolver
from ._solver import Solver as Solver
from ._solver import check_options as check_options
from ._solver import on_failure_of as on_failure_of
from ._solver import solve as solve
from ._stationary import FixedPoint, Neumann
from ._stochastic import Optimizer
from ._symmetric import CG, MINRES
from ._theory import Structure as Structure  # public as diagnostics.Structure
from ._theory import rate_of as rate_of
from ._theory import steps_needed as steps_needed

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
    # Krylov, several dampings
    "shifted",
    # stationary
    "FixedPoint",
    "Neumann",
    # direct and low rank
    "Dense",
    "Nystrom",
    # a preconditioner kept along a sequence (of Nystrom or Dense)
    "Reused",
    # a start from the last solutions
    "Recycled",
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
