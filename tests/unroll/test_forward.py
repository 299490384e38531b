"""Forward mode through an inner optimiser, against reverse mode, the plain graph, closed forms and NumPy recursions."""

import itertools
from functools import cache, partial
from pathlib import Path

import numpy as np
import optree
import pytest
import torch
from test_reverse import BAD, T, outer, setting, simple, step, stored, total

import hypergrad as hg
from benchmarks.measure import peak_memory
from hypergrad.diff_optimizers import SGD, Adam, PerStep
from hypergrad.unroll import forward, reverse
from problems import elastic_net_unrolled, heavy_ball, problem
from test_oracles import relative

DOUBLE = {"dtype": torch.float64}
EXACT = 1e-10


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def leaves(tree):
    return optree.tree_leaves(tree)


def assert_equal(got, due, tolerance=EXACT):
    for x, y in zip(leaves(got), leaves(due), strict=True):
        if not x.numel() == y.numel() == 0:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


def plain(step, start, hparams, outer_loss, steps, batches=None):
    """∇f, f, w_T and the next random numbers, by torch.autograd through the whole unrolled graph."""
    state = start
    for t in range(steps):
        state = step(state, hparams) if batches is None else step(state, hparams, t, batches[t])
    value = outer_loss(state, hparams)
    inputs = [x for x in leaves(hparams) if x.requires_grad]
    return torch.autograd.grad(value, inputs, allow_unused=True), value.detach(), state, torch.rand(3)


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 12, 13, 14])
def test_is_the_plain_graph(chunk):
    """With dropout, noise, batches and an integer in the state: the plain graph's results, and no side effect."""
    start, hparams, batches = setting()
    torch.manual_seed(1)
    grads, value, state, after = plain(step, start, hparams, outer, T, batches)
    before = [x.clone() for x in leaves((start, hparams))]
    torch.manual_seed(1)
    result = forward(step, start, hparams, outer, T, batches=batches, chunk=chunk)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(result.outer_value, value)
    assert torch.equal(result.params["w"][0], state["w"][0]) and result.params["count"] == T
    assert result.evaluations == result.steps == T
    assert_equal([result.grads["decay"], result.grads["lr"]], grads[::-1] if grads[0].ndim == 0 else grads, 1e-12)
    assert result.grads["fixed"] == 0
    assert all(torch.equal(x, y) for x, y in zip(before, leaves((start, hparams)), strict=True))
    assert all(x.grad is None for x in leaves((start, hparams)))


@pytest.mark.parametrize("memory", ["graph", "iterates", "sqrt", 3, "1MB"])
def test_is_reverse_in_every_storage(memory):
    start, hparams, batches = setting()
    torch.manual_seed(1)
    due = reverse(step, start, hparams, outer, T, batches=batches, **stored(memory))
    torch.manual_seed(1)
    result = forward(step, start, hparams, outer, T, batches=batches)
    assert_equal(result.grads, due.grads, 1e-12)
    assert torch.equal(result.outer_value, due.outer_value)


PROBLEMS = ["ridge", "logistic", "biased", "quadratic-10", "contraction-.9", "equilibrium"]


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
    """Learning rate, momentum and weight decay of a rule whose state is part of w, over batches with dropout."""
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
    """An outer loss without random numbers, so that evaluating it between steps changes nothing."""
    return (state["w"][0] ** 2).mean() + hparams["lr"] ** 2 + (state["w"][1] * state["m"][1]).sum()


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_hypergradients_between_steps(chunk):
    """Each agrees with reverse over as many steps; dropout, noise, batches and t continue from the last step."""
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


def test_hyperparameters_updated_between_steps():
    """Real-time mode: the derivative is that in a common shift of all past values of λ; E is at the present λ."""
    start, lam = torch.randn(3, **DOUBLE), torch.rand(3, **DOUBLE).requires_grad_()
    result, used = start, []
    for t in range(12):
        result = forward(contraction, result, lam, ends, 2)
        used += [lam.detach().clone()] * 2
        shift = torch.zeros(3, **DOUBLE, requires_grad=True)
        w = start
        for past in used:
            w = contraction(w, past + shift)
        (due,) = torch.autograd.grad(ends(w, lam.detach() + shift), shift)
        assert_equal(result.grads, due, 1e-12)
        if t == 1:
            assert relative(result.grads, reverse(contraction, start, lam, ends, 4).grads) > 0.1
        with torch.no_grad():
            lam -= 0.05 * result.grads / result.grads.norm()


