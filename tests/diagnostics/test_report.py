"""The report of check: its verdict, its advice, and its errors."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import hypergrad as hg
from helpers import S, default_device, hypergradient
from perturbed import error, moved, newton_fit, plain

check = hg.diagnostics.check
QUIET = S.Dense(on_failure="ignore")


def test_the_verdict_on_a_right_hypergradient_is_right():
    p = plain("logistic")
    report = check(hypergradient(p, "inner_loss", S.CG(rtol=1e-12)))
    assert report.estimate.relative_error < 1e-10
    assert "right to about" in report.advice[0] and len(report.advice) == 1


def test_inputs_that_changed_since_the_call_are_named_by_an_error():
    p = plain("logistic")
    w, h = p.params.clone(), p.hparams.detach().clone().requires_grad_()
    options = {"inner_loss": p.inner_loss, "params": w, "hparams": h, "solver": QUIET}
    result = hg.implicit.backward(p.outer_loss, **options)
    before = h.detach().clone().requires_grad_()
    torch.optim.SGD([h], lr=0.1).step()
    with pytest.raises(ValueError, match=r"hparams changed since.*pass hparams= as they were"):
        check(result)
    assert check(result, hparams=before).estimate.relative_error < 1e-10
    w.add_(1.0)
    with pytest.raises(ValueError, match="params and hparams changed since"):
        check(result)
    with pytest.raises(ValueError, match=r"^params changed since"):
        check(result, hparams=before)


def test_evaluated_losses_are_asked_for_again():
    p = moved(plain("logistic"), 1e-2)
    w = p.params.clone().requires_grad_()
    options = {"params": w, "hparams": p.hparams, "solver": QUIET}
    result = hg.implicit.grad(p.outer_loss(w, p.hparams), inner_loss=p.inner_loss(w, p.hparams), **options)
    with pytest.raises(TypeError, match=r"needs outer_loss, inner_loss .it was given evaluated"):
        check(result)
    report = check(result, outer_loss=p.outer_loss, inner_loss=p.inner_loss)
    assert 0.9 < report.estimate.error / (error(result.grads, p) * np.linalg.norm(p.grads[0])) < 1.1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "needs outer_loss, inner_loss .or fp_map, or residual., params, hparams .the result does not know it"),
        ({"outer_loss": 1.0}, "needs inner_loss .or fp_map, or residual., params, hparams"),
        ({"inner_loss": 1, "fp_map": 2}, "exactly one"),
    ],
)
def test_a_list_without_its_problem_is_an_error(keywords, message):
    with pytest.raises(TypeError, match=message):
        check([torch.ones(3)], **keywords)


def test_a_stochastic_problem_has_no_error_estimate():
    p = plain("logistic")
    noisy = replace(p, fp_map=hg.operators.Stochastic(p.fp_map))
    result = hypergradient(noisy, "fp_map", S.GMRES(max_steps=3))
    with pytest.raises(ValueError, match="drawn again"):
        check(result)
    for call in (hg.implicit.polish, lambda result: hg.implicit.refine(result, 0.1)):
        with pytest.raises(TypeError, match="one fixed problem, not a Stochastic"):
            call(result)


def test_a_problem_that_changed_without_a_trace_is_noticed():
    p, shift = moved(plain("logistic"), 1e-2), [1.0]
    q = replace(p, inner_loss=lambda w, h: p.inner_loss(w, h) * shift[0])
    result = hypergradient(q, "inner_loss", QUIET)
    assert not any("random" in line for line in check(result).advice)
    shift[0] = 2.0
    assert any("the inner problem is random, or its data" in line for line in check(result).advice)


def test_nan_is_reported_and_nothing_is_estimated():
    p = plain("logistic")
    q = replace(p, outer_loss=lambda w, h: p.outer_loss(w, h) * torch.nan)
    report = check(hypergradient(q, "inner_loss", S.CG(on_failure="ignore")))
    assert not report.estimate.settled and "NaN" in report.advice[0]
    json.dumps(report.to_dict())


@pytest.mark.filterwarnings("ignore::hypergrad.InaccurateHypergradient")
def test_the_report_is_a_table_that_ends_in_advice_and_a_dict_of_numbers():
    p = moved(plain("logistic"), 0.3)
    with pytest.warns(hg.UnsolvedInnerProblem):
        result = hypergradient(p, "inner_loss", S.CG(rtol=1e-8))
    report = check(result)
    lines = str(report).splitlines()
    assert lines[0].startswith("inner residual") and lines[-1].startswith("- ")
    assert any("the inner problem is not solved" in line for line in report.advice)
    assert any(
        "spend its steps there" in line and "the adjoint system is solved further" in line for line in report.advice
    )
    assert "condition number" in str(report) and report.structure.definiteness == "positive definite"
    numbers = json.loads(json.dumps(report.to_dict()))
    assert numbers["relative_error"] == report.estimate.relative_error and numbers["ok"] is False
    rough = check(hypergradient(plain("logistic"), "inner_loss", S.CG(max_steps=2)))
    assert any("adjoint unsolved" in line for line in rough.advice) and "adjoint unsolved" in rough.verdict
    assert any("the inner problem is solved further" in line for line in rough.advice)


@pytest.mark.parametrize("form", ["fp_map", "inner_loss"])
def test_the_advice_gives_the_rate_of_the_inner_solver(form):
    """w comes from 8 gradient steps of fp_map's size, which is the best one: the error falls by q a step."""
    p, w = plain("logistic"), torch.zeros(30, dtype=torch.float64)
    for _ in range(8):
        w = p.fp_map(w, p.hparams).detach()
    report = check(hypergradient(replace(p, params=w), form, QUIET))
    text = next(line for line in report.advice if "the inner problem is not solved" in line)
    assert abs(float(text.split(" is ")[2].split(",")[0]) - p.contraction) < 0.03  # the rate at the solution
    more = int(text.split("about ")[1].split(" more")[0])
    for _ in range(more):
        w = p.fp_map(w, p.hparams).detach()
    assert error(hypergradient(replace(p, params=w), form, QUIET).grads, p) < 2e-3


