"""A convex training problem: its minimiser, retraining and curvature in NumPy, and its losses in torch, in float64."""

from __future__ import annotations

import functools

import numpy as np
import torch

N, D, C, Q = 23, 4, 3, 5
PENALTY = 0.05


@functools.cache
def data() -> tuple[np.ndarray, ...]:
    random = np.random.RandomState(0)
    x, xq = random.randn(N, D), random.randn(Q, D)
    return x, random.randint(0, C, N), xq, random.randint(0, C, Q)


def probabilities(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    z = x @ w.reshape(D, C)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def losses(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -np.log(probabilities(w, x)[np.arange(len(y)), y])


def gradients(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[rows, D C]."""
    return np.einsum("id,ic->idc", x, probabilities(w, x) - np.eye(C)[y]).reshape(len(y), -1)


def curvature(w: np.ndarray, weights: np.ndarray) -> np.ndarray:
    x, p = data()[0], probabilities(w, data()[0])
    inner = np.einsum("ic,ce->ice", p, np.eye(C)) - np.einsum("ic,ie->ice", p, p)
    blocks = np.einsum("i,id,ie,icf->dcef", weights, x, x, inner) / N
    return blocks.reshape(D * C, D * C) + 2 * PENALTY * np.eye(D * C)


def fitted(weights: np.ndarray) -> np.ndarray:
    """argmin (1/n) Σ ωᵢ ℓᵢ + .05‖w‖² by Newton's method."""
    w = np.zeros(D * C)
    for _ in range(30):
        slope = weights @ gradients(w, *data()[:2]) / N + 2 * PENALTY * w
        w = w - np.linalg.solve(curvature(w, weights), slope)
    return w


@functools.cache
def retraining(step: float = 1e-4) -> np.ndarray:
    """∂(losses of the queries)/∂(weights of examples) by central differences of retrainings: [Q, N]."""
    columns = []
    for i in range(N):
        moved = [losses(fitted(np.ones(N) + sign * step * np.eye(N)[i]), *data()[2:]) for sign in (1, -1)]
        columns.append((moved[0] - moved[1]) / (2 * step))
    return np.stack(columns, 1)


def dense(damping: float = 0.0) -> np.ndarray:
    """−∇ℓ_qᵀ(A + γI)⁻¹∇ℓᵢ / n."""
    w = fitted(np.ones(N))
    a = curvature(w, np.ones(N)) + damping * np.eye(D * C)
    return -gradients(w, *data()[2:]) @ np.linalg.solve(a, gradients(w, *data()[:2]).T) / N


# The problem in torch.
def tensors() -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(array) for array in data())


def solution() -> dict[str, torch.Tensor]:
    w = torch.tensor(fitted(np.ones(N)).reshape(D, C))
    return {"rows": w[:3].clone(), "last": w[3:].clone()}


def outputs(params, batch):
    return batch[0] @ torch.cat([params["rows"], params["last"]])


def of_outputs(z, batch):
    return torch.nn.functional.cross_entropy(z, batch[1], reduction="none")


def loss(params, batch):
    return of_outputs(outputs(params, batch), batch)


def penalty(params):
    return PENALTY * sum((w**2).sum() for w in params.values())


def batches(size: int = 7):
    x, y, _, _ = tensors()
    return list(zip(x.split(size), y.split(size), strict=True))


def queries(size: int = 3):
    _, _, x, y = tensors()
    return list(zip(x.split(size), y.split(size), strict=True))


def problem(curvature: str = "Hessian", **changes):
    """The arguments of influence.scores."""
    form = {"train_loss": loss} if curvature == "Hessian" else {"train_loss": of_outputs, "model": outputs}
    common = {"query_loss": loss, "params": solution(), "train": batches(), "queries": queries(), "penalty": penalty}
    return form | common | changes
