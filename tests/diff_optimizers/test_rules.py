"""Update rules against torch.optim, finite differences, closed forms and independent oracles."""

import inspect
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from scipy.optimize import minimize

import hypergrad as hg

D = hg.diff_optimizers
F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


PLAIN = {"weight_decay": 0.03}
EVERY = [
    ("SGD", {"lr": 0.01}),
    ("SGD", {"lr": 0.01, "momentum": 0.8, "dampening": 0.3, **PLAIN}),
    ("SGD", {"lr": 0.01, "momentum": 0.8, "nesterov": True}),
    ("SGD", {"lr": 0.001, "maximize": True, **PLAIN}),
    ("Adam", {"lr": 0.03}),
    ("Adam", {"lr": 0.03, "amsgrad": True, "betas": (0.7, 0.8), **PLAIN}),
    ("AdamW", {"lr": 0.03}),
    ("AdamW", {"lr": 0.03, "amsgrad": True, **PLAIN}),
    ("Adam", {"lr": 0.03, "eps": 0.01, "maximize": True, "decoupled_weight_decay": True, **PLAIN}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.003, "centered": True, "momentum": 0.7, "alpha": 0.9, **PLAIN}),
    ("RMSprop", {"lr": 0.003, "eps": 0.01, "maximize": True}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.2, **PLAIN}),
    ("Adagrad", {"lr": 0.05, "eps": 0.01, "maximize": True}),
    ("Adadelta", {"lr": 1.0, **PLAIN}),
    ("Adadelta", {"lr": 0.3, "rho": 0.8, "eps": 0.01, "maximize": True}),
    ("Adamax", {"lr": 0.03, **PLAIN}),
    ("Adamax", {"lr": 0.03, "betas": (0.7, 0.8), "eps": 0.01, "maximize": True}),
    ("RAdam", {"lr": 0.02, **PLAIN}),
    ("RAdam", {"lr": 0.02, "eps": 0.01, "maximize": True}),
    ("RAdam", {"lr": 0.02, "decoupled_weight_decay": True, "betas": (0.8, 0.9), **PLAIN}),
]
# In torch before 2.7, Adam has no decoupled weight decay.
OPTIONS = [row for row in EVERY if row[1].keys() <= inspect.signature(getattr(torch.optim, row[0])).parameters.keys()]
IDS = [f"{name}-{'-'.join(options)}" for name, options in OPTIONS]
# These rules agree with torch to 1e-12, all others bit for bit.
TO_1E_12 = {
    "RAdam": "torch takes one of two branches; here both are computed and one chosen, for a derivative in beta_2",
}


def parabola():
    scale = torch.tensor([0.3, 1.0, 3.0])
    return [torch.randn(3), torch.randn(())], lambda w: 0.5 * (scale * w[0] ** 2).sum() + (w[1] - 0.7) ** 2


def rosenbrock():
    return [torch.randn(2) * 0.3], lambda w: (1 - w[0][0]) ** 2 + 10 * (w[0][1] - w[0][0] ** 2) ** 2


def mlp():
    x, y = torch.randn(12, 3), torch.randn(12, 1)
    start = [torch.randn(4, 3), torch.randn(4), torch.randn(1, 4), torch.randn(1)]
    return start, lambda w: ((torch.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3] - y) ** 2).mean()


PROBLEMS = {"parabola": parabola, "rosenbrock": rosenbrock, "mlp": mlp}


def distance(ours, theirs) -> float:
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


def advance(rule, params, state, loss, steps):
    for _ in range(steps):
        params = [w.detach().requires_grad_() for w in params]
        params, state = rule.update(params, state, torch.autograd.grad(loss(params), params))
    return params, state


