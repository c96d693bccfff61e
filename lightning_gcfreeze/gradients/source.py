"""Per-sample gradients of each optimizer step: by capture where that is correct, by replay elsewhere.

`comparison` finds out for which parameters capture is correct: at the first attempt, and again at the 2nd, 4th, 8th, …,
because a first batch may happen to have no padding, for example. A parameter for which capture and replay once differ
is replayed from then on.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.estimators import scratch
from lightning_gcfreeze.estimators.base import finite_batch_correction
from lightning_gcfreeze.estimators.per_sample import SquaredNoise, Stacked, one_by_one
from lightning_gcfreeze.gradients.capture import Capture
from lightning_gcfreeze.gradients.choice import Source, SourceChoice
from lightning_gcfreeze.gradients.comparison import Comparison
from lightning_gcfreeze.gradients.replay import Replay, TrainingStep
from lightning_gcfreeze.gradients.window import StepWindow


class SampleGradientsOfStep(NamedTuple):
    """The gradients on the first m samples of an optimizer step."""

    by_name: dict[str, SquaredNoise]
    """Of every parameter, in their order; `PerSample`s if ``keep_each``."""
    mean_is_g_batch: Collection[str]
    """Names for which g_S is known to be the mean of these gradients."""


class SampleGradients:
    """Follows the batches of an optimizer step, and computes the gradients on its first m samples at the end.

    What each step keeps, before its training step, depends on what may be needed at its end:

    | at the end of the step | the first sample | the whole batch | hooks on layers |
    | --- | --- | --- | --- |
    | they are compared: mode "auto", attempts 1, 2, 4, 8, … | yes | if there is BatchNorm or dropout | yes |
    | all parameters are captured | no | no | yes |
    | some are captured, the others replayed | yes | if m > 1 | yes |
    | all are replayed | yes | if m > 1 | no |

    Before the first attempt, after a captured parameter was missing once, and (where parameters are sharded) in the
    first step of a run, any parameter may have to be replayed. If the size of the batch is not certain, there are no
    hooks, and all are replayed.

    Args:
        mode: "replay"; "capture", with a replay for what cannot be captured, assuming that the loss is a mean over
            samples; or "auto", which compares the two.
        module: its state is left as it was.
        parameters: by name, those whose gradients are required.
        training_step: (batch, batch_idx) -> the loss, or a mapping with "loss", or None.
        context: returns a context manager that a training step has to run in.
        inform: takes a sentence, when the way in which gradients are computed changes.
        choice: what is known so far about capturing. Updated in place; another one may be assigned.
        n_samples: m; None: all samples of the first micro-batch.
        keep_each: whether each single gradient is needed, not only the sum of squared noise.
        world: all processes, where parameters are sharded: a replay needs all of them, so they decide together. None:
            each process decides for itself.
    """

    def __init__(
        self,
        mode: Source,
        module: nn.Module,
        parameters: Mapping[str, Parameter],
        training_step: TrainingStep,
        context: Callable[[], AbstractContextManager[None]],
        inform: Callable[[str], None],
        choice: SourceChoice,
        n_samples: int | None = 1,
        keep_each: bool = False,
        world: World | None = None,
    ) -> None:
        self.choice = choice
        self._mode, self._parameters = mode, parameters
        self._n_samples, self._keep_each, self._world = n_samples, keep_each, world
        self._cut_first: Callable[[Any], Any] | None = getattr(module, "gcfreeze_first_sample", None)
        self._replay = Replay(module, parameters, training_step, context)
        self._capture = None if mode == "replay" else Capture(module, parameters)
        self._comparison: Comparison | None = None
        if self._capture is not None and mode == "auto":
            self._comparison = Comparison(module, parameters, self._replay, self._capture, inform, world)
        self._pending: StepWindow | None = None  # the batch whose backward pass is to come
        self._window: StepWindow | None = None  # the batches since the last optimizer step
        self._is_first_step = True  # of this run

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Keep what will be needed of a batch. To be called before the training step of each micro-batch.

        Raises:
            UnclearBatchError: the batch cannot be cut, and the module has no `gcfreeze_first_sample`.
        """
        if self._window is not None:  # samples are those of the first micro-batch
            self._pending = StepWindow.of_batch(batch, batch_idx, False, False, self._cut_first)
            return
        choice, attempt = self.choice, self.choice.n_attempts + 1
        comparison = self._due_comparison(attempt)
        compares = comparison is not None
        is_known = attempt > 1 and (self._world is None or not self._is_first_step)
        may_replay = not is_known or choice.missed_once or len(choice.captured) < len(self._parameters)
        keep_batch = (may_replay and self._n_samples != 1) or (comparison is not None and comparison.needs_batch)
        self._pending = StepWindow.of_batch(batch, batch_idx, may_replay or compares, keep_batch, self._cut_first)
        size = self._pending.first_size
        if self._capture is not None and size is not None and (compares or choice.captured):
            factors: dict[str, float] = {}
            if size > 1 and not (compares or self._keep_each or self._n_samples == 1 or self._world is not None):
                factors = {name: float(size) if by == "mean" else 1.0 for name, by in choice.captured.items()}
            means = [name for name, by in choice.captured.items() if by == "mean"] if self._mode == "auto" else []
            self._capture.watch(size, self._count(size), factors, means)

    def begin_backward(self) -> None:
        """To be called right before the backward pass of each micro-batch."""
        if self._capture is not None:
            self._capture.begin_backward()

    def end_backward(self) -> bool:
        """Make the batch a part of the optimizer step. To be called after the backward pass of each micro-batch.

        Returns:
            Whether a batch was kept.
        """
        if self._capture is not None:
            self._capture.remove_hooks()
        batch, self._pending = self._pending, None
        if batch is None:
            return False
        if self._window is None:
            self._window = batch
        else:
            self._window.extend(batch)
        return True

    @property
    def batch_size(self) -> int | None:
        """Number of samples in the micro-batches of the step so far, in this process; None if it is unknown."""
        return None if self._window is None else self._window.batch_size

    def gradients(self, scale: float, g_batch: Named, batch_size: int | None) -> SampleGradientsOfStep | None:
        """Compute g_1 … g_m, and end the optimizer step. To be called once `end_backward` has returned True.

        Args:
            scale: the factor on the loss of the first micro-batch before the backward pass: a loss scale, 1/A.
            g_batch: g_S.
            batch_size: number of samples that g_S is the mean of, in all processes; None if it is unknown.

        Returns:
            None if a training step returned no loss on a sample, or if a layer was not called as in earlier steps, and
            its parameters can be neither captured nor replayed this time.
        """
        window, self._window = self._window, None
        assert window is not None
        choice, n_samples = self.choice, self._count(window.first_size)
        choice.n_attempts += 1
        if (comparison := self._due_comparison(choice.n_attempts)) is not None:
            comparison.run(choice, window, scale)
        found = self._captured(window, scale, g_batch, batch_size)
        names, leave_out = self._to_replay(found, g_batch, n_samples)
        mean_is_g_batch = set[str]()
        if self._mode == "auto" and n_samples == batch_size:
            mean_is_g_batch = {name for name, by in choice.captured.items() if by == "mean"}
        if names:
            if window.sample is None:
                return None
            try:
                samples = self._replayed(window, names, n_samples)
                found.update(one_by_one(samples, g_batch, self._keep_each or n_samples == 1))
            except _NoLossError:
                return None
        if leave_out:
            return None
        return SampleGradientsOfStep({name: found[name] for name in self._parameters}, mean_is_g_batch)

    def reset(self) -> None:
        """Forget the batches so far: they are no part of the next optimizer step."""
        self._pending = self._window = None
        if self._capture is not None:
            self._capture.reset()

    def close(self) -> None:
        """Free all memory: no further step is to be observed."""
        self.reset()
        if self._capture is not None:
            self._capture.close()
        scratch.release()

    def _count(self, size: int | None) -> int:
        """Return m for a batch of `size` samples."""
        if self._n_samples == 1 or size is None:
            return 1
        return size if self._n_samples is None else min(self._n_samples, size)

    def _captured(
        self, window: StepWindow, scale: float, g_batch: Named, batch_size: int | None
    ) -> dict[str, SquaredNoise]:
        if self._capture is None:
            return {}
        size = window.first_size
        factor = {"mean": (size or 0) / scale, "sum": 1 / scale}
        factors = {name: factor[reduction] for name, reduction in self.choice.captured.items()}
        # Noise that was added up during the backward pass is around the mean of this micro-batch, and not yet unscaled.
        sum_factor = 1.0 if size == 1 else finite_batch_correction(size, batch_size) ** 0.5 / scale
        return self._capture.gradients(factors, g_batch, self._keep_each, sum_factor)

    def _to_replay(self, found: dict[str, SquaredNoise], g_batch: Named, n_samples: int) -> tuple[list[str], bool]:
        """Choose the parameters to replay; those without a gradient get zeros in `found` instead.

        If parameters are sharded, a replay needs all processes, so all must replay the same parameters. In the first
        step of a run, which may be sharded otherwise than the run that it resumes, they agree to capture only what all
        of them have captured. From then on each replays exactly what is not to be captured. A process that misses more
        takes part in that, and then leaves the step out.

        Returns:
            Names, and whether the step must be left out.
        """
        captured = self.choice.captured
        if self._world is not None and self._is_first_step:
            n_missing = self._world.all_reduce_sum(torch.tensor([int(name not in found) for name in self._parameters]))
            for name, n in zip(self._parameters, n_missing.tolist(), strict=True):
                if n:
                    captured.pop(name, None)
        self._is_first_step = False
        for name, p in self._parameters.items():
            if name not in found and (p.grad is None or not p.requires_grad):  # then no sample has a gradient
                zeros = torch.zeros_like(g_batch[name])
                found[name] = Stacked(zeros.expand(n_samples, *zeros.shape))
        missing = [name for name in self._parameters if name not in found]
        missed = not captured.keys().isdisjoint(missing)
        if self._world is None:
            self.choice.missed_once = self.choice.missed_once or missed
            return missing, False
        return [name for name in self._parameters if missing and name not in captured], missed

    def _replayed(self, window: StepWindow, names: Collection[str], n_samples: int) -> Iterator[dict[str, Tensor]]:
        for index in range(n_samples):
            g = self._replay.gradient(window, index, names)
            if g is None:
                raise _NoLossError
            yield g

    def _due_comparison(self, attempt: int) -> Comparison | None:
        comparison = self._comparison
        return comparison if comparison is not None and comparison.is_due(self.choice, attempt) else None


class _NoLossError(Exception):
    """`training_step` returned no loss on a sample."""
