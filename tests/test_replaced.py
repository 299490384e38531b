"""Functions of torch whose derivatives are wrong in a module that is called at given tensors: checkpoints, caches."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import hypergrad as hg
from implicit_cases import rel

X, Y = torch.randn(2, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.hidden(x))


class Checkpointed(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.hidden, x, use_reentrant=False))


class Half(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def losses(module: nn.Module):
    def fit(w, x, y):
        return ((functional_call(module, w, (x,)) - y) ** 2).mean()

    def inner(w, h):
        return fit(w, X, Y) + h.exp() * sum((p**2).sum() for p in w.values())

    return inner, lambda w, h: fit(w, Y, X)


def step(inner, w, h):
    slopes = torch.autograd.grad(inner(w, h), [*w.values()], create_graph=True)
    return {name: p - 0.1 * g for (name, p), g in zip(w.items(), slopes, strict=True)}


def exact(inner, outer, w, h):
    solution = lambda hs: [*hg.implicit.argmin(inner, w, hs[0], solver=DENSE).values()]  # noqa: E731
    return hg.exact(solution, [h], lambda ws, hs: outer(dict(zip(w, ws, strict=True)), hs[0]), set_grad=False)[0]


DENSE = hg.solvers.Dense(on_failure="ignore")
ENTRY_POINTS = {
    "grad": lambda g, f, w, h: hg.implicit.grad(f, inner_loss=g, params=w, hparams=h, solver=DENSE).grads,
    "fp_map": lambda g, f, w, h: hg.implicit.grad(f, fp_map=partial(step, g), params=w, hparams=h, solver=DENSE).grads,
    "jacobian": lambda g, f, w, h: (
        hg.implicit.jacobian(lambda *x: f(*x)[None], inner_loss=g, params=w, hparams=h, solver=DENSE).grads
    ),
    "exact": exact,
    "reverse": lambda g, f, w, h: hg.unroll.reverse(partial(step, g), w, h, f, 4).grads,
    "meta": lambda g, f, w, h: (
        hg.meta.grad(
            lambda w, h, task: f(w, h),
            lambda w, h, task: g(w, h),
            h,
            torch.ones(2),
            method=hg.meta.Unrolled(),
            steps=3,
            rule=hg.diff_optimizers.SGD(lr=0.1),
            start=lambda h, task: w,
        ).grads
    ),
}


@pytest.fixture
def point():
    w = {name: 1.5 * p.detach() for name, p in Plain().named_parameters()}
    return w, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_checkpoints_in_a_module_called_at_given_tensors(entry_point, point):
    one, other = (ENTRY_POINTS[entry_point](*losses(module()), *point) for module in (Checkpointed, Plain))
    assert rel(one, other) < 1e-10


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_parametrisations_are_not_taken_from_a_cache(entry_point, point):
    module = Plain()
    nn.utils.parametrize.register_parametrization(module.first, "weight", Half())
    w = {name: 1.5 * p.detach() for name, p in module.named_parameters()}
    expected = ENTRY_POINTS[entry_point](*losses(module), w, point[1])
    with nn.utils.parametrize.cached():
        module.first.weight  # noqa: B018  what the cache holds
        assert rel(ENTRY_POINTS[entry_point](*losses(module), w, point[1]), expected) < 1e-10


@pytest.mark.parametrize(
    "name", ["torch.utils.checkpoint._checkpoint_without_reentrant_generator", "torch._weight_norm"]
)
def test_a_function_that_torch_has_renamed_is_said(name):
    """Removed before the import: what cannot be replaced would give wrong derivatives in silence."""
    program = f"""
import torch, torch.utils.checkpoint
holder, name = {name.rpartition(".")[0]}, {name.rpartition(".")[2]!r}
for each in (name, name + "_impl"):
    if hasattr(holder, each):
        delattr(holder, each)
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hypergrad.implicit
assert any(name in str(each.message) and "may be wrong" in str(each.message) for each in caught)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
