"""What does freezing cost when every method has a learning rate of its own? Thirteen tasks, four ways to train.

    uv run --group bench python -m benchmarks.quality.rates [--tasks boston,text] [--ways adam,sgd] [--seeds 5]
                                                            [--out DIR] [--only-report]

A run, of one task, way and seed:

1. The base rate is the one with which unfrozen training ends at the lowest validation loss, a mean over the seeds.
2. The warm-up is a fit of a Lightning Trainer at that rate, up to t0.
3. From there every method goes on at each fraction frozen and each factor of the rate, on the same batches: the orders
   of freezing, adapters of as many parameters, BitFit, and the unfrozen twin.
4. The factor of each is chosen likewise; what is reported are test loss and test metric.

Validation and test data are the halves of what the task holds out, which neither training nor observing has seen.
Leaves WAY-TASK-SEED.json in DIR, so that an interrupted command goes on where it stopped; `rate_summary` makes tables.
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from benchmarks.quality import adapters, batched, rate_summary
from benchmarks.quality.orders import prefix
from benchmarks.quality.rivals import RIVALS, Calibration, calibrate
from benchmarks.quality.tasks import FEW, FRESH_TASKS, RATE_TASKS, Task
from examples.models import Batch, SupervisedModule
from examples.paper.run import Recorder, epochs
from lightning_gcfreeze import Evidence, GradCovFreezeCallback, orderings, selection
from lightning_gcfreeze._types import Named

FRACTIONS = (0.5, 0.8, 0.9, 0.95, 0.99)
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
FRESH_FACTORS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of methods that begin with a new optimizer at t0: LoRA's best rates are about ten times the ordinary ones."""
TIMES = 4  # that a run is judged, in the last tenth of its steps
TRIALS = (0.02, 0.05, 0.1, 0.2)
"""Shares of the steps after t0 whose training losses are kept, for rules that try two factors."""
AT_ONCE = 3_000_000  # elements that train at once, at most
CALIBRATED = 2000  # training samples whose gradient the published criteria look at, at most


@dataclass(frozen=True)
class Way:
    """How to train."""

    optimizer: str  # "adam" or "sgd", with momentum 0.9
    decays: bool  # the rate falls linearly to 0; else it is constant
    bases: tuple[float, ...]  # learning rates; Adam's are multiples of the task's own
    share: float = 1.0  # of the best of them, that is the base rate
    orders: tuple[str, ...] = ()  # that are compared, if not all

    def optimizers(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """With the learning rate 1."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=1.0, fused=True)
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, fused=True)

    def rates(self, steps: int) -> list[float]:
        """The learning rate of each step, for a base rate of 1."""
        return [1 - t / steps if self.decays else 1.0 for t in range(steps)]


_ADAM_BASES = tuple(2.0**i for i in range(-3, 6))
WAYS = {
    "adam": Way("adam", False, _ADAM_BASES),
    "adam_decay": Way("adam", True, _ADAM_BASES),
    "sgd": Way("sgd", False, tuple(1e-3 * 3.0**i for i in range(-1, 7))),
    "adam_low": Way("adam", False, _ADAM_BASES, share=1 / 8, orders=FEW),
}


@dataclass(frozen=True)
class Seen:
    """What was seen until t0. Tensors are keyed by parameter name and shaped like the parameter."""

    first: Evidence
    """What the callback saw with samples="first"."""
    all: Evidence
    """What it saw with samples="all", on the same way."""
    calibration: Calibration
    moved: Named
    """|w_T - w_t0| of the run that goes on unfrozen: an oracle's."""


Order = Callable[[Seen], Named]
ORDERS: dict[str, Order] = {
    "progress": lambda r: orderings.progress(r.first),
    "recent_mean": lambda r: {name: m.square() for name, m in (r.first.recent_mean or {}).items()},
    "momentum": lambda r: orderings.momentum(r.first),
    "movement": lambda r: orderings.movement(r.first),
    "variance_first": lambda r: r.first.variance,
    "variance_all": lambda r: r.all.variance,
    "second_moment": lambda r: orderings.second_moment(r.first),
    "magnitude": lambda r: orderings.magnitude(r.first),
    "random": lambda r: orderings.random(r.first),
    "last_layers": lambda r: prefix(r),  # type: ignore[arg-type]
    **{name: lambda r, rival=rival: rival(r.calibration) for name, rival in RIVALS.items()},
    "oracle_move": lambda r: r.moved,
}


@dataclass(frozen=True)
class Start:
    """The state at t0, and what comes after it."""

    task: Task
    way: Way
    seed: int
    base: float  # the learning rate
    model: SupervisedModule
    state: Mapping[str, Mapping[str, Any]]  # the optimizer's, by parameter name
    batches: Sequence[Batch]
    rates: Sequence[float]
    splits: Mapping[str, TensorDataset]

    @property
    def held_out(self) -> dict[str, TensorDataset]:
        return {name: self.splits[name] for name in ("val", "test")}

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}


