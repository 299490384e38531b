"""Random calls of the public functions against dense NumPy in float64: each answer is right, or an error or a warning
says that it may be wrong.

FUZZ=5000 pytest tests/test_fuzz.py makes 5000 calls; without FUZZ the suite makes a few hundred.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import optree
import pytest
import torch

import hypergrad as hg
from fuzz_cases import Case, numbers

S, FP = hg.solvers, hg.fixed_points
CALLS = int(os.environ.get("FUZZ", "420"))
BATCH = 70
FORMS = ("inner_loss", "fp_map", "residual")
SOLVERS = {
    "default": lambda rtol: None,
    "Auto": lambda rtol: S.Auto(rtol=rtol),
    "CG": lambda rtol: S.CG(rtol=rtol),
    "CG, K": lambda rtol: S.CG(max_steps=12),
    "MINRES": lambda rtol: S.MINRES(rtol=rtol),
    "MINRES, K": lambda rtol: S.MINRES(max_steps=12),
    "GMRES": lambda rtol: S.GMRES(rtol=rtol),
    "GMRES, K": lambda rtol: S.GMRES(max_steps=6),
    "BiCGStab": lambda rtol: S.BiCGStab(rtol=rtol),
    "NormalCG": lambda rtol: S.NormalCG(rtol=rtol),
    "LSQR": lambda rtol: S.LSQR(rtol=rtol),
    "Dense": lambda rtol: S.Dense(),
    "FixedPoint": lambda rtol: S.FixedPoint(rtol=rtol),
    "Neumann, K": lambda rtol: S.Neumann(max_steps=8),
    "Nystrom": lambda rtol: S.Nystrom(rank=2),
    "FixedPoint, K": lambda rtol: S.FixedPoint(max_steps=1),
}
SYMMETRIC = ("CG", "CG, K", "MINRES", "MINRES, K", "Nystrom")
EXACT = ("Auto", "CG", "MINRES", "GMRES", "BiCGStab", "NormalCG", "LSQR", "Dense")


@dataclass
class Answer:
    """The result of a call.

    Attributes:
        pairs: (value, truth); truth is None if it is not determined, so that the call must not report success.
        label: what was called, for the failure report.
        near: relative error that few steps may leave without a warning, because error estimates are no better.
        power: power of the condition number in the error that rounding explains.
        size: the norm to which rounding errors are relative; None for `Case.size`.
        floor: absolute error that is allowed in any case.
        ok: whether the result says that it succeeded.
    """

    pairs: list[tuple[np.ndarray, np.ndarray | None]]
    label: str
    near: float = 0.0
    power: int = 1
    size: float | None = None
    floor: float = 0.0
    ok: bool = True


def chosen(case: Case, names=tuple(SOLVERS), symmetric: bool | None = None):
    """The name of a random solver that can solve the problem, and the solver."""
    name = case.pick(names)
    while name in SYMMETRIC and not (case.symmetric if symmetric is None else symmetric):
        name = case.pick(names)
    return name, SOLVERS[name](1e-10 if case.dtype is torch.float64 else 1e-5)


def near(case: Case, name: str, power: int = 1) -> float:
    """The relative error that few steps or a loose tolerance may leave without a warning; 0 for other solvers."""
    few = name.endswith("K") or name in ("Nystrom", "default")
    return min(1.0, max(0.35, 0.1 * case.condition**power)) if few else 0.0


def implicit_options(case: Case):
    """Options of implicit.grad, backward and jacobian, with the name of the solver."""
    case.freeze()
    forms, outer = case.functions()
    form = case.pick(FORMS)
    symmetric = case.symmetric
    name, solver = chosen(case, symmetric=True if form == "inner_loss" else symmetric)
    x0 = case.pick(("none", "none", "none", "wrong", "nan", "huge"))
    start = None
    if x0 != "none":
        value = {"wrong": case.random.randn(case.n), "nan": np.full(case.n, np.nan), "huge": np.full(case.n, 1e30)}[x0]
        start = case.tree(value)
    if form == "inner_loss" and not case.symmetric:
        case.a = (case.a + case.a.T) / 2
        case.c = case.a @ case.w - case.b @ (case.lam + case.lam**2 / 2)
        forms, outer = case.functions()
    declared = form != "inner_loss" and symmetric and (name in SYMMETRIC or case.pick((True, False)))
    options = {form: forms[form], "solver": solver, "x0": start, "symmetric": declared}
    return outer, options, f"{form}; {name}; x0 {x0}"


def call_grad(case: Case) -> Answer:
    outer, options, name = implicit_options(case)
    lam = case.hparams()
    options["compile"] = case.pick((False, False, True))
    result = hg.implicit.grad(outer, params=case.tree(case.w), hparams=lam, **options)
    name += f"; compile={options['compile']}"
    return implicit_answer(case, numbers(result.grads), result, name)


def implicit_answer(case: Case, value, result, name: str) -> Answer:
    solver = name.split("; ")[1]
    allowed = near(case, solver)
    case.slack = np.inf if allowed else 1e-4
    truth = case.first(shift=S.Nystrom().damping if solver == "Nystrom" else 0.0)
    return Answer([(value, truth)], f"{name}: {result.solution.message}", near=allowed, ok=result.solution.ok)


def call_backward(case: Case) -> Answer:
    outer, options, name = implicit_options(case)
    lam = case.hparams()
    leaves = lam if isinstance(lam, list) else [lam]
    for x in leaves:
        if x.requires_grad:
            x.grad = torch.ones_like(x)
    params = case.tree(case.w)
    if case.pick((True, False)):  # evaluated losses
        for leaf in optree.tree_leaves(params)[int(case.container == "frozen") :]:
            leaf.requires_grad_()
        form = name.split("; ")[0]
        outer, options[form] = outer(params, lam), options[form](params, lam)
        name += "; evaluated"
    result = hg.implicit.backward(outer, params=params, hparams=lam, **options)
    grads = [x.grad - 1 if x.requires_grad else torch.zeros_like(x) for x in leaves]
    answer = implicit_answer(case, numbers(grads), result, name)
    answer.floor = 1e-15 if case.dtype is torch.float64 else 1e-6  # rounding of the sum with a .grad of ones
    return answer


def call_jacobian(case: Case) -> Answer:
    outer, options, name = implicit_options(case)
    options["x0"] = None
    direction = case.random.randn(case.n)
    if not case.determined(direction):
        direction = case.a.T @ direction
    d = case.tensor(direction)
    losses = lambda tree, lam: torch.stack([outer(tree, lam), d @ case.flat(tree)])  # noqa: E731
    if case.pick((True, False)):
        options["solver"] = None
        name = f"{name.split('; ')[0]}; default; "
    result = hg.implicit.jacobian(losses, params=case.tree(case.w), hparams=case.hparams(), **options)
    leaves = result.grads if isinstance(result.grads, list) else [result.grads]
    answer = implicit_answer(case, numbers([x[0] for x in leaves]), result, name)
    row = case.jacobian(case.lam, S.Nystrom().damping if "Nystrom" in name else 0.0).T @ direction * case.learned
    one = answer.pairs[0][1]
    answer.pairs.append((numbers([x[1] for x in leaves]), None if one is None else row))
    return answer


def implicit_function(case: Case):
    """λ ↦ w(λ) by one of the five differentiable solution maps, with its name and whether it takes few steps."""
    kind = case.pick(("root", "fixed_point", "argmin", "linear_solve", "solver"))
    if kind == "argmin" and not case.symmetric:
        kind = "root"
    names = EXACT if kind != "linear_solve" else tuple(x for x in EXACT if x != "Auto")
    name, solver = chosen(case, names)
    if case.container == "frozen":
        case.container = "list"
    forms, _ = case.functions()
    symmetric = name in SYMMETRIC
    a, b, c = map(case.tensor, (case.a, case.b, case.c))

    def w_of(lam):
        """The solution without a graph."""
        with torch.no_grad():
            r = b @ (lam + lam**2 / 2 - case.tensor(case.lam + case.lam**2 / 2))
            w = case.tensor(case.w) + case.tensor(case.inverse()) @ r
        return case.like(template, w)

    template = case.tree(case.w)
    if kind == "root":
        call = lambda lam: hg.implicit.root(forms["residual"], w_of(lam), lam, solver=solver, symmetric=symmetric)  # noqa: E731
    elif kind == "fixed_point":
        call = lambda lam: hg.implicit.fixed_point(forms["fp_map"], w_of(lam), lam, solver=solver, symmetric=symmetric)  # noqa: E731
    elif kind == "argmin":
        call = lambda lam: hg.implicit.argmin(forms["inner_loss"], w_of(lam), lam, solver=solver)  # noqa: E731
    elif kind == "solver":
        call = hg.implicit.solver(residual=forms["residual"], solver=solver, symmetric=symmetric)(w_of)
    else:

        def call(lam):
            rho = 2 / (2 + lam @ lam)
            op = hg.operators.matrix(rho * a, symmetric=symmetric)
            return hg.implicit.linear_solve(op, rho * (b @ (lam + lam**2 / 2) + c), solver)

        case.container = "tensor"
    return call, f"{kind}, {name}"


def call_functions(case: Case) -> Answer:
    case.outer_container = "tensor"
    case.learned[:] = True
    call, name = implicit_function(case)
    w0, d = case.tensor(case.w), case.tensor(case.d)
    linear = name.startswith("linear") and case.spectrum in ("singular", "zero", "inconsistent", "tiny")
    f = lambda lam: ((case.flat(call(lam)) - w0 - d) ** 2).sum() / 2 + (lam**2).sum() / 2  # noqa: E731
    way = case.pick(("grad", "func.grad", "jacfwd", "hessian", "twice", "jacrev(jacrev)", "vmap", "vmap(hessian)"))
    lam = case.tensor(case.lam)
    lams = np.stack([case.lam, case.lam + 0.1, case.lam - 0.2])
    case.slack = np.inf if way == "jacfwd" else 1e-6  # Aẇ = −∂₂F has a solution in any case
    truth1, truth2 = case.first(), case.second()
    if linear:  # the solution itself is the least one, not the case's w; of 1e-12 A rounding decides it
        return Answer([], f"{name}, {f(lam)}")
    if way in ("grad", "twice"):
        lam.requires_grad_()
        (g,) = torch.autograd.grad(f(lam), lam, create_graph=way == "twice")
        if way == "grad":
            return Answer([(numbers(g), truth1)], f"{name}, {way}")
        (h,) = torch.autograd.grad(g.sum(), lam)
        row = None if truth2 is None else truth2.sum(0)
        return Answer([(numbers(g), truth1), (numbers(h), row)], f"{name}, {way}", power=2)
    if way == "vmap":
        value = torch.func.vmap(torch.func.grad(f))(case.tensor(lams))
        truths = [case.first(x) for x in lams]
        truth = None if any(x is None for x in truths) else np.concatenate(truths)
        return Answer([(numbers(value), truth)], f"{name}, {way}")
    if way == "vmap(hessian)":
        value = torch.func.vmap(torch.func.hessian(f))(case.tensor(lams[:1]))
        pairs = [(numbers(value), None if truth2 is None else truth2.reshape(-1))]
        return Answer(pairs, f"{name}, {way}", power=2)
    transform = {
        "func.grad": torch.func.grad,
        "jacfwd": torch.func.jacfwd,
        "hessian": torch.func.hessian,
        "jacrev(jacrev)": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    }[way]
    value = numbers(transform(f)(lam))
    second = way in ("hessian", "jacrev(jacrev)")
    truth = truth2 if second else truth1
    floor = 0.0
    if name.startswith("fixed_point") and truth is not None:  # I − ∂₁Φ is known up to the rounding of I
        eps = torch.finfo(torch.float32 if case.container == "mixed" else case.dtype).eps
        floor = 10 * eps * np.linalg.norm(case.inverse()) * np.linalg.norm(truth)
    pairs = [(value, None if truth is None else truth.reshape(-1))]
    return Answer(pairs, f"{name}, {way}", power=1 + second, floor=floor)


def call_hypertorch(case: Case) -> Answer:
    case.container = case.pick(("list", "scalars", "empty", "mixed"))
    if case.outer_container in ("tensor", "strided"):
        case.outer_container = "list"
    forms, outer = case.functions()
    name = case.pick(("CG", "fixed_point", "neumann", "CG_normaleq", "stoch_AID"))
    if name == "CG" and not case.symmetric:
        name = "CG_normaleq"
    steps = case.pick((1, 2, 5, 20, 100, 1000))
    lam, w = case.hparams(), case.tree(case.w)
    if name == "stoch_AID":
        options = case.pick(({"fp_map": forms["fp_map"]}, {"residual": 0, "inner_loss": forms["inner_loss"]}))
        if options.pop("residual", None) == 0 and not case.symmetric:
            options = {"fp_map": forms["fp_map"]}
        value = hg.hypergradients.stoch_AID(w, lam, outer, steps, verbose=False, **options)[0]
    else:
        value = getattr(hg.hypergradients, name)(w, lam, steps, forms["fp_map"], outer)
    case.slack = np.inf
    power = 2 if name == "CG_normaleq" else 1
    return Answer([(numbers(value), case.first())], f"{name}, K={steps}", near=near(case, "K", power))


@dataclass
class Descent:
    """w ← w − η ρ (A w − r), with its derivatives in λ by recursion, and a bound of what rounding is relative to."""

    case: Case
    lr: float
    steps: int
    w0: np.ndarray

    def run(self, first: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
        """w_T, dw_T/dλ (from step `first` on), and the size of the latter's terms."""
        case, lam = self.case, self.case.lam
        w, z = self.w0, np.zeros((case.n, case.m))
        rho, norm = case.rho(lam), np.linalg.norm
        drho = -(rho**2) * lam
        step = np.eye(case.n) - self.lr * rho * case.a
        size, length = 0.0, norm(w)
        for t in range(self.steps):
            f = case.a @ w - case.rhs(lam)
            if t >= first:
                z = step @ z + self.lr * rho * case.b @ np.diag(1 + lam) - self.lr * np.outer(f, drho)
                terms = norm(case.a, 2) * length + norm(case.rhs(lam))
                size = norm(step, 2) * size + self.lr * (norm(case.b) * norm(1 + lam) + terms * norm(drho))
            w = w - self.lr * rho * f
            length = norm(step, 2) * length + self.lr * norm(case.rhs(lam))
        return w, z, size

    def torch_step(self):
        residual = self.case.functions()[0]["residual"]
        case = self.case
        return lambda tree, lam: case.like(tree, case.flat(tree) - self.lr * case.flat(residual(tree, lam)))


