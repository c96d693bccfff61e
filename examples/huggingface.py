"""Freeze with `transformers.Trainer`, stop, and resume from a checkpoint: `uv run python -m examples.huggingface`."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lightning_gcfreeze.huggingface import GradCovFreezeTrainerCallback

STEPS, T0, STOP = 30, 10, 20


def texts(count: int = 8 * STEPS) -> list[dict[str, Tensor]]:
    """Return random sequences of 12 token ids, labelled by whether a token below 10 is among the first four."""
    ids = torch.randint(1, 100, (count, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[:4] < 10).any().long()} for row in ids]


def trainer(folder: Path, callback: GradCovFreezeTrainerCallback) -> Trainer:
    """Return a Trainer with a new model, which saves a checkpoint after `STOP` steps."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        weight_decay=0.1,
        save_steps=STOP,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = BertForSequenceClassification(config)
    return Trainer(model, arguments, train_dataset=texts(), callbacks=[callback])


def freezing() -> GradCovFreezeTrainerCallback:
    """Return a callback that keeps embeddings trainable: some tokens may not come up before step `T0`."""
    return GradCovFreezeTrainerCallback(t0=T0, k=0.9, exclude="*embeddings*")


def main() -> None:
    """Train without a break, and resume from the checkpoint; both end with the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        unbroken = trainer(Path(folder), freezing())
        unbroken.train()
        resumed = trainer(Path(folder), callback := freezing())
        resumed.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{STOP}"))
    freezer = callback.freezer
    assert freezer is not None
    assert resumed.model is not None
    assert unbroken.model is not None
    print(f"{freezer.frozen_fraction:.0%} of the eligible elements froze after step {T0}:")
    for name, mask in freezer.frozen.items():
        if name.endswith("weight") and mask.dim() == 2:
            print(f"{int(mask.sum()):6,} of {mask.numel():6,}  {name}")
    pairs = zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    print(f"Resumed after step {STOP}, the weights are {'the same to the bit' if same else 'DIFFERENT'}.")


if __name__ == "__main__":
    main()
