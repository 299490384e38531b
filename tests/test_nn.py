"""The equilibrium layer: gradients against the unrolled iteration, and use together with other parts of torch."""

import copy
import gc
import os
import pickle
import sys
import tempfile
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import hypergrad as hg
from helpers import default_device
from implicit_cases import newton, rel

FP, S, Equilibrium = hg.fixed_points, hg.solvers, hg.nn.Equilibrium
EXACT = {"forward": FP.Anderson(rtol=1e-14, max_steps=500), "backward": S.GMRES(rtol=1e-13)}
QUIET = {"on_failure": "ignore"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Cell(nn.Module):
    """z ↦ tanh(norm(z Wᵀ + b) + u), a contraction."""

    def __init__(self, n: int = 6, norm: nn.Module | None = None):
        super().__init__()
        self.layer = nn.Linear(n, n)
        self.norm = norm or nn.Identity()
        with torch.no_grad():
            self.layer.weight.mul_(0.7 / torch.linalg.matrix_norm(self.layer.weight, 2))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.layer(z)) + u)


class Steps(nn.Module):
    """The same layer by plain iteration through autograd."""

    def __init__(self, cell, inject=None, steps: int = 200):
        super().__init__()
        self.cell, self.inject, self.steps = cell, inject, steps

    def forward(self, x: Tensor) -> Tensor:
        u = x if self.inject is None else self.inject(x)
        z = torch.zeros_like(u)
        for _ in range(self.steps):
            z = self.cell(z, u)
        return z


def gradients(module: nn.Module, x: Tensor, parameters=None) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of a nonlinear function of it in the parameters and x."""
    x = x.detach().requires_grad_()
    z = module(x)
    wanted = [x, *(module.parameters() if parameters is None else parameters)]
    return z.detach(), list(torch.autograd.grad((z.sin() + z**2).sum(), wanted))


def assert_same(got, expected, tolerance: float = 1e-10) -> None:
    assert rel(got[0], expected[0]) < tolerance
    assert len(got[1]) == len(expected[1])
    for one, other in zip(got[1], expected[1], strict=True):
        assert rel(one, other) < tolerance


def batch_of(n: int = 6, count: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs of growing size, so that some samples are more difficult than others."""
    draw = torch.randn(count, n, generator=torch.Generator().manual_seed(n))
    return (draw * torch.linspace(0.1, 2.0, count)[:, None]).to(dtype)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [FP.Picard, FP.Anderson, FP.Broyden, FP.Newton])
@pytest.mark.parametrize("backward", [S.GMRES(rtol=1e-13), S.Dense(), S.FixedPoint(rtol=1e-13, max_steps=500)], ids=str)
def test_gradients_equal_those_of_the_unrolled_iteration(forward, backward):
    cell = Cell().double()
    layer = Equilibrium(cell, forward=forward(rtol=1e-13, max_steps=500), backward=backward)
    assert_same(gradients(layer, batch_of()), gradients(Steps(cell), batch_of()))
    assert layer.forward_info.ok and layer.backward_info.solution.ok
    assert layer.forward_info.code.shape == (5,)


@pytest.mark.parametrize("inject", [None, "module", "function"])
def test_inject_is_differentiated_and_evaluated_once(inject):
    n, m = 6, 4
    cell, x = Cell(n).double(), batch_of(n if inject is None else m)
    linear = nn.Linear(m, n).double()
    calls = []
    parts = {None: None, "module": linear, "function": lambda x: calls.append(1) or linear(x)}
    layer = Equilibrium(cell, inject=parts[inject], **EXACT)
    wanted = list(cell.parameters()) + (list(linear.parameters()) if inject else [])
    got = gradients(layer, x, wanted)
    assert_same(got, gradients(Steps(cell, linear if inject else None), x, wanted))
    if inject == "function":
        assert len(calls) == 1
        layer(x)
        assert len(calls) == 2
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == ({"cell", "inject"} if inject == "module" else {"cell"})


def test_the_cell_is_evaluated_once_a_step_and_never_in_vain():
    cell, x = Cell().double(), batch_of().requires_grad_()
    calls = []
    cell.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    layer = Equilibrium(cell, forward=FP.Picard(max_steps=7), backward=S.FixedPoint(max_steps=5))
    z = layer(x)
    assert calls == [False] * 8  # seven steps, and the residual of the last
    calls.clear()
    z.sum().backward()
    assert calls == [True]


def test_a_function_as_cell():
    w = torch.randn(6, 6).double() * 0.1
    layer = Equilibrium(lambda z, u: torch.tanh(z @ w + u), **EXACT)
    assert_same(gradients(layer, batch_of()), gradients(Steps(lambda z, u: torch.tanh(z @ w + u)), batch_of()))
    assert list(layer.parameters()) == [] and layer.state_dict() == {}


@pytest.mark.parametrize("x_requires_grad", [True, False])
def test_a_function_that_uses_parameters_of_its_own_is_refused(x_requires_grad):
    linear = nn.Linear(6, 6).double()
    layer = Equilibrium(lambda z, u: torch.tanh(0.1 * linear(z) + u), **EXACT)
    with pytest.raises(ValueError, match=r"was not declared: .*of shape"):
        layer(batch_of().requires_grad_(x_requires_grad)).sum().backward()
    with torch.no_grad():
        layer(batch_of())  # nothing to lose


