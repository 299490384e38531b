"""Each finding is reported if it holds, and is not reported if it does not."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hypergrad as hg
from helpers import nothing_changed, problem_at
from hypergrad._modules import modules_of
from problems import PROBLEMS, elastic_net
from systems import with_singular_values, with_spectrum
from test_oracles import forms

N = 12


def findings(outer_loss, **given) -> tuple[hg.diagnostics.Finding, ...]:
    problem = hg.implicit.Problem(outer_loss, **given)
    return hg.diagnostics.findings(problem, hg.diagnostics.structure(problem))


def names(*args, **options) -> list[str]:
    return [each.name for each in findings(*args, **options)]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def outer(w, lam):
    return (w - 1).square().sum()


def quadratic(a: np.ndarray):
    """½(w − λ)ᵀA(w − λ), at a random w and λ."""
    m = torch.tensor(a)
    w, lam = rand(len(a)), rand(len(a), seed=1).requires_grad_()
    return {"inner_loss": lambda w, lam: 0.5 * (w - lam) @ m @ (w - lam), "params": w, "hparams": lam}


def linear_map(j: np.ndarray):
    m = torch.tensor(j)
    return {
        "fp_map": lambda w, lam: m @ w + lam,
        "params": rand(len(j)),
        "hparams": rand(len(j), seed=1).requires_grad_(),
    }


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "equilibrium"])
def test_nothing_is_wrong_with_the_reference_problems(name, seed):
    """The residuals at their solutions are rounding errors, which matter only for ill-conditioned problems."""
    p = problem_at(name, seed)
    for form in forms(p):
        given = {"params": p.params, "hparams": p.hparams, form: getattr(p, form)}
        with nothing_changed(p.params, p.hparams):
            found = findings(p.outer_loss, symmetric=p.symmetric, batch_dims=p.batch_dims, **given)
        assert [each.name for each in found] in ([], ["rounding floor"][: p.condition > 1e4])


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "equilibrium"])
def test_the_reference_problems_in_float32(name):
    """Residuals at solutions rounded to float32 are rounding errors, and distances grow with the condition number."""
    p = problem_at(name, dtype=torch.float32)
    for form in forms(p):
        given = {"params": p.params, "hparams": p.hparams, form: getattr(p, form)}
        found = findings(p.outer_loss, symmetric=p.symmetric, batch_dims=p.batch_dims, **given)
        assert [each.name for each in found] == ["singular"] * (p.condition > 1e4) + ["rounding floor"]
        assert 1e-8 < found[-1].numbers["distance"] < 10 * p.condition * torch.finfo(torch.float32).eps


# --- the system -------------------------------------------------------------------------------------------------------


def test_not_symmetric():
    j = 0.5 * with_singular_values(np.linspace(0.5, 1, N))
    (found,) = findings(outer, symmetric=True, **linear_map(j))
    assert found.name == "not symmetric" and found.numbers["asymmetry"] > 1e-3 and "GMRES" in found.message
    assert names(outer, **linear_map(j)) == []
    assert names(outer, symmetric=True, **linear_map(j + j.T)) == []
    assert names(outer, positive_definite=True, **linear_map(j)) == ["not symmetric"]


def test_systems_that_are_not_independent():
    """batch_dims=1 is the only declaration, so the message names it."""
    coupled = findings(
        lambda w, h: (w**2).sum(),
        inner_loss=lambda w, h: (w.sum(0) ** 2).sum() / 2 + (w**2).sum() / 2 - (w * h).sum(),
        params=torch.randn(3, 4, dtype=torch.float64),
        hparams=torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        batch_dims=1,
    )
    message = next(each.message for each in coupled if each.name == "not symmetric")
    assert "batch_dims=1 are not independent" in message and "leave the declaration out" not in message


def test_indefinite():
    (found,) = findings(outer, **quadratic(with_spectrum(np.r_[-0.3, -0.1, np.linspace(0.1, 1, N - 2)])))
    assert found.name == "indefinite" and found.numbers["negative"] == 2
    assert found.numbers["least eigenvalue"] == pytest.approx(-0.3, rel=1e-9)
    assert names(outer, **quadratic(with_spectrum(np.linspace(1e-6, 1, N)))) == []
    j = with_spectrum(np.linspace(0.1, 0.9, N))
    assert names(outer, symmetric=True, **linear_map(j)) == []
    m = torch.tensor(with_spectrum(np.linspace(-1, 1, N)))
    form = {"residual": lambda w, lam: m @ w - lam, "params": rand(N), "hparams": rand(N).requires_grad_()}
    assert names(outer, symmetric=True, **form) == [] and names(outer, positive_definite=True, **form) == ["indefinite"]


def test_indefinite_in_a_large_space():
    """Fifty steps find one negative eigenvalue in 400 dimensions."""
    values = np.r_[-0.05, np.linspace(0.05, 1, 399)]
    assert names(outer, **quadratic(with_spectrum(values))) == ["indefinite"]


def test_singular():
    """Only the sum of two weights matters, so one direction has no curvature."""
    (found,) = findings(outer, **quadratic(with_spectrum(np.r_[0, 0, 0, np.linspace(0.1, 1, N - 3)])))
    assert found.name == "singular" and found.numbers["negligible"] == 3 and "3 singular values of 12" in found.message
    x, y = rand(30, 4), rand(30, seed=3)
    loss = lambda w, lam: ((x @ (w[0] + w[1]) - y).square() * lam).mean()  # noqa: E731
    given = {"params": [rand(4), rand(4, seed=5)], "hparams": rand(30).abs().requires_grad_()}
    (found,) = findings(lambda w, lam: outer(w[0], lam), inner_loss=loss, **given)
    assert found.name == "singular" and found.numbers["negligible"] == 4
    penalised = lambda w, lam: loss(w, lam) + 1e-3 * sum(v.square().sum() for v in w)  # noqa: E731
    assert names(lambda w, lam: outer(w[0], lam), inner_loss=penalised, **given) == []
    (found,) = findings(outer, **quadratic(with_spectrum(np.logspace(-14.2, 0, N))))
    assert found.name == "singular" and ("condition number" in found.message or "zero to rounding" in found.message)


def test_expansion():
    """The spectral radius decides; a large norm alone is no expansion."""
    grows = with_spectrum(np.linspace(-1.2, 0.9, N))
    (found,) = findings(outer, symmetric=True, **linear_map(grows))
    assert found.name == "expansion" and found.numbers["at least"] == pytest.approx(1.2, rel=1e-9)
    assert names(outer, **linear_map(grows / 1.3)) == []
    angle = 1.1 * np.array([[np.cos(1.0), -np.sin(1.0)], [np.sin(1.0), np.cos(1.0)]])
    (found,) = findings(outer, **linear_map(np.kron(np.eye(N // 2), angle)))
    assert found.name == "expansion" and found.numbers["radius"] == pytest.approx(1.1, rel=1e-9)
    far_from_normal = 0.5 * np.eye(3) + 4 * np.eye(3, k=1)
    assert names(outer, **linear_map(far_from_normal)) == []


@pytest.mark.parametrize("step", [0.1, 2.5])
def test_expansion_of_gradient_descent(step):
    a = torch.tensor(with_spectrum(np.linspace(0.1, 1, N)))
    given = {"params": rand(N), "hparams": rand(N, seed=1).requires_grad_()}
    fp_map = lambda w, lam: w - step * (a @ w - lam)  # noqa: E731
    assert names(outer, symmetric=True, fp_map=fp_map, **given) == ["expansion"] * (step > 2)


# --- random maps ------------------------------------------------------------------------------------------------------


def test_stochastic():
    x, y = rand(50, N), rand(50, seed=1)
    given = {"params": rand(N), "hparams": rand(N, seed=2).requires_grad_()}

    def loss(w, lam, rows):
        return (x[rows] @ w - y[rows]).square().mean() + (lam.exp() * w**2).sum()

    def minibatch(w, lam):
        return loss(w, lam, torch.randperm(50)[:10])

    batches = iter([torch.arange(i, i + 10) for i in range(40)])
    with nothing_changed(given["params"], given["hparams"]):
        (found,) = findings(outer, inner_loss=minibatch, **given)
    assert found.name == "stochastic" and "draws from torch's random state" in found.message
    assert found.numbers["difference"] > 0.01 and "inner_loss" in found.message
    (found,) = findings(outer, inner_loss=lambda w, lam: loss(w, lam, next(batches)), **given)
    assert found.name == "stochastic" and "other data" in found.message
    assert names(outer, inner_loss=lambda w, lam: loss(w, lam, torch.arange(10)), **given) == []

    def unused_draw(w, lam):
        torch.rand(3)
        return loss(w, lam, torch.arange(10))

    assert names(outer, inner_loss=unused_draw, **given) == []
    noisy = lambda w, lam: outer(w + 0.1 * torch.randn(N), lam)  # noqa: E731
    (found,) = findings(noisy, inner_loss=lambda w, lam: loss(w, lam, torch.arange(10)), **given)
    assert found.name == "stochastic" and "outer_loss" in found.message


def network(rate: float) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(rate), nn.Linear(5, 1)).double()


def loss_of(model: nn.Module, x: torch.Tensor, w: dict, lam: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(model, w, (x,)).square().mean() + (
        lam.exp() * sum(v.square().sum() for v in w.values())
    )


class Loss:
    def __init__(self, model):
        self.model = model

    def __call__(self, w, lam):
        return loss_of(self.model, rand(20, 4), w, lam)

    def method(self, w, lam):
        return self(w, lam)


@pytest.mark.parametrize("form", ["closure", "partial", "object", "method"])
def test_dropout(form):
    model, x = network(0.5), rand(20, 4)
    loss = {
        "closure": lambda w, lam: loss_of(model, x, w, lam),
        "partial": functools.partial(loss_of, model, x),
        "object": Loss(model),
        "method": Loss(model).method,
    }[form]
    given = {
        "params": {k: v.detach() for k, v in model.named_parameters()},
        "hparams": torch.zeros((), requires_grad=True).double(),
    }
    given["hparams"] = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    target = lambda w, lam: w["0.weight"].sum()  # noqa: E731
    found = findings(target, inner_loss=loss, **given)
    assert found[0].name == "dropout" and "2 (Dropout)" in found[0].message and "eval()" in found[0].message
    assert "stochastic" not in [each.name for each in found]
    model.eval()
    assert names(target, inner_loss=loss, **given) == []
    noisy = lambda w, lam: loss(w, lam) * (1 + 0.1 * torch.rand(()))  # noqa: E731
    assert names(target, inner_loss=noisy, **given) == ["stochastic"]
    model.train()
    model[2].p = 0.0
    assert names(target, inner_loss=loss, **given) == []


def test_functional_dropout_is_reported_only_as_drawing_random_numbers():
    x = rand(20, N)
    loss = lambda w, lam: (F.dropout(x, 0.5) @ w).square().mean() + lam * w.square().sum()  # noqa: E731
    given = {"params": rand(N), "hparams": torch.tensor(1.0, dtype=torch.float64, requires_grad=True)}
    assert names(outer, inner_loss=loss, **given) == ["stochastic"]


def test_modules_of():
    model, other = network(0.1), nn.Linear(2, 2)

    def closure(w):
        return (lambda: model)()

    def default(w, net=other):
        return net

    assert modules_of(closure) == [model] and modules_of(default) == [other]
    assert set(modules_of(functools.partial(default, net=model))) == {model, other}
    assert modules_of(lambda w: GLOBAL(w)) == [GLOBAL] and modules_of(torch.sin, 3) == []
    assert modules_of({"a": [Loss(model)]}) == [model]
    assert modules_of([model] * 2000) == [] and modules_of(lambda: used_by_name()) == [GLOBAL]


GLOBAL = nn.Linear(2, 2)


def used_by_name():
    return GLOBAL


def test_buffers_are_put_back():
    """Batch norm in training mode writes its statistics at each evaluation."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, lam = rand(20, 4), torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    given = {"params": {k: v.detach() for k, v in model.named_parameters()}, "hparams": lam}
    with nothing_changed(given["params"]):
        findings(lambda w, lam: w["0.bias"].sum(), inner_loss=lambda w, lam: loss_of(model, x, w, lam), **given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- kinks ------------------------------------------------------------------------------------------------------------


def relu_network(rows: int = 40, dtype: torch.dtype = torch.float64):
    """The loss of a relu layer, params, and params for which one preactivation of one sample is exactly zero."""
    x, c, y = rand(rows, 5, dtype=dtype), rand(3, seed=1, dtype=dtype), rand(rows, seed=2, dtype=dtype)

    def loss(w, lam):
        return (torch.relu(x @ w["w"] + w["b"]) @ c - y).square().mean() + 0.5 * lam.exp() * (
            w["w"].square().sum() + w["b"].square().sum()
        )

    w = {"w": rand(5, 3, seed=3, dtype=dtype), "b": rand(3, seed=4, dtype=dtype)}
    on = {"w": w["w"], "b": w["b"].clone()}
    on["b"][1] = -(x[7] @ w["w"][:, 1])
    return loss, w, on


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [40, 300])
def test_relu_kink_of_an_inner_loss(rows, dtype):
    loss, w, on = relu_network(rows, dtype)
    lam = torch.tensor(0.0, dtype=dtype, requires_grad=True)
    target = lambda w, lam: w["b"].sum()  # noqa: E731
    assert "kink" not in names(target, params=w, hparams=lam, inner_loss=loss)
    if dtype == torch.float64:
        assert "kink" in names(target, params=on, hparams=lam, inner_loss=loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kink", [False, True])
def test_relu_kink_of_a_map(kink, dtype):
    """z = relu(Mz + λ) has a kink if an entry of Mz + λ is zero."""
    m, z = 0.5 * torch.tensor(with_singular_values(np.linspace(0.5, 1, N))).to(dtype), rand(N, dtype=dtype)
    lam = rand(N, seed=3, dtype=dtype)
    if kink:
        lam[4] = -(m @ z)[4]
    lam.requires_grad_()
    assert names(outer, params=z, hparams=lam, fp_map=lambda z, lam: torch.relu(m @ z + lam)) == ["kink"] * kink


def test_near_or_weak_kinks_are_not_reported():
    """One kink is 1e-7 ‖w‖ away, one changes products by 1e-4; nor may rounding in products count as a kink."""
    m, z = 0.5 * torch.tensor(with_singular_values(np.linspace(0.5, 1, N))), rand(N)
    lam = rand(N, seed=3)
    lam[4] = -(m @ z)[4] + 1e-7
    assert names(outer, params=z, hparams=lam.requires_grad_(), fp_map=lambda z, lam: torch.relu(m @ z + lam)) == []
    at = z - z[4]
    for fp_map in (
        lambda z, lam: m @ z + 1e-4 * torch.relu(z) + lam,
        lambda z, lam: m @ z + 1e-9 * torch.tanh(z) + lam,
    ):
        assert names(outer, params=at, hparams=lam, fp_map=fp_map) == []


def test_l1_penalty():
    """|w| has a kink at w₃ = 0; the proximal map of the same problem is smooth at its solution."""
    a = torch.tensor(with_spectrum(np.linspace(0.5, 1, N)))
    lam, w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), rand(N)
    loss = lambda w, lam: 0.5 * w @ a @ w - w.sum() + lam * w.abs().sum()  # noqa: E731
    assert "kink" not in names(outer, params=w, hparams=lam, inner_loss=loss)
    on = w.clone()
    on[3] = 0.0
    assert "kink" in names(outer, params=on, hparams=lam, inner_loss=loss)
    p = elastic_net()
    assert "kink" not in names(p.outer_loss, params=p.params, hparams=p.hparams, fp_map=p.fp_map)


