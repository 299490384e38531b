"""What a preconditioner may be."""

import pytest
import torch

import hypergrad as hg
from hypergrad import solvers as S


def test_every_solution_names_its_method():
    op, b = hg.operators.matrix(torch.eye(3), positive_definite=True), torch.ones(3)
    for make in (S.CG, S.MINRES, S.GMRES, S.Dense, S.Nystrom):
        assert make(on_failure="ignore")(op, b).method == make.__name__

    def mine(op, b, x0):
        return b

    assert hg.solvers._solver.solve(mine, op, hg.Vector.of(b, "b"), None).method == "mine"


def test_bad_preconditioners_are_named():
    op, b = hg.operators.matrix(torch.eye(3), symmetric=True), torch.ones(3)
    for make in (S.CG, S.MINRES):
        for bad, said in ((5, "got 5"), ("jacobi", "got 'jacobi'"), (S.Nystrom, "got <class"), (b, r"got tensor\(")):
            with pytest.raises(TypeError, match=f"preconditioner must be a LinearOperator.*{said}"):
                make(preconditioner=bad)(op, b)
        with pytest.raises(ValueError, match="Reused needs a solver with a tolerance"):
            make(max_steps=3, preconditioner=S.Reused(S.Nystrom()))(op, b)
    for bad in (None, 5, S.Nystrom, lambda r: r):
        with pytest.raises(TypeError, match=r"Reused needs a recipe .*, got "):
            S.Reused(bad)
    for seed in ("a", 1.5):
        with pytest.raises(ValueError, match=f"seed must be an integer, got {seed!r}"):
            S.Nystrom(seed=seed)
