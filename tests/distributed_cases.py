"""The cases of tests/test_distributed.py for two ranks; each compares with a computation on all data in one process."""

from __future__ import annotations

import os
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn
from torch.nn.functional import softplus

F64 = torch.float64
ROWS, D = 14, 4


def data():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=F64, generator=random) for shape in ((ROWS, D), (ROWS,), (10, D), (10,))]


def local(x, rank, uneven=False):
    """The rows of this rank: one half each or, if uneven, 9 rows for rank 0 and the rest for rank 1."""
    cut = 9 if uneven else len(x) // 2
    return (x[:cut], x[cut:])[rank]


def model(w, x):
    return torch.tanh(x @ w["w"]) @ w["v"] + w["b"]


def inner_loss(w, lam, x, y):
    fit = softplus(-y.sign() * (x @ w["w"] + w["b"])).mean()
    return fit + (lam.exp() * w["w"] ** 2).sum() / 2 + w["b"] ** 2 / 2


def outer_loss(w, lam, x, y):
    return softplus(-y.sign() * (x @ w["w"] + w["b"])).mean() + 0.01 * lam.square().sum()


def solved():
    x, y = data()[:2]
    w = {"w": torch.zeros(D, dtype=F64, requires_grad=True), "b": torch.zeros((), dtype=F64, requires_grad=True)}
    optimizer = torch.optim.LBFGS(w.values(), max_iter=300, tolerance_grad=1e-13, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = inner_loss(w, torch.full((D,), -1.0, dtype=F64), x, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: x.detach() for name, x in w.items()}


def hparams():
    return torch.full((D,), -1.0, dtype=F64, requires_grad=True)


def gap(mine, theirs):
    """The largest relative difference over all leaves; DTensors are gathered first."""
    import optree

    pairs = zip(optree.tree_leaves(mine), optree.tree_leaves(theirs), strict=True)
    whole = [((a.full_tensor() if hasattr(a, "full_tensor") else a).detach(), b.detach()) for a, b in pairs]
    return max(float((a - b).norm() / b.norm()) for a, b in whole)


class Cases:
    """Each method case_* returns {name: relative difference}; `rank` is the rank of this process."""

    def __init__(self, rank):
        import hypergrad as hg

        self.hg, self.rank, self.w = hg, rank, solved()
        self.all, self.mine = data(), [local(x, rank) for x in data()]

    def both(self, tree):
        return self.hg.distributed.replicated(tree)

    def losses(self, uneven=False):
        """(inner, outer) of this rank's rows, at replicated arguments, and then (inner, outer) of all rows."""
        x, y, xv, yv = [local(x, self.rank, uneven) for x in data()] if uneven else self.mine
        weight = self.hg.distributed.share(len(y)) if uneven else 1.0
        valid_weight = self.hg.distributed.share(len(yv)) if uneven else 1.0

        def penalty(w, lam):
            return (lam.exp() * w["w"] ** 2).sum() / 2 + w["b"] ** 2 / 2

        def inner(w, lam):
            if uneven:
                time.sleep(0.05 * self.rank)  # a slower rank must not change any decision
            w, lam = self.both((w, lam))
            return weight * (inner_loss(w, lam, x, y) - penalty(w, lam)) + penalty(w, lam)

        def outer(w, lam):
            w, lam = self.both((w, lam))
            regular = 0.01 * lam.square().sum()
            return valid_weight * (outer_loss(w, lam, xv, yv) - regular) + regular

        whole = data()
        return (
            inner,
            outer,
            lambda w, lam: inner_loss(w, lam, *whole[:2]),
            lambda w, lam: outer_loss(w, lam, *whole[2:]),
        )

    def case_solvers(self):
        hg, found = self.hg, {}
        inner, outer, whole_inner, whole_outer = self.losses()
        s = hg.solvers
        rows = {
            "default": None,
            "CG": s.CG(rtol=1e-12),
            "CG fixed": s.CG(max_steps=3, on_failure="ignore"),
            "MINRES": s.MINRES(rtol=1e-12),
            "GMRES": s.GMRES(rtol=1e-12),
            "BiCGStab": s.BiCGStab(rtol=1e-12),
            "LSQR": s.LSQR(rtol=1e-12),
            "NormalCG": s.NormalCG(rtol=1e-12),
            "Neumann": s.Neumann(step_size=0.5, max_steps=300, rtol=1e-12),
            "Dense": s.Dense(),
            "Nystrom": s.Nystrom(rank=3, damping=1e-2, on_failure="ignore"),
        }
        for name, solver in rows.items():
            for compiled in (False, True) if name == "CG" else (False,):
                results = [
                    hg.implicit.grad(
                        f, inner_loss=g, params=self.w, hparams=hparams(), solver=solver, compile=compiled
                    ).grads
                    for f, g in ((outer, inner), (whole_outer, whole_inner))
                ]
                found[f"implicit.grad {name}{' compiled' if compiled else ''}"] = gap(*results)
        return found

    def case_uneven_batches(self):
        inner, outer, whole_inner, whole_outer = self.losses(uneven=True)
        results = [
            self.hg.implicit.grad(f, inner_loss=g, params=self.w, hparams=hparams()).grads
            for f, g in ((outer, inner), (whole_outer, whole_inner))
        ]
        return {"uneven": gap(*results)}

    def case_sums(self):
        """A Sum over the batches of each rank, which communicates once for each pass over them."""
        hg, (x, y) = self.hg, self.mine[:2]
        _, outer, whole_inner, whole_outer = self.losses()

        def row_loss(w, lam, batch):
            return softplus(-batch[1].sign() * (batch[0] @ w["w"] + w["b"])).sum() / len(y)

        total = hg.operators.Sum(
            row_loss,
            list(zip(x.split(3), y.split(3), strict=True)),
            penalty=lambda w, lam: (lam.exp() * w["w"] ** 2).sum() / 2 + w["b"] ** 2 / 2,
        )
        results = [
            hg.implicit.grad(f, inner_loss=g, params=self.w, hparams=hparams(), solver=hg.solvers.CG(rtol=1e-12)).grads
            for f, g in ((outer, lambda w, lam: total(*self.both((w, lam)))), (whole_outer, whole_inner))
        ]
        return {"Sum": gap(*results)}

    def case_unrolled(self):
        hg, found = self.hg, {}
        inner, outer, whole_inner, whole_outer = self.losses()
        start = {name: torch.zeros_like(x) for name, x in self.w.items()}

        def step_of(g):
            def step(w, lam):
                slopes = torch.autograd.grad(g(w, lam), list(w.values()), create_graph=True)
                return {name: x - 0.3 * d for (name, x), d in zip(w.items(), slopes, strict=True)}

            return step

        truth = hg.unroll.reverse(step_of(whole_inner), start, hparams(), whole_outer, steps=6).grads
        for memory in ("graph", "iterates", "sqrt"):
            mine = hg.unroll.reverse(step_of(inner), start, hparams(), outer, steps=6, memory=memory).grads
            found[f"unroll.reverse {memory}"] = gap(mine, truth)
        found["unroll.forward"] = gap(hg.unroll.forward(step_of(inner), start, hparams(), outer, steps=6).grads, truth)
        return found

    def case_minimiser_as_a_value(self):
        hg = self.hg
        inner, outer, whole_inner, whole_outer = self.losses()

        def derivatives(g, f):
            lam = hparams()
            value = f(hg.implicit.argmin(g, self.w, lam, solver=hg.solvers.CG(rtol=1e-13)), lam)
            (first,) = torch.autograd.grad(value, lam, create_graph=True)
            return first, torch.autograd.grad(first.square().sum(), lam)[0]

        return {"argmin, second order": gap(derivatives(inner, outer), derivatives(whole_inner, whole_outer))}

    def case_meta(self):
        hg = self.hg
        random = torch.Generator().manual_seed(5)
        tasks = {
            "x": torch.randn(3, ROWS, D, dtype=F64, generator=random),
            "y": torch.randn(3, ROWS, dtype=F64, generator=random),
        }
        mine = {name: x.chunk(2, 1)[self.rank] for name, x in tasks.items()}
        start = {name: torch.zeros_like(x).requires_grad_() for name, x in self.w.items()}

        def task_loss(w, start, task):
            return ((task["x"] @ w["w"] + w["b"] - task["y"]) ** 2).mean()

        def ranked(loss):
            return lambda w, start, task: loss(*self.both((w, start)), task)

        found = {}
        for name, method in (("Unrolled", hg.meta.Unrolled()), ("Implicit", hg.meta.Implicit())):
            results = [
                hg.meta.grad(f, hg.meta.biased(f, strength=2.0), start, data, method=method, steps=30).grads
                for f, data in ((ranked(task_loss), mine), (task_loss, tasks))
            ]
            found[f"meta {name}"] = gap(*results)
        return found

    def case_trackers(self):
        hg, found = self.hg, {}
        B = hg.bilevel
        inner, outer, whole_inner, whole_outer = self.losses()
        makers = {
            "SOBA": lambda w, h, f, g: B.SOBA(w, h, average=0.5),
            "STORM": lambda w, h, f, g: B.SOBA(w, h, recursive=0.3),
            "AmIGO": lambda w, h, f, g: B.AmIGO(w, h, steps=3),
            "SABA": lambda w, h, f, g: B.SABA(w, h, batches=(1, 1)),
            "SRBA": lambda w, h, f, g: B.SRBA(w, h, period=2, full=lambda: ([lambda: f(w, h)], [lambda: g(w, h)])),
            "F2SA": lambda w, h, f, g: B.F2SA(w, h),
            "BOME": lambda w, h, f, g: B.BOME(w, h, steps=3),
            "SAMA": lambda w, h, f, g: B.SAMA(w, h, lr=0.1),
        }
        for name, make in makers.items():
            ends = []
            for f, g in ((outer, inner), (whole_outer, whole_inner)):
                w, lam = {k: (1.3 * x).requires_grad_() for k, x in self.w.items()}, hparams()
                tracker = make(w, lam, f, g)
                optimizer = torch.optim.SGD([*w.values(), lam], lr=0.1)
                for _ in range(6):
                    extra = {"index": (0, 0)} if name == "SABA" else {}
                    tracker.backward(lambda: f(w, lam), lambda: g(w, lam), **extra)  # noqa: B023
                    optimizer.step()
                    tracker.step()
                    optimizer.zero_grad()
                ends.append([*(x.detach() for x in w.values()), lam.detach()])
            found[f"bilevel {name}"] = gap(*ends)
        return found

    def network(self):
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def fit(self, net, x, y):
        return (net(x).squeeze(1) - y).square().mean()

    def network_losses(self, net, call, lam, rows):
        x, y, xv, yv = rows
        weights = dict(net.named_parameters()) if call is None else None
        evaluate = call or net

        def penalised():
            return self.fit(evaluate, x, y)

        return penalised, lambda: self.fit(evaluate, xv, yv), weights

    def case_live_modules(self):
        """hg.distributed.call takes a live module and its DDP wrapper, which still trains normally afterwards."""
        hg, found = self.hg, {}
        one = hg.solvers.CG(max_steps=4, damping=5.0, on_failure="ignore")

        def hypergradient(net, evaluate, rows, decay):
            x, y, xv, yv = rows
            lam = hparams()[0].detach().requires_grad_()
            shared = self.both(lam) if decay else lam
            train = self.fit(evaluate, x, y) + shared.exp() * sum(
                p.square().sum() for p in (self.both(list(net.parameters())) if decay else net.parameters())
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hg.UnsolvedInnerProblem)
                warnings.simplefilter("ignore", hg.InaccurateHypergradient)
                result = hg.implicit.grad(
                    self.fit(evaluate, xv, yv), inner_loss=train, params=net.parameters(), hparams=[lam], solver=one
                )
            return result.grads

        whole = self.network()
        truth = hypergradient(whole, whole, self.all, False)
        plain = self.network()
        found["live module"] = gap(
            hypergradient(plain, lambda x: hg.distributed.call(plain, x), self.mine, True), truth
        )
        wrapped = nn.parallel.DistributedDataParallel(self.network())
        found["DistributedDataParallel"] = gap(
            hypergradient(wrapped.module, lambda x: hg.distributed.call(wrapped, x), self.mine, True), truth
        )
        self.fit(wrapped, *self.mine[:2]).backward()
        self.fit(whole, *self.all[:2]).backward()
        found["an ordinary step afterwards"] = gap(
            [p.grad for p in wrapped.parameters()], [p.grad for p in whole.parameters()]
        )
        return found

    def case_sharded(self):
        """Params may be DTensors that losses gather: the hypergradient is the same, the adjoint sharded as params."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

        hg, found = self.hg, {}
        mesh = init_device_mesh("cpu", (2,))
        _, _, whole_inner, whole_outer = self.losses()
        sharded = {
            name: distribute_tensor(x, mesh, [Shard(0) if x.ndim else Replicate()]) for name, x in self.w.items()
        }
        x, y, xv, yv = self.mine

        def inner(w, lam):
            w, lam = hg.distributed.gathered((w, lam))
            return inner_loss(w, lam, x, y)

        def outer(w, lam):
            w, lam = hg.distributed.gathered((w, lam))
            return outer_loss(w, lam, xv, yv)

        for name, solver in {
            "CG": hg.solvers.CG(rtol=1e-12),
            "MINRES": hg.solvers.MINRES(rtol=1e-12),
            "Neumann": hg.solvers.Neumann(step_size=0.5, max_steps=300, rtol=1e-12),
        }.items():
            mine = hg.implicit.grad(outer, inner_loss=inner, params=sharded, hparams=hparams(), solver=solver)
            truth = hg.implicit.grad(
                whole_outer, inner_loss=whole_inner, params=self.w, hparams=hparams(), solver=solver
            )
            found[f"sharded {name}"] = gap(mine.grads, truth.grads)
            assert mine.adjoint["w"].placements == (Shard(0),)
        return found

    def case_sharded_along_a_later_axis(self):
        """A matrix may be sharded by columns; tangents, vectors and the adjoint are then sharded by columns too."""
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        hg, found, mesh = self.hg, {}, init_device_mesh("cpu", (2,))
        (x, y, xv, yv), lam = self.all, hparams()[:2].detach()
        w = torch.randn(D, 2, dtype=F64, generator=torch.Generator().manual_seed(3)) / 5

        def output(w, x):
            return torch.tanh(x @ w).sum(1)

        def losses(rows, whole):
            return hg.operators.GaussNewton(
                lambda w, h: output(whole(w), rows[0]),
                lambda z, h: (z - rows[1]).square().mean(),
                lambda w, h: (whole(h).exp() * whole(w).square()).sum(),
            ), lambda w, h: (output(whole(w), rows[2]) - rows[3]).square().mean()

        def results(start, inner, outer):
            def step(w, h):
                return w - 0.1 * torch.autograd.grad(inner(w, h), w, create_graph=True)[0]

            solver = hg.solvers.CG(max_steps=5, damping=5.0, on_failure="ignore")
            forward = hg.unroll.forward(step, start, lam.clone().requires_grad_(), outer, steps=4)
            problem = {"params": start, "solver": solver}
            return forward, *(
                hg.implicit.grad(outer, inner_loss=g, hparams=lam.clone().requires_grad_(), **problem)
                for g in (lambda w, h: inner(w, h), inner)
            )

        truth = results(w, *losses((x, y, xv, yv), lambda t: t))
        mine = results(distribute_tensor(w, mesh, [Shard(1)]), *losses(self.mine, hg.distributed.gathered))
        for name, one, other in zip(("unroll.forward", "implicit.grad", "GaussNewton"), mine, truth, strict=True):
            found[f"{name}, Shard(1)"] = gap(one.grads, other.grads)
        assert mine[0].params.placements == mine[1].adjoint.placements == (Shard(1),)
        return found

    def case_hparams_of_one_rank_each(self):
        """Each rank may hold a part of λ: its gradient is that of the rank's loss, twice that of the mean loss."""
        hg, found, (xv, yv) = self.hg, {}, self.mine[2:]

        def inner(w, h, x, y):
            errors = softplus(-y.sign() * (x @ w["w"] + w["b"]))
            return (h.exp() * errors).mean() + 0.1 * (w["w"].square().sum() + w["b"] ** 2)

        table = torch.linspace(-1, 1, ROWS, dtype=F64)
        own, whole = local(table, self.rank).clone().requires_grad_(), table.clone().requires_grad_()
        own_x, own_y, all_x, all_y = *self.mine[:2], *self.all[:2]
        for name, solver in {"CG": hg.solvers.CG(rtol=1e-12), "default": None}.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hg.UnsolvedInnerProblem)
                mine = hg.implicit.grad(
                    lambda w, h: outer_loss(self.both(w), hparams().detach(), xv, yv),
                    inner_loss=lambda w, h: inner(self.both(w), h, own_x, own_y),
                    params=self.w,
                    hparams=own,
                    solver=solver,
                ).grads
                truth = hg.implicit.grad(
                    lambda w, h: outer_loss(w, hparams().detach(), *self.all[2:]),
                    inner_loss=lambda w, h: inner(w, h, all_x, all_y),
                    params=self.w,
                    hparams=whole,
                    solver=solver,
                ).grads
            found[f"hparams of one rank each, {name}"] = gap(mine / 2, local(truth, self.rank))
        ends = []
        for h, rows, copies in ((own, self.mine, self.both), (whole, self.all, lambda t: t)):
            w = {k: x.clone().requires_grad_() for k, x in self.w.items()}
            tracker = hg.bilevel.SOBA(w, [h])
            for _ in range(3):
                tracker.backward(
                    outer_loss(copies(w), hparams().detach(), *rows[2:]), inner(copies(w), h, rows[0], rows[1])
                )
                tracker.step()
            ends.append(h.grad)
        found["hparams of one rank each, SOBA"] = gap(ends[0] / 2, local(ends[1], self.rank))
        return found

    def case_tensor_parallel_and_fsdp_params(self):
        """Tensor parallelism, and FSDP2 parameters in a module without hooks, are exact; FSDP2's hooks are refused."""
        from copy import deepcopy

        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        hg, found, mesh = self.hg, {}, init_device_mesh("cpu", (2,))
        solver = hg.solvers.CG(max_steps=4, damping=5.0, on_failure="ignore")

        def hypergradient(call, params, rows, whole):
            x, y, xv, yv = rows

            def inner(w, lam):
                return whole(lam).exp().sum() * self.fit(lambda x: call(whole(w), x), x, y)

            def outer(w, lam):
                return self.fit(lambda x: call(whole(w), x), xv, yv)

            return hg.implicit.grad(outer, inner_loss=inner, params=params, hparams=hparams(), solver=solver).grads

        def of(net):
            return lambda w, x: torch.func.functional_call(net, w, (x,))

        net = self.network()
        w = {name: p.detach() for name, p in net.named_parameters()}
        truth = hypergradient(of(net), w, self.all, lambda t: t)
        skeleton, sharded = deepcopy(net), fully_shard(deepcopy(net), mesh=mesh)
        found["FSDP2, a copy without hooks"] = gap(
            hypergradient(of(skeleton), dict(sharded.named_parameters()), self.mine, hg.distributed.gathered), truth
        )
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallel = parallelize_module(deepcopy(net), mesh, plan)
        weights = {name: p.detach().requires_grad_() for name, p in parallel.named_parameters()}
        found["tensor parallelism"] = gap(hypergradient(of(parallel), weights, self.all, lambda t: t), truth)

        x, y, xv, yv = self.mine
        lam = torch.zeros((), dtype=F64, requires_grad=True)
        refused = {
            "an evaluated loss": lambda: hg.implicit.grad(
                self.fit(sharded, xv, yv),
                inner_loss=self.both(lam).exp() * self.fit(sharded, x, y),
                params=sharded.parameters(),
                hparams=[lam],
            ),
            "call": lambda: hg.distributed.call(sharded, x),
        }
        for name, run in refused.items():
            try:
                run()
            except (TypeError, ValueError) as error:
                assert "gathered" in str(error), (name, error)
            else:
                raise AssertionError(f"{name}: second derivatives through FSDP2's hooks")
        return found

    def case_mixed_precision(self):
        """FSDP2 with bfloat16 products and float32 params: directions have bfloat16 accuracy, gradients are float32."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import init_device_mesh

        hg, mesh = self.hg, init_device_mesh("cpu", (2,))
        B = hg.bilevel
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        makers = {
            "F2SA": lambda w, h: B.F2SA(w, h, penalty=2.0, lr=0.05),
            "BOME": lambda w, h: B.BOME(w, h, steps=4, lr=0.2, eta=5.0),
            "SAMA": lambda w, h: B.SAMA(w, h, lr=0.05, radius=1.0),
        }

        def direction(net, make, rows, share):
            x, y, xv, yv = rows
            lam = torch.zeros((), dtype=net[0].weight.dtype, requires_grad=True)
            tracker = make(list(net.parameters()), [lam])
            for _ in range(8):
                for p in (*net.parameters(), lam):
                    p.grad = None
                tracker.backward(
                    lambda: self.fit(net, xv, yv),
                    lambda: (self.both(lam) if share else lam).exp() * self.fit(net, x, y),
                )
                tracker.step()
            assert {p.grad.dtype for p in (*net.parameters(), lam)} == {lam.dtype}
            return lam.grad.double()

        for name, make in makers.items():
            truth = direction(self.network(), make, self.all, False)
            net = fully_shard(self.network().float(), mesh=mesh, mp_policy=policy)
            mine = direction(net, make, [x.float() for x in self.mine], True)
            assert abs(float(mine - truth)) < 0.2 * abs(float(truth)), (name, mine, truth)
        return {}

    def case_everywhere(self):
        """everywhere takes local losses of plain or sharded params; arguments after hparams are passed unchanged."""
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        hg, found, mesh = self.hg, {}, init_device_mesh("cpu", (2,))
        (x, y, xv, yv), everywhere = self.mine, hg.distributed.everywhere
        _, _, whole_inner, whole_outer = self.losses()
        outer, batched = everywhere(lambda w, h: outer_loss(w, h, xv, yv)), everywhere(inner_loss)
        solver = hg.solvers.CG(rtol=1e-12)
        truth = hg.implicit.grad(whole_outer, inner_loss=whole_inner, params=self.w, hparams=hparams(), solver=solver)
        for name, w in (
            ("plain", self.w),
            ("sharded", self.w | {"w": distribute_tensor(self.w["w"], mesh, [Shard(0)])}),
        ):
            result = hg.implicit.grad(
                outer, inner_loss=lambda w, h: batched(w, h, x, y), params=w, hparams=hparams(), solver=solver
            )
            found[f"everywhere, {name}"] = gap(result.grads, truth.grads)
        return found

    def case_an_error_of_one_rank(self):
        """An error on one rank within `together` is raised on both ranks by each function, and both can go on."""
        hg, (x, y, xv, yv) = self.hg, self.mine

        def inner(w, lam, fail):
            w, lam = self.both((w, lam))
            with hg.distributed.together():
                if fail and self.rank == 1:
                    raise KeyError("a batch that is spoilt")
                return inner_loss(w, lam, x, y)

        def outer(w, lam):
            return outer_loss(*self.both((w, lam)), xv, yv)

        w, lam = {k: v.clone().requires_grad_() for k, v in self.w.items()}, hparams()
        total = hg.operators.Sum(lambda w, lam, fail: inner(w, lam, fail) / 2, [False, True])
        problem = {"params": self.w, "hparams": lam}
        everywhere = hg.distributed.everywhere(lambda w, lam: 1 / 0 if self.rank else inner_loss(w, lam, x, y))
        entry_points = {
            "everywhere": lambda: hg.implicit.grad(outer, inner_loss=everywhere, **problem),
            "implicit.grad": lambda: hg.implicit.grad(outer, inner_loss=lambda w, h: inner(w, h, True), **problem),
            "implicit.backward": lambda: hg.implicit.backward(
                outer, inner_loss=lambda w, h: inner(w, h, True), **problem
            ),
            "Sum": lambda: hg.implicit.grad(outer, inner_loss=total, **problem),
            "SOBA": lambda: hg.bilevel.SOBA(w, lam).backward(outer(w, lam), inner(w, lam, True)),
            "F2SA": lambda: hg.bilevel.F2SA(w, lam).backward(lambda: outer(w, lam), lambda: inner(w, lam, True)),
        }
        for name, run in entry_points.items():
            try:
                run()
            except (KeyError, ZeroDivisionError):
                assert self.rank == 1, name
            except RuntimeError as error:
                assert self.rank == 0 and "rank 1 failed" in str(error), (name, error)
            else:
                raise AssertionError(f"{name}: no error")
            assert lam.grad is None and all(v.grad is None for v in w.values())
        whole = self.losses()[2:]
        after = hg.implicit.grad(outer, inner_loss=lambda w, h: inner(w, h, False), **problem).grads
        truth = hg.implicit.grad(whole[1], inner_loss=whole[0], **problem).grads
        return {"after errors": gap(after, truth)}

    def case_fsdp(self):
        """FSDP2 modules work unchanged with algorithms without second derivatives, and raise an error with others."""
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import init_device_mesh

        hg, found = self.hg, {}
        B = hg.bilevel
        mesh = init_device_mesh("cpu", (2,))
        makers = {
            "F2SA": lambda w, h: B.F2SA(w, h, lr=0.05),
            "BOME": lambda w, h: B.BOME(w, h, steps=2, lr=0.05),
            "SAMA": lambda w, h: B.SAMA(w, h, lr=0.05),
        }

        def train(net, make, rows, share):
            x, y, xv, yv = rows
            lam = torch.zeros((), dtype=F64, requires_grad=True)
            tracker = make(list(net.parameters()), [lam])
            optimizer = torch.optim.SGD([*net.parameters(), lam], lr=0.05, foreach=False)
            for _ in range(4):

                def inner():
                    weight = (self.both(lam) if share else lam).exp()
                    return weight * self.fit(net, x, y)

                tracker.backward(lambda: self.fit(net, xv, yv), inner)
                optimizer.step()
                tracker.step()
                optimizer.zero_grad()
            return [*(p.detach() for p in net.parameters()), lam.detach()]

        def sharded_network():
            net = self.network()
            fully_shard(net[0], mesh=mesh)
            return fully_shard(net, mesh=mesh)

        for name, make in makers.items():
            truth = train(self.network(), make, self.all, False)
            found[f"FSDP2 {name}"] = gap(train(sharded_network(), make, self.mine, True), truth)
        net, lam = sharded_network(), torch.zeros((), dtype=F64, requires_grad=True)
        try:
            B.SOBA(list(net.parameters()), [lam]).backward(
                self.fit(net, *self.mine[2:]), self.both(lam).exp() * self.fit(net, *self.mine[:2])
            )
        except ValueError as error:
            assert "gathered" in str(error), error
        else:
            raise AssertionError("SOBA took second derivatives through FSDP2's hooks")
        return found

    def case_local_losses_warn(self):
        hg = self.hg
        x, y, xv, yv = self.mine
        wrapped = nn.parallel.DistributedDataParallel(self.network())
        mean_over_ranks = torch.distributed.nn.functional.all_reduce
        calls = {
            "functions": lambda: hg.implicit.grad(
                lambda w, lam: outer_loss(w, lam, xv, yv),
                inner_loss=lambda w, lam: inner_loss(w, lam, x, y),
                params=self.w,
                hparams=hparams(),
            ),
            "steps": lambda: hg.unroll.reverse(
                lambda w, lam: {k: v * lam.exp().sum() for k, v in w.items()},
                self.w,
                hparams(),
                lambda w, lam: outer_loss(*hg.distributed.replicated((w, lam)), xv, yv),
                steps=2,
            ),
            "outer loss of steps": lambda: hg.unroll.forward(
                lambda w, lam: {k: v * self.both(lam).exp().sum() for k, v in w.items()},
                self.w,
                hparams(),
                lambda w, lam: outer_loss(w, lam, xv, yv),
                steps=2,
            ),
            "an all-reduced loss": lambda: hg.implicit.grad(
                lambda w, lam: outer_loss(*self.both((w, lam)), xv, yv),
                inner_loss=lambda w, lam: mean_over_ranks(inner_loss(w, lam, x, y)) / 2,
                params=self.w,
                hparams=hparams(),
            ),
            "DistributedDataParallel": lambda: hg.bilevel.SOBA(wrapped.parameters(), [lam := hparams()]).backward(
                self.fit(wrapped, xv, yv), self.fit(wrapped, x, y) * lam.exp().sum()
            ),
        }
        for name, run in calls.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
            assert any("this rank's data alone" in str(w.message) for w in caught), name
        return {}


def sharded_training(net, lam, rows, steps, tracker, optimizer, shared):
    """Train a network, which may be sharded, by F2SA."""
    x, y, xv, yv = rows
    for _ in range(steps):

        def inner():
            return shared(lam).exp() * (net(x).squeeze(1) - y).square().mean()

        tracker.backward(lambda: (net(xv).squeeze(1) - yv).square().mean(), inner)
        for each in (optimizer, tracker):
            each.step()
        optimizer.zero_grad()


def save_from_two(rank, store, folder):
    """Train an FSDP2 module by three steps of F2SA, and save the state by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    import hypergrad as hg

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = fully_shard(Cases(rank).network(), mesh=init_device_mesh("cpu", (2,)))
    lam = torch.zeros((), dtype=F64, requires_grad=True)
    tracker = hg.bilevel.F2SA(list(net.parameters()), [lam], lr=0.05)
    optimizer = torch.optim.SGD([*net.parameters(), lam], lr=0.05, foreach=False)
    rows = [local(x, rank) for x in data()]
    sharded_training(net, lam, rows, 3, tracker, optimizer, hg.distributed.replicated)
    dcp.save({"model": net.state_dict(), "lam": lam.detach(), "tracker": tracker.state_dict()}, checkpoint_id=folder)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def die(rank, store, folder):
    """End rank 1 in the middle of a solve; rank 0 writes the error that it gets."""
    import hypergrad as hg

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, y = (local(x, rank) for x in data()[:2])
    evaluations = 0

    def inner(w, lam):
        nonlocal evaluations
        evaluations += 1
        if rank == 1 and evaluations == 3:
            os._exit(3)
        return inner_loss(*hg.distributed.replicated((w, lam)), x, y)

    try:
        for _ in range(5):
            hg.implicit.grad(lambda w, lam: w["w"].sum(), inner_loss=inner, params=solved(), hparams=hparams())
    except RuntimeError as error:
        (Path(folder) / "error").write_text(str(error))
    os._exit(0)


def run(rank, store, results):
    """Run all cases as one rank; rank 0 writes the differences, and a rank that fails writes its error."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*CPU.*|.*deprecated.*|.*barrier.*", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*this rank's data alone")  # each rank computes the truth by itself
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found, cases = {}, Cases(rank)
    try:
        for name in sorted(vars(Cases)):
            if name.startswith("case_") and os.environ.get("CASE", name) == name:
                found |= getattr(cases, name)()
    except BaseException:
        Path(f"{results}.error.{rank}").write_text(traceback.format_exc())
        os._exit(1)
    if rank == 0:
        torch.save(found, results)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
