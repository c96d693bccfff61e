"""Eleven small trainings: data that ships with Python packages, a LightningModule, and settings that train it well.

t0 is about a quarter of the steps, at a point from which the unfrozen run still gains clearly.
"""

import ast
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    make_classification,
    make_friedman1,
    make_friedman2,
    make_friedman3,
)
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from examples.data import MNIST, ArrayDataModule, BostonHousing, Stage, Synthetic, three_way
from examples.models import (
    LinearRegression,
    LogisticRegression,
    MLPClassifier,
    MLPRegressor,
    SupervisedModule,
    build_layers,
)
from examples.tenants.encoder import SentenceClassifier, minilm

Splits = dict[Stage, TensorDataset]

CONTEXT = 32  # characters
PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "turtle", "unittest", "urllib",
            "xml")  # fmt: skip
JOINED = {"http": "urllib", "xmlrpc": "xml"}  # small ones, counted as these
DOCSTRINGS = 160  # of each package
TOKENS = 24
FEW = ("progress", "recent_mean", "momentum", "movement", "variance_first", "second_moment", "magnitude", "random",
       "last_layers", "gradient", "grft", "oracle_move")  # fmt: skip
"""The orders that dearer tasks compare at rates of their own."""
FEWEST = ("movement", "progress", "momentum", "variance_first", "random", "last_layers")


@dataclass(frozen=True)
class Task:
    """A model, its data, and how they are trained."""

    title: str
    make: Callable[[float], SupervisedModule]  # of the learning rate
    data: Callable[[int], Splits]  # of the seed
    batch_size: int
    lr: float
    steps: int  # optimizer steps in all
    t0: int  # of these before the freeze
    metric: str  # of `METRICS`, on the test split
    fractions: tuple[float, ...] = (0.5, 0.8, 0.95)
    orders: tuple[str, ...] = ()  # if not all
    seeds: int = 5  # at most
    together: bool = False  # whether members train at once, batched by vmap; else one by one
    rate_orders: tuple[str, ...] = ()  # where every order has a rate of its own, if not all
    judged: int = 2000  # training samples over which a loss is taken, at most

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "accuracy"

    def model(self) -> SupervisedModule:
        """With weights from torch's global stream, and an Adam of the task's learning rate."""
        return self.make(self.lr)


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """The share of right answers; `output` holds a logit a class, or one alone for the classes 0 and 1."""
    predicted = output.argmax(-1) if output.dim() > y.dim() else (output > 0).to(y.dtype)
    return (predicted == y).float().mean()


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {"accuracy": accuracy, "mse": F.mse_loss, "loss": None}
"""(output, y) -> mean over samples; None: the loss itself."""


class Block(nn.Module):
    """A layer of a transformer that looks back only, normalised before attention and perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        """(S, T, width) -> (S, T, width)."""
        q, k, v = self.qkv(self.before_attention(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=h.device).triu(1)
        mixed = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
        h = h + self.join(mixed.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.before_perceptron(h))))


class LanguageModel(nn.Module):
    """A transformer over characters: (S, T) int64 -> (S, T, characters), logits of each next one."""

    def __init__(self, characters: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h)))  # type: ignore[no-any-return]


class PatchClassifier(nn.Module):
    """A transformer over the 2x2 patches of 8x8 pixels in a row: (S, 64) -> (S, classes)."""

    def __init__(self, classes: int, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.patch, self.position = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.block, self.norm, self.head = Block(width, heads), nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        h = self.block(self.patch(patches) + self.position)
        return self.head(self.norm(h[:, -1]))  # type: ignore[no-any-return]


def convnet() -> nn.Sequential:
    """Two convolutions and a linear layer, for 8x8 pixels in a row: 6,218 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 24), nn.ReLU(),
        nn.Linear(24, 10),
    )  # fmt: skip


def normalised() -> nn.Sequential:
    """Two hidden layers, each with a layer norm, for 64 pixels."""
    return nn.Sequential(
        nn.Linear(64, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 48), nn.LayerNorm(48), nn.GELU(),
        nn.Linear(48, 10),
    )  # fmt: skip


def classifier(layers: nn.Sequential, lr: float, classes: int) -> SupervisedModule:
    """Cross-entropy over the last axis, whatever the axes before it."""
    return SupervisedModule(
        layers, _cross_entropy, {"accuracy": MulticlassAccuracy(classes, average="micro")}, _most_probable, lr
    )


