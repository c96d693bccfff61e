"""How sharp an order each pair (samples, every) gives for what it costs, on real digits.

    uv run python -m benchmarks.sharpness [--models M1,M2,M3] [--settings first/1,8/4,all/16] [--steps 64,256,1024]
                                          [--moving] [--windows 4] [--rounds 30] [--json FILE]

A model is trained for some steps, so that it is past its initialisation, and then held still: the true order is one
fixed thing, by the variance of a single sample's gradient over all 3,600 digits of the training split, in float64.
Every setting sees the same T batches, in shuffled epochs; figures are means over several such windows, as far as the
longest T has room for them. With --moving the model trains on instead, there is one window, and the truth is the mean
of that variance along the way, taken at every 16th step.

Elements whose variance is exactly zero, those of pixels that are always dark, are left out: any setting finds them.
Overlap is the share of the k truly quietest that are among the k found, k = f times all others; an order drawn by
chance has f. The whole step is 1 + (observed / plain - 1) / every: the steps in between cost nothing.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from itertools import islice, product
from pathlib import Path

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.observe import MODELS, Batch, Step, keep_freed_memory
from examples.data import MNIST
from lightning_gcfreeze import orderings, selection
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.decision import scores_now
from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.observing import Observing

PAPER = "first/1"
SETTINGS = (PAPER, "first/2", "first/4", "8/4", "8/8", "all/1", "all/4", "all/8", "all/16", "all/32", "all/64")
FRACTIONS = (0.5, 0.9)
AT_ONCE = 100
"""Samples of a batch of the truth; all batches are equal, since 3,600 is a multiple."""
APART = 16
"""Steps between two truths of a model that moves."""


def convnet() -> nn.Sequential:
    """M3 of the benchmark of costs, for digits: 0.3 million parameters."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for n_in, n_out in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1152, 200), nn.ReLU(), nn.Linear(200, 10))


CASES: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    "M1": (MODELS["M1"][0], MODELS["M1"][1], 64),
    "M2": (MODELS["M2"][0], MODELS["M2"][1], 128),
    "M3": ("convnet, 28x28, S = 64", convnet, 64),
}


@dataclass
class Row:
    """What a setting reaches in T steps: means over the windows."""

    model: str
    setting: str
    steps: int
    seen: float
    spearman: float
    overlap_half: float
    overlap_most: float
    whole: float

    @property
    def sharpness(self) -> tuple[float, float, float]:
        return self.spearman, self.overlap_half, self.overlap_most

    def beats(self, other: "Row") -> bool:
        return all(mine > its for mine, its in zip(self.sharpness, other.sharpness, strict=True))


class Watched(Step):
    """A model whose gradients, had in one way, enter several statistics: every k-th step's, over windows of T steps."""

    def __init__(self, like: Step, samples: str, keys: Iterable[tuple[int, int]], windows: int) -> None:
        self.most = count(samples)
        super().__init__(deepcopy(like.model), like.batch, how="auto", count=self.most)
        self.optimizer.load_state_dict(like.optimizer.state_dict())
        self.statistics = {key: Observing(self.parameters) for key in keys}  # by (every, T)
        self.seen = dict.fromkeys(self.statistics, 0)
        self.windows = windows

    def watch(self, batch: Batch, t: int, moves: bool = False) -> None:
        """Step t, of the optimizer too if the model moves."""
        due = [(every, steps) for every, steps in self.statistics if t % every == 0 and t <= steps * self.windows]
        if not due and not moves:
            return
        assert self.samples is not None
        if due:
            self.samples.begin_batch(batch, 0)
        loss = self.training_step(batch, 0)
        self.samples.begin_backward()
        loss.backward()
        if due:
            self.samples.end_backward()
            g_batch, size = batch_gradients(self.parameters), len(batch[1])
            found = self.samples.gradients(1.0, g_batch, size)
            assert found is not None
            for key in due:
                self.statistics[key].observe(
                    self.statistics[key].observed + 1, found.by_name, g_batch, "1/t", size, found.mean_is_g_batch
                )
                self.seen[key] += size if self.most is None else min(size, self.most)
        if moves:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def ended(self, t: int) -> Iterator[tuple[int, int, int, Tensor]]:
        """(every, T, samples seen, variances) of the windows that end with step t; the next ones begin."""
        for every, steps in self.statistics:
            if t % steps == 0 and t <= steps * self.windows and self.statistics[every, steps].observed:
                yield every, steps, self.seen[every, steps], flat(self.statistics[every, steps].variance)
                self.statistics[every, steps], self.seen[every, steps] = Observing(self.parameters), 0


