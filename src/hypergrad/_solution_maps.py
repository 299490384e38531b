"""Solutions of inner problems as differentiable values: root, fixed_point, argmin, linear_solve, the solver decorator.

Each form of inner problem becomes one function F on leaves, and one Root carries all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._autodiff import as_scalar
from ._implicit_function import Info, Leaves, LinearSolve, Problem, Root, WarmStart
from ._tree import PyTree, flatten, matching, split
from .operators import GaussNewton, LinearOperator
from .solvers import CG, GMRES, Neumann, Recycled, Solver


def Phantom(steps: int = 1, damping: float = 0.5) -> Neumann:
    """The phantom gradient: the derivative of `steps` damped steps w ← (1 − τ) w + τ Φ(w, λ) from the solution.

        v = τ Σ_{k<steps} (I − τAᵀ)ᵏ b

    At a solution that is a truncated Neumann series with step size τ, and it is made as one: an approximation of A⁻ᵀb,
    whose residual Info tells.

    Args:
        steps: ≥ 1.
        damping: τ in (0, 1].

    Cost: steps − 1 products.
    Source: Geng et al. 2021, "On training implicit models", equation 10.
    """
    if steps < 1:
        raise ValueError(f"Phantom: steps must be ≥ 1, got {steps}")
    return Neumann(max_steps=steps - 1, step_size=damping)


@dataclass(frozen=True)
class Options:
    """How derivatives are solved for; the keywords that root, fixed_point, argmin and solver share."""

    adjoint: Solver | None = None
    tangent: Solver | None = None
    symmetric: bool = False
    positive_definite: bool = False
    batch_dims: int = 0
    info: Info = field(default_factory=Info)
    warm_start: WarmStart | Recycled | None = None

    def problem(
        self,
        function: Callable[[Leaves, Leaves], Leaves],
        count: int,
        users: Callable[..., Any],
        fixed_point: bool = False,
    ) -> Problem:
        symmetric = self.symmetric or self.positive_definite
        adjoint = self.adjoint or (CG() if symmetric else GMRES())
        return Problem(
            function,
            count,
            solver=adjoint,
            tangent=self.tangent or adjoint,
            fixed_point=fixed_point,
            symmetric=symmetric,
            positive_definite=self.positive_definite,
            batch_dims=self.batch_dims,
            info=self.info,
            warm=self.warm_start,
            names=functools.partial(name_of, users),
        )


# The three forms: (user's function, rebuild w, hparams' leaves ↦ the user's arguments) ↦ F (or Φ) on leaves.


def _residual(user: Callable[..., Any], rebuild: Any, arguments: Any) -> Callable[[Leaves, Leaves], Leaves]:
    return lambda w, h: tuple(matching(user(rebuild(w), *arguments(h)), w, "the residual"))


def _fixed_point(user: Callable[..., Any], rebuild: Any, arguments: Any) -> Callable[[Leaves, Leaves], Leaves]:
    return lambda w, h: tuple(matching(user(rebuild(w), *arguments(h)), w, "the value of the fixed point map"))


def _argmin(user: Callable[..., Any], rebuild: Any, arguments: Any) -> Callable[[Leaves, Leaves], Leaves]:
    if isinstance(user, GaussNewton):
        raise TypeError("GaussNewton is for implicit.grad; a minimiser as a differentiable value has its Hessian")

    def gradient(w: Leaves, h: Leaves) -> Leaves:
        return torch.func.grad(lambda w: as_scalar(user(rebuild(w), *arguments(h)), "inner_loss").reshape(()))(w)

    return gradient


FORMS = {"residual": _residual, "fixed_point": _fixed_point, "argmin": _argmin}


def _attach(form: str, user: Callable[..., Any], solution: PyTree, hparams: PyTree, options: Options) -> PyTree:
    leaves, _, rebuild = flatten(solution, "solution")
    given, rebuild_hparams = split(hparams)
    function = FORMS[form](user, rebuild, lambda h: (rebuild_hparams(h),))
    problem = options.problem(function, len(leaves), user, form == "fixed_point")
    w = [leaf.detach() for leaf in leaves]
    problem.check_declared(w, given)
    return rebuild(Root.apply(problem, None, *w, *given))


def root(residual: Callable[[PyTree, PyTree], PyTree], solution: PyTree, hparams: PyTree, **options: Any) -> PyTree:
    """The solution of F(w, λ) = 0 as a differentiable function of λ: the same numbers, with derivatives attached.

        dw/dλ = −(∂₁F)⁻¹ ∂₂F

    To any order, under torch.autograd and torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap); forward mode
    inside forward mode raises. Where F holds an affine normalisation layer in training mode, torch's own
    jacrev(jacrev), hessian and jacrev(jacfwd) are wrong, with this function or without; jacrev(grad) and jacfwd(grad)
    are right.

    Args:
        residual: F(params, hparams), of params' structure. It may use no tensor that requires grad but these two.
        solution: w, any pytree of floating point tensors. Its own derivatives are ignored.
        hparams: λ, any pytree; its floating point tensors are differentiated.
        adjoint: linear solver of Aᵀv = w̄; default CG() if symmetric, else GMRES(). `OneStep()` and `Phantom()` are
            cheap approximations.
        tangent: linear solver in forward mode; default: the adjoint's.
        symmetric, positive_definite: what is known of ∂₁F.
        batch_dims: 1 where the first axis of each leaf of w counts independent problems.
        info: an Info that each derivative fills in.
        warm_start: a WarmStart that keeps v from one backward pass to the next, or a `solvers.Recycled`.

    Returns:
        w in solution's structure; it requires grad exactly where a tensor of hparams does.

    Raises: ValueError, when differentiated, for an undeclared tensor, naming its shape (and name in a module) and how
        to pass it; SolverError, likewise, under on_failure="raise".
    Warns: HypergradientWarning, when differentiated, for a linear system that was not solved.
    Cost: forward nothing, or one evaluation of F under a transform and where nothing requires grad (to find undeclared
        tensors); backward one evaluation of F, the solver's products, and a last one with respect to w and λ
        together. Second derivatives: one more linear system each.
    Source: the implicit function theorem; Blondel et al. 2022, section 2.

    Example:
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> w = root(lambda w, a: w**2 - a, torch.tensor(2.0), a)
        >>> torch.autograd.grad(w, a)
        (tensor(0.2500),)
    """
    return _attach("residual", residual, solution, hparams, Options(**options))


def fixed_point(
    fp_map: Callable[[PyTree, PyTree], PyTree], solution: PyTree, hparams: PyTree, **options: Any
) -> PyTree:
    """The solution of w = Φ(w, λ) as a differentiable function of λ: dw/dλ = (I − ∂₁Φ)⁻¹ ∂₂Φ.

    Args:
        fp_map: Φ(params, hparams), of params' structure.
        solution, hparams, options: as in `root`, with A = I − ∂₁Φ.

    Returns, Raises, Warns, Cost: as in `root`.

    Example:
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> w = fixed_point(lambda w, a: (w + a) / 2, torch.tensor(1.0), a)
        >>> torch.autograd.grad(w, a)
        (tensor(1.),)
    """
    return _attach("fixed_point", fp_map, solution, hparams, Options(**options))


def argmin(inner_loss: Callable[[PyTree, PyTree], Tensor], solution: PyTree, hparams: PyTree, **options: Any) -> PyTree:
    """The minimiser of g(w, λ) as a differentiable function of λ: dw/dλ = −(∇²₁₁g)⁻¹ ∇²₁₂g.

    The system is symmetric; it counts as positive definite only with positive_definite=True.

    Args:
        inner_loss: g(params, hparams), scalar.
        solution, hparams, options: as in `root`, with A = ∇²₁₁g; default adjoint: CG().

    Returns, Raises, Warns, Cost: as in `root`.

    Example:
        >>> a = torch.tensor(1.0, requires_grad=True)
        >>> w = argmin(lambda w, a: (w - 3 * a) ** 2, torch.tensor(3.0), a)
        >>> torch.autograd.grad(w, a)
        (tensor(3.),)
    """
    return _attach("argmin", inner_loss, solution, hparams, Options(**{**options, "symmetric": True}))


def linear_solve(op: LinearOperator, b: PyTree, solver: Solver | None = None, **options: Any) -> PyTree:
    """x = A⁻¹ b, differentiable to any order in b and in the tensors that A declares.

        b̄ = A⁻ᵀ x̄,   Ā = −b̄ xᵀ

    Args:
        op: an operator from `operators.matrix`, or from `operators.function` with `tensors=` what it depends on.
        b: right hand side, any pytree.
        solver: a linear solver; default CG() if op is symmetric, else GMRES().
        info: an Info, filled in by each solve.

    Returns: x in b's structure.
    Raises, Warns: as in `root`, and at once for the solve itself.
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
            "linear_solve needs what operators.matrix or operators.function gave, not .T or .damped() of it"
        )
    product, tensors = op.declared
    leaves, _, rebuild = flatten(b, "b")
    theta, rebuild_theta = split(tensors)

    def function(v: Leaves, h: Leaves) -> Leaves:
        return tuple(matching(product(rebuild(v), *rebuild_theta(h)), v, "the operator's product"))

    settings = Options(
        adjoint=solver,
        symmetric=op.symmetric,
        positive_definite=op.positive_definite,
        batch_dims=op.batch_dims,
        **options,
    )
    problem = settings.problem(function, len(leaves), product)
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
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make any code that computes a solution a differentiable function of its hparams.

    The decorated function is run on plain tensors, detached from every graph and outside of every transform: it may use
    torch.optim, SciPy or a compiled solver. Under vmap it runs once for each entry.

    Args:
        argmin, fixed_point, residual: what the returned w solves, exactly one: g(w, *hparams) → scalar, Φ(w, *hparams),
            or F(w, *hparams).
        argnums: which positional arguments of the decorated function are the hparams, in the order in which the form
            takes them. Nothing else is differentiated, a start for instance.
        has_aux: the function returns (solution, aux); so does the decorated one, with aux untouched.
        adjoint, tangent, symmetric, positive_definite, batch_dims, info, warm_start: as in `root`.

    Returns: a decorator.
    Raises: TypeError for none or several forms, or a function called without its hparams; else as `root`.

    Example:
        >>> @solver(residual=lambda w, a: w**2 - a, adjoint=hg.solvers.Dense())
        ... def square_root(a):
        ...     return a.sqrt()
        >>> torch.func.grad(square_root)(torch.tensor(4.0))
        tensor(0.2500)
    """
    forms = {"argmin": argmin, "fixed_point": fixed_point, "residual": residual}
    given = {name: user for name, user in forms.items() if user is not None}
    if len(given) != 1:
        raise TypeError(f"pass exactly one of argmin, fixed_point and residual; got {list(given) or 'none'}")
    form, user = given.popitem()
    if form == "argmin":
        options["symmetric"] = True
    settings = Options(**options)
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if min(chosen, default=-1) < 0:
        raise ValueError(f"argnums must be one or more integers ≥ 0, got {argnums!r}")

    def decorate(compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def differentiable(*args: Any, **kwargs: Any) -> Any:
            if max(chosen) >= len(args):
                raise TypeError(
                    f"{compute.__name__}: hparams are positional arguments {chosen}, got {len(args)} of them"
                )
            args = tuple(list(a) if isinstance(a, Iterator) else a for a in args)
            held = tuple(a if i in chosen else _detached(a) for i, a in enumerate(args))
            leaves, rebuild = split((held, _detached(kwargs)))
            found: dict[str, Any] = {}

            def find(tensors: Leaves) -> Leaves:
                with torch.enable_grad():
                    plain_args, plain_kwargs = rebuild([t.detach() for t in tensors])
                    result = compute(*plain_args, **plain_kwargs)
                if has_aux and "aux" in found:
                    raise NotImplementedError("has_aux under vmap: each entry has its own aux; map without has_aux")
                result, found["aux"] = result if has_aux else (result, None)
                new, _, found["rebuild"] = flatten(result, f"the result of {compute.__name__}")
                return tuple(leaf.detach().clone() for leaf in new)

            def arguments(tensors: Leaves) -> tuple[PyTree, ...]:
                return tuple(rebuild(tensors)[0][i] for i in chosen)

            function = FORMS[form](user, lambda w: found["rebuild"](w), arguments)
            problem = settings.problem(function, 0, user, form == "fixed_point")
            outputs = Root.apply(problem, find, *leaves)
            problem.check_declared(outputs, leaves)
            solution = found["rebuild"](outputs)
            return (solution, found["aux"]) if has_aux else solution

        return differentiable

    return decorate


def _detached(tree: PyTree) -> PyTree:
    leaves, rebuild = split(tree)
    return rebuild([leaf.detach() for leaf in leaves])


def name_of(user: Callable[..., Any], leaf: Tensor) -> str:
    """How to speak of an undeclared tensor: its shape, and its name if a module that the function reaches holds it."""
    for module in _modules(user):
        for name, parameter in module.named_parameters():
            if parameter is leaf:
                return f"{name} of a {type(module).__name__}, of shape {tuple(leaf.shape)}"
    return f"of shape {tuple(leaf.shape)}"


def _modules(thing: Any, depth: int = 4) -> Iterator[torch.nn.Module]:
    """Modules that a function is, is bound to, closes over, or names as a global, through functions in between."""
    if isinstance(thing, torch.nn.Module):
        yield thing
    elif callable(thing) and depth:
        code = getattr(thing, "__code__", None)
        within = [
            getattr(thing, "func", None),
            getattr(thing, "__self__", None),
            *getattr(thing, "args", ()),
            *(cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()),
            *(getattr(thing, "__globals__", {}).get(name) for name in (code.co_names if code else ())),
        ]
        for part in within:
            yield from _modules(part, depth - 1)
