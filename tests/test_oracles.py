"""The oracles reproduce DESIGN's numbers, and the torch problems are the same problems as the oracles'."""

from functools import partial

import numpy as np
import optree
import pytest
import torch

import oracles
import problems
from problems import PROBLEMS, Problem, problem

LISTED = [
    (oracles.ridge, ".252979272682", ".00540131666"),
    (oracles.logistic, ".119056402862", ".00829586143"),
    (oracles.biased, "54.857353056", "2.87658592"),
    (oracles.biased_optimum, "50.886701915590", None),
    (partial(oracles.quadratic_optimum, 10.0), "357.675538126", None),
    (partial(oracles.quadratic_optimum, 1e3), "351538.17137", None),
    (partial(oracles.quadratic_optimum, 1e5), "476621396.598", None),
    (partial(oracles.contraction, 0.5), "37.2003906", "27.3409960"),
    (partial(oracles.contraction, 0.9), "37.8259155", "28.2455025"),
    (partial(oracles.contraction, 0.99), "38.2690868", "28.8114934"),
    (oracles.equilibrium, "2.53292835126", "1.68443716"),
    (oracles.elastic_net, ".288207867676", ".0421665210"),
    # The row lists .0533204677; complex-step differentiation in extended precision gives .05332046781404.
    (oracles.heavy_ball, ".0109102107586", ".0533204678"),
]
ROW_ORACLES = {name: row.oracle for name, row in problems.ROWS.items() if row.batch_dims == 0} | {
    "elastic-net": oracles.elastic_net,
    "heavy-ball": oracles.heavy_ball,
    "hypertorch": oracles.hypertorch,
}
BUILDERS = {name: partial(problem, name) for name in PROBLEMS} | {
    "hypertorch": problems.hypertorch,
    "elastic-net": problems.elastic_net,
}
UNROLLED = {"heavy-ball": problems.heavy_ball, "elastic-net": problems.elastic_net_unrolled}


def to_all_digits(value: float, listed: str) -> bool:
    """Whether rounding `value` gives the listed digits (1e-11 is left to the linear algebra of other machines)."""
    return abs(value - float(listed)) <= 0.5 * 10.0 ** -len(listed.split(".")[1]) + 1e-11 * abs(value)


def flat(tree) -> torch.Tensor:
    """All leaves as one vector."""
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)])


def unflatten(tree, vector: torch.Tensor):
    """A vector in the structure of a pytree."""
    parts, treedef = optree.tree_flatten(tree)
    pieces = torch.split(vector, [leaf.numel() for leaf in parts])
    return optree.tree_unflatten(treedef, [p.reshape(leaf.shape) for p, leaf in zip(pieces, parts, strict=True)])


def relative(value, truth) -> float:
    """‖value − truth‖ / ‖truth‖."""
    value, truth = np.asarray(value), np.asarray(truth)
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


