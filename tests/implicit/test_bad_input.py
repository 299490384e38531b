"""Bad input: the messages, and that an error leaves .grad, parameters and torch's random state unchanged."""

import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hypergrad as hg
from helpers import S, as_lists, noisy, nothing_changed, problem_at, untouched
from hypergrad._solution import warn
from test_oracles import relative


class Boom(Exception):
    """An error of the user's own."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rand(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)


def good() -> SimpleNamespace:
    """w* = (λ₀ + λ₁, 2λ₁) on leaves [3] and []; .grad holds numbers already, and all callables draw random numbers."""
    h = [rand(3, requires_grad=True), rand(requires_grad=True)]
    t = rand(3)

    def target(h):
        return [h[0] + h[1], h[1] * 2.0]

    def outer_loss(w, h):
        return (w[0] - t).pow(4).sum() + w[1] ** 2 + (h[0] * t).sum()

    case = SimpleNamespace(
        params=[w.detach() for w in target(h)],
        hparams=h,
        outer_loss=noisy(outer_loss),
        fp_map=noisy(lambda w, h: [0.5 * (x + y) for x, y in zip(w, target(h), strict=True)]),
        inner_loss=noisy(lambda w, h: sum(0.5 * (x - y).square().sum() for x, y in zip(w, target(h), strict=True))),
        residual=noisy(lambda w, h: [x - y for x, y in zip(w, target(h), strict=True)]),
    )
    for x in (*case.params, *case.hparams):
        x.grad = torch.randn_like(x) if x.is_leaf else None
    return case


def apis(form: str = "fp_map"):
    """Every public function that takes the outer loss and this form of the inner problem."""

    def implicit(function):
        return lambda c: function(
            c.outer_loss, params=c.params, hparams=c.hparams, symmetric=True, **{form: getattr(c, form)}
        )

    table = {"implicit.grad": implicit(hg.implicit.grad), "implicit.backward": implicit(hg.implicit.backward)}
    if form == "residual":
        return table

    def stoch_aid(c):
        return hg.stoch_AID(c.params, c.hparams, c.outer_loss, 3, verbose=False, **{form: getattr(c, form)})

    table["stoch_AID"] = stoch_aid
    if form == "fp_map":
        for name in ("CG", "CG_normaleq", "fixed_point", "neumann"):
            table[name] = partial(lambda f, c: f(c.params, c.hparams, 5, c.fp_map, c.outer_loss), getattr(hg, name))
        table["reverse"] = lambda c: hg.reverse([c.params] * 3, c.hparams, [c.fp_map] * 2, c.outer_loss)
    return table


def test_the_good_case_is_good():
    """The unchanged case is accepted, so an error below comes from the one thing that its row changes."""
    for form in ("fp_map", "inner_loss", "residual"):
        for call in apis(form).values():
            call(good())


# --- errors, through every public function that takes the argument ----------------------------------------------------

OUTER = [
    ("a vector", lambda w, h: w[0], ValueError, ["outer_loss must give a scalar", "(3,)"]),
    ("a number", lambda w, h: 1.0, TypeError, ["outer_loss must give a scalar tensor", "float"]),
    ("nothing", lambda w, h: None, TypeError, ["outer_loss", "NoneType"]),
    ("a list", lambda w, h: [w[0].sum()], TypeError, ["outer_loss", "list"]),
    ("an integer", lambda w, h: torch.tensor(3), ValueError, ["outer_loss", "int64"]),
    ("complex", lambda w, h: w[0].sum() * (1 + 1j), ValueError, ["outer_loss", "complex128"]),
]
MAPS = [
    ("too few leaves", lambda w, h: w[:1], ValueError, ["structure of params", "1 leaves instead of 2", "[1]"]),
    ("too many leaves", lambda w, h: [*w, w[0]], ValueError, ["3 leaves instead of 2", "[2]"]),
    ("a tensor", lambda w, h: w[0], ValueError, ["structure of params", "a single tensor"]),
    ("a dict", lambda w, h: {"a": w[0], "b": w[1]}, ValueError, ["structure of params", "['a']"]),
    ("a shape", lambda w, h: [w[0], w[1] + h[0]], ValueError, ["[1] must be like params[1]", "shape ()", "shape (3,)"]),
    ("a broadcast", lambda w, h: [w[0][None], w[1]], ValueError, ["[0] must be like params[0]", "(3,)", "(1, 3)"]),
    ("a dtype", lambda w, h: [w[0].float(), w[1]], ValueError, ["[0] must be like params[0]", "float64", "float32"]),
    ("a device", lambda w, h: [w[0], w[1].to("meta")], ValueError, ["[1] must be like params[1]", "on cpu", "on meta"]),
    ("integers", lambda w, h: [w[0].long(), w[1]], TypeError, ["[0] must be a floating point tensor", "torch.int64"]),
    ("numbers", lambda w, h: [w[0], 2.0], TypeError, ["[1] must be a floating point tensor", "float"]),
    ("nothing", lambda w, h: None, ValueError, ["holds no tensor", "None"]),
]
INNER = [
    ("a vector", lambda w, h: w[0] * h[0], ValueError, ["inner_loss must give a scalar", "(3,)"]),
    ("a number", lambda w, h: 2.0, TypeError, ["inner_loss must give a scalar tensor", "float"]),
    ("without params", lambda w, h: h[0].sum(), ValueError, ["inner_loss does not depend on params"]),
    ("detached", lambda w, h: w[0].detach().sum(), ValueError, ["inner_loss does not depend on params"]),
]


def no_grad_hparams(c):
    c.hparams = [h.detach() for h in c.hparams]


def whole_numbers(key):
    def change(c):
        leaves = getattr(c, key)
        setattr(c, key, [leaves[0], torch.tensor(3)])

    return change


def not_tensors(key):
    def change(c):
        setattr(c, key, [getattr(c, key)[0], 1.5])

    return change


def shared(key):
    def change(c):
        setattr(c, key, [getattr(c, key)[0]] * 2)

    return change


def nothing_in(key):
    return lambda c: setattr(c, key, [])


def module(c):
    c.params = [c.params[0], torch.nn.Linear(2, 2)]


def one_from_the_other(c):
    c.hparams = [c.hparams[0], (2.0 * c.hparams[0]).sum()]


VARIABLES = [
    ("hparams need no grad", no_grad_hparams, ValueError, ["none of hparams requires grad", "requires_grad_()"]),
    ("integer params", whole_numbers("params"), TypeError, ["params[1] must be a floating point", "torch.int64"]),
    ("integer hparams", whole_numbers("hparams"), TypeError, ["hparams[1] must be a floating point", "torch.int64"]),
    ("numbers in params", not_tensors("params"), TypeError, ["params[1]", "float"]),
    ("numbers in hparams", not_tensors("hparams"), TypeError, ["hparams[1]", "float"]),
    ("a module in params", module, TypeError, ["params[1]", "Linear", "parameters()"]),
    ("no params", nothing_in("params"), ValueError, ["params holds no tensor"]),
    ("no hparams", nothing_in("hparams"), ValueError, ["hparams holds no tensor"]),
    ("one hparam twice", shared("hparams"), ValueError, ["hparams[0] and hparams[1] are the same tensor"]),
    ("one hparam from another", one_from_the_other, ValueError, ["hparams[1] was computed from hparams[0]", "twice"]),
]
# To HyperTorch's functions, which take lists for maps, [w, w] are two variables.
LISTS = ("fixed_point", "neumann", "CG", "CG_normaleq", "stoch_AID")
ONE_PARAM_TWICE = ("one param twice", shared("params"), ValueError, ["params[0] and params[1] are the same tensor"])


def refuses(call, case, error, words) -> None:
    """Assert that the call raises this error with these words, and changes nothing."""
    with nothing_changed(case.params, case.hparams), pytest.raises(error) as raised:
        call(case)
    message = str(raised.value)
    assert all(word in message for word in words), message


def through(rows, form="fp_map", extra=()):
    table = apis(form)
    return [pytest.param(api, *row[1:], id=f"{row[0]}-{api}") for row in rows for api in table if api not in extra]


@pytest.mark.parametrize(("api", "outer_loss", "error", "words"), through(OUTER))
def test_outer_losses(api, outer_loss, error, words):
    case = good()
    case.outer_loss = noisy(outer_loss)
    refuses(apis()[api], case, error, words)


@pytest.mark.parametrize(("api", "fp_map", "error", "words"), through(MAPS))
def test_maps(api, fp_map, error, words):
    case = good()
    case.fp_map = noisy(fp_map)
    name = "the update map" if api == "reverse" else "fp_map"
    refuses(apis()[api], case, error, [*words, f"the value of {name}"])


@pytest.mark.parametrize(("api", "residual", "error", "words"), through(MAPS, "residual"))
def test_residuals(api, residual, error, words):
    case = good()
    case.residual = noisy(residual)
    refuses(apis("residual")[api], case, error, [*words, "the value of residual"])


@pytest.mark.parametrize(("api", "inner_loss", "error", "words"), through(INNER, "inner_loss"))
def test_inner_losses(api, inner_loss, error, words):
    case = good()
    case.inner_loss = noisy(inner_loss)
    refuses(apis("inner_loss")[api], case, error, words)


@pytest.mark.parametrize(
    ("api", "change", "error", "words"), [*through(VARIABLES), *through([ONE_PARAM_TWICE], extra=("reverse", *LISTS))]
)
def test_params_and_hparams(api, change, error, words):
    case = good()
    change(case)
    refuses(apis()[api], case, error, words)


@pytest.mark.parametrize("where", ["outer_loss", "fp_map", "inner_loss", "residual"])
def test_exceptions_of_the_users_functions_pass_unchanged(where):
    boom = Boom("mine")

    def explode(w, h):
        raise boom

    form = "fp_map" if where == "outer_loss" else where
    for api, call in apis(form).items():
        case = good()
        setattr(case, where, noisy(explode))
        with nothing_changed(case.params, case.hparams), pytest.raises(Boom) as raised:
            call(case)
        assert raised.value is boom and raised.value.__cause__ is None, api


def test_exceptions_late_in_a_stochastic_solve():
    """An error of the fourth draw, and one of the user's solver after a product, pass unchanged."""
    case = good()
    draws = []

    def fails_later(w, h):
        draws.append(None)
        if len(draws) == 4:
            raise Boom
        return original(w, h)

    original, case.fp_map = case.fp_map, fails_later
    for method in (hg.neumann, hg.fixed_point):
        draws.clear()
        with nothing_changed(case.params, case.hparams), pytest.raises(Boom):
            if method is hg.fixed_point:
                method(case.params, case.hparams, 8, case.fp_map, case.outer_loss, tol=0.0, stochastic=True)
            else:
                hg.stoch_AID(case.params, case.hparams, case.outer_loss, 8, fp_map=case.fp_map, stoch_inner=True)

    def solver(op, b, x0):
        op(b)
        torch.rand(3)
        raise Boom

    case = good()
    with nothing_changed(case.params, case.hparams), pytest.raises(Boom):
        hg.implicit.backward(
            case.outer_loss, params=case.params, hparams=case.hparams, fp_map=case.fp_map, solver=solver
        )


