"""The callback under DDP on two ranks: bytes sent, checkpoints, communication hooks, disagreement, schedules."""

import copy
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.utils.data import DataLoader

from lightning_gcfreeze import Evidence, FreezeSchedule, GradCovFreezeCallback, Growth, Settled
from lightning_gcfreeze.distributed import World
from tests import cases, insides

RANK = int(os.environ["RANK"])


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1)).double()


def groups(parameters: Any) -> torch.optim.Optimizer:
    """Weights decay, biases do not."""
    weights, biases = [], []
    for p in parameters:
        (weights if p.dim() > 1 else biases).append(p)
    return torch.optim.AdamW([{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}], 0.01)


def batches() -> list[list[tuple[Tensor, Tensor]]]:
    """Of each rank: eight of four samples, and a last one of three on rank 0 and of two on rank 1."""
    x, y = cases.data(2 * 8 * 4 + 5, torch.float64).tensors
    of_ranks: list[list[tuple[Tensor, Tensor]]] = [[], []]
    start = 0
    for size in [(4, 4)] * 8 + [(3, 2)]:
        for rank in (0, 1):
            rows = slice(start, start + size[rank])
            of_ranks[rank].append((x[rows], y[rows]))
            start += size[rank]
    return of_ranks


def fit(strategy: DDPStrategy, *more: pl.Callback, logger: Any = False, **arguments: Any) -> Any:
    callback = GradCovFreezeCallback(**({"t0": 5, "k": 0.9} | arguments))
    module = cases.Regression(network(), groups)
    trainer = cases.trainer(
        callbacks=[callback, *more], devices=2, strategy=strategy, use_distributed_sampler=False, max_epochs=1,
        logger=logger, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches()[RANK], batch_size=None))  # type: ignore[arg-type]
    return callback, module


class Weights(pl.Callback):
    """Of every step."""

    def __init__(self) -> None:
        self.of_steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.of_steps.append({n: p.detach().clone() for n, p in pl_module.network.named_parameters()})


def by_hand(frozen: dict[str, Tensor], start: dict[str, Tensor], steps: slice, states: Any = None) -> Any:
    """Both ranks' gradients in one process, from a state on; AdamW of the live elements with torch's own."""
    model = network()
    model.load_state_dict(start)
    optimizer = groups(model.parameters())
    if states is not None:
        optimizer.load_state_dict(states)
    for first, second in list(zip(*batches(), strict=True))[steps]:
        own = [
            torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))
            for x, y in (first, second)
        ]
        held = {name: p.detach().clone() for name, p in model.named_parameters()}
        for (name, p), a, b in zip(model.named_parameters(), *own, strict=True):
            p.grad = (a + b) / 2 * ~frozen[name]
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.where(frozen[name], held[name], p))
    return model, copy.deepcopy(optimizer.state_dict())


def run_ends_as_that_of_one_process(directory: Path) -> None:
    """Short last batches, two groups; ranks differ in what they see, not in what they do. Fewer bytes are logged."""
    weights = Weights()
    logger = CSVLogger(directory, name="", version=f"rank{RANK}", flush_logs_every_n_steps=1)
    callback, module = fit(DDPStrategy(), weights, logger=logger)
    frozen = {name.removeprefix("network."): mask for name, mask in callback.frozen.items()}
    nothing = {name: torch.zeros_like(mask) for name, mask in frozen.items()}
    at_t0, states = by_hand(nothing, network().state_dict(), slice(0, 5))
    for name, p in at_t0.named_parameters():
        torch.testing.assert_close(weights.of_steps[4][name], p.detach(), rtol=1e-9, atol=1e-11)
    model, _ = by_hand(frozen, weights.of_steps[4], slice(5, 9), states)
    moved = 0
    for name, p in model.named_parameters():
        ours = module.network.get_parameter(name).detach()
        torch.testing.assert_close(ours, p.detach(), rtol=1e-8, atol=1e-10)
        assert torch.equal(ours[frozen[name]], weights.of_steps[4][name][frozen[name]])
        moved += int((ours != weights.of_steps[4][name]).sum())
    everything = sum(mask.numel() for mask in frozen.values())
    assert moved == everything - round(0.9 * everything)
    if RANK == 0:
        table = np.genfromtxt(directory / "rank0" / "metrics.csv", delimiter=",", names=True, deletechars="")
        sent = table["gcfreeze/gradient_bytes_sent"].tolist()
        assert sent == [everything * 8] * 5 + [moved * 8] * 4


class Calls(pl.Callback):
    """How often this process talks to the other, by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_steps: list[int] = []
        self.now = 0
        for name in ("all_reduce", "all_gather", "broadcast", "broadcast_object_list", "all_gather_object", "barrier"):
            monkeypatch.setattr(dist, name, self.counted(getattr(dist, name)))

    def counted(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.now += 1
            return function(*args, **kwargs)

        return call

    def on_train_batch_end(self, *args: Any) -> None:
        self.of_steps.append(self.now)
        self.now = 0


def observing_adds_no_collectives() -> None:
    """In each step one bucket, as DDP would, and one call of Lightning's; at t0 what it takes to agree."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = Calls(monkeypatch)
        fit(DDPStrategy(), calls)
    assert calls.of_steps[1:4] == [2, 2, 2]
    assert calls.of_steps[4] > 5
    assert calls.of_steps[5:] == [2, 2, 2, 2]


