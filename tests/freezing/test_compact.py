"""`Compact` on bare tensors: live elements are stepped as if the optimizer had never had other ones."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze.freezing import ELEMENTWISE, Compact, compact
from tests import conformance
from tests.conformance import DTYPES, half_of, variants
from tests.witnesses import flat_bits as bits

NAMES = [name for name, cls in conformance.optimizers_of_torch().items() if cls in ELEMENTWISE]
VARIANTS = [case for case in variants() if case.values[0] in NAMES]
OTHERS = {"SparseAdam", "Adafactor", "Muon"}


@pytest.fixture(autouse=True, params=[0, 2**14], ids=["unbundled", "bundled"])
def small(request, monkeypatch):
    """Set the size up to which parameters are bundled; all parameters here are, or none."""
    monkeypatch.setattr(compact, "MAX_BUNDLED_NUMEL", request.param)
    return request.param


def make(name, parameters, **choice):
    return getattr(torch.optim, name)(parameters, **(conformance.OPTIMIZERS[name] | choice))


def noise(parameters, seed):
    """Return gradients that depend only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for n, p in parameters.items()
    }


def step(parameters, optimizer, seed, before=lambda: None, after=lambda: None):
    optimizer.zero_grad()
    for name, gradient in noise(parameters, seed).items():
        parameters[name].grad = torch.empty_like(parameters[name]).copy_(gradient)
    before()
    optimizer.step()
    after()


def compacted(name="Adam", dtype=torch.float64, early=False, **choice):
    """Return parameters, an optimizer with ten steps of state, masks, and the holder."""
    torch.manual_seed(3)
    parameters = conformance.parameters_for(name, dtype)
    optimizer = make(name, parameters.values(), **choice)
    for seed in range(10):
        step(parameters, optimizer, seed)
    frozen = half_of(parameters)
    return parameters, optimizer, frozen, Compact(optimizer, parameters, frozen, free_grads_in_backward=early)


def test_every_optimizer_of_torch_is_classified_as_elementwise_or_not():
    """A new class in `torch.optim` fails here until somebody has classified it."""
    assert {*NAMES, *OTHERS} == set(conformance.optimizers_of_torch())


@DTYPES
@pytest.mark.parametrize(("name", "choice"), VARIANTS)
def test_live_elements_are_stepped_as_if_there_were_no_others(name, choice, dtype):
    """The oracle has had only the live elements from its first step on. Frozen bits stay, live elements move."""
    torch.manual_seed(3)
    parameters = conformance.parameters_for(name, dtype)
    frozen = half_of(parameters)
    alone = {n: Parameter(p.detach()[~frozen[n]]) for n, p in parameters.items() if not frozen[n].all()}
    oracle = make(name, alone.values(), **choice)
    for seed in range(30):
        for n, gradient in noise(parameters, seed).items():
            if n in alone:
                alone[n].grad = gradient[~frozen[n]]
        oracle.step()

    optimizer = make(name, parameters.values(), **choice)
    for seed in range(10):
        step(parameters, optimizer, seed)
    holder = Compact(optimizer, parameters, frozen, free_grads_in_backward=False)
    before = {n: bits(p) for n, p in parameters.items()}
    for seed in range(10, 30):
        step(parameters, optimizer, seed, holder.gather_gradients_, holder.scatter_values_)

    moved = 0
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]  # kernels round differently
    for n, p in parameters.items():
        changed = bits(p) != before[n]
        assert not changed[frozen[n].flatten()].any(), n
        moved += int(changed.sum())
        if n in alone:
            torch.testing.assert_close(p.detach()[~frozen[n]], alone[n].detach(), rtol=tolerance, atol=tolerance)
    assert moved > 0.5 * sum(int((~mask).sum()) for mask in frozen.values())