# --- errors of implicit.grad alone ------------------------------------------------------------------------------------


def implicit(case, **options):
    """Both functions with these options; the second must not have changed .grad either."""
    given = {"params": case.params, "hparams": case.hparams, "fp_map": case.fp_map} | options
    given = {key: value for key, value in given.items() if value is not None and key != "outer_loss"}
    return [lambda c, f=f: f(options.get("outer_loss", c.outer_loss), **given) for f in BOTH]


BOTH = (hg.implicit.grad, hg.implicit.backward)

OPTIONS = [
    ("no inner problem", {"fp_map": None}, TypeError, ["exactly one of inner_loss, fp_map and residual", "none"]),
    ("two of them", {"residual": lambda w, h: w}, TypeError, ["exactly one", "['fp_map', 'residual']"]),
    ("CG undeclared", {"solver": S.CG()}, TypeError, ["CG needs a symmetric operator", "symmetric=True", "GMRES"]),
    ("MINRES undeclared", {"solver": S.MINRES()}, TypeError, ["MINRES needs a symmetric operator", "GMRES"]),
    ("Nystrom undeclared", {"solver": S.Nystrom()}, TypeError, ["Nystrom needs a symmetric operator"]),
    ("start of another structure", {"x0": [rand(3)]}, ValueError, ["x0 must have the structure of params", "1 leaves"]),
    ("start of another shape", {"x0": [rand(3), rand(1)]}, ValueError, ["x0[1] must be like params[1]", "shape (1,)"]),
    ("start of another dtype", {"x0": [rand(3), rand().float()]}, ValueError, ["x0[1]", "float64", "float32"]),
    ("start of integers", {"x0": [rand(3), torch.tensor(1)]}, TypeError, ["x0[1]", "int64"]),
    ("batch_dims", {"batch_dims": 2}, ValueError, ["batch_dims", "2"]),
    ("no batch axis", {"batch_dims": 1}, ValueError, ["batch_dims=1", "params[0]", "(3,)", "params[1]", "()"]),
    ("wrong structure", {"solver": lambda op, b, x0: b.leaves[:1]}, ValueError, ["solver's result", "1 leaves"]),
    ("wrong shape", {"solver": lambda op, b, x0: [b.leaves[0], rand(2)]}, ValueError, ["result[1]", "(2,)", "()"]),
    ("wrong dtype", {"solver": lambda op, b, x0: [b.leaves[0].float(), rand()]}, ValueError, ["result[0]", "float32"]),
    ("not a value", {"solver": lambda op, b, x0: "solved"}, TypeError, ["solver's result", "str"]),
    ("no value", {"solver": lambda op, b, x0: None}, ValueError, ["solver's result", "None"]),
    ("needs grad", {"outer_loss": rand(requires_grad=True)}, ValueError, ["params[0] does not require grad"]),
]


