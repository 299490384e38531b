"""The derivatives of one batch's losses: ∇₁g, ∇²₁₁g v, ∇²₂₁g v, ∇₁f and ∇₂f, at the present point or another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _autodiff, _random, _torch
from .._autodiff import ATTENTION, COMPILED, as_scalar, check_hparams, users_autocast, without_autocast
from .._graph import refuse_weight_norm, undeclared_leaves
from .._modules import statistics_of
from .._tree import PyTree, check_distinct, flatten
from .._vector import Space, sharded_dot
from ..implicit import warn_of_hooks, warn_of_local

SHARDED = (
    ". FSDP2's hooks give no graph for second derivatives: evaluate the model at hg.distributed.gathered(params), or "
    "use an algorithm without second derivatives (F2SA, BOME, SAMA)"
)
LossLike: TypeAlias = "Tensor | Callable[[], Tensor]"
Grads: TypeAlias = "list[Tensor | None]"


class Gradients(NamedTuple):
    """The derivatives of one loss: `params` like params, zeros where unused; `hparams` with None where unused."""

    params: list[Tensor]
    hparams: Grads


class Products(NamedTuple):
    """∇₁g, ∇²₁₁g v (both like params) and ∇²₂₁g v (None for hparams on which ∇₁g does not depend)."""

    gradient: list[Tensor]
    hessian: list[Tensor]
    cross: Grads


class Batch:
    """The loss of one batch: an evaluated scalar, or a closure, which can be evaluated at several points.

    Every evaluation of a closure draws the same random numbers (dropout, augmentation). Only the first evaluation, at
    the present point, updates running statistics (BatchNorm).

    Example:
        >>> class Descent(hg.bilevel.Tracker):
        ...     def directions(self, outer, inner):  # the losses of two batches
        ...         down, up = self.oracles.gradients(inner), self.oracles.gradients(outer)
        ...         return hg.bilevel.Directions(down.params, [], up.hparams, {"training loss": inner.value})
        >>> w, lam = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> tracker = Descent([w], [lam])
        >>> _ = tracker.backward((lam * w).sum(), (lam * w**2).sum())
        >>> tracker.report().others
        {'training loss': 1.0}
    """

    def __init__(self, loss: LossLike, name: str, oracles: Oracles):
        self.loss, self.name, self.oracles = loss, name, oracles
        self.state: Any = None  # the random state before the first evaluation
        self.value: Tensor | None = None  # the loss at the first evaluation, detached
        self.last = torch.tensor(torch.nan)  # the loss at the last evaluation, detached

    @property
    def evaluated(self) -> bool:
        return self.value is not None

    def evaluate(self, moved: bool) -> Tensor:
        """The loss with its graph. moved: whether params or hparams now hold other values than the user's."""
        if not callable(self.loss):
            if self.evaluated or moved:
                raise TypeError(
                    f"{self.oracles.algorithm} evaluates {self.name} at more than one point: pass a closure that "
                    f"evaluates the model on this batch (lambda: loss(model(x), y)), not its value"
                )
            return self._first(as_scalar(self.loss, self.name))
        with ExitStack() as stack:
            stack.enter_context(self.oracles.as_the_user())
            if self.evaluated:
                stack.enter_context(_random.replayed(self.state))
            else:
                self.state = _random.capture(_random.devices_of(self.oracles.params))
            statistics = kept_statistics(self.loss)
            if self.evaluated or moved:
                stack.callback(put_back, statistics)
            else:
                self.oracles.recorded += statistics
            return self._first(as_scalar(self.loss(), self.name))

    def _first(self, value: Tensor) -> Tensor:
        self.last = value.detach()
        self.value = self.last if self.value is None else self.value
        return value


def kept_statistics(closure: Any) -> list[tuple[Tensor, Tensor]]:
    """Running statistics and copies of them."""
    return [(buffer, buffer.clone()) for buffer in statistics_of(closure)]


