"""The factor between a Hugging Face model's loss and its mean loss, under a Trainer that accumulates gradients."""

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
    """Find the share of each micro-batch: the model's loss over the mean loss of the same inputs.

    In a step of several micro-batches all targets are to count alike. So the Trainer counts the N targets of the step,
    and passes N to each model whose `forward` takes any keyword, as `num_items_in_batch`. What comes back is

    - the sum of n losses over N, a share of n / N, if the model uses N. Causal language models do not predict the first
      label of a sequence: n leaves that label out, although N has it;
    - the mean loss, a share of 1, if the model ignores N, or did not get it.

    A model does not say which of these it does. So all rules are kept that explain the losses up to now. When their
    shares differ for a micro-batch, the model computes its mean loss once more, without N, which tells them apart.

    Args:
        model: the one that is trained.
        loss: (model, inputs) -> the model's own loss, in a forward pass that nobody observes.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model, self._loss = model, loss
        self._rules: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            "N is ignored": lambda inputs: inputs[_COUNT],
            "n without first labels": lambda inputs: _n_targets(inputs.get("shift_labels", inputs["labels"][..., 1:])),
            "n of all labels": lambda inputs: _n_targets(inputs["labels"]),
        }
        self._random: list[tuple[Any, Tensor]] = []  # modules of torch that draw numbers, and their states

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Keep the states of the random streams, if the forward pass to come may have to be repeated."""
        self._random = []
        if _COUNT in inputs and len(self._rules) > 1:
            kinds = {p.device.type for p in self._model.parameters()} - {"cpu", "meta"}
            streams = [torch, *map(torch.get_device_module, kinds)]
            self._random = [(stream, stream.get_rng_state()) for stream in streams]

    def of(self, loss: Tensor, inputs: Batch) -> Tensor | float:
        """Return the share of a micro-batch, right after its forward pass.

        Raises:
            ValueError: no rule explains the loss.
        """
        if _COUNT not in inputs or inputs.get("labels") is None:
            return 1.0
        shares = {name: rule(inputs) / inputs[_COUNT] for name, rule in self._rules.items()}
        if len(shares) > 1 and len({float(share) for share in shares.values()}) > 1:
            shares = self._that_explain(loss, inputs, shares)
            self._rules = {name: self._rules[name] for name in shares}
        share: Tensor | float = next(iter(shares.values()))
        return share

    def _that_explain(self, loss: Tensor, inputs: Batch, shares: dict[str, Any]) -> dict[str, Any]:
        with no_trace(self._model), torch.no_grad():  # afterwards the random streams stand where they stand now
            for stream, state in self._random:
                stream.set_rng_state(state)
            found = float(loss.detach() / self._loss(self._model, without_count(inputs)))
        if not math.isfinite(found):  # all labels are ignored, or the run diverges
            return shares
        fitting = {name: share for name, share in shares.items() if math.isclose(found, float(share), rel_tol=1e-2)}
        if not fitting:
            known = ", ".join(f"{float(share):.4g} ({name})" for name, share in shares.items())
            raise ValueError(
                f"The model's loss is {found:.4g} times its loss without `{_COUNT}`, but {known} are the known ways to"
                " use it. Set `accepts_loss_kwargs = False` in the model's class, and return the mean loss."
            )
        return fitting


def without_count(inputs: Mapping[str, Any]) -> Batch:
    """Return the inputs for which a model returns the mean loss of their own targets."""
    return {name: value for name, value in inputs.items() if name != _COUNT}


def _n_targets(labels: Tensor) -> Tensor:
    return (labels != -100).sum()
