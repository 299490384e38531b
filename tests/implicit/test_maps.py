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
    options |= {"batch_dims": p.batch_dims} | ({} if form == "inner_loss" else {"symmetric": p.symmetric})
    return FORMS[STATED[form]](getattr(p, form), p.params, hparams, **options)


def row_adjoints(p: Problem) -> dict[str, S.LinearSolver]:
    """Solvers that reach the accuracy of float64: for κ = 1e5 Dense alone, otherwise iterative ones too."""
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
    w = attached(p, form, p.hparams, solver=row_adjoints(p)[adjoint])
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
def test_argmin_takes_cholesky_and_cg(name):
    p = row(name)
    for adjoint in (DENSE, S.CG(rtol=1e-13), S.CG(rtol=1e-13, preconditioner=S.Nystrom(rank=5, damping=1e-2))):
        w = attached(p, "inner_loss", p.hparams, solver=adjoint)
        grads = torch.autograd.grad(p.outer_loss(w, p.hparams), optree.tree_leaves(p.hparams))
        assert max(relative(g, truth) for g, truth in zip(grads, p.grads, strict=True)) < 1e-10


# --- every transform --------------------------------------------------------------------------------------------------

WITH_ADJOINTS = [(case, adjoint) for case in CASES.values() for adjoint in adjoints_for(case)]
# This takes a reverse pass over thirty mapped tangents, each of which needs a Krylov basis.
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
    value = TRANSFORMS[transform](lambda h: case.value(w, h, solver=adjoint_named(adjoint)))(case.hparams)
    assert rel(value, oracle(case, order)) < TOLERANCES[order]


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if "grad" not in t])
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.n <= 12], ids=lambda c: c.name)
def test_jacobians_of_the_solution_itself(case, transform):
    w, order = case.solution, 1 if transform in FIRST else 2
    value = TRANSFORMS[transform](lambda h: case.attach(w, h, solver=DENSE))(case.hparams)
    assert rel(value, oracle(case, order, scalar=False)) < TOLERANCES[order]


@pytest.mark.parametrize("case", [SMALL, tanh(5, 0.9, "residual", full=True)], ids=lambda c: c.name)
def test_agrees_with_the_unrolled_iteration(case):
    """A second oracle: the plain iteration, run to 1e-14 under autograd."""
    phi = SMALL.user if case is SMALL else lambda w, h: torch.tanh(h[:25].reshape(5, 5) @ w + h[25:])

    def unrolled(h: Tensor) -> Tensor:
        return case.outer(picard(phi, torch.zeros(5).double(), h), h)

    w = case.solution
    for transform, tolerance in ((jacrev, 1e-13), (hessian, 1e-12)):
        f = transform(lambda h: case.value(w, h, solver=TIGHT))
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
    value = transform(lambda h: case.value(w, h, solver=DENSE))(case.hparams)
    assert rel(value, oracle(case, 3)) < TOLERANCES[3]


def test_autograd_gives_what_func_gives():
    case, h = SMALL, SMALL.hparams.clone().requires_grad_()
    (first,) = torch.autograd.grad(case.value(case.solution, h, solver=DENSE), h, create_graph=True)
    assert rel(first, oracle(case, 1)) < 1e-10
    rows = [torch.autograd.grad(g, h, retain_graph=True, create_graph=True)[0] for g in first]
    assert rel(torch.stack(rows), oracle(case, 2)) < 1e-8
    (third,) = torch.autograd.grad(rows[3][7], h)
    assert rel(third, oracle(case, 3)[3, 7]) < 1e-7
    value = partial(case.value, case.solution, solver=DENSE)
    assert rel(torch.autograd.functional.hessian(value, case.hparams), oracle(case, 2)) < 1e-8


@pytest.mark.parametrize("entry_point", ["root", "fixed_point", "argmin", "linear_solve", "solver", "Equilibrium"])
def test_the_older_vmap_of_torch_autograd_is_refused_with_an_alternative(entry_point):
    entry_points = {
        "root": lambda a: implicit.root(lambda w, a: w**2 - a, a.detach().sqrt(), a),
        "fixed_point": lambda a: implicit.fixed_point(lambda w, a: (w + a) / 2, a.detach(), a),
        "argmin": lambda a: implicit.argmin(lambda w, a: ((w - a) ** 2).sum(), a.detach(), a),
        "linear_solve": lambda a: implicit.linear_solve(hg.operators.matrix(torch.diag(a), symmetric=True), 0 * a + 1),
        "solver": implicit.solver(residual=lambda w, a: w**2 - a)(torch.sqrt),
        "Equilibrium": hg.nn.Equilibrium(lambda z, u: (z + u) / 2, forward=hg.fixed_points.Picard(rtol=1e-12)),
    }
    f, a = entry_points[entry_point], torch.tensor([4.0, 9.0], dtype=torch.float64, requires_grad=True)
    units = torch.eye(2, dtype=torch.float64)
    for call in (
        lambda: torch.autograd.grad(f(a), a, units, is_grads_batched=True),
        lambda: torch.autograd.grad(f(a), a, units, is_grads_batched=True, create_graph=True),
        lambda: torch.autograd.functional.jacobian(f, a, vectorize=True),
        lambda: torch.autograd.functional.jacobian(f, a, vectorize=True, strategy="forward-mode"),
        lambda: torch.autograd.functional.hessian(lambda a: (f(a) ** 3).sum(), a, vectorize=True),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func\.jacrev"):
            call()
    assert rel(torch.func.jacrev(f)(a), torch.autograd.functional.jacobian(f, a)) < 1e-10


def test_forward_mode_of_autograd():
    case, u = SMALL, torch.randn(10).double()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.hparams, u)
        tangent = torch.autograd.forward_ad.unpack_dual(case.value(case.solution, dual, solver=DENSE)).tangent
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
    at, w = columns if nested.__code__.co_names[0] == "vmap" else case.hparams, case.solution
    with pytest.raises(NotImplementedError, match=r"silently wrong in torch.*jacfwd\(jacrev\)"):
        nested(lambda h: case.value(w, h, solver=DENSE))(at)
    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        jacfwd(jacfwd(lambda a: implicit.linear_solve(hg.operators.matrix(a), a[0], DENSE)))(2 * torch.eye(3))


# --- vmap -------------------------------------------------------------------------------------------------------------


def batch_of(case: Case, count: int) -> tuple[Tensor, Tensor]:
    """Problems of growing difficulty, of which the first is nearly linear, and their solutions."""
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
        f = lambda h: case.value(w, h, solver=adjoint_named(adjoint))  # noqa: E731
        return f(h) if transform is None else TRANSFORMS[transform](f)(h)

    truth = torch.stack([oracle_at(case, w[i], h[i], order) for i in range(3)])
    assert rel(vmap(value)(w, h), truth) < TOLERANCES.get(order, 1e-14)
    assert rel(vmap(value, in_dims=1, out_dims=-1)(w.T, h.T).movedim(-1, 0), truth) < TOLERANCES.get(order, 1e-14)


@pytest.mark.parametrize("outside", [grad, jacrev, jacfwd])
def test_derivatives_of_vmapped_solutions(outside):
    case = SMALL
    w, h = batch_of(case, 4)
    value = outside(lambda h: vmap(lambda w, h: case.value(w, h, solver=TIGHT))(w, h).sum())(h)
    assert rel(value, torch.stack([oracle_at(case, w[i], h[i], 1) for i in range(4)])) < 1e-10


@pytest.mark.parametrize("solver", [S.GMRES, S.BiCGStab, S.LSQR, S.NormalCG, S.FixedPoint])
def test_each_problem_of_a_vmap_takes_its_own_steps(solver):
    case, info = tanh(12, 0.95), Info()
    w, h = batch_of(case, 5)
    adjoint = solver(rtol=1e-12, max_steps=300)
    g = vmap(grad(lambda h, w: case.value(w, h, solver=adjoint, info=info)))(h, w)
    assert rel(g, torch.stack([oracle_at(case, w[i], h[i], 1) for i in range(5)])) < 1e-10
    steps = info.solution.steps
    assert steps.shape == (5,) and steps[0] < steps[-1] and info.solves == 1
    assert info.solution.status is hg.Status.CONVERGED


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("adjoint", ["Dense", "GMRES"])
def test_vmap_of_vmap(adjoint, transform):
    case, order = SMALL, 1 if transform in FIRST else 2
    w, h = batch_of(case, 6)
    f = lambda w, h: TRANSFORMS[transform](lambda h: case.value(w, h, solver=adjoint_named(adjoint)))(h)  # noqa: E731
    value = vmap(vmap(f))(w.reshape(2, 3, -1), h.reshape(2, 3, -1)).flatten(0, 1)
    assert rel(value, torch.stack([oracle_at(case, w[i], h[i], order) for i in range(6)])) < TOLERANCES[order]


