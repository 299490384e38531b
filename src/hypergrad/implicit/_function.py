"""Implicit functions as ordinary differentiable values: the autograd.Functions LinearSolve, Adjoint and Root.

    LinearSolve:  x = A⁻¹ b  with  A = ∂₁F(w, λ)  or its transpose
        reverse:  b̄ = A⁻ᵀ x̄,   (w̄, λ̄) = −∂_(w,λ) ⟨b̄, A x⟩
        forward:  ẋ = A⁻¹ (ḃ − Ȧ x)
    Root:         w(λ) with F(w(λ), λ) = 0
        reverse:  λ̄ = −∂₂Fᵀ A⁻ᵀ w̄
        forward:  ẇ = −A⁻¹ ∂₂F λ̇

A third Function, Adjoint, computes A⁻ᵀ w̄ and λ̄ from one graph of F. All rules call LinearSolve again, on the
transposed operator, so derivatives of any order exist. A vmap over any Function is one batched solve on plain tensors,
so a solver may read its residuals under any transform. If a vmap maps only right hand sides, they are solved together
for one A (`Equation.base`). Only reverse products are used (a product with a Jacobian is the derivative of its
transposed product), because forward mode inside reverse mode is wrong through normalisation layers (torch 2.13).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _autodiff, _torch
from .._below import Leaves, lead_axes
from .._tree import filled
from ._equation import Equation, pull


def floating(leaves: Sequence[Tensor]) -> list[int]:
    """Indices of the leaves that can carry a derivative."""
    return [i for i, leaf in enumerate(leaves) if leaf.is_floating_point() or leaf.is_complex()]


def push(
    function: Callable[[Leaves], Leaves], leaves: Leaves, tangents: Leaves, wanted: Sequence[int], like: Leaves
) -> Leaves:
    """Σᵢ ∂function/∂leafᵢ tangentᵢ, with the shapes of `like`: the transpose of `pull`, linear in its cotangent."""
    zeros = tuple(torch.zeros_like(y) for y in like)
    return pull(lambda u: pull(function, leaves, u, wanted), zeros, tangents, range(len(zeros)))


def zeros_if_none(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


class LinearSolve(torch.autograd.Function):
    """x = A⁻¹ b for A = ∂₁F(w, λ), or A⁻ᵀ b if problem.transposed. Arguments: (problem, *b, *w, *λ)."""

    @staticmethod
    def forward(problem: Equation, *tensors: Tensor) -> Leaves:
        n = problem.count
        return problem.solved(tensors[:n], tensors[n : 2 * n], tensors[2 * n :])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        problem, *tensors = inputs
        saved = (*output, *tensors[problem.count :])
        ctx.problem = problem
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *x_bar: Tensor) -> tuple[Any, ...]:
        refuse(x_bar, forward_mode=False)
        problem, saved = ctx.problem, ctx.saved_tensors  # read once: checkpoints recompute at each reading
        x, leaves = saved[: problem.count], saved[problem.count :]
        needed = ctx.needs_input_grad[1 + problem.count :]
        wanted = [i for i in floating(leaves) if needed[i]]
        b_bar, bars = pulled_back(problem, x, _autodiff.densified(x_bar), leaves, wanted)
        return (None, *b_bar, *filled([None] * len(leaves), wanted, bars))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Leaves:
        refuse(tangents, forward_mode=True)
        problem, saved = ctx.problem, ctx.saved_tensors
        n = problem.count
        return pushed(problem, saved[:n], tangents[:n], saved[n:], tangents[n:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], problem: Equation, *tensors: Tensor) -> tuple[Leaves, Any]:
        n = problem.count
        copied = all(dim is None for dim in in_dims[1 + n :])
        lead, dims = lead_axes(info.batch_size, tensors, in_dims[1:], 2 * n)
        return LinearSolve.apply(problem.vmapped(dims, copied), *lead), (0,) * n


def pulled_back(
    problem: Equation, x: Leaves, x_bar: Sequence[Tensor], leaves: Leaves, wanted: Sequence[int]
) -> tuple[Leaves, list[Tensor]]:
    """The reverse rule of x = A⁻¹b: b̄, and the cotangents of the leaves (w, then λ) in wanted."""
    b_bar = LinearSolve.apply(problem.T, *x_bar, *leaves)
    # ⟨b̄, A x⟩ = ⟨Aᵀ b̄, x⟩, and the form with the transposed product takes one reverse pass fewer.
    u, v = (x, b_bar) if problem.transposed else (b_bar, x)
    return b_bar, [-bar for bar in pull(lambda leaves: problem.pulled(u, leaves), leaves, v, wanted)]


def pushed(
    problem: Equation, x: Leaves, b_dot: Sequence[Tensor | None], leaves: Leaves, tangents: Sequence[Tensor | None]
) -> Leaves:
    """The forward rule of x = A⁻¹b: ẋ."""
    n = problem.count
    wanted = [i for i in floating(leaves) if i < n or tangents[i] is not None]
    dots = tuple(zeros_if_none(tangents[i], leaves[i]) for i in wanted)
    if problem.transposed:
        a_dot_x = push(lambda leaves: problem.pulled(x, leaves), leaves, dots, wanted, x)
    else:  # the derivative of u ↦ ⟨∂θ⟨∂₁Fᵀ u, x⟩, θ̇⟩, which is linear

        def bilinear(u: Leaves) -> Leaves:
            return pull(lambda leaves: problem.pulled(u, leaves), leaves, x, wanted)

        zeros = tuple(torch.zeros_like(y) for y in x)
        a_dot_x = pull(bilinear, zeros, dots, range(n))
    rhs = [zeros_if_none(b, y) - y for b, y in zip(b_dot, a_dot_x, strict=True)]
    return LinearSolve.apply(problem, *rhs, *leaves)


class Adjoint(torch.autograd.Function):
    """v = A⁻ᵀ w̄ and λ̄ = −∂₂Fᵀ v for the leaves (w, then λ) in wanted. Arguments: (problem, wanted, *w̄, *w, *λ)."""

    @staticmethod
    def forward(problem: Equation, wanted: Sequence[int], *tensors: Tensor) -> Leaves:
        n = problem.count
        v, bars = problem.solved(tensors[:n], tensors[n : 2 * n], tensors[2 * n :], wanted, adjoint=True)
        return (*v, *bars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        ctx.problem, ctx.wanted, *tensors = inputs
        n = ctx.problem.count
        ctx.save_for_backward(*output[:n], *tensors[n:])
        ctx.save_for_forward(*output[:n], *tensors[n:])

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Any, ...]:
        refuse(bars, forward_mode=False)
        problem, saved = ctx.problem, ctx.saved_tensors
        n, bars = problem.count, tuple(_autodiff.densified(bars))
        v, leaves = saved[:n], saved[n:]
        wanted = [i for i in floating(leaves) if ctx.needs_input_grad[2 + n + i]]
        own = pull(partial(last_product, problem, ctx.wanted), saved, bars[n:], [*range(n), *(n + i for i in wanted)])
        x_bar = tuple(x + y for x, y in zip(bars[:n], own[:n], strict=True))
        b_bar, through = pulled_back(problem, v, x_bar, leaves, wanted)
        rest = filled([None] * len(leaves), wanted, map(torch.add, through, own[n:]))
        return (None, None, *b_bar, *rest)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Leaves:
        refuse(tangents, forward_mode=True)
        problem, saved = ctx.problem, ctx.saved_tensors
        n, wanted = problem.count, ctx.wanted
        v_dot = pushed(problem, saved[:n], tangents[:n], saved[n:], tangents[n:])
        places = [i for i in floating(saved) if i < n or tangents[i] is not None]
        dots = (*v_dot, *(zeros_if_none(tangents[i], saved[i]) for i in places[n:]))
        like = tuple(saved[n + i] for i in wanted)
        return (*v_dot, *push(partial(last_product, problem, wanted), saved, dots, places, like))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], problem: Equation, wanted: Sequence[int], *tensors: Tensor
    ) -> tuple[Leaves, Any]:
        n, axes = problem.count, in_dims[2:]
        copied = all(dim is None for dim in axes[n:])
        if not copied and any(axes[n + i] is None for i in wanted):  # each entry has its own λ̄ of a shared λ
            outputs = torch.func.vmap(partial(solve_then_product, problem, wanted), in_dims=axes)(*tensors)
            return outputs, (0,) * len(outputs)
        lead, dims = lead_axes(info.batch_size, tensors, axes, 2 * n)
        if copied:
            for i in wanted:
                lead[n + i], dims[i - n] = lead[n + i].expand(info.batch_size, *lead[n + i].shape), 0
        return Adjoint.apply(problem.vmapped(dims, copied), wanted, *lead), (0,) * (n + len(wanted))


def last_product(problem: Equation, wanted: Sequence[int], tensors: Leaves) -> Leaves:
    """−∂₂Fᵀ v for the leaves in wanted; tensors holds (v, w, λ)."""
    n = problem.count
    # w is tracked too, because a map may take derivatives with respect to it.
    bars = pull(problem.residual, tensors[n:], tensors[:n], [*range(n), *wanted])[n:]
    return tuple(-bar for bar in bars)


def solve_then_product(problem: Equation, wanted: Sequence[int], *tensors: Tensor) -> Leaves:
    """The outputs of Adjoint, by LinearSolve and then last_product."""
    v = LinearSolve.apply(problem, *tensors)
    return (*v, *last_product(problem, wanted, (*v, *tensors[problem.count :])))


class Root(torch.autograd.Function):
    """w(λ). Arguments: (problem, find, *w, *λ); if find is not None, w is left out and find(λ) computes it."""

    @staticmethod
    def forward(problem: Equation, find: Callable[[Leaves], Leaves] | None, *tensors: Tensor) -> Leaves:
        if find is None:
            return tuple(leaf.clone() for leaf in tensors[: problem.count])
        return find(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Leaves) -> None:
        problem, find, *tensors = inputs
        given = problem.count if find is None else 0
        ctx.problem, ctx.given = replace(problem, count=len(output)), given
        ctx.save_for_backward(*output, *tensors[given:])
        ctx.save_for_forward(*output, *tensors[given:])

    @staticmethod
    def backward(ctx: Any, *w_bar: Tensor) -> tuple[Any, ...]:
        refuse(w_bar, forward_mode=False)
        problem, leaves = ctx.problem, ctx.saved_tensors
        n = problem.count
        wanted = [i for i in floating(leaves) if i >= n and ctx.needs_input_grad[2 + ctx.given + i - n]]
        bars = adjoint(problem, leaves, tuple(_autodiff.densified(w_bar)), wanted)
        return (None, None, *[None] * ctx.given, *filled([None] * len(leaves), wanted, bars)[n:])

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Leaves:
        refuse(tangents, forward_mode=True)
        problem, leaves = ctx.problem, ctx.saved_tensors
        n = problem.count
        wanted = [i for i in floating(leaves) if i < n or tangents[ctx.given + i - n] is not None]
        dots = [zeros_if_none(None if i < n else tangents[ctx.given + i - n], leaves[i]) for i in wanted]
        rhs = push(problem.residual, leaves, tuple(dots), wanted, leaves[:n])
        return LinearSolve.apply(problem, *(-y for y in rhs), *leaves)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], problem: Equation, find: Any, *tensors: Tensor
    ) -> tuple[Leaves, Any]:
        given = problem.count if find is None else 0
        lead, dims = lead_axes(info.batch_size, tensors, in_dims[2:], given)
        finds = None if find is None else partial(find_all, find, dims, info.batch_size)
        outputs = Root.apply(problem.vmapped(dims), finds, *lead)
        return outputs, (0,) * len(outputs)


def find_all(find: Callable[[Leaves], Leaves], dims: Sequence[int | None], count: int, hparams: Leaves) -> Leaves:
    """The stacked solutions for all entries of a vmap over λ: by one run if vmap can run `find`, else one by one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.func.vmap(lambda *h: find(h), in_dims=tuple(dims))(*hparams)  # pyright: ignore[reportArgumentType]
    except Exception:  # an error in the user's code is raised again below
        pass
    entries = (tuple(t if dim is None else t[j] for t, dim in zip(hparams, dims, strict=True)) for j in range(count))
    return tuple(torch.stack(parts) for parts in zip(*(find(entry) for entry in entries), strict=True))


