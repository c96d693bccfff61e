"""What is refused, when, and in which words: never a run that silently does something else."""

import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"t0": 0}, ValueError, "`t0` must be at least 1, got 0"),
        ({"t0": -3}, ValueError, "`t0` must be at least 1, got -3"),
        ({"t0": 2.5}, TypeError, r"`t0` must be an int of at least 1, got 2.5 \(float\)"),
        ({"t0": True}, TypeError, r"got True \(bool\)"),
        ({"t0": "5"}, TypeError, r"got '5' \(str\)"),
        ({"k": -1}, ValueError, "at least 0, got -1"),
        ({"k": -0.1}, ValueError, r"must lie in \[0, 1\], got -0.1"),
        ({"k": 1.5}, ValueError, r"must lie in \[0, 1\], got 1.5. A count is given as an int"),
        ({"k": math.nan}, ValueError, r"must lie in \[0, 1\], got nan"),
        ({"k": True}, TypeError, "got True of type bool"),
        ({"k": "half"}, TypeError, "got 'half' of type str"),
        ({"order": "varience"}, ValueError, "'variance', 'random', 'reverse', .*, got 'varience'"),
        ({"order": 3}, TypeError, "or a callable .*, got 3"),
        ({"samples": "some"}, ValueError, "`samples` must be one of 'auto', 'first', 'all', got 'some'"),
        ({"samples": 0}, ValueError, "`samples` must be at least 1, got 0"),
        ({"samples": 2.0}, TypeError, "`samples` must be an int or one of 'auto', 'first', 'all', got 2.0"),
        ({"gradients": "guess"}, ValueError, "`gradients` must be one of 'auto', 'replay', 'capture', got 'guess'"),
        (
            {"granularity": "column"},
            ValueError,
            "`granularity` must be one of 'element', 'row', 'tensor', 'mixed', got 'column'",
        ),
        ({"hold": "firmly"}, ValueError, "`hold` must be one of 'auto', 'compact', 'restore', got 'firmly'"),
        ({"covariance": "block"}, ValueError, "`covariance` must be one of 'diagonal', 'full', got 'block'"),
        ({"gain": 0.0}, ValueError, r"must lie in \(0, 1\], got 0.0"),
        ({"gain": 1.5}, ValueError, r"must lie in \(0, 1\], got 1.5"),
        ({"gain": "2/t"}, ValueError, "`gain` must be '1/t'.*, got '2/t'"),
        ({"gain": None}, TypeError, "`gain` must be '1/t'.*, got None"),
        ({"every": 0}, ValueError, "`every` must be at least 1, got 0"),
        ({"every": 6}, ValueError, "`every=6` leaves no step to observe among the first `t0=5`"),
        ({"include": 3}, TypeError, "`include` must be a parameter-name pattern or a list of them, got 3"),
        ({"exclude": [1]}, TypeError, r"`exclude` must be a parameter-name pattern or a list of them, got \[1\]"),
        ({"seed": "x"}, TypeError, "`seed` must be an int"),
        ({"seed": 2**63}, ValueError, "`seed` must be at most 9223372036854775807"),
        ({"lr_after_freeze": 0}, ValueError, "`lr_after_freeze` must be above 0, got 0"),
        ({"lr_after_freeze": -0.5}, ValueError, "`lr_after_freeze` must be above 0, got -0.5"),
        ({"lr_after_freeze": math.nan}, ValueError, "`lr_after_freeze` must be above 0, got nan"),
        ({"lr_after_freeze": math.inf}, ValueError, "`lr_after_freeze` must be finite and above 0, got inf"),
        ({"lr_after_freeze": True}, TypeError, r"`lr_after_freeze` must be a number, got True \(bool\)"),
        ({"lr_after_freeze": "0.5"}, TypeError, r"`lr_after_freeze` must be a number, got '0.5' \(str\)"),
        ({"log_every_n_steps": 0}, ValueError, "`log_every_n_steps` must be at least 1, got 0"),
    ],
    ids=str,
)
def test_invalid_argument_is_refused_by_the_constructor(arguments, error, message):
    """The message names the value and what is allowed."""
    with pytest.raises(error, match=message):
        GradCovFreezeCallback(**({"t0": 5, "k": 0.5} | arguments))


