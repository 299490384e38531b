"""Several vectors of one space, stacked: Krylov bases, sketches and blocks of right hand sides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ._vector import Space, Vector

AT_ONCE = 2**17  # the most intermediate numbers that one operation on several vectors may make


class Basis:
    """Up to m vectors of one space, stored as a tensor [m, ...] for each chunk: every vector is contiguous in it."""

    def __init__(self, like: Vector, m: int):
        like.space.require_plain()
        self.space, self.m = like.space, m
        self.chunks = [chunk.new_empty(m, *chunk.shape) for chunk in like.chunks]

    @classmethod
    def _of(cls, space: Space, chunks: list[Tensor]) -> Basis:
        new = object.__new__(cls)
        new.space, new.m, new.chunks = space, len(chunks[0]), chunks
        return new

    @classmethod
    def from_rows(cls, like: Vector, rows: Tensor) -> Basis:
        """The basis whose `matrix()` is this tensor: [B, m, n], or [m, n] for the same vectors in every system."""
        like.space.require_plain()
        flat = rows.expand(*like.space.batch_shape, *rows.shape[-2:]).movedim(-2, 0)
        return cls._of(like.space, like.space.split(flat))

    def __setitem__(self, j: int, vector: Vector) -> None:
        for chunk, new in zip(self.chunks, vector.chunks, strict=True):
            chunk[j] = new

    def __getitem__(self, j: int) -> Vector:
        """A view of vector j."""
        return Vector(self.space, [chunk[j] for chunk in self.chunks])

    def coefficients(self, vector: Vector, count: int) -> Tensor:
        """(⟨v₀, x⟩, …, ⟨v_{count−1}, x⟩): [count], or [B, count]."""
        parts = []
        for chunk, x in zip(self.chunks, vector.chunks, strict=True):
            if not self.space.batch_dims:
                part = chunk[:count] @ x
            elif count * x.numel() <= AT_ONCE:  # a batched matrix product takes two to four times as long
                part = torch.linalg.vecdot(chunk[:count], x).movedim(0, -1)
            else:
                part = torch.stack([torch.linalg.vecdot(chunk[j], x) for j in range(count)], -1)
            parts.append(self.space.cast(part))
        return reduce(add, parts)

    def combine(self, weights: Tensor) -> Vector:
        """Σⱼ weightsⱼ vⱼ for weights of shape [count], or [B, count]."""
        count, chunks = weights.shape[-1], []
        for chunk in self.chunks:
            own, vectors = weights.to(device=chunk.device, dtype=chunk.dtype).contiguous(), chunk[:count]
            if self.space.batch_dims and count < 4 and vectors.numel() <= AT_ONCE:
                chunks.append((vectors * own.movedim(-1, 0).unsqueeze(-1)).sum(0))
            else:
                chunks.append((own.unsqueeze(-2) @ vectors.movedim(0, -2)).squeeze(-2))
        return Vector(self.space, chunks)

    def leaves(self) -> list[Tensor]:
        """All m vectors as tensors with one more leading axis: [m, *shape] in leaf order."""
        return self.space.leaves_of(self.chunks, (self.m,))

    def with_leaves(self, leaves: Sequence[Tensor]) -> Basis:
        """The basis in the same space whose `leaves()` are these tensors [m, *shape]."""
        return self._of(self.space, self.space.chunks_of(leaves, (self.m,)))

    def plus(self, other: Basis, a: float) -> Basis:
        """The basis of the vectors vⱼ + a · otherⱼ."""
        return self._of(self.space, [torch.add(v, w, alpha=a) for v, w in zip(self.chunks, other.chunks, strict=True)])

    def matrix(self) -> Tensor:
        """The rows as one tensor [m, n] (or [B, m, n]) in the widest dtype."""
        return self.space.joined(self.chunks).movedim(0, -2)
