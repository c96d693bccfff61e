"""The models that are measured on a GPU, and tiny ones of the same kinds, on which the command is tried."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18, vit_b_16

from benchmarks import observe
from benchmarks.observe import Batch, LanguageModel, convnet, images

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], bool]] = {
    "Adam": (torch.optim.Adam, False),
    "fused Adam": (torch.optim.Adam, True),
    "fused AdamW": (torch.optim.AdamW, True),
}
"""Class, and whether it is fused."""


@dataclass(frozen=True)
class Model:
    """What is trained."""

    description: str
    make: Callable[[], nn.Module]
    data: Callable[[], Batch]
    optimizers: tuple[str, ...] = ("Adam", "fused Adam")
    """The first is that of all parts; the frozen steps have all of them at f = 0.9, and the last at other fractions."""
    is_large: bool = False
    """Trained under bfloat16 autocast; of a batch, only the first sample is observed before the freeze."""

    def optimizer(self) -> Callable[..., torch.optim.Optimizer]:
        kind, fused = OPTIMIZERS[self.optimizers[0]]
        return partial(kind, fused=fused or None)

    def trained_on(self, device: str) -> tuple[nn.Module, Callable[[], Batch]]:
        """The model on a device, and what makes a batch there."""
        torch.manual_seed(0)
        model = Autocast(self.make()) if self.is_large else self.make()

        def batch() -> Batch:
            x, y = self.data()
            return x.to(device), y.to(device)

        return model.to(device).train(), batch

    def n_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in self.make().parameters())


class Autocast(nn.Module):
    """A model under bfloat16 autocast; its loss is in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = self.model(x)
        return out.float()


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vectors(width: int, batch: int) -> Batch:
    return torch.randn(batch, width), torch.randint(10, (batch,))


def text(vocabulary: int, length: int, batch: int) -> Batch:
    return torch.randint(vocabulary, (batch, length)), torch.randint(vocabulary, (batch, length))


def language(description: str, batch: int, optimizers: tuple[str, ...], **shape: Any) -> Model:
    data = partial(text, shape["vocabulary"], shape["length"], batch)
    return Model(description, partial(LanguageModel, **shape), data, optimizers, is_large=True)


ADAMW = ("fused AdamW",)
MODELS: dict[str, Model] = {
    "ViT": Model(
        "ViT-B/16 of torchvision, 224x224, S = 32, bf16 autocast", vit_b_16, partial(images, 224, 32, 1000),
        ADAMW, is_large=True,
    ),
    "GPT2": language(
        "GPT-2 small's shape, head not tied: 12 layers of 768, 12 heads, 1024 tokens of 50257, S = 8, bf16 autocast",
        8, ADAMW, vocabulary=50257, width=768, layers=12, length=1024, heads=12,
    ),
    "M4L": language(
        "transformer, 12 layers of 1024, 512 tokens, S = 16, bf16 autocast",
        16, ("Adam", "fused Adam"), vocabulary=1000, width=1024, layers=12, length=512,
    ),
    **{name: Model(*model) for name, model in observe.MODELS.items()},
    "M2w": Model("MLP 784-4096-4096-10, S = 512", partial(perceptron, 784, 4096, 4096, 10), partial(vectors, 784, 512)),
}  # fmt: skip
DEFAULT = ("ViT", "GPT2", "M4L", "M2")

TINY_LANGUAGE = {"vocabulary": 50, "width": 32, "layers": 2, "length": 16, "heads": 2}
TINY: dict[str, Model] = {
    "ViT": Model(
        "ViT, 2 layers of 32, 32x32 in patches of 16, S = 4, bf16 autocast",
        partial(VisionTransformer, 32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10),
        partial(images, 32, 4), ADAMW, is_large=True,
    ),
    "GPT2": language("transformer, 2 layers of 32, 16 tokens, S = 4, bf16 autocast", 4, ADAMW, **TINY_LANGUAGE),
    "M4L": language(
        "transformer, 2 layers of 32, 16 tokens, S = 4, bf16 autocast", 4, ("Adam", "fused Adam"), **TINY_LANGUAGE
    ),
    "M1": Model("MLP 20-10-10, S = 8", partial(perceptron, 20, 10, 10), partial(vectors, 20, 8)),
    "M2": Model("MLP 20-16-16-10, S = 8", partial(perceptron, 20, 16, 16, 10), partial(vectors, 20, 8)),
    "M2w": Model("MLP 20-32-32-10, S = 8", partial(perceptron, 20, 32, 32, 10), partial(vectors, 20, 8)),
    "M3": Model("convnet, 32x32, S = 2", convnet, partial(images, 32, 2)),
    "M4": Model(
        "transformer, 2 layers of 32, 16 tokens, S = 4",
        partial(LanguageModel, **TINY_LANGUAGE), partial(text, 50, 16, 4),
    ),
    "M5": Model("ResNet-18, 32x32, S = 2", partial(resnet18, num_classes=10), partial(images, 32, 2)),
}  # fmt: skip
