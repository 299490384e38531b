"""The benchmarks' counts (products, evaluations, reads, vectors of memory) and their own instruments. No times."""

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

sys.path.append(str(Path(__file__).parents[1]))

import hypergrad as hg
from benchmarks import (
    accuracy,
    bilevel,
    blocks,
    checks,
    counts,
    equal,
    estimators,
    illconditioned,
    measure,
    networks,
    peers,
    problems,
    report,
    scaling,
    size,
    small,
    small_layers,
    small_outer,
    small_rows,
    tasks,
    unrolled,
)
from benchmarks.methods import METHODS, Method
from benchmarks.problems import Problem

# A fixed K is what is measured.
pytestmark = pytest.mark.filterwarnings("ignore::hypergrad.InaccurateHypergradient")

ROWS = problems.quick_rows()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def row(name: str) -> Problem:
    return ROWS[name]()


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for name in ROWS for m in METHODS if m.fits(row(name)) and m.passes],
    ids=lambda x: getattr(x, "name", x),
)
def test_method_does_what_it_claims(name: str, method: Method) -> None:
    counts.check_method(row(name), method)


@pytest.mark.parametrize("solver", counts.SOLVERS)
@pytest.mark.parametrize("name", ["mlp", "tiny"])
def test_fixed_steps_read_nothing_from_the_device(name: str, solver: str) -> None:
    counts.check_solver(row(name), solver)


@pytest.mark.parametrize("name", ["mlp", "tiny"])
def test_several_losses_and_recycled_starts_take_the_passes_that_they_claim(name: str) -> None:
    counts.check_jacobian(row(name))
    counts.check_recycled(row(name))


def test_memory_of_cg() -> None:
    counts.check_memory(problems.wide())


def test_memory_of_the_normal_equations() -> None:
    counts.check_normal_memory(problems.equilibrium("equilibrium", 2000, 20, 30, 3, 0.9, steps=4))


@pytest.mark.parametrize("steps", [5, 20])
def test_memory_of_gmres(steps: int) -> None:
    counts.check_gmres_memory(steps)


def test_many_small_problems_are_factorised_once() -> None:
    counts.check_factorisations()
    counts.check_mapped_solver()


SMALL = {
    "roots": lambda: small_rows.roots(3, 4),
    "minima": lambda: small_rows.minima(3, 4),
    "programs": lambda: small_rows.quadratic_programs(3, 4, 3, 1),
    "solved": lambda: small_rows.solved(4, 3),
    "CG": lambda: small_rows.small_call(6, 3),
    "fixed_point": lambda: small_rows.small_fixed_point(6, 3),
    "dense": lambda: small_rows.small_dense(5),
    "Picard": lambda: small_layers.layer("Picard", 6, 3),
    "Anderson": lambda: small_layers.layer("Anderson", 6, 3),
    "MAML": lambda: small_layers.maml(2, True),
    "MAML, first order": lambda: small_layers.maml(2, False),
    "bags": lambda: small_layers.bags(40, 5, 6, 3),
    "convolutions": lambda: small_layers.convolutions(8, 2, 4),
    "outer steps": lambda: small_outer.outer_steps(4),
    "ridge steps": lambda: small_outer.ridge_steps(2),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "MAML" else name for name in SMALL]
)
def test_small_rows_are_right(name: str, tmp_path: Path) -> None:
    """Every column agrees with its oracle, and gets a time; all that the section writes."""
    row = replace(SMALL[name](), repeat=1)
    results = small.measure_row(row, None, rounds=1)
    own = [r for r in results if r.library in ("hypergrad", "floor", "floor (loop)")]
    assert all(r.correct and r.ratio is not None and r.ratio.middle > 0 for r in own)
    assert max(r.error for r in own if r.library == "hypergrad" and r.error is not None) < 1e-10
    text = small.table(results)
    assert all(r.method in text for r in results)
    if name == "roots":
        small.draw(results, tmp_path / "small.png")
        assert (tmp_path / "small.png").read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_small_answer_gets_no_time() -> None:
    row = SMALL["roots"]()
    right = row.columns[0]
    wrong = replace(right, name="scaled", run=lambda: 1.01 * right.run())
    results = small.measure_row(replace(row, columns=[right, wrong]), None, rounds=1)
    assert results[0].cpu is not None and results[1].cpu is None
    assert "wrong by 1.0e-02: no time" in small.table(results)


