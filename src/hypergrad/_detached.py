"""The derivatives that are lost if a map takes values out of autograd's graph (detach, .data, .item(), no_grad)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _autodiff, _random, _torch
from ._graph import ranks
from ._reach import DETACH, READ, place_of, reached
from ._solution import HypergradientWarning, action_of, warn

LOST = 1e-3  # relative size of a lost derivative above which a warning is due
NUMBERS = 4  # how many of the numbers that were read are examined
_ARRAYS = {Tensor.numpy, Tensor.__array__, Tensor.tolist}


class LostDerivative(HypergradientWarning):
    """An inner loss or map takes values that depend on params or hparams out of autograd's graph, and depends on them.

    Example:
        >>> import warnings
        >>> lam = torch.tensor(1.0, requires_grad=True)
        >>> def inner_loss(w, lam):  # its gradient is w - λ, and autograd sees half of λ
        ...     return w**2 / 2 - w * (lam + lam.detach()) / 2
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     w = hg.implicit.argmin(inner_loss, torch.tensor(1.0), lam)
        ...     gradient = torch.autograd.grad(w, lam)  # 1 is right
        >>> caught[0].category.__name__, gradient
        ('LostDerivative', (tensor(0.5000),))
    """


class Site(NamedTuple):
    """A place where a value leaves the graph: the tensor x, the leaf that stands for its value, and the line."""

    x: Tensor
    leaf: Tensor | None  # None if x was read as a Python number
    place: str


class _Watched(TorchFunctionMode):
    """Evaluates as torch does, but a tensor that leaves the graph becomes a new leaf of it.

    Args:
        shift: (i, δ) adds δ to the i-th number that is read, counted from 0.
    """

    def __init__(self, shift: tuple[int, float] = (-1, 0.0)):
        super().__init__()
        self.shift, self.sites, self.numbers = shift, [], []
        self.given: list[Tensor] = []  # the tensors that the user's code received

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if func in DETACH and isinstance(x, Tensor) and x.requires_grad and (place := place_of(False)):
            return self._leaf(x, place)
        if func in READ and isinstance(x, Tensor) and x.requires_grad and (place := place_of(True)):
            value = func(x.detach(), *args[1:], **kwargs)
            self.numbers.append((Site(x, None, place), value))
            at, by = self.shift
            return value + by if len(self.numbers) == at + 1 else value
        if func in _ARRAYS and isinstance(x, Tensor) and x.requires_grad:
            return func(x.detach(), *args[1:], **kwargs)
        if torch.is_grad_enabled() or not _pure(func, kwargs):
            return func(*args, **kwargs)
        with torch.enable_grad():
            result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        place = place_of(True)
        return self._leaf(result, place) if place else result.detach()

    def _leaf(self, x: Tensor, place: str) -> Tensor:
        if _torch.is_wrapped(x):
            return x.detach()
        leaf = x.detach().requires_grad_()
        self.sites.append(Site(x, leaf, place))
        with torch.enable_grad():
            self.given.append(leaf.clone())  # a clone, because the user may write into it
        return self.given[-1]


def _pure(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "_")
    return "out" not in kwargs and not name.endswith("_") and not name.startswith("_")


def warn_of_lost(
    name: str,
    user: Any,
    evaluate: Callable[[], Sequence[Any]],
    w: Sequence[Tensor],
    h: Sequence[Tensor],
    v: Sequence[Tensor],
) -> None:
    """Warn of derivatives of F that autograd does not see, if they are more than rounding beside those that it sees.

        F(w, λ) = G(w, λ, x(w, λ)) with x out of the graph:      lost ∂x/∂(w, λ)ᵀ ∂₃Gᵀ v,  seen ∂₁,₂Gᵀ v

    Args:
        name, user: the function's name in the message, and the function, whose modules' buffers are restored.
        evaluate: () ↦ F(w, λ), with its graph.
        w, h: the tensors to differentiate with respect to.
        v: a cotangent of F, as in the products that the hypergradient uses.

    Cost: one evaluation and one reverse pass if something is taken out of the graph, and four more evaluations for each
        number that is read. Random states are restored.
    """
    # On many ranks every branch below would have to be taken alike.
    if action_of("", LostDerivative) == "ignore" or ranks() > 1:
        return
    modules = [each for each in reached((user,), -2) if isinstance(each, torch.nn.Module) and each.training]
    buffers = list({id(b): b for module in modules for b in module.buffers()}.values())
    before, random, given = [b.clone() for b in buffers], _random.capture(_random.devices_of([*w, *h])), []

    def value(watched: _Watched) -> list[Tensor]:
        _random.restore(random)
        given.append(watched.given)
        with torch.enable_grad(), watched:
            return list(evaluate())

    try:
        found = _lost(value, w, h, v)
    except Exception:  # the user's code fails if it is watched; the call itself has succeeded
        return
    finally:
        _random.restore(random)
        for x in itertools.chain(*given):  # the user's code may have kept x
            x.detach_()
        with torch.no_grad():
            for b, numbers in zip(buffers, before, strict=True):
                if not torch.equal(b, numbers):
                    b.copy_(numbers)
    if found is not None:
        seen, lost, what, places = found
        warn(
            f"{', '.join(places[:3])}: here {name} takes a value out of autograd's graph (.detach(), .data, .item(), "
            f"float(), no_grad) that depends on params or hparams, so a part of its derivative is lost: with respect "
            f"to {what}, autograd sees a derivative of norm {seen:.3g} and misses one of norm {lost:.3g}, and the "
            f"hypergradient is wrong. Keep the value in the graph; if you leave its derivative out on purpose, "
            f"warnings.simplefilter('ignore', hg.LostDerivative) turns this check off",
            LostDerivative,
        )


def _lost(
    value: Callable[[_Watched], list[Tensor]], w: Sequence[Tensor], h: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[float, float, str, list[str]] | None:
    """(norm seen, norm lost, "params" or "hparams", places) of the derivative; None if at most rounding is lost."""
    outputs = value(watched := _Watched())
    sites: list[Site] = watched.sites
    if not sites and not watched.numbers:
        return None
    leaves = [site.leaf for site in sites if site.leaf is not None]
    grads = _autodiff.grad_or_none(outputs, [*w, *h, *leaves], v, retain_graph=True)
    seen, cotangents = grads[: len(w) + len(h)], grads[len(w) + len(h) :]
    lost: list[Tensor | None] = [None] * len(seen)
    places: list[str] = []

    def pull(site: Site, cotangent: Tensor, count: int) -> None:
        both = _autodiff.grad_or_none([site.x], [*w, *h, *leaves[:count]], [cotangent], retain_graph=True)
        lost[:] = _autodiff.add_or_none(lost, both[: len(lost)])
        cotangents[:count] = _autodiff.add_or_none(cotangents[:count], both[len(lost) :])
        places.append(site.place)

    for i, (site, number) in enumerate(watched.numbers[:NUMBERS]):
        slope = _slope(lambda by, i=i: _dot(value(_Watched((i, by))), v), float(number), (*w, *h)[0].dtype)
        if slope:
            pull(site, torch.full_like(site.x, slope), len(leaves))
    for i in range(len(sites) - 1, -1, -1):
        if (cotangent := cotangents[i]) is not None and bool(cotangent.any()):
            pull(sites[i], cotangent, i)
    eps = max(torch.finfo(x.dtype).eps for x in (*w, *h))
    sizes = [(_norm(xs[: len(w)]), _norm(xs[len(w) :])) for xs in (seen, lost)]
    scale = [max(_norm(w), eps), max(_norm(h), eps)]
    least = eps**0.75 * max(size * x for size, x in zip(sizes[0], scale, strict=True))  # rounding of ⟨∂Fᵀv, (w, λ)⟩
    for i, what in ((1, "hparams"), (0, "params")):
        if sizes[1][i] > max(LOST, eps**0.5) * sizes[0][i] and sizes[1][i] * scale[i] > least:
            return sizes[0][i], sizes[1][i], what, list(dict.fromkeys(places))
    return None


def _slope(along: Callable[[float], float], number: float, dtype: torch.dtype) -> float:
    """The derivative with respect to a number, by central differences with two step sizes; 0 if these disagree."""
    t = torch.finfo(dtype).eps ** (1 / 3) * (abs(number) or 1.0)
    narrow, wide = ((along(by) - along(-by)) / (2 * by) for by in (t, 2 * t))
    return narrow if abs(narrow - wide) <= 0.1 * abs(narrow) else 0.0


def _dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return sum(
        float((x.detach().conj() * y).real.sum() if x.is_complex() else (x.detach() * y).sum())
        for x, y in zip(xs, ys, strict=True)
    )


def _norm(xs: Sequence[Tensor | None]) -> float:
    return math.hypot(*(float(x.detach().norm()) for x in xs if x is not None))
