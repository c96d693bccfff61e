"""g_1 and g_S against gradients by hand, and that computing g_1 leaves no trace."""

import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gcfreeze import _modules
from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.gradients.replay import isolated_gradient

X = torch.randn(1, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
TOKENS = torch.tensor([[3, 1, 3, 0]])


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(15, 1)
    ).double()


def batch_norm():
    """In train mode, with running statistics that are not the initial ones."""
    module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    module[1].running_mean.normal_()
    module[1].running_var.uniform_(0.5, 2.0)
    return module.train()


class Tied(nn.Module):
    """One matrix as the embedding and the output layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 2).double()
        self.head = nn.Linear(2, 5).double()
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens))


class PartlyUsed(nn.Module):
    """Half of it takes no part in the loss."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(5, 1).double()
        self.unused = nn.Linear(3, 2).double()

    def forward(self, x):
        return self.used(x)


def embedding(sparse=False):
    return nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Flatten(), nn.Linear(12, 1)).double()


def by_hand_mlp(p, x):
    return (torch.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]).square().mean()


def by_hand_convolution(p, x):
    padded = torch.cat([torch.zeros(1, 1).double(), x, torch.zeros(1, 1).double()], dim=1)
    windows = torch.stack([padded[0, i : i + 3] for i in range(5)])  # (5, 3)
    features = (windows @ p["1.weight"][:, 0].T + p["1.bias"]).T.reshape(1, 15)
    return (features @ p["3.weight"].T + p["3.bias"]).square().mean()


def by_hand_batch_norm(p, x):
    h = x @ p["0.weight"].T + p["0.bias"]
    h = (h - p["1.running_mean"]) / (p["1.running_var"] + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
    return (h @ p["2.weight"].T + p["2.bias"]).square().mean()


def by_hand_embedding(p, tokens):
    h = F.one_hot(tokens, 6).double() @ p["0.weight"]
    return (h.reshape(1, 12) @ p["2.weight"].T + p["2.bias"]).square().mean()


def by_hand_tied(p, tokens):
    h = F.one_hot(tokens, 5).double() @ p["table.weight"]
    return (h @ p["table.weight"].T + p["head.bias"]).square().mean()


CASES = {  # a module, its input, and the loss as a formula of the module's state
    "mlp": (mlp, X, by_hand_mlp),
    "convolution": (convolution, X, by_hand_convolution),
    "batch norm": (batch_norm, X, by_hand_batch_norm),
    "embedding": (embedding, TOKENS, by_hand_embedding),
    "sparse embedding": (lambda: embedding(sparse=True), TOKENS, by_hand_embedding),
    "tied weights": (Tied, TOKENS, by_hand_tied),
    "unused parameters": (
        PartlyUsed,
        X,
        lambda p, x: (x @ p["used.weight"].T + p["used.bias"]).square().mean(),
    ),
}


def backward_by_hand(module, formula):
    """The oracle: a formula of leaves with the module's values, differentiated by `Tensor.backward`."""
    leaves = {name: tensor.detach().clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        leaves[name].requires_grad_()
    formula(leaves).backward()
    return {name: torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad for name in names}


@pytest.mark.parametrize("case", CASES)
def test_g_1_is_the_gradient_of_the_formula(case):
    """In float64 it equals the formula's gradient; dense, detached, and zero where the loss does not reach."""
    make, x, formula = CASES[case]
    module = make()
    parameters = dict(module.named_parameters())
    g_one = isolated_gradient(module, lambda: module(x).square().mean(), parameters)
    expected = backward_by_hand(module, lambda leaves: formula(leaves, x))
    assert list(g_one) == list(expected)
    assert any(g.any() for g in expected.values())
    for name, g in g_one.items():
        assert (g.layout, g.requires_grad) == (torch.strided, False)
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)


def test_batch_norm_s_own_statistics_would_be_another_gradient():
    """The case above tells the two modes apart: with the statistics of its batch of one, here 3 rows, g differs."""
    module = batch_norm()
    rows = torch.randn(3, 5).double()
    loss = lambda: module(rows).square().mean()  # noqa: E731
    replayed = isolated_gradient(module, loss, dict(module.named_parameters()))
    loss().backward()
    assert not torch.allclose(replayed["0.weight"], module[0].weight.grad)


def test_only_the_parameters_asked_for():
    """Some of the parameters, under the names they were given; one that requires no gradient gets zeros."""
    module = mlp()
    module[2].weight.requires_grad_(False)
    asked = {"a": module[0].bias, "b": module[2].weight}
    g_one = isolated_gradient(module, lambda: module(X).square().mean(), asked)
    expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
    assert list(g_one) == ["a", "b"]
    torch.testing.assert_close(g_one["a"], expected["0.bias"], rtol=1e-12, atol=1e-14)
    assert torch.equal(g_one["b"], torch.zeros(1, 4, dtype=torch.float64))
    assert expected["2.weight"].all()


def test_gradients_may_be_switched_off_outside():
    """As they are in hooks that run under `torch.no_grad`."""
    module = mlp()
    with torch.no_grad():
        g_one = isolated_gradient(module, lambda: module(X).square().mean(), dict(module.named_parameters()))
    expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
    for name, g in g_one.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)


