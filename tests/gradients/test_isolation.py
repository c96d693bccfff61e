"""A replay restores the state of its module and the random streams, to the bit."""

import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_gcfreeze.gradients.replay import isolated_gradient

X = torch.randn(1, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()


class Traced(nn.Module):
    """A linear layer whose loss also changes something: a subclass says what, and how to look at it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 1).double()

    def loss(self):
        self.change(X)
        return self.layer(X).square().mean()


def traced(change, look, **attributes):
    """A class whose instances start with `attributes` (made anew by calling them) and whose loss calls `change`."""

    def init(self):
        Traced.__init__(self)
        for name, make in attributes.items():
            setattr(self, name, make())

    return type("Traced", (Traced,), {"__init__": init, "change": change, "look": look})


def with_layer(make, forward, look):
    """The same with a submodule that keeps state of its own."""
    return traced(lambda self, x: forward(self.part, x), lambda self: look(self.part), part=make)


def spectral_norm_by_hook():
    """It sets its computed weight as a plain attribute at each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older kind is deprecated, and in use
        return nn.utils.spectral_norm(nn.Linear(5, 3).double())


class Total(nn.Module):
    """Keeps a buffer that it replaces instead of changing it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.total = self.total + x.sum()


class History(list):
    """A list with a name, like the hyper-parameters of Lightning are a dict with one."""


Named = namedtuple("Named", "a")


def twice(x):
    return torch.cat([x, 2 * x])


def metric_state(metric):
    return {**metric.metric_state, "count": metric._update_count}


def two_metrics():
    """Of one compute group: they share their state after the first update."""
    mse = torchmetrics.MeanSquaredError
    return torchmetrics.MetricCollection({"mse": mse(), "rmse": mse(squared=False)})


def momentum_update(self, x):
    """What self-supervised methods do to the teacher in their `training_step`."""
    for teacher, student in zip(self.teacher.parameters(), self.layer.parameters(), strict=True):
        teacher.data.lerp_(student.data, 0.1)


def hidden_layer():
    """In a list, so that it is neither saved nor trained: a common way to keep a frozen teacher."""
    return [nn.BatchNorm1d(5).double()]


class Kept(NamedTuple):
    values: list


def clip(self, x):
    """What Wasserstein critics do in their `training_step`."""
    with torch.no_grad():
        self.layer.weight.clamp_(-0.01, 0.01)


def draw(self, x):
    torch.rand(1)
    random.random()
    np.random.standard_normal()


def buffers(module):
    return dict(module.named_buffers())


def legacy_random(self):
    return np.random.get_state()


TRACES = {
    "BatchNorm": with_layer(
        lambda: nn.BatchNorm1d(5).double(), lambda m, x: m(twice(x)), lambda m: (buffers(m), m.training)
    ),
    "InstanceNorm": with_layer(
        lambda: nn.InstanceNorm1d(5, track_running_stats=True).double(),
        lambda m, x: m(torch.stack([x, -x, 2 * x], dim=2)),
        buffers,
    ),
    "spectral_norm": with_layer(
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3).double()), lambda m, x: m(x), buffers
    ),
    "spectral_norm by hook": with_layer(
        spectral_norm_by_hook, lambda m, x: m(x), lambda m: {**buffers(m), "weight": m.weight}
    ),
    "mean metric": with_layer(torchmetrics.MeanMetric, lambda m, x: m(x), metric_state),
    "metric with a list": with_layer(torchmetrics.CatMetric, lambda m, x: m.update(x), metric_state),
    "metric that was computed": with_layer(
        torchmetrics.MeanMetric, lambda m, x: (m.update(x), m.compute()), lambda m: (metric_state(m), m._computed)
    ),
    "collection of metrics": with_layer(
        two_metrics, lambda m, x: m(x, x + 1), lambda m: {n: metric_state(part) for n, part in m._modules.items()}
    ),
    "buffer replaced": with_layer(Total, lambda m, x: m(x), buffers),
    "list": traced(lambda self, x: self.seen.append(x.sum()), lambda self: self.seen, seen=list),
    "dict of lists": traced(lambda self, x: self.d["a"].append(1), lambda self: self.d, d=lambda: {"a": [0]}),
    "defaultdict": traced(lambda self, x: self.d["new"].append(1), lambda self: self.d, d=lambda: defaultdict(list)),
    "OrderedDict": traced(lambda self, x: self.d.popitem(), lambda self: self.d, d=lambda: OrderedDict(a=1)),
    "Counter": traced(lambda self, x: self.d.update("ab"), lambda self: self.d, d=Counter),
    "set": traced(lambda self, x: self.s.add(1), lambda self: self.s, s=set),
    "deque": traced(lambda self, x: self.q.append(1), lambda self: self.q, q=lambda: deque([0, 0], maxlen=2)),
    "counter": traced(lambda self, x: setattr(self, "n", self.n + 1), lambda self: self.n, n=lambda: 0),
    "tensor in place": traced(lambda self, x: self.t.add_(1), lambda self: self.t, t=lambda: torch.zeros(2)),
    "tensor replaced": traced(lambda self, x: setattr(self, "t", x), lambda self: self.t, t=lambda: torch.zeros(2)),
    "tensor in a tuple": traced(lambda self, x: self.t[0].add_(1), lambda self: self.t, t=lambda: (torch.zeros(2),)),
    "named tuple": traced(lambda self, x: self.t.a.add_(1), lambda self: self.t, t=lambda: Named(torch.zeros(2))),
    "list of one's own": traced(lambda self, x: self.seen.append(1), lambda self: self.seen, seen=History),
    "NumPy array": traced(lambda self, x: self.a.__iadd__(1), lambda self: self.a, a=lambda: np.zeros(2)),
    "new attribute": traced(lambda self, x: setattr(self, "new", 1), lambda self: sorted(vars(self))),
    "deleted attribute": traced(
        lambda self, x: vars(self).pop("old", None), lambda self: sorted(vars(self)), old=lambda: 1
    ),
    "training flag": traced(lambda self, x: self.eval(), lambda self: [m.training for m in self.modules()]),
    "requires_grad flag": traced(
        lambda self, x: self.layer.bias.requires_grad_(False), lambda self: [p.requires_grad for p in self.parameters()]
    ),
    "parameters clipped": traced(clip, lambda self: dict(self.named_parameters())),
    "parameters of a teacher": traced(
        momentum_update,
        lambda self: dict(self.teacher.named_parameters()),
        teacher=lambda: nn.Linear(5, 1).double().requires_grad_(False),
    ),
    "list in a named tuple": traced(
        lambda self, x: self.kept.values.append(1.0),
        lambda self: self.kept,
        kept=lambda: Kept([]),
        kind=lambda: Kept,  # the class itself is no container
    ),
    "module in a list": traced(
        lambda self, x: self.parts[0](twice(x)), lambda self: buffers(self.parts[0]), parts=hidden_layer
    ),
    "metric in a dict of lists": traced(
        lambda self, x: self.metrics["all"][0](x),
        lambda self: metric_state(self.metrics["all"][0]),
        metrics=lambda: {"all": [torchmetrics.MeanMetric()]},
    ),
    "torch's stream": traced(draw, lambda self: torch.get_rng_state()),
    "Python's stream": traced(draw, lambda self: random.getstate()),
    "NumPy's stream": traced(draw, legacy_random),
    "own torch.Generator": traced(
        lambda self, x: torch.rand(1, generator=self.g), lambda self: self.g.get_state(), g=torch.Generator
    ),
    "own NumPy generator": traced(
        lambda self, x: self.g.random(), lambda self: self.g.bit_generator.state, g=lambda: np.random.default_rng(0)
    ),
    "own random.Random": traced(
        lambda self, x: self.g.random(), lambda self: self.g.getstate(), g=lambda: random.Random(0)
    ),
}


def bits(value):
    """Anything as something that is equal only if it is the same to the bit, and that no later change reaches."""
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape), value.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return (type(value), tuple((key, bits(item)) for key, item in value.items()))
    if isinstance(value, list | tuple | set | deque):
        return (type(value), tuple(bits(item) for item in value))
    return value


class TestNoTrace:
    """Whatever a loss changes in its module is as before afterwards; the same loss unprotected does change it."""

    @pytest.mark.parametrize("kind", TRACES)
    def test_state_is_restored_to_the_bit(self, kind):
        """Twice, so that a copy that is shared between replays would show."""
        module = TRACES[kind]()
        parameters = dict(module.layer.named_parameters())
        before = bits(module.look())
        for _ in range(2):
            g_one = isolated_gradient(module, module.loss, parameters)
            assert g_one["weight"].any()
            assert bits(module.look()) == before
        module.loss()
        assert bits(module.look()) != before

    @pytest.mark.parametrize("kind", TRACES)
    def test_state_is_restored_after_an_exception(self, kind):
        """A loss that fails at its end has changed things, too."""
        module = TRACES[kind]()
        before = bits(module.look())

        def fails():
            module.loss()
            raise ArithmeticError("in the loss")

        with pytest.raises(ArithmeticError, match="in the loss"):
            isolated_gradient(module, fails, dict(module.layer.named_parameters()))
        assert bits(module.look()) == before
        with pytest.raises(ArithmeticError, match="in the loss"):
            fails()
        assert bits(module.look()) != before

    @pytest.mark.parametrize("kind", ["BatchNorm", "spectral_norm", "spectral_norm by hook", "collection of metrics"])
    def test_replays_between_steps_do_not_change_the_steps(self, kind):
        """Replays in between steps make no difference to what the steps themselves leave in the module."""
        torch.manual_seed(1)
        replayed = TRACES[kind]()
        torch.manual_seed(1)
        twin = TRACES[kind]()
        for _ in range(3):
            isolated_gradient(replayed, replayed.loss, dict(replayed.layer.named_parameters()))
            replayed.loss()
            twin.loss()
        assert bits(replayed.look()) == bits(twin.look())
        twin.loss()
        assert bits(replayed.look()) != bits(twin.look())

    def test_accumulated_gradients_are_unchanged(self):
        """``p.grad`` stays the same tensor with the same bits, and None stays None; `backward` changes both."""
        module = mlp()
        module[0].weight.grad = kept = torch.full((4, 5), 2.0, dtype=torch.float64)
        before = bits([p.grad for p in module.parameters()])
        isolated_gradient(module, lambda: module(X).square().mean(), dict(module.named_parameters()))
        assert module[0].weight.grad is kept
        assert bits([p.grad for p in module.parameters()]) == before
        module(X).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters())
        assert bits(kept) != before[1][0]

    def test_log_does_nothing_in_a_replay(self):
        """`log` and `log_dict` do nothing during a replay, in nested modules too; before and after they log."""
        logged = []

        class Logs(Traced):
            def log(self, name, value):
                logged.append(name)

            def log_dict(self, values):
                logged.extend(values)

            def change(self, x):
                self.log("loss", 1.0)
                self.log_dict({"a": 1, "b": 2})

        class Nests(Logs):
            def __init__(self):
                super().__init__()
                self.inner = Logs()

            def change(self, x):
                super().change(x)
                self.inner.change(x)

        module = Nests()
        isolated_gradient(module, module.loss, dict(module.layer.named_parameters()))
        assert logged == []
        module.loss()
        assert logged == ["loss", "a", "b"] * 2

    def test_only_batch_norm_leaves_train_mode(self):
        """Other layers, dropout among them, see the mode that they are in; the flags are as before afterwards."""
        seen = {}

        class Watches(nn.Identity):
            def forward(self, x):
                seen.update({name: m.training for name, m in module.named_modules()})
                return x

        module = nn.Sequential(
            nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(), Watches(), nn.Dropout().eval()
        ).double()
        isolated_gradient(module, lambda: module(X).square().sum(), dict(module.named_parameters()))
        assert seen == {"": True, "0": True, "1": False, "2": True, "3": True, "4": False}
        assert [m.training for m in module.modules()] == [True, True, True, True, True, False]

    def test_objects_shared_by_modules_stay_shared_in_a_replay(self):
        """Two modules with one list, or one tensor, see each other's changes, as they do otherwise."""
        module = traced(lambda self, x: None, lambda self: self.common, common=lambda: [torch.zeros(2)])()
        module.layer.common, module.layer.part = module.common, module.common[0]
        seen = []

        def loss():
            module.common.append("new")
            module.common[0].add_(1.0)
            seen.append((len(module.layer.common), module.layer.part.tolist()))
            return module.loss()

        isolated_gradient(module, loss, dict(module.layer.named_parameters()))
        assert seen == [(2, [1.0, 1.0])]
        assert module.layer.common is module.common
        assert module.layer.part is module.common[0]
        assert bits(module.common) == bits([torch.zeros(2)])

    def test_containers_that_contain_themselves_are_copied(self):
        """A tree whose nodes know their parent comes through: copied once, circle and all."""
        module = traced(lambda self, x: None, lambda self: self.tree, tree=dict)()
        module.tree["children"] = [{"parent": module.tree}]
        seen = []

        def loss():
            module.tree["n"] = 1
            seen.append("n" in module.tree["children"][0]["parent"])
            return module.loss()

        isolated_gradient(module, loss, dict(module.layer.named_parameters()))
        assert seen == [True]
        assert module.tree.keys() == {"children"}
        assert module.tree["children"][0]["parent"] is module.tree