def advance_torch(optimizer, params, loss, steps, sign=1):
    for _ in range(steps):
        optimizer.zero_grad()
        (sign * loss(params)).backward()
        optimizer.step()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_trajectories_are_torch_optims(name, options, problem):
    """50 steps agree bit for bit, except for the rules in TO_1E_12."""
    start, loss = PROBLEMS[problem]()
    theirs = [w.clone().requires_grad_() for w in start]
    optimizer = getattr(torch.optim, name)(theirs, **options)
    rule = getattr(D, name)(**options)
    ours, state = [w.clone() for w in start], rule.init(start)
    for _ in range(5):
        advance_torch(optimizer, theirs, loss, 10)
        ours, state = advance(rule, ours, state, loss, 10)
        assert distance(ours, theirs) < 1e-12
        assert name in TO_1E_12 or all(map(torch.equal, ours, theirs))
    assert distance(ours, start) > 1e-3


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_from_torch_mid_training(name, options):
    """After twelve steps of torch with two parameter groups, ten steps of both agree."""
    start, loss = mlp()
    theirs = [w.clone().requires_grad_() for w in start]
    groups = [{"params": theirs[:2]}, {"params": theirs[2:], "lr": options["lr"] / 2}]
    optimizer = getattr(torch.optim, name)(groups, **{**options, "maximize": True})
    advance_torch(optimizer, theirs, loss, 12, -1)
    rule, params, state = D.from_torch(optimizer)
    advance_torch(optimizer, theirs, loss, 10, -1)
    params, state = advance(rule, params, state, lambda w: -loss(w), 10)
    assert isinstance(rule.lr, D.PerLeaf) and distance(params, theirs) < 1e-10


def test_from_torch_at_the_start_with_a_tensor_lr():
    start, loss = mlp()
    theirs = [w.clone().requires_grad_() for w in start]
    lr = torch.tensor(0.03, requires_grad=True)
    twin = D.from_torch(torch.optim.Adam(theirs, lr=lr, foreach=False))
    assert twin.rule.lr is not None and int(twin.state["step"]) == 0
    params, _ = twin.rule.update(twin.params, twin.state, torch.autograd.grad(loss(theirs), theirs))
    assert torch.autograd.grad(params[1].sum(), lr)[0].abs() > 0.1


def test_every_option_is_compared_with_torch():
    """Each option of each rule of torch.optim is changed in at least one row of the comparison."""
    for kind in {type(getattr(D, name)()) for name, _ in EVERY}:
        given = {key for name, options in EVERY if isinstance(getattr(D, name)(), kind) for key in options}
        assert {field.name for field in fields(kind)} - {"frozen"} <= given, kind


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_a_hyperparameter_as_a_tensor_gives_the_same_trajectory(name, options):
    """They agree to rounding, because torch's fused operations need numbers, and tensors take the plain formula."""
    start, loss = mlp()
    tensors = {key: x if isinstance(x, (bool, tuple)) or x == 0 else torch.tensor(x) for key, x in options.items()}
    if "betas" in options:
        tensors["betas"] = tuple(map(torch.tensor, options["betas"]))
    paths = []
    for given in (options, tensors):
        rule = getattr(D, name)(**given)
        paths.append(advance(rule, start, rule.init(start), loss, 20)[0])
    assert distance(*paths) < 1e-12


