# %% [markdown]
# # An inner problem that is not solved
#
# HyperTorch's introductory example tunes the 20 penalties of a logistic regression:
#
#     w(λ) = argmin_w  mean log-loss on 500 rows + ½ Σⱼ λⱼ wⱼ²,      min_λ  mean log-loss on 500 other rows
#
# by 100 gradient steps of size 0.1 on w, started from zero, and reverse mode through the last ten of them. Its
# validation loss decreases from 0.574 to 0.281 and its hypergradients vanish, as if converged. But w is far from w(λ).
# This script runs the example, checks its last hypergradient by `hg.diagnostics`, and follows the report's advice.

# %%
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from sklearn.model_selection import train_test_split
from torch.nn.functional import binary_cross_entropy_with_logits as log_loss
from tqdm import tqdm

import hypergrad as hg
from examples.common import Common, parse, save


@dataclass
class Config(Common):
    seed: int = 1
    """Seed of the data; the published example has 1."""
    outer_steps: int = 1000
    """Outer steps of the published example."""
    inner_steps: int = 100
    """T, the number of inner steps from zero in every outer step."""
    step_size: float = 0.1
    """Step size of the inner gradient descent."""
    truncation: int = 10
    """K, the number of last steps that are differentiated."""
    least: float = 1e-8
    """Lower bound on λ, to which it is clamped."""
    most: float = 2.2e4
    """Upper bound on λ in the remedy, at which a weight is practically zero."""
    rtol: float = 1e-6
    """Relative error to which the remedy's hypergradients are refined."""
    evaluations: int = 200
    """Largest number of evaluations in the remedy."""
    looks: int = 40
    """Outer steps of the example at which the exact values are computed as well."""


FAST: dict[str, Any] = {"outer_steps": 60, "evaluations": 60, "looks": 4}


# %% [markdown]
# ## The problem
#
# 1,000 rows of 20 normal features have labels from a linear model with little noise. They are nearly separable, so
# without penalties the weights grow very large.


# %%
@dataclass(frozen=True)
class Problem:
    x: torch.Tensor
    y: torch.Tensor
    xv: torch.Tensor
    yv: torch.Tensor

    def inner_loss(self, w: list[torch.Tensor], lam: list[torch.Tensor]) -> torch.Tensor:
        return log_loss(self.x @ w[0], self.y) + 0.5 * (lam[0] * w[0] ** 2).sum()

    def outer_loss(self, w: list[torch.Tensor], lam: list[torch.Tensor]) -> torch.Tensor:
        return log_loss(self.xv @ w[0], self.yv)


def data(seed: int) -> Problem:
    random = np.random.RandomState(seed)
    oracle, x = random.randn(20), random.randn(1000, 20)
    y = (x @ oracle + 0.1 * random.randn(1000) > 0).astype(float)
    x, xv, y, yv = train_test_split(x, y, test_size=0.5, random_state=random)
    return Problem(*map(torch.from_numpy, (x, y, xv, yv)))


def exact(problem: Problem, lam: torch.Tensor, start: torch.Tensor, rtol: float) -> hg.Hypergradient:
    """The hypergradient to a relative error of `rtol`; Newton's method solves the inner problem from `start`."""
    rough = hg.implicit.grad(
        problem.outer_loss,
        inner_loss=problem.inner_loss,
        params=[start],
        hparams=[lam.detach().requires_grad_()],
        solver=hg.solvers.Dense(on_failure="ignore"),
    )
    return hg.implicit.refine(rough, rtol, solver=hg.solvers.Dense())


# %% [markdown]
# ## The published example


# %%
def approximate(problem: Problem, lam: torch.Tensor, config: Config) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """w after T steps from zero, and the hypergradient through the last K, which is also added to the .grad of λ."""
    inner = hg.GradientDescent(problem.inner_loss, config.step_size)
    history = [inner.get_opt_params([torch.zeros(20, dtype=torch.float64)])]
    for _ in range(config.inner_steps):
        history.append(inner(history[-1], [lam], create_graph=False))
    grads = hg.reverse(history[-1 - config.truncation :], [lam], [inner] * config.truncation, problem.outer_loss)
    return history[-1][0].detach(), grads


