"""operators.Sum: sums over batches agree with one graph of all rows, in every public function."""

import functools
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg

ROWS, D = 23, 4  # the last batch is smaller
F64 = torch.float64


def rows():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=F64, generator=random) for shape in ((ROWS, D), (ROWS,), (11, D), (11,))]


@pytest.fixture
def data():
    return rows()


@functools.cache
def solution():
    """w*(λ) at λ = −1."""
    x, y = rows()[:2]
    w = {"w": torch.zeros(D, dtype=F64, requires_grad=True), "b": torch.zeros((), dtype=F64, requires_grad=True)}
    lam = torch.full((D,), -1.0, dtype=F64)
    optimizer = torch.optim.LBFGS(w.values(), max_iter=200, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = row_loss(w, lam, x, y).mean() + penalty(w, lam)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: x.detach() for name, x in w.items()}


def point():
    return solution(), torch.full((D,), -1.0, dtype=F64, requires_grad=True)


def row_loss(w, lam, x, y):
    return torch.nn.functional.softplus(-y * (x @ w["w"] + w["b"])) + 0.1 * (x @ w["w"]).square()


def penalty(w, lam):
    return (lam.exp() * w["w"] ** 2).sum() / 2 + w["b"] ** 2 / 2


def losses(data, form="list", **options):
    """(inner, outer) as sums over batches, and (inner, outer) in one graph."""
    x, y, xv, yv = data

    def batch_loss(w, lam, batch):
        return row_loss(w, lam, *batch).mean()

    def source(x, y):
        parts = list(zip(x.split(5), y.split(5), strict=True))
        if form == "loader":
            return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
        return (lambda: iter(parts)) if form == "function" else parts

    def rows(batch):
        return len(batch[1])

    inner = hg.operators.Sum(batch_loss, source(x, y), weights=rows, mean=True, penalty=penalty, **options)
    outer = hg.operators.Sum(batch_loss, source(xv, yv), weights=rows, mean=True)
    whole = (
        lambda w, lam: row_loss(w, lam, x, y).mean() + penalty(w, lam),
        lambda w, lam: row_loss(w, lam, xv, yv).mean(),
    )
    return inner, outer, *whole


def close(a, b, rtol=1e-12):
    for x, y in zip(hg._tree.flatten(a, "a")[0], hg._tree.flatten(b, "b")[0], strict=True):
        assert (x - y).norm() <= rtol * y.norm(), (x, y)


@pytest.mark.parametrize("form", ["list", "loader", "function"])
@pytest.mark.parametrize("keep", [None, 1500, "1GiB"])
@pytest.mark.parametrize(
    "solver",
    [hg.solvers.CG(max_steps=5), hg.solvers.MINRES(rtol=1e-10), hg.solvers.GMRES(rtol=1e-10), hg.solvers.Dense(), None],
    ids=str,
)
def test_the_hypergradient_is_that_of_one_graph(data, form, keep, solver):
    inner, outer, whole_inner, whole_outer = losses(data, form, keep=keep)
    w, lam = point()
    results = [
        hg.implicit.grad(f, inner_loss=g, params=w, hparams=lam, solver=solver)
        for f, g in ((outer, inner), (whole_outer, whole_inner))
    ]
    close(results[0].grads, results[1].grads)
    close(results[0].adjoint, results[1].adjoint)


def test_the_minimiser_as_a_value_has_the_derivatives_of_one_graph_to_second_order(data):
    inner, outer, whole_inner, whole_outer = losses(data)
    w, lam = point()

    def derivatives(g, f):
        value = f(hg.implicit.argmin(g, w, lam, solver=hg.solvers.CG(rtol=1e-13)), lam)
        (first,) = torch.autograd.grad(value, lam, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), lam)[0]

    for mine, theirs in zip(derivatives(inner, outer), derivatives(whole_inner, whole_outer), strict=True):
        close(mine, theirs)


