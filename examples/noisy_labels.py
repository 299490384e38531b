# %% [markdown]
# # Noisy labels: weights for the training examples of a network, learned over minibatches
#
#     w*(λ) = argmin_w  Σᵢ ωᵢ(λ) ℓᵢ(w) / Σᵢ ωᵢ(λ) + ½ρ‖w‖²,      min_λ  mean ℓ_validation(w*(λ))
#
# Many training labels are wrong, and a few validation labels are known to be right. The trackers of `hg.bilevel` learn
# weights ω while a small convolutional network trains: one weight σ(λᵢ) for each example, or a small network that maps
# the example's loss to its weight (Shu et al. 2019, "Meta-Weight-Net"). The network is never trained on validation
# images: all accuracies are those of params that minimise the weighted training loss, either those at the end of this
# training (live), or those of another training with the learned weights.

# %%
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad as hg
from examples.common import Common, PeakMemory, parse, rounded, save
from examples.data_cleaning import corrupt
from examples.datasets import Images, images


@dataclass
class Config(Common):
    data: Path | None = None
    """Folder of Fashion-MNIST or MNIST in torchvision's layout; without it, digits."""
    wrong: float = 0.4
    """Fraction of wrong training labels."""
    train: int = 2000
    """Training images."""
    validation: int = 500
    """Clean validation images."""
    steps: int = 800
    """Steps of the inner optimiser in every training."""
    warm_up: int = 200
    """Steps before the first update of the weights."""
    batch: int = 50
    """Images of a batch at both levels."""
    lr: float = 0.05
    """Initial learning rate of SGD with momentum .9 on params; it decreases to 0 as a cosine."""
    penalty: float = 0.001
    """ρ."""
    outer_lr: float = 0.03
    """Learning rate of Adam on one weight per example."""
    network_lr: float = 0.0003
    """Learning rate of Adam on the network of the loss."""
    adjoint_lr: float = 0.05
    """Step size for the adjoint (SOBA, AmIGO)."""
    damping: float = 0.1
    """Added to the diagonal of SOBA's adjoint system, as the Hessian of a network need not be positive definite."""
    restart: int = 25
    """Steps after which F2SA's copies are reset to params."""
    seeds: int = 3
    """Repetitions with other images, other wrong labels and other initial weights."""
    processes: int = 1
    """Trainings that run at once."""
    holdout: bool = False
    """Measure on other training images instead of the test images, as for the choice of the options above."""


FAST: dict[str, Any] = {"train": 300, "validation": 200, "steps": 40, "warm_up": 10, "batch": 50, "lr": 0.1, "seeds": 1}


# %% [markdown]
# ## Data and network


# %%
class Data(NamedTuple):
    """Images [n, 1, side, side] and labels for training, validation and test, and a mask of wrong training labels."""

    name: str
    x: Tensor
    y: Tensor
    wrong: Tensor
    xv: Tensor
    yv: Tensor
    xt: Tensor
    yt: Tensor


def split(config: Config, seed: int) -> Data:
    every = images(config.data)
    order = torch.randperm(len(every.y), generator=torch.Generator().manual_seed(seed))
    if len(order) <= config.train + config.validation:
        raise SystemExit(
            f"{every.name} has {len(order):,} images: --train {config.train} and --validation {config.validation} "
            f"leave none for the test"
        )
    train, validation, rest = order.tensor_split([config.train, config.train + config.validation])
    of_train = config.data is None or config.holdout
    test = Images("", every.x[rest[:10_000]], every.y[rest[:10_000]]) if of_train else images(config.data, "t10k")
    labels, wrong = corrupt(every.y[train], config.wrong, seed)
    return Data(every.name, square(every.x[train]), labels, wrong, square(every.x[validation]), every.y[validation],
                square(test.x), test.y)  # fmt: skip


def square(x: Tensor) -> Tensor:
    side = round(x.shape[1] ** 0.5)
    return x.reshape(-1, 1, side, side)


def network(side: int) -> nn.Module:
    """Two convolutions with stride 2 and a linear layer."""
    last = (((side + 1) // 2) + 1) // 2
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * last**2, 10),
    )


# %% [markdown]
# ## Weights
# The network of the loss treats its input as a constant, as in Meta-Weight-Net, so the hypergradient lacks a term. (If
# it did not, weights that decrease with the loss would reward large losses.) It is learned on the losses of the live
# network, so it can fail in a new training, where all losses are large at first.


# %%
class PerExample(nn.Module):
    """σ(λᵢ) for example i."""

    def __init__(self, count: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, rows: Tensor, losses: Tensor) -> Tensor:
        return self.logits[rows].sigmoid()


