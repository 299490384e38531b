"""A bilevel problem at a point (w, λ), checked and evaluated once, and the operator of its adjoint system."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .. import _autodiff, _graph, _torch, operators
from .._autodiff import Linearisation, as_losses, as_scalar, check_hparams, users_autocast, without_autocast
from .._detached import warn_of_lost
from .._graph import check_independent
from .._reach import noticing
from .._recorded import Recorded
from .._solution import at_kink, warn
from .._tree import PyTree, check_distinct, difference, filled, flatten
from .._vector import Space, Vector
from ..operators import LinearOperator, Stochastic, Sum, has_curvature

DECLARED = ("symmetric", "positive_definite", "batch_dims", "compile")
NO_HPARAMS = (
    "neither outer_loss nor the inner problem depends on any of hparams, so the hypergradient would be zero: are they "
    "read as numbers (.item(), float()), detached, or other tensors than those that the losses use?"
)
INNER_UNREACHED = (
    "the inner problem does not depend on hparams, so its solution counts as constant: are they read in it as numbers "
    "(.item(), float()), detached, or copied?"
)
LIVE_TOO = (
    "{} uses the live {} beside the params that it is called with, and the live ones count as constants: is that "
    "intended? Use the argument alone (torch.func.functional_call), or detach what is meant to be constant"
)


class Problem:
    """A bilevel problem and the point (w, λ) that a hypergradient is taken at.

        F = ∇₁g for an inner loss g, w − Φ for a fixed point map Φ, or F itself;      A = ∂₁F,      Aᵀv = ∇₁E

    Args: those of `implicit.grad`.

    Attributes:
        outer_loss: E(params, hparams); None in a result whose outer loss was given evaluated.
        kind: which of "inner_loss", "fp_map" and "residual" was given.
        inner: that callable; None in a result if it was given evaluated.
        params, hparams: w and λ; in a result without graphs, in the user's memory (not copied).
        symmetric, positive_definite, batch_dims, compile: as declared; an inner loss implies the first two.

    Attributes for the rest of the library:
        leaves: the tensors of w that are differentiated; new leaves of autograd if both losses are callables.
        differentiated: the leaves of λ that require grad.
        space, outer_space: the spaces of v and of ∇f.
        expected_products: how many products with Aᵀ will be taken; None if unknown.

    Example:
        >>> lam = torch.tensor(3.0, requires_grad=True)
        >>> inner_loss = lambda w, lam: (w - lam) ** 2
        >>> result = hg.implicit.grad(
        ...     lambda w, lam: w**2 / 2, inner_loss=inner_loss, params=torch.tensor(3.0), hparams=lam
        ... )
        >>> result.problem.kind, result.problem.params, result.problem.positive_definite
        ('inner_loss', tensor(3.), True)
    """

    at_kink: Tensor | None = None
    others: Sequence[Tensor] = ()  # tensors of the inner problem that require grad, not in params or hparams
    expected_products: int | None = None
    several = False  # whether outer_loss returns a vector of k losses (`jacobian`)
    linearisation: Linearisation | None = None
    _versions: Sequence[int] = ()

    def __init__(
        self,
        outer_loss: Any,
        *,
        params: PyTree,
        hparams: PyTree,
        inner_loss: Any = None,
        fp_map: Any = None,
        residual: Any = None,
        symmetric: bool = False,
        positive_definite: bool = False,
        batch_dims: int = 0,
        compile: bool | str = False,
    ):
        self.outer_loss = outer_loss
        self.kind, self.inner = one_of(inner_loss=inner_loss, fp_map=fp_map, residual=residual)
        if has_curvature(self.inner) and self.kind != "inner_loss":
            raise TypeError(f"pass a GaussNewton as inner_loss, not as {self.kind}")
        self.fixed_point, self.stochastic = self.kind == "fp_map", isinstance(self.inner, Stochastic)
        self.positive_definite = positive_definite or self.kind == "inner_loss"
        self.symmetric = symmetric or self.positive_definite
        self.batch_dims, self.compile = batch_dims, compile
        self._set_params(params)
        self._set_hparams(hparams)
        if not isinstance(compile, (bool, str)):
            raise TypeError(f"compile must be True, False or the name of a backend, got {compile!r}")
        if compile and (isinstance(self.inner, (Stochastic, Sum)) or has_curvature(self.inner)):
            raise TypeError(f"compile needs an {self.kind} that is neither Stochastic, nor GaussNewton, nor a Sum")

    def _set_params(self, params: PyTree) -> None:
        given, names, rebuild = flatten(params, "params")
        check_distinct(given, names)
        self.params, self._given, self._names, self._rebuild = rebuild(given), given, names, rebuild
        trained = [i for i, leaf in enumerate(given) if leaf.requires_grad]
        # If some leaves require grad, the others are frozen; if none does, all leaves are unknowns.
        self._places = trained or list(range(len(given)))
        self._chosen = [given[i] for i in self._places]
        self.space = Space(given, names, rebuild, self.batch_dims, self._places)
        # Whether a loss was given evaluated, that is, computed from the user's own tensors.
        self.live = not callable(self.inner) or not (self.outer_loss is None or callable(self.outer_loss))
        if self.live and not trained:
            raise ValueError(f"{names[0]} does not require grad, so evaluated losses have no derivative in it")
        self.leaves = self._chosen if self.live else [_torch.new_leaf(leaf) for leaf in self._chosen]
        self._argument = rebuild(filled(given, self._places, self.leaves))
        self.replaced = [] if self.live else [x for x in self._chosen if x.requires_grad and x.is_leaf]

    def _set_hparams(self, hparams: PyTree) -> None:
        outer, names, rebuild = flatten(hparams, "hparams", complex=True)
        self.hparams, self._outer, self._outer_names, self._rebuild_outer = rebuild(outer), outer, names, rebuild
        self._outer_places, self.differentiated = check_hparams(outer, names)
        if not self.live:
            return
        if {id(leaf) for leaf in self._given} & {id(leaf) for leaf in outer}:
            raise ValueError("with evaluated losses no tensor may be in params and in hparams; pass callables")
        check_independent([*self._given, *outer], [*self._names, *names])

    @cached_property
    def outer_space(self) -> Space:
        """The space of ∇f, over the differentiated leaves of hparams."""
        return Space(self._outer, self._outer_names, self._rebuild_outer, places=self._outer_places)

    @property
    def arguments(self) -> tuple[PyTree, PyTree]:
        """The params and hparams that callables are called with."""
        return self._argument, self.hparams

    @contextmanager
    def without_hooks_and_autocast(self, warned: bool = False) -> Iterator[list[Tensor]]:
        """Suspend gradient hooks and inference_mode, and restrict autocast to losses and maps.

        Yields the hparams with hooks, which the caller applies; warns of hooks on params if a loss was given evaluated.
        """
        suspended = _torch.hooks_suspended([*self._chosen, *self._outer])
        # Embeddings and weight norms are replaced here once, for all evaluations inside.
        correct, outside = _torch.correct_derivatives(dense=True), _torch.outside_inference_mode()
        with outside, suspended as hooked, without_autocast(self.space.device), correct:
            ids = {id(x) for x in hooked}
            names = [name for name, x in zip(self._names, self._given, strict=True) if id(x) in ids] if ids else []
            if names and self.live and not warned:
                warn(
                    f"{', '.join(names[:5])} have gradient hooks: these do not act on the hypergradient, which is that "
                    f"of the losses alone. Remove them, or put what they do into the losses"
                )
            yield [x for x in self._outer if id(x) in ids]

    def evaluate(self, keep: bool = False) -> None:
        """Evaluate the inner problem and the outer loss once; keep=True keeps their graphs and the values of F.

        Sets: residual_norm = ‖F‖, outer_value = E with its graph, b = ∇₁E as a copy, and direct = ∇₂E for the
            differentiated hparams (None for one that E does not depend on).
        """
        self.keep, self.residual_norm = keep, None
        if not self.stochastic and self.linearisation is None:
            self.linearisation = self.linearise()
        if self.linearisation is not None:
            if _graph.ranks() > 1:
                _graph.refuse_freed(self.leaves)
                warn_of_local(self.linearisation.outputs, self.kind)
            residual = self.residual_of(self.linearisation)
            self.residual_norm = residual.norm()
            self.at_kink = at_kink(self.point, residual) if self.kind == "inner_loss" else None
            del residual
            if not keep:
                self.linearisation.drop_values()
        self.outer_value, self.b, self.direct = outer_gradients(self, keep)

    def linearise(self) -> Linearisation:
        """The graph of ∇₁g, Φ or F at params and hparams."""
        looked_at = None if isinstance(self.inner, Sum) or has_curvature(self.inner) else self.inner
        with torch.enable_grad(), _torch.correct_derivatives(dense=True):
            with users_autocast(), noticing(looked_at) as noticed:
                if has_curvature(self.inner):
                    return self.inner.linearise(*self.arguments, self.leaves, self.differentiated)
                value = self.inner(*self.arguments) if callable(self.inner) else self.inner
            if self.kind == "inner_loss":
                value = as_scalar(value, "inner_loss")
                outputs = _autodiff.grad([value], self.leaves, create_graph=True, must_reach=_autodiff.UNREACHED)
            else:
                outputs = self.space.check(value, f"the value of {self.kind}")
            values: Any = [value] if self.kind == "inner_loss" else outputs
            self.others = self.warn_of_live(values, self.kind)
            if self.live:
                _graph.refuse_weight_norm(values, self.leaves, self.kind)
        compiled = None
        if self.compile:
            backend = None if self.compile is True else self.compile
            compiled = partial(Recorded, space=self.space, backend=backend, expected=self.expected_products)
        linearisation = Linearisation(outputs, self.leaves, self.differentiated, compile=compiled)
        linearisation.detaches = noticed.found
        return linearisation

    def residual_of(self, linearisation: Any) -> Vector:
        """F: ∇₁g, w − Φ, or F itself. To be called before the values of the linearisation are dropped."""
        value = self.space.pack([y.detach() for y in linearisation.outputs])
        return self.point - value if self.fixed_point else value

    @property
    def point(self) -> Vector:
        """w as a vector."""
        return self.space.pack([leaf.detach() for leaf in self._chosen])

    def operator(self) -> LinearOperator:
        """Aᵀ as an operator. It is not stored here, because a reference cycle would keep the graph alive."""
        known = self.linearisation
        return operators.adjoint(
            self.linearise if known is None else lambda: known,
            fixed_point=self.fixed_point,
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
            batch_dims=self.batch_dims,
            stochastic=self.stochastic,
        )

    def last_product(self, v: Vector) -> Vector:
        """Aᵀv; the same reverse pass gives −∂₂Fᵀv, stored as `cross` (None for a leaf of λ that F does not use)."""
        draws = self.inner.draws if isinstance(self.inner, Stochastic) else 1
        image, cross = self._product_with_both(v)
        for _ in range(draws - 1):
            image, cross = image.copy(), _autodiff.copies(cross)  # a map may reuse the memory of its products
            new_image, new_cross = self._product_with_both(v)
            image, cross = image + new_image, _autodiff.add_or_none(cross, new_cross)
        scale = 1 / draws
        self.cross = _autodiff.scaled(cross, scale if self.fixed_point else -scale)
        image = image * scale if draws > 1 else image
        return v - image if self.fixed_point else image

    def _product_with_both(self, v: Vector) -> tuple[Vector, Sequence[Tensor | None]]:
        linearisation = self.linearise() if self.linearisation is None else self.linearisation
        if self.several:
            pulled, cross = linearisation.vjp_both_many(v.leaves)
        else:
            pulled, cross = linearisation.vjp_both(v.leaves, retain_graph=self.keep)
        warn_of_hooks(linearisation.hooks, self.kind)
        if linearisation.params_unreached and callable(self.inner):
            self.check_uses_arguments(linearisation.outputs, self.kind)
        if self.linearisation is None:  # a stochastic problem: the residual of the last draw
            self.residual_norm = self.residual_of(linearisation).norm()
        return v.space.pack(pulled), cross

    def grads(self) -> list[Tensor]:
        """∇₂E − ∂₂Fᵀv for the differentiated hparams, after the last product. Raises or warns if hparams are unused."""
        if all(g is None for g in (*self.direct, *self.cross)):
            raise ValueError(NO_HPARAMS)
        if all(g is None for g in self.cross) and self.space.length:
            warn(INNER_UNREACHED)
        elif self.others:
            shapes = ", ".join(str(tuple(x.shape)) for x in self.others[:3])
            warn(
                f"{self.kind} depends on {len(self.others)} tensors that require grad and are in neither params nor "
                f"hparams (of shape {shapes}): they count as constants. If they were trained with params, pass them in "
                f"params; if not, freeze them (requires_grad_(False)) or detach them"
            )
        return _autodiff.new_zeros(_autodiff.add_or_none(self.direct, self.cross), self.differentiated)

    def cross_vector(self) -> Vector:
        """−∂₂Fᵀv of the last product, as a Vector of outer_space."""
        return self.outer_space.pack(_autodiff.or_zeros(self.cross, self.differentiated))

    def of_all_leaves(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients in the order of all leaves of hparams; None for leaves that are not differentiated."""
        return filled([None] * len(self._outer), self._outer_places, grads)

    def tree_of(self, grads: Sequence[Tensor]) -> PyTree:
        """Gradients of the differentiated leaves in hparams' structure; zeros for leaves that do not require grad."""
        every = self.of_all_leaves(grads)
        lead = (len(self.outer_value),) if self.several else ()
        return self._rebuild_outer(_autodiff.new_zeros(every, self._outer, *lead))

    def hparams_with(self, leaves: Iterable[Tensor]) -> PyTree:
        """hparams with the differentiated leaves replaced by these."""
        return self._rebuild_outer(filled(self._outer, self._outer_places, leaves))

    def again(self, params: PyTree | None = None, hparams: PyTree | None = None) -> Problem:
        """The same problem, not evaluated yet, at the same point or at the one given."""
        options: dict[str, Any] = {name: getattr(self, name) for name in DECLARED} | {self.kind: self.inner}
        options["params"] = self.params if params is None else params
        return Problem(self.outer_loss, hparams=self.hparams if hparams is None else hparams, **options)

    def with_params(self, vector: Vector) -> PyTree:
        """params with the unknown leaves replaced by those of a vector; the other leaves stay frozen."""
        leaves = vector.leaves
        if len(leaves) < len(self._given):
            leaves = [x.detach().clone().requires_grad_() for x in leaves]
        return self._rebuild(filled([x.detach() for x in self._given], self._places, leaves))

    def without_graphs(self) -> Problem:
        """The problem as a result keeps it: no graphs, no copies of the user's tensors, None for evaluated losses."""
        own, kept = vars(self), object.__new__(Problem)
        vars(kept).update({name: own[name] for name in ("kind", "fixed_point", "stochastic", *DECLARED)})
        kept.outer_loss = self.outer_loss if callable(self.outer_loss) else None
        kept.inner = self.inner if callable(self.inner) else None
        kept.params = self._rebuild([x if x.is_leaf else x.detach() for x in self._given])
        outer = [x if x.is_leaf else x.detach().requires_grad_(x.requires_grad) for x in self._outer]
        kept.hparams = self._rebuild_outer(outer)
        kept._versions = [_torch.version_of(x) for x in (*self._given, *self._outer)]
        return kept

    @property
    def changed(self) -> list[str]:
        """Which of "params" and "hparams" were changed in place since the result was computed."""
        inner, outer = flatten(self.params, "params")[0], flatten(self.hparams, "hparams", complex=True)[0]
        now = [_torch.version_of(x) for x in (*inner, *outer)]
        pairs = (("params", slice(len(inner))), ("hparams", slice(len(inner), None)))
        return [name for name, part in pairs if self._versions[part] != now[part]]

    def _equations(self) -> Sequence[Tensor]:
        """F, evaluated again with its graph."""
        outputs = self.linearise().outputs
        return difference(self.leaves, outputs) if self.fixed_point else outputs

    def warn_of_lost(self, v: Vector) -> None:
        """Warn with LostDerivative if the inner problem detaches what its derivative at the adjoint v needs."""
        if self.linearisation is None or not self.linearisation.detaches or all(g is None for g in self.cross):
            return
        kept, self.compile = (self.others, self.compile), False
        try:
            with self.without_hooks_and_autocast(warned=True):
                leaves = [x[0] if self.several else x for x in v.leaves]
                warn_of_lost(self.kind, self.inner, self._equations, self.leaves, self.differentiated, leaves)
        finally:
            self.others, self.compile = kept

    def warn_of_live(self, values: Sequence[Any], name: str) -> list[Tensor]:
        """The undeclared leaves of values. Warns if values depend on the user's live params beside the given ones."""
        own = {id(x) for x in self.replaced}
        declared = [*(x for x in self._given if id(x) not in own), *self.leaves, *self._outer]
        found = _graph.undeclared_leaves(values, declared)
        live = [x for x in found if id(x) in own]
        if live and _graph.depends(values, self.leaves):
            warn(LIVE_TOO.format(name, "params"))
        return [x for x in found if id(x) not in own] if live else found

    def check_uses_arguments(self, values: Sequence[Any], name: str) -> None:
        """Raise if a callable ignored the params that it was given, or used nothing that is differentiated."""
        if _graph.depends(values, self.leaves):
            return
        declared = [*self.leaves, *self.differentiated]
        if _graph.undeclared_leaves(values, declared) or _graph.depends(values, self._given):
            raise ValueError(
                f"{name} does not use the params that it is called with, but the live ones, or others that require "
                f"grad, so its derivative would be taken for zero: use the argument (torch.func.functional_call), or "
                f"pass evaluated losses"
            )
        if name == "outer_loss" and not _graph.depends(values, self.differentiated):
            raise ValueError(
                f"{name} depends neither on params nor on hparams: is it computed under no_grad or inference_mode, "
                f"from detached tensors, or from numbers (.item())?"
            )