def test_pytrees_as_state_and_input():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 2).double(), nn.Linear(6, 4).double()

        def forward(self, z, u):
            both = 0.3 * torch.cat([z["p"], z["q"][0].flatten(1)], 1)
            return {
                "p": torch.tanh(self.a(both) + u[0]),
                "q": [torch.tanh(self.b(both) + u[1]["x"]).reshape(-1, 2, 2)],
            }

    cell, x = Two(), batch_of()

    def start(inputs):
        return {"p": torch.zeros(len(x), 2).double(), "q": [torch.zeros(len(x), 2, 2).double()]}

    class Joined(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            z = self.layer((x[:, :2], {"x": x[:, 2:]}))
            return torch.cat([z["p"], z["q"][0].flatten(1)], 1)

    class Loop(nn.Module):
        def forward(self, u):
            z = start(u)
            for _ in range(200):
                z = cell(z, u)
            return z

    layer = Equilibrium(cell, start=start, **EXACT)
    got = gradients(Joined(layer), x, cell.parameters())
    assert_same(got, gradients(Joined(Loop()), x, cell.parameters()))
    assert sorted(layer(((x[:, :2]), {"x": x[:, 2:]}))) == ["p", "q"]


def test_higher_derivatives_and_transforms():
    cell, x = Cell(3).double(), batch_of(3, 2)
    layer, steps = Equilibrium(cell, **EXACT), Steps(cell)
    f, g = (lambda x, m=m: m(x).sin().sum() for m in (layer, steps))
    for transform, tolerance in ((grad, 1e-10), (jacrev, 1e-10), (jacfwd, 1e-10), (hessian, 1e-8)):
        truth = jacrev(jacrev(g))(x) if transform is hessian else jacrev(g)(x)
        assert rel(transform(f)(x), truth) < tolerance
    parameters = dict(cell.named_parameters())
    by_name = lambda m, p: functional_call(m, {f"cell.{k}": v for k, v in p.items()}, (x,)).sin().sum()  # noqa: E731
    got, truth = (grad(partial(by_name, m))(parameters) for m in (layer, steps))
    assert all(rel(got[k], truth[k]) < 1e-10 for k in truth)
    (first,) = torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)
    (penalty,) = torch.autograd.grad((first**2).sum(), [cell.layer.weight])
    (reference,) = torch.autograd.grad(g(x), x, create_graph=True)
    (expected,) = torch.autograd.grad((reference**2).sum(), [cell.layer.weight])
    assert rel(penalty, expected) < 1e-8


def test_samples_converge_by_themselves():
    cell, x = Cell().double(), batch_of(count=6)
    layer = Equilibrium(cell, forward=FP.Picard(rtol=1e-8, max_steps=500, trace=True))
    together = layer(x)
    steps = layer.forward_info.trace
    alone = torch.cat([layer(one[None]) for one in x])
    assert rel(together, alone) < 1e-13
    rests = [int((steps[:, i] == steps[-1, i]).nonzero()[0]) for i in range(6)]
    assert len(set(rests)) > 1


def test_a_used_layer_can_be_pickled_and_copied():
    layer, x = Equilibrium(Cell(), warm_start=True), batch_of(dtype=torch.float32)
    z = layer(x)
    z.sum().backward()
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert other.forward_info is None and other.backward_info.solution is None
        torch.testing.assert_close(other(x), z, rtol=1e-3, atol=1e-4)
    assert layer.forward_info is not None and layer.backward_info.solves == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_tolerance_can_be_reached_in_half_precision(dtype):
    x = batch_of(dtype=dtype).requires_grad_()
    layer = Equilibrium(lambda z, u: torch.tanh(0.5 * z + u), forward=FP.Picard())
    layer(x).sum().backward()  # a warning would be an error
    assert layer.forward_info.ok and layer.backward_info.solution.ok
    exact = x.detach().double().requires_grad_()
    Equilibrium(layer.cell)(exact).sum().backward()
    # 4 eps left in each of the two systems, of condition 3 at most, and rounding in between.
    assert rel(x.grad.double(), exact.grad) < 20 * torch.finfo(dtype).eps


def test_a_failed_backward_pass_is_reported_at_the_line_that_called_it():
    layer = Equilibrium(lambda z, u: torch.tanh(0.9 * z + u), backward=S.GMRES(max_steps=1, restart=1, rtol=1e-9))
    loss = layer(batch_of().requires_grad_()).sum()
    with pytest.warns(hg.HypergradientWarning, match="MAX_STEPS") as told:
        loss.backward()
    assert told[0].filename == __file__


def test_coupled_samples_by_batch_dims():
    """In a graph network the cell couples the samples, so batch_dims=0 must be given."""
    mixing = torch.rand(5, 5).double()
    mixing = mixing / mixing.sum(1, keepdim=True)
    w = torch.randn(6, 6).double()
    w = w * (0.8 / torch.linalg.matrix_norm(w, 2))
    cell = lambda z, u: torch.tanh(mixing @ z @ w.T + u)  # noqa: E731
    layer = Equilibrium(cell, batch_dims=0, **EXACT)
    assert_same(gradients(layer, batch_of()), gradients(Steps(cell), batch_of()))
    assert layer.forward_info.code.ndim == 0


# --- starts -----------------------------------------------------------------------------------------------------------