@pytest.mark.parametrize(("options", "error", "words"), [pytest.param(*row[1:], id=row[0]) for row in OPTIONS])
def test_options(options, error, words):
    case = good()
    for call in implicit(case, **options):
        refuses(call, case, error, words)


def test_bad_draws():
    for draws in (0, 1.5, "2"):
        with pytest.raises(ValueError, match="draws must be an integer ≥ 1"):
            hg.operators.Stochastic(lambda w, h: w, draws)
    with pytest.raises(TypeError, match="is not callable"):
        hg.operators.Stochastic([rand(3)])


def test_a_users_solver_that_returns_a_vector_of_another_structure():
    case = good()
    other = hg.Vector(hg.Vector.of([rand(7)], "params").space, [rand(7)])
    for call in implicit(case, solver=lambda op, b, x0: other):
        refuses(call, case, ValueError, ["solver's result", "structure"])


CONFIGURATIONS = [
    (lambda: S.CG(max_steps=-1), "CG: max_steps must be an integer ≥ 0, got -1"),
    (lambda: S.CG(max_steps=2.0), "CG: max_steps must be an integer ≥ 0, got 2.0"),
    (lambda: S.GMRES(rtol=-1e-3), "GMRES: rtol must be a finite number ≥ 0"),
    (lambda: S.LSQR(atol=float("nan")), "LSQR: atol must be a finite number ≥ 0, got nan"),
    (lambda: S.Dense(damping=float("inf")), "Dense: damping must be a finite number"),
    (lambda: S.MINRES(on_failure="loud"), 'on_failure must be "warn", "raise" or "ignore", got \'loud\''),
]


