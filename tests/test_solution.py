"""Too few steps of a linear solver: a warning if the hypergradient is far off, which names the steps needed."""

import re
import warnings

import pytest
import torch

import hypergrad as hg
from helpers import S, as_lists, errors, problem_at
from problems import PROBLEMS

NAMES = [name for name in PROBLEMS if problem_at(name).batch_dims == 0]
METHODS = {"fixed_point": hg.fixed_point, "neumann": hg.neumann, "CG": hg.CG, "CG_normaleq": hg.CG_normaleq}


def told(call):
    """The result, and the texts of InaccurateHypergradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if issubclass(w.category, hg.InaccurateHypergradient)]


class Slow:
    """½wᵀAw − wᵀλ with eigenvalues of A from .005 to .01, at its solution: a step of Φ contracts by .995 at most."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=generator)).Q
        self.a = (q * torch.linspace(0.005, 0.01, 30, dtype=torch.float64)) @ q.T
        self.t = torch.randn(30, dtype=torch.float64, generator=generator)
        self.hparams = [torch.randn(30, dtype=torch.float64, generator=generator).requires_grad_()]
        self.params = [torch.linalg.solve(self.a, self.hparams[0].detach())]
        self.truth = torch.linalg.solve(self.a, self.params[0] - self.t)

    def fp_map(self, w, h):
        return [w[0] - self.a @ w[0] + h[0]]

    def inner_loss(self, w, h):
        return 0.5 * w[0] @ self.a @ w[0] - w[0] @ h[0]

    def outer_loss(self, w, h):
        return 0.5 * (w[0] - self.t).square().sum()

    def error(self, grads) -> float:
        return float((grads[0] - self.truth).norm() / self.truth.norm())


@pytest.mark.parametrize("method", [hg.fixed_point, hg.neumann])
@pytest.mark.parametrize("steps", [1, 3, 5, 20, 100])
def test_steps_of_a_slow_map(method, steps):
    """The error in the message is right to a few percent, and the number of steps in it reduces it to about a tenth."""
    p = Slow()

    def run(k):
        return told(lambda: method(p.params, p.hparams, k, p.fp_map, p.outer_loss, set_grad=False))

    grads, texts = run(steps)
    (text,) = texts
    named = int(re.search(r"an estimated (\d+)%", text).group(1)) / 100
    assert abs(named - p.error(grads)) < 0.05
    needed = int(re.search(r"about (\d+) steps", text).group(1))
    enough, _ = run(needed)
    assert 0.05 < p.error(enough) < 0.2
    assert run(3 * needed)[1] == []


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in NAMES for method in METHODS if method != "CG" or problem_at(name).symmetric],
)
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100])
def test_the_warning_comes_where_the_hypergradient_is_off(name, steps, method):
    """Over all problems, no error above 60 % comes without the warning, and none below 2 % with it."""
    p = as_lists(problem_at(name))
    call = METHODS[method]
    grads, texts = told(lambda: call(p.params, p.hparams, steps, p.fp_map, p.outer_loss, set_grad=False))
    off = max(errors(grads, p.grads))
    assert texts or off < 0.6
    assert not texts or off > 0.02


@pytest.mark.parametrize("form", ["inner_loss", "fp_map"])
def test_implicit_grad_of_a_fixed_number_of_steps(form):
    p = Slow()

    def run(solver, **options):
        options = {"params": p.params, "hparams": p.hparams, "symmetric": True, form: getattr(p, form)} | options
        return told(lambda: hg.implicit.grad(p.outer_loss, solver=solver, **options))

    for solver in (S.FixedPoint(max_steps=20), S.Neumann(max_steps=20), S.CG(max_steps=1), S.FixedPoint(max_steps=1)):
        assert len(run(solver)[1]) == 1
    assert run(S.FixedPoint(max_steps=20, on_failure="ignore"))[1] == []
    assert run(S.CG(max_steps=12))[1] == [] and run(S.CG(rtol=1e-8))[1] == []
    # A good start needs few steps.
    close = run(S.CG(max_steps=10))[0].adjoint
    assert run(S.CG(max_steps=1), x0=close)[1] == [] and run(S.FixedPoint(max_steps=2), x0=close)[1] == []


def test_the_part_of_the_outer_loss_alone_counts():
    """The direct part ∇₂E is exact, so few steps are enough if it is most of the hypergradient."""
    p = Slow()

    def run(size):
        def outer(w, h):
            return p.outer_loss(w, h) + size * p.truth @ h[0]

        return told(lambda: hg.fixed_point(p.params, p.hparams, 5, p.fp_map, outer, set_grad=False))[1]

    assert run(0.1) and run(1.0) and not run(100.0)


@pytest.mark.parametrize("size", [2.0**-1000, 2.0**-500, 2.0**500, 2.0**900])
def test_the_size_of_the_outer_loss_does_not_matter(size):
    p = Slow()
    for steps, few in ((5, True), (1500, False)):
        _, texts = told(
            lambda k=steps: hg.implicit.grad(
                lambda w, h: size * p.outer_loss(w, h),
                params=p.params,
                hparams=p.hparams,
                fp_map=p.fp_map,
                solver=S.FixedPoint(max_steps=k),
            )
        )
        assert bool(texts) is few


def test_float32_at_its_accuracy_is_no_failure():
    """In normal equations an eigenvalue λ acts as λ², so the error along its eigenvector may exceed rounding level."""
    h = torch.tensor([0.5, -0.2], requires_grad=True)

    def run(low, b):
        a, b = torch.tensor([1.0, low]), torch.tensor(b)
        w = h.detach() / a
        (grad,) = hg.CG_normaleq(
            [w], [h], 20, lambda w, h: [w[0] - a * w[0] + h[0]], lambda w, h: w[0] @ b, set_grad=False
        )
        return float((grad - b / a).norm() / (b / a).norm())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(0.02, [1.0, 3e-5]) < 0.01
    with pytest.warns(hg.NotConverged, match="STAGNATED"):
        assert run(1e-5, [1.0, 0.05]) > 0.9


@pytest.mark.parametrize("method", [hg.CG, hg.CG_normaleq, hg.fixed_point, hg.neumann])
def test_float32_after_more_steps_than_it_needs(method):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
        a = (q * torch.logspace(-1.7, 0, 12)) @ q.T
        h, t = torch.randn(12, generator=generator).requires_grad_(), torch.randn(12, generator=generator)
        w = torch.linalg.solve(a, h.detach())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (grad,) = method(
                [w],
                [h],
                1000,
                lambda w, h, a=a: [w[0] - a @ w[0] + h[0]],
                lambda w, h, t=t: (w[0] - t).square().sum(),
                set_grad=False,
            )
        due = torch.linalg.solve(a.double(), 2 * (w - t).double())
        assert (grad - due).norm() <= 1e-2 * due.norm()
