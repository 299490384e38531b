# %% [markdown]
# # Weights of data sources, learned while a language model trains
#
#     w*(λ) = argmin_w  Σ_s ω_s(λ) ℓ_s(w),      min_λ  ℓ_target(w*(λ))
#
# A small GPT-2 is trained on four sources of text, one of them corrupted. `hg.transformers.BilevelTrainer` learns the
# weights of the sources at the same time, from a little text of the target domain. For comparison the training is
# repeated with equal weights, with the learned ones, with those from exact hypergradients, and without the corrupted
# source (oracle).

# %%
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import sklearn.datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import hypergrad as hg
from examples.common import Base, parse, rounded, save
from examples.text import docstrings


@dataclass
class Config(Base):
    steps: int = 300
    """Steps of every training."""
    batch: int = 16
    """Pieces of text in a batch, at both levels."""
    length: int = 64
    """Characters of a piece."""
    pieces: int = 1500
    """Pieces of each source."""
    validation: int = 200
    """Pieces of the target domain from which the weights are learned."""
    test: int = 400
    """Other pieces of the target domain, on which perplexities are measured."""
    width: int = 64
    """Width of the model, which has 2 layers."""
    lr: float = 3e-3
    """Initial learning rate of AdamW, with a cosine schedule."""
    penalty: float = 10.0
    """Penalty of F2SA."""
    outer_lr: float = 0.05
    """Learning rate of Adam on the logits of the weights."""
    begin: int = 50
    """Steps before the first update of the weights."""
    exact_seeds: int = 1
    """Number of seeds that also compute exact hypergradients."""
    exact_steps: int = 3
    """Outer steps with exact hypergradients, each through a whole training."""
    exact_outer_lr: float = 1.0
    """Learning rate of Adam on the logits with exact hypergradients."""
    exact_lr: float = 0.1
    """Initial learning rate of SGD (momentum .9, cosine schedule) in the trainings with exact hypergradients."""
    seeds: int = 3
    """Repetitions with other pieces, initial weights and orders."""


FAST: dict[str, Any] = {"steps": 6, "batch": 4, "length": 16, "pieces": 40, "validation": 8, "test": 8, "width": 8}
FAST |= {"begin": 2, "seeds": 1, "exact_steps": 2}
SOURCES = ("docstrings of NumPy", "code of the standard library", "descriptions of data sets", "corrupted docstrings")
LETTERS, EXACT = 128, "trained again with weights of exact hypergradients"

# %% [markdown]
# ## Texts
# The target domain is docstrings of SciPy. The corrupted source is docstrings of scikit-learn with the characters of
# each piece in a random order, so only their frequencies can be learned from it.


# %%
def letters(texts: list[str], config: Config, count: int, draw: np.random.RandomState) -> Tensor:
    """Random pieces of the texts as codes of characters: [count, length]."""
    whole = np.frombuffer("\n\n".join(texts).encode("ascii", "replace"), np.uint8) % LETTERS
    starts = draw.randint(0, len(whole) - config.length, count)
    return torch.tensor(np.stack([whole[i : i + config.length] for i in starts])).long()


def corpora(config: Config, seed: int) -> tuple[list[dict[str, Any]], ...]:
    """Rows for training (all sources), validation and test."""
    draw = np.random.RandomState(seed)
    scipy = docstrings(("scipy.linalg", "scipy.optimize", "scipy.stats", "scipy.signal", "scipy.special"))[0]
    half = len(scipy) // 2
    stdlib, described = Path(sysconfig.get_paths()["stdlib"]), Path(sklearn.datasets.__file__).parent / "descr"
    sources = (
        docstrings(("numpy", "numpy.linalg", "numpy.fft", "numpy.random"))[0],
        [path.read_text("utf-8", "replace") for path in sorted(stdlib.glob("*.py"))[:80]],
        [path.read_text("utf-8", "replace") for path in sorted(described.glob("*.rst"))],
        docstrings(("sklearn.linear_model", "sklearn.metrics", "sklearn.ensemble"))[0],
    )
    train = []
    for source, texts in enumerate(sources):
        pieces = letters(texts, config, config.pieces, draw)
        if source == len(sources) - 1:
            pieces = torch.stack([piece[torch.tensor(draw.permutation(len(piece)))] for piece in pieces])
        train += [{"input_ids": x, "labels": x, "source": source} for x in pieces]
    parts = [(scipy[:half], config.validation), (scipy[half:], config.test)]
    rest = [[{"input_ids": x, "labels": x} for x in letters(texts, config, n, draw)] for texts, n in parts]
    return train, *rest


# %% [markdown]
# ## Trainings


# %%
def network(config: Config, seed: int, **options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore

    torch.manual_seed(seed)
    size: Any = {"n_embd": config.width, "n_positions": config.length, "n_layer": 2, "n_head": 4, "vocab_size": LETTERS}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0, **options))


