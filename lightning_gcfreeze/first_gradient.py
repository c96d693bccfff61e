"""g_1 of each optimizer step: by capture where that is right, by replay elsewhere.

What capture finds is the first sample's share of the batch's gradient: g_1 / S if the loss is a mean over samples that
do not interact, g_1 if it is their sum, and neither if it is, say, a mean over all tokens that are not padding. So both
are compared, parameter by parameter: at the first try, and again at the 2nd, 4th, 8th, …, because a first batch may
happen to have no padding. A parameter for which they ever differ is replayed from then on.

The comparison is between two extra passes, of the batch and of its first sample, both with BatchNorm's running
statistics and without dropout: in these, samples would interact, or draw other random numbers.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, TypedDict

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.dropout import _DropoutNd

from lightning_gcfreeze.capture import Capture
from lightning_gcfreeze.replay import Replay, Window

How = Literal["replay", "capture", "auto"]
Reduction = Literal["mean", "sum"]


class Decided(TypedDict):
    """How gradients are had, in numbers and strings."""

    tries: int
    captured: dict[str, Reduction]
    replayed: list[str]  # for good


class FirstGradient:
    """Follows the batches of an optimizer step, and has g_1 at its end.

    Args:
        how: "replay"; "capture", with replay for what it cannot see, and trusting that the loss is a mean over samples;
            or "auto", as above.
        module: whose state must not change.
        parameters: by name, those whose gradient is wanted.
        step: (batch, batch_idx) -> what `training_step` returns.
        context: what the step has to run in.
        tell: takes a sentence, when it is decided how the gradients are had.
    """

    def __init__(
        self,
        how: How,
        module: nn.Module,
        parameters: Mapping[str, Parameter],
        step: Callable[[Any, int], Tensor | Mapping[str, Any] | None],
        context: Callable[[], AbstractContextManager[None]],
        tell: Callable[[str], None],
    ) -> None:
        self._how, self._module, self._names, self._tell = how, module, tuple(parameters), tell
        self._replay = Replay(module, parameters, step, context)
        self._capture = Capture(module, parameters) if how != "replay" else None
        self._batch: Any = None  # the whole first micro-batch, where it is needed for a comparison
        self.decided: Decided = {
            "tries": 0,
            "captured": dict.fromkeys(parameters, "mean") if how == "capture" else {},
            "replayed": [],
        }
        """What a continued run has to go on with."""

    def keep(self, batch: Any, batch_idx: int) -> None:
        """Before a batch of a step that is to be observed: see `Replay.keep`."""
        first = self._replay.between_steps
        self._replay.keep(batch, batch_idx)
        if self._capture is None or not first:
            return
        compares = self._compares(self.decided["tries"] + 1)
        size = self._replay.size_at_hand
        if size is not None and (compares or self.decided["captured"]):
            self._capture.listen(size)
        self._batch = _copied(batch) if compares else None

    def join(self) -> bool:
        """After a batch's backward: see `Replay.join`."""
        if self._capture is not None:
            self._capture.stop()
        return self._replay.join()

    def forget(self) -> None:
        """What was kept is not part of the next optimizer step."""
        self._replay.forget()
        self._batch = None
        if self._capture is not None:
            self._capture.forget()

    def begin_backward(self) -> None:
        """Right before a batch's backward."""
        if self._capture is not None:
            self._capture.begin_backward()

    def take(self) -> Window:
        """End the optimizer step: its window, to be given to `gradient`."""
        return self._replay.take()

    def gradient(self, window: Window, scale: float) -> dict[str, Tensor] | None:
        """g_1.

        Args:
            window: the optimizer step.
            scale: what the first micro-batch's loss was multiplied by before backward: a loss scale, 1/A.

        Returns:
            ``{name: (*p.shape)}``, or None if the training step returned no loss on the first sample.
        """
        self.decided["tries"] += 1
        if self._capture is None:
            return self._replay.gradient(window)
        size = float(window.first_size or 0)
        shares = self._capture.gradients(size / scale)
        batch, self._batch = self._batch, None
        if self._compares(self.decided["tries"]) and len(self.decided["replayed"]) < len(self._names):
            self._compare(window, batch)
        captured = self.decided["captured"]
        found = {
            name: share if captured[name] == "mean" else share.div_(size)
            for name, share in shares.items()
            if name in captured
        }
        if len(found) < len(self._names):
            replayed = self._replay.gradient(window, set(self._names).difference(found))
            if replayed is None:
                return None
            found.update(replayed)
        return {name: found[name] for name in self._names}

    def _compares(self, number: int) -> bool:
        return self._how == "auto" and number & (number - 1) == 0

    def _compare(self, window: Window, batch: Any) -> None:
        """Decide which parameters' gradients can be captured."""
        assert self._capture is not None
        size = window.first_size
        try:
            if size is None or batch is None:
                raise ValueError("its size is not known" if size is None else "it cannot be copied")
            self._capture.listen(size)
            self._replay.of_batch(batch, window.batch_idx, before=self._calm, after=self._capture.begin_backward)
        except Exception as error:  # replay is right in any case
            self._capture.forget()
            self.decided["captured"].clear()
            self.decided["replayed"][:] = self._names
            self._tell(f"g_1 is had by replay: `training_step` cannot take the batch for a comparison ({error!r}).")
            return
        shares = self._capture.gradients()
        alone = self._replay.gradient(window, before=self._calm)
        if alone is None or not all(g.isfinite().all() for g in (*alone.values(), *shares.values())):
            return
        captured, replayed = self.decided["captured"], self.decided["replayed"]
        before = set(captured)
        reductions: dict[Reduction, float] = {"mean": float(size), "sum": 1.0}
        largest = max(float(g.norm()) for g in alone.values())
        for name in [name for name in self._names if name in shares and name not in replayed]:
            expected, share, tolerance = alone[name], shares[name], self._capture.tolerance[name]
            if not (expected.any() or share.any()):
                continue  # nothing to compare
            distances: dict[Reduction, float] = {
                by: float((share * factor - expected).norm()) for by, factor in reductions.items()
            }
            nearest: Reduction = "mean" if distances["mean"] <= distances["sum"] else "sum"
            by = captured.get(name, nearest)
            # What is zero but for rounding, as a bias that softmax cancels, may differ from itself by all of it.
            if distances[by] <= max(tolerance * float(expected.norm()), tolerance**2 * largest):
                captured[name] = by
            else:
                replayed.append(name)
                captured.pop(name, None)
        if self.decided["tries"] == 1 or set(captured) != before:
            self._tell(self._sentence())

    def _sentence(self) -> str:
        captured, replayed = self.decided["captured"], self.decided["replayed"]
        others = [name for name in self._names if name not in captured]
        if not others:
            return "g_1 is captured from the batch's own pass for all parameters."
        reasons = {
            "the two differ": replayed,
            "not seen by capture, or zero so far": [name for name in others if name not in replayed],
        }
        listing = "; ".join(f"{why}: {_some(names)}" for why, names in reasons.items() if names)
        return (
            f"g_1 is captured from the batch's own pass for {len(captured)} of {len(self._names)} parameters, and had"
            f" by replay for the others ({listing})."
        )

    def _calm(self) -> None:
        """Leave no random numbers in the passes that are compared."""
        for layer in self._module.modules():
            if isinstance(layer, _DropoutNd):
                layer.training = False
            elif isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
                layer.dropout = 0.0


def _copied(batch: Any) -> Any:
    """None if it cannot be: then nothing is compared, and all is replayed."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
