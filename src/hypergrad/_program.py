"""What was recorded, simplified to a short program.

A chain of elementwise operations from x to y is linear, hence y = d ∘ x: it becomes one multiplication by d, which is
the chain's value at x = 1. The Hessian product of a logistic regression is left as Xᵀ(d ∘ Xv) + e ∘ v.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._recording import Form, Ref, Step, aten

# The same functions without the generic call of an operator, which takes as long as a small product.
QUICK: dict[Any, Callable[..., Tensor]] = {
    aten.mul.Tensor: torch.mul,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.neg.default: torch.neg,
    aten.t.default: torch.t,
    aten.mv.default: torch.mv,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
    # v may lie in memory in another way than the first one, of which this was a view
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
}
# Products to which torch adds without another pass, into new memory and into that of what is added.
ADDED: dict[Any, tuple[Any, Any]] = {
    torch.mv: (torch.addmv, torch.Tensor.addmv_),
    torch.mm: (torch.addmm, torch.Tensor.addmm_),
}
# Elementwise operations that may write into their argument at any one of these places.
INTO: dict[Any, tuple[Any, tuple[int, ...]]] = {
    torch.mul: (torch.Tensor.mul_, (0, 1)),
    torch.add: (torch.Tensor.add_, (0, 1)),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, (0,)),
}
# Operations whose result lies in memory of its own.
OWN = {*ADDED, *INTO, *(f for pair in ADDED.values() for f in pair), *(f for f, _ in INTO.values())}


class Program:
    """What was recorded, as functions: of the constants, once, and of v and what that leaves.

    Attributes:
        source: (*v, *held) ↦ the results, every operation by itself, for compilers.
        product: the same as it is run: sums are added to the products in them, and written into what is used no more.
        linear: whether that is surely linear in v, whatever the constants.
    """

    def __init__(self, steps: Sequence[Step], results: Sequence[Ref], inputs: int, values: int):
        self.inputs, self.roots, lengths = inputs, list(range(values)), [0] * values
        for step in steps:
            before = step.chained()
            if len({self.roots[i] for i in before}) == 1:
                out = step.outs[0]
                self.roots[out], lengths[out] = self.roots[before[0]], 1 + max(lengths[i] for i in before)
        # A chain of one operation stays what it is.
        self.ends = {i for i in range(values) if lengths[i] > 1}
        live = {r[1] for r in results if r[0] == "v"}
        kept = []
        for step in reversed(steps):
            if live.isdisjoint(step.outs):
                continue
            kept.append(step)
            live.update([self.roots[step.outs[0]]] if step.outs[0] in self.ends else step.values)
        kept.reverse()
        self.linear = all(r[0] in "v0" for r in results) and all(step.linear for step in kept)
        self.factors = [step.outs[0] for step in kept if step.outs[0] in self.ends]
        used = [j for step in kept if step.outs[0] not in self.ends for j in step.constants]
        used += [r[1] for r in results if r[0] != "v"]
        self.used = list(dict.fromkeys(used))
        self.started = list(dict.fromkeys(self.roots[i] for i in self.factors))
        self._prepare = self._chains([step for step in steps if step.chained()])
        self.source = self._source(kept, results)
        self.product = in_place(self.source.graph)

    def held(self, constants: Sequence[Any], forms: Sequence[Form]) -> list[Any]:
        """The constants of `product`: some of those recorded, then the factors of the chains."""
        with torch.no_grad():
            held = [c.detach() if isinstance(c, Tensor) else c for c in (constants[j] for j in self.used)]
            if self.factors:
                ones = [forms[i].one for i in self.started]
                held += self._prepare(*ones, *[_narrow(constants[j]) for j in self._read])
        return held

    def _chains(self, steps: Sequence[Step]) -> Callable[..., Any]:
        """(*ones, *constants) ↦ factors: the chains, each from 1."""
        graph, wanted = fx.Graph(), set(self.factors)
        needed = []
        for step in reversed(steps):
            if step.outs[0] in wanted and step.outs[0] not in self.started:
                wanted.update(step.chained())
                needed.append(step)
        needed.reverse()
        self._read = list(dict.fromkeys(j for step in needed for j in step.constants))
        nodes: dict[Ref, Any] = {("v", i): graph.placeholder(f"one{i}") for i in self.started}
        nodes |= {("c", j): graph.placeholder(f"c{j}") for j in self._read}
        for step in needed:
            nodes["v", step.outs[0]] = _call(graph, step, nodes)
        graph.output([nodes["v", i] for i in self.factors])
        return fx.GraphModule(torch.nn.Module(), graph).forward

    def _source(self, steps: Sequence[Step], results: Sequence[Ref]) -> fx.GraphModule:
        graph = fx.Graph()
        nodes: dict[Ref, Any] = {("v", i): graph.placeholder(f"v{i}") for i in range(self.inputs)}
        nodes |= {("c", j): graph.placeholder(f"c{j}") for j in self.used}
        factors = {i: graph.placeholder(f"d{i}") for i in self.factors}
        for step in steps:
            first = step.outs[0]
            if first in factors:
                nodes["v", first] = graph.call_function(torch.mul, (nodes["v", self.roots[first]], factors[first]))
                nodes["v", first].meta["alike"] = True
            elif step.many:
                parts = _call(graph, step, nodes)
                for place, i in enumerate(step.outs):
                    if i >= 0:
                        nodes["v", i] = graph.call_function(operator.getitem, (parts, place))
            else:
                node = nodes["v", first] = _call(graph, step, nodes)
                node.meta["alike"] = step.alike and not step.kwargs
                node.meta["sparse"] = any(r[0] == "s" for r in step.args)
        # A result that is a constant is the caller's to write into.
        graph.output([nodes[r] if r[0] == "v" else graph.call_method("clone", (nodes["c", r[1]],)) for r in results])
        graph.eliminate_dead_code()
        return fx.GraphModule(torch.nn.Module(), graph)


def in_place(source: fx.Graph) -> fx.GraphModule:
    """The same, added and written in place where that saves a pass over memory."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(source, {}))
    for node in list(graph.nodes):
        if node.meta.get("alike") and not (node.target is torch.add and _add_into(graph, node)):
            _write_into(node)
    return fx.GraphModule(torch.nn.Module(), graph)


