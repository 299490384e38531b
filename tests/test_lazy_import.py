"""Importing hypergrad loads none of its files; each name is there when it is asked for."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hypergrad as hg

SOURCE = Path(__file__).parent.parent / "src" / "hypergrad"
LOADED = "print(*sorted(name for name in sys.modules if name.startswith('hypergrad.')))"


def run(code: str) -> str:
    """What a fresh Python prints."""
    path = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); "
    return subprocess.run(
        [sys.executable, "-c", path + code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_importing_hypergrad_loads_none_of_its_files() -> None:
    assert run(f"import hypergrad; dir(hypergrad), hypergrad.__version__; {LOADED}") == ""


def test_a_solver_does_not_load_what_it_does_not_use() -> None:
    loaded = run(f"import hypergrad as hg; hg.solvers.CG(); hg.implicit.grad; {LOADED}").split()
    assert "hypergrad.solvers" in loaded and "hypergrad.implicit" in loaded
    absent = ("bilevel", "diagnostics", "diff_optimizers", "meta", "unroll", "nn")
    assert not [name for name in loaded if name.startswith(tuple(f"hypergrad.{each}" for each in absent))]


def test_names_can_be_imported_in_every_way() -> None:
    code = "from hypergrad import *; from hypergrad import CG as one, solvers as two; import hypergrad.nn as three; "
    code += "print(CG is one, two is solvers, three is nn, Status.CONVERGED.name)"
    assert run(code) == "True True True CONVERGED"


@pytest.mark.parametrize("name", hg.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(hg, name) is not None
    assert name in dir(hg)


def test_what_type_checkers_read_is_what_is_there() -> None:
    block = next(node for node in ast.parse((SOURCE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    pairs = [(alias, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    homes = {alias.name: module for alias, module in pairs if alias.asname is None}  # the others are extras
    assert set(homes) == set(hg.__all__)
    for name, home in homes.items():
        module = importlib.import_module(f"hypergrad.{home or name}")
        assert getattr(hg, name) is (getattr(module, name) if home else module)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'hypergrad' has no attribute 'conjugate_gradients'"):
        hg.conjugate_gradients  # noqa: B018
    with pytest.raises(ImportError, match="conjugate_gradients"):
        from hypergrad import conjugate_gradients  # noqa: F401
