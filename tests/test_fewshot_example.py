"""The few-shot example: its readers on generated files, its methods compared, and a run that is killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from examples import fewshot, imaml

ROOT = Path(__file__).parents[1]
SMALL = imaml.Config(**imaml.FAST | {"iterations": 4, "save_every": 2, "curve_every": 3, "test_tasks": 4, "steps": 2})
SMALL = imaml.resolved(replace(SMALL, filters=3, queries=3, curve_tasks=2))


def write_omniglot(folder: Path, zipped: bool) -> None:
    """Two sets that share alphabet B. Drawing j of a character is a dot whose position tells the character."""
    sets = {"images_background": {"A": 3, "B": 2}, "images_evaluation": {"B": 2, "C": 1}}
    for name, alphabets in sets.items():
        files = {}
        for a, (alphabet, count) in enumerate(alphabets.items()):
            for character in range(count):
                for drawing in range(4):
                    ink = np.full((105, 105), 255, np.uint8)
                    ink[4 * drawing : 4 * drawing + 20, 30 * character : 30 * character + 20] = 0
                    path = folder / "made.png"
                    Image.fromarray(ink).convert("1").save(path)
                    files[f"{name}/{alphabet}/character{character + 1:02}/{a:02}{character:02}_{drawing:02}.png"] = (
                        path.read_bytes()
                    )
                    path.unlink()
        if zipped:
            with zipfile.ZipFile(folder / f"omniglot_{name}.zip", "w") as archive:
                archive.writestr("__MACOSX/._nothing.png", b"no image")
                for path, data in files.items():
                    archive.writestr(path, data)
        else:
            for path, data in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)


@pytest.mark.parametrize("zipped", [False, True])
def test_omniglot(zipped, tmp_path):
    write_omniglot(tmp_path, zipped)
    data = fewshot.omniglot(tmp_path, rotations=False)
    assert data.train.names == ["A/character01", "A/character02", "A/character03"]  # B is in the test
    assert data.test.names == ["B/character01", "B/character02", "C/character01"]
    assert data.train.x.shape == (3, 4, 1, 28, 28) and data.train.x.dtype == torch.float32
    assert float(data.train.x.min()) >= 0 and float(data.train.x.max()) <= 1
    columns = data.train.x.sum((1, 2, 3)).argmax(-1)
    assert columns.tolist() == sorted(columns.tolist()) and len(set(columns.tolist())) == 3  # ink is 1, paper 0

    by_alphabet = fewshot.omniglot(tmp_path, ("images_background",), ("A",))
    assert {name.split("/")[0] for name in by_alphabet.train.names} == {"B"} and len(by_alphabet.train.names) == 8
    split = fewshot.omniglot(tmp_path, characters=4, rotations=False)
    assert len(split.train.names) == 4 and len(split.train.names + split.test.names) == 6
    assert not set(split.train.names) & set(split.test.names)


def test_omniglot_validation(tmp_path):
    """Its alphabets are in neither the training nor the test set, and a mix-up of the sets is refused."""
    write_omniglot(tmp_path, zipped=False)
    data = fewshot.omniglot(tmp_path, test=("C",), validation=("B",))
    parts = [{name.split("/")[0] for name in part.names} for part in (data.train, data.test, data.validation)]
    assert parts == [{"A"}, {"C"}, {"B"}] and len(data.train.names) == 12 and len(data.validation.names) == 2
    with pytest.raises(ValueError, match="both for the test and for the validation: B"):
        fewshot.omniglot(tmp_path, validation=("B",))
    with pytest.raises(ValueError, match=r"characters = 4 splits at random, and validation = \('B',\) names"):
        fewshot.omniglot(tmp_path, test=("C",), validation=("B",), characters=4)
    with pytest.raises(SystemExit, match="holds no Klingon"):
        fewshot.omniglot(tmp_path, validation=("Klingon",))


def test_a_drawing_that_two_sets_share_is_one(tmp_path):
    """Otherwise a query image could also be a training image."""
    write_omniglot(tmp_path, zipped=False)
    shutil.copytree(tmp_path / "images_background" / "A", tmp_path / "images_evaluation" / "A")
    data = fewshot.omniglot(tmp_path, ("A",), ("C",), rotations=False)
    assert data.train.x.shape[:2] == (3, 4)
    assert len({image.numpy().tobytes() for image in data.train.x[0]}) == 4


def test_rotations_are_classes():
    x = torch.rand(2, 3, 1, 5, 5)
    turned = fewshot.with_rotations(fewshot.Classes(["a", "b"], x))
    assert len(turned.names) == len(set(turned.names)) == len(turned.x) == 8
    np.testing.assert_array_equal(turned.x[2 * 3 + 1, 2, 0].numpy(), np.rot90(x[1, 2, 0].numpy(), 3))


def test_mini_imagenet(tmp_path):
    for part, names in (("train", ["n01", "n02"]), ("test", ["n03"])):
        for place, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            for image in range(3):
                pixels = np.full((100, 90, 3), 0, np.uint8)
                pixels[..., place] = 255
                Image.fromarray(pixels).save(tmp_path / part / name / f"{image}.png")
    data = fewshot.mini_imagenet(tmp_path)
    assert data.train.x.shape == (2, 3, 3, 84, 84) and data.test.x.shape == (1, 3, 3, 84, 84)
    assert data.train.x.mean((1, 3, 4)).tolist() == [[1, 0, 0], [0, 1, 0]] and data.test.names == ["n03"]
    assert data.validation is None
    shutil.copytree(tmp_path / "test" / "n03", tmp_path / "val" / "n04")
    validation = fewshot.mini_imagenet(tmp_path).validation
    assert validation is not None and validation.names == ["n04"] and validation.x.shape == (1, 3, 3, 84, 84)
    config = imaml.resolved(imaml.Config(dataset="mini-imagenet"))
    assert (config.filters, config.regularisation, config.steps) == (32, 0.5, 10)
    net = imaml.network(3, 84, 32, 5)
    assert net(data.train.x[0]).shape == (3, 5) and net[-1].in_features == 32 * 5 * 5


def test_published_settings():
    config = imaml.resolved(imaml.Config())
    assert (config.filters, config.regularisation, config.steps, config.cg_steps) == (64, 2.0, 16, 5)
    assert (config.maml_steps, config.maml_lr) == (1, 0.4)
    many = imaml.resolved(imaml.Config(ways=20))
    assert (many.steps, many.maml_steps, many.maml_lr) == (25, 5, 0.1)
    assert imaml.resolved(imaml.Config(steps=3)).steps == 3


@pytest.mark.parametrize(
    ("read", "source"),
    [(fewshot.omniglot, "github.com/brendenlake/omniglot"), (fewshot.mini_imagenet, "image-net.org")],
)
def test_missing_data(read, source, tmp_path):
    with pytest.raises(SystemExit, match=source) as error:
        read(tmp_path / "nowhere")
    assert str(error.value).count("\n") == 0


def test_tasks():
    data = fewshot.digits().train
    x, y = fewshot.sample(data, 4, 5, 2, 3, seed=1).support
    again = fewshot.sample(data, 4, 5, 2, 3, seed=1)
    assert torch.equal(again.support[0], x) and again.query[0].shape == (4, 15, 1, 8, 8)
    assert not torch.equal(fewshot.sample(data, 4, 5, 2, 3, seed=2).support[0], x)
    assert y.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 4
    flat = {image.numpy().tobytes(): i for i, images in enumerate(data.x) for image in images}
    for task in range(4):
        support = [flat[image.numpy().tobytes()] for image in x[task]]
        query = [flat[image.numpy().tobytes()] for image in again.query[0][task]]
        assert [support[2 * way] for way in range(5)] == [query[3 * way] for way in range(5)]
        assert len(set(support)) == 5
        images = [image.numpy().tobytes() for part in (x, again.query[0]) for image in part[task]]
        assert len(set(images)) == 25  # no query image was learnt from
    with pytest.raises(ValueError, match="there are 24 classes of 170 images"):
        fewshot.sample(data, 1, 25, 1, 1, seed=0)


def test_nearest_neighbour():
    x = torch.eye(3).reshape(1, 3, 1, 1, 3)
    q = x[:, [0, 1, 2, 0]] + 0.1
    tasks = fewshot.Tasks((x, torch.tensor([[0, 1, 2]])), (q, torch.tensor([[0, 1, 2, 1]])))
    assert fewshot.nearest_neighbour(tasks).tolist() == [0.75]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "--clip 0.0: .* must be > 0"),
        ({"clip": float("nan")}, "--clip nan"),
        ({"reptile_batch": 0}, "--reptile-batch 0"),
        ({"validation": ("Greek",)}, "--validation Greek needs Omniglot in --data"),
        ({"validation": ("Greek",), "data": Path("x"), "dataset": "mini-imagenet"}, "has a folder val/"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(SystemExit, match=message):
        imaml.resolved(imaml.Config(**options))


def test_an_exploding_meta_gradient_is_clipped():
    """Otherwise it would stay in Adam's moments, so that later meta-gradients of the other sign had no effect."""
    towards = {}
    for clip in (1.0, float("inf")):
        learner = imaml.Learner("MAML", fewshot.digits(), replace(SMALL, clip=clip), 0)
        parameters = list(learner.net.parameters())
        random = torch.Generator().manual_seed(0)
        directions = [torch.randn(p.shape, generator=random) for p in parameters]
        length = torch.cat([d.flatten() for d in directions]).norm()
        before: list[torch.Tensor] = []
        for size in (-1e6, *[1.0] * 20):
            before = [p.detach().clone() for p in parameters]
            for p, d in zip(parameters, directions, strict=True):
                p.grad = size * d / length
            assert learner.descend()["gradient norm"] == pytest.approx(abs(size))  # the norm before clipping
        steps = zip(before, parameters, directions, strict=True)
        towards[clip] = sum(float(((old - p.detach()) * d).sum()) for old, p, d in steps)
    assert towards[float("inf")] < 0 < towards[1.0]


