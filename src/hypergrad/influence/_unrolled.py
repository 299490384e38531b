"""Scores through a whole training: the derivative of its result with respect to the examples' weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _random
from .._options import check_whole, progress_bar
from .._solution import warn
from .._torch import outside_inference_mode
from .._tree import PyTree, split
from ..unroll import ReverseResult, jacobian
from ._data import as_rows, batches_of
from ._result import Influence

LOW_PRECISION = (
    "{}: the derivative through a long training amplifies rounding, so scores in dtypes below float32 are often noise. "
    "Train in float32 or float64 for these scores"
)


def unrolled(
    step: Callable[..., PyTree],
    start: PyTree,
    query_loss: Callable[[Any, Any], Tensor],
    *,
    examples: int,
    queries: Any,
    steps: int,
    batches: Any = None,
    with_time: bool = False,
    memory: str = "sqrt",
    folder: str | os.PathLike[str] | None = None,
    segments: int | None = None,
    progress: bool = False,
) -> Influence:
    """Scores of all examples for all queries through a training of T steps, in one reverse pass.

        w_{t+1} = Φ_t(w_t, ω),      s_qi = ∂ℓ_q(w_T(ω)) / ∂ωᵢ  at ω = 1

    These scores belong to one training run, with its start, its order of batches and its number of steps. The training
    need not have converged.

    Args:
        step: Φ(params, weights) as `unroll.reverse` takes it; Φ(params, weights, t) with with_time, and Φ(params,
            weights, t, batch) with batches. weights [examples] multiply the losses of the examples; the inner gradient
            needs create_graph=True.
        start: w₀, including the state of an optimiser.
        query_loss: ℓ_q(params, batch) ↦ [rows] of a batch of queries; params has start's structure.
        examples: n.
        queries: batches of queries. One reverse pass serves all of them.
        steps: T.
        batches, with_time, memory: as in `unroll.reverse`.
        folder: a directory for the iterates between segments of the training, and for the gradients of finished
            segments. After an interruption, the same call continues from there and gives bit-identical scores. Use one
            folder for one step and its queries; the last finished segment of the training is repeated, to check that
            the step is the same. The files are not removed.
        segments: the number of segments with folder (default: about √T).
        progress: show a bar over segments (needs tqdm).

    Returns: an Influence with scores [queries, examples].
    Raises: as `unroll.reverse`; ValueError if folder holds another run, RuntimeError if a segment gives other iterates
        when it is repeated.
    Warns: as `unroll.reverse`; HypergradientWarning if a tensor of start has a dtype below float32, or autocast is on.
    Cost: as `unroll.jacobian` with k queries: less than 2T evaluations of step, and T reverse passes with k cotangents
        at once; with a folder, T more evaluations, and the memory of one segment.
    Source: Engstrom et al. 2025 (MAGIC).

    Example:
        >>> x = torch.tensor([1.0, 3.0])
        >>> step = lambda w, weights: w - 0.5 * (weights * (w - x)).mean()
        >>> unrolled(step, torch.tensor(0.0), lambda w, q: w * q, examples=2, queries=[torch.ones(1)], steps=20).scores
        tensor([[-0.5000,  0.5000]])
    """
    check_whole(examples=(examples, 1), steps=(steps, 0), segments=(segments, 1))
    if segments is not None and folder is None:
        raise ValueError("segments are kept in a folder: pass folder=")
    like = next(iter([*filter(torch.is_floating_point, split(start)[0]), torch.ones((), device="cpu")]))
    _warn_of_precision(split(start)[0], like.device)
    with outside_inference_mode():
        weights = torch.ones(examples, dtype=like.dtype, device=like.device, requires_grad=True)

    def losses(params: PyTree, _: Any) -> Tensor:
        return torch.cat([as_rows(query_loss(params, batch), "query_loss") for batch in batches_of(queries)])

    if folder is None or not steps:
        options = {"memory": memory, "batches": batches, "with_time": with_time}
        result = jacobian(step, start, weights, losses, steps, **options)
        return Influence(result.grads, result.outer_value, "unrolled")
    if batches is not None and not callable(batches):
        batches = batches.__getitem__

    def timed(params: PyTree, weights: Tensor, t: int) -> PyTree:
        if batches is not None:
            return step(params, weights, t, batches(t))
        return step(params, weights, t) if with_time else step(params, weights)

    count = min(steps, segments or round(steps**0.5))
    run = _SegmentedRun(
        timed, start, weights, Path(folder), [round(i * steps / count) for i in range(count + 1)], progress
    )
    scores, values = run.reverse(losses, memory)
    return Influence(scores, values, "unrolled")


def _warn_of_precision(tensors: list[Tensor], device: torch.device) -> None:
    low = {x.dtype for x in tensors if x.is_floating_point() and torch.finfo(x.dtype).bits < 32}
    if low:
        warn(LOW_PRECISION.format(f"start holds {', '.join(map(str, low))}"))
    elif torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        warn(LOW_PRECISION.format("torch.autocast is on"))


class _SegmentedRun:
    """A training in segments, whose iterates and gradients are kept in the files of a folder.

    iterate_<s>.pt holds the tensors at the start of segment s, and the random state. adjoint.pt holds the state of the
    reverse pass after a segment: its number, gradients with respect to its start and the weights, and query losses.
    """

    def __init__(
        self,
        step: Callable[..., PyTree],
        start: PyTree,
        weights: Tensor,
        folder: Path,
        bounds: list[int],
        progress: bool,
    ):
        self.step, self.weights, self.folder, self.bounds, self.progress = step, weights, folder, bounds, progress
        tensors, self.rebuild = split(start)
        self.cuda = _random.devices_of(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / "iterate_0.pt"
        given = [x.detach().clone() for x in tensors]
        if not first.exists():
            self._save("iterate_0.pt", self._iterate(given))
        known = self._load("iterate_0.pt")
        same = len(known["tensors"]) == len(given) and all(map(torch.equal, known["tensors"], given))
        if not same or known["bounds"] != bounds or known["examples"] != len(weights):
            raise ValueError(
                f"{folder} holds another run (start, steps, segments or examples differ): pass an empty one"
            )

    def _iterate(self, tensors: list[Tensor]) -> dict[str, Any]:
        random = [*_random.capture(self.cuda).values()]
        return {"tensors": tensors, "random": random, "bounds": self.bounds, "examples": len(self.weights)}

    def _save(self, name: str, state: dict[str, Any]) -> None:
        torch.save(state, self.folder / f"{name}.part")
        os.replace(self.folder / f"{name}.part", self.folder / name)

    def _load(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / name, weights_only=True)

    def _restore(self, segment: int) -> list[Tensor]:
        """The tensors at the start of a segment. Restores the random state of that point."""
        state = self._load(f"iterate_{segment}.pt")
        _random.restore(dict(zip([torch.device("cpu"), *self.cuda], state["random"], strict=True)))
        return state["tensors"]

    def _forward(self) -> None:
        """Check the last saved iterate, then compute and save the remaining ones."""
        count = len(self.bounds) - 1
        known = max(s for s in range(count + 1) if (self.folder / f"iterate_{s}.pt").exists())
        last = self._load(f"iterate_{known}.pt")["tensors"]
        if known and not all(map(torch.equal, self._run_segment(known - 1, self._restore(known - 1)), last)):
            raise ValueError(
                f"{self.folder} holds the iterates of another step, or of other batches: pass an empty one (a step "
                f"that is not deterministic cannot be resumed)"
            )
        tensors = self._restore(known)
        for segment in progress_bar(self.progress, range(known, count), desc="training"):
            tensors = self._run_segment(segment, tensors)
            self._save(f"iterate_{segment + 1}.pt", self._iterate(tensors))

    def _run_segment(self, segment: int, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors at the end of a segment that starts from these."""
        for t in range(self.bounds[segment], self.bounds[segment + 1]):
            leaves = [x.requires_grad_() if x.is_floating_point() or x.is_complex() else x for x in tensors]
            tensors = [x.detach() for x in split(self.step(self.rebuild(leaves), self.weights, t))[0]]
        return tensors

    def reverse(self, losses: Callable[[PyTree, Any], Tensor], memory: str) -> tuple[Tensor, Tensor]:
        """The scores, and the losses of the queries."""
        self._forward()
        path, last = self.folder / "adjoint.pt", len(self.bounds) - 2
        done: dict[str, Any] = {"segment": last + 1}
        if path.exists():
            done = self._load(path.name)
            self._check_queries(losses, done["losses"])
        for segment in progress_bar(self.progress, range(done["segment"] - 1, -1, -1), desc="reverse pass"):
            first = segment == last
            result = self._reverse_segment(segment, losses if first else _along(done["alpha"]), memory)
            pairs = zip(split(result.start_grads)[0], split(result.params)[0], strict=True)
            done = {
                "segment": segment,
                "alpha": [g for g, x in pairs if _differentiable(x)],
                "scores": result.grads if first else done["scores"] + result.grads,
                "losses": result.outer_value if first else done["losses"],
            }
            self._save(path.name, done)
        self._restore(last + 1)
        return done["scores"], done["losses"]

    def _check_queries(self, losses: Callable[[PyTree, Any], Tensor], known: Tensor) -> None:
        """Raise if the saved part of the reverse pass belongs to other queries."""
        with torch.no_grad():
            values = losses(self.rebuild(self._restore(len(self.bounds) - 1)), None)
        tolerance = torch.finfo(known.dtype).eps ** 0.5
        if values.shape != known.shape or not torch.allclose(values, known, rtol=tolerance, atol=0, equal_nan=True):
            raise ValueError(
                f"{self.folder} holds the reverse pass of other queries: remove adjoint.pt from it to run the reverse "
                f"pass for these queries (the iterates of the training stay)"
            )

    def _reverse_segment(self, segment: int, outer: Callable[[PyTree, Any], Tensor], memory: str) -> ReverseResult:
        begin, end = self.bounds[segment : segment + 2]
        start = self.rebuild(self._restore(segment))
        step = lambda params, weights, t: self.step(params, weights, begin + t)  # noqa: E731
        result = jacobian(step, start, self.weights, outer, end - begin, memory=memory, with_time=True)
        if not all(map(torch.equal, split(result.params)[0], self._load(f"iterate_{segment + 1}.pt")["tensors"])):
            raise RuntimeError(
                f"steps {begin} to {end - 1} gave other numbers than before: what changes between calls (generators, "
                f"counters, kernels that are not deterministic) must enter through params, t or batches"
            )
        return result


def _differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _along(alpha: list[Tensor]) -> Callable[[PyTree, Any], Tensor]:
    """The function w ↦ ⟨α_q, w⟩ for each query q, whose gradients are the α_q."""

    def losses(params: PyTree, _: Any) -> Tensor:
        leaves = filter(_differentiable, split(params)[0])
        return torch.stack([a.reshape(len(a), -1) @ x.reshape(-1) for a, x in zip(alpha, leaves, strict=True)]).sum(0)

    return losses
