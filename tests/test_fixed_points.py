"""Forward solvers of w = Φ(w) against independent solutions: values, statuses, counts, batches, configuration."""

import dataclasses
from collections import OrderedDict
from functools import cache

import numpy as np
import optree
import pytest
import torch
from torch import Tensor

import hypergrad as hg
from implicit_cases import S, rel, tanh

FP = hg.fixed_points
Status = hg.Status
QUIET = {"on_failure": "ignore"}
SOLVERS = {
    "Picard": FP.Picard,
    "Picard mixed": lambda **options: FP.Picard(mixing=0.7, **options),
    "Anderson": FP.Anderson,
    "Anderson mixed": lambda **options: FP.Anderson(history=3, mixing=0.8, **options),
    "Broyden": FP.Broyden,
    "Newton": FP.Newton,
}
CASE = tanh(12, 0.95)


def double(value) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def counted(phi):
    """Φ, and how often it was evaluated."""

    def evaluate(*args):
        evaluate.calls += 1
        return phi(*args)

    evaluate.calls = 0
    return evaluate


def affine(n: int, norm: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """M, c and (I − M)⁻¹c by NumPy."""
    rng = np.random.default_rng(seed)
    m = rng.standard_normal((n, n))
    m *= norm / np.linalg.norm(m, 2)
    c = rng.standard_normal(n)
    return torch.from_numpy(m), torch.from_numpy(c), torch.from_numpy(np.linalg.solve(np.eye(n) - m, c))


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    """λ of problems from easy to hard, and their solutions."""
    h = CASE.random_hparams(count) * torch.linspace(0.05, 1.0, count).double()[:, None]
    return h, torch.stack([CASE.solve(one) for one in h])


def batched_phi(w: Tensor, h: Tensor) -> Tensor:
    return torch.func.vmap(CASE.user)(w, h)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_agrees_with_newtons_method(name):
    solution = SOLVERS[name](rtol=1e-12, max_steps=400)(CASE.user, torch.zeros(12).double(), CASE.hparams)
    assert solution.status is Status.CONVERGED and solution.ok
    assert rel(solution.value, CASE.solution) < 1e-10
    assert not solution.value.requires_grad


@pytest.mark.parametrize("name", SOLVERS)
def test_the_residual_is_that_of_the_value(name):
    for options in ({"rtol": 1e-6}, {"rtol": 1e-14, "max_steps": 7, **QUIET}, {"max_steps": 4}):
        solution = SOLVERS[name](**options)(CASE.user, torch.zeros(12).double(), CASE.hparams)
        w = solution.value
        if name == "Picard" and solution.status is Status.CONVERGED:  # the value is Φ(w), one contraction closer
            w = FP.Picard(max_steps=solution.steps)(CASE.user, torch.zeros(12).double(), CASE.hparams).value
            assert rel(solution.value, CASE.user(w, CASE.hparams)) < 1e-15
            assert (CASE.user(solution.value, CASE.hparams) - solution.value).norm() < 0.96 * solution.residual_norm
        image = CASE.user(w, CASE.hparams)
        assert abs(solution.residual_norm - (image - w).norm()) < 1e-15
        assert abs(solution.rhs_norm - image.norm()) < 1e-14
        assert solution.trace.shape == (solution.steps + 1,)
        assert solution.trace[0] == CASE.user(torch.zeros(12).double(), CASE.hparams).norm()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_pytree_for_state_and_hparams(name):
    m, c, truth = affine(5, 0.6)
    start = {"a": torch.zeros(2).double(), "b": (torch.zeros(()).double(), torch.zeros(1, 2).double())}
    join = lambda w: torch.cat([w["a"], w["b"][0].reshape(1), w["b"][1][0]])  # noqa: E731

    def phi(w, h):
        v = h["m"] @ join(w) + h["c"]
        return {"a": v[:2], "b": (v[2], v[3:][None])}

    solution = SOLVERS[name](rtol=1e-13, max_steps=200)(phi, start, {"m": m, "c": c})
    assert optree.tree_structure(solution.value) == optree.tree_structure(start)
    assert rel(join(solution.value), truth) < 1e-11
    assert all(not leaf.any() for leaf in optree.tree_leaves(start))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_defaults_reach_the_tolerance_of_the_dtype(name, dtype):
    m, c, truth = affine(6, 0.7)
    m, c = m.to(dtype), c.to(dtype)
    solution = SOLVERS[name]()(lambda w: m @ w + c, torch.zeros(6, dtype=dtype))
    assert solution.ok and solution.value.dtype == dtype
    assert solution.relative_residual <= (1e-6 if dtype == torch.float64 else 1e-4)
    assert rel(solution.value, truth) < 1e-3


@pytest.mark.parametrize("name", SOLVERS)
def test_a_start_at_the_solution_takes_no_step(name):
    phi = counted(lambda w: torch.zeros_like(w) + 2.0)
    solution = SOLVERS[name](rtol=1e-10)(phi, torch.full((3,), 2.0).double())
    assert solution.steps == 0 and phi.calls == 1 and solution.residual_norm == 0 and solution.ok
    solution = SOLVERS[name](rtol=1e-10)(lambda w: 0 * w, torch.zeros(3).double())
    assert solution.steps == 0 and solution.ok  # 0 ≤ rtol · 0


# --- properties of single methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("norm", [0.5, 3.0])
def test_anderson_solves_an_affine_problem_in_n_plus_one_steps(n, norm):
    """With m > n Anderson's method is GMRES on (I − M)w = c, whether or not M contracts."""
    m, c, truth = affine(n, norm)
    solver = FP.Anderson(history=n + 2, regularisation=0.0, rtol=1e-9, max_steps=n + 1)
    assert rel(solver(lambda w: m @ w + c, torch.zeros(n).double()).value, truth) < 1e-7


@pytest.mark.parametrize("mixing", [1.0, 0.5])
def test_picard_is_the_plain_iteration(mixing):
    w = torch.zeros(12).double()
    for _ in range(6):
        w = (1 - mixing) * w + mixing * CASE.user(w, CASE.hparams)
    solution = FP.Picard(mixing=mixing, max_steps=6)(CASE.user, torch.zeros(12).double(), CASE.hparams)
    assert rel(solution.value, w) < 1e-14
    assert solution.status is Status.COMPLETED  # steps as asked


def test_newton_converges_quadratically():
    linear = S.Dense(on_failure="ignore")
    solution = FP.Newton(rtol=1e-15, max_steps=8, solver=linear, **QUIET)(
        CASE.user, torch.zeros(12).double(), CASE.hparams
    )
    r = solution.trace[(solution.trace < 0.3) & (solution.trace > 1e-13)]
    assert len(r) >= 2 and bool((r[1:] < 5 * r[:-1] ** 2).all())
    affine_map = affine(5, 3.0)
    one = FP.Newton(rtol=1e-10, max_steps=1, solver=linear)(
        lambda w: affine_map[0] @ w + affine_map[1], torch.zeros(5).double()
    )
    assert one.steps == 1 and rel(one.value, affine_map[2]) < 1e-12


def test_newton_evaluates_twice_a_step():
    phi = counted(CASE.user)
    solution = FP.Newton(max_steps=3)(phi, torch.zeros(12).double(), CASE.hparams)
    assert phi.calls == 1 + 2 * 3 == 1 + 2 * solution.steps


@pytest.mark.parametrize("history", [1, 2, 4])
def test_broyden_goes_on_when_its_history_is_full(history):
    solution = FP.Broyden(history=history, rtol=1e-11, max_steps=400)(CASE.user, torch.zeros(12).double(), CASE.hparams)
    assert solution.ok and solution.steps > history and rel(solution.value, CASE.solution) < 1e-9


def test_accelerated_methods_need_no_contraction():
    m, c, truth = affine(6, 4.0, seed=3)
    phi = lambda w: m @ w + c  # noqa: E731
    with pytest.warns(hg.HypergradientWarning, match="DIVERGED"):
        FP.Picard(rtol=1e-10, max_steps=60)(phi, torch.zeros(6).double())
    for solver in (FP.Anderson(history=8, rtol=1e-9), FP.Broyden(history=30, rtol=1e-10), FP.Newton(rtol=1e-10)):
        assert rel(solver(phi, torch.zeros(6).double()).value, truth) < 1e-7


def test_anderson_is_faster_than_picard():
    steps = {
        solver: solver(rtol=1e-10, max_steps=500)(CASE.user, torch.zeros(12).double(), CASE.hparams).steps
        for solver in (FP.Picard, FP.Anderson, FP.Broyden)
    }
    assert steps[FP.Anderson] < steps[FP.Picard] and steps[FP.Broyden] < steps[FP.Picard]


# --- stopping and statuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "Newton"])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_without_a_tolerance_exactly_max_steps_and_one_evaluation_more(name, steps):
    phi = counted(CASE.user)
    solution = SOLVERS[name](max_steps=steps)(phi, CASE.solution, CASE.hparams)  # from the solution: no early end
    assert phi.calls == steps + 1 and solution.steps == steps and solution.status is Status.COMPLETED
    assert solution.trace.shape == (steps + 1,)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"rtol": 1e-3}, lambda r, image: r <= 1e-3 * image),
        ({"atol": 1e-2}, lambda r, image: r <= 1e-2),
        ({"rtol": 1e-9, "atol": 1e-2}, lambda r, image: r <= 1e-2),
        ({"rtol": 1e-3, "atol": 1e-12}, lambda r, image: r <= 1e-3 * image),
    ],
)
def test_it_stops_at_the_first_w_within_the_tolerance(options, limit):
    w, steps = torch.zeros(12).double(), 0
    while not limit((CASE.user(w, CASE.hparams) - w).norm(), CASE.user(w, CASE.hparams).norm()):
        w, steps = CASE.user(w, CASE.hparams), steps + 1
    phi = counted(CASE.user)
    solution = FP.Picard(**options)(phi, torch.zeros(12).double(), CASE.hparams)
    assert solution.steps == steps > 0 and phi.calls == steps + 1
    assert rel(solution.value, CASE.user(w, CASE.hparams)) < 1e-15  # known, and closer than w