def test_findings_enter_the_verdict_and_come_first_after_it():
    p = plain("logistic")
    h = p.hparams.detach().clone().requires_grad_()
    extra = torch.ones(2, dtype=torch.float64, requires_grad=True)
    result = hg.implicit.grad(
        lambda w, h: p.outer_loss(w, h[0]),
        inner_loss=lambda w, h: p.inner_loss(w, h[0]),
        params=p.params,
        hparams=[h, extra],
        solver=QUIET,
    )
    report = check(result)
    assert [each.name for each in report.findings] == ["hyperparameter reaches nothing"]
    assert not report.ok and report.verdict == report.advice[0]
    assert "hyperparameter reaches nothing" in report.verdict and "right to about" in report.verdict
    assert report.advice[1].startswith("hyperparameter reaches nothing: hparams[1]")
    json.dumps(report.to_dict())


def test_an_estimate_that_cannot_be_had_says_so():
    """The inner loss log(1 + e^w) has no minimiser."""
    lam = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.warns(hg.HypergradientWarning):
        result = hg.implicit.grad(
            lambda w, lam: w.square(),
            inner_loss=lambda w, lam: torch.nn.functional.softplus(lam * w),
            params=torch.tensor(1.0, dtype=torch.float64),
            hparams=lam,
        )
    report = check(result)
    assert not report.estimate.settled
    assert any("cannot be estimated" in line for line in report.advice)


def test_bad_options_of_check():
    p = plain("ridge")
    result = hypergradient(p, "inner_loss", QUIET)
    for error_type, match, options in (
        (ValueError, "max_products must be a whole number ≥ 1, got 0", {"max_products": 0}),
        (ValueError, "max_products must be a whole number ≥ 1, got 2.5", {"max_products": 2.5}),
        (TypeError, "solver must be a function, got 'CG'", {"solver": "CG"}),
        (TypeError, "Nystrom.* approximates", {"solver": S.Nystrom()}),
        (TypeError, "FixedPoint.* approximates: give one with an rtol", {"solver": S.FixedPoint(max_steps=1)}),
        (TypeError, "as they are, got damping=0.1", {"solver": S.CG(damping=0.1)}),
        (TypeError, "solve must be a function, got 3", {"solve": 3}),
        (ValueError, "the value of solve must be like params", {"solve": lambda h: p.params[:2]}),
    ):
        with pytest.raises(error_type, match=match):
            check(result, **options)
    with pytest.raises(TypeError, match=r"inner_loss \(or fp_map, or residual\).*functional_call"):
        check([result.grads], outer_loss=p.outer_loss)


def test_a_solve_that_ignores_its_argument_is_reported():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    lam = w.clone().requires_grad_()
    result = hg.implicit.grad(
        lambda w, lam: w.square().sum(), inner_loss=lambda w, lam: (w - lam).square().sum(), params=w, hparams=lam
    )
    assert "does solve use its argument" in check(result, solve=lambda h: w).findings[0].message
    assert not any("finite differences" in line for line in check(result, solve=lambda h: h).advice)


