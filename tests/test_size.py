"""More than 2³¹ numbers: shapes and indices on torch's meta device, which holds none of them."""

import pytest
import torch

import hypergrad as hg

LARGE = 2**31 + 8
F32 = torch.float32


def problem():
    w = {"table": torch.empty(LARGE, device="meta"), "bias": torch.empty(3, device="meta")}
    h = torch.empty(LARGE, device="meta", requires_grad=True)
    inner = lambda w, h: (h.exp() * w["table"].square()).mean() + (w["bias"] - w["table"].mean()).square().sum()  # noqa: E731
    outer = lambda w, h: (w["table"] - 1).square().mean() + w["bias"].sum()  # noqa: E731
    return w, h, inner, outer


SOLVERS = {
    "CG": hg.solvers.CG(max_steps=3, on_failure="ignore"),
    "MINRES": hg.solvers.MINRES(max_steps=3, on_failure="ignore"),
    "BiCGStab": hg.solvers.BiCGStab(max_steps=3, on_failure="ignore"),
    "LSQR": hg.solvers.LSQR(max_steps=3, on_failure="ignore"),
    "GMRES": hg.solvers.GMRES(max_steps=2, on_failure="ignore"),
    "Neumann": hg.solvers.Neumann(step_size=0.1, max_steps=3, on_failure="ignore"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_vectors_of_more_than_32_bits(name):
    w, h, inner, outer = problem()
    result = hg.implicit.grad(outer, inner_loss=inner, params=w, hparams=h, solver=SOLVERS[name])
    assert result.grads.shape == (LARGE,) and result.adjoint["table"].shape == (LARGE,)
    assert result.adjoint["bias"].shape == (3,) and result.grads.dtype == F32


def test_sums_of_more_than_32_bits():
    w, h, inner, outer = problem()
    total = hg.operators.Sum(lambda w, h, scale: scale * inner(w, h), [0.5, 0.5])
    result = hg.implicit.grad(outer, inner_loss=total, params=w, hparams=h, solver=SOLVERS["CG"])
    assert result.grads.shape == (LARGE,)


@pytest.mark.parametrize("kind", ["SOBA", "F2SA", "SAMA", "BOME"])
def test_trackers_of_more_than_32_bits(kind):
    w, h, inner, outer = problem()
    w = {name: x.requires_grad_() for name, x in w.items()}
    options = {"lr": 0.1} if kind == "SAMA" else {}
    tracker = getattr(hg.bilevel, kind)(w, h, on_nonfinite="ignore", **options)
    tracker.backward(lambda: outer(w, h), lambda: inner(w, h))
    tracker.step()
    assert h.grad is not None and h.grad.shape == (LARGE,)
    assert w["table"].grad is not None and w["table"].grad.shape == (LARGE,)


def test_split_and_joined_leaves_of_more_than_32_bits():
    v = hg.Vector.of([torch.empty(2**30, 2, device="meta"), torch.empty(LARGE, device="meta")], "v")
    both = (v + v * 2.0 - v).copy()
    assert [tuple(x.shape) for x in both.leaves] == [(2**30, 2), (LARGE,)]
    assert both.flat().numel() == 2**31 + LARGE and both.space.length == 2**31 + LARGE