def descent(case: Case) -> Descent:
    case.container = case.pick(
        tuple(x for x in ("tensor", "list", "dict", "ordered", "named", "strided", "mixed", "empty"))
    )
    return Descent(case, case.pick((0.1, 0.5, 1.0)), case.pick((0, 1, 2, 7, 20)), case.random.randn(case.n))


def unrolled_answer(case: Case, d: Descent, value, name: str, first: int = 0) -> Answer:
    with np.errstate(all="ignore"):
        w, z, size = d.run(first)
        slope = case.slope(w)
        slope = slope if z.any() else np.zeros(case.n)
        truth = (case.lam + z.T @ slope) * case.learned if np.isfinite(slope).all() else None
        bound = size * np.linalg.norm([*w, *case.w, *case.d]) + np.linalg.norm(case.lam)
    return Answer([(value, truth)], f"{name}, lr={d.lr}, T={d.steps}", power=0, size=bound)


def call_reverse(case: Case) -> Answer:
    d = descent(case)
    _, outer = case.functions()
    memory = case.pick(("graph", "iterates", "sqrt", "64KiB", "1MiB", "checkpoints"))
    truncate = case.pick((None, None, None, 0, 1, 3))
    options = {"checkpoints": case.pick((1, 2, 3))} if memory == "checkpoints" else {"memory": memory}
    result = hg.unroll.reverse(
        d.torch_step(), case.tree(d.w0), case.hparams(), outer, d.steps, truncate=truncate, **options
    )
    first = 0 if truncate is None else max(d.steps - truncate, 0)
    return unrolled_answer(case, d, numbers(result.grads), f"{memory}, truncate={truncate}", first)