class OfLoss(nn.Module):
    """A network with one hidden layer, from the loss of an example to its weight."""

    def __init__(self, count: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1))

    def forward(self, rows: Tensor, losses: Tensor) -> Tensor:
        return self.layers(losses.detach()[:, None])[:, 0].sigmoid()


class Ones(nn.Module):
    """Equal weights."""

    def forward(self, rows: Tensor, losses: Tensor) -> Tensor:
        return torch.ones_like(losses)


KINDS: dict[str, Callable[[int], nn.Module]] = {"one per example": PerExample, "network of the loss": OfLoss}


# %%
class Levels:
    """The losses of both levels on batches, at the parameters of the two modules or at given ones."""

    def __init__(self, data: Data, model: nn.Module, weights: nn.Module, penalty: float):
        self.data, self.model, self.weights, self.penalty = data, model, weights, penalty
        self.of_model, self.of_weights = hg.nn.functional(model), hg.nn.functional(weights)

    def inner_loss(self, rows: Tensor, params: Any = None, hparams: Any = None) -> Tensor:
        """g on these training images."""
        x, y = self.data.x[rows], self.data.y[rows]
        losses = cross_entropy(self.model(x) if params is None else self.of_model(params, x), y, reduction="none")
        given = self.weights(rows, losses) if hparams is None else self.of_weights(hparams, rows, losses)
        leaves = self.model.parameters() if params is None else params.values()
        return (given * losses).sum() / given.sum() + self.penalty / 2 * sum((w**2).sum() for w in leaves)

    def outer_loss(self, rows: Tensor, params: Any = None) -> Tensor:
        """f on these validation images."""
        x, y = self.data.xv[rows], self.data.yv[rows]
        return cross_entropy(self.model(x) if params is None else self.of_model(params, x), y)


# %% [markdown]
# ## Methods
# Each method adds to the `.grad` of params and of hparams in `backward`, and updates its state in `step`. One-step
# unrolling differentiates the validation loss after one plain gradient step on the batch, as "learning to reweight" and
# Meta-Weight-Net do. The others are trackers.


# %%
class OneStep:
    """The gradient of f(w − η ∇₁g(w, λ)) with respect to λ, by `unroll.reverse`."""

    def __init__(self, levels: Levels, lr: float):
        self.levels, self.lr = levels, lr

    def backward(self, valid: Tensor, train: Tensor) -> None:
        levels = self.levels
        start, hparams = (dict(part.named_parameters()) for part in (levels.model, levels.weights))

        def step(w: dict[str, Tensor], h: dict[str, Tensor]) -> dict[str, Tensor]:
            grads = torch.autograd.grad(levels.inner_loss(train, w, h), list(w.values()), create_graph=True)
            return {name: x - self.lr * g for (name, x), g in zip(w.items(), grads, strict=True)}

        run = hg.unroll.reverse(step, start, hparams, lambda w, h: levels.outer_loss(valid, w), 1, memory="graph")
        for name, w in start.items():
            w.grad = (w.detach() - run.params[name]) / self.lr
        for name, h in hparams.items():
            h.grad = run.grads[name]

    def step(self) -> None:
        """Do nothing: this method has no state."""


class Tracked:
    """A tracker of `hg.bilevel`. It gets closures, because some algorithms evaluate the losses several times."""

    def __init__(self, levels: Levels, tracker: hg.bilevel.Tracker, inner: torch.optim.Optimizer, restart: int):
        self.levels, self.tracker, self.inner, self.restart = levels, tracker, inner, restart

    def backward(self, valid: Tensor, train: Tensor) -> None:
        self.tracker.backward(lambda: self.levels.outer_loss(valid), lambda: self.levels.inner_loss(train))

    def step(self) -> None:
        self.tracker.step()
        if isinstance(self.tracker, hg.bilevel.F2SA):
            self.tracker.lr = self.inner.param_groups[0]["lr"]  # copies have the step size of params
            if self.tracker.steps % self.restart == 0:  # copies of a network drift apart: no finite difference then
                self.tracker.restart()


Method = Callable[[Levels, torch.optim.Optimizer, Config], Any]


def tracked(make: Callable[..., hg.bilevel.Tracker]) -> Method:
    def method(levels: Levels, inner: torch.optim.Optimizer, config: Config) -> Tracked:
        tracker = make(levels.model.parameters(), levels.weights.parameters(), inner, config)
        return Tracked(levels, tracker, inner, config.restart)

    return method