def test_start_as_option_and_as_argument():
    cell, x = Cell().double(), batch_of()
    layer = Equilibrium(cell, forward=FP.Picard(rtol=1e-10, max_steps=500))
    z = layer(x).detach()
    first = layer.forward_info.steps
    start = z.clone().requires_grad_()
    out = layer(x.requires_grad_(), start)
    assert layer.forward_info.steps == 0 < first and rel(out, cell(z, x)) < 1e-15  # the known next iterate
    out.sum().backward()
    assert start.grad is None and x.grad is not None
    learned = Equilibrium(cell, start=nn.Linear(6, 6).double(), forward=FP.Picard(rtol=1e-12, max_steps=500))
    assert rel(learned(x), z) < 1e-9
    learned(x).sum().backward()
    assert all(p.grad is None for p in learned.start.parameters())


def test_warm_start_of_both_passes():
    cell, x = Cell().double(), batch_of()
    layer = Equilibrium(
        cell,
        warm_start=True,
        forward=FP.Picard(rtol=1e-10, max_steps=500),
        backward=S.FixedPoint(rtol=1e-10, max_steps=500),
    )
    reference = Equilibrium(cell, **EXACT)
    steps = []
    for shift in (0.0, 1e-7, 0.0):
        got = gradients(layer, x + shift)
        assert_same(got, gradients(reference, x + shift), 1e-7)
        steps.append((layer.forward_info.steps, int(layer.backward_info.solution.steps.max())))
    assert steps[1][0] < steps[0][0] and steps[1][1] < steps[0][1]
    got = gradients(layer, x[:3])  # another batch size: from the beginning
    assert_same(got, gradients(reference, x[:3]), 1e-7)
    layer.float()
    layer.forward_solver, layer.backward_solver = FP.Picard(), S.GMRES()
    gradients(layer, x[:3].float())  # another dtype: likewise
    assert layer.forward_info.value.dtype == torch.float32


# --- normalisation ----------------------------------------------------------------------------------------------------


def by_hand(z: Tensor, u: Tensor, h: dict[str, Tensor]) -> Tensor:
    """Cell with BatchNorm1d in training mode, written out."""
    y = z @ h["layer.weight"].T + h["layer.bias"]
    y = (y - y.mean(0)) / (y.var(0, unbiased=False) + 1e-1).sqrt()
    return torch.tanh(0.2 * (y * h["norm.weight"] + h["norm.bias"]) + u)


class Damped(Cell):
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.2 * self.norm(self.layer(z)) + u)


def test_batch_norm_in_training_mode_couples_the_samples_and_records_once():
    cell, x = Damped(3, nn.BatchNorm1d(3, eps=1e-1)).double(), batch_of(3, 5)
    layer = Equilibrium(cell, forward=FP.Anderson(rtol=1e-13, max_steps=300), backward=S.GMRES(rtol=1e-13))
    parameters = {name: p.detach() for name, p in cell.named_parameters()}
    z, grads = gradients(layer, x, cell.parameters())
    assert layer.forward_info.code.ndim == 0

    def residual(w: Tensor, h: Tensor) -> Tensor:
        parts = h.split([15, *(p.numel() for p in parameters.values())])
        named = {k: part.reshape(p.shape) for (k, p), part in zip(parameters.items(), parts[1:], strict=True)}
        return w - by_hand(w.reshape(5, 3), parts[0].reshape(5, 3), named).flatten()

    h = torch.cat([x.flatten(), *(p.flatten() for p in parameters.values())])
    outer = lambda h: (lambda z: (z.sin() + z**2).sum())(newton(residual, z.flatten(), h))  # noqa: E731
    assert residual(z.flatten(), h).norm() < 1e-11
    assert rel(torch.cat([g.flatten() for g in grads]), jacrev(outer)(h)) < 1e-10

    y = z @ parameters["layer.weight"].T + parameters["layer.bias"]
    norm = cell.norm
    assert norm.num_batches_tracked == 1
    assert rel(norm.running_mean, 0.1 * y.mean(0)) < 1e-10
    assert rel(norm.running_var, 0.9 + 0.1 * y.var(0)) < 1e-10
    layer.jacobian_penalty(layer(x), x).backward()
    assert norm.num_batches_tracked == 2  # the layer's second call, not the penalty

    layer.eval()
    layer(x)
    assert layer.forward_info.code.shape == (5,) and norm.num_batches_tracked == 2
    assert norm.track_running_stats


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6, track_running_stats=False)], ids=str
)
def test_other_normalisation(norm):
    cell = Damped(6, norm.double()).double()
    (z, got), (truth, expected) = (gradients(m, batch_of()) for m in (Equilibrium(cell, **EXACT), Steps(cell)))
    assert rel(z, truth) < 1e-10
    # as one vector: a bias before BatchNorm has gradient zero
    assert rel(torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in expected])) < 1e-10


def test_parametrisations_of_a_weight():
    cell = Cell().double()
    nn.utils.parametrizations.weight_norm(cell.layer)
    layer = Equilibrium(cell, **EXACT)
    assert_same(gradients(layer, batch_of()), gradients(Steps(cell), batch_of()))


# --- among torch's other parts ----------------------------------------------------------------------------------------


