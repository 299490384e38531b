"""The pages of the documentation against the library: messages, public names, the README's length, one version."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest
import torch

import hypergrad as hg
from test_house import ORDER

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TREES = [ast.parse(file.read_text()) for file in sorted((ROOT / "src" / "hypergrad").rglob("*.py"))]
CONSTANTS = {
    node.targets[0].id: node.value
    for tree in TREES
    for node in tree.body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
}


def pieces(node: ast.AST, scope: ast.AST) -> list[str]:
    """The constant parts of a message, in their order."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"\{[^}]*\}", node.value)
    if isinstance(node, ast.JoinedStr):
        return [piece for value in node.values for piece in pieces(value, scope)]
    if isinstance(node, ast.FormattedValue):
        return pieces(node.value, scope) if isinstance(node.value, (ast.Name, ast.Call)) else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return pieces(node.func.value, scope)
    if isinstance(node, ast.Name):
        local = [
            each.value
            for each in ast.walk(scope)
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name) and each.targets[0].id == node.id
        ]
        return pieces((local or [CONSTANTS.get(node.id, ast.Constant(0))])[0], scope)
    return []


def messages() -> list[str]:
    """The beginning of the first long constant part of each warning."""
    found = set()
    for tree in TREES:
        for scope in ast.walk(tree):
            if not isinstance(scope, ast.FunctionDef):
                continue
            for node in ast.walk(scope):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "warn":
                    long = [piece for piece in pieces(node.args[0], scope) if len(piece) > 12]
                    found |= {long[0].strip(" :,.")[:40].strip()} if long else set()
    return sorted(found)


def plain(text: str) -> str:
    return " ".join(text.replace("`", "").lower().split())


@pytest.mark.parametrize("message", messages())
def test_each_warning_is_explained(message):
    assert plain(message) in plain((DOCS / "howto" / "warnings.md").read_text())


MODULES = {name: getattr(hg, name) for name in hg.__all__ if type(getattr(hg, name)).__name__ == "module"}


