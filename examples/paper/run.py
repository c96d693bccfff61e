"""One run of an experiment: train to t0 once, then go on from there with every frozen set.

Both parts are fits of a Lightning Trainer with `GradCovFreezeCallback`. All continuations are one fit: a batched model,
resumed from a checkpoint of the warm-up in which every tensor is repeated for each member. It is that of step t0 - 1:
after step t0 the callback freezes in each member what an ordering of its own, `Given`, puts first.

Pruning has no second part: the callback observes all steps, and each member is the trained model with one set of its
weights at zero.
"""

import tempfile
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import Parameter
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from examples.models import Batch, SupervisedModule
from examples.paper import related
from examples.paper.tasks import TASKS, Settings
from lightning_gcfreeze import Evidence, GradCovFreezeCallback, orderings, selection
from lightning_gcfreeze._types import Named

Losses = NDArray[np.float64]
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Run:
    """What a run leaves behind, for O orders and F fractions of p parameters."""

    train: Losses  # (O, F): mean loss over the training objects after the last step
    test: Losses  # (O, F)
    frozen: Masks  # (O, F, p): the paper's α(k), parameters as in ``named_parameters()``; in pruning, what is zero


@dataclass(frozen=True)
class Experiment:
    """What a run starts from."""

    settings: Settings
    seed: int
    model: SupervisedModule
    train: TensorDataset
    test: TensorDataset
    batches: list[list[int]]  # the objects of every step, before and after t0

    @property
    def order_seed(self) -> int:
        """Of the random order: not the run's, whose stream has made the initial weights. Generators read 32 bits."""
        return (self.seed + 2**31) % 2**32


class Members(pl.LightningModule):
    """M copies of a model, each with weights of its own, trained at once on the same batches.

    Every parameter has a first axis more, of the M members. The loss is the sum of the members' losses, so a member's
    gradient is that of its own loss; Adam works element by element. So M members in one Trainer take the steps of M
    Trainers, to rounding, at the price of one Trainer's bookkeeping.
    """

    def __init__(self, model: SupervisedModule, members: int, lr: float) -> None:
        super().__init__()
        self.model = deepcopy(model)
        for name, p in model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            stacked = p.detach().expand(members, *p.shape).clone()
            setattr(self.model.get_submodule(owner), leaf, Parameter(stacked))
        self.lr = lr

    def losses(self, batch: Batch) -> Tensor:
        """The mean loss of each member over the batch, (M,)."""
        x, y = batch

        def loss(parameters: Named) -> Tensor:
            return self.model.loss(functional_call(self.model, dict(parameters), (x,)), y)

        return vmap(loss)(dict(self.model.named_parameters()))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.losses(batch).sum()

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Fused: one pass over the weights of all members, and not one for each operation.
        return torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)

    @torch.no_grad()
    def evaluate(self, data: TensorDataset) -> Losses:
        """The mean loss of each member over a data set, (M,)."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in DataLoader(data, batch_size=1000):
            total = total + self.losses(batch).double() * len(batch[0])
        return (total / len(data)).numpy()


class SummedLosses(Members):
    """The same with the sum of the losses over a batch, S times the mean.

    A reading of the published curves: for the callback, g_S is then the gradient of the sum, while g_1, the gradient on
    the first sample alone, stays what it was. As a variance, (g_1 - S g)² is the second moment up to terms of 1/S:
    its mean is (S - 1) (Σ + (S - 1) μ²) with the noise Σ and the mean μ of a sample's gradient. While all batches have
    S objects, Adam takes the same steps but for its ε, as its step does not depend on the scale of the loss. A short
    last batch of an epoch weighs less here than where losses are means, so with one the run goes a little another way.
    """

    @override
    def losses(self, batch: Batch) -> Tensor:
        return super().losses(batch) * len(batch[0])


READINGS: dict[str, type[Members]] = {"variance_of_sum": SummedLosses}
"""Orders by the variance that the callback finds where the members' losses are read in another way."""


