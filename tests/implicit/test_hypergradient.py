"""implicit.grad and implicit.backward against the oracles, over live modules, and in every structure."""

import gc
import resource
import warnings
import weakref
from collections import Counter, OrderedDict, namedtuple
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg
import oracles
from helpers import (
    EXACT,
    S,
    adjoint_of,
    assert_agrees,
    assert_is_gradient_of,
    cases,
    dense_system,
    errors,
    hypergradient,
    problem_at,
    share_buffers,
    solvers_for,
    tensors_in,
    untouched,
)
from hypergrad._autodiff import Linearisation
from problems import PROBLEMS, Problem
from test_oracles import flat, forms, relative

# These rows take a thousand steps or more.
SLOW = {("quadratic-1e5", solver) for solver in ("BiCGStab", "NormalCG", "LSQR")}
SLOW |= {("quadratic-1e3", solver) for solver in ("NormalCG", "LSQR", "Optimizer")} | {("biased", "Neumann")}
SLOW_IN_FLOAT32 = SLOW | {("quadratic-1e5", "MINRES")}
FORMS = [(name, form) for name in PROBLEMS for form in forms(problem_at(name))]
QUIET = {"on_failure": "ignore"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rand(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


# --- agreement with the oracles ---------------------------------------------------------------------------------------


def marked(rows, slow):
    """Mark expensive rows as slow, and for random problems (seed 1) all forms but fp_map, which every solver takes."""

    def is_slow(name, form, solver, seed):
        return (name, solver) in slow or (seed and form != "fp_map")

    return [pytest.param(*row, marks=pytest.mark.slow if is_slow(*row) else ()) for row in rows]


@pytest.mark.parametrize(("name", "form", "solver", "seed"), marked(cases(seeds=(0, 1)), SLOW))
def test_every_form_and_solver_agrees_with_the_oracle(name, form, solver, seed):
    p = problem_at(name, seed)
    with untouched(p.params, p.hparams):
        result = hypergradient(p, form, solvers_for(p, form)[solver])
    assert_agrees(p, result.grads)
    assert relative(flat(result.adjoint), flat(adjoint_of(p, form))) < EXACT
    assert optree.tree_structure(result.adjoint) == optree.tree_structure(p.params)
    assert relative(result.outer_value, p.value) < 1e-12
    assert result.inner_distance.max() < 1e-9


@pytest.mark.parametrize(
    ("name", "form", "solver", "seed"), marked(cases(seeds=(1,), dtype=torch.float32), SLOW_IN_FLOAT32)
)
def test_float32_is_as_accurate_as_the_condition_allows(name, form, solver, seed):
    """The relative error of each leaf is at most 16 κ(A) ε. Rounding the data alone moves A⁻ᵀb by κ ε.

    The problem is solved in float64 and then rounded. The measured factor is 11 for NormalCG on logistic, and below 5
    for all others. BiCGStab may end early with the status BREAKDOWN.
    """
    p = problem_at(name, seed, torch.float32)
    result = hypergradient(p, form, solvers_for(p, form)[solver])
    if solver == "BiCGStab" and result.solution.status is hg.Status.BREAKDOWN:
        return
    assert_agrees(p, result.grads, tolerance=16 * p.condition * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_default_solver(name, form):
    """The default is CG for symmetric systems and GMRES for others, to a relative residual of 1e-6.

    A batch of small systems is solved by Dense.
    """
    p = problem_at(name)
    result = hypergradient(p, form)
    default = S.Dense() if p.batch_dims else S.CG() if p.symmetric else S.GMRES()
    rtol = 1e-12 if p.batch_dims else 0.0  # the default takes other operations for batches
    torch.testing.assert_close(flat(result.grads), flat(hypergradient(p, form, default).grads), rtol=rtol, atol=0)
    assert result.solution.ok
    assert result.solution.relative_residual.max() <= 1e-6
    assert_agrees(p, result.grads, tolerance=1e-6 * p.condition)


# --- what is reported -------------------------------------------------------------------------------------------------

EARLY = {
    "CG": S.CG(max_steps=3, **QUIET),
    "MINRES": S.MINRES(max_steps=3, **QUIET),
    "GMRES": S.GMRES(max_steps=3, **QUIET),
    "BiCGStab": S.BiCGStab(max_steps=2, **QUIET),
    "NormalCG": S.NormalCG(max_steps=4, **QUIET),
    "LSQR": S.LSQR(max_steps=4, **QUIET),
    "FixedPoint": S.FixedPoint(max_steps=4, **QUIET),
    "Neumann": S.Neumann(max_steps=4, step_size=0.1, **QUIET),
    "one step": S.FixedPoint(max_steps=1, **QUIET),
    "Optimizer": S.Optimizer(max_steps=4, build=lambda x: torch.optim.SGD(x, lr=1e-3), **QUIET),
    "Nystrom": S.Nystrom(rank=3, damping=1.0, **QUIET),
    "damped": S.GMRES(max_steps=3, damping=0.7, **QUIET),
    "user": lambda op, b, x0: op(b),
}
SYMMETRIC_ONLY = {"CG", "MINRES", "Nystrom"}


@pytest.mark.parametrize(("name", "form"), FORMS)
@pytest.mark.filterwarnings("ignore::hypergrad.HypergradientWarning")
def test_reported_residual_is_that_of_the_dense_system(name, form):
    """‖b − Aᵀv‖ and ‖b‖ agree with dense matrices (per sample if batched), and ∇f with ∇₂E − ∂₂Fᵀv for every v."""
    p = problem_at(name, 1)
    a, b, _, _ = dense_system(name, form, 1)
    for key, solver in EARLY.items():
        if key in SYMMETRIC_ONLY and not p.symmetric:
            continue
        result = hypergradient(p, form, solver)
        v = flat(result.adjoint).numpy()
        damping = getattr(solver, "damping", 0.0)
        r, rhs = b - a @ v - damping * v, b
        if p.batch_dims:
            r, rhs = r.reshape(64, -1), rhs.reshape(64, -1)
        sizes, norms = np.linalg.norm(r, axis=-1), np.linalg.norm(rhs, axis=-1)
        allowed = 1e-13 * (norms + np.linalg.norm(a) * np.linalg.norm(v))
        assert np.all(np.abs(result.solution.residual_norm.numpy() - sizes) <= allowed), key
        assert np.all(np.abs(result.solution.rhs_norm.numpy() - norms) <= 1e-13 * norms), key
        assert np.all(np.abs(result.solution.relative_residual.numpy() - sizes / norms) <= allowed / norms), key
        assert_is_gradient_of(p, form, v, result.grads, tolerance=1e-11, seed=1)


# Damping does not depend on the condition number, and the batched equilibrium has the same systems.
DAMPED = [case for case in FORMS if case[0] != "equilibrium" and problem_at(case[0]).condition <= 1e3]


@pytest.mark.parametrize(("name", "form"), DAMPED)
def test_solvers_with_damping_solve_the_damped_system(name, form):
    """v solves (Aᵀ + γI) v = b, also for Nystrom of full rank, whose γ is the ρ of its paper."""
    p = problem_at(name, 1)
    a, b, _, _ = dense_system(name, form, 1)
    gamma = 0.1 * np.linalg.norm(a)
    v = np.linalg.solve(a + gamma * np.eye(len(a)), b)
    table = {
        "Dense": S.Dense(damping=gamma, rtol=1e-12),
        "GMRES": S.GMRES(damping=gamma, restart=60, rtol=1e-12),
        "LSQR": S.LSQR(damping=gamma, rtol=1e-12),
    }
    if p.symmetric:
        table |= {
            "CG": S.CG(damping=gamma, rtol=1e-12),
            "Nystrom": S.Nystrom(rank=len(a), damping=gamma),
        }
    for key, solver in table.items():
        result = hypergradient(p, form, solver)
        assert relative(flat(result.adjoint), v) < EXACT, key
        assert_is_gradient_of(p, form, v, result.grads, seed=1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "form"), [case for case in FORMS if problem_at(case[0]).symmetric])
def test_k_steps_of_cg_give_the_krylov_optimum(name, form, seed):
    """The K-th iterate, and neither neighbour, minimises ‖v − A⁻¹b‖_A over span(b, Ab, …, A^{K−1}b)."""
    steps = 4
    p = problem_at(name, seed)
    a, b, _, _ = dense_system(name, form, seed)
    basis = [b / np.linalg.norm(b)]
    for _ in range(steps - 1):
        basis.append(a @ basis[-1])
        basis = list(np.linalg.qr(np.stack(basis, 1)).Q.T)
    q = np.stack(basis, 1)
    v = q @ np.linalg.solve(q.T @ a @ q, q.T @ b)
    result = hypergradient(p, form, S.CG(max_steps=steps, **QUIET))
    # The error falls in the norm of A; the residual may grow meanwhile, and is then said to.
    worse_than_none = np.linalg.norm(b - a @ v) >= np.linalg.norm(b)
    assert result.solution.status is (hg.Status.DIVERGED if worse_than_none else hg.Status.COMPLETED)
    assert relative(flat(result.adjoint), v) < EXACT
    assert_is_gradient_of(p, form, v, result.grads, seed=seed)


def test_inner_residual_is_the_norm_of_the_inner_problem_at_the_given_params():
    p = problem_at("biased", 1)
    params = [w + 1e-3 * torch.randn_like(w) for w in p.params]
    for form in forms(p):
        result = hg.implicit.grad(p.outer_loss, params=params, hparams=p.hparams, **{form: getattr(p, form)})
        if form == "inner_loss":
            leaves = [w.clone().requires_grad_() for w in params]
            f = torch.autograd.grad(p.inner_loss(leaves, p.hparams), leaves)
        else:
            f = getattr(p, form)(params, p.hparams)
        f = flat(f).detach() - (flat(params) if form == "fp_map" else 0.0)
        assert relative(result.inner_residual, f.norm().item()) < 1e-12
        assert relative(result.outer_value, p.outer_loss(params, p.hparams).item()) < 1e-14
        stretch = result.solution.value.norm() / result.solution.rhs_norm
        assert relative(result.inner_distance, f.detach().norm() * stretch / flat(params).norm()) < 1e-12
        assert not result.outer_value.requires_grad
        # A is nearly a multiple of the identity here, so the estimate is close to the truth.
        assert 0.2 < result.inner_distance * flat(params).norm() / (flat(params) - flat(p.params)).norm() < 5


# --- live modules -----------------------------------------------------------------------------------------------------

RHO = 0.5
CONTAINERS = {
    "list": lambda model: list(model.parameters()),
    "generator": lambda model: model.parameters(),
    "dict": lambda model: dict(model.named_parameters()),
}


class Biased:
    """A model at the exact minimum of training loss + ½ρ‖w − λ‖²; λ has the shapes of w, and ∇f = ρ (H + ρI)⁻¹ ∇E."""

    def __init__(self, model: torch.nn.Module):
        self.model = model.double()
        self.x, self.y, self.xv, self.yv = rand(30, 4), rand(30, 2), rand(20, 4), rand(20, 2)
        self.names = [name for name, _ in model.named_parameters()]
        slopes = torch.autograd.grad(self.train(), list(model.parameters()))
        self.bias = [(w + g / RHO).detach().requires_grad_() for w, g in zip(model.parameters(), slopes, strict=True)]

    def train(self) -> torch.Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def pull(self, params, bias) -> torch.Tensor:
        return 0.5 * RHO * sum((w - b).square().sum() for w, b in zip(params, bias, strict=True))

    def inner(self) -> torch.Tensor:
        return self.train() + self.pull(self.model.parameters(), self.bias)

    def outer(self) -> torch.Tensor:
        return F.mse_loss(self.model(self.xv), self.yv)

    def call(self, params, x):
        leaves = params.values() if isinstance(params, dict) else params
        return torch.func.functional_call(self.model, dict(zip(self.names, leaves, strict=True)), (x,))

    def inner_loss(self, params, bias) -> torch.Tensor:
        leaves = params.values() if isinstance(params, dict) else params
        return F.mse_loss(self.call(params, self.x), self.y) + self.pull(leaves, bias)

    def outer_loss(self, params, bias) -> torch.Tensor:
        return F.mse_loss(self.call(params, self.xv), self.yv)

    def truth(self) -> torch.Tensor:
        shapes = [w.shape for w in self.model.parameters()]

        def loss(w, x, y):
            parts = w.split([shape.numel() for shape in shapes])
            return F.mse_loss(self.call([p.view(s) for p, s in zip(parts, shapes, strict=True)], x), y)

        w = flat(list(self.model.parameters())).detach()
        hessian = torch.autograd.functional.hessian(lambda w: loss(w, self.x, self.y), w)
        slope = torch.func.grad(loss)(w, self.xv, self.yv)
        return RHO * torch.linalg.inv(hessian + RHO * torch.eye(len(w))) @ slope


MODELS = {
    "linear": lambda: torch.nn.Linear(4, 2),
    "mlp": lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)),
}
TIGHT = S.MINRES(max_steps=1000, rtol=1e-13, **QUIET)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("model", MODELS)
def test_evaluated_losses_over_live_modules_equal_callables_and_the_dense_truth(model, container):
    case = Biased(MODELS[model]())
    params = CONTAINERS[container]
    options = {"hparams": case.bias, "solver": TIGHT}
    with untouched(list(case.model.parameters()), case.bias):
        live = hg.implicit.grad(case.outer(), inner_loss=case.inner(), params=params(case.model), **options)
        called = hg.implicit.grad(case.outer_loss, inner_loss=case.inner_loss, params=params(case.model), **options)
        mixed = [
            hg.implicit.grad(case.outer(), inner_loss=case.inner_loss, params=params(case.model), **options),
            hg.implicit.grad(case.outer_loss, inner_loss=case.inner(), params=params(case.model), **options),
        ]
    assert relative(flat(live.grads), case.truth()) < EXACT
    for other in (called, *mixed):
        assert relative(flat(other.grads), flat(live.grads)) < 1e-12
        assert relative(flat(other.adjoint), flat(live.adjoint)) < 1e-12
        assert relative(other.outer_value, live.outer_value) < 1e-14
    assert isinstance(live.adjoint, dict if container == "dict" else list)


