"""HyperTorch's interface: an optimiser object is a fixed point map, `optimizer(params, hparams)` gives new params."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from .. import _autodiff, _torch
from .._autodiff import as_scalar
from .._solution import warn
from .._torch import random_state_kept_on_error
from .._tree import flatten

Params: TypeAlias = Any  # a list of tensors, or of lists of them
Number: TypeAlias = "float | Tensor"
Coefficient: TypeAlias = "Number | Callable[[Any], Number]"


def _gradient(params: Params, loss: Tensor, create_graph: bool) -> tuple[Params, Params]:
    """params as a list, and ∇g in the same structure. Hooks of params act on ∇g, as in training."""
    as_scalar(loss, "the inner loss")
    params = list(params)
    leaves, _, rebuild = flatten(params, "params")
    grads = _autodiff.grad([loss], leaves, create_graph=create_graph, must_reach=_autodiff.UNREACHED)
    return params, rebuild(grads)


def gd_step(params: Params, loss: Tensor, step_size: Number, create_graph: bool = True) -> Params:
    """Gradient descent, w ← w − η ∇g.

    Args:
        params: w, a list of tensors (or of lists of them) that loss was computed from.
        loss: g(w), scalar.
        step_size: η.
        create_graph: whether ∇g gets a graph, so that the result can be differentiated through it too.

    Returns: the new w, a list like params.
    Raises: ValueError if loss is not a scalar or does not depend on params.
    Cost: one reverse pass.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gd_step([w], (w**2).sum() / 2, 0.1)[0].detach()
        tensor([0.9000, 1.8000])
    """
    params, grads = _gradient(params, loss, create_graph)
    return optree.tree_map(lambda w, g: w - step_size * g, params, grads)


def heavy_ball_step(
    params: Params, aux_params: Params, loss: Tensor, step_size: Number, momentum: Number, create_graph: bool = True
) -> tuple[Params, Params]:
    """Heavy ball (Polyak 1964), w₊ ← w − η ∇g(w) + μ (w − w₋), where aux_params is w₋.

    Returns (w₊, w); otherwise as `gd_step`.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> params, last = hg.heavy_ball_step([w], [torch.zeros(1)], (w**2).sum() / 2, 0.5, 0.9)
        >>> params[0].detach(), last[0].detach()
        (tensor([1.4000]), tensor([1.]))
    """
    params, grads = _gradient(params, loss, create_graph)
    aux: Params = list(aux_params)
    new = optree.tree_map(lambda w, v, g: w - step_size * g + momentum * (w - v), params, aux, grads)
    return new, params


def torch_momentum_step(
    params: Params, aux_params: Params, loss: Tensor, step_size: Number, momentum: Number, create_graph: bool = True
) -> tuple[Params, Params]:
    """Momentum of torch.optim.SGD, v₊ ← μ v + ∇g(w), w₊ ← w − η v₊, where aux_params is v, zeros at the start.

    Returns (w₊, v₊); otherwise as `gd_step`.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> params, velocity = hg.torch_momentum_step([w], [torch.zeros(1)], (w**2).sum() / 2, 0.5, 0.9)
        >>> params[0].detach(), velocity[0].detach()
        (tensor([0.5000]), tensor([1.]))
    """
    params, grads = _gradient(params, loss, create_graph)
    aux: Params = list(aux_params)
    buffers = optree.tree_map(lambda v, g: momentum * v + g, aux, grads)
    return optree.tree_map(lambda w, v: w - step_size * v, params, buffers), buffers


class DifferentiableOptimizer:
    """One optimiser step on loss_f as a map of (params, hparams), differentiable in both.

    Args:
        loss_f: (params, hparams) ↦ scalar, or (params, hparams, data) ↦ scalar if data_or_iter is given.
        dim_mult: the number of tensors in the state for each tensor of params: 1, or 2 with momentum.
        data_or_iter: the data of all steps, or an iterator over the data of each step.

    Attributes:
        curr_loss: the loss at the params of the last call.

    Example:
        >>> loss = lambda params, hparams: (hparams[0] * params[0] ** 2).sum() / 2
        >>> class Descent(hg.DifferentiableOptimizer):
        ...     def step(self, params, hparams, create_graph):
        ...         gradients = torch.autograd.grad(self.get_loss(params, hparams), params, create_graph=create_graph)
        ...         return [w - 0.1 * g for w, g in zip(params, gradients)]
        >>> w, lam = torch.ones(1), torch.ones(1, requires_grad=True)
        >>> torch.autograd.grad(Descent(loss, dim_mult=1)([w], [lam]), lam)  # w ← w − λw/10
        (tensor([-0.1000]),)
    """

    def __init__(self, loss_f: Callable[..., Tensor], dim_mult: int, data_or_iter: Any = None):
        self.loss_f = loss_f
        self.dim_mult = dim_mult
        self.data_iterator: Iterator[Any] | None = None
        if data_or_iter is not None:
            self.data_iterator = data_or_iter if hasattr(data_or_iter, "__next__") else repeat(data_or_iter)
        self.curr_loss: Tensor | None = None

    def get_opt_params(self, params: Any) -> Params:
        """The optimiser's whole state at the start: params, followed by the buffers, which are zeros like params."""
        params = list(params)
        return params + [optree.tree_map(torch.zeros_like, p) for p in params for _ in range(self.dim_mult - 1)]

    def step(self, params: Params, hparams: Any, create_graph: bool) -> Params:
        """The new state; defined by each optimiser."""
        raise NotImplementedError(f"{type(self).__name__} defines no step")

    def __call__(self, params: Any, hparams: Any, create_graph: bool = True) -> Params:
        """The state after one step, with a graph back to params and hparams if create_graph."""
        params = list(params)
        if len(params) % self.dim_mult:
            raise ValueError(
                f"{len(params)} tensors are not a multiple of {self.dim_mult}: start from get_opt_params(params)"
            )
        if isinstance(hparams, Iterator):
            warn("hparams is an iterator, which is empty after its first use; pass list(...)")
        leaves, _, rebuild = flatten(params, "params")
        with random_state_kept_on_error(leaves), torch.enable_grad():
            needing = [w if w.requires_grad else w.detach().requires_grad_() for w in leaves]
            return self.step(rebuild(needing), hparams, create_graph)

    def get_loss(self, params: Params, hparams: Any) -> Tensor:
        """loss_f at params, with the next data if there are any; stored as curr_loss."""
        data = () if self.data_iterator is None else (next(self.data_iterator),)
        with _torch.correct_derivatives():
            self.curr_loss = self.loss_f(params, hparams, *data)
        return self.curr_loss