def call_forward(case: Case) -> Answer:
    d = descent(case)
    _, outer = case.functions()
    chunk = case.pick((None, 1, 2))
    result = hg.unroll.forward(d.torch_step(), case.tree(d.w0), case.hparams(), outer, d.steps, chunk=chunk)
    if case.pick((True, False)):  # go on
        more = case.pick((0, 1, 3))
        result = hg.unroll.forward(d.torch_step(), result, case.hparams(), outer, more)
        d.steps += more
    return unrolled_answer(case, d, numbers(result.grads), f"chunk={chunk}")


def call_history(case: Case) -> Answer:
    """HyperTorch's reverse, reverse_unroll and exact."""
    d, case.slack = descent(case), np.inf
    case.container = case.pick(("list", "empty", "scalars"))
    if case.outer_container in ("tensor", "strided"):
        case.outer_container = "list"
    _, outer = case.functions()
    name, step, lam = case.pick(("reverse", "reverse_unroll", "exact")), d.torch_step(), case.hparams()
    if name == "exact":
        a, w, b = case.tensor(case.inverse()), case.tensor(case.w), case.tensor(case.b)
        at = case.tensor(case.lam)

        def solution(h):
            x = case.outer_flat(h)
            return case.like(case.tree(case.w), w + a @ (b @ (x + x**2 / 2 - (at + at**2 / 2))))

        return Answer([(numbers(hg.hypergradients.exact(solution, lam, outer)), case.first())], name)
    history = [case.tree(d.w0)]
    for _ in range(d.steps):
        history.append(step(history[-1], lam))
    if name == "reverse_unroll":
        value = hg.hypergradients.reverse_unroll(history[-1], lam, outer)
    else:
        value = hg.hypergradients.reverse(history, lam, [step] * d.steps, outer)
    return unrolled_answer(case, d, numbers(value), name)