@pytest.mark.parametrize("form", ["fp_map", "residual"])
def test_evaluated_maps_over_live_modules(form):
    case = Biased(MODELS["mlp"]())
    weights = list(case.model.parameters())
    slopes = torch.autograd.grad(case.inner(), weights, create_graph=True)
    value = [w - 0.1 * g for w, g in zip(weights, slopes, strict=True)] if form == "fp_map" else list(slopes)
    result = hg.implicit.grad(
        case.outer(), params=weights, hparams=case.bias, solver=TIGHT, symmetric=True, **{form: value}
    )
    assert relative(flat(result.grads), case.truth()) < EXACT


def test_backward_through_live_modules_adds_to_hparams_alone():
    case = Biased(MODELS["mlp"]())
    marks = [torch.randn_like(b) for b in case.bias]
    for b, mark in zip(case.bias, marks, strict=True):
        b.grad = mark.clone()
    with untouched(list(case.model.parameters())):
        for _ in range(2):
            hg.implicit.backward(
                case.outer(), inner_loss=case.inner(), params=case.model.parameters(), hparams=case.bias, solver=TIGHT
            )
    added = flat([b.grad for b in case.bias]) - flat(marks)
    assert relative(added, 2 * case.truth()) < EXACT


def test_modules_work_under_no_grad_and_in_eval_mode():
    case = Biased(MODELS["mlp"]())
    case.model.eval()
    with torch.no_grad():
        result = hg.implicit.grad(
            case.outer_loss,
            inner_loss=case.inner_loss,
            params=case.model.parameters(),
            hparams=case.bias,
            solver=TIGHT,
        )
    assert relative(flat(result.grads), case.truth()) < EXACT


# --- structures -------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])
STRUCTURES = {
    "tensor": lambda v: v,
    "list": lambda v: [v[:4], v[4:]],
    "tuple": lambda v: (v[:1], v[1:7], v[7:]),
    "dict": lambda v: {"b": v[5:], "a": v[:5]},
    "ordered": lambda v: OrderedDict(z=v[:5], y=v[5:]),
    "namedtuple": lambda v: Pair(v[:2], [v[2:]]),
    "nested": lambda v: {"x": (v[0], [v[1:3].reshape(2, 1)]), "y": {"z": v[3:].reshape(7)}},
    "scalars": lambda v: list(v.unbind()),
    "with None": lambda v: [v[:4], None, v[4:]],
}
JOIN = {
    "tensor": lambda t: t,
    "list": torch.cat,
    "tuple": torch.cat,
    "dict": lambda t: torch.cat([t["a"], t["b"]]),
    "ordered": lambda t: torch.cat([t["z"], t["y"]]),
    "namedtuple": lambda t: torch.cat([t.first, t.second[0]]),
    "nested": lambda t: torch.cat([t["x"][0].reshape(1), t["x"][1][0].reshape(2), t["y"]["z"]]),
    "scalars": torch.stack,
    "with None": lambda t: torch.cat([t[0], t[2]]),
}


