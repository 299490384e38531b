"""Evaluation of scores: rank correlations against SciPy, retraining on subsets, and leave-one-out retraining."""

import numpy as np
import pytest
import scipy.stats
import torch

import hypergrad as hg
from hypergrad import influence, solvers
from influence_cases import N, Q, data, fitted, losses, problem


def train(weights):
    return torch.tensor(losses(fitted(weights.double().numpy()), *data()[2:]))


@pytest.fixture(scope="module")
def result():
    return influence.scores(**problem(solver=solvers.BlockCG(rtol=1e-12)))


def test_lds(result):
    truth = influence.retrained(train, N, subsets=30, drop=0.1, seed=1)
    assert truth.weights.shape == (30, N) and (truth.weights.sum(1) == N - 2).all() and truth.losses.shape == (30, Q)
    lds = truth.lds(result)
    for q in range(Q):
        predicted = (truth.weights - 1).double().numpy() @ result.scores[q].numpy()
        expected = scipy.stats.spearmanr(predicted, truth.losses[:, q].numpy()).statistic
        np.testing.assert_allclose(float(lds[q]), expected, rtol=1e-12)
    assert float(lds.mean()) > 0.9 and float(truth.error(result).max()) < 0.5
    other = influence.retrained(train, N, subsets=3, drop=0.1, seed=2)
    assert not torch.equal(other.weights, truth.weights[:3])
    path = influence.scores(**problem(damping=[0.1, 0.2]))
    assert truth.lds(path).shape == (2, Q)


def test_ties_share_their_rank():
    a, b = torch.tensor([1.0, 2.0, 2.0, 5.0, 0.0]), torch.tensor([3.0, 3.0, 1.0, 9.0, -1.0])
    truth = influence.Retrained(torch.eye(5), b[:, None], torch.zeros(1))
    made = influence.Influence(a[None], torch.zeros(1), "by hand")
    np.testing.assert_allclose(float(truth.lds(made)), scipy.stats.spearmanr(a, b).statistic, rtol=1e-6)


def test_leave_one_out(result):
    truth = influence.retrained(train, N, leave_out=[3, 0])
    assert truth.weights[0, 3] == 0 and truth.weights[1, 0] == 0 and truth.weights.sum() == 2 * N - 2
    expected = np.stack([losses(fitted(1 - np.eye(N)[i]), *data()[2:]) for i in (3, 0)])
    np.testing.assert_allclose(truth.losses.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(truth.predicted(result)[0], -result.scores[:, 3])
    assert float(truth.error(result).max()) < 0.5
    flipped = influence.Influence(-result.scores, result.query_losses, "flipped")
    assert float(truth.error(flipped).min()) > 1


def test_what_is_refused(result):
    for options, message in (
        ({"drop": 0.0}, "lacks 0 of 23"),
        ({"drop": 1.0}, "lacks 23 of 23"),
        ({"subsets": 0}, "0 subsets"),
        ({"leave_out": [N]}, "leave_out must hold indices"),
    ):
        with pytest.raises(ValueError, match=message):
            influence.retrained(train, N, **options)
    with pytest.raises(ValueError, match="finite losses"):
        influence.retrained(lambda weights: train(weights).mean(), N)
    with pytest.raises(ValueError, match="finite losses"):
        influence.retrained(lambda weights: train(weights) * torch.nan, N)
    truth = influence.retrained(train, N, leave_out=[0])
    with pytest.raises(ValueError, match="scores must be"):
        truth.lds(influence.Influence(result.scores[:, :5], result.query_losses, "short"))


def test_noisy_trainings_are_named():
    with pytest.warns(hg.HypergradientWarning, match="gave other losses when it was repeated"):
        influence.retrained(lambda weights: torch.rand(2), N, leave_out=[0])


def test_metasmoothness():
    """Definition 2 of the paper by hand; and the logistic map, which is smooth at r = 2.5 and chaotic at r = 3.9."""

    def f(lam):
        return {"a": lam[0] ** 2, "b": torch.stack([lam[1], -lam[0]]).cos()}

    lam, v, h = torch.tensor([0.5, 1.0]).double(), torch.tensor([1.0, -2.0]).double(), 0.7
    points = [torch.cat([f(lam + k * h * v)["a"][None], f(lam + k * h * v)["b"]]).numpy() for k in range(3)]
    first, second = points[1] - points[0], points[2] - points[1]
    expected = (np.sign(first) * np.abs(first) / np.abs(first).sum() * np.sign(second)).sum()
    np.testing.assert_allclose(influence.metasmoothness(f, lam, v, h), expected, rtol=1e-12)

    def logistic_map(r):
        x = torch.linspace(0.1, 0.9, 200, dtype=torch.float64)
        for _ in range(50):
            x = r * x * (1 - x)
        return x

    calm, chaotic, one = (torch.tensor(r, dtype=torch.float64) for r in (2.5, 3.9, 1.0))
    assert influence.metasmoothness(logistic_map, calm, one, 1e-2) > 0.99
    assert influence.metasmoothness(logistic_map, chaotic, one, 1e-2) < 0.5
    with pytest.raises(ValueError, match="are they used"):
        influence.metasmoothness(lambda lam: torch.ones(3), calm, one, 0.1)


def test_top(result):
    values, indices = result.top(3)
    order = result.scores[0].argsort()
    assert torch.equal(indices[0], order[:3]) and torch.equal(values[0], result.scores[0][order[:3]])
    assert torch.equal(result.top(2, harmful=True)[1][0], order.flip(0)[:2])
    assert result.top(1000)[1].shape == (Q, N)
