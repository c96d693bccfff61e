"""What the runs of an experiment say together: curves, differences to chance, α̂, and how stable a frozen set is.

NumPy in; numbers, lists and None for what is undefined out, ready for JSON. R runs, F fractions, p parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom, hypergeom, t

from examples.paper.run import Losses, Masks, Run
from examples.paper.tasks import TASKS, Settings

Floats = NDArray[np.float64]
Shapes = Mapping[str, Sequence[int]]  # of a model's parameters, by name
STAGES = ("train", "test")


def summarise(settings: Settings, runs: Sequence[Run], left_out: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All that NAME.json holds; examples/README.md explains its keys.

    Args:
        settings: of the runs.
        runs: what they left.
        left_out: the orders that were asked for and are not in `settings`, with the reason.
    """
    losses = {
        order: {stage: np.stack([getattr(run, stage)[i] for run in runs]) for stage in STAGES}
        for i, order in enumerate(settings.orders)
    }
    frozen = {order: np.stack([run.frozen[i] for run in runs], 1) for i, order in enumerate(settings.orders)}
    shapes = {name: tuple(p.shape) for name, p in TASKS[settings.data].model().named_parameters()}
    rivals = [order for order in settings.orders if order != "random"]

    def against_random(compare: Callable[[Losses, Losses], dict[str, Any]]) -> dict[str, Any]:
        return {
            order: {stage: compare(losses[order][stage], losses["random"][stage]) for stage in STAGES}
            for order in rivals
        }

    def by_fraction(masks: Masks, describe: Callable[[Masks], Any]) -> dict[str, Any]:
        return {str(f): describe(masks[j]) for j, f in enumerate(settings.fractions)}

    return {
        **asdict(settings),
        "p": int(sum(map(np.prod, shapes.values()))),
        "runs": len(runs),
        "left_out": dict(left_out or {}),
        "orders": {order: {stage: curve(losses[order][stage]) for stage in STAGES} for order in losses},
        "paired": against_random(paired),
        "growth": against_random(growth),
        "growth_over_curve": against_random(growth_over_curve),
        "alpha": {order: by_fraction(masks, lambda m: m.mean(0).round(6).tolist()) for order, masks in frozen.items()},
        "stability": {
            "chance": by_fraction(frozen["random"], chance),
            **{order: by_fraction(masks, lambda m: stability(m, shapes)) for order, masks in frozen.items()},
        },
    }


def curve(losses: Losses) -> dict[str, Any]:
    """Mean, standard deviation and single values of (R, F) losses."""
    spread = losses.std(0, ddof=1) if len(losses) > 1 else np.full(losses.shape[1], np.nan)
    return {"mean": _plain(losses.mean(0)), "std": _plain(spread), "runs": _plain(losses)}


def paired(losses: Losses, baseline: Losses) -> dict[str, Any]:
    """Mean of the differences run by run, and Student's 95 % interval around it. Both (R, F)."""
    difference = losses - baseline
    runs, mean = len(difference), difference.mean(0)
    error = difference.std(0, ddof=1) / np.sqrt(runs) if runs > 1 else np.full_like(mean, np.nan)
    half = error * t.ppf(0.975, max(runs - 1, 1))
    return {"mean": _plain(mean), "interval": _plain(np.stack([mean - half, mean + half], 1))}


def growth(losses: Losses, baseline: Losses) -> dict[str, Any]:
    """The share of the baseline's cost of freezing that an order pays: 1 is no better, 0 costs nothing.

    (L(order, f) - L(0)) / (L(baseline, f) - L(0)), L the mean over runs; both (R, F), the first column L(0). The
    interval is Fieller's of 95 %, for a ratio of paired means. None where the baseline's own cost is not clearly above
    0: there is nothing to have a share of.
    """
    mean, interval = np.full(losses.shape[1], np.nan), np.full((losses.shape[1], 2), np.nan)
    runs = len(losses)
    for j in range(1, losses.shape[1]) if runs > 1 else ():
        costs = np.stack([losses[:, j] - losses[:, 0], baseline[:, j] - baseline[:, 0]])
        cost, unit = costs.mean(1)
        error = t.ppf(0.975, runs - 1) ** 2 * np.cov(costs) / runs
        a, b, c = unit**2 - error[1, 1], cost * unit - error[0, 1], cost**2 - error[0, 0]
        if unit > 0 and a > 0:
            root = np.sqrt(max(b**2 - a * c, 0.0))
            mean[j], interval[j] = cost / unit, ((b - root) / a, (b + root) / a)
    return {"mean": _plain(mean), "interval": _plain(interval)}