@pytest.mark.parametrize("hshape", STRUCTURES)
@pytest.mark.parametrize("wshape", STRUCTURES)
def test_params_and_hparams_are_any_pytrees(wshape, hshape):
    o = oracles.ridge(seed=1)
    x, y, xv, yv = (torch.from_numpy(o.data[k]) for k in ("x", "y", "xv", "yv"))
    join_w, join_h = JOIN[wshape], JOIN[hshape]

    def own(tree, requires_grad):
        return optree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(requires_grad), tree)

    params = own(STRUCTURES[wshape](torch.from_numpy(o.solution)), False)
    hparams = own(STRUCTURES[hshape](torch.from_numpy(o.hparams[0])), True)
    result = hg.implicit.backward(
        lambda w, h: (xv @ join_w(w) - yv).square().sum() / (2 * len(yv)),
        inner_loss=lambda w, h: (
            (x @ join_w(w) - y).square().sum() / (2 * len(y)) + 0.5 * (join_h(h).exp() * join_w(w) ** 2).sum()
        ),
        params=params,
        hparams=hparams,
        solver=S.CG(rtol=1e-12),
    )
    assert optree.tree_structure(result.grads) == optree.tree_structure(hparams)
    assert optree.tree_structure(result.adjoint) == optree.tree_structure(params)
    assert type(result.grads) is type(hparams) and type(result.adjoint) is type(params)
    for g, h in zip(tensors_in(result.grads), tensors_in(hparams), strict=True):
        assert g.shape == h.shape and torch.equal(g, h.grad)
    assert relative(join_h(result.grads), o.grads[0]) < EXACT
    assert relative(join_w(result.adjoint), o.adjoint) < EXACT


LAYOUTS = {
    "transposed": lambda w: w.T.contiguous().T,
    "channels last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "strided": lambda w: torch.stack([w, w], -1)[..., 0],
    "expanded axis": lambda w: w.unsqueeze(1),
    "0-d": lambda w: w.sum(),
    "empty beside": lambda w: w,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_parameters(layout):
    """f(λ) = E(λ ∘ c) has ∇f = c ∘ ∇E(λ ∘ c) however w lies in memory."""
    base = rand(3, 4, 2, 2) if layout == "channels last" else rand(3, 4)
    w = LAYOUTS[layout](base)
    c = 1 + torch.rand_like(w)
    hparams = (w / c).requires_grad_()
    t = torch.randn_like(w)
    empty = [torch.zeros(0, dtype=torch.float64)] if layout == "empty beside" else []
    result = hg.implicit.grad(
        lambda p, h: (p[0] - t).pow(4).sum(),
        inner_loss=lambda p, h: (0.5 * (p[0] - c * h).square() * c).sum() + sum(p[1:], torch.zeros(())).sum(),
        params=[w, *empty],
        hparams=hparams,
        solver=S.CG(rtol=1e-13),
    )
    assert relative(result.grads, (c * 4 * (w - t).pow(3)).detach()) < 1e-11


def test_mixed_dtypes():
    """One leaf is float32 and one float64, with A not the identity on either; each result has its leaf's dtype."""
    m = rand(5, 5)
    a = m @ m.T / 5 + torch.eye(5)
    d = 1 + torch.rand(3)
    hparams = [torch.randn(3, requires_grad=True), rand(5, requires_grad=True)]
    params = {"single": (hparams[0] / d).detach(), "double": torch.linalg.inv(a) @ hparams[1].detach()}
    t = [torch.randn(3), rand(5)]
    result = hg.implicit.grad(
        lambda w, h: (w["single"] - t[0]).square().sum().double() + (w["double"] - t[1]).square().sum(),
        params=params,
        hparams=hparams,
        residual=lambda w, h: {"single": d * w["single"] - h[0], "double": a @ w["double"] - h[1]},
        symmetric=True,
        solver=S.CG(rtol=1e-6),
    )
    assert [g.dtype for g in result.grads] == [torch.float32, torch.float64]
    assert relative(result.grads[0], 2 * (params["single"] - t[0]) / d) < 1e-5
    assert relative(result.grads[1], torch.linalg.inv(a) @ (2 * (params["double"] - t[1]))) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-11, 1e11, 1e25])
def test_outer_losses_of_any_scale(scale):
    """Squares of these float32 losses overflow or underflow, so neither the solve nor the estimates may square them."""
    hparams = torch.randn(6, requires_grad=True)
    d, t = 1 + torch.rand(6), torch.randn(6)
    w = (hparams / d).detach() * (1 + 1e-5)
    result = hg.implicit.grad(
        lambda w, h: scale * (w - t).square().sum(),
        params=w,
        hparams=hparams,
        inner_loss=lambda w, h: 0.5 * (d * w * w).sum() - w @ h,
    )
    assert relative(result.grads.double(), scale * (2 * (w - t) / d).double()) < 1e-4
    assert 1e-6 < result.inner_distance < 1e-4


# --- hparams and params that are results of computations --------------------------------------------------------------


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 30)).double()


@pytest.mark.parametrize("evaluated", [False, True])
def test_hparams_that_a_network_computes(evaluated):
    """λ = 0.3 net(z) − 3: backward continues into the network's weights, by the Jacobian of the network."""
    net, z = network(), rand(3)
    theta = 0.3 * net(z) - 3.0
    o = oracles.logistic(theta.detach().numpy(), seed=1)
    x, y, xv, yv = (torch.from_numpy(o.data[k]) for k in ("x", "y", "xv", "yv"))
    bce = F.binary_cross_entropy_with_logits
    weights = list(net.parameters())
    truth = torch.autograd.grad(theta, weights, torch.from_numpy(o.grads[0]), retain_graph=True)

    def outer(w, h):
        return bce(xv @ w, yv)

    def inner(w, h):
        return bce(x @ w, y) + 0.5 * (h.exp() * w * w).sum()

    w = torch.from_numpy(o.solution).requires_grad_(evaluated)
    losses = (outer(w, theta), inner(w, theta)) if evaluated else (outer, inner)
    result = hg.implicit.backward(
        losses[0], inner_loss=losses[1], params=w, hparams=theta, solver=S.CG(rtol=1e-13, **QUIET)
    )
    assert relative(result.grads, o.grads[0]) < EXACT
    assert max(errors([p.grad for p in weights], truth)) < EXACT
    assert w.grad is None


def test_hparams_of_several_heads_and_a_leaf():
    """Outputs that share a node (split) and a leaf beside them; .grad of all adds up to the total derivative."""
    a = rand(4, requires_grad=True)
    leaf = rand(2, requires_grad=True)
    first, second = torch.tanh(a).split([1, 3])
    hparams = [first, second * 2.0, leaf]
    value = flat(hparams).detach()
    t = rand(6)
    hg.implicit.backward(
        lambda w, h: (w - t).square().sum() + h[2].pow(3).sum(),
        params=value.clone(),
        hparams=hparams,
        fp_map=lambda w, h: 0.3 * w + 0.7 * torch.cat(list(h)),
        symmetric=True,
        solver=S.CG(rtol=1e-13),
    )
    g = 2 * (value - t)
    slope = 1 - torch.tanh(a.detach()) ** 2
    assert relative(a.grad, slope * torch.cat([g[:1], 2 * g[1:4]])) < 1e-12
    assert relative(leaf.grad, g[4:] + 3 * leaf.detach() ** 2) < 1e-12


@pytest.mark.parametrize("evaluated", [False, True])
def test_params_that_are_results_of_computations(evaluated):
    """No gradient flows into the graph that computed params."""
    seed = rand(5, requires_grad=True)
    hparams = rand(5, requires_grad=True)
    t, c = rand(5), 1 + torch.rand(5, dtype=torch.float64)
    w = (seed * 0 + hparams.detach()) / c
    assert not w.is_leaf

    def outer(w, h):
        return (w - t).pow(4).sum()

    def inner(w, h):
        return 0.5 * (c * w * w).sum() - w @ h

    losses = (outer(w, hparams), inner(w, hparams)) if evaluated else (outer, inner)
    result = hg.implicit.backward(
        losses[0], inner_loss=losses[1], params=w, hparams=hparams, solver=S.CG(rtol=1e-13, **QUIET)
    )
    assert relative(result.grads, (4 * (w - t).pow(3) / c).detach()) < 1e-12
    assert torch.equal(hparams.grad, result.grads)
    assert seed.grad is None


def test_params_unrolled_from_hparams_count_once_with_callables():
    """w_T(λ) with its graph counts as a constant point: the result is the implicit derivative alone."""
    hparams = rand(5, requires_grad=True)
    w = torch.zeros(5, dtype=torch.float64)
    for _ in range(60):
        w = 0.5 * w + 0.5 * hparams
    result = hg.implicit.grad(
        lambda w, h: w[0].pow(3).sum(),
        params=[w],
        hparams=[hparams],
        fp_map=lambda w, h: [0.5 * (w[0] + h[0])],
        solver=S.FixedPoint(rtol=1e-13),
    )
    assert relative(result.grads[0], 3 * hparams.detach() ** 2) < 1e-12


def test_params_and_hparams_from_one_node():
    """Both come from one split, neither is computed from the other, so evaluated losses are allowed."""
    z = rand(6, requires_grad=True) * 1.0
    w, h = z.split([4, 2])
    c = w.detach() - h.detach().sum()
    result = hg.implicit.grad(w.pow(3).sum(), params=w, hparams=h, inner_loss=(w - c - h.sum()).square().sum())
    assert relative(result.grads, (3 * w.detach() ** 2).sum().expand(2)) < 1e-12


