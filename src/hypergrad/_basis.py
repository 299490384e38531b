"""Several vectors of one space, stacked: Krylov bases, sketches and blocks of right hand sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._vector import Vector


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
            rows = [leaves[i].reshape(self.m, *self.space.row_shapes[i]) for i in group]
            chunks.append(rows[0] if len(rows) == 1 else torch.cat(rows, -1))
        return self._like(chunks)

    def plus(self, other: Basis, a: float) -> Basis:
        """The basis of vⱼ + a · otherⱼ."""
        return self._like([torch.add(v, w, alpha=a) for v, w in zip(self.chunks, other.chunks, strict=True)])

    def matrix(self) -> Tensor:
        """The rows as one tensor [m, n] (or [B, m, n]) in the widest dtype."""
        parts = [chunk.to(device=self.space.device, dtype=self.space.dtype) for chunk in self.chunks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).movedim(0, -2)
