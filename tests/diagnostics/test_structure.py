"""The structure of a linear system against dense eigen- and singular value decompositions in NumPy."""

import math

import numpy as np
import pytest
import torch

import hypergrad as hg
from helpers import dense_system, nothing_changed, problem_at
from hypergrad.diagnostics import operator_structure, solver_choice
from hypergrad.operators import LinearOperator, function, matrix
from problems import PROBLEMS
from systems import EPS, GRID, orthogonal, with_singular_values, with_spectrum
from test_oracles import forms

SINGLE = [name for name, s in GRID.items() if s.a.ndim == 2 and np.isfinite(s.a).all() and s.b.ndim]
BATCHED = [name for name, s in GRID.items() if s.a.ndim == 3 and np.isfinite(s.a).all()]


def of(a: np.ndarray, steps: int = 50, seed: int = 0, **tags: bool):
    """The structure of a matrix."""
    return operator_structure(
        matrix(torch.tensor(a), **tags),
        torch.zeros(a.shape[-1]).double(),
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
    )


def structure(steps: int = 50, **given):
    return hg.diagnostics.structure(hg.implicit.Problem(None, **given), steps=steps)


def jordan(n: int, eigenvalue: float, off: float) -> np.ndarray:
    return eigenvalue * np.eye(n) + off * np.eye(n, k=1)


def rotations(radius: float, n: int, seed: int = 0) -> np.ndarray:
    """A normal matrix with complex eigenvalues, the largest pair of modulus `radius`."""
    blocks, rng = np.zeros((n, n)), np.random.default_rng(seed)
    for i in range(0, n, 2):
        r, angle = radius * (1 - i / n), rng.uniform(0.3, 2.8)
        blocks[i : i + 2, i : i + 2] = r * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    q = orthogonal(rng, n)
    return q @ blocks @ q.T


def check_against_dense(found, a: np.ndarray) -> None:
    """Assert that every range contains the true number, and that a whole Krylov space gives the number itself."""
    n, j = len(a), np.eye(len(a)) - a
    sigma, q = np.linalg.svd(a, compute_uv=False), np.linalg.norm(j, 2)
    slack = 100 * n * EPS * max(sigma[0], 1.0)
    symmetric = np.allclose(a, a.T, rtol=0, atol=1e-10 * sigma[0])
    assert found.n == n and found.symmetric == symmetric and found.exact == (found.steps == n)
    assert found.norm <= sigma[0] + slack and found.least >= sigma[-1] - slack and found.contraction <= q + slack
    negligible = int((sigma <= 10 * math.sqrt(n) * EPS * sigma[0]).sum())
    assert found.negligible == negligible if found.exact else found.negligible <= negligible
    if negligible == 0:
        assert found.condition <= sigma[0] / sigma[-1] * (1 + 1e-9) + slack / sigma[-1]
    if symmetric:
        values = np.linalg.eigvalsh(a)
        assert found.eigenvalues[0] >= values[0] - slack and found.eigenvalues[-1] <= values[-1] + slack
        assert found.radius_at_least == found.radius <= np.abs(1 - values).max() + slack
        for theta, error in zip(found.eigenvalues, found.eigenvalue_errors, strict=True):
            assert np.abs(values - theta).min() <= error + slack
    else:
        assert found.definiteness == "none"
    if found.exact:
        for number, true in ((found.norm, sigma[0]), (found.least, sigma[-1]), (found.contraction, q)):
            assert abs(number - true) <= slack
        assert found.condition == math.inf if negligible else found.condition >= 0.999 * sigma[0] / sigma[-1]


@pytest.mark.parametrize("name", SINGLE)
def test_whole_space(name):
    s = GRID[name]
    found = operator_structure(s.operator(), s.rhs(), steps=100)
    check_against_dense(found, s.a)
    kinds = {
        (True, False): "positive",
        (False, True): "negative",
        (True, True): "indefinite",
        (False, False): "positive",
    }
    if s.symmetric[0]:
        values, zero = np.linalg.eigvalsh(s.a), 10 * math.sqrt(s.n) * EPS * s.norm[0]
        signs = bool((values > zero).any()), bool((values < -zero).any())
        assert found.definiteness.startswith(kinds[signs])
        assert found.definiteness.endswith("semidefinite") == (not all(signs) and bool((abs(values) <= zero).any()))


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("name", SINGLE)
def test_few_steps(name, steps):
    s = GRID[name]
    check_against_dense(operator_structure(s.operator(), s.rhs(), steps=steps), s.a)


