"""Hyperparameters of every kind against an oracle of each; compiled models."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax

import hypergrad as hg
from bilevel_programs import BATCH, CLASSES, FEATURES, WIDTH, Program, make

B = hg.bilevel
ROWS = 24


class Kind:
    """A training problem with hyperparameters of one kind; `losses(w, h)` are pure functions of flat lists."""

    def __init__(self):
        self.program = Program()
        self.x, self.y = self.program.x.reshape(-1, FEATURES), self.program.y.reshape(-1)
        self.v, self.u = self.program.v[0], self.program.u[0]
        random = torch.Generator().manual_seed(1)
        self.noise = torch.randn(BATCH, FEATURES, dtype=torch.float64, generator=random)
        self.index = torch.tensor([3, 7, 8, 11, 20, 3])  # a row twice
        self.random = random

    def new(self, *shape):
        return (0.3 * torch.randn(*shape, dtype=torch.float64, generator=self.random)).requires_grad_()

    def penalty(self):
        return 0.05 * sum((w**2).sum() for w in self.program.model.parameters())

    def outer(self):
        return cross_entropy(self.program.model(self.v), self.u)


class LayerDecay(Kind):
    def hparams(self):
        return [self.new(4)]

    def inner(self, h):
        loss = cross_entropy(self.program.model(self.x[self.index]), self.y[self.index])
        return loss + sum(e.exp() * (w**2).sum() for e, w in zip(h[0], self.program.model.parameters(), strict=True))


class Mixture(Kind):
    """Weights of two losses and of two sources of data."""

    def hparams(self):
        return [self.new(2), self.new(2)]

    def inner(self, h):
        logits = self.program.model(self.x)
        losses = cross_entropy(logits, self.y, reduction="none")
        sources = h[0].softmax(0)
        mixed = sources[0] * losses[:12].mean() + sources[1] * losses[12:].mean()
        return h[1][0].exp() * mixed + h[1][1].exp() * logits.square().mean() + self.penalty()


class Weights(Kind):
    def hparams(self):
        return [self.new(ROWS)]

    def inner(self, h):
        losses = cross_entropy(self.program.model(self.x[self.index]), self.y[self.index], reduction="none")
        return (h[0][self.index].sigmoid() * losses).mean() + self.penalty()


class Augmentation(Kind):
    """The strength of noise added to each feature."""

    def hparams(self):
        return [self.new(FEATURES)]

    def inner(self, h):
        x = self.x[self.index] + h[0].exp() * self.noise
        return cross_entropy(self.program.model(x), self.y[self.index]) + self.penalty()


class MetaNetwork(Kind):
    """Weights of examples by a network."""

    def hparams(self):
        return [self.new(5, FEATURES), self.new(5), self.new(1, 5)]

    def inner(self, h):
        losses = cross_entropy(self.program.model(self.x[self.index]), self.y[self.index], reduction="none")
        weight = (torch.tanh(self.x[self.index] @ h[0].mT + h[1]) @ h[2].mT).sigmoid()
        return (weight[:, 0] * losses).mean() + self.penalty()


class SoftLabels(Kind):
    def hparams(self):
        return [self.new(ROWS, CLASSES)]

    def inner(self, h):
        targets = h[0][self.index].softmax(-1)
        loss = -(targets * log_softmax(self.program.model(self.x[self.index]), -1)).sum(-1).mean()
        return loss + self.penalty()


class Prompt(Kind):
    """A vector that is learned, added to the first layer's output; the outer loss depends on it too."""

    def hparams(self):
        return [self.new(WIDTH)]

    def prefixed(self, x, h):
        first, *rest = self.program.model
        return nn.Sequential(*rest)(first(x) + h[0])

    def inner(self, h):
        return cross_entropy(self.prefixed(self.x[self.index], h), self.y[self.index]) + self.penalty()

    def outer(self):
        return cross_entropy(self.prefixed(self.v, self.h), self.u)


