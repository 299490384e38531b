"""torch's weight_norm, whose second derivative is wrong: written out in functions, refused in evaluated losses."""

import threading

import optree
import pytest
import torch
from torch import nn
from torch.func import functional_call

import hypergrad as hg

S, D = hg.solvers, hg.diff_optimizers
DENSE = S.Dense()
# The older one is of a module that functional_call can be given the two parts of.
KINDS = {"parametrizations": nn.utils.parametrizations.weight_norm, "weight_norm": nn.utils.weight_norm}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*:FutureWarning", "ignore::hypergrad.HypergradientWarning", "ignore:.*performance drop"
)


class Case:
    """A regression with one normalised layer, and the same with the norm by hand."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.layer = KINDS[kind](nn.Linear(3, 2)).double()
        self.params = {name: p.detach().clone() for name, p in self.layer.named_parameters()}
        self.h = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        self.x, self.y = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 2).double()

    def torch_s(self, w, x):
        return functional_call(self.layer, dict(w), (x,))

    def by_hand(self, w, x):
        g, v = (next(p for name, p in w.items() if name.endswith(ends)) for ends in (("0", "_g"), ("1", "_v")))
        return x @ (v * (g / v.norm(dim=1, keepdim=True))).T + w["bias"]

    def losses(self, model):
        """g and E of functions, and a gradient step on g."""

        def inner(w, h, i=0):
            return (model(w, self.x[i]) - self.y[i]).square().mean() + h.exp() * sum(
                p.square().sum() for p in w.values()
            )

        def outer(w, h):
            return (model(w, self.x[3]) - self.y[3]).square().mean()

        def step(w, h):
            slopes = torch.autograd.grad(inner(w, h), [*w.values()], create_graph=True)
            return {name: p - 0.1 * g for (name, p), g in zip(w.items(), slopes, strict=True)}

        return inner, outer, step


def grad(case, model, form):
    inner, outer, step = case.losses(model)
    residual = lambda w, h: torch.func.grad(inner)(w, h)  # noqa: E731
    total = hg.operators.Sum(lambda w, h, i: inner(w, h, i), [0, 1, 2], mean=True)
    given = {"inner_loss": inner, "fp_map": step, "residual": residual, "Sum": total}[form]
    name = "inner_loss" if form == "Sum" else form
    return hg.implicit.grad(outer, **{name: given}, params=case.params, hparams=case.h, solver=DENSE).grads


def unrolled(case, model, how):
    _, outer, step = case.losses(model)
    return how(step, case.params, case.h, outer, 5).grads


def rule(case, model):
    inner, outer, _ = case.losses(model)
    own = D.Adam(lr=0.1)
    end = lambda s, h: outer(s[0], h)  # noqa: E731
    return hg.unroll.reverse(own.on(inner), (case.params, own.init(case.params)), case.h, end, 5).grads


def meta(case, model, method):
    inner = lambda w, h, task: (model(w, task[0]) - task[1]).square().mean()  # noqa: E731
    hparams = {name: p.clone().requires_grad_() for name, p in case.params.items()}
    loss = hg.meta.biased(inner, strength=1.0)
    return hg.meta.grad(inner, loss, hparams, (case.x, case.y), method=method, steps=3).grads


def tracker(case, model):
    w, h = ({k: p.clone().requires_grad_() for k, p in case.params.items()}, case.h.detach().clone().requires_grad_())
    inner, outer, _ = case.losses(model)
    own = hg.bilevel.SOBA(w, h, lr=0.1)
    for _ in range(3):
        own.backward(lambda: outer(w, h), lambda: inner(w, h))
        own.step()
    return h.grad


def hypertorch(case, model, name):
    inner, outer, step = case.losses(model)
    named = lambda w: dict(zip(case.params, w, strict=True))  # noqa: E731
    phi = lambda w, h: [*step(named(w), h[0]).values()]  # noqa: E731
    loss = lambda w, h: outer(named(w), h[0])  # noqa: E731
    params = [p.clone().requires_grad_() for p in case.params.values()]
    if name == "CG_normaleq":
        return hg.CG_normaleq(params, [case.h], 50, phi, loss, set_grad=False)
    if name == "reverse":
        after = [p.detach() for p in phi(params, [case.h])]
        return hg.reverse([params, after], [case.h], [phi], loss, set_grad=False)
    optimizer = hg.GradientDescent(lambda w, h: inner(named(w), h[0]), 0.1)
    return hg.reverse_unroll(optimizer(optimizer(params, [case.h]), [case.h]), [case.h], loss, set_grad=False)


ENTRY_POINTS = {
    **{f"grad, {form}": lambda c, m, f=form: grad(c, m, f) for form in ("inner_loss", "fp_map", "residual", "Sum")},
    "unroll.reverse": lambda c, m: unrolled(c, m, hg.unroll.reverse),
    "unroll.forward": lambda c, m: unrolled(c, m, hg.unroll.forward),
    "rule": rule,
    "meta, Unrolled": lambda c, m: meta(c, m, hg.meta.Unrolled()),
    "meta, Implicit": lambda c, m: meta(c, m, hg.meta.Implicit(solver=DENSE)),
    "bilevel": tracker,
    **{f"hg.{n}": lambda c, m, n=n: hypertorch(c, m, n) for n in ("CG_normaleq", "reverse", "reverse_unroll")},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_functions_have_right_second_derivatives(entry_point, kind):
    case = Case(kind)
    due, found = (optree.tree_leaves(ENTRY_POINTS[entry_point](case, model)) for model in (case.by_hand, case.torch_s))
    for a, b in zip(found, due, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def live(kind):
    """Losses of a live layer, evaluated."""
    case = Case(kind)
    params, h = [*case.layer.parameters()], case.h
    g = (case.layer(case.x[0]) - case.y[0]).square().mean() + h.exp() * sum(p.square().sum() for p in params)
    return params, h, (case.layer(case.x[3]) - case.y[3]).square().mean(), g


@pytest.mark.parametrize("kind", KINDS)
def test_evaluated_losses_are_refused_with_what_to_write(kind):
    params, h, f, g = live(kind)
    after = [p - 0.1 * s for p, s in zip(params, torch.autograd.grad(g, params, create_graph=True), strict=True)]
    case, options = Case(kind), {"params": params, "hparams": h}
    step = case.losses(case.torch_s)[2]
    twice = step(step({name: p.requires_grad_() for name, p in case.params.items()}, case.h), case.h)
    for call in (
        lambda: hg.implicit.grad(f, inner_loss=g, **options),
        lambda: hg.implicit.backward(f, inner_loss=g, **options),
        lambda: hg.implicit.jacobian(f[None], inner_loss=g, **options),
        lambda: hg.implicit.grad(f, fp_map=after, **options),
        lambda: hg.bilevel.SOBA(params, h).backward(f, g),
        lambda: hg.reverse_unroll([*twice.values()], [case.h], lambda w, h: w[0].sum()),
    ):
        with pytest.raises(ValueError, match=r"weight_norm, whose second derivative is wrong.*a function"):
            call()
    assert h.grad is None


def test_first_derivatives_alone_are_right_and_not_refused():
    """A normalised outer loss; a normalised network of hyperparameters."""
    params, h, f, _ = live("parametrizations")
    plain = h.exp() * sum(p.square().sum() for p in params)
    assert hg.implicit.grad(f, inner_loss=plain, params=params, hparams=h).grads.isfinite()
    w, x = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones(3, dtype=torch.float64)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    result = hg.implicit.grad(w.sum(), inner_loss=(w - layer(x)).square().sum(), params=w, hparams=layer.parameters())
    due = torch.autograd.grad(layer(x).sum(), [*layer.parameters()])
    for a, b in zip(result.grads, due, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_torch_s_own_function_is_back_afterwards_whatever_happens_and_in_all_threads():
    before, case = torch._weight_norm, Case("parametrizations")
    wrong: list[str] = []

    def run():
        case = Case("parametrizations")  # functional_call writes into its module
        due, found = (grad(case, model, "inner_loss") for model in (case.by_hand, case.torch_s))
        if abs(due - found) > 1e-10 * abs(due):
            wrong.append(f"{found} for {due}")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch._weight_norm is before
    with pytest.raises(ZeroDivisionError):
        hg.unroll.reverse(lambda w, h: 1 / 0, case.params, case.h, lambda w, h: w, 1)
    assert torch._weight_norm is before