def test_vmap_over_a_part_of_the_hparams():
    case = SMALL
    _, h = batch_of(case, 3)
    w = torch.stack([case.solve(torch.cat([case.hparams[:5], one[5:]])) for one in h])

    def value(w: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return implicit.fixed_point(lambda w, h: case.user(w, torch.cat(h)), w, (gain, bias), solver=TIGHT).sin().sum()

    g, b = vmap(grad(value, argnums=(1, 2)), in_dims=(0, None, 0))(w, case.hparams[:5], h[:, 5:])
    for i in range(3):
        at = torch.cat([case.hparams[:5], h[i, 5:]])
        truth = jacrev(lambda h, w: newton(case.residual, w, h).sin().sum())(at, w[i])
        assert rel(torch.cat([g[i], b[i]]), truth) < 1e-10


def test_a_vmapped_adjoint_that_fails_in_one_entry_says_which():
    h = double([1.0, 0.0, 4.0])
    with pytest.warns(hg.HypergradientWarning, match="1 of 3 systems, the first at index 1"):
        g = vmap(grad(lambda a: square_root(a.sqrt().detach(), a, solver=TIGHT)))(h)
    np.testing.assert_allclose(g[[0, 2]], [0.5, 0.25], rtol=1e-12)


# --- gradcheck --------------------------------------------------------------------------------------------------------


def computed(case: Case, **options):
    """The case with its solution recomputed at each λ, as finite differences need it."""
    return implicit.solver(**{case.form: case.user}, **options)(case.solve)


@pytest.mark.parametrize("case", [tanh(3, 0.9), tanh(3, 2.0, "residual"), entropy(3)], ids=lambda c: c.name)
def test_gradcheck_and_gradgradcheck(case):
    h = case.hparams.clone().requires_grad_()
    fit = computed(case, solver=DENSE)
    assert torch.autograd.gradcheck(fit, h, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fit, h, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_gradcheck_of_linear_solve():
    a = (torch.randn(3, 3) + 3 * torch.eye(3)).double().requires_grad_()
    b = torch.randn(3).double().requires_grad_()
    f = lambda a, b: implicit.linear_solve(hg.operators.matrix(a), b, DENSE)  # noqa: E731
    assert torch.autograd.gradcheck(f, (a, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (a, b), check_fwd_over_rev=True, check_rev_over_rev=True)


# --- nesting ----------------------------------------------------------------------------------------------------------

W0 = 0.4 * torch.from_numpy(np.random.default_rng(1).standard_normal((4, 4))) / 2
TARGET = torch.from_numpy(np.random.default_rng(2).standard_normal(4))


def cell(z: Tensor, h: Tensor) -> Tensor:
    """An equilibrium in R⁴ with hparams [2, 4]: a bias, and what multiplies the state."""
    return torch.tanh(h[0] + h[1] * (W0 @ z))


def fitted_loss(equilibrium, w: Tensor, h: Tensor) -> Tensor:
    """½‖z(w) − t‖² + ½ Σ e^λ w²: an argmin problem over an equilibrium."""
    z = equilibrium(torch.stack([w, h[4:]]))
    return 0.5 * (z - TARGET).square().sum() + 0.5 * (h[:4].exp() * w * w).sum()


def unrolled_equilibrium(h: Tensor) -> Tensor:
    return picard(cell, torch.zeros(4).double(), h, 60)


NESTED = Case(
    "equilibrium in an argmin",
    "argmin",
    partial(fitted_loss, unrolled_equilibrium),
    lambda w, h: grad(partial(fitted_loss, unrolled_equilibrium))(w, h),
    torch.linspace(-1, 1, 8).double(),
    4,
)


@cache
def nested_oracle(order: int) -> Tensor:
    return oracle_at(NESTED, nested_solution(), NESTED.hparams, order)


@cache
def nested_solution() -> Tensor:
    w = torch.zeros(4).double()
    for _ in range(12):
        w = newton(NESTED.residual, w, NESTED.hparams, 1).detach()
    assert NESTED.residual(w, NESTED.hparams).norm() < 1e-14
    return w


def library_equilibrium(h: Tensor, solver) -> Tensor:
    """The equilibrium by the decorator, which solves it without autograd even within transforms."""

    @implicit.solver(fixed_point=cell, solver=solver)
    def solve(h: Tensor) -> Tensor:
        return picard(cell, torch.zeros(4).double(), h, 60)

    return solve(h)


@pytest.mark.parametrize("adjoint", ["Dense", "GMRES"])
@pytest.mark.parametrize("transform", ["backward", *FIRST, "hessian", "jacrev(jacrev)", "jacrev(jacfwd)"])
def test_an_equilibrium_inside_an_argmin_inside_an_outer_loss(transform, adjoint):
    solver = adjoint_named(adjoint)
    loss = partial(fitted_loss, partial(library_equilibrium, solver=solver))
    w = nested_solution()

    def value(h: Tensor) -> Tensor:
        return NESTED.outer(implicit.argmin(loss, w, h, solver=solver), h)

    if transform == "backward":
        h = NESTED.hparams.clone().requires_grad_()
        value(h).backward()
        assert rel(h.grad, nested_oracle(1)) < 1e-10
        (first,) = torch.autograd.grad(value(h), h, create_graph=True)
        (second,) = torch.autograd.grad(first[2], h)
        assert rel(second, nested_oracle(2)[2]) < 1e-8
    else:
        order = 1 if transform in FIRST else 2
        assert rel(TRANSFORMS[transform](value)(NESTED.hparams), nested_oracle(order)) < TOLERANCES[order]


def test_nesting_under_vmap():
    loss = partial(fitted_loss, partial(library_equilibrium, solver=TIGHT))
    f = lambda w, h: implicit.argmin(loss, w, h, solver=TIGHT)  # noqa: E731
    w, h = nested_solution().expand(3, -1), NESTED.hparams.expand(3, -1)
    truth = oracle_at(NESTED, w[0], h[0], 1, scalar=False)
    for transform in (jacrev, jacfwd):
        value = vmap(transform(f, argnums=1))(w, h)
        assert rel(value, truth.expand(3, -1, -1)) < 1e-10


def test_one_solution_feeds_another():
    """w = √a, then u = ∛(w + a): the second's hparams depend on the first."""

    def value(a: Tensor) -> Tensor:
        w = square_root(double(2.0), a)
        return implicit.root(lambda u, h: u**3 - h["w"] - h["a"], double(6.0 ** (1 / 3)), {"w": w, "a": a})

    truth = jacrev(lambda a: (a.sqrt() + a) ** (1 / 3))
    a = double(4.0)
    for transform in (jacrev, jacfwd):
        assert rel(transform(value)(a), truth(a)) < 1e-10
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        assert rel(transform(value)(a), jacrev(truth)(a)) < 1e-8


# --- structures -------------------------------------------------------------------------------------------------------


def test_pytrees_for_solution_and_hparams():
    """Nested dicts, lists and 0-d leaves; integer tensors, strings and None among the hparams pass through."""
    case = tanh(5, 0.9)
    w, h = case.solution, case.hparams.clone().requires_grad_()

    def fp_map(params, hparams):
        assert hparams["mode"] == "exact" and hparams["nothing"] is None and hparams["order"].dtype == torch.long
        flat_h = torch.cat([hparams["gain"], hparams["rest"][0].reshape(1), hparams["rest"][1]["bias"]])
        new = case.user(torch.cat([params["a"][0].reshape(1), params["b"]["c"].flatten()]), flat_h)
        return {"a": (new[0],), "b": {"c": new[1:][hparams["order"]].reshape(2, 2)}}

    def tree(h: Tensor):
        rest = (h[5], {"bias": h[6:]})
        return {"gain": h[:5], "rest": rest, "order": torch.arange(4), "mode": "exact", "nothing": None}

    solution = {"a": (w[0],), "b": {"c": w[1:].reshape(2, 2)}}

    def value(h: Tensor) -> Tensor:
        new = implicit.fixed_point(fp_map, solution, tree(h), solver=DENSE)
        assert optree.tree_structure(new) == optree.tree_structure(solution)
        return case.outer(flat(new), h)

    value(h).backward()
    assert rel(h.grad, oracle(case, 1)) < 1e-10
    for transform, order in ((jacfwd, 1), (hessian, 2)):
        assert rel(transform(value)(case.hparams), oracle(case, order)) < TOLERANCES[order]
    many = vmap(grad(value))(case.hparams.expand(2, -1))
    assert rel(many, oracle(case, 1).expand(2, -1)) < 1e-10


def test_mixed_dtypes():
    """A float32 hparam in a float64 problem, and a solution of two dtypes."""
    a = torch.tensor(4.0, requires_grad=True)
    w = square_root(double(2.0), a)
    (g,) = torch.autograd.grad(w, a)
    assert w.dtype == torch.float64 and g.dtype == torch.float32 and abs(g.item() - 0.25) < 1e-7

    solution = (double(2.0), torch.tensor([2.0, 2.0]))
    new = implicit.root(lambda w, a: (w[0] ** 2 - a, w[1] ** 2 - a.float()), solution, a.double(), solver=DENSE)
    assert [leaf.dtype for leaf in new] == [torch.float64, torch.float32]
    (g,) = torch.autograd.grad(new[0] + new[1].double().sum(), a)
    assert abs(g.item() - 0.75) < 1e-6


def test_independent_problems_by_batch_dims():
    case, info = tanh(12, 0.95), Info()
    w, h = batch_of(case, 5)
    many = vmap(case.user)

    def value(h: Tensor) -> Tensor:
        new = implicit.fixed_point(many, w, h, solver=TIGHT, batch_dims=1, info=info)
        return vmap(case.outer)(new, h).sum()

    truth = torch.stack([oracle_at(case, w[i], h[i], 1) for i in range(5)])
    leaf = h.clone().requires_grad_()
    value(leaf).backward()
    assert rel(leaf.grad, truth) < 1e-10
    assert info.solution.steps.shape == (5,) and info.solution.steps.min() < info.solution.steps.max()
    assert rel(jacfwd(value)(h), truth) < 1e-10
    second = hessian(value)(h)
    for i in range(5):
        assert rel(second[i, :, i], oracle_at(case, w[i], h[i], 2)) < 1e-8
    assert torch.count_nonzero(second) == 5 * 24 * 24

    stacked = vmap(lambda h: grad(value)(h))(torch.stack([h, h]))
    assert rel(stacked, torch.stack([truth, truth])) < 1e-10 and info.solution.steps.shape == (2, 5)


def test_an_hparam_that_the_map_does_not_use_gets_zeros():
    a, unused = double(4.0).requires_grad_(), torch.ones(3).double().requires_grad_()
    w = implicit.root(lambda w, h: w**2 - h[0], double(2.0), (a, unused))
    ga, gu = torch.autograd.grad(w, (a, unused))
    assert ga == 0.25 and torch.equal(gu, torch.zeros(3).double())
    independent = implicit.root(lambda w, a: w**2 - 4.0, double(2.0), a)
    with pytest.warns(hg.HypergradientWarning, match="the inner problem does not depend on hparams"):
        assert torch.autograd.grad(independent, a) == (0.0,)


# --- linear_solve -----------------------------------------------------------------------------------------------------


def lu(a: Tensor, b: Tensor) -> Tensor:
    """The oracle for a matrix or a batch of matrices."""
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b[..., None])[..., 0]


def solved(a: Tensor, b: Tensor, solver=DENSE, **tags) -> Tensor:
    return implicit.linear_solve(hg.operators.matrix(a, **tags), b, solver)


def by_function(a: Tensor, b: Tensor, solver=DENSE) -> Tensor:
    """The same system as a function of a pytree, with a pytree of declared tensors."""

    def product(v, parts, scale):
        flat_v = torch.cat([v["x"].reshape(1), v["y"][0]])
        image = scale * (torch.cat([parts["top"], parts["bottom"]]) @ flat_v)
        return {"x": image[0], "y": [image[1:]]}

    op = hg.operators.function(product, tensors=({"top": 2 * a[:2], "bottom": 2 * a[2:]}, 0.5))
    x = implicit.linear_solve(op, {"x": b[0], "y": [b[1:]]}, solver)
    return torch.cat([x["x"].reshape(1), x["y"][0]])


def system(*batch: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(4)
    draw = rng.standard_normal((*batch, 4, 4)) + 4 * np.eye(4)
    return torch.from_numpy(draw), torch.from_numpy(rng.standard_normal((*batch, 4)))


SYSTEM_SOLVERS = {"Dense": DENSE, "GMRES": TIGHT, "LSQR": S.LSQR(rtol=1e-13), "BiCGStab": S.BiCGStab(rtol=1e-13)}


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if "grad" not in t])
@pytest.mark.parametrize("argnums", [0, 1])
@pytest.mark.parametrize("form", [solved, by_function])
def test_linear_solve_and_its_derivatives(form, argnums, transform):
    a, b = system()
    order = 1 if transform in FIRST else 2
    for name in ("Dense", "GMRES"):
        solver = SYSTEM_SOLVERS[name]
        assert rel(form(a, b, solver), lu(a, b)) < 1e-12

        def at(x: Tensor, f) -> Tensor:
            return f(x, b).sin() if argnums == 0 else f(a, x).sin()

        truth = partial(at, f=lu)
        for _ in range(order):
            truth = jacrev(truth)
        here = (a, b)[argnums]
        assert rel(TRANSFORMS[transform](partial(at, f=partial(form, solver=solver)))(here), truth(here)) < 1e-10


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("solver", SYSTEM_SOLVERS)
def test_linear_solve_under_vmap(solver, in_dims):
    a, b = system(3)
    a, b = (x if dim == 0 else x[0] for x, dim in zip((a, b), in_dims, strict=True))
    for f, truth in (
        (solved, lu),
        (
            grad(lambda *x: solved(*x, SYSTEM_SOLVERS[solver]).sin().sum(), (0, 1)),
            grad(lambda *x: lu(*x).sin().sum(), (0, 1)),
        ),
        (jacfwd(partial(solved, solver=SYSTEM_SOLVERS[solver])), jacrev(lu)),
    ):
        expected = vmap(truth, in_dims=in_dims)(a, b)
        got = vmap(f, in_dims=in_dims)(a, b)
        for one, other in zip(optree.tree_leaves(got), optree.tree_leaves(expected), strict=True):
            assert rel(one, other) < 1e-10


@pytest.mark.parametrize("solver", SYSTEM_SOLVERS)
def test_a_batch_of_matrices(solver):
    a, b = system(3)
    f = partial(solved, solver=SYSTEM_SOLVERS[solver])
    assert rel(f(a, b), lu(a, b)) < 1e-12
    for transform, truth in ((jacrev, jacrev), (jacfwd, jacrev)):
        for argnums in (0, 1):
            assert rel(transform(f, argnums)(a, b), truth(lu, argnums)(a, b)) < 1e-10
    assert (
        rel(
            hessian(lambda b: f(a * b[:, None], b).sum())(b),
            jacrev(jacrev(lambda b: lu(a * b[:, None], b).sum()))(b),
        )
        < 1e-8
    )


@pytest.mark.parametrize("tag", ["symmetric", "positive_definite"])
@pytest.mark.parametrize("solver", [None, S.CG(rtol=1e-14), S.MINRES(rtol=1e-14), S.Dense()], ids=str)
def test_linear_solve_of_a_declared_matrix(solver, tag):
    a, b = system()
    build = lambda t: t @ t.T + torch.eye(4).double()  # noqa: E731
    f = lambda t: solved(build(t), b, solver or S.CG(rtol=1e-14), **{tag: True}).sin().sum()  # noqa: E731
    truth = lambda t: lu(build(t), b).sin().sum()  # noqa: E731
    for transform, order in ((grad, 1), (jacfwd, 1), (hessian, 2), (lambda f: jacrev(jacrev(f)), 2)):
        expected = jacrev(truth)(a) if order == 1 else jacrev(jacrev(truth))(a)
        assert rel(transform(f)(a), expected) < TOLERANCES[order]


def test_the_transposed_system_is_consistent():
    """The adjoint of b ↦ A⁻¹b is u ↦ A⁻ᵀu, and both use the same solver."""
    a, b = system()
    u = torch.randn(4).double()
    _, pull = vjp(lambda b: solved(a, b), b)
    assert rel(pull(u)[0], solved(a.T, u)) < 1e-13
    assert abs(u @ solved(a, b) - pull(u)[0] @ b) < 1e-13

    used = []
    recorded = lambda op, b, x0: used.append(op) or DENSE(op, b, x0)  # noqa: E731
    f = partial(implicit.root, SMALL.residual, SMALL.solution, solver=recorded)
    for transform in (jacrev, jacfwd):
        used.clear()
        assert rel(transform(f)(SMALL.hparams), oracle(SMALL, 1, scalar=False)) < 1e-10 and used


def test_linear_solve_wants_an_operator_that_declares_its_tensors():
    op = hg.operators.LinearOperator(lambda v: v)
    with pytest.raises(TypeError, match=r"operators\.matrix or operators\.function"):
        implicit.linear_solve(op, torch.ones(2))
    a = torch.eye(2).requires_grad_()
    for derived in (hg.operators.matrix(a).T, hg.operators.matrix(a).damped(1.0)):
        with pytest.raises(TypeError, match=r"not its \.T or \.damped"):
            implicit.linear_solve(derived, torch.ones(2))
    undeclared = hg.operators.function(lambda v: a @ v)
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        implicit.linear_solve(undeclared, torch.ones(2))


# --- the decorator ----------------------------------------------------------------------------------------------------


@implicit.solver(residual=lambda w, h: w**3 + h[0] * w - h[1], solver=DENSE)
def by_brentq(h: Tensor) -> Tensor:
    a, b = h.tolist()
    return double(scipy.optimize.brentq(lambda w: w**3 + a * w - b, -5.0, 5.0, xtol=1e-15, rtol=1e-15))


@implicit.solver(residual=lambda w, h: w**3 + h[0] * w - h[1], solver=DENSE)
def by_bisection(h: Tensor) -> Tensor:
    low, high = double(-5.0), double(5.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle**3 + h[0] * middle < h[1] else (low, middle)
    return (low + high) / 2


def cubic_oracle(h: Tensor, order: int) -> Tensor:
    """Newton's method from SciPy's root."""
    w = double(np.roots([1.0, 0.0, h[0].item(), -h[1].item()]).real[[2]])
    f = lambda h: newton(lambda w, h: w**3 + h[0] * w - h[1], newton_polished(w, h.detach()), h)[0]  # noqa: E731
    for _ in range(order):
        f = jacrev(f)
    return f(h)


def newton_polished(w: Tensor, h: Tensor) -> Tensor:
    for _ in range(3):
        w = w - (w**3 + h[0] * w - h[1]) / (3 * w**2 + h[0])
    return w


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("fit", [by_brentq, by_bisection])
def test_scalar_root_finders(fit, transform):
    h, order = double([2.0, 3.0]), 1 if transform in FIRST else 2
    assert rel(fit(h), double(1.0)) < 1e-14
    assert rel(TRANSFORMS[transform](fit)(h), cubic_oracle(h, order)) < TOLERANCES[order]
    entries = double([[2.0, 3.0], [0.5, -1.0], [4.0, 0.1]])
    truth = torch.stack([cubic_oracle(h, order) for h in entries])
    assert rel(vmap(TRANSFORMS[transform](fit))(entries), truth) < TOLERANCES[order]


def scipy_root(h: Tensor) -> Tensor:
    f = lambda w: SMALL.residual(torch.from_numpy(w), h).numpy()  # noqa: E731
    jac = lambda w: jacrev(SMALL.residual)(torch.from_numpy(w), h).numpy()  # noqa: E731
    return torch.from_numpy(scipy.optimize.root(f, np.zeros(5), jac=jac, method="hybr", options={"xtol": 1e-15}).x)


CONVEX = entropy(5)


def scipy_minimize(h: Tensor) -> Tensor:
    def derivative(f):
        return lambda w: f(torch.from_numpy(w), h).numpy()

    g = derivative(lambda w, h: CONVEX.user(w, h))
    jac, hess = derivative(CONVEX.residual), derivative(jacrev(CONVEX.residual))
    answer = scipy.optimize.minimize(g, np.zeros(5), jac=jac, hess=hess, method="trust-exact", options={"gtol": 1e-13})
    return torch.from_numpy(answer.x)


def torch_lbfgs(h: Tensor) -> Tensor:
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], lr=0.5, max_iter=300, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimiser.zero_grad()
        loss = CONVEX.user(w, h)
        loss.backward()
        return loss

    optimiser.step(closure)
    return w


def torch_sgd(h: Tensor) -> Tensor:
    """The solution by SGD with momentum; the result still has a graph, to the trained parameter."""
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimiser = torch.optim.SGD([w], lr=0.3, momentum=0.3)
    for _ in range(300):
        optimiser.zero_grad()
        CONVEX.user(w, h).backward()
        optimiser.step()
    return w * 1.0


COMPUTED = {
    "scipy.optimize.root": (SMALL, scipy_root, {"residual": SMALL.residual}),
    "scipy.optimize.minimize": (CONVEX, scipy_minimize, {"argmin": CONVEX.user}),
    "torch.optim.LBFGS": (CONVEX, torch_lbfgs, {"argmin": CONVEX.user, "positive_definite": True}),
    "torch.optim.SGD": (CONVEX, torch_sgd, {"argmin": CONVEX.user}),
    "fixed_points.Anderson": (
        SMALL,
        lambda h: (
            hg.fixed_points.Anderson(rtol=1e-15, max_steps=40, on_failure="ignore")(
                SMALL.user, torch.zeros(5).double(), h
            ).value
        ),
        {"fixed_point": SMALL.user},
    ),
}


@pytest.mark.parametrize("transform", ["backward", "grad", "jacfwd", "hessian", "jacrev(jacrev)"])
@pytest.mark.parametrize("name", COMPUTED)
def test_any_code_that_computes_a_solution(name, transform):
    case, compute, form = COMPUTED[name]
    fit = implicit.solver(**form, solver=DENSE)(compute)
    value = lambda h: case.outer(fit(h), h)  # noqa: E731
    if transform == "backward":
        h = case.hparams.clone().requires_grad_()
        value(h).backward()
        assert rel(h.grad, oracle(case, 1)) < 1e-10
    else:
        order = 1 if transform in FIRST else 2
        assert rel(TRANSFORMS[transform](value)(case.hparams), oracle(case, order)) < TOLERANCES[order]


def test_argnums_has_aux_keywords_starts_and_metadata():
    calls = []

    @implicit.solver(residual=lambda w, a, b: a * w**2 - b, argnums=(2, 0), has_aux=True, solver=DENSE)
    def fit(b, start, a, *, sign):
        """Solve a w² = b."""
        assert not (b.requires_grad or a.requires_grad or start.requires_grad or sign.requires_grad)
        assert torch.is_grad_enabled()
        calls.append(start)
        return sign * (b / a).sqrt(), {"steps": 7}

    assert fit.__name__ == "fit" and fit.__doc__ == "Solve a w² = b."
    b, start, a, sign = (double(x).requires_grad_() for x in (8.0, 1.0, 2.0, 1.0))
    w, aux = fit(b, start, a, sign=sign)
    assert aux == {"steps": 7} and len(calls) == 1
    gb, gs, ga, gsign = torch.autograd.grad(w, (b, start, a, sign), allow_unused=True, retain_graph=True)
    assert gs is None and gsign is None
    assert abs(gb - 1 / (2 * 2.0 * 2.0)) < 1e-15 and abs(ga + 2.0**2 / (2 * 2.0 * 2.0)) < 1e-15
    w.backward()
    assert start.grad is None and sign.grad is None and b.grad is not None


def test_a_start_alone_gives_no_graph():
    @implicit.solver(residual=lambda w, a: w**2 - a, argnums=1)
    def fit(start, a):
        return a.sqrt() + 0 * start

    assert not fit(double(1.0).requires_grad_(), double(4.0)).requires_grad
    assert fit(double(1.0), double(4.0).requires_grad_()).requires_grad


def test_hparams_from_a_generator_and_in_a_pytree():
    layer = torch.nn.Linear(3, 3).double()
    x = torch.randn(3).double()

    @implicit.solver(residual=lambda w, parameters: w + 0.1 * w**3 - (parameters[0] @ x + parameters[1]), solver=DENSE)
    def fit(parameters):
        assert isinstance(parameters, list)
        w, target = torch.zeros(3).double(), parameters[0] @ x + parameters[1]
        for _ in range(50):
            w = w - (w + 0.1 * w**3 - target) / (1 + 0.3 * w**2)
        return w

    w = fit(layer.parameters())
    w.sum().backward()
    slope = 1 / (1 + 0.3 * w.detach() ** 2)
    assert rel(layer.bias.grad, slope) < 1e-10 and rel(layer.weight.grad, torch.outer(slope, x)) < 1e-10


def test_vmap_runs_it_once_for_each_entry_where_it_reads_numbers():
    shapes = []

    @implicit.solver(residual=lambda w, a, b: w**2 - a * b, argnums=(0, 1), solver=DENSE)
    def fit(a, b, scale):
        assert type(a.item()) is float  # a plain tensor
        shapes.append((a.shape, b.shape, scale.shape))
        return (a * b).sqrt()

    a, b = double([1.0, 4.0, 9.0]), double(4.0)
    value, (ga, gb) = vmap(torch.func.grad_and_value(lambda *args: fit(*args), (0, 1)), (0, None, 0))(a, b, a)[::-1]
    assert shapes == [((), (), ())] * 3
    assert rel(value, (a * b).sqrt()) < 1e-14
    assert rel(ga, 0.5 * (b / a).sqrt()) < 1e-10 and rel(gb, 0.5 * (a / b).sqrt()) < 1e-10


def test_aux_under_vmap_is_refused():
    @implicit.solver(residual=lambda w, a: w**2 - a, has_aux=True)
    def fit(a):
        return a.sqrt(), 10 * a

    with pytest.raises(NotImplementedError, match="has_aux under vmap"):
        vmap(fit)(double([1.0, 4.0]))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, TypeError, "exactly one of argmin, fixed_point and residual; got none"),
        ({"argmin": torch.sum, "residual": torch.sum}, TypeError, r"got \['argmin', 'residual'\]"),
        ({"argmin": torch.sum, "argnums": -1}, ValueError, "argnums must be one or more integers ≥ 0, got -1"),
        ({"argmin": torch.sum, "argnums": ()}, ValueError, "argnums must be one or more integers ≥ 0"),
        ({"argmin": torch.sum, "adjoint": None}, TypeError, "adjoint"),
    ],
)
def test_wrong_configuration_of_the_decorator(options, error, text):
    with pytest.raises(error, match=text):
        implicit.solver(**options)