def call_meta(case: Case) -> Answer:
    """Tasks that differ in c, t and w₀; w₀ is w₀ᵢ (1 + Σλ) but for Implicit, which starts at the solution."""
    method = case.pick(("Implicit", "Unrolled", "FirstOrder", "Reptile"))
    reduction, count = case.pick(("mean", "sum")), case.random.randint(1, 4)
    chunk = case.pick((None, 1, 2))
    case.container = case.pick(("tensor", "list", "dict", "ordered", "named"))
    lr, steps = case.pick((0.1, 0.5)), 0 if method == "Implicit" else case.random.randint(0, 4)
    if not case.symmetric:
        case.a = (case.a + case.a.T) / 2
    cases, starts = [], []
    for i in range(count):
        other = Case(0)
        other.__dict__.update(case.__dict__)
        other.w = case.random.randn(case.n)
        other.c = case.a @ other.w - case.b @ (case.lam + case.lam**2 / 2)
        other.d = case.d if i == 0 else case.a.T @ case.random.randn(case.n)
        cases.append(other)
        starts.append(other.w if method == "Implicit" else case.random.randn(case.n))
    total = 1 + case.lam.sum()
    truths, bound = [], 0.0
    name, rule = "default", hg.diff_optimizers.SGD(lr=lr)
    for other, w0 in zip(cases, starts, strict=True):
        truth, size = task_truth(
            other, method, Descent(other, lr, steps, w0 if method == "Implicit" else w0 * total), w0
        )
        truths.append(truth)
        bound += size
    a, b = case.tensor(case.a), case.tensor(case.b)

    def inner(tree, lam, task):
        w, lam = case.flat(tree), case.outer_flat(lam)
        return 2 / (2 + lam @ lam) * (w @ (a @ w) / 2 - w @ (b @ (lam + lam**2 / 2) + task["c"]))

    def outer(tree, lam, task):
        return ((case.flat(tree) - task["w"] - task["d"]) ** 2).sum() / 2 + (case.outer_flat(lam) ** 2).sum() / 2

    def start(lam, task):
        factor = 1.0 if method == "Implicit" else 1 + case.outer_flat(lam).sum()
        return case.like(template, task["w0"] * factor)

    template = case.tree(case.w)
    tasks = {"c": [x.c for x in cases], "d": [x.d for x in cases], "w": [x.w for x in cases], "w0": starts}
    tasks = {name: case.tensor(np.stack(x)) for name, x in tasks.items()}
    made = getattr(hg.meta, method)()
    if method == "Implicit":
        name, solver = chosen(case, (*EXACT, "default"))
        made = hg.meta.Implicit() if solver is None else hg.meta.Implicit(solver=solver)
    lam = case.hparams()
    call = hg.meta.grad
    if case.pick((True, False)):
        call = hg.meta.backward
    result = call(
        outer, inner, lam, tasks, method=made, steps=steps, rule=rule, start=start, reduction=reduction, chunk=chunk
    )
    truth = None if any(x is None for x in truths) else sum(truths) / (count if reduction == "mean" else 1)
    label = f"{method}, {name}, {reduction}, {count} tasks, chunk={chunk}, T={steps}, lr={lr}"
    implicit = method == "Implicit"
    return Answer(
        [(numbers(result.grads), truth)],
        label,
        near=near(case, name) if implicit else 0.0,
        power=int(implicit),
        size=bound,
    )