@pytest.mark.parametrize(("make", "words"), CONFIGURATIONS)
def test_configurations(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_unknown_keywords_are_not_swallowed():
    case = good()
    for f in BOTH:
        with nothing_changed(case.params, case.hparams), pytest.raises(TypeError, match="tolerance"):
            f(case.outer_loss, params=case.params, hparams=case.hparams, fp_map=case.fp_map, tolerance=1e-3)


# --- errors of HyperTorch's interface alone ---------------------------------------------------------------------------

FUNCTIONAL = [
    (
        "negative K",
        lambda c: hg.CG(c.params, c.hparams, -1, c.fp_map, c.outer_loss),
        ValueError,
        ["max_steps must be an integer ≥ 0, got -1"],
    ),
    (
        "fractional K",
        lambda c: hg.fixed_point(c.params, c.hparams, 2.5, c.fp_map, c.outer_loss),
        ValueError,
        ["max_steps must be an integer", "2.5"],
    ),
    (
        "a bare tensor for params",
        lambda c: hg.fixed_point(c.params[0], c.hparams, 2, c.fp_map, c.outer_loss),
        TypeError,
        ["params must be a list of tensors, got Tensor"],
    ),
    (
        "a bare tensor for hparams",
        lambda c: hg.CG(c.params, c.hparams[0], 2, c.fp_map, c.outer_loss),
        TypeError,
        ["hparams must be a list of tensors, got Tensor"],
    ),
    (
        "a dict for hparams",
        lambda c: hg.exact(lambda h: h, {"a": c.hparams[0]}, c.outer_loss),
        TypeError,
        ["hparams must be a list of tensors, got dict"],
    ),
    (
        "an empty history",
        lambda c: hg.reverse([], c.hparams, [c.fp_map], c.outer_loss),
        ValueError,
        ["params_history holds no iterate"],
    ),
    (
        "too few maps",
        lambda c: hg.reverse([c.params] * 4, c.hparams, [c.fp_map], c.outer_loss),
        ValueError,
        ["4 iterates need 3 maps, got 1"],
    ),
    (
        "an iterate of another shape",
        lambda c: hg.reverse([c.params, c.params, [c.params[0][:2], c.params[1]]], c.hparams, [c.fp_map] * 2, scalar),
        ValueError,
        ["the value of the update map[0] must be like params[0]", "(2,)", "(3,)"],
    ),
    (
        "J_inner without draws",
        lambda c: hg.stoch_AID(c.params, c.hparams, c.outer_loss, 2, J_inner=3, fp_map=c.fp_map),
        ValueError,
        ["J_inner must be 1, or more with stoch_inner=True; got 3"],
    ),
    (
        "J_outer of none",
        lambda c: hg.stoch_AID(c.params, c.hparams, c.outer_loss, 2, J_outer=0, fp_map=c.fp_map, stoch_outer=True),
        ValueError,
        ["J_outer must be 1", "0"],
    ),
    (
        "stoch_AID without an inner problem",
        lambda c: hg.stoch_AID(c.params, c.hparams, c.outer_loss, 2),
        TypeError,
        ["exactly one of inner_loss, fp_map and residual"],
    ),
    (
        "stoch_AID with two",
        lambda c: hg.stoch_AID(c.params, c.hparams, c.outer_loss, 2, fp_map=c.fp_map, inner_loss=c.inner_loss),
        TypeError,
        ["exactly one"],
    ),
    (
        "linsys_start of another shape",
        lambda c: hg.stoch_AID(c.params, c.hparams, c.outer_loss, 2, fp_map=c.fp_map, linsys_start=[*c.params[:1]] * 2),
        ValueError,
        ["x0[1] must be like params[1]"],
    ),
    (
        "optim_build that fails",
        lambda c: hg.stoch_AID(c.params, c.hparams, c.outer_loss, 2, fp_map=c.fp_map, opt_params={"odd": 1}),
        TypeError,
        ["odd"],
    ),
]


def scalar(w, h):
    return w[0].sum()


@pytest.mark.parametrize(("call", "error", "words"), [pytest.param(*row[1:], id=row[0]) for row in FUNCTIONAL])
def test_functional_interface(call, error, words):
    refuses(call, good(), error, words)


@pytest.mark.parametrize("api", ["exact", "reverse_unroll"])
def test_exact_and_reverse_unroll(api):
    """They raise the errors for bad outer losses and hparams, and one if no tensor of hparams requires grad."""

    def call(c):
        if api == "exact":
            return hg.exact(noisy(lambda h: [h[0] * 2, h[1]]), c.hparams, c.outer_loss)
        return hg.reverse_unroll([c.hparams[0] * 2, c.hparams[1] * 1.0], c.hparams, c.outer_loss)

    for _, outer_loss, error, words in OUTER:
        case = good()
        case.outer_loss = noisy(outer_loss)
        refuses(call, case, error, words)
    for name, change, error, words in VARIABLES:
        if "hparam" not in name:
            continue
        case = good()
        change(case)
        live = case.hparams
        refuses(lambda c, live=live: call_on(api, c, live), case, error, words)


def call_on(api, case, hparams):
    if api == "exact":
        return hg.exact(lambda h: case.params, hparams, case.outer_loss)
    return hg.reverse_unroll(case.params, hparams, case.outer_loss)


# --- evaluated losses -------------------------------------------------------------------------------------------------


def evaluated(freed: str = "") -> SimpleNamespace:
    """A live linear model and its evaluated losses; the graph of one of them is freed, as after a backward()."""
    model = torch.nn.Linear(3, 1).double()
    x, y, hparams = rand(8, 3), rand(8, 1), rand(3, requires_grad=True)
    inner = (model(x) - y).pow(4).mean() + (hparams.exp() * model.weight[0] ** 2).sum()
    outer = (model(x) - 1.0).pow(4).mean()
    for name, loss in (("inner", inner), ("outer", outer)):
        if freed == name:
            loss.backward()
    hparams.grad = torch.randn(3, dtype=torch.float64)
    params = list(model.parameters())
    for w in params:
        w.grad = torch.randn_like(w)
    return SimpleNamespace(params=params, hparams=hparams, inner=inner, outer=outer, model=model, x=x)


def call_evaluated(f):
    return lambda c: f(c.outer, params=c.params, hparams=c.hparams, inner_loss=c.inner)


@pytest.mark.parametrize("f", BOTH)
@pytest.mark.parametrize("freed", ["inner", "outer"])
def test_graph_already_freed(f, freed):
    refuses(call_evaluated(f), evaluated(freed), RuntimeError, ["already freed", "evaluate it again"])


@pytest.mark.parametrize("f", BOTH)
def test_graph_freed_by_the_hypergradient_before(f):
    case = evaluated()
    with pytest.warns(hg.HypergradientWarning, match="inner problem is not solved"):
        call_evaluated(hg.implicit.grad)(case)
    refuses(call_evaluated(f), case, RuntimeError, ["already freed", "evaluate it again"])


def test_graph_of_hparams_freed():
    """λ = (leaf, net(z)): the second call reaches the network's freed graph after it has the leaf's gradient."""
    leaf, net, z = rand(3, requires_grad=True), torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()), rand(2)
    net = net.double()
    out = net(z) * 1.0
    w = (leaf + out).detach()

    def backward():
        return hg.implicit.backward(
            noisy(lambda w, h: w.pow(4).sum()),
            params=w,
            hparams=[leaf, out],
            fp_map=lambda w, h: 0.5 * (w + h[0] + h[1]),
            solver=S.GMRES(rtol=1e-10),
        )

    backward()
    tensors = [leaf, *net.parameters()]
    assert all(x.grad is not None for x in tensors)
    case = SimpleNamespace(params=[w], hparams=tensors)
    refuses(lambda c: backward(), case, RuntimeError, ["hparams", "already freed", "evaluate it again"])
    for x in tensors:
        x.grad = None
    refuses(lambda c: backward(), case, RuntimeError, ["already freed"])


