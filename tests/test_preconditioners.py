"""Diagonal and Reused: what they build, when they build it anew, and that the answer stays right. Auto's choices."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from systems import GRID, logspace, norm, side, with_spectrum

N = 120


def scaled(strength: float) -> np.ndarray:
    """Scales 10⁻⁴ to 10² on the diagonal of a well-conditioned matrix."""
    scale = np.sqrt(np.logspace(-4, 2, N))
    return scale[:, None] * (np.eye(N) + strength * (with_spectrum(np.linspace(-1, 1, N), 5))) * scale


def solve(a: np.ndarray, solver: S.LinearSolver, x0: torch.Tensor | None = None) -> tuple[S.Solution, int]:
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = solver(op, torch.tensor(side(len(a))), x0)
    assert norm(a @ solution.value.numpy() - side(len(a))) <= 1.001 * (solver.rtol or 1) * norm(side(len(a)))
    return solution, op.products


def estimate(a: np.ndarray, probes: int, seed: int = 0) -> np.ndarray:
    """The diagonal that `Diagonal` divides by."""
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    ones = torch.ones(len(a), dtype=torch.float64)
    one = hg._vector.Space(ones, "b").vector(ones, "b")
    return 1 / S.Diagonal(probes=probes, seed=seed).preconditioner(op, one)(one).flat().numpy()


def test_diagonal_is_exact_where_a_is_diagonal():
    diagonal = np.logspace(-6, 3, N)
    np.testing.assert_allclose(estimate(np.diag(diagonal), 2), diagonal, rtol=1e-12)


def test_diagonal_is_the_mean_over_random_signs():
    """Errors have the variance Σ_{k≠i} a_ik² / m: their mean square over many seeds, entry by entry."""
    a, probes = scaled(0.3), 50
    errors = np.stack([estimate(a, probes, seed) - np.diag(a) for seed in range(400)])
    variance = ((a**2).sum(1) - np.diag(a) ** 2) / probes
    ratio = (errors**2).mean(0) / variance
    assert ratio.min() > 0.3 and ratio.max() < 2 and abs(np.median(ratio) - 1) < 0.05


def test_diagonal_is_never_below_its_own_error():
    """A zero diagonal is all noise: the preconditioner stays positive definite."""
    a = with_spectrum(np.linspace(-1, 1, N), 5)
    a -= np.diag(np.diag(a))
    assert np.all(estimate(a, 4) > 0)
    assert np.all(estimate(np.zeros((5, 5)), 4) == 1)


@pytest.mark.parametrize("make", [S.CG, S.MINRES])
def test_diagonal_saves_steps_where_scales_differ(make):
    solver = make(rtol=1e-10, preconditioner=S.Diagonal(probes=30))
    assert solve(scaled(0.3), solver)[0].steps < 60
    with pytest.warns(hg.HypergradientWarning, match="MAX_STEPS"):
        plain = make(rtol=1e-10, max_steps=200)(
            hg.operators.matrix(torch.tensor(scaled(0.3)), symmetric=True), torch.tensor(side(N))
        )
    assert not plain.ok


def test_diagonal_serves_a_batch():
    system = GRID["batch spd"]
    solution = S.CG(rtol=1e-10, preconditioner=S.Diagonal())(system.operator(), system.rhs())
    assert solution.ok
    np.testing.assert_allclose(solution.value.numpy(), system.solutions, rtol=1e-6, atol=1e-8)


def test_diagonal_keeps_the_random_state_and_refuses_what_is_not_symmetric():
    state = torch.get_rng_state()
    solve(scaled(0.3), S.CG(rtol=1e-8, preconditioner=S.Diagonal()))
    assert torch.equal(state, torch.get_rng_state())
    op = hg.operators.matrix(torch.tensor(scaled(0.3)))
    like = hg._vector.Space(torch.ones(N), "b").zeros()
    with pytest.raises(TypeError, match="Diagonal needs a symmetric operator"):
        S.Diagonal().preconditioner(op, like)
    with pytest.raises(ValueError, match="probes must be an integer ≥ 2, got 1"):
        S.Diagonal(probes=1)


DECAY = with_spectrum(np.logspace(0, -5, N) + 1e-4, 3)


def drifting(t: float) -> np.ndarray:
    """The same eigenvalues, eigenvectors turned as t grows."""
    turn = torch.matrix_exp(t * torch.tensor(np.triu(np.ones((N, N)), 1) - np.tril(np.ones((N, N)), -1)) / N).numpy()
    return turn @ DECAY @ turn.T


def test_reused_builds_once_for_one_matrix():
    pre = S.Reused(S.Nystrom(rank=40, damping=1e-4))
    solver = S.CG(rtol=1e-8, preconditioner=pre)
    products = [solve(DECAY, solver)[1] for _ in range(5)]
    assert pre.builds == 1 and products[0] - products[1] == 40 and len({*products[1:]}) == 1
    assert pre.steps == [products[1] - 1] * 5  # one product more for the residual
    fresh, _ = solve(DECAY, S.CG(rtol=1e-8, preconditioner=S.Nystrom(rank=40, damping=1e-4)))
    assert fresh.steps == pre.steps[-1]


def test_reused_builds_anew_when_the_steps_lost_are_worth_it():
    pre = S.Reused(S.Nystrom(rank=40, damping=1e-4))
    solver, lost, builds = S.CG(rtol=1e-8, preconditioner=pre), [], []
    for t in np.linspace(0, 1.5, 40):
        due = sum(pre.steps) - len(pre.steps) * min(pre.steps, default=0) >= 40
        before = pre.builds
        solve(drifting(t), solver)
        builds.append(pre.builds - before)
        lost.append(due)
    assert builds[0] == 1 and builds[1:] == [int(due) for due in lost[1:]]
    assert 2 <= pre.builds < 20


def test_reused_is_cheaper_than_never_and_than_always():
    def total(preconditioner) -> int:
        solver = S.CG(rtol=1e-8, preconditioner=preconditioner)
        return sum(solve(drifting(t), solver)[1] for t in np.linspace(0, 0.5, 30))

    recipe = S.Nystrom(rank=40, damping=1e-4)
    reused = total(S.Reused(recipe))
    assert reused < 0.7 * total(None) and reused < 0.8 * total(recipe)


def test_reused_builds_anew_for_a_problem_of_another_kind():
    pre = S.Reused(S.Nystrom(rank=10, damping=1e-2))
    solver = S.CG(rtol=1e-8, preconditioner=pre)
    for n in (20, 30):
        assert solve(with_spectrum(logspace(10, n), 3), solver)[0].ok
    assert pre.builds == 2


def test_reused_in_hypergradients():
    """A sequence of hypergradients of ridge regression, each right, with one sketch."""
    x, y = torch.tensor(np.random.RandomState(0).randn(60, 20)), torch.tensor(np.random.RandomState(1).randn(60))
    pre, adjoint = S.Reused(S.Nystrom(rank=20, damping=1e-2)), None
    for step in range(4):
        lam = torch.full((20,), -1.0 + 0.01 * step, dtype=torch.float64, requires_grad=True)
        a = x.mT @ x / 60 + torch.diag(lam.detach().exp())
        w = torch.linalg.inv(a) @ (x.mT @ y) / 60
        result = hg.implicit.grad(
            lambda w, lam: (w**2).sum() / 2,
            inner_loss=lambda w, lam: ((x @ w - y) ** 2).mean() / 2 + (lam.exp() * w**2).sum() / 2,
            params=w,
            hparams=lam,
            solver=S.CG(rtol=1e-12, preconditioner=pre),
            x0=adjoint,
        )
        adjoint = result.adjoint
        truth = -lam.detach().exp() * w * (torch.linalg.inv(a) @ w)
        torch.testing.assert_close(result.grads, truth, rtol=1e-9, atol=0)
    assert pre.builds == 1


def auto(a: np.ndarray, tag: bool, **options) -> S.Solution:
    return S.Auto(rtol=1e-9, **options)(hg.operators.matrix(torch.tensor(a), symmetric=tag), torch.tensor(side(len(a))))


SHIFT = np.roll(np.eye(N), 1, axis=0)
CHOICES = {
    "small": (with_spectrum(np.ones(20), 1), False, "Dense: 20 unknowns, at most 100"),
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


def test_auto_goes_on_with_those_systems_of_a_batch_that_failed():
    definite, indefinite = CHOICES["symmetric"][0], CHOICES["indefinite"][0]
    a, b = np.stack([definite, indefinite, 2 * definite]), np.stack([side(N)] * 3)
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = S.Auto(rtol=1e-9)(op, torch.tensor(b))
    assert solution.method.startswith("MINRES") and solution.ok
    alone = S.CG(rtol=1e-9)(hg.operators.matrix(torch.tensor(a[::2]), symmetric=True), torch.tensor(b[::2]))
    assert torch.equal(solution.value[::2], alone.value)
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, b[..., None])[..., 0], rtol=1e-6, atol=1e-8)


def test_auto_without_a_tolerance_does_exactly_the_first_methods_steps():
    a = CHOICES["indefinite"][0]
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    with pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        solution = S.Auto(max_steps=30)(op, torch.tensor(side(N)))
    assert solution.method == "CG: declared symmetric" and solution.steps == 30 and op.products == 31


def test_every_solution_names_its_method():
    op, b = hg.operators.matrix(torch.eye(3), positive_definite=True), torch.ones(3)
    for make in (S.CG, S.MINRES, S.GMRES, S.Dense, S.Nystrom):
        assert make(on_failure="ignore")(op, b).method == make.__name__

    def mine(op, b, x0):
        return b

    assert hg.solvers._solver.solve(mine, op, hg._vector.Space(b, "b").vector(b, "b"), None).method == "mine"


HARD = with_spectrum(logspace(1e8, 60), 1)  # at 1e-9 rounding makes a solve go on from its true residual, twice


def test_a_solve_that_goes_on_keeps_its_preconditioner():
    class Counted:
        built = 0

        def preconditioner(self, op, like):
            self.built += 1
            return S.Nystrom(rank=20, damping=1e-8).preconditioner(op, like)

    def products(**options) -> int:
        op = hg.operators.matrix(torch.tensor(HARD), symmetric=True)
        solution = S.CG(rtol=1e-11, max_steps=2000, on_failure="ignore", **options)(op, torch.tensor(side(60)))
        return op.products - int(solution.steps)

    recipe = Counted()
    # One product for the residual, and two for each time that it went on: it did.
    again = products(preconditioner=recipe) - 20
    assert again in (3, 5) and recipe.built == 1
    reused = S.Reused(S.Nystrom(rank=20, damping=1e-8))
    assert [products(preconditioner=reused) for _ in range(3)] == [20 + again, again, again]
    assert reused.builds == 1 and len(reused.steps) == 3


def test_reused_learns_nothing_from_solves_without_a_step():
    pre = S.Reused(S.Nystrom(rank=40, damping=1e-4))
    op, b = hg.operators.matrix(torch.tensor(DECAY), symmetric=True), torch.tensor(side(N))
    solver = S.CG(rtol=1e-8, preconditioner=pre)
    first = solver(op, b)
    for _ in range(10):
        assert solver(op, b).steps == first.steps
        assert solver(op, 0 * b).steps == 0
        assert solver(op, b, first.value).steps <= 1
    assert pre.builds == 1 and pre.steps.count(0) >= 10


def test_reused_after_an_error():
    """A recipe that fails changes nothing; a product that fails leaves no count of a solve that was none."""

    class Failing:
        fails = True

        def preconditioner(self, op, like):
            if self.fails:
                raise KeyError("mine")
            return lambda r: r * 1.0

    recipe, fails = Failing(), True
    pre = S.Reused(recipe)
    solver = S.CG(rtol=1e-8, preconditioner=pre)

    def product(v):
        if fails:
            raise ZeroDivisionError
        return 2 * v

    op, b = hg.operators.function(product, symmetric=True), torch.ones(3)
    with pytest.raises(KeyError, match="mine"):
        solver(op, b)
    assert (pre.builds, pre.steps) == (0, [])
    recipe.fails = False
    with pytest.raises(ZeroDivisionError):
        solver(op, b, b)
    assert (pre.builds, pre.steps) == (1, [])
    fails = False
    assert solver(op, b).ok and (pre.builds, pre.steps) == (1, [1])


def test_bad_preconditioners_are_named():
    op, b = hg.operators.matrix(torch.eye(3), symmetric=True), torch.ones(3)
    for make in (S.CG, S.MINRES):
        for bad, said in ((5, "got 5"), ("jacobi", "got 'jacobi'"), (S.Nystrom, "got <class"), (b, r"got tensor\(")):
            with pytest.raises(TypeError, match=f"preconditioner must be a LinearOperator.*{said}"):
                make(preconditioner=bad)(op, b)
        with pytest.raises(ValueError, match="Reused needs a solver with a tolerance"):
            make(max_steps=3, preconditioner=S.Reused(S.Nystrom()))(op, b)
    for bad in (None, 5, S.Nystrom, lambda r: r):
        with pytest.raises(TypeError, match=r"Reused needs a recipe .*, got "):
            S.Reused(bad)
    for seed in ("a", 1.5):
        with pytest.raises(ValueError, match=f"seed must be an integer, got {seed!r}"):
            S.Diagonal(seed=seed)


def test_auto_keeps_what_solves_the_system():
    """Dense by LU, where the symmetry that was declared is not there; CG, where a small asymmetry did no harm."""
    n = 90
    op = hg.operators.matrix(torch.tensor(np.roll(np.eye(n), 1, axis=0)), positive_definite=True)
    solution = S.Auto(rtol=1e-9)(op, torch.tensor(side(n)))
    assert solution.method == "Dense: 90 unknowns, at most 100" and solution.status is Status.CONVERGED
    np.testing.assert_allclose(solution.value.numpy(), np.roll(side(n), -1), rtol=0, atol=1e-14)
    skew = 1e-5 * np.random.RandomState(0).randn(N, N)
    a = with_spectrum(logspace(10, N), 1) + skew
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = S.Auto(rtol=1e-3)(op, torch.tensor(side(N)))
    assert solution.method == "CG: declared symmetric" and solution.ok
    with pytest.warns(hg.HypergradientWarning, match="NOT_SYMMETRIC"):  # CG saw it
        S.CG(max_steps=5)(op, torch.tensor(side(N)))
    both = np.stack([a, with_spectrum(np.append(-np.ones(3), logspace(10, N - 3)), 1)])
    op, b = hg.operators.matrix(torch.tensor(both), symmetric=True), np.stack([side(N)] * 2)
    together = S.Auto(rtol=1e-3)(op, torch.tensor(b))
    assert together.ok and together.method == "MINRES: CG ended with NOT_POSITIVE_DEFINITE"
    torch.testing.assert_close(together.value[0], solution.value, rtol=1e-12, atol=0)


def test_auto_materialises_no_sharded_tensor():
    class Sharded(torch.Tensor):
        """Stands for one: a vector of such tensors has no flat form."""

    op = hg.operators.function(lambda v: 2 * v, symmetric=True)
    solution = S.Auto(rtol=1e-9)(op, torch.tensor(side(6)).as_subclass(Sharded))
    assert solution.method == "CG: declared symmetric" and solution.ok


def test_auto_starts_anew_where_the_iterates_of_cg_are_lost():
    """A positive definite A with a large skew part, declared symmetric: CG's residual grows a thousandfold."""
    a = np.eye(N) + 5 * (SHIFT - SHIFT.T)
    solution = auto(a, True)
    assert solution.method == "GMRES: CG ended with NOT_SYMMETRIC" and solution.ok
    op, b = (hg.operators.matrix(torch.tensor(a), symmetric=True), torch.tensor(side(N)))
    lost = S.CG(rtol=1e-9, on_failure="ignore")(op, b)
    assert lost.status is Status.NOT_SYMMETRIC and lost.relative_residual > 1e3
    assert solution.steps - lost.steps == S.GMRES(rtol=1e-9)(op, b).steps
    np.testing.assert_allclose(solution.value.numpy(), np.linalg.solve(a, side(N)), rtol=1e-6, atol=1e-8)