def count(samples: str) -> int | None:
    """As `SampleGradients` takes it."""
    return {"first": 1, "all": None}[samples] if samples in ("first", "all") else int(samples)


@orderings.needs("mean", "second_moment")
def population(evidence: orderings.Evidence) -> Named:
    """Variance within batches plus variance between their means."""
    assert evidence.mean is not None
    assert evidence.second_moment is not None
    mean, square = evidence.mean, evidence.second_moment
    return {name: v + (square[name] - mean[name].square()) for name, v in evidence.variance.items()}


def true_variance(at: Step, digits: Batch, dtype: torch.dtype) -> Tensor:
    """Of a single sample's gradient over all digits, where the model is; all elements in a row, in float64."""
    copy = Watched(at, "all", [(1, 1)], len(digits[1]))
    copy.model.to(dtype)
    copy.statistics[1, 1] = statistics = Observing(copy.parameters, needs=orderings.needed_by(population))
    for t, (x, y) in enumerate(zip(digits[0].split(AT_ONCE), digits[1].split(AT_ONCE), strict=True), start=1):
        copy.watch((x.to(dtype), y), t)
    return flat(scores_now(statistics, population, copy.parameters, 0, "element"))


def flat(scores: Named) -> Tensor:
    return torch.cat([score.flatten() for score in scores.values()]).double()