# --- which losses hparams reach ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["inner_loss", "fp_map", "residual"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_hparams_through_the_outer_loss_the_inner_problem_both_and_neither(form, evaluated):
    """The four hparams get ∇₂E alone, −∂₂Fᵀv alone, their sum, and zero; without requires_grad the gradient is zero."""
    a, t, m = rand(5), rand(5), rand(5, 5)
    matrix = m @ m.T / 5 + torch.eye(5)
    hparams = {key: rand(5, requires_grad=True) for key in ("outer", "inner", "both", "neither")}
    hparams["frozen"] = rand(5)
    solution = torch.linalg.inv(matrix) @ (hparams["inner"] + a * hparams["both"] + hparams["frozen"]).detach()
    w = solution.requires_grad_(evaluated)

    def f(w, h):
        return matrix @ w - h["inner"] - a * h["both"] - h["frozen"]

    forms_ = {
        "inner_loss": lambda w, h: 0.5 * w @ matrix @ w - w @ (h["inner"] + a * h["both"] + h["frozen"]),
        "fp_map": lambda w, h: w - 0.1 * f(w, h),
        "residual": f,
    }

    def outer(w, h):
        return (w - t).pow(4).sum() + (w * h["both"]).sum() + h["outer"].pow(3).sum()

    inner = forms_[form](w, hparams) if evaluated else forms_[form]
    result = hg.implicit.backward(
        outer(w, hparams) if evaluated else outer,
        params=w,
        hparams=hparams,
        symmetric=True,
        solver=S.CG(rtol=1e-13, **QUIET),
        **{form: inner},
    )
    w = w.detach()
    v = torch.linalg.inv(matrix) @ (4 * (w - t).pow(3) + hparams["both"].detach())
    truth = {
        "outer": 3 * hparams["outer"].detach() ** 2,
        "inner": v,
        "both": a * v + w,
    }
    for key, value in truth.items():
        assert relative(result.grads[key], value) < 1e-12, key
    for key in ("neither", "frozen"):
        assert torch.equal(result.grads[key], torch.zeros(5, dtype=torch.float64)), key
    assert hparams["frozen"].grad is None and not hparams["frozen"].requires_grad


def test_outer_loss_without_params_gives_its_direct_gradient():
    """With b = 0 the adjoint is 0 after no step, and there is no warning."""
    hparams = rand(4, requires_grad=True)
    w = hparams.detach().clone()
    for solver in (None, S.FixedPoint(max_steps=5), S.Dense(), S.LSQR(), S.CG(), S.Optimizer(max_steps=3)):
        result = hg.implicit.grad(
            lambda w, h: h.pow(3).sum(),
            params=w,
            hparams=hparams,
            fp_map=lambda w, h: 0.5 * (w + h),
            symmetric=True,
            solver=solver,
        )
        assert torch.equal(result.grads, 3 * hparams.detach() ** 2)
        assert torch.equal(result.adjoint, torch.zeros_like(w))
        assert result.solution.ok


# --- starts, batches, draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_warm_start_from_the_adjoint_before(name, form):
    """A start at the converged adjoint takes no step, and one nearby fewer steps, with the same result."""
    p = problem_at(name)
    solver = S.GMRES(restart=60, max_steps=5000, rtol=1e-9)
    cold = hypergradient(p, form, solver)
    warm = hypergradient(p, form, solver, x0=cold.adjoint)
    assert int(torch.as_tensor(warm.solution.steps).max()) == 0
    assert torch.equal(flat(warm.adjoint), flat(cold.adjoint))
    near = optree.tree_map(lambda v: v * (1 + 1e-8), cold.adjoint)
    solver = S.CG(max_steps=5000, rtol=1e-9) if p.symmetric else solver
    nearer = hypergradient(p, form, solver, x0=near)
    colder = hypergradient(p, form, solver)
    assert int(torch.as_tensor(nearer.solution.steps).max()) < int(torch.as_tensor(colder.solution.steps).max())
    with untouched(near):
        hypergradient(p, form, S.FixedPoint(max_steps=1, **QUIET), x0=near)


TASKS, SIZE = 5, 4
BATCHED = {
    "CG": S.CG(rtol=1e-14, **QUIET),
    "MINRES": S.MINRES(rtol=1e-14, **QUIET),
    "GMRES": S.GMRES(rtol=1e-14, **QUIET),
    "BiCGStab": S.BiCGStab(rtol=1e-14, **QUIET),
    "NormalCG": S.NormalCG(rtol=1e-14, **QUIET),
    "LSQR": S.LSQR(rtol=1e-14, **QUIET),
    "Dense": S.Dense(),
    "Neumann": S.Neumann(step_size=0.2, max_steps=20),
    "FixedPoint": S.FixedPoint(max_steps=3, **QUIET),
    "CG-4": S.CG(max_steps=4, **QUIET),
}


@pytest.mark.filterwarnings("ignore::hypergrad.InaccurateHypergradient")
@pytest.mark.parametrize("solver", BATCHED)
def test_batch_dims_equals_a_loop_over_tasks(solver):
    """Tasks with very different condition numbers, and with hparams of each task and shared ones, agree with a loop."""
    spectra = torch.logspace(0, 1, SIZE, dtype=torch.float64) ** torch.linspace(0, 1, TASKS).double()[:, None] / 5
    q = torch.linalg.qr(rand(TASKS, SIZE, SIZE))[0]
    matrices = q @ torch.diag_embed(spectra) @ q.mT
    own, shared = rand(TASKS, SIZE, requires_grad=True), rand(SIZE, requires_grad=True)
    t = rand(TASKS, SIZE)
    w = torch.linalg.solve_ex(matrices, (own * shared).detach()[..., None])[0][..., 0]

    def inner(w, h, a=matrices):
        w = torch.cat(w, -1)
        return (0.5 * w * (a @ w[..., None])[..., 0]).sum() - (w * h[0] * h[1]).sum()

    def outer(w, h, t=t):
        return (torch.cat(w, -1) - t).pow(4).sum()

    together = hg.implicit.grad(
        outer,
        inner_loss=inner,
        params=[w[:, :1], w[:, 1:]],
        hparams=(own, shared),
        solver=BATCHED[solver],
        batch_dims=1,
    )
    total = torch.zeros(SIZE, dtype=torch.float64)
    for i in range(TASKS):
        alone = hg.implicit.grad(
            lambda w, h, i=i: outer(w, h, t[i]),
            inner_loss=lambda w, h, i=i: inner(w, h, matrices[i]),
            params=[w[i, :1], w[i, 1:]],
            hparams=(own[i].detach().requires_grad_(), shared),
            solver=BATCHED[solver],
        )
        total += alone.grads[1]
        assert relative(together.grads[0][i], alone.grads[0]) < 1e-11
        assert relative(torch.cat([v[i] for v in together.adjoint]), torch.cat(alone.adjoint)) < 1e-11
        assert abs(together.solution.relative_residual[i] - alone.solution.relative_residual) < 1e-12
        assert together.inner_residual[i] < 1e-13
    assert relative(together.grads[1], total) < 1e-11


class Draws:
    """A map whose i-th evaluation uses the i-th of the given samples."""

    def __init__(self, maps, order):
        self.maps, self.order, self.calls = maps, order, 0

    def __call__(self, w, h):
        i = self.order[self.calls % len(self.order)]
        self.calls += 1
        return self.maps[i](w, h)


@pytest.fixture
def finite_sum():
    """Three affine maps Φᵢ(w, λ) = Mᵢ w + Bᵢ λ + cᵢ whose mean has its fixed point at w."""
    ms = [0.2 * rand(4, 4) for _ in range(3)]
    bs, cs = [rand(4, 3) for _ in range(3)], [rand(4) for _ in range(3)]
    hparams = rand(3, requires_grad=True)
    m, b, c = (sum(x) / 3 for x in (ms, bs, cs))
    w = torch.linalg.inv(torch.eye(4) - m) @ (b @ hparams.detach() + c)
    maps = [lambda w, h, m=m, b=b, c=c: m @ w + b @ h + c for m, b, c in zip(ms, bs, cs, strict=True)]
    return maps, w, hparams, (m, b)


@pytest.mark.filterwarnings("ignore::hypergrad.HypergradientWarning")  # no single draw is at its own fixed point
def test_stochastic_maps_are_drawn_at_each_product_and_unbiased(finite_sum):
    """Three steps from zero draw i and j, the last product k; the mean over all 27 is the deterministic result."""
    maps, w, hparams, (m, b) = finite_sum
    t = rand(4)

    def outer(w, h):
        return (w - t).pow(4).sum()

    options = {"params": w, "hparams": hparams, "solver": S.FixedPoint(max_steps=3, **QUIET)}
    total = torch.zeros(3, dtype=torch.float64)
    for order in np.ndindex(3, 3, 3):
        draws = Draws(maps, order)
        total += hg.implicit.grad(outer, fp_map=hg.operators.Stochastic(draws), **options).grads
        assert draws.calls == 3
    g = 4 * (w - t).pow(3)
    v = g + m.T @ (g + m.T @ g)
    assert relative(total / 27, b.T @ v) < 1e-12


