"""Gradient hooks inside losses and maps: hooks that change products are named in a warning, hooks that read are not."""

import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hypergrad as hg

SOLVER = hg.solvers.MINRES(max_steps=12)
CLIP = lambda g: g.clamp(-0.01, 0.01)  # noqa: E731


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """A loss of live parameters, whose hidden layer may have a hook."""

    def __init__(self, hook=None):
        super().__init__()
        self.first, self.last, self.hook = nn.Linear(3, 4), nn.Linear(4, 1), hook
        self.double()
        self.x, self.y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
        self.h = torch.zeros(8, dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.hook is not None and hidden.requires_grad:
            hidden.register_hook(self.hook)
        return self.last(torch.tanh(hidden))

    def train_loss(self) -> Tensor:
        decay = sum((p**2).sum() for p in self.parameters())
        return (self.h.exp()[:, None] * (self(self.x) - self.y) ** 2).mean() + 0.05 * decay

    def grad(self, outer: Tensor | None = None, **options) -> hg.Hypergradient:
        value = self(self.x).sin().sum() if outer is None else outer
        options = {"inner_loss": self.train_loss(), "params": self.parameters(), "hparams": self.h, **options}
        return hg.implicit.grad(value, **{"solver": SOLVER, **options})


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in seen if "changes gradients inside" in str(each.message)]


class Halved:
    def __call__(self, g: Tensor) -> Tensor:
        return g / 2


@pytest.mark.parametrize("hook", [CLIP, Halved(), Halved().__call__, lambda *args: args[0] / 2])
def test_a_hook_on_a_hidden_tensor_of_an_evaluated_loss_is_named(hook):
    (text,) = said(lambda: Net(hook).grad())
    name = getattr(hook, "__name__", "__call__")
    assert text.startswith(f"{name} (test_graph_hooks.py, line ") and "inside inner_loss" in text


@pytest.mark.parametrize("hook", [None, lambda g: None, lambda g: g], ids=["none", "looks on", "gives the same"])
def test_hooks_that_change_nothing_are_not_warned_of(hook):
    net, plain = Net(hook), Net()
    plain.load_state_dict(net.state_dict())
    plain.x, plain.y = net.x, net.y
    values: list[Tensor] = []
    for each in (net, plain):
        assert not said(lambda each=each: values.append(each.grad().grads))
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


def test_a_hook_in_the_outer_loss_acts_once_as_in_backward():
    """∇₁E is the clipped gradient, as from `torch.autograd.grad`."""
    net = Net(CLIP)
    outer = net(net.x).sin().sum()
    net.hook = None
    results: list[hg.Hypergradient] = []
    assert not said(lambda: results.append(net.grad(outer, solver=hg.solvers.FixedPoint(max_steps=0))))
    net.hook = CLIP
    slopes = torch.autograd.grad(net(net.x).sin().sum(), list(net.parameters()))
    norm = torch.cat([g.flatten() for g in slopes]).norm()
    torch.testing.assert_close(results[0].solution.rhs_norm, norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("changes", [False, True])
def test_backward_hooks_of_modules(changes, pre):
    net = Net()
    if pre:
        net.first.register_full_backward_pre_hook(lambda module, grads: (grads[0] / 2,) if changes else None)
    else:  # of a layer whose input depends on params
        net.last.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] / 2,) if changes else None)
    assert len(said(net.grad)) == changes


@pytest.mark.parametrize("kind", ["checkpoint", "saved tensors", "Function"])
def test_other_python_code_in_a_reverse_pass_is_no_hook(kind):
    net = Net()
    plain = net.forward
    ways = {
        "checkpoint": lambda x: checkpoint(plain, x, use_reentrant=False),
        "saved tensors": lambda x: held(plain, x),
        "Function": lambda x: Twice.apply(plain(x)),
    }
    net.forward = ways[kind]
    assert not said(net.grad)


def held(function, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: ("kept", x), lambda kept: kept[1].clone()):
        return function(x)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def phi(w: Tensor, h: Tensor) -> Tensor:
    half = 0.5 * w
    if half.requires_grad:
        half.register_hook(lambda g: g / 2)
    return half + h


W, H = torch.ones(2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
ENTRY_POINTS = {
    "grad": lambda h: hg.implicit.grad(lambda w, h: w.sum(), fp_map=phi, params=W, hparams=h),
    "jacobian": lambda h: hg.implicit.jacobian(lambda w, h: w, fp_map=phi, params=W, hparams=h),
    "fixed_point": lambda h: hg.implicit.fixed_point(phi, W, h).sum().backward(),
    "jacrev": lambda h: torch.func.jacrev(lambda h: hg.implicit.fixed_point(phi, W, h))(h.detach()),
    "hg.fixed_point": lambda h: hg.fixed_point(
        [W], [h], 9, lambda w, h: [phi(w[0], h[0])], lambda w, h: w[0].sum(), set_grad=False
    ),
    "argmin": lambda h: hg.implicit.argmin(lambda w, h: phi(w, h).square().sum(), -W, h).sum().backward(),
}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_every_entry_point_warns(entry_point):
    assert len(said(lambda: ENTRY_POINTS[entry_point](H.clone().requires_grad_()))) == 1


@pytest.mark.parametrize("closures", [False, True])
def test_second_order_trackers_warn(closures):
    net = Net(CLIP)
    tracker = hg.bilevel.SOBA(net.parameters(), net.h, lr=0.1)

    def step():
        for _ in range(2):
            losses = (lambda: net(net.x).sum()), net.train_loss
            tracker.backward(*(losses if closures else [loss() for loss in losses]))
            tracker.step()

    assert said(step)


def test_a_profiler_that_is_on_stays_on():
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(event))
    try:
        assert not said(Net(CLIP).grad)
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert seen
