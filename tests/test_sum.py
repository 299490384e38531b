"""operators.Sum: sums over batches beside one graph of all rows, behind every door."""

import functools

import pytest
import torch
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
    """(inner, outer) as sums, and (inner, outer) in one graph."""
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
    whole = (lambda w, lam: row_loss(w, lam, x, y).mean() + penalty(w, lam), lambda w, lam: row_loss(w, lam, xv, yv).mean())
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


def test_doors(data):
    inner, outer, whole_inner, whole_outer = losses(data)
    w, lam = point()
    tight = hg.solvers.CG(rtol=1e-13)

    def argmin(g, f):
        def value(lam):
            return f(hg.implicit.argmin(g, w, lam, solver=tight), lam)

        (first,) = torch.autograd.grad(value(lam), lam, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), lam)[0]

    for mine, theirs in zip(argmin(inner, outer), argmin(whole_inner, whole_outer), strict=True):
        close(mine, theirs, 1e-10)
