"""Sharded tensors (DTensor) in unrolled steps and argmin give the results of plain ones, in every mode, on one rank."""

import os

import pytest
import torch

import hypergrad as hg

DOUBLE = {"dtype": torch.float64}
RUNS = {
    "graph": (hg.unroll.reverse, {"memory": "graph"}),
    "iterates": (hg.unroll.reverse, {"memory": "iterates"}),
    "sqrt": (hg.unroll.reverse, {"memory": "sqrt"}),
    "budget": (hg.unroll.reverse, {"memory": "1MB"}),
    "checkpoints": (hg.unroll.reverse, {"checkpoints": 2}),
    "forward": (hg.unroll.forward, {}),
    "one tangent at a time": (hg.unroll.forward, {"chunk": 1}),
}


def loss(w, lam):
    return (w**4 * lam).sum() / 4


def by_hand(w, lam):
    return w - 0.05 * torch.autograd.grad(loss(w, lam), w, create_graph=True)[0]


def outer(w, lam):
    return (w * lam).sum()


def by_argmin(lam):
    """The error of d/dλ Σ w(λ) for the minimiser w = λ / (1 + λ²) of w² (1 + λ²) / 2 − wλ."""
    with torch.no_grad():
        w, due = lam / (1 + lam**2), (1 - lam**2) / (1 + lam**2) ** 2
    solution = hg.implicit.argmin(
        lambda w, lam: (w**2 * (1 + lam**2) / 2 - w * lam).sum(), w, lam, solver=hg.solvers.CG(rtol=1e-12)
    )
    (grad,) = torch.autograd.grad(solution.sum(), lam)
    return float((grad - due).full_tensor().abs().max())


def compare(store, results):
    """Compare sharded with plain tensors in a separate process, and write the largest difference of each run."""
    import torch.distributed
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    w, lam, found = torch.randn(4, 3, **DOUBLE), torch.rand(4, 3, **DOUBLE), {}
    rules = {name: getattr(hg.diff_optimizers, name)(lr=0.05) for name in ("SGD", "Adam")}
    for placement in (Shard(0), Shard(1), Replicate()):
        pair = [distribute_tensor(x, mesh, [placement]) for x in (w, lam)]
        found[f"{placement} argmin"] = by_argmin(pair[1].detach().requires_grad_())
        for name, (function, options) in RUNS.items():
            for step in ("by hand", *rules):
                rule = rules.get(step)
                grads = []
                for start, h in ((w, lam), pair):
                    h = h.detach().requires_grad_()
                    torch.manual_seed(1)
                    if rule is None:
                        grads.append(function(by_hand, start, h, outer, 6, **options).grads)
                    else:
                        carry = (start, rule.init(start))
                        value = lambda s, h: outer(s[0], h)  # noqa: E731
                        grads.append(function(rule.on(loss), carry, h, value, 6, **options).grads)
                # On one rank all placements are the same, and torch chooses which one it names.
                difference = (grads[1].full_tensor() - grads[0]).abs().max() / grads[0].abs().max()
                found[f"{placement} {name} {step}"] = float(difference)
    torch.save(found, results)
    torch.distributed.destroy_process_group()
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_sharded_tensors_give_the_numbers_of_plain_ones(tmp_path):
    worker = torch.multiprocessing.get_context("spawn").Process(
        target=compare, args=(tmp_path / "store", tmp_path / "results.pt")
    )
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(found) == 3 * (3 * len(RUNS) + 1) and max(found.values()) < 1e-10