RULES = {
    "SGD": (D.SGD, {"lr": 0.3, "momentum": 0.6, "dampening": 0.2, "weight_decay": 0.1}),
    "Adam": (D.Adam, {"lr": 0.3, "eps": 0.01, "weight_decay": 0.1}),
    "AdamW": (D.AdamW, {"lr": 0.3, "eps": 0.01, "weight_decay": 0.1}),
    "AMSGrad": (D.AMSGrad, {"lr": 0.3, "eps": 0.01, "weight_decay": 0.1}),
    "RMSprop": (D.RMSprop, {"lr": 0.3, "alpha": 0.6, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.5}),
    "Adagrad": (D.Adagrad, {"lr": 0.3, "lr_decay": 0.1, "eps": 0.01, "weight_decay": 0.1}),
    "Adadelta": (D.Adadelta, {"lr": 0.3, "rho": 0.6, "eps": 0.01, "weight_decay": 0.1}),
    "Adamax": (D.Adamax, {"lr": 0.3, "eps": 0.01, "weight_decay": 0.1}),
    "RAdam": (D.RAdam, {"lr": 0.3, "eps": 0.01, "weight_decay": 0.1}),
    "Nesterov": (partial(D.SGD, nesterov=True), {"lr": 0.3, "momentum": 0.6}),
    "Centred": (partial(D.RMSprop, centered=True), {"lr": 0.3, "alpha": 0.6, "eps": 0.01, "momentum": 0.5}),
    "L1": (lambda lr, a: D.ProximalGradient(lr=lr, prox=D.L1(strength=a)), {"lr": 0.3, "a": 0.2}),
    "FISTA": (lambda lr, a, b: D.FISTA(lr=lr, prox=D.ElasticNet(l1=a, l2=b)), {"lr": 0.3, "a": 0.2, "b": 0.1}),
    "Group": (lambda lr, a: D.ProximalGradient(lr=lr, prox=D.GroupLasso(strength=a)), {"lr": 0.3, "a": 0.2}),
    "Simplex": (lambda lr, a: D.ProximalGradient(lr=lr, prox=D.Simplex(radius=a)), {"lr": 0.3, "a": 1.2}),
    "Box": (lambda lr, a, b: D.ProximalGradient(lr=lr, prox=D.Box(lower=a, upper=b)), {"lr": 0.3, "a": -0.4, "b": 0.5}),
    "Rectified": (partial(D.RAdam, decoupled_weight_decay=True), {"lr": 0.3, "eps": 0.01, "weight_decay": 0.1}),
    "Accumulator": (D.Adagrad, {"lr": 0.3, "initial_accumulator_value": 0.7}),
    "Up": (partial(D.SGD, maximize=True), {"lr": 0.3}),
}
BETAS = ("Adam", "AdamW", "AMSGrad", "Adamax", "RAdam")


def build(make, keys, values, betas):
    return make(**dict(zip(keys, values, strict=True)), **({"betas": tuple(betas)} if betas else {}))


def learned(config):
    """(class, field) of every hyperparameter that is a tensor, and of every option that is True."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, D.Prox):
            yield from learned(value)
        elif value is True or all(isinstance(x, torch.Tensor) for x in (value if field.name == "betas" else [value])):
            yield type(config), field.name


def test_every_hyperparameter_and_option_is_in_gradcheck():
    kinds = [D.Rule, D.Prox]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    wanted = {(kind, field.name) for kind in kinds for field in fields(kind) if not inspect.isabstract(kind)}
    wanted -= {(D.SGD, "frozen")}
    wanted -= {(kind, name) for kind in kinds for name in ("maximize", "prox", "dim", "frozen") if kind is not D.SGD}
    covered = set()
    for name, (make, numbers) in RULES.items():
        values = [torch.tensor(x, requires_grad=True) for x in numbers.values()]
        betas = [torch.tensor(x, requires_grad=True) for x in (0.6, 0.9)] if name in BETAS else []
        covered |= set(learned(build(make, numbers, values, betas)))
    assert wanted <= covered, wanted - covered


@pytest.mark.parametrize("name", RULES)
def test_gradcheck_in_params_state_grads_and_each_hyperparameter(name):
    """Two updates start from a random state at step 6, where RAdam rectifies."""
    make, numbers = RULES[name]
    keys = list(numbers)
    betas = [0.6, 0.9] if name in BETAS else []
    hypers = [torch.tensor(x, requires_grad=True) for x in [*numbers.values(), *betas]]
    plain = build(make, keys, numbers.values(), betas)
    w, g = (torch.rand(3, requires_grad=True) + 0.1 for _ in range(2))
    slots = [k for k in plain.init(w) if k not in ("step", "missed")]
    s = [(torch.rand_like(plain.init(w)[k]) * 0.5 + 0.1) for k in slots]
    s = [x + (k == "square_avg") for x, k in zip(s, slots, strict=True)]  # v > a²: no singularity of the root
    inputs = [x.detach().requires_grad_() for x in (w, g, *s)]

    def run(w, g, *rest):
        s, h = rest[: len(slots)], rest[len(slots) :]
        rule = build(make, keys, h[: len(keys)], h[len(keys) :])
        state = {"step": torch.tensor(12.0), **dict(zip(slots, s, strict=True))}
        if name == "Accumulator":
            state = {key: x + rule.init(w)[key] for key, x in state.items()}
        w, state = rule.update(w, state, g)
        w, state = rule.update(w, state, g * w)
        return w, *(state[k] for k in slots)

    assert torch.autograd.gradcheck(run, (*inputs, *hypers))


@pytest.mark.parametrize("name", [*RULES][:9])
def test_derivatives_where_every_gradient_was_zero(name):
    """Derivatives are finite, and that of Adam's first step is η/ε · dg."""
    make, numbers = RULES[name]
    rule = make(**numbers | {"weight_decay": 0.0})
    w, g = torch.randn(2), torch.zeros(2, requires_grad=True)
    slope = torch.autograd.grad(rule.update(w, rule.init(w), g)[0].sum(), g)[0]
    assert slope.isfinite().all() and (slope < 0).all()
    if name == "Adam":
        assert torch.allclose(slope, torch.full((2,), -0.3 / 0.01), rtol=1e-12)


