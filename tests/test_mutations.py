"""Deliberately wrong methods (mutants): the comparisons of the other tests must reject every one of them.

A mutant replaces the adjoint solver inside every public method (all of them call `_hypergradient.solve`), or the
product of one step in `reverse`. Each test prints how many mutants it ran and how many it caught.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import hypergrad as hg
from helpers import EXACT, S, as_lists, assert_agrees, dense_system, hypergradient, problem_at
from hypergrad import _autodiff
from hypergrad._autodiff import Linearisation
from hypergrad.implicit import _hypergradient
from hypergrad.solvers import solve
from hypergrad.solvers._direct import materialise
from problems import PROBLEMS
from test_oracles import flat, forms, relative

pytestmark = pytest.mark.filterwarnings("ignore::hypergrad.HypergradientWarning")
QUIET = {"on_failure": "ignore"}


def exact(op, b):
    """The solution of Aᵀv = b to rounding."""
    return S.Dense(**QUIET)(op, b).value


def blocks(a: torch.Tensor, cut: int) -> torch.Tensor:
    """The matrix with everything outside of its two diagonal blocks set to zero."""
    kept = torch.zeros_like(a)
    kept[..., :cut, :cut] = a[..., :cut, :cut]
    kept[..., cut:, cut:] = a[..., cut:, cut:]
    return kept


def dense(op, b, change):
    """A solver of the wrong system change(Aᵀ) v = b."""
    factors = torch.linalg.lu_factor(change(materialise(op, b)))
    return b.space.from_flat(torch.linalg.lu_solve(*factors, b.flat()[..., None])[..., 0])


def half_converged(op, b):
    """GMRES stopped after half of the steps that it needs for 1e-8."""
    steps = S.GMRES(restart=60, rtol=1e-8, max_steps=3000, **QUIET)(op, b).steps
    half = int(torch.as_tensor(steps).max()) // 2
    return S.GMRES(restart=60, max_steps=half, **QUIET)(op, b).value


def rounded(op, b):
    v = exact(op, b)
    return b.space.from_flat(v.flat().float().to(b.space.dtype))


def without_last(op, b):
    """The exact v with its last entry set to zero."""
    v = exact(op, b).flat().clone()
    v[..., -1] = 0.0
    return b.space.from_flat(v)


MUTANTS = {
    "identity": lambda op, b: b.copy(),
    "zero": lambda op, b: b.zeros(),
    "sign flip": lambda op, b: -exact(op, b),
    "scaled by 1.001": lambda op, b: exact(op, b) * 1.001,
    "scaled by 1 + 1e-9": lambda op, b: exact(op, b) * (1 + 1e-9),
    "diagonal": lambda op, b: dense(op, b, lambda a: torch.diag_embed(a.diagonal(dim1=-2, dim2=-1))),
    "diagonal blocks": lambda op, b: dense(op, b, lambda a: blocks(a, a.shape[-1] // 3)),
    "transposed": lambda op, b: dense(op, b, lambda a: a.mT.contiguous()),
    "damped": lambda op, b: dense(op, b, lambda a: a + 1e-6 * torch.eye(a.shape[-1]).to(a.dtype)),
    "half converged": half_converged,
    "rounded to float32": rounded,
    "last entry lost": without_last,
    "one Neumann term": lambda op, b: b + b - op(b),
}


def applicable(p, mutant: str) -> bool:
    """Whether the mutant gives a wrong result: the transposed system of a symmetric problem is the right system."""
    return not (mutant == "transposed" and p.symmetric)


def caught(comparison) -> bool:
    try:
        comparison()
    except AssertionError:
        return True
    return False


def report(capsys, what: str, fates: dict[str, bool]) -> None:
    """Print the counts, and fail if a mutant survived."""
    with capsys.disabled():
        print(f"\n{what}: {sum(fates.values())} of {len(fates)} mutants caught", end="")
    assert [name for name, was_caught in fates.items() if not was_caught] == []


def replaced(monkeypatch, mutant) -> None:
    """Make every method of the library solve its adjoint system by the mutant."""

    def wrong_solve(solver, op, b, x0, last_product=None):
        return solve(lambda op, b, x0: mutant(op, b), op, b, x0, last_product)

    monkeypatch.setattr(_hypergradient, "solve", wrong_solve)


# The unbatched equilibrium is one system of 1280 unknowns; the batched one has the same blocks.
SMALL = [name for name in PROBLEMS if name != "equilibrium"]
FORMS = [(name, form) for name in SMALL for form in forms(problem_at(name))]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("form", ["inner_loss", "fp_map", "residual"])
def test_wrong_solvers_in_implicit_grad(form, seed, capsys):
    """Every wrong solver fails the comparison of the tests of implicit on every problem, and the right one passes."""
    fates = {}
    for name in SMALL:
        p = problem_at(name, seed)
        if form not in forms(p):
            continue
        assert not caught(lambda p=p: assert_agrees(p, hypergradient(p, form, lambda op, b, x0: exact(op, b)).grads))
        for mutant, solver in MUTANTS.items():
            if applicable(p, mutant):
                grads = hypergradient(p, form, lambda op, b, x0, f=solver: f(op, b)).grads
                fates[f"{name} × {mutant}"] = caught(lambda p=p, grads=grads: assert_agrees(p, grads))
    report(capsys, f"implicit.grad, {form}, seed {seed}", fates)


def to_tolerance(function, p):
    return function(p.params, p.hparams, 400, p.fp_map, p.outer_loss, tol=1e-13, set_grad=False)


METHODS = {
    **{name: partial(to_tolerance, getattr(hg, name)) for name in ("CG", "CG_normaleq", "fixed_point", "neumann")},
    "stoch_AID": lambda p: hg.stoch_AID(
        p.params, p.hparams, p.outer_loss, 250, fp_map=p.fp_map, set_grad=False, verbose=False
    )[0],
    "implicit.backward": lambda p: (
        hg.implicit.backward(
            p.outer_loss,
            params=p.params,
            hparams=p.hparams,
            fp_map=p.fp_map,
            symmetric=p.symmetric,
            solver=S.GMRES(restart=60, rtol=1e-13, **QUIET),
        ).grads
    ),
}
FOR_METHODS = ["logistic", "quadratic-10", "contraction-.9"]  # HyperTorch's methods all converge quickly on these


def fresh(name: str):
    """The problem with lists for params and hparams, whose .grad tests may write."""
    p = as_lists(problem_at(name, 1))
    return replace(p, hparams=[h.detach().clone().requires_grad_() for h in p.hparams])


@pytest.mark.parametrize("method", METHODS)
def test_wrong_solvers_in_every_method(method, monkeypatch, capsys):
    """The methods pass unchanged (CG only if A is symmetric), and fail with each wrong solver inside."""
    fates = {}
    for name in FOR_METHODS:
        p = fresh(name)
        if method == "CG" and not p.symmetric:
            continue
        assert_agrees(p, METHODS[method](p))
        for mutant, solver in MUTANTS.items():
            if applicable(p, mutant):
                with monkeypatch.context() as patch:
                    replaced(patch, solver)
                    fates[f"{name} × {mutant}"] = caught(lambda p=p: assert_agrees(p, METHODS[method](p)))
    report(capsys, method, fates)


# --- early iterates ---------------------------------------------------------------------------------------------------


def krylov_optimum(a: np.ndarray, b: np.ndarray, steps: int) -> np.ndarray:
    """argmin ‖v − A⁻¹b‖_A over span(b, …, A^{K−1}b)."""
    q = b[:, None] / np.linalg.norm(b)
    for _ in range(steps - 1):
        q = np.linalg.qr(np.column_stack([q, a @ q[:, -1]])).Q
    return q @ np.linalg.solve(q.T @ a @ q, q.T @ b)


def partial_sum(a: np.ndarray, b: np.ndarray, steps: int) -> np.ndarray:
    """Σ_{k<K} (I − A)ᵏ b."""
    v = np.zeros_like(b)
    for _ in range(steps):
        v = v - a @ v + b
    return v


STEPS = 5
EARLY = {
    "CG": (hg.CG, S.CG, krylov_optimum, 0),
    "fixed_point": (hg.fixed_point, S.FixedPoint, partial_sum, 0),
    "neumann": (hg.neumann, S.Neumann, partial_sum, 1),
}


@pytest.mark.parametrize("method", EARLY)
def test_iterates_before_and_after(method, monkeypatch, capsys):
    """K steps must give the K-th iterate, not the one before, which HyperTorch's CG returns, nor the one after."""
    function, kind, truth, more = EARLY[method]
    fates = {}
    for name in SMALL:
        if problem_at(name).batch_dims or (method == "CG" and not problem_at(name).symmetric):
            continue
        p = as_lists(problem_at(name, 1))
        a, b, direct, cross = dense_system(name, "fp_map", 1)
        owed = direct - cross @ truth(a, b, STEPS + more)

        def comparison(p=p, owed=owed):
            grads = function(p.params, p.hparams, STEPS, p.fp_map, p.outer_loss, set_grad=False)
            assert relative(flat(grads), owed) <= EXACT

        comparison()
        for shift in (-1, 1):
            with monkeypatch.context() as patch:
                replaced(patch, lambda op, b, s=shift: kind(max_steps=STEPS + s, **QUIET)(op, b).value)
                fates[f"{name} × iterate {shift:+d}"] = caught(comparison)
    report(capsys, f"{method} after {STEPS} steps", fates)


