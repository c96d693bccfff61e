"""Random valid combinations of all arguments, optimizers, precisions and strategies, each against a plain reference.

    uv run python -m tests.fuzz --examples 1000 --seed 7

An example is trained four times: with the callback; with the masks that it chose and `PlainStages`, which has to end
with the same frozen bits, and live elements equal to rounding; and with the callback in two pieces, which have to end
as the first did, to the bit. What fails is printed with its arguments, the smallest example of each kind.
"""

import argparse
import contextlib
import copy
import dataclasses
import fnmatch
import inspect
import itertools
import logging
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import lightning.pytorch as pl
import torch
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gcfreeze import Evidence, FreezeSchedule, GradCovFreezeCallback, Growth, Settled, delta
from tests import cases
from tests.cases import OPTIMIZERS
from tests.interruptions import DropoutByStep, Interrupted, SaveAndStop
from tests.oracles.freezing import PlainFreeze
from tests.oracles.learning_rate import multiply_by_hand
from tests.witnesses import bits

Named = dict[str, Tensor]
BATCHES = 18  # in three epochs of six
ORDERS = ("variance", "random", "reverse", "magnitude", "second_moment", "snr", "displacement", "progress")
NOT_ELEMENTWISE = ("Adafactor", "Muon")
WITHOUT_DIVISOR = (*NOT_ELEMENTWISE, "Adadelta", "ASGD", "Rprop")
WITHOUT_MOMENTUM = (*WITHOUT_DIVISOR, "SGD", "Adagrad")
TOLERANCE = {  # relative, absolute; live elements after at most 18 steps, each of which rounds anew
    "64-true": (1e-7, 1e-9), "32-true": (2e-3, 2e-4), "bf16-mixed": (2e-2, 5e-3), "16-mixed": (2e-2, 5e-3),
    "bf16-true": (1e-1, 5e-2),
}  # fmt: skip
ROUNDED_BY_TORCH = ("NAdam", "ASGD")
"""Optimizers whose scalars torch turns into the weights' dtype when it loads a state: only float32 goes on exactly."""


# Models and data ---------------------------------------------------------------------------------------------------


def convnet() -> nn.Sequential:
    """With BatchNorm and dropout; no bias before BatchNorm, whose gradient would be nothing but rounding."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4), nn.Tanh(),
        nn.Dropout(0.25), nn.Flatten(), nn.Linear(20, 1),
    )  # fmt: skip


def large() -> nn.Sequential:
    """A weight of more than 16,384 elements, which "compact" treats by itself, and small parameters around it."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 1))


MODELS: dict[str, Callable[[], nn.Sequential]] = {"mlp": cases.mlp, "convnet": convnet, "large": large}


class Module(cases.Regression):
    """The network of an example with its optimizer; it validates, and logs the loss."""

    def __init__(self, example: "Example") -> None:
        super().__init__(MODELS[example.model]())
        self.example = example
        if example.precision == "64-true":
            self.double()  # else Lightning loads a checkpoint before it converts the module, and rounds it

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.network.parameters() if self.example.optimizer != "Muon" or p.dim() == 2]
        if self.example.optimizer == "Muon":
            optimizer: Optimizer = torch.optim.Muon(parameters, 0.02)
        elif self.example.groups and len(parameters) > 1:
            optimizer = OPTIMIZERS[self.example.optimizer](
                [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.005}]
            )
        else:
            optimizer = OPTIMIZERS[self.example.optimizer](parameters)
        if not self.example.scheduler:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# Examples ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Slowing:
    """A gain of one's own."""

    power: float

    def __call__(self, t: int) -> float:
        return float(t**-self.power)


@dataclasses.dataclass(frozen=True)
class LastFirst:
    """An order of one's own: what was initialised with large values goes last within a tensor."""

    scale: float

    def __call__(self, evidence: Evidence) -> Named:
        return {name: w.abs().sqrt() * self.scale for name, w in evidence.weights.items()}


