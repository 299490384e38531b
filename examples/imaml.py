# %% [markdown]
# # Few-shot classification: implicit MAML compared with MAML, FOMAML, Reptile and fine-tuning
#
# A task is a few images of a few characters that were not in the training data. Its parameters w start at the
# meta-parameters λ and are fitted to the support set; λ is trained such that w classifies the query set well:
#
#     wᵢ(λ) = argmin_w  cross-entropy(w, supportᵢ) + ½ρ ‖w − λ‖²,      min_λ  Σᵢ cross-entropy(wᵢ(λ), queryᵢ)
#
# That is iMAML (Rajeswaran et al. 2019), with the settings of HyperTorch's experiment: 4 convolutions of 64 filters,
# ρ = 2, 16 steps of size 0.1, 5 steps of conjugate gradients, and Adam on λ. MAML differentiates through the steps
# instead; FOMAML and Reptile need no second derivatives. `--data` is the folder of Omniglot or mini-ImageNet; without
# it the tasks are made of scikit-learn's digits.
#
# Implicit gradients need a solved inner problem. With BatchNorm on five images, the largest eigenvalue of its Hessian
# reaches 100 at the start, in a narrow net. Steps of 0.1 (stable up to 20) then do not converge, the Hessian there has
# negative eigenvalues, the residual of CG is larger than its right hand side, and iMAML learns far worse than FOMAML.
# Smaller steps with momentum 0.9 and damped adjoint systems cure this; the page lists how far both were solved.
#
# The same eigenvalues make the derivative of many steps explode. Through 16 steps of 0.01 with momentum, the norm of a
# task's meta-gradient was 2 to 5 later in training, but up to 160,000 in MAML's first ten meta-steps. Such a gradient
# stays in Adam's second moments for a thousand meta-steps: after 30 more, a meta-step was an eighth as long as with
# clipped meta-gradients, and that seed learned nothing. So they are clipped, and MAML has its authors' inner loop, one
# step of 0.4.

# %%
import csv
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import log2, prod
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import hypergrad as hg
from examples import fewshot
from examples.common import Common, parse, save
from examples.fewshot import Classes, FewShot, Tasks, nearest_neighbour, sample

Name = Literal["iMAML", "MAML", "FOMAML", "Reptile", "fine-tuning"]
Params = dict[str, Tensor]

# Settings of iMAML from its paper, and of MAML from Finn et al. 2017, appendix A.1.
PUBLISHED: dict[str, dict[str, Any]] = {
    "omniglot": {"filters": 64, "regularisation": 2.0, "steps": 16, "maml_steps": 1, "maml_lr": 0.4},
    "omniglot, 20 ways": {"filters": 64, "regularisation": 2.0, "steps": 25, "maml_steps": 5, "maml_lr": 0.1},
    "mini-imagenet": {"filters": 32, "regularisation": 0.5, "steps": 10, "maml_steps": 5, "maml_lr": 0.01},
}


