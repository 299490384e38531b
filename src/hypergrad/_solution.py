"""The result of an iteration: a value with a status that says what happened and what to do."""

from __future__ import annotations

import enum
import math
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ._graph import LIBRARY_FOLDERS
from ._torch import numbers
from ._tree import full
from ._vector import FREE_TO_READ, Scalar, Vector, anywhere, norm, ratio, read, square_root, squares_are_exact
from ._versions import with_help

OnFailure: TypeAlias = Literal["warn", "raise", "ignore"]
KINK = 0.9  # a loss counts as nonsmooth if this share of ‖∇₁g‖ lies in entries where w is 0
UNSOLVED = 0.1  # estimated relative distance from the inner solution above which a warning is due
INACCURATE = 0.1  # estimated relative error of a hypergradient above which a warning is due


class Status(enum.Enum):
    """How a solve ended. Members are ordered from good to bad; `message` says what happened and what to try.

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True)
        >>> solution = hg.solvers.CG(max_steps=1)(op, torch.ones(2))
        >>> solution.status.name, solution.status is hg.Status.COMPLETED, solution.ok
        ('COMPLETED', True, True)
        >>> print(hg.Status.COMPLETED.message)
        the number of steps that was asked for is done; no tolerance was given
    """

    _value_: int
    message: str

    CONVERGED = "the tolerance is reached"
    COMPLETED = "the number of steps that was asked for is done; no tolerance was given"
    MAX_STEPS = (
        "the tolerance is not reached: raise max_steps, precondition, take a more exact solver, or loosen rtol or atol"
    )
    STAGNATED = (
        "the residual no longer falls: the accuracy of this dtype is reached, the system is singular and inconsistent, "
        "or a restarted method is stuck; use float64, damping, a larger restart, or another solver"
    )
    DIVERGED = (
        "the residual is no smaller than that of x = 0: give a Krylov method more steps, and take MINRES in place of "
        "CG if A may be singular; in place of a stationary iteration take a smaller step size, or a method that needs "
        "no contraction (GMRES or MINRES for a linear system; Anderson, Broyden or Newton for a fixed point)"
    )
    NOT_POSITIVE_DEFINITE = (
        "a direction of zero or negative curvature was met (xᵀAx ≤ 0): the point is not a strict minimum, or the "
        "system is singular; use MINRES or damping, solve the inner problem further, or take operators.GaussNewton "
        "where the loss is a convex function of a model's output"
    )
    NOT_SYMMETRIC = (
        "the operator was declared symmetric and is not (xᵀAy ≠ yᵀAx): use GMRES, BiCGStab, NormalCG or LSQR"
    )
    BREAKDOWN = (
        "a division by zero ended the method: the system is singular, or the method does not apply; use another "
        "solver or damping"
    )
    NON_FINITE = (
        "NaN or infinity in the right hand side, in a product or in the iterates: look at the losses at this point "
        "(overflow, log(0), a norm differentiated at 0), or use a wider dtype"
    )

    def __new__(cls, message: str):
        member = object.__new__(cls)
        member._value_ = len(cls.__members__)
        member.message = message
        return member


class HypergradientWarning(UserWarning):
    """A result is known, or estimated, not to be what was asked for.

    Each kind is shown once for each line of your code that leads to it, even if the numbers in the text differ; with
    the filters "always" and "error", every time.

    Example:
        >>> import warnings
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, -1.0])), symmetric=True)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", hg.HypergradientWarning)  # every kind is an error now
        ...     try:
        ...         _ = hg.solvers.CG()(op, torch.ones(2))
        ...     except hg.HypergradientWarning as warning:
        ...         print(type(warning).__name__)
        NotConverged
    """


class NotConverged(HypergradientWarning):
    """A linear system or a fixed point was not solved to its tolerance.

    Example:
        >>> import warnings
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 100.0])), symmetric=True)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     solution = hg.solvers.CG(rtol=1e-6, max_steps=1)(op, torch.ones(2))
        >>> caught[0].category.__name__, solution.status.name
        ('NotConverged', 'MAX_STEPS')
    """


