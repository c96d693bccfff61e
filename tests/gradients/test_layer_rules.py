"""Every layer rule against one autograd call per sample, in float64: no rule and no hook is used by the oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from lightning_gcfreeze.estimators.per_sample import Stacked
from lightning_gcfreeze.gradients import layer_rules

S = 4


class Scaled(nn.Module):
    """A leaf with bare parameters, one of which does not take part."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift, self.unused = (nn.Parameter(torch.randn(5)) for _ in range(3))

    def forward(self, x):
        return torch.tanh(x * self.scale) + self.shift


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


def floats(*shape):
    return torch.randn(S, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5


def tokens(*shape):
    """No two samples are equal."""
    return (3 * torch.arange(S * math.prod(shape)) % 7).reshape(S, *shape)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), floats(5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), floats(5)),
    "linear on sequences": (lambda: nn.Linear(5, 3), floats(6, 5)),
    "linear on images": (lambda: nn.Linear(5, 3), floats(2, 3, 5)),
    "subclass of linear": (lambda: Doubled(5, 3), floats(5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), floats(4, 9)),
    "conv1d, stride, padding, dilation, groups": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        floats(4, 9),
    ),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(0, 1)), floats(3, 6, 7)),
    "conv2d, depthwise, without bias": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), floats(4, 5, 5)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), floats(3, 5, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), floats(3, 5, 5)),
    "conv2d, channels last": (
        lambda: nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last),
        floats(3, 6, 7).to(memory_format=torch.channels_last),
    ),
    "conv2d on few positions": (lambda: nn.Conv2d(3, 4, 3, padding=1), floats(3, 2, 2)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, dilation=2), floats(2, 4, 4, 4)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), floats(3, 4, 4)),
    "embedding": (lambda: nn.Embedding(7, 3), tokens(6)),
    "embedding of one token": (lambda: nn.Embedding(7, 3), tokens()),
    "embedding with padding": (lambda: nn.Embedding(7, 3, padding_idx=2), tokens(9)),
    "layer norm": (lambda: nn.LayerNorm(5), floats(5)),
    "layer norm on sequences": (lambda: nn.LayerNorm(5), floats(6, 5)),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 5)), floats(2, 3, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), floats(6, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 6), floats(6, 4, 4)),
    "group norm without axes": (lambda: nn.GroupNorm(3, 6), floats(6)),
    "batch norm in eval mode": (lambda: nn.BatchNorm1d(5).eval(), floats(5)),
    "batch norm on images in eval mode": (lambda: nn.BatchNorm2d(3).eval(), floats(3, 4, 4)),
    "bare parameters": (Scaled, floats(6, 5)),
    "PReLU": (nn.PReLU, floats(5)),
    "LSTM": (lambda: nn.LSTM(5, 3, num_layers=2, batch_first=True, bidirectional=True), floats(6, 5)),
    "GRU": (lambda: nn.GRU(5, 3, batch_first=True), floats(6, 5)),
    "RNN": (lambda: nn.RNN(5, 3, batch_first=True, bias=False), floats(6, 5)),
}


def built(make):
    torch.manual_seed(3)
    layer = make().double()
    for name, tensor in layer.named_parameters():  # norms begin at 1 and 0, where mistakes hide
        nn.init.uniform_(tensor, 0.5, 1.5) if "weight" in name else nn.init.normal_(tensor)
    for name, tensor in layer.named_buffers():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if "var" in name else nn.init.normal_(tensor)
    return layer


def losses(output):
    """One for each sample, nowhere linear; of all the outputs of a recurrent layer."""
    if isinstance(output, tuple):
        first, states = output
        return losses(first) + sum(losses(2 * state.transpose(0, 1)) for state in layer_rules.tensors(states))
    return (output.flatten(1) ** 2).sum(1) + output.flatten(1).sin().sum(1)


def of_samples(layer, x, count):
    """What the rule makes of the first samples' inputs and output gradients, in the batch's own pass: `PerSample`s."""
    outputs, deltas = layer_rules.tensors(output := layer(x)), {}
    for i, y in enumerate(outputs):
        y.register_hook(
            lambda d, i=i: deltas.update({i: d.narrow(layer_rules.sample_axis(layer, i), 0, count).clone()})
        )
    prepare = layer_rules.preparation(layer, x, outputs[0])
    losses(output).mean().backward()
    rule, deltas = layer_rules.for_layer(layer), [deltas[i] for i in range(len(outputs))]
    if rule is not layer_rules.rerun:
        return rule(layer, prepare(x[:count]), *deltas)
    axes = [layer_rules.sample_axis(layer, i) for i in range(len(outputs))]
    singles = [
        rule(layer, x[j : j + 1], *(d.narrow(a, j, 1) for d, a in zip(deltas, axes, strict=True))) for j in range(count)
    ]
    return {own: Stacked(torch.cat([g[own].dense() for g in singles])) for own in singles[0]}


