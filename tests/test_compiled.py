"""compile=: products through torch.compile are the same products, compiled once, with the usual ones as fallback."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import hypergrad as hg
from helpers import assert_agrees, problem_at
from hypergrad import solvers as S

EAGER = "aot_eager"  # traces and partitions as the default backend does, and generates no code
CASES = [(name, form) for name in ("ridge", "logistic") for form in ("inner_loss", "residual")]
CASES += [("contraction-.9", "fp_map"), ("equilibrium", "fp_map"), ("equilibrium", "residual")]


def hypergradient(p, form, solver, **options):
    given = {form: getattr(p, form), "symmetric": p.symmetric}
    return hg.implicit.grad(p.outer_loss, params=p.params, hparams=p.hparams, solver=solver, **given, **options)


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_same_products(name, form):
    p = problem_at(name)
    for solver in (S.GMRES(rtol=1e-13, restart=60, on_failure="ignore"), S.Dense(), S.LSQR(rtol=1e-13, max_steps=2000)):
        assert_agrees(p, hypergradient(p, form, solver, compile=EAGER).grads)


def test_it_is_used():
    """Every product of CG, and not the last one, goes through the compiled pass."""
    p, seen = problem_at("ridge"), []
    with pytest.MonkeyPatch.context() as patch:
        pull = hg._compiled.pull

        def counted(*args):
            product = pull(*args)
            return lambda v: seen.append(1) or product(v)

        patch.setattr(hg._compiled, "pull", counted)
        hypergradient(p, "inner_loss", S.CG(max_steps=7), compile=EAGER)
    assert len(seen) == 7


def problem(seed: int, n: int = 6):
    draw = np.random.RandomState(seed)
    x, y = torch.tensor(draw.randn(20, n)), torch.tensor(draw.randn(20))
    w, lam = torch.tensor(draw.randn(n)), torch.tensor(draw.randn(n), requires_grad=True)
    loss = lambda w, lam: ((torch.tanh(x @ w) - y) ** 2).mean() + (lam.exp() * w**2).sum()  # noqa: E731
    return loss, w, lam


def test_it_compiles_once_for_a_sequence_of_outer_steps_and_closures():
    """New closures with the same code, other data and other values compile nothing, and are not mixed up."""

    def grads(seed, compile):
        loss, w, lam = problem(seed)
        options = {"solver": S.MINRES(rtol=1e-12), "params": w, "hparams": lam, "compile": compile}
        with pytest.warns(hg.HypergradientWarning, match="not solved"):
            return hg.implicit.grad(lambda w, lam: (w**3).sum(), inner_loss=loss, **options).grads

    grads(0, EAGER)
    before = compiled_graphs()
    for seed in range(1, 12):
        torch.testing.assert_close(grads(seed, EAGER), grads(seed, False), rtol=1e-10, atol=1e-12)
    assert compiled_graphs() == before


def test_other_shapes_are_right():
    for n in (4, 7, 9, 12):
        loss, w, lam = problem(0, n)
        options = {"solver": S.Dense(on_failure="ignore"), "params": w, "hparams": lam, "inner_loss": loss}
        compiled = hg.implicit.grad(lambda w, lam: (w**3).sum(), compile=EAGER, **options).grads
        torch.testing.assert_close(compiled, hg.implicit.grad(lambda w, lam: (w**3).sum(), **options).grads)


def test_what_cannot_be_compiled_falls_back_with_the_reason():
    p = problem_at("ridge")

    def opaque(w, h):
        torch._dynamo.graph_break()
        return p.inner_loss(w, h)

    solver = S.CG(rtol=1e-13, on_failure="ignore")
    with pytest.warns(hg.NotCompiled, match="inner_loss could not be compiled, so its products are not: "):
        result = hg.implicit.grad(
            p.outer_loss, params=p.params, hparams=p.hparams, inner_loss=opaque, solver=solver, compile=EAGER
        )
    assert_agrees(p, result.grads)
    with pytest.warns(hg.NotCompiled, match="no_such_backend"):
        assert_agrees(p, hypergradient(p, "inner_loss", solver, compile="no_such_backend").grads)


def test_an_error_of_the_users_own_passes_through():
    p = problem_at("ridge")

    def failing(w, h):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hg.implicit.grad(p.outer_loss, params=p.params, hparams=p.hparams, inner_loss=failing, compile=EAGER)


def test_what_compile_is_not_for_is_refused():
    loss, w, lam = problem(0)
    w.requires_grad_()
    gauss = hg.operators.GaussNewton(lambda w, lam: w, lambda z, lam: (z**2).sum())
    options = {"params": w, "hparams": lam, "compile": True}
    for inner, more in ((loss(w, lam), {}), (loss, {"stochastic": True}), (gauss, {})):
        with pytest.raises(TypeError, match="compile needs inner_loss as a callable, that is neither"):
            hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=inner, **options, **more)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "form"), [("logistic", "inner_loss"), ("equilibrium", "fp_map")])
def test_the_default_backend(name, form):
    p = problem_at(name)
    assert_agrees(p, hypergradient(p, form, S.GMRES(rtol=1e-13, restart=60, on_failure="ignore"), compile=True).grads)


def test_a_loss_of_one_entry_is_compiled_too():
    loss, w, lam = problem(0)
    options = {"params": w, "hparams": lam, "solver": S.Dense(on_failure="ignore")}
    grads = [
        hg.implicit.grad(
            lambda w, lam: (w**3).sum(), inner_loss=lambda w, lam: loss(w, lam)[None], compile=c, **options
        )
        for c in (EAGER, False)
    ]
    torch.testing.assert_close(grads[0].grads, grads[1].grads, rtol=1e-10, atol=1e-12)


def test_compile_takes_a_bool_or_a_name():
    loss, w, lam = problem(0)
    for bad in (1, None, lambda graph, inputs: graph):
        with pytest.raises(TypeError, match="compile must be True, False or the name of a backend, got"):
            hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=loss, params=w, hparams=lam, compile=bad)
