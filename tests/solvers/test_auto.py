"""Auto: which method it chooses, when it tries a second one, and what the default solver returns."""

import re
import warnings

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    N,
)
from systems import System, logspace, side, with_spectrum


def auto(a: np.ndarray, tag: bool, **options) -> S.Solution:
    return S.Auto(rtol=1e-9, **options)(hg.operators.matrix(torch.tensor(a), symmetric=tag), torch.tensor(side(len(a))))


SHIFT = np.roll(np.eye(N), 1, axis=0)


CHOICES = {
    "symmetric": (with_spectrum(logspace(100, N), 1), True, "CG: declared symmetric"),
    "indefinite": (
        with_spectrum(np.append(-np.ones(3), logspace(10, N - 3)), 1),
        True,
        "MINRES: CG ended with NOT_POSITIVE_DEFINITE",
    ),
    "general": (np.eye(N) + 0.3 * SHIFT, False, "GMRES: not declared symmetric"),
    "stagnating": (SHIFT, False, "LSQR: GMRES ended with STAGNATED"),
    "not symmetric after all": (np.eye(N) + 0.3 * SHIFT, True, "GMRES: CG ended with NOT_SYMMETRIC"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_chooses_and_says_why(name):
    a, tag, method = CHOICES[name]
    solution = auto(a, tag)
    assert solution.method == method and solution.status is Status.CONVERGED
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, side(len(a))), rtol=1e-6, atol=1e-8)


def test_auto_tries_the_second_method_only_on_the_failed_systems_of_a_batch():
    definite, indefinite = CHOICES["symmetric"][0], CHOICES["indefinite"][0]
    a, b = np.stack([definite, indefinite, 2 * definite]), np.stack([side(N)] * 3)
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = S.Auto(rtol=1e-9)(op, torch.tensor(b))
    assert solution.method.startswith("MINRES") and solution.ok
    alone = S.CG(rtol=1e-9)(hg.operators.matrix(torch.tensor(a[::2]), symmetric=True), torch.tensor(b[::2]))
    assert torch.equal(solution.value[::2], alone.value)
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-6, atol=1e-8)


def test_auto_without_a_tolerance_takes_max_steps_of_the_first_method_alone():
    a = CHOICES["indefinite"][0]
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    with pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        solution = S.Auto(max_steps=30)(op, torch.tensor(side(N)))
    assert solution.method == "CG: declared symmetric" and solution.steps == 30 and op.products == 31


def test_auto_keeps_cg_if_it_solves_a_slightly_asymmetric_system():
    skew = 1e-5 * np.random.RandomState(0).randn(N, N)
    a = with_spectrum(logspace(10, N), 1) + skew
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = S.Auto(rtol=1e-3)(op, torch.tensor(side(N)))
    assert solution.method == "CG: declared symmetric" and solution.ok
    with pytest.warns(hg.HypergradientWarning, match="NOT_SYMMETRIC"):  # CG detects the asymmetry
        S.CG(max_steps=5)(op, torch.tensor(side(N)))
    both = np.stack([a, with_spectrum(np.append(-np.ones(3), logspace(10, N - 3)), 1)])
    op, b = hg.operators.matrix(torch.tensor(both), symmetric=True), np.stack([side(N)] * 2)
    together = S.Auto(rtol=1e-3)(op, torch.tensor(b))
    assert together.ok and together.method == "MINRES: CG ended with NOT_POSITIVE_DEFINITE"
    torch.testing.assert_close(together.value[0], solution.value, rtol=1e-12, atol=0)


def test_auto_materialises_no_sharded_tensor():
    class Sharded(torch.Tensor):
        """Represents a DTensor: a vector with leaves of a tensor subclass has no flat form."""

    op = hg.operators.function(lambda v: 2 * v, symmetric=True)
    solution = S.Auto(rtol=1e-9)(op, torch.tensor(side(6)).as_subclass(Sharded))
    assert solution.method == "CG: declared symmetric" and solution.ok


def test_auto_runs_gmres_from_zero_after_cg_has_diverged():
    """A is positive definite with a large skew part, but declared symmetric: CG's residual grows a thousandfold."""
    a = np.eye(N) + 5 * (SHIFT - SHIFT.T)
    solution = auto(a, True)
    assert solution.method == "GMRES: CG ended with NOT_SYMMETRIC" and solution.ok
    op, b = (hg.operators.matrix(torch.tensor(a), symmetric=True), torch.tensor(side(N)))
    lost = S.CG(rtol=1e-9, on_failure="ignore")(op, b)
    assert lost.status is Status.NOT_SYMMETRIC and lost.trace[-2] > 1e3 and not lost.value.any()
    assert solution.steps - lost.steps == S.GMRES(rtol=1e-9)(op, b).steps
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, side(N)), rtol=1e-6, atol=1e-8)


