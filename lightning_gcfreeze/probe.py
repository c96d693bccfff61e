"""`Probe`: masks before any training, from the gradients of some batches, in less memory than training takes.

There is no optimizer and no step. As soon as a backward pass has computed a parameter's gradient, it is added to one or
two running statistics and freed, so at most one whole gradient exists at a time. With Adam, training holds four floats
an element: weight, gradient and two moments. A probe holds two or three.
"""

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze import _checks, masks, orderings, selection
from lightning_gcfreeze._computed import Computed
from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze._wrappers import unwrapped_module
from lightning_gcfreeze.decision import scored
from lightning_gcfreeze.distributed import SINGLE_PROCESS, Shards, World, local
from lightning_gcfreeze.estimators.scratch import wide
from lightning_gcfreeze.freezing import WeightUses, worth_cutting
from lightning_gcfreeze.gradients.batch import dense

_STATISTICS = {"mean": "mean", "recent_mean": "mean", "second_moment": "second_moment"}
"""What a probe gathers for the optional fields of `Evidence`. Weights stand still: no gradient is more recent."""


class Probe:
    """Rank the elements of a module by the gradients of some batches, before it is trained:

        with Probe(model) as probe:
            for batch in batches:
                probe.backward(loss_of(model, batch))
        probe.save_masks("masks.pt", k=0.9, granularity="row")

    Weights and buffers are left as they were. The statistics are those of the batches' gradients at these weights, so
    "variance" is the variance from batch to batch, 1/S of that of single samples if batches have S samples.

    Args:
        module: what is to be trained; also one wrapped in DistributedDataParallel or `fully_shard`.
        order: what to rank by, lowest first. "progress", "variance", "second_moment", "snr", "magnitude", "random",
            "reverse", or a callable that reads the variance, ``mean``, ``recent_mean`` or ``second_moment`` of
            `Evidence`. One statistic is kept for each of mean and second moment, two for the variance.
        optimizer: if it is given, only its parameters are eligible.
        include: patterns (fnmatch) of the parameter names that are eligible; None: all that require a gradient.
        exclude: patterns of the names that are not.
        seed: of the random order; None: torch's initial seed.
        data_parallel: whether each process probes the same model with batches of its own; None: if the module is
            wrapped or sharded. Then results are means over the processes, and all of them must call the same methods.

    Raises:
        ValueError: the order reads what only training can tell, or no parameter is eligible.
        RuntimeError: a parameter has a gradient already.
    """

    def __init__(
        self,
        module: nn.Module,
        order: orderings.Name | orderings.Ordering = "progress",
        *,
        optimizer: Optimizer | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        seed: int | None = None,
        data_parallel: bool | None = None,
    ) -> None:
        self._module, _, wrapper = unwrapped_module(module)
        self._ordering = orderings.resolve(order)
        if unknown := orderings.needed_by(self._ordering) - _STATISTICS.keys():
            raise ValueError(
                f"The order reads {', '.join(sorted(unknown))}, which only training can tell, and a probe does not"
                " train. Use `order='progress'` or 'variance', or let `GradCovFreezeCallback` observe with `t0`."
            )
        patterns = _checks.patterns("include", include), _checks.patterns("exclude", exclude)
        self._parameters = selection.eligible(self._module, optimizer, *patterns)
        is_sharded = Shards(self._parameters).is_sharded
        shares = wrapper is not None or is_sharded if data_parallel is None else data_parallel
        device = next(iter(self._parameters.values())).device
        self._shards = Shards(self._parameters, World.current(device) if shares else SINGLE_PROCESS)
        given = torch.initial_seed() % 2**63 if seed is None else _checks.integer("seed", seed, at_least=0)
        self._seed = self._shards.world.broadcast_object(given)
        trained = selection.trained(self._module, optimizer)
        if left := [name for name, p in trained.items() if p.grad is not None]:
            raise RuntimeError(
                f"{shortened(left)} have gradients already, which a probe would take for those of a batch. Set them to"
                " None first (`optimizer.zero_grad()`)."
            )
        kept = {_STATISTICS[field] for field in orderings.needed_by(self._ordering)}
        self._reads_variance = orderings.reads_variance(self._ordering)
        kept |= {"mean", "squared_noise"} if self._reads_variance else set()
        # Sorted: processes average one after the other, and the order of a set of strings is each process's own.
        self._statistics = {each: {n: _zeros(p) for n, p in self._parameters.items()} for each in sorted(kept)}
        self._uses = WeightUses(self._module, self._parameters)  # counted in the first batch
        self._uses.listen()
        self._buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        self.n_batches = 0
        """Batches that were taken in."""
        self._arrived: set[str] | None = None  # parameters whose gradients the backward pass at hand has computed
        self._is_averaged = False
        names = {p: name for name, p in self._parameters.items()}
        self._hooks = [p.register_post_accumulate_grad_hook(self._taking(names.get(p))) for p in trained.values()]
        self._wrapper = wrapper
        if wrapper is not None:  # gradients are not communicated: statistics are, once
            wrapper.require_backward_grad_sync = False

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def backward(self, loss: Tensor, *args: Any, backward: Callable[..., Any] = Tensor.backward, **kwargs: Any) -> None:
        """Run the backward pass of a batch's loss, and take its gradients in.

        Args:
            loss: the mean over the batch's samples, 0-dim.
            args: of `backward`.
            backward: what to call in place of ``loss.backward``, such as ``fabric.backward``.
            kwargs: of `backward`.

        Raises:
            RuntimeError: a gradient is not finite, or the probe is closed.
        """
        self.begin_backward()
        backward(loss, *args, **kwargs)
        self.end_backward()

    def begin_backward(self) -> None:
        """Do what has to happen right before a backward pass, where the loop runs that itself; see `backward`."""
        if not self._hooks:
            raise RuntimeError("This Probe is closed. Make a new one to take in more batches.")
        self.n_batches += 1
        self._arrived = set()

    @torch.no_grad()
    def end_backward(self) -> None:
        """Do what has to happen right after it."""
        arrived, self._arrived = self._arrived or set(), None
        self._uses.stop()
        for name in self._parameters.keys() - arrived:  # no part of this loss: a gradient of 0
            if self._reads_variance:
                p = self._parameters[name]
                self._add(name, torch.zeros((), dtype=p.dtype, device=p.device).expand_as(local(p)))
        sums = [statistic.sum() for named in self._statistics.values() for statistic in named.values()]
        if sums and not torch.stack([each.double() for each in sums]).isfinite().all():
            raise RuntimeError(
                f"A gradient of batch {self.n_batches} is not finite, so the statistics are lost. Probe without a loss"
                " scale, in bfloat16 or float32, and without the batches that lead to it."
            )

    def masks(self, k: int | float, granularity: Granularity = "element") -> dict[str, Tensor]:
        """Return the masks of the k lowest, ``{name: bool (*p.shape)}``, True = to be frozen; DTensors where sharded.

        Args:
            k: how many eligible elements: an int is a count, a float in [0, 1] a fraction.
            granularity: what freezes together: "element", "row", "tensor" or "mixed"; see `GradCovFreezeCallback`.

        Raises:
            RuntimeError: no batch was taken in.
        """
        return self._shards.wrapped(self._marked(k, granularity))

    def save_masks(self, file: str | PathLike[str], k: int | float, granularity: Granularity = "element") -> None:
        """Write these masks, for ``masks=file``; arguments as for `masks`."""
        masks.save_gathered(masks.save, self._marked(k, granularity), self._shards, file)

    def save_order(self, file: str | PathLike[str]) -> None:
        """Write the scores, from which ``masks=lowest(file, k)`` chooses any k."""
        masks.save_gathered(masks.save_order, self._scores("element"), self._shards, file)

    def close(self) -> None:
        """Leave the module as it was. What was found stays."""
        self._uses.stop()
        for hook in self._hooks:
            hook.remove()
        if self._hooks and self._wrapper is not None:
            self._wrapper.require_backward_grad_sync = True
        for name, buffer in self._module.named_buffers():
            if name in self._buffers:
                buffer.copy_(self._buffers[name])
        self._hooks, self._buffers = [], {}

    def _taking(self, name: str | None) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def take(p: Tensor) -> None:
            grad, p.grad = p.grad, None
            if self._arrived is None:
                raise RuntimeError("While a Probe is open, call `probe.backward(loss)` in place of `loss.backward()`.")
            if name is None:  # not eligible
                return
            if name in self._arrived:
                raise RuntimeError(
                    f"{name} received its gradient in several parts, as with reentrant activation checkpointing. Use"
                    " `use_reentrant=False`."
                )
            self._arrived.add(name)
            self._add(name, dense(self._parameters[name], grad))

        return take

    def _add(self, name: str, grad: Tensor) -> None:
        """Fold a gradient in; noise by Welford's recursion, so that a large mean cannot cancel it away."""
        statistics = {statistic: named[name] for statistic, named in self._statistics.items()}
        if "second_moment" in statistics:
            g = grad.to(statistics["second_moment"].dtype)
            statistics["second_moment"].addcmul_(g, g)
        if "squared_noise" in statistics:
            mean = statistics["mean"]
            difference = grad.to(mean.dtype) - mean
            mean.add_(difference, alpha=1 / self.n_batches)
            statistics["squared_noise"].addcmul_(difference, difference, value=1 - 1 / self.n_batches)
        elif "mean" in statistics:
            statistics["mean"].add_(grad)

    def _marked(self, k: int | float, granularity: Granularity) -> dict[str, Tensor]:
        """Return the masks of the local parts; see `masks`."""
        _checks.one_of("granularity", granularity, get_args(Granularity))
        shapes = {name: self._shards.shape(name, p) for name, p in self._parameters.items()}
        count = selection.resolve_count(_checks.count_or_fraction("k", k), sum(s.numel() for s in shapes.values()))
        scores = self._scores(granularity)
        if granularity == "mixed":
            costs = worth_cutting(self._parameters, self._uses.uses_per_step)
            scores = dict(selection.in_blocks(scores, count, costs))
        found = selection.lowest_k(scores, count, granularity, self._shards)
        self._warn_of_dead(found, count)
        return found

    @torch.no_grad()
    def _scores(self, granularity: Granularity) -> Named:
        """Return the scores of elements, or the mean scores of units, of the local parts."""
        if not self.n_batches:
            raise RuntimeError("The probe has seen no batch. Call `probe.backward(loss)` for some first.")
        if self._hooks:
            self.close()
        if not self._is_averaged:
            self._is_averaged = True
            divisors = {"squared_noise": max(self.n_batches - 1, 1), "second_moment": self.n_batches}
            divisors["mean"] = 1 if self._reads_variance else self.n_batches
            for statistic, named in self._statistics.items():
                for tensor in named.values():
                    tensor.div_(divisors[statistic])
                self._shards.mean_over_replicas_(named)
        read = {statistic: Computed.of(named) for statistic, named in self._statistics.items()}
        weights = {name: local(p.detach()) for name, p in self._parameters.items()}
        evidence = orderings.Evidence(
            read.get("squared_noise", {}),
            Computed.of(weights),
            self._seed,
            granularity=granularity,
            shards=self._shards,
            **{field: read[_STATISTICS[field]] for field in orderings.needed_by(self._ordering)},
        )
        return scored(self._ordering, evidence, weights)

    def _warn_of_dead(self, found: Mapping[str, Tensor], count: int) -> None:
        statistic = self._statistics.get("second_moment") or self._statistics.get("squared_noise")
        named = statistic or self._statistics.get("mean") or {}
        idle = {name: mask & (named[name] == 0) for name, mask in found.items() if name in named}
        dead = sum(self._shards.n_marked(idle).values())
        if dead > 0.1 * count:
            warnings.warn(
                f"Probe: {dead:,} of the {count:,} lowest elements had no gradient in the {self.n_batches} batches"
                " (unseen embedding rows, dead units, unused parameters). They rank lowest because of that. Probe more"
                " batches, or keep them trainable with `exclude`.",
                stacklevel=4,
            )


def _zeros(p: Parameter) -> Tensor:
    return torch.zeros(local(p).shape, dtype=wide(p.dtype), device=p.device)
