"""Update rules. Each computes its formula in the same order as torch.optim; letters as in `Rule`.

Unless a rule says otherwise, each begins with g ← ∇g(w) + λw. Fields and buffers have torch.optim's names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._rule import Hyper, Number, Rule, Values, is_zero

Update: TypeAlias = "tuple[Tensor, dict[str, Tensor]]"
Slots: TypeAlias = "Mapping[str, Callable[[Tensor], Tensor]]"


def sqrt(v: Any) -> Any:
    """√v, with derivative 0 instead of ∞ where v = 0.

    v = 0 means that every gradient so far was 0, hence m = 0, and d(m/(√v + ε)) = dm/ε − m d√v/ε² = dm/ε for any
    finite value of d√v. (If v underflowed, √v ≪ ε and the same holds to rounding.)
    """
    if not isinstance(v, Tensor):
        return v**0.5
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


# The next four functions are torch.optim's add_, addcmul_, addcdiv_ and lerp_ for a number a. Those round once, the
# formulas in the docstrings twice. A tensor a, which may have a graph, is used in the formula.


def plus(x: Tensor, a: Number, y: Tensor) -> Tensor:
    """x + a y"""
    return x + a * y if isinstance(a, Tensor) else x.add(y, alpha=a)


def plus_product(x: Tensor, a: Number, y: Tensor, z: Tensor) -> Tensor:
    """x + a y z"""
    return x + a * y * z if isinstance(a, Tensor) else x.addcmul(y, z, value=a)


def plus_ratio(x: Tensor, a: Number, y: Tensor, z: Tensor) -> Tensor:
    """x + a y/z"""
    return x + a * (y / z) if isinstance(a, Tensor) else x.addcdiv(y, z, value=a)


def between(x: Tensor, y: Tensor, a: Number) -> Tensor:
    """x + a (y − x)"""
    return x + a * (y - x) if isinstance(a, Tensor) or x.dtype != y.dtype else x.lerp(y, a)


def decayed(rule: Any, w: Tensor, g: Tensor, value: Values) -> Tensor:
    """g + λw"""
    return g if is_zero(rule.weight_decay) else plus(g, value(rule, "weight_decay"), w)


def decoupled(rule: Any, w: Tensor, g: Tensor, value: Values) -> tuple[Tensor, Tensor]:
    """((1 − ηλ) w, g) for a decoupled decay, which does not pass through the moments; otherwise (w, g + λw)."""
    if not rule.decoupled_weight_decay:
        return w, decayed(rule, w, g, value)
    return w * (1 - value(rule, "lr") * value(rule, "weight_decay")), g


def moments(s: Mapping[str, Tensor], g: Tensor, b1: Number, b2: Number) -> tuple[Tensor, Tensor]:
    """β₁m + (1 − β₁)g and β₂v + (1 − β₂)g²"""
    return between(s["exp_avg"], g, 1 - b1), plus_product(b2 * s["exp_avg_sq"], 1 - b2, g, g)


def zeros(*names: str) -> Slots:
    return dict.fromkeys(names, torch.zeros_like)


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Gradient descent with momentum.

        b ← g                    (t = 1)
        b ← μb + (1 − τ)g        (t > 1)
        w ← w − ηb               (nesterov: w − η(g + μb))

    τ is the dampening. If momentum is the number 0, the state holds no b and w ← w − ηg.

    Source: torch.optim.SGD; Sutskever et al., ICML 2013.

    Example:
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> rule, w = SGD(lr=lr), torch.tensor([1.0, 2.0])
        >>> new, state = rule.update(w, rule.init(w), w)
        >>> new.detach(), torch.autograd.grad(new.sum(), lr)[0]
        (tensor([0.9000, 1.8000]), tensor(-3.))
    """

    _counts = True
    lr: Hyper = 1e-3
    momentum: Hyper = 0.0
    dampening: Hyper = 0.0
    weight_decay: Hyper = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise ValueError("SGD: nesterov needs a momentum and no dampening")

    def slots(self) -> Slots:
        return {} if is_zero(self.momentum) else zeros("momentum_buffer")

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        g = decayed(self, w, g, value)
        if not s:
            return plus(w, -value(self, "lr"), g), {}
        mu, damped = value(self, "momentum"), value(self, "dampening")
        later = (value.t > 1).to(value.t.dtype) if value.number is None else value.number > 1
        b = plus(mu * s["momentum_buffer"], 1 - damped * later, g)
        return plus(w, -value(self, "lr"), plus(g, mu, b) if self.nesterov else b), {"momentum_buffer": b}


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adam.

        m ← β₁m + (1 − β₁)g,    v ← β₂v + (1 − β₂)g²
        w ← w − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)

    amsgrad replaces v in the second line by max(v₁, …, v_t). decoupled_weight_decay (AdamW) begins with w ← (1 − ηλ)w
    instead of adding λw to g.

    Source: Kingma & Ba, ICLR 2015; Reddi et al., ICLR 2018; Loshchilov & Hutter, ICLR 2019; as in torch.optim.Adam.

    Example:
        >>> D, w = hg.diff_optimizers, torch.tensor([1.0, 2.0])
        >>> for rule in (D.Adam(lr=0.1), D.AdamW(lr=0.1, weight_decay=0.5), D.AMSGrad(lr=0.1)):
        ...     print(rule.update(w, rule.init(w), w)[0])
        tensor([0.9000, 1.9000])
        tensor([0.8500, 1.8000])
        tensor([0.9000, 1.9000])
    """

    _counts = True
    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    amsgrad: bool = False
    decoupled_weight_decay: bool = False

    def slots(self) -> Slots:
        return zeros("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.amsgrad else []))

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        w, g = decoupled(self, w, g, value)
        b1, b2 = value(self, "betas")
        m, v = moments(s, g, b1, b2)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if self.amsgrad:
            v = new["max_exp_avg_sq"] = torch.maximum(s["max_exp_avg_sq"], v)
        scale = sqrt(v) / sqrt(1 - value.power(b2)) + value(self, "eps")
        return plus_ratio(w, -(value(self, "lr") / (1 - value.power(b1))), m, scale), new


AdamW = partial(Adam, weight_decay=1e-2, decoupled_weight_decay=True)
AMSGrad = partial(Adam, amsgrad=True)


@dataclass(frozen=True, kw_only=True)
class RMSprop(Rule):
    """RMSprop.

        v ← αv + (1 − α)g²
        a ← αa + (1 − α)g,    d = √(v − a²) + ε        (centered; otherwise d = √v + ε)
        b ← μb + g/d,         w ← w − ηb               (with momentum; otherwise w ← w − ηg/d)

    If momentum is the number 0, the state holds no b.

    Source: Hinton's lectures 2012; Graves 2013 (centred); as in torch.optim.RMSprop, except that the root of v − a² is
        0 here and NaN in torch if rounding makes v − a² negative.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.RMSprop(lr=0.05, alpha=0.99), torch.tensor([1.0, 2.0])
        >>> rule.update(w, rule.init(w), w)[0]  # η / √(1 − α) = 0.5 at first
        tensor([0.5000, 1.5000])
    """

    lr: Hyper = 1e-2
    alpha: Hyper = 0.99
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    momentum: Hyper = 0.0
    centered: bool = False

    def slots(self) -> Slots:
        optional = {"grad_avg": self.centered, "momentum_buffer": not is_zero(self.momentum)}
        return zeros("square_avg", *(name for name, used in optional.items() if used))

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        g, alpha, lr = decayed(self, w, g, value), value(self, "alpha"), value(self, "lr")
        v = plus_product(alpha * s["square_avg"], 1 - alpha, g, g)
        new, spread = {"square_avg": v}, v
        if self.centered:
            a = new["grad_avg"] = between(s["grad_avg"], g, 1 - alpha)
            spread = plus_product(v, -1, a, a)
        scale = sqrt(spread) + value(self, "eps")
        if "momentum_buffer" not in s:
            return plus_ratio(w, -lr, g, scale), new
        b = new["momentum_buffer"] = plus_ratio(value(self, "momentum") * s["momentum_buffer"], 1, g, scale)
        return plus(w, -lr, b), new


@dataclass(frozen=True, kw_only=True)
class Adagrad(Rule):
    """Adagrad, v ← v + g², w ← w − η/(1 + (t − 1)δ) · g / (√v + ε).

    δ is lr_decay; v starts from initial_accumulator_value, a number or a 0-d tensor.

    Source: Duchi et al., JMLR 2011; as in torch.optim.Adagrad.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.Adagrad(lr=0.1), torch.tensor([1.0, 2.0])
        >>> rule.update(w, rule.init(w), w)[0]
        tensor([0.9000, 1.9000])
    """

    _counts = True
    lr: Hyper = 1e-2
    lr_decay: Hyper = 0.0
    weight_decay: Hyper = 0.0
    initial_accumulator_value: float | Tensor = 0.0
    eps: Hyper = 1e-10

    def slots(self) -> Slots:
        return {"sum": lambda w: torch.zeros_like(w) + self.initial_accumulator_value}

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        g = decayed(self, w, g, value)
        v = plus_product(s["sum"], 1, g, g)
        lr = value(self, "lr") / (1 + ((value.number or value.t) - 1) * value(self, "lr_decay"))
        return plus_ratio(w, -lr, g, sqrt(v) + value(self, "eps")), {"sum": v}


@dataclass(frozen=True, kw_only=True)
class Adadelta(Rule):
    """Adadelta.

        v ← ρv + (1 − ρ)g²,    d = g √(u + ε)/√(v + ε),    u ← ρu + (1 − ρ)d²,    w ← w − ηd

    ε must be positive.

    Source: Zeiler 2012; as in torch.optim.Adadelta.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.Adadelta(lr=1.0), torch.tensor([1.0, 2.0])
        >>> w - rule.update(w, rule.init(w), w)[0]  # √ε / √(1 − ρ) at first
        tensor([0.0032, 0.0032])
    """

    lr: Hyper = 1.0
    rho: Hyper = 0.9
    eps: Hyper = 1e-6
    weight_decay: Hyper = 0.0

    def slots(self) -> Slots:
        return zeros("square_avg", "acc_delta")

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        g, rho, eps = decayed(self, w, g, value), value(self, "rho"), value(self, "eps")
        v = plus_product(rho * s["square_avg"], 1 - rho, g, g)
        d = (s["acc_delta"] + eps).sqrt() / (v + eps).sqrt() * g
        u = plus_product(rho * s["acc_delta"], 1 - rho, d, d)
        return plus(w, -value(self, "lr"), d), {"square_avg": v, "acc_delta": u}


@dataclass(frozen=True, kw_only=True)
class Adamax(Rule):
    """Adamax, m ← β₁m + (1 − β₁)g, u ← max(β₂u, |g| + ε), w ← w − η/(1 − β₁ᵗ) · m/u, where ε must be positive.

    Source: Kingma & Ba, ICLR 2015, section 7.1; as in torch.optim.Adamax.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.Adamax(lr=0.1), torch.tensor([1.0, 2.0])
        >>> rule.update(w, rule.init(w), w)[0]
        tensor([0.9000, 1.9000])
    """

    _counts = True
    lr: Hyper = 2e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0

    def slots(self) -> Slots:
        return zeros("exp_avg", "exp_inf")

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        g, (b1, b2) = decayed(self, w, g, value), value(self, "betas")
        m = between(s["exp_avg"], g, 1 - b1)
        u = torch.maximum(b2 * s["exp_inf"], g.abs() + value(self, "eps"))
        return plus_ratio(w, -(value(self, "lr") / (1 - value.power(b1))), m, u), {"exp_avg": m, "exp_inf": u}


@dataclass(frozen=True, kw_only=True)
class RAdam(Rule):
    """RAdam, with m, v and decoupled_weight_decay as in `Adam`.

        ρ_∞ = 2/(1 − β₂) − 1,    ρ = ρ_∞ − 2tβ₂ᵗ/(1 − β₂ᵗ),    r² = (ρ − 4)(ρ − 2)ρ_∞ / ((ρ_∞ − 4)(ρ_∞ − 2)ρ)
        w ← w − η/(1 − β₁ᵗ) · m · r √(1 − β₂ᵗ)/(√v + ε)        (ρ > 5; otherwise w − η/(1 − β₁ᵗ) · m)

    Source: Liu et al., ICLR 2020; as in torch.optim.RAdam. The step is discontinuous in β₂ where ρ = 5.

    Example:
        >>> D = hg.diff_optimizers
        >>> rule, w = D.RAdam(lr=0.1), torch.tensor([1.0, 2.0])
        >>> rule.update(w, rule.init(w), w)[0]  # the first steps do not use the second moment
        tensor([0.9000, 1.8000])
    """

    _counts = True
    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    decoupled_weight_decay: bool = False

    def slots(self) -> Slots:
        return zeros("exp_avg", "exp_avg_sq")

    def leaf(self, w: Tensor, g: Tensor, s: Mapping[str, Tensor], value: Values) -> Update:
        w, g = decoupled(self, w, g, value)
        (b1, b2), t = value(self, "betas"), value.t
        m, v = moments(s, g, b1, b2)
        limit = 2 / (1 - b2) - 1
        rho = limit - 2 * t * b2**t / (1 - b2**t)
        rectify = rho > 5
        # Both branches are differentiated. Where r is not used, it is computed at ρ = ρ_∞ = 6, where it is smooth.
        on, off = rectify.to(rho.dtype), (~rectify).to(rho.dtype)
        rho, limit = torch.where(rectify, rho, 6.0), on * limit + off * 6.0
        r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)).sqrt() * (1 - b2**t).sqrt()
        factor = on * r / (sqrt(v) + value(self, "eps")) + off
        return w - value(self, "lr") / (1 - b1**t) * (m * factor), {"exp_avg": m, "exp_avg_sq": v}
