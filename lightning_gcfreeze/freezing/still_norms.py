"""BatchNorm layers that use their stored statistics and leave them as they are, in training mode too.

Running statistics are buffers: no freezing of parameters stops them, and what `eval()` does to a layer lasts until
somebody calls `train()` on the model. So these layers are put into evaluation mode, and their own `train` is replaced,
which their parents' `train` calls, and their `reset_running_stats`, which `torch.optim.swa_utils.update_bn` calls. In
place of hooks, since code that `torch.compile` has made would not notice a hook; it does notice the mode.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn import Parameter

from lightning_gcfreeze import _modules


class StillNorms:
    """Keeps BatchNorm layers in evaluation mode, until `release`.

    Args:
        module: the module that is trained.
        frozen: by name, the parameters of which all elements are frozen. A layer keeps still if one of them is its own,
            and none of its own can move: the others, such as a bias, require no gradient.
    """

    def __init__(self, module: nn.Module, frozen: Mapping[str, Parameter]) -> None:
        self._module = module
        self._modes = {layer: layer.training for layer in _frozen_norms(module, frozen)}
        for layer in self._modes:
            layer.training = False
            for name, function in _INSTEAD.items():
                setattr(layer, name, _StandIn(layer, name, function))

    def release(self) -> None:
        """Let the layers follow the module's mode again."""
        for layer, mode in self._modes.items():
            for name in _INSTEAD:
                layer.__dict__.pop(name, None)
            layer.training = mode and self._module.training
        self._modes = {}


def _frozen_norms(module: nn.Module, frozen: Mapping[str, Parameter]) -> Iterator[nn.Module]:
    # By name: FSDP2 replaces a layer's parameters while they are gathered. By identity: tied ones have another's name.
    constant = {id(p) for p in frozen.values()}
    for path, layer in module.named_modules():
        if not isinstance(layer, _modules.BatchNorm) or layer.running_mean is None:
            continue
        own = dict(layer.named_parameters(path))
        froze = {name for name, p in own.items() if name in frozen or id(p) in constant}
        if froze and not any(p.requires_grad for name, p in own.items() if name not in froze):
            yield layer


class _StandIn:
    """A function in place of a layer's method. Copies of the layer, and unpickled ones, have their class's own."""

    def __init__(self, layer: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._layer, self._name, self._function = layer, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._layer, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._layer, self._name)  # evaluated on the copy, which has no attribute of its own yet


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    layer.training = False
    return layer


def _keep(layer: nn.Module) -> None:
    pass


_INSTEAD: dict[str, Callable[..., Any]] = {"train": _stay, "reset_running_stats": _keep}
