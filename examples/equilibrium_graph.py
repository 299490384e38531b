# %% [markdown]
# # An equilibrium graph network compared with a graph convolutional network
#
# The features of all nodes of a graph, Z [nodes, states], are the fixed point of one layer of message passing:
#
#     Z = relu(Â Z W + b(X)),    ‖W‖₂ ≤ 0.9,    logits = Z C + d
#
# with Â = D^(−1/2) (adjacency + I) D^(−1/2), so that ‖Â‖₂ ≤ 1 and the map contracts. The state of a node depends on all
# nodes that it is connected to, with the memory of one layer (Gu, Chang, Zhu, Sojoudi and El Ghaoui 2020, "Implicit
# graph neural networks"); in a convolutional network of two layers (Kipf and Welling 2017), on those two edges away.

# %%
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad as hg

from .common import Common, parse, save
from .datasets import Graph, graph


@dataclass
class Config(Common):
    seeds: int = 5
    """Number of seeds, from --seed on."""
    epochs: int = 200
    """Steps of Adam, each on the whole graph."""
    lr: float = 0.01
    """Learning rate of Adam."""
    weight_decay: float = 5e-4
    """Weight decay of Adam."""
    dropout: float = 0.5
    """Dropout probability of features and of states."""
    gcn_hidden: int = 16
    """Hidden features of the two-layer network."""
    states: int = 32
    """Features of a node at the equilibrium."""
    radius: float = 0.9
    """Bound on ‖W‖₂, onto which W is projected."""
    rtol: float = 1e-4
    """Relative tolerance of the equilibrium and of the adjoint system."""


FAST = {"seeds": 2, "epochs": 10}


def normalised_adjacency(edges: Tensor, count: int) -> Tensor:
    loops = torch.arange(count).expand(2, count)
    rows, columns = torch.cat([edges, loops], 1)
    scale = rows.bincount(minlength=count).rsqrt()
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), scale[rows] * scale[columns], check_invariants=True
    ).coalesce()


# %% [markdown]
# ## The two networks


# %%
class Propagate(nn.Module):
    def __init__(self, adjacency: Tensor, features: int, states: int):
        super().__init__()
        self.adjacency, self.linear = adjacency, nn.Linear(features, states)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, self.linear(z))


class Cell(nn.Module):
    def __init__(self, adjacency: Tensor, states: int, radius: float):
        super().__init__()
        self.adjacency, self.W = adjacency, nn.Parameter(radius * torch.eye(states))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.relu(torch.sparse.mm(self.adjacency, z @ self.W) + u)


def gcn(data: Graph, adjacency: Tensor, config: Config) -> nn.Module:
    features, classes = data.x.shape[1], int(data.y.max()) + 1
    first = Propagate(adjacency, features, config.gcn_hidden)
    second = Propagate(adjacency, config.gcn_hidden, classes)
    return nn.Sequential(nn.Dropout(config.dropout), first, nn.ReLU(), nn.Dropout(config.dropout), second)


def equilibrium(data: Graph, adjacency: Tensor, config: Config) -> nn.Module:
    features, classes = data.x.shape[1], int(data.y.max()) + 1
    layer = hg.nn.Equilibrium(
        Cell(adjacency, config.states, config.radius),
        inject=nn.Linear(features, config.states),
        forward=hg.fixed_points.Anderson(rtol=config.rtol),
        backward=hg.solvers.GMRES(rtol=config.rtol),
        batch_dims=0,  # the nodes are coupled, so all rows of Z are one system
    )
    classifier = nn.Linear(config.states, classes)
    return nn.Sequential(nn.Dropout(config.dropout), layer, nn.Dropout(config.dropout), classifier)


NETWORKS: dict[str, Callable[[Graph, Tensor, Config], nn.Module]] = {
    "two-layer GCN": gcn,
    "equilibrium network": equilibrium,
}

# %% [markdown]
# ## Training
# The test uses the weights of the epoch with the best validation accuracy (among equals, the lowest validation loss).


