"""implicit.jacobian: several outer losses at once."""

from functools import partial

import numpy as np
import optree
import pytest
import torch

import hypergrad as hg
from helpers import assert_agrees, dense_system, nothing_changed, problem_at
from hypergrad import solvers as S
from problems import PROBLEMS
from systems import norm
from test_oracles import forms


def off(x, truth) -> float:
    """‖x − truth‖ / ‖truth‖."""
    return norm(np.asarray(x) - np.asarray(truth)) / norm(truth)


SMALL = [name for name in PROBLEMS if not problem_at(name).batch_dims and name != "equilibrium"]


def losses_of(p, sides: int = 3):
    """A function of several outer losses (the problem's and others of params and hparams), and each loss alone."""
    draw = torch.Generator().manual_seed(3)
    weights = [[torch.randn(x.shape, generator=draw).double() for x in optree.tree_leaves(p.params)] for _ in range(2)]

    def weighted(i: int):
        def loss(w, h):
            value = sum((c * x + 0.1 * x * x).sum() for c, x in zip(weights[i], optree.tree_leaves(w), strict=True))
            return value + (i + 1) * sum((x * x).sum() for x in optree.tree_leaves(h))

        return loss

    each = [p.outer_loss, weighted(0), weighted(1)][:sides]
    return (lambda w, h: torch.stack([loss(w, h) for loss in each])), each


def row_of(tree, like) -> np.ndarray:
    """The numbers of some leaves, zeros for None."""
    pairs = zip(tree, like, strict=True)
    return np.concatenate([(torch.zeros_like(y) if x is None else x).detach().reshape(-1).numpy() for x, y in pairs])


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in SMALL for form in forms(problem_at(name))])
def test_jacobian_against_dense_algebra(name, form):
    p = problem_at(name, 1)
    stack, each = losses_of(p)
    precise = {"rtol": 1e-14, "max_steps": 600, "on_failure": "ignore"}
    solver = S.BlockCG(**precise) if p.symmetric else S.GMRES(restart=60, **precise)
    given = {"params": p.params, "hparams": p.hparams, form: getattr(p, form), "symmetric": p.symmetric}
    found = hg.implicit.jacobian(stack, **given, solver=solver)
    adjoint, _, _, cross = dense_system(name, form, 1)
    assert_agrees(p, optree.tree_map(lambda g: g[0], found.grads))
    for i, loss in enumerate(each):
        leaves = [x.detach().requires_grad_() for x in optree.tree_leaves(p.params)]
        w, hparams = optree.tree_unflatten(optree.tree_structure(p.params), leaves), optree.tree_leaves(p.hparams)
        grads = torch.autograd.grad(loss(w, p.hparams), [*leaves, *hparams], allow_unused=True)
        b, direct = row_of(grads[: len(leaves)], leaves), row_of(grads[len(leaves) :], hparams)
        truth = direct - cross @ np.linalg.solve(adjoint, b)
        assert off(row_of([g[i] for g in optree.tree_leaves(found.grads)], hparams), truth) <= 1e-10
        assert off(found.outer_value[i], loss(p.params, p.hparams).detach()) <= 1e-14
    assert found.solution.code.shape == (3,) and found.inner_distance.shape == (3,)


