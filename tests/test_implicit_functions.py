"""Solution maps (root, fixed_point, argmin, linear_solve, solver) as differentiable values, against dense oracles."""

import gc
import resource
import warnings
import weakref
from functools import cache, partial

import numpy as np
import optree
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import hypergrad as hg
import oracles
from implicit_cases import (
    ADJOINTS,
    CASES,
    FIRST,
    FORMS,
    SECOND,
    TOLERANCES,
    TRANSFORMS,
    Case,
    Info,
    S,
    WarmStart,
    adjoint_named,
    adjoints_for,
    entropy,
    implicit,
    newton,
    oracle,
    oracle_at,
    picard,
    rel,
    square_root,
    tanh,
)
from problems import PROBLEMS, ROWS, Problem, problem
from test_oracles import flat, forms, relative

SMALL = tanh(5, 0.9)
STATED = {"residual": "residual", "fp_map": "fixed_point", "inner_loss": "argmin"}  # problems' words: the library's
DENSE, TIGHT = ADJOINTS["Dense"], ADJOINTS["GMRES"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def double(value) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- DESIGN's problems ------------------------------------------------------------------------------------------------


@cache
def row(name: str) -> Problem:
    return problem(name)


@cache
def row_curvature(name: str) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """A direction in λ and ∇²f along it, by differences of the NumPy oracle."""
    f = ROWS[name].oracle
    direction = oracles.random_direction(f())
    return direction, oracles.derivative_along(f, direction)[1]


def attached(p: Problem, form: str, hparams, **options):
    options = {"batch_dims": p.batch_dims, "symmetric": p.symmetric} | options
    return FORMS[STATED[form]](getattr(p, form), p.params, hparams, **options)


def row_adjoints(p: Problem) -> dict[str, S.LinearSolver]:
    """Iterative solvers at the accuracy of float64; κ = 1e5 takes the dense one alone."""
    table = {"Dense": DENSE}
    if p.condition < 1e4:
        level = {"rtol": 1e-14, "on_failure": "ignore"}
        table |= {"GMRES": S.GMRES(restart=60, **level)} | ({"CG": S.CG(**level)} if p.symmetric else {})
    return table


@pytest.mark.parametrize(
    ("name", "form", "adjoint"),
    [(name, form, adjoint) for name in PROBLEMS for form in forms(row(name)) for adjoint in row_adjoints(row(name))],
)
def test_first_and_second_derivatives_of_the_reference_problems(name, form, adjoint):
    p = row(name)
    leaves = optree.tree_leaves(p.hparams)
    w = attached(p, form, p.hparams, adjoint=row_adjoints(p)[adjoint])
    assert optree.tree_structure(w) == optree.tree_structure(p.params)
    value = p.outer_loss(w, p.hparams)
    assert relative(value.item(), p.value) < 1e-12

    grads = torch.autograd.grad(value, leaves, retain_graph=True)
    assert max(relative(g, truth) for g, truth in zip(grads, p.grads, strict=True)) < 1e-10

    direction, truth = row_curvature(name)
    to_leaves = lambda flats: optree.tree_leaves(ROWS[name].hparams.pack(as_tensors(flats)))  # noqa: E731
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    products = torch.autograd.grad(grads, leaves, to_leaves(direction))
    assert relative(flat(list(products)), flat(to_leaves(truth))) < 1e-8


def as_tensors(flats: tuple[np.ndarray, ...]):
    new = tuple(torch.from_numpy(np.array(a)) for a in flats)
    return new[0] if len(new) == 1 else new


@pytest.mark.parametrize("name", ["ridge", "logistic", "quadratic-10"])
def test_a_declared_positive_definite_argmin_takes_cholesky_and_cg(name):
    p = row(name)
    for adjoint in (DENSE, S.CG(rtol=1e-13), S.CG(rtol=1e-13, preconditioner=S.Nystrom(rank=5, damping=1e-2))):
        w = attached(p, "inner_loss", p.hparams, adjoint=adjoint, positive_definite=True)
        grads = torch.autograd.grad(p.outer_loss(w, p.hparams), optree.tree_leaves(p.hparams))
        assert max(relative(g, truth) for g, truth in zip(grads, p.grads, strict=True)) < 1e-10


# --- every transform --------------------------------------------------------------------------------------------------

WITH_ADJOINTS = [(case, adjoint) for case in CASES.values() for adjoint in adjoints_for(case)]
# A reverse pass over thirty mapped tangents, each with a Krylov basis of its own.
SLOW = {("tanh-30-2.0-residual", "GMRES", "jacrev(jacfwd)")}


@pytest.mark.parametrize(
    ("case", "adjoint", "transform"),
    [
        pytest.param(c, a, t, id=f"{c.name}-{a}-{t}", marks=pytest.mark.slow if (c.name, a, t) in SLOW else ())
        for c, a in WITH_ADJOINTS
        for t in TRANSFORMS
    ],
)
def test_transforms_agree_with_newtons_method(case, adjoint, transform):
    w, order = case.solution, 1 if transform in FIRST else 2
    value = TRANSFORMS[transform](lambda h: case.value(w, h, adjoint=adjoint_named(adjoint)))(case.hparams)
    assert rel(value, oracle(case, order)) < TOLERANCES[order]


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if "grad" not in t])
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.n <= 12], ids=lambda c: c.name)
def test_jacobians_of_the_solution_itself(case, transform):
    w, order = case.solution, 1 if transform in FIRST else 2
    value = TRANSFORMS[transform](lambda h: case.attach(w, h, adjoint=DENSE))(case.hparams)
    assert rel(value, oracle(case, order, scalar=False)) < TOLERANCES[order]