def test_polish_check_and_jacobian_take_sums(data):
    inner, outer, whole_inner, whole_outer = losses(data)
    w, lam = point()
    away = {name: x * 1.001 for name, x in w.items()}
    mine, theirs = (
        hg.implicit.grad(f, inner_loss=g, params=away, hparams=lam, solver=hg.solvers.CG(rtol=1e-12))
        for f, g in ((outer, inner), (whole_outer, whole_inner))
    )
    close(hg.implicit.polish(mine).grads, hg.implicit.polish(theirs).grads)
    errors = [hg.diagnostics.check(result).estimate.relative_error for result in (mine, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    both = [
        hg.implicit.jacobian(
            lambda w, lam, f=f: torch.stack([f(w, lam), 2 * f(w, lam)]), inner_loss=g, params=w, hparams=lam
        ).grads
        for f, g in ((outer, inner), (whole_outer, whole_inner))
    ]
    close(*both)


@pytest.mark.parametrize("memory", ["graph", "iterates", "sqrt"])
def test_unrolled_steps_take_sums(data, memory):
    inner, outer, whole_inner, whole_outer = losses(data)
    w, lam = point()
    start = {name: torch.zeros_like(x) for name, x in w.items()}

    def step_of(g):
        def step(w, lam):
            slopes = torch.autograd.grad(g(w, lam), list(w.values()), create_graph=True)
            return {name: x - 0.1 * d for (name, x), d in zip(w.items(), slopes, strict=True)}

        return step

    truth = hg.unroll.reverse(step_of(whole_inner), start, lam, whole_outer, steps=4).grads
    close(hg.unroll.reverse(step_of(inner), start, lam, outer, steps=4, memory=memory).grads, truth)
    close(hg.unroll.forward(step_of(inner), start, lam, outer, steps=4).grads, truth)


def test_evaluated_losses_and_trackers_take_sums(data):
    inner, outer, whole_inner, whole_outer = losses(data)
    w, lam = point()
    grads = []
    for f, g in ((outer, inner), (whole_outer, whole_inner)):
        live = {name: (1.001 * x).requires_grad_() for name, x in w.items()}
        result = hg.implicit.grad(f(live, lam), inner_loss=g(live, lam), params=live, hparams=lam)
        tracker = hg.bilevel.SOBA(live, lam)
        tracker.variables[0].fill_(0.3)
        tracker.backward(f(live, lam), g(live, lam))
        grads.append([result.grads, *(x.grad for x in live.values()), lam.grad, tracker.variables[0].grad])
        lam.grad = None
    close(grads[0], grads[1])


@pytest.mark.parametrize("solver", [hg.solvers.CG(rtol=1e-13), hg.solvers.Dense()], ids=str)
def test_gauss_newton_over_batches(data, solver):
    x, y, xv, yv = data

    def model(w, lam, x):
        return torch.tanh(x @ w["w"]) + w["b"]

    batches = list(zip(x.split(5), y.split(5), strict=True))
    loss = hg.operators.GaussNewton(
        lambda w, lam, batch: model(w, lam, batch[0]), lambda z, lam, batch: ((z - batch[1]) ** 2).mean()
    )
    inner = hg.operators.Sum(loss, batches, weights=lambda batch: len(batch[1]), mean=True, penalty=penalty)
    whole = hg.operators.GaussNewton(lambda w, lam: model(w, lam, x), lambda z, lam: ((z - y) ** 2).mean(), penalty)
    w, lam = point()
    away = [pytest.warns(hg.UnsolvedInnerProblem) for _ in range(2)]
    results = []
    for g, warned in zip((inner, whole), away, strict=True):
        with warned:
            results.append(
                hg.implicit.grad(
                    lambda w, lam: ((model(w, lam, xv) - yv) ** 2).mean(),
                    inner_loss=g,
                    params=w,
                    hparams=lam,
                    solver=solver,
                )
            )
    close(results[0].grads, results[1].grads)


@pytest.mark.parametrize("own", ["loader", "sampler", None])
@pytest.mark.parametrize("keep", [None, 4000, "1GiB"])
def test_shuffling_dropout_and_augmentation_are_replayed(data, own, keep):
    """Rows get noise when they are fetched, and the loss has dropout; every pass uses the same draws."""
    x, y = data[:2]

    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return ROWS

        def __getitem__(self, i):
            return x[i] + 0.1 * torch.randn(D, dtype=F64), y[i]

    drawn = []

    def loss(w, lam, batch):
        features = torch.nn.functional.dropout(batch[0], 0.3)
        drawn.append(features.detach())
        return (lam.exp() * row_loss(w, lam, features, batch[1])[:, None]).mean() + penalty(w, lam) / 5

    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    if own == "sampler":
        sampler = torch.utils.data.RandomSampler(range(ROWS), generator=generator)
        loader = DataLoader(Noisy(), batch_size=5, sampler=sampler)
    else:
        loader = DataLoader(Noisy(), batch_size=5, shuffle=True, generator=generator if own else None)
    w, lam = point()
    live = [x.clone().requires_grad_() for x in w.values()]
    total = hg.operators.Sum(loss, loader, keep=keep)(dict(zip(w, live, strict=True)), lam)
    before = torch.get_rng_state()
    gradient = torch.autograd.grad(total, live, create_graph=True)
    v = [torch.ones_like(x) for x in live]
    products = [torch.autograd.grad(gradient, [*live, lam], v, retain_graph=True) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)  # passes that follow the first one draw nothing
    first = drawn[:5]
    for k in range(5, len(drawn)):
        assert any(torch.equal(drawn[k], features) for features in first)
    close(products[0], products[1], 1e-15)


class Node:
    """An object that lives as long as the graph that holds it."""


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alive):
        ctx.node = Node()
        alive.add(ctx.node)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_the_graph_of_one_batch_at_a_time(data):
    """At most two graphs of batches are alive at once; with keep= as many as fit."""

    def most(count, keep):
        alive, largest = weakref.WeakSet(), 0

        def loss(w, lam, batch):
            nonlocal largest
            hidden = torch.tanh(Marked.apply(batch @ w, alive))
            largest = max(largest, len(alive))
            return hidden.square().mean() + (lam * w).square().sum()

        batches = [torch.randn(50, D, dtype=F64, generator=torch.Generator().manual_seed(k)) for k in range(count)]
        w = torch.ones(D, dtype=F64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hg.implicit.grad(
                lambda w, lam: w.sum(),
                inner_loss=hg.operators.Sum(loss, batches, keep=keep),
                params=w,
                hparams=torch.ones(D, dtype=F64, requires_grad=True),
                solver=hg.solvers.CG(max_steps=3),
            )
        return largest

    assert most(4, None) == most(30, None) <= 2
    assert most(30, "1GiB") >= 30
    few = most(30, "8KiB")
    assert 2 <= few < 25 and few == most(60, "8KiB")


def test_hyperparameters_by_index_of_the_example(data):
    x, y = data[:2]
    index = torch.arange(ROWS)
    batches = list(zip(index.split(5), x.split(5), y.split(5), strict=True))

    def loss(w, lam, batch):
        index, x, y = batch
        return (lam[index].sigmoid() * (x @ w - y) ** 2).sum()

    lam, w = torch.zeros(ROWS, dtype=F64, requires_grad=True), torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    results = [
        hg.implicit.grad(
            lambda w, lam: w.square().sum(), inner_loss=g, params=w, hparams=lam, solver=hg.solvers.Dense()
        )
        for g in (hg.operators.Sum(loss, batches), lambda w, lam: loss(w, lam, (index, x, y)))
    ]
    close(results[0].grads, results[1].grads)


def test_what_cannot_be_summed_is_an_error():
    def loss(w, lam, batch):
        return (w * batch).sum() + lam.sum()

    w, lam = torch.ones(2), torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="iterable more than once"):
        hg.operators.Sum(loss, iter([1.0]))
    with pytest.raises(TypeError, match="loss must be a function"):
        hg.operators.Sum(torch.ones(()), [1.0])
    with pytest.raises(ValueError, match="0 batches"):
        hg.operators.Sum(loss, [])(w, lam)
    with pytest.raises(ValueError, match=r"keep must be bytes"):
        hg.operators.Sum(loss, [1.0], keep="much")
    with pytest.raises(ValueError, match="requires grad and is in neither"):
        other = torch.ones(2, requires_grad=True)
        hg.operators.Sum(lambda w, lam, batch: (w * other).sum(), [1.0])(w, lam)
    with pytest.raises(ValueError, match="must give a scalar"):
        hg.operators.Sum(lambda w, lam, batch: w * batch, [1.0])(w, lam)
    once = iter([1.0, 2.0, 3.0])
    live = w.requires_grad_()
    with pytest.raises(ValueError, match="0 batches in one pass and 3 in the first"):
        torch.autograd.grad(hg.operators.Sum(loss, lambda: once)(live, lam), live)
    random = np.random.RandomState(0)
    with pytest.raises(ValueError, match="of NumPy"):
        noisy = hg.operators.Sum(lambda w, lam, batch: (w * batch * random.rand()).sum(), [1.0, 2.0])
        torch.autograd.grad(noisy(live, lam), live)
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"{count} weights"):
            hg.operators.Sum(loss, [1.0, 2.0], weights=[1.0] * count)(live, lam)
    with pytest.raises(ValueError, match="weights sum to 0"):
        hg.operators.Sum(loss, [1.0, 2.0], weights=[1.0, -1.0], mean=True)(live, lam)
    with pytest.raises(TypeError, match="keep"):
        parts = (lambda w, lam, batch: w * batch), (lambda z, lam, batch: z.square().sum())
        hg.operators.Sum(hg.operators.GaussNewton(*parts), [1.0], keep="1MiB")
    with pytest.raises(TypeError, match="nor a Sum"):
        hg.implicit.grad(
            lambda w, lam: w.sum(), inner_loss=hg.operators.Sum(loss, [1.0]), params=w, hparams=lam, compile=True
        )


