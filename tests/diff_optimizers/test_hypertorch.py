"""Differentiable update rules against formulas, torch.optim.SGD, finite differences and DESIGN's heavy-ball row."""

import inspect
import itertools

import pytest
import torch

import hypergrad as hg
import oracles
import problems
from helpers import errors, noisy, nothing_changed, untouched
from test_oracles import flat, relative


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rand(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)


A = torch.diag(torch.tensor([0.3, 1.0, 2.0, 4.0], dtype=torch.float64))


def loss_f(params, hparams):
    """A loss of two leaves, [4] and [], whose curvature depends on λ and on w."""
    w, s = params
    return 0.5 * w @ A @ w * hparams[0].exp() + (w.sum() * s).sin() + 0.1 * s**4 + (hparams[1] * w).sum()


def case(requires_grad: bool = True):
    params = [rand(4, requires_grad=requires_grad), rand(requires_grad=requires_grad)]
    return params, [rand(requires_grad=True), rand(4, requires_grad=True)]


def slopes(params, hparams):
    leaves = [w.detach().requires_grad_() for w in params]
    return torch.autograd.grad(loss_f(leaves, hparams), leaves)


ETA, MU = 0.07, 0.6
RULES = {
    "GradientDescent": (lambda w, v, g: (w - ETA * g, None)),
    "HeavyBall": (lambda w, v, g: (w - ETA * g + MU * (w - v), w)),
    "Momentum": (lambda w, v, g: (w - ETA * (MU * v + g), MU * v + g)),
}


def make(name, step_size=ETA, momentum=MU, loss=loss_f, **options):
    return getattr(hg, name)(loss, step_size, *(() if name == "GradientDescent" else (momentum,)), **options)


def state_of(name, params, aux):
    return params if name == "GradientDescent" else [*params, *aux]


