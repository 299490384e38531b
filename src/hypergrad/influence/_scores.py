"""Influence functions: scores from the curvature of the training loss at its minimiser.

A = ∇²g(w) (or its Gauss–Newton matrix),    (A + γI) v_q = ∇ℓ_q(w),    s_qi = −∇ℓᵢ(w)ᵀ v_q / n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from .. import _autodiff, _graph, _torch
from .._autodiff import Linearisation, users_autocast
from .._options import progress_bar
from .._solution import NotConverged, OnFailure, Solution, inner_distance, warn, warn_if_not_finite, warn_if_unsolved
from .._torch import random_state_kept_on_error
from .._tree import PyTree
from .._vector import Vector
from ..implicit import Problem
from ..operators import GaussNewton, LinearOperator, Sum, function
from ..solvers import CG, BlockCG, LinearSolver, is_recipe, on_failure_of, shifted, solve
from ._data import as_rows, batches_of
from ._result import Influence

Loss = Callable[[Any, Any], Tensor]
PATH = [10 ** (k / 2 - 4) for k in range(9)]  # the values of damping="path", in units of ‖A‖
POWER_STEPS = 10  # products that estimate ‖A‖
WRONG = 0.1  # relative residual of an approximate inverse above which there is a warning


def scores(
    train_loss: Loss,
    query_loss: Loss,
    params: PyTree,
    *,
    train: Any,
    queries: Any,
    model: Callable[[Any, Any], PyTree] | None = None,
    penalty: Callable[[Any], Tensor] | None = None,
    solver: Any = None,
    damping: float | Sequence[float] | str = 0.0,
    groups: Tensor | None = None,
    index: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> Influence:
    """Scores of all training examples for all queries, by one linear system for each query.

        (A + γI) v_q = ∇ℓ_q(w),      s_qi = −∇ℓᵢ(w)ᵀ v_q / n,      A = ∇²[(1/n) Σᵢ ℓᵢ + p](w)

    Args:
        train_loss: ℓ(params, batch) ↦ [rows], the loss of each example of a batch; ℓ(outputs, batch) with `model`.
        query_loss: ℓ_q(params, batch) ↦ [rows] of a batch of queries: a loss, a margin, a logit.
        params: w, a tensor or any pytree, at (or near) the minimiser. If some leaves require grad, the others are
            frozen.
        train: batches of training examples: a DataLoader, a list, or a function that returns an iterator. Every pass
            must give the same examples. Example i is the i-th in their order.
        queries: batches of queries, in the same form; the systems of a batch are solved together.
        model: m(params, batch) ↦ outputs. If it is given, A is the Gauss–Newton matrix of ℓ ∘ m, which is positive
            semi-definite at every w for an ℓ that is convex in the outputs.
        penalty: p(params): terms that belong to no example, such as weight decay.
        solver: one from `hg.solvers`, called once for all queries of a batch (default: BlockCG()). The preconditioner
            of CG may be Nystrom(...), which is built once, or an operator on single vectors. Or an approximate inverse
            of A + γI: a LinearOperator, or an object whose @ takes a list of tensors in params' order (curvlinops'
            K-FAC and EKFAC inverses); `residual` then shows how well it solves the systems.
        damping: γ ≥ 0, added to the damping of the solver; or several γ, or "path" for nine from 1e-4 ‖A‖ to ‖A‖. The
            systems for several γ share one Krylov space (`solvers.shifted`); the solver must then be a CG or BlockCG
            without preconditioner and damping, whose rtol, max_steps and on_failure are used.
        groups: integers ≥ 0 [n], the group of each example. Scores are then those of groups, summed over examples.
        index: batch ↦ indices of its examples, for batches that come in no fixed order (shuffle=True).
        progress: show bars (needs tqdm).

    Returns: an Influence with scores [queries, examples], or [dampings, queries, examples] for several dampings.
    Raises: TypeError, ValueError: an argument does not have the form above, or train gives other losses in another
        pass. SolverError: with on_failure="raise" in the solver.
    Warns: HypergradientWarning if a system is not solved, an approximate inverse leaves large residuals, or params are
        so far from a minimiser that these scores are not those of a training (use `unrolled`).
    Cost: a pass over train to count the examples; for each batch of queries the solver's products, each a pass, and one
        pass for the scores. Memory: the graph of one batch of examples with a product for each query of a batch, the
        solver's vectors for these queries, and the scores; only the scores grow with the number of examples.
    Source: Koh and Liang 2017; Martens 2010, section 4.2, for the Gauss–Newton matrix.

    Example:
        w is the mean of the examples, so the weight of each moves it by (x − w)/n.

        >>> loss = lambda w, x: (x - w) ** 2 / 2
        >>> result = scores(
        ...     loss, lambda w, x: w * x, torch.tensor(2.0), train=[torch.tensor([1.0, 3.0])], queries=[torch.ones(1)]
        ... )
        >>> result.scores
        tensor([[-0.5000,  0.5000]])
    """
    with _torch.outside_inference_mode():
        system = _System(train_loss, params, train, model, penalty, index, groups, progress)
        with system.solving(solver, damping):
            batches = progress_bar(progress, batches_of(queries), desc="queries")
            found = [block for batch in batches if (block := system.of_queries(query_loss, batch))]
            if not found:
                raise ValueError("queries gave no batch of queries")
            return system.result(found)


def self_influence(
    train_loss: Loss,
    params: PyTree,
    *,
    train: Any,
    model: Callable[[Any, Any], PyTree] | None = None,
    penalty: Callable[[Any], Tensor] | None = None,
    solver: Any = None,
    damping: float | Sequence[float] | str = 0.0,
    index: Callable[[Any], Tensor] | None = None,
    progress: bool = False,
) -> Influence:
    """The score of each training example for its own loss, −∇ℓᵢᵀ(A + γI)⁻¹∇ℓᵢ / n.

    A is positive definite at a minimum, so no score is positive; examples that are hard to learn have a large |score|.

    Args: as in `scores`. The systems of a batch of train are solved together.
    Returns: an Influence whose scores, query_losses and residual have an axis of examples, and none of queries.
    Cost: that of `scores` with all examples as queries, without its last pass.

    Example:
        >>> loss = lambda w, x: (x - w) ** 2 / 2
        >>> self_influence(loss, torch.tensor(2.0), train=[torch.tensor([1.0, 3.0])]).scores
        tensor([-0.5000, -0.5000])
    """
    with _torch.outside_inference_mode():
        system = _System(train_loss, params, train, model, penalty, index, None, progress)
        with system.solving(solver, damping):
            places, found = [], []
            for place, losses in system.examples():
                places.append(place)
                found.append(system.of_examples(losses))
            result, order = system.result(found), torch.cat(places).argsort()
            numbers = {name: getattr(result, name)[..., order] for name in ("scores", "query_losses", "residual")}
            return replace(result, **numbers)


@dataclass(frozen=True)
class _BatchLoss:
    """The sum of the losses of a batch's examples, a term of a Sum whose products take many vectors in one pass."""

    loss: Loss
    batch: Any = None

    def __call__(self, params: PyTree, hparams: PyTree, batch: Any) -> Tensor:
        return hparams * self.loss(params, batch).sum()

    def on(self, batch: Any) -> _BatchLoss:
        return _BatchLoss(self.loss, batch)

    def linearise(
        self, params: PyTree, hparams: PyTree, leaves: Sequence[Tensor], differentiated: Sequence[Tensor]
    ) -> Linearisation:
        """∇₁ of this batch's loss, with its graph."""
        with _torch.correct_derivatives(dense=True):
            value = self(params, hparams, self.batch)
            return Linearisation(_autodiff.grad([value], leaves, create_graph=True), leaves)