def test_every_form_of_a_hyperparameter():
    """Numbers, tensors, PerLeaf, PerStep, nested ones and callables of hparams follow the formula at each step."""
    w, g = [torch.randn(3), torch.randn(2)], [torch.randn(3), torch.randn(2)]
    table = torch.rand(3, requires_grad=True)
    own = torch.rand(3)
    rows = [
        (0.1, lambda i, t: 0.1),
        (D.PerStep(table), lambda i, t: table[t]),
        (D.PerStep([0.1, 0.2, 0.3]), lambda i, t: [0.1, 0.2, 0.3][t]),
        (D.PerLeaf([own, 0.2]), lambda i, t: [own, 0.2][i]),
        (D.PerLeaf([D.PerStep(table), 0.2]), lambda i, t: table[t] if i == 0 else 0.2),
        (lambda h: D.PerStep(h.exp()), lambda i, t: table[t].exp()),
    ]
    for lr, at in rows:
        rule = D.SGD(lr=lr)
        params, state = w, rule.init(w)
        expected = list(w)
        for t in range(3):
            params, state = rule.update(params, state, g, table if callable(lr) else None)
            expected = [x - at(i, t) * y for i, (x, y) in enumerate(zip(expected, g, strict=True))]
        assert distance(params, expected) < 1e-14


def test_an_unrolled_loop_of_a_rule():
    """Five steps of Adam, whose loss, schedule and momentum depend on λ, agree with finite differences."""
    w, x = torch.randn(3), torch.randn(6, 3)
    rule = D.Adam(lr=lambda h: D.PerStep(h[0].exp()), betas=(lambda h: h[1].sigmoid(), 0.9), eps=1e-3)
    step = rule.on(lambda w, h: (x @ w).cosh().log().mean() + h[1].exp() * (w**2).sum())

    def final(*h):
        carry = (w, rule.init(w))
        for _ in range(5):
            carry = step(carry, h)
        return carry[0]

    h = (torch.randn(5) * 0.1 - 2, torch.tensor(0.3))
    assert torch.autograd.gradcheck(final, tuple(x.requires_grad_() for x in h))


# --- proximal operators -----------------------------------------------------------------------------------------------


PROXES = {
    "L1": (D.L1(strength=0.5), lambda u: 0.5 * abs(u).sum(), None, None),
    "ElasticNet": (D.ElasticNet(l1=0.5, l2=0.7), lambda u: 0.5 * abs(u).sum() + 0.35 * (u**2).sum(), None, None),
    "Box": (D.Box(lower=-0.3, upper=0.4), lambda u: 0.0, (-0.3, 0.4), None),
    "Simplex": (D.Simplex(radius=1.3), lambda u: 0.0, (0, None), 1.3),
    "GroupLasso": (D.GroupLasso(strength=0.5), lambda u: 0.5 * (u**2).sum() ** 0.5, None, None),
}


