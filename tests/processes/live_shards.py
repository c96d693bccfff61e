"""FSDP2, hybrid sharding, tensor parallelism and both with `hold="compact"`, against a plain loop in one process."""

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_gcfreeze import Freezer, FreezeSchedule, Growth
from lightning_gcfreeze.distributed import whole
from lightning_gcfreeze.freezing import live_vector
from lightning_gcfreeze.selection import mixed
from tests import insides
from tests.processes.by_hand import (
    OPTIMIZERS,
    Masks,
    adamw,
    all_but_one,
    by_hand,
    everything_in_part,
    freezing,
    samples,
    some,
)
from tests.processes.checkpoints import RANKS, SAMPLES, STEPS, network
from tests.processes.sharded import (
    HIDDEN,
    NORM,
    T0,
    VALUE,
    Both,
    Hybrid,
    InPart,
    Module,
    Sequences,
    assert_is,
    assert_saves,
    bundled,
    differ,
    fit,
    halving,
    named_whole,
    norm,
    value,
)


def the_run_is_that_of_one_process(
    masks: Masks, make: str, numel: int, clip: Any = None, schedule: Any = None, accumulate: int = 1, **given: Any
) -> None:
    """What freezes is given; all else has to come out."""
    limits = {None: {}, norm: NORM, value: VALUE}[clip]
    with bundled(numel):
        _, module, look = fit(
            make, rates=schedule, trainer={**limits, "accumulate_grad_batches": accumulate},
            **freezing(masks), **given,
        )  # fmt: skip
    steps = STEPS // accumulate
    assert len(look.masks) == steps
    expected, _ = by_hand([{}] * T0 + [masks] * (steps - T0), OPTIMIZERS[make], clip, schedule, accumulate)
    assert_is(module.network, expected, masks, look.at_freeze)
    assert_saves(look, masks, make)
    if clip or schedule:
        other, _ = by_hand([{}] * T0 + [masks] * (steps - T0), OPTIMIZERS[make], accumulate=accumulate)
        assert differ(other, expected)  # it has bitten


def a_vector_of_this_rank_alone_is_clipped_wrongly() -> None:
    """Plain tensors in the place of DTensors have the norm of what one rank has: the comparison notices."""
    masks = everything_in_part() | {"4.bias": torch.ones(1, dtype=torch.bool)}
    expected, _ = by_hand([{}] * T0 + [masks] * (STEPS - T0), adamw, norm)
    with pytest.MonkeyPatch.context() as patch:
        _, right, _ = fit(trainer=NORM, **freezing(masks))
        patch.setattr(live_vector, "flat_like", lambda parameter, values, numel: values)
        _, wrong, _ = fit(trainer=NORM, **freezing(masks))
    assert not differ(right.network, expected)
    assert differ(wrong.network, expected)


def masks_that_change_are_those_of_one_process(layout: tuple[int, int]) -> None:
    """Elements that thaw go on with the state they froze with; where k grows, stage by stage."""
    for name, arguments in {
        "thaws": {"schedule": FreezeSchedule([(3, 0.7), (5, 0.2), (7, 0.6), (8, 0.3)], monotone=False), "t0": None},
        "grows": {"k": Growth(0.9, first=0.5, most=0.8, stages=2, every=1, forecast=False)},
        "grows too far": {"k": Growth(1e-9, first=0.3, most=0.5, stages=2, every=1, forecast=False), "rise": 1.0},
    }.items():
        callback, module, look = fit("AdamW", layout, order="random", **arguments)
        counts = [sum(int(mask.sum()) for mask in of_step.values()) for of_step in look.masks]
        assert len(set(counts)) > 1, (name, counts)
        thaws = any(a > b for a, b in itertools.pairwise(counts))
        assert thaws == (name != "grows"), (name, counts)
        expected, _ = by_hand(look.masks, adamw, rise=arguments.get("rise", 0.0))
        for n, p in expected.named_parameters():
            ours = whole(module.network.get_parameter(n).detach())
            torch.testing.assert_close(ours, p.detach(), rtol=1e-9, atol=1e-9, msg=f"{name} {n}")
        last = named_whole(callback.frozen)
        assert_saves(look, last, "AdamW")


