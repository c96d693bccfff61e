"""`Freezer` on two gloo processes, with DDP, Fabric and FSDP2, against the callback under Lightning's strategies."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_gcfreeze import Freezer, GradCovFreezeCallback
from lightning_gcfreeze.distributed import whole
from tests import cases

STEPS, SIZE = 10, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "variance": {"t0": 4, "k": 0.5},
    "rows by progress": {"t0": 4, "k": 0.6, "order": "progress", "granularity": "row", "hold": "restore"},
    "momentum": {"t0": 4, "k": 0.5, "order": "momentum"},
    "movement": {"t0": 4, "k": 0.5, "order": "movement"},
}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def batches() -> list[list[Tensor]]:
    """Return the batches of this rank: it sees other samples than the other."""
    x, y = cases.data(2 * SIZE * STEPS, torch.float64).tensors
    ranks = [x[dist.get_rank() :: 2].split(SIZE), y[dist.get_rank() :: 2].split(SIZE)]
    return [list(batch) for batch in zip(*ranks, strict=True)]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


class Sharded(cases.Regression):
    def configure_model(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        for layer in (0, 2, 4):
            fully_shard(self.network[layer], mesh=mesh["data_parallel"])


class ReadsGradients(pl.Callback):
    """The callback leaves gradients where they are, as `Freezer` does."""

    def on_after_backward(self, *_: Any) -> None:
        pass


def by_the_callback(options: dict[str, Any], strategy: Any, kind: type[cases.Regression]) -> dict[str, Any]:
    callback = GradCovFreezeCallback(**options)
    module = kind(network(), adamw)
    trainer = cases.trainer(
        callbacks=[callback, ReadsGradients()],
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        max_epochs=1,
    )
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return found(module.network, callback.frozen, callback.variance)


def found(model: nn.Module, frozen: dict[str, Tensor], variance: dict[str, Tensor]) -> dict[str, Any]:
    """Return whole tensors."""
    named = {"weights": dict(model.named_parameters()), "frozen": frozen, "variance": variance}
    return {
        what: {name.removeprefix("network."): whole(t.detach()).clone() for name, t in tensors.items()}
        for what, tensors in named.items()
    }


def in_a_loop(
    model: nn.Module, optimizer: Any, inside: nn.Module, options: dict[str, Any], **more: Any
) -> dict[str, Any]:
    freezer = Freezer(model, optimizer, loss=loss_of, **options)
    for batch in batches():
        freezer.begin_batch(batch)
        freezer.backward(loss_of(model, batch), **more)
        optimizer.step()
        optimizer.zero_grad()
    freezer.close()
    assert freezer.phase == "frozen"
    return found(inside, freezer.frozen, freezer.variance)


def in_one_process(options: dict[str, Any]) -> dict[str, Tensor]:
    """Return the masks of a loop over the batches of both ranks together."""
    model = network()
    optimizer = adamw(model.parameters())
    freezer = Freezer(model, optimizer, **options)
    x, y = cases.data(2 * SIZE * STEPS, torch.float64).tensors
    for batch in zip(x.split(2 * SIZE), y.split(2 * SIZE), strict=True):
        freezer.begin_batch(batch)
        freezer.backward(loss_of(model, list(batch)))
        optimizer.step()
        optimizer.zero_grad()
    freezer.close()
    return freezer.frozen


def main() -> None:
    """Compare each loop with the callback, to the bit; under FSDP2 averages round in another order."""
    for options in OPTIONS.values():
        expected = by_the_callback(options, DDPStrategy(), cases.Regression)
        inside = network()
        model = DistributedDataParallel(inside)
        cases.assert_identical(in_a_loop(model, adamw(model.parameters()), inside, options), expected)

        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        inside = network()
        wrapped, optimizer = fabric.setup(inside, adamw(inside.parameters()))
        ended = in_a_loop(wrapped, optimizer, inside, options, backward=fabric.backward)
        cases.assert_identical(ended, expected)

        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
        expected = by_the_callback(options | {"hold": "restore"}, strategy, Sharded)
        inside = network()
        for layer in (0, 2, 4):
            fully_shard(inside[layer])
        optimizer = adamw(inside.parameters())
        with torch.no_grad():  # an evaluation, after which FSDP2 leaves gathered parameters in place
            inside(batches()[0][0])
        ended = in_a_loop(inside, optimizer, inside, options | {"hold": "restore"})
        cases.assert_identical(ended, expected)
        assert ended["frozen"]["0.weight"].any()
        if options.get("order") in ("momentum", "movement"):  # the same on all processes as of one with all samples
            cases.assert_identical(ended["frozen"], in_one_process(options))