@pytest.mark.parametrize("sharpness", [1.0, 100.0, 1e4])
def test_steep_but_smooth_is_no_kink(sharpness):
    m, z = rand(N, N), rand(N)
    fp_map = lambda z, lam: torch.tanh(sharpness * (m @ z)) / sharpness + lam  # noqa: E731
    found = names(outer, params=z, hparams=rand(N).requires_grad_(), fp_map=fp_map)
    assert "kink" not in found


# --- the rounding floor -----------------------------------------------------------------------------------------------


def logistic(dtype: torch.dtype, condition: float):
    x, y = rand(60, N), (rand(60, seed=1) > 0).double()
    x = (x * torch.logspace(0, -np.log10(condition) / 2, N)).to(dtype)
    loss = lambda w, lam: F.binary_cross_entropy_with_logits(x @ w, y.to(dtype)) + 5e-4 * (lam * w).square().sum()  # noqa: E731
    return loss, torch.ones(N, dtype=dtype, requires_grad=True)


def solve(loss, lam: torch.Tensor, steps: int) -> torch.Tensor:
    """The solution by Newton's method in the dtype of lam."""
    w = torch.zeros_like(lam).detach()
    gradient = torch.func.grad(lambda w: loss(w, lam.detach()))
    for _ in range(steps):
        w = w - torch.linalg.inv(torch.func.jacrev(gradient)(w)) @ gradient(w)
    return w


