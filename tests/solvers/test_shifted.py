"""solvers.shifted: several dampings from one Krylov space, against dense solves."""

import pytest
import torch

import hypergrad as hg
from hypergrad.solvers import CG, shifted

DOUBLE = {"dtype": torch.float64}
DAMPINGS = [0.0, 1e-3, 0.1, 10.0]


def system(low=0.1, n=30):
    random = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, generator=random, **DOUBLE))[0]
    a = q @ torch.diag(torch.linspace(low, 5, n, **DOUBLE)) @ q.mT
    return a, hg.operators.matrix((a + a.mT) / 2, symmetric=True), torch.randn(3, n, generator=random, **DOUBLE)


def solved(a, damping, b):
    return (torch.linalg.inv(a + damping * torch.eye(len(a), **DOUBLE)) @ b.mT).mT


def test_each_damping_is_solved():
    a, op, b = system()
    b[1] = 0
    stacked = op.stacked()
    solutions = shifted(stacked, b, DAMPINGS, rtol=1e-12, max_steps=60)
    for damping, solution in zip(DAMPINGS, solutions, strict=True):
        assert solution.status is hg.Status.CONVERGED
        torch.testing.assert_close(solution.value, solved(a, damping, b), rtol=1e-10, atol=1e-12)
        shifted_a = a + damping * torch.eye(30, **DOUBLE)
        torch.testing.assert_close(
            solution.residual_norm, (b - solution.value @ shifted_a).norm(dim=-1), atol=1e-13, rtol=0
        )
        assert solution.steps[1] == 0
    assert stacked.products == int(solutions[0].steps.max()) + len(DAMPINGS)


def test_a_tree_and_one_right_hand_side():
    a, _, b = system()
    tree = hg.operators.function(
        lambda v: (
            dict(zip(("x", "y"), (a @ torch.cat([v["x"], v["y"].flatten()])).split([10, 20]), strict=True))
            | {"y": (a @ torch.cat([v["x"], v["y"].flatten()]))[10:].reshape(4, 5)}
        ),
        symmetric=True,
    )
    for one in shifted(tree, {"x": b[0, :10], "y": b[0, 10:].reshape(4, 5)}, [0.5], rtol=1e-12):
        flat = torch.cat([one.value["x"], one.value["y"].flatten()])
        torch.testing.assert_close(flat, solved(a, 0.5, b[:1])[0], rtol=1e-10, atol=0)
        assert isinstance(one.steps, int)


@pytest.mark.parametrize("size", [1e-200, 1e150])
def test_any_size_of_b(size):
    a, op, b = system()
    (solution,) = shifted(op.stacked(), size * b, [0.1], rtol=1e-10)
    torch.testing.assert_close(solution.value / size, solved(a, 0.1, b), rtol=1e-8, atol=1e-12)


def test_indefinite_without_enough_damping():
    a, op, b = system(low=-1.0)
    bad, good = shifted(op, b[0], [0.0, 2.0], rtol=1e-10, on_failure="ignore")
    assert bad.status is hg.Status.NOT_POSITIVE_DEFINITE and good.status is hg.Status.CONVERGED
    torch.testing.assert_close(good.value, solved(a, 2.0, b[:1])[0], rtol=1e-8, atol=0)
    with pytest.warns(hg.HypergradientWarning, match="damping 0.5: NOT_POSITIVE_DEFINITE"):
        shifted(op, b[0], [0.5])


def test_too_few_steps_and_nan():
    _, op, b = system(low=1e-3)
    short, _ = shifted(op, b[0], [0.0, 10.0], max_steps=8, on_failure="ignore")
    assert short.status in (hg.Status.MAX_STEPS, hg.Status.DIVERGED) and short.steps == 8
    b[0, 0] = torch.nan
    one, two = shifted(op.stacked(), b[:2], [1.0], on_failure="ignore")[0].statuses
    assert one is hg.Status.NON_FINITE and two is hg.Status.CONVERGED
    plain = CG(damping=1.0, rtol=1e-6)(op, b[1])
    assert abs(shifted(op, b[1], [1.0], rtol=1e-6)[0].steps - plain.steps) <= 1


def test_what_is_refused():
    _, op, b = system()
    for dampings in ([], [-1.0], [torch.inf]):
        with pytest.raises(ValueError, match="dampings must be one or more finite numbers ≥ 0"):
            shifted(op, b[0], dampings)
    with pytest.raises(TypeError, match="needs a symmetric operator"):
        shifted(hg.operators.matrix(torch.eye(30, **DOUBLE)), b[0], [1.0])
    with pytest.raises(ValueError, match="rtol"):
        shifted(op, b[0], [1.0], rtol=-1.0)
    with pytest.raises(hg.SolverError):
        shifted(op, b[0], [0.0], max_steps=1, on_failure="raise")
