"""hg.meta against a loop over single tasks in plain torch, with dense Hessians and autograd through the steps."""

from dataclasses import replace

import optree
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hypergrad as hg
from benchmarks.measure import peak_memory
from helpers import nothing_changed, relative, untouched
from hypergrad import meta

COUNT, LR, RHO = 5, 0.1, 4.0
EXACT = hg.solvers.CG(rtol=1e-13, max_steps=300, on_failure="ignore")
METHODS = {
    "implicit": meta.Implicit(solver=EXACT),
    "unrolled": meta.Unrolled(),
    "first-order": meta.FirstOrder(),
    "reptile": meta.Reptile(),
}
RULE = hg.diff_optimizers.SGD(lr=LR)


class Problem:
    """Regression by a small net; λ is its start and the centre of its regulariser; tasks get steeper with i."""

    def __init__(self, tanh=True, batch_norm=False, dtype=torch.float64):
        torch.manual_seed(0)
        self.rho = 2 * RHO if batch_norm else RHO
        middle = nn.BatchNorm1d(4) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(3, 4), middle, nn.Tanh(), nn.Linear(4, 1)).to(dtype)
        self.model = hg.nn.functional(self.net)
        # in optree's order of keys, so that lists of their gradients are flat(...) of the dict
        self.hparams = {name: p.detach().requires_grad_() for name, p in sorted(self.net.named_parameters())}
        scale = torch.linspace(0.2, 2.0, COUNT, dtype=dtype).reshape(-1, 1, 1)
        x, w = torch.randn(COUNT, 12, 3, dtype=dtype), torch.randn(COUNT, 3, 1, dtype=dtype)
        y = scale * torch.sin(x @ w) + 0.1 * torch.randn(COUNT, 12, 1, dtype=dtype)
        self.tasks = {"support": (x[:, :6], y[:, :6]), "query": (x[:, 6:], y[:, 6:])}

    def fit(self, w, h, data):
        x, y = data
        return ((self.model(w, x) - y) ** 2).mean()

    def inner(self, w, h, task):
        return meta.biased(lambda w, h, task: self.fit(w, h, task["support"]), self.rho)(w, h, task)

    def outer(self, w, h, task):  # depends on λ directly as well
        return self.fit(w, h, task["query"]) + 0.1 * sum((p**2).sum() for p in h.values())

    def grad(self, name, steps=4, **options):
        options = {"rule": RULE, "tasks": self.tasks, "hparams": self.hparams} | options
        hparams, tasks = options.pop("hparams"), options.pop("tasks")
        return meta.grad(self.outer, self.inner, hparams, tasks, method=METHODS[name], steps=steps, **options)


def task_of(tasks, i):
    return optree.tree_map(lambda x: x[i], tasks)


def flat(tree):
    return torch.cat([x.reshape(-1) for x in optree.tree_leaves(tree)])


def looped(p, name, i, steps=4, lr=LR):
    """∇fᵢ and w_T of one task in plain torch, as one vector each."""
    h = {key: x.detach().requires_grad_() for key, x in p.hparams.items()}
    keys, task = list(h), task_of(p.tasks, i)
    w = dict(h) if name == "unrolled" else {key: x.detach().requires_grad_() for key, x in h.items()}
    for _ in range(steps):
        g = torch.autograd.grad(p.inner(w, h, task), [w[key] for key in keys], create_graph=True)
        w = {key: w[key] - lr * slope for key, slope in zip(keys, g, strict=True)}
        if name != "unrolled":
            w = {key: x.detach().requires_grad_() for key, x in w.items()}
    end = flat(w).detach()
    if name == "reptile":
        return flat(h).detach() - end, end
    loss = p.outer(w, h, task)
    if name == "unrolled":
        return flat(torch.autograd.grad(loss, list(h.values()))), end
    first = flat(torch.autograd.grad(loss, list(w.values()), retain_graph=True))
    direct = flat(torch.autograd.grad(loss, list(h.values())))
    if name == "first-order":
        return first + direct, end
    slopes = torch.autograd.grad(p.inner(w, h, task), list(w.values()), create_graph=True)
    rows = [torch.autograd.grad(s, [*w.values(), *h.values()], retain_graph=True) for s in flat(slopes)]
    n = len(end)
    jacobian = torch.stack([flat(row) for row in rows])
    v = torch.cholesky_solve(first.unsqueeze(1), torch.linalg.cholesky(jacobian[:, :n])).squeeze(1)
    return direct - jacobian[:, n:].T @ v, end


