"""hg.meta's spellings of torch's functions: the same values and derivatives, used where they are meant to be."""

import pytest
import torch
from torch.nn import functional as F

from helpers import relative
from hypergrad import meta
from hypergrad.diff_optimizers import SGD
from hypergrad.meta import _spelling
from hypergrad.meta._spelling import Spelled
from hypergrad.solvers import CG

TASKS = 3
LABELS = torch.tensor([[0, 2, 1, 3], [3, 3, 0, 1], [2, 0, 0, 1]])
IGNORED = torch.tensor([[0, -100, 1, 3], [3, -100, -100, 1], [2, 0, 0, 1]])
GRID = torch.randint(0, 4, (TASKS, 4, 5, 2), generator=torch.Generator().manual_seed(1))
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(TASKS, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(*shape):
    return draw(*shape).argmax(-1)


# name: (function of a task's tensors, tensors of all tasks, whether the spelling is taken side by side, and alone)
LOSSES = {
    "mean": (F.cross_entropy, (draw(4, 5), LABELS), True, False),
    "module": (torch.nn.CrossEntropyLoss(), (draw(4, 5), LABELS), True, False),
    "sum": (lambda x, y: F.cross_entropy(x, y, reduction="sum"), (draw(4, 5), LABELS), True, False),
    "none": (lambda x, y: F.cross_entropy(x, y, reduction="none"), (draw(4, 5), LABELS), True, False),
    "more axes": (F.cross_entropy, (draw(4, 4, 5, 2), GRID), True, False),
    "more axes, none": (lambda x, y: F.cross_entropy(x, y, reduction="none"), (draw(4, 4, 5, 2), GRID), True, False),
    "one example": (F.cross_entropy, (draw(5), classes(5)), True, False),
    "nll": (lambda x, y: F.nll_loss(x.log_softmax(1), y), (draw(4, 5), LABELS), True, False),
    "nll module": (torch.nn.NLLLoss(reduction="none"), (draw(4, 5), LABELS), True, False),
    "ignored": (F.cross_entropy, (draw(4, 5), IGNORED), False, False),
    "ignored nll": (lambda x, y: F.nll_loss(x, y, reduction="sum"), (draw(4, 5), IGNORED), False, False),
    "ignored class": (lambda x, y: F.cross_entropy(x, y, ignore_index=3), (draw(4, 5), LABELS), False, False),
    "weight": (lambda x, y: F.cross_entropy(x, y, WEIGHT), (draw(4, 4), LABELS), False, False),
    "smoothing": (lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), (draw(4, 5), LABELS), False, False),
    "probabilities": (F.cross_entropy, (draw(4, 5), draw(4, 5, seed=1).softmax(-1)), False, False),
    "no reduction, of old": (lambda x, y: F.cross_entropy(x, y, reduce=False), (draw(4, 5), LABELS), False, False),
}
LINEAR = {
    "linear": (F.linear, (draw(4, 5), draw(3, 5), draw(3)), True, False),
    "linear, no bias": (F.linear, (draw(4, 5), draw(3, 5)), True, False),
    "linear of a vector": (F.linear, (draw(5), draw(3, 5), draw(3)), False, False),
    "linear of a grid": (F.linear, (draw(2, 4, 5), draw(3, 5), draw(3)), False, False),
}
IMAGES = draw(8, 16, 14, 12)
TIES = (2 * IMAGES).round()  # many maxima in one window: the first of them gets the gradient
POOLING = {
    "pool": (lambda x: F.max_pool2d(x, 2), (IMAGES,), True, True),
    "pool module": (torch.nn.MaxPool2d(2), (IMAGES,), True, True),
    "pool, ties": (lambda x: F.max_pool2d(x, 3, 2), (TIES,), True, True),
    "pool, overlapping": (lambda x: F.max_pool2d(x, (3, 2), stride=(1, 2)), (IMAGES,), True, True),
    "pool, padding": (lambda x: F.max_pool2d(x, 3, 2, padding=1, ceil_mode=True), (TIES,), True, True),
    "pool, dilation": (lambda x: torch.max_pool2d(x, [2, 2], [2, 2], [1, 1], [2, 2]), (TIES,), True, True),
    "pool, indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], (IMAGES,), False, False),
    "pool, one image": (lambda x: F.max_pool2d(x, 2), (draw(16, 36, 30),), False, False),
    "pool, channels last": (
        lambda x: F.max_pool2d(x, 2),
        (IMAGES.movedim(2, -1).contiguous().movedim(-1, 2),),
        False,
        False,
    ),
    "pool, few channels": (lambda x: F.max_pool2d(x, 2), (draw(8, 3, 34, 30),), False, False),
    "pool, small": (lambda x: F.max_pool2d(x, 2), (draw(2, 16, 6, 6),), False, False),
}
CASES = LOSSES | LINEAR | POOLING


def derivatives(function, tensors):
    """The value, its gradient along a random direction, and the gradient of that along another."""
    floats = [x.requires_grad_() for x in tensors if x.is_floating_point()]
    value = function(*tensors)
    first = torch.autograd.grad(value, floats, torch.randn(value.shape, dtype=value.dtype), create_graph=True)
    inner = sum((g * torch.randn(g.shape, dtype=g.dtype)).sum() for g in first)
    if not inner.requires_grad:
        return [value, *first, *map(torch.zeros_like, floats)]
    return [value, *first, *torch.autograd.grad(inner, floats, allow_unused=True, materialize_grads=True)]