METHODS: dict[str, Method] = {
    "SOBA": tracked(
        lambda params, hparams, inner, config: hg.bilevel.SOBA(
            params,
            hparams,
            optimizer=lambda own: torch.optim.SGD(own, lr=config.adjoint_lr, weight_decay=config.damping),
        )
    ),
    "AmIGO": tracked(
        lambda params, hparams, inner, config: hg.bilevel.AmIGO(
            params, hparams, steps=2, lr=config.adjoint_lr
        )
    ),
    "F2SA": tracked(
        lambda params, hparams, inner, config: hg.bilevel.F2SA(
            params, hparams, penalty=10, optimizer=lambda own: torch.optim.SGD(own, lr=config.lr, momentum=0.9)
        )
    ),
    "SAMA": tracked(lambda params, hparams, inner, config: hg.bilevel.SAMA(params, hparams, optimizer=inner)),
    "one step": lambda levels, inner, config: OneStep(levels, config.lr),
}  # fmt: skip


# %% [markdown]
# ## Training


# %%
def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless iterator over rows of batches, in a new order in each pass; an incomplete last batch is dropped."""
    size = min(size, count)
    while True:
        yield from torch.randperm(count, generator=generator).split(size)[: count // size]


def trained(data: Data, config: Config, seed: int, weights: nn.Module, rows: Tensor | None = None) -> nn.Module:
    """A network trained with fixed weights on these rows of the training images (None: all)."""
    model, inner, schedule = fresh(data, config, seed)
    levels = Levels(data, model, weights.requires_grad_(False), config.penalty)
    rows = torch.arange(len(data.y)) if rows is None else rows
    feed = batches(len(rows), config.batch, torch.Generator().manual_seed(seed))
    for _ in range(config.steps):
        inner.zero_grad()
        levels.inner_loss(rows[next(feed)]).backward()
        inner.step()
        schedule.step()
    return model


def fresh(data: Data, config: Config, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    model = network(data.x.shape[-1])
    inner = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9)
    return model, inner, torch.optim.lr_scheduler.CosineAnnealingLR(inner, config.steps)


def learned(
    data: Data, config: Config, seed: int, kind: str, name: str, step: Callable[[], Any] = int
) -> tuple[nn.Module, nn.Module, dict[str, float]]:
    """The network, the weights that were learned with it, and the time and memory of a step."""
    model, inner, schedule = fresh(data, config, seed)
    weights = KINDS[kind](len(data.y))
    levels = Levels(data, model, weights, config.penalty)
    method = METHODS[name](levels, inner, config)
    outer = torch.optim.Adam(weights.parameters(), config.outer_lr if kind == "one per example" else config.network_lr)
    draws = (torch.Generator().manual_seed(seed) for _ in range(2))
    train, valid = (batches(len(y), config.batch, draw) for y, draw in zip((data.y, data.yv), draws, strict=True))
    start = time.process_time()
    for number in range(config.steps):
        method.backward(next(valid), next(train))
        for each in (inner, method, schedule, *([outer] if number >= config.warm_up else [])):
            each.step()
        for each in (inner, outer):
            each.zero_grad()
        step()
    took = {"milliseconds": 1e3 * (time.process_time() - start) / config.steps}
    with PeakMemory() as memory:
        method.backward(next(valid), next(train))
    return model, weights, took | {"MiB": memory.peak / 2**20}


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (torch.cat([model(part) for part in x.split(1000)]).argmax(1) == y).double().mean().item()


def separation(data: Data, model: nn.Module, weights: nn.Module) -> float:
    """The area under the ROC curve for finding wrong labels by small weights."""
    with torch.no_grad():
        losses = cross_entropy(torch.cat([model(part) for part in data.x.split(1000)]), data.y, reduction="none")
        return float(roc_auc_score(data.wrong, -weights(torch.arange(len(data.y)), losses)))


# %% [markdown]
# ## Comparison
# The baselines train for as many steps on all images with their given labels (no weights), on those whose labels are
# right (oracle), and on the clean validation images (clean part only).

# %%
BASELINES = ("no weights", "oracle", "clean part only")
CELLS = [("", name) for name in BASELINES] + [(kind, name) for kind in KINDS for name in METHODS]


def cell(config: Config, seed: int, kind: str, name: str) -> dict[str, float]:
    """The numbers of one row for one seed."""
    torch.set_num_threads(config.threads)
    start, data = time.process_time(), split(config, seed)
    if kind:
        model, weights, numbers = learned(data, config, seed, kind, name)
        numbers |= {"live": accuracy(model, data.xt, data.yt), "AUC": separation(data, model, weights)}
        model = trained(data, config, seed, weights)
    else:
        chosen = (~data.wrong).nonzero()[:, 0] if name == "oracle" else None
        of = data._replace(x=data.xv, y=data.yv) if name == "clean part only" else data
        before = time.process_time()
        model = trained(of, config, seed, Ones(), chosen)
        numbers = {"milliseconds": 1e3 * (time.process_time() - before) / config.steps}
    return numbers | {"anew": accuracy(model, data.xt, data.yt), "seconds": time.process_time() - start}


def compare(config: Config) -> list[dict[str, Any]]:
    """All rows; each number is a list over seeds."""
    rows: list[dict[str, Any]] = [{"weights": kind, "method": name} for kind, name in CELLS]
    jobs = [(config, seed, *each) for seed in range(config.seed, config.seed + config.seeds) for each in CELLS]
    with ProcessPoolExecutor(config.processes, get_context("spawn")) as pool:
        # With one process all trainings run in this one.
        found = (pool.map if config.processes > 1 else map)(cell, *zip(*jobs, strict=True))
        for i, numbers in enumerate(tqdm(found, "trainings", len(jobs))):
            for key, value in numbers.items():
                rows[i % len(rows)].setdefault(key, []).append(value)
    return rows


# %% [markdown]
# ## Results


# %%
def spread(values: list[float], form: str = ".1%") -> str:
    """Mean ± standard deviation."""
    sign = "%" if form.endswith("%") else ""
    each = [format(value, form).removesuffix("%") for value in (mean(values), stdev(values) if values[1:] else 0.0)]
    return f"{each[0]} ± {each[1]}{' %' * bool(sign)}"


def recovered(rows: list[dict[str, Any]], row: dict[str, Any], key: str) -> float:
    """The gain over no weights as a fraction of the oracle's, in mean accuracies."""
    low, high = (mean(each["anew"]) for each in rows[:2])
    return (mean(row[key]) - low) / (high - low)


