# %% [markdown]
# # HyperTorch's logistic regression, compared with the exact hypergradient
#
# Synthetic data, y = [xᵀw_oracle + noise > 0], 20 features, 500 rows each for training and validation; one ℓ₂ strength
# for each feature is the hyperparameter:
#
#     w*(λ) = argmin_w  log-loss_train(w) + ½ Σ λⱼ wⱼ²,      min_{λ ≥ 1e-8}  f(λ) = log-loss_validation(w*(λ))
#
# HyperTorch's notebook (Grazzi, Franceschi, Pontil and Salzo 2020, "On the iteration complexity of hypergradient
# computation") takes T = 100 gradient steps of size .1 from zero on the inner problem, computes the hypergradient by
# reverse mode through the last K = 10, and updates λ by SGD with momentum. This is the same run, number for number,
# together with the exact hypergradient at every outer step and the best λ, which the run does not know.

# %%
# %cd ..

# %%
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import minimize
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

import hypergrad as hg
from examples.common import Common, parse, rounded, save


@dataclass
class Config(Common):
    data: Path | None = None
    """Not used: the data is drawn at random."""
    outer_steps: int = 300
    """Updates of λ."""
    inner_steps: int = 100
    """T, the number of gradient steps from zero."""
    terms: int = 10
    """K, the number of steps that `reverse` differentiates, or of steps of the linear solver."""
    most_terms: int = 100
    """The largest K in the picture of the error against K."""
    inner_lr: float = 0.1
    """Size of an inner step."""
    outer_lr: float = 1.0
    """Learning rate of SGD on λ."""
    momentum: float = 0.9
    """Momentum of SGD on λ."""
    least: float = 1e-8
    """The smallest strength: λ is clamped after each update."""
    seed: int = 1
    """Seed of the data; HyperTorch's is 1."""


FAST = {"outer_steps": 5, "most_terms": 20}

# %% [markdown]
# ## The problem


# %%
class Problem:
    """HyperTorch's data, drawn as in its notebook from one NumPy stream: w_oracle, x, noise, the split, test data."""

    def __init__(self, config: Config, rows: int = 1000, features: int = 20):
        draw = np.random.RandomState(config.seed)
        self.oracle, x = draw.randn(features), draw.randn(rows, features)
        y = x @ self.oracle + 0.1 * draw.randn(rows) > 0
        parts = train_test_split(x, y.astype(float), test_size=0.5, random_state=draw)
        self.x, self.xv, self.y, self.yv = (torch.from_numpy(part) for part in parts)
        xt = draw.randn(rows, features)
        yt = xt @ self.oracle + 0.1 * draw.randn(rows) > 0
        self.xt, self.yt = torch.from_numpy(xt), torch.from_numpy(yt.astype(float))
        self.config, self.features = config, features
        self.step = hg.GradientDescent(self.inner_loss, config.inner_lr)
        self.solve = hg.implicit.solver(argmin=self.inner_loss, solver=hg.solvers.Dense())(self.newton)

    def inner_loss(self, params: Any, hparams: Any) -> Tensor:
        (w,), (lam,) = params, hparams
        return binary_cross_entropy_with_logits(self.x @ w, self.y) + 0.5 * (lam * w**2).sum()

    def outer_loss(self, params: Any, hparams: Any) -> Tensor:
        return binary_cross_entropy_with_logits(self.xv @ params[0], self.yv)

    def test_loss(self, params: Any) -> float:
        return binary_cross_entropy_with_logits(self.xt @ params[0], self.yt).item()

    def newton(self, hparams: Any) -> list[Tensor]:
        """w*(λ) to rounding level by Newton's method, whose steps are halved until the loss decreases."""
        (lam,), w = hparams, torch.zeros(self.features, dtype=torch.float64)
        for _ in range(100):
            p = torch.sigmoid(self.x @ w)
            gradient = self.x.T @ (p - self.y) / len(self.y) + lam * w
            hessian = self.x.T @ (self.x * (p * (1 - p))[:, None]) / len(self.y) + torch.diag(lam)
            direction = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
            if gradient.dot(direction) < 1e-26:
                break
            size, here = 1.0, self.inner_loss([w], [lam])
            while size > 1e-8 and self.inner_loss([w - size * direction], [lam]) > here:
                size /= 2
            w = w - size * direction
        return [w]

    def unroll(self, lam: Tensor, steps: int, create_graph: bool = False) -> list[list[Tensor]]:
        """w_0 … w_T by gradient steps from zero."""
        history = [[torch.zeros(self.features, dtype=torch.float64)]]
        for _ in range(steps):
            history.append(self.step(history[-1], [lam], create_graph=create_graph))
        return history

    def exact(self, lam: Tensor) -> tuple[float, Tensor]:
        """f(λ) and ∇f(λ), with Newton's method for the inner problem and a dense factorisation for the adjoint."""
        leaf = lam.detach().requires_grad_()
        value = self.outer_loss(self.solve([leaf]), [leaf])
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad


# %% [markdown]
# ## The methods
# All methods of HyperTorch under its names, with K terms. The fixed point map of the implicit ones is a gradient step.


# %%
Method = Callable[[Problem, list[list[Tensor]], Tensor, int], Tensor]


def implicit(function: Callable[..., list[Tensor]]) -> Method:
    def hypergradient(problem: Problem, history: list[list[Tensor]], lam: Tensor, terms: int) -> Tensor:
        return function(history[-1], [lam], terms, problem.step, problem.outer_loss, set_grad=False)[0]

    return hypergradient


def reverse(problem: Problem, history: list[list[Tensor]], lam: Tensor, terms: int) -> Tensor:
    """Reverse mode through the last K steps."""
    past = history[-terms - 1 :]
    return hg.reverse(past, [lam], [problem.step] * (len(past) - 1), problem.outer_loss, set_grad=False)[0]


def reverse_unroll(problem: Problem, history: list[list[Tensor]], lam: Tensor, terms: int) -> Tensor:
    """Reverse mode through all T steps by the graph of the loop."""
    params = problem.unroll(lam, len(history) - 1, create_graph=True)[-1]
    return hg.reverse_unroll(params, [lam], problem.outer_loss, set_grad=False)[0]


def stochastic(problem: Problem, history: list[list[Tensor]], lam: Tensor, terms: int) -> Tensor:
    """HyperTorch's stoch_AID on full batches: K steps of SGD with its learning rate of 1 on the linear system."""
    options = {"K": terms, "fp_map": problem.step, "set_grad": False, "verbose": False}
    return hg.stoch_AID(history[-1], [lam], problem.outer_loss, **options)[0][0]


METHODS: dict[str, Method] = {
    "reverse_unroll": reverse_unroll,
    "reverse": reverse,
    "fixed_point": implicit(hg.fixed_point),
    "neumann": implicit(hg.neumann),
    "CG": implicit(hg.CG),
    "CG_normaleq": implicit(hg.CG_normaleq),
    "stoch_AID": stochastic,
}


