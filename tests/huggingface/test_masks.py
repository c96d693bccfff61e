"""Given masks in `transformers.Trainer`: new tokens alone, the adapter of a PEFT model, against `Freezer` by hand."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_gcfreeze import Freezer, masks
from tests import cases
from tests.huggingface.tiny import HARD, bert, llama, texts, train


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_only_new_tokens_of_a_language_model_train(tmp_path):
    """After `resize_token_embeddings`, whose new rows are the last."""
    model = llama()
    model.resize_token_embeddings(53)
    start, embedding = weights(model), "model.embed_tokens.weight"
    new = masks.rows(embedding, range(50, 53)) | masks.rows("lm_head.weight", range(50, 53))
    data = texts()
    for i, sample in enumerate(data):
        sample["input_ids"][i % 8] = 50 + i % 3
    trainer = train(tmp_path, {"masks": masks.everything() - new}, model=model, data=data, **HARD)
    assert trainer.freezing.freezer.steps == trainer.state.global_step > 8
    for name, now in weights(model).items():
        if name in (embedding, "lm_head.weight"):
            assert torch.equal(now[:50], start[name][:50])
            assert (now[50:] != start[name][50:]).any(1).all()
        else:
            assert torch.equal(now, start[name]), name


def test_run_with_a_file_of_masks_is_resumed_to_the_bit(tmp_path):
    """From a checkpoint of the Trainer; the state of the optimizer is that of live elements."""
    first = train(tmp_path / "first", {"t0": 3, "k": 0.7, "order": "magnitude"}, **HARD)
    first.freezing.freezer.save_masks(tmp_path / "masks.pt")
    given = {"masks": tmp_path / "masks.pt"}
    unbroken = train(tmp_path / "a", given, save_strategy="steps", save_steps=5, **HARD)
    resumed = train(tmp_path / "a", given, ckpt=str(tmp_path / "a" / "checkpoint-5"), **HARD)
    cases.assert_identical(weights(resumed.model), weights(unbroken.model))
    cases.assert_identical(resumed.freezing.freezer.frozen, first.freezing.freezer.frozen)
    start, moved = weights(bert()), 0
    for name, mask in masks.load(tmp_path / "masks.pt").items():
        now = weights(unbroken.model)[name]
        assert torch.equal(now[mask], start[name][mask])
        moved += int((now != start[name]).sum())
    assert moved


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_masks_of_a_peft_model_are_of_its_adapter():
    """The base model does not train, and needs no masks; a name of it is refused."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config)
    start = weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    freezer = Freezer(model, optimizer, masks=masks.pattern("*lora_A*"))

    def step(batch: dict[str, Any]) -> None:
        freezer.begin_batch(batch)
        freezer.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    for sample in texts(6):
        step({name: value[None] for name, value in sample.items()})
    freezer.close()
    assert 0.3 < freezer.frozen_fraction < 0.7
    for name, now in weights(model).items():
        assert torch.equal(now, start[name]) == ("lora_B" not in name), name
    base = next(name for name in start if "lora" not in name)
    refused = Freezer(model, optimizer, masks={base: True})
    with pytest.raises(ValueError, match="which is not eligible: it requires no gradient"):
        refused.begin_batch({})
