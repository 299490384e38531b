"""Losses and maps that do not use their arguments: an error if the result would be an unintended zero."""

import pytest
import torch

import hypergrad as hg
from helpers import S, nothing_changed

X = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 1.0], [2.0, 0.1, -0.7], [0.4, 0.9, 1.3]], dtype=torch.float64)


def live_model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1, dtype=torch.float64)


def as_params(model, form):
    """The model's parameters in the form that callers of HyperTorch pass."""
    params = list(model.parameters())
    return params if form == "live" else [p.detach().clone() for p in params]


def predict(w, x=X):
    return (x @ w[0].T + w[1]).squeeze(-1)


def fp_map(w, h):
    return [w[0] - 0.1 * (w[0] - h[0]), w[1] - 0.1 * (w[1] - h[0].sum())]


def inner_loss(w, h):
    return ((w[0] - h[0]).square().sum() + (w[1] - h[0].sum()).square().sum()) / 2


def outer_loss(w, h):
    return predict(w).square().sum()


def hparams():
    return [torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64, requires_grad=True)]


METHODS = {
    "fixed_point": lambda w, h, phi, g, e: hg.fixed_point(w, h, 9, phi, e),
    "neumann": lambda w, h, phi, g, e: hg.neumann(w, h, 9, phi, e),
    "CG": lambda w, h, phi, g, e: hg.CG(w, h, 9, phi, e),
    "CG_normaleq": lambda w, h, phi, g, e: hg.CG_normaleq(w, h, 9, phi, e),
    "stoch_AID": lambda w, h, phi, g, e: hg.stoch_AID(w, h, e, 9, fp_map=phi, verbose=False),
    "reverse": lambda w, h, phi, g, e: hg.reverse([w] * 10, h, [phi] * 9, e),
    "implicit.backward, loss": lambda w, h, phi, g, e: hg.implicit.backward(e, inner_loss=g, params=w, hparams=h),
    "implicit.backward, map": lambda w, h, phi, g, e: hg.implicit.backward(
        e, fp_map=phi, params=w, hparams=h, solver=S.GMRES(rtol=1e-6)
    ),
}


@pytest.mark.parametrize("form", ["live", "copies"])
@pytest.mark.parametrize("method", METHODS)
def test_an_outer_loss_of_the_live_model(method, form):
    """Its derivative with respect to the argument is zero: HyperTorch returns zeros."""
    model, h = live_model(), hparams()
    w = as_params(model, form)
    with nothing_changed(w, h, list(model.parameters())), pytest.raises(ValueError, match="outer_loss does not use"):
        METHODS[method](w, h, fp_map, inner_loss, lambda w, h: model(X).square().sum())


@pytest.mark.parametrize("method", METHODS)
def test_an_outer_loss_without_a_graph(method):
    model, h = live_model(), hparams()
    w = as_params(model, "copies")

    @torch.no_grad()
    def validate(w, h):
        return outer_loss(w, h)

    numbers = [
        validate,
        lambda w, h: torch.tensor(outer_loss(w, h).item()),
        lambda w, h: outer_loss([x.detach() for x in w], h),
    ]
    for outer in numbers:
        with nothing_changed(w, h), pytest.raises(ValueError, match="outer_loss depends neither on params nor"):
            METHODS[method](w, h, fp_map, inner_loss, outer)


@pytest.mark.parametrize("form", ["live", "copies"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "implicit.backward, loss"])
def test_a_map_of_the_live_model(method, form):
    model, h = live_model(), hparams()
    w = as_params(model, form)

    def live(w, h):
        return fp_map(list(model.parameters()), h)

    with nothing_changed(w, h), pytest.raises(ValueError, match="does not use the params"):
        METHODS[method](w, h, live, inner_loss, outer_loss)


@pytest.mark.parametrize("method", METHODS)
def test_losses_that_do_not_depend_on_hparams_are_an_error(method):
    """hparams are read as numbers, detached, or other tensors are used."""
    w, h = as_params(live_model(), "copies"), hparams()
    other = h[0].detach().clone().requires_grad_()
    for change in (
        lambda h: [torch.tensor(h[0].tolist(), dtype=torch.float64)],
        lambda h: [h[0].detach()],
        lambda h: [other],
    ):

        def phi(w, h, change=change):
            return fp_map(w, change(h))

        def g(w, h, change=change):
            return inner_loss(w, change(h))

        with nothing_changed(w, h), pytest.raises(ValueError, match="depends on any of hparams"):
            METHODS[method](w, h, phi, g, outer_loss)


@pytest.mark.parametrize("method", ["reverse_unroll", "exact"])
def test_nothing_reaches_hparams_by_backpropagation(method):
    h = hparams()
    number = h[0].detach() * 2
    with nothing_changed(h), pytest.raises(ValueError, match="depends on any of hparams"):
        if method == "exact":
            hg.exact(lambda h: [number], h, lambda w, h: w[0].sum())
        else:
            hg.reverse_unroll([number], h, lambda w, h: w[0].sum())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_used_in_part_is_right(method):
    """An outer loss or a map may use hparams alone, and one of several hparams may be unused."""
    h = [*hparams(), torch.ones(2, dtype=torch.float64, requires_grad=True)]
    solution = [h[0].detach().clone(), h[0].detach().sum().reshape(1)]
    call = METHODS[method]
    with torch.no_grad():
        call(solution, h, lambda w, h: [h[0] * 1, h[0].sum().reshape(1)], inner_loss, lambda w, h: h[0].square().sum())
    assert torch.allclose(h[0].grad, 2 * h[0].detach()) and not h[1].grad.any()
    h[0].grad = h[1].grad = None
    if method != "implicit.backward, loss":
        call(solution, h, lambda w, h: [h[0] * 1, h[0].sum().reshape(1)], inner_loss, lambda w, h: w[0].square().sum())
        assert torch.allclose(h[0].grad, 2 * h[0].detach()) and not h[1].grad.any()


class WeightNormSquare(torch.autograd.Function):
    """w², with a tensor in its context under the name that leaf nodes of torch use, and a class name like a layer's."""

    other = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.variable = WeightNormSquare.other
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_a_tensor_in_the_context_of_a_users_function_is_not_taken_for_a_leaf_of_the_graph():
    w, lam = torch.tensor([3.0, 3.0], dtype=torch.float64).unbind()
    lam = lam.clone().requires_grad_()
    root = hg.implicit.root(lambda w, lam: WeightNormSquare.apply(w) - lam**2, w, lam)
    live = w.clone().requires_grad_()
    value = WeightNormSquare.apply(live) - lam**2
    evaluated = hg.implicit.grad(live * 1, residual=value, params=live, hparams=lam)
    assert float(torch.autograd.grad(root, lam)[0]) == float(evaluated.grads) == 1.0