@pytest.mark.parametrize("chunk", [None, 1, 2, COUNT])
@pytest.mark.parametrize("name", METHODS)
def test_batched_is_looped(name, chunk):
    p = Problem()
    truth, ends = zip(*(looped(p, name, i) for i in range(COUNT)), strict=True)
    with nothing_changed(p.hparams, p.tasks, list(p.net.parameters())):
        result = p.grad(name, chunk=chunk)
    assert list(result.grads) == list(p.hparams)
    assert relative(flat(result.grads), torch.stack(truth).mean(0)) < 1e-10
    for i in range(COUNT):
        assert relative(flat(task_of(result.params, i)), ends[i]) < 1e-12
        loss = p.outer(task_of(result.params, i), p.hparams, task_of(p.tasks, i))
        assert relative(result.outer_values[i], loss.detach()) < 1e-12
    assert not result.failed
    assert set(result.statuses) == {hg.Status.CONVERGED if name == "implicit" else hg.Status.COMPLETED}
    assert result.plan.chunk == (chunk or COUNT)
    if name == "implicit":
        assert result.adjoint_residual.shape == (COUNT,) and float(result.adjoint_residual.max()) < 1e-12
        assert result.inner_residual.shape == result.inner_distance.shape == (COUNT,)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_sum_and_each(name, chunk):
    p = Problem()
    truth = torch.stack([looped(p, name, i)[0] for i in range(COUNT)])
    assert relative(flat(p.grad(name, chunk=chunk, reduction="sum").grads), truth.sum(0)) < 1e-10
    rows = p.grad(name, chunk=chunk, reduction="none").grads
    for i in range(COUNT):
        assert relative(flat(task_of(rows, i)), truth[i]) < 1e-10


# Reptile takes no derivative of the outer loss.
DIVERGING = [
    (name, bad) for name in METHODS for bad in ("diverges", "data", "gradient")[: 2 if name == "reptile" else 3]
]


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize(("name", "bad"), DIVERGING)
def test_a_diverging_task_is_left_out_and_named(name, chunk, bad):
    """The step of task 3 overflows, its data hold NaN, or its loss is finite but its derivative is not."""
    p = Problem()
    good = [0, 1, 2, 4]
    truth = torch.stack([looped(p, name, i)[0] for i in good])
    alone = torch.stack([looped(p, name, i)[1] for i in good])
    tasks = optree.tree_map(torch.clone, p.tasks)
    if bad == "diverges":
        tasks["support"][0][3] *= 1e200
        tasks["support"][1][3] *= 1e200
    elif bad == "data":
        tasks["query"][1][3, 0] = torch.nan
    else:
        tasks["root"] = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
        outer = p.outer
        p.outer = lambda w, h, task: outer(w, h, task) + _root(w, task["root"])
    with pytest.warns(hg.HypergradientWarning, match=r"1 of 5 tasks \(3\) diverged") as record:
        result = p.grad(name, chunk=chunk, tasks=tasks)
    assert len(record) == 1
    assert result.failed == [3] and result.statuses[3] is hg.Status.NON_FINITE
    assert relative(flat(result.grads), truth.mean(0)) < 1e-10
    ends = torch.stack([flat(task_of(result.params, i)) for i in good])
    assert relative(ends, alone) < 1e-12
    with pytest.warns(hg.HypergradientWarning):
        rows = p.grad(name, chunk=chunk, tasks=tasks, reduction="none").grads
    assert not flat(task_of(rows, 3)).any()
    assert relative(torch.stack([flat(task_of(rows, i)) for i in good]), truth) < 1e-10
    with nothing_changed(p.hparams):
        with pytest.raises(meta.TaskError, match=r"1 of 5 tasks \(3\)") as error:
            p.grad(name, chunk=chunk, tasks=tasks, on_failure="raise")
        assert error.value.failed == [3]
        assert p.grad(name, chunk=chunk, tasks=tasks, on_failure="ignore").failed == [3]


