"""Small real networks in mid-training, on scikit-learn's digits and on the texts that describe its data sets.

Every network trains on full batches in float64 by torch's SGD with momentum or Adam: first some steps at a fixed λ,
so that momenta are warm at the start, then T steps through which the derivative is taken. A fifth of the labels of the
digits are wrong. λ is the logarithm of a decay for each tensor of weights, and of a weight for each training example.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

Named = dict[str, Tensor]
Make = Callable[[Any], torch.optim.Optimizer]
Trained = tuple[Named, torch.optim.Optimizer]
F64 = torch.float64
LENGTH = 16  # characters in an example of text


class Case:
    """A network at its start, with the state of its optimizer.

    Args:
        module: the network. Those of its parameters that require grad are trained.
        data: x, y for training, and xv, yv for validation.
        make: makes the optimizer of a list of tensors.
        before: steps before the start.
        steps: T.
        log_decay: the logarithm of the decay of each tensor.

    Attributes:
        start, state: the weights and the optimizer's state after `before` steps.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        data: dict[str, Tensor],
        make: Make,
        before: int,
        steps: int,
        log_decay: float = -5.0,
    ):
        self.name, self.data, self.make, self.steps, self.log_decay = name, data, make, steps, log_decay
        module = module.double()
        self.start = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        self.module, self.state = module.requires_grad_(False), None
        w, optimizer = self.trained(before)
        self.start, self.state = {n: x.detach() for n, x in w.items()}, deepcopy(optimizer.state_dict())

    def hparams(self) -> Named:
        """λ: log_decay for each tensor, and log-weights of 0."""
        decay = torch.full((len(self.start),), self.log_decay, dtype=F64, requires_grad=True)
        return {"decay": decay, "weights": torch.zeros(len(self.data["y"]), dtype=F64, requires_grad=True)}

    def model(self, w: Named, x: Tensor) -> Tensor:
        """The logits. Buffers are copied, because BatchNorm in training mode writes to them."""
        buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            out: Any = functional_call(self.module, {**w, **buffers}, (x,))
        return out if isinstance(out, Tensor) else out.logits

    def fit(self, outputs: Tensor, h: Named) -> Tensor:
        return (h["weights"].exp() * each_loss(outputs, self.data["y"])).mean()

    def penalty(self, w: Named, h: Named) -> Tensor:
        return torch.stack([s.exp() / 2 * x.square().sum() for s, x in zip(h["decay"], w.values(), strict=True)]).sum()

    def inner(self, w: Named, h: Named) -> Tensor:
        return self.fit(self.model(w, self.data["x"]), h) + self.penalty(w, h)

    def outer(self, w: Named, h: Named) -> Tensor:
        return each_loss(self.model(w, self.data["xv"]), self.data["yv"]).mean()

    def optimizer(self, tensors: Sequence[Tensor]) -> torch.optim.Optimizer:
        """torch's optimizer, with its state at the start, of one or more sets of the network's weights."""
        optimizer = self.make(list(tensors))
        if self.state is not None:
            kept: Any = self.state["state"]
            for i, x in enumerate(tensors):
                optimizer.state[x] = deepcopy(kept[i % len(self.start)])
        return optimizer

    def trained(self, steps: int, h: Named | None = None, each: Callable[[Named], Any] | None = None) -> Trained:
        """The leaves that hold the weights after `steps` steps from the start, and their optimizer.

        each: writes the gradient of a step to .grad; by default that of the inner loss.
        """
        h = {name: x.detach() for name, x in (self.hparams() if h is None else h).items()}
        w = {name: x.clone().requires_grad_() for name, x in self.start.items()}
        optimizer = self.optimizer(list(w.values()))
        for _ in range(steps):
            optimizer.zero_grad()
            if each is None:
                self.inner(w, h).backward()
            else:
                each(w)
            optimizer.step()
        return w, optimizer


def each_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """The loss of each example; that of a text is the mean over its characters."""
    if y.ndim == 1:
        return cross_entropy(outputs, y, reduction="none")
    return cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)


def digits(seed: int, count: int = 200, wrong: float = 0.2, image: bool = False) -> dict[str, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(labels), generator=draw)[: 2 * count]
    x = (pixels[rows].to(F64) - 4.88) / 6.02
    x, y = (x.view(-1, 1, 8, 8) if image else x), labels[rows].long()
    spoilt = torch.rand(count, generator=draw) < wrong
    shown = torch.where(spoilt, torch.randint(10, (count,), generator=draw), y[:count])
    return {"x": x[:count], "y": shown, "xv": x[count:], "yv": y[count:]}


