# %% [markdown]
# # Learning a schedule: a learning rate and a momentum for each step
#
# A network is trained by T steps of SGD with momentum,
#
#     v_{t+1} = μ_t v_t + ∇g_t(w_t),   w_{t+1} = w_t − η_t v_{t+1},      min over η_0 … η_{T−1}, μ_0 … μ_{T−1} of E(w_T)
#
# where g_t is the loss on batch t and E the loss on held-out images. `hg.unroll.reverse` computes the gradient with
# respect to all 2T numbers, through all T steps, within a given memory. (Maclaurin, Duvenaud and Adams, ICML 2015,
# learned such schedules by running SGD backwards.) The learned schedule is compared with the best constant and the best
# half cosine of a grid, with the same initial weights, batches, steps, and held-out images.

# %%
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import inf, isfinite, pi
from statistics import mean, median, stdev
from typing import Any, NamedTuple, TypeAlias

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor
from torch.nn.functional import conv1d, cross_entropy, pad
from tqdm import tqdm

import hypergrad as hg
from hypergrad.diff_optimizers import SGD, PerStep

from .common import Common, PeakMemory, parse, save
from .datasets import Images, images


@dataclass
class Config(Common):
    steps: int = 1000
    """T, the number of SGD steps."""
    batch: int = 100
    """Images in each step."""
    hidden: int = 50
    """Units of the hidden layer."""
    memory: str = "64MiB"
    """Memory budget of the reverse pass."""
    lr: float = 0.05
    """Learning rate of the initial schedule, low enough for a small hypergradient."""
    momentum: float = 0.9
    """Momentum of the initial schedule."""
    outer_steps: int = 40
    """Steps of Adam on the schedule."""
    outer_lr: float = 0.15
    """Initial learning rate of Adam, which decreases linearly."""
    smooth: float = 0.05
    """Standard deviation of the window over which the outer variables are averaged, as a fraction of T."""
    clip: float = 3.0
    """Largest entry of a hypergradient, in units of the median entry of the first one."""
    runs: int = 2
    """Runs (initial weights and orders of batches) for tuning; the hypergradients use them in turns."""
    test_runs: int = 5
    """New runs for the test."""
    lrs: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Grid of the constant learning rate and of the cosine's initial one."""
    momenta: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9, 0.95)
    """Grid of the momentum."""


FAST = {"steps": 60, "hidden": 10, "memory": "1MiB", "outer_steps": 4, "test_runs": 2}
FAST |= {"lrs": (0.05, 0.2), "momenta": (0.5, 0.9)}

Params: TypeAlias = "dict[str, Tensor]"
Schedule: TypeAlias = "dict[str, Tensor]"  # "lr" and "momentum", each [T]


# %% [markdown]
# ## The inner problem


# %%
class Split(NamedTuple):
    train: Images
    validation: Images
    test: Images


class Run(NamedTuple):
    """Initial weights, and the rows of each batch [T, batch]."""

    start: Params
    rows: Tensor


def split(data: Images) -> Split:
    """Four sixths for training, one for validation, one for the test; the mean of the training pixels is subtracted."""
    order = torch.randperm(len(data.y), generator=Generator().manual_seed(0))
    sixth = len(order) // 6
    parts = order.split((len(order) - 2 * sixth, sixth, sixth))
    centre = data.x[parts[0]].mean(0)
    return Split(*(Images(data.name, data.x[rows] - centre, data.y[rows]) for rows in parts))