@pytest.fixture
def taken(monkeypatch):
    """For each function that has a spelling, in order of the calls, whether it was taken."""
    calls = []

    def noting(spelling):
        def call(*args, **kwargs):
            result = spelling(*args, **kwargs)
            calls.append(result is not None)
            return result

        return call

    for function, spelling in list(_spelling.SPELLINGS.items()):
        monkeypatch.setitem(_spelling.SPELLINGS, function, noting(spelling))
    return calls


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("together", [True, False])
def test_values_and_derivatives_are_torchs(name, together, taken):
    function, tensors, *due = CASES[name]
    given = [x.clone() if together else x[0].clone() for x in tensors]
    if name == "pool, channels last":
        given = [x.detach() for x in tensors] if together else [x[0].detach() for x in tensors]

    def spelled(*xs):
        with Spelled(TASKS if together else 1):
            return function(*xs)

    def looped(*xs):
        return torch.stack([function(*(x[i] for x in xs)) for i in range(TASKS)])

    torch.manual_seed(0)
    truth = derivatives(looped if together else function, given)
    assert not taken
    torch.manual_seed(0)
    got = derivatives(torch.func.vmap(spelled) if together else spelled, given)
    assert any(taken) == due[0 if together else 1]
    for x, y in zip(got, truth, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert relative(x.detach(), y.detach()) < 1e-12 if y.any() else not x.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_pooling_of_what_is_not_finite(bad):
    x = IMAGES[0].clone()
    x[2, 3, 4:6, 4:6] = bad
    x[5, 1, 0, 0] = bad
    for size in (2, 3):
        with Spelled(1):
            got = F.max_pool2d(x, size, 2)
        assert torch.equal(got.nan_to_num(7.0), F.max_pool2d(x, size, 2).nan_to_num(7.0))
        assert got.isnan().any() == (bad != bad)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (F.cross_entropy, (draw(4, 5), LABELS + 5)),
        (F.cross_entropy, (draw(4, 5), LABELS - 9)),
        (F.cross_entropy, (draw(4, 5), LABELS[:, :3])),
        (lambda x, y: F.cross_entropy(x, y, reduction="median"), (draw(4, 5), LABELS)),
        (lambda x, y: F.nll_loss(x, "label"), (draw(4, 5), LABELS)),
        (F.linear, (draw(4, 5), draw(3, 4))),
        (lambda x, w: F.linear(x, 3), (draw(4, 5), draw(3, 4))),
        (lambda x: F.max_pool2d(x, 0), (IMAGES,)),
        (lambda x: F.max_pool2d(x, 2, padding=7), (IMAGES,)),
    ],
)
def test_bad_input_is_refused_as_torch_does(function, tensors):
    def spelled(*xs):
        with Spelled(TASKS):
            return function(*xs)

    with pytest.raises(Exception) as due:
        torch.func.vmap(function)(*tensors)
    with pytest.raises(type(due.value)):
        torch.func.vmap(spelled)(*tensors)


class Own(torch.Tensor):
    """A tensor with functions of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _spelling.SPELLINGS:
            return torch.tensor(7.0)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["mean", "nll", "linear", "pool"])
def test_a_subclass_keeps_its_own_functions(name, taken):
    function, tensors, *_ = CASES[name]
    first, *rest = [x[0].detach() for x in tensors]
    with Spelled(TASKS):
        assert function(first.as_subclass(Own), *rest) == 7
    assert not taken


def test_nothing_is_spelled_outside(taken):
    with Spelled(TASKS):
        F.relu(IMAGES)
    F.linear(IMAGES[0, 0, 0], IMAGES[0, 0, 0])
    assert not taken


@pytest.mark.parametrize("chunk", [1, TASKS])
@pytest.mark.parametrize("method", [meta.Implicit(solver=CG(rtol=1e-12)), meta.Unrolled()])
def test_in_a_meta_gradient(method, chunk, taken):
    """Tasks of different sizes, padded with examples to ignore, through pooling: as without any spelling."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.MaxPool2d(2), torch.nn.Tanh(), torch.nn.Flatten()
    ).double()
    h = {name: x.detach().requires_grad_() for name, x in net.named_parameters()}
    h["head"] = torch.randn(4, 8 * 64, dtype=torch.float64).mul_(0.1).requires_grad_()
    x = 0.3 * draw(12, 1, 16, 16)

    def loss(w, _, task, y="y"):
        w = dict(w)
        head = w.pop("head")
        return F.cross_entropy(F.linear(torch.func.functional_call(net, w, task["x"]), head), task[y])

    ignored = LABELS.repeat(1, 3)
    ignored[1, 5:] = -100
    given = (
        meta.biased(loss, 20.0),
        lambda w, h, t: loss(w, h, t, "ignored"),
        h,
        {"x": x, "y": LABELS.repeat(1, 3), "ignored": ignored},
    )
    options = {"method": method, "steps": 30 if isinstance(method, meta.Implicit) else 3, "chunk": chunk}
    options["rule"] = SGD(lr=0.03)
    result = meta.grad(*given, **options)
    assert any(taken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_spelling, "SPELLINGS", {})
        truth = meta.grad(*given, **options)
    for name in h:
        assert relative(result.grads[name], truth.grads[name]) < 1e-10
