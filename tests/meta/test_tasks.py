"""Meta-gradients of real programs: hooks, frozen leaves, containers, closures, lists of tasks, losses without vmap."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cache

import numpy as np
import optree
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import hypergrad as hg
from helpers import default_device, nothing_changed, relative, untouched
from hypergrad import meta

COUNT, RHO = 4, 3.0
METHODS = {
    "implicit": meta.Implicit(solver=hg.solvers.CG(rtol=1e-13, max_steps=300, on_failure="ignore")),
    "unrolled": meta.Unrolled(),
    "checkpointed": meta.Unrolled(memory="sqrt"),
    "first-order": meta.FirstOrder(),
    "reptile": meta.Reptile(),
}
CHUNKS = (None, 1, 3, COUNT)
every_method = pytest.mark.parametrize("name", METHODS)
every_chunk = pytest.mark.parametrize("chunk", CHUNKS)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat(tree):
    return torch.cat([x.reshape(-1) for x in optree.tree_leaves(tree)])


X, Y = draw(COUNT, 6, 3), draw(COUNT, 6, seed=1)
TASKS = (X, Y)


def fit(w, h, task):
    x, y = task
    return ((torch.tanh(x @ w["a"]) + w["b"] - y) ** 2).mean()


def outer(w, h, task):
    return fit(w, h, task) + 0.1 * sum((x**2).sum() for x in h.values())


inner = meta.biased(fit, RHO)


def start_of(**options):
    return {"a": draw(3, seed=2).requires_grad_(), "b": draw(1, seed=3).requires_grad_()} | options


def grad(name, hparams, outer=outer, inner=inner, tasks=TASKS, **options):
    return meta.grad(outer, inner, hparams, tasks, **({"method": METHODS[name], "steps": 3} | options))


@cache
def plain(name, reduction="mean"):
    return flat(grad(name, start_of(), reduction=reduction, chunk=1).grads)


# Hooks


@every_chunk
@every_method
def test_a_hook_on_hparams_acts_once_on_the_whole_gradient(name, chunk):
    """It acts as in loss.backward(): once on the sum over tasks, which a clamp or a change of sign would reveal."""
    bound = 0.2 * float(plain(name, "sum").abs().max())
    hook = lambda g: -g.clamp(-bound, bound)  # noqa: E731
    hparams = start_of()
    calls = [x.register_hook(hook) for x in hparams.values()]
    due = hook(plain(name, "sum"))
    assert relative(flat(grad(name, hparams, reduction="sum", chunk=chunk).grads), due) < 1e-10
    result = meta.backward(outer, inner, hparams, TASKS, method=METHODS[name], steps=3, reduction="sum", chunk=chunk)
    assert relative(flat([x.grad for x in hparams.values()]), due) < 1e-10
    assert relative(flat(result.grads), due) < 1e-10
    rows = grad(name, hparams, reduction="none", chunk=chunk).grads
    truth = grad(name, start_of(), reduction="none").grads
    assert relative(flat(rows), hook(flat(truth))) < 1e-10
    for handle in calls:  # they are there as before
        handle.remove()
    assert relative(flat(grad(name, hparams, reduction="sum", chunk=chunk).grads), plain(name, "sum")) < 1e-10


@every_method
def test_a_hook_on_hparams_that_a_network_computes_acts_once(name):
    root = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    seen = []
    made = {key: x.detach() * (root / 0.5) for key, x in start_of().items()}
    for x in made.values():
        x.register_hook(lambda g: seen.append(1) or -2 * g)
    meta.backward(outer, inner, made, TASKS, method=METHODS[name], steps=3, chunk=2)
    due = -2 * torch.dot(plain(name), flat(start_of())) / 0.5
    assert relative(root.grad, due.detach()) < 1e-10
    assert len(seen) == 2


@every_method
def test_under_no_grad_and_beside_retained_gradients(name):
    made = {key: 1 * x for key, x in start_of().items()}
    for x in made.values():
        x.retain_grad()
    with torch.no_grad():
        results = [grad(name, made, chunk=chunk) for chunk in CHUNKS]
    assert all(x.grad is None for x in made.values())
    assert all(relative(flat(result.grads), plain(name)) < 1e-10 for result in results)


@pytest.mark.parametrize("name", ["implicit", "unrolled", "checkpointed"])
@every_chunk
def test_hooks_that_the_inner_loss_puts_on_params_are_refused(name, chunk):
    def clipped(w, h, task):
        w["a"].register_hook(lambda g: g.clamp(-0.01, 0.01))
        return inner(w, h, task)

    with pytest.raises(ValueError, match="inner_loss registers a hook on params"):
        grad(name, start_of(), inner=clipped, chunk=chunk)


# Frozen leaves


@pytest.mark.parametrize("rule", [hg.diff_optimizers.SGD(lr=0.1, momentum=0.9, weight_decay=0.1), None])
@every_chunk
@every_method
def test_frozen_leaves_are_not_adapted(name, chunk, rule):
    """The result is the same as with the frozen leaf as a constant of the losses."""
    b = draw(1, seed=3)
    part = {"a": start_of()["a"]}
    with_b = lambda w: w | {"b": b}  # noqa: E731
    truth = grad(
        name,
        part,
        inner=meta.biased(lambda w, h, task: fit(with_b(w), h, task), RHO),
        outer=lambda w, h, task: outer(with_b(w), with_b(h), task),
        rule=rule,
    )
    hparams = start_of(b=b)
    with nothing_changed(hparams):
        result = grad(name, hparams, chunk=chunk, rule=rule)
    assert torch.equal(result.params["b"], b.expand(COUNT, 1))
    assert relative(result.params["a"], truth.params["a"]) < 1e-12
    assert relative(result.grads["a"], truth.grads["a"]) < 1e-10
    assert not result.grads["b"].any()
    rows = grad(name, hparams, chunk=chunk, rule=rule, reduction="none").grads
    assert relative(rows["a"].mean(0), truth.grads["a"]) < 1e-10
    adapted = meta.adapt(inner, hparams, TASKS, steps=3, chunk=chunk, rule=rule).params
    assert torch.equal(adapted["b"], b.expand(COUNT, 1)) and relative(adapted["a"], truth.params["a"]) < 1e-12


@every_method
def test_frozen_parameters_of_a_module_in_the_start(name):
    net = nn.Linear(3, 1, dtype=torch.float64)
    net.bias.requires_grad_(False)
    loss = lambda w, h, task: ((task[0] @ w["weight"][0] + w["bias"] - task[1]) ** 2).mean()  # noqa: E731
    result = grad(
        name,
        {"weight": net.weight},
        start=lambda h, task: {**h, "bias": net.bias},
        inner=meta.biased(loss, RHO, centre=lambda h: {**h, "bias": net.bias}),
        outer=loss,
    )
    assert torch.equal(result.params["bias"], net.bias.expand(COUNT, 1))


@every_chunk
def test_a_start_without_a_graph_is_adapted(chunk):
    """A head that starts at zeros, or a start that is not learned, does not count as frozen."""
    hparams = {"a": start_of()["a"], "w0": draw(1, seed=3)}
    heads = lambda h, task: {"a": h["a"], "b": torch.zeros(1, dtype=torch.float64)}  # noqa: E731
    assert grad("first-order", hparams, start=heads, inner=fit, chunk=chunk).params["b"].all()
    only = lambda h, task: {"a": h["a"].detach(), "b": h["w0"]}  # noqa: E731
    options = {"steps": 2, "start": only, "chunk": chunk}
    assert (meta.adapt(fit, {k: x.detach() for k, x in hparams.items()}, TASKS, **options).params["b"] != 0).all()


# Containers


@every_chunk
@every_method
def test_containers_are_matched_by_key(name, chunk):
    """Params are an OrderedDict in another order than the centre, a plain dict whose keys optree sorts."""
    result = grad(name, start_of(), start=lambda h, task: OrderedDict(b=h["b"], a=h["a"]), chunk=chunk)
    assert list(result.params) == ["b", "a"]
    assert relative(flat(result.grads), plain(name)) < 1e-10


def test_a_centre_of_another_structure_is_named():
    with pytest.raises(ValueError, match="centre of biased must have the structure of params"):
        grad("implicit", start_of(), inner=meta.biased(fit, RHO, centre=lambda h: {"a": h["a"]}))


@dataclass
class Sets:
    support: torch.Tensor
    query: torch.Tensor


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"sets": Sets(X, Y), "x": X}, r"tasks\['sets'\] is a Sets, whose contents are unknown"),
        ((X, np.zeros(COUNT)), r"tasks\[1\] is a ndarray"),
        ([(X[0], Sets(X, Y))], r"tasks\[1\] is a Sets"),
        (Sets(X, Y), "tasks is a Sets"),
    ],
)
def test_containers_that_are_unknown_are_named(tasks, message):
    with pytest.raises(TypeError, match=message):
        grad("unrolled", start_of(), tasks=tasks)
    with pytest.raises(TypeError, match=r"hparams must be a .*tensor, got Sets"):
        grad("unrolled", Sets(X, Y))


# Closures


def closures(hparams, late):
    """A problem whose functions use hparams, or tensors computed from them, by closures as well as by arguments."""
    rho = 1 + late["b"].sum()
    within = meta.biased(lambda w, h, t: fit(w, h, t) + 0.1 * (late["b"] * w["a"]).sum(), rho, centre=lambda h: late)
    return {
        "inner": meta.biased(within, hparams["b"].sum() + 3),
        "outer": lambda w, h, t: fit(w, h, t) + (late["a"] * w["a"]).sum(),
        "start": lambda h, t: {"a": h["a"] + late["a"], "b": late["b"]},
        "rule": hg.diff_optimizers.SGD(lr=0.1 + 0.01 * hparams["b"].sum()),
    }


@every_chunk
@every_method
def test_tensors_that_losses_and_rules_close_over(name, chunk):
    """For each chunk size the tasks' gradients are those of single calls, and reduction="sum" gives their sum."""
    hparams, alone = start_of(), []
    late = {key: x * x.exp() for key, x in hparams.items()}  # all calls share this graph
    for i in range(COUNT):
        tasks = (X[i : i + 1], Y[i : i + 1])
        alone.append(flat(grad(name, hparams, tasks=tasks, **closures(hparams, late)).grads))
    total = grad(name, hparams, reduction="sum", chunk=chunk, **closures(hparams, late)).grads
    assert relative(flat(total), torch.stack(alone).sum(0)) < 1e-10
    rows = grad(name, hparams, reduction="none", chunk=chunk, **closures(hparams, late)).grads
    for i in range(COUNT):
        assert relative(flat({key: x[i] for key, x in rows.items()}), alone[i]) < 1e-10


