"""Single samples' gradients of each optimizer step: by capture where that is right, by replay elsewhere.

What capture finds is a sample's share of the batch's gradient: g_j / S if the loss is a mean over samples that do not
interact, g_j if it is their sum, and neither if it is, say, a mean over all tokens that are not padding. So both are
compared on the first sample, parameter by parameter: at the first try, and again at the 2nd, 4th, 8th, …, because a
first batch may happen to have no padding. A parameter for which they ever differ is replayed from then on.

Where BatchNorm makes samples interact or dropout draws other random numbers for one sample than for a batch, the
comparison is between two extra passes, with BatchNorm's running statistics and without dropout.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_gcfreeze import _modules
from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.estimators.base import finite_batch_correction
from lightning_gcfreeze.estimators.per_sample import PerSample, Stacked, one_by_one
from lightning_gcfreeze.gradients.capture import Capture
from lightning_gcfreeze.gradients.replay import Replay, Window

How = Literal["replay", "capture", "auto"]
Reduction = Literal["mean", "sum"]


class Decided(TypedDict):
    """How gradients are had, in numbers and strings."""

    tries: int
    captured: dict[str, Reduction]
    replayed: list[str]  # for good
    missed: bool  # whether the pass of a step did not show what was to be captured


class Gradients(NamedTuple):
    """Of the first m samples of an optimizer step."""

    by_name: dict[str, PerSample]
    centred: Collection[str]
    """Names for which g_S is known to be their mean."""


class SampleGradients:
    """Follows the batches of an optimizer step, and has the gradients of its first m samples at its end.

    Args:
        how: "replay"; "capture", with replay for what it cannot see, and trusting that the loss is a mean over samples;
            or "auto", as above.
        module: whose state must not change.
        parameters: by name, those whose gradient is wanted.
        step: (batch, batch_idx) -> what `training_step` returns.
        context: what the step has to run in.
        tell: takes a sentence, when it is decided how the gradients are had.
        count: m; None: all samples of the first micro-batch.
        singly: whether each single gradient is needed, not only the sum of squared noise.
        total: adds up over processes, where parameters are sharded: there a replay takes all of them, so all decide as
            one. None: each decides for itself.
    """

    def __init__(
        self,
        how: How,
        module: nn.Module,
        parameters: Mapping[str, Parameter],
        step: Callable[[Any, int], Tensor | Mapping[str, Any] | None],
        context: Callable[[], AbstractContextManager[None]],
        tell: Callable[[str], None],
        count: int | None = 1,
        singly: bool = False,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._total, self._is_first = total, True  # step of this run
        self._how, self._module, self._parameters, self._tell = how, module, parameters, tell
        self._count, self._singly = count, singly
        self._replay = Replay(module, parameters, step, context)
        self._capture = Capture(module, parameters) if how != "replay" else None
        self.decided: Decided = {
            "tries": 0,
            "captured": dict.fromkeys(parameters, "mean") if how == "capture" else {},
            "replayed": [],
            "missed": False,
        }
        """What a continued run has to go on with."""

    def keep(self, batch: Any, batch_idx: int) -> None:
        """Before a batch of a step that is to be observed: see `Replay.keep`."""
        if not self._replay.between_steps:  # g_1 is of the first
            self._replay.keep(batch, batch_idx, sample=False)
            return
        decided, number = self.decided, self.decided["tries"] + 1
        compares = self._compares(number)
        known = number > 1 and not (self._total and self._is_first)
        replays = not known or decided["missed"] or len(decided["captured"]) < len(self._parameters)
        self._replay.keep(
            batch,
            batch_idx,
            sample=replays or compares,
            whole=(replays and self._count != 1) or (compares and self._is_random),
        )
        size = self._replay.size_at_hand
        if self._capture is not None and size is not None and (compares or decided["captured"]):
            factors: dict[str, float] = {}
            if size > 1 and not (compares or self._singly or self._count == 1 or self._total):
                factors = {name: float(size) if by == "mean" else 1.0 for name, by in decided["captured"].items()}
            means = [name for name, by in decided["captured"].items() if by == "mean"] if self._how == "auto" else []
            self._capture.listen(size, self._count_of(size), factors, means)

    def join(self) -> bool:
        """After a batch's backward: see `Replay.join`."""
        if self._capture is not None:
            self._capture.stop()
        return self._replay.join()

    def forget(self) -> None:
        """What was kept is not part of the next optimizer step."""
        self._replay.forget()
        if self._capture is not None:
            self._capture.forget()

    def share(self, world: World) -> None:
        """Know the same on all processes: to be captured is what all of them capture."""
        if world.size == 1:
            return
        of_all: list[Decided] = world.all_gather_object(self.decided)
        captured = set.intersection(*(set(other["captured"].items()) for other in of_all))
        replayed = set().union(*(other["replayed"] for other in of_all))
        self.decided["captured"] = {n: by for n, by in self.decided["captured"].items() if (n, by) in captured}
        self.decided["replayed"] = [name for name in self._parameters if name in replayed]
        self.decided["missed"] = any(other["missed"] for other in of_all)

    def release(self) -> None:
        """No step is to be observed any more."""
        self.forget()
        if self._capture is not None:
            self._capture.release()

    def begin_backward(self) -> None:
        """Right before a batch's backward."""
        if self._capture is not None:
            self._capture.begin_backward()

    def take(self) -> Window:
        """End the optimizer step: its window, to be given to `gradients`."""
        return self._replay.take()

    def gradients(
        self, window: Window, scale: float, g_batch: Named, batch_size: int | None = None
    ) -> Gradients | None:
        """g_1 … g_m.

        Args:
            window: the optimizer step.
            scale: what the first micro-batch's loss was multiplied by before backward: a loss scale, 1/A.
            g_batch: g_S.
            batch_size: S, of all that g_S is a mean of, if it is known.

        Returns:
            None if a training step returned no loss on a sample, or if a layer, this once, was not called as before.
        """
        decided = self.decided
        decided["tries"] += 1
        size = window.first_size
        found: dict[str, PerSample] = {}
        if self._capture is not None:
            if self._compares(decided["tries"]):
                self._compare(window, scale)
            by = {"mean": (size or 0) / scale, "sum": 1 / scale}
            factors = {name: by[reduction] for name, reduction in decided["captured"].items()}
            # What was added up in the pass is around the mean of this micro-batch, and nothing was divided yet.
            of_sums = 1.0 if size == 1 else finite_batch_correction(size, batch_size) ** 0.5 / scale
            found = self._capture.gradients(factors, g_batch, self._singly, of_sums)
        if self._total is not None and self._is_first:  # a run that goes on may be sharded in another way
            unseen = self._total(torch.tensor([int(name not in found) for name in self._parameters]))
            for name, count in zip(self._parameters, unseen.tolist(), strict=True):
                if count:
                    decided["captured"].pop(name, None)
        self._is_first = False
        whole = self._how == "auto" and batch_size is not None and self._count_of(size) == batch_size
        centred = {name for name, by in decided["captured"].items() if by == "mean"} if whole else set()
        for name, p in self._parameters.items():
            if name not in found and (p.grad is None or not p.requires_grad):  # then no sample has a gradient
                zeros = torch.zeros_like(g_batch[name])
                found[name] = Stacked(zeros.expand(self._count_of(size), *zeros.shape))
        if missing := [name for name in self._parameters if name not in found]:
            missed = not decided["captured"].keys().isdisjoint(missing)
            if self._total is None:
                decided["missed"] = decided["missed"] or missed
            else:  # all processes replay the same
                missing = [name for name in self._parameters if name not in decided["captured"]]
            if missing:
                if window.sample is None:
                    return None
                try:
                    found.update(self._replayed(window, missing, g_batch))
                except _NoLossError:
                    return None
            if missed and self._total is not None:
                return None
        return Gradients({name: found[name] for name in self._parameters}, centred)

    def _count_of(self, size: int | None) -> int:
        """m, in a batch of S."""
        if self._count == 1 or size is None:
            return 1
        return size if self._count is None else min(self._count, size)

    def _replayed(self, window: Window, names: Collection[str], g_batch: Named) -> dict[str, PerSample]:
        count = self._count_of(window.first_size)

        def one_after_another() -> Iterator[dict[str, Tensor]]:
            for index in range(count):
                g = self._replay.gradient(window, names, index=index)
                if g is None:
                    raise _NoLossError
                yield g

        return one_by_one(one_after_another(), g_batch, self._singly or count == 1)

    def _compares(self, number: int) -> bool:
        """Whether a try is one of the 1st, 2nd, 4th, 8th, …, and there is anything to compare."""
        is_due = number & (number - 1) == 0
        return self._how == "auto" and is_due and len(self.decided["replayed"]) < len(self._parameters)

    def _compare(self, window: Window, scale: float) -> None:
        """Decide which parameters' gradients can be captured."""
        assert self._capture is not None
        size = window.first_size
        capture = self._capture
        before = None
        try:
            if size is None:
                raise ValueError("its size is not known")
            if self._is_random:
                if window.batch is None:
                    raise ValueError("it cannot be copied")
                capture, scale, before = Capture(self._module, self._parameters), 1.0, self._calm
                capture.listen(size, 1)
                self._replay.of_batch(window.batch, window.batch_idx, before=before, after=capture.begin_backward)
        except Exception as error:  # replay is right in any case
            self.decided["captured"].clear()
            self.decided["replayed"][:] = self._parameters
            self._tell(f"g_1 is had by replay: `training_step` cannot take the batch for a comparison ({error!r}).")
            return
        finally:
            capture.stop()
        alone = self._replay.gradient(window, before=before)
        reductions: dict[Reduction, float] = {"mean": size / scale, "sum": 1 / scale}
        names, tolerances = list(self._parameters), dict[str, float]()
        rows = torch.full((len(names), 4), torch.inf, dtype=torch.float64)  # what is not seen is not captured
        alone = alone or {}
        for i, expected in enumerate(alone.values()):
            rows[i, 3] = float(expected.norm()) ** 2
        for name, share, tolerances[name] in capture.shares() if alone else ():
            apart = [float((share * factor - alone[name]).norm()) ** 2 for factor in reductions.values()]
            rows[names.index(name), :3] = torch.tensor([*apart, float(share.norm()) ** 2])
        self._decide(names, rows if self._total is None else self._total(rows), tolerances, list(reductions))

    def _decide(
        self, names: Sequence[str], squares: Tensor, tolerances: Mapping[str, float], reductions: Sequence[Reduction]
    ) -> None:
        """From squared norms by parameter: of distances, one for each reduction, the share and what it should be."""
        if not squares[:, -1].isfinite().all():
            return
        captured, replayed = self.decided["captured"], self.decided["replayed"]
        already = set(captured)
        largest = float(squares[:, -1].max()) ** 0.5
        for name, (*of_distances, share, expected) in zip(names, squares.sqrt().tolist(), strict=True):
            if name in replayed or not math.isfinite(share) or not (expected or share):
                continue  # nothing to compare
            distances = dict(zip(reductions, of_distances, strict=True))
            nearest: Reduction = "mean" if distances["mean"] <= distances["sum"] else "sum"
            by, tolerance = captured.get(name, nearest), tolerances[name]
            # What is zero but for rounding, as a bias that softmax cancels, may differ from itself by all of it.
            if distances[by] <= max(tolerance * expected, tolerance**2 * largest):
                captured[name] = by
            else:
                replayed.append(name)
                captured.pop(name, None)
        if self.decided["tries"] == 1 or set(captured) != already:
            self._tell(self._sentence())

    @property
    def _is_random(self) -> bool:
        """Whether a sample alone goes through a layer in another way than in its batch."""
        return any(
            layer.training
            and (
                isinstance(layer, _modules.BatchNorm)
                or (isinstance(layer, _modules.Dropout) and layer.p > 0)
                or (isinstance(layer, nn.RNNBase | nn.MultiheadAttention) and layer.dropout > 0)
            )
            for layer in self._module.modules()
        )

    def _sentence(self) -> str:
        captured, replayed = self.decided["captured"], self.decided["replayed"]
        others = [name for name in self._parameters if name not in captured]
        if not others:
            return "g_1 is captured from the batch's own pass for all parameters."
        reasons = {
            "the two differ": replayed,
            "not seen by capture, or zero so far": [name for name in others if name not in replayed],
        }
        listing = "; ".join(f"{why}: {shortened(names)}" for why, names in reasons.items() if names)
        return (
            f"g_1 is captured from the batch's own pass for {len(captured)} of {len(self._parameters)} parameters, and"
            f" had by replay for the others ({listing})."
        )

    def _calm(self) -> None:
        """Leave no random numbers in the passes that are compared."""
        for layer in self._module.modules():
            if isinstance(layer, _modules.Dropout):
                layer.training = False
            elif isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
                layer.dropout = 0.0


class _NoLossError(Exception):
    """`training_step` returned no loss on a sample."""