def test_a_change_that_torch_does_not_count_is_reported():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    lam = w.detach().clone().requires_grad_()
    result = hg.implicit.grad(
        lambda w, lam: w.square().sum(), inner_loss=lambda w, lam: (w - lam).square().sum(), params=w, hparams=lam
    )
    w.data.mul_(1.1)
    assert any("when the hypergradient was computed" in line and ".data" in line for line in check(result).advice)


def test_the_advice_where_the_true_hypergradient_is_zero():
    w, lam = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    rough = hg.implicit.grad(
        lambda w, lam: w**2 / 2,
        inner_loss=lambda w, lam: (w - lam) ** 2 / 2,
        params=w,
        hparams=lam,
        solver=S.CG(on_failure="ignore"),
    )
    advice = " ".join(check(rough).advice)
    assert "an error of 1 where the true hypergradient is 0" in advice and "inf" not in advice


# One verdict


def test_no_finding_stands_beside_a_verdict_that_all_is_well():
    """A map is wrongly declared symmetric, and the hypergradient has an error of 2 %."""
    rng = torch.Generator().manual_seed(0)
    j = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    j = 0.5 * j / torch.linalg.matrix_norm(j, 2)
    lam = torch.randn(6, generator=rng, dtype=torch.float64).requires_grad_()
    inverse = torch.linalg.inv(torch.eye(6, dtype=torch.float64) - j)
    given = {"fp_map": lambda w, h: j @ w + h, "params": inverse @ lam.detach(), "hparams": lam, "symmetric": True}
    result = hg.implicit.grad(lambda w, h: (w - 1).square().sum(), solver=S.Dense(), **given)
    for scale, names in ((1.0, ["not symmetric"]), (1.02, ["not symmetric", "finite differences"])):
        report = check(replace(result, grads=result.grads * scale), solve=lambda h: inverse @ h)
        assert not report.ok and "nothing needs to be done" not in str(report)
        assert str(report).count(f"- {report.verdict}\n") == 1 and all(name in report.verdict for name in names)
        assert [each.name for each in report.findings] == names


def test_a_right_hypergradient_with_agreeing_differences_is_right():
    p = plain("logistic")
    report = check(hypergradient(p, "inner_loss", QUIET), solve=newton_fit(p))
    assert report.ok and "nothing needs to be done" in report.verdict and not report.left_out


def test_a_low_rank_approximation_that_is_no_solution_is_reported():
    """The residual of Nystrom(rank=2) is several times that of v = 0."""
    p = plain("logistic")
    result = hypergradient(p, "inner_loss", S.Nystrom(rank=2, on_failure="ignore"))
    report = check(result)
    (found,) = [each for each in report.findings if each.name == "adjoint unsolved"]
    assert found.numbers["relative residual"] > 0.1
    assert "Nystrom does not fit: an approximation" in found.message
    assert not report.ok and "adjoint unsolved" in report.verdict
    true = error(result.grads, p) * np.linalg.norm(p.grads[0])
    assert report.estimate.error == pytest.approx(true, rel=1e-6)


# Damping


@pytest.mark.parametrize("form", ["inner_loss", "residual", "fp_map"])
def test_the_effect_of_damping_is_told_apart_from_an_unsolved_system(form):
    """The error is that against the oracle, which has no damping; γ is inferred from the residuals."""
    p, damping = plain("logistic"), 0.01
    result = hypergradient(p, form, S.GMRES(rtol=1e-10, damping=damping, restart=60))
    report = check(result)
    e = report.estimate
    true = error(result.grads, p) * np.linalg.norm(p.grads[0])
    assert true > 1e-3 * np.linalg.norm(p.grads[0])
    assert e.damping == pytest.approx(damping, rel=1e-6) and e.adjoint_relative_residual < 1e-8
    assert e.error == pytest.approx(true, rel=1e-6) and e.from_damping == pytest.approx(true, rel=1e-6)
    assert any("solved with a damping of about 0.01" in line for line in report.advice)
    assert not any("adjoint system is not solved" in line or "unsolved" in line for line in report.advice)
    assert not check(hypergradient(p, form, S.GMRES(max_steps=3))).estimate.damping


