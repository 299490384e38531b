"""Schedules of checkpoints take the fewest evaluations, and the allocator's peak stays within a budget of bytes."""

import heapq
import re
from math import comb

import pytest
import torch
from test_reverse import T, contraction, outer, setting, step, stored
from torch.nn.functional import cross_entropy, dropout
from torch.utils._pytree import tree_leaves

import hypergrad as hg
from benchmarks.measure import peak_memory
from hypergrad._torch import Allocated
from hypergrad.unroll import reverse

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- evaluations ------------------------------------------------------------------------------------------------------


def cheapest(steps, checkpoints):
    """The number of evaluations of the best schedule, by Dijkstra's search over all schedules.

    A node holds the kept checkpoints (w₀ among them), the index of the working iterate, and the number of steps that
    are not reversed yet. One evaluation advances the working iterate, or reverses the last step from its start.
    """
    queue, done = [(0, frozenset([0]), 0, steps)], set()
    while queue:
        cost, kept, here, left = heapq.heappop(queue)
        if left == 0:
            return cost
        if (kept, here, left) in done:
            continue
        done.add((kept, here, left))
        if here == left - 1:
            heapq.heappush(queue, (cost + 1, kept, -1, left - 1))
        elif here >= 0:
            heapq.heappush(queue, (cost + 1, kept, here + 1, left))
        for place in kept:
            heapq.heappush(queue, (cost, kept, place, left))
            heapq.heappush(queue, (cost, kept - {place}, here, left))
        if here >= 0 and len(kept) < checkpoints:
            heapq.heappush(queue, (cost, kept | {here}, here, left))
    raise AssertionError


@pytest.mark.parametrize("checkpoints", [1, 2, 3])
def test_no_schedule_needs_fewer_evaluations(checkpoints):
    """The search knows neither the formula nor the order of the binomial schedule."""
    lam, start = torch.tensor(0.9, **DOUBLE, requires_grad=True), torch.tensor(1.0, **DOUBLE)
    for steps in range(1, 13 - checkpoints):
        result = reverse(contraction, start, lam, lambda w, lam: w, steps, checkpoints=checkpoints)
        r = next(r for r in range(steps) if comb(checkpoints + r, r) >= steps)
        assert result.evaluations == cheapest(steps, checkpoints)
        assert result.evaluations <= (r + 1) * steps


def counts(steps, size, memory):
    """How often each step was evaluated."""
    seen = dict.fromkeys(range(steps), 0)

    def counted(w, lam, t):
        seen[t] += 1
        return torch.sin(w) * lam

    lam, start = torch.tensor(0.9, **DOUBLE, requires_grad=True), torch.ones(size, **DOUBLE)
    result = reverse(counted, start, lam, lambda w, lam: w.sum(), steps, **stored(memory), with_time=True)
    assert result.evaluations == sum(seen.values())
    return list(seen.values())


@pytest.mark.filterwarnings("ignore::hypergrad.LostDerivative")  # no check, which evaluates once more
@pytest.mark.parametrize("memory", ["graph", "sqrt", "100MB"])
def test_one_block_is_evaluated_once(memory):
    """If the graph of all steps is kept, the two steps whose memory was measured are not evaluated again."""

    def wide(w, lam):  # an iterate as large as the graphs of all steps
        calls.append(0)
        return torch.cat([w[:1].clone() * lam, w[1:].detach()])

    for steps in (1, 2, 3, 6):
        if memory != "sqrt":
            assert counts(steps, 5, memory) == [1] * steps
        calls = []
        lam, start = torch.tensor(0.9, **DOUBLE, requires_grad=True), torch.ones(20_000, **DOUBLE)
        result = reverse(wide, start, lam, lambda w, lam: w[0], steps, **stored(memory))
        assert len(calls) == steps and abs(float(result.grads) - steps * 0.9 ** (steps - 1)) < 1e-12


def test_the_last_iterate_is_known():
    """The last block is evaluated once, and all others twice."""
    assert counts(30, 5, "iterates") == [2] * 29 + [1]
    assert set(counts(200, 2000, "sqrt")[:-20]) == {2} and counts(200, 2000, "sqrt")[-1] == 1
    assert counts(200, 2000, 200) == [2] * 199 + [1]


# --- budgets ----------------------------------------------------------------------------------------------------------


