"""Several right hand sides of one operator: op.stacked() for every solver, BlockCG, and implicit.jacobian."""

import numpy as np
import optree
import pytest
import torch

import hypergrad as hg
from helpers import assert_agrees, dense_system, nothing_changed, problem_at
from hypergrad import solvers as S
from hypergrad.solvers import Status
from problems import PROBLEMS
from systems import GRID, System, logspace, norm, side, with_spectrum
from test_oracles import forms
from test_solvers import ROWS, RTOL, Answer, Reads, definite

SINGLE = [name for name, system in GRID.items() if system.a.ndim == 2 and system.b.ndim]
SIDES = 4


def several(name: str, sides: int = SIDES, gamma: float = 0.0) -> tuple[System, hg.operators.LinearOperator]:
    """A system of the grid with its own right hand side and random ones, as one System a side; and A."""
    given = GRID[name]
    b = np.stack([given.b, *(given.start(seed).numpy() for seed in range(1, sides))])
    return System(name, np.stack([given.a] * sides), b).damped(gamma), given.operator("symmetric")


def off(x, truth) -> float:
    """‖x − truth‖ / ‖truth‖."""
    return norm(np.asarray(x) - np.asarray(truth)) / norm(truth)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_grid(gamma, started):
    """No failure is silent, what is due is solved, residuals are true, NaN is named: each side by itself."""
    bad, due = [], 0
    for name in SINGLE:
        system, op = several(name, gamma=gamma)
        solver = S.BlockCG(rtol=RTOL, max_steps=80, damping=gamma, on_failure="ignore")
        answer = Answer(
            name, system, solver(op.stacked(), system.rhs(), system.start() if started else None), not started
        )
        wanted = definite(1e6)(system)
        due += sum(wanted)
        bad += answer.silent() + answer.unsolved(wanted) + answer.misreported() + answer.mistraced()
        lost = [status is Status.NON_FINITE for status in answer.statuses]
        bad += answer.systems([f == n for f, n in zip(system.finite, lost, strict=True)])
    assert bad == [] and due > 40


@pytest.mark.parametrize("row", ["CG", "MINRES", "GMRES(60)", "LSQR"])
def test_every_solver_takes_stacked_operators(row):
    bad = []
    for name in SINGLE:
        system, _ = several(name, 2)
        op = GRID[name].operator(ROWS[row].tag)
        solver = ROWS[row].solver(rtol=RTOL, max_steps=80, on_failure="ignore")
        answer = Answer(name, system, solver(op.stacked(), system.rhs()), True)
        bad += answer.silent() + answer.unsolved(ROWS[row].solves(system)) + answer.misreported()
    assert bad == []


EXPECTED = {
    "symmetric indefinite": Status.NOT_POSITIVE_DEFINITE,
    "negative definite": Status.NOT_POSITIVE_DEFINITE,
    "zero": Status.NOT_POSITIVE_DEFINITE,
    "contraction .8": Status.NOT_SYMMETRIC,
    "nonsymmetric 1e3": Status.NOT_SYMMETRIC,
    "triangular, far from normal": Status.NOT_SYMMETRIC,
    "NaN in A": Status.NON_FINITE,
    "identity": Status.CONVERGED,
    "A = 4I": Status.CONVERGED,
}


@pytest.mark.parametrize("sides", [1, 3])
@pytest.mark.parametrize("name", EXPECTED)
def test_status_names_what_is_wrong(name, sides):
    system, op = several(name, sides)
    solution = S.BlockCG(rtol=RTOL, max_steps=60, on_failure="ignore")(op.stacked(), system.rhs())
    assert solution.statuses == [EXPECTED[name]] * sides


