"""Counts that do not depend on the machine: products, evaluations, reads from the device, vectors of memory."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

import hypergrad as hg

from . import (
    accuracy,
    bilevel,
    estimators,
    illconditioned,
    loops,
    networks,
    problems,
    small_layers,
    small_rows,
    unrolled,
)
from .illconditioned import Step
from .measure import counted, counting, operations, peak_memory
from .methods import METHODS, Method, graph_and_product, hypergradient, implicit, layer, library
from .problems import Problem
from .unrolled import Descent

Answer = TypeVar("Answer")

VECTORS = 4  # b, x, r and p of CG and of NormalCG; the current product is counted with the graph
FREED = 1  # ∇₁g, which `graph_and_product` holds and CG frees; the graph of a tanh map needs its own value
STEP_VECTORS = 1.5  # of a step of SOBA beyond its passes: D_v, and the vectors of λ's size in the checks and in .grad
SCALARS = 0.05  # allowance for scalars and other small objects, in vectors of the row `wide`

# Each solver, and the number of products in K steps from zero without a tolerance, without the last product.
SOLVERS: dict[str, tuple[Callable[[int], hg.solvers.LinearSolver], Callable[[int], int]]] = {
    "CG": (lambda k: hg.solvers.CG(max_steps=k, on_failure="ignore"), lambda k: k),
    "BlockCG": (lambda k: hg.solvers.BlockCG(max_steps=k, on_failure="ignore"), lambda k: k),
    "MINRES": (lambda k: hg.solvers.MINRES(max_steps=k, on_failure="ignore"), lambda k: k),
    "GMRES": (lambda k: hg.solvers.GMRES(max_steps=k, on_failure="ignore"), lambda k: k),
    "BiCGStab": (lambda k: hg.solvers.BiCGStab(max_steps=k, on_failure="ignore"), lambda k: 2 * k),
    "NormalCG": (lambda k: hg.solvers.NormalCG(max_steps=k, on_failure="ignore"), lambda k: 2 * k),
    "LSQR": (lambda k: hg.solvers.LSQR(max_steps=k, on_failure="ignore"), lambda k: 2 * k),
    "FixedPoint": (lambda k: hg.solvers.FixedPoint(max_steps=k, on_failure="ignore"), lambda k: k - 1),
    "Neumann": (lambda k: hg.solvers.Neumann(max_steps=k, on_failure="ignore"), lambda k: k),
}
OWN_PASSES = 3  # passes beyond the solver's: the gradient of the inner loss, the outer gradient, the last product


@contextmanager
def costly_reads() -> Iterator[None]:
    """In this block the library treats the CPU as a device on which reading a number waits for all queued work."""
    with ExitStack() as stack:
        for place in ("_vector", "_solution", "solvers._solver"):
            stack.enter_context(patch(f"hypergrad.{place}.FREE_TO_READ", ()))
        yield


def count(problem: Problem, call: Callable[[Problem], Answer]) -> tuple[Counter[str], Answer]:
    """Counts of a call (reverse passes, reads, evaluations of the inner and the outer loss), and its result."""
    with counted() as counts:
        inner, outer = counting(problem.inner, counts, "inner"), counting(problem.outer, counts, "outer")
        answer = call(replace(problem, inner=inner, outer=outer))
    return counts, answer


def expect(what: str, got: float, wanted: float, at_most: bool = False) -> None:
    if (got > wanted) if at_most else (got != wanted):
        raise AssertionError(f"{what}: {got:g} instead of {'at most ' if at_most else ''}{wanted:g}")


def check_method(problem: Problem, method: Method) -> Counter[str]:
    """Compare a method's counts on a problem in float64 with those that it claims, and its result with the truth."""
    title, steps = f"{problem.name}, {method.name}", problem.steps
    counts, grads = count(problem, method.run)
    expect(f"{title}: reverse passes", counts["passes"], method.passes_on(problem))
    expect(f"{title}: evaluations of the inner problem", counts["inner"], method.evaluations(steps))
    expect(f"{title}: evaluations of the outer loss", counts["outer"], 1)
    if method.truth:
        expect(f"{title}: error", problem.system.error(grads, method.truth), 1e-7, at_most=True)
    return counts


