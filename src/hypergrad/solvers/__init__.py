"""Linear solvers: frozen dataclasses of options, called as solver(op, b, x0=None) → Solution."""

from .._solution import HypergradientWarning, Solution, SolverError, Status
from ._at_once import solve_at_once as solve_at_once
from ._at_once import solves_at_once as solves_at_once
from ._auto import Auto
from ._block import BlockCG
from ._direct import Dense
from ._kept import Recycled, Reused
from ._kept import Stateful as Stateful
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

__all__ = ["Auto"]  # the default, which chooses a method for the system
__all__ += ["CG", "MINRES"]  # Krylov, symmetric
__all__ += ["GMRES", "BiCGStab", "LSQR", "NormalCG"]  # Krylov, any
__all__ += ["BlockCG", "shifted"]  # Krylov, several right hand sides, and several dampings
__all__ += ["FixedPoint", "Neumann"]  # stationary
__all__ += ["Dense", "Nystrom"]  # direct and low rank
__all__ += ["Reused", "Recycled"]  # a preconditioner, and a start, kept from one system to the next
__all__ += ["Optimizer"]  # first order, stochastic
# base classes and results
__all__ += ["LinearSolver", "IterativeSolver", "Solution", "Status", "SolverError", "HypergradientWarning"]
