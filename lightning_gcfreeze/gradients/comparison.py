"""Tests, parameter by parameter, whether captured gradients are those of a replay.

What capture finds is a sample's share of the batch's gradient: g_j / S if the loss is a mean over samples that do not
interact, g_j if it is their sum, and neither if it is, say, a mean over all tokens that are not padding. So the first
sample's share, times S or 1, is compared with the gradient by replay.

Where BatchNorm makes samples interact, or dropout draws other random numbers for one sample than for a batch, the
comparison is between two extra passes, with BatchNorm's running statistics and without dropout.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_gcfreeze import _modules
from lightning_gcfreeze._computed import cuts
from lightning_gcfreeze._names import shortened
from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.gradients.capture import Capture
from lightning_gcfreeze.gradients.choice import Reduction, SourceChoice
from lightning_gcfreeze.gradients.replay import Replay
from lightning_gcfreeze.gradients.window import StepWindow

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

_log = logging.getLogger(__name__)


class Comparison:
    """Compares capture with replay on the first sample of a step, and updates a `SourceChoice` accordingly.

    Args:
        module: the module that is trained.
        parameters: by name, those whose gradients are required.
        replay: computes gradients by replay.
        capture: holds what was captured in the step.
        inform: takes a sentence, when it changes which gradients are captured, and a pass more is needed.
        world: all processes, where parameters are sharded: then distances are those of whole gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Parameter],
        replay: Replay,
        capture: Capture,
        inform: Callable[[str], None],
        world: World | None = None,
    ) -> None:
        self._module, self._parameters, self._replay, self._capture = module, parameters, replay, capture
        self._inform, self._world = inform, world

    def is_due(self, choice: SourceChoice, attempt: int) -> bool:
        """Return whether `attempt` is one of 1, 2, 4, 8, … and there is a parameter left that may be captured."""
        return attempt & (attempt - 1) == 0 and len(choice.replayed) < len(self._parameters)

    @property
    def needs_batch(self) -> bool:
        """Whether one sample alone takes another way through some layer than in its batch."""
        return any(
            layer.training
            and (
                isinstance(layer, _modules.BatchNorm)
                or (isinstance(layer, _modules.Dropout) and layer.p > 0)
                or (isinstance(layer, nn.RNNBase | nn.MultiheadAttention) and layer.dropout > 0)
            )
            for layer in self._module.modules()
        )

    def run(self, choice: SourceChoice, window: StepWindow, scale: float) -> None:
        """Decide which parameters' gradients are captured.

        Args:
            choice: updated in place.
            window: the step. It has its first sample, and its first batch if `needs_batch`.
            scale: the factor on the loss of the first micro-batch before the backward pass.
        """
        capture, size, prepare_module = self._capture, window.first_size, None
        try:
            if size is None:
                raise ValueError("the number of its samples is not known")
            if self.needs_batch:
                if window.batch is None:
                    raise ValueError("it cannot be copied")
                capture, scale, prepare_module = Capture(self._module, self._parameters), 1.0, self._disable_dropout
                capture.watch(size, 1)
                self._replay.on_batch(
                    window.batch,
                    window.batch_idx,
                    prepare_module=prepare_module,
                    before_backward=capture.begin_backward,
                    take=lambda name, gradient: None,
                )
        except Exception as error:  # a replay is correct in any case
            choice.captured.clear()
            choice.replayed[:] = self._parameters
            self._inform(
                "Per-sample gradients are computed by replaying `training_step` on single samples, for all parameters:"
                f" `training_step` cannot run on the batch again for a comparison with capture ({error!r})."
            )
            return
        finally:
            capture.remove_hooks()
        shares = capture.first_shares()
        squares = self._distances(shares, window, prepare_module, {"mean": size / scale, "sum": 1 / scale})
        if squares[:, -1].isfinite().all():
            self._update(choice, squares.sqrt().tolist(), {name: tolerance for name, (_, tolerance) in shares.items()})

    def _distances(
        self,
        shares: Mapping[str, tuple[Callable[[], Tensor], float]],
        window: StepWindow,
        prepare_module: Callable[[], None] | None,
        factors: Mapping[Reduction, float],
    ) -> Tensor:
        """Compare shares with replayed gradients, each as soon as it is replayed: no two of them need be in memory.

        Returns:
            Squared norms, float64, (parameters, 4): the distance for a mean and for a sum, the share, the expected
            gradient; infinite where something is missing.
        """
        rows = {name: [math.inf] * (len(REDUCTIONS) + 2) for name in self._parameters}

        def compare(name: str, expected: Tensor) -> None:
            rows[name][-1] = _squared_norm(cut(expected) for cut in cuts(expected))
            if name in shares:
                share = shares[name][0]()
                pieces = list(cuts(expected))
                rows[name][:-1] = [
                    *(_squared_norm(cut(share) * factors[by] - cut(expected) for cut in pieces) for by in REDUCTIONS),
                    _squared_norm(cut(share) for cut in pieces),
                ]

        self._replay.gradient(window, prepare_module=prepare_module, take=compare)
        squares = torch.tensor(list(rows.values()), dtype=torch.float64)
        return squares if self._world is None else self._world.all_reduce_sum(squares)

    def _update(self, choice: SourceChoice, norms: list[list[float]], tolerances: Mapping[str, float]) -> None:
        """Capture where the nearest reduction, or the one known from before, is within the tolerance; else replay."""
        before = set(choice.captured)
        largest = max(row[-1] for row in norms)
        for name, (*distances, share, expected) in zip(self._parameters, norms, strict=True):
            if name in choice.replayed or not math.isfinite(share) or not (expected or share):
                continue  # nothing to compare
            by_reduction = dict(zip(REDUCTIONS, distances, strict=True))
            nearest: Reduction = "mean" if by_reduction["mean"] <= by_reduction["sum"] else "sum"
            reduction, tolerance = choice.captured.get(name, nearest), tolerances[name]
            # A gradient that is zero up to rounding, as of a bias that softmax cancels, may differ by all of itself.
            if by_reduction[reduction] <= max(tolerance * expected, tolerance**2 * largest):
                choice.captured[name] = reduction
            else:
                choice.replayed.append(name)
                choice.captured.pop(name, None)
        if choice.n_attempts == 1 or set(choice.captured) != before:
            is_whole = len(choice.captured) == len(self._parameters)
            (_log.debug if is_whole else self._inform)(self._sentence(choice))

    def _sentence(self, choice: SourceChoice) -> str:
        others = [name for name in self._parameters if name not in choice.captured]
        captured = "Per-sample gradients are captured by layer hooks during the normal backward pass"
        if not others:
            return f"{captured}, for all parameters."
        reasons = {
            "capture and replay differ": [name for name in others if name in choice.replayed],
            "not seen by a layer hook, or zero so far": [name for name in others if name not in choice.replayed],
        }
        listing = "; ".join(f"{reason}: {shortened(names)}" for reason, names in reasons.items() if names)
        return (
            f"{captured}, for {len(choice.captured)} of {len(self._parameters)} parameters. For the others they are"
            f" computed by replaying `training_step` on single samples ({listing})."
        )

    def _disable_dropout(self) -> None:
        for layer in self._module.modules():
            if isinstance(layer, _modules.Dropout):
                layer.training = False
            elif isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
                layer.dropout = 0.0


def _squared_norm(pieces: Iterable[Tensor]) -> float:
    return sum(float(piece.norm()) ** 2 for piece in pieces)