def test_no_loss_is_no_gradient():
    """A `training_step` that returns None skips its batch; so does the replay."""
    assert isolated_gradient(mlp(), lambda: None, {}) is None


def test_hooks_on_a_parameter_s_gradient_shape_g_1_as_they_shape_g_s():
    """A tensor hook that halves the gradient halves both; a hook for accumulated gradients runs for g_S alone."""
    module, accumulated = mlp(), []
    expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
    module[0].weight.register_hook(lambda g: g / 2)
    module[0].weight.register_post_accumulate_grad_hook(accumulated.append)
    g_one = isolated_gradient(module, lambda: module(X).square().mean(), dict(module.named_parameters()))
    assert accumulated == []
    torch.testing.assert_close(g_one["0.weight"], expected["0.weight"] / 2, rtol=1e-12, atol=1e-14)
    module(X).square().mean().backward()
    assert len(accumulated) == 1
    assert torch.equal(module[0].weight.grad, g_one["0.weight"])


def test_dropout_draws_from_the_stream_as_it_stands():
    """g_1 has the mask that the next draw would have, and the next draw has it again."""
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 1)).double()
    parameters = dict(module.named_parameters())
    torch.manual_seed(3)
    once, again = (isolated_gradient(module, lambda: module(X).sum(), parameters) for _ in range(2))
    dropped = F.dropout(X, 0.5)
    assert dropped.any()
    assert not dropped.all()
    assert torch.equal(once["1.weight"], dropped)
    assert torch.equal(again["1.weight"], dropped)


class TestOfBatch:
    """g_S is what backward left in ``p.grad``."""

    def test_is_the_gradient_itself(self):
        """No copy is made of a dense one."""
        module = mlp()
        module(X).square().mean().backward()
        parameters = dict(module.named_parameters())
        g_batch = batch_gradients(parameters)
        assert all(
            g_batch[name] is not None and g_batch[name].data_ptr() == p.grad.data_ptr()
            for name, p in parameters.items()
        )
        expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
        for name, g in g_batch.items():
            torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)

    def test_is_without_the_loss_scale(self):
        """A scaler multiplied the loss by 1024; ``p.grad`` keeps that factor, g_S does not have it."""
        module = mlp()
        (1024 * module(X).square().mean()).backward()
        before = module[0].weight.grad.clone()
        expected = backward_by_hand(module, lambda leaves: by_hand_mlp(leaves, X))
        for name, g in batch_gradients(dict(module.named_parameters()), scale=1024.0).items():
            torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)
        assert torch.equal(module[0].weight.grad, before)

    @pytest.mark.parametrize("scale", [1.0, 4.0])
    def test_is_dense_for_a_sparse_gradient(self, scale):
        """Rows that occurred twice are added up; ``p.grad`` stays sparse."""
        module = embedding(sparse=True)
        (scale * module(TOKENS).square().mean()).backward()
        g_batch = batch_gradients(dict(module.named_parameters()), scale)
        expected = backward_by_hand(module, lambda leaves: by_hand_embedding(leaves, TOKENS))
        torch.testing.assert_close(g_batch["0.weight"], expected["0.weight"], rtol=1e-12, atol=1e-14)
        assert module[0].weight.grad.is_sparse

    def test_is_zero_without_a_gradient(self):
        """A parameter that took no part in the loss has zeros of its shape and dtype; it gets no ``p.grad``."""
        parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
        g_batch = batch_gradients({"w": parameter})
        assert torch.equal(g_batch["w"], torch.zeros(2, 3, dtype=torch.float64))
        assert not g_batch["w"].requires_grad
        assert parameter.grad is None


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
    def test_the_state_is_as_before_to_the_bit(self, kind):
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
    def test_also_after_an_exception(self, kind):
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
    def test_the_module_goes_on_like_its_twin(self, kind):
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

    def test_accumulated_gradients_are_neither_read_nor_written(self):
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

    def test_nothing_is_logged(self):
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

    def test_what_modules_share_they_share_during_a_replay(self):
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

    def test_containers_in_a_circle(self):
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


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), ["part"]),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()), ["part.0"]),
        (nn.SyncBatchNorm(3, track_running_stats=False), ["part"]),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), []),
        (nn.BatchNorm1d(3), []),
        (nn.InstanceNorm1d(3), []),
        (nn.GroupNorm(1, 3), []),
    ],
    ids=["1d", "nested", "sync", "eval", "tracking", "instance", "group"],
)
def test_batch_norms_that_cannot_take_one_sample_are_found(layer, found):
    """Those in train mode without running statistics, by name; the others can do without a batch."""
    assert _modules.batch_norms_without_statistics(nn.ModuleDict({"part": layer})) == found
