"""Finite differences of the whole map."""

import json

import pytest

import hypergrad as hg
from helpers import S, hypergradient
from perturbed import moved, newton_fit, plain

check = hg.diagnostics.check
QUIET = S.Dense(on_failure="ignore")


def test_finite_differences_of_the_whole_map():
    p = plain("logistic")
    right = check(hypergradient(p, "inner_loss", QUIET), solve=newton_fit(p))
    assert right.differences.relative_error < 1e-6 and right.differences.agrees
    assert not any("finite differences" in line for line in right.advice)
    wrong = hypergradient(moved(p, 0.05), "inner_loss", QUIET)
    report = check(wrong, solve=newton_fit(p))
    assert not report.differences.agrees and report.differences.relative_error > 10 * report.differences.uncertainty
    assert "finite differences" in report.verdict
    assert "against finite differences" in str(report)
    json.dumps(report.to_dict())


@pytest.mark.parametrize("step", [0.3, 1e-2, 1e-9])
def test_the_error_estimate_of_finite_differences_covers_the_true_error(step):
    """Large steps have truncation errors, small steps rounding errors; the estimate covers both."""
    p = plain("logistic")
    exact = hypergradient(p, "inner_loss", QUIET)
    found = hg.diagnostics.finite_differences(exact.problem, exact.grads, newton_fit(p), step=step, directions=4)
    for derivative, own, given in zip(found.derivatives, found.errors, found.given, strict=True):
        assert abs(derivative - given) <= (0.2 if step == 0.3 else 1.5) * own


def test_finite_differences_refuse_nonsense():
    p = plain("logistic")
    result = hypergradient(p, "inner_loss", QUIET)
    for bad in ({"step": 0.0}, {"directions": 0}):
        with pytest.raises(ValueError, match="step must be positive"):
            hg.diagnostics.finite_differences(result.problem, result.grads, newton_fit(p), **bad)
