# %% [markdown]
# # Training an equilibrium model: four hypergradients of the same loss
#
# Each image x has a hidden state z*(x) of 200 numbers, the fixed point of a map that is trained:
#
#     z = tanh(zA + xB + c),    ‖A‖₂ ≤ 0.99,    logits = z*C + d,    min over A, B, c, C, d of the cross-entropy
#
# This is the third experiment of Grazzi, Franceschi, Pontil and Salzo (ICML 2020). With --images 5000 it has their
# sizes: 5,000 images for training, 5,000 for validation, full-batch steps of SGD (learning rate 0.5, momentum 0.9).

# %%
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from tqdm import tqdm

import hypergrad as hg

from .common import Common, PeakMemory, parse, save
from .datasets import images


@dataclass
class Config(Common):
    images: int = 800
    """Training images, and as many validation images; HyperTorch has 5,000."""
    states: int = 200
    """Entries of the hidden state of an image."""
    iterations: int = 20
    """T steps for the state and K for the adjoint system, in HyperTorch's three methods."""
    rtol: float = 1e-6
    """Relative tolerance of the state and of the adjoint system, in hg.nn.Equilibrium."""
    radius: float = 0.99
    """Bound on ‖A‖₂, onto which A is projected."""
    lr: float = 0.5
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    steps: int = 60
    """Outer steps."""
    measurements: int = 5
    """Number of measurements during training, after the first."""


FAST = {"images": 200, "states": 30, "steps": 6, "measurements": 2}

# %% [markdown]
# ## The model
# The layer solves for z* and differentiates it implicitly. xB + c does not depend on z, so the layer computes it once.
# The parameters are, in this order, A, B, c, C, d.


# %%
class Cell(nn.Module):
    def __init__(self, states: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(states, states))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.A + u)


class Model(nn.Module):
    def __init__(self, pixels: int, states: int, rtol: float):
        super().__init__()
        self.layer = hg.nn.Equilibrium(
            Cell(states),
            inject=nn.Linear(pixels, states),
            forward=hg.fixed_points.Anderson(rtol=rtol, max_steps=200),
            backward=hg.solvers.GMRES(rtol=rtol, restart=15),
        )
        self.classifier = nn.Linear(states, 10)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layer(x))


# %% [markdown]
# ## The same as functions of (params, hparams), for HyperTorch's interface
# Each method adds a hypergradient to the `.grad` of the model's parameters.


# %%
def fp_map(x: Tensor) -> Callable[[list[Tensor], Sequence[Tensor]], list[Tensor]]:
    return lambda z, hparams: [torch.tanh(z[0] @ hparams[0] + linear(x, hparams[1], hparams[2]))]


def outer_loss(y: Tensor) -> Callable[[list[Tensor], Sequence[Tensor]], Tensor]:
    return lambda z, hparams: cross_entropy(linear(z[0], hparams[3], hparams[4]), y)


def iterate(x: Tensor, hparams: Sequence[Tensor], steps: int) -> list[Tensor]:
    z = [x.new_zeros(len(x), len(hparams[0]))]
    for _ in range(steps):
        z = fp_map(x)(z, hparams)
    return z


def reverse_unroll(model: Model, x: Tensor, y: Tensor, steps: int) -> None:
    hparams = list(model.parameters())
    hg.reverse_unroll(iterate(x, hparams, steps), hparams, outer_loss(y))


def fixed_point(model: Model, x: Tensor, y: Tensor, steps: int) -> None:
    hparams = list(model.parameters())
    with torch.no_grad():
        z = iterate(x, hparams, steps)
    hg.fixed_point(z, hparams, steps, fp_map(x), outer_loss(y))


def normal_equations(model: Model, x: Tensor, y: Tensor, steps: int) -> None:
    hparams = list(model.parameters())
    with torch.no_grad():
        z = iterate(x, hparams, steps)
    hg.CG_normaleq(z, hparams, steps, fp_map(x), outer_loss(y))


def equilibrium(model: Model, x: Tensor, y: Tensor, steps: int) -> None:
    cross_entropy(model(x), y).backward()


METHODS = {
    "reverse unroll": reverse_unroll,
    "fixed point": fixed_point,
    "normal equations": normal_equations,
    "Equilibrium layer": equilibrium,
}