# --- reverse ----------------------------------------------------------------------------------------------------------

RIGHT = Linearisation.vjp_both
REVERSE_MUTANTS = {
    "sign of α": lambda self, v, keep: ([-x for x in RIGHT(self, v, True)[0]], RIGHT(self, v, True)[1]),
    "sign of ∂₂Φᵀα": lambda self, v, keep: (RIGHT(self, v, True)[0], [-x for x in RIGHT(self, v, True)[1]]),
    "α scaled by 1.001": lambda self, v, keep: ([1.001 * x for x in RIGHT(self, v, True)[0]], RIGHT(self, v, True)[1]),
    "α forgotten": lambda self, v, keep: ([0 * x for x in RIGHT(self, v, True)[0]], RIGHT(self, v, True)[1]),
    "α unchanged": lambda self, v, keep: (list(v), RIGHT(self, v, True)[1]),
    "J for Jᵀ": lambda self, v, keep: (self.jvp(v), RIGHT(self, v, True)[1]),
}


def test_wrong_products_in_reverse(monkeypatch, capsys):
    """Reverse mode through K steps at the solution, against dense powers of ∂₁Φᵀ."""
    fates = {}
    for name in SMALL:
        p = as_lists(problem_at(name, 1))
        if p.batch_dims:
            continue
        a, b, direct, cross = dense_system(name, "fp_map", 1)
        owed = direct - cross @ partial_sum(a, b, STEPS)

        def comparison(p=p, owed=owed):
            grads = hg.reverse([p.params] * (STEPS + 1), p.hparams, [p.fp_map] * STEPS, p.outer_loss, set_grad=False)
            assert relative(flat(grads), owed) <= EXACT

        comparison()
        for mutant, product in REVERSE_MUTANTS.items():
            if mutant == "J for Jᵀ" and p.symmetric:
                continue  # the same matrix
            with monkeypatch.context() as patch:
                patch.setattr(Linearisation, "vjp_both", lambda s, v, retain_graph, f=product: f(s, v, retain_graph))
                fates[f"{name} × {mutant}"] = caught(comparison)
    report(capsys, "reverse", fates)