def dense_preconditioner(a: np.ndarray):
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    like = hg._vector.Space(torch.ones(a.shape[:-1], dtype=torch.float64), "b", a.ndim - 2).zeros()
    return S.Dense().preconditioner(op, like), op


def test_dense_preconditions_with_the_exact_inverse():
    b = torch.tensor(side(N))
    apply, op = dense_preconditioner(DECAY)
    space = hg._vector.Space(b, "b")
    np.testing.assert_allclose(apply(space.vector(b, "b")).flat(), np.linalg.solve(DECAY, side(N)), rtol=1e-9)
    assert op.products == N
    for make in (S.CG, S.MINRES):
        assert solve(DECAY, make(rtol=1e-9, preconditioner=S.Dense()))[0].steps <= 2


def test_dense_preconditions_an_indefinite_system_with_its_absolute_value():
    values = np.append(-logspace(10, 30), logspace(1e3, N - 30))
    a, b = with_spectrum(values, 3), torch.tensor(side(N))
    apply, _ = dense_preconditioner(a)
    np.testing.assert_allclose(
        apply(hg._vector.Space(b, "b").vector(b, "b")).flat(),
        np.linalg.solve(with_spectrum(abs(values), 3), side(N)),
        rtol=1e-9,
    )
    assert solve(a, S.MINRES(rtol=1e-9, preconditioner=S.Dense()))[0].steps <= 3
    with pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        S.CG(rtol=1e-9, preconditioner=S.Dense())(hg.operators.matrix(torch.tensor(a), symmetric=True), b)