def new_run(data: Images, config: Config, seed: int) -> Run:
    generator = Generator().manual_seed(seed)
    start = {}
    for i, (wide, out) in enumerate([(data.x.shape[1], config.hidden), (config.hidden, 10)]):
        start[f"weight{i}"] = torch.randn(wide, out, generator=generator) / wide**0.5
        start[f"bias{i}"] = torch.zeros(out)
    needed = config.steps * config.batch
    epochs = [torch.randperm(len(data.y), generator=generator) for _ in range(-(-needed // len(data.y)))]
    return Run(start, torch.cat(epochs)[:needed].reshape(config.steps, config.batch))


def predict(w: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ w["weight0"] + w["bias0"]) @ w["weight1"] + w["bias1"]


def loss(w: Params, data: Images) -> Tensor:
    return cross_entropy(predict(w, data.x), data.y)


def batch_loss(w: Params, data: Images, rows: Tensor) -> Tensor:
    return cross_entropy(predict(w, data.x[rows]), data.y[rows])


def train(schedule: Schedule, run: Run, data: Images, watch: Callable[[int, Params], None] | None = None) -> Params:
    """w_T; `watch` is called with each t and w_t."""
    w = {name: weight.clone().requires_grad_() for name, weight in run.start.items()}
    optimizer = torch.optim.SGD(w.values(), lr=1.0, momentum=1.0)
    for t, rows in enumerate(run.rows):
        if watch:
            watch(t, w)
        optimizer.param_groups[0] |= {name: values[t].item() for name, values in schedule.items()}
        optimizer.zero_grad()
        batch_loss(w, data, rows).backward()
        optimizer.step()
    if watch:
        watch(len(run.rows), w)
    return {name: weight.detach() for name, weight in w.items()}


# %% [markdown]
# ## The schedules
# Constant and cosine are tuned by a grid. The learned schedule has two variables for each step, log η/(1 − μ) and
# logit μ: η/(1 − μ) is the speed of training, and if log η were a variable instead, more momentum would also increase
# the speed. Learning through a thousand steps needs three further measures:
#
# - The initial schedule has short steps. If steps are too long, the product of a thousand Jacobians I − ηH explodes,
#   and the gradient is useless as a direction.
# - Each entry of the gradient is clipped, for the same reason, in case the learned schedule comes near to such steps.
#   Clipping the norm would also reduce the gradients of the last steps, which are small and right.
# - The variables are averaged over neighbouring steps, because those of single steps would fit the noise of batches.


# %%
def constant(lr: float, momentum: float, steps: int) -> Schedule:
    return {"lr": torch.full((steps,), lr), "momentum": torch.full((steps,), momentum)}


def cosine(lr: float, momentum: float, steps: int) -> Schedule:
    flat = constant(lr, momentum, steps)
    return flat | {"lr": flat["lr"] * (1 + torch.cos(pi * torch.arange(steps) / steps)) / 2}


class Learned(NamedTuple):
    """A schedule, the measurements of its tuning, and its name."""

    schedule: Schedule
    history: dict[str, Any]
    name: str


def grid(shape: Callable[[float, float, int], Schedule], runs: list[Run], data: Split, config: Config) -> Learned:
    """The schedule of the grid with the lowest mean validation loss, and the losses of all."""
    losses = {}
    for lr, momentum in tqdm([*product(config.lrs, config.momenta)], f"grid: {shape.__name__}"):
        schedule = shape(lr, momentum, config.steps)
        losses[lr, momentum] = mean(loss(train(schedule, run, data.train), data.validation).item() for run in runs)
    lr, momentum = min(losses, key=lambda point: losses[point] if isfinite(losses[point]) else inf)
    history = {"grid": [[*point, value] for point, value in losses.items()]}
    return Learned(shape(lr, momentum, config.steps), history, f"{shape.__name__}, η {lr:g}, μ {momentum:g}")


def smoothed(z: Tensor, width: float) -> Tensor:
    """The average of each row over a Gaussian window, with its ends repeated."""
    reach = int(3 * width)
    window = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=z.dtype) / width) ** 2)
    return conv1d(pad(z[:, None], (reach, reach), mode="replicate"), (window / window.sum())[None, None])[:, 0]


def variables(schedule: Schedule) -> Tensor:
    """log η/(1 − μ) and logit μ: [2, T]."""
    lr, momentum = schedule["lr"], schedule["momentum"]
    return torch.stack([(lr / (1 - momentum)).log(), momentum.logit()])


def schedule_of(curves: Tensor) -> Schedule:
    momentum = curves[1].sigmoid()
    return {"lr": curves[0].exp() * (1 - momentum), "momentum": momentum}


