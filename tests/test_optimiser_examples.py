"""The examples that differentiate through the optimiser: as a user runs them, and their gradients against others."""

import pytest
import torch
from torch import Generator
from torch.nn.functional import cross_entropy, linear, nll_loss

from examples import datasets, learn_init, learn_schedule
from test_examples import run_fast


def tiny(seeds=2, tasks=3):
    """A configuration, a start in float64, and points to fit and to test."""
    config = learn_init.Config(seeds=seeds, tasks=tasks, hidden=4, inner_lr=0.3)
    torch.manual_seed(0)
    theta = {k: w.double().requires_grad_() for k, w in learn_init.networks(seeds, config.hidden).items()}
    generator = Generator().manual_seed(1)
    task = learn_init.sinusoids(seeds * tasks, generator)
    return (
        config,
        theta,
        *(learn_init.Points(*(part.double() for part in learn_init.draw(task, count, generator))) for count in (5, 7)),
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


@pytest.mark.slow
def test_learn_init(tmp_path):
    results = run_fast("learn_init", "--seed", "2", output=tmp_path / "made")
    assert list(results) == ["10"] and list(results["10"]) == list(learn_init.METHODS)
    for method, result in results["10"].items():
        assert len(result["error"]) == 11 and result["error"][10] < result["error"][0], method


def small_split(config):
    """Images of 6 pixels, a run and a schedule that changes at every step, in float64."""
    torch.manual_seed(0)
    sizes = {"train": 40, "validation": 15, "test": 15}
    parts = {k: datasets.Images(k, torch.randn(n, 6).double(), torch.randint(0, 10, (n,))) for k, n in sizes.items()}
    data = learn_schedule.Split(**parts)
    run = learn_schedule.new_run(data.train, config, seed=1)
    run = run._replace(start={name: weight.double() for name, weight in run.start.items()})
    curves = torch.stack([torch.randn(config.steps) - 1, torch.randn(config.steps)]).double()
    return data, run, curves.requires_grad_()


TINY = learn_schedule.Config(steps=12, batch=5, hidden=4)


@pytest.mark.parametrize("memory", ["100KB", "1MB"])  # a few checkpoints, and all
def test_hypergradient_of_the_schedule_is_that_of_the_plain_graph(memory):
    data, run, curves = small_split(TINY)
    result = learn_schedule.hypergradient(curves, run, data, memory)

    w = [weight.clone().requires_grad_() for weight in run.start.values()]
    v = [torch.zeros_like(weight) for weight in w]
    for t, rows in enumerate(run.rows):
        hidden = torch.tanh(linear(data.train.x[rows], w[0].T, w[1]))
        inner = nll_loss(linear(hidden, w[2].T, w[3]).log_softmax(1), data.train.y[rows])
        momentum = 1 / (1 + torch.exp(-curves[1, t]))
        lr = torch.exp(curves[0, t]) * (1 - momentum)
        grads = torch.autograd.grad(inner, w, create_graph=True)
        v = [momentum * a + g for a, g in zip(v, grads, strict=True)]
        w = [a - lr * b for a, b in zip(w, v, strict=True)]
    outer = cross_entropy(linear(torch.tanh(linear(data.validation.x, w[0].T, w[1])), w[2].T, w[3]), data.validation.y)
    torch.testing.assert_close(result.outer_value, outer.detach(), rtol=1e-12, atol=0)
    (truth,) = torch.autograd.grad(outer, curves)
    torch.testing.assert_close(result.grads, truth, rtol=1e-10, atol=1e-13)
    assert (result.evaluations > TINY.steps + 2) == (memory == "100KB")


def test_hypergradient_of_the_schedule_by_differences_of_torch_sgd():
    """The training that results are reported of is torch.optim.SGD's own."""
    data, run, curves = small_split(TINY)
    grads = learn_schedule.hypergradient(curves, run, data, "1MB").grads
    direction = torch.randn_like(curves)

    def objective(h):
        w = learn_schedule.train(learn_schedule.schedule_of(curves.detach() + h * direction), run, data.train)
        return learn_schedule.loss(w, data.validation).item()

    slope = (grads * direction).sum().item()
    assert (objective(1e-5) - objective(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-7)


def test_schedules():
    flat, half = learn_schedule.constant(0.3, 0.8, 50), learn_schedule.cosine(0.3, 0.8, 50)
    assert half["lr"][0] == flat["lr"][0] and half["lr"][25] == pytest.approx(0.15) and 0 < half["lr"][49] < 1e-3
    again = learn_schedule.schedule_of(learn_schedule.variables(half))
    for name in half:
        torch.testing.assert_close(again[name], half[name], rtol=1e-5, atol=0)
    z = torch.randn(2, 50, dtype=torch.float64)
    smooth = learn_schedule.smoothed(z, 4)
    torch.testing.assert_close(learn_schedule.smoothed(torch.full_like(z, 1.5), 4), torch.full_like(z, 1.5))
    window = torch.exp(-((torch.arange(50) - 25.0).double() ** 2) / 32) * ((torch.arange(50) - 25).abs() <= 12)
    torch.testing.assert_close(smooth[:, 25], (z * window).sum(1) / window.sum())


def test_every_row_comes_once_an_epoch():
    _, run, _ = small_split(learn_schedule.Config(steps=16, batch=5, hidden=4))
    assert sorted(run.rows[:8].flatten().tolist()) == sorted(run.rows[8:].flatten().tolist()) == list(range(40))
    assert not torch.equal(run.rows[:8], run.rows[8:])


@pytest.mark.slow
def test_learn_schedule(tmp_path):
    results = run_fast("learn_schedule", "--seed", "2", output=tmp_path / "made")
    assert list(results) == ["constant", "cosine", "learned"]
    learned, best = results["learned"], min(value for *_, value in results["constant"]["grid"])
    assert len(learned["lr"]) == len(learned["momentum"]) == 60 and len(learned["loss"]) == 4
    assert learned["loss"][2] < learned["loss"][0] and learned["loss"][3] < learned["loss"][1]
    tuned = [score["validation"] for score in results["constant"]["tuning runs"]]
    assert sum(tuned) / 2 == pytest.approx(best, rel=1e-5)
    assert 0 < learned["peak"] <= 1
