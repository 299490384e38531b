"""Scores through an unrolled training against finite differences of trainings; interrupted runs; low precision."""

import pytest
import torch

import hypergrad as hg
from hypergrad import influence
from influence_cases import N, Q, loss, queries, tensors

T = 12
F64 = torch.float64


def start():
    torch.manual_seed(0)
    w = {"rows": 0.1 * torch.randn(3, 3, dtype=F64), "last": 0.1 * torch.randn(1, 3, dtype=F64)}
    return {"w": w, "m": {name: torch.zeros_like(x) for name, x in w.items()}, "count": torch.tensor(0)}


def step(state, weights, t):
    """A step of SGD with momentum on the batch of this t, with a decreasing step size and noise."""
    x, y, _, _ = tensors()
    rows = torch.arange(N)[t % 3 :: 3]
    value = (weights[rows] * loss(state["w"], (x[rows], y[rows]))).mean()
    grads = torch.autograd.grad(value, list(state["w"].values()), create_graph=True)
    m = {name: 0.5 * v + g for (name, v), g in zip(state["m"].items(), grads, strict=True)}
    noise = 0.01 * torch.randn(3, 3, dtype=F64)
    w = {name: v - 0.5 / (1 + 0.1 * t) * m[name] for name, v in state["w"].items()}
    return {"w": w | {"rows": w["rows"] + noise}, "m": m, "count": state["count"] + 1}


def query_loss(state, batch):
    return loss(state["w"], batch)


def trained(weights):
    """The losses of the queries after a training in plain torch."""
    torch.manual_seed(5)
    state = start()
    torch.manual_seed(5)
    for t in range(T):
        state = step({**state, "w": {k: v.detach().requires_grad_() for k, v in state["w"].items()}}, weights, t)
        state["m"] = {k: v.detach() for k, v in state["m"].items()}
    return query_loss(state, queries(Q)[0]).detach()


def called(**options):
    begin = start()
    torch.manual_seed(5)
    case = {"examples": N, "queries": queries(2), "steps": T, "with_time": True}
    return influence.unrolled(options.pop("step", step), begin, query_loss, **(case | options))


def test_scores_are_derivatives_of_the_training():
    result = called()
    torch.testing.assert_close(result.query_losses, trained(torch.ones(N, dtype=F64)), rtol=1e-12, atol=0)
    h, eye = 1e-5, torch.eye(N, dtype=F64)
    expected = torch.stack([(trained(1 + h * row) - trained(1 - h * row)) / (2 * h) for row in eye], 1)
    torch.testing.assert_close(result.scores, expected, rtol=0, atol=1e-8)
    assert result.residual is None and "no system" in result.report()


def test_on_a_convex_problem_long_training_gives_the_influence_functions():
    from influence_cases import batches, dense, penalty, solution

    w = solution()
    x, y, _, _ = tensors()

    def descend(params, weights):
        value = (weights * loss(params, (x, y))).mean() + penalty(params)
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
        return {name: v - 0.8 * g for (name, v), g in zip(params.items(), grads, strict=True)}

    zeros = {name: torch.zeros_like(v) for name, v in w.items()}
    result = influence.unrolled(descend, zeros, loss, examples=N, queries=queries(), steps=300)
    torch.testing.assert_close(result.scores, torch.tensor(dense()), rtol=0, atol=1e-8)
    assert len(batches()) == 4


@pytest.mark.parametrize("segments", [None, 1, 5])
def test_a_folder_changes_nothing(tmp_path, segments):
    whole, torch_state = called(), torch.get_rng_state()
    parts = called(folder=tmp_path, segments=segments)
    assert torch.equal(torch.get_rng_state(), torch_state)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(parts.query_losses, whole.query_losses, rtol=0, atol=0)
    again = called(folder=tmp_path, segments=segments)
    assert torch.equal(again.scores, parts.scores) and torch.equal(again.query_losses, parts.query_losses)


@pytest.mark.parametrize("fails_at", [1, 5, 13, 20, 24])
def test_an_interrupted_run_continues_from_its_folder(tmp_path, fails_at):
    expected, calls = called(folder=tmp_path / "whole", segments=4), []

    def failing(state, weights, t):
        calls.append(t)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return step(state, weights, t)

    with pytest.raises(KeyboardInterrupt):
        called(folder=tmp_path / "cut", segments=4, step=failing)
    result = called(folder=tmp_path / "cut", segments=4, step=failing)
    assert torch.equal(result.scores, expected.scores)
    total = []
    called(folder=tmp_path / "counted", segments=4, step=lambda *a: total.append(0) or step(*a))
    assert len(calls) <= len(total) + 2 * 3 + 1  # at most one segment is repeated


