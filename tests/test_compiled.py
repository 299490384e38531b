"""compile=: products by a recording of one of them are the same products, whatever is in the user's code."""

import gc
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import hypergrad as hg
from helpers import assert_agrees, problem_at
from hypergrad import _blocks, _compiled
from hypergrad import solvers as S
from hypergrad._program import Program
from hypergrad._recording import Recorder

EAGER = "aot_eager"  # traces as the default backend does, and generates no code
RECORDED = "recorded"
CASES = [(name, form) for name in ("ridge", "logistic") for form in ("inner_loss", "residual")]
CASES += [("contraction-.9", "fp_map"), ("equilibrium", "fp_map"), ("equilibrium", "residual")]


def hypergradient(p, form, solver, **options):
    given = {form: getattr(p, form), "symmetric": p.symmetric}
    return hg.implicit.grad(p.outer_loss, params=p.params, hparams=p.hparams, solver=solver, **given, **options)


@pytest.mark.parametrize("compile", [RECORDED, EAGER])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_same_products(name, form, compile):
    p = problem_at(name)
    for solver in (S.GMRES(rtol=1e-13, restart=60, on_failure="ignore"), S.Dense(), S.LSQR(rtol=1e-13, max_steps=2000)):
        result = hypergradient(p, form, solver, compile=compile)
        assert_agrees(p, result.grads)
        few = isinstance(solver, S.Dense)  # its products are done at once
        assert result.compiled == ("reverse passes: too few products to compile" if few else f"compiled by {compile}")
    assert hypergradient(p, form, solver).compiled is None


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(np.random.RandomState(seed).randn(*shape))


X, Y, IMAGES = draw(8, 6, seed=1), torch.arange(8) % 3, draw(4, 2, 6, 6, seed=2)
A, SOME = draw(4, 4, seed=6), torch.tensor([True, False, False, True])
LAYERS = [0.5 * draw(6, 7, seed=3), 0.1 * draw(7, seed=4), 0.5 * draw(7, 3, seed=5)]


def network(hidden):
    """The loss of a network with this in the middle."""

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


