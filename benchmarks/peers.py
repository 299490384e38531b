"""Columns of other libraries, for those that are installed, through their public interfaces.

TorchOpt: `diff.implicit.custom_root` around a solver that returns the known solution. torchdeq: `get_deq` with
implicit differentiation. Betty and BOAT: their hypergradient functions without their engines; `Level` stands for the
two problems that Betty's functions take. JAXopt: `implicit_diff.root_vjp`, with the whole hypergradient under `jax.jit`
and the data as arguments. Through the steps: TorchOpt's `MetaSGD` and higher's `innerloop_ctx`, on a module that owns
the params.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import illconditioned, problems
from .measure import counting
from .problems import Problem

if TYPE_CHECKING:
    from .bilevel import Case
    from .loops import Loop
    from .unrolled import Descent

Tensors = list[Tensor]
# One thread for XLA, which reads this when it is loaded.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")


def installed(*names: str) -> bool:
    return all(find_spec(name) is not None for name in names)


def load(name: str) -> Any:
    """Import a library without its warnings; type checkers need not know it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(name)


def jax_in_double() -> tuple[Any, Any]:
    """jax and jax.numpy, in float64."""
    jax = load("jax")
    jax.config.update("jax_enable_x64", True)
    return jax, load("jax.numpy")


def torchopt_root(problem: Problem, solve: Callable[..., Any]) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchOpt imports functorch from its old place
        torchopt = load("torchopt")

        def optimality(w: Tensors, h: Tensors) -> tuple[Tensor, ...]:
            if problem.step_size is None:
                return tuple(y - x for x, y in zip(w, problem.fp_map(w, h), strict=True))
            return torch.func.grad(lambda w: problem.inner_loss(w, h))(w)

        known = torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)(lambda w, h: w)
        solution = known(tuple(w.detach() for w in problem.params), tuple(problem.hparams))
        loss = problem.outer_loss(solution, problem.hparams)
        return list(torch.autograd.grad(loss, problem.hparams))


def torchopt_cg(problem: Problem, rtol: float = 0.0, max_steps: int | None = None) -> Tensors:
    torchopt = load("torchopt")
    steps = problem.steps if max_steps is None else max_steps
    return torchopt_root(problem, torchopt.linear_solve.solve_cg(maxiter=steps, rtol=rtol, atol=0.0))


def torchopt_normal_cg(problem: Problem) -> Tensors:
    solve = load("torchopt").linear_solve.solve_normal_cg(maxiter=problem.steps, rtol=0.0, atol=0.0)
    return torchopt_root(problem, solve)


def torchopt_passes(problem: Problem, rtol: float, max_steps: int) -> int:
    """Reverse passes: one for each product, and three others."""
    torchopt = load("torchopt")
    counts: Counter[str] = Counter()
    solve = torchopt.linear_solve.solve_cg(maxiter=max_steps, rtol=rtol, atol=0.0)
    torchopt_root(problem, lambda matvec, b: solve(counting(matvec, counts, "products"), b))
    return counts["products"] + 3


def torchopt_neumann(problem: Problem) -> Tensors:
    """K terms of the series, of which the first costs no product."""
    torchopt = load("torchopt")
    solve = torchopt.linear_solve.solve_inv(ns=True, maxiter=problem.steps - 1, alpha=problem.step_size)
    return torchopt_root(problem, solve)


class Level:
    """A problem with the attributes that Betty's hypergradient functions read."""

    paths: tuple = ()
    cur_batch = None

    def __init__(
        self, tensors: Sequence[Tensor], loss: Callable[[], Tensor] | None, optimizer: Any = None, **config: Any
    ):
        self.tensors, self.loss, self.config = list(tensors), loss, SimpleNamespace(**config)
        self.optimizer = optimizer

    def training_step_exec(self, batch: Any) -> Tensor:
        assert self.loss is not None
        return self.loss()

    def parameters(self) -> Tensors:
        return self.tensors

    trainable_parameters = meta_trainable_parameters = parameters