def task_truth(case: Case, method: str, d: Descent, w0: np.ndarray) -> tuple[np.ndarray | None, float]:
    with np.errstate(all="ignore"):
        if method == "Implicit":
            return case.first(), case.size()
        from_start = np.outer(w0, np.ones(case.m))  # dw₀/dλ
        w, z, size = d.run()
        step = np.eye(case.n) - d.lr * case.rho(case.lam) * case.a
        power = np.linalg.matrix_power(step, d.steps)
        z, growth = z + power @ from_start, np.linalg.norm(step, 2) ** d.steps
        size += growth * np.linalg.norm(from_start)
        if method == "FirstOrder":
            z = from_start
        slope = case.slope(w)
        bound = size * (np.linalg.norm([*w, *case.w, *case.d]) + growth) + np.linalg.norm(case.lam)
        if method == "Reptile":
            return from_start.T @ (d.w0 - w) * case.learned, bound
        if not np.isfinite(slope).all():
            return None, bound
        return (case.lam + z.T @ slope) * case.learned, bound


FORWARD = {
    "Picard": lambda rtol: FP.Picard(rtol=rtol),
    "damped": lambda rtol: FP.Picard(rtol=rtol, mixing=0.5),
    "Anderson": lambda rtol: FP.Anderson(rtol=rtol),
    "Broyden": lambda rtol: FP.Broyden(rtol=rtol),
    "Newton": lambda rtol: FP.Newton(rtol=rtol),
    "Picard, K": lambda rtol: FP.Picard(max_steps=15),
    "Anderson, K": lambda rtol: FP.Anderson(max_steps=15),
}


