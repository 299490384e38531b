"""Forward mode through the steps: tangents are carried along with the iterate, and no earlier iterate is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _graph, _torch
from .._autodiff import Linearisation
from .._options import check_whole
from .._torch import random_state_kept_on_error
from .._tree import KIND, PyTree, describe, full
from ._compiled import checked_backend
from ._compiled_push import CompiledPushes
from ._steps import Batches, Run, add, leaf

PASS_SIZE = 2**20  # tangent entries in one vectorised pass; above it, measured, one tangent at a time is as fast
COMPLEX = (
    "forward mode takes no complex tensors: use unroll.reverse, or pass torch.view_as_real(x) and use "
    "torch.view_as_complex in step"
)
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
    """values, of `like`'s shape after `lead` leading axes, with the dtype, device and sharding of `like`."""
    values = values.to(device=like.device, dtype=like.dtype)
    if not hasattr(like, "placements"):
        return values
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    sharded: Any = like
    placements = [Shard(p.dim + lead) if isinstance(p, Shard) else Replicate() for p in sharded.placements]
    return distribute_tensor(values, sharded.device_mesh, placements)


def _products(z: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """⟨z_i, a⟩ for each z_i stacked in z."""
    if not hasattr(z, "placements"):
        return z.reshape(len(z), a.numel()).to(dtype) @ a.reshape(-1).to(dtype)
    # A tensor that is sharded along a later axis cannot be flattened.
    return full((z.to(dtype) * a.to(dtype)).sum(tuple(range(1, z.ndim)))) if a.ndim else full(z.to(dtype) * a.to(dtype))


@dataclass(frozen=True)
class Tangents:
    """Z = ∂w/∂λ for the entries of λ that have been used so far. For the others it is zero, and not stored."""

    like: list[Tensor]  # the leaves of λ that require grad, detached
    rows: Tensor  # the entries of λ, numbered over all these leaves, whose tangents are stored
    leaves: list[Tensor]  # [len(rows), *shape] for each floating point tensor of params
    reached: list[bool]  # for each leaf of λ that requires grad, whether it has been used

    @property
    def count(self) -> int:
        return sum(x.numel() for x in self.like)

    def gradient(self, alpha: Sequence[Tensor]) -> list[Tensor | None]:
        """Zᵀ ∇₁E, summed in the widest dtype; None for a leaf of λ that has not been used."""
        dtype = torch.float32
        for a in alpha:
            dtype = torch.promote_types(dtype, a.dtype)
        total = torch.zeros(len(self.rows), dtype=dtype, device=alpha[0].device)
        for z, a in zip(self.leaves, alpha, strict=True):
            total = total + _products(z, a, dtype).to(total.device)
        flat = total.new_zeros(self.count).index_copy(0, self.rows.to(total.device), total)
        parts = zip(flat.split([x.numel() for x in self.like]), self.like, self.reached, strict=True)
        return [placed(h.reshape(x.shape), x) if reached else None for h, x, reached in parts]


@dataclass(frozen=True)
class ForwardResult:
    """A hypergradient through the steps so far, and what a later call needs to continue from here.

    Attributes:
        grads: ∇f(λ), in the structure of hparams; zeros for a leaf that does not require grad or is not used.
        params: w_t, in the start's structure.
        outer_value: E(w_t, λ).
        evaluations: the number of evaluations of step in this call.
        steps: t, the number of steps since the start, in this and all earlier calls.
        tangents: Z = ∂w_t/∂λ.
        compiled: what was compiled, and how long that took; None if nothing was.

    Example:
        >>> step = lambda w, lam: w - 0.5 * (w - lam)
        >>> lam, start = torch.tensor(2.0, requires_grad=True), torch.tensor(0.0)
        >>> run = hg.unroll.forward(step, start, lam, lambda w, lam: w**2 / 2, steps=2)
        >>> run.grads, run.params  # w₂ = ¾λ + ¼w₀
        (tensor(1.1250), tensor(1.5000))
        >>> hg.unroll.forward(step, run, lam, lambda w, lam: w**2 / 2, steps=1).steps  # continues from there
        3
    """

    grads: PyTree
    params: PyTree
    outer_value: Tensor
    evaluations: int
    steps: int
    tangents: Tangents
    compiled: str | None = None


def forward(
    step: Callable[..., PyTree],
    start: PyTree | ForwardResult,
    hparams: PyTree,
    outer_loss: Callable[[PyTree, PyTree], Tensor],
    steps: int,
    *,
    chunk: int | None = None,
    batches: Batches = None,
    with_time: bool = False,
    allow_detached: bool = False,
    compile: bool | str = False,
) -> ForwardResult:
    """Gradient of E(w_T(λ), λ) through T steps of w_{t+1} = Φ_t(w_t, λ), in forward mode. Writes no .grad.

        Z₀ = ∂w₀/∂λ,      Z_{t+1} = ∂₁Φ_t Z_t + ∂₂Φ_t,      ∇f(λ) = ∇₂E(w_T, λ) + Z_Tᵀ ∇₁E(w_T, λ)

    The result is that of `reverse` up to rounding. Memory does not depend on T; memory and time are proportional to the
    number of hyperparameters. No step is recomputed: random numbers are drawn as in a plain run of the steps, each
    batch is drawn once and in order, and step may use what cannot be replayed (an iterator, a simulator). Compute the
    inner gradient with create_graph=True: without it second derivatives are lost, with a warning.

    Online (real-time mode): `forward(step, result, hparams, outer_loss, more)` continues from an earlier result, and
    hparams may be updated in between. The update leaves the tangents as they are. With λ_s the hparams of step s,
    grads is then the derivative of E(w_t(λ₀+δ, …, λ_{t−1}+δ), λ_t+δ) at δ = 0, where δ shifts all of them at once.

    Sharing: a schedule with one value for each window of steps, `PerStep(λ.repeat_interleave(length))`, has few
    hyperparameters for any number of steps. A tangent costs nothing before the first step that uses its hyperparameter.

    Args:
        step, outer_loss, hparams, with_time, allow_detached: as in `reverse`; no complex tensors.
        start: w₀ as in `reverse`, or an earlier result to continue from.
        steps: T, or the number of further steps.
        chunk: the number of tangents that one vectorised pass pushes through a step, which takes `chunk` times the
            memory of a step's graph. By default as many as have about a million entries, and at least one.
        batches: batch t for step t, by index or by call; t is counted from the start, not from an earlier result.
        compile: as in `reverse`; one function evaluates a step and pushes a chunk of the tangents of all hparams.

    Returns:
        A ForwardResult.

    Raises, Warns: as `reverse`; also RuntimeError if an operation in step cannot be differentiated once more often
        than `reverse` needs.
    Cost: for each step one evaluation, one reverse pass with a graph, and for each tangent one reverse pass through
        that graph (vectorised over a chunk): measured, 2.3 + 1.5k times the step alone for k tangents of an MLP's
        270,000 weights. Memory: three iterates for each tangent, the graph of one step, and `chunk` times the working
        memory of its reverse pass. While some hyperparameters have not been used yet, one device synchronisation for
        each step. At t = 0, 1, 2, 4, 8, … the derivative is compared with its transpose (two synchronisations).
    Source: Franceschi et al. 2017, section 3.2 (forward-HG) and 3.3 (real-time, RTHO); Micaelli and Storkey 2021
        (sharing over windows, FDS).

    Example:
        w ← w / 2 + λ from 0 gives w₃ = 1.75 λ, and three steps later w₆ = 1.96875 λ.

        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> result = forward(lambda w, lam: w / 2 + lam, torch.tensor(0.0), lam, lambda w, lam: w, steps=3)
        >>> result.grads
        tensor(1.7500)
        >>> forward(lambda w, lam: w / 2 + lam, result, lam, lambda w, lam: w, steps=3).grads
        tensor(1.9688)
    """
    check_whole(steps=(steps, 0), chunk=(chunk, 1))
    backend = checked_backend(compile)
    earlier = start if isinstance(start, ForwardResult) else None
    begin, begun = (0, start) if earlier is None else (earlier.steps, earlier.params)
    run = Run(step, outer_loss, begun, hparams, batches, begin + steps, with_time, allow_detached)
    if any(x.is_complex() for x in (*run.start, *run.outer)):
        raise TypeError(COMPLEX)
    with random_state_kept_on_error([*run.start, *run.outer]):
        with run.differentiating():
            push = Push(run, chunk)
            tangents = push.start() if earlier is None else _checked(earlier.tangents, run)
            tensors = [x.detach().clone() for x in run.start]
            rebuild, compiled = run.rebuild, CompiledPushes(run, push, backend)
            for t in range(begin, begin + steps):
                if pushed := compiled(tensors, tangents, t):
                    tensors, tangents = pushed
                    continue
                leaves = [leaf(x) for x in tensors]
                with _torch.correct_derivatives(dense=True):
                    outputs, rebuild = run.evaluate(leaves, rebuild, t)
                tangents = push(tangents, leaves, outputs, check=t & (t - 1) == 0)
                tensors = [x.detach() for x in outputs]
                del leaves, outputs
            # step may have returned a leaf of hparams, which the user will update in place.
            alpha, direct = run.close([x.clone() for x in tensors], rebuild)
        return ForwardResult(
            grads=run.hypergradient(add(direct, tangents.gradient(alpha)), complain=True),
            params=run.params,
            outer_value=run.outer_value,
            evaluations=run.evaluations,
            steps=begin + steps,
            tangents=tangents,
            compiled=compiled.report,
        )


class Push:
    """Pushes the tangents through one step of a run after another: Z ← ∂₁Φ Z + ∂₂Φ."""

    def __init__(self, run: Run, chunk: int | None):
        self.hparams, self.start_leaves = run.differentiated, run.start
        self.floats = [x for x in run.start if x.is_floating_point()]
        self.half = any(torch.finfo(x.dtype).bits < 32 for x in (*self.floats, *self.hparams))
        self.chunk = chunk or max(1, PASS_SIZE // max(1, sum(x.numel() for x in self.floats)))
        self.kept: tuple[Tensor | None, list[Tensor]] = None, []
        # A separate generator, because the user's random numbers must be those of a plain run.
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
        try:
            tangents = self._with_used(tangents, linear.pulled[len(inputs) :])
            return replace(tangents, leaves=self._columns(linear, tangents, len(inputs), check))
        except RuntimeError as error:
            if any(words in str(error) for words in ("derivative for", "double backward")):
                raise RuntimeError(NO_DERIVATIVE.format(error)) from error
            raise

    def _with_used(self, tangents: Tangents, pulled: Sequence[Tensor | None]) -> Tangents:
        """Add zero tangents for the entries of λ that this step is the first to use: ∂₂Φᵀc ≠ 0 there for a random c."""
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
        return self.with_entries(tangents, torch.cat(hit))

    def with_entries(self, tangents: Tangents, hit: Tensor) -> Tangents:
        """Add zero tangents for the entries of λ that `hit` marks, unless they are already stored."""
        if not len(fresh := hit.index_fill(0, tangents.rows, False).nonzero().squeeze(1)):
            return tangents
        zeros = [placed(torch.zeros(len(fresh), *x.shape, device=x.device), x, 1) for x in self.floats]
        leaves = [torch.cat(pair) for pair in zip(tangents.leaves, zeros, strict=True)]
        return replace(tangents, rows=torch.cat([tangents.rows, fresh]), leaves=leaves)

    def units(self, rows: Tensor) -> list[Tensor]:
        """Unit vectors in the space of λ for these entries: [len(rows), *shape] for each leaf."""
        dtype, device = self.hparams[0].dtype, self.hparams[0].device
        unit = torch.zeros(len(rows), sum(x.numel() for x in self.hparams), dtype=dtype, device=device)
        unit[torch.arange(len(rows), device=device), rows.to(device)] = 1
        parts = unit.split([x.numel() for x in self.hparams], 1)
        pairs = zip(parts, self.hparams, strict=True)
        return [placed(u.reshape(len(rows), *x.shape).contiguous(), x, 1) for u, x in pairs]

    def directions(self, tangents: Tangents, own: slice) -> list[Tensor]:
        """Unit vectors for the slice `own` of the stored entries, rebuilt only when these change."""
        rows = tangents.rows if len(tangents.rows) <= self.chunk else tangents.rows[own]
        if self.kept[0] is not rows:
            self.kept = rows, self.units(rows)
        return self.kept[1]

    def _columns(self, linear: Linearisation, tangents: Tangents, inputs: int, check: bool) -> list[Tensor]:
        parts, count = [], len(tangents.rows)
        for begin in range(0, count, self.chunk):
            own = slice(begin, begin + self.chunk)
            columns = [*(z[own] for z in tangents.leaves[:inputs]), *self.directions(tangents, own)]
            parts.append(self.along(linear, columns, check and begin + self.chunk >= count))
        if len(parts) < 2:
            return parts[0] if parts else tangents.leaves
        return [torch.cat(leaves) for leaves in zip(*parts, strict=True)]

    def along(self, linear: Linearisation, columns: Sequence[Tensor], check: bool = False) -> list[Tensor]:
        """∂Φ u for each of the stacked u; check: whether to compare with the transpose."""
        pushed = linear.jvp_many(columns)
        if check:
            _check_adjoint(self.probe, pushed, linear.pulled, columns)
        return pushed


def _check_adjoint(
    probe: Sequence[Tensor], pushed: Sequence[Tensor], pulled: Sequence[Tensor | None], columns: Sequence[Tensor]
) -> None:
    """Check ⟨c, ∂Φ u⟩ = ⟨∂Φᵀ c, u⟩, u the sum of columns. It fails if a custom backward hides that it depends on c."""
    left, left_scale = _dot(probe, pushed)
    right, right_scale = _dot(pulled, columns)
    eps = max(torch.finfo(c.dtype).eps for c in probe)
    if abs(left - right) > eps**0.25 * (left_scale + right_scale):
        raise RuntimeError(NOT_ADJOINT.format(left, right))


def _dot(xs: Sequence[Tensor | None], columns: Sequence[Tensor]) -> tuple[float, float]:
    """⟨x, Σ columns⟩, and the norm of its terms (its size if their signs were random), in one read from the device."""
    sums: list[Tensor] = []
    for x, each in zip(xs, columns, strict=True):
        if x is not None:
            wide = torch.promote_types(x.dtype, torch.float32)
            product = full(x.detach().to(wide) * each.sum(0, dtype=wide))
            sums.append(torch.stack([product.sum(), product.square().sum()]))
    total, square = torch.stack([s.to(sums[0]) for s in sums]).sum(0).tolist() if sums else (0.0, 0.0)
    return total, square**0.5


def _checked(tangents: Tangents, run: Run) -> Tangents:
    """The tangents of an earlier result. Raises ValueError unless its hparams were like those of this run."""
    due, got = ("; ".join(describe(*KIND(x)) for x in each) for each in (tangents.like, run.differentiated))
    if due != got:
        raise ValueError(
            f"hparams that require grad must be like those of the result to continue from: expected {due}; got {got}"
        )
    return tangents
