"""The examples that differentiate through the optimiser: as a user runs them, and their gradients against others."""

import pytest
import torch
from torch import Generator
from torch.nn.functional import linear

from examples import learn_init
from test_examples import run_fast


def tiny(seeds=2, tasks=3):
    """A configuration, a start in float64, and points to fit and to test."""
    config = learn_init.Config(seeds=seeds, tasks=tasks, hidden=4, inner_lr=0.3)
    torch.manual_seed(0)
    theta = {k: w.double().requires_grad_() for k, w in learn_init.networks(seeds, config.hidden).items()}
    generator = Generator().manual_seed(1)
    task = learn_init.sinusoids(seeds * tasks, generator)
    return config, theta, *(
        learn_init.Points(*(part.double() for part in learn_init.draw(task, count, generator))) for count in (5, 7)
    )


def one_by_one(config, theta, support, query, steps, create_graph):
    """The tasks' own errors and weights after the steps: one network at a time, by torch.nn.functional."""

    def error(w, x, y):
        for i in range(3):
            x = linear(x.relu() if i else x, w[2 * i].mT, w[2 * i + 1].squeeze(0))
        return ((x - y) ** 2).mean()

    for n in range(config.seeds * config.tasks):
        w = [weight[n // config.tasks] for weight in theta.values()]
        for t in range(steps):
            points = support if not isinstance(support, list) else support[t]
            grads = torch.autograd.grad(error(w, points.x[n], points.y[n]), w, create_graph=create_graph)
            w = [a - config.inner_lr * b for a, b in zip(w, grads, strict=True)]
        yield w, error(w, query.x[n], query.y[n])


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_meta_gradient_is_that_of_one_network_at_a_time(steps, second_order):
    config, theta, support, query = tiny()
    result = learn_init.through_steps(theta, support, query, config, steps=steps, second_order=second_order)
    alone = list(one_by_one(config, theta, support, query, steps, create_graph=second_order))
    truth = torch.autograd.grad(sum(error for _, error in alone) / config.tasks, list(theta.values()))
    for grad, expected in zip(result.values(), truth, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)


def test_meta_gradient_by_differences():
    config, theta, support, query = tiny(seeds=1)
    grads = learn_init.through_steps(theta, support, query, config, steps=2, second_order=True)
    torch.manual_seed(2)
    direction = {k: torch.randn_like(w) for k, w in theta.items()}

    def objective(h):
        moved = {k: w.detach() + h * direction[k] for k, w in theta.items()}
        w = learn_init.adapt(learn_init.spread(moved, config.tasks), [support] * 2, config)[-1]
        return learn_init.errors(w, query).mean().item()

    slope = sum((grads[k] * direction[k]).sum().item() for k in theta)
    assert (objective(1e-5) - objective(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-7)


def test_reptile_is_the_mean_way_of_the_tasks():
    config, theta, support, query = tiny()
    result = learn_init.reptile(theta, support, query, config, steps=3)
    alone = list(one_by_one(config, theta, [support, query, support], query, 3, create_graph=False))
    for i, (name, start) in enumerate(theta.items()):
        for seed in range(config.seeds):
            ends = [w[i] for w, _ in alone[seed * config.tasks : (seed + 1) * config.tasks]]
            expected = (start[seed] - sum(ends) / config.tasks) / (3 * config.inner_lr)
            torch.testing.assert_close(result[name][seed], expected.detach(), rtol=1e-10, atol=1e-13)


def test_learn_init(tmp_path):
    results = run_fast("learn_init", "--seed", "2", output=tmp_path / "made")
    assert list(results) == ["10"] and list(results["10"]) == list(learn_init.METHODS)
    for method, result in results["10"].items():
        assert len(result["error"]) == 11 and result["error"][10] < result["error"][0], method