def betty(problem: Problem, name: str, **config: Any) -> Tensors:
    function = load("betty.hypergradient").jvp_fn_mapping[name]
    params = [w.detach().requires_grad_() for w in problem.params]
    lower = Level(params, lambda: problem.inner_loss(params, problem.hparams), **config)
    upper = Level(problem.hparams, None)
    loss = problem.outer_loss(params, problem.hparams)
    grads = torch.autograd.grad(loss, [*params, *problem.hparams], allow_unused=True)
    # Newer versions may add to .grad; sync=False returns the result instead.
    options = {"sync": False} if "sync" in signature(function).parameters else {}
    cross = function(grads[: len(params)], lower, upper, **options)
    direct = grads[len(params) :]
    return [c if d is None else c + d for c, d in zip(cross, direct, strict=True)]


def betty_cg(problem: Problem, max_steps: int | None = None) -> Tensors:
    steps = problem.steps if max_steps is None else max_steps
    return betty(problem, "cg", cg_iterations=steps, cg_alpha=1.0)


def betty_neumann(problem: Problem) -> Tensors:
    """K terms of the series, of which the first costs no product."""
    return betty(problem, "neumann", neumann_iterations=problem.steps - 1, neumann_alpha=problem.step_size)


def betty_has(name: str) -> bool:
    """Whether Betty is installed, in a version with this method (SAMA came with 0.2, which is not on PyPI)."""
    return installed("betty") and name in load("betty.hypergradient").jvp_fn_mapping


def betty_sama(case: Case) -> Callable[[], Tensor]:
    """Betty's SAMA, which takes steps of size 1, at params that move by plain gradient steps."""
    sama = load("betty.hypergradient").jvp_fn_mapping["sama"]
    optimizer = torch.optim.SGD(case.params, lr=case.lr)
    lower = Level(case.params, case.inner, optimizer, sama_adam_alpha=0.01, sama_multitask=False)
    upper = Level(case.hparams, None)

    def step() -> Tensor:
        optimizer.zero_grad()
        slopes = torch.autograd.grad(case.outer(), case.params)
        cross = sama(list(slopes), lower, upper, sync=False)
        torch.autograd.backward(case.inner(), inputs=case.params)
        optimizer.step()
        return cross[0]

    return step


def boat_implicit(problem: Problem, name: str, steps: int) -> Tensors:
    """BOAT's function of that name, on the map of a gradient step, without its engine."""
    function, step_size = getattr(load("boat_torch.utils.op_utils"), name), problem.step_size
    assert step_size is not None
    params, hparams = [w.detach().requires_grad_() for w in problem.params], problem.hparams

    def fp_map(params: Tensors, loss: Tensor) -> Tensors:
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return [w - step_size * g for w, g in zip(params, grads, strict=True)]

    losses = problem.outer_loss(params, hparams), problem.inner_loss(params, hparams)
    return list(function(params, hparams, *losses, steps, fp_map, 0.0))


def boat_cg(problem: Problem) -> Tensors:
    return boat_implicit(problem, "conjugate_gradient", problem.steps)


def boat_neumann(problem: Problem) -> Tensors:
    """K terms of the series, of which the first costs no product."""
    return boat_implicit(problem, "neumann", problem.steps - 1)


def boat(name: str, case: Case, penalty: float = 1.0, steps: int = 1) -> Callable[[], Tensor]:
    """One of BOAT's methods through its Problem, which takes the steps of params itself.

    PGDO and MESO return the gradient of f + penalty (g − min g) divided by the penalty. VSO's multiplier is a parameter
    over the value of g; this parameter is chosen such that the multiplier at the solution is the penalty. MESO's error
    does not fall below ηγ²/μ (μ: an eigenvalue of the Hessian), because it differentiates its proximal point, too.
    VSO's does not fall below a limit either, because its few steps start anew each time.
    """
    optimizer = torch.optim.SGD(case.params, lr=case.lr)
    scale = penalty if name in ("PGDO", "MESO") else 1.0
    own = {
        "PGDO": {"y_hat_lr": case.lr, "gamma_init": penalty, "gamma_max": penalty, "gamma_argmax_step": 1,
                 "update_y_ahead": False, "penalty": "difference"},
        "MESO": {"eta": case.lr, "gamma_1": 0.1, "c0": penalty / 2**0.25, "y_hat_lr": case.lr},
        "VSO": {"z_loop": 1, "ll_l2_reg": 0.0, "ul_l2_reg": 0.0, "ul_ln_reg": penalty * case.least, "reg_decay": 0.0,
                "z_lr": case.lr / penalty},
        "VFO": {"y_hat_lr": case.lr, "eta": 0.5, "u1": 0.5},
    }[name]  # fmt: skip
    config = {
        "fo_op": name, "gm_op": None, "na_op": None, name: own, "lower_iters": steps, "device": "cpu",
        "lower_level_model": case.lower, "upper_level_model": case.upper, "lower_level_var": case.params,
        "upper_level_var": case.hparams, "lower_level_opt": optimizer, "upper_level_opt": None,
        "loss_log_path": os.devnull, "fo_ol_batch_input": False, "return_grad": True,
    }  # fmt: skip
    losses = {f"{level}_level_loss": {"function": f"{f.__module__}.{f.__name__}"}
              for level, f in zip(("lower", "upper"), case.losses, strict=True)}  # fmt: skip
    problem = load("boat_torch").Problem(config, losses).build_ll_solver().build_ul_solver()

    def step() -> Tensor:
        case.hparams[0].grad = None
        (direction,), _ = problem.run_iter(case.data, case.data, 1)
        problem.loss_history.clear()  # BOAT writes all of it to a file in every step
        return direction * scale

    return step


