"""Batches and lists of tasks, and the losses, steps and starts of several tasks in parallel, by torch.func.vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils.data import default_collate

from .. import _autodiff, _graph, _torch
from .._autodiff import as_scalar
from .._options import check_whole
from .._solution import OnFailure
from .._tree import PyTree, arranged, filled, flatten, split
from ..diff_optimizers import Rule, plus

Loss = Callable[[PyTree, PyTree, PyTree], Tensor]

UNUSED = (
    "{} does not depend on params: does it use its argument (not a live model), as a tensor (not through .item() or "
    ".data), and outside of no_grad?"
)
HOOKED = (
    "inner_loss registers a hook on params, which would be called in every product with second derivatives: clip or "
    "mask in the loss or the rule instead"
)


@dataclass(frozen=True)
class _Biased:
    """The loss that `biased` returns. `Chunk` differentiates its penalty for all tasks at once, outside vmap."""

    loss: Loss
    strength: float | Tensor
    centre: Callable[[PyTree], PyTree] | None

    def __call__(self, params: PyTree, hparams: PyTree, task: PyTree) -> Tensor:
        squares = [(d * d).sum() for d in self.away(params, hparams)]
        return self.loss(params, hparams, task) + 0.5 * self.strength * torch.stack(squares).sum()

    def pulled(self, slopes: list[Tensor | None], params: PyTree, hparams: PyTree) -> list[Tensor | None]:
        """∇₁ℓ + ρ (w − λ), with fewer graph nodes than autograd would make for the penalty."""
        a, pairs = self.strength, zip(slopes, self.away(params, hparams), strict=True)
        return [a * d if g is None else plus(g, a, d) for g, d in pairs]

    def away(self, params: PyTree, hparams: PyTree) -> list[Tensor]:
        """w − λ for each leaf of params; the centre is matched by key."""
        leaves, names, _ = flatten(params, "params")
        centre, _ = arranged(hparams if self.centre is None else self.centre(hparams), names, "centre of biased")
        return [w - c for w, c in zip(leaves, centre, strict=True)]


def biased(loss: Loss, strength: float | Tensor, centre: Callable[[PyTree], PyTree] | None = None) -> Loss:
    """The inner loss of one task with biased regularisation, ℓ(w, λ, task) + ½ρ ‖w − λ‖².

    Args:
        loss: ℓ(params, hparams, task), scalar.
        strength: ρ > 0, a number or a 0-d tensor.
        centre: function of hparams that returns the λ of the formula, in params' structure; default: hparams itself.

    Returns: g(params, hparams, task). It costs less if it is passed to `grad` directly, not within another function.
    Cost: that of ℓ, and one pass over params for all tasks together.
    Source: Rajeswaran et al. 2019, equation 3.

    Example:
        >>> g = biased(lambda w, lam, task: 0.0 * w.sum(), strength=2.0)
        >>> g(torch.ones(3), torch.zeros(3), None)
        tensor(3.)
    """
    if not isinstance(strength, (int, float, Tensor)) or isinstance(strength, bool):
        raise TypeError(f"strength must be a number or a 0-d tensor, got {type(strength).__name__}")
    return _Biased(loss, strength, centre)


class Tasks:
    """The user's tasks. Each of `groups` holds the indices of tasks that can be evaluated in parallel."""

    def __init__(self, tasks: PyTree):
        self._batches: list[tuple[list[Tensor], Callable[..., PyTree]]] = []
        self._places: list[tuple[int, int]] = []  # for each task, the index of its batch and its row there
        groups: dict[Any, list[int]] = {}
        for batch in _batches(tasks):
            _check_leaves(batch)
            tensors, rebuild = split(batch)
            count = _count(tensors)
            groups.setdefault(_form(batch), []).extend(range(self.count, self.count + count))
            self._places += [(len(self._batches), row) for row in range(count)]
            self._batches.append((tensors, rebuild))
        self.tried: set[int] = set()  # indices of tasks that `stepping` has seen
        self.groups = [group for group in groups.values() if group]
        if not self.groups:
            raise ValueError("tasks holds no task")

    @property
    def count(self) -> int:
        return len(self._places)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for tensors, _ in self._batches for x in tensors]

    def take(self, index: Sequence[int]) -> PyTree:
        """Some tasks of one group as a batch; views of the user's batch if they are consecutive rows of it."""
        places = [self._places[i] for i in index]
        (batch, first), count = places[0], len(places)
        tensors, rebuild = self._batches[batch]
        if places == [(batch, first + i) for i in range(count)]:
            return rebuild([x[first : first + count] for x in tensors])
        rows = [[x[row] for x in self._batches[batch][0]] for batch, row in places]
        return rebuild([torch.stack(own) for own in zip(*rows, strict=True)])


