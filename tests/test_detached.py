"""Losses and maps that detach tensors: a warning if a derivative is lost by it, and none otherwise."""

import contextlib
import dataclasses
import math
import types
import warnings
from functools import partial

import pytest
import torch

import hypergrad as hg
from test_oracles import relative

F64 = {"dtype": torch.float64}
LAM = torch.tensor([1.0, -2.0], **F64)
W = LAM * 1.2 / 0.7  # the solution of F = w − (λ + 0.3 w) − 0.2 λ
TRUTH = 2 * W * 1.2 / 0.7  # of E = ‖w‖²


@torch.no_grad()
def decorated(x):
    return x * 1


def under_no_grad(x):
    with torch.no_grad():
        return torch.nn.Identity()(x) + 0


def switched(x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        return x * 1
    finally:
        torch.set_grad_enabled(before)


TAKEN = {
    "detach": lambda x: x.detach(),
    "torch.detach": lambda x: torch.detach(x),
    "data": lambda x: x.data,
    "changed": lambda x: x.detach().mul_(2).div_(2),
    "no_grad": under_no_grad,
    "decorated": decorated,
    "set_grad_enabled": switched,
    "item": lambda x: torch.tensor([x[0].item(), x[1].item()], **F64),
    "float": lambda x: torch.stack([x.new_tensor(float(each)) for each in x]),
    "math": lambda x: torch.stack([x.new_tensor(math.exp(each)).log() for each in x]),
}


def residual(w, lam, take):
    return w - take(lam + 0.3 * w) - 0.2 * lam


def inner_loss(w, lam, take):
    return (w**2 / 2 - w * take(lam + 0.3 * w) - 0.2 * w * lam).sum()


def fp_map(w, lam, take):
    return w - 0.01 * residual(w, lam, take)


def outer_loss(w, lam):
    return (w**2).sum()


def stepped(w, lam, take):
    """A gradient step on a loss with the given weight."""
    return fp_map(w, lam, take)


ENTRY_POINTS = {
    "grad": lambda take, lam: (
        hg.implicit.grad(outer_loss, inner_loss=partial(inner_loss, take=take), params=W, hparams=lam).grads
    ),
    "residual": lambda take, lam: (
        hg.implicit.grad(outer_loss, residual=partial(residual, take=take), params=W, hparams=lam).grads
    ),
    "backward": lambda take, lam: (
        hg.implicit.backward(outer_loss, fp_map=partial(fp_map, take=take), params=W, hparams=lam).grads
    ),
    "jacobian": lambda take, lam: hg.implicit.jacobian(
        lambda w, lam: w**2, inner_loss=partial(inner_loss, take=take), params=W, hparams=lam
    ).grads.sum(0),
    "argmin": lambda take, lam: torch.autograd.grad(
        outer_loss(hg.implicit.argmin(partial(inner_loss, take=take), W, lam), lam), lam
    )[0],
    "root": lambda take, lam: torch.autograd.grad(
        outer_loss(hg.implicit.root(partial(residual, take=take), W, lam), lam), lam
    )[0],
    "fixed_point": lambda take, lam: torch.autograd.grad(
        outer_loss(hg.implicit.fixed_point(partial(fp_map, take=take), W, lam), lam), lam
    )[0],
    "forward mode": lambda take, lam: torch.func.jvp(
        lambda lam: outer_loss(hg.implicit.root(partial(residual, take=take), W, lam), lam), (lam,), (lam,)
    )[1],
    "CG": lambda take, lam: hg.CG(
        [W], [lam], 10, lambda w, lam: [fp_map(w[0], lam[0], take)], lambda w, lam: outer_loss(w[0], lam[0])
    )[0],
    "reverse": lambda take, lam: hg.unroll.reverse(partial(stepped, take=take), W, lam, outer_loss, 5).grads,
    "forward": lambda take, lam: hg.unroll.forward(partial(stepped, take=take), W, lam, outer_loss, 5).grads,
}


def lost(call):
    """The result and the texts of its LostDerivative warnings; there must be no other warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
        result = call()
    assert all(issubclass(each.category, hg.LostDerivative) for each in caught), [str(each.message) for each in caught]
    return result, [str(each.message) for each in caught]


@pytest.mark.parametrize("way", TAKEN)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_lost_derivative_is_warned_of(entry_point, way):
    lam = LAM.clone().requires_grad_()
    _, texts = lost(lambda: ENTRY_POINTS[entry_point](TAKEN[way], lam))
    assert len(texts) == 1 and "test_detached.py, line" in texts[0] and "autograd sees" in texts[0], texts


@pytest.mark.parametrize(
    "entry_point", ["residual", "backward", "root", "fixed_point", "forward mode", "CG", "reverse", "forward"]
)
def test_no_warning_where_all_is_in_the_graph(entry_point):
    """The hypergradient is right, too."""
    lam = LAM.clone().requires_grad_()
    grads, texts = lost(lambda: ENTRY_POINTS[entry_point](lambda x: x * 1, lam))
    assert not texts
    if entry_point in ("residual", "backward", "root", "fixed_point", "CG"):
        assert relative(grads, TRUTH) < 1e-10


def kept_of(numbers, value):
    numbers.append(value.item())
    numbers.append(float(value.detach()))
    numbers.append(value.detach())
    return value


HARMLESS = {  # detached tensors that change no derivative
    "softmax": lambda w, lam, kept: (
        ((z := torch.stack([w * lam, w])) - (top := z.max().detach())).exp().sum().log() + top + (w**2).sum()
    ),
    "softmax by a number": lambda w, lam, kept: (
        ((z := torch.stack([w * lam, w])) - (top := z.max().item())).exp().sum().log() + top + (w**2).sum()
    ),
    "kept": lambda w, lam, kept: kept_of(kept, ((w - lam) ** 2).sum()),
    "constant": lambda w, lam, kept: ((w - lam) ** 2).sum() + (lam**2).detach().sum() + (w**2).sum().item(),
    "mask": lambda w, lam, kept: ((w - lam) ** 2 * (1 + (w.detach() > 0))).sum(),
    "branch": lambda w, lam, kept: ((w - lam) ** 2).sum() * (2.0 if w.sum().item() > 0 else 1.0),
    "sign": lambda w, lam, kept: ((w - lam) ** 2 * (2 + w.sign().detach())).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", HARMLESS)
def test_no_warning_where_the_derivative_is_whole(name, dtype):
    lam, kept = LAM.to(dtype).requires_grad_(), []
    inner = lambda w, lam: HARMLESS[name](w, lam, kept)  # noqa: E731
    w = torch.tensor([0.5, -0.25], dtype=dtype)
    for _ in range(300):
        leaf = w.clone().requires_grad_()
        w = w - 0.1 * torch.autograd.grad(inner(leaf, lam.detach()), leaf)[0]
    _, texts = lost(lambda: hg.implicit.grad(outer_loss, inner_loss=inner, params=w, hparams=lam))
    assert not texts
    _, texts = lost(lambda: torch.autograd.grad(hg.implicit.argmin(inner, w, lam).sum(), lam))
    assert not texts
    assert not any(isinstance(x, torch.Tensor) and x.requires_grad for x in kept)


def test_detached_inputs_of_a_weighting_network_are_warned_of():
    """By finite differences of the trained solution, the result that is warned of is off by 16 %."""
    draw = torch.Generator().manual_seed(0)
    x, y, v = (torch.randn(*shape, generator=draw, **F64) for shape in ((30, 4), (30,), (4,)))

    def inner(w, lam, take):
        losses = (x @ w - y) ** 2
        return (torch.sigmoid(lam[0] * take(losses) + lam[1]) * losses).mean() + 0.05 * (w**2).sum()

    def trained(lam):
        w = torch.zeros(4, **F64)
        for _ in range(1500):
            leaf = w.clone().requires_grad_()
            w = w - 0.2 * torch.autograd.grad(inner(leaf, lam, torch.detach), leaf)[0]
        return w

    lam = torch.tensor([0.3, 0.2], **F64, requires_grad=True)
    outer = lambda w, lam: ((w - v) ** 2).sum()  # noqa: E731
    found, texts = lost(
        lambda: hg.implicit.grad(
            outer, inner_loss=partial(inner, take=torch.detach), params=trained(lam.detach()), hparams=lam
        )
    )
    step = 1e-5 * torch.eye(2, **F64)
    truth = torch.stack(
        [(outer(trained(lam.detach() + s), 0) - outer(trained(lam.detach() - s), 0)) / 2e-5 for s in step]
    )
    assert relative(found.grads, truth) > 0.03 and len(texts) == 1

    # The gradient written out, with the weights in the graph, is right.
    def gradient(w, lam):
        losses = (x @ w - y) ** 2
        weights = torch.sigmoid(lam[0] * losses + lam[1]) / 30
        return (weights * 2 * (x @ w - y)) @ x + 0.1 * w

    found, texts = lost(lambda: hg.implicit.grad(outer, residual=gradient, params=trained(lam.detach()), hparams=lam))
    assert relative(found.grads, truth) < 1e-7 and not texts


def test_the_check_leaves_everything_as_it_was():
    """Running statistics and random numbers do not change; only a function that detaches is evaluated once more."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).double()
    lam, x, calls = LAM.clone().requires_grad_(), torch.randn(8, 2, **F64), []
    params = {name: p.detach() for name, p in net.named_parameters()}
    before = {name: b.clone() for name, b in net.named_buffers()}

    def inner(w, lam, take):
        calls.append(1)
        near = sum(((p - lam.sum()) ** 2).sum() for p in w.values())
        return (torch.func.functional_call(net, w, x) ** 2).mean() + near + (take(lam) * w["0.bias"][0]).sum()

    def call(take, kind):
        calls.clear()
        torch.manual_seed(0)
        net.load_state_dict(before, strict=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", hg.UnsolvedInnerProblem)
            warnings.simplefilter(kind, hg.LostDerivative)
            loss = partial(inner, take=take)
            hg.implicit.grad(lambda w, lam: w["0.bias"].sum(), inner_loss=loss, params=params, hparams=lam)
        return [len(caught), len(calls), *torch.rand(2).tolist(), *(b.clone() for b in net.buffers())]

    plain, ignored, warned = call(lambda x: x * 1, "always"), call(torch.detach, "ignore"), call(torch.detach, "always")
    assert plain[:2] == ignored[:2] == [0, 1] and warned[:2] == [1, 2]
    for others in (ignored, warned):
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(plain[2:], others[2:], strict=True)
        )


def test_what_the_user_keeps_requires_no_grad_afterwards():
    kept, lam = [], LAM.clone().requires_grad_()

    def take(x):
        kept.append(x.detach())
        return kept[-1]

    _, texts = lost(lambda: ENTRY_POINTS["residual"](take, lam))
    assert texts and len(kept) == 2 and not any(x.requires_grad for x in kept)


class Cell(torch.nn.Module):
    """A cell that divides by 1 + ‖z‖², which it detaches or not."""

    def __init__(self, cut):
        super().__init__()
        self.weight, self.cut = torch.nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.4]], **F64)), cut

    def forward(self, z, x):
        size = (z**2).sum(-1, keepdim=True)
        return torch.tanh(z @ self.weight / (1 + (size.detach() if self.cut else size)) + x)


