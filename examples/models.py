"""The paper's approximating models: y = f(w, x), linear or a multilayer perceptron, with loss, metrics and Adam.

    h(w, x) = W_r σ(... σ(W_1 x)),   w = vec[W_1, ..., W_r]                              (2.2)

The regressors return h and minimise the mean of (y - h)²; the classifiers return logits, and their loss is the mean
cross-entropy (2.3). Shapes: ``x`` is (S, features), float; ``y`` is (S,), float for regression and int64 classes else.
Source: A. Grabovoy, O. Bakhteev, V. Strijov, "Ordering the parameters of approximating models" (2020).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection, R2Score
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy
from typing_extensions import override

Activation = Literal["relu", "tanh", "sigmoid", "gelu"]
Batch = tuple[Tensor, Tensor]  # x, y

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}


def build_layers(widths: Sequence[int], activation: Activation = "relu", bias: bool = True) -> nn.Sequential:
    """The layers of h in (2.2): ``len(widths) - 1`` linear maps, σ between them and none after the last.

    Args:
        widths: Features, the hidden widths, outputs. ``[13, 20, 1]`` is the paper's 13-20-1.
        activation: σ.
        bias: Whether the linear maps have one. The paper's parameter counts want it in the perceptrons only.

    Raises:
        ValueError: `activation` is none of the four.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {sorted(_ACTIVATIONS)}, got {activation!r}.")
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=bias), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class SupervisedModule(pl.LightningModule):
    """What the four models share: one step for training, validation and test, its logging, and Adam.

    Args:
        layers: (S, features) -> (S, outputs).
        loss: (output, y) -> scalar, a mean over samples.
        metrics: Kept separately for each stage, and logged as ``<stage>/<name>`` at the end of its epoch.
        predict: From the output to what `metrics` compare with y.
        lr: Adam's learning rate.
    """

    def __init__(
        self,
        layers: nn.Sequential,
        loss: Callable[[Tensor, Tensor], Tensor],
        metrics: dict[str, Metric],
        predict: Callable[[Tensor], Tensor],
        lr: float,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.lr = lr
        self.loss = loss
        self._predict = predict
        collection = MetricCollection(dict(metrics))
        self.train_metrics = collection.clone(prefix="train/")
        self.val_metrics = collection.clone(prefix="val/")
        self.test_metrics = collection.clone(prefix="test/")

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(S, features) -> (S,) for one output, else (S, outputs)."""
        return self.layers(x).squeeze(-1)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss over the batch; its gradient is g_S in (2.5)."""
        return self._step(batch, "train", self.train_metrics)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and metrics of the validation split."""
        self._step(batch, "val", self.val_metrics)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and metrics of the test split."""
        self._step(batch, "test", self.test_metrics)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in the paper's experiments."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def _step(self, batch: Batch, stage: str, metrics: MetricCollection) -> Tensor:
        x, y = batch
        output = self(x)
        loss = self.loss(output, y)
        metrics.update(self._predict(output.detach()), y)
        self.log(f"{stage}/loss", loss, prog_bar=True, batch_size=len(y))
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(y))
        return loss


class LinearRegression(SupervisedModule):
    """h = wᵀx. Synthetic 3: 200 features without bias, p = 200."""

    def __init__(self, features: int, bias: bool = False, lr: float = 1e-2) -> None:
        super().__init__(build_layers([features, 1], bias=bias), F.mse_loss, _regression_metrics(), _identity, lr)
        self.save_hyperparameters()


class LogisticRegression(SupervisedModule):
    """One logit h = wᵀx for the classes 0 and 1. Synthetic 2: 200 features without bias, p = 200.

    Its loss is the two-class cross-entropy (2.3) with the other logit held at zero, which the paper's p implies.
    """

    def __init__(self, features: int, bias: bool = False, lr: float = 1e-2) -> None:
        layers = build_layers([features, 1], bias=bias)
        # BinaryAccuracy guesses from their range whether it was given logits or probabilities: it gets probabilities.
        super().__init__(layers, _two_class_cross_entropy, {"accuracy": BinaryAccuracy()}, torch.sigmoid, lr)
        self.save_hyperparameters()


class MLPRegressor(SupervisedModule):
    """A perceptron with one output. Boston Housing: 13-20-1, p = 301; Synthetic 1: 200-20-1, p = 4041.

    Args:
        features: n.
        hidden: Widths of the hidden layers, r - 1 of them.
        activation: σ.
        lr: Adam's learning rate.
    """

    def __init__(
        self, features: int, hidden: Sequence[int] = (20,), activation: Activation = "relu", lr: float = 3e-3
    ) -> None:
        layers = build_layers([features, *hidden, 1], activation)
        super().__init__(layers, F.mse_loss, _regression_metrics(), _identity, lr)
        self.save_hyperparameters()


class MLPClassifier(SupervisedModule):
    """A perceptron with a logit a class. MNIST: 784-10-10, p = 7960.

    Args:
        features: n.
        classes: K, at least 2.
        hidden: Widths of the hidden layers, r - 1 of them.
        activation: σ.
        lr: Adam's learning rate.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        hidden: Sequence[int] = (10,),
        activation: Activation = "relu",
        lr: float = 1e-3,
    ) -> None:
        layers = build_layers([features, *hidden, classes], activation)
        # average="micro" is the share of right answers; torchmetrics' default averages over classes instead.
        metrics: dict[str, Metric] = {"accuracy": MulticlassAccuracy(classes, average="micro")}
        super().__init__(layers, F.cross_entropy, metrics, _most_probable, lr)
        self.save_hyperparameters()


def _regression_metrics() -> dict[str, Metric]:
    return {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": R2Score()}


def _two_class_cross_entropy(logit: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit, y.to(logit.dtype))


def _identity(output: Tensor) -> Tensor:
    return output


def _most_probable(logits: Tensor) -> Tensor:
    return logits.argmax(-1)