def autoencoder(lr: float) -> SupervisedModule:
    """Twelve numbers in the middle of a perceptron; y is x."""
    layers = build_layers([64, 12, 64])
    return SupervisedModule(layers, F.mse_loss, {"mse": MeanSquaredError()}, nn.Identity(), lr)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def _most_probable(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _of(module: ArrayDataModule) -> Splits:
    module.setup()
    return module.dataset


def _split(x: np.ndarray, y: np.ndarray, seed: int, scale_x: bool, stratify: bool) -> Splits:
    """Split; standardise x, and a y that is not a class, by the training rows."""
    parts = three_way(x, y, seed, stratify=stratify)
    scalers = [
        StandardScaler().fit(_rows(part)) if scaled else None
        for part, scaled in zip(parts["train"], (scale_x, y.dtype.kind == "f"), strict=True)
    ]
    return {
        stage: TensorDataset(
            *(
                torch.as_tensor(part if s is None else s.transform(_rows(part)).reshape(part.shape)).to(
                    torch.float32 if part.dtype.kind == "f" else torch.int64
                )
                for part, s in zip(of_stage, scalers, strict=True)
            )
        )
        for stage, of_stage in parts.items()
    }


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _digits(seed: int) -> Splits:
    x, y = load_digits(return_X_y=True)
    return _split(x / 16, y, seed, scale_x=False, stratify=True)


def _reconstruct_digits(seed: int) -> Splits:
    return {stage: TensorDataset(of.tensors[0], of.tensors[0]) for stage, of in _digits(seed).items()}


def _friedman(seed: int) -> Splits:
    return _split(*make_friedman1(3000, noise=1.0, random_state=0), seed, scale_x=True, stratify=False)


def _clusters(seed: int) -> Splits:
    x, y = make_classification(3000, 40, n_informative=15, n_classes=5, n_clusters_per_class=3, random_state=1)
    return _split(x, y, seed, scale_x=True, stratify=True)


def _diabetes(seed: int) -> Splits:
    return _split(*load_diabetes(return_X_y=True), seed, scale_x=True, stratify=False)


def _cancer(seed: int) -> Splits:
    return _split(*load_breast_cancer(return_X_y=True), seed, scale_x=True, stratify=True)


@cache
def _characters() -> tuple[str, np.ndarray]:
    """The alphabet, and Python's help texts in numbers of its letters."""
    text = "".join(topics[name] for name in sorted(topics))
    alphabet = "".join(sorted(set(text)))
    number = {letter: i for i, letter in enumerate(alphabet)}
    return alphabet, np.array([number[letter] for letter in text])


def _text(seed: int) -> Splits:
    """Pieces that follow one another without overlap; y is x, one character on."""
    _, numbers = _characters()
    count = (len(numbers) - 1) // CONTEXT
    x, y = (numbers[i : i + count * CONTEXT].reshape(count, CONTEXT) for i in (0, 1))
    return _split(x, y, seed, scale_x=False, stratify=False)


def docstrings() -> Iterator[tuple[str, str]]:
    """(package, docstring) of the modules, classes and functions of `PACKAGES`, read from the sources."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(file for package in (*PACKAGES, *JOINED) for file in _sources(root, package)):
        package = file.relative_to(root).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 20:
                    yield JOINED.get(package, package), text


def _sources(root: Path, package: str) -> list[Path]:
    found = [*(root / package).rglob("*.py"), root / f"{package}.py"]
    return [file for file in found if file.is_file() and not {"test", "tests"} & set(file.relative_to(root).parts)]


@cache
def _sentences() -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of docstrings, 0 where there is none, and their packages' numbers; equally many of each."""
    from transformers import AutoTokenizer

    by_package: dict[str, list[str]] = {package: [] for package in PACKAGES}
    for text, package in {text: package for package, text in docstrings()}.items():
        by_package[package].append(text)
    draw = np.random.default_rng(0)
    chosen = [text for texts in by_package.values() for text in draw.choice(texts, DOCSTRINGS, replace=False)]
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokens = tokenizer(chosen, max_length=TOKENS, truncation=True, padding="max_length")["input_ids"]
    return np.array(tokens), np.repeat(np.arange(len(PACKAGES)), DOCSTRINGS)


def _packages(seed: int) -> Splits:
    return _split(*_sentences(), seed, scale_x=False, stratify=True)


TASKS: dict[str, Task] = {
    "boston": Task(
        "Boston Housing, MLP 13-20-1",
        lambda lr: MLPRegressor(13, lr=lr),
        lambda seed: _of(BostonHousing(seed=seed)),
        batch_size=32, lr=3e-3, steps=600, t0=150, metric="mse", together=True,
    ),
    "mnist": Task(
        "5,000 digits of MNIST, MLP 784-10-10",
        lambda lr: MLPClassifier(784, 10, lr=lr),
        lambda seed: _of(MNIST(seed=seed)),
        batch_size=64, lr=3e-3, steps=600, t0=150, metric="accuracy", together=True,
    ),
    "synthetic1": Task(
        "Synthetic 1, MLP 200-20-1",
        lambda lr: MLPRegressor(200, lr=lr),
        lambda seed: _of(Synthetic("regression", seed=seed, w_seed=0)),
        batch_size=32, lr=3e-3, steps=600, t0=150, metric="mse", together=True,
    ),
    "synthetic2": Task(
        "Synthetic 2, logistic regression",
        lambda lr: LogisticRegression(200, lr=lr),
        lambda seed: _of(Synthetic("classification", seed=seed, w_seed=0)),
        batch_size=32, lr=1e-2, steps=400, t0=100, metric="accuracy", together=True,
    ),
    "synthetic3": Task(
        "Synthetic 3, linear regression",
        lambda lr: LinearRegression(200, lr=lr),
        lambda seed: _of(Synthetic("regression", seed=seed, w_seed=0)),
        batch_size=32, lr=2e-2, steps=600, t0=150, metric="mse", together=True,
    ),
    "digits": Task(
        "8x8 digits, MLP 64-32-10",
        lambda lr: MLPClassifier(64, 10, (32,), lr=lr),
        _digits,
        batch_size=32, lr=3e-3, steps=400, t0=100, metric="accuracy", together=True,
    ),
    "diabetes": Task(
        "Diabetes, MLP 10-20-1",
        lambda lr: MLPRegressor(10, lr=lr),
        _diabetes,
        batch_size=32, lr=3e-3, steps=400, t0=100, metric="mse", together=True,
    ),
    "cancer": Task(
        "Breast cancer, MLP 30-16-2",
        lambda lr: MLPClassifier(30, 2, (16,), lr=lr),
        _cancer,
        batch_size=32, lr=3e-3, steps=160, t0=40, metric="accuracy", together=True,
    ),
    "conv": Task(
        "8x8 digits, two convolutions",
        lambda lr: classifier(convnet(), lr, 10),
        _digits,
        batch_size=32, lr=3e-3, steps=300, t0=75, metric="accuracy", rate_orders=FEW,
    ),
    "text": Task(
        "Characters of Python's help, transformer of two layers",
        lambda lr: classifier(nn.Sequential(LanguageModel(len(_characters()[0]))), lr, len(_characters()[0])),
        _text,
        batch_size=16, lr=3e-3, steps=400, t0=100, metric="loss", seeds=3,
        rate_orders=FEW,
    ),
    "minilm": Task(
        "Docstrings by package, all-MiniLM-L6-v2",
        lambda lr: classifier(nn.Sequential(SentenceClassifier(len(PACKAGES))), lr, len(PACKAGES)),
        _packages,
        batch_size=16, lr=1e-4, steps=90, t0=30, metric="accuracy", seeds=3, fractions=(0.8, 0.95), judged=256,
        orders=("progress", "variance_first", "variance_all", "random", "magnitude", "second_moment", "snr",
                "displacement", "recent", "decrease_recent", "fisher_cost", "prefix", "lora", "shira"),
    ),
}  # fmt: skip

RATE_TASKS: dict[str, Task] = {
    **{name: task for name, task in TASKS.items() if name != "minilm"},
    "friedman": Task(
        "Friedman's function of ten features, MLP 10-32-1",
        lambda lr: MLPRegressor(10, (32,), lr=lr),
        _friedman,
        batch_size=32, lr=3e-3, steps=600, t0=150, metric="mse",
    ),
    "autoencoder": Task(
        "8x8 digits from 12 numbers, MLP 64-12-64",
        autoencoder,
        _reconstruct_digits,
        batch_size=32, lr=3e-3, steps=500, t0=125, metric="mse",
    ),
    "patches": Task(
        "8x8 digits, transformer of one layer over patches",
        lambda lr: classifier(nn.Sequential(PatchClassifier(10)), lr, 10),
        _digits,
        batch_size=32, lr=3e-3, steps=300, t0=75, metric="accuracy", rate_orders=FEW,
    ),
}  # fmt: skip
"""Those in which every method has a rate of its own."""

FRESH_TASKS: dict[str, Task] = {
    "clusters": Task(
        "Fifteen clusters of five classes, MLP 40-48-5",
        lambda lr: MLPClassifier(40, 5, (48,), lr=lr),
        _clusters,
        batch_size=32, lr=3e-3, steps=450, t0=112, metric="accuracy", rate_orders=FEWEST,
    ),
    "friedman2": Task(
        "Friedman's second function, sigmoid MLP 4-32-1",
        lambda lr: MLPRegressor(4, (32,), "sigmoid", lr=lr),
        lambda seed: _split(*make_friedman2(2000, noise=1.0, random_state=0), seed, scale_x=True, stratify=False),
        batch_size=32, lr=3e-3, steps=600, t0=150, metric="mse", rate_orders=FEWEST,
    ),
    "friedman3": Task(
        "Friedman's third function, tanh MLP 4-24-24-1",
        lambda lr: MLPRegressor(4, (24, 24), "tanh", lr=lr),
        lambda seed: _split(*make_friedman3(2000, noise=0.05, random_state=0), seed, scale_x=True, stratify=False),
        batch_size=32, lr=3e-3, steps=600, t0=150, metric="mse", rate_orders=FEWEST,
    ),
    "deep": Task(
        "8x8 digits, GELU MLP 64-40-40-40-10",
        lambda lr: MLPClassifier(64, 10, (40, 40, 40), "gelu", lr=lr),
        _digits,
        batch_size=32, lr=3e-3, steps=450, t0=112, metric="accuracy", rate_orders=FEWEST,
    ),
    "norms": Task(
        "8x8 digits, MLP 64-48-48-10 with layer norms",
        lambda lr: classifier(normalised(), lr, 10),
        _digits,
        batch_size=32, lr=3e-3, steps=300, t0=75, metric="accuracy", rate_orders=FEWEST,
    ),
}  # fmt: skip
"""Tasks that no choice of the package was made by."""
