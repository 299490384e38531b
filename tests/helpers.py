"""Helpers of several test files: comparison with the oracles, the solvers for each problem, checks for side effects."""

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import numpy as np
import optree
import pytest
import torch

import hypergrad as hg
from problems import PROBLEMS, Problem, hypertorch, problem
from test_oracles import equation, flat, forms, relative

S = hg.solvers
EXACT = 1e-10  # relative error of a first-order result in float64


@contextmanager
def default_device(device: str | None):
    """Set torch's default device, and reset it fully: in torch 2.6 get_default_device fails after a reset to None."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", 0) is None:
            del torch._GLOBAL_DEVICE_CONTEXT.device_context


@cache
def problem_at(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """A reference problem, built once and shared: tests must not write into its tensors."""
    make = hypertorch if name == "hypertorch" else lambda **options: problem(name, **options)
    return make(random=seed, dtype=dtype)


def hypergradient(p: Problem, form: str, solver=None, **options) -> hg.Hypergradient:
    """implicit.grad of a problem whose inner problem is given as `form`: inner_loss, fp_map or residual."""
    options = {"symmetric": p.symmetric, "batch_dims": p.batch_dims} | options
    return hg.implicit.grad(
        p.outer_loss, params=p.params, hparams=p.hparams, solver=solver, **{form: getattr(p, form)}, **options
    )


def as_lists(p: Problem) -> Problem:
    """The same problem with lists of tensors for params and hparams, as HyperTorch's interface wants them."""
    trees = [optree.tree_structure(tree) for tree in (p.params, p.hparams)]

    def unpacked(params, hparams):
        return (optree.tree_unflatten(tree, leaves) for tree, leaves in zip(trees, (params, hparams), strict=True))

    def listed(f):
        return None if f is None else lambda w, h: optree.tree_leaves(f(*unpacked(w, h)))

    return replace(
        p,
        params=optree.tree_leaves(p.params),
        hparams=optree.tree_leaves(p.hparams),
        outer_loss=lambda w, h: p.outer_loss(*unpacked(w, h)),
        inner_loss=None if p.inner_loss is None else lambda w, h: p.inner_loss(*unpacked(w, h)),
        fp_map=listed(p.fp_map),
        residual=listed(p.residual),
        adjoint=optree.tree_leaves(p.adjoint),
    )


def errors(result, truth) -> list[float]:
    """‖gᵢ − tᵢ‖ / ‖tᵢ‖ of each leaf."""
    return [relative(g, t) for g, t in zip(optree.tree_leaves(result), optree.tree_leaves(truth), strict=True)]


def assert_agrees(p: Problem, grads, tolerance: float = EXACT) -> None:
    """Assert that ∇f has the structure of hparams and agrees with the oracle in each leaf."""
    assert optree.tree_structure(grads) == optree.tree_structure(p.hparams)
    assert max(errors(grads, p.grads)) <= tolerance


def adjoint_of(p: Problem, form: str):
    """The leaves of the oracle's adjoint v for this form of the inner problem."""
    return [leaf / (p.step if form == "fp_map" else 1.0) for leaf in optree.tree_leaves(p.adjoint)]


