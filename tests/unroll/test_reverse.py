"""Reverse mode through an inner optimiser: every memory policy against the plain graph, closed forms, least costs."""

import gc
import itertools
import random
from functools import cache, partial
from math import comb

import numpy
import pytest
import torch

import hypergrad as hg
from benchmarks.measure import peak_memory
from hypergrad.diff_optimizers import PerStep
from hypergrad.unroll import reverse

DOUBLE = {"dtype": torch.float64}
STORAGES = ["graph", "iterates", "sqrt", 1, 2, 3, 5, 100, "52 KiB", "10MB"]
T = 23


def stored(memory):
    """The keyword argument for a memory policy by name, or for a number of checkpoints."""
    return {"checkpoints": memory} if isinstance(memory, int) else {"memory": memory}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def setting():
    """An MLP-like inner problem with momentum, noise, dropout, batches and an integer in its state."""
    start = {
        "w": [torch.randn(4, 3, **DOUBLE, requires_grad=True), torch.randn(3, **DOUBLE, requires_grad=True)],
        "m": [torch.zeros(4, 3, **DOUBLE), torch.zeros(3, **DOUBLE)],
        "count": torch.tensor(0),
    }
    hparams = {
        "lr": torch.tensor(0.3, **DOUBLE, requires_grad=True),
        "decay": torch.zeros(4, 3, **DOUBLE, requires_grad=True),
        "fixed": torch.tensor(0.8, **DOUBLE),
    }
    batches = [torch.randn(6, 4, **DOUBLE) for _ in range(T)]
    return start, hparams, batches


def step(state, hparams, t, x):
    w, b = state["w"]
    hidden = torch.nn.functional.dropout(torch.tanh(x @ w + b), 0.3)
    noise = 0.1 * torch.randn(3, **DOUBLE)
    loss = (hidden**2).sum() / 6 + (hparams["decay"].exp() * w**2).sum() / 20 + (noise * b).sum() + 0.01 * t * b.sum()
    grads = torch.autograd.grad(loss, [w, b], create_graph=True)
    m = [hparams["fixed"] * m + g for m, g in zip(state["m"], grads, strict=True)]
    new = [v - hparams["lr"] * m for v, m in zip([w, b], m, strict=True)]
    return {"w": new, "m": m, "count": state["count"] + 1}


def outer(state, hparams):
    x = torch.randn(5, 4, **DOUBLE)
    return ((x @ state["w"][0] + state["w"][1]) ** 2).mean() + hparams["lr"] ** 2 + state["m"][1].sum()


@cache
def plain(truncate=T):
    """The results by torch.autograd through the whole unrolled graph, and the random state afterwards."""
    torch.manual_seed(0)
    start, hparams, batches = setting()
    state = start
    for t in range(T + 1):
        if t == T - truncate and truncate < T:
            floats = {k: [x.detach().requires_grad_() for x in state[k]] for k in ("w", "m")}
            state = floats | {"count": state["count"]}
        if t < T:
            state = step(state, hparams, t, batches[t])
    value = outer(state, hparams)
    inputs = [hparams["lr"], hparams["decay"], *start["w"]]
    return torch.autograd.grad(value, inputs, allow_unused=True), value.detach(), torch.rand(3), state