def test_a_call_without_its_hparams():
    with pytest.raises(TypeError, match=r"by_brentq: hparams are positional arguments \(0,\), but only 0 were given"):
        by_brentq(h=double([2.0, 3.0]))
    fit = implicit.solver(residual=lambda w, a: w - a)(lambda a: a.tolist())
    with pytest.raises(TypeError, match=r"the result of <lambda>.*floating point tensor, got float"):
        fit(torch.ones(2, requires_grad=True))


# --- Info and WarmStart -----------------------------------------------------------------------------------------------


def test_info_is_filled_in_when_the_derivative_is_taken():
    case, info = SMALL, Info()
    h = case.hparams.clone().requires_grad_()
    value = case.value(case.solution, h, solver=S.GMRES(rtol=1e-8), info=info)
    assert info.solution is None and info.solves == 0
    value.backward(retain_graph=True)
    assert info.solves == 1 and info.solution.status is hg.Status.CONVERGED and 0 < info.solution.steps <= 5
    a = jacrev(lambda w: w - case.user(w, case.hparams))(case.solution)
    b = grad(case.outer)(case.solution, case.hparams)
    (v,) = info.solution.value.leaves
    residual = (b - a.T @ v).norm()
    assert abs(info.solution.residual_norm - residual) < 1e-15 and residual <= 1e-8 * b.norm()
    assert rel(info.solution.rhs_norm, b.norm()) < 1e-14
    value.backward()
    assert info.solves == 2
    hessian(lambda h: case.value(case.solution, h, solver=DENSE, info=info))(case.hparams)
    assert info.solves > 3


