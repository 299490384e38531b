"""The reference problems as torch callables for the library under test, each with its NumPy truth (`oracles.py`).

Formulas are written on flat vectors. A `Layout` turns them into maps of pytrees, which differ from problem to problem:
a tensor, lists, tuples, nested dicts (keys sorted, so that every flattening order agrees), 0-d and matrix leaves.
`fp_map` is Φ if the problem is a fixed point itself; otherwise w − step·residual with step 2/(L+μ) at the solution.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import optree
import torch
import torch.nn.functional as F
from torch import Tensor

import oracles
from oracles import Oracle

Map = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Problem:
    """One bilevel problem at its exact solution; leaves of `params` require no grad, those of `hparams` do."""

    name: str
    params: Any
    hparams: Any
    outer_loss: Map
    inner_loss: Map | None
    fp_map: Map | None
    residual: Map | None
    symmetric: bool
    value: float
    grads: list[np.ndarray]
    condition: float
    contraction: float | None
    batch_dims: int = 0
    adjoint: Any = None  # v of Aᵀv = ∇₁E for the residual and inner-loss forms; for fp_map it is v / step
    step: float = 1.0


@dataclass(frozen=True)
class Unrolled:
    """An iteration to differentiate: state ← step(state, hparams), `steps` times from `start`."""

    name: str
    start: Any
    hparams: Any
    step: Map
    steps: int
    outer_loss: Map
    value: float
    grads: list[np.ndarray]
    final: Any  # the last state, exact


@dataclass(frozen=True)
class Layout:
    """`pack` turns the flat form that formulas use into the pytree that users see; `unpack` is its inverse."""

    pack: Callable[[Any], Any] = lambda flat: flat
    unpack: Callable[[Any], Any] = lambda tree: tree


@dataclass(frozen=True)
class Maps:
    """The problem's formulas on flat vectors."""

    outer: Map
    inner: Map | None = None
    residual: Map | None = None
    phi: Map | None = None
    step: float = 1.0


@dataclass(frozen=True)
class Row:
    """The oracle, formulas and pytrees of a named problem; `spread` scales the noise in λ for seeds other than 0."""

    oracle: Callable[..., Oracle]
    maps: Callable[[Oracle, Callable[[Any], Tensor]], Maps]
    params: Layout = Layout()
    hparams: Layout = Layout()
    symmetric: bool = True
    spread: float = 0.3
    batch_dims: int = 0


TENSOR = Layout()
BOXED = Layout(lambda v: [v], lambda p: p[0])
NAMED = Layout(lambda v: {"w": v}, lambda p: p["w"])
PAIR = Layout(lambda v: [v[:4], v[4:]], torch.cat)
SCALARS = Layout(lambda v: (v[0], v[1]), lambda p: torch.stack(list(p)))
NESTED = Layout(lambda v: {"a": (v[:3],), "b": {"c": v[3:]}}, lambda p: torch.cat([p["a"][0], p["b"]["c"]]))
MATRIX_AND_REST = Layout(
    lambda v: (v[:20].reshape(4, 5), {"rest": v[20:]}), lambda p: torch.cat([p[0].reshape(-1), p[1]["rest"]])
)
SCALAR_AND_MATRIX = Layout(
    lambda v: {"x": v[0], "y": [v[1:].reshape(7, 7)]}, lambda p: torch.cat([p["x"].reshape(1), p["y"][0].reshape(-1)])
)
SCALAR_AND_REST = Layout(lambda v: (v[0], [v[1:]]), lambda p: torch.cat([p[0].reshape(1), p[1][0]]))


def gradient_step(o: Oracle) -> float:
    """2/(L + μ) of a symmetric system: the step at which gradient descent contracts fastest."""
    eigenvalues = np.linalg.eigvalsh(o.matrix)
    return 2.0 / (eigenvalues[0] + eigenvalues[-1])