def characters() -> tuple[list[Tensor], int]:
    """Two texts as indices of characters, and the number of different characters."""
    from sklearn import datasets

    texts = ["".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
             for names in (("breast_cancer", "wine", "iris"), ("digits", "diabetes", "linnerud"))]  # fmt: skip
    places = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    return [torch.tensor([places[c] for c in text]) for text in texts], len(places)


def text(seed: int, source: int, count: int = 64) -> dict[str, Tensor]:
    """Windows of a text: those for training from its first half, those for validation from its second."""
    whole = characters()[0][source]
    draw, half = torch.Generator().manual_seed(seed), len(whole) // 2
    data = {}
    for suffix, (begin, end) in zip(("", "v"), pairwise((0, half, len(whole))), strict=True):
        starts = torch.randint(begin, end - LENGTH - 1, (count,), generator=draw)
        windows = whole[starts[:, None] + torch.arange(LENGTH + 1)]
        data |= {f"x{suffix}": windows[:, :-1], f"y{suffix}": windows[:, 1:]}
    return data


def sgd(lr: float) -> Make:
    return partial(torch.optim.SGD, lr=lr, momentum=0.9)


def adam(lr: float) -> Make:
    return partial(torch.optim.Adam, lr=lr)


def linear(seed: int, count: int = 200, steps: int = 400) -> Case:
    """A strongly convex problem, trained to the end, on which most estimators have to be right."""
    torch.manual_seed(seed)
    return Case("linear, to the end", nn.Linear(64, 10), digits(seed, count), sgd(0.05), 20, steps, log_decay=-2.0)


def mlp(seed: int) -> Case:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return Case("MLP", net, digits(seed), sgd(0.05), 20, 100)


class Residual(nn.Module):
    """A convolution, a residual block with BatchNorm, average pooling, and a linear layer."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels))
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.head = nn.Linear(4 * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        x = nn.functional.silu(x + self.block(x))
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))


def resnet(seed: int, train: bool) -> Case:
    """In eval mode BatchNorm uses fixed statistics of the initial network, in training mode those of each batch."""
    torch.manual_seed(seed)
    net, data = Residual().double(), digits(seed, image=True)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # running statistics are the mean over all batches
    with torch.no_grad():
        net(data["x"])
    name = f"ResNet, BatchNorm {'train' if train else 'eval'}"
    return Case(name, net.train(train), data, sgd(0.05 if train else 0.02), 20, 60)


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1])


def lstm(seed: int) -> Case:
    torch.manual_seed(seed)
    return Case("LSTM", Recurrent(), digits(seed), adam(0.003), 40, 80)


def gpt2_module() -> nn.Module:
    transformers: Any = import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=characters()[1],
        n_positions=LENGTH,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return transformers.GPT2LMHeadModel(config).double()


def gpt2(seed: int) -> Case:
    torch.manual_seed(seed)
    return Case("GPT-2", gpt2_module(), text(seed, 0), adam(0.002), 40, 60)


def vit(seed: int) -> Case:
    transformers: Any = import_module("transformers")
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=10,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return Case("ViT", transformers.ViTForImageClassification(config), digits(seed, image=True), adam(0.001), 40, 60)


def unstable(seed: int) -> Case:
    """`gpt2` with five times larger steps: training is chaotic, so its derivative is large and of no use."""
    torch.manual_seed(seed)
    return Case("GPT-2, large steps", gpt2_module(), text(seed, 0), adam(0.01), 40, 60)


def lora(seed: int) -> Case:
    """Adapters of rank 4 in the attention of a GPT-2 that was trained on the first text; they train on the second."""
    peft: Any = import_module("peft")
    net, data = gpt2_module(), text(seed, 0)
    before = Case("GPT-2", net, data, adam(0.003), 100, 0)
    net.load_state_dict(before.start, strict=False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about names that transformers will change
        adapted = peft.get_peft_model(net.requires_grad_(True), config, autocast_adapter_dtype=False)
    return Case("LoRA of GPT-2", adapted, text(seed, 1), adam(0.005), 40, 60)


CASES: dict[str, Callable[[int], Case]] = {
    "linear, to the end": linear,
    "MLP": mlp,
    "ResNet, BatchNorm train": lambda seed: resnet(seed, True),
    "ResNet, BatchNorm eval": lambda seed: resnet(seed, False),
    "LSTM": lstm,
    "ViT": vit,
    "GPT-2": gpt2,
    "LoRA of GPT-2": lora,
    "GPT-2, large steps": unstable,
}
NEEDS = {
    "ViT": ("transformers",),
    "GPT-2": ("transformers",),
    "GPT-2, large steps": ("transformers",),
    "LoRA of GPT-2": ("transformers", "peft"),
}


def available() -> list[str]:
    """The networks whose packages are installed; all of them need scikit-learn for its data."""
    return [name for name in CASES if all(find_spec(each) for each in ("sklearn", *NEEDS.get(name, ())))]
