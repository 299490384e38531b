"""How wrong a hypergradient is, and why: an estimate, a bound, finite differences, what its problem is like."""

from ._bound import Constants, bound
from ._choice import SolverChoice, solver_choice
from ._differences import Differences, finite_differences
from ._error import Estimate
from ._findings import findings
from ._maps import Finding
from ._plots import plot_convergence, plot_report, plot_spectrum
from ._report import Report, check
from ._structure import Structure, operator_structure, structure

__all__ = [
    "check",
    "Report",
    # the error, estimated
    "Estimate",
    # the error, bounded by declared constants
    "Constants",
    "bound",
    # the error, by finite differences
    "Differences",
    "finite_differences",
    # the linear system, and what solves it
    "Structure",
    "structure",
    "operator_structure",
    "SolverChoice",
    "solver_choice",
    # what is wrong
    "Finding",
    "findings",
    # pictures
    "plot_convergence",
    "plot_spectrum",
    "plot_report",
]
