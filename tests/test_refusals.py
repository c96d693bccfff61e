"""What is refused, with which words, and what is not."""

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
from tests import conformance


def assert_says(reason, *parts):
    """A refusal is a sentence in which every part occurs."""
    assert reason is not None
    assert reason.endswith(".")
    for part in parts:
        assert part in reason


class TestOfStrategy:
    """By class names, so that both of Lightning's packages are understood."""

    @pytest.mark.parametrize("strategy", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy])
    def test_what_keeps_parameters_in_their_places_is_served(self, strategy):
        """So are subclasses, and classes of the same name from the other package."""
        namesake = type(strategy.__name__, (), {})
        for cls in (strategy, type("Mine", (strategy,), {}), namesake, type("Mine", (namesake,), {})):
            assert refusals.of_strategy(object.__new__(cls)) is None

    @pytest.mark.parametrize(
        "strategy",
        [FSDPStrategy, DeepSpeedStrategy, type("DeepSpeedStrategy", (DDPStrategy,), {}), type("XLAStrategy", (), {})],
    )
    def test_others_are_refused(self, strategy):
        """DeepSpeed shards although it is a kind of DDP; the error names the strategy and what is supported."""
        reason = refusals.of_strategy(object.__new__(strategy))
        assert_says(reason, strategy.__name__, "DDPStrategy, and ModelParallelStrategy for FSDP2")

    def test_weights_that_differ_between_processes_are_refused(self):
        """Post-local SGD averages them now and then."""
        state = PostLocalSGDState(None, None, 10)
        assert_says(refusals.of_strategy(DDPStrategy(ddp_comm_state=state)), "post-local SGD")
        assert refusals.of_strategy(DDPStrategy()) is None


class TestOfModule:
    """Modules whose loss cannot be replayed on one sample."""

    @staticmethod
    def training_step(batch, batch_idx):
        """As usual."""

    def test_an_ordinary_module_is_served(self):
        """Also with a BatchNorm that tracks, with one that does not but is in eval mode, or with no batch_idx."""
        untracked = nn.BatchNorm1d(3, track_running_stats=False).eval()
        for module in (nn.Linear(2, 2), nn.BatchNorm1d(3), untracked):
            assert refusals.of_module(module, self.training_step, automatic_optimization=True) is None
        assert refusals.of_module(nn.Linear(2, 2), lambda batch: None, automatic_optimization=True) is None

    def test_manual_optimization(self):
        """Its `training_step` would move the weights during a replay."""
        reason = refusals.of_module(nn.Linear(2, 2), self.training_step, automatic_optimization=False)
        assert_says(reason, "Manual optimization", "`automatic_optimization = True`")

    def test_a_step_that_fetches_its_batch(self):
        """There is no batch to cut."""
        reason = refusals.of_module(nn.Linear(2, 2), lambda dataloader_iter: None, automatic_optimization=True)
        assert_says(reason, "dataloader_iter", "Take a `batch` instead")

    def test_lazy_modules(self):
        """Their parameters have no elements yet."""
        module = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
        for replays in (True, False):
            reason = refusals.of_module(module, self.training_step, True, replays)
            assert_says(reason, "0.weight, 0.bias", "Run the module on one batch")
        module(torch.zeros(1, 2))
        assert refusals.of_module(module, self.training_step, True) is None

    def test_without_a_replay_only_manual_optimization_is_in_the_way(self):
        """An order that does not read the variance needs no single sample."""
        untracked = nn.BatchNorm1d(3, track_running_stats=False)
        assert refusals.of_module(untracked, lambda dataloader_iter: None, True, replays=False) is None
        assert_says(refusals.of_module(untracked, self.training_step, False, replays=False), "Manual optimization")

    def test_batch_norm_without_statistics(self):
        """Every such layer is named."""
        module = nn.ModuleDict({name: nn.BatchNorm1d(3, track_running_stats=name == "c") for name in "abc"})
        reason = refusals.of_module(module, self.training_step, automatic_optimization=True)
        assert_says(reason, "a, b: BatchNorm with `track_running_stats=False`", "GroupNorm or LayerNorm")


class TestOfOptimizers:
    """One optimizer, whose steps can be followed."""

    PARAMETERS = [nn.Parameter(torch.zeros(2))]  # noqa: RUF012

    @pytest.mark.parametrize("name", conformance.optimizers_of_torch())
    def test_every_first_order_optimizer_is_served(self, name):
        """All of torch but LBFGS."""
        parameters = conformance.parameters_for(name, torch.float32).values()
        assert refusals.of_optimizers([getattr(torch.optim, name)(parameters)]) is None

    def test_none_or_several(self):
        """The error says how many came, and where they come from."""
        assert_says(refusals.of_optimizers([]), "0 optimizers, but exactly one", "`configure_optimizers`")
        both = [SGD(self.PARAMETERS), SGD(self.PARAMETERS)]
        assert_says(refusals.of_optimizers(both), "2 optimizers, but exactly one")

    def test_lbfgs(self):
        """Its search directions mix frozen and live elements; subclasses are refused too."""
        for cls in (LBFGS, type("Mine", (LBFGS,), {})):
            assert_says(refusals.of_optimizers([cls(self.PARAMETERS)]), "LBFGS", "not exact", "first-order optimizer")

    def test_what_is_no_optimizer(self):
        """A wrapper has no hook that runs right after a step."""

        class Wrapper:
            pass

        assert_says(refusals.of_optimizers([Wrapper()]), "Wrapper is no torch.optim.Optimizer")