@every_chunk
@pytest.mark.parametrize("form", ["strength", "loss"])
def test_the_derivative_in_a_strength_that_is_closed_over(chunk, form):
    """w = (c + ρ λ) / (1 + ρ) and E = w: dE/dρ = (λ − w) / (1 + ρ), dE/dλ = ρ / (1 + ρ)."""
    h = {key: torch.tensor(x, dtype=torch.float64).requires_grad_() for key, x in (("rho", 1.3), ("lam", 0.3))}
    c = draw(COUNT)
    g = meta.biased(lambda w, h, c: (w - c) ** 2 / 2, strength=h["rho"], centre=lambda h: h["lam"])
    if form == "loss":
        g = lambda w, _, c: (w - c) ** 2 / 2 + h["rho"] * (w - h["lam"]) ** 2 / 2  # noqa: E731
    options = {"method": METHODS["implicit"], "steps": 300, "start": lambda h, c: torch.zeros_like(c)}
    rows = meta.grad(lambda w, h, c: w, g, h, c, reduction="none", chunk=chunk, **options).grads
    rho, lam = (h[key].detach() for key in ("rho", "lam"))
    w = (c + rho * lam) / (1 + rho)
    assert relative(rows["rho"], (lam - w) / (1 + rho)) < 1e-10
    assert relative(rows["lam"], (rho / (1 + rho)).expand(COUNT)) < 1e-10


