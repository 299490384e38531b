"""How wrong a hypergradient is, and why: an error estimate, finite differences, and the structure of its system."""

from ._differences import Differences, finite_differences
from ._error import Estimate
from ._findings import Finding, findings
from ._report import Report, check
from ._structure import SolverChoice, Structure, operator_structure, solver_choice, structure

__all__ = ["check", "Report"]
__all__ += ["Estimate", "Differences", "finite_differences"]  # the error, estimated or by finite differences
# the linear system, and the solvers that suit it
__all__ += ["Structure", "structure", "operator_structure", "SolverChoice", "solver_choice"]
__all__ += ["Finding", "findings"]  # what is wrong
