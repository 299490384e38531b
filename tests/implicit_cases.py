"""Solution maps for the tests of implicit functions, with oracles that share no code with the library.

The oracle is Newton's method. k exact steps w ← w − (∂₁F)⁻¹F from the solution, by dense Jacobians and LU factors, have
the right derivatives in λ up to order 2ᵏ − 1 under autograd and torch.func alike. All vectors are flat.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev

import hypergrad as hg

S, implicit = hg.solvers, hg.implicit
Info, WarmStart = implicit.Info, implicit.WarmStart
ADJOINTS = {"Dense": S.Dense(), "GMRES": S.GMRES(rtol=1e-14)}
FORMS = {"residual": implicit.root, "fixed_point": implicit.fixed_point, "argmin": implicit.argmin}

# name: (transform, order of the derivative)
FIRST = {"grad": grad, "jacrev": jacrev, "jacfwd": jacfwd}
SECOND = {
    "hessian": torch.func.hessian,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacfwd(jacrev)": lambda f: jacfwd(jacrev(f)),
    "jacfwd(grad)": lambda f: jacfwd(grad(f)),
    "jacrev(grad)": lambda f: jacrev(grad(f)),
}
TRANSFORMS = FIRST | SECOND
TOLERANCES = {1: 1e-10, 2: 1e-8, 3: 1e-7}


@dataclass(frozen=True)
class Case:
    """An inner problem on flat vectors, with its λ.

    `user` is the loss or map that the library gets, of the kind `form`; `residual` is the same problem as F, by hand.
    """

    name: str
    form: str
    user: Callable[[Tensor, Tensor], Tensor]
    residual: Callable[[Tensor, Tensor], Tensor]
    hparams: Tensor
    n: int

    @property
    def solution(self) -> Tensor:
        return solution_of(self)

    def solve(self, h: Tensor) -> Tensor:
        """w(λ) to rounding: SciPy's solution, improved by three Newton steps."""
        h = h.detach()
        found = scipy.optimize.root(
            lambda w: self.residual(torch.from_numpy(w), h).numpy(), np.zeros(self.n), tol=1e-10
        )
        w = torch.from_numpy(found.x)
        for _ in range(3):
            w = w - newton_step(self.residual, w, h)
        assert found.success and self.residual(w, h).norm() <= 1e-14 * self.n, f"{self.name}: not solved"
        return w

    def attach(self, w: Tensor, h: Tensor, **options: Any) -> Tensor:
        """w as the library's function of λ."""
        return FORMS[self.form](self.user, w, h, **options)

    def outer(self, w: Tensor, h: Tensor) -> Tensor:
        """An outer loss that is nonlinear in w and in λ."""
        return (w.sin() + 0.3 * w**2).sum() + (w[0] * h).tanh().sum()

    def value(self, w: Tensor, h: Tensor, **options: Any) -> Tensor:
        """f(λ) = E(w(λ), λ) with derivatives from the library."""
        return self.outer(self.attach(w, h, **options), h)

    def random_hparams(self, count: int, spread: float = 0.2) -> Tensor:
        draw = np.random.default_rng(3).standard_normal((count, *self.hparams.shape))
        return self.hparams + spread * torch.from_numpy(draw)


@cache
def solution_of(case: Case) -> Tensor:
    return case.solve(case.hparams)


def newton_step(residual: Callable[[Tensor, Tensor], Tensor], w: Tensor, h: Tensor) -> Tensor:
    """(∂₁F)⁻¹ F."""
    factors = torch.linalg.lu_factor(jacrev(residual)(w, h))
    return torch.linalg.lu_solve(*factors, residual(w, h)[:, None])[:, 0]


def newton(residual: Callable[[Tensor, Tensor], Tensor], w: Tensor, h: Tensor, steps: int = 2) -> Tensor:
    """w(λ) by Newton steps from the solution w, with the right derivatives up to order 2^steps − 1."""
    w = w.detach()
    for _ in range(steps):
        w = w - newton_step(residual, w, h)
    return w