@pytest.mark.parametrize("solver", [S.GMRES, S.BiCGStab, S.FixedPoint, S.NormalCG])
def test_warm_start_takes_fewer_steps_in_the_second_call(solver):
    case, warm, info = tanh(12, 0.95), WarmStart(), Info()
    adjoint = solver(rtol=1e-10, max_steps=300)
    steps, shift = [], 1e-6 * torch.randn(24).double()
    for h in (case.hparams, case.hparams + shift, case.hparams + shift):
        w, h = case.solve(h), h.clone().requires_grad_()
        case.value(w, h, solver=adjoint, info=info, warm_start=warm).backward()
        steps.append(int(info.solution.steps))
        assert rel(h.grad, oracle_at(case, w, h.detach(), 1)) < 1e-8
    assert steps[0] > steps[1] > 0 and steps[2] == 0
    warm.value = None
    case.value(w, h, solver=adjoint, info=info, warm_start=warm).backward()
    assert info.solution.steps == steps[0]


@pytest.mark.parametrize("adjoint", [S.Dense(), S.FixedPoint(rtol=1e-8), S.GMRES(rtol=1e-8), S.BiCGStab(rtol=1e-8)])
def test_a_warm_start_survives_a_pass_with_nan(adjoint):
    case, warm, h = SMALL, WarmStart(), SMALL.hparams.clone().requires_grad_()
    w = case.attach(case.solution, h, solver=adjoint, warm_start=warm)
    with pytest.warns(hg.HypergradientWarning, match="NON_FINITE"):
        torch.autograd.grad(w.sum() * torch.nan, h, retain_graph=True)
    (g,) = torch.autograd.grad(case.outer(w, case.hparams), h)
    assert rel(g, oracle(case, 1) - grad(case.outer, 1)(case.solution, case.hparams)) < 1e-6