def test_memory_of_a_layer() -> None:
    counts.check_forward_memory(problems.equilibrium("equilibrium", 200, 20, 30, 3, 0.9))


@pytest.mark.parametrize("name", ROWS)
def test_rows_start_at_the_inner_solution(name: str) -> None:
    assert row(name).system.unsolved < 1e-10
    assert row(name).system.residual < 1e-9


def test_a_wrong_count_is_noticed() -> None:
    wrong = Method("twice", lambda p: [*METHODS[0].run(p), *METHODS[0].run(p)], METHODS[0].passes)
    with pytest.raises(AssertionError, match="reverse passes: 18 instead of 9"):
        counts.check_method(row("tiny"), wrong)


def test_a_wrong_answer_is_noticed() -> None:
    right = next(method for method in METHODS if method.name == "hg.implicit.grad, CG")
    wrong = Method("scaled", lambda p: [1.001 * g for g in right.run(p)], right.passes, truth="cg")
    with pytest.raises(AssertionError, match="error"):
        counts.check_method(row("tiny"), wrong)


@pytest.mark.parametrize("name", unrolled.QUICK)
def test_storing_the_steps_takes_the_evaluations_that_it_claims(name: str) -> None:
    descent = unrolled.QUICK[name]().to(torch.float64)
    exact = unrolled.truth(descent)
    for column in unrolled.COLUMNS:
        if column.evaluations:
            counts.check_unrolled(descent, column, exact)


def test_compiled_steps_take_the_evaluations_that_they_claim() -> None:
    counts.check_loop("SGD", steps=4)
    counts.check_forward_loop("SGD", steps=4)


@pytest.mark.parametrize("steps", [3, 60])
def test_a_layer_saves_as_many_tensors_however_many_steps_it_takes(steps: int) -> None:
    counts.check_saved(steps)


def test_a_wrong_unrolled_answer_gets_no_time() -> None:
    descent = unrolled.QUICK["logistic"]().to(torch.float64)
    right = unrolled.COLUMNS[0]
    wrong = replace(right, name="scaled", run=lambda d, steps: [1.01 * g for g in right.run(d, steps)])
    results = unrolled.measure_row(descent, [right, wrong], unrolled.truth(descent), rounds=1)
    assert results[0].cpu is not None and results[1].cpu is None
    assert "wrong by 1.0e-02: no time" in unrolled.table(results)


@pytest.mark.parametrize("name", bilevel.QUICK)
@pytest.mark.parametrize("method", [m for m in bilevel.METHODS if m.counts], ids=lambda m: m.name)
def test_a_step_of_a_tracker_does_what_it_claims(name: str, method: bilevel.Method) -> None:
    counts.check_tracker(bilevel.QUICK[name](), method)


def test_memory_of_a_step_of_soba() -> None:
    counts.check_step_memory(bilevel.convolutional())


