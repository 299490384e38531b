"""HyperTorch's interface: its signatures, its meaning of K, and right results in cases where HyperTorch's are wrong."""

import inspect
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hypergrad as hg
import oracles
from helpers import (
    S,
    as_lists,
    assert_agrees,
    dense_system,
    errors,
    noisy,
    nothing_changed,
    problem_at,
    untouched,
)
from problems import PROBLEMS
from test_oracles import flat, relative

LISTS = [name for name in PROBLEMS if problem_at(name).batch_dims == 0]
AFFORDABLE = [name for name in LISTS if problem_at(name).contraction <= 0.99]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rand(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)


def listed(name: str, seed: int = 0):
    return as_lists(problem_at(name, seed))


# --- names and signatures ---------------------------------------------------------------------------------------------

# HyperTorch's, as its source has them: parameters in order, with their defaults.
COMMON = "params, hparams, K, fp_map, outer_loss, tol=1e-10, set_grad=True"
FUNCTIONS = {
    "reverse_unroll": "params, hparams, outer_loss, set_grad=True",
    "reverse": "params_history, hparams, update_map_history, outer_loss, set_grad=True",
    "fixed_point": COMMON + ", stochastic=False",
    "CG": COMMON + ", stochastic=False",
    "CG_normaleq": COMMON,
    "neumann": COMMON,
    "exact": "opt_params_f, hparams, outer_loss, set_grad=True",
    "stoch_AID": "params, hparams, outer_loss, K, J_inner=1, J_outer=1, fp_map=None, inner_loss=None, "
    "linsys_start=None, stoch_outer=False, stoch_inner=False, optim_build=None, opt_params=None, set_grad=True, "
    "verbose=True",
    "grd": "a, b",
    "list_dot": "l1, l2",
    "jvp": "fp_map, params, vs",
    "get_outer_gradients": "outer_loss, params, hparams, retain_graph=True",
    "cat_list_to_tensor": "list_tx",
    "update_tensor_grads": "hparams, grads",
    "grad_unused_zero": "output, inputs, grad_outputs=None, retain_graph=False, create_graph=False",
}


def parameters_of(function) -> str:
    parameters = inspect.signature(function).parameters.values()
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_names_and_signatures_are_hypertorchs(name):
    assert parameters_of(getattr(hg.hypergradients, name)) == FUNCTIONS[name]
    assert getattr(hg, name) is getattr(hg.hypergradients, name) and name in hg.__all__


def test_modules_and_what_else_callers_import():
    from hypergrad import CG_torch
    from hypergrad.CG_torch import cat_list_to_tensor, cg

    assert parameters_of(cg) == "Ax, b, max_iter=100, epsilon=1e-05"
    assert CG_torch is hg.CG_torch and cat_list_to_tensor is hg.cat_list_to_tensor
    assert hg.torch_grad is hg.hypergradients.torch_grad is torch.autograd.grad


# --- lists, set_grad --------------------------------------------------------------------------------------------------