def checkpoint_saved_after_fit_holds_the_statistics_of_all_ranks(directory: Path) -> None:
    """Before t0: those of one that is saved by all at the same step, and not rank 0's own."""

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                self.own = callback.variance
                trainer.save_checkpoint(directory / "during.ckpt")

    states = []
    for saves, max_steps, file in ((Saves(), -1, "during.ckpt"), (pl.Callback(), 3, "after.ckpt")):
        callback = GradCovFreezeCallback(t0=5, k=0.9)
        trainer = cases.trainer(
            callbacks=[callback, saves], devices=2, strategy="ddp", use_distributed_sampler=False, max_epochs=1,
            max_steps=max_steps,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # t0 is not reached
            trainer.fit(cases.Regression(network(), groups), DataLoader(batches()[RANK], batch_size=None))  # type: ignore[arg-type]
        if file == "after.ckpt":
            trainer.save_checkpoint(directory / file)
        saved = torch.load(directory / file, weights_only=True)["callbacks"]["GradCovFreezeCallback"]
        states.append({key: saved[key] for key in ("observing", "decision", "plan", "steps")})
        if file == "during.ckpt":
            shared = states[0]["observing"]["covariance"]["network.0.weight"] * states[0]["observing"]["scale"]
            assert not torch.equal(shared, saves.own["network.0.weight"])  # each rank had seen something else
    cases.assert_identical(states[1], states[0])


def communication_hooks_are_combined() -> None:
    """Half precision halves what travels; what looks at whole gradients goes on getting them."""
    everything = sum(p.numel() for p in network().parameters())
    live = everything - round(0.9 * everything)
    for hook in (default_hooks.fp16_compress_hook, default_hooks.bf16_compress_hook):
        callback, _ = fit(strategy := DDPStrategy(ddp_comm_hook=hook))
        assert insides.bytes_sent_of(callback) == 2 * live
        assert strategy._ddp_comm_hook is hook  # given back
    strategy = DDPStrategy(ddp_comm_hook=default_hooks.fp16_compress_hook)
    with pytest.raises(ValueError, match="No parameter is eligible"):  # before DDP's first step
        fit(strategy, include="nothing")
    assert strategy._ddp_comm_hook is default_hooks.fp16_compress_hook
    state = PowerSGDState(None, start_powerSGD_iter=1000)
    callback, _ = fit(DDPStrategy(ddp_comm_hook=powerSGD_hook, ddp_comm_state=state))
    assert insides.bytes_sent_of(callback) is None
    assert state.iter > 0  # it ran
    assert callback.frozen_fraction == pytest.approx(0.9, abs=1e-3)

    class Own(DDPStrategy):
        def configure_ddp(self) -> None:
            super().configure_ddp()
            self.model.register_comm_hook(None, default_hooks.allreduce_hook)  # type: ignore[union-attr,operator]

    callback, _ = fit(Own())
    assert insides.bytes_sent_of(callback) is None
    assert callback.frozen_fraction == pytest.approx(0.9, abs=1e-3)


def orders_that_differ_between_ranks_are_refused() -> None:
    """An order that is not the same on both: both refuse, by name, before anything freezes."""

    def own_order(evidence: Evidence) -> dict[str, Tensor]:
        return {n: w + RANK * (n == "network.2.weight") * torch.randn_like(w) for n, w in evidence.weights.items()}

    with pytest.raises(RuntimeError, match=r"freeze different elements.*network.2.weight \(ranks 1\)"):
        fit(DDPStrategy(), order=own_order)


def schedules_agree() -> None:
    """When and how much: both freeze, grow and thaw after the same steps, and have the same weights at the end."""

    class Minds(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx) * (1 + RANK)  # one rank alone would find something else
            return loss + 99 * loss.detach() * (callback.frozen_fraction > 0.8)

    plans: list[dict[str, Any]] = [
        {"schedule": FreezeSchedule([(5, 0.3), (11, 0.6), (20, 0.9)])},
        {"schedule": FreezeSchedule([(5, 0.9), (11, 0.3), (20, 0.5)], monotone=False)},
        {
            "t0": Settled(first=5, growth=1.5, overlap=0.0, improvement=1.0),
            "k": Growth(every=3, max_loss_increase=0.5, first=0.5, stages=4),
        },
    ]
    wrappers: list[dict[str, Any]] = [{}, {"static_graph": True}, {"find_unused_parameters": True}]
    for arguments, wrapper, granularity in itertools.product(plans, wrappers, ("element", "tensor")):
        callback = GradCovFreezeCallback(**arguments, granularity=granularity)
        module = Minds(network(), groups)
        trainer = cases.trainer(
            callbacks=callback, devices=2, strategy=DDPStrategy(**wrapper), use_distributed_sampler=False, max_epochs=7
        )
        trainer.fit(module, DataLoader(batches()[RANK], batch_size=None))  # type: ignore[arg-type]
        found = (insides.plan_of(callback).t0, insides.plan_of(callback).k, callback.frozen_fraction)
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        gathered = World(2).all_gather(weights)
        assert torch.equal(gathered[0], gathered[1])
        assert found == tuple(World(2).all_gather_object(found)[1 - RANK])
        assert all(p.requires_grad for p in module.parameters())
        if granularity == "element":
            expected = {0: 0.9, 1: 0.5, 2: plans[2]["k"].fractions()[1]}[plans.index(arguments)]
            assert callback.frozen_fraction == pytest.approx(expected, abs=1e-3), arguments


def main(folder: Path) -> None:
    run_ends_as_that_of_one_process(folder)
    observing_adds_no_collectives()
    checkpoint_saved_after_fit_holds_the_statistics_of_all_ranks(folder)
    communication_hooks_are_combined()
    orders_that_differ_between_ranks_are_refused()
    schedules_agree()
