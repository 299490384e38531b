# %% [markdown]
# # The problems of benchmark_bilevel: stochastic algorithms with the suite's steps
#
#     min_λ f(w*(λ), λ),      w*(λ) = argmin_w g(w, λ),      f and g are means over rows of data
#
# Dagréou, Ablin, Vaiter and Moreau 2022 (arXiv:2201.13409) and their suite benchopt/benchmark_bilevel compare
# algorithms on four problems: random quadratics, a penalty for each weight of a logistic regression on ijcnn1, one for
# each class on covtype, and a weight for each of 20,000 MNIST images of which half are labelled at random. Here the
# trackers of `hg.bilevel` run on these problems with the step sizes that the suite has tuned. Their cost is counted in
# per-sample evaluations: a gradient, a Hessian product and a cross product of one sample count as one each.
#
# All seeds run at once, in tensors with a leading axis of seeds. They have the same start, and each draws the blocks of
# rows in a different order. Differences from the suite: every block is drawn once per epoch (the suite's sampler draws
# the last one twice), AmIGO's tenth inner step is taken together with the outer step, and F2SA keeps its penalty. On
# ijcnn1 the tuned steps are close to divergence: if each seed has a different start, 3 of 10 seeds of SABA diverge, and
# so they do with the suite's own solver.

# %%
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from examples import bilevel_suite as suite
from examples.bilevel_problems import Logistic, Problem, ValueProblem, descend, problem
from examples.bilevel_runs import BUDGETS, ROWS, Run, finish, keep
from examples.common import Common, parse, rounded, save


@dataclass
class Config(Common):
    data: Path | None = None
    """Folder of ijcnn1, covtype and MNIST in the formats that examples/datasets.py reads; without it, small data."""
    problems: tuple[str, ...] = ("simulated", "ijcnn1", "covtype", "mnist")
    """Names of the problems."""
    methods: tuple[str, ...] = ()
    """Rows of the table, such as SABA or ijcnn1/SABA; all rows if none is named."""
    seeds: int = 10
    """Number of seeds, from --seed + 1 on."""
    batch: int = 64
    """Rows of a block."""
    evaluations: float = 1.0
    """Per-sample evaluations for each seed, as a fraction of BUDGETS."""
    points: int = 15
    """Points of each curve."""
    checkpoints: Path | None = None
    """Folder for the state of every run, from which --resume continues."""
    checkpoint_every: float = 60.0
    """Seconds between two checkpoints."""
    resume: bool = False
    """Continue the runs in --checkpoints; finished runs are not repeated."""
    suite: Path | None = None
    """Clone of benchopt/benchmark_bilevel; its solvers run on ijcnn1, too, if jax and benchopt are installed."""


FAST = {"seeds": 3, "evaluations": 0.001, "points": 4}
BATCH = "L-BFGS on h"
OF_SUITE = ", JAX"  # suffix of the names of the suite's own solvers


# %% [markdown]
# ## In batch
# For comparison: `implicit.grad` with L-BFGS on h, if the inner problem can be solved to rounding level by Newton's
# method. Its Hessian is kept as long as it converges fast; computing one counts as d products.


# %%
def in_batch(problem: ValueProblem, progress: tqdm) -> dict[str, Any]:
    """L-BFGS on h. It does not depend on seeds, and its curve shows the best value so far."""
    curve, best = [], None
    for spent, seconds, h, norm in descend(problem, *problem.start(), most=300):
        best = (h, norm) if best is None or h < best[0] else best
        metrics = dict(zip(problem.metrics, ([best[0] - problem.best], [best[1]]), strict=True))
        curve.append({"evaluations": spent, "seconds": seconds} | metrics)
    progress.update(progress.total)
    return {"t": len(curve), "seconds": curve[-1]["seconds"], "curve": curve}


# %% [markdown]
# ## All rows


# %%
def of_suite(of: Logistic, method: str, seeds: list[int], config: Config, budget: float) -> dict[str, Any]:
    """A solver of the suite with its tuned steps, from the same start."""
    assert config.suite is not None
    row, (n, m) = ROWS["ijcnn1"][method], of.sizes
    cost: float = config.batch * row.blocks
    options: dict[str, Any] = {"step_size": row.step, "outer_ratio": row.ratio, "batch_size": config.batch}
    if row.kind == "SRBA":
        options["period_frac"] = row.period
        cost += (3 * n + m - cost) / row.restarts(of.sizes, config.batch)
    done = suite.run(of, config.suite, method, options, seeds, math.ceil(budget / cost), config.points)
    for point in done["curve"]:
        point["evaluations"] = point["t"] * cost
    return done