def embedding(h: torch.Tensor):
    """Ridge regression of the first four of six weights; the other two occur in the outer loss alone."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=draw).double(), torch.randn(30, generator=draw).double()
    outer = torch.randn(6, generator=draw).double()

    def inner_loss(w, h):
        return ((x @ w[:4] - y) ** 2).mean() / 2 + (h.exp() * w[:4] ** 2).sum() / 2

    a = x.T @ x / 30 + torch.diag(h.detach().exp())
    w = torch.cat([torch.linalg.inv(a) @ x.T @ y / 30, torch.ones(2).double()])
    truth = -h.detach().exp() * w[:4] * (torch.linalg.inv(a) @ outer[:4])
    return (lambda w, h: outer @ w), inner_loss, w, truth


@pytest.mark.parametrize("solver", [None, S.MINRES(rtol=1e-10), S.Dense(), S.LSQR(rtol=1e-10)])
def test_least_squares_gives_the_hypergradient_if_only_the_outer_loss_uses_some_weights(solver):
    """The system is singular and inconsistent, and its least-squares solution gives the right hypergradient."""
    h = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    outer_loss, inner_loss, w, truth = embedding(h)
    with pytest.warns(hg.HypergradientWarning, match="STAGNATED|BREAKDOWN|NOT_POSITIVE_DEFINITE"):
        result = hg.implicit.grad(outer_loss, inner_loss=inner_loss, params=w, hparams=h, solver=solver)
    torch.testing.assert_close(result.grads, truth, rtol=1e-5 if solver is None else 1e-8, atol=0)


@pytest.mark.parametrize("steps", [5, 20])
def test_fixed_steps_of_cg_warn_if_only_the_outer_loss_uses_some_weights(steps):
    h = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    outer_loss, inner_loss, w, _ = embedding(h)
    with pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        result = hg.implicit.grad(outer_loss, inner_loss=inner_loss, params=w, hparams=h, solver=S.CG(max_steps=steps))
    assert result.solution.relative_residual <= 1


def test_weights_of_samples_that_are_fitted_exactly_have_zero_hypergradient():
    """With more weights than samples, all samples are fitted exactly, so their weights change nothing: ∇f = 0."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, 20, generator=draw).double(), torch.randn(10, generator=draw).double()
    outer = torch.randn(20, generator=draw).double()
    h = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    given = {
        "inner_loss": lambda w, h: (torch.sigmoid(h) * (x @ w - y) ** 2).mean(),
        "params": torch.linalg.pinv(x) @ y,
        "hparams": h,
    }
    for solver in (None, S.CG(max_steps=20), S.MINRES(rtol=1e-9), S.Dense()):
        with pytest.warns(hg.HypergradientWarning):
            result = hg.implicit.grad(lambda w, h: outer @ w, solver=solver, **given)
        assert result.grads.abs().max() <= 1e-10


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_default_gives_least_squares_solutions(dtype, batched):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        a = with_spectrum(np.r_[np.zeros(4), logspace(10, 16)], seed)
        system = System("", a, rng.standard_normal(20))
        system = system.stacked() if batched else system
        for tag in ("symmetric", "positive_definite"):
            solution = S.Auto(on_failure="ignore")(system.operator(tag, dtype), system.rhs(dtype))
            least = system.residuals(system.solutions)[0]
            assert solution.status is Status.STAGNATED and solution.method.startswith("MINRES: CG ended with")
            residual = system.residuals(solution.value.double().numpy())[0]
            assert residual <= least * (1 + (1e-6 if dtype is torch.float64 else 1e-3))


def test_the_message_for_a_network_in_training_names_a_sufficient_damping():
    """The Hessian has tens of negative eigenvalues; the message names a damping with which CG converges."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=draw).double(), torch.randn(40, 3, generator=draw).double()
    shapes = [(5, 12), (12,), (12, 3), (3,)]
    w = [0.7 * torch.randn(shape, generator=draw).double() for shape in shapes]
    h = torch.tensor(-6.0, dtype=torch.float64, requires_grad=True)

    def inner_loss(w, h):
        hidden = torch.tanh(x @ w[0] + w[1])
        return ((hidden @ w[2] + w[3] - y) ** 2).mean() + h.exp() * sum((p**2).sum() for p in w)

    def flat_loss(v):
        return inner_loss([p.reshape(s) for p, s in zip(v.split([60, 12, 36, 3]), shapes, strict=True)], h.detach())

    hessian = torch.autograd.functional.hessian(flat_loss, torch.cat([p.reshape(-1) for p in w]))
    values = torch.linalg.eigvalsh(hessian)
    assert int((values < 0).sum()) > 20
    given = {"inner_loss": inner_loss, "params": w, "hparams": h}
    with pytest.warns(hg.HypergradientWarning) as caught:
        result = hg.implicit.grad(lambda w, h: (w[2] ** 2).sum(), **given)
    assert result.solution.status is Status.NOT_POSITIVE_DEFINITE and result.solution.relative_residual <= 1
    message = next(str(w.message) for w in caught if "NOT_POSITIVE_DEFINITE" in str(w.message))
    damping = float(re.search(r"damping must be at least ([^)]+)", message).group(1))
    assert -values[0] < damping < 2 * -values[0] and "GaussNewton" in message
    solver = S.CG(rtol=1e-8, damping=damping, max_steps=5000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.UnsolvedInnerProblem)
        damped = hg.implicit.grad(lambda w, h: (w[2] ** 2).sum(), **given, solver=solver)
    assert damped.solution.status is Status.CONVERGED
    b = torch.cat([(2 * p if i == 2 else 0 * p).reshape(-1) for i, p in enumerate(w)])
    v = torch.linalg.inv(hessian + damping * torch.eye(len(b))) @ b
    truth = -sum((2 * h.detach().exp() * p.reshape(-1)) @ q for p, q in zip(w, v.split([60, 12, 36, 3]), strict=True))
    torch.testing.assert_close(damped.grads, truth, rtol=1e-6, atol=0)
