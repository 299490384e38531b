"""Functions of torch in another spelling of the same numbers, which costs less where meta evaluates losses.

cross_entropy, nll_loss: torch.func.vmap takes nll_loss apart in Python, forward and backward; a gather it batches.
linear: vmap multiplies the bias by 1 first, and keeps a node for that.
max_pool2d: on a CPU torch goes through an image entry by entry, but through channels that come last many at a time. So
    the places of the maxima are sought there, and the values fetched from where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Above these max_pool2d is spelled anew. Measured, one thread, forward and reverse, torch's time over ours: images of
# (5, 64, 28, 28) 2.2, (5, 16, 28, 28) 1.9, (5, 8, 28, 28) 1.6, (5, 16, 14, 14) 1.1, (5, 64, 7, 7) .9, (75, 3, 14, 14)
# .8.
CHANNELS, ENTRIES = 8, 2**14
FLOATS = (torch.float32, torch.float64)


class Spelled(TorchFunctionMode):
    """While entered, torch's functions that have a cheaper spelling take it; all else is torch's own.

    Args:
        tasks: how many are evaluated at once by vmap, or 1 without it.
    """

    def __init__(self, tasks: int):
        super().__init__()
        self.tasks = tasks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A subclass of the user's may have its own meaning of the function.
        spelling = SPELLINGS.get(func) if all(kind is Tensor for kind in types) else None
        result = None if spelling is None else spelling(self.tasks, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result


# Each gives None where the other spelling would not be the same, or not cheaper. Whatever is wrong with the arguments
# is left to torch to say.


def nll(
    tasks: int,
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    logits: bool,
) -> Tensor | None:
    plain = weight is None and size_average is None and reduce is None and not label_smoothing and ignore_index < 0
    if tasks == 1 or not plain or not _classes(input, target):
        return None
    dim = min(input.ndim - 1, 1)
    logs = torch.log_softmax(input, dim) if logits else input
    try:
        picked = logs.gather(dim, target.unsqueeze(dim))
    except RuntimeError:  # an index that is no class: one to ignore, or an error
        return None
    reduced = {"none": lambda: picked.squeeze(dim), "mean": picked.mean, "sum": picked.sum}
    return -reduced[reduction]() if reduction in reduced else None


def _classes(input: Any, target: Any) -> bool:
    """Whether these are numbers [N, C, ...] (or [C]) and indices [N, ...] on a CPU, where gather checks them."""
    if not (isinstance(input, Tensor) and isinstance(target, Tensor) and input.is_cpu and input.dtype in FLOATS):
        return False
    shape = input.shape
    return target.dtype == torch.long and len(shape) > 0 and target.shape == shape[: len(shape) > 1] + shape[2:]


def linear(tasks: int, input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    if tasks == 1 or not (isinstance(input, Tensor) and isinstance(weight, Tensor) and input.ndim == weight.ndim == 2):
        return None
    product = input.mm(weight.mT)
    return product if bias is None else product + bias


def max_pool2d(
    tasks: int,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    if return_indices or not (isinstance(input, Tensor) and input.is_cpu and input.ndim == 4):
        return None
    if input.shape[1] < CHANNELS or tasks * input.numel() <= ENTRIES or input.stride(1) == 1:
        return None
    with torch.no_grad():
        last = input.detach().movedim(1, -1).contiguous().movedim(-1, 1)
        _, places = F.max_pool2d(last, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
        places = places.contiguous()
    return input.flatten(-2).gather(-1, places.flatten(-2)).reshape(places.shape)


SPELLINGS: dict[Any, Callable[..., Tensor | None]] = {
    F.cross_entropy: partial(nll, logits=True),
    F.nll_loss: partial(nll, logits=False),
    F.linear: linear,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
}
