"""What an algorithm asks of one batch: ∇₁g, ∇²₁₁g v, ∇²₂₁g v, ∇₁f and ∇₂f, at the present point or at another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _autodiff, _random, _torch
from .._autodiff import ATTENTION, COMPILED, as_scalar, check_hparams, users_autocast, without_autocast
from .._graph import refuse_weight_norm, undeclared_leaves
from .._modules import modules_of
from .._tree import PyTree, check_distinct, flatten
from .._vector import Space, sharded_dot
from ..implicit import warn_of_hooks, warn_of_local

SHARDED = (
    ". FSDP2's hooks give no graph for second derivatives: evaluate the model at hg.distributed.gathered(params), or "
    "take an algorithm without second derivatives (F2SA, BOME, SAMA)"
)
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
        self.value: Tensor | None = None  # that of the first evaluation, detached
        self.last = torch.tensor(torch.nan)  # that of the last one

    @property
    def evaluated(self) -> bool:
        return self.value is not None

    def evaluate(self, moved: bool) -> Tensor:
        """The value with its graph. moved: params or hparams are not at the user's point."""
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
            statistics = statistics_of(self.loss)
            if self.evaluated or moved:
                stack.callback(put_back, statistics)
            else:
                self.oracles.recorded += statistics
            return self._first(as_scalar(self.loss(), self.name))

    def _first(self, value: Tensor) -> Tensor:
        self.last = value.detach()
        self.value = self.last if self.value is None else self.value
        return value


def statistics_of(closure: Any) -> list[tuple[Tensor, Tensor]]:
    """Running statistics and copies of them, of modules in any mode: the closure may switch it."""
    parts = {id(part): part for module in modules_of(closure) for part in module.modules()}.values()
    modules = [part for part in parts if getattr(part, "track_running_stats", False)]
    return [(buffer, buffer.clone()) for module in modules for buffer in module.buffers(recurse=False)]


