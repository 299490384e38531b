"""The benchmarks' counts (products, evaluations, reads, vectors of memory) and their own instruments. No times."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import checks, counts, measure, problems
from benchmarks.methods import METHODS, Method
from benchmarks.problems import Problem

# torch scripts its own forward-mode rules at the first jvp
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

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
    [(name, m) for name in ROWS for m in METHODS if m.fits(row(name))],
    ids=lambda x: getattr(x, "name", x),
)
def test_method_does_what_it_claims(name: str, method: Method) -> None:
    counts.check_method(row(name), method)


@pytest.mark.parametrize("solver", counts.SOLVERS)
@pytest.mark.parametrize("name", ["mlp", "tiny"])
def test_fixed_steps_read_nothing_from_the_device(name: str, solver: str) -> None:
    counts.check_solver(row(name), solver)


def test_memory_of_cg() -> None:
    counts.check_memory(problems.wide())


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