# %% [markdown]
# ## Measurements
# The error of a hypergradient is its distance from one in float64 with the state and the adjoint solved to 1e-12.
# Memory is the peak size of the tensors that are made in the computation.


# %%
def hypergradient(model: Model) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def reference(model: Model, x: Tensor, y: Tensor) -> Tensor:
    exact = Model(x.shape[1], model.classifier.in_features, rtol=1e-12).double()
    exact.load_state_dict(model.state_dict())
    cross_entropy(exact(x.double()), y).backward()
    return hypergradient(exact)


@torch.no_grad()
def evaluate(model: Model, name: str, x: Tensor, y: Tensor, iterations: int) -> tuple[float, float]:
    """Loss and accuracy at the state that the method uses."""
    hparams = list(model.parameters())
    logits = model(x) if METHODS[name] is equilibrium else model.classifier(iterate(x, hparams, iterations)[0])
    return cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


# %% [markdown]
# ## Training
# The four models have the same start and take their steps in turns, so that the machine's load is the same for all.


# %%
def train(config: Config) -> dict[str, dict[str, list[float]]]:
    torch.manual_seed(config.seed)
    pixels, labels = images(config.data)[1:]
    order = torch.randperm(len(labels))[: 2 * config.images]
    pixels = pixels[order] - pixels[order[: config.images]].mean(0)  # this learning rate needs centred pixels
    (x, x_val), (y, y_val) = pixels.tensor_split(2), labels[order].tensor_split(2)
    first = Model(x.shape[1], config.states, config.rtol).state_dict()
    models = {name: Model(x.shape[1], config.states, config.rtol) for name in METHODS}
    optimizers = {name: torch.optim.SGD(m.parameters(), config.lr, config.momentum) for name, m in models.items()}
    history = {name: {key: [] for key in ("seconds", "mib", "step", "loss", "accuracy", "error")} for name in METHODS}
    for model in models.values():
        model.load_state_dict(first)
    measured = {round(i * config.steps / config.measurements) for i in range(config.measurements + 1)}
    for step in tqdm(range(config.steps + 1), "outer steps"):
        for name, model in models.items():
            past, method = history[name], METHODS[name]
            if step in measured:
                model.zero_grad()
                with PeakMemory() as memory:
                    method(model, x, y, config.iterations)
                truth = reference(model, x, y)
                past["mib"].append(memory.peak / 2**20)
                past["step"].append(step)
                past["loss"].append(evaluate(model, name, x, y, config.iterations)[0])
                past["accuracy"].append(evaluate(model, name, x_val, y_val, config.iterations)[1])
                past["error"].append(((hypergradient(model) - truth).norm() / truth.norm()).item())
            if step == config.steps:
                continue
            start = time.process_time()
            optimizers[name].zero_grad()
            method(model, x, y, config.iterations)
            optimizers[name].step()
            hg.nn.project_spectral_(next(model.parameters()), config.radius)  # A
            past["seconds"].append(time.process_time() - start)
    return history


# %% [markdown]
# ## Results


# %%
def table(history: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| method | train loss | validation accuracy | CPU s per step | peak MiB | error, start | error, end |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, past in history.items():
        scores = f"{past['loss'][-1]:.4f} | {past['accuracy'][-1]:.2%}"
        cost = f"{median(past['seconds']):.2f} | {max(past['mib']):.0f}"
        lines.append(f"| {name} | {scores} | {cost} | {past['error'][0]:.1e} | {past['error'][-1]:.1e} |")
    return "\n".join(lines)


def plot(history: dict[str, dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(6, 7.5), layout="constrained")
    left, right = figure.subplots(2, 1)
    for (name, past), marker in zip(history.items(), "osv*", strict=True):
        seconds = [median(past["seconds"]) * step for step in past["step"]]
        left.plot(seconds, past["accuracy"], marker=marker, label=name)
        right.semilogy(past["step"], past["error"], marker=marker, label=name)
    left.set(title="Validation accuracy", xlabel="CPU seconds of training", ylabel="accuracy")
    right.set(title="Relative error of the hypergradient", xlabel="outer step", ylabel="‖∇ − reference‖ / ‖reference‖")
    left.legend()
    return figure


def main() -> None:
    config = parse(Config, "Train an equilibrium model by four kinds of hypergradients.", FAST)
    history = train(config)
    save(config, "Equilibrium model, four hypergradients", table(history), plot(history), history)


if __name__ == "__main__":
    main()
