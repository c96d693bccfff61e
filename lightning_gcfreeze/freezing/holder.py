"""After the decision: hold frozen elements constant, skip the work they do not need, and count what that saves."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import is_sharded
from lightning_gcfreeze.freezing.blocks import Block, blocks_worth_it, small_blocks, worth_it
from lightning_gcfreeze.freezing.compact import Compact
from lightning_gcfreeze.freezing.optimizer_state import ELEMENTWISE
from lightning_gcfreeze.freezing.restore import Restore
from lightning_gcfreeze.freezing.savings import Footprint, Savings, count_savings
from lightning_gcfreeze.freezing.skipping import GradientSkipper
from lightning_gcfreeze.freezing.still_norms import StillNorms

HoldMode: TypeAlias = Literal["compact", "restore"]


@dataclass(frozen=True)
class HoldPlan:
    """How frozen elements are held, and what is skipped: chosen by the optimizer, and by what other code reads."""

    mode: HoldMode
    """Either "compact", the optimizer receives only the live elements, or "restore", frozen values are put back."""
    late: bool
    """With "compact": the optimizer has its ordinary parameters between steps, and gradients stay where they are."""
    puts_back: bool
    """Frozen values are also written back although the optimizer never moves them: other code may write to weights."""
    skips_gradients: bool
    """No gradient work is done for fully frozen parameters, rows and columns."""
    stills_norms: bool = False
    """BatchNorm layers whose weight and bias are fully frozen use their stored statistics, and do not update them."""


class Holder:
    """Holds the elements of a decision at the values they have now, until `release`.

    Args:
        plan: how they are held.
        optimizer: the optimizer of the parameters; its state has the ordinary shapes.
        module: the module that is trained.
        wrapper: what the strategy calls in place of the module, if anything.
        parameters: the eligible parameters, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; for a sharded parameter, of its local part.
        uses_per_step: how often a step uses each weight, by name; see `WeightUses`.
        resumed: the optimizer's state was saved with these elements frozen.
        n_frozen: by name, how many elements are frozen, on all processes; needed where parameters are sharded.
        unknown_uses: names of weights whose uses will be known after a first step; see `learn_uses`.
    """

    def __init__(
        self,
        plan: HoldPlan,
        optimizer: Optimizer,
        module: nn.Module,
        wrapper: nn.Module | None,
        parameters: Mapping[str, Parameter],
        frozen: Named,
        uses_per_step: Mapping[str, int],
        resumed: bool,
        n_frozen: Mapping[str, int] | None = None,
        unknown_uses: Collection[str] = (),
    ) -> None:
        ddp = wrapper if isinstance(wrapper, DistributedDataParallel) else None
        self._optimizer, self._parameters, self._uses_ddp = optimizer, parameters, ddp is not None
        self._before = Footprint.of(optimizer)
        on_device = {name: mask.to(parameters[name].device) for name, mask in frozen.items()}
        n_frozen = n_frozen or {name: int(mask.count_nonzero()) for name, mask in frozen.items()}
        fully_frozen = [name for name in frozen if n_frozen[name] == parameters[name].numel()]  # on all processes
        whole = {name: mask for name, mask in on_device.items() if not is_sharded(parameters[name])}
        blocks = blocks_worth_it(parameters, whole, uses_per_step) if plan.skips_gradients else {}
        self._undecided = small_blocks(parameters, whole, unknown_uses) if plan.skips_gradients else {}
        self._compact: Compact | None = None
        self._restore: Restore | None = None
        if plan.mode == "compact":
            unbundled = {*blocks, *self._undecided}
            self._compact = Compact(optimizer, parameters, on_device, ddp is None, unbundled, plan.late, n_frozen)
        if plan.mode == "restore" or plan.puts_back:
            self._restore = Restore(parameters, on_device)
            if plan.mode == "restore" and not resumed:
                self._restore.clear_state_(optimizer)
        self._norms = StillNorms(module, {n: parameters[n] for n in fully_frozen} if plan.stills_norms else {})
        self._late = plan.late
        self._gathered = False  # this step's gradients
        self._skipper = None
        if plan.skips_gradients:
            leaf = self._compact.leaf if self._compact and not ddp else None
            stepped = {p for group in optimizer.param_groups for p in group["params"]}
            # Code that reads the gradients of all parameters, as clipping does, fails if there are none.
            some_live = not stepped <= {parameters[name] for name in fully_frozen}
            skip_whole = type(optimizer) in ELEMENTWISE and (plan.mode == "compact" or some_live)
            waits = ddp is not None and not ddp.find_unused_parameters
            skipped = fully_frozen if skip_whole else []
            self._skipper = GradientSkipper(module, parameters, skipped, blocks, leaf, waits)
        self.savings = self._count_savings(frozen, uses_per_step, blocks)

    def learn_uses(self, frozen: Named, uses_per_step: Mapping[str, int]) -> None:
        """Skip what is known to be worth it after a first step, and count the savings again.

        Args:
            frozen: the masks, as before.
            uses_per_step: how often the step used each weight, by name.
        """
        blocks, self._undecided = worth_it(self._undecided, self._parameters, uses_per_step), {}
        if self._skipper:
            self._skipper.skip_outside_of(blocks)
        if self._compact:
            n_without_state = sum(int(mask.count_nonzero()) for mask in frozen.values())
        else:
            n_without_state = sum(p.numel() for p in self._skipper.without_gradient.values()) if self._skipper else 0
        state = Footprint.of(self._optimizer).if_live(self._optimizer, n_without_state)
        self._before = replace(self._before, state=state)
        self.savings = self._count_savings(frozen, uses_per_step, blocks)

    def _count_savings(self, frozen: Named, uses_per_step: Mapping[str, int], blocks: Mapping[str, Block]) -> Savings:
        # All gradients, if they are gathered late.
        with self._compact.vectors_in() if self._compact and not self._late else nullcontext():
            after = Footprint.of(self._optimizer)
        return count_savings(
            frozen,
            uses_per_step,
            blocks,
            self._skipper.without_gradient if self._skipper else {},
            self._before,
            replace(after, gradients=self._before.gradients) if self._uses_ddp else after,  # DDP's buckets stay
            sum(part.index_bytes for part in (self._compact, self._restore) if part),
        )

    @property
    def takes_gradients(self) -> bool:
        """Whether gradients are taken away from the parameters, or some are not computed."""
        return self._skipper is not None or (self._compact is not None and not self._late)

    @property
    def puts_back(self) -> bool:
        """Whether frozen values are put back after each step."""
        return self._restore is not None

    def begin_step(self) -> None:
        """Run when the optimizer's gradients are set to zero: before the first backward pass of a step."""
        if self._compact and not self._late:
            self._compact.begin_step()
            self._gathered = False

    def begin_backward(self, loss: Tensor) -> None:
        """Run before every backward pass."""
        if self._skipper:
            self._skipper.begin_backward(loss)

    def after_backward(self) -> None:
        """Run after the last backward pass of a step, before gradients are unscaled."""
        if self._compact and not self._late:
            self._compact.gather_gradients_()
            self._gathered = True

    def before_step(self) -> None:
        """Run before gradients are clipped."""
        if self._compact and not self._late:
            if not self._gathered:  # the last batch of the step had no loss
                self._compact.gather_gradients_()
            self._compact.gather_values_()
        elif masked := self._compact or self._restore:
            masked.mask_gradients_()

    def before_update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run in a pre-hook of the optimizer's step, after all other hooks; see `Compact.before_update`."""
        return self._compact.before_update(args, kwargs) if self._compact else None

    def after_step(self) -> None:
        """Run right after the optimizer's step."""
        if self._compact:
            self._compact.scatter_values_()
        if self._restore:
            self._restore.restore_()

    def after_batch(self, first: bool) -> None:
        """Run after a batch if other code may have written to weights since the step.

        Args:
            first: whether this is the batch of the decision; its written values are the ones to hold.
        """
        if self._restore:
            if first:
                self._restore.take_values()
            else:
                self._restore.restore_()

    def release(self) -> None:
        """Leave module and optimizer as they were before, except for the values."""
        self._norms.release()
        if self._skipper:
            self._skipper.release()
        if self._compact:
            self._compact.release()
