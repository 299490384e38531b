"""Solutions of inner problems as differentiable values. Each form is reduced to a function F of leaves for `Root`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _torch
from .._autodiff import as_scalar, taking_derivatives
from .._below import Leaves
from .._modules import name_of
from .._tree import KIND, PyTree, filled, flatten, matching, split
from .._vector import is_plain
from ..operators import LinearOperator, has_curvature
from ..solvers import Auto, Recycled, Solver
from ._equation import Equation, Function, Info, WarmStart, pull
from ._function import LinearSolve, Root
from ._problem import one_of

# solver, symmetric, positive_definite, batch_dims, info, warm_start: the keywords that all forms share
Settings: TypeAlias = "tuple[Solver | None, bool, bool, int, Info | None, WarmStart | Recycled | None]"
VALUES = {"residual": "the residual", "fixed_point": "the value of the fixed point map"}


class Container:
    """The structure of a solution: the paths of its leaves, and which of them are unknowns.

    If some leaves are parameters that require grad, the leaves that do not are frozen, as in `implicit.grad`. For
    computed tensors, requires_grad does not show which are frozen: all are unknowns.
    """

    def __init__(self, solution: PyTree, name: str):
        self.leaves, self.paths, self._rebuild = flatten(solution, name)
        trained = any(x.is_leaf and x.requires_grad and not _torch.is_wrapped(x) for x in self.leaves)
        self.places = [i for i, x in enumerate(self.leaves) if x.requires_grad or not trained]
        self.leaves = [x.detach() for x in self.leaves]
        self.unknowns = [self.leaves[i] for i in self.places]

    def rebuild(self, w: Sequence[Tensor]) -> PyTree:
        return self._rebuild(filled(self.leaves, self.places, w))


def _on_leaves(form: str, user: Callable[..., Any], container: Callable[[], Container], arguments: Any) -> Function:
    """F (or Φ) as a function of leaves; `arguments` turns the leaves of λ into the user's arguments after w."""

    def value(w: Leaves, h: Leaves) -> Leaves:
        given = container()
        like = filled(given.leaves, given.places, w)
        values = matching(user(given.rebuild(w), *arguments(h)), given.paths, map(KIND, like), VALUES[form])
        return tuple(values[i] for i in given.places)

    def gradient(w: Leaves, h: Leaves) -> Leaves:
        def loss(leaves: Leaves) -> Leaves:
            tree = container().rebuild(leaves[: len(w)])
            return (as_scalar(user(tree, *arguments(leaves[len(w) :])), "inner_loss").reshape(()),)

        # The cotangent of a loss of sharded leaves must be sharded.
        one = torch.ones((), dtype=w[0].dtype, device=w[0].device) if is_plain(w[0]) else w[0].new_ones(())
        return pull(loss, (*w, *h), (one,), range(len(w)))

    if has_curvature(user):
        raise TypeError("only implicit.grad takes a GaussNewton; the derivative of a minimiser needs its Hessian")
    return gradient if form == "argmin" else taking_derivatives(value)


def _attach(form: str, user: Callable[..., Any], solution: PyTree, hparams: PyTree, settings: Settings) -> PyTree:
    container = Container(solution, "solution")
    given, rebuild_hparams = split(hparams)
    function = _on_leaves(form, user, lambda: container, lambda h: (rebuild_hparams(h),))
    w = container.unknowns
    problem = _problem(form, user, function, len(w), settings)
    problem.check_declared(w, given)
    return container.rebuild(Root.apply(problem, None, *w, *given))


def _problem(form: str, user: Any, function: Function, count: int, settings: Settings) -> Equation:
    solver, symmetric, positive_definite, batch_dims, info, warm_start = settings
    positive_definite = positive_definite or form == "argmin"
    return Equation(
        function,
        count,
        solver or Auto(),
        lambda leaf: name_of(leaf, user),
        fixed_point=form == "fixed_point",
        minimises=form == "argmin",
        symmetric=symmetric or positive_definite,
        positive_definite=positive_definite,
        batch_dims=batch_dims,
        info=info or Info(),
        warm=warm_start,
    )