class Manual(cases.Regression):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.automatic_optimization = False


class TwoOptimizers(Manual):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.network[0], self.network[2])]


class FetchesItself(cases.Regression):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


def with_optimizer(make: Any) -> cases.Regression:
    return cases.Regression(cases.mlp(), make)


@pytest.mark.parametrize(
    ("module", "arguments", "error", "message"),
    [
        (lambda: with_optimizer(None), {"k": 58}, ValueError, "`k=58` is more than the 57 eligible elements"),
        (
            lambda: with_optimizer(None),
            {"include": "nothing.*"},
            ValueError,
            r"`include=\('nothing.\*',\)`.* trains network.0.weight, network.0.bias",
        ),
        (lambda: with_optimizer(None), {"exclude": "*"}, ValueError, "No parameter is eligible"),
        (lambda: with_optimizer(lambda p: torch.optim.LBFGS(p)), {}, MisconfigurationException, "LBFGS .* not exact"),
        (lambda: Manual(cases.mlp()), {}, MisconfigurationException, "With manual optimization, `training_step` moves"),
        (
            lambda: TwoOptimizers(cases.mlp()),
            {"optimizer": 1},
            MisconfigurationException,
            "With manual optimization, `training_step` moves",
        ),
        (lambda: FetchesItself(cases.mlp()), {}, MisconfigurationException, "Take a `batch` instead"),
        (
            lambda: cases.Regression(nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 1))),
            {},
            MisconfigurationException,
            "network.0: BatchNorm with `track_running_stats=False`",
        ),
        (
            lambda: cases.Regression(nn.Sequential(nn.Linear(5, 20_000), nn.Linear(20_000, 1))),
            {"covariance": "full"},
            ValueError,
            r"73.0 GiB for p = 140,001 eligible parameters; .*Use `covariance='diagonal'`",
        ),
    ],
    ids=["k", "include", "exclude", "LBFGS", "manual", "manual, two", "dataloader_iter", "BatchNorm", "full"],
)
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_argument_that_does_not_fit_the_module_is_refused_before_training(module, arguments, error, message):
    """At the start of fit: no weight has moved."""
    model = module()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(error, match=message):
        cases.trainer(callbacks=[GradCovFreezeCallback(**({"t0": 3, "k": 2} | arguments))]).fit(model, cases.loader())
    cases.assert_identical(dict(model.state_dict()), before)


def test_batch_of_one_sample_is_refused():
    """With one sample g_1 = g_S and C = 0: no order at all."""
    with pytest.raises(MisconfigurationException, match=r"batch holds one sample.* at least 2 samples"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=2)]).fit(
            cases.Regression(cases.mlp()), cases.loader(batch_size=1)
        )


def test_accumulated_batches_of_one_sample_are_served():
    """Four micro-batches of one sample are a batch of four."""
    callback = GradCovFreezeCallback(t0=3, k=2)
    trainer = cases.trainer(callbacks=[callback], accumulate_grad_batches=4)
    trainer.fit(cases.Regression(cases.mlp()), cases.loader(batch_size=1))
    assert all((v > 0).all() for v in callback.variance.values())


@pytest.mark.parametrize(("steps", "warns"), [(9, True), (10, False)])
def test_t0_that_is_never_reached_is_warned_of_at_the_end(steps, warns, recwarn):
    """A warning with both numbers; none if step t0 is the last."""
    callback = GradCovFreezeCallback(t0=10, k=2)
    trainer = cases.trainer(callbacks=[callback], max_steps=steps, max_epochs=-1)
    if warns:
        with pytest.warns(UserWarning, match=r"ended after 9 optimizer steps, before `t0=10`"):
            trainer.fit(cases.Regression(cases.mlp()), cases.loader())
        assert (callback.phase, callback.frozen, callback.frozen_fraction) == ("observing", {}, 0.0)
    else:
        trainer.fit(cases.Regression(cases.mlp()), cases.loader())
        assert callback.phase == "frozen"


def test_error_for_a_batch_that_cannot_be_sliced_names_the_hook():
    """Tensors of different lengths: the error names them and `gcfreeze_first_sample`."""
    loader = DataLoader([0, 1], batch_size=None, collate_fn=lambda _: (torch.zeros(4, 5), torch.zeros(3, 1)))
    with pytest.raises(ValueError, match=r"batch\[0\]: 4, batch\[1\]: 3.*gcfreeze_first_sample"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=2)]).fit(cases.Regression(cases.mlp()), loader)