@pytest.mark.parametrize("memory", STORAGES)
@pytest.mark.parametrize("truncate", [None, 0, 1, 7])
def test_every_storage_is_the_plain_graph(memory, truncate):
    """Gradients, value, integers, dropout, noise, batches and the final random state agree; nothing is overwritten."""
    start, hparams, batches = setting()
    before = [x.clone() for x in (*start["w"], *start["m"], *hparams.values())]
    result = reverse(step, start, hparams, outer, T, **stored(memory), truncate=truncate, batches=batches)
    drawn = torch.rand(3)
    grads, value, after, state = plain(T if truncate is None else truncate)
    assert torch.equal(drawn, after)
    assert torch.equal(result.outer_value, value)
    assert torch.equal(result.params["w"][0], state["w"][0]) and result.params["count"] == T
    torch.testing.assert_close(result.grads["lr"], grads[0], rtol=1e-13, atol=1e-14)
    due = torch.zeros(4, 3, **DOUBLE) if grads[1] is None else grads[1]
    torch.testing.assert_close(result.grads["decay"], due, rtol=1e-13, atol=1e-14)
    assert result.grads["fixed"] == 0
    if truncate is None:
        torch.testing.assert_close(result.start_grads["w"][0], grads[2], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(result.start_grads["w"][1], grads[3], rtol=1e-13, atol=1e-14)
        assert result.start_grads["count"] == 0
    else:
        assert result.start_grads is None
    assert all(x.grad is None for x in (*start["w"], *hparams.values()))
    now = (*start["w"], *start["m"], *hparams.values())
    assert all(torch.equal(x, y) for x, y in zip(before, now, strict=True))


@pytest.mark.parametrize("memory", STORAGES)
def test_heavy_ball_row(memory):
    """f and ∇f of 30 steps as listed in DESIGN section 7; the oracle's ∇f comes from a forward recursion."""
    a = torch.linspace(0.1, 1, 10, **DOUBLE)
    lam = torch.tensor([0.3, 1.0], **DOUBLE).log().requires_grad_()

    def ball(state, lam):
        w, v = state
        v = torch.sigmoid(lam[1]) * v + a * w
        return w - lam[0].exp() * v, v

    start = (torch.ones(10, **DOUBLE), torch.zeros(10, **DOUBLE))
    result = reverse(ball, start, lam, lambda s, lam: (s[0] ** 2).sum() / 2, 30, **stored(memory))
    eta, mu = 0.3, 0.5
    w, v = start
    dw, dv = torch.zeros(2, 10, **DOUBLE), torch.zeros(2, 10, **DOUBLE)
    for _ in range(30):
        dv = mu * dv + a * dw + torch.stack([torch.zeros_like(v), mu * (1 - mu) * v])
        v = mu * v + a * w
        dw = dw - eta * dv - torch.stack([eta * v, torch.zeros_like(v)])
        w = w - eta * v
    torch.testing.assert_close(result.grads, dw @ w, rtol=1e-12, atol=0)
    assert abs(result.outer_value.item() / 0.0109102107586 - 1) < 1e-10
    assert abs(result.grads.norm().item() / 0.0533204678 - 1) < 1e-9


def contraction(w, lam):
    return torch.sin(w) * lam


@cache
def fewest(steps, checkpoints):
    """The least number of steps that are evaluated without recording a graph, by dynamic programming."""
    if steps <= 1:
        return 0
    if checkpoints == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, checkpoints - 1) + fewest(m, checkpoints) for m in range(1, steps))


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 4, 7, 50])
def test_binomial_schedule_is_minimal(checkpoints):
    """The evaluations are those of the closed form, and of a search over all schedules."""
    lam, start = torch.tensor(0.9, **DOUBLE, requires_grad=True), torch.tensor(1.0, **DOUBLE)
    for steps in [1, 2, 3, 5, 8, 13, 21, 40]:
        result = reverse(contraction, start, lam, lambda w, lam: w, steps, checkpoints=checkpoints)
        r = next(r for r in range(steps) if comb(checkpoints + r, r) >= steps)
        closed = steps + r * steps - (comb(checkpoints + r, r - 1) if r else 0)
        assert result.evaluations == closed == steps + fewest(steps, checkpoints)


def test_evaluations():
    lam, start = torch.tensor(0.9, **DOUBLE, requires_grad=True), torch.ones(2000, **DOUBLE)
    count = {m: reverse(contraction, start, lam, lambda w, lam: w.sum(), 100, **stored(m)).evaluations
             for m in ("graph", "iterates", "sqrt", 100)}  # fmt: skip
    assert count["graph"] == 100 and count["iterates"] == count[100] == 199
    assert 100 < count["sqrt"] < 200


