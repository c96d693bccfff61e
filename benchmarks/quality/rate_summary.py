"""What the runs of `rates` say together: tables with intervals.

The *lost share* of what training on gains in test loss, for a method at a fraction frozen and a factor of the rate:

    (L(method) - L(unfrozen)) / mean over seeds of (L(all frozen) - L(unfrozen)):   0 as the unfrozen twin at its own
                                                                                   best rate, 1 as stopping at t0

A task counts where that gain is more than two of its standard errors over the seeds. All differences are paired, run by
run, and averaged over tasks. Intervals are those of a bootstrap that draws tasks and, within them, seeds; for a table
that compares n methods with another one they cover 1 - 0.05 / n (Bonferroni), so 95 % of such tables hold altogether.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.summary import Floats, interval, table
from benchmarks.quality.tasks import FRESH_TASKS, RATE_TASKS

Ints = NDArray[np.int64]
MOST = 3.0
"""Lost shares are counted up to here, of runs that diverged too."""
Shares = dict[str, dict[int, dict[float, float]]]
"""Lost shares by task, seed and fraction frozen."""
REFERENCES = ("variance_first", "random", "second_moment")
ORACLES = ("oracle_move",)
RIVALS = ("random", "last_layers", "shira", "lora", "variance_first")


class Runs(dict[tuple[str, int], dict[str, Any]]):
    """What was found in one way of training, by task and seed."""

    @cached_property
    def tasks(self) -> list[str]:
        """All of them."""
        return list(dict.fromkeys(task for task, _ in self))

    @cached_property
    def fractions(self) -> list[float]:
        """The fractions frozen."""
        return sorted({float(name.split("@")[1]) for run in self.values() for name in run["members"] if "@" in name})

    @cached_property
    def methods(self) -> list[str]:
        """The methods that come at fractions."""
        return list(dict.fromkeys(n.split("@")[0] for run in self.values() for n in run["members"] if "@" in n))

    @cached_property
    def gains(self) -> dict[str, float]:
        """What training on gains in test loss, of the tasks that count."""
        found = {}
        for task in self.tasks:
            gains = [self[task, seed]["all_frozen"]["test"][0] - loss for seed, loss in self.twin(task).items()]
            error = float(np.std(gains, ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else math.inf
            if np.mean(gains) > 2 * error:
                found[task] = float(np.mean(gains))
        return found

    def twin(self, task: str, key: str = "test") -> dict[int, float]:
        """Return a figure of the unfrozen twin at its own best factor, by seed."""
        of = Factors(self, task, "unfrozen")
        return dict(zip(of.seeds, of.at(key, of.tuned()).tolist(), strict=True))


def load(out: Path, ways: Iterable[str], tasks: Iterable[str], seeds: int) -> dict[str, Runs]:
    """Return the runs that are there, by way."""
    keys = [(task, seed) for task in tasks for seed in range(seeds)]
    files = {way: {(t, s): out / f"{way}-{t}-{s}.json" for t, s in keys} for way in ways}
    return {
        way: Runs((key, json.loads(file.read_text(encoding="utf-8"))) for key, file in of.items() if file.exists())
        for way, of in files.items()
    }


# Numbers ------------------------------------------------------------------------------------------------------------


class Factors:
    """The test losses of one method on one task, (seeds, factors), and the ways to choose a factor; NaN: diverged."""

    def __init__(self, runs: Runs, task: str, method: str) -> None:
        own = {seed: run for (name, seed), run in sorted(runs.items()) if name == task}
        found = {seed: run if method == "unfrozen" else run["members"] for seed, run in own.items()}
        of = {seed: members[method] for seed, members in found.items() if method in members}
        self.seeds = list(of)
        self._of = list(of.values())
        self.factors: list[float] = self._of[0]["factors"] if of else []

    def __bool__(self) -> bool:
        return bool(self.seeds)

    def of(self, key: str, share: str | None = None) -> Floats:
        """Return a figure of all seeds and factors."""
        lists = [member[key] if share is None else member[key][share] for member in self._of]
        return np.array([[math.nan if v is None else v for v in values] for values in lists])

    def at(self, key: str, chosen: Ints) -> Floats:
        """Return a figure of each seed at the factor that is chosen for it."""
        return np.take_along_axis(self.of(key), chosen[:, None], 1)[:, 0]

    def tuned(self) -> Ints:
        """Return, for each seed, the index of the factor with the lowest mean validation loss over the seeds."""
        return self._all(int(np.argmin(np.nan_to_num(self.of("val"), nan=np.inf).mean(0))))

    def nearest(self, factor: float) -> Ints:
        """Return, for each seed, the index of a factor, the nearest one."""
        return self._all(int(np.argmin(np.abs(np.log2(self.factors) - math.log2(factor)))))

    def tried(self, factors: Sequence[float], share: str) -> Ints:
        """Try some for that share of the steps, roll back, and go on with the one of the lowest training loss."""
        columns = np.array([self.nearest(factor)[0] for factor in factors])
        return columns[np.argmin(np.nan_to_num(self.of("trials", share)[:, columns], nan=np.inf), axis=1)]

    def _all(self, index: int) -> Ints:
        return np.full(len(self.seeds), index)


Choice = Callable[[Factors, float, str], Ints]
"""(factors, fraction frozen, task) -> the index of the factor for each seed."""


def tuned(of: Factors, fraction: float, task: str) -> Ints:
    """Take each method's own best factor."""
    return of.tuned()


def power(exponent: float, scale: float = 1.0) -> Choice:
    """Take the factor nearest to `scale` / (1 - f)^exponent."""
    return lambda of, fraction, task: of.nearest(scale * (1 - fraction) ** -exponent)


def trial(factors: Sequence[float], share: str) -> Choice:
    """See `Factors.tried`."""
    return lambda of, fraction, task: of.tried(factors, share)


def elsewhere(runs: Runs, method: str) -> Choice:
    """Take the factor with the lowest mean lost share on all other tasks, at the same fraction frozen."""

    def choose(of: Factors, fraction: float, task: str) -> Ints:
        shares = [_shares(runs, t, Factors(runs, t, f"{method}@{fraction}")) for t in runs.gains if t != task]
        return of.nearest(of.factors[int(np.argmin(np.mean([v.mean(0) for v in shares if len(v)], axis=0)))])

    return choose


def _shares(runs: Runs, task: str, of: Factors) -> Floats:
    """Return lost shares, (seeds, factors); a diverged run's is `MOST`."""
    if not of:
        return np.empty((0, 0))
    best = np.array([runs.twin(task)[seed] for seed in of.seeds])
    return np.minimum(np.nan_to_num((of.of("test") - best[:, None]) / runs.gains[task], nan=MOST), MOST)


def lost(runs: Runs, method: str, fraction: float | None = None, choose: Choice = tuned) -> Shares:
    """Return the lost shares of a method, at one fraction frozen or at all that it has."""
    found: Shares = {}
    for task in runs.gains:
        for f in runs.fractions if fraction is None else [fraction]:
            if of := Factors(runs, task, f"{method}@{f}"):
                shares = np.take_along_axis(_shares(runs, task, of), choose(of, f, task)[:, None], 1)[:, 0]
                for seed, share in zip(of.seeds, shares.tolist(), strict=True):
                    found.setdefault(task, {}).setdefault(seed, {})[f] = share
    return found


def apart(a: Shares, b: Shares) -> dict[str, Floats]:
    """Return differences by task, (seeds,), means over the fractions that both have."""
    found: dict[str, list[float]] = {}
    for task, seeds in a.items():
        for seed, of in seeds.items():
            if both := set(of) & set(b.get(task, {}).get(seed, {})):
                found.setdefault(task, []).append(float(np.mean([of[f] - b[task][seed][f] for f in both])))
    return {task: np.array(of) for task, of in found.items()}


def mean_of(shares: Shares) -> float:
    """Return the mean over tasks of the means over seeds and fractions."""
    by_task = [np.mean([share for of in seeds.values() for share in of.values()]) for seeds in shares.values()]
    return float(np.mean(by_task)) if by_task else math.nan


# Tables -------------------------------------------------------------------------------------------------------------


def report(by_way: Mapping[str, Runs]) -> str:
    """Return all tables in Markdown."""
    parts = ["# Every method at its own best rate"]
    for way, runs in by_way.items():
        if runs:
            parts += [f"## {way}", ends(runs), *orders(runs), "### The factor", best_factors(runs)]
            parts += ["### `movement` at the base rate, against others at their own best", verdict(runs, "movement")]
            for method in ("movement", "progress"):
                parts += [f"### Rules for the factor, {method}", rules(runs, method)]
            parts += ["### Test metric against the tuned unfrozen run's, percent of it", metrics(runs)]
    return "\n\n".join(parts) + "\n"


def ends(runs: Runs) -> str:
    """A row a task: what was tuned, and what there was to gain."""
    rows = []
    for task in runs.tasks:
        own = [run for (name, _), run in runs.items() if name == task]
        of = Factors(runs, task, "unfrozen")
        stop, end = np.mean([run["all_frozen"]["test"][0] for run in own]), np.mean(list(runs.twin(task).values()))
        rows.append([
            task, f"{own[0]['p']:,}", f"{len(own)}", f"{own[0]['base']:.2g}", f"{of.factors[of.tuned()[0]]:g}",
            f"{stop:.3f} → {end:.3f}", "yes" if task in runs.gains else "no",
        ])  # fmt: skip
    return table(["task", "p", "runs", "base rate", "unfrozen twin's factor", "test loss at t0 → end", "counts"], rows)