def test_a_warm_start_of_another_problem_is_refused():
    warm = WarmStart()
    for n in (3, 4):
        a = torch.full((n,), 4.0, requires_grad=True)
        w = square_root(a.detach().sqrt(), a, warm_start=warm)
        if n == 3:
            w.sum().backward()
    with pytest.raises(ValueError, match=r"warm_start holds a v of shapes \[\(3,\)\], and the solution has \[\(4,\)\]"):
        w.sum().backward()


# --- undeclared tensors -----------------------------------------------------------------------------------------------


class Affine(torch.nn.Module):
    """A contraction z ↦ ½ tanh(layer(z)) + bias, and the map of (z, x) with it."""

    def __init__(self, n: int = 3):
        super().__init__()
        self.layer = torch.nn.Linear(n, n)
        self.bias = torch.nn.Parameter(torch.ones(n))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.layer(z)) + self.bias + x


MODULE = Affine().double()
HOW = r"was not declared: {}.*Pass it in hparams \(for a module: torch\.func\.functional_call.*or detach it"


@pytest.mark.parametrize("level", ["plain", "nothing declared requires grad", "func.grad", "jacfwd", "vmap", "second"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda c, m: lambda w, h: w**2 - h * c, r"of shape \(3,\)"),
        (lambda c, m: lambda w, h: w**2 - h * (c * 2).exp(), r"of shape \(3,\)"),
        (lambda c, m: lambda w, h: w - m(w, h), r"layer\.weight of a Affine, of shape \(3, 3\)|bias of a Affine"),
        (lambda c, m: partial(lambda m, w, h: w - m(w, h), m), r"layer\.weight of a Affine|bias of a Affine"),
    ],
    ids=["closure", "computed", "module", "partial"],
)
def test_undeclared_tensors_raise_and_say_how(make, name, level):
    c, h, w = torch.ones(3).double().requires_grad_(), torch.ones(3).double(), torch.ones(3).double()
    f = lambda h: implicit.root(make(c, MODULE), w, h, solver=DENSE).sum()  # noqa: E731
    with pytest.raises(ValueError, match=HOW.format(f"({name})")):
        if level == "plain":
            f(h.clone().requires_grad_()).backward()
        elif level == "nothing declared requires grad":
            f(h)
        elif level == "second":
            torch.autograd.grad(f(h.clone().requires_grad_()), [c], create_graph=True, allow_unused=True)
            leaf = h.clone().requires_grad_()
            torch.autograd.grad(f(leaf), leaf, create_graph=True)
        else:
            {"func.grad": grad, "jacfwd": jacfwd, "vmap": lambda f: vmap(grad(f))}[level](f)(
                h if level != "vmap" else h.expand(2, -1)
            )


def test_undeclared_tensors_of_the_decorator_and_of_argmin():
    c = torch.ones(2).double().requires_grad_()
    fit = implicit.solver(argmin=lambda w, h: ((w - h * c) ** 2).sum(), solver=DENSE)(lambda h: h * c)
    for h in (torch.ones(2).double(), torch.ones(2).double().requires_grad_()):
        with pytest.raises(ValueError, match=HOW.format(r"of shape \(2,\)")):
            fit(h).sum().backward()
    with torch.no_grad():
        assert not fit(h).requires_grad


SCALED = {  # (c, a) ↦ √(ac) with c undeclared, and what that does to a
    "root": lambda c, a: implicit.root(lambda w, a: w**2 - a * c, double(2.0), a, solver=DENSE),
    "decorator": lambda c, a: implicit.solver(residual=lambda w, a: w**2 - a * c)(lambda a: a.sqrt())(a),
    "linear_solve": lambda c, a: implicit.linear_solve(hg.operators.function(lambda v: c * v), a, DENSE),
}


@pytest.mark.parametrize("declared", [lambda c: double(4.0), lambda c: 4.0 * c], ids=["constant", "depends on it"])
@pytest.mark.parametrize(
    "outside",
    [
        grad,
        jacrev,
        jacfwd,
        lambda f: lambda c: vmap(grad(f))(c.expand(3)),
        lambda f: lambda c: jvp(f, (c,), (c,)),
        lambda f: grad(lambda c: grad(lambda a: f(c, a))(double(1.0))),
        lambda f: lambda c: jvp(lambda c: grad(lambda a: f(c, a))(double(1.0)), (c,), (c,)),
        lambda f: grad(lambda c: jvp(lambda a: f(c, a), (double(1.0),), (double(1.0),))[1]),
    ],
    ids=["grad", "jacrev", "jacfwd", "vmap of grad", "jvp", "grad of grad", "jvp of grad", "grad of jvp"],
)
@pytest.mark.parametrize("form", SCALED)
def test_a_tensor_of_an_outer_transform_is_undeclared_too(form, outside, declared):
    """Inside the inner transform it looks like a constant, so its derivative would silently be zero."""
    f = lambda c, a=1.0: SCALED[form](c, a * declared(c))  # noqa: E731
    with pytest.raises(ValueError, match=r"a tensor of an enclosing transform"):
        outside(f)(double(1.0))