def network(rule=None, drop=0.0):
    """A network on batches, trained by a rule with state; each weight of its first layer has its own decay."""
    x, y = torch.randn(12, 20, 30, **DOUBLE), torch.randint(5, (12, 20))
    w = [torch.randn(30, 40, **DOUBLE) / 6, torch.zeros(40, **DOUBLE), torch.randn(40, 5, **DOUBLE) / 6]
    rule = rule or hg.diff_optimizers.SGD(lr=lambda h: h[0].exp())
    hparams = [
        torch.tensor(-2.0, **DOUBLE, requires_grad=True),
        torch.full((30, 40), -5.0, **DOUBLE, requires_grad=True),
    ]

    def loss(w, h, t, batch):
        hidden = dropout(torch.tanh(batch[0] @ w[0] + w[1]), drop)
        return cross_entropy(hidden @ w[2], batch[1]) + (h[1].exp() * w[0] ** 2).sum()

    validation = lambda s, h: cross_entropy(torch.tanh(x[0] @ s[0][0] + s[0][1]) @ s[0][2], y[0])  # noqa: E731
    return rule.on(loss), (w, rule.init(w)), hparams, validation, {"batches": lambda t: (x[t], y[t])}


def wasteful():
    """A step with a temporary of 16 MB that its graph does not keep, on an iterate of 160 bytes."""
    x = torch.randn(20, **DOUBLE)

    def shrink(w, lam):
        return w - lam * torch.tanh(torch.outer(w.repeat(100), x.repeat(50)).sum() * 1e-4 + w)

    return (
        shrink,
        torch.randn(20, **DOUBLE),
        torch.tensor(0.1, **DOUBLE, requires_grad=True),
        lambda w, lam: w.sum(),
        {},
    )


def rows(inner=40, outer=40):
    """A problem with many rows, large temporaries in the derivatives, and a large outer loss."""
    x, lam = torch.randn(inner, 20, **DOUBLE), torch.tensor(0.01, **DOUBLE, requires_grad=True)
    held_out = torch.randn(outer, 20, **DOUBLE)

    def descend(w, lam):
        loss = torch.tanh(x @ w).square().sum(1).exp().mean()
        return w - lam * torch.autograd.grad(loss, w, create_graph=True)[0]

    return descend, torch.randn(20, 3, **DOUBLE), lam, lambda w, lam: torch.tanh(held_out @ w).exp().mean(), {}


def noisy():
    """An iterate of 24 bytes; the random state that is kept beside each has 5,056."""
    lam = torch.tensor(0.1, **DOUBLE, requires_grad=True)

    def jump(w, lam):
        return w - lam * torch.sin(w) + 0.1 * torch.randn(3, **DOUBLE)

    return jump, torch.randn(3, **DOUBLE), lam, lambda w, lam: w.sum(), {}


BUDGETED = {
    "noise": noisy,
    "batches": network,
    "Adam": lambda: network(hg.diff_optimizers.Adam(lr=lambda h: h[0].exp())),
    "dropout": lambda: network(drop=0.3),
    "large temporary": wasteful,
    "many rows": lambda: rows(inner=4000),
    "large outer loss": lambda: rows(outer=5000),
}


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_holds(name):
    """For budgets from the least accepted one to one for the whole graph, the peak is below and results agree."""
    step, start, hparams, outer_loss, options = BUDGETED[name]()

    def run(memory):
        torch.manual_seed(2)
        return reverse(step, start, hparams, outer_loss, 12, **stored(memory), **options)

    with pytest.raises(ValueError, match=r"a budget of 1 bytes is too small") as error:
        run("1 B")
    least = int(re.search(r"about (\d+)", str(error.value))[1])
    expected = run("graph")
    evaluations = []
    for factor in (1, 1.3, 3):
        results = []
        budget = int(least * factor)
        assert peak_memory(lambda budget=budget, results=results: results.append(run(f"{budget} B"))) <= budget
        evaluations.append(results[0].evaluations)
        for a, b in zip(*map(tree_leaves, (results[0].grads, expected.grads)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-16)
    assert evaluations == sorted(evaluations, reverse=True) and evaluations[0] > 12
    assert least <= 2 * peak_memory(lambda: run(1))  # a budget with enough room is not refused


def test_allocated_is_the_allocators_peak():
    """The dispatch mode agrees with the profiler on a reverse pass with views, in-place operations and temporaries."""
    w = torch.randn(300, 200, **DOUBLE, requires_grad=True)

    def call():
        x = (w * 2).t()[:50].add_(1)
        loss = torch.tanh(x @ w).square().sum() + x.exp().mean()
        torch.autograd.grad(loss, w, create_graph=True)[0].square().sum().backward(inputs=[w])
        w.grad = None

    with Allocated() as allocated:
        taken = allocated.taken(call)
        assert allocated.now == 0
    assert abs(taken / peak_memory(call) - 1) < 0.02


# --- measuring before the steps ---------------------------------------------------------------------------------------


def test_measuring_changes_no_random_number():
    """A budget takes one more call of outer_loss and one more reverse pass, which change no later random number."""
    start, hparams, batches = setting()
    values = []
    for memory in ("graph", "10MB", "52 KiB"):
        torch.manual_seed(3)
        result = reverse(step, start, hparams, outer, T, **stored(memory), batches=batches)
        values.append((result.outer_value, torch.rand(2)))
    assert all(torch.equal(a[i], values[0][i]) for a in values for i in (0, 1))
