"""How much memory a call takes at most: what torch's allocator on the CPU is asked for and gets back, to the byte."""

from collections.abc import Callable

import torch


def most_allocated(call: Callable[[], object]) -> int:
    """Return the most bytes that lived at once, of those that were allocated during a call. Results count, too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    del kept
    return most
