"""After the decision: frozen elements stay constant, what that spares is spared, and counted."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.freezing import ELEMENTWISE, Compact, GradientSkipper, Restore, blocks_worth_it, savings

How: TypeAlias = Literal["compact", "restore"]


class Holder:
    """Keeps the elements of a decision at the values they have now, until `release`.

    Args:
        how: "compact" or "restore".
        optimizer: the one that steps the parameters; its state is that of all elements.
        module: what is trained.
        wrapper: what the strategy calls instead of it, if anything.
        parameters: the eligible ones, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; of a sharded one, for its local part.
        positions: by name of a weight, at how many places of a step's batch it is applied.
        promote: spare the work that frozen parameters, rows and columns do not need.
        late: leave all gradients where they are until the step; see `Compact`.
        puts_back: write frozen values back after each step, though no step moves them: others may write to weights.
        resumed: the optimizer knows of the decision already.
    """

    def __init__(
        self,
        how: How,
        optimizer: Optimizer,
        module: nn.Module,
        wrapper: nn.Module | None,
        parameters: Mapping[str, Parameter],
        frozen: Named,
        positions: Mapping[str, int],
        promote: bool,
        late: bool,
        puts_back: bool,
        resumed: bool,
    ) -> None:
        ddp = wrapper if isinstance(wrapper, DistributedDataParallel) else None
        before = savings.Footprint.of(optimizer)
        on_device = {name: mask.to(parameters[name].device) for name, mask in frozen.items()}
        blocks = blocks_worth_it(parameters, on_device, positions) if promote else {}
        self._holder: Compact | Restore
        leaf = None
        if how == "compact":
            self._holder = Compact(optimizer, parameters, on_device, early=ddp is None, alone=blocks, late=late)
            leaf = None if ddp else self._holder.leaf
        else:
            self._holder = Restore(parameters, on_device)
            if not resumed:
                self._holder.clear_state_(optimizer)
        self._taken, self._late = False, late
        self.puts_back = puts_back or how == "restore"
        """Whether frozen values are put back after each step."""
        self._values = Restore(parameters, on_device) if puts_back and how == "compact" else None
        self._promotion = None
        if promote:
            waits = ddp is not None and not ddp.find_unused_parameters
            stepped = {p for group in optimizer.param_groups for p in group["params"]}
            whole = {parameters[name] for name, mask in on_device.items() if mask.all()}
            # What looks at the gradients of all parameters, as clipping does, wants to see some.
            lets_go = type(optimizer) in ELEMENTWISE and (how == "compact" or not stepped <= whole)
            self._promotion = GradientSkipper(module, parameters, on_device, blocks, leaf, waits, lets_go)
        after = savings.Footprint.of(optimizer)  # all gradients, if they are taken late
        self.savings = savings.of_freeze(
            frozen,
            positions,
            blocks,
            self._promotion.without_gradient if self._promotion else {},
            before,
            replace(after, gradients=before.gradients) if ddp else after,  # its buckets stay
            self._holder.index_bytes + (self._values.index_bytes if self._values else 0),
        )

    def begin_step(self) -> None:
        """When the optimizer's gradients are set to zero: before the first backward pass of a step."""
        if isinstance(self._holder, Compact) and not self._late:
            self._holder.drop_gradients_()
            self._taken = False

    def begin_backward(self, loss: Tensor) -> None:
        """Before every backward pass."""
        if self._promotion:
            self._promotion.begin_backward(loss)

    def after_backward(self) -> None:
        """After the last backward pass of a step, before gradients are unscaled."""
        if isinstance(self._holder, Compact) and not self._late:
            self._holder.take_gradients_()
            self._taken = True

    def before_step(self) -> None:
        """Before gradients are clipped."""
        if isinstance(self._holder, Restore) or self._late:
            self._holder.mask_gradients_()
        else:
            if not self._taken:  # the last batch of the step had no loss
                self._holder.take_gradients_()
            self._holder.read_()

    def before_late_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In a hook on the optimizer's step, after all others; see `Compact`."""
        return self._holder.before_late_step(args, kwargs) if self._late and isinstance(self._holder, Compact) else None

    def after_step(self) -> None:
        """Right after the optimizer's step."""
        self._holder.restore_()
        if self._values:
            self._values.restore_()

    def after_batch(self, first: bool) -> None:
        """After a batch in which others may have written to weights since the step; `first`: that of the decision."""
        if holder := self._values or (self._holder if isinstance(self._holder, Restore) else None):
            if first:
                holder.take_values()
            else:
                holder.restore_()

    def release(self) -> None:
        """Leave module and optimizer as they were, but for the values."""
        if self._promotion:
            self._promotion.release()
        if isinstance(self._holder, Compact):
            self._holder.release()