def test_in_a_sequential_trained_by_an_optimiser():
    layer = Equilibrium(Cell(8), inject=nn.Linear(4, 8))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.Linear(8, 2))
    x, y = torch.randn(16, 4), torch.randint(0, 2, (16,))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_state_dict_and_deepcopy():
    layer = Equilibrium(Cell(6, nn.BatchNorm1d(6)).eval(), inject=nn.Linear(6, 6)).eval().double()
    x = batch_of()
    before = layer(x)
    other = Equilibrium(Cell(6, nn.BatchNorm1d(6)), inject=nn.Linear(6, 6)).eval().double()
    assert not torch.equal(other(x), before)
    assert other.load_state_dict(layer.state_dict()).missing_keys == []
    assert torch.equal(other(x), before)
    before.sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.cell.layer.weight.zero_()
    assert torch.equal(layer(x), before) and not torch.equal(twin(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    cell = Cell().to(dtype)
    layer = Equilibrium(cell)
    z, grads = gradients(layer, batch_of(dtype=dtype))
    exact = Equilibrium(copy.deepcopy(cell).double(), **EXACT)
    truth, expected = gradients(exact, batch_of())
    assert z.dtype == dtype and all(g.dtype == dtype for g in grads)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-5
    assert rel(z, truth) < tolerance and all(rel(g, e) < tolerance for g, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize("inject", [False, True])
def test_bfloat16_autocast(inject):
    """Products in bfloat16, whose noise the tolerances must allow for; gradients in float32."""
    linear = nn.Linear(6, 6) if inject else None
    cell, x = Cell(), batch_of(dtype=torch.float32)
    loose = {"forward": FP.Anderson(rtol=2e-2), "backward": S.GMRES(rtol=3e-2)}
    layer, exact = Equilibrium(cell, inject=linear, **loose), Equilibrium(cell, inject=linear)
    dtypes = []
    cell.layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
    assert z.dtype == (torch.bfloat16 if inject else torch.float32)
    (z.float().sin() + z.float() ** 2).sum().backward()  # outside of autocast
    assert set(dtypes) == {torch.bfloat16}  # in the backward pass too
    got = [p.grad for p in layer.parameters()]
    truth, expected = gradients(exact, x, list(layer.parameters()))
    assert all(g.dtype == torch.float32 for g in got)
    assert rel(z.float(), truth) < 5e-2
    assert all(rel(g, e) < 0.1 for g, e in zip(got, expected[1:], strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_cell(backend):
    cell, x = Cell().double(), batch_of()
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning, UserWarning))  # torch's own
        layer = Equilibrium(torch.compile(cell, backend=backend), **EXACT)
        got = gradients(layer, x, cell.parameters())
    assert_same(got, gradients(Steps(cell), x, cell.parameters()))
    torch.compiler.reset()


def worker(rank: int, store: str, out: str) -> None:
    """One of two ranks: gradients of the mean loss over its half of the batch, averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = Equilibrium(Cell().double(), inject=nn.Linear(6, 6).double(), **EXACT)
    x = batch_of(count=8)
    model = nn.parallel.DistributedDataParallel(layer)
    for _ in range(2):  # the reducer of the second call is another one
        model.zero_grad()
        model(x[4 * rank : 4 * rank + 4]).sin().sum(1).mean().backward()
    torch.save([p.grad for p in layer.parameters()], f"{out}.{rank}")
    torch.distributed.destroy_process_group()
    # gloo's threads outlive the group, and the interpreter's shutdown would end them with "terminate called".
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo")
def test_distributed_data_parallel():
    torch.manual_seed(0)
    layer = Equilibrium(Cell().double(), inject=nn.Linear(6, 6).double(), **EXACT)
    x = batch_of(count=8)
    layer(x).sin().sum(1).mean().backward()
    with tempfile.TemporaryDirectory() as folder:
        args = (f"{folder}/store", f"{folder}/out")
        torch.multiprocessing.spawn(worker, args=args, nprocs=2, join=True)
        for rank in (0, 1):
            grads = torch.load(f"{folder}/out.{rank}")
            for got, p in zip(grads, layer.parameters(), strict=True):
                assert rel(got, p.grad) < 1e-10


def test_no_grad_and_inference_mode():
    layer = Equilibrium(Cell())
    x = batch_of(dtype=torch.float32).requires_grad_()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert not layer(x).requires_grad
    layer.requires_grad_(False)
    assert layer(x).requires_grad and not layer(x.detach()).requires_grad


def test_failures_of_either_pass_are_reported():
    layer = Equilibrium(Cell().double(), forward=FP.Picard(rtol=1e-12, max_steps=2))
    with pytest.warns(hg.HypergradientWarning, match="Picard: 5 of 5 systems.*MAX_STEPS"):
        layer(batch_of())
    layer = Equilibrium(Cell().double(), backward=S.GMRES(rtol=1e-12, max_steps=1, on_failure="raise"))
    z = layer(batch_of())
    with pytest.raises(hg.SolverError, match="MAX_STEPS"):
        z.sum().backward()
    with pytest.raises(TypeError, match="CG needs a symmetric operator"):
        Equilibrium(Cell().double(), backward=S.CG())(batch_of()).sum().backward()


# --- memory -----------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.layout is torch.strided
        # what torch itself may still hold of a transform that has ended
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    }
    return sum(storages.values())


def test_memory_does_not_depend_on_the_number_of_forward_steps():
    """The memory of the graph between the passes is measured by saved tensors and by live storages."""
    x = batch_of(64, 32).requires_grad_()
    used = {}
    for steps in (5, 100):
        layer = Equilibrium(Cell(64).double(), forward=FP.Picard(max_steps=steps), backward=S.FixedPoint(max_steps=5))
        saved = []
        before = live_bytes()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            z = layer(x)
        used[steps] = sum(saved), live_bytes() - before - layer.forward_info.trace.nbytes
        z.sum().backward()
        del z, layer
    assert used[5][0] == used[100][0]
    assert abs(used[5][1] - used[100][1]) <= 1024
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        Steps(Cell(64).double(), steps=100)(x)
    assert sum(saved) > 20 * used[100][0]


def test_training_steps_do_not_leak():
    layer, x = Equilibrium(Cell(), warm_start=True), batch_of(dtype=torch.float32)

    def alive() -> int:
        return sum(issubclass(type(y), Tensor) for y in gc.get_objects())

    for step in range(60):
        layer.zero_grad()
        layer(x).sum().backward()
        if step == 10:
            gc.collect()
            gc.disable()
            before = alive()
    after = alive()
    gc.enable()
    assert after <= before + 2


# --- helpers of training ----------------------------------------------------------------------------------------------


def test_jacobian_penalty_is_the_mean_square_of_the_jacobian():
    cell, x = Cell(4).double(), batch_of(4, 3)
    layer = Equilibrium(cell, **EXACT)
    z = layer(x).detach()
    jacobian = jacrev(lambda z: cell(z, x))(z)
    exact = (jacobian**2).sum() / z.numel()
    generator = torch.Generator().manual_seed(1)
    estimate = layer.jacobian_penalty(z, x, probes=4000, generator=generator)
    assert abs(estimate / exact - 1) < 0.05
    again = layer.jacobian_penalty(z, x, probes=4000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(estimate, again)


def test_jacobian_penalty_is_differentiable():
    """For scalar cells the estimate is v² (∂cell)², whose gradient is known."""
    weight = nn.Parameter(torch.tensor(0.3).double())

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = weight

        def forward(self, z, u):
            return self.w * z + u

    layer = Equilibrium(Scale(), **EXACT)
    z = torch.randn(50, 1).double()
    v = torch.randn(50, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    penalty = layer.jacobian_penalty(z, z, generator=torch.Generator().manual_seed(2))
    assert rel(penalty, (v * weight).square().mean()) < 1e-13
    penalty.backward()
    assert rel(weight.grad, 2 * weight.detach() * v.square().mean()) < 1e-13
    inject = nn.Linear(1, 1).double()
    bent = Equilibrium(lambda z, u: torch.tanh(z * u), inject=inject, **EXACT)
    bent.jacobian_penalty(z, z).backward()
    assert inject.weight.grad is not None and inject.weight.grad.abs() > 0


@pytest.mark.parametrize(("shape", "radius"), [((5, 5), 0.9), ((3, 7), 0.5), ((7, 3), 2.0)])
def test_project_spectral(shape, radius):
    w = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))
    u, s, vh = np.linalg.svd(w.numpy(), full_matrices=False)
    parameter = nn.Parameter(w.clone())
    assert hg.nn.project_spectral_(parameter, radius) is parameter and parameter.requires_grad
    np.testing.assert_allclose(parameter.detach().numpy(), (u * np.minimum(s, radius)) @ vh, rtol=0, atol=1e-13)
    inside = parameter.detach().clone() * 0.99
    kept = inside.clone()
    assert torch.equal(hg.nn.project_spectral_(inside, radius), kept)  # to the last bit
    with pytest.raises(ValueError, match=r"weight must be a matrix, got shape \(3,\)"):
        hg.nn.project_spectral_(torch.ones(3), radius)


def test_functional_leaves_the_module_alone():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    x = batch_of(3)
    pure = hg.nn.functional(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = {name: p.detach() * 2 for name, p in module.named_parameters()}
    got = pure(parameters, x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module[1].track_running_stats
    twin = copy.deepcopy(module)
    twin.load_state_dict(before | parameters)
    assert rel(got, twin(x)) < 1e-14
    many = vmap(lambda scale: pure({name: p * scale for name, p in parameters.items()}, x))(torch.ones(2).double())
    assert rel(many, torch.stack([got, got])) < 1e-14
    with pytest.raises(RuntimeError):
        pure(parameters, x[:, :2])
    assert module[1].track_running_stats  # also after an error


# --- modules that torch itself differentiates wrongly -----------------------------------------------------------------


class Shared(nn.Module):
    """One submodule under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.2 * self.first(z) + 0.1 * self.second(z) + u)


class Tied(nn.Module):
    """One parameter and one buffer in two submodules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.first.register_buffer("shift", torch.ones(3))
        self.second.register_buffer("shift", self.first.shift)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(0.2 * self.first(z) + 0.1 * self.second(z) + u + self.second.shift)


@pytest.mark.parametrize("make", [Shared, Tied])
def test_a_tensor_under_two_names_is_trained_and_stays_the_users(make):
    cell, x = make().double(), batch_of(3)
    kept = dict(cell.named_parameters())
    numbers = {name: p.detach().clone() for name, p in kept.items()}
    layer = Equilibrium(cell, **EXACT)
    assert_same(gradients(layer, x), gradients(Steps(cell), x))
    pure = hg.nn.functional(cell)
    doubled = {name: (2 * p).detach().requires_grad_() for name, p in kept.items()}
    got = torch.autograd.grad(pure(doubled, x, x).sum(), [*doubled.values()])
    twin = copy.deepcopy(cell)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    expected = torch.autograd.grad(twin(x, x).sum(), [*twin.parameters()])
    assert all(rel(a, b) < 1e-12 for a, b in zip(got, expected, strict=True))
    assert all(p is kept[name] and torch.equal(p, numbers[name]) for name, p in cell.named_parameters())
    layer(x).sum().backward()
    assert all(p.grad is not None for p in kept.values())


def gradient_penalty(module: nn.Module, x: Tensor, parameters) -> Tensor:
    """Derivatives of ‖∂ loss/∂x‖² in the parameters: of second order."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    grads = torch.autograd.grad((first**2).sum(), parameters)
    return torch.cat([g.flatten() for g in grads])


class WrittenOut(nn.Module):
    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v / v.norm(dim=1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.norm(dim=1, keepdim=True), weight


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_second_derivatives_through_weight_norm(kind):
    """torch's own second derivative of it is wrong."""
    cell, x = Cell(3).double(), batch_of(3)
    reference = copy.deepcopy(cell)
    kind(cell.layer)
    nn.utils.parametrize.register_parametrization(reference.layer, "weight", WrittenOut())
    layer, truth = Equilibrium(cell, **EXACT), Steps(reference)
    assert_same(gradients(layer, x), gradients(truth, x))
    got, expected = (gradient_penalty(m, x, list(m.cell.parameters())) for m in (layer, truth))
    assert rel(got, expected) < 1e-8
    loss = lambda h, f: f(h, x, x).sin().sum()  # noqa: E731
    pure, pure_reference = hg.nn.functional(cell), hg.nn.functional(reference)
    for transform in (lambda f: jacrev(grad(f)), hessian):
        second = transform(partial(loss, f=pure))(dict(cell.named_parameters()))
        other = transform(partial(loss, f=pure_reference))(dict(reference.named_parameters()))
        blocks = [torch.cat([x.flatten() for row in tree.values() for x in row.values()]) for tree in (second, other)]
        assert rel(*blocks) < 1e-10


@pytest.mark.filterwarnings("ignore::hypergrad.UnsolvedInnerProblem")  # equality is what counts, anywhere
def test_the_weight_norm_of_an_inner_loss_is_written_out():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    x, y = batch_of(3), batch_of(2)
    names = [name for name, _ in layer.named_parameters()]

    def forward(w, written: bool) -> Tensor:
        if not written:
            return functional_call(layer, w, (x,))
        bias, g, v = (w[name] for name in names)
        return x @ (g * v / v.norm(dim=1, keepdim=True)).T + bias

    def loss(w, h, written=False):
        penalty = (h.exp() * torch.stack([p.square().sum() for p in w.values()])).sum()
        return (forward(w, written) - y).square().mean() + penalty

    w = {name: p.detach() for name, p in layer.named_parameters()}
    h = torch.zeros(3).double().requires_grad_()
    grads = []
    for written in (False, True):
        solution = hg.implicit.argmin(partial(loss, written=written), w, h, solver=S.Dense())
        (g,) = torch.autograd.grad(sum(leaf.sin().sum() for leaf in solution.values()), h, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), h)
        grads.append((g.detach(), second))
    assert rel(grads[0][0], grads[1][0]) < 1e-10 and rel(grads[0][1], grads[1][1]) < 1e-8


class Checkpointed(Cell):
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        layer = torch.utils.checkpoint.checkpoint(self.layer, z, use_reentrant=False)
        return torch.tanh(layer + u)


def test_a_checkpoint_inside_a_functional_module():
    """It recomputes with the parameters of the call; torch's checkpoint would take those of the module."""
    cell, x = Checkpointed(3).double(), batch_of(3)
    parameters = {name: (2 * p).detach().requires_grad_() for name, p in cell.named_parameters()}
    plain = Cell(3).double()
    plain.load_state_dict(cell.state_dict())
    pairs = []
    for module in (cell, plain):
        loss = hg.nn.functional(module)(parameters, x, x).sin().sum()
        first = torch.autograd.grad(loss, [*parameters.values()], create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), [*parameters.values()])
        pairs.append((loss.detach(), (*first, *second)))
    assert_same(pairs[0], pairs[1])
    assert_same(gradients(Equilibrium(cell, **EXACT), x), gradients(Steps(plain), x))


class OnCpu(Cell):
    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(z, u)


def test_other_hooks_on_saved_tensors_are_let_through():
    cell = OnCpu().double()
    assert_same(gradients(Equilibrium(cell, **EXACT), batch_of()), gradients(Steps(cell), batch_of()))
    with torch.autograd.graph.save_on_cpu():
        got = gradients(Equilibrium(cell, **EXACT), batch_of())
    assert_same(got, gradients(Steps(cell), batch_of()))


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_cached_parametrisations(inside):
    cell, x = Cell().double(), batch_of()
    nn.utils.parametrize.register_parametrization(cell.layer, "weight", Half())
    layer, expected = Equilibrium(cell, **EXACT), gradients(Steps(cell), x)
    with nn.utils.parametrize.cached():
        cell.layer.weight  # noqa: B018  what the cache holds
        if inside:
            assert_same(gradients(layer, x), expected)
        else:
            leaf = x.clone().requires_grad_()
            z = layer(leaf)
    if not inside:
        grads = torch.autograd.grad((z.sin() + z**2).sum(), [leaf, *cell.parameters()])
        assert_same((z.detach(), grads), expected)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


# --- checkpoints around, vmap, and cells that differentiate -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["module", "function"])
def test_a_checkpoint_around_a_layer(kind):
    cell, x = Cell().double(), batch_of()
    layer = Equilibrium(cell if kind == "module" else lambda z, u: torch.tanh(0.5 * z + u), **EXACT)

    class Around(nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda x: layer(2 * x).cos(), x, use_reentrant=False)

    class Without(nn.Module):
        def forward(self, x):
            return layer(2 * x).cos()

    parameters = list(layer.parameters())
    assert_same(gradients(Around(), x, parameters), gradients(Without(), x, parameters))


@pytest.mark.parametrize("make", [Cell, lambda: Damped(norm=nn.LayerNorm(6)), lambda: Damped(norm=nn.GroupNorm(2, 6))])
@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("forward", [FP.Picard, FP.Anderson, FP.Broyden, FP.Newton])
def test_gradients_of_each_sample_by_vmap(forward, batch_dims, make):
    cell, x = make().double(), batch_of()
    layer = Equilibrium(cell, forward=forward(rtol=1e-13, max_steps=500), backward=S.GMRES(rtol=1e-13))
    layer.batch_dims = batch_dims
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x[None],)).sin().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    assert layer.forward_info.ok and layer.forward_info.code.shape[0] == 5 and layer.backward_info.solution.ok
    for i, one in enumerate(x):
        z = Steps(cell)(one[None])
        truth = torch.autograd.grad(z.sin().sum(), list(cell.parameters()))
        for (name, _), expected in zip(cell.named_parameters(), truth, strict=True):
            assert rel(each[f"cell.{name}"][i], expected) < 1e-10
    assert not any(type(leaf) is not Tensor for leaf in (layer.forward_info.value, layer.forward_info.code))


