"""g_1 of every kind of module and loss, by whichever way it is had, against one autograd call on the first sample."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.estimators.per_sample import Summed
from lightning_gcfreeze.gradients import capture
from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.gradients.choice import SourceChoice
from lightning_gcfreeze.gradients.source import SampleGradients

S = 6
X = torch.randn(S, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.5
Y = X.sum(1, keepdim=True).sin()
TOKENS = torch.tensor([[1, 2, 3, 4], [2, 1, 4, 0], [3, 3, 0, 0], [4, 0, 0, 0], [1, 3, 2, 0], [2, 2, 2, 2]])


class Module(nn.Module):
    """A network with a training step; subclasses have losses of their own."""

    def __init__(self, network):
        super().__init__()
        self.network = network.double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.network(x), y)


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, 1)

    def forward(self, x):
        x = x[..., None].expand(-1, -1, 3)
        output, _ = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        return self.head(output[:, -1] if self.layer.batch_first else output[-1])


class Twice(nn.Module):
    """One layer is called twice, another by a keyword, and a third not at all."""

    def __init__(self):
        super().__init__()
        self.twice, self.keyword, self.idle, self.once = (nn.Linear(5, 5) for _ in range(4))
        self.head = nn.Linear(5, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.once(self.keyword(input=self.twice(self.twice(x).tanh())))))


class Tied(nn.Module):
    """Two layers with one matrix, and a matrix that is used past its layer."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.functional, self.head = (nn.Linear(5, 5) for _ in range(4))
        self.other.weight = self.one.weight

    def forward(self, x):
        return F.linear(self.head(self.other(self.one(x).tanh())), self.functional.weight).sum(1, keepdim=True)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(1, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.block(self.up(x[..., None]))).mean(1)


class InPlace(nn.Module):
    """What a layer returns is changed in place, and what the next got too."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.norm = nn.Linear(5, 5), nn.Linear(5, 1), nn.GroupNorm(1, 5)

    def forward(self, x):
        h = F.relu_(self.one(x))
        return self.other(self.norm(h * 1.0).add_(1.0).mul_(2.0))


class WeightUses(nn.Module):
    """A table without an axis for samples."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 1), nn.Linear(5, 1)

    def forward(self, x):
        return self.head(x * self.table(torch.arange(5)).squeeze(1))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(checkpoint(lambda x: self.inside(x).tanh(), x, use_reentrant=False))


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.head = torch.compile(nn.Linear(5, 4), backend="eager"), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.inside(x).tanh())


class Vmapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(torch.vmap(self.inside)(x).tanh())


def convnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(20, 1)
    )


NETWORKS = {  # -> the parameters that capture cannot see
    "perceptron": (mlp, []),
    "convolution": (convnet, []),
    "LSTM": (lambda: Recurrent(nn.LSTM(3, 2, batch_first=True)), []),
    "GRU, time first": (lambda: Recurrent(nn.GRU(3, 2, num_layers=2)), []),
    "called twice": (
        Twice,
        ["twice.weight", "twice.bias", "keyword.weight", "keyword.bias", "idle.weight", "idle.bias"],
    ),
    "tied": (Tied, ["one.weight", "functional.weight", "functional.bias"]),
    "attention": (
        Attention,
        [f"block.self_attn.{own}" for own in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")],
    ),
    "in place": (InPlace, []),
    "positions": (WeightUses, ["table.weight"]),
    "checkpointed": (Checkpointed, ["inside.weight", "inside.bias"]),
    "compiled": (Compiled, ["inside._orig_mod.weight", "inside._orig_mod.bias"]),
    "vmapped": (Vmapped, ["inside.weight", "inside.bias"]),
}


class StepLeftOut(Exception):
    """The single samples' gradients cannot be had."""


class Observer:
    """What the callback does of an optimizer step, with the Trainer left out."""

    def __init__(self, module, mode="auto", parameters=None, n_samples=1, keep_each=True):
        self.module, self.told = module, []
        self.parameters = dict(module.named_parameters()) if parameters is None else parameters
        self.source = SampleGradients(
            mode, module, self.parameters, module.training_step, contextlib.nullcontext, self.told.append,
            SourceChoice.initial(mode, self.parameters), n_samples, keep_each,
        )  # fmt: skip

    def step(self, *batches, scale=1.0):
        """g_1 of an optimizer step over micro-batches."""
        found = self.all_of_step(*batches, scale=scale)
        return {name: g.dense()[0].to(self.parameters[name].dtype) for name, g in found.items()}

    def all_of_step(self, *batches, scale=1.0):
        """`PerSample`s by name."""
        self.batches = batches
        for i, batch in enumerate(batches):
            self.source.begin_batch(batch, i)
            loss = self.module.training_step(batch, i) * (scale / len(batches))
            if i == 0:
                self.module.zero_grad()  # between forward and backward, as Lightning does
            self.source.begin_backward()
            loss.backward()
            self.source.end_backward()
        return self.taken(scale).by_name

    def taken(self, scale=1.0):
        """What there is at the end of an optimizer step, of a loss that was scaled."""
        size = sum(len(batch[0]) for batch in self.batches)
        g_batch = batch_gradients(self.parameters, scale)
        found = self.source.gradients(scale / len(self.batches), g_batch, size)
        if found is None:
            raise StepLeftOut
        return found

    def g_one(self):
        """g_1 at the end of an optimizer step of one batch."""
        self.batches = ((X, Y),)
        return {name: g.dense()[0] for name, g in self.taken().by_name.items()}

    @property
    def captured(self):
        return set(self.source.choice.captured)


def of_first_sample(module, batch):
    """By hand, on a copy."""
    twin = copy.deepcopy(module)
    loss = twin.training_step([tensor[:1] for tensor in batch], 0)
    found = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(twin.named_parameters(), found, strict=True)
    }


