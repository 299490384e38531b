"""hypergrad.show_versions, the page that warnings refer to, and another distribution of the same import name."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import hypergrad as hg

ROOT = Path(__file__).parent.parent


def test_show_versions_names_what_a_report_needs(capsys):
    assert hg.show_versions() is None
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["hypergrad"].startswith(hg.__version__)
    assert lines["torch"].startswith(torch.__version__)
    assert {"python", "system", "devices", "dtype", "optree", "numpy"} <= set(lines)
    assert str(torch.get_default_dtype()) == lines["dtype"]


def program(site: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "src"), str(site), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)


def test_another_distribution_of_the_import_name_is_said(tmp_path):
    quiet = program(tmp_path, "import hypergrad", "hypergrad.implicit")
    assert quiet.returncode == 0 and "another package" not in quiet.stderr
    beside = tmp_path / "hypergrad-0.0.1.dist-info"
    beside.mkdir()
    (beside / "METADATA").write_text("Metadata-Version: 2.1\nName: hypergrad\nVersion: 0.0.1\n")
    found = program(tmp_path, "import hypergrad", "hypergrad.implicit", "hypergrad.show_versions()")
    assert found.returncode == 0
    assert "hypergrad 0.0.1, another package with the import name hypergrad" in found.stderr
    assert "pip uninstall hypergrad torch-hypergrad" in found.stderr
    assert "beside it" in found.stdout


def sections() -> set[str]:
    lines = (ROOT / "docs" / "howto" / "warnings.md").read_text().splitlines()
    return {line.lstrip("# ").lower() for line in lines if line.startswith("#")}


def test_warnings_and_errors_name_their_section_of_the_documentation():
    lam = torch.ones((), requires_grad=True)
    losses = {"outer_loss": lambda w, lam: (w**2).sum(), "inner_loss": lambda w, lam: lam * ((w - 3) ** 2).sum()}
    with pytest.warns(hg.UnsolvedInnerProblem, match=r"Help: docs/howto/warnings\.md#unsolvedinnerproblem$"):
        hg.implicit.grad(**losses, params=torch.ones(2), hparams=lam)
    op, b = hg.operators.matrix(torch.diag(torch.tensor([1.0, -1.0])), symmetric=True), torch.ones(2)
    with pytest.raises(hg.SolverError, match=r"warnings\.md#not_positive_definite$"):
        hg.solvers.CG(on_failure="raise")(op, b)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hg.solvers.CG()(op, b)
    assert str(caught[0].message).endswith("#not_positive_definite")


@pytest.mark.parametrize("status", hg.Status, ids=lambda status: status.name)
def test_each_status_has_a_section(status):
    assert status.name.lower() in sections()


def kinds(kind: type[Warning]) -> list[type[Warning]]:
    return [kind, *(found for below in kind.__subclasses__() for found in kinds(below))]


@pytest.mark.parametrize("kind", [k for k in kinds(hg.HypergradientWarning) if k.__module__.startswith("hypergrad")])
def test_each_kind_of_warning_has_a_section(kind):
    assert kind.__name__.lower() in sections()