def test_with_check_every_the_number_of_steps_is_a_multiple():
    options = {"rtol": 1e-6, "max_steps": 200}
    exact = FP.Picard(check_every=1, **options)(CASE.user, torch.zeros(12).double(), CASE.hparams)
    seldom = FP.Picard(check_every=7, **options)(CASE.user, torch.zeros(12).double(), CASE.hparams)
    assert seldom.steps == -(-exact.steps // 7) * 7 and seldom.ok


def failing(name: str):
    """Φ and a start for each kind of failure."""
    return {
        "MAX_STEPS": (lambda w: 0.99 * w + 1.0, torch.zeros(2).double()),
        "DIVERGED": (lambda w: 2.0 * w + 1.0, torch.ones(2).double()),
        "NON_FINITE": (lambda w: w * torch.nan, torch.ones(2).double()),
    }[name]


@pytest.mark.parametrize("name", ["MAX_STEPS", "DIVERGED", "NON_FINITE"])
def test_a_failure_has_a_status_and_is_loud(name):
    phi, start = failing(name)
    options = {"rtol": 1e-8, "max_steps": 10}
    with pytest.warns(hg.HypergradientWarning, match=f"Picard: {name} after 10 steps"):
        solution = FP.Picard(**options)(phi, start)
    assert solution.status is Status[name] and not solution.ok
    with pytest.raises(hg.SolverError, match=name) as raised:
        FP.Picard(**options, on_failure="raise")(phi, start)
    assert raised.value.solution.status is Status[name]
    assert FP.Picard(**options, **QUIET)(phi, start).status is Status[name]


def test_divergence_in_fixed_step_mode_and_the_growth_rate():
    phi, start = failing("DIVERGED")
    with pytest.warns(hg.HypergradientWarning, match="DIVERGED"):
        solution = FP.Picard(max_steps=10)(phi, start)
    assert rel(solution.value, 2**10 * (start + 1) - 1) < 1e-14  # the last w, as asked
    assert abs(solution.growth_rate - 2.0) < 1e-12
    slow, start = failing("MAX_STEPS")
    assert abs(FP.Picard(max_steps=10)(slow, start).growth_rate - 0.99) < 1e-12


def test_a_residual_that_grows_for_a_while_is_no_divergence():
    """For a nonnormal map the residual 50 k 2^(1−k) rises from 1 to 50 and falls; in step 8 it is at 3."""
    a = torch.tensor([[0.5, 50.0], [0.0, 0.5]]).double()
    b = torch.tensor([0.0, 1.0]).double()
    for options in ({"max_steps": 8}, {"max_steps": 8, "rtol": 1e-9}):
        solution = FP.Picard(**options, **QUIET)(lambda w: a @ w + b, torch.zeros(2).double())
        assert solution.trace[-1] > solution.trace[0]
        assert solution.status is (Status.MAX_STEPS if "rtol" in options else Status.COMPLETED)


def test_with_a_tolerance_the_best_w_is_kept():
    """The residual falls and then grows."""
    scales = iter([0.5, 0.5, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    seen = []

    def phi(w: Tensor) -> Tensor:
        seen.append(w.clone())
        return w * next(scales)

    start = torch.ones(1).double()
    solution = FP.Picard(rtol=1e-12, max_steps=6, **QUIET)(phi, start)
    best = solution.trace.argmin()
    assert solution.residual_norm == solution.trace[best] and torch.equal(solution.value, seen[best])
    assert 0 < best < 6


def test_a_nan_in_one_step_does_not_spoil_the_best_w():
    calls = counted(lambda w: 0.5 * w + 1.0 if calls.calls < 6 else w * torch.nan)
    solution = FP.Picard(rtol=1e-14, max_steps=8, **QUIET)(calls, torch.zeros(2).double())
    assert solution.status is Status.NON_FINITE and torch.isfinite(solution.value).all()
    assert solution.residual_norm == solution.trace[torch.isfinite(solution.trace)].min()


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("options", [{"rtol": 1e-9, "max_steps": 400}, {"max_steps": 6}, {"atol": 1e-5}], ids=str)
def test_a_batch_is_its_samples_one_by_one(name, options):
    h, _ = batch()
    start = torch.zeros(4, 12).double()
    if name == "Newton":  # an iterative inner solver goes on until its last sample is done
        options = options | {"solver": S.Dense(on_failure="ignore")}
    together = SOLVERS[name](batch_dims=1, trace=True, **options)(batched_phi, start, h)
    worst = SOLVERS[name](batch_dims=1, **options)(batched_phi, start, h)
    seen = ~worst.trace.isnan()
    assert torch.equal(worst.trace[seen], together.trace.amax(1)[seen]) and torch.equal(worst.code, together.code)
    assert seen.all() if "max_steps" not in options or "rtol" in options else seen.tolist() == [1, 1, 1, 0, 1, 0, 1]
    assert together.trace.shape == (together.steps + 1, 4) and together.code.shape == (4,)
    alone = [SOLVERS[name](trace=True, **options)(CASE.user, start[i], h[i]) for i in range(4)]
    assert together.steps == max(one.steps for one in alone)
    for i, one in enumerate(alone):
        assert rel(together.value[i], one.value) < 1e-9
        assert abs(together.residual_norm[i] - one.residual_norm) < 1e-9
        assert together.statuses[i] is one.status
        assert rel(together.trace[: one.steps + 1, i], one.trace) < 1e-5
    if "rtol" in options or "atol" in options:
        assert len({one.steps for one in alone}) > 1


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solved_sample_takes_no_more_steps(name):
    h, _ = batch()
    seen = []

    def phi(w: Tensor, h: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            seen.append(w.clone())
        return batched_phi(w, h)

    solution = SOLVERS[name](batch_dims=1, rtol=1e-9, max_steps=400, trace=True)(phi, torch.zeros(4, 12).double(), h)
    first = int((solution.trace[:, 0] == solution.trace[-1, 0]).nonzero()[0])
    assert first < solution.steps  # the easiest one waits for the others
    assert all(torch.equal(w[0], seen[first][0]) for w in seen[first:])
    value = batched_phi(seen[first], h)[0] if name == "Picard" else seen[first][0]
    assert torch.equal(solution.value[0], value)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", ["diverges", "nan"])
def test_a_bad_sample_does_not_disturb_the_others(name, bad):
    h, _ = batch()
    start = torch.full((4, 12), 0.1).double()
    factor = torch.nan if bad == "nan" else 50.0

    def phi(w: Tensor, h: Tensor) -> Tensor:
        new = batched_phi(w, h)
        spoiled = factor * w[1] * (1 + w[1] ** 2) + 1
        return torch.cat([new[:1], spoiled[None], new[2:]])

    solution = SOLVERS[name](batch_dims=1, rtol=1e-10, max_steps=60, **QUIET)(phi, start, h)
    alone = SOLVERS[name](batch_dims=1, rtol=1e-10, max_steps=60, **QUIET)(batched_phi, start[[0, 2, 3]], h[[0, 2, 3]])
    assert rel(solution.value[[0, 2, 3]], alone.value) < 1e-9
    assert [solution.statuses[i] for i in (0, 2, 3)] == alone.statuses
    if bad == "nan":
        assert solution.statuses[1] is Status.NON_FINITE


def test_a_failed_sample_is_named():
    factor = double([0.5, 2.0, 0.5])[:, None]
    solver = FP.Picard(batch_dims=1, rtol=1e-6, max_steps=40)
    with pytest.warns(hg.HypergradientWarning, match="Picard: 1 of 3 systems, the first at index 1: DIVERGED"):
        solution = solver(lambda w: factor * w + 1.0, torch.zeros(3, 2).double())
    assert solution.status is Status.DIVERGED and solution.statuses[0] is Status.CONVERGED


def test_batched_pytrees():
    m, c, truth = affine(4, 0.6)
    start = {"a": torch.zeros(3, 2, 1).double(), "b": torch.zeros(3, 2).double()}
    scale = double([0.1, 1.0, 2.0])[:, None]

    def phi(w):
        v = torch.cat([w["a"][..., 0], w["b"]], 1) @ m.T + scale * c
        return {"a": v[:, :2, None], "b": v[:, 2:]}

    for solver in (FP.Picard, FP.Anderson, FP.Broyden, FP.Newton):
        value = solver(batch_dims=1, rtol=1e-12)(phi, start).value
        assert rel(torch.cat([value["a"][..., 0], value["b"]], 1), scale * truth) < 1e-10


# --- configuration and misuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FP.Picard(rtol=-1.0), "Picard: rtol must be a finite number ≥ 0, got -1.0"),
        (lambda: FP.Picard(atol=float("nan")), "Picard: atol must be a finite number ≥ 0"),
        (lambda: FP.Anderson(max_steps=-1), "Anderson: max_steps must be an integer ≥ 0, got -1"),
        (lambda: FP.Anderson(max_steps=2.5), "Anderson: max_steps must be an integer ≥ 0, got 2.5"),
        (lambda: FP.Newton(check_every=0), "Newton: check_every must be an integer ≥ 1, got 0"),
        (lambda: FP.Picard(mixing=0.0), r"Picard: mixing must be in \(0, 1\], got 0.0"),
        (lambda: FP.Picard(mixing=1.5), r"Picard: mixing must be in \(0, 1\]"),
        (lambda: FP.Anderson(history=0), "Anderson: history must be an integer ≥ 1, got 0"),
        (lambda: FP.Anderson(mixing=0.0), r"Anderson: mixing must be in \(0, 1\]"),
        (lambda: FP.Anderson(regularisation=-1.0), "Anderson: regularisation must be a finite number ≥ 0"),
        (lambda: FP.Broyden(history=0), "Broyden: history must be an integer ≥ 1, got 0"),
        (lambda: FP.Picard(on_failure="explode"), 'on_failure must be "warn", "raise" or "ignore", got \'explode\''),
    ],
)
def test_wrong_configuration_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("phi", "text"),
    [
        (lambda w: w[:1], r"the value of the fixed point map.*expected shape \(2,\).*got shape \(1,\)"),
        (lambda w: w.float(), "the value of the fixed point map.*float64.*float32"),
        (lambda w: (w, w), "the value of the fixed point map must have the structure of start"),
        (lambda w: 1.0, "the value of the fixed point map must be a floating point tensor, got float"),
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_map_that_changes_the_state_is_refused(name, phi, text):
    with pytest.raises((ValueError, TypeError), match=text):
        SOLVERS[name]()(phi, torch.ones(2).double())


def test_a_start_that_is_no_floating_point_tensor_is_refused():
    with pytest.raises(TypeError, match="start must be a floating point tensor"):
        FP.Picard()(lambda w: w, torch.tensor(1))
    with pytest.raises(ValueError, match="batch_dims=1 needs leading axes of the same lengths"):
        FP.Picard(batch_dims=1)(lambda w: w, (torch.ones(2), torch.ones(3)))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_users_tensors_and_graphs_are_left_alone(name):
    start = torch.zeros(12).double().requires_grad_()
    h = CASE.hparams.clone().requires_grad_()
    solution = SOLVERS[name](rtol=1e-8)(CASE.user, start, h)
    assert not solution.value.requires_grad and h.grad is None and start.grad is None
    assert not start.detach().any() and torch.equal(h.detach(), CASE.hparams)
    solution.value.add_(1.0)  # in memory of its own
    assert not start.detach().any()


# --- scale ------------------------------------------------------------------------------------------------------------

SCALES = [(torch.float32, 1e-30), (torch.float32, 1e-24), (torch.float32, 1e25), (torch.float32, 1e34)]
SCALES += [(torch.float64, 1e-200), (torch.float64, 1e-290), (torch.float64, 1e200), (torch.bfloat16, 1e-30)]


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_map_at_any_scale_is_solved_as_at_scale_one(name, dtype, scale, batch_dims):
    """Squares of the numbers overflow or underflow in this dtype."""
    m, c, truth = affine(6, 0.6)
    c, m, shape = c.expand(3, -1) if batch_dims else c, m.to(dtype), (3, 6) if batch_dims else (6,)
    shift = (c * scale).to(dtype)
    options = {"rtol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4}
    solution = SOLVERS[name](batch_dims=batch_dims, max_steps=400, **options)(
        lambda w, c: w @ m.T + c, torch.zeros(shape, dtype=dtype), shift
    )
    assert solution.ok and solution.steps > 0
    assert rel(solution.value.double() / scale, truth.expand(shape)) < (0.2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_of_very_different_scale(name):
    m, c, truth = affine(6, 0.6)
    scales = torch.tensor([1e-30, 1.0, 1e25], dtype=torch.float64)[:, None]
    shift = (c * scales).float()
    solution = SOLVERS[name](batch_dims=1, rtol=1e-4, max_steps=400)(
        lambda w, c: w @ m.float().T + c, torch.zeros(3, 6), shift
    )
    assert solution.ok
    for i in range(3):
        assert rel(solution.value[i].double() / scales[i], truth) < 1e-3


# --- proximal steps ---------------------------------------------------------------------------------------------------


@cache
def proximal(kind: str, seed: int) -> tuple:
    """A proximal gradient step on least squares with 3, 6 or 12 rows for 6 unknowns, and its fixed point."""
    rng = np.random.default_rng(seed)
    rows = (3, 6, 12)[seed % 3]
    x, y = torch.from_numpy(rng.standard_normal((rows, 6))), torch.from_numpy(rng.standard_normal(rows))
    step = 1 / torch.linalg.matrix_norm(x, 2) ** 2
    strength = 0.3 * (x.T @ y).abs().max()

    def project(u: Tensor) -> Tensor:
        if kind == "soft thresholding":
            return u.sign() * torch.clamp_min(u.abs() - (step * strength).to(u.dtype), 0)
        if kind == "box":
            return u.clamp(-0.1, 0.1)
        if kind == "non-negative":
            return u.clamp_min(0)
        return u / torch.clamp_min(u.norm(), 0.3) * 0.3  # a ball

    def phi(w: Tensor) -> Tensor:
        a, b = x.to(w.dtype), y.to(w.dtype)
        return project(w - step.to(w.dtype) * (a.T @ (a @ w - b)))

    truth = torch.zeros(6).double()
    for _ in range(3_000):
        truth = phi(truth)
    return phi, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["soft thresholding", "box", "non-negative", "ball"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_proximal_map_never_counts_as_solved_far_away(name, kind, dtype):
    """At |w| = 1e16 Φ(w) − w rounds to 0, and ‖Φ(w) − w‖ ≤ rtol ‖Φ(w)‖ holds only because w is large."""
    for seed in range(6):
        phi, truth = proximal(kind, seed)
        start = torch.zeros(6, dtype=dtype)
        solution = SOLVERS[name](max_steps=200, rtol=1e-6 if dtype == torch.float64 else 1e-4, **QUIET)(phi, start)
        assert solution.value.norm() < 20 * (truth.norm() + 0.1)
        if solution.ok and seed % 3:  # elsewhere the fixed point is not unique, or ill-conditioned
            assert rel(solution.value, truth) < 0.05
        if name.startswith("Anderson") and kind != "soft thresholding":
            assert solution.ok


@pytest.mark.parametrize("seed", [0, 3, 9, 12, 15])
def test_anderson_solves_soft_thresholding(seed):
    phi, truth = proximal("soft thresholding", seed)
    solution = FP.Anderson(rtol=1e-9, max_steps=3000)(phi, torch.zeros(6).double())
    assert solution.ok and rel(solution.value, truth) < 1e-3


@pytest.mark.parametrize(("seed", "unknowns", "rows", "history"), [(2, 10, 5, 10), (25, 5, 2, 10), (50, 10, 5, 10)])
def test_a_residual_that_rounds_to_zero_is_no_solution(seed, unknowns, rows, history):
    """Anderson extrapolates soft thresholding to |w| > 1e13, where Φ(w) − w is 0 to rounding."""
    rng = np.random.default_rng(seed)
    x, y = torch.from_numpy(rng.standard_normal((rows, unknowns))), torch.from_numpy(rng.standard_normal(rows))
    step = 1 / torch.linalg.matrix_norm(x, 2) ** 2
    strength = {2: 0.02, 25: 0.3, 50: 0.02}[seed] * (x.T @ y).abs().max()
    step = step * {2: 1.0, 25: 1.0, 50: 0.1}[seed]

    def phi(w: Tensor) -> Tensor:
        u = w - step * (x.T @ (x @ w - y))
        return u.sign() * torch.clamp_min(u.abs() - step * strength, 0)

    solution = FP.Anderson(history=history, atol=1e-10, max_steps=2000, **QUIET)(phi, torch.zeros(unknowns).double())
    assert solution.value.norm() < 100
    assert not solution.ok or (phi(solution.value) - solution.value).norm() < 1e-10


# --- containers -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Unregistered:
    w: Tensor


def tangled(w):
    """A map of two leaves of the same shape, so that shapes would not reveal a swap."""
    return {"b": 0.5 * w["b"] + w["a"] / 4 + 1, "a": 0.25 * w["a"] - 2}


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("name", SOLVERS)
def test_mappings_are_matched_by_key(name, batch_dims):
    zeros = torch.zeros(2, 1).double()
    truth = {"a": double([[-8 / 3], [-8 / 3]]), "b": double([[2 / 3], [2 / 3]])}
    for start in ({"b": zeros, "a": zeros}, OrderedDict(b=zeros, a=zeros), OrderedDict(a=zeros, b=zeros)):
        for kind in (dict, OrderedDict, lambda new: OrderedDict(reversed(new.items()))):
            phi = lambda w, kind=kind: kind(tangled(w))  # noqa: E731
            solution = SOLVERS[name](rtol=1e-12, max_steps=500, batch_dims=batch_dims)(phi, start)
            assert type(solution.value) is type(start)
            assert all(rel(solution.value[key], truth[key]) < 1e-9 for key in truth)


def test_an_unregistered_dataclass_is_named():
    w = torch.ones(2)
    with pytest.raises(TypeError, match=r"start must be .*got Unregistered; register"):
        FP.Picard()(lambda w: w, Unregistered(w))
    with pytest.raises(TypeError, match=r"the value of the fixed point map must be .*got Unregistered; register"):
        FP.Picard()(lambda w: Unregistered(w), w)


# --- torch.func, maps that differentiate, empty -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rtol": 1e-11, "max_steps": 400}, {"max_steps": 6}, {}], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_is_one_solve_of_all_entries(name, options):
    h, _ = batch()
    start = torch.zeros(12).double()
    if name == "Newton":
        options = options | {"solver": S.Dense(on_failure="ignore")}
    together = SOLVERS[name](batch_dims=1, trace=True, **options)(batched_phi, start.expand(4, -1), h)
    seen = []

    def solve(h: Tensor) -> tuple[Tensor, ...]:
        solution = SOLVERS[name](trace=True, **options)(CASE.user, start, h)
        seen.append(solution.steps)
        return solution.value, solution.residual_norm, solution.rhs_norm, solution.code, solution.trace

    value, _, rhs_norm, code, trace = torch.func.vmap(solve, out_dims=(0, 0, 0, 0, 1))(h)
    assert seen == [together.steps] and torch.equal(code, together.code)
    assert rel(value, together.value) < 1e-12 and rel(rhs_norm, together.rhs_norm) < 1e-12
    assert trace.shape == together.trace.shape
    twice = torch.func.vmap(torch.func.vmap(solve, out_dims=(0, 0, 0, 0, 1)), out_dims=(0, 0, 0, 0, 1))(
        h.reshape(2, 2, -1)
    )
    assert rel(twice[0].reshape(4, -1), together.value) < 1e-12
    columns = torch.func.vmap(lambda h: solve(h)[0], in_dims=1)(h.T)
    assert rel(columns, together.value) < 1e-12


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.jacrev, torch.func.hessian])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solve_under_a_transform_is_a_constant(name, transform):
    seen = []

    def f(h: Tensor) -> Tensor:
        solution = SOLVERS[name](rtol=1e-11, max_steps=400)(CASE.user, torch.zeros(12).double(), h)
        assert solution.ok and solution.status is Status.CONVERGED
        seen.append(solution.value)
        return (h.sin() * solution.value.sum()).sum()

    got = transform(f)(CASE.hparams)
    total = CASE.solution.sum()
    truth = transform(lambda h: (h.sin() * total).sum())(CASE.hparams)
    assert rel(got, truth) < 1e-9


def test_a_mapped_tensor_that_was_not_passed():
    with pytest.raises(ValueError, match="pass it in hparams"):
        torch.func.vmap(lambda c: FP.Picard()(lambda w: 0.5 * w + c, torch.zeros(2)).value)(torch.ones(3))
    # one that a gradient is taken in may be used
    f = lambda c: c * FP.Picard(rtol=1e-12)(lambda w: 0.5 * w + c, torch.zeros(()).double()).value  # noqa: E731
    assert abs(torch.func.grad(f)(torch.tensor(3.0).double()) - 6.0) < 1e-9


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("container", [lambda w: w, lambda w: {"w": w}])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_map_that_takes_a_gradient_itself(name, container, batch_dims):
    m, c, _ = affine(6, 0.6)
    a, c = m @ m.T + torch.eye(6).double(), c.expand(3, -1)
    truth = torch.from_numpy(np.linalg.solve(a.numpy(), c.numpy().T).T.copy())

    def phi(w):
        w = w if isinstance(w, Tensor) else w["w"]
        (slope,) = torch.autograd.grad((0.5 * (w @ a) * w - c * w).sum(), w, create_graph=True)
        return container(w - 0.5 * slope)

    solution = SOLVERS[name](rtol=1e-11, max_steps=500, batch_dims=batch_dims)(
        phi, container(torch.zeros(3, 6).double())
    )
    value = solution.value if isinstance(solution.value, Tensor) else solution.value["w"]
    assert rel(value, truth) < 1e-9 and not value.requires_grad
    each = torch.func.vmap(
        lambda c: SOLVERS[name](rtol=1e-11, max_steps=500)(energy_step(a), torch.zeros(6).double(), c).value
    )
    assert rel(each(c), truth) < 1e-9


def energy_step(a: Tensor):
    def phi(w: Tensor, c: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(0.5 * (w @ a) @ w - c @ w, w, create_graph=True)
        return w - 0.5 * slope

    return phi


@pytest.mark.parametrize("options", [{}, {"max_steps": 3}, {"atol": 1e-3}], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_empty_starts(name, options):
    for shape, batch_dims in (((0, 6), 1), ((0, 6), 0), ((3, 0), 1), ((0,), 0)):
        solution = SOLVERS[name](batch_dims=batch_dims, **options)(lambda w: 0.5 * w, torch.zeros(shape).double())
        assert solution.ok and solution.value.shape == shape
        assert solution.code.shape == ((shape[0],) if batch_dims else ())