def _batches(tasks: PyTree) -> list[PyTree]:
    """The tasks as trees whose tensors have a leading axis of tasks."""
    if isinstance(tasks, list):
        return list(map(_batch_of_one, tasks)) if _is_list_of_tasks(tasks) else [tasks]
    container = (
        not optree.tree_is_leaf(tasks) or isinstance(tasks, (Tensor, str, Mapping)) or hasattr(tasks, "__array__")
    )
    if container or not isinstance(tasks, Iterable):
        return [tasks]
    if getattr(tasks, "batch_sampler", None) is None:  # an iterator, or a DataLoader, over single tasks
        return list(map(_batch_of_one, tasks))
    if getattr(tasks, "collate_fn", None) is default_collate:
        return list(tasks)
    return [batch for given in tasks for batch in _batches(given)]


def _batch_of_one(task: PyTree) -> PyTree:
    return optree.tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, task)


def _is_list_of_tasks(tasks: list[Any]) -> bool:
    """False if the list is one batch of tasks, such as the [inputs, targets] that default_collate makes of tuples."""
    if not all(isinstance(task, (Tensor, list)) for task in tasks):
        return True
    lengths = {len(x) if x.ndim else None for x in split(tasks)[0]}
    if len(lengths) == 1 and len(tasks) > 1 and all(isinstance(task, list) for task in tasks):
        raise ValueError(
            "tasks is a list of lists whose tensors all have the same length, so it may be a list of tasks or one "
            "batch of tasks: give a list of tuples for the former, a tuple for the latter"
        )
    return len(lengths) > 1


def _check_leaves(batch: PyTree) -> None:
    """Raise TypeError for an object that may hold the data of all tasks, but would be passed whole to every task."""
    for path, leaf in zip(*optree.tree_flatten_with_path(batch)[:2], strict=True):
        holds = is_dataclass(leaf) or isinstance(leaf, Mapping) or hasattr(leaf, "__array__")
        if holds and not isinstance(leaf, (Tensor, type)):
            place = "tasks" + "".join(f"[{key!r}]" for key in path)
            raise TypeError(
                f"{place} is a {type(leaf).__name__}, whose contents are unknown: give tensors in dicts, tuples or "
                f"lists, or register the class as a pytree (optree.register_pytree_node, optree.dataclasses.dataclass)"
            )


def _count(tensors: list[Tensor]) -> int:
    """The length of the first axis of all tensors."""
    if not tensors:
        raise ValueError("tasks holds no tensor")
    first = tensors[0]
    for i, x in enumerate(tensors):
        if not x.ndim or x.shape[0] != first.shape[0]:
            raise ValueError(
                f"the first axis of each tensor in tasks must run over tasks: tensor 0 has shape {tuple(first.shape)}, "
                f"tensor {i} has {tuple(x.shape)}; pass tasks of different sizes as a list of tuples or dicts"
            )
    return first.shape[0]


def _form(batch: PyTree) -> Any:
    """A key that is equal for tasks that can be stacked: structure, shapes, dtypes, devices, and other leaves."""
    leaves, spec = optree.tree_flatten(batch)
    plain = (str, int, float)
    return spec, *(
        (x.shape[1:], x.dtype, x.device) if isinstance(x, Tensor) else x if isinstance(x, plain) else id(x)
        for x in leaves
    )


