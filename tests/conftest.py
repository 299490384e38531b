"""Options of the tests."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests/test_devices.py runs besides: cuda, cuda:1, ...")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of --device. Raises where there is none."""
    return torch.zeros((), device=request.config.getoption("--device")).device