def torchdeq_layer(problem: Problem) -> Tensors:
    """xB + c is evaluated once; with tolerances of 0 it takes K steps of the map and K terms of the adjoint."""
    a, b, c, *_ = problem.hparams
    u = problem.data["x"] @ b + c
    steps = problem.steps
    deq = load("torchdeq").get_deq(f_max_iter=steps, b_max_iter=steps, f_tol=0.0, b_tol=0.0, ift=True)
    z = deq(lambda z: torch.tanh(z @ a + u), problem.params[0])[0][-1]
    return list(torch.autograd.grad(problem.outer_loss([z], problem.hparams), problem.hparams))


class InnerLoss(nn.Module):
    """The inner loss as a module that owns the params, as TorchOpt and higher require."""

    def __init__(self, descent: Descent):
        super().__init__()
        self.descent, self.count = descent, len(descent.start)
        for i, w in enumerate(descent.start):
            self.register_parameter(f"w{i}", nn.Parameter(w.clone()))

    def owned(self) -> Tensors:
        return [getattr(self, f"w{i}") for i in range(self.count)]

    def forward(self, t: int | None) -> Tensor:
        """The inner loss on batch t, or the outer loss (t = None)."""
        if t is None:
            return self.descent.outer_loss(self.owned(), self.descent.hparams)
        return self.descent.inner(self.owned(), self.descent.hparams, self.descent.batch(t))


def torchopt_unrolled(descent: Descent, steps: int) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = InnerLoss(descent)
        optimizer = load("torchopt").MetaSGD(module, lr=descent.lr)
        for t in range(steps):
            optimizer.step(module(t))
        return list(torch.autograd.grad(module(None), descent.hparams))


def higher_unrolled(descent: Descent, steps: int) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = InnerLoss(descent)
        optimizer = torch.optim.SGD(module.parameters(), lr=descent.lr)
        with load("higher").innerloop_ctx(module, optimizer, copy_initial_weights=False) as (functional, step):
            for t in range(steps):
                step.step(functional(t))
            return list(torch.autograd.grad(functional(None), descent.hparams))


class LoopLoss(nn.Module):
    """The inner loss of a loop as a module that owns the params, as TorchOpt requires."""

    def __init__(self, loop: Loop):
        super().__init__()
        self.loop = loop
        self.owned = nn.ParameterList(nn.Parameter(x.clone()) for x in loop.start)

    def forward(self) -> Tensor:
        return self.loop.inner(list(self.owned), self.loop.lam)


def torchopt_loop(loop: Loop) -> Tensor:
    from .loops import BETAS, EPS, LR, MOMENTUM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, torchopt, lr = LoopLoss(loop), load("torchopt"), LR[loop.rule]
        if loop.rule == "SGD":
            optimizer = torchopt.MetaSGD(module, lr=lr, momentum=MOMENTUM)
        else:
            optimizer = torchopt.MetaAdam(module, lr=lr, betas=BETAS, eps=EPS)
        for _ in range(loop.steps):
            optimizer.step(module())
        return torch.autograd.grad(loop.outer(list(module.owned)), loop.lam)[0]


