"""Pytrees of tensors: their leaves, the names of the leaves, matching by key, and replacing leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from operator import attrgetter, sub
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

PyTree: TypeAlias = Any
Unflatten: TypeAlias = "Callable[[Iterable[Tensor]], PyTree]"
Kind: TypeAlias = "tuple[torch.Size, torch.dtype, torch.device]"
KIND: Callable[[Tensor], Kind] = attrgetter("shape", "dtype", "device")
UNREGISTERED = "register this dataclass as a pytree (optree.dataclasses.dataclass), or pass a dict of its fields"


class Paths(Sequence[str]):
    """The paths of a tree's leaves as text, which is built only when it is needed: for an error message."""

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

    def order(self, other: Paths) -> list[int] | None:
        """The index in `other` of each leaf of this tree, matched by key; None if both trees have the same order.

        Lists, tuples and iterators count as one structure, and so do mappings with the same keys; else ValueError.
        """
        if self.spec == other.spec or self.within == other.within:
            return None
        places = {path: i for i, path in enumerate(other.within)}
        if len(self) != len(other) or not all(path in places for path in self.within):
            odd = [path or "(a single tensor)" for path in {*self.within} ^ {*other.within}]
            raise ValueError(
                f"{other.name} must have the structure of {self.name}: {len(other)} leaves instead of {len(self)}, and "
                f"these are in only one of the two: {', '.join(sorted(odd)[:5])}"
            )
        return [places[path] for path in self.within]


def flatten(tree: PyTree, name: str, complex: bool = False) -> tuple[list[Tensor], Paths, Unflatten]:
    """The leaves of a tree, their paths, and the inverse function. An iterator (model.parameters()) is read once.

    Raises: TypeError for a leaf that is not a floating point (or, with `complex`, complex) tensor; ValueError for none.
    """
    if isinstance(tree, Iterator):
        tree = list(tree)
    leaves, spec = optree.tree_flatten(tree)
    paths = Paths(name, spec)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{paths[i]} must be a floating point tensor, got {type(leaf).__name__}{_hint(leaf)}")
        if not (leaf.is_floating_point() or (complex and leaf.is_complex())):
            hint = "; pass torch.view_as_real of it, and torch.view_as_complex within" if leaf.is_complex() else ""
            raise TypeError(f"{paths[i]} must be a floating point tensor, got one of dtype {leaf.dtype}{hint}")
    if not leaves:
        raise ValueError(f"{name} holds no tensor: {tree!r}")
    return leaves, paths, spec.unflatten


def _hint(leaf: Any) -> str:
    if isinstance(leaf, torch.nn.Module):
        return "; pass its parameters()"
    if isinstance(leaf, str):
        return "; give named_parameters() as a dict"
    return f"; {UNREGISTERED}" if dataclasses.is_dataclass(leaf) else ""


def refuse_objects(leaves: Iterable[Any]) -> None:
    """Raise TypeError for a leaf that is an object with tensors inside, because these tensors would be ignored."""
    for leaf in leaves:
        if isinstance(leaf, Tensor) or (callable(leaf) and not dataclasses.is_dataclass(leaf)):  # such as a module
            continue
        slots = [key for kind in type(leaf).__mro__ for key in getattr(kind, "__slots__", ())]
        inside = leaf.values() if isinstance(leaf, Mapping) else leaf if isinstance(leaf, Set) else ()
        held: Any = [*getattr(leaf, "__dict__", {}).values(), *(getattr(leaf, key, None) for key in slots), *inside]
        if any(isinstance(x, Tensor) for x in optree.tree_leaves(held)):
            hint = UNREGISTERED if dataclasses.is_dataclass(leaf) else "pass a dict of them"
            raise TypeError(f"{type(leaf).__name__} holds tensors but is not a pytree: {hint}")


def split(tree: PyTree) -> tuple[list[Tensor], Unflatten]:
    """The tensors of a tree, of any dtype, and a function that rebuilds the tree with other tensors in their places."""
    if isinstance(tree, Iterator):
        tree = list(tree)
    leaves, spec = optree.tree_flatten(tree)
    if all(isinstance(leaf, Tensor) for leaf in leaves):  # a fast path, because unrolling splits at every step
        return leaves, spec.unflatten
    refuse_objects(filter(dataclasses.is_dataclass, leaves))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in places]
    for i in places:  # the returned function must not keep the tensors and their graphs alive
        leaves[i] = None
    return tensors, lambda new: optree.tree_unflatten(spec, filled(leaves, places, new))


def filled(leaves: Sequence[Any], places: Sequence[int], new: Iterable[Any]) -> list[Any]:
    """A copy of the list `leaves` in which those at `places` are replaced by the new ones."""
    whole = list(leaves)
    for i, leaf in zip(places, new, strict=True):
        whole[i] = leaf
    return whole


def arranged(tree: PyTree, like: Paths, name: str) -> tuple[list[Tensor], Sequence[str]]:
    """The leaves of a tree and their names in the order of `like`: mappings are matched by key, never by position."""
    leaves, paths, _ = flatten(tree, name)
    order = like.order(paths)
    return (leaves, paths) if order is None else ([leaves[i] for i in order], [paths[i] for i in order])


def matching(
    tree: PyTree, paths: Paths, kinds: Iterable[Kind], name: str, places: Sequence[int] | None = None
) -> list[Tensor]:
    """The leaves of a tree, checked to have these paths (as `Paths.order` matches them) and exactly these kinds.

    places: indices of the leaves to check and return (default: all).
    """
    leaves, names = arranged(tree, paths, name)
    places = range(len(leaves)) if places is None else places
    leaves = [leaves[i] for i in places]
    for i, leaf, kind in zip(places, leaves, kinds, strict=True):
        if KIND(leaf) != kind:
            one, other = describe(*kind), describe(*KIND(leaf))
            raise ValueError(f"{names[i]} must be like {paths[i]}: expected {one}, got {other}")
    return leaves


def difference(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(map(sub, xs, ys))


def check_distinct(leaves: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ValueError if one tensor is there twice, because its derivative would be counted twice."""
    if len({*map(id, leaves)}) < len(leaves):
        places = {id(leaf): i for i, leaf in reversed([*enumerate(leaves)])}
        late = next(i for i, leaf in enumerate(leaves) if places[id(leaf)] < i)
        raise ValueError(
            f"{names[places[id(leaves[late])]]} and {names[late]} are the same tensor; pass each variable once"
        )


def describe(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"shape {tuple(shape)}, {str(dtype).removeprefix('torch.')} on {device}"


def full(x: Tensor) -> Tensor:
    """The whole tensor of a sharded one; other tensors are returned unchanged."""
    gather = getattr(x, "full_tensor", None)
    return x if gather is None else gather()


def largest_of_parts(x: Tensor) -> Tensor:
    """The largest |entry| of a sharded tensor (torch's reduction fails if a part is empty); others are unchanged."""
    sharded: Any = x
    if not hasattr(x, "placements") or any(p.is_partial() for p in sharded.placements):
        return full(x)
    from torch.distributed.tensor import DTensor, Partial

    own = local(x)
    top = own.abs().amax() if own.numel() else own.new_zeros(())
    placements = [Partial("max") if p.is_shard() else p for p in sharded.placements]
    return DTensor.from_local(top, sharded.device_mesh, placements, run_check=False).full_tensor()


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; other tensors are returned unchanged."""
    sharded: Any = x
    return sharded.detach().to_local() if hasattr(x, "to_local") else x
