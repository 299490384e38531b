"""HyperTorch's functions and helpers, all of them, with their names, arguments, defaults and results.

Its defects are not kept: `tol` is relative to ‖∇₁E‖; CG returns its last iterate, not the one before; unused params and
hparams have zero gradients; params may hold one tensor twice; containers may be nested; and known wrong cases raise an
error or warn. HyperTorch's optimisers are in `diff_optimizers`, its `cg` is in `CG_torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import grad as torch_grad

from . import _autodiff, _graph, _torch, implicit, operators, solvers
from ._autodiff import Linearisation, as_scalar
from ._solution import Status, warn_if_not_finite
from ._torch import random_state_kept_on_error
from ._tree import filled, flatten

Loss = Callable[[Any, Any], Tensor]
Map = Callable[[Any, Any], Any]
Tensors = Sequence[Any]


def _list(tensors: Any, name: str) -> list[Any]:
    """The tensors as a list. A bare tensor is an error, because it would be split into its rows."""
    if isinstance(tensors, (Tensor, dict)):
        kind = type(tensors).__name__
        raise TypeError(f"{name} must be a list of tensors, got {kind}; implicit.grad takes any pytree")
    return list(tensors)


def _backpropagated(
    evaluate: Callable[[list[Any]], Tensor], hparams: Tensors, set_grad: bool, retain_graph: bool
) -> tuple[Any, ...]:
    """The gradient of an outer loss whose graph reaches hparams, in new memory."""
    leaves, names, rebuild = flatten(_list(hparams, "hparams"), "hparams", complex=True)
    places, needed = _autodiff.check_hparams(leaves, names)
    with random_state_kept_on_error(leaves), _torch.outside_inference_mode():
        with torch.enable_grad(), _torch.correct_derivatives():
            loss = as_scalar(evaluate(rebuild(leaves)), "outer_loss")
        with _torch.hooks_suspended(leaves) as hooked:
            found = _autodiff.grad([loss], needed, retain_graph=retain_graph, must_reach=implicit.NO_HPARAMS)
        found = _torch.with_hooks(needed, [g.clone() for g in found], hooked)
        grads = filled([torch.zeros_like(leaf) for leaf in leaves], places, found)
        warn_if_not_finite(grads)
        if set_grad:
            implicit.accumulate(leaves, grads)
    return tuple(rebuild(grads))


def _implicit(
    params: Tensors,
    hparams: Tensors,
    outer_loss: Loss,
    solver: solvers.LinearSolver,
    set_grad: bool,
    forms: dict[str, Any],
    *,
    draws: int = 0,
    symmetric: bool = False,
    start: Tensors | None = None,
    fatal: tuple[Status, ...] = (),
) -> implicit.Hypergradient:
    """`implicit.grad` on lists. K steps were asked for, so missing tol is no failure; a large error gives a warning.

    draws: over how many draws of the inner problem the last product is averaged; 0 if it is not stochastic.
    fatal: statuses that raise an error.
    """
    # [w, w], the state of HeavyBall at a fixed point, must become two tensors, because a map has two variables there.
    given, _, rebuild = flatten(_list(params, "params"), "params")
    leaves, hparams = [x.detach() for x in given], _list(hparams, "hparams")
    fixed = [isinstance(x, torch.nn.Parameter) and not x.requires_grad for x in given]
    if any(fixed):  # some parameters of a module are frozen
        leaves = [x.requires_grad_(not each) for x, each in zip(leaves, fixed, strict=True)]
    if draws:
        forms = {kind: form and operators.Stochastic(form, draws) for kind, form in forms.items()}
    problem = implicit.Problem(outer_loss, params=rebuild(leaves), hparams=hparams, symmetric=symmetric, **forms)
    problem.replaced = [x for x in given if x.requires_grad and x.is_leaf]
    with random_state_kept_on_error(problem.leaves):
        result = implicit.hypergradient_of(problem, solver, start)
        if (status := result.solution.status).value > Status.STAGNATED.value:
            result.solution.report("the adjoint system of the hypergradient", "raise" if status in fatal else "warn")
        result.check_finite()
        if not draws:
            problem.warn_of_lost(result.solution.value)
            result.warn_if_unsolved()
            result.warn_if_inaccurate()
        if set_grad:
            implicit.accumulate(hparams, result.grads)
    return result


def reverse_unroll(params: Tensors, hparams: Tensors, outer_loss: Loss, set_grad=True) -> tuple[Any, ...]:
    """Hypergradient by backpropagation through the graph of params.

    Args:
        params: w_T(λ), the result of an inner loop with create_graph=True.
        hparams: λ, the tensors that the inner loop used.
        outer_loss: E(params, hparams), scalar.
        set_grad: add the result to hparams' .grad, as backward() does. Hooks of hparams run once.

    Returns: ∇f(λ) of f(λ) = E(w_T(λ), λ), a tuple like hparams.
    Raises: ValueError if outer_loss is not a scalar, or depends on none of hparams.
    Cost: one reverse pass through all steps, which keeps their graph.
    Source: Grazzi et al. 2020, section 2.1 (ITD).

    Example:
        >>> lam = torch.tensor([3.0], requires_grad=True)
        >>> reverse_unroll([lam / 2], [lam], lambda w, lam: (w[0] ** 2).sum())
        (tensor([1.5000]),)
    """
    params, hparams = _list(params, "params"), _list(hparams, "hparams")
    ends, starts = (flatten(x, name, complex=True)[0] for x, name in ((params, "params"), (hparams, "hparams")))
    _graph.refuse_weight_norm([x for x in ends if x.requires_grad], starts, "params")
    return _backpropagated(lambda hparams: outer_loss(params, hparams), hparams, set_grad, retain_graph=True)


def reverse(
    params_history: Sequence[Any], hparams: Tensors, update_map_history: Sequence[Map], outer_loss: Loss, set_grad=True
) -> list[Any]:
    """Hypergradient by reverse mode through stored iterates, with the graph of one step at a time.

        α ← ∇₁E(w_T, λ);   for t = T … T − K + 1:   ∇ ← ∇ + ∂₂Φ_tᵀ α,   α ← ∂₁Φ_tᵀ α

    Args:
        params_history: the last K + 1 iterates, w_{T−K} … w_T.
        update_map_history: at least K maps, of which the last one gave w_T.
        hparams, outer_loss, set_grad: as in `reverse_unroll`.

    Returns: ∇f(λ) through the last K steps, a list like hparams.
    Raises: ValueError for fewer maps than steps, or a map whose result is not like its argument.
    Cost: K evaluations of the map and K reverse passes; the memory of the iterates and of one step's graph.
    Source: Grazzi et al. 2020, Algorithm 1 (reverse); Franceschi et al. 2017.

    Example:
        >>> inner = lambda params, hparams: ((params[0] - hparams[0]) ** 2).sum() / 2  # w* = λ
        >>> outer = lambda params, hparams: ((params[0] - 2) ** 2).sum() / 2
        >>> w, lam = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> fp_map = hg.GradientDescent(inner, 0.5)
        >>> hg.reverse([[w]] * 21, [lam], [fp_map] * 20, outer)[0].round(decimals=3)  # all iterates at the solution
        tensor([-2., -2.])
    """
    hparams, steps = _list(hparams, "hparams"), len(params_history) - 1
    if steps < 0:
        raise ValueError("params_history holds no iterate; it needs w_T at least")
    if len(update_map_history) < steps:
        raise ValueError(f"{steps + 1} iterates need {steps} maps, got {len(update_map_history)}")
    leaves = flatten(hparams, "hparams", complex=True)[0]
    kept, outside = random_state_kept_on_error(leaves), _torch.outside_inference_mode()
    with kept, outside, _torch.hooks_suspended(leaves) as hooked:
        problem = _at(params_history[-1], hparams, outer_loss, lambda params, hparams: params)
        _, alpha, total = implicit.outer_gradients(problem, keep=False)  # ∇₁E, ∇₂E
        for t in range(steps):
            step = update_map_history[-1 - t]
            problem = _at(params_history[-2 - t], hparams, outer_loss, step)
            with torch.enable_grad(), _torch.correct_derivatives():
                outputs = alpha.space.check(step(*problem.arguments), "the value of the update map")
            linearisation = Linearisation(outputs, problem.leaves, problem.differentiated)
            pulled, cross = linearisation.vjp_both(alpha.leaves, retain_graph=False)
            if linearisation.params_unreached:
                problem.check_uses_arguments(outputs, "the update map")
            alpha, total = problem.space.pack(pulled), _autodiff.add_or_none(total, cross)
    if all(g is None for g in total):
        raise ValueError(implicit.NO_HPARAMS)
    found = _autodiff.new_zeros(_autodiff.copies(total), problem.differentiated)
    grads = problem.tree_of(_torch.with_hooks(problem.differentiated, found, hooked))
    warn_if_not_finite(found)
    if set_grad:
        implicit.accumulate(hparams, grads)
    return grads


def _at(params: Any, hparams: Tensors, outer_loss: Loss, step: Map) -> implicit.Problem:
    """The problem at an iterate, all of whose tensors are variables, with or without a graph."""
    tree: Any = _list(params, "params")
    tree = optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, tree)
    return implicit.Problem(outer_loss, params=tree, hparams=hparams, fp_map=step)


def fixed_point(
    params: Tensors, hparams: Tensors, K: int, fp_map: Map, outer_loss: Loss, tol=1e-10, set_grad=True, stochastic=False
) -> list[Any]:
    """Hypergradient by K steps of v ← ∂₁Φᵀv + ∇₁E from zero: reverse mode through K steps at the solution.

    Args:
        params: w, a list of tensors at (or near) the fixed point.
        hparams: λ, a list of tensors.
        K: steps.
        fp_map: Φ(params, hparams), a list like params.
        outer_loss: E(params, hparams), scalar.
        tol: stop earlier once ‖∇₁E − Aᵀv‖ ≤ tol · ‖∇₁E‖, which is checked at every fifth step (more often if K < 15).
        set_grad: add the result to hparams' .grad, as backward() does. Hooks of hparams run once.
        stochastic: fp_map draws random numbers, so it is evaluated anew at every product.

    Returns: ∇f(λ) ≈ ∇₂E + ∂₂Φᵀv, a list like hparams.
    Raises, Warns: as `implicit.grad`, but K steps that miss tol are no failure.
    Cost: K products, the last with respect to params and hparams together.
    Source: Grazzi et al. 2020, section 2.2 (AID-FP).

    Example:
        >>> lam = torch.tensor([3.0], requires_grad=True)
        >>> phi = lambda w, lam: [(w[0] + lam[0]) / 2]
        >>> fixed_point([lam.detach()], [lam], 20, phi, lambda w, lam: w[0].sum() ** 2 / 2)
        [tensor([3.0000])]
    """
    every = max(1, min(5, K // 3))  # even few steps are measured often enough to estimate their rate
    solver = solvers.FixedPoint(max_steps=K, rtol=tol, check_every=every, on_failure="ignore")
    return _implicit(params, hparams, outer_loss, solver, set_grad, {"fp_map": fp_map}, draws=int(stochastic)).grads


def neumann(
    params: Tensors, hparams: Tensors, K: int, fp_map: Map, outer_loss: Loss, tol=1e-10, set_grad=True
) -> list[Any]:
    """Hypergradient by K + 1 terms of the Neumann series: `fixed_point` with K + 1 steps.

    Source: Lorraine, Vicol and Duvenaud 2020; Liao et al. 2018.

    Example:
        >>> inner = lambda params, hparams: ((params[0] - hparams[0]) ** 2).sum() / 2  # w* = λ
        >>> outer = lambda params, hparams: ((params[0] - 2) ** 2).sum() / 2
        >>> w, lam = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> _ = hg.neumann([w], [lam], 20, hg.GradientDescent(inner, 0.5), outer)
        >>> lam.grad.round(decimals=3)
        tensor([-2., -2.])
    """
    return fixed_point(params, hparams, K + 1, fp_map, outer_loss, tol, set_grad)


def CG(
    params: Tensors, hparams: Tensors, K: int, fp_map: Map, outer_loss: Loss, tol=1e-10, set_grad=True, stochastic=False
) -> list[Any]:
    """Hypergradient by K steps of conjugate gradients on (I − ∂₁Φᵀ) v = ∇₁E. Arguments and cost: as `fixed_point`.

    I − ∂₁Φ must be symmetric positive definite, as it is for a gradient step on a strongly convex loss. A warning tells
    if it is not (momentum, an equilibrium cell): use `fixed_point` or `CG_normaleq` then.

    Source: Pedregosa 2016; Grazzi et al. 2020, section 2.2 (AID-CG).

    Example:
        >>> inner = lambda params, hparams: ((params[0] - hparams[0]) ** 2).sum() / 2  # w* = λ
        >>> outer = lambda params, hparams: ((params[0] - 2) ** 2).sum() / 2
        >>> w, lam = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> _ = hg.CG([w], [lam], 20, hg.GradientDescent(inner, 0.5), outer)
        >>> lam.grad.round(decimals=3)
        tensor([-2., -2.])
    """
    solver, form, draws = solvers.CG(max_steps=K, rtol=tol, on_failure="ignore"), {"fp_map": fp_map}, int(stochastic)
    return _implicit(params, hparams, outer_loss, solver, set_grad, form, draws=draws, symmetric=True).grads


def CG_normaleq(
    params: Tensors, hparams: Tensors, K: int, fp_map: Map, outer_loss: Loss, tol=1e-10, set_grad=True
) -> list[Any]:
    """Hypergradient by K steps of conjugate gradients on the normal equations, for any Φ. Arguments: as `fixed_point`.

    Cost: K products with ∂₁Φᵀ and K with ∂₁Φ, all from one evaluation of Φ, and the product with ∂₂Φᵀ.
    Source: Grazzi et al. 2020, section 2.2.

    Example:
        >>> inner = lambda params, hparams: ((params[0] - hparams[0]) ** 2).sum() / 2  # w* = λ
        >>> outer = lambda params, hparams: ((params[0] - 2) ** 2).sum() / 2
        >>> w, lam = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> _ = hg.CG_normaleq([w], [lam], 20, hg.GradientDescent(inner, 0.5), outer)
        >>> lam.grad.round(decimals=3)
        tensor([-2., -2.])
    """
    solver = solvers.NormalCG(max_steps=K, rtol=tol, on_failure="ignore")
    return _implicit(params, hparams, outer_loss, solver, set_grad, {"fp_map": fp_map}).grads


def exact(opt_params_f: Callable[[Any], Any], hparams: Tensors, outer_loss: Loss, set_grad=True) -> tuple[Any, ...]:
    """Hypergradient by backpropagation through λ ↦ w(λ), a closed form (opt_params_f) of the inner solution.

    hparams, outer_loss, set_grad, result: as in `reverse_unroll`.

    Example:
        >>> outer = lambda params, hparams: ((params[0] - 2) ** 2).sum() / 2
        >>> lam = torch.zeros(2, requires_grad=True)
        >>> hg.exact(lambda hparams: [hparams[0]], [lam], outer)[0]
        tensor([-2., -2.])
    """
    return _backpropagated(lambda hparams: outer_loss(opt_params_f(hparams), hparams), hparams, set_grad, False)


def stoch_AID(
    params: Tensors,
    hparams: Tensors,
    outer_loss: Loss,
    K: int,
    J_inner: int = 1,
    J_outer: int = 1,
    fp_map: Map | None = None,
    inner_loss: Loss | None = None,
    linsys_start: Tensors | None = None,
    stoch_outer: bool = False,
    stoch_inner: bool = False,
    optim_build: Callable[..., Any] | None = None,
    opt_params: dict[str, Any] | None = None,
    set_grad: bool = True,
    verbose: bool = True,
) -> tuple[list[Any], list[Any]]:
    """Stochastic hypergradient: K steps of a torch optimizer on the linear system, with a new draw at each step.

    Args: as `fixed_point`, and
        J_inner: number of draws of the inner problem over which the last product is averaged (1 unless stoch_inner).
        J_outer: number of draws of outer_loss that are averaged (1 unless stoch_outer).
        fp_map, inner_loss: Φ, or g; exactly one of them.
        linsys_start: the first v, such as the second result of the previous call; ∇₁E if None.
        stoch_outer, stoch_inner: whether outer_loss, and fp_map or inner_loss, draw anew at every evaluation.
        optim_build: (tensors, **opt_params) ↦ (optimizer, scheduler), or an optimizer alone; SGD(lr=1) if None.
        opt_params: keywords for optim_build.
        verbose: print the residual of the linear system, five times.

    Returns: (∇f(λ), v), lists like hparams and like params.
    Raises: ValueError if v is not finite in the end, or for J > 1 without its stoch flag; else as `implicit.grad`.
    Cost: J_outer evaluations of outer_loss, K products, J_inner last products.
    Source: Grazzi, Pontil and Salzo 2021, Algorithm 1.

    Example:
        >>> inner = lambda params, hparams: ((params[0] - hparams[0]) ** 2).sum() / 2  # w* = λ
        >>> outer = lambda params, hparams: ((params[0] - 2) ** 2).sum() / 2
        >>> w, lam = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> _ = hg.stoch_AID([w], [lam], outer, 20, fp_map=hg.GradientDescent(inner, 0.5), verbose=False)
        >>> lam.grad.round(decimals=3)
        tensor([-2., -2.])
    """
    for J, stochastic, name in ((J_inner, stoch_inner, "inner"), (J_outer, stoch_outer, "outer")):
        if J < 1 or (J > 1 and not stochastic):
            raise ValueError(f"J_{name} must be 1, or more with stoch_{name}=True; got {J}")

    def averaged_loss(params: Any, hparams: Any) -> Tensor:
        return torch.stack([as_scalar(outer_loss(params, hparams), "outer_loss") for _ in range(J_outer)]).mean()

    build = partial(optim_build or partial(torch.optim.SGD, lr=1.0), **(opt_params or {}))
    solver, draws = solvers.Optimizer(max_steps=K, build=build, on_failure="ignore"), J_inner if stoch_inner else 0
    forms, fatal = {"fp_map": fp_map, "inner_loss": inner_loss}, (Status.NON_FINITE,)
    result = _implicit(
        params, hparams, averaged_loss, solver, set_grad, forms, draws=draws, start=linsys_start, fatal=fatal
    )
    if verbose:
        for k in range(0, K + 1, max(K // 5, 1)):
            print(f"k={k}: linear system, ‖b − Av‖ = {float(result.solution.trace[k]):.3e}")
    return result.grads, list(result.adjoint)


def grd(a: Any, b: Any) -> tuple[Tensor, ...]:
    """The gradient of a with respect to the tensors b, with a graph.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> (gradient,) = hg.grd((w**3).sum(), [w])
        >>> hg.grd(gradient.sum(), [w])[0].detach()  # the second derivative
        tensor([ 6., 12.])
    """
    return torch_grad(a, b, create_graph=True, retain_graph=True)


def list_dot(l1: Sequence[Tensor], l2: Sequence[Tensor]) -> Tensor:
    """⟨l1, l2⟩ of two lists of tensors.

    Example:
        >>> hg.list_dot([torch.ones(2), torch.tensor(3.0)], [torch.ones(2), torch.tensor(2.0)])
        tensor(8.)
    """
    return torch.stack([(a * b).sum() for a, b in zip(l1, l2, strict=True)]).sum()


def jvp(fp_map: Callable[[Any], Any], params: Sequence[Tensor], vs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """∂fp_map(params) · vs, with a graph, from one evaluation of fp_map.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hg.jvp(lambda params: [params[0] ** 2], [w], [torch.ones(2)])[0].detach()
        tensor([2., 4.])
    """
    value = fp_map(params)
    cotangents = [torch.ones_like(y).requires_grad_() for y in value]
    pulled = grad_unused_zero(list_dot(value, cotangents), params, create_graph=True)
    return grad_unused_zero(list_dot(vs, pulled), cotangents, create_graph=True)


def get_outer_gradients(
    outer_loss: Tensor, params: Sequence[Tensor], hparams: Sequence[Tensor], retain_graph=True
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """∇₁E and ∇₂E of an evaluated outer loss; zeros for what it does not depend on.

    Example:
        >>> w, lam = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2, requires_grad=True)
        >>> hg.get_outer_gradients((lam * w**2).sum(), [w], [lam])
        ((tensor([2., 4.]),), (tensor([1., 4.]),))
    """
    params = list(params)
    grads = grad_unused_zero(outer_loss, [*params, *hparams], retain_graph=retain_graph)
    return grads[: len(params)], grads[len(params) :]


def cat_list_to_tensor(list_tx: Sequence[Tensor]) -> Tensor:
    """All entries as one vector.

    Example:
        >>> hg.cat_list_to_tensor([torch.ones(1), torch.zeros(2, 1)])
        tensor([1., 0., 0.])
    """
    return torch.cat([x.reshape(-1) for x in list_tx])


def update_tensor_grads(hparams: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add gradients to .grad as they are: no hook runs, and nothing is propagated through the graph of hparams.

    Example:
        >>> lam = torch.zeros(2, requires_grad=True)
        >>> hg.update_tensor_grads([lam], [torch.ones(2)])
        >>> hg.update_tensor_grads([lam], [torch.ones(2)])
        >>> lam.grad
        tensor([2., 2.])
    """
    pairs = list(zip(hparams, grads, strict=True))
    for h, g in pairs:
        if g is not None and g.shape != h.shape:
            raise ValueError(f"a gradient must have the shape of its tensor, {tuple(h.shape)}, got {tuple(g.shape)}")
    for h, g in pairs:
        h.grad = torch.zeros_like(h) if h.grad is None else h.grad
        if g is not None:
            h.grad += g


def grad_unused_zero(
    output: Any,
    inputs: Sequence[Tensor],
    grad_outputs: Any = None,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """torch.autograd.grad with zeros for inputs that output does not depend on.

    Example:
        >>> w, unused = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(3, requires_grad=True)
        >>> hg.grad_unused_zero((w**2).sum(), [w, unused])
        (tensor([2., 4.]), tensor([0., 0., 0.]))
    """
    outputs, cotangents = ([x] if isinstance(x, Tensor) else x for x in (output, grad_outputs))
    flags: Any = {"retain_graph": retain_graph, "create_graph": create_graph}
    return tuple(_autodiff.grad(outputs, list(inputs), cotangents, **flags))