def identity(name: str, method: str, of: Problem, config: Config) -> dict[str, Any]:
    """The settings that have to be equal if a saved run is to be continued."""
    row = asdict(ROWS[name][method]) if method in ROWS[name] else {}
    numbers = {key: getattr(config, key) for key in ("seed", "seeds", "batch", "evaluations", "points")}
    return {"data": of.data, "sizes": list(of.sizes)} | row | numbers


def saved(file: Path | None, own: dict[str, Any], config: Config) -> dict[str, Any]:
    """The content of a file in --checkpoints; empty without --resume."""
    if not config.resume or file is None or not file.is_file():
        return {}
    state = torch.load(file, weights_only=True)
    old = state["identity"]
    if old != own:
        odd = ", ".join(
            f"{key} {old.get(key)} → {own.get(key)}" for key in {**old, **own} if old.get(key) != own.get(key)
        )
        raise SystemExit(f"{file} comes from another configuration ({odd}): remove it, or run without --resume")
    return state


def one(name: str, method: str, of: Problem, config: Config, progress: tqdm) -> dict[str, Any]:
    """The finished run of a row: read from its file, continued from there, or run from the start."""
    seeds = [config.seed + 1 + i for i in range(config.seeds)]
    budget, own = BUDGETS[name] * config.evaluations, identity(name, method, of, config)
    file = None if config.checkpoints is None else config.checkpoints / f"{name}-{method.replace(' ', '_')}.pt"
    state = saved(file, own, config)
    if "finished" in state:
        return state["finished"]
    if method in ROWS[name]:
        running = Run(of, ROWS[name][method], seeds, config.batch)
        if state:
            running.load_state_dict(state)
            progress.update(running.state["evaluations"])
        kept = None if file is None else lambda: keep(file, running.state_dict() | {"identity": own})
        done = finish(running, budget, config.points, progress, kept, config.checkpoint_every)
    elif method == BATCH:
        assert isinstance(of, ValueProblem)
        done = in_batch(of, progress)
    else:
        assert isinstance(of, Logistic)
        done = of_suite(of, method.removesuffix(OF_SUITE), seeds, config, budget)
    if file is not None:
        keep(file, {"finished": done, "identity": own})
    return done


def methods_of(name: str, of: Problem, config: Config) -> list[str]:
    found = [*ROWS[name]]
    if isinstance(of, Logistic) and suite.missing(config.suite) is None:
        found += [method + OF_SUITE for method in suite.MODULES]
    if isinstance(of, ValueProblem):
        found.append(BATCH)
    named = config.methods
    return [method for method in found if not named or method in named or f"{name}/{method}" in named]


def compare(config: Config) -> dict[str, Any]:
    """Run every row of every problem."""
    if config.resume and config.checkpoints is None:
        raise SystemExit("--resume needs the folder of the saved runs: --checkpoints FOLDER")
    results = {}
    for name in config.problems:
        of = problem(name, config.data, config.fast)
        budget, rows = BUDGETS[name] * config.evaluations, {}
        for method in tqdm(methods_of(name, of, config), desc=name):
            with tqdm(total=budget, desc=method, unit_scale=True, unit="evaluation", leave=False) as bar:
                rows[method] = summary(one(name, method, of, config, bar), of.metrics)
        results[name] = {"data": of.data, "sizes": of.sizes, "budget": budget, "metrics": of.metrics, "rows": rows}
        if isinstance(of, ValueProblem):
            results[name]["best"] = of.best
    return results


# %% [markdown]
# ## Results