def test_a_mapped_tensor_must_be_declared():
    with pytest.raises(ValueError, match=r"a tensor of an enclosing transform"):
        vmap(lambda c: grad(lambda a: SCALED["root"](c, a))(double(4.0)))(double([1.0, 2.0]))
    entries = double([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"a tensor of an enclosing transform"):
        vmap(lambda c: vmap(lambda a: SCALED["root"](c, a))(entries))(entries)
    one, a = double(1.0), double([4.0, 4.0])  # constants may be used, made outside of the transforms
    assert vmap(grad(lambda a: SCALED["root"](one, a)))(a).tolist() == [0.25, 0.25]
    with pytest.raises(ValueError, match=r"Pass it in hparams"):
        vmap(grad(lambda a: SCALED["root"](double(1.0), a)))(a)
    assert grad(lambda c: c * grad(lambda a: SCALED["root"](c.detach(), a))(double(4.0)))(double(1.0)) == 0.25


def test_the_outer_variable_of_a_nested_problem_must_be_declared():
    h = double([1.0, 2.0]).requires_grad_()

    def loss(w: Tensor, h: Tensor) -> Tensor:
        z = implicit.root(lambda z, h: z - w * h, (w * h).detach(), h, solver=DENSE)
        return ((z - 1) ** 2).sum()

    with pytest.raises(ValueError, match=r"was not declared: of shape \(2,\)"):
        implicit.argmin(loss, 1 / h.detach(), h, solver=DENSE).sum().backward()


# --- modules ----------------------------------------------------------------------------------------------------------


def test_a_module_by_functional_call():
    module, x = Affine().double(), torch.randn(3).double().requires_grad_()
    names, tensors = zip(*module.named_parameters(), strict=True)

    def residual(w: Tensor, h: Tensor) -> Tensor:
        parts = h.split([3, 3, 9, 3])
        return w - 0.5 * torch.tanh(parts[2].reshape(3, 3) @ w + parts[3]) - parts[1] - parts[0]

    h = torch.cat([x, *(t.flatten() for t in tensors)]).detach()
    assert names == ("bias", "layer.weight", "layer.bias")
    w = picard(lambda w, h: w - residual(w, h), torch.zeros(3).double(), h, 200)
    for fp_map in (
        lambda w, h: functional_call(module, h[0], (w, h[1])),
        lambda w, h: hg.nn.functional(module)(h[0], w, h[1]),
    ):
        new = implicit.fixed_point(fp_map, w, (dict(module.named_parameters()), x), solver=DENSE)
        grads = torch.autograd.grad(new.sin().sum(), [x, *tensors])
        truth = jacrev(lambda h: newton(residual, w, h).sin().sum())(h)
        assert rel(torch.cat([g.flatten() for g in grads]), truth) < 1e-10


class Normalised(torch.nn.Module):
    """z ↦ ½ tanh(norm(z Wᵀ) + x): BatchNorm in training mode couples the samples."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4) / 2)
        self.norm = norm

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.norm(z @ self.weight.T) + x)


def by_hand(kind: str, z: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, x: Tensor) -> Tensor:
    """Normalised, written out so that torch differentiates only elementary operations."""
    y = z @ weight.T
    axis = 0 if kind == "batch" else 1
    centred = y - y.mean(axis, keepdim=True)
    y = centred / ((centred**2).mean(axis, keepdim=True) + 1e-1).sqrt()
    return 0.5 * torch.tanh(y * scale + shift + x)


NORMS = {"batch": partial(torch.nn.BatchNorm1d, 4, eps=1e-1), "layer": partial(torch.nn.LayerNorm, 4, eps=1e-1)}


@pytest.mark.parametrize("transform", ["backward", "second backward", "grad", "jacfwd", "jacfwd(grad)", "jacrev(grad)"])
@pytest.mark.parametrize("kind", NORMS)
def test_derivatives_through_normalisation_in_training_mode(kind, transform):
    """The list leaves out transforms of which torch itself gives wrong derivatives: see the next test."""
    module = Normalised(NORMS[kind]()).double()
    x, order = torch.randn(6, 4).double(), 1 if transform in ("backward", *FIRST) else 2
    names = ["weight", "norm.weight", "norm.bias"]
    start = [dict(module.named_parameters())[name].detach() + 0.1 for name in names]
    h = torch.cat([t.flatten() for t in start])

    def parameters(h: Tensor) -> dict[str, Tensor]:
        parts = h.split([16, 4, 4])
        return dict(zip(names, (parts[0].reshape(4, 4), *parts[1:]), strict=True))

    def residual(z: Tensor, h: Tensor) -> Tensor:
        return z - by_hand(kind, z.reshape(6, 4), *parameters(h).values(), x).flatten()

    z = picard(lambda z, h: z - residual(z, h), torch.zeros(24).double(), h, 300)
    assert residual(z, h).norm() < 1e-14
    truth = lambda h: newton(residual, z, h).sin().sum()  # noqa: E731
    for _ in range(order):
        truth = jacrev(truth)
    before = [buffer.clone() for buffer in module.buffers()]
    pure = hg.nn.functional(module)

    def value(h: Tensor) -> Tensor:
        fp_map = lambda z, h: pure(h[0], z, h[1])  # noqa: E731
        new = implicit.fixed_point(fp_map, z.reshape(6, 4), (parameters(h), x), solver=TIGHT)
        return new.sin().sum()

    leaf = h.clone().requires_grad_()
    if transform == "backward":
        value(leaf).backward()
        got = leaf.grad
    elif transform == "second backward":
        (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
        got = torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in first])
    else:
        got = TRANSFORMS[transform](value)(h)
    assert rel(got, truth(h)) < TOLERANCES[order]
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))


@pytest.mark.parametrize("transform", ["jacrev(jacrev)", "hessian", "jacrev(jacfwd)"])
@pytest.mark.parametrize("kind", NORMS)
def test_torch_itself_is_wrong_about_normalisation(kind, transform):
    """If this fails, torch has been fixed, and the transform belongs in the list of the test above."""
    layer, x = NORMS[kind]().double(), torch.randn(6, 4).double()
    h = torch.cat([torch.eye(4).flatten(), torch.rand(8)]).double()

    def value(h: Tensor, hand: bool) -> Tensor:
        parts = h.split([16, 4, 4])
        weight = parts[0].reshape(4, 4)
        if hand:
            y = by_hand(kind, x, weight, parts[1], parts[2], 0 * x)
        else:
            y = 0.5 * torch.tanh(hg.nn.functional(layer)({"weight": parts[1], "bias": parts[2]}, x @ weight.T))
        return y.sin().sum()

    truth = jacrev(jacrev(lambda h: value(h, True)))(h)
    assert rel(jacrev(grad(lambda h: value(h, False)))(h), truth) < 1e-12
    assert rel(TRANSFORMS[transform](lambda h: value(h, False))(h), truth) > 1e-3


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [S.CG(), S.MINRES(), S.CG(preconditioner=S.Nystrom(rank=2))], ids=str)
def test_cg_on_a_map_that_is_not_symmetric_is_refused(solver):
    h = SMALL.hparams.clone().requires_grad_()
    value = SMALL.value(SMALL.solution, h, solver=solver)
    with pytest.raises(TypeError, match="needs a symmetric operator"):
        value.backward()
    for transform in (grad, jacfwd, hessian):
        with pytest.raises(TypeError, match="needs a symmetric operator"):
            transform(partial(SMALL.value, SMALL.solution, solver=solver))(SMALL.hparams)


def test_a_false_declaration_is_found():
    h = SMALL.hparams.clone().requires_grad_()
    with pytest.warns(hg.HypergradientWarning, match="NOT_SYMMETRIC"):
        SMALL.value(SMALL.solution, h, symmetric=True, solver=S.CG()).backward()
    a = double([1.0, 1.0]).requires_grad_()
    saddle = implicit.argmin(lambda w, a: (a * w).sum() + w[0] ** 2 - w[1] ** 2, double([-0.5, 0.5]), a)
    with pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        saddle[1].backward()


@pytest.mark.parametrize("transform", ["backward", "create_graph", "grad", "jacfwd", "hessian"])
def test_a_failed_adjoint_warns_or_raises_when_differentiated(transform):
    case = tanh(12, 0.95)
    w = case.solution

    def differentiate(adjoint):
        value = partial(case.value, w, solver=adjoint)
        if transform in TRANSFORMS:
            return TRANSFORMS[transform](value)(case.hparams)
        h = case.hparams.clone().requires_grad_()
        f = value(h)  # no system is solved here
        return torch.autograd.grad(f, h, create_graph=transform == "create_graph")[0]

    few = {"rtol": 1e-12, "max_steps": 2}
    with pytest.warns(
        hg.HypergradientWarning, match=r"the linear system of an implicit derivative: .*MAX_STEPS after 2"
    ):
        value = differentiate(S.GMRES(**few))
    assert torch.isfinite(value).all()
    with pytest.raises(hg.SolverError, match="MAX_STEPS") as raised:
        differentiate(S.GMRES(**few, on_failure="raise"))
    assert int(torch.as_tensor(raised.value.solution.steps).max()) == 2
    assert rel(differentiate(S.GMRES(**few, on_failure="ignore")), value) < 1e-14


def test_a_diverging_adjoint_says_what_else_to_use():
    h = torch.ones(3).double().requires_grad_()
    stiff = S.FixedPoint(rtol=1e-8, max_steps=50)
    value = implicit.root(lambda w, h: 2.5 * w - h, h.detach() / 2.5, h, solver=stiff).sum()
    with pytest.warns(hg.HypergradientWarning, match=r"DIVERGED.*GMRES"):
        value.backward()


@pytest.mark.parametrize("where", ["cotangent", "solution", "hparams"])
def test_nan_is_reported_never_swallowed(where):
    h, w = SMALL.hparams.clone(), SMALL.solution.clone()
    if where == "hparams":
        h[0] = torch.nan
    if where == "solution":
        w[0] = torch.nan
    h.requires_grad_()
    new = SMALL.attach(w, h, solver=TIGHT)
    with pytest.warns(hg.HypergradientWarning, match="NON_FINITE"):
        (new * (torch.nan if where == "cotangent" else 1.0)).sum().backward()
    assert not torch.isfinite(h.grad).all() or where == "cotangent"


@pytest.mark.parametrize(
    ("residual", "text"),
    [
        (lambda w, a: w["x"], r"must have the structure of solution: 1 leaves instead of 2"),
        (lambda w, a: {"x": w["x"], "y": w["y"][:1]}, r"the residual\['y'\] must be like solution.*\(2,\).*\(1,\)"),
        (lambda w, a: {"x": w["x"].float(), "y": w["y"]}, r"the residual\['x'\].*float64.*float32"),
        (
            lambda w, a: {"x": w["x"].round().long(), "y": w["y"]},
            r"the residual\['x'\] must be a floating point tensor",
        ),
        (lambda w, a: {"x": 1.0, "y": w["y"]}, r"the residual\['x'\] must be a floating point tensor, got float"),
    ],
)
def test_a_map_of_the_wrong_form_is_named(residual, text):
    w, a = {"x": double(1.0), "y": double([1.0, 2.0])}, double(1.0).requires_grad_()
    new = implicit.root(residual, w, a)
    with pytest.raises((ValueError, TypeError), match=text):
        new["x"].backward()


def test_wrong_solutions_and_losses():
    a = double(1.0).requires_grad_()
    with pytest.raises(TypeError, match=r"solution must be a floating point tensor, got float"):
        implicit.root(lambda w, a: w - a, 1.0, a)
    with pytest.raises(TypeError, match=r"solution\['x'\].*int64"):
        implicit.root(lambda w, a: w, {"x": torch.tensor(1)}, a)
    with pytest.raises(ValueError, match="solution holds no tensor"):
        implicit.root(lambda w, a: w, {}, a)
    with pytest.raises(ValueError, match=r"inner_loss must give a scalar, got shape \(2,\)"):
        implicit.argmin(lambda w, a: w * a, torch.ones(2).double(), a).sum().backward()
    with pytest.raises(TypeError, match="unexpected keyword argument 'adjoint'"):
        implicit.root(lambda w, a: w - a, a.detach(), a, adjoint=DENSE)


# --- what it leaves behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["root", "decorator"])
def test_output_requires_grad_exactly_when_an_hparam_does(form):
    fit = implicit.solver(residual=lambda w, h: w**2 - h["a"], argnums=1)(lambda start, h: h["a"].sqrt())
    for on in (True, False):
        h = {"a": double(4.0).requires_grad_(on), "n": torch.tensor(3), "word": "x"}
        start = double(2.0).requires_grad_()  # a solution or start that requires grad does not count
        w = implicit.root(lambda w, h: w**2 - h["a"], start, h) if form == "root" else fit(start, h)
        assert w.requires_grad is on and w is not start and w == 2.0
        with torch.no_grad():
            assert not implicit.root(lambda w, h: w**2 - h["a"], start, h).requires_grad
        if on:
            w.backward()
            assert start.grad is None and h["a"].grad == 0.25
    op = hg.operators.matrix(torch.eye(2))
    assert not implicit.linear_solve(op, torch.ones(2)).requires_grad
    assert implicit.linear_solve(op, torch.ones(2, requires_grad=True)).requires_grad


def test_the_users_tensors_stay_as_they_are():
    case = SMALL
    w, h = case.solution.clone(), case.hparams.clone().requires_grad_()
    kept = w.clone(), h.detach().clone()
    new = case.attach(w, h, solver=TIGHT)
    new.detach().add_(1.0)  # in memory of its own
    assert torch.equal(w, kept[0])
    new, cotangent = case.attach(w, h, solver=TIGHT), torch.ones(5).double()
    torch.autograd.grad(new, h, cotangent, retain_graph=True)
    assert torch.equal(cotangent, torch.ones(5).double())
    assert torch.equal(w, kept[0]) and torch.equal(h.detach(), kept[1]) and h.grad is None
    new.mul_(2.0)  # the solution that the derivative is taken at
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        new.sum().backward()


def step_once(kind: str, case: Case, warm: WarmStart, info: Info) -> weakref.ref:
    h, solution = case.hparams.clone().requires_grad_(), case.solution
    options = {"solver": S.GMRES(rtol=1e-6), "info": info}
    if kind == "second order":
        w = case.attach(case.solution, h, **options)
        (g,) = torch.autograd.grad(case.outer(w, h), h, create_graph=True)
        g.sum().backward()
    elif kind == "decorator":
        w = implicit.solver(fixed_point=case.user, **options)(lambda h: case.solution)(h)
        case.outer(w, h).backward()
    elif kind == "func":
        w = h
        vmap(grad(lambda h: case.value(solution, h, **options)))(h.expand(2, -1))
    elif kind == "discarded":
        w = case.attach(case.solution, h, **options)
    else:
        w = case.attach(case.solution, h, warm_start=warm, **options)
        case.outer(w, h).backward()
    return weakref.ref(w)


@pytest.mark.parametrize("kind", ["backward", "decorator", "discarded", "second order", "func"])
def test_nothing_leaks(kind):
    """Neither tensors nor memory accumulate over many calls. The garbage collector is off, so cycles would count."""
    case, warm, info = tanh(5, 0.9), WarmStart(), Info()
    calls = 100 if kind in ("second order", "func") else 300

    def alive() -> int:
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    for _ in range(20):
        step_once(kind, case, warm, info)
    gc.collect()
    gc.disable()
    try:
        before, memory = alive(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(calls):
            assert step_once(kind, case, warm, info)() is None
        assert alive() <= before + 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 8 * 1024  # KiB
    finally:
        gc.enable()


# --- approximations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("mixing", [1.0, 0.5])
def test_a_truncated_neumann_series_is_the_phantom_gradient(steps, mixing):
    """The derivative of mixed steps from the solution (Geng et al. 2021)."""
    case, phantom = SMALL, S.Neumann(max_steps=steps - 1, step_size=mixing, on_failure="ignore")

    def unrolled(h: Tensor) -> Tensor:
        w = case.solution
        for _ in range(steps):
            w = (1 - mixing) * w + mixing * case.user(w, h)
        return case.outer(w, h)

    w = case.solution
    truth = jacrev(unrolled)(case.hparams)
    for transform in (grad, jacfwd):
        assert rel(transform(partial(case.value, w, solver=phantom))(case.hparams), truth) < 1e-13
    h = case.hparams.clone().requires_grad_()
    case.value(w, h, solver=phantom).backward()
    assert rel(h.grad, truth) < 1e-13


def test_one_step_gives_the_derivative_of_a_single_map_evaluation():
    case, info = SMALL, Info()
    w, h = case.solution, case.hparams.clone().requires_grad_()
    case.value(w, h, solver=S.FixedPoint(max_steps=1, on_failure="ignore"), info=info).backward()
    truth = jacrev(lambda h: case.outer(case.user(w, h), h))(case.hparams)
    assert rel(h.grad, truth) < 1e-13
    jacobian = jacrev(case.user)(w, case.hparams)
    left = jacobian.T @ grad(case.outer)(w, case.hparams)
    assert rel(info.solution.residual_norm, left.norm()) < 1e-13  # the warning gives the error
    assert (
        rel(jacfwd(partial(case.value, w, solver=S.FixedPoint(max_steps=1, on_failure="ignore")))(case.hparams), truth)
        < 1e-13
    )


@pytest.mark.parametrize("entry_point", ["argmin", "root", "fixed_point", "solver"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_point_that_is_no_solution_is_warned_of(entry_point, create_graph):
    """w minimises (w − a)² / 2 at a = 3; 2 is given."""
    a, w = double(3.0).requires_grad_(), double(2.0)
    loss, slope = (lambda w, a: (w - a) ** 2 / 2), (lambda w, a: w - a)
    entry_points = {
        "argmin": lambda w: implicit.argmin(loss, w, a),
        "root": lambda w: implicit.root(slope, w, a),
        "fixed_point": lambda w: implicit.fixed_point(lambda w, a: (w + a) / 2, w, a),
        "solver": lambda w: implicit.solver(residual=slope)(lambda a: w)(a),
    }
    value = entry_points[entry_point](w)
    with pytest.warns(hg.UnsolvedInnerProblem, match="the inner problem is not solved"):
        torch.autograd.grad(value, a, create_graph=create_graph)
    (grad,) = torch.autograd.grad(entry_points[entry_point](double(3.0)), a, create_graph=create_graph)
    assert abs(float(grad.detach()) - 1) < 1e-12


def maps_of(loss, slope, step=0.1):
    """λ ↦ w(λ) at a given solution by argmin, root, fixed_point and solver."""
    phi = lambda w, h: optree.tree_map(lambda x, g: x - step * g, w, slope(w, h))  # noqa: E731
    return {
        "argmin": lambda w, h: implicit.argmin(loss, w, h),
        "root": lambda w, h: implicit.root(slope, w, h),
        "fixed_point": lambda w, h: implicit.fixed_point(phi, w, h),
        "solver": lambda w, h: implicit.solver(argmin=loss)(lambda h: w)(h),
    }


@pytest.mark.parametrize("entry_point", ["argmin", "root", "fixed_point", "solver"])
def test_frozen_leaves_of_a_solution_are_constants(entry_point):
    """g = (w − c − a)² + (c − 2a)² with c frozen off its solution: w = c + a, dw/da = 1 (3 if c moved)."""
    a = double(1.0).requires_grad_()
    loss = lambda w, a: (w["w"] - w["c"] - a) ** 2 + (w["c"] - 2 * a) ** 2  # noqa: E731
    solution = {"c": double(5.0), "w": double(6.0).requires_grad_()}
    found = maps_of(loss, lambda w, a: torch.func.grad(loss)(w, a))[entry_point](solution, a)
    assert not found["c"].requires_grad and torch.equal(found["c"], solution["c"])
    (slope,) = torch.autograd.grad(found["w"], a)
    assert abs(float(slope) - 1) < 1e-12


@pytest.mark.parametrize("entry_point", ["argmin", "root", "fixed_point", "solver"])
def test_complex_hparams(entry_point):
    """w = Re(B h) / 2, E = |w|² + |h|²: to second order, in reverse and in forward mode, and mapped."""
    b = torch.tensor([[1 + 2j, 3j], [0.5, 1 - 1j]], dtype=torch.complex128)
    loss = lambda w, h: (w**2).sum() - w @ (b @ h).real  # noqa: E731
    solution = lambda h: (b @ h).real / 2  # noqa: E731
    call = maps_of(loss, lambda w, h: 2 * w - (b @ h).real)[entry_point]
    outer = lambda w, h: (w**2).sum() + (h.abs() ** 2).sum()  # noqa: E731
    if entry_point == "solver":
        call = lambda w, h: implicit.solver(argmin=loss)(solution)(h)  # noqa: E731
    found = lambda h: outer(call(solution(h).detach(), h), h)  # noqa: E731
    truth = lambda h: outer(solution(h), h)  # noqa: E731
    h = torch.tensor([0.5 + 0.2j, -1 + 0.4j], dtype=torch.complex128)
    tangent = torch.tensor([0.3 - 0.1j, 0.2 + 1j], dtype=torch.complex128)
    for f in (grad, lambda f: lambda h: jvp(f, (h,), (tangent,))[1], lambda f: lambda h: vmap(grad(f))(h[None])):
        torch.testing.assert_close(f(found)(h), f(truth)(h), rtol=1e-12, atol=1e-14)
    pairs = torch.view_as_real(h).clone()
    for f in (hessian, lambda f: jacrev(jacrev(f)), lambda f: partial(torch.autograd.functional.hessian, f)):
        value, due = (f(lambda x, g=g: g(torch.view_as_complex(x)))(pairs) for g in (found, truth))
        torch.testing.assert_close(value, due, rtol=1e-12, atol=1e-14)
    tracked = h.clone().requires_grad_()
    found(tracked).backward()
    torch.testing.assert_close(tracked.grad, grad(truth)(h), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("entry_point", ["argmin", "root", "fixed_point", "solver"])
def test_a_map_that_does_not_depend_on_hparams_is_warned_of(entry_point):
    a = double(3.0).requires_grad_()
    slope = lambda w, a: w - a.detach()  # noqa: E731
    w = maps_of(lambda w, a: (w - float(a.detach())) ** 2 / 2, slope)[entry_point](double(3.0), a)
    with pytest.warns(hg.HypergradientWarning, match="the inner problem does not depend on hparams"):
        torch.autograd.grad(w, a)


@pytest.mark.parametrize("solver", [S.Neumann(max_steps=3), S.FixedPoint(max_steps=9), S.FixedPoint(max_steps=1)])
def test_too_few_steps_for_a_derivative_are_warned_of(solver):
    """The map is w = (1 − η) w + ηλ, whose error falls by a factor of 1 − η a step."""

    def derivative(eta: float) -> Tensor:
        lam = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        phi = lambda w, h: (1 - eta) * w + eta * h  # noqa: E731
        return torch.autograd.grad(hg.implicit.fixed_point(phi, lam.detach(), lam, solver=solver), lam)[0]

    with pytest.warns(hg.InaccurateHypergradient, match="derivative of an implicit function is off by an estimated 9"):
        off = 1 - float(derivative(0.01))
    assert off > 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(1 - float(derivative(0.95))) < 0.1


@pytest.mark.parametrize("entry_point", ["argmin", "grad", "newton"])
def test_a_compiled_map_without_second_derivatives_is_named(entry_point):
    """aot_autograd itself complains of an in-place operation, or leaves an empty leaf in the graph."""
    torch.compiler.reset()
    m, lam = torch.eye(3, dtype=torch.float64) / 3, torch.ones(3, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(3, dtype=torch.float64)
    loss = torch.compile(lambda w, lam: (w - lam).square().sum() + w.pow(4).sum(), backend="aot_eager")
    phi = torch.compile(lambda w, lam: torch.tanh(m @ w + lam), backend="aot_eager")
    calls = {
        "argmin": lambda: hg.implicit.argmin(loss, w, lam).sum().backward(),
        "grad": lambda: hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=loss, params=w, hparams=lam),
        "newton": lambda: hg.fixed_points.Newton()(phi, w, lam),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match=r"compiled by .* has no second derivative"):
                calls[entry_point]()
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("solver", [S.CG(rtol=1e-13), S.GMRES(rtol=1e-13), S.Dense(), S.LSQR(rtol=1e-13)])
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_under_inference_mode(solver, made):
    """Systems are solved and the user's solvers run as under no_grad, also with tensors made in inference mode."""
    a, b = torch.diag(torch.tensor([2.0, 3.0], dtype=torch.float64)), torch.ones(2, dtype=torch.float64)

    @hg.implicit.solver(argmin=lambda w, lam: ((w - lam) ** 2).sum())
    def train(lam):
        w = torch.zeros_like(lam, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            ((w - lam) ** 2).sum().backward()
            optimizer.step()
        return w.detach()

    def energy_step(w, lam):
        with torch.enable_grad():
            w = w if w.requires_grad else w.detach().requires_grad_()
            return w - 0.3 * torch.autograd.grad(((w - lam) ** 2).sum(), w, create_graph=True)[0]

    with torch.inference_mode():
        if made == "inside":
            a, b = a.clone(), b.clone()
        op = hg.operators.matrix(a, symmetric=True)
        x = hg.implicit.linear_solve(op, b, solver)
        y = hg.implicit.linear_solve(hg.operators.function(lambda v, a: a @ v, tensors=(a,), symmetric=True), b, solver)
        trained = train(b)
        z = hg.fixed_points.Anderson(rtol=1e-12)(energy_step, 0 * b, b).value
    for found, truth in ((x, b / a.diagonal()), (y, b / a.diagonal()), (trained, b), (z, b)):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=0.0)