@dataclass
class Config(Common):
    dataset: Literal["omniglot", "mini-imagenet"] = "omniglot"
    """The data set in --data."""
    train: tuple[str, ...] = ("images_background",)
    """Omniglot's sets or alphabets for training."""
    test: tuple[str, ...] = ("images_evaluation",)
    """Sets or alphabets for the test; an alphabet of these is left out of the training sets."""
    validation: tuple[str, ...] = ()
    """Alphabets of Omniglot for validation, left out of the training sets; the test is at the best validation point."""
    characters: int = 0
    """If not 0, the split of most papers: this number (1200) of all characters, drawn at random, is for training."""
    methods: tuple[Name, ...] = ("iMAML", "MAML", "FOMAML", "Reptile", "fine-tuning")
    """Methods, in the order of the table."""
    seeds: int = 3
    """Runs of each method, from `seed` on."""
    ways: int = 5
    """Classes of a task."""
    shots: int = 1
    """Images of each class in the support set."""
    queries: int = 15
    """Images of each class in the query set."""
    filters: int | None = None
    """Filters of each convolution; by default as published: 64, mini-ImageNet 32."""
    regularisation: float | None = None
    """ρ of iMAML; by default as published: 2, mini-ImageNet 0.5."""
    steps: int | None = None
    """T of the inner loop (but MAML's); by default as published: 16, 20 ways 25, mini-ImageNet 10."""
    lr: float = 0.1
    """Learning rate of the inner loop (but MAML's)."""
    momentum: float = 0.0
    """Momentum of the inner loop; MAML's has none."""
    maml_steps: int | None = None
    """T of MAML's inner loop; by default as published: 1, 20 ways and mini-ImageNet 5."""
    maml_lr: float | None = None
    """Learning rate of MAML's inner loop; by default as published: 0.4, 20 ways 0.1, mini-ImageNet 0.01."""
    cg_steps: int = 5
    """K, the number of CG steps for iMAML's adjoint systems."""
    damping: float = 0.0
    """Added to the diagonal of iMAML's adjoint systems, whose Hessians need not be positive definite."""
    reptile_shots: int = 10
    """Training images of each class for Reptile, which has no query set."""
    reptile_batch: int = 10
    """Number of these images that each of Reptile's inner steps draws."""
    meta_batch: int = 16
    """Tasks of a meta-step."""
    iterations: int = 2000
    """Meta-steps."""
    outer_lr: float = 1e-3
    """Learning rate of Adam on λ."""
    clip: float = 10.0
    """Largest norm of a meta-gradient, to which a longer one is scaled; `inf` for no clipping."""
    test_tasks: int = 600
    """Test tasks, the same for all methods and seeds."""
    curve_tasks: int = 100
    """Tasks for a point of the curve."""
    curve_every: int = 100
    """Meta-steps between two points of the curve."""
    save_every: int = 50
    """Meta-steps between checkpoints; an interrupted run continues from the last."""
    remark: str = ""
    """A paragraph to add to the page, for instance about the choice of settings."""
    device: str = "cpu"
    """Device of the network and the tasks."""


FAST = {
    "filters": 8,
    "seeds": 1,
    "meta_batch": 4,
    "iterations": 20,
    "curve_every": 10,
    "curve_tasks": 10,
    "save_every": 10,
    "test_tasks": 40,
    "steps": 5,
    "queries": 5,
}


def resolved(config: Config) -> Config:
    """Check the configuration and replace options that are None by the published values."""
    if not config.clip > 0:
        raise SystemExit(f"--clip {config.clip}: the greatest norm of a meta-gradient must be > 0, or inf for none")
    if config.validation and (config.data is None or config.dataset != "omniglot"):
        raise SystemExit(
            f"--validation {' '.join(config.validation)} needs Omniglot in --data, whose alphabets can be held out; "
            f"mini-ImageNet has a folder val/"
        )
    if config.reptile_batch < 1:
        raise SystemExit(f"--reptile-batch {config.reptile_batch}: an inner step needs at least one image")
    return replace(config, **{key: value for key, value in published(config).items() if getattr(config, key) is None})


def published(config: Config) -> dict[str, Any]:
    many = ", 20 ways" if config.dataset == "omniglot" and config.ways >= 20 else ""
    return PUBLISHED[config.dataset + many]


# %% [markdown]
# ## The network and the data
#
# BatchNorm uses the statistics of its batch, also in the test, as in the papers (the "transductive" setting). The head
# starts at zero.


