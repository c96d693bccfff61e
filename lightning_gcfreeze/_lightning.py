"""Private names of Lightning that have no public counterpart, and what is assumed of them."""

from typing import Any

from lightning_gcfreeze.distributed.comm_hook import LiveAllReduce


def take_comm_hook(strategy: Any) -> LiveAllReduce | None:
    """Take the communication hook that a DDPStrategy was given. Call before the strategy wraps the module.

    DDP accepts one hook, so the strategy must not register its own.

    Assumes that the strategy registers ``_ddp_comm_hook``, with ``_ddp_comm_state`` and ``_ddp_comm_wrapper``, when it
    wraps the module, and nothing if the hook is None.

    Returns:
        A hook that does the same, to be registered later; None if the strategy does not use DDP.
    """
    if not hasattr(strategy, "_ddp_comm_hook"):
        return None
    all_reduce = LiveAllReduce(strategy._ddp_comm_hook, strategy._ddp_comm_state, strategy._ddp_comm_wrapper)
    strategy._ddp_comm_hook = None
    return all_reduce


def give_back_comm_hook(strategy: Any, all_reduce: LiveAllReduce) -> None:
    """Give a strategy its own hook back, which `take_comm_hook` took; the strategy is as before."""
    strategy._ddp_comm_hook = all_reduce.user_hook