class Twice(torch.autograd.Function):
    """2 x."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class Doubled(Twice):
    """2 x, whose backward pass writes into views of what it makes."""

    @staticmethod
    def backward(ctx, grad):
        new = torch.zeros_like(grad)
        new[1:] = grad[1:]
        new[0].add_(grad[0])
        return new.mul_(2)


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


def gradient(loss, values):
    """∇₁ of the loss with its graph, and the variables."""
    w = [x.clone().requires_grad_() for x in values]
    return torch.autograd.grad(loss(w, torch.tensor(-1.0, dtype=torch.float64)), w, create_graph=True), w


def passes(loss, values):
    """v ↦ the Hessian product by reverse passes, and the space of v."""
    outputs, w = gradient(loss, values)
    return partial(hg._autodiff._retained, outputs, w), hg._vector.Space(w, "w")


@pytest.mark.parametrize("name", list(losses()))
def test_what_is_recorded(name):
    """Products of the recording at other v, one after the other, for one network after the other."""
    loss, values = losses()[name]
    plain, space = passes(loss, values)
    product = _compiled.Product(plain, space, RECORDED)
    for seed in range(4):
        v = [draw(*x.shape, seed=100 + 10 * seed + i) for i, x in enumerate(values)]
        kept = [x.clone() for x in v]
        for got, due in zip(product(v), plain(v), strict=True):
            torch.testing.assert_close(got, due, rtol=1e-11, atol=1e-13)
        assert all(torch.equal(x, y) for x, y in zip(v, kept, strict=True))
    assert product.report == f"compiled by {RECORDED}"


def recorded_function(function, *v):
    """The program of a linear function, and what it holds."""
    with Recorder(v) as recorder:
        results = function(*v)
    results = recorder.finish(results)
    program = Program(recorder.steps, results, len(v), len(recorder.forms))
    return program, program.held(recorder.constants, recorder.forms)


def recorded(loss, values):
    """That of a Hessian product."""
    plain, _ = passes(loss, values)
    return recorded_function(lambda *v: plain(v), *(draw(*x.shape, seed=9) for x in values))


IN_PLACE = ["addmv_", "mul", "mul_", "mv"]


def test_a_logistic_regression_is_left_as_its_formula():
    """Xᵀ(d ∘ Xv) + e ∘ v, with d = σ′(Xw)/n and e = e^λ."""
    x, y, w = draw(30, 5), (draw(30, seed=8) > 0).double(), draw(5, seed=7)

    def loss(w, lam):
        return F.binary_cross_entropy_with_logits(x @ w[0], y) + 0.5 * (lam.exp() * w[0] * w[0]).sum()

    program, held = recorded(loss, [w])
    for graph, due in ((program.source.graph, ["add", "mul", "mul", "mv", "mv"]), (program.product.graph, IN_PLACE)):
        assert sorted(node.target.__name__ for node in graph.nodes if node.op == "call_function") == due
    slope = torch.sigmoid(x @ w)
    for due in (slope * (1 - slope) / 30, np.exp(-1) * torch.ones(5, dtype=torch.float64)):
        assert any(c.shape in (due.shape, (1,)) and torch.allclose(c.expand_as(due), due, rtol=1e-14) for c in held)


def squares(x, scale=1.0, z=None):
    """½ Σ s ∘ (XW)², and with z ½ Σ s ∘ (XW) ∘ (ZW)."""
    return lambda w, lam: (scale * (x @ w[0]) * ((x if z is None else z) @ w[0])).sum() / 2


TALL, WIDE, TEN = draw(12, 5), draw(5, 12).T, draw(12, 12, seed=4)
LINEAR_MODELS = {
    "a vector": (squares(TALL, draw(12, seed=2)), (5,), True),
    "a number": (squares(TALL, 3.0), (5,), True),
    "no factor": (squares(TALL), (5,), True),
    "a matrix": (squares(TALL, draw(12, 3, seed=2)), (5, 3), True),
    "a row of factors": (squares(TALL, draw(3, seed=2)), (5, 3), True),
    "as many columns as rows, a row of factors": (squares(TALL, draw(12, seed=2)), (5, 12), True),
    "as many columns as rows, a column of factors": (squares(TALL, draw(12, 1, seed=2)), (5, 12), True),
    "as many features as rows": (squares(TEN, draw(12, seed=2)), (12,), True),
    "a last block that is smaller": (squares(TALL[:11], draw(11, seed=2)), (5,), True),
    "columns in one piece": (squares(WIDE, draw(12, seed=2)), (5,), False),
    "rows with gaps": (squares(draw(12, 9)[:, :5], draw(12, seed=2)), (5,), False),
    "two matrices": (squares(TALL, draw(12, seed=2), draw(12, 5, seed=3)), (5,), False),
    "two terms": (lambda w, lam: squares(TALL)(w, lam) + squares(draw(12, 5, seed=3), 2.0)(w, lam), (5,), True),
    "a large and a small one": (lambda w, lam: squares(TALL)(w, lam) + squares(draw(3, 5, seed=3))(w, lam), (5,), True),
    "few rows": (squares(TALL[:7], draw(7, seed=2)), (5,), False),
    "a penalty": (lambda w, lam: squares(TALL)(w, lam) + (lam.exp() * w[0] ** 2).sum(), (5,), True),
}


@pytest.mark.parametrize("name", list(LINEAR_MODELS))
def test_blocks_of_rows(name, monkeypatch):
    """Xᵀ(d ∘ Xv) by blocks of two rows is what a reverse pass gives; another form of data is left as it is."""
    loss, shape, due = LINEAR_MODELS[name]
    monkeypatch.setattr(_blocks, "BLOCK", 2 * 12 * 8 if "features" in name else 2 * 5 * 8)
    w = [draw(*shape, seed=7)]
    program, held = recorded(loss, w)
    way = _blocks.ByBlocks(program).way(held)
    assert (way is not None) == due
    plain, _ = passes(loss, w)
    for seed in range(3):
        v = [draw(*shape, seed=20 + seed)]
        kept = v[0].clone()
        for product in (program.product.forward, program.source.forward, *([way] if way else [])):
            torch.testing.assert_close(list(product(*v, *held)), plain(v), rtol=1e-12, atol=1e-13)
        assert torch.equal(v[0], kept)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (12, 1), ()])
def test_a_factor_of_a_block_is_cut_if_it_has_rows(shape, monkeypatch):
    """As many columns as rows: what is broadcast to the columns is no column."""
    monkeypatch.setattr(_blocks, "BLOCK", 2 * 5 * 8)
    d = draw(*shape, seed=2)
    program, held = recorded_function(lambda v: [TALL.T @ (d * (TALL @ v))], draw(5, 12))
    way, v = _blocks.ByBlocks(program).way(held), draw(5, 12, seed=3)
    assert way is not None
    torch.testing.assert_close(way(v, *held)[0], TALL.T @ (d * (TALL @ v)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_in_one_piece(dtype, monkeypatch):
    """Rounded after each of many blocks, sums of positive numbers were 2e-2 away instead of 1e-3 (bfloat16)."""
    monkeypatch.setattr(_blocks, "BLOCK", 2 * 5 * 2)
    x = draw(200, 5).to(dtype)
    program, held = recorded_function(lambda v: [x.T @ (x @ v)], draw(5).to(dtype))
    assert _blocks.ByBlocks(program).way(held) is None


def test_a_large_linear_model_goes_by_blocks_of_rows(monkeypatch):
    """Whole hypergradients, of data that are large enough and of some that are not, by one recording."""
    monkeypatch.setattr(_compiled, "_recordings", {})
    monkeypatch.setattr(_compiled, "INDUCTOR", EAGER)
    monkeypatch.setattr(_blocks, "BLOCK", 6 * 8 * 10)
    clock = iter([8e-5, 5e-5, 6e-5, 9e-5])
    monkeypatch.setattr(_compiled, "_seconds", lambda call, v: next(clock))
    for rows in (60, 20):
        x, y = draw(rows, 6), draw(rows, seed=1)
        given = (lambda w, lam: ((x @ w - y) ** 2).mean() + (lam.exp() * w**2).sum()), *problem(0)[1:]  # noqa: B023
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_compiled, "_key", lambda held, backend: (backend, 0))
            result = grads_of(given, True)
        assert result.compiled.startswith("blocks of rows: 50 µs a product, against 80 by recorded, 60 by")
        torch.testing.assert_close(result.grads, grads_of(given, False).grads, rtol=1e-10, atol=1e-12)
    (recording,) = _compiled._recordings.values()
    assert recording.blocks.places


@pytest.mark.parametrize(
    "function",
    [
        lambda v: [A @ (2 * (A @ v)) + 3 * v],
        lambda v: [(y := A @ v), y + A @ y],  # what is a result, or used again, is not written into
        lambda v: [(y := A @ v) + A @ v, y * y.new_tensor(2.0)],
        lambda v: [A @ v + A @ (A @ v) + v],
        lambda v: [(y := A @ v).t() + A @ v, torch.relu(y.new_ones(4)) * (A @ v)],
        lambda v: [(y := A @ v) + y, (z := A @ v).view(2, 2).sum(0) + z.mul(2)[:2]],
        lambda v: [v + A @ v, v * 2.0],
        lambda v: [torch.add(A @ v, A @ v, alpha=3), torch.sub(A @ v, v)],
        # zeros that are used again, before and after they were added
        lambda v: [A @ (A[0] * (torch.where(SOME, A[1] * v, z := torch.zeros_like(v)) + z))],
        lambda v: [A @ (A[0] * torch.where(SOME, A[1] * v + (z := torch.zeros_like(v)), z))],
        lambda v: [A @ (A[0] * (torch.stack([A[1] * v, z := torch.zeros_like(v)]) + z)[0] + z)],
        lambda v: [A @ (A[0] * (A[1] * v + torch.zeros_like(v))) + torch.zeros_like(v)],
    ],
)
def test_what_is_written_in_place(function):
    program, held = recorded_function(function, draw(4, seed=1))
    constants = [c.clone() if isinstance(c, torch.Tensor) else c for c in held]
    for seed in range(2, 5):
        v = draw(4, seed=seed)
        kept = v.clone()
        for product in (program.product.forward, program.source.forward):
            torch.testing.assert_close(list(product(v, *held)), function(v), rtol=1e-14, atol=1e-14)
        assert torch.equal(v, kept)
        same = [
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(held, constants, strict=True)
        ]
        assert all(same)


def test_a_wider_number_added_in_place_is_not_recorded():
    """float32 += float64 is float32, and the sum of the two is float64."""
    v = draw(4)
    with Recorder([v]) as recorder:
        results = [(v.float() * 2).add_(v)]
    recorder.finish(results)
    assert results[0].dtype == torch.float32
    assert recorder.reason == "it changes a tensor in place (aten.add_.Tensor)"
    for other in (v.float(), 2.0, torch.tensor(2.0, dtype=torch.float64)):
        with Recorder([v]) as recorder:
            results = [(v.float() * 2).add_(other)]
        recorder.finish(results)
        assert recorder.reason is None


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
    options = {"solver": S.MINRES(rtol=1e-12, max_steps=60, on_failure="ignore")} | options
    return hg.implicit.grad(cubes, inner_loss=loss, params=w, hparams=lam, compile=compile, **options)


@pytest.mark.parametrize("compile", [RECORDED, EAGER])
def test_a_sequence_of_outer_steps_builds_once(compile):
    """New closures, data, numbers in them and batch sizes: nothing of one outer step is left in the next."""
    for seed in range(4):
        grads_of(problem(seed, rows=20 + seed, factor=1 + seed), compile)  # two sizes that differ make it general
    forms, graphs = set(_compiled._recordings), counters["stats"]["unique_graphs"]
    for seed in range(4, 14):
        given = problem(seed, rows=20 + seed, factor=1 + seed)
        torch.testing.assert_close(grads_of(given, compile).grads, grads_of(given, False).grads, rtol=1e-10, atol=1e-12)
    assert set(_compiled._recordings) == forms and counters["stats"]["unique_graphs"] == graphs


def test_a_tensor_that_changes_between_outer_steps_in_place():
    loss, w, lam = problem(0)
    scale = torch.tensor(1.0, dtype=torch.float64)
    given = (lambda w, lam: scale * loss(w, lam)), w, lam
    for value in (1.0, 3.0, 0.5):
        scale.fill_(value)
        w.add_(0.1)
        torch.testing.assert_close(grads_of(given, RECORDED).grads, grads_of(given, False).grads, rtol=1e-10, atol=0)


def test_parameters_of_other_dtypes():
    x, y = draw(20, 6).float(), draw(20, seed=1).float()

    def loss(w, lam):
        return (torch.tanh(x @ w[0] + w[1].float()) - y).square().mean() + lam.exp() * w[1].square().sum()

    w, lam = [draw(6).float(), draw(1, seed=2)], torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    results = [grads_of((loss, w, lam), c, solver=S.CG(max_steps=3, on_failure="ignore")) for c in (RECORDED, False)]
    assert results[0].compiled == f"compiled by {RECORDED}"
    torch.testing.assert_close(results[0].grads, results[1].grads, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("best", "times"),
    [
        ("recorded", {"recorded": 1e-3, EAGER: 3e-3, "reverse passes": 2e-3}),
        (EAGER, {"recorded": 4e-3, EAGER: 1e-3, "reverse passes": 2e-3}),
        ("reverse passes", {"recorded": 5e-3, EAGER: 4e-3, "reverse passes": 3e-3}),
        ("recorded", {"recorded": 1e-5, "reverse passes": 2e-5}),  # too small for a compiler
    ],
)
def test_the_fastest_way_is_taken_and_said(best, times, monkeypatch):
    """By times that the test makes up; they are part of the result, and a second hypergradient measures nothing."""
    clock = iter(times.values())
    monkeypatch.setattr(_compiled, "_recordings", {})
    monkeypatch.setattr(_compiled, "INDUCTOR", EAGER)
    monkeypatch.setattr(_compiled, "_seconds", lambda call, v: next(clock))
    ways = []
    monkeypatch.setattr(_compiled.Recording, "way", noted(_compiled.Recording.way, ways))
    given = problem(0)
    first, second = grads_of(given, True), grads_of(given, True)
    others = ", ".join(f"{1e6 * t:.3g} by {way}" for way, t in times.items() if way != best)
    assert first.compiled == second.compiled == f"{best}: {1e6 * times[best]:.3g} µs a product, against {others}"
    assert next(clock, None) is None
    usual = grads_of(given, False).grads
    for result in (first, second):
        torch.testing.assert_close(result.grads, usual, rtol=1e-10, atol=1e-12)
    # tried; taken in the first hypergradient, and again in the second, with what stands in if it fails
    taken = [] if best == "reverse passes" else ["recorded"] if best == "recorded" else ["recorded", best]
    assert ways == [way for way in times if way != "reverse passes"] + 2 * taken


def noted(way, names):
    def call(self, name, held):
        names.append(name)
        return way(self, name, held)

    return call


def test_every_product_but_the_first_two_is_the_recording():
    """Those of CG; the last product is a reverse pass, and later hypergradients need one pass to record."""
    p, seen = problem_at("ridge"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compiled, "_recordings", {})
        patch.setattr(_compiled, "_check", lambda *_: None)
        patch.setattr(_compiled, "_seconds", lambda *_: 1e-6)
        way = _compiled.Recording.way
        patch.setattr(_compiled.Recording, "way", lambda *args: lambda v: seen.append(1) or way(*args)(v))
        for products in (5, 6):
            hypergradient(p, "inner_loss", S.CG(max_steps=7), compile=RECORDED)
            assert len(seen) == products
            seen.clear()


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (lambda v: [2 * (2 * v + draw(4)), 3 * (2 * v)], 4),  # a factor at v = 1 would make (2 + c) v of 2 v + c
        (lambda v: [2 * v + draw(4, 4) @ v, 0 * v], 3),
        (lambda v: [2 * v + (y := draw(4, 4) @ v), y], 3),  # a product that is used twice stays by itself
    ],
)
def test_what_may_be_simplified(function, operations):
    program, held = recorded_function(function, draw(4, seed=1))
    for v in (draw(4, seed=2), torch.zeros(4, dtype=torch.float64)):
        for got, due in zip(program.product.forward(v, *held), function(v), strict=True):
            torch.testing.assert_close(got, due)
    assert sum(node.op == "call_function" for node in program.product.graph.nodes) == operations


def test_a_check_of_a_compiled_hypergradient():
    p = problem_at("ridge")
    result = hypergradient(p, "inner_loss", S.CG(rtol=1e-13), compile=RECORDED, polish=True)
    assert_agrees(p, result.grads)
    assert hg.diagnostics.check(result).estimate.relative_error < 1e-8


def test_random_draws_are_those_of_the_graph():
    """One mask for the products and the last product; and torch's random state goes on as without compile."""
    loss, w = losses()["dropout"]
    lam = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    results, states = [], []
    for compile in (RECORDED, False):
        torch.manual_seed(3)
        results.append(grads_of((loss, w, lam), compile, solver=S.MINRES(max_steps=5, on_failure="ignore")))
        states.append(torch.get_rng_state())
    torch.testing.assert_close(results[0].grads, results[1].grads, rtol=1e-9, atol=0)
    assert torch.equal(*states)