def adjoint(problem: Equation, leaves: Leaves, w_bar: Leaves, wanted: Sequence[int]) -> Sequence[Tensor]:
    """λ̄ = −∂₂Fᵀ A⁻ᵀ w̄ for the leaves (w, then λ) in wanted."""
    problem = replace(problem, transposed=True, base=problem.base and replace(problem.base, transposed=True))
    return Adjoint.apply(problem, wanted, *w_bar, *leaves)[problem.count :]


def refuse(tensors: Sequence[Tensor | None], forward_mode: bool) -> None:
    """Raise if torch cannot compute a derivative along these tensors, or would compute it wrongly (pytorch#197867)."""
    if any(map(_torch.is_legacy_batch, tensors)):
        raise NotImplementedError(
            "is_grads_batched=True, vectorize=True and check_batched_grad use torch's older vmap, under which an "
            "implicit function has no derivative: use torch.func.jacrev (jacfwd, hessian), or torch.func.vmap of "
            "torch.func.vjp"
        )
    if forward_mode and _torch.forward_mode_levels() > 1:
        raise NotImplementedError(
            "forward mode over forward mode (jacfwd(jacfwd), jvp of jvp) through an implicit function is silently "
            "wrong in torch (pytorch#197867); use jacfwd(jacrev), jacrev(jacrev) or torch.func.hessian"
        )
