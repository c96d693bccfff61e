"""Unsupported configurations give a sentence with the reason and the way out; supported ones give None."""

import types

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.optim import LBFGS, SGD

from lightning_gcfreeze import refusals
from lightning_gcfreeze.refusals import trainers
from tests import conformance


def assert_says(reason, *parts):
    """A refusal is a sentence that contains every part."""
    assert reason is not None
    assert reason.endswith(".")
    for part in parts:
        assert part in reason


class TestUnsupportedStrategy:
    """By class names, so that both of Lightning's packages are understood."""

    @pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy])
    def test_single_device_ddp_and_model_parallel_are_supported(self, strategy):
        """So are subclasses, and classes of the same name from the other package."""
        namesake = type(strategy.__name__, (), {})
        for cls in (strategy, type("Mine", (strategy,), {}), namesake, type("Mine", (namesake,), {})):
            assert refusals.unsupported_strategy(object.__new__(cls)) is None

    @pytest.mark.parametrize(
        "strategy",
        [FSDPStrategy, DeepSpeedStrategy, type("DeepSpeedStrategy", (DDPStrategy,), {}), type("XLAStrategy", (), {})],
    )
    def test_others_are_refused_by_name(self, strategy):
        """DeepSpeed shards although it is a kind of DDP; the error names the strategy and what is supported."""
        reason = refusals.unsupported_strategy(object.__new__(strategy))
        assert_says(reason, strategy.__name__, "DDPStrategy, and ModelParallelStrategy for FSDP2")

    def test_post_local_sgd_is_refused(self):
        """Weights differ between processes until they are averaged."""
        state = PostLocalSGDState(None, None, 10)
        assert_says(refusals.unsupported_strategy(DDPStrategy(ddp_comm_state=state)), "post-local SGD")
        assert refusals.unsupported_strategy(DDPStrategy()) is None


class TestUnsupportedModule:
    """Modules without all parameters, or whose loss cannot be replayed on one sample."""

    @staticmethod
    def training_step(batch, batch_idx):
        """As usual."""

    def test_ordinary_module_is_supported(self):
        """Also with a BatchNorm that tracks, with one that does not but is in eval mode, or with no batch_idx."""
        untracked = nn.BatchNorm1d(3, track_running_stats=False).eval()
        for module in (nn.Linear(2, 2), nn.BatchNorm1d(3), untracked):
            assert refusals.unsupported_module(module, self.training_step) is None
        assert refusals.unsupported_module(nn.Linear(2, 2), lambda batch: None) is None

    def test_training_step_that_fetches_its_batch_is_refused(self):
        """There is no batch to cut."""
        reason = refusals.unsupported_module(nn.Linear(2, 2), lambda dataloader_iter: None)
        assert_says(reason, "dataloader_iter", "Take a `batch` instead")

    def test_lazy_module_is_refused_until_its_first_forward_pass(self):
        """Their parameters have no elements yet."""
        module = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
        for replays in (True, False):
            reason = refusals.unsupported_module(module, self.training_step, replays)
            assert_says(reason, "0.weight, 0.bias", "Run the module on one batch")
        module(torch.zeros(1, 2))
        assert refusals.unsupported_module(module, self.training_step) is None

    def test_module_that_cannot_be_replayed_is_supported_without_replay(self):
        """An order that does not read the variance needs no single sample."""
        untracked = nn.BatchNorm1d(3, track_running_stats=False)
        assert refusals.unsupported_module(untracked, lambda dataloader_iter: None, replays=False) is None
        assert refusals.unsupported_module(untracked, lambda dataloader_iter: None) is not None

    def test_batch_norm_without_running_statistics_is_refused_by_name(self):
        """Every such layer is named."""
        module = nn.ModuleDict({name: nn.BatchNorm1d(3, track_running_stats=name == "c") for name in "abc"})
        reason = refusals.unsupported_module(module, self.training_step)
        assert_says(reason, "a, b: BatchNorm with `track_running_stats=False`", "GroupNorm or LayerNorm")


class TestUnsupportedOptimizer:
    """Optimizers whose steps can be followed, and others."""

    PARAMETERS = [nn.Parameter(torch.zeros(2))]  # noqa: RUF012

    @pytest.mark.parametrize("name", conformance.optimizers_of_torch())
    def test_every_first_order_optimizer_is_supported(self, name):
        """All of torch but LBFGS."""
        parameters = conformance.parameters_for(name, torch.float32).values()
        assert refusals.unsupported_optimizer(getattr(torch.optim, name)(parameters)) is None

    def test_lbfgs_is_refused(self):
        """Its search directions mix frozen and live elements; subclasses are refused too."""
        for cls in (LBFGS, type("Mine", (LBFGS,), {})):
            assert_says(
                refusals.unsupported_optimizer(cls(self.PARAMETERS)), "LBFGS", "not exact", "first-order optimizer"
            )

    def test_wrapper_of_an_optimizer_is_refused(self):
        """A wrapper has no hook that runs right after a step."""

        class Wrapper:
            pass

        assert_says(refusals.unsupported_optimizer(Wrapper()), "Wrapper is no torch.optim.Optimizer")


