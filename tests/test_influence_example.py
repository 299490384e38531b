"""The example on attribution: what is planted, the training that is retrained, texts, and the whole at small sizes."""

from dataclasses import replace

import pytest
import torch

from examples import influence as example

SMALL = example.Config(
    train=60, queries=3, validation=20, hidden=5, steps=(4,), batch=20, subsets=4, drop=0.1, copies=2, seeds=1,
    solver_steps=5, words=40, documents=80,
)  # fmt: skip


def test_what_is_planted():
    config = replace(SMALL, wrong=0.1)
    data = example.digits(config, 3)
    assert int(data.wrong.sum()) == 6 and [len(copies) for copies in data.copies] == [2, 2, 2]
    for q, copies in enumerate(data.copies):
        assert not data.wrong[copies].any() and (data.y[copies] == data.yq[q]).all()
        assert all(torch.equal(data.x[i], data.xq[q]) for i in copies)
    assert not torch.equal(example.digits(config, 4).xq, data.xq)
    with pytest.raises(SystemExit, match="fewer than"):
        example.digits(replace(config, train=1790), 0)


def test_the_step_is_that_of_torch_optim():
    """With some weights zero, as in retraining."""
    data = example.digits(SMALL, 0)
    training = example.Training(SMALL, data, 0)
    weights = (torch.arange(60) % 4 != 0).float()
    found = training.run(weights, 4)
    training.net.load_state_dict(training.start)
    optimizer = torch.optim.SGD(training.net.parameters(), lr=SMALL.lr)
    for t in range(4):
        rows = training.rows[t]
        losses = torch.nn.functional.cross_entropy(training.net(data.x[rows]), data.y[rows], reduction="none")
        optimizer.zero_grad()
        (weights[rows] * losses).mean().backward()
        optimizer.step()
    for name, x in training.net.named_parameters():
        torch.testing.assert_close(found[name], x.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::hypergrad.HypergradientWarning")
def test_scores_and_what_they_find():
    training = example.Training(SMALL, example.digits(SMALL, 0), 0)
    numbers, chosen = example.evaluated(training, 4, lambda: None)
    assert {"unrolled", "Gauss–Newton", "Hessian", "gradients"} <= numbers.keys()
    w = training.run(torch.ones(60), 4)
    slopes = []
    for x, y in ((training.data.xq, training.data.yq), (training.data.x, training.data.y)):
        one = lambda w, x, y: training.loss(w, (x[None], y[None]))[0]  # noqa: E731
        grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(w, x, y)
        slopes.append(torch.cat([g.flatten(1) for g in grads.values()], 1))
    torch.testing.assert_close(chosen["gradients"].scores, -slopes[0] @ slopes[1].mT / 60, rtol=1e-4, atol=1e-6)
    found = example.planted(training, w, chosen)
    assert 0 <= found["wrong labels"]["harm"] <= 1 and found["copies"]["unrolled"]["ten"] > 0.5


@pytest.mark.slow
def test_texts():
    found = example.texts(SMALL)
    assert found["leave-one-out"]["correlation"] > 0.9 and found["residual"] < 1e-5
    assert all(0.5 < value <= 1 for value in found["AUC"].values())
    assert len(found["shown"]) == 3 and all(len(each["helpful"]) == 2 for each in found["shown"])


def test_table_and_figure():
    data = example.digits(SMALL, 0)
    result = example.influence.Influence(torch.randn(3, 60), torch.ones(3), "random")
    assert len(example.figure(data, result).axes) == 3 * 5
    row = {"LDS": 0.5, "damping": 0.1, "residual": 0.02, "seconds": 1.0}
    runs = [
        {
            "steps": 4,
            "methods": dict.fromkeys(example.METHODS, row),
            "copies": {name: {"first": 0.5, "ten": 1.0} for name in example.METHODS},
            "wrong labels": {"loss": 0.9, "harm": 0.8},
        }
    ]
    texts = {"name": "texts", "AUC": {"loss": 0.9}, "leave-one-out": {"correlation": 0.99, "relative error": 0.1}}
    text = example.table(SMALL, "digits", {"runs": runs, "texts": texts | {"shown": []}, "seconds": 60})
    assert "| unrolled | 4 | 0.500 |" in text and "0.900 by the loss" in text