def validation(groups: int = 4):
    """Logistic regression with a penalty for each feature, its exact solution, and a validation loss for each group."""
    draw = np.random.RandomState(0)
    x = torch.tensor(draw.randn(200, 40) * np.logspace(0, -2, 40))
    y = torch.tensor((draw.rand(200) > 0.5).astype(float))
    xv, yv = torch.tensor(draw.randn(groups, 30, 40)), torch.tensor((draw.rand(groups, 30) > 0.5).astype(float))
    lam = torch.full((40,), -6.0, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def inner(w, lam):
        return loss(x @ w, y) + (lam.exp() * w**2).sum() / 2

    def outer(w, lam):
        return torch.stack([loss(a @ w, b) for a, b in zip(xv, yv, strict=True)])

    w = torch.zeros(40, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.func.grad(inner)(w, lam.detach())
        hessian = torch.autograd.functional.hessian(lambda w: inner(w, lam.detach()), w)
        w = w - torch.linalg.inv(hessian) @ gradient
    return inner, outer, w, lam


def test_jacobian_takes_fewer_passes_than_gradients_one_after_the_other():
    inner, outer, w, lam = validation()
    given = {"inner_loss": inner, "params": w, "hparams": lam}
    found = hg.implicit.jacobian(outer, **given, solver=S.BlockCG(rtol=1e-12))
    steps = []
    for i in range(4):
        one = hg.implicit.grad(lambda w, lam, i=i: outer(w, lam)[i], **given, solver=S.CG(rtol=1e-12))
        assert off(found.grads[i], one.grads) <= 1e-8 and off(found.adjoint[i], one.adjoint) <= 1e-8
        assert abs(float(found.outer_value[i] - one.outer_value)) <= 1e-15
        steps.append(one.solution.steps)
    assert int(found.solution.steps.max()) < 0.5 * min(steps)


def exact(op, b, x0):
    """A user's own solver."""
    return S.Dense()(op, b).value


@pytest.mark.parametrize(
    "solver",
    [None, S.Dense(), S.MINRES(rtol=1e-12), S.Auto(rtol=1e-12), exact],
    ids=["default", "Dense", "MINRES", "Auto", "own"],
)
def test_jacobian_with_any_solver(solver):
    inner, outer, w, lam = validation(2)
    given = {"inner_loss": inner, "params": w, "hparams": lam}
    found = hg.implicit.jacobian(outer, **given, solver=solver)
    for i in range(2):
        one = hg.implicit.grad(lambda w, lam, i=i: outer(w, lam)[i], **given, solver=S.Dense())
        assert off(found.grads[i], one.grads) <= (1e-4 if solver is None else 1e-8)
    assert found.solution.method.startswith("BlockCG" if solver is None else "")


def test_jacobian_of_evaluated_losses_warm_started_and_recycled():
    inner, outer, w, lam = validation()
    live = w.clone().requires_grad_()
    start, recycled = None, S.Recycled(2)
    truth = hg.implicit.jacobian(outer, inner_loss=inner, params=w, hparams=lam, solver=S.BlockCG(rtol=1e-12)).grads
    steps = []
    for x0 in (None, "warm", recycled, recycled):
        given = {"inner_loss": inner(live, lam), "params": live, "hparams": lam}
        x0 = start if isinstance(x0, str) else x0
        found = hg.implicit.jacobian(outer(live, lam), **given, solver=S.BlockCG(rtol=1e-9), x0=x0)
        assert off(found.grads, truth) <= 1e-6
        start = found.adjoint
        steps.append(int(found.solution.steps.max()))
    assert steps[0] > 5 and steps[1] == 0 and steps[2] == steps[0] and steps[3] == 0
    assert live.grad is None and lam.grad is None


@pytest.mark.parametrize("groups", [1, 3])
def test_check_takes_one_row_of_a_jacobian(groups):
    inner, outer, w, lam = validation(groups)
    found = hg.implicit.jacobian(outer, inner_loss=inner, params=w, hparams=lam, solver=S.BlockCG(rtol=1e-12))
    with pytest.raises(TypeError, match=rf"implicit\.jacobian holds {groups}: pass row i of its grads"):
        hg.diagnostics.check(found)
    i = groups - 1
    given = {"outer_loss": lambda w, lam: outer(w, lam)[i], "inner_loss": inner, "params": w, "hparams": lam}
    report = hg.diagnostics.check(found.grads[i], **given)
    assert report.estimate.relative_error < 1e-8


@pytest.mark.filterwarnings("ignore::hypergrad.LostDerivative")
def test_jacobian_through_a_module_that_torch_cannot_vectorise():
    """A custom autograd.Function without a vmap rule takes one product after the other, with the same results."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return grad * 3 * ctx.saved_tensors[0] ** 2

    lam = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    w = lam.detach().clone()
    found = hg.implicit.jacobian(
        lambda w, lam: torch.stack([w.sum(), (w * lam).sum()]),
        inner_loss=lambda w, lam: (Cube.apply(w) * w / 12 - lam.detach() ** 3 * w / 3 + (w - lam) ** 2 / 2).sum(),
        params=w,
        hparams=lam,
    )
    a = w**2 + 1  # F = (w³ − λ₀³) / 3 + w − λ with ∂₂F = −1
    assert off(found.grads[0], 1 / a) <= 1e-6 and off(found.grads[1], w + lam.detach() / a) <= 1e-6


def test_jacobian_of_gauss_newton_and_of_leaves_that_do_not_require_grad():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=draw).double(), torch.randn(30, generator=draw).double()
    lam = {"penalty": torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True), "fixed": torch.ones(2)}
    model = hg.operators.GaussNewton(
        lambda w, lam: x @ w,
        lambda z, lam: ((z - y) ** 2).mean() / 2,
        lambda w, lam: (lam["penalty"].exp() * w**2).sum() / 2,
    )
    a = x.mT @ x / 30 + torch.diag(lam["penalty"].detach().exp())
    w = torch.linalg.inv(a) @ (x.mT @ y) / 30
    found = hg.implicit.jacobian(
        lambda w, lam: torch.stack([w.sum(), (w**2).sum()]), inner_loss=model, params=w, hparams=lam
    )
    v = torch.linalg.inv(a) @ torch.stack([torch.ones_like(w), 2 * w], -1)
    truth = -(lam["penalty"].detach().exp() * w).unsqueeze(-1) * v
    assert off(found.grads["penalty"], truth.mT) <= 1e-6
    assert found.grads["fixed"].shape == (2, 2) and not found.grads["fixed"].any()


def test_jacobian_reports_what_is_wrong():
    lam = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    given = {"params": lam.detach().clone(), "hparams": lam}
    saddle = lambda w, lam: (w[0] - lam[0]) ** 2 - (w[1] - lam[1]) ** 2  # noqa: E731
    with nothing_changed(lam), pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        hg.implicit.jacobian(lambda w, lam: w, inner_loss=saddle, **given)
    bowl = lambda w, lam: ((w - lam) ** 2).sum()  # noqa: E731
    for outer, got in (
        (lambda w, lam: w.sum(), r"shape \(\)"),
        (lambda w, lam: w[:0], r"shape \(0,\)"),
        (lambda w, lam: w.outer(w), r"shape \(2, 2\)"),
        (lambda w, lam: [w.sum()], "list"),
    ):
        with pytest.raises(ValueError, match=rf"outer_losses must give a tensor \[k\] of k ≥ 1 losses, got {got}"):
            hg.implicit.jacobian(outer, inner_loss=bowl, **given)
    with pytest.raises(TypeError, match="exactly one of inner_loss, fp_map and residual"):
        hg.implicit.jacobian(lambda w, lam: w, **given)
    with pytest.warns(hg.HypergradientWarning, match="means little"):
        hg.implicit.jacobian(lambda w, lam: w, inner_loss=bowl, params=torch.tensor([5.0, 9.0]).double(), hparams=lam)
    with pytest.raises(TypeError, match="must not be Stochastic"):
        hg.implicit.jacobian(lambda w, lam: w, inner_loss=hg.operators.Stochastic(bowl), **given)
    with pytest.raises(ValueError, match="x0 must be like"):
        hg.implicit.jacobian(lambda w, lam: w, inner_loss=bowl, **given, x0=torch.zeros(2))


def test_too_few_steps_for_one_of_the_losses_are_warned_of():
    """Two steps of FixedPoint solve the first loss's system, and leave half of the residual of the second's."""
    lam = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([1.0, 0.1], dtype=torch.float64)
    jacobian = partial(
        hg.implicit.jacobian,
        fp_map=lambda w, lam: w - a * w + a * lam,
        params=lam.detach().clone(),
        hparams=lam,
        solver=S.FixedPoint(max_steps=2),
    )
    jacobian(lambda w, lam: w[:1])
    with pytest.warns(hg.HypergradientWarning, match="off by an estimated .* FixedPoint left a relative residual"):
        jacobian(lambda w, lam: w)


@pytest.mark.parametrize("live", [False, True])
def test_the_default_where_only_the_outer_losses_use_some_params(live):
    """A row of an embedding, say: A is singular and the systems are inconsistent, yet the hypergradients determined."""
    q, c = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64), torch.tensor([1.0, -2.0], dtype=torch.float64)
    h = c.clone().requires_grad_()
    w = {"fit": torch.linalg.solve(q, c), "row": torch.ones(3, dtype=torch.float64)}
    w = {name: x.requires_grad_(live) for name, x in w.items()}
    inner = lambda w, h: w["fit"] @ q @ w["fit"] / 2 - h @ w["fit"]  # noqa: E731
    outer = lambda w, h: torch.stack([w["fit"].sum() + (w["row"] ** 2).sum(), w["fit"] @ c + w["row"].sum()])  # noqa: E731
    losses = (outer(w, h), inner(w, h)) if live else (outer, inner)
    with pytest.warns(hg.NotConverged, match="STAGNATED"):
        grads = hg.implicit.jacobian(losses[0], inner_loss=losses[1], params=w, hparams=h).grads
    truth = torch.linalg.solve(q, torch.stack([torch.ones_like(c), c], 1)).T
    assert float((grads - truth).norm()) < 1e-10
