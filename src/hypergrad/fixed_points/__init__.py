"""Forward solvers of w = Φ(w, λ): frozen configuration, called as solver(fp_map, start, hparams).

Nothing here is differentiated: `implicit.fixed_point` attaches derivatives to what comes out. With batch_dims=1 each
sample converges by itself and then rests.
"""

from ._methods import Anderson, Broyden, Newton, Picard
from ._solver import FixedPointSolver
from ._transforms import lead_axes as lead_axes  # used by hypergrad.implicit: mapped axes to the front
from ._transforms import solved as solved  # used by hypergrad.nn: a Solution on plain tensors beside it

__all__ = ["Picard", "Anderson", "Broyden", "Newton", "FixedPointSolver"]