def hypergradient(curves: Tensor, run: Run, data: Split, memory: str) -> hg.unroll.ReverseResult:
    """The gradient of the validation loss after all steps with respect to `variables`."""
    rule = SGD(lr=lambda c: PerStep(schedule_of(c)["lr"]), momentum=lambda c: PerStep(schedule_of(c)["momentum"]))
    return hg.unroll.reverse(
        rule.on(lambda w, curves, t, rows: batch_loss(w, data.train, rows)),
        (run.start, rule.init(run.start)),
        curves,
        lambda carry, curves: loss(carry[0], data.validation),
        len(run.rows),
        memory=memory,
        batches=list(run.rows),
    )


def learn(runs: list[Run], data: Split, config: Config) -> Learned:
    z = variables(constant(config.lr, config.momentum, config.steps)).requires_grad_()
    optimizer = torch.optim.Adam([z], config.outer_lr, betas=(0.8, 0.99))
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, config.outer_steps)
    history, limit = {"loss": [], "norm": [], "evaluations": []}, None
    for i in tqdm(range(config.outer_steps), "hypergradients"):
        curves = smoothed(z, config.smooth * config.steps)
        result = hypergradient(curves.detach().requires_grad_(), runs[i % len(runs)], data, config.memory)
        if limit is None:
            limit = config.clip * result.grads.abs().median(1, keepdim=True).values
        optimizer.zero_grad()
        curves.backward(result.grads.clamp(-limit, limit))
        optimizer.step()
        rate.step()
        measured = (result.outer_value, result.grads.norm(), result.evaluations)
        for values, value in zip(history.values(), measured, strict=True):
            values.append(float(value))
    schedule = schedule_of(smoothed(z, config.smooth * config.steps).detach())
    return Learned(schedule, history, f"learned, {config.outer_steps} hypergradients")


# %% [markdown]
# ## The comparison


# %%
def compare(data: Split, config: Config) -> dict[str, dict[str, Any]]:
    """The losses of the constant, the cosine and the learned schedule on the runs for tuning and on new runs."""
    runs = [new_run(data.train, config, config.seed + i) for i in range(config.runs + config.test_runs)]
    tuning, new = runs[: config.runs], runs[config.runs :]
    tune = [partial(grid, constant), partial(grid, cosine), learn]
    results = {}
    for key, function in zip(("constant", "cosine", "learned"), tune, strict=True):
        started = time.process_time()
        schedule, history, name = function(tuning, data, config)
        seconds = time.process_time() - started
        results[key] = history | {"name": name, "seconds": seconds}
        results[key] |= {part: values.tolist() for part, values in schedule.items()}
        results[key]["tuning runs"] = [score(train(schedule, run, data.train), data) for run in tuning]
        curves, scores = zip(*(follow(schedule, run, data) for run in tqdm(new, f"test: {key}")), strict=True)
        results[key] |= {"curve": torch.tensor(curves).mean(0).tolist(), "new runs": scores}
    learned = {part: torch.tensor(results["learned"][part]) for part in ("lr", "momentum")}
    with PeakMemory() as memory:
        hypergradient(variables(learned).requires_grad_(), tuning[0], data, config.memory)
    return results | {"learned": results["learned"] | {"peak": memory.peak / 2**20}}


def score(w: Params, data: Split) -> dict[str, float]:
    hits = predict(w, data.test.x).argmax(1) == data.test.y
    losses = {"validation": loss(w, data.validation).item(), "test": loss(w, data.test).item()}
    return losses | {"accuracy": hits.double().mean().item()}