@pytest.mark.parametrize("form", ["inner_loss", "residual", "fp_map"])
def test_check_may_judge_a_hypergradient_as_that_of_the_damped_problem(form):
    """At a saddle the undamped system is indefinite; the truth is that of g + γ/2 ‖w − w₀‖², by dense Newton steps."""
    rng, n = torch.Generator().manual_seed(3), 6
    a = torch.randn(n, n, generator=rng, dtype=torch.float64)
    a = (a + a.mT) / 4
    b, start = (torch.randn(n, generator=rng, dtype=torch.float64) for _ in range(2))
    damping = 0.5 - 2 * float(torch.linalg.eigvalsh(a)[0])
    lam = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def loss(w, h):
        return 0.5 * w @ a @ w + h * (b @ w) + 0.05 * (w**4).sum()

    def gradient(w, h):
        return a @ w + h * b + 0.2 * w**3

    inner = {"inner_loss": loss, "residual": gradient, "fp_map": lambda w, h: w - gradient(w, h)}[form]
    outer = lambda w, h: (w - 1).square().sum() + h**2  # noqa: E731
    solver = S.CG(rtol=1e-12, damping=damping, on_failure="ignore")
    symmetric = {} if form == "inner_loss" else {"symmetric": True}
    result = hg.implicit.grad(outer, solver=solver, params=start, hparams=lam, **{form: inner}, **symmetric)
    w, h = start.clone(), lam.detach()
    for _ in range(50):
        system = a + torch.diag(0.6 * w**2 + damping)
        w = w - torch.linalg.inv(system) @ (gradient(w, h) + damping * (w - start))
    system = a + torch.diag(0.6 * w**2 + damping)
    true = 2 * h - b @ torch.linalg.inv(system) @ (2 * (w - 1))
    damped = {
        "inner_loss": lambda w, h: loss(w, h) + damping / 2 * (w - start).square().sum(),
        "residual": lambda w, h: gradient(w, h) + damping * (w - start),
        "fp_map": lambda w, h: w - gradient(w, h) - damping * (w - start),
    }[form]
    report = check(result, **{form: damped}, **symmetric)
    e = report.estimate
    assert report.structure.definiteness == "positive definite"
    assert e.settled and e.error == pytest.approx(float((result.grads - true).abs()), rel=0.05)
    assert float((e.corrected - true).abs()) < 1e-3 * float(true.abs())


# Networks in training


class BatchNorm(torch.nn.Module):
    """Batch norm in training mode, written out, because newer versions of torch lack its third derivative."""

    def __init__(self, features: int):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(make(features)) for make in (torch.ones, torch.zeros))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deviations = x - x.mean(0)
        return deviations / (deviations.square().mean(0) + 1e-5).sqrt() * self.weight + self.bias


def training_network(hidden: int = 24):
    """A network after a few steps of Adam, where the Hessian is indefinite: 631 parameters with 24 hidden units."""
    torch.manual_seed(0)
    parts = [torch.nn.Linear(16, hidden), BatchNorm(hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 7)]
    model = torch.nn.Sequential(*parts).double()
    x, y = torch.randn(200, 16, dtype=torch.float64), torch.randint(7, (200,))
    lam = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)

    def outputs(w, h):
        return torch.func.functional_call(model, w, (x,))

    def fit(z, h):
        return torch.nn.functional.cross_entropy(z, y)

    def penalty(w, h):
        return h.exp() * sum(v.square().sum() for v in w.values())

    def inner(w, h):
        return fit(outputs(w, h), h) + penalty(w, h)

    w = {name: v.detach().clone().requires_grad_() for name, v in model.named_parameters()}
    adam = torch.optim.Adam(list(w.values()), lr=1e-2)
    for _ in range(30):
        adam.zero_grad()
        inner(w, lam.detach()).backward()
        adam.step()
    given = {"params": {name: v.detach() for name, v in w.items()}, "hparams": lam}
    outer = lambda w, h: torch.nn.functional.cross_entropy(outputs(w, h).roll(1, 0), y)  # noqa: E731
    return outer, inner, (outputs, fit, penalty), given


def dense_hessian(inner, given) -> np.ndarray:
    shapes = {name: v.shape for name, v in given["params"].items()}
    v = torch.cat([x.reshape(-1) for x in given["params"].values()]).requires_grad_()
    parts = v.split([shape.numel() for shape in shapes.values()])
    tree = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    (g,) = torch.autograd.grad(inner(tree, given["hparams"].detach()), v, create_graph=True)
    return torch.stack([torch.autograd.grad(each, v, retain_graph=True)[0] for each in g]).numpy()


