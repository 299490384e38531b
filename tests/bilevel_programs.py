"""A small network trained on minibatches, a tracker of every kind for it, and the training loop of a user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hypergrad as hg

B = hg.bilevel
BATCH, BATCHES, FEATURES, WIDTH, CLASSES = 6, 4, 4, 5, 3


class Program:
    """Classification with one weight decay for each tensor of the network; BATCHES training and validation batches."""

    def __init__(self, *layers: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64):
        random = torch.Generator().manual_seed(seed)
        shape = (BATCHES, BATCH, FEATURES)
        self.x, self.v = (torch.randn(shape, generator=random, dtype=dtype) for _ in range(2))
        self.y, self.u = (torch.randint(CLASSES, shape[:2], generator=random) for _ in range(2))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Linear(FEATURES, WIDTH), *layers, nn.Tanh(), nn.Linear(WIDTH, CLASSES))
            self.model = self.model.to(dtype)
            self.decay = torch.randn(len(list(self.model.parameters())), dtype=dtype) - 2
        self.decay.requires_grad_()
        self.scale: Callable[[], float] = lambda: 1.0  # of losses over all data

    def penalty(self) -> Tensor:
        return sum((e.exp() * (w**2).sum() for e, w in zip(self.decay, self.model.parameters(), strict=True)), 0) / 2

    def inner(self, i: int) -> Tensor:
        return cross_entropy(self.model(self.x[i]), self.y[i]) + self.penalty()

    def outer(self, j: int) -> Tensor:
        return cross_entropy(self.model(self.v[j]), self.u[j])

    def tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), self.decay]

    def closures(self, step: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """(outer, inner) of the batches of a step."""
        i, j = batches(step)
        return lambda: self.outer(j), lambda: self.inner(i)


def batches(step: int) -> tuple[int, int]:
    return step * 3 % BATCHES, (step * 5 + 1) % BATCHES


def full(program: Program) -> Callable[[], Any]:
    def sums() -> Any:
        every = range(BATCHES)
        outers, inners = (program.outer(j) for j in every), (program.inner(i) for i in every)
        return ((loss * (program.scale() / BATCHES) for loss in losses) for losses in (outers, inners))

    return sums


LR = 0.1
# name: (maker of the tracker, whether losses must be closures, whether backward takes an index)
KINDS: dict[str, tuple[Callable[..., B.Tracker], bool, bool]] = {
    "SOBA": (lambda p, w, h, **o: B.SOBA(w, h, lr=LR, **o), False, False),
    "MA-SOBA": (lambda p, w, h, **o: B.SOBA(w, h, lr=LR, average=0.3, **o), False, False),
    "STORM": (lambda p, w, h, **o: B.SOBA(w, h, lr=LR, recursive=0.4, **o), True, False),
    "SABA": (lambda p, w, h, **o: B.SABA(w, h, lr=LR, batches=(BATCHES, BATCHES), **o), False, True),
    "SRBA": (lambda p, w, h, **o: B.SRBA(w, h, lr=LR, full=full(p), period=3, **o), True, False),
    "AmIGO": (lambda p, w, h, **o: B.AmIGO(w, h, lr=LR, steps=2, **o), False, False),
    "MRBO": (lambda p, w, h, **o: B.AmIGO(w, h, lr=LR, steps=2, warm=False, recursive=0.4, **o), True, False),
    "F2SA": (lambda p, w, h, **o: B.F2SA(w, h, lr=LR, **o), True, False),
    "F2SA-1": (lambda p, w, h, **o: B.F2SA(w, h, lr=LR, order=1, average=0.3, **o), True, False),
    "BOME": (lambda p, w, h, **o: B.BOME(w, h, lr=LR, steps=2, **o), True, False),
    "SAMA": (lambda p, w, h, **o: B.SAMA(w, h, lr=LR, **o), True, False),
}
FIRST_ORDER = ("F2SA", "F2SA-1", "BOME", "SAMA")
SECOND_ORDER = tuple(name for name in KINDS if name not in FIRST_ORDER)


def make(name: str, program: Program, params: Any = None, hparams: Any = None, **options: Any) -> B.Tracker:
    params = program.model.parameters() if params is None else params
    return KINDS[name][0](program, params, [program.decay] if hparams is None else hparams, **options)


def backward(name: str, tracker: B.Tracker, program: Program, step: int, scale: float = 1.0, **options: Any) -> Any:
    """Call tracker.backward on the batches of a step, with closures if the tracker needs them, else with values."""
    _, needs_closures, takes_index = KINDS[name]
    losses: list[Any] = [lambda loss=loss: loss() * scale for loss in program.closures(step)]
    if not needs_closures:
        losses = [loss() for loss in losses]
    extra = {"index": batches(step)} if takes_index else {}
    return tracker.backward(*losses, **extra, **options)


def optimizers(program: Program) -> list[torch.optim.Optimizer]:
    """SGD with momentum for params, and Adam for hparams."""
    inner = torch.optim.SGD(program.model.parameters(), lr=LR, momentum=0.9)
    return [inner, torch.optim.Adam([program.decay], lr=0.05)]


def train(name: str, tracker: B.Tracker, program: Program, steps: range, optims: Any = None, **options: Any) -> Tensor:
    """Run the user's loop over these steps, and return `numbers`."""
    optims = optimizers(program) if optims is None else optims
    for step in steps:
        backward(name, tracker, program, step, **options)
        for each in (*optims, tracker):
            each.step()
        for each in optims:
            each.zero_grad()
    return numbers(tracker, program)


def numbers(tracker: B.Tracker, program: Program) -> Tensor:
    """All variables that are trained, as one vector: params, hparams and the tracker's variables."""
    return torch.cat([x.detach().reshape(-1).clone() for x in (*program.tensors(), *tracker.variables)])