@pytest.mark.filterwarnings("ignore::hypergrad.HypergradientWarning")
@pytest.mark.parametrize("draws", [1, 2, 3, 6])
def test_final_draws_average_the_last_product(finite_sum, draws):
    maps, w, hparams, _ = finite_sum
    t = rand(4)
    options = {"params": w, "hparams": hparams}

    def outer(w, h):
        return (w - t).pow(4).sum()

    fixed = S.FixedPoint(max_steps=1, **QUIET)  # v = ∇E without a product, so that only the last product draws
    counter = Draws(maps, (0, 1, 2))
    result = hg.implicit.grad(outer, fp_map=hg.operators.Stochastic(counter, draws), solver=fixed, **options)
    assert counter.calls == draws
    v = 4 * (w - t).pow(3)
    each = [torch.autograd.grad(maps[i % 3](w, hparams), hparams, v)[0] for i in range(draws)]
    assert relative(result.grads, sum(each) / draws) < 1e-12
    assert torch.equal(result.adjoint, v)


def test_the_warning_names_params_of_zero_far_from_the_solution():
    hparams = torch.ones(3, requires_grad=True)
    options = {"params": torch.zeros(3), "hparams": hparams, "fp_map": lambda w, h: 0.5 * w + h}
    with pytest.warns(hg.HypergradientWarning, match="params are 0, not the solution"):
        hg.implicit.grad(lambda w, h: ((w - 1.0) ** 2).sum(), **options)


@pytest.mark.filterwarnings("ignore::hypergrad.HypergradientWarning")
def test_one_draw_does_not_say_whether_a_stochastic_problem_is_solved():
    """Far from the solution a deterministic map is warned of, and the same map declared stochastic is not."""
    hparams = torch.ones(3, requires_grad=True)
    options = {"params": torch.zeros(3), "hparams": hparams, "fp_map": lambda w, h: 0.5 * w + h, "solver": S.GMRES()}
    outer = lambda w, h: ((w - 1.0) ** 2).sum()  # noqa: E731
    with pytest.warns(hg.HypergradientWarning, match="the inner problem is not solved"):
        known = hg.implicit.grad(outer, **options)
    options["fp_map"] = hg.operators.Stochastic(options["fp_map"])
    drawn = hg.implicit.grad(outer, **options)  # any warning is an error here
    assert relative(flat(drawn.grads), flat(known.grads)) < 1e-6


@pytest.mark.parametrize(
    ("solver", "evaluations"),
    [
        (S.CG(max_steps=5, **QUIET), 6),
        (S.FixedPoint(max_steps=5, **QUIET), 5),
        (S.Neumann(max_steps=5, **QUIET), 6),
        (S.GMRES(max_steps=3, **QUIET), 4),
        (S.NormalCG(max_steps=3, **QUIET), 7),
        (S.LSQR(max_steps=3, **QUIET), 7),
        (S.Optimizer(max_steps=5, **QUIET), 6),
        (S.FixedPoint(max_steps=1, **QUIET), 1),
    ],
)
def test_stochastic_losses_are_evaluated_once_a_product(solver, evaluations):
    p = problem_at("ridge")
    calls = Counter()

    def inner(w, h):
        calls["inner"] += 1
        return p.inner_loss(w, h)

    def outer(w, h):
        calls["outer"] += 1
        return p.outer_loss(w, h)

    noisy = hg.operators.Stochastic(inner)
    hg.implicit.grad(outer, inner_loss=noisy, params=p.params, hparams=p.hparams, solver=solver)
    assert calls == {"inner": evaluations, "outer": 1}


# --- the user's own solver --------------------------------------------------------------------------------------------


def exact_vector(op, b, x0):
    return S.Dense()(op, b).value


USERS = {
    "Vector": exact_vector,
    "pytree": lambda op, b, x0: exact_vector(op, b, x0).tree,
    "Solution": lambda op, b, x0: S.GMRES(restart=60, rtol=1e-13, **QUIET)(op, b, x0),
    "arithmetic": lambda op, b, x0: -(2.0 * (-exact_vector(op, b, x0)) / 2.0),
    "with scipy": lambda op, b, x0: with_scipy(op, b),
}


def with_scipy(op, b):
    from scipy.sparse.linalg import LinearOperator, gmres

    n = len(b.flat())
    matvec = LinearOperator((n, n), lambda v: op(b.space.from_flat(torch.from_numpy(v.reshape(n)))).flat().numpy())
    return b.space.from_flat(torch.from_numpy(gmres(matvec, b.flat().numpy(), rtol=1e-13, restart=60)[0]))


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", ["logistic", "biased", "contraction-.9", "quadratic-10"])
def test_a_plain_function_is_a_solver(name, user):
    p = problem_at(name)
    for form in forms(p):
        result = hypergradient(p, form, USERS[user])
        assert_agrees(p, result.grads)
        assert result.solution.ok
        assert result.solution.relative_residual < 1e-11


def test_a_plain_function_gets_the_start_and_is_judged_by_its_residual():
    p = problem_at("biased")
    seen = []

    def keeps(op, b, x0):
        seen.append((op.symmetric, x0, b))
        return x0

    start = [torch.randn_like(v) for v in p.params]
    with pytest.warns(hg.NotConverged, match="DIVERGED"):
        result = hypergradient(p, "inner_loss", keeps, x0=start)
    assert seen[0][0] and torch.equal(seen[0][1].flat(), torch.cat(start))
    assert torch.equal(flat(result.adjoint), flat(start))
    assert result.solution.relative_residual > 0.1
    with pytest.warns(hg.HypergradientWarning, match="NON_FINITE"):
        hypergradient(p, "inner_loss", lambda op, b, x0: b / 0.0)


@pytest.mark.parametrize("writes", ["b", "x0"])
def test_a_plain_function_may_write_into_what_it_is_given(writes):
    """Textbook CG overwrites b with its residual; the reported residual is still right, and x0 is not changed."""
    p = problem_at("ridge")
    start = torch.randn_like(p.params)

    def solver(op, b, x0):
        v = exact_vector(op, b, x0)
        if writes == "b":
            b.scale_(0.0)
            return v
        return x0.scale_(0.0).add_(v)

    with untouched(start):
        result = hypergradient(p, "inner_loss", solver, x0=start)
        result.adjoint.mul_(2.0)
    assert_agrees(p, result.grads)
    assert result.solution.relative_residual < 1e-12
    assert relative(result.solution.rhs_norm, np.linalg.norm(dense_system("ridge", "inner_loss")[1])) < 1e-12


# --- steps and cost ---------------------------------------------------------------------------------------------------

ZERO_STEPS = ("CG", "MINRES", "GMRES", "BiCGStab", "NormalCG", "LSQR", "FixedPoint", "Optimizer")


@pytest.mark.parametrize("solver", ZERO_STEPS)
def test_no_steps_give_the_direct_gradient(solver):
    """With K = 0 the adjoint is 0 (for Optimizer its start b), and the residual is that of this v."""
    p = problem_at("quadratic-10")
    for form in forms(p):
        result = hypergradient(p, form, getattr(S, solver)(max_steps=0, **QUIET))
        start = dense_system(p.name, form)[1] if solver == "Optimizer" else np.zeros(50)
        assert relative(flat(result.adjoint) + 1.0, start + 1.0) < 1e-14
        assert_is_gradient_of(p, form, start, result.grads)


@pytest.fixture
def counted(monkeypatch):
    """A counter of the products of each kind."""
    counts = Counter()
    for name in ("vjp", "vjp_many", "vjp_both", "jvp", "jvp_many"):
        original = getattr(Linearisation, name)

        def product(self, *args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Linearisation, name, product)
    return counts


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in ("quadratic-10", "equilibrium") for form in forms(problem_at(name))]
)
def test_products_by_autograd_grad_equal_those_by_the_engine_call(name, form, monkeypatch):
    """torch.autograd.grad is used if torch lacks the private engine call, or if autograd.grad is replaced."""
    p = problem_at(name, 1)
    usual = hypergradient(p, form, S.NormalCG(max_steps=6, **QUIET))
    monkeypatch.setattr(hg._torch, "_run_backward", None)
    other = hypergradient(p, form, S.NormalCG(max_steps=6, **QUIET))
    assert torch.equal(flat(usual.grads), flat(other.grads)) and torch.equal(flat(usual.adjoint), flat(other.adjoint))


