"""products=: a symmetric A applied through its other graph gives the same numbers, and the faster one is found."""

import pytest
import torch

import hypergrad as hg
from helpers import assert_agrees, hypergradient, problem_at
from hypergrad import solvers as S
from hypergrad._autodiff import Linearisation

NAMES = ("ridge", "logistic", "biased", "quadratic-10")


def counted(monkeypatch) -> dict[str, int]:
    """How often each product is taken."""
    seen = {"_pull": 0, "_push": 0}

    def counting(name, original):
        def product(self, v, batched):
            seen[name] += 1
            return original(self, v, batched)

        return product

    for name in seen:
        monkeypatch.setattr(Linearisation, name, counting(name, getattr(Linearisation, name)))
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("products", ["forward", "measured"])
@pytest.mark.parametrize("solver", [S.CG(rtol=1e-13), S.MINRES(rtol=1e-13), S.Dense()], ids=lambda s: type(s).__name__)
def test_the_same_hypergradient(name, products, solver):
    p = problem_at(name)
    assert_agrees(p, hypergradient(p, "inner_loss", solver, products=products).grads)


def test_a_symmetric_residual_and_map():
    p = problem_at("ridge")
    for form in ("residual", "fp_map"):
        solver = S.CG(rtol=1e-13)
        assert_agrees(p, hypergradient(p, form, solver, symmetric=True, products="forward").grads)


def test_forward_products_are_used(monkeypatch):
    seen = counted(monkeypatch)
    result = hypergradient(problem_at("ridge"), "inner_loss", S.CG(max_steps=7), products="forward")
    assert seen == {"_pull": 1, "_push": 1 + 7} and result.problem.products == "forward"


@pytest.mark.parametrize("faster", ["reverse", "forward"])
def test_the_faster_product_is_taken(monkeypatch, faster):
    """Whichever is made slow is not taken, is named in the result, and is not measured again."""
    slow = "_pull" if faster == "forward" else "_push"
    original = getattr(Linearisation, slow)

    def late(self, v, batched):
        torch.randn(500, 500) @ torch.randn(500, 500)
        return original(self, v, batched)

    monkeypatch.setattr(Linearisation, slow, late)
    seen, p = counted(monkeypatch), problem_at("ridge")
    result = hypergradient(p, "inner_loss", S.CG(max_steps=7), products="measured")
    assert result.problem.products == faster
    each = {"_pull": 3, "_push": 3}
    each["_push" if faster == "forward" else "_pull"] += 7
    assert seen == each
    seen.update(_pull=0, _push=0)
    hypergradient(p, "inner_loss", S.CG(max_steps=7), products=result.problem.products)
    assert seen == ({"_pull": 1, "_push": 8} if faster == "forward" else {"_pull": 7, "_push": 0})


def test_checks_and_polish_go_through_the_same_products():
    p = problem_at("logistic")
    result = hypergradient(p, "inner_loss", S.CG(rtol=1e-13), products="forward", polish=True)
    assert_agrees(p, result.grads)
    assert hg.diagnostics.check(result).estimate.error < 1e-8


@pytest.mark.parametrize("bad", ["a", "z"])
@pytest.mark.parametrize("products", ["reverse", "forward", "measured"])
def test_nan_is_named_whatever_the_products(products, bad):
    """In the first or the last leaf: of Python's numbers max() may keep one that is no NaN."""
    lam = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with pytest.warns(hg.HypergradientWarning, match="NON_FINITE"):
        result = hg.implicit.grad(
            lambda w, lam: (w["k"] * w[bad]).sum(),
            inner_loss=lambda w, lam: ((w["k"] - lam) ** 2).sum() + (w[bad] ** 2).sum() + w[bad].abs().sqrt().sum(),
            params={"k": lam.detach(), bad: torch.zeros(2, dtype=torch.float64)},
            hparams=lam,
            products=products,
        )
    assert result.solution.status is S.Status.NON_FINITE


class Detaching(torch.autograd.Function):
    """w² whose backward pass cannot be differentiated twice more: torch gives zeros for that, without a word."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    def backward(ctx, *grads):
        (w,) = ctx.saved_tensors
        return Slope.apply(w, grads[0])


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, grad):
        ctx.save_for_backward(w, grad)
        return 2 * w * grad

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        w, grad = ctx.saved_tensors
        return 2 * grad * grads[0], 2 * w * grads[0]


OPTIONS = {"params": torch.tensor([1.0, 2.0]), "hparams": torch.tensor([1.0, 1.0], requires_grad=True)}


@pytest.mark.parametrize("products", ["forward", "measured"])
def test_products_that_differ_are_an_error(products):
    skew = torch.tensor([[2.0, 1.0], [-1.0, 2.0]])
    with pytest.raises(ValueError, match=r"Av and Aᵀv differ by .*A is not symmetric"):
        hg.implicit.grad(
            lambda w, _: w.sum(), residual=lambda w, lam: skew @ w - lam, symmetric=True, products=products, **OPTIONS
        )
    with pytest.raises((ValueError, RuntimeError), match=r"second derivative|once_differentiable"):
        hg.implicit.grad(
            lambda w, _: w.sum(), inner_loss=lambda w, lam: Detaching.apply(w - lam).sum(), products=products, **OPTIONS
        )


def loss(w, lam):
    return ((w - lam) ** 2).sum()


def test_what_it_is_not_for():
    with pytest.raises(ValueError, match=r"products must be .*, got 'both'"):
        hg.implicit.grad(loss, inner_loss=loss, products="both", **OPTIONS)
    with pytest.raises(TypeError, match="A is not declared symmetric"):
        hg.implicit.grad(loss, residual=lambda w, lam: w - lam, products="forward", **OPTIONS)
    half = hg.operators.GaussNewton(lambda w, lam: w - lam, lambda z, lam: (z**2).sum())
    for other in ({"stochastic": True}, {"compile": True}, {"inner_loss": half}):
        with pytest.raises(TypeError, match="not for stochastic, GaussNewton or compiled products"):
            hg.implicit.grad(loss, **({"inner_loss": loss} | other), products="measured", **OPTIONS)