def check_solver(problem: Problem, name: str) -> Counter[str]:
    """Check implicit.grad with a solver in fixed-step mode: its counts, and that it reads nothing from the device."""
    make, products = SOLVERS[name]
    with costly_reads():
        counts, _ = count(problem, lambda p: implicit(p, make(p.steps)))
    expect(f"{problem.name}, {name}: reverse passes", counts["passes"], products(problem.steps) + OWN_PASSES)
    expect(f"{problem.name}, {name}: reads from the device", counts["reads"], 0)
    expect(f"{problem.name}, {name}: evaluations", counts["inner"] + counts["outer"], 2)
    return counts


def check_jacobian(problem: Problem, losses: int = 3) -> Counter[str]:
    """Check implicit.jacobian: each loss is evaluated once, and nothing is read from the device.

    Reverse passes: one for the graph, and for each of the outer losses K products, its gradient and the last product.
    """

    def call(p: Problem) -> object:
        return hg.implicit.jacobian(
            lambda w, h: p.outer_loss(w, h) * torch.arange(1.0, losses + 1, dtype=w[0].dtype),
            inner_loss=p.inner_loss,
            params=p.params,
            hparams=p.hparams,
            solver=SOLVERS["BlockCG"][0](p.steps),
        )

    with costly_reads():
        counts, _ = count(problem, call)
    due = 1 + losses * (problem.steps + OWN_PASSES - 1)
    expect(f"{problem.name}, jacobian of {losses}: reverse passes", counts["passes"], due)
    expect(f"{problem.name}, jacobian of {losses}: reads from the device", counts["reads"], 0)
    expect(f"{problem.name}, jacobian of {losses}: evaluations", counts["inner"] + counts["outer"], 2)
    return counts


def check_recycled(problem: Problem, size: int = 3) -> int:
    """Check hypergradients in fixed-step mode that start in the span of the last adjoints; passes of the last one."""
    recycled, passes = hg.solvers.Recycled(size), 0
    for step in range(size + 2):
        solver = SOLVERS["CG"][0](problem.steps)
        with costly_reads():
            counts, _ = count(problem, lambda p, s=solver: hypergradient(p, s, recycled))  # type: ignore[misc]
        passes = counts["passes"]
        kept = min(step, size)
        expect(f"{problem.name}, {kept} recycled: reverse passes", passes, problem.steps + OWN_PASSES + kept)
        expect(f"{problem.name}, {kept} recycled: reads from the device", counts["reads"], 0)
    return passes


def beside(problem: Problem, peak: int, fixed_point: bool) -> float:
    """The peak memory of a call beyond the graph and one product, in vectors of params' size."""
    least = peak_memory(lambda: graph_and_product(problem, fixed_point))
    return (peak - least) / sum(w.numel() * w.element_size() for w in problem.params)


def check_memory(problem: Problem) -> float:
    """Vectors that CG holds beyond the graph and one product (∇₁g, which it frees, counts as −1)."""
    peak = peak_memory(lambda: implicit(problem, SOLVERS["CG"][0](problem.steps)))
    held = beside(problem, peak, fixed_point=False)
    expect(f"{problem.name}, CG: vectors beside the graph", held, VECTORS - FREED + SCALARS, at_most=True)
    return held


def check_normal_memory(problem: Problem) -> float:
    """Vectors that NormalCG holds beyond the graph of a tanh map: those of CG, and one in the transposed graph."""
    call = functools.partial(library(hg.CG_normaleq), problem)
    call()  # the first call allocates memory that is kept, which is not counted
    held = beside(problem, peak_memory(call), fixed_point=True)
    expect(f"{problem.name}, CG_normaleq: vectors beside the graph", held, VECTORS + 1 + SCALARS, at_most=True)
    return held