def equation(p: Problem, form: str):
    """F(w, λ) on flat vectors by one of the three forms, F = Φ − w taken as w − Φ."""
    given = getattr(p, form)

    def residual(w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        hparams = unflatten(p.hparams, h)
        if form == "inner_loss":
            return torch.func.grad(lambda w: given(unflatten(p.params, w), hparams))(w)
        out = flat(given(unflatten(p.params, w), hparams))
        return w - out if form == "fp_map" else out

    return residual


def implicit_gradient(p: Problem, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """v and ∇f = ∇₂E − ∂₂Fᵀ A⁻ᵀ ∇₁E from dense Jacobians and LU factors."""
    w, h = flat(p.params), flat(p.hparams).detach()
    f = equation(p, form)
    a, b = torch.func.jacrev(f, argnums=(0, 1))(w, h)
    dw, dh = torch.func.grad(
        lambda w, h: p.outer_loss(unflatten(p.params, w), unflatten(p.hparams, h)), argnums=(0, 1)
    )(w, h)
    factors, pivots = torch.linalg.lu_factor(a.T)
    v = torch.linalg.lu_solve(factors, pivots, dw[:, None])[:, 0]
    return v, dh - b.T @ v


def forms(p: Problem) -> list[str]:
    """The forms of the inner problem that are given."""
    return [form for form in ("inner_loss", "residual", "fp_map") if getattr(p, form) is not None]


def flat_grads(p) -> np.ndarray:
    """The oracle's ∇f as one vector."""
    return np.concatenate([g.reshape(-1) for g in p.grads])


@pytest.mark.parametrize(("oracle", "value", "grad_norm"), LISTED)
def test_listed_values(oracle, value, grad_norm):
    o = oracle()
    assert to_all_digits(o.value, value)
    assert grad_norm is None or to_all_digits(o.grad_norm, grad_norm)


def test_elastic_net_has_five_in_the_support_and_meets_its_conditions():
    o = oracles.elastic_net()
    x, y, w = o.data["x"], o.data["y"], o.solution
    l1, l2 = np.exp(o.hparams[0])
    slope = x.T @ (y - x @ w) / len(y) - l2 * w
    assert np.count_nonzero(w) == 5
    np.testing.assert_allclose(slope[w != 0], l1 * np.sign(w[w != 0]), rtol=1e-13)
    assert np.all(np.abs(slope[w == 0]) < 0.99 * l1)


def test_optima_are_stationary():
    assert oracles.biased_optimum().grad_norm < 1e-11
    for kappa in (10.0, 1e3, 1e5):
        at_zero = oracles.quadratic(kappa, np.zeros(8)).grad_norm
        assert oracles.quadratic_optimum(kappa).grad_norm < 1e-9 * at_zero


@pytest.mark.parametrize("name", ROW_ORACLES)
@pytest.mark.parametrize("seed", [0, 1])
def test_oracle_gradient_is_the_derivative_of_its_value(name, seed):
    oracle = partial(ROW_ORACLES[name], seed=seed)
    o = oracle()
    for draw in range(3):
        direction = oracles.random_direction(o, draw)
        exact = sum(np.sum(g * u) for g, u in zip(o.grads, direction, strict=True))
        difference, _ = oracles.derivative_along(oracle, direction)
        assert abs(exact - difference) <= 1e-10 * (abs(o.value) + o.grad_norm)


@pytest.mark.parametrize("name", ROW_ORACLES)
def test_oracle_hessian_is_symmetric(name):
    oracle = ROW_ORACLES[name]
    u, v = (oracles.random_direction(oracle(), seed) for seed in (0, 1))
    hu, hv = oracles.derivative_along(oracle, u)[1], oracles.derivative_along(oracle, v)[1]
    size = np.sqrt(sum(np.sum(g * g) for g in (*hu, *hv)))
    assert abs(sum(np.sum(a * b) for a, b in zip(hu, v, strict=True)) - sum(map(np.vdot, hv, u))) < 1e-9 * size


def test_oracle_hessians_equal_closed_forms():
    d = oracles.quadratic_data(1e3)
    m = oracles.solve(d["a"], d["b"])
    (u,) = oracles.random_direction(oracles.quadratic(1e3))
    _, (product,) = oracles.derivative_along(partial(oracles.quadratic, 1e3), (u,))
    assert relative(product, m.T @ (m @ u) + 0.1 * u) < 1e-9

    x, y, xv, yv = (torch.from_numpy(oracles.diabetes()[k]) for k in ("x", "y", "xv", "yv"))

    def f(theta: torch.Tensor) -> torch.Tensor:
        factors = torch.linalg.lu_factor(x.T @ x / len(x) + torch.diag(theta.exp()))
        w = torch.linalg.lu_solve(*factors, (x.T @ y / len(x))[:, None])[:, 0]
        return (xv @ w - yv).square().sum() / (2 * len(xv))

    (u,) = oracles.random_direction(oracles.ridge())
    _, (product,) = oracles.derivative_along(oracles.ridge, (u,))
    hessian = torch.autograd.functional.hessian(f, torch.full((10,), -2.0).double())
    assert relative(product, hessian.numpy() @ u) < 1e-9


@pytest.mark.parametrize("random", [False, 1, 2])
@pytest.mark.parametrize("name", BUILDERS)
def test_problem_is_at_its_solution(name, random):
    p = BUILDERS[name](random=random)
    for form in forms(p):
        f = equation(p, form)(flat(p.params), flat(p.hparams).detach())
        size = 1.0 if form == "fp_map" else 2.0 / p.step
        assert f.norm() <= 1e-13 * size * flat(p.params).norm()
    assert relative(p.outer_loss(p.params, p.hparams).item(), p.value) < 1e-12
    assert optree.tree_structure(p.fp_map(p.params, p.hparams)) == optree.tree_structure(p.params)


@pytest.mark.parametrize("random", [False, 1])
@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "equilibrium-batched"])
def test_dense_implicit_gradient_equals_numpys(name, random):
    p = BUILDERS[name](random=random)
    for form in forms(p):
        v, grad = implicit_gradient(p, form)
        assert relative(grad, flat_grads(p)) < 1e-10
        assert relative(v * (p.step if form == "fp_map" else 1.0), flat(p.adjoint)) < 1e-10


