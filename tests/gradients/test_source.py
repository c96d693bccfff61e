"""g_1 of every kind of module, in every mode, against one autograd call on the first sample."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_gcfreeze.distributed import World
from tests.gradients.observer import (
    NETWORKS,
    Module,
    Observer,
    S,
    StepLeftOut,
    X,
    Y,
    built,
    mlp,
    of_first_sample,
)


@pytest.mark.parametrize("mode", ["auto", "replay", "capture"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "positions"])
def test_source_gives_the_gradient_on_the_first_sample_in_every_mode(name, mode):
    """At a step that compares and at one that does not, whatever way it is had."""
    module = built(name)
    observer = Observer(module, mode)
    for batch in ((X, Y), (X.flip(0), Y.flip(0)), (X.roll(2, 0), Y.roll(2, 0))):
        assert_close(observer.step(batch), of_first_sample(module, batch), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_that_layer_hooks_see_are_captured_and_others_replayed(name, caplog):
    """The user is told where a pass more is needed, and the log at level DEBUG where not."""
    caplog.set_level("DEBUG", "lightning_gcfreeze")
    observer = Observer(built(name))
    assert_close(observer.step((X, Y)), of_first_sample(observer.module, (X, Y)), rtol=1e-9, atol=1e-11)
    unseen = {f"network.{own}" for own in NETWORKS[name][1]}
    assert observer.captured == observer.parameters.keys() - unseen
    (said,) = observer.told if unseen else caplog.messages
    assert not (caplog.messages if unseen else observer.told)
    assert ("for all parameters" in said) == (not unseen)
    if unseen:
        assert f"{len(observer.captured)} of {len(observer.parameters)}" in said
        assert sorted(unseen)[0] in said or "more" in said


@pytest.mark.parametrize("mode", ["auto", "capture"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_first_sample_of_an_accumulated_step_is_that_of_its_first_micro_batch(mode, scale):
    """Their losses are divided by their number, and multiplied by a loss scale."""
    module = built("perceptron")
    found = Observer(module, mode).step((X[:4], Y[:4]), (X[4:], Y[4:]), (X[:2], Y[:2]), scale=scale)
    assert_close(found, of_first_sample(module, (X, Y)), rtol=1e-9, atol=1e-11)


class Keywords(nn.Module):
    """A layer with an argument by keyword that changes what it does."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        h = torch.ones(1, len(x), 3, dtype=x.dtype)
        return self.head(self.layer(x[..., None], hx=(h, h))[0][:, -1])


@pytest.mark.parametrize("mode", ["auto", "capture"])
def test_layer_called_with_keywords_is_replayed(mode):
    torch.manual_seed(3)
    module = Module(Keywords())
    assert_close(Observer(module, mode).step((X, Y)), of_first_sample(module, (X, Y)), rtol=1e-9, atol=1e-11)


def test_captured_gradient_has_the_dropout_mask_of_the_batch():
    """g_1 is the gradient of the first sample's term in the very pass that the batch took, its mask included."""
    torch.manual_seed(3)
    module = Module(nn.Sequential(nn.Linear(5, 40), nn.Dropout(0.5), nn.Linear(40, 1)))
    observer = Observer(module)
    for t in range(3):
        torch.manual_seed(t)
        loss = F.mse_loss(module.network(X)[:1], Y[:1])
        expected = dict(zip(observer.parameters, torch.autograd.grad(loss, list(module.parameters())), strict=True))
        torch.manual_seed(t)
        assert_close(observer.step((X, Y)), expected, rtol=1e-9, atol=1e-11)
    assert observer.captured == set(observer.parameters)


def test_captured_gradient_has_the_batch_norm_statistics_of_the_batch():
    """The first sample's share of the batch's own gradient: all shares together are that gradient."""
    torch.manual_seed(3)
    module = Module(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)))
    observer = Observer(module)
    shares = [observer.step((X.roll(-i, 0), Y.roll(-i, 0))) for i in range(S)]  # each sample is the first once
    assert observer.captured == set(observer.parameters)
    module.zero_grad()
    module.training_step((X, Y), 0).backward()
    for name, p in observer.parameters.items():
        assert_close(sum(share[name] for share in shares) / S, p.grad, rtol=1e-9, atol=1e-11)
    replayed = Observer(module, "replay").step((X, Y))
    assert not torch.allclose(replayed["network.0.weight"], observer.step((X, Y))["network.0.weight"], rtol=0.01)


def test_capture_under_autocast_is_within_the_precision():
    torch.manual_seed(3)
    module = Module(mlp()).float()
    plain = module.training_step

    def in_bfloat16(batch, batch_idx):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(batch, batch_idx)

    module.training_step = in_bfloat16
    observer = Observer(module)
    batch = (X.float(), Y.float())
    expected = observer.step(batch)
    assert observer.captured == set(observer.parameters)
    found = Observer(module, "replay").step(batch)
    for name in expected:
        assert (found[name] - expected[name]).norm() < 0.05 * expected[name].norm()
        assert found[name].dtype == expected[name].dtype == torch.float32