SIGNATURES = {
    "gd_step": ["params", "loss", "step_size", "create_graph"],
    "heavy_ball_step": ["params", "aux_params", "loss", "step_size", "momentum", "create_graph"],
    "torch_momentum_step": ["params", "aux_params", "loss", "step_size", "momentum", "create_graph"],
    "DifferentiableOptimizer": ["loss_f", "dim_mult", "data_or_iter"],
    "GradientDescent": ["loss_f", "step_size", "data_or_iter"],
    "HeavyBall": ["loss_f", "step_size", "momentum", "data_or_iter"],
    "Momentum": ["loss_f", "step_size", "momentum", "data_or_iter"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_hypertorchs(name):
    parameters = inspect.signature(getattr(hg, name)).parameters
    assert list(parameters) == SIGNATURES[name]
    defaults = {"create_graph": True, "data_or_iter": None}
    for key, parameter in parameters.items():
        assert parameter.default == defaults.get(key, inspect.Parameter.empty)
    assert getattr(hg.diff_optimizers, name) is getattr(hg, name)


METHODS = {
    "get_opt_params": ["self", "params"],
    "step": ["self", "params", "hparams", "create_graph"],
    "__call__": ["self", "params", "hparams", "create_graph"],
    "get_loss": ["self", "params", "hparams"],
}


@pytest.mark.parametrize("name", ["DifferentiableOptimizer", *RULES])
def test_methods_are_hypertorchs(name):
    """A subclass may define step and call get_loss."""
    kind = getattr(hg, name)
    for method, parameters in METHODS.items():
        assert list(inspect.signature(getattr(kind, method)).parameters) == parameters
    assert inspect.signature(kind.__call__).parameters["create_graph"].default is True

    class Signs(hg.DifferentiableOptimizer):
        def step(self, params, hparams, create_graph):
            grads = torch.autograd.grad(self.get_loss(params, hparams), params, create_graph=create_graph)
            return [w - 0.1 * g.sign() for w, g in zip(params, grads, strict=True)]

    params, hparams = case()
    new = Signs(loss_f, 1)(params, hparams)
    assert (
        max(
            errors(
                [w.detach() for w in new],
                [w.detach() - 0.1 * g.sign() for w, g in zip(params, slopes(params, hparams), strict=True)],
            )
        )
        < 1e-14
    )


@pytest.mark.parametrize("name", RULES)
def test_params_in_lists_in_lists(name):
    """The state is nested in the same way as params; the results are those of flat lists."""
    params, hparams = case()
    flat_optimizer = make(name)
    nested_optimizer = make(name, loss=lambda w, h: loss_f([w[0][0], w[1]], h))
    state = flat_optimizer.get_opt_params(params)
    nested = nested_optimizer.get_opt_params([(params[0],), params[1]])
    for _ in range(3):
        state, nested = flat_optimizer(state, hparams), nested_optimizer(nested, hparams)
    assert torch.equal(nested[0][0], state[0]) and torch.equal(nested[1], state[1])
    if name != "GradientDescent":
        assert torch.equal(nested[2][0], state[2]) and torch.equal(nested[3], state[3])


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_a_step_is_its_formula(name, requires_grad):
    """Params may or may not require grad, and none of the arguments is overwritten."""
    params, hparams = case(requires_grad)
    aux = [rand(4), rand()]
    with untouched(params, hparams, aux):
        new = make(name)(state_of(name, params, aux), hparams)
    half = len(params)
    for i, (w, v, g) in enumerate(zip(params, aux, slopes(params, hparams), strict=True)):
        expected, expected_aux = RULES[name](w.detach(), v, g)
        assert relative(new[i].detach(), expected) < 1e-14
        if expected_aux is not None:
            assert relative(new[half + i].detach(), expected_aux) < 1e-14
    assert type(new) is list and len(new) == half * (1 if name == "GradientDescent" else 2)


@pytest.mark.parametrize("name", ["GradientDescent", "Momentum"])
def test_steps_are_torch_optims(name):
    """25 steps agree with torch.optim.SGD with the rule's momentum; HeavyBall from w₋ = w₀ takes the same path."""
    params, hparams = case(False)
    theirs = [w.clone().requires_grad_() for w in params]
    sgd = torch.optim.SGD(theirs, lr=ETA, momentum=0.0 if name == "GradientDescent" else MU)
    ours = make(name)
    state = ours.get_opt_params(params)
    polyak = make("HeavyBall")
    other = [*params, *params]
    for _ in range(25):
        sgd.zero_grad()
        loss_f(theirs, hparams).backward(inputs=theirs)
        sgd.step()
        state = ours(state, hparams, create_graph=False)
        other = polyak(other, hparams, create_graph=False)
    assert max(errors([w.detach() for w in state[:2]], [w.detach() for w in theirs])) < 1e-12
    if name == "Momentum":
        assert max(errors([w.detach() for w in other[:2]], [w.detach() for w in theirs])) < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_get_opt_params(name):
    """It returns params, and zeros of their shapes as buffers, from a list, a tuple or model.parameters()."""
    params, _ = case()
    optimizer = make(name)
    for given in (params, tuple(params), iter(params)):
        state = optimizer.get_opt_params(given)
        assert type(state) is list and len(state) == 2 * optimizer.dim_mult
        assert state[0] is params[0] and state[1] is params[1]
        for w, zero in zip(params, state[2:], strict=False):
            assert torch.equal(zero, torch.zeros_like(w))
    assert optimizer.dim_mult == (1 if name == "GradientDescent" else 2)


@pytest.mark.parametrize("name", RULES)
def test_create_graph(name):
    """With it all derivatives of the step exist; without it those through the gradient are missing. Values agree."""
    params, hparams = case()
    optimizer = make(name)
    state = optimizer.get_opt_params(params)
    graph, plain = optimizer(state, hparams), optimizer(state, hparams, create_graph=False)
    assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(graph, plain, strict=True))
    through = torch.autograd.grad(graph[0].pow(3).sum(), [*params, *hparams])
    assert all(g.abs().max() > 0 for g in through)
    assert all(g is None for g in torch.autograd.grad(plain[0].pow(3).sum(), hparams, allow_unused=True))
    with torch.no_grad():
        again = optimizer(state, hparams)
    assert again[0].requires_grad and torch.equal(again[0].detach(), graph[0].detach())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_gradcheck_in_params_hparams_step_size_and_momentum(name, steps):
    """The derivatives of steps in all their inputs agree with finite differences."""
    params, hparams = case()
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (ETA, MU)]
    aux = [rand(4, requires_grad=True), rand(requires_grad=True)]

    def run(w, s, v, u, a, b, step_size, momentum):
        optimizer = make(name, step_size, momentum)
        state = state_of(name, [w, s], [v, u])
        for _ in range(steps):
            state = optimizer(state, [a, b])
        return tuple(state)

    inputs = (*params, *aux, *hparams, *numbers)
    assert torch.autograd.gradcheck(run, inputs)
    if steps == 1:
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("name", RULES)
def test_step_size_and_momentum_as_callables_of_hparams(name):
    """η = e^{λ₀} and μ = σ(λ₁₀) act as numbers of the same values, and are differentiated."""
    params, hparams = case()
    optimizer = make(name, lambda h: h[0].exp(), lambda h: torch.sigmoid(h[1][0]))
    state = optimizer.get_opt_params(params)
    new = optimizer(optimizer(state, hparams), hparams)
    values = hparams[0].exp().item(), torch.sigmoid(hparams[1][0]).item()
    plain = make(name, *values)
    same = plain(plain(state, hparams), hparams)
    assert max(errors([x.detach() for x in new], [x.detach() for x in same])) < 1e-14

    def f(a, b):
        state = optimizer.get_opt_params([w.detach() for w in params])
        return sum(x.pow(2).sum() for x in optimizer(optimizer(state, [a, b]), [a, b]))

    assert torch.autograd.gradcheck(f, tuple(hparams))