@cache
def oracle(case: Case, order: int, scalar: bool = True) -> Tensor:
    """The derivative of this order of f (of w itself if not scalar) at the case's λ, through Newton's steps."""
    return oracle_at(case, case.solution, case.hparams, order, scalar)


def oracle_at(case: Case, w: Tensor, h: Tensor, order: int, scalar: bool = True) -> Tensor:
    def f(h: Tensor) -> Tensor:
        solution = newton(case.residual, w, h)
        return case.outer(solution, h) if scalar else solution

    for _ in range(order):
        f = jacrev(f)
    return f(h)


def tanh(n: int, norm: float, form: str = "fixed_point", full: bool = False) -> Case:
    """w = tanh(diag(g) W w + b) with ‖W‖₂ = norm and W not symmetric; λ is (g, b), or (W, b) if `full`.

    The residual form is ½(1 + w²)(w − Φ(w)), whose Jacobian is not that of the fixed point map.
    """
    rng = np.random.default_rng(n)
    draw = rng.standard_normal((n, n))
    matrix = torch.from_numpy(draw * (norm / np.linalg.norm(draw, 2)))
    bias = 0.5 * torch.from_numpy(rng.standard_normal(n))

    def phi(w: Tensor, h: Tensor) -> Tensor:
        if full:
            return torch.tanh(h[: n * n].reshape(n, n) @ w + h[n * n :])
        return torch.tanh(h[:n] * (matrix @ w) + h[n:])

    def residual(w: Tensor, h: Tensor) -> Tensor:
        return w - phi(w, h)

    def scaled(w: Tensor, h: Tensor) -> Tensor:
        return 0.5 * (1 + w**2) * (w - phi(w, h))

    first = matrix.reshape(-1) if full else 1.0 + 0.1 * torch.from_numpy(rng.standard_normal(n))
    user = {"fixed_point": phi, "residual": scaled}[form]
    return Case(f"tanh-{n}-{norm}-{form}", form, user, residual, torch.cat([first, bias]), n)


def entropy(n: int) -> Case:
    """argmin log Σ exp(Xw) + ½ Σ e^λ w² + λᵀBw: strictly convex, not quadratic."""
    rng = np.random.default_rng(n + 100)
    x, b = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((3 * n, n), (n, n)))

    def loss(w: Tensor, h: Tensor) -> Tensor:
        return torch.logsumexp(x @ w, 0) + 0.5 * (h.exp() * w * w).sum() + h @ (b @ w)

    def residual(w: Tensor, h: Tensor) -> Tensor:
        return x.T @ torch.softmax(x @ w, 0) + h.exp() * w + b.T @ h

    return Case(f"entropy-{n}", "argmin", loss, residual, torch.zeros(n).double(), n)


CASES = {
    case.name: case
    for case in (
        tanh(5, 0.9),
        tanh(5, 0.9, "residual", full=True),
        tanh(12, 0.95),
        tanh(30, 2.0, "residual"),  # no contraction
        entropy(5),
        entropy(7),
    )
}


def adjoints_for(case: Case) -> list[str]:
    return [*ADJOINTS, *(["CG", "MINRES"] if case.form == "argmin" else [])]


def adjoint_named(name: str) -> Any:
    return ADJOINTS.get(name) or {"CG": S.CG(rtol=1e-14), "MINRES": S.MINRES(rtol=1e-14)}[name]


def rel(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖, in float64."""
    assert value.shape == truth.shape, f"{tuple(value.shape)} is not {tuple(truth.shape)}"
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def picard(phi: Callable[[Tensor, Tensor], Tensor], w: Tensor, h: Tensor, steps: int = 400) -> Tensor:
    """w ← Φ(w, λ) through autograd: a second oracle for contractions Φ."""
    for _ in range(steps):
        w = phi(w, h)
    return w


square_root = partial(implicit.root, lambda w, a: w**2 - a)
