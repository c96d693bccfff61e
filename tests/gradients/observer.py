"""Modules of every kind, what the callback does of an optimizer step, and the gradient on the first sample by hand."""

import contextlib
import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