@dataclass
class _Block:
    """Results for one batch of queries: scores [γ, queries, examples], the Solution for each γ, the losses."""

    scores: Tensor
    solutions: list[Solution]
    losses: Tensor


class _System:
    """Solves systems with A + γI at params, and computes scores in a pass over the examples."""

    def __init__(
        self,
        train_loss: Loss,
        params: PyTree,
        train: Any,
        model: Callable[[Any, Any], PyTree] | None,
        penalty: Callable[[Any], Tensor] | None,
        index: Callable[[Any], Tensor] | None,
        groups: Tensor | None,
        progress: bool,
    ):
        sampler = train.sampler if isinstance(train, DataLoader) else None
        if isinstance(sampler, RandomSampler) and index is None:
            raise ValueError(
                "train shuffles, so its examples have no fixed indices: pass a DataLoader with shuffle=False, or let "
                "each batch hold the indices of its examples and pass index=lambda batch: ..."
            )
        self.train, self.index, self.progress = train, index, progress
        fit: Any = _BatchLoss(train_loss)
        self.loss = train_loss
        if model is not None:
            self.loss = lambda w, batch: train_loss(model(w, batch), batch)
            fit = GaussNewton(lambda w, h, batch: model(w, batch), lambda z, h, batch: h * train_loss(z, batch).sum())
        weigh = None if penalty is None else (lambda w, h: penalty(w))
        inner = Sum(fit, train, weights=lambda batch: 1 / self.count, penalty=weigh)
        one = torch.ones((), requires_grad=True, device="cpu")  # a common weight of all examples
        self.problem = Problem(None, params=params, hparams=one, inner_loss=inner)
        self.sums: list[float] = []
        self.count = self._counted()
        if penalty is not None:
            with torch.enable_grad():
                self._check_uses_params(penalty(self.problem.arguments[0]), "penalty")
        self.groups = None if groups is None else _checked_groups(groups, self.count)

    def _counted(self) -> int:
        """The number of examples. Stores each batch's sum of losses, to check that later passes give the same."""
        sizes = []
        for batch in batches_of(self.train):
            with torch.no_grad():
                losses = as_rows(self.loss(self.problem.arguments[0], batch), "train_loss")
            self.sums.append(float(losses.sum()))
            sizes.append(len(losses))
        if not sum(sizes):
            raise ValueError("train gave no example")
        return sum(sizes)

    @contextmanager
    def solving(self, solver: Any, damping: Any) -> Iterator[None]:
        """A context in which A is held, and `solved` uses this solver and damping."""
        problem = self.problem
        with random_state_kept_on_error(problem.leaves), problem.without_hooks_and_autocast():
            problem.linearisation = problem.linearise()
            self.inner_residual, self.operator = problem.residual_of(problem.linearisation).norm(), problem.operator()
            self.on_failure: OnFailure = on_failure_of(solver)
            if isinstance(damping, str) and damping != "path":
                raise ValueError(f'damping must be a number ≥ 0, several, or "path", got {damping!r}')
            self.several = not isinstance(damping, (int, float))
            unit = float(self._norm()) if damping == "path" else 1.0
            given = PATH if damping == "path" else damping if self.several else [damping]
            self.dampings = [unit * float(each) for each in given]
            if not self.dampings or not all(0 <= each < torch.inf for each in self.dampings):
                raise ValueError(f"damping must be one or more finite numbers ≥ 0, got {damping!r}")
            self.inverse = is_inverse(solver)
            self.solver_damping = solver.damping if isinstance(solver, LinearSolver) else 0.0
            self.solver = self._for_stack(BlockCG() if solver is None else solver)
            named = solver if self.inverse or callable(solver) else self.solver
            self.method = "shifted" if self.several else getattr(named, "__name__", type(named).__name__)
            yield
            problem.linearisation = None

    def _norm(self) -> Tensor:
        """A lower bound of ‖A‖, by power iteration."""
        v = self.problem.point.random(torch.Generator(device="cpu").manual_seed(0))
        for _ in range(POWER_STEPS):
            v = self.operator(v / v.norm())
        return v.norm()

    def _for_stack(self, solver: Any) -> Any:
        """The solver for a stack of queries, with its preconditioner (or the approximate inverse) built once."""
        if self.several:
            if not isinstance(solver, (CG, BlockCG)) or getattr(solver, "preconditioner", None) or solver.damping:
                raise TypeError(
                    f"several dampings are solved by solvers.shifted, which takes rtol, max_steps and on_failure from "
                    f"a CG or BlockCG without preconditioner and damping; got {solver!r}"
                )
            return solver
        if self.inverse:
            inverse = self._as_operator(solver).stacked()
            return lambda op, b, x0: inverse(b)
        given = getattr(solver, "preconditioner", None)
        return solver if given is None else replace(solver, preconditioner=self._as_operator(given).stacked())

    def _as_operator(self, given: Any) -> LinearOperator:
        """A preconditioner or an approximate inverse as an operator on single vectors."""
        if isinstance(given, LinearOperator):
            return given
        if is_recipe(given):
            factors = given.factors(self.operator.damped(self.dampings[0] + self.solver_damping), self.problem.point)
            return LinearOperator(lambda v: given.apply(factors, v), symmetric=True)
        return function(partial(_multiplied, given) if is_inverse(given) else given, symmetric=True)

    def solved(self, b: Vector) -> list[Solution]:
        """Solve (A + γI) v = b for a stack of b and for each γ."""
        op, solver = self.operator.stacked(), self.solver
        if self.several:
            limits = {"rtol": solver.rtol, "max_steps": solver.max_steps}
            return shifted(op, b, self.dampings, **limits, on_failure="ignore")
        return [solve(solver, op.damped(self.dampings[0]), b.copy(), None)]

    def evaluated(self, loss: Loss, batch: Any, name: str) -> tuple[Tensor, Linearisation]:
        """The losses of a batch's rows, and their graph."""
        with torch.enable_grad(), _torch.correct_derivatives(dense=True), users_autocast():
            losses = as_rows(loss(self.problem.arguments[0], batch), name)
        if len(losses):
            self._check_uses_params(losses, name)
        return losses.detach(), Linearisation([losses], self.problem.leaves)

    def _check_uses_params(self, value: Tensor, name: str) -> None:
        leaves = self.problem.leaves
        if not _graph.depends([value], leaves) or _graph.undeclared_leaves([value], leaves):
            raise ValueError(
                f"{name} does not depend on the params that it is called with, or depends on other tensors that "
                f"require grad: compute it from its argument (a module by torch.func.functional_call), with gradients "
                f"enabled and without .item() or .detach()"
            )

    def examples(self) -> Iterator[tuple[Tensor, tuple[Tensor, Linearisation]]]:
        """The indices of each batch's examples, and their losses with graph, which must be those of the first pass."""
        index = self.index
        seen, sums, first, losses = torch.zeros(self.count, dtype=torch.bool, device="cpu"), [], 0, torch.zeros(0)
        for batch in progress_bar(self.progress, batches_of(self.train), desc="examples", total=len(self.sums)):
            losses, line = self.evaluated(self.loss, batch, "train_loss")
            if index is None:
                place = torch.arange(first, min(first + len(losses), self.count), device="cpu")
            else:
                place = torch.as_tensor(index(batch)).cpu().long()
            if len(place) != len(losses) or not bool(((place >= 0) & (place < self.count)).all()):
                raise ValueError(
                    f"a batch of {len(losses)} examples has {len(place)} indices in 0 … {self.count - 1}: train must "
                    f"give the same examples in every pass, and index= one such index for each of them"
                )
            seen[place] = True
            if len(losses):
                yield place, (losses, line)
            sums.append(float(losses.sum()))
            first += len(losses)
        self._compare(sums, bool(seen.all()), losses)

    def _compare(self, sums: list[float], all_seen: bool, like: Tensor) -> None:
        """Raise if a pass gave other losses than the first."""
        first, again = (torch.tensor(each, dtype=torch.float64, device="cpu") for each in (self.sums, sums))
        if self.index is not None:
            first, again = first.sum(0, keepdim=True), again.sum(0, keepdim=True)
        near = torch.finfo(like.dtype).eps ** 0.5
        if not all_seen or len(first) != len(again) or not torch.allclose(first, again, rtol=near, atol=1e-300):
            raise ValueError(
                "train_loss gave other losses in one pass over train than in the first: each pass needs the same "
                "examples, in the same order unless index= gives their indices, and the same losses. Switch off "
                "shuffling, dropout and augmentation (model.eval())"
            )

    def of_queries(self, query_loss: Loss, batch: Any) -> _Block | None:
        """The scores of all examples for a batch of queries; None for an empty batch."""
        losses, line = self.evaluated(query_loss, batch, "query_loss")
        if not len(losses):
            return None
        solutions = self.solved(self._gradients(losses, line))
        width = self.count if self.groups is None else int(self.groups.max()) + 1
        scores = losses.new_zeros(len(solutions), len(losses), width)
        for place, (_, examples) in self.examples():
            columns = place if self.groups is None else self.groups[place]
            for i, solution in enumerate(solutions):
                pushed = examples.jvp_many(solution.value.leaves)[0]
                scores[i].index_add_(1, columns.to(scores.device), pushed / -self.count)
        return _Block(scores, solutions, losses)

    def of_examples(self, evaluated: tuple[Tensor, Linearisation]) -> _Block:
        """The scores of a batch's examples for themselves."""
        gradients = self._gradients(*evaluated)
        solutions = self.solved(gradients)
        scores = torch.stack([gradients.dot(solution.value) / -self.count for solution in solutions])
        return _Block(scores, solutions, evaluated[0])

    def _gradients(self, losses: Tensor, line: Linearisation) -> Vector:
        """The gradients of several losses as a stack."""
        grads = line.vjp_many([torch.eye(len(losses), dtype=losses.dtype, device=losses.device)])
        return self.problem.space.stack_of(len(losses)).pack(grads).copy()

    def result(self, blocks: list[_Block]) -> Influence:
        """The Influence of all blocks. Warns if its scores are inaccurate."""
        pairs = [solution for block in blocks for solution in block.solutions]
        residual = torch.cat([torch.stack([s.relative_residual for s in block.solutions]) for block in blocks], 1)
        found = torch.cat([block.scores for block in blocks], 1)
        if self.on_failure != "ignore":
            self._report(blocks, residual)
            distances = [inner_distance(self.inner_residual, each, self.problem.point).max() for each in pairs]
            # The largest distance of all queries, for the damping at which that is smallest.
            distance = torch.stack(distances).reshape(len(blocks), -1).amax(0).amin(0)
            warn_if_unsolved(float(distance), self.inner_residual)
        warn_if_not_finite([found])
        damping = self.solver_damping + torch.tensor(self.dampings, dtype=torch.float64, device="cpu")
        parts = (found, residual, damping) if self.several else (found[0], residual[0], damping[0])
        losses = torch.cat([block.losses for block in blocks])
        return Influence(parts[0], losses, self.method, parts[1], parts[2], self.inner_residual, self.operator.products)

    def _report(self, blocks: list[_Block], residual: Tensor) -> None:
        worst = float(residual.max())
        if self.inverse:
            if not worst <= WRONG:
                warn(
                    f"{self.method} is not near the inverse of A + {self.dampings[0]:g} I: it leaves relative "
                    f"residuals of {float(residual.median()):.0%} (the median), {worst:.0%} at most, so these are the "
                    f"scores of another matrix; a solver (CG, BlockCG) gives those of A",
                    NotConverged,
                )
            return
        failed = [damping for i, damping in enumerate(self.dampings) if not all(b.solutions[i].ok for b in blocks)]
        for block in blocks:
            for damping, solution in zip(self.dampings, block.solutions, strict=True):
                if damping in failed:
                    others = f" (of {len(self.dampings)} dampings {len(failed)} failed)" if self.several else ""
                    solution.report(f"the systems of the queries at damping {damping:.3g}{others}", self.on_failure)


def is_inverse(thing: Any) -> bool:
    """Whether an object is an approximate inverse rather than a solver."""
    return isinstance(thing, LinearOperator) or (hasattr(thing, "__matmul__") and not isinstance(thing, Tensor))


def _multiplied(inverse: Any, tree: PyTree) -> PyTree:
    """inverse @ (the tensors as a list, in the order of a mapping's own values), in params' structure."""
    one = isinstance(tree, Tensor)
    tensors = [tree] if one else list(tree.values() if isinstance(tree, Mapping) else tree)
    with torch.enable_grad():  # curvlinops computes its factors at the first product
        images = [x.detach() for x in inverse @ tensors]
    if isinstance(tree, Mapping):
        return dict(zip(tree, images, strict=True))
    return images[0] if one else type(tree)(images)


def _checked_groups(groups: Tensor, count: int) -> Tensor:
    if groups.shape != (count,) or groups.is_floating_point() or int(groups.min()) < 0:
        raise ValueError(
            f"groups must hold an integer ≥ 0 for each of the {count} examples, got shape {tuple(groups.shape)}, "
            f"{groups.dtype}"
        )
    return groups.cpu().long()