@pytest.mark.parametrize("cut", [True, False])
def test_a_cell_of_an_equilibrium(cut):
    layer = hg.nn.Equilibrium(Cell(cut))
    _, texts = lost(lambda: layer(torch.ones(3, 2, **F64)).sum().backward())
    assert len(texts) == cut


def test_there_is_no_warning_if_it_is_declared():
    """allow_detached, a solver that ignores failures, or a warning filter silences it."""
    lam, take = LAM.clone().requires_grad_(), torch.detach
    quiet = hg.solvers.GMRES(on_failure="ignore")
    _, texts = lost(lambda: hg.unroll.reverse(partial(stepped, take=take), W, lam, outer_loss, 3, allow_detached=True))
    assert not texts
    _, texts = lost(
        lambda: hg.implicit.grad(outer_loss, residual=partial(residual, take=take), params=W, hparams=lam, solver=quiet)
    )
    assert not texts


class Losses:
    """A loss that calls other methods; nothing calls `logged`."""

    def loss(self, w, lam):
        return self.distance(w, lam)

    def distance(self, w, lam):
        return ((w - lam) ** 2).sum() / 2

    def logged(self, w):
        return w.sum().item()


class Cut(Losses):
    def distance(self, w, lam):
        return ((w - (lam + lam.detach()) / 2) ** 2).sum() / 2


