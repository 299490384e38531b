"""References to torch's and NumPy's documentation, resolved without a network.

Only what the pages and the signatures refer to is listed, with the addresses of the documentation it stands in.
"""

import zlib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

SITES = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "python": "https://docs.python.org/3/",
}
NAMES = {
    "torch": """
        torch.Tensor py:class tensors.html#torch.Tensor
        torch.Generator py:class generated/torch.Generator.html#torch.Generator
        torch.device py:class tensor_attributes.html#torch.device
        torch.dtype py:class tensor_attributes.html#torch.dtype
        torch.nn.Module py:class generated/torch.nn.Module.html#torch.nn.Module
        torch.optim.Optimizer py:class optim.html#torch.optim.Optimizer
        torch.optim.SGD py:class generated/torch.optim.SGD.html#torch.optim.SGD
        torch.optim.Adam py:class generated/torch.optim.Adam.html#torch.optim.Adam
        torch.optim.LBFGS py:class generated/torch.optim.LBFGS.html#torch.optim.LBFGS
        torch.utils.data.DataLoader py:class data.html#torch.utils.data.DataLoader
        torch.func.grad py:function generated/torch.func.grad.html#torch.func.grad
        torch.func.functional_call py:function generated/torch.func.functional_call.html#torch.func.functional_call
        torch.autograd.grad py:function generated/torch.autograd.grad.html#torch.autograd.grad
        torch.compile py:function generated/torch.compile.html#torch.compile
    """,
    "numpy": """
        numpy.ndarray py:class reference/generated/numpy.ndarray.html#numpy.ndarray
    """,
    "python": """
        collections.abc.Callable py:class library/collections.abc.html#collections.abc.Callable
        collections.abc.Iterable py:class library/collections.abc.html#collections.abc.Iterable
        collections.abc.Iterator py:class library/collections.abc.html#collections.abc.Iterator
        collections.abc.Mapping py:class library/collections.abc.html#collections.abc.Mapping
        collections.abc.Sequence py:class library/collections.abc.html#collections.abc.Sequence
        enum.Enum py:class library/enum.html#enum.Enum
        UserWarning py:exception library/exceptions.html#UserWarning
        ValueError py:exception library/exceptions.html#ValueError
    """,
}


def write(name: str, file: Path) -> None:
    """NAMES[name] in Sphinx's format of inventories."""
    lines = (line.split() for line in NAMES[name].split("\n") if line.strip())
    body = "".join(f"{what} {role} 1 {place} -\n" for what, role, place in lines)
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# The rest is compressed with zlib.\n"
    file.write_bytes(head.encode() + zlib.compress(body.encode()))


def add(app: Sphinx, config: Config) -> None:
    folder = Path(app.doctreedir) / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    for name in SITES:
        write(name, folder / f"{name}.inv")
    config.intersphinx_mapping = {name: (site, str(folder / f"{name}.inv")) for name, site in SITES.items()}


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", add, priority=100)  # before intersphinx reads it
    return {"parallel_read_safe": True, "parallel_write_safe": True}
