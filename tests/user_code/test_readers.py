"""Code that may look at gradients or at the optimizer's state is found by name, and nothing else is."""

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

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.user_code import reached, readers
from lightning_gcfreeze.user_code.reached import TRAINING_HOOKS_WITH_GRADIENTS, Owners
from tests import cases


def found(module: pl.LightningModule, *others: Any, plugins: Any = (), optimizer: Any = None) -> list[str]:
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=0.1)
    owners = Owners(module, [*others, *plugins])
    return readers.gradient_readers(owners, dict(module.named_parameters()), optimizer)


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

    @staticmethod
    def static(module: nn.Module) -> None:
        halve(module)


class Tuned(nn.Sequential):
    """A network that looks at its own gradients when it is asked to, as AdaLoRA does."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 1))

    def tune(self) -> None:
        self.importance = [p.grad.abs() for p in self.parameters()]


class Base(cases.Regression):
    def __init__(self) -> None:
        super().__init__(cases.mlp())
        self.clipper = Clipper()
        self.steps = {"tidy": lambda module: halve(module)}


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

    class ByAMethodOfALayer(Base):
        def __init__(self) -> None:
            super().__init__()
            self.network = Tuned()

        def on_train_batch_end(self, *args: Any) -> None:
            self.network.tune()

    class ByAClass(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            Clipper.static(self)

    class ByAnImport(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            from tests.user_code.test_readers import halve as imported

            imported(self)

    class ByAContainer(Base):
        def on_train_batch_end(self, *args: Any) -> None:
            self.steps["tidy"](self)

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
def test_harmless_code_is_not_found(cls):
    assert found(cls()) == []


@pytest.mark.parametrize("name", sorted(TRAINING_HOOKS_WITH_GRADIENTS))
def test_overridden_hook_that_handles_gradients_is_found_whatever_its_code(name):
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


def test_callbacks_of_lightning_and_this_package_are_not_found():
    own = [
        callbacks.EarlyStopping("x"), callbacks.LearningRateMonitor(), callbacks.ModelCheckpoint(), callbacks.Timer(),
        callbacks.EMAWeightAveraging(), callbacks.StochasticWeightAveraging(1e-2), callbacks.DeviceStatsMonitor(),
        callbacks.GradientAccumulationScheduler({0: 1}), callbacks.TQDMProgressBar(), callbacks.RichProgressBar(),
        callbacks.BackboneFinetuning(), callbacks.OnExceptionCheckpoint("x"), GradCovFreezeCallback(t0=1, k=1),
    ]  # fmt: skip
    assert found(Base(), *own, plugins=[Precision()]) == []


class TestOptimizerStateReaders:
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
    def test_methods_that_look_up_or_change_state_are_found(self, cls, looks):
        assert bool(readers.optimizer_state_readers(Owners(cls()))) is looks

    @pytest.mark.parametrize(("cls", "compact"), [(ByParameter, False), (Resets, False), (Counts, True)])
    def test_auto_restores_values_and_compact_is_refused(self, cls, compact):
        """So the state that the method looks for is there; the error names the method."""
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


def test_data_modules_and_schedulers_are_searched():
    """Gradients stay where one of them reads gradients between two steps."""

    class Data(pl.LightningDataModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            halve(self.trainer.lightning_module)
            return batch

        def train_dataloader(self) -> Any:
            return cases.loader()

    class Scheduled(cases.Regression):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 + 0.0 * len(norms(self)))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def norms(module: nn.Module) -> list[Tensor]:
        return [p.grad.norm() for p in module.parameters() if p.grad is not None]

    for module, data in ((cases.Regression(cases.mlp()), Data()), (Scheduled(cases.mlp()), cases.loader())):
        callback = GradCovFreezeCallback(t0=3, k=0.5)
        cases.trainer(callbacks=[callback]).fit(module, data)
        assert callback.savings.after.gradients == callback.savings.before.gradients
    cases.trainer(callbacks=[callback]).fit(cases.Regression(cases.mlp()), cases.loader())
    assert callback.savings.after.gradients < callback.savings.before.gradients


def test_three_questions_walk_through_the_methods_once(monkeypatch):
    """Walking is slow: gradients, weights and state are looked for in the same functions."""
    walked: list[str] = []
    walk = reached.reached_functions

    def counted(code: reached.Code) -> Any:
        walked.append(code.function.__qualname__)
        return walk(code)

    monkeypatch.setattr(reached, "reached_functions", counted)
    module = TestOptimizerStateReaders.ByParameter()
    owners, parameters = Owners(module), dict(module.named_parameters())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    assert readers.gradient_readers(owners, parameters, optimizer) == []
    assert readers.weight_writers(owners, parameters, optimizer) == []
    assert readers.optimizer_state_readers(owners) == ["ByParameter.on_train_epoch_end"]
    assert len(walked) == len(set(walked)) == len(owners.methods) > 1


@pytest.mark.parametrize("package", ["lightning", "torch", "transformers", "accelerate"])
def test_functions_of_known_packages_are_not_walked(package):
    """A namesake from elsewhere is."""
    code = compile("def step(p): return p.grad", "<package>", "exec")
    for name, functions in ((f"{package}.utils", 0), (f"my_{package}.utils", 1)):
        scope: dict[str, Any] = {"__name__": name}
        exec(code, scope)
        assert len(reached.reached_functions(reached.Code(scope["step"]))) == functions


class Compiled:
    """What a compiled extension makes of a function: its class has descriptors where a function has its globals."""

    __slots__ = ("__globals__",)

    def __call__(self, x: Tensor) -> Tensor:
        return x


compiled = Compiled()


class Crystals(cases.Regression):
    """Its step calls a compiled function, as graph networks do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((compiled(x), y), batch_idx)


def test_compiled_functions_are_passed_by():
    """And code beside them is found all the same."""
    module = Crystals(cases.mlp())
    assert found(module) == []
    module.on_before_optimizer_step = types.MethodType(lambda self, optimizer: halve(self), module)  # type: ignore
    assert found(module)
