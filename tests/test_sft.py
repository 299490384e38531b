"""hypergrad.transformers under trl's SFTTrainer, by subclassing."""

import pytest
import torch

pytest.importorskip("trl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_by_subclassing(tmp_path):
    """The weights of sources follow those of the plain BilevelTrainer on the same batches."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from hypergrad.transformers import BilevelTrainer, SourceWeights

    class BilevelSFT(BilevelTrainer, SFTTrainer):
        pass

    def collate(rows):
        ids = torch.tensor([row["input_ids"] for row in rows])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        return batch | ({"source": torch.tensor([row["source"] for row in rows])} if "source" in rows[0] else {})

    words = {f"w{i}": i for i in range(28)} | {"<pad>": 28, "<eos>": 29}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 28, (40, 8), generator=draw)
    ids[:20] = torch.arange(8)  # a source that is easy to learn, and the target
    train = Dataset.from_list([{"input_ids": x.tolist(), "source": int(i >= 20)} for i, x in enumerate(ids)])
    valid = [{"input_ids": list(range(8))} for _ in range(8)]

    def trained(kind):
        torch.manual_seed(0)
        size = {"n_embd": 8, "n_positions": 8, "n_layer": 1, "n_head": 2, "vocab_size": 30}
        model = GPT2LMHeadModel(
            GPT2Config(**size, bos_token_id=29, eos_token_id=29, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
        )
        arguments = SFTConfig(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = kind(
            model,
            arguments,
            train_dataset=train,
            valid_dataset=valid,
            hparams=SourceWeights(2),
            data_collator=collate,
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer

    sft, own = trained(BilevelSFT), trained(BilevelTrainer)
    assert isinstance(sft, SFTTrainer) and sft.hparams.weights[0] > 1.05 > 0.95 > sft.hparams.weights[1]
    torch.testing.assert_close(sft.hparams.weights, own.hparams.weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sft.model.lm_head.weight, own.model.lm_head.weight, rtol=1e-3, atol=1e-5)