def solve(params, loss):
    """Minimise the inner loss by L-BFGS, then by Newton steps."""
    optimizer = torch.optim.LBFGS(params, max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward(inputs=params)
        return value

    optimizer.step(closure)
    optimizer.zero_grad()
    for _ in range(4):
        slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), params, create_graph=True)])
        hessian = torch.stack(
            [torch.cat([g.reshape(-1) for g in torch.autograd.grad(s, params, retain_graph=True)]) for s in slope]
        )
        step = torch.linalg.solve(hessian, slope.detach())
        for x, change in zip(params, torch.split(step, [x.numel() for x in params]), strict=True):
            x.data.sub_(change.reshape(x.shape))


@pytest.mark.parametrize("kind", [LayerDecay, Mixture, Weights, Augmentation, MetaNetwork, SoftLabels, Prompt])
def test_the_cross_product_is_that_of_differences(kind):
    """D_λ = ∂/∂λ [⟨∇₁g(w, λ), v⟩ + f(w, λ)], by differences of ⟨∇₁g, v⟩ in λ."""
    problem = kind()
    h = problem.h = problem.hparams()
    params = list(problem.program.model.parameters())
    tracker = B.SOBA(params, h)
    v = [torch.randn(x.shape, dtype=torch.float64, generator=problem.random) for x in params]
    for x, y in zip(tracker.v.leaves, v, strict=True):
        x.copy_(y)
    tracker.backward(problem.outer(), problem.inner(h))

    def value():
        slopes = torch.autograd.grad(problem.inner(h), params)
        return (sum((g * e).sum() for g, e in zip(slopes, v, strict=True)) + problem.outer()).item()

    small = 1e-6
    for x in h:
        truth = torch.zeros_like(x)
        flat, out = x.data.reshape(-1), truth.data.reshape(-1)
        for i in range(flat.numel()):
            start = flat[i].item()
            ends = []
            for sign in (1, -1):
                flat[i] = start + sign * small
                ends.append(value())
            flat[i] = start
            out[i] = (ends[0] - ends[1]) / (2 * small)
        torch.testing.assert_close(x.grad, truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [LayerDecay, Mixture, Weights, Augmentation, MetaNetwork, SoftLabels, Prompt])
@pytest.mark.parametrize("name", ["AmIGO", "F2SA"])
def test_trackers_find_the_hypergradient_of_every_kind(name, kind):
    """At solved params, with the adjoint solved, or the copies solved for a small σ, they agree with implicit.grad."""
    problem = kind()
    h = problem.h = problem.hparams()
    params = list(problem.program.model.parameters())

    solve(params, lambda: problem.inner(h))
    truth = hg.implicit.grad(
        problem.outer(), inner_loss=problem.inner(h), params=params, hparams=h, solver=hg.solvers.Dense()
    ).grads
    if name == "AmIGO":
        tracker = B.AmIGO(params, h, solver=hg.solvers.Dense())
    else:
        tracker = B.F2SA(params, h, order=4, penalty=3000.0)
        solved = [x.detach().clone() for x in params]
        for k, copy in tracker.copies.items():
            solve(params, lambda k=k: problem.inner(h) + k / 3000.0 * problem.outer())
            for x, y, z in zip(copy, params, solved, strict=True):
                x.copy_(y.detach())
                y.data.copy_(z)
    tracker.backward(problem.outer, partial(problem.inner, h))
    size = math.sqrt(sum((g**2).sum().item() for g in truth))
    for x, g in zip(h, truth, strict=True):
        assert (x.grad - g).norm() < (1e-9 if name == "AmIGO" else 1e-6) * size


# Sparse tables


def tables(sparse, values):
    table = nn.Embedding(ROWS, 1, sparse=sparse).double()
    table.weight.data.copy_(values)
    return table


def weighted(problem, table, index):
    losses = cross_entropy(problem.program.model(problem.x[index]), problem.y[index], reduction="none")
    return (table(index)[:, 0].sigmoid() * losses).mean() + problem.penalty()


