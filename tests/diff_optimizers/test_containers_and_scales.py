"""Update rules on real inputs: containers, dtypes, devices, very large and small numbers, NaN and infinity."""

from collections import OrderedDict

import pytest
import torch
from test_rules import BETAS, RULES

import hypergrad as hg

D = hg.diff_optimizers
DOUBLE = {"dtype": torch.float64}
RULED = {name: make(**numbers) for name, (make, numbers) in RULES.items()}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trees():
    b, a = torch.rand(3, **DOUBLE), torch.rand(3, **DOUBLE) + 1
    gb, ga = torch.randn(3, **DOUBLE), torch.randn(3, **DOUBLE)
    return OrderedDict(b=b, a=a), {"a": a, "b": b}, OrderedDict(b=gb, a=ga), {"a": ga, "b": gb}


@pytest.mark.parametrize("name", RULED)
def test_mappings_are_matched_by_key(name):
    """OrderedDict params with plain dicts as gradients and state, and the reverse, give the same result."""
    rule = RULED[name]
    ordered, plain, ordered_grads, plain_grads = trees()
    due, _ = rule.update(*rule.update(plain, rule.init(plain), plain_grads), plain_grads)
    for params, other, grads in ((ordered, plain, plain_grads), (plain, ordered, ordered_grads)):
        new, state = rule.update(params, rule.init(other), grads)
        new, _ = rule.update(new, state, grads)
        assert type(new) is type(params) and all(torch.equal(new[key], due[key]) for key in "ab")


def test_a_value_for_each_leaf_is_matched_by_key():
    ordered, plain, grads, _ = trees()
    for params in (ordered, plain):
        new, _ = D.SGD(lr=D.PerLeaf({"b": 0.5, "a": 0.25})).update(params, D.SGD().init(params), grads)
        assert torch.equal(new["b"], params["b"] - 0.5 * grads["b"])
        assert torch.equal(new["a"], params["a"] - 0.25 * grads["a"])
    with pytest.raises(ValueError, match=r"PerLeaf must have params' structure.*\['c'\]"):
        D.SGD(lr=D.PerLeaf({"b": 0.5, "c": 0.25})).update(plain, D.SGD().init(plain), grads)


@pytest.mark.parametrize("name", RULED)
def test_a_leaf_whose_gradient_is_none_stays_with_its_buffers(name):
    rule = RULED[name]
    w, g = [torch.rand(3, **DOUBLE) + 0.1, torch.rand(2, **DOUBLE) + 0.1], torch.randn(3, **DOUBLE)
    first, state = rule.update(w, rule.init(w), [g, torch.randn(2, **DOUBLE)])
    new, later = rule.update(first, state, [g, None])
    assert torch.equal(new[1], first[1]) and not torch.equal(new[0], first[0])
    for key in state.keys() - {"step", "missed"}:
        assert torch.equal(later[key][1], state[key][1])


@pytest.mark.parametrize("name", RULED)
def test_empty_leaves_and_frozen_leaves(name):
    make, numbers = RULES[name]
    rule = make(**numbers, **({} if name in ("L1", "FISTA", "Group", "Simplex", "Box") else {"frozen": (2,)}))
    w = [torch.rand(3, **DOUBLE), torch.zeros(0, **DOUBLE), torch.rand(3, **DOUBLE)]
    new, _ = rule.update(w, rule.init(w), [torch.randn_like(x) for x in w])
    assert new[1].shape == (0,) and not torch.equal(new[0], w[0])
    assert torch.equal(new[2], w[2]) == bool(rule.frozen)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "RMSprop"])
def test_sparse_gradients(name):
    """Sparse gradients of an embedding, passed to the rule or taken by it, give the results of dense ones."""
    rule, w, index = RULED[name], torch.randn(5, 2, **DOUBLE), torch.tensor([1, 3, 1])

    def loss(sparse):
        return lambda w, h: (torch.nn.functional.embedding(index, w, sparse=sparse) ** 3).sum()

    new = [rule.on(loss(sparse))((w, rule.init(w)))[0] for sparse in (False, True)]
    assert torch.equal(*new)
    at = w.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(True)(at, None), at)
    assert g.is_sparse and torch.equal(rule.update(w, rule.init(w), g)[0], new[0].detach())