@pytest.mark.parametrize(
    "outside",
    [
        lambda f: f,
        lambda f: lambda p, b, x: grad(lambda p: f(p, b, x).sum())(p),
        lambda f: lambda p, b, x: jacfwd(lambda p: f(p, b, x).sum())(p),
    ],
    ids=["value", "grad", "jacfwd"],
)
@pytest.mark.parametrize("norm", [nn.Identity, partial(nn.BatchNorm1d, 6)], ids=["plain", "buffers"])
def test_an_ensemble_by_vmap(norm, outside):
    models = [Equilibrium(Damped(norm=norm()).double(), inject=nn.Linear(6, 6).double(), **EXACT) for _ in range(3)]
    x = batch_of()
    for i, model in enumerate(models):
        model(x + i)  # running statistics of their own
        model.eval()
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])
    f = outside(lambda p, b, x: functional_call(base, (p, b), (x,)))
    got = vmap(f, in_dims=(0, 0, None))(parameters, buffers, x)
    for i, model in enumerate(models):
        z = model(x)
        if isinstance(got, Tensor):
            assert rel(got[i], z) < 1e-10
        else:
            names, tensors = zip(*model.named_parameters(), strict=True)
            truth = torch.autograd.grad(z.sum(), tensors)
            assert all(rel(got[name][i], g) < 1e-10 for name, g in zip(names, truth, strict=True))