def root(
    residual: Callable[[PyTree, PyTree], PyTree],
    solution: PyTree,
    hparams: PyTree,
    *,
    solver: Solver | None = None,
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
    info: Info | None = None,
    warm_start: WarmStart | Recycled | None = None,
) -> PyTree:
    """The solution of F(w, λ) = 0 as a differentiable function of λ: the same numbers, with derivatives attached.

        dw/dλ = −(∂₁F)⁻¹ ∂₂F

    Derivatives of any order work under torch.autograd and torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap),
    also if F uses implicit functions itself; forward mode inside forward mode raises. If F uses an affine normalisation
    layer in training mode, torch computes wrong values for jacrev(jacrev), hessian and jacrev(jacfwd), with or without
    this function; jacrev(grad) and jacfwd(grad) are right.

    Args:
        residual: F(params, hparams), which returns params' structure. It must use no other tensors that require grad.
        solution: w, any pytree of floating point tensors. Its own derivatives are ignored. If some leaves are
            parameters that require grad, the leaves that do not are frozen: they are constants, not unknowns.
        hparams: λ, any pytree; its floating point tensors are differentiated.
        solver: linear solver for Aᵀv = w̄, and for Aẇ = b in forward mode; default `solvers.Auto()`, which factorises
            small systems once for all right hand sides of jacrev, jacfwd or vmap.
            `solvers.FixedPoint(max_steps=1)` and `solvers.Neumann(max_steps=...)` are cheap approximations.
        symmetric: whether ∂₁F is symmetric.
        positive_definite: whether ∂₁F is symmetric positive definite (`solvers.Dense` then uses a Cholesky factor).
        batch_dims: 1 if the first axis of each leaf of w indexes independent problems.
        info: an Info that each derivative fills in.
        warm_start: a WarmStart that keeps v from one backward pass to the next, or a `solvers.Recycled`.

    Returns: w in solution's structure; it requires grad if and only if a tensor of hparams does.
    Raises: ValueError that names an undeclared tensor; in a derivative, SolverError if the solver's on_failure="raise".
    Warns: HypergradientWarning in a derivative, if its linear system or the inner problem was not solved.
    Cost: the forward pass costs nothing, or one evaluation of F under a transform or if nothing requires grad (to find
        undeclared tensors). A derivative costs one evaluation of F, the solver's products, and a last product with
        respect to w and λ; a second derivative costs one more linear system. The checks behind the warnings read three
        numbers from the device, and none with on_failure="ignore".
    Source: the implicit function theorem; Blondel et al. 2022, section 2.

    Example:
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> w = root(lambda w, a: w**2 - a, torch.tensor(2.0), a)
        >>> torch.autograd.grad(w, a)
        (tensor(0.2500),)
    """
    settings = (solver, symmetric, positive_definite, batch_dims, info, warm_start)
    return _attach("residual", residual, solution, hparams, settings)


def fixed_point(
    fp_map: Callable[[PyTree, PyTree], PyTree],
    solution: PyTree,
    hparams: PyTree,
    *,
    solver: Solver | None = None,
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
    info: Info | None = None,
    warm_start: WarmStart | Recycled | None = None,
) -> PyTree:
    """The solution of w = Φ(w, λ) as a differentiable function of λ: dw/dλ = (I − ∂₁Φ)⁻¹ ∂₂Φ.

    Args: fp_map: Φ(params, hparams), which returns params' structure; others as in `root`, with A = I − ∂₁Φ.

    Example:
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> w = fixed_point(lambda w, a: (w + a) / 2, torch.tensor(1.0), a)
        >>> torch.autograd.grad(w, a)
        (tensor(1.),)
    """
    settings = (solver, symmetric, positive_definite, batch_dims, info, warm_start)
    return _attach("fixed_point", fp_map, solution, hparams, settings)


def argmin(
    inner_loss: Callable[[PyTree, PyTree], Tensor],
    solution: PyTree,
    hparams: PyTree,
    *,
    solver: Solver | None = None,
    batch_dims: int = 0,
    info: Info | None = None,
    warm_start: WarmStart | Recycled | None = None,
) -> PyTree:
    """The minimiser of g(w, λ) as a differentiable function of λ: dw/dλ = −(∇²₁₁g)⁻¹ ∇²₁₂g.

    The linear system is taken to be symmetric positive definite, as it is at a minimum.

    Args: inner_loss: g(params, hparams), scalar. Other arguments, results, errors, warnings and costs are as in `root`.

    Example:
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> w = argmin(lambda w, a: (w - 3 * a) ** 2, torch.tensor(3.0), a)
        >>> torch.autograd.grad(w, a)
        (tensor(3.),)
    """
    settings = (solver, True, True, batch_dims, info, warm_start)
    return _attach("argmin", inner_loss, solution, hparams, settings)


def linear_solve(op: LinearOperator, b: PyTree, solver: Solver | None = None, *, info: Info | None = None) -> PyTree:
    """x = A⁻¹ b, differentiable to any order with respect to b and to the declared tensors of A.

        b̄ = A⁻ᵀ x̄,   Ā = −b̄ xᵀ

    Args:
        op: A, made by `operators.matrix`, or by `operators.function` with `tensors=` those that it depends on.
        b: right hand side, any pytree.
        solver: a linear solver; default `solvers.Auto()`.
        info: an Info that each solve fills in.

    Returns: x in b's structure.
    Cost: the solver's products, and one more solve for each derivative.

    Example:
        >>> a = torch.tensor([[2.0, 0.0], [0.0, 4.0]], requires_grad=True)
        >>> x = linear_solve(hg.operators.matrix(a, symmetric=True), torch.tensor([2.0, 4.0]))
        >>> x.sum().backward()
        >>> a.grad
        tensor([[-0.5000, -0.5000],
                [-0.2500, -0.2500]])
    """
    if op.declared is None:
        raise TypeError(
            "linear_solve needs an operator from operators.matrix or operators.function, not its .T or .damped()"
        )
    product, tensors = op.declared
    leaves, paths, rebuild = flatten(b, "b")
    theta, rebuild_theta = split(tensors)

    def function(v: Leaves, h: Leaves) -> Leaves:
        return tuple(matching(product(rebuild(v), *rebuild_theta(h)), paths, map(KIND, v), "the operator's product"))

    settings = (solver, op.symmetric, op.positive_definite, op.batch_dims, info, None)
    problem = _problem("linear system", product, function, len(leaves), settings)
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    problem.check_declared(leaves, theta)
    return rebuild(LinearSolve.apply(problem, *leaves, *zeros, *theta))