def test_hooks_that_fail_leave_grad_alone():
    leaf = rand(3, requires_grad=True)
    other = rand(3, requires_grad=True)

    def hook(g):
        raise Boom

    other.register_hook(hook)
    leaf.grad = rand(3)
    for _ in range(2):
        out = other * 2.0
        with nothing_changed(leaf, other), pytest.raises(Boom):
            hg.fixed_point(
                [(leaf + out).detach()],
                [leaf, out],
                30,
                noisy(lambda w, h: [0.5 * (w[0] + h[0] + h[1])]),
                lambda w, h: w[0].sum(),
            )


@pytest.mark.parametrize("f", BOTH)
def test_evaluated_losses_that_do_not_reach_params(f):
    case = evaluated()
    others = {
        "outer_loss does not depend on params": {"outer": case.hparams.sum()},
        "outer_loss does not depend on params; was it": {"outer": rand()},
        "inner_loss does not depend on params": {"inner": (case.hparams**2).sum()},
        "inner_loss must give a scalar": {"inner": case.model(case.x)},
        "outer_loss must give a scalar": {"outer": case.model(case.x)},
    }
    for words, change in others.items():
        refuses(call_evaluated(f), SimpleNamespace(**(vars(case) | change)), ValueError, [words])


@pytest.mark.parametrize("f", BOTH)
def test_params_and_hparams_must_be_separate_variables_of_evaluated_losses(f):
    """A tensor in both, params computed from hparams, hparams computed from params: each would be counted twice."""
    h = rand(3, requires_grad=True)
    w = rand(3, requires_grad=True)
    rows = [
        (h, h, ["no tensor may be in params and in hparams"]),
        (2.0 * h, h, ["params was computed from hparams", "counted twice"]),
        (w, 2.0 * w, ["hparams was computed from params", "counted twice"]),
        ([w, 2.0 * w], h, ["params[1] was computed from params[0]", "counted twice"]),
    ]
    for params, hparams, words in rows:
        first = params[1] if isinstance(params, list) else params
        case = SimpleNamespace(params=params, hparams=hparams)
        case.inner, case.outer = (first - hparams).square().sum(), first.pow(4).sum()
        refuses(call_evaluated(f), case, ValueError, words)