# %%
def network(channels: int, size: int, filters: int, classes: int) -> nn.Module:
    blocks: list[nn.Module] = []
    for i in range(min(4, int(log2(size)))):
        convolution = nn.Conv2d(filters if i else channels, filters, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        blocks += [convolution, nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(filters, track_running_stats=False)]
        size //= 2
    head = nn.Linear(filters * size * size, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*blocks, nn.Flatten(), head)


def load(config: Config) -> FewShot:
    if config.data is None:
        return fewshot.digits()
    if config.dataset == "mini-imagenet":
        return fewshot.mini_imagenet(config.data)
    return fewshot.omniglot(config.data, config.train, config.test, config.characters, config.validation)


def draw(classes: Classes, count: int, config: Config, seed: int, shots: int | None = None, queries: int = -1) -> Tasks:
    shots, queries = shots or config.shots, config.queries if queries < 0 else queries
    tasks = sample(classes, count, config.ways, shots, queries, seed)
    return Tasks(*((x.to(config.device), y.to(config.device)) for x, y in tasks))


# %% [markdown]
# ## The methods
#
# All methods solve the tasks of a meta-batch at once and differ in one argument. Fine-tuning learns features by
# classification of all training classes, and adapts them with a new head to the tasks of the test.


# %%
class Learner:
    """λ, its optimiser, and the meta-step of one method."""

    def __init__(self, name: Name, data: FewShot, config: Config, seed: int):
        torch.manual_seed(seed)
        channels, size = data.train.x.shape[2:4]
        self.name, self.data, self.config, self.seed = name, data, config, seed
        classes = len(data.train.names) if name == "fine-tuning" else config.ways
        self.net = network(channels, size, config.filters or 0, classes).to(config.device)
        self.model = hg.nn.functional(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=config.outer_lr)
        maml = name == "MAML"
        self.steps = (config.maml_steps if maml else config.steps) or 0
        self.rule = hg.diff_optimizers.SGD(
            lr=(config.maml_lr or 0.0) if maml else config.lr, momentum=0.0 if maml else config.momentum
        )
        # The papers take a few steps of CG and of the inner loop; the page reports both residuals instead of warnings.
        solver = hg.solvers.CG(max_steps=config.cg_steps, damping=config.damping, on_failure="ignore")
        self.method = {
            "iMAML": hg.meta.Implicit(solver=solver),
            "MAML": hg.meta.Unrolled(),
            "FOMAML": hg.meta.FirstOrder(),
            "Reptile": hg.meta.Reptile(),
        }.get(name)
        strength = config.regularisation or 0.0
        self.inner_loss = hg.meta.biased(self.fit, strength) if name == "iMAML" else self.fit

    def fit(self, params: Params, hparams: Params, task: Tasks) -> Tensor:
        x, y = task.support
        return cross_entropy(self.model(params, x), y)

    def fit_some(self, params: Params, hparams: Params, task: Tasks) -> Tensor:
        """The loss on newly drawn images. With the same images in every step, Reptile would not learn to generalise."""
        x, y = task.support
        some = torch.rand(len(y), device=y.device).argsort()[: self.config.reptile_batch]
        return cross_entropy(self.model(params, x[some]), y[some])

    def query_loss(self, params: Params, hparams: Params, task: Tasks) -> Tensor:
        x, y = task.query
        return cross_entropy(self.model(params, x), y)

    def correct(self, params: Params, hparams: Params, task: Tasks) -> Tensor:
        x, y = task.query
        return (self.model(params, x).argmax(-1) == y).float().mean()

    def step(self, iteration: int) -> dict[str, float]:
        """One meta-step on tasks (for fine-tuning: images) that depend on the seed and the iteration alone."""
        seed = 1_000_003 * (self.seed + 1) + iteration
        self.optimizer.zero_grad()
        if self.method is None:
            return self.classification_step(seed)
        config, reptile = self.config, self.name == "Reptile"
        shots, queries = (config.reptile_shots, 0) if reptile else (config.shots, config.queries)
        tasks = draw(self.data.train, config.meta_batch, config, seed, shots, queries)
        if reptile:
            torch.manual_seed(seed)
        result = hg.meta.backward(
            None if reptile else self.query_loss,
            self.fit_some if reptile else self.inner_loss,
            dict(self.net.named_parameters()),
            tasks,
            method=self.method,
            steps=self.steps,
            rule=self.rule,
        )
        measured = self.descend()
        if result.outer_values is not None:
            measured["loss"] = float(result.outer_values.mean())
        if result.adjoint_residual is not None and result.inner_distance is not None:
            measured["adjoint residual"] = float(result.adjoint_residual.median())
            measured["inner distance"] = float(result.inner_distance.median())
        return measured

    def classification_step(self, seed: int) -> dict[str, float]:
        x = self.data.train.x
        random = torch.Generator().manual_seed(seed)
        count = self.config.meta_batch * self.config.ways * (self.config.shots + self.config.queries)
        rows, columns = (torch.randint(n, (count,), generator=random) for n in x.shape[:2])
        loss = cross_entropy(self.net(x[rows, columns].to(self.config.device)), rows.to(self.config.device))
        loss.backward()
        return self.descend() | {"loss": float(loss.detach())}

    def descend(self) -> dict[str, float]:
        """A step of Adam on the clipped gradient; returns the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        self.optimizer.step()
        return {"gradient norm": float(norm)}

    def start(self) -> Params:
        """λ for tasks of `ways` classes; for fine-tuning, the features with a new head of zeros."""
        params = {name: p.detach() for name, p in self.net.named_parameters()}
        if self.name != "fine-tuning":
            return params
        heads = list(params)[-2:]
        return params | {name: torch.zeros_like(params[name][: self.config.ways]) for name in heads}

    def test(self, count: int, classes: Classes, seed: int) -> Tensor:
        """Accuracy on the query set of each of `count` tasks, after the inner loop on its support set."""
        parts = []
        for begin in range(0, count, 100):
            tasks = draw(classes, min(100, count - begin), self.config, seed + begin)
            hparams = self.start()
            adapted = hg.meta.adapt(self.inner_loss, hparams, tasks, steps=self.steps, rule=self.rule)
            chunk = 1 if self.config.device == "cpu" else None  # a task has many images: see hg.meta.Plan
            correct = torch.func.vmap(self.correct, in_dims=(0, None, 0), chunk_size=chunk)
            with torch.no_grad():
                parts.append(correct(adapted.params, hparams, tasks))
        return torch.cat(parts).cpu()


# %% [markdown]
# ## Training, with checkpoints
#
# The tasks depend on the number of the meta-step, so a run that continues from a checkpoint gives the same numbers as
# one without interruption.

# %%
TEST_SEED = 10**9


def curve_classes(data: FewShot) -> Classes:
    """The classes of the curve: those for validation, or else those of the test."""
    return data.test if data.validation is None else data.validation


def of_curve(data: FewShot) -> str:
    return "test" if data.validation is None else "validation"


def train(learner: Learner, folder: Path, progress: tqdm) -> dict[str, Any]:
    """Train to the end, from the checkpoint if there is one, and test. Returns accuracies, curve and measurements.

    The test uses the last λ or, if there are validation classes, that of the best point of the curve.
    """
    config = learner.config
    path = folder / "checkpoints" / f"{learner.name}-{learner.seed}.pt"
    state = restored(path, learner)
    board = SummaryWriter(str(folder / "tensorboard" / path.stem), purge_step=state["iteration"])
    progress.update(state["iteration"])
    for iteration in range(state["iteration"], config.iterations):
        begin = time.process_time()
        measured = learner.step(iteration)
        state["seconds"] += time.process_time() - begin
        state["clipped"] += measured["gradient norm"] > config.clip
        state["iteration"] = done = iteration + 1
        for key, value in measured.items():
            board.add_scalar(key, value, done)
        progress.set_postfix_str(
            f"{learner.name} {learner.seed}" + "".join(f", {k} {v:.2g}" for k, v in measured.items())
        )
        if done % config.curve_every == 0 or done == config.iterations:
            accuracy = float(learner.test(config.curve_tasks, curve_classes(learner.data), TEST_SEED // 2).mean())
            board.add_scalar(f"{of_curve(learner.data)} accuracy", accuracy, done)
            state["curve"].append({"step": done, "accuracy": accuracy, **measured})
            if learner.data.validation is not None and accuracy > (state["best"] or {"accuracy": 0})["accuracy"]:
                params = {name: x.clone() for name, x in learner.net.state_dict().items()}
                state["best"] = {"step": done, "accuracy": accuracy, "params": params}
        if done % config.save_every == 0 or done == config.iterations:
            keep(path, learner, state)
        progress.update(1)
    if state["test"] is None:
        if state["best"] is not None:
            learner.net.load_state_dict(state["best"]["params"])
        state["test"] = learner.test(config.test_tasks, learner.data.test, TEST_SEED).tolist()
        keep(path, learner, state)
    board.close()
    return state


def identity(learner: Learner) -> dict[str, Any]:
    """The options that this method reads, which have to be equal if a checkpoint is to be continued."""
    own = {
        "iMAML": ("regularisation", "cg_steps", "damping"),
        "MAML": ("maml_steps", "maml_lr"),
        "Reptile": ("reptile_shots", "reptile_batch"),
    }
    other = {"output", "threads", "methods", "seeds", "seed", "save_every", "device", "remark"}
    other |= {"steps", "lr", "momentum"} if learner.name == "MAML" else set()
    other |= {key for name, keys in own.items() if name != learner.name for key in keys}
    return {key: str(value) for key, value in asdict(learner.config).items() if key not in other}


def keep(path: Path, learner: Learner, state: dict[str, Any]) -> None:
    """Replace a checkpoint at once, so that an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = state | {"params": learner.net.state_dict(), "optimizer": learner.optimizer.state_dict()}
    torch.save(whole | {"config": identity(learner)}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def restored(path: Path, learner: Learner) -> dict[str, Any]:
    new: dict[str, Any] = {"iteration": 0, "seconds": 0.0, "clipped": 0, "curve": [], "best": None, "test": None}
    if not path.is_file():
        return new
    state = torch.load(path, weights_only=True, map_location=learner.config.device)
    if state["config"] != identity(learner):
        old, own = state["config"], identity(learner)
        odd = ", ".join(f"{key} {old.get(key)} → {own.get(key)}" for key in own if old.get(key) != own[key])
        raise SystemExit(
            f"{path} comes from another configuration ({odd}): remove {path.parent}, or choose another --output"
        )
    learner.net.load_state_dict(state["params"])
    learner.optimizer.load_state_dict(state["optimizer"])
    return {key: state[key] for key in new}


# %% [markdown]
# ## Results


# %%
def interval(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean over independent tasks."""
    return 1.96 * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def table(runs: dict[str, list[dict[str, Any]]], baseline: list[float], data: FewShot, config: Config) -> str:
    extra = "" if data.validation is None else " validation, best | at meta-step |"
    lines = [
        f"| method | test accuracy | of each seed |{extra} CPU s per meta-step |",
        "|---" * (4 + extra.count("|")) + "|",
    ]
    for name, states in runs.items():
        means = [mean(state["test"]) for state in states]
        every = [value for state in states for value in state["test"]]
        width = interval([mean(values) for values in zip(*(state["test"] for state in states), strict=True)])
        each = ", ".join(f"{value:.1%}" for value in means)
        cost = mean(state["seconds"] / state["iteration"] for state in states)
        bests = [state["best"] for state in states if state["best"]]
        best = (
            f" {mean(b['accuracy'] for b in bests):.1%} | {', '.join(str(b['step']) for b in bests)} |" if bests else ""
        )
        lines.append(f"| {name} | {mean(every):.1%} ± {width:.1%} | {each} |{best} {cost:.3f} |")
    pixels = f"{mean(baseline):.1%} ± {interval(baseline):.1%}"
    lines.append(f"| nearest neighbour, pixels | {pixels} | |{' |' * extra.count('|')} |")
    return "\n\n".join(["\n".join(lines), *remarks(runs, data, config)])


def remarks(runs: dict[str, list[dict[str, Any]]], data: FewShot, config: Config) -> list[str]:
    """Paragraphs below the table: the classes, the sizes, and measurements."""
    classes = f"Learned from {kinds(data.train)}; tested on {kinds(data.test)}, {config.test_tasks} tasks"
    if data.validation:
        classes += f"; tested at the best point of the validation on {kinds(data.validation)}, which were held out"
    paper = published(config)
    sizes = (
        f"{config.filters} filters, {config.meta_batch} tasks per meta-step, {config.iterations:,} meta-steps, "
        f"T = {config.steps}, ρ = {config.regularisation:g}; in the papers {paper['filters']} filters, tens of "
        f"thousands of meta-steps, T = {paper['steps']}, ρ = {paper['regularisation']:g}"
    )
    if "MAML" in runs:
        sizes += f". MAML's inner loop: T = {config.maml_steps}, steps of {config.maml_lr:g} without momentum"
    shares = {name: mean(state["clipped"] / state["iteration"] for state in states) for name, states in runs.items()}
    clipped = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share) or "none"
    measured = f"Meta-gradients with a norm above {config.clip:g}, which were clipped: {clipped}."
    last = [state["curve"][-1] for state in runs.get("iMAML", [])]
    if last:
        residual, distance = (mean(point[key] for point in last) for key in ("adjoint residual", "inner distance"))
        measured += (
            f" iMAML's last meta-step: residual of the adjoint systems {residual:.1e}, estimated distance of the "
            f"adapted parameters from the inner solution {distance:.1%} (medians over tasks, mean over seeds)."
        )
    return [f"{classes}. Sizes: {sizes}.", measured, *([config.remark] if config.remark else [])]


def kinds(classes: Classes) -> str:
    """The number of classes, and their alphabets if these are known."""
    alphabets = sorted({name.split("/")[0] for name in classes.names if "/" in name})
    names = f" ({', '.join(alphabets)})" if 0 < len(alphabets) <= 10 else ""
    return f"{len(classes.names):,} classes{names}"


def plot(runs: dict[str, list[dict[str, Any]]], baseline: list[float], data: FewShot, config: Config) -> Figure:
    on_curve = nearest_neighbour(draw(curve_classes(data), config.curve_tasks, config, TEST_SEED // 2)).tolist()
    figure = Figure(figsize=(6, 12.5), layout="constrained")
    middle, right, left = figure.subplots(3, 1)
    tasks = draw(data.test, 1, config, TEST_SEED)
    shown = [*tasks.support[0][0], *(tasks.query[0][0][i * config.queries + j] for j in range(3) for i in range(5))]
    columns = min(config.ways, 5)
    rows = [shown[:columns], *(shown[config.ways * config.shots :][i * 5 :][:columns] for i in range(3))]
    picture = torch.cat(
        [torch.cat([nn.functional.pad(1 - x.cpu(), (1, 1, 1, 1)) for x in row], -1) for row in rows], -2
    )
    left.imshow(picture.movedim(0, -1).clip(0, 1), cmap="gray", interpolation="nearest")
    left.axhline(picture.shape[1] / 4 - 0.5, c="C3", lw=2)
    left.set(title=f"A task: learn from the top row,\nclassify the others ({data.name})", xticks=[], yticks=[])
    for i, (name, states) in enumerate(runs.items()):
        steps = [point["step"] for point in states[0]["curve"]]
        curves = torch.tensor([[point["accuracy"] for point in state["curve"]] for state in states])
        middle.plot(steps, curves.mean(0), c=f"C{i}", label=name)
        if len(states) > 1:
            middle.fill_between(steps, curves.amin(0), curves.amax(0), color=f"C{i}", alpha=0.15, lw=0)
        bests = [state["best"] for state in states if state["best"]]
        middle.plot([b["step"] for b in bests], [b["accuracy"] for b in bests], "o", c=f"C{i}", ms=4)
        means = [mean(state["test"]) for state in states]
        right.bar(i, mean(means), color=f"C{i}", alpha=0.5, width=0.7)
        right.plot([i] * len(means), means, "o", c=f"C{i}", ms=4)
        right.annotate(f"{mean(means):.1%}", (i, max(means)), (0, 5), textcoords="offset points", ha="center")
    for axes, pixels in ((middle, on_curve), (right, baseline)):
        axes.axhline(mean(pixels), c="gray", ls="--", lw=1, label="nearest neighbour, pixels")
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    kind = f"{config.ways}-way {config.shots}-shot"
    curve = of_curve(data).capitalize()
    across = "meta-step" if data.validation is None else "meta-step (a dot: where a seed is tested)"
    middle.set(title=f"{curve} accuracy, {kind}: mean, range of seeds", xlabel=across)
    middle.legend(loc="lower right", fontsize=8)
    right.set(title=f"Test accuracy, {config.test_tasks} tasks: mean, seeds", xlim=(-0.6, len(runs) - 0.4))
    right.set_xticks(range(len(runs)), list(runs), rotation=20)
    right.set_ylim(0, 1.05)
    return figure


def write_csv(path: Path, runs: dict[str, list[dict[str, Any]]], first: int) -> None:
    with path.open("w", newline="") as file:
        keys = ["method", "seed", "step", "accuracy", "gradient norm", "loss", "adjoint residual", "inner distance"]
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        for name, states in runs.items():
            for seed, state in enumerate(states, first):
                writer.writerows({"method": name, "seed": seed, **point} for point in state["curve"])


def summary(state: dict[str, Any]) -> dict[str, Any]:
    """A run without the accuracy of every task, and without λ."""
    test, rest = state["test"], {key: value for key, value in state.items() if key not in ("test", "best")}
    best = {key: state["best"][key] for key in ("step", "accuracy")} if state["best"] else None
    return {"accuracy": mean(test), "interval": interval(test), "best": best} | rest


def main(build: Callable[..., Learner] = Learner) -> None:
    config = resolved(parse(Config, __doc__ or "Few-shot classification by meta-learning.", FAST))
    data = load(config)
    config.output.mkdir(parents=True, exist_ok=True)
    baseline = nearest_neighbour(draw(data.test, config.test_tasks, config, TEST_SEED)).tolist()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in config.methods}
    with tqdm(total=prod((len(config.methods), config.seeds, config.iterations)), desc="meta-steps") as progress:
        for seed in range(config.seed, config.seed + config.seeds):
            for name in config.methods:
                runs[name].append(train(build(name, data, config, seed), config.output, progress))
    write_csv(config.output / "imaml.csv", runs, config.seed)
    results = {name: [summary(state) for state in states] for name, states in runs.items()}
    results["nearest neighbour, pixels"] = [{"accuracy": mean(baseline), "interval": interval(baseline)}]
    title = f"Few-shot learning on {data.name}: {config.ways}-way {config.shots}-shot"
    save(config, title, table(runs, baseline, data, config), plot(runs, baseline, data, config), results)


if __name__ == "__main__":
    main()
