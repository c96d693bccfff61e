"""BatchNorm layers that use their stored statistics and leave them as they are, in training mode too.

Running statistics are buffers: no freezing of parameters stops them, and what `eval()` does to a layer lasts until
somebody calls `train()` on the model. So these layers are put into evaluation mode, and their own `train` is replaced,
which their parents' `train` calls. In place of hooks, since code that `torch.compile` has made would not notice a hook;
it does notice the mode.
"""

import types
from collections.abc import Collection

from torch import nn
from torch.nn import Parameter

from lightning_gcfreeze import _modules


class StillNorms:
    """Keeps BatchNorm layers in evaluation mode, until `release`.

    Args:
        module: the module that is trained.
        frozen: the parameters of which all elements are frozen. A layer keeps still if its weight and its bias are.
    """

    def __init__(self, module: nn.Module, frozen: Collection[Parameter]) -> None:
        self._module = module
        constant = {id(p) for p in frozen}
        found = [layer for layer in module.modules() if isinstance(layer, _modules.BatchNorm)]
        self._modes = {
            layer: layer.training
            for layer in found
            if layer.running_mean is not None and layer.affine and {id(layer.weight), id(layer.bias)} <= constant
        }
        for layer in self._modes:
            layer.training = False
            layer.train = types.MethodType(train, layer)  # type: ignore[method-assign]  # copies get one of their own

    def release(self) -> None:
        """Let the layers follow the module's mode again."""
        for layer, mode in self._modes.items():
            layer.__dict__.pop("train", None)
            layer.training = mode and self._module.training
        self._modes = {}


def train(layer: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for a layer's `train`: it stays in evaluation mode. Unpickled layers have their class's own `train`."""
    layer.training = False
    return layer
