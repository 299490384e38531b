"""Rules for inner problems with a constraint or a nonsmooth term: proximal gradient and FISTA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._rule import Hyper, Number, Rule, Values
from ._rules import Slots, Update, sqrt


@dataclass(frozen=True, kw_only=True)
class Prox(ABC):
    """prox_{ηr}(w) = argmin_u ½‖u − w‖² + η r(u), leaf by leaf. Hyperparameters as in `Rule`.

    The derivative at a kink is a one-sided derivative; where the result is constant it is 0.

    Example:
        >>> D = hg.diff_optimizers
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, kw_only=True)
        ... class NonNegative(D.Prox):
        ...     def leaf(self, w, lr, value):
        ...         return w.clamp(min=0)
        >>> rule, w = D.ProximalGradient(lr=0.1, prox=NonNegative()), torch.ones(2)
        >>> rule.update(w, rule.init(w), torch.tensor([1.0, 20.0]))[0]
        tensor([0.9000, 0.0000])
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            number = getattr(self, f.name)
            if f.name not in ("dim", "lower", "upper") and isinstance(number, (int, float)) and not number >= 0:
                raise ValueError(f"{type(self).__name__}: {f.name} must be ≥ 0, got {number!r}")

    @abstractmethod
    def leaf(self, w: Tensor, lr: Number, value: Values) -> Tensor:
        """prox_{ηr} of one leaf; value(self, name) is the value of a hyperparameter for this leaf."""


def shrink(w: Tensor, threshold: Number) -> Tensor:
    """sign(w) max(|w| − τ, 0), and NaN where w is NaN."""
    return torch.where(w.abs() <= threshold, 0.0, w - threshold * w.sign())


@dataclass(frozen=True, kw_only=True)
class L1(Prox):
    """r(w) = α‖w‖₁; the prox is sign(w) max(|w| − ηα, 0).

    Args:
        strength: α.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.ProximalGradient(lr=0.5, prox=D.L1(strength=1.0)), torch.tensor([1.0, 0.2])
        >>> rule.update(w, rule.init(w), torch.zeros(2))[0]  # each moves by ηα towards 0, at most to 0
        tensor([0.5000, 0.0000])
    """

    strength: Hyper

    def leaf(self, w: Tensor, lr: Number, value: Values) -> Tensor:
        return shrink(w, lr * value(self, "strength"))


@dataclass(frozen=True, kw_only=True)
class ElasticNet(Prox):
    """r(w) = α‖w‖₁ + ½β‖w‖²; the prox is that of `L1`, divided by 1 + ηβ.

    Args:
        l1, l2: α, β.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.ProximalGradient(lr=0.5, prox=D.ElasticNet(l1=1.0, l2=2.0)), torch.tensor([1.0, 0.2])
        >>> rule.update(w, rule.init(w), torch.zeros(2))[0]
        tensor([0.2500, 0.0000])
    """

    l1: Hyper
    l2: Hyper

    def leaf(self, w: Tensor, lr: Number, value: Values) -> Tensor:
        return shrink(w, lr * value(self, "l1")) / (1 + lr * value(self, "l2"))


@dataclass(frozen=True, kw_only=True)
class Box(Prox):
    """The constraint lower ≤ w ≤ upper; the prox is the projection.

    Args:
        lower, upper: the bounds, with lower ≤ upper.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.ProximalGradient(lr=0.5, prox=D.Box(lower=0.0, upper=1.0)), torch.tensor([1.0, 0.2])
        >>> rule.update(w, rule.init(w), torch.tensor([-1.0, 1.0]))[0]
        tensor([1., 0.])
    """

    lower: Hyper = 0.0
    upper: Hyper = 1.0

    def __post_init__(self) -> None:
        bounds = self.lower, self.upper
        if all(isinstance(x, (int, float)) for x in bounds) and not bounds[0] <= bounds[1]:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"Box: lower must be ≤ upper, got {bounds}")

    def leaf(self, w: Tensor, lr: Number, value: Values) -> Tensor:
        lower, upper = value(self, "lower"), value(self, "upper")
        return torch.where(w < lower, lower, torch.where(w > upper, upper, w))


