"""Problems at params that are not the inner solution, and the errors of hypergradients there."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import optree
import torch
from scipy.optimize import brentq
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss

import oracles
from helpers import problem_at
from problems import Problem
from test_oracles import flat, relative, unflatten


@cache
def plain(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """A reference problem whose params and hparams are one flat tensor each."""
    p = problem_at(name, seed, dtype)

    def packed(f, value=flat):
        return None if f is None else lambda w, h: value(f(unflatten(p.params, w), unflatten(p.hparams, h)))

    return replace(
        p,
        params=flat(p.params),
        hparams=flat(p.hparams).detach().requires_grad_(),
        inner_loss=packed(p.inner_loss, lambda x: x),
        outer_loss=packed(p.outer_loss, lambda x: x),
        fp_map=packed(p.fp_map),
        residual=packed(p.residual),
        grads=[np.concatenate([g.ravel() for g in p.grads])],
    )


def moved(p: Problem, size: float, seed: int = 0) -> Problem:
    """The problem at params a relative distance `size` from the solution."""
    rng = torch.Generator().manual_seed(seed)
    leaves = optree.tree_leaves(p.params)
    away = [torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in leaves]
    scale = size * flat(leaves).norm() / flat(away).norm()
    tree = optree.tree_structure(p.params)
    return replace(p, params=optree.tree_unflatten(tree, [x + scale * u for x, u in zip(leaves, away, strict=True)]))


def error(result, p: Problem) -> float:
    return relative(flat(result), flat([torch.as_tensor(g) for g in p.grads]))


@cache
def breast_cancer(condition: float) -> Problem:
    """Logistic regression whose features share one penalty, chosen so that the Hessian has this condition number."""

    def off(theta: float) -> float:
        return math.log(oracles.logistic(np.full(30, theta)).condition / condition)

    o = oracles.logistic(np.full(30, brentq(off, -14.0, 0.0, xtol=1e-4)))
    x, y, xv, yv = (torch.as_tensor(o.data[k]) for k in ("x", "y", "xv", "yv"))
    template = plain("logistic")
    return replace(
        template,
        params=torch.as_tensor(o.solution),
        hparams=torch.as_tensor(o.hparams[0]).requires_grad_(),
        inner_loss=lambda w, h: log_loss(x @ w, y) + 0.5 * (h.exp() * w * w).sum(),
        outer_loss=lambda w, h: log_loss(xv @ w, yv),
        value=o.value,
        grads=list(o.grads),
        condition=o.condition,
    )


def away_from(p: Problem, size: float, seed: int | None) -> Problem:
    """The problem at params moved in a random direction or, with seed None, towards 0, where inner solvers start."""
    return replace(p, params=(1 - size) * p.params) if seed is None else moved(p, size, seed)


def newton_fit(p: Problem):
    """The map from hparams to the exact solution of breast-cancer logistic regression, by the oracle."""
    return lambda h: torch.as_tensor(oracles.logistic(h.numpy()).solution)
