"""The Trainer: its losses, steps and state."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import Trainer, TrainerCallback  # pyright: ignore[reportMissingImports]

from .. import distributed
from ..bilevel import BOME, F2SA, SAMA, Tracker, cycle
from ._parts import PartOfBatches, sharded_as, whole

STATE = "bilevel.pt"  # the file of a checkpoint that holds the state which the Trainer does not save
MakeTracker = Callable[[list[nn.Parameter], list[nn.Parameter], torch.optim.Optimizer], Tracker]


def f2sa(
    params: list[nn.Parameter],
    hparams: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    order: int = 2,
    penalty: float = 10.0,
    average: float | None = None,
) -> Tracker:
    """The default method: F2SA, which moves its copies by an optimizer like the Trainer's, with the same param groups.

    Args:
        order, penalty, average: as in F2SA. To change one, pass method=functools.partial(f2sa, penalty=30.0).

    Example:
        >>> from hypergrad.transformers import SourceWeights, f2sa
        >>> model, weights = torch.nn.Linear(2, 2), SourceWeights(2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> tracker = f2sa(list(model.parameters()), list(weights.parameters()), optimizer)
        >>> type(tracker.optimizer).__name__, tracker.optimizer.param_groups[0]["lr"]
        ('AdamW', 0.001)
    """
    kind, places = type(optimizer), {id(x): i for i, x in enumerate(params)}
    known = signature(kind).parameters

    def like(copies: list[Tensor]) -> torch.optim.Optimizer:
        groups = []
        for group in optimizer.param_groups:
            rows = [places[id(x)] for x in group["params"] if id(x) in places]
            own = {name: value for name, value in group.items() if name in known and name != "params"}
            groups.append(own | {"params": [copies[k + i] for k in range(0, len(copies), len(params)) for i in rows]})
        make: Any = kind
        return make(groups)

    return F2SA(params, hparams, order=order, penalty=penalty, optimizer=like, average=average)


class BilevelTrainer(Trainer):  # pyright: ignore[reportGeneralTypeIssues]
    """A Trainer that learns `hparams`, weights of its training data, from the loss on `valid_dataset`.

    The model is trained on the weighted loss alone; validation data influences it only through the weights. All other
    features are the Trainer's: gradient accumulation, bf16 and fp16, PEFT, schedules, callbacks, logging, checkpoints,
    resuming. The losses are those of a causal language model (labels in the shape of input_ids) or of a classifier (one
    label per example); override `token_losses` for others.

    Under torchrun or accelerate's launcher the directions of both levels are computed from the batches of all
    processes: N processes learn the same as one process with batches of N times the size. Each process holds the whole
    model (DDP), or a shard of it (FSDP2, with F2SA, BOME or SAMA), and all of hparams, which are those of process 0.

    Args:
        args, kwargs: the Trainer's, except compute_loss_func.
        valid_dataset: the data on which the weights are learned, in batches of per_device_train_batch_size for each
            process. It is not the eval_dataset, on which the Trainer evaluates.
        hparams: a module (losses [rows, tokens], inputs) ↦ weights that broadcast to losses. Its `columns` name the
            inputs that the model does not take. SourceWeights, ExampleWeights, TokenWeights, or a custom module.
        method: (params, hparams, optimizer) ↦ a tracker of hg.bilevel: F2SA by default, with the Trainer's optimizer
            for its copies; lambda params, hparams, optimizer: SAMA(params, hparams, optimizer=optimizer). SOBA and the
            others with second derivatives need attn_implementation="eager". None leaves the weights unchanged, for a
            second training with the learned weights.
        outer_optimizer: the optimizer of hparams' parameters; torch.optim.Adam(lr=0.1) by default.
        restart: F2SA's copies are set to the model again after so many steps, since copies of a network drift apart;
            None: never.
        begin: number of steps before hparams are updated.

    Raises: ValueError for several devices in one process, FSDP1, DeepSpeed, tensor and context parallelism, label
        smoothing, and for an algorithm with second derivatives under FSDP2.
    Source: see the trackers of `hg.bilevel`.

    Example:
        >>> import tempfile, transformers
        >>> from hypergrad.transformers import BilevelTrainer, SourceWeights
        >>> config = transformers.GPT2Config(
        ...     vocab_size=8, n_positions=4, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
        ... )
        >>> texts = torch.randint(8, (8, 4))
        >>> train = [{"input_ids": text, "labels": text, "source": i % 2} for i, text in enumerate(texts)]
        >>> valid = [{"input_ids": text, "labels": text} for text in texts[::2]]  # those of source 0
        >>> args = transformers.TrainingArguments(tempfile.mkdtemp(), max_steps=2, report_to="none", use_cpu=True)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> trainer = BilevelTrainer(model, args, train_dataset=train, valid_dataset=valid, hparams=SourceWeights(2))
        >>> result = trainer.train()
        {'train_runtime': ...}
        >>> trainer.hparams.weights.shape
        torch.Size([2])
    """

    def __init__(
        self,
        *args: Any,
        valid_dataset: Any,
        hparams: nn.Module,
        method: MakeTracker | None = f2sa,
        outer_optimizer: torch.optim.Optimizer | None = None,
        restart: int | None = 25,
        begin: int = 0,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise TypeError(
                "BilevelTrainer weights the losses itself: override token_losses instead of compute_loss_func"
            )
        if (restart is not None and restart < 1) or begin < 0:
            raise ValueError(f"restart must be at least 1 and begin at least 0, got {restart} and {begin}")
        super().__init__(*args, **kwargs)
        self._check_parallelism()
        if self.args.label_smoothing_factor:
            raise ValueError("BilevelTrainer does not support label_smoothing_factor: override token_losses")
        self.hparams, self.method, self.restart, self.begin = hparams.to(self.args.device), method, restart, begin
        self.outer_optimizer = outer_optimizer or torch.optim.Adam(self.hparams.parameters(), lr=0.1)
        self.valid_dataset = valid_dataset
        self.tracker: Tracker | None = None
        self._checkpoint: str | None = None
        self._sharded = False  # whether the model is sharded by FSDP2, whose hooks average the gradients
        self.add_callback(_Outer(self))

    def _check_parallelism(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"BilevelTrainer uses one device in each process, but this process has {self.args.n_gpu}: start one "
                f"process for each device (torchrun --nproc-per-node={self.args.n_gpu}), or set CUDA_VISIBLE_DEVICES"
            )
        if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError('BilevelTrainer supports FSDP2, not FSDP1: set fsdp_config={"version": 2}')
        if (
            self.is_deepspeed_enabled
            or getattr(self, "is_distributed_loading_by_transformers", False)
            or any(getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp"))
        ):
            raise ValueError(
                "BilevelTrainer supports only DDP and FSDP2, not DeepSpeed or tensor, context or sequence parallelism: "
                "use hg.bilevel with hg.distributed for those"
            )

    # The losses of a batch.

    def counted(self, labels: Tensor) -> Tensor:
        """Mask of the losses that count: [rows, tokens], for a classifier [rows, 1]."""
        return (labels[:, 1:] if labels.ndim == 2 else labels[:, None]) != -100

    def token_losses(self, outputs: Any, labels: Tensor) -> Tensor:
        """The losses of a batch: [rows, tokens], for a classifier [rows, 1]."""
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if labels.ndim + 1 != logits.ndim or logits.ndim not in (2, 3):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} fit neither a causal "
                f"language model nor a classifier: override token_losses and counted"
            )
        logits, labels = (logits[:, :-1], labels[:, 1:]) if logits.ndim == 3 else (logits[:, None], labels[:, None])
        logits = logits if logits.element_size() >= 4 else logits.float()
        return nn.functional.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The unweighted mean of a batch's losses, for evaluation and validation."""
        loss, outputs = self._loss(model, inputs, None, None)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of one step, and the number of losses that count in the batches of all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return batches, self._count(batches) if batches else None

    def _count(self, batches: list[Any]) -> Tensor:
        count = torch.stack([self.counted(_labels(batch)).sum() for batch in batches]).sum().to(self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(count)
        return count

    def _loss(
        self, model: nn.Module, inputs: dict[str, Any], hparams: nn.Module | None, count: Any
    ) -> tuple[Tensor, Any]:
        """The weighted loss Σ ω ℓ / count, and the model's outputs.

        count: the number in all processes, so that the mean over processes is Σ ω ℓ / count; None: that in this batch.
        """
        labels, others = _labels(inputs), ("labels", *self._columns)
        shared = count is not None and self.tracker is not None and self.args.world_size > 1
        call = distributed.call if shared else lambda module, *args, **kwargs: module(*args, **kwargs)
        inputs_of_model = {name: value for name, value in inputs.items() if name not in others}
        outputs = model(**inputs_of_model) if self._sharded else call(model, **inputs_of_model)
        losses, counted = self.token_losses(outputs, labels), self.counted(labels)
        total = ((1.0 if hparams is None else call(hparams, losses, inputs)) * losses * counted).sum()
        return total / counted.sum() if count is None else self.args.world_size * total / count, outputs

    @property
    def _columns(self) -> tuple[str, ...]:
        return tuple(getattr(self.hparams, "columns", ()))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = self._signature_columns or []
        self._signature_columns = known + [name for name in self._columns if name not in known]

    def get_valid_dataloader(self) -> DataLoader:
        """This process's part of the batches on which the weights are learned, shuffled by args.seed."""
        rows, ranks, draw = len(self.valid_dataset), self.args.world_size, torch.Generator().manual_seed(self.args.seed)
        size = min(self.args.per_device_train_batch_size, rows // ranks)
        if not size:
            raise ValueError(f"valid_dataset has {rows} rows for {ranks} processes: each process needs a row")
        return DataLoader(
            self.valid_dataset,
            batch_sampler=PartOfBatches(
                RandomSampler(self.valid_dataset, generator=draw), size, self.args.process_index, ranks
            ),
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="validation"),
            generator=draw,
        )

    # The training loop.

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the directions of this batch and a validation batch to .grad of the model and of hparams."""
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        inputs = self._prepare_inputs(inputs)
        if self.tracker is None:
            with self.compute_loss_context_manager():
                loss = self._loss(model, inputs, self.hparams, num_items_in_batch)[0]
            self.accelerator.backward(loss)
            return loss.detach()
        if self._sharded:
            model.set_requires_gradient_sync(True)  # pyright: ignore[reportCallIssue]  # averaged directions accumulate
        valid = self._prepare_inputs(next(self._valid))
        count = self._count([valid])
        scaler, parts = self._scaler, self.current_gradient_accumulation_steps
        scaled = scaler.scale if scaler is not None else lambda loss: loss

        def inner_loss() -> Tensor:
            with self.compute_loss_context_manager():
                return scaled(self._loss(model, inputs, self.hparams, num_items_in_batch)[0])

        def outer_loss() -> Tensor:
            with self.compute_loss_context_manager():
                return scaled(self._loss(model, valid, None, count)[0] / parts)

        _, value = self.tracker.backward(outer_loss, inner_loss, scaler=scaler)
        assert value is not None
        return value if scaler is None else value / scaler.get_scale()

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _start(self) -> None:
        """Make a tracker for the model and optimizer that train() has prepared; load its state from a checkpoint."""
        self.hparams.requires_grad_(self.method is not None)
        if self.args.world_size > 1:
            for x in (*self.hparams.parameters(), *self.hparams.buffers()):
                torch.distributed.broadcast(x.data, 0)
        if self.method is None:
            return
        model: Any = self.model
        params = [x for x in model.parameters() if x.requires_grad]
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        self._sharded = any(hasattr(x, "placements") for x in params)
        self.tracker = self.method(params, list(self.hparams.parameters()), optimizer)
        if self._sharded and not isinstance(self.tracker, (F2SA, BOME, SAMA)):
            raise ValueError(
                f"{type(self.tracker).__name__} takes second derivatives, for which FSDP2's hooks give no graph: use "
                f"f2sa, BOME or SAMA, or train with DDP instead of FSDP"
            )
        self._valid = cycle(self.get_valid_dataloader())
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise ValueError(f"{checkpoint} holds no {STATE}: it is not a checkpoint of a BilevelTrainer")
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.hparams.load_state_dict(state["hparams"])
        self.outer_optimizer.load_state_dict(state["outer_optimizer"])
        self.tracker.load_state_dict(sharded_as(self.tracker, state["tracker"]) if self._sharded else state["tracker"])
        self._valid.load_state_dict(state["valid"])

    def _outer_step(self) -> None:
        """Move hparams and the tracker's own variables, before the Trainer moves the model."""
        if self.tracker is None:
            return
        if getattr(self.method, "func", self.method) is f2sa and self.tracker.optimizer is not None:
            optimizer: Any = self.optimizer
            for own, group in zip(self.tracker.optimizer.param_groups, optimizer.param_groups, strict=True):
                own["lr"] = group["lr"]  # the copies follow the model's schedule
        self.tracker.step()
        grads = [x.grad for x in self.hparams.parameters() if x.grad is not None]
        if self._scaler is not None:
            for grad in grads:
                grad /= self._scaler.get_scale()
        if self.state.global_step >= self.begin and all(bool(torch.isfinite(grad).all()) for grad in grads):
            self.outer_optimizer.step()
        self.outer_optimizer.zero_grad()

    def _after_step(self) -> None:
        if isinstance(self.tracker, F2SA) and self.restart and self.state.global_step % self.restart == 0:
            self.tracker.restart()

    # Logging and checkpoints.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does; in training also the tracker's numbers and the weights, if these are at most 20."""
        if "loss" in logs and self.tracker is not None:
            own = {f"bilevel/{name}": value for name, value in self.tracker.metrics().items() if math.isfinite(value)}
            weights = getattr(self.hparams, "weights", None)
            if isinstance(weights, Tensor) and weights.numel() <= 20:
                own |= {f"weight/{i}": value for i, value in enumerate(weights.detach().flatten().tolist())}
            logs |= own
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.tracker is None:
            return
        state = {
            "hparams": self.hparams.state_dict(),
            "outer_optimizer": self.outer_optimizer.state_dict(),
            "tracker": self.tracker.state_dict(),
            "valid": self._valid.state_dict(),
        }
        if self._sharded:  # all processes must take part in gathering; one of them writes the file
            state["tracker"] = whole(state["tracker"])
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._checkpoint = checkpoint


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"a batch needs labels, but has only {sorted(batch)}: use a collator that makes them")
    return batch["labels"]


class _Outer(TrainerCallback):  # pyright: ignore[reportGeneralTypeIssues]
    """Calls a BilevelTrainer when training begins, and before and after the Trainer's optimizer step."""

    def __init__(self, trainer: BilevelTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._outer_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._after_step()