def test_optimizer_has_one_vector_per_group_and_state_of_live_elements_only():
    """The vectors and the moments have as many elements as are live; each group keeps its learning rate."""
    parameters = conformance.parameters_for("Adam", torch.float32)
    groups = [{"params": [parameters["vector"], parameters["matrix"]], "lr": 0.1}, {"params": [parameters["conv"]]}]
    optimizer = torch.optim.Adam(groups)
    step(parameters, optimizer, 0)
    frozen = half_of({n: parameters[n] for n in ("vector", "matrix", "conv")})
    Compact(optimizer, parameters, frozen)
    live = {n: int((~mask).sum()) for n, mask in frozen.items()}
    assert [[p.numel() for p in group["params"]] for group in optimizer.param_groups] == [
        [live["vector"] + live["matrix"]],
        [live["conv"]],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.001]
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert sum(v.numel() for v in moments) == 2 * sum(live.values())


def test_fully_live_parameters_stay_and_fully_frozen_ones_leave_the_optimizer():
    """The fully live parameter is not copied."""
    weights = {n: Parameter(torch.randn(3)) for n in "abc"}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9)
    frozen = {"a": torch.zeros(3, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool)}
    Compact(optimizer, weights, frozen)
    assert optimizer.param_groups[0]["params"] == [weights["a"], weights["c"]]


def test_gradients_are_gathered_during_backward_and_freed(small):
    """Two backward passes add up; partly and fully frozen parameters keep no gradient."""
    p, q = Parameter(torch.ones(4)), Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p, q], lr=1.0)
    frozen = torch.tensor([True, False, True, False])
    holder = Compact(optimizer, {"p": p, "q": q}, {"p": frozen, "q": torch.ones(2, dtype=torch.bool)})
    for _ in range(2):  # two steps
        optimizer.zero_grad()
        for factor in (1.0, 10.0):  # of two passes
            (factor * (p * torch.arange(4.0)).sum() + q.sum()).backward()
            assert (p.grad is None) == (small == 0)
            assert q.grad is None
        holder.gather_gradients_()
        assert p.grad is None
        (vector,) = optimizer.param_groups[0]["params"]
        assert vector.grad.tolist() == [11.0, 33.0]
        optimizer.step()
        holder.scatter_values_()
    assert p.tolist() == [1.0, 1.0 - 22.0, 1.0, 1.0 - 66.0]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_that_are_zeroed_in_place_or_replaced_are_stepped(factor):
    """Some loops call `zero_grad(set_to_none=False)`; some clipping replaces the vector's gradient."""
    p = Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    holder = Compact(optimizer, {"p": p}, {"p": torch.tensor([True, False, False])})
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        p.sum().backward()
        holder.gather_gradients_()
        (vector,) = optimizer.param_groups[0]["params"]
        if factor < 1:
            vector.grad = factor * vector.grad
        optimizer.step()
        holder.scatter_values_()
    assert p.tolist() == [0.0, -3 * factor, -3 * factor]


def test_values_written_by_other_code_are_stepped_from():
    """Clipped weights, a rollback, an average: the next step starts from the value in the parameter."""
    p = Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    holder = Compact(optimizer, {"p": p}, {"p": torch.tensor([True, False, False])})
    for _ in range(2):
        p.data[1] = 7.0
        optimizer.zero_grad()
        p.sum().backward()
        holder.gather_gradients_()
        holder.gather_values_()
        optimizer.step()
        holder.scatter_values_()
    assert p.tolist() == [1.0, 6.0, -1.0]


@pytest.mark.parametrize("early", [True, False])
def test_unbundling_between_backward_passes_loses_no_gradient(early):
    """In the second pass of a step one small parameter has no gradient; the gradients of the first pass are kept."""
    parameters = {n: Parameter(torch.zeros(3)) for n in "abc"}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    holder = Compact(
        optimizer,
        parameters,
        {n: torch.tensor([True, False, False]) for n in "abc"},
        free_grads_in_backward=early,
        unbundled=["c"],
    )
    sum(p.sum() for p in parameters.values()).backward()
    holder.gather_gradients_()
    (parameters["b"].sum() + parameters["c"].sum()).backward()
    holder.gather_gradients_()
    optimizer.step()
    holder.scatter_values_()
    assert [p.tolist()[1:] for p in parameters.values()] == [[-1.0, -1.0], [-2.0, -2.0], [-2.0, -2.0]]


