"""hypergrad: gradients of an outer objective through the solution of an inner problem, in PyTorch.

Importing it imports torch but none of its own files: each name is imported from its file at the first access.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        CG_torch,
        bilevel,
        diagnostics,
        diff_optimizers,
        distributed,
        fixed_points,
        hypergradients,
        implicit,
        influence,
        meta,
        nn,
        operators,
        solvers,
        unroll,
    )
    from . import sklearn as sklearn
    from ._detached import LostDerivative
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
    from ._versions import show_versions
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

    __version__: str

__all__ = ["implicit", "Hypergradient"]  # implicit differentiation
# linear solvers, and how a solve ended
__all__ += ["solvers", "operators", "Vector", "Solution", "Status", "SolverError", "HypergradientWarning"]
__all__ += ["NotConverged", "NotFinite", "UnsolvedInnerProblem", "InaccurateHypergradient", "LostDerivative"]
__all__ += ["NotCompiled"]
__all__ += ["diagnostics"]  # how wrong a hypergradient is
__all__ += ["fixed_points", "nn"]  # forward solvers of fixed points, and equilibrium layers
__all__ += ["bilevel"]  # stochastic bilevel algorithms over minibatches
__all__ += ["influence"]  # which training examples made a prediction
__all__ += ["distributed"]  # many ranks
__all__ += ["meta"]  # meta-learning over a batch of tasks
# HyperTorch's functional interface
__all__ += ["hypergradients", "reverse_unroll", "reverse", "fixed_point", "neumann", "CG", "CG_normaleq", "stoch_AID"]
__all__ += ["exact", "CG_torch", "cat_list_to_tensor", "get_outer_gradients", "grad_unused_zero", "grd", "jvp"]
__all__ += ["list_dot", "torch_grad", "update_tensor_grads"]
__all__ += ["unroll"]  # iterative differentiation: through the steps of an inner optimiser
__all__ += ["diff_optimizers", "DifferentiableOptimizer", "GradientDescent", "HeavyBall", "Momentum"]
__all__ += ["gd_step", "heavy_ball_step", "torch_momentum_step"]
__all__ += ["show_versions"]

_EXTRAS = ("sklearn",)  # not in __all__, because the framework that they need may not be installed
_HOMES = (
    "_solution",
    "_vector",
    "_versions",
    "_recorded",
    "_detached",
    "hypergradients",
    "implicit",
    "diff_optimizers",
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("torch-hypergrad")
    if name not in __all__ and name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        modules = (import_module(f".{home}", __name__) for home in _HOMES)
        value = next(getattr(module, name) for module in modules if hasattr(module, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_EXTRAS, "__version__"})
