"""The base class of trackers: adds directions to .grad of both levels, steps its own variables, and keeps state."""

from __future__ import annotations

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from .. import _autodiff, _random
from .._solution import UnsolvedInnerProblem, warn
from .._torch import has_gradient_hooks, version_of
from .._tree import PyTree
from .._vector import Vector
from ..implicit import INNER_UNREACHED
from ..implicit import grad as implicit_grad
from ..operators import Sum
from ._compiled import CompiledDirections
from ._filters import Average, Filter
from ._oracles import Batch, Grads, LossLike, Oracles, copy_all, dot, plus, put_back, times
from ._report import Comparison, Report, Watch

OnNonfinite: TypeAlias = Literal["raise", "skip", "ignore"]
MakeOptimizer: TypeAlias = "Callable[[list[Tensor]], torch.optim.Optimizer]"
NO_HPARAMS = (
    "neither loss depends on hparams. {} differentiates losses: for a hyperparameter that only an optimiser uses (lr, "
    "momentum), use unroll.forward, or unroll.reverse with diff_optimizers"
)
NONFINITE = (
    "{}: NaN or infinity in the directions of this batch. Nothing was changed; on_nonfinite='skip' leaves such "
    "batches out and counts them"
)

NOT_COMPILABLE = (
    "{}: compile needs batches=(outer batch, inner batch), both losses as functions of a batch, no GradScaler, and a "
    "tracker without recursive momentum or tables"
)
TWO_TRACKERS = (
    ".grad of params holds the direction that another tracker of this model added, so the next step will count it "
    "twice: set .grad to None after the backward of one of them, or make one tracker for the hparams of both"
)
_LIVING: weakref.WeakSet[Tracker] = weakref.WeakSet()


class Directions(NamedTuple):
    """The directions of one pair of batches, for params, the tracker's own variables and hparams; numbers to watch.

    Example:
        >>> hg.bilevel.Directions(params=[torch.ones(2)], own=[], hparams=[None], watched={"loss": torch.tensor(0.5)})
        Directions(params=[tensor([1., 1.])], own=[], hparams=[None], watched={'loss': tensor(0.5000)})
    """

    params: list[Tensor]
    own: list[Tensor]
    hparams: Grads
    watched: dict[str, Tensor]