@cache
def dense_system(name: str, form: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Aᵀ, ∇₁E, ∇₂E and ∂₂Fᵀ in float64 by dense Jacobians; a batched problem gives one block-diagonal system."""
    p = problem_at(name, seed)
    w, h = flat(p.params), flat(p.hparams).detach()
    shapes = [optree.tree_structure(tree) for tree in (p.params, p.hparams)]

    def outer(w, h):
        pieces = [
            optree.tree_unflatten(shape, [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)])
            for shape, leaves, v in zip(shapes, map(optree.tree_leaves, (p.params, p.hparams)), (w, h), strict=True)
            for parts in [v.split([x.numel() for x in leaves])]
        ]
        return p.outer_loss(*pieces)

    a, cross = torch.func.jacrev(equation(p, form), argnums=(0, 1))(w, h)
    b, direct = torch.func.grad(outer, argnums=(0, 1))(w, h)
    return a.T.numpy(), b.numpy(), direct.numpy(), cross.T.numpy()


def assert_is_gradient_of(p: Problem, form: str, v: np.ndarray, grads, tolerance: float = EXACT, seed: int = 0) -> None:
    """Assert that ∇f = ∇₂E − ∂₂Fᵀv for this v, which holds also for a method that stops early."""
    _, _, direct, cross = dense_system(p.name, form, seed)
    assert relative(flat(grads), direct - cross @ v) <= tolerance


def solvers_for(p: Problem, form: str) -> dict[str, S.LinearSolver]:
    """Every solver that can solve this problem to the accuracy of its dtype, by name.

    CG and MINRES need symmetry. Stationary methods contract by q = ‖I − ηA‖ a step (heavy ball by (√κ−1)/(√κ+1)), so
    log ε / log q steps reach rounding level; they are listed if so many steps are affordable. Methods on the normal
    equations square the condition number and are left out if κ² ε > 1; so is BiCGStab, which has no guarantee there.
    """
    eps = torch.finfo(optree.tree_leaves(p.params)[0].dtype).eps
    condition, contraction = p.condition, p.contraction
    level = {"rtol": 400 * eps if eps < 1e-10 else 2 * eps, "on_failure": "ignore"}
    krylov = {"max_steps": 20_000 if eps < 1e-10 else 1_500} | level

    def stationary(q: float) -> dict:
        return {"max_steps": math.ceil(math.log(eps) / math.log(q)), **level}

    table = {"Dense": S.Dense(**level), "GMRES": S.GMRES(restart=60, **krylov)}
    if condition**2 * eps < 1:
        table |= {"BiCGStab": S.BiCGStab(**krylov), "NormalCG": S.NormalCG(**krylov), "LSQR": S.LSQR(**krylov)}
    if p.symmetric:
        table |= {
            "CG": S.CG(**krylov),
            "MINRES": S.MINRES(**krylov),
            "CG-Nystrom": S.CG(preconditioner=S.Nystrom(rank=10, damping=1e-3), **krylov),
        }
    if contraction <= 0.99:
        step = p.step if form != "fp_map" else 1.0
        table["Neumann"] = S.Neumann(step_size=step, **stationary(contraction))
        if step == 1.0:
            table["FixedPoint"] = S.FixedPoint(**stationary(contraction))
    if p.symmetric and condition <= 1e3:
        low = 2.0 / (1.0 + condition) / (1.0 if form == "fp_map" else p.step)
        rate = (condition**0.5 - 1) / (condition**0.5 + 1)
        heavy_ball = {"lr": (2 / (low**0.5 * (1 + condition**0.5))) ** 2, "momentum": rate**2}
        steps = 2 * math.ceil(math.log(eps) / math.log(rate))
        build = partial(torch.optim.SGD, **heavy_ball)
        table["Optimizer"] = S.Optimizer(build=build, max_steps=steps, **level)
    elif not p.symmetric:
        table["Optimizer"] = S.Optimizer(**stationary(contraction))
    return table


def cases(seeds: tuple[int, ...] = (0,), names: tuple[str, ...] = PROBLEMS, dtype: torch.dtype = torch.float64):
    """(problem, form, solver, seed) for every solver that can solve the problem in that form."""
    return [
        (name, form, solver, seed)
        for seed in seeds
        for name in names
        for form in forms(problem_at(name))
        for solver in solvers_for(problem_at(name, dtype=dtype), form)
    ]


def tensors_in(trees) -> list[torch.Tensor]:
    return [leaf for leaf in optree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def snapshot(x: torch.Tensor) -> tuple:
    """The value, requires_grad, version and .grad of a tensor: what the library must leave as they are."""
    grad = x.grad if x.is_leaf or x.retains_grad else None
    return x.detach().clone(), x.requires_grad, x._version, id(grad), None if grad is None else grad.clone()


def same(before: tuple, after: tuple) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


@contextmanager
def untouched(*trees):
    """Assert that the block changes no value, .grad or requires_grad of these tensors."""
    leaves = tensors_in(trees)
    before = [snapshot(x) for x in leaves]
    yield
    assert all(same(b, snapshot(x)) for b, x in zip(before, leaves, strict=True))


@contextmanager
def nothing_changed(*trees):
    """Assert what `untouched` does, and that the block leaves torch's random state as it was."""
    state = torch.get_rng_state()
    with untouched(*trees):
        yield
    assert torch.equal(torch.get_rng_state(), state), "torch's random state changed"


def noisy(f):
    """f, which first draws random numbers from torch's global generator."""

    def draws_first(*args, **kwargs):
        torch.rand(3)
        return f(*args, **kwargs)

    return draws_first


def share_buffers(patch: pytest.MonkeyPatch, small: int, total: int) -> None:
    """Let leaves of at most `small` entries share a buffer, and all leaves of a problem of at most `total` entries."""
    patch.setattr("hypergrad._vector.SMALL", small)
    patch.setattr("hypergrad._vector.SMALL_TOTAL", total)
