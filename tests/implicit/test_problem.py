"""The parts of a bilevel problem: frozen leaves, keys, hooks, and losses that do not use their arguments."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import hypergrad as hg

S = hg.solvers
TIGHT = {"rtol": 1e-13}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Ridge:
    """½‖Xw + c − y‖² / n + ½ Σ e^θ w², solved exactly in w and c (not penalised); the outer loss on other rows."""

    def __init__(self) -> None:
        self.x, self.y = rand(30, 4), rand(30, seed=1)
        self.theta = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
        design = torch.cat([self.x[:20], torch.ones(20, 1, dtype=torch.float64)], 1)
        self.a = design.mT @ design / 20 + torch.diag(torch.cat([self.theta.detach().exp(), torch.zeros(1)]))
        self.solution = torch.linalg.solve(self.a, design.mT @ self.y[:20] / 20)
        held = torch.cat([self.x[20:], torch.ones(10, 1, dtype=torch.float64)], 1)
        self.slope = held.mT @ (held @ self.solution - self.y[20:]) / 10
        v = torch.linalg.solve(self.a, self.slope)
        self.truth = -self.theta.detach().exp() * self.solution[:4] * v[:4]

    def params(self) -> dict[str, torch.Tensor]:
        return {"w": self.solution[:4].clone(), "c": self.solution[4:].clone()}

    def inner(self, w, theta):
        fit = ((self.x[:20] @ w["w"] + w["c"] - self.y[:20]) ** 2).mean() / 2
        return fit + (theta.exp() * w["w"] ** 2).sum() / 2

    def outer(self, w, theta):
        return ((self.x[20:] @ w["w"] + w["c"] - self.y[20:]) ** 2).mean() / 2


@pytest.fixture
def ridge() -> Ridge:
    return Ridge()


def test_frozen_leaves_are_constants(ridge):
    """With a frozen intercept A is the block of w, and the derivative is that of the problem in w alone."""
    params = {"w": ridge.solution[:4].clone().requires_grad_(), "c": ridge.solution[4:].clone()}
    for solver in (None, S.CG(**TIGHT), S.Dense(), S.MINRES(**TIGHT), S.GMRES(**TIGHT)):
        result = hg.implicit.grad(
            ridge.outer, inner_loss=ridge.inner, params=params, hparams=ridge.theta, solver=solver or S.Auto(**TIGHT)
        )
        v = torch.linalg.solve(ridge.a[:4, :4], ridge.slope[:4])
        truth = -ridge.theta.detach().exp() * ridge.solution[:4] * v
        torch.testing.assert_close(result.grads, truth, rtol=1e-10, atol=0)
        assert set(result.adjoint) == {"w", "c"} and not result.adjoint["c"].any()
        again = hg.implicit.grad(
            ridge.outer,
            inner_loss=ridge.inner,
            params=params,
            hparams=ridge.theta,
            solver=S.CG(**TIGHT),
            x0=result.adjoint,
        )
        torch.testing.assert_close(again.grads, truth, rtol=1e-10, atol=0)


def test_a_solution_without_graphs_is_not_frozen(ridge):
    result = hg.implicit.grad(
        ridge.outer, inner_loss=ridge.inner, params=ridge.params(), hparams=ridge.theta, solver=S.CG(**TIGHT)
    )
    torch.testing.assert_close(result.grads, ridge.truth, rtol=1e-10, atol=0)


def test_frozen_layers_of_a_live_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model[0].requires_grad_(False)
    x, y = rand(20, 3), rand(20, 1)
    lam = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    feature = torch.cat([torch.tanh(model[0](x)), torch.ones(20, 1)], 1).detach()
    a = feature.mT @ feature / 10 + 2 * lam.detach().exp() * torch.eye(5, dtype=torch.float64)
    w = torch.linalg.solve(a, feature.mT @ y / 10)
    with torch.no_grad():
        model[2].weight.copy_(w[:4].T)
        model[2].bias.copy_(w[4])

    def train():
        trained = [p for p in model.parameters() if p.requires_grad]
        return ((model(x) - y) ** 2).mean() + lam.exp() * sum((p**2).sum() for p in trained)

    result = hg.implicit.grad(
        (model(x) ** 2).mean(), inner_loss=train(), params=model.parameters(), hparams=lam, solver=S.CG(**TIGHT)
    )
    slope = feature.mT @ (feature @ w) / 10
    truth = -(torch.linalg.solve(a, slope).mT @ w).squeeze() * 2 * lam.detach().exp()
    torch.testing.assert_close(result.grads, truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("form", ["fp_map", "residual"])
@pytest.mark.parametrize("kinds", [(OrderedDict, dict), (dict, OrderedDict), (OrderedDict, OrderedDict)])
def test_mappings_are_matched_by_key(form, kinds):
    """w_b = λ / 2 and w_a = 3λ, in a mapping whose order is not that of sorted keys."""
    given, returned = kinds
    lam = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    params = given([("b", lam.detach() / 2), ("a", 3 * lam.detach())])

    def fp_map(w, lam):
        new = {"a": w["a"] / 3 + 2 * lam, "b": w["b"] / 5 + 0.4 * lam}
        return returned([("a", new["a"]), ("b", new["b"])])

    def residual(w, lam):
        new = fp_map(w, lam)
        return returned([(key, 7 * (w[key] - new[key])) for key in ("a", "b")])

    result = hg.implicit.grad(
        lambda w, lam: 10 * w["a"] + w["b"],
        params=params,
        hparams=lam,
        solver=S.GMRES(**TIGHT),
        **{form: fp_map if form == "fp_map" else residual},
    )
    torch.testing.assert_close(result.grads, torch.tensor(30.5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_unregistered_dataclasses_are_named():
    @dataclass
    class State:
        w: torch.Tensor

    with pytest.raises(TypeError, match=r"params must be .*got State; register this dataclass"):
        hg.implicit.grad(
            lambda w, h: w.w.sum(),
            inner_loss=lambda w, h: ((w.w - h) ** 2).sum(),
            params=State(torch.ones(2)),
            hparams=torch.ones(2, requires_grad=True),
        )


def test_complex_hyperparameters():
    """w = Re(λ²): the gradient is that of torch, through the solution written out."""
    lam = torch.tensor([1.0 + 2.0j, -0.5 + 0.25j], dtype=torch.complex128, requires_grad=True)
    truth = torch.autograd.grad((lam**2).real.square().sum(), lam)[0]
    for solver in (None, S.CG(**TIGHT), S.Dense()):
        result = hg.implicit.backward(
            lambda w, lam: w.square().sum(),
            inner_loss=lambda w, lam: (w - (lam**2).real).square().sum(),
            params=(lam.detach() ** 2).real,
            hparams=lam,
            solver=solver,
        )
        torch.testing.assert_close(result.grads, truth, rtol=1e-12, atol=0)
        torch.testing.assert_close(lam.grad, truth, rtol=1e-12, atol=0)
        lam.grad = None
    with pytest.raises(TypeError, match=r"params must be .*complex128; pass torch.view_as_real"):
        hg.implicit.grad(lambda w, h: 0, inner_loss=lambda w, h: 0, params=lam.detach(), hparams=lam)


HOOKS = {"reversal": lambda g: -g, "clamp": lambda g: g.clamp(-1e-3, 1e-3), "scale": lambda g: 3 * g}


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_hparams_act_once(ridge, name, evaluated):
    params = {key: x.requires_grad_() for key, x in ridge.params().items()}
    outer, inner = ridge.outer, ridge.inner
    hook = ridge.theta.register_hook(HOOKS[name])
    if evaluated:
        outer, inner = outer(params, ridge.theta), inner(params, ridge.theta)
    result = hg.implicit.backward(outer, inner_loss=inner, params=params, hparams=ridge.theta, solver=S.CG(**TIGHT))
    torch.testing.assert_close(ridge.theta.grad, HOOKS[name](ridge.truth), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.grads, ridge.theta.grad, rtol=0, atol=0)
    ridge.theta.grad = None
    torch.autograd.backward(ridge.theta, ridge.truth)  # the hook is still there
    torch.testing.assert_close(ridge.theta.grad, HOOKS[name](ridge.truth), rtol=0, atol=0)
    hook.remove()


def test_hooks_of_hparams_that_a_network_computes(ridge):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    made = ridge.theta * scale / scale.detach()
    calls = []
    made.register_hook(lambda g: calls.append(1) or -g)
    hg.implicit.backward(ridge.outer, inner_loss=ridge.inner, params=ridge.params(), hparams=made, solver=S.CG(**TIGHT))
    torch.testing.assert_close(ridge.theta.grad, -ridge.truth, rtol=1e-10, atol=0)
    assert calls == [1]


@pytest.mark.parametrize("name", ["clamp", "scale"])
def test_hooks_of_params_do_not_act_and_are_named(ridge, name):
    params = {key: x.requires_grad_() for key, x in ridge.params().items()}
    params["w"].register_hook(HOOKS[name])
    with pytest.warns(hg.HypergradientWarning, match=r"params\['w'\] have gradient hooks"):
        result = hg.implicit.grad(
            ridge.outer(params, ridge.theta),
            inner_loss=ridge.inner(params, ridge.theta),
            params=params,
            hparams=ridge.theta,
            solver=S.CG(**TIGHT),
        )
    torch.testing.assert_close(result.grads, ridge.truth, rtol=1e-10, atol=0)


def test_hooks_in_a_jacobian(ridge):
    hook = ridge.theta.register_hook(HOOKS["clamp"])
    result = hg.implicit.jacobian(
        lambda w, theta: torch.stack([ridge.outer(w, theta), 2 * ridge.outer(w, theta)]),
        inner_loss=ridge.inner,
        params=ridge.params(),
        hparams=ridge.theta,
        solver=S.Dense(),
    )
    hook.remove()
    truth = torch.stack([HOOKS["clamp"](ridge.truth), HOOKS["clamp"](2 * ridge.truth)])
    torch.testing.assert_close(result.grads, truth, rtol=1e-9, atol=0)


def entry_points(outer, inner, params, hparams):
    """Calls of each public function that takes losses as callables, for the same problem."""
    step = lambda w, h: {k: w[k] - 0.1 * g for k, g in zip(w, slopes(inner, w, h), strict=True)}  # noqa: E731
    return {
        "grad": lambda: hg.implicit.grad(outer, inner_loss=inner, params=params, hparams=hparams),
        "backward": lambda: hg.implicit.backward(outer, inner_loss=inner, params=params, hparams=hparams),
        "fp_map": lambda: hg.implicit.grad(outer, fp_map=step, params=params, hparams=hparams),
    }


def slopes(inner, w, h):
    leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in w.values()]
    with torch.enable_grad():
        return torch.autograd.grad(inner(dict(zip(w, leaves, strict=True)), h), leaves, create_graph=True)


@pytest.mark.parametrize("entry_point", ["grad", "backward", "fp_map"])
def test_an_outer_loss_that_does_not_use_its_params(ridge, entry_point):
    params = {key: x.requires_grad_() for key, x in ridge.params().items()}

    def live(w, theta):
        return ridge.outer(params, theta)

    def graphless(w, theta):
        with torch.no_grad():
            return ridge.outer(w, theta)

    for outer in (live, graphless, lambda w, theta: torch.tensor(1.0, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"outer_loss d(oes not|epends neither)"):
            entry_points(outer, ridge.inner, params, ridge.theta)[entry_point]()
    assert all(x.grad is None for x in (*params.values(), ridge.theta))


@pytest.mark.parametrize("entry_point", ["grad", "backward", "fp_map"])
def test_losses_that_reach_no_hparams(ridge, entry_point):
    other = ridge.theta.detach().clone().requires_grad_()
    for spoil in (lambda t: t.detach(), lambda t: torch.tensor(t.tolist(), dtype=torch.float64), lambda t: other):

        def inner(w, theta, spoil=spoil):
            return ridge.inner(w, spoil(theta))

        with pytest.raises(ValueError, match="depends on any of hparams"):
            entry_points(ridge.outer, inner, ridge.params(), ridge.theta)[entry_point]()
    assert ridge.theta.grad is None


def test_losses_that_reach_no_hparams_in_a_jacobian(ridge):
    with pytest.raises(ValueError, match="depends on any of hparams"):
        hg.implicit.jacobian(
            lambda w, theta: ridge.outer(w, theta).reshape(1),
            inner_loss=lambda w, theta: ridge.inner(w, theta.detach()),
            params=ridge.params(),
            hparams=ridge.theta,
        )


def test_a_forgotten_parameter_of_evaluated_losses_is_warned_of(ridge):
    params = {key: x.requires_grad_() for key, x in ridge.params().items()}
    losses = ridge.outer(params, ridge.theta), ridge.inner(params, ridge.theta)
    with pytest.warns(hg.HypergradientWarning, match=r"1 tensors that require grad .* neither .*\(1,\)"):
        hg.implicit.grad(losses[0], inner_loss=losses[1], params=[params["w"]], hparams=ridge.theta)


@pytest.mark.parametrize("call", ["grad", "jacobian", "argmin", "solver"])
def test_an_l1_term_in_a_smooth_loss_is_warned_of(call):
    """Soft thresholding gives the solution, where one entry is exactly 0 and its gradient is not."""
    a = torch.tensor([2.0, 1.0, 0.3], dtype=torch.float64)
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    w = torch.sign(a) * (a.abs() - lam.detach()).clamp_min(0)
    inner = lambda w, lam: ((w - a) ** 2).sum() / 2 + lam * w.abs().sum()  # noqa: E731
    outer = lambda w, lam: ((w - 1) ** 2).sum()  # noqa: E731
    given = {"inner_loss": inner, "params": w, "hparams": lam}
    calls = {
        "grad": lambda: hg.implicit.grad(outer, **given),
        "jacobian": lambda: hg.implicit.jacobian(lambda w, lam: outer(w, lam)[None], **given),
        "argmin": lambda: outer(hg.implicit.argmin(inner, w, lam), lam).backward(),
        "solver": lambda: outer(hg.implicit.solver(argmin=inner)(lambda lam: w)(lam), lam).backward(),
    }
    with pytest.warns(hg.UnsolvedInnerProblem, match="vanishes everywhere but where params are exactly 0"):
        calls[call]()


@pytest.mark.parametrize("call", ["grad", "argmin"])
def test_params_that_are_all_zero_are_unsolved_and_no_kink(call):
    """Many training runs start there."""
    lam = torch.ones(3, dtype=torch.float64, requires_grad=True)
    w, inner = torch.zeros(3, dtype=torch.float64), lambda w, lam: (w - lam).square().sum()
    with pytest.warns(hg.UnsolvedInnerProblem, match="params are 0, not the solution"):
        if call == "grad":
            hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=inner, params=w, hparams=lam)
        else:
            hg.implicit.argmin(inner, w, lam).sum().backward()


@pytest.mark.parametrize("dtype, tiny", [(torch.float32, 1e-7), (torch.float64, 1e-16)])
@pytest.mark.parametrize("call", ["grad", "jacobian", "fixed_point", "jacrev", "hypertorch"])
def test_a_fixed_point_map_that_is_the_identity_to_rounding_is_warned_of(call, dtype, tiny):
    """Φ(w) = w − tiny (w − λ) with dw/dλ = 1: 1 − (1 − tiny) leaves no correct digit of A = tiny."""
    lam = torch.ones(2, dtype=dtype, requires_grad=True)
    w, phi = lam.detach().clone(), lambda w, lam: w - tiny * (w - lam)
    calls = {
        "grad": lambda: hg.implicit.grad(lambda w, lam: w.sum(), fp_map=phi, params=w, hparams=lam),
        "jacobian": lambda: hg.implicit.jacobian(lambda w, lam: w, fp_map=phi, params=w, hparams=lam),
        "fixed_point": lambda: hg.implicit.fixed_point(phi, w, lam).sum().backward(),
        "jacrev": lambda: torch.func.jacrev(lambda lam: hg.implicit.fixed_point(phi, w, lam))(lam.detach()),
        "hypertorch": lambda: hg.CG_normaleq(
            [w], [lam], 5, lambda w, lam: [phi(w[0], lam[0])], lambda w, lam: w[0].sum(), set_grad=False
        ),
    }
    with pytest.warns(hg.HypergradientWarning):
        calls[call]()


def test_zeros_of_a_smooth_loss_are_not_taken_for_kinks(ridge):
    """Some entries of the solution are 0 because of the data, and the gradient vanishes there too."""
    lam = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    result = hg.implicit.grad(
        lambda w, lam: (w - 1).square().sum(),
        inner_loss=lambda w, lam: (w - lam).square().sum(),
        params=torch.zeros(3, dtype=torch.float64),
        hparams=lam,
    )
    torch.testing.assert_close(result.grads, torch.full((3,), -2.0, dtype=torch.float64))


@pytest.mark.parametrize("call", ["grad", "jacobian", "CG"])
def test_an_inner_problem_that_does_not_depend_on_hparams_is_warned_of(call):
    """The inner loss copies hparams or reads them as numbers, so that only ∇₂E is left."""
    h = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    w = h.detach().clone()
    inner = lambda w, h: ((w - copy.deepcopy(h)) ** 2).sum() / 2  # noqa: E731
    outer = lambda w, h: (w * h).sum()  # noqa: E731
    calls = {
        "grad": lambda: hg.implicit.grad(outer, params=w, hparams=h, inner_loss=inner).grads,
        "jacobian": lambda: hg.implicit.jacobian(
            lambda w, h: outer(w, h)[None], params=w, hparams=h, inner_loss=inner
        ).grads[0],
        "CG": lambda: hg.hypergradients.CG(
            [w], [h], 5, lambda w, h: [h[0].detach() + 0 * w[0]], lambda w, h: outer(w[0], h[0])
        )[0],
    }
    with pytest.warns(hg.HypergradientWarning, match="the inner problem does not depend on hparams"):
        assert torch.equal(calls[call](), w)


@pytest.mark.parametrize("form", ["inner_loss", "fp_map", "residual"])
def test_a_trained_tensor_that_was_forgotten_is_warned_of(form):
    """It counts as a constant, also if a closure holds it."""
    bias, lam = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 3.0))
    forms = {"inner_loss": lambda w, h: (w + bias - h) ** 2 / 2, "residual": lambda w, h: w + bias - h}
    forms["fp_map"] = lambda w, h: w / 2 + (h - bias) / 2
    options = {"params": torch.tensor(2.5, dtype=torch.float64), "hparams": lam}
    with pytest.warns(hg.HypergradientWarning, match=f"{form} depends on 1 tensors that require grad"):
        hg.implicit.grad(lambda w, h: w**2, **{form: forms[form]}, **options)
    bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hg.implicit.grad(lambda w, h: w**2, **{form: forms[form]}, **options)


INSIDE = {
    "grad": lambda g, f, phi, w, h: hg.implicit.grad(f, inner_loss=g, params=w, hparams=h).grads,
    "backward": lambda g, f, phi, w, h: (hg.implicit.backward(f, inner_loss=g, params=w, hparams=h), h.grad)[1],
    "polish": lambda g, f, phi, w, h: hg.implicit.polish(hg.implicit.grad(f, inner_loss=g, params=w, hparams=h)).grads,
    "check": lambda g, f, phi, w, h: (
        3.0 * hg.diagnostics.check(hg.implicit.grad(f, inner_loss=g, params=w, hparams=h)).ok
    ),
    "CG": lambda g, f, phi, w, h: hg.CG([w], [h], 9, lambda w, h: [phi(w[0], h[0])], lambda w, h: f(w[0], h[0]))[0],
    "exact": lambda g, f, phi, w, h: hg.exact(lambda h: [h[0] * 1], [h], lambda w, h: f(w[0], h[0]))[0],
    "history": lambda g, f, phi, w, h: hg.reverse(
        [[w]] * 60, [h], [lambda w, h: [phi(w[0], h[0])]] * 59, lambda w, h: f(w[0], h[0])
    )[0],
    "reverse": lambda g, f, phi, w, h: hg.unroll.reverse(phi, w, h, f, 60).grads,
    "meta": lambda g, f, phi, w, h: (
        hg.meta.grad(
            lambda w, h, task: f(w, h),
            lambda w, h, task: g(w, h),
            h,
            torch.ones(2),
            method=hg.meta.Implicit(),
            steps=1,
            rule=hg.diff_optimizers.SGD(lr=0.5),
            start=lambda h, task: w,
        ).grads
    ),
}


@pytest.mark.parametrize("made", ["outside", "inside"])
@pytest.mark.parametrize("entry_point", INSIDE)
def test_inference_mode_acts_as_no_grad(entry_point, made):
    lam = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    w = lam.detach().clone()
    forms = (lambda w, h: (w - h) ** 2 / 2, lambda w, h: w**2 / 2, lambda w, h: (w + h) / 2)
    with torch.inference_mode():
        w = w.clone() if made == "inside" else w
        value = INSIDE[entry_point](*forms, w, lam)
    assert abs(float(value) - 3) < 1e-8
    assert lam.grad is None or not lam.grad.is_inference()


@pytest.mark.parametrize("who", ["inner_loss", "fp_map", "residual", "outer_loss"])
@pytest.mark.parametrize("entry_point", ["grad", "jacobian", "CG"])
def test_a_function_that_mixes_the_live_params_in_is_warned_of(entry_point, who):
    """w = (a + λ/2) / 1.2; terms of the live w are constants to autograd. Without such terms there is no warning."""
    a, lam = rand(3), rand(3, seed=1).requires_grad_()
    w = nn.Parameter((a + lam.detach() / 2) / 1.2)
    form = "inner_loss" if who == "outer_loss" and entry_point != "CG" else "fp_map" if entry_point == "CG" else who

    def call(mixed):
        other = lambda x: w if mixed else x  # noqa: E731
        inner_other = other if who != "outer_loss" else lambda x: x
        slope = lambda x, lam: (x - a) + 0.2 * inner_other(x) - lam / 2  # noqa: E731
        functions = {
            "inner_loss": lambda x, lam: ((x - a) ** 2 / 2 + 0.1 * inner_other(x) * x - lam * x / 2).sum(),
            "fp_map": lambda x, lam: x - slope(x, lam) / 2,
            "residual": slope,
        }
        outer = lambda x, lam: (x**2).sum() + ((other(x) if who == "outer_loss" else x) ** 3).sum()  # noqa: E731
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if entry_point == "CG":
                step = lambda x, lam: [functions["fp_map"](x[0], lam[0])]  # noqa: E731
                found = hg.CG([w], [lam], 9, step, lambda x, lam: outer(x[0], lam[0]), set_grad=False)[0]
            elif entry_point == "grad":
                found = hg.implicit.grad(outer, params=w, hparams=lam, **{form: functions[form]}).grads
            else:
                losses = lambda x, lam: torch.stack([outer(x, lam), x.sum()])  # noqa: E731
                found = hg.implicit.jacobian(losses, params=w, hparams=lam, **{form: functions[form]}).grads[0]
        return found, [str(each.message) for each in caught if "uses the live params beside" in str(each.message)]

    if entry_point == "CG" and who in ("inner_loss", "residual"):
        pytest.skip("HyperTorch's functions take maps")
    found, texts = call(mixed=False)
    torch.testing.assert_close(found, (2 * w + 3 * w**2).detach() / 2.4, rtol=1e-10, atol=0.0)
    assert not texts
    texts = call(mixed=True)[1]
    assert len(texts) == 1 and texts[0].startswith("fp_map" if form != who and who != "outer_loss" else who)
