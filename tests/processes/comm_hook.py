"""DDP gradients on two gloo processes, started by torchrun, against the mean of each rank's own, computed by hand."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_gcfreeze.distributed.comm_hook import LiveAllReduce


class Network(nn.Module):
    """A channels-last convolution, linear layers of two dtypes, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
        self.wide, self.narrow = nn.Linear(96, 5), nn.Linear(5, 2).double()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(self.convolution(x).flatten(1)).tanh().double())


class Words(nn.Module):
    """A parameter with sparse gradients next to dense ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x)).tanh()


def mean_gradients(ddp: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the mean over both ranks of their gradients, summed over batches."""
    module = ddp.module
    assert isinstance(module, nn.Module)
    names, parameters = zip(*module.named_parameters(), strict=True)
    loss = sum((module(x).square().mean() for x in batches), torch.zeros(()))
    own = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {}
    for name, p, gradient in zip(names, parameters, own, strict=True):
        mean = torch.zeros_like(p) if gradient is None else gradient.to_dense().clone()
        dist.all_reduce(mean)
        found[name] = mean / 2
    return found


def check(
    ddp: DistributedDataParallel,
    all_reduce: LiveAllReduce,
    batches: list[Tensor],
    masks: dict[str, Tensor],
    compressed: bool,
) -> None:
    """Check one step of several backward passes, of which DDP averages the last."""
    ddp.zero_grad()
    all_reduce.begin_step()
    expected = mean_gradients(ddp, batches)
    with ddp.no_sync():
        for x in batches[:-1]:
            ddp(x).square().mean().backward()
    ddp(batches[-1]).square().mean().backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if compressed else {"rtol": 1e-5, "atol": 1e-7}
    for name, p in ddp.module.named_parameters():
        if p.grad is None:
            assert "unused" in name, name
            continue
        frozen = masks[name] if all_reduce.packs and not p.grad.is_sparse else torch.zeros_like(masks[name])
        ours = p.grad.to_dense()
        torch.testing.assert_close(ours, expected[name] * ~frozen, **tolerance, msg=name)
        assert not ours[frozen].any()
    sent = 0
    for name, p in ddp.module.named_parameters():
        elements = p.numel() if name == "words.weight" else int((~masks[name]).sum())
        sent += elements * (2 if compressed else p.element_size())
    if name != "words.weight":
        assert all_reduce.bytes_sent == (sent if all_reduce.packs else None), (all_reduce.bytes_sent, sent)


OPTIONS = [
    {}, {"static_graph": True}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 0.001},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
]  # fmt: skip
HOOKS = {
    "none": (),
    "mean": (default_hooks.allreduce_hook, None),
    "half": (default_hooks.fp16_compress_hook, None),
    "brain": (default_hooks.bf16_compress_hook, None),
    "wrapped": (default_hooks.allreduce_hook, None, default_hooks.fp16_compress_wrapper),
    "wrapper alone": (
        None,
        None,
        default_hooks.fp16_compress_wrapper,
    ),  # without a hook Lightning ignores a wrapper, and so do we
    "low rank": (powerSGD_hook, "state"),
}


def main() -> None:
    """Check every option with every hook, each with three kinds of masks."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    for option, (name, hook) in itertools.product(OPTIONS, HOOKS.items()):
        if name == "low rank":
            hook = (powerSGD_hook, PowerSGDState(None, start_powerSGD_iter=1000))
        module = Network()
        # DDP has to find unused parameters in each pass, or to know them from the first one.
        ddp = DistributedDataParallel(module, find_unused_parameters="static_graph" not in option, **option)
        all_reduce = LiveAllReduce(*hook)
        said: list[str] = []
        all_reduce.register(ddp, said.append)
        assert (not said) == all_reduce.packs == (name != "low rank"), said
        LiveAllReduce().register(ddp, said.append)
        assert said[-1].endswith("because DDP has another communication hook.")
        compressed = name in ("half", "brain", "wrapped")
        batches = [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(2)]
        whole = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in module.named_parameters()}
        for _ in range(2):  # the buckets are made anew after the first
            check(ddp, all_reduce, batches[:1], whole, compressed)
        drawn = {n: torch.rand(m.shape, generator=torch.Generator().manual_seed(3)) < 0.9 for n, m in whole.items()}
        by_layer = {n: m ^ (n.startswith("wide")) for n, m in whole.items()}
        for masks in (drawn, by_layer, {n: ~m for n, m in whole.items()}):
            all_reduce.leave_out({p: masks[n] for n, p in module.named_parameters()})
            for count in (1, 2) if "static_graph" not in option else (1,):  # torch forbids no_sync here
                check(ddp, all_reduce, batches[:count], masks, compressed)
    words = Words()
    ddp, all_reduce = DistributedDataParallel(words), LiveAllReduce()
    all_reduce.register(ddp, said.append)
    assert all_reduce.packs
    tokens = [torch.randint(7, (5,), generator=generator)]
    masks = {
        "words.weight": torch.ones(7, 4).bool(),
        "out.weight": torch.eye(2, 4).bool(),
        "out.bias": torch.ones(2) > 0,
    }
    all_reduce.leave_out({p: masks[n] for n, p in words.named_parameters()})
    for _ in range(2):
        check(ddp, all_reduce, tokens, masks, compressed=False)
