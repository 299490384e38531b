"""HyperTorch's interface: an optimiser object is a fixed point map, `optimizer(params, hparams)` gives new params."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _autodiff
from .._autodiff import as_scalar
from .._random import random_state_kept_on_error
from .._solution import warn

Params: TypeAlias = "list[Tensor]"
Coefficient: TypeAlias = "float | Tensor | Callable[[Any], float | Tensor]"


def _gradient(loss: Tensor, params: Params, create_graph: bool) -> Params:
    as_scalar(loss, "the inner loss")
    message = "the inner loss does not depend on params; was it computed under no_grad, or from other tensors?"
    return _autodiff.grad([loss], params, create_graph=create_graph, must_reach=message)


def gd_step(params: Params, loss: Tensor, step_size: float | Tensor, create_graph: bool = True) -> Params:
    """Gradient descent, w ← w − η ∇g.

    Args:
        params: w, a list of tensors that loss was computed from.
        loss: g(w), scalar.
        step_size: η.
        create_graph: whether the result can be differentiated (through the gradient as well).

    Returns: the new w, a list like params.
    Raises: ValueError where loss is no scalar or does not depend on params.
    Cost: one reverse pass.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gd_step([w], (w**2).sum() / 2, 0.1)[0].detach()
        tensor([0.9000, 1.8000])
    """
    return [w - step_size * g for w, g in zip(params, _gradient(loss, params, create_graph), strict=True)]


def heavy_ball_step(
    params: Params,
    aux_params: Params,
    loss: Tensor,
    step_size: float | Tensor,
    momentum: float | Tensor,
    create_graph: bool = True,
) -> tuple[Params, Params]:
    """Heavy ball, w₊ ← w − η ∇g(w) + μ (w − w₋).

    Args:
        params, loss, step_size, create_graph: as in `gd_step`.
        aux_params: w₋, the params before.
        momentum: μ.

    Returns: (w₊, w).
    Source: Polyak 1964.
    """
    grads = _gradient(loss, params, create_graph)
    new = [w - step_size * g + momentum * (w - v) for g, w, v in zip(grads, params, aux_params, strict=True)]
    return new, params


def torch_momentum_step(
    params: Params,
    aux_params: Params,
    loss: Tensor,
    step_size: float | Tensor,
    momentum: float | Tensor,
    create_graph: bool = True,
) -> tuple[Params, Params]:
    """Momentum as torch.optim.SGD has it, v₊ ← μ v + ∇g(w), w₊ ← w − η v₊.

    Args:
        params, loss, step_size, create_graph: as in `gd_step`.
        aux_params: v, zeros at the start.
        momentum: μ.

    Returns: (w₊, v₊).
    """
    grads = _gradient(loss, params, create_graph)
    buffers = [momentum * v + g for v, g in zip(aux_params, grads, strict=True)]
    return [w - step_size * v for w, v in zip(params, buffers, strict=True)], buffers


class DifferentiableOptimizer:
    """One optimiser step on loss_f as a map of (params, hparams), differentiable in both.

    Args:
        loss_f: (params, hparams) ↦ scalar, or (params, hparams, data) where data_or_iter is given.
        dim_mult: how many times as many tensors the state has as the params: 1, or 2 with momentum.
        data_or_iter: data for every step, or an iterator that gives each step its own.

    Attributes:
        curr_loss: the loss at the params of the last call.
    """

    def __init__(self, loss_f: Callable[..., Tensor], dim_mult: int, data_or_iter: Any = None):
        self.loss_f = loss_f
        self.dim_mult = dim_mult
        self.data_iterator: Iterator[Any] | None = None
        if data_or_iter is not None:
            self.data_iterator = data_or_iter if hasattr(data_or_iter, "__next__") else repeat(data_or_iter)
        self.curr_loss: Tensor | None = None

    def get_opt_params(self, params: Any) -> Params:
        """The optimiser's whole state at the start: params, then a zero like each for each buffer."""
        params = list(params)
        return params + [torch.zeros_like(p) for p in params for _ in range(self.dim_mult - 1)]

    def step(self, params: Params, hparams: Any, create_graph: bool) -> Params:
        """The new state; defined by each optimiser."""
        raise NotImplementedError(f"{type(self).__name__} defines no step")

    def __call__(self, params: Any, hparams: Any, create_graph: bool = True) -> Params:
        """The state after one step, with a graph back to params and hparams if create_graph.

        Raises: ValueError for a state of another length than get_opt_params gives (a multiple of dim_mult).
        Warns: HypergradientWarning where hparams is an iterator (model.parameters()): it is empty at the second use.
        """
        params = list(params)
        if len(params) % self.dim_mult:
            raise ValueError(
                f"{len(params)} tensors are no multiple of {self.dim_mult}: start from get_opt_params(params)"
            )
        if isinstance(hparams, Iterator):
            warn("hparams is an iterator, which is empty after its first use; pass list(...)")
        with random_state_kept_on_error(params), torch.enable_grad():
            needing = [w if w.requires_grad else w.detach().requires_grad_() for w in params]
            return self.step(needing, hparams, create_graph)

    def get_loss(self, params: Params, hparams: Any) -> Tensor:
        """loss_f at params, with the next data if there are any; kept as curr_loss."""
        data = () if self.data_iterator is None else (next(self.data_iterator),)
        self.curr_loss = self.loss_f(params, hparams, *data)
        return self.curr_loss


