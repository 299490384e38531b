"""compile=: products by replaying a recording of one product agree with ordinary ones, whatever code the user has."""

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import register_backend
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import hypergrad as hg
from helpers import assert_agrees, problem_at
from hypergrad import solvers as S
from hypergrad._recorded import Recorded
from hypergrad._vector import Vector

EAGER = "aot_eager"  # traces as the default backend does, and generates no code
MANY = 20  # products, of which the first is recorded
CASES = [(name, form) for name in ("ridge", "logistic") for form in ("inner_loss", "residual")]
CASES += [("contraction-.9", "fp_map"), ("equilibrium", "fp_map"), ("equilibrium", "residual")]


def hypergradient(p, form, solver, **options):
    given = {form: getattr(p, form), "symmetric": p.symmetric}
    return hg.implicit.grad(p.outer_loss, params=p.params, hparams=p.hparams, solver=solver, **given, **options)


@pytest.mark.parametrize(("compile", "how"), [(True, "recorded"), (EAGER, f"compiled by {EAGER}")])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_same_hypergradient(name, form, compile, how):
    p = problem_at(name)
    for solver in (S.GMRES(max_steps=60, restart=60, on_failure="ignore"), S.LSQR(rtol=1e-13, max_steps=2000)):
        result = hypergradient(p, form, solver, compile=compile)
        assert_agrees(p, result.grads)
        assert result.compiled is not None and result.compiled.startswith(how)
    result = hypergradient(p, form, S.Dense(), compile=compile)  # its products are done at once
    assert_agrees(p, result.grads)
    assert result.compiled == "reverse passes: too few products to record one"
    assert hypergradient(p, form, solver).compiled is None


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.RandomState(seed).randn(*shape))


X, Y, IMAGES = draw(8, 6, seed=1), torch.arange(8) % 3, draw(4, 2, 6, 6, seed=2)
A, SOME = draw(4, 4, seed=6), torch.tensor([True, False, False, True])
LAYERS = [0.5 * draw(6, 7, seed=3), 0.1 * draw(7, seed=4), 0.5 * draw(7, 3, seed=5)]


def network(hidden):
    """The loss of a network with this module in the middle."""

    def loss(w, lam):
        return F.cross_entropy(hidden(X @ w[0] + w[1]) @ w[2], Y) + (lam.exp() * w[0] ** 2).sum()

    return loss, LAYERS


def convolution(w, lam):
    z = F.max_pool2d(F.conv2d(IMAGES, w[0], w[1]).tanh(), 2)
    return F.cross_entropy(z.flatten(1) @ w[2], Y[:4]) + lam * w[0].square().sum()


def embedding(w, lam):
    z = F.embedding(torch.arange(16).view(4, 4) % 7, w[0]).tanh().mean(1)
    return F.cross_entropy(z @ w[1], Y[:4]) + lam.exp() * w[0].square().sum()


def sparse(form):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        x = form(draw(8, 6) * (draw(8, 6, seed=1) > 0))

    def loss(w, lam):
        return (x @ w[0]).sin().square().sum() + lam.exp() * w[0].square().sum()

    return loss, [draw(6)]


def module(net, x, first=lambda y: y):
    names = [name for name, _ in net.named_parameters()]

    def loss(w, lam):
        with sdpa_kernel(SDPBackend.MATH):
            y = first(functional_call(net, dict(zip(names, w, strict=True)), (x,)))
        return y.sin().square().sum() + lam.exp() * sum(v.square().sum() for v in w)

    return loss, [v.detach().clone() for v in net.parameters()]


