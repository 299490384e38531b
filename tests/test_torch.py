"""Hooks of tensors (Tensor.register_hook) act once on a whole hypergradient, as they do in loss.backward()."""

import pytest
import torch

import hypergrad as hg
from hypergrad import _torch

A = torch.diag(torch.tensor([0.5, 0.8, 1.1], dtype=torch.float64))
T = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
HOOKS = {
    "reversal": lambda g: -g,
    "clamp": lambda g: g.clamp(-0.3, 0.3),
    "mask": lambda g: g * torch.tensor([1.0, 0.0, 1.0], dtype=g.dtype),
    "nothing": lambda g: None,
}


def start() -> torch.Tensor:
    return torch.tensor([0.3, -0.4, 0.7], dtype=torch.float64, requires_grad=True)


def solution(h):
    return [torch.linalg.inv(A) @ h[0].sin()]


def inner_loss(w, h):
    return 0.5 * w[0] @ A @ w[0] - w[0] @ h[0].sin()


def fp_map(w, h):
    return [w[0] - 0.7 * (A @ w[0] - h[0].sin())]


def outer_loss(w, h):
    return (w[0] - T).pow(4).sum() + (w[0] * h[0]).sum()


def at_solution(h):
    return [w.detach() for w in solution(h)]


def evaluated(h, method):
    params = [w.requires_grad_() for w in at_solution(h)]
    method(outer_loss(params, h), inner_loss=inner_loss(params, h), params=params, hparams=h)


# Each adds the hypergradient to .grad of the leaves behind a list of one tensor.
ENTRY_POINTS = {
    "fixed_point": lambda h: hg.fixed_point(at_solution(h), h, 100, fp_map, outer_loss, tol=1e-14),
    "neumann": lambda h: hg.neumann(at_solution(h), h, 100, fp_map, outer_loss, tol=1e-14),
    "CG": lambda h: hg.CG(at_solution(h), h, 5, fp_map, outer_loss),
    "CG_normaleq": lambda h: hg.CG_normaleq(at_solution(h), h, 5, fp_map, outer_loss),
    "reverse": lambda h: hg.reverse([at_solution(h)] * 101, h, [fp_map] * 100, outer_loss),
    "reverse_unroll": lambda h: hg.reverse_unroll(solution(h), h, outer_loss),
    "exact": lambda h: hg.exact(solution, h, outer_loss),
    "stoch_AID": lambda h: hg.stoch_AID(at_solution(h), h, outer_loss, 100, fp_map=fp_map, verbose=False),
    "implicit.backward": lambda h: hg.implicit.backward(
        outer_loss, inner_loss=inner_loss, params=at_solution(h), hparams=h, solver=hg.solvers.CG(rtol=1e-13)
    ),
    "implicit.backward, evaluated": lambda h: evaluated(h, hg.implicit.backward),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("of_network", [False, True])
def test_a_hook_on_hparams_acts_once(entry_point, hook, of_network):
    """The hook may be on a leaf or on the output of a network."""

    def grad_of(backward):
        leaf = start()
        h = leaf * 1.0 if of_network else leaf
        handle = h.register_hook(HOOKS[hook])
        backward([h])
        handle.remove()
        assert not h._backward_hooks
        return leaf.grad

    truth = grad_of(lambda h: outer_loss(solution(h), h).backward())
    assert (grad_of(ENTRY_POINTS[entry_point]) - truth).norm() < 1e-9 * truth.norm()


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_retained_gradient_is_the_whole(entry_point):
    leaf = start()
    h = leaf * 1.0
    h.retain_grad()
    ENTRY_POINTS[entry_point]([h])
    truth = torch.autograd.grad(outer_loss(solution([leaf]), [leaf]), leaf)[0]
    assert (h.grad - truth).norm() < 1e-9 * truth.norm() and (leaf.grad - truth).norm() < 1e-9 * truth.norm()


def test_hooks_act_on_what_is_returned():
    """The returned list holds ∇f(λ) after the hooks, as from torch.autograd.grad."""
    h = start()
    truth = torch.autograd.grad(outer_loss(solution([h]), [h]), h)[0]
    h.register_hook(lambda g: -g)
    (grad,) = hg.CG(at_solution([h]), [h], 5, fp_map, outer_loss, set_grad=False)
    assert (grad + truth).norm() < 1e-9 * truth.norm() and h.grad is None


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_params_of_evaluated_losses_do_not_change_products(hook):
    h = [start()]
    truth = torch.autograd.grad(outer_loss(solution(h), h), h)[0]
    params = [w.requires_grad_() for w in at_solution(h)]
    params[0].register_hook(HOOKS[hook])
    with pytest.warns(hg.HypergradientWarning, match=r"params\[0\] have gradient hooks"):
        result = hg.implicit.grad(
            outer_loss(params, h),
            inner_loss=inner_loss(params, h),
            params=params,
            hparams=h,
            solver=hg.solvers.CG(rtol=1e-13),
        )
    assert (result.grads[0] - truth).norm() < 1e-9 * truth.norm()


def test_hooks_are_there_again_after_an_error():
    h = start()
    h.register_hook(lambda g: -g)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        hg.CG(at_solution([h]), [h], 5, fp_map, lambda w, h: outer_loss([Fails.apply(w[0])], h))
    h.sum().backward()
    assert torch.equal(h.grad, -torch.ones_like(h))


def test_a_step_of_an_optimiser_sees_hooks_as_training_does():
    """A hook that masks gradients of params keeps the masked entries unchanged."""
    w = start()
    w.register_hook(HOOKS["mask"])
    step = hg.GradientDescent(lambda w, h: w[0].square().sum(), 0.1)
    for new in (hg.gd_step([w], w.square().sum(), 0.1), step([w], [])):
        assert new[0][1] == w[1] and new[0][0] != w[0]


def test_requires_grad_may_be_set_under_a_transform():
    def marked(x):
        with _torch.requires_grad_allowed():
            return x.clone().requires_grad_().detach() * 2

    assert torch.func.vmap(marked)(torch.ones(2, 3)).sum() == 12
