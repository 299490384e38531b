"""The example on data sources: the texts, and the whole at small sizes."""

from dataclasses import replace

import pytest
import torch

from examples import data_sources as example

SMALL = example.Config(**example.FAST)


def test_sources():
    train, valid, test = example.corpora(SMALL, 0)
    assert [len(part) for part in (train, valid, test)] == [160, 8, 8]
    assert [row["source"] for row in train[::40]] == [0, 1, 2, 3]
    assert all(row["input_ids"].shape == (16,) and int(row["input_ids"].max()) < example.LETTERS for row in train)
    long = replace(SMALL, length=400, pieces=2)
    corrupted = ["".join(map(chr, row["input_ids"].tolist())) for row in example.corpora(long, 0)[0][-2:]]
    sound = ["".join(map(chr, row["input_ids"].tolist())) for row in example.corpora(long, 0)[0][:2]]
    assert not any(" the " in text and "array" in text for text in corrupted) and any("array" in text for text in sound)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_cell():
    pytest.importorskip("transformers")
    done = []
    found = example.cell(SMALL, 0, lambda: done.append(0))
    assert len(done) == 7 and len(found["weights"]) == 4 and sum(found["weights"]) == pytest.approx(4, rel=1e-5)
    assert found["weights"] != [1.0] * 4 and all(1 < value < 200 for value in found["perplexity"].values())
    text = example.table(SMALL, [found])
    assert sum(found["exact"]["weights"]) == pytest.approx(4, rel=1e-5) and len(found["exact"]["validation"]) == 2
    assert "| corrupted docstrings |" in text and len(example.figure([found]).axes) == 1
    data = example.corpora(SMALL, 0)
    fixed = example.trained(SMALL, 0, data, torch.zeros(4), lambda: None)
    assert example.perplexity(fixed) == pytest.approx(found["perplexity"]["equal weights"], rel=1e-5)


@pytest.mark.slow
def test_exact_hypergradients_are_the_differences_of_trainings():
    """Of the validation loss after all steps, along the hypergradient at equal weights; without dropout's noise."""
    pytest.importorskip("transformers")
    config, data = replace(SMALL, exact_steps=1, steps=4), example.corpora(SMALL, 0)
    found = example.exact(config, 0, data, lambda: None)
    direction, size = torch.tensor(found["hypergradients"][0]), 0.3

    def value(sign):
        shifted = sign * size * direction / direction.norm()
        return example.exact(config, 0, data, lambda: None, shifted)["validation"][0]

    assert (value(1) - value(-1)) / (2 * size) == pytest.approx(float(direction.norm()), rel=0.05)
