"""Run code right before an optimizer's update: once the gradients of its step are there."""

from collections.abc import Callable
from typing import Any


def right_before_update(
    args: tuple[Any, ...], kwargs: dict[str, Any], begin: Callable[[], Any], undo: Callable[[], Any]
) -> Any:
    """Let `begin` run in an optimizer's step after its closure, or now if the step has none.

    Args:
        args: arguments that a pre-hook of the optimizer's step receives; the first is the optimizer.
        kwargs: keyword arguments that the hook receives.
        begin: what to run.
        undo: what to run before each evaluation of the closure: `begin` has run before a second one in one step.

    Returns:
        The arguments to call the step with instead, as the hook has to return them, or None.
    """
    optimizer, *given = args
    closure = given[0] if given else kwargs.get("closure")
    if not callable(closure):
        begin()
        return None

    def wrapped() -> Any:
        undo()
        loss = closure()
        begin()
        return loss

    return ((optimizer, wrapped, *given[1:]), kwargs) if given else (args, kwargs | {"closure": wrapped})
