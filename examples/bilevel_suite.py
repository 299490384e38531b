"""The JAX solvers of benchopt/benchmark_bilevel on the ijcnn1 problem; they need its clone, benchopt and jax."""

import importlib
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.bilevel_problems import Logistic

MODULES = {"SABA": "saba", "SRBA": "srba", "AmIGO": "amigo", "stocBiO": "stocbio"}


def missing(folder: Path | None) -> str | None:
    """The reason why the suite's solvers cannot run; None if they can."""
    if folder is None:
        return "The suite's own solvers are left out: --suite names no clone of github.com/benchopt/benchmark_bilevel."
    absent = [name for name in ("jax", "benchopt") if find_spec(name) is None]
    if not (folder / "solvers" / "saba.py").is_file():
        absent.append(f"clone of benchopt/benchmark_bilevel in {folder.name}")
    return f"The suite's own solvers are left out: there is no {', no '.join(absent)}." if absent else None


def solver_of(folder: Path, name: str, options: dict[str, Any]) -> Any:
    """The suite's solver with this name and these parameters."""
    sys.path.insert(0, str(folder))
    try:
        kind = importlib.import_module(f"solvers.{MODULES[name]}").Solver
    finally:
        sys.path.remove(str(folder))
    return kind.get_instance(**options)


def losses(problem: Logistic) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """g and f on a block of consecutive rows, in the form that the suite's solvers take."""
    jax = importlib.import_module("jax")
    x, xv = (jax.numpy.asarray(part.numpy(), "float32") for part in (problem.x, problem.xv))

    def mean(rows: Any, w: Any, start: Any, size: int) -> Any:
        block = jax.lax.dynamic_slice(rows, (start, 0), (size, rows.shape[1]))
        return -jax.nn.log_sigmoid(block @ w).mean()

    def inner(w: Any, lam: Any, start: Any = 0, batch_size: int = 1) -> Any:
        return mean(x, w, start, batch_size) + (jax.numpy.exp(lam) * w**2).sum() / 2

    def outer(w: Any, lam: Any, start: Any = 0, batch_size: int = 1) -> Any:
        return mean(xv, w, start, batch_size)

    return inner, outer


def run(
    problem: Logistic, folder: Path, name: str, options: dict[str, Any], seeds: list[int], iterations: int, points: int
) -> dict[str, Any]:
    """Run one seed after the other, measured at equal distances; seconds exclude compilation and measurements."""
    every, curves = max(1, iterations // points), []
    for seed in seeds:
        solver = solver_of(folder, name, options | {"eval_freq": every, "random_state": seed})
        start = [importlib.import_module("jax").numpy.asarray(each.numpy(), "float32") for each in problem.start()]
        solver.set_objective(*losses(problem), *problem.sizes, *start)
        curves.append(curve(problem, solver, points))
    merged = []
    for k in range(points):
        each = [seen[k] for seen in curves]
        metrics = {metric: [x[metric][0] for x in each] for metric in problem.metrics}
        merged.append({"t": every * (k + 1), "seconds": float(np.median([x["seconds"] for x in each]))} | metrics)
    return {"t": every * points, "seconds": merged[-1]["seconds"], "curve": merged}


def curve(problem: Logistic, solver: Any, points: int) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    spent, begin = 0.0, None

    def callback() -> bool:
        nonlocal spent, begin
        if begin is not None:
            result = solver.get_result()
            w, lam = (
                torch.tensor(np.array(result[key]), dtype=torch.float64)[None] for key in ("inner_var", "outer_var")
            )
            spent += time.process_time() - begin
            seen.append({"seconds": spent} | problem.measure(w, lam))
        begin = time.process_time()
        return len(seen) < points

    solver.run(callback)
    return seen