def batches(digits: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Epoch after epoch, shuffled; the last batch of each is shorter."""
    loader = DataLoader(
        TensorDataset(*digits), size, shuffle=True, generator=torch.Generator().manual_seed(seed), collate_fn=list
    )
    while True:
        for rows in loader:
            yield torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


@dataclass
class Truth:
    """The elements that have a variance, and their order."""

    live: Tensor
    shared_ranks: Tensor
    """Equal values share one."""
    places: Tensor

    @classmethod
    def of(cls, variance: Tensor) -> "Truth":
        live = variance > 0
        return cls(live, *ranked(variance[live]))

    def compare(self, found: Tensor) -> list[float]:
        """Spearman's correlation of the two orders and the overlaps of what would freeze."""
        shared_ranks, places = ranked(found[self.live])
        figures = [float(torch.corrcoef(torch.stack([shared_ranks, self.shared_ranks]))[0, 1])]
        for f in FRACTIONS:
            k = selection.resolve_count(f, len(places))
            figures.append(int(((places <= k) & (self.places <= k)).sum()) / k)
        return figures


def ranked(values: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks that equal values share, and those by which elements freeze."""
    return torch.as_tensor(rankdata(values.numpy())), selection.ranks({"": values})[""]


def sharpness(start: Step, digits: Batch, args: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """Samples seen and the three figures, by setting and T."""
    everies: dict[str, list[int]] = {}
    for setting in args.settings:
        samples, every = setting.split("/")
        everies.setdefault(samples, []).append(int(every))
    windows = 1 if args.moving else args.windows
    watched = {s: Watched(start, s, product(of, args.steps), windows) for s, of in everies.items()}
    sums = torch.tensor(0.0) if args.moving else true_variance(start, digits, torch.float64)
    truth = None if args.moving else Truth.of(sums)
    found: dict[tuple[str, int], list[list[float]]] = {}
    for t, batch in enumerate(islice(batches(digits, len(start.batch[1]), seed=1), max(args.steps)), start=1):
        if args.moving and t % APART == APART // 2:
            sums = sums + true_variance(next(iter(watched.values())), digits, torch.float32)
        if args.moving and t in args.steps:
            truth = Truth.of(sums)
        for samples, model in watched.items():
            model.watch(batch, t, args.moving)
            for every, steps, seen, variance in model.ended(t):
                assert truth is not None
                found.setdefault((f"{samples}/{every}", steps), []).append([seen, *truth.compare(variance)])
    return {key: [statistics.fmean(each) for each in zip(*of, strict=True)] for key, of in found.items()}


def costs(start: Step, ways: Sequence[str], rounds: int) -> dict[str, float]:
    """Median ratio of an observed step to the plain one, by `samples`, in CPU time; a step of each in turn."""
    steps = {"plain": Step(deepcopy(start.model), start.batch)}
    steps |= {s: Step(deepcopy(start.model), start.batch, how="auto", count=count(s)) for s in ways}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for i in range(rounds + 3):
        for way, step in steps.items():
            begin = time.thread_time()
            step()
            if i >= 3:  # the first ones allocate
                times[way].append(time.thread_time() - begin)
    return {
        way: statistics.median(t / plain for t, plain in zip(times[way], times["plain"], strict=True)) for way in ways
    }


def trained(name: str, digits: Batch, warm_up: int) -> Step:
    """The model after some steps of Adam."""
    torch.manual_seed(0)
    _, make, size = CASES[name]
    stream = batches(digits, size, seed=0)
    step = Step(make(), next(stream))
    for batch in islice(stream, warm_up):
        step.batch = batch
        step()
    step.batch = next(full for full in stream if len(full[1]) == size)
    return step


def measure(name: str, digits: Batch, args: argparse.Namespace) -> list[Row]:
    """All rows of a model."""
    start = trained(name, digits, args.warm_up)
    ratios = costs(start, sorted({setting.split("/")[0] for setting in args.settings}), args.rounds)
    found = sharpness(start, digits, args)
    return [
        Row(name, setting, t, *found[setting, t], 1 + (ratios[setting.split("/")[0]] - 1) / int(setting.split("/")[1]))
        for setting, t in product(args.settings, args.steps)
        if (setting, t) in found
    ]


def table(rows: Sequence[Row]) -> str:
    """A row for each model, setting and T."""
    lines = [
        "| model | setting | steps T | samples seen | Spearman | overlap f=.5 | overlap f=.9 | whole step / plain |",
        "|" + " --- |" * len(fields(Row)),
    ]
    lines += [
        f"| {r.model} | {r.setting} | {r.steps} | {r.seen:.0f} | {r.spearman:.3f} | {r.overlap_half:.3f} |"
        f" {r.overlap_most:.4f} | {r.whole:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def sharper(rows: Sequence[Row], most: float) -> list[tuple[str, float]]:
    """Settings that cost at most this and beat the paper's on all figures of all rows, and their cost, cheapest first.

    The cost is that of the model where it is highest.
    """
    paper = {(r.model, r.steps): r for r in rows if r.setting == PAPER}
    worst: dict[str, float] = {}
    beaten: dict[str, int] = {}
    for r in rows:
        worst[r.setting] = max(r.whole, worst.get(r.setting, 0.0))
        beaten[r.setting] = beaten.get(r.setting, 0) + r.beats(paper[r.model, r.steps])
    found = [(s, cost) for s, cost in worst.items() if beaten[s] == len(paper) and cost <= most]
    return sorted(found, key=lambda pair: pair[1])


def conclusions(rows: Sequence[Row], most: float) -> str:
    """A line for each model and T, for each model, and for all."""
    models, steps = (list(dict.fromkeys(getattr(r, field) for r in rows)) for field in ("model", "steps"))
    groups = {f"{m}, T = {t}": [r for r in rows if (r.model, r.steps) == (m, t)] for m in models for t in steps}
    groups |= {f"{m}, every T": [r for r in rows if r.model == m] for m in models}
    groups["all"] = list(rows)
    lines = [f"Sharper than {PAPER} on all three figures with a whole step of at most {most}, cheapest first:"]
    for title, group in groups.items():
        listing = ", ".join(f"{setting} ({whole:.3f})" for setting, whole in sharper(group, most))
        lines.append(f"- {title}: {listing or 'none'}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_list, default=list(CASES), help="of M1, M2, M3")
    parser.add_argument("--settings", type=_list, default=list(SETTINGS), help=f"samples/every; {PAPER} among them")
    parser.add_argument("--steps", type=lambda v: [int(t) for t in _list(v)], default=[64, 256, 1024], help="T")
    parser.add_argument("--warm-up", type=int, default=100, help="steps of training before (%(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="of T steps, at most (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of every way (%(default)s)")
    parser.add_argument("--most", type=float, default=1.03, help="what a whole step may cost (%(default)s)")
    parser.add_argument("--moving", action="store_true", help="train on while observing")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    data = MNIST()
    data.setup()
    x, y = data.dataset["train"].tensors
    rows = [row for name in args.models for row in measure(name, (x, y), args)]
    moves = "moving" if args.moving else "still"
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {moves}, {args.rounds} rounds\n")
    print(f"{table(rows)}\n\n{conclusions(rows, args.most)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


def _list(value: str) -> list[str]:
    return value.split(",")


if __name__ == "__main__":
    main()
