"""Every public function on other devices: no tensor is made on the wrong one, and all reads of numbers are documented.

`pytest tests/test_devices.py --device cuda` runs the tests on an accelerator too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor, nn

import hypergrad as hg
from devices import Device
from helpers import default_device

S, FP, D = hg.solvers, hg.fixed_points, hg.diff_optimizers
FIXED = {"max_steps": 5, "on_failure": "ignore"}
CG, GMRES, NEUMANN = S.CG(**FIXED), S.GMRES(**FIXED), S.Neumann(**FIXED)


class Data(NamedTuple):
    """The data of three small regressions, with params and hparams."""

    x: Tensor  # [3, 8, 4]
    y: Tensor  # [3, 8]
    w: dict[str, Tensor]
    h: Tensor


def data(move: Callable[[Tensor], Tensor] = lambda x: x) -> Data:
    """The same numbers on any device."""
    draw = torch.Generator("cpu").manual_seed(0)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64, device="cpu")
    w = {"w": normal(4) / 4, "b": normal(()) / 4}
    return Data(
        move(normal(3, 8, 4)), move(normal(3, 8)), {k: move(v) for k, v in w.items()}, move(normal(4)).requires_grad_()
    )


def losses(d: Data) -> tuple[Callable[..., Any], ...]:
    """The inner loss g, the outer loss E and the map Φ."""

    def outer(w, h):
        return (d.x[1] @ w["w"] + w["b"] - d.y[1]).tanh().square().sum()

    def inner(w, h):
        fit = (d.x[0] @ w["w"] + w["b"] - d.y[0]).square().mean() / 2
        return fit + (h.exp() * w["w"].square()).sum() / 2 + w["b"].square() / 4

    def fp_map(w, h):
        slopes = torch.autograd.grad(inner(w, h), [w["w"], w["b"]], create_graph=True)
        return {"w": w["w"] - 0.2 * slopes[0], "b": w["b"] - 0.2 * slopes[1]}

    return inner, outer, fp_map


def numbers(result: hg.Hypergradient) -> list[Any]:
    """All tensors of a hypergradient."""
    s = result.solution
    known = [result.grads, result.adjoint, result.inner_residual, result.inner_distance, result.outer_value]
    return [*known, s.code, s.residual_norm, s.rhs_norm, s.trace, result.relative_error]


# --- implicit ---------------------------------------------------------------------------------------------------------


def implicit(d, solver=CG, form="inner_loss", then=lambda result: result, **options):
    inner, outer, fp_map = losses(d)
    residual = lambda w, h: torch.func.grad(inner)(w, h)  # noqa: E731
    gauss_newton = hg.operators.GaussNewton(
        lambda w, h: d.x[0] @ w["w"] + w["b"],
        lambda z, h: (z - d.y[0]).square().mean() / 2,
        lambda w, h: (h.exp() * w["w"].square()).sum() / 2 + w["b"].square() / 4,
    )
    draws = hg.operators.Stochastic(fp_map, draws=2)
    forms = {"inner_loss": inner, "fp_map": fp_map, "residual": residual, "GaussNewton": gauss_newton, "draws": draws}
    names = {"GaussNewton": "inner_loss", "draws": "fp_map"}
    given = {names.get(form, form): forms[form]}
    return numbers(then(hg.implicit.grad(outer, **given, params=d.w, hparams=d.h, solver=solver, **options)))


def evaluated(d):
    inner, outer, _ = losses(d)
    w = {k: v.detach().requires_grad_() for k, v in d.w.items()}
    result = hg.implicit.backward(outer(w, d.h), inner_loss=inner(w, d.h), params=w, hparams=d.h, solver=CG)
    return d.h.grad, numbers(result)


def sequence(d):
    """Two outer steps that keep solutions by Recycled."""
    kept = S.Recycled()
    return [implicit(d, x0=kept) for _ in range(2)]


def reused(d):
    """Two outer steps that keep a preconditioner by Reused."""
    solver = S.CG(rtol=1e-8, preconditioner=S.Reused(S.Dense()))
    return [implicit(d, solver)[0] for _ in range(2)]


def refined(d):
    return implicit(d, then=partial(hg.implicit.refine, rtol=1e-6))[0]


def batch(d, solver):
    """All three problems, as independent systems."""
    g = lambda w, h: ((d.x @ w.unsqueeze(-1)).squeeze(-1) - d.y).square().sum() + (h.exp() * w.square()).sum()  # noqa: E731
    w = torch.zeros_like(d.x[:, 0])
    outer = lambda w, h: w.tanh().sum()  # noqa: E731
    return numbers(hg.implicit.grad(outer, inner_loss=g, params=w, hparams=d.h, solver=solver, batch_dims=1))


def jacobian(d, solver):
    inner, outer, _ = losses(d)
    both = lambda w, h: torch.stack([outer(w, h), w["w"].sum()])  # noqa: E731
    return numbers(hg.implicit.jacobian(both, inner_loss=inner, params=d.w, hparams=d.h, solver=solver))


def attached(d, entry_point, solver, **options):
    inner, outer, fp_map = losses(d)
    form = {"argmin": inner, "fixed_point": fp_map, "root": fp_map}[entry_point]
    w = getattr(hg.implicit, entry_point)(form, d.w, d.h, solver=solver, **options)
    return torch.autograd.grad(outer(w, d.h), d.h)


def warm(d):
    kept = hg.implicit.WarmStart()
    return [attached(d, "root", GMRES, warm_start=kept) for _ in range(2)]


def decorated(d):
    inner, outer, _ = losses(d)

    @hg.implicit.solver(argmin=inner, solver=CG)
    def fit(h):
        return {k: v.clone() for k, v in d.w.items()}

    (slope,) = torch.autograd.grad(outer(fit(d.h), d.h), d.h, create_graph=True)
    return slope.detach(), torch.autograd.grad(slope.sum(), d.h)


def linear_solve(d):
    a = (d.x[0].mT @ d.x[0]).requires_grad_()
    x = hg.implicit.linear_solve(hg.operators.matrix(a, symmetric=True), d.w["w"], CG)
    return x.detach(), torch.autograd.grad(x.sum(), a)


def transformed(d, entry_point="fixed_point", solver=NEUMANN):
    inner, outer, fp_map = losses(d)
    form = {"argmin": inner, "fixed_point": fp_map}[entry_point]
    f = lambda h: outer(getattr(hg.implicit, entry_point)(form, d.w, h, solver=solver), h)  # noqa: E731
    several = torch.stack([d.h.detach(), d.h.detach() / 2])
    return torch.func.grad(f)(d.h), torch.func.jacrev(torch.func.grad(f))(d.h), torch.vmap(torch.func.grad(f))(several)


# --- HyperTorch -------------------------------------------------------------------------------------------------------


def hypertorch(d, name, **options):
    _, outer, fp_map = losses(d)
    named = lambda w: dict(zip(("w", "b"), w, strict=True))  # noqa: E731
    phi = lambda w, h: [*fp_map(named(w), h[0]).values()]  # noqa: E731
    loss = lambda w, h: outer(named(w), h[0])  # noqa: E731
    params, hparams = [*d.w.values()], [d.h]
    later = lambda w: [x.detach() for x in phi([x.requires_grad_() for x in w], hparams)]  # noqa: E731
    if name == "reverse":
        history = [params, later(params)]
        return hg.reverse([*history, later(history[-1])], hparams, [phi, phi], loss)
    if name == "reverse_unroll":
        return hg.reverse_unroll(phi([x.requires_grad_() for x in params], hparams), hparams, loss)
    if name == "exact":
        return hg.exact(lambda h: [d.w["w"] * h[0], d.w["b"]], hparams, loss)
    if name == "stoch_AID":
        return hg.stoch_AID(params, hparams, loss, 5, 2, 2, phi, stoch_outer=True, stoch_inner=True, verbose=False)
    return getattr(hg, name)(params, hparams, 5, phi, loss, **options)


# --- steps ------------------------------------------------------------------------------------------------------------


def unrolled(d, how, rule=None, **options):
    inner, outer, fp_map = losses(d)
    if rule is None:
        result = how(fp_map, d.w, d.h, outer, 6, **options)
        return result.grads, result.params, result.outer_value
    result = how(rule.on(inner), (d.w, rule.init(d.w)), d.h, lambda s, h: outer(s[0], h), 6, **options)
    return result.grads, result.params[0], result.outer_value


def continued(d):
    _, outer, fp_map = losses(d)
    result = hg.unroll.forward(fp_map, d.w, d.h, outer, 2)
    return hg.unroll.forward(fp_map, result, d.h, outer, 2).grads


def converted(d):
    """torch.optim's rule and state."""
    inner, outer, _ = losses(d)
    w = [d.w["w"].clone().requires_grad_()]
    optimizer = torch.optim.Adam(w, lr=0.1)
    inner({"w": w[0], "b": d.w["b"]}, d.h.detach()).backward()
    with torch.device("cpu"):  # torch 2.6 makes the number of steps on the default device
        optimizer.step()
    twin = D.from_torch(optimizer)
    loss = lambda w, h: inner({"w": w[0], "b": d.w["b"]}, h)  # noqa: E731
    end = lambda s, h: outer({"w": s[0][0], "b": d.w["b"]}, h)  # noqa: E731
    return hg.unroll.reverse(twin.rule.on(loss), (twin.params, twin.state), d.h, end, 3, memory="graph").grads


