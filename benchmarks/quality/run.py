"""One run: train to t0 under the callback, then go on from that one state with every order and fraction.

The warm-up is a fit of a Lightning Trainer, once for each way of estimating the variance: observing leaves no trace, so
both take the same way. The continuations are plain loops over the same batches. A small model's are one loop, batched
by vmap; a large one's take turns, and their optimizer has the live elements alone.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import tee
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import Parameter
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from benchmarks.quality import adapters
from benchmarks.quality.orders import COSTS, CURVED, ORDERS, Record
from benchmarks.quality.tasks import METRICS, Splits, Task
from examples.models import Batch, SupervisedModule
from examples.paper.run import Recorder, epochs
from lightning_gcfreeze import Evidence, GradCovFreezeCallback, selection
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.freezing import Compact

PROBES = 10  # of the Hessian's diagonal
SAMPLED = 200_000  # elements for a rank correlation, at most

Figures = dict[str, Any]
"""What is known of a member: "train", "test", "metric", "live" elements, "predicted" increases of the loss."""
Outputs = Callable[[Tensor], Tensor]
"""x -> outputs of the members, (M, S, ...)."""


@dataclass(frozen=True)
class Start:
    """The state at t0."""

    task: Task
    seed: int
    model: SupervisedModule
    optimizer: dict[str, Any]  # Adam's state_dict
    batches: list[Batch]  # of the steps to come
    splits: Splits

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def adam(self, key: str) -> dict[str, Tensor]:
        """An entry of Adam's state, by parameter name."""
        return {name: self.optimizer["state"][i][key] for i, name in enumerate(self.weights)}


class Watch(pl.Callback):
    """Keeps what the callback's evidence lacks: the weights half way, the mean gradient since, and Adam's state."""

    def __init__(self, t0: int) -> None:
        self.from_step, self.count = t0 // 2, t0 - t0 // 2
        self.half: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.optimizer: dict[str, Any] = {}

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.from_step:
            self.half = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            self.mean = {name: torch.zeros_like(w) for name, w in self.half.items()}
        if trainer.global_step >= self.from_step:
            for name, p in pl_module.named_parameters():
                if p.grad is not None:
                    self.mean[name].add_(p.grad, alpha=1 / self.count)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.optimizer = deepcopy(trainer.optimizers[0].state_dict())


def run(task: Task, seed: int, found: Figures, save: Callable[[Figures], None]) -> None:
    """Complete what was `found` of a run, and save after every piece: an interrupted run goes on there."""
    start, record = prepare(task, seed)
    members: dict[str, Figures] = found.setdefault("members", {})
    p = sum(w.numel() for w in start.weights.values())
    found |= {"p": p, "t0": judge(task, start, lambda x: start.model(x)[None])[0]}
    nothing = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in start.weights.items()}
    if "all_frozen" not in members:
        members["all_frozen"] = found["t0"] | {"live": 0}
    # The unfrozen run comes always, and first: oracles look at how far it went.
    for figures, weights in go_on(start, [nothing]):
        members["unfrozen"] = figures
        record.moved.update({name: (weights[name] - w).abs() for name, w in start.weights.items()})
    save(found)
    chosen = orders(task)
    missing = [(o, f) for o in chosen if o in ORDERS for f in task.fractions if f"{o}@{f}" not in members]
    costs = {cost: ORDERS[cost](record) for cost in COSTS if record.curvature is not None or cost not in CURVED}

    def masks() -> Iterator[Named]:
        last, scores = "", {}
        for order, fraction in missing:
            if order != last:
                last, scores = order, ORDERS[order](record)
                selection.check_scores(scores, start.weights)
            yield selection.lowest_k(scores, selection.resolve_count(fraction, p))

    to_train, to_judge = tee(masks())
    for (order, fraction), (figures, _), mask in zip(missing, go_on(start, to_train), to_judge, strict=True):
        figures["predicted"] = {
            cost: sum(float(c[mask[name]].sum(dtype=torch.float64)) for name, c in of.items()) / 2
            for cost, of in costs.items()
        }
        members[f"{order}@{fraction}"] = figures
        if not task.together:
            save(found)
    for kind, fraction in ((k, f) for k in adapters.KINDS if k in chosen for f in task.fractions):
        if f"{kind}@{fraction}" not in members:
            members[f"{kind}@{fraction}"] = adapt(start, kind, p - selection.resolve_count(fraction, p))
            save(found)
    if set(chosen) & set(ORDERS) - set(found.get("correlations", ())):
        oracles = [o for o in ("oracle_move", "oracle_cost") if record.curvature is not None or o not in CURVED]
        found["correlations"] = correlations(
            {o: ORDERS[o](record) for o in dict.fromkeys([*oracles, *chosen]) if o in ORDERS}, oracles
        )
    found["complete"] = chosen
    save(found)