def solver(
    *,
    argmin: Callable[..., Tensor] | None = None,
    fixed_point: Callable[..., PyTree] | None = None,
    residual: Callable[..., PyTree] | None = None,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    solver: Solver | None = None,
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
    info: Info | None = None,
    warm_start: WarmStart | Recycled | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function that computes a solution, by any code, so that it is differentiable in its hparams.

    The function runs on plain tensors, outside of every graph and transform: it may use torch.optim, SciPy or a
    compiled solver. Under vmap it runs once for all entries if torch.func.vmap can run it, else once for each entry
    (if numbers or branches depend on an entry, or it uses NumPy, .backward(), random numbers or aux).

    Args:
        argmin, fixed_point, residual: the problem that the returned w solves, exactly one of g(w, *hparams) → scalar,
            Φ(w, *hparams) and F(w, *hparams).
        argnums: which positional arguments of the function are the hparams, in the order in which g, Φ or F takes
            them. Other arguments, such as a start, are not differentiated.
        has_aux: whether the function returns (solution, aux); the decorated one then does too, with aux unchanged.
        solver, symmetric, positive_definite, batch_dims, info, warm_start: as in `root`.

    Example:
        >>> @solver(residual=lambda w, a: w**2 - a, solver=hg.solvers.Dense())
        ... def square_root(a):
        ...     return a.sqrt()
        >>> torch.func.grad(square_root)(torch.tensor(4.0))
        tensor(0.2500)
    """
    form, user = one_of(argmin=argmin, fixed_point=fixed_point, residual=residual)
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if min(chosen, default=-1) < 0:
        raise ValueError(f"argnums must be one or more integers ≥ 0, got {argnums!r}")
    settings = (solver, symmetric, positive_definite, batch_dims, info, warm_start)

    def decorate(compute: Callable[..., Any]) -> Callable[..., Any]:
        refused: list[str] = []  # why torch.func.vmap could not run it

        @functools.wraps(compute)
        def differentiable(*args: Any, **kwargs: Any) -> Any:
            if max(chosen) >= len(args):
                raise TypeError(
                    f"{compute.__name__}: hparams are positional arguments {chosen}, but only {len(args)} were given"
                )
            return _computed(form, user, compute, chosen, has_aux, args, kwargs, settings, refused)

        return differentiable

    return decorate


def _computed(
    form: str,
    user: Callable[..., Any],
    compute: Callable[..., Any],
    chosen: tuple[int, ...],
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    refused: list[str],
) -> Any:
    """The value of `compute`, differentiable in the arguments whose positions are in `chosen`."""
    args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
    held = tuple(a if i in chosen else _detached(a) for i, a in enumerate(args))
    leaves, rebuild = split((held, _detached(kwargs)))
    found: list[tuple[Container, Any]] = []

    def find(tensors: Leaves) -> Leaves:
        at_once = _torch.transforms_active()  # `find_all` tries all entries of a vmap together
        if at_once and (has_aux or refused):
            raise NotImplementedError
        try:
            with _torch.outside_inference_mode(), torch.enable_grad():
                plain_args, plain_kwargs = rebuild(list(map(_torch.plain, tensors)))
                result = compute(*plain_args, **plain_kwargs)
        except Exception as error:
            if at_once:
                refused.append(str(error))
            raise
        if has_aux and found:
            raise NotImplementedError("has_aux under vmap: each entry has its own aux; map without has_aux")
        result, aux = result if has_aux else (result, None)
        new = Container(result, f"the result of {compute.__name__}")
        if (found or at_once) and len(new.places) < len(new.leaves):
            raise NotImplementedError(
                "under vmap each entry has frozen leaves (requires_grad=False) of its own: pass them in hparams"
            )
        found[:] = [(new, aux)]
        unknowns, new.unknowns = new.unknowns, []
        return tuple(leaf.clone() for leaf in unknowns)

    def arguments(tensors: Leaves) -> tuple[PyTree, ...]:
        return tuple(rebuild(tensors)[0][i] for i in chosen)

    function = _on_leaves(form, user, lambda: found[0][0], arguments)
    problem = _problem(form, user, function, 0, settings)
    outputs = Root.apply(problem, find, *leaves)
    container, aux = found[0]
    replace(problem, count=len(outputs)).check_declared(outputs, leaves)
    solution = container.rebuild(outputs)
    return (solution, aux) if has_aux else solution


def _detached(tree: PyTree) -> PyTree:
    leaves, rebuild = split(tree)
    return rebuild([leaf.detach() for leaf in leaves])
