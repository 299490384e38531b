"""The solver decorator under vmap: one run for all entries if vmap can execute it, otherwise one for each entry."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

import hypergrad as hg

A = torch.tensor([[1.0, 4.0], [9.0, 0.5], [2.0, 3.0]], dtype=torch.float64)


def residual(w: Tensor, a: Tensor) -> Tensor:
    return w**2 - a


def derivative(a: Tensor) -> Tensor:
    return torch.diag_embed(0.5 / a.sqrt())


def newton(a: Tensor) -> Tensor:
    w = torch.ones_like(a)
    for _ in range(60):
        w = torch.where((w**2 - a).abs() < 1e-15, w, (w + a / w) / 2)
    return w


def test_it_runs_once_for_all_entries() -> None:
    shapes = []

    @hg.implicit.solver(residual=residual)
    def fit(a: Tensor) -> Tensor:
        shapes.append(a.shape)
        return newton(a)

    torch.testing.assert_close(vmap(fit)(A), A.sqrt(), rtol=1e-14, atol=0)
    assert shapes == [(2,)]
    torch.testing.assert_close(vmap(jacrev(fit))(A), derivative(A), rtol=1e-10, atol=0)
    nested = vmap(vmap(jacrev(fit)))(A.view(1, 3, 2))
    torch.testing.assert_close(nested[0], derivative(A), rtol=1e-10, atol=0)
    assert shapes == [(2,)] * 3
    second = vmap(hessian(lambda a: (fit(a) ** 3).sum()))(A)
    torch.testing.assert_close(second, torch.diag_embed(0.75 / A.sqrt()), rtol=1e-8, atol=1e-12)


def by_numpy(a: Tensor) -> Tensor:
    return torch.from_numpy(np.sqrt(a.numpy()))


def by_branches(a: Tensor) -> Tensor:
    w = torch.ones_like(a)
    while (w**2 - a).abs().max() > 1e-14:
        w = (w + a / w) / 2
    return w


def by_optimiser(a: Tensor) -> Tensor:
    w = torch.ones_like(a).requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-14, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w**3 / 3 - a * w).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return newton_from(w.detach(), a)


def newton_from(w: Tensor, a: Tensor) -> Tensor:
    return (w + a / w) / 2


def by_gradients(attribute: bool) -> Callable[[Tensor], Tensor]:
    """torch.autograd.grad at a tensor made inside, which vmap does not map: it would get the gradient of a sum."""

    def compute(a: Tensor) -> Tensor:
        w = torch.ones(2, dtype=torch.float64, requires_grad=not attribute)
        if attribute:
            w = a.clone()
            w.requires_grad = True
        for _ in range(400):
            (g,) = torch.autograd.grad((w**3 / 3 - a * w).sum(), w)
            w = (w - 0.1 * g).detach()
            w.requires_grad = True
        return w.detach()

    return compute


def by_chance(generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    def compute(a: Tensor) -> Tensor:
        w = 1 + torch.rand(2, dtype=torch.float64, generator=generator)
        for _ in range(60):
            w = (w + a / w) / 2
        return w

    return compute


def by_memory() -> Callable[[Tensor], Tensor]:
    """It starts at its last solution."""
    kept = torch.ones(2, dtype=torch.float64)

    def compute(a: Tensor) -> Tensor:
        for _ in range(60):
            kept.copy_((kept + a / kept) / 2)
        return kept.clone()

    return compute


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "NumPy": by_numpy,
    "branches": by_branches,
    "an optimiser": by_optimiser,
    "autograd": by_gradients(False),
    "autograd at a copy": by_gradients(True),
    "random numbers": by_chance(None),
    "a generator": by_chance(torch.Generator().manual_seed(0)),
    "memory": by_memory(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_solver_that_vmap_cannot_run_is_run_for_each_entry(name: str) -> None:
    attempts = 0

    def counted(a: Tensor) -> Tensor:
        nonlocal attempts
        attempts += 1
        return REFUSED[name](a)

    fit = hg.implicit.solver(residual=residual)(counted)
    for expected in (len(A) + 1, 2 * len(A) + 1):  # one attempt by vmap fails, and there is no second one
        found = vmap(fit)(A)
        torch.testing.assert_close(found, A.sqrt(), rtol=1e-12, atol=0)
        assert attempts == expected
    torch.testing.assert_close(vmap(jacrev(fit))(A), derivative(A), rtol=1e-10, atol=0)


def test_an_error_of_the_users_function_passes_unchanged() -> None:
    @hg.implicit.solver(residual=residual)
    def fit(a: Tensor) -> Tensor:
        raise KeyError("no such solver")

    with pytest.raises(KeyError, match="no such solver"):
        vmap(fit)(A)


def test_further_outputs_beside_a_solution_are_refused() -> None:
    def frozen(a: Tensor) -> Any:
        return {"w": a.sqrt().requires_grad_(), "c": a + 1}

    fit = hg.implicit.solver(residual=lambda w, a: {"w": w["w"] ** 2 - a, "c": w["c"]})(frozen)
    with pytest.raises(NotImplementedError, match="frozen leaves"):
        vmap(lambda a: fit(a)["w"])(A)
    aux = hg.implicit.solver(residual=residual, has_aux=True)(lambda a: (a.sqrt(), "done"))
    with pytest.raises(NotImplementedError, match="has_aux"):
        vmap(aux)(A)


def test_an_inner_solver_within_a_solver() -> None:
    """The outer solver calls the inner one, and both run once for all entries."""
    runs = []

    @hg.implicit.solver(residual=lambda z, w: z - w / 3)
    def inner(w: Tensor) -> Tensor:
        return w / 3

    @hg.implicit.solver(residual=lambda w, a: w + inner(w) - a)
    def outer(a: Tensor) -> Tensor:
        runs.append(1)
        w = torch.zeros_like(a)
        for _ in range(80):
            w = a - inner(w)
        return w

    found = vmap(grad(lambda a: outer(a).sum()))(A)
    torch.testing.assert_close(found, torch.full_like(A, 0.75), rtol=1e-10, atol=0)
    assert runs == [1]