@dataclass(frozen=True, kw_only=True)
class Simplex(Prox):
    """The constraint w ≥ 0, Σ w = radius along the last axis; the prox is the projection max(w − θ, 0) with that sum.

    Args:
        radius: positive.

    Source: Held, Wolfe & Crowder 1974; Duchi et al., ICML 2008, figure 1.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.ProximalGradient(lr=1.0, prox=D.Simplex()), torch.tensor([0.5, 0.5])
        >>> rule.update(w, rule.init(w), torch.tensor([-0.4, 0.0]))[0]
        tensor([0.7000, 0.3000])
    """

    radius: Hyper = 1.0

    def leaf(self, w: Tensor, lr: Number, value: Values) -> Tensor:
        radius = value(self, "radius")
        # Shifting all entries does not change the projection; unshifted large entries would absorb the radius.
        w = w - w.amax(-1, keepdim=True).detach()
        with torch.no_grad():
            u = w.to(torch.promote_types(w.dtype, torch.float32)).sort(dim=-1, descending=True).values
            counts = torch.arange(1, w.shape[-1] + 1, device=w.device, dtype=u.dtype)
            size = (u * counts > u.cumsum(-1) - radius).sum(-1, keepdim=True).clamp(min=1)
            support = w >= u.gather(-1, size - 1)
        theta = (torch.where(support, w, 0.0).sum(-1, keepdim=True) - radius) / support.sum(-1, keepdim=True)
        return torch.where(support, w - theta, 0.0 * w)


@dataclass(frozen=True, kw_only=True)
class GroupLasso(Prox):
    """r(w) = α Σ_groups ‖w_g‖; the prox is max(1 − ηα/‖w_g‖, 0) w_g.

    Args:
        strength: α.
        dim: the axis along which a group runs; None if each leaf is one group.

    Source: Yuan & Lin 2006.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.ProximalGradient(lr=1.0, prox=D.GroupLasso(strength=2.5)), torch.tensor([3.0, 4.0])
        >>> rule.update(w, rule.init(w), torch.zeros(2))[0]  # ‖w‖ = 5, so half of w remains
        tensor([1.5000, 2.0000])
    """

    strength: Hyper
    dim: int | None = -1

    def leaf(self, w: Tensor, lr: Number, value: Values) -> Tensor:
        dims, limits = tuple(range(w.ndim)) if self.dim is None else (self.dim,), torch.finfo(w.dtype)
        # Scaled, because the squares of numbers below 1e-22 or above 1e19 are 0 or infinite in float32.
        scale = w.abs().amax(dims, keepdim=True).detach().clamp(min=limits.tiny, max=limits.max)
        norm, threshold = sqrt((w / scale).square().sum(dims, keepdim=True)), lr * value(self, "strength") / scale
        kept = ~(norm <= threshold)
        factor = 1 - torch.where(kept, threshold, 0.0) / torch.where(kept, norm, 1.0)
        return torch.where(kept, factor * w, 0.0)


@dataclass(frozen=True, kw_only=True)
class ProximalGradient(Rule):
    """Proximal gradient, w ← prox_{ηr}(w − ηg).

    Args:
        lr: η, at most 1/L for a gradient of Lipschitz constant L.
        prox: r.

    Source: Beck & Teboulle 2009, ISTA.

    Example:
        >>> D = hg.diff_optimizers
        >>> strength = torch.tensor(0.5, requires_grad=True)
        >>> rule, w = D.ProximalGradient(lr=0.1, prox=D.L1(strength=strength)), torch.tensor([1.0, -2.0])
        >>> new, _ = rule.update(w, rule.init(w), w)
        >>> new.detach(), torch.autograd.grad(new[0], strength)
        (tensor([ 0.8500, -1.7500]), (tensor(-0.1000),))
    """

    lr: Hyper = 1e-3
    prox: Prox

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        lr = value(self, "lr")
        return self.prox.leaf(w - lr * g, lr, value), {}


@dataclass(frozen=True, kw_only=True)
class FISTA(Rule):
    """Accelerated proximal gradient. params holds y, where the gradient is taken; the solution x is state["x"].

        x₊ = prox_{ηr}(y − ηg(y)),    t₊ = (1 + √(1 + 4t²))/2,    y₊ = x₊ + (t − 1)/t₊ · (x₊ − x)

    t is kept on the CPU: a reverse pass through the step reads from the device once for each leaf.

    Args:
        lr: η, at most 1/L.
        prox: r.

    Source: Beck & Teboulle 2009, equations 4.1 to 4.3.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, y = D.FISTA(lr=0.5, prox=D.L1(strength=0.2)), torch.tensor([1.0, -2.0])
        >>> state = rule.init(y)
        >>> for _ in range(60):
        ...     y, state = rule.update(y, state, y - 1)  # the gradient of ½‖y − 1‖²
        >>> [x.round(decimals=4) for x in state["x"]]
        [tensor(0.8000), tensor(0.8000)]
    """

    lr: Hyper = 1e-3
    prox: Prox

    def slots(self) -> Slots:
        one: Any = partial(torch.ones, (), device="cpu")  # where state["step"] is too
        return {"x": torch.clone, "t": lambda w: one(dtype=torch.promote_types(w.dtype, torch.float32))}

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        lr = value(self, "lr")
        x, t = self.prox.leaf(w - lr * g, lr, value), (1 + (1 + 4 * s["t"] ** 2).sqrt()) / 2
        return x + (s["t"] - 1) / t * (x - s["x"]), {"x": x, "t": t}