@pytest.mark.parametrize("losses, lost", [(Losses(), False), (Cut(), True)], ids=["whole", "cut"])
def test_methods_that_a_method_calls_are_followed(losses, lost):
    lam = torch.ones(2, **F64, requires_grad=True)
    due = pytest.warns(hg.LostDerivative, match="distance") if lost else contextlib.nullcontext()
    with due:
        w = hg.implicit.argmin(losses.loss, torch.ones(2, **F64), lam)
        (gradient,) = torch.autograd.grad(w.sum(), lam)
    assert torch.allclose(gradient, torch.full((2,), 0.5 if lost else 1.0, **F64))


@pytest.mark.parametrize("steps", [1, 2])
def test_of_a_single_step_only_the_derivative_in_hparams_counts(steps):
    """A weight computed from the detached loss of w is exact for one step from a constant start, but not for two."""
    lam = LAM.clone().requires_grad_()
    step = lambda w, lam: w - 0.1 * (w.detach() ** 2 * lam).sigmoid() * w  # noqa: E731
    found, texts = lost(lambda: hg.unroll.reverse(step, W, lam, outer_loss, steps).grads)
    w = W
    for _ in range(steps):
        w = w - 0.1 * (w**2 * lam).sigmoid() * w
    exact = relative(found, torch.autograd.grad(outer_loss(w, lam), lam)[0]) < 1e-10
    assert exact == (steps == 1) and len(texts) == (steps == 2)


