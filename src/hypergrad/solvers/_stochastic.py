"""First-order methods for the linear system, for noisy products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._vector import Vector
from ._solver import IterativeSolver, Outcome, System


def gradient_descent(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


@dataclass(frozen=True, kw_only=True)
class Optimizer(IterativeSolver):
    """Solves the linear system with any torch.optim optimizer, which is given A x − b as the gradient.

    With a stochastic A every step uses a new draw, and a decreasing learning rate averages them. x starts at x0, or b.

    Args:
        build: list of tensors ↦ optimizer, or (optimizer, scheduler); the scheduler steps after each step. The tensors
            are the leaves of x. Learning rates are in the units of the user's problem. Default: SGD(lr=1), which for
            A = I − Jᵀ is FixedPoint.

    Cost: one product for each evaluation of the closure (one a step, for LBFGS more); the optimizer's state.
    Source: Grazzi, Pontil and Salzo 2021, Algorithm 1 (step 2).

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), positive_definite=True)
        >>> descent = hg.solvers.Optimizer(build=lambda x: torch.optim.SGD(x, lr=0.2), max_steps=100)
        >>> descent(op, torch.tensor([1.0, 2.0])).value.round(decimals=3)
        tensor([0.0910, 0.6360])
    """

    build: Callable[[list[Tensor]], Any] = gradient_descent

    def _iterate(self, system: System) -> Outcome:
        start = system.b if system.x0 is None else system.x0
        b, space = system.b * system.scale, start.space
        parameters = [leaf.clone().requires_grad_() for leaf in (start * system.scale).leaves]
        built = self.build(parameters)
        optimizer, scheduler = built if isinstance(built, tuple) else (built, None)
        going, trace, steps = system.b.norm() > system.stop, [], 0

        def current() -> Vector:
            return space.pack([p.detach() for p in parameters])

        def closure() -> Tensor:
            with torch.no_grad():
                x = current()
                gradient = system.op(x) - b
                if len(trace) == steps:  # the first call of this step
                    trace.append((gradient / system.scale).norm())
                for p, g in zip(parameters, gradient.leaves, strict=True):
                    p.grad = g
                return 0.5 * x.dot(gradient - b).sum()

        while steps < system.max_steps and not system.finished(steps, going):
            optimizer.step(closure)
            if scheduler is not None:
                scheduler.step()
            going = trace[-1] > system.stop
            steps += 1
        norms = torch.stack(trace) if trace else system.b.norm().unsqueeze(0)[:0]
        return Outcome(current() / system.scale, norms, steps)