class Cell(torch.nn.Module):
    """z − (z Aᵀ − u)."""

    def __init__(self, a: torch.Tensor):
        super().__init__()
        self.a = torch.nn.Parameter(a)

    def forward(self, z, u):
        return z - (z @ self.a.T - u)


def call_equilibrium(case: Case) -> Answer:
    rtol = 1e-10 if case.dtype is torch.float64 else 1e-5
    forward = case.pick(tuple(FORWARD))
    name, backward = chosen(case, ("GMRES", "BiCGStab", "NormalCG", "LSQR", "Dense", "FixedPoint"))
    count = case.random.randint(1, 4)
    z = case.random.randn(count, case.n)
    z[0] = case.w
    u, t = z @ case.a.T, z + case.random.randn(count, case.n) @ case.a
    t[0] = case.w + case.d
    layer = hg.nn.Equilibrium(Cell(case.tensor(case.a)), forward=FORWARD[forward](rtol), backward=backward)
    x = case.tensor(u).requires_grad_()
    out = layer(x)
    (((out - case.tensor(t)) ** 2).sum() / 2).backward()
    inverse, slope = case.inverse(), z - t
    v = slope @ inverse
    pairs = [(numbers(x.grad), v.reshape(-1)), (numbers(layer.cell.a.grad), -(v.T @ z).reshape(-1))]
    if case.spectrum in ("singular", "zero", "inconsistent"):  # neither z* nor v is determined
        pairs = []
    elif not np.isfinite(slope).all():
        pairs = [(v, None)]
    size = np.linalg.norm(inverse) * (np.linalg.norm(slope) + np.linalg.norm(inverse) * np.linalg.norm(u))
    size *= 1 + np.linalg.norm(z)
    ok = layer.forward_info.ok and (layer.backward_info.solution is None or layer.backward_info.solution.ok)
    allowed = near(case, forward)
    return Answer(pairs, f"{forward}, {name}", near=allowed, size=size, floor=allowed * size, ok=ok)


def call_fixed_points(case: Case) -> Answer:
    """The residual in float64, and the value where it is determined."""
    rtol = 1e-10 if case.dtype is torch.float64 else 1e-5
    if case.container == "frozen":
        case.container = "list"
    forward = case.pick(tuple(FORWARD))
    if case.hostile in ("nan", "inf"):
        case.c[0] = case.d[~np.isfinite(case.d)][0]
    forms, _ = case.functions()
    start = {"zero": np.zeros(case.n), "random": case.random.randn(case.n), "huge": np.full(case.n, 1e15)}
    start |= {"nan": np.full(case.n, np.nan), "solved": case.w}
    first = case.pick(tuple(start))
    solution = FORWARD[forward](rtol)(forms["fp_map"], case.tree(start[first]), case.hparams())
    w = numbers(case.flat(solution.value))
    residual = case.rho(case.lam) * (case.a @ w - case.rhs(case.lam))
    size = np.linalg.norm(w) + np.linalg.norm(case.w) + np.linalg.norm(residual) + np.linalg.norm(case.rhs(case.lam))
    known = np.isfinite(case.c).all() and case.spectrum not in ("singular", "zero", "inconsistent", "tiny")
    pairs = [(residual, np.zeros(case.n)), (w, case.w if known else w)]
    if forward.endswith("K"):  # K steps say no more than that they were done
        pairs = [] if np.isfinite(w).all() else [(w, None)]
    label = f"{forward} from {first}: {solution.message}"
    return Answer(pairs, label, size=size, ok=solution.ok)