class NotFinite(HypergradientWarning):
    """A hypergradient holds NaN or infinity.

    Example:
        >>> import warnings
        >>> w, lam = torch.zeros(1), torch.zeros(1, requires_grad=True)
        >>> outer_loss, inner_loss = lambda w, lam: (w + lam.sqrt()).sum(), lambda w, lam: ((w - lam) ** 2).sum()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")  # the slope of outer_loss at λ = 0 is infinite
        ...     result = hg.implicit.grad(outer_loss, inner_loss=inner_loss, params=w, hparams=lam)
        >>> [each.category.__name__ for each in caught], result.grads
        (['NotFinite'], tensor([inf]))
    """


class UnsolvedInnerProblem(HypergradientWarning):
    """params are so far from the inner solution that the hypergradient means little.

    Example:
        >>> import warnings
        >>> lam = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> losses = {"inner_loss": lambda w, lam: ((w - lam) ** 2).sum() / 2, "params": torch.zeros(2), "hparams": lam}
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     result = hg.implicit.grad(lambda w, lam: ((w - 3) ** 2).sum(), **losses)  # w = 0 is not w*(λ) = λ
        >>> caught[0].category.__name__, result.inner_residual
        ('UnsolvedInnerProblem', tensor(2.2361))
    """


class InaccurateHypergradient(HypergradientWarning):
    """A hypergradient with an estimated error above 10 % (too few steps), or above the rtol that `refine` aims at.

    Example:
        >>> import warnings
        >>> scale, lam = torch.tensor([1.0, 0.1]), torch.ones(2, requires_grad=True)
        >>> inner_loss = lambda w, lam: (scale * (w - lam) ** 2).sum() / 2
        >>> options = {"params": torch.ones(2), "hparams": lam, "solver": hg.solvers.CG(max_steps=1)}
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     result = hg.implicit.grad(lambda w, lam: (w**2).sum(), inner_loss=inner_loss, **options)
        >>> caught[0].category.__name__, result.solution.status.name
        ('InaccurateHypergradient', 'COMPLETED')
    """


class SolverError(ValueError):
    """A solve failed under on_failure="raise". The attribute `solution` holds the best result that was reached.

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, -1.0])), symmetric=True)
        >>> try:
        ...     _ = hg.solvers.CG(on_failure="raise")(op, torch.ones(2))
        ... except hg.SolverError as error:
        ...     print(error.solution.status.name)
        NOT_POSITIVE_DEFINITE
    """

    def __init__(self, message: str, solution: Solution):
        super().__init__(message)
        self.solution = solution


_shown: set[tuple[type[Warning], str, int]] = set()


def warn(text: str, kind: type[HypergradientWarning] = HypergradientWarning, section: str = "") -> None:
    """Warn at the line of the user's code that led here, also if torch's backward pass lies in between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARY_FOLDERS):
        level, frame = level + 1, frame.f_back
    place = (kind, frame.f_code.co_filename, frame.f_lineno)
    # Python's default filter would repeat a warning whose text has other numbers.
    if place in _shown and action_of(text, kind) not in ("always", "all", "error"):
        return
    _shown.add(place)
    warnings.warn(with_help(text, section or kind.__name__), kind, stacklevel=level)


def action_of(text: str, kind: type[Warning]) -> str:
    """The action of the first warnings filter that matches."""
    for action, message, category, _, _ in warnings.filters:
        if issubclass(kind, category) and (message is None or message.match(text)):
            return action
    return "default"


NOT_FINITE = (
    "the hypergradient holds NaN or infinity: a derivative with respect to hparams is not finite at this point (a root "
    "or a norm at 0, log(0), overflow in a loss or a step)"
)


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all entries are finite. It reads one sum from the device, and more only if that sum is not finite."""
    tensors = [torch.view_as_real(x.detach()) if x.is_complex() else x.detach() for x in tensors]
    sums = [full(x.sum()) for x in tensors]
    total = sums[0] if len(sums) == 1 else sum(s.float().to(sums[0].device) for s in sums)
    return math.isfinite(float(total)) or all(bool(full(torch.isfinite(x).all())) for x in tensors)


def warn_if_not_finite(grads: Iterable[Tensor]) -> None:
    if not finite(grads):
        warn(NOT_FINITE, NotFinite)


