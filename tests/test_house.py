"""Limits of the source: what a file may import, how long files, functions and signatures may be, and how many files a
small call may enter.
"""

from __future__ import annotations

import ast
import doctest
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hypergrad as hg

SOURCE = Path(__file__).parent.parent / "src" / "hypergrad"
# A file imports only files above it; a folder's files may import one another.
ORDER = (
    "_versions",
    "_replaced",
    "_torch",
    "_options",
    "_tree",
    "_vector",
    "_basis",
    "_graph",
    "_reach",
    "_modules",
    "_autodiff",
    "_random",
    "_solution",
    "_detached",
    "_sum",
    "operators",
    "solvers",
    "_recorded",
    "_traced",
    "_below",
    "fixed_points",
    "implicit",
    "unroll",
    "diff_optimizers",
    "bilevel",
    "distributed",
    "meta",
    "influence",
    "transformers",
    "nn",
    "diagnostics",
    "hypergradients",
    "CG_torch",
    "sklearn",
    "__init__",
)
LINES_OF_ALL, LINES_OF_A_FILE, LINES_OF_A_FUNCTION, ARGUMENTS = 13_061, 450, 50, 12
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(file.relative_to(SOURCE)) for file in FILES]
TREES = {name: ast.parse(file.read_text()) for name, file in zip(NAMES, FILES, strict=True)}


def room(name: str) -> str:
    """The entry of ORDER to which a file belongs."""
    return name.split("/")[0].removesuffix(".py")


def test_contributing_names_every_file_and_folder():
    text = (SOURCE.parent.parent / "CONTRIBUTING.md").read_text()
    assert not [own for own in ORDER[:-1] if not any(f"`{own}{end}`" in text for end in (".py", "/"))]


def imported(name: str) -> list[tuple[str, str]]:
    """(entry of ORDER, module within it or "") for each file of the package that this file imports."""
    depth, found = name.count("/"), []
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = node.module.split(".") if node.module else []
        inside = name.split("/")[:-1][: depth - node.level + 1]
        for alias in node.names:
            path = [*inside, *parts, *([] if parts else [alias.name])]
            found.append((path[0], ".".join(path[1:])))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_only_what_stands_above_it(name):
    own = room(name)
    assert own in ORDER, f"{own} has no place in the order"
    for other, inner in imported(name):
        if other == own:
            continue
        assert ORDER.index(other) < ORDER.index(own), f"{name} imports {other}, which stands below it"
        private = [part for part in inner.split(".") if part.startswith("_")]
        assert not private, f"{name} imports {other}.{inner}, which is private to its folder"


@pytest.mark.parametrize("name", NAMES)
def test_files_functions_and_signatures_are_short(name):
    text = (SOURCE / name).read_text()
    assert text.count("\n") <= LINES_OF_A_FILE
    for node in ast.walk(TREES[name]):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node, clean=False)
        first = node.body[1].lineno if docstring is not None and len(node.body) > 1 else node.body[0].lineno
        assert (node.end_lineno or 0) - first + 1 <= LINES_OF_A_FUNCTION, f"{node.name} is too long"
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len([a for a in arguments if a.arg not in ("self", "cls")])
        if name not in ("hypergradients.py", "CG_torch.py"):  # HyperTorch's signatures stay
            assert count <= ARGUMENTS, f"{node.name} has {count} arguments"
        if node.args.kwarg is not None and node in TREES[name].body and not node.name.startswith("_"):
            annotation = node.args.kwarg.annotation
            assert not (isinstance(annotation, ast.Name) and annotation.id == "Any"), f"{node.name} hides its signature"


def lines_of_examples(file: Path) -> int:
    """The number of lines of doctests, with their output and title, which do not count for the limits."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [
        ast.get_docstring(node) or ""
        for node in ast.walk(TREES[str(file.relative_to(SOURCE))])
        if isinstance(node, documented)
    ]
    examples = [each for text in texts for each in doctest.DocTestParser().get_examples(text)]
    # The quotes that end a docstring take a line of their own where an example follows a single line.
    titles = sum(2 + ("\n" not in text.split("\n\nExample:\n")[0]) for text in texts if "Example:\n" in text)
    return titles + sum(each.source.count("\n") + each.want.count("\n") for each in examples)


def test_the_source_is_short():
    new = (
        "bilevel",
        "_sum",
        "distributed",
        "influence",
        "transformers",
        "_versions",
        "_traced",
        "_detached",
        "_reach",
        "sklearn",
    )
    parts = (
        "unroll/_compiled.py",
        "unroll/_compiled_push.py",
        "meta/_compiled.py",
        "unroll/_jacobian.py",
        "solvers/_shifted.py",
        "solvers/_at_once.py",
    )
    whole = [file for file, name in zip(FILES, NAMES, strict=True) if room(name) not in new and name not in parts]
    assert sum(file.read_text().count("\n") - lines_of_examples(file) for file in whole) <= LINES_OF_ALL


PRIVATE = ("torch._C", "torch._functorch", "torch.utils._python_dispatch", "torch.multiprocessing.reductions")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "_torch.py"])
def test_private_interfaces_of_torch_are_used_in_one_file(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.module.startswith(PRIVATE), f"{name} imports {node.module}"
            if node.module.startswith("torch"):
                hidden = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not hidden, f"{name} imports {hidden} of {node.module}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            assert not owner.startswith("torch"), f"{name} uses {owner}.{node.attr}"


def small_calls() -> dict[str, tuple[int, Callable[[], Any]]]:
    """Calls on one number, with the number of files of src/hypergrad that each may enter, `__init__` not counted."""
    lam = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    w, listed = lam.detach(), ([lam.detach()], [lam], 20, lambda w, lam: [(w[0] + lam[0]) / 2])

    def grad(solver: Any, compile: bool = False) -> Any:
        options: Any = {"params": w, "hparams": lam, "solver": solver, "compile": compile}
        return hg.implicit.grad(
            lambda w, lam: (w**2).sum(), inner_loss=lambda w, lam: ((w - lam) ** 2).sum(), **options
        )

    def loss(w: Any, lam: Any) -> Any:
        return (w[0] ** 2).sum()

    return {
        "CG": (13, lambda: hg.CG(*listed, loss, set_grad=False)),
        "fixed_point": (13, lambda: hg.fixed_point(*listed, loss, set_grad=False)),
        "grad by GMRES": (13, lambda: grad(hg.solvers.GMRES())),
        "grad by Dense": (13, lambda: grad(hg.solvers.Dense())),
        "grad with compile": (13, lambda: grad(hg.solvers.CG(max_steps=50), compile=True)),
        "root": (15, lambda: torch.autograd.grad(hg.implicit.root(lambda w, a: w - a, w, lam).sum(), lam)),
    }


@pytest.mark.parametrize("name", list(small_calls()))
def test_a_small_call_runs_through_few_files(name):
    most, call = small_calls()[name]
    call()  # what is imported or made once is left out
    entered, before = set(), sys.getprofile()
    sys.setprofile(lambda frame, event, argument: entered.add(frame.f_code.co_filename))
    try:
        call()
    finally:
        sys.setprofile(before)
    own = {str(Path(file).relative_to(SOURCE)) for file in entered if file.startswith(str(SOURCE))}
    assert len({file for file in own if not file.endswith("__init__.py")}) <= most, sorted(own)