class Noisy(Twice):
    """2 x, whose backward pass draws a number."""

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand((), dtype=grad.dtype)


class Hidden(Twice):
    """2 x, whose backward pass is done by NumPy: torch does not see it."""

    @staticmethod
    def backward(ctx, grad):
        return Hidden.apply(grad) if torch.is_grad_enabled() else torch.from_numpy(2 * grad.numpy())


@pytest.mark.parametrize(
    ("function", "reason"),
    [(Noisy, "it draws random numbers"), (Doubled, "it changes a tensor in place"), (Hidden, "its product is")],
)
def test_what_cannot_be_recorded_is_done_as_usual_and_said(function, reason):
    x = draw(20, 6)
    lam = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def loss(w, lam):
        return function.apply(torch.tanh(x @ w)).square().mean() + lam.exp() * w.square().sum()

    for _ in range(2):  # the second one knows
        torch.manual_seed(0)
        with pytest.warns(hg.NotCompiled, match=f"products could not be compiled: reverse passes, for .*{reason}"):
            result = grads_of((loss, draw(6, seed=1), lam), RECORDED)
        torch.manual_seed(0)
        torch.testing.assert_close(result.grads, grads_of((loss, draw(6, seed=1), lam), False).grads)
        assert result.compiled is not None and reason in result.compiled


