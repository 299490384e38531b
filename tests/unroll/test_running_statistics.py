"""Steps of networks with BatchNorm or spectral_norm in training mode: each evaluation writes buffers."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import hypergrad as hg
from hypergrad.unroll import forward, reverse

STEPS = 7
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3
WAYS = {
    **{memory: partial(reverse, memory=memory) for memory in ("graph", "iterates", "sqrt", "1MiB")},
    "checkpoints": partial(reverse, checkpoints=2),
    "forward": forward,
    "compiled": partial(reverse, compile="eager"),
    "compiled iterates": partial(reverse, memory="iterates", compile="eager"),
    "compiled forward": partial(forward, compile="eager"),
}
every_way = pytest.mark.parametrize("way", WAYS)


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))


class Program:
    """Gradient steps on a network whose second layer is a normalisation, and a loss in one of its modes."""

    def __init__(self, train_outer, norm=lambda: nn.BatchNorm1d(5)):
        torch.manual_seed(0)
        self.norm, self.train_outer = norm(), train_outer
        self.net = nn.Sequential(nn.Linear(4, 5), self.norm, nn.Tanh(), nn.Linear(5, 3)).double()
        self.start = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def step(self, w, log_decay):
        at = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in w.items()}
        loss = F.cross_entropy(functional_call(self.net, at, (X,)), Y)
        loss = loss + log_decay.exp() * sum(p.square().sum() for p in at.values()) / 2
        slopes = torch.autograd.grad(loss, list(at.values()), create_graph=True)
        return {name: p - 0.1 * g for (name, p), g in zip(at.items(), slopes, strict=True)}

    def outer(self, w, log_decay):
        self.net.train(self.train_outer)
        loss = F.cross_entropy(functional_call(self.net, w, (X[:7],)), Y[:7])
        self.net.train()
        return loss

    def plain(self, log_decay):
        """The outer loss after a plain run of the steps."""
        w = self.start
        for _ in range(STEPS):
            w = {name: p.detach() for name, p in self.step(w, log_decay).items()}
        return self.outer(w, log_decay).detach()


def log_decay(off=0.0):
    return torch.tensor(-2.0 + off, dtype=torch.float64, requires_grad=True)


def run(program, way):
    """The result, and the kinds of what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", hg.HypergradientWarning)
        result = WAYS[way](program.step, program.start, log_decay(), program.outer, steps=STEPS)
    return result, {each.category for each in caught}


@every_way
@pytest.mark.parametrize("train_outer", [True, False], ids=["train", "eval"])
def test_replays_leave_running_statistics_as_one_run_does(way, train_outer):
    plain, program = Program(train_outer), Program(train_outer)
    value = plain.plain(log_decay())
    result, _ = run(program, way)
    torch.testing.assert_close(result.outer_value, value, rtol=1e-12, atol=0)
    for one, other in zip(program.norm.buffers(), plain.norm.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@every_way
def test_hypergradient_of_an_outer_loss_in_train_mode(way):
    high, low = (Program(True).plain(log_decay(off)) for off in (1e-5, -1e-5))
    result, kinds = run(Program(True), way)
    torch.testing.assert_close(result.grads, (high - low) / 2e-5, rtol=1e-7, atol=0)
    assert hg.LostDerivative not in kinds
    assert (hg.NotCompiled in kinds) == ("compiled" in way)


@every_way
def test_an_outer_loss_in_eval_mode_loses_the_derivative_of_the_running_statistics(way):
    assert hg.LostDerivative in run(Program(False), way)[1]


@every_way
@pytest.mark.parametrize("norm", [partial(nn.BatchNorm1d, 5, track_running_stats=False), partial(nn.GroupNorm, 1, 5)])
def test_layers_without_running_statistics_are_compiled_and_right_in_eval_mode(way, norm):
    high, low = (Program(False, norm).plain(log_decay(off)) for off in (1e-5, -1e-5))
    result, kinds = run(Program(False, norm), way)
    torch.testing.assert_close(result.grads, (high - low) / 2e-5, rtol=1e-7, atol=0)
    assert not kinds


def test_statistics_in_eval_mode_are_constants_and_not_warned_of():
    program = Program(False)
    program.net.eval()
    program.step = lambda w, log_decay: {name: p * (1 - 0.1 * log_decay.exp()) for name, p in w.items()}
    assert run(program, "sqrt")[1] == set()


@every_way
def test_spectral_norm_is_replayed_with_the_buffers_of_each_step(way):
    """Its power iteration goes on at each evaluation, so a replay with the present buffers would give other numbers."""
    plain, program = (Program(True, spectral) for _ in range(2))
    value = plain.plain(log_decay())
    result, kinds = run(program, way)
    graph, _ = run(Program(True, spectral), "graph")
    torch.testing.assert_close(result.outer_value, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.grads, graph.grads, rtol=1e-10, atol=0)
    assert (hg.NotCompiled in kinds) == ("compiled" in way)
    for one, other in zip(program.norm.buffers(), plain.norm.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_layer_that_is_built_at_its_first_evaluation():
    plain, program = (
        Program(True, partial(nn.LazyBatchNorm1d, affine=False)),
        Program(True, partial(nn.LazyBatchNorm1d, affine=False)),
    )
    value = plain.plain(log_decay())
    torch.testing.assert_close(run(program, "iterates")[0].outer_value, value, rtol=1e-12, atol=0)
