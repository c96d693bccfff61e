"""Fit one tenant by one method, and judge it: full fine-tuning, LoRA, SHiRA, and live elements of a shared mask.

All methods take the same steps on the same batches, with Adam and a rate of their own that falls linearly to zero; the
head always trains. LoRA, SHiRA and the mask have as many trainable parameters in the encoder, to a thousandth.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from examples.tenants.data import Split, splits
from examples.tenants.encoder import CLASSES, SentenceClassifier, base
from lightning_gcfreeze import GradCovFreezeCallback, masks

FROZEN = 0.99  # of the encoder's elements
BATCH_SIZE, STEPS = 16, 30
RANK = 6
LAYERS = r"encoder\.layer\.(\d+\.attention\.(self|output)|[1-9]\d*\.(intermediate|output))\.(query|key|value|dense)"
"""The linear layers that get adapters: all but the first layer's perceptron, so that the count fits the mask's."""
RATES = {"head": 3e-2, "full": 4e-4, "lora": 6.4e-3, "shira": 6.4e-3, "ours": 6.4e-3}
"""Of each method, chosen by `examples.tenants.tune`; that of "head", where the encoder stays as it is, too."""


class Tuned(SentenceClassifier, pl.LightningModule):
    """The shared base as Lightning trains it. Names are those of a plain `SentenceClassifier`, which its delta fits."""

    def __init__(self, lr: float, steps: int) -> None:
        super().__init__(CLASSES, zero_head=True)
        self.lr, self.steps = lr, steps

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr, fused=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


@dataclass(frozen=True)
class Result:
    """What a fit leaves."""

    accuracy: float  # of the test docstrings
    trained: int  # parameters that were free to move, without the head's
    shipped: int  # bytes that make the tenant's model of the base


@dataclass(frozen=True)
class Fit:
    """A tenant's fit, about to begin."""

    tenant: str
    mask: Path  # a file that `write_mask` wrote
    lr: float
    steps: int = STEPS
    seed: int = 0

    def module(self) -> Tuned:
        """The base."""
        pl.seed_everything(self.seed, verbose=False)
        return Tuned(self.lr, self.steps)

    def train(self, module: Tuned, callbacks: list[pl.Callback] | None = None) -> None:
        """Take the steps."""
        train = TensorDataset(*splits(self.tenant)[0])
        order = torch.Generator().manual_seed(self.seed)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=self.steps, max_epochs=-1, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=order))

    def result(self, module: Tuned, shipped: int) -> Result:
        """Judge what was trained."""
        trained = sum(p.numel() for p in module.encoder.parameters() if p.requires_grad)
        return Result(accuracy(module, splits(self.tenant)[1]), trained, shipped)


def write_mask(file: Path) -> None:
    """Write the mask of all tenants: random elements of the encoder, drawn once."""
    draw = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in base().named_parameters() if name.startswith("encoder.")}
    masks.save({name: torch.rand(shape, generator=draw) < FROZEN for name, shape in shapes.items()}, file)


def head(fit: Fit) -> Result:
    """The head alone trains."""
    module = fit.module()
    module.encoder.requires_grad_(False)
    fit.train(module)
    return fit.result(module, _bytes(module.head))


def full(fit: Fit) -> Result:
    """Everything trains."""
    module = fit.module()
    fit.train(module)
    return fit.result(module, _bytes(module))


def lora(fit: Fit) -> Result:
    """LoRA, whose product counts twice, as is usual."""
    return _adapted(fit, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS))


def shira(fit: Fit) -> Result:
    """SHiRA: a layer trains as many random elements as LoRA's matrices have."""
    return _adapted(fit, ShiraConfig(r=RANK, random_seed=fit.seed, target_modules=LAYERS))


def ours(fit: Fit, delta: Path | None = None) -> Result:
    """The live elements of the shared mask train; the delta is written to a file if there is one."""
    module = fit.module()
    freeze = GradCovFreezeCallback(masks=fit.mask)
    fit.train(module, [freeze])
    with tempfile.TemporaryDirectory() as folder:
        file = delta or Path(folder) / "delta.safetensors"
        freeze.delta(file)
        live = sum(int((~mask).sum()) for mask in freeze.frozen.values())
        return Result(accuracy(module, splits(fit.tenant)[1]), live, file.stat().st_size)


METHODS: dict[str, Callable[[Fit], Result]] = {method.__name__: method for method in (head, full, lora, shira, ours)}


@torch.no_grad()
def accuracy(model: SentenceClassifier, split: Split) -> float:
    """The share of docstrings whose class the model tells."""
    x, y = split
    right = [model(x[i : i + 64]).argmax(-1) == y[i : i + 64] for i in range(0, len(y), 64)]
    return float(torch.cat(right).float().mean())


def _adapted(fit: Fit, config: PeftConfig) -> Result:
    module = fit.module()
    module.encoder = get_peft_model(module.encoder, config)
    fit.train(module)
    with tempfile.TemporaryDirectory() as folder:
        module.encoder.save_pretrained(folder, save_embedding_layers=False)
        shipped = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return fit.result(module, shipped + _bytes(module.head))


def _bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())