class Unseen(torch.autograd.Function):
    """m x, whose backward pass is done where torch does not see it, in one way or another."""

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
def test_what_torch_does_not_see_may_be_zero_at_first(way, alone, monkeypatch):
    """m = 0 at the first outer step: the recording is right there, and is not taken at the next one."""
    monkeypatch.setattr(_compiled, "_recordings", {})
    a, lam = 0.1 * draw(6, 6), draw(6, seed=2).requires_grad_()
    options = {"outer_loss": cubes, "params": draw(6, seed=3), "hparams": lam, "solver": S.FixedPoint(max_steps=30)}
    for m in (0.0, 0.1, 0.2):
        seen = (lambda w: 0.0) if alone else (lambda w: torch.tanh(a @ w))
        given = lambda w, lam: Unseen.apply(w, m * draw(6, 6, seed=1), way) + seen(w) + lam  # noqa: B023, E731
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = hg.implicit.grad(fp_map=given, compile=RECORDED, **options)
            due = hg.implicit.grad(fp_map=given, **options)
        torch.testing.assert_close(result.grads, due.grads, rtol=1e-10, atol=1e-12)
        assert m == 0 or any(issubclass(w.category, hg.NotCompiled) for w in warned)


def in_other_memory(w, lam):
    """A loss whose products look at v as rows, which it is or is not."""
    flat = (1.0 * w).reshape(-1)
    return (flat.sin() ** 2).sum() + (lam.exp() * w**2).sum() + (2 * w).reshape(6, 2).tanh().sum()