def jax_loop(loop: Loop) -> Callable[[], Tensor]:
    """A scan over the steps under jit; the reverse pass recomputes each step."""
    from .loops import BETAS, EPS, LR, MOMENTUM

    jax, jnp = load("jax"), load("jax.numpy")
    jax.config.update("jax_enable_x64", True)
    x, y, xv, yv = map(_to_jax, loop.data)
    lr = LR[loop.rule]

    def cross_entropy(w: Any, x: Any, y: Any) -> Any:
        for i in range(0, len(w), 2):
            x = x @ w[i].T + w[i + 1]
            x = jax.nn.relu(x) if i < len(w) - 2 else x
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1))

    def inner(w: Any, lam: Any) -> Any:
        return cross_entropy(w, x, y) + jnp.dot(jnp.exp(lam), jnp.stack([jnp.sum(v * v) for v in w])) / 2

    def outer(lam: Any, start: Any) -> Any:
        def step(carry: Any, t: Any) -> Any:
            w, m, v = carry
            g = jax.grad(inner)(w, lam)
            if loop.rule == "SGD":
                m = [MOMENTUM * a + b for a, b in zip(m, g, strict=True)]
                return ([a - lr * b for a, b in zip(w, m, strict=True)], m, v), None
            m = [BETAS[0] * a + (1 - BETAS[0]) * b for a, b in zip(m, g, strict=True)]
            v = [BETAS[1] * a + (1 - BETAS[1]) * b * b for a, b in zip(v, g, strict=True)]
            one, two = ((1 - beta ** (t + 1.0)).astype(lam.dtype) for beta in BETAS)
            moved = [a - lr / one * b / (jnp.sqrt(c / two) + EPS) for a, b, c in zip(w, m, v, strict=True)]
            return (moved, m, v), None

        zeros = [jnp.zeros_like(w) for w in start]
        carry = start, zeros, zeros if loop.rule == "Adam" else []
        (w, _, _), _ = jax.lax.scan(jax.checkpoint(step), carry, jnp.arange(loop.steps))
        return cross_entropy(w, xv, yv)

    compiled, lam, start = jax.jit(jax.grad(outer)), _to_jax(loop.lam), [_to_jax(w) for w in loop.start]
    return lambda: torch.from_dlpack(jax.block_until_ready(compiled(lam, start))).clone()