def built(name, kind=Module):
    torch.manual_seed(3)
    return kind(NETWORKS[name][0]())


@pytest.mark.parametrize("mode", ["auto", "replay", "capture"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "positions"])
def test_g_1_is_the_gradient_on_the_first_sample(name, mode):
    """At a step that compares and at one that does not, whatever way it is had."""
    module = built(name)
    observer = Observer(module, mode)
    for batch in ((X, Y), (X.flip(0), Y.flip(0)), (X.roll(2, 0), Y.roll(2, 0))):
        assert_close(observer.step(batch), of_first_sample(module, batch), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_capture_can_see_is_captured_and_the_rest_replayed(name):
    observer = Observer(built(name))
    assert_close(observer.step((X, Y)), of_first_sample(observer.module, (X, Y)), rtol=1e-9, atol=1e-11)
    unseen = {f"network.{own}" for own in NETWORKS[name][1]}
    assert observer.captured == observer.parameters.keys() - unseen
    (said,) = observer.told
    assert ("for all parameters" in said) == (not unseen)
    if unseen:
        assert f"{len(observer.captured)} of {len(observer.parameters)}" in said
        assert sorted(unseen)[0] in said or "more" in said


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
def test_a_loss_that_is_no_mean_over_samples_is_noticed(make, captured):
    torch.manual_seed(3)
    module = make()
    observer = Observer(module)
    for batch in ((X, Y), (X.flip(0), Y.flip(0)), (X.roll(2, 0), Y.roll(2, 0))):
        assert_close(observer.step(batch), of_first_sample(module, batch), rtol=1e-9, atol=1e-11)
    assert observer.captured == {f"network.{own}" for own in captured}
    blind = Observer(module, "capture").step((X, Y))
    assert not torch.allclose(blind["network.0.weight"], of_first_sample(module, (X, Y))["network.0.weight"], rtol=0.1)


def test_a_mean_over_tokens_is_replayed_as_soon_as_there_is_padding():
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
    assert len(observer.told) == 2
    assert "capture and replay differ: table.weight, head.weight, head.bias" in observer.told[1]


def test_comparisons_are_made_at_the_powers_of_two(monkeypatch):
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


def test_what_is_captured_needs_no_second_pass(monkeypatch):
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


@pytest.mark.parametrize("mode", ["auto", "capture"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_first_sample_is_that_of_the_first_of_several_batches(mode, scale):
    """Their losses are divided by their number, and multiplied by a loss scale."""
    module = built("perceptron")
    found = Observer(module, mode).step((X[:4], Y[:4]), (X[4:], Y[4:]), (X[:2], Y[:2]), scale=scale)
    assert_close(found, of_first_sample(module, (X, Y)), rtol=1e-9, atol=1e-11)


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
def test_the_squared_noise_of_all_samples_is_that_of_a_loop(name, mode, little, monkeypatch):
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
def test_noise_summed_in_the_pass_is_around_the_mean_of_its_micro_batch(scale, monkeypatch):
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
def test_noise_under_accumulation_is_around_the_mean_of_all(name, count, scale):
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


class Keywords(nn.Module):
    """A layer with an argument by keyword that changes what it does."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        h = torch.ones(1, len(x), 3, dtype=x.dtype)
        return self.head(self.layer(x[..., None], hx=(h, h))[0][:, -1])


@pytest.mark.parametrize("mode", ["auto", "capture"])
def test_a_layer_with_keywords_is_replayed(mode):
    torch.manual_seed(3)
    module = Module(Keywords())
    assert_close(Observer(module, mode).step((X, Y)), of_first_sample(module, (X, Y)), rtol=1e-9, atol=1e-11)


def test_memory_is_the_same_in_each_step_and_let_go_of_at_the_end():
    observer = Observer(built("convolution"), "capture", n_samples=2)
    kept = []
    for _ in range(3):
        observer.step((X, Y))
        kept.append({key: tensor.data_ptr() for key, tensor in observer.source._capture._buffers.items()})
    assert len(kept[0]) == 4
    assert kept[0] == kept[1] == kept[2]
    observer.source.close()
    assert not observer.source._capture._buffers


def test_dropout_is_the_batchs_own():
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


def test_batch_norm_takes_part_with_the_statistics_of_the_batch():
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


def test_under_autocast_capture_is_as_near_as_the_precision_allows():
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


def test_only_what_is_asked_for_is_found():
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


def test_hooks_are_there_for_the_pass_alone():
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


def test_where_nothing_can_be_captured_nothing_is_watched():
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


def test_a_batch_that_cannot_be_copied_is_replayed():
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


def test_a_step_that_cannot_be_taken_twice_is_replayed():
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


def test_only_the_first_sample_of_an_activation_is_kept():
    module = built("convolution")
    observer = Observer(module, "capture")
    observer.source.begin_batch((X, Y), 0)
    module.training_step((X, Y), 0).backward()
    seen = observer.source._capture._calls
    kept = [tensor for layer in seen.values() for tensor in (layer.x, *layer.deltas)]
    assert len(kept) == 4
    assert all(tensor.shape[0] == 1 for tensor in kept)
    assert all(tensor.untyped_storage().nbytes() == 8 * math.prod(tensor.shape) for tensor in kept)  # no views


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


class Prompt(nn.Module):
    """A layer that returns its parameter."""

    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(S, 5))

    def forward(self, x):
        return self.prompt


@pytest.mark.parametrize("mode", ["auto", "capture"])
def test_a_layer_for_some_of_the_samples_is_replayed(mode):
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
def test_what_no_rule_can_know_is_replayed(network, unseen):
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


def test_a_parameter_that_a_layer_returns_gets_no_hook():
    observer = Observer(Module(nn.Sequential(Prompt(), nn.Linear(5, 1))), "capture")
    observer.source.begin_batch((X, Y), 0)
    observer.module.training_step((X, Y), 0).backward()
    observer.source.end_backward()
    assert {name for name, *_ in observer.source._capture.first_shares()} == {"network.1.weight", "network.1.bias"}
    assert not any(p._backward_hooks for p in observer.module.parameters())


@pytest.mark.parametrize("mode", ["auto", "capture"])
def test_parameters_frozen_in_mid_training_have_no_gradient(mode):
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


def test_gradients_that_the_training_step_takes_itself_do_not_count():
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


def test_a_copy_made_in_the_pass_keeps_no_watch():
    module = built("perceptron")
    observer = Observer(module)
    observer.source.begin_batch((X, Y), 0)
    twin = copy.deepcopy(module.network)
    module.training_step((X, Y), 0).backward()
    twin(X).sum().backward()
    observer.source.end_backward()
    assert_close(observer.g_one(), of_first_sample(module, (X, Y)))
    assert observer.captured == set(observer.parameters)


def test_attention_with_dropout_is_compared_without():
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True),
        nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True), nn.Flatten(), nn.Linear(20, 1),
    )  # fmt: skip
    observer = Observer(Module(network))
    observer.step((X, Y))
    unseen = {name for name in observer.parameters if "self_attn" in name}
    assert observer.captured == observer.parameters.keys() - unseen


def test_a_comparison_with_nan_decides_nothing():
    module = built("perceptron")
    observer = Observer(module)
    observer.step((X, Y))
    poisoned = X.clone()
    poisoned[0, 0] = torch.nan
    observer.step((poisoned, Y))
    assert observer.captured == set(observer.parameters)
    assert_close(observer.step((X, Y)), of_first_sample(module, (X, Y)))


def test_processes_that_share_capture_what_all_of_them_do():
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


@pytest.mark.parametrize("layer", [lambda: nn.ConvTranspose1d(1, 2, 3), lambda: nn.Conv1d(1, 2, 3, padding="same")])
def test_layers_without_a_rule_are_run_again_under_autocast(layer):
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