@pytest.mark.parametrize("solver", [S.CG, S.MINRES, S.GMRES, S.BiCGStab])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_independent_systems_in_any_memory(solver, transposed, begun):
    w, lam = draw(3, 4), draw(4, seed=5).requires_grad_()
    w = w.t().contiguous().t() if transposed else w
    options = {"params": w, "hparams": lam, "inner_loss": in_other_memory, "batch_dims": 1}
    options |= {"solver": solver(max_steps=4, on_failure="ignore"), "x0": draw(3, 4, seed=7) if begun else None}

    def outer_loss(w, lam):
        return (w.t() @ draw(3, 3, seed=3)).sin().sum()

    result = hg.implicit.grad(outer_loss, compile=RECORDED, **options)
    assert result.compiled == f"compiled by {RECORDED}"
    torch.testing.assert_close(result.grads, hg.implicit.grad(outer_loss, **options).grads, rtol=1e-10, atol=1e-12)


def test_recorded_operations_that_fail_later(monkeypatch):
    monkeypatch.setattr(_compiled, "_recordings", {})
    given = problem(0)
    grads_of(given, RECORDED)
    (recording,) = _compiled._recordings.values()

    def fails(*given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recording.program.product, "forward", fails)
    with pytest.warns(hg.NotCompiled, match="done by reverse passes: RuntimeError: out of memory"):
        result = grads_of(given, RECORDED)
    torch.testing.assert_close(result.grads, grads_of(given, False).grads, rtol=1e-10, atol=1e-12)