class Watch(pl.Callback):
    """Keeps the optimizer's state at t0."""

    state: dict[str, dict[str, Any]]

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = trainer.optimizers[0].state
        self.state = {name: dict(state[p]) for name, p in pl_module.named_parameters()}


def splits_of(task: Task, seed: int) -> dict[str, TensorDataset]:
    """The training data, and two halves of all that is held out."""
    found = task.data(seed)
    held = [torch.cat(pair) for pair in zip(found["val"].tensors, found["test"].tensors, strict=True)]
    order = torch.randperm(len(held[0]), generator=torch.Generator().manual_seed(seed))
    parts = {"val": order[: len(order) // 2], "test": order[len(order) // 2 :]}
    return {"train": found["train"], **{name: TensorDataset(*(t[rows] for t in held)) for name, rows in parts.items()}}


def try_bases(task: Task, way: Way, seed: int) -> tuple[list[float], list[float]]:
    """Train unfrozen with every base rate: the rates, and the validation losses at the end."""
    splits, batches = splits_of(task, seed), batches_of(task, seed)
    pl.seed_everything(seed, verbose=False)
    model = task.model()
    bases = [base * (task.lr if way.optimizer == "adam" else 1.0) for base in way.bases]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    live = {name: torch.ones(1, *w.shape, dtype=torch.bool) for name, w in weights.items()}
    members = batched.Members(model, weights, live, torch.tensor(bases), {})
    end = End(task, model, {"val": splits["val"]}, task.steps)
    batched.train(members, way.optimizers, batches, way.rates(task.steps), end)
    return bases, end.means()["val"].nan_to_num(nan=torch.inf, posinf=torch.inf).tolist()


class End:
    """Losses and metrics, means over `TIMES` steps in the last tenth: at a constant rate, a single one is noisy."""

    def __init__(self, task: Task, model: SupervisedModule, splits: Mapping[str, TensorDataset], steps: int) -> None:
        self.task, self.model, self.splits = task, model, splits
        self.at = {steps - round(i * 0.1 * steps / TIMES) for i in range(TIMES)}
        self.found: dict[str, list[Tensor]] = {}

    def __call__(self, steps: int, weights: Named) -> None:
        if steps in self.at:
            for split, data in self.splits.items():
                loss, metric = batched.judge(self.task, self.model, weights, data)
                self.found.setdefault(split, []).append(loss)
                self.found.setdefault(f"{split}_metric", []).append(metric)

    def means(self) -> dict[str, Tensor]:
        """{split or split_metric: (M,)}."""
        return {name: torch.stack(of).mean(0) for name, of in self.found.items()}


def batches_of(task: Task, seed: int) -> list[Batch]:
    """Return the batches of all steps."""
    train = task.data(seed)["train"]
    return [train[rows] for rows in epochs(len(train), task.batch_size, task.steps, seed)]


def prepare(task: Task, way: Way, seed: int, base: float) -> tuple[Start, Seen]:
    """Train to t0, once for each way of observing; the seed fixes the split, the initial weights and the batches."""
    splits = splits_of(task, seed)
    indices = epochs(len(splits["train"]), task.batch_size, task.t0, seed)
    seen: dict[str, Evidence] = {}
    for samples in ("first", "all"):
        pl.seed_everything(seed, verbose=False)
        model, watch, recorder = task.model(), Watch(), Recorder()
        rates = way.rates(task.steps)

        def optimizers(model: SupervisedModule = model, rates: Sequence[float] = rates) -> Any:
            optimizer = way.optimizers(list(model.parameters()))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: base * rates[t])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        model.configure_optimizers = optimizers  # type: ignore[method-assign]
        freeze = GradCovFreezeCallback(task.t0, k=0, order=recorder, samples=samples, seed=(seed + 2**31) % 2**32)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=task.t0, callbacks=[freeze, watch], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, DataLoader(splits["train"], sampler=indices, batch_size=None))
        seen[samples] = recorder.evidence
    same = [torch.equal(w, seen["all"].weights[name]) for name, w in seen["first"].weights.items()]
    assert all(same), "observing has left a trace"
    fresh = task.model()  # without the Trainer
    fresh.load_state_dict(model.state_dict())
    start = Start(
        task,
        way,
        seed,
        base,
        fresh,
        watch.state,
        batches_of(task, seed)[task.t0 :],
        [base * r for r in rates[task.t0 :]],
        splits,
    )
    some = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(seed))[:CALIBRATED]
    calibration = calibrate(fresh, fresh.loss, *splits["train"][some.sort().values])
    return start, Seen(seen["first"], seen["all"], calibration, {})


def run(task: Task, way: Way, seed: int, base: float) -> dict[str, Any]:
    """Everything of one task, way and seed, at a base rate."""
    start, seen = prepare(task, way, seed, base)
    p = sum(w.numel() for w in start.weights.values())
    end = End(task, start.model, start.held_out, 1)
    end(1, {name: w[None] for name, w in start.weights.items()})
    stopped = {name: finite(value) for name, value in end.means().items()}
    found: dict[str, Any] = {"p": p, "base": base, "all_frozen": stopped}
    everything = {name: torch.ones_like(w, dtype=torch.bool) for name, w in start.weights.items()}
    ((_, found["unfrozen"], weights),) = go_on(start, {"unfrozen": everything}, FACTORS)
    moved = {name: (weights[name][FACTORS.index(1.0)] - w).abs() for name, w in start.weights.items()}
    seen = replace(seen, moved=moved)
    lives = {"bitfit": batched.with_biases_only(start.model)}
    for order in way.orders or task.rate_orders or ORDERS:
        scores = ORDERS[order](seen)
        selection.check_scores(scores, start.weights)
        for fraction in FRACTIONS:
            frozen = selection.lowest_k(scores, selection.resolve_count(fraction, p))
            lives[f"{order}@{fraction}"] = {name: ~mask for name, mask in frozen.items()}
    found["members"] = {name: of for name, of, _ in go_on(start, lives, FACTORS)}
    fresh = replace(start, state={})
    counts = {fraction: p - selection.resolve_count(fraction, p) for fraction in FRACTIONS}
    random = {f"shira@{f}": live for f, count in counts.items() if (live := random_weights(start, count))}
    found["members"] |= {name: of for name, of, _ in go_on(fresh, random, FRESH_FACTORS)}
    for fraction, count in counts.items():
        model = deepcopy(start.model)
        torch.manual_seed(seed)
        if adapters.add(model.layers, "lora", count, seed):
            live = {n: torch.ones_like(w, dtype=torch.bool) for n, w in model.named_parameters() if w.requires_grad}
            of = go_on(replace(fresh, model=model), {f"lora@{fraction}": live}, FRESH_FACTORS)
            found["members"] |= {name: of_factor for name, of_factor, _ in of}
    return found


