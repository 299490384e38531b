"""Implicit functions in one another and in checkpoints, of maps that torch.func refuses, and with other containers."""

import dataclasses
from collections import OrderedDict
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import hypergrad as hg
from implicit_cases import implicit, newton, picard, rel

DENSE = hg.solvers.Dense()
EXACT = {"solver": DENSE}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def double(value) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- nested in one another --------------------------------------------------------------------------------------------
# The inner functions map λ ∈ R⁴ to z ∈ R²; the outer ones use z at (w, λ₀, λ₁). The oracle runs Newton's method by
# dense Jacobians in the outer problem, and a plain iteration in the inner one.

LAMBDA = double([0.3, -0.2, 0.5, 0.4])


def cell(z: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(0.3 * h[:2] * z + h[2:])


def bowl(z: Tensor, h: Tensor) -> Tensor:
    return 0.75 * z @ z - (torch.tanh(h[:2] + h[2:]) * z).sum() + 0.1 * (z**4).sum()


def equilibrium(h: Tensor) -> Tensor:
    return picard(cell, torch.zeros(2, dtype=h.dtype), h, 80)


def minimum(h: Tensor) -> Tensor:
    c = torch.tanh(h[:2] + h[2:])
    z = c / 1.5
    for _ in range(30):
        z = z - (1.5 * z - c + 0.4 * z**3) / (1.5 + 1.2 * z**2)
    return z


def system(h: Tensor) -> tuple[Tensor, Tensor]:
    return torch.diag(2 + h[:2] ** 2) + 0.3, h[2:].sin()


def solved_by_lu(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b[:, None])[:, 0]


def by_linear_solve(h: Tensor) -> Tensor:
    a, b = system(h)
    return implicit.linear_solve(hg.operators.matrix(a), b, DENSE)


INNER = {  # entry_point: (the library's, the oracle's)
    "solver(fixed_point)": (implicit.solver(fixed_point=cell, **EXACT)(equilibrium), equilibrium),
    "solver(argmin)": (implicit.solver(argmin=bowl, **EXACT)(minimum), minimum),
    "fixed_point": (lambda h: implicit.fixed_point(cell, equilibrium(h).detach(), h, **EXACT), equilibrium),
    "root": (lambda h: implicit.root(lambda z, h: z - cell(z, h), equilibrium(h).detach(), h, **EXACT), equilibrium),
    "argmin": (lambda h: implicit.argmin(bowl, minimum(h).detach(), h, **EXACT), minimum),
    "linear_solve": (by_linear_solve, lambda h: solved_by_lu(*system(h))),
}


def outer_map(inner, w: Tensor, h: Tensor) -> Tensor:
    return 0.3 * torch.sin(inner(torch.cat([w, h[:2]])) + w) + h[2:]


def outer_loss(inner, w: Tensor, h: Tensor) -> Tensor:
    z = inner(torch.cat([w, h[:2]]))
    return 0.5 * (z - 0.7).square().sum() + w.square().sum() + (w * h[2:]).sum()


def outer_product(inner, v: Tensor, h: Tensor) -> Tensor:
    return 2 * v + 0.3 * inner(h[[0, 1, 0, 1]]).sum() * v.flip(0)


def equation(form: str, inner, w: Tensor, h: Tensor) -> Tensor:
    if form == "argmin":
        return jacrev(partial(outer_loss, inner))(w, h)
    if form == "linear_solve":
        return outer_product(inner, w, h) - h[2:]
    return w - outer_map(inner, w, h)


@cache
def outer_solution(form: str, inner: str) -> Tensor:
    w = torch.zeros(2).double()
    for _ in range(12):
        w = newton(partial(equation, form, INNER[inner][1]), w, LAMBDA, 1)
    return w.detach()


def nested(form: str, inner: str, h: Tensor) -> Tensor:
    """The outer solution by the library; its inner problem contains another implicit function."""
    entry_point = INNER[inner][0]
    if form == "linear_solve":
        op = hg.operators.function(partial(outer_product, entry_point), tensors=(h,))
        return implicit.linear_solve(op, h[2:], DENSE)
    w = outer_solution("argmin" if "argmin" in form else "fixed_point", inner)
    if form == "argmin":
        return implicit.argmin(partial(outer_loss, entry_point), w, h, **EXACT)
    if form == "root":
        return implicit.root(lambda w, h: w - outer_map(entry_point, w, h), w, h, **EXACT)
    if form == "solver(fixed_point)":
        return implicit.solver(fixed_point=partial(outer_map, entry_point), **EXACT)(lambda h: w.clone())(h)
    return implicit.fixed_point(partial(outer_map, entry_point), w, h, **EXACT)


def precompute(form: str, inner: str) -> None:
    """Compute and cache the oracle's solutions now, because it cannot run within transforms and checkpoints."""
    outer_solution(form if form in ("argmin", "linear_solve") else "fixed_point", inner)
    for order in (1, 2):
        truth(form, inner, order)


def nested_oracle(form: str, inner: str, h: Tensor) -> Tensor:
    kind = form if form in ("argmin", "linear_solve") else "fixed_point"
    return newton(partial(equation, kind, INNER[inner][1]), outer_solution(kind, inner), h)


@cache
def truth(form: str, inner: str, order: int) -> Tensor:
    f = lambda h: nested_oracle(form, inner, h).sin().sum()  # noqa: E731
    for _ in range(order):
        f = jacrev(f)
    return f(LAMBDA)


def by_autograd(f, h: Tensor, order: int) -> Tensor:
    leaf = h.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=order == 2)
    if order == 1:
        return first
    return torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in first])


