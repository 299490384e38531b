"""The report of a tracker: numbers of the last batch, their running means, and warnings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._solution import warn

SLOW, FAST = 0.99, 0.9  # decay of running means, over about 100 and 10 batches
SQUARES = ("inner_norm", "outer_norm", "own_norm", "rhs_norm", "residual_norm")
KNOWN = (*SQUARES, "vv", "vr", "fv", "vHv", "energy", "rise", "fall")
SETTLED = 100  # batches before running means can cause a warning


@dataclass(frozen=True)
class Report:
    """The state of a tracker after its last batch. Numbers that the algorithm does not have are NaN.

    Attributes:
        step: number of calls of `step`.
        skipped: number of batches that were left out because they gave NaN or infinity.
        inner_norm: ‖D_w‖, the norm of the direction that was added to .grad of params.
        outer_norm: ‖D_λ‖, likewise for hparams.
        cosine: cosine of the angle between D_λ and D_λ of the batch before.
        adjoint_residual: ‖∇²₁₁g v + ∇₁f‖ / ‖∇₁f‖ on this batch, so it includes the batch's noise; 1 for v = 0.
        adjoint_ratio: −⟨∇₁f, v⟩ / vᵀ∇²₁₁g v, as a running mean: 1 if v has the best length for its direction, below ½
            if v is worse than v = 0.
        curvature: the Rayleigh quotient vᵀ∇²₁₁g v / vᵀv, as a running mean: at most the largest eigenvalue.
        allowed_lr: 2 / curvature. Plain gradient steps on v or params with a larger step size diverge.
        evaluations: numbers of gradients of both losses and of second-order products.
        others: numbers that only this algorithm has, by name.

    Example:
        >>> w, lam = torch.full((1,), 2.0, requires_grad=True), torch.full((1,), 2.0, requires_grad=True)
        >>> tracker = hg.bilevel.SOBA([w], [lam], lr=0.5)
        >>> for _ in range(20):
        ...     _ = tracker.backward((w**2).sum() / 2, ((w - lam) ** 2).sum())
        ...     tracker.step()
        >>> report = tracker.report()
        >>> report.step, round(report.curvature, 3), round(report.allowed_lr, 3)  # ∇²₁₁g = 2
        (20, 2.0, 1.0)
    """

    step: int
    skipped: int
    inner_norm: float = math.nan
    outer_norm: float = math.nan
    cosine: float = math.nan
    adjoint_residual: float = math.nan
    adjoint_ratio: float = math.nan
    curvature: float = math.nan
    allowed_lr: float = math.nan
    evaluations: dict[str, int] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The report as one flat dict of numbers, without NaN, for any logger."""
        whole = asdict(self)
        flat = {**whole.pop("evaluations"), **whole.pop("others")}
        return {name: float(x) for name, x in {**whole, **flat}.items() if not math.isnan(x)}

    def __str__(self) -> str:
        return "\n".join(f"{name:<18} {value:.4g}" for name, value in self.metrics().items())


@dataclass(frozen=True)
class Comparison:
    """The last outer direction, compared with the hypergradient at the present params.

    Attributes:
        cosine: cosine of the angle between them.
        relative_error: ‖D_λ − ∇f‖ / ‖∇f‖.
        hypergradient: the result of implicit.grad.

    Example:
        >>> w, lam = torch.full((1,), 2.0, requires_grad=True), torch.full((1,), 2.0, requires_grad=True)
        >>> outer, inner = lambda: (w**2).sum() / 2, lambda: ((w - lam) ** 2).sum() / 2  # ∇f(λ) = λ
        >>> tracker = hg.bilevel.SOBA([w], [lam], lr=0.5)
        >>> for _ in range(20):
        ...     _ = tracker.backward(outer(), inner())
        ...     tracker.step()
        >>> comparison = tracker.error(outer(), inner())
        >>> comparison.hypergradient.grads, bool(comparison.relative_error < 1e-4)
        ([tensor([2.])], True)
    """

    cosine: float
    relative_error: float
    hypergradient: Any