def growth_over_curve(losses: Losses, baseline: Losses) -> dict[str, Any]:
    """`growth` of a whole curve: in each run the rises at the fractions between 0 and 1 are added up.

    Both (R, F), from freezing nothing to freezing everything. One mean, and one interval.
    """
    summed = [np.column_stack([0 * one[:, 0], (one[:, 1:-1] - one[:, :1]).sum(1)]) for one in (losses, baseline)]
    return {key: values[1] for key, values in growth(*summed).items()}


def stability(masks: Masks, shapes: Shapes) -> dict[str, Any]:
    """How much the frozen sets of R runs, (R, p), agree.

    Returns:
        "jaccard": |A ∩ B| / |A ∪ B|, mean over pairs of runs. "aligned": the same after the hidden units of one run are
        permuted to fit the other's best; None without a hidden layer. "alpha": how many parameters were frozen in
        0, 1, …, R runs.
    """
    runs = len(masks)
    pairs = list(combinations(range(runs), 2))
    common = masks.astype(np.float64) @ masks.T  # exact: counts
    aligned = [_best_common(masks[a], masks[b], shapes) for a, b in pairs] if len(shapes) > 1 else []
    return {
        "jaccard": _jaccard(np.array([common[pair] for pair in pairs]), masks),
        "aligned": _jaccard(np.array(aligned), masks),
        "alpha": np.bincount(masks.sum(0), minlength=runs + 1).tolist(),
    }


def chance(masks: Masks) -> dict[str, Any]:
    """What `stability` would be expected to find in sets of these sizes drawn at random; "aligned" has no formula."""
    runs, p = masks.shape
    k = int(masks[0].sum())
    return {
        "jaccard": float(hypergeom(p, k, k).expect(lambda common: common / (2 * k - common))) if k else None,
        "alpha": _plain(p * binom.pmf(np.arange(runs + 1), runs, k / p)),
    }


def middle(fractions: Sequence[float]) -> int:
    """Where the fraction is that lies nearest to a half."""
    return min(range(len(fractions)), key=lambda i: abs(fractions[i] - 0.5))


def _jaccard(common: Floats, masks: Masks) -> float | None:
    """Of pairs of sets with as many elements as the rows of `masks`, by how many they have in common."""
    k = int(masks[0].sum())
    return float(np.mean(common / (2 * k - common))) if k and len(common) else None


def _best_common(a: Masks, b: Masks, shapes: Shapes) -> float:
    """How many elements two frozen sets of a perceptron share under the best permutation of its hidden units.

    A unit owns its row of the first weight matrix, its bias, and its column of the second; the rest stays in place.
    """
    (units_a, rest_a), (units_b, rest_b) = _units(a, shapes), _units(b, shapes)
    common = units_a.astype(np.float64) @ units_b.T
    return float(common[linear_sum_assignment(common, maximize=True)].sum() + (rest_a & rest_b).sum())


def _units(mask: Masks, shapes: Shapes) -> tuple[Masks, Masks]:
    """The elements that each hidden unit owns, (units, owned), and the output's biases."""
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    parts = np.split(mask, np.cumsum(sizes)[:-1])
    first, bias, second, rest = (part.reshape(shape) for part, shape in zip(parts, shapes.values(), strict=True))
    return np.column_stack([first, bias, second.T]), rest


def _plain(values: Floats) -> Any:
    """Nested lists, with None for what is no number, which JSON lacks."""
    finite: Any = values.astype(object)
    finite[~np.isfinite(values)] = None
    return finite.tolist()
