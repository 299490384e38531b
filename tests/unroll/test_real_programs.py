"""Unrolling real programs: hooks, live models, containers, complex, sparse and empty tensors, modes, errors."""

import threading
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from test_reverse import simple, total

import hypergrad as hg
from hypergrad.unroll import forward, reverse

DOUBLE = {"dtype": torch.float64}
REVERSE = {
    "graph": {"memory": "graph"},
    "iterates": {"memory": "iterates"},
    "sqrt": {"memory": "sqrt"},
    "budget": {"memory": "60 KiB"},
    "checkpoints": {"checkpoints": 2},
}
MODES = {name: (reverse, options) for name, options in REVERSE.items()} | {"forward": (forward, {})}
STEPS = 12


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=MODES)
def run(request):
    """`reverse` under each policy, and `forward`, through STEPS steps."""
    function, options = MODES[request.param]

    def call(step, start, hparams, outer_loss, steps=STEPS, **more):
        return function(step, start, hparams, outer_loss, steps, **options, **more)

    call.replays = request.param not in ("graph", "budget", "forward")
    call.name = request.param
    return call


def plain(step, start, hparams, outer_loss, steps=STEPS):
    w = start
    for _ in range(steps):
        w = step(w, hparams)
    return torch.autograd.grad(outer_loss(w, hparams), hparams)


def close(got, due, tolerance=1e-10):
    torch.testing.assert_close(got, due, rtol=tolerance, atol=1e-14)


def sine(w, lam):
    return torch.sin(w) * lam + 0.1 * lam**2


def ends(w, lam):
    return (w * lam).sum() ** 2


# --- hooks ------------------------------------------------------------------------------------------------------------


