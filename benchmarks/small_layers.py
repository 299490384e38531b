"""Rows of `small`: equilibrium layers, meta-learning and sparse features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypergrad as hg

from . import peers
from .small import Column, Row

FLOOR = "by hand"
TIGHT, LOOSE = 1e-13, 1e-6  # rtol of the runs that are checked, and of those that are timed


class Tanh(nn.Module):
    """z ↦ tanh(zWᵀ + u) with ‖W‖₂ = .9."""

    def __init__(self, size: int):
        super().__init__()
        w = np.random.RandomState(0).randn(size, size)
        self.weight = nn.Parameter(torch.from_numpy(0.9 * w / np.linalg.norm(w, 2)))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.mT + u)


def solved(new: Tensor, z: Tensor, rtol: float) -> bool:
    """Whether all samples have converged to the relative tolerance."""
    return bool(((new - z).norm(dim=1) <= rtol * new.norm(dim=1)).all())


def picard(phi: Callable[[Tensor], Tensor], z: Tensor, rtol: float) -> Tensor:
    for _ in range(1000):
        new = phi(z)
        done = solved(new, z, rtol)
        z = new
        if done:
            break
    return z


def anderson(phi: Callable[[Tensor], Tensor], z: Tensor, rtol: float, m: int = 5) -> Tensor:
    """Anderson acceleration of each sample with m iterates, after the tutorial of Kolter, Duvenaud and Johnson 2020."""
    count, n = z.shape
    x, f = z.new_zeros(count, m, n), z.new_zeros(count, m, n)
    x[:, 0], f[:, 0] = z, phi(z)
    x[:, 1], f[:, 1] = f[:, 0], phi(f[:, 0])
    h, y = z.new_zeros(count, m + 1, m + 1), z.new_zeros(count, m + 1, 1)
    h[:, 0, 1:] = h[:, 1:, 0] = 1
    y[:, 0] = 1
    k = 2
    while not solved(f[:, (k - 1) % m], x[:, (k - 1) % m], rtol) and k < 1000:
        size = min(k, m)
        g = f[:, :size] - x[:, :size]
        h[:, 1 : size + 1, 1 : size + 1] = g @ g.mT + 1e-12 * torch.eye(size, dtype=z.dtype) * (g * g).sum((1, 2)).max()
        alpha = torch.linalg.solve(h[:, : size + 1, : size + 1], y[:, : size + 1])[:, 1 : size + 1, 0]
        x[:, k % m] = (alpha[:, None] @ f[:, :size])[:, 0]
        f[:, k % m] = phi(x[:, k % m])
        k += 1
    return f[:, (k - 1) % m]


def layer(method: str, size: int = 128, count: int = 64) -> Row:
    """Forward and backward through z = tanh(zWᵀ + u): 64 samples of 128 states, to a relative 1e-6."""
    cell = Tanh(size)
    u = torch.from_numpy(0.5 * np.random.RandomState(1).randn(count, size)).requires_grad_()
    solve = {"Picard": picard, "Anderson": anderson}[method]
    forward = {"Picard": hg.fixed_points.Picard, "Anderson": hg.fixed_points.Anderson}[method]
    inputs = [cell.weight, u]

    def by_hand(rtol: float) -> Sequence[Tensor]:
        with torch.no_grad():
            z = solve(lambda z: cell(z, u), torch.zeros_like(u), rtol)
        z = z.requires_grad_()
        image = cell(z, u)
        bar = 2 * image.detach() / count

        def pull(v: Tensor) -> Tensor:
            return torch.autograd.grad(image, z, v, retain_graph=True)[0] + bar

        return torch.autograd.grad(image, inputs, solve(pull, bar, rtol))

    def ours(rtol: float, backward: Callable[..., Any] = hg.solvers.GMRES) -> Sequence[Tensor]:
        module = hg.nn.Equilibrium(cell, forward=forward(rtol=rtol), backward=backward(rtol=rtol))
        return torch.autograd.grad(module(u).square().sum() / count, inputs)

    with torch.no_grad():
        z = picard(lambda z: cell(z, u), torch.zeros_like(u), 1e-15).numpy()
    w, d = cell.weight.detach().numpy(), 1 - z**2
    v = np.stack([np.linalg.solve(np.eye(size) - w.T * s, 2 * x / count) for s, x in zip(d, z, strict=True)])
    truth = [(v * d).T @ z, v * d]
    target = {"Picard": 1.3, "Anderson": 1.2}[method]
    fixed = partial(ours, backward=hg.solvers.FixedPoint)
    columns = [
        Column(FLOOR, partial(by_hand, LOOSE), FLOOR, "floor", exact=partial(by_hand, TIGHT)),
        Column("nn.Equilibrium, GMRES", partial(ours, LOOSE), FLOOR, target=target, exact=partial(ours, TIGHT)),
        Column("nn.Equilibrium, FixedPoint", partial(fixed, LOOSE), FLOOR, target=target, exact=partial(fixed, TIGHT)),
    ]
    if peers.installed("torchdeq"):
        name = {"Picard": "fixed_point_iter", "Anderson": "anderson"}[method]
        deq = partial(torchdeq, name, cell, u, inputs)
        columns.append(
            Column("torchdeq", partial(deq, LOOSE), FLOOR, "torchdeq", exact=partial(deq, 1e-12), correct=1e-6)
        )
    return Row(f"equilibrium, {method}", columns, truth)


def torchdeq(name: str, cell: nn.Module, u: Tensor, inputs: Sequence[Tensor], tol: float) -> Sequence[Tensor]:
    steps = {"f_max_iter": 500, "b_max_iter": 500, "f_tol": tol, "b_tol": tol}
    deq = peers.load("torchdeq").get_deq(f_solver=name, b_solver=name, ift=True, **steps)
    z = deq(lambda z: cell(z, u), torch.zeros_like(u))[0][-1]
    return torch.autograd.grad(z.square().sum() / len(u), inputs)


class Convolutions(nn.Module):
    """z ↦ norm(relu(z + norm(u + conv(norm(relu(conv(z))))))), the residual block of Bai, Koltun and Kolter 2020."""

    def __init__(self, channels: int):
        super().__init__()
        torch.manual_seed(0)
        kind: dict[str, Any] = {"padding": 1, "bias": False, "dtype": torch.float64}
        self.first, self.second = (nn.Conv2d(channels, channels, 3, **kind) for _ in range(2))
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels, dtype=torch.float64) for _ in range(3)])
        for convolution in (self.first, self.second):
            nn.init.normal_(convolution.weight, std=0.01)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        inner = self.norms[0](F.relu(self.first(z)))
        return self.norms[2](F.relu(z + self.norms[1](u + self.second(inner))))


def convolutions(channels: int = 32, count: int = 8, size: int = 16) -> Row:
    """Forward and backward through a layer of two convolutions with GroupNorm, to a relative 1e-6."""
    cell = Convolutions(channels)
    u = torch.from_numpy(np.random.RandomState(1).randn(count, channels, size, size)).requires_grad_()
    inputs = [*cell.parameters(), u]

    def by_hand(rtol: float) -> Sequence[Tensor]:
        def flat(x: Tensor) -> Tensor:
            return x.reshape(count, -1)

        with torch.no_grad():
            z = anderson(lambda z: flat(cell(z.view_as(u), u)), flat(torch.zeros_like(u)), rtol)
        z = z.view_as(u).requires_grad_()
        image = cell(z, u)
        bar = 2 * image.detach() / count

        def pull(v: Tensor) -> Tensor:
            return flat(torch.autograd.grad(image, z, v.view_as(u), retain_graph=True)[0] + bar)

        return torch.autograd.grad(image, inputs, anderson(pull, flat(bar), rtol).view_as(u))

    def ours(rtol: float) -> Sequence[Tensor]:
        forward, backward = hg.fixed_points.Anderson(rtol=rtol, max_steps=500), hg.solvers.GMRES(rtol=rtol)
        module = hg.nn.Equilibrium(cell, forward=forward, backward=backward)
        return torch.autograd.grad(module(u).square().sum() / count, inputs)

    with torch.no_grad():
        z = picard(lambda z: cell(z.view_as(u), u).flatten(1), torch.zeros_like(u).flatten(1), 1e-15)
    z = z.view_as(u).requires_grad_()
    image = cell(z, u)
    bar = 2 * image.detach() / count

    def pull(v: Tensor) -> Tensor:
        return (torch.autograd.grad(image, z, v.view_as(u), retain_graph=True)[0] + bar).flatten(1)

    v = picard(pull, bar.flatten(1), 1e-15)
    truth = torch.autograd.grad(image, inputs, v.view_as(u))
    columns = [
        Column(FLOOR, partial(by_hand, LOOSE), FLOOR, "floor", exact=partial(by_hand, 1e-12)),
        Column("nn.Equilibrium, GMRES", partial(ours, LOOSE), FLOOR, target=1.0, exact=partial(ours, 1e-12)),
    ]
    if peers.installed("torchdeq"):
        deq = partial(torchdeq, "anderson", cell, u, inputs)
        columns.append(
            Column("torchdeq", partial(deq, LOOSE), FLOOR, "torchdeq", exact=partial(deq, 1e-11), correct=1e-6)
        )
    return Row("equilibrium, convolutions with GroupNorm", columns, truth, rounds=3)


def perceptron(params: Sequence[Tensor], x: Tensor) -> Tensor:
    """A network 1-40-40-1 for each task: params [tasks, out, in] and [tasks, 1, out]."""
    for i in range(0, 4, 2):
        x = F.relu(x @ params[i].mT + params[i + 1])
    return x @ params[4].mT + params[5]


def maml(tasks: int, second: bool, steps: int = 5, lr: float = 0.01) -> Row:
    """The meta-gradient of a network 1-40-40-1 over sinusoids, through five gradient steps on each of the tasks."""
    draw = np.random.RandomState(0)
    shapes = [(40, 1), (1, 40), (40, 40), (1, 40), (1, 40), (1, 1)]
    start = [torch.from_numpy(draw.randn(*s) / np.sqrt(s[-1])).requires_grad_() for s in shapes]
    x = torch.from_numpy(draw.uniform(-5, 5, (tasks, 20, 1)))
    y = torch.from_numpy(draw.uniform(0.1, 5, (tasks, 1, 1))) * torch.sin(
        x + torch.from_numpy(draw.uniform(0, np.pi, (tasks, 1, 1)))
    )

    def by_hand() -> Sequence[Tensor]:
        params = [p.expand(tasks, *p.shape) for p in start]
        if not second:
            params = [p.detach().requires_grad_() for p in params]
        for _ in range(steps):
            loss = (perceptron(params, x[:, :10]) - y[:, :10]).square().mean((1, 2)).sum()
            grads = torch.autograd.grad(loss, params, create_graph=second)
            params = [p - lr * g for p, g in zip(params, grads, strict=True)]
            params = params if second else [p.detach().requires_grad_() for p in params]
        outer = (perceptron(params, x[:, 10:]) - y[:, 10:]).square().mean((1, 2)).mean()
        return torch.autograd.grad(outer, start) if second else [g.sum(0) for g in torch.autograd.grad(outer, params)]

    def loss(w: Sequence[Tensor], h: Sequence[Tensor], task: Sequence[Tensor]) -> Tensor:
        return (perceptron(w, task[0]) - task[1]).square().mean()

    def ours(**options: Any) -> Sequence[Tensor]:
        return hg.meta.grad(
            lambda w, h, task: loss(w, h, task[2:]),
            loss,
            start,
            (x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]),
            method=hg.meta.Unrolled(**options) if second else hg.meta.FirstOrder(),
            steps=steps,
            rule=hg.diff_optimizers.SGD(lr=lr),
        ).grads

    def each() -> Sequence[Tensor]:
        """A loop over the tasks: the truth, and a column of its own."""
        total = [torch.zeros_like(p) for p in start]
        for i in range(tasks):
            params: list[Tensor] = list(start)
            for _ in range(steps):
                grads = torch.autograd.grad(
                    loss(params, start, (x[i, :10], y[i, :10])), params, create_graph=second, retain_graph=True
                )
                params = [p - lr * g for p, g in zip(params, grads, strict=True)]
            at = start if second else params
            found = torch.autograd.grad(loss(params, start, (x[i, 10:], y[i, 10:])), at)
            total = [a + b / tasks for a, b in zip(total, found, strict=True)]
        return total

    name, compiled = (
        "hg.meta, " + ("Unrolled" if second else "FirstOrder"),
        partial(ours, memory="iterates", compile=True),
    )
    columns = [
        Column("by hand, tasks together", by_hand, "by hand, tasks together", "floor"),
        Column(name, ours, "by hand, tasks together", target=1.25 if tasks == 4 else 1.15),
        *([Column(f"{name}, compile=True", compiled, "by hand, tasks together", target=1.15)] if second else []),
        Column("by hand, a loop over tasks", each, "by hand, tasks together", "floor (loop)"),
    ]
    order = "second" if second else "first"
    return Row(f"MAML, {tasks} tasks, {order} order", columns, each())


def bags(vocabulary: int = 20_000, texts: int = 400, words: int = 50, steps: int = 10) -> Row:
    """Logistic regression on bags of 50 of 20,000 embedded words, a hypergradient by 10 steps of conjugate gradients.

    The code avoids torch's EmbeddingBag, which has no second derivative.
    """
    draw = np.random.RandomState(0)
    index, labels = draw.randint(vocabulary, size=(2 * texts, words)), draw.randint(2, size=2 * texts).astype(float)
    model = nn.Embedding(vocabulary, 1, dtype=torch.float64)
    w, decay = 0.1 * draw.randn(vocabulary), -3.0
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w)[:, None])
    log_decay = torch.tensor(decay, dtype=torch.float64, requires_grad=True)
    ids, y = torch.from_numpy(index), torch.from_numpy(labels)

    def losses() -> tuple[Tensor, Tensor]:
        inner = F.binary_cross_entropy_with_logits(model(ids[:texts]).mean((1, 2)), y[:texts])
        inner = inner + 0.5 * log_decay.exp() * model.weight.square().sum()
        return inner, F.binary_cross_entropy_with_logits(model(ids[texts:]).mean((1, 2)), y[texts:])

    def by_hand() -> Tensor:
        inner, outer = losses()
        (slope,) = torch.autograd.grad(inner, model.weight, create_graph=True)
        (b,) = torch.autograd.grad(outer, model.weight)
        v, r, p, rr = torch.zeros_like(b), b.clone(), b.clone(), (b * b).sum()
        for _ in range(steps):
            (ap,) = torch.autograd.grad(slope, model.weight, p, retain_graph=True)
            alpha = rr / (p * ap).sum()
            v, r, old = v + alpha * p, r - alpha * ap, rr
            rr = (r * r).sum()
            p = r + rr / old * p
        return -torch.autograd.grad(slope, log_decay, v)[0]

    def ours() -> Tensor:
        inner, outer = losses()
        solver = hg.solvers.CG(max_steps=steps, on_failure="ignore")
        return hg.implicit.grad(
            outer, inner_loss=inner, params=[model.weight], hparams=[log_decay], solver=solver
        ).grads[0]

    counts = np.zeros((2 * texts, vocabulary))
    np.add.at(counts, (np.arange(2 * texts)[:, None], index), 1 / words)
    train, valid = counts[:texts], counts[texts:]
    s = 1 / (1 + np.exp(-train @ w))
    b = valid.T @ (1 / (1 + np.exp(-valid @ w)) - labels[texts:]) / texts
    v, r, p = np.zeros_like(b), b, b
    for _ in range(steps):
        ap = train.T @ (s * (1 - s) * (train @ p)) / texts + np.exp(decay) * p
        alpha = r @ r / (p @ ap)
        v, r, old = v + alpha * p, r - alpha * ap, r @ r
        p = r + r @ r / old * p
    truth = -np.exp(decay) * (w @ v)
    columns = [
        Column("CG by hand", by_hand, "CG by hand", "floor"),
        Column("implicit.grad, CG", ours, "CG by hand", target=1.0),
    ]
    return Row("bags of 20,000 words", columns, [truth], repeat=2)


ROWS: dict[str, Callable[[], Row]] = {
    "equilibrium, Picard": partial(layer, "Picard"),
    "equilibrium, Anderson": partial(layer, "Anderson"),
    "equilibrium, convolutions": convolutions,
    **{
        f"MAML {tasks} {order}": partial(maml, tasks, order == "second")
        for order in ("second", "first")
        for tasks in (4, 16, 64)
    },
    "bags of words": bags,
}