def test_a_cell_that_uses_a_mapped_tensor_of_its_own_is_refused():
    x = batch_of()
    with pytest.raises(ValueError, match=r"pass it in hparams|Pass it in hparams"):
        vmap(lambda w: Equilibrium(lambda z, u: torch.tanh(w * z + u))(x))(torch.tensor([0.1, 0.2]).double())


class Energy(nn.Module):
    """z ↦ z − ½ ∂E/∂z for E = ½‖z‖² − Σ log cosh(zW + b)/2 − ⟨z, u⟩, by torch.autograd.grad."""

    def __init__(self, n: int = 6, way: str = "plain"):
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.linalg.qr(torch.randn(n, n))[0])
        self.bias = nn.Parameter(torch.randn(n))
        self.way = way

    def energy(self, z: Tensor, u: Tensor) -> Tensor:
        return 0.5 * (z * z).sum() - (z @ self.weight + self.bias).cosh().log().sum() - (z * u).sum()

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        if self.way == "func":
            return z - 0.5 * grad(self.energy)(z, u)
        with torch.enable_grad() if self.way == "enabled" else torch.autograd.profiler.record_function("cell"):
            if self.way == "enabled" and not z.requires_grad:
                z = z.requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(z, u), z, create_graph=True)
        return z - 0.5 * slope

    def explicit(self, z: Tensor, u: Tensor) -> Tensor:
        return z - 0.5 * (z - torch.tanh(z @ self.weight + self.bias) @ self.weight.T - u)


