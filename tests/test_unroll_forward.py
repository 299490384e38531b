"""Forward mode through an inner optimiser: against reverse mode, the plain graph, closed forms and NumPy recursions."""

import itertools
from functools import cache

import numpy as np
import optree
import pytest
import torch

import hypergrad as hg
from benchmarks.measure import peak_memory
from hypergrad.diff_optimizers import SGD, Adam, PerStep
from hypergrad.unroll import forward, reverse
from problems import elastic_net_unrolled, heavy_ball, problem
from test_oracles import relative
from test_unroll import BAD, T, outer, setting, simple, step, total

DOUBLE = {"dtype": torch.float64}
EXACT = 1e-10


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def leaves(tree):
    return optree.tree_leaves(tree)


def assert_equal(got, due, tolerance=EXACT):
    for x, y in zip(leaves(got), leaves(due), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


def plain(step, start, hparams, outer_loss, steps, batches=None):
    """The unrolled graph by torch.autograd: ∇f, f, w_T and the random numbers that come next."""
    state = start
    for t in range(steps):
        state = step(state, hparams) if batches is None else step(state, hparams, t, batches[t])
    value = outer_loss(state, hparams)
    inputs = [x for x in leaves(hparams) if x.requires_grad]
    return torch.autograd.grad(value, inputs, allow_unused=True), value.detach(), state, torch.rand(3)


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 12, 13, 14])
def test_is_the_plain_graph(chunk):
    """Dropout, noise, batches, an integer in the state: the numbers of a plain run, and nothing is written."""
    start, hparams, batches = setting()
    torch.manual_seed(1)
    grads, value, state, after = plain(step, start, hparams, outer, T, batches)
    before = [x.clone() for x in leaves((start, hparams))]
    torch.manual_seed(1)
    result = forward(step, start, hparams, outer, T, batches=batches, chunk=chunk)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(result.outer_value, value)
    assert torch.equal(result.params["w"][0], state["w"][0]) and result.params["count"] == T
    assert result.evaluations == result.steps == T and result.standard_error is None
    assert_equal([result.grads["decay"], result.grads["lr"]], grads[::-1] if grads[0].ndim == 0 else grads, 1e-12)
    assert result.grads["fixed"] == 0
    assert all(torch.equal(x, y) for x, y in zip(before, leaves((start, hparams)), strict=True))
    assert all(x.grad is None for x in leaves((start, hparams)))


@pytest.mark.parametrize("memory", ["graph", "iterates", "sqrt", 3, "1MB"])
def test_is_reverse_in_every_storage(memory):
    start, hparams, batches = setting()
    torch.manual_seed(1)
    due = reverse(step, start, hparams, outer, T, batches=batches, memory=memory)
    torch.manual_seed(1)
    result = forward(step, start, hparams, outer, T, batches=batches)
    assert_equal(result.grads, due.grads, 1e-12)
    assert torch.equal(result.outer_value, due.outer_value)


PROBLEMS = ["ridge", "logistic", "biased", "quadratic-10", "contraction-0.9", "equilibrium"]


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_problems(name):
    """40 steps of each fixed point map from a random start, on its pytrees."""
    p = problem(name, random=3)
    start = optree.tree_map(lambda x: x.detach() + 0.1 * torch.randn_like(x), p.params)
    grads, value, _, _ = plain(p.fp_map, start, p.hparams, p.outer_loss, 40)
    result = forward(p.fp_map, start, p.hparams, p.outer_loss, 40, chunk=64)
    assert_equal(leaves(result.grads), grads)
    assert relative(result.outer_value, value) < EXACT
    assert_equal(result.grads, reverse(p.fp_map, start, p.hparams, p.outer_loss, 40).grads)