@pytest.mark.parametrize("solver", [S.NormalCG(rtol=1e-12), S.LSQR(rtol=1e-12)])
def test_a_transposed_product_that_is_the_identity_or_nothing(solver):
    """∂₁F v is then v itself, or does not depend on v: the graph of the product has no node."""
    lam = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    params = {"a": torch.ones(3, dtype=torch.float64), "b": lam.detach()}
    settings = [
        ("residual", lambda w, lam: {"a": w["a"] - 1, "b": w["b"] - lam}),
        ("fp_map", lambda w, lam: {"a": w["a"] / 2 + 0.5, "b": lam + 0 * w["b"]}),
        ("fp_map", lambda w, lam: {"a": torch.ones_like(w["a"]), "b": lam}),
    ]
    for form, inner in settings:
        outer = lambda w, lam: w["a"].sum() + (w["b"] ** 2).sum() / 2  # noqa: E731
        result = hg.implicit.grad(outer, params=params, hparams=lam, solver=solver, **{form: inner})
        assert result.solution.ok
        torch.testing.assert_close(result.grads, lam.detach(), rtol=1e-14, atol=0.0)
        assert result.grads.data_ptr() != result.adjoint["b"].data_ptr()


COSTS = [
    (S.CG(max_steps=4), {"vjp": 4, "vjp_both": 1}),
    (S.MINRES(max_steps=4), {"vjp": 4, "vjp_both": 1}),
    (S.GMRES(max_steps=4), {"vjp": 4, "vjp_both": 1}),
    (S.BiCGStab(max_steps=4), {"vjp": 8, "vjp_both": 1}),
    (S.NormalCG(max_steps=4), {"vjp": 4, "jvp": 4, "vjp_both": 1}),
    (S.LSQR(max_steps=4), {"vjp": 4, "jvp": 4, "vjp_both": 1}),
    (S.FixedPoint(max_steps=4), {"vjp": 3, "vjp_both": 1}),
    (S.Neumann(max_steps=4), {"vjp": 4, "vjp_both": 1}),
    (S.Optimizer(max_steps=4), {"vjp": 4, "vjp_both": 1}),
    (S.FixedPoint(max_steps=1), {"vjp_both": 1}),
    (S.Dense(), {"vjp_many": 1, "vjp_both": 1}),
    (S.CG(max_steps=4, preconditioner=S.Nystrom(rank=3)), {"vjp": 4, "vjp_many": 1, "vjp_both": 1}),
]


@pytest.mark.filterwarnings("ignore::hypergrad.InaccurateHypergradient")
@pytest.mark.parametrize(("solver", "products"), COSTS)
@pytest.mark.parametrize("form", ["inner_loss", "fp_map", "residual"])
def test_cost_is_one_evaluation_the_solvers_products_and_one_last(counted, form, solver, products):
    p = problem_at("quadratic-10", 1)
    calls = Counter()

    def count(key, f):
        def counting(w, h):
            calls[key] += 1
            return f(w, h)

        return counting

    symmetric = isinstance(solver, (S.CG, S.MINRES)) or form == "inner_loss"
    if isinstance(solver, (S.NormalCG, S.LSQR)) and symmetric:
        products = {"vjp": 8, "vjp_both": 1}  # Aᵀ = A needs no transposed product
    hg.implicit.grad(
        count("outer", p.outer_loss),
        params=p.params,
        hparams=p.hparams,
        solver=solver,
        symmetric=symmetric,
        **{form: count("inner", getattr(p, form))},
    )
    assert calls == {"outer": 1, "inner": 1}
    assert counted == products


# --- memory and aliases -----------------------------------------------------------------------------------------------


def tiny():
    """A problem whose tensors are large enough to be seen in the process's memory: 100 kB each."""
    n = 25_000
    h, t = torch.randn(n, requires_grad=True), torch.randn(n)
    w = h.detach().clone()

    def inner(w, h):
        return 0.5 * (w[0] - h[0]).square().sum()

    def outer(w, h):
        return (w[0] - t).square().sum()

    def step(w, h):
        return [0.5 * (w[0] + h[0])]

    return w, h, inner, outer, step


def once(what, w, h, inner, outer, step):
    if what == "grad":
        hg.implicit.grad(outer, params=[w], hparams=[h], inner_loss=inner, solver=S.CG(max_steps=1))
    elif what == "evaluated":
        live = [w.requires_grad_()]
        hg.implicit.grad(outer(live, [h]), params=live, hparams=[h], inner_loss=inner(live, [h]))
    elif what == "backward":
        net = [h * 1.0]
        hg.implicit.backward(outer, params=[w], hparams=net, fp_map=step, solver=S.NormalCG(max_steps=1))
    elif what == "CG":
        hg.CG([w], [h], 1, step, outer)
    elif what == "reverse":
        hg.reverse([[w], [w]], [h], [step], outer)
    elif what == "error":
        with pytest.raises(ValueError, match="structure"):
            hg.implicit.grad(outer, params=[w], hparams=[h], fp_map=lambda w, h: {"odd": w[0]})


def live_tensors() -> int:
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


KINDS = ("grad", "evaluated", "backward", "CG", "reverse", "error")


@pytest.mark.parametrize(
    ("what", "collector", "calls"),
    [
        *((what, False, 250) for what in KINDS),
        *(pytest.param(what, on, 1000, marks=pytest.mark.slow) for what in KINDS for on in (True, False)),
    ],
)
def test_memory_is_constant_over_a_thousand_calls(what, collector, calls):
    """The cycle collector is off, so reference cycles would count too. One tensor per call is 25 MB in 250 calls."""
    case = tiny()
    for _ in range(20):
        once(what, *case)
    gc.collect()
    if not collector:
        gc.disable()
    try:
        tensors = live_tensors()
        before = megabytes()
        for _ in range(calls):
            once(what, *case)
        if collector:
            gc.collect()
        after = live_tensors()
        growth = megabytes() - before
    finally:
        gc.enable()
    assert after <= tensors
    assert growth < 10


def test_results_share_no_memory_with_the_users_tensors():
    """.grad, grads, adjoint, x0, params: an in-place change of one leaves the others; losses of expanded gradient."""
    hparams = [rand(4, requires_grad=True), rand(4, requires_grad=True)]
    w = (hparams[0] + hparams[1]).detach()
    x0 = [rand(4)]
    kept = x0[0].clone(), w.clone()
    result = hg.implicit.backward(
        lambda w, h: w[0].sum() + h[0].sum() + h[1].sum(),
        params=[w],
        hparams=hparams,
        residual=lambda w, h: [w[0] - h[0] - h[1]],
        solver=S.FixedPoint(max_steps=1, **QUIET),
        x0=x0,
    )
    expected = torch.full((4,), 2.0, dtype=torch.float64)
    tensors = [*result.grads, *(h.grad for h in hparams)]
    assert all(torch.equal(g, expected) for g in tensors)
    memory = [t.untyped_storage().data_ptr() for t in (*tensors, *result.adjoint, *x0, w, *hparams)]
    assert len(set(memory)) == len(memory)
    for g in (*result.grads, *result.adjoint):
        g.mul_(7.0)
    assert all(torch.equal(h.grad, expected) for h in hparams)
    assert torch.equal(x0[0], kept[0]) and torch.equal(w, kept[1])


@pytest.mark.parametrize("solver", [S.CG(rtol=1e-13), S.CG(max_steps=3)], ids=["tolerance", "steps"])
def test_the_size_of_the_outer_loss_changes_nothing_but_that_of_the_hypergradient(solver):
    """Scaling by powers of two is exact, except in the estimated distance, where ‖v‖ / ‖∇₁E‖ is rounded."""
    a = rand(6, 6)
    a, w, lam = a @ a.T / 6 + torch.eye(6), rand(6), rand(6).requires_grad_()

    def result(size):
        return hg.implicit.grad(
            lambda w, lam: (w * lam).sum() * size,
            inner_loss=lambda w, lam: w @ a @ w / 2 - w @ lam,
            params=w,
            hparams=lam,
            solver=solver,
        )

    with pytest.warns(hg.UnsolvedInnerProblem):
        one = result(1.0)
    for k in (-1000, -600, -530, -400, -250, -90, -10, 10, 90, 250, 400, 530, 600, 1000):
        with pytest.warns(hg.UnsolvedInnerProblem):
            found = result(2.0**k)
        assert found.solution.status is one.solution.status and found.inner_residual == one.inner_residual
        assert torch.equal(found.grads, one.grads * 2.0**k) and torch.equal(found.adjoint, one.adjoint * 2.0**k)
        assert relative(found.inner_distance, one.inner_distance) < 1e-15


class Doubled(torch.autograd.Function):
    """x ↦ 2x, as a graph node that only its tensor keeps alive."""

    @staticmethod
    def forward(ctx, x):
        return 2.0 * x

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2.0 * g


