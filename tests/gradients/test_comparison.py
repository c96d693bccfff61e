"""Where capture and replay differ, the parameters are replayed; the comparison itself leaves no trace."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.gradients.observer import TOKENS, Module, Observer, X, Y, built, mlp, of_first_sample


class SumLoss(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.network(x), y, reduction="sum")


class Weighted(Module):
    """Cross-entropy with class weights divides by the sum of the weights."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        classes = (y[:, 0] > 0).long()
        output = self.network(x)
        logits = torch.cat([output, -(output**2)], 1)
        return F.cross_entropy(logits, classes, torch.tensor([1.0, 5.0], dtype=torch.float64))


class Auxiliary(Module):
    """A penalty on weights, and one on the spread of the batch's outputs."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.network(x)
        penalty = sum((p**2).sum() for p in self.network[0].parameters())
        return F.mse_loss(output, y) + 0.01 * penalty


class TokenMean(nn.Module):
    """The mean over all tokens but padding, 0."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3).double()
        self.head = nn.Linear(3, 5).double()

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        logits = self.head(self.table(tokens).tanh())
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=0)


@pytest.mark.parametrize(
    ("make", "captured"),
    [
        (lambda: SumLoss(mlp()), {"0.weight", "0.bias", "2.weight", "2.bias"}),
        (lambda: Weighted(mlp()), set()),
        (lambda: Auxiliary(mlp()), {"2.weight", "2.bias"}),
    ],
    ids=["sum", "class weights", "auxiliary"],
)
def test_loss_that_is_no_mean_over_samples_is_replayed_or_scaled_as_a_sum(make, captured):
    torch.manual_seed(3)
    module = make()
    observer = Observer(module)
    for batch in ((X, Y), (X.flip(0), Y.flip(0)), (X.roll(2, 0), Y.roll(2, 0))):
        assert_close(observer.step(batch), of_first_sample(module, batch), rtol=1e-9, atol=1e-11)
    assert observer.captured == {f"network.{own}" for own in captured}
    blind = Observer(module, "capture").step((X, Y))
    assert not torch.allclose(blind["network.0.weight"], of_first_sample(module, (X, Y))["network.0.weight"], rtol=0.1)


def test_mean_over_tokens_is_replayed_once_there_is_padding():
    """The first batch has none, and capture is right; the second has, and it is not."""
    torch.manual_seed(3)
    module = TokenMean()
    observer = Observer(module)
    full = TOKENS[[0, 5]]
    assert_close(observer.step((full,)), of_first_sample(module, (full,)), rtol=1e-9, atol=1e-11)
    assert observer.captured == set(observer.parameters)
    for batch in (TOKENS, TOKENS.flip(0), TOKENS):
        assert_close(observer.step((batch,)), of_first_sample(module, (batch,)), rtol=1e-9, atol=1e-11)
    assert observer.captured == set()
    (said,) = observer.told
    assert "capture and replay differ: table.weight, head.weight, head.bias" in said


def test_comparisons_run_at_attempts_that_are_powers_of_two(monkeypatch):
    observer = Observer(built("perceptron"))
    compared = []
    choice = observer.source.choice
    monkeypatch.setattr(observer.source._comparison, "run", lambda *_: compared.append(choice.n_attempts))
    for _ in range(20):
        observer.step((X, Y))
    assert compared == [1, 2, 4, 8, 16]
    for mode in ("capture", "replay"):
        other = Observer(built("perceptron"), mode)
        assert other.source._comparison is None
        other.step((X, Y))


def test_batch_that_cannot_be_copied_is_replayed_where_the_comparison_needs_it():
    class Stubborn(tuple):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    for network, captures in ((mlp(), True), (with_dropout(), False)):  # only the second needs a pass of its own
        observer = Observer(Module(network))
        batch = Stubborn((X, Y))
        assert_close(observer.step(batch), of_first_sample(observer.module, batch), rtol=1e-9, atol=1e-11)
        assert bool(observer.captured) == captures


def with_dropout():
    """So little that none is dropped."""
    return nn.Sequential(mlp(), nn.Dropout(1e-12))


def test_training_step_that_cannot_run_twice_on_a_batch_is_replayed():
    module = Module(with_dropout())
    expected, plain = of_first_sample(module, (X, Y)), module.training_step

    def once(batch, batch_idx):
        if len(batch[0]) > 1 and getattr(module, "taken", False):
            raise RuntimeError("taken already")
        module.taken = True
        return plain(batch, batch_idx)

    module.training_step = once
    observer = Observer(module)
    assert_close(observer.step((X, Y)), expected, rtol=1e-9, atol=1e-11)
    assert observer.captured == set()
    (said,) = observer.told
    assert "cannot run on the batch again for a comparison with capture (RuntimeError('taken already'))" in said
    assert not any(layer._forward_hooks for layer in module.modules())


def test_no_hooks_are_registered_once_nothing_can_be_captured():
    """Also at the steps that would compare."""
    torch.manual_seed(3)
    module = Weighted(mlp())
    observer, watched = Observer(module), []
    for batch in ((X, Y), (X.flip(0), Y.flip(0)), (X.roll(2, 0), Y.roll(2, 0)), (X, Y)):
        observer.source.begin_batch(batch, 0)
        watched.append(any(layer._forward_hooks for layer in module.modules()))
        module.training_step(batch, 0).backward()
        observer.source.end_backward()
        observer.g_one()
    assert observer.captured == set()
    assert watched == [True, False, False, False]


def test_attention_with_dropout_is_compared_without_dropout():
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True),
        nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True), nn.Flatten(), nn.Linear(20, 1),
    )  # fmt: skip
    observer = Observer(Module(network))
    observer.step((X, Y))
    unseen = {name for name in observer.parameters if "self_attn" in name}
    assert observer.captured == observer.parameters.keys() - unseen


def test_comparison_with_nan_changes_nothing():
    module = built("perceptron")
    observer = Observer(module)
    observer.step((X, Y))
    poisoned = X.clone()
    poisoned[0, 0] = torch.nan
    observer.step((poisoned, Y))
    assert observer.captured == set(observer.parameters)
    assert_close(observer.step((X, Y)), of_first_sample(module, (X, Y)))