def follow(schedule: Schedule, run: Run, data: Split) -> tuple[list[float], dict[str, float]]:
    """The validation loss at 50 steps of a training, and the scores at its end."""
    curve, every = [], max(len(run.rows) // 50, 1)

    def watch(t: int, w: Params) -> None:
        if t % every == 0:
            curve.append(loss(w, data.validation).item())

    return curve, score(train(schedule, run, data.train, watch), data)


# %% [markdown]
# ## Results


# %%
def table(results: dict[str, dict[str, Any]], config: Config) -> str:
    lines = [
        "| schedule | validation loss, tuning runs | test loss, tuning runs | test loss, new runs "
        "| test accuracy, new runs | CPU s to tune |",
        "|---" * 6 + "|",
    ]
    for result in results.values():
        tuned, new = (
            {k: [s[k] for s in result[runs]] for k in result[runs][0]} for runs in ("tuning runs", "new runs")
        )
        cells = [f"{mean(tuned['validation']):.4f}", f"{mean(tuned['test']):.4f}"]
        cells += [f"{mean(new['test']):.4f} ± {stdev(new['test']):.4f}"]
        cells += [f"{mean(new['accuracy']):.2%} ± {stdev(new['accuracy']):.2%}", f"{result['seconds']:.0f}"]
        lines.append(f"| {' | '.join([result['name'], *cells])} |")
    pairs = zip(results["learned"]["new runs"], results["cosine"]["new runs"], strict=True)
    gains = [a["test"] - b["test"] for a, b in pairs]
    learned = results["learned"]
    return "\n".join(lines) + (
        f"\n\nMeans ± standard deviations over {config.runs} runs for tuning and {config.test_runs} new runs with "
        f"other initial weights and batches. Difference of the test losses on new runs, learned minus cosine: "
        f"{mean(gains):+.4f} ± {stdev(gains):.4f}. A hypergradient through {config.steps} steps took "
        f"{mean(learned['evaluations']):.0f} evaluations of a step and at most {learned['peak']:.1f} MiB of the "
        f"{config.memory} allowed. Its norm was {learned['norm'][0]:.1e} at first, and its median over the second half "
        f"of outer steps {median(learned['norm'][config.outer_steps // 2 :]):.1e}. If the norm has grown much, the "
        f"steps have become too long, and the hypergradient follows the noise of these runs."
    )


def plot(results: dict[str, dict[str, Any]], config: Config) -> Figure:
    figure = Figure(figsize=(6, 19), layout="constrained")
    curves, outer, norm, lr, momentum, speed = figure.subplots(6, 1)
    for key, result in results.items():
        style = {"label": key, "lw": 2 if key == "learned" else 1.5}
        eta, mu = torch.tensor(result["lr"]), torch.tensor(result["momentum"])
        lr.plot(eta, **style)
        momentum.plot(mu, **style)
        speed.plot(eta / (1 - mu), **style)
        times = torch.linspace(0, config.steps, len(result["curve"]))
        (line,) = curves.plot(times[1:], result["curve"][1:], **style)
        if key == "learned":
            losses, turns = torch.tensor(result["loss"]), min(config.runs, config.outer_steps)
            means = losses.unfold(0, turns, 1).mean(1)
            outer.plot(losses, ".", c=line.get_color(), alpha=0.4, label="learned: one run")
            outer.plot(range(turns - 1, len(losses)), means, c=line.get_color(), lw=2, label="learned: mean of runs")
            norm.semilogy(result["norm"], ".", c=line.get_color())
        else:
            reached = mean(s["validation"] for s in result["tuning runs"])
            outer.axhline(reached, c=line.get_color(), ls="--", label=f"best {key} of the grid")
    lr.set(title="Learning rate η", xlabel="step", ylim=0)
    momentum.set(title="Momentum μ", xlabel="step")
    speed.set(title="Speed η / (1 − μ)", xlabel="step", ylim=0)
    ends = [result["curve"][-1] for result in results.values()]
    curves.set(title=f"Training: mean of {config.test_runs} new runs", xlabel="step", ylabel="validation loss (nats)")
    curves.set_ylim(0.95 * min(ends), 1.5 * max(ends))
    outer.set(title="Tuning", xlabel="outer step", ylabel="validation loss after all steps (nats)")
    norm.set(title="Norm of the hypergradient", xlabel="outer step")
    for axes in (lr, curves, outer):
        axes.legend()
    return figure


def main() -> None:
    config = parse(Config, "Learn a learning rate and a momentum for each step of SGD by hypergradients.", FAST)
    data = split(images(config.data))
    results = compare(data, config)
    title = f"A learned schedule of SGD on {data.train.name}"
    save(config, title, table(results, config), plot(results, config), results)


if __name__ == "__main__":
    main()