def _root(w, a):
    """A function with value 0 whose derivative is finite for a = 1 and infinite for a = 0."""
    return torch.sqrt(a + 0 * w["0.bias"].sum()) - a


def test_all_diverge():
    p = Problem()
    tasks = optree.tree_map(lambda x: x * torch.nan, p.tasks)
    for on_failure in ("warn", "ignore"):
        with pytest.raises(meta.TaskError, match="all 5 tasks diverged") as error:
            p.grad("first-order", tasks=tasks, on_failure=on_failure)
        assert error.value.failed == list(range(COUNT))


@pytest.mark.parametrize("chunk", [1, COUNT])
@pytest.mark.parametrize("name", METHODS)
def test_biased_regularisation_by_its_derivative_is_that_of_its_value(name, chunk):
    """Centres are hparams or a part of them, one or two; strengths are numbers or tensors, of all tasks or of each."""
    p = Problem()
    truth = torch.stack([looped(p, name, i)[0] for i in range(COUNT)])
    half = p.rho / 2
    once = meta.biased(lambda w, h, task: p.fit(w, h, task["support"]), strength=half)
    p.inner = meta.biased(once, torch.tensor(half, dtype=torch.float64), centre=lambda h: h)
    with nothing_changed(p.hparams):
        assert relative(flat(p.grad(name, chunk=chunk, reduction="sum").grads), truth.sum(0)) < 1e-10
    rows = p.grad(name, chunk=chunk, reduction="none").grads
    for i in range(COUNT):
        assert relative(flat(task_of(rows, i)), truth[i]) < 1e-10


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", ["implicit", "unrolled"])
def test_biased_regularisation_around_a_function_of_hparams(name, reduction):
    p = Problem()
    fit = lambda w, h, task: p.fit(w, h, task["support"])  # noqa: E731
    known = meta.biased(fit, p.rho, centre=lambda h: {key: x + 0.1 * h["0.bias"].sum() for key, x in h.items()})
    p.inner = known
    result = p.grad(name, reduction=reduction)
    p.inner = lambda w, h, task: known(w, h, task)
    truth = p.grad(name, reduction=reduction)
    assert relative(flat(result.grads), flat(truth.grads)) < 1e-10


