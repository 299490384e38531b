"""What a map takes out of autograd's graph (detach, .data, .item(), no_grad), and the derivative that is lost by it."""

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
NUMBERS = 4  # how many numbers that were read are looked at
_ARRAYS = {Tensor.numpy, Tensor.__array__, Tensor.tolist}


class LostDerivative(HypergradientWarning):
    """An inner loss or map takes out of autograd's graph what depends on params or hparams, and F depends on it.

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
    """A place where numbers leave the graph: the tensor x, the leaf that stands for its numbers, and where."""

    x: Tensor
    leaf: Tensor | None  # None for a number
    place: str


class _Watched(TorchFunctionMode):
    """Evaluates as torch does, but what is taken out of the graph becomes a new leaf of it.

    Args:
        move: the place of a number in the order of reading, and what is added to it.
    """

    def __init__(self, move: tuple[int, float] = (-1, 0.0)):
        super().__init__()
        self.move, self.sites, self.numbers = move, [], []
        self.given: list[Tensor] = []  # to the user's code

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if func in DETACH and isinstance(x, Tensor) and x.requires_grad and (place := place_of(False)):
            return self._leaf(x, place)
        if func in READ and isinstance(x, Tensor) and x.requires_grad and (place := place_of(True)):
            value = func(x.detach(), *args[1:], **kwargs)
            self.numbers.append((Site(x, None, place), value))
            at, by = self.move
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
            self.given.append(leaf.clone())  # may be written to
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
    """LostDerivative where derivatives of F that autograd does not see are no rounding beside those that it sees.

        F(w, λ) = G(w, λ, x(w, λ)),  x out of the graph:      lost = ∂x/∂(w, λ)ᵀ ∂₃Gᵀ v  beside  ∂₁,₂Gᵀ v

    Args:
        name, user: of the function to speak of; the buffers of its modules and random numbers are put back.
        evaluate: F(w, λ), with its graph.
        w, h: what it is differentiated with respect to.
        v: like F; as where the derivatives are used.

    Cost: one evaluation and one reverse pass where something is taken out of the graph; for each number that is read
        four evaluations more.
    """
    # Ranks would have to take every branch below alike.
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
    except Exception:  # what the user's code does with the numbers cannot be followed; the call itself went well
        return
    finally:
        _random.restore(random)
        for x in itertools.chain(*given):  # the user may have kept it
            x.detach_()
        with torch.no_grad():
            for b, numbers in zip(buffers, before, strict=True):
                if not torch.equal(b, numbers):
                    b.copy_(numbers)
    if found is not None:
        seen, lost, what, places = found
        warn(
            f"{', '.join(places[:3])}: what {name} takes out of autograd's graph there (.detach(), .data, .item(), "
            f"float(), no_grad) depends on params or hparams and changes the derivative of {name}: with respect to "
            f"{what} autograd sees {seen:.3g}, and {lost:.3g} is lost (norms of vectors), and so the hypergradient is "
            f"not that of what is computed. Keep it in the graph; if the derivative is left out on purpose, "
            f"warnings.simplefilter('ignore', hg.LostDerivative) says so and saves this check",
            LostDerivative,
        )


def _lost(
    value: Callable[[_Watched], list[Tensor]], w: Sequence[Tensor], h: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[float, float, str, list[str]] | None:
    """The norms of what is seen and of what is lost, in w or in λ, and where; None where it is rounding or nothing."""
    outputs = value(watched := _Watched())
    sites: list[Site] = watched.sites
    if not sites and not watched.numbers:
        return None
    leaves = [site.leaf for site in sites if site.leaf is not None]
    grads = _autodiff.grad_or_none(outputs, [*w, *h, *leaves], v, retain_graph=True)
    seen, bars = grads[: len(w) + len(h)], grads[len(w) + len(h) :]
    lost: list[Tensor | None] = [None] * len(seen)
    places: list[str] = []

    def pull(site: Site, bar: Tensor, count: int) -> None:
        both = _autodiff.grad_or_none([site.x], [*w, *h, *leaves[:count]], [bar], retain_graph=True)
        lost[:] = _autodiff.add_or_none(lost, both[: len(lost)])
        bars[:count] = _autodiff.add_or_none(bars[:count], both[len(lost) :])
        places.append(site.place)

    for i, (site, number) in enumerate(watched.numbers[:NUMBERS]):
        slope = _slope(lambda by, i=i: _paired(value(_Watched((i, by))), v), float(number), (*w, *h)[0].dtype)
        if slope:
            pull(site, torch.full_like(site.x, slope), len(leaves))
    for i in range(len(sites) - 1, -1, -1):
        if (bar := bars[i]) is not None and bool(bar.any()):
            pull(sites[i], bar, i)
    eps = max(torch.finfo(x.dtype).eps for x in (*w, *h))
    sizes = [(_norm(xs[: len(w)]), _norm(xs[len(w) :])) for xs in (seen, lost)]
    scale = [max(_norm(w), eps), max(_norm(h), eps)]
    least = eps**0.75 * max(size * x for size, x in zip(sizes[0], scale, strict=True))  # rounding of ⟨∂Fᵀv, (w, λ)⟩
    for i, what in ((1, "hparams"), (0, "params")):
        if sizes[1][i] > max(LOST, eps**0.5) * sizes[0][i] and sizes[1][i] * scale[i] > least:
            return sizes[0][i], sizes[1][i], what, list(dict.fromkeys(places))
    return None


def _slope(along: Callable[[float], float], number: float, dtype: torch.dtype) -> float:
    """The derivative in a number that was read, by central differences of two steps; 0 where they do not agree."""
    t = torch.finfo(dtype).eps ** (1 / 3) * (abs(number) or 1.0)
    narrow, wide = ((along(by) - along(-by)) / (2 * by) for by in (t, 2 * t))
    return narrow if abs(narrow - wide) <= 0.1 * abs(narrow) else 0.0


def _paired(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    return sum(
        float((x.detach().conj() * y).real.sum() if x.is_complex() else (x.detach() * y).sum())
        for x, y in zip(xs, ys, strict=True)
    )


def _norm(xs: Sequence[Tensor | None]) -> float:
    return math.hypot(*(float(x.detach().norm()) for x in xs if x is not None))