def test_each_method_adapts_by_its_own_rule():
    """MAML's inner loop is a step of its own size without momentum, in training and in the test."""
    config = replace(SMALL, lr=0.01, momentum=0.9, steps=3, maml_lr=0.3, maml_steps=1)
    maml, fomaml = (imaml.Learner(name, fewshot.digits(), config, 0) for name in ("MAML", "FOMAML"))
    assert (maml.rule.lr, maml.rule.momentum, maml.steps) == (0.3, 0.0, 1)
    assert (fomaml.rule.lr, fomaml.rule.momentum, fomaml.steps) == (0.01, 0.9, 3)


def test_reptile_draws_its_images_anew():
    learner = imaml.Learner("Reptile", fewshot.digits(), replace(SMALL, reptile_batch=7), 0)
    hparams = {name: p.detach() + 0.1 * torch.randn(p.shape) for name, p in learner.net.named_parameters()}
    tasks = imaml.draw(learner.data.train, 1, learner.config, 5, shots=4, queries=0)
    one = imaml.Tasks(*((x[0], y[0]) for x, y in tasks))
    torch.manual_seed(3)
    values = {float(learner.fit_some(hparams, hparams, one)) for _ in range(4)}
    assert len(values) == 4
    torch.manual_seed(3)
    some = torch.rand(20).argsort()[:7]
    x, y = one.support
    expected = torch.nn.functional.cross_entropy(learner.model(hparams, x[some]), y[some])
    assert values & {float(expected)}
    learner.config = replace(learner.config, reptile_batch=100)  # more than there are: all
    torch.testing.assert_close(learner.fit_some(hparams, hparams, one), learner.fit(hparams, hparams, one))