class Quadratic:
    """w(λ) = λ₀ + c ∘ λ₁, reached by Φ = w − D(w − w(λ)); λ₁ enters the outer loss too, and a third λ nothing."""

    def __init__(self):
        self.c, self.t, self.d = rand(4), rand(4), torch.tensor([0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
        self.hparams = [rand(4, requires_grad=True), rand(4, requires_grad=True), rand(2, requires_grad=True)]
        self.frozen = rand(3)
        w = self.solution(self.hparams)[0].detach()
        self.params = [w[:1].clone(), w[1:].clone()]

    def solution(self, h):
        return [h[0] + self.c * h[1]]

    def fp_map(self, w, h):
        w = torch.cat(list(w))
        new = w - self.d * (w - self.solution(h)[0])
        return [new[:1], new[1:]]

    def inner_loss(self, w, h):
        return 0.5 * (self.d * (torch.cat(list(w)) - self.solution(h)[0]) ** 2).sum()

    def outer_loss(self, w, h):
        return (torch.cat(list(w)) - self.t).pow(4).sum() + (torch.cat(list(w)) * h[1]).sum()

    @property
    def truth(self):
        w, lam = torch.cat(self.params), self.hparams[1].detach()
        g = 4 * (w - self.t) ** 3 + lam
        return [g, self.c * g + w, torch.zeros(2, dtype=torch.float64)]


def constant_lr(tensors):
    return torch.optim.SGD(tensors, lr=1.0)


METHODS = {
    "fixed_point": lambda q, **o: hg.fixed_point(q.params, q.hparams, 80, q.fp_map, q.outer_loss, tol=1e-14, **o),
    "neumann": lambda q, **o: hg.neumann(q.params, q.hparams, 80, q.fp_map, q.outer_loss, tol=1e-14, **o),
    "CG": lambda q, **o: hg.CG(q.params, q.hparams, 6, q.fp_map, q.outer_loss, **o),
    "CG_normaleq": lambda q, **o: hg.CG_normaleq(q.params, q.hparams, 6, q.fp_map, q.outer_loss, tol=1e-14, **o),
    "reverse": lambda q, **o: hg.reverse([q.params] * 81, q.hparams, [q.fp_map] * 80, q.outer_loss, **o),
    "exact": lambda q, **o: hg.exact(q.solution, q.hparams, q.outer_loss, **o),
    "reverse_unroll": lambda q, **o: hg.reverse_unroll(q.solution(q.hparams), q.hparams, q.outer_loss, **o),
    "stoch_AID": lambda q, **o: hg.stoch_AID(
        q.params, q.hparams, q.outer_loss, 80, fp_map=q.fp_map, verbose=False, **o
    )[0],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("container", [list, tuple, iter])
def test_list_in_list_out_and_unused_hparams_are_zero(method, container):
    q = Quadratic()
    params, hparams = q.params, q.hparams
    if method not in ("reverse", "reverse_unroll"):
        q.params = container(q.params)
    q.hparams = container(q.hparams) if container is not iter else q.hparams
    with untouched(params, hparams):
        grads = METHODS[method](q, set_grad=False)
    q.params, q.hparams = params, hparams
    assert type(grads) is (tuple if method in ("exact", "reverse_unroll") else list)  # as HyperTorch's
    assert max(errors(grads[:2], q.truth[:2])) < 1e-10
    assert torch.equal(grads[2], q.truth[2])


@pytest.mark.parametrize("method", METHODS)
def test_set_grad_adds_as_backward_does(method):
    """It adds to an existing .grad, skips leaves that require no grad, and shares no memory with the result."""
    q = Quadratic()
    q.hparams.append(q.frozen)
    marks = [torch.randn_like(h) for h in q.hparams[:3]]
    for h, mark in zip(q.hparams, marks, strict=False):
        h.grad = mark.clone()
    results = [METHODS[method](q), METHODS[method](q, set_grad=True)]
    for i, (h, mark) in enumerate(zip(q.hparams[:3], marks, strict=True)):
        assert torch.equal(h.grad, mark + results[0][i] + results[1][i])
    assert torch.equal(results[0][3], torch.zeros_like(q.frozen)) and q.frozen.grad is None
    kept = [h.grad.clone() for h in q.hparams[:3]]
    for result in results:
        for g in result:
            g.fill_(torch.nan)
    assert all(torch.equal(h.grad, k) for h, k in zip(q.hparams, kept, strict=False))


@pytest.mark.parametrize("method", METHODS)
def test_set_grad_into_no_grad_yet(method):
    q = Quadratic()
    grads = METHODS[method](q)
    for h, g in zip(q.hparams, grads, strict=True):
        assert torch.equal(h.grad, g)
        h.grad.mul_(3.0)
    assert max(errors(grads[:2], q.truth[:2])) < 1e-10


@pytest.mark.parametrize("method", ["exact", "reverse_unroll", "reverse"])
def test_gradients_of_sums_are_tensors_of_their_own(method):
    """E = Σ(λ₀ + λ₁): autograd returns one expanded tensor for both."""
    hparams = [rand(3, requires_grad=True), rand(3, requires_grad=True)]

    def outer(w, h):
        return (h[0] + h[1]).sum()

    if method == "reverse":
        grads = hg.reverse([[rand(2)]], hparams, [], outer)
    elif method == "exact":
        grads = hg.exact(lambda h: [h[0]], hparams, outer)
    else:
        grads = hg.reverse_unroll([rand(2)], hparams, outer)
    grads[0].mul_(5.0)
    assert torch.equal(grads[1], torch.ones(3, dtype=torch.float64))


# --- the meaning of K -------------------------------------------------------------------------------------------------


FEW = pytest.mark.filterwarnings("ignore::hypergrad.InaccurateHypergradient")  # deliberately too few steps


@FEW
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_fixed_point_with_k_is_reverse_over_k_steps_at_the_solution(name, steps, seed):
    """Both equal neumann with K − 1, the sum of K powers of ∂₁Φᵀ; all iterates of reverse are w* here."""
    p = listed(name, seed)
    options = {"set_grad": False}
    fixed = hg.fixed_point(p.params, p.hparams, steps, p.fp_map, p.outer_loss, **options)
    unrolled = hg.reverse([p.params] * (steps + 1), p.hparams, [p.fp_map] * steps, p.outer_loss, **options)
    series = hg.neumann(p.params, p.hparams, steps - 1, p.fp_map, p.outer_loss, **options)
    assert relative(flat(unrolled), flat(fixed)) < 1e-12
    assert relative(flat(series), flat(fixed)) < 1e-12
    a, b, direct, cross = dense_system(name, "fp_map", seed)
    v = np.zeros_like(b)
    for _ in range(steps):
        v = v - a @ v + b
    assert relative(flat(fixed), direct - cross @ v) < 1e-11


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", AFFORDABLE)
def test_every_method_converges_to_the_oracle(name, seed):
    """These methods stop only by K and tol."""
    p = listed(name, seed)
    options = {"tol": 1e-13, "set_grad": False}
    methods = {"fixed_point": 3000, "neumann": 3000, "CG_normaleq": 3000} | ({"CG": 300} if p.symmetric else {})
    for method, steps in methods.items():
        grads = getattr(hg, method)(p.params, p.hparams, steps, p.fp_map, p.outer_loss, **options)
        assert_agrees(p, grads)


@pytest.mark.parametrize("name", ["quadratic-1e3", "quadratic-1e5"])
def test_krylov_methods_converge_where_the_map_hardly_contracts(name):
    p = listed(name)
    assert_agrees(p, hg.CG(p.params, p.hparams, 1000, p.fp_map, p.outer_loss, tol=1e-13, set_grad=False))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in LISTS if name != "quadratic-1e5"])
def test_float32_results_at_float32_accuracy_are_not_warned_of(name, seed):
    """The default tol is below what float32 reaches: all its accuracy is no failure. 16 κ ε as in test_implicit."""
    p = as_lists(problem_at(name, seed, torch.float32))
    for method in ("CG",) if p.symmetric else ("fixed_point", "neumann"):
        grads = getattr(hg, method)(p.params, p.hparams, 400, p.fp_map, p.outer_loss, set_grad=False)
        assert_agrees(p, grads, tolerance=16 * p.condition * 2.0**-23)
    if p.condition < 100:
        grads = hg.CG_normaleq(p.params, p.hparams, 400, p.fp_map, p.outer_loss, set_grad=False)
        assert_agrees(p, grads, tolerance=16 * p.condition * 2.0**-23)


@pytest.mark.parametrize("method", ["fixed_point", "CG", "CG_normaleq", "neumann"])
def test_no_steps(method):
    """K = 0 is the direct gradient; neumann's first term is ∇₁E."""
    p = listed("quadratic-10", 1)
    with pytest.warns(hg.HypergradientWarning):
        grads = getattr(hg, method)(p.params, p.hparams, 0, p.fp_map, p.outer_loss, set_grad=False)
    _, b, direct, cross = dense_system("quadratic-10", "fp_map", 1)
    assert relative(flat(grads), direct - (cross @ b if method == "neumann" else 0.0)) < 1e-13


def test_tol_stops_early_and_is_relative():
    p = listed("contraction-.5")
    calls = []

    def fp_map(w, h):
        calls.append(None)
        return p.fp_map(w, h)

    for tol, most in ((0.5, 7), (1e-3, 17)):  # looked at every fifth step
        calls.clear()
        hg.fixed_point(p.params, p.hparams, 1000, fp_map, p.outer_loss, tol=tol, set_grad=False, stochastic=True)
        assert 1 < len(calls) <= most
    few = hg.fixed_point(p.params, p.hparams, 1000, p.fp_map, p.outer_loss, tol=1e-3, set_grad=False)
    scaled = hg.fixed_point(
        p.params, p.hparams, 1000, p.fp_map, lambda w, h: 2.0**-40 * p.outer_loss(w, h), tol=1e-3, set_grad=False
    )
    assert relative(flat(scaled) * 2.0**40, flat(few)) < 1e-14


@FEW
@pytest.mark.parametrize("method", ["fixed_point", "CG"])
def test_stochastic_draws_at_every_product(method):
    p = listed("ridge")
    calls = []

    def fp_map(w, h):
        calls.append(None)
        return p.fp_map(w, h)

    options = {"tol": 0.0, "set_grad": False}
    for stochastic in (True, False):
        calls.clear()
        grads = getattr(hg, method)(p.params, p.hparams, 6, fp_map, p.outer_loss, stochastic=stochastic, **options)
        assert len(calls) == ((6 if method == "fixed_point" else 7) if stochastic else 1)
        if stochastic:
            drawn = grads
    assert relative(flat(drawn), flat(grads)) < 1e-12


# --- where HyperTorch's own numbers are wrong -------------------------------------------------------------------------


def hypertorchs_cg(matvec, b: np.ndarray, steps: int, tol: float) -> np.ndarray:
    """HyperTorch's conjugate gradients: once ‖r‖ is below an absolute tol, it returns the iterate before."""
    x, r, p = np.zeros_like(b), b.copy(), b.copy()
    for _ in range(steps):
        image = matvec(p)
        alpha = (r @ r) / (p @ image)
        new = r - alpha * image
        if np.linalg.norm(new) < tol:
            break
        x = x + alpha * p
        p = new + (new @ new) / (r @ r) * p
        r = new
    return x


def hypertorchs_gradient(name: str, steps: int, scale: float = 1.0) -> np.ndarray:
    a, b, direct, cross = dense_system(name, "fp_map")
    return scale * direct - cross @ hypertorchs_cg(lambda v: a @ v, scale * b, steps, 1e-10)


METHODS_ON_HYPERTORCH = {
    "CG": lambda p, outer: hg.CG(p.params, p.hparams, 20, p.fp_map, outer, set_grad=False),
    "CG_normaleq": lambda p, outer: hg.CG_normaleq(p.params, p.hparams, 60, p.fp_map, outer, set_grad=False),
    "fixed_point": lambda p, outer: hg.fixed_point(p.params, p.hparams, 3000, p.fp_map, outer, set_grad=False),
}


@pytest.mark.parametrize("scale", [1.0, 1e-11, 1e11])
@pytest.mark.parametrize("method", METHODS_ON_HYPERTORCH)
def test_hypertorchs_logistic_problem_exactly_solved(method, scale):
    """To 1e-9 of the dense solution with the default tol, whatever the scale of E; HyperTorch's CG is not."""
    p = problem_at("hypertorch")
    grads = METHODS_ON_HYPERTORCH[method](p, lambda w, h: scale * p.outer_loss(w, h))
    assert relative(flat(grads), scale * p.grads[0]) < 1e-9
    if method == "CG" and scale <= 1.0:
        theirs = relative(hypertorchs_gradient("hypertorch", 20, scale), scale * p.grads[0])
        assert theirs > (0.2 if scale < 1.0 else 1e-9)


@pytest.mark.parametrize("method", ["CG", "CG_normaleq"])
def test_a_multiple_of_the_identity_is_solved_in_one_step(method):
    """A = ½I: HyperTorch's CG returns zero."""
    h, t = rand(5, requires_grad=True), rand(5)
    w = h.detach().clone()
    for steps in (1, 2, 10):
        (grad,) = getattr(hg, method)(
            [w], [h], steps, lambda w, h: [0.5 * (w[0] + h[0])], lambda w, h: (w[0] - t).pow(4).sum(), set_grad=False
        )
        assert relative(grad, 4 * (w - t) ** 3) < 1e-14
    b = (4 * (w - t) ** 3).numpy()
    assert np.all(hypertorchs_cg(lambda v: 0.5 * v, b, 10, 1e-10) == 0.0)


@pytest.mark.parametrize("method", ["CG", "CG_normaleq", "fixed_point", "neumann"])
@pytest.mark.parametrize("layout", ["transposed", "channels last", "0-d"])
def test_layouts_of_params(method, layout):
    """HyperTorch's .view fails on these."""
    shape = {"transposed": (4, 3), "channels last": (2, 3, 2, 2), "0-d": ()}[layout]
    h, t = rand(*shape, requires_grad=True), rand(*shape)
    w = h.detach().clone()
    if layout == "transposed":
        w = w.T.contiguous().T
    elif layout == "channels last":
        w = w.contiguous(memory_format=torch.channels_last)
    assert layout == "0-d" or not w.is_contiguous()
    (grad,) = getattr(hg, method)(
        [w], [h], 60, lambda w, h: [w[0] - 0.5 * (w[0] - h[0])], lambda w, h: (w[0] - t).pow(4).sum(), set_grad=False
    )
    assert relative(grad, 4 * (w - t) ** 3) < 1e-9


def test_b_zero():
    """HyperTorch's CG gives NaN."""
    h = rand(3, requires_grad=True)
    w = h.detach().clone()
    for method in ("CG", "CG_normaleq", "fixed_point", "neumann"):
        (grad,) = getattr(hg, method)(
            [w], [h], 5, lambda w, h: [0.5 * (w[0] + h[0])], lambda w, h: h[0].pow(3).sum(), set_grad=False
        )
        assert torch.equal(grad, 3 * h.detach() ** 2)


def test_asymmetry_is_warned_of():
    """CG is used for a map whose Jacobian is not symmetric, of which HyperTorch does not warn."""
    p = listed("contraction-.9")
    with pytest.warns(hg.HypergradientWarning, match="NOT_SYMMETRIC"):
        hg.CG(p.params, p.hparams, 10, p.fp_map, p.outer_loss, set_grad=False)


@FEW
def test_an_unsolved_inner_problem_is_warned_of():
    """w is far from Φ(w): the warning names the residual, and set_grad still writes .grad."""
    p = listed("ridge")
    params = [torch.ones_like(w) for w in p.params]
    residual = (params[0] - p.fp_map(params, p.hparams)[0]).norm().item()
    hparams = [h.detach().clone().requires_grad_() for h in p.hparams]
    for method in ("CG", "CG_normaleq", "fixed_point", "neumann"):
        with pytest.warns(hg.HypergradientWarning, match="inner problem is not solved") as told:
            getattr(hg, method)(params, hparams, 20, p.fp_map, p.outer_loss)
        assert f"{residual:.2e}" in str(told[0].message)
        assert told[0].filename == __file__
    assert hparams[0].grad is not None


# --- reverse, reverse_unroll, exact -----------------------------------------------------------------------------------


def descent(q: Quadratic, steps: int):
    """Iterates of a gradient descent on q's inner loss from a random start, with and without graph, and its maps."""
    gd = hg.GradientDescent(q.inner_loss, 0.6)
    state = [rand(1), rand(3)]
    live, maps = [state], []
    for _ in range(steps):
        live.append(gd(live[-1], q.hparams))
        maps.append(gd)
    return live, [[w.detach() for w in params] for params in live], maps


def test_reverse_unroll_is_reverse_over_the_same_steps_and_exact_for_a_quadratic():
    """w_T = (I − ηD)ᵀ(w₀ − w*) + w* in closed form."""
    q = Quadratic()
    live, history, maps = descent(q, 12)
    unrolled = hg.reverse_unroll(live[-1], q.hparams, q.outer_loss, set_grad=False)
    stored = hg.reverse(history, q.hparams, maps, q.outer_loss, set_grad=False)
    start = torch.cat(history[0])

    def closed_form(h):
        power = (1 - 0.6 * q.d) ** 12
        w = power * start + (1 - power) * q.solution(h)[0]
        return [w[:1], w[1:]]

    exact = hg.exact(closed_form, q.hparams, q.outer_loss, set_grad=False)
    for grads in (unrolled, stored):
        assert max(errors(grads[:2], exact[:2])) < 1e-12
        assert torch.equal(grads[2], q.truth[2])
    again = hg.reverse_unroll(live[-1], q.hparams, q.outer_loss, set_grad=False)
    assert all(torch.equal(a, b) for a, b in zip(again, unrolled, strict=True))


@pytest.mark.parametrize("last", [0, 1, 5, 12])
def test_reverse_over_the_last_k_of_t_steps(last):
    """The gradient of E(Φ^K(w_{T−K}), λ) with w_{T−K} held fixed; more maps than steps are allowed."""
    q = Quadratic()
    _, history, maps = descent(q, 12)
    grads = hg.reverse(history[-last - 1 :], q.hparams, maps, q.outer_loss, set_grad=False)
    params = history[-last - 1]
    for _ in range(last):
        params = maps[0](params, q.hparams)
    truth = torch.autograd.grad(q.outer_loss(params, q.hparams), q.hparams, allow_unused=True)
    assert relative(grads[1], truth[1]) < 1e-12
    if last == 0:
        assert truth[0] is None and not grads[0].any()
    else:
        assert relative(grads[0], truth[0]) < 1e-12


def test_reverse_through_different_maps_that_change_the_state():
    """Maps are taken from the end; a map may change shapes, as long as each iterate is what its map gives."""
    h = [rand(3, requires_grad=True)]
    maps = [lambda w, h: [w[0] * h[0], w[0].sum()], lambda w, h: [torch.cat([w[0], w[1].reshape(1)]) * h[0].sum()]]
    history = [[rand(3)]]
    for step in maps:
        history.append([x.detach() for x in step(history[-1], h)])

    def outer(w, h):
        return w[0].pow(3).sum() + (h[0] ** 3).sum()

    grads = hg.reverse(history, h, maps, outer, set_grad=False)
    truth = torch.autograd.grad(outer(maps[1](maps[0](history[0], h), h), h), h)
    assert relative(grads[0], truth[0]) < 1e-12


def test_outer_loss_of_hparams_alone_in_every_method():
    q = Quadratic()
    q.outer_loss = lambda w, h: h[2].pow(3).sum()
    for method in METHODS:
        grads = METHODS[method](q, set_grad=False)
        assert relative(grads[2], 3 * q.hparams[2].detach() ** 2) < 1e-14, method
        assert not grads[0].any() and not grads[1].any(), method


def test_hypergradients_flow_into_a_network():
    """Non-leaf hparams: set_grad reaches the weights, as backward() does."""
    q = Quadratic()
    net = torch.nn.Linear(2, 8).double()
    z = rand(2)
    truth = None
    for method in METHODS:
        net.zero_grad()
        first, second = (0.5 * net(z)).split(4)
        q.hparams = [first, second, rand(2, requires_grad=True)]
        w = q.solution(q.hparams)[0].detach()
        q.params = [w[:1].clone(), w[1:].clone()]
        if truth is None:
            v = torch.cat([g for g in q.truth[:2]])
            truth = torch.autograd.grad([first, second], list(net.parameters()), v.split(4), retain_graph=True)
        METHODS[method](q)
        assert max(errors([p.grad for p in net.parameters()], truth)) < 1e-10, method


# --- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_lists_in_lists_and_tuples(method):
    """params and hparams nested, and a map that returns other sequences than it was given."""
    flat_q = Quadratic()
    h0, h1, h2 = flat_q.hparams
    truth = flat_q.truth

    def unpacked(w, h):
        return [w[0][0], w[1]], [h[0], h[1][0], h[1][1][0]]

    def solution(h):
        (w,) = flat_q.solution([h[0], h[1][0]])
        return (w[:1],), w[1:]

    def fp_map(w, h):
        first, second = flat_q.fp_map(*unpacked(w, h))
        return (first,), second

    q = SimpleNamespace(
        params=[[flat_q.params[0]], flat_q.params[1]],
        hparams=[h0, (h1, [h2])],
        solution=solution,
        fp_map=fp_map,
        outer_loss=lambda w, h: flat_q.outer_loss(*unpacked(w, h)),
    )
    grads = METHODS[method](q)
    assert [type(g) for g in grads] == [torch.Tensor, tuple] and type(grads[1][1]) is list
    found = [grads[0], grads[1][0], grads[1][1][0]]
    assert max(errors(found[:2], truth[:2])) < 1e-10 and torch.equal(found[2], truth[2])
    assert all(torch.equal(h.grad, g) for h, g in zip((h0, h1, h2), found, strict=True))


@pytest.mark.parametrize("method", ["fixed_point", "neumann", "CG_normaleq", "reverse"])
def test_one_tensor_twice_is_two_variables(method):
    """HeavyBall's state [w, w] at a fixed point: the hypergradient is that of gradient descent."""
    p = listed("ridge")
    heavy_ball = hg.HeavyBall(p.inner_loss, 0.3, 0.4)
    (w,) = p.params

    def outer(state, h):
        return p.outer_loss(state[:1], h)

    if method == "reverse":
        grads = hg.reverse([[w, w]] * 801, p.hparams, [heavy_ball] * 800, outer, set_grad=False)
    else:
        grads = getattr(hg, method)([w, w], p.hparams, 2000, heavy_ball, outer, tol=1e-14, set_grad=False)
    assert max(errors(grads, p.grads)) < 1e-10


def test_a_tensor_or_a_dict_is_no_list():
    q = Quadratic()
    for params in (q.params[0], {"a": q.params[0]}):
        with pytest.raises(TypeError, match=r"params must be a list of tensors, got (Tensor|dict)"):
            hg.CG(params, q.hparams, 5, q.fp_map, q.outer_loss)
    with pytest.raises(TypeError, match="hparams must be a list"):
        hg.exact(q.solution, q.hparams[0], q.outer_loss)


# --- helpers ----------------------------------------------------------------------------------------------------------


def rows(p):
    return [p[0].sin() * p[1], p[0].sum() * p[1] ** 2, p[0].new_ones(2)]


def helper_case():
    return [rand(3, requires_grad=True), rand(requires_grad=True)], [rand(3), rand()]


def test_jvp_is_the_derivative_along_vs_to_second_order():
    params, vs = helper_case()
    calls = []

    def counted(p):
        calls.append(None)
        return rows(p)

    image = hg.jvp(counted, params, vs)
    a, s = params
    truth = [
        a.cos() * s * vs[0] + a.sin() * vs[1],
        vs[0].sum() * s**2 + 2 * a.sum() * s * vs[1],
        torch.zeros(2).double(),
    ]
    assert type(image) is tuple and len(calls) == 1
    assert max(errors([x.detach() for x in image[:2]], [x.detach() for x in truth[:2]])) < 1e-14
    assert torch.equal(image[2].detach(), truth[2])
    ours = torch.autograd.grad(hg.list_dot(image[:2], image[:2]), params)
    theirs = torch.autograd.grad(sum(x.square().sum() for x in truth[:2]), params)
    assert max(errors(ours, theirs)) < 1e-13
    constant = hg.jvp(lambda p: [torch.ones(2)], params, vs)
    assert torch.equal(constant[0], torch.zeros(2))


def test_gradients_with_zeros_for_the_unused():
    params, hparams = helper_case()
    hparams = [h.requires_grad_() for h in hparams]
    loss = (params[0] ** 3).sum() + params[0].sum() * hparams[1]
    inner, outer = hg.get_outer_gradients(loss, params, hparams)
    assert type(inner) is type(outer) is tuple
    again = hg.get_outer_gradients(loss, params, hparams, retain_graph=False)
    a, h = params[0].detach(), hparams[1].detach()
    for grads in (inner, again[0]):
        assert max(errors(grads[:1], [3 * a**2 + h])) < 1e-14 and torch.equal(grads[1], torch.zeros_like(grads[1]))
    for grads in (outer, again[1]):
        assert max(errors(grads[1:], [a.sum()])) < 1e-14 and not grads[0].any()
    with pytest.raises(RuntimeError, match="freed"):
        hg.get_outer_gradients(loss, params, hparams)
    grads = hg.grad_unused_zero(
        [params[0] ** 2, torch.ones(2)], params, [torch.ones(3).double(), torch.ones(2)], create_graph=True
    )
    assert torch.equal(grads[0].detach(), 2 * a) and grads[0].requires_grad and not grads[1].any()
    assert not any(g.any() for g in hg.grad_unused_zero(torch.ones(()), params))
    (slope,) = hg.grd((params[0] ** 3).sum(), [params[0]])
    (bend,) = hg.grd(slope.sum(), [params[0]])
    assert max(errors([bend.detach()], [6 * a])) < 1e-14


def test_lists_as_vectors():
    tensors = [rand(2, 3).T, rand(), rand(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)]
    vector = hg.cat_list_to_tensor(tensors)
    assert torch.equal(vector, torch.cat([x.flatten() for x in tensors]))
    assert relative(hg.list_dot(tensors, tensors), vector @ vector) < 1e-14
    with pytest.raises(ValueError):
        hg.list_dot(tensors, tensors[:2])


def test_update_tensor_grads_adds():
    h = [rand(3, requires_grad=True), rand(requires_grad=True)]
    h[0].register_hook(lambda g: -g)
    mark = torch.ones(3).double()
    hg.update_tensor_grads(h, [mark, None])
    hg.update_tensor_grads(h, [2 * mark, torch.tensor(4.0).double()])
    assert torch.equal(h[0].grad, 3 * mark) and h[1].grad == 4 and torch.equal(mark, torch.ones(3).double())
    for wrong in ([mark, mark], [mark]):
        with nothing_changed(h), pytest.raises(ValueError):
            hg.update_tensor_grads(h, wrong)


def spd(n: int) -> torch.Tensor:
    m = rand(n, n)
    return m @ m.T / n + torch.eye(n, dtype=torch.float64)


def test_cg_of_lists():
    """To a relative tolerance, whatever the scale; the last iterate; 0 for b = 0; Ax may build graphs of its own."""
    a = spd(7).requires_grad_()

    def product(v):
        image = a @ torch.cat([x.reshape(-1) for x in v])
        return image[:4].view(2, 2), image[4:]

    for scale in (1.0, 1e-20, 1e20):
        b = [scale * rand(2, 2).T, scale * rand(3)]
        x = hg.CG_torch.cg(product, b, epsilon=1e-12)
        truth = torch.linalg.solve(a.detach(), torch.cat([y.reshape(-1) for y in b]))
        assert type(x) is list and relative(torch.cat([y.reshape(-1) for y in x]), truth) < 1e-10
    assert not any(x.any() for x in hg.CG_torch.cg(product, [torch.zeros(2, 2).double(), torch.zeros(3).double()]))
    assert torch.equal(hg.CG_torch.cg(lambda v: [2 * v[0]], [torch.ones(3)])[0], torch.full((3,), 0.5))
    assert torch.equal(hg.CG_torch.cg(lambda v: [2 * v[0]], [torch.ones(3)], 1)[0], torch.full((3,), 0.5))


def test_cg_warns_of_failures():
    rhs = [rand(4)]
    with pytest.warns(hg.NotConverged, match="NOT_POSITIVE_DEFINITE"):
        hg.CG_torch.cg(lambda v: [-v[0]], rhs)
    slow = spd(40) - torch.eye(40) * 0.99
    with pytest.warns(hg.NotConverged, match="MAX_STEPS"):
        hg.CG_torch.cg(lambda v: [slow @ v[0]], [rand(40)], 1)


# --- stoch_AID --------------------------------------------------------------------------------------------------------


@FEW
@pytest.mark.parametrize("steps", [0, 1, 2, 9])
@pytest.mark.parametrize("name", ["ridge", "biased", "contraction-.9", "equilibrium"])
def test_stoch_aid_without_noise_is_fixed_point(name, steps):
    """From ∇₁E, K steps of SGD(lr=1) are K + 1 of fixed_point; from zero they are K."""
    p = listed(name, 1)
    options = {"fp_map": p.fp_map, "set_grad": False, "verbose": False}
    grads, v = hg.stoch_AID(p.params, p.hparams, p.outer_loss, steps, **options)
    fixed = hg.fixed_point(p.params, p.hparams, steps + 1, p.fp_map, p.outer_loss, set_grad=False)
    assert relative(flat(grads), flat(fixed)) < 1e-12
    assert type(grads) is list and type(v) is list
    assert [x.shape for x in v] == [w.shape for w in p.params]
    zero = [torch.zeros_like(w) for w in p.params]
    with nullcontext() if steps else pytest.warns(hg.NotConverged):  # v = 0 solves nothing
        grads, _ = hg.stoch_AID(p.params, p.hparams, p.outer_loss, steps, linsys_start=zero, **options)
    with nullcontext() if steps else pytest.warns(hg.NotConverged):
        fixed = hg.fixed_point(p.params, p.hparams, steps, p.fp_map, p.outer_loss, set_grad=False)
    assert relative(flat(grads) + 1.0, flat(fixed) + 1.0) < 1e-12


@FEW
def test_stoch_aid_starts_where_it_ended():
    p = listed("ridge", 1)
    options = {"fp_map": p.fp_map, "set_grad": False, "verbose": False}
    _, v = hg.stoch_AID(p.params, p.hparams, p.outer_loss, 5, **options)
    kept = [x.clone() for x in v]
    two, v2 = hg.stoch_AID(p.params, p.hparams, p.outer_loss, 7, linsys_start=v, **options)
    one, v1 = hg.stoch_AID(p.params, p.hparams, p.outer_loss, 12, **options)
    assert relative(flat(two), flat(one)) < 1e-13 and relative(flat(v2), flat(v1)) < 1e-13
    assert all(torch.equal(a, b) for a, b in zip(v, kept, strict=True))


def build_alone(tensors, lr=0.1, momentum=0.0):
    return torch.optim.SGD(tensors, lr=lr, momentum=momentum)


def build_with_scheduler(tensors, lr=0.1, gamma=0.9):
    optimizer = torch.optim.SGD(tensors, lr=lr)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)


