"""Without the framework of an extra its module says which extra it needs, and the rest of hypergrad is there."""

import importlib
import sys

import pytest


def test_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "hypergrad.transformers", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'torch-hypergrad\[transformers\]'"):
        importlib.import_module("hypergrad.transformers")