# --- the last product -------------------------------------------------------------------------------------------------

LAST = {
    "−∂₂Fᵀv added": lambda g, direct, cross: direct - cross,
    "∇₂E forgotten": lambda g, direct, cross: cross,
    "∂₂Fᵀv forgotten": lambda g, direct, cross: direct,
    "∇₂E twice": lambda g, direct, cross: 2 * direct + cross,
}


def test_wrong_assembly_of_the_result(monkeypatch, capsys):
    """Wrong sums of ∇₂E and −∂₂Fᵀv are caught on the quadratics, where neither is zero.

    κ = 1e5 is left out, because ∇₂E is 1e-11 of ∇f there, and every sum is right to 1e-10.
    """
    fates = {}
    original = _autodiff.add_or_none
    for name in ("quadratic-10", "quadratic-1e3"):
        p = problem_at(name, 1)
        for form in forms(p):
            for mutant, change in LAST.items():
                with monkeypatch.context() as patch:
                    patch.setattr(
                        _autodiff,
                        "add_or_none",
                        lambda xs, ys, f=change: [f(None, x, y) for x, y in zip(xs, ys, strict=True)],
                    )
                    grads = hypergradient(p, form, S.Dense()).grads
                fates[f"{name} × {form} × {mutant}"] = caught(lambda p=p, grads=grads: assert_agrees(p, grads))
    assert _autodiff.add_or_none is original
    report(capsys, "assembly", fates)