def _jax_losses(problem: Problem) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The inner loss (or map) and the outer loss of a row in jax.numpy, with the arguments that they take in torch."""
    jax, jnp = load("jax"), load("jax.numpy")

    def log_loss(z: Any, y: Any) -> Any:
        return jnp.mean(jax.nn.softplus(z) - y * z)

    def cross_entropy(z: Any, y: Any) -> Any:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1))

    def network(params: Any, x: Any) -> Any:
        for w, b in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = jax.nn.relu(x @ w.T + b)
        return x @ params[-2].T + params[-1]

    def spmv(entries: Any, w: Any) -> Any:
        rows, columns, values, like = entries
        return jax.ops.segment_sum(values * w[columns], rows, num_segments=len(like), indices_are_sorted=True)

    def penalty(w: Any, h: Any) -> Any:
        return 0.5 * jnp.sum(jnp.exp(h[0]) * w[0] ** 2)

    inner = problem.inner.func if isinstance(problem.inner, partial) else problem.inner
    options = problem.inner.keywords if isinstance(problem.inner, partial) else {}
    return {
        problems.logistic_inner: (
            lambda w, h, d: log_loss(d["x"] @ w[0], d["y"]) + penalty(w, h),
            lambda w, h, d: log_loss(d["xv"] @ w[0], d["yv"]),
        ),
        illconditioned.sparse_inner: (
            lambda w, h, d: log_loss(spmv(d["x"], w[0]), d["y"]) + penalty(w, h),
            lambda w, h, d: log_loss(spmv(d["xv"], w[0]), d["yv"]),
        ),
        problems.biased_inner: (
            lambda w, h, d: (
                cross_entropy(network(w, d["x"]), d["y"])
                + 0.5 * options["rho"] * sum(jnp.sum((a - b) ** 2) for a, b in zip(w, h, strict=True))
            ),
            lambda w, h, d: cross_entropy(network(w, d["xv"]), d["yv"]),
        ),
        illconditioned.quadratic_inner: (
            lambda w, h, d: 0.5 * w[0] @ (d["a"] @ w[0]) - w[0] @ (d["b"] @ h[0] + d["c"]),
            lambda w, h, d: 0.5 * jnp.sum((w[0] - d["t"]) ** 2) + 0.05 * jnp.sum(h[0] ** 2),
        ),
        problems.tanh_map: (
            lambda w, h, d: [jnp.tanh(w[0] @ h[0] + d["x"] @ h[1] + h[2])],
            lambda w, h, d: cross_entropy(w[0] @ h[3] + h[4], d["y"]),
        ),
    }[inner]


class Jax:
    """A row in JAX. Its data is copied once, and its hypergradient compiled once for all tolerances and step counts.

    normal: by conjugate gradients on the normal equations, JAXopt's default.
    """

    made: ClassVar[dict[bool, tuple[Any, Jax]]] = {}  # by `normal`: data of the last row, and its instance

    def __init__(self, problem: Problem, normal: bool):
        jax, implicit_diff, linear_solve = load("jax"), load("jaxopt.implicit_diff"), load("jaxopt.linear_solve")
        jax.config.update("jax_enable_x64", True)
        inner, outer = _jax_losses(problem)
        self.data = {k: jax.tree.map(_to_jax, _entries(v, problem, k)) for k, v in problem.data.items()}
        self.products = 0

        def counted(x: Any) -> None:
            self.products += 1

        def hypergradient(params: Any, hparams: Any, data: Any, steps: Any, tol: Any, count: bool) -> Any:
            def solve(matvec: Callable[[Any], Any], b: Any) -> Any:
                def product(v: Any) -> Any:
                    if count:
                        jax.debug.callback(counted, v[0].sum())
                    return matvec(v)

                method = linear_solve.solve_normal_cg if normal else linear_solve.solve_cg
                return method(product, b, maxiter=steps, tol=tol)

            b, direct = jax.grad(outer, (0, 1))(params, hparams, data)

            def optimality(w: Any, h: Any) -> Any:
                if problem.step_size is None:
                    return [y - x for x, y in zip(w, inner(w, h, data), strict=True)]
                return jax.grad(inner)(w, h, data)

            (cross,) = implicit_diff.root_vjp(optimality, params, (hparams,), b, solve=solve)
            return [c + d for c, d in zip(cross, direct, strict=True)]

        self.jit = jax.jit(hypergradient, static_argnames="count")

    @classmethod
    def of(cls, problem: Problem, normal: bool = False) -> Jax:
        if normal not in cls.made or cls.made[normal][0] is not problem.data:
            cls.made[normal] = (problem.data, Jax(problem, normal))
        return cls.made[normal][1]

    def arguments(self, problem: Problem, steps: int, tol: float) -> tuple[Any, ...]:
        params, hparams = ([_to_jax(t) for t in tensors] for tensors in (problem.params, problem.hparams))
        return params, hparams, self.data, steps, tol

    def __call__(self, problem: Problem, steps: int, tol: float, count: bool = False) -> Tensors:
        grads = load("jax").block_until_ready(self.jit(*self.arguments(problem, steps, tol), count=count))
        return [torch.from_dlpack(g) for g in grads]


def _to_jax(tensor: Tensor) -> Any:
    return load("jax.numpy").from_dlpack(tensor.detach())


def _entries(value: Any, problem: Problem, key: str) -> Any:
    """A sparse matrix as (rows, columns, values, y), where y has one entry per row; any other value unchanged."""
    if isinstance(value, illconditioned.Sparse):
        return (*value.entries(), problem.data[key.replace("x", "y")])
    return value


def jaxopt_cg(problem: Problem, tol: float = 0.0, max_steps: int | None = None) -> Tensors:
    return Jax.of(problem)(problem, problem.steps if max_steps is None else max_steps, tol)


def jaxopt_passes(problem: Problem, tol: float, max_steps: int) -> int:
    """Reverse passes: one for each product, and three others."""
    row = Jax.of(problem)
    row.products = 0
    row(problem, max_steps, tol, count=True)
    return row.products + 3


def jaxopt_normal_cg(problem: Problem) -> Tensors:
    return Jax.of(problem, normal=True)(problem, problem.steps, 0.0)


def jaxopt_memory(problem: Problem, normal: bool = False) -> int:
    """Bytes that the compiled program allocates for temporaries and its result."""
    row = Jax.of(problem, normal)
    analysis = row.jit.lower(*row.arguments(problem, problem.steps, 0.0), count=False).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes
