"""Measure a server under load, and the swaps of a model by themselves. Wrong answers are counted, not tolerated."""

import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

from torch import Tensor, nn

from lightning_gcfreeze import delta

Scores = Mapping[str, Mapping[str, Sequence[float]]]
"""``{tenant: {text: the scores of the tenant's own model}}``"""


@dataclass(frozen=True)
class Load:
    """What `load` measured."""

    requests: int
    seconds: float
    latency_ms: tuple[float, float]
    """Median and 99th percentile, as clients see it."""
    swaps: int
    """How many answers had to swap the weights."""
    swap_ms: tuple[float, float]
    """Median and 99th percentile of these swaps, without waiting for other answers."""
    wrong: int
    """Answers that differ from the tenant's own model by more than the tolerance, or are none."""
    largest_difference: float
    """Between a score and that of the tenant's own model."""

    def __str__(self) -> str:
        """One line a figure."""
        return (
            f"{self.requests} requests in {self.seconds:.1f} s: {self.requests / self.seconds:.0f} requests/s\n"
            f"latency {self.latency_ms[0]:.2f} ms, 99th percentile {self.latency_ms[1]:.2f} ms\n"
            f"{self.swaps} swaps, {self.swap_ms[0]:.3f} ms, 99th percentile {self.swap_ms[1]:.3f} ms\n"
            f"{self.wrong} wrong answers; the largest difference of a score is {self.largest_difference:.1e}"
        )


def load(
    port: int, expected: Scores, *, requests: int = 1000, threads: int = 4, tolerance: float = 1e-6, seed: int = 0
) -> Load:
    """Ask a server on this machine texts of `expected`, each of a tenant at random, from several threads.

    Args:
        port: of the server, on 127.0.0.1.
        expected: the scores that the tenants' own models give, by tenant and text.
        requests: how many to send in all.
        threads: how many send, each over its own connection.
        tolerance: by how much a score may differ. Kernels may sum in another order where memory is aligned otherwise.
        seed: of the tenants and texts.
    """
    draw = random.Random(seed)
    cases = [(tenant, text) for tenant, texts in expected.items() for text in texts]
    asked = [draw.choice(cases) for _ in range(requests)]
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        shares = list(pool.map(lambda start: _ask(port, expected, asked[start::threads]), range(threads)))
        seconds = time.perf_counter() - began
    replies = [reply for share in shares for reply in share]
    swaps = [swap_ms for _, swap_ms, _ in replies if swap_ms]
    return Load(
        requests=requests,
        seconds=seconds,
        latency_ms=_median_and_p99([latency_ms for latency_ms, _, _ in replies]),
        swaps=len(swaps),
        swap_ms=_median_and_p99(swaps),
        wrong=sum(not difference <= tolerance for _, _, difference in replies),
        largest_difference=max(difference for _, _, difference in replies),
    )


def _ask(port: int, expected: Scores, cases: Sequence[tuple[str, str]]) -> list[tuple[float, float, float]]:
    """Return latency and swap in milliseconds, and the largest difference of a score, for each case."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    replies = []
    for tenant, text in cases:
        began = time.perf_counter()
        connection.request("POST", f"/tenants/{tenant}/answer", json.dumps({"text": text}))
        response = connection.getresponse()
        answer = json.loads(response.read())
        latency_ms = 1e3 * (time.perf_counter() - began)
        own = expected[tenant][text]
        scores = answer.get("scores", [])
        fits = response.status == 200 and answer["tenant"] == tenant and len(scores) == len(own)
        difference = max(abs(a - b) for a, b in zip(scores, own, strict=True)) if fits else float("inf")
        replies.append((latency_ms, answer.get("swap_ms", 0.0), difference))
    connection.close()
    return replies


@dataclass(frozen=True)
class Swaps:
    """What `swaps` measured."""

    times: int
    swap_ms: tuple[float, float]
    """Median and 99th percentile."""
    before: str
    """Fingerprint of the base."""
    after: str

    def __str__(self) -> str:
        """One line a figure."""
        same = "the same to the bit" if self.before == self.after else "DIFFERENT"
        return (
            f"{self.times} swaps, {self.swap_ms[0]:.3f} ms, 99th percentile {self.swap_ms[1]:.3f} ms\n"
            f"The base is {same} afterwards: {self.after}"
        )


def swaps(
    model: nn.Module, deltas: Mapping[str, Mapping[str, Tensor] | str | Path], times: int = 10_000, *, seed: int = 0
) -> Swaps:
    """Swap at random between tenants of a model, and compare the base before and after.

    Args:
        model: has the base's weights, and has them again on return.
        deltas: of two tenants or more, in memory or as files.
        times: how often to swap, each time to another tenant.
        seed: of the order.
    """
    draw = random.Random(seed)
    before = delta.fingerprint(model)
    tenants = delta.Tenants(model)
    for name, each in deltas.items():
        tenants.add(name, each)
    taken = []
    for _ in range(times):
        name = draw.choice([name for name in deltas if name != tenants.current])
        began = time.perf_counter()
        with tenants.use(name):
            taken.append(1e3 * (time.perf_counter() - began))
    with tenants.use(None):
        after = delta.fingerprint(model)
    return Swaps(times, _median_and_p99(taken), before, after)


def _median_and_p99(values: Sequence[float]) -> tuple[float, float]:
    """Return zeros for no values."""
    if not values:
        return 0.0, 0.0
    in_order = sorted(values)
    return statistics.median(in_order), in_order[min(len(in_order) - 1, len(in_order) * 99 // 100)]
