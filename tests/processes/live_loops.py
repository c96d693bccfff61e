"""Loops of one's own over FSDP2's shards, with a `Freezer`, against a plain loop in one process."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from lightning_gcfreeze import Freezer
from tests.processes.by_hand import OPTIMIZERS, Masks, by_hand, freezing, some
from tests.processes.checkpoints import RANK, RANKS, STEPS, network
from tests.processes.sharded import T0, Batches, assert_is, bundled, named_whole, norm, value


def sharded_network() -> nn.Sequential:
    model = network()
    for part in (model[2], model[4], model):
        fully_shard(part)
    return model


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def loop(
    masks: Masks,
    make: str,
    skips: bool,
    clip: Any = None,
    accumulate: int = 1,
    saves: bool = False,
) -> tuple[nn.Module, Masks, dict[str, Any]]:
    """Train with a `Freezer`, as users write it; return the model, its weights at the freeze, and what was saved."""
    model = sharded_network()
    optimizer = OPTIMIZERS[make](model.parameters())
    freezer = Freezer(model, optimizer, t0=T0, accumulate=accumulate, skip_frozen_gradients=skips, **freezing(masks))
    start, saved = Masks(), dict[str, Any]()
    whole_states = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for i, batch in enumerate(Batches(RANK, RANKS)):
        is_last = (i + 1) % accumulate == 0
        if freezer.phase == "frozen" and not start:
            start = named_whole(dict(model.named_parameters()))
        freezer.begin_batch(batch)
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        freezer.backward(loss_of(model, batch) / accumulate)
        if not is_last:
            continue
        if clip:
            params = model.parameters() if not skips else [p for g in optimizer.param_groups for p in g["params"]]
            clip(params)
        optimizer.step()
        optimizer.zero_grad()
        steps = freezer.steps
        if saves:
            saved = get_optimizer_state_dict(model, optimizer, options=whole_states)
            assert freezer.steps == steps == (i + 1) // accumulate, (freezer.steps, steps, i)
        if saves and i % 3 == 2:  # what was just saved is loaded again
            own = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(model, optimizer, own)
            assert freezer.steps == steps
    freezer.close()
    assert freezer.steps == STEPS // accumulate
    return model, start, saved


def loops_are_that_of_one_process() -> None:
    """Where gradients are looked at and where they are not; own clipping; accumulation without synchronising."""
    masks = some()
    for make, skips, clip, accumulate in (
        ("AdamW", True, None, 1),
        ("AdamW", True, norm, 2),
        ("AdamW", False, norm, 1),
        ("SGD momentum", False, value, 2),
        ("SGD", True, None, 1),
    ):
        with bundled(0 if clip else 2**14):
            model, start, saved = loop(masks, make, skips, clip, accumulate, saves=not clip)
        steps = STEPS // accumulate
        expected, optimizer = by_hand([{}] * T0 + [masks] * (steps - T0), OPTIMIZERS[make], clip, None, accumulate)
        assert_is(model, expected, masks, start)
        if saved and RANK == 0 and make == "AdamW":
            of_hand = {name: optimizer.state[p] for name, p in expected.named_parameters()}
            assert saved["state"].keys() == of_hand.keys()
            for name, entry in saved["state"].items():
                mask = masks[name]
                for key in ("exp_avg", "exp_avg_sq"):
                    assert entry[key].shape == mask.shape
                    assert not entry[key][mask].any()
                    torch.testing.assert_close(
                        entry[key][~mask], of_hand[name][key][~mask], rtol=1e-9, atol=1e-12, msg=f"{name} {key}"
                    )
                    assert mask.all() or entry[key][~mask].any()


def a_state_that_is_made_for_a_checkpoint_is_no_step() -> None:
    """To have one to save, torch steps an optimizer with a rate of zero: t0 does not come sooner."""
    model = sharded_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = Freezer(model, optimizer, t0=T0, k=0.5, order="random", skip_frozen_gradients=True)
    stepped: list[int] = []
    real = optimizer.step

    def counting(*args: Any, **kwargs: Any) -> Any:
        stepped.append(1)
        return real(*args, **kwargs)

    optimizer.step = counting  # type: ignore[method-assign]
    for i, batch in enumerate(Batches(RANK, RANKS)):
        freezer.begin_batch(batch)
        freezer.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        get_optimizer_state_dict(model, optimizer)
        assert freezer.steps == i + 1
        assert (freezer.phase == "frozen") == (i + 1 >= T0)
    freezer.close()
    assert len(stepped) == 2 * STEPS  # torch did what this is about


def main() -> None:
    loops_are_that_of_one_process()
    a_state_that_is_made_for_a_checkpoint_is_no_step()
