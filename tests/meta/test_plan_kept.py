"""The plan of a call (chunk sizes, vmap or a loop) is reused by the next call with the same losses and shapes."""

import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

import hypergrad as hg


def meta(width: int, tasks: int = 3) -> Any:
    """A meta-gradient whose losses hold `width` further numbers in the graph."""
    features = torch.ones(width, 2, dtype=torch.float64)

    def loss(w: Tensor, start: Tensor, task: Tensor) -> Tensor:
        return ((features @ w).tanh() - task.mean()).square().mean()

    start = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    data = torch.arange(2.0 * tasks, dtype=torch.float64).reshape(tasks, 2)
    for _ in range(2):
        result = hg.meta.grad(loss, loss, start, data, method=hg.meta.Unrolled(), steps=2)
    return result


def test_a_second_call_evaluates_each_loss_no_more_than_it_needs() -> None:
    once, calls, method = [], [], hg.meta.Unrolled()
    features = torch.ones(5, 2, dtype=torch.float64)

    def loss(w: Tensor, start: Tensor, task: Tensor) -> Tensor:
        calls.append(1)
        return ((features @ w).tanh() - task.mean()).square().mean()

    start = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        result = hg.meta.grad(loss, loss, start, torch.ones(3, 2, dtype=torch.float64), method=method, steps=2)
        once.append(len(calls))
        calls.clear()
    assert once[1] == once[2] == once[0] - 2  # one more evaluation of each loss, which measured memory
    assert result.plan.chunk == 3


class Learner:
    """Losses that are methods."""

    def __init__(self, width: int) -> None:
        self.features, self.calls = torch.ones(width, 2, dtype=torch.float64), 0

    def loss(self, w: Tensor, start: Tensor, task: Tensor) -> Tensor:
        self.calls += 1
        return ((self.features @ w).tanh() - task.mean()).square().mean()


def test_methods_of_one_object_share_a_plan_and_those_of_another_object_do_not() -> None:
    start, method = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True), hg.meta.Unrolled()
    sizes = []
    for width in (4, 400):
        learner, once = Learner(width), []
        for _ in range(3):
            learner.calls = 0
            tasks = torch.ones(3, 2, dtype=torch.float64)
            result = hg.meta.grad(learner.loss, learner.loss, start, tasks, method=method, steps=2)
            once.append(learner.calls)
        assert once[1] == once[2] == once[0] - 2
        sizes.append(result.plan.task_bytes)
    assert sizes[0] < sizes[1]


def test_other_losses_and_other_shapes_have_plans_of_their_own() -> None:
    sizes = [meta(width).plan.task_bytes for width in (4, 400, 40)]
    assert sizes[1] > sizes[2] > sizes[0]
    assert [meta(4, tasks).plan.chunk for tasks in (2, 5)] == [2, 5]


PROGRAM = """
import torch, torch.nn.functional as F, hypergrad as hg
def loss(w, start, task): return F.cross_entropy(task @ w, torch.tensor([0, 1]))
start = torch.zeros(3, 2, requires_grad=True)
hg.meta.grad(loss, loss, start, torch.ones(4, 2, 3), method=hg.meta.Unrolled(), steps=2)
"""


def test_the_first_call_of_a_process_maps_cross_entropy_without_a_loop() -> None:
    """torch warns of the loop ("performance drop") where its decompositions are not loaded."""
    done = subprocess.run([sys.executable, "-W", "always", "-c", PROGRAM], capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "performance drop" not in done.stderr, done.stderr