# Losses that vmap cannot evaluate


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.layer(x.unsqueeze(-1))[0][:, -1]).squeeze(-1)


def of_module(net):
    model = hg.nn.functional(net.double())
    return lambda w, task: ((model(w, task[0]) - task[1]) ** 2).mean(), net


def linear(change):
    net = nn.Linear(3, 1)
    loss, net = of_module(nn.Sequential(net, nn.Flatten(0)))
    return lambda w, task: change(loss(w, task), task), net


def masked(value, task):
    return value + task[0][task[0] > 0].mean() * value


def branching(value, task):
    return 2 * value if value > 0.5 else value


def recorded():
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1), nn.Flatten(0)).double()

    def loss(w, task):
        buffers = {key: x.clone() for key, x in net.named_buffers()}
        return ((torch.func.functional_call(net, {**w, **buffers}, (task[0],)) - task[1]) ** 2).mean()

    return loss, net


WITHOUT_VMAP = {
    "LSTM": lambda: of_module(Recurrent(nn.LSTM)),
    "GRU": lambda: of_module(Recurrent(nn.GRU)),
    "RNN": lambda: of_module(Recurrent(nn.RNN)),
    "item": lambda: linear(lambda value, task: value * task[1].abs().sum().item()),
    "float": lambda: linear(lambda value, task: value * float(task[1].abs().sum())),
    "mask": lambda: linear(masked),
    "if": lambda: linear(branching),
    "batch norm": recorded,
}


