"""The models against the paper's parameter counts, NumPy's forward pass and scikit-learn's losses and metrics."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn import metrics
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from examples.models import LinearRegression, LogisticRegression, MLPClassifier, MLPRegressor, build_layers

PAPER = [  # table 1
    pytest.param(lambda: MLPRegressor(13, hidden=[20]), 301, id="Boston Housing"),
    pytest.param(lambda: MLPClassifier(784, 10, hidden=[10]), 7960, id="MNIST"),
    pytest.param(lambda: LinearRegression(200), 200, id="Synthetic 3"),
    pytest.param(lambda: LogisticRegression(200), 200, id="Synthetic 2"),
    pytest.param(lambda: MLPRegressor(200, hidden=[20]), 4041, id="Synthetic 1"),
]
SIGMA = {
    "relu": lambda h: np.maximum(h, 0),
    "tanh": np.tanh,
    "sigmoid": lambda h: 1 / (1 + np.exp(-h)),
    "gelu": lambda h: h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2,
}


@pytest.mark.parametrize(("model", "p"), PAPER)
def test_parameter_counts_are_the_papers(model, p):
    assert sum(w.numel() for w in model().parameters()) == p


@pytest.mark.parametrize("activation", SIGMA)
def test_layers_are_linear_maps_with_the_activation_between_them(activation):
    layers = build_layers([5, 4, 3, 2], activation)
    assert len(layers) == 5
    x = torch.randn(7, 5)
    h = x.numpy()
    for i in (0, 2, 4):
        h = h @ layers[i].weight.detach().numpy().T + layers[i].bias.detach().numpy()
        h = SIGMA[activation](h) if i < 4 else h
    assert_close(layers(x), torch.as_tensor(h, dtype=torch.float32))


def test_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of \['gelu', 'relu', 'sigmoid', 'tanh'\], got 'selu'"):
        MLPRegressor(3, activation="selu")


@pytest.mark.parametrize(("model", "p"), PAPER)
def test_hyperparameters_rebuild_the_model(model, p):
    model = model()
    rebuilt = type(model)(**model.hparams)
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.hparams == model.hparams
    assert rebuilt.hparams["lr"] == rebuilt.configure_optimizers().param_groups[0]["lr"]


def _fed(model, x, y):
    """`model` after a test over batches of 8, the last one shorter: what it logged, and its output in NumPy."""
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    (logged,) = trainer.test(model, DataLoader(TensorDataset(x, y), batch_size=8), verbose=False)
    with torch.no_grad():
        return logged, model(x).numpy()


@pytest.mark.parametrize(
    "model",
    [lambda: LinearRegression(5), lambda: LinearRegression(5, bias=True), lambda: MLPRegressor(5, [4])],
    ids=["linear", "linear with bias", "MLP"],
)
def test_regression_loss_and_metrics_are_scikit_learns(model):
    x, y = torch.randn(21, 5), torch.randn(21)
    logged, output = _fed(model(), x, y)
    assert output.shape == (21,)
    expected = {
        "test/loss": metrics.mean_squared_error(y, output),
        "test/mse": metrics.mean_squared_error(y, output),
        "test/mae": metrics.mean_absolute_error(y, output),
        "test/r2": metrics.r2_score(y, output),
    }
    assert logged == pytest.approx(expected, rel=1e-5)


def test_multiclass_loss_and_accuracy_are_scikit_learns():
    x, y = torch.randn(21, 5), torch.randint(3, (21,))
    logged, logits = _fed(MLPClassifier(5, 3, [4]), x, y)
    assert logits.shape == (21, 3)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = {
        "test/loss": metrics.log_loss(y, probabilities, labels=[0, 1, 2]),
        "test/accuracy": metrics.accuracy_score(y, logits.argmax(1)),
    }
    assert logged == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("x", [torch.rand(21, 5) / 10, torch.randn(21, 5)], ids=["logits in [0, 0.5]", "both signs"])
def test_two_class_loss_and_accuracy_are_scikit_learns(x):
    """Logits that could be probabilities too: torchmetrics must not take them for such."""
    y = torch.arange(21) % 2
    model = LogisticRegression(5)
    torch.nn.init.ones_(model.layers[0].weight)
    logged, logit = _fed(model, x, y)
    expected = {
        "test/loss": metrics.log_loss(y, 1 / (1 + np.exp(-logit.astype(float)))),
        "test/accuracy": metrics.accuracy_score(y, logit > 0),
    }
    assert logged == pytest.approx(expected, rel=1e-5)
    softmax = np.exp(np.stack([np.zeros_like(logit), logit], axis=1))  # the paper's loss (2.3), the first logit zero
    softmax /= softmax.sum(1, keepdims=True)
    assert logged["test/loss"] == pytest.approx(-np.log(softmax[np.arange(21), y]).mean(), rel=1e-5)