@dataclass(frozen=True)
class Solution:
    """A value and how it was reached.

    `status`, `ok` and `message` read from the device, once; access to the tensors does not.

    Attributes:
        value: the solution, in the structure of the right hand side (or of the start).
        code: Status values as an integer tensor: 0-d, or [B] for B independent systems.
        steps: iterations done: an int, or a tensor [B].
        residual_norm: ‖b − Ax‖₂, recomputed from the returned value, not the recursion's: 0-d, or [B].
        rhs_norm: ‖b‖₂: 0-d, or [B].
        trace: the method's own residual norm before each step and after the last: [steps + 1], or [steps + 1, B]; NaN
            where it was not computed. From fixed_points without trace=True: that of the worst system, [steps + 1].
        method: the solver's name; for solvers.Auto, the method that gave the value and why it was chosen.
        curvature: the least xᵀAx / xᵀx (without the solver's damping) that the method met, if it knows that (CG); from
            solvers.Auto after negative curvature, an estimate of the least eigenvalue from below: 0-d, or [B].

    Example:
        >>> op = hg.operators.matrix(torch.diag(torch.tensor([1.0, 4.0])), symmetric=True)
        >>> solution = hg.solvers.CG(rtol=1e-4)(op, torch.ones(2))
        >>> solution.value, solution.ok, solution.steps
        (tensor([1.0000, 0.2500]), True, 2)
        >>> solution.status.name, bool(solution.residual_norm <= 1e-4 * solution.rhs_norm)
        ('CONVERGED', True)
    """

    value: Any
    code: Tensor
    steps: int | Tensor
    residual_norm: Tensor
    rhs_norm: Tensor
    trace: Tensor
    method: str = ""
    curvature: Tensor | None = None

    def known(self, name: str) -> Any:
        """A field as a number (or a list of numbers, for a trace) if it is stored so or free to read; else a tensor."""
        value = vars(self)[name]
        return read(value) if isinstance(value, Tensor) else value

    @cached_property
    def statuses(self) -> list[Status]:
        """The status of each system."""
        return [Status(code) for code in numbers(self.code.reshape(-1))]

    @cached_property
    def status(self) -> Status:
        """The worst status of all systems."""
        code = self.known("code")  # for thousands of systems, a reduction is faster than a list
        return Status(code if not isinstance(code, Tensor) else numbers(code.amax()) if code.numel() else 0)

    @property
    def ok(self) -> bool:
        """Whether every system succeeded: CONVERGED, or COMPLETED where no tolerance was given."""
        return self.status.value <= Status.COMPLETED.value

    @property
    def relative_residual(self) -> Tensor:
        """‖b − Ax‖ / ‖b‖, and 0 where both are 0."""
        return (self.residual_norm / self.rhs_norm).where(self.residual_norm != 0, 0.0)

    @cached_property
    def stretch(self) -> Scalar:
        """‖x‖ / ‖b‖ of a value that is a Vector; a number where reading is free."""
        norm2, b = read(self.value.dot(self.value)), self.known("rhs_norm")
        exact = squares_are_exact(norm2, self.value.space) and anywhere(b)
        return square_root(norm2) / b if exact else norm(self.value / self.rhs_norm)

    @cached_property
    def remaining(self) -> list[tuple[float, float]]:
        """(θ, ρ) of each system; an empty list if all are 0, as in most calls.

        θ estimates ‖A⁻¹r‖ / ‖x‖, the relative size of what the iteration would still add to x at its present rate ρ.
        The steps sum to x and are assumed proportional to the residuals before them. These fall from ‖b‖ to ‖r_h‖, half
        way through the trace, by a factor of ρ₁ a step, and from there to ‖r‖ by a factor of ρ a step:

            θ = ‖r‖/(1 − ρ) / [(‖b‖ − ‖r_h‖)/(1 − ρ₁) + (‖r_h‖ − ‖r‖)/(1 − ρ)]

        If ρ₁ = ρ, or the residual does not fall, θ = ‖r‖ / (‖b‖ − ‖r‖). Residuals below ‖b‖ / 1000, at rounding level
        or not finite count as 0. If all are below ‖b‖ / 1000, the trace is not read from the device.
        """
        r, b, trace = map(self.known, ("residual_norm", "rhs_norm", "trace"))
        if not anywhere((r > 1e-3 * b) & (b > 0) & (r < math.inf)):
            return []
        if isinstance(r, Tensor):
            relative = numbers(self.relative_residual.nan_to_num(0.0, math.inf).reshape(-1))
            traces = numbers((self.trace / self.rhs_norm).reshape(len(self.trace), -1).T)
            stretches = numbers(self.stretch.reshape(-1))
        else:
            sizes = numbers(trace) if isinstance(trace, Tensor) else trace
            relative, traces, stretches = [r / b], [[size / b for size in sizes]], [self.stretch]
        rounding = 1000 * self.value.space.eps
        return [
            _remaining(q, trace) if max(1e-3, rounding * (1 + stretch)) < q < math.inf else (0.0, 0.0)
            for q, stretch, trace in zip(relative, stretches, traces, strict=True)
        ]

    @property
    def growth_rate(self) -> Tensor:
        """The factor by which a step multiplied the residual: the geometric mean over the last half of the steps."""
        sizes = numbers(self.trace.reshape(len(self.trace), -1).nanmean(1))
        known = [k for k, size in enumerate(sizes) if not math.isnan(size)] or [0]
        last, half = known[-1], known[(len(known) - 1) // 2]
        return (self.trace[last] / self.trace[half]) ** (1 / max(last - half, 1))

    @property
    def message(self) -> str:
        """What happened, with numbers, and what to try."""
        if not self.statuses:
            return "no system"
        bad = [i for i, status in enumerate(self.statuses) if status is self.status]
        where = f"{len(bad)} of {len(self.statuses)} systems, the first at index {bad[0]}: " if self.code.ndim else ""
        relative = float(self.relative_residual.reshape(-1)[bad[0]])
        steps = int(self.steps.reshape(-1)[bad[0]]) if isinstance(self.steps, Tensor) else self.steps
        text = f"{where}{self.status.name} after {steps} steps at a relative residual of {relative:.2e}"
        if self.status is Status.DIVERGED:
            rate = float(self.growth_rate.reshape(-1)[bad[0] if self.trace.ndim > 1 else 0])
            text += f", growing by a factor of {rate:.4g} a step" if rate > 1 else ""
        if self.status is Status.NOT_POSITIVE_DEFINITE and self.curvature is not None:
            curvature = float(self.curvature.reshape(-1)[bad[0]])
            text += f", where xᵀAx / xᵀx = {curvature:.3g}"
            text += f" (damping must be at least {-1.2 * curvature:.2g})" if curvature < 0 else ""
        return f"{text}: {self.status.message}"

    def report(self, what: str, on_failure: OnFailure) -> None:
        """Warn or raise if any system failed. "ignore" reads nothing from the device."""
        if on_failure == "ignore" or self.ok:
            return
        text = f"{what}: {self.message}"
        if on_failure == "raise":
            raise SolverError(with_help(text, self.status.name), self)
        warn(text, NotConverged, section=self.status.name)


def _lazy_tensor(name: str) -> property:
    """A field of a Solution that may be stored as numbers: they become a tensor at the first access."""

    def get(solution: Solution) -> Any:
        value = vars(solution)[name]
        if value is not None and not isinstance(value, Tensor):
            value = solution.value.space.tensor(value)
            vars(solution)[name] = value = value.long() if name == "code" else value
        return value

    return property(get, lambda solution, value: vars(solution).update({name: value}))


for _name in ("code", "residual_norm", "rhs_norm", "trace", "curvature"):
    setattr(Solution, _name, _lazy_tensor(_name))


def _remaining(q: float, trace: list[float]) -> tuple[float, float]:
    """(θ, ρ) of one system, from its last residual norm q and its trace, both in units of ‖b‖."""
    known = [(k, size) for k, size in enumerate(trace) if math.isfinite(size) and size > 0]
    if len(known) < 2:
        known = [(0, 1.0), (1, q)]
    if known[0][1] < 0.99:  # the trace begins after a first step
        known = [(known[0][0] - 1, 1.0), *known]
    (begin, first), (half, middle), (last, _) = known[0], known[(len(known) - 1) // 2], known[-1]
    rate = (q / middle) ** (1 / (last - half))
    if not (q < 1 and rate < 1):
        return (q / (1 - q) if q < 1 else math.inf), 1.0
    early = (middle / first) ** (1 / (half - begin)) if half > begin else rate
    head = (1 - middle) / (1 - early) if early < 1 and middle <= 1 else half - begin
    return q / (1 - rate) / (head + (middle - q) / (1 - rate)), rate


def warn_of_few_steps(what: str, solution: Solution, error: float, rate: float) -> None:
    """Warn of an estimated relative error above a tenth. rate: the factor by which a step changes the residual."""
    if not error > INACCURATE:
        return
    steps = int(solution.steps.max()) if isinstance(solution.steps, Tensor) else solution.steps
    text = (
        f"{what} is off by an estimated {error:.0%}: {solution.method} left a relative residual of "
        f"{float(solution.relative_residual.max()):.1e} after {steps} steps"
    )
    if 0 < rate < 1 and error < math.inf:
        needed = steps + math.ceil(math.log(INACCURATE / error) / math.log(rate))
        text += (
            f", which falls by a factor of {rate:.6g} a step: about {needed} steps (K, max_steps) would bring the "
            f"error to {INACCURATE:.0%}, fewer with a solver that converges faster"
        )
    else:
        text += ", which does not fall; take another solver"
    warn(text, InaccurateHypergradient)


def inner_distance(residual: Tensor, solution: Solution, point: Vector, fixed_point: bool = False) -> Tensor:
    """‖F‖ ‖v‖ / (‖b‖ ‖w‖) for the adjoint v: an estimate of the relative distance of w from the inner solution."""
    f, b, r, size = read(residual), solution.known("rhs_norm"), solution.known("residual_norm"), norm(point)
    if fixed_point:  # w − Φ(w) is known up to its rounding
        f = f + point.space.eps / 2 * size
    known = (f != 0) & (b != 0) & (r < math.inf)
    return solution.value.space.tensor(ratio(f * solution.stretch, size, known))


def warn_if_unsolved(worst: float, residual: Tensor) -> None:
    """Warn of an estimated relative distance from the inner solution above a tenth."""
    if worst > UNSOLVED:
        away = f"an estimated {worst:.1%} (of their norm) or more away from" if math.isfinite(worst) else "0, not"
        warn(
            f"the inner problem is not solved: its residual is {float(residual.max()):.2e}, and params are {away} the "
            f"solution, so the hypergradient means little. Run the inner solver longer (in a wider dtype where "
            f"rounding ends it), or differentiate its steps instead (unroll.reverse); hg.diagnostics.check estimates "
            f"the error",
            UnsolvedInnerProblem,
        )


def at_kink(point: Vector, slope: Vector) -> Tensor | None:
    """‖∇₁g‖ over the entries where w is exactly 0 (0 if w = 0); None if it is free to see that there are none."""
    space = point.space
    if space.device.type in FREE_TO_READ and all(space.plain) and all(bool(w.all()) for w in point.chunks):
        return None
    pairs = zip(point.chunks, slope.chunks, strict=True)
    return Vector(space, [torch.where(w == 0, g, 0.0) for w, g in pairs]).norm() * (point.norm() != 0)


def warned_of_kink(at_kink: Tensor | None, residual: Tensor, distance: Tensor, eps: float) -> bool:
    """Warn if ∇₁g vanishes except where params are exactly 0, as it does for an L1 term; return whether it warned."""
    found = at_kink is not None and anywhere((read(at_kink) > KINK * read(residual)) & (read(distance) > eps**0.5))
    if found:
        warn(
            "the gradient of inner_loss vanishes everywhere but where params are exactly 0: inner_loss has a kink "
            "there (such as an L1 term), so its Hessian is not the derivative of its solution. Pass the proximal step "
            "as fp_map (diff_optimizers.ProximalGradient), whose hypergradient is right",
            UnsolvedInnerProblem,
        )
    return found