@pytest.mark.parametrize(
    ("dtype", "steps", "expected"),
    [(torch.float32, 12, True), (torch.float32, 2, False), (torch.float64, 12, False), (torch.float64, 3, False)],
)
def test_rounding_floor(dtype, steps, expected):
    loss, lam = logistic(dtype, 100.0)
    w = solve(loss, lam, steps)
    found = findings(outer, params=w, hparams=lam, inner_loss=loss)
    assert [each.name for each in found] == ["rounding floor"] * expected
    if expected:
        exact, lam64 = logistic(torch.float64, 100.0)
        true = solve(exact, lam64, 15)
        away = float((w.double() - true).norm() / true.norm())
        assert away / 30 < found[0].numbers["distance"] < 100 * away and "float32" in found[0].message


def test_rounding_floor_of_gradient_descent():
    """Gradient descent in float32 runs until w no longer changes."""
    loss, lam = logistic(torch.float32, 4.0)
    gradient = torch.func.grad(loss)
    fp_map = lambda w, lam: w - 4.0 * gradient(w, lam)  # noqa: E731
    w, near = torch.zeros(N), torch.zeros(N)
    for step in range(1500):
        w = fp_map(w, lam.detach())
        near = w if step == 100 else near
    assert names(outer, params=w, hparams=lam, fp_map=fp_map, symmetric=True) == ["rounding floor"]
    assert names(outer, params=near, hparams=lam, fp_map=fp_map, symmetric=True) == []