def test_dense_preconditions_each_system_of_a_batch():
    system = GRID["batch spd, one indefinite"]
    solution = S.MINRES(rtol=1e-10, preconditioner=S.Dense())(system.operator("symmetric"), system.rhs())
    assert solution.ok and int(solution.steps.max()) <= 3
    np.testing.assert_allclose(solution.value.numpy(), system.solutions, rtol=1e-6, atol=1e-8)
    system = GRID["batch spd, one NaN"]
    solution = S.CG(rtol=1e-10, preconditioner=S.Dense(), on_failure="ignore")(
        system.operator("symmetric"), system.rhs()
    )
    assert solution.statuses == [S.Status.CONVERGED, S.Status.NON_FINITE, S.Status.CONVERGED]


def test_dense_reused_along_a_sequence_saves_nearly_all_steps():
    pre = S.Reused(S.Dense())
    solver, steps = S.CG(rtol=1e-8, preconditioner=pre), []
    for t in np.linspace(0, 0.003, 10):
        steps.append(int(solve(drifting(t), solver)[0].steps))
    plain = [int(solve(drifting(t), S.CG(rtol=1e-8))[0].steps) for t in np.linspace(0, 0.003, 10)]
    assert pre.builds == 1 and steps[0] <= 2 and sum(steps) < 0.2 * sum(plain)


def test_dense_is_no_preconditioner_of_what_is_not_symmetric():
    op = hg.operators.matrix(torch.tensor(SHIFT))
    with pytest.raises(TypeError, match="Dense as a preconditioner needs a symmetric operator"):
        S.Dense().preconditioner(op, hg._vector.Space(torch.ones(N), "b").zeros())