class GradientDescent(DifferentiableOptimizer):
    """Gradient descent, see `gd_step`; step_size is η, or a callable of hparams.

    Example:
        >>> loss = lambda params, hparams: ((params[0] - hparams[0]) ** 2).sum() / 2
        >>> step = hg.GradientDescent(loss, step_size=0.5)
        >>> w, lam = torch.ones(1), torch.zeros(1, requires_grad=True)
        >>> step([w], [lam])[0].detach(), step.curr_loss.detach()
        (tensor([0.5000]), tensor(0.5000))
    """

    def __init__(self, loss_f: Callable[..., Tensor], step_size: Coefficient, data_or_iter: Any = None):
        super().__init__(loss_f, dim_mult=1, data_or_iter=data_or_iter)
        self.step_size_f = step_size if callable(step_size) else lambda hparams: step_size

    def step(self, params: Params, hparams: Any, create_graph: bool) -> Params:
        return gd_step(params, self.get_loss(params, hparams), self.step_size_f(hparams), create_graph)


class _WithBuffer(DifferentiableOptimizer):
    """Optimisers with one buffer for each param. step_size is η and momentum μ, or callables of hparams."""

    rule: Any

    def __init__(
        self, loss_f: Callable[..., Tensor], step_size: Coefficient, momentum: Coefficient, data_or_iter: Any = None
    ):
        super().__init__(loss_f, dim_mult=2, data_or_iter=data_or_iter)
        self.step_size_f = step_size if callable(step_size) else lambda hparams: step_size
        self.momentum_f = momentum if callable(momentum) else lambda hparams: momentum

    def step(self, params: Params, hparams: Any, create_graph: bool) -> Params:
        half = len(params) // 2
        params, aux = params[:half], params[half:]
        loss = self.get_loss(params, hparams)
        new, new_aux = self.rule(params, aux, loss, self.step_size_f(hparams), self.momentum_f(hparams), create_graph)
        return [*new, *new_aux]


class HeavyBall(_WithBuffer):
    """Heavy ball, see `heavy_ball_step`. As in HyperTorch the state starts from w₋ = 0 (get_opt_params).

    Example:
        >>> loss = lambda params, hparams: ((params[0] - hparams[0]) ** 2).sum() / 2
        >>> step = hg.HeavyBall(loss, step_size=0.5, momentum=0.9)
        >>> state = step.get_opt_params([torch.ones(1)])  # w and w₋
        >>> [x.detach() for x in step(state, [torch.zeros(1)])]
        [tensor([1.4000]), tensor([1.])]
    """

    rule = staticmethod(heavy_ball_step)


class Momentum(_WithBuffer):
    """Momentum as in torch.optim.SGD, see `torch_momentum_step`.

    Example:
        >>> loss = lambda params, hparams: ((params[0] - hparams[0]) ** 2).sum() / 2
        >>> step = hg.Momentum(loss, step_size=lambda hparams: hparams[1], momentum=0.9)
        >>> state, lam = step.get_opt_params([torch.ones(1)]), [torch.zeros(1), torch.tensor(0.5)]
        >>> for _ in range(2):
        ...     state = step(state, lam)
        >>> [x.detach() for x in state]  # w and its velocity
        [tensor([-0.2000]), tensor([1.4000])]
    """

    rule = staticmethod(torch_momentum_step)
