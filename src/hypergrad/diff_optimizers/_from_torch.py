"""The differentiable twin of a live torch.optim optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._rule import PerLeaf, Rule, State, is_zero
from ._rules import SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop

# Each rule's fields and buffers have torch.optim's own names.
TWINS: dict[type[torch.optim.Optimizer], type[Rule]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adagrad: Adagrad,
    torch.optim.Adadelta: Adadelta,
    torch.optim.Adamax: Adamax,
    torch.optim.NAdam: NAdam,
    torch.optim.RAdam: RAdam,
}
FLAGS = ("maximize", "nesterov", "amsgrad", "centered", "decoupled_weight_decay")


class Twin(NamedTuple):
    """What `from_torch` gives: the rule, copies of the params in the order of the param groups, and the state."""

    rule: Rule
    params: list[Tensor]
    state: State


def from_torch(optimizer: torch.optim.Optimizer) -> Twin:
    """The rule, params and state with which a live optimizer can be gone on with differentiably, also mid-training.

    Options that differ between param groups become `PerLeaf`. To learn one, put it in the rule's place:
    `dataclasses.replace(rule, lr=...)`. A tensor lr or betas is taken as it is, with its graph. `foreach`, `fused` and
    `capturable` do not change the mathematics and are ignored. Later steps of the optimizer do not touch the copies.

    Args:
        optimizer: SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam or RAdam, of torch.optim itself.

    Returns:
        Twin(rule, params, state). SGD keeps no count of its steps: state["step"] is 1 where it has stepped.

    Raises:
        TypeError, ValueError: another class; `differentiable=True`, hooks, complex parameters, sparse gradients, flags
            that differ between groups, parameters that have taken different numbers of steps.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> rule, params, state = from_torch(torch.optim.SGD([w], lr=0.1))
        >>> rule.update(params, state, [w])[0][0].detach()
        tensor([0.9000, 1.8000])
    """
    name = type(optimizer).__name__
    if type(optimizer) not in TWINS:
        known = ", ".join(kind.__name__ for kind in TWINS)
        raise TypeError(f"from_torch knows {known} of torch.optim, and no subclass of them; got {name}")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(f"{name} has step hooks, which a rule cannot know")
    groups = optimizer.param_groups
    if any(group["differentiable"] for group in groups):
        raise ValueError(f"{name} has differentiable=True: its state has a graph of its own; make it without")
    leaves = [p for group in groups for p in group["params"]]
    for i, p in enumerate(leaves):
        if p.is_complex() or (p.grad is not None and p.grad.is_sparse):
            raise ValueError(f"parameter {i} of {name} is complex or has a sparse gradient, which no rule covers")
    rule = TWINS[type(optimizer)](**_options(optimizer, TWINS[type(optimizer)]))
    params = [p.detach().clone().requires_grad_(p.requires_grad) for p in leaves]
    return Twin(rule, params, _state(optimizer, rule, leaves))


def _options(optimizer: torch.optim.Optimizer, kind: type[Rule]) -> dict[str, Any]:
    groups, name = optimizer.param_groups, type(optimizer).__name__
    options: dict[str, Any] = {}
    for key in kind.__dataclass_fields__:
        if key.startswith("_"):
            continue
        if key == "initial_accumulator_value":
            options[key] = optimizer.defaults[key]
        elif key == "betas":
            options[key] = tuple(_shared(groups, [group[key][i] for group in groups]) for i in range(2))
        elif key in FLAGS:
            values = {bool(group[key]) for group in groups}
            if len(values) > 1:
                raise ValueError(f"{name}: {key} differs between param groups; make one optimizer for each")
            options[key] = values.pop()
        else:
            options[key] = _shared(groups, [group[key] for group in groups])
    if kind is SGD:  # torch ignores the dampening where there is no momentum
        damped = [0.0 if is_zero(group["momentum"]) else group["dampening"] for group in groups]
        options["dampening"] = _shared(groups, damped)
    return options


def _shared(groups: list[dict[str, Any]], values: list[Any]) -> Any:
    """The value that all groups have, or one for each leaf."""
    values = [value.reshape(()) if isinstance(value, Tensor) else value for value in values]
    if all(value is values[0] or (not isinstance(value, Tensor) and value == values[0]) for value in values):
        return values[0]
    return PerLeaf([value for group, value in zip(groups, values, strict=True) for _ in group["params"]])


def _state(optimizer: torch.optim.Optimizer, rule: Rule, leaves: list[Tensor]) -> State:
    state = rule.init([p.detach() for p in leaves])
    held = [optimizer.state.get(p, {}) for p in leaves]
    steps = {float(s["step"]) if "step" in s else float(s.get("momentum_buffer") is not None) for s in held}
    if isinstance(rule, SGD):
        moving = [g["momentum"] for g in optimizer.param_groups for _ in g["params"]]
        steps = {float(s.get("momentum_buffer") is not None) for s, mu in zip(held, moving, strict=True) if mu} or {0.0}
    if len(steps) > 1:
        counts = sorted(int(n) for n in steps)
        raise ValueError(f"parameters of {type(optimizer).__name__} have taken different numbers of steps: {counts}")
    state["step"] = torch.full_like(state["step"], steps.pop())
    for name in state.keys() - {"step"}:
        state[name] = [
            start if s.get(name) is None else s[name].detach().clone().to(start.dtype)
            for s, start in zip(held, state[name], strict=True)
        ]
    return state
