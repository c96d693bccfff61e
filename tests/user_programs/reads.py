"""Code that records gradients."""

import functools
from typing import Any

import lightning.pytorch as pl

from tests.user_programs.case import READS, Case, Net, Setup

READ_BY_MODULE = (
    "on_train_batch_start", "training_step", "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward",
    "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step",
    "on_train_batch_end", "on_train_epoch_end", "on_validation_start",
)  # fmt: skip
READ_BY_CALLBACK = tuple(name for name in READ_BY_MODULE if name.startswith("on_"))


def _reader(base: type, hook: str, setup: Setup) -> type:
    """A class whose hook records all gradients, before and after it does what it ordinarily does."""

    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        setup.seen.append([None if p.grad is None else p.grad.clone() for p in setup.module.parameters()])
        outcome = getattr(super(cls, self), hook)(*args, **kwargs)
        setup.seen.append([None if p.grad is None else p.grad.clone() for p in setup.module.parameters()])
        return outcome

    functools.update_wrapper(read, getattr(base, hook))  # Lightning looks at the signatures of hooks
    read.__module__ = __name__
    cls = type(f"Reads_{hook}", (base,), {hook: read, "__module__": __name__})
    return cls


def _read_by(base: type, hook: str) -> Case:
    def plant(setup: Setup) -> None:
        setup.validation = "validation" in hook
        if base is Net:
            setup.module.__class__ = _reader(Net, hook, setup)
        else:
            setup.callbacks.append(_reader(base, hook, setup)())

    return Case(plant, (hook, f"Reads_{hook}"), accumulate=2)


READS |= {f"module-{hook}": _read_by(Net, hook) for hook in READ_BY_MODULE}
READS |= {f"callback-{hook}": _read_by(pl.Callback, hook) for hook in READ_BY_CALLBACK}


def _hooks_that_read(setup: Setup) -> None:
    """As loggers that watch a model register them."""
    for p in setup.module.parameters():
        p.register_hook(lambda grad: setup.seen.append([grad.clone()]))


READS["hooks-on-tensors"] = Case(_hooks_that_read, ("network.0.weight",), accumulate=2)