HOOKS = {
    "clamp": lambda g: g.clamp(-0.01, 0.01),
    "reversal": lambda g: -g,
    "shift": lambda g: g + 1,
    "mask": lambda g: g * torch.tensor([1.0, 0.0, 1.0], **DOUBLE),
    "looks only": lambda g: None,
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("computed", [False, True])
def test_a_hook_on_hparams_acts_once_on_the_total(run, hook, computed):
    """It acts as in loss.backward(), for every memory policy, on leaves and on hparams that a network computes."""
    calls, start = [], torch.randn(3, **DOUBLE)
    theta = torch.rand(3, **DOUBLE, requires_grad=True)

    def hooked(theta):
        lam = theta.tanh() if computed else theta.detach().requires_grad_()
        handle = lam.register_hook(lambda g: (calls.append(0), HOOKS[hook](g))[1])
        return lam, handle

    lam, handle = hooked(theta)
    (due,) = plain(sine, start, lam, ends)
    assert len(calls) == 1
    calls.clear()
    close(run(sine, start, lam, ends).grads, due)
    assert len(calls) == 1
    # The hook is still there, and nothing was written.
    torch.autograd.grad((lam**2).sum(), lam)
    assert len(calls) == 2 and theta.grad is None
    handle.remove()


def test_several_hooks_act_in_their_order(run):
    start, lam = torch.randn(3, **DOUBLE), torch.rand(3, **DOUBLE, requires_grad=True)
    for hook in (lambda g: g + 1, lambda g: g.clamp(max=0.7), lambda g: 3 * g):
        lam.register_hook(hook)
    (due,) = plain(sine, start, lam, ends)
    close(run(sine, start, lam, ends).grads, due)


def test_hooks_come_back_after_an_error(run):
    calls, (start, hparams) = [], simple()
    hparams["a"].register_hook(lambda g: calls.append(0))
    with pytest.raises(ZeroDivisionError):
        run(lambda w, h: 1 / 0, start, hparams, total)
    torch.autograd.grad(hparams["a"] ** 2, hparams["a"])
    assert len(calls) == 1


def test_a_hook_on_the_start_is_warned_of_by_name(run):
    """The steps work on a copy of the start, so the hook would not act at all of them."""
    lam = torch.rand(3, **DOUBLE, requires_grad=True)
    start = {"w": torch.randn(3, **DOUBLE, requires_grad=True), "v": lam * 2}
    step = lambda s, lam: {"w": torch.sin(s["w"]) * lam, "v": s["v"] * 0.5 + s["w"]}  # noqa: E731
    outer = lambda s, lam: (s["v"] ** 2).sum()  # noqa: E731
    due = run(step, start, lam, outer).grads
    for name in "wv":
        handle = start[name].register_hook(lambda g: 0 * g)
        with pytest.warns(hg.HypergradientWarning, match=rf"gradient hook of start\['{name}'\] is not called"):
            close(run(step, start, lam, outer).grads, due)
        handle.remove()


def test_a_hook_on_hparams_that_are_the_start(run):
    lam = torch.rand(3, **DOUBLE, requires_grad=True)
    lam.register_hook(lambda g: g.clamp(-0.01, 0.01))
    (due,) = plain(sine, lam, lam, ends)
    close(run(sine, lam, lam, ends).grads, due)


# --- losses that do not use what they are given -----------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, **DOUBLE))

    def forward(self):
        return (self.weight**2).sum()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_an_outer_loss_of_the_live_model_is_an_error(run, given, grad):
    """Its derivative would be 0. It is an error also under no_grad, and whether or not the start is a copy."""
    model, hparams = Model(), simple()[1]
    start = dict(model.named_parameters())
    start = start if given else {name: x.detach().clone() for name, x in start.items()}
    step = lambda w, h: {"weight": w["weight"] - h["a"] * w["weight"] ** 3 / 9}  # noqa: E731

    def outer(w, h):
        with torch.set_grad_enabled(grad):
            return model()

    with pytest.raises(ValueError, match=r"outer_loss does not depend on the params.*functional_call"):
        run(step, start, hparams, outer)
    assert run(step, start, hparams, lambda w, h: torch.func.functional_call(model, w, ())).grads["a"] != 0


@pytest.mark.parametrize("outer", [lambda w, h: w.detach().sum(), lambda w, h: torch.tensor(float(w.detach().sum()))])
def test_an_outer_loss_without_a_graph_is_an_error(run, outer):
    start, hparams = simple()
    with pytest.raises(ValueError, match="does not depend on the params that it is called with, nor on hparams"):
        run(lambda w, h: w * h["a"], start, hparams, outer)


def test_an_outer_loss_of_hparams_alone_is_warned_of(run):
    start, hparams = simple()
    outer = lambda w, h: h["a"] ** 3  # noqa: E731
    with pytest.warns(hg.HypergradientWarning, match="but on hparams.*steps do not count"):
        result = run(lambda w, h: w * h["a"], start, hparams, outer)
    close(result.grads["a"], 3 * hparams["a"].detach() ** 2)
    close(run(lambda w, h: w * h["a"], start, hparams, outer, allow_detached=True).grads["a"], result.grads["a"])


def test_an_in_place_error_of_the_outer_loss_is_attributed_to_it(run):
    """An in-place error in the derivative of a step is not attributed only to a later step."""

    def spoilt(w, h):
        y = w.exp()
        y_times = y * h["a"]
        y.add_(1)
        return y_times

    start, hparams = simple()
    with pytest.raises(RuntimeError, match="is at version 1; expected version 0"):
        run(lambda w, h: w * h["a"], start, hparams, lambda w, h: spoilt(w, h).sum())
    with pytest.raises(RuntimeError, match=r"by the step itself|is at version 1"):
        run(spoilt, start, hparams, total)


def test_a_step_that_mixes_the_live_start_in_is_warned_of(run):
    start, hparams = simple()
    start.requires_grad_()
    step = lambda w, h: w * h["a"] - 0.1 * start  # noqa: E731
    with pytest.warns(hg.HypergradientWarning, match="step uses the live start beside the params"):
        run(step, start, hparams, total)
    run(step, start, hparams, total, allow_detached=True)
    run(lambda w, h: w * h["a"] - 0.1 * start.detach(), start, hparams, total)


def test_an_outer_loss_that_mixes_the_live_start_in_is_warned_of(run):
    start, hparams = simple()
    start.requires_grad_()
    with pytest.warns(hg.HypergradientWarning, match="uses the live start beside the params"):
        run(lambda w, h: w * h["a"], start, hparams, lambda w, h: (w * start).sum())


@pytest.mark.parametrize("read", [lambda h: h["a"].item(), lambda h: float(h["a"].detach()), lambda h: h["a"].detach()])
def test_hparams_that_nothing_depends_on_are_an_error(run, read):
    start, hparams = simple()
    with pytest.raises(ValueError, match="neither step nor outer_loss depends on hparams"):
        run(lambda w, h: w * read(h), start, hparams, total)


# --- containers -------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "b a")


def two(a, b, h):
    """A map of two leaves, which detects if they are swapped."""
    return torch.sin(a) * h + b, 0.5 * b - 0.1 * a.sum()


KEEP = {
    "dict to OrderedDict": (dict, lambda a, b: OrderedDict(b=b, a=a)),
    "OrderedDict to dict": (lambda **x: OrderedDict(b=x["b"], a=x["a"]), lambda a, b: {"a": a, "b": b}),
    "OrderedDict turned": (lambda **x: OrderedDict(b=x["b"], a=x["a"]), lambda a, b: OrderedDict(a=a, b=b)),
    "dict turned": (dict, lambda a, b: {"b": b, "a": a}),
}


@pytest.mark.parametrize("kind", KEEP)
def test_mappings_are_matched_by_key(run, kind):
    """The state may be nested, and a part of it may be no tensor."""
    make, give = KEEP[kind]
    a, b, lam = torch.randn(3, **DOUBLE), torch.randn((), **DOUBLE), torch.randn(3, **DOUBLE, requires_grad=True)
    start = {"n": 0, "x": [make(a=a, b=b)]}
    step = lambda s, h: {"n": s["n"] + 1, "x": [give(*two(s["x"][0]["a"], s["x"][0]["b"], h))]}  # noqa: E731
    outer = lambda s, h: (s["x"][0]["a"] ** 2).sum() + s["x"][0]["b"].sum() * s["n"]  # noqa: E731
    result = run(step, start, lam, outer)
    (due,) = plain(step, start, lam, outer)
    close(result.grads, due)
    assert result.params["n"] == STEPS and type(result.params["x"][0]) is type(make(a=a, b=b))
    if run.name != "forward":
        first = result.start_grads["x"][0]
        at = [x.clone().requires_grad_() for x in (a, b)]
        s = {"n": 0, "x": [make(a=at[0], b=at[1])]}
        for _ in range(STEPS):
            s = step(s, lam)
        for got, wanted in zip((first["a"], first["b"]), torch.autograd.grad(outer(s, lam), at), strict=True):
            close(got, wanted)


@pytest.mark.parametrize("made", [list, tuple, iter, lambda x: Pair(*x)])
def test_sequences_are_matched_by_place(run, made):
    a, b, lam = (torch.randn(3, **DOUBLE) for _ in range(3))
    lam.requires_grad_()
    step = lambda s, h: made(two(*s, h))  # noqa: E731
    result = run(step, [a, b], lam, lambda s, h: (next(iter(s)) ** 2).sum())
    (due,) = plain(lambda s, h: two(*s, h), (a, b), lam, lambda s, h: (s[0] ** 2).sum())
    close(result.grads, due)


def test_another_structure_is_named(run):
    start, lam = {"a": torch.ones(2, **DOUBLE)}, torch.ones(2, **DOUBLE, requires_grad=True)
    with pytest.raises(ValueError, match=r"step's result must have the structure of start.*: \['a'\], \['b'\]"):
        run(lambda s, h: {"b": s["a"] * h}, start, lam, lambda s, h: s["a"].sum())
    with pytest.raises(
        ValueError, match=r"step's result must have the structure of start: 2 leaves instead of 1.*\['b'\]"
    ):
        run(lambda s, h: {"a": s["a"] * h, "b": h}, start, lam, lambda s, h: s["a"].sum())


@dataclass
class Held:
    w: torch.Tensor
    name: str = "x"


def test_an_unregistered_dataclass_is_named(run):
    lam = torch.ones(2, **DOUBLE, requires_grad=True)
    for start in (Held(lam.detach()), {"w": lam.detach(), "more": [Held(lam.detach())]}):
        with pytest.raises(TypeError, match="Held holds tensors but is not a pytree"):
            run(lambda s, h: s, start, lam, lambda s, h: h.sum())
    with pytest.raises(TypeError, match="Held"):
        run(lambda s, h: s * h[0].w, lam.detach(), [Held(lam)], lambda s, h: s.sum())
    with pytest.raises(TypeError, match="Held holds tensors but is not a pytree"):
        run(lambda s, h: Held(s * h), lam.detach(), lam, lambda s, h: s.sum())


# --- complex ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["params", "hparams", "both"])
def test_complex_tensors(run, place):
    """Reverse mode gives torch.autograd's gradient, in the real and imaginary parts; forward mode says what to do."""
    kind = {"params": (True, False), "hparams": (False, True), "both": (True, True)}[place]
    start, lam = (torch.randn(3, dtype=torch.complex128 if c else torch.float64) for c in kind)
    lam.requires_grad_()

    def step(w, lam):
        new = w - 0.1 * (w * w.abs() + lam * w.conj())
        return new if kind[0] else new.real

    outer = lambda w, lam: (w.abs() ** 2).sum() + (w * lam).real.sum()  # noqa: E731
    if run.name == "forward":
        with pytest.raises(TypeError, match=r"no complex tensors: use unroll\.reverse, or pass torch\.view_as_real"):
            run(step, start, lam, outer)
        return
    (due,) = plain(step, start, lam, outer)
    result = run(step, start, lam, outer)
    close(result.grads, due)
    at = start.clone().requires_grad_()
    w = at
    for _ in range(STEPS):
        w = step(w, lam)
    close(result.start_grads, torch.autograd.grad(outer(w, lam), at)[0])


@pytest.mark.parametrize("index", range(4))
def test_complex_hparams_against_differences(run, index):
    if run.name == "forward":
        return
    start = torch.randn(2, dtype=torch.complex128)
    lam = torch.randn(2, dtype=torch.complex128, requires_grad=True)
    step = lambda w, lam: w - 0.1 * (w * w.abs() + lam * w.conj())  # noqa: E731
    outer = lambda w, lam: (w.abs() ** 2).sum() + (w * lam).real.sum()  # noqa: E731
    result = run(step, start, lam, outer)
    values, size = [], 1e-6
    for sign in (1, -1):
        shifted = torch.view_as_real(lam.detach().clone())
        shifted.reshape(-1)[index] += sign * size
        w, moved = start, torch.view_as_complex(shifted)
        for _ in range(STEPS):
            w = step(w, moved)
        values.append(float(outer(w, moved)))
    slope = torch.view_as_real(result.grads).reshape(-1)[index]
    assert abs(float(slope) - (values[0] - values[1]) / (2 * size)) < 1e-8


# --- sparse and empty -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["by hand", "SGD", "Adam"])
def test_sparse_gradients_of_an_embedding(run, rule):
    """The results are those of dense gradients."""
    index, lam = torch.tensor([[1, 3], [1, 4]]), torch.tensor(-2.0, **DOUBLE, requires_grad=True)
    w = torch.randn(6, 2, **DOUBLE)

    def loss(sparse):
        def value(w, lam):
            rows = torch.nn.functional.embedding(index, w, sparse=sparse)
            return (rows**4).sum() * lam.exp() + (rows.sum() - 1) ** 2

        return value

    def result(sparse):
        if rule == "by hand":

            def step(w, lam):
                return w - 0.05 * torch.autograd.grad(loss(sparse)(w, lam), w, create_graph=True)[0]

            return run(step, w, lam, lambda w, lam: (w**2).sum() + loss(sparse)(w, lam))
        step, state = getattr(hg.diff_optimizers, rule)(lr=0.05), None
        state = step.init(w)
        outer = lambda s, lam: (s[0] ** 2).sum() + loss(sparse)(s[0], lam)  # noqa: E731
        return run(step.on(loss(sparse)), (w, state), lam, outer)

    dense, sparse = result(False), result(True)
    assert dense.grads != 0
    close(sparse.grads, dense.grads)


def test_an_embedding_table_as_hparams(run):
    index, start = torch.tensor([1, 3, 1]), torch.randn(3, 2, **DOUBLE)
    table = torch.randn(5, 2, **DOUBLE, requires_grad=True)
    rows = lambda h, sparse: torch.nn.functional.embedding(index, h, sparse=sparse)  # noqa: E731
    both = [
        run(lambda w, h, s=s: torch.sin(w) * rows(h, s), start, table, lambda w, h, s=s: (w * rows(h, s)).sum()).grads
        for s in (False, True)
    ]
    close(both[1], both[0])
    assert both[1].layout is torch.strided


def test_empty_batches_and_empty_unknowns(run):
    """A part of the state, a hyperparameter or a batch has no entries, or the whole state has none."""
    lam = {"a": torch.rand(2, **DOUBLE, requires_grad=True), "none": torch.zeros(0, 3, **DOUBLE, requires_grad=True)}
    start = {"w": torch.randn(2, **DOUBLE), "none": torch.zeros(0, **DOUBLE)}
    batches = [torch.randn(n, 2, **DOUBLE) for n in (3, 0, 2)]

    def step(s, h, t, x):
        w = s["w"] - 0.1 * h["a"] * (x.T @ torch.tanh(x @ s["w"]) + s["w"])
        return {"w": w, "none": s["none"] * h["none"].sum()}

    outer = lambda s, h: (s["w"] ** 2).sum() + s["none"].sum() + h["none"].sum()  # noqa: E731
    result = run(step, start, lam, outer, 3, batches=batches)
    s = start
    for t in range(3):
        s = step(s, lam, t, batches[t])
    due = torch.autograd.grad(outer(s, lam), list(lam.values()))
    close(list(result.grads.values()), list(due))
    nothing = torch.zeros(0, 4, **DOUBLE)
    empty = run(lambda w, h: w * h[0], nothing, lam["a"], lambda w, h: w.sum() + h.sum(), 3)
    assert empty.params.shape == (0, 4) and torch.equal(empty.grads, torch.ones(2, **DOUBLE))


# --- modes ------------------------------------------------------------------------------------------------------------


def test_the_default_device_and_dtype_do_not_matter(run):
    """A tensor made on this default device, which holds no numbers, would raise an error or lose its numbers."""
    start, hparams = simple()
    torch.manual_seed(1)
    due = run(lambda w, h: torch.sin(w) * h["a"], start, hparams, total)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            result = run(lambda w, h: torch.sin(w) * h["a"], start, hparams, total)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(result.grads["a"], due.grads["a"]) and torch.equal(result.outer_value, due.outer_value)
    assert result.evaluations == due.evaluations


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(run, mode):
    """Results agree with those outside of the mode, also for a start made within it, and for an update rule."""
    start, hparams = simple()
    rule = hg.diff_optimizers.SGD(lr=0.1)
    step = rule.on(lambda w, h: h["a"] * (w**4).sum())
    outer = lambda s, h: s[0].sum()  # noqa: E731
    due = run(step, (start, rule.init(start)), hparams, outer).grads["a"]
    with mode():
        copy = start.clone()
        result = run(step, (copy, rule.init(copy)), hparams, outer)
    assert torch.equal(result.grads["a"], due) and not result.params[0].requires_grad


def test_hparams_made_in_inference_mode_are_named(run):
    with torch.inference_mode():
        lam = {"a": torch.tensor(0.5, **DOUBLE).requires_grad_()}
    with pytest.raises(ValueError, match=r"hparams\['a'\] was made under torch\.inference_mode"):
        run(lambda w, h: w * h["a"], simple()[0], lam, total)


# --- sources of errors ------------------------------------------------------------------------------------------------


def test_an_in_place_error_of_a_model_is_raised_unchanged(run):
    """If the model writes to a weight or an activation, the message is torch's, and does not accuse the step."""
    start, hparams = simple()
    weight = torch.ones(3, **DOUBLE, requires_grad=True)

    def writes_weight(w, h):
        weight.mul_(2)
        return w * h["a"] * weight

    def overwrites(w, h):
        y = (w * h["a"]).exp()
        z = y * 1
        y.mul_(2)
        return torch.autograd.grad(z.sum(), w, create_graph=True)[0]

    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used"):
        run(writes_weight, start, hparams, total)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(overwrites, start, hparams, total)
    for writes in (lambda w, h: w.mul_(h["a"]), lambda w, h: w * h["a"].mul_(2), lambda w, h: (w[0].add_(1), w)[1]):
        with pytest.raises(RuntimeError, match="step changed its params"):
            run(writes, start, hparams, total)
    assert torch.equal(start, torch.ones(3, **DOUBLE)) and hparams["a"] == 0.5


def test_an_iterator_that_ends_is_named(run):
    """The iterator may give batches, or be used in step or in outer_loss."""
    start, hparams = simple()
    stream = iter([torch.ones(3, **DOUBLE)] * 3)
    with pytest.raises(ValueError, match=r"iterator that step \(or batches\) reads has ended at step 3 .*as a list"):
        run(lambda w, h, t, x: w * h["a"] + x, start, hparams, total, batches=lambda t: next(stream))
    with pytest.raises(ValueError, match="has ended at step"):
        run(lambda w, h: w * h["a"] + next(stream), start, hparams, total)
    with pytest.raises(ValueError, match="iterator that outer_loss reads has ended"):
        run(lambda w, h: w * h["a"], start, hparams, lambda w, h: w.sum() * next(stream))


def test_another_thread_that_draws_is_named(run):
    """Random numbers drawn by another thread change those of a replay, and their count."""
    start, hparams = simple()
    calls = []

    def disturbed(w, h):
        calls.append(0)
        if len(calls) > STEPS:
            thread = threading.Thread(target=lambda: torch.rand(1))
            thread.start()
            thread.join()
        return torch.sin(w) * h["a"] + torch.randn(3, **DOUBLE)

    if not run.replays:
        assert run(disturbed, start, hparams, total).grads["a"] != 0
        return
    with pytest.raises(RuntimeError, match="does another thread draw from the same generator"):
        run(disturbed, start, hparams, total)


@pytest.mark.parametrize("kind", [lambda m: SimpleNamespace(m=m), lambda m: UserDict(m=m)])
@pytest.mark.parametrize("at_start", [True, False])
def test_tensors_in_an_object_that_is_no_pytree_are_refused(run, kind, at_start):
    """A momentum in such an object would count as a constant, and its derivatives would be lost."""
    start, hparams = simple()
    step = lambda carry, h: (carry[0] * h["a"], kind(carry[0]))  # noqa: E731
    first = (start, kind(torch.zeros(3, **DOUBLE)) if at_start else 0)
    with pytest.raises(TypeError, match="holds tensors but is not a pytree: pass a dict"):
        run(step, first, hparams, lambda carry, h: total(carry[0], h))