# --- losses that do not depend on their arguments ---------------------------------------------------------------------


def test_outer_loss_ignores_params():
    given = quadratic(with_spectrum(np.linspace(0.1, 1, N)))
    (found,) = findings(lambda w, lam: lam.square().sum(), **given)
    assert found.name == "outer loss ignores params"
    detached = names(lambda w, lam: w.detach().square().sum() + lam.sum(), **given)
    assert detached == ["outer loss ignores params", "wrong derivative"]
    assert names(lambda w, lam: (w * lam).sum(), **given) == []


def test_hyperparameter_reaches_nothing():
    m = torch.tensor(with_spectrum(np.linspace(0.1, 1, N)))

    def loss(w, lam):
        return 0.5 * w @ m @ w - w @ lam["used"] + lam["apart"] ** 2 + w.sum() * lam["detached"].item()

    lam = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in
           {"used": [1.0] * N, "apart": 2.0, "detached": 3.0, "outer": 1.0}.items()}  # fmt: skip
    lam["constant"] = torch.tensor(1.0)
    found = findings(lambda w, lam: outer(w, lam) * lam["outer"], params=rand(N), hparams=lam, inner_loss=loss)
    assert [each.name for each in found] == ["hyperparameter reaches nothing"] * 2 + ["wrong derivative"]
    assert "hparams['apart']" in found[0].message and "hparams['detached']" in found[1].message