def warn_of_hooks(hooks: Sequence[str], name: str) -> None:
    """Warn of gradient hooks inside an inner loss or map."""
    if hooks:
        warn(
            f"{', '.join(dict.fromkeys(hooks))} changes gradients inside {name}: a hook acts on all products of the "
            f"linear solver as well, so the hypergradient may not be the gradient of any loss. Remove the hook, or put "
            f"what it does into {name}"
        )


def warn_of_local(losses: Iterable[Any], name: str) -> None:
    """Warn if torch.distributed runs several ranks and a loss or map uses only this rank's data."""
    if _graph.ranks() > 1 and not _graph.crosses_ranks(losses):
        warn(
            f"torch.distributed runs {_graph.ranks()} ranks, and the derivatives of {name} are of this rank's data "
            f"alone; the mean of the ranks' hypergradients is not the hypergradient of the mean. Evaluate a live model "
            f"by hg.distributed.call(model, ...), and functions at hg.distributed.replicated(params) and "
            f"replicated(hparams), or at gathered(...) if they are sharded"
        )


def outer_gradients(problem: Problem, keep: bool) -> tuple[Tensor, Vector, list[Tensor | None]]:
    """E with its graph, ∇₁E as a copied Vector, and ∇₂E (None means zeros); stacked for several losses."""
    outer_loss, leaves, hparams = problem.outer_loss, problem.leaves, problem.differentiated
    with torch.enable_grad(), _torch.correct_derivatives(dense=True), users_autocast():
        value = outer_loss(*problem.arguments) if callable(outer_loss) else outer_loss
    loss = as_losses(value, "outer_losses") if problem.several else as_scalar(value, "outer_loss")
    warn_of_local([loss], "outer_loss")
    if problem.replaced:
        problem.warn_of_live([loss], "outer_loss")
    if problem.several:
        units = torch.eye(len(loss), dtype=loss.dtype, device=loss.device)
        grads = _autodiff.stacked([loss], [*leaves, *hparams], [units])
    else:
        retain = keep or problem.live or not all(leaf.is_leaf for leaf in hparams)
        grads = _autodiff.grad_or_none([loss], [*leaves, *hparams], retain_graph=retain)
    slopes, direct = grads[: len(leaves)], grads[len(leaves) :]
    if all(g is None for g in slopes):
        if not callable(outer_loss):
            raise ValueError(
                "outer_loss does not depend on params; was it computed from other tensors, or under no_grad?"
            )
        problem.check_uses_arguments([loss], "outer_loss")
    if problem.several:
        slopes = _autodiff.new_zeros(slopes, leaves, len(loss))
        return loss, problem.space.stack_of(len(loss)).pack(slopes).copy(), direct
    return loss, problem.space.pack(_autodiff.or_zeros(slopes, leaves)).copy(), direct


def one_of(**forms: object) -> tuple[str, Any]:
    """The name and value of the one form of inner problem that was given. Raises TypeError for none or several."""
    given = {kind: value for kind, value in forms.items() if value is not None}
    if len(given) != 1:
        *names, last = forms
        raise TypeError(f"pass exactly one of {', '.join(names)} and {last}; got {list(given) or 'none'}")
    return given.popitem()