@pytest.mark.parametrize("seed", range(8))
def test_bounds_of_large_matrices(seed):
    """Forty steps in 150 dimensions, over spectra of several forms: the extreme eigenvalues are nearly reached."""
    rng, n = np.random.default_rng(seed), 150
    spectra = [rng.uniform(0.1, 1, n), rng.uniform(-1, 1, n), np.logspace(-4, 0, n), rng.standard_normal(n) ** 3]
    for values in spectra:
        a = with_spectrum(values, seed)
        found = of(a, 40, seed, symmetric=True)
        check_against_dense(found, a)
        assert found.eigenvalues[0] - values.min() < 0.12 * found.norm
        tilted = a + rng.standard_normal((n, n)) / n
        check_against_dense(of(tilted, 40, seed), tilted)


def test_definiteness_is_proven_only_with_enough_ritz_values():
    """Two Ritz values prove that a matrix is indefinite; a proof that it is definite needs all of them."""
    a = with_spectrum(np.linspace(0.2, 1, 20))
    assert of(a).definiteness == of(a, 5).definiteness == "positive definite"
    assert of(-a).definiteness == "negative definite"
    one = with_spectrum(np.r_[-0.5, np.linspace(0.2, 1, 199)])
    assert of(one, 30).definiteness == "indefinite"
    assert "as far as seen" in str(of(a, 5)) and all("as far" not in str(found) for found in (of(a), of(one, 30)))


def test_multiplicity_of_zero():
    """When the Krylov space is exhausted a new random vector continues, so null spaces of any size are counted."""
    a = with_spectrum(np.r_[np.zeros(30), np.repeat([1.0, 2.0], 35)])
    assert of(a, 100).negligible == 30 and of(a, 20).negligible >= 3
    b = with_singular_values(np.r_[np.zeros(12), np.linspace(1, 2, 28)])
    assert of(b, 40).negligible == 12
    assert of(np.zeros((7, 7)), 4).negligible == 4


@pytest.mark.parametrize("n", [3, 6])
def test_contracting_in_the_long_run_alone(n):
    """A Jordan block with ρ(J) = 1/2 < 1 < ‖J‖."""
    j = jordan(n, 0.5, 3.0)
    found = of(np.eye(n) - j)
    assert found.radius_at_least <= 0.5 and found.radius == pytest.approx(0.5, abs=0.05)
    assert found.contraction == pytest.approx(np.linalg.norm(j, 2), rel=1e-12) and found.contraction > 1
    choice = {c.solver: c for c in solver_choice(found)}["FixedPoint"]
    assert choice.valid and choice.products == math.ceil(math.log(1e-6) / math.log(found.radius))


def test_nilpotent_of_large_norm():
    """All eigenvalues of this J are 0, but rounding gives some near .5, which must not be claimed as proven."""
    j = 3.0 * np.triu(np.ones((20, 20)), 1)
    found = of(np.eye(20) + j)
    assert found.radius_at_least == 0.0
    few = of(np.eye(60) - np.kron(np.eye(3), j), 40)
    assert few.radius_at_least == 0.0


@pytest.mark.parametrize("radius", [0.6, 0.97, 1.2])
@pytest.mark.parametrize("steps", [40, 60])
def test_complex_pairs(radius, steps):
    found = of(np.eye(60) - rotations(radius, 60), steps)
    assert found.radius == pytest.approx(radius, rel=1e-9 if steps == 60 else 1e-3)
    assert 0.95 * radius < found.radius_at_least <= radius + 1e-12
    assert any(abs(z.imag) > 0.1 for z in found.eigenvalues)
    assert {c.solver: c.valid for c in solver_choice(found)}["FixedPoint"] == (radius < 1)


@pytest.mark.parametrize("name", BATCHED)
def test_batched(name):
    """The report is that of the worst system, and does not depend on the other systems of the batch."""
    s = GRID[name]
    found = operator_structure(s.operator(), s.rhs(), steps=100)
    a = s.matrices[found.system]
    if all(s.symmetric):
        check_against_dense(found, a)
    else:
        assert found.norm == pytest.approx(np.linalg.norm(a, 2), rel=1e-10)
        assert found.least == pytest.approx(np.linalg.norm(a, -2), rel=1e-6, abs=1e-13)
    assert found.system == (np.argmin(s.regular) if not all(s.regular) else np.argmax(s.condition))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "equilibrium")) for n in PROBLEMS])