@pytest.mark.parametrize("kind", WITHOUT_VMAP)
@every_method
def test_losses_that_vmap_cannot_evaluate_take_one_task_after_the_other(name, kind):
    torch.manual_seed(0)
    loss, net = WITHOUT_VMAP[kind]()
    hparams = dict(net.named_parameters())
    function = lambda w, h, task: loss(w, task)  # noqa: E731
    options = {"inner": meta.biased(function, RHO), "outer": function}
    one = grad(name, hparams, chunk=1, **options)
    truth = flat(one.grads)
    with untouched(list(net.buffers())), nothing_changed(hparams):
        for chunk in (None, 2, COUNT):
            result = grad(name, hparams, chunk=chunk, **options)
            assert relative(flat(result.grads), truth) < 1e-10
            assert result.plan.chunk == 1 and "one by one" in result.plan.reason
        adapted = meta.adapt(options["inner"], hparams, TASKS, steps=3)
    assert adapted.plan.chunk == 1 and relative(flat(adapted.params), flat(one.params)) < 1e-12


def test_an_outer_loss_or_start_that_vmap_cannot_evaluate():
    weighted = lambda w, h, task: outer(w, h, task) * task[1].abs().sum().item()  # noqa: E731
    scaled = lambda h, task: {key: x * task[1].abs().sum().item() for key, x in h.items()}  # noqa: E731
    for options in ({"outer": weighted}, {"start": scaled}):
        one, all_ = (grad("unrolled", start_of(), chunk=chunk, **options) for chunk in (1, None))
        assert relative(flat(all_.grads), flat(one.grads)) < 1e-10
        assert all_.plan.chunk == 1 and "item" in all_.plan.reason


def test_random_numbers_are_those_of_one_task_after_the_other():
    def noisy(w, h, task):
        value = inner(w, h, task) + (nn.functional.dropout(w["a"], 0.5) ** 2).sum()
        return value * (1 if value > 0 else 2)

    grads = []
    for chunk in (1, COUNT):
        torch.manual_seed(3)
        grads.append(flat(grad("unrolled", start_of(), inner=noisy, chunk=chunk).grads))
        grads.append(torch.rand(1))
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])


def test_an_error_of_the_loss_itself_passes_unchanged():
    def wrong(w, h, task):
        raise KeyError("of the loss itself")

    state = torch.get_rng_state()
    for options in ({"inner": wrong}, {"outer": wrong}, {"start": lambda h, task: wrong(h, h, task)}):
        with pytest.raises(KeyError, match="of the loss itself"):
            grad("unrolled", start_of(), chunk=2, **options)
    assert torch.equal(torch.get_rng_state(), state)


# Tasks of different sizes


SIZES = (4, 6, 4, 2, 6)
LISTED = [(draw(n, 3, seed=i), draw(n, seed=10 + i)) for i, n in enumerate(SIZES)]


class Listed(torch.utils.data.Dataset):
    def __init__(self, tasks):
        self.tasks = tasks

    def __len__(self):
        return len(self.tasks)

    def __getitem__(self, i):
        return self.tasks[i]