class Explicit(nn.Module):
    def __init__(self, cell: Energy):
        super().__init__()
        self.inner = cell

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.inner.explicit(z, u)


@pytest.mark.parametrize("way", ["plain", "enabled", "func"])
@pytest.mark.parametrize(
    "forward",
    [FP.Picard, FP.Newton, *(pytest.param(each, marks=pytest.mark.slow) for each in (FP.Anderson, FP.Broyden))],
)
def test_a_cell_that_differentiates_an_energy(forward, way):
    cell, x = Energy(way=way).double(), batch_of()
    reference = Steps(Explicit(cell))
    layer = Equilibrium(cell, forward=forward(rtol=1e-13, max_steps=500), backward=S.GMRES(rtol=1e-13))
    assert_same(gradients(layer, x), gradients(reference, x))
    parameters = list(cell.parameters())
    assert rel(gradient_penalty(layer, x, parameters), gradient_penalty(reference, x, parameters)) < 1e-8
    with torch.no_grad():
        assert rel(layer(x), reference(x)) < 1e-10
    f, g = (lambda x, m=m: m(x).sin().sum() for m in (layer, reference))
    for transform in (grad, jacfwd, lambda f: jacrev(grad(f))):
        assert rel(transform(f)(x), transform(g)(x)) < 1e-8


