"""What an algorithm asks of one batch: ∇₁g, ∇²₁₁g v, ∇²₂₁g v, ∇₁f and ∇₂f, at the present point or at another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _autodiff, _random, _torch
from .._autodiff import ATTENTION, as_scalar
from .._graph import check_hparams
from .._modules import modules_of, records_statistics
from .._tree import PyTree, check_distinct, flatten
from .._vector import Space

LossLike: TypeAlias = "Tensor | Callable[[], Tensor]"
Grads: TypeAlias = "list[Tensor | None]"


class Gradients(NamedTuple):
    """The derivatives of one loss: `params` like params, zeros where unused; `hparams` with None where unused."""

    params: list[Tensor]
    hparams: Grads


class Products(NamedTuple):
    """∇₁g, ∇²₁₁g v (both like params) and ∇²₂₁g v (None for what g does not depend on)."""

    gradient: list[Tensor]
    hessian: list[Tensor]
    cross: Grads


class Batch:
    """The loss of one batch: an evaluated scalar, or a closure, which can be evaluated at several points.

    Every evaluation of a closure draws the same random numbers (dropout, augmentation), and only the first one, at the
    present point, records statistics (BatchNorm).
    """

    def __init__(self, loss: LossLike, name: str, algorithm: str, devices: Sequence[torch.device]):
        self.loss, self.name, self.algorithm, self.devices = loss, name, algorithm, devices
        self.state: Any = None  # the random state before the first evaluation
        self.value: Tensor | None = None  # that of the first evaluation, detached

    @property
    def evaluated(self) -> bool:
        return self.value is not None

    def evaluate(self, moved: bool) -> Tensor:
        """The value with its graph. moved: params or hparams are not at the user's point."""
        if not callable(self.loss):
            if self.evaluated or moved:
                raise TypeError(
                    f"{self.algorithm} evaluates {self.name} at more than one point: pass a closure that evaluates "
                    f"the model on this batch (lambda: loss(model(x), y)), not its value"
                )
            return self._first(as_scalar(self.loss, self.name))
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self.evaluated:
                stack.enter_context(_random.replayed(self.state))
            else:
                self.state = _random.capture(self.devices)
            if self.evaluated or moved:
                stack.enter_context(statistics_kept(self.loss))
            return self._first(as_scalar(self.loss(), self.name))

    def _first(self, value: Tensor) -> Tensor:
        self.value = value.detach() if self.value is None else self.value
        return value


@contextmanager
def statistics_kept(closure: Any) -> Iterator[None]:
    """The running statistics of modules that a closure uses are put back."""
    modules = [part for module in modules_of(closure) for part in module.modules() if records_statistics(part)]
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, values in kept:
            buffer.data.copy_(values)  # not a change that autograd minds: training mode reads no running statistics


