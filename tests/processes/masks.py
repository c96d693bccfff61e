"""Given masks under DDP and FSDP2 on two ranks, against a loop in one process."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_gcfreeze import GradCovFreezeCallback, masks
from lightning_gcfreeze.distributed import whole
from tests import cases, insides
from tests.processes.checkpoints import RANK, Batches, Module, network

Named = dict[str, Tensor]
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": DDPStrategy,
    "ddp, unused": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp, static": lambda: DDPStrategy(static_graph=True),
    "ddp, views": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "fsdp2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
    "tensor": lambda: ModelParallelStrategy(1, 2, process_group_backend="gloo"),
}


def drawn(granularity: str, seed: int = 3) -> Named:
    """Whole masks: the first weight and a bias frozen whole, the last bias without a mask, the others in part."""
    rng, found = np.random.default_rng(seed), {}
    for name, p in network().named_parameters("network"):
        axes = tuple(p.shape) if granularity == "element" else tuple(p.shape[:1])
        marked = (rng.random(axes) < 0.6).reshape(axes + (1,) * (p.dim() - len(axes)))
        found[name] = torch.from_numpy(np.broadcast_to(marked, tuple(p.shape)).copy())
    found["network.0.weight"] = torch.ones(8, 5, dtype=torch.bool)
    found["network.2.0.bias"] = torch.ones(4, dtype=torch.bool)
    del found["network.4.bias"]
    return found


def by_hand(given: Named, accumulate: int = 1, clip: float | None = None) -> nn.Module:
    """AdamW in one process; frozen elements are put back after each step, and their gradients do not count."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i, (x, y) in enumerate(Batches(0, 1)):
        (nn.functional.mse_loss(model(x), y) / accumulate).backward()
        if (i + 1) % accumulate:
            continue
        for name, mask in given.items():
            model.get_parameter(name.removeprefix("network.")).grad.mul_(~mask)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in given.items():
                p = model.get_parameter(name.removeprefix("network."))
                p.copy_(torch.where(mask, start[name.removeprefix("network.")], p))
    return model


