"""Tangents Z = ∂w_t/∂λ, and how a step pushes them on: Z ← ∂₁Φ Z + ∂₂Φ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _graph
from .._autodiff import Linearisation
from .._tree import describe, full
from ._steps import KIND, Run

PASS = 2**20  # numbers in the tangents of one vectorised pass; measured: above it one at a time is as fast
NO_DERIVATIVE = (
    "forward mode differentiates the reverse pass of step once more, and an operation in step has no such derivative "
    "({}): use unroll.reverse"
)
NOT_ADJOINT = (
    "the derivative of step and its transpose disagree (⟨c, ∂Φ u⟩ = {:.6e}, ⟨∂Φᵀ c, u⟩ = {:.6e}): the backward of an "
    "autograd.Function in step is not differentiable (once_differentiable, .data, .detach() or no_grad in it?), or "
    "step overflows. Use unroll.reverse, which does not differentiate it"
)


def placed(values: Tensor, like: Tensor, lead: int = 0) -> Tensor:
    """Values of `like`'s shape after `lead` more axes, in its dtype, on its device, and sharded as it is."""
    values = values.to(device=like.device, dtype=like.dtype)
    if not hasattr(like, "placements"):
        return values
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    sharded: Any = like
    placements = [Shard(p.dim + lead) if isinstance(p, Shard) else Replicate() for p in sharded.placements]
    return distribute_tensor(values, sharded.device_mesh, placements)


