"""Linear operators: a product, a transposed product and known properties. Solvers see neither losses nor models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from . import _autodiff
from ._autodiff import Linearisation, as_scalar
from ._basis import Basis
from ._sum import Sum as Sum
from ._tree import PyTree, flatten
from ._vector import Vector

Product = Callable[[Vector], Vector]


class LinearOperator:
    """A linear map A on vectors (or pytrees of tensors) of one space, called as A(v).

    Args:
        matvec: v ↦ A v on Vectors. For pytrees use `operators.function`, for a matrix `operators.matrix`.
        transpose: v ↦ Aᵀ v; only LSQR and NormalCG need it, and not where A is symmetric.
        symmetric: A = Aᵀ, as the caller declares. CG and MINRES refuse an operator without it.
        positive_definite: vᵀAv > 0, as the caller declares; implies symmetric.
        batch_dims: 1 where every leaf has a leading axis of independent systems, else 0.
        many: V ↦ A V for a Basis V, if that is cheaper than one product after another.
        many_transpose: V ↦ Aᵀ V, likewise.
        contraction: v ↦ v − A v, if that is cheaper than A v (for A = I − Jᵀ it is Jᵀv).
        stochastic: every product uses a new random draw of A, so solvers do not compare products.

    Attributes:
        declared: (matvec, tensors) of an operator that was made by `function`, else None.
        each: the operator A if this one is A.stacked(), else None.

    Cost: `products` counts the products of the operator, its transpose and its damped forms together.

    Example:
        >>> op = hg.operators.LinearOperator(lambda v: 2 * v, symmetric=True)
        >>> op(torch.ones(3)), op.products
        (tensor([2., 2., 2.]), 1)
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
        stochastic: bool = False,
    ):
        self.symmetric = symmetric or positive_definite
        self.positive_definite = positive_definite
        self.batch_dims, self.stochastic = batch_dims, stochastic
        self.damping = 0.0
        self.declared: tuple[Callable[..., PyTree], tuple[Any, ...]] | None = None
        self.each: LinearOperator | None = None
        self._matvec, self._many, self._contraction = matvec, many, contraction
        self._transpose, self._many_transpose = transpose, many_transpose
        if self.symmetric:
            self._transpose, self._many_transpose = self._matvec, many
        self._counter = SimpleNamespace(products=0)  # shared with the transpose and the damped operators

    @property
    def products(self) -> int:
        """Products done so far, with A or Aᵀ; a product with m vectors at once counts m."""
        return self._counter.products

    @property
    def has_transpose(self) -> bool:
        return self._transpose is not None

    def __call__(self, v: Any) -> Any:
        """A v (+ damping · v): a Vector for a Vector, a pytree for a pytree.

        The product of a Vector may share memory with it, or with the next product: copy it to keep it.
        """
        if not isinstance(v, Vector):
            return self(Vector.of(v, "v", self.batch_dims)).copy().tree
        self._counter.products += 1
        product = self._matvec(v)
        return product + v * self.damping if self.damping else product

    def contract(self, v: Vector) -> Vector:
        """v − A v, at the cost of one product. Its memory may be shared as that of A v is."""
        if self._contraction is None:
            return v - self(v)
        self._counter.products += 1
        image = self._contraction(v)
        return image - v * self.damping if self.damping else image

    def copying(self) -> LinearOperator:
        """The same operator with every product in new memory; its products count as products of A."""
        matvec, transpose = self._matvec, self._transpose
        return self._derived(
            _matvec=lambda v: matvec(v).copy(),
            _transpose=None if transpose is None else lambda v: transpose(v).copy(),
            _contraction=None,
        )

    def many(self, basis: Basis) -> Basis:
        """A V for a stack of vectors V."""
        if not basis.m:
            return basis
        if self._many is None:
            result = Basis(basis[0], basis.m)
            for j in range(basis.m):
                result[j] = self(basis[j])
            return result
        self._counter.products += basis.m
        result = self._many(basis)
        return result.plus(basis, self.damping) if self.damping else result

    def _derived(self, **parts: Any) -> LinearOperator:
        new = object.__new__(LinearOperator)
        new.__dict__.update(self.__dict__ | {"declared": None} | parts)
        return new

    @property
    def T(self) -> LinearOperator:
        """Aᵀ, whose products count as products of A. Raises TypeError if A has no transposed product."""
        if self.symmetric:
            return self
        if self._transpose is None:
            raise TypeError("this operator has no transposed product: pass transpose=, or use a solver that needs none")
        forward = {"_matvec": self._transpose, "_many": self._many_transpose}
        return self._derived(**forward, _transpose=self._matvec, _many_transpose=self._many, _contraction=None)

    def damped(self, damping: float) -> LinearOperator:
        """A + damping · I, whose products count as products of A."""
        return self._derived(damping=self.damping + damping) if damping else self

    def stacked(self) -> LinearOperator:
        """A for k right hand sides at once, stacked along a new leading axis of every leaf: k vectorised products.

        CG()(op.stacked(), b) runs k independent CG iterations in lockstep, each with its own status; BlockCG searches
        one common space. `products` counts k products at once as one. If A has batch_dims=1, leaves are [k, B, ...].

        Example:
            >>> op = matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), symmetric=True)
            >>> hg.solvers.CG(rtol=1e-6)(op.stacked(), torch.tensor([[1.0, 2.0], [0.0, 11.0]])).value
            tensor([[ 0.0909,  0.6364],
                    [-1.0000,  4.0000]])
        """

        def product(op: LinearOperator) -> Product:
            def apply(v: Vector) -> Vector:
                basis = Basis(v.space.one, v.space.batch_shape[0]).with_leaves(v.leaves)
                return v.space.pack(op.many(basis).leaves())

            return apply

        new = LinearOperator(
            product(self),
            product(self.T) if self.has_transpose and not self.symmetric else None,
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
            batch_dims=self.batch_dims + 1,
            stochastic=self.stochastic,
        )
        new.each = self
        return new


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
        tensors: a tuple of what A depends on, for `implicit.linear_solve`, which differentiates with respect to them.
        symmetric, positive_definite, batch_dims: see LinearOperator.

    Raises: TypeError if tensors is not a tuple; ValueError at a product whose result is not like v.

    Example:
        >>> op = function(lambda v: {"a": 2 * v["a"]}, symmetric=True)
        >>> op({"a": torch.tensor([1.0, 3.0])})
        {'a': tensor([2., 6.])}
    """

    if not isinstance(tensors, (tuple, list)):
        raise TypeError(f"tensors must be a tuple of what matvec takes after v, got {type(tensors).__name__}")

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
    return function(
        lambda v, a: (a @ v.unsqueeze(-1)).squeeze(-1),
        lambda v, a: (a.mT @ v.unsqueeze(-1)).squeeze(-1),
        tensors=(a,),
        symmetric=symmetric,
        positive_definite=positive_definite,
        batch_dims=a.ndim - 2,
    )


def adjoint(
    linearise: Callable[[], Linearisation],
    *,
    fixed_point: bool,
    symmetric: bool = False,
    positive_definite: bool = False,
    batch_dims: int = 0,
    stochastic: bool = False,
) -> LinearOperator:
    """Aᵀ of a residual F (A = ∂₁F), or of a fixed point map Φ (A = I − ∂₁Φ), by automatic differentiation.

    linearise: returns the Linearisation of F or Φ for one product: always the same one, or a new draw each time.
    """

    def products(one: Any, several: Any) -> tuple[Product, Callable[[Basis], Basis]]:
        def product(v: Vector) -> Vector:
            image = v.space.pack(one(linearise(), v.leaves))
            return v - image if fixed_point else image

        def many(basis: Basis) -> Basis:
            images = basis.with_leaves(several(linearise(), basis.leaves()))
            return basis.plus(images, -1.0) if fixed_point else images

        return product, many

    def contraction(v: Vector) -> Vector:
        return v.space.pack(linearise().vjp(v.leaves))

    product, many = products(Linearisation.vjp, Linearisation.vjp_many)
    transpose, many_transpose = products(Linearisation.jvp, Linearisation.jvp_many)
    return LinearOperator(
        product,
        transpose,
        symmetric=symmetric,
        positive_definite=positive_definite,
        batch_dims=batch_dims,
        many=many,
        many_transpose=many_transpose,
        contraction=contraction if fixed_point else None,
        stochastic=stochastic,
    )


@dataclass(frozen=True)
class Stochastic:
    """An inner loss or a map that draws random numbers at every evaluation: minibatches, dropout, noise.

    Pass it as inner_loss, fp_map or residual to `implicit.grad`: every product then evaluates it again, so the system
    is solved for the mean of the draws, by a solver that averages (`solvers.Optimizer` with a falling step size).

    Args:
        function: (params, hparams) ↦ the value, as `implicit.grad` takes it.
        draws: number of draws over which the last product, ∂₂Fᵀv, is averaged.

    Source: Grazzi, Pontil and Salzo 2021, Algorithm 1.

    Example:
        >>> noisy = Stochastic(lambda w, lam: (w - lam * torch.rand(())) ** 2, draws=10)
    """

    function: Callable[[Any, Any], Any]
    draws: int = 1

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"Stochastic: function is called at every product; {self.function!r} is not callable")
        if not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"Stochastic: draws must be an integer ≥ 1, got {self.draws!r}")

    def __call__(self, params: PyTree, hparams: PyTree) -> Any:
        """One draw."""
        return self.function(params, hparams)


@dataclass(frozen=True)
class GaussNewton:
    """An inner loss g = loss ∘ model + penalty whose Hessian is replaced by its Gauss–Newton matrix.

        g(w, λ) = ℓ(m(w, λ), λ) + p(w, λ),      A = JᵀHJ + ∇²₁₁p,   J = ∂₁m,  H = ∇²ℓ

    Pass it as inner_loss to `implicit.grad`. With a convex ℓ and p, A is positive semi-definite at every w, so CG
    applies where the Hessian is indefinite. A equals the Hessian if the model is linear in w, or ∇ℓ = 0. Otherwise it
    is an approximation, whose error the residual of the adjoint system does not show; ∇₁g and ∂₂∇₁g are exact.

    Args:
        model: m(params, hparams) ↦ outputs, a tensor or a pytree.
        loss: ℓ(outputs, hparams) ↦ scalar.
        penalty: p(params, hparams) ↦ scalar.

    For a sum over batches pass `Sum(GaussNewton(model, loss), batches, penalty=...)`, which gives the batch to model
    and loss as a third argument.

    Raises: TypeError for a model, a loss or a penalty that is not a function.
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

    model: Callable[..., PyTree]
    loss: Callable[..., Tensor]
    penalty: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("model", "loss", "penalty"):
            part = getattr(self, name)
            if not callable(part) and not (name == "penalty" and part is None):
                raise TypeError(f"GaussNewton: {name} must be a function, got {type(part).__name__}")

    def __call__(self, params: PyTree, hparams: PyTree, *batch: Any) -> Tensor:
        """g(w, λ), of one batch if this is the loss of a Sum."""
        fit = self.loss(self.model(params, hparams, *batch), hparams, *batch)
        return fit if self.penalty is None else fit + self.penalty(params, hparams)

    def on(self, batch: Any) -> GaussNewton:
        """The GaussNewton of one batch, which model and loss take as a third argument."""
        return GaussNewton(
            lambda params, hparams: self.model(params, hparams, batch),
            lambda outputs, hparams: self.loss(outputs, hparams, batch),
            self.penalty,
        )

    def linearise(
        self, params: PyTree, hparams: PyTree, leaves: Sequence[Tensor], differentiated: Sequence[Tensor]
    ) -> Linearisation:
        """The Linearisation of ∇₁g with A in place of ∇²₁₁g, from one evaluation of the model."""
        z = self.model(params, hparams)
        outputs, _, rebuild = flatten(z, "the output of GaussNewton's model")
        points = [y.detach().requires_grad_() for y in outputs]
        fit = as_scalar(self.loss(rebuild(points), hparams), "GaussNewton's loss")
        slopes = _autodiff.grad([fit], points, create_graph=True)
        j, h, of_penalty = Linearisation(outputs, leaves, ()), Linearisation(slopes, points, ()), None
        total = as_scalar(self.loss(z, hparams), "GaussNewton's loss")
        if self.penalty is not None:
            penalty = as_scalar(self.penalty(params, hparams), "GaussNewton's penalty")
            of_penalty = Linearisation(_autodiff.grad([penalty], leaves, create_graph=True), leaves, ())
            total = total + penalty

        def product(v: Sequence[Tensor], batched: bool) -> list[Tensor]:
            fit = j.vjp_many(h.vjp_many(j.jvp_many(v))) if batched else j.vjp(h.vjp(j.jvp(v)))
            if of_penalty is None:
                return fit
            return list(map(add, fit, of_penalty.vjp_many(v) if batched else of_penalty.vjp(v)))

        gradient = _autodiff.grad([total], leaves, create_graph=True, must_reach=_autodiff.UNREACHED)
        return Linearisation(gradient, leaves, differentiated, product)


def has_curvature(inner_loss: Any) -> bool:
    """Whether an inner loss replaces its Hessian by another matrix: a GaussNewton, or a Sum of one."""
    return isinstance(inner_loss, GaussNewton) or (isinstance(inner_loss, Sum) and inner_loss.curvature is not None)