def test_a_folder_of_another_run(tmp_path):
    called(folder=tmp_path, segments=3)
    for other in ({"segments": 4}, {"segments": 3, "steps": T + 3}, {"segments": 3, "examples": N + 1}):
        with pytest.raises(ValueError, match="holds another run"):
            called(folder=tmp_path, **other)
    for other in (queries(2)[:1], [tuple(x.flip(0) for x in batch) for batch in queries(2)]):
        with pytest.raises(ValueError, match="holds the reverse pass of other queries"):
            called(folder=tmp_path, segments=3, queries=other)
    with pytest.raises(ValueError, match="pass folder="):
        called(segments=3)
    with pytest.raises(ValueError, match="the iterates of another step"):  # an error although the run is complete
        called(folder=tmp_path, segments=3, step=lambda state, *rest: step(step(state, *rest), *rest))

    calls = []

    def changing(state, weights, t):
        calls.append(t)
        state = step(state, weights, t)
        return {**state, "m": {name: v + (len(calls) > T) for name, v in state["m"].items()}}

    with pytest.raises(RuntimeError, match="gave other numbers than before"):
        called(folder=tmp_path / "other", segments=3, step=changing)


def test_batches():
    x, y, _, _ = tensors()
    given = [(x[i % N :], y[i % N :], torch.arange(i % N, N)) for i in range(T)]

    def on_batch(params, weights, t, batch):
        value = (weights[batch[2]] * loss(params, batch[:2])).mean()
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
        return {name: v - 0.1 * g for (name, v), g in zip(params.items(), grads, strict=True)}

    case = {"examples": N, "queries": queries(), "steps": T}
    plain = influence.unrolled(on_batch, start()["w"], loss, batches=given, **case)
    timed = influence.unrolled(lambda w, o, t: on_batch(w, o, t, given[t]), start()["w"], loss, with_time=True, **case)
    assert torch.equal(plain.scores, timed.scores)


def test_scalar_params_with_a_folder(tmp_path):
    x = torch.tensor([1.0, 3.0], dtype=F64)
    mean = lambda w, weights: w - 0.5 * (weights * (w - x)).mean()  # noqa: E731
    case = {"examples": 2, "queries": [torch.ones(1, dtype=F64)], "steps": 6}
    zero = torch.zeros((), dtype=F64)
    whole = influence.unrolled(mean, zero, lambda w, q: w * q, **case)
    parts = influence.unrolled(mean, zero, lambda w, q: w * q, folder=tmp_path, **case)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-12, atol=0)


def test_batches_with_a_folder(tmp_path):
    x, y, _, _ = tensors()
    given = [(x[i:], y[i:]) for i in range(T)]

    def on_batch(params, weights, t, batch):
        value = (weights[t:] * loss(params, batch)).mean()
        grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
        return {name: v - 0.1 * g for (name, v), g in zip(params.items(), grads, strict=True)}

    case = {"examples": N, "queries": queries(), "steps": T, "batches": given}
    whole = influence.unrolled(on_batch, start()["w"], loss, **case)
    parts = influence.unrolled(on_batch, start()["w"], loss, folder=tmp_path, **case)
    torch.testing.assert_close(parts.scores, whole.scores, rtol=1e-10, atol=1e-14)


def test_low_precision_warns():
    x = torch.tensor([1.0, 3.0])
    mean = lambda w, weights: w - 0.5 * (weights * (w - x)).mean()  # noqa: E731
    case = {"examples": 2, "queries": [torch.ones(1)], "steps": 2}
    with pytest.warns(hg.HypergradientWarning, match="below float32"):
        influence.unrolled(
            lambda w, weights: mean(w, weights).bfloat16(),
            torch.zeros((), dtype=torch.bfloat16),
            lambda w, q: w * q,
            **case,
        )
    with pytest.warns(hg.HypergradientWarning, match="autocast is on"), torch.autocast("cpu", torch.bfloat16):
        influence.unrolled(mean, torch.zeros(()), lambda w, q: w * q, **case)
    with pytest.raises(ValueError, match="query_loss must give a tensor"):
        influence.unrolled(mean, torch.zeros(()), lambda w, q: w, **case)
