"""from_torch on real models: frozen and unused parameters, and options that a version of torch lacks."""

from dataclasses import replace

import pytest
import torch
from test_rules import IDS, OPTIONS, TO_1E_12, distance

import hypergrad as hg

D = hg.diff_optimizers


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(name, options, params):
    return getattr(torch.optim, name)(params, **options)


def assert_as_torch(name, ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        if name in TO_1E_12:
            assert distance([x], [y]) < (1e-12 if x.dtype is torch.float64 else 1e-5)
        else:
            assert torch.equal(x.detach(), y.detach())


def train(optimizer, loss, steps):
    for t in steps:
        optimizer.zero_grad()
        loss(optimizer.param_groups[0]["params"], t).backward()
        optimizer.step()


def follow(twin, loss, steps):
    params, state = twin.params, twin.state
    for t in steps:
        step = twin.rule.on(lambda w, h, t=t: loss(w, t))
        params, state = step((params, state))
        # A plain run, which carries numbers from step to step, and no graph.
        params = [w.detach().requires_grad_(v.requires_grad) for w, v in zip(params, twin.params, strict=True)]
        state = {name: _detached(x) for name, x in state.items()}
    return params


def _detached(x):
    return [y.detach() for y in x] if isinstance(x, list) else x.detach()


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def four(dtype, frozen=1):
    """A model with a parameter that is always used, a frozen one, an unused one, and one used in some steps only."""
    params = [torch.randn(3, dtype=dtype) for _ in range(4)]
    return [w.requires_grad_(i != frozen) for i, w in enumerate(params)]


def some_used(w, t):
    loss = (w[0] - 1).sin().sum() + (w[0] * w[1]).sum().cos()
    return loss + (w[3].cos() * w[0]).sum() if t % 3 else loss


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("before", [0, 1, 2, 7])
def test_frozen_and_unused_parameters_are_skipped_as_torch_skips_them(name, options, before, dtype):
    """Weight decay, moments and bias corrections skip them too, after a conversion at the start or after some steps."""
    theirs = four(dtype)
    start = [w.detach().clone() for w in theirs]
    optimizer = build(name, options, theirs)
    train(optimizer, some_used, range(before))
    twin = D.from_torch(optimizer)
    assert [w.requires_grad for w in twin.params] == [True, False, True, True]
    ours = follow(twin, some_used, range(before, before + 9))
    train(optimizer, some_used, range(before, before + 9))
    assert_as_torch(name, ours, theirs)
    assert torch.equal(ours[1], start[1]) and torch.equal(ours[2], start[2]) and not torch.equal(ours[0], start[0])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_a_low_rank_adapter_is_trained_and_its_layer_is_not(name):
    """The optimizer has all parameters; the hypergradient agrees with the plain graph over the adapter alone."""
    layer = torch.nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)
    a = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(9, 4, dtype=torch.float64)
    optimizer = build(name, {"lr": 0.1, "weight_decay": 0.1}, [*layer.parameters(), a, b])

    def loss(w, h):
        return ((x @ (w[0] + w[2] @ w[3]).T + w[1]) ** 2).mean() + h.exp() * (w[2] ** 2).sum()

    h = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        optimizer.zero_grad()
        loss([layer.weight, layer.bias, a, b], h.detach()).backward()
        optimizer.step()
    rule, params, state = D.from_torch(optimizer)
    rule = replace(rule, lr=lambda h: h.exp() / 4)
    assert rule.frozen == (0, 1)
    carry = (params, state)
    for _ in range(4):
        carry = rule.on(loss)(carry, h)
    due = torch.autograd.grad((carry[0][2] ** 2).sum() + carry[0][3].sum(), h)[0]
    assert torch.equal(carry[0][0], layer.weight) and torch.equal(carry[0][1], layer.bias)
    outer = lambda s, h: (s[0][2] ** 2).sum() + s[0][3].sum()  # noqa: E731
    for options in ({"memory": "graph"}, {"memory": "iterates"}, {"memory": "sqrt"}, {"checkpoints": 2}):
        result = hg.unroll.reverse(rule.on(loss), (params, state), h, outer, 4, **options)
        torch.testing.assert_close(result.grads, due, rtol=1e-12, atol=0)
        assert torch.equal(result.params[0][0], layer.weight)
    result = hg.unroll.forward(rule.on(loss), (params, state), h, outer, 4)
    torch.testing.assert_close(result.grads, due, rtol=1e-10, atol=0)


@pytest.mark.parametrize("decoupled", [True, False])
def test_groups_that_do_not_say_whether_the_decay_is_decoupled(decoupled):
    """In torch 2.6, AdamW and Adam are separate classes without this option."""
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)([w], weight_decay=0.1)
    optimizer.param_groups[0].pop("decoupled_weight_decay", None)
    assert D.from_torch(optimizer).rule.decoupled_weight_decay is decoupled


@pytest.mark.parametrize("name", ["Adam", "RAdam", "SGD", "Adagrad", "RMSprop"])
def test_options_that_a_group_lacks_have_their_defaults(name):
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = build(name, {}, [w])
    for key in ("maximize", "amsgrad", "decoupled_weight_decay", "differentiable"):
        optimizer.param_groups[0].pop(key, None)
    rule = D.from_torch(optimizer).rule
    assert rule == replace(rule, maximize=False)


def test_parameters_that_took_different_numbers_of_steps_go_on_with_their_own():
    """One parameter had no gradient at the first step; its first step of Adam moves each entry by the learning rate."""
    w = [torch.ones(2, requires_grad=True, dtype=torch.float64) for _ in range(2)]
    optimizer = torch.optim.Adam(w, lr=0.1)
    w[0].grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    rule, params, state = D.from_torch(optimizer)
    new, state = rule.update(params, state, [None, torch.tensor([3.0, -4.0], dtype=torch.float64)])
    assert torch.equal(new[0], params[0])
    torch.testing.assert_close(new[1].detach(), torch.tensor([0.9, 1.1], dtype=torch.float64), rtol=1e-7, atol=0)
    assert state["missed"].tolist() == [1, 1] and state["step"] == 2


def test_complex_and_sparse_parameters_are_named():
    with pytest.raises(ValueError, match=r"parameter 0 of SGD is complex: optimise torch\.view_as_real"):
        D.from_torch(torch.optim.SGD([torch.ones(2, dtype=torch.complex128, requires_grad=True)]))
