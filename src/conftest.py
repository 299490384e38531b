"""What every doctest may use without importing it."""

from typing import Any

import pytest
import torch

import hypergrad as hg


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, hg=hg)