def orders(runs: Runs) -> list[str]:
    """The main table: lost shares at each method's own rate, what they were at the base rate, and differences."""
    alpha = 0.05 / max(1, len(set(runs.methods) - {*ORACLES}) - 1)
    shares = {m: lost(runs, m) for m in runs.methods}
    to_random = {m: apart(of, shares["random"]) for m, of in shares.items()}
    best_first = sorted(
        (m for m in to_random if to_random[m]), key=lambda m: np.mean([v.mean() for v in to_random[m].values()])
    )
    rows, by_task = [], []
    for m in best_first:
        parts = {f: lost(runs, m, f) for f in runs.fractions}
        cells = [_mean(of, len(runs.gains)) for of in parts.values()]
        means = [f"{mean_of(shares[m]):.2f}", f"{mean_of(lost(runs, m, None, power(0.0))):.2f}"]
        rows.append([m, *cells, *means, *(difference(apart(shares[m], shares.get(r, {})), alpha) for r in REFERENCES)])
        by_task.append([m, *(f"{mean_of({t: parts[0.8][t]}):.2f}" if t in parts[0.8] else "-" for t in runs.gains)])
    head = ["method", *map(str, runs.fractions), "mean", "at the base rate", *(f"to {r}" for r in REFERENCES)]
    return [
        f"### Lost share, {1 - alpha:.2%} intervals; in brackets the tasks, where not all", table(head, rows),
        "### By task, 80 % frozen", table(["method", *runs.gains], by_task),
    ]  # fmt: skip


def verdict(runs: Runs, method: str) -> str:
    """What a method without any factor gives away, or gains, against others at their own best factors, by fraction."""
    others = [m for m in RIVALS if m in runs.methods]
    alpha, rows = 0.05 / len(others), []
    for other in others:
        cells = []
        for f in (None, *runs.fractions):
            cells.append(difference(apart(lost(runs, method, f, power(0.0)), lost(runs, other, f)), alpha))
        rows.append([other, *cells])
    return table(["minus", "all", *map(str, runs.fractions)], rows)


def _mean(shares: Shares, n_tasks: int) -> str:
    """The mean, with the number of tasks in brackets where it is not that of all."""
    return f"{mean_of(shares):.2f}" + (f" ({len(shares)})" if len(shares) < n_tasks else "") if shares else "-"


def best_factors(runs: Runs) -> str:
    """Geometric means over tasks of the chosen factors, over those of the unfrozen twins."""
    fractions, rows = runs.fractions, []
    own = {task: Factors(runs, task, "unfrozen") for task in runs.gains}
    for m in runs.methods:
        cells = []
        for f in fractions:
            both = [(of, own[t]) for t in own if (of := Factors(runs, t, f"{m}@{f}"))]
            logs = [np.log2(of.factors[of.tuned()[0]] / best.factors[best.tuned()[0]]) for of, best in both]
            cells.append(f"{2 ** np.mean(logs):.1f}" if logs else "-")
        rows.append([m, *cells])
    return table(["method", *map(str, fractions)], rows)


def rules(runs: Runs, method: str) -> str:
    """Lost shares by rule, and differences to a factor of 1, at each fraction; in brackets the worst task's."""
    fractions = [f for f in runs.fractions if f in (0.8, 0.95, 0.99)]
    candidates: dict[str, Choice] = {
        "1": power(0.0),
        "1/2": power(0.0, 0.5),
        "2": power(0.0, 2.0),
        "4": power(0.0, 4.0),
        "(1-f)^-1/4": power(0.25),
        "(1-f)^-1/2": power(0.5),
        "best on the other tasks": elsewhere(runs, method),
        **{
            f"trial of {name}, {share}": trial(factors, share)
            for name, factors in {"1, 2": (1.0, 2.0), "1, 4": (1.0, 4.0), "1/4, 1": (0.25, 1.0)}.items()
            for share in ("0.05", "0.2")
        },
        "tuned": tuned,
    }  # fmt: skip
    base = {f: lost(runs, method, f, power(0.0)) for f in fractions}
    if not all(base.values()):
        return "-"
    alpha, rows = 0.05 / (len(candidates) - 1), []
    for name, choose in candidates.items():
        cells = []
        for f in fractions:
            of = lost(runs, method, f, choose)
            pairs = apart(of, base[f])
            worst = max(float(v.mean()) for v in pairs.values())
            cells += [f"{mean_of(of):.2f}", f"{difference(pairs, alpha)} ({worst:+.2f})"]
        rows.append([name, *cells])
    head = ["factor", *(column for f in fractions for column in (f"{f}", "to 1 (worst task)"))]
    return table(head, rows)


def metrics(runs: Runs) -> str:
    """The test metric against the unfrozen twin's, percent of it, positive where better; means over tasks."""
    rows = []
    for m in runs.methods:
        cells = []
        for f in runs.fractions:
            by_task = []
            for task in runs.gains:
                if of := Factors(runs, task, f"{m}@{f}"):
                    best, sign = (
                        runs.twin(task, "test_metric"),
                        100 if (RATE_TASKS | FRESH_TASKS)[task].higher_is_better else -100,
                    )
                    own = of.at("test_metric", of.tuned())
                    by_task.append(
                        np.mean([sign * (v / best[seed] - 1) for seed, v in zip(of.seeds, own, strict=True)])
                    )
            cells.append(f"{np.mean(by_task):+.2f}" if by_task else "-")
        rows.append([m, *cells])
    return table(["method", *map(str, runs.fractions)], rows)


def difference(pairs: Mapping[str, Floats], alpha: float) -> str:
    """A mean over tasks with its interval."""
    if not pairs:
        return "-"
    mean, low, high = interval(pairs, alpha)
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