def test_implicit_is_the_closed_form():
    """wᵢ = (XᵀX/n + ρI)⁻¹(Xᵀy/n + ρλ); ∇fᵢ = ρ A⁻¹ ∇E."""
    torch.manual_seed(2)
    x, y = torch.randn(3, 20, 4, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    lam = torch.randn(4, dtype=torch.float64, requires_grad=True)
    inner = meta.biased(lambda w, h, t: ((t[0][:10] @ w - t[1][:10]) ** 2).mean() / 2, RHO)

    def outer(w, h, t):
        return ((t[0][10:] @ w - t[1][10:]) ** 2).mean() / 2

    result = meta.backward(outer, inner, lam, (x, y), method=METHODS["implicit"], steps=400)
    truth = []
    for a, b in zip(x, y, strict=True):
        hessian = a[:10].T @ a[:10] / 10 + RHO * torch.eye(4, dtype=torch.float64)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        w = inverse @ (a[:10].T @ b[:10] / 10 + RHO * lam.detach())
        truth.append(RHO * inverse @ (a[10:].T @ (a[10:] @ w - b[10:]) / 10))
    assert relative(result.grads, torch.stack(truth).mean(0)) < 1e-10
    assert torch.equal(lam.grad, result.grads)
    meta.backward(outer, inner, lam, (x, y), method=METHODS["implicit"], steps=400)
    assert torch.equal(lam.grad, 2 * result.grads)


@pytest.mark.parametrize("name", METHODS)
def test_batch_norm_uses_each_tasks_statistics_and_records_nothing(name):
    p = Problem(batch_norm=True)
    truth = torch.stack([looped(p, name, i)[0] for i in range(COUNT)]).mean(0)
    with untouched(list(p.net.buffers())):
        assert relative(flat(p.grad(name).grads), truth) < 1e-10


def test_buffers_of_each_task():
    p = Problem(batch_norm=True)
    p.net.eval()
    tasks = p.tasks | {
        "buffers": {
            "1.running_mean": torch.randn(COUNT, 4, dtype=torch.float64),
            "1.running_var": torch.rand(COUNT, 4, dtype=torch.float64) + 0.5,
        }
    }

    def inner(w, h, task):
        y = torch.func.functional_call(p.net, {**w, **task["buffers"]}, (task["support"][0],))
        return ((y - task["support"][1]) ** 2).mean()

    together = meta.grad(inner, inner, p.hparams, tasks, method=meta.Unrolled(), steps=3)
    truth = 0
    for i in range(COUNT):
        w = dict(p.hparams)
        for _ in range(3):
            g = torch.autograd.grad(inner(w, None, task_of(tasks, i)), list(w.values()), create_graph=True)
            w = {key: x - LR * s for (key, x), s in zip(w.items(), g, strict=True)}
        truth = truth + flat(torch.autograd.grad(inner(w, None, task_of(tasks, i)), list(p.hparams.values())))
    assert relative(flat(together.grads), truth / COUNT) < 1e-10


@pytest.mark.parametrize("kept", [{"memory": "iterates"}, {"memory": "sqrt"}, {"memory": "sqrt", "checkpoints": 2}])
def test_memory_of_unrolling(kept):
    p = Problem()
    truth = p.grad("unrolled").grads
    method = replace(METHODS["unrolled"], **kept)
    grads = meta.grad(p.outer, p.inner, p.hparams, p.tasks, method=method, steps=4, rule=RULE).grads
    assert relative(flat(grads), flat(truth)) < 1e-12


def test_a_learned_learning_rate():
    """In Meta-SGD one learning rate for each parameter is learned together with the start."""
    p = Problem()
    log_lr = {key: torch.full_like(x, -2.0).requires_grad_() for key, x in p.hparams.items()}
    h = {"start": p.hparams, "log_lr": log_lr}
    lr = lambda h: hg.diff_optimizers.PerLeaf({key: x.exp() for key, x in h["log_lr"].items()})  # noqa: E731
    options = {
        "method": meta.Unrolled(),
        "steps": 3,
        "rule": hg.diff_optimizers.SGD(lr=lr),
        "start": lambda h, task: h["start"],
    }
    loss = lambda w, h, task: p.fit(w, h, task["support"])  # noqa: E731
    result = meta.grad(loss, loss, h, p.tasks, **options)
    truth = 0
    for i in range(COUNT):
        w = dict(h["start"])
        for _ in range(3):
            g = torch.autograd.grad(loss(w, h, task_of(p.tasks, i)), list(w.values()), create_graph=True)
            w = {key: x - log_lr[key].exp() * s for (key, x), s in zip(w.items(), g, strict=True)}
        truth = truth + flat(torch.autograd.grad(loss(w, h, task_of(p.tasks, i)), optree.tree_leaves(h)))
    assert relative(flat(result.grads), truth / COUNT) < 1e-10
    rows = meta.grad(loss, loss, h, p.tasks, reduction="none", **options)
    assert rows.plan.chunk == 1
    assert relative(flat(optree.tree_map(lambda x: x.mean(0), rows.grads)), truth / COUNT) < 1e-10


def test_other_rules():
    p = Problem()
    rule = hg.diff_optimizers.Adam(lr=0.05)
    for name in METHODS:
        together, one = (p.grad(name, rule=rule, chunk=chunk) for chunk in (COUNT, 1))
        assert relative(flat(together.grads), flat(one.grads)) < 1e-10


def test_hparams_from_a_network_and_frozen_leaves():
    p = Problem()
    root = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    keys = list(p.hparams)
    for name in METHODS:
        root.grad = None
        made = {key: root * x.detach() for key, x in p.hparams.items()}
        made[keys[0]] = made[keys[0]].detach()
        rows = [p.grad(name, chunk=chunk, hparams=made).grads for chunk in (COUNT, 2)]
        assert relative(flat(rows[0]), flat(rows[1])) < 1e-10
        assert not rows[0][keys[0]].any()
        meta.backward(p.outer, p.inner, made, p.tasks, method=METHODS[name], steps=4, rule=RULE, chunk=2)
        due = sum((rows[0][key] * p.hparams[key].detach()).sum() for key in keys[1:])
        assert relative(root.grad, due) < 1e-10


def test_adapt():
    p = Problem()
    truth = torch.stack([looped(p, "first-order", i)[1] for i in range(COUNT)])
    for chunk in (None, 1, 2):
        with nothing_changed(p.hparams):
            result = meta.adapt(p.inner, p.hparams, p.tasks, steps=4, rule=RULE, chunk=chunk)
        assert relative(torch.stack([flat(task_of(result.params, i)) for i in range(COUNT)]), truth) < 1e-12
        assert not any(x.requires_grad for x in result.params.values())
    tasks = optree.tree_map(torch.clone, p.tasks)
    tasks["support"][0][[1, 4]] = torch.inf
    with pytest.warns(hg.HypergradientWarning, match=r"2 of 5 tasks \(1, 4\)"):
        assert meta.adapt(p.inner, p.hparams, tasks, steps=4).failed == [1, 4]
    with pytest.raises(meta.TaskError):
        meta.adapt(p.inner, p.hparams, tasks, steps=4, on_failure="raise")


def test_unsolved_systems_are_named():
    p = Problem()
    few = meta.Implicit(solver=hg.solvers.CG(rtol=1e-10, max_steps=1))
    with pytest.warns(hg.HypergradientWarning, match=r"adjoint systems of 5 of 5 tasks .*MAX_STEPS"):
        result = meta.grad(p.outer, p.inner, p.hparams, p.tasks, method=few, steps=300)
    assert set(result.statuses) == {hg.Status.MAX_STEPS}
    strict = replace(few, solver=replace(few.solver, on_failure="raise"))
    with pytest.raises(meta.TaskError, match="adjoint systems"):
        meta.grad(p.outer, p.inner, p.hparams, p.tasks, method=strict, steps=300)
    loose = meta.Implicit(solver=hg.solvers.CG(max_steps=50))
    with pytest.warns(hg.HypergradientWarning, match="inner problems of .* are not solved"):
        meta.grad(p.outer, p.inner, p.hparams, p.tasks, method=loose, steps=0)


def test_the_default_solver_takes_params_that_only_the_outer_loss_uses():
    """The Hessian is then singular, and the part of ∇₁E in its null space has no effect on ∇f."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 8, 4, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    lam = torch.randn(4, dtype=torch.float64, requires_grad=True)
    start = lambda h, task: {"w": h, "shift": torch.zeros(2, dtype=torch.float64)}  # noqa: E731
    inner = lambda w, h, t: ((t[0][:4] @ w["w"] - t[1][:4]) ** 2).mean() + ((w["w"] - h) ** 2).sum() / 2  # noqa: E731
    outer = lambda w, h, t: ((t[0][4:] @ w["w"] - t[1][4:] + w["shift"].sum()) ** 2).mean()  # noqa: E731
    with pytest.warns(hg.HypergradientWarning):
        result = meta.grad(outer, inner, lam, (x, y), method=meta.Implicit(), steps=500, start=start)
    truth = []
    for a, b in zip(x, y, strict=True):
        hessian = a[:4].T @ a[:4] / 2 + torch.eye(4, dtype=torch.float64)
        w = torch.linalg.inv(hessian) @ (a[:4].T @ b[:4] / 2 + lam.detach())
        truth.append(torch.linalg.inv(hessian) @ (a[4:].T @ (a[4:] @ w - b[4:]) / 2))
    assert relative(result.grads, torch.stack(truth).mean(0)) < 1e-6


def test_dropout_is_drawn_for_each_task():
    p = Problem()
    drop = lambda w, h, task: nn.functional.dropout(w.expand(100), 0.5).sum()  # noqa: E731
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    values = meta.grad(drop, drop, w, torch.zeros(8), method=meta.FirstOrder(), steps=0).outer_values
    assert len(set(values.tolist())) > 4 and p is not None


def test_plan():
    p = Problem()
    assert p.grad("implicit").plan.chunk == COUNT
    need = p.grad("implicit").plan.task_bytes
    assert p.grad("implicit", memory=2 * need).plan.chunk == 2
    assert "fit into" in p.grad("implicit", memory=2 * need).plan.reason
    assert p.grad("implicit", memory=1).plan.chunk == 1
    assert p.grad("implicit", memory="0.5MiB").plan.chunk == min(int(2**19 // need), COUNT)
    assert p.grad("implicit", chunk=3).plan == meta.Plan(3, 3, None, "given")
    other = {
        key: torch.cat([x, torch.zeros(5000, *x.shape[1:])]) for key, x in {"support": p.tasks["support"][0]}.items()
    }
    views = p.tasks | {"support": (other["support"][:COUNT], p.tasks["support"][1])}
    assert p.grad("implicit", tasks=views).plan.task_bytes == need  # not the larger memory of which the tasks are views
    big = lambda w, h, task: (w * task).sin().sum()  # noqa: E731
    plan = meta.grad(
        big, big, torch.ones(2**17, requires_grad=True), torch.ones(3, 2**17), method=meta.FirstOrder(), steps=1
    ).plan
    assert plan.chunk == 3
    plan = meta.grad(
        big, big, torch.ones(2**20, requires_grad=True), torch.ones(3, 2**20), method=meta.FirstOrder(), steps=1
    ).plan
    assert plan.chunk == 1 and "loop" in plan.reason


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["implicit", "graph", "iterates", "sqrt", 2, "first-order", "reptile"])
def test_the_budget_is_kept(memory):
    """The allocator's peak stays within the budget, both for nets with large graphs and for nets with large params."""
    kept = {"memory": "sqrt", "checkpoints": 2} if memory == 2 else {"memory": memory}
    method = METHODS.get(memory) or meta.Unrolled(**kept)
    if memory == "implicit":
        method = meta.Implicit(solver=hg.solvers.CG(max_steps=4, on_failure="ignore"))
    for hidden, samples in ((16, 200), (100, 2)):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(20, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )
        model, h = hg.nn.functional(net), dict(net.named_parameters())
        loss = lambda w, h, t, f=model: (f(w, t[0]) - t[1]).square().mean()  # noqa: E731
        options = {"method": method, "steps": 8, "memory": 2**23}
        given = (loss, meta.biased(loss, 1.0), h, (torch.randn(24, samples, 20), torch.randn(24, samples, 1)))
        chosen = meta.grad(*given, **options).plan.chunk
        back = 24 * sum(x.nbytes for x in h.values())  # params of all tasks are returned, whatever the chunk
        assert 1 < chosen <= 24
        assert peak_memory(lambda given=given, options=options: meta.grad(*given, **options)) - back <= 2**23


def test_a_big_outer_loss_is_looped_over_within_the_chunk():
    p = Problem()
    x, y = p.tasks["query"]
    tasks = p.tasks | {"query": (x.repeat(1, 15000, 1), y.repeat(1, 15000, 1))}
    for name in METHODS:
        result = p.grad(name, tasks=tasks)
        assert (result.plan.chunk, result.plan.outer_chunk) == (COUNT, 1)
        assert relative(flat(result.grads), flat(p.grad(name).grads)) < 1e-10
    rows = p.grad("implicit", tasks=tasks, reduction="none").grads
    assert relative(flat(rows), flat(p.grad("implicit", reduction="none").grads)) < 1e-10


def test_float32():
    p, single = Problem(), Problem(dtype=torch.float32)
    single.hparams = {key: x.detach().float().requires_grad_() for key, x in p.hparams.items()}
    single.tasks = optree.tree_map(lambda x: x.float(), p.tasks)
    METHODS["implicit"] = meta.Implicit(solver=hg.solvers.CG(max_steps=10, on_failure="ignore"))
    try:
        for name in METHODS:
            assert relative(flat(single.grad(name).grads).double(), flat(p.grad(name).grads)) < 1e-4
    finally:
        METHODS["implicit"] = meta.Implicit(solver=EXACT)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "maml"}, TypeError, "Implicit.., Unrolled.., FirstOrder.. or Reptile.., got 'maml'"),
        ({"outer_loss": None}, TypeError, "FirstOrder needs an outer_loss"),
        ({"inner_loss": torch.tensor(1.0)}, TypeError, "must be functions"),
        ({"steps": -1}, ValueError, "steps must be a whole number ≥ 0, got -1"),
        ({"rule": torch.optim.SGD}, TypeError, "rule must be an update rule"),
        (
            {
                "rule": hg.diff_optimizers.ProximalGradient(
                    lr=0.1, prox=hg.diff_optimizers.GroupLasso(strength=1.0, dim=None)
                )
            },
            ValueError,
            "GroupLasso",
        ),
        ({"reduction": "max"}, ValueError, "got 'max'"),
        ({"chunk": 0}, ValueError, "chunk must be a whole number ≥ 1"),
        ({"memory": "1 parsec"}, ValueError, "1 parsec"),
        ({"on_failure": "shrug"}, ValueError, "shrug"),
        ({"tasks": {}}, ValueError, "tasks holds no tensor"),
        (
            {"tasks": (torch.zeros(2, 1), torch.zeros(3, 1))},
            ValueError,
            r"tensor 0 has shape \(2, 1\), tensor 1 .*3, 1",
        ),
        ({"tasks": torch.zeros(0, 3)}, ValueError, "no task"),
        ({"hparams": torch.zeros(3)}, ValueError, "none of hparams requires grad"),
        ({"inner_loss": lambda w, h, t: w * t}, ValueError, "inner_loss of one task must give a scalar"),
        ({"inner_loss": lambda w, h, t: (h * t).sum()}, ValueError, "does not depend on params"),
    ],
)
def test_bad_input(options, error, message):
    h = torch.ones(3, requires_grad=True)
    loss = lambda w, h, t: (w * t).sum()  # noqa: E731
    given = {"inner_loss": loss, "outer_loss": loss, "hparams": h, "tasks": torch.ones(2, 3)}
    given |= {"method": meta.FirstOrder(), "steps": 2} | options
    with nothing_changed(h), pytest.raises(error, match=message):
        meta.grad(**given)