def test_converged_steps_give_the_hypergradient():
    p = elastic_net_unrolled()
    result = forward(p.step, p.start, p.hparams, p.outer_loss, p.steps)
    assert abs(float(result.outer_value) / p.value - 1) < EXACT
    assert all(relative(g, due) < 1e-8 for g, due in zip(leaves(result.grads), p.grads, strict=True))


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("random", [0, 1, 2])
def test_heavy_ball_row(chunk, random):
    """DESIGN section 7: the oracle is a forward recursion in NumPy."""
    p = heavy_ball(random=random)
    result = forward(p.step, p.start, p.hparams, p.outer_loss, p.steps, chunk=chunk)
    assert abs(float(result.outer_value) / p.value - 1) < EXACT
    assert all(relative(g, due) < EXACT for g, due in zip(result.grads, p.grads, strict=True))
    assert relative(result.params["w"], p.final) < EXACT
    if not random:
        norm = float(torch.stack(list(result.grads)).norm())
        assert abs(float(result.outer_value) / 0.0109102107586 - 1) < EXACT
        assert abs(norm / 0.0533204678 - 1) < 1e-9


RULES = {
    "SGD": SGD(lr=lambda h: h["log_lr"].exp(), momentum=lambda h: h["momentum"], nesterov=True),
    "Adam": Adam(lr=lambda h: h["log_lr"].exp(), betas=(lambda h: h["momentum"], 0.99)),
    "Adam, a schedule": Adam(lr=lambda h: PerStep(h["log_lr"].exp().repeat(3))),
}


@pytest.mark.parametrize("name", RULES)
def test_update_rules(name):
    """Learning rate, momentum and a weight decay, the rule's state being carried, over batches with dropout."""
    schedule = "schedule" in name
    x, y = torch.randn(30, 20, 3, **DOUBLE), torch.randn(30, 20, **DOUBLE)
    hparams = {"decay": torch.full((3,), -2.0, **DOUBLE), "log_lr": torch.linspace(-3.0, -2.0, 10, **DOUBLE)}
    if not schedule:
        hparams |= {"log_lr": torch.tensor(-2.0, **DOUBLE), "momentum": torch.tensor(0.8, **DOUBLE)}
    hparams = {key: value.requires_grad_() for key, value in hparams.items()}

    def loss(w, h, t, batch):
        kept = torch.nn.functional.dropout(batch[0], 0.2)
        return ((kept @ w - batch[1]) ** 2).mean() / 2 + (h["decay"].exp() * w**2).sum()

    rule, w = RULES[name], torch.randn(3, **DOUBLE)
    inner = rule.on(loss)
    start, batches = (w, rule.init(w)), list(zip(x, y, strict=True))
    validation = lambda carry, h: (carry[0] ** 2).sum()  # noqa: E731
    torch.manual_seed(1)
    due, value, _, after = plain(inner, start, hparams, validation, 30, batches)
    assert all(bool((g != 0).all()) for g in due)
    torch.manual_seed(1)
    result = forward(inner, start, hparams, validation, 30, batches=batches)
    assert torch.equal(torch.rand(3), after) and torch.equal(result.outer_value, value)
    assert_equal(list(result.grads.values()), due)


def contraction(w, lam):
    return torch.sin(w) * lam + 0.1 * lam**2


def ends(w, lam):
    return (w * lam).sum() ** 2


def still(state, hparams):
    """An outer loss that draws nothing, so that evaluating it on the way changes nothing."""
    return (state["w"][0] ** 2).mean() + hparams["lr"] ** 2 + (state["w"][1] * state["m"][1]).sum()


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_hypergradients_on_the_way(chunk):
    """Each is that of reverse with as many steps; dropout, noise, batches and t go on where they were."""
    start, hparams, batches = setting()
    torch.manual_seed(1)
    result, seen, here = start, 0, torch.get_rng_state()
    for more in (1, 1, 0, 4, 7, 10):
        seen += more
        torch.set_rng_state(here)
        result = forward(step, result, hparams, still, more, batches=batches, chunk=chunk)
        here = torch.get_rng_state()
        assert (result.steps, result.evaluations) == (seen, more)
        torch.manual_seed(1)
        due = reverse(step, start, hparams, still, seen, batches=batches)
        assert_equal(result.grads, due.grads, 1e-12)
        assert torch.equal(result.params["m"][0], due.params["m"][0])