def published(problem: Problem, config: Config) -> tuple[dict[str, list[float]], torch.Tensor]:
    """The reported values at each λ, the exact values at some of them, and the last λ."""
    lam = torch.ones(20, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.SGD([lam], lr=1.0, momentum=0.9)
    curves: dict[str, list[float]] = {name: [] for name in ("loss", "norm", "look", "exact loss", "exact norm")}
    every, solution = max(1, config.outer_steps // config.looks), torch.zeros(20, dtype=torch.float64)
    for step in tqdm(range(config.outer_steps + 1), "published example"):
        outer.zero_grad()
        w, grads = approximate(problem, lam, config)
        curves["loss"].append(problem.outer_loss([w], [lam]).item())
        curves["norm"].append(grads[0].norm().item())
        if step % every == 0 or step == config.outer_steps:
            true = exact(problem, lam, solution, 1e-8)
            solution = true.problem.params[0]
            for name, value in (("look", step), ("exact loss", true.outer_value), ("exact norm", true.grads[0].norm())):
                curves[name].append(float(value))
        if step < config.outer_steps:
            outer.step()
            lam.data.clamp_(min=config.least)
    return curves, lam.detach()


# %% [markdown]
# ## The report and the remedy
#
# The report takes Newton steps from w until its estimate of the error has converged. The remedy is `implicit.refine`,
# which takes them until the hypergradient is accurate. With such hypergradients L-BFGS-B continues in log λ from the
# end of the example, with the same bound λ ≥ 1e-8.


# %%
def remedy(problem: Problem, lam: torch.Tensor, config: Config) -> dict[str, list[float]]:
    """The validation loss and the norm of the hypergradient at each evaluation, and the best λ."""
    curves: dict[str, list[float]] = {"loss": [], "norm": [], "hparams": []}
    start = torch.zeros(20, dtype=torch.float64)

    def value_and_grad(log_lam: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal start
        at = torch.from_numpy(np.exp(log_lam).clip(config.least, config.most))
        result = exact(problem, at, start, config.rtol)
        start = result.problem.params[0]
        curves["loss"].append(result.outer_value.item())
        curves["norm"].append(result.grads[0].norm().item())
        if curves["loss"][-1] == min(curves["loss"]):
            curves["hparams"] = at.tolist()
        progress.update()
        return result.outer_value.item(), (at * result.grads[0]).numpy()

    bounds = [(np.log(config.least), np.log(config.most))] * 20
    options = {"maxfun": config.evaluations, "ftol": 1e-14, "gtol": 1e-8}
    with tqdm(total=config.evaluations, desc="remedy") as progress:
        minimize(value_and_grad, lam.log().numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return curves


def table(curves: dict[str, list[float]], report: hg.diagnostics.Report, after: dict[str, list[float]]) -> str:
    e = report.estimate
    rows = [
        ("the example says", curves["loss"][-1], curves["norm"][-1]),
        ("the report estimates", e.corrected_value, e.corrected_norm),
        ("exact, at the same λ", curves["exact loss"][-1], curves["exact norm"][-1]),
        ("after the remedy", min(after["loss"]), None),
    ]
    lines = ["| | validation loss | norm of the hypergradient |", "|---|---|---|"]
    lines += [f"| {name} | {loss:.4f} | {'' if norm is None else f'{norm:.2f}'} |" for name, loss, norm in rows]
    return "\n".join(lines) + f"\n\nThe report:\n\n```text\n{report}\n```"


# %% [markdown]
# ## Results


# %%
def plot(curves: dict[str, list[float]], report: hg.diagnostics.Report, after: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(6, 8), layout="constrained")
    left, right = figure.subplots(2, 1)
    e, last, steps = report.estimate, len(curves["loss"]) - 1, range(len(curves["loss"]))
    says, true, better = "#d9822b", "#b5403c", "#3b6fb6"
    beyond = [last + i for i in range(len(after["loss"]))]
    best = np.minimum.accumulate(after["loss"])
    left.plot(steps, curves["loss"], color=says, label="what the example says")
    left.plot(curves["look"], curves["exact loss"], color=true, label="exact, at the same λ")
    left.plot([last], [e.corrected_value], "*", ms=13, color="black", label="the report's estimate", zorder=5)
    left.plot(beyond, best, color=better, label="after the remedy: best so far")
    left.set(title="Validation loss", xlabel="outer step, then evaluation", yscale="log")
    right.plot(steps, curves["norm"], color=says)
    right.plot(curves["look"], curves["exact norm"], color=true)
    right.plot([last], [e.corrected_norm], "*", ms=13, color="black", zorder=5)
    right.set(title="Norm of the hypergradient", xlabel="outer step", yscale="log")
    left.set_yticks(ticks := [0.03, 0.05, 0.1, 0.2, 0.3, 0.5], [str(tick) for tick in ticks])
    left.minorticks_off()
    ends = [(left, last, curves["loss"][-1], says, "{:.4f}"), (left, last, curves["exact loss"][-1], true, "{:.4f}")]
    ends += [(left, beyond[-1], best[-1], better, "{:.4f}"), (right, last, curves["norm"][-1], says, "{:.2f}")]
    ends += [(right, last, curves["exact norm"][-1], true, "{:.1f}")]
    for axes, x, y, colour, text in ends:
        axes.annotate(text.format(y), (x, y), (9, 0), textcoords="offset points", va="center", color=colour)
    for axes in (left, right):
        axes.set_xlim(right=1.25 * last)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6")
    left.legend(frameon=False)
    return figure


def main() -> None:
    config = parse(Config, "An example whose inner problem is not solved, and its remedy.", FAST)
    problem = data(config.seed)
    curves, lam = published(problem, config)
    w, grads = approximate(problem, lam.clone().requires_grad_(), config)
    at = {"outer_loss": problem.outer_loss, "params": [w], "hparams": [lam.clone().requires_grad_()]}
    gradient_step = hg.GradientDescent(problem.inner_loss, config.step_size)
    report = hg.diagnostics.check(grads, fp_map=gradient_step, symmetric=True, **at)
    after = remedy(problem, lam, config)
    results = {"hparams": lam.tolist(), "curves": curves, "report": report.to_dict(), "remedy": after}
    shown = table(curves, report, after)
    save(config, "An inner problem that is not solved", shown, plot(curves, report, after), results)


if __name__ == "__main__":
    main()