@dataclass(frozen=True)
class TaskProblem:
    """The arguments that all tasks share, checked."""

    outer_loss: Loss | None
    inner_loss: Loss
    start: Callable[[PyTree, PyTree], PyTree] | None
    rule: Rule
    steps: int
    on_failure: OnFailure

    def __post_init__(self) -> None:
        if not (callable(self.inner_loss) and (self.outer_loss is None or callable(self.outer_loss))):
            raise TypeError("outer_loss and inner_loss must be functions of (params, hparams, task)")
        check_whole(steps=(self.steps, 0))
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise ValueError(f'on_failure must be "warn", "raise" or "ignore", got {self.on_failure!r}')
        if not isinstance(self.rule, Rule):
            raise TypeError(
                f"rule must be an update rule of hg.diff_optimizers, such as SGD(lr=0.1); got {self.rule!r}"
            )
        dim = getattr(getattr(self.rule, "prox", None), "dim", -1)
        if dim is None or dim >= 0:
            raise ValueError(
                f"GroupLasso(dim={dim}) would make one group of all tasks (the first axis): count dim from the end"
            )


class Diverged(Exception):
    """The inner loop or outer loss of some tasks is not finite. `good` says for each task of the chunk if it is."""

    def __init__(self, good: list[bool]):
        super().__init__("a task diverged")
        self.good = good