def test_a_product_that_is_not_finite_says_nothing_of_the_next_hypergradient(monkeypatch):
    monkeypatch.setattr(_compiled, "_recordings", {})
    loss, w, lam = problem(0)
    reports = []
    for factor in (float("nan"), 1.0):
        given = (lambda w, lam, factor=factor: factor * loss(w, lam)), w, lam
        result = grads_of(given, RECORDED, solver=S.MINRES(max_steps=4, on_failure="ignore"))
        reports.append(result.compiled)
    assert reports == [
        "reverse passes: a product that is not finite tells nothing of others",
        f"compiled by {RECORDED}",
    ]


def test_a_compiler_that_fails_later(monkeypatch):
    monkeypatch.setattr(_compiled, "_recordings", {})
    given = problem(0)
    grads_of(given, EAGER)
    (recording,) = _compiled._recordings.values()

    def fails(*given):
        raise RuntimeError("recompile_limit reached")

    recording._compiled[EAGER] = fails
    with pytest.warns(hg.NotCompiled, match="could not be compiled again, .* recompile_limit reached"):
        result = grads_of(given, EAGER)
    torch.testing.assert_close(result.grads, grads_of(given, False).grads, rtol=1e-10, atol=1e-12)


def test_a_recording_that_cannot_be_simplified(monkeypatch):
    def fails(*given):
        raise RuntimeError("no such shape")

    monkeypatch.setattr(Program, "held", fails)
    given = problem(0)
    with pytest.warns(hg.NotCompiled, match="no such shape"):
        result = grads_of(given, RECORDED)
    torch.testing.assert_close(result.grads, grads_of(given, False).grads)


