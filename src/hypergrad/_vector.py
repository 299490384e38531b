"""Many tensors as one vector. The only file that knows containers and the only one that zips lists of tensors.

A Space holds what all vectors of one problem share: the container, shapes, dtypes, devices, the batch axis, and how the
leaves are stored. A Vector holds numbers: one buffer ("chunk") for all small leaves of one dtype and device, and one
for each large leaf. With batch_dims = 1 every leaf has a leading axis of independent systems, and every scalar
(dot, norm) is a tensor of shape [B] instead of a 0-d tensor. No operation here reads a number from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, reduce
from operator import add, sub
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

PyTree: TypeAlias = Any
Scalar: TypeAlias = "float | Tensor"

# Leaves up to SMALL elements share a buffer; so do all leaves of a problem with at most SMALL_TOTAL elements. Measured:
# shared buffers win below a million elements, separate ones (no copy after each product) above.
SMALL, SMALL_TOTAL = 2**15, 2**20


class Paths(Sequence[str]):
    """Where the leaves of a tree stand, as text: made when it is asked for, which is when something is wrong."""

    def __init__(self, name: str, spec: optree.PyTreeSpec):
        self.name, self.spec = name, spec

    @cached_property
    def within(self) -> list[str]:
        """The paths without the tree's name."""
        return ["".join(f"[{key!r}]" for key in path) for path in self.spec.paths()]

    def __len__(self) -> int:
        return self.spec.num_leaves

    def __getitem__(self, i: Any) -> Any:
        return [self.name + path for path in self.within[i]] if isinstance(i, slice) else self.name + self.within[i]

    def alike(self, other: Paths) -> bool:
        """Whether two trees have one structure; a list, a tuple and an iterator count as the same."""
        return self.spec == other.spec or self.within == other.within


def flatten(tree: PyTree, name: str) -> tuple[list[Tensor], Paths, Callable[[Iterable[Tensor]], PyTree]]:
    """Leaves, their paths as text, and the inverse. An iterator (model.parameters()) is read once, into a list.

    Raises TypeError naming the leaf that is not a floating point tensor, ValueError for no leaf at all.
    """
    if isinstance(tree, Iterator):
        tree = list(tree)
    leaves, spec = optree.tree_flatten(tree)
    paths = Paths(name, spec)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            hint = "; pass its parameters()" if isinstance(leaf, torch.nn.Module) else ""
            if isinstance(leaf, str):
                hint = "; give named_parameters() as a dict"
            raise TypeError(f"{paths[i]} must be a floating point tensor, got {type(leaf).__name__}{hint}")
        if not leaf.is_floating_point():
            raise TypeError(f"{paths[i]} must be a floating point tensor, got one of dtype {leaf.dtype}")
    if not leaves:
        raise ValueError(f"{name} holds no tensor: {tree!r}")
    return leaves, paths, spec.unflatten


def split(tree: PyTree) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], PyTree]]:
    """The tensors of any dtype in a tree, and a function that puts others in their places; the rest stays as it is."""
    if isinstance(tree, Tensor):  # this and the next case: quick, for unrolling does it at every step
        return [tree], _alone
    if isinstance(tree, Iterator):
        tree = list(tree)
    leaves, spec = optree.tree_flatten(tree)
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return leaves, spec.unflatten
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in places]
    for i in places:  # the function must not keep their memory, nor their graph
        leaves[i] = None

    def rebuild(tensors: Iterable[Tensor]) -> PyTree:
        new = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            new[i] = tensor
        return optree.tree_unflatten(spec, new)

    return tensors, rebuild


