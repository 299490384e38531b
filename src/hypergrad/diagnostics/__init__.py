"""How wrong a hypergradient is: an estimate, a bound, finite differences, and what to do about it."""

from ._bound import Constants, Truncation, bound, truncation
from ._differences import Differences, finite_differences
from ._error import Estimate, estimate
from ._report import Report, check

__all__ = [
    "check",
    "Report",
    # the error, estimated
    "Estimate",
    "estimate",
    # the error, bounded by declared constants
    "Constants",
    "bound",
    "Truncation",
    "truncation",
    # the error, by finite differences
    "Differences",
    "finite_differences",
]
