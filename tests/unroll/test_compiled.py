"""Compiled steps agree with uncompiled ones for every form of step; a step that is not compiled gives the reason."""

from __future__ import annotations

import re
import shutil
import warnings
from collections import OrderedDict
from typing import Any, TypeAlias

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hypergrad as hg
from hypergrad.unroll import ForwardResult, ReverseResult, forward, reverse

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Y = draw(12, 3), draw(12, seed=1)


def inner(w: Tensor, lam: Tensor, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return F.softplus(x @ w - y).mean() + (lam.exp() * w.square()).sum() / 2


def outer(w: Tensor, lam: Tensor) -> Tensor:
    return (X[:5] @ w - Y[:5]).square().mean() + lam.sum() / 10


def descent(w: Tensor, lam: Tensor, *rest: Tensor) -> Tensor:
    leaf = w if w.requires_grad else w.detach().requires_grad_()
    return w - 0.3 * torch.autograd.grad(inner(leaf, lam), leaf, create_graph=True)[0]


def start() -> tuple[Tensor, Tensor]:
    return draw(3, seed=2), draw(3, seed=3).mul(0.3).requires_grad_()


Result: TypeAlias = "ReverseResult | ForwardResult"
either = pytest.mark.parametrize("differentiate", [reverse, forward])


def both(differentiate: Any, step: Any, w: Any, lam: Any, loss: Any, steps: int, **options: Any) -> list[Any]:
    """Results of uncompiled and compiled steps from the same random state, which both must leave in the same state."""
    results, states = [], []
    for compile in (False, "eager"):
        torch.manual_seed(0)
        memory = {"memory": "iterates"} if differentiate is reverse and not compile else {}
        results.append(differentiate(step, w, lam, loss, steps, compile=compile, **options | memory))
        states.append(torch.get_rng_state())
    assert results[0].compiled is None and "compiled by eager" in results[1].compiled
    assert torch.equal(*states)
    return results


def check(plain: Result, compiled: Result) -> None:
    rtol = 1e-12 if isinstance(plain, ReverseResult) else 1e-10
    for name in ("grads", "start_grads", "params", "outer_value"):
        trees: list[Any] = [getattr(r, name, None) for r in (plain, compiled)]  # forward mode has no start_grads
        one, other = map(optree.tree_leaves, trees)
        for x, y in zip(one, other, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(y, x, rtol=rtol, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [{"memory": "iterates"}, {"memory": "sqrt"}, {"checkpoints": 1}, {"checkpoints": 3}, {"memory": "1KiB"}, {}],
    ids=str,
)
@pytest.mark.parametrize("steps", [0, 1, 2, 13])
def test_compiled_steps_agree_for_every_memory(options, steps):
    w, lam = start()
    compiled = reverse(descent, w, lam, outer, steps, compile="eager", **options)
    check(reverse(descent, w, lam, outer, steps), compiled)


def test_truncated():
    w, lam = start()
    plain, compiled = both(reverse, descent, w, lam, outer, 12, truncate=4)
    torch.testing.assert_close(compiled.grads, plain.grads, rtol=1e-12, atol=0)
    assert compiled.start_grads is None


def test_evaluations_are_those_documented():
    w, lam = start()
    reverse(descent, w, lam, outer, 20, memory="iterates", compile="eager")
    assert reverse(descent, w, lam, outer, 20, memory="iterates", compile="eager").evaluations == 41
    assert reverse(descent, w, lam, outer, 200, compile="eager").evaluations < 4 * 200


RULES = {
    "SGD": hg.diff_optimizers.SGD(lr=0.2, momentum=lambda h: h["m"].sigmoid(), nesterov=True),
    "Adam": hg.diff_optimizers.Adam(lr=lambda h: h["lr"].exp(), betas=(0.8, 0.9)),
    "AdamW": hg.diff_optimizers.AdamW(lr=lambda h: h["lr"].exp(), weight_decay=lambda h: h["m"].exp()),
    "per step": hg.diff_optimizers.SGD(lr=lambda h: hg.diff_optimizers.PerStep(h["each"].exp())),
}


@either
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rules(differentiate, rule):
    lam = {"lr": torch.tensor(-2.0, dtype=F64), "m": torch.tensor(-1.0, dtype=F64), "each": draw(9).mul(0.1) - 2}
    lam = {name: x.requires_grad_() for name, x in lam.items()}
    w = {"a": draw(3, seed=4), "b": draw(1, seed=5)[0]}

    def loss(w, h):
        return F.softplus(X @ w["a"] + w["b"] - Y).mean() + w["a"].square().sum() / 10

    def last(carry, h):
        return outer(carry[0]["a"], h["lr"]) + h["m"] + h["each"].sum()  # not every rule uses every hyperparameter

    check(*both(differentiate, rule.on(loss), (w, rule.init(w)), lam, last, 9))


def test_learned_schedule_by_time():
    w, lam = draw(3, seed=2), draw(7).mul(0.1).requires_grad_()

    def step(w, lam, t):
        return w - lam[t].exp() * 0.1 * 0.9**t * (X.T @ (X @ w - Y)) / 12

    check(*both(reverse, step, w, lam, outer, 7, with_time=True))


def slower(w: Tensor, factor: Any) -> Tensor:
    return w - 0.3 * factor * (w - 2)


COUNTED = {  # by the number of the step, or by a tensor that counts
    "t / 3": lambda w, n, t: (slower(w, 0.5 / (t / 3 + 1)), n),
    "power": lambda w, n, t: (slower(w, 0.9**t), n),
    "whole numbers": lambda w, n, t: (slower(w, t % 3 + t // 2), n),
    "branch": lambda w, n, t: (slower(w, torch.where(torch.as_tensor(t) < 3, 0.3, 0.1 * w)), n),
    "made a tensor": lambda w, n, t: (slower(w, torch.tensor(t / 3) + torch.tensor(t + 1, dtype=F64)), n),
    "clamped": lambda w, n, t: (slower(w, 1 / torch.as_tensor(t).clamp(min=1)), n),
    "counter": lambda w, n, t: (slower(w, 0.5 / (n + 1)), n + 1),
    "function of a counter": lambda w, n, t: (slower(w, torch.exp(-n)), n + 1),
    "index": lambda w, n, t: (slower(w, X[n, 0] + X[t, t % 3]), n + 1),
    "index of a later axis": lambda w, n, t: (slower(w, X[2:5, n % 3] + X[..., t % 3][4:7] + X[1, t % 3]), n + 1),
}


@either
@pytest.mark.parametrize(
    ("counted", "counter"),
    [*((each, torch.int64) for each in COUNTED.values()), (COUNTED["counter"], torch.int32)],
    ids=[*COUNTED, "counter, int32"],
)
def test_the_step_number_acts_as_a_python_int_and_a_counting_tensor_as_a_tensor(differentiate, counted, counter):
    """1 / (t + 1) is computed in double precision, and 1 / (n + 1) for a tensor n in single precision."""
    w, lam = start()

    def step(carry, lam, t):
        w, n = counted(*carry, t)
        return w * lam.sin(), n

    given = step, (w, torch.zeros((), dtype=counter)), lam, lambda carry, lam: outer(carry[0], lam), 7
    check(*both(differentiate, *given, with_time=True))


@either
def test_params_of_one_number_keep_their_dtype_beside_the_number_of_the_step(differentiate):
    lam, w = torch.tensor(0.5, requires_grad=True), torch.tensor(1.0)

    def step(w, lam, t):
        return w - lam * 0.3 / (t + 1) * 0.9**t * w

    plain, compiled = both(differentiate, step, w, lam, lambda w, lam: w.square(), 7, with_time=True)
    assert compiled.params.dtype == torch.float32
    torch.testing.assert_close(compiled.grads, plain.grads, rtol=1e-6, atol=0)


@either
def test_batches_of_two_sizes_are_compiled_once_each(differentiate):
    w, lam = start()
    batches = [{"x": x, "y": y} for x, y in zip(X.split(5), Y.split(5), strict=True)] * 3  # 5, 5, 2 rows

    def step(w, lam, t, batch):
        leaf = w if w.requires_grad else w.detach().requires_grad_()
        return w - 0.3 * torch.autograd.grad(inner(leaf, lam, **batch), leaf, create_graph=True)[0]

    check(*both(differentiate, step, w, lam, outer, 9, batches=batches))
    check(*both(differentiate, step, w, lam, outer, 9, batches=lambda t: batches[t]))


@pytest.mark.parametrize(
    ("differentiate", "options"),
    [(reverse, {"memory": "iterates"}), (reverse, {"memory": "sqrt"}), (forward, {}), (forward, {"chunk": 1})],
)
@pytest.mark.parametrize("kind", ["dropout", "randn", "batches"])
def test_random_numbers_are_those_of_the_steps(kind, differentiate, options):
    w, lam = start()

    def step(w, lam, *rest):
        leaf = w if w.requires_grad else w.detach().requires_grad_()
        x = F.dropout(X, 0.4) if kind == "dropout" else X + 0.1 * torch.randn_like(X) if kind == "randn" else rest[1]
        loss = inner(leaf, lam, x) + (torch.rand(3, dtype=F64) * leaf).sum() / 5
        return w - 0.3 * torch.autograd.grad(loss, leaf, create_graph=True)[0]

    if kind == "batches":
        options = options | {"batches": lambda t: X + 0.1 * torch.randn(12, 3, dtype=F64)}
    for _ in range(2):  # the second time with functions that are there
        check(*both(differentiate, step, w, lam, outer, 11, **options))


@either
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_containers_integers_and_transposed_tensors(differentiate, container):
    w = container(z=draw(3, 4, seed=2).T, count=torch.tensor(3), flag=torch.tensor(True))
    lam = [draw(4, 3).requires_grad_(), draw(2)]  # the second is constant

    def step(w, lam):
        return {"flag": ~w["flag"], "count": w["count"] + 1, "z": (0.5 * w["z"] + lam[0] / w["count"]).T.contiguous().T}

    def loss(w, lam):
        return (w["z"] * lam[1].sum()).square().sum()

    plain, compiled = both(differentiate, step, w, lam, loss, 6)
    check(plain, compiled)
    assert compiled.params["count"] == 9 and type(compiled.params) is container


def test_complex():
    w, lam = torch.complex(draw(3), draw(3, seed=1)), torch.complex(draw(3, seed=2), draw(3)).requires_grad_()
    check(*both(reverse, lambda w, lam: (0.5 + 0.2j) * w + lam**2, w, lam, lambda w, lam: w.abs().square().sum(), 5))


@either
def test_start_computed_from_hparams_and_hooks(differentiate):
    results = []
    for compile in (False, "eager"):
        lam = torch.tensor([0.1, 0.2, 0.3], dtype=F64, requires_grad=True)
        lam.register_hook(lambda g: -g)
        results.append(differentiate(descent, lam * 2, lam, outer, 6, compile=compile))
    check(*results)


def test_live_tensors_are_read_anew():
    model = torch.nn.BatchNorm1d(3).double()
    weight = model.weight.detach()

    def step(w, lam):
        return 0.5 * w + lam * (X * weight).mean(0)

    w, lam = start()
    reverse(step, w, lam, outer, 5, compile="eager")
    with torch.no_grad():
        weight.mul_(3)
    check(*both(reverse, step, w, lam, outer, 5))


@either
def test_a_changed_number_in_a_closure_is_noticed(differentiate):
    lr, (w, lam) = [0.3], start()

    def step(w, lam):
        leaf = w if w.requires_grad else w.detach().requires_grad_()
        return w - lr[0] * torch.autograd.grad(inner(leaf, lam), leaf, create_graph=True)[0]

    for lr[0] in (0.3, 0.29, 0.3):
        check(*both(differentiate, step, w, lam, outer, 8))


@either
def test_a_change_that_the_first_step_does_not_show_is_noticed(differentiate):
    """A momentum that begins at zero, and the distance from the start, do not change the first step."""
    numbers, (w, lam) = {"momentum": 0.9, "strength": 0.5}, start()

    def step(carry, lam):
        w, m = carry
        leaf = w if w.requires_grad else w.detach().requires_grad_()
        loss = inner(leaf, lam) + numbers["strength"] * (leaf - begun).square().sum()
        m = numbers["momentum"] * m + torch.autograd.grad(loss, leaf, create_graph=True)[0]
        return w - 0.1 * m, m

    begun = w
    for name, value in (("momentum", 0.5), ("strength", 2.0), ("momentum", 0.9)):
        check(*both(differentiate, step, (w, torch.zeros_like(w)), lam, lambda c, lam: outer(c[0], lam), 8))
        numbers[name] = value
    check(*both(differentiate, step, (w, torch.zeros_like(w)), lam, lambda c, lam: outer(c[0], lam), 8))


def test_infinite_entries_of_the_state_hide_no_difference():
    """The least loss so far begins at infinity, and a number in a closure changes between two calls."""
    lr, (w, lam) = [0.3], start()

    def step(carry, lam):
        return carry[0] - lr[0] * (carry[0] - lam), carry[1]

    for lr[0] in (0.3, 0.1):
        carry = w, torch.tensor(torch.inf, dtype=F64)
        check(*both(reverse, step, carry, lam, lambda c, lam: outer(c[0], lam), 5, allow_detached=True))


def test_data_of_another_shape_is_compiled_anew():
    rows, (w, lam) = [X], start()

    def step(w, lam):
        return w - 0.1 * (rows[0].T @ (rows[0] @ w)) / len(rows[0]) + 0.1 * lam

    for rows[0] in (X, X[:7], X):
        check(*both(reverse, step, w, lam, outer, 6))


def test_autocast_is_that_of_the_call():
    w, lam = draw(3, seed=2).float(), draw(3, seed=3).float().requires_grad_()
    x = X.float()

    def step(w, lam):
        return w - 0.1 * (x.T @ (x @ w.unsqueeze(1))).squeeze(1).to(w.dtype) / len(x) + 0.1 * lam

    for enabled in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            plain, compiled = (
                reverse(step, w, lam, lambda w, lam: w.square().sum(), 5, compile=c) for c in (False, "eager")
            )
        assert compiled.compiled is not None
        torch.testing.assert_close(compiled.grads, plain.grads, rtol=1e-5, atol=1e-6)


class Model:
    """An object whose method is a step, and whose instances cannot have weak references."""

    __slots__ = ()

    def step(self, w, lam):
        return descent(w, lam)


def test_methods():
    w, lam = start()
    check(*both(reverse, Model().step, w, lam, outer, 5))


ITERATOR = iter(range(10**6))
UNCOMPILED = {
    "item": (lambda w, lam: 0.5 * w + lam * float(w.detach().sum() * 0 + 1), "a number is read"),
    "branch": (lambda w, lam: 0.5 * w + lam if w.sum() > -1e9 else lam, "a number is read"),
    "iterator": (lambda w, lam: 0.5 * w + lam * (1 + 1e-3 * (next(ITERATOR) % 7)), "not replayed"),
    "multinomial": (lambda w, lam: 0.5 * w + lam[torch.multinomial(torch.ones(3), 3)], "multinomial"),
    "generator": (
        lambda w, lam: 0.5 * w + lam * torch.rand(3, generator=torch.Generator(), dtype=F64),
        "rand draws|Generator",
    ),
}


@pytest.mark.parametrize(("step", "reason"), UNCOMPILED.values(), ids=UNCOMPILED)
def test_a_step_that_cannot_be_compiled_is_evaluated_uncompiled(step, reason):
    w, lam = start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        # An iterator cannot be replayed either, so that only memory="graph" is right.
        compiled = reverse(step, w, lam, outer, 1 if reason.startswith("not") else 6, compile="eager")
    assert compiled.compiled is None or reason.startswith("not")
    if not reason.startswith("not"):
        assert any(re.search(reason, str(x.message)) for x in caught), [str(x.message) for x in caught]
        torch.manual_seed(0)
        check(reverse(step, w, lam, outer, 6), compiled)


def test_a_step_that_cannot_be_compiled_is_tried_once():
    (w, lam), calls = start(), []

    def step(w, lam):
        calls.append(1)
        return 0.5 * w + lam * (w.detach().sum().item() * 0 + 1)

    numbers = []
    for _ in range(2):
        with pytest.warns(hg.HypergradientWarning, match="a number is read"):
            warnings.simplefilter("ignore", hg.LostDerivative)  # no check, which evaluates once more
            reverse(step, w, lam, outer, 6, memory="iterates", compile="eager")
        numbers.append(len(calls))
    assert numbers[1] - numbers[0] == 11 < numbers[0]


def test_amplified_rounding_is_not_taken_for_a_difference():
    """Adam's first step divides gradients by their own size, even if they are nothing but rounding errors."""
    rule = hg.diff_optimizers.Adam(lr=0.01, eps=1e-12)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 0] - x[:, 1] - (x[:, 0] - x[:, 1] + 1e-7 * x[:, 2])

    def loss(w, lam):
        return (x @ w).sin().mean() + lam * 0.1 * w.square().sum()

    w, lam = torch.full((4,), 1e-3), torch.tensor(1.0, requires_grad=True)
    result = reverse(rule.on(loss), (w, rule.init(w)), lam, lambda c, lam: c[0].square().sum(), 5, compile="aot_eager")
    assert "compiled by aot_eager" in (result.compiled or "")


def test_an_iterator_outside_is_noticed():
    w, lam = start()
    with pytest.warns(hg.HypergradientWarning, match="changes between calls"), pytest.raises(RuntimeError):
        reverse(UNCOMPILED["iterator"][0], w, lam, outer, 6, memory="iterates", compile="eager")


def test_hparams_in_a_closure_are_noticed():
    w, lam = start()

    def step(w, argument):
        return 0.5 * w + lam * 2 + 0 * argument

    with pytest.warns(hg.HypergradientWarning, match="in place of its argument"):
        compiled = reverse(step, w, lam, outer, 6, compile="eager")
    check(reverse(step, w, lam, outer, 6), compiled)


def test_changing_numbers_in_batches_are_refused():
    w, lam = start()
    with pytest.warns(hg.HypergradientWarning, match="more than 8 forms"):
        compiled = reverse(
            lambda w, lam, t, b: 0.5 * w + b * lam,
            w,
            lam,
            outer,
            12,
            batches=[0.1 * k for k in range(12)],
            compile="eager",
        )
    assert compiled.compiled is None


def test_errors_of_the_step_pass_unchanged():
    w, lam = start()
    with pytest.raises(ZeroDivisionError):
        reverse(lambda w, lam: w * lam / (1 // 0), w, lam, outer, 4, compile="eager")
    with pytest.raises(ValueError, match="keep no graphs"):
        reverse(descent, w, lam, outer, 4, memory="graph", compile=True)
    with pytest.raises(TypeError, match="name of a backend"):
        reverse(descent, w, lam, outer, 4, compile=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="too small"):
        reverse(descent, w, lam, outer, 4, memory="10B", compile="eager")


def test_an_unknown_backend_is_named():
    w, lam = start()
    with pytest.warns(hg.HypergradientWarning, match="nonsense"):
        compiled = reverse(descent, w, lam, outer, 4, compile="nonsense")
    check(reverse(descent, w, lam, outer, 4), compiled)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    ("differentiate", "random", "options"),
    [(reverse, False, {}), (reverse, True, {}), (forward, True, {}), (forward, True, {"chunk": 2})],
)
def test_inductor(differentiate, random, options):
    w, lam = start()

    def step(w, lam):
        leaf = w if w.requires_grad else w.detach().requires_grad_()
        x = F.dropout(X, 0.3) if random else X
        return w - 0.3 * torch.autograd.grad(inner(leaf, lam, x), leaf, create_graph=True)[0]

    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        results.append(differentiate(step, w, lam, outer, 30, compile=compile, **options))
    plain, compiled = results
    assert "compiled by inductor" in (compiled.compiled or "")
    torch.testing.assert_close((compiled.grads, compiled.params), (plain.grads, plain.params), rtol=1e-10, atol=1e-14)