def test_the_advice_on_a_network_in_training_works():
    outer, inner, parts, given = training_network(hidden=8)
    result = hg.implicit.grad(outer, inner_loss=inner, solver=S.CG(on_failure="ignore"), **given)
    report = check(result)
    values = np.linalg.eigvalsh(dense_hessian(inner, given))
    (found,) = [each for each in report.findings if each.name == "indefinite"]
    damping = found.numbers["damping"]
    assert values[0] < 0 < values[0] + damping and damping < 10 * -values[0]
    assert f"damping={damping:.2g}" in found.message and "operators.GaussNewton(model, loss)" in found.message
    assert not report.ok and "not at an inner minimum" in report.verdict
    (advice,) = [line for line in report.advice if "in mid-training" in line]
    assert "unroll.reverse" in advice and "solve=" in advice
    quiet = {"rtol": 1e-6, "on_failure": "ignore"}
    damped = hg.implicit.grad(outer, inner_loss=inner, solver=S.CG(damping=damping, **quiet), **given)
    gauss_newton = hg.implicit.grad(
        outer, inner_loss=hg.operators.GaussNewton(*parts), solver=S.CG(max_steps=2000, **quiet), **given
    )
    assert damped.solution.ok and gauss_newton.solution.ok
    (judged,) = [each for each in check(gauss_newton).findings if each.name == "indefinite"]
    assert "damping=" in judged.message and "GaussNewton" not in judged.message


@pytest.mark.parametrize("max_products", [1, 30, 300, pytest.param(3000, marks=pytest.mark.slow)])
def test_the_limit_of_products_holds_and_what_it_left_out_is_named(max_products):
    outer, inner, _, given = training_network()
    result = hg.implicit.grad(outer, inner_loss=inner, solver=S.CG(damping=0.3, rtol=1e-8), **given)
    report = check(result, max_products=max_products)
    assert report.products <= max_products + 10 and f"{report.products}, " in str(report)
    assert report.left_out and "max_products" in report.verdict and not report.ok
    assert (report.structure is None) == (max_products < 30)
    start = given["params"]
    away = lambda w: sum((v - start[name]).square().sum() for name, v in w.items())  # noqa: E731
    enough = check(result, max_products=max_products, inner_loss=lambda w, h: inner(w, h) + 0.15 * away(w))
    assert enough.products <= max_products + 10
    assert bool(enough.left_out) == (max_products < 300)


# Defaults, empty and complex tensors


@pytest.mark.parametrize("form", ["inner_loss", "fp_map"])
def test_tensors_are_made_where_params_are(form):
    """The default device holds no numbers, so a tensor that is made on it would raise an error."""
    p = moved(plain("logistic"), 1e-2)
    result = hypergradient(p, form, S.GMRES(rtol=1e-8))
    expected = check(result, solve=lambda h: p.params)
    with default_device("meta"):
        found = check(result, solve=lambda h: p.params)
    assert found.estimate.error == pytest.approx(expected.estimate.error, rel=1e-10)
    assert found.verdict == expected.verdict and found.structure.n == expected.structure.n


def test_the_default_dtype_does_not_matter():
    p = plain("logistic", dtype=torch.float32)
    result = hypergradient(p, "fp_map", S.GMRES())
    expected = check(result)
    torch.set_default_dtype(torch.float64)
    try:
        assert str(check(result)) == str(expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_unknowns_the_direct_part_is_right():
    lam = torch.ones(3, dtype=torch.float64, requires_grad=True)
    given = {"inner_loss": lambda w, h: (w**2).sum(), "params": torch.zeros(0, dtype=torch.float64), "hparams": lam}
    result = hg.implicit.grad(lambda w, h: h.square().sum() + w.sum(), **given)
    report = check(result)
    assert torch.equal(result.grads, 2 * lam.detach()) and report.estimate.error == 0 and report.structure is None
    with pytest.raises(ValueError, match="params hold no numbers"):
        hg.diagnostics.structure(hg.implicit.Problem(None, **given))


@pytest.mark.parametrize("where", ["params", "hparams"])
def test_complex_tensors_are_refused_by_name(where):
    dtypes = {name: torch.complex128 if name == where else torch.float64 for name in ("params", "hparams")}
    given = {name: torch.ones(2, dtype=dtype, requires_grad=True) for name, dtype in dtypes.items()}
    loss = lambda w, h: (w - h).abs().square().sum()  # noqa: E731
    for call in (
        lambda: check(torch.zeros(2), outer_loss=loss, inner_loss=loss, **given),
        lambda: hg.diagnostics.structure(hg.implicit.Problem(None, inner_loss=loss, **given)),
        lambda: hg.diagnostics.findings(hg.implicit.Problem(loss, inner_loss=loss, **given)),
    ):
        with pytest.raises(TypeError, match=f"{where} (must be a floating point|holds a complex).*view_as_real"):
            call()


def test_the_bar(capsys, monkeypatch):
    result = hypergradient(plain("logistic"), "inner_loss", QUIET)
    check(result, progress=True)
    assert "product" in capsys.readouterr().err
    check(result, progress=False)
    check(result)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    check(result)
    with pytest.raises(ImportError, match="pip install tqdm"):
        check(result, progress=True)
