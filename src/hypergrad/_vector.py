"""Many tensors as one vector. The only file that knows containers and the only one that zips lists of tensors.

A Space holds what all vectors of one problem share: the container, shapes, dtypes, devices, the batch axis, and how the
leaves are stored. A Vector holds numbers: one buffer ("chunk") for all small leaves of one dtype and device, and one
for each large leaf. With batch_dims = 1 every leaf has a leading axis of independent systems, and every scalar
(dot, norm) is a tensor of shape [B] instead of a 0-d tensor. No operation here reads a number from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, reduce
from operator import add, sub
from typing import Any

import torch
from torch import Tensor

from ._scalar import Scalar, read, square_root
from ._tree import Paths, PyTree, Unflatten, arranged, describe, filled, flatten, full

# Leaves up to SMALL elements share a buffer; so do all leaves of a problem with at most SMALL_TOTAL elements. Measured:
# shared buffers win below a million elements, separate ones (no copy after each product) above.
SMALL, SMALL_TOTAL = 2**15, 2**20


def norm(v: Vector, read: Callable[[Tensor], Scalar] = read) -> Scalar:
    """‖v‖₂ of each system, as a number where `read` gives one."""
    return square_root(read(v.dot(v)))


def squares_are_exact(norm2: Scalar, space: Space) -> bool:
    """Whether ‖v‖² is a number of such a size that no square in it that matters underflowed, and none overflowed."""
    return space.uniform and not isinstance(norm2, Tensor) and space.tiny**0.5 <= norm2 <= space.tiny**-0.5


def is_plain(leaf: Tensor) -> bool:
    """Whether a leaf may be reshaped and stored with others (a sharded tensor, say, may not)."""
    return type(leaf) in (Tensor, torch.nn.Parameter)


@lru_cache
def _numbers(dtypes: frozenset[torch.dtype]) -> tuple[torch.dtype, float, float, float, float]:
    """Of a space with these dtypes: the widest, its tiniest number, the largest number and eps of all, and rtol."""
    widest = reduce(torch.promote_types, dtypes, torch.float32)
    kinds = [torch.finfo(dtype) for dtype in dtypes]
    eps = max(kind.eps for kind in kinds)
    # What solvers aim at where the user names no tolerance: half the digits, and in half precision what is there.
    rtol = 1e-6 if eps < 1e-10 else max(1e-4, 4 * eps)
    return widest, torch.finfo(widest).tiny, min(kind.max for kind in kinds), eps, rtol


def _groups(leaves: Sequence[Tensor]) -> list[list[int]]:
    """Which leaves share a buffer: index lists in leaf order of their first member."""
    total: dict[tuple, int] = {}
    for leaf in leaves:
        total[leaf.dtype, leaf.device] = total.get((leaf.dtype, leaf.device), 0) + leaf.numel()
    groups: dict[tuple, list[int]] = {}
    for i, leaf in enumerate(leaves):
        kind = (leaf.dtype, leaf.device)
        shares = is_plain(leaf) and (total[kind] <= SMALL_TOTAL or leaf.numel() <= SMALL)
        groups.setdefault(kind if shares else (i,), []).append(i)
    return list(groups.values())


class Space:
    """Containers, shapes, dtypes, devices, batch axis and storage that all vectors of one problem share."""

    def __init__(self, tree: PyTree, name: str, batch_dims: int = 0):
        self._set(*flatten(tree, name), batch_dims)

    @classmethod
    def of(
        cls,
        leaves: list[Tensor],
        paths: Paths,
        unflatten: Unflatten,
        batch_dims: int = 0,
        places: list[int] | None = None,
    ) -> Space:
        """The space of a tree that was flattened already.

        Args:
            places: which of the leaves are components of its vectors, where not all are; the trees of its vectors hold
                zeros for the others.
        """
        new = object.__new__(cls)
        if places is None or len(places) == len(leaves):
            new._set(leaves, paths, unflatten, batch_dims)
            return new
        others = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
        chosen = [leaves[i] for i in places]
        new._set(chosen, paths, lambda new: unflatten(filled(others, places, new)), batch_dims, places=places)
        return new

    def _name(self, i: int) -> str:
        return self.paths[i if self.places is None else self.places[i]]

    def _set(
        self,
        leaves: list[Tensor],
        paths: Paths,
        unflatten: Unflatten,
        batch_dims: int,
        groups: list[list[int]] | None = None,
        places: list[int] | None = None,
    ) -> None:
        self.paths, self.unflatten, self.places = paths, unflatten, places
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.devices = [leaf.device for leaf in leaves]
        self.batch_dims = batch_dims
        self.batch_shape = self._batch_shape() if batch_dims else torch.Size()
        self.rows = [len(shape) == batch_dims + 1 for shape in self.shapes]  # leaves that are stored as they are
        self.device = self.devices[0]
        dtypes = frozenset(self.dtypes)
        self.dtype, self.tiny, self.largest, self.eps, self.rtol = _numbers(dtypes)
        self.groups = _groups(leaves) if groups is None else groups
        lengths = [math.prod(shape[batch_dims:]) for shape in self.shapes]
        self.row_shapes = [(*self.batch_shape, length) for length in lengths]
        self.sizes = [[lengths[i] for i in group] for group in self.groups]
        self.length = sum(lengths)
        self.plain = [is_plain(leaves[group[0]]) for group in self.groups]
        # One leaf that is its own chunk: most of what a small step costs is going from one to the other.
        self.single = self.plain == [True] and self.rows == [True]
        # Scalars of a uniform space multiply its chunks as they are.
        self.uniform = all(self.plain) and dtypes == {self.dtype} and {*self.devices} == {self.device}

    def stack_of(self, count: int) -> Space:
        """The space of `count` vectors of this one, stacked along a leading axis of every leaf."""
        return self._reshaped([torch.Size((count, *shape)) for shape in self.shapes], 1)

    @cached_property
    def one(self) -> Vector:
        """Of a batch: zeros in the space of one system."""
        if not all(self.plain):
            raise TypeError("sharded tensors cannot be stacked; solve for one right hand side after the other")
        # Stored in the same order: leaves that are small alone may be large in the batch.
        return self._reshaped([shape[1:] for shape in self.shapes], 0, self.groups).zeros()

    def _reshaped(self, shapes: list[torch.Size], batch_dims: int, groups: list[list[int]] | None = None) -> Space:
        kinds = zip(shapes, self.dtypes, self.devices, strict=True)
        leaves = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in kinds]
        space = object.__new__(Space)
        space._set(leaves, self.paths, self.unflatten, batch_dims, groups, self.places)
        return space

    def _batch_shape(self) -> torch.Size:
        if self.batch_dims < 0:
            raise ValueError(f"batch_dims must be ≥ 0, got {self.batch_dims}")
        first = self.shapes[0][: self.batch_dims]
        for i, shape in enumerate(self.shapes):
            if shape[: self.batch_dims] != first or len(shape) < self.batch_dims:
                raise ValueError(
                    f"batch_dims={self.batch_dims} needs leading axes of the same lengths in every leaf, but "
                    f"{self._name(0)} has shape {tuple(self.shapes[0])} and {self._name(i)} has {tuple(shape)}"
                )
        return first

    def pack(self, leaves: Sequence[Tensor]) -> Vector:
        """The vector of these leaves, which must have this space's shapes (unchecked). May share their memory."""
        if self.single:
            return Vector(self, [leaves[0]])
        chunks = []
        for group, plain in zip(self.groups, self.plain, strict=True):
            if plain:
                flat = [leaves[i] if self.rows[i] else leaves[i].reshape(self.row_shapes[i]) for i in group]
                chunks.append(flat[0] if len(flat) == 1 else torch.cat(flat, -1))
            else:
                chunks.append(leaves[group[0]])
        return Vector(self, chunks)

    def vector(self, tree: PyTree, name: str) -> Vector:
        """The vector of a tree that was given from outside: checked leaf by leaf. Never shares its graph."""
        leaves = self.check(tree, name)
        return self.pack([leaf.detach() for leaf in leaves])

    def check(self, tree: PyTree, name: str) -> list[Tensor]:
        """The leaves of a tree of this space's structure, shapes, dtypes and devices; else an error that says which.

        A list, a tuple and an iterator count as the same structure; mappings are matched by key.
        """
        leaves, paths = arranged(tree, self.paths, name)
        places = range(len(leaves)) if self.places is None else self.places
        leaves = leaves if self.places is None else [leaves[i] for i in places]
        for i, place in enumerate(places):
            got = (leaves[i].shape, leaves[i].dtype, leaves[i].device)
            expected = (self.shapes[i], self.dtypes[i], self.devices[i])
            if got != expected:
                raise ValueError(
                    f"{paths[place]} must be like {self._name(i)}: expected {describe(*expected)}, got {describe(*got)}"
                )
        return leaves

    def zeros(self) -> Vector:
        """A new vector of zeros."""
        if not all(self.plain):
            raise TypeError("zeros of sharded tensors come from a vector of them: use v.zeros()")
        kinds = zip(self.shapes, self.dtypes, self.devices, strict=True)
        return self.pack([torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in kinds])

    def assign_grad(self, leaves: Sequence[Tensor], gradient: Vector) -> None:
        """leafᵢ.grad ← gradientᵢ for tensors of this space."""
        for leaf, g in zip(leaves, gradient.leaves, strict=True):
            leaf.grad = g

    def from_flat(self, flat: Tensor) -> Vector:
        """The vector whose `flat()` is this tensor [n] (or [B, n])."""
        widths = [sum(sizes) for sizes in self.sizes]
        parts = flat.split(widths, -1)
        kinds = [(self.dtypes[group[0]], self.devices[group[0]]) for group in self.groups]
        return Vector(self, [p.to(device=dev, dtype=dt) for p, (dt, dev) in zip(parts, kinds, strict=True)])

    def scalar(self, value: float) -> Tensor:
        """A scalar of this space: 0-d, or [B], in the widest dtype."""
        return torch.full(self.batch_shape, value, dtype=self.dtype, device=self.device)

    def tensor(self, numbers: Any) -> Tensor:
        """A number, or a list of them, as a tensor in the widest dtype; a tensor as it is."""
        if isinstance(numbers, Tensor):
            return numbers
        # The quicker one raises where a number does not fit, and takes no list.
        make = torch.scalar_tensor if isinstance(numbers, float) and abs(numbers) <= self.largest else torch.tensor
        return make(numbers, dtype=self.dtype, device=self.device)


