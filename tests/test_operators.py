"""Operators: products, transposes, damping, many vectors at once, and the count of products."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad._basis import Basis
from hypergrad._vector import Vector
from hypergrad.operators import LinearOperator, function, matrix
from systems import side, with_singular_values

N = 6
A = with_singular_values(np.linspace(1, 3, N), 1)
B = np.stack([with_singular_values(np.linspace(1, 2 + i, N), i) for i in range(4)])
X, XS = side(N), np.stack([side(N, i) for i in range(4)])


def torch_of(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x)


def as_function(a: np.ndarray, **tags: bool) -> LinearOperator:
    """A on {"x": …, "y": […]}, the first two and the last four unknowns."""
    m = torch.tensor(a)

    def product(m: torch.Tensor):
        def apply(v):
            flat = (m @ torch.cat([v["x"].reshape(-1), v["y"][0]])[:, None])[:, 0]
            return {"x": flat[:2].reshape(2, 1), "y": [flat[2:]]}

        return apply

    return function(product(m), product(m.T), **tags)


def tree(x: np.ndarray):
    return {"x": torch.tensor(x[:2]).reshape(2, 1), "y": [torch.tensor(x[2:])]}


def flat(v) -> np.ndarray:
    return np.concatenate([v["x"].reshape(-1), v["y"][0]])


def vector(x: torch.Tensor, batch_dims: int = 0):
    return Vector.of(x, "b", batch_dims)


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_matrix(gamma):
    damped = A + gamma * np.eye(N)
    op = matrix(torch.tensor(A)).damped(gamma)
    np.testing.assert_allclose(op(torch.tensor(X)), damped @ X, rtol=1e-14)
    np.testing.assert_allclose(op.T(torch.tensor(X)), damped.T @ X, rtol=1e-14)
    np.testing.assert_allclose(op.T.T(torch.tensor(X)), damped @ X, rtol=1e-14)
    np.testing.assert_allclose(op(vector(torch.tensor(X))).flat(), damped @ X, rtol=1e-14)
    assert op.products == 4 and op.damping == gamma and op.batch_dims == 0


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_batched_matrix(gamma):
    op = matrix(torch.tensor(B)).damped(gamma)
    damped = B + gamma * np.eye(N)
    np.testing.assert_allclose(op(torch.tensor(XS)), np.einsum("bij,bj->bi", damped, XS), rtol=1e-13)
    np.testing.assert_allclose(op.T(torch.tensor(XS)), np.einsum("bji,bj->bi", damped, XS), rtol=1e-13)
    assert op.products == 2 and op.batch_dims == 1  # one product serves all systems


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_function_on_pytrees(gamma):
    op = as_function(A).damped(gamma)
    damped = A + gamma * np.eye(N)
    np.testing.assert_allclose(flat(op(tree(X))), damped @ X, rtol=1e-14)
    np.testing.assert_allclose(flat(op.T(tree(X))), damped.T @ X, rtol=1e-14)


def test_function_hands_on_its_tensors():
    a = torch.tensor(A)
    op = function(lambda v, m, s: s * (m @ v), lambda v, m, s: s * (m.T @ v), tensors=(a, 2.0))
    np.testing.assert_allclose(op(torch.tensor(X)), 2 * A @ X, rtol=1e-14)
    np.testing.assert_allclose(op.T(torch.tensor(X)), 2 * A.T @ X, rtol=1e-14)


@pytest.mark.parametrize("tensors", [torch.ones(3), {"a": torch.ones(3)}], ids=["tensor", "dict"])
def test_tensors_of_a_function_are_a_tuple(tensors):
    """A tensor alone would be handed on row by row."""
    with pytest.raises(TypeError, match="tensors must be a tuple of what matvec takes after v"):
        hg.operators.function(lambda v, *a: v, tensors=tensors)


def test_products_of_all_forms_are_counted_together():
    op = matrix(torch.tensor(A))
    x = torch.tensor(X)
    op(x), op.T(x), op.damped(0.5)(x), op.damped(0.5).T(x), op.T.damped(0.1)(x)
    basis = Basis(vector(x), 3)
    op.many(basis), op.damped(0.5).T.many(basis)
    assert op.products == op.T.products == op.damped(1.0).products == 11


def test_damping_adds_up_and_no_damping_is_the_operator_itself():
    op = matrix(torch.tensor(A))
    assert op.damped(0.0) is op and op.damped(0.5).damped(0.25).damping == 0.75 and op.damping == 0
    twice = op.damped(0.5).T.damped(0.25)
    np.testing.assert_allclose(twice(torch.tensor(X)), A.T @ X + 0.75 * X, rtol=1e-14)
    np.testing.assert_allclose(op(torch.tensor(X)), A @ X, rtol=1e-14)


@pytest.mark.parametrize("tags", [{"symmetric": True}, {"positive_definite": True}])
def test_a_symmetric_operator_is_its_own_transpose(tags):
    s = A + A.T
    for op in (matrix(torch.tensor(s), **tags), function(lambda v: torch.tensor(s) @ v, **tags)):
        assert op.symmetric and op.positive_definite == ("positive_definite" in tags) and op.has_transpose
        assert op.T is op
        np.testing.assert_allclose(op.damped(0.5).T(torch.tensor(X)), s @ X + 0.5 * X, rtol=1e-14, atol=1e-14)


def test_a_missing_transpose_is_named():
    op = function(lambda v: 2 * v)
    assert not op.has_transpose and not op.symmetric
    with pytest.raises(TypeError, match="no transposed product: pass transpose="):
        _ = op.T


@pytest.mark.parametrize("gamma", [0.0, 0.7])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("vectorised", [False, True])
def test_many(vectorised, batched, gamma):
    """A V for a stack of vectors, one after another or by `many` at once."""
    a, x = (torch.tensor(B), torch.tensor(XS)) if batched else (torch.tensor(A), torch.tensor(X))
    plain = matrix(a)
    calls = []

    def at_once(m: torch.Tensor):
        def apply(basis: Basis) -> Basis:
            calls.append(basis.m)
            return basis.with_leaves([(m @ v.unsqueeze(-1)).squeeze(-1) for v in basis.leaves()])

        return apply

    def one(m: torch.Tensor):
        return lambda v: v.space.pack([(m @ leaf.unsqueeze(-1)).squeeze(-1) for leaf in v.leaves])

    if vectorised:
        op = LinearOperator(one(a), one(a.mT), batch_dims=batched, many=at_once(a), many_transpose=at_once(a.mT))
    else:
        op = plain
    like = vector(x, int(batched))
    rows = torch.randn(*x.shape[:-1], 3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = Basis.from_rows(like, rows)
    eye = gamma * torch.eye(N, dtype=torch.float64)
    np.testing.assert_allclose(op.damped(gamma).many(basis).matrix(), rows @ (a + eye).mT, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(op.damped(gamma).T.many(basis).matrix(), rows @ (a + eye), rtol=1e-13, atol=1e-14)
    assert op.products == 6 and calls == ([3, 3] if vectorised else [])
    assert torch.equal(basis.matrix(), rows)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (1, 2, 3, 3)])
def test_matrix_must_be_square(shape):
    with pytest.raises(ValueError, match=r"matrix must be \[n, n\] or \[B, n, n\], got shape"):
        matrix(torch.zeros(shape))


@pytest.mark.parametrize(
    ("product", "error", "message"),
    [
        (
            lambda v: {"w": v["w"][:2]},
            ValueError,
            r"the operator's product\['w'\] must be like b\['w'\]: .*\(3,\).*\(2,\)",
        ),
        (lambda v: {"w": v["w"].float()}, ValueError, r"the operator's product\['w'\] must be like .*float64.*float32"),
        (lambda v: v["w"], ValueError, "the operator's product must have the structure of b"),
        (lambda v: {"w": 1.0}, TypeError, r"the operator's product\['w'\] must be a floating point tensor, got float"),
    ],
)
def test_a_product_unlike_its_argument_is_named(product, error, message):
    with pytest.raises(error, match=message):
        hg.solvers.CG(max_steps=1)(function(product, symmetric=True), {"w": torch.ones(3, dtype=torch.float64)})


def test_an_exception_of_the_product_passes_through():
    class Own(Exception):
        pass

    def product(v):
        raise Own("mine")

    with pytest.raises(Own, match="mine"):
        hg.solvers.GMRES()(function(product), torch.ones(3))


def test_a_product_has_no_graph():
    a = torch.tensor(A, requires_grad=True)
    assert not matrix(a)(torch.tensor(X, requires_grad=True)).requires_grad