def captured(layer, x, count=1):
    """The gradients of the first samples, (count, *shape): S times their shares of the batch's."""
    found = of_samples(layer, x, count)
    return {name: len(x) * found[name].dense() for name, _ in layer.named_parameters()}


def alone(layer, x):
    """The gradient of the loss on one sample."""
    own = dict(layer.named_parameters())
    found = torch.autograd.grad(losses(layer(x)).sum(), list(own.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(own.items(), found, strict=True)}


@pytest.mark.parametrize("count", [1, 3, S])
@pytest.mark.parametrize("name", LAYERS)
def test_rule_gives_the_gradient_on_each_sample(name, count):
    make, x = LAYERS[name]
    layer = built(make)
    found = captured(layer, x, count)
    for j in range(count):
        assert_close({own: g[j] for own, g in found.items()}, alone(layer, x[j : j + 1]), rtol=1e-10, atol=1e-12)
    other = alone(layer, x[1:2])
    assert not any(torch.allclose(g[0], other[own]) for own, g in found.items() if own != "unused")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("count", "centred"), [(1, False), (3, False), (S, False), (S, True)])
@pytest.mark.parametrize("name", LAYERS)
def test_squared_noise_of_a_rule_equals_a_loop(name, count, centred, dtype):
    """Σ_j (g_j - g_S)², times a weight, on top of what there is; if g_S is not the samples' mean, by that mean too."""
    make, x = LAYERS[name]
    layer = built(make)
    singles = [alone(layer, x[j : j + 1]) for j in range(S)]
    layer, x = layer.to(dtype), x.to(dtype) if x.is_floating_point() else x
    found = of_samples(layer, x, count)
    for own, _ in layer.named_parameters():
        g = found[own]
        g.scale_(S)
        g_batch = sum(single[own] for single in singles) / S + (0.0 if centred else 0.3)
        before = torch.rand(g_batch.shape, dtype=torch.float64)
        expected = before + 0.7 * sum((single[own] - g_batch) ** 2 for single in singles[:count])
        assert g.count == count
        out = before.to(dtype)
        g.add_squared_noise_(out, g_batch.to(dtype), 0.7, centred)
        tolerance = 1e-11 if dtype == torch.float64 else 1e-4
        assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 4), (3, 2, 2, 2)], ids=str)
def test_batch_norm_in_train_mode_gives_the_share_of_each_sample(shape):
    """Every sample with a weight and a bias of its own: by which the loss changes through this sample's activations."""
    x = floats(*shape)
    layer = built(lambda: {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)](3))
    weight, bias = (p.detach().expand(S, 3).clone().requires_grad_() for p in (layer.weight, layer.bias))
    view = (S, 3, *[1] * (len(shape) - 1))
    normalised = nn.functional.batch_norm(x, None, None, training=True)
    losses(weight.view(view) * normalised + bias.view(view)).mean().backward()
    assert_close(captured(layer, x, S), {"weight": S * weight.grad, "bias": S * bias.grad}, rtol=1e-10, atol=1e-12)


def test_batch_norm_statistics_are_recomputed_if_the_graph_has_none():
    """The same, computed from the batch."""
    x = floats(3, 4)
    layer = built(lambda: nn.BatchNorm1d(3))
    output = layer(x)
    assert_close(layer_rules.preparation(layer, x, output)(x), layer_rules.preparation(layer, x, output.clone())(x))


@given(
    groups=st.integers(1, 3),
    inside=st.integers(1, 3),
    outside=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)
def test_convolution_of_any_geometry(groups, inside, outside, kernel, stride, padding, dilation, bias):
    torch.manual_seed(0)
    x = floats(groups * inside, 7, 6)
    layer = nn.Conv2d(groups * inside, groups * outside, kernel, stride, padding, dilation, groups, bias).double()
    for own, g in captured(layer, x, S).items():
        for j in range(S):
            assert_close(g[j], alone(layer, x[j : j + 1])[own], rtol=1e-9, atol=1e-11)


@given(axes=st.lists(st.integers(1, 4), max_size=3), inside=st.integers(1, 5), outside=st.integers(1, 5))
def test_linear_map_on_any_number_of_axes(axes, inside, outside):
    torch.manual_seed(0)
    x, layer = floats(*axes, inside), nn.Linear(inside, outside).double()
    for own, g in captured(layer, x, S).items():
        for j in range(S):
            assert_close(g[j], alone(layer, x[j : j + 1])[own], rtol=1e-9, atol=1e-11)


def test_half_precision_output_gradient_with_a_wider_input():
    """As under autocast: the input may be wider than the output's gradient."""
    torch.manual_seed(0)
    layer, x, delta = nn.Linear(5, 3), torch.randn(1, 2, 5), torch.randn(1, 2, 3).bfloat16()
    found = layer_rules.for_layer(layer)(layer, x, delta)["weight"].dense()[0]
    assert_close(found, delta[0].float().T @ x[0])