@pytest.mark.parametrize("memory", STORAGES)
def test_gradcheck(memory):
    def f(lam, start):
        lam, start = lam.detach().requires_grad_(), start.detach()
        result = reverse(contraction, start, lam, lambda w, lam: (w * lam).sum() ** 2, 6, **stored(memory))
        return result.outer_value, result.grads, result.start_grads

    lam, start, h = torch.tensor([0.9, 1.1], **DOUBLE), torch.tensor([1.0, 0.4], **DOUBLE), 1e-6
    _, grads, start_grads = f(lam, start)
    for i in range(2):
        e = torch.eye(2, **DOUBLE)[i] * h
        assert abs((f(lam + e, start)[0] - f(lam - e, start)[0]) / (2 * h) - grads[i]) < 1e-8
        assert abs((f(lam, start + e)[0] - f(lam, start - e)[0]) / (2 * h) - start_grads[i]) < 1e-8


def peak_of(memory, steps=60, size=120):
    x = torch.randn(20, size, **DOUBLE)
    lam = torch.tensor(0.1, **DOUBLE, requires_grad=True)

    def descend(w, lam):
        loss = torch.tanh(x @ w).square().sum()
        return w - lam * torch.autograd.grad(loss, w, create_graph=True)[0]

    start = torch.randn(size, size, **DOUBLE)
    return peak_memory(lambda: reverse(descend, start, lam, lambda w, lam: w.square().sum(), steps, **stored(memory)))


def test_budget_is_respected():
    """The measured peak stays below the budget, whatever policy the budget leads to; too small a budget is refused."""
    for budget in ["2MB", "3MB", "5MB", "10MB", "100MB"]:
        assert peak_of(budget) <= float(budget[:-2]) * 1e6
    with pytest.raises(ValueError, match="one step needs about"):
        peak_of("100 KiB")


def test_sqrt_needs_little():
    sqrt, iterates, graph = peak_of("sqrt", 200), peak_of("iterates", 200), peak_of("graph", 200)
    assert sqrt < iterates / 4 < graph / 4


def test_nothing_leaks():
    """No tensor of a call stays alive after it, for example in a graph or a reference cycle."""

    def run():
        start, hparams, batches = setting()
        reverse(step, start, hparams, outer, T, memory="sqrt", batches=batches)
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    counts = [run() for _ in range(3)]
    assert counts[1] == counts[2]


def simple():
    return torch.ones(3, **DOUBLE), {"a": torch.tensor(0.5, **DOUBLE, requires_grad=True)}


def total(w, hparams):
    return w.sum()


def in_place_leaf(w, h):
    return w.mul_(h["a"])


def in_place_hidden(w, h):
    with torch.no_grad():
        w.mul_(0.5)
    return w * h["a"]


def detached(w, h):
    return (w * h["a"]).detach()


def item(w, h):
    return w * h["a"].item()


def python_random(w, h):
    return w * h["a"] * random.random()


def numpy_random(w, h):
    return w * h["a"] * numpy.random.rand()


def iterator_outside(w, h):
    return w * h["a"] + next(COUNTER) / 100


