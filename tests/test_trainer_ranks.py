"""BilevelTrainer on two gloo ranks: the numbers of one process with batches of twice the size."""

import multiprocessing
import socket
from functools import partial

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import trainer_cases

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.timeout(300)  # two processes import transformers and train
def test_two_ranks_learn_what_one_learns(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    processes = [start(target=trainer_cases.run, args=(rank, port, tmp_path), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    one = trainer_cases.results(tmp_path / "alone", 1)
    for process in processes:
        process.join()
    errors = [path.read_text() for path in tmp_path.glob("error.*")]
    assert not errors, "\n".join(errors)
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}", weights_only=True)
        assert len(found) == 12
        for name, end in found.items():
            alone = one[name.removesuffix(", sharded")]
            for mine, theirs in zip(end["params"] + end["hparams"], alone["params"] + alone["hparams"], strict=True):
                # SAMA differences gradients that are 0.02 apart.
                torch.testing.assert_close(
                    mine,
                    theirs,
                    rtol=1e-10,
                    atol=1e-10 if "SAMA" in name else 1e-12,
                    msg=partial("{}: {}".format, name),
                )
            torch.testing.assert_close(
                end["logged"], alone["logged"], rtol=1e-5, atol=1e-6
            )  # the Trainer adds in float32
    resumed = trainer_cases.trainer(tmp_path, 1, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    torch.testing.assert_close(
        resumed.hparams.logits.detach(), one["two batches a step"]["hparams"][0], rtol=1e-10, atol=1e-12
    )
    assert float(one["F2SA"]["hparams"][0].abs().max()) > 0.05


def test_validation_is_at_least_a_row_for_each_process(tmp_path):
    run = trainer_cases.trainer(tmp_path, 1)
    run.valid_dataset = []
    with pytest.raises(ValueError, match="valid_dataset has 0 rows for 1 processes"):
        run.get_valid_dataloader()
