"""Several outer losses in one reverse pass, against one pass for each loss and against the plain graph."""

import pytest
import torch

import hypergrad as hg

DOUBLE = {"dtype": torch.float64}
T = 11


def setting():
    torch.manual_seed(0)
    start = {
        "w": torch.randn(4, 3, **DOUBLE, requires_grad=True),
        "m": torch.zeros(4, 3, **DOUBLE),
        "count": torch.tensor(0),
    }
    hparams = {
        "lr": torch.tensor(0.3, **DOUBLE, requires_grad=True),
        "weights": torch.ones(6, **DOUBLE, requires_grad=True),
        "fixed": torch.tensor(0.8, **DOUBLE),
    }
    return start, hparams, [torch.randn(6, 4, **DOUBLE) for _ in range(T)]


def step(state, hparams, t, x):
    hidden = torch.nn.functional.dropout(torch.tanh(x @ state["w"]), 0.3)
    loss = hparams["weights"] @ (hidden**2).sum(1) / 6 + 0.01 * t * state["w"].sum()
    (g,) = torch.autograd.grad(loss, [state["w"]], create_graph=True)
    m = hparams["fixed"] * state["m"] + g
    return {"w": state["w"] - hparams["lr"] * m, "m": m, "count": state["count"] + 1}


def outer_losses(state, hparams):
    w = state["w"]
    return torch.stack([w.sum() + hparams["lr"] ** 2, (w**2).sum(), w[0].prod() * hparams["lr"]])


@pytest.mark.parametrize(
    "storage", [{"memory": "graph"}, {"memory": "iterates"}, {"memory": "sqrt"}, {"checkpoints": 2}, {"memory": "1MiB"}]
)
def test_rows_are_those_of_one_pass_each(storage):
    start, hparams, batches = setting()
    options = {"steps": T, "batches": batches, **storage}
    torch.manual_seed(1)
    result = hg.unroll.jacobian(step, start, hparams, outer_losses, **options)
    drawn = torch.get_rng_state()
    for j in range(3):
        torch.manual_seed(1)
        one = hg.unroll.reverse(step, start, hparams, lambda w, h, j=j: outer_losses(w, h)[j], **options)
        assert torch.equal(torch.get_rng_state(), drawn)
        for name in hparams:
            torch.testing.assert_close(result.grads[name][j], one.grads[name], rtol=1e-10, atol=1e-14)
        for name in start:
            torch.testing.assert_close(result.start_grads[name][j], one.start_grads[name], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(result.outer_value[j], one.outer_value, rtol=1e-12, atol=0)
    assert result.evaluations == one.evaluations


def test_no_steps_a_start_of_hparams_and_hooks():
    lam = torch.tensor([1.0, 2.0], **DOUBLE, requires_grad=True)
    lam.register_hook(lambda g: 10 * g)
    for steps in (0, 3):
        result = hg.unroll.jacobian(
            lambda w, lam: w / 2 + lam, lam**2, lam, lambda w, lam: torch.stack([w.sum(), w.prod(), w[1]]), steps
        )
        total = [x**2 / 2**steps + x * (2 - 2 ** (1 - steps)) for x in (1.0, 2.0)]
        slope = [2 * x / 2**steps + (2 - 2 ** (1 - steps)) for x in (1.0, 2.0)]
        expected = [slope, [slope[0] * total[1], total[0] * slope[1]], [0.0, slope[1]]]
        torch.testing.assert_close(result.grads, 10 * torch.tensor(expected, **DOUBLE), rtol=1e-12, atol=0)


def test_losses_that_are_not_a_vector():
    lam = torch.tensor(1.0, requires_grad=True)
    for bad in (lambda w, lam: w, lambda w, lam: torch.ones(2, 2) * w, lambda w, lam: torch.ones(0) * w):
        with pytest.raises(ValueError, match=r"outer_losses must give a tensor \[k\]"):
            hg.unroll.jacobian(lambda w, lam: w + lam, torch.zeros(()), lam, bad, 2)


def test_a_budget_counts_the_gradients_of_each():
    start, hparams, batches = setting()

    def many(w, h):
        return w["w"].sum() * torch.ones(1000, **DOUBLE) * h["lr"]

    with pytest.raises(ValueError, match="too small"):
        hg.unroll.jacobian(step, start, hparams, many, T, batches=batches, memory="100KiB")
    hg.unroll.reverse(step, start, hparams, lambda w, h: many(w, h)[0], T, batches=batches, memory="100KiB")
