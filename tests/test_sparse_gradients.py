"""Embeddings with sparse=True give the results of dense ones in every public function."""

from functools import partial

import pytest
import torch
from torch.nn.functional import embedding

import hypergrad as hg

S, D = hg.solvers, hg.diff_optimizers
F64 = {"dtype": torch.float64}
DENSE, TIGHT = S.Dense(), S.GMRES(rtol=1e-13)


class Case:
    """A regression on the rows of a small embedding table, solved to rounding."""

    def __init__(self, sparse):
        draw = torch.Generator().manual_seed(0)
        self.look = partial(embedding, sparse=sparse)
        self.rows, self.t = torch.tensor([0, 2, 2, 1]), torch.randn(4, generator=draw, **F64)
        self.start = {"e": torch.randn(4, 3, generator=draw, **F64), "v": torch.randn(3, generator=draw, **F64)}
        self.h = torch.tensor(-2.0, requires_grad=True, **F64)
        self.w = self.start
        for _ in range(30):  # Newton's method, on the dense loss
            leaves, flat = [*self.w.values()], torch.cat([x.reshape(-1) for x in self.w.values()])
            loss = lambda f, leaves=leaves: Case.inner(self, Case.tree(f, leaves), self.h.detach(), embedding)  # noqa: E731
            slope, bend = torch.func.grad(loss)(flat), torch.func.jacrev(torch.func.grad(loss))(flat)
            step = torch.linalg.lu_solve(*torch.linalg.lu_factor(bend), slope[:, None])[:, 0]
            self.w = Case.tree(flat - step, leaves)

    @staticmethod
    def tree(flat, leaves):
        e, v = flat.split([x.numel() for x in leaves])
        return {"e": e.reshape(4, 3), "v": v}

    def inner(self, w, h, look=None):
        look = look or self.look
        every = look(torch.arange(4), w["e"])
        decay = h.exp() * w["v"].square().sum() + (every.square().sum() + every.exp().sum()) / 2
        return (look(self.rows, w["e"]) @ w["v"] - self.t).square().mean() + decay

    def outer(self, w, h):
        return (self.look(torch.tensor([1, 3, 0]), w["e"]) @ w["v"]).sin().sum()

    def step(self, w, h):
        slopes = torch.autograd.grad(self.inner(w, h), [*w.values()], create_graph=True)
        return {name: p - 0.1 * g for (name, p), g in zip(w.items(), slopes, strict=True)}

    def grad(self, form="inner_loss", solver=DENSE):
        given = {form: {"inner_loss": self.inner, "fp_map": self.step}[form]}
        return hg.implicit.grad(self.outer, **given, params=self.w, hparams=self.h, solver=solver)


def evaluated(c):
    w = {name: p.clone().requires_grad_() for name, p in c.w.items()}
    return hg.implicit.grad(c.outer(w, c.h), inner_loss=c.inner(w, c.h), params=w, hparams=c.h, solver=DENSE).grads


def attached(c, entry_point):
    form = {"argmin": c.inner, "fixed_point": c.step}[entry_point]
    return lambda h: c.outer(getattr(hg.implicit, entry_point)(form, c.w, h, solver=TIGHT), h)


def hypertorch(c, name):
    named = lambda w: dict(zip(c.w, w, strict=True))  # noqa: E731
    phi = lambda w, h: [*c.step(named(w), h[0]).values()]  # noqa: E731
    loss = lambda w, h: c.outer(named(w), h[0])  # noqa: E731
    return getattr(hg, name)([*c.w.values()], [c.h], 100, phi, loss, set_grad=False)[0]


def unrolled(c, how, rule=None):
    if rule is None:
        return how(c.step, c.start, c.h, c.outer, 5).grads
    return how(rule.on(c.inner), (c.start, rule.init(c.start)), c.h, lambda s, h: c.outer(s[0], h), 5).grads


def tracked(c, make):
    w, h = {name: p.clone().requires_grad_() for name, p in c.start.items()}, c.h.detach().clone().requires_grad_()
    tracker = make(w, h)
    for _ in range(3):
        tracker.backward(lambda: c.outer(w, h), lambda: c.inner(w, h))
        tracker.step()
    return h.grad


ENTRY_POINTS = {
    "grad": lambda c: c.grad().grads,
    "grad, NormalCG": lambda c: c.grad("fp_map", S.NormalCG(rtol=1e-12)).grads,
    "grad, evaluated": evaluated,
    "polish": lambda c: hg.implicit.polish(c.grad(), TIGHT).grads,
    "refine": lambda c: hg.implicit.refine(c.grad(), rtol=1e-9).grads,
    "argmin": lambda c: torch.autograd.grad(attached(c, "argmin")(c.h), c.h)[0],
    "argmin, twice": lambda c: torch.autograd.functional.hessian(attached(c, "argmin"), c.h.detach()),
    "fixed_point": lambda c: torch.autograd.grad(attached(c, "fixed_point")(c.h), c.h)[0],
    "hg.CG_normaleq": partial(hypertorch, name="CG_normaleq"),
    "unroll.reverse": partial(unrolled, how=hg.unroll.reverse),
    "unroll.forward": partial(unrolled, how=hg.unroll.forward),
    "rule, reverse": partial(unrolled, how=hg.unroll.reverse, rule=D.Adam(lr=0.1)),
    "rule, forward": partial(unrolled, how=hg.unroll.forward, rule=D.SGD(lr=0.1, momentum=0.5)),
    "SOBA": partial(tracked, make=hg.bilevel.SOBA),
    "BOME": partial(tracked, make=hg.bilevel.BOME),
}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_sparse_gradients_give_the_results_of_dense_ones(entry_point):
    due, found = (ENTRY_POINTS[entry_point](Case(sparse)) for sparse in (False, True))
    torch.testing.assert_close(found, due, rtol=1e-8, atol=0.0)
    assert due != 0
