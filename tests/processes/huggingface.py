"""`transformers.Trainer` on two ranks, with labels of varying number, against one process on the batches of both."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from lightning_gcfreeze.huggingface import GradCovFreezeTrainerCallback
from tests import cases
from tests.huggingface.tiny import Collator, Weights, arguments, bert, gpt2, llama, samples, texts
from tests.witnesses import Spy


def train(folder: Path, model: nn.Module, data: Any, options: dict[str, Any], ckpt: Any = None, **more: Any) -> Trainer:
    """Two micro-batches of two samples a step on each rank; the last step of an epoch has one."""
    freezing, weights = GradCovFreezeTrainerCallback(**options), Weights()
    trainer = Trainer(
        model, arguments(folder, gradient_accumulation_steps=2, num_train_epochs=2, learning_rate=1e-2, **more),
        train_dataset=data, data_collator=Collator(), callbacks=[freezing, weights],
    )  # fmt: skip
    trainer.freezing, trainer.weights = freezing, weights
    trainer.train(resume_from_checkpoint=ckpt)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return trainer


def check_second_moment(folder: Path, make: Any, is_text: bool) -> None:
    """E[g²] is that of the mean over all targets of both ranks; the gradient is clipped afterwards."""
    spy, rows = Spy(), texts(12) if is_text else samples(12)
    trainer = train(folder, make(), rows, {"t0": 3, "k": 0.5, "order": spy}, max_grad_norm=1e-3)
    ours = trainer.data_collator.batches
    both: list[Any] = [None, None]
    dist.all_gather_object(both, ours)
    assert sum(len(batches) for batches in both) == 12
    model, squares = make(), dict[str, Tensor]()
    for before, window in zip(trainer.weights.before, (slice(0, 2), slice(2, 3), slice(3, 5)), strict=False):
        model.load_state_dict(before, strict=False)
        model.zero_grad()
        batches = [batch for each in both for batch in each[window]]
        all_in_one = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        model(**all_in_one).loss.backward()
        for name, p in model.named_parameters():
            squares[name] = squares.get(name, 0.0) + p.grad.square() / 3
    for name, found in spy.second_moment.items():
        torch.testing.assert_close(found, squares[name], rtol=1e-3, atol=1e-8, msg=name)


def check_freeze(folder: Path, options: dict[str, Any]) -> None:
    """Both ranks freeze the same elements, whose bits stay, and go on from a checkpoint as if nothing had happened."""
    unbroken = train(folder, bert(), samples(12), options, save_strategy="steps", save_steps=1)
    freezer, before = unbroken.freezing.freezer, unbroken.weights.before[2]
    moved = 0
    for name, mask in freezer.frozen.items():
        p = unbroken.model.get_parameter(name).detach()
        assert torch.equal(p[mask], before[name][mask])
        moved += int((p != before[name]).sum())
        for tensor in (p, mask.to(torch.uint8)):
            gathered = [torch.empty_like(tensor), torch.empty_like(tensor)]
            dist.all_gather(gathered, tensor.contiguous())
            assert torch.equal(*gathered), name
    assert moved
    for stop in (1, 3):
        checkpoint = folder / f"checkpoint-{stop}"
        resumed = train(folder, bert(), samples(12), options, ckpt=str(checkpoint))
        cases.assert_identical(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))
        cases.assert_identical(resumed.freezing.freezer.frozen, freezer.frozen)


def main(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sequences of a few tokens do not show all of the vocabulary
        for make, is_text in ((gpt2, True), (llama, True), (lambda: bert(0.0), False)):
            check_second_moment(folder / "moments", make, is_text)
        check_freeze(folder / "elements", {"t0": 2, "k": 0.7})
        check_freeze(folder / "tensors", {"t0": 2, "k": 0.7, "granularity": "tensor", "order": "progress"})
