"""Two gloo ranks, each with half of the data, against one process with all data."""

import multiprocessing
import warnings

import pytest
import torch

import distributed_cases
import hypergrad as hg

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.slow,
]


def start(target, *args):
    processes = [
        multiprocessing.get_context("spawn").Process(target=target, args=(rank, *args), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def test_two_ranks_give_the_results_of_one_process(tmp_path):
    results = tmp_path / "results.pt"
    processes = start(distributed_cases.run, tmp_path / "store", results)
    for process in processes:
        process.join()
    errors = [path.read_text() for path in tmp_path.glob("*.error.*")]
    assert not errors, "\n".join(errors)
    assert [process.exitcode for process in processes] == [0, 0]
    found = torch.load(results, weights_only=True)
    assert len(found) >= 30
    assert not {name: difference for name, difference in found.items() if not difference < 1e-12}


def test_what_two_ranks_saved_goes_on_on_one(tmp_path):
    import torch.distributed.checkpoint as dcp

    (tmp_path / "checkpoint").mkdir()
    processes = start(distributed_cases.save_from_two, tmp_path / "store", tmp_path / "checkpoint")
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]

    ends = []
    for resumed in (True, False):
        torch.manual_seed(7)
        net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
        lam = torch.zeros((), dtype=torch.float64, requires_grad=True)
        tracker = hg.bilevel.F2SA(list(net.parameters()), [lam], lr=0.05)
        optimizer = torch.optim.SGD([*net.parameters(), lam], lr=0.05)
        if resumed:
            state = {"model": net.state_dict(), "lam": lam.detach(), "tracker": tracker.state_dict()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that this process is alone
                dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
            net.load_state_dict(state["model"])
            tracker.load_state_dict(state["tracker"])
        steps = 2 if resumed else 5
        distributed_cases.sharded_training(
            net, lam, distributed_cases.data(), steps, tracker, optimizer, lambda lam: lam
        )
        ends.append(torch.cat([*(p.detach().flatten() for p in net.parameters()), lam.detach()[None]]))
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-13)


def test_the_end_of_one_rank_is_an_error_on_the_other(tmp_path):
    processes = start(distributed_cases.die, tmp_path / "store", tmp_path)
    for process in processes:
        process.join(60)
    assert not processes[0].is_alive()
    assert (tmp_path / "error").read_text()