class TestUnsupportedOptimizerIndex:
    """Automatic optimization has one optimizer; with several, the callback says which is its own."""

    def test_one_optimizer_needs_no_index(self):
        assert refusals.unsupported_optimizer_index(None, ["SGD"]) is None
        assert refusals.unsupported_optimizer_index(0, ["SGD"]) is None
        assert_says(
            refusals.unsupported_optimizer_index(1, ["SGD"]), "`optimizer=1`", "has 1 optimizer.", "from 0 to 0"
        )

    def test_several_optimizers_need_one_of_their_indices(self):
        both = ["SGD", "Adam"]
        assert [refusals.unsupported_optimizer_index(index, both) for index in (0, 1)] == [None, None]
        assert_says(refusals.unsupported_optimizer_index(None, both), "has 2 optimizers", "as `optimizer`, from 0 to 1")
        for index in (2, -1):
            reason = refusals.unsupported_optimizer_index(index, both)
            assert_says(reason, f"`optimizer={index}`", "has 2 optimizers.", "from 0 to 1")

    def test_module_without_an_optimizer_is_refused(self):
        for index in (None, 0):
            assert_says(refusals.unsupported_optimizer_index(index, []), "no optimizer", "`configure_optimizers`")


class TestTooManyCallbacks:
    """Each optimizer serves one callback."""

    def test_one_callback_for_each_optimizer_is_supported(self):
        for indices in ([], [0], [0, 1], [2, 0, 1]):
            assert refusals.too_many_callbacks(indices) is None

    def test_two_callbacks_for_one_optimizer_are_refused(self):
        assert_says(refusals.too_many_callbacks([0, 0]), "2 GradCov", "index 0", "serves one only", "`schedule=Fr")
        assert_says(refusals.too_many_callbacks([0, 1, 2, 1, 1]), "3 GradCov", "index 1", "`optimizer`")


class TestUnsupportedManualOptimization:
    """Orders that read the variance, and decisions that depend on the training loss."""

    def test_order_without_variance_and_fixed_decisions_are_supported(self):
        assert refusals.unsupported_manual_optimization(reads_samples=False, needs_loss=False) is None

    @pytest.mark.parametrize("needs_loss", [False, True])
    def test_order_that_reads_the_variance_is_refused(self, needs_loss):
        reason = refusals.unsupported_manual_optimization(True, needs_loss)
        assert_says(reason, "cannot be replayed on one sample", "`order='progress'`", "Freezer` with `loss=`")

    def test_decision_by_the_training_loss_is_refused(self):
        assert "Pass a number of steps" in refusals.unsupported_manual_optimization(False, False, by_fraction=True)
        reason = refusals.unsupported_manual_optimization(False, True)
        assert_says(reason, "`t0='auto'` and `k='auto'`", "an int `t0` and a number `k`", "Freezer` with `loss=`")


class TestOptimizersWithTwoSetsOfWeights:
    """Optimizers whose frozen elements would not be constant in both, by what they are known by."""

    @staticmethod
    def optimizer(name="Mine", methods=(), **group):
        cls = type(name, (SGD,), {method: lambda self: None for method in methods})
        return cls([{"params": [nn.Parameter(torch.zeros(2))], **group}], lr=0.1)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"methods": ("train", "eval")}, "evaluated with (`eval`, `train`)"),
            ({"methods": ("first_step", "second_step")}, "at other weights than those that it steps"),
            ({"methods": ("sync_lookahead",)}, "slow weights"),
            ({"methods": ("swap_swa_sgd",)}, "averaged weights"),
            ({"name": "Lookahead"}, "slow weights"),
            ({"weight_sum": 0.0, "weight_lr_power": 2.0}, "evaluated with"),
        ],
        ids=str,
    )
    def test_each_is_refused_by_its_sign(self, arguments, said):
        assert_says(refusals.unsupported_optimizer(self.optimizer(**arguments)), arguments.get("name", "Mine"), said)

    @pytest.mark.parametrize("arguments", [{}, {"methods": ("train",)}, {"methods": ("step_all",)}, {"weight_sum": 0}])
    def test_half_a_sign_is_supported(self, arguments):
        assert refusals.unsupported_optimizer(self.optimizer(**arguments)) is None

    def test_optimizer_that_does_not_call_the_init_of_torch_is_refused(self):
        """Its steps run no hooks."""

        class Bare(SGD):
            def __init__(self, inner):
                self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, {}, {}

        assert_says(refusals.unsupported_optimizer(Bare(self.optimizer())), "Bare does not run hooks after its steps")


