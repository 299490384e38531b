"""Algorithms that track the adjoint v = −(∇²₁₁g)⁻¹ ∇₁f with Hessian products: SOBA, AmIGO, SABA, SRBA.

    D_w = ∇₁g,      D_v = ∇²₁₁g v + ∇₁f,      D_λ = ∇²₂₁g v + ∇₂f

g is the loss of a training batch and f that of a validation batch. w, v and λ descend along these directions together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import operators
from .._tree import PyTree
from .._vector import Vector
from ..solvers import on_failure_of, solve
from ._filters import Point, Recursive, Table, table_bytes
from ._oracles import Batch, Gradients, Grads, LossLike, Products, plus
from ._tracker import Directions, MakeOptimizer, OnNonfinite, Tracker


class _Adjoint(Tracker):
    """A tracker whose variable is v."""

    def _start(self) -> None:
        self.v = self._vector([torch.zeros_like(x, requires_grad=False) for x in self.oracles.params])

    def _watched(self, slopes: Vector, residual: Vector, v: Vector) -> dict[str, Tensor]:
        """Numbers to watch, where residual = D_v = Hv + ∇₁f and slopes = ∇₁f."""
        pairs = {"rhs_norm2": (slopes, slopes), "residual_norm2": (residual, residual)}
        pairs |= {"vv": (v, v), "vr": (v, residual), "fv": (v, slopes)}
        return {name: x.dot(y) for name, (x, y) in pairs.items()}

    def _here(self) -> Point:
        oracles = self.oracles
        return Point(*([x.detach().clone() for x in xs] for xs in (oracles.params, self.v.chunks, oracles.hparams)))

    def _parted(self, flat: list[Any], watched: dict[str, Tensor]) -> Directions:
        """Directions from one list of tensors: chunks of D_w, chunks of D_v, leaves of D_λ."""
        count, end = len(self.v.chunks), len(flat) - len(self.oracles.hparams)
        params = Vector(self.oracles.space, flat[:count]).leaves
        return Directions(params, flat[count:end], flat[end:], watched)

    def _filtered(self, direction: Callable[[Vector], Directions], all_three: bool = True) -> Directions:
        """The directions at the present point, corrected by recursive momentum if that is in use.

        all_three: whether D_v is corrected too.
        """
        recursive = self.filters.get("recursive")
        if not isinstance(recursive, Recursive):
            return direction(self.v)
        found = direction(self.v)

        def joined(found: Directions) -> Grads:
            own = found.own if all_three else []
            return [*self._vector(found.params).chunks, *own, *found.hparams]

        def at(point: Point) -> Grads:
            with self.oracles.at(point.params, point.hparams):
                return joined(direction(Vector(self.oracles.space, point.own)))

        corrected = self._parted(recursive(joined(found), at, self._here), found.watched)
        return corrected if all_three else corrected._replace(own=found.own)


class SOBA(_Adjoint):
    """Stochastic bilevel algorithm: w, v and λ step together, along directions from one batch of each level.

        D_w = ∇₁g,      D_v = ∇²₁₁g v + ∇₁f,      D_λ = ∇²₂₁g v + ∇₂f

    Args:
        params: w, a module's parameters() or any pytree of leaf tensors; those that do not require grad are left out.
        hparams: λ, likewise.
        lr: the step size of v (default: .1); that of a plain gradient step on w is a good choice.
        optimizer: instead of lr, a function from a list of tensors (v) to a torch.optim optimizer.
        average: the weight β of the newest direction in a running mean of D_λ (MA-SOBA).
        recursive: the weight η of the newest batch in recursive momentum (STORM) of all three directions; both losses
            must then be closures.
        on_nonfinite: what to do about NaN or infinity in a batch: "raise", "skip" (counted in `skipped`), or "ignore",
            which reads nothing from the device.

    Cost: for each `backward`, an evaluation and two reverse passes of g, and an evaluation and one reverse pass of f,
        with recursive twice; one read from the device. Memory: v; with average, also a vector like λ; with recursive,
        also two points and two directions.
    Source: Dagréou, Ablin, Vaiter and Moreau 2022, algorithm 1 (arXiv:2201.13409).

    Example:
        With g = ½ (w − λ)² and f = ½ (w − 1)², λ converges to 1.

        >>> w, lam = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> tracker = SOBA([w], [lam], lr=0.5)
        >>> optimizer = torch.optim.SGD([w, lam], lr=0.3)
        >>> for _ in range(300):
        ...     values = tracker.backward(((w - 1) ** 2).sum() / 2, ((w - lam) ** 2).sum() / 2)
        ...     optimizer.step()
        ...     tracker.step()
        ...     optimizer.zero_grad()
        >>> round(lam.item(), 3)
        1.0
    """

    def __init__(
        self,
        params: PyTree,
        hparams: PyTree,
        *,
        lr: float | None = None,
        optimizer: MakeOptimizer | None = None,
        average: float | None = None,
        recursive: float | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        super().__init__(params, hparams, average=average, on_nonfinite=on_nonfinite)
        self._start()
        self._move_by(self.v.chunks, lr, optimizer, default=0.1)
        if recursive is not None:
            self.filters["recursive"] = Recursive(recursive)

    def directions(self, outer: Batch, inner: Batch) -> Directions:
        return self._filtered(lambda v: self._combined(*self._of_batches(outer, inner, v), v))

    def _of_batches(self, outer: Batch, inner: Batch, v: Vector) -> tuple[Gradients, Products]:
        return self.oracles.gradients(outer), self.oracles.products(inner, v.leaves)

    def _combined(self, slopes: Gradients, products: Products, v: Vector) -> Directions:
        rhs = self._vector(slopes.params)
        residual = self._vector(products.hessian) + rhs
        watched = self._watched(rhs, residual, v)
        return Directions(products.gradient, residual.chunks, plus(products.cross, slopes.hparams), watched)

    @property
    def _adjoint_lr(self) -> float | None:
        plain = isinstance(self.optimizer, torch.optim.SGD) and not self.optimizer.param_groups[0]["momentum"]
        return self.lr if plain else None


class SABA(SOBA):
    """SOBA with SAGA's variance reduction, which converges with constant step sizes on finite sums.

    Tables hold the last directions of every batch; `backward` takes the indices of its two batches.

    Args:
        params, hparams, lr, optimizer, on_nonfinite: as in SOBA.
        batches: the numbers of training and of validation batches. Batches must stay the same throughout, and have
            equal sizes.
        budget: bytes that the tables may take.
        file: path prefix of the files that hold the tables, mapped into memory; None: in memory.

    Cost: that of SOBA. Memory: v, and (2 |w| + |λ|) for each training batch, (|w| + |λ|) for each validation batch.
    Source: Dagréou et al. 2022, section 3.2; here the tables start from zeros.

    Example:
        With g = ½ (w − λ)² and f = ½ (w − 1)², λ converges to 1.

        >>> import torch, hypergrad as hg
        >>> w, lam = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> tracker = hg.bilevel.SABA([w], [lam], batches=(1, 1), lr=0.5)
        >>> optimizer = torch.optim.SGD([w, lam], lr=0.1)
        >>> for _ in range(400):
        ...     _ = tracker.backward(lambda: ((w - 1) ** 2).sum() / 2, lambda: ((w - lam) ** 2).sum() / 2, index=(0, 0))
        ...     optimizer.step()
        ...     tracker.step()
        ...     optimizer.zero_grad()
        >>> bool((lam - 1).abs() < 0.01)
        True
    """

    takes = ("index",)

    def __init__(
        self,
        params: PyTree,
        hparams: PyTree,
        *,
        batches: tuple[int, int],
        lr: float | None = None,
        optimizer: MakeOptimizer | None = None,
        budget: float = 4 * 2**30,
        file: str | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        super().__init__(params, hparams, lr=lr, optimizer=optimizer, on_nonfinite=on_nonfinite)
        chunks, outer = self.v.chunks, self.oracles.hparams
        of_inner, of_outer = [*chunks, *chunks, *outer], [*chunks, *outer]
        needed = table_bytes(batches[0], of_inner) + table_bytes(batches[1], of_outer)
        if needed > budget and file is None:
            raise ValueError(
                f"SABA's tables take {needed / 2**30:.3g} GiB for {batches} batches, and budget is "
                f"{budget / 2**30:.3g} GiB: use larger batches, file= to keep the tables on disk, a larger budget, or "
                f"SRBA, which has no tables"
            )
        names = [None if file is None else f"{file}.{level}" for level in ("inner", "outer")]
        self.tables = Table(batches[0], of_inner, names[0]), Table(batches[1], of_outer, names[1])
        self.filters |= dict(zip(("inner", "outer"), self.tables, strict=True))

    def directions(self, outer: Batch, inner: Batch, index: tuple[int, int] | None) -> Directions:
        if index is None:
            raise TypeError(
                "SABA keeps a table of batches: pass index=(index of the training batch, index of the validation batch)"
            )
        slopes, products = self._of_batches(outer, inner, self.v)
        new = self._combined(slopes, products, self.v)
        self._check_reached(new.hparams)
        count = len(self.v.chunks)
        gradient, hessian = (self._vector(g).chunks for g in (products.gradient, products.hessian))
        of_inner = self.tables[0]([*gradient, *hessian, *products.cross], index[0])
        of_outer = self.tables[1]([*self._vector(slopes.params).chunks, *slopes.hparams], index[1])
        summed = plus(list(of_inner[count:]), list(of_outer))
        return self._parted([*of_inner[:count], *summed], new.watched)


Sums = Callable[[], "tuple[Iterable[LossLike], Iterable[LossLike]]"]


class SRBA(SOBA):
    """SOBA with SARAH's recursive differences, restarted from all data; converges with constant step sizes.

        D_t = D(x_t; all data)  at a restart,  else  D_{t−1} + D(x_t; batch) − D(x_{t−1}; batch)

    Args:
        params, hparams, lr, optimizer, on_nonfinite: as in SOBA. Both losses must be closures.
        full: returns (outer losses, inner losses), each an iterable of scalars or closures that sum to the loss over
            all data; a generator keeps one batch's graph at a time. With a GradScaler, full must scale them too.
        period: number of steps from one restart to the next.
        probability: probability of a restart at each step, instead of period (SPABA, PAGE's rule).
        generator: on the CPU, to draw these restarts.

    Cost: for each `backward`, twice SOBA's, or at a restart that of all data. Memory: v, two points, two directions.
    Source: Dagréou, Moreau, Vaiter and Ablin 2024 (SRBA, arXiv:2302.08766), algorithm 1; Chu, Xu, Yao and Hu 2024
        (SPABA, arXiv:2405.18777).

    Example:
        With g = ½ (w − λ)² and f = ½ (w − 1)², λ converges to 1.

        >>> import torch, hypergrad as hg
        >>> w, lam = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> full = lambda: ([((w - 1) ** 2).sum() / 2], [((w - lam) ** 2).sum() / 2])  # of all batches
        >>> tracker = hg.bilevel.SRBA([w], [lam], full=full, period=10, lr=0.5)
        >>> optimizer = torch.optim.SGD([w, lam], lr=0.1)
        >>> for _ in range(400):
        ...     _ = tracker.backward(lambda: ((w - 1) ** 2).sum() / 2, lambda: ((w - lam) ** 2).sum() / 2)
        ...     optimizer.step()
        ...     tracker.step()
        ...     optimizer.zero_grad()
        >>> bool((lam - 1).abs() < 0.01)
        True
    """

    def __init__(
        self,
        params: PyTree,
        hparams: PyTree,
        *,
        full: Sums,
        period: int | None = None,
        probability: float | None = None,
        lr: float | None = None,
        optimizer: MakeOptimizer | None = None,
        generator: torch.Generator | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        if (period is None) == (probability is None):
            raise TypeError("pass either period or probability")
        if (period is not None and period < 1) or (probability is not None and not 0 < probability <= 1):
            raise ValueError(f"period must be at least 1, probability in (0, 1]; got {period or probability}")
        super().__init__(params, hparams, lr=lr, optimizer=optimizer, on_nonfinite=on_nonfinite)
        self.full, self.recursive = full, Recursive(0.0, period, probability, generator)
        self.filters["recursive"] = self.recursive

    def directions(self, outer: Batch, inner: Batch) -> Directions:
        if not self.recursive.anew:
            return super().directions(outer, inner)
        if self.recursive.given:  # .grad already holds the direction of all data for this step
            nothing: list[Any] = [torch.zeros_like(x) for x in (*self.v.chunks, *self.v.chunks)]
            return self._parted([*nothing, *[None] * len(self.oracles.hparams)], {})
        return self._filtered(self._of_all)

    def _of_all(self, v: Vector) -> Directions:
        with self.oracles.as_the_user():
            outers, inners = self.full()
        slopes, products = [], []
        for batch in self.oracles.batches(outers, "outer_loss"):
            slopes.append(self.oracles.gradients(batch))
            slopes = [_summed(slopes)]
        for batch in self.oracles.batches(inners):
            products.append(self.oracles.products(batch, v.leaves))
            products = [_summed(products)]
        if not slopes or not products:
            raise ValueError("full must return at least one outer and one inner loss")
        return self._combined(Gradients(*slopes[0]), Products(*products[0]), v)


def _summed(parts: list[Any]) -> Any:
    """The sum of one or two tuples of lists of tensors."""
    return parts[0] if len(parts) == 1 else tuple(plus(list(x), list(y)) for x, y in zip(*parts, strict=True))


class AmIGO(_Adjoint):
    """Several steps on the adjoint at every `backward`, from its last value (AmIGO) or from 0 (stocBiO).

        v ← v − η (∇²₁₁g v + ∇₁f)  for several steps,      D_w = ∇₁g,      D_λ = ∇²₂₁g v + ∇₂f

    For more inner steps per outer step, call `backward(None, inner_loss)` and the inner optimizer's step in between.

    Args:
        params, hparams, average, on_nonfinite: as in SOBA.
        steps: K, the number of steps on v (10 by default), all on the inner loss's batch. If `backward` gets
            adjoint_losses, it makes one step for each of these instead.
        lr: η, .1 by default.
        solver: instead of steps and lr, a linear solver, such as solvers.CG(max_steps=5), for the inner loss's batch.
        warm: whether v starts from its last value. False starts at −η ∇₁f.
        recursive: the weight η of the newest batch in recursive momentum of D_w and D_λ (warm=False: MRBO); the
            losses must then be closures.

    Cost: for each `backward`, an evaluation and one reverse pass of f and of g, K + 1 products, and an evaluation and
        a reverse pass for each of adjoint_losses. Memory: v.
    Source: Arbel and Mairal 2022 (AmIGO, arXiv:2111.14580); Ji, Yang and Liang 2021 (stocBiO, arXiv:2010.07962); Yang,
        Ji and Liang 2021 (MRBO, arXiv:2106.04692).

    Example:
        With g = ½ (w − λ)² and f = ½ (w − 1)², λ converges to 1.

        >>> import torch, hypergrad as hg
        >>> w, lam = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> tracker = hg.bilevel.AmIGO([w], [lam], steps=5, lr=0.5)
        >>> optimizer = torch.optim.SGD([w, lam], lr=0.1)
        >>> for _ in range(400):
        ...     _ = tracker.backward(lambda: ((w - 1) ** 2).sum() / 2, lambda: ((w - lam) ** 2).sum() / 2)
        ...     optimizer.step()
        ...     tracker.step()
        ...     optimizer.zero_grad()
        >>> bool((lam - 1).abs() < 0.01)
        True
    """

    takes = ("adjoint_losses",)

    def __init__(
        self,
        params: PyTree,
        hparams: PyTree,
        *,
        steps: int | None = None,
        lr: float | None = None,
        solver: Callable[..., Any] | None = None,
        warm: bool = True,
        average: float | None = None,
        recursive: float | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        if solver is not None and (lr is not None or steps is not None):
            raise TypeError("pass steps and lr (for plain gradient steps on v), or a solver, not both")
        steps = 10 if steps is None else steps
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        super().__init__(params, hparams, average=average, on_nonfinite=on_nonfinite)
        self._start()
        self._move_by(self.v.chunks, None, None, default=1.0)  # lr 1: D_v is the whole change of v
        self.adjoint_steps, self.eta, self.solver, self.warm = steps, 0.1 if lr is None else lr, solver, warm
        if recursive is not None:
            self.filters["recursive"] = Recursive(recursive)

    @property
    def _adjoint_lr(self) -> float | None:
        return self.eta if self.solver is None else None

    def directions(self, outer: Batch, inner: Batch, adjoint_losses: Iterable[LossLike] | None) -> Directions:
        batches = None
        if adjoint_losses is not None:
            if self.solver is not None:
                raise TypeError("adjoint_losses are for plain gradient steps on v; a solver uses the inner loss only")
            made = self.oracles.batches(adjoint_losses, "an adjoint loss")
            batches = list(made) if "recursive" in self.filters else made  # evaluated at the old point too
        return self._filtered(lambda v: self._at(outer, inner, batches, v), all_three=False)

    def _at(self, outer: Batch, inner: Batch, batches: Iterable[Batch] | None, start: Vector) -> Directions:
        slopes = self.oracles.gradients(outer)
        rhs = self._vector(slopes.params)
        gradient = self.oracles.gradient_with_graph(inner)
        v = start if self.warm else rhs * -self.eta
        v = self._solved(gradient, rhs, v) if batches is None else self._stepped(batches, rhs, v)
        hessian, cross = self.oracles.pull(gradient, v.leaves)
        watched = self._watched(rhs, self._vector(hessian) + rhs, v)
        change = (start - v).chunks
        return Directions(self.oracles.value_of(gradient), change, plus(cross, slopes.hparams), watched)

    def _solved(self, gradient: list[Tensor], rhs: Vector, v: Vector) -> Vector:
        """v after the steps, or from the solver, on the batch of `gradient`."""

        def product(v: Vector) -> Vector:
            return self._vector(self.oracles.pull(gradient, v.leaves, retain=True, cross=False)[0])

        if self.solver is not None:
            operator = operators.LinearOperator(product, symmetric=True)
            solution = solve(self.solver, operator, -rhs, v if self.warm else None)
            solution.report("the adjoint system of AmIGO", on_failure_of(self.solver))
            return solution.value
        for _ in range(self.adjoint_steps):
            v = v - (product(v) + rhs) * self.eta
        return v

    def _stepped(self, batches: Iterable[Batch], rhs: Vector, v: Vector) -> Vector:
        """v after one step for each batch."""
        batch = None
        for batch in batches:
            gradient = self.oracles.gradient_with_graph(batch)
            product, _ = self.oracles.pull(gradient, v.leaves, cross=False)
            v = v - (self._vector(product) + rhs) * self.eta
        if batch is None:
            raise ValueError("adjoint_losses holds no loss: leave it out to take the steps on the inner loss's batch")
        return v