@FEW
@pytest.mark.parametrize("form", ["inner_loss", "fp_map"])
@pytest.mark.parametrize("build", ["alone", "scheduler", "closure"])
def test_stoch_aid_runs_the_optimizer_that_is_built(form, build):
    """K steps of the same optimizer by hand on ½vᵀAv − bᵀv, in NumPy's dense A."""
    p = listed("quadratic-10", 1)
    a, b, direct, cross = dense_system("quadratic-10", form, 1)
    v, velocity, lr = b.copy(), np.zeros_like(b), 0.3
    momentum, gamma = (0.5, 1.0) if build == "alone" else (0.0, 0.8 if build == "scheduler" else 1.0)
    for _ in range(15):
        velocity = momentum * velocity + (a @ v - b)
        v, lr = v - lr * velocity, lr * gamma
    optim_build, opt_params = {
        "alone": (build_alone, {"lr": 0.3, "momentum": 0.5}),
        "scheduler": (build_with_scheduler, {"lr": 0.3, "gamma": 0.8}),
        "closure": (lambda tensors: build_alone(tensors, lr=0.3), None),
    }[build]
    grads, adjoint = hg.stoch_AID(
        p.params,
        p.hparams,
        p.outer_loss,
        15,
        optim_build=optim_build,
        opt_params=opt_params,
        set_grad=False,
        verbose=False,
        **{form: getattr(p, form)},
    )
    assert relative(flat(adjoint), v) < 1e-12
    assert relative(flat(grads), direct - cross @ v) < 1e-12