def test_problems(name):
    p = problem_at(name)
    for form in forms(p):
        options = {"symmetric": p.symmetric, "batch_dims": p.batch_dims, form: getattr(p, form)}
        with nothing_changed(p.params, p.hparams):
            found = structure(params=p.params, hparams=p.hparams, steps=60, **options)
        a = dense_system(name, form)[0].T
        assert found.symmetric == p.symmetric == found.declared_symmetric
        if p.batch_dims:
            assert found.condition == pytest.approx(p.condition, rel=1e-8) and found.n == 20
            continue
        assert found.condition <= p.condition * (1 + 1e-6)
        if found.exact:
            assert found.condition == pytest.approx(np.linalg.cond(a), rel=1e-8)
            if form == "fp_map":
                assert found.contraction == pytest.approx(p.contraction, rel=1e-8)
        assert found.norm <= np.linalg.norm(a, 2) * (1 + 1e-9)


def test_wrongly_declared_symmetric():
    """The asymmetry is found, and a problem's other results stay right; an operator has no transpose to compare."""
    p = problem_at("contraction-.9")
    plain = structure(params=p.params, hparams=p.hparams, fp_map=p.fp_map)
    found = structure(params=p.params, hparams=p.hparams, fp_map=p.fp_map, symmetric=True)
    assert found.declared_symmetric and not found.symmetric and found.asymmetry > 1e-3
    assert found.contraction == plain.contraction and "though declared" in str(found)
    a = with_singular_values(np.linspace(1, 2, 20))
    wrong = of(a, symmetric=True)
    assert not wrong.symmetric
    check_against_dense(wrong, a)
    check_against_dense(of(a, 8, symmetric=True), a)


def test_without_a_transposed_product():
    a = torch.tensor(GRID["contraction .8"].a)
    for steps in (6, 20):
        found = operator_structure(
            LinearOperator(lambda v: v.space.vector(a @ v.tree, "Av")), torch.zeros(20).double(), steps=steps
        )
        check_against_dense(found, a.numpy())
        assert found.exact == (steps == 20)


def test_trees_and_cost():
    """A tree of tensors gives the same numbers, with the documented products; generator= decides the random vectors."""
    a = with_singular_values(np.linspace(1, 2, 12))

    def as_tree(m):
        return lambda v: (lambda flat: {"x": flat[:4].reshape(2, 2), "y": flat[4:]})(
            torch.tensor(m) @ torch.cat([v["x"].reshape(-1), v["y"]])
        )

    op, like = function(as_tree(a), as_tree(a.T)), {"x": torch.zeros(2, 2).double(), "y": torch.zeros(8).double()}
    state = torch.get_rng_state()
    found = operator_structure(op, like)
    assert torch.equal(state, torch.get_rng_state())
    check_against_dense(found, a)
    assert found.products == op.products == 2 * 3 + 12
    assert operator_structure(op, like) == found
    assert operator_structure(op, like, generator=torch.Generator().manual_seed(1)) != found
    sym = matrix(torch.tensor(a + a.T), symmetric=True)
    assert operator_structure(sym, torch.zeros(12).double(), steps=5).products == 2 * 3 + 5


def test_float32():
    a = with_spectrum(np.logspace(-3, 0, 30))
    found = operator_structure(matrix(torch.tensor(a).float()), torch.zeros(30))
    assert found.symmetric and found.definiteness == "positive definite" and found.negligible == 0
    assert found.condition == pytest.approx(1000, rel=1e-3)
    singular = with_spectrum(np.r_[0.0, np.logspace(-3, 0, 29)])
    found = operator_structure(matrix(torch.tensor(singular).float()), torch.zeros(30))
    assert found.negligible == 1 and found.definiteness == "positive semidefinite"


@pytest.mark.parametrize("name", ["spd 1e3", "nonsymmetric 1e3", "singular consistent", "zero"])
def test_print(name):
    s = GRID[name]
    found = operator_structure(s.operator(), s.rhs(), steps=10)
    assert found.n == 20 and found.steps == 10 == len(found.eigenvalues) and not found.exact
    assert "condition number" in str(found) and "nan" not in str(found)


def test_bad_input():
    op = matrix(torch.eye(3))
    for options in ({"steps": 0}, {"steps": 2.5}):
        with pytest.raises(ValueError, match="must be a whole number ≥ 1"):
            operator_structure(op, torch.zeros(3), **options)
    with pytest.raises(ValueError, match="NaN or infinity"):
        operator_structure(matrix(torch.full((3, 3), torch.nan)), torch.zeros(3))
    w, lam = torch.ones(3), torch.ones(3, requires_grad=True)
    with pytest.raises(TypeError, match="inner_loss must be a function"):
        structure(params=w.requires_grad_(), hparams=lam, inner_loss=(w * lam).sum())
