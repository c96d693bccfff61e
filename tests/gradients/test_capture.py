"""What capture keeps of a pass, for how long, and the squared noise that it adds up, against loops over samples."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_gcfreeze.estimators.per_sample import Summed
from lightning_gcfreeze.gradients import capture
from tests.gradients.observer import (
    Module,
    Observer,
    S,
    X,
    Y,
    built,
    of_first_sample,
)


def squared_noise(module, batch, g_batch):
    """Σ_j (g_j - g_S)², one autograd call a sample."""
    sums = {name: torch.zeros_like(g) for name, g in g_batch.items()}
    for j in range(len(batch[0])):
        for name, g in of_first_sample(module, [part[j:] for part in batch]).items():
            sums[name] += (g - g_batch[name]) ** 2
    return sums


def gradient(module, batch):
    twin = copy.deepcopy(module)
    twin.zero_grad()
    twin.training_step(batch, 0).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}


@pytest.mark.parametrize("little", [0, 2**19])
@pytest.mark.parametrize("mode", ["auto", "capture", "replay"])
@pytest.mark.parametrize("name", ["perceptron", "convolution", "LSTM", "called twice", "in place", "attention"])
def test_squared_noise_of_all_samples_equals_a_loop(name, mode, little, monkeypatch):
    """At steps that compare and at one that does not, where large layers are done with in the backward pass."""
    monkeypatch.setattr(capture, "MAX_KEPT_NUMEL", little)
    module = built(name)
    observer = Observer(module, mode, n_samples=None, keep_each=False)
    for _ in range(3):
        found = observer.all_of_step((X, Y))
        g_batch = gradient(module, (X, Y))
        expected = squared_noise(module, (X, Y), g_batch)
        for own, g in found.items():
            out = torch.zeros_like(g_batch[own])
            g.add_squared_noise_(out, g_batch[own], S / g.count)
            assert_close(out, expected[own], rtol=1e-8, atol=1e-11)
    in_pass = [own for own, g in found.items() if isinstance(g, Summed) and g.finiteness_probe() is None]
    assert bool(in_pass) == (little == 0 and mode != "replay")
    assert not observer.source._capture or not observer.source._capture._calls


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_noise_summed_in_backward_is_around_the_mean_of_its_micro_batch(scale, monkeypatch):
    """Of S = 4 of 10 samples, on the scale of noise around the mean of all 10."""
    monkeypatch.setattr(capture, "MAX_KEPT_NUMEL", 0)
    module = built("convolution")
    observer = Observer(module, "auto", n_samples=None, keep_each=False)
    batches = (X[:4], Y[:4]), (X[4:], Y[4:]), (X[:4], Y[:4])
    for _ in range(3):
        found = observer.all_of_step(*batches, scale=scale)
    g_batch = gradient(module, batches[0])
    expected = squared_noise(module, batches[0], g_batch)
    of_window = {name: p.grad / scale for name, p in module.named_parameters()}
    own = "network.1.weight"
    assert isinstance(found[own], Summed)
    out = torch.zeros_like(g_batch[own])
    found[own].add_squared_noise_(out, of_window[own], 1.0)
    assert_close(out, expected[own] * (1 - 1 / 10) / (1 - 1 / 4), rtol=1e-8, atol=1e-11)
    assert found[own].finiteness_probe() is None


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("name", ["LSTM", "GRU, time first", "perceptron"])
def test_noise_under_accumulation_is_around_the_mean_of_all_micro_batches(name, count, scale):
    """Of layers without a rule, run once more on each sample, and of small ones."""
    module = built(name)
    observer = Observer(module, "auto", n_samples=count, keep_each=False)
    batches = (X[:4], Y[:4]), (X[4:], Y[4:])
    for _ in range(3):
        found = observer.all_of_step(*batches, scale=scale)
    g_batch = {n: p.grad / scale for n, p in module.named_parameters()}
    m = count or 4
    for own, g in found.items():
        out, expected = torch.zeros_like(g_batch[own]), torch.zeros_like(g_batch[own])
        g.add_squared_noise_(out, g_batch[own], 1.0)
        for j in range(m):
            expected += (of_first_sample(module, (X[j:], Y[j:]))[own] - g_batch[own]) ** 2
        assert g.count == m
        assert_close(out, expected, rtol=1e-8, atol=1e-11)


def test_buffers_are_reused_in_each_step_and_freed_by_close():
    observer = Observer(built("convolution"), "capture", n_samples=2)
    kept = []
    for _ in range(3):
        observer.step((X, Y))
        kept.append({key: tensor.data_ptr() for key, tensor in observer.source._capture._buffers.items()})
    assert len(kept[0]) == 4
    assert kept[0] == kept[1] == kept[2]
    observer.source.close()
    assert not observer.source._capture._buffers


def test_hooks_exist_only_during_the_pass():
    """Some layers run otherwise where there are hooks: validation, and what follows a broken step, find none."""
    module = built("attention")
    observer = Observer(module)

    def hooked():
        return any(layer._forward_hooks for layer in module.modules())

    assert not hooked()
    observer.source.begin_batch((X, Y), 0)
    assert hooked()
    observer.source.reset()
    assert not hooked()
    observer.source.begin_batch((X, Y), 0)
    module.training_step((X, Y), 0).backward()
    observer.source.end_backward()
    assert not hooked()
    observer.g_one()
    assert not hooked()
    assert not observer.source._capture._calls


def test_capture_keeps_only_the_first_sample_of_activations():
    module = built("convolution")
    observer = Observer(module, "capture")
    observer.source.begin_batch((X, Y), 0)
    module.training_step((X, Y), 0).backward()
    seen = observer.source._capture._calls
    kept = [tensor for layer in seen.values() for tensor in (layer.x, *layer.deltas)]
    assert len(kept) == 4
    assert all(tensor.shape[0] == 1 for tensor in kept)
    assert all(tensor.untyped_storage().nbytes() == 8 * math.prod(tensor.shape) for tensor in kept)  # no views


class Prompt(nn.Module):
    """A layer that returns its parameter."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(S, 5))

    def forward(self, x):
        return self.prompt