NESTED = {  # name: (transform, order)
    "autograd": (lambda f: lambda h: by_autograd(f, h, 1), 1),
    "grad": (grad, 1),
    "jvp": (lambda f: lambda h: torch.stack([jvp(f, (h,), (e,))[1] for e in torch.eye(4).double()]), 1),
    "vmap(grad)": (lambda f: lambda h: vmap(grad(f))(h.expand(2, -1))[1], 1),
    "grad(vmap)": (lambda f: lambda h: grad(lambda h: vmap(f)(h).sum())(h.expand(2, -1))[1], 1),
    "twice autograd": (lambda f: lambda h: by_autograd(f, h, 2), 2),
    "grad(grad)": (lambda f: lambda h: torch.stack([grad(lambda h, i=i: grad(f)(h)[i])(h) for i in range(4)]), 2),
    "hessian": (hessian, 2),
    "jacrev(jacfwd)": (lambda f: jacrev(jacfwd(f)), 2),
    "jacrev(jacrev)": (lambda f: jacrev(jacrev(f)), 2),
    "vmap(hessian)": (lambda f: lambda h: vmap(hessian(f))(h.expand(2, -1))[1], 2),
}


@pytest.mark.parametrize("transform", NESTED)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("form", ["fixed_point", "root", "argmin", "solver(fixed_point)", "linear_solve"])
def test_implicit_functions_in_one_another(form, inner, transform):
    precompute(form, inner)
    apply, order = NESTED[transform]
    value = apply(lambda h: nested(form, inner, h).sin().sum())(LAMBDA)
    assert rel(value, truth(form, inner, order)) < {1: 1e-10, 2: 1e-8}[order]


@pytest.mark.parametrize("transform", [lambda f: jacrev(jacrev(jacrev(f))), lambda f: jacfwd(jacrev(jacrev(f)))])
def test_third_derivatives_of_nested_functions(transform):
    precompute("fixed_point", "argmin")

    def value(h: Tensor) -> Tensor:
        return nested("fixed_point", "argmin", h).sin().sum()

    assert rel(transform(value)(LAMBDA), truth("fixed_point", "argmin", 3)) < 1e-7


# --- checkpoints around -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("entry_point", INNER)
def test_a_checkpoint_around_an_implicit_function(entry_point, order):
    library, oracle = INNER[entry_point]

    def around(h: Tensor) -> Tensor:
        return checkpoint(lambda h: library(h.sin()).cos(), h, use_reentrant=False).exp().sum()

    expected = jacrev(lambda h: oracle(h.sin()).cos().exp().sum())
    for _ in range(order - 1):
        expected = jacrev(expected)
    assert rel(by_autograd(around, LAMBDA, order), expected(LAMBDA)) < {1: 1e-10, 2: 1e-8}[order]


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="an older torch, which does not let others set a checkpoint's hooks aside, raises its CheckpointError",
)
@pytest.mark.parametrize("entry_point", INNER)
def test_a_checkpoint_around_a_derivative(entry_point):
    """A derivative taken inside the checkpoint is differentiated outside; systems solved inside are not kept."""
    library, oracle = INNER[entry_point]

    def around(h: Tensor) -> Tensor:
        value = library(h.sin()).cos().sum()
        return torch.autograd.grad(value, h, create_graph=True)[0]

    h = LAMBDA.clone().requires_grad_()
    slope = checkpoint(around, h, use_reentrant=False)
    rows = torch.stack([torch.autograd.grad(y, h, retain_graph=True)[0] for y in slope])
    assert rel(rows, jacrev(jacrev(lambda h: oracle(h.sin()).cos().sum()))(LAMBDA)) < 1e-8


