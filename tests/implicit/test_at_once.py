"""Systems with many right-hand sides, and many small systems: each matrix is factorised once for all its sides."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad as hg

S, implicit = hg.solvers, hg.implicit
B, N = 7, 4
SOLVERS = {
    "default": None,
    "Dense": S.Dense(),
    "GMRES": S.GMRES(rtol=1e-13),
    "function": lambda op, b, x0: exact(op, b),
}


def exact(op: hg.operators.LinearOperator, b: hg.Vector) -> hg.Vector:
    """A user's own solver: GMRES to rounding."""
    return S.GMRES(rtol=1e-13, on_failure="ignore")(op, b).value


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Operations(TorchDispatchMode):
    """Counts operations by name, and records the size of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.largest = Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        tensors = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() // x.element_size() for x in tensors)])
        return result


@contextmanager
def watched() -> Iterator[Operations]:
    with Operations() as seen:
        yield seen


def problem(dtype: torch.dtype = torch.float64, n: int = N, count: int = B) -> tuple[Any, Tensor, Tensor]:
    """F(w, a) = w³ + 2w + Mw − a² and points (w, a) where it vanishes."""
    m = 0.3 * torch.randn(n, n, dtype=torch.float64)
    w = 2 * torch.rand(count, n, dtype=torch.float64) - 1
    a = (w**3 + 2 * w + w @ m.mT + 20).sqrt()
    m, w, a = (x.to(dtype) for x in (m, w, a))
    return (lambda w, a: w**3 + 2 * w + m @ w + 20 - a**2), w, a


def derivative(residual: Any, w: Tensor, a: Tensor) -> Tensor:
    """dw/da of each, by dense Jacobians."""
    j, p = vmap(jacrev(residual, argnums=(0, 1)))(w, a)
    return -torch.linalg.inv(j) @ p


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians_of_many_solutions(solver: str, transform: Any) -> None:
    residual, w, a = problem()
    found = vmap(transform(lambda a, w: implicit.root(residual, w, a, solver=SOLVERS[solver])))(a, w)
    torch.testing.assert_close(found, derivative(residual, w, a), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["default", "Dense"])
def test_each_matrix_is_factorised_once(solver: str) -> None:
    residual, w, a = problem()
    info = implicit.Info()
    with watched() as seen:
        vmap(jacrev(lambda a, w: implicit.root(residual, w, a, solver=SOLVERS[solver], info=info)))(a, w)
    assert seen.counts["linalg_lu_factor_ex"] == seen.counts["linalg_lu_solve"] == info.solves == 1
    assert seen.largest <= B * N * N
    assert info.solution is not None and info.solution.residual_norm.shape == (N, B)
    assert info.solution.method == f"Dense: {N} right hand sides at once" and info.solution.ok
    assert bool((info.solution.relative_residual < 1e-13).all())


def test_single_precision() -> None:
    residual, w, a = problem(torch.float32)
    found = vmap(jacrev(lambda a, w: implicit.root(residual, w, a)))(a, w)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, derivative(residual, w, a), rtol=1e-4, atol=1e-5)


def test_a_map_and_a_minimum() -> None:
    _, w, a = problem()
    m = 0.1 * torch.randn(N, N, dtype=torch.float64)
    phi = lambda w, a: torch.tanh(m @ w + a)  # noqa: E731
    for _ in range(80):
        w = vmap(phi)(w, a)
    found = vmap(jacrev(lambda a, w: implicit.fixed_point(phi, w, a)))(a, w)
    torch.testing.assert_close(found, derivative(lambda w, a: w - phi(w, a), w, a), rtol=1e-10, atol=1e-12)
    loss = lambda w, a: (w**4).sum() / 4 + w @ w + w @ m @ w - a @ w  # noqa: E731
    a = vmap(grad(lambda w: loss(w, torch.zeros_like(w))))(w)
    with watched() as seen:
        found = vmap(jacrev(lambda a, w: implicit.argmin(loss, w, a)))(a, w)
    assert seen.counts["linalg_cholesky_ex"] == 1 and not seen.counts["linalg_lu_factor_ex"]
    torch.testing.assert_close(found, derivative(grad(loss), w, a), rtol=1e-10, atol=1e-12)


def test_one_system_and_a_jacobian_outside_the_map() -> None:
    residual, w, a = problem()
    expected = derivative(residual, w, a)
    with watched() as seen:
        found = jacrev(lambda a: implicit.root(residual, w[0], a))(a[0])
    assert seen.counts["linalg_lu_factor_ex"] == 1
    torch.testing.assert_close(found, expected[0], rtol=1e-10, atol=1e-12)
    outside = jacrev(lambda a: vmap(lambda a, w: implicit.root(residual, w, a))(a, w))(a)
    torch.testing.assert_close(outside, torch.einsum("bij,bc->bicj", expected, torch.eye(B, dtype=a.dtype)))
    batched = jacrev(lambda a: implicit.root(vmap(residual), w, a, batch_dims=1))(a)
    torch.testing.assert_close(batched, outside)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_jacobian_with_respect_to_a_hyperparameter_shared_by_all_entries(solver: str) -> None:
    """Neither vmap maps the shared hyperparameter; the rows of its Jacobian are the derivatives of the entries."""
    residual, w, a = problem()
    scale = torch.tensor(1.0, dtype=torch.float64)
    shared = lambda w, h: residual(w, h[0] * h[1])  # noqa: E731
    one = lambda s, a, w: implicit.root(shared, w, (s, a), solver=SOLVERS[solver])  # noqa: E731
    found = vmap(jacrev(one, argnums=(0, 1)), in_dims=(None, 0, 0))(scale, a, w)
    expected = derivative(residual, w, a)
    torch.testing.assert_close(found[1], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0], (expected @ a.unsqueeze(-1)).squeeze(-1), rtol=1e-10, atol=1e-12)


def curved(residual: Any, w: Tensor, a: Tensor) -> Tensor:
    """w(a) by two steps of Newton's method: its first and second derivatives."""
    for _ in range(2):
        w = w - torch.linalg.inv(jacrev(residual)(w, a)) @ residual(w, a)
    return w