# --- data and the current loss ----------------------------------------------------------------------------------------


def data_loss(params, hparams, data):
    x, y = data
    return ((x @ params[0] - y) ** 2).mean() + hparams[0].exp() * params[0].square().sum()


@pytest.mark.parametrize("name", RULES)
def test_data_as_one_batch_or_an_iterator(name):
    """A tuple is used at every step, an iterator gives each step a batch; curr_loss is the loss before the step."""
    batches = [(rand(6, 3), rand(6)) for _ in range(4)]
    hparams = [rand(requires_grad=True)]
    w = rand(3)

    fixed = make(name, loss=data_loss, data_or_iter=batches[0])
    assert fixed.curr_loss is None
    state = fixed.get_opt_params([w])
    for _ in range(3):
        before = state[0].detach()
        state = fixed(state, hparams)
        assert relative(fixed.curr_loss.detach(), data_loss([before], hparams, batches[0]).item()) < 1e-14

    streaming = make(name, loss=data_loss, data_or_iter=itertools.cycle(batches))
    state = streaming.get_opt_params([w])
    for batch in batches:
        single = make(name, loss=data_loss, data_or_iter=batch)
        before, expected = state[0].detach(), single(state, hparams)
        state = streaming(state, hparams)
        assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(state, expected, strict=True))
        assert relative(streaming.curr_loss.detach(), data_loss([before], hparams, batch).item()) < 1e-14

    ending = make(name, loss=data_loss, data_or_iter=iter(batches[:1]))
    state = ending(ending.get_opt_params([w]), hparams)
    with pytest.raises(StopIteration):
        ending(state, hparams)


def test_a_list_of_batches_is_one_datum():
    """As in HyperTorch, only an object with __next__ is an iterator; a list or a DataLoader is passed whole."""
    seen = []

    def loss(params, hparams, data):
        seen.append(data)
        return params[0].square().sum()

    data = [rand(2), rand(2)]
    optimizer = hg.GradientDescent(loss, 0.1, data)
    optimizer(optimizer([rand(2)], []), [])
    assert seen[0] is data and seen[1] is data


# --- an optimizer object is a fixed point map -------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_an_optimizer_is_an_fp_map(name):
    """At the solution of ridge each rule as Φ gives the oracle's ∇f; the state of HeavyBall is (w, w) there."""
    p = problems.problem("ridge", random=1)
    optimizer = make(name, 0.3, 0.4, loss=lambda w, h: p.inner_loss(w[0], h[0]))
    aux = [p.params.clone()] if name == "HeavyBall" else [torch.zeros_like(p.params)]
    state = state_of(name, [p.params], aux)
    assert relative(flat(optimizer(state, [p.hparams])).detach(), flat(state)) < 1e-12

    def outer(w, h):
        return p.outer_loss(w[0], h[0])

    options = {"tol": 1e-13, "set_grad": False}
    methods = {"fixed_point": 2000, "CG_normaleq": 2000} | ({"CG": 100} if name == "GradientDescent" else {})
    for method, steps in methods.items():
        grads = getattr(hg, method)(state, [p.hparams], steps, optimizer, outer, **options)
        assert max(errors(grads, p.grads)) < 1e-10, method
    grads = hg.reverse([state] * 801, [p.hparams], [optimizer] * 800, outer, set_grad=False)
    assert max(errors(grads, p.grads)) < 1e-10


