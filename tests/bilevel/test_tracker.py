"""Trackers fit the user's loop: modules, optimisers, mixed precision, running statistics, random numbers, hooks."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import bilevel_programs as programs
import hypergrad as hg
from bilevel_programs import KINDS, LR, Program, backward, make, numbers, train

B = hg.bilevel
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def directions(program, v, step):
    """SOBA's D_w, D_v and D_λ, by a separate call of torch.autograd.grad for each derivative."""
    params, (outer, inner) = list(program.model.parameters()), program.closures(step)
    slope = torch.autograd.grad(inner(), params, create_graph=True)
    product = sum((g * x).sum() for g, x in zip(slope, v, strict=True))
    hessian = torch.autograd.grad(product, params, retain_graph=True)
    (cross,) = torch.autograd.grad(product, [program.decay])
    return slope, [a + b for a, b in zip(hessian, torch.autograd.grad(outer(), params), strict=True)], cross


def by_hand(program, optims, v, own, step, clip=None):
    """A step of SOBA by hand; the optimiser `own` moves v."""
    slope, residual, cross = directions(program, v, step)
    for x, g in zip([*program.tensors(), *v], [*slope, cross, *residual], strict=True):
        x.grad = g.detach()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(program.model.parameters(), clip)
    for each in (*optims, own):
        each.step()
    for each in (*optims, own):
        each.zero_grad()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_optimisers_groups_schedulers_and_clipping_act_as_on_gradients_by_hand(clip):
    def parts(program):
        weights, biases = ([x for x in program.model.parameters() if x.ndim == n] for n in (2, 1))
        groups = [{"params": weights, "lr": 0.2, "momentum": 0.9}, {"params": biases, "lr": 0.05}]
        return [torch.optim.SGD(groups, lr=0.1), torch.optim.Adam([program.decay], lr=0.1)]

    def schedules(optims):
        scheduler = torch.optim.lr_scheduler
        of_adjoint = scheduler.LambdaLR(optims[2], lambda t: (1 + t) ** -0.5)
        return [scheduler.StepLR(optims[0], 2, 0.5), scheduler.CosineAnnealingLR(optims[1], 8), of_adjoint]

    mine, theirs = Program(), Program()
    tracker = B.SOBA(mine.model.parameters(), [mine.decay], lr=LR)
    optims, others = parts(mine), parts(theirs)
    v = [torch.zeros_like(x) for x in theirs.model.parameters()]
    own = torch.optim.SGD(v, lr=LR)
    mine_schedules, their_schedules = schedules([*optims, tracker.optimizer]), schedules([*others, own])
    for step in range(8):
        backward("SOBA", tracker, mine, step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(mine.model.parameters(), clip)
        for each in (*optims, tracker):
            each.step()
        for each in optims:
            each.zero_grad()
        by_hand(theirs, others, v, own, step, clip)
        for each in (*mine_schedules, *their_schedules):
            each.step()
    assert tracker.lr == own.param_groups[0]["lr"] == pytest.approx(LR / 3)
    for x, y in zip(mine.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_the_adjoint_moves_by_an_optimiser_of_the_users():
    mine, theirs = Program(), Program()
    options = {"lr": 0.05, "momentum": 0.5}
    tracker = B.SOBA(
        mine.model.parameters(), [mine.decay], optimizer=lambda own: torch.optim.SGD(own, nesterov=True, **options)
    )
    train("SOBA", tracker, mine, range(6))
    v = [torch.zeros_like(x) for x in theirs.model.parameters()]
    own, others = torch.optim.SGD(v, nesterov=True, **options), programs.optimizers(theirs)
    for step in range(6):
        by_hand(theirs, others, v, own, step)
    for x, y in zip(mine.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("name", ["SOBA", "F2SA", "SAMA", "SABA"])
def test_params_and_hparams_are_any_pytree(name):
    results = []
    for form in (lambda xs: iter(xs), list, tuple, lambda xs: {"a": xs[0], "b": {"c": (xs[1], *xs[2:])}}):
        p = Program()
        tracker = make(name, p, form(list(p.model.parameters())), form([p.decay, *extra_hparams(p)]))
        results.append(train(name, tracker, p, range(4)))
    for other in results[1:]:
        assert torch.equal(results[0], other)


def extra_hparams(p):
    """Two hyperparameters that no loss uses, so that they get no .grad."""
    p.unused = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones((), requires_grad=True)
    return p.unused


def test_what_no_loss_uses_gets_no_grad():
    p = Program()
    tracker = make("SOBA", p, hparams=[p.decay, *extra_hparams(p)])
    backward("SOBA", tracker, p, 0)
    assert all(x.grad is None for x in p.unused) and p.decay.grad is not None


@pytest.mark.parametrize("name", KINDS)
def test_a_second_module_holds_the_hyperparameters(name):
    """The results are those of a plain tensor of hyperparameters."""

    class Decay(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = nn.Parameter(values.detach().clone())

    p, q = Program(), Program()
    module = Decay(q.decay)
    q.decay = module.values
    first = train(name, make(name, p), p, range(4))
    second = train(name, make(name, q, hparams=module.parameters()), q, range(4))
    assert torch.equal(first, second)


def test_inner_steps_between_two_outer_steps():
    """backward(None, inner_loss) gives params the gradient of the inner loss, and nothing else moves."""
    mine, theirs = Program(), Program()
    tracker = make("SOBA", mine)
    optims, others = programs.optimizers(mine), programs.optimizers(theirs)
    v = [torch.zeros_like(x) for x in theirs.model.parameters()]
    own = torch.optim.SGD(v, lr=LR)
    for step in range(9):
        if step % 3 == 2:
            train("SOBA", tracker, mine, range(step, step + 1), optims)
            by_hand(theirs, others, v, own, step)
            continue
        value = tracker.backward(None, mine.closures(step)[1]())
        assert value[0] is None and mine.decay.grad is None
        theirs.closures(step)[1]().backward()
        theirs.decay.grad = None
        for each in (optims[0], others[0]):
            each.step()
            each.zero_grad()
    for x, y in zip(mine.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_inner_steps_do_not_count_for_the_period_of_all_data():
    p, calls = Program(), []

    def full():
        calls.append(step)
        return programs.full(p)()

    tracker = B.SRBA(p.model.parameters(), [p.decay], full=full, period=4)
    for step in range(24):
        outer, inner = p.closures(step)
        tracker.backward(outer if step % 3 == 2 else None, inner)
        tracker.step()
        for x in p.tensors():
            x.grad = None
    assert calls == [2, 14]


@pytest.mark.parametrize("name", KINDS)
def test_values_of_the_losses_are_given_back(name):
    p = Program()
    tracker = make(name, p)
    truth = [loss().item() for loss in p.closures(0)]
    values = backward(name, tracker, p, 0)
    if name == "SRBA":  # of all data: neither batch is evaluated
        assert values == (None, None)
        return
    assert not any(value.requires_grad for value in values)
    assert values[1].item() == pytest.approx(truth[1], rel=1e-12)
    assert values[0].item() == pytest.approx(truth[0], rel=1e-12)


# Mixed precision


def scaled_training(name, scale, steps=6, accumulate=1, step_tracker=True, overflow_at=None, without=None):
    p = Program()
    tracker, optims = make(name, p), programs.optimizers(p)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000) if scale else None
    p.scale = scaler.get_scale if scaler is not None else p.scale
    for step in range(steps):
        if step == without:
            continue
        for part in range(accumulate):
            factor = 1.0 if scaler is None else scaler.scale(torch.ones((), dtype=torch.float64)).item()
            if overflow_at == step and part == 0:
                factor = float("inf")
            backward(name, tracker, p, step + part, scale=factor, scaler=scaler)
        for each in optims:
            each.step() if scaler is None else scaler.step(each)
        if scaler is None or not step_tracker:
            tracker.step()
        else:
            scaler.step(tracker)
        if scaler is not None:
            scaler.update()
        for each in optims:
            each.zero_grad()
    return numbers(tracker, p), tracker, scaler


@pytest.mark.parametrize(("accumulate", "step_tracker"), [(1, True), (2, False)])
@pytest.mark.parametrize("name", KINDS)
def test_a_scaler_changes_no_result(name, accumulate, step_tracker):
    """The scale is a power of two, so that results agree; either the scaler or the user steps the tracker."""
    plain, _, _ = scaled_training(name, None, accumulate=accumulate)
    scaled, _, _ = scaled_training(name, 2.0**12, accumulate=accumulate, step_tracker=step_tracker)
    torch.testing.assert_close(plain, scaled, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("accumulate", "step_tracker"), [(1, True), (2, False)])
@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_overflows_is_left_out(name, accumulate, step_tracker):
    """Nothing moves, the scale is halved, and later steps are the same as without the batch."""
    before, _, _ = scaled_training(name, 2.0**12, 2, accumulate, step_tracker)
    after, other, scaler = scaled_training(name, 2.0**12, 3, accumulate, step_tracker, overflow_at=2)
    assert torch.equal(before, after)
    assert scaler.get_scale() == 2.0**11
    assert other.skipped >= 1 and other.report().skipped == other.skipped
    assert all(x.grad is None or not x.grad.any() for x in other.variables)
    later, _, _ = scaled_training(name, 2.0**12, 6, accumulate, step_tracker, overflow_at=2)
    if name != "SABA" or accumulate == 1:  # its tables hold the batches that did not overflow
        left_out, _, _ = scaled_training(name, 2.0**12, 6, accumulate, step_tracker, without=2)
        torch.testing.assert_close(later, left_out, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", KINDS)
def test_bf16_autocast_inside_closures_and_around_the_loop_agree(name):
    """Autocast caches weights in low precision; the cache must not be used at another point."""
    results = []
    for around in (False, True):
        p = Program(dtype=torch.float32)
        tracker, optims = make(name, p), programs.optimizers(p)

        def cast(loss, rows):
            with torch.autocast("cpu", torch.bfloat16):
                return loss(rows)

        if not around:
            p.inner, p.outer = partial(cast, p.inner), partial(cast, p.outer)
        for step in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                backward(name, tracker, p, step)
            for each in (*optims, tracker):
                each.step()
            for each in optims:
                each.zero_grad()
        results.append(numbers(tracker, p))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


# Parameters that are frozen or tied


@pytest.mark.parametrize("name", KINDS)
def test_freezing_params_equals_leaving_them_out(name):
    p, q = Program(), Program()
    start = [x.detach().clone() for x in p.model[0].parameters()]
    for program in (p, q):
        program.model[0].requires_grad_(False)
    first = train(name, make(name, p), p, range(4))
    second = train(name, make(name, q, q.model[-1].parameters()), q, range(4))
    assert torch.equal(first, second)
    assert all(torch.equal(x, y) for x, y in zip(p.model[0].parameters(), start, strict=True))
    assert all(x.grad is None for x in p.model[0].parameters())


class Tied(nn.Module):
    """The same square weight twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(programs.WIDTH, programs.WIDTH)
        self.second = nn.Linear(programs.WIDTH, programs.WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", KINDS)
def test_tied_params_are_one(name):
    """The result is that of a network that explicitly uses one tensor twice."""

    class Twice(Tied):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(self.second.bias.detach().clone())
            del self.second

        def forward(self, x):
            return nn.functional.linear(torch.tanh(self.first(x)), self.first.weight, self.bias)

    p, q = Program(Tied()), Program(Tied())
    q.model[1] = Twice().double()
    q.model[1].load_state_dict(
        {
            name.replace("second.bias", "bias"): x
            for name, x in p.model[1].state_dict().items()
            if "second.w" not in name
        }
    )
    order = {"0.weight": 0, "0.bias": 1, "1.first.weight": 2, "1.first.bias": 3}
    assert [*dict(p.model.named_parameters())][:4] == list(order)
    q_params = dict(q.model.named_parameters())
    p_names = [n.replace("second.bias", "bias") for n, _ in p.model.named_parameters()]
    in_order = [q_params[n] for n in p_names]
    q.model.parameters = lambda: iter(in_order)
    first, second = (train(name, make(name, r), r, range(4)) for r in (p, q))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


# Running statistics and random numbers


@pytest.mark.parametrize("name", [name for name in KINDS if name != "SRBA"])
@pytest.mark.parametrize("switch", [False, True])
def test_running_statistics_are_recorded_once_at_the_users_point(name, switch):
    """They are those of the inner loss; a closure, or code around it, switches to eval mode for the validation loss."""
    p = Program(nn.BatchNorm1d(programs.WIDTH))
    tracker, optims = make(name, p), programs.optimizers(p)
    norm = p.model[1]
    twin = copy.deepcopy(p.model)

    def in_mode(training, loss):
        p.model.train(training)
        try:
            return loss()
        finally:
            p.model.train(not switch)

    norm.momentum = twin[1].momentum = 0.5
    for step in range(3):
        twin.load_state_dict({**twin.state_dict(), **dict(p.model.named_parameters())})
        twin.train()
        twin(p.x[programs.batches(step)[0]])
        outer, inner = p.closures(step)
        losses = [partial(in_mode, False, outer), partial(in_mode, True, inner)]
        losses = losses if KINDS[name][1] else [loss() for loss in losses]
        tracker.backward(*losses, **({"index": programs.batches(step)} if KINDS[name][2] else {}))
        for (key, mine), theirs in zip(norm.named_buffers(), twin[1].buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13, msg=key)
        for each in (*optims, tracker):
            each.step()
        for each in optims:
            each.zero_grad()


def test_a_model_is_found_behind_functions_of_torch():
    """Statistics are restored even if torch has wrapped the closure, whose object also holds the tracker."""
    p = Program(nn.BatchNorm1d(programs.WIDTH))
    p.tracker = tracker = make("F2SA", p)
    before = copy.deepcopy([*p.model.buffers()])
    outer, inner = p.closures(0)
    with pytest.raises(ValueError, match="NaN"):
        tracker.backward(torch.enable_grad()(lambda: outer() * torch.nan), torch.enable_grad()(inner))
    for mine, theirs in zip(p.model.buffers(), before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_every_evaluation_of_a_batch_draws_the_same_numbers(name):
    """Afterwards the random state is that after one evaluation of each loss."""
    p, drawn = Program(), {}

    def noisy(loss, key):
        noise = torch.rand(7)
        drawn.setdefault(key, []).append(noise)
        return loss() * (1 + 0.1 * noise.mean().double())

    tracker = make(name, p)
    for step in range(3):
        if step or name != "SRBA":
            drawn.clear()
        outer, inner = p.closures(step)
        torch.manual_seed(step)
        losses = partial(noisy, outer, "outer"), partial(noisy, inner, "inner")
        tracker.backward(*losses, **({"index": programs.batches(step)} if KINDS[name][2] else {}))
        found = torch.get_rng_state()
        torch.manual_seed(step)
        evaluations = 2 if name != "SRBA" or step else 0
        for _ in range(evaluations):
            torch.rand(7)
        assert torch.equal(found, torch.get_rng_state())
        assert len(drawn) == evaluations
        for noises in drawn.values():
            assert all(torch.equal(noises[0], noise) for noise in noises)
        if evaluations:
            assert not torch.equal(drawn["inner"][0], drawn["outer"][0])
        tracker.step()
        for x in p.tensors():
            x.grad = None
    if KINDS[name][1] and name != "SRBA":
        assert len(drawn["inner"]) > 1


@pytest.mark.parametrize("name", ["F2SA", "STORM", "SAMA", "BOME"])
def test_dropout_at_several_points_is_one_network(name):
    """The directions agree with those of a mask that was drawn beforehand."""

    class Masked(nn.Module):
        mask = torch.ones(())

        def forward(self, x):
            return x * self.mask

    p, q = Program(nn.Dropout(0.5)), Program(Masked())
    trackers = make(name, p), make(name, q)
    ones = torch.ones(programs.BATCH, programs.WIDTH, dtype=torch.float64)
    first_is_inner = name == "F2SA"  # it evaluates the inner loss first
    for step in range(3):
        outer, inner = q.closures(step)
        torch.manual_seed(step)
        masks = [nn.functional.dropout(ones, 0.5) for _ in range(2)]
        of_outer, of_inner = masks[::-1] if first_is_inner else masks

        def masked(loss, mask):
            Masked.mask = mask
            return loss()

        torch.manual_seed(step)
        trackers[0].backward(*p.closures(step))
        trackers[1].backward(partial(masked, outer, of_outer), partial(masked, inner, of_inner))
        for x, y in zip(p.tensors(), q.tensors(), strict=True):
            torch.testing.assert_close(x.grad, y.grad, **EXACT)
        for each in trackers:
            each.step()


# Hooks


def expected(grad, name):
    """.grad after two backward calls with the two hooks: 2 (D + D) + 1 + 1; SRBA's first step has one call: 2 D + 1."""
    return 2 * grad + (1 if name == "SRBA" else 2)


@pytest.mark.parametrize("name", KINDS)
def test_hooks_act_once_as_in_backward(name):
    p, q, called = Program(), Program(), []
    plain, hooked = make(name, p), make(name, q)
    weight = q.model[0].weight

    def doubled(grad):
        called.append("hook")
        return grad * 2

    def after(x):
        called.append("after")
        x.grad = x.grad + 1

    for x in (weight, q.decay):
        x.register_hook(doubled)
        x.register_post_accumulate_grad_hook(after)
    for _ in range(2 if name != "SRBA" else 1):  # the second call adds to the first one's .grad
        called.clear()
        backward(name, plain, p, 0)
        backward(name, hooked, q, 0)
        assert sorted(called) == ["after"] * 2 + ["hook"] * 2
    for x, y in zip(p.tensors(), q.tensors(), strict=True):
        torch.testing.assert_close(
            y.grad, expected(x.grad, name) if any(y is z for z in (weight, q.decay)) else x.grad, **EXACT
        )


def test_weights_that_autocast_caches_are_not_used_at_another_point():
    results = []
    for around in (False, True):
        p = Program(dtype=torch.float32)
        tracker = make("F2SA", p)
        for x in tracker.variables:
            x.add_(1.0)

        def cast(loss, around=around):
            with torch.autocast("cpu", torch.bfloat16, enabled=not around):
                return loss()

        losses = p.closures(0) if around else [partial(cast, loss) for loss in p.closures(0)]
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            tracker.backward(*losses)
        results.append(torch.cat([x.grad.reshape(-1) for x in tracker.variables]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