SECOND = {
    "hessian": lambda f: hessian(lambda a, w: (f(a, w) ** 3).sum()),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jvp(jacrev)": lambda f: lambda a, w: jvp(lambda a: jacrev(f)(a, w), (a,), (a.sin(),))[1],
    "vjp(jacrev)": lambda f: lambda a, w: vjp(lambda a: jacrev(f)(a, w), a)[1](torch.outer(w, a))[0],
}


@pytest.mark.parametrize("solver", ["default", "Dense", "GMRES"])
@pytest.mark.parametrize("transform", SECOND)
def test_second_derivatives_of_many_solutions(transform: str, solver: str) -> None:
    residual, w, a = problem(count=3)
    found = vmap(SECOND[transform](lambda a, w: implicit.root(residual, w, a, solver=SOLVERS[solver])))(a, w)
    truth = vmap(SECOND[transform](lambda a, w: curved(residual, w, a)))(a, w)
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-9)


def test_backward_through_a_jacobian() -> None:
    """Plain autograd differentiates a Jacobian that torch.func has computed."""
    residual, w, a = problem(count=3)
    grads = []
    for solution in (lambda a, w: implicit.root(residual, w, a), lambda a, w: curved(residual, w, a)):
        leaf = a.clone().requires_grad_()
        (vmap(jacrev(solution))(leaf, w) ** 2).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-9)


def test_a_map_over_maps() -> None:
    residual, w, a = problem(count=6)
    found = vmap(vmap(jacrev(lambda a, w: implicit.root(residual, w, a))))(a.view(2, 3, N), w.view(2, 3, N))
    torch.testing.assert_close(found.flatten(0, 1), derivative(residual, w, a), rtol=1e-10, atol=1e-12)
    pulled = vjp(lambda a: vmap(lambda a, w: implicit.root(residual, w, a))(a, w), a)[1]
    cotangents = torch.randn(2, 5, *w.shape, dtype=w.dtype)
    (bars,) = vmap(vmap(pulled))(cotangents)
    expected = torch.einsum("pqbi,bij->pqbj", cotangents, derivative(residual, w, a))
    torch.testing.assert_close(bars, expected, rtol=1e-10, atol=1e-12)