class TestOfTwoSetsOfWeights:
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
    def test_they_are_refused_by_name(self, arguments, said):
        assert_says(refusals.of_optimizers([self.optimizer(**arguments)]), arguments.get("name", "Mine"), said)

    @pytest.mark.parametrize("arguments", [{}, {"methods": ("train",)}, {"methods": ("step_all",)}, {"weight_sum": 0}])
    def test_half_a_sign_is_none(self, arguments):
        assert refusals.of_optimizers([self.optimizer(**arguments)]) is None

    def test_one_that_does_not_call_torchs_init(self):
        """Its steps run no hooks."""

        class Bare(SGD):
            def __init__(self, inner):
                self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, {}, {}

        assert_says(refusals.of_optimizers([Bare(self.optimizer())]), "Bare does not run hooks after its steps")


class TestOfMesh:
    """Dimensions along which processes see other layers or parts of samples, by name and size."""

    @pytest.fixture(autouse=True)
    def _meshes(self, monkeypatch):
        monkeypatch.setattr(
            refusals,
            "DeviceMesh",
            type("FakeMesh", (), {"__init__": lambda self, names, shape: self.__dict__.update(
                mesh_dim_names=names, shape=shape
            )}),
        )  # fmt: skip

    def refused(self, **sizes):
        mesh = refusals.DeviceMesh(tuple(sizes), tuple(sizes.values()))
        return refusals.of_mesh(types.SimpleNamespace(_device_mesh=mesh), [])

    @pytest.mark.parametrize("name", ["pp", "pipeline_parallel", "cp", "context", "ep", "expert_parallel"])
    def test_others_than_data_and_tensor_parallelism_are_refused(self, name):
        assert_says(self.refused(data_parallel=2, **{name: 2}), "SimpleNamespace", f"{name} (2)", "have size 1")
        assert self.refused(data_parallel=2, **{name: 1}) is None

    def test_lightnings_own_and_common_names_are_served(self):
        assert self.refused(data_parallel=4, tensor_parallel=2) is None
        assert self.refused(dp_replicate=2, dp_shard=2, tp=2) is None
        assert self.refused(copy=2, shard=2) is None  # of a mesh of one's own


class TestOfResuming:
    """A checkpoint must be of the same run."""

    ARGUMENTS = {"t0": 5, "k": 0.5, "include": ["*.weight"]}  # noqa: RUF012
    PARAMETERS = {"a": torch.zeros(2, 3), "b": torch.zeros(())}  # noqa: RUF012

    @property
    def shapes(self):
        return {name: p.shape for name, p in self.PARAMETERS.items()}

    def test_the_same_run_goes_on(self):
        """Equal arguments and shapes, in any order."""
        reversed_shapes = dict(reversed(self.shapes.items()))
        assert refusals.of_resuming(dict(self.ARGUMENTS), self.ARGUMENTS, self.shapes, self.PARAMETERS) is None
        assert refusals.of_resuming(self.ARGUMENTS, self.ARGUMENTS, reversed_shapes, self.PARAMETERS) is None

    def test_the_first_sample_may_have_been_the_default(self):
        """As it was in 0.1: the state says whether there is a covariance. Not the other way round."""
        auto, first, everything = ({**self.ARGUMENTS, "samples": samples} for samples in ("auto", "first", "all"))
        assert refusals.of_resuming(first, auto, self.shapes, self.PARAMETERS) is None
        assert "samples='auto'" in refusals.of_resuming(auto, first, self.shapes, self.PARAMETERS)
        assert "samples='all'" in refusals.of_resuming(everything, auto, self.shapes, self.PARAMETERS)

    def test_other_arguments(self):
        """Each that differs is named with its saved value and its present one; those that agree are not."""
        now = self.ARGUMENTS | {"t0": 7, "include": None, "order": "snr"}
        reason = refusals.of_resuming(self.ARGUMENTS, now, self.shapes, self.PARAMETERS)
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
    def test_other_parameters(self, parameters, names):
        """Each that was added, is gone, or has another shape is named once."""
        reason = refusals.of_resuming(self.ARGUMENTS, self.ARGUMENTS, self.shapes, parameters)
        assert_says(reason, names, "Resume with the module and optimizer")
