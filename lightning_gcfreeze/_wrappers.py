"""What other packages put around a module or an optimizer, by the names of their classes: DDP, Fabric, Accelerate.

`tests/test_private_api.py` lists what is assumed of them.
"""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class _InFabricsPrecision:
    """Fabric's module without the strategy's wrapper, whose reducer would wait for a replayed backward pass."""

    def __init__(self, module: nn.Module, precision: Any) -> None:
        self._module, self._precision = module, precision

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._precision.convert_input((args, kwargs))
        with self._precision.forward_context():
            output = self._module(*args, **kwargs)
        return self._precision.convert_output(output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def unwrapped_module(module: nn.Module) -> tuple[nn.Module, Any, DistributedDataParallel | None]:
    """Return the module inside, what to give to `loss` in a replay, and the DistributedDataParallel around it."""
    if type(module).__name__ == "_FabricModule":
        inside: Any = module
        wrapper = inside._forward_module
        model: Any = _InFabricsPrecision(inside.module, inside._strategy.precision)
        return inside.module, model, wrapper if isinstance(wrapper, DistributedDataParallel) else None
    if isinstance(module, DistributedDataParallel):
        return module.module, module.module, module
    return module, module, None


def unwrapped_optimizer(optimizer: Any) -> tuple[Optimizer, Any]:
    """Return the torch optimizer inside of Fabric's or Accelerate's, and the loss scaler that they use, or None."""
    scaler = None
    while type(optimizer).__name__.startswith("Fabric") or hasattr(optimizer, "gradient_state"):
        precision = getattr(getattr(optimizer, "_strategy", None), "precision", None)
        scaler = scaler or getattr(precision, "scaler", None) or getattr(optimizer, "scaler", None)
        optimizer = optimizer.optimizer
    return optimizer, scaler