# %%
def train(model: nn.Module, data: Graph, config: Config, progress: tqdm) -> tuple[list[float], float, float]:
    """Validation accuracy after each epoch, test accuracy, CPU seconds per epoch."""
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    best, chosen, curve, seconds = (-1.0, 0.0), model, [], 0.0
    for _ in range(config.epochs):
        start = time.process_time()
        model.train()
        optimizer.zero_grad()
        cross_entropy(model(data.x)[data.train], data.y[data.train]).backward()
        optimizer.step()
        for module in model.modules():
            if isinstance(module, Cell):
                hg.nn.project_spectral_(module.W, config.radius)
        seconds += time.process_time() - start
        score, loss = evaluate(model, data, data.validation)
        curve.append(score)
        if (score, -loss) > best:
            best, chosen = (score, -loss), copy.deepcopy(model)
        progress.update()
    return curve, evaluate(chosen, data, data.test)[0], seconds / config.epochs


@torch.no_grad()
def evaluate(model: nn.Module, data: Graph, nodes: Tensor) -> tuple[float, float]:
    """Accuracy and loss on these nodes."""
    logits, y = model.eval()(data.x)[nodes], data.y[nodes]
    return (logits.argmax(1) == y).double().mean().item(), cross_entropy(logits, y).item()


def compare(data: Graph, config: Config) -> dict[str, dict[str, list]]:
    """Train both networks with each seed."""
    adjacency = normalised_adjacency(data.edges, len(data.y))
    history = {name: {"curve": [], "test": [], "seconds": []} for name in NETWORKS}
    with tqdm(total=len(NETWORKS) * config.seeds * config.epochs, desc="epochs") as progress:
        for seed in range(config.seed, config.seed + config.seeds):
            for name, build in NETWORKS.items():
                torch.manual_seed(seed)
                measured = train(build(data, adjacency, config), data, config, progress)
                for values, value in zip(history[name].values(), measured, strict=True):
                    values.append(value)
    return history


# %% [markdown]
# ## Results


# %%
def table(history: dict[str, dict[str, list]]) -> str:
    lines = ["| network | test accuracy | best validation accuracy | CPU ms per epoch |", "|---|---|---|---|"]
    for name, past in history.items():
        best = [max(curve) for curve in past["curve"]]
        scores = " | ".join(f"{mean(s):.1%} ± {stdev(s) if len(s) > 1 else 0:.1%}" for s in (past["test"], best))
        lines.append(f"| {name} | {scores} | {1000 * min(past['seconds']):.0f} |")
    return "\n".join(lines)


def plot(history: dict[str, dict[str, list]]) -> Figure:
    figure = Figure(figsize=(6, 7.5), layout="constrained")
    left, right = figure.subplots(2, 1)
    for i, (name, past) in enumerate(history.items()):
        curves = torch.tensor(past["curve"])
        left.plot(curves.mean(0), c=f"C{i}", label=name)
        left.fill_between(range(curves.shape[1]), curves.amin(0), curves.amax(0), color=f"C{i}", alpha=0.2, lw=0)
        right.plot([i] * len(past["test"]), past["test"], "o", c=f"C{i}", alpha=0.5)
        right.plot(i, mean(past["test"]), "_", c=f"C{i}", ms=40, mew=3)
    left.set(title="Validation: mean and range over seeds", xlabel="epoch", ylabel="accuracy")
    left.legend(loc="lower right")
    right.set(title="Test: each seed, and the mean", xlim=(-0.5, len(history) - 0.5), ylabel="accuracy")
    right.set_xticks(range(len(history)), list(history))
    return figure


def main() -> None:
    config = parse(Config, "Train an equilibrium graph network and a two-layer GCN.", FAST)
    data = graph(config.data)
    history = compare(data, config)
    save(config, f"Equilibrium graph network and GCN on {data.name}", table(history), plot(history), history)


if __name__ == "__main__":
    main()