def test_source_returns_only_the_parameters_asked_for():
    module = built("perceptron")
    asked = {"network.2.bias": module.network[2].bias}
    module.network[0].weight.requires_grad_(False)
    for mode in ("auto", "capture", "replay"):
        found = Observer(module, mode, asked).step((X, Y))
        assert list(found) == ["network.2.bias"]
        assert_close(found, {"network.2.bias": of_first_sample_bias(module)}, rtol=1e-9, atol=1e-11)


def of_first_sample_bias(module):
    loss = module.training_step((X[:1], Y[:1]), 0)
    return torch.autograd.grad(loss, module.network[2].bias)[0]


class Routed(nn.Module):
    """A layer that gets those samples alone whose first feature is positive: often none, or not the first."""

    def __init__(self):
        super().__init__()
        self.expert, self.head = nn.Linear(5, 5), nn.Linear(5, 1)

    def forward(self, x):
        chosen = x[:, 0] > 0
        h = x.clone()
        h[chosen] = self.expert(x[chosen])
        return self.head(h.tanh())


class OneVector(nn.Module):
    """A norm of a learned vector, without an axis for samples, as long as there are samples."""

    def __init__(self):
        super().__init__()
        self.vector, self.norm, self.head = nn.Parameter(torch.randn(S)), nn.LayerNorm(S), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(x) * self.norm(self.vector).square().sum()


class Block(nn.Module):
    """BatchNorm inside a module that has a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.inside, self.norm = nn.Parameter(torch.ones(5)), nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        return (x + self.scale * self.norm(self.inside(x)).tanh()).sum(1, keepdim=True)


class OwnNorm(nn.BatchNorm1d):
    """A subclass."""


@pytest.mark.parametrize("mode", ["auto", "capture"])
def test_layer_that_gets_only_some_samples_is_replayed(mode):
    torch.manual_seed(3)
    module = Module(Routed())
    observer = Observer(module, mode)
    signs = torch.tensor([1.0, 1, -1, 1, -1, 1], dtype=torch.float64)
    left_out = []
    for t, first in enumerate((signs, torch.ones(S), signs, -signs, -torch.ones(S), torch.ones(S), signs.roll(2))):
        batch = (torch.cat([first[:, None] * X[:, :1].abs(), X[:, 1:]], 1).double(), Y)
        try:
            assert_close(observer.step(batch), of_first_sample(module, batch), rtol=1e-9, atol=1e-11)
        except StepLeftOut:
            left_out.append(t)
    # Once all samples went through, and it was captured; when they no longer did, a step was lost, and no other.
    assert left_out == ([2] if mode == "auto" else [])


@pytest.mark.parametrize(
    ("network", "unseen"),
    [
        (OneVector, {"vector", "norm.weight", "norm.bias"}),
        (Block, {"scale"}),
        (lambda: nn.Sequential(nn.Linear(5, 4), OwnNorm(4), nn.Linear(4, 1)), {"1.weight", "1.bias"}),
    ],
    ids=["no axis", "composite", "subclass of a norm"],
)
def test_layers_that_no_rule_covers_are_replayed(network, unseen):
    torch.manual_seed(3)
    module = Module(network())
    observer, expected = Observer(module), Observer(copy.deepcopy(module), "replay")  # each moves its statistics
    for batch in ((X, Y), (X.flip(0), Y.flip(0)), (X.roll(2, 0), Y.roll(2, 0))):
        replayed = expected.step(batch)
        for name, g in observer.step(batch).items():
            if name.removeprefix("network.") in unseen:
                assert_close(g, replayed[name], rtol=1e-9, atol=1e-11)
    assert not observer.captured & {f"network.{own}" for own in unseen}
    assert observer.captured


@pytest.mark.parametrize("mode", ["auto", "capture"])
def test_parameters_frozen_during_training_have_zero_gradients(mode):
    module = built("perceptron")
    observer = Observer(module, mode)
    observer.step((X, Y))
    observer.step((X, Y))
    module.network[0].weight.requires_grad_(False)
    found = observer.step((X, Y))
    assert not found["network.0.weight"].any()
    assert found["network.0.bias"].any()
    module.network[0].bias.requires_grad_(False)
    for g in (found := observer.step((X, Y)))["network.0.weight"], found["network.0.bias"]:
        assert not g.any()
    assert found["network.2.weight"].any()


def test_synchronized_choice_captures_only_what_all_processes_capture():
    """A parameter that one of them has found to differ, or to be reduced otherwise, is replayed by all from then on."""

    class Two(World):
        def all_gather_object(self, value):
            return [value, other]

    observer = Observer(built("perceptron"))
    observer.step((X, Y))
    first, second, third, *rest = observer.parameters
    assert observer.captured == set(observer.parameters)
    choice = observer.source.choice
    other = choice.state_dict() | {
        "captured": choice.captured | {third: "sum"}, "replayed": [second], "missed": True,
    }  # fmt: skip
    del other["captured"][second]
    choice.synchronize(Two(2))
    assert observer.captured == {first, *rest}
    assert choice.replayed == [second]
    assert choice.missed_once
    choice.synchronize(World())
    assert observer.captured == {first, *rest}
    assert_close(observer.step((X, Y)), of_first_sample(observer.module, (X, Y)))
