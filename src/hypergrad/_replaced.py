"""Functions of torch whose derivatives are wrong, and their replacements in `_torch.correct_derivatives`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

_weight_norm: Any = getattr(torch, "_weight_norm", None)


def _weight_norm_written_out(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖, the norm over all axes but dim."""
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim] if dim != -1 else None
    return v * (g / torch.linalg.vector_norm(v, dim=axes, keepdim=axes is not None))


def _embedding(weight: Tensor, indices: Tensor, *args: Any, sparse: bool = False, **kwargs: Any) -> Tensor:
    """torch.embedding, whose gradient is never sparse where `correct_derivatives(dense=True)` acts."""
    sparse = (args[2] if len(args) == 3 else sparse) and not inside.get()
    return _torch_embedding(weight, indices, *args[:2], sparse=sparse, **kwargs)


@contextmanager
def _called_at(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What torch.func.functional_call enters to call a module at given tensors; checkpoints inside see the tensors."""
    token = _calls.set((*_calls.get(), (args, kwargs)))
    try:
        with _reparametrized(*args, **kwargs):
            yield
    finally:
        _calls.reset(token)


def _checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A non-reentrant checkpoint that recomputes at the tensors given to functional_call, not at the module's own."""
    calls = _calls.get()

    def recompute(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for given, options in calls:
                stack.enter_context(_reparametrized(*given, **options))
            return function(*args, **kwargs)

    return _checkpoint(recompute, *args, **kwargs)


inside: ContextVar[bool | None] = ContextVar("inside", default=None)  # `dense` of the open context; None outside one
_calls: ContextVar[tuple[Any, ...]] = ContextVar("calls", default=())  # arguments of the functional_calls that run now
_torch_embedding = torch.embedding
_stateless: Any = sys.modules.get("torch.nn.utils.stateless")
_reparametrized: Any = getattr(_stateless, "_reparametrize_module", None)
_recomputing = "_checkpoint_without_reentrant_generator"  # in torch 2.15 it only calls the next one
_recomputing += "_impl" * hasattr(torch.utils.checkpoint, _recomputing + "_impl")
_checkpoint: Any = getattr(torch.utils.checkpoint, _recomputing, None)
REPLACED: list[tuple[Any, str, Any, Any]] = [  # (object whose attribute is replaced, its name, old value, new value)
    (_stateless, "_reparametrize_module", _reparametrized, _called_at),
    (torch.utils.checkpoint, _recomputing, _checkpoint, _checkpointed),
    (torch, "_weight_norm", _weight_norm, _weight_norm_written_out),
    (sys.modules.get("torch.nn.utils.weight_norm"), "_weight_norm", _weight_norm, _weight_norm_written_out),
    (torch, "embedding", _torch_embedding, _embedding),
]
_lacking = [name for holder, name, _, _ in REPLACED if not hasattr(holder, name)]
if _lacking:
    warnings.warn(
        f"torch {torch.__version__} is newer than what hypergrad was tested with: its {', '.join(_lacking)} cannot be "
        f"replaced, so hypergradients may be wrong through weight_norm, sparse embeddings, or checkpoints in modules "
        f"under torch.func.functional_call. Avoid these, or install a version of torch that hypergrad was tested with",
        stacklevel=2,
    )
REPLACED = [entry for entry in REPLACED if entry[1] not in _lacking]