class Cycle:
    """A loss or map whose successive calls use successive samples."""

    def __init__(self, functions):
        self.functions, self.calls = functions, 0

    def __call__(self, w, h):
        self.calls += 1
        return self.functions[(self.calls - 1) % len(self.functions)](w, h)


def test_stoch_aid_averages_draws_of_the_outer_loss_and_of_the_last_product():
    """J_outer draws give the mean ∇E, J_inner draws the mean of ∂₂Φᵀv; K products draw once each."""
    hparams = [rand(3, requires_grad=True)]
    ms, bs, ts = [0.2 * rand(3, 3) for _ in range(3)], [rand(3, 3) for _ in range(3)], rand(4, 3)
    m, b = sum(ms) / 3, sum(bs) / 3
    w = torch.linalg.inv(torch.eye(3) - m) @ (b @ hparams[0].detach())
    fp_map = Cycle([lambda w, h, m=m, b=b: [m @ w[0] + b @ h[0]] for m, b in zip(ms, bs, strict=True)])
    outer = Cycle([lambda w, h, t=t: (w[0] - t).pow(4).sum() + (t * h[0]).sum() for t in ts])
    grads, v = hg.stoch_AID(
        [w],
        hparams,
        outer,
        6,
        J_inner=3,
        J_outer=4,
        fp_map=fp_map,
        stoch_inner=True,
        stoch_outer=True,
        set_grad=False,
        verbose=False,
    )
    assert fp_map.calls == 6 + 3 and outer.calls == 4
    g = (4 * (w - ts) ** 3).mean(0)
    expected = g.clone()
    for k in range(6):
        expected = ms[k % 3].T @ expected + g
    assert relative(v[0], expected) < 1e-12
    assert relative(grads[0], b.T @ expected + ts.mean(0)) < 1e-12