@pytest.mark.slow
def test_bilevel_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method that is installed has its row, first-order ones nearer the hypergradient as the penalty grows."""
    monkeypatch.setattr(bilevel, "CASES", bilevel.QUICK)
    monkeypatch.setattr(bilevel, "STEPS", 60)
    monkeypatch.setattr(bilevel, "COMPILE", "eager")  # inductor takes its time
    results, settings = bilevel.measure(["ridge", "CNN"], ["SOBA", "penalty", "SAMA"], rounds=1)
    assert [setting["row"] for setting in settings] == ["ridge", "CNN"]
    errors = {(r.library, r.method): r.error for r in results if r.error is not None}
    assert errors["hypergrad", "SOBA"] < 1e-8
    for penalty in ("10", "100", "1000"):
        ours, second = (errors["hypergrad", f"F2SA-{order}, penalty {penalty}"] for order in (1, 2))
        assert second < ours / 3
        if peers.installed("boat_torch", "higher"):
            assert errors["BOAT", f"PGDO, penalty {penalty}"] == pytest.approx(ours, rel=1e-3)
    if peers.installed("betty"):
        own = errors["hypergrad", "SAMA (plain steps)"]
        assert errors["Betty", "SAMA (plain steps)"] == pytest.approx(own, rel=1e-6)
    text = bilevel.table(results)
    assert all(r.method in text for r in results)
    bilevel.draw(results, tmp_path / "bilevel.png")
    assert (tmp_path / "bilevel.png").read_bytes()[:4] == b"\x89PNG"


def test_warm_start_needs_fewer_passes() -> None:
    counts.check_sequence(list(illconditioned.quick_sequence()))


SOURCES = {
    "quadratic": lambda: illconditioned.Quadratic(12, 1e3),
    "logistic": lambda: illconditioned.weak_logistic(40, 8, decay=-3.0),
    "sparse text": lambda: illconditioned.sparse_text(60, 30, decay=-3.0),
}


@pytest.mark.parametrize("name", SOURCES)
def test_truth_of_the_sequences(name: str) -> None:
    for step in illconditioned.outer_steps(name, SOURCES[name](), 3):
        problem = step.problem
        if name == "sparse text":  # torch.func wants a dense matrix
            dense = {k: torch.from_numpy(problem.data[k].scipy.toarray()) for k in ("x", "xv")}
            problem = replace(problem, data=problem.data | dense)
        assert problem.system.unsolved < 1e-10
        assert problem.system.error([torch.from_numpy(step.truth)], "exact") < 1e-9


def test_sparse_product() -> None:
    draw = np.random.RandomState(0)
    matrix = scipy.sparse.csr_array(draw.randn(6, 4) * (draw.rand(6, 4) < 0.5))
    sparse, dense = illconditioned.Sparse(matrix), torch.from_numpy(matrix.toarray())
    w = torch.from_numpy(draw.randn(4)).requires_grad_()
    torch.testing.assert_close(sparse @ w, dense @ w)
    rows, columns, values = sparse.entries()
    torch.testing.assert_close(dense[rows, columns], values)
    assert torch.autograd.gradcheck(lambda w: (sparse @ w).sin(), w, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: (sparse @ w).sin(), w, check_fwd_over_rev=True)
    stack = torch.from_numpy(draw.randn(3, 4))
    torch.testing.assert_close(torch.func.vmap(lambda w: sparse @ w)(stack), stack @ dense.mT)
    torch.testing.assert_close(torch.func.vmap(lambda w: sparse @ w, in_dims=1)(stack.mT.clone()), stack @ dense.mT)


def fake(errors: dict[float, float]) -> accuracy.Column:
    """A method whose relative error is known for each setting."""
    return accuracy.Column(
        "fake",
        "fake",
        lambda s: lambda p: [p.data["truth"] * (1 + errors[s])],
        tuple(errors),
        lambda steps, s: 7 * len(steps),
    )


def test_search_finds_the_loosest_setting() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    steps = [replace(step, truth=truth.numpy()) for step in illconditioned.quick_sequence()]
    steps = [replace(s, problem=replace(s.problem, data={"truth": truth})) for s in steps]
    column = fake({1.0: 1.0, 0.1: 0.1, 1e-2: 1e-2, 1e-3: 1e-3, 1e-4: 1e-4})
    setting, error, passes = accuracy.search(column, steps, 5e-3)
    assert (setting, passes) == (1e-3, 42) and error == pytest.approx(1e-3)
    setting, error, _ = accuracy.search(column, steps, 1e-6)
    assert setting is None and error == pytest.approx(1e-4)


def test_a_search_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "SECONDS", 0.0)
    column = next(c for c in accuracy.COLUMNS if c.name == "hg CG")
    results = accuracy.measure_row("quick", [column], list(illconditioned.quick_sequence()), rounds=1)
    assert all(r.cpu is None and r.failure and "stopped: no setting found in 0 s" in r.failure for r in results)
    assert "stopped" in accuracy.table(results)


@pytest.mark.parametrize("name", SOURCES)
def test_truth_of_several_outer_losses(name: str) -> None:
    source = SOURCES[name]()
    w = source.solve(source.start, None)
    losses, exact = illconditioned.group_losses(source, 3)
    for i, loss in enumerate(losses):  # the truth of each, by torch on a dense matrix
        problem = illconditioned.problem_at(name, source, source.start, w, step_size=1.0)
        found = hg.implicit.grad(
            lambda w, h, f=loss: f(w, h, None),
            inner_loss=problem.inner_loss,
            params=problem.params,
            hparams=problem.hparams,
            solver=hg.solvers.Dense(on_failure="ignore"),
        )
        np.testing.assert_allclose(found.grads[0], exact(source.start, w)[i], rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_several_outer_losses(tmp_path: Path) -> None:
    source = SOURCES["logistic"]()
    results = blocks.measure_row("logistic", source, source.solve(source.start, None), blocks.METHODS, rounds=1)
    assert len(results) == 4 and all(r.cpu and r.error <= 1e-6 for r in results)
    text = blocks.table(results)
    assert all(method in text for method in blocks.METHODS)
    blocks.draw(results, tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").read_bytes()[:4] == b"\x89PNG"


def test_exponents() -> None:
    values = {n: 3.0 * n**1.5 for n in (10, 100, 1000)} | {1: 1e6}
    assert scaling.curve("row", "method", values, start=10).exponent == pytest.approx(1.5)


def test_report(tmp_path: Path) -> None:
    problem = replace(row("tiny"), name="tiny", steps=6, small=True)
    results = equal.measure_row(problem, [m for m in METHODS if "CG" in m.name or m.library == "floor"], rounds=1)
    text = report.write(equal.SECTION, results, [], tmp_path / "benchmarks_equal")
    assert "hg.implicit.grad, CG" in text and "× floor" in text
    document = json.loads((tmp_path / "benchmarks_equal.json").read_text())
    assert document["table"] == text.splitlines() and len(document["results"]) == len(results)
    report.pages({"equal": equal.SECTION, "absent": equal.SECTION}, tmp_path)
    assert report.markdown(document["table"]) in (tmp_path / "benchmarks_equal.md").read_text()
    assert "](benchmarks_equal.md)" in (tmp_path / "benchmarks.md").read_text()
    (tmp_path / "benchmarks_equal.png").unlink()
    report.redraw(equal.SECTION, tmp_path / "benchmarks_equal")
    assert (tmp_path / "benchmarks_equal.png").stat().st_size > 1000


@pytest.mark.skipif(not peers.installed("torchopt", "betty", "torchdeq", "jaxopt"), reason="make bench-peers")
def test_peers_answer() -> None:
    found = {}
    for name in ROWS:
        for method in METHODS:
            if method.library not in ("floor", "hypergrad", "HyperTorch") and method.fits(row(name)):
                found[name, method.name] = row(name).system.error(method.run(row(name)), method.truth or "")
    wrong = {name for (_, name), error in found.items() if not error < 1e-6}
    assert wrong <= {"Betty CG"} and len(found) > 10  # right since 0.2.1


def test_batched_passes_count_as_many() -> None:
    x = torch.ones(3, requires_grad=True)
    with measure.counted() as found:
        y = x * x
        torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
        torch.autograd.grad([y], [x], [torch.eye(3)], is_grads_batched=True)
    assert found["passes"] == 4


def test_reads_are_counted() -> None:
    x = torch.arange(3.0)
    with measure.counted() as found:
        float(x.sum()), bool((x > 0).any()), x.tolist(), x[0].item()
    assert found["reads"] == 4


def test_peak_memory() -> None:
    def call() -> torch.Tensor:
        a = torch.zeros(1000)
        b = a + 1
        del a
        return b.sum() + torch.zeros(2000).sum()

    assert 12000 <= measure.peak_memory(call) <= 12100


def test_interleaved_times() -> None:
    seen: list[str] = []
    times = measure.interleaved({name: lambda name=name: seen.append(name) for name in "ab"}, rounds=3, repeat=2)
    assert seen[:8] == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert [len(each.cpu) for each in times.values()] == [3, 3]
    assert len(times["a"].wall) == 3
    assert measure.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == measure.Spread(2.0, 3.0, 4.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.ROWS)
def test_default_checks_cost_at_most_two_per_cent(name: str) -> None:
    found = checks.share(problems.rows()[name](), calls=7)
    print(f"{name}: {found.middle:.2%}")
    assert 0 < found.middle <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), checks.ARITHMETIC.items())
def test_vector_arithmetic_costs_little_beside_the_products(name: str, limit: float) -> None:
    found = checks.arithmetic(checks.row(name), calls=3)
    print(f"{name}: {found.middle:.2%}")
    assert 0 < found.middle <= limit


@pytest.mark.slow
def test_batched_tasks(tmp_path):
    """Reduced settings: hg.meta agrees with the loop (else `measure` raises), and all that the section writes."""
    names = [setting.name for setting in tasks.QUICK]
    results, settings = tasks.measure_all(names, None, 1, tasks.QUICK)
    assert len(results) == 2 * len(names) == 2 * len(settings)
    assert max(r.error64 for r in results) < 1e-10
    text = tasks.table(results)
    assert all(name in text for name in names) and len(text.splitlines()) == 1 + len(results)
    tasks.draw(results, tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").read_bytes()[:4] == b"\x89PNG"


def test_tables_of_markdown_hold_the_numbers_below_their_titles():
    document = json.loads((Path(__file__).parents[1] / "docs" / "results" / "benchmarks_equal.json").read_text())
    known = {(r["row"], r["method"]): r for r in document["results"] if r["floor_cpu"]}
    problem, titles, seen = "", [], 0
    for line in report.markdown(document["table"]).splitlines():
        problem = line.strip("*") if line.startswith("**") else problem
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        titles = cells if "MiB" in cells else titles
        row = known.get((problem, cells[0])) if cells else None
        if row is not None:
            seen += 1
            assert cells[titles.index("× floor, CPU")].split(" [")[0] == f"{row['floor_cpu']['middle']:.3f}"
            assert cells[titles.index("MiB")] == (f"{row['peak'] / 2**20:.2f}" if row["peak"] is not None else "")
    assert seen == len(known)


@pytest.mark.slow
def test_estimators(tmp_path: Path) -> None:
    """On a model trained to the end those that should be right are, in the passes that they claim."""
    results, settings = counts.check_estimators()
    assert len(results) == 2 * len(estimators.METHODS) and settings["seeds"] == 1
    text = estimators.table(results)
    assert all(m in text for m in estimators.METHODS)
    estimators.draw(results, tmp_path / "estimators.png")
    assert (tmp_path / "estimators.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.available())
def test_networks_end_where_their_differentiated_steps_end(name: str) -> None:
    point = estimators.Point(networks.CASES[name](0))
    truth = point.truth()  # raises where they do not
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in truth.values())


def test_large_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones: what is written by hand gives the same, and the parts of the page are written."""
    rows = {"one": size.Row(5000, rounds=1), "leaves": size.Row(5000, leaves=50, rounds=1)}
    monkeypatch.setattr(size, "SIZES", rows | {"each": size.Row(5000, each=True, rounds=1)})
    results, settings = size.measure(list(size.SIZES), None, None)
    assert [s["leaves"] for s in settings] == [3, 50, 3] and settings[2]["hparams"] == settings[2]["parameters"]
    assert max(r.error for r in results) < 1e-4  # float32
    assert all(m in size.table(results) for m in size.METHODS)
    size.draw(results, tmp_path / "size.png")
    assert (tmp_path / "size.png").read_bytes()[:4] == b"\x89PNG"