def public(module) -> list[str]:
    """__all__, or else what a module of one file defines itself."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return getattr(module, "__all__", own)


def names() -> list[str]:
    inside = [f"{module}.{name}" for module, value in MODULES.items() for name in public(value)]
    return sorted({*inside, *(name for name in hg.__all__ if name not in MODULES)})


# What other files of the library import; users have methods for it.
INTERNAL = {
    "operators.adjoint",
    "operators.has_curvature",
    "fixed_points.Iterate",
    "fixed_points.StallGuard",
    "fixed_points.StoppingRule",
    "distributed.CopyToRanks",
    "distributed.GatherShards",
    "distributed.MeanToShards",
    "distributed.MeanOverRanks",
}
API = "\n".join(file.read_text() for file in sorted((DOCS / "api").glob("*.md")))
DOCUMENTED = set(re.findall(r"auto(?:function|class|exception|data):: hypergrad\.(\S+)", API)) | {"torch_grad"}
DOCUMENTED -= {name for name in DOCUMENTED if name.startswith("transformers.")}  # may not be installed


@pytest.mark.parametrize("name", [name for name in names() if name not in INTERNAL])
def test_each_public_name_is_documented(name):
    last = name.rsplit(".")[-1]
    assert name in DOCUMENTED or any(each.rsplit(".")[-1] == last for each in DOCUMENTED)


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_each_documented_name_exists(name):
    value = hg
    for part in name.split("."):
        value = getattr(value, part)


def test_the_version_stands_in_one_place():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {hg.__version__}\n" in citation
    assert f'\nversion = "{hg.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("file", sorted((DOCS / "tutorials").glob("*.md")), ids=lambda file: file.stem)
def test_notebooks_are_stored_without_output(file):
    text = file.read_text()
    assert "{code-cell}" in text or file.stem == "index"
    assert '"outputs"' not in text and "image/png" not in text


# torch's own function under HyperTorch's name, and two settings of Adam, whose docstring has them.
WITHOUT_DOCSTRING = {"torch_grad", "diff_optimizers.AdamW", "diff_optimizers.AMSGrad"}


@pytest.mark.parametrize("name", sorted({*DOCUMENTED, *names()} - INTERNAL - WITHOUT_DOCSTRING))
def test_each_public_name_has_an_example(name):
    value = hg
    for part in name.split("."):
        value = getattr(value, part)
    assert ">>> " in (value.__doc__ or "")


def test_each_public_name_of_the_trainer_has_an_example():
    names = set(re.findall(r"hypergrad\.transformers\.(\w+)", API))
    folder = ROOT / "src" / "hypergrad" / "transformers"
    nodes = [node for file in folder.glob("*.py") for node in ast.parse(file.read_text()).body]
    found = {node.name: node for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert len(names) >= 5
    for name in names:
        assert ">>> " in (ast.get_docstring(found[name]) or ""), name


def test_the_page_of_the_demo_runs_and_warnings_lead_to_a_cure():
    """The page named by the demo runs; a warning refers to an existing section with a cure; the cure works."""
    (page,) = re.findall(r"next: (\S+\.md)", (ROOT / "examples" / "tune_digits.py").read_text())
    code = re.findall(r"^(?:>>>|\.\.\.) (.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    own: dict = {}
    exec("\n".join(code), own)
    losses = {"inner_loss": own["train"], "hparams": own["lam"]}
    with pytest.warns(hg.UnsolvedInnerProblem) as caught:
        hg.implicit.grad(own["valid"], params=0.5 * own["w"], **losses)
    link, anchor = str(caught[0].message).rsplit("Help: ")[1].split("#")
    parts = re.split(r"^##+ ", (ROOT / link).read_text(), flags=re.MULTILINE)
    (section,) = [part for part in parts if part.lower().startswith(anchor)]
    assert "Train longer" in section and "# the cure: train" in section
    w = (0.5 * own["w"]).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        own["train"](w, own["lam"].detach()).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cured = hg.implicit.grad(own["valid"], params=w.detach(), **losses)
    torch.testing.assert_close(cured.grads, own["result"].grads, rtol=1e-5, atol=1e-9)


def test_the_versions_of_ci_are_those_of_nox():
    text = (ROOT / "noxfile.py").read_text()
    pythons, torches = (
        set(re.findall(r'"([^"]+)"', re.search(rf"^{name} = (.*)", text, re.M)[1])) for name in ("PYTHONS", "TORCH")
    )
    jobs = re.findall(
        r'python: "([^"]+)", torch: "([^"]+)"', (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    )
    assert jobs and all(python in pythons and torch in torches for python, torch in jobs)
    project = (ROOT / "pyproject.toml").read_text()
    least = min(jobs, key=lambda job: [int(part) for part in job[0].split(".")])
    assert f'requires-python = ">={least[0]}"' in project and f'"torch>={least[1].removesuffix(".0")}"' in project


def test_the_gallery_has_every_tutorial_and_every_result():
    listed = re.findall(r"^((?:tutorials|results)/\w+)$", (DOCS / "gallery.md").read_text(), flags=re.MULTILINE)
    pages = {f"{folder}/{file.stem}" for folder in ("tutorials", "results") for file in (DOCS / folder).glob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == pages - {"tutorials/index", "results/index", "results/benchmarks"}
    assert all("![" in (DOCS / f"{page}.md").read_text() for page in listed if page.startswith("results/"))


@pytest.mark.parametrize("file", sorted(DOCS.rglob("*.png")), ids=lambda file: file.stem)
def test_pictures_can_be_read_on_a_phone(file):
    """One column of at most 6.2 inches at 150 dots an inch, whose letters keep their size on 390 pixels."""
    width = int.from_bytes(file.read_bytes()[16:20], "big")
    assert width <= 930


def test_the_source_map_lists_the_files_in_their_order():
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "explanation" / "source_map.md").read_text(), flags=re.MULTILINE)
    named = [name.removesuffix(".py").removesuffix("/") for row in rows for name in re.findall(r"`(.*?)`", row)]
    assert named == [name for name in ORDER if name != "__init__"]