def table(data: Data, rows: list[dict[str, Any]], config: Config) -> str:
    lines = [
        "| weights | method | live params | of the gap | trained again | of the gap | AUC | ms a step | MiB a step |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [row["weights"] or "–", row["method"]]
        for key in ("live", "anew"):
            cells += [spread(row[key]), f"{recovered(rows, row, key):.0%}"] if key in row else ["", ""]
        cells += [f"{mean(row['AUC']):.3f}" if "AUC" in row else "", f"{mean(row['milliseconds']):.1f}"]
        lines.append("| " + " | ".join([*cells, f"{row['MiB'][0]:.1f}" if "MiB" in row else ""]) + " |")
    seconds = sum(sum(row["seconds"]) for row in rows)
    return (
        "\n".join(lines)
        + f"""

{data.name}, {len(data.y):,} training images, of which {config.wrong:.0%} have wrong labels, {len(data.yv):,} clean
validation images, {len(data.yt):,} test images. Test accuracies are means ± standard deviations over {config.seeds}
seeds, of params that were trained on training images alone ("clean part only": on validation images alone): of the live
params at the end, and of a network trained again with the learned weights. (That can fail for the network of the loss,
which meets losses that it was not trained on.) The gap is the difference between no weights and the oracle.
AUC: area under the ROC curve for finding wrong labels by small weights. ms: CPU time of a step of the whole loop. MiB:
memory of one `backward` beyond what was allocated before. The step sizes were chosen in about a dozen trainings with
another seed, measured on images that are not test images (--holdout). Total CPU time: {seconds / 60:.0f} minutes."""
    )


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A point for each seed, and the mean."""
    figure = Figure(figsize=(6.2, 6), layout="constrained")
    axes: Any = figure.subplots()
    for place, row in enumerate(rows):
        for key, colour, shift in (("live", "C0", -0.15), ("anew", "C1", 0.15)):
            if key in row:
                values = [100 * value for value in row[key]]
                axes.plot(values, [place + shift] * len(values), ".", c=colour, alpha=0.6)
                axes.plot(mean(values), place + shift, "|", c=colour, ms=16, mew=2)
    for number, style in ((0, ":"), (1, "--")):
        axes.axvline(100 * mean(rows[number]["anew"]), c="k", ls=style, lw=0.8)
    names = [f"{row['method']}{', ' * bool(row['weights'])}{row['weights']}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=100 * mean(rows[0]["anew"]) - 5)  # lower accuracies are in the table alone
    axes.set(xlabel="test accuracy, %", title="Blue: the live params.\nOrange: trained again with the learned weights")
    return figure


def main(config: Config) -> None:
    rows, data = compare(config), split(config, config.seed)
    title = f"Noisy labels: weights learned over minibatches of {data.name}"
    save(config, title, table(data, rows, config), draw(rows), rounded({"rows": rows}))


# %%
if __name__ == "__main__":
    main(parse(Config, "Learn weights of examples with wrong labels while a network trains.", FAST))
