"""Influence scores against finite differences of retraining and dense solves in NumPy."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import hypergrad as hg
from benchmarks.measure import peak_memory
from hypergrad import influence, solvers
from influence_cases import N, Q, batches, data, dense, loss, problem, queries, retraining, solution, tensors

F64 = torch.float64
SOLVERS = {
    "default": None,
    "BlockCG": solvers.BlockCG(rtol=1e-12),
    "CG": solvers.CG(rtol=1e-12),
    "MINRES": solvers.MINRES(rtol=1e-12),
    "GMRES": solvers.GMRES(rtol=1e-12),
    "Dense": solvers.Dense(),
    "Nystrom": solvers.CG(rtol=1e-12, preconditioner=solvers.Nystrom(rank=5, damping=0.1)),
    "an exact preconditioner": solvers.CG(rtol=1e-12, preconditioner=solvers.Dense()),
    "a function": solvers.CG(rtol=1e-12, preconditioner=lambda v: {name: x * 2 for name, x in v.items()}),
}


@pytest.mark.parametrize("curvature", ["Hessian", "Gauss-Newton"])
@pytest.mark.parametrize("name", SOLVERS)
def test_scores_are_derivatives_of_retraining(name, curvature):
    result = influence.scores(**problem(curvature, solver=SOLVERS[name]))
    np.testing.assert_allclose(result.scores.numpy(), retraining(), rtol=0, atol=1e-6 * abs(retraining()).max())
    if name != "default":
        np.testing.assert_allclose(result.scores.numpy(), dense(), rtol=0, atol=1e-10)
        assert float(result.residual.max()) < 1e-11
    assert result.residual.shape == (Q,) and result.damping == 0 and float(result.inner_residual) < 1e-14
    x, y = queries(Q)[0]
    torch.testing.assert_close(result.query_losses, loss(solution(), (x, y)))


@pytest.mark.parametrize("curvature", ["Hessian", "Gauss-Newton"])
def test_several_dampings(curvature):
    dampings = [0.0, 0.01, 0.3]
    result = influence.scores(**problem(curvature, solver=solvers.CG(rtol=1e-12), damping=dampings))
    assert result.scores.shape == (3, Q, N) and result.residual.shape == (3, Q) and result.method == "shifted"
    for i, damping in enumerate(dampings):
        np.testing.assert_allclose(result.scores[i].numpy(), dense(damping), rtol=0, atol=1e-10)
        one = influence.scores(**problem(curvature, solver=solvers.CG(rtol=1e-12), damping=damping))
        torch.testing.assert_close(result.at(i).scores, one.scores, rtol=0, atol=1e-10)
        assert result.at(i).damping == damping and float(result.residual[i].max()) < 1e-11
    with pytest.raises(ValueError, match="one or none"):
        one.at(0)


def test_damping_of_the_solver_is_added():
    solver = solvers.CG(rtol=1e-12, damping=0.2, preconditioner=solvers.Dense())
    result = influence.scores(**problem(solver=solver, damping=0.1))
    np.testing.assert_allclose(result.scores.numpy(), dense(0.3), rtol=0, atol=1e-10)
    assert float(result.damping) == pytest.approx(0.3)


def test_a_path_of_dampings():
    result = influence.scores(**problem(damping="path"))
    dampings = result.damping
    assert len(dampings) == 9 and torch.allclose(dampings[1:] / dampings[:-1], torch.tensor(10**0.5).double())
    for i, damping in enumerate(dampings):
        np.testing.assert_allclose(result.scores[i].numpy(), dense(float(damping)), rtol=0, atol=1e-6)
    lines = result.report().splitlines()
    assert len(lines) == 10 and "rank correlation with the next 1.000" in lines[1] and "products" in lines[0]


def test_damping_that_is_too_small_is_named():
    """The params maximise the mean loss, so the Hessian is negative definite."""
    case = {"train": [torch.tensor([1.0, 3.0])], "queries": [torch.ones(1)]}
    bowl = lambda w, x: -((x - w) ** 2) / 2  # noqa: E731
    with pytest.warns(hg.HypergradientWarning, match=r"damping 0.5 \(of 2 dampings 1 failed\)"):
        result = influence.scores(bowl, lambda w, x: w * x, torch.tensor(2.0), damping=[0.5, 3.0], **case)
    torch.testing.assert_close(result.scores[1], torch.tensor([[0.25, -0.25]]))


def network():
    """An MLP away from its minimum, with per-example losses and dense Hessian and Gauss–Newton matrices."""
    torch.manual_seed(0)
    w = {"a": torch.randn(4, 3, dtype=F64), "b": torch.randn(3, 3, dtype=F64)}
    x, y, xq, yq = tensors()

    def model(w, batch):
        return torch.tanh(batch[0] @ w["a"]) @ w["b"]

    def of_outputs(z, batch):
        return torch.nn.functional.cross_entropy(z, batch[1], reduction="none")

    def flat(function):
        return lambda v: function({"a": v[:12].reshape(4, 3), "b": v[12:].reshape(3, 3)})

    v = torch.cat([w["a"].flatten(), w["b"].flatten()])
    on = lambda w: model(w, (x, y))  # noqa: E731
    hessian = torch.autograd.functional.hessian(flat(lambda w: of_outputs(on(w), (x, y)).mean()), v)
    j = torch.autograd.functional.jacobian(flat(on), v)
    p = on(w).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    gauss = torch.einsum("icp,ice,ieq->pq", j, inner, j) / N
    gi = torch.autograd.functional.jacobian(flat(lambda w: of_outputs(on(w), (x, y))), v)
    gq = torch.autograd.functional.jacobian(flat(lambda w: of_outputs(model(w, (xq, yq)), (xq, yq))), v)
    return w, model, of_outputs, {"Hessian": hessian, "Gauss-Newton": gauss}, gi, gq


@pytest.mark.filterwarnings("ignore:the inner problem is not solved")
@pytest.mark.parametrize("curvature", ["Hessian", "Gauss-Newton"])
def test_curvature_of_a_network(curvature):
    w, model, of_outputs, matrices, gi, gq = network()
    a = matrices[curvature] + 0.2 * torch.eye(21, dtype=F64)
    expected = -gq @ torch.linalg.inv(a) @ gi.mT / N
    case = problem(params=w, penalty=None, solver=solvers.GMRES(rtol=1e-12), damping=0.2)
    case["query_loss"] = lambda w, batch: of_outputs(model(w, batch), batch)
    case["train_loss"] = case["query_loss"]
    if curvature == "Gauss-Newton":
        case |= {"train_loss": of_outputs, "model": model}
    torch.testing.assert_close(influence.scores(**case).scores, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(matrices["Hessian"], matrices["Gauss-Newton"], atol=1e-3)


@pytest.mark.parametrize("form", ["one", "loader", "function"])
def test_forms_of_batches(form):
    x, y, _, _ = tensors()
    train = {
        "one": [(x, y)],
        "loader": DataLoader(TensorDataset(x, y), batch_size=5),
        "function": lambda: iter(batches(4)),
    }[form]
    case = problem(train=train, queries=lambda: iter(queries(2)), solver=solvers.BlockCG(rtol=1e-12))
    np.testing.assert_allclose(influence.scores(**case).scores.numpy(), dense(), rtol=0, atol=1e-10)


def test_shuffled_batches_with_numbers():
    x, y, _, _ = tensors()
    loader = DataLoader(TensorDataset(x, y, torch.arange(N)), batch_size=5, shuffle=True)
    case = problem(train=loader, index=lambda batch: batch[2], solver=solvers.BlockCG(rtol=1e-12))
    np.testing.assert_allclose(influence.scores(**case).scores.numpy(), dense(), rtol=0, atol=1e-10)
    own = influence.self_influence(loss, solution(), train=loader, penalty=case["penalty"], index=case["index"])
    straight = influence.self_influence(loss, solution(), train=batches(), penalty=case["penalty"])
    torch.testing.assert_close(own.scores, straight.scores, rtol=1e-5, atol=0)
    torch.testing.assert_close(own.query_losses, straight.query_losses)
    with pytest.raises(ValueError, match="train shuffles"):
        influence.scores(**problem(train=loader))
    with pytest.raises(ValueError, match="has 5 indices"):
        influence.scores(**problem(train=loader, index=lambda batch: batch[2] + N))


def test_groups():
    groups = torch.arange(N) % 4
    result = influence.scores(**problem(groups=groups, solver=solvers.BlockCG(rtol=1e-12)))
    expected = np.stack([dense()[:, data()[0][:, 0] * 0 + np.arange(N) % 4 == g].sum(1) for g in range(4)], 1)
    np.testing.assert_allclose(result.scores.numpy(), expected, rtol=0, atol=1e-10)
    for bad in (groups[:3], groups - 1, groups.double()):
        with pytest.raises(ValueError, match="groups must hold an integer"):
            influence.scores(**problem(groups=bad))


@pytest.mark.parametrize("damping", [0.1, [0.1, 0.5]])
def test_self_influence(damping):
    case = problem()
    del case["query_loss"], case["queries"]
    result = influence.self_influence(**case, solver=solvers.CG(rtol=1e-12), damping=damping)
    x, y, _, _ = tensors()
    every = influence.scores(**problem(queries=[(x, y)], solver=solvers.CG(rtol=1e-12), damping=damping))
    torch.testing.assert_close(result.scores, every.scores.diagonal(0, -2, -1), rtol=1e-9, atol=1e-12)
    assert (result.scores < 0).all() and result.residual.shape == result.scores.shape


def test_frozen_leaves_count_as_constants():
    params = solution()
    params["rows"].requires_grad_()
    result = influence.scores(**problem(params=params, solver=solvers.BlockCG(rtol=1e-12)))
    case = problem(params={"rows": params["rows"].detach()}, solver=solvers.BlockCG(rtol=1e-12))
    whole = lambda w: w | {"last": params["last"]}  # noqa: E731
    for name in ("train_loss", "query_loss", "penalty"):
        case[name] = lambda w, *batch, function=case[name]: function(whole(w), *batch)
    torch.testing.assert_close(result.scores, influence.scores(**case).scores, rtol=1e-10, atol=1e-12)
    assert params["rows"].grad is None


class Inverse:
    """A matrix on lists of tensors in params' order, as curvlinops has them."""

    def __init__(self, a):
        self.a = a

    def __matmul__(self, tensors):
        flat = self.a @ torch.cat([x.flatten() for x in tensors])
        return [
            part.reshape(x.shape) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)
        ]


