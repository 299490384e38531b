"""Trainings by BilevelTrainer, to be run by two ranks and by one process with batches of twice the size."""

from __future__ import annotations

import os
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

VOCABULARY, LENGTH, SOURCES, STEPS = 16, 8, 3, 6


def gpt2(attention="sdpa"):
    import transformers

    torch.manual_seed(0)
    Config: Any = transformers.GPT2Config
    config = Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def data():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (40, LENGTH), generator=draw)
    labels = rows.clone()
    labels[::3, -2:] = -100  # masked, so that ranks have unequal numbers of labels
    every = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]
    return [each | {"source": i % SOURCES} for i, each in enumerate(every[:24])], every[24:]


def methods() -> dict[str, Any]:
    import hypergrad as hg
    from hypergrad.transformers import f2sa

    return {
        "F2SA": f2sa,
        "SAMA": lambda w, h, inner: hg.bilevel.SAMA(w, h, optimizer=inner),
        "BOME": lambda w, h, inner: hg.bilevel.BOME(w, h, steps=2, lr=0.05),
        "SOBA": lambda w, h, inner: hg.bilevel.SOBA(w, h, lr=0.1),
        "weights that stay": None,
    }


def trainer(folder, ranks, name="F2SA", **changes) -> Any:
    """A trainer; the batches of all ranks together are the same for any number of ranks."""
    import transformers

    from hypergrad.transformers import BilevelTrainer, SourceWeights

    options = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if ranks > 1 else None,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4 // ranks,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # with a smaller one, rounding decides Adam's first step, which SAMA differentiates
        "max_grad_norm": 0.5,
        "logging_steps": 2,
    }
    train, valid = data()
    hparams = SourceWeights(SOURCES).double()
    rank = dist.get_rank() if ranks > 1 else 0
    hparams.logits.data[0] = 0.3 if rank == 0 else 7.0  # the trainer must take those of rank 0
    return BilevelTrainer(
        gpt2("eager" if name == "SOBA" else "sdpa"),
        transformers.TrainingArguments(str(folder), **(options | changes)),
        train_dataset=train,
        valid_dataset=valid,
        hparams=hparams,
        method=methods()[name],
        restart=4,
    )


def shard(run):
    """Make accelerate shard the model by FSDP2; on its own it does so only on accelerators."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"]
    )
    run.accelerator.state.fsdp_plugin = plugin
    for state in (run.accelerator.state, PartialState()):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    run.is_fsdp_enabled = True


def whole(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def ended(run: Any) -> dict[str, Any]:
    logged = [each.get(key, 0.0) for each in run.state.log_history for key in ("loss", "grad_norm", "weight/0")]
    return {
        "params": [whole(x) for x in run.model.parameters()],
        "hparams": [run.hparams.logits.detach().clone()],
        "logged": torch.tensor(logged),
    }


def results(folder, ranks) -> dict[str, Any]:
    """The final state of each training, by name."""
    found = {}
    for name in methods():
        run = trainer(folder, ranks, name)
        run.train()
        found[name] = ended(run)
    found |= saved_and_resumed(Path(folder) / "whole", ranks)
    if ranks > 1:
        found |= sharded(Path(folder) / "sharded")
    return found


def saved_and_resumed(folder, ranks, prepare=None) -> dict[str, Any]:
    """Six steps of two batches each, once in a single run and once resumed from the checkpoint after three steps."""
    found, options = {}, {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    for name, start in (("two batches a step", None), ("two batches a step, resumed", str(folder / "checkpoint-3"))):
        run = trainer(folder, ranks, **options)
        if prepare is not None:
            prepare(run)
        run.train(resume_from_checkpoint=start)
        found[name] = ended(run)
        if ranks > 1:
            dist.barrier()
    return found


def sharded(folder) -> dict[str, Any]:
    """The trainings under FSDP2, where SOBA must raise an error."""
    found = {}
    for name in ("F2SA", "SAMA", "BOME"):
        run = trainer(folder, 2, name)
        shard(run)
        run.train()
        assert all(hasattr(x, "placements") for x in run.model.parameters())
        found[f"{name}, sharded"] = ended(run)
    found |= {f"{name}, sharded": end for name, end in saved_and_resumed(folder, 2, shard).items()}
    run = trainer(folder, 2, "SOBA")
    shard(run)
    with pytest.raises(ValueError, match="SOBA takes second derivatives"):
        run.train()
    return found


def run(rank, port, folder):
    """Run all trainings as one of two ranks, and save the final states."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    try:
        from accelerate import PartialState

        PartialState(cpu=True, backend="gloo")
        found = results(folder, 2)
        torch.save(found, Path(folder) / f"found.{rank}")
    except BaseException:
        (Path(folder) / f"error.{rank}").write_text(traceback.format_exc())
        os._exit(1)
    dist.barrier()
    os._exit(0)