class Drifting(torch.nn.Module):
    """A module with a buffer that each call uses and changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.ones(3, **DOUBLE))

    def forward(self, w):
        self.seen += 0.1
        return w / self.seen


COUNTER, MODULE = itertools.count(), Drifting()


def buffers(w, h):
    return MODULE(w) * h["a"]


def wrong_shape(w, h):
    return (w * h["a"])[:2]


BAD = {
    "in place": (in_place_leaf, RuntimeError, "in place"),
    "in place, hidden": (in_place_hidden, RuntimeError, "in place"),
    "detached": (detached, ValueError, "no graph"),
    "item": (item, ValueError, "neither step nor outer_loss depends on hparams"),
    "random": (python_random, RuntimeError, "other numbers"),
    "shape": (wrong_shape, ValueError, "must be like the start's"),
}


UNREPLAYED = {
    "NumPy": (numpy_random, RuntimeError, "other numbers"),
    "iterator": (iterator_outside, RuntimeError, "other numbers"),
}


@pytest.mark.parametrize(
    ("name", "memory"),  # in 1 MB the whole graph fits, and nothing is replayed
    [(name, m) for name in BAD for m in ("iterates", "sqrt", 2, "1MB") if (name, m) != ("random", "1MB")]
    + [(name, m) for name in UNREPLAYED for m in ("iterates", "sqrt", 2)],
)
def test_bad_steps_are_found(name, memory):
    """Each error explains the cause, and neither the start, nor .grad, nor the random state is changed."""
    bad, kind, words = (BAD | UNREPLAYED)[name]
    start, hparams = simple()
    noisy = lambda w, h: bad(w + 0 * torch.randn(3, **DOUBLE) if name == "random" else w, h)  # noqa: E731
    state = torch.get_rng_state()
    with pytest.raises(kind, match=words):
        reverse(noisy, start, hparams, total, 50, **stored(memory))
    assert torch.equal(start, torch.ones(3, **DOUBLE)) and hparams["a"].grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("memory", ["iterates", 2])
def test_buffers_of_a_module_are_replayed(memory):
    """Each step divides by a buffer that it has increased; a derivative of several steps would need its old values."""
    start, hparams = simple()
    before = MODULE.seen.clone()
    result = reverse(buffers, start, hparams, total, 9, **stored(memory))
    factors = [1 / (before + 0.1 * (t + 1)) for t in range(9)]
    truth = torch.stack(factors).prod(0).sum() * 9 * 0.5**8  # of a⁹ Σ Π factors
    torch.testing.assert_close(result.grads["a"], truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(MODULE.seen, before + 0.9, rtol=1e-12, atol=0)
    for memory in ("graph", "sqrt"):
        with pytest.raises(RuntimeError, match="changed in place"):
            reverse(buffers, start, hparams, total, 9, memory=memory)


@pytest.mark.parametrize("memory", ["iterates", "sqrt", 2])
def test_batches_that_are_not_drawn_again_are_found(memory):
    """An iterator behind a function gives other batches at a replay; the same batches as a list are fine."""
    start, hparams = simple()
    draws = [torch.randn(3, **DOUBLE) for _ in range(60)]
    stream = iter(draws)
    step = lambda w, h, t, x: torch.sin(w) * h["a"] + x  # noqa: E731
    with pytest.raises(RuntimeError, match=r"other numbers .* an iterator"):
        reverse(step, start, hparams, total, 30, **stored(memory), batches=lambda t: next(stream))
    listed = reverse(step, start, hparams, total, 30, **stored(memory), batches=draws)
    stream = iter(draws)
    graph = reverse(step, start, hparams, total, 30, memory="graph", batches=lambda t: next(stream))
    torch.testing.assert_close(listed.grads["a"], graph.grads["a"], rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("memory", STORAGES)
def test_a_state_that_is_detached_between_steps_is_warned_of(memory):
    """A momentum is detached before its use; the warning names the tensor, and allow_detached silences it."""
    start, hparams = simple()
    pair = (start, torch.zeros(3, **DOUBLE))

    def cut(state, h):
        w, m = state
        m = h["a"] * m.detach() + torch.sin(w)
        return w - 0.1 * m, m

    run = partial(reverse, cut, pair, hparams, lambda s, h: s[0].sum(), 8, **stored(memory))
    with pytest.warns(hg.HypergradientWarning, match=r"depends on tensor 1 .*was it detached"):
        run()
    run(allow_detached=True)
    assert run(allow_detached=True).grads["a"].isfinite()


def test_a_first_step_that_ignores_the_momentum_is_not_warned_of():
    """The momentum is used from the second step on, and the rest of the state at every step."""
    start, hparams = simple()

    def begins(state, h, t):
        m = torch.sin(state[0]) + (h["a"] * state[1] if t else 0)
        return state[0] - 0.1 * m, m

    pair = (start, torch.zeros(3, **DOUBLE))
    result = reverse(begins, pair, hparams, lambda s, h: s[0].sum(), 8, checkpoints=2, with_time=True)
    assert result.grads["a"] != 0


@pytest.mark.parametrize("memory", ["iterates", "sqrt", 2, "10MB"])
def test_hparams_changed_in_place_are_found(memory):
    start, hparams = simple()

    def writes(w, h):
        with torch.no_grad():
            h["a"].mul_(0.9)
        return w * h["a"]

    with pytest.raises(RuntimeError, match="in place"):
        reverse(writes, start, hparams, total, 9, **stored(memory))


def test_overwritten_buffer_is_found():
    """A step that returns the same memory each time would overwrite stored iterates."""
    buffer = torch.zeros(3, **DOUBLE)

    def reuse(w, h):
        buffer.copy_((w * h["a"]).detach())
        return buffer

    start, hparams = simple()
    with pytest.raises(RuntimeError, match="in place"):
        reverse(reuse, start, hparams, total, 9, memory="iterates", allow_detached=True)


def test_partly_detached():
    """A learning rate read as a number gives a warning with its name; a detached state needs allow_detached."""
    start, hparams = simple()
    hparams["lr"] = torch.tensor(0.1, **DOUBLE, requires_grad=True)
    with pytest.warns(hg.HypergradientWarning, match=r"hparams\['lr'\]"):
        result = reverse(lambda w, h: w - h["lr"].item() * h["a"] * w, start, hparams, total, 4)
    assert result.grads["lr"] == 0 and result.grads["a"] != 0

    def half(state, h):
        return state[0] * h["a"] + state[1], state[1].detach()

    with pytest.raises(ValueError, match="start holds no floating point tensor"):
        reverse(half, torch.zeros(2, dtype=torch.long), hparams, total, 4)
    with pytest.raises(ValueError, match="tensor 1 of step's result"):
        reverse(half, (start, start.clone()), {"a": hparams["a"]}, lambda s, h: s[0].sum(), 4)
    result = reverse(half, (start, start.clone()), {"a": hparams["a"]}, lambda s, h: s[0].sum(), 4, allow_detached=True)
    a = hparams["a"]
    torch.testing.assert_close(result.grads["a"], 3 * (4 * a**3 + 3 * a**2 + 2 * a + 1).detach())


@pytest.mark.parametrize("same", [True, False])
def test_gradient_through_the_start(same):
    """The start may be one of hparams, or be computed from them."""
    a = torch.tensor([2.0, 3.0], **DOUBLE, requires_grad=True)
    start = a if same else a**2
    result = reverse(lambda w, a: w * 0.5 + 0 * a, start, a, lambda w, a: w.sum(), 3, checkpoints=2)
    due = torch.full_like(a, 0.125) * (1 if same else 2 * a.detach())
    torch.testing.assert_close(result.grads, due)


def test_live_start_is_found():
    start, hparams = simple()
    start.requires_grad_()
    with pytest.raises(ValueError, match="use its argument"):
        reverse(lambda w, h: start * h["a"], start, hparams, total, 3)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"memory": "cube"}, ValueError, "cube"),
        ({"memory": 30}, ValueError, r"got 30 \(to keep 30 iterates pass checkpoints=30"),
        ({"memory": "1.2.3 MB"}, ValueError, "1.2.3 MB"),
        ({"checkpoints": 0}, ValueError, "got 0"),
        ({"checkpoints": True}, ValueError, "got True"),
        ({"checkpoints": 3, "memory": "graph"}, ValueError, "not both"),
        ({"truncate": -1}, ValueError, "truncate"),
        ({"batches": iter([1, 2])}, TypeError, "drawn again"),
        ({"batches": [1, 2]}, ValueError, "3 steps need as many batches, got 2"),
    ],
)
def test_bad_options(options, kind, words):
    start, hparams = simple()
    with pytest.raises(kind, match=words):
        reverse(lambda w, h: w * h["a"], start, hparams, total, 3, **options)


def test_arguments_of_step():
    """step gets t if with_time is set, and the batch if batches are given, which may be drawn at random."""
    start, hparams = simple()
    seen = []
    reverse(lambda w, h, t: (seen.append(t), w * h["a"])[1], start, hparams, total, 3, with_time=True, memory="graph")
    assert seen == [0, 1, 2]

    def noisy(memory):
        torch.manual_seed(1)
        draw = lambda t: torch.randn(3, **DOUBLE)  # noqa: E731
        return reverse(
            lambda w, h, t, x: w * h["a"] + x, start, hparams, total, 9, batches=draw, **stored(memory)
        ).grads

    values = [noisy(memory)["a"] for memory in ("graph", 2)]
    assert values[0] == values[1]


def test_under_no_grad_and_torch_func():
    """The caller's grad mode does not matter, and step may use torch.func."""
    start, hparams = simple()

    def descend(w, h):
        return w - h["a"] * torch.func.grad(lambda w: (w**4).sum() / 4)(w)

    with torch.no_grad():
        results = [
            reverse(descend, start, hparams, total, 12, **stored(m)).grads["a"] for m in ("graph", "sqrt", "200KB")
        ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-13, atol=0)
    assert results[0] != 0