def orders(task: Task) -> list[str]:
    """What a run of the task compares."""
    return list(task.orders or (*ORDERS, *adapters.KINDS))


def prepare(task: Task, seed: int) -> tuple[Start, Record]:
    """Train to t0, once for each way of observing; the seed fixes the split, the initial weights and the batches."""
    splits = task.data(seed)
    train = splits["train"]
    indices = epochs(len(train), task.batch_size, task.steps, seed)
    seen: dict[str, Evidence] = {}
    for samples in ("first", "all"):
        pl.seed_everything(seed, verbose=False)
        model, watch, recorder = task.model(), Watch(task.t0), Recorder()
        freeze = GradCovFreezeCallback(task.t0, k=0, order=recorder, samples=samples, seed=(seed + 2**31) % 2**32)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=task.t0, callbacks=[freeze, watch], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, DataLoader(train, sampler=indices[: task.t0], batch_size=None))
        seen[samples] = recorder.evidence
    same = {name: torch.equal(w, seen["all"].weights[name]) for name, w in seen["first"].weights.items()}
    assert all(same.values()), "observing has left a trace"
    batches = [train[rows] for rows in indices]
    fresh = task.model()  # without the Trainer
    fresh.load_state_dict(model.state_dict())
    start = Start(task, seed, fresh, watch.optimizer, batches[task.t0 :], splits)
    curved = bool(set(CURVED) & set(orders(task)))
    record = Record(
        seen["first"],
        seen["all"],
        watch.half,
        watch.mean,
        start.adam("exp_avg"),
        start.adam("exp_avg_sq"),
        curvature(fresh, batches[task.t0 - PROBES : task.t0], seed) if curved else None,
        {},
        reach=task.lr * (task.steps - task.t0),
    )
    return start, record


