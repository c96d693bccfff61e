"""Weights written and gradients scaled in ways that do not say so: by helpers, imports, views and state dicts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.user_programs.case import Net, changes, halve, norm


class Helper:
    """What a project keeps beside its module."""

    norm = 1.0

    def halve(self, module: Any) -> None:
        self._touch(module)

    def _touch(self, module: Any) -> None:
        for p in module.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)

    def measure(self, module: Any) -> None:
        self.norm = norm(module.parameters())

    @staticmethod
    def decay(module: Any) -> None:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.99)


HELPER = Helper()


def _changes_at_batch_end(name: str, change: Callable[[Net], Any], **options: Any) -> None:
    def on_train_batch_end(self: Net, outputs: Any, batch: Any, batch_idx: int) -> None:
        change(self)

    cls = type(name, (Net,), {"on_train_batch_end": on_train_batch_end, "__module__": __name__})
    changes(**options)(cls)


def _by_state_dict(module: Net) -> None:
    for value in module.state_dict().values():
        value *= 0.99


def _by_foreach(module: Net) -> None:
    torch._foreach_mul_([p.data for p in module.parameters()], 0.99)


def _by_slice(module: Net) -> None:
    module.network[2].weight.data[:] = module.network[2].weight.data * 0.99


def _by_item(module: Net) -> None:
    with torch.no_grad():
        module.network[2].weight[3] = module.network[2].weight[3] * 0.9


def _by_vector(module: Net) -> None:
    parameters = list(module.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach() * 0.99, parameters)


def _by_array(module: Net) -> None:
    for p in module.parameters():
        array = p.detach().numpy()
        array *= 0.99


def _by_loading(module: Net) -> None:
    module.load_state_dict({name: value * 0.99 for name, value in module.state_dict().items()})


def _by_object(module: Net) -> None:
    HELPER.decay(module)


for _change in (_by_state_dict, _by_foreach, _by_slice, _by_item, _by_vector, _by_array, _by_loading, _by_object):
    _changes_at_batch_end(f"Writes{_change.__name__}", _change)


def _by_class(module: Net) -> None:
    Helper().halve(module)


def _by_import(module: Net) -> None:
    from tests.user_programs.case import halve as imported

    imported(module.parameters())


def _by_item_of_list(module: Net) -> None:
    ACTIONS["halve"][0](module)


ACTIONS: dict[str, list[Callable[[Any], None]]] = {"halve": [lambda module: halve(module.parameters())]}
for _change in (_by_class, _by_import, _by_item_of_list):
    _changes_at_batch_end(f"Scales{_change.__name__}", _change, accumulate=2)


@changes()
class ZeroGradMeasuresByAHelper(Net):
    """The rate of the next step follows the norm that an object measures."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        HELPER.measure(self)
        optimizer.param_groups[0]["lr"] = 0.02 / (1.0 + HELPER.norm)
