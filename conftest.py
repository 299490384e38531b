"""Options of the tests, and what every doctest may use without importing it."""

import gc
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import hypergrad as hg

# Its doctests need the extra of the same name.
collect_ignore = [] if find_spec("transformers") else ["src/hypergrad/transformers"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests/test_devices.py runs besides: cuda, cuda:1, ...")


def pytest_collection_finish() -> None:
    """What is collected stays to the end: neither Python nor a test that counts live tensors need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of --device. Raises where there is none."""
    return torch.zeros((), device=request.config.getoption("--device")).device


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, hg=hg)
