"""Which solvers are valid for a system, and how many products they need: the theory is compared with actual solves."""

import math

import numpy as np
import pytest
import torch

import hypergrad as hg
from hypergrad.diagnostics import operator_structure, solver_choice
from hypergrad.operators import matrix
from systems import GRID, System, with_singular_values, with_spectrum

ABSTRACT = (hg.solvers.LinearSolver, hg.solvers.IterativeSolver)
SOLVERS = [
    name
    for name in hg.solvers.__all__
    if isinstance(kind := getattr(hg.solvers, name), type) and issubclass(kind, ABSTRACT) and kind not in ABSTRACT
]
PER_STEP = {"NormalCG": 2, "LSQR": 2}  # products
REAL = {
    "spd 10": GRID["spd 10"],
    "spd 100": System("spd 100", with_spectrum(np.logspace(-2, 0, 20), 1), GRID["spd 10"].b),
    "poisson": GRID["poisson 1d"],
    "indefinite": GRID["symmetric indefinite"],
    "contraction": GRID["contraction .8"],
    "nonsymmetric": System("nonsymmetric", with_singular_values(np.logspace(-2, 0, 20), 2), GRID["spd 10"].b),
    "identity": GRID["identity"],
    "large": System("large", with_spectrum(np.linspace(0.05, 1, 200)), np.random.default_rng(0).standard_normal(200)),
    "large indefinite": System(
        "large indefinite",
        with_spectrum(np.r_[np.linspace(-1, -0.1, 100), np.linspace(0.1, 1, 100)]),
        np.random.default_rng(0).standard_normal(200),
    ),
}


def structure(s: System):
    return operator_structure(s.operator(), s.rhs(), steps=200)


def test_every_solver_has_a_line():
    found = operator_structure(matrix(torch.eye(3), symmetric=True), torch.zeros(3))
    assert sorted(c.solver for c in solver_choice(found)) == sorted(SOLVERS)


def test_what_a_report_prints():
    a = torch.tensor(with_spectrum(np.r_[-1.0, np.linspace(0.1, 1, 19)]))
    lam = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    result = hg.implicit.grad(
        lambda w, lam: w.sum(),
        residual=lambda w, lam: a @ w - lam,
        params=torch.zeros(20, dtype=torch.float64),
        hparams=lam,
        symmetric=True,
        solver=hg.solvers.Dense(),
    )
    lines = dict(line.split("  ", 1) for line in str(hg.diagnostics.check(result)).splitlines() if "  " in line)
    products = lines["products for 1e-06"]
    assert all(each in products for each in ("GMRES 20", "Dense 20", "MINRES 146")) and "CG" not in products.split()
    assert "BiCGStab" in lines["no bound"] and "Optimizer" in lines["no bound"]
    assert all(each in lines["not valid"] for each in ("CG", "FixedPoint", "Neumann", "Nystrom"))


@pytest.mark.parametrize("name", REAL)
def test_the_products_suffice(name):
    """Each solver with a bound reaches the accuracy, in the norm of the bound, with that number of products."""
    s, rtol = REAL[name], 1e-5
    x, size = s.solutions[0], np.linalg.norm(s.b)
    for c in solver_choice(structure(s), rtol):
        if not c.valid or c.products is None or c.solver == "Auto":
            continue
        options = {"GMRES": {"restart": 200}}.get(c.solver, {})
        if c.solver != "Dense":
            options |= {"max_steps": c.products // PER_STEP.get(c.solver, 1) - (c.solver == "Neumann")}
        op = s.operator()
        got = getattr(hg.solvers, c.solver)(on_failure="ignore", **options)(op, s.rhs())
        error = got.value.numpy() - x
        if c.solver in ("MINRES", "GMRES", "NormalCG", "LSQR", "Dense"):
            reached = np.linalg.norm(s.a @ error) / size
        elif c.solver in ("CG", "BlockCG"):
            reached = math.sqrt(error @ s.a @ error / (x @ s.a @ x))
        else:
            reached = np.linalg.norm(error) / np.linalg.norm(x)
        assert reached <= rtol * (1 + 1e-6), (c, reached)
        assert op.products - 1 <= c.products + 1  # one is for the true residual


@pytest.mark.parametrize("name", REAL)
def test_what_is_not_valid_fails(name):
    s = REAL[name]
    valid = {c.solver: c.valid for c in solver_choice(structure(s), 1e-5)}
    assert valid["CG"] == s.definite[0] and valid["MINRES"] == s.symmetric[0] and valid["GMRES"] and valid["NormalCG"]
    rho = np.abs(np.linalg.eigvals(np.eye(s.n) - s.a)).max()
    assert valid["FixedPoint"] == (rho < 1)
    for solver in ("CG", "FixedPoint"):
        if not valid[solver] and (solver != "CG" or s.symmetric[0]):
            assert not getattr(hg.solvers, solver)(rtol=1e-5, on_failure="ignore")(s.operator(), s.rhs()).ok


@pytest.mark.parametrize("name", ["spd 10", "spd 100", "large"])
def test_neumann_by_its_step_size(name):
    """With the step size of the report, the best one, its number of products suffices; with a much larger one, none."""
    s = REAL[name]
    found = structure(s)
    values = np.linalg.eigvalsh(s.a)
    solver = hg.solvers.Neumann(step_size=2 / (values[0] + values[-1]))
    assert solver.valid_for(found) is None
    got = hg.solvers.Neumann(step_size=solver.step_size, max_steps=int(solver.products_needed(found, 1e-5)) - 1)(
        s.operator(), s.rhs()
    )
    assert np.linalg.norm(got.value.numpy() - s.solutions[0]) <= 1e-5 * np.linalg.norm(s.solutions[0])
    against = hg.solvers.Neumann(step_size=2.5 / values[-1]).valid_for(found)
    assert f"step_size={solver.step_size:.4g} converges" in against


def test_singular_systems():
    s = GRID["singular symmetric consistent"]
    choice = {c.solver: c for c in solver_choice(operator_structure(s.operator(), s.rhs()))}
    assert not choice["CG"].valid and choice["MINRES"].valid and choice["MINRES"].products is None
    assert not choice["BiCGStab"].valid


def test_low_rank_is_an_approximation_until_the_rank_is_full():
    found = structure(REAL["spd 100"])
    assert "an approximation" in hg.solvers.Nystrom(rank=2).valid_for(found)
    assert hg.solvers.Nystrom(rank=20).valid_for(found) is None
    assert "not positive semidefinite" in hg.solvers.Nystrom(rank=20).valid_for(structure(REAL["indefinite"]))


@pytest.mark.parametrize("rtol", [0.0, 1.0, 2.0])
def test_bad_accuracies(rtol):
    with pytest.raises(ValueError, match="between 0 and 1"):
        solver_choice(structure(REAL["identity"]), rtol)