def test_solutions_and_hyperparameters_in_containers() -> None:
    """Leaves of several shapes, one of them unused and one a whole number."""
    m = 3 * torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, dtype=torch.float64)
    unused, power = torch.ones(2, dtype=torch.float64), torch.tensor(1)

    def residual(w: dict[str, Tensor], h: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = m @ torch.cat([w["a"].reshape(-1), w["b"].reshape(-1)]) ** h["power"]
        z = torch.complex(h["re"], h["im"]).square()
        flat = flat - torch.cat([z.real, z.imag * h["x"], h["x"] ** 2])
        return {"a": flat[:2].view(1, 2), "b": flat[2:].view(2, 2)}

    re, im, x = torch.randn(3, 3, 2, dtype=torch.float64)

    def explicit(re: Tensor, im: Tensor, x: Tensor) -> Tensor:
        z = torch.complex(re, im).square()
        return torch.linalg.inv(m) @ torch.cat([z.real, z.imag * x, x**2])

    def solved(re: Tensor, im: Tensor, x: Tensor) -> Tensor:
        flat = explicit(re, im, x).detach()
        h = {"re": re, "im": im, "x": x, "unused": unused, "power": power}
        found = implicit.root(residual, {"a": flat[:2].view(1, 2), "b": flat[2:].view(2, 2)}, h)
        return torch.cat([found["a"].reshape(-1), found["b"].reshape(-1)])

    for number in (0, 1, 2):
        found, truth = (vmap(jacrev(f, argnums=number))(re, im, x) for f in (solved, explicit))
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


def test_complex_hyperparameters() -> None:
    """The cotangents of w̄ = e₁ … e_k in a complex λ, of several systems at once."""
    z = torch.randn(3, 2, dtype=torch.complex128)
    root = lambda z: implicit.root(lambda w, z: w - (z**2).imag, (z**2).imag.detach(), z)  # noqa: E731
    units = torch.eye(2, dtype=torch.float64)
    for f in (root, lambda z: (z**2).imag):
        found = vmap(lambda z, f=f: vmap(vjp(f, z)[1])(units)[0])(z)
        torch.testing.assert_close(found, -2j * torch.diag_embed(z.conj()) * -1, rtol=1e-12, atol=1e-12)


def test_the_undamped_and_the_damped_system() -> None:
    residual, w, a = problem()
    found = vmap(jacrev(lambda a, w: implicit.root(residual, w, a, solver=S.Dense(damping=0.5))))(a, w)
    j, p = vmap(jacrev(residual, argnums=(0, 1)))(w, a)
    truth = -torch.linalg.inv(j + 0.5 * torch.eye(N, dtype=w.dtype)) @ p
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", ["default", "Dense"])
def test_the_warning_names_the_singular_system(solver: str) -> None:
    """One of three systems is singular; the warning names it, and the results of the others are right."""
    scale = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    a = torch.randn(3, 2, dtype=torch.float64)
    residual = lambda w, h: torch.stack([w[0] - h[0][0], h[1] * w[1] - h[0][1]])  # noqa: E731
    w = torch.stack([a[:, 0], torch.where(scale == 0, 0.0, a[:, 1] / scale)], 1)
    info = implicit.Info()
    attach = lambda a, s, w: implicit.root(residual, w, (a, s), solver=SOLVERS[solver], info=info)  # noqa: E731
    with pytest.warns(hg.HypergradientWarning):
        found = vmap(jacrev(attach))(a, scale, w)
    assert info.solution is not None
    codes = info.solution.code
    assert codes.shape == (2, 3) and [bool(code > 1) for code in codes[1]] == [False, True, False]
    for i in (0, 2):
        truth = torch.diag(torch.tensor([1.0, 1 / float(scale[i])], dtype=torch.float64))
        torch.testing.assert_close(found[i], truth, rtol=1e-6, atol=1e-8)


def test_a_maximum_is_no_minimum() -> None:
    a = torch.randn(3, 2, dtype=torch.float64)
    with pytest.warns(hg.NotConverged, match="NOT_POSITIVE_DEFINITE"):
        vmap(jacrev(lambda a: implicit.argmin(lambda w, a: -((w - a) ** 2).sum(), a.detach(), a)))(a)


def test_a_false_declaration_of_symmetry_is_noticed() -> None:
    residual, w, a = problem()
    info = implicit.Info()
    vmap(jacrev(lambda a, w: implicit.root(residual, w, a, symmetric=True, info=info)))(a, w)
    assert info.solution is not None and not info.solution.method.startswith("Dense")


def test_nan_is_warned_of() -> None:
    residual, w, a = problem()
    w[1, 2] = torch.nan
    with pytest.warns(hg.HypergradientWarning):
        found = vmap(jacrev(lambda a, w: implicit.root(residual, w, a)))(a, w)
    assert bool(found[1].isnan().any()) and bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("n", [3, 40])
def test_small_systems_are_factorised_by_default(n: int) -> None:
    """A pass with one right-hand side for each system factorises small systems, and iterates for larger ones."""
    residual, w, a = problem(n=n)
    a.requires_grad_()
    info = implicit.Info()
    with watched() as seen:
        implicit.root(vmap(residual), w, a, batch_dims=1, info=info).sum().backward()
    assert seen.counts["linalg_lu_factor_ex"] == (n == 3)
    expected = derivative(residual, w, a.detach()).sum(-2)
    torch.testing.assert_close(a.grad, expected, rtol=1e-4, atol=1e-4)
    assert info.solution is not None and info.solution.method.startswith("Dense" if n == 3 else "GMRES")


def test_a_number_of_steps_is_kept_to() -> None:
    """Without a tolerance the default solver takes exactly max_steps."""
    residual, w, a = problem()
    a.requires_grad_()
    info = implicit.Info()
    solver = S.Auto(max_steps=2, on_failure="ignore")
    implicit.root(vmap(residual), w, a, batch_dims=1, info=info, solver=solver).sum().backward()
    assert info.solution is not None and info.solution.method.startswith("GMRES")
    vmap(jacrev(lambda a, w: implicit.root(residual, w, a, info=info, solver=solver)))(a.detach(), w)
    assert info.solution.method.startswith("GMRES")
