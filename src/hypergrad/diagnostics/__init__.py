"""What a hypergradient's problem is like: structure, findings, pictures."""

from ._choice import SolverChoice, solver_choice
from ._findings import Finding, findings
from ._structure import Structure, operator_structure, structure

__all__ = ["Structure", "structure", "operator_structure", "SolverChoice", "solver_choice", "Finding", "findings"]
