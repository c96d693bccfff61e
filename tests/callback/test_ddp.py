"""Two gloo processes after the freeze: every way to hold, every setting of the wrapper, against a loop by hand."""

import os
import subprocess
import sys

import pytest

from tests.processes.launch import ROOT, SCRIPTS, assert_agreed, launch

TWO_RANKS = """
import itertools
import os
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.freezing import blocks
from tests import cases

warnings.simplefilter("ignore")  # find_unused_parameters=True finds none before the freeze
blocks.MIN_SAVED_MACS, blocks.MAX_BLOCK_FRACTION = 1, 1.0


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()


class Keep(pl.Callback):
    def on_train_batch_end(self, trainer, module, *args):
        if callback.phase == "frozen" and not start:
            start.update({n: p.detach().clone() for n, p in module.named_parameters()})
            (group,) = trainer.optimizers[0].param_groups
            parameters, *_ = group.values()  # not by its key: whoever names it gets the ordinary parameters
            shapes.append(sum(p.numel() for p in parameters))


options = [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}]
ways = [("element", "compact"), ("row", "compact"), ("tensor", "compact"), ("row", "restore"), ("tensor", "restore")]
for (granularity, hold), wrapper, accumulate in [
    *itertools.product(ways, options, [1]), *itertools.product(ways[1:3], options[:1], [2])
]:
    start, shapes = {}, []
    callback = GradCovFreezeCallback(t0=4, k=0.7, granularity=granularity, hold=hold, order="random", seed=2)
    module = cases.Regression(network(), lambda p: torch.optim.SGD(p, 0.02))
    trainer = cases.trainer(
        callbacks=[callback, Keep()], strategy=DDPStrategy(**wrapper), use_distributed_sampler=False,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]), num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        accumulate_grad_batches=accumulate, max_epochs=1,
    )
    data = cases.data(96, torch.float64)
    sampler = DistributedSampler(data, num_replicas=2, rank=trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=4, sampler=sampler))

    frozen = {n.removeprefix("network."): mask for n, mask in callback.frozen.items()}
    promoted = callback.savings.without_backward
    assert promoted or granularity != "tensor"
    live = sum(int((~mask).sum()) for mask in frozen.values())
    assert shapes == [live if hold == "compact" else sum(m.numel() for m in frozen.values())]
    by_hand = network()
    by_hand.load_state_dict({n.removeprefix("network."): p for n, p in start.items()})
    x, y = data.tensors
    size = 8 * accumulate  # of a step, over both ranks
    for step in range(4, 96 // size):
        rows = slice(size * step, size * (step + 1))
        loss = nn.functional.mse_loss(by_hand(x[rows]), y[rows])
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(by_hand.named_parameters(), gradients):
                p -= 0.02 * gradient * ~frozen[name]
    moved = 0
    for name, p in by_hand.named_parameters():
        ours = module.network.get_parameter(name).detach()
        torch.testing.assert_close(ours, p.detach(), rtol=1e-10, atol=1e-12)
        at_freeze = start["network." + name]
        assert torch.equal(ours[frozen[name]], at_freeze[frozen[name]])
        moved += int((ours != at_freeze).sum())
    assert moved == live, (moved, live)
    assert all(p.requires_grad for p in module.parameters())
    print("agreed", flush=True)
print(f"rank {trainer.global_rank} agrees", flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_train_the_live_elements_as_one_process_does(tmp_path):
    """Also what is wholly frozen: the reducer is told, and neither waits nor stumbles."""
    done = launch(TWO_RANKS, tmp_path, timeout=300)
    assert_agreed(done, 2)
    assert done.stdout.count("agreed") == 2 * 22


@pytest.mark.slow
def test_less_travels_and_ranks_that_differ_are_found(tmp_path):
    """Unequal last batches, parameter groups, hooks of the user's own, bytes in the log."""
    assert_agreed(launch(SCRIPTS / "callback.py", tmp_path, timeout=240), 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddp_spawn", "ddp_fork"])
def test_the_main_process_knows_what_its_spawned_processes_found(method, tmp_path):
    """Masks, statistics, savings and steps; a copy of the callback goes on knowing nothing."""
    command = [sys.executable, str(SCRIPTS / "spawned.py"), method]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "the main process knows" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
    assert not list(tmp_path.glob("lightning_gcfreeze*"))  # nothing is left behind
