"""Algorithms without second derivatives: F2SA, BOME, SAMA.

They work with fused attention, FSDP and compiled models. Losses must be closures, to be evaluated at several points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _autodiff
from .._tree import PyTree
from ..diff_optimizers import from_torch
from ._oracles import Batch, Grads, dot, plus, times
from ._tracker import Directions, MakeOptimizer, OnNonfinite, Tracker

# Coefficients c_k of Σ_k c_k φ(kσ) / σ = φ'(0) + O(σ^p).
STENCILS = {
    1: {0: -1.0, 1: 1.0},
    2: {-1: -1 / 2, 1: 1 / 2},
    4: {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12},
}


class F2SA(Tracker):
    """Fully first-order: finite differences between copies of params that minimise g + kσf for several k.

        y_k ≈ argmin g + kσ f,      D_λ = Σ_k c_k ∇₂(g + kσ f)(y_k) / σ,      σ = 1 / penalty

    c_k are the coefficients of a finite difference of the given order, so the error is O(σ^order). params minimise g
    alone and never see validation data; the copies y_k do, and belong to the tracker.

    Args:
        params, hparams, average, on_nonfinite: as in SOBA. Both losses must be closures.
        order: 1 (one copy, and params), 2 (two copies) or 4 (four copies).
        penalty: 1/σ. Copies with k < 0 ascend f; a penalty that is too small ruins the difference, with a warning.
        lr: the step size of plain gradient steps on the copies (default: .1); that of params is a good choice.
        optimizer: instead of lr, a function from a list of tensors (the copies) to a torch.optim optimizer.

    Cost: for each `backward`, an evaluation and a reverse pass of g at params, and of g + kσf at each copy. Memory: the
        copies.
    Source: Kwon, Kwon, Wright and Nowak 2023 (F2SA, arXiv:2301.10945); Chen, Li, Chen and Zhang 2025 (F2SA-p,
        arXiv:2509.02937). Here the outer step is not normalised; the outer optimizer can do that.

    Example:
        With g = ½ (w − λ)² and f = ½ (w − 1)², λ converges to 1.

        >>> import torch, hypergrad as hg
        >>> w, lam = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> tracker = hg.bilevel.F2SA([w], [lam], lr=0.5, penalty=10.0)
        >>> optimizer = torch.optim.SGD([w, lam], lr=0.1)
        >>> for _ in range(400):
        ...     _ = tracker.backward(lambda: ((w - 1) ** 2).sum() / 2, lambda: ((w - lam) ** 2).sum() / 2)
        ...     optimizer.step()
        ...     tracker.step()
        ...     optimizer.zero_grad()
        >>> bool((lam - 1).abs() < 0.1)
        True
    """

    def __init__(
        self,
        params: PyTree,
        hparams: PyTree,
        *,
        order: int = 2,
        penalty: float = 10.0,
        lr: float | None = None,
        optimizer: MakeOptimizer | None = None,
        average: float | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        if order not in STENCILS:
            raise ValueError(f"order must be one of {sorted(STENCILS)}, got {order!r}")
        if not penalty > 0:
            raise ValueError(f"penalty must be positive, got {penalty!r}")
        super().__init__(params, hparams, average=average, on_nonfinite=on_nonfinite)
        self.stencil, self.penalty = STENCILS[order], penalty
        leaves = self.oracles.params
        self.copies = {k: [x.detach().clone() for x in leaves] for k in self.stencil if k}
        self._move_by([x for copy in self.copies.values() for x in copy], lr, optimizer, default=0.1)

    def restart(self) -> None:
        """Set every copy to the present params."""
        for copy in self.copies.values():
            for x, w in zip(copy, self.oracles.params, strict=True):
                x.copy_(w.detach())

    def directions(self, outer: Batch, inner: Batch) -> Directions:
        oracles = self.oracles
        at_params = oracles.gradients(inner)
        total = times(at_params.hparams, self.stencil.get(0, 0.0) * self.penalty) if 0 in self.stencil else None
        own: list[Tensor] = []
        values: dict[int, Tensor] = {}
        for k, copy in self.copies.items():
            with oracles.at(copy):  # one loss after the other: FSDP's hooks expect a reverse pass after each
                g, f = oracles.gradients(inner), oracles.gradients(outer)
            values[k] = outer.last / oracles.scale
            part = times(plus(g.hparams, f.hparams, k / self.penalty), self.stencil[k] * self.penalty)
            total = part if total is None else plus(total, part)
            own += [x + y * (k / self.penalty) for x, y in zip(g.params, f.params, strict=True)]
        assert total is not None
        return Directions(at_params.params, own, total, self._watched(outer, values))

    def _watched(self, outer: Batch, values: dict[int, Tensor]) -> dict[str, Tensor]:
        """The distance of a copy from params, and at every 16th call by how much f rises and falls at the copies."""
        leaves = [x.detach() for x in self.oracles.params]
        apart = [x - w for x, w in zip(self.copies[1], leaves, strict=True)]
        watched = {"copy_distance": self._vector(apart).norm() / self._vector(leaves).norm()}
        # After an evaluation without a reverse pass FSDP2 would keep params gathered, and use them in the next one.
        if -1 in values and self._watch.count % 16 == 0 and not self.oracles.sharded:
            with torch.no_grad():
                here = outer.evaluate(moved=True) / self.oracles.scale
            watched |= {"rise": values[-1] - here, "fall": here - values[1]}
        return watched


class BOME(Tracker):
    """First-order, with an automatic penalty μ: params and hparams descend f + μ q, where q = g(w, λ) − min g(·, λ).

        z: K gradient steps on g from w,      ∇q = (∇₁g(w), ∇₂g(w) − ∇₂g(z)),
        μ = max(η − ⟨∇f, ∇q⟩ / ‖∇q‖², 0),      (D_w, D_λ) = ∇f + μ ∇q

    params descend the outer loss too, so they see validation data: train them again with the learned λ before a test.

    Args:
        params, hparams, on_nonfinite: as in SOBA. The inner loss must be a closure.
        steps: K.
        lr: the step size of these K steps.
        eta: η, which sets the least decrease of q.

    Cost: for each `backward`, an evaluation and a reverse pass of f and K + 1 of g. Memory: two copies of params.
    Source: Ye, Liu, Wright, Stone and Liu 2022 (arXiv:2209.08709), algorithm 1, with φ = η‖∇q‖².

    Example:
        With g = ½ (w − λ)² and f = ½ (w − 1)², λ converges to 1.

        >>> import torch, hypergrad as hg
        >>> w, lam = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> tracker = hg.bilevel.BOME([w], [lam], steps=10, lr=0.3)
        >>> optimizer = torch.optim.SGD([w, lam], lr=0.1)
        >>> for _ in range(400):
        ...     _ = tracker.backward(lambda: ((w - 1) ** 2).sum() / 2, lambda: ((w - lam) ** 2).sum() / 2)
        ...     optimizer.step()
        ...     tracker.step()
        ...     optimizer.zero_grad()
        >>> bool((lam - 1).abs() < 0.1)
        True
    """

    def __init__(
        self,
        params: PyTree,
        hparams: PyTree,
        *,
        steps: int = 10,
        lr: float = 0.1,
        eta: float = 0.5,
        on_nonfinite: OnNonfinite = "raise",
    ):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        super().__init__(params, hparams, on_nonfinite=on_nonfinite)
        self.inner_steps, self.inner_lr, self.eta = steps, lr, eta

    def directions(self, outer: Batch, inner: Batch) -> Directions:
        oracles = self.oracles
        slopes, here = oracles.gradients(outer), oracles.gradients(inner)
        z, there = [x.detach() for x in oracles.params], here  # the first step starts at w
        for _ in range(self.inner_steps):
            z = [x - self.inner_lr * g for x, g in zip(z, there.params, strict=True)]
            with oracles.at(z):
                there = oracles.gradients(inner)
        gap: Grads = [*here.params, *plus(here.hparams, times(there.hparams, -1.0))]
        f: Grads = [*slopes.params, *slopes.hparams]
        size: Any = dot(gap, gap)
        slope: Any = dot(f, gap)
        mu = torch.where(size > 0, self.eta - slope / size, 0.0).clamp(min=0.0)
        whole: list[Any] = plus(f, gap, mu)
        count = len(oracles.params)
        return Directions(whole[:count], [], whole[count:], {"penalty": mu})


class SAMA(Tracker):
    """Differentiates one step of the user's optimizer, by a difference of first-order gradients.

        u = (∂step/∂∇₁g) ∇₁f,      D_λ = ∇₂f − [∇₂g(w + εu) − ∇₂g(w − εu)] / 2ε,      ε = radius / ‖u‖

    With lr= instead of an optimizer, u = lr ∇₁f, which is DARTS. (T1–T2, which computes the product exactly, is
    AmIGO(steps=0, warm=False).)

    Args:
        params, hparams, average, on_nonfinite: as in SOBA. The inner loss must be a closure.
        optimizer: the optimizer of params, of a class that diff_optimizers.from_torch supports. Its next step, from its
            present state, is differentiated with respect to the gradient.
        lr: instead of optimizer, the step size of plain gradient steps.
        radius: ‖εu‖, the distance from params at which g is evaluated.

    Cost: for each `backward`, an evaluation and a reverse pass of f and three of g. Memory: two copies of params; with
        optimizer, also its state and the graph of its step while that is differentiated.
    Source: Choe et al. 2023 (SAMA, arXiv:2310.05674), sections 3.1 and 3.2, but with bias correction, and at the
        optimizer's next step; Liu, Simonyan and Yang 2019 (DARTS, arXiv:1806.09055), equation 8.

    Example:
        With g = ½ (w − λ)² and f = ½ (w − 1)², λ converges to 1.

        >>> import torch, hypergrad as hg
        >>> w, lam = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> tracker = hg.bilevel.SAMA([w], [lam], lr=0.1)
        >>> optimizer = torch.optim.SGD([w, lam], lr=0.1)
        >>> for _ in range(400):
        ...     _ = tracker.backward(lambda: ((w - 1) ** 2).sum() / 2, lambda: ((w - lam) ** 2).sum() / 2)
        ...     optimizer.step()
        ...     tracker.step()
        ...     optimizer.zero_grad()
        >>> bool((lam - 1).abs() < 0.1)
        True
    """

    def __init__(
        self,
        params: PyTree,
        hparams: PyTree,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        lr: float | None = None,
        radius: float = 0.01,
        average: float | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        if (optimizer is None) == (lr is None):
            raise TypeError("pass either the optimizer of params or lr")
        super().__init__(params, hparams, average=average, on_nonfinite=on_nonfinite)
        self.inner_optimizer, self.inner_lr, self.radius = optimizer, 0.0 if lr is None else lr, radius
        if optimizer is not None:
            from_torch(optimizer)  # raises for an optimizer without a rule
            moved = {id(x) for group in optimizer.param_groups for x in group["params"]}
            if any(id(x) not in moved for x in self.oracles.params):
                raise ValueError("optimizer does not move all of params: pass the one that does")

    def directions(self, outer: Batch, inner: Batch) -> Directions:
        oracles = self.oracles
        slopes, here = oracles.gradients(outer), oracles.gradients(inner)
        u = self._stepped(here.params, slopes.params)
        size = self._vector(u).norm()
        epsilon = torch.where(size > 0, self.radius / size, 0.0)
        sides = []
        for sign in (1.0, -1.0):
            moved = [w.detach() + (sign * epsilon).to(w) * x for w, x in zip(oracles.params, u, strict=True)]
            with oracles.at(moved):
                sides.append(oracles.gradients(inner).hparams)
        factor = torch.where(size > 0, -size / (2 * self.radius), 0.0)
        through = times(plus(sides[0], times(sides[1], -1.0)), factor)
        return Directions(here.params, [], plus(slopes.hparams, through), {"step_norm": size})

    def _stepped(self, gradient: Sequence[Tensor], f: Sequence[Tensor]) -> list[Tensor]:
        """u: the derivative of the step (old minus new params) with respect to ∇₁g, times f."""
        if self.inner_optimizer is None:
            return [x * self.inner_lr for x in f]
        rule, leaves, state = from_torch(self.inner_optimizer)
        moved = [x for group in self.inner_optimizer.param_groups for x in group["params"]]
        places = {id(x): i for i, x in enumerate(moved)}
        chosen = [places[id(x)] for x in self.oracles.params]
        inputs = [g.detach().requires_grad_() for g in gradient]
        grads: list[Any] = [None] * len(moved)
        for i, g in zip(chosen, inputs, strict=True):
            grads[i] = g
        new = rule.update([x.detach() for x in leaves], state, grads)[0]
        return [-g for g in _autodiff.grad([new[i] for i in chosen], inputs, f)]
