"""What the loss of a Hugging Face model is in units of the mean loss, under a Trainer that accumulates gradients."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_gcfreeze.gradients.isolation import no_trace

Batch: TypeAlias = dict[str, Any]
Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]

_COUNT = "num_items_in_batch"


class Shares:
    """Finds what a model's loss is in units of its mean: n / N with n targets of the N in an optimizer step, or 1.

    The Trainer gives N to each model whose `forward` takes any keyword, as `num_items_in_batch`. Some models divide the
    sum of their losses by it, and some ignore it. Some count the first label, which causal models do not predict.
    Where these differ, the mean is computed once more to find out.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:  # the model's own, and without a trace
        self._model, self._loss = model, loss
        self._rules: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "ignored": lambda inputs: inputs[_COUNT],
            "shifted": lambda inputs: _targets(inputs.get("shift_labels", inputs["labels"][..., 1:])),
            "whole": lambda inputs: _targets(inputs["labels"]),
        }
        self._is_counted = False
        self._random: list[tuple[Any, Tensor]] = []  # the modules that draw, and their states

    @property
    def are_of_all_targets(self) -> bool:
        """Whether losses are known to be divided by the number of targets of a step, on all processes."""
        return "ignored" not in self._rules and self._is_counted

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Before the forward pass: keep the random streams if the pass may have to be repeated."""
        self._random = []
        if _COUNT in inputs and len(self._rules) > 1:
            kinds = {p.device.type for p in self._model.parameters()} - {"cpu", "meta"}
            drawing = [torch, *map(torch.get_device_module, kinds)]
            self._random = [(drawn, drawn.get_rng_state()) for drawn in drawing]

    def of(self, loss: Tensor, inputs: Batch) -> Tensor | float:
        """After it: what a loss is of the mean.

        Raises:
            ValueError: no rule explains the loss.
        """
        self._is_counted = _COUNT in inputs and inputs.get("labels") is not None
        if not self._is_counted:
            return 1.0
        shares = {name: rule(inputs) / inputs[_COUNT] for name, rule in self._rules.items()}
        if len(shares) > 1 and len({float(share) for share in shares.values()}) > 1:
            shares = self._that_explain(loss, inputs, shares)
            self._rules = {name: self._rules[name] for name in shares}
        share: Tensor | float = next(iter(shares.values()))
        return share

    def _that_explain(self, loss: Tensor, inputs: Batch, shares: dict[str, Any]) -> dict[str, Any]:
        now = [(drawing, drawing.get_rng_state()) for drawing, _ in self._random]
        try:
            for drawing, state in self._random:
                drawing.set_rng_state(state)
            with no_trace(self._model), torch.no_grad():
                found = float(loss.detach() / self._loss(self._model, plain(inputs)))
        finally:
            for drawing, state in now:
                drawing.set_rng_state(state)
        if not math.isfinite(found):  # all labels are ignored, or the run diverges
            return shares
        fitting = {name: share for name, share in shares.items() if math.isclose(found, float(share), rel_tol=1e-2)}
        if not fitting:
            known = ", ".join(f"{float(share):.4g} ({name})" for name, share in shares.items())
            raise ValueError(
                f"The model's loss is {found:.4g} times its loss without `{_COUNT}`. Known are {known}, so what it is"
                " of the mean is not clear. Let the model set `accepts_loss_kwargs = False`, and return the mean loss."
            )
        return fitting


def _targets(labels: Tensor) -> Tensor:
    return (labels != -100).sum()


def plain(inputs: Mapping[str, Any]) -> Batch:
    """The inputs without the number of targets in the step: a loss without it is a mean of its own targets."""
    return {name: value for name, value in inputs.items() if name != _COUNT}
