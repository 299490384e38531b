"""Products with ∂₁Fᵀ through torch.compile: one compiled backward pass of ∇₁g (or Φ, F), called again and again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor

from . import _autodiff
from ._solution import HypergradientWarning, warn
from ._vector import PyTree, flatten


class NotCompiled(HypergradientWarning):
    """Products were to be compiled and could not be; the usual ones took their place."""


def _value(function: Callable[..., Any], params: PyTree, hparams: PyTree) -> PyTree:
    return function(params, hparams)


def pull(
    function: Callable[..., Any], kind: str, params: PyTree, hparams: PyTree, leaves: Sequence[Tensor], backend: str
) -> Callable[[Sequence[Tensor]], list[Tensor]] | None:
    """v ↦ ∂₁Fᵀv by a compiled backward pass at this point; None, with a warning that says why, where torch cannot.

    torch keeps what it compiled by the code of the function: later calls, of new closures too, compile nothing.

    Args:
        function: g, Φ or F of (params, hparams), with kind "inner_loss" for g.
        leaves: those of params, which require grad; hparams must not.
        backend: of torch.compile.
    """
    derivative = _autodiff.gradient if kind == "inner_loss" else _value

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        with _kept():
            return _autodiff.grad(outputs, leaves, v, retain_graph=True)

    try:
        with _kept(), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's own parts
            compiled = torch.compile(derivative, backend=backend, fullgraph=True)
            outputs = flatten(compiled(function, params, hparams), kind)[0]
            product([torch.zeros_like(y) for y in outputs])
    except Exception as error:  # whatever a compiler may say: the usual products are there
        text = " ".join(str(error).split())[:300]
        warn(f"{kind} could not be compiled, so its products are not: {type(error).__name__}: {text}", NotCompiled)
        return None
    return product


def _kept() -> Any:
    """A compiled backward pass may reuse the memory of what was saved for it, and then runs once only: not here."""
    return functorch.patch(donated_buffer=False)
