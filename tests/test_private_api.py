"""Every private name of torch and Lightning that the package relies on, with the meaning that it relies on.

If one of these tests fails after an upgrade, the helper that uses the name is the place to mend.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors import callback_connector, signal_connector
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.optim import SGD
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader, TensorDataset

SOURCE = Path(__file__).parent.parent / "lightning_gcfreeze"
PRIVATE_FILES = {"_torch.py", "_modules.py", "_lightning.py", "_wrappers.py"}
"""The files that may use private names of other packages."""
ALLOWED = {
    "refusals/optimizers.py",
    "refusals/trainers.py",  # which recognizes strategies and optimizers by their attributes
    "user_code/readers.py",  # whose subject are the registries of hooks
    "user_code/watch.py",  # the frames above an access
}
"""More files that may."""
NAMED_TUPLE = {"_fields", "_replace", "_asdict"}
"""Documented attributes, although they begin with an underscore."""


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a file itself defines: functions, classes, variables and attributes of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("lightning_gcfreeze")):
            yield from (alias.asname or alias.name for alias in node.names)


def used_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield attributes, names in ``getattr`` and ``hasattr``, and imports from other packages, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            if isinstance(node.args[1], ast.Constant):
                yield node.lineno, str(node.args[1].value)
        elif isinstance(node, ast.ImportFrom) and not (node.level or str(node.module).startswith("lightning_gcfreeze")):
            yield from ((node.lineno, alias.name) for alias in node.names)


def private_names_of_others(root: Path) -> list[str]:
    """Return the uses of private names that a file does not define itself, outside of the files that may."""
    found = []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if file in PRIVATE_FILES | ALLOWED:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = set(own_names(tree))
        found += [
            f"{file}:{line} uses {name}"
            for line, name in used_names(tree)
            if name.startswith("_") and not name.startswith("__") and name not in own | NAMED_TUPLE
        ]
    return found


def test_private_names_are_used_in_few_files():
    assert private_names_of_others(SOURCE) == []


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("def f(p): return p._version", "_version"),
        ("def f(p): return getattr(p, '_backward_hooks', None)", "_backward_hooks"),
        ("from torch.nn.modules.conv import _ConvNd", "_ConvNd"),
        ("import torch\ntorch._foreach_copy_([], [])", "_foreach_copy_"),
        ("class A:\n    def f(self, other): return self.x._modules", "_modules"),
    ],
    ids=lambda value: value if value.startswith("_") else "",
)
def test_planted_private_name_is_found(planted, name, tmp_path):
    (tmp_path / "planted.py").write_text(planted + "\n", encoding="utf-8")
    (tmp_path / "_torch.py").write_text(planted + "\n", encoding="utf-8")
    line = 1 + planted.count("\n")
    assert private_names_of_others(tmp_path) == [f"planted.py:{line} uses {name}"]


def test_private_names_that_a_file_defines_are_not_found(tmp_path):
    text = "class A:\n    def __init__(self): self._x = 1\n    def f(self, other): return other._x, self._f()\n"
    (tmp_path / "own.py").write_text(text + "    def _f(self): return A.__name__\n", encoding="utf-8")
    assert private_names_of_others(tmp_path) == []


# torch ---------------------------------------------------------------------------------------------------------------


def version_counts_changes_in_place() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    tensor.detach().add_(1)
    assert tensor._version == before + 2


def lazy_clone_shares_memory_until_either_is_written() -> None:
    address = torch._C._data_address  # type: ignore[attr-defined]
    for write in (
        lambda tensor: tensor.add_(1),
        lambda tensor: tensor.data.mul_(2),
        lambda tensor: tensor[1:].zero_(),
        lambda tensor: tensor.numpy().__setitem__(0, 7.0),
        lambda tensor: torch._foreach_add_([tensor], 1.0),
    ):
        for first in (True, False):
            tensor = torch.arange(3.0)
            kept = torch._lazy_clone(tensor)
            assert address(tensor) == address(kept)
            assert (tensor + kept).tolist() == [0, 2, 4]  # reading is no write
            assert address(tensor) == address(kept)
            write(tensor if first else kept)
            assert address(tensor) != address(kept)
            assert (kept if first else tensor).tolist() == [0, 1, 2]
            assert (tensor if first else kept).tolist() != [0, 1, 2]
    try:
        torch._lazy_clone(torch.zeros(2).share_memory_())
    except RuntimeError:
        return
    raise AssertionError("shared memory is cloned lazily")


def own_parameters_are_in_a_dictionary_that_attributes_read() -> None:
    layer = nn.Linear(2, 3, bias=False)
    assert layer._parameters == {"weight": layer.weight, "bias": None}
    layer._parameters["weight"] = torch.zeros(3, 2)  # type: ignore[assignment]  # no Parameter, as `setattr` demands
    assert layer.weight is layer._parameters["weight"]
    assert set(nn.Module().__dict__) >= {"_parameters", "_buffers", "_modules"}


def hooks_of_tensors_are_in_dictionaries_that_are_none_or_empty() -> None:
    p = nn.Parameter(torch.zeros(2))
    assert not p._backward_hooks
    assert not p._post_accumulate_grad_hooks
    handles = [p.register_hook(print), p.register_post_accumulate_grad_hook(print)]
    assert len(p._backward_hooks) == len(p._post_accumulate_grad_hooks) == 1
    for handle in handles:
        handle.remove()
    assert not p._backward_hooks
    assert not p._post_accumulate_grad_hooks


def hooks_of_modules_are_in_dictionaries() -> None:
    layer = nn.Linear(2, 2)
    for name, register in (
        ("_backward_hooks", layer.register_full_backward_hook),
        ("_backward_pre_hooks", layer.register_full_backward_pre_hook),
        ("_forward_hooks", layer.register_forward_hook),
        ("_forward_pre_hooks", layer.register_forward_pre_hook),
    ):
        assert len(getattr(layer, name)) == 0
        handle = register(print)
        assert [*getattr(layer, name).values()] == [print]
        handle.remove()
    for registry in (torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks):
        assert len(registry) == 0


def hooks_of_optimizers_are_in_dictionaries() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(2))])
    optimizer.register_step_pre_hook(print)
    handle = optimizer.register_step_post_hook(repr)
    assert [*optimizer._optimizer_step_pre_hooks.values()] == [print]
    assert [*optimizer._optimizer_step_post_hooks.values()] == [repr]
    assert handle.hooks_dict_ref() is optimizer._optimizer_step_post_hooks
    assert len(torch_optimizer._global_optimizer_pre_hooks) == len(torch_optimizer._global_optimizer_post_hooks) == 0


def steps_of_optimizers_are_patched_once_for_each_class() -> None:
    class Mine(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    assert hasattr(Mine, "_patch_step_function")
    assert not hasattr(vars(Mine)["step"], "hooked")
    Mine([nn.Parameter(torch.zeros(2))])
    assert vars(Mine)["step"].hooked is True


def schedulers_mark_the_step_that_they_patch() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(2))])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert hasattr(vars(optimizer)["step"], "_wrapped_by_lr_sched")


def gradient_accumulators_keep_metadata_while_somebody_holds_them() -> None:
    p = nn.Parameter(torch.zeros(2))

    def accumulator() -> Any:
        return p.expand_as(p).grad_fn.next_functions[0][0]

    accumulator().metadata["x"] = True
    assert "x" not in accumulator().metadata
    held = accumulator()
    held.metadata["x"] = True
    assert accumulator().metadata["x"] is True


def forward_mode_counts_its_levels_from_minus_one() -> None:
    assert forward_ad._current_level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0


def functorch_tells_its_transforms_and_wrappers() -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append((torch._C._are_functorch_transforms_active(), torch._C._functorch.is_functorch_wrapped_tensor(x)))
        return x.sum()

    for transform in (torch.func.grad, torch.func.vmap):
        transform(f)(torch.zeros(2))
    assert seen == [(True, True)] * 2
    f(torch.zeros(2))
    assert seen[-1] == (False, False)


def compiled_modules_are_marked() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile()
    assert module._compiled_call_impl is not None
    assert isinstance(torch.compile(other), torch._dynamo.OptimizedModule)
    assert pl.LightningModule()._compiler_ctx is None


def checkpoints_that_reenter_are_named_in_the_graph() -> None:
    x = torch.zeros(2, requires_grad=True)
    for reentrant in (True, False):
        loss = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=reentrant)
        assert ("CheckpointFunction" in loss.grad_fn.name()) is reentrant


def batch_norm_keeps_its_statistics_in_the_graph() -> None:
    x = torch.randn(8, 3)
    node = nn.BatchNorm1d(3)(x).grad_fn
    torch.testing.assert_close(node._saved_result1, x.mean(0))
    torch.testing.assert_close(node._saved_result2, (x.var(0, correction=0) + 1e-5).rsqrt())


def convolutions_keep_the_padding_that_pad_takes() -> None:
    layer = nn.Conv2d(1, 1, (3, 5), padding=(1, 2))
    assert [*layer._reversed_padding_repeated_twice] == [2, 2, 1, 1]
    assert [*nn.Conv1d(1, 1, 4, padding="same")._reversed_padding_repeated_twice] == [1, 2]


def layers_of_libraries_derive_from_private_bases() -> None:
    from torch.nn.modules import batchnorm, conv, dropout

    assert issubclass(nn.SyncBatchNorm, batchnorm._BatchNorm)
    assert issubclass(nn.ConvTranspose2d, conv._ConvNd)
    assert issubclass(nn.AlphaDropout, dropout._DropoutNd)


def many_tensors_are_copied_at_once() -> None:
    targets = [torch.zeros(2), torch.zeros(3)]
    torch._foreach_copy_(targets, [torch.ones(2), torch.ones(3)])
    assert all(bool((target == 1).all()) for target in targets)


def sparse_tensors_give_their_parts_uncoalesced() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.ones(2), (3,))
    assert len(sparse._values()) == sparse._indices().shape[1] == 2


def strided_shards_have_a_dimension_and_a_split_factor() -> None:
    from torch.distributed.tensor.placement_types import _StridedShard

    placement = _StridedShard(0, split_factor=2)
    assert (placement.dim, placement.split_factor) == (0, 2)


def fused_optimizers_are_told_what_the_scaler_found() -> None:
    source = inspect.getsource(torch.amp.GradScaler.step)
    assert "found_inf" in source
    assert "_step_supports_amp_scaling" in source


# Lightning -----------------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


class Probe(pl.Callback):
    """Keeps what private counters of the Trainer say in public hooks."""

    def __init__(self) -> None:
        self.accumulates: list[bool] = []
        self.logged: list[tuple[int, int]] = []

    def on_before_zero_grad(self, *args: Any) -> None: ...

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.accumulates.append(trainer.fit_loop._should_accumulate())

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.logged.append((trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.global_step))


def the_trainer_knows_whether_it_accumulates_and_which_step_it_logs() -> None:
    probe = Probe()
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=2, callbacks=[probe], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, barebones=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(torch.ones(10, 2)), batch_size=2))
    assert probe.accumulates == [True, False, True, False, False]
    assert [step for _, step in probe.logged] == [0, 1, 1, 2, 3]
    assert [logged for logged, _ in probe.logged] == [0, 0, 1, 1, 2]


def hyperparameters_are_logged_once_from_a_dict_that_the_module_keeps() -> None:
    module, calls = Module(), []
    assert not module._log_hyperparams
    module.save_hyperparameters({"width": 3})
    assert module._log_hyperparams
    assert isinstance(module._hparams_initial, dict)

    class Logs(CSVLogger):
        def log_hyperparams(self, params: Any = None) -> None:
            calls.append(dict(params))

    class Adds(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert calls == []
            pl_module._hparams_initial["added"] = 1

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert calls == [{"width": 3, "added": 1}]

    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1, callbacks=[Adds()], accelerator="cpu", logger=Logs(folder), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(torch.ones(10, 2)), batch_size=2))
    assert len(calls) == 1
    assert dict(module.hparams) == {"width": 3}


def ddp_strategies_keep_their_communication_hook() -> None:
    hook, wrapper, state = print, repr, object()
    strategy = DDPStrategy(ddp_comm_hook=hook, ddp_comm_wrapper=wrapper, ddp_comm_state=state)
    assert (strategy._ddp_comm_hook, strategy._ddp_comm_wrapper, strategy._ddp_comm_state) == (hook, wrapper, state)
    assert DDPStrategy()._ddp_comm_hook is None


def strategies_that_launch_processes_say_so() -> None:
    assert _MultiProcessingLauncher.__name__ == "_MultiProcessingLauncher"
    assert "_MultiProcessingLauncher" in inspect.getsource(DDPStrategy._configure_launcher)


def callbacks_are_compared_by_key_in_a_function_of_this_name() -> None:
    function = callback_connector._validate_callbacks_list
    assert "callbacks" in inspect.signature(function).parameters
    asked = []

    class Asked(pl.Callback):
        @property
        def state_key(self) -> str:
            asked.append(sys._getframe(1).f_code.co_name)
            return "key"

        def state_dict(self) -> dict[str, Any]:
            return {}

    function([Asked()])
    assert set(asked) == {"_validate_callbacks_list"}


def slurm_signals_are_handled_by_a_function_of_this_name() -> None:
    assert inspect.isfunction(signal_connector._SignalConnector._slurm_sigusr_handler_fn)


ASSUMPTIONS: list[Callable[[], None]] = [
    value
    for name, value in [*globals().items()]
    if inspect.isfunction(value) and value.__module__ == __name__ and value.__annotations__ == {"return": None}
    if not name.startswith("test_")
]


@pytest.mark.parametrize("assumption", ASSUMPTIONS, ids=lambda assumption: assumption.__name__)
@pytest.mark.filterwarnings("ignore")
def test_assumption_about_a_private_name_holds(assumption):
    assumption()