def meta(d, method, **options):
    loss = hg.meta.biased(lambda w, h, task: (task[0] @ w - task[1]).square().mean() / 2, strength=0.5)
    outer = None if isinstance(method, hg.meta.Reptile) else loss
    given = {"steps": 3, "on_failure": "ignore"} | options
    result = hg.meta.grad(outer, loss, d.h, (d.x, d.y), method=method, **given)
    return result.grads, result.params, result.outer_values


def adapted(d):
    return hg.meta.adapt(lambda w, h, task: (task[0] @ w).square().sum(), d.h, (d.x, d.y), steps=2).params


# --- minibatches ------------------------------------------------------------------------------------------------------


def bilevel(d, make, names=(), on_nonfinite="ignore"):
    """Two steps of both levels, the second of them after the state went through a state_dict."""
    inner, outer, _ = losses(d)
    w = {k: v.clone().requires_grad_() for k, v in d.w.items()}
    f, g = (lambda: outer(w, d.h), lambda: inner(w, d.h))
    optimizers = [torch.optim.SGD([*w.values()], lr=0.1), torch.optim.SGD([d.h], lr=0.1)]
    given = {
        "optimizer": optimizers[0],
        "full": lambda: ([f()], [g()]),
        "period": 2,
        "batches": (2, 2),
        "average": 0.5,
        "recursive": 0.5,
    }
    tracker = make(w, d.h, on_nonfinite=on_nonfinite, **{name: given[name] for name in names})
    for k in range(2):
        tracker.backward(f, g, **({"index": (k, k)} if "batches" in names else {}))
        for each in (*optimizers, tracker):
            each.step()
        for each in optimizers:
            each.zero_grad()
        tracker.load_state_dict(tracker.state_dict())
    return [x.detach() for x in (*w.values(), d.h, *tracker.variables)]