def test_more_bad_input():
    h, tasks = torch.ones(3, requires_grad=True), torch.ones(2, 3)
    loss = lambda w, h, t: (w * t).sum()  # noqa: E731
    with pytest.raises(ValueError, match='must be "mean" or "sum"'):
        meta.backward(loss, loss, h, tasks, method=meta.FirstOrder(), steps=1, reduction="none")
    with pytest.raises(ValueError, match="start does not depend on hparams"):
        meta.grad(None, loss, h, tasks, method=meta.Reptile(), steps=1, start=lambda h, t: torch.zeros(3))
    with pytest.raises(ValueError, match=r"implicit gradient, which would be zero: .*biased"):
        square = lambda w, h, t: ((w - t) ** 2).sum()  # noqa: E731
        meta.grad(square, square, h, tasks, method=meta.Implicit(), steps=1)
    with pytest.raises(ValueError, match="meta-gradient would be zero"):
        meta.grad(loss, loss, h, tasks, method=meta.FirstOrder(), steps=1, start=lambda h, t: torch.zeros(3))
    with pytest.raises(ValueError, match="neither step nor outer_loss depends on hparams"):
        meta.grad(loss, loss, h, tasks, method=meta.Unrolled(), steps=1, start=lambda h, t: torch.zeros(3))
    assert meta.grad(None, loss, h, tasks, method=meta.Reptile(), steps=1).outer_values is None


def test_classification_of_images_in_a_loop_and_side_by_side():
    """vmap turns the convolutions of the net into grouped ones; the loop does not."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
    ).double()
    model, h = hg.nn.functional(net), dict(net.named_parameters())
    x, y = torch.randn(3, 8, 1, 6, 6, dtype=torch.float64), torch.randint(0, 4, (3, 8))
    inner = meta.biased(lambda w, h, t: cross_entropy(model(w, t[0][:4]), t[1][:4]), 2.0)
    outer = lambda w, h, t: cross_entropy(model(w, t[0][4:]), t[1][4:])  # noqa: E731
    for method in METHODS.values():
        one, all_ = (meta.grad(outer, inner, h, (x, y), method=method, steps=3, chunk=chunk) for chunk in (1, 3))
        assert relative(flat(all_.grads), flat(one.grads)) < 1e-10