def _alone(tensors: Iterable[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def matching(tree: PyTree, like: Sequence[Tensor], name: str) -> list[Tensor]:
    """The leaves of a tree that must have these leaves' number, shapes and dtypes: nothing is broadcast silently."""
    leaves, paths, _ = flatten(tree, name)
    if len(leaves) != len(like):
        raise ValueError(f"{name} must have the structure of the solution: {len(like)} leaves, got {len(leaves)}")
    for leaf, path, due in zip(leaves, paths, like, strict=True):
        if leaf.shape != due.shape or leaf.dtype != due.dtype:
            expected, got = describe(due.shape, due.dtype, due.device), describe(leaf.shape, leaf.dtype, leaf.device)
            raise ValueError(f"{path} must be like the solution: expected {expected}, got {got}")
    return leaves


def difference(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x - y for x, y in zip(xs, ys, strict=True))


def check_distinct(leaves: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError where one tensor stands in two places: its derivative would be counted twice."""
    if len({*map(id, leaves)}) < len(leaves):
        places = {id(leaf): i for i, leaf in reversed([*enumerate(leaves)])}
        late = next(i for i, leaf in enumerate(leaves) if places[id(leaf)] < i)
        raise ValueError(
            f"{names[places[id(leaves[late])]]} and {names[late]} are the same tensor; pass each variable once"
        )


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


class Space:
    """Containers, shapes, dtypes, devices, batch axis and storage that all vectors of one problem share."""

    def __init__(self, tree: PyTree, name: str, batch_dims: int = 0):
        self._hold(*flatten(tree, name), batch_dims)

    @classmethod
    def of(cls, leaves: list[Tensor], paths: Paths, unflatten: Callable[..., PyTree], batch_dims: int = 0) -> Space:
        """The space of a tree that was flattened already."""
        new = object.__new__(cls)
        new._hold(leaves, paths, unflatten, batch_dims)
        return new

    def _hold(
        self,
        leaves: list[Tensor],
        paths: Paths,
        unflatten: Callable[..., PyTree],
        batch_dims: int,
        groups: list[list[int]] | None = None,
    ) -> None:
        self.paths, self.unflatten = paths, unflatten
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.devices = [leaf.device for leaf in leaves]
        self.batch_dims = batch_dims
        self.batch_shape = self._batch_shape()
        self.row_shape = (*self.batch_shape, -1)
        self.rows = [len(shape) == batch_dims + 1 for shape in self.shapes]  # leaves that are stored as they are
        self.device = self.devices[0]
        dtypes = frozenset(self.dtypes)
        self.dtype, self.tiny, self.largest, self.eps, self.rtol = _numbers(dtypes)
        self.groups = self._groups(leaves) if groups is None else groups
        lengths = [math.prod(shape[batch_dims:]) for shape in self.shapes]
        self.sizes = [[lengths[i] for i in group] for group in self.groups]
        self.length = sum(lengths)
        self.plain = [is_plain(leaves[group[0]]) for group in self.groups]
        # One leaf that is its own chunk: most of what a small step costs is going from one to the other.
        self.single = self.plain == [True] and self.rows == [True]
        # Scalars of a uniform space multiply its chunks as they are.
        self.uniform = all(self.plain) and dtypes == {self.dtype} and {*self.devices} == {self.device}

    @cached_property
    def one(self) -> Vector:
        """Of a batch: zeros in the space of one system."""
        if not all(self.plain):
            raise TypeError("sharded tensors cannot be stacked; solve for one right hand side after the other")
        kinds = zip(self.shapes, self.dtypes, self.devices, strict=True)
        leaves = [torch.zeros(shape[1:], dtype=dtype, device=device) for shape, dtype, device in kinds]
        space = object.__new__(Space)
        # Stored in the same order: leaves that are small alone may be large in the batch.
        space._hold(leaves, self.paths, self.unflatten, 0, self.groups)
        return space.pack(leaves)

    def _batch_shape(self) -> torch.Size:
        if self.batch_dims < 0:
            raise ValueError(f"batch_dims must be ≥ 0, got {self.batch_dims}")
        if not self.batch_dims:
            return torch.Size()
        first = self.shapes[0][: self.batch_dims]
        for i, shape in enumerate(self.shapes):
            if shape[: self.batch_dims] != first or len(shape) < self.batch_dims:
                raise ValueError(
                    f"batch_dims={self.batch_dims} needs leading axes of the same lengths in every leaf, but "
                    f"{self.paths[0]} has shape {tuple(self.shapes[0])} and {self.paths[i]} has {tuple(shape)}"
                )
        return first

    def _groups(self, leaves: Sequence[Tensor]) -> list[list[int]]:
        """Which leaves share a buffer: index lists in leaf order of their first member."""
        if len(leaves) == 1:
            return [[0]]
        total: dict[tuple, int] = {}
        for leaf in leaves:
            total[leaf.dtype, leaf.device] = total.get((leaf.dtype, leaf.device), 0) + leaf.numel()
        groups: dict[tuple, list[int]] = {}
        for i, leaf in enumerate(leaves):
            kin = (leaf.dtype, leaf.device)
            shares = is_plain(leaf) and (total[kin] <= SMALL_TOTAL or leaf.numel() <= SMALL)
            groups.setdefault(kin if shares else (i,), []).append(i)
        return list(groups.values())

    def pack(self, leaves: Sequence[Tensor]) -> Vector:
        """The vector of these leaves, which must have this space's shapes (unchecked). May share their memory."""
        if self.single:
            return Vector(self, [leaves[0]])
        chunks = []
        for group, plain in zip(self.groups, self.plain, strict=True):
            if plain:
                flat = [leaves[i] if self.rows[i] else leaves[i].reshape(self.row_shape) for i in group]
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

        A list, a tuple and an iterator count as the same structure.
        """
        leaves, paths, _ = flatten(tree, name)
        if not self.paths.alike(paths):
            odd = [p or "(a single tensor)" for p in {*self.paths.within} ^ {*paths.within}]
            raise ValueError(
                f"{name} must have the structure of {self.paths.name}: {len(paths)} leaves instead of "
                f"{len(self.paths)}, and these stand in one of the two only: {', '.join(sorted(odd)[:5])}"
            )
        for i, leaf in enumerate(leaves):
            got = (leaf.shape, leaf.dtype, leaf.device)
            due = (self.shapes[i], self.dtypes[i], self.devices[i])
            if got != due:
                raise ValueError(
                    f"{paths[i]} must be like {self.paths[i]}: expected {describe(*due)}, got {describe(*got)}"
                )
        return leaves

    def zeros(self) -> Vector:
        """A new vector of zeros."""
        chunks = []
        for group, sizes, plain in zip(self.groups, self.sizes, self.plain, strict=True):
            kind = {"dtype": self.dtypes[group[0]], "device": self.devices[group[0]]}
            if not plain:
                raise TypeError(f"{self.paths[group[0]]}: zeros of a sharded space come from a vector: use v.zeros()")
            chunks.append(torch.zeros(*self.batch_shape, sum(sizes), **kind))
        return Vector(self, chunks)

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


def describe(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {tuple(shape)}, {str(dtype).removeprefix('torch.')} on {device}"


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

    def apart_from(self, other: Vector) -> Vector:
        """The same numbers in memory to write into: a map may hand back its argument, or one tensor for two leaves.

        So may it a number expanded to a leaf.
        """
        x, plain = self.chunks[0], self.space.plain
        if self.space.single and x.is_contiguous() and x.data_ptr() != other.chunks[0].data_ptr():
            return self  # what most small products come to
        used, chunks = set(map(_memory, other.chunks, plain)), []
        for x, own in zip(self.chunks, plain, strict=True):
            place = _memory(x, own)
            chunks.append(x.clone() if place in used or (own and 0 in x.stride()) else x)
            used.add(place)
        return Vector(self.space, chunks)

    def memory(self) -> Callable[[], bool]:
        """What tells whether anything still holds a part of this memory; another library's counts as held."""
        pairs = zip(self.chunks, self.space.plain, strict=True)
        parts = [chunk.untyped_storage() for chunk, plain in pairs if plain]
        foreign, references = not all(part.resizable() for part in parts), [StorageWeakRef(part) for part in parts]
        return lambda: foreign or not all(reference.expired() for reference in references)

    def own(self) -> Vector:
        """The same numbers, in memory that no leaf given to `pack` shares: several leaves were copied there already."""
        pairs = zip(self.chunks, self.space.groups, strict=True)
        return Vector(self.space, [chunk.clone() if len(group) == 1 else chunk for chunk, group in pairs])

    def zeros(self) -> Vector:
        """A new vector of zeros like this one."""
        return self._map(torch.zeros_like)

    def random(self, generator: torch.Generator) -> Vector:
        """Standard normal numbers like this one, from a generator on the CPU."""

        def draw(chunk: Tensor) -> Tensor:
            return torch.randn(chunk.shape, generator=generator, dtype=chunk.dtype).to(chunk.device)

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
            shaped = mask.to(x.device).reshape(*mask.shape, *[1] * (1 if plain else x.ndim - mask.ndim))
            chunks.append(torch.where(shaped, x, y))
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

    def scale(self, look: Callable[[Tensor], Any] = lambda size: size) -> Any:
        """A power of two near the largest |entry| of each system; 1 where that is 0 or not finite.

        look: reads the largest |entry|, where that is free; the result is a number then.
        """
        # In float16 the inverse of what is tiny overflows.
        size, tiny = look(self.largest()), max(self.space.tiny, 2 / self.space.largest)
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


def full(x: Tensor) -> Tensor:
    """The whole tensor of a sharded one."""
    gather = getattr(x, "full_tensor", None)
    return x if gather is None else gather()


def _memory(x: Tensor, plain: bool) -> int:
    return x.untyped_storage().data_ptr() if plain else id(x)


class Basis:
    """Up to m vectors of one space, stacked: one tensor [m, ...] a chunk, so that each vector lies in one piece."""

    def __init__(self, like: Vector, m: int):
        self.space, self.m = like.space, m
        if not all(self.space.plain):
            raise TypeError("sharded tensors cannot be stacked; use CG, MINRES, BiCGStab, LSQR, NormalCG or FixedPoint")
        self.chunks = [chunk.new_empty(m, *chunk.shape) for chunk in like.chunks]

    def _like(self, chunks: list[Tensor]) -> Basis:
        new = object.__new__(Basis)
        new.space, new.m, new.chunks = self.space, len(chunks[0]), chunks
        return new

    @classmethod
    def from_rows(cls, like: Vector, rows: Tensor) -> Basis:
        """The basis whose `matrix()` is this tensor [m, n] (the same for all systems) or [B, m, n]."""
        space = like.space
        flat = rows.expand(*space.batch_shape, *rows.shape[-2:]).movedim(-2, 0)
        parts = flat.split([sum(sizes) for sizes in space.sizes], -1)
        pairs = zip(parts, like.chunks, strict=True)
        return cls(like, 0)._like([part.to(device=chunk.device, dtype=chunk.dtype) for part, chunk in pairs])

    def __setitem__(self, j: int, vector: Vector) -> None:
        for chunk, new in zip(self.chunks, vector.chunks, strict=True):
            chunk[j] = new

    def __getitem__(self, j: int) -> Vector:
        """A view of vector j."""
        return Vector(self.space, [chunk[j] for chunk in self.chunks])

    def coefficients(self, vector: Vector, count: int) -> Tensor:
        """(⟨v₀, x⟩, …, ⟨v_{count−1}, x⟩): [count], or [B, count]."""
        total: Tensor | None = None
        for chunk, x in zip(self.chunks, vector.chunks, strict=True):
            if self.space.batch_dims:  # one after the other: a batched matrix product takes four times as long
                part = torch.stack([torch.linalg.vecdot(chunk[j], x) for j in range(count)], -1)
            else:
                part = chunk[:count] @ x
            part = part.to(device=self.space.device, dtype=self.space.dtype)
            total = part if total is None else total + part
        assert total is not None
        return total

    def combine(self, weights: Tensor) -> Vector:
        """Σⱼ weightsⱼ vⱼ for weights of shape [count], or [B, count]."""
        count = weights.shape[-1]
        chunks = []
        for chunk in self.chunks:
            row = weights.to(device=chunk.device, dtype=chunk.dtype).unsqueeze(-2)
            chunks.append((row @ chunk[:count].movedim(0, -2)).squeeze(-2))
        return Vector(self.space, chunks)

    def leaves(self) -> list[Tensor]:
        """All m vectors as tensors with one more leading axis: [m, *shape] in leaf order."""
        space = self.space
        leaves: list[Any] = [None] * len(space.shapes)
        for chunk, group, sizes in zip(self.chunks, space.groups, space.sizes, strict=True):
            for i, part in zip(group, chunk.split(sizes, -1), strict=True):
                leaves[i] = part.reshape(self.m, *space.shapes[i])
        return leaves

    def with_leaves(self, leaves: Sequence[Tensor]) -> Basis:
        """The basis of these tensors of shape [m, *shape] in leaf order."""
        chunks = []
        for group in self.space.groups:
            rows = [leaves[i].reshape(self.m, *self.space.row_shape) for i in group]
            chunks.append(rows[0] if len(rows) == 1 else torch.cat(rows, -1))
        return self._like(chunks)

    def plus(self, other: Basis, a: float) -> Basis:
        """The basis of vⱼ + a · otherⱼ."""
        return self._like([torch.add(v, w, alpha=a) for v, w in zip(self.chunks, other.chunks, strict=True)])

    def matrix(self) -> Tensor:
        """The rows as one tensor [m, n] (or [B, m, n]) in the widest dtype."""
        parts = [chunk.to(device=self.space.device, dtype=self.space.dtype) for chunk in self.chunks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).movedim(0, -2)