@pytest.mark.parametrize("entry_point", INNER)
def test_a_checkpoint_around_nested_functions(entry_point):
    precompute("fixed_point", entry_point)

    def around(h: Tensor) -> Tensor:
        return checkpoint(lambda h: nested("fixed_point", entry_point, h).sin().sum(), h, use_reentrant=False)

    assert rel(by_autograd(around, LAMBDA, 1), truth("fixed_point", entry_point, 1)) < 1e-10


# --- linearize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry_point", ["fixed_point", "linear_solve", "Anderson"])
def test_linearize_is_refused_with_what_to_take(entry_point):
    forward = lambda h: hg.fixed_points.Anderson()(cell, torch.zeros(2, dtype=h.dtype), h).value  # noqa: E731
    function = forward if entry_point == "Anderson" else INNER[entry_point][0]
    with pytest.raises(NotImplementedError, match=r"torch\.func\.jvp .* torch\.func\.jacrev"):
        torch.func.linearize(function, LAMBDA)


# --- what torch.func refuses ------------------------------------------------------------------------------------------


class OldSquare(torch.autograd.Function):
    """A Function without setup_context."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Net(nn.Module):
    def __init__(self, middle: nn.Module):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), middle, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.first(x))))


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def on_cpu(x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return x.sin() * x


def hooked() -> nn.Module:
    module = nn.Softplus()
    module.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return module


MIDDLES = {
    "batch norm": lambda: nn.BatchNorm1d(4, eps=0.1),
    "old function": lambda: Applied(OldSquare.apply),
    "backward hook": hooked,
    "checkpoint": lambda: Applied(lambda x: checkpoint(torch.sin, x, use_reentrant=False)),
    "save on CPU": lambda: Applied(on_cpu),
}


class Refused:
    """A loss of a model that torch.func refuses, its solution, and finite differences of the solution."""

    def __init__(self, middle: str):
        torch.manual_seed(1)
        self.net = Net(MIDDLES[middle]()).double()
        self.x, self.y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
        self.shapes = {name: p.shape for name, p in self.net.named_parameters()}
        self.h = torch.full((len(self.shapes),), -3.0).double()
        start = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        for _ in range(400):
            start = (start - 0.3 * self.slope(start, self.h)).detach()
        self.w = self.minimise(self.h, start)
        assert self.w.norm() > 0.1
        self.direction = torch.randn(len(self.h), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(self, w: Tensor, h: Tensor) -> Tensor:
        flat = w.split([shape.numel() for shape in self.shapes.values()])
        parts = {name: part.reshape(shape) for part, (name, shape) in zip(flat, self.shapes.items(), strict=True)}
        out = torch.func.functional_call(self.net, parts, (self.x,))
        return (out - self.y).square().mean() + (
            h.exp() * torch.stack([p.square().sum() for p in parts.values()])
        ).sum()

    def slope(self, w: Tensor, h: Tensor) -> Tensor:
        tracked = w if w.requires_grad else w.detach().requires_grad_()
        return torch.autograd.grad(self.loss(tracked, h), tracked, create_graph=True)[0]

    def minimise(self, h: Tensor, w: Tensor) -> Tensor:
        """Newton's method on dense derivatives."""
        for step in range(14):
            tracked = w.clone().requires_grad_()
            g = self.slope(tracked, h)
            if g.norm() < 1e-14:
                break
            rows = [torch.autograd.grad(one, tracked, retain_graph=True)[0] for one in g]
            curvature = torch.stack(rows) + (0.0 if step > 3 else 0.1) * torch.eye(len(w)).double()
            w = (w - torch.linalg.solve(curvature, g.detach())).detach()
        assert self.slope(w.requires_grad_(), h).norm() < 1e-12
        return w.detach()

    @cache  # noqa: B019
    def differences(self, order: int) -> Tensor:
        """The derivative of Σ sin(w(λ)) along `direction`, by extrapolated finite differences."""

        def along(t: float) -> Tensor:
            return self.minimise(self.h + t * self.direction, self.w).sin().sum()

        if order == 1:
            coarse, fine = ((along(t) - along(-t)) / (2 * t) for t in (2e-3, 1e-3))
        else:
            middle = along(0.0)
            coarse, fine = ((along(t) - 2 * middle + along(-t)) / t**2 for t in (1e-2, 5e-3))
        return (4 * fine - coarse) / 3


