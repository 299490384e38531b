"""Few-shot classification tasks: readers of Omniglot and mini-ImageNet on disk, and scikit-learn's digits."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

OMNIGLOT = (
    "{folder} holds no {name} (a folder, or {name}.zip): get images_background.zip and images_evaluation.zip, or the "
    "small sets, from https://github.com/brendenlake/omniglot (python/); without --data the digits that scikit-learn "
    "ships are used."
)
MINI_IMAGENET = (
    "{folder} holds no folders train/ and test/ with one folder of images a class: mini-ImageNet is cut from ImageNet "
    "(https://image-net.org, which asks you to register) by the lists of "
    "https://github.com/twitter-research/meta-learning-lstm; without --data the digits that scikit-learn ships are "
    "used."
)


class Classes(NamedTuple):
    """Images of one size in [0, 1], the same number of each class: [classes, images, channels, height, width]."""

    names: list[str]
    x: Tensor


class FewShot(NamedTuple):
    """Disjoint classes for training, for the test, and (or None) for choosing settings."""

    name: str
    train: Classes
    test: Classes
    validation: Classes | None = None


class Tasks(NamedTuple):
    """Stacked tasks: images [tasks, images, channels, height, width] and labels [tasks, images]."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


def sample(classes: Classes, count: int, ways: int, shots: int, queries: int, seed: int) -> Tasks:
    """Random tasks of `ways` classes, with `shots` images of each class in the support set and `queries` others."""
    random = torch.Generator().manual_seed(seed)
    total, images = classes.x.shape[:2]
    if ways > total or shots + queries > images:
        raise ValueError(
            f"{ways} ways of {shots} + {queries} images were asked for; there are {total} classes of {images} images"
        )
    which = torch.stack([torch.randperm(total, generator=random)[:ways] for _ in range(count)])
    order = torch.rand(count, ways, images, generator=random).argsort(-1)
    labels = torch.arange(ways).unsqueeze(1).expand(count, ways, images)

    def part(begin: int, end: int) -> tuple[Tensor, Tensor]:
        x = classes.x[which.unsqueeze(-1), order[..., begin:end]].flatten(1, 2)
        return x, labels[..., begin:end].flatten(1)

    return Tasks(part(0, shots), part(shots, shots + queries))


def with_rotations(classes: Classes) -> Classes:
    """Each class four times, rotated by 0, 90, 180 and 270 degrees: a rotated character is another class."""
    names = [name + turn for turn in ("", " 90°", " 180°", " 270°") for name in classes.names]
    return Classes(names, torch.cat([classes.x.rot90(turns, (-2, -1)) for turns in range(4)]))


def digits() -> FewShot:
    """scikit-learn's digits, 8×8, in four rotations: 0 to 5 for training, 6 to 9 for the test."""
    x, y = load_digits(return_X_y=True)
    images = [torch.tensor(x[y == digit][:170] / 16, dtype=torch.float32).reshape(170, 1, 8, 8) for digit in range(10)]
    all_ = Classes([str(digit) for digit in range(10)], torch.stack(images))
    first, last = (Classes(all_.names[part], all_.x[part]) for part in (slice(6), slice(6, 10)))
    return FewShot("digits", with_rotations(first), with_rotations(last))