class Needs(cases.Regression):
    """Fails on fewer than `least` samples."""

    def __init__(self, least: int) -> None:
        super().__init__(cases.mlp(torch.float64))
        self.least = least

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(batch[0]) < self.least:
            raise RuntimeError(f"needs {self.least}")
        return super().training_step(batch, batch_idx)


def test_samples_all_is_refused_for_a_module_that_slices_its_own_batch():
    class Cutting(cases.Regression):
        def gcfreeze_first_sample(self, batch: Any) -> Any:
            return [part[:1] for part in batch]

    module = Cutting(cases.mlp())
    message = "`gcfreeze_first_sample` of Cutting gives the first .* Use `samples='first'`"
    with pytest.raises(MisconfigurationException, match=message):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=2, samples=4)]).fit(module, cases.loader())
    cases.trainer(callbacks=[callback := GradCovFreezeCallback(t0=3, k=2)]).fit(module, cases.loader())
    assert callback.phase == "frozen"


def test_training_step_that_fails_on_one_sample_gets_two_copies_of_it():
    """Such as one with a `squeeze()` too many. The gradient is the same; a warning names the cause and the way out."""
    doubled, plain = GradCovFreezeCallback(t0=5, k=20), GradCovFreezeCallback(t0=5, k=20)
    with pytest.warns(
        UserWarning, match=r"RuntimeError\('needs 2'\)\. .* two copies of the sample instead.*gcfreeze_first_sample"
    ):
        cases.trainer(callbacks=[doubled]).fit(Needs(2), cases.loader(dtype=torch.float64))
    cases.trainer(callbacks=[plain]).fit(Needs(1), cases.loader(dtype=torch.float64))
    torch.testing.assert_close(doubled.variance, plain.variance, rtol=1e-9, atol=0.0)
    cases.assert_identical(doubled.frozen, plain.frozen)


def test_error_of_a_training_step_that_fails_on_two_copies_is_explained():
    """The error names the cause and the way out."""
    with pytest.raises(RuntimeError, match=r"a batch of a single sample: RuntimeError\('needs 3'\)\. If the sample"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=2)]).fit(Needs(3), cases.loader(dtype=torch.float64))


def test_gain_that_leaves_its_range_is_refused_at_that_step():
    """The error names t and κ_3 = 0."""
    callback = GradCovFreezeCallback(t0=5, k=2, gain=lambda t: 1.0 if t < 3 else 0.0)
    with pytest.raises(ValueError, match=r"`gain\(3\)` \(κ_t\) must lie in \(0, 1\], got 0.0"):
        cases.trainer(callbacks=[callback]).fit(cases.Regression(cases.mlp()), cases.loader())


def test_order_that_returns_nan_is_refused():
    """Nothing freezes."""

    def broken(evidence: Any) -> dict[str, Tensor]:
        return {name: w * float("nan") for name, w in evidence.weights.items()}

    with pytest.raises(ValueError, match=r"returned NaN for 40 elements of 'network.0.weight'"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=2, order=broken)]).fit(
            cases.Regression(cases.mlp()), cases.loader()
        )


def test_unsupported_strategy_is_refused_by_name():
    """FSDP1 flattens parameters; the way out is FSDP2."""
    trainer: Any = SimpleNamespace(strategy=pl.strategies.FSDPStrategy())
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy is not supported: .* ModelParallelStrategy"):
        GradCovFreezeCallback(t0=3, k=2).setup(trainer, cases.Regression(cases.mlp()), "fit")


def test_order_that_returns_no_scores_is_refused():
    """None, or lists: the message says what is expected."""
    with pytest.raises(TypeError, match="must return a mapping of parameter names to tensors of scores, got None"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=2, order=lambda evidence: None)]).fit(
            cases.Regression(cases.mlp()), cases.loader()
        )