@every_method
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("form", ["list", "iterator", "loader of tasks", "loader of lists"])
def test_tasks_of_different_sizes(form, chunk, name):
    tasks = {
        "list": lambda: LISTED,
        "iterator": lambda: iter(LISTED),
        "loader of tasks": lambda: DataLoader(Listed(LISTED), batch_size=None),
        "loader of lists": lambda: DataLoader(Listed(LISTED), batch_size=2, collate_fn=list),
    }[form]
    hparams = start_of()
    each = [grad(name, hparams, tasks=(x[None], y[None])) for x, y in LISTED]
    alone = torch.stack([flat(result.grads) for result in each])
    result = grad(name, hparams, tasks=tasks(), chunk=chunk)
    assert relative(flat(result.grads), alone.mean(0)) < 1e-10
    assert relative(result.params["a"], torch.cat([result.params["a"] for result in each])) < 1e-12
    assert relative(result.outer_values, torch.cat([result.outer_values for result in each])) < 1e-12
    assert result.plan.chunk == (2 if chunk is None else chunk)
    rows = grad(name, hparams, tasks=tasks(), chunk=chunk, reduction="none").grads
    assert relative(flat({key: x.movedim(0, -1) for key, x in rows.items()}), alone.T.reshape(-1)) < 1e-10
    adapted = meta.adapt(inner, hparams, tasks(), steps=3, chunk=chunk)
    assert relative(adapted.params["a"], result.params["a"]) < 1e-12