def run(name, config, folder, stop=None, data=None):
    """A run of one method; killed (by an exception) after so many meta-steps."""
    learner = imaml.Learner(name, data or fewshot.digits(), config, 0)
    if stop is not None:
        step = learner.step

        def dying(iteration):
            if iteration == stop:
                raise KeyboardInterrupt
            return step(iteration)

        learner.step = dying
    with tqdm(total=config.iterations, disable=True) as progress:
        return imaml.train(learner, folder, progress)


@pytest.mark.parametrize("name", ["iMAML", "Reptile", "fine-tuning"])
def test_a_run_that_was_killed_goes_on_to_the_same_numbers(name, tmp_path):
    whole = run(name, SMALL, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(name, SMALL, tmp_path / "cut", stop=3)
    resumed = run(name, SMALL, tmp_path / "cut")
    for key in ("iteration", "curve", "test"):
        assert resumed[key] == whole[key]
    assert run(name, SMALL, tmp_path / "cut", stop=0)["test"] == whole["test"]  # done: nothing is trained again
    with pytest.raises(SystemExit, match=r"another configuration \(lr 0.1 → 0.2\)"):
        run(name, replace(SMALL, lr=0.2), tmp_path / "cut")


def test_the_page_says_what_was_learned_from_and_chosen_by():
    point = {"accuracy": 0.6, "adjoint residual": 1e-3, "inner distance": 0.01}
    state = {"test": [0.5, 0.7], "curve": [point], "seconds": 2.0, "iteration": 4, "clipped": 1, "best": None}
    parts = [fewshot.Classes(names, torch.empty(0)) for names in (["A/c1", "A/c1 90°"], ["C/c1"], ["B/c1"])]
    best = {"best": {"step": 50, "accuracy": 0.65}}
    data, config = fewshot.FewShot("omniglot", *parts), replace(SMALL, remark="So.")
    text = imaml.table({"iMAML": [state | best, state | best]}, [0.4, 0.2], data, config)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {7}
    assert rows[2].startswith("| iMAML | 60.0% ± ") and rows[2].endswith("| 60.0%, 60.0% | 65.0% | 50, 50 | 0.500 |")
    chosen = "tested at the best point of the validation on 1 classes (B), which were held out"
    assert f"2 classes (A); tested on 1 classes (C), 4 tasks; {chosen}" in text
    assert "clipped: iMAML 25.0%." in text and text.endswith("\n\nSo.")
    plain = imaml.table({"iMAML": [state]}, [0.4, 0.2], fewshot.FewShot("digits", *parts[:2]), SMALL)
    assert "valid" not in plain and "held out" not in plain and plain.splitlines()[0].count("|") == 5
    assert imaml.summary(state | {"best": best["best"] | {"params": {}}})["best"] == best["best"]


def test_the_test_is_of_the_best_point_of_the_validation(tmp_path, monkeypatch):
    """This holds also if the run was killed after that point; test classes are not used before the end."""
    digits = fewshot.digits()
    data = digits._replace(validation=fewshot.Classes(digits.test.names[8:], digits.test.x[8:]))
    config = replace(SMALL, iterations=6, curve_every=1, save_every=1)
    seen, at, final = [], {}, []
    accuracies = {1: 0.3, 2: 0.5, 3: 0.7, 4: 0.4, 5: 0.6, 6: 0.7}

    def tested(learner, count, classes, seed):
        seen.append(classes is data.validation)
        state = {name: x.clone() for name, x in learner.net.state_dict().items()}
        if classes is data.validation:
            at[len(at) + 1] = state
            return torch.tensor([accuracies[len(at)]])
        final.append(state)
        return torch.tensor([0.9])

    monkeypatch.setattr(imaml.Learner, "test", tested)
    with pytest.raises(KeyboardInterrupt):
        run("FOMAML", config, tmp_path, stop=4, data=data)
    state = run("FOMAML", config, tmp_path, data=data)
    assert state["best"]["step"] == 3 and state["best"]["accuracy"] == pytest.approx(0.7)
    assert state["test"] == pytest.approx([0.9]) and seen == [True] * 6 + [False]
    assert all(torch.equal(x, at[3][name]) for name, x in final[0].items())
    assert any(not torch.equal(x, at[6][name]) for name, x in final[0].items())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fast_as_a_user_runs_it(tmp_path):
    """Killed by the system at its first checkpoint, and started again; beside a run that was left alone."""
    command = [sys.executable, "-X", "utf8", "-m", "examples.imaml", "--fast", "--seed", "2", "--output"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    options = {"cwd": ROOT, "env": environment}
    process = subprocess.Popen(
        [*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )
    while not list(tmp_path.glob("cut/checkpoints/MAML-2.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in ("cut", "whole"):
        done = subprocess.run(
            [*command, str(tmp_path / folder)], capture_output=True, encoding="utf-8", timeout=200, **options
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr and "100%" in done.stderr
    reports = [json.loads((tmp_path / folder / "imaml.json").read_text())["results"] for folder in ("cut", "whole")]
    for results in reports:
        for states in results.values():
            for state in states:
                state.pop("seconds", None)
    assert reports[0] == reports[1]
    made = tmp_path / "whole"
    assert {"imaml.json", "imaml.md", "imaml.png", "imaml.csv"} <= {path.name for path in made.iterdir()}
    assert list(made.glob("tensorboard/iMAML-2/events*"))
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    text = (made / "imaml.md").read_text(encoding="utf-8")
    assert len(rows) == 2 + 6 and all(row in text for row in rows)
    assert len((made / "imaml.csv").read_text().splitlines()) == 1 + 5 * 2