def curvature(model: SupervisedModule, batches: Sequence[Batch], seed: int) -> dict[str, Tensor]:
    """|diagonal of the Hessian|: the mean of z ⊙ Hz over batches, a random vector z of signs for each (Hutchinson)."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, y in batches:
        z = [(torch.rand(p.shape, generator=generator) < 0.5).to(p.dtype) * 2 - 1 for p in parameters.values()]
        gradient = torch.autograd.grad(model.loss(model(x), y), list(parameters.values()), create_graph=True)
        products = torch.autograd.grad(gradient, list(parameters.values()), z, materialize_grads=True)
        for h, sign, product in zip(total.values(), z, products, strict=True):
            h.add_(sign * product.detach(), alpha=1 / len(batches))
    return {name: h.abs_() for name, h in total.items()}


def go_on(start: Start, frozen: Iterator[Named] | Sequence[Named]) -> Iterator[tuple[Figures, Named]]:
    """Train on from t0 with every frozen set: figures and final weights of each."""
    if start.task.together:
        masks = list(frozen)
        yield from together(start, masks) if masks else ()
    else:
        for mask in frozen:
            yield alone(start, mask)


def together(start: Start, frozen: Sequence[Named]) -> Iterator[tuple[Figures, Named]]:
    """All members at once: every parameter has a first axis more, and the loss is the sum of theirs."""
    count = len(frozen)
    masks = {name: torch.stack([mask[name] for mask in frozen]) for name in start.weights}
    before = {name: w.expand(count, *w.shape) for name, w in start.weights.items()}
    weights = {name: Parameter(w.clone()) for name, w in before.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=start.task.lr, fused=True)
    _load_adam(optimizer, start, lambda value: value.expand(count, *value.shape).clone())
    skeleton = start.model

    def outputs(x: Tensor) -> Tensor:
        return vmap(lambda w: functional_call(skeleton, w, (x,)))(weights)

    for x, y in start.batches:
        optimizer.zero_grad()
        vmap(skeleton.loss, in_dims=(0, None))(outputs(x), y).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(torch.where(masks[name], before[name], w))
    for name, w in weights.items():
        assert torch.equal(w[masks[name]], before[name][masks[name]]), "a frozen element has moved"
    for i, figures in enumerate(judge(start.task, start, outputs)):
        live = sum(int((~mask[i]).sum()) for mask in masks.values())
        yield figures | {"live": live}, {name: w[i].detach() for name, w in weights.items()}


def alone(start: Start, frozen: Named) -> tuple[Figures, Named]:
    """One member; its optimizer has the live elements alone."""
    model = deepcopy(start.model)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=start.task.lr, fused=True)
    _load_adam(optimizer, start, torch.clone)
    compact = Compact(optimizer, parameters, frozen)
    for x, y in start.batches:
        model.loss(model(x), y).backward()
        compact.gather_gradients_()
        compact.gather_values_()
        optimizer.step()
        compact.scatter_values_()
        optimizer.zero_grad()
    compact.release()
    for name, w in start.weights.items():
        assert torch.equal(parameters[name][frozen[name]], w[frozen[name]]), "a frozen element has moved"
    (figures,) = judge(start.task, start, lambda x: model(x)[None])
    live = sum(int((~mask).sum()) for mask in frozen.values())
    return figures | {"live": live}, {name: p.detach() for name, p in parameters.items()}


def adapt(start: Start, kind: str, live: int) -> Figures | None:
    """Train an adapter of about so many parameters on from t0, all else frozen, with an Adam of its own."""
    model = deepcopy(start.model)
    torch.manual_seed(start.seed)
    if not adapters.add(model.layers, kind, live, start.seed):
        return None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=start.task.lr, fused=True)
    for x, y in start.batches:
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()
    (figures,) = judge(start.task, start, lambda x: model(x)[None])
    return figures | {"live": sum(p.numel() for p in trained)}


@torch.no_grad()
def judge(task: Task, start: Start, outputs: Outputs) -> list[Figures]:
    """Loss on fixed training objects, loss and metric on the test split, of each member."""
    train = start.splits["train"]
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(start.seed))[: task.judged]
    measure = METRICS[task.metric] or start.model.loss
    train_loss = mean_over(TensorDataset(*train[some.sort().values]), outputs, start.model.loss)
    test_loss = mean_over(start.splits["test"], outputs, start.model.loss)
    metric = mean_over(start.splits["test"], outputs, measure)
    return [
        {"train": float(a), "test": float(b), "metric": float(c)}
        for a, b, c in zip(train_loss, test_loss, metric, strict=True)
    ]


def mean_over(data: TensorDataset, outputs: Outputs, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A mean over samples, (M,)."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in DataLoader(data, batch_size=250):
        total = total + vmap(measure, in_dims=(0, None))(outputs(x), y).double() * len(y)
    return total / len(data)


def correlations(scores: dict[str, Named], oracles: Sequence[str]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation of every order with the oracles, over some elements if they are many."""
    flat = {order: torch.cat([s.flatten() for s in of.values()]).double().numpy() for order, of in scores.items()}
    p = len(flat[oracles[0]])
    some = np.random.default_rng(0).permutation(p)[:SAMPLED]
    return {
        order: {oracle: _finite(spearmanr(of[some], flat[oracle][some]).statistic) for oracle in oracles}
        for order, of in flat.items()
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no NaN


def _load_adam(optimizer: torch.optim.Adam, start: Start, copy: Callable[[Tensor], Tensor]) -> None:
    """Give it the state at t0; Adam's count of steps is one for all."""
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        optimizer.state[p] = {
            key: copy(value) if value.dim() else value.clone() for key, value in start.optimizer["state"][i].items()
        }