# %%
def band(values: list[float], worst: float) -> dict[str, float | None]:
    """The median and the 20 % and 80 % quantiles over seeds; None if the quantile is a diverged seed."""
    filled = sorted(worst if math.isnan(x) else x for x in values)
    last = len(filled) - 1
    places = {"low": [math.floor(0.2 * last)], "median": [last // 2, (last + 1) // 2], "high": [math.ceil(0.8 * last)]}
    found = {key: float(np.mean([filled[k] for k in ks])) for key, ks in places.items()}
    return {key: x if math.isfinite(x) else None for key, x in found.items()}


def summary(done: dict[str, Any], metrics: tuple[str, ...]) -> dict[str, Any]:
    """The curve as bands, and the values of all seeds at its last point."""
    curve = done["curve"]
    found: dict[str, Any] = {"iterations": done["t"], "seconds": done["seconds"]}
    bands: dict[str, Any] = {key: [float(point[key]) for point in curve] for key in ("evaluations", "seconds")}
    for metric in metrics:
        worst = -math.inf if metric == "AUC" else math.inf
        each = [band(point[metric], worst) for point in curve]
        bands[metric] = {key: [x[key] for x in each] for key in each[0]}
    found["curve"] = bands
    found["seeds"] = {m: [None if math.isnan(x) else x for x in curve[-1][m]] for m in metrics}
    return found


def shown(metric: str, found: dict[str, Any], at: int = -1) -> str:
    """The band at a point of the curve, as text."""
    form = {"test error": "{:.2%}", "AUC": "{:.3f}"}.get(metric, "{:.1e}")
    median, low, high = (found["curve"][metric][key][at] for key in ("median", "low", "high"))
    cells = ["diverged" if x is None else form.format(x) for x in (median, low, high)]
    return cells[0] if len(found["seeds"][metric]) == 1 else f"{cells[0]} [{cells[1]}, {cells[2]}]"


def table(results: dict[str, Any], config: Config) -> str:
    head = "| problem | algorithm | step, ratio | h − h* or test error | ‖∇h‖² or AUC | iterations | CPU s |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name, each in results.items():
        for method, found in each["rows"].items():
            row = ROWS[name].get(method.removesuffix(OF_SUITE))
            steps = "–" if row is None else f"{row.step:g}, {row.ratio:g}{'' if row.tuned else ' *'}"
            cells = [shown(metric, found) for metric in each["metrics"]] + ["–"]
            numbers = f"{found['iterations']:,} | {found['seconds']:.0f}"
            lines.append(f"| {name} | {method} | {steps} | {cells[0]} | {cells[1]} | {numbers} |")
    return "\n".join(lines) + "\n\n" + notes(results, config)


def notes(results: dict[str, Any], config: Config) -> str:
    """The explanation of the table."""
    said = [
        f"Medians and, in brackets, 20 % and 80 % quantiles over {config.seeds} seeds. Per-sample evaluations for each "
        "seed (a gradient, a Hessian product and a cross product of one sample count as one each):"
    ]
    for name, each in results.items():
        n, m = each["sizes"]
        said.append(f"{name}: {each['budget']:.3g}, on {each['data']}; g has {n:,} rows, f has {m:,}.")
    said.append(
        "The suite has tuned the steps; those with * are guesses. A diverged seed counts as the worst. AUC measures "
        "how well small weights find the wrong labels. CPU seconds do not include measurements; they are totals over "
        f"all seeds, which run at once, but in the rows {BATCH} and JAX those of one seed (medians)."
    )
    if "mnist" in results:
        said.append("The row no weights ends after 8,000 steps, as SOBA does.")
    for name, each in results.items():
        if BATCH in each["rows"]:
            found, metric = each["rows"][BATCH], each["metrics"][0]
            spent = found["curve"]["evaluations"]
            at = max(0, sum(each["budget"] >= x for x in spent) - 1)
            said.append(
                f"{name}, {BATCH}: the row shows its end, after {spent[-1]:.2g} evaluations; after as many as the "
                f"others it has reached {shown(metric, found, at)}, in {found['curve']['seconds'][at]:.2g} CPU seconds."
                f" h* is {each['best']:.5f}{', its end from the start λ = −5' if name == 'ijcnn1' else ''}."
            )
    if "ijcnn1" in results:
        why = suite.missing(config.suite)
        said.append(why or "Rows with JAX are the suite's own solvers in single precision, from the same start.")
    return "\n".join(said)


# %%
def draw(results: dict[str, Any]) -> Figure:
    """The first metric of each problem over evaluations and over CPU seconds."""
    figure = Figure((6, 7.6 * len(results)), layout="constrained")
    grid = figure.subplots(2 * len(results), 1, squeeze=False).reshape(-1, 2)
    for axes, (name, each) in zip(grid, results.items(), strict=True):
        metric, colours = each["metrics"][0], {}
        for method, found in each["rows"].items():
            style = "--" if method == BATCH else ":" if method.endswith(OF_SUITE) else "-"
            colour = colours.setdefault(method.removesuffix(OF_SUITE), f"C{len(colours)}")
            curve = found["curve"]
            median, low, high = (
                [math.nan if x is None else x for x in curve[metric][key]] for key in ("median", "low", "high")
            )
            for ax, key in zip(axes, ("evaluations", "seconds"), strict=True):
                ax.plot(curve[key], median, style, color=colour, label=method)
                ax.fill_between(curve[key], low, high, color=colour, alpha=0.15, linewidth=0)
        scale = "linear" if metric == "test error" else "log"
        for ax, label in zip(axes, ("per-sample evaluations a seed", "CPU seconds"), strict=True):
            ax.set(xscale="log", yscale=scale, xlabel=label, ylabel=metric, title=f"{name} ({each['data']})")
        axes[1].legend(fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def main(config: Config) -> None:
    results = compare(config)
    save(config, "Bilevel algorithms over minibatches", table(results, config), draw(results), rounded(results))


# %%
if __name__ == "__main__":
    main(parse(Config, "The problems of benchmark_bilevel, with hg.bilevel's trackers.", FAST))