@cache
def third_derivative_of_batch_norm() -> bool:
    """Whether this version of torch has a third derivative of batch norm."""
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    y = nn.BatchNorm1d(1).double()(x)[0, 0]
    try:
        for _ in range(3):
            y = torch.autograd.grad(y, x, create_graph=True)[0][0, 0]
    except RuntimeError:
        return False
    return True


@cache
def refused(middle: str) -> Refused:
    return Refused(middle)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("entry_point", ["argmin", "root", "solver"])
@pytest.mark.parametrize("middle", MIDDLES)
def test_an_inner_loss_that_torch_func_refuses(middle, entry_point, order):
    """Against differences of the solution found by Newton's method on dense derivatives."""
    case = refused(middle)
    loss, slope, w = case.loss, case.slope, case.w

    def value(h: Tensor) -> Tensor:
        if entry_point == "argmin":
            return implicit.argmin(loss, w, h, **EXACT).sin().sum()
        if entry_point == "root":
            return implicit.root(slope, w, h, symmetric=True, **EXACT).sin().sum()
        return implicit.solver(argmin=loss, **EXACT)(lambda h: w.clone())(h).sin().sum()

    if middle == "batch norm" and order == 2 and not third_derivative_of_batch_norm():
        with pytest.raises(RuntimeError, match="3rd"):
            by_autograd(value, case.h, order)
        return
    got = by_autograd(value, case.h, order)
    got = got @ case.direction if order == 1 else case.direction @ got @ case.direction
    expected = case.differences(order)
    assert abs(got - expected) < {1: 1e-7, 2: 1e-5}[order] * abs(expected)


def test_a_derivative_updates_buffers_as_implicit_grad_does():
    """A derivative updates the statistics of BatchNorm in training mode exactly as implicit.grad does."""
    norm = nn.BatchNorm1d(2, eps=0.1, affine=False).double()
    x = torch.randn(6, 2).double()
    h = torch.zeros(()).double().requires_grad_()
    loss = lambda w, h: (norm(x * w).sin() - h).square().mean() + (w * w).sum()  # noqa: E731
    w = implicit.argmin(loss, torch.zeros(2).double(), h, **EXACT)
    (g,) = torch.autograd.grad(w.sum(), h)
    assert torch.isfinite(g) and norm.num_batches_tracked == 1


# --- containers -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Unregistered:
    w: Tensor


def tangled(w, h: Tensor):
    return {"b": 0.5 * w["b"] + w["a"] * h / 4 + 1, "a": 0.25 * w["a"] - 2 * h}


ORDERS = [lambda w: w, OrderedDict, lambda w: OrderedDict(reversed(w.items()))]


@pytest.mark.parametrize("given", ORDERS)
@pytest.mark.parametrize("returned", ORDERS)
@pytest.mark.parametrize("entry_point", ["fixed_point", "root", "solver", "linear_solve"])
def test_mappings_are_matched_by_key(entry_point, returned, given):
    h = double(3.0).requires_grad_()
    tree = given({"b": double([-3.0]), "a": double([-8.0])})  # a = −8h/3, b = 2 + ah/2 = 2 − 4h²/3
    tree["b"] = double([2 - 4 * 9 / 3])
    if entry_point == "linear_solve":  # (I − J) x = b for the same map, linear in w at fixed h
        op = hg.operators.function(
            lambda v, h: returned({"b": 0.5 * v["b"] - v["a"] * h / 4, "a": 0.75 * v["a"]}), tensors=(h,)
        )
        w = implicit.linear_solve(op, given({"b": h.new_ones(1), "a": -2 * h.reshape(1)}), DENSE)
    elif entry_point == "root":
        residual = lambda w, h: returned({key: w[key] - new for key, new in tangled(w, h).items()})  # noqa: E731
        w = implicit.root(residual, tree, h, **EXACT)
    elif entry_point == "solver":
        w = implicit.solver(fixed_point=lambda w, h: returned(tangled(w, h)), **EXACT)(lambda h: tree)(h)
    else:
        w = implicit.fixed_point(lambda w, h: returned(tangled(w, h)), tree, h, **EXACT)
    assert abs(w["a"].item() + 8) < 1e-12 and abs(w["b"].item() + 10) < 1e-12
    (da,) = torch.autograd.grad(w["a"], h, retain_graph=True)
    (db,) = torch.autograd.grad(w["b"], h)
    assert abs(da + 8 / 3) < 1e-10 and abs(db + 8) < 1e-10


def test_a_solution_and_a_value_of_different_keys_are_refused():
    h = LAMBDA[0].clone().requires_grad_()
    w = implicit.fixed_point(lambda w, h: {"a": w["a"] * h, "c": h}, {"a": double(1.0), "b": double(1.0)}, h)
    with pytest.raises(ValueError, match=r"structure of solution: 2 leaves instead of 2.*\['b'\], \['c'\]"):
        w["a"].backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda h: implicit.root(lambda w, h: w, Unregistered(h), h),
        lambda h: implicit.root(lambda w, h: w - h.w, h, Unregistered(h)),
        lambda h: implicit.root(lambda w, h: Unregistered(w - h), h, h).backward(),
        lambda h: implicit.argmin(lambda w, h: (w - h[0].w) ** 2, h, (Unregistered(h),)),
        lambda h: implicit.solver(residual=lambda w, h: w - h)(lambda h: Unregistered(h))(h),
        lambda h: implicit.solver(residual=lambda w, h: w - h.w)(lambda h: h.w)(Unregistered(h)),
        lambda h: implicit.linear_solve(hg.operators.function(lambda v, t: v * t.w, tensors=(Unregistered(h),)), h),
    ],
)
def test_an_unregistered_dataclass_is_named(call):
    with pytest.raises(TypeError, match=r"Unregistered.* register this dataclass as a pytree"):
        call(double(1.0).requires_grad_())


# --- maps that take a derivative themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [name for name in NESTED if "(vmap)" not in name])
@pytest.mark.parametrize("entry_point", ["fixed_point", "root", "argmin"])
def test_a_map_that_calls_autograd_grad(entry_point, transform):
    """A gradient step on the bowl, its gradient, and a loss with a gradient penalty."""

    def slope(z: Tensor, h: Tensor) -> Tensor:
        return torch.autograd.grad(bowl(z, h), z, create_graph=True)[0]

    def penalised(z: Tensor, h: Tensor) -> Tensor:
        return bowl(z, h) + 0.5 * slope(z, h).square().sum()  # the same minimum

    def value(h: Tensor) -> Tensor:
        z = minimum(LAMBDA)
        if entry_point == "fixed_point":
            z = implicit.fixed_point(lambda z, h: z - 0.4 * slope(z, h), z, h, **EXACT)
        elif entry_point == "root":
            z = implicit.root(slope, z, h, **EXACT)
        else:
            z = implicit.argmin(penalised, z, h, **EXACT)
        return z.sin().sum()

    apply, order = NESTED[transform]
    expected = lambda h: minimum(h).sin().sum()  # noqa: E731
    for _ in range(order):
        expected = jacrev(expected)
    assert rel(apply(value)(LAMBDA), expected(LAMBDA)) < {1: 1e-10, 2: 1e-8}[order]


# --- empty ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, DENSE, hg.solvers.CG(), hg.solvers.MINRES(), hg.solvers.FixedPoint()])
@pytest.mark.parametrize(("shape", "batch_dims"), [((0,), 0), ((0, 3), 1), ((2, 0), 1), ((0, 3), 0)])
def test_empty_unknowns(shape, batch_dims, solver):
    h = double(2.0).requires_grad_()
    options = {"solver": solver, "batch_dims": batch_dims, "symmetric": True}
    w = implicit.root(lambda w, h: w * h, torch.zeros(shape).double(), h, **options)
    assert w.shape == shape
    (g,) = torch.autograd.grad(w.sum(), h)
    assert g == 0