def _products(z: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """⟨z_i, a⟩ for each of the stacked z_i."""
    if not hasattr(z, "placements"):
        return z.reshape(len(z), a.numel()).to(dtype) @ a.reshape(-1).to(dtype)
    # One shared along a later axis cannot be flattened.
    return full((z.to(dtype) * a.to(dtype)).sum(tuple(range(1, z.ndim)))) if a.ndim else full(z.to(dtype) * a.to(dtype))


@dataclass(frozen=True)
class Tangents:
    """Z, along the entries of λ that something has depended on. Along the others it is zero, and not kept.

    Attributes:
        like: the leaves of λ that require grad, detached.
        rows: the entries of λ, counted over all these leaves, that are kept.
        leaves: [len(rows), *shape] for each floating point tensor of params.
        reached: for each leaf of λ that requires grad, whether something has depended on it.
    """

    like: list[Tensor]
    rows: Tensor
    leaves: list[Tensor]
    reached: list[bool]

    @property
    def count(self) -> int:
        return sum(x.numel() for x in self.like)

    def with_zeros(self, fresh: Tensor, params: Sequence[Tensor]) -> Tangents:
        """With zeros for more entries of λ; params: the floating point tensors of w."""
        if not len(fresh):
            return self
        zeros = [placed(torch.zeros(len(fresh), *x.shape, device=x.device), x, 1) for x in params]
        leaves = [torch.cat(pair) for pair in zip(self.leaves, zeros, strict=True)]
        return replace(self, rows=torch.cat([self.rows, fresh]), leaves=leaves)

    def gradient(self, alpha: Sequence[Tensor]) -> list[Tensor | None]:
        """Zᵀ ∇₁E, summed in the widest dtype; None for a leaf that nothing has depended on."""
        dtype = torch.float32
        for a in alpha:
            dtype = torch.promote_types(dtype, a.dtype)
        total = torch.zeros(len(self.rows), dtype=dtype, device=alpha[0].device)
        for z, a in zip(self.leaves, alpha, strict=True):
            total = total + _products(z, a, dtype).to(total.device)
        flat = total.new_zeros(self.count).index_copy(0, self.rows.to(total.device), total)
        parts = zip(flat.split([x.numel() for x in self.like]), self.like, self.reached, strict=True)
        return [placed(h.reshape(x.shape), x) if reached else None for h, x, reached in parts]


class Push:
    """Z ← ∂₁Φ Z + ∂₂Φ at one step of a run after the other."""

    def __init__(self, run: Run, chunk: int | None):
        self.hparams, self.start_leaves = run.differentiated, run.start
        self.floats = [x for x in run.start if x.is_floating_point()]
        self.half = any(torch.finfo(x.dtype).bits < 32 for x in (*self.floats, *self.hparams))
        self.chunk = chunk or max(1, PASS // max(1, sum(x.numel() for x in self.floats)))
        self.kept: tuple[Tensor, list[Tensor]] | None = None
        # Its own generator, for the user's random numbers must be those of a plain run.
        draw = torch.Generator("cpu").manual_seed(0)
        self.probe = [placed(torch.randn(x.shape, generator=draw, device="cpu"), x) for x in self.floats]

    def start(self) -> Tangents:
        """Z₀ = ∂w₀/∂λ."""
        tangents = Tangents(
            like=[x.detach() for x in self.hparams],
            rows=torch.zeros(0, dtype=torch.long, device="cpu"),
            leaves=[placed(torch.zeros(0, *x.shape, device="cpu"), x, 1) for x in self.floats],
            reached=[False] * len(self.hparams),
        )
        if not _graph.depends(self.start_leaves, self.hparams):
            return tangents
        return self(tangents, [], self.start_leaves, check=True)

    def __call__(self, tangents: Tangents, leaves: list[Tensor], outputs: list[Tensor], check: bool) -> Tangents:
        inputs = [x for x in leaves if x.requires_grad]
        outputs = [y for y in outputs if y.is_floating_point()]
        linear = Linearisation(outputs, [*inputs, *self.hparams], probe=self.probe)
        with explained():
            tangents = self._begun(tangents, linear.pulled[len(inputs) :])
            pushed = self._columns(linear, tangents, len(inputs))
        if check and len(tangents.rows):
            last = slice(-self.chunk, None)
            columns = [*(z[last] for z in tangents.leaves[: len(inputs)]), *self.directions(tangents, last)]
            check_adjoint(self.probe, [z[last] for z in pushed], linear.pulled, columns)
        return replace(tangents, leaves=pushed)

    def _begun(self, tangents: Tangents, pulled: Sequence[Tensor | None]) -> Tangents:
        """With zeros for the entries of λ that this step is the first to depend on.

        These are found by ∂₂Φᵀc for a random c: it is 0 where the column of ∂₂Φ is.
        """
        reached = [old or g is not None for old, g in zip(tangents.reached, pulled, strict=True)]
        tangents = replace(tangents, reached=reached)
        if len(tangents.rows) == tangents.count:
            return tangents
        hit = []
        for g, x in zip(pulled, tangents.like, strict=True):
            if g is None or self.half:  # in half precision an entry could be 0 by chance
                hit.append(torch.full((x.numel(),), g is not None, device="cpu"))
            else:
                hit.append(full(g.detach() != 0).reshape(-1).cpu())
        fresh = torch.cat(hit).index_fill(0, tangents.rows, False).nonzero().squeeze(1)
        return tangents.with_zeros(fresh, self.floats)

    def whole(self, tangents: Tangents) -> Tangents:
        """With zeros for all that nothing has depended on."""
        if len(tangents.rows) == tangents.count:
            return tangents
        missing = torch.ones(tangents.count, dtype=torch.bool, device="cpu").index_fill(0, tangents.rows, False)
        return tangents.with_zeros(missing.nonzero().squeeze(1), self.floats)

    def units(self, rows: Tensor) -> list[Tensor]:
        """Unit vectors in the space of λ for these entries: [len(rows), *shape] for each leaf."""
        dtype, device = self.hparams[0].dtype, self.hparams[0].device
        unit = torch.zeros(len(rows), sum(x.numel() for x in self.hparams), dtype=dtype, device=device)
        unit[torch.arange(len(rows), device=device), rows.to(device)] = 1
        parts = unit.split([x.numel() for x in self.hparams], 1)
        return [
            placed(u.reshape(len(rows), *x.shape).contiguous(), x, 1) for u, x in zip(parts, self.hparams, strict=True)
        ]

    def directions(self, tangents: Tangents, own: slice) -> list[Tensor]:
        """Unit vectors for some of the entries that are kept; made once while they are the same at each step."""
        if len(tangents.rows) > self.chunk:
            return self.units(tangents.rows[own])
        if self.kept is None or self.kept[0] is not tangents.rows:
            self.kept = tangents.rows, self.units(tangents.rows)
        return self.kept[1]

    def _columns(self, linear: Linearisation, tangents: Tangents, inputs: int) -> list[Tensor]:
        parts = []
        for begin in range(0, len(tangents.rows), self.chunk):
            own = slice(begin, begin + self.chunk)
            columns = [*(z[own] for z in tangents.leaves[:inputs]), *self.directions(tangents, own)]
            parts.append(pushed_by(linear, columns))
        if len(parts) < 2:
            return parts[0] if parts else tangents.leaves
        return [torch.cat(leaves) for leaves in zip(*parts, strict=True)]


def pushed_by(linear: Linearisation, columns: Sequence[Tensor]) -> list[Tensor]:
    """∂Φ u for a stack of u."""
    if len(columns[0]) > 1:
        return linear.jvp_many(columns)
    return [z.unsqueeze(0) for z in linear.jvp([x.squeeze(0) for x in columns])]


@contextmanager
def explained() -> Iterator[None]:
    """torch's error for an operation without a second derivative says what to do."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in ("derivative for", "double backward")):
            raise RuntimeError(NO_DERIVATIVE.format(error)) from error
        raise


def check_adjoint(
    probe: Sequence[Tensor], pushed: Sequence[Tensor], pulled: Sequence[Tensor | None], columns: Sequence[Tensor]
) -> None:
    """⟨c, ∂Φ u⟩ = ⟨∂Φᵀ c, u⟩ for the sum u of columns; not so where a reverse pass hides how it depends on c."""
    left, left_scale = _dot(probe, pushed)
    right, right_scale = _dot(pulled, columns)
    eps = max(torch.finfo(c.dtype).eps for c in probe)
    if abs(left - right) > eps**0.25 * (left_scale + right_scale):
        raise RuntimeError(NOT_ADJOINT.format(left, right))


def _dot(xs: Sequence[Tensor | None], columns: Sequence[Tensor]) -> tuple[float, float]:
    """⟨x, Σ columns⟩, and the size that it has with random signs; read at once."""
    sums: list[Tensor] = []
    for x, each in zip(xs, columns, strict=True):
        if x is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            product = full(x.detach().to(wide) * each.sum(0, dtype=wide))
            sums.append(torch.stack([product.sum(), product.square().sum()]))
    total, square = torch.stack([s.to(sums[0]) for s in sums]).sum(0).tolist() if sums else (0.0, 0.0)
    return total, square**0.5


def checked(tangents: Tangents, run: Run) -> Tangents:
    """The tangents of an earlier result, if they are of this λ."""
    kinds, given = [*map(KIND, tangents.like)], [*map(KIND, run.differentiated)]
    if kinds != given:
        due, got = ("; ".join(describe(*kind) for kind in each) for each in (kinds, given))
        raise ValueError(
            f"hparams that require grad must be like those of the result to go on from: expected {due}; got {got}"
        )
    return tangents
