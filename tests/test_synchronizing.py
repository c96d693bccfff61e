"""At a decision and at the end of training, statistics are replaced by those of all processes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gcfreeze import Freezer, GradCovFreezeCallback, Settled, _lightning, freezer
from lightning_gcfreeze.distributed import World
from tests import cases, insides

STEPS = 3


class BesideAnIdleProcess(World):
    """Two processes, the other of which has the same counts, but saw neither noise nor losses."""

    def __init__(self, *_: Any) -> None:
        super().__init__(2)

    @property
    def rank(self) -> int:
        return 0

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        return tensor

    def all_reduce_mean_(self, tensor: Tensor, group: Any = None) -> None:
        tensor.div_(2)

    def all_gather(self, tensor: Tensor) -> Tensor:
        other = torch.zeros_like(tensor) if tensor.is_floating_point() else tensor  # losses, or fingerprints of masks
        return torch.stack([tensor, other])

    def broadcast_object(self, value: Any) -> Any:
        return value

    def all_gather_object(self, value: Any) -> Any:
        return [value, value]


def by_the_callback(**options: Any) -> dict[str, Tensor]:
    callback = GradCovFreezeCallback(**options)
    module = cases.Regression(cases.mlp())
    cases.trainer(callbacks=[callback], max_steps=STEPS).fit(module, cases.loader())
    losses = insides.plan_of(callback).state_dict()["losses"]
    return {name.removeprefix("network."): v for name, v in callback.variance.items()} | {
        "losses": torch.tensor(losses)
    }


def by_freezer(**options: Any) -> dict[str, Tensor]:
    def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    network = cases.mlp()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    front = Freezer(network, optimizer, **options, loss=loss_of, data_parallel=True)
    for batch, _ in zip(cases.loader(), range(STEPS), strict=False):
        front.begin_batch(batch)
        front.backward(loss_of(network, batch))
        optimizer.step()
        optimizer.zero_grad()
    front.close()
    return front.variance | {"losses": torch.tensor(front.state_dict()["plan"]["losses"])}


@pytest.mark.parametrize("front", [by_the_callback, by_freezer], ids=["callback", "Freezer"])
@pytest.mark.filterwarnings("ignore:.*Nothing was frozen")
def test_statistics_are_those_of_all_processes_after_training(front, monkeypatch):
    """Before t0. The other process has seen no noise, so the mean over both is half of what this one has seen."""
    options = {"t0": Settled(max_t0=100), "k": 0.5}
    alone = front(**options)
    monkeypatch.setattr(_lightning, "World", BesideAnIdleProcess)
    monkeypatch.setattr(freezer.World, "current", BesideAnIdleProcess)
    both = front(**options)
    (here, shared), nothing = both.pop("losses"), torch.zeros(3)
    own, _ = alone.pop("losses")
    for name, v in alone.items():
        assert v.any()
        torch.testing.assert_close(both[name], v / 2, rtol=1e-6, atol=0.0)
    assert torch.equal(here, nothing)
    torch.testing.assert_close(shared, own, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("front", [by_the_callback, by_freezer], ids=["callback", "Freezer"])
def test_decision_is_made_by_the_statistics_of_all_processes(front, monkeypatch):
    """So the variances that the decision keeps are the mean over both processes."""
    options = {"t0": STEPS - 1, "k": 0.5}
    alone = front(**options)
    monkeypatch.setattr(_lightning, "World", BesideAnIdleProcess)
    monkeypatch.setattr(freezer.World, "current", BesideAnIdleProcess)
    both = front(**options)
    for name in alone.keys() - {"losses"}:
        assert alone[name].any()
        torch.testing.assert_close(both[name], alone[name] / 2, rtol=1e-6, atol=0.0)
