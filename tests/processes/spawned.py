"""A fit whose processes the main process launches itself, with the strategy given: ddp_spawn or ddp_fork."""

import copy
import sys
from typing import Any

import pytest
import torch

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.delta import of
from tests import cases


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    callback = GradCovFreezeCallback(t0=4, k=0.5)
    copied = copy.deepcopy(callback)
    module = cases.Regression(cases.mlp(), sgd)
    trainer = cases.trainer(callbacks=[callback], devices=2, strategy=sys.argv[1])
    trainer.fit(module, cases.loader())
    assert copied.phase == "observing"  # the outcome belongs to the original
    assert (callback.phase, callback.frozen_fraction) == ("frozen", 28 / 57), callback
    assert float(trainer.callback_metrics["gcfreeze/frozen_fraction"]) == torch.tensor(28 / 57).item()
    assert sum(int(mask.sum()) for mask in callback.frozen.values()) == 28
    assert callback.variance["network.0.weight"].min() > 0
    assert callback.savings is not None
    assert callback.savings.after.state < callback.savings.before.state
    assert callback.state_dict()["steps"] == 8
    with pytest.raises(RuntimeError, match=r"delta.of\(module, frozen\)"):
        callback.delta()
    assert len(of(module, callback.frozen)) > 4
    print("the main process has the outcome")