def losses():
    elementwise = {
        "tanh": torch.tanh,
        "relu": F.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "softplus": F.softplus,
        "sigmoid": torch.sigmoid,
        "elu": F.elu,
        "leaky relu": F.leaky_relu,
        "clamp": lambda z: z.clamp(-1, 1) * z,
        "where": lambda z: torch.where(z > 0, z**3, z),
        "masked": lambda z: z.masked_fill(z < 0, 0.0) * z,
        "other dtype": lambda z: z.float().tanh().double(),
    }
    others = {
        "layer norm": lambda z: F.layer_norm(z, (7,)),
        "batch norm": lambda z: F.batch_norm(z, None, None, training=True),
        "softmax": lambda z: z.softmax(1) * z,
        "logsumexp": lambda z: z - z.logsumexp(1, keepdim=True),
        "cumsum": lambda z: z.cumsum(0).sin(),
        "sort": lambda z: z.sort(1).values.sin(),
        "cat": lambda z: torch.cat([z[:, :3], z[:, 3:] ** 2], 1),
        "split": lambda z: torch.cat([part.sin() for part in z.split(2, 1)], 1),
        "unbind": lambda z: torch.stack(z.unbind(0)[::-1]).sin(),
        "index": lambda z: z[torch.tensor([0, 0, 3, 4, 5, 6, 7, 1])].sin(),
        "gather": lambda z: z.gather(1, (torch.arange(56) * 5 % 7).view(8, 7)).sin(),
        "norm": lambda z: z / z.norm(dim=1, keepdim=True),
        "einsum": lambda z: torch.einsum("ij,kj->ik", z, z) @ z,
        "in place": lambda z: (2 * z).add_(1).sin_(),
        "control flow": lambda z: z.sin() if float(z.detach().sum()) < 1e9 else z,
        "dropout": lambda z: F.dropout(z, 0.5).sin(),
        "checkpoint": lambda z: checkpoint(torch.sin, z, use_reentrant=False),
    }
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 4, batch_first=True).double()
    transformer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    return {name: network(hidden) for name, hidden in (elementwise | others).items()} | {
        "sparse, by coordinates": sparse(torch.Tensor.to_sparse),
        "sparse, by rows": sparse(torch.Tensor.to_sparse_csr),
        "convolution": (convolution, [0.4 * draw(3, 2, 3, 3), 0.1 * draw(3), 0.4 * draw(12, 3)]),
        "embedding": (embedding, [draw(7, 5), draw(5, 3)]),
        "lstm": module(lstm, X.view(2, 4, 6), lambda y: y[0]),
        "transformer": module(transformer, draw(2, 5, 8)),
    }


def products(vectors, compile, **problem):
    """Aᵀv for each of the vectors, requested by a user's solver, and the result of implicit.grad."""
    found = []

    def solver(op, b, x0):
        found.extend([x.clone() for x in op(b.space.pack([x.clone() for x in v])).leaves] for v in vectors)
        return b

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hg.HypergradientWarning)  # the solver returns no solution
        warnings.simplefilter("error", hg.NotCompiled)
        result = hg.implicit.grad(solver=solver, compile=compile, **problem)
    return found, result


def vectors(values, seed=100, count=MANY):
    return [[draw(*x.shape, seed=seed + 10 * k + i) for i, x in enumerate(values)] for k in range(count)]


def sizes(w, lam):
    return sum((x.double() ** 2).sum() for x in (w if isinstance(w, list) else [w]))


def decay():
    return torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", list(losses()))
def test_products_at_other_vectors(name):
    """Each network is differentiated twice; the second time reuses the code built for the first."""
    loss, values = losses()[name]
    for seed in (100, 500):
        given = vectors(values, seed)
        torch.manual_seed(seed)
        problem = {"outer_loss": sizes, "inner_loss": loss, "params": values, "hparams": decay()}
        found, result = products(given, True, **problem)
        torch.manual_seed(seed)
        due, _ = products(given, False, **problem)
        assert result.compiled is not None and result.compiled.startswith("recorded")
        torch.testing.assert_close(found, due, rtol=1e-11, atol=1e-13)


class Applied(torch.autograd.Function):
    """A function of w whose backward pass is the given linear function."""

    @staticmethod
    def forward(ctx, w, linear):
        ctx.linear = linear
        return w.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.linear(grad), None


def linear_problem(linear):
    """The problem with Aᵀv = linear(v)."""
    params = draw(4, seed=3)
    return {"outer_loss": sizes, "residual": lambda w, lam: Applied.apply(w, linear) + lam, "params": params} | {
        "hparams": draw(4, seed=4).requires_grad_()
    }