@pytest.mark.parametrize("which", ["outer_loss", "fp_map", "residual", "inner_loss"])
def test_callables_that_ignore_their_params_for_the_live_ones(which):
    """A closure uses the module's tensors instead of the argument, so its derivative would silently be zero."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    h = rand(1, 3, requires_grad=True)
    x = rand(5, 3)
    with torch.no_grad():
        model.weight.copy_(h)
    losses = {
        "outer_loss": lambda w, h: model(x).square().sum(),
        "inner_loss": lambda w, h: (model.weight - h).square().sum(),
        "fp_map": lambda w, h: [0.5 * (model.weight + h)],
        "residual": lambda w, h: [model.weight - h],
    }
    right = {
        "outer_loss": lambda w, h: (x @ w[0].T).square().sum(),
        "fp_map": lambda w, h: [0.5 * (w[0] + h)],
    }
    form = "fp_map" if which == "outer_loss" else which
    chosen = {"outer_loss": right["outer_loss"], form: right.get(form), which: losses[which]}
    case = SimpleNamespace(params=list(model.parameters()), hparams=h)
    for f in BOTH:
        options = {key: noisy(value) for key, value in chosen.items()}
        words = ["inner_loss does not depend on params"] if which == "inner_loss" else [which, "live ones"]
        refuses(lambda c, f=f, o=options: f(params=c.params, hparams=c.hparams, **o), case, ValueError, words)


def test_the_error_for_fused_attention_says_what_to_do():
    """The fused kernel has no second derivative."""
    q, k = rand(1, 2, 5, 4).float(), rand(1, 2, 5, 4).float()
    v = rand(1, 2, 5, 4).float()
    h = torch.randn(1, 2, 5, 4, requires_grad=True)

    def inner(w, h):
        mixed = torch.nn.functional.scaled_dot_product_attention(q * w, k, v)
        return mixed.square().sum() + (w - h).square().sum()

    case = SimpleNamespace(params=v.clone(), hparams=h)

    def call(c):
        return hg.implicit.backward(lambda w, h: w.sum(), params=c.params, hparams=c.hparams, inner_loss=noisy(inner))

    backend = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel(backend.FLASH_ATTENTION):
        refuses(call, case, RuntimeError, ["fused attention", "SDPBackend.MATH"])
    with torch.nn.attention.sdpa_kernel(backend.MATH), pytest.warns(hg.HypergradientWarning, match="not solved"):
        call(case)


# --- numbers that are not there, and systems that have no answer ------------------------------------------------------


def quadratic(a: torch.Tensor, b: torch.Tensor | None = None):
    """F = Aw − λ at its solution (or near it), and E with a random gradient."""
    w = torch.linalg.pinv(a) @ a @ rand(len(a))
    h = (a @ w).requires_grad_()
    t = rand(len(a)) if b is None else b
    return SimpleNamespace(
        params=w,
        hparams=h,
        residual=lambda w, h: a @ w - h,
        fp_map=lambda w, h: w - a @ w + h,
        inner_loss=lambda w, h: 0.5 * w @ a @ w - w @ h,
        outer_loss=lambda w, h: (w * t).sum(),
    )


def spd(n: int = 6) -> torch.Tensor:
    m = rand(n, n)
    return m @ m.T / n + torch.eye(n)


def status_of(case, form, solver, match=None, **options):
    """The result of implicit.grad; if `match` is given, assert a warning with these words."""
    call = {"params": case.params, "hparams": case.hparams, form: getattr(case, form), "solver": solver} | options
    if match is None:
        return hg.implicit.grad(case.outer_loss, **call)
    with pytest.warns(hg.HypergradientWarning) as told, untouched(case.params, case.hparams):
        result = hg.implicit.grad(case.outer_loss, **call)
    assert any(re.search(match, str(warning.message)) for warning in told), [str(w.message) for w in told]
    return result


def failing():
    """name: (A, form of the inner problem, solver, options, status, words of the warning)."""
    a = spd()
    indefinite = a - 2.0 * torch.eye(6)
    rotation = torch.eye(6, dtype=torch.float64) + 0.8 * torch.triu(rand(6, 6), 1)
    q = torch.linalg.qr(rand(6, 6))[0]
    singular = q @ torch.diag(torch.tensor([0.0, 1, 2, 3, 4, 5], dtype=torch.float64)) @ q.T
    expansive = -0.5 * torch.eye(6, dtype=torch.float64)
    symmetric = {"symmetric": True}
    status = hg.Status
    # Rounding decides whether CG finds pᵀAp ≤ 0; both messages say that the system may be singular.
    flat = (status.STAGNATED, status.NOT_POSITIVE_DEFINITE)
    return {
        "indefinite-CG": (indefinite, "inner_loss", S.CG(), {}, status.NOT_POSITIVE_DEFINITE, "MINRES"),
        "indefinite-default": (
            indefinite,
            "inner_loss",
            None,
            {},
            status.NOT_POSITIVE_DEFINITE,
            "not a strict minimum",
        ),
        "asymmetric-CG": (rotation, "residual", S.CG(max_steps=4), symmetric, status.NOT_SYMMETRIC, "GMRES"),
        "asymmetric-MINRES": (rotation, "residual", S.MINRES(max_steps=4), symmetric, status.NOT_SYMMETRIC, "GMRES"),
        "singular-CG": (singular, "inner_loss", S.CG(), {}, flat, "singular"),
        "singular-MINRES": (singular, "inner_loss", S.MINRES(), {}, status.STAGNATED, "singular"),
        "singular-LSQR": (singular, "residual", S.LSQR(), {}, status.STAGNATED, "singular"),
        "singular-NormalCG": (singular, "residual", S.NormalCG(), {}, status.STAGNATED, "singular"),
        "singular-Dense": (singular, "residual", S.Dense(), {}, status.BREAKDOWN, "singular"),
        "expansive-FixedPoint": (
            expansive,
            "residual",
            S.FixedPoint(max_steps=20),
            {},
            status.DIVERGED,
            r"factor of 1\.5 a step",
        ),
        "expansive-to-tolerance": (
            expansive,
            "residual",
            S.FixedPoint(rtol=1e-8),
            {},
            status.DIVERGED,
            r"factor of 1\.5 a step",
        ),
        "expansive-Neumann": (expansive, "fp_map", S.Neumann(max_steps=20), {}, status.DIVERGED, r"factor of 1\.5 a"),
        "too few steps": (a, "inner_loss", S.CG(max_steps=2, rtol=1e-8), {}, status.MAX_STEPS, "raise max_steps"),
    }


@pytest.mark.parametrize("row", failing())
def test_systems_that_a_solver_cannot_solve(row):
    """By default a warning gives the status and advice; on_failure="raise" makes it an error, "ignore" silences it."""
    a, form, solver, options, status, words = failing()[row]
    case = quadratic(a)
    statuses = status if isinstance(status, tuple) else (status,)
    ends = "|".join(each.name for each in statuses)
    match = f"the adjoint system of the hypergradient: ({ends}) .*{words}"
    result = status_of(case, form, solver, match, **options)
    assert result.solution.status in statuses and not result.solution.ok
    silent = {"max_steps": None} | vars(solver or S.CG()) | {"on_failure": "ignore"}
    kind = type(solver or S.CG())
    names = set(kind.__dataclass_fields__)
    quiet = kind(**{key: value for key, value in silent.items() if key in names})
    assert torch.equal(status_of(case, form, quiet, **options).grads, result.grads)
    strict = kind(**{key: value for key, value in (silent | {"on_failure": "raise"}).items() if key in names})
    case.outer_loss = noisy(case.outer_loss)
    for f in BOTH:
        with nothing_changed(case.params, case.hparams), pytest.raises(hg.SolverError) as raised:
            f(
                case.outer_loss,
                params=case.params,
                hparams=case.hparams,
                solver=strict,
                **{form: getattr(case, form)},
                **options,
            )
        assert isinstance(raised.value, ValueError)
        assert raised.value.solution.status is result.solution.status


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_consistent_singular_system_has_a_solution(scale):
    """With b in the range of A, CG, MINRES and the least-squares methods solve the system without a warning."""
    q = torch.linalg.qr(rand(6, 6))[0]
    a = q @ torch.diag(torch.tensor([0.0, 1, 2, 3, 4, 5], dtype=torch.float64)) @ q.T
    case = quadratic(a, scale * a @ rand(6))
    truth = torch.linalg.pinv(a) @ torch.func.grad(case.outer_loss)(case.params, case.hparams)
    for solver in (S.CG(rtol=1e-10), S.MINRES(rtol=1e-10), S.LSQR(rtol=1e-10), S.NormalCG(rtol=1e-10)):
        result = status_of(case, "residual", solver, symmetric=True)
        assert relative(result.grads, truth) < 1e-8


NOT_FINITE_THERE = {  # √λ at 0: the adjoint is finite, but the derivative in λ is not
    "outer loss": lambda loud: hg.implicit.grad(
        lambda w, h: w.square().sum() + h.sqrt().sum(), inner_loss=lambda w, h: (w - 1 - h).square().sum(), **loud
    ),
    "inner loss": lambda loud: hg.implicit.grad(
        lambda w, h: w.square().sum(), inner_loss=lambda w, h: (w - 1 - h.sqrt()).square().sum(), **loud
    ),
    "CG": lambda c: hg.CG(*lists(c), 5, half_way, lambda w, h: w[0].square().sum()),
    "stoch_AID": lambda c: hg.stoch_AID(*lists(c), lambda w, h: w[0].square().sum(), 3, fp_map=half_way, verbose=False),
    "reverse": lambda c: hg.reverse([[c["params"]]] * 2, *lists(c)[1:], [half_way], lambda w, h: w[0].square().sum()),
    "exact": lambda c: hg.exact(lambda h: [h[0].sqrt() + 1], *lists(c)[1:], lambda w, h: w[0].square().sum()),
    "unroll": lambda c: hg.unroll.reverse(
        lambda w, h: half_way([w], [h])[0], c["params"], c["hparams"], lambda w, h: w.square().sum(), 3
    ),
}


def lists(c):
    return [c["params"]], [c["hparams"]]


def half_way(w, h):
    return [0.5 * w[0] + 0.5 + 0.5 * h[0].sqrt()]


@pytest.mark.parametrize("api", NOT_FINITE_THERE)
def test_a_hypergradient_that_is_not_finite_is_warned_of(api):
    case = {"params": torch.tensor([1.0, 2.0, 1.0]), "hparams": torch.tensor([0.0, 1.0, 0.0], requires_grad=True)}
    with pytest.warns(hg.HypergradientWarning, match="the hypergradient holds NaN or infinity"):
        NOT_FINITE_THERE[api](case)
    if api in ("outer loss", "inner loss"):
        with pytest.raises(hg.SolverError, match="holds NaN or infinity"):
            NOT_FINITE_THERE[api](case | {"solver": S.CG(on_failure="raise")})
        NOT_FINITE_THERE[api](case | {"solver": S.CG(on_failure="ignore")})  # any warning is an error here


def test_sums_that_overflow_are_finite():
    """Finite entries whose sum overflows in float32 give no warning."""
    h = torch.full((4,), 2e38, requires_grad=True)
    hg.implicit.grad(
        lambda w, h: w.square().sum() + (h * h.detach()).sum(),
        inner_loss=lambda w, h: (w - 1).square().sum() + 0 * (h.sum() * w.sum()) / 1e38,
        params=torch.ones(3),
        hparams=h,
    )  # any warning is an error here


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["outer value", "outer gradient", "a product", "the inner problem"])
def test_numbers_that_are_not_finite(where, bad):
    """The status is NON_FINITE, with a warning by default and a SolverError under "raise"."""
    case = quadratic(spd())
    ones = torch.ones(6, dtype=torch.float64)
    ones[2] = bad
    if where == "outer value":
        case.outer_loss = lambda w, h: (w * bad).sum()
    elif where == "outer gradient":
        case.outer_loss = lambda w, h: (w * ones).sum()
    elif where == "a product":
        original = case.residual
        case.residual = lambda w, h: original(w, h) + (w - w.detach()) * ones
    else:
        original = case.residual
        case.residual = lambda w, h: original(w, h) * ones
    for solver in (
        None,
        S.CG(),
        S.CG(max_steps=4),
        S.MINRES(max_steps=4),
        S.GMRES(max_steps=4),
        S.BiCGStab(max_steps=4),
        S.LSQR(max_steps=4),
        S.NormalCG(max_steps=4),
        S.FixedPoint(max_steps=4),
        S.Neumann(max_steps=4),
        S.FixedPoint(max_steps=1),
        S.Dense(),
        S.Optimizer(max_steps=4),
        S.Nystrom(rank=3),
    ):
        result = status_of(case, "residual", solver, "NON_FINITE", symmetric=True)
        assert result.solution.status is hg.Status.NON_FINITE
    case.outer_loss = noisy(case.outer_loss)
    with nothing_changed(case.params, case.hparams), pytest.raises(hg.SolverError, match="NON_FINITE"):
        hg.implicit.backward(
            case.outer_loss,
            params=case.params,
            hparams=case.hparams,
            residual=case.residual,
            solver=S.GMRES(on_failure="raise"),
        )
    for method in (hg.fixed_point, hg.CG, hg.CG_normaleq, hg.neumann):
        with pytest.warns(hg.HypergradientWarning, match="NON_FINITE"):
            method(
                [case.params],
                [case.hparams],
                4,
                lambda w, h: [w[0] - case.residual(w[0], h[0])],
                lambda w, h: case.outer_loss(w[0], h[0]),
                set_grad=False,
            )


def test_functional_interface_warns_of_failures():
    """It warns of DIVERGED, NOT_POSITIVE_DEFINITE, NOT_SYMMETRIC and inconsistency, not of K steps that miss tol."""
    rows = [
        (hg.fixed_point, "expansive-FixedPoint", r"DIVERGED.*factor of 1\.5 a step"),
        (hg.neumann, "expansive-FixedPoint", r"DIVERGED.*factor of 1\.5 a step"),
        (hg.CG, "indefinite-CG", "NOT_POSITIVE_DEFINITE"),
        (hg.CG, "asymmetric-CG", "NOT_SYMMETRIC"),
        (hg.CG_normaleq, "singular-NormalCG", "STAGNATED"),
    ]
    for method, row, match in rows:
        case = quadratic(failing()[row][0])
        with pytest.warns(hg.HypergradientWarning, match=match) as told:
            method(
                [case.params],
                [case.hparams],
                20,
                lambda w, h, c=case: [c.fp_map(w[0], h[0])],
                lambda w, h, c=case: c.outer_loss(w[0], h[0]),
                set_grad=False,
            )
        assert told[0].filename == __file__
    p = as_lists(problem_at("ridge"))
    hg.CG(p.params, p.hparams, 4, p.fp_map, p.outer_loss, set_grad=False)


def test_an_inner_problem_that_is_not_solved():
    """The warning names ‖∇g‖, and "ignore" silences it; the result holds the number in both cases."""
    case = quadratic(spd())
    case.params = case.params + rand(6)
    for form in ("inner_loss", "residual", "fp_map"):
        residual = case.residual(case.params, case.hparams).norm().item()
        told = re.escape(f"inner problem is not solved: its residual is {residual:.2e}")
        result = status_of(case, form, None, told)
        assert relative(result.inner_residual, residual) < 1e-12
        quiet = S.GMRES(on_failure="ignore")
        assert status_of(case, form, quiet).inner_distance > 0.1


def test_zero_right_hand_side_no_steps_and_multiples_of_the_identity():
    """b = 0, K = 0 and A = cI through implicit.grad, for every solver that takes them."""
    identity = 3.0 * torch.eye(6, dtype=torch.float64)
    every = {
        "CG": S.CG,
        "MINRES": S.MINRES,
        "GMRES": S.GMRES,
        "BiCGStab": S.BiCGStab,
        "NormalCG": S.NormalCG,
        "LSQR": S.LSQR,
    }
    for kind in every.values():
        case = quadratic(identity)
        truth = torch.func.grad(case.outer_loss)(case.params, case.hparams) / 3.0
        for steps in (1, 2, 9):
            result = status_of(case, "inner_loss", kind(max_steps=steps))
            assert result.solution.ok
            assert relative(result.grads, truth) < 1e-14
        case = quadratic(spd(), torch.zeros(6, dtype=torch.float64))
        for solver in (kind(), kind(max_steps=3), kind(max_steps=0)):
            result = status_of(case, "inner_loss", solver)
            assert result.solution.ok and not result.grads.any() and not result.adjoint.any()
            assert result.solution.relative_residual == 0
        case = quadratic(spd())
        result = status_of(case, "inner_loss", kind(max_steps=0, on_failure="ignore"))
        assert not result.adjoint.any() and not result.grads.any()
        assert relative(result.solution.relative_residual, 1.0) < 1e-14


def test_warnings_point_at_the_callers_line():
    case = quadratic(spd())
    case.params = case.params + 1.0
    with pytest.warns(hg.HypergradientWarning) as told:
        hg.implicit.grad(case.outer_loss, params=case.params, hparams=case.hparams, inner_loss=case.inner_loss)
    assert told[0].filename == __file__


@pytest.mark.parametrize("api", [api for api in apis() if api != "reverse"])  # reverse gives no warning
def test_warnings_turned_into_errors_change_nothing_either(api):
    case = good_but_far()
    with pytest.warns(hg.HypergradientWarning, match="not solved"):
        apis()[api](good_but_far())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuses(apis()[api], case, hg.HypergradientWarning, ["not solved"])


def good_but_far():
    case = good()
    case.params = [w + 1.0 for w in case.params]
    return case


def test_warnings_point_at_the_caller_whatever_its_folder_is_called():
    """A file outside torch's folder counts as the caller's even if its path begins like that of torch's folder."""
    folder = f"{Path(torch.__file__).parent}_user"
    code = compile("warn('message')", f"{folder}/file.py", "exec")
    with pytest.warns(hg.HypergradientWarning, match="message") as told:
        exec(code, {"warn": warn})
    assert told[0].filename == f"{folder}/file.py"
