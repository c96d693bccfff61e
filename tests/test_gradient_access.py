"""Who may look at gradients: everybody whose code could, by name, and nobody else."""

import functools
import types
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_gcfreeze import GradCovFreezeCallback, gradient_access
from tests import cases


def found(module: pl.LightningModule, *others: Any, plugins: Any = (), optimizer: Any = None) -> list[str]:
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.1)
    return gradient_access.of_run(module, others, plugins, dict(module.named_parameters()), optimizer)


def halve(module: nn.Module) -> None:
    for p in module.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)


def indirectly(module: nn.Module) -> None:
    halve(module)


helpers = types.ModuleType("helpers")
helpers.halve = halve  # type: ignore[attr-defined]


class Clipper:
    """An object that does it."""

    def __call__(self, module: nn.Module) -> None:
        self._clip(module)

    def _clip(self, module: nn.Module) -> None:
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)


class Base(cases.Regression):
    def __init__(self) -> None:
        super().__init__(cases.mlp())
        self.clipper = Clipper()


class Looks:
    """One method that leads to gradients, in each way that code can; the name of a class says how."""

    class Directly(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            self.norm = sum(p.grad.norm() for p in self.parameters() if p.grad is not None)

    class ByAFunction(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            indirectly(self)

    class ByAModulesFunction(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            helpers.halve(self)

    class ByAnObject(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            self.clipper(self)

    class ByAMethod(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            self.tidy()

        def tidy(self) -> None:
            self.zero_grad()

    class ByGetattr(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            self.seen = [getattr(p, "grad") for p in self.parameters()]  # noqa: B009

    class InAnInnerFunction(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            def norms() -> list[Tensor]:
                return [p.grad.norm() for p in self.parameters()]

            self.norms = norms()

    class ByAutograd(Base):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + sum(g.square().sum() for g in torch.autograd.grad(loss, self.parameters(), create_graph=True))

    class Decorated(Base):
        @torch.no_grad()
        def on_train_batch_end(self, *args: Any) -> None:
            halve(self)

    class InAParentsMethod(Directly):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)


LOOKS = {name: cls for name, cls in vars(Looks).items() if isinstance(cls, type)}


class Harmless:
    """What people override that has nothing to do with gradients."""

    class LogsWeights(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            self.size = float(sum(p.detach().norm() for p in self.parameters()))

        def on_validation_epoch_end(self) -> None:
            with torch.no_grad(), torch.enable_grad():
                self.enabled = torch.is_grad_enabled()

    class Warms(Base):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            for group in self.optimizers().param_groups:
                group["lr"] = 0.1 * min(1.0, (batch_idx + 1) / 10)

    class Freezes(Base):
        def setup(self, stage: str) -> None:
            self.network[0].requires_grad_(False)

    class ReadsTheTrainer(Base):
        def on_train_start(self) -> None:
            self.every = self.trainer.accumulate_grad_batches, self.trainer.gradient_clip_val


HARMLESS = {name: cls for name, cls in vars(Harmless).items() if isinstance(cls, type)}


@pytest.mark.parametrize("cls", LOOKS.values(), ids=LOOKS.keys())
def test_code_that_leads_to_gradients_is_found(cls):
    assert any(name.startswith(f"{cls.__name__}.") for name in found(cls()))


@pytest.mark.parametrize("cls", HARMLESS.values(), ids=HARMLESS.keys())
def test_harmless_code_is_not(cls):
    assert found(cls()) == []


@pytest.mark.parametrize("name", sorted(gradient_access.IN_THE_GRADIENTS_WAY))
def test_a_hook_in_the_gradients_way_counts_whatever_its_code(name):
    """Of a module, a callback, a strategy, a precision plugin; also on an instance, and as a partial."""

    def harmless(self: Any, *args: Any, **kwargs: Any) -> None: ...

    for base, build in (
        (Base, lambda cls: found(cls())),
        (pl.Callback, lambda cls: found(Base(), cls())),
        (SingleDeviceStrategy, lambda cls: found(Base(), plugins=[object.__new__(cls)])),
        (Precision, lambda cls: found(Base(), plugins=[cls()])),
    ):
        assert build(type("Mine", (base,), {name: harmless})) == [f"Mine.{name}"]
        assert build(type("Mine", (base,), {})) == []
    if hasattr(pl.LightningModule, name):
        module = Base()
        setattr(module, name, functools.partial(harmless, module))
        assert found(module) == [f"Base.{name}"]


def test_hooks_on_tensors_modules_and_the_optimizer_are_found():
    """Each kind by itself; none on a fresh module."""

    def hook(*args: Any) -> None: ...

    def looks(module: nn.Module, args: Any) -> None:
        module.seen = [p.grad for p in module.parameters()]

    module = Base()
    weight, layer = module.network[0].weight, module.network[0]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for handle, expected in (
        (lambda: weight.register_hook(hook), "a hook on network.0.weight"),
        (lambda: weight.register_post_accumulate_grad_hook(hook), "a hook on network.0.weight"),
        (lambda: layer.register_full_backward_hook(hook), "a backward hook on network.0"),
        (lambda: layer.register_full_backward_pre_hook(hook), "a backward hook on network.0"),
        (lambda: layer.register_forward_pre_hook(looks), "the forward hook"),
        (lambda: nn.modules.module.register_module_full_backward_hook(hook), "a backward hook on all modules"),
        (lambda: optimizer.register_step_pre_hook(hook), "the optimizer's hook"),
        (lambda: optimizer.register_step_post_hook(hook), "the optimizer's hook"),
        (lambda: register_optimizer_step_pre_hook(hook), "the optimizer's hook"),
    ):
        assert found(module, optimizer=optimizer) == []
        registered = handle()
        (name,) = found(module, optimizer=optimizer)
        assert name.startswith(expected)
        registered.remove()
    layer.register_forward_hook(hook)  # one that reads nothing
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it patches `step`
    assert found(module, optimizer=optimizer) == []
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    assert found(module, optimizer=optimizer) == ["the patched SGD.step"]


def test_lightnings_own_callbacks_are_known():
    """All that it has, and ours."""
    own = [
        callbacks.EarlyStopping("x"), callbacks.LearningRateMonitor(), callbacks.ModelCheckpoint(), callbacks.Timer(),
        callbacks.EMAWeightAveraging(), callbacks.StochasticWeightAveraging(1e-2), callbacks.DeviceStatsMonitor(),
        callbacks.GradientAccumulationScheduler({0: 1}), callbacks.TQDMProgressBar(), callbacks.RichProgressBar(),
        callbacks.BackboneFinetuning(), callbacks.OnExceptionCheckpoint("x"), GradCovFreezeCallback(t0=1, k=1),
    ]  # fmt: skip
    assert found(Base(), *own, plugins=[Precision()]) == []


class TestOfOptimizerState:
    """Code that would not find what it looks for where the state is that of the live elements."""

    class ByParameter(Base):
        def on_train_epoch_end(self) -> None:
            state = self.optimizers().state
            self.moments = [state[p]["exp_avg"].norm() for p in self.parameters()]

    class Resets(Base):
        def on_train_epoch_end(self) -> None:
            for state in self.trainer.optimizers[0].state.values():
                for value in state.values():
                    value.zero_()

    class Counts(Base):
        def on_train_epoch_end(self) -> None:
            optimizer = self.trainer.optimizers[0]
            self.size = sum(v.numel() for state in optimizer.state.values() for v in state.values())

    @pytest.mark.parametrize(("cls", "looks"), [(ByParameter, True), (Resets, True), (Counts, False)])
    def test_of_modules(self, cls, looks):
        assert bool(gradient_access.of_optimizer_state(cls(), [], [])) is looks

    @pytest.mark.parametrize(("cls", "compact"), [(ByParameter, False), (Resets, False), (Counts, True)])
    def test_under_auto_its_values_are_put_back(self, cls, compact):
        """And what it looks for is there; "compact" is refused by name."""
        module = cls()
        module.make_optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.01)
        callback = GradCovFreezeCallback(t0=3, k=0.5)
        cases.trainer(callbacks=[callback]).fit(module, cases.loader())
        saves = callback.savings.after.state < callback.savings.before.state
        assert saves is compact
        refused = GradCovFreezeCallback(t0=3, k=0.5, hold="compact")
        trainer = cases.trainer(callbacks=[refused])
        if compact:
            trainer.fit(cls(), cases.loader())
        else:
            with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=f"{cls.__name__}.on_train_epo"):
                trainer.fit(cls(), cases.loader())