def test_derivatives_of_optimizer_steps_agree_in_every_mode():
    """reverse, reverse_unroll and finite differences of f agree for five steps of Momentum with a learned step size."""
    params, hparams = case(False)
    hparams.append(torch.tensor(-2.5, dtype=torch.float64, requires_grad=True))
    optimizer = hg.Momentum(loss_f, lambda h: h[2].exp(), 0.5)

    def outer(w, h):
        return w[0].pow(2).sum() + w[1] * h[1].sum()

    state = optimizer.get_opt_params(params)
    history, live = [state], state
    for _ in range(5):
        history.append([x.detach() for x in optimizer(history[-1], hparams, create_graph=False)])
        live = optimizer(live, hparams)
    unrolled = hg.reverse_unroll(live, hparams, outer, set_grad=False)
    stored = hg.reverse(history, hparams, [optimizer] * 5, outer, set_grad=False)
    assert max(errors(stored, unrolled)) < 1e-12

    def f(*h):
        state = optimizer.get_opt_params(params)
        for _ in range(5):
            state = optimizer(state, h)
        return outer(state, h)

    assert torch.autograd.gradcheck(f, tuple(hparams))


@pytest.mark.parametrize("name", ["HeavyBall", "Momentum"])
@pytest.mark.parametrize("random", [False, True])
def test_the_heavy_ball_row(name, random):
    """30 steps v ← μv + ∇g, w ← w − ηv as in DESIGN's row; HeavyBall is the same recursion from w₋ = w₀."""
    u = problems.heavy_ball(random=random)
    curvature = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)
    optimizer = getattr(hg, name)(
        lambda w, h: 0.5 * (curvature * w[0] ** 2).sum(), lambda h: h[0].exp(), lambda h: torch.sigmoid(h[1])
    )
    start = u.start["w"]
    state = [start, start] if name == "HeavyBall" else optimizer.get_opt_params([start])
    hparams = list(u.hparams)
    history, live = [state], state
    for _ in range(u.steps):
        history.append([x.detach() for x in optimizer(history[-1], hparams, create_graph=False)])
        live = optimizer(live, hparams)
    assert relative(history[-1][0], u.final) < 1e-13

    def outer(state, hparams):
        return 0.5 * state[0].square().sum()

    assert relative(outer(live, hparams).item(), u.value) < 1e-12
    for grads in (
        hg.reverse(history, hparams, [optimizer] * u.steps, outer, set_grad=False),
        hg.reverse_unroll(live, hparams, outer, set_grad=False),
    ):
        assert max(errors(grads, u.grads)) < 1e-10
    if not random:
        assert relative(outer(live, hparams).item(), 0.0109102107586) < 1e-11
        assert relative(oracles.heavy_ball().grad_norm, flat(grads).norm().item()) < 1e-10


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_bad_losses_and_states(name):
    params, hparams = case()

    def step(loss, state=None):
        optimizer = make(name, loss=noisy(loss))
        return optimizer(optimizer.get_opt_params(params) if state is None else state, hparams)

    class Boom(Exception):
        pass

    def explode(w, h):
        raise Boom

    rows = [
        (lambda: step(lambda w, h: w[0]), ValueError, r"inner loss must give a scalar, got shape \(4,\)"),
        (lambda: step(lambda w, h: 1.0), TypeError, "inner loss must give a scalar tensor, got float"),
        (lambda: step(lambda w, h: h[0] ** 2), ValueError, "does not depend on params"),
        (lambda: step(lambda w, h: w[0].detach().sum()), ValueError, "does not depend on params"),
        (lambda: step(explode), Boom, None),
    ]
    if name != "GradientDescent":
        rows.append((lambda: step(loss_f, params[:1]), ValueError, "1 tensors are not a multiple of 2"))
    for call, error, words in rows:
        with nothing_changed(params, hparams), pytest.raises(error, match=words):
            call()
    with pytest.raises(NotImplementedError, match="DifferentiableOptimizer"):
        hg.DifferentiableOptimizer(loss_f, 1)(params, hparams)
    with pytest.warns(hg.HypergradientWarning, match="hparams is an iterator"):
        make(name, loss=lambda w, h: w[0].square().sum())([*params, *params], iter(hparams))