def call_bilevel(case: Case) -> Answer:
    """SOBA's directions on its second batch, v being −lr ∇₁f: D_w = ∇₁g and D_λ = ∇²₂₁g v + ∇₂f."""
    case.a = (case.a + case.a.T) / 2
    case.container = case.pick(("tensor", "list", "dict", "ordered", "named", "strided", "scalars", "empty", "mixed"))
    forms, outer = case.functions()
    lr, w, lam, closures = case.pick((0.1, 1.0)), case.random.randn(case.n), case.hparams(), case.pick((True, False))
    params = optree.tree_map(lambda x: x.requires_grad_(), case.tree(w))
    tracker = hg.bilevel.SOBA(params, lam, lr=lr)
    leaves = [x for x in (lam if isinstance(lam, list) else [lam]) if x.requires_grad]
    for _ in range(2):
        for x in [*optree.tree_leaves(params), *leaves]:
            x.grad = None
        losses = (lambda: outer(params, lam)), (lambda: forms["inner_loss"](params, lam))
        tracker.backward(*(losses if closures else (loss() for loss in losses)))
        tracker.step()
    f, rho = case.a @ w - case.rhs(case.lam), case.rho(case.lam)
    v = -lr * (w - case.w - case.d)
    cross = -(rho**2) * case.lam * (f @ v) - rho * (1 + case.lam) * (case.b.T @ v)
    found = case.flat(optree.tree_map(lambda x: x.grad, params))
    norm = np.linalg.norm
    terms = norm(case.a) * norm(w) + norm(case.rhs(case.lam)) + norm(case.lam)
    with np.errstate(over="ignore", invalid="ignore"):
        size = (1 + terms) * (1 + norm(v)) * (1 + norm(case.b))
    pairs = [(numbers(found), rho * f), (numbers([x.grad for x in leaves]), (case.lam + cross)[case.learned])]
    return Answer(pairs, f"SOBA, closures={closures}", size=size, power=0)


OPTIMISERS = {
    "SGD": {"momentum": (0, 0.9), "nesterov": (False, True), "weight_decay": (0, 0.1), "maximize": (False, True)},
    "Adam": {"amsgrad": (False, True), "weight_decay": (0, 0.1), "maximize": (False, True)},
    "AdamW": {"amsgrad": (False, True), "weight_decay": (0, 0.1)},
    "RMSprop": {"centered": (False, True), "momentum": (0, 0.9), "weight_decay": (0, 0.1)},
    "Adagrad": {"lr_decay": (0, 0.1), "initial_accumulator_value": (0, 0.1), "weight_decay": (0, 0.1)},
    "Adadelta": {"rho": (0.9, 0.5), "weight_decay": (0, 0.1)},
    "Adamax": {"weight_decay": (0, 0.1)},
    "RAdam": {"weight_decay": (0, 0.1)},
}


def call_rules(case: Case) -> Answer:
    """from_torch after some steps, then more steps in both; and d/dlr by finite differences of torch.optim."""
    name = case.pick(tuple(OPTIMISERS))
    options = {key: case.pick(values) for key, values in OPTIMISERS[name].items()}
    options["nesterov"] = options.get("nesterov", False) and bool(options.get("momentum"))
    if name != "SGD":
        del options["nesterov"]
    before, after, lr = case.random.randint(0, 4), case.random.randint(1, 9), case.pick((1e-3, 0.01, 0.1))
    w0, t = case.random.randn(case.n), case.w
    frozen = case.pick((False, False, True))
    unused = case.pick((False, False, True))
    scale = {"small": 1e-20, "large": 1e10, "zero rhs": 0.0}.get(case.hostile, 1.0)
    a = case.a

    def run(lr_after: float, steps: int, dtype=torch.float64):
        x = torch.tensor(w0, dtype=dtype)
        leaves = [x[:1].clone().requires_grad_(not frozen), x[1:].clone().requires_grad_(), torch.ones(2, dtype=dtype)]
        leaves[2].requires_grad_(unused)
        optimizer = getattr(torch.optim, name)(leaves, lr=lr, **options)
        for k in range(before + steps):
            if k == before:
                for group in optimizer.param_groups:
                    group["lr"] = lr_after
            optimizer.zero_grad()
            loss(leaves).backward()
            optimizer.step()
        return optimizer, leaves

    def loss(leaves, _=None):
        w = torch.cat(leaves[:2])
        m, target = (torch.tensor(x, dtype=w.dtype) for x in (a, t))
        return scale * ((w - target) @ m @ (w - target)) / 2

    optimizer, _ = run(lr, 0, case.dtype)
    rule, params, state = hg.diff_optimizers.from_torch(optimizer)
    rate = torch.tensor(lr, dtype=case.dtype).requires_grad_()
    step = replace(rule, lr=lambda h: h).on(loss)
    outer = lambda carry, h: (torch.cat(carry[0][:2]) ** 2).sum() / 2  # noqa: E731
    result = hg.unroll.reverse(step, (params, state), rate, outer, after, allow_detached=True)
    reached = torch.cat([x.detach() for x in run(lr, after, case.dtype)[1]])
    values = [
        sum(float((x.detach() ** 2).sum()) / 2 for x in run(lr + h, after)[1][:2]) for h in (1e-4 * lr, -1e-4 * lr)
    ]
    slope = (values[0] - values[1]) / (2e-4 * lr)
    got = torch.cat([x.detach() for x in result.params[0]])
    label = f"{name} {options}, {before} + {after} steps, lr={lr}, frozen={frozen}, unused={unused}"
    size = float(reached.abs().max()) + 1
    fine = case.dtype is torch.float64 and max(values) < 1e6
    off = max(abs(slope), 1e-8 * abs(values[0]) / lr, 1e-12)
    pairs = [(numbers(got) / size, numbers(reached) / size), (numbers(result.grads) / off, np.array([slope / off]))]
    return Answer(pairs if fine else pairs[:1], label, floor=1e-2, size=1.0, power=0)