def measured(method: Method, *arguments: Any) -> tuple[Tensor, int, float]:
    """The hypergradient, the number of warnings, and CPU seconds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.process_time()
        result = method(*arguments)
        return result, len(caught), time.process_time() - start


def error(approximation: Tensor, truth: Tensor) -> float:
    """The relative error in the Euclidean norm."""
    return ((approximation - truth).norm() / truth.norm()).item()


# %% [markdown]
# ## At one λ: the error against K
# Here λ = 1, where 100 steps solve the inner problem to five digits.


# %%
def errors_by_terms(problem: Problem, lam: Tensor, most: int) -> dict[str, list[float]]:
    lam = lam.detach().requires_grad_()
    history, (_, truth) = problem.unroll(lam, problem.config.inner_steps), problem.exact(lam)
    shown = {name: method for name, method in METHODS.items() if name != "reverse_unroll"}
    terms = range(1, min(most, problem.config.inner_steps) + 1)
    return {name: [error(measured(m, problem, history, lam, k)[0], truth) for k in terms] for name, m in shown.items()}


# %% [markdown]
# ## The published run, and the same with every other method
# One method updates λ in the outer loop. The exact value and hypergradient are computed at each λ of its path, and on
# the published path, that of `reverse`, the hypergradients of all methods as well.


# %%
def outer_loop(problem: Problem, choice: str, compared: list[str], progress: tqdm) -> dict[str, Any]:
    """The reported loss E(w_T), f(λ), ‖∇f‖, and the errors, warnings and CPU seconds of the compared methods."""
    config = problem.config
    lam = torch.ones(problem.features, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([lam], config.outer_lr, momentum=config.momentum)
    past: dict[str, Any] = {"reported": [], "exact": [], "norm": [], "test": [], "test, solved": []}
    past |= {kind: {name: [] for name in compared} for kind in ("error", "warnings", "seconds")}
    for step in range(config.outer_steps + 1):
        history = problem.unroll(lam, config.inner_steps)
        value, truth = problem.exact(lam)
        past["reported"].append(problem.outer_loss(history[-1], [lam]).item())
        past["exact"].append(value)
        past["norm"].append(truth.norm().item())
        past["test"].append(problem.test_loss(history[-1]))
        past["test, solved"].append(problem.test_loss(problem.solve([lam.detach()])))
        for name in compared:
            grad, warned, seconds = measured(METHODS[name], problem, history, lam, config.terms)
            past["error"][name].append(error(grad, truth))
            past["warnings"][name].append(warned)
            past["seconds"][name].append(seconds)
            if name == choice:
                lam.grad = grad
        if step < config.outer_steps:
            optimizer.step()
            lam.data.clamp_(min=config.least)
        progress.update()
    past["lam"] = lam.tolist()
    for kind, summary in (("warnings", lambda many: sum(map(bool, many))), ("seconds", np.median)):
        past[kind] = {name: float(summary(many)) for name, many in past[kind].items()}
    return past


# %% [markdown]
# ## The optimum
# The exact hypergradient allows any optimiser; here it is L-BFGS-B on log λ.


# %%
def optimum(problem: Problem) -> dict[str, Any]:
    def value_and_gradient(log_lam: np.ndarray) -> tuple[float, np.ndarray]:
        lam = torch.from_numpy(np.exp(log_lam))
        value, gradient = problem.exact(lam)
        return value, (lam * gradient).numpy()

    bounds = [(np.log(problem.config.least), 10.0)] * problem.features
    options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9}
    start = np.zeros(problem.features)
    best = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    lam = torch.from_numpy(np.exp(best.x))
    return {"exact": float(best.fun), "test": problem.test_loss(problem.solve([lam])), "lam": lam.tolist()}


# %% [markdown]
# ## Results


# %%
TITLE = "HyperTorch's logistic regression, exactly"


def run(config: Config) -> dict[str, Any]:
    problem = Problem(config)
    start = torch.ones(problem.features, dtype=torch.float64)
    results: dict[str, Any] = {"runs": {}, "oracle": problem.oracle.tolist()}
    losses = [problem.inner_loss(params, [start]).item() for params in problem.unroll(start, config.inner_steps)]
    results["above the minimum"] = [
        loss - problem.inner_loss(problem.solve([start]), [start]).item() for loss in losses
    ]
    with tqdm(total=len(METHODS) * (config.outer_steps + 1), desc="outer steps") as progress:
        for name in METHODS:
            compared = list(METHODS) if name == "reverse" else [name]
            results["runs"][name] = outer_loop(problem, name, compared, progress)
    results["terms"] = errors_by_terms(problem, start, config.most_terms)
    results["optimum"] = optimum(problem)
    return results


def table(config: Config, results: dict[str, Any]) -> str:
    """Errors, warnings and times on the published path, and losses at the end of each method's own path."""
    published, steps = (
        results["runs"]["reverse"],
        sorted({min(step, config.outer_steps) for step in (0, 10, 100, config.outer_steps)}),
    )
    names = [f"error, step {step}" for step in steps]
    columns = ["method", *names, "warned", "CPU ms", "reported loss", "f(λ)", "‖∇f(λ)‖"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, past in results["runs"].items():
        errors = [f"{published['error'][name][step]:.1e}" for step in steps]
        warned = f"{published['warnings'][name]:.0f} of {config.outer_steps + 1}"
        milliseconds = f"{1000 * published['seconds'][name]:.1f}"
        end = [f"{past['reported'][-1]:.4f}", f"{past['exact'][-1]:.4f}", f"{past['norm'][-1]:.2g}"]
        lines.append("| " + " | ".join([f"`{name}`", *errors, warned, milliseconds, *end]) + " |")
    best = f"{results['optimum']['exact']:.4f}"
    lines.append("| exact, L-BFGS-B on log λ |" + " |" * (len(names) + 2) + f" {best} | {best} | |")
    losses = "; ".join(f"{published['reported'][step]:.5f} at outer step {step}" for step in steps)
    return (
        "\n".join(lines)
        + f"""

The first columns are measured on the published path, that of `reverse`: errors relative to the exact hypergradient, the
number of steps with a warning of hypergrad, and the median CPU time of a hypergradient. The reported validation loss of
this path is {losses}.
The last three columns are taken at the end of each method's own path: the reported loss E(w_T), f(λ) with the inner
problem solved, and the norm of the exact hypergradient.{lost(config, published)}"""
    )


def lost(config: Config, published: dict[str, Any]) -> str:
    """The step from which on no method is within a tenth of the exact hypergradient, and the methods that warned."""
    least = np.min(list(published["error"].values()), axis=0)
    near = int(np.max(np.flatnonzero(least <= 0.1), initial=-1))
    if near == config.outer_steps:
        return ""
    said = ", ".join(f"`{name}`" for name, count in published["warnings"].items() if count)
    return f"""

From outer step {near + 1} on no method is within 10 % of the exact hypergradient: {config.inner_steps} gradient steps
are far from the inner solution. These warned: {said or "none"}. `reverse_unroll` and `reverse` differentiate the
steps that were taken, which do not depend on a solution."""


def draw(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6, 20), layout="constrained")
    errors, losses, test, strengths, inner, terms = figure.subplots(6, 1)
    published, best = results["runs"]["reverse"], results["optimum"]
    inner.semilogy(results["above the minimum"])
    inner.set(title="Inner problem at λ = 1", xlabel="inner step", ylabel="g(w_t) − min g")
    # On full batches stoch_AID is the Neumann series, so its curve is that of `neumann`; it is dotted to show both.
    style = {"reverse_unroll": "-", "reverse": "-", "fixed_point": "--", "CG_normaleq": "--", "stoch_AID": ":"}
    colour = {name: f"C{i}" for i, name in enumerate(METHODS)}
    for name, curve in results["terms"].items():
        terms.semilogy(range(1, len(curve) + 1), curve, style.get(name, "-"), c=colour[name], label=name)
    terms.set(title="Hypergradient at λ = 1", xlabel="K, steps of the method", ylabel="relative error")
    for name, curve in published["error"].items():
        errors.loglog(range(1, len(curve) + 1), curve, style.get(name, "-"), c=colour[name], label=name)
    errors.set(title="Hypergradients on the published path", xlabel="outer step + 1", ylabel="relative error")
    shown = {"reported": "reported, E(w_T)", "exact": "f(λ), inner problem solved"}
    for (key, label), other in zip(shown.items(), ("test", "test, solved"), strict=True):
        losses.loglog(range(1, len(published[key]) + 1), published[key], label=label)
        label = label.replace("reported, E(w_T)", "at w_T").replace("f(λ)", "at w*(λ)")
        test.loglog(range(1, len(published[other]) + 1), published[other], label=label)
    for axes, value, title in ((losses, best["exact"], "Validation"), (test, best["test"], "Test")):
        axes.axhline(value, c="k", ls="--", label=f"best λ: {value:.4f}")
        axes.set(title=f"{title} loss on the published path", xlabel="outer step + 1", ylabel="log-loss (nats)")
    size = np.abs(results["oracle"])
    strengths.loglog(size, published["lam"], "o", label="end of the published path")
    strengths.loglog(size, best["lam"], "kx", label="best λ")
    strengths.set(title="Strengths", xlabel="|w_oracle| of the feature", ylabel="λ")
    for axes in (terms, losses, test, errors, strengths):
        axes.legend(fontsize="small")
    return figure


def main(config: Config) -> None:
    if config.data is not None:
        raise SystemExit("The data of this example is drawn at random: leave --data out.")
    results = run(config)
    save(config, TITLE, table(config, results), draw(results), rounded(results))


# %%
if __name__ == "__main__":
    in_notebook = "ipykernel" in sys.modules
    main(Config(outer_steps=100) if in_notebook else parse(Config, "HyperTorch's logistic regression.", FAST))
