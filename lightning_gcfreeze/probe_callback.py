"""`ProbeCallback`: the front of `Probe` for Lightning."""

from collections.abc import Callable
from os import PathLike
from typing import Any, get_args

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_gcfreeze import _checks, _lightning, orderings, refusals
from lightning_gcfreeze._types import Granularity
from lightning_gcfreeze.probe import Probe


class ProbeCallback(_lightning.Callback):
    """Write masks from the gradients of some batches, in a short fit that trains nothing; see `Probe`:

        Trainer(callbacks=[ProbeCallback("masks.pt", k=0.9, batches=100)]).fit(module, data)
        Trainer(callbacks=[GradCovFreezeCallback(masks="masks.pt")], max_epochs=10).fit(module, data)

    The optimizer steps without any gradient, which leaves weights and its state as they are. Each micro-batch counts.

    Args:
        file: where to write the masks when the fit ends.
        k: how many eligible elements to freeze: an int is a count, a float in [0, 1] a fraction.
        batches: how many to take in; then the fit stops. None: all that the Trainer runs.
        order: see `Probe`.
        granularity: what freezes together: "element", "row", "tensor" or "mixed".
        include: patterns (fnmatch) of the parameter names that are eligible; None: all.
        exclude: patterns of the names that are not.
        seed: of the random order; None: torch's initial seed, as `seed_everything` sets it.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside its range.
        MisconfigurationException: when the fit starts, the strategy, the precision or the module cannot be served.
    """

    def __init__(
        self,
        file: str | PathLike[str],
        k: int | float,
        batches: int | None = None,
        *,
        order: orderings.Name | Callable[[orderings.Evidence], Any] = "progress",
        granularity: Granularity = "element",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.file, self.k = file, _checks.count_or_fraction("k", k)
        self.batches = _checks.integer_or_none("batches", batches, at_least=1)
        self.granularity: Granularity = granularity
        _checks.one_of("granularity", granularity, get_args(Granularity))
        orderings.resolve(order)
        self._options: dict[str, Any] = {"order": order, "include": include, "exclude": exclude, "seed": seed}
        self.probe: Probe | None = None
        """The probe of the last fit, kept after its end for `save_order` and other `k`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before the optimizers are made."""
        if stage == "fit":
            _lightning.refuse(refusals.unsupported_strategy(trainer.strategy))
            _lightning.refuse(refusals.unsupported_probe(pl_module.automatic_optimization, trainer.precision))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin. The strategy has wrapped or sharded the module by now."""
        model = trainer.strategy.model
        module: nn.Module = model if isinstance(model, DistributedDataParallel) else pl_module
        is_shared = trainer.world_size > 1
        self.probe = Probe(module, optimizer=trainer.optimizers[0], data_parallel=is_shared, **self._options)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Run before every micro-batch's backward pass; takes its gradients in as they arrive."""
        if self.probe:
            self.probe.begin_backward()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after enough batches. Runs after every micro-batch's backward pass."""
        if self.probe:
            self.probe.end_backward()
            trainer.should_stop |= self.probe.n_batches == self.batches

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the masks."""
        if self.probe:
            self.probe.save_masks(self.file, self.k, self.granularity)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        if self.probe:
            self.probe.close()
