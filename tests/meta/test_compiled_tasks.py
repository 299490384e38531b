"""Compiled inner loops of meta-learning agree with uncompiled ones, also for tasks other than the first."""

import optree
import pytest
import torch
from torch.nn.functional import softplus

import hypergrad as hg
from hypergrad import meta

F64 = torch.float64


def tasks_of(seed, count=4):
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, *shape, generator=draw, dtype=F64) for shape in ((10, 3), (10, 1)))
    return {"support": (x[:, :5], y[:, :5]), "query": (x[:, 5:], y[:, 5:])}


def hparams(frozen=()):
    draw = torch.Generator().manual_seed(7)
    shapes = {"w1": (3, 4), "b1": (4,), "w2": (4, 1)}
    leaves = {name: torch.randn(s, generator=draw, dtype=F64) / 2 for name, s in shapes.items()}
    return {name: x.requires_grad_(name not in frozen) for name, x in leaves.items()}


class Losses:
    """A network 3-4-1; counts how often the inner loss is evaluated in Python."""

    def __init__(self):
        self.calls = 0

    def fit(self, w, x, y):
        return (torch.tanh(x @ w["w1"] + w["b1"]) @ w["w2"] - y).square().mean()

    def inner(self, w, h, task):
        self.calls += 1
        return self.fit(w, *task["support"])

    def outer(self, w, h, task):
        return self.fit(w, *task["query"]) + 0.1 * softplus(h["w2"]).sum()

    def grad(self, compile, tasks, h, steps=4, **options):
        self.calls = 0
        method = meta.Unrolled(memory="iterates", compile=compile) if compile else meta.Unrolled()
        return meta.grad(self.outer, self.inner, h, tasks, method=method, steps=steps, chunk=4, **options)


def check(plain, compiled):
    for name in ("grads", "params", "outer_values"):
        for x, y in zip(*(optree.tree_leaves(getattr(r, name)) for r in (plain, compiled)), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-14, equal_nan=True)
    assert plain.statuses == compiled.statuses


RULES = {
    "default": None,
    "momentum": hg.diff_optimizers.SGD(lr=0.2, momentum=0.8),
    "learned rate": hg.diff_optimizers.SGD(lr=lambda h: 0.1 * h["w2"][0, 0].exp()),
    "Adam": hg.diff_optimizers.Adam(lr=0.05),
}


@pytest.mark.parametrize("frozen", [(), ("b1",)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_compiled_loops_agree_for_one_batch_of_tasks_after_the_other(rule, frozen):
    losses, h = Losses(), hparams(frozen)
    for seed in range(3):
        tasks = tasks_of(seed)
        check(losses.grad(False, tasks, h, rule=rule), losses.grad("eager", tasks, h, rule=rule))
        assert seed == 0 or losses.calls == 1  # one call compares the step at the second iterate


def test_biased_and_parts_of_all_tasks():
    losses, h = Losses(), hparams()
    for seed in range(2):
        inner = meta.biased(losses.inner, strength=0.5)
        plain, compiled = (
            meta.grad(losses.outer, inner, h, tasks_of(seed, 5), method=method, steps=3, chunk=2)
            for method in (meta.Unrolled(), meta.Unrolled(memory="sqrt", compile="eager"))
        )
        check(plain, compiled)


def test_another_strength_is_noticed():
    losses, h, tasks = Losses(), hparams(), tasks_of(0)
    for strength in (0.5, 2.0):
        plain, compiled = (
            meta.grad(losses.outer, meta.biased(losses.inner, strength), h, tasks, method=method, steps=3)
            for method in (meta.Unrolled(), meta.Unrolled(memory="sqrt", compile="eager"))
        )
        check(plain, compiled)


def test_another_rule_is_noticed():
    losses, h, tasks = Losses(), hparams(), tasks_of(0)
    for lr, momentum in ((0.1, 0.9), (0.2, 0.9), (0.2, 0.5), (0.1, 0.9)):
        rule = hg.diff_optimizers.SGD(lr=lr, momentum=momentum)
        check(losses.grad(False, tasks, h, rule=rule), losses.grad("eager", tasks, h, rule=rule))


def test_tasks_that_diverge_are_left_out_without_compiling_anew():
    losses, h = Losses(), hparams()
    for seed in range(3):
        tasks = tasks_of(seed)
        if seed:
            tasks["support"][1][seed] = torch.inf
            with pytest.warns(hg.HypergradientWarning, match=rf"tasks \({seed}\)"):
                plain = losses.grad(False, tasks, h)
            with pytest.warns(hg.HypergradientWarning, match=rf"tasks \({seed}\)"):
                compiled = losses.grad("eager", tasks, h)
            # One call compares the step at the second iterate; seven are for the other tasks, whose iterates are kept.
            assert losses.calls == 1 + 7
        else:
            plain, compiled = losses.grad(False, tasks, h), losses.grad("eager", tasks, h)
        check(plain, compiled)


@pytest.mark.filterwarnings("ignore::hypergrad.LostDerivative")
def test_losses_that_cannot_be_compiled_are_evaluated_uncompiled():
    losses, h, tasks = Losses(), hparams(), tasks_of(0)
    rule = hg.diff_optimizers.SGD(lr=lambda h: 0.1 * h["b1"][0].exp() * float(h["w2"][0].detach()))
    plain = losses.grad(False, tasks, h, rule=rule)
    with pytest.warns(hg.HypergradientWarning, match="a number is read"):
        check(plain, losses.grad("eager", tasks, h, rule=rule))


def test_graphs_are_not_kept_by_compiled_steps():
    losses, h, tasks = Losses(), hparams(), tasks_of(0)
    with pytest.raises(ValueError, match="keep no graphs"):
        meta.grad(losses.outer, losses.inner, h, tasks, method=meta.Unrolled(compile="eager"), steps=2)
    for options in ({"memory": "sqrt"}, {"memory": "sqrt", "checkpoints": 2}):
        method = meta.Unrolled(compile="eager", **options)  # pyright: ignore[reportArgumentType]
        compiled = meta.grad(losses.outer, losses.inner, h, tasks, method=method, steps=4)
        check(losses.grad(False, tasks, h), compiled)