def test_approximate_inverses():
    """The keys of params are not in sorted order, and the inverse must follow the order of params."""
    from influence_cases import curvature, fitted

    a = torch.tensor(curvature(fitted(np.ones(N)), np.ones(N)))
    exact, off = Inverse(torch.linalg.inv(a)), Inverse(torch.linalg.inv(a) + 3 * torch.eye(len(a), dtype=F64))
    result = influence.scores(**problem(solver=exact))
    np.testing.assert_allclose(result.scores.numpy(), dense(), rtol=0, atol=1e-10)
    assert result.method == "Inverse" and float(result.residual.max()) < 1e-12
    with pytest.warns(hg.HypergradientWarning, match="Inverse is not near the inverse of A"):
        wrong = influence.scores(**problem(solver=off))
    from influence_cases import gradients

    slopes = torch.tensor(gradients(fitted(np.ones(N)), *data()[2:]))
    residual = (slopes @ off.a.mT @ a - slopes).norm(dim=1) / slopes.norm(dim=1)
    torch.testing.assert_close(wrong.residual, residual, rtol=1e-10, atol=0)
    assert "%" in wrong.report()
    preconditioned = influence.scores(**problem(solver=solvers.CG(rtol=1e-12, preconditioner=off)))
    np.testing.assert_allclose(preconditioned.scores.numpy(), dense(), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:the inner problem is not solved")
def test_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model = torch.nn.Linear(4, 3, bias=False).double()
    x, y, _, _ = tensors()
    model.weight.data = torch.cat([solution()["rows"], solution()["last"]]).T.contiguous()
    params = list(model.parameters())
    kfac = curvlinops.KFACLinearOperator(
        model, torch.nn.CrossEntropyLoss(), params, [(x, y)], separate_weight_and_bias=False, fisher_type="type-2"
    )
    case = {
        "params": [w.detach() for w in params],
        "train_loss": lambda z, batch: torch.nn.functional.cross_entropy(z, batch[1], reduction="none"),
        "query_loss": lambda w, batch: loss({"rows": w[0].T[:3], "last": w[0].T[3:]}, batch),
        "model": lambda w, batch: batch[0] @ w[0].T,
        "penalty": None,
        "damping": 0.1,
    }
    inverse = curvlinops.KFACInverseLinearOperator(kfac, damping=0.1, use_exact_damping=True)
    with pytest.warns(hg.HypergradientWarning):
        approximate = influence.scores(**problem(**case, solver=inverse))
    assert float(approximate.residual.min()) > 0.01
    exact = influence.scores(**problem(**case, solver=solvers.CG(rtol=1e-12, preconditioner=inverse)))
    np.testing.assert_allclose(exact.scores.numpy(), dense(0.1 - 0.1), rtol=0, atol=1e-10)


def test_memory_does_not_grow_with_the_examples():
    """Batches are generated lazily, and the scores of groups have a fixed size."""

    def peak(count):
        x, y, _, _ = tensors()
        train = lambda: ((x[:10], y[:10]) for _ in range(count))  # noqa: E731
        groups = torch.arange(10 * count) % 3
        case = problem(train=train, groups=groups, solver=solvers.CG(max_steps=2, on_failure="ignore"))
        return peak_memory(lambda: influence.scores(**case)) - 10 * count  # a byte per example says if it was seen

    few, many = peak(4), peak(60)
    assert many < 1.3 * few, (few, many)


def test_losses_that_change_are_found():
    drop = lambda w, batch: torch.nn.functional.dropout(loss(w, batch), 0.5)  # noqa: E731
    with pytest.raises(ValueError, match="gave other losses in one pass"):
        influence.scores(**problem(train_loss=drop, solver=solvers.CG(max_steps=1, on_failure="ignore")))
    orders = iter([batches(), *[batches()] * 20])
    first = []

    def other_order():
        first.append(0)
        order = next(orders)
        return iter(order if len(first) < 7 else order[::-1])

    with pytest.raises(ValueError, match="gave other losses in one pass"):
        influence.scores(**problem(train=other_order, solver=solvers.CG(max_steps=1, on_failure="ignore")))


def test_what_is_refused():
    for bad, message in (
        ({"train_loss": lambda w, batch: loss(w, batch).mean()}, "train_loss must give a tensor"),
        ({"query_loss": lambda w, batch: loss(w, batch).sum()}, "query_loss must give a tensor"),
        ({"train": []}, "train gave no example"),
        ({"queries": []}, "queries gave no batch"),
        ({"damping": "auto"}, 'damping must be a number ≥ 0, several, or "path"'),
        ({"damping": -1.0}, "damping must be one or more finite numbers"),
        ({"damping": []}, "damping must be one or more finite numbers"),
        ({"query_loss": lambda w, batch: loss(solution(), batch)}, "query_loss"),
    ):
        with pytest.raises(ValueError, match=message):
            influence.scores(**problem(**bad))
    with pytest.raises(TypeError, match=r"several dampings are solved by solvers\.shifted"):
        influence.scores(**problem(damping=[0.1, 0.2], solver=solvers.GMRES()))
    with pytest.raises(TypeError, match="iterable more than once"):
        influence.scores(**problem(train=iter(batches())))


def test_params_away_from_the_minimum_and_unsolved_systems_warn():
    away = {name: w + 3.0 for name, w in solution().items()}
    with pytest.warns(hg.UnsolvedInnerProblem):
        influence.scores(**problem(params=away))
    with pytest.warns(hg.HypergradientWarning, match="systems of the queries at damping 0"):
        influence.scores(**problem(solver=solvers.CG(rtol=1e-12, max_steps=2)))
    with pytest.raises(hg.SolverError):
        influence.scores(**problem(solver=solvers.CG(rtol=1e-12, max_steps=2, on_failure="raise")))


@pytest.mark.parametrize("live", ["parameter", "constant"])
def test_a_penalty_that_does_not_use_its_argument_is_an_error(live):
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, w = lambda w, b: ((w - b) ** 2).sum(1), x.mean(0)
    own = torch.nn.Parameter(w.clone()) if live == "parameter" else w
    with pytest.raises(ValueError, match="penalty does not depend on the params"):
        hg.influence.scores(loss, loss, w, train=[x], queries=[x], penalty=lambda _: (own**2).sum())


def test_empty_batches_and_inference_mode():
    """Neither empty batches, as a filter may give them, nor inference_mode change the scores."""
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, w = lambda w, b: ((w - b) ** 2).sum(1), x.mean(0)
    step = lambda w, weights: w - 0.1 * (weights[:, None] * 2 * (w - x)).mean(0)  # noqa: E731
    apart = {"train": [x[:2], x[:0], x[2:]], "queries": [x[:0], x[:3], x[3:3]]}
    truth = -(2 * (w - x[:3]) @ (2 * (w - x)).mT) / 2 / 6

    def all_scores():
        return [
            hg.influence.scores(loss, loss, w, **apart).scores,
            hg.influence.self_influence(loss, w, train=apart["train"]).scores[:3],
            hg.influence.unrolled(step, w, loss, examples=6, queries=apart["queries"], steps=200).scores,
        ]

    plain = all_scores()
    with torch.inference_mode():
        inferred = all_scores()
    for found in (plain, inferred):
        for scores, expected in zip(found, (truth, truth.diagonal(), truth), strict=True):
            torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)