LINEAR = [
    lambda v: A @ (2 * (A @ v)) + 3 * v,
    lambda v: A @ v + A @ (A @ v) + v,
    lambda v: torch.relu(v.new_ones(4)) * (A @ v),
    lambda v: v + A @ v,
    lambda v: v,
    lambda v: v.view(2, 2).t().reshape(4),
    lambda v: torch.add(A @ v, A @ v, alpha=3),
    lambda v: torch.sub(A @ v, v),
    lambda v: torch.cat([(2 * v)[:2], A[:2] @ v]),
    lambda v: torch.where(SOME, 2 * v, 3 * v).mul(2).neg(),
    lambda v: (2 * (y := 2 * v) + 3 * (A @ y)) + y,
    # into what was made in the pass
    lambda v: (2 * v).add_(A @ v).mul_(A[0]),
    lambda v: torch.zeros_like(v).copy_(v).mul_(2),
    lambda v: torch.zeros_like(v).add_(v) + A @ v,
    lambda v: torch.empty_like(v).copy_(A @ v).add_(v),
    lambda v: (v + torch.zeros_like(v)).add_(v) + v,
    # zeros that are used again, before and after they were added
    lambda v: A @ (A[0] * (torch.where(SOME, A[1] * v, z := torch.zeros_like(v)) + z)),
    lambda v: A @ (A[0] * torch.where(SOME, A[1] * v + (z := torch.zeros_like(v)), z)),
    lambda v: A @ (A[0] * (torch.stack([A[1] * v, z := torch.zeros_like(v)]) + z)[0] + z),
    lambda v: A @ (A[0] * (A[1] * v + torch.zeros_like(v))) + torch.zeros_like(v),
]


@pytest.mark.parametrize("linear", LINEAR)
def test_linear_functions(linear):
    for seed in (10, 900):
        given = vectors([draw(4)], seed)
        found, result = products(given, True, **linear_problem(linear))
        assert result.compiled is not None and result.compiled.startswith("recorded")
        torch.testing.assert_close(found, [[linear(v)] for (v,) in given], rtol=1e-13, atol=1e-13)


def in_views(v):
    new = torch.zeros_like(v)
    new[1:] = v[1:]
    new[0].add_(v[0])
    return new


def changed(v):
    """A loss that uses a constant and changes it in place afterwards."""
    scale = torch.zeros_like(v).add_(1)
    scaled = scale * v
    scale.add_(1)
    return scaled * scale


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (lambda v: v * torch.rand((), dtype=v.dtype), "a product draws random numbers"),
        (in_views, "a product changes a tensor in place"),
        (lambda v: (v.float() * 2).add_(v).double(), "a product changes a tensor in place .aten.add_.Tensor"),
        (changed, "a product changes in place a tensor that it has used before"),
        (lambda v: v + float(v.sum()), "a product reads numbers from a tensor"),
        (lambda v: torch.from_numpy(2 * v.numpy()), "a recording is off by"),
        (lambda v: torch.from_numpy(2 * v.numpy()) + v, "a recording is off by"),
    ],
)
def test_products_that_cannot_be_recorded_are_ordinary_ones_with_a_warning(linear, reason):
    given = linear_problem(linear) | {"solver": S.FixedPoint(max_steps=MANY, on_failure="ignore")}
    results = []
    for compile in (True, True, False):
        torch.manual_seed(0)
        if not compile:
            results.append(hg.implicit.grad(**given))
            continue
        with pytest.warns(hg.NotCompiled, match=f"products could not be compiled and are done by .*{reason}"):
            results.append(hg.implicit.grad(compile=True, **given))
        assert results[-1].compiled is not None and results[-1].compiled.startswith("reverse passes: ")
    for result in results[:2]:
        torch.testing.assert_close(result.grads, results[2].grads, rtol=1e-12, atol=0, equal_nan=True)


class Unseen(torch.autograd.Function):
    """m x, whose backward pass computes in NumPy, where torch does not see it, and returns memory made by `way`."""

    @staticmethod
    def forward(ctx, x, m, way):
        ctx.m, ctx.way = m, way
        return m @ x

    @staticmethod
    def backward(ctx, grad):
        new = ctx.way(grad)
        if new is None:
            return torch.from_numpy(ctx.m.numpy().T @ grad.numpy()), None, None
        np.matmul(ctx.m.numpy().T, grad.numpy(), out=new.numpy())
        return new, None, None


@pytest.mark.parametrize("way", [lambda grad: None, torch.zeros_like, torch.empty_like])
@pytest.mark.parametrize("alone", [True, False])
def test_a_recording_is_not_reused_if_numpy_changes_the_product(way, alone):
    """m = 0 at the first outer step, so a recording is right there, but must not be used at the next step."""
    a, lam = 0.1 * draw(6, 6), draw(6, seed=2).requires_grad_()
    options = {"outer_loss": cubes, "params": draw(6, seed=3), "hparams": lam, "solver": S.FixedPoint(max_steps=30)}
    for m in (0.0, 0.1, 0.2):
        seen = (lambda w: 0.0 * w) if alone else (lambda w: torch.tanh(a @ w))
        given = lambda w, lam: Unseen.apply(w, m * draw(6, 6, seed=1), way) + seen(w) + lam  # noqa: B023, E731
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = hg.implicit.grad(fp_map=given, compile=True, **options)
            due = hg.implicit.grad(fp_map=given, **options)
        torch.testing.assert_close(result.grads, due.grads, rtol=1e-10, atol=1e-12)
        assert m == 0 or any(issubclass(w.category, hg.NotCompiled) for w in warned)


