"""BilevelTrainer on small GPT-2 models from configurations, against plain loops of hg.bilevel."""

import pytest
import torch

import hypergrad as hg

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from hypergrad.transformers import BilevelTrainer, ExampleWeights, SourceWeights, TokenWeights, f2sa  # noqa: E402

VOCABULARY, LENGTH, SOURCES = 16, 8, 3
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def gpt2(dropout=0.0, double=True, attention="sdpa"):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    return model.double() if double else model


def data():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (32, LENGTH), generator=draw)
    labels = rows.clone()
    labels[::3, -2:] = -100
    every = [{"input_ids": x, "labels": y} for x, y in zip(rows, labels, strict=True)]
    train = [each | {"source": i % SOURCES, "index": i} for i, each in enumerate(every[:24])]
    return train, every[24:]


class Recorder:
    """The default collator, which keeps the batches."""

    def __init__(self):
        self.train, self.valid = [], []

    def __call__(self, rows):
        batch = transformers.default_data_collator(rows)
        (self.train if "source" in batch or "index" in batch else self.valid).append(batch)
        return batch


def trainer(folder, model=None, hparams=None, kind=BilevelTrainer, **changes):
    own = (
        "method",
        "outer_optimizer",
        "restart",
        "begin",
        "data_collator",
        "eval_dataset",
        "train_dataset",
        "callbacks",
    )
    given = {name: changes.pop(name) for name in own if name in changes}
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    fixed = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    args = transformers.TrainingArguments(str(folder), **(fixed | options | changes))
    train, valid = data()
    hparams = SourceWeights(SOURCES).double() if hparams is None else hparams
    model = gpt2() if model is None else model
    return kind(model, args, **({"train_dataset": train, "valid_dataset": valid, "hparams": hparams} | given))


