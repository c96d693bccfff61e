"""FSDP2, hybrid sharding, tensor parallelism and both with `hold="compact"`, against a plain loop in one process."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_gcfreeze import Evidence, Freezer, FreezeSchedule, GradCovFreezeCallback, Growth
from lightning_gcfreeze.distributed import local, whole
from lightning_gcfreeze.freezing import compact, live_vector
from lightning_gcfreeze.orderings import needs
from tests import cases
from tests.processes.checkpoints import RANK, RANKS, SAMPLES, STEPS, network
from tests.witnesses import flat_bits

T0 = 4
HIDDEN = "grad"  # what looks at gradients by this name is not found by reading code: nothing changes for its sake
Masks = dict[str, Tensor]


def adamw(p: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, 0.02, weight_decay=0.1, **more)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "AdamW fused": lambda p: adamw(p, fused=True),
    "AdamW foreach": lambda p: adamw(p, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.02),
}
ENTRIES = {"AdamW": 2, "AdamW fused": 2, "AdamW foreach": 2, "SGD": 0, "SGD momentum": 1, "Adagrad": 1}
"""Numbers that the optimizer keeps for each element."""


# What freezes --------------------------------------------------------------------------------------------------------


def some() -> Masks:
    """Everything of which two ranks see different sides: half of the rows is what a rank of two has."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in network().named_parameters()}
    masks["0.weight"][:4] = True  # all that rank 0 has of it
    masks["0.weight"][4:, ::2] = True
    masks["2.0.weight"][2:] = True  # all that rank 1 has, and nothing of rank 0's
    masks["2.0.bias"][1:3] = True
    masks["2.1.weight"][:2] = True
    masks["4.weight"][:] = masks["4.bias"][:] = True  # a whole module
    return masks


def all_but_one() -> Masks:
    """One element is left, of the last rank: the others have nothing to step."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in network().named_parameters()}
    masks["0.weight"][7, 4] = False
    return masks


def everything_in_part() -> Masks:
    """No tensor is frozen or live as a whole."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in network().named_parameters() if p.numel() > 1}
    for mask in masks.values():
        mask.view(-1)[::3] = True
    return masks


def freezing(masks: Masks) -> dict[str, Any]:
    """Return arguments with which exactly this freezes."""

    @needs(variance=False)
    def order(evidence: Evidence) -> dict[str, Tensor]:
        given = dict[str, Tensor]()
        for name, weight in evidence.weights.items():
            nothing = torch.zeros(evidence.shards.shape(name, weight), dtype=torch.bool)
            given[name] = masks.get(name.removeprefix("network."), nothing)
        return {name: (~part).double() for name, part in evidence.shards.parts(given).items()}

    return {"order": order, "k": sum(int(mask.sum()) for mask in masks.values())}


# The loop in one process ---------------------------------------------------------------------------------------------


def samples(rise: float) -> tuple[Tensor, Tensor]:
    """Return those of all steps; targets, and with them losses, rise by this factor from step to step."""
    x, y = cases.data(SAMPLES * STEPS, torch.float64).tensors
    return x, y * (1 + rise) ** torch.arange(STEPS).repeat_interleave(SAMPLES).view(-1, *[1] * (y.dim() - 1))


