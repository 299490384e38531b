"""The differentiable twin of a live torch.optim optimizer."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import has_step_hooks
from ._rule import PerLeaf, Rule, State, is_zero
from ._rules import SGD, Adadelta, Adagrad, Adam, Adamax, RAdam, RMSprop

RULES: tuple[type[Rule], ...] = (SGD, Adam, RMSprop, Adagrad, Adadelta, Adamax, RAdam)
TWINS: dict[type, type[Rule]] = {getattr(torch.optim, rule.__name__): rule for rule in RULES}
TWINS[torch.optim.AdamW] = Adam
FLAGS = ("maximize", "nesterov", "amsgrad", "centered", "decoupled_weight_decay")


class Twin(NamedTuple):
    """The result of `from_torch`: the rule, copies of the params in the order of the param groups, and the state.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> twin = hg.diff_optimizers.from_torch(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> new, state = twin.rule.update(twin.params, twin.state, [torch.ones(1, 1)])
        >>> new[0].detach(), model.weight.data  # the live model is unchanged
        (tensor([[0.9000]]), tensor([[1.]]))
    """

    rule: Rule
    params: list[Tensor]
    state: State


def from_torch(optimizer: torch.optim.Optimizer) -> Twin:
    """The rule, params and state that continue a live optimizer differentiably, also in the middle of training.

    Options that differ between param groups become `PerLeaf`. To learn an option, replace it in the rule:
    `dataclasses.replace(rule, lr=...)`. A tensor lr or betas keeps its graph. `foreach`, `fused` and
    `capturable` do not change the mathematics and are ignored. Parameters with requires_grad=False are `frozen` in the
    rule. Later steps of the optimizer do not change the copies.

    Args:
        optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax or RAdam, of torch.optim itself.

    Returns:
        Twin(rule, params, state). SGD does not count its steps: state["step"] is 1 if it has made any.

    Raises:
        TypeError: the optimizer is of another class.
        ValueError: it has `differentiable=True`, step hooks, complex parameters, sparse gradients, or flags that
            differ between groups.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> rule, params, state = from_torch(torch.optim.SGD([w], lr=0.1))
        >>> rule.update(params, state, [w])[0][0].detach()
        tensor([0.9000, 1.8000])
    """
    name = type(optimizer).__name__
    if type(optimizer) not in TWINS:
        known = ", ".join(kind.__name__ for kind in TWINS)
        raise TypeError(f"from_torch supports {known} of torch.optim, but not their subclasses; got {name}")
    if has_step_hooks(optimizer):
        raise ValueError(f"{name} has step hooks, which a rule cannot call")
    groups = optimizer.param_groups
    if any(group.get("differentiable") for group in groups):
        raise ValueError(f"{name} has differentiable=True, so its state already carries a graph: make it without")
    leaves = [p for group in groups for p in group["params"]]
    for i, p in enumerate(leaves):
        if p.is_complex():
            raise ValueError(f"parameter {i} of {name} is complex: optimise torch.view_as_real of it")
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError(f"parameter {i} of {name} has a sparse gradient, which torch updates by another rule")
    frozen = tuple(i for i, p in enumerate(leaves) if not p.requires_grad)
    rule = TWINS[type(optimizer)](frozen=frozen, **_options(optimizer, TWINS[type(optimizer)]))
    params = [p.detach().clone().requires_grad_(p.requires_grad) for p in leaves]
    return Twin(rule, params, _state(optimizer, rule, leaves))


def _options(optimizer: torch.optim.Optimizer, kind: type[Rule]) -> dict[str, Any]:
    groups, name = optimizer.param_groups, type(optimizer).__name__
    options: dict[str, Any] = {}
    for field in fields(kind):
        key = field.name
        # Before 2.7 the groups of Adam and AdamW did not say whether the decay is decoupled.
        absent = field.default if key != "decoupled_weight_decay" else isinstance(optimizer, torch.optim.AdamW)
        values = [group.get(key, absent) for group in groups]
        if key == "initial_accumulator_value":
            options[key] = optimizer.defaults[key]
        elif key == "betas":
            options[key] = tuple(_shared(groups, [betas[i] for betas in values]) for i in range(2))
        elif key in FLAGS:
            if len({bool(value) for value in values}) > 1:
                raise ValueError(f"{name}: {key} differs between param groups; make one optimizer for each")
            options[key] = bool(values[0])
        elif key != "frozen":
            options[key] = _shared(groups, values)
    if kind is SGD:  # torch ignores the dampening of a group without momentum
        damped = [0.0 if is_zero(group["momentum"]) else group["dampening"] for group in groups]
        options["dampening"] = _shared(groups, damped)
    return options


def _shared(groups: list[dict[str, Any]], values: list[Any]) -> Any:
    """The value that all groups share, or PerLeaf values if groups differ."""
    values = [value.reshape(()) if isinstance(value, Tensor) else value for value in values]
    if all(value is values[0] or (not isinstance(value, Tensor) and value == values[0]) for value in values):
        return values[0]
    return PerLeaf([value for group, value in zip(groups, values, strict=True) for _ in group["params"]])


def _state(optimizer: torch.optim.Optimizer, rule: Rule, leaves: list[Tensor]) -> State:
    state = rule.init([p.detach() for p in leaves])
    held = [optimizer.state.get(p, {}) for p in leaves]
    taken = [float(s["step"]) if "step" in s else float(s.get("momentum_buffer") is not None) for s in held]
    state["step"] = torch.full_like(state["step"], max(taken, default=0.0))
    if "missed" in state:
        state["missed"] = max(taken) - torch.tensor(taken, dtype=state["step"].dtype, device="cpu")
    for name in state.keys() - {"step", "missed"}:
        state[name] = [
            start if s.get(name) is None else s[name].detach().clone().to(start.dtype)
            for s, start in zip(held, state[name], strict=True)
        ]
    return state
