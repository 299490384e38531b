"""The equilibrium examples run as a user runs them, on the stand-ins, and read the public formats from made files."""

import copy
import gzip
import os
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.nn.functional import cross_entropy

from examples import datasets
from examples import equilibrium_graph as graphs
from examples import equilibrium_mnist as mnist
from test_examples import run_fast


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equilibrium_mnist", "equilibrium_graph"])
def test_fast(name, tmp_path):
    history = run_fast(name, "--seed", "3", output=tmp_path / "made")
    if name == "equilibrium_mnist":
        errors = [past["error"][-1] for past in history.values()]
        assert len(errors) == 4 and max(errors) < 1e-4
    else:
        assert all(score > 0.5 for score in history["equilibrium network"]["test"])


@pytest.mark.parametrize("method", ["reverse unroll", "fixed point", "normal equations", "Equilibrium layer"])
def test_reference_is_the_limit_of_every_method(method):
    torch.manual_seed(0)
    model = mnist.Model(pixels=6, states=5, rtol=1e-12).double()
    torch.nn.init.orthogonal_(model.layer.cell.A, gain=0.9)
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4)
    truth = mnist.reference(model, x, y)
    mnist.METHODS[method](model, x, y, 400)
    torch.testing.assert_close(mnist.hypergradient(model), truth, rtol=1e-9, atol=1e-12)


def small_graph() -> tuple:
    edges = datasets.undirected(np.array([0, 0, 1, 3, 4, 4]), np.array([1, 2, 3, 4, 4, 0]))
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    return x, edges, torch.tensor([0, 1, 0, 1, 0, 1])


def test_normalised_adjacency():
    _, edges, _ = small_graph()
    dense = np.eye(6)
    dense[edges[0], edges[1]] = 1
    assert (dense == dense.T).all() and dense.sum() == 6 + 10
    scale = np.diag(dense.sum(1) ** -0.5)
    result = graphs.normalised_adjacency(edges, 6).to_dense().numpy()
    np.testing.assert_allclose(result, scale @ dense @ scale, rtol=1e-6)


def test_equilibrium_network_against_unrolling():
    torch.manual_seed(0)
    x, edges, y = small_graph()
    every = torch.arange(6)
    data = datasets.Graph("small", x.double(), y, edges, every, every, every)
    adjacency = graphs.normalised_adjacency(edges, 6).double()
    model = graphs.equilibrium(data, adjacency, graphs.Config(states=4, rtol=1e-13)).double().eval()
    layer, classifier = model[1], model[3]
    cross_entropy(model(data.x), y).backward()

    u, z = layer.inject(data.x), torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(400):
        z = layer.cell(z, u)
    truth = torch.autograd.grad(cross_entropy(classifier(z), y), list(model.parameters()))
    for parameter, expected in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-12)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_images(folder, zipped, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    labels = np.array([3, 0, 9, 1, 1], np.uint8)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, array in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", labels)):
        data = gzip.compress(idx(array)) if zipped else idx(array)
        (tmp_path / folder / (name + ".gz" * zipped)).write_bytes(data)
    read = datasets.images(tmp_path)
    assert read.x.dtype == torch.float32 and read.y.tolist() == labels.tolist()
    np.testing.assert_allclose(read.x.numpy(), pixels.reshape(5, 12) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: data + b"0", lambda data: b"", lambda data: b"PNG"]
)
def test_incomplete_idx(spoil, tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(spoil(idx(np.zeros(5, np.uint8))))
    with pytest.raises(ValueError, match="no complete IDX file"):
        datasets.read_idx(path)


@pytest.mark.parametrize(
    ("read", "source"), [(datasets.images, "torchvision"), (datasets.graph, "kimiyoung/planetoid")]
)
def test_missing_data(read, source, tmp_path):
    with pytest.raises(SystemExit, match=source):
        read(tmp_path / "nowhere")


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Strings as Python 2 wrote them."""

    def save_bytes(self, text: bytes) -> None:
        self.write(b"T" + len(text).to_bytes(4, "little") + text)
        self.memoize(text)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # type: ignore[attr-defined]  # noqa: RUF012


def write_python2_pickle(path: Path, value: object) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)
    old = path.read_bytes().replace(b"numpy._core", b"numpy.core").replace(b"scipy.sparse._csr", b"scipy.sparse.csr")
    path.write_bytes(old)


def test_planetoid(tmp_path):
    """Two classes, nodes 0 and 1 for training, 2 to 4 for validation; 6 has no features and no label."""
    random = np.random.default_rng(0)
    x, onehot = random.integers(0, 2, (8, 3)).astype(np.float32), np.eye(2, dtype=np.int32)[[0, 1, 1, 0, 1, 1, 0, 0]]
    x[:, 0], x[6] = 1, 0
    neighbours = defaultdict(list, {0: [1, 2], 1: [0], 2: [0], 3: [7, 7], 7: [3], 4: [4, 5]})
    parts = {
        "x": scipy.sparse.csr_matrix(x[:2]),
        "y": onehot[:2],
        "allx": scipy.sparse.csr_matrix(x[:5]),
        "ally": onehot[:5],
        "tx": scipy.sparse.csr_matrix(x[[7, 5]]),
        "ty": onehot[[7, 5]],
        "graph": neighbours,
    }
    for part, value in parts.items():
        write_python2_pickle(tmp_path / f"ind.cora.{part}", value)
    (tmp_path / "ind.cora.test.index").write_text("7\n5\n")
    read = datasets.graph(tmp_path)
    np.testing.assert_allclose(read.x.numpy(), x / x.sum(1, keepdims=True).clip(min=1), rtol=1e-6)
    labelled = [0, 1, 2, 3, 4, 5, 7]
    assert read.y[labelled].tolist() == onehot.argmax(1)[labelled].tolist()
    pairs = {(0, 1), (1, 0), (0, 2), (2, 0), (3, 7), (7, 3), (4, 5), (5, 4)}
    assert read.edges.shape == (2, 8) and set(map(tuple, read.edges.T.tolist())) == pairs
    assert [part.tolist() for part in (read.train, read.validation, read.test)] == [[0, 1], [2, 3, 4], [7, 5]]


def test_a_pickle_runs_nothing(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / "ind.cora.y").write_bytes(pickle.dumps(Bad(), protocol=2))
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load \w+\.mkdir"):
        datasets.read_pickle(tmp_path / "ind.cora.y")
    assert not (tmp_path / "made").exists()


def test_digits_graph():
    data = datasets.graph()
    assert sorted(torch.cat([data.train, data.validation, data.test]).tolist()) == list(range(1797))
    assert data.y[data.train].bincount().tolist() == [20] * 10 and len(data.validation) == 500
    pairs = set(map(tuple, data.edges.T.tolist()))
    assert len(pairs) == data.edges.shape[1] and all((j, i) in pairs and i != j for i, j in pairs)


def test_same_start_gives_the_same_numbers():
    config = mnist.Config(images=20, states=4, steps=2, measurements=1)
    first, second = (mnist.train(copy.copy(config)) for _ in range(2))
    assert all(first[name]["loss"] == second[name]["loss"] for name in mnist.METHODS)