class Watch:
    """The numbers of the last batch as floats, and running means of some of them.

    These names have a meaning: squared norms of the directions ("inner_norm2", "outer_norm2", "own_norm2") and of an
    adjoint system ("rhs_norm2", "residual_norm2"), the inner products "vv", "vr" and "fv" with r = Hv + ∇f and f = ∇f,
    and "rise" and "fall" of the outer loss. Other numbers are reported as they are.
    """

    def __init__(self, algorithm: str):
        self.algorithm = algorithm
        self.values: dict[str, float] = {}
        self.means: dict[str, float] = {}
        self.count = 0
        self._unread: tuple[list[str], Tensor] | None = None

    def note(self, values: dict[str, Tensor], read: bool) -> bool:
        """Record the numbers of one batch; return whether the norms are finite. read=False: `report` will read them."""
        names = list(values)
        at, dtype = values[names[0]].device, torch.float64 if values[names[0]].device.type == "cpu" else torch.float32
        self._unread = names, torch.stack([values[name].detach().to(at, dtype).reshape(()) for name in names])
        if not read:
            return True
        self._read()
        return all(math.isfinite(self.values.get(f"{name}2", 0.0)) for name in SQUARES[:3])

    def _read(self) -> None:
        if self._unread is not None:
            names, stacked = self._unread
            self.values = dict(zip(names, stacked.tolist(), strict=True))
            if "vr" in self.values:
                self.values["vHv"] = self.values["energy"] = self.values["vr"] - self.values["fv"]
            self._unread = None

    def accept(self, lr: float | None) -> None:
        """Update the running means with the last numbers, and warn. lr: that of plain gradient steps on v, or None."""
        self.count += 1
        if self._unread is not None:
            return
        for name in ("vHv", "vv", "energy", "fv", "rise", "fall"):
            if name in self.values:
                decay = min(FAST if name in ("vHv", "vv") else SLOW, 1 - 1 / self.count)
                self.means[name] = decay * self.means.get(name, 0.0) + (1 - decay) * self.values[name]
        if self.count >= SETTLED:
            self._warn(lr)

    def _warn(self, lr: float | None) -> None:
        curvature = self.mean_ratio("vHv", "vv")
        if lr is not None and curvature * lr > 2:
            warn(
                f"{self.algorithm}: lr={lr:.3g} is above 2 / curvature = {2 / curvature:.3g}, so the adjoint v "
                f"diverges (and so do params with such a step size): lower lr, or shorten the outer steps if hparams "
                f"have made the inner problem stiff"
            )
            return
        ratio = -self.mean_ratio("fv", "energy")
        if self.means.get("vHv", 0.0) > 0 and ratio < 0.5:
            warn(
                f"{self.algorithm}: over the last {SETTLED} batches the adjoint v was worse than v = 0 "
                f"(−⟨∇f, v⟩ / vᵀHv = {ratio:.2g}, and 1 for a solution): it does not follow params. Lower the step "
                f"size of v if v is noise, raise it (up to 2 / curvature = {2 / curvature:.3g}) if v lags behind, or "
                f"take larger batches"
            )
        rise, fall = self.means.get("rise", 0.0), self.means.get("fall", 0.0)
        if rise > 3 * abs(fall) > 0:
            warn(
                f"{self.algorithm}: the copies that ascend the outer loss raise it by {rise:.3g}, while those that "
                f"descend lower it by {fall:.3g}: the penalty is too small for differences of this order. Raise "
                f"penalty, or use order=1"
            )

    def mean_ratio(self, above: str, below: str) -> float:
        a, b = self.means.get(above, math.nan), self.means.get(below, math.nan)
        return a / b if b else math.nan

    def report(self, step: int, skipped: int, cosine: float, counts: dict[str, int]) -> Report:
        self._read()
        values, curvature = self.values, self.mean_ratio("vHv", "vv")
        norms = {name: math.sqrt(x) for name in SQUARES if (x := values.get(f"{name}2", math.nan)) >= 0}
        rhs = norms.get("rhs_norm", 0.0)
        return Report(
            step=step,
            skipped=skipped,
            inner_norm=norms.get("inner_norm", math.nan),
            outer_norm=norms.get("outer_norm", math.nan),
            cosine=cosine,
            adjoint_residual=norms["residual_norm"] / rhs if rhs else math.nan,
            adjoint_ratio=-self.mean_ratio("fv", "energy"),
            curvature=curvature,
            allowed_lr=2 / curvature if curvature > 0 else math.nan,
            evaluations=dict(counts),
            others={name: x for name, x in values.items() if name.removesuffix("2") not in KNOWN},
        )
