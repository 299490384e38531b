"""Compiled directions have the numbers, random numbers, running statistics and counts of uncompiled directions."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hypergrad as hg

F64 = torch.float64
X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
Y = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=F64)


class Program:
    """A model with live hparams, and both losses as functions of a batch."""

    def __init__(self, norm: bool = False, dropout: float = 0.0):
        torch.manual_seed(0)
        norms = [nn.BatchNorm1d(4)] if norm else []
        self.model = nn.Sequential(nn.Linear(3, 4), *norms, nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1)).double()
        self.decay = torch.full((2,), -2.0, dtype=F64, requires_grad=True)
        self.strength = 1.0

    def valid(self, batch: Any) -> Tensor:
        return F.mse_loss(self.model(batch["x"]).squeeze(1), batch["y"])

    def train(self, batch: Any) -> Tensor:
        squares = torch.stack([p.square().sum() for p in self.model.parameters()])
        return self.strength * self.valid(batch) + (self.decay.exp().repeat(len(squares) // 2) * squares).sum() / 20


def batch(t: int, size: int = 8) -> dict[str, Tensor]:
    rows = torch.arange(size).add(3 * t) % 40
    return {"x": X[rows], "y": Y[rows]}


ALGORITHMS = {
    "SOBA": (hg.bilevel.SOBA, {}),
    "MA-SOBA": (hg.bilevel.SOBA, {"average": 0.3}),
    "AmIGO": (hg.bilevel.AmIGO, {"steps": 3}),
    "stocBiO": (hg.bilevel.AmIGO, {"steps": 2, "warm": False}),
    "F2SA": (hg.bilevel.F2SA, {}),
    "F2SA-4": (hg.bilevel.F2SA, {"order": 4}),
    "BOME": (hg.bilevel.BOME, {}),
    "SAMA": (hg.bilevel.SAMA, {}),
}


def trained(program: Program, name: str, compile: Any, steps: int = 12, sizes=(8,), **options: Any):
    """Params, hparams, running statistics, values and counts after some steps; and the tracker."""
    make, given = ALGORITHMS[name]
    model = program.model
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([program.decay], lr=0.3)]
    if make is hg.bilevel.SAMA:
        given = given | {"optimizer": optimizers[0]}
    tracker = make(model.parameters(), [program.decay], **given, **options)
    torch.manual_seed(1)
    values = []
    for t in range(steps):
        pair = batch(2 * t, sizes[t % len(sizes)]), batch(2 * t + 1, sizes[t % len(sizes)])
        values += tracker.backward(program.valid, program.train, batches=pair, compile=compile)
        for each in (*optimizers, tracker):
            each.step()
        for each in optimizers:
            each.zero_grad()
    state = [*model.state_dict().values(), program.decay.detach(), *tracker.variables, torch.rand(1)]
    return [x.clone() for x in (*state, *values)], dict(tracker.oracles.counts), tracker


def check(plain: Any, compiled: Any) -> None:
    for x, y in zip(plain[0], compiled[0], strict=True):
        torch.testing.assert_close(y, x, rtol=1e-11, atol=1e-13)
    assert plain[1] == compiled[1]


SLOW = ("MA-SOBA", "AmIGO", "stocBiO", "F2SA-4", "BOME")  # beside the others of their kind


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ALGORITHMS]
)
def test_steps_are_those_of_the_algorithm(name):
    check(trained(Program(), name, False), trained(Program(), name, "eager"))


@pytest.mark.parametrize("name", ["SOBA", "F2SA"])
def test_running_statistics(name):
    check(trained(Program(norm=True), name, False), trained(Program(norm=True), name, "eager"))


def test_random_numbers():
    check(trained(Program(dropout=0.3), "SOBA", False), trained(Program(dropout=0.3), "SOBA", "eager"))


def test_random_numbers_that_are_drawn_again_are_not_compiled():
    plain = trained(Program(dropout=0.3), "F2SA", False)
    with pytest.warns(hg.HypergradientWarning, match="compiled directions are off"):
        compiled = trained(Program(dropout=0.3), "F2SA", "eager")
    check(plain, compiled)


@pytest.mark.slow
def test_batches_of_two_sizes():
    check(trained(Program(), "SOBA", False, sizes=(8, 5)), trained(Program(), "SOBA", "eager", sizes=(8, 5)))


@pytest.mark.slow
def test_too_many_batch_sizes_are_evaluated_uncompiled():
    sizes = tuple(range(4, 14))
    plain = trained(Program(), "SOBA", False, sizes=sizes)
    with pytest.warns(hg.HypergradientWarning, match="more than 8 forms"):
        compiled = trained(Program(), "SOBA", "eager", sizes=sizes)
    check(plain, compiled)


def test_frozen_and_loaded_parameters_are_read_at_each_step():
    """Compiled code must use the current values of a frozen layer, and of a state that was loaded in between."""
    results = []
    for compile in (False, "eager"):
        program = Program()
        program.model[0].requires_grad_(False)
        first = trained(program, "SOBA", compile, steps=5)
        with torch.no_grad():
            program.model[0].weight.mul_(2)
        state = {name: x * 1.5 for name, x in program.model.state_dict().items()}
        program.model.load_state_dict(state)
        results.append((first[0] + trained(program, "SOBA", compile, steps=5)[0], first[1]))
    check(*results)


@pytest.mark.slow
def test_a_number_that_changes_is_noticed():
    program = Program()
    tracker = hg.bilevel.SOBA(program.model.parameters(), [program.decay])
    pair = batch(0), batch(1)

    def direction(compile: Any) -> Tensor:
        tracker.backward(program.valid, program.train, batches=pair, compile=compile)
        found, program.decay.grad = program.decay.grad, None
        program.model.zero_grad()
        return found

    for _ in range(3):
        direction("eager")
    program.strength = 2.0
    with pytest.warns(hg.HypergradientWarning, match="has changed since it was compiled"):
        direction("eager")  # the fourth
    assert torch.allclose(direction("eager"), direction(False), rtol=1e-12)


@pytest.mark.slow
def test_data_of_another_shape_is_compiled_anew():
    """A table that the losses read is replaced by one of another size, between two comparisons with the losses."""
    results = []
    for compile in (False, "eager"):
        program, found = Program(), []
        tracker = hg.bilevel.SOBA(program.model.parameters(), [program.decay])
        plain, more = program.train, [X[:3]]
        model = program.model
        program.train = lambda b, f=plain, x=more, m=model: f(b) + m(x[0]).square().mean()
        for rows in (3, 3, 3, 3, 5, 5, 5):
            more[0] = X[:rows]
            tracker.backward(program.valid, program.train, batches=(batch(0), batch(1)), compile=compile)
            found.append(program.decay.grad)
            program.decay.grad = None
            program.model.zero_grad()
        results.append(found)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-11, atol=0)


@pytest.mark.slow
def test_autocast_is_that_of_the_call():
    program = Program()
    program.model.float()
    tracker = hg.bilevel.SOBA(program.model.parameters(), [program.decay])
    pair = tuple({name: x.float() for name, x in batch(t).items()} for t in range(2))

    def value(compile: Any, enabled: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return tracker.backward(program.valid, program.train, batches=pair, compile=compile)[1]  # pyright: ignore[reportReturnType]

    for enabled in (False, False, True, True, False):
        torch.testing.assert_close(value("eager", enabled), value(False, enabled), rtol=1e-6, atol=0)


def test_batches_with_non_finite_directions_are_not_compared():
    """The second batch is not finite, and the code compiled for the first one stays in use."""
    program = Program()
    tracker = hg.bilevel.SOBA(program.model.parameters(), [program.decay], on_nonfinite="ignore")
    bad = {"x": X[:8] * torch.nan, "y": Y[:8]}
    for pair in ((batch(0), batch(1)), (bad, bad), (batch(0), batch(1))):
        program.decay.grad = None
        tracker.backward(program.valid, program.train, batches=pair, compile="eager")
    assert program.decay.grad is not None and bool(program.decay.grad.isfinite().all())


def test_reading_numbers_is_not_compiled():
    program = Program()
    program.train = lambda batch, plain=program.train: plain(batch) * (1 + 0 * float(batch["x"].sum()))  # type: ignore[method-assign]
    plain = trained(program, "SOBA", False, steps=4)
    program = Program()
    program.train = lambda batch, plain=program.train: plain(batch) * (1 + 0 * float(batch["x"].sum()))  # type: ignore[method-assign]
    with pytest.warns(hg.HypergradientWarning, match="a number is read"):
        compiled = trained(program, "SOBA", "eager", steps=4)
    check(plain, compiled)


def test_not_a_number_changes_nothing():
    program = Program()
    tracker = hg.bilevel.SOBA(program.model.parameters(), [program.decay])
    bad = {"x": X[:8] * torch.nan, "y": Y[:8]}
    for t in range(3):
        tracker.backward(program.valid, program.train, batches=(batch(t), batch(t + 1)), compile="eager")
    before = [program.decay.grad.clone(), *(x.clone() for x in tracker.variables)]  # pyright: ignore[reportOptionalMemberAccess]
    for _ in range(2):  # the fourth call compares, the fifth does not
        with pytest.raises(ValueError, match="NaN or infinity"):
            tracker.backward(program.valid, program.train, batches=(bad, bad), compile="eager")
        for x, y in zip([program.decay.grad, *tracker.variables], before, strict=True):
            assert torch.equal(x, y)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "compile needs batches"),
        ({"batches": (batch(0), batch(1)), "scaler": torch.amp.GradScaler("cpu")}, "no GradScaler"),
        ({"batches": [batch(0)]}, "must be a pair"),
        ({"batches": (batch(0), {"x": object()})}, "tensors and plain values"),
    ],
)
def test_bad_input(options, words):
    program = Program()
    tracker = hg.bilevel.SOBA(program.model.parameters(), [program.decay])
    with pytest.raises(TypeError, match=words):
        tracker.backward(program.valid, program.train, compile="eager", **options)
    with pytest.raises(TypeError, match="name of a backend"):
        tracker.backward(program.valid, program.train, batches=(batch(0), batch(1)), compile=2)  # pyright: ignore[reportArgumentType]


def test_losses_of_batches_are_functions():
    program = Program()
    tracker = hg.bilevel.SOBA(program.model.parameters(), [program.decay])
    with pytest.raises(TypeError, match="must be a function of a batch"):
        tracker.backward(program.valid(batch(0)), program.train, batches=(batch(0), batch(1)))


@pytest.mark.parametrize("options", [{"recursive": 0.1}, {"batches": (2, 2)}])
def test_filters_that_are_not_compiled(options):
    program = Program()
    make = hg.bilevel.SABA if "batches" in options else hg.bilevel.SOBA
    tracker = make(program.model.parameters(), [program.decay], **options)
    with pytest.raises(TypeError, match="without recursive momentum or tables"):
        tracker.backward(program.valid, program.train, batches=(batch(0), batch(1)), compile="eager")


def test_sparse_directions_are_not_compiled():
    table = nn.Embedding(40, 1, sparse=True).double()
    w = torch.ones(3, dtype=F64, requires_grad=True)

    def train(rows: Tensor) -> Tensor:
        return (table(rows).squeeze(1).sigmoid() * (X[rows] @ w - Y[rows]).square()).mean()

    def valid(rows: Tensor) -> Tensor:
        return (X[rows] @ w - Y[rows]).square().mean()

    tracker = hg.bilevel.SOBA([w], table.parameters())
    pair = torch.arange(5), torch.arange(5, 10)
    tracker.backward(valid, train, batches=pair)
    plain = table.weight.grad
    table.weight.grad = w.grad = None
    with pytest.warns(hg.HypergradientWarning, match="sparse"):
        tracker.backward(valid, train, batches=pair, compile="eager")
    assert plain is not None and table.weight.grad is not None
    assert torch.equal(plain.to_dense(), table.weight.grad.to_dense())


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_inductor():
    with warnings.catch_warnings():
        warnings.simplefilter("error", hg.HypergradientWarning)
        check(trained(Program(), "SOBA", False), trained(Program(), "SOBA", True))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_rounding_of_vanishing_directions_is_not_taken_for_a_difference():
    """At the solution directions are nothing but rounding errors, and compiled code rounds in another order."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 40, generator=draw) / 14, torch.randn(200, generator=draw)
    w, lam = torch.zeros(40, requires_grad=True), torch.zeros(40, requires_grad=True)
    tracker = hg.bilevel.SOBA([w], [lam], lr=0.3)
    optimizer = torch.optim.SGD([w], lr=0.3)

    def valid(b: Tensor) -> Tensor:
        return ((x[:100] @ w - b) ** 2).sum() / 2

    def train(b: Tensor) -> Tensor:
        return ((x @ w - b) ** 2).sum() / 2 + 0.1 * (lam.exp() * w.square()).sum()

    for _ in range(1100):  # a warning is an error
        tracker.backward(valid, train, batches=(y[:100], y), compile=True)
        optimizer.step()
        tracker.step()
        optimizer.zero_grad()
        lam.grad = None