def trained(config: Config, seed: int, data: tuple[Any, ...], logits: Tensor | None, done: Callable[[], Any]) -> Any:
    """A trainer after training, in which the weights are learned (logits = None) or fixed."""
    from transformers import PrinterCallback, TrainingArguments  # pyright: ignore

    from hypergrad.transformers import BilevelTrainer, SourceWeights, f2sa

    model = network(config, seed)
    train, valid, test = data
    hparams = SourceWeights(len(SOURCES))
    if logits is not None:
        hparams.logits.data.copy_(logits)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch,
            per_device_eval_batch_size=100,
            learning_rate=config.lr,
            lr_scheduler_type="cosine",
            logging_steps=max(config.steps // 40, 1),
            save_strategy="no",
            report_to=[],
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=False,
        )
        trainer = BilevelTrainer(
            model,
            arguments,
            train_dataset=train,
            valid_dataset=valid,
            eval_dataset=test,
            hparams=hparams,
            method=partial(f2sa, penalty=config.penalty) if logits is None else None,
            outer_optimizer=torch.optim.Adam(hparams.parameters(), lr=config.outer_lr),
            begin=config.begin,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    done()
    return trainer


# %% [markdown]
# ## Exact hypergradients
# `hg.unroll.reverse` differentiates through all steps of a training of the same model. SGD replaces AdamW, because the
# derivative through 300 steps of Adam has a size of 10⁸: the square roots of its second moments are near zero.


# %%
def exact(
    config: Config, seed: int, data: tuple[Any, ...], done: Callable[[], Any], first: Tensor | None = None
) -> dict[str, Any]:
    """The logits after the outer steps from `first`, and the validation loss at the end of each training."""
    from hypergrad.diff_optimizers import SGD, PerStep

    train, valid, _ = data
    pieces, sources = torch.stack([row["input_ids"] for row in train]), torch.tensor([row["source"] for row in train])
    model, draw = network(config, seed, attn_implementation="eager"), torch.Generator().manual_seed(seed)
    passes = -(-config.steps * config.batch // len(train))
    order = torch.cat([torch.randperm(len(train), generator=draw) for _ in range(passes)])
    batches = order[: config.steps * config.batch].split(config.batch)

    def losses(w: dict[str, Tensor], rows: Tensor, training: bool) -> Tensor:
        inputs = {"input_ids": rows, "use_cache": False}
        z = torch.func.functional_call(model.train(training), w, args=(), kwargs=inputs).logits
        return cross_entropy(z[:, :-1].mT, rows[:, 1:], reduction="none").mean(1)

    def inner_loss(w: dict[str, Tensor], logits: Tensor, t: int, rows: Tensor) -> Tensor:
        weights = len(logits) * logits.softmax(0)
        return (weights[sources[rows]] * losses(w, pieces[rows], True)).mean()

    held_out = torch.stack([row["input_ids"] for row in valid])
    rates = [config.exact_lr * (1 + math.cos(math.pi * t / config.steps)) / 2 for t in range(config.steps)]
    rule, start = SGD(lr=PerStep(rates), momentum=0.9), {name: x.detach() for name, x in model.named_parameters()}
    step, logits = rule.on(inner_loss), (torch.zeros(len(SOURCES)) if first is None else first).requires_grad_()
    optimizer, found = torch.optim.Adam([logits], config.exact_outer_lr), {"validation": [], "hypergradients": []}
    for _ in range(config.exact_steps):
        result = hg.unroll.reverse(
            step,
            (start, rule.init(start)),
            logits,
            lambda carry, _: losses(carry[0], held_out, False).mean(),
            steps=config.steps,
            memory="iterates",
            batches=list(batches),
        )
        logits.grad = result.grads
        optimizer.step()
        found["validation"].append(float(result.outer_value))
        found["hypergradients"].append(result.grads.tolist())
        done()
    return found | {"logits": logits.detach().tolist()}


# %% [markdown]
# ## Comparison


# %%
def perplexity(trainer: Any) -> float:
    """Perplexity per character of the test pieces."""
    return math.exp(trainer.evaluate()["eval_loss"])


def cell(config: Config, seed: int, done: Callable[[], Any]) -> dict[str, Any]:
    data = corpora(config, seed)
    begin = time.process_time()
    learned = trained(config, seed, data, None, done)
    seconds = time.process_time() - begin
    steps = [entry for entry in learned.state.log_history if "weight/0" in entry]
    path = [[entry["step"], *(entry[f"weight/{i}"] for i in range(len(SOURCES)))] for entry in steps]
    oracle = torch.zeros(len(SOURCES))
    oracle[-1] = -torch.inf
    begin = time.process_time()
    uniform = perplexity(trained(config, seed, data, torch.zeros(len(SOURCES)), done))
    plain = time.process_time() - begin
    again = perplexity(trained(config, seed, data, learned.hparams.logits.detach(), done))
    found = {
        "perplexity": {
            "equal weights": uniform,
            "weights learned on the way": perplexity(learned),
            "trained again with them": again,
            "without the corrupted source (oracle)": perplexity(trained(config, seed, data, oracle, done)),
        },
        "weights": learned.hparams.weights.tolist(),
        "path": path,
        "seconds": {"bilevel": seconds, "plain": plain},
    }
    return with_exact(config, seed, data, found, done) if seed < config.seed + config.exact_seeds else found


def with_exact(config: Config, seed: int, data: tuple[Any, ...], found: Any, done: Callable[[], Any]) -> dict[str, Any]:
    begin = time.process_time()
    unrolled = exact(config, seed, data, done)
    seconds = {"exact": time.process_time() - begin}
    logits = torch.tensor(unrolled["logits"])
    perplexities = {EXACT: perplexity(trained(config, seed, data, logits, done))}
    weights = (len(SOURCES) * logits.softmax(0)).tolist()
    return found | {
        "perplexity": found["perplexity"] | perplexities,
        "exact": unrolled | {"weights": weights},
        "seconds": found["seconds"] | seconds,
    }


# %% [markdown]
# ## Report


# %%
def main() -> None:
    config = parse(Config, "weights of data sources for a language model", FAST)
    if find_spec("transformers") is None:
        print("this example needs transformers: pip install 'torch-hypergrad[transformers]'")
        return
    total = 4 * config.seeds + (config.exact_steps + 1) * min(config.exact_seeds, config.seeds)
    bar = tqdm(total=total, desc="trainings")
    runs = [cell(config, seed, bar.update) for seed in range(config.seed, config.seed + config.seeds)]
    bar.close()
    save(config, "Data sources: weights learned while a language model trains", table(config, runs), figure(runs),
         rounded({"sources": SOURCES, "runs": runs}))  # fmt: skip


def spread(values: list[float], digits: int = 3) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(config: Config, runs: list[dict[str, Any]]) -> str:
    lines, exactly = [], [run for run in runs if "exact" in run]
    same = "the same, of the seeds with exact hypergradients" if len(exactly) < len(runs) else ""
    lines = [f"| weights | perplexity of a letter | {same} |", "|---|---|---|"]
    for name in (exactly or runs)[0]["perplexity"]:
        cells = [[run["perplexity"][name] for run in part if name in run["perplexity"]] for part in (runs, exactly)]
        whole = spread(cells[0]) if len(cells[0]) == len(runs) else ""
        lines.append(f"| {name} | {whole} | {spread(cells[1]) if same and exactly else ''} |")
    lines += ["", "| source | learned weight | by exact hypergradients |", "|---|---|---|"]
    for i, name in enumerate(SOURCES):
        values = [run["exact"]["weights"][i] for run in exactly]
        own = spread([run["weights"][i] for run in runs], 2)
        lines.append(f"| {name} | {own} | {spread(values, 2) if values else ''} |")
    times = {kind: mean(run["seconds"][kind] for run in runs) for kind in ("bilevel", "plain")}
    times["exact"] = mean([run["seconds"]["exact"] for run in exactly] or [0.0])
    return (
        "\n".join(lines)
        + f"""

A GPT-2 with 2 layers and width {config.width} on characters, {config.steps} steps of {config.batch} pieces of
{config.length} characters; {config.pieces:,} pieces of each source. The weights, whose mean is 1, are learned from
{config.validation} pieces of docstrings of SciPy, on which the model is never trained; perplexities are those of
{config.test} pieces of other docstrings of SciPy. Mean ± standard deviation over {config.seeds} seeds. F2SA of order 2
with a penalty of {config.penalty:g}. CPU seconds of a training: {times["bilevel"]:.0f} with learned weights,
{times["plain"]:.0f} with fixed weights.

Exact hypergradients are computed in reverse through {config.steps} steps of SGD with momentum, for
{config.exact_steps} outer steps of Adam on the logits ({times["exact"]:.0f} CPU seconds). The models of the table are
trained by AdamW; the derivative through as many steps of AdamW exists, too, but its size of 10⁸ makes it useless as a
direction."""
    )


def figure(runs: list[dict[str, Any]]) -> Figure:
    """The weights over the steps, one line for each source and seed."""
    made = Figure(figsize=(7, 3.6), layout="constrained")
    ax = made.subplots()
    for number, run in enumerate(runs):
        rows = np.array(run["path"])
        for i, name in enumerate(SOURCES):
            ax.plot(rows[:, 0], rows[:, 1 + i], color=f"C{i}", alpha=0.8, label=name if not number else None)
    ax.set_xlabel("step")
    ax.set_ylabel("weight")
    ax.legend(fontsize=8)
    return made


if __name__ == "__main__":
    main()