def test_a_backend_that_is_not_there():
    p = problem_at("ridge")
    with pytest.warns(hg.NotCompiled, match="no_such_backend"):
        result = hypergradient(p, "inner_loss", S.CG(rtol=1e-13, on_failure="ignore"), compile="no_such_backend")
    assert_agrees(p, result.grads)


def test_an_error_of_the_users_own_passes_through():
    p = problem_at("ridge")

    def failing(w, h):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hg.implicit.grad(p.outer_loss, params=p.params, hparams=p.hparams, inner_loss=failing, compile=EAGER)


def test_evaluated_losses_of_a_live_module():
    """BatchNorm's buffers are written once, as without compile."""
    results = []
    for compile in (RECORDED, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        lam = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        params = list(net.parameters())
        inner = F.cross_entropy(net(X), Y) + lam.exp() * sum(w.square().sum() for w in params)
        outer = sum(w.sin().sum() for w in params)
        solver = S.CG(max_steps=5, on_failure="ignore")
        result = hg.implicit.grad(outer, inner_loss=inner, params=params, hparams=lam, solver=solver, compile=compile)
        results.append(result)
        assert net[1].num_batches_tracked == 1
    assert results[0].compiled == f"compiled by {RECORDED}"
    torch.testing.assert_close(results[0].grads, results[1].grads, rtol=1e-9, atol=0)


def test_nothing_is_kept_beyond_the_last_product():
    """The saved tensors go with the graph, without the garbage collector."""
    made: list[weakref.ref] = []
    x = draw(20, 6)

    def loss(w, lam):
        z = torch.tanh(x @ w)
        made.append(weakref.ref(z))
        return z.square().mean() + lam.exp() * w.square().sum()

    lam = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        for compile in (False, RECORDED, RECORDED):
            grads_of((loss, draw(6, seed=1), lam), compile)
            assert made.pop()() is None
    finally:
        gc.enable()


def test_a_result_may_be_written_into():
    """A part of the Hessian that is zero is new memory at each product."""
    plain, space = passes(lambda w, lam: w[0].square().sum() + w[1].sum(), [draw(3), draw(4)])
    product = _compiled.Product(plain, space, RECORDED)
    v = [draw(3, seed=1), draw(4, seed=2)]
    for _ in range(4):
        got = product(v)
        torch.testing.assert_close(got[0], 2 * v[0])
        assert not got[1].any()
        got[1].fill_(7.0)


def test_what_compile_is_not_for_is_refused():
    loss, w, lam = problem(0)
    gauss = hg.operators.GaussNewton(lambda w, lam: w, lambda z, lam: (z**2).sum())
    for inner, more in ((loss, {"stochastic": True}), (gauss, {})):
        with pytest.raises(TypeError, match="compile needs an inner_loss that is neither stochastic nor GaussNewton"):
            hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=inner, params=w, hparams=lam, compile=True, **more)


def test_compile_takes_a_bool_or_a_name():
    loss, w, lam = problem(0)
    for bad in (1, None, lambda graph, inputs: graph):
        with pytest.raises(TypeError, match="compile must be True, False or the name of a backend, got"):
            hg.implicit.grad(lambda w, lam: w.sum(), inner_loss=loss, params=w, hparams=lam, compile=bad)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "form"), [("logistic", "inner_loss"), ("equilibrium", "fp_map")])
def test_the_default_backend(name, form, monkeypatch):
    monkeypatch.setattr(_compiled, "WORTH", 0.0)
    p = problem_at(name)
    for compile in ("inductor", True):
        solver = S.GMRES(rtol=1e-13, restart=60, on_failure="ignore")
        result = hypergradient(p, form, solver, compile=compile)
        assert_agrees(p, result.grads)
        assert result.compiled is not None and "inductor" in result.compiled
