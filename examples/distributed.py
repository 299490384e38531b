# %% [markdown]
# # The same hypergradient on one rank and on many
#
# Two problems run on 1, 2 and 4 ranks, which share the rows of every batch:
#
# - the demo's softmax regression on digits, with a strength for each pixel and class: data-parallel CG
#   (`hg.distributed.call` and `replicated`);
# - a small GPT sharded by FSDP2, for which the weights of two sources of text, one of them noise, are learned: F2SA on
#   the unchanged module.
#
# The ranks are processes on this machine (gloo). With torchrun, on one host or several, they are the processes that it
# starts: `torchrun --nproc-per-node 4 -m examples.distributed`.

# %%
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import hypergrad as hg
from examples.common import Base, parse, rounded, save


@dataclass
class Config(Base):
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks, of which one after the other is run."""
    rows: int = 1200
    """Training images; half as many are for validation."""
    layers: int = 2
    """Layers of the GPT."""
    width: int = 64
    """Width of the GPT."""
    length: int = 32
    """Tokens of a sequence."""
    batch: int = 16
    """Sequences of a batch over all ranks."""
    steps: int = 30
    """Steps of F2SA."""


FAST = {"ranks": (1, 2), "rows": 200, "layers": 1, "width": 16, "length": 8, "batch": 8, "steps": 5}
TOKENS = 16


# %% [markdown]
# ## Digits: a data-parallel hypergradient


# %%
def part(x: Tensor) -> Tensor:
    """The rows of this rank."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def digits(config: Config) -> dict[str, Any]:
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed))
    train, valid = order[: config.rows], order[config.rows : config.rows + config.rows // 2]
    images = (images - images[train].mean(0)) / images[train].std(0).clamp(min=1.0)
    torch.manual_seed(config.seed)
    model = nn.Linear(64, 10, dtype=torch.float64)
    lam = torch.full_like(model.weight, -4.0).requires_grad_()
    evaluate = lambda x: hg.distributed.call(model, x)  # noqa: E731

    def loss(rows: Tensor) -> Tensor:
        own = part(rows)
        return hg.distributed.share(len(own)) * cross_entropy(evaluate(images[own]), labels[own])

    def inner_loss(lam: Tensor) -> Tensor:
        weight = hg.distributed.replicated(model.weight)
        return loss(train) + 0.5 * (lam.exp() * weight**2).sum()

    stop = {"max_iter": 3000, "tolerance_grad": 1e-10, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS(model.parameters(), history_size=50, line_search_fn="strong_wolfe", **stop)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = inner_loss(lam.detach())
        value.backward()
        mean = value.detach().clone()  # the line search has to decide the same on every rank
        dist.all_reduce(mean)
        return mean / dist.get_world_size()

    optimizer.step(closure)
    shared = hg.distributed.replicated(lam)
    train_loss, valid_loss = inner_loss(shared), loss(valid)
    with Communication() as sent:
        start = time.perf_counter()
        result = hg.implicit.grad(
            valid_loss,
            inner_loss=train_loss,
            params=model.parameters(),
            hparams=[lam],
            solver=hg.solvers.CG(rtol=1e-10),
        )
        seconds = time.perf_counter() - start
    products = int(result.solution.steps) + 2
    return {"answer": result.grads[0], "bytes": sent.bytes / products, "seconds": seconds / products}


# %% [markdown]
# ## A small GPT: F2SA on FSDP2


# %%
class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = [y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.mix(self.first(x)).chunk(3, -1)]
        x = x + self.out(scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.token, self.place = nn.Embedding(TOKENS, config.width), nn.Embedding(config.length, config.width)
        self.blocks = nn.Sequential(*(Block(config.width) for _ in range(config.layers)))
        self.head = nn.Linear(config.width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.token(tokens) + self.place.weight[: tokens.shape[1]])
        return self.head(hidden).clone()  # FSDP2 warns if the output is a view


def text(config: Config, count: int, noise: Tensor, random: torch.Generator) -> Tensor:
    """Sequences [count, length + 1] that count up by a random step, or, where noise is 1, of random tokens."""
    start, step = (torch.randint(high, (count, 1), generator=random) for high in (TOKENS, 4))
    clean = (start + (step + 1) * torch.arange(config.length + 1)) % TOKENS
    drawn = torch.randint(TOKENS, clean.shape, generator=random)
    return torch.where(noise[:, None] == 1, drawn, clean)


def gpt(config: Config) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    model = GPT(config).double()
    if dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    lam = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # logits of the two sources' weights
    tracker = hg.bilevel.F2SA(list(model.parameters()), [lam], lr=0.1)
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False), torch.optim.Adam([lam], lr=0.1)
    random = torch.Generator().manual_seed(config.seed + 1)

    def losses(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return (
            cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1).mean(1)
        )

    def train_loss(tokens: Tensor, source: Tensor) -> Tensor:
        weights = hg.distributed.replicated(lam).softmax(0)
        return (2 * weights[source] * losses(tokens)).mean()

    def valid_loss(tokens: Tensor) -> Tensor:
        return losses(tokens).mean()

    with Communication() as sent:
        start = time.perf_counter()
        for _ in tqdm(range(config.steps), f"F2SA, {dist.get_world_size()} ranks", disable=dist.get_rank() > 0):
            source = torch.arange(config.batch) % 2
            tokens = text(config, config.batch, source, random)
            valid = text(config, config.batch, torch.zeros_like(source), random)
            tracker.backward(partial(valid_loss, part(valid)), partial(train_loss, part(tokens), part(source)))
            for each in (inner, outer, tracker):
                each.step()
            for each in (inner, outer):
                each.zero_grad()
        seconds = time.perf_counter() - start
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]  # pyright: ignore
    answer = torch.cat([lam.detach(), *(p.detach().flatten() for p in parameters)])
    weights = lam.detach().softmax(0).tolist()
    return {"answer": answer, "bytes": sent.bytes / config.steps, "seconds": seconds / config.steps, "weights": weights}


# %% [markdown]
# ## Ranks


# %%
class Communication(TorchDispatchMode):
    """Counts the bytes (`bytes`) that this rank passes to collectives in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            # The smaller tensor: the input of a gather, the output of a scatter.
            self.bytes += min((x.nbytes for x in tensors), default=0)
        return func(*args, **(kwargs or {}))


def work(rank: int, ranks: int, config: Config, folder: str) -> None:
    """Run both problems on a rank; the first rank saves the results."""
    torch.set_num_threads(config.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    results = both(config)
    if rank == 0:
        torch.save(results, f"{folder}/{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group and abort a normal exit


def both(config: Config) -> dict[str, dict[str, Any]]:
    return {"digits, CG": digits(config), "GPT, F2SA on FSDP2": gpt(config)}


def main(config: Config) -> None:
    if "RANK" in os.environ:  # under torchrun: this process is one of the ranks
        dist.init_process_group("gloo")
        results = both(config)
        if dist.get_rank() == 0:
            print({name: {key: x for key, x in row.items() if key != "answer"} for name, row in results.items()})
        dist.barrier()
        dist.destroy_process_group()
        return
    found: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in config.ranks:
            torch.multiprocessing.spawn(work, (ranks, config, folder), nprocs=ranks)
            found[ranks] = torch.load(Path(folder) / f"{ranks}.pt", weights_only=True)
    first = found[config.ranks[0]]
    answers = {name: row["answer"] for name, row in first.items()}
    lines = [
        "| problem | ranks | difference from the first row | bytes sent a rank | seconds |",
        "|---|---|---|---|---|",
    ]
    results: dict[str, Any] = {}
    for name in first:
        for ranks, rows in found.items():
            row, truth = rows[name], answers[name]
            apart = float((row.pop("answer") - truth).norm() / truth.norm())
            results.setdefault(name, {})[ranks] = row | {"difference": apart}
            lines.append(f"| {name} | {ranks} | {apart:.1e} | {row['bytes']:,.0f} | {row['seconds']:.2g} |")
    unit = "Bytes and seconds are those of one Hessian product of CG, and of one step of F2SA."
    weights = list(first["GPT, F2SA on FSDP2"]["weights"])
    unit += f" The learned weights of the clean source and of the noise are {weights[0]:.2f} and {weights[1]:.2f}."
    save(config, "Hypergradients on many ranks", "\n".join(lines) + f"\n\n{unit}", picture(results), rounded(results))


def picture(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(5.5, 2.8 * len(results)), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(len(results), 1), results.items(), strict=True):
        axes.bar([str(ranks) for ranks in rows], [row["seconds"] for row in rows.values()])
        axes.set(title=name, xlabel="ranks, on one machine", ylabel="seconds")
    return figure


if __name__ == "__main__":
    main(parse(Config, "The same hypergradients on one rank and on many.", FAST))
