"""The example on noisy labels: what its params see, and one-step unrolling against a derivative by autograd."""

from dataclasses import replace

import pytest
import torch

from examples import noisy_labels as noisy

SMALL = noisy.Config(train=60, validation=40, steps=6, warm_up=2, batch=20, seeds=1)


@pytest.mark.parametrize("kind", noisy.KINDS)
@pytest.mark.parametrize("method", noisy.METHODS)
def test_params_see_training_data_alone(method, kind):
    """While the weights stay as they were, params move as in a training that has no validation data."""
    config = replace(SMALL, warm_up=SMALL.steps)
    data = noisy.split(config, 0)
    model, weights, took = noisy.learned(data, config, 0, kind, method)
    torch.manual_seed(0)
    noisy.network(data.x.shape[-1])  # the draws before those of the weights
    expected = noisy.trained(data, config, 0, noisy.KINDS[kind](60))
    for w, x in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(w, x, rtol=1e-4, atol=1e-6)
    assert took["MiB"] > 0 and all(w.grad is not None for w in weights.parameters())


@pytest.mark.parametrize("kind", noisy.KINDS)
def test_one_step_by_autograd(kind):
    data = noisy.split(SMALL, 0)
    data = data._replace(x=data.x.double(), xv=data.xv.double())
    model, weights = noisy.network(8).double(), noisy.KINDS[kind](60).double()
    levels = noisy.Levels(data, model, weights, 0.1)
    train, valid = torch.arange(10), torch.arange(5)
    noisy.OneStep(levels, 0.3).backward(valid, train)

    params = dict(model.named_parameters())
    grads = torch.autograd.grad(levels.inner_loss(train), list(params.values()), create_graph=True)
    moved = {name: w - 0.3 * g for (name, w), g in zip(params.items(), grads, strict=True)}
    expected = torch.autograd.grad(levels.outer_loss(valid, moved), list(weights.parameters()))
    for h, g in zip(weights.parameters(), expected, strict=True):
        torch.testing.assert_close(h.grad, g, rtol=1e-10, atol=1e-14)
    for w, g in zip(params.values(), grads, strict=True):
        torch.testing.assert_close(w.grad, g.detach(), rtol=1e-10, atol=1e-12)


def test_split():
    data = noisy.split(noisy.Config(train=1000, validation=500), 1)
    assert [len(y) for y in (data.y, data.yv, data.yt)] == [1000, 500, 297] and data.x.shape[1:] == (1, 8, 8)
    assert data.wrong.sum() == 400
    images = {tuple(x.flatten().tolist()) for part in (data.x, data.xv, data.xt) for x in part}
    assert len(images) == 1797
    with pytest.raises(SystemExit, match="leave none for the test"):
        noisy.split(noisy.Config(train=1000, validation=797), 0)