def _add_into(graph: fx.Graph, total: fx.Node) -> bool:
    """x + My by one operation, where My is used nowhere else; into x, where that is used nowhere else."""
    pairs = [(total.args[0], total.args[1]), (total.args[1], total.args[0])]
    for x, product in sorted(pairs, key=lambda pair: not _free(pair[0])):
        if not isinstance(product, fx.Node) or product.target not in ADDED or product.meta["sparse"]:
            continue
        if len(product.users) == 1 and x is not product:
            total.target, total.args = ADDED[product.target][_free(x)], (x, *product.args)
            graph.erase_node(product)
            return True
    return False


def _write_into(node: fx.Node) -> None:
    into, places = INTO.get(node.target, (None, ()))
    place = next((i for i in places if _free(node.args[i])), None)
    if place is None:
        return
    node.target = into
    if into is aten.threshold_backward.grad_input:
        node.kwargs = {"grad_input": node.args[0]}
    else:
        node.args = (node.args[place], node.args[1 - place])


def _free(x: Any) -> bool:
    """Whether a value lies in memory of its own, and is used but once."""
    return isinstance(x, fx.Node) and x.target in OWN and len(x.users) == 1


def _call(graph: fx.Graph, step: Step, nodes: dict[Ref, Any]) -> fx.Node:
    def decode(ref: Ref) -> Any:
        kind = ref[0]
        if kind == "[":
            return [decode(r) for r in ref[1:]]
        return ref[1] if kind == "=" else nodes["v" if kind == "v" else "c", ref[1]]

    kwargs = {name: decode(ref) for name, ref in step.kwargs}
    function: Any = QUICK.get(step.func, step.func)
    return graph.call_function(function, tuple(decode(ref) for ref in step.args), kwargs)


def _narrow(x: Any) -> Any:
    """A tensor without its copies along expanded axes: it broadcasts to the same."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    if x.layout is not torch.strided or all(x.stride()):
        return x
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