def test_reentrant_checkpointing_is_refused():
    """It hides parameters from autograd.grad, so g_1 would be zero without a warning; the other kind is served."""

    class Checkpointed(cases.Regression):
        reentrant = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            x = x.clone().requires_grad_()
            return nn.functional.mse_loss(checkpoint(self.network, x, use_reentrant=self.reentrant), y)

    with pytest.raises(RuntimeError, match=r"hides parameters from `torch.autograd.grad`; set `use_reentrant=False`"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=2)]).fit(Checkpointed(cases.mlp()), cases.loader())
    served, plain = (GradCovFreezeCallback(t0=3, k=2, gradients="replay") for _ in range(2))
    module = Checkpointed(cases.mlp())
    module.reentrant = False
    cases.trainer(callbacks=[served]).fit(module, cases.loader())
    cases.trainer(callbacks=[plain]).fit(cases.Regression(cases.mlp()), cases.loader())
    cases.assert_identical(served.variance, plain.variance)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_module_is_refused():
    """A replay cannot restore its buffers."""
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    with pytest.raises(MisconfigurationException, match=r"network.*TorchScript"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=2)]).fit(cases.Regression(scripted), cases.loader())


class Twice(torch.optim.SGD):
    """Looks ahead: evaluates the loss a second time in each step, under no name that is known for it."""

    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def test_optimizer_that_evaluates_the_loss_twice_is_refused_in_its_first_step():
    module = cases.Regression(cases.mlp(), lambda p: Twice(p, lr=0.05))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=0.5, order="progress")])
    with pytest.raises(MisconfigurationException, match=r"Twice evaluates the loss several times in one step"):
        trainer.fit(module, cases.loader())
    cases.assert_identical(dict(module.state_dict()), before)


def test_optimizer_whose_hooks_do_not_run_is_refused_after_the_step():
    """Code has removed torch's wrapper of `step`: steps would not be counted, nor frozen elements held."""

    class Bare(torch.optim.SGD):
        """A class of its own, whose `step` the test replaces."""

    class Unwraps(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 2:
                Bare.step = torch.optim.SGD.step.__wrapped__  # type: ignore[method-assign]

    module = cases.Regression(cases.mlp(), lambda p: Bare(p, lr=0.05))
    trainer = cases.trainer(callbacks=[Unwraps(), GradCovFreezeCallback(t0=5, k=0.5)])
    with pytest.raises(MisconfigurationException, match="Bare does not run hooks after its steps"):
        trainer.fit(module, cases.loader())
    assert trainer.global_step == 3


def test_steps_that_a_precision_plugin_skips_are_not_counted():
    """They raise no error either."""

    class SkipsEverySecond(Precision):
        calls = 0

        def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
            loss = closure()
            self._after_closure(model, optimizer)
            self.calls += 1
            return optimizer.step(**kwargs) if self.calls % 2 else loss

    callback = GradCovFreezeCallback(t0=5, k=0.5)
    cases.trainer(callbacks=[callback], plugins=[SkipsEverySecond()]).fit(cases.Regression(cases.mlp()), cases.loader())
    assert (callback.phase, callback.state_dict()["steps"]) == ("frozen", 8)


def test_hooks_passed_on_by_another_callback_are_served():
    """A callback within another one counts as one of the Trainer's, not as absent in a finder's trial."""
    inner = GradCovFreezeCallback(t0=5, k=0.5)

    class PassesOn(pl.Callback):
        """Every hook of the inner callback."""

    def passed(name: str) -> Any:
        return lambda self, *args, **kwargs: getattr(inner, name)(*args, **kwargs)

    for name in vars(pl.Callback):
        if name.startswith(("on_", "setup", "teardown")) and name in dir(GradCovFreezeCallback):
            setattr(PassesOn, name, passed(name))
    cases.trainer(callbacks=[PassesOn()]).fit(cases.Regression(cases.mlp()), cases.loader())
    assert (inner.phase, inner.state_dict()["steps"]) == ("frozen", 16)


def test_argument_that_is_changed_after_the_callback_was_made_is_refused():
    """It has been checked, and a run goes by what was checked; other attributes can be set."""
    callback = GradCovFreezeCallback(t0=3, k=2)
    with pytest.raises(AttributeError, match="Make a new one with `hold='restore'`"):
        callback.hold = "restore"
    callback.note = "mine"
    assert (callback.hold, callback.note) == ("auto", "mine")