class Recorder:
    """An ordering that keeps the evidence it was given: what any other ordering would have seen at this t0."""

    needs = orderings.OPTIONAL_FIELDS
    evidence: Evidence

    def __call__(self, evidence: Evidence) -> Named:
        self.evidence = deepcopy(evidence)
        return evidence.variance


class Given:
    """An ordering that puts given elements first.

    Args:
        frozen: ``{name: bool (*p.shape)}``, True = first.
    """

    needs = frozenset[str]()
    reads_variance = False  # so no per-sample gradients are computed

    def __init__(self, frozen: Named) -> None:
        self.frozen = frozen

    def __call__(self, evidence: Evidence) -> Named:
        return {name: (~mask).float() for name, mask in self.frozen.items()}


class SaveBefore(pl.Callback):
    """Saves a checkpoint before the optimizer step `step`, counted from 1."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step - 1:
            trainer.save_checkpoint(self.checkpoint)


def run(settings: Settings, index: int) -> Run:
    """Train run number `index`, from its warm-up to the losses of all its continuations."""
    experiment = prepare(settings, index)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "before_t0.ckpt"
        evidence = warm_up(experiment, checkpoint)
        frozen = frozen_sets(experiment, evidence)
        # Equal sets, as those of no and of all elements are in every order, are trained once.
        sets, member = np.unique(frozen.reshape(-1, frozen.shape[-1]), axis=0, return_inverse=True)
        members = pruned(experiment, evidence, sets) if settings.prune else go_on(experiment, checkpoint, sets)
    train, test = (
        members.evaluate(data)[member].reshape(frozen.shape[:2]) for data in (experiment.train, experiment.test)
    )
    return Run(train, test, frozen)


def prepare(settings: Settings, index: int) -> Experiment:
    """What run number `index` starts from: its seed fixes objects, split, weights and batches."""
    task, seed = TASKS[settings.data], settings.seed + index
    pl.seed_everything(seed, verbose=False)
    data = task.data(settings, settings.seed if settings.same_data else seed)
    data.setup()
    train, test = data.dataset["train"], data.dataset["test"]
    if settings.batch_size > len(train):
        raise ValueError(
            f"`batch_size={settings.batch_size}` is more than the {len(train)} training objects. Lower it."
        )
    return Experiment(
        settings, seed, task.model(), train, test, epochs(len(train), settings.batch_size, settings.steps, seed)
    )


def epochs(objects: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The objects of each step's batch: epoch after epoch in a new order, the last batch of each may be short."""
    generator = torch.Generator().manual_seed(seed)
    batches: list[list[int]] = []
    while len(batches) < steps:
        batches += [batch.tolist() for batch in torch.randperm(objects, generator=generator).split(batch_size)]
    return batches[:steps]


def warm_up(experiment: Experiment, checkpoint: Path | None = None, members: type[Members] = Members) -> Evidence:
    """Train for t0 steps while the callback observes; return what an ordering may look at.

    Args:
        experiment: what the run starts from.
        checkpoint: where to save the state before step t0, if anywhere.
        members: what is trained.
    """
    t0, recorder = experiment.settings.t0, Recorder()
    callbacks: list[pl.Callback] = [SaveBefore(t0, checkpoint)] if checkpoint else []
    callbacks.append(GradCovFreezeCallback(t0, k=0, order=recorder, seed=experiment.order_seed))
    _fit(members(experiment.model, 1, experiment.settings.lr), experiment, callbacks, slice(None, t0))
    return recorder.evidence


def noise_covariance(experiment: Experiment) -> Tensor:
    """Take the steps of the warm-up once more, for the full covariance of the gradient noise up to t0, (p, p)."""
    t0 = experiment.settings.t0
    observing = GradCovFreezeCallback(t0, k=0, covariance="full")
    _fit(Members(experiment.model, 1, experiment.settings.lr), experiment, [observing], slice(None, t0))
    assert observing.covariance is not None
    return observing.covariance


