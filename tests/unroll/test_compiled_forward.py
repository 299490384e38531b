"""Compiled steps in forward mode agree with uncompiled ones; a step that cannot be compiled gives the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_compiled import F64, UNCOMPILED, X, Y, both, check, descent, draw, inner, outer, start  # pyright: ignore[reportMissingImports]
from torch import Tensor

import hypergrad as hg
from hypergrad.unroll import forward, reverse


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("steps", [0, 1, 2, 13])
def test_compiled_steps_agree_for_every_chunk(chunk, steps):
    w, lam = start()
    compiled = forward(descent, w, lam, outer, steps, chunk=chunk, compile="eager")
    check(forward(descent, w, lam, outer, steps), compiled)
    torch.testing.assert_close(compiled.grads, reverse(descent, w, lam, outer, steps).grads, rtol=1e-10, atol=0)


def test_evaluations_are_those_documented():
    """The step is evaluated twice for comparison, and once for each chunk of tangents at each step."""
    w, lam = start()
    for chunk, due in ((None, 22), (1, 62)):
        calls = [forward(descent, w, lam, outer, 20, chunk=chunk, compile="eager") for _ in range(2)]
        assert calls[1].evaluations == due and "an earlier call built" in (calls[1].compiled or "")


def test_schedule_whose_entries_are_reached_one_after_the_other():
    w, lam = draw(3, seed=2), draw(7).mul(0.1).requires_grad_()

    def step(w, lam, t):
        return w - lam[t].exp() * 0.1 * 0.9**t * (X.T @ (X @ w - Y)) / 12

    check(*both(forward, step, w, lam, outer, 7, with_time=True, chunk=3))
    check(*both(forward, step, w, lam, outer, 4, with_time=True))  # the last three are never reached


def test_batches_are_drawn_once_and_in_order():
    w, lam = start()
    batches = [{"x": x, "y": y} for x, y in zip(X.split(5), Y.split(5), strict=True)] * 3  # 5, 5, 2 rows

    def step(w, lam, t, batch):
        leaf = w if w.requires_grad else w.detach().requires_grad_()
        return w - 0.3 * torch.autograd.grad(inner(leaf, lam, **batch), leaf, create_graph=True)[0]

    plain = forward(step, w, lam, outer, 9, batches=batches)
    for _ in range(2):
        iterator = iter(batches)
        check(plain, forward(step, w, lam, outer, 9, batches=lambda _, i=iterator: next(i), compile="eager"))
    iterator = iter(batches[:4])
    with pytest.raises(ValueError, match="ended at step 4"):
        forward(step, w, lam, outer, 9, batches=lambda _: next(iterator), compile="eager")


def test_a_hyperparameter_that_only_the_start_depends_on_counts():
    lam = [draw(3, seed=k).requires_grad_() for k in (2, 3)]

    def step(w, lam):
        return descent(w, 0.3 * lam[1])

    check(*both(forward, step, 2 * lam[0], lam, lambda w, lam: outer(w, lam[1]), 6))


def test_continues_from_a_compiled_or_an_uncompiled_result():
    """Hyperparameters change in between, and no step has depended on some of their entries so far."""
    w, schedule = draw(3, seed=2), draw(9).mul(0.1)

    def step(w, lam, t):
        return w - lam[t].exp() * 0.1 * (X.T @ (X @ w - Y)) / 12

    found = []
    for kinds in ((False,) * 3, ("eager", False, "eager"), (False, "eager", "eager")):
        result: Any = w
        for turn, compile in enumerate(kinds):
            lam = (schedule + 0.01 * turn).requires_grad_()
            result = forward(step, result, lam, outer, 3, with_time=True, compile=compile)
        found.append(result)
    assert found[1].steps == 9
    check(found[0], found[1])
    check(found[0], found[2])


@pytest.mark.parametrize("differentiate", [forward, reverse])
def test_other_hparams_may_require_grad_at_the_next_call(differentiate):
    def step(w, lam):
        return 0.5 * w + 0.3 * lam[0] + lam[1] ** 2

    w = draw(3)
    for place in (0, 1):
        lam = [torch.full((3,), 1.0 + k, dtype=F64, requires_grad=k == place) for k in range(2)]
        due, got = (differentiate(step, w, lam, lambda w, _: w.square().sum(), 4, compile=c) for c in (False, "eager"))
        assert got.compiled
        torch.testing.assert_close(got.grads, due.grads, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [name for name in UNCOMPILED if name != "iterator"])
def test_a_step_that_cannot_be_compiled_is_evaluated_uncompiled(name):
    step, reason = UNCOMPILED[name]
    w, lam = start()
    for _ in range(2):
        torch.manual_seed(0)
        with pytest.warns(hg.HypergradientWarning, match=reason):
            compiled = forward(step, w, lam, outer, 6, compile="eager")
        after = torch.rand(3)
        torch.manual_seed(0)
        check(forward(step, w, lam, outer, 6), compiled)
        assert torch.equal(torch.rand(3), after) and compiled.compiled is None


def test_a_change_between_two_calls_is_noticed():
    w, lam, calls = *start(), []

    def step(w, lam):
        calls.append(1)
        return 0.5 * w + lam * (1 + 1e-3 * (len(calls) % 7))

    with pytest.warns(hg.HypergradientWarning, match="changes between calls"):
        assert forward(step, w, lam, outer, 6, compile="eager").compiled is None


def test_a_batch_that_cannot_be_compiled_ends_compilation_at_its_step():
    """The steps before it are not evaluated again."""
    w, lam = start()

    def step(w, lam, t, batch):
        return 0.5 * w + (batch[1] if isinstance(batch, tuple) else batch) * lam + 0.1 * torch.rand(3, dtype=F64)

    batches = [*torch.linspace(0.1, 1.0, 4, dtype=F64), *((object(), b) for b in torch.ones(3, dtype=F64))]
    results, states = [], []
    for compile in (False, "eager"):
        torch.manual_seed(0)
        if compile:
            with pytest.warns(hg.HypergradientWarning, match="neither tensors nor plain values"):
                results.append(forward(step, w, lam, outer, 7, batches=batches, compile=compile))
        else:
            results.append(forward(step, w, lam, outer, 7, batches=batches))
        states.append(torch.get_rng_state())
    check(*results)
    assert torch.equal(*states) and results[1].compiled is None


@pytest.mark.parametrize("differentiate", [forward, reverse])
def test_hparams_in_a_closure_are_noticed(differentiate):
    """The dtype is float32, and the derivative in λ is much smaller than that in w."""
    w, lam = draw(50).float(), torch.tensor(1.0, requires_grad=True)

    def step(w, argument):
        return 0.5 * w + 1e-4 * lam + 1e-4 * argument

    with pytest.warns(hg.HypergradientWarning, match="in place of its argument"):
        compiled = differentiate(step, w, lam, lambda w, lam: w.square().sum(), 6, compile="eager")
    due = differentiate(step, w, lam, lambda w, lam: w.square().sum(), 6)
    torch.testing.assert_close(compiled.grads, due.grads)


@pytest.mark.slow
def test_weight_norm_and_sparse_gradients_are_differentiated_rightly():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2)).double()
    bag = torch.nn.Embedding(5, 3, sparse=True).double()
    function, words = hg.nn.functional(layer), torch.tensor([0, 2, 3])
    w = {name: x.detach() for name, x in layer.named_parameters()}
    lam = torch.tensor(0.1, dtype=F64, requires_grad=True)

    def step(w, lam):
        table, *rest = [x if x.requires_grad else x.detach().requires_grad_() for x in (w[0], *w[1].values())]
        named = dict(zip(w[1], rest, strict=True))
        loss = function(named, F.embedding(words, table, sparse=True)).square().mean()
        g = torch.autograd.grad(loss, [table, *rest], create_graph=True)
        new = [x - lam * y for x, y in zip((table, *rest), g, strict=True)]
        return new[0], dict(zip(w[1], new[1:], strict=True))

    carry = bag.weight.detach(), w
    loss = lambda carry, lam: function(carry[1], carry[0]).square().sum()  # noqa: E731
    plain, compiled = both(forward, step, carry, lam, loss, 4)
    check(plain, compiled)
    # The steps of reverse mode take dense gradients for their second derivatives.
    torch.testing.assert_close(
        reverse(step, carry, lam, loss, 4, compile="eager").grads, plain.grads, rtol=1e-10, atol=0
    )


def test_derivatives_that_forward_mode_cannot_take_are_errors():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return g.detach() * ctx.saved_tensors[0].cos()

    w, lam = start()
    with pytest.raises(RuntimeError, match="transpose disagree"):
        forward(lambda w, lam: Hidden.apply(w) * 0.5 + lam, w, lam, outer, 3, compile="eager")
    with pytest.raises(TypeError, match="name of a backend"):
        forward(descent, w, lam, outer, 4, compile=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ZeroDivisionError):
        forward(lambda w, lam: w * lam / (1 // 0), w, lam, outer, 4, compile="eager")
