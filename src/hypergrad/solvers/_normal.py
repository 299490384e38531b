"""Krylov methods on the normal equations, for any A whose transposed product is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._solution import Status
from ._solver import IterativeSolver, Outcome, System, divide, event
from ._theory import Structure, doubled, rate_of, steps_needed


@dataclass(frozen=True, kw_only=True)
class NormalCG(IterativeSolver):
    """Conjugate gradients on the normal equations AᵀA x = Aᵀb, for any A; the condition number is squared.

        s = Aᵀr,   q = Ap,   α = sᵀs / qᵀq,   x ← x + αp,   r ← r − αq,   p ← s₊ + (s₊ᵀs₊ / sᵀs) p

    AᵀA is never formed. On an inconsistent singular system it ends as STAGNATED at a least-squares solution.

    Cost: one product with A and one with Aᵀ a step; five vectors beside b.
    Source: Hestenes and Stiefel 1952, section 10; the form is that of CGLS in Paige and Saunders 1982.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        >>> hg.solvers.NormalCG(rtol=1e-6)(op, torch.tensor([1.0, 2.0])).value.round(decimals=3)
        tensor([-0.5000,  2.0000])
    """

    def _iterate(self, system: System) -> Outcome:
        op, transposed, stop2, eps = system.op, system.op.T, system.stop**2, system.b.space.eps
        x, r = system.start()
        rr = r.dot(r)
        going, trace = rr > stop2, [rr]
        if not system.max_steps or system.finished(0, going):
            return Outcome(x, rr.sqrt().unsqueeze(0), 0)
        s = transposed(r)
        p = s.copy()
        ss, code = s.dot(s), None
        least = (10 * eps) ** 2 * ss
        del s  # saves a vector
        for k in range(system.max_steps):
            if k and system.finished(k, going):
                break
            code = event(code, going & (ss <= least), Status.STAGNATED)
            going = going & (ss > least)
            q = op(p)
            alpha = torch.where(going, divide(ss, q.dot(q)), 0.0)
            x.add_(p, alpha)
            r.add_(q, alpha, -1.0)
            del q
            rr = r.dot(r)
            trace.append(rr)
            going = going & (rr > stop2)
            if k + 1 < system.max_steps:
                s = transposed(r)
                ss, old = s.dot(s), ss
                p.scale_add_(divide(ss, old), s)
                del s
        return Outcome(x, torch.stack(trace).sqrt(), len(trace) - 1, code)

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """Two products a step, by the bound 2 ((κ − 1)/(κ + 1))^k on the residual; κ is that of A."""
        return doubled(steps_needed(rate_of(structure.condition), rtol, 2.0))


@dataclass(frozen=True, kw_only=True)
class LSQR(IterativeSolver):
    """Golub–Kahan bidiagonalisation: min ‖Ax − b‖ for any A, more accurate than NormalCG if A is ill-conditioned.

        βu = Av − αu,   αv = Aᵀu − βv,   one rotation (c, s) a step;   ‖r‖ = φ̄,   ‖Aᵀr‖ = φ̄ α |c|

    On an inconsistent singular system it ends as STAGNATED at the least-squares solution.

    Cost: one product with A and one with Aᵀ a step; four vectors beside b.
    Source: Paige and Saunders 1982.

    Example:
        >>> import torch, hypergrad as hg
        >>> op = hg.operators.matrix(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
        >>> hg.solvers.LSQR(rtol=1e-6)(op, torch.tensor([1.0, 2.0])).value.round(decimals=3)
        tensor([-0.5000,  2.0000])
    """

    def _iterate(self, system: System) -> Outcome:
        op, transposed, stop, eps = system.op, system.op.T, system.stop, system.b.space.eps
        x, u = system.start()
        beta = u.norm()
        going, code, trace = beta > stop, None, [beta]
        if not system.max_steps or system.finished(0, going):
            return Outcome(x, beta.unsqueeze(0), 0)
        u.scale_(divide(1.0, beta))
        v = transposed(u).copy()
        alpha = v.norm()
        v.scale_(divide(1.0, alpha))
        w = v.copy()
        rho_bar, phi_bar, size = alpha, beta, alpha
        flat = alpha == 0
        for k in range(system.max_steps):
            if k and system.finished(k, going):
                break
            code = event(code, going & flat, Status.STAGNATED)
            going = going & ~flat
            u.scale_add_(-alpha, op(v))
            beta = u.norm()
            u.scale_(divide(1.0, beta))
            rho = torch.hypot(rho_bar, beta)
            c, s = divide(rho_bar, rho), divide(beta, rho)
            x.add_(w, torch.where(going, divide(c * phi_bar, rho), 0.0))
            phi_bar = torch.where(going, s * phi_bar, phi_bar)
            trace.append(phi_bar)
            going = going & (phi_bar > stop)
            if k + 1 < system.max_steps:
                v.scale_add_(-beta, transposed(u))
                alpha = v.norm()
                v.scale_(divide(1.0, alpha))
                w.scale_add_(-divide(s * alpha, rho), v)
                rho_bar = -c * alpha
                size = torch.maximum(size, torch.hypot(alpha, beta))
                flat = alpha * c.abs() <= 10 * eps * size
        return Outcome(x, torch.stack(trace), len(trace) - 1, code)

    def products_needed(self, structure: Structure, rtol: float = 1e-6) -> float | None:
        """As NormalCG, which is the same method in exact arithmetic (Paige and Saunders 1982)."""
        return NormalCG().products_needed(structure, rtol)