def problem(seed: int, n: int = 6, rows: int = 20, factor: float = 1.0):
    rng = np.random.RandomState(seed)
    x, y = torch.tensor(rng.randn(rows, n)), torch.tensor(rng.randn(rows))
    w, lam = torch.tensor(rng.randn(n)), torch.tensor(rng.randn(n), requires_grad=True)
    loss = lambda w, lam: factor * ((torch.tanh(x @ w) - y) ** 2).mean() + (lam.exp() * w**2).sum()  # noqa: E731
    return loss, w, lam


def cubes(w, lam):
    return sum((x.double() ** 3).sum() for x in (w if isinstance(w, list) else [w]))


def grads_of(given, compile, **options):
    loss, w, lam = given
    options = {"solver": S.MINRES(max_steps=MANY, on_failure="ignore")} | options
    return hg.implicit.grad(cubes, inner_loss=loss, params=w, hparams=lam, compile=compile, **options)


def test_products_are_recorded_only_if_enough_of_them_follow():
    """If many are known to follow, the first one is recorded; if unknown, a later one; with a backend it always is."""
    too_few = "reverse passes: too few products to record one"
    for solver, due in [
        (S.MINRES(max_steps=10, on_failure="ignore"), too_few),
        (S.MINRES(rtol=1e-12, on_failure="ignore"), too_few),  # n = 6
        (S.MINRES(max_steps=MANY, on_failure="ignore"), "recorded"),
        (S.Neumann(step_size=0.01, rtol=1e-12, max_steps=100, on_failure="ignore"), "recorded"),
    ]:
        assert str(grads_of(problem(0), True, solver=solver).compiled).startswith(due)
    few = S.MINRES(max_steps=3, on_failure="ignore")
    assert str(grads_of(problem(0), EAGER, solver=few).compiled).startswith(f"compiled by {EAGER}")


def test_the_recording_of_a_logistic_regression_is_its_formula():
    """Xᵀ(d ∘ Xv) + e ∘ v takes four operations, because the sum is fused into the last product."""
    x, y = draw(30, 5), (draw(30, seed=8) > 0).double()

    def loss(w, lam):
        return F.binary_cross_entropy_with_logits(x @ w, y) + 0.5 * (lam.exp() * w * w).sum()

    result = grads_of((loss, draw(5, seed=7), draw(5, seed=6).requires_grad_()), True)
    assert result.compiled == "recorded: 4 operations a product"


class Counted(torch.autograd.Function):
    """2 x; counts its reverse passes."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        Counted.passes += 1
        return 2 * grad


def test_every_product_but_the_first_two_is_the_recording():
    """The last product, for hparams, takes a reverse pass too."""
    counts = []
    for seed in range(3):
        loss, w, lam = problem(seed, rows=30 + seed)

        def gradient(w, lam, loss=loss):
            return Counted.apply(torch.autograd.grad(loss(w, lam), w, create_graph=True)[0])

        Counted.passes = 0
        hg.implicit.grad(
            cubes,
            residual=gradient,
            params=w,
            hparams=lam,
            symmetric=True,
            compile=True,
            solver=S.MINRES(max_steps=MANY, on_failure="ignore"),
        )
        counts.append(Counted.passes)
    assert counts == [3, 3, 3]


@pytest.mark.parametrize("compile", [True, EAGER])
def test_a_sequence_of_outer_steps(compile):
    """Closures, data, numbers and batch sizes change between outer steps; none of the old ones may be used."""
    for seed in range(4):
        grads_of(problem(seed, rows=20 + seed, factor=1 + seed), compile)  # after two sizes the code takes any size
    graphs = counters["stats"]["unique_graphs"]
    for seed in range(4, 14):
        given = problem(seed, rows=20 + seed, factor=1 + seed)
        torch.testing.assert_close(grads_of(given, compile).grads, grads_of(given, False).grads, rtol=1e-10, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == graphs  # compiled once


def test_a_tensor_that_changes_between_outer_steps_in_place():
    loss, w, lam = problem(0)
    scale = torch.tensor(1.0, dtype=torch.float64)
    given = (lambda w, lam: scale * loss(w, lam)), w, lam
    for value in (1.0, 3.0, 0.5):
        scale.fill_(value)
        w.add_(0.1)
        torch.testing.assert_close(grads_of(given, True).grads, grads_of(given, False).grads, rtol=1e-10, atol=0)


def test_parameters_of_other_dtypes():
    x, y = draw(20, 6).float(), draw(20, seed=1).float()

    def loss(w, lam):
        return (torch.tanh(x @ w[0] + w[1].float()) - y).square().mean() + lam.exp() * w[1].square().sum()

    given = {"outer_loss": sizes, "inner_loss": loss, "params": [draw(6).float(), draw(1, seed=2)], "hparams": decay()}
    v = vectors(given["params"])
    v = [[x.to(w.dtype) for x, w in zip(each, given["params"], strict=True)] for each in v]
    found, result = products(v, True, **given)
    assert str(result.compiled).startswith("recorded")
    torch.testing.assert_close(found, products(v, False, **given)[0], rtol=1e-5, atol=1e-5)


def test_a_check_of_a_compiled_hypergradient():
    p = problem_at("ridge")
    result = hypergradient(p, "inner_loss", S.MINRES(max_steps=MANY, on_failure="ignore"), compile=True)
    assert_agrees(p, result.grads)
    assert hg.diagnostics.check(result).estimate.relative_error < 1e-8


def test_random_draws_are_those_of_the_graph():
    """All products share one dropout mask, and torch's random state is the same as without compile."""
    loss, w = losses()["dropout"]
    found, states = [], []
    for compile in (True, False):
        torch.manual_seed(3)
        images, result = products(vectors(w), compile, outer_loss=sizes, inner_loss=loss, params=w, hparams=decay())
        found.append((images, result.grads))
        states.append(torch.get_rng_state())
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert torch.equal(*states)