def test_value_of_k_steps():
    """The least error in the norm of A over the sum of the Krylov spaces of all sides."""
    system, op = several("spd 10")
    a, b, x0 = GRID["spd 10"].a, system.b, system.start().numpy()
    for steps in (1, 2, 4):
        for start in (None, x0):
            r = (b - (0 if start is None else start @ a)).T
            space = np.linalg.qr(np.hstack([np.linalg.matrix_power(a, j) @ r for j in range(steps)])).Q
            inside = space @ np.linalg.solve(space.T @ a @ space, space.T @ r)
            truth = inside.T + (0 if start is None else start)
            x0_given = None if start is None else torch.tensor(start)
            solution = S.BlockCG(max_steps=steps)(op.stacked(), system.rhs(), x0_given)
            assert solution.status is Status.CONVERGED and off(solution.value, truth) <= 1e-10


def hard(sides: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return with_spectrum(logspace(1e4, 200), 1), np.random.default_rng(seed).standard_normal((sides, 200))


def solve(a: np.ndarray, b: np.ndarray, solver: S.LinearSolver) -> tuple[S.Solution, int]:
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = solver(op.stacked(), torch.tensor(b))
    assert solution.ok
    truth = np.linalg.solve(a, b.T).T
    assert all(norm(x - y) <= 1e4 * 1e-10 * norm(c) for x, y, c in zip(solution.value.numpy(), truth, b, strict=True))
    return solution, op.products


@pytest.mark.parametrize("sides", [2, 8, 16])
def test_fewer_steps_than_one_after_the_other(sides):
    a, b = hard(sides)
    block, products = solve(a, b, S.BlockCG(rtol=1e-10))
    alone, plain = solve(a, b, S.CG(rtol=1e-10, max_steps=5000))
    assert products < (0.7 if sides == 2 else 0.25) * plain
    assert int(block.steps.max()) < 0.7 * int(alone.steps.max())


def test_dependent_zero_and_solved_sides():
    """Equal ones, a sum, zero, one solved at once (an eigenvector), other scales: none is in the others' way."""
    a, b = hard(3)
    vectors = np.linalg.eigh(a)[1]
    sides = np.stack(
        [b[0], b[0], b[0] + b[1], 0 * b[0], vectors[:, 0], 1e-150 * b[2], 1e150 * b[1], b[0] + 1e-13 * b[2]]
    )
    solution, _ = solve(a, sides, S.BlockCG(rtol=1e-10))
    plain, _ = solve(a, b, S.BlockCG(rtol=1e-10))
    assert not solution.value[3].any() and int(solution.steps[3]) == 0
    assert int(solution.steps.max()) <= 1.5 * int(plain.steps.max())


def test_more_sides_than_unknowns():
    a, b = with_spectrum(logspace(1e3, 6), 1), np.random.default_rng(0).standard_normal((9, 6))
    assert int(solve(a, b, S.BlockCG(rtol=1e-10))[0].steps.max()) <= 2


def test_one_side_is_cg():
    system = GRID["spd 1e3"]
    block, plain = (make(rtol=1e-10)(system.operator(), system.rhs()) for make in (S.BlockCG, S.CG))
    assert block.ok and block.value.shape == plain.value.shape and abs(block.steps - plain.steps) <= 2
    assert off(block.value, plain.value) <= 1e-7


def test_nan_in_one_side_stays_there():
    a, b = hard(3)
    b[1, 5] = np.nan
    op = hg.operators.matrix(torch.tensor(a), symmetric=True)
    solution = S.BlockCG(rtol=1e-10, on_failure="ignore")(op.stacked(), torch.tensor(b))
    assert solution.statuses == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    for i in (0, 2):
        assert off(solution.value[i], np.linalg.solve(a, b[i])) <= 1e-5


def test_warm_start_and_recycled_along_a_sequence():
    a, b = hard(3)
    op = hg.operators.matrix(torch.tensor(a), symmetric=True).stacked()
    solver, recycled = S.BlockCG(rtol=1e-8), S.Recycled(3)
    first = solver(op, torch.tensor(b))
    assert int(solver(op, torch.tensor(b), first.value).steps.max()) == 0
    steps = [int(solver(op, torch.tensor(b + t * b[::-1]), recycled).steps.max()) for t in (0.0, 0.5, 1.0)]
    assert steps[0] > 20 and steps[2] <= 3


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_fixed_steps_cost_what_they_say_and_read_nothing(steps, monkeypatch):
    monkeypatch.setattr("hypergrad.solvers._solver.FREE_TO_READ", ())
    system, op = several("spd 1e3")
    with Reads() as counted:
        solution = S.BlockCG(max_steps=steps, on_failure="ignore")(op.stacked(), system.rhs())
    assert counted.count == 0 and op.products == SIDES * (steps + 1)
    assert len(solution.trace) == steps + 1 and solution.ok
    meta = hg.operators.matrix(torch.empty(6, 6, device="meta"), symmetric=True).stacked()
    b = torch.empty(3, 6, device="meta")
    assert S.BlockCG(max_steps=steps, on_failure="ignore")(meta, b).value.shape == b.shape


def test_float32():
    a, b = with_spectrum(logspace(1e2, 60), 1), np.random.default_rng(0).standard_normal((4, 60))
    op = hg.operators.matrix(torch.tensor(a, dtype=torch.float32), symmetric=True)
    solution = S.BlockCG(rtol=1e-5)(op.stacked(), torch.tensor(b, dtype=torch.float32))
    assert solution.ok and off(solution.value, np.linalg.solve(a, b.T).T) <= 1e-2 * 1e-1


def test_several_leaves_of_mixed_dtypes():
    a = torch.tensor(with_spectrum(logspace(1e2, 12), 3))

    def product(v):
        flat = a @ torch.cat([v["m"].reshape(-1).double(), v["s"].reshape(1).double(), v["x"]])
        return {"m": flat[:6].float().reshape(2, 3), "s": flat[6].float(), "x": flat[7:]}

    draw = torch.Generator().manual_seed(0)
    b = {"m": torch.randn(3, 2, 3, generator=draw), "s": torch.randn(3, generator=draw)}
    b["x"] = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    op = hg.operators.function(product, symmetric=True)
    for make in (S.BlockCG, S.CG):
        value = make(rtol=1e-5)(op.stacked(), b).value
        for i in range(3):
            image = product({k: v[i] for k, v in value.items()})
            assert all((image[k] - b[k][i]).abs().max() < 1e-4 for k in b)


@pytest.mark.parametrize("tolerance", [{"rtol": 1e-10}, {"max_steps": 20}])
def test_leaves_that_are_small_alone_and_large_in_the_batch(tolerance, monkeypatch):
    """A batch stores its large leaves apart, so that its leaves may come in another order than those of one system."""
    monkeypatch.setattr("hypergrad._vector.SMALL", 8)
    monkeypatch.setattr("hypergrad._vector.SMALL_TOTAL", 30)
    a, sizes = with_spectrum(logspace(1e2, 13), 3), {"a": 2, "b": 9, "c": 2}

    def product(v):
        return dict(zip(v, (torch.tensor(a) @ torch.cat([*v.values()])).split([*sizes.values()]), strict=True))

    sides = np.random.default_rng(0).standard_normal((3, 13))
    b = dict(zip(sizes, torch.tensor(sides).split([*sizes.values()], -1), strict=True))
    solution = S.BlockCG(**tolerance)(hg.operators.function(product, symmetric=True).stacked(), b)
    assert solution.ok
    assert off(torch.cat([*solution.value.values()], -1), np.linalg.solve(a, sides.T).T) <= 1e-8


def test_damping_and_transpose_of_a_stacked_operator():
    given = GRID["nonsymmetric 10"]
    op, b = given.operator("none"), torch.tensor(np.stack([side(given.n, seed) for seed in range(3)]))
    assert off(op.stacked().T(b), b.numpy() @ given.a) <= 1e-14
    assert off(op.stacked()(b), b.numpy() @ given.a.T) <= 1e-14
    both = op.damped(0.5).stacked().damped(0.25)
    assert off(both(b), b.numpy() @ (given.a + 0.75 * np.eye(given.n)).T) <= 1e-14
    assert both.products == 1


def test_bad_input():
    batch = GRID["batch spd"]
    with pytest.raises(TypeError, match=r"pass op\.stacked\(\).*independent systems.*use CG"):
        S.BlockCG()(batch.operator("symmetric"), batch.rhs())
    with pytest.raises(ValueError, match="batch_dims=1"):
        batch.operator("symmetric").stacked()
    with pytest.raises(TypeError, match="BlockCG needs a symmetric operator"):
        S.BlockCG()(GRID["spd 10"].operator("none").stacked(), torch.ones(2, 20))
    with pytest.raises(TypeError, match="preconditioner"):
        S.BlockCG(preconditioner=S.Nystrom())
    with pytest.raises(TypeError, match="no transposed product"):
        S.LSQR()(hg.operators.function(lambda v: 2 * v).stacked(), torch.ones(2, 3))

    class Sharded(torch.Tensor):
        """Stands for one: a vector of such tensors has no flat form."""

    op = hg.operators.function(lambda v: 2 * v, symmetric=True)
    with pytest.raises(TypeError, match="sharded tensors cannot be stacked"):
        S.BlockCG()(op.stacked(), torch.ones(2, 3).as_subclass(Sharded))


SMALL = [name for name in PROBLEMS if not problem_at(name).batch_dims and name != "equilibrium"]


def losses_of(p, sides: int = 3):
    """The outer loss of a problem, and others that depend on params and hparams, stacked; and each by itself."""
    draw = torch.Generator().manual_seed(3)
    weights = [[torch.randn(x.shape, generator=draw).double() for x in optree.tree_leaves(p.params)] for _ in range(2)]

    def weighted(i: int):
        def loss(w, h):
            value = sum((c * x + 0.1 * x * x).sum() for c, x in zip(weights[i], optree.tree_leaves(w), strict=True))
            return value + (i + 1) * sum((x * x).sum() for x in optree.tree_leaves(h))

        return loss

    each = [p.outer_loss, weighted(0), weighted(1)][:sides]
    return (lambda w, h: torch.stack([loss(w, h) for loss in each])), each


def row_of(tree, like) -> np.ndarray:
    """The numbers of some leaves, zeros for None."""
    pairs = zip(tree, like, strict=True)
    return np.concatenate([(torch.zeros_like(y) if x is None else x).detach().reshape(-1).numpy() for x, y in pairs])


@pytest.mark.parametrize(("name", "form"), [(name, form) for name in SMALL for form in forms(problem_at(name))])
def test_jacobian_against_dense_algebra(name, form):
    p = problem_at(name, 1)
    stack, each = losses_of(p)
    precise = {"rtol": 1e-14, "max_steps": 600, "on_failure": "ignore"}
    solver = S.BlockCG(**precise) if p.symmetric else S.GMRES(restart=60, **precise)
    given = {"params": p.params, "hparams": p.hparams, form: getattr(p, form), "symmetric": p.symmetric}
    found = hg.implicit.jacobian(stack, **given, solver=solver)
    adjoint, _, _, cross = dense_system(name, form, 1)
    assert_agrees(p, optree.tree_map(lambda g: g[0], found.grads))
    for i, loss in enumerate(each):
        leaves = [x.detach().requires_grad_() for x in optree.tree_leaves(p.params)]
        w, hparams = optree.tree_unflatten(optree.tree_structure(p.params), leaves), optree.tree_leaves(p.hparams)
        grads = torch.autograd.grad(loss(w, p.hparams), [*leaves, *hparams], allow_unused=True)
        b, direct = row_of(grads[: len(leaves)], leaves), row_of(grads[len(leaves) :], hparams)
        truth = direct - cross @ np.linalg.solve(adjoint, b)
        assert off(row_of([g[i] for g in optree.tree_leaves(found.grads)], hparams), truth) <= 1e-10
        assert off(found.outer_value[i], loss(p.params, p.hparams).detach()) <= 1e-14
    assert found.solution.code.shape == (3,) and found.inner_distance.shape == (3,)


def validation(groups: int = 4):
    """Logistic regression with a penalty a feature, its exact solution, and the validation loss of each group."""
    draw = np.random.RandomState(0)
    x = torch.tensor(draw.randn(200, 40) * np.logspace(0, -2, 40))
    y = torch.tensor((draw.rand(200) > 0.5).astype(float))
    xv, yv = torch.tensor(draw.randn(groups, 30, 40)), torch.tensor((draw.rand(groups, 30) > 0.5).astype(float))
    lam = torch.full((40,), -6.0, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def inner(w, lam):
        return loss(x @ w, y) + (lam.exp() * w**2).sum() / 2

    def outer(w, lam):
        return torch.stack([loss(a @ w, b) for a, b in zip(xv, yv, strict=True)])

    w = torch.zeros(40, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.func.grad(inner)(w, lam.detach())
        hessian = torch.autograd.functional.hessian(lambda w: inner(w, lam.detach()), w)
        w = w - torch.linalg.inv(hessian) @ gradient
    return inner, outer, w, lam


def test_jacobian_takes_fewer_passes_than_gradients_one_after_the_other():
    inner, outer, w, lam = validation()
    given = {"inner_loss": inner, "params": w, "hparams": lam}
    found = hg.implicit.jacobian(outer, **given, solver=S.BlockCG(rtol=1e-12))
    steps = []
    for i in range(4):
        one = hg.implicit.grad(lambda w, lam, i=i: outer(w, lam)[i], **given, solver=S.CG(rtol=1e-12))
        assert off(found.grads[i], one.grads) <= 1e-8 and off(found.adjoint[i], one.adjoint) <= 1e-8
        assert abs(float(found.outer_value[i] - one.outer_value)) <= 1e-15
        steps.append(one.solution.steps)
    assert int(found.solution.steps.max()) < 0.5 * min(steps)


def exact(op, b, x0):
    """A user's own solver."""
    return S.Dense()(op, b).value


@pytest.mark.parametrize(
    "solver",
    [None, S.Dense(), S.MINRES(rtol=1e-12), S.Auto(rtol=1e-12), exact],
    ids=["default", "Dense", "MINRES", "Auto", "own"],
)
def test_jacobian_with_any_solver(solver):
    inner, outer, w, lam = validation(2)
    given = {"inner_loss": inner, "params": w, "hparams": lam}
    found = hg.implicit.jacobian(outer, **given, solver=solver)
    for i in range(2):
        one = hg.implicit.grad(lambda w, lam, i=i: outer(w, lam)[i], **given, solver=S.Dense())
        assert off(found.grads[i], one.grads) <= (1e-4 if solver is None else 1e-8)
    assert found.solution.method.startswith("BlockCG" if solver is None else "")


def test_jacobian_of_evaluated_losses_warm_started_and_recycled():
    inner, outer, w, lam = validation()
    live = w.clone().requires_grad_()
    start, recycled = None, S.Recycled(2)
    truth = hg.implicit.jacobian(outer, inner_loss=inner, params=w, hparams=lam, solver=S.BlockCG(rtol=1e-12)).grads
    steps = []
    for x0 in (None, "warm", recycled, recycled):
        given = {"inner_loss": inner(live, lam), "params": live, "hparams": lam}
        x0 = start if isinstance(x0, str) else x0
        found = hg.implicit.jacobian(outer(live, lam), **given, solver=S.BlockCG(rtol=1e-9), x0=x0)
        assert off(found.grads, truth) <= 1e-6
        start = found.adjoint
        steps.append(int(found.solution.steps.max()))
    assert steps[0] > 5 and steps[1] == 0 and steps[2] == steps[0] and steps[3] == 0
    assert live.grad is None and lam.grad is None


@pytest.mark.parametrize("groups", [1, 3])
def test_check_takes_one_row_of_a_jacobian(groups):
    inner, outer, w, lam = validation(groups)
    found = hg.implicit.jacobian(outer, inner_loss=inner, params=w, hparams=lam, solver=S.BlockCG(rtol=1e-12))
    with pytest.raises(TypeError, match=rf"implicit\.jacobian holds {groups}: pass row i of its grads"):
        hg.diagnostics.check(found)
    i = groups - 1
    given = {"outer_loss": lambda w, lam: outer(w, lam)[i], "inner_loss": inner, "params": w, "hparams": lam}
    report = hg.diagnostics.check(found.grads[i], adjoint=found.adjoint[i], **given, structure=False)
    assert report.estimate.relative_error < 1e-8


def test_jacobian_through_a_module_that_torch_cannot_vectorise():
    """A custom autograd.Function without a vmap rule: one product after the other, the same numbers."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return grad * 3 * ctx.saved_tensors[0] ** 2

    lam = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    w = lam.detach().clone()
    found = hg.implicit.jacobian(
        lambda w, lam: torch.stack([w.sum(), (w * lam).sum()]),
        inner_loss=lambda w, lam: (Cube.apply(w) * w / 12 - lam.detach() ** 3 * w / 3 + (w - lam) ** 2 / 2).sum(),
        params=w,
        hparams=lam,
    )
    a = w**2 + 1  # F = (w³ − λ₀³) / 3 + w − λ with ∂₂F = −1
    assert off(found.grads[0], 1 / a) <= 1e-6 and off(found.grads[1], w + lam.detach() / a) <= 1e-6


def test_jacobian_of_gauss_newton_and_of_leaves_that_do_not_require_grad():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=draw).double(), torch.randn(30, generator=draw).double()
    lam = {"penalty": torch.full((5,), -1.0, dtype=torch.float64, requires_grad=True), "fixed": torch.ones(2)}
    model = hg.operators.GaussNewton(
        lambda w, lam: x @ w,
        lambda z, lam: ((z - y) ** 2).mean() / 2,
        lambda w, lam: (lam["penalty"].exp() * w**2).sum() / 2,
    )
    a = x.mT @ x / 30 + torch.diag(lam["penalty"].detach().exp())
    w = torch.linalg.inv(a) @ (x.mT @ y) / 30
    found = hg.implicit.jacobian(
        lambda w, lam: torch.stack([w.sum(), (w**2).sum()]), inner_loss=model, params=w, hparams=lam
    )
    v = torch.linalg.inv(a) @ torch.stack([torch.ones_like(w), 2 * w], -1)
    truth = -(lam["penalty"].detach().exp() * w).unsqueeze(-1) * v
    assert off(found.grads["penalty"], truth.mT) <= 1e-6
    assert found.grads["fixed"].shape == (2, 2) and not found.grads["fixed"].any()


def test_jacobian_reports_what_is_wrong():
    lam = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    given = {"params": lam.detach().clone(), "hparams": lam}
    saddle = lambda w, lam: (w[0] - lam[0]) ** 2 - (w[1] - lam[1]) ** 2  # noqa: E731
    with nothing_changed(lam), pytest.warns(hg.HypergradientWarning, match="NOT_POSITIVE_DEFINITE"):
        hg.implicit.jacobian(lambda w, lam: w, inner_loss=saddle, **given)
    bowl = lambda w, lam: ((w - lam) ** 2).sum()  # noqa: E731
    for outer, got in (
        (lambda w, lam: w.sum(), r"shape \(\)"),
        (lambda w, lam: w[:0], r"shape \(0,\)"),
        (lambda w, lam: w.outer(w), r"shape \(2, 2\)"),
        (lambda w, lam: [w.sum()], "list"),
    ):
        with pytest.raises(ValueError, match=rf"outer_losses must give a tensor \[k\] of k ≥ 1 losses, got {got}"):
            hg.implicit.jacobian(outer, inner_loss=bowl, **given)
    with pytest.raises(TypeError, match="exactly one of inner_loss, fp_map and residual"):
        hg.implicit.jacobian(lambda w, lam: w, **given)
    with pytest.warns(hg.HypergradientWarning, match="means little"):
        hg.implicit.jacobian(lambda w, lam: w, inner_loss=bowl, params=torch.tensor([5.0, 9.0]).double(), hparams=lam)
    with pytest.raises(ValueError, match="x0 must be like"):
        hg.implicit.jacobian(lambda w, lam: w, inner_loss=bowl, **given, x0=torch.zeros(2))