RULES = {
    "SGD": hg.diff_optimizers.SGD(lr=lambda h: PerStep(h["log_lr"].exp()), momentum=0.9, nesterov=True),
    "Adam": hg.diff_optimizers.Adam(lr=lambda h: PerStep(h["log_lr"].exp())),
    "RAdam": hg.diff_optimizers.RAdam(lr=lambda h: PerStep(h["log_lr"].exp())),
}


@pytest.mark.parametrize("name", RULES)
def test_update_rules_learn_a_schedule_in_every_mode(name):
    """Hyperparameters are a learning rate for each of 30 steps and a weight decay; the rule's state is part of w."""
    x, y, w = torch.randn(20, 3, **DOUBLE), torch.randn(20, **DOUBLE), torch.randn(3, **DOUBLE)
    hparams = {"decay": torch.full((3,), -2.0, **DOUBLE), "log_lr": torch.linspace(-2.0, -3.0, 30, **DOUBLE)}
    hparams = {key: value.requires_grad_() for key, value in hparams.items()}
    step = RULES[name].on(lambda w, h: ((x @ w - y) ** 2).mean() / 2 + (h["decay"].exp() * w**2).sum())
    start = (w, RULES[name].init(w))
    outer = lambda carry, h: (carry[0] ** 2).sum()  # noqa: E731
    carry = start
    for _ in range(30):
        carry = step(carry, hparams)
    expected = torch.autograd.grad(outer(carry, hparams), list(hparams.values()))
    assert all(bool((g != 0).all()) for g in expected)
    for memory in ("graph", "iterates", "sqrt", 3, "100KB"):
        result = reverse(step, start, hparams, outer, 30, **stored(memory))
        for got, wanted in zip(result.grads.values(), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("memory", ["graph", "iterates", "sqrt", 2])
def test_an_inner_gradient_without_a_graph_is_warned_of(memory):
    """The result depends on λ nevertheless, so only this warning tells that it is a first-order approximation."""
    start, hparams = simple()

    def descend(w, h, second=False):
        return w - h["a"] * torch.autograd.grad((w**4).sum() / 4, w, create_graph=second)[0]

    run = partial(reverse, start=start, hparams=hparams, outer_loss=total, steps=5, **stored(memory))
    with pytest.warns(hg.HypergradientWarning, match="second derivatives are lost.*create_graph=True.*allow_detached"):
        first = run(descend).grads["a"]
    assert torch.equal(run(descend, allow_detached=True).grads["a"], first)
    assert (run(partial(descend, second=True)).grads["a"] - first).abs() > 0.01 * first.abs()
    rule = hg.diff_optimizers.SGD(lr=lambda h: h["a"])
    step = rule.on(lambda w, h: (w**4).sum() / 4, create_graph=False)
    chosen = run(step, start=(start, rule.init(start)), outer_loss=lambda s, h: total(s[0], h))
    assert torch.equal(chosen.grads["a"], first)


@pytest.mark.parametrize("wrong", [{"steps": 2.5}, {"steps": -1}, {"steps": True}, {"truncate": 1.5}, {"truncate": -1}])
def test_numbers_of_steps_are_whole(wrong):
    start, hparams = simple()
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number ≥ 0"):
        reverse(lambda w, h: w * h["a"], start, hparams, total, **{"steps": 3, **wrong})


def test_a_rule_without_its_state():
    start, hparams = simple()
    step = hg.diff_optimizers.SGD(lr=0.1).on(lambda w, h: h["a"] * (w**2).sum())
    with pytest.raises(TypeError, match=r"SGD takes \(params, init\(params\)\)"):
        reverse(step, start, hparams, total, 3)