def in_other_memory(w, lam):
    """A loss whose products reshape v into rows, which may or may not be possible without a copy."""
    flat = (1.0 * w).reshape(-1)
    return (flat.sin() ** 2).sum() + (lam.exp() * w**2).sum() + (2 * w).reshape(6, 2).tanh().sum()


@pytest.mark.parametrize("solver", [S.CG, S.MINRES, S.GMRES, S.BiCGStab])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_independent_systems_in_any_memory(solver, transposed, begun):
    w, lam = draw(3, 4), draw(4, seed=5).requires_grad_()
    w = w.t().contiguous().t() if transposed else w
    options = {"params": w, "hparams": lam, "inner_loss": in_other_memory, "batch_dims": 1}
    steps = 2 if solver is S.BiCGStab else 4  # for the four unknowns; further steps would amplify rounding
    options |= {"solver": solver(max_steps=steps, on_failure="ignore"), "x0": draw(3, 4, seed=7) if begun else None}

    def outer_loss(w, lam):
        return (w.t() @ draw(3, 3, seed=3)).sin().sum()

    due = hg.implicit.grad(outer_loss, **options).grads
    for compile in (True, EAGER):
        result = hg.implicit.grad(outer_loss, compile=compile, **options)
        torch.testing.assert_close(result.grads, due, rtol=1e-10, atol=1e-12)
    assert result.compiled is not None and result.compiled.startswith(f"compiled by {EAGER}")


def test_a_non_finite_product_does_not_affect_the_next_hypergradient():
    loss, w, lam = problem(0)
    for factor in (float("nan"), 0.1):
        given = (lambda w, lam, factor=factor: factor * loss(w, lam)), w, lam
        options = {"solver": S.FixedPoint(max_steps=MANY, on_failure="ignore")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hg.NotCompiled)
            result, due = grads_of(given, True, **options), grads_of(given, False, **options)
        torch.testing.assert_close(result.grads, due.grads, rtol=1e-10, atol=0, equal_nan=True)
    assert str(result.compiled).startswith("recorded")


def test_many_recordings_are_compiled_in_one_process():
    w, lam = draw(5), torch.zeros((), dtype=torch.float64).requires_grad_()
    solver = S.MINRES(max_steps=MANY, on_failure="ignore")
    for sines in range(1, 11):

        def inner_loss(w, lam, sines=sines):
            return sum((w * n).sin().sum() for n in range(sines)) + 50 * lam.exp() * (w**2).sum()

        options = {"params": w, "hparams": lam, "inner_loss": inner_loss, "solver": solver}
        result = hg.implicit.grad(lambda w, lam: w.sum(), compile=EAGER, **options)
        assert result.compiled is not None and result.compiled.startswith(f"compiled by {EAGER}")


