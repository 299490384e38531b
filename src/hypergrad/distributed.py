"""Losses over many ranks: `replicated` and `gathered` make derivatives of any order those of all ranks' data.

Two functions, each the transpose of the other, are applied to tensors that are equal on all ranks:

    copy: x ↦ x on every rank,  backward: the mean of the ranks' gradients
    mean: x ↦ the mean over ranks,  backward: the gradient as it is

A loss of a rank's own data, evaluated at copies of params and hparams, has a gradient that is the mean of all ranks'
gradients, and so have its Hessian products. Solvers, unrolled steps, meta-learning and trackers then do the same on
every rank with the same numbers, and need no other communication. (The mean of the ranks' solutions would not be the
solution of the mean problem.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from . import _torch
from ._tree import PyTree, split


class CopyToRanks(torch.autograd.Function):
    """Identity; backward: the mean over ranks, in one collective for all tensors of a dtype and device."""

    @staticmethod
    def forward(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # All ranks must reduce the same tensors: those whose gradients this pass needs are the same on all ranks.
        wanted = _torch.wanted_inputs(ctx, skip=1)
        means: list[Any] = [None] * len(grads)
        found = MeanOverRanks.apply(ctx.group, *(grads[i] for i in wanted)) if wanted else ()
        for i, mean in zip(wanted, found, strict=True):
            means[i] = mean
        return (None, *means)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], group: Any, *tensors: Tensor) -> Any:
        return CopyToRanks.apply(group, *tensors), in_dims[1:]


class MeanOverRanks(torch.autograd.Function):
    """The mean over ranks; backward: identity."""

    @staticmethod
    def forward(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_reduced(tensors, group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, *CopyToRanks.apply(ctx.group, *grads))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return MeanOverRanks.apply(ctx.group, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], group: Any, *tensors: Tensor) -> Any:
        return MeanOverRanks.apply(group, *tensors), in_dims[1:]


class GatherShards(torch.autograd.Function):
    """Sharded tensors as whole ones on every rank; backward: the mean over ranks, sharded as the inputs.

    (The backward of DTensor's own conversions has a derivative of zero, so products with a transpose would be lost.)
    """

    @staticmethod
    def forward(*tensors: Any) -> tuple[Tensor, ...]:
        return tuple(x.detach().full_tensor() for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.layouts = [(x.device_mesh, x.placements) for x in inputs]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wanted = _torch.wanted_inputs(ctx, skip=0)
        found = MeanToShards.apply([ctx.layouts[i] for i in wanted], *(grads[i] for i in wanted)) if wanted else ()
        means: list[Any] = [None] * len(grads)
        for i, mean in zip(wanted, found, strict=True):
            means[i] = mean
        return tuple(means)


class MeanToShards(torch.autograd.Function):
    """The mean over ranks, sharded; backward: the whole tensors."""

    @staticmethod
    def forward(layouts: list[Any], *tensors: Tensor) -> tuple[Any, ...]:
        from torch.distributed.tensor import DTensor, Partial

        means = []
        for x, (mesh, placements) in zip(tensors, layouts, strict=True):
            mean = DTensor.from_local(x.detach(), mesh, [Partial("avg")] * mesh.ndim, run_check=False)
            means.append(mean.redistribute(placements=placements))
        return tuple(means)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (None, *GatherShards.apply(*grads))


def _reduced(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """The means over ranks, in new memory."""
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        kinds.setdefault((x.dtype, x.device), []).append(i)
    means: list[Any] = list(tensors)
    for places in kinds.values():
        flat = torch.cat([tensors[i].reshape(-1) for i in places])
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
        for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
            means[i] = part.view(tensors[i].shape)
    return means


def replicated(tree: PyTree, group: Any = None) -> PyTree:
    """The same tensors, with respect to which derivatives of any order are means over ranks.

        inner_loss = lambda w, h: local_loss(replicated(w), replicated(h))

    Args:
        tree: params or hparams, equal on all ranks; one call for several trees takes one collective for all.
        group: a process group; None: all ranks.

    Raises: RuntimeError without a process group; TypeError for sharded tensors, which are for `gathered`.
    Cost: in every reverse pass one all-reduce of as many numbers as the tensors have whose gradients it needs.
    Source: Shoeybi et al. 2019 (Megatron-LM), section 3, the conjugate operators f and g, here with means.

    Example:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> w, lam = torch.tensor(2.0), torch.tensor(2.0, requires_grad=True)
        >>> def inner_loss(w, lam):
        ...     w, lam = hg.distributed.replicated((w, lam))
        ...     return (w - lam) ** 2  # on this rank's rows
        >>> hg.implicit.grad(
        ...     lambda w, lam: hg.distributed.replicated(w) ** 2, inner_loss=inner_loss, params=w, hparams=lam
        ... ).grads
        tensor(4.)
        >>> torch.distributed.destroy_process_group()
    """
    _check_started()
    tensors, rebuild = split(tree)
    if any(hasattr(x, "placements") for x in tensors):
        raise TypeError("replicated is for tensors that every rank holds whole; sharded ones (DTensor) go to gathered")
    return rebuild(CopyToRanks.apply(group, *tensors)) if tensors else tree


def gathered(tree: PyTree, group: Any = None) -> PyTree:
    """Sharded tensors (DTensor, FSDP2's parameters) as whole ones; derivatives are means over ranks, and sharded alike.

    Other tensors are treated as by `replicated`. Every rank holds the whole tensors while its graph lives.

    Args:
        tree: params or hparams.
        group: the process group for tensors that are not sharded.

    Cost: an all-gather; in every reverse pass a reduce-scatter.

    Example:
        >>> from torch.distributed.tensor import Shard, distribute_tensor
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> mesh = torch.distributed.init_device_mesh("cpu", (1,))
        >>> w = distribute_tensor(torch.ones(4), mesh, [Shard(0)]).requires_grad_()
        >>> (gradient,) = torch.autograd.grad((hg.distributed.gathered(w) ** 2).sum(), w)
        >>> gradient.to_local(), gradient.placements
        (tensor([2., 2., 2., 2.]), (Shard(dim=0),))
        >>> torch.distributed.destroy_process_group()
    """
    _check_started()
    tensors, rebuild = split(tree)
    whole: list[Any] = list(tensors)
    plain = [i for i, x in enumerate(tensors) if not hasattr(x, "placements")]
    if plain:
        for i, x in zip(plain, CopyToRanks.apply(group, *(tensors[i] for i in plain)), strict=True):
            whole[i] = x
    sharded = [i for i in range(len(tensors)) if i not in plain]
    if sharded:
        for i, x in zip(sharded, GatherShards.apply(*(tensors[i] for i in sharded)), strict=True):
            whole[i] = x
    return rebuild(whole)


def call(module: nn.Module, *args: object, group: Any = None, **kwargs: object) -> Any:
    """module(*args), whose derivatives of any order with respect to the live parameters are means over ranks.

    Args:
        module: a module that is equal on every rank, except for its buffers, which each rank has for itself. A
            DistributedDataParallel wrapper is removed.
        group: a process group; None: all ranks.

    Raises: TypeError for a module sharded by FSDP2: its hooks give no graph for second derivatives.

    Example:
        >>> import os
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> call(torch.nn.Linear(3, 2), torch.ones(3)).shape
        torch.Size([2])
        >>> torch.distributed.destroy_process_group()
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    if _is_fully_sharded(module):
        raise TypeError(
            "FSDP2's hooks give no graph for second derivatives: copy the model before fully_shard and evaluate the "
            "copy by torch.func.functional_call at hg.distributed.gathered(its parameters), or use an algorithm "
            "without second derivatives (bilevel.F2SA, BOME, SAMA), which takes the model as it is"
        )
    moved = {name: x for name, x in module.named_parameters() if x.requires_grad}
    return torch.func.functional_call(module, replicated(moved, group), args, kwargs)


def everywhere(loss: Callable[..., Any], group: Any = None) -> Callable[..., Any]:
    """The loss of all ranks' data, from each rank's own loss: it is evaluated `together`, at `gathered` tensors.

        inner_loss = hg.distributed.everywhere(local_loss)

    Args:
        loss: (params, hparams, ...) ↦ the loss of this rank's data; further arguments are passed through. It must not
            communicate, as the forward pass of an FSDP2 module does.
        group: a process group; None: all ranks.

    Raises: what loss raises, and on the other ranks a RuntimeError that names the rank that failed.
    Cost: that of `gathered`, and for each evaluation that of `together`.

    Example:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> w, lam = torch.tensor(3.0), torch.tensor(3.0, requires_grad=True)
        >>> inner = everywhere(lambda w, lam: (w - lam) ** 2)
        >>> hg.implicit.grad(everywhere(lambda w, lam: w**2), inner_loss=inner, params=w, hparams=lam).grads
        tensor(6.)
        >>> torch.distributed.destroy_process_group()
    """

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        held = gathered(args[:2], group)
        with together(group):
            return loss(*held, *args[2:], **kwargs)

    return evaluated


def share(count: float, group: Any = None, device: torch.device | str | None = None) -> float:
    """The weight of this rank's mean over `count` rows in the mean over all ranks' rows: count · ranks / Σ counts.

    The ranks' losses are averaged with equal weights; where batches differ in size, multiply each by its share.

    Args:
        count: rows of this rank's batch.
        group: a process group; None: all ranks.
        device: the device on which the counts are summed, such as "cuda" for NCCL; the CPU by default.

    Example:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> hg.distributed.share(10)  # all rows are this rank's
        1.0
        >>> torch.distributed.destroy_process_group()
    """
    _check_started()
    total = torch.tensor(float(count), dtype=torch.float64, device="cpu" if device is None else device)
    torch.distributed.all_reduce(total, group=group)
    return count * torch.distributed.get_world_size(group) / float(total)


@contextmanager
def together(group: Any = None) -> Iterator[None]:
    """A context in which an error on one rank becomes, at the end, an error on all ranks.

        def inner_loss(w, h):
            w, h = replicated((w, h))
            with together():
                return local_loss(w, h, next(batches))

    Without it a rank that fails leaves the others waiting in their next collective until its process ends (gloo) or a
    timeout passes (NCCL), because it cannot know in which collective they are. For the same reason nothing in the block
    may communicate: it may load a batch or evaluate a loss, but run no reverse pass through `replicated`.

    Args:
        group: a process group; None: all ranks.

    Raises: on the ranks that did not fail, a RuntimeError that names one that did.
    Cost: an all-reduce of one number, which is read from the device.

    Example:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> batches = iter([torch.ones(3)])
        >>> with hg.distributed.together():
        ...     batch = next(batches)  # what may fail on one rank alone
        >>> batch
        tensor([1., 1., 1.])
        >>> torch.distributed.destroy_process_group()
    """
    _check_started()
    try:
        yield
    except Exception:
        _first_to_fail(True, group)
        raise
    rank = _first_to_fail(False, group)
    if rank is not None:
        raise RuntimeError(f"rank {rank} failed in a block of hg.distributed.together; its own error says why")


def _first_to_fail(failed: bool, group: Any) -> int | None:
    """The lowest rank in the group whose block failed; None if none did."""
    size = torch.distributed.get_world_size(group)
    on_cpu = any(name in torch.distributed.get_backend(group) for name in ("gloo", "mpi"))
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    rank = torch.distributed.get_rank(group) if failed else size
    lowest = torch.tensor(rank, device=device)
    torch.distributed.all_reduce(lowest, op=torch.distributed.ReduceOp.MIN, group=group)
    return None if int(lowest) == size else int(lowest)


def _check_started() -> None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group() on every rank (torchrun "
            "sets the environment variables that it needs)"
        )


def _is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's hooks (fully_shard) act on a module or on a part of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and any(isinstance(part, kind) for part in module.modules())
