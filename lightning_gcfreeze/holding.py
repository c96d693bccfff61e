"""How to hold frozen elements: depends on the options, the optimizer, and on whose code reads gradients or weights."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch.nn import Parameter

from lightning_gcfreeze import refusals
from lightning_gcfreeze.freezing import HoldPlan
from lightning_gcfreeze.options import Options
from lightning_gcfreeze.surroundings import Surroundings
from lightning_gcfreeze.user_code import readers
from lightning_gcfreeze.user_code.reached import Owners


class Holding(NamedTuple):
    """What was found."""

    plan: HoldPlan
    sends_live_only: bool
    """Whether DistributedDataParallel needs the live elements' gradients only."""


def owners_of(around: Surroundings) -> Owners:
    """Return those whose code may look at gradients or weights."""
    return around.owners() if around.owners else Owners(around.module)


def refuse_compact(around: Surroundings) -> None:
    """Raise where ``hold="compact"`` was asked for, but the optimizer or other code needs all elements."""
    around.refuse(refusals.not_compactable(around.optimizer, around.module))
    around.refuse(refusals.optimizer_state_is_read(readers.optimizer_state_readers(owners_of(around))))


def plan_holding(
    options: Options,
    around: Surroundings,
    parameters: Mapping[str, Parameter],
    seen_reading: Sequence[str],
    whole_gradients: bool,
    in_trial: bool,
) -> Holding:
    """Decide how to hold frozen elements from now on.

    Args:
        options: the arguments of the run.
        around: the loop.
        parameters: the eligible ones, by name.
        seen_reading: code that was seen to ask for gradients; counts where reading the code finds nothing.
        whole_gradients: gradients of frozen elements are needed too, since more is observed.
        in_trial: a tuner tries steps: nothing is changed that it could not take back, and nothing is sent.
    """
    owners = owners_of(around)
    looking = [*around.readers, *readers.gradient_readers(owners, parameters, around.optimizer)]
    looking = looking or [*seen_reading]
    if not in_trial:  # what is sent depends on it
        looking = list(dict.fromkeys(name for found in around.world.all_gather_object(looking) for name in found))
    stays_simple = whole_gradients or in_trial
    compacts = False
    if options.hold != "restore" and not stays_simple:
        state_readers = readers.optimizer_state_readers(owners)
        compacts = not (state_readers or refusals.not_compactable(around.optimizer, around.module))
        if compacts and looking:
            around.inform(refusals.gradients_are_kept(looking))
        elif state_readers:
            around.inform(f"values are put back after each step. {refusals.optimizer_state_is_read(state_readers)}")
    plan = HoldPlan(
        mode="compact" if compacts else "restore",
        late=compacts and bool(looking),
        puts_back=bool(readers.weight_writers(owners, parameters, around.optimizer)),
        skips_gradients=options.skip_frozen_gradients and not (stays_simple or looking),
        stills_norms=options.batch_norm == "freeze",
    )
    return Holding(plan, sends_live_only=not (whole_gradients or looking))
