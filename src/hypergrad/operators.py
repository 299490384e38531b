"""Linear operators: a product, the transposed product, and what is known of them.

Public: LinearOperator, matrix, function, GaussNewton. Solvers see operators and vectors, never a loss or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _autodiff
from ._autodiff import Linearisation, as_scalar
from ._vector import Basis, PyTree, Space, Vector, flatten

Product = Callable[[Vector], Vector]


class Counter:
    """How many products an operator, its transpose and its damped forms have done together."""

    def __init__(self) -> None:
        self.products = 0


class _Owned:
    """v ↦ a product with v in memory to write into; with complement: v less that.

    What the first product gave is let go of. If something still holds its memory then (a backward may keep its results,
    or write them all into one place), this product and all later ones are copied.
    """

    def __init__(self, product: Product, complement: bool = False):
        self.product, self.complement = product, complement
        self.held: bool | None = None

    def __call__(self, v: Vector) -> Vector:
        image = self.product(v).apart_from(v)
        if self.held is None:
            is_held = image.memory()
            image = image.copy()
            self.held = is_held()
        elif self.held:
            image = image.copy()
        return image.scale_add_(-1.0, v) if self.complement else image


def _owned(product: Product) -> _Owned:
    return product if isinstance(product, _Owned) else _Owned(product)


class LinearOperator:
    """A linear map A on vectors (or pytrees of tensors) of one space, called as A(v).

    Args:
        matvec: v ↦ A v on Vectors. For pytrees use `operators.function`, for a matrix `operators.matrix`.
        transpose: v ↦ Aᵀ v; needed by LSQR and NormalCG alone, and not where symmetric.
        symmetric: A = Aᵀ, as the caller declares. CG and MINRES refuse an operator without it.
        positive_definite: vᵀAv > 0, as the caller declares; implies symmetric.
        batch_dims: 1 where every leaf has a leading axis of independent systems, else 0.
        many: A applied to a Basis at once, if that is cheaper than one product after another.
        many_transpose: likewise for Aᵀ.
        contraction: v ↦ v − A v, if that is cheaper than A v (for A = I − Jᵀ it is Jᵀv).
        low: dtype ↦ the operator with products in that dtype, on the same vectors, and its transpose.

    Attributes:
        declared: (product, tensors) where the operator says which tensors it depends on, else None.
        each: A, where this is its `stacked()` form, else None.

    Cost: `products` counts the products of the operator, its transpose and its damped forms together.
    """

    def __init__(
        self,
        matvec: Product,
        transpose: Product | None = None,
        *,
        symmetric: bool = False,
        positive_definite: bool = False,
        batch_dims: int = 0,
        many: Callable[[Basis], Basis] | None = None,
        many_transpose: Callable[[Basis], Basis] | None = None,
        contraction: Product | None = None,
        low: Callable[[torch.dtype], LinearOperator] | None = None,
    ):
        self.symmetric = symmetric or positive_definite
        self.positive_definite = positive_definite
        self.batch_dims = batch_dims
        self.damping = 0.0
        self.declared: tuple[Callable[..., PyTree], tuple[Any, ...]] | None = None
        self.each: LinearOperator | None = None
        self._matvec, self._many = _owned(matvec), many
        self._contraction = None if contraction is None else _owned(contraction)
        self._transpose, self._many_transpose = None if transpose is None else _owned(transpose), many_transpose
        if self.symmetric:
            self._transpose, self._many_transpose = self._matvec, many
        self._counter = Counter()
        self._low = low

    @property
    def products(self) -> int:
        """Products done so far, with A or Aᵀ; a product with m vectors at once counts m."""
        return self._counter.products

    @property
    def has_transpose(self) -> bool:
        return self._transpose is not None

    def __call__(self, v: Any) -> Any:
        """A v (+ damping · v) in memory of its own: a Vector for a Vector, a pytree for a pytree."""
        if not isinstance(v, Vector):
            return self(Space(v, "v", self.batch_dims).vector(v, "v")).tree
        self._counter.products += 1
        product = self._matvec(v)
        return product + v * self.damping if self.damping else product

    def contract(self, v: Vector) -> Vector:
        """v − A v in memory of its own: one product."""
        if self._contraction is None:
            return v - self(v)
        self._counter.products += 1
        image = self._contraction(v)
        return image - v * self.damping if self.damping else image

    def many(self, basis: Basis) -> Basis:
        """A V for a stack of vectors V."""
        if self._many is None:
            result = Basis(basis[0], basis.m)
            for j in range(basis.m):
                result[j] = self(basis[j])
            return result
        self._counter.products += basis.m
        result = self._many(basis)
        return result.plus(basis, self.damping) if self.damping else result

    def _derived(self, matvec: Product, many: Any, transpose: Product | None, many_transpose: Any) -> LinearOperator:
        new = object.__new__(LinearOperator)
        new.__dict__.update(self.__dict__)
        new._matvec, new._many, new._transpose, new._many_transpose = matvec, many, transpose, many_transpose
        new._contraction = self._contraction if matvec is self._matvec else None
        new.declared = None
        return new

    @property
    def T(self) -> LinearOperator:
        """Aᵀ, counted together with A. Raises TypeError where no transposed product is known."""
        if self.symmetric:
            return self
        if self._transpose is None:
            raise TypeError("this operator has no transposed product: pass transpose=, or use a solver that needs none")
        new, low = self._derived(self._transpose, self._many_transpose, self._matvec, self._many), self._low
        new._low = None if low is None else lambda dtype: low(dtype).T
        return new

    def damped(self, damping: float) -> LinearOperator:
        """A + damping · I, counted together with A."""
        if not damping:
            return self
        new = self._derived(self._matvec, self._many, self._transpose, self._many_transpose)
        new.damping = self.damping + damping
        return new

    def stacked(self) -> LinearOperator:
        """A for k right hand sides at once, stacked along a new leading axis of every leaf: k vectorised products.

        To a solver these are k independent systems: CG()(op.stacked(), b) runs k times CG in step, each with its own
        status; BlockCG searches in one space for all. It counts its products by itself, k at once as one.

        Raises: ValueError where A has a batch axis already.

        Example:
            >>> op = matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
            >>> hg.solvers.CG(rtol=1e-6)(op.stacked(), torch.tensor([[1.0, 2.0], [0.0, 11.0]])).value
            tensor([[ 0.0909,  0.6364],
                    [-1.0000,  4.0000]])
        """
        if self.batch_dims:
            raise ValueError("this operator has batch_dims=1: independent systems cannot be stacked once more")

        def product(op: LinearOperator) -> Product:
            def apply(v: Vector) -> Vector:
                basis = Basis(v.space.one, v.space.batch_shape[0]).with_leaves(v.leaves)
                return v.space.pack(op.many(basis).leaves())

            return apply

        tags: Any = {"symmetric": self.symmetric, "positive_definite": self.positive_definite, "batch_dims": 1}
        transposed = product(self.T) if self.has_transpose and not self.symmetric else None
        new = LinearOperator(product(self), transposed, **tags)
        new.each = self
        return new

    def low(self, dtype: torch.dtype) -> LinearOperator:
        """A with products in a lower precision, on the same vectors; its products count as A's.

        Raises: TypeError where no such form is known.
        """
        if self._low is None:
            raise TypeError(
                f"this operator has no form in {dtype}: that of a matrix has, and that of an inner problem which is "
                f"given as a callable and is not stochastic"
            )
        new = self._low(dtype)
        new._counter = self._counter
        return new.damped(self.damping)


def function(
    matvec: Callable[..., PyTree],
    transpose: Callable[..., PyTree] | None = None,
    *,
    tensors: tuple[Any, ...] = (),
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
) -> LinearOperator:
    """The operator of a function on pytrees of tensors.

    Args:
        matvec: (v, *tensors) ↦ A v; the result has v's structure, shapes, dtypes and devices.
        transpose: (v, *tensors) ↦ Aᵀ v, likewise.
        tensors: what A depends on, for `implicit.linear_solve`, which differentiates with respect to them.
        symmetric, positive_definite, batch_dims: see LinearOperator.

    Raises: ValueError at a product whose result is not like v, naming the leaf.

    Example:
        >>> op = function(lambda v: {"a": 2 * v["a"]}, symmetric=True)
        >>> op({"a": torch.tensor([1.0, 3.0])})
        {'a': tensor([2., 6.])}
    """

    def on_vectors(product: Callable[..., PyTree]) -> Product:
        return lambda v: v.space.vector(product(v.tree, *tensors), "the operator's product")

    op = LinearOperator(
        on_vectors(matvec),
        None if transpose is None else on_vectors(transpose),
        symmetric=symmetric,
        positive_definite=positive_definite,
        batch_dims=batch_dims,
    )
    op.declared = matvec, tensors
    return op


def matrix(a: Tensor, *, symmetric: bool = False, positive_definite: bool = False) -> LinearOperator:
    """The operator of a matrix [n, n], or of B matrices [B, n, n] on vectors [B, n].

    Example:
        >>> matrix(torch.tensor([[2.0, 1.0], [0.0, 3.0]]))(torch.tensor([1.0, 1.0]))
        tensor([3., 3.])
    """
    if a.ndim not in (2, 3) or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"matrix must be [n, n] or [B, n, n], got shape {tuple(a.shape)}")
    op = function(
        lambda v, a: (a @ v.unsqueeze(-1)).squeeze(-1),
        lambda v, a: (a.mT @ v.unsqueeze(-1)).squeeze(-1),
        tensors=(a,),
        symmetric=symmetric,
        positive_definite=positive_definite,
        batch_dims=a.ndim - 2,
    )

    def low(dtype: torch.dtype) -> LinearOperator:
        small = a.to(dtype)
        return function(
            lambda v: (small @ v.to(dtype).unsqueeze(-1)).squeeze(-1).to(v.dtype),
            lambda v: (small.mT @ v.to(dtype).unsqueeze(-1)).squeeze(-1).to(v.dtype),
            symmetric=symmetric,
            batch_dims=a.ndim - 2,
        )

    op._low = low
    return op


def adjoint(
    linearise: Callable[[], Linearisation],
    *,
    fixed_point: bool,
    symmetric: bool,
    positive_definite: bool,
    batch_dims: int,
    low: Callable[[torch.dtype], Linearisation] | None = None,
) -> LinearOperator:
    """Aᵀ of a residual F (A = ∂₁F), or of a fixed point map Φ (A = I − ∂₁Φ), by automatic differentiation.

    Args:
        linearise: gives the Linearisation that a product uses: always the same one, or a new draw for each product.
        low: gives that of the same inner problem in another dtype.
    """

    def product(pull: Callable[[Linearisation, Any], list[Tensor]], complement: bool = fixed_point) -> Product:
        return _Owned(lambda v: v.space.pack(pull(linearise(), v.leaves)), complement)

    def products(pull: Callable[[Linearisation, Any], list[Tensor]]) -> Callable[[Basis], Basis]:
        def apply(basis: Basis) -> Basis:
            pulled = basis.with_leaves(pull(linearise(), basis.leaves()))
            return basis.plus(pulled, -1.0) if fixed_point else pulled

        return apply

    def in_precision(dtype: torch.dtype) -> LinearOperator:
        assert low is not None
        reduced = low(dtype)

        def cast(pull: Callable[[Sequence[Tensor]], list[Tensor]]) -> Product:
            def apply(v: Vector) -> Vector:
                pulled = pull(_autodiff.cast(v.leaves, reduced.outputs))
                image = v.space.pack(_autodiff.cast(pulled, v.leaves))
                return v - image if fixed_point else image

            return apply

        tags: Any = {"symmetric": symmetric, "positive_definite": positive_definite, "batch_dims": batch_dims}
        return LinearOperator(cast(reduced.vjp), cast(reduced.jvp), **tags)

    return LinearOperator(
        product(Linearisation.vjp),
        product(Linearisation.jvp),
        symmetric=symmetric,
        positive_definite=positive_definite,
        batch_dims=batch_dims,
        many=products(Linearisation.vjp_many),
        many_transpose=products(Linearisation.jvp_many),
        contraction=product(Linearisation.vjp, complement=False) if fixed_point else None,
        low=None if low is None else in_precision,
    )


@dataclass(frozen=True)
class GaussNewton:
    """An inner loss g = loss ∘ model + penalty whose Hessian is replaced by its Gauss–Newton matrix.

        g(w, λ) = ℓ(m(w, λ), λ) + p(w, λ),      A = JᵀHJ + ∇²₁₁p,   J = ∂₁m,  H = ∇²ℓ

    Pass it as inner_loss to `implicit.grad`. With a convex ℓ and p, A is positive semi-definite wherever w is, so CG
    applies where the Hessian is indefinite (a network in mid-training). It is the Hessian where the model is linear in
    w, or ∇ℓ = 0, and an approximation elsewhere; ∇₁g and ∂₂∇₁g are exact. The residual of the adjoint system is that
    of A, and does not tell how far A is from the Hessian.

    Args:
        model: m(params, hparams) ↦ outputs, a tensor or a pytree.
        loss: ℓ(outputs, hparams) ↦ scalar.
        penalty: p(params, hparams) ↦ scalar.

    Raises: TypeError for a model, a loss or a penalty that is no function.
    Cost: a product takes one pass through the graph of J, one through that of Jᵀ, one through ∇ℓ, and one through ∇p.
    Source: Schraudolph 2002; Martens 2010, section 4.2.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 3.0])
        >>> g = GaussNewton(
        ...     lambda w, lam: x @ w, lambda z, lam: ((z - y) ** 2).sum() / 2, lambda w, lam: lam * w @ w / 2
        ... )
        >>> lam = torch.tensor(1.0, requires_grad=True)
        >>> w = torch.tensor([7.0 / 6])
        >>> hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=g, params=w, hparams=lam).grads
        tensor(-0.1944)
    """

    model: Callable[[Any, Any], PyTree]
    loss: Callable[[PyTree, Any], Tensor]
    penalty: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("model", "loss", "penalty"):
            part = getattr(self, name)
            if not callable(part) and not (name == "penalty" and part is None):
                raise TypeError(f"GaussNewton: {name} must be a function, got {type(part).__name__}")

    def __call__(self, params: PyTree, hparams: PyTree) -> Tensor:
        """g(w, λ)."""
        fit = self.loss(self.model(params, hparams), hparams)
        return fit if self.penalty is None else fit + self.penalty(params, hparams)

    def linearise(
        self, params: PyTree, hparams: PyTree, leaves: Sequence[Tensor], differentiated: Sequence[Tensor], message: str
    ) -> Linearisation:
        """∇₁g with its graph and products with A in ∇²₁₁g's place, from one evaluation of the model."""
        z = self.model(params, hparams)
        outputs, _, rebuild = flatten(z, "the output of GaussNewton's model")
        points = [y.detach().requires_grad_() for y in outputs]
        fit = as_scalar(self.loss(rebuild(points), hparams), "GaussNewton's loss")
        slopes = _autodiff.grad([fit], points, create_graph=True)
        j, h, bent = Linearisation(outputs, leaves, ()), Linearisation(slopes, points, ()), None
        total = as_scalar(self.loss(z, hparams), "GaussNewton's loss")
        if self.penalty is not None:
            penalty = as_scalar(self.penalty(params, hparams), "GaussNewton's penalty")
            bent = Linearisation(_autodiff.grad([penalty], leaves, create_graph=True), leaves, ())
            total = total + penalty

        def product(v: Sequence[Tensor], batched: bool) -> list[Tensor]:
            fit = j.vjp_many(h.vjp_many(j.jvp_many(v))) if batched else j.vjp(h.vjp(j.jvp(v)))
            if bent is None:
                return fit
            return _autodiff.add(fit, bent.vjp_many(v) if batched else bent.vjp(v))

        gradient = _autodiff.grad([total], leaves, create_graph=True, must_reach=message)
        return Linearisation(gradient, leaves, differentiated, product)
