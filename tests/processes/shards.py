"""FSDP2 and tensor parallelism on two or four ranks, against a loop in one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_gcfreeze import Evidence, GradCovFreezeCallback, apply_delta, delta
from lightning_gcfreeze.distributed import local, whole
from tests import cases, insides
from tests.oracles.recursion import covariance
from tests.processes.checkpoints import RANK, RANKS, Module, Start, network

T0, SIZES = 4, [4, 4, 2, 3, 4, 4, 4, 2, 4]


class Batches:
    """Of a rank: two to four samples a step."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(SIZES)

    def __iter__(self) -> Iterator[list[Tensor]]:
        x, y = cases.data(sum(SIZES) * self.ranks, torch.float64).tensors
        for step, size in enumerate(SIZES):
            start = sum(SIZES[:step]) * self.ranks + size * self.rank
            yield [x[start : start + size], y[start : start + size]]


def by_hand(data: int, frozen: dict[str, Tensor], count: int) -> tuple[list[dict[str, Tensor]], nn.Module]:
    """The variance that each data-parallel rank finds alone, and the model at the end if this is frozen after t0."""
    model, pairs = network(), [[] for _ in range(data)]
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)
    parameters = dict(model.named_parameters())

    def gradient(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss = nn.functional.mse_loss(model(x), y)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    def vector(named: dict[str, Tensor]) -> np.ndarray:
        return torch.cat([tensor.flatten() for tensor in named.values()]).numpy()

    for step, batches in enumerate(zip(*(Batches(rank, data) for rank in range(data)), strict=True)):
        of_ranks = [gradient(x, y) for x, y in batches]
        mean = {name: sum(g[name] for g in of_ranks) / data for name in parameters}
        if step < T0:
            # A sample of a batch of S differs from its mean by (1 - 1/S) of the variance: all as if S were the first's.
            scale = ((1 - 1 / (SIZES[0] * data)) / (1 - 1 / (SIZES[step] * data))) ** 0.5
            for rank, (x, y) in enumerate(batches):
                of_step = [vector(gradient(x[i : i + 1], y[i : i + 1])) for i in range(min(count, len(x)))]
                centre = vector(mean)
                weight = (count / len(of_step)) ** 0.5  # every step counts as much
                pairs[rank] += [(centre + weight * scale * (g - centre), centre) for g in of_step]
                pairs[rank] += [(centre, centre)] * (count - len(of_step))
        held = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.grad = mean[name] * ~frozen[name] if step >= T0 else mean[name]
        optimizer.step()
        if step >= T0:
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(torch.where(frozen[name], held[name], p))
    sizes = [p.numel() for p in parameters.values()]
    of_each = []
    for of_rank in pairs:
        flat = torch.from_numpy(np.diag(covariance(of_rank, lambda t: 1 / t)).copy()).split(sizes)
        of_each.append({n: v.view(p.shape) for (n, p), v in zip(parameters.items(), flat, strict=True)})
    return of_each, model


def fit(
    data: int,
    tensor: int,
    *more: Any,
    logger: Any = False,
    ckpt_path: Any = None,
    make: type[Module] = Module,
    **arguments: Any,
) -> Any:
    callback = GradCovFreezeCallback(**({"t0": T0, "k": 0.6, "seed": 3} | arguments))
    strategy = ModelParallelStrategy(data, tensor, process_group_backend="gloo")
    module, start = make(), Start(callback)
    trainer = cases.trainer(
        callbacks=[callback, start, *more], devices=RANKS, strategy=strategy, use_distributed_sampler=False,
        max_epochs=1, logger=logger, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, Batches(RANK // tensor, data), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return callback, module, start.weights


def network_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): whole(tensor.detach()) for name, tensor in named.items()}


def the_run_is_that_of_one_process(data: int, tensor: int, gradients: str, samples: int) -> None:
    """An element's variance is that of its own rank's first samples; the k lowest of all ranks' freeze."""
    callback, module, start = fit(data, tensor, gradients=gradients, samples=samples)
    frozen, variance = network_names(callback.frozen), network_names(callback.variance)
    of_ranks, model = by_hand(data, frozen, samples)
    expected = {}
    for name in variance:
        # FSDP2 cuts what tensor parallelism has cut, along the same axis if that is by columns.
        cut = [v[name].chunk(tensor if name.startswith("0.") else 1) for v in of_ranks]
        pieces = [[v.chunk(data) for v in of_rank] for of_rank in cut]
        expected[name] = torch.cat(
            [
                pieces[rank][piece][rank]
                for piece in range(len(cut[0]))
                for rank in range(data)
                if rank < len(pieces[rank][piece])
            ]
        )
    for name, v in variance.items():
        torch.testing.assert_close(v, expected[name], rtol=1e-10, atol=1e-14, msg=name)
    flat = torch.cat([v.flatten() for v in expected.values()]).numpy()
    marks = torch.cat([mask.flatten() for mask in frozen.values()]).numpy()
    assert marks.sum() == round(0.6 * len(flat)) == round(callback.frozen_fraction * len(flat))
    assert marks[np.argsort(flat, kind="stable")[: marks.sum()]].all()
    moved = 0
    for name, p in model.named_parameters():
        ours = whole(module.network.get_parameter(name).detach())
        torch.testing.assert_close(ours, p.detach(), rtol=1e-8, atol=1e-10, msg=name)
        at_freeze = start["network." + name]
        assert torch.equal(ours[frozen[name]], at_freeze[frozen[name]])
        moved += int((ours != at_freeze).sum())
    assert moved == len(flat) - marks.sum()


class Hybrid(Module):
    """Two copies of the model, each of which two ranks have."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
        fully_shard(self.network[2], mesh=mesh)
        fully_shard(self.network, mesh=mesh)


def copies_are_averaged() -> None:
    """Of the two ranks that have an element each has seen samples of its own."""
    SIZES[:] = [4] * len(SIZES)
    callback, *_ = fit(4, 1, make=Hybrid)
    of_ranks, _ = by_hand(4, network_names(callback.frozen), 1)
    for name, v in network_names(callback.variance).items():
        halves = [of_rank[name].chunk(2) for of_rank in of_ranks]
        mean = [(halves[i][i] + halves[2 + i][i]) / 2 for i in range(len(halves[0]))]
        torch.testing.assert_close(v, torch.cat(mean), rtol=1e-10, atol=1e-14, msg=name)
    assert not torch.allclose(halves[0][0], halves[2][0])


class Twice(Module):
    """One rank, in one step, calls a layer twice."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        def once_more(network: Any, inputs: Any) -> None:
            network[0](inputs[0])

        hook = self.network.register_forward_pre_hook(once_more) if batch_idx == 2 and RANK == 1 else None
        loss = super().training_step(batch, batch_idx)
        if hook:
            hook.remove()
        return loss


def a_step_that_one_rank_did_not_see_is_left_out() -> None:
    """By that rank alone: the others observe it."""
    callback, *_ = fit(RANKS, 1, make=Twice)
    assert insides.observed_steps_of(callback) == T0 - 1  # the least of both
    assert callback.frozen_fraction == pytest.approx(0.6, abs=0.01)


def masks_lie_as_parameters_do(data: int, tensor: int) -> None:
    """Rows and tensors freeze whole; masks, variances and the delta can be had; ranks cannot."""
    for granularity in ("row", "tensor"):
        callback, module, start = fit(data, tensor, granularity=granularity, order="random")
        assert 0 < callback.frozen_fraction <= 0.6
        for name, mask in callback.frozen.items():
            p = module.get_parameter(name)
            assert isinstance(mask, DTensor)
            assert (mask.shape, mask.placements) == (p.shape, p.placements)
            assert local(mask).shape == local(p).shape
            rows = whole(mask).flatten(1) if mask.dim() > 1 and granularity == "row" else whole(mask).reshape(1, -1)
            if mask.dim() > 1 or granularity == "tensor":
                assert torch.equal(rows.all(1), rows.any(1)), name
    with pytest.raises(RuntimeError, match="`ranks` needs all scores on one process"):
        _ = callback.ranks
    found, fresh = callback.delta(), Module()
    fresh.load_state_dict(start)
    apply_delta(fresh, found)
    for name, p in fresh.named_parameters():
        assert torch.equal(p, whole(module.get_parameter(name).detach())), name
    for take in (lambda: delta.of(module, callback.frozen), callback.delta):
        with torch.no_grad():  # after which FSDP2 leaves gathered parameters in place
            module.network(torch.zeros(2, 5, dtype=torch.float64))
        cases.assert_identical(take(), found)


def a_rank_without_elements_is_no_obstacle(data: int, tensor: int, directory: str) -> None:
    """The last layer has one row, which is on one rank; what comes after it is saved and gone on from by all."""
    for order in ("variance", "magnitude"):
        callback, *_ = fit(
            data, tensor, Save(f"{directory}/{order}"), order=order, include="network.4.*", k=2,
            samples="first",
        )  # fmt: skip
        again, *_ = fit(
            data, tensor, Save(f"{directory}/{order} again"), order=order, include="network.4.*", k=2,
            samples="first", ckpt_path=f"{directory}/{order}/6.ckpt",
        )  # fmt: skip
        assert again.state_dict()["steps"] == len(SIZES)
        for name, mask in callback.frozen.items():
            assert torch.equal(whole(mask), whole(again.frozen[name]))
            assert torch.equal(whole(callback.variance[name]), whole(again.variance[name]))
        assert sum(int(whole(mask).sum()) for mask in again.frozen.values()) == 2


class Save(pl.Callback):
    """Before the freeze, and after."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in (2, 6, 8):
            trainer.save_checkpoint(f"{self.directory}/{trainer.global_step}.ckpt")


def an_error_of_one_rank_is_one_of_all() -> None:
    """Else the others would wait for it."""

    def order(evidence: Evidence) -> dict[str, Tensor]:
        return {name: w * torch.nan if RANK == 1 else w for name, w in evidence.weights.items()}

    with pytest.raises((ValueError, RuntimeError), match="returned NaN" if RANK == 1 else "failed on another process"):
        fit(RANKS, 1, order=order)


def batches_of_one_sample_are_refused() -> None:
    """The ranks of tensor parallelism have the same one."""
    SIZES[:] = [1] * len(SIZES)
    with pytest.raises(MisconfigurationException, match="The batch holds one sample"):
        fit(1, RANKS)


def what_needs_whole_tensors_is_refused(data: int, tensor: int) -> None:
    """By name, with the way out, before a step."""
    with pytest.raises(MisconfigurationException, match="`covariance='full'` needs whole parameters"):
        fit(data, tensor, covariance="full")


def fractions_are_of_the_whole(data: int, tensor: int, directory: str) -> None:
    """What rank 0 logs is not about its shards."""
    logger = CSVLogger(directory, name="", version=f"{data}x{tensor} rank {RANK}", flush_logs_every_n_steps=1)
    callback, *_ = fit(data, tensor, logger=logger)
    frozen = network_names(callback.frozen)
    if RANK == 0:
        table = np.genfromtxt(f"{logger.log_dir}/metrics.csv", delimiter=",", names=True, deletechars="")
        for name, mask in frozen.items():
            logged = table[f"gcfreeze/frozen_fraction/network.{name}"]
            assert logged[-1] == pytest.approx(float(mask.double().mean())), name


def main(folder: Path) -> None:
    for layout in [(2, 1), (1, 2)] if RANKS == 2 else [(2, 2)]:
        for how, count in (("auto", 1), ("capture", 1), ("replay", 1), ("auto", 3), ("replay", 3)):
            the_run_is_that_of_one_process(*layout, how, count)
        masks_lie_as_parameters_do(*layout)
        a_rank_without_elements_is_no_obstacle(*layout, f"{folder}/{layout}")
        what_needs_whole_tensors_is_refused(*layout)
        fractions_are_of_the_whole(*layout, str(folder))
    if RANKS == 4:
        copies_are_averaged()
    else:
        a_step_that_one_rank_did_not_see_is_left_out()
        an_error_of_one_rank_is_one_of_all()
        batches_of_one_sample_are_refused()
