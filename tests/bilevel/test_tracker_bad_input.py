"""Bad input: the error says what was given and what to do, and none of the user's objects is changed."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel_programs as programs
import hypergrad as hg
from bilevel_programs import KINDS, Program, backward, make, numbers, train

B = hg.bilevel
CLOSURES = [name for name, (_, needs_closures, _) in KINDS.items() if needs_closures]


def everything(tracker, program):
    """A copy of all state that an error must not change."""
    model = {key: x for key, x in program.model.state_dict().items()}
    kept = {"filters": tracker.state_dict()["filters"], "variables": tracker.variables, "grads": []}
    kept["grads"] = [x.grad for x in (*program.tensors(), *tracker.variables)]
    watch = tracker.state_dict()["watch"]
    return copy.deepcopy([model, program.decay.detach(), kept, watch, torch.get_rng_state(), tracker.steps])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", CLOSURES)
def test_a_value_where_a_closure_is_needed(name):
    p = Program()
    tracker = make(name, p)
    if name in ("SRBA", "STORM", "MRBO"):  # the first direction needs one evaluation, or none
        backward(name, tracker, p, 0)
        tracker.step()
    before = everything(tracker, p)
    outer, inner = (loss() for loss in p.closures(1))
    algorithm = type(tracker).__name__
    with pytest.raises(TypeError, match=rf"{algorithm} evaluates .* at more than one point: pass a closure .*lambda"):
        tracker.backward(outer, inner)
    assert same(before, everything(tracker, p))


def test_further_arguments_and_options():
    p = Program()
    with pytest.raises(TypeError, match="SABA keeps a table of batches: pass index="):
        make("SABA", p).backward(*p.closures(0))
    with pytest.raises(TypeError, match="SOBA takes no index"):
        make("SOBA", p).backward(*p.closures(0), index=(0, 0))
    with pytest.raises(TypeError, match="F2SA takes no adjoint_losses"):
        make("F2SA", p).backward(*p.closures(0), adjoint_losses=[])
    with pytest.raises(IndexError, match=r"in \[0, 4\), got 4"):
        make("SABA", p).backward(*p.closures(0), index=(4, 0))
    with pytest.raises(ValueError, match=r"GiB.*budget.*file="):
        make("SABA", p, budget=1000)
    for options, error, words in (
        ({"average": 0.0}, ValueError, "average must be in"),
        ({"recursive": 2.0}, ValueError, "recursive must be in"),
        ({"on_nonfinite": "stop"}, ValueError, "on_nonfinite must be"),
        ({"lr": 0.1, "optimizer": torch.optim.SGD}, TypeError, "not both"),
        ({"momentum": 0.9}, TypeError, "momentum"),
    ):
        with pytest.raises(error, match=words):
            B.SOBA(p.model.parameters(), [p.decay], **options)
    with pytest.raises(ValueError, match=r"order must be one of \[1, 2, 4\], got 3"):
        B.F2SA(p.model.parameters(), [p.decay], order=3)
    with pytest.raises(ValueError, match="penalty must be positive"):
        B.F2SA(p.model.parameters(), [p.decay], penalty=0)
    with pytest.raises(TypeError, match="period or probability"):
        B.SRBA(p.model.parameters(), [p.decay], full=lambda: ([], []))
    with pytest.raises(TypeError, match=r"supports SGD, Adam.* got ASGD"):
        B.SAMA(p.model.parameters(), [p.decay], optimizer=torch.optim.ASGD(p.model.parameters()))
    with pytest.raises(ValueError, match="does not move all of params"):
        B.SAMA(p.model.parameters(), [p.decay], optimizer=torch.optim.SGD(p.model[0].parameters()))


def test_tensors_that_cannot_be_trained():
    p = Program()
    params = list(p.model.parameters())
    for bad, words in (
        (torch.tensor(3), "floating point"),
        ("lr", "floating point tensor, got str"),
        (p.model, r"pass its parameters\(\)"),
        (p.decay.detach(), "none of hparams requires grad"),
        (p.decay.exp(), "was computed from"),
        (params[0], "params"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            B.SOBA(params, [bad])
    iterator = p.model.parameters()
    torch.optim.SGD(iterator, lr=0.1)
    with pytest.raises(ValueError, match="params holds no tensor"):
        B.SOBA(iterator, [p.decay])
    with pytest.raises(ValueError, match="none of params requires grad"):
        B.SOBA([x.detach() for x in params], [p.decay])


@pytest.mark.parametrize("name", KINDS)
def test_losses_that_reach_nothing(name):
    p = Program()
    tracker = make(name, p)
    before = everything(tracker, p)
    extra = {"index": (0, 0)} if KINDS[name][2] else {}
    lost = Program()
    loss = lost.closures(0)
    if name != "SRBA":  # of all data
        for losses in ((p.closures(0)[0], loss[1]), (loss[0], p.closures(0)[1])):
            if name.startswith("F2SA") and losses[0] is loss[0]:
                continue  # of g + kσf only g matters
            with pytest.raises(ValueError, match=r"_loss.* does not depend on params"):
                tracker.backward(*losses, **extra)
    p.penalty = lambda: 0.0
    lr = torch.tensor(0.1, requires_grad=True)  # of an optimiser
    tracker = make(name, p, hparams=[lr])
    with pytest.raises(ValueError, match=r"neither loss depends on hparams.*unroll\.forward"):
        backward(name, tracker, p, 0)
    assert same(before, everything(make(name, p), p)) and lr.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_losses_evaluated_without_gradients(context):
    p = Program()
    tracker = make("SOBA", p)
    with context():
        losses = [loss() for loss in p.closures(0)]
    with pytest.raises(ValueError, match=r"does not depend on params.*no_grad"):
        tracker.backward(*losses)


@pytest.mark.parametrize("name", KINDS)
def test_closures_under_no_grad_and_inference_mode(name):
    """Closures are evaluated with gradients; inference mode, which torch cannot leave, gives an error that names it."""
    p, q = Program(), Program()
    trackers = make(name, p), make(name, q)
    extra = {"index": (0, 0)} if KINDS[name][2] else {}
    trackers[0].backward(*p.closures(0), **extra)
    with torch.no_grad():
        trackers[1].backward(*q.closures(0), **extra)
    for x, y in zip(p.tensors(), q.tensors(), strict=True):
        assert torch.equal(x.grad, y.grad) and not y.grad.requires_grad
    before = everything(trackers[1], q)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference"):
        trackers[1].backward(*q.closures(0), **extra)
    assert same(before, everything(trackers[1], q))


@pytest.mark.parametrize("loss", [lambda p: 1.0, lambda p: iter([p.outer(0)]), lambda p: p.model(p.x[0])])
def test_losses_that_are_no_scalars(loss):
    p = Program()
    with pytest.raises((TypeError, ValueError), match=r"inner_loss must .*scalar"):
        make("SOBA", p).backward(p.outer(0), loss(p))
    with pytest.raises((TypeError, ValueError), match=r"inner_loss must .*scalar"):
        make("SOBA", p).backward(p.outer(0), lambda: loss(p))


# Params that have changed since the last step


@pytest.mark.parametrize("name", KINDS)
def test_other_values_in_the_same_parameters(name):
    """After an assignment to .data or load_state_dict the tracker continues at the new point."""
    results = []
    for way in ("data", "load", "copy"):
        p = Program()
        tracker = make(name, p)
        optims = programs.optimizers(p)
        train(name, tracker, p, range(2), optims)
        other = {key: x.detach() + 0.1 for key, x in p.model.named_parameters()}
        if way == "load":
            p.model.load_state_dict(other)
        for key, x in p.model.named_parameters():
            if way == "data":
                x.data = other[key].clone()
            elif way == "copy":
                with torch.no_grad():
                    x.copy_(other[key])
        results.append(train(name, tracker, p, range(2, 4), optims))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("level", ["params", "hparams"])
@pytest.mark.parametrize("name", KINDS)
def test_a_parameter_object_that_was_replaced(name, level):
    """The tracker would continue with the old object, which no loss uses."""
    p = Program()
    p.decay = nn.ParameterList([nn.Parameter(x) for x in p.decay.detach()])
    tracker = make(name, p, hparams=p.decay.parameters())
    optims = [torch.optim.SGD(p.model.parameters(), lr=0.1)]
    train_step = dict.fromkeys(range(2 if name != "SRBA" else 4))
    for step in train_step:
        backward(name, tracker, p, step)
        for each in (*optims, tracker):
            each.step()
            each.zero_grad() if each in optims else None
    if level == "params":
        p.model[0].weight = nn.Parameter(p.model[0].weight.detach().clone())
    else:
        p.decay[1] = nn.Parameter(p.decay[1].detach().clone())
    with pytest.raises(ValueError, match="a module's parameter has been replaced, make a new"):
        backward(name, tracker, p, len(train_step))


def test_a_part_of_a_network_that_a_batch_does_not_use_is_no_error():
    p = Program()
    experts = nn.ModuleList([nn.Linear(programs.FEATURES, programs.CLASSES).double() for _ in range(3)])
    tracker = B.SOBA(experts.parameters(), [p.decay])
    for step in range(6):
        chosen = experts[step % 3]
        penalty = p.decay.exp().sum() * (chosen.weight**2).sum()
        inner = cross_entropy(chosen(p.x[0]), p.y[0]) + penalty
        tracker.backward(cross_entropy(chosen(p.v[0]), p.u[0]), inner)
        tracker.step()


def test_parameters_of_another_form():
    p = Program()
    tracker = make("SOBA", p)
    backward("SOBA", tracker, p, 0)
    weight = p.model[2].weight
    weight.data = torch.ones(4, programs.WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"had shape \(3, 5\), torch.float64, .*has \(4, 5\).*make a new SOBA"):
        tracker.backward(*p.closures(0))
    weight.data = torch.ones(3, programs.WIDTH)
    with pytest.raises(ValueError, match=r"torch.float64, on cpu, and has \(3, 5\), torch.float32"):
        tracker.backward(*p.closures(0))
    weight.data = torch.ones(3, programs.WIDTH, dtype=torch.float64)
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"is frozen now.*make a new SOBA"):
        tracker.backward(*p.closures(0))
    weight.requires_grad_(True)
    tracker.backward(*p.closures(0))


# NaN and errors within a step


def spoilt(loss, factor=float("nan")):
    return lambda: loss() * factor


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_nan_in_one_batch_is_an_error_that_changes_nothing(name, level):
    """It leaves .grad, the tracker, running statistics and the random state as they were before the call."""
    p = Program(nn.BatchNorm1d(programs.WIDTH), nn.Dropout(0.3))
    tracker = make(name, p)
    backward(name, tracker, p, 0)
    tracker.step()
    backward(name, tracker, p, 1)  # in the middle of an accumulation
    before = everything(tracker, p)
    losses = list(p.closures(2))
    losses[level] = spoilt(losses[level])
    with pytest.raises(ValueError, match=r"NaN or infinity.*on_nonfinite='skip'"):
        tracker.backward(*losses, **({"index": (0, 0)} if KINDS[name][2] else {}))
    assert same(before, everything(tracker, p))


@pytest.mark.parametrize("name", KINDS)
def test_nan_in_one_batch_is_skipped_and_counted(name):
    """Training continues as if the batch had not been there."""
    results = []
    for spoil in (False, True):
        p = Program(nn.BatchNorm1d(programs.WIDTH))
        tracker, optims = make(name, p, on_nonfinite="skip"), programs.optimizers(p)
        for step in range(6):
            if step == 2:
                if spoil:
                    extra = {"index": (0, 0)} if KINDS[name][2] else {}
                    tracker.backward(*map(spoilt, p.closures(step)), **extra)
                    assert p.decay.grad is None
                continue
            train(name, tracker, p, range(step, step + 1), optims)
        results.append([numbers(tracker, p), *p.model.buffers()])
        assert tracker.skipped == tracker.report().skipped == tracker.metrics()["skipped"] == spoil
    assert same(*results)


def test_nan_is_ignored_where_that_is_asked():
    p = Program()
    tracker = make("SOBA", p, on_nonfinite="ignore")
    tracker.backward(*map(spoilt, p.closures(0)))
    assert p.decay.grad.isnan().all() and tracker.skipped == 0


@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("name", CLOSURES)
def test_an_error_inside_a_closure_leaves_everything(name, when):
    """Params are restored too if the error comes while they hold another point."""
    p, calls = Program(nn.BatchNorm1d(programs.WIDTH), nn.Dropout(0.3)), []

    def failing(loss):
        def evaluate():
            calls.append(1)
            value = loss()
            if len(calls) == when:
                raise KeyError("mine")
            return value

        return evaluate

    tracker = make(name, p)
    for step in range(2):
        backward(name, tracker, p, step)
        tracker.step()
    before = everything(tracker, p)
    with pytest.raises(KeyError, match="mine"):
        tracker.backward(*map(failing, p.closures(2)))
    assert same(before, everything(tracker, p)) and len(calls) == when
    first = [*train(name, tracker, p, range(2, 4))]
    assert all(x.isfinite() for x in first)


@pytest.mark.parametrize("name", KINDS)
def test_backward_twice_adds(name):
    p, q = Program(), Program()
    once, twice = make(name, p), make(name, q)
    backward(name, once, p, 0)
    for _ in range(2):
        backward(name, twice, q, 0)
    # SRBA adds the direction of all data once a step, and for SABA the second call finds the batch in its table. An
    # average takes the sum of both calls.
    if name not in ("SRBA", "SABA"):
        for x, y in zip(p.tensors(), q.tensors(), strict=True):
            torch.testing.assert_close(2 * x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_two_trackers_on_one_model():
    """There is a warning exactly if .grad of params still holds what the other tracker has added."""
    p = Program()
    first, second = make("SOBA", p), make("AmIGO", p)
    backward("SOBA", first, p, 0)
    with pytest.warns(hg.HypergradientWarning, match=r"another tracker.*twice"):
        backward("AmIGO", second, p, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for x in p.tensors():
                x.grad = None
            backward("SOBA", first, p, 0)
            backward("SOBA", first, p, 1)
            for x in p.tensors():
                x.grad = None
            backward("AmIGO", second, p, 0)
        for x in p.tensors():
            x.grad.zero_()
        backward("SOBA", first, p, 0)
        other = Program()
        backward("SOBA", make("SOBA", other), other, 0)


def test_a_tracker_made_anew_is_no_second_tracker():
    """A notebook makes a new tracker if its cell is run again."""
    p = Program()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            tracker = make("SOBA", p)
            optims = programs.optimizers(p)
            train("SOBA", tracker, p, range(2), optims)
        tracker = make("SOBA", p)
        backward("SOBA", tracker, p, 0)  # interrupted before its step
        tracker = make("SOBA", p)
        gc.collect()
        backward("SOBA", tracker, p, 0)


def test_steps_and_a_solver_are_one_choice():
    with pytest.raises(TypeError, match="steps and lr"):
        B.AmIGO(
            [torch.ones(1, requires_grad=True)], [torch.ones(1, requires_grad=True)], steps=3, solver=hg.solvers.CG()
        )


@pytest.mark.parametrize("given", ["nothing", "None"])
def test_adjoint_losses_without_a_loss(given):
    """An iterable that is empty, and a function that forgets to return its loss."""
    w, lam = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    tracker, losses = B.AmIGO([w], [lam]), [] if given == "nothing" else [(lam * w**2).sum(), None]
    error, text = (ValueError, "no loss") if given == "nothing" else (TypeError, "scalar tensor or a closure")
    with pytest.raises(error, match=text):
        tracker.backward((w**2).sum(), (lam * w**2).sum(), adjoint_losses=losses)
    assert w.grad is None and lam.grad is None


def test_a_table_does_not_overwrite_another_file(tmp_path):
    (tmp_path / "mine.inner.0").write_text("not a table")
    w, lam = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(FileExistsError, match=r"mine\.inner\.0"):
        B.SABA([w], [lam], batches=(3, 3), file=str(tmp_path / "mine"))
    assert (tmp_path / "mine.inner.0").read_text() == "not a table"
    for _ in range(2):  # a table file of the same tracker from an earlier run is overwritten
        assert not B.SABA([w], [lam], batches=(3, 3), file=str(tmp_path / "own")).tables[0].rows[0].any()


@pytest.mark.parametrize("algorithm", ["SOBA", "AmIGO", "F2SA", "BOME", "SAMA"])
def test_an_inner_loss_that_hparams_do_not_reach_is_warned_of_once(algorithm):
    """The direction is that of the outer loss alone. Later batches may lack hparams without a warning."""
    w, lam = (torch.ones(2, requires_grad=True) for _ in range(2))
    tracker = getattr(hg.bilevel, algorithm)([w], [lam], lr=0.1)
    outer = lambda: ((w - lam) ** 2).sum() + w.sum()  # noqa: E731
    with pytest.warns(hg.HypergradientWarning, match="the inner problem does not depend on hparams"):
        tracker.backward(outer, lambda: ((w - lam.detach()) ** 2).sum())
    tracker.backward(outer, lambda: (w**2).sum())
    w.grad = lam.grad = None
    other = getattr(hg.bilevel, algorithm)([w], [lam], lr=0.1)
    other.backward(outer, lambda: ((w - lam) ** 2).sum())
    other.backward(outer, lambda: (w**2).sum())