@pytest.mark.parametrize("name", BUILDERS)
def test_condition_symmetry_and_contraction_are_as_stated(name):
    p = BUILDERS[name]()
    w, h = flat(p.params), flat(p.hparams).detach()
    a = torch.func.jacrev(equation(p, "fp_map"))(w, h)
    assert torch.allclose(a, a.T, rtol=0, atol=1e-12) == p.symmetric
    if p.batch_dims:
        blocks = a.reshape(64, 20, 64, 20).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        assert torch.count_nonzero(a) == torch.count_nonzero(blocks)
        assert relative(torch.linalg.cond(blocks).max(), p.condition) < 1e-8
    else:
        assert relative(torch.linalg.cond(a), p.condition) < 1e-6
    assert relative(torch.linalg.matrix_norm(torch.eye(len(a)).double() - a, 2), p.contraction) < 1e-8


@pytest.mark.parametrize("name", BUILDERS)
def test_float32_and_given_hparams(name):
    p, single = BUILDERS[name](random=3), BUILDERS[name](random=3, dtype=torch.float32)
    for leaf in optree.tree_leaves((single.params, single.hparams, single.adjoint)):
        assert leaf.dtype == torch.float32
    for leaf in optree.tree_leaves(single.hparams):
        assert leaf.requires_grad and leaf.is_leaf
    for form in forms(single):
        assert flat(equation(single, form)(flat(single.params), flat(single.hparams))).dtype == torch.float32
    assert relative(single.outer_loss(single.params, single.hparams).item(), p.value) < 1e-4
    again = BUILDERS[name](random=3, hparams=p.hparams)
    assert again.value == p.value
    assert all(np.array_equal(a, b) for a, b in zip(again.grads, p.grads, strict=True))


@pytest.mark.parametrize("random", [False, 1])
@pytest.mark.parametrize("name", UNROLLED)
def test_unrolled_gradient_equals_numpys(name, random):
    u = UNROLLED[name](random=random)
    state = u.start
    for _ in range(u.steps):
        state = u.step(state, u.hparams)
    value = u.outer_loss(state, u.hparams)
    grads = torch.autograd.grad(value, optree.tree_leaves(u.hparams))
    assert relative(value.item(), u.value) < 1e-12
    assert relative(flat(grads), flat_grads(u)) < 1e-10


def test_hypertorch_run_reproduces_the_published_losses():
    run = oracles.hypertorch_logistic()
    for step, published in ((0, 0.57440), (10, 0.53377), (100, 0.28535)):
        assert abs(run.losses[step] - published) < 1e-5
    assert abs(run.losses[-1] - 0.2805) < 5e-5
    assert abs(run.grad_norms[-1] - 0.07) < 5e-3
    exact = oracles.hypertorch(run.hparams)
    assert abs(exact.value - 0.0784) < 5.1e-5
    assert abs(exact.grad_norm - 55.0) < 0.05


def test_hypertorch_optimum():
    assert abs(oracles.hypertorch_optimum().value - 0.0321) < 5e-5