@pytest.mark.parametrize("name", RULED)
def test_complex_params_are_refused_with_what_to_do(name):
    rule, w = RULED[name], torch.ones(2, dtype=torch.complex128)
    for call in (lambda: rule.init(w), lambda: rule.update(w, {}, w), lambda: rule.on(lambda w, h: w)((w, {}))):
        with pytest.raises(TypeError, match=r"complex128.*torch\.view_as_real"):
            call()


@pytest.mark.parametrize("name", RULED)
def test_the_default_device_and_dtype_do_not_matter(name):
    """A tensor made on this default device, which holds no numbers, would raise an error or lose its numbers."""
    rule, w, g = RULED[name], torch.rand(3, **DOUBLE), torch.rand(3, **DOUBLE)
    due, state = rule.update(*rule.update(w, rule.init(w), g), g)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            new, other = rule.update(*rule.update(w, rule.init(w), g), g)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(new, due) and all(torch.equal(other[key], state[key]) for key in state)


def test_inference_mode_is_named():
    rule, w = D.SGD(lr=0.1), torch.ones(2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        rule.on(lambda w, h: (w**2).sum())((w, rule.init(w)))


def test_an_inner_loss_by_a_live_model_is_named():
    model = torch.nn.Linear(2, 1)
    rule, w = D.SGD(lr=0.1), [x.detach().clone() for x in model.parameters()]
    with pytest.raises(ValueError, match=r"from other tensors \(of a live model\)"):
        rule.on(lambda w, h: model(torch.ones(3, 2)).sum())((w, rule.init(w)))


# --- scales -----------------------------------------------------------------------------------------------------------

SCALES = [1e-30, 1e-22, 1e-10, 1.0, 1e7, 1e19, 1e30]
NARROW = [torch.float32, torch.bfloat16, torch.float16]


def prox_of(prox, w, lr=1.0):
    return D.ProximalGradient(lr=lr, prox=prox).update(w, {"step": torch.zeros(())}, torch.zeros_like(w))[0]


@pytest.mark.parametrize("scale", SCALES)
def test_simplex_projection_keeps_its_sum_beside_large_entries(scale):
    """[s, s, 0] is projected on [½, ½, 0] (s ≥ ½), and the derivative is that of float64."""
    w = torch.tensor([scale, scale, 0.0], requires_grad=True)
    due_at = w.detach().double().requires_grad_()
    new, due = prox_of(D.Simplex(), w), prox_of(D.Simplex(), due_at)
    torch.testing.assert_close(new.double(), due, rtol=1e-6, atol=0)
    if scale >= 1:
        assert new.tolist() == [0.5, 0.5, 0.0]
    slopes = [torch.autograd.grad(y[0], x)[0].double() for x, y in ((w, new), (due_at, due))]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("radius", [1e-22, 1e-3, 1.0, 1e19])
def test_simplex_projection_against_float64(radius):
    w = torch.randn(20, 7) * radius
    new, due = prox_of(D.Simplex(radius=radius), w), prox_of(D.Simplex(radius=radius), w.double())
    torch.testing.assert_close(new.double() / radius, due / radius, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", [-1, 0, None])
def test_group_lasso_at_every_scale(scale, dim):
    """Squares of float32 numbers underflow below 1e-22 and overflow above 1e19."""
    w = (torch.randn(4, 5) * scale).requires_grad_()
    wide = w.detach().double().requires_grad_()
    prox = D.GroupLasso(strength=0.7 * scale, dim=dim)
    new, due = prox_of(prox, w), prox_of(prox, wide)
    torch.testing.assert_close(new.double() / scale, due / scale, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(y.sum() / scale, x)[0].double() * scale for x, y in ((w, new), (wide, due))]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", RULED)
def test_non_finite_entries_stay_non_finite(name, value):
    """An entry that is NaN or infinite stays so, except that a projection on a box clips infinity."""
    rule = RULED[name]
    w = torch.tensor([0.2, value, 0.3], **DOUBLE)
    new = rule.update(w, rule.init(w), torch.rand(3, **DOUBLE))[0]
    if name == "Box" and value == float("inf"):
        assert new[1] == rule.prox.upper
    else:
        assert not new[1].isfinite()
    assert name not in BETAS or new[0].isfinite()