@pytest.mark.parametrize("case", [SMALL, tanh(5, 0.9, "residual", full=True)], ids=lambda c: c.name)
def test_agrees_with_the_unrolled_iteration(case):
    """A second oracle: the plain iteration, run to 1e-14 under autograd."""
    phi = SMALL.user if case is SMALL else lambda w, h: torch.tanh(h[:25].reshape(5, 5) @ w + h[25:])

    def unrolled(h: Tensor) -> Tensor:
        return case.outer(picard(phi, torch.zeros(5).double(), h), h)

    w = case.solution
    for transform, tolerance in ((jacrev, 1e-13), (hessian, 1e-12)):
        f = transform(lambda h: case.value(w, h, adjoint=TIGHT))
        truth = jacrev(unrolled) if transform is jacrev else jacrev(jacrev(unrolled))
        assert rel(f(case.hparams), truth(case.hparams)) < tolerance


@pytest.mark.parametrize(
    "transform",
    [lambda f: jacrev(jacrev(jacrev(f))), lambda f: jacfwd(jacrev(jacrev(f))), lambda f: jacrev(jacrev(jacfwd(f)))],
    ids=["reverse", "forward last", "forward first"],
)
@pytest.mark.parametrize("case", [SMALL, entropy(5)], ids=lambda c: c.name)
def test_third_derivatives(case, transform):
    w = case.solution
    value = transform(lambda h: case.value(w, h, adjoint=DENSE))(case.hparams)
    assert rel(value, oracle(case, 3)) < TOLERANCES[3]


def test_autograd_gives_what_func_gives():
    case, h = SMALL, SMALL.hparams.clone().requires_grad_()
    (first,) = torch.autograd.grad(case.value(case.solution, h, adjoint=DENSE), h, create_graph=True)
    assert rel(first, oracle(case, 1)) < 1e-10
    rows = [torch.autograd.grad(g, h, retain_graph=True, create_graph=True)[0] for g in first]
    assert rel(torch.stack(rows), oracle(case, 2)) < 1e-8
    (third,) = torch.autograd.grad(rows[3][7], h)
    assert rel(third, oracle(case, 3)[3, 7]) < 1e-7
    value = partial(case.value, case.solution, adjoint=DENSE)
    assert rel(torch.autograd.functional.hessian(value, case.hparams), oracle(case, 2)) < 1e-8
    with pytest.raises(RuntimeError, match="[Bb]atching rule"):  # torch.autograd's own vmap knows no rule for a Function
        torch.autograd.functional.hessian(value, case.hparams, vectorize=True)


def test_forward_mode_of_autograd():
    case, u = SMALL, torch.randn(10).double()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.hparams, u)
        tangent = torch.autograd.forward_ad.unpack_dual(case.value(case.solution, dual, adjoint=DENSE)).tangent
    assert rel(tangent, oracle(case, 1) @ u) < 1e-10


@pytest.mark.parametrize(
    "nested",
    [
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacfwd(lambda h: jvp(f, (h,), (torch.ones_like(h),))[1]),
        lambda f: jacrev(jacfwd(jacfwd(f))),
        lambda f: vmap(jacfwd(jacfwd(f)), in_dims=1),
    ],
)
def test_forward_over_forward_raises_and_says_why(nested):
    case, columns = SMALL, SMALL.hparams[:, None].expand(-1, 2)
    at = columns if nested.__code__.co_names[0] == "vmap" else case.hparams
    with pytest.raises(NotImplementedError, match=r"silently wrong in torch.*jacfwd\(jacrev\)"):
        nested(lambda h: case.value(case.solution, h, adjoint=DENSE))(at)
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jacfwd(jacfwd(lambda a: implicit.linear_solve(hg.operators.matrix(a), a[0], DENSE)))(2 * torch.eye(3))


# --- vmap -------------------------------------------------------------------------------------------------------------


def batch_of(case: Case, count: int) -> tuple[Tensor, Tensor]:
    """Problems of different difficulty (the first nearly linear) and their solutions."""
    h = case.random_hparams(count)
    h = h * torch.linspace(0.05, 1.0, count).double()[:, None] if case.form != "argmin" else h
    return torch.stack([case.solve(one) for one in h]), h


VMAP_CASES = [SMALL, tanh(12, 0.95), tanh(6, 2.0, "residual"), entropy(5)]