def check_gmres_memory(steps: int, n: int = 20_000) -> float:
    """Vectors that GMRES holds at its peak: a basis that grows by eight vectors at a time, and seven others."""
    diagonal, b = torch.linspace(1.0, 2.0, n), torch.ones(n)
    op, solver = hg.operators.function(lambda v: diagonal * v), hg.solvers.GMRES(max_steps=steps)
    held = peak_memory(lambda: solver(op, b)) / (n * b.element_size())
    expect(f"GMRES, {steps} steps: vectors", held, 8 * (steps // 8 + 1) + 7, at_most=True)
    return held


def check_factorisations(n: int = 3, count: int = 4) -> Counter[str]:
    """Check that vmap(jacrev(root)) with the default solver calls LU and its solve once for all matrices."""
    with operations() as found:
        small_rows.roots(n, count).columns[1].run()
    for name in ("linalg_lu_factor_ex", "linalg_lu_solve"):
        expect(f"{count} roots: {name}", found[name], 1)
    return found


def check_mapped_solver(count: int = 4) -> int:
    """Check that the user's code runs once for all entries of a vmap: 12 steps of Newton's method need 12 + 1 LUs."""
    with operations() as found:
        small_rows.solved(count, 3).columns[1].run()
    expect(f"{count} solves under vmap: factorisations", found["linalg_lu_factor_ex"], 13)
    return found["linalg_lu_factor_ex"]


def check_forward_memory(problem: Problem) -> None:
    """Check that the layer's memory does not depend on the number of steps of its forward solver."""
    few, many = (peak_memory(lambda steps=steps: layer(problem, steps)) for steps in (3, 60))
    expect(f"{problem.name}: peak bytes after 60 steps, over those after 3", many / few, 1.05, at_most=True)


def check_unrolled(descent: Descent, column: unrolled.Column, exact: Tensor) -> int:
    """Check one way to store the steps: the number of evaluations of the step, and the result in float64."""
    assert column.evaluations
    result = unrolled.check(descent, column, exact)
    most = column.evaluations(descent.timed, descent.checkpoints)
    expect(f"{descent.name}, {column.name}: evaluations", result.evaluations, most, at_most=True)
    expect(f"{descent.name}, {column.name}: error", result.error, 1e-10, at_most=True)
    return result.evaluations


def check_loop(rule: str, steps: int = 12) -> int:
    """Check the evaluations of a compiled step: one for a comparison, and one forward and one backward per step."""
    call = loops.reversed_by(loops.Loop(rule, steps, torch.float64), memory="iterates", compile="eager")
    call()
    evaluations = call().evaluations
    expect(f"{rule}, compiled: evaluations of {steps} steps", evaluations, 2 * steps + 1)
    return evaluations


def check_forward_loop(rule: str, steps: int = 12) -> int:
    """Check the evaluations of a compiled step in forward mode: two for a comparison, and one per step."""
    call = loops.forwards(loops.Loop(rule, steps, torch.float64), compile="eager")
    call()
    evaluations = call().evaluations
    expect(f"{rule}, compiled forward mode: evaluations of {steps} steps", evaluations, steps + 2)
    return evaluations


def check_saved(steps: int) -> int:
    """Check that a layer saves three tensors for the backward pass: its parameter, its input, and z*."""
    cell, inputs, kept = small_layers.Tanh(6), torch.ones(4, 6, dtype=torch.float64, requires_grad=True), []
    layer = hg.nn.Equilibrium(cell, forward=hg.fixed_points.Picard(max_steps=steps, on_failure="ignore"))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(inputs)
    expect(f"a layer of {steps} steps: tensors saved", len(kept), 3)
    return len(kept)


def check_tracker(case: bilevel.Case, method: bilevel.Method) -> dict[str, int]:
    """Check a tracker's step: evaluations, reverse passes, second-order products, and the direction if it is exact."""
    found = bilevel.count(case, method)
    assert method.counts
    for name, wanted in method.counts.items():
        expect(f"{case.name}, {method.name}: {name}", found[name], wanted)
    if method.exact is not None:
        expect(f"{case.name}, {method.name}: error", bilevel.settled(case, method, 300)[0], method.exact, at_most=True)
    return found


def check_estimators() -> tuple[list[estimators.Result], dict]:
    """Check the estimators on a small model trained to the end: their passes, and the errors of those in `RIGHT`."""
    make, steps = functools.partial(networks.linear, count=40, steps=400), 400
    results, stood = estimators.measure_row("linear", make, list(estimators.METHODS), 1)
    expect("linear: differences of retraining", max(stood["differences, 0.0001"]), 1e-7, at_most=True)
    for r in results:
        if r.method in estimators.PASSES:
            expect(f"linear, {r.method}: reverse passes", r.passes[0], estimators.PASSES[r.method](steps))
        if r.method in estimators.RIGHT:
            expect(f"linear, {r.method}: error", r.errors[0], estimators.RIGHT[r.method], at_most=True)
    return results, stood


def check_step_memory(network: bilevel.Network) -> float:
    """Check how many vectors of params' size a step of SOBA holds at its peak beyond its passes by hand."""
    network.step()
    peaks = [peak_memory(call) for call in (network.step, network.by_hand)]
    held = (peaks[0] - peaks[1]) / sum(w.numel() * w.element_size() for w in network.params)
    expect("CNN, SOBA: vectors beyond its passes by hand", held, STEP_VECTORS, at_most=True)
    return held


def check_sequence(steps: list[Step]) -> tuple[int, int, int, int]:
    """Check that the reverse passes to an error of 1e-3 decrease: HyperTorch, from zero, warm-started, recycled."""
    columns = {column.name: column for column in accuracy.COLUMNS}
    found = []
    for name in ("HyperTorch CG", "hg CG, cold", "hg CG", "hg CG, Recycled(4)"):
        setting, _, passes = accuracy.search(columns[name], steps, 1e-3)
        assert setting is not None, f"{steps[0].problem.name}, {name}: 1e-3 is not reached"
        found.append(passes)
    theirs, cold, warm, recycled = found
    expect(f"{steps[0].problem.name}: reverse passes from zero, over HyperTorch's", cold / theirs, 1.0, at_most=True)
    expect(f"{steps[0].problem.name}: reverse passes warm-started, over cold", warm / cold, 0.95, at_most=True)
    expect(f"{steps[0].problem.name}: reverse passes recycled, over warm", recycled / warm, 0.95, at_most=True)
    return theirs, cold, warm, recycled


def run() -> None:
    """Check and print all counts. Raises AssertionError for a wrong one."""
    for build in problems.quick_rows().values():
        problem = build()
        print(f"{problem.name}: {problem.size} parameters, K = {problem.steps}")
        for method in METHODS:
            if method.fits(problem) and method.passes:
                show(method.name, check_method(problem, method))
        if problem.step_size is not None:
            print("  implicit.grad in fixed-step mode")
            for name in SOLVERS:
                show(f"  {name}", check_solver(problem, name))
            show("  BlockCG, 3 outer losses", check_jacobian(problem))
            print(f"  CG, 3 recycled: {check_recycled(problem)} reverse passes")
    for build in unrolled.QUICK.values():
        descent = build().to(torch.float64)
        exact = unrolled.truth(descent)
        print(f"{descent.name}: {descent.timed} steps")
        for column in unrolled.COLUMNS:
            if column.evaluations:
                print(f"  {column.name:32}{check_unrolled(descent, column, exact):4} evaluations of a step")
    for rule in ("SGD", "Adam"):
        reverse, forward = check_loop(rule), check_forward_loop(rule)
        print(f"{rule}, compiled step: {reverse} evaluations of 12 steps, {forward} in forward mode")
    for build_case in bilevel.QUICK.values():
        case = build_case()
        print(f"{case.name}: {case.lower.weight.numel()} params, {case.hparams[0].numel()} hparams")
        for tracker in bilevel.METHODS:
            if tracker.counts:
                found = check_tracker(case, tracker)
                show(tracker.name, Counter(found))
    print("linear, to the end: estimators")
    for name, passes in {r.method: r.passes[0] for r in check_estimators()[0]}.items():
        print(f"  {name:32}{passes:4} reverse passes")
    theirs, cold, warm, recycled = check_sequence(list(illconditioned.quick_sequence()))
    print(
        f"reverse passes to 1e-3 over 6 outer steps: HyperTorch {theirs}, cold {cold}, warm-started {warm}, "
        f"recycled {recycled}"
    )
    check_forward_memory(problems.equilibrium("equilibrium", 200, 20, 30, 3, 0.9))
    print(f"a layer's graph saves {check_saved(3)} tensors after 3 steps, {check_saved(60)} after 60")
    print(f"CG holds {check_memory(problems.wide()):.2f} vectors beside the graph and one product")
    print(f"GMRES holds {check_gmres_memory(5):.1f} vectors in 5 steps, {check_gmres_memory(20):.1f} in 20")
    print(f"4 roots and their Jacobians: {check_factorisations()['linalg_lu_factor_ex']} call of LU for all")
    print(f"4 solutions under vmap, 12 steps of Newton's method, and the gradient: {check_mapped_solver()} calls of LU")
    held = check_normal_memory(problems.equilibrium("equilibrium", 2000, 20, 30, 3, 0.9, steps=4))
    print(f"CG_normaleq holds {held:.2f} vectors beside the graph of a tanh map and one product")


def show(name: str, counts: Counter[str]) -> None:
    print(
        f"  {name:32}{counts['passes']:4} reverse passes,{counts['inner']:3} inner and {counts['outer']} outer "
        f"evaluations, {counts['reads']} reads" + f", {counts['products']} products" * bool(counts["products"])
    )