class TestUnsupportedMesh:
    """Dimensions along which processes see other layers or parts of samples, by name and size."""

    @pytest.fixture(autouse=True)
    def _meshes(self, monkeypatch):
        monkeypatch.setattr(
            trainers,
            "DeviceMesh",
            type("FakeMesh", (), {"__init__": lambda self, names, shape: self.__dict__.update(
                mesh_dim_names=names, shape=shape
            )}),
        )  # fmt: skip

    def refused(self, **sizes):
        mesh = trainers.DeviceMesh(tuple(sizes), tuple(sizes.values()))
        return refusals.unsupported_mesh(types.SimpleNamespace(_device_mesh=mesh), [])

    @pytest.mark.parametrize("name", ["pp", "pipeline_parallel", "cp", "context", "ep", "expert_parallel"])
    def test_dimension_that_is_neither_data_nor_tensor_parallel_is_refused(self, name):
        assert_says(self.refused(data_parallel=2, **{name: 2}), "SimpleNamespace", f"{name} (2)", "have size 1")
        assert self.refused(data_parallel=2, **{name: 1}) is None

    def test_dimensions_of_lightning_and_common_names_are_supported(self):
        assert self.refused(data_parallel=4, tensor_parallel=2) is None
        assert self.refused(dp_replicate=2, dp_shard=2, tp=2) is None
        assert self.refused(copy=2, shard=2) is None  # of a mesh of one's own


class TestNotResumable:
    """A checkpoint must be of the same run."""

    ARGUMENTS = {"t0": 5, "k": 0.5, "include": ["*.weight"]}  # noqa: RUF012
    PARAMETERS = {"a": torch.zeros(2, 3), "b": torch.zeros(())}  # noqa: RUF012

    @property
    def shapes(self):
        return {name: p.shape for name, p in self.PARAMETERS.items()}

    def test_checkpoint_of_the_same_run_is_resumable(self):
        """Equal arguments and shapes, in any order."""
        reversed_shapes = dict(reversed(self.shapes.items()))
        assert refusals.not_resumable(dict(self.ARGUMENTS), self.ARGUMENTS, self.shapes, self.PARAMETERS) is None
        assert refusals.not_resumable(self.ARGUMENTS, self.ARGUMENTS, reversed_shapes, self.PARAMETERS) is None

    def test_checkpoint_with_the_former_default_of_samples_is_resumable(self):
        """The default of 0.1 was "first"; other changes of `samples` are refused."""
        auto, first, everything = ({**self.ARGUMENTS, "samples": samples} for samples in ("auto", "first", "all"))
        assert refusals.not_resumable(first, auto, self.shapes, self.PARAMETERS) is None
        assert "samples='auto'" in refusals.not_resumable(auto, first, self.shapes, self.PARAMETERS)
        assert "samples='all'" in refusals.not_resumable(everything, auto, self.shapes, self.PARAMETERS)

    def test_each_other_argument_is_named_with_both_values(self):
        """Arguments that agree are not named."""
        now = self.ARGUMENTS | {"t0": 7, "include": None, "order": "snr"}
        reason = refusals.not_resumable(self.ARGUMENTS, now, self.shapes, self.PARAMETERS)
        assert_says(
            reason, "t0=5 (now 7)", "include=['*.weight'] (now None)", "order=None (now 'snr')", "without `ckpt_"
        )
        assert "k=" not in reason

    @pytest.mark.parametrize(
        ("parameters", "names"),
        [
            ({"a": torch.zeros(2, 3)}, "b differ"),
            (PARAMETERS | {"c": torch.zeros(1)}, "c differ"),
            (PARAMETERS | {"a": torch.zeros(3, 2)}, "a differ"),
            ({"x": torch.zeros(2, 3), "b": torch.zeros(1)}, "a, b, x differ"),
        ],
        ids=["fewer", "more", "another shape", "several"],
    )
    def test_each_other_parameter_is_named_once(self, parameters, names):
        """Whether it was added, is gone, or has another shape."""
        reason = refusals.not_resumable(self.ARGUMENTS, self.ARGUMENTS, self.shapes, parameters)
        assert_says(reason, names, "Resume with the module and optimizer")


class TestFirstStep:
    """What the first step shows."""

    def test_batch_of_one_sample_is_refused(self):
        assert [refusals.single_sample(size) for size in (None, 2, 9)] == [None] * 3
        assert_says(refusals.single_sample(1), "batch holds one sample", "at least 2 samples", "`order='progress'`")

    def test_parameters_without_any_gradient_are_refused(self):
        parameters = {name: nn.Parameter(torch.zeros(2)) for name in "ab"}
        assert_says(refusals.no_gradients(parameters), "No eligible parameter has a gradient", "`p.grad`")
        parameters["b"].grad = torch.zeros(2)
        assert refusals.no_gradients(parameters) is None