def test_lists_of_tasks_of_one_size_are_batched():
    for tasks in (
        [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
        DataLoader(Listed([{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]), batch_size=2),
    ):
        options = {f.__name__: lambda w, h, t, f=f: f(w, h, (t["x"], t["y"])) for f in (inner_, outer)}
        result = grad("implicit", start_of(), tasks=tasks, inner=options["inner_"], outer=options["outer"])
        assert relative(flat(result.grads), plain("implicit")) < 1e-10
        assert result.plan.chunk == COUNT
    loader = DataLoader(Listed(list(zip(X, Y, strict=True))), batch_size=2)
    for tasks in (loader, next(iter(DataLoader(loader.dataset, batch_size=COUNT))), [X, Y]):
        assert relative(flat(grad("implicit", start_of(), tasks=tasks).grads), plain("implicit")) < 1e-10


def inner_(w, h, task):
    return inner(w, h, task)


def test_a_list_that_may_be_a_batch_or_tasks_is_refused():
    with pytest.raises(ValueError, match="list of tasks or one batch"):
        grad("implicit", start_of(), tasks=[[x, y[:, None]] for x, y in zip(X, Y, strict=True)])


def test_params_of_different_shapes():
    """Params are weights of samples, so that their shapes differ; the result has a list of the params of each task."""
    lam = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = lambda w, h, t: ((w - h * t[1]) ** 2).mean()  # noqa: E731
    result = meta.grad(
        loss, loss, lam, LISTED, method=meta.Unrolled(), steps=2, start=lambda h, t: h * torch.ones_like(t[1])
    )
    assert [len(w) for w in result.params] == list(SIZES)


# Sparse, empty and complex tensors


@every_chunk
@every_method
def test_sparse_gradients(name, chunk):
    places, y = torch.randint(0, 5, (COUNT, 7), generator=torch.Generator().manual_seed(0)), draw(COUNT, 7, 2)
    results = []
    for sparse in (False, True):
        net = nn.Embedding(5, 2, sparse=sparse, _weight=draw(5, 2)).double()
        model = hg.nn.functional(net)
        loss = lambda w, h, t, f=model: ((f(w, t[0]) - t[1]) ** 2).sum()  # noqa: E731
        hparams = dict(net.named_parameters())
        given = {"tasks": (places, y), "inner": meta.biased(loss, RHO), "outer": loss, "chunk": chunk}
        results += [grad(name, hparams, **given).grads["weight"], grad(name, hparams, **given).params["weight"]]
        meta.backward(loss, given["inner"], hparams, given["tasks"], method=METHODS[name], steps=3, chunk=chunk)
        results.append(net.weight.grad)
    for dense, sparse in zip(results[:3], results[3:], strict=True):
        assert sparse.layout is torch.strided and relative(sparse, dense) < 1e-10


@every_method
def test_empty_leaves_and_batches(name):
    """A bias without entries changes nothing; a task without samples gives NaN, and is left out with a warning."""
    hparams = start_of(empty=torch.zeros(0, dtype=torch.float64, requires_grad=True))
    with pytest.warns(hg.HypergradientWarning, match="empty") if name == "none" else nothing_changed(hparams):
        result = grad(name, hparams, inner=meta.biased(lambda w, h, t: fit(w, h, t) + w["empty"].sum(), RHO))
    assert relative(flat(result.grads), plain(name)) < 1e-10 and result.params["empty"].shape == (COUNT, 0)
    with pytest.warns(hg.HypergradientWarning, match=r"1 of 6 tasks \(5\) diverged"):
        result = grad(name, start_of(), tasks=[*LISTED, (X[0, :0], Y[0, :0])])
    assert result.failed == [5]
    for tasks in ([], (X[:0], Y[:0]), iter([])):
        with pytest.raises(ValueError, match=r"no task|no tensor"):
            grad(name, start_of(), tasks=tasks)


@every_method
def test_default_device_and_dtype_of_the_user(name):
    p = start_of()
    try:
        torch.set_default_dtype(torch.float16)
        with default_device("meta"):
            many = [grad(name, p, chunk=chunk) for chunk in (None, 1, 3)]
            rows = grad(name, p, reduction="none").grads
            adapted = meta.adapt(inner, p, TASKS, steps=3)
    finally:
        torch.set_default_dtype(torch.float32)
    for result in many:
        assert relative(flat(result.grads), plain(name)) < 1e-10 and result.statuses
    assert relative(flat({key: x.mean(0) for key, x in rows.items()}), plain(name)) < 1e-10
    assert relative(flat(adapted.params), flat(many[0].params)) < 1e-12


@every_method
def test_complex_hparams_are_refused_with_what_to_do(name):
    lam = torch.tensor([1.0 + 2.0j], requires_grad=True)
    with pytest.raises(TypeError, match="view_as_real"):
        grad(name, lam)


# Losses that do not use their arguments


@pytest.mark.parametrize("name", ["implicit", "unrolled", "first-order"])
@every_chunk
def test_losses_that_do_not_use_their_params(name, chunk):
    net = nn.Linear(3, 1, dtype=torch.float64)
    h = dict(net.named_parameters())
    live = lambda w, h, t: ((net(t[0]).squeeze(-1) - t[1]) ** 2).mean()  # noqa: E731
    right = lambda w, h, t: ((t[0] @ w["weight"][0] + w["bias"] - t[1]) ** 2).mean()  # noqa: E731

    def no_graph(w, h, t):
        with torch.no_grad():
            return right(w, h, t)

    def by_number(w, h, t):
        return right({key: x.detach() for key, x in w.items()}, h, t)

    for wrong in (live, no_graph, by_number):
        with pytest.raises(ValueError, match="outer_loss does not depend on params"):
            grad(name, h, inner=meta.biased(right, RHO), outer=wrong, chunk=chunk)
        with pytest.raises(ValueError, match="inner_loss does not depend on params"):
            grad(name, h, inner=meta.biased(wrong, RHO), outer=right, chunk=chunk)
        with pytest.raises(ValueError, match="inner_loss does not depend on params"):
            meta.adapt(wrong, h, TASKS, steps=2, chunk=chunk)


@pytest.mark.parametrize("name", ["implicit", "unrolled", "first-order", "reptile"])
def test_hparams_that_nothing_depends_on_are_named(name):
    """A learning rate or a strength is read as a number, or the method is FirstOrder, which ignores learning rates."""
    hparams = start_of(rate=torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
    by_number = meta.biased(fit, float(hparams["rate"].detach()), centre=lambda h: {"a": h["a"], "b": h["b"]})
    own = {"start": lambda h, t: {"a": h["a"], "b": h["b"]}, "inner": by_number, "outer": fit}
    with pytest.warns(hg.HypergradientWarning, match=r"hparams\['rate'\]"):
        result = grad(name, hparams, **own)
    assert not result.grads["rate"].any()


@pytest.mark.parametrize("strength", [lambda h: 1.0, "2", None, True])
def test_a_strength_that_is_no_number_is_refused_at_once(strength):
    with pytest.raises(TypeError, match="strength must be a number or a 0-d tensor"):
        hg.meta.biased(lambda w, h, task: w.sum(), strength=strength)
