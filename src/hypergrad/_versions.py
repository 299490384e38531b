"""Versions of this package and of others, its documentation's address, and another package with its import name."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import torch

DISTRIBUTION, RIVAL = "torch-hypergrad", "hypergrad"
OTHERS = ("optree", "numpy", "scipy", "scikit-learn", "matplotlib", "tqdm", "transformers")


def installed(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def show_versions() -> None:
    """Print the versions, the processor and the devices that a report of a problem should name.

    Example:
        >>> show_versions()  # doctest: +ELLIPSIS
        hypergrad     ...
        torch         ...
        python        ...
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows = {
        "hypergrad": f"{version(DISTRIBUTION)}, in {os.path.dirname(__file__)}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'none'}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": f"{platform.platform()}, {os.cpu_count()} cores",
        "devices": ", ".join(devices) or "cpu",
        "dtype": str(torch.get_default_dtype()),
    }
    rows |= {name: each for name in OTHERS if (each := installed(name)) is not None}
    if (rival := installed(RIVAL)) is not None:
        rows["beside it"] = f"the distribution {RIVAL} {rival}, which has the same import name"
    print("\n".join(f"{name:<13} {value}" for name, value in rows.items()))


def with_help(text: str, section: str) -> str:
    """The message, followed by the address of the documentation's section on its causes and cures."""
    urls = metadata(DISTRIBUTION).get_all("Project-URL") if installed(DISTRIBUTION) else None
    addresses = dict(entry.split(", ", 1) for entry in urls or [])
    site = addresses.get("Documentation")
    beside = Path(__file__).with_name("warnings.md")  # a wheel holds the page
    page = (
        f"{site.rstrip('/')}/howto/warnings.html" if site else beside if beside.exists() else "docs/howto/warnings.md"
    )
    return f"{text.rstrip('.')}. Help: {page}#{section.lower()}"


def warn_of_rival() -> None:
    """Warn if another distribution writes into the same folder of site-packages."""
    rival = installed(RIVAL)
    if rival is not None:
        warnings.warn(
            f"the distribution {RIVAL} {rival}, another package with the import name hypergrad, is installed beside "
            f"{DISTRIBUTION}, and the two overwrite each other's files: pip uninstall {RIVAL} {DISTRIBUTION}, then "
            f"install {DISTRIBUTION} again",
            UserWarning,
            stacklevel=2,
        )


warn_of_rival()  # at the first import of this file, which every other file of the package leads to