def test_an_earlier_result_stays_as_it_was():
    """Two continuations agree, and an in-place update of λ does not change a state that step took from λ."""
    start, lam = torch.randn(3, **DOUBLE), torch.rand(3, **DOUBLE).requires_grad_()
    keeps = lambda state, lam: (torch.sin(state[0]) * state[1], lam)  # noqa: E731
    first = forward(keeps, (start, start.clone()), lam, lambda s, lam: s[0].sum(), 3)
    again = [forward(keeps, first, lam, lambda s, lam: s[0].sum(), 3).grads for _ in range(2)]
    assert torch.equal(*again)
    kept = first.params[1].clone()
    with torch.no_grad():
        lam.mul_(2)
    assert torch.equal(first.params[1], kept)


@pytest.mark.parametrize("length", [1, 4, 5])
def test_windows(length):
    """λ has one value for each window of steps; results agree with reverse, and a window has no tangent before it."""
    steps = 20
    windows = -(-steps // length)
    hparams = {
        "lr": torch.rand(windows, **DOUBLE),
        "decay": torch.rand(windows, 1, **DOUBLE),
        "all": torch.rand((), **DOUBLE),
    }
    hparams = {name: x.requires_grad_() for name, x in hparams.items()}
    start = torch.randn(6, **DOUBLE)

    def descend(w, h, t):
        rate = h["lr"].exp()[t // length] / 10
        return w - rate * (h["all"] * w**3 + h["decay"][t // length] * w)

    value = lambda w, h: (w**2).sum()  # noqa: E731
    result = forward(descend, start, hparams, value, steps, with_time=True)
    assert_equal(result.grads, reverse(descend, start, hparams, value, steps, with_time=True).grads, 1e-12)
    assert all(bool((g != 0).all()) for g in result.grads.values())
    half = forward(descend, start, hparams, value, steps // 2, with_time=True, chunk=3)
    assert_equal(half.grads, reverse(descend, start, hparams, value, steps // 2, with_time=True).grads, 1e-12)
    begun = -(-(steps // 2) // length)
    assert sorted(half.tangents.rows.tolist()) == sorted(
        [0, *range(1, 1 + begun), *range(1 + windows, 1 + windows + begun)]
    )
    rest = forward(descend, half, hparams, value, steps - steps // 2, with_time=True, chunk=2)
    assert_equal(rest.grads, result.grads, 1e-12)


def test_a_hyperparameter_that_acts_late_and_then_early_again():
    """Entries of λ act first in any order, and each entry of the gradient belongs to its entry of λ."""
    lam = torch.rand(5, **DOUBLE, requires_grad=True)
    turn = lambda w, lam, t: torch.sin(w) + lam[(3, 0, 4, 3, 1)[t % 5]] * w  # noqa: E731
    start = torch.randn(4, **DOUBLE)
    result = forward(turn, start, lam, lambda w, lam: (w**2).sum(), 11, with_time=True)
    assert result.tangents.rows.tolist() == [3, 0, 4, 1]
    due = reverse(turn, start, lam, lambda w, lam: (w**2).sum(), 11, with_time=True).grads
    assert_equal(result.grads, due, 1e-12)
    assert result.grads[2] == 0


def test_a_leaf_that_acts_later_than_the_others():
    hparams = {name: torch.rand((), **DOUBLE).requires_grad_() for name in "ab"}
    late = lambda w, h, t: w + h["a"] if t < 3 else w + h["b"]  # noqa: E731
    result = forward(late, torch.zeros((), **DOUBLE), hparams, lambda w, h: w, 5, with_time=True)
    assert result.grads == {"a": 3, "b": 2}


@pytest.mark.parametrize("kind", ["same", "computed", "part"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_gradient_through_the_start(kind, chunk):
    """All or a part of the start may be one of hparams or computed from them; tangents then begin at the start."""
    a = torch.tensor([2.0, 3.0], **DOUBLE, requires_grad=True)
    b = torch.tensor(0.7, **DOUBLE, requires_grad=True)
    start = {
        "same": (a, a * 0),
        "computed": (a**2, (a * b).sum()),
        "part": (torch.ones(2, **DOUBLE), b * torch.ones(2, **DOUBLE)),
    }[kind]
    move = lambda w, h: (torch.sin(w[0]) * h[0].sum() / 9 + h[1] * w[1], w[1] * 0.9)  # noqa: E731
    value = lambda w, h: (w[0] ** 2).sum() + w[1].sum() * h[1] + h[0].sum()  # noqa: E731
    for steps in (0, 1, 5):
        with_start = [
            reverse(move, start, (a, b), value, steps).grads,
            forward(move, start, (a, b), value, steps, chunk=chunk).grads,
        ]
        assert_equal(with_start[1], with_start[0], 1e-12)
    part = forward(move, start, (a, b), value, 2, chunk=chunk)
    assert_equal(forward(move, part, (a, b), value, 3).grads, with_start[0], 1e-12)
    assert a.grad is None and b.grad is None


def test_hparams_that_a_network_computes():
    """The derivative is with respect to the network's output, whose graph can be used afterwards."""
    theta = torch.randn(3, **DOUBLE, requires_grad=True)
    lam = torch.tanh(theta)
    start = torch.randn(3, **DOUBLE)
    due = reverse(contraction, start, lam, ends, 5).grads
    result = forward(contraction, start, lam, ends, 5)
    assert_equal(result.grads, due, 1e-12)
    lam.backward(result.grads)
    assert_equal(theta.grad, (1 - lam.detach() ** 2) * due)


@pytest.mark.filterwarnings("ignore::hypergrad.HypergradientWarning")
def test_mixed_dtypes_unused_and_outer_only():
    """float32 beside float64; an empty hyperparameter, an unused one, and one that only the outer loss uses."""
    start = {
        "w": torch.randn(3, **DOUBLE),
        "v": torch.randn(2),
        "n": torch.tensor(3),
        "name": "x",
        "s": torch.tensor(0.5, **DOUBLE),
    }
    hparams = [
        torch.rand(3, **DOUBLE),
        torch.rand(2),
        torch.rand((), **DOUBLE),
        torch.rand(4),
        torch.rand(0, **DOUBLE),
        torch.rand(2),
    ]
    hparams = [x.requires_grad_() for x in hparams[:-1]] + hparams[-1:]

    def move(state, h):
        w = torch.cos(state["w"]) * h[0] + state["v"].double().sum() * state["s"]
        v = torch.sin(state["v"]) * h[1] * state["n"] + state["w"][:2].float() * 0.1 + h[5]
        return state | {"w": w, "v": v, "n": state["n"] + 1, "s": state["s"] * 0.5 + h[4].sum()}

    def value(state, h):
        return (state["w"] ** 2).sum() + state["v"].double().sum() + h[2] ** 2 + h[0].sum()

    due = reverse(move, start, hparams, value, 7)
    for chunk in (None, 1, 4):
        result = forward(move, start, hparams, value, 7, chunk=chunk)
        assert_equal(result.grads, due.grads, 1e-5)
        assert [g.dtype for g in result.grads] == [x.dtype for x in hparams]
        assert_equal(result.grads[2], due.grads[2], 1e-14)
        assert result.params["n"] == 10 and result.params["name"] == "x"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    """The dependence on every hyperparameter is found in half precision too."""
    p = heavy_ball(dtype=dtype)
    result = forward(p.step, p.start, p.hparams, p.outer_loss, p.steps)
    assert all(g.dtype is dtype for g in result.grads)
    error = [relative(g.double(), due) for g, due in zip(result.grads, p.grads, strict=True)]
    assert max(error) < (1e-4 if dtype is torch.float32 else 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_hides_no_hyperparameter(dtype):
    """The tangent begins even if the probe's products cancel, which may happen by chance in half precision."""
    start, lam = torch.ones(2, dtype=torch.bfloat16), torch.tensor(0.5, dtype=dtype, requires_grad=True)
    probe = torch.randn(2, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    column = torch.stack([probe[1], -probe[0]])
    result = forward(lambda w, lam: w + lam.bfloat16() * column, start, lam, lambda w, lam: w[0] * 2, 1)
    assert result.grads == 2 * column[0] != 0


def test_under_no_grad_and_torch_func():
    """The caller's grad mode does not matter, and step may use torch.func."""
    start, hparams = simple()
    descend = lambda w, h: w - h["a"] * torch.func.grad(lambda w: (w**4).sum() / 4)(w)  # noqa: E731
    with torch.no_grad():
        result = forward(descend, start, hparams, total, 12)
    assert_equal(result.grads, reverse(descend, start, hparams, total, 12).grads, 1e-12)
    assert not result.params.requires_grad and not result.grads["a"].requires_grad


@pytest.mark.parametrize("second", [True, False])
def test_inner_gradients(second):
    """An inner gradient without create_graph is a constant, as in reverse mode."""
    start, lam = torch.randn(3, **DOUBLE), torch.rand(3, **DOUBLE).requires_grad_()

    def descend(w, lam):
        (g,) = torch.autograd.grad((torch.sin(w) ** 2 * lam.exp()).sum(), w, create_graph=second)
        return w - 0.1 * lam * g

    due = reverse(descend, start, lam, ends, 9, allow_detached=not second).grads
    assert_equal(forward(descend, start, lam, ends, 9, allow_detached=not second).grads, due, 1e-12)
    if not second:
        with pytest.warns(hg.HypergradientWarning, match="second derivatives are lost.*create_graph=True"):
            forward(descend, start, lam, ends, 9)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_normalisation_in_training_mode(norm):
    """In torch reverse over forward mode is silently wrong for these layers."""
    x, lam = torch.randn(8, 4, **DOUBLE), torch.tensor([-1.0, 0.3], **DOUBLE, requires_grad=True)

    def descend(w, lam):
        z = torch.tanh(x @ w)
        z = (
            torch.nn.functional.batch_norm(z, None, None, training=True)
            if norm == "batch"
            else torch.layer_norm(z, (4,))
        )
        (g,) = torch.autograd.grad(
            (torch.sigmoid(z) * lam[1].exp()).square().mean() + (w**2).sum(), w, create_graph=True
        )
        return w - lam[0].exp() * g

    start = torch.randn(4, 4, **DOUBLE, requires_grad=True)
    value = lambda w, lam: torch.tanh(x @ w).square().sum()  # noqa: E731
    due, _, _, _ = plain(descend, start, lam, value, 8)
    assert_equal(forward(descend, start, lam, value, 8).grads, due[0])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class Detaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g.detach() + 0 * g


@pytest.mark.parametrize("function", [Once, Detaching])
@pytest.mark.parametrize("place", ["params", "hparams"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_reverse_pass_that_hides_its_derivative(function, place, chunk):
    """torch's forward mode silently continues with zeros there, also for once_differentiable."""
    start, hparams = simple()
    moved = lambda w, h: function.apply(w) * h["a"] if place == "params" else w * function.apply(h["a"])  # noqa: E731
    with pytest.raises(RuntimeError, match="transpose disagree"):
        forward(moved, start, hparams, total, 3, chunk=chunk)


def test_a_late_step_that_hides_its_derivative():
    start, hparams = simple()
    late = lambda w, h, t: w * h["a"] if t < 3 else Once.apply(w) * h["a"]  # noqa: E731
    with pytest.raises(RuntimeError, match="transpose disagree"):
        forward(late, start, hparams, total, 5, with_time=True)


def test_an_operation_without_the_derivative():
    start, hparams = torch.randn(3, 2, **DOUBLE), simple()[1]
    margin = partial(torch.nn.functional.multi_margin_loss, target=torch.tensor([0, 1, 0]), reduction="none")
    apart = lambda w, h: w - h["a"] * margin(w)[:, None]  # noqa: E731
    assert reverse(apart, start, hparams, total, 3).grads["a"] != 0
    with pytest.raises(RuntimeError, match=r"multi_margin_loss_backward.*use unroll\.reverse"):
        forward(apart, start, hparams, total, 3)


@pytest.mark.parametrize("name", [name for name in BAD if name != "random"])
def test_bad_steps_are_found(name):
    """Each error explains the cause, and neither the start, nor .grad, nor the random state is changed."""
    bad, kind, words = BAD[name]
    start, hparams = simple()
    noisy = lambda w, h: (torch.rand(1), bad(w, h))[1]  # noqa: E731
    state = torch.get_rng_state()
    with pytest.raises(kind, match=words):
        forward(noisy, start, hparams, total, 5)
    assert torch.equal(start, torch.ones(3, **DOUBLE)) and hparams["a"].grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_overwritten_buffer_is_found():
    buffer = torch.zeros(3, **DOUBLE)
    start, hparams = simple()
    with pytest.raises(RuntimeError, match="in place"):
        forward(lambda w, h: buffer.copy_((w * h["a"]).detach()), start, hparams, total, 9, allow_detached=True)


def test_an_infinite_iterator_may_give_the_batches():
    """Forward mode replays nothing, so each batch is drawn once and in order."""
    start, hparams = simple()
    numbers = itertools.count(1)
    result = forward(lambda w, h, t, x: w + x * h["a"], start, hparams, total, 4, batches=lambda t: next(numbers))
    assert result.grads["a"] == 3 * 10 and next(numbers) == 5


def test_partly_detached():
    """A learning rate read as a number gives a warning with its name; a detached state needs allow_detached."""
    start, hparams = simple()
    hparams["lr"] = torch.tensor(0.1, **DOUBLE, requires_grad=True)
    with pytest.warns(hg.HypergradientWarning, match=r"hparams\['lr'\]"):
        result = forward(lambda w, h: w - h["lr"].item() * h["a"] * w, start, hparams, total, 4)
    assert result.grads["lr"] == 0 and result.grads["a"] != 0
    half = lambda s, h: (s[0] * h["a"] + s[1], s[1].detach())  # noqa: E731
    with pytest.raises(ValueError, match="tensor 1 of step's result"):
        forward(half, (start, start.clone()), {"a": hparams["a"]}, lambda s, h: s[0].sum(), 4)
    for value in (lambda s, h: s[0].sum(), lambda s, h: s[0].sum() * h["a"]):
        both = [
            f(half, (start, start.clone()), {"a": hparams["a"]}, value, 4, allow_detached=True)
            for f in (forward, reverse)
        ]
        assert_equal(both[0].grads, both[1].grads, 1e-14)


def test_live_start_and_detached_everything():
    start, hparams = simple()
    with pytest.raises(ValueError, match="use its argument"):
        forward(lambda w, h: start * h["a"], start.requires_grad_(), hparams, total, 3)
    result = forward(lambda w, h: w.detach() * 2, start, hparams, lambda w, h: w.sum() * h["a"], 3, allow_detached=True)
    assert result.grads["a"] == 24


def test_steps_that_diverge_are_warned_of():
    start, hparams = simple()
    with pytest.warns(hg.HypergradientWarning, match="NaN or infinity"):
        forward(lambda w, h: w**3 * 1e9 * h["a"], start, hparams, total, 9)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"steps": -1}, ValueError, "steps must be a whole number ≥ 0, got -1"),
        ({"steps": 2.0}, ValueError, "got 2.0"),
        ({"steps": True}, ValueError, "got True"),
        ({"chunk": 0}, ValueError, "chunk must be a whole number ≥ 1, got 0"),
        ({"batches": iter([1, 2])}, TypeError, "next"),
        ({"batches": [1, 2]}, ValueError, "3 steps need as many batches, got 2"),
    ],
)
def test_bad_options(options, kind, words):
    start, hparams = simple()
    with pytest.raises(kind, match=words):
        forward(lambda w, h: w * h["a"], start, hparams, total, **({"steps": 3} | options))


def test_continuing_with_other_hparams():
    start, hparams = simple()
    first = forward(lambda w, h: w * h["a"], start, hparams, total, 2)
    for other in (torch.ones(2, **DOUBLE), torch.ones(())):
        with pytest.raises(ValueError, match=r"expected shape \(\), float64 on cpu; got shape"):
            forward(lambda w, h: w * h["a"].sum(), first, {"a": other.requires_grad_()}, total, 2)
    with pytest.raises(ValueError, match="4 steps need as many batches, got 3"):
        forward(lambda w, h, t, x: w * h["a"], first, hparams, total, 2, batches=[1, 2, 3])


@cache
def descent(size=40):
    x = torch.randn(10, size, **DOUBLE)

    def descend(w, lam):
        loss = torch.tanh(x @ w).square().sum() + (lam[1] * w).square().sum()
        return w - lam[0] * torch.autograd.grad(loss, w, create_graph=True)[0]

    return descend, torch.randn(size, size, **DOUBLE), torch.tensor([0.01, 0.1, 1.0], **DOUBLE, requires_grad=True)


@pytest.mark.parametrize("steps", [(10, 60), pytest.param((50, 1000), marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk", [None, 1])
def test_memory_does_not_depend_on_steps(steps, chunk):
    """The measured peak is the same after many steps."""
    descend, start, lam = descent()
    value = lambda w, lam: (w**2).sum() * lam[2]  # noqa: E731
    peaks = [peak_memory(lambda n=n: forward(descend, start, lam, value, n, chunk=chunk)) for n in steps]
    assert peaks[0] == peaks[1]
    assert peaks[0] < (3 * 2 + 20 * (chunk or 2)) * start.nbytes


def test_chunks_bound_memory():
    """Forty tangents one at a time take little more than the tangents; all at once, the memory of forty steps."""
    descend, start, _ = descent()
    lam = torch.full((40,), 0.01, **DOUBLE, requires_grad=True)
    move = lambda w, lam: descend(w, lam[:2] + lam.sum())  # noqa: E731
    peak = {
        chunk: peak_memory(lambda c=chunk: forward(move, start, lam, lambda w, lam: (w**2).sum(), 5, chunk=c))
        for chunk in (1, 40)
    }
    assert peak[1] < 140 * start.nbytes < peak[40]


def resident():
    """The resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.timeout(600)
def test_a_hundred_thousand_steps():
    """Heavy ball of DESIGN section 7 with a small learning rate: constant memory, and agreement with NumPy."""
    steps, a = 100_000, np.linspace(0.1, 1.0, 10)
    lam = np.array([np.log(1e-5), 0.0])
    eta, mu = np.exp(lam[0]), 1 / (1 + np.exp(-lam[1]))
    w, v, dw, dv = np.ones(10), np.zeros(10), np.zeros((10, 2)), np.zeros((10, 2))
    for _ in range(steps):
        dv = mu * dv + np.outer(v, [0.0, mu * (1.0 - mu)]) + a[:, None] * dw
        v = mu * v + a * w
        dw = dw - eta * dv - np.outer(v, [eta, 0.0])
        w = w - eta * v
    p, held = heavy_ball(), {}

    def ball(state, hparams, t):
        if t in (1000, steps - 1):
            held[t] = resident()
        return p.step(state, hparams)

    hparams = [torch.tensor(x, **DOUBLE, requires_grad=True) for x in lam]
    result = forward(ball, p.start, hparams, p.outer_loss, steps, with_time=True)
    assert relative(torch.stack(result.grads), dw.T @ w) < EXACT
    assert relative(result.params["w"], w) < EXACT
    assert held[steps - 1] - held[1000] < 2 * 2**20  # about 20 bytes a step; an iterate takes 160
