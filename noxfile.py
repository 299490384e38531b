"""The suite over the supported Pythons and versions of torch: `nox -s "tests-3.11(torch='2.6.0')"`, one at a time.

What follows `--` goes to pytest: `nox -s "tests-3.13(torch='newest')" -- tests/test_torch.py`.

Versions other than the pinned one download several gigabytes; .github/workflows/checks.yml runs some of them.
"""

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
TORCH = ["2.6.0", "2.9.1", "2.13.0", "newest"]  # the least that is claimed, one between, the pinned, the newest

nox.options.sessions = []
nox.options.reuse_existing_virtualenvs = False


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCH)
def tests(session: nox.Session, torch: str) -> None:
    """The fast suite, the demo and the doctests with one Python and one torch."""
    if session.python == "3.14" and torch == "2.6.0":
        session.skip("torch 2.6 has no wheels for Python 3.14")
    session.install("torch" if torch == "newest" else f"torch=={torch}")
    constraints = f"{session.create_tmp()}/constraints.txt"
    with open("constraints.txt") as pinned, open(constraints, "w") as others:
        others.writelines(line for line in pinned if not line.startswith("torch=="))
    session.install("-c", constraints, "-e", ".[dev]")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    session.run(
        "python", "-m", "pytest", "-n", "auto", "-q", "-m", "not slow", *session.posargs, env={"OMP_NUM_THREADS": "1"}
    )
    session.run("python", "-m", "examples.tune_digits")