# --- fixed points and layers ------------------------------------------------------------------------------------------


def forward_solver(d, solver):
    s = solver(lambda z: torch.tanh(z @ d.x[0][:4] / 6 + d.x[1]), torch.zeros_like(d.x[1]))
    return s.value, s.code, s.residual_norm, s.trace


class Cell(nn.Module):
    """z ↦ norm(tanh(zW + u))."""

    def __init__(self, weight, norm):
        super().__init__()
        self.weight = nn.Parameter(weight / 6)
        like = {"device": weight.device, "dtype": weight.dtype}
        self.norm = nn.LayerNorm(4, **like) if norm == "layer" else nn.BatchNorm1d(4, **like)

    def forward(self, z, u):
        return self.norm(torch.tanh(z @ self.weight + u)) / 2


def equilibrium(d, forward, backward, norm="layer"):
    cell = Cell(d.x[0][:4], norm)
    layer = hg.nn.Equilibrium(cell, forward=forward, backward=backward, warm_start=True)
    x, found = d.x[1].detach().requires_grad_(), []
    for _ in range(2):
        z = layer(x)
        found.append((z.detach(), torch.autograd.grad(z.square().sum(), [x, *cell.parameters()])))
    return found


def functional(d):
    cell = Cell(d.x[0][:4], "layer")
    solution = {name: p.detach() for name, p in cell.named_parameters()}
    f = hg.nn.functional(cell)
    g = lambda w, h: (f(w, d.x[0], d.x[1]) * h).square().sum() + sum(p.square().sum() for p in w.values())  # noqa: E731
    outer = lambda w, h: f(w, d.x[1], d.x[0]).sum()  # noqa: E731
    return numbers(hg.implicit.grad(outer, inner_loss=g, params=solution, hparams=d.h, solver=CG))