def test_stoch_aid_converges_in_the_mean_with_noise():
    """Noisy products and a falling learning rate: within a few percent of the deterministic answer."""
    p = listed("biased")
    noise = 0.05

    def fp_map(w, h):
        return [x * (1 + noise * torch.randn(())) for x in p.fp_map(w, h)]

    def build(tensors):
        optimizer = torch.optim.SGD(tensors, lr=1.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 20.0 / (20.0 + k))

    grads, _ = hg.stoch_AID(
        p.params,
        p.hparams,
        p.outer_loss,
        600,
        fp_map=fp_map,
        stoch_inner=True,
        J_inner=100,
        optim_build=build,
        set_grad=False,
        verbose=False,
    )
    assert relative(flat(grads), np.concatenate([g.reshape(-1) for g in p.grads])) < 0.1


def test_stoch_aid_takes_an_outer_loss_that_depends_on_hparams():
    """HyperTorch's fails here."""
    q = Quadratic()
    for inner in ({"fp_map": q.fp_map}, {"inner_loss": q.inner_loss}):
        grads, _ = hg.stoch_AID(q.params, q.hparams, q.outer_loss, 100, set_grad=False, verbose=False, **inner)
        assert max(errors(grads[:2], q.truth[:2])) < 1e-10
        assert torch.equal(grads[2], q.truth[2])


