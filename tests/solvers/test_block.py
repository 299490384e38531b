"""Several right hand sides of one operator: op.stacked() for every solver, BlockCG, and implicit.jacobian."""

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S
from hypergrad.solvers import Status
from solver_rows import (
    ROWS,
    RTOL,
    Answer,
    Reads,
    definite,
)
from systems import GRID, System, logspace, norm, side, with_spectrum

SINGLE = [name for name, system in GRID.items() if system.a.ndim == 2 and system.b.ndim]

SIDES = 4


def several(name: str, sides: int = SIDES, gamma: float = 0.0) -> tuple[System, hg.operators.LinearOperator]:
    """A system of the grid with its right-hand side and random ones, as one System for each of them; and A."""
    given = GRID[name]
    b = np.stack([given.b, *(given.start(seed).numpy() for seed in range(1, sides))])
    return System(name, np.stack([given.a] * sides), b).damped(gamma), given.operator("symmetric")


def off(x, truth) -> float:
    """‖x − truth‖ / ‖truth‖."""
    return norm(np.asarray(x) - np.asarray(truth)) / norm(truth)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_grid(gamma, started):
    """For each right-hand side: no failure is silent, the promised systems are solved, and residuals are true."""
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
    """K steps of BlockCG minimise the error in the norm of A over the sum of all sides' Krylov spaces."""
    system, op = several("spd 10")
    a, b, x0 = GRID["spd 10"].a, system.b, system.start().numpy()
    for steps in (1, 2, 4):
        for start in (None, x0):
            r = (b - (0 if start is None else start @ a)).T
            space = np.linalg.qr(np.hstack([np.linalg.matrix_power(a, j) @ r for j in range(steps)])).Q
            inside = space @ np.linalg.solve(space.T @ a @ space, space.T @ r)
            truth = inside.T + (0 if start is None else start)
            x0_given = None if start is None else torch.tensor(start)
            solution = S.BlockCG(max_steps=steps, on_failure="ignore")(op.stacked(), system.rhs(), x0_given)
            assert off(solution.value, truth) <= 1e-10


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
def test_block_cg_takes_fewer_products_than_cg_for_each_side(sides):
    a, b = hard(sides)
    block, products = solve(a, b, S.BlockCG(rtol=1e-10))
    alone, plain = solve(a, b, S.CG(rtol=1e-10, max_steps=5000))
    assert products < (0.7 if sides == 2 else 0.25) * plain
    assert int(block.steps.max()) < 0.7 * int(alone.steps.max())


def test_dependent_zero_and_solved_sides():
    """Equal sides, a sum of two, zero, an eigenvector, very different scales: none spoils the others."""
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


def test_block_cg_of_one_side_is_cg():
    system = GRID["spd 1e3"]
    block, plain = (make(rtol=1e-10)(system.operator(), system.rhs()) for make in (S.BlockCG, S.CG))
    assert block.ok and block.value.shape == plain.value.shape and abs(block.steps - plain.steps) <= 2
    assert off(block.value, plain.value) <= 1e-7


def test_nan_in_one_side_does_not_spoil_the_others():
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
    tight = S.BlockCG(rtol=1e-11)
    steps = [
        int(make(op, torch.tensor(b + t * b[::-1]), recycled).steps.max())
        for make, t in zip((tight, tight, solver), (0.0, 0.5, 1.0), strict=True)
    ]
    assert steps[0] > 20 and steps[2] == 0


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_fixed_steps_take_the_documented_products_and_read_nothing(steps):
    system, op = several("spd 1e3")
    with Reads() as counted:
        solution = S.BlockCG(max_steps=steps, on_failure="ignore")(op.stacked(), system.rhs())
    assert counted.count == 0 and op.products == SIDES * (steps + 1)
    assert len(solution.trace) == steps + 1
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
def test_leaves_that_are_small_alone_and_large_in_the_batch(tolerance):
    """A batch stores large leaves separately, so its leaves may be in another order than those of one system."""
    sizes = {"a": 2, "b": 20_000, "c": 2, "d": 400_000}
    draw = torch.Generator().manual_seed(0)
    diagonal = {k: 1 + (torch.arange(n, dtype=torch.float64) + len(k)) % 5 for k, n in sizes.items()}
    b = {k: torch.randn(3, n, generator=draw, dtype=torch.float64) for k, n in sizes.items()}
    op = hg.operators.function(lambda v: {k: x * diagonal[k] for k, x in v.items()}, symmetric=True)
    solution = S.BlockCG(**tolerance)(op.stacked(), b)
    assert solution.ok
    assert all(off(x, b[k] / diagonal[k]) <= 1e-8 for k, x in solution.value.items())


def test_damping_and_transpose_of_a_stacked_operator():
    given = GRID["nonsymmetric 10"]
    op, b = given.operator("none"), torch.tensor(np.stack([side(given.n, seed) for seed in range(3)]))
    assert off(op.stacked().T(b), b.numpy() @ given.a) <= 1e-14
    assert off(op.stacked()(b), b.numpy() @ given.a.T) <= 1e-14
    both = op.damped(0.5).stacked().damped(0.25)
    assert off(both(b), b.numpy() @ (given.a + 0.75 * np.eye(given.n)).T) <= 1e-14
    assert both.products == 1


@pytest.mark.parametrize("make", [S.CG, S.MINRES, S.GMRES])
def test_several_right_hand_sides_of_each_of_several_systems(make):
    batch = GRID["batch spd"]
    b = torch.stack([batch.rhs(), batch.rhs().flip(-1), 3.0 + batch.rhs()])  # [k, B, n]
    solution = make(rtol=1e-9)(batch.operator("symmetric").stacked(), b)
    assert solution.code.shape == b.shape[:2]
    images = np.einsum("bij,kbj->kbi", batch.a, solution.value.numpy())
    assert (np.linalg.norm(images - b.numpy(), axis=-1) <= 2e-9 * np.linalg.norm(b.numpy(), axis=-1)).all()


def test_bad_input():
    batch = GRID["batch spd"]
    with pytest.raises(TypeError, match=r"pass op\.stacked\(\).*independent systems.*use CG"):
        S.BlockCG()(batch.operator("symmetric"), batch.rhs())
    with pytest.raises(TypeError, match="BlockCG needs a symmetric operator"):
        S.BlockCG()(GRID["spd 10"].operator("none").stacked(), torch.ones(2, 20))
    with pytest.raises(TypeError, match="preconditioner"):
        S.BlockCG(preconditioner=S.Nystrom())
    with pytest.raises(TypeError, match="no transposed product"):
        S.LSQR()(hg.operators.function(lambda v: 2 * v).stacked(), torch.ones(2, 3))

    class Sharded(torch.Tensor):
        """Represents a DTensor: a vector with leaves of a tensor subclass has no flat form."""

    op = hg.operators.function(lambda v: 2 * v, symmetric=True)
    with pytest.raises(TypeError, match="sharded tensors cannot be stacked"):
        S.BlockCG()(op.stacked(), torch.ones(2, 3).as_subclass(Sharded))