def omniglot(
    folder: Path,
    train: tuple[str, ...] = ("images_background",),
    test: tuple[str, ...] = ("images_evaluation",),
    characters: int = 0,
    validation: tuple[str, ...] = (),
    size: int = 28,
    rotations: bool = True,
    seed: int = 0,
) -> FewShot:
    """Omniglot from its folders set/alphabet/character/*.png, or from zip files of them.

    Args:
        train, test: names of sets (images_background) or of alphabets (Korean). An alphabet of the test is left out
            of the training sets.
        characters: if not 0, the split of Vinyals et al. 2016 and most papers: the characters of train and test
            together, shuffled by `seed`; the first `characters` (1,200) are for training, the others for the test.
        validation: alphabets (or sets) for choosing settings, left out of the training sets.
        size: height and width to which images are reduced.
        rotations: add rotated characters as further training classes.
    """
    if characters and validation:
        raise ValueError(f"characters = {characters} splits at random, and validation = {validation} names: give one")
    drawings: dict[str, list[Tensor]] = {}
    wanted = [[_omniglot_files(folder, name) for name in names] for names in (train, test, validation)]
    # Sets may share alphabets, so alphabet/character/file identifies a drawing.
    every = {path.split("/", 1)[1]: data for part in wanted for files in part for path, data in files}
    for path, data in every.items():
        ink = Image.open(io.BytesIO(data)).convert("L").resize((size, size), Image.Resampling.LANCZOS)
        drawings.setdefault(_character(path), []).append(1 - torch.tensor(np.array(ink), dtype=torch.float32) / 255)
    own = [{_character(path) for files in part for path, _ in files} for part in wanted]
    both = {name.split("/")[0] for name in own[1]} & {name.split("/")[0] for name in own[2]}
    if both:
        raise ValueError(f"alphabets cannot be both for the test and for the validation: {', '.join(sorted(both))}")
    held = {name.split("/")[0] for name in own[1] | own[2]}
    learned, tested = [name for name in sorted(own[0]) if name.split("/")[0] not in held], sorted(own[1])
    if characters:
        names = sorted(drawings)
        shuffled = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
        learned, tested = shuffled[:characters], sorted(shuffled[characters:])
    first, last = (_classes(drawings, part) for part in (learned, tested))
    middle = _classes(drawings, sorted(own[2])) if validation else None
    return FewShot("omniglot", with_rotations(first) if rotations else first, last, middle)


def _character(path: str) -> str:
    """alphabet/character."""
    return "/".join(path.split("/")[-3:-1])


def _classes(drawings: dict[str, list[Tensor]], names: list[str]) -> Classes:
    count = min((len(drawings[name]) for name in names), default=0)
    if not count:
        raise ValueError("no character is left to learn from, or for the test: see train, test and characters")
    return Classes(names, torch.stack([torch.stack(drawings[name][:count]) for name in names]).unsqueeze(2))


def _omniglot_files(folder: Path, name: str) -> list[tuple[str, bytes]]:
    """(set/alphabet/character/file, content) of a set, or of an alphabet in any set, sorted by paths."""
    found = [pair for source in _sources(folder) for pair in _pngs(source) if name in pair[0].split("/")[:2]]
    if not found:
        raise SystemExit(OMNIGLOT.format(folder=folder, name=name))
    return sorted(found)


def _sources(folder: Path) -> list[Path]:
    """The folders of sets, and the zip files of those without a folder."""
    folders = sorted(path for path in folder.glob("images_*") if path.is_dir())
    zips = sorted(path for path in folder.glob("*images_*.zip"))
    return [*folders, *(path for path in zips if not any(path.stem.endswith(each.name) for each in folders))]


def _pngs(source: Path) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in source.glob("*/*/*.png"):
            yield path.relative_to(source.parent).as_posix(), path.read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if name.endswith(".png") and name.count("/") == 3:
                yield name, archive.read(name)


def mini_imagenet(folder: Path, size: int = 84) -> FewShot:
    """mini-ImageNet in colour from the folders train/class/*.jpg (or any format), test/, and val/ if there is one."""
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        raise SystemExit(MINI_IMAGENET.format(folder=folder))
    parts = ["train", "test"] + ["val"] * (folder / "val").is_dir()
    return FewShot("mini-imagenet", *(_image_folder(folder / part, size) for part in parts))


def _image_folder(folder: Path, size: int) -> Classes:
    classes: dict[str, list[Tensor]] = {}
    for path in sorted(path for path in folder.glob("*/*") if path.is_file()):
        image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        x = torch.tensor(np.array(image), dtype=torch.float32).movedim(-1, 0) / 255
        classes.setdefault(path.parent.name, []).append(x)
    if not classes:
        raise SystemExit(MINI_IMAGENET.format(folder=folder.parent))
    count = min(map(len, classes.values()))
    return Classes(list(classes), torch.stack([torch.stack(images[:count]) for images in classes.values()]))


def nearest_neighbour(tasks: Tasks) -> Tensor:
    """Accuracy of each task if a query gets the label of the support image with the nearest pixels."""
    (x, y), (q, labels) = tasks
    nearest = torch.cdist(q.flatten(2), x.flatten(2)).argmin(-1)
    return (y.gather(1, nearest) == labels).float().mean(1)