def penalty(d):
    weight = d.x[0][:4] / 6
    layer = hg.nn.Equilibrium(lambda z, u: torch.tanh(z @ weight + u))
    draw = torch.Generator("cpu").manual_seed(0)
    return layer.jacobian_penalty(d.x[1], d.x[2], generator=draw), hg.nn.project_spectral_(weight.clone(), 0.1)


# --- solvers ----------------------------------------------------------------------------------------------------------


def solved(d, solver):
    rows = d.x[0]
    op = hg.operators.matrix(rows.mT @ rows / 8 + torch.diag(d.h.detach().exp()), symmetric=True)
    s = solver(op, d.x[1][0])
    return s.value, s.code, s.residual_norm, s.rhs_norm, s.trace


SOLVERS = {
    "CG": CG,
    "CG, Nystrom": S.CG(preconditioner=S.Nystrom(rank=2), **FIXED),
    "MINRES": S.MINRES(**FIXED),
    "GMRES": S.GMRES(restart=3, **FIXED),
    "BiCGStab": S.BiCGStab(**FIXED),
    "LSQR": S.LSQR(**FIXED),
    "NormalCG": S.NormalCG(**FIXED),
    "FixedPoint": S.FixedPoint(damping=0.1, **FIXED),
    "Neumann": S.Neumann(step_size=0.1, **FIXED),
    "one step": S.FixedPoint(max_steps=1, on_failure="ignore"),
    "Nystrom": S.Nystrom(rank=3, on_failure="ignore"),
    "Auto": S.Auto(**FIXED),
    "Optimizer": S.Optimizer(build=lambda x: torch.optim.SGD(x, lr=0.1), **FIXED),
}

# --- attribution ------------------------------------------------------------------------------------------------------


def influence(d, own=False, grouped=False, gauss_newton=False, **options):
    rows = lambda z, batch: (z - batch[1]).square() / 2  # noqa: E731
    model = lambda w, batch: batch[0] @ w["w"] + w["b"]  # noqa: E731
    loss = lambda w, batch: rows(model(w, batch), batch)  # noqa: E731
    given = {"train_loss": rows, "model": model} if gauss_newton else {"train_loss": loss}
    given |= {"train": [(d.x[0], d.y[0]), (d.x[1], d.y[1])], "params": d.w, "penalty": lambda w: w["w"].square().sum()}
    if own:
        result = hg.influence.self_influence(**given, **options)
    else:
        groups = torch.arange(16, device="cpu") % 3 if grouped else None
        queries = [(d.x[2], d.y[2])]
        result = hg.influence.scores(query_loss=loss, queries=queries, groups=groups, **given, **options)
    return result.scores, result.residual, result.query_losses, result.inner_residual