def _coefficient(value: Coefficient) -> Callable[[Any], float | Tensor]:
    return value if callable(value) else lambda hparams: value


class GradientDescent(DifferentiableOptimizer):
    """Gradient descent, see `gd_step`.

    Args:
        loss_f, data_or_iter: see DifferentiableOptimizer.
        step_size: η, or a callable of hparams.
    """

    def __init__(self, loss_f: Callable[..., Tensor], step_size: Coefficient, data_or_iter: Any = None):
        super().__init__(loss_f, dim_mult=1, data_or_iter=data_or_iter)
        self.step_size_f = _coefficient(step_size)

    def step(self, params: Params, hparams: Any, create_graph: bool) -> Params:
        loss = self.get_loss(params, hparams)
        return gd_step(params, loss, self.step_size_f(hparams), create_graph)


class _WithBuffer(DifferentiableOptimizer):
    """Momentum methods, whose state is params and one more tensor for each."""

    def __init__(
        self, loss_f: Callable[..., Tensor], step_size: Coefficient, momentum: Coefficient, data_or_iter: Any = None
    ):
        super().__init__(loss_f, dim_mult=2, data_or_iter=data_or_iter)
        self.step_size_f = _coefficient(step_size)
        self.momentum_f = _coefficient(momentum)

    def _advance(self, rule: Callable[..., tuple[Params, Params]], state: Params, hparams: Any, graph: bool) -> Params:
        half = len(state) // 2
        params, aux = state[:half], state[half:]
        loss = self.get_loss(params, hparams)
        new, new_aux = rule(params, aux, loss, self.step_size_f(hparams), self.momentum_f(hparams), graph)
        return [*new, *new_aux]


class HeavyBall(_WithBuffer):
    """Heavy ball, see `heavy_ball_step`. As in HyperTorch the state starts from w₋ = 0 (get_opt_params).

    Args:
        loss_f, data_or_iter: see DifferentiableOptimizer.
        step_size, momentum: η and μ, or callables of hparams.
    """

    def step(self, params: Params, hparams: Any, create_graph: bool) -> Params:
        return self._advance(heavy_ball_step, params, hparams, create_graph)


class Momentum(_WithBuffer):
    """Momentum as torch.optim.SGD has it, see `torch_momentum_step`.

    Args:
        loss_f, data_or_iter: see DifferentiableOptimizer.
        step_size, momentum: η and μ, or callables of hparams.
    """

    def step(self, params: Params, hparams: Any, create_graph: bool) -> Params:
        return self._advance(torch_momentum_step, params, hparams, create_graph)