@pytest.mark.parametrize("name", PROXES)
def test_prox_operators_minimise(name):
    """prox_{ηr}(w) agrees with scipy's minimiser of ½‖u − w‖² + η r(u)."""
    prox, r, bounds, total = PROXES[name]
    w, eta = torch.randn(4), 0.6
    ours = D.ProximalGradient(lr=eta, prox=prox).update(w, {"step": torch.zeros(())}, torch.zeros(4))[0].numpy()
    constraint = [] if total is None else [{"type": "eq", "fun": lambda u: u.sum() - total}]
    goal = lambda u: 0.5 * ((u - w.numpy()) ** 2).sum() + eta * r(u)  # noqa: E731
    result = minimize(
        goal,
        ours + 0.1,
        method="SLSQP",
        bounds=None if bounds is None else [bounds] * 4,
        constraints=constraint,
        options={"ftol": 1e-14},
    )
    assert goal(ours) <= result.fun + 1e-9 and abs(ours - result.x).max() < 1e-2


def simplex_by_bisection(w, radius):
    low, high = w.min() - radius, w.max()
    for _ in range(200):
        theta = (low + high) / 2
        low, high = (theta, high) if (w - theta).clamp(min=0).sum() > radius else (low, theta)
    return (w - theta).clamp(min=0)


def group_closed(w, threshold):
    """u = s w/‖w‖ with the s ≥ 0 that minimises ½(s − ‖w‖)² + τs."""
    s = max(float(w.square().sum().sqrt()) - threshold, 0.0)
    return s * w / w.square().sum().sqrt()


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])  # all entries at a kink or bound, some, nearly none
def test_prox_operators_against_closed_forms_and_bisection(scale):
    w, eta = scale * torch.randn(7), 0.6
    soft = lambda w, t: w.sign() * (w.abs() - t).clamp(min=0)  # noqa: E731
    truth = {
        "L1": soft(w, 0.3),
        "ElasticNet": soft(w, 0.3) / 1.42,
        "Box": w.clamp(-0.3, 0.4),
        "Simplex": simplex_by_bisection(w, 1.3),
        "GroupLasso": group_closed(w, 0.3),
    }
    for name, expected in truth.items():
        rule = D.ProximalGradient(lr=eta, prox=PROXES[name][0])
        got = rule.update(w, {"step": torch.zeros(())}, torch.zeros(7))[0]
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_fista_follows_its_formula():
    a, b = torch.randn(5, 3), torch.randn(5)
    eta, rule = 0.02, D.FISTA(lr=0.02, prox=D.L1(strength=0.4))
    w = torch.randn(3)
    y, state = w, rule.init(w)
    x, z, t = w, w, 1.0
    for _ in range(20):
        y, state = rule.update(y, state, a.T @ (a @ y - b))
        v = z - eta * a.T @ (a @ z - b)
        new, ahead = v.sign() * (v.abs() - eta * 0.4).clamp(min=0), (1 + (1 + 4 * t * t) ** 0.5) / 2
        x, z, t = new, new + (t - 1) / ahead * (new - x), ahead
    assert distance([y, state["x"]], [z, x]) < 1e-12


# --- bad input --------------------------------------------------------------------------------------------------------


