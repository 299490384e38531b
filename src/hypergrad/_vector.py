"""Many tensors as one vector, and the scalars of an iteration: all the arithmetic that solvers need.

A Vector holds one buffer ("chunk") for all small leaves of one dtype and device, and one for each large leaf. With
batch_dims = 1 every leaf has a leading axis of independent systems, and every scalar (dot, norm) is a tensor of shape
[B] instead of a 0-d tensor. Only `read` and `anywhere` read numbers from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, reduce
from operator import add, sub
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._tree import KIND, Paths, PyTree, Unflatten, filled, flatten, full, largest_of_parts, matching

# A scalar of an iteration: a Python number where reading from the device is free, else a tensor, 0-d or [B]. Arithmetic
# with Python numbers costs little beside a small product; arithmetic with 0-d tensors costs a noticeable part of it.
Scalar: TypeAlias = Any

FREE_TO_READ = ("cpu",)  # types of device from which a number is read without synchronisation

# Leaves up to SMALL elements share a buffer; so do all leaves of a problem with at most SMALL_TOTAL elements. Measured:
# shared buffers win below a million elements, separate ones (no copy after each product) above.
SMALL, SMALL_TOTAL = 2**15, 2**20
SHARDED = "sharded tensors cannot be stacked or flattened; use CG, MINRES, BiCGStab, LSQR, NormalCG or FixedPoint"


def read(scalar: Tensor) -> Scalar:
    """A 0-d tensor as a Python number if reading is free; otherwise the tensor."""
    return scalar.item() if not scalar.ndim and scalar.device.type in FREE_TO_READ else scalar


def where(condition: Any, a: Scalar, b: Scalar) -> Scalar:
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else (a if condition else b)


def anywhere(condition: Any) -> bool:
    """Whether a condition holds for any system."""
    return bool(condition.any() if isinstance(condition, Tensor) and condition.ndim else condition)


def larger(a: Scalar, b: Scalar) -> Scalar:
    """max(a, b), which is NaN where a is NaN."""
    return torch.maximum(a, torch.as_tensor(b, dtype=a.dtype, device=a.device)) if isinstance(a, Tensor) else max(a, b)


def square_root(a: Scalar) -> Scalar:
    return a.sqrt() if isinstance(a, Tensor) else math.sqrt(a)


def ratio(a: Any, b: Any, known: Any = None) -> Any:
    """a / b where `known` holds (default: where a ≠ 0), else 0. For Python numbers a / 0 is infinite."""
    known = a != 0 if known is None else known
    if isinstance(known, Tensor):
        return torch.where(known, a / b, 0.0)
    if not known:
        return 0.0
    return a / b if isinstance(b, Tensor) or b else a * math.inf


def norm(v: Vector, read: Callable[[Tensor], Scalar] = read) -> Scalar:
    """‖v‖₂ of each system. For a single system `read` may turn it into a Python number."""
    return v.norm() if v.space.batch_dims else square_root(read(v.dot(v)))


def squares_are_exact(norm2: Scalar, space: Space) -> bool:
    """Whether ‖v‖² is known to be free of under- and overflow. [B] may hold zeros. False if reading is not free."""
    low, high = space.tiny**0.5, space.tiny**-0.5
    if isinstance(norm2, Tensor):
        if not (space.uniform and norm2.ndim and norm2.device.type in FREE_TO_READ):
            return False
        return bool(((norm2 == 0) | ((norm2 >= low) & (norm2 <= high))).all())
    return space.uniform and low <= norm2 <= high


def is_plain(leaf: Tensor) -> bool:
    """Whether a leaf may be reshaped and stored together with others; a sharded tensor, for example, may not."""
    return type(leaf) in (Tensor, torch.nn.Parameter)


@lru_cache
def _numbers(dtypes: frozenset[torch.dtype]) -> tuple[torch.dtype, float, float, float, float]:
    """For a space with these dtypes: the widest, its tiny, the least max, the largest eps, the default rtol."""
    widest = reduce(torch.promote_types, dtypes, torch.float32)
    kinds = [torch.finfo(dtype) for dtype in dtypes]
    eps = max(kind.eps for kind in kinds)
    # The tolerance of solvers if the user gives none: about half of the digits, nearly all of them in half precision.
    rtol = 1e-6 if eps < 1e-10 else max(1e-4, 4 * eps)
    return widest, torch.finfo(widest).tiny, min(kind.max for kind in kinds), eps, rtol


def _groups(leaves: Sequence[Tensor]) -> list[list[int]]:
    """Lists of indices of the leaves that share a buffer, in the order of their first members."""
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
    """What all vectors of one problem share: container, shapes, dtypes, devices, batch axis and storage."""

    def __init__(
        self,
        leaves: Sequence[Tensor],
        paths: Paths,
        unflatten: Unflatten,
        batch_dims: int = 0,
        places: list[int] | None = None,
        groups: list[list[int]] | None = None,  # which leaves share a buffer; chosen by their sizes if None
    ):
        """The space of a tree that was flattened: Space(*flatten(tree, name)).

        places: indices of the leaves that are components of the vectors (default: all). The others are zeros in `tree`.
        """
        self.paths, self.unflatten, self.places = paths, unflatten, None
        if places is not None and len(places) < len(leaves):
            others = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
            self.places, self.unflatten = places, lambda new: unflatten(filled(others, places, new))
            leaves = [leaves[i] for i in places]
        self.kinds = list(map(KIND, leaves))
        self.shapes, self.dtypes, self.devices = map(list, zip(*self.kinds, strict=True))
        self.batch_dims = batch_dims
        self.batch_shape = self._batch_shape() if batch_dims else torch.Size()
        self.rows = [len(shape) == batch_dims + 1 for shape in self.shapes]  # whether a leaf is stored without reshape
        self.device = self.devices[0]
        dtypes = frozenset(self.dtypes)
        self.dtype, self.tiny, self.largest, self.eps, self.rtol = _numbers(dtypes)
        self.groups = _groups(leaves) if groups is None else groups
        lengths = [math.prod(shape[batch_dims:]) for shape in self.shapes]
        self.row_shapes = [(*self.batch_shape, length) for length in lengths]
        self.sizes = [[lengths[i] for i in group] for group in self.groups]
        self.length = sum(lengths)
        self.plain = [is_plain(leaves[group[0]]) for group in self.groups]
        # The only leaf is the only chunk; converting between the two would be most of the cost of a small step.
        self.single = self.plain == [True] and self.rows == [True]
        # In a uniform space scalars multiply the chunks without a change of dtype or device.
        self.uniform = all(self.plain) and dtypes == {self.dtype} and {*self.devices} == {self.device}

    def stack_of(self, count: int) -> Space:
        """The space of stacks of `count` vectors, with a new leading axis of every leaf."""
        return self._reshaped([torch.Size((count, *shape)) for shape in self.shapes], self.batch_dims + 1)

    @cached_property
    def one(self) -> Vector:
        """Zeros in the space of one system of the batch (or, for a stack of batches, of one batch)."""
        # The groups must be the same: a leaf that is small in one system may be large in the batch.
        return self._reshaped([shape[1:] for shape in self.shapes], self.batch_dims - 1, self.groups).zeros()

    def _reshaped(self, shapes: list[torch.Size], batch_dims: int, groups: list[list[int]] | None = None) -> Space:
        kinds = zip(shapes, self.dtypes, self.devices, strict=True)
        leaves = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in kinds]
        space = Space(leaves, self.paths, self.unflatten, batch_dims, groups=groups)
        space.places = self.places
        return space

    def require_plain(self) -> None:
        """Raise TypeError for sharded leaves, which can be neither stacked nor flattened."""
        if not all(self.plain):
            raise TypeError(SHARDED)

    def _name(self, i: int) -> str:
        return self.paths[i if self.places is None else self.places[i]]

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

    def chunks_of(self, leaves: Sequence[Tensor], lead: tuple[int, ...] = ()) -> list[Tensor]:
        """The chunks that store these leaves of shapes [*lead, *shape]; they may share the leaves' memory."""
        if self.single:
            return [leaves[0]]
        chunks = []
        for group, plain in zip(self.groups, self.plain, strict=True):
            if plain:
                flat = [leaves[i] if self.rows[i] else leaves[i].reshape((*lead, *self.row_shapes[i])) for i in group]
                chunks.append(flat[0] if len(flat) == 1 else torch.cat(flat, -1))
            else:
                chunks.append(leaves[group[0]])
        return chunks

    def leaves_of(self, chunks: list[Tensor], lead: tuple[int, ...] = ()) -> list[Tensor]:
        """The inverse of `chunks_of`: views in leaf order."""
        if self.single:
            return chunks
        leaves: list[Any] = [None] * len(self.shapes)
        for chunk, group, sizes, plain in zip(chunks, self.groups, self.sizes, self.plain, strict=True):
            parts = (chunk,) if len(group) == 1 else chunk.split(sizes, -1)
            for i, part in zip(group, parts, strict=True):
                leaves[i] = part.view((*lead, *self.shapes[i])) if plain and not self.rows[i] else part
        return leaves

    def joined(self, chunks: list[Tensor]) -> Tensor:
        """Chunks as one tensor [..., n] in the widest dtype."""
        self.require_plain()
        parts = [self.cast(chunk) for chunk in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def split(self, flat: Tensor) -> list[Tensor]:
        """The inverse of `joined`."""
        parts = flat.split([sum(sizes) for sizes in self.sizes], -1)
        first = [group[0] for group in self.groups]
        return [part.to(self.devices[i], self.dtypes[i]) for part, i in zip(parts, first, strict=True)]

    def pack(self, leaves: Sequence[Tensor]) -> Vector:
        """The vector of these leaves, whose shapes are not checked. It may share their memory."""
        return Vector(self, [leaves[0]] if self.single else self.chunks_of(leaves))

    def from_flat(self, flat: Tensor) -> Vector:
        """The vector whose `flat()` is this tensor [n] (or [B, n])."""
        return Vector(self, self.split(flat))

    def vector(self, tree: PyTree, name: str) -> Vector:
        """The vector of a user's tree, which is checked leaf by leaf. It never shares the tree's graph."""
        return self.pack([leaf.detach() for leaf in self.check(tree, name)])

    def check(self, tree: PyTree, name: str) -> list[Tensor]:
        """The leaves of a tree. Raises ValueError if its structure or its leaves' shapes, dtypes or devices differ."""
        return matching(tree, self.paths, self.kinds, name, self.places)

    def zeros(self) -> Vector:
        """A new vector of zeros, of plain tensors."""
        self.require_plain()
        kinds = zip(self.shapes, self.dtypes, self.devices, strict=True)
        return self.pack([torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in kinds])

    def scalar(self, value: float) -> Tensor:
        """A scalar of this space: 0-d, or [B], in the widest dtype."""
        return torch.full(self.batch_shape, value, dtype=self.dtype, device=self.device)

    def cast(self, x: Tensor) -> Tensor:
        """A tensor in the widest dtype, on the device of the first leaf."""
        return x.to(device=self.device, dtype=self.dtype)

    def tensor(self, numbers: Any) -> Tensor:
        """A number, or a list of numbers, as a tensor in the widest dtype; a tensor is returned unchanged."""
        if isinstance(numbers, Tensor):
            return numbers
        # torch.scalar_tensor is faster, but it raises an error for a number out of range and takes no list.
        make = torch.scalar_tensor if isinstance(numbers, float) and abs(numbers) <= self.largest else torch.tensor
        return make(numbers, dtype=self.dtype, device=self.device)


class Vector:
    """A point of a Space, with the arithmetic that solvers need. Scalars are numbers, or tensors 0-d (or [B]).

    Operations ending in _ write into the vector and return it.

    Example:
        >>> v = hg.Vector.of({"a": torch.ones(2), "b": torch.zeros(3)}, "v")
        >>> (2 * v).norm(), (v + v).tree["a"]
        (tensor(2.8284), tensor([2., 2.]))
    """

    __slots__ = ("_leaves", "chunks", "space")

    def __init__(self, space: Space, chunks: list[Tensor]):
        self.space = space
        self.chunks = chunks
        self._leaves: list[Tensor] | None = None

    @classmethod
    def of(cls, tree: PyTree, name: str, batch_dims: int = 0) -> Vector:
        """The vector of a tree, in a new space. It never shares the tree's graph."""
        leaves, paths, unflatten = flatten(tree, name)
        return Space(leaves, paths, unflatten, batch_dims).pack([leaf.detach() for leaf in leaves])

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors in the shapes of the user's leaves, in leaf order: views of the vector's memory, made once."""
        if self._leaves is None:
            self._leaves = self.space.leaves_of(self.chunks)
        return self._leaves

    @property
    def tree(self) -> PyTree:
        """The vector in the structure of the user's tree."""
        return self.space.unflatten(self.leaves)

    def flat(self) -> Tensor:
        """One tensor [n] (or [B, n]) in the widest dtype."""
        return self.space.joined(self.chunks)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Vector:
        return Vector(self.space, [function(chunk) for chunk in self.chunks])

    def _number(self, a: float) -> float:
        """The number, or ±∞ if it is out of the leaves' range, for which torch would raise an error."""
        return math.copysign(math.inf, a) if abs(a) > self.space.largest else a

    def _factors(self, a: Scalar) -> list[Any]:
        """The scalar a in the shapes in which it multiplies each chunk."""
        if not isinstance(a, Tensor):
            return [self._number(a)] * len(self.chunks)
        if self.space.uniform and not a.ndim:
            return [a] * len(self.chunks)
        return [self._broadcastable(a.to(chunk.device, chunk.dtype), i) for i, chunk in enumerate(self.chunks)]

    def _broadcastable(self, a: Tensor, i: int) -> Tensor:
        """A tensor with one entry per system (or a 0-d one), reshaped to broadcast against chunk i."""
        if not a.ndim:
            return a
        return a.reshape(*a.shape, *[1] * (1 if self.space.plain[i] else self.chunks[i].ndim - a.ndim))

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
        return self._map(torch.clone)

    def zeros(self) -> Vector:
        """A new vector of zeros in the same space."""
        return self._map(torch.zeros_like)

    def random(self, generator: torch.Generator) -> Vector:
        """A vector of standard normal numbers in the same space, from a generator on the CPU."""
        return self._map(lambda c: torch.randn(c.shape, generator=generator, dtype=c.dtype, device="cpu").to(c.device))

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
        pairs = zip(self.chunks, other.chunks, strict=True)
        masks = [self._broadcastable(mask.to(chunk.device), i) for i, chunk in enumerate(self.chunks)]
        return Vector(self.space, [torch.where(own, x, y) for own, (x, y) in zip(masks, pairs, strict=True)])

    def dot(self, other: Vector) -> Tensor:
        """⟨self, other⟩ of each system, reduced in the widest dtype: 0-d, or [B]."""
        space, chunks = self.space, self.chunks
        if space.uniform and len(chunks) == 1:
            return torch.linalg.vecdot(chunks[0], other.chunks[0])
        parts = []
        for x, y, plain in zip(chunks, other.chunks, space.plain, strict=True):
            if x.element_size() < 4:
                x, y = x.float(), y.float()
            part = torch.linalg.vecdot(x, y) if plain else sharded_dot(x, y, space.batch_dims)
            parts.append(space.cast(part))
        return reduce(add, parts)

    def norm(self) -> Tensor:
        """‖self‖₂ of each system."""
        if self.space.batch_dims and self.space.uniform and len(self.chunks) == 1:
            return torch.linalg.vector_norm(self.chunks[0], dim=-1)
        return self.dot(self).sqrt()

    def scale(self, read: Callable[[Tensor], Scalar] = lambda size: size) -> Scalar:
        """A power of two near the largest |entry| of each system (1 if that is 0 or infinite); `read` as in `norm`."""
        # The reciprocal must not overflow in the narrowest dtype.
        size, tiny = read(self.largest()), max(self.space.tiny, 2 / self.space.largest)
        if not isinstance(size, Tensor):
            return math.ldexp(0.5, math.frexp(max(size, tiny))[1]) if 0 < size < math.inf else 1.0
        usable = (size > 0) & (size < math.inf)
        return torch.where(usable, torch.exp2(torch.log2(size.clamp_min(tiny)).floor()), 1.0)

    def largest(self) -> Tensor:
        """The largest |entry| of each system: 0-d, or [B]."""
        space, tops = self.space, []
        for chunk, plain in zip(self.chunks, space.plain, strict=True):
            chunk = chunk if plain or space.batch_dims else largest_of_parts(chunk)
            own = chunk if plain else chunk.flatten(space.batch_dims)
            top = torch.linalg.vector_norm(own, math.inf, -1) if own.numel() else own.new_zeros(space.batch_shape)
            tops.append(top if space.uniform else space.cast(full(top)))
        return reduce(torch.maximum, tops)

    def __repr__(self) -> str:
        return f"Vector({self.tree!r})"


def sharded_dot(x: Tensor, y: Tensor, batch_dims: int) -> Tensor:
    product = x * y  # a tensor that is sharded along a later axis cannot be flattened
    return full(product.sum(tuple(range(batch_dims, x.ndim))) if x.ndim > batch_dims else product)
