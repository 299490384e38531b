"""GaussNewton: its products are JᵀHJ + ∇²p, and where that is the Hessian its hypergradients are the plain ones."""

import pytest
import torch
from torch.func import grad, jacrev

import hypergrad as hg

S = hg.solvers
DOUBLE = {"dtype": torch.float64}


def data(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


X, Y = data(0, 30, 4), data(1, 30, 3).argmax(1)
LAM = torch.tensor(-1.0, **DOUBLE)


def cross_entropy(z, lam):
    return torch.nn.functional.cross_entropy(z, Y)


def penalty(w, lam):
    return lam.exp() * sum((leaf**2).sum() for leaf in w.values()) / 2


def linear(w, lam):
    return X @ w["a"]


def network(w, lam):
    return torch.tanh(X @ w["a"] * (2 + lam)) @ w["b"]


PARAMS = {"a": data(2, 4, 3), "b": data(3, 3, 3)}


def systems(model, w):
    """Flat w, JᵀHJ + ∇²p by dense differentiation."""
    keys, shapes = list(w), [x.shape for x in w.values()]

    def tree(flat):
        parts = flat.split([s.numel() for s in shapes])
        return {k: p.view(s) for k, p, s in zip(keys, parts, shapes, strict=True)}

    flat = torch.cat([x.reshape(-1) for x in w.values()])
    z = model(tree(flat), LAM)
    j = jacrev(lambda f: model(tree(f), LAM).reshape(-1))(flat)
    h = jacrev(grad(lambda z: cross_entropy(z.view(30, 3), LAM)))(z.reshape(-1))
    return flat, j.mT @ h @ j + jacrev(grad(lambda f: penalty(tree(f), LAM)))(flat), tree


def hypergradient(inner, w, solver, **options):
    lam = LAM.clone().requires_grad_()
    outer = lambda w, lam: sum((leaf**3).sum() for leaf in w.values())  # noqa: E731
    return hg.implicit.grad(outer, inner_loss=inner, params=w, hparams=lam, solver=solver, **options)


def quiet(make, **options):
    return make(on_failure="ignore", **options)


SOLVERS = {
    "CG": quiet(S.CG, rtol=1e-13),
    "MINRES": quiet(S.MINRES, rtol=1e-13),
    "Dense": quiet(S.Dense),
    "NormalCG": quiet(S.NormalCG, rtol=1e-13),
    "CG-Nystrom": quiet(S.CG, rtol=1e-13, preconditioner=S.Nystrom(rank=5)),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_adjoint_solves_the_gauss_newton_system(solver):
    """Also at a point where the Hessian is another matrix, and indefinite."""
    flat, a, tree = systems(network, PARAMS)
    plain = jacrev(grad(lambda f: cross_entropy(network(tree(f), LAM), LAM) + penalty(tree(f), LAM)))(flat)
    assert torch.linalg.eigvalsh(a).min() > 0 > torch.linalg.eigvalsh(plain).min()
    result = hypergradient(hg.operators.GaussNewton(network, cross_entropy, penalty), PARAMS, solver)
    v = torch.linalg.inv(a) @ (3 * flat**2)
    torch.testing.assert_close(torch.cat([x.reshape(-1) for x in result.adjoint.values()]), v, rtol=1e-9, atol=1e-11)

    def cross(lam):  # ∇₁g along v
        slope = grad(lambda f: cross_entropy(network(tree(f), lam), lam) + penalty(tree(f), lam))
        return slope(flat) @ v

    torch.testing.assert_close(result.grads, -grad(cross)(LAM), rtol=1e-9, atol=0)
    slope = grad(lambda f: cross_entropy(network(tree(f), LAM), LAM) + penalty(tree(f), LAM))(flat)
    torch.testing.assert_close(result.inner_residual, slope.norm(), rtol=1e-12, atol=0)
    assert result.solution.ok


def test_it_is_the_hessian_of_a_linear_model():
    w = {"a": PARAMS["a"]}
    gauss = hypergradient(hg.operators.GaussNewton(linear, cross_entropy, penalty), w, SOLVERS["CG"])
    plain = hypergradient(lambda w, lam: cross_entropy(linear(w, lam), lam) + penalty(w, lam), w, SOLVERS["CG"])
    torch.testing.assert_close(gauss.grads, plain.grads, rtol=1e-10, atol=0)


def test_without_a_penalty_and_with_damping():
    _, a, _ = systems(network, PARAMS)
    a = a - LAM.exp() * torch.eye(len(a), **DOUBLE)
    flat = torch.cat([x.reshape(-1) for x in PARAMS.values()])
    result = hypergradient(
        hg.operators.GaussNewton(network, cross_entropy), PARAMS, S.CG(rtol=1e-12, damping=0.1, on_failure="ignore")
    )
    v = torch.linalg.inv(a + 0.1 * torch.eye(len(a), **DOUBLE)) @ (3 * flat**2)
    torch.testing.assert_close(torch.cat([x.reshape(-1) for x in result.adjoint.values()]), v, rtol=1e-8, atol=1e-10)


def test_it_is_the_loss_that_it_stands_for():
    g = hg.operators.GaussNewton(network, cross_entropy, penalty)
    torch.testing.assert_close(g(PARAMS, LAM), cross_entropy(network(PARAMS, LAM), LAM) + penalty(PARAMS, LAM))


@pytest.mark.parametrize(
    ("inner", "kind", "error", "words"),
    [
        (hg.operators.GaussNewton(network, cross_entropy), "fp_map", TypeError, "pass a GaussNewton as inner_loss"),
        (hg.operators.GaussNewton(network, lambda z, lam: z), "inner_loss", ValueError, "loss must give a scalar"),
        (hg.operators.GaussNewton(lambda w, lam: 3.0, cross_entropy), "inner_loss", TypeError, "output of GaussNewton"),
        (hg.operators.GaussNewton(lambda w, lam: X @ X[:4, :3], cross_entropy), "inner_loss", ValueError, "depend"),
    ],
)
def test_bad_input(inner, kind, error, words):
    lam = LAM.clone().requires_grad_()
    with pytest.raises(error, match=words):
        hg.implicit.grad(lambda w, lam: w["a"].sum(), params=PARAMS, hparams=lam, **{kind: inner})


def test_parts_that_are_no_functions_are_named():
    for parts, name in (
        ((X, cross_entropy), "model"),
        ((linear, 1.0), "loss"),
        ((linear, cross_entropy, X), "penalty"),
    ):
        with pytest.raises(TypeError, match=f"GaussNewton: {name} must be a function, got (Tensor|float)"):
            hg.operators.GaussNewton(*parts)


def test_a_differentiable_minimiser_has_the_hessian():
    """argmin would use the Hessian of g, and not say so."""
    g = hg.operators.GaussNewton(network, cross_entropy, penalty)
    with pytest.raises(TypeError, match=r"only implicit\.grad takes a GaussNewton"):
        hg.implicit.argmin(g, PARAMS, LAM)
    with pytest.raises(TypeError, match=r"only implicit\.grad takes a GaussNewton"):
        hg.implicit.solver(argmin=g)(lambda lam: PARAMS)(LAM)


def test_params_of_any_form():
    """0-d, transposed, of two dtypes, an output that is a parameter, one that is constant; the models are linear."""
    x = data(4, 5, 3)
    cases = {
        "0-d": (data(5, 1)[0], lambda w, lam: w * x),
        "transposed": (data(5, 4, 3).T, lambda w, lam: x @ w),
        "two dtypes": ([data(5, 3), data(6, 2).float()], lambda w, lam: (x @ w[0], 2 * w[1])),
        "identity": (data(5, 3), lambda w, lam: w),
        "constant": ([data(5, 3)], lambda w, lam: {"a": w[0], "b": x}),
    }

    def power(tree, k):
        return sum((y.double() ** k).sum() for y in torch.utils._pytree.tree_leaves(tree))

    def loss(z, lam):
        return lam * power(z, 4)

    def ridge(w, lam):
        return lam.exp() * power(w, 2)

    for w, model in cases.values():
        plain = lambda w, lam, model=model: loss(model(w, lam), lam) + ridge(w, lam)  # noqa: E731
        grads = []
        for inner in (hg.operators.GaussNewton(model, loss, ridge), plain):
            lam = torch.tensor(0.3, **DOUBLE, requires_grad=True)
            options = {"params": w, "hparams": lam, "solver": S.Dense(on_failure="ignore")}
            grads.append(hg.implicit.grad(lambda w, lam: power(w, 3), inner_loss=inner, **options).grads)
        torch.testing.assert_close(*grads, rtol=1e-10, atol=0)