@dataclasses.dataclass(frozen=True)
class Example:
    """A run. `arguments` are those of the callback."""

    arguments: dict[str, Any]
    model: str = "mlp"
    optimizer: str = "AdamW"
    groups: bool = False
    scheduler: bool = False
    precision: str = "32-true"
    accumulate: int = 1
    clip: float | None = None
    clip_algorithm: str = "norm"
    strategy: str = "auto"
    stop: int = 6
    """The batches after which the run is broken off, and goes on from a checkpoint."""


def _eligible(model: str, optimizer: str, include: Any, exclude: Any) -> int:
    """How many elements the callback may freeze."""

    def matches(name: str, patterns: Any) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))

    return sum(
        p.numel()
        for name, p in MODELS[model]().named_parameters("network")
        if (optimizer != "Muon" or p.dim() == 2)
        and (include is None or matches(name, include))
        and (exclude is None or not matches(name, exclude))
    )


@st.composite
def plans(draw: st.DrawFn, steps: int, count: int) -> dict[str, Any]:
    """When, and how much: a number each, stages, or left to the data."""

    def amount(least: float = 0.1) -> Any:
        fraction = draw(st.one_of(st.floats(least, 0.95), st.sampled_from([0.5, 1.0, 0.0])))
        return fraction if draw(st.booleans()) else round(fraction * count)

    kind = draw(st.sampled_from(["fixed", "fixed", "settled", "growth", "stages"]))
    if kind == "fixed":
        t0 = draw(st.integers(1, steps - 2))
        written = draw(st.sampled_from([t0, (t0 + 0.5) / steps]))
        return {"t0": written, "k": amount(), "every": draw(st.integers(1, min(3, t0)))}
    if kind == "settled":
        most = draw(st.integers(2, steps - 2))
        if draw(st.booleans()):
            return {"t0": Settled(most), "k": amount()}
        first = draw(st.integers(1, most))
        settled = Settled(most, first, draw(st.sampled_from([1.2, 2.0])), draw(st.sampled_from([0.0, 0.5])), 0.9)
        return {"t0": settled, "k": amount()}
    if kind == "growth":
        t0 = draw(st.integers(1, max(1, steps // 2)))
        if draw(st.booleans()):
            monitor = draw(st.sampled_from(["val_loss", None]))
            return {"t0": t0, "k": Growth(draw(st.sampled_from([0.01, 0.5])), monitor)}
        first = draw(st.floats(0.1, 0.6))
        growth = Growth(
            draw(st.sampled_from([1e-4, 0.5, 10.0])), draw(st.sampled_from(["val_loss", None])), first,
            draw(st.floats(first, 0.95)), draw(st.integers(1, 3)), draw(st.sampled_from(["geometric", "linear"])),
            draw(st.integers(1, 3)), 2, draw(st.booleans()),
        )  # fmt: skip
        return {"t0": t0, "k": growth}
    at = sorted(draw(st.sets(st.integers(1, steps - 1), min_size=1, max_size=3)))
    monotone = draw(st.booleans())
    fractions = [draw(st.floats(0.1, 0.9)) for _ in at]
    fractions = sorted(fractions) if monotone else fractions
    ks = fractions if draw(st.booleans()) else [round(f * count) for f in fractions]
    return {"schedule": FreezeSchedule([*zip(at, ks, strict=True)], monotone)}


def _samples() -> list[Any]:
    default = inspect.signature(GradCovFreezeCallback).parameters["samples"].default
    return [*{"first": 0, default: 0, "all": 0, 1: 0, 2: 0, 3: 0}]


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Valid combinations; which arguments are left out is drawn as well."""
    model = draw(st.sampled_from([*MODELS]))
    optimizer = draw(st.sampled_from([*OPTIMIZERS, "Muon"]))
    if optimizer == "Muon" and model == "convnet":
        optimizer = "AdamW"  # its only matrix is one row
    accumulate = draw(st.sampled_from([1, 1, 2, 3]))
    arguments: dict[str, Any] = {}

    def maybe(name: str, values: st.SearchStrategy[Any]) -> None:
        if draw(st.booleans()):
            arguments[name] = draw(values)

    maybe("include", st.sampled_from(["network.*", ["*weight"], ["*weight", "*bias"]]))
    maybe(
        "exclude", st.sampled_from(["*bias", ["network.6.bias", "network.2.bias"]] if model != "convnet" else ["*bias"])
    )
    count = _eligible(model, optimizer, arguments.get("include"), arguments.get("exclude"))
    arguments |= draw(plans(BATCHES // accumulate, count))
    by_state = [] if optimizer in WITHOUT_MOMENTUM else ["momentum"]
    by_state += [] if optimizer in WITHOUT_DIVISOR else ["movement"]
    maybe("order", st.sampled_from([*ORDERS, LastFirst(2.0), *by_state]))
    maybe("samples", st.sampled_from(_samples()))
    maybe("gain", st.one_of(st.just("1/t"), st.floats(0.05, 1.0), st.just(Slowing(0.7))))
    maybe(
        "gradients",
        st.sampled_from(["auto", "replay", "replay", "capture"] if model != "convnet" else ["auto", "replay"]),
    )
    maybe("granularity", st.sampled_from(["element", "row", "tensor"]))
    maybe("hold", st.sampled_from(["auto", "restore", *(["compact"] * 2 if optimizer not in NOT_ELEMENTWISE else [])]))
    maybe("skip_frozen_gradients", st.booleans())
    maybe("batch_norm", st.sampled_from(["track", "freeze"]))
    maybe("seed", st.integers(0, 2**63 - 1))
    maybe("log_every_n_steps", st.integers(1, 5))
    maybe("log_parameters", st.integers(0, 20))
    maybe("lr_after_freeze", st.one_of(st.none(), st.floats(0.05, 2.0)))
    if model == "mlp" and draw(st.integers(0, 4)) == 0:
        arguments["covariance"] = draw(st.sampled_from(["diagonal", "full"]))
    algorithm = draw(st.sampled_from(["norm", "value"]))
    precision = draw(st.sampled_from([*TOLERANCE]))
    cannot_clip = "fused" in optimizer and precision.endswith("mixed")  # Lightning leaves unscaling to the optimizer
    if optimizer == "SGD fused" and precision == "16-mixed":
        optimizer = "Adam fused"  # torch's SGD goes on with a momentum that it never set, if its first step overflows
    clip = draw(st.sampled_from([None, 0.5, 0.05]))
    return Example(
        arguments,
        model,
        optimizer,
        draw(st.booleans()),
        draw(st.booleans()),
        "32-true" if precision.endswith("true") and optimizer in ROUNDED_BY_TORCH else precision,
        accumulate,
        None if cannot_clip else clip,
        algorithm,
        draw(st.sampled_from(["auto", "auto", "ddp"])),
        # Not at the end of an epoch: Lightning validates there, and a restart leaves that out.
        accumulate * draw(st.integers(1, BATCHES // accumulate - 1).filter(lambda n: n * accumulate % 6)),
    )


# Checks ------------------------------------------------------------------------------------------------------------


def _loss_scale(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler else 1.0


class PlainStages(PlainFreeze):
    """`PlainFreeze` with masks that may grow: ``{global step: masks}``, from after that step on; and with a factor."""

    def __init__(self, stages: Mapping[int, Named], lr_after_freeze: float | None, batch_norm: str) -> None:
        super().__init__(-1, {})
        self.stages, self.lr_after_freeze, self.batch_norm = stages, lr_after_freeze, batch_norm
        self.loss_scales: list[float] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def factor_of(step: int) -> float:
            return self.lr_after_freeze or 1.0 if any(mask.any() for mask in self.frozen.values()) else 1.0

        multiply_by_hand(trainer.optimizers[0], factor_of)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for name, layer in pl_module.named_modules():
            if self.batch_norm == "freeze" and isinstance(layer, nn.BatchNorm1d):
                masks = [self.frozen.get(f"{name}.{part}") for part in ("weight", "bias")]
                layer.train(not all(mask is not None and mask.all() for mask in masks))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.loss_scales.append(_loss_scale(trainer))
        if trainer.global_step in self.stages:
            self.frozen = self.stages[trainer.global_step]
            self.values = {name: p.clone() for name, p in pl_module.named_parameters() if name in self.frozen}


class Diary(pl.Callback):
    """The bits and masks after each batch, and after which global step a mask was new."""

    def __init__(self, callback: GradCovFreezeCallback, coarse: bool) -> None:
        self.callback, self.coarse = callback, coarse
        self.weights: list[Named] = []
        self.masks: list[Named] = []
        self.stages: dict[int, Named] = {}
        self.base: Named = {}
        self.loss_scales: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.weights.append({name: bits(p) for name, p in pl_module.named_parameters()})
        last, now = self.masks[-1] if self.masks else {}, self.callback.frozen
        if now and not (last and all(torch.equal(now[name], last[name]) for name in now)):
            self.stages[trainer.global_step] = now
            self.base = self.base or copy.deepcopy(pl_module.state_dict())
        self.masks.append(now)
        self.loss_scales.append(_loss_scale(trainer))

    def thaws(self) -> bool:
        """Whether something that was frozen is not any more."""
        return any((a[n] & ~b[n]).any() for a, b in itertools.pairwise(self.masks) for n in a)

    def check(self) -> None:
        """What is frozen after one batch and the next has not moved in between; much of what is live has."""
        moved = live = 0
        for i, (masks, later) in enumerate(itertools.pairwise(self.masks)):
            for name, frozen in masks.items():
                changed = self.weights[i][name] != self.weights[i + 1][name]
                assert not (changed & frozen).any(), f"a frozen element of {name} moved in batch {i + 2}"
                moved, live = moved + int((changed & ~frozen).sum()), live + int((~frozen & ~later[name]).sum())
        assert moved or not live or self.coarse, "nothing trained"


def _strategy(name: str) -> Any:
    return DDPStrategy(process_group_backend="gloo") if name == "ddp" else "auto"


def _fit(example: Example, *callbacks: pl.Callback, ckpt: Path | None = None) -> tuple[Module, pl.Trainer]:
    """Train to the end, or to what stops it."""
    torch.manual_seed(5)
    precision: dict[str, Any] = {"precision": example.precision}
    if example.precision == "16-mixed":  # on a CPU a loss scaler has to be asked for; its first steps overflow
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=5)
        precision = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    module = Module(example)
    trainer = cases.trainer(
        callbacks=[DropoutByStep(), *callbacks],
        max_epochs=3,
        accumulate_grad_batches=example.accumulate,
        gradient_clip_val=example.clip,
        gradient_clip_algorithm=example.clip_algorithm if example.clip else None,
        strategy=_strategy(example.strategy),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **precision,
    )
    trainer.fit(
        module, cases.ResumableLoader(), cases.loader(samples=16), ckpt_path=ckpt, weights_only=True if ckpt else None
    )
    return module, trainer


def _outcome(module: Module, trainer: pl.Trainer, callback: GradCovFreezeCallback) -> dict[str, Any]:
    return {
        "weights": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "callback": callback.state_dict(),
        "frozen": callback.frozen,
    }


def _follow(example: Example, folder: Path, base: Named, end: Named) -> None:
    """Check that a stream leads from the base to the end, to the bit."""
    serving = Module(example).to(next(iter(base.values())).dtype)
    serving.load_state_dict(base)
    follower = delta.Follower(serving, folder)
    assert follower.poll()
    with follower.tenants.use("stream"):
        for name, tensor in serving.state_dict().items():
            assert torch.equal(bits(tensor), bits(end[name])), f"the stream's {name}"
    assert follower.tenants.verify() == follower.tenants.base


def check(example: Example) -> str:
    """Raise if a run does not keep what is promised; else say what was compared."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        whole_run, in_pieces = (delta.Stream(Path(folder, name), every=2) for name in ("whole run", "in pieces"))
        callback = GradCovFreezeCallback(**example.arguments, stream=whole_run)
        diary = Diary(callback, coarse=example.precision == "bf16-true")  # in which a step may be less than rounding
        module, trainer = _fit(example, callback, diary)
        unbroken = _outcome(module, trainer, callback)
        diary.check()

        path = Path(folder, "run.ckpt")
        with contextlib.suppress(Interrupted):
            callback = GradCovFreezeCallback(**example.arguments, stream=in_pieces)
            _fit(example, callback, SaveAndStop(path, example.stop))
        callback = GradCovFreezeCallback(**example.arguments, stream=in_pieces)
        cases.assert_identical(_outcome(*_fit(example, callback, ckpt=path), callback), unbroken, "resumed ")

        if not diary.stages:
            return "resumed, nothing was frozen"
        for stream in (whole_run, in_pieces):
            _follow(example, Path(stream.folder), diary.base, unbroken["weights"])
        if diary.thaws():
            return "resumed, thawed"
        reference = PlainStages(
            diary.stages, example.arguments.get("lr_after_freeze"), example.arguments.get("batch_norm", "track")
        )
        plain, _ = _fit(example, reference)
        if diary.loss_scales != reference.loss_scales:
            # A gradient that is not computed, or taken away early, cannot overflow: a step more is taken.
            spares = example.arguments.get("hold") != "restore" or example.arguments.get("skip_frozen_gradients", True)
            assert spares, "other steps overflowed than without us"
            return "resumed, other steps overflowed"
        rtol, atol = TOLERANCE[example.precision]
        weights, expected = module.state_dict(), plain.state_dict()
        for name, frozen in next(iter(diary.stages.values())).items():  # what froze later was live before, to rounding
            assert torch.equal(bits(weights[name])[frozen], bits(expected[name])[frozen]), f"frozen bits of {name}"
        for name in weights:
            torch.testing.assert_close(
                weights[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"live {name}: {text}"
            )
        return "resumed, as the plain reference"


# The command -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Failure:
    """The smallest example of one kind of error, and how many there are."""

    example: Example
    text: str
    count: int = 1


def _kind(error: BaseException) -> str:
    """Errors that differ in numbers and names alone are of one kind."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).splitlines() or [""]
    text = re.sub(r"network\S*|[\d.]+", "#", lines[0])
    return f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {text}"


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)[-4:])


def run(count: int, seed: int | None) -> tuple[Counter[str], dict[str, Failure]]:
    """Check so many examples; what was compared how often, and what failed. Without a seed they are always the same."""
    done: Counter[str] = Counter()
    failures: dict[str, Failure] = {}

    @(hypothesis.seed(seed) if seed is not None else lambda test: test)
    @hypothesis.settings(
        derandomize=seed is None,
        max_examples=count, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )  # fmt: skip
    @hypothesis.given(examples())
    def every_example(example: Example) -> None:
        try:
            done[check(example)] += 1
        except Exception as error:
            done["failed"] += 1
            kind = f"{example.optimizer}: {_kind(error)}"
            known = failures.get(kind)
            if known is None:
                failures[kind] = Failure(example, _text(error))
                print(f"failed: {kind[:160]}", flush=True)
            else:
                known.count += 1
                if len(repr(example)) < len(repr(known.example)):
                    known.example, known.text = example, _text(error)
        if sum(done.values()) % 100 == 0:
            print(f"{sum(done.values())} examples: {dict(done)}", flush=True)

    every_example()
    return done, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    start = time.monotonic()
    done, failures = run(options.examples, options.seed)
    for kind, failure in failures.items():
        print(f"\n{failure.count} x {kind}\n    {failure.example!r}\n{failure.text}")
    print(f"\nseed {options.seed}: {sum(done.values())} examples in {time.monotonic() - start:.0f} s")
    for what, times in done.most_common():
        print(f"{times:6} {what}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