# --- state, empty batches, defaults of torch --------------------------------------------------------------------------


def trained(layer, optimiser, batches, start: int = 0) -> list[Tensor]:
    for x in batches[start:]:
        optimiser.zero_grad()
        layer(x).sin().sum().backward()
        optimiser.step()
    return [p.detach().clone() for p in layer.parameters()]


def warm_layer() -> tuple[Equilibrium, torch.optim.Optimizer]:
    torch.manual_seed(3)
    layer = Equilibrium(
        Cell().double(),
        warm_start=True,
        forward=FP.Anderson(rtol=1e-4),
        backward=S.FixedPoint(rtol=1e-4),
    )
    return layer, torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("how", ["state_dict", "pickle", "within a model"])
def test_a_resumed_run_equals_an_uninterrupted_one(how, tmp_path):
    batches = [batch_of() + 0.01 * i for i in range(6)]
    truth = trained(*warm_layer(), batches)
    layer, optimiser = warm_layer()
    trained(layer, optimiser, batches[:3])
    model = nn.Sequential(nn.Identity(), layer) if how == "within a model" else layer
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, tmp_path / "state")
    if how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
        again = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    else:
        other, again = warm_layer()
        again = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    loaded = torch.load(tmp_path / "state", weights_only=True)
    if how != "pickle":
        whole = nn.Sequential(nn.Identity(), other) if how == "within a model" else other
        whole.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimiser"])
    resumed = trained(other, again, batches, 3)
    assert all(torch.equal(a, b) for a, b in zip(resumed, truth, strict=True))


def test_a_state_dict_with_a_warm_start_fits_a_layer_without():
    layer, _ = warm_layer()
    layer(batch_of()).sum().backward()
    assert any("warm_start" in name for name in layer.state_dict())
    cold = Equilibrium(Cell().double())
    cold.load_state_dict(layer.state_dict())
    assert not any("warm_start" in name for name in cold.state_dict())
    layer.load_state_dict(cold.state_dict())  # and starts anew then
    assert not any("warm_start" in name for name in layer.state_dict())


def test_a_warm_start_object_is_saved_and_loaded(tmp_path):
    warm, other = hg.implicit.WarmStart(), hg.implicit.WarmStart()
    a = torch.tensor([1.0, 4.0]).double().requires_grad_()
    hg.implicit.root(lambda w, a: w**2 - a, a.detach().sqrt(), a, warm_start=warm).sum().backward()
    for kept in (warm, hg.implicit.WarmStart()):
        torch.save(kept.state_dict(), tmp_path / "warm")
        other.load_state_dict(torch.load(tmp_path / "warm", weights_only=True))
        assert (other.value is None) == (kept.value is None)
    assert torch.equal(pickle.loads(pickle.dumps(warm)).value[0], warm.value[0])


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("forward", [FP.Picard, FP.Anderson, FP.Broyden, FP.Newton])
@pytest.mark.parametrize("shape", [(0, 6), (3, 0)])
def test_empty_batches_and_empty_states(shape, forward, batch_dims):
    cell = Cell().double() if shape[1] else (lambda z, u: 0.5 * z + u)
    layer = Equilibrium(cell, forward=forward(), batch_dims=batch_dims)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    z.sum().backward()
    assert z.shape == x.grad.shape == shape and layer.forward_info.ok
    assert all(not p.grad.any() for p in layer.parameters())
    assert layer.jacobian_penalty(z, x).isnan() if not z.numel() else True


@pytest.mark.parametrize("forward", [FP.Picard, FP.Anderson, FP.Broyden, FP.Newton])
def test_defaults_of_torch_do_not_matter(forward):
    cell, x = Cell(), batch_of(dtype=torch.float32)
    layer = Equilibrium(cell, forward=forward(rtol=1e-6, max_steps=500), backward=S.GMRES(rtol=1e-6))
    truth = gradients(layer, x)
    generator = torch.Generator().manual_seed(0)
    penalty = layer.jacobian_penalty(x, x, generator=generator)
    torch.set_default_dtype(torch.float64)
    try:
        with default_device("meta"):
            got = gradients(layer, x)
            again = layer.jacobian_penalty(x, x, generator=torch.Generator("cpu").manual_seed(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got[0], truth[0]) and all(torch.equal(a, b) for a, b in zip(got[1], truth[1], strict=True))
    assert torch.equal(again, penalty)