def assert_same(one, other, **tolerance):
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def plain_loop(model, recorder, steps, accumulate, restart, schedule, make):
    """F2SA in a loop of one's own, on the batches that a trainer had."""
    logits = torch.zeros(SOURCES, dtype=torch.float64, requires_grad=True)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    outer = torch.optim.Adam([logits], lr=0.1)
    tracker = make(model.parameters(), [logits], inner)

    def losses(batch):
        z = model(input_ids=batch["input_ids"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        values = torch.nn.functional.cross_entropy(z.mT, targets, ignore_index=-100, reduction="none")
        return values, targets != -100

    for step in range(steps):
        for each in (inner, tracker.optimizer):
            for group in each.param_groups if each else []:
                group["lr"] = 1e-2 * schedule(step)
        train = recorder.train[step * accumulate : (step + 1) * accumulate]
        valid = recorder.valid[step * accumulate : (step + 1) * accumulate]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in train)
        for batch, validation in zip(train, valid, strict=True):

            def inner_loss(batch=batch, tokens=tokens):
                values, _ = losses(batch)
                weights = SOURCES * logits.softmax(0)[batch["source"]]
                return (weights[:, None] * values).sum() / tokens

            def outer_loss(validation=validation):
                values, counted = losses(validation)
                return values.sum() / counted.sum() / accumulate

            tracker.backward(outer_loss, inner_loss)
        tracker.step()
        outer.step()
        inner.step()
        for each in (inner, outer):
            each.zero_grad()
        if restart and (step + 1) % restart == 0 and isinstance(tracker, hg.bilevel.F2SA):
            tracker.restart()
    return logits.detach()


METHODS = {
    "F2SA": (
        f2sa,
        lambda w, h, inner: hg.bilevel.F2SA(
            w, h, optimizer=lambda own: torch.optim.AdamW(own, lr=1e-2, weight_decay=0.0)
        ),
        "sdpa",
    ),
    "SAMA": (
        lambda w, h, inner: hg.bilevel.SAMA(w, h, optimizer=inner),
        lambda w, h, inner: hg.bilevel.SAMA(w, h, optimizer=inner),
        "sdpa",
    ),
    "SOBA": (
        lambda w, h, inner: hg.bilevel.SOBA(w, h, lr=0.1),
        lambda w, h, inner: hg.bilevel.SOBA(w, h, lr=0.1),
        "eager",
    ),
}


@pytest.mark.parametrize(("name", "accumulate"), [("F2SA", 1), ("F2SA", 2), ("SAMA", 2), ("SOBA", 1)])
def test_weights_are_those_of_a_plain_loop(tmp_path, name, accumulate):
    method, make, attention = METHODS[name]
    recorder, model = Recorder(), gpt2(attention=attention)
    run = trainer(
        tmp_path, model, method=method, restart=4, data_collator=recorder, gradient_accumulation_steps=accumulate
    )
    run.train()
    other = gpt2(attention=attention).train()
    # SOBA's adjoint has a step size of its own, which no schedule of the Trainer's moves.
    schedule = lambda step: 1 - step / 6  # noqa: E731
    if name == "SOBA":

        def make(w, h, inner):
            tracker = hg.bilevel.SOBA(w, h, optimizer=lambda own: Fixed(own, lr=0.1))
            return tracker

        class Fixed(torch.optim.SGD):
            def step(self):
                for group in self.param_groups:
                    group["lr"] = 0.1
                return super().step()

    logits = plain_loop(other, recorder, 6, accumulate, 4, schedule, make)
    assert float(logits.abs().max()) > 0.05
    torch.testing.assert_close(run.hparams.logits.detach(), logits, rtol=1e-9, atol=1e-12)
    assert_same(run.model.parameters(), other.parameters(), rtol=1e-9, atol=1e-12)


def test_groups_of_the_optimizer_are_those_of_the_copies(tmp_path):
    """The Trainer decays matrices and no biases; the copies likewise, at the scheduled step size."""
    run = trainer(tmp_path, weight_decay=0.3, max_steps=2, lr_scheduler_type="constant")
    run.train()
    copies, own = run.tracker.copies[1], run.tracker.optimizer.param_groups
    decay = {id(x): group["weight_decay"] for group in own for x in group["params"]}
    of_model = {id(x): group["weight_decay"] for group in run.optimizer.param_groups for x in group["params"]}
    params = list(run.model.parameters())
    assert [decay[id(x)] for x in copies] == [of_model[id(w)] for w in params] and {*decay.values()} == {0.0, 0.3}


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_a_resumed_training_is_the_same(tmp_path, dropout):
    options = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 3,
        "restart": 4,
        "gradient_accumulation_steps": 2,
    }
    whole = trainer(tmp_path, gpt2(dropout), **options)
    whole.train()
    resumed = trainer(tmp_path, gpt2(dropout), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(resumed.hparams.logits, whole.hparams.logits)
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    assert resumed.tracker.steps == whole.tracker.steps == 7
    (tmp_path / "checkpoint-3" / "bilevel.pt").unlink()
    with pytest.raises(ValueError, match="not a checkpoint of a BilevelTrainer"):
        trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.slow
def test_accumulation_is_one_large_batch(tmp_path):
    small = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    large = trainer(tmp_path, per_device_train_batch_size=8, max_steps=3)
    for each in (small, large):  # all labels count, so that the means of halves are that of the whole
        for row in (*each.train_dataset, *each.valid_dataset):
            row["labels"] = row["input_ids"]
        each.train()
    torch.testing.assert_close(small.hparams.logits, large.hparams.logits, rtol=1e-8, atol=1e-12)
    assert_same(small.model.parameters(), large.model.parameters(), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_bf16(tmp_path):
    full, half = (
        trainer(tmp_path, gpt2(double=False), SourceWeights(SOURCES), bf16=bf16, max_steps=4) for bf16 in (False, True)
    )
    full.train()
    half.train()
    assert half.model.transformer.wte.weight.dtype == torch.float32
    torch.testing.assert_close(half.hparams.logits, full.hparams.logits, rtol=0, atol=0.1)
    assert not torch.equal(half.hparams.logits, full.hparams.logits)


@pytest.mark.slow
def test_scaled_losses(tmp_path):
    """A GradScaler, as fp16 has it: nothing changes but rounding, and an overflow leaves a step out."""
    plain, scaled = trainer(tmp_path), trainer(tmp_path)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for each in (plain, scaled):
        each.train()
    torch.testing.assert_close(scaled.hparams.logits, plain.hparams.logits, rtol=1e-6, atol=1e-9)
    assert_same(scaled.model.parameters(), plain.model.parameters(), rtol=1e-6, atol=1e-9)
    overflow = trainer(tmp_path, max_steps=1)
    overflow.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    overflow.train()
    assert torch.equal(overflow.hparams.logits, torch.zeros(SOURCES).double())


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(gpt2(double=False), config)
    before = {name: x.clone() for name, x in model.named_parameters()}
    run = trainer(tmp_path, model, SourceWeights(SOURCES))
    run.train()
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert moved and all("lora" in name for name in moved)
    assert len(run.tracker.copies[1]) == len([x for x in model.parameters() if x.requires_grad])
    assert float(run.hparams.logits.detach().abs().max()) > 0


@pytest.mark.parametrize("make", [lambda: ExampleWeights(24), lambda: TokenWeights(VOCABULARY)])
def test_other_weights(tmp_path, make):
    hparams = make()
    run = trainer(tmp_path, gpt2(double=False), hparams, logging_steps=1)
    torch.testing.assert_close(hparams.weights, torch.ones_like(hparams.weights))
    run.train()
    seen = (hparams.logits.detach() != 0).sum()
    assert seen > 10 and not any("weight/0" in entry for entry in run.state.log_history if len(hparams.logits) > 20)


@pytest.mark.slow
def test_wrong_examples_lose_weight(tmp_path):
    """One source of random tokens beside two of a sequence that is to be learned."""
    rows = (torch.arange(64)[:, None] + torch.arange(LENGTH)) % VOCABULARY
    random = torch.randint(0, VOCABULARY, rows.shape, generator=torch.Generator().manual_seed(0))
    train = [
        {"input_ids": x, "labels": x, "source": source}
        for source, part in enumerate((rows[:48], random, rows[:48]))
        for x in part
    ]
    valid = [{"input_ids": x, "labels": x} for x in rows[48:]]
    run = trainer(
        tmp_path, gpt2(double=False), SourceWeights(3), max_steps=60, per_device_train_batch_size=8,
        train_dataset=train, eval_dataset=valid, logging_steps=20,
    )  # fmt: skip
    run.valid_dataset = valid
    run.train()
    weights = run.hparams.weights.tolist()
    assert weights[1] < 0.5 and min(weights[0], weights[2]) > 1.0
    logged = [entry for entry in run.state.log_history if "weight/1" in entry]
    assert (
        len(logged) == 3 and logged[-1]["weight/1"] == pytest.approx(weights[1]) and "bilevel/outer_norm" in logged[0]
    )


def test_evaluation_is_without_weights(tmp_path):
    _, valid = data()
    run = trainer(tmp_path, eval_dataset=valid, per_device_eval_batch_size=8)
    run.train()
    run.model.eval()
    with torch.no_grad():
        batches = [transformers.default_data_collator(valid[i : i + 8]) for i in (0,)]
        expected = run.model(**batches[0]).loss
    assert run.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_a_classifier(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, num_labels=3, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(config)
    every = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(data()[0])]
    train = [each | {"index": i} for i, each in enumerate(every)]
    run = trainer(tmp_path, model, ExampleWeights(24), train_dataset=train)
    run.valid_dataset = every
    run.train()
    assert (run.hparams.logits.detach() != 0).sum() > 10


@pytest.mark.slow
def test_hparams_wait_for_their_begin(tmp_path):
    run = trainer(tmp_path, begin=6)
    run.train()
    assert torch.equal(run.hparams.logits, torch.zeros(SOURCES).double())


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match="override token_losses"):
        BilevelTrainer(gpt2(), compute_loss_func=print, valid_dataset=[], hparams=SourceWeights(1))
    with pytest.raises(ValueError, match="restart must be at least 1"):
        trainer(tmp_path, restart=0)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="a batch needs labels"):
        trainer(tmp_path, train_dataset=[{k: v for k, v in row.items() if k != "labels"} for row in data()[0]]).train()
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match="override token_losses"):
        run.token_losses((torch.zeros(2, 3, 4),), torch.zeros(2))


def test_weights_that_stay(tmp_path):
    """A plain loop with the weights that were given."""
    hparams, recorder, model = SourceWeights(SOURCES).double(), Recorder(), gpt2()
    hparams.logits.data = torch.tensor([1.0, 0.0, -1.0]).double()
    trainer(tmp_path, model, hparams, method=None, data_collator=recorder, lr_scheduler_type="constant").train()
    assert torch.equal(hparams.logits.detach(), torch.tensor([1.0, 0.0, -1.0]).double()) and not recorder.valid
    other = gpt2().train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0)
    for batch in recorder.train:
        z, labels = other(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        values = torch.nn.functional.cross_entropy(z.mT, labels, ignore_index=-100, reduction="none")
        weights = 3 * hparams.logits.detach().softmax(0)[batch["source"]]
        ((weights[:, None] * values).sum() / (labels != -100).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model.parameters(), other.parameters(), rtol=1e-9, atol=1e-12)
