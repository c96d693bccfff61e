"""Models of a few thousand parameters, data and arguments for `transformers.Trainer`, all without a download."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lightning_gcfreeze.huggingface import GradCovFreezeTrainerCallback

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
Samples = list[dict[str, Tensor]]


def bert(dropout: float = 0.1) -> nn.Module:
    """A classifier with three classes, which ignores the number of items in a step."""
    torch.manual_seed(0)
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **drops, num_labels=3))


def llama() -> nn.Module:
    """A causal language model without dropout."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **TOKENS))


def gpt2(dropout: float = 0.0) -> nn.Module:
    """A causal language model whose loss the Trainer does not know, so that it counts first labels, too."""
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, **TOKENS, **drops)
    return transformers.GPT2LMHeadModel(config)


def samples(count: int = 14) -> Samples:
    """Sequences of eight tokens with a class."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (count, 8), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(i % 3)}
        for i, row in enumerate(ids)
    ]


def texts(count: int = 14) -> Samples:
    """Sequences of eight tokens to be predicted, of which a varying number is ignored."""
    found = samples(count)
    for i, sample in enumerate(found):
        sample["labels"] = sample["input_ids"].clone()
        sample["labels"][2 : 2 + i % 5] = -100
    return found


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Two samples a batch, one epoch, on the CPU, without output; `options` override."""
    usual = {
        "per_device_train_batch_size": 2, "num_train_epochs": 1, "use_cpu": True, "report_to": [], "seed": 1,
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "learning_rate": 1e-3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**usual, **options})


class Collator:
    """Makes batches, and keeps them."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: Samples) -> dict[str, Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return batch


class Weights(TrainerCallback):
    """Keeps the weights before each optimizer step, and seeds dropout by the step's number."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch.manual_seed(1000 + state.global_step)
        self.before.append({name: p.detach().clone() for name, p in model.named_parameters()})


HARD = {"max_grad_norm": 0.1, "weight_decay": 0.3, "learning_rate": 1e-2, "num_train_epochs": 2}
"""Clipping works, and every element of the matrices would move."""


def train(
    folder: Path, options: dict[str, Any], *others: TrainerCallback, model: nn.Module | None = None, ckpt: Any = None,
    data: Any = None, optimizers: Any = (None, None), **arguments_: Any,
) -> Trainer:  # fmt: skip
    """Train, with the callback as `.freezing`, and the batches as `.data_collator.batches`."""
    freezing = GradCovFreezeTrainerCallback(**options)
    trainer = Trainer(
        model or bert(), arguments(folder, **arguments_), train_dataset=samples() if data is None else data,
        eval_dataset=samples(4), data_collator=Collator(), callbacks=[freezing, *others], optimizers=optimizers,
    )  # fmt: skip
    trainer.freezing = freezing
    trainer.train(resume_from_checkpoint=ckpt)
    return trainer
