"""Every strategy with every precision, hold and granularity on two ranks, as docs/cluster.md says."""

import itertools
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.distributed import whole
from tests import cases
from tests.processes.checkpoints import RANK, Batches, Module, Start


def precision_of(name: str) -> dict[str, Any]:
    """A loss scaler on a CPU has to be asked for in this way."""
    if name != "16-mixed":
        return {"precision": name}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))]}


class Data(Batches):
    """In the dtype of the weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(RANK, 2)
        self.dtype = dtype

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield [part.to(self.dtype) for part in batch]


def check(strategy: pl.strategies.Strategy, precision: str, hold: str, granularity: str) -> None:
    """Frozen bits stay, some of the live ones move, and both ranks have the same."""
    callback = GradCovFreezeCallback(t0=4, k=0.6, order="random", seed=1, hold=hold, granularity=granularity)
    dtype = {"64": torch.float64, "bf": torch.bfloat16, "16": torch.float16}.get(
        precision[:2] * precision.endswith("true"), torch.float32
    )
    start, module = Start(callback), Module()
    module.network.to(dtype)
    module.make_optimizer = lambda p: torch.optim.SGD(p, 0.02, momentum=0.9)  # AdamW's eps is 0 in float16
    trainer = cases.trainer(
        callbacks=[callback, start], devices=2, strategy=strategy, use_distributed_sampler=False, max_epochs=1,
        gradient_clip_val=1.0, **precision_of(precision),
    )  # fmt: skip
    trainer.fit(module, Data(dtype))
    moved = 0
    for name, mask in callback.frozen.items():
        now, frozen = whole(module.get_parameter(name).detach()), whole(mask)
        assert torch.equal(now[frozen], start.weights[name][frozen])
        moved += int((now != start.weights[name]).sum())
        both = [torch.empty_like(now), torch.empty_like(now)]
        dist.all_gather(both, now.contiguous())
        assert torch.equal(*both)
    assert moved
    assert callback.frozen_fraction


def main() -> None:
    granularities = ["element", "row", "tensor"]
    everywhere = [("ddp", p) for p in ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed")]
    everywhere += [("fsdp2", p) for p in ("32-true", "bf16-true", "bf16-mixed", "16-true")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about bf16 on a CPU
        for (name, precision), hold, granularity in itertools.product(
            everywhere, ["compact", "restore"], granularities
        ):
            sharded = ModelParallelStrategy(2, 1, process_group_backend="gloo")
            check(DDPStrategy() if name == "ddp" else sharded, precision, hold, granularity)