@pytest.mark.parametrize("form", ["fp_map", "residual"])
def test_values_of_every_kind_are_differentiated(form):
    """Values may be a leaf, a constant, params, the result of a Function, or one tensor twice."""
    m = rand(3, 3) / 6
    lam, other = rand(3).requires_grad_(), rand(3).requires_grad_()
    w, cs = [rand(3).requires_grad_() for _ in range(5)], [rand(3) for _ in range(5)]

    def value(w, h):
        lam, other = h
        twice = m @ w[0] + lam * w[1] / 4
        values = [lam, torch.ones(3, dtype=torch.float64), Doubled.apply(w[2] / 8 + other), twice, twice]
        if form == "residual":  # values of the same kinds, but invertible in w
            values = [w[1], w[0] - lam * lam, Doubled.apply(w[2] + other), w[3] - twice, w[4] + w[3]]
        return values

    def flat_value(w, lam, other):
        values = torch.cat(value(w.split(3), (lam, other)))
        return w - values if form == "fp_map" else values

    def outer(w, h):
        return sum((x * c).sum() for x, c in zip(w, cs, strict=True))

    point = (torch.cat(w).detach(), lam.detach(), other.detach())
    a, *crosses = torch.autograd.functional.jacobian(flat_value, point)
    v = torch.linalg.solve(a.T, torch.cat(cs))
    truth = [-(cross.T @ v) for cross in crosses]
    h, solver = [lam, other], S.GMRES(rtol=1e-13)
    for outer_loss, inner in ((outer, value), (outer(w, h), value(w, h))):
        with pytest.warns(hg.UnsolvedInnerProblem):
            result = hg.implicit.grad(outer_loss, **{form: inner}, params=w, hparams=h, solver=solver)
        for got, due in zip(result.grads, truth, strict=True):
            assert relative(got, due) < EXACT
        assert relative(result.inner_residual, flat_value(*point).norm().item()) < 1e-14


@pytest.mark.parametrize("form", ["fp_map", "residual"])
@pytest.mark.parametrize("hypergradient", [hg.implicit.grad, hg.implicit.jacobian])
def test_only_the_graph_of_the_inner_problem_is_kept_through_the_solve(form, hypergradient):
    made, alive = [], []

    def inner(w, lam):
        y = lam * w / 2 if form == "fp_map" else w - lam * w / 2
        made.append(weakref.ref(y))
        return y

    def solver(op, b, x0):
        alive.extend(ref() is not None for ref in made)
        return S.GMRES(rtol=1e-12)(op, b, x0)

    lam = rand(3).requires_grad_()
    outer = (lambda w, lam: w.sum()) if hypergradient is hg.implicit.grad else lambda w, lam: w.square()
    hypergradient(outer, **{form: inner}, params=torch.zeros(3, dtype=torch.float64), hparams=lam, solver=solver)
    assert alive == [False]


@pytest.mark.parametrize("solver", ["CG", "MINRES", "GMRES", "BiCGStab", "NormalCG", "LSQR", "FixedPoint", "Dense"])
def test_maps_that_return_their_params(solver):
    """F = w − λ on one leaf, whose product is the vector it was given, and a real system on another dtype's leaf."""
    m = rand(5, 5)
    matrix = m @ m.T / 5 + torch.eye(5)
    hparams = [torch.randn(3, requires_grad=True), rand(5, requires_grad=True)]
    params = [hparams[0].detach().clone(), torch.linalg.inv(matrix) @ hparams[1].detach()]
    t = [torch.randn(3), rand(5)]
    solver = getattr(S, solver)(**({"max_steps": 600, "rtol": 1e-6} if solver != "Dense" else {}))
    scale = 0.1 if isinstance(solver, S.FixedPoint) else 1.0
    result = hg.implicit.grad(
        lambda w, h: (w[0] - t[0]).square().sum().double() + (w[1] - t[1]).square().sum(),
        params=params,
        hparams=hparams,
        residual=lambda w, h: [w[0] - h[0], scale * (matrix @ w[1] - h[1])],
        symmetric=True,
        solver=solver,
    )
    assert relative(result.grads[0], 2 * (params[0] - t[0])) < 1e-5
    assert relative(result.grads[1], torch.linalg.inv(matrix) @ (2 * (params[1] - t[1]))) < 1e-4


def test_k_steps_on_a_map_that_returns_its_params():
    """Fixed K, where the verdict on symmetry stands: the product shares memory with the direction CG overwrites."""
    m = rand(5, 5)
    matrix = m @ m.T / 5 + torch.eye(5)
    hparams = [torch.randn(3, requires_grad=True), rand(5, requires_grad=True)]
    params = [hparams[0].detach().clone(), torch.linalg.inv(matrix) @ hparams[1].detach()]
    for solver in (S.CG(max_steps=3), S.MINRES(max_steps=3)):
        result = hg.implicit.grad(
            lambda w, h: (w[0] - 1.0).square().sum().double() + (w[1] - 2.0).square().sum(),
            params=params,
            hparams=hparams,
            residual=lambda w, h: [w[0] - h[0], matrix @ w[1] - h[1]],
            symmetric=True,
            solver=solver,
        )
        assert result.solution.status is hg.Status.COMPLETED


def test_identities_everywhere():
    """A = I: Φ independent of w, E = ½‖w‖² whose gradient is w itself; one step is exact and nothing is overwritten."""
    hparams = rand(4, requires_grad=True)
    w = hparams.detach().clone()
    for solver in (S.CG(max_steps=1), S.FixedPoint(max_steps=1), S.GMRES(max_steps=1), S.Dense()):
        with untouched(w, hparams):
            result = hg.implicit.grad(
                lambda w, h: 0.5 * w @ w,
                params=w,
                hparams=hparams,
                fp_map=lambda w, h: h,
                symmetric=True,
                solver=solver,
            )
        torch.testing.assert_close(result.grads, w, rtol=1e-14, atol=0)
        assert result.solution.residual_norm < 1e-14
        assert result.grads.data_ptr() not in (w.data_ptr(), hparams.data_ptr())


def test_problem_tensors_were_never_written():
    """This runs after all tests above, and compares the shared problems with the oracles once more."""
    for name in PROBLEMS:
        p: Problem = problem_at(name)
        assert relative(p.outer_loss(p.params, p.hparams).item(), p.value) < 1e-12
        assert all(h.grad is None and h.requires_grad for h in tensors_in(p.hparams))


def shared(w, lam):
    """The product returns one tensor for both leaves."""
    return [0.3 * (w[0] + w[1]) + lam * DRAWS[0], lam * DRAWS[1]]


def swapped(w, lam):
    """The product returns the leaves of its argument, swapped."""
    return [w[1] + lam * DRAWS[0], w[0] + lam * DRAWS[1]]


def expanded(w, lam):
    """The product returns an expanded tensor: one number for all entries of a leaf."""
    return [0.05 * w[0].sum() * DRAWS[0] + lam * DRAWS[0], 0.05 * w[1].sum() * DRAWS[1] + lam * DRAWS[1]]