def call_check(case: Case) -> Answer:
    """diagnostics.check of a result at params that are off, or whose system was not solved."""
    case.container = case.pick(("tensor", "list", "dict", "scalars", "frozen"))
    outer, options, name = implicit_options(case)
    options["x0"] = None
    away = case.pick((0.0, 1e-6, 1e-3, 0.1, 1.0))
    w = case.w + away * case.random.randn(case.n) * case.free
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = hg.implicit.grad(outer, params=case.tree(w), hparams=case.hparams(), **options)
        report = hg.diagnostics.check(result)
    pairs = [(numbers(result.grads), case.first())] if case.spectrum != "tiny" else []  # rounding moves w* there
    return Answer(pairs, f"{name}, off by {away}: {report.verdict}", near=0.1, size=0.0, ok=report.ok)


def call_polish(case: Case) -> Answer:
    """polish and refine of a result at params that are a little off."""
    case.container = case.pick(("tensor", "list", "dict", "scalars", "frozen"))
    outer, options, name = implicit_options(case)
    options["x0"] = None
    away = case.pick((0.0, 1e-6, 1e-3))
    w = case.w + away * case.random.randn(case.n) * case.free
    result = hg.implicit.grad(outer, params=case.tree(w), hparams=case.hparams(), **options)
    result = case.pick((hg.implicit.polish, lambda result: hg.implicit.refine(result, 1e-3)))(result)
    known = "Nystrom" not in name and case.spectrum != "tiny"  # a damped system; rounding moves w*
    pairs = [(numbers(result.grads), case.first())] if known else []
    return Answer(pairs, f"{name}, off by {away}", near=0.35, ok=result.solution.ok)


ENTRY_POINTS: dict[str, Callable[[Case], Answer]] = {
    name.removeprefix("call_"): call for name, call in list(globals().items()) if name.startswith("call_")
}


FINE = ("right", "warned", "refused", "not ok")


def outcome(seed: int) -> str:
    """One of `FINE`, or a description of an error that neither an exception nor a warning reports."""
    name, case = list(ENTRY_POINTS)[seed % len(ENTRY_POINTS)], Case(seed)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            answer = ENTRY_POINTS[name](case)
        except (ValueError, TypeError, NotImplementedError):
            return "refused"
    if any(issubclass(w.category, hg.HypergradientWarning) for w in seen):
        return "warned"
    wrong = silent_failure(case, answer, name) if answer.ok else None
    return f"{seed}: {name}, {case}: {answer.label}: {wrong}" if wrong else "right" if answer.ok else "not ok"


def silent_failure(case: Case, answer: Answer, name: str) -> str | None:
    eps = 1e-10 if case.dtype is torch.float64 and case.container != "mixed" else 1e-4
    explained = min(1.0, 30 * eps * case.condition**answer.power)
    size = case.size() if answer.size is None else answer.size
    for value, truth in answer.pairs:
        if name == "functions" and not np.isfinite(value).all():
            continue  # here the test evaluates the outer loss, whose derivatives may overflow
        if truth is None:
            return "a success where nothing is determined"
        with np.errstate(all="ignore"):
            unit = max(1.0, np.abs(truth).max(initial=0.0))  # squares may overflow
            off, length = (np.linalg.norm(x / unit) * unit for x in (value - truth, truth))
            few = answer.near * max(length, size / 2)  # ∂₂F may amplify the error of v more than v
            allowed = max(answer.floor, few, explained * size, min(0.1, explained) * length)
        if not off <= allowed:
            return f"off by {off:.1e} of {length:.1e}, allowed {allowed:.1e}"
    return None


@pytest.mark.parametrize("first", range(0, CALLS, BATCH))
def test_no_silent_failure(first):
    failures = [text for seed in range(first, first + BATCH) if (text := outcome(seed)) not in FINE]
    assert not failures, "\n".join(failures)
