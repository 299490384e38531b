"""Shared by all examples: typed options, writing results with their configuration to files, and peak memory."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdRef

C = TypeVar("C", bound="Base")


@dataclass
class Base:
    """Options of every example, to which its Config adds others."""

    output: Path = Path("results")
    """Folder of the results."""
    seed: int = 0
    """Seed of all random numbers."""
    threads: int = 1
    """Threads of torch."""
    fast: bool = False
    """Run with reduced sizes, as a test."""


@dataclass
class Common(Base):
    """Options of the examples that can read a data set from disk."""

    data: Path | None = None
    """Folder of the data set; without it, data that comes with scikit-learn."""


def parse(kind: type[C], description: str, fast: Mapping[str, Any]) -> C:
    """Read the configuration from the command line, print it, and set torch's threads and seed.

    The defaults are those of `kind`; with --fast, the values of `fast` replace them.
    """
    default = kind(**(fast if "--fast" in sys.argv[1:] else {}))
    config = tyro.cli(kind, default=default, description=description, prog=f"python -m examples.{_name(kind)}")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    print(json.dumps(record(config), indent=2))
    return config


def record(config: Base) -> dict[str, Any]:
    """How results were made: the command, the date, the machine, versions, and the configuration."""
    packages = {"torch": torch.__version__} | {name: version(name) for name in ("torch-hypergrad", "numpy")}
    return {
        "command": command(config),
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {config.threads} thread{'s' * (config.threads > 1)}",
        "versions": {"python": platform.python_version()} | packages,
        "config": {key: plain(value) for key, value in asdict(config).items()},
    }


def save(config: Base, title: str, table: str, figure: Figure, results: Any) -> None:
    """Write <name>.json (results and their record), .png and .md (table, picture, command), and print the table."""
    name = _name(type(config))
    config.output.mkdir(parents=True, exist_ok=True)
    made = record(config)
    (config.output / f"{name}.json").write_text(json.dumps(made | {"results": results}, indent=1) + "\n")
    figure.savefig(config.output / f"{name}.png", dpi=150)
    how = f"`{made['command']}`, {made['date']}, {made['machine']}"
    how += f"; [configuration, versions and all numbers]({name}.json)"
    text = f"# {title}\n\n{table}\n\n![{title}]({name}.png)\n\n{how}\n"
    (config.output / f"{name}.md").write_text(text, encoding="utf-8")
    print(f"\n{table}\n\nwritten: {', '.join(str(config.output / f'{name}.{end}') for end in ('md', 'json', 'png'))}")


def command(config: Base) -> str:
    """The command line that gives this configuration; of a path only the last part is kept."""
    words = ["python", "-m", f"examples.{_name(type(config))}"]
    default = type(config)()
    for field in fields(config):
        value = getattr(config, field.name)
        # --fast changes the defaults, so with it all options are listed.
        if field.name == "output" or (value == getattr(default, field.name) and (value is None or not config.fast)):
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, (tuple, list)) else [value]
            words += [f"--{option}", *(str(plain(each)) for each in values)]
    return shlex.join(words)


def plain(value: Any) -> Any:
    """A value of a configuration in a form for JSON; of a path only the last part is kept."""
    if isinstance(value, Path):
        return value.name
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def rounded(value: Any) -> Any:
    """Results with every number rounded to six digits, so that the file is legible."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


class PeakMemory(TorchDispatchMode):
    """Measures the peak memory (`peak`, bytes) of the tensors that are made in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for given, tree in ((True, (args, kwargs)), (False, result)):
            for storage in [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]:
                if WeakIdRef(storage) not in self.sizes:
                    size = self.sizes[WeakIdRef(storage, self._freed)] = 0 if given else storage.nbytes()
                    self.now += size
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage: WeakIdRef) -> None:
        self.now -= self.sizes.pop(storage)


def _name(kind: type[Base]) -> str:
    """The name of the example's module, also if it runs as __main__."""
    spec = getattr(sys.modules[kind.__module__], "__spec__", None)
    return (spec.name if spec else kind.__module__).rsplit(".", 1)[-1]