DRAWS = [torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Stop(torch.autograd.Function):
    """The identity, whose gradient is one tensor of zeros each time, a view of it, or the saved tensor."""

    @staticmethod
    def forward(ctx, x, zeros, how):
        ctx.zeros, ctx.how = zeros, how
        ctx.save_for_backward(zeros)
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        zeros = {"view": ctx.zeros[:], "saved": ctx.saved_tensors[0]}.get(ctx.how, ctx.zeros)
        return zeros, None, None


@pytest.mark.filterwarnings("ignore::hypergrad.LostDerivative")
@pytest.mark.parametrize("how", ["whole", "view", "saved"])
@pytest.mark.parametrize("leaves", [1, 2])
@pytest.mark.parametrize(
    "solver",
    [
        S.FixedPoint(max_steps=6),
        S.Neumann(max_steps=6),
        S.GMRES(rtol=1e-12),
        S.NormalCG(rtol=1e-12),
        S.FixedPoint(max_steps=1),
    ],
)
def test_a_buffer_that_a_backward_returns_is_not_overwritten(solver, leaves, how, monkeypatch):
    """To autograd Φ is λ + a constant, so A = I. Leaves are stored separately, as large ones are."""
    share_buffers(monkeypatch, 0, 0)
    lam, zeros = DRAWS[0].clone().requires_grad_(), torch.zeros(6, dtype=torch.float64)
    w = [lam.detach() + 1 + i for i in range(leaves)]

    def fp_map(w, lam):
        return [lam + 1 + i + 0 * Stop.apply(x, zeros, how) for i, x in enumerate(w)]

    def direct(w, lam):
        return [lam + 1 + i + Stop.apply(x, zeros, how) - x.detach() for i, x in enumerate(w)]

    for function in (fp_map, direct):
        for x0 in (None, [DRAWS[1]] * leaves):
            result = hg.implicit.grad(
                lambda w, lam: sum((x**2).sum() for x in w),
                fp_map=function,
                params=w,
                hparams=lam,
                solver=solver,
                x0=x0,
            )
            torch.testing.assert_close(result.grads, sum(2 * x for x in w), rtol=1e-12, atol=0)
            assert result.solution.ok
            assert not zeros.any()


SHARING = [("fp_map", f, solver) for f in (shared, expanded) for solver in ("FixedPoint", "BiCGStab", "GMRES")]
SHARING += [("residual", swapped, solver) for solver in ("MINRES", "GMRES")]


@pytest.mark.parametrize(("form", "function", "solver"), SHARING)
def test_products_that_share_memory(form, function, solver, monkeypatch):
    """Leaves are stored separately, as large ones are. Solvers may write into a product, but only if it is unshared."""
    share_buffers(monkeypatch, 0, 0)
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    given = {form: function, "params": DRAWS[2:], "hparams": lam, "symmetric": function is swapped}

    def outer_loss(w, lam):
        return sum((x * x).sum() for x in w)

    method = getattr(hg.solvers, solver)(rtol=1e-12, max_steps=300, on_failure="ignore")  # of the inner residual
    result = hg.implicit.grad(outer_loss, solver=method, **given)
    assert result.solution.status is hg.Status.CONVERGED
    w = torch.cat(DRAWS[2:])
    inner, outer = torch.autograd.functional.jacobian(
        lambda w, lam: torch.cat(function([*w.split(6)], lam)), (w, lam.detach())
    )
    a = torch.eye(12, dtype=torch.float64) - inner if form == "fp_map" else -inner
    due = outer @ torch.linalg.inv(a).T @ (2 * w)
    torch.testing.assert_close(result.grads, due, rtol=1e-10, atol=0)


class Steps(torch.autograd.Function):
    """round(x), whose gradient is a tensor of zeros that the user keeps; `kept` is it or returns it."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept, ctx.number = kept, isinstance(kept, torch.Tensor)
        if ctx.number:
            ctx.save_for_backward(kept)
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] if ctx.number else ctx.kept(), None


class Into(torch.autograd.Function):
    """Ax, whose gradient is written into the same memory each time."""

    @staticmethod
    def forward(ctx, x, a, memory):
        ctx.a, ctx.memory = a, memory
        return a @ x

    @staticmethod
    def backward(ctx, grad):
        return torch.mv(ctx.a.T, grad, out=ctx.memory), None, None


def hooked(w, zeros):
    y = 1.0 * w
    y.register_hook(lambda _: zeros)
    return y


ARRAY = np.zeros(5)
KEPT = {
    "a tensor": lambda w, zeros: Steps.apply(w, lambda: zeros),
    "a view of it": lambda w, zeros: Steps.apply(w, lambda: zeros.view(5, 1)[:, 0]),
    "what was saved": lambda w, zeros: Steps.apply(w, zeros),
    "that through a view": lambda w, zeros: Steps.apply(w.view(5, 1), zeros.view(5, 1)).view(5),
    "an array": lambda w, zeros: Steps.apply(w, lambda: torch.from_numpy(ARRAY)),
    "from a hook": hooked,
}
TAKING = [
    S.FixedPoint(max_steps=150),
    S.Neumann(step_size=0.5, max_steps=99),
    S.BiCGStab(rtol=1e-12),
    S.GMRES(rtol=1e-12),
]


@pytest.mark.parametrize("form", ["fp_map", "residual"])
@pytest.mark.parametrize("solver", TAKING, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("name", list(KEPT))
def test_a_tensor_that_a_backward_pass_keeps_is_not_overwritten(name, solver, form):
    """A = I; overwriting the kept zeros would give 99 ∇₁E instead of ∇₁E, with the status CONVERGED."""
    w, lam, e, zeros = rand(5), rand(5, requires_grad=True), rand(5), rand(5) * 0
    function = KEPT[name]
    given = {"fp_map": lambda w, lam: function(w, zeros) + lam, "residual": lambda w, lam: function(w, zeros) + w - lam}
    hooks = pytest.warns(hg.HypergradientWarning, match="changes gradients") if name == "from a hook" else nullcontext()
    with hooks, untouched(zeros, w, lam):
        result = hg.implicit.grad(
            lambda w, lam: w @ e, params=w, hparams=lam, solver=replace(solver, **QUIET), **{form: given[form]}
        )
    assert not ARRAY.any()
    torch.testing.assert_close(result.grads, e, rtol=1e-11, atol=0)


@pytest.mark.parametrize("form", ["fp_map", "residual"])
@pytest.mark.parametrize("solver", [*TAKING, S.Dense()], ids=lambda solver: type(solver).__name__)
def test_products_that_are_written_into_the_same_memory(solver, form):
    """Each product overwrites the one before; without copies FixedPoint stops at ∇₁E, and Dense repeats one column."""
    a, w, lam, e, memory = 0.2 * rand(5, 5), rand(5), rand(5, requires_grad=True), rand(5), torch.empty(5).double()
    given = {
        "fp_map": lambda w, lam: Into.apply(w, a, memory) + lam,
        "residual": lambda w, lam: Into.apply(w, torch.eye(5).double() - a, memory) - lam,
    }
    result = hg.implicit.grad(
        lambda w, lam: w @ e, params=w, hparams=lam, solver=replace(solver, **QUIET), **{form: given[form]}
    )
    due = torch.linalg.solve((torch.eye(5).double() - a).T, e)
    torch.testing.assert_close(result.grads, due, rtol=1e-10, atol=0)


@pytest.mark.parametrize("draws", [2, 3])
def test_draws_that_are_written_into_the_same_memory(draws):
    """Φ = sᵢAw + λ with another sᵢ at each draw: the result is the mean over draws, not the last draw."""
    a, w, lam, e, memory = 0.2 * rand(5, 5), rand(5), rand(5, requires_grad=True), rand(5), torch.empty(5).double()
    count = Counter()

    def fp_map(w, lam):
        count["draws"] += 1
        return Into.apply(w, count["draws"] * a, memory) + lam

    result = hg.implicit.grad(
        lambda w, lam: w @ e,
        fp_map=hg.operators.Stochastic(fp_map, draws),
        params=w,
        hparams=lam,
        solver=lambda op, b, x0: b,  # no draw
    )
    mean = sum(range(1, draws + 1)) / draws
    torch.testing.assert_close(result.solution.residual_norm, (mean * a.T @ e).norm(), rtol=1e-12, atol=0)


class Clones(TorchDispatchMode):
    """Counts the copies that are made within it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("solver", [S.FixedPoint, S.GMRES])
@pytest.mark.parametrize("shape", [(5,), (5, 5)])
def test_new_products_are_not_copied(shape, solver, compile):
    a, w, lam, counts = 0.2 * rand(5, 5), rand(*shape), rand(5, requires_grad=True), []
    for steps in (3, 9):
        with Clones() as clones:
            hg.implicit.grad(
                lambda w, lam: (w * w).sum(),
                fp_map=lambda w, lam: torch.tanh(a @ w) + lam,
                params=w,
                hparams=lam,
                solver=solver(max_steps=steps, **QUIET),
                compile=compile,
            )
        counts.append(clones.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["CG", "MINRES", "GMRES", "BiCGStab", "Dense", "Auto"])
@pytest.mark.parametrize("form", ["evaluated", "functions", "Sum"])
def test_autocast_affects_only_the_losses(form, name):
    """Autocast acts on each evaluation of a loss, and changes nothing for losses that are evaluated before the call."""
    torch.manual_seed(0)
    x, y, xv, yv = torch.randn(60, 8), torch.randn(60, 1), torch.randn(30, 8), torch.randn(30, 1)
    w = {"weight": torch.randn(1, 8, requires_grad=True), "bias": torch.zeros(1, requires_grad=True)}
    lam, solver = torch.zeros((), requires_grad=True), getattr(S, name)(on_failure="ignore")
    seen = set()

    def fit(w, x, y):
        seen.add(torch.is_autocast_enabled("cpu"))
        return (torch.nn.functional.linear(x, w["weight"], w["bias"]) - y).square().mean()

    def decay(w, lam):
        return lam.exp() * sum(p.square().sum() for p in w.values())

    def outer(w, lam):
        return fit(w, xv, yv)

    def inner(w, lam):
        return fit(w, x, y) + decay(w, lam)

    if form == "Sum":
        batches = [(x[:40], y[:40]), (x[40:], y[40:])]
        inner = hg.operators.Sum(lambda w, lam, batch: fit(w, *batch), batches, penalty=decay)

    def grads(autocast, losses):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), warnings.catch_warnings():
            warnings.simplefilter("ignore", hg.HypergradientWarning)
            result = hg.implicit.grad(losses[0], inner_loss=losses[1], params=w, hparams=lam, solver=solver)
        assert all(leaf.dtype is torch.float32 for leaf in result.adjoint.values())
        assert seen == (set() if form == "evaluated" else {autocast})  # in every evaluation of a loss
        residuals.append(torch.stack([result.inner_residual, result.inner_distance]))
        return result.grads

    residuals = []
    if form == "evaluated":
        answers = []
        for autocast in (True, False):
            with torch.autocast("cpu", torch.bfloat16):
                losses = outer(w, lam), inner(w, lam)
            answers.append(grads(autocast, losses))
        assert torch.equal(*answers) and torch.equal(*residuals)
    else:
        low, full = grads(True, (outer, inner)), grads(False, (outer, inner))
        assert not torch.equal(low, full) and (low - full).abs() < 0.05 * full.abs()