@pytest.mark.parametrize("reads", ["item", "float", "detach", "other"])
def test_nothing_reaches_hparams(reads):
    m, other = torch.tensor(with_spectrum(np.linspace(0.1, 1, N))), torch.tensor(2.0, dtype=torch.float64)
    ways = {"item": lambda h: h.item(), "float": lambda h: float(h.detach()), "other": lambda h: other}
    read = ways.get(reads, lambda h: h.detach())
    lam = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    found = findings(outer, params=rand(N), hparams=lam, inner_loss=lambda w, h: 0.5 * read(h) * w @ m @ w - w.sum())
    wrong = [] if reads == "other" else ["wrong derivative"]
    assert [each.name for each in found] == ["hyperparameter reaches nothing", *wrong]
    assert "neither ∇₁ of inner_loss nor outer_loss depends on hparams" in found[0].message


# --- derivatives that disagree with the values ------------------------------------------------------------------------


def weighting(detached: bool, dtype: torch.dtype = torch.float64):
    """A loss in which the weight of each sample is a function of its loss."""
    x, y = rand(40, N, dtype=dtype), rand(40, seed=1, dtype=dtype)

    def loss(w, lam):
        losses = (x @ w - y).square()
        weights = torch.sigmoid(lam[0] * (losses.detach() if detached else losses) + lam[1])
        return (weights * losses).mean() + 0.1 * w.square().sum()

    given = {"params": rand(N, seed=2, dtype=dtype), "hparams": torch.tensor([-0.3, 0.2], dtype=dtype)}
    given["hparams"].requires_grad_()
    return loss, given


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["inner_loss", "residual", "fp_map"])
@pytest.mark.parametrize("detached", [False, True])
def test_weights_that_are_detached_from_params(detached, form, dtype):
    loss, given = weighting(detached, dtype)

    def gradient(w, lam):
        w = w if w.requires_grad else w.detach().requires_grad_()
        return torch.autograd.grad(loss(w, lam), w, create_graph=True)[0]

    maps = {"inner_loss": loss, "residual": gradient, "fp_map": lambda w, lam: w - 0.1 * gradient(w, lam)}
    found = findings(outer, **{form: maps[form]}, **given)
    wrong = [each for each in found if each.name == "wrong derivative"]
    assert len(wrong) == detached
    assert all("direction of params" in each.message and each.numbers["difference"] > 0.01 for each in wrong)


