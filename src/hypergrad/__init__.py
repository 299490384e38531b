"""hypergrad: gradients of an outer objective through the solution of an inner problem, in PyTorch."""

from importlib.metadata import version

from . import (
    CG_torch,
    bilevel,
    diagnostics,
    diff_optimizers,
    distributed,
    fixed_points,
    hypergradients,
    implicit,
    meta,
    nn,
    operators,
    solvers,
    unroll,
)
from ._recorded import NotCompiled
from ._solution import (
    HypergradientWarning,
    InaccurateHypergradient,
    NotConverged,
    NotFinite,
    Solution,
    SolverError,
    Status,
    UnsolvedInnerProblem,
)
from ._vector import Vector
from .diff_optimizers import (
    DifferentiableOptimizer,
    GradientDescent,
    HeavyBall,
    Momentum,
    gd_step,
    heavy_ball_step,
    torch_momentum_step,
)
from .hypergradients import (
    CG,
    CG_normaleq,
    cat_list_to_tensor,
    exact,
    fixed_point,
    get_outer_gradients,
    grad_unused_zero,
    grd,
    jvp,
    list_dot,
    neumann,
    reverse,
    reverse_unroll,
    stoch_AID,
    torch_grad,
    update_tensor_grads,
)
from .implicit import Hypergradient

__version__ = version("torch-hypergrad")

__all__ = [
    # implicit differentiation
    "implicit",
    "Hypergradient",
    # linear solvers, and how a solve ended
    "solvers",
    "operators",
    "Vector",
    "Solution",
    "Status",
    "SolverError",
    "HypergradientWarning",
    "NotConverged",
    "NotFinite",
    "UnsolvedInnerProblem",
    "InaccurateHypergradient",
    "NotCompiled",
    # how wrong a hypergradient is
    "diagnostics",
    # forward solvers of fixed points, and equilibrium layers
    "fixed_points",
    "nn",
    # stochastic bilevel algorithms over minibatches
    "bilevel",
    # many ranks
    "distributed",
    # meta-learning over a batch of tasks
    "meta",
    # HyperTorch's functional interface
    "hypergradients",
    "reverse_unroll",
    "reverse",
    "fixed_point",
    "neumann",
    "CG",
    "CG_normaleq",
    "stoch_AID",
    "exact",
    "CG_torch",
    "cat_list_to_tensor",
    "get_outer_gradients",
    "grad_unused_zero",
    "grd",
    "jvp",
    "list_dot",
    "torch_grad",
    "update_tensor_grads",
    # iterative differentiation: through the steps of an inner optimiser
    "unroll",
    # differentiable optimisers
    "diff_optimizers",
    "DifferentiableOptimizer",
    "GradientDescent",
    "HeavyBall",
    "Momentum",
    "gd_step",
    "heavy_ball_step",
    "torch_momentum_step",
]