def test_stoch_aid_prints_the_residuals_when_verbose(capsys):
    q = Quadratic()
    hg.stoch_AID(q.params, q.hparams, q.outer_loss, 10, fp_map=q.fp_map, set_grad=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"k={k}" for k in range(0, 11, 2)]
    printed = [float(line.split("=")[-1]) for line in lines]
    assert printed[-1] < printed[0] and printed == sorted(printed, reverse=True)
    b = flat(torch.autograd.grad(q.outer_loss(w := [x.clone().requires_grad_() for x in q.params], q.hparams), w))
    assert relative(printed[0], (q.d * b - b).norm().item()) < 1e-3
    hg.stoch_AID(q.params, q.hparams, q.outer_loss, 10, fp_map=q.fp_map, set_grad=False, verbose=False)
    assert capsys.readouterr().out == ""


def test_stoch_aid_that_diverges_raises():
    q = Quadratic()
    with nothing_changed(q.params, q.hparams), pytest.raises(ValueError, match="NON_FINITE"):
        hg.stoch_AID(
            q.params,
            q.hparams,
            q.outer_loss,
            300,
            fp_map=noisy(lambda w, h: [100.0 * x for x in q.fp_map(w, h)]),
            optim_build=constant_lr,
            verbose=False,
        )


# --- the published run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_hypertorchs_published_run(dtype):
    """Validation losses 0.57440 / 0.53377 / 0.28535 at outer steps 0 / 10 / 100."""
    d = oracles.hypertorch_data()
    x, y, xv, yv = (torch.as_tensor(d[k], dtype=dtype) for k in ("x", "y", "xv", "yv"))
    bce = F.binary_cross_entropy_with_logits

    def inner_loss(w, h):
        return bce(x @ w[0], y) + 0.5 * (h[0] * w[0] ** 2).sum()

    def outer_loss(w, h):
        return bce(xv @ w[0], yv)

    lam = torch.ones(20, dtype=dtype, requires_grad=True)
    outer_optimizer = torch.optim.SGD([lam], lr=1.0, momentum=0.9)
    inner_optimizer = hg.GradientDescent(inner_loss, 0.1)
    losses = []
    for _ in range(101):
        history = [inner_optimizer.get_opt_params([torch.zeros(20, dtype=dtype)])]
        for _ in range(100):
            history.append(inner_optimizer(history[-1], [lam], create_graph=False))
        outer_optimizer.zero_grad()
        hg.reverse(history[-11:], [lam], [inner_optimizer] * 10, outer_loss)
        losses.append(outer_loss(history[-1], [lam]).item())
        outer_optimizer.step()
        lam.data.clamp_(min=1e-8)
    assert [losses[k] for k in (0, 10, 100)] == pytest.approx([0.57440, 0.53377, 0.28535], abs=1e-4)
    run = oracles.hypertorch_logistic(100)
    assert np.max(np.abs(np.array(losses) - run.losses)) < (1e-10 if dtype == torch.float64 else 1e-4)


