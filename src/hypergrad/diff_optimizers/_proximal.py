"""Rules for inner problems with a constraint or a term that is not smooth: proximal gradient, FISTA, mirror descent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ._rule import Configuration, Here, Hyper, Rule, Value
from ._rules import Slots, Update, root


@dataclass(frozen=True, kw_only=True)
class Prox(Configuration, ABC):
    """prox_{ηr}(w) = argmin_u ½‖u − w‖² + η r(u), leaf by leaf. Hyperparameters as in `Rule`.

    At a kink the derivative is that of one side, and where the result is constant it is 0.
    """

    def __post_init__(self) -> None:
        """Numbers are checked here: strengths and radii must be ≥ 0. `Box` has its own condition."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "dim" and isinstance(value, (int, float)) and not value >= 0:
                raise ValueError(f"{type(self).__name__}: {f.name} must be ≥ 0, got {value!r}")

    @abstractmethod
    def _leaf(self, w: Tensor, lr: Value, here: Here) -> Tensor:
        """prox_{ηr} of one leaf."""


def shrink(w: Tensor, threshold: Value) -> Tensor:
    """sign(w) max(|w| − τ, 0)"""
    return torch.where(w.abs() > threshold, w - threshold * w.sign(), 0.0)


@dataclass(frozen=True, kw_only=True)
class L1(Prox):
    """r(w) = α‖w‖₁; the prox is sign(w) max(|w| − ηα, 0).

    Args:
        strength: α.
    """

    strength: Hyper

    def _leaf(self, w: Tensor, lr: Value, here: Here) -> Tensor:
        return shrink(w, lr * here(self, "strength"))


@dataclass(frozen=True, kw_only=True)
class ElasticNet(Prox):
    """r(w) = α‖w‖₁ + ½β‖w‖²; the prox is that of `L1` over 1 + ηβ.

    Args:
        l1: α.
        l2: β.
    """

    l1: Hyper
    l2: Hyper

    def _leaf(self, w: Tensor, lr: Value, here: Here) -> Tensor:
        return shrink(w, lr * here(self, "l1")) / (1 + lr * here(self, "l2"))


@dataclass(frozen=True, kw_only=True)
class Box(Prox):
    """lower ≤ w ≤ upper; the prox is the projection.

    Args:
        lower, upper: the bounds, with lower ≤ upper.
    """

    lower: Hyper = 0.0
    upper: Hyper = 1.0

    def __post_init__(self) -> None:
        bounds = self.lower, self.upper
        if all(isinstance(x, (int, float)) for x in bounds) and not bounds[0] <= bounds[1]:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"Box: lower must be ≤ upper, got {bounds}")

    def _leaf(self, w: Tensor, lr: Value, here: Here) -> Tensor:
        lower, upper = here(self, "lower"), here(self, "upper")
        return torch.where(w < lower, lower, torch.where(w > upper, upper, w))


@dataclass(frozen=True, kw_only=True)
class Simplex(Prox):
    """w ≥ 0 and Σ w = radius along the last axis; the prox is the projection max(w − θ, 0) with that sum.

    Args:
        radius: positive.

    Source: Held, Wolfe & Crowder 1974; Duchi et al., ICML 2008, figure 1.
    """

    radius: Hyper = 1.0

    def _leaf(self, w: Tensor, lr: Value, here: Here) -> Tensor:
        radius = here(self, "radius")
        with torch.no_grad():
            u = w.sort(dim=-1, descending=True).values
            counts = torch.arange(1, w.shape[-1] + 1, device=w.device, dtype=w.dtype)
            size = (u * counts > u.cumsum(-1) - radius).sum(-1, keepdim=True)
            support = w >= u.gather(-1, size - 1)
        theta = (torch.where(support, w, 0.0).sum(-1, keepdim=True) - radius) / support.sum(-1, keepdim=True)
        return torch.where(support, w - theta, 0.0)


@dataclass(frozen=True, kw_only=True)
class GroupLasso(Prox):
    """r(w) = α Σ_groups ‖w_g‖; the prox is max(1 − ηα/‖w_g‖, 0) w_g.

    Args:
        strength: α.
        dim: the axis that a group runs along; None where each leaf is one group.

    Source: Yuan & Lin 2006.
    """

    strength: Hyper
    dim: int | None = -1

    def _leaf(self, w: Tensor, lr: Value, here: Here) -> Tensor:
        threshold = lr * here(self, "strength")
        norm = root((w * w).sum() if self.dim is None else (w * w).sum(self.dim, keepdim=True))
        kept = norm > threshold
        return torch.where(kept, (1 - threshold / torch.where(kept, norm, 1.0)) * w, 0.0)


@dataclass(frozen=True, kw_only=True)
class ProximalGradient(Rule):
    """Proximal gradient, w ← prox_{ηr}(w − ηg).

    Args:
        lr: η, at most 1/L for a gradient of Lipschitz constant L.
        prox: r.

    Source: Beck & Teboulle 2009, ISTA.
    """

    lr: Hyper = 1e-3
    prox: Prox

    def _leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], here: Here) -> Update:
        lr = here(self, "lr")
        return self.prox._leaf(w - lr * g, lr, here), {}


@dataclass(frozen=True, kw_only=True)
class FISTA(Rule):
    """Accelerated proximal gradient. The params are y, where the gradient is taken; the solution x is state["x"].

        x₊ = prox_{ηr}(y − ηg(y)),    t₊ = (1 + √(1 + 4t²))/2,    y₊ = x₊ + (t − 1)/t₊ · (x₊ − x)

    Args:
        lr: η, at most 1/L.
        prox: r.

    Source: Beck & Teboulle 2009, equations 4.1 to 4.3.
    """

    lr: Hyper = 1e-3
    prox: Prox

    def _slots(self) -> Slots:
        def one(w: Tensor) -> Tensor:
            return torch.ones((), dtype=torch.promote_types(w.dtype, torch.float32))

        return {"x": torch.clone, "t": one}

    def _leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], here: Here) -> Update:
        lr = here(self, "lr")
        x, t = self.prox._leaf(w - lr * g, lr, here), (1 + (1 + 4 * s["t"] ** 2).sqrt()) / 2
        return x + (s["t"] - 1) / t * (x - s["x"]), {"x": x, "t": t}


@dataclass(frozen=True, kw_only=True)
class MirrorDescent(Rule):
    """Exponentiated gradient on the simplex, w ← w e^{−ηg} / Σ w e^{−ηg} along the last axis.

    Args:
        lr: η.

    Source: Kivinen & Warmuth 1997; Beck & Teboulle 2003. An entry that is 0 stays 0, with its derivative.
    """

    lr: Hyper = 1e-3

    def _leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], here: Here) -> Update:
        exponent = -here(self, "lr") * g
        # The largest exponent among positive entries cancels; the rest must not overflow where w = 0.
        top = torch.where(w > 0, exponent, -torch.inf).amax(-1, keepdim=True).detach()
        u = w * (exponent - top).clamp(max=80.0).exp()
        return u / u.sum(-1, keepdim=True), {}