@pytest.mark.parametrize("name", ["hparams", "params"])
def test_part_of_a_loss_that_is_detached(name):
    """A part of the inner loss is detached from hparams, or a part of the outer loss from params."""
    m = torch.tensor(with_spectrum(np.linspace(0.1, 1, N)))
    given = {"params": rand(N), "hparams": rand(N, seed=1).requires_grad_()}
    inner = lambda w, lam: 0.5 * w @ m @ w - w @ (lam if name == "params" else 0.9 * lam + 0.1 * lam.detach())  # noqa: E731
    target = lambda w, lam: outer(w, lam) + (0.1 * w.detach() @ w if name == "params" else 0.0)  # noqa: E731
    (found,) = findings(target, inner_loss=inner, **given)
    assert found.name == "wrong derivative" and f"direction of {name}" in found.message
    assert ("outer_loss" in found.message) == (name == "params")


def test_a_custom_backward_that_is_wrong():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 1.9 * x * g

    given = {"params": rand(N), "hparams": rand(N, seed=1).requires_grad_()}
    wrong = names(outer, residual=lambda w, lam: w + 0.1 * Square.apply(w) - lam, **given)
    assert wrong == ["wrong derivative"]
    assert names(outer, residual=lambda w, lam: w + 0.1 * w * w - lam, **given) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_reading_the_losses_of_a_network_is_no_finding(activation, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), activation(), nn.Linear(50, 1)).to(dtype)
    x, y, log = rand(500, 3, dtype=dtype), rand(500, seed=1, dtype=dtype), []

    def loss(w, lam):
        value = (torch.func.functional_call(model, w, (x,))[:, 0] - y).square().mean()
        log.append(value.item())
        return value + lam.exp() * sum(v.square().sum() for v in w.values())

    given = {"params": {k: v.detach() for k, v in model.named_parameters()}}
    given["hparams"] = torch.tensor(0.0, dtype=dtype, requires_grad=True)
    assert "wrong derivative" not in names(lambda w, lam: w["0.weight"].square().sum(), inner_loss=loss, **given)