def test_the_published_run_was_not_at_a_solution():
    """At its end the gradient through ten steps has norm .07 and the exact one 55: CG sees it, in ten steps."""
    run = oracles.hypertorch_logistic(200)
    p = problem_at("hypertorch")
    lam, w = torch.from_numpy(run.hparams).requires_grad_(), torch.from_numpy(run.params)
    with pytest.warns(hg.HypergradientWarning, match="inner problem is not solved"):
        hg.CG([w], [lam], 10, p.fp_map, p.outer_loss, set_grad=False)


@FEW
def test_each_function_is_implicit_grad_with_a_solver():
    """Results of the functional interface equal those of implicit.grad with the solver of that name."""
    p = listed("biased", 1)
    pairs = {
        "CG": S.CG(max_steps=5, rtol=1e-10, on_failure="ignore"),
        "fixed_point": S.FixedPoint(max_steps=5, rtol=1e-10, on_failure="ignore"),
        "neumann": S.FixedPoint(max_steps=6, rtol=1e-10, on_failure="ignore"),
        "CG_normaleq": S.NormalCG(max_steps=5, rtol=1e-10, on_failure="ignore"),
    }
    for method, solver in pairs.items():
        grads = getattr(hg, method)(p.params, p.hparams, 5, p.fp_map, p.outer_loss, set_grad=False)
        result = hg.implicit.grad(
            p.outer_loss,
            params=p.params,
            hparams=p.hparams,
            fp_map=p.fp_map,
            solver=solver,
            symmetric=method == "CG",
        )
        assert all(torch.equal(a, b) for a, b in zip(grads, result.grads, strict=True))