class Tracker(ABC):
    """Computes directions for both levels from a batch of each, and adds them to .grad; torch.optim makes the steps.

    Attributes:
        variables: the tensors that the algorithm itself moves (the adjoint v, or copies of params).
        optimizer: the torch.optim optimizer of these, which `step` calls; None without variables.
        oracles: the derivatives of losses from which the algorithm is built.
        filters: average, recursive momentum or tables, by name.
        steps, skipped: the numbers of calls of `step` and of batches that were left out.

    Example:
        >>> class Descent(hg.bilevel.Tracker):
        ...     def directions(self, outer, inner):
        ...         down, up = self.oracles.gradients(inner), self.oracles.gradients(outer)
        ...         return hg.bilevel.Directions(down.params, [], up.hparams, {})
        >>> w, lam = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> tracker = Descent([w], [lam])
        >>> _ = tracker.backward((lam**2 * w).sum(), (3 * lam * w).sum())
        >>> w.grad, lam.grad
        (tensor([3.]), tensor([2.]))
    """

    takes: ClassVar[tuple[str, ...]] = ()  # further arguments of `backward` that the algorithm uses
    _step_supports_amp_scaling = True  # a GradScaler calls `step`, which detects overflow itself

    def __init__(
        self, params: PyTree, hparams: PyTree, *, average: float | None = None, on_nonfinite: OnNonfinite = "raise"
    ):
        if on_nonfinite not in ("raise", "skip", "ignore"):
            raise ValueError(f'on_nonfinite must be "raise", "skip" or "ignore", got {on_nonfinite!r}')
        self.oracles = Oracles(params, hparams, type(self).__name__)
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.variables: list[Tensor] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.steps = self.skipped = 0
        self.filters: dict[str, Filter] = {}
        if average is not None:
            self.filters["average"] = Average(average, self.oracles.hparams)
        self._watch = Watch(type(self).__name__)
        self._written: tuple[weakref.ref[Tensor], int] | None = None  # .grad of the first of params, and its version
        _LIVING.add(self)
        self._compiled: CompiledDirections | None = None
        self._reached = self._overflowed = False
        self._before: Grads = []  # D_λ of the batch before the last
        self._last: Grads = []

    # Defined by subclasses.

    @abstractmethod
    def directions(self, outer: Batch, inner: Batch, *others: Any) -> Directions:
        """The algorithm: the directions of this pair of batches, by derivatives from `oracles`. Changes no state.

        others: the arguments of `backward` that `takes` names.
        """

    @property
    def _adjoint_lr(self) -> float | None:
        """The step size of v if the algorithm makes plain gradient steps on it, otherwise None."""
        return None

    # Called in the user's loop.

    @final
    def backward(
        self,
        outer_loss: LossLike | Callable[[Any], Tensor] | None,
        inner_loss: LossLike | Callable[[Any], Tensor],
        *,
        index: tuple[int, int] | None = None,
        adjoint_losses: Iterable[LossLike] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        batches: tuple[Any, Any] | None = None,
        compile: bool | str = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Add the directions of a pair of batches to .grad of params and of hparams, as loss.backward() does.

        Several calls before `step` accumulate: divide the losses by the number of batches, as for any gradients.

        Args:
            outer_loss: f on a validation batch: an evaluated scalar over live modules, or a closure (lambda: loss)
                if the algorithm evaluates it at other points too. None: only params get a direction.
            inner_loss: g on a training batch, likewise.
            index: the indices (i, j) of the training and the validation batch, for algorithms with tables.
            adjoint_losses: for AmIGO: inner losses of further batches, one for each step on v; a generator evaluates
                each when it is needed.
            scaler: the GradScaler by which both losses were scaled, in closures too. .grad of params and hparams are
                then scaled, and scaler.step(tracker) is tracker.step().
            batches: a validation and a training batch, pytrees of tensors; both losses are then functions of a batch.
            compile: with batches: True computes the directions by one function that torch's inductor compiles, once for
                each form of the batches and as long as both losses are the same functions; a string names another
                backend of torch.compile. At the 1st, 2nd, 4th, 8th, … call it is compared with the uncompiled result.
                If it cannot be compiled, a warning (NotCompiled) gives the reason. It helps small models, whose time
                goes into Python, and excludes recursive momentum, tables and a GradScaler.

        Returns:
            The values of the outer and the inner loss, detached; None for a loss that was not evaluated.

        Raises:
            TypeError: a loss is a scalar, and the algorithm needs a closure.
            ValueError: a loss does not depend on params, neither depends on hparams, or a direction holds NaN or
                infinity (on_nonfinite="raise"). After any error nothing is changed.
        """
        compiled = None
        if compile:
            if batches is None or outer_loss is None or scaler is not None or {*self.filters} - {"average"}:
                raise TypeError(NOT_COMPILABLE.format(type(self).__name__))
            compiled = self._compiled_for((outer_loss, inner_loss), compile)
        losses: tuple[Any, Any] = (outer_loss, inner_loss)
        if batches is not None:
            losses = self._on(outer_loss, inner_loss, batches)
        others = {"index": index, "adjoint_losses": adjoint_losses}
        for name, value in others.items():
            if value is not None and name not in self.takes:
                raise TypeError(f"{type(self).__name__} takes no {name}")
        oracles = self.oracles
        oracles.check_forms()
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        oracles.scale = 1.0 if scaler is None else scaler.get_scale()
        inner = oracles.batch(losses[1], "inner_loss")
        outer = None if losses[0] is None else oracles.batch(losses[0], "outer_loss")
        with oracles.of_one_call():
            with oracles.hooks_suspended():
                if outer is None:
                    found = Directions(oracles.gradients(inner).params, [], [None] * len(oracles.hparams), {})
                else:
                    if compiled is not None and batches is not None:
                        found = compiled(outer, inner, batches)
                    else:
                        found = self.directions(outer, inner, *(others[name] for name in self.takes))
                    self._check_reached(found.hparams)
                average = self.filters.get("average")
                if isinstance(average, Average) and outer:
                    found = found._replace(hparams=average(found.hparams))
                finite = self._note(found, read=self.on_nonfinite != "ignore" or scaler is not None)
            if not finite:
                found = self._left_out(found, scaled=scaler is not None)
            self._warn_of_another()
            self._add(found)
            grad = oracles.params[0].grad
            self._written = None if grad is None else (weakref.ref(grad), version_of(grad))
        if not finite:
            self.skipped += 1
        elif outer is not None:
            for each in self.filters.values():
                each.accept()
            self._before, self._last = self._last, found.hparams
            self._watch.accept(self._adjoint_lr)
        return None if outer is None else outer.value, inner.value

    def step(self) -> None:
        """Step the tracker's variables with the directions added since the last step; not after an overflow of fp16."""
        overflowed, self._overflowed = self._overflowed, False
        if self.optimizer is not None:
            if not overflowed:
                self.optimizer.step()
            self.optimizer.zero_grad()
        for each in self.filters.values():
            each.drop() if overflowed else each.step()
        self.steps += not overflowed

    @property
    def lr(self) -> float:
        """The step size of the tracker's own variables; set it, or put a scheduler on `optimizer`."""
        return self._optimizer.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Empty: directions of the tracker's variables are not scaled, so a GradScaler must not unscale them."""
        return []

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise AttributeError(f"{type(self).__name__} has no optimizer, because it has no variables to move")
        return self.optimizer

    # Diagnostics.

    def report(self) -> Report:
        """The state after the last batch."""
        sizes = [math.sqrt(float(dot(g, g))) for g in (self._before, self._last)]
        cosine = float(dot(self._before, self._last)) / math.prod(sizes) if all(sizes) else math.nan
        return self._watch.report(self.steps, self.skipped, cosine, self.oracles.counts)

    def metrics(self) -> dict[str, float]:
        """`report` as one flat dict of numbers, for any logger."""
        return self.report().metrics()

    def error(self, outer_loss: LossLike, inner_loss: LossLike, *, solver: Any = None) -> Comparison:
        """Compare the last outer direction with the hypergradient at the present params, on larger batches.

            ∇₂f − ∇²₂₁g (∇²₁₁g)⁻¹ ∇₁f

        It is the hypergradient of the solved inner problem only if params solve that problem; this error, like
        `adjoint_residual`, is that of the adjoint alone.

        Args:
            outer_loss, inner_loss: scalars or closures, over all data if that fits; inner_loss may be an operators.Sum
                of functions of the lists oracles.params and oracles.hparams.
            solver: of the linear system, as in implicit.grad.
        """
        if not any(g is not None for g in self._last):
            raise ValueError("there is no direction yet: call backward first")
        oracles = self.oracles

        def taken(loss: Any, name: str) -> Any:
            return loss if isinstance(loss, (Tensor, Sum)) else oracles.batch(loss, name).evaluate(moved=True)

        with _random.replayed(_random.capture(_random.devices_of(oracles.params))):  # keeps the random state
            outer, inner = taken(outer_loss, "outer_loss"), taken(inner_loss, "inner_loss")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnsolvedInnerProblem)  # params need not solve the inner problem here
            result = implicit_grad(
                outer, inner_loss=inner, params=oracles.params, hparams=oracles.hparams, solver=solver
            )
        truth: Grads = list(result.grads)
        found: Grads = [g if g is None else g.to_dense() for g in self._last]
        apart = plus(found, truth, -1.0)
        pairs = ((truth, truth), (found, found), (truth, found), (apart, apart))
        size, own, product, error2 = (float(dot(x, y)) for x, y in pairs)
        return Comparison(
            cosine=product / math.sqrt(size * own) if size * own else math.nan,
            relative_error=math.sqrt(error2 / size) if size else math.inf,
            hypergradient=result,
        )

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to give the same results; torch.load(weights_only=True) reads it."""
        return {
            "algorithm": type(self).__name__,
            "variables": [x.detach() for x in self.variables],
            "grads": [x.grad for x in self.variables],
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "filters": {name: each.state_dict() for name, each in self.filters.items()},
            "counts": {"steps": self.steps, "skipped": self.skipped, "reached": self._reached}
            | {"overflowed": self._overflowed}
            | self.oracles.counts,
            "watch": {"means": dict(self._watch.means), "count": self._watch.count},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the `state_dict` of a tracker of the same algorithm and options."""
        if state["algorithm"] != type(self).__name__:
            raise ValueError(f"this is the state of {state['algorithm']}, and this tracker is {type(self).__name__}")
        shapes, own = [tuple(x.shape) for x in state["variables"]], [tuple(x.shape) for x in self.variables]
        if shapes != own or {*state["filters"]} != {*self.filters}:
            raise ValueError(
                f"the state does not fit this tracker: variables of shapes {shapes[:3]} instead of {own[:3]}, or other "
                f"filters ({sorted(state['filters'])} instead of {sorted(self.filters)})"
            )
        for name, each in self.filters.items():
            each.check(state["filters"][name])
        copy_all(self.variables, state["variables"])
        for x, g in zip(self.variables, state["grads"], strict=True):
            x.grad = None if g is None else g.to(x.device, copy=True)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        for name, each in self.filters.items():
            each.load_state_dict(state["filters"][name])
        counts = dict(state["counts"])
        names = ("steps", "skipped", "reached", "overflowed")
        self.steps, self.skipped, self._reached, self._overflowed = (counts.pop(name) for name in names)
        self.oracles.counts.update(counts)
        self._watch.means, self._watch.count = dict(state["watch"]["means"]), state["watch"]["count"]
        self.to(self.oracles.params[0].device)

    def to(self, device: torch.device | str) -> Tracker:
        """Move the state to where params are now: call it after model.to(device)."""
        device = torch.device(device)
        self.oracles.take_forms()
        for x in self.variables:
            x.data = x.data.to(device)
            x.grad = None if x.grad is None else x.grad.to(device)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        for each in self.filters.values():
            each.to(device)
        self._before, self._last = [], []
        return self

    # Compiled directions.

    @staticmethod
    def _on(outer_loss: Any, inner_loss: Any, batches: tuple[Any, Any]) -> tuple[Any, Any]:
        """Both losses as closures over their batches."""
        for name, loss in (("outer_loss", outer_loss), ("inner_loss", inner_loss)):
            if loss is not None and not callable(loss):
                raise TypeError(f"with batches {name} must be a function of a batch, got {type(loss).__name__}")
        if not isinstance(batches, (tuple, list)) or len(batches) != 2:
            raise TypeError("batches must be a pair: the batch of the outer loss and the batch of the inner loss")
        valid, train = batches
        return outer_loss and (lambda: outer_loss(valid)), lambda: inner_loss(train)

    def _compiled_for(self, losses: tuple[Any, Any], compile: bool | str) -> CompiledDirections:
        """The compiled directions for these two functions, new ones if the functions or the backend changed."""
        if not isinstance(compile, (bool, str)):
            raise TypeError(f"compile must be True, False or the name of a backend of torch.compile, got {compile!r}")
        backend = compile if isinstance(compile, str) else "inductor"
        known = self._compiled
        if known is None or known.backend != backend or any(x != y for x, y in zip(known.losses, losses, strict=True)):
            known = self._compiled = CompiledDirections(self, losses, backend)
        return known

    # Used by subclasses.

    def _move_by(
        self, variables: list[Tensor], lr: float | None, optimizer: MakeOptimizer | None, default: float
    ) -> None:
        """Set the tracker's variables and their optimizer: the user's, or plain gradient steps."""
        if lr is not None and optimizer is not None:
            raise TypeError("pass lr (for plain gradient steps) or optimizer, not both")
        self.variables = variables
        make: Any = optimizer or (lambda own: torch.optim.SGD(own, lr=default if lr is None else lr))
        self.optimizer = make(variables)

    def _vector(self, leaves: list[Tensor]) -> Vector:
        return self.oracles.space.pack(leaves)

    def _check_reached(self, hparams: Grads) -> None:
        reached = any(g is not None for g in hparams)
        if not reached and not self._reached:
            raise ValueError(NO_HPARAMS.format(type(self).__name__))
        if not self._reached and self.oracles.crossed is False:  # only the first batch must use hparams
            warn(INNER_UNREACHED)
        self._reached = True

    def _left_out(self, found: Directions, scaled: bool) -> Directions:
        """Replace directions that are not finite: by none, or with a scaler by infinite ones, which it will detect."""
        if scaled:
            self._overflowed = True
            return Directions([g * math.inf for g in found.params], [], times(found.hparams, math.inf), {})
        if self.on_nonfinite == "raise":
            raise ValueError(NONFINITE.format(type(self).__name__))
        put_back(self.oracles.recorded)
        return Directions([], [], [None] * len(found.hparams), {})

    def _warn_of_another(self) -> None:
        """Warn if .grad of params is still the direction that another tracker added."""
        grad = self.oracles.params[0].grad
        if grad is None:
            return
        for other in _LIVING:
            added, version = other._written or (None, 0)
            if other is not self and added is not None and added() is grad and version == version_of(grad):
                warn(TWO_TRACKERS)

    def _note(self, found: Directions, read: bool) -> bool:
        """Record the numbers of this batch; return whether they are finite."""
        params = self._vector(found.params)
        watched = dict(found.watched) | {"inner_norm2": params.dot(params)}
        for name, tensors in (("outer_norm2", found.hparams), ("own_norm2", found.own)):
            norms2 = dot(tensors, tensors)
            if isinstance(norms2, Tensor):
                watched[name] = norms2
        return self._watch.note(watched, read)

    def _add(self, found: Directions) -> None:
        """Add the directions to .grad of params and hparams, with their hooks, and of the tracker's own variables."""
        pairs = [*zip(self.oracles.params, found.params, strict=False)]
        pairs += [(x, g) for x, g in zip(self.oracles.hparams, found.hparams, strict=True) if g is not None]
        if self.oracles.scale != 1:
            pairs = [(x, g * self.oracles.scale) for x, g in pairs]
        if any(has_gradient_hooks(x) for x, _ in pairs):
            _autodiff.backward([x for x, _ in pairs], [g for _, g in pairs])
            pairs = []
        for x, g in (*pairs, *zip(self.variables, found.own, strict=False)):
            if x.grad is None:
                x.grad = g.clone()  # later additions to .grad must not change a tensor that filters keep
            else:
                x.grad = x.grad + g if x.grad.layout is not g.layout else x.grad.add_(g)