@pytest.mark.parametrize("transform", [None, *TRANSFORMS])
@pytest.mark.parametrize("adjoint", ["Dense", "GMRES"])
@pytest.mark.parametrize("case", VMAP_CASES, ids=lambda c: c.name)
def test_vmap_over_problems(case, adjoint, transform):
    w, h = batch_of(case, 3)
    order = 0 if transform is None else 1 if transform in FIRST else 2

    def value(w: Tensor, h: Tensor) -> Tensor:
        f = lambda h: case.value(w, h, adjoint=adjoint_named(adjoint))  # noqa: E731
        return f(h) if transform is None else TRANSFORMS[transform](f)(h)

    truth = torch.stack([oracle_at(case, w[i], h[i], order) for i in range(3)])
    assert rel(vmap(value)(w, h), truth) < TOLERANCES.get(order, 1e-14)
    assert rel(vmap(value, in_dims=1, out_dims=-1)(w.T, h.T).movedim(-1, 0), truth) < TOLERANCES.get(order, 1e-14)


@pytest.mark.parametrize("outside", [grad, jacrev, jacfwd])
def test_derivatives_of_vmapped_solutions(outside):
    case = SMALL
    w, h = batch_of(case, 4)
    value = outside(lambda h: vmap(lambda w, h: case.value(w, h, adjoint=TIGHT))(w, h).sum())(h)
    assert rel(value, torch.stack([oracle_at(case, w[i], h[i], 1) for i in range(4)])) < 1e-10


@pytest.mark.parametrize("solver", [S.GMRES, S.BiCGStab, S.LSQR, S.NormalCG, S.FixedPoint])
def test_each_problem_of_a_vmap_takes_its_own_steps(solver):
    case, info = tanh(12, 0.95), Info()
    w, h = batch_of(case, 5)
    adjoint = solver(rtol=1e-12, max_steps=300)
    g = vmap(grad(lambda h, w: case.value(w, h, adjoint=adjoint, info=info)))(h, w)
    assert rel(g, torch.stack([oracle_at(case, w[i], h[i], 1) for i in range(5)])) < 1e-10
    steps = info.solution.steps
    assert steps.shape == (5,) and steps[0] < steps[-1] and info.solves == 1
    assert info.solution.status is hg.Status.CONVERGED


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("adjoint", ["Dense", "GMRES"])
def test_vmap_of_vmap(adjoint, transform):
    case, order = SMALL, 1 if transform in FIRST else 2
    w, h = batch_of(case, 6)
    f = lambda w, h: TRANSFORMS[transform](lambda h: case.value(w, h, adjoint=adjoint_named(adjoint)))(h)  # noqa: E731
    value = vmap(vmap(f))(w.reshape(2, 3, -1), h.reshape(2, 3, -1)).flatten(0, 1)
    assert rel(value, torch.stack([oracle_at(case, w[i], h[i], order) for i in range(6)])) < TOLERANCES[order]


def test_vmap_over_a_part_of_the_hparams():
    case = SMALL
    _, h = batch_of(case, 3)
    w = torch.stack([case.solve(torch.cat([case.hparams[:5], one[5:]])) for one in h])

    def value(w: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return implicit.fixed_point(lambda w, h: case.user(w, torch.cat(h)), w, (gain, bias), adjoint=TIGHT).sin().sum()

    g, b = vmap(grad(value, argnums=(1, 2)), in_dims=(0, None, 0))(w, case.hparams[:5], h[:, 5:])
    for i in range(3):
        at = torch.cat([case.hparams[:5], h[i, 5:]])
        truth = jacrev(lambda h, w: newton(case.residual, w, h).sin().sum())(at, w[i])
        assert rel(torch.cat([g[i], b[i]]), truth) < 1e-10


def test_a_vmapped_adjoint_that_fails_in_one_entry_says_which():
    h = double([1.0, 0.0, 4.0])
    with pytest.warns(hg.HypergradientWarning, match="1 of 3 systems, the first at index 1"):
        g = vmap(grad(lambda a: square_root(a.sqrt().detach(), a, adjoint=TIGHT)))(h)
    np.testing.assert_allclose(g[[0, 2]], [0.5, 0.25], rtol=1e-12)


# --- gradcheck --------------------------------------------------------------------------------------------------------


def computed(case: Case, **options):
    """The case with its solution found anew at each λ: what finite differences need."""
    return implicit.solver(**{case.form: case.user}, **dict(case.options) | options)(case.solve)


@pytest.mark.parametrize("case", [tanh(3, 0.9), tanh(3, 2.0, "residual"), entropy(3)], ids=lambda c: c.name)
def test_gradcheck_and_gradgradcheck(case):
    h = case.hparams.clone().requires_grad_()
    fit = computed(case, adjoint=DENSE)
    assert torch.autograd.gradcheck(fit, h, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fit, h, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_gradcheck_of_linear_solve():
    a = (torch.randn(3, 3) + 3 * torch.eye(3)).double().requires_grad_()
    b = torch.randn(3).double().requires_grad_()
    f = lambda a, b: implicit.linear_solve(hg.operators.matrix(a), b, DENSE)  # noqa: E731
    assert torch.autograd.gradcheck(f, (a, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (a, b), check_fwd_over_rev=True, check_rev_over_rev=True)
