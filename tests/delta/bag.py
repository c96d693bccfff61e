"""A module with tensors of every kind, masks for it, and a training that moves all that is live."""

import torch
from torch import nn
from torch.nn import Parameter

from lightning_gcfreeze.delta.entries import Entry


class Bag(nn.Module):
    """Parameters of every kind of shape and memory format, a persistent buffer and another one."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def values(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.scalar = Parameter(values())
        self.frozen_scalar = Parameter(values())
        self.empty = Parameter(values(0, 3))
        self.vector = Parameter(values(40))
        self.matrix = Parameter(values(30, 7))
        self.transposed = Parameter(values(9, 8).t())
        self.rows = Parameter(values(20, 3, 2))
        self.kernel = Parameter(values(6, 5, 3, 3).to(memory_format=torch.channels_last))
        self.kernel_rows = Parameter(values(6, 5, 3, 3).to(memory_format=torch.channels_last))
        self.mostly_live = Parameter(values(12, 4))
        self.live = Parameter(values(3, 4))
        self.still = Parameter(values(3, 4))
        self.without_mask = Parameter(values(3))
        self.register_buffer("mean", values(5))
        self.register_buffer("cache", values(5), persistent=False)


def masks():
    """A mask for each parameter of a Bag but one, True = frozen."""
    generator = torch.Generator().manual_seed(1)
    found = {name: torch.rand(p.shape, generator=generator) < 0.8 for name, p in Bag().named_parameters()}
    found["scalar"], found["frozen_scalar"] = torch.tensor(False), torch.tensor(True)
    for name in ("rows", "kernel_rows"):
        found[name] = (torch.arange(len(found[name])) % 5 > 0).view(-1, *[1] * (found[name].dim() - 1))
        found[name] = found[name].expand_as(getattr(Bag(), name))
    found["mostly_live"] = torch.rand(12, 4, generator=generator) < 0.1
    found["live"], found["still"] = torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    return {name: mask for name, mask in found.items() if name != "without_mask"}


def train_(module, frozen):
    """Give every element that is not frozen another value, -0.0 and NaN among them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            new = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            new[torch.rand(tensor.shape, generator=generator) < 0.1] = -0.0
            new[torch.rand(tensor.shape, generator=generator) < 0.1] = torch.nan
            tensor.copy_(torch.where(frozen.get(name, torch.tensor(False)), tensor, new))
    return module


def content(tensor):
    """The bytes of the elements, row by row."""
    return tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


def contents(module):
    return {name: content(tensor) for name, tensor in module.state_dict().items()}


def fail_at_the_third_write(monkeypatch):
    """Let the third entry of a delta that is written from now on fail, once; return the names of those tried."""
    write, calls = Entry.write_, []

    def fail_once(self, tensor):
        calls.append(self.name)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        write(self, tensor)

    monkeypatch.setattr(Entry, "write_", fail_once)
    return calls


def damaged(found, **changes):
    """A copy of a delta with other tensors under some keys; None removes one. "__" stands for ":"."""
    changes = {key.replace("__", ":"): tensor for key, tensor in changes.items()}
    return {key: tensor for key, tensor in (found | changes).items() if tensor is not None}