class Vector:
    """A point of a Space, with the arithmetic that solvers need. Scalars are numbers, or tensors 0-d (or [B]).

    Operations ending in _ write into the vector and return it.
    """

    __slots__ = ("_leaves", "chunks", "space")

    def __init__(self, space: Space, chunks: list[Tensor]):
        self.space = space
        self.chunks = chunks
        self._leaves: list[Tensor] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors in their own shapes, in leaf order: views of the vector's memory, made once."""
        if self._leaves is None:
            self._leaves = self.chunks if self.space.single else self._views()
        return self._leaves

    def _views(self) -> list[Tensor]:
        space = self.space
        leaves: list[Any] = [None] * len(space.shapes)
        for chunk, group, sizes, plain in zip(self.chunks, space.groups, space.sizes, space.plain, strict=True):
            parts = (chunk,) if len(group) == 1 else chunk.split(sizes, -1)
            for i, part in zip(group, parts, strict=True):
                leaves[i] = part.view(space.shapes[i]) if plain and not space.rows[i] else part
        return leaves

    @property
    def tree(self) -> PyTree:
        """The same numbers in the user's own container."""
        return self.space.unflatten(self.leaves)

    def flat(self) -> Tensor:
        """One tensor [n] (or [B, n]) in the widest dtype."""
        space = self.space
        if not all(space.plain):
            raise TypeError("sharded tensors have no flat form; use CG, MINRES, BiCGStab, LSQR, NormalCG or FixedPoint")
        parts = [chunk.to(device=space.device, dtype=space.dtype) for chunk in self.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _map(self, function: Callable[..., Tensor], *others: Vector) -> Vector:
        chunks = zip(self.chunks, *(other.chunks for other in others), strict=True)
        return Vector(self.space, [function(*own) for own in chunks])

    def _factor(self, a: Tensor, chunk: Tensor, plain: bool) -> Tensor:
        """The scalar a, shaped to multiply this chunk."""
        a = a.to(device=chunk.device, dtype=chunk.dtype)
        if not a.ndim:
            return a
        return a.unsqueeze(-1) if plain else a.view(-1, *[1] * (chunk.ndim - 1))

    def _number(self, a: float) -> float:
        """A number as a tensor of the leaves' dtype would hold it, where torch would raise."""
        return math.copysign(math.inf, a) if abs(a) > self.space.largest else a

    def _factors(self, a: Scalar) -> list[Any]:
        if not isinstance(a, Tensor):
            return [self._number(a)] * len(self.chunks)
        if self.space.uniform and not a.ndim:
            return [a] * len(self.chunks)
        return [self._factor(a, c, plain) for c, plain in zip(self.chunks, self.space.plain, strict=True)]

    def __add__(self, other: Vector) -> Vector:
        return Vector(self.space, list(map(add, self.chunks, other.chunks)))

    def __sub__(self, other: Vector) -> Vector:
        return Vector(self.space, list(map(sub, self.chunks, other.chunks)))

    def __neg__(self) -> Vector:
        return self._map(torch.neg)

    def __mul__(self, a: Scalar) -> Vector:
        return Vector(self.space, [c * f for c, f in zip(self.chunks, self._factors(a), strict=True)])

    __rmul__ = __mul__

    def __truediv__(self, a: Scalar) -> Vector:
        return Vector(self.space, [c / f for c, f in zip(self.chunks, self._factors(a), strict=True)])

    def copy(self) -> Vector:
        """The same numbers in new memory."""
        return self._map(torch.clone)

    def zeros(self) -> Vector:
        """A new vector of zeros like this one."""
        return self._map(torch.zeros_like)

    def random(self, generator: torch.Generator) -> Vector:
        """Standard normal numbers like this one, from a generator on the CPU."""

        def draw(chunk: Tensor) -> Tensor:
            return torch.randn(chunk.shape, generator=generator, dtype=chunk.dtype, device="cpu").to(chunk.device)

        return self._map(draw)

    def add_(self, other: Vector, a: Scalar = 1.0, sign: float = 1.0) -> Vector:
        """self ← self + sign · a · other, one pass over memory."""
        if isinstance(a, Tensor):
            for chunk, new, factor in zip(self.chunks, other.chunks, self._factors(a), strict=True):
                chunk.addcmul_(new, factor, value=sign)
            return self
        alpha = sign * self._number(a)
        for i, chunk in enumerate(self.chunks):
            chunk.add_(other.chunks[i], alpha=alpha)
        return self

    def scale_(self, a: Scalar) -> Vector:
        """self ← a · self."""
        if not isinstance(a, Tensor) and a == 1:
            return self
        for chunk, factor in zip(self.chunks, self._factors(a), strict=True):
            chunk.mul_(factor)
        return self

    def scale_add_(self, a: Scalar, other: Vector) -> Vector:
        """self ← a · self + other, one pass over memory."""
        if isinstance(a, Tensor):
            for chunk, new, factor in zip(self.chunks, other.chunks, self._factors(a), strict=True):
                torch.addcmul(new, chunk, factor, out=chunk)
            return self
        alpha = self._number(a)
        for i, chunk in enumerate(self.chunks):
            torch.add(other.chunks[i], chunk, alpha=alpha, out=chunk)
        return self

    def where(self, mask: Tensor, other: Vector) -> Vector:
        """self for the systems where mask (0-d, or [B]) holds, other elsewhere."""
        chunks = []
        for x, y, plain in zip(self.chunks, other.chunks, self.space.plain, strict=True):
            shape = (*mask.shape, *[1] * (1 if plain else x.ndim - mask.ndim)) if mask.ndim else ()
            chunks.append(torch.where(mask.to(x.device).reshape(shape), x, y))
        return Vector(self.space, chunks)

    def dot(self, other: Vector) -> Tensor:
        """⟨self, other⟩ of each system, reduced in the widest dtype: 0-d, or [B]."""
        total: Tensor | None = None
        space, chunks = self.space, self.chunks
        if space.uniform and len(chunks) == 1:
            return torch.linalg.vecdot(chunks[0], other.chunks[0])
        for x, y, plain in zip(self.chunks, other.chunks, space.plain, strict=True):
            if x.element_size() < 4:
                x, y = x.float(), y.float()
            part = torch.linalg.vecdot(x, y) if plain else sharded_dot(x, y, space.batch_dims)
            part = part.to(device=space.device, dtype=space.dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    def norm(self) -> Tensor:
        """‖self‖₂ of each system."""
        return self.dot(self).sqrt()

    def scale(self, read: Callable[[Tensor], Scalar] = lambda size: size) -> Scalar:
        """A power of two near the largest |entry| of each system; 1 where that is 0 or not finite.

        read: makes a number of the largest |entry|, where that is free; the result is a number then.
        """
        # In float16 the inverse of what is tiny overflows.
        size, tiny = read(self.largest()), max(self.space.tiny, 2 / self.space.largest)
        if not isinstance(size, Tensor):
            return math.ldexp(0.5, math.frexp(max(size, tiny))[1]) if 0 < size < math.inf else 1.0
        usable = (size > 0) & (size < math.inf)
        return torch.where(usable, torch.exp2(torch.log2(size.clamp_min(tiny)).floor()), 1.0)

    def largest(self) -> Tensor:
        """The largest |entry| of each system: 0-d, or [B]."""
        largest: Tensor | None = None
        space = self.space
        for chunk, plain in zip(self.chunks, space.plain, strict=True):
            own = chunk if plain else chunk.flatten(space.batch_dims)
            top = torch.linalg.vector_norm(own, math.inf, -1) if own.numel() else own.new_zeros(space.batch_shape)
            if not space.uniform:
                top = full(top).to(device=space.device, dtype=space.dtype)
            largest = top if largest is None else torch.maximum(largest, top)
        assert largest is not None
        return largest

    def __repr__(self) -> str:
        return f"Vector({self.tree!r})"


def sharded_dot(x: Tensor, y: Tensor, batch_dims: int) -> Tensor:
    product = x * y
    return full(product.flatten(1).sum(-1) if batch_dims else product.sum())
