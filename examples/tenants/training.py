"""Fit one tenant by one method, and judge it: the head alone, everything, LoRA, SHiRA, and elements of a shared mask.

All methods take as many steps on the same batches, with Adam and rates that fall linearly to zero: the encoder's is the
method's own, the head's the same for all. LoRA, SHiRA and the mask train equally many parameters of the encoder, to a
part in a hundred.
"""

import gc
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from examples.tenants.data import Split, splits
from examples.tenants.encoder import KINDS, SentenceClassifier, base, be_quiet
from examples.train import ignore_known_warnings
from lightning_gcfreeze import GradCovFreezeCallback, masks

FROZEN = 0.99  # of the encoder's elements
BATCH_SIZE, STEPS = 16, 32
HEAD_RATE = 1e-2
RATES = {"head": 5e-3, "full": 4e-4, "lora": 5e-3, "shira": 5e-3, "ours": 2e-2}
"""Learning rates of the encoder, but of "head" the head's. All were chosen by `examples.tenants.tune`."""
RANK = 6
LAYERS = r"encoder\.layer\.(\d\.attention\.(self|output)|[1-9]\.(intermediate|output))\.(query|key|value|dense)"
"""The linear layers that have adapters: all but the first layer's perceptron, so that the count fits the mask's."""


class Tuned(SentenceClassifier, pl.LightningModule):
    """The base as Lightning trains it. Names are those of a `SentenceClassifier`, which its delta fits."""

    def __init__(self, lr: float, head_lr: float, steps: int) -> None:
        super().__init__(len(KINDS), zero_head=True)
        self.lr, self.head_lr, self.steps = lr, head_lr, steps

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    @override
    def configure_optimizers(self) -> Any:
        groups = [{"params": list(self.head.parameters()), "lr": self.head_lr}]
        if encoder := [p for p in self.encoder.parameters() if p.requires_grad]:
            groups.append({"params": encoder, "lr": self.lr})
        optimizer = torch.optim.Adam(groups, fused=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


@dataclass(frozen=True)
class Fit:
    """A fit that is about to begin."""

    tenant: str
    method: str  # of `METHODS`
    lr: float
    mask: Path  # a file that `write_mask` wrote
    delta: Path | None = None  # where "ours" writes its delta
    steps: int = STEPS
    seed: int = 0

    def module(self) -> Tuned:
        """The base."""
        pl.seed_everything(self.seed, verbose=False)
        return Tuned(self.lr, self.lr if self.method == "head" else HEAD_RATE, self.steps)

    def train(self, module: Tuned, *callbacks: pl.Callback) -> None:
        """Take the steps."""
        train = TensorDataset(*splits(self.tenant)[0])
        order = torch.Generator().manual_seed(self.seed)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=self.steps, max_epochs=-1, callbacks=[*callbacks], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module.train()  # the encoder is loaded for use
        trainer.fit(module, DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=order))


@dataclass(frozen=True)
class Trained:
    """What a method leaves."""

    module: Tuned
    live: int  # elements of the encoder that were free to move; of adapters, theirs
    shipped: int  # bytes that make the tenant's model of the base


@dataclass(frozen=True)
class Result:
    """How a fit ended."""

    tenant: str
    method: str
    lr: float
    accuracy: float  # of the test texts
    live: int
    shipped: int


def run(fit: Fit) -> Result:
    """Fit and judge."""
    trained = METHODS[fit.method](fit)
    found = accuracy(trained.module, splits(fit.tenant)[1])
    result = Result(fit.tenant, fit.method, fit.lr, found, trained.live, trained.shipped)
    del trained
    gc.collect()  # a Trainer and its module refer to each other
    return result


def run_all(fits: Sequence[Fit]) -> list[Result]:
    """Fit and judge one after the other: those of one tenant parse its sources once."""
    return [run(fit) for fit in fits]


def prepare() -> None:
    """Let a process train quietly in one thread."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning_gcfreeze"):
        logging.getLogger(name).setLevel(logging.WARNING)
    be_quiet()
    ignore_known_warnings()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's use of transformers
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")


def write_mask(file: Path) -> None:
    """Write the mask of all tenants: random elements of the encoder, drawn once. What it does not name trains."""
    draw = torch.Generator().manual_seed(0)
    shapes = {f"encoder.{name}": p.shape for name, p in base().encoder.named_parameters()}
    masks.save({name: torch.rand(shape, generator=draw) < FROZEN for name, shape in shapes.items()}, file)


def head(fit: Fit) -> Trained:
    """The head alone trains."""
    module = fit.module()
    module.encoder.requires_grad_(False)
    fit.train(module)
    return Trained(module, 0, _bytes(module.head))


def full(fit: Fit) -> Trained:
    """Everything trains."""
    module = fit.module()
    fit.train(module)
    return Trained(module, _count(module), _bytes(module))


def lora(fit: Fit) -> Trained:
    """LoRA; its product counts twice, as is usual."""
    return _adapted(fit, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LAYERS))


def shira(fit: Fit) -> Trained:
    """SHiRA: as many random elements of each layer as LoRA's matrices have."""
    return _adapted(fit, ShiraConfig(r=RANK, random_seed=fit.seed, target_modules=LAYERS))


def ours(fit: Fit) -> Trained:
    """The live elements of the shared mask train, and make the tenant's delta."""
    module = fit.module()
    freeze = GradCovFreezeCallback(masks=fit.mask)
    fit.train(module, freeze)
    with tempfile.TemporaryDirectory() as folder:
        file = fit.delta or Path(folder) / "delta.safetensors"
        freeze.delta(file)
        live = sum(int((~mask).sum()) for name, mask in freeze.frozen.items() if name.startswith("encoder."))
        return Trained(module, live, file.stat().st_size)


METHODS: dict[str, Callable[[Fit], Trained]] = {method.__name__: method for method in (head, full, lora, shira, ours)}


@torch.no_grad()
def accuracy(model: SentenceClassifier, split: Split) -> float:
    """The share of texts of which the model tells the class."""
    x, y = split
    right = [model(x[i : i + 64]).argmax(-1) == y[i : i + 64] for i in range(0, len(y), 64)]
    return float(torch.cat(right).float().mean())


def _adapted(fit: Fit, config: PeftConfig) -> Trained:
    module = fit.module()
    module.encoder = get_peft_model(module.encoder, config)
    fit.train(module)
    with tempfile.TemporaryDirectory() as folder:
        module.encoder.save_pretrained(folder, save_embedding_layers=False)
        shipped = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return Trained(module, _count(module), shipped + _bytes(module.head))


def _count(module: Tuned) -> int:
    return sum(p.numel() for p in module.encoder.parameters() if p.requires_grad)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())
