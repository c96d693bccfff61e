"""What finding t0 from the data costs: a check, and the share of all checks in the time until then.

    uv run python -m benchmarks.settling [--models M1,M2,M5] [--rounds 20]

Each round times a plain step of a model (forward, backward, the default Adam; one thread), recording its loss, and a
check, in turn; figures are medians. The share is of the whole time until t0, for the t0 given: all checks up to it and
the loss of every step, over that many plain steps.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.observe import MODELS, Step, keep_freed_memory
from lightning_gcfreeze import Settled, orderings
from lightning_gcfreeze.decision import scores_now
from lightning_gcfreeze.distributed import SINGLE_PROCESS
from lightning_gcfreeze.observing import Observing
from lightning_gcfreeze.planning.plan import Plan
from lightning_gcfreeze.planning.settling import SAMPLE_SIZE, sampled

T0 = (100, 1000, 10_000)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda v: v.split(","), default=["M1", "M2", "M3", "M4", "M5"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread")
    print(
        "| model | plain step, ms | a loss, ms | a check, ms | " + " | ".join(f"share at t0 = {t:,}" for t in T0) + " |"
    )
    print("| --- " * (4 + len(T0)) + "|")
    for name in args.models:
        times = measure(name, args.rounds)
        step, loss, check = (statistics.median(of) * 1e3 for of in times)
        shares = [f"{(n_checks(t) * check + t * loss) / (t * step):.2%}" for t in T0]
        print(f"| {name} | {step:.2f} | {loss:.4f} | {check:.2f} | " + " | ".join(shares) + " |", flush=True)


def measure(name: str, rounds: int) -> tuple[list[float], ...]:
    """Return seconds of plain steps, of recording a loss, and of checks, by the order "progress"."""
    _, make, batch = MODELS[name]
    plain = Step(make(), batch())
    plan, ordering = Plan([(Settled(max_t0=10**9), 0.8)], "1/t"), orderings.ORDERINGS["progress"]
    plan.start(lambda: 10**9)
    statistics = Observing(plain.parameters, needs=orderings.needed_by(ordering))
    for moment in statistics.moments.values():
        moment.tensors = {n: torch.rand_like(t) for n, t in moment.tensors.items()}
    statistics.covariance.tensors = {n: torch.rand_like(t) for n, t in statistics.covariance.tensors.items()}
    statistics._observed = 100
    loss = torch.tensor(1.0)

    def record() -> None:
        for _ in range(100):
            plan.record_loss(loss * 1.0, 1)

    def check() -> None:
        weights = {n: p.detach() for n, p in plain.parameters.items()}
        scores = scores_now(statistics, ordering, weights, 0, "element")
        sample, moved = sampled(scores, SAMPLE_SIZE), sampled(statistics.variance, SAMPLE_SIZE) > 0
        plan.check_settled(sample, moved, statistics.observed, 0.8, SINGLE_PROCESS)
        statistics._observed += 20

    found: tuple[list[float], ...] = ([], [], [])
    for _ in range(rounds):
        for function, times, count in zip((plain, record, check), found, (1, 100, 1), strict=True):
            times.append(_timed(function) / count)
    return found


def n_checks(t0: int) -> int:
    """Return the number of checks up to a step."""
    count, step, settled = 0, Settled.first, Settled()
    while step <= t0:
        count, step = count + 1, max(step + 1, -int(-step * settled.growth // 1))
    return count


def _timed(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