def through(d):
    """Scores through a training."""

    def step(w, weights):
        value = weights @ (d.x[0] @ w["w"] + w["b"] - d.y[0]).square() / 8
        grads = torch.autograd.grad(value, [w["w"], w["b"]], create_graph=True)
        return {name: x - 0.1 * g for (name, x), g in zip(w.items(), grads, strict=True)}

    loss = lambda w, batch: (batch[0] @ w["w"] + w["b"] - batch[1]).square()  # noqa: E731
    options = {"examples": 8, "queries": [(d.x[2], d.y[2])], "steps": 6}
    result = hg.influence.unrolled(step, d.w, loss, **options)
    return result.scores, result.query_losses


def several_dampings(d):
    rows = d.x[0]
    op = hg.operators.matrix(rows.mT @ rows / 8, symmetric=True)
    found = S.shifted(op, d.x[1][0], [0.1, 1.0], max_steps=3, on_failure="ignore")
    return [(s.value, s.code, s.residual_norm) for s in found]


# --- diagnostics ------------------------------------------------------------------------------------------------------


def checked(d, form="inner_loss"):
    inner, outer, fp_map = losses(d)
    given = {"inner_loss": inner, "fp_map": fp_map}[form]
    result = hg.implicit.grad(outer, **{form: given}, params=d.w, hparams=d.h, solver=GMRES)
    report = hg.diagnostics.check(result, solve=lambda h: d.w)
    e = report.estimate
    return e.error, e.corrected, e.corrected_value, report.structure.eigenvalues, len(report.findings)


def structured(d):
    _, outer, fp_map = losses(d)
    problem = hg.implicit.Problem(outer, params=d.w, hparams=d.h, fp_map=fp_map)
    found, names = hg.diagnostics.structure(problem), hg.diagnostics.findings(problem)
    return found.condition, found.eigenvalues, [each.name for each in names]


# --- all --------------------------------------------------------------------------------------------------------------

ON = {"max_steps": 5}
RULES = {
    **{n: getattr(D, n)(lr=0.1) for n in ("SGD", "Adam", "AdamW", "AMSGrad", "RMSprop", "Adagrad", "Adadelta")},
    **{n: getattr(D, n)(lr=0.1) for n in ("Adamax", "RAdam")},
    "PerStep": D.SGD(lr=lambda h: D.PerStep(h.sigmoid().repeat(2)), momentum=0.5),
    "PerLeaf": D.Adam(lr=D.PerLeaf({"w": 0.1, "b": 0.2})),
    "ElasticNet": D.ProximalGradient(lr=0.1, prox=D.ElasticNet(l1=lambda h: h[0].exp() / 9, l2=0.1)),
    "Box": D.ProximalGradient(lr=0.1, prox=D.Box(lower=-0.1, upper=0.1)),
    "Simplex": D.ProximalGradient(lr=0.1, prox=D.Simplex(), frozen=(0,)),
    "GroupLasso": D.ProximalGradient(lr=0.1, prox=D.GroupLasso(strength=0.1), frozen=(0,)),
}
TRACKERS = {"SOBA": ("average", "recursive"), "AmIGO": (), "SABA": ("batches",), "F2SA": (), "BOME": ()}
TRACKERS |= {"SAMA": ("optimizer",), "SRBA": ("full", "period")}
METHODS = {
    "Implicit": hg.meta.Implicit(solver=CG),
    "Unrolled": hg.meta.Unrolled(memory="graph"),
    "FirstOrder": hg.meta.FirstOrder(),
    "Reptile": hg.meta.Reptile(),
}
reverse, forward = partial(unrolled, how=hg.unroll.reverse), partial(unrolled, how=hg.unroll.forward)