def test_errors():
    w, h = torch.randn(3), torch.randn((), requires_grad=True)
    other = torch.optim.SGD([w.clone().requires_grad_()], lr=0.1, differentiable=True)

    leaf, sparse = torch.randn(3), torch.randn(3, requires_grad=True)
    sparse.grad = torch.ones(3).to_sparse()
    hooked = torch.optim.SGD([leaf])
    hooked.register_step_post_hook(lambda *_: None)
    groups = [{"params": [leaf], "nesterov": True}, {"params": [leaf.clone()]}]
    mixed = torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def step(rule, hparams=None, grads=w):
        return rule.update(w, rule.init(w), grads, hparams)

    rows = [
        (lambda: step(D.SGD(lr=torch.ones(3))), ValueError, "needs PerStep or PerLeaf"),
        (lambda: step(D.SGD(lr=D.PerLeaf([1.0, 2.0]))), ValueError, "holds 2 values, but params has 1"),
        (lambda: step(D.SGD(lr=D.PerStep([]))), ValueError, "update number 1"),
        (lambda: D.PerStep(torch.tensor(0.1)), ValueError, "PerStep needs a tensor with an axis of steps"),
        (lambda: step(D.SGD(lr="fast")), TypeError, "must be a number, a tensor, PerStep"),
        (lambda: D.Adam(betas=(0.9,)), ValueError, "betas must be a pair"),
        (lambda: D.SGD(nesterov=True), ValueError, "nesterov needs a momentum"),
        (lambda: step(D.SGD(lr=lambda h: h)), ValueError, "pass hparams"),
        (lambda: step(D.SGD(lr=lambda h: h.item()), h), ValueError, "no graph back to hparams"),
        (lambda: step(D.SGD(lr=0.1), h), ValueError, "no hyperparameter of SGD is a callable"),
        (lambda: step(D.SGD(), grads=[None]), ValueError, "must have params' structure"),
        (lambda: step(D.SGD(), grads=[w, w]), ValueError, "1 leaves, got 2"),
        (lambda: step(D.SGD(), grads="g"), TypeError, "must be a tensor or None"),
        (lambda: step(D.SGD(), grads=torch.ones(2)), ValueError, "must be of shape"),
        (lambda: D.Adam().update(w, {}, w), ValueError, "state must hold"),
        (lambda: D.Adam(betas=(0.9, 1.0)), ValueError, r"betas\[1\]"),
        (lambda: D.from_torch(torch.optim.LBFGS([w.clone().requires_grad_()])), TypeError, "got LBFGS"),
        (lambda: D.from_torch(other), ValueError, "differentiable=True"),
        (lambda: D.from_torch(hooked), ValueError, "step hooks"),
        (lambda: D.from_torch(torch.optim.SGD([leaf.to(torch.complex128)])), ValueError, "complex"),
        (lambda: D.from_torch(torch.optim.SGD([sparse])), ValueError, "sparse gradient"),
        (lambda: D.from_torch(mixed), ValueError, "nesterov differs between param groups"),
        (lambda: D.from_torch(type("Own", (torch.optim.SGD,), {})([leaf])), TypeError, "not their subclasses"),
        (lambda: D.Box(lower=1.0, upper=0.0), ValueError, "lower must be ≤ upper"),
        (lambda: D.Simplex(radius=-1.0), ValueError, "Simplex: radius must be ≥ 0"),
    ]
    for call, error, words in rows:
        with pytest.raises(error, match=words):
            call()


def test_a_list_of_values_is_in_the_order_of_the_leaves():
    w, g = {"a": torch.ones(2), "b": torch.ones(3)}, {"a": torch.ones(2), "b": torch.ones(3)}
    rule = D.SGD(lr=D.PerLeaf([0.1, 0.2]))
    new, _ = rule.update(w, rule.init(w), g)
    assert torch.allclose(new["a"], torch.tensor(0.9)) and torch.allclose(new["b"], torch.tensor(0.8))


def test_a_detached_state_is_warned_of():
    w = torch.randn(3, requires_grad=True)
    rule = replace(D.Adam(lr=0.1), eps=1e-3)
    step = rule.on(lambda w, h: (w**4).sum())
    params, state = step((w, rule.init(w)))
    with pytest.warns(hg.HypergradientWarning, match="state carries none"):
        step((params, {name: x.detach() for name, x in state.items()}))


def test_frozen_parameters_of_a_module_are_named():
    layer = torch.nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    params = dict(layer.named_parameters())
    with pytest.raises(ValueError, match=r"params\['bias'\] do not require grad .* SGD\(frozen=\(0,\)\)"):
        hg.diff_optimizers.SGD(lr=0.1).init(params)
    rule = hg.diff_optimizers.SGD(lr=0.1, frozen=(0,))
    moved = rule.on(lambda w, h: sum((x**2).sum() for x in w.values()))((params, rule.init(params)))[0]
    assert torch.equal(moved["bias"], layer.bias) and not torch.equal(moved["weight"], layer.weight)
    layer.requires_grad_(False)
    rule.init(params)  # if no tensor requires grad, params are constants, and none is frozen