def put_back(kept: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, values in reversed(kept):  # the oldest copies last
        buffer.data.copy_(values)  # hidden from autograd, because no graph in training mode uses running statistics


class Oracles:
    """Derivatives of losses of live tensors, from which algorithms are built. Never writes .grad.

    Args:
        params: w, any pytree of leaf tensors; those that do not require grad are left out.
        hparams: λ, likewise.
        algorithm: the algorithm's name, for messages.

    Attributes:
        params, hparams: lists of the tensors that require grad.
        space: the space of params' vectors.
        counts: the numbers of gradients of the inner and the outer loss, and of products.

    Raises: ValueError if a tensor occurs twice or was computed from another one, or if none requires grad.

    Example:
        g = ½ h w², so ∇₁g = h w, ∇²₁₁g v = h v and ∇²₂₁g v = w v.

        >>> w, h = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
        >>> oracles = Oracles([w], [h])
        >>> oracles.products(oracles.batch(lambda: h * w**2 / 2), [torch.tensor(1.0)])
        Products(gradient=[tensor(6.)], hessian=[tensor(3.)], cross=[tensor(2.)])
    """

    def __init__(self, params: PyTree, hparams: PyTree, algorithm: str = "the algorithm"):
        leaves, paths, _ = flatten(params, "params")
        outer, names, _ = flatten(hparams, "hparams")
        check_distinct([*leaves, *outer], [*paths, *names])
        _, self.hparams = check_hparams(outer, names)
        self.params = [x for x in leaves if x.requires_grad]
        if not self.params:
            raise ValueError("none of params requires grad: there is nothing to train")
        for name, leaf in zip([*paths, *names], [*leaves, *outer], strict=True):
            if not leaf.is_leaf:
                raise ValueError(
                    f"{name} was computed from other tensors, so no optimiser can move it: pass the other tensors "
                    f"(for example the network's parameters()), and compute {name} in the losses"
                )
        self.algorithm = algorithm
        self.take_forms()
        self.counts = {"inner_gradients": 0, "outer_gradients": 0, "products": 0}
        self.scale = 1.0  # the factor of the losses, for mixed precision
        self.recorded: list[tuple[Tensor, Tensor]] = []  # running statistics, with copies from before this call
        self._moved = False
        self._uses: dict[str, set[int]] = {}  # for each loss, the tensors on which it has always depended so far

    def take_forms(self) -> None:
        """Store the present shapes, dtypes and devices of params and hparams."""
        self.forms = [form(x) for x in (*self.params, *self.hparams)]
        self.space = Space(*flatten(list(self.params), "params"))
        self.sharded = any(hasattr(x, "placements") for x in self.params)

    def batch(self, loss: LossLike, name: str = "inner_loss") -> Batch:
        """A `Batch` of this loss, the argument of the methods below."""
        if not callable(loss) and not isinstance(loss, Tensor):
            raise TypeError(f"{name} must be a scalar tensor or a closure that returns one, got {type(loss).__name__}")
        return Batch(loss, name, self)

    def batches(self, losses: Iterable[LossLike], name: str = "inner_loss") -> Iterator[Batch]:
        """A `Batch` for each loss of an iterable; a generator may evaluate each loss when it is needed."""
        iterator, end = iter(losses), object()
        while True:
            with self.as_the_user():
                loss: Any = next(iterator, end)
            if loss is end:
                return
            yield self.batch(loss, name)

    def check_forms(self) -> None:
        """Raise if a tensor was resized, converted, moved or frozen since `take_forms`."""
        for before, x in zip(self.forms, (*self.params, *self.hparams), strict=True):
            if form(x) != before:
                shape, dtype, device, _ = before
                raise ValueError(
                    f"a tensor of params or hparams had shape {tuple(shape)}, {dtype}, on {device}, and has "
                    f"{tuple(x.shape)}, {x.dtype}, on {x.device}{'' if x.requires_grad else ' and is frozen'} now: "
                    f"call tracker.to(device) after moving a model; otherwise make a new {self.algorithm}"
                )

    def gradients(self, batch: Batch) -> Gradients:
        """∇₁ and ∇₂ of one loss, by one evaluation and one reverse pass."""
        value, name = batch.evaluate(self._moved), batch.name
        self.counts["outer_gradients" if name == "outer_loss" else "inner_gradients"] += 1
        inputs = [*self.params, *self.hparams]
        if self.sharded:
            grads = self._unscaled(_grads_by_backward(value, inputs))
        else:
            warn_of_local([value], name)
            grads = self._unscaled(_autodiff.grad_or_none([value], inputs, dense=False))
        return Gradients(self._reached(grads, [value], name), grads[len(self.params) :])

    def products(self, batch: Batch, v: Sequence[Tensor]) -> Products:
        """∇₁g, ∇²₁₁g v and ∇²₂₁g v, by one evaluation, a reverse pass with a graph, and a reverse pass through it."""
        gradient = self.gradient_with_graph(batch)
        hessian, cross = self.pull(gradient, v)
        return Products(self.value_of(gradient), hessian, cross)

    def gradient_with_graph(self, batch: Batch) -> list[Tensor]:
        """∇₁g with its graph (times `scale`), for several products of one batch: see `pull` and `value_of`."""
        self.counts["inner_gradients"] += 1
        value = batch.evaluate(self._moved)
        warn_of_local([value], batch.name)
        if not callable(batch.loss) and not self.counts["products"]:  # walks the graph, so only once
            refuse_weight_norm([value], self.params, batch.name)
        with second_derivatives():
            grads = _autodiff.grad_or_none([value], self.params, create_graph=True)
        return self._reached(grads, [value], f"{batch.name} of params")

    def pull(
        self, gradient: list[Tensor], v: Sequence[Tensor], retain: bool = False, cross: bool = True
    ) -> tuple[list[Tensor], Grads]:
        """∇²₁₁g v and ∇²₂₁g v from `gradient_with_graph`, in one reverse pass. cross=False: ∇²₁₁g v alone."""
        self.counts["products"] += 1
        inputs = [*self.params, *self.hparams] if cross else self.params
        hooks: list[str] = []
        with second_derivatives():
            grads = _autodiff.grad_or_none(gradient, inputs, v, retain_graph=retain, dense=False, hooks=hooks)
        warn_of_hooks(hooks, "inner_loss")
        if cross:
            self._check_replaced(grads, gradient, "the gradient")
        grads, count = self._unscaled(grads), len(self.params)
        return [self._dense(g, x) for g, x in zip(grads, self.params, strict=False)], grads[count:]

    @property
    def crossed(self) -> bool | None:
        """Whether the inner loss (its gradient, if products are computed) depends on hparams; None if not known yet."""
        used = self._uses.get("the gradient", self._uses.get("inner_loss"))
        return None if used is None else any(i >= len(self.params) for i in used)

    def value_of(self, gradient: list[Tensor]) -> list[Tensor]:
        """∇₁g without its graph."""
        values: list[Any] = self._unscaled([g.detach() for g in gradient])
        return values

    def _unscaled(self, grads: Grads) -> Grads:
        return grads if self.scale == 1 else times(grads, 1 / self.scale)

    @contextmanager
    def at(self, params: Sequence[Tensor], hparams: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Within this context the live tensors hold other values, at which closures are then evaluated.

        The values are copied in place, so that models that also hold the tensors in another form (FSDP) follow.
        """
        live, other = list(self.params), list(params)
        if hparams is not None:
            live, other = [*live, *self.hparams], [*other, *hparams]
        before, kept = self._moved, [x.detach().clone() for x in live]
        try:
            self._moved = True
            copy_all(live, other)
            yield
        finally:
            self._moved = before
            copy_all(live, kept)

    @contextmanager
    def of_one_call(self) -> Iterator[None]:
        """Restore the random state and running statistics after an error; turn autocast off outside the closures."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(f"{self.algorithm} takes derivatives, which inference_mode forbids: call it outside")
        self.recorded.clear()
        try:
            kept, off = _torch.random_state_kept_on_error(self.params), without_autocast(self.params[0].device)
            with kept, off, torch.enable_grad():
                yield
        except BaseException:
            put_back(self.recorded)
            raise

    @contextmanager
    def as_the_user(self) -> Iterator[None]:
        """The context in which losses are evaluated: with gradients, under the user's autocast."""
        with torch.enable_grad(), users_autocast(), _torch.correct_derivatives():
            yield

    @contextmanager
    def hooks_suspended(self) -> Iterator[None]:
        """Suspend the hooks of params and hparams: they are called once, where .grad is written."""
        with _torch.hooks_suspended([*self.params, *self.hparams]):
            yield

    def _reached(self, grads: Grads, outputs: Sequence[Tensor], name: str) -> list[Tensor]:
        if all(g is None for g in grads[: len(self.params)]):
            raise ValueError(
                f"{name} does not depend on params: it was computed from other tensors (has a module's parameter been "
                f"replaced?), under no_grad, or from a detached output{SHARDED if self.sharded else ''}"
            )
        self._check_replaced(grads, outputs, name)
        return [self._dense(g, x) for g, x in zip(grads, self.params, strict=False)]

    def _check_replaced(self, grads: Grads, outputs: Sequence[Tensor], name: str) -> None:
        """Raise if outputs depend on an undeclared leaf of the same form instead of a tensor that they used before."""
        used = {i for i, g in enumerate(grads) if g is not None}
        lost = self._uses.setdefault(name, used) - used
        if lost:
            declared = [*self.params, *self.hparams]
            others = [form(x) for x in undeclared_leaves(outputs, declared)]
            for i in lost:
                if self.forms[i] in others:
                    raise ValueError(
                        f"{name} depended on a tensor of shape {tuple(declared[i].shape)} in params or hparams, and "
                        f"now depends on another tensor of that shape: if a module's parameter has been replaced, make "
                        f"a new {self.algorithm} for the new model"
                    )
            self._uses[name] -= lost

    def _dense(self, g: Tensor | None, x: Tensor) -> Tensor:
        return (
            torch.zeros_like(x, requires_grad=False) if g is None else g if g.layout is torch.strided else g.to_dense()
        )


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Add the names of algorithms without second derivatives to the error of an operation that has none."""
    try:
        yield
    except RuntimeError as error:
        if str(error) not in (ATTENTION, COMPILED):
            raise
        raise RuntimeError(f"{error}; or use F2SA, BOME or SAMA, which need none") from error


def form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.requires_grad


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """targetᵢ ← sourceᵢ, in place. Clears the casts of targets that autocast has cached."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    torch.clear_autocast_cache()


def plus(xs: Grads, ys: Grads, factor: float | Tensor = 1.0) -> Grads:
    """xᵢ + factor · yᵢ, where None stands for zeros; sparse tensors stay sparse.

    Example:
        >>> hg.bilevel.plus([torch.ones(2), None], [torch.ones(2), torch.ones(1)], -0.5)
        [tensor([0.5000, 0.5000]), tensor([-0.5000])]
    """
    scaled = ys if isinstance(factor, float) and factor == 1 else [None if y is None else y * factor for y in ys]
    return [x if y is None else y if x is None else x + y for x, y in zip(xs, scaled, strict=True)]


def times(xs: Grads, factor: float | Tensor) -> Grads:
    """factor · xᵢ, where None stands for zeros.

    Example:
        >>> hg.bilevel.times([torch.ones(2), None], 3.0)
        [tensor([3., 3.]), None]
    """
    return [None if x is None else x * factor for x in xs]


def dot(xs: Sequence[Tensor | None], ys: Sequence[Tensor | None]) -> Tensor | float:
    """Σᵢ ⟨xᵢ, yᵢ⟩ over the pairs without None; the number 0.0 if there is none."""
    total: Tensor | float = 0.0
    for x, y in zip(xs, ys, strict=False):
        if x is not None and y is not None:
            part = _dot(x, y)
            total = part if isinstance(total, float) else total + part.to(total)
    return total


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if hasattr(x, "placements"):
        return sharded_dot(x, y, 0)
    if x.layout is not torch.strided or y.layout is not torch.strided:
        if x is y:
            values = x.coalesce().values()
            return _dot(values, values)
        x, y = (z if z.layout is torch.strided else z.to_dense() for z in (x, y))
    if x.element_size() < 4:
        x, y = x.float(), y.float()
    return torch.linalg.vecdot(x, y) if x.ndim == 1 else torch.linalg.vecdot(x.reshape(-1), y.reshape(-1))


def _grads_by_backward(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that output.backward() adds to .grad of these leaves; .grad is then restored.

    FSDP2's hooks are called only in backward(), and make the gradients sharded.
    """
    kept = [x.grad for x in inputs]
    try:
        for x in inputs:
            x.grad = None
        output.backward()
        return [x.grad for x in inputs]
    finally:
        for x, grad in zip(inputs, kept, strict=True):
            x.grad = grad