# name: (call, number of reads by its documentation; None if it depends on the numbers)
ENTRY_POINTS: dict[str, tuple[Callable[[Data], Any], int | None]] = {
    "grad": (implicit, 0),
    "grad, fp_map": (partial(implicit, form="fp_map", solver=GMRES), 0),
    "grad, residual": (partial(implicit, form="residual", solver=GMRES), 0),
    "grad, GaussNewton": (partial(implicit, form="GaussNewton"), 0),
    "grad, draws": (partial(implicit, form="draws", solver=S.Optimizer(**FIXED)), 0),
    "grad, recorded": (partial(implicit, compile=True), 0),
    "grad, batch": (partial(batch, solver=CG), 0),
    "grad, sequence": (sequence, 0),
    "grad, Reused": (reused, None),
    "grad, Dense": (partial(implicit, solver=S.Dense(on_failure="ignore")), 1),
    "grad, default": (partial(implicit, solver=None), None),
    "backward": (evaluated, 0),
    "jacobian, BlockCG": (partial(jacobian, solver=S.BlockCG(**FIXED)), 0),
    "jacobian, GMRES": (partial(jacobian, solver=GMRES), 0),
    "polish": (partial(implicit, then=partial(hg.implicit.polish, solver=CG)), 0),
    "refine": (refined, None),
    "argmin": (partial(attached, entry_point="argmin", solver=CG), 0),
    "fixed_point": (partial(attached, entry_point="fixed_point", solver=NEUMANN), 0),
    "root": (partial(attached, entry_point="root", solver=GMRES), 0),
    "root, warm start": (warm, 0),
    "solver": (decorated, 0),
    "linear_solve": (linear_solve, 0),
    "torch.func": (transformed, 0),
    "torch.func, argmin": (partial(transformed, entry_point="argmin", solver=CG), 0),
    **{f"solvers.{name}": (partial(solved, solver=solver), 0) for name, solver in SOLVERS.items()},
    "solvers.Dense": (partial(solved, solver=S.Dense(on_failure="ignore")), 2),
    **{f"hg.{n}": (partial(hypertorch, name=n), None) for n in ("fixed_point", "neumann", "CG", "CG_normaleq")},
    "hg.stoch_AID": (partial(hypertorch, name="stoch_AID"), None),
    **{f"hg.{n}": (partial(hypertorch, name=n), 1) for n in ("reverse", "reverse_unroll", "exact")},
    "reverse, graph": (partial(reverse, memory="graph"), 1),
    "reverse, iterates": (partial(reverse, memory="iterates"), 1 + 5 * 2),
    "reverse, sqrt": (partial(reverse, memory="sqrt"), 1 + 2 * 2),
    "reverse, budget": (partial(reverse, memory="1MB"), 1),
    "reverse, checkpoints": (partial(reverse, checkpoints=2), 1 + 5 * 2),
    "reverse, from_torch": (converted, 1),
    "forward": (forward, 1 + 1 + 4 * 2),
    "forward, continued": (continued, None),
    **{f"rules.{name}": (partial(reverse, memory="graph", rule=rule), 1) for name, rule in RULES.items()},
    "rules.FISTA": (partial(reverse, memory="graph", rule=D.FISTA(lr=0.1, prox=D.L1(strength=0.1))), 1 + 6 * 2),
    **{f"meta.{n}": (partial(meta, method=m), 3 if n in ("Implicit", "Unrolled") else 2) for n, m in METHODS.items()},
    **{f"bilevel.{n}": (partial(bilevel, make=getattr(hg.bilevel, n), names=o), 0) for n, o in TRACKERS.items()},
    "bilevel.SOBA, raise": (partial(bilevel, make=hg.bilevel.SOBA, on_nonfinite="raise"), 2),
    "meta.adapt": (adapted, None),
    "Picard": (partial(forward_solver, solver=FP.Picard(**FIXED)), 0),
    "Anderson": (partial(forward_solver, solver=FP.Anderson(**FIXED)), 0),
    "Broyden": (partial(forward_solver, solver=FP.Broyden(**FIXED)), 0),
    "Newton": (partial(forward_solver, solver=FP.Newton(solver=GMRES, **FIXED)), 0),
    "Anderson, to a tolerance": (partial(forward_solver, solver=FP.Anderson(rtol=1e-8)), None),
    "Equilibrium": (partial(equilibrium, forward=FP.Picard(**FIXED), backward=NEUMANN), 0),
    "Equilibrium, BatchNorm": (partial(equilibrium, forward=FP.Anderson(**FIXED), backward=GMRES, norm="batch"), 0),
    "Equilibrium, penalty": (penalty, None),
    "functional": (functional, 0),
    "influence.scores": (partial(influence, solver=CG), None),
    "influence.scores, groups": (partial(influence, grouped=True, gauss_newton=True), None),
    "influence.scores, path": (partial(influence, damping="path"), None),
    "influence.self_influence": (partial(influence, own=True), None),
    "influence.unrolled": (through, None),
    "solvers.shifted": (several_dampings, None),
    "diagnostics, inner_loss": (checked, None),
    "diagnostics, fp_map": (partial(checked, form="fp_map"), None),
    "structure, findings": (structured, None),
}
SILENT = [name for name, (_, count) in ENTRY_POINTS.items() if count == 0]
quiet = pytest.mark.filterwarnings("ignore::hypergrad.HypergradientWarning")