class Held(pl.Callback):
    """The elements that the optimizer of this rank keeps state of, before and after each batch."""

    def __init__(self) -> None:
        self.counts: set[int] = set()

    def look(self, optimizer: Any) -> None:
        held = [v for of_p in optimizer.state.values() for v in of_p.values() if v.dim()]
        self.counts.add(sum(v.numel() for v in held) // 2)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.look(trainer.optimizers[0])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.look(trainer.optimizers[0])


def fit(name: str, given: Any, *more: pl.Callback, **options: Any) -> tuple[GradCovFreezeCallback, Module]:
    arguments = {key: options.pop(key) for key in ("hold", "include", "lr_after_freeze") if key in options}
    ckpt = options.pop("ckpt_path", None)
    callback, module = GradCovFreezeCallback(masks=given, **arguments), Module()
    trainer = cases.trainer(
        callbacks=[callback, *more], devices=2, strategy=STRATEGIES[name](), use_distributed_sampler=False,
        max_epochs=1, **options,
    )  # fmt: skip
    rank, ranks = (0, 1) if name == "tensor" else (RANK, 2)
    trainer.fit(module, Batches(rank, ranks), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return callback, module


def check(callback: GradCovFreezeCallback, module: Module, given: Named, expected: nn.Module) -> None:
    """The masks are those that were given, frozen bits those of the start, live ones those of one process."""
    start, moved, live = network(), 0, 0
    for name, p in expected.named_parameters():
        ours = whole(module.network.get_parameter(name).detach())
        mask = given.get("network." + name, torch.zeros(ours.shape, dtype=torch.bool))
        assert torch.equal(whole(callback.frozen["network." + name]), mask), name
        torch.testing.assert_close(ours, p.detach(), rtol=1e-8, atol=1e-10, msg=name)
        assert torch.equal(ours[mask], start.get_parameter(name).detach()[mask]), name
        moved, live = moved + int((ours != start.get_parameter(name)).sum()), live + int((~mask).sum())
        both = [torch.empty_like(ours), torch.empty_like(ours)]
        dist.all_gather(both, ours.contiguous())
        assert torch.equal(*both), name
    assert moved == live
    n = sum(p.numel() for p in expected.parameters())
    assert callback.frozen_fraction == pytest.approx((n - live) / n)


def the_run_is_that_of_one_process(folder: Path) -> None:
    """By hand, by file and by selection, with every hold, with accumulation and clipping."""
    for name, granularity in itertools.product(STRATEGIES, ("element", "row")):
        given = drawn(granularity)
        if RANK == 0:
            masks.save(given, folder / f"{granularity}.pt")
        dist.barrier()
        expected = by_hand(given)
        holds = {"ddp": ("auto", "restore", "compact"), "fsdp2": ("auto", "restore")}.get(name, ("auto",))
        for hold in holds:
            held = Held()
            callback, module = fit(name, given, held, hold=hold)
            check(callback, module, given, expected)
            if name.startswith("ddp") and hold != "restore":
                live = sum(p.numel() for p in expected.parameters()) - sum(int(m.sum()) for m in given.values())
                assert held.counts == {0, live}
                assert callback.savings is not None
                assert callback.savings.without_backward == ("network.0.weight", "network.2.0.bias")
        if granularity == "element" and name in ("ddp", "fsdp2"):
            check(*fit(name, folder / f"{granularity}.pt"), given, expected)
    for name in ("ddp", "fsdp2"):
        given = drawn("row")
        expected = by_hand(given, accumulate=2, clip=0.1)
        check(*fit(name, given, accumulate_grad_batches=2, gradient_clip_val=0.1), given, expected)
        selection = masks.everything() - masks.rows("network.2.0.weight", [1, -1])
        callback, _ = fit(name, selection)
        live = {n: (~whole(mask)).nonzero().tolist() for n, mask in callback.frozen.items()}
        rows = [[i, j] for i in (1, 3) for j in range(8)]
        assert live == {n: rows if n == "network.2.0.weight" else [] for n in live}


def masks_of_another_run_are_taken_as_they_lie(folder: Path) -> None:
    """Sharded as the parameters are, sharded in another way, or whole; `save_masks` writes whole ones."""
    given = drawn("element")
    expected = by_hand(given)
    found = {name: fit(name, given)[0] for name in ("ddp", "fsdp2", "tensor")}
    assert isinstance(found["fsdp2"].frozen["network.0.weight"], DTensor)
    for later, earlier in itertools.permutations(found, 2):
        check(*fit(later, found[earlier].frozen), given, expected)
    for name, callback in found.items():
        callback.save_masks(folder / f"{name}.pt")
        dist.barrier()
        saved = masks.load(folder / f"{name}.pt")
        for n, mask in given.items():
            assert torch.equal(saved[n], mask), (name, n)
    check(*fit("fsdp2", found["fsdp2"].frozen), given, expected)


def saved_orders_give_the_masks_again(folder: Path) -> None:
    """Scores of sharded parameters are gathered."""
    for name in ("ddp", "fsdp2"):
        first = GradCovFreezeCallback(t0=3, k=0.6, order="magnitude")
        trainer = cases.trainer(
            callbacks=[first], devices=2, strategy=STRATEGIES[name](), use_distributed_sampler=False, max_epochs=1
        )
        trainer.fit(Module(), Batches(RANK, 2))
        first.save_order(folder / f"{name} order.pt")
        dist.barrier()
        later, _ = fit(name, masks.lowest(folder / f"{name} order.pt", 0.6))
        assert 0.59 < later.frozen_fraction < 0.61
        for n, mask in first.frozen.items():
            assert torch.equal(whole(later.frozen[n]), whole(mask)), n


class Save(pl.Callback):
    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def resumed_runs_end_as_unbroken_ones(folder: Path) -> None:
    """To the bit; with other masks they are refused on all ranks."""
    given = drawn("row")
    for name, at in itertools.product(("ddp", "fsdp2"), (1, 6)):
        path = folder / f"{name} {at}.ckpt"
        _, unbroken = fit(name, given, Save(path, at))
        _, resumed = fit(name, given, ckpt_path=path)
        for n, p in unbroken.named_parameters():
            assert torch.equal(whole(p.detach()), whole(resumed.get_parameter(n).detach())), (name, at, n)
        # Under FSDP2 what differs may lie on one rank only.
        other = {**given, "network.4.weight": ~given["network.4.weight"]}
        with pytest.raises(Exception, match=r"`masks` are not those .* network\.4\.weight differ"):
            fit(name, other, ckpt_path=path)


def what_one_rank_finds_wrong_is_refused_on_all(folder: Path) -> None:
    """At once: nobody waits for a rank that has raised."""
    given, name = drawn("element"), "network.2.0.weight"
    if RANK == 0:
        masks.save(given, folder / "rank 0.pt")
    dist.barrier()
    of_rank_1: list[tuple[Any, str, str]] = [
        ({**given, name: ~given[name]}, "would freeze different elements", "would freeze different elements"),
        (folder / "rank 1.pt", "do not fit on another process", "rank 1.pt"),
        ({**given, name: given[name].float()}, "do not fit on another process", "must be bool"),
        ({**given, name: given[name].mT}, "do not fit on another process", "its parameter's shape"),
        ({**given, name: None}, "do not fit on another process", "must be a bool tensor"),
        ({**given, "other": True}, "do not fit on another process", "no parameter of the module"),
        ({"network.4.bias": False}, "would freeze different elements", "would freeze different elements"),
        (
            {**given, "network.4.bias": True},
            r"differ between processes, of network\.4\.bias:",
            "differ between processes",
        ),
        (masks.rows("other", [1]), "do not fit on another process", "no eligible parameter is named"),
        (masks.Selection(_fails), "do not fit on another process", "a rule of one's own"),
    ]
    for strategy in ("ddp", "fsdp2"):
        for wrong, on_0, on_1 in of_rank_1:
            good = folder / "rank 0.pt" if isinstance(wrong, Path) else given
            with pytest.raises(Exception, match=on_1 if RANK else on_0):
                fit(strategy, wrong if RANK else good)
            dist.barrier()


def _fails(names: Any) -> dict[str, Tensor]:
    raise KeyError("a rule of one's own")


def main(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        the_run_is_that_of_one_process(folder)
        masks_of_another_run_are_taken_as_they_lie(folder)
        saved_orders_give_the_masks_again(folder)
        resumed_runs_end_as_unbroken_ones(folder)
        what_one_rank_finds_wrong_is_refused_on_all(folder)
        insides.skip_blocks_of_any_size(patch)
        given = drawn("row")
        for name in ("ddp", "ddp, static", "ddp, views"):
            check(*fit(name, given), given, by_hand(given))