def frozen_sets(experiment: Experiment, evidence: Evidence) -> Masks:
    """α(k) of every order and fraction, Eq. (2.7), (O, F, p).

    The callback's orderings read the evidence of the warm-up, and `READINGS` that of a warm-up of their own; the
    related ones, by name in `related.RELATED`, read the training objects and the model with the evidence's weights.
    """
    settings, weights = experiment.settings, _flat(evidence.weights)
    x, y = experiment.train.tensors
    at = related.take(experiment.model, weights, (x, y), experiment.order_seed, lambda: noise_covariance(experiment))
    rows = []
    for order in settings.orders:
        if order in related.RELATED:
            scores = related.RELATED[order](at)
        elif order in READINGS:
            scores = _flat(warm_up(experiment, members=READINGS[order]).variance)
        else:
            scores = _flat(orderings.resolve(order)(evidence))
        assert not scores.isnan().any(), order
        counts = [selection.resolve_count(fraction, len(weights)) for fraction in settings.fractions]
        rows.append([selection.lowest_k({"all": scores}, k)["all"].numpy() for k in counts])
    return np.array(rows)


def pruned(experiment: Experiment, evidence: Evidence, zero: Masks) -> Members:
    """Return the models that a warm-up ends with, once for each of the M rows of `zero`, (M, p), and zeros there."""
    members = Members(experiment.model, len(zero), experiment.settings.lr)
    with torch.no_grad():
        parts = torch.as_tensor(zero).split([w.numel() for w in evidence.weights.values()], dim=1)
        for p, w, part in zip(members.parameters(), evidence.weights.values(), parts, strict=True):
            p.copy_(w.masked_fill(part.reshape(p.shape), 0.0))
    return members


def go_on(experiment: Experiment, checkpoint: Path, frozen: Masks) -> Members:
    """Train on from a warm-up's checkpoint, once for each of the M rows of `frozen`, (M, p); freeze after step t0."""
    members = Members(experiment.model, len(frozen), experiment.settings.lr)
    repeated = checkpoint.with_name("members.ckpt")
    torch.save(_repeated(torch.load(checkpoint, weights_only=True), len(frozen)), repeated)
    named = dict(members.named_parameters())
    parts = torch.as_tensor(frozen).split([p[0].numel() for p in named.values()], dim=1)
    masks = {name: part.reshape(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
    freeze = GradCovFreezeCallback(t0=1, k=int(frozen.sum()), order=Given(masks))
    _fit(members, experiment, [freeze], slice(experiment.settings.t0 - 1, None), repeated)
    return members


def _flat(tensors: Named) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _repeated(checkpoint: dict[str, Any], members: int) -> dict[str, Any]:
    """Return a checkpoint of one member as that of several with the same past."""

    def repeat(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: repeat(v) for key, v in value.items()}
        if isinstance(value, Tensor) and value.dim():  # Adam's count of steps is one for all
            return value.expand(members, *value.shape[1:]).clone()
        return value

    checkpoint["state_dict"] = repeat(checkpoint["state_dict"])
    checkpoint["optimizer_states"] = [repeat(state) for state in checkpoint["optimizer_states"]]
    for key in ("loops", "callbacks"):  # the new Trainer counts its own steps, with batches and a callback of its own
        del checkpoint[key]
    return checkpoint


def _fit(
    members: Members,
    experiment: Experiment,
    callbacks: list[pl.Callback],
    steps: slice,
    checkpoint: Path | None = None,
) -> None:
    """Take these steps of the experiment, from a checkpoint if one is given."""
    batches = experiment.batches[steps]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=len(batches),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*optimizer steps planned")  # a warm-up ends at t0
            warnings.filterwarnings("ignore", ".* never had a gradient")  # in the one step that a continuation observes
            trainer.fit(members, DataLoader(experiment.train, sampler=batches, batch_size=None), ckpt_path=checkpoint)
    except SystemExit as error:  # so Lightning passes Ctrl-C on
        raise KeyboardInterrupt from error
    if trainer.interrupted:  # and so did versions before 2.5: without a word, half of the training done
        raise KeyboardInterrupt