def put_back(kept: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, values in reversed(kept):  # the oldest copies last
        buffer.data.copy_(values)  # autograd need not know of it: training mode reads no running statistics


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
                    f"(for example the network's parameters()), and compute {name} in the losses"
                )
        self.algorithm = algorithm
        self.take_forms()
        self.counts = {"inner_gradients": 0, "outer_gradients": 0, "products": 0}
        self.scale = 1.0  # what the losses were multiplied by, for mixed precision
        self.recorded: list[tuple[Tensor, Tensor]] = []  # running statistics before the evaluations that wrote them
        self._moved = False
        self._uses: dict[str, set[int]] = {}  # which tensors each loss depended on, until one was seen not to matter

    def take_forms(self) -> None:
        """Take the shapes, dtypes and devices that params and hparams have now."""
        self.forms = [form(x) for x in (*self.params, *self.hparams)]
        self.space = Space(*flatten(list(self.params), "params"))
        self.sharded = any(hasattr(x, "placements") for x in self.params)

    def batch(self, loss: LossLike, name: str = "inner_loss") -> Batch:
        """A loss that the methods below take."""
        if not callable(loss) and not isinstance(loss, Tensor):
            raise TypeError(f"{name} must be a scalar tensor or a closure that gives one, got {type(loss).__name__}")
        return Batch(loss, name, self)

    def batches(self, losses: Iterable[LossLike], name: str = "inner_loss") -> Iterator[Batch]:
        """Those of an iterable of losses; a generator evaluates them as it goes."""
        iterator, end = iter(losses), object()
        while True:
            with self.as_the_user():
                loss: Any = next(iterator, end)
            if loss is end:
                return
            yield self.batch(loss, name)

    def check_forms(self) -> None:
        """Raise where a tensor was resized, converted, moved or frozen since."""
        for before, x in zip(self.forms, (*self.params, *self.hparams), strict=True):
            if form(x) != before:
                shape, dtype, device, _ = before
                raise ValueError(
                    f"a tensor of params or hparams had shape {tuple(shape)}, {dtype}, on {device}, and has "
                    f"{tuple(x.shape)}, {x.dtype}, on {x.device}{'' if x.requires_grad else ' and is frozen'} now: "
                    f"call tracker.to(device) after moving a model, else make a new {self.algorithm}"
                )

    def gradients(self, batch: Batch) -> Gradients:
        """∇₁ and ∇₂ of one loss: its evaluation and a reverse pass."""
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
        """∇₁g, ∇²₁₁g v and ∇²₂₁g v: an evaluation, a reverse pass with its graph, and a reverse pass through it."""
        gradient = self.gradient_with_graph(batch)
        hessian, cross = self.pull(gradient, v)
        return Products(self.value_of(gradient), hessian, cross)

    def gradient_with_graph(self, batch: Batch) -> list[Tensor]:
        """∇₁g with its graph (times `scale`), for several products of one batch: see `pull` and `value_of`."""
        self.counts["inner_gradients"] += 1
        value = batch.evaluate(self._moved)
        warn_of_local([value], batch.name)
        if not callable(batch.loss) and not self.counts["products"]:  # a walk of the graph; later ones are like it
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
        """Whether hparams were seen to reach the inner loss (where products are taken: its gradient); None: not yet."""
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

        The values are copied in and out, which models that hold their tensors in other forms too (FSDP) notice.
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
        """An error leaves the random state and running statistics as they were; autocast is the closures' alone."""
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
        """For what evaluates losses: with gradients, under the user's autocast."""
        with torch.enable_grad(), users_autocast(), _torch.differentiated_rightly():
            yield

    @contextmanager
    def hooks_suspended(self) -> Iterator[None]:
        """Hooks of params and hparams act once, where .grad is written, and not on what is computed on the way."""
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
        """Raise where outputs have a leaf of the same form in place of one that they depended on before."""
        used = {i for i, g in enumerate(grads) if g is not None}
        lost = self._uses.setdefault(name, used) - used
        if lost:
            declared = [*self.params, *self.hparams]
            others = [form(x) for x in undeclared_leaves(outputs, declared)]
            for i in lost:
                if self.forms[i] in others:
                    raise ValueError(
                        f"{name} depended on a tensor of shape {tuple(declared[i].shape)} in params or hparams, and "
                        f"depends on another one of that shape now: if a module's parameter has been replaced, make a "
                        f"new {self.algorithm} for the new model"
                    )
            self._uses[name] -= lost

    def _dense(self, g: Tensor | None, x: Tensor) -> Tensor:
        return (
            torch.zeros_like(x, requires_grad=False) if g is None else g if g.layout is torch.strided else g.to_dense()
        )


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Where there are no second derivatives, the error names the algorithms that need none."""
    try:
        yield
    except RuntimeError as error:
        if str(error) not in (ATTENTION, COMPILED):
            raise
        raise RuntimeError(f"{error}; or take F2SA, BOME or SAMA, which need none") from error


def form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, x.requires_grad


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """targetᵢ ← sourceᵢ, in place; what autocast keeps of a target is forgotten."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    torch.clear_autocast_cache()


def plus(xs: Grads, ys: Grads, factor: float | Tensor = 1.0) -> Grads:
    """xᵢ + factor · yᵢ, None standing for zeros; sparse stays sparse.

    Example:
        >>> hg.bilevel.plus([torch.ones(2), None], [torch.ones(2), torch.ones(1)], -0.5)
        [tensor([0.5000, 0.5000]), tensor([-0.5000])]
    """
    scaled = ys if isinstance(factor, float) and factor == 1 else [None if y is None else y * factor for y in ys]
    return [x if y is None else y if x is None else x + y for x, y in zip(xs, scaled, strict=True)]


def times(xs: Grads, factor: float | Tensor) -> Grads:
    """factor · xᵢ, None standing for zeros.

    Example:
        >>> hg.bilevel.times([torch.ones(2), None], 3.0)
        [tensor([3., 3.]), None]
    """
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
    """What output.backward() adds to .grad of these leaves, which is left as it was.

    FSDP2's hooks act in backward() alone, and give sharded gradients there.
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