class Oracles:
    """Derivatives of losses of live tensors, which an algorithm is written in. Never writes .grad.

    Args:
        params: w, any pytree of leaf tensors; those that do not require grad are left out.
        hparams: λ, likewise.
        algorithm: a name for messages.

    Attributes:
        params, hparams: lists of the tensors that require grad.
        space: the space of params' vectors.
        counts: how many gradients of the inner and the outer loss, and how many products, were taken.

    Raises: ValueError for a tensor twice, for one computed from another, for none that requires grad.

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
                    f"{name} was computed from other tensors, so no optimiser can move it: pass those "
                    f"(the network's parameters(), say), and compute {name} in the losses"
                )
        self.shapes = [x.shape for x in (*self.params, *self.hparams)]
        self.space = Space(list(self.params), "params")
        self.algorithm = algorithm
        self.counts = {"inner_gradients": 0, "outer_gradients": 0, "products": 0}
        self.scale = 1.0  # what the losses were multiplied with, for mixed precision
        self._moved = False

    def batch(self, loss: LossLike, name: str = "inner_loss") -> Batch:
        """A loss that the methods below take."""
        if not callable(loss) and not isinstance(loss, Tensor):
            raise TypeError(f"{name} must be a scalar tensor or a closure that gives one, got {type(loss).__name__}")
        return Batch(loss, name, self.algorithm, _random.devices_of(self.params))

    def check_shapes(self) -> None:
        """Raise where a tensor has been resized since."""
        for i, x in enumerate((*self.params, *self.hparams)):
            if x.shape != self.shapes[i]:
                raise ValueError(
                    f"a tensor of params or hparams had shape {tuple(self.shapes[i])} and has {tuple(x.shape)} now: "
                    f"make a new {self.algorithm} for the new model"
                )

    def gradients(self, batch: Batch) -> Gradients:
        """∇₁ and ∇₂ of one loss: its evaluation and a reverse pass."""
        return self.gradients_of(batch.evaluate(self._moved), batch.name)

    def gradients_of(self, value: Tensor, name: str) -> Gradients:
        """`gradients` of a loss that is evaluated already, such as a weighted sum of several."""
        self.counts["outer_gradients" if name == "outer_loss" else "inner_gradients"] += 1
        grads = self._unscaled(_autodiff.grad_or_none([value], [*self.params, *self.hparams], dense=False))
        return Gradients(self._reached(grads, name), grads[len(self.params) :])

    def products(self, batch: Batch, v: Sequence[Tensor]) -> Products:
        """∇₁g, ∇²₁₁g v and ∇²₂₁g v: an evaluation, a reverse pass with its graph, and a reverse pass through it."""
        gradient = self.gradient_with_graph(batch)
        hessian, cross = self.pull(gradient, v)
        return Products(self.value_of(gradient), hessian, cross)

    def gradient_with_graph(self, batch: Batch) -> list[Tensor]:
        """∇₁g with its graph (times `scale`), for several products of one batch: see `pull` and `value_of`."""
        self.counts["inner_gradients"] += 1
        value = batch.evaluate(self._moved)
        return self._reached(_autodiff.grad_or_none([value], self.params, create_graph=True), batch.name)

    def pull(self, gradient: list[Tensor], v: Sequence[Tensor], retain: bool = False) -> tuple[list[Tensor], Grads]:
        """∇²₁₁g v and ∇²₂₁g v from `gradient_with_graph`, in one reverse pass."""
        self.counts["products"] += 1
        inputs = [*self.params, *self.hparams]
        try:
            grads = _autodiff.grad_or_none(gradient, inputs, v, retain_graph=retain, dense=False)
        except RuntimeError as error:
            if str(error) != ATTENTION:
                raise
            raise RuntimeError(f"{ATTENTION}; or take F2SA, BOME or SAMA, which need none") from error
        grads, count = self._unscaled(grads), len(self.params)
        return [self._dense(g, x) for g, x in zip(grads, self.params, strict=False)], grads[count:]

    def value_of(self, gradient: list[Tensor]) -> list[Tensor]:
        """∇₁g without its graph."""
        values: list[Any] = self._unscaled([g.detach() for g in gradient])
        return values

    def _unscaled(self, grads: Grads) -> Grads:
        return grads if self.scale == 1 else times(grads, 1 / self.scale)

    @contextmanager
    def at(self, params: Sequence[Tensor], hparams: Sequence[Tensor] | None = None) -> Iterator[None]:
        """The live tensors hold other values meanwhile, so that closures are evaluated there.

        The values are copied in and out, which models that hold their tensors in other forms too (FSDP) notice.
        """
        live, other = list(self.params), list(params)
        if hparams is not None:
            live, other = [*live, *self.hparams], [*other, *hparams]
        before, self._moved = self._moved, True
        with torch.no_grad():
            kept = [x.clone() for x in live]
            copy_all(live, other)
        try:
            yield
        finally:
            self._moved = before
            with torch.no_grad():
                copy_all(live, kept)

    @contextmanager
    def hooks_suspended(self) -> Iterator[None]:
        """Hooks of params and hparams act once, where .grad is written, and not on what is computed on the way."""
        with _torch.hooks_suspended([*self.params, *self.hparams]):
            yield

    def _reached(self, grads: Grads, name: str) -> list[Tensor]:
        grads = grads[: len(self.params)]
        if all(g is None for g in grads):
            raise ValueError(
                f"{name} does not depend on params: it was computed from other tensors (has a module's parameter been "
                f"replaced?), under no_grad, or from a detached output"
            )
        return [self._dense(g, x) for g, x in zip(grads, self.params, strict=True)]

    def _dense(self, g: Tensor | None, x: Tensor) -> Tensor:
        return (
            torch.zeros_like(x, requires_grad=False) if g is None else g if g.layout is torch.strided else g.to_dense()
        )


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """targetᵢ ← sourceᵢ, in place."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def plus(xs: Grads, ys: Grads, factor: float | Tensor = 1.0) -> Grads:
    """xᵢ + factor · yᵢ, None standing for zeros; sparse stays sparse."""
    scaled = ys if isinstance(factor, float) and factor == 1 else [None if y is None else y * factor for y in ys]
    return [x if y is None else y if x is None else x + y for x, y in zip(xs, scaled, strict=True)]


def times(xs: Grads, factor: float | Tensor) -> Grads:
    return [None if x is None else x * factor for x in xs]


def dot(xs: Sequence[Tensor | None], ys: Sequence[Tensor | None]) -> Tensor | float:
    """Σᵢ ⟨xᵢ, yᵢ⟩ over what both hold; nothing if there is none."""
    total: Tensor | float = 0.0
    for x, y in zip(xs, ys, strict=False):
        if x is not None and y is not None:
            part = _dot(x, y)
            total = part if isinstance(total, float) else total + part.to(total)
    return total


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if x.layout is not torch.strided or y.layout is not torch.strided:
        if x is y:
            values = x.coalesce().values()
            return _dot(values, values)
        x, y = (z if z.layout is torch.strided else z.to_dense() for z in (x, y))
    if x.element_size() < 4:
        x, y = x.float(), y.float()
    return torch.linalg.vecdot(x, y) if x.ndim == 1 else torch.linalg.vecdot(x.reshape(-1), y.reshape(-1))