def test_parameter_that_a_layer_returns_gets_no_hook():
    observer = Observer(Module(nn.Sequential(Prompt(), nn.Linear(5, 1))), "capture")
    observer.source.begin_batch((X, Y), 0)
    observer.module.training_step((X, Y), 0).backward()
    observer.source.end_backward()
    assert set(observer.source._capture.first_shares()) == {"network.1.weight", "network.1.bias"}
    assert not any(p._backward_hooks for p in observer.module.parameters())


def test_gradients_taken_by_the_training_step_itself_are_ignored():
    module = built("perceptron")
    plain = module.training_step

    def curious(batch, batch_idx):
        loss = plain(batch, batch_idx)
        torch.autograd.grad(loss, module.network[0].weight, retain_graph=True)
        return loss

    expected = of_first_sample(module, (X, Y))
    module.training_step = curious
    observer = Observer(module)
    for _ in range(3):
        observer.module.zero_grad()
        observer.source.begin_batch((X, Y), 0)
        loss = module.training_step((X, Y), 0)
        observer.source.begin_backward()
        loss.backward()
        observer.source.end_backward()
        assert_close(observer.g_one(), expected, rtol=1e-9, atol=1e-11)
    assert observer.captured == set(observer.parameters)


def test_copy_of_a_module_made_during_the_pass_is_not_captured():
    module = built("perceptron")
    observer = Observer(module)
    observer.source.begin_batch((X, Y), 0)
    twin = copy.deepcopy(module.network)
    module.training_step((X, Y), 0).backward()
    twin(X).sum().backward()
    observer.source.end_backward()
    assert_close(observer.g_one(), of_first_sample(module, (X, Y)))
    assert observer.captured == set(observer.parameters)


@pytest.mark.parametrize("layer", [lambda: nn.ConvTranspose1d(1, 2, 3), lambda: nn.Conv1d(1, 2, 3, padding="same")])
def test_layers_without_a_rule_are_rerun_under_autocast(layer):
    torch.manual_seed(3)
    module = Module(nn.Sequential(nn.Linear(5, 5), nn.Unflatten(1, (1, 5)), layer(), nn.Flatten(), nn.LazyLinear(1)))
    module.network.double()(X)
    module = module.float()
    plain = module.training_step

    def in_bfloat16(batch, batch_idx):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(batch, batch_idx)

    module.training_step = in_bfloat16
    observer, batch = Observer(module), (X.float(), Y.float())
    observer.step(batch)
    assert observer.captured == set(observer.parameters)
    replayed = Observer(module, "replay").step(batch)
    for name, g in observer.step(batch).items():
        assert (g - replayed[name]).norm() < 0.1 * replayed[name].norm()


def test_captured_parameters_need_no_second_pass(monkeypatch):
    observer = Observer(built("perceptron"))
    observer.step((X, Y))
    observer.step((X, Y))
    passes = []
    observer.module.network.register_forward_hook(lambda *_: passes.append(1))
    expected = of_first_sample(observer.module, (X, Y))
    passes.clear()
    assert_close(observer.step((X, Y)), expected, rtol=1e-9, atol=1e-11)
    assert len(passes) == 1
    Observer(observer.module, "replay").step((X, Y))
    assert len(passes) == 3