def test_an_l1_term_in_a_smooth_loss():
    """Two weights are 0 at the solution of lasso regression, where the proximal map is smooth."""
    x = rand(60, 4)
    target, strength = torch.tensor([1.0, 0.01, -0.5, 0.0], dtype=torch.float64), 0.1
    lam = torch.tensor(strength, dtype=torch.float64, requires_grad=True)

    def gradient(w):
        return x.mT @ (x @ (w - target)) / 60

    def loss(w, lam):
        return (x @ (w - target)).square().sum() / 120 + lam * w.abs().sum()

    def proximal(w, lam):
        z = w - 0.3 * gradient(w)
        return z.sign() * (z.abs() - 0.3 * lam).clamp_min(0)

    w = torch.zeros(4, dtype=torch.float64)
    for _ in range(2000):
        w = proximal(w, lam.detach())
    assert (w == 0).sum() == 2
    with pytest.warns(hg.UnsolvedInnerProblem, match="an L1 term"):
        result = hg.implicit.grad(outer, inner_loss=loss, params=w, hparams=lam, solver=hg.solvers.Dense())
    report = hg.diagnostics.check(result)
    assert [each.name for each in report.findings] == ["kink"] and "fp_map" in report.findings[0].message
    assert not report.ok and "kink" in report.verdict
    right = hg.implicit.grad(outer, fp_map=proximal, params=w, hparams=lam, solver=hg.solvers.GMRES(rtol=1e-10))
    assert hg.diagnostics.check(right).ok and (right.grads - result.grads).abs() > 0.01 * right.grads.abs()


def test_several_at_once():
    """Findings do not hide one another."""
    m = torch.tensor(with_spectrum(np.r_[0.0, -1.0, np.linspace(0.1, 1, N - 2)]))
    lam = [rand(N).requires_grad_(), rand(3).requires_grad_()]
    found = names(
        lambda w, lam: lam[0].sum(), params=rand(N), hparams=lam, inner_loss=lambda w, lam: 0.5 * w @ m @ w - w @ lam[0]
    )
    assert found == ["outer loss ignores params", "hyperparameter reaches nothing", "indefinite", "singular"]


def test_bad_input():
    given = quadratic(np.eye(N))
    live = {"params": rand(N).requires_grad_(), "hparams": given["hparams"]}
    problem = hg.implicit.Problem(torch.tensor(1.0), inner_loss=given["inner_loss"], **live)
    with pytest.raises(TypeError, match="outer_loss must be a function"):
        hg.diagnostics.findings(problem)
    problem = hg.implicit.Problem(outer, inner_loss=given["inner_loss"](*live.values()), **live)
    with pytest.raises(TypeError, match="inner_loss must be a function"):
        hg.diagnostics.findings(problem)


def test_without_the_structure_there_is_no_finding_about_the_system():
    m = torch.tensor(with_spectrum(np.r_[-1.0, np.linspace(0.1, 1, N - 1)]))
    given = {"params": rand(N), "hparams": rand(N).requires_grad_(), "inner_loss": lambda w, h: 0.5 * w @ m @ w}
    problem = hg.implicit.Problem(outer, **given)
    assert [each.name for each in hg.diagnostics.findings(problem)] == ["hyperparameter reaches nothing"]
