"""HyperTorch's functional interface: the same names, arguments and defaults; lists of tensors in, a list out.

What is different from HyperTorch: `tol` is relative to ‖∇₁E‖ (there it was absolute), CG returns its last iterate
(there the one before), unused params and hparams count as zero everywhere, and a system that was not solved is said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autodiff, _random, implicit, solvers
from ._autodiff import Linearisation, as_scalar
from ._solution import Solution, Status, warn_if_not_finite
from ._tree import flatten

Loss = Callable[[Any, Any], Tensor]
Map = Callable[[Any, Any], Any]


def _list(tensors: Any, name: str) -> list[Tensor]:
    """A list of what the caller gave as one; a bare tensor would fall apart into its rows."""
    if isinstance(tensors, (Tensor, dict)):
        raise TypeError(
            f"{name} must be a list of tensors, got {type(tensors).__name__}; implicit.grad takes any pytree"
        )
    return list(tensors)


def _deliver(hparams: Sequence[Tensor], grads: Sequence[Tensor], set_grad: bool) -> list[Tensor]:
    """The list of gradients, added to .grad if asked."""
    if set_grad:
        implicit.accumulate(hparams, grads)
    return list(grads)


def _backpropagated(
    evaluate: Callable[[list[Tensor]], Tensor], hparams: Sequence[Tensor], set_grad: bool, retain_graph: bool
) -> list[Tensor]:
    """∇ of an outer loss whose graph reaches hparams, in memory of its own."""
    leaves, names, _ = flatten(_list(hparams, "hparams"), "hparams")
    needed = implicit.check_hparams(leaves, names)
    with _random.random_state_kept_on_error(leaves):
        with torch.enable_grad():
            loss = as_scalar(evaluate(leaves), "outer_loss")
        each = iter(_autodiff.grad([loss], needed, retain_graph=retain_graph))
        grads = [next(each).clone() if leaf.requires_grad else torch.zeros_like(leaf) for leaf in leaves]
        warn_if_not_finite(grads)
        return _deliver(leaves, grads, set_grad)


def _as_asked(solution: Solution) -> bool:
    """Whether a solve short of tol did its K steps, or all that the dtype allows: ‖b − Av‖ ≤ 10 ε (‖b‖ + ‖v‖)."""
    if solution.status is not Status.STAGNATED:
        return solution.status is Status.MAX_STEPS
    stretch = (solution.value / solution.rhs_norm).norm()
    return bool(solution.relative_residual <= 10 * solution.value.space.eps * (1 + stretch))


def _implicit(
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    solver: solvers.LinearSolver,
    fp_map: Map,
    outer_loss: Loss,
    set_grad: bool,
    stochastic: bool = False,
    symmetric: bool = False,
) -> list[Tensor]:
    """implicit.grad on lists; warns of a failed solve, but not of what the caller asked for: see `_as_asked`."""
    params, hparams = _list(params, "params"), _list(hparams, "hparams")
    with _random.random_state_kept_on_error(params):
        result = implicit.grad(
            outer_loss,
            params=params,
            hparams=hparams,
            fp_map=fp_map,
            solver=solver,
            stochastic=stochastic,
            symmetric=symmetric,
        )
        if not _as_asked(result.solution):
            result.solution.report("the adjoint system of the hypergradient", "warn")
        result.check_finite()
        if not stochastic:
            result.warn_if_unsolved()
        return _deliver(hparams, result.grads, set_grad)


def reverse_unroll(
    params: Sequence[Tensor], hparams: Sequence[Tensor], outer_loss: Loss, set_grad: bool = True
) -> list[Tensor]:
    """Hypergradient by backpropagation through the graph that params bring along.

    Args:
        params: w_T(λ), as an inner loop with create_graph=True leaves it.
        hparams: λ, the tensors that loop started from.
        outer_loss: E(params, hparams), scalar.
        set_grad: add the result to hparams' .grad, as backward() does.

    Returns: ∇f(λ) of f(λ) = E(w_T(λ), λ), a list like hparams.
    Raises: ValueError where outer_loss is no scalar.
    Cost: one reverse pass through all steps, whose graph is kept.
    Source: Grazzi et al. 2020, section 2.1 (ITD).

    Example:
        >>> lam = torch.tensor([3.0], requires_grad=True)
        >>> reverse_unroll([lam / 2], [lam], lambda w, lam: (w[0] ** 2).sum())
        [tensor([1.5000])]
    """
    params = _list(params, "params")
    return _backpropagated(lambda hparams: outer_loss(params, hparams), hparams, set_grad, retain_graph=True)


def reverse(
    params_history: Sequence[Sequence[Tensor]],
    hparams: Sequence[Tensor],
    update_map_history: Sequence[Map],
    outer_loss: Loss,
    set_grad: bool = True,
) -> list[Tensor]:
    """Hypergradient by reverse mode through stored iterates, one step's graph at a time.

        α ← ∇₁E(w_T, λ);   for t = T … T − K + 1:   ∇ ← ∇ + ∂₂Φ_tᵀ α,   α ← ∂₁Φ_tᵀ α

    Args:
        params_history: the last K + 1 iterates, w_{T−K} … w_T.
        hparams: λ.
        update_map_history: the maps between them, the last of which gave w_T; at least K.
        outer_loss: E(params, hparams), scalar.
        set_grad: add the result to hparams' .grad, as backward() does.

    Returns: ∇f(λ), through the last K steps, a list like hparams.
    Raises: ValueError for fewer maps than steps, or a map whose result is not like its argument.
    Cost: K evaluations of the map and K reverse passes; the memory of one step beside the iterates.
    Source: Grazzi et al. 2020, Algorithm 1 (reverse); Franceschi et al. 2017.

    Example:
        >>> lam = torch.tensor([3.0], requires_grad=True)
        >>> step = lambda w, lam: [w[0] / 2 + lam[0]]
        >>> history = [[torch.tensor([0.0])], [torch.tensor([3.0])], [torch.tensor([4.5])]]
        >>> reverse(history, [lam], [step, step], lambda w, lam: w[0].sum())
        [tensor([1.5000])]
    """
    hparams = _list(hparams, "hparams")
    steps = len(params_history) - 1
    if steps < 0:
        raise ValueError("params_history holds no iterate; it needs w_T at least")
    if len(update_map_history) < steps:
        raise ValueError(f"{steps + 1} iterates need {steps} maps, got {len(update_map_history)}")
    variables = implicit.Variables(_list(params_history[-1], "params"), hparams)
    with _random.random_state_kept_on_error(variables.given):
        _, alpha, direct = implicit.outer_gradients(outer_loss, variables)
        total = [g.clone() for g in _autodiff.or_zeros(direct, variables.differentiated)]
        for t in range(steps):
            variables = implicit.Variables(_list(params_history[-2 - t], "params"), hparams)
            with torch.enable_grad():
                value = update_map_history[-1 - t](variables.params, variables.hparams)
            outputs = alpha.space.check(value, "the value of the update map")
            step = Linearisation(outputs, variables.leaves, variables.differentiated)
            pulled, cross = step.vjp_both(alpha.leaves, retain_graph=False)
            alpha, total = variables.space.pack(pulled), _autodiff.add(total, cross)
        warn_if_not_finite(total)
        return _deliver(hparams, variables.outer_grads(total), set_grad)


def fixed_point(
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    K: int,
    fp_map: Map,
    outer_loss: Loss,
    tol: float = 1e-10,
    set_grad: bool = True,
    stochastic: bool = False,
) -> list[Tensor]:
    """Hypergradient by K steps of v ← ∂₁Φᵀv + ∇₁E from zero: reverse mode through K steps at the solution.

    Args:
        params: w, a list of tensors at (or near) the fixed point.
        hparams: λ, a list of tensors.
        K: steps.
        fp_map: Φ(params, hparams), a list like params.
        outer_loss: E(params, hparams), scalar.
        tol: stop earlier once ‖∇₁E − Aᵀv‖ ≤ tol · ‖∇₁E‖, looked at every fifth step.
        set_grad: add the result to hparams' .grad, as backward() does.
        stochastic: fp_map is drawn anew at every product.

    Returns: ∇f(λ) ≈ ∇₂E + ∂₂Φᵀv, a list like hparams.
    Raises, Warns: as `implicit.grad`; fewer steps than tol would need are no failure.
    Cost: K products, the last with respect to params and hparams together.
    Source: Grazzi et al. 2020, section 2.2 (AID-FP).

    Example:
        >>> lam = torch.tensor([3.0], requires_grad=True)
        >>> fixed_point(
        ...     [lam.detach()], [lam], 20, lambda w, lam: [(w[0] + lam[0]) / 2], lambda w, lam: w[0].sum() ** 2 / 2
        ... )
        [tensor([3.0000])]
    """
    solver = solvers.FixedPoint(max_steps=K, rtol=tol, check_every=5, on_failure="ignore")
    return _implicit(params, hparams, solver, fp_map, outer_loss, set_grad, stochastic=stochastic)


def neumann(
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    K: int,
    fp_map: Map,
    outer_loss: Loss,
    tol: float = 1e-10,
    set_grad: bool = True,
) -> list[Tensor]:
    """Hypergradient by K + 1 terms of the Neumann series: what `fixed_point` gives with K + 1 steps.

    Args: those of `fixed_point`.
    Cost: K products and the last.
    Source: Lorraine, Vicol and Duvenaud 2020; Liao et al. 2018.
    """
    solver = solvers.Neumann(max_steps=K, rtol=tol, check_every=5, on_failure="ignore")
    return _implicit(params, hparams, solver, fp_map, outer_loss, set_grad)


def CG(
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    K: int,
    fp_map: Map,
    outer_loss: Loss,
    tol: float = 1e-10,
    set_grad: bool = True,
    stochastic: bool = False,
) -> list[Tensor]:
    """Hypergradient by K steps of conjugate gradients on (I − ∂₁Φᵀ) v = ∇₁E.

    Calling this declares I − ∂₁Φ symmetric positive definite, as it is for a gradient step on a strongly convex loss.
    A Φ for which it is not (momentum, an equilibrium cell) is found and warned of: use `fixed_point` or `CG_normaleq`
    there.

    Args: those of `fixed_point`.
    Cost: K products and the last.
    Source: Pedregosa 2016; Grazzi et al. 2020, section 2.2 (AID-CG).
    """
    solver = solvers.CG(max_steps=K, rtol=tol, on_failure="ignore")
    return _implicit(params, hparams, solver, fp_map, outer_loss, set_grad, stochastic=stochastic, symmetric=True)


def CG_normaleq(
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    K: int,
    fp_map: Map,
    outer_loss: Loss,
    tol: float = 1e-10,
    set_grad: bool = True,
) -> list[Tensor]:
    """Hypergradient by K steps of conjugate gradients on the normal equations, for any Φ.

    Args: those of `fixed_point`.
    Cost: K products with ∂₁Φᵀ and K with ∂₁Φ, all from one evaluation of Φ, and the last.
    Source: Grazzi et al. 2020, section 2.2.
    """
    solver = solvers.NormalCG(max_steps=K, rtol=tol, on_failure="ignore")
    return _implicit(params, hparams, solver, fp_map, outer_loss, set_grad)


def stoch_AID(
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    outer_loss: Loss,
    K: int,
    J_inner: int = 1,
    J_outer: int = 1,
    fp_map: Map | None = None,
    inner_loss: Loss | None = None,
    linsys_start: Sequence[Tensor] | None = None,
    stoch_outer: bool = False,
    stoch_inner: bool = False,
    optim_build: Callable[..., Any] | None = None,
    opt_params: dict[str, Any] | None = None,
    set_grad: bool = True,
    verbose: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Stochastic hypergradient: K steps of a torch optimizer on the linear system, a new draw at each.

    Args:
        params, hparams, outer_loss, set_grad: as in `fixed_point`.
        K: steps of the optimizer.
        J_inner: draws of the inner problem over which the last product is averaged (1 unless stoch_inner).
        J_outer: draws of outer_loss that are averaged (1 unless stoch_outer).
        fp_map, inner_loss: Φ, or g; exactly one.
        linsys_start: v to start from, the second result of the call before; ∇₁E if None.
        stoch_outer, stoch_inner: whether outer_loss, and fp_map or inner_loss, draw anew at every evaluation.
        optim_build: (tensors, **opt_params) ↦ (optimizer, scheduler), or an optimizer alone; SGD(lr=1) if None.
        opt_params: keywords for optim_build.
        verbose: print the residual of the linear system, five times.

    Returns: (∇f(λ), v), lists like hparams and like params.
    Raises: ValueError where v is not finite in the end, or for J > 1 without its stoch flag; else as `implicit.grad`.
    Cost: J_outer evaluations of outer_loss, K products, J_inner last products.
    Source: Grazzi, Pontil and Salzo 2021, Algorithm 1.
    """
    params, hparams = _list(params, "params"), _list(hparams, "hparams")
    for name, draws, flag, noisy in (
        ("J_inner", J_inner, "stoch_inner", stoch_inner),
        ("J_outer", J_outer, "stoch_outer", stoch_outer),
    ):
        if draws < 1 or (draws > 1 and not noisy):
            raise ValueError(f"{name} must be 1, or more with {flag}=True; got {draws}")

    def averaged_loss(params: Any, hparams: Any) -> Tensor:
        return torch.stack([as_scalar(outer_loss(params, hparams), "outer_loss") for _ in range(J_outer)]).mean()

    build = optim_build or (lambda tensors: torch.optim.SGD(tensors, lr=1.0))
    solver = solvers.Optimizer(
        max_steps=K, build=lambda tensors: build(tensors, **(opt_params or {})), on_failure="ignore"
    )
    with _random.random_state_kept_on_error(params):
        result = implicit.grad(
            averaged_loss,
            params=params,
            hparams=hparams,
            fp_map=fp_map,
            inner_loss=inner_loss,
            solver=solver,
            x0=linsys_start,
            stochastic=stoch_inner,
            final_draws=J_inner,
        )
        if verbose:
            for k in range(0, K + 1, max(K // 5, 1)):
                print(f"k={k}: linear system, ‖b − Av‖ = {float(result.solution.trace[k]):.3e}")
        if result.solution.status is Status.NON_FINITE:
            raise ValueError(f"the linear system of the hypergradient: {result.solution.message}")
        result.check_finite()
        if not stoch_inner:
            result.warn_if_unsolved()
        return _deliver(hparams, result.grads, set_grad), list(result.adjoint)


def exact(
    opt_params_f: Callable[[Any], Any], hparams: Sequence[Tensor], outer_loss: Loss, set_grad: bool = True
) -> list[Tensor]:
    """Hypergradient by backpropagation through a closed form of the inner solution.

    Args:
        opt_params_f: λ ↦ w(λ), differentiable.
        hparams, outer_loss, set_grad: as in `fixed_point`.

    Returns: ∇f(λ), a list like hparams.
    Cost: one evaluation and one reverse pass.

    Example:
        >>> lam = torch.tensor([3.0], requires_grad=True)
        >>> exact(lambda lam: [2 * lam[0]], [lam], lambda w, lam: w[0].sum())
        [tensor([2.])]
    """
    return _backpropagated(lambda hparams: outer_loss(opt_params_f(hparams), hparams), hparams, set_grad, False)