def test_a_backend_that_does_not_exist():
    p = problem_at("ridge")
    with pytest.warns(hg.NotCompiled, match="no_such_backend"):
        result = hypergradient(p, "inner_loss", S.CG(rtol=1e-13, on_failure="ignore"), compile="no_such_backend")
    assert_agrees(p, result.grads)


@register_backend(name="fails_later")  # pyright: ignore[reportCallIssue]
def fails_later(graph, inputs):
    calls = []

    def run(*given):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("no memory left")
        return graph.forward(*given)

    return run


def test_a_backend_whose_code_fails_later():
    given = linear_problem(lambda v: A @ v + v) | {"solver": S.FixedPoint(max_steps=MANY, on_failure="ignore")}
    with pytest.warns(hg.NotCompiled, match="done by reverse passes: RuntimeError: no memory left"):
        result = hg.implicit.grad(compile="fails_later", **given)
    torch.testing.assert_close(result.grads, hg.implicit.grad(**given).grads, rtol=1e-12, atol=0)


def test_an_error_of_the_users_own_passes_through():
    def failing(v):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        products(vectors([draw(4)]), EAGER, **linear_problem(failing))


def test_evaluated_losses_of_a_live_module():
    """BatchNorm's buffers are written once, as without compile."""
    results = []
    for compile in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        params = list(net.parameters())
        lam = decay()
        inner = F.cross_entropy(net(X), Y) + lam.exp() * sum(w.square().sum() for w in params)
        outer = sum(w.sin().sum() for w in params)
        given = vectors(params)
        found, result = products(given, compile, outer_loss=outer, inner_loss=inner, params=params, hparams=lam)
        results.append((found, result.grads))
        assert net[1].num_batches_tracked == 1
        assert (result.compiled or "").startswith("recorded") == compile
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_nothing_is_kept_beyond_the_last_product():
    """Saved tensors are freed together with the graph, without the garbage collector."""
    made: list[weakref.ref] = []
    x = draw(20, 6)

    def loss(w, lam):
        z = torch.tanh(x @ w)
        made.append(weakref.ref(z))
        return z.square().mean() + lam.exp() * w.square().sum()

    gc.collect()
    gc.disable()
    try:
        for compile in (False, True, True):
            grads_of((loss, draw(6, seed=1), decay()), compile)
            assert made.pop()() is None
    finally:
        gc.enable()


def test_a_product_may_be_written_into():
    """A product shares no memory with constants of the recording, with v, or with its other leaves."""
    w = [draw(3).requires_grad_(), draw(3, seed=1).requires_grad_(), draw(4, seed=2).requires_grad_()]
    outputs = [w[0] + 0.0, w[0] + w[1], w[2]]
    space = Vector.of(w, "w").space

    def plain(v):
        grads = torch.autograd.grad(outputs, w, v, retain_graph=True, materialize_grads=True)
        return [grads[0].clone(), grads[1].clone(), torch.zeros_like(w[2])]

    product = Recorded(plain, space, expected=MANY)
    v = [draw(3, seed=5), draw(3, seed=6), draw(4, seed=7)]
    kept = [x.clone() for x in v]
    for _ in range(4):
        got = product(v)
        torch.testing.assert_close(got, [kept[0] + kept[1], kept[1], torch.zeros_like(kept[2])])
        for x in got:
            x.fill_(7.0)
        torch.testing.assert_close(v, kept)
    assert product.report.startswith("recorded")


def test_what_compile_is_not_for_is_refused():
    loss, w, lam = problem(0)
    gauss = hg.operators.GaussNewton(lambda w, lam: w, lambda z, lam: (z**2).sum())
    for inner in (hg.operators.Stochastic(loss), gauss):
        with pytest.raises(TypeError, match="compile needs an inner_loss that is neither Stochastic, nor GaussNewton"):
            hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=inner, params=w, hparams=lam, compile=True)


def test_compile_takes_a_bool_or_a_name():
    loss, w, lam = problem(0)
    for bad in (1, None, lambda graph, inputs: graph):
        with pytest.raises(TypeError, match="compile must be True, False or the name of a backend, got"):
            hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=loss, params=w, hparams=lam, compile=bad)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "form"), [("logistic", "inner_loss"), ("equilibrium", "fp_map")])
def test_inductor(name, form):
    p = problem_at(name)
    result = hypergradient(p, form, S.GMRES(rtol=1e-13, restart=60, on_failure="ignore"), compile="inductor")
    assert_agrees(p, result.grads)
    assert str(result.compiled).startswith("compiled by inductor")