def compare(found: Any, due: Any, tolerance: float) -> None:
    """The same numbers in the same structure."""
    left, right = optree.tree_leaves(found), optree.tree_leaves(due)
    for a, b in zip(left, right, strict=True):
        if isinstance(b, (Tensor, float)):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)
        else:
            assert a == b


@quiet
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_another_device_gives_the_results_of_the_cpu_with_the_documented_reads(entry_point, device):
    run, reads = ENTRY_POINTS[entry_point]
    due, kind = run(data()), "meta" if device.type == "cpu" else device.type
    with Device(kind) as counted:
        found = run(data(counted.on_meta if kind == "meta" else lambda x: x.to(device)))
    if reads is not None:
        assert counted.reads == reads
    for leaf in optree.tree_leaves(found):
        assert not isinstance(leaf, Tensor) or leaf.device.type == kind
    found = optree.tree_map(lambda x: counted.on_cpu(x).cpu() if isinstance(x, Tensor) else x, found)
    compare(found, due, 1e-9 if reads is not None else 1e-5)  # tolerances are checked at every fifth step


@pytest.mark.parametrize(
    ("run", "most"),
    [
        (partial(implicit, solver=S.CG(max_steps=5)), 6),
        (partial(implicit, solver=S.GMRES(max_steps=5), form="fp_map"), 6),
        (partial(jacobian, solver=S.BlockCG(max_steps=5)), 6),
        (partial(attached, entry_point="argmin", solver=S.CG(max_steps=5)), 4),
        (partial(attached, entry_point="fixed_point", solver=S.GMRES(max_steps=5)), 3),
    ],
)
def test_the_checks_behind_warnings_read_few_numbers(run, most, device):
    """The test is at a solution, where no warning is due."""
    kind = "meta" if device.type == "cpu" else device.type
    with Device(kind) as counted:
        d = data(counted.on_meta if kind == "meta" else lambda x: x.to(device))
        for _ in range(300):
            w = {k: v.detach().requires_grad_() for k, v in d.w.items()}
            d = d._replace(w={k: v.detach() for k, v in losses(d)[2](w, d.h).items()})
        counted.reads = 0
        run(d)
    assert 0 < counted.reads <= most


@quiet
@pytest.mark.parametrize("entry_point", SILENT)
def test_calls_without_reads_run_on_the_meta_device(entry_point):
    """torch.compile and the capture of graphs need calls without reads."""
    run = ENTRY_POINTS[entry_point][0]
    due, found = run(data()), run(data(lambda x: x.to("meta")))
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(due), strict=True):
        if isinstance(b, Tensor):
            assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


@quiet
@pytest.mark.parametrize("default", ["meta", torch.float16])
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_default_device_and_dtype_do_not_matter(entry_point, default):
    """A tensor made on this default device, which holds no numbers, would raise an error or lose its numbers.

    Results are compared to 1e-9, because the position of tensors in memory decides the last digit of a matrix product.
    """
    run, dtype = ENTRY_POINTS[entry_point][0], torch.get_default_dtype()
    due = run(data())
    try:
        with default_device("meta" if default == "meta" else None):
            torch.set_default_dtype(dtype if default == "meta" else default)
            found = run(data())
    finally:
        torch.set_default_dtype(dtype)
    compare(found, due, 1e-9)