@FEW
@pytest.mark.parametrize("method", [hg.fixed_point, hg.neumann, hg.CG, hg.CG_normaleq])
def test_few_steps_on_an_ill_conditioned_problem_see_that_it_is_not_solved(method):
    """HyperTorch's example with λ near 0: 100 gradient steps, K = 10. v is short there, but its progress is slow."""
    p = as_lists(problem_at("hypertorch"))
    hparams = [torch.full_like(h, 1e-3, requires_grad=True) for h in p.hparams]

    def after(steps: int) -> list[torch.Tensor]:
        w = [torch.zeros_like(x) for x in p.params]
        for _ in range(steps):
            w = [x.detach() for x in p.fp_map([x.requires_grad_() for x in w], hparams)]
        return w

    with pytest.warns(hg.UnsolvedInnerProblem, match="the inner problem is not solved"):
        method(after(100), hparams, 10, p.fp_map, p.outer_loss, set_grad=False)


def test_stoch_aid_warns_of_a_kink():
    """An L1 term in its inner loss, as implicit.grad does."""
    lam = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    c, w = torch.tensor([2.0, 0.1], dtype=torch.float64), torch.tensor([1.5, 0.0], dtype=torch.float64)
    inner = lambda w, h: ((w[0] - c) ** 2).sum() / 2 + (h[0] * w[0].abs()).sum()  # noqa: E731
    with pytest.warns(hg.UnsolvedInnerProblem, match="kink"):
        hg.stoch_AID([w], [lam], lambda w, h: ((w[0] - 1) ** 2).sum(), 50, inner_loss=inner, verbose=False)


@pytest.mark.parametrize("name", ["CG", "fixed_point", "CG_normaleq"])
def test_frozen_parameters_are_constants(name):
    """w = λ + frozen, E = ½w² + ½frozen²."""
    lam = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    params = [torch.nn.Parameter(torch.tensor([x], dtype=torch.float64)) for x in (4.0, 1.0)]
    params[1].requires_grad_(False)
    phi = lambda w, h: [w[0] - 0.5 * (w[0] - h[0] - w[1]), w[1]]  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (grad,) = getattr(hg, name)(params, [lam], 60, phi, lambda w, h: (w[0] ** 2 + w[1] ** 2).sum() / 2)
    assert abs(float(grad) - 4) < 1e-9 and not params[1].requires_grad and params[0].grad is None