def mean_square(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """‖Xw − y‖²/2n."""
    return (x @ w - y).square().sum() / (2 * len(y))


def ridge_maps(o: Oracle, cast: Callable[[Any], Tensor]) -> Maps:
    """Squared loss with one penalty e^θⱼ for each feature."""
    x, y, xv, yv = (cast(o.data[k]) for k in ("x", "y", "xv", "yv"))
    return Maps(
        outer=lambda w, h: mean_square(xv, yv, w),
        inner=lambda w, h: mean_square(x, y, w) + 0.5 * (h.exp() * w * w).sum(),
        residual=lambda w, h: x.T @ (x @ w - y) / len(y) + h.exp() * w,
        step=gradient_step(o),
    )


def logistic_maps(
    o: Oracle, cast: Callable[[Any], Tensor], penalty: Callable[[Tensor], Tensor] = torch.exp, step: float | None = None
) -> Maps:
    """Mean log-loss with one penalty for each feature: e^θⱼ, or λⱼ itself as in HyperTorch's example."""
    x, y, xv, yv = (cast(o.data[k]) for k in ("x", "y", "xv", "yv"))
    loss = F.binary_cross_entropy_with_logits
    return Maps(
        outer=lambda w, h: loss(xv @ w, yv),
        inner=lambda w, h: loss(x @ w, y) + 0.5 * (penalty(h) * w * w).sum(),
        residual=lambda w, h: x.T @ (torch.sigmoid(x @ w) - y) / len(y) + penalty(h) * w,
        step=gradient_step(o) if step is None else step,
    )


def biased_maps(o: Oracle, cast: Callable[[Any], Tensor]) -> Maps:
    """Squared loss with the regulariser 5‖w−λ‖²."""
    x, y, xv, yv = (cast(o.data[k]) for k in ("x", "y", "xv", "yv"))
    return Maps(
        outer=lambda w, h: 0.5 * (xv @ w - yv).square().sum(),
        inner=lambda w, h: 0.5 * (x @ w - y).square().sum() + 5.0 * (w - h).square().sum(),
        residual=lambda w, h: x.T @ (x @ w - y) + 10.0 * (w - h),
        step=gradient_step(o),
    )


def quadratic_maps(o: Oracle, cast: Callable[[Any], Tensor]) -> Maps:
    """½wᵀAw − wᵀ(Bλ+c); the outer loss depends on λ directly too."""
    a, b, c, t = (cast(o.data[k]) for k in ("a", "b", "c", "t"))
    return Maps(
        outer=lambda w, h: 0.5 * (w - t).square().sum() + 0.05 * h.square().sum(),
        inner=lambda w, h: 0.5 * w @ (a @ w) - w @ (b @ h + c),
        residual=lambda w, h: a @ w - b @ h - c,
        step=gradient_step(o),
    )


def contraction_maps(o: Oracle, cast: Callable[[Any], Tensor]) -> Maps:
    """w = Mw + Bλ + c with a non-symmetric M."""
    m, b, c, t = (cast(o.data[k]) for k in ("m", "b", "c", "t"))
    return Maps(
        outer=lambda w, h: 0.5 * (w - t).square().sum(),
        residual=lambda w, h: w - m @ w - b @ h - c,
        phi=lambda w, h: m @ w + b @ h + c,
    )


def equilibrium_maps(o: Oracle, cast: Callable[[Any], Tensor]) -> Maps:
    """z = tanh(zWᵀ + xUᵀ + b), row by row."""
    x, c, y = cast(o.data["x"]), cast(o.data["c"]), torch.as_tensor(o.data["y"])

    def phi(z: Tensor, h: Any) -> Tensor:
        w, u, b = h
        return torch.tanh(z @ w.T + x @ u.T + b)

    return Maps(
        outer=lambda z, h: F.cross_entropy(z @ c.T, y),
        residual=lambda z, h: z - phi(z, h),
        phi=phi,
    )


CELL = Layout(list, tuple)
EQUILIBRIUM = Row(oracles.equilibrium, equilibrium_maps, TENSOR, CELL, symmetric=False, spread=0.01)
QUADRATICS = {"quadratic-10": 10.0, "quadratic-1e3": 1e3, "quadratic-1e5": 1e5}
CONTRACTIONS = {"contraction-.5": 0.5, "contraction-.9": 0.9, "contraction-.99": 0.99}
ROWS = {
    "ridge": Row(oracles.ridge, ridge_maps, TENSOR, TENSOR),
    "logistic": Row(oracles.logistic, logistic_maps, NAMED, PAIR),
    "biased": Row(oracles.biased, biased_maps, PAIR, NESTED),
    **{
        name: Row(partial(oracles.quadratic, kappa), quadratic_maps, MATRIX_AND_REST, NAMED)
        for name, kappa in QUADRATICS.items()
    },
    **{
        name: Row(partial(oracles.contraction, q), contraction_maps, SCALAR_AND_MATRIX, SCALAR_AND_REST, False)
        for name, q in CONTRACTIONS.items()
    },
    "equilibrium": EQUILIBRIUM,
    "equilibrium-batched": replace(EQUILIBRIUM, batch_dims=1),
}
PROBLEMS = tuple(ROWS)
HYPERTORCH = Row(oracles.hypertorch, partial(logistic_maps, penalty=lambda h: h, step=0.1), BOXED, BOXED, spread=0.1)


def tensors(arrays: tuple[np.ndarray, ...]) -> Any:
    """The arrays as one float64 tensor or a tuple of tensors, which is the argument of `Layout.pack`."""
    out = tuple(torch.from_numpy(np.array(a)) for a in arrays)
    return out[0] if len(out) == 1 else out


def arrays(layout: Layout, tree: Any) -> tuple[np.ndarray, ...]:
    """The flat float64 arrays of a pytree of hparams, which are the arguments of an oracle."""
    flat = layout.unpack(optree.tree_map(lambda leaf: torch.as_tensor(leaf).detach().double(), tree))
    return tuple(a.numpy() for a in (flat if isinstance(flat, tuple) else (flat,)))


def leaves(layout: Layout, flat: tuple[np.ndarray, ...], dtype: torch.dtype, requires_grad: bool = False) -> Any:
    """The packed pytree; its leaves are contiguous and share no memory."""
    return optree.tree_map(
        lambda leaf: leaf.to(dtype).clone().contiguous().requires_grad_(requires_grad), layout.pack(tensors(flat))
    )


def grads_of(layout: Layout, o: Oracle) -> list[np.ndarray]:
    """∇f as arrays in the leaf order of the hparams."""
    return [leaf.numpy() for leaf in optree.tree_leaves(layout.pack(tensors(o.grads)))]


def oracle_at(row: Row, hparams: Any, random: bool | int) -> Oracle:
    """The row's oracle at the given hparams; `random` seeds the data and, if no hparams are given, the hparams."""
    seed = int(random)
    if hparams is not None:
        return row.oracle(*arrays(row.hparams, hparams), seed=seed)
    default = row.oracle(seed=seed)
    if not seed:
        return default
    rng = np.random.default_rng(seed)
    return row.oracle(*(h + row.spread * rng.standard_normal(h.shape) for h in default.hparams), seed=seed)


def on_trees(row: Row, f: Map | None, packed: bool = True) -> Map | None:
    """Turn a map of flat vectors into a map of pytrees; with packed=False the result stays as it is (a scalar)."""
    if f is None:
        return None
    pack = row.params.pack if packed else (lambda value: value)
    return lambda params, hparams: pack(f(row.params.unpack(params), row.hparams.unpack(hparams)))


def build(name: str, row: Row, dtype: torch.dtype, hparams: Any, random: bool | int) -> Problem:
    """The named row as torch callables in `dtype`, with the oracle's numbers in float64."""
    o = oracle_at(row, hparams, random)
    maps = row.maps(o, lambda a: torch.as_tensor(a, dtype=dtype))
    phi = maps.phi or (lambda w, h: w - maps.step * maps.residual(w, h))
    jacobian = np.eye(o.matrix.shape[-1]) - maps.step * o.matrix
    return Problem(
        name=name,
        params=leaves(row.params, (o.solution,), dtype),
        hparams=leaves(row.hparams, o.hparams, dtype, requires_grad=True),
        outer_loss=on_trees(row, maps.outer, packed=False),
        inner_loss=on_trees(row, maps.inner, packed=False),
        fp_map=on_trees(row, phi),
        residual=on_trees(row, maps.residual),
        symmetric=row.symmetric,
        value=o.value,
        grads=grads_of(row.hparams, o),
        condition=float(o.conditions.max()) if row.batch_dims else o.condition,
        contraction=float(np.max(np.linalg.norm(jacobian, 2, axis=(-2, -1)))),
        batch_dims=row.batch_dims,
        adjoint=leaves(row.params, (o.adjoint,), dtype),
        step=maps.step,
    )


def problem(name: str, dtype: torch.dtype = torch.float64, hparams: Any = None, random: bool | int = False) -> Problem:
    """A row of DESIGN section 7; `hparams` has the row's structure; `random` (a seed) draws other data and hparams."""
    return build(name, ROWS[name], dtype, hparams, random)


def hypertorch(dtype: torch.dtype = torch.float64, hparams: Any = None, random: bool | int = False) -> Problem:
    """HyperTorch's logistic regression, solved exactly; fp_map is a gradient step of size .1; pytrees are [tensor]."""
    return build("hypertorch", HYPERTORCH, dtype, hparams, random)


def elastic_net_maps(o: Oracle, cast: Callable[[Any], Tensor]) -> Maps:
    """Φ = soft-threshold(w − s∇(smooth part), s e^{a₁}): non-smooth, but differentiable at the solution."""
    x, y, xv, yv = (cast(o.data[k]) for k in ("x", "y", "xv", "yv"))
    eigenvalues = np.linalg.eigvalsh(o.data["x"].T @ o.data["x"] / len(y)) + np.exp(o.hparams[0][1])
    step = float(2.0 / (eigenvalues[0] + eigenvalues[-1]))

    def phi(w: Tensor, h: Tensor) -> Tensor:
        u = w - step * (x.T @ (x @ w - y) / len(y) + h[1].exp() * w)
        return torch.sign(u) * torch.relu(u.abs() - step * h[0].exp())

    return Maps(outer=lambda w, h: mean_square(xv, yv, w), phi=phi, step=step)


ELASTIC_NET = Row(oracles.elastic_net, elastic_net_maps, TENSOR, SCALARS, symmetric=False, spread=0.1)


def elastic_net(dtype: torch.dtype = torch.float64, hparams: Any = None, random: bool | int = False) -> Problem:
    """Elastic net for implicit methods at w*: the inner problem has one form, fp_map, the proximal gradient step.

    A = I − ∂₁Φ is the identity off the support, so it is not symmetric. params is a tensor, hparams two 0-d tensors.
    """
    p = build("elastic-net", ELASTIC_NET, dtype, hparams, random)
    o = oracle_at(ELASTIC_NET, hparams, random)
    x, on = o.data["x"], o.solution != 0.0
    jacobian = on[:, None] * (np.eye(10) - p.step * (x.T @ x / len(x) + np.exp(o.hparams[0][1]) * np.eye(10)))
    adjoint = np.linalg.solve(np.eye(10) - jacobian.T, o.data["xv"].T @ (o.data["xv"] @ o.solution - o.data["yv"]))
    return replace(
        p,
        condition=float(np.linalg.cond(np.eye(10) - jacobian)),
        contraction=float(np.linalg.norm(jacobian, 2)),
        adjoint=leaves(TENSOR, (adjoint / len(o.data["yv"]),), dtype),
        step=1.0,
    )


def elastic_net_unrolled(
    dtype: torch.dtype = torch.float64, hparams: Any = None, random: bool | int = False, steps: int = 400
) -> Unrolled:
    """Elastic net by `steps` proximal gradient steps from zero, after which f and ∇f are those of the solution."""
    p = elastic_net(dtype, hparams, random)
    start = torch.zeros_like(p.params)
    return Unrolled(p.name, start, p.hparams, p.fp_map, steps, p.outer_loss, p.value, p.grads, p.params)


HEAVY_BALL = Row(oracles.heavy_ball, lambda o, cast: Maps(outer=lambda w, h: 0.5 * w @ w), hparams=SCALARS, spread=0.1)


def heavy_ball(dtype: torch.dtype = torch.float64, hparams: Any = None, random: bool | int = False) -> Unrolled:
    """30 heavy-ball steps; the state is {"v": velocity, "w": iterate}, hparams (log η, logit μ) two 0-d tensors."""
    o = oracle_at(HEAVY_BALL, hparams, random)
    h, start = (torch.as_tensor(o.data[k], dtype=dtype) for k in ("h", "start"))

    def step(state: dict[str, Tensor], hparams: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        v = torch.sigmoid(hparams[1]) * state["v"] + h * state["w"]
        return {"v": v, "w": state["w"] - torch.exp(hparams[0]) * v}

    return Unrolled(
        name="heavy-ball",
        start={"v": torch.zeros_like(start), "w": start.clone()},
        hparams=leaves(SCALARS, o.hparams, dtype, requires_grad=True),
        step=step,
        steps=o.data["steps"],
        outer_loss=lambda state, hparams: 0.5 * state["w"].square().sum(),
        value=o.value,
        grads=grads_of(SCALARS, o),
        final=torch.as_tensor(o.solution, dtype=dtype),
    )