def test_complex_hyperparameters():
    batches = [torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([3.0], dtype=F64)]

    def loss(w, lam, batch):
        return ((w - batch).square().sum() * (1 + (lam * 1j).real) + lam.abs().square() * w.square()) / 3

    w = torch.tensor(0.4, dtype=F64)
    grads = []
    for inner in (hg.operators.Sum(loss, batches), lambda w, lam: sum(loss(w, lam, batch) for batch in batches)):
        lam = torch.tensor(0.3 + 0.2j, dtype=torch.complex128, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hg.UnsolvedInnerProblem)
            grads.append(hg.implicit.grad(lambda w, lam: w**2, inner_loss=inner, params=w, hparams=lam).grads)
    assert grads[1].abs() > 0.1 and (grads[0] - grads[1]).abs() < 1e-12


def test_a_bar_on_request(capsys):
    loss = hg.operators.Sum(lambda w, lam, batch: (w * batch).sum(), [1.0, 2.0], progress=True)
    assert loss(torch.ones(2), None) == 6
    assert "batches" in capsys.readouterr().err


def test_a_penalty_that_uses_the_live_params_is_an_error():
    w, lam = torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    loss = hg.operators.Sum(lambda w, lam, b: ((w - lam) ** 2).sum(), [0], penalty=lambda _, lam: (w**2).sum())
    with pytest.raises(ValueError, match="the penalty uses a tensor of shape"):
        hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=loss, params=w, hparams=lam)


@pytest.mark.parametrize("keep", [0, "1GiB"])
@pytest.mark.parametrize("layer", [lambda: torch.nn.BatchNorm1d(3), lambda: spectral_norm(torch.nn.Linear(3, 3))])
def test_buffers_that_the_loss_writes_are_replayed_and_end_as_after_one_pass(keep, layer):
    """The products evaluate each batch again, and diagnostics.check the whole problem; neither is a further pass."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), layer(), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    w = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, lam = torch.randn(9, 2, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def loss(w, lam, rows):
        return functional_call(net, w, (x[rows],)).square().mean() + lam.exp() * sum(
            p.square().sum() for p in w.values()
        )

    def outer(w, lam):
        return sum(p.sum() for p in w.values())

    before, rows = [b.clone() for b in net.buffers()], [slice(0, 3), slice(3, 6), slice(6, 9)]
    for each in rows:
        loss(w, lam, each)
    once = [b.clone() for b in net.buffers()]
    for buffer, values in zip(net.buffers(), before, strict=True):
        buffer.data.copy_(values)
    inner = hg.operators.Sum(loss, rows, keep=keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.HypergradientWarning)
        options = {"params": w, "hparams": lam, "solver": hg.solvers.CG(max_steps=6)}
        result = hg.implicit.grad(outer, inner_loss=inner, **options)
        close_to_once = [torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(net.buffers(), once, strict=True)]
        hg.diagnostics.check(result, max_products=30)
    assert all(close_to_once)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(net.buffers(), once, strict=True))