def by_hand(
    masks: list[Masks],
    make: Callable[[Any], torch.optim.Optimizer],
    clip: Callable[[Any], Any] | None = None,
    schedule: Callable[[Any], Any] | None = None,
    accumulate: int = 1,
    rise: float = 0.0,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train on all samples; in each step an element that its masks mark keeps its value, and its optimizer's state."""
    model = network()
    optimizer = make(model.parameters())
    scheduler = schedule(optimizer) if schedule else None
    x, y = (part.split(SAMPLES) for part in samples(rise))
    for step, of_step in enumerate(masks):
        optimizer.zero_grad()
        for i in range(accumulate * step, accumulate * (step + 1)):
            (nn.functional.mse_loss(model(x[i]), y[i]) / accumulate).backward()
        kept = []
        for name, p in model.named_parameters():
            if (mask := of_step.get(name)) is None:
                continue
            p.grad = None if mask.all() else p.grad.masked_fill(mask, 0.0)
            entries = [
                v for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.shape == p.shape and v.dim()
            ]
            kept += [(tensor, mask, tensor.detach().clone()) for tensor in (p, *entries)]
        if clip:
            clip(model.parameters())
        optimizer.step()
        with torch.no_grad():
            for tensor, mask, before in kept:
                tensor.copy_(torch.where(mask, before, tensor))
        if scheduler:
            scheduler.step()
    return model, optimizer


# The run -------------------------------------------------------------------------------------------------------------


class Module(cases.Regression):
    """Sharded by FSDP2, over tensor parallelism if there is any."""

    rates: Any = None
    policy = MixedPrecisionPolicy()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        if (tensor := mesh["tensor_parallel"]).size() > 1:
            plan = {"0": ColwiseParallel(), "2.0": RowwiseParallel()}
            parallelize_module(self.network, tensor, plan)  # type: ignore[arg-type]
        for part in (self.network[2], self.network[4], self.network):
            fully_shard(part, mesh=mesh["data_parallel"], mp_policy=self.policy)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.network.parameters())
        return ([optimizer], [{"scheduler": self.rates(optimizer), "interval": "step"}]) if self.rates else optimizer


class Hybrid(Module):
    """Two copies, each over two ranks."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
        for part in (self.network[2], self.network[4], self.network):
            fully_shard(part, mesh=mesh)


class InPart(Module):
    """By tensor parallelism alone; what has no plan stays a plain parameter."""

    def configure_model(self) -> None:
        plan = {"0": ColwiseParallel(), "2.0": RowwiseParallel()}
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)  # type: ignore[index,arg-type]


class Sequences(Module):
    """By tensor parallelism alone; gradients of the norm's weights are sums that are still to be reduced."""

    def configure_model(self) -> None:
        plan = {
            "0": ColwiseParallel(),
            "2.0": RowwiseParallel(output_layouts=Shard(0)),
            "2.1": SequenceParallel(sequence_dim=0, use_local_output=False),
            "4": RowwiseParallel(input_layouts=Shard(0)),
        }
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)  # type: ignore[index,arg-type]