class Chunk:
    """Some tasks in parallel (with `loop`, one by one in the outer loss). params are lists of all leaves, [B, ...]."""

    def __init__(self, problem: TaskProblem, tasks: Tasks, index: Sequence[int], loop: bool = False):
        self.problem, self.index, self.loop = problem, list(index), loop
        self.task, self.tried = tasks.take(index), tasks.tried
        self.rebuild: Callable[..., PyTree] = list
        self.places: list[int] = []  # indices of the leaves that are not frozen
        self.params: PyTree = None
        self.values: Tensor | None = None
        self._checked = False

    def start(self, hparams: PyTree) -> list[Tensor]:
        """w₀ of each task, with its graph to hparams."""
        given, start = flatten(hparams, "hparams")[0], self.problem.start

        def first(hparams: PyTree, task: PyTree) -> list[Tensor]:
            tree = hparams if start is None else start(hparams, task)
            leaves, _, self.rebuild = flatten(tree, "start(hparams, task)")
            self.places = _moving(leaves, given)
            return leaves

        if start is None:
            return [x.expand(len(self.index), *x.shape) for x in first(hparams, None)]
        return self._map(first, (), hparams)

    def moving(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves that are not frozen."""
        return [leaves[i] for i in self.places]

    def completed(self, moving: Iterable[Any], leaves: Sequence[Any]) -> list[Any]:
        """leaves, with those that are not frozen replaced by `moving`."""
        return filled(leaves, self.places, moving)

    def adapt(self, start: Sequence[Tensor], hparams: PyTree) -> list[Tensor]:
        """w_T of each task: T steps of the rule, without a graph."""
        leaves, _, rebuild = flatten(hparams, "hparams")
        hparams, params = rebuild([x.detach() for x in leaves]), [x.detach() for x in start]
        carry = params, self.problem.rule.init(self.rebuild(params))
        for _ in range(self.problem.steps):
            carry = self.step(carry, hparams, create_graph=False)
        return carry[0]

    def step(
        self, carry: tuple[list[Tensor], dict[str, Any]], hparams: PyTree, create_graph: bool = True
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """A step of the rule on Σᵢ g."""
        (before, state), rule = carry, self.problem.rule
        at = [w if create_graph and w.requires_grad else w.detach().requires_grad_() for w in self.moving(before)]
        with torch.enable_grad():
            slopes = self.slopes(self.completed(at, [w.detach() for w in before]), hparams, create_graph)
        with torch.set_grad_enabled(create_graph):
            params = self.rebuild(self.completed(at, before) if create_graph else before)
            called = hparams if rule.needs_hparams else None
            params, state = rule.update(params, state, self.rebuild(slopes), called)
        return split(params)[0], state

    def slopes(self, leaves: list[Tensor], hparams: PyTree, create_graph: bool = True) -> list[Tensor | None]:
        """∇₁g of each task: that of Σᵢ g(wᵢ, λ, taskᵢ), whose Hessian is block diagonal; None for frozen leaves."""
        loss, penalties = without_penalties(self.problem.inner_loss)
        moving = self.moving(leaves)
        losses = self.losses(loss, "inner_loss", leaves, hparams, differentiated=create_graph)
        if not self._checked and not _graph.depends([losses], moving):
            raise ValueError(UNUSED.format("inner_loss"))
        self._checked = True
        ones = [torch.ones_like(losses)]
        found = _autodiff.grad_or_none([losses], moving, ones, create_graph=create_graph)
        slopes = self.completed(found, [None] * len(leaves))
        with torch.set_grad_enabled(create_graph):
            for penalty in penalties:
                slopes = penalty.pulled(slopes, self.rebuild(leaves), hparams)
        return self.completed(self.moving(slopes), [None] * len(leaves))

    def outer(self, leaves: list[Tensor], hparams: PyTree) -> Tensor:
        """Σᵢ E(wᵢ, λ, taskᵢ). Stores params and the values of E. Raises Diverged if some are not finite."""
        loss, params = self.problem.outer_loss, [x.detach() for x in leaves]
        losses, self.params = leaves[0].new_zeros(len(self.index)), self.rebuild(params)
        if loss is not None:
            losses = self.losses(loss, "outer_loss", leaves, hparams, self.loop)
            self.values = losses.detach()
            if any(w.requires_grad for w in leaves) and not _graph.depends([losses], leaves):
                raise ValueError(UNUSED.format("outer_loss"))
        good = finite_tasks([losses.detach(), *params])
        if not all(good):
            raise Diverged(good)
        return losses.sum()

    def rows(self, places: list[int]) -> tuple[PyTree, Tensor | None]:
        """The params and outer values of some of the tasks, as stored by `outer`."""
        tensors, rebuild = split(self.params)
        return rebuild([x[places] for x in tensors]), None if self.values is None else self.values[places]

    def losses(
        self,
        loss: Loss,
        name: str,
        leaves: Sequence[Tensor],
        hparams: PyTree,
        loop: bool = False,
        differentiated: bool = False,
    ) -> Tensor:
        """The values of a loss for all tasks, [B]. differentiated: whether second derivatives will be taken."""

        def value(*given: PyTree) -> list[Tensor]:
            *leaves, hparams, task = given
            with _torch.correct_derivatives():
                result = as_scalar(loss(self.rebuild(leaves), hparams, task), f"{name} of one task")
            if differentiated and any(getattr(w, "_backward_hooks", None) for w in leaves):
                raise ValueError(HOOKED)
            return [result.reshape(()) if result.ndim else result]

        return self._map(value, leaves, hparams, loop)[0]

    def _map(
        self, function: Callable[..., list[Tensor]], leaves: Sequence[Tensor], hparams: PyTree, loop: bool = False
    ) -> list[Tensor]:
        """function(*leaves, hparams, task) for each task, stacked."""
        tensors, rebuild = split((*leaves, self.task))

        def one(tensors: Sequence[Tensor]) -> list[Tensor]:
            *own, task = rebuild(tensors)
            return function(*own, hparams, task)

        if loop or len(self.index) == 1:
            # unbind, because its derivative accepts sparse gradients; those of x[0] and x.squeeze(0) do not.
            results = [one(own) for own in zip(*(x.unbind() for x in tensors), strict=True)]
            return [torch.stack(own) for own in zip(*results, strict=True)]
        return _torch.vmap(lambda *tensors: one(tensors), tensors)


def _moving(start: list[Tensor], hparams: list[Tensor]) -> list[int]:
    """Indices of adapted leaves of the start: all but leaves of hparams and Parameters with requires_grad=False.

    If that would freeze all of them, or if no leaf of hparams requires grad, none is frozen.
    """
    marked, parameter = {id(x) for x in hparams if not x.requires_grad}, torch.nn.Parameter
    frozen = [id(x) in marked or (isinstance(x, parameter) and not x.requires_grad) for x in start]
    every = len(marked) == len(hparams) or all(frozen)
    return [i for i, each in enumerate(frozen) if every or not each]


def without_penalties(loss: Loss) -> tuple[Loss, list[_Biased]]:
    """A loss without its biased regularisations, and a list of those."""
    penalties = []
    while isinstance(loss, _Biased):
        penalties.append(loss)
        loss = loss.loss
    return loss, penalties


def finite_tasks(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each row is finite in all tensors. Entries are checked only if the sum of some row is not finite."""
    rows = [x.flatten(1) if x.ndim > 1 else x.unsqueeze(1) for x in tensors]
    good = torch.isfinite(torch.stack([x.sum(1) for x in rows]).sum(0)).tolist()
    return good if all(good) else torch.stack([torch.isfinite(x).all(1) for x in rows]).all(0).tolist()