def random_weights(start: Start, count: int) -> dict[str, Tensor] | None:
    """SHiRA's live elements: so many random ones of the linear layers' weights; None if these have fewer."""
    linear = {f"{n}.weight" for n, m in start.model.named_modules() if isinstance(m, torch.nn.Linear)}
    draw = torch.Generator().manual_seed(start.seed)
    scores = {n: torch.rand(p.shape, generator=draw) + (n in linear) for n, p in start.model.named_parameters()}
    if count > sum(s.numel() for n, s in scores.items() if n in linear):
        return None
    frozen = selection.lowest_k(scores, sum(s.numel() for s in scores.values()) - count)
    return {name: ~mask for name, mask in frozen.items()}


def go_on(
    start: Start, lives: Mapping[str, Named], factors: Sequence[float]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """Train on from t0 with each live set at every factor of the rate: its name, figures, and weights by factor.

    Figures are lists over the factors: losses and metrics at the end, and "trials", means of the training loss over the
    first steps; None where training diverged.
    """
    names, n = list(lives), len(factors)
    weights = {name: w for name, w in start.weights.items() if not lives or name in lives[names[0]]}
    several = max(1, AT_ONCE // (n * sum(w.numel() for w in weights.values())))
    for i in range(0, len(names), several):
        some = names[i : i + several]
        live = {name: torch.stack([lives[one][name] for one in some]).repeat_interleave(n, 0) for name in weights}
        members = batched.Members(start.model, weights, live, torch.tensor(factors).repeat(len(some)), start.state)
        end = End(start.task, start.model, start.held_out, len(start.batches))
        trained, history = batched.train(members, start.way.optimizers, start.batches, start.rates, end)
        means = end.means()
        firsts = {str(share): history[: max(2, round(share * len(history)))].mean(0) for share in TRIALS}
        for j, name in enumerate(some):
            rows = slice(j * n, (j + 1) * n)
            own = {key: w[rows] for key, w in trained.items()}
            found: dict[str, Any] = {"factors": list(factors), "live": sum(int(m.sum()) for m in lives[name].values())}
            found |= {key: finite(value[rows]) for key, value in means.items()}
            found["trials"] = {share: finite(first[rows]) for share, first in firsts.items()}
            yield name, found, own


def finite(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]  # JSON has no NaN


def base_rate(name: str, way: str, out: Path) -> float:
    """Return the base rate with the lowest mean validation loss over all seeds of a task; keep the losses in `out`."""
    file, task = out / f"{way}-{name}-bases.json", (RATE_TASKS | FRESH_TASKS)[name]
    if not file.exists():
        found = [try_bases(task, WAYS[way], seed) for seed in range(task.seeds)]
        save({"bases": found[0][0], "val": [losses for _, losses in found]}, file)
    known = json.loads(file.read_text(encoding="utf-8"))
    means = torch.tensor(known["val"]).mean(0)
    return WAYS[way].share * float(known["bases"][int(means.argmin())])


def save(found: Any, file: Path) -> None:
    file.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
    file.with_suffix(".part").replace(file)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks",
        type=lambda v: v.split(","),
        default=list(RATE_TASKS),
        help="of " + ", ".join(RATE_TASKS | FRESH_TASKS),
    )
    parser.add_argument("--ways", type=lambda v: v.split(","), default=list(WAYS), help="of " + ", ".join(WAYS))
    parser.add_argument("--seeds", type=int, default=5, help="runs of a task, at most (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where results lie (%(default)s)")
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [(s, name, way) for s in range(args.seeds) for name in args.tasks for way in args.ways]
    for seed, name, way in [] if args.only_report else wanted:
        task, file = (RATE_TASKS | FRESH_TASKS)[name], args.out / f"{way}-{name}-{seed}.json"
        if seed < task.seeds and not file.exists():
            began = time.monotonic()
            base = base_rate(name, way, args.out)
            save(run(task, WAYS[way], seed, base), file)
            print(f"{way}, {name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    text = rate_summary.report(rate_summary.load(args.out, args.ways, args.tasks, args.seeds))
    (args.out / "rates.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