class Both(Sequences):
    """FSDP2 over tensor parallelism of all layers."""

    def configure_model(self) -> None:
        super().configure_model()
        assert self.device_mesh is not None
        for part in (self.network[2], self.network[4], self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Batches:
    """Those of this rank's replica: eight samples a step over all."""

    def __init__(self, rank: int, ranks: int, rise: float = 0.0) -> None:
        self.rank, self.ranks, self.rise = rank, ranks, rise

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[list[Tensor]]:
        x, y = samples(self.rise)
        own = SAMPLES // self.ranks
        for step in range(STEPS):
            start = SAMPLES * step + own * self.rank
            yield [x[start : start + own], y[start : start + own]]


class Look(pl.Callback):
    """Keeps what was frozen in each step, and what each rank has to keep; it looks at gradients and nobody knows."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback, self.masks, self.at_freeze = callback, list[Masks](), dict[str, Tensor]()
        self.kept, self.state_bytes, self.live_bytes = set[str](), list[int](), list[int]()
        self.without, self.before = set[str](), Masks()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        named = {name.removeprefix("network."): p for name, p in pl_module.named_parameters()}
        steps = trainer.global_step
        has_stepped = steps > len(self.masks)
        if has_stepped:
            self.masks += [self.before]
            self.before = named_whole(self.callback.frozen)
        if self.callback.phase != "frozen":
            return
        if not self.at_freeze:
            self.at_freeze = {name: whole(p.detach()).clone() for name, p in named.items()}
            return
        parts = {name.removeprefix("network."): local(mask) for name, mask in self.callback.frozen.items()}
        # Bundled ones are gathered together after a step's last pass.
        if has_stepped or compact.MAX_BUNDLED_NUMEL == 0:
            self.kept = {
                name for name, p in named.items() if getattr(Tensor, HIDDEN).__get__(p) is not None
            }  # past the watch
        self.without = {name for name, p in named.items() if not p.requires_grad}
        state = [v for entry in trainer.optimizers[0].state.values() for v in entry.values() if isinstance(v, Tensor)]
        self.state_bytes.append(sum(local(v).nbytes for v in state if v.dim()))
        self.live_bytes.append(sum(int((~mask).sum()) * 8 for mask in parts.values()))


def named_whole(named: Mapping[str, Tensor]) -> Masks:
    return {name.removeprefix("network."): whole(tensor.detach()).clone() for name, tensor in named.items()}


def fit(
    make: str = "AdamW",
    layout: tuple[int, int] = (RANKS, 1),
    kind: type[Module] = Module,
    rates: Any = None,
    trainer: Mapping[str, Any] | None = None,
    callbacks: tuple[Any, ...] = (),
    rise: float = 0.0,
    **arguments: Any,
) -> tuple[GradCovFreezeCallback, Module, Look]:
    """Train under a strategy; gradients kept between the steps and states are counted on each rank."""
    data, tensor = layout
    callback = GradCovFreezeCallback(**({"t0": T0, "seed": 3} | arguments))
    look, module = Look(callback), kind(network(), OPTIMIZERS[make])
    module.rates = rates
    strategy = ModelParallelStrategy(data, tensor, process_group_backend="gloo")
    lightning = cases.trainer(
        callbacks=[callback, look, *callbacks], devices=RANKS, strategy=strategy, use_distributed_sampler=False,
        max_epochs=1, **(trainer or {}),
    )  # fmt: skip
    replica = RANK if kind is Hybrid else RANK // tensor
    batches = Batches(replica, RANKS if kind is Hybrid else data, rise)
    lightning.fit(module, batches)
    return callback, module, look


def assert_is(module: nn.Module, expected: nn.Module, masks: Masks, start: Masks, tolerance: float = 1e-9) -> None:
    """Live elements are those of the loop by hand and have moved; frozen ones have the bits that they had."""
    moved = live = 0
    for name, p in expected.named_parameters():
        ours, mask = whole(module.get_parameter(name).detach()), masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        torch.testing.assert_close(ours, whole(p.detach()), rtol=tolerance, atol=tolerance, msg=name)
        same = flat_bits(ours) == flat_bits(start[name])
        assert same[mask.flatten()].all(), name
        moved, live = moved + int((~same).sum()), live + int((~mask).sum())
    assert 0 < moved == live


def assert_saves(look: Look, masks: Masks, make: str) -> None:
    """On this rank states are those of its live elements, and partly or wholly frozen parameters keep no gradient."""
    assert look.state_bytes[-1] == ENTRIES[make] * look.live_bytes[-1], (look.state_bytes, look.live_bytes)
    touched = {name for name, mask in masks.items() if mask.any()}
    assert not look.kept & touched, look.kept
    assert look.without == {name for name, mask in masks.items() if mask.all()}


@contextlib.contextmanager
def bundled(numel: int) -> Iterator[None]:
    """Set up to which size parameters travel together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "MAX_BUNDLED_NUMEL", numel)
        yield


def norm(parameters: Any) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 0.05)


def value(parameters: Any) -> None:
    torch.nn.utils.clip_grad_value_(parameters, 0.01)


def halving(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


NORM = {"gradient_clip_val": 0.05}
VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}


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


def differ(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.allclose(whole(p.detach()), whole(q.detach()), rtol=1e-6) for p, q in pairs)


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
        "grows": {"k": Growth(first=0.5, most=0.8, stages=2, every=1, max_loss_increase=0.9)},
        "grows too far": {"k": Growth(first=0.3, most=0.5, stages=2, every=1, max_loss_increase=1e-9), "rise": 1.0},
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


# Loops of one's own --------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------


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
    mixed_precision_is_that_of_restoring()
    gradients_that_are_seen_to_be_read_are_kept()
    loops_are_that_of_one_process()
    a_state_that_is_made_for_a_checkpoint_is_no_step()
    saving_is_no_step(f"{folder}/each")