class Trap:
    """An object that raises when its class is read; torch's deprecated names would warn then."""

    @property
    def __class__(self):
        raise AssertionError("entered")


def test_modules_of_python_in_a_closure_are_not_entered():
    settings = types.ModuleType("settings")
    settings.scale, settings.trap = 2.0, Trap()
    lam = torch.ones(2, **F64, requires_grad=True)
    w = hg.implicit.argmin(lambda w, lam: settings.scale * ((w - lam) ** 2).sum(), torch.ones(2, **F64), lam)
    (gradient,) = torch.autograd.grad(w.sum(), lam)
    assert torch.allclose(gradient, torch.ones(2, **F64))


@dataclasses.dataclass
class Fitted:
    """A class with an attribute called data, which is no tensor's .data, and which the generated __eq__ compares."""

    data: torch.Tensor

    def loss(self, w, lam):
        return ((w - lam * self.data) ** 2).sum()


def test_attributes_called_data_do_not_start_the_check(monkeypatch):
    seen = []
    enter = torch.overrides.TorchFunctionMode.__enter__
    monkeypatch.setattr(torch.overrides.TorchFunctionMode, "__enter__", lambda mode: seen.append(mode) or enter(mode))
    lam = torch.ones(2, **F64, requires_grad=True)
    fitted = Fitted(torch.ones(2, **F64))
    result = hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=fitted.loss, params=torch.ones(2, **F64), hparams=lam)
    assert torch.allclose(result.grads, torch.ones(2, **F64))
    assert not seen


def test_a_function_that_begins_to_detach_is_noticed():
    lam = torch.ones(2, **F64, requires_grad=True)
    part = [lambda lam: lam]

    def inner(w, lam):
        return ((w - part[0](lam) / 2 - lam / 2) ** 2).sum()

    def gradient():
        w = hg.implicit.argmin(inner, torch.ones(2, **F64), lam)
        return torch.autograd.grad(w.sum(), lam)[0]

    assert torch.allclose(gradient(), torch.ones(2, **F64))
    part[0] = lambda lam: lam.detach()
    with pytest.warns(hg.LostDerivative):
        assert torch.allclose(gradient(), torch.full((2,), 0.5, **F64))
