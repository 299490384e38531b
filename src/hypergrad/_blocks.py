"""Products Xᵀ(d ∘ Xv) = Σ Xᵢᵀ(dᵢ ∘ Xᵢv) by blocks of rows of X: those of a linear model's loss.

Such a product reads X twice and does little with it, which takes as long as memory does. A block that fits into the
cache is read from memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ._program import ADDED, Program, in_place
from ._vector import is_plain

BLOCK = 2**20  # bytes of X in a block: a part of a core's second cache
LEAST = 4  # blocks, under which the cache may hold all of X


class Gram(NamedTuple):
    """Xᵀ(d ∘ Xv) in a graph: the last of its operations, v, and X, Xᵀ and d among the constants."""

    last: fx.Node
    v: fx.Node
    constants: tuple[fx.Node, fx.Node, fx.Node | None]


class ByBlocks:
    """A program whose products with large X are done by blocks."""

    def __init__(self, program: Program):
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.source.graph, {}))
        given = [node for node in graph.nodes if node.op == "placeholder"]
        constants = given[program.inputs :]
        grams = [gram for node in graph.nodes if (gram := _found(node, constants)) is not None]
        self.places = [[None if x is None else constants.index(x) for x in gram.constants] for gram in grams]
        self.dims = [1 if gram.last.target is torch.mv else 2 for gram in grams]
        for i, gram in enumerate(grams):
            with graph.inserting_after(given[-1]):
                given.append(graph.placeholder(f"blocks{i}"))
            gram.last.target, gram.last.args = _gram, (given[-1], gram.v)
        graph.eliminate_dead_code()
        self.product = in_place(graph).forward

    def way(self, held: Sequence[Any]) -> Callable[..., list[Tensor]] | None:
        """(*v, *held) ↦ the product; None where no X is large and has its rows in one piece."""
        blocks = []
        for places, ndim in zip(self.places, self.dims, strict=True):
            x, turned, d = (None if i is None else held[i] for i in places)
            blocks.append(_cut(x, turned, d, ndim))
        return (lambda *given: self.product(*given, *blocks)) if any(len(cut) > 1 for cut in blocks) else None


def _found(last: Any, constants: Sequence[fx.Node]) -> Gram | None:
    """The product that ends here."""
    if last.target not in ADDED or last.args[0] not in constants:
        return None
    turned, inner, d = *last.args, None
    if inner.target is torch.mul and inner.meta["alike"] and len(inner.users) == 1:
        a, b = inner.args
        inner, d = (a, b) if b in constants else (b, a)
    if inner.target is not last.target or len(inner.users) > 1 or not {inner.args[0], d or turned} <= {*constants}:
        return None
    return Gram(last, inner.args[1], (inner.args[0], turned, d))


def _cut(x: Any, turned: Any, d: Any, ndim: int) -> list[tuple[Tensor, Tensor, Any]]:
    """(Xᵢ, Xᵢᵀ, dᵢ): views of an X that is too large for the cache and has its rows in one piece, else all of it."""
    plain = all(is_plain(a) and a.layout is torch.strided and a.device.type == "cpu" for a in (x, turned))
    rows = max(BLOCK // max(x.shape[1] * x.element_size(), 1), 1) * torch.get_num_threads()
    # Sums of many blocks in half precision would lose what a product in one piece keeps.
    plain = plain and x.dtype in (torch.float32, torch.float64)
    if not plain or not x.is_contiguous() or len(x) < LEAST * rows or not _same(turned, x.mT):
        return [(x, turned, d)]
    parts = x.split(rows)
    each = isinstance(d, Tensor) and d.ndim == ndim and len(d) == len(x)
    factors = d.split(rows) if each else [d] * len(parts)
    return [(part, part.mT, factor) for part, factor in zip(parts, factors, strict=True)]


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _gram(blocks: list[tuple[Tensor, Tensor, Any]], v: Tensor) -> Tensor:
    product, into = (torch.mv, torch.Tensor.addmv_) if v.ndim == 1 else (torch.mm, torch.Tensor.addmm_)
    total = None
    for x, turned, d in blocks:
        inner = product(x, v)
        if d is not None:
            inner.mul_(d)
        total = product(turned, inner) if total is None else into(total, turned, inner)
    assert total is not None
    return total