@pytest.mark.parametrize("name", ["SOBA", "AmIGO", "F2SA", "BOME", "SAMA"])
def test_sparse_weights_are_dense_ones(name):
    """By steps of SGD a sparse table takes the path of a dense one, and rows that no batch uses do not change."""
    results = []
    for sparse in (False, True):
        problem = Kind()
        table = tables(sparse, torch.linspace(-1, 1, ROWS, dtype=torch.float64)[:, None])
        params = list(problem.program.model.parameters())
        tracker = make(name, problem.program, params, table.parameters())
        optimizer = torch.optim.SGD([*params, *table.parameters()], lr=0.1)
        for step in range(5):
            index = torch.tensor([step, step + 1, 7, step, 11, 12])
            tracker.backward(problem.outer, partial(weighted, problem, table, index))
            assert table.weight.grad.is_sparse is sparse
            for each in (optimizer, tracker):
                each.step()
            optimizer.zero_grad()
        results.append(torch.cat([x.detach().reshape(-1) for x in (*params, table.weight)]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-13)
    untouched = results[1][-ROWS:][13:]
    assert torch.equal(untouched, torch.linspace(-1, 1, ROWS, dtype=torch.float64)[13:])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_average_changes_only_the_rows_of_the_batch(accumulate):
    """h_r ← (1 − β) h_r + β D_r for the rows r of the batch alone, as computed row by row in NumPy."""
    problem, rate = Kind(), 0.3
    table = tables(True, torch.linspace(-1, 1, ROWS, dtype=torch.float64)[:, None])
    params = list(problem.program.model.parameters())
    plain = B.SOBA(params, table.parameters(), lr=0.1)
    averaged = B.SOBA(params, table.parameters(), lr=0.1, average=rate)
    optimizer, mean = torch.optim.SparseAdam(table.parameters(), lr=0.05), np.zeros(ROWS)
    for step in range(6):
        seen, total = set(), np.zeros(ROWS)
        for part in range(accumulate):
            index = torch.tensor([step, step + 1 + 5 * part, 7, step, 11, 12])
            kept, table.weight.grad = table.weight.grad, None
            for x in params:
                x.grad = None
            plain.backward(problem.outer(), weighted(problem, table, index))
            total += table.weight.grad.to_dense().numpy()[:, 0]
            table.weight.grad = kept
            for x in params:
                x.grad = None
            averaged.backward(problem.outer(), weighted(problem, table, index))
            seen |= set(index.tolist())
        rows = sorted(seen)
        mean[rows] = (1 - rate) * mean[rows] + rate * total[rows]
        found = table.weight.grad.coalesce()
        assert found.is_sparse and found.indices()[0].tolist() == rows
        np.testing.assert_allclose(found.values().numpy()[:, 0], mean[rows], rtol=1e-10)
        before = table.weight.detach().clone()
        for each in (optimizer, plain, averaged):
            each.step()
        optimizer.zero_grad()
        moved = (table.weight != before)[:, 0].nonzero()[:, 0].tolist()
        assert moved == (rows if step else [])  # v = 0 at first


# Compiled models


def compiled(program, backend):
    torch._dynamo.reset()
    return torch.compile(program.model, backend=backend)


def dynamo_works():
    try:
        return torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
    except Exception:
        return False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["SOBA", "AmIGO", "STORM", "F2SA", "BOME", "SAMA"])
def test_compiled_models(name, backend):
    """First-order trackers agree with the plain model; so do others if torch can, else an error says what to do."""
    if not dynamo_works():
        pytest.skip("this torch does not compile here")
    results = []
    for compile in (False, True):
        p = Program()
        tracker = make(name, p)
        model = compiled(p, backend) if compile else p.model
        params = list(p.model.parameters())
        assert [*map(id, model.parameters())] == [*map(id, params)]

        def outer(p=p, model=model):
            return cross_entropy(model(p.v[0]), p.u[0])

        def inner(p=p, model=model):
            return cross_entropy(model(p.x[0]), p.y[0]) + p.penalty()

        if compile and backend == "aot_eager" and name in ("SOBA", "AmIGO", "STORM"):
            with pytest.raises(RuntimeError, match=r"compiled.*second derivative.*F2SA, BOME or SAMA"):
                tracker.backward(outer, inner)
            return
        for _ in range(2):
            tracker.backward(outer, inner)
            tracker.step()
        results.append(torch.cat([x.grad.reshape(-1) for x in p.tensors()]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