def single_elements_of_shards_freeze_where_rows_and_columns_would() -> None:
    """Of sharded weights no block is computed: only in one process mixed units differ from elements."""
    with pytest.MonkeyPatch.context() as patch:
        insides.skip_blocks_of_any_size(patch)
        patch.setattr(mixed, "KEPT", 0.6)  # the weights are so small that less would change nothing
        given = {"order": "movement", "k": 0.7}
        units, elements = (named_whole(fit(granularity=unit, **given)[0].frozen) for unit in ("mixed", "element"))
        assert all(torch.equal(mask, elements[name]) for name, mask in units.items())
        alone = [dict[str, torch.Tensor](), dict[str, torch.Tensor]()]
        for unit, found in zip(("mixed", "element"), alone, strict=True):
            model = network()
            optimizer = adamw(model.parameters())
            freezer = Freezer(model, optimizer, t0=T0, granularity=unit, skip_frozen_gradients=True, **given)
            for x, y in zip(*(part.split(SAMPLES) for part in samples(0.0)), strict=True):
                freezer.begin_batch([x, y])
                freezer.backward(nn.functional.mse_loss(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
            found.update(freezer.frozen)
            freezer.close()
        assert any(not torch.equal(mask, alone[1][name]) for name, mask in alone[0].items())


def mixed_precision_is_that_of_restoring() -> None:
    """With gradients reduced in another dtype, against what puts frozen values back."""

    class Mixed(Module):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.mse_loss(self.network(x).double(), y)

    masks = some()
    _, ours, look = fit("AdamW", kind=Mixed, trainer=NORM, **freezing(masks))
    _, restored, _ = fit("AdamW", kind=Mixed, trainer=NORM, hold="restore", **freezing(masks))
    assert_is(ours.network, restored.network, masks, look.at_freeze)
    assert_saves(look, masks, "AdamW")


class Peeks(pl.Callback):
    """Looks at gradients from the first step on, in a way that no reading of its code finds."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for p in pl_module.parameters():
            getattr(p, HIDDEN)


def gradients_that_are_seen_to_be_read_are_kept() -> None:
    """Reads of sharded gradients are noted while observing: the rest happens late, and has the same result."""
    masks = some()
    callback, module, look = fit(callbacks=(Peeks(),), trainer=NORM, **freezing(masks))
    (seen,) = callback.state_dict()["gradient_readers"]
    assert seen.startswith("on_train_batch_end (live_shards.py:"), seen
    assert look.kept == set(masks)
    assert not look.without
    assert look.state_bytes[-1] == 2 * look.live_bytes[-1]
    expected, _ = by_hand([{}] * T0 + [masks] * (STEPS - T0), adamw, norm)
    assert_is(module.network, expected, masks, look.at_freeze)
    assert HIDDEN not in vars(DTensor)


class SaveEach(pl.Callback):
    """Saves after each step; under the callback the optimizer has no state and parameters have no gradient then."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")


def saving_is_no_step(folder: str) -> None:
    """Under a Trainer, SGD without momentum, all parameters partly frozen."""
    masks = everything_in_part() | {"4.bias": torch.ones(1, dtype=torch.bool)}
    callback, module, look = fit("SGD", callbacks=(SaveEach(folder),), **freezing(masks))
    assert callback.state_dict()["steps"] == STEPS
    expected, _ = by_hand([{}] * T0 + [masks] * (STEPS - T0), OPTIMIZERS["SGD"])
    assert_is(module.network, expected, masks, look.at_freeze)


def main(folder: Any) -> None:
    if RANKS == 4:
        the_run_is_that_of_one_process(some(), "AdamW", 0, layout=(2, 2))
        the_run_is_that_of_one_process(everything_in_part(), "SGD momentum", 0, norm, layout=(2, 2), kind=Both)
        the_run_is_that_of_one_process(everything_in_part(), "AdamW foreach", 2**14, layout=(2, 2))
        the_run_is_that_of_one_process(all_but_one(), "SGD momentum", 0, layout=(2, 2))
        the_run_is_that_of_one_process(some(), "AdamW", 2**14, norm, layout=(4, 1), kind=Hybrid)
        masks_that_change_are_those_of_one_process((2, 2))
        return
    the_run_is_that_of_one_process(some(), "AdamW", 0, norm, halving)
    the_run_is_that_of_one_process(some(), "AdamW", 2**14, norm, accumulate=2)
    the_run_is_that_of_one_process(some(), "AdamW fused", 0, value, accumulate=2)
    the_run_is_that_of_one_process(some(), "SGD", 2**14)
    the_run_is_that_of_one_process(everything_in_part(), "SGD momentum", 2**14, norm)
    the_run_is_that_of_one_process(everything_in_part(), "Adagrad", 0, value)
    the_run_is_that_of_one_process(all_but_one(), "AdamW", 0, norm)
    the_run_is_that_of_one_process(all_but_one(), "AdamW foreach", 2**14)
    the_run_is_that_of_one_process(some(), "AdamW", 0, layout=(1, 2), kind=InPart)
    the_run_is_that_of_one_process(everything_in_part(), "SGD momentum", 0, norm, layout=(1, 2), kind=Sequences)
    the_run_is_that_of_one_process(some(), "AdamW", 2**14, layout=(1, 2), kind=Sequences)
    a_vector_of_this_rank_alone_is_clipped_wrongly()
    for layout in ((2, 1), (1, 2)):
        masks_that_change_are_those_of_one_process(layout)
    single_elements_of_shards_freeze_where_rows_and_columns_would()
    mixed_precision_is_that_of_restoring()
    gradients_that_are_seen_to_be_read_are_kept()
    saving_is_no_step(f"{folder}/each")
