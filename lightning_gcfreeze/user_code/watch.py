"""Record which code reads or writes ``p.grad`` while a run observes."""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_gcfreeze.user_code.reached import KNOWN_PACKAGES

WATCHED_STEPS = (1, 2, 8, 64, 512, 4096)
"""Optimizer steps in which reads of ``p.grad`` are noted."""


class GradientWatch:
    """Record who reads or writes ``p.grad`` in Python, also code that reading byte code does not find.

    An access counts for the innermost function that is not part of the known packages. Accesses by a Trainer itself
    are ignored.

    Args:
        parameters: the parameters to watch, plain or sharded. Instances of subclasses of `Parameter` are left out.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        given = [*parameters]
        self._parameters = [p for p in given if type(p) is Parameter]
        self._sharded = [p for p in given if isinstance(p, DTensor)]
        self.seen: dict[str, None] = {}
        """The functions that accessed a gradient, as ``name (file:line)``, in order of their first access."""

    def arm(self) -> None:
        """Start watching."""
        for p in self._parameters:
            _WATCHES[id(p)] = self.seen
            self._set_class(p, _Watched)
        for p in self._sharded:
            _WATCHES[id(p)] = self.seen
            _WATCHED_SHARDS.add(id(p))
        if self._sharded:  # DTensors are dispatched by their class, so that one gets the property for a while
            DTensor.grad = _Watched.grad  # type: ignore[assignment]

    def disarm(self) -> None:
        """Stop watching and keep `seen`."""
        for p in self._parameters:
            if type(p) is _Watched:
                self._set_class(p, Parameter)
                _WATCHES.pop(id(p), None)
        for p in self._sharded:
            _WATCHES.pop(id(p), None)
            _WATCHED_SHARDS.discard(id(p))
        if not _WATCHED_SHARDS and "grad" in vars(DTensor):
            del DTensor.grad

    @staticmethod
    def _set_class(p: Tensor, cls: type[Parameter]) -> None:
        p.__class__ = cls


class _Watched(Parameter):
    """A parameter that records each access to its gradient."""

    @property
    def grad(self) -> Any:
        _record_access(self)
        return _GRAD.__get__(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        _record_access(self)
        _GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        _record_access(self)
        _GRAD.__delete__(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        copied = memo[id(self)] = Parameter(
            self.detach().clone(memory_format=torch.preserve_format), self.requires_grad
        )
        return copied


_GRAD: Any = inspect.getattr_static(Tensor, "grad")
_WATCHES: dict[int, dict[str, None]] = {}  # by id: comparing tensors gives no bool
_WATCHED_SHARDS: set[int] = set()  # ids of the sharded ones


def _record_access(p: Tensor) -> None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        root = module.split(".")[0]
        if root in ("lightning", "pytorch_lightning", "lightning_fabric") or module == "transformers.trainer":
            return
        if root not in KNOWN_PACKAGES:
            seen = _WATCHES.get(id(p))
            if seen is not None:
                seen[f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"] = None
            return
        frame = frame.f_back