def test_sparse_state_becomes_dense():
    """SGD with momentum on an embedding with sparse gradients, against the same without freezing, live elements."""
    layers = []
    for frozen in (None, torch.tensor([[True, False]] * 3)):
        torch.manual_seed(0)
        layer = nn.Embedding(3, 2, sparse=True)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        holder = None
        for number in range(5):
            optimizer.zero_grad()
            layer.weight.grad = None
            layer(torch.tensor([number % 3, 1])).square().sum(1).mean().backward()
            if holder:
                holder.gather_gradients_()
            optimizer.step()
            if holder:
                holder.scatter_values_()
            if number == 1 and frozen is not None:
                holder = Compact(optimizer, {"w": layer.weight}, {"w": frozen})
        layers.append(layer.weight.detach())
    torch.testing.assert_close(layers[0][:, 1], layers[1][:, 1])
    assert (layers[0][:, 0] != layers[1][:, 0]).any()


def test_sparse_gradients_are_gathered():
    """Rows that did not occur have a gradient of zero."""
    layer = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    frozen = torch.tensor([[True, False], [False, False], [True, True], [False, False]])
    holder = Compact(optimizer, {"w": layer.weight}, {"w": frozen})
    layer(torch.tensor([0, 1, 1, 2])).sum().backward()
    holder.gather_gradients_()
    optimizer.step()
    holder.scatter_values_()
    assert torch.allclose(before - layer.weight, torch.tensor([[0.0, 1.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))


def test_gradients_from_before_the_freeze_are_dropped():
    """They belong to a step that has been taken."""
    p = Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.full((3,), 100.0)
    holder = Compact(optimizer, {"p": p}, {"p": torch.tensor([True, False, False])})
    p.sum().backward()
    holder.gather_gradients_()
    optimizer.step()
    holder.scatter_values_()
    assert p.tolist() == [1.0, 0.0, 0.0]


def test_parameters_with_fewer_steps_keep_their_count():
    """Adam corrects its bias by the number of steps with a gradient: two counts in one group become two vectors."""
    generator = torch.Generator().manual_seed(0)
    parameters = {n: Parameter(torch.ones(4, dtype=torch.float64)) for n in "ab"}
    alone = {n: Parameter(torch.ones(3, dtype=torch.float64)) for n in "ab"}
    frozen = {n: torch.tensor([False, True, False, False]) for n in "ab"}
    optimizer, oracle = torch.optim.Adam(parameters.values(), 0.1), torch.optim.Adam(alone.values(), 0.1)
    holder = None
    for step_number in range(6):
        optimizer.zero_grad()
        oracle.zero_grad()
        for n in "ab" if step_number > 1 else "a":
            gradient = torch.randn(4, generator=generator, dtype=torch.float64)
            parameters[n].grad, alone[n].grad = gradient.clone(), gradient[~frozen[n]]
        if step_number == 4:
            kept = {n: p.grad for n, p in parameters.items()}
            holder = Compact(optimizer, parameters, frozen, free_grads_in_backward=False)
            for n, p in parameters.items():
                p.grad = kept[n]
        if holder:
            holder.gather_gradients_()
        optimizer.step()
        oracle.step()
        if holder:
            holder.scatter_values_()
    for n in "ab":
        torch.testing.assert_close(parameters[n].detach()[~frozen[n]], alone[n].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("early", [True, False])
def test_parameter_without_a_gradient_is_not_stepped(name, early):
    """As with whole parameters, such a step changes no momentum, no decay and no count of steps."""
    torch.manual_seed(3)
    both = [conformance.parameters_for(name, torch.float64) for _ in range(2)]
    for ours, theirs in zip(both[0].values(), both[1].values(), strict=True):
        theirs.data.copy_(ours.data)
    frozen = half_of(both[0])
    alone = {n: Parameter(p.detach()[~frozen[n]]) for n, p in both[1].items() if not frozen[n].all()}
    parameters, optimizer, oracle = both[0], make(name, both[0].values()), make(name, alone.values())
    holder = Compact(optimizer, parameters, frozen, free_grads_in_backward=early)
    absent = {2: {"matrix"}, 3: {"matrix", "conv"}, 5: {"vector"}}
    for seed in range(8):
        optimizer.zero_grad()
        oracle.zero_grad()
        for n, gradient in noise(parameters, seed).items():
            if n not in absent.get(seed, ()):
                (parameters[n] * gradient).sum().backward()
                if n in alone:
                    alone[n].grad = gradient[~frozen[n]]
        holder.gather_gradients_()
        before = parameters["matrix"].detach().clone()
        optimizer.step()
        holder.scatter_values_()
        oracle.step()
        assert torch.equal(parameters["matrix"], before) == (seed in (2, 3))
    for n, p in alone.items():
        torch.testing.assert_close(parameters[n].detach()[~frozen[n]], p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_ordinary_shapes(name):
    """Keys and shapes are those of an optimizer that was never compacted; frozen elements are zero."""
    parameters, optimizer, frozen, holder = compacted(name)
    step(parameters, optimizer, 10, holder.gather_gradients_, holder.scatter_values_)
    twins = conformance.parameters_for(name, torch.float64)
    plain = make(name, twins.values())
    step(twins, plain, 0)
    saved, expected = optimizer.state_dict(), plain.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"].keys() == expected["state"].keys()
    for i, mask in enumerate(frozen.values()):
        assert {k: getattr(v, "shape", None) for k, v in saved["state"][i].items()} == {
            k: getattr(v, "shape", None) for k, v in expected["state"][i].items()
        }
        for value in saved["state"][i].values():
            if isinstance(value, torch.Tensor) and value.dim():
                assert not value[mask].any()
    plain.load_state_dict(saved)  # and an ordinary optimizer takes it


@pytest.mark.parametrize("name", NAMES)
def test_loaded_state_continues_to_the_bit_before_or_after_compacting(name):
    """Loaded into a new optimizer that is compacted afterwards, and into one that is compacted already."""
    parameters, optimizer, frozen, holder = compacted(name)
    step(parameters, optimizer, 10, holder.gather_gradients_, holder.scatter_values_)
    saved = copy.deepcopy(optimizer.state_dict())
    later = {n: p.detach().clone() for n, p in parameters.items()}
    resumed = {n: Parameter(p.detach().clone()) for n, p in parameters.items()}
    for seed in (11, 12):
        step(parameters, optimizer, seed, holder.gather_gradients_, holder.scatter_values_)

    other = make(name, resumed.values())
    other.load_state_dict(saved)
    again = Compact(other, resumed, frozen, free_grads_in_backward=False)
    for seed in (11, 12):
        step(resumed, other, seed, again.gather_gradients_, again.scatter_values_)
    for n, p in later.items():  # the first one goes back to where it was saved
        parameters[n].data.copy_(p)
    expected = {n: bits(p) for n, p in resumed.items()}
    optimizer.load_state_dict(saved)
    for seed in (11, 12):
        step(parameters, optimizer, seed, holder.gather_gradients_, holder.scatter_values_)
    for n in expected:
        assert torch.equal(bits(parameters[n]), expected[n]), n
        assert frozen[n].all() or not torch.equal(bits(later[n]), expected[n])


@pytest.mark.parametrize("name", NAMES)
def test_released_optimizer_is_an_ordinary_one(name):
    """Its parameters and state are full again, and frozen elements move."""
    parameters, optimizer, frozen, holder = compacted(name)
    saved = copy.deepcopy(optimizer.state_dict())
    holder.release()
    assert optimizer.param_groups[0]["params"] == list(parameters.values())
    now = optimizer.state_dict()
    assert now["param_groups"] == saved["param_groups"]
    for i, state in saved["state"].items():
        for key, value in state.items():
            assert value is None or torch.equal(torch.as_tensor(now["state"][i][key]), torch.as_tensor(value))
    before = {n: bits(p) for n, p in parameters.items()}
    for p in parameters.values():
        p.sum().backward()
    optimizer.step()
    assert sum(int((bits(p) != before[n])[frozen[n].flatten()].sum()) for n, p in parameters.items()) > 0


def test_state_dict_has_the_names_that_the_optimizer_was_given():
    """Some versions of torch accept named parameters; the optimizer's own groups have a name for each vector."""
    if "param_names" not in inspect.getsource(Optimizer):
        pytest.skip("this version of torch knows no names")
    parameters = {n: p for n, p in conformance.parameters_for("SGD", torch.float32).items() if p.dim()}
    optimizer = torch.optim.SGD(parameters.items(), lr=0.1)
    holder = Compact(optimizer, parameters, half_of(parameters), free_grads_in_backward=False)
    assert len(optimizer.param_groups[0]["param_names"]) == len(optimizer.param_groups[0]["params"])
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(parameters)
    holder.release()
    assert optimizer.param_groups[0]["param_names"] == list(parameters)


def test_groups_added_later_are_saved_and_kept_on_release():
    """Finetuning callbacks add groups when they unfreeze layers."""
    parameters, optimizer, _, holder = compacted("AdamW")
    more = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    more.sum().backward()
    step(parameters, optimizer, 10, holder.gather_gradients_)
    assert optimizer.state_dict()["param_groups"][1]["params"] == [len(parameters)]
    holder.release()
    assert optimizer.param_groups[1]["params"] == [more]


def test_custom_optimizer_with_wider_state_is_compacted():
    """Its state has another dtype than its parameters."""

    class Lion(Optimizer):
        def __init__(self, params, lr=0.125):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p, dtype=torch.float32))
                    p.sub_((0.9 * momentum + 0.1 * p.grad).sign(), alpha=group["lr"])
                    momentum.lerp_(p.grad.float(), 0.01)

    parameters = {"p": Parameter(torch.ones(4).bfloat16()), "q": Parameter(torch.ones(2, 2).bfloat16())}
    slopes = {"p": torch.tensor([1.0, -1.0, 1.0, 1.0]), "q": torch.tensor([[1.0, 1.0], [-1.0, 1.0]])}
    frozen = {"p": torch.tensor([True, False, False, True]), "q": torch.tensor([[True, False], [False, True]])}
    optimizer = Lion(parameters.values())

    def run(before=lambda: None, after=lambda: None):
        optimizer.zero_grad()
        for name, p in parameters.items():
            p.grad = slopes[name].bfloat16()
        before()
        optimizer.step()
        after()

    run()
    holder = Compact(optimizer, parameters, frozen, free_grads_in_backward=False)
    run(holder.gather_gradients_, holder.scatter_values_)
    assert parameters["p"].tolist() == [0.875, 1.25, 0.75, 0.875]
    assert parameters["q"].tolist() == [[0.875, 0.75], [1.25, 0.875]]
    saved = optimizer.state_dict()["state"]
    assert {i: (s["momentum"].dtype, s["momentum"].shape) for i, s in saved.items()} == {
        0: (torch.float32, (4,)),
        1: (torch.float32, (2, 2)),
    }
    torch.testing.assert_close(saved[1]["momentum"], torch.tensor([[0.0, 0.0199], [-0.0199, 0.0]]))
