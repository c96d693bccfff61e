"""The optimizer steps live elements alone: as if it had never had others, on bare tensors."""

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


@pytest.fixture(autouse=True, params=[0, 2**14], ids=["alone", "together"])
def small(request, monkeypatch):
    """Up to which size parameters travel together; those here all do, or none."""
    monkeypatch.setattr(compact, "SMALL", request.param)
    return request.param


def make(name, parameters, **choice):
    return getattr(torch.optim, name)(parameters, **(conformance.OPTIMIZERS[name] | choice))


def noise(parameters, seed):
    """The same gradients whatever the parameters have become."""
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
    """Parameters, warm optimizer, masks, holder."""
    torch.manual_seed(3)
    parameters = conformance.parameters_for(name, dtype)
    optimizer = make(name, parameters.values(), **choice)
    for seed in range(10):
        step(parameters, optimizer, seed)
    frozen = half_of(parameters)
    return parameters, optimizer, frozen, Compact(optimizer, parameters, frozen, early=early)


def test_every_optimizer_of_torch_is_one_or_the_other():
    """A new class in `torch.optim` has to be looked at."""
    assert {*NAMES, *OTHERS} == set(conformance.optimizers_of_torch())


@DTYPES
@pytest.mark.parametrize(("name", "choice"), VARIANTS)
def test_live_elements_are_stepped_as_if_there_were_no_others(name, choice, dtype):
    """The oracle has had the live elements alone from its first step on. Frozen bits stay, also on the way to it."""
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
    holder = Compact(optimizer, parameters, frozen, early=False)
    before = {n: bits(p) for n, p in parameters.items()}
    for seed in range(10, 30):
        step(parameters, optimizer, seed, holder.take_gradients_, holder.restore_)

    moved = 0
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]  # kernels round differently
    for n, p in parameters.items():
        changed = bits(p) != before[n]
        assert not changed[frozen[n].flatten()].any(), n
        moved += int(changed.sum())
        if n in alone:
            torch.testing.assert_close(p.detach()[~frozen[n]], alone[n].detach(), rtol=tolerance, atol=tolerance)
    assert moved > 0.5 * sum(int((~mask).sum()) for mask in frozen.values())


def test_the_optimizer_has_one_vector_a_group_and_live_state_alone():
    """Its own state, the vectors and the gradients are as large as the live elements; frozen ones are nowhere."""
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


def test_what_is_wholly_live_stays_and_what_is_wholly_frozen_leaves():
    """Neither is copied."""
    weights = {n: Parameter(torch.randn(3)) for n in "abc"}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9)
    frozen = {"a": torch.zeros(3, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool)}
    Compact(optimizer, weights, frozen)
    assert optimizer.param_groups[0]["params"] == [weights["a"], weights["c"]]


def test_gradients_are_taken_as_they_come_and_let_go_of(small):
    """Of two backward passes the sum, live elements alone; parameters, also wholly frozen ones, keep none."""
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
        holder.take_gradients_()
        assert p.grad is None
        (vector,) = optimizer.param_groups[0]["params"]
        assert vector.grad.tolist() == [11.0, 33.0]
        optimizer.step()
        holder.restore_()
    assert p.tolist() == [1.0, 1.0 - 22.0, 1.0, 1.0 - 66.0]


def test_gradients_may_also_be_zeroed_in_place():
    """`zero_grad(set_to_none=False)`, as some loops have it."""
    p = Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    holder = Compact(optimizer, {"p": p}, {"p": torch.tensor([True, False, False])})
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        p.sum().backward()
        holder.take_gradients_()
        optimizer.step()
        holder.restore_()
    assert p.tolist() == [1.0, -2.0, -2.0]


def test_what_others_write_is_taken_over():
    """Clipped weights, a rollback, an average: the optimizer goes on from what is there."""
    p = Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    holder = Compact(optimizer, {"p": p}, {"p": torch.tensor([True, False, False])})
    for _ in range(2):
        p.data[1] = 7.0
        optimizer.zero_grad()
        p.sum().backward()
        holder.take_gradients_()
        holder.read_()
        optimizer.step()
        holder.restore_()
    assert p.tolist() == [1.0, 6.0, -1.0]


def test_a_gradient_that_is_put_in_the_vectors_place_counts():
    """As some clipping does; also where gradients are zeroed in place and the next one is added."""
    p = Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    holder = Compact(optimizer, {"p": p}, {"p": torch.tensor([True, False, False])})
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        p.sum().backward()
        holder.take_gradients_()
        (vector,) = optimizer.param_groups[0]["params"]
        vector.grad = 0.5 * vector.grad
        optimizer.step()
        holder.restore_()
    assert p.tolist() == [0.0, -1.5, -1.5]


@pytest.mark.parametrize("early", [True, False])
def test_parting_company_loses_no_gradient(early):
    """In the second pass of a step one small parameter has none; what the first pass gave all of them is kept."""
    parameters = {n: Parameter(torch.zeros(3)) for n in "abc"}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    holder = Compact(
        optimizer, parameters, {n: torch.tensor([True, False, False]) for n in "abc"}, early=early, alone=["c"]
    )
    sum(p.sum() for p in parameters.values()).backward()
    holder.take_gradients_()
    (parameters["b"].sum() + parameters["c"].sum()).backward()
    holder.take_gradients_()
    optimizer.step()
    holder.restore_()
    assert [p.tolist()[1:] for p in parameters.values()] == [[-1.0, -1.0], [-2.0, -2.0], [-2.0, -2.0]]


def test_sparse_state_becomes_dense():
    """SGD with momentum on an embedding with sparse gradients: against the same without freezing, live elements."""
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
                holder.take_gradients_()
            optimizer.step()
            if holder:
                holder.restore_()
            if number == 1 and frozen is not None:
                holder = Compact(optimizer, {"w": layer.weight}, {"w": frozen})
        layers.append(layer.weight.detach())
    torch.testing.assert_close(layers[0][:, 1], layers[1][:, 1])
    assert (layers[0][:, 0] != layers[1][:, 0]).any()


def test_sparse_gradients_are_taken_too():
    """Rows that did not occur have no gradient."""
    layer = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    before = layer.weight.detach().clone()
    frozen = torch.tensor([[True, False], [False, False], [True, True], [False, False]])
    holder = Compact(optimizer, {"w": layer.weight}, {"w": frozen})
    layer(torch.tensor([0, 1, 1, 2])).sum().backward()
    holder.take_gradients_()
    optimizer.step()
    holder.restore_()
    assert torch.allclose(before - layer.weight, torch.tensor([[0.0, 1.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))


def test_gradients_from_before_are_let_go_of():
    """What the parameters had when they were compacted belongs to a step that has been taken."""
    p = Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.full((3,), 100.0)
    holder = Compact(optimizer, {"p": p}, {"p": torch.tensor([True, False, False])})
    p.sum().backward()
    holder.take_gradients_()
    optimizer.step()
    holder.restore_()
    assert p.tolist() == [1.0, 0.0, 0.0]


def test_parameters_that_have_taken_fewer_steps_keep_their_count():
    """Adam corrects its bias by the steps that had a gradient: two counts in one group are two vectors."""
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
            holder = Compact(optimizer, parameters, frozen, early=False)
            for n, p in parameters.items():
                p.grad = kept[n]
        if holder:
            holder.take_gradients_()
        optimizer.step()
        oracle.step()
        if holder:
            holder.restore_()
    for n in "ab":
        torch.testing.assert_close(parameters[n].detach()[~frozen[n]], alone[n].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("early", [True, False])
def test_a_parameter_without_a_gradient_is_left_alone_in_that_step(name, early):
    """As the optimizer does with whole parameters: no momentum, no decay, no count of it."""
    torch.manual_seed(3)
    both = [conformance.parameters_for(name, torch.float64) for _ in range(2)]
    for ours, theirs in zip(both[0].values(), both[1].values(), strict=True):
        theirs.data.copy_(ours.data)
    frozen = half_of(both[0])
    alone = {n: Parameter(p.detach()[~frozen[n]]) for n, p in both[1].items() if not frozen[n].all()}
    parameters, optimizer, oracle = both[0], make(name, both[0].values()), make(name, alone.values())
    holder = Compact(optimizer, parameters, frozen, early=early)
    absent = {2: {"matrix"}, 3: {"matrix", "conv"}, 5: {"vector"}}
    for seed in range(8):
        optimizer.zero_grad()
        oracle.zero_grad()
        for n, gradient in noise(parameters, seed).items():
            if n not in absent.get(seed, ()):
                (parameters[n] * gradient).sum().backward()
                if n in alone:
                    alone[n].grad = gradient[~frozen[n]]
        holder.take_gradients_()
        before = parameters["matrix"].detach().clone()
        optimizer.step()
        holder.restore_()
        oracle.step()
        assert torch.equal(parameters["matrix"], before) == (seed in (2, 3))
    for n, p in alone.items():
        torch.testing.assert_close(parameters[n].detach()[~frozen[n]], p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_saved_states_have_the_ordinary_shape(name):
    """Keys and shapes are those of an optimizer that was never compacted; live numbers are there, frozen ones zero."""
    parameters, optimizer, frozen, holder = compacted(name)
    step(parameters, optimizer, 10, holder.take_gradients_, holder.restore_)
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
def test_a_saved_state_goes_on_compacted_and_in_full(name):
    """Loaded into a new optimizer that is compacted then, and into one that is already: the same bits follow."""
    parameters, optimizer, frozen, holder = compacted(name)
    step(parameters, optimizer, 10, holder.take_gradients_, holder.restore_)
    saved = copy.deepcopy(optimizer.state_dict())
    later = {n: p.detach().clone() for n, p in parameters.items()}
    resumed = {n: Parameter(p.detach().clone()) for n, p in parameters.items()}
    for seed in (11, 12):
        step(parameters, optimizer, seed, holder.take_gradients_, holder.restore_)

    other = make(name, resumed.values())
    other.load_state_dict(saved)
    again = Compact(other, resumed, frozen, early=False)
    for seed in (11, 12):
        step(resumed, other, seed, again.take_gradients_, again.restore_)
    for n, p in later.items():  # the first one goes back to where it was saved
        parameters[n].data.copy_(p)
    expected = {n: bits(p) for n, p in resumed.items()}
    optimizer.load_state_dict(saved)
    for seed in (11, 12):
        step(parameters, optimizer, seed, holder.take_gradients_, holder.restore_)
    for n in expected:
        assert torch.equal(bits(parameters[n]), expected[n]), n
        assert frozen[n].all() or not torch.equal(bits(later[n]), expected[n])


@pytest.mark.parametrize("name", NAMES)
def test_released_the_optimizer_is_an_ordinary_one(name):
    """Its parameters and state are full again, and it goes on to move everything."""
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


def test_names_of_parameters_stay_with_them():
    """Optimizers may be given named parameters; the saved names are the given ones."""
    if "param_names" not in inspect.getsource(Optimizer):
        pytest.skip("this version of torch knows no names")
    parameters = {n: p for n, p in conformance.parameters_for("SGD", torch.float32).items() if p.dim()}
    optimizer = torch.optim.SGD(parameters.items(), lr=0.1)
    holder = Compact(optimizer, parameters, half_of(parameters), early=False)
    assert len(optimizer.param_groups[0]["param_names"]) == len(optimizer.param_groups[0]["params"])
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(parameters)
    holder.release()
    assert optimizer.param_groups[0]["param_names"] == list(parameters)


def test_groups_may_be_added_later():
    """As finetuning callbacks do when they unfreeze layers."""
    parameters, optimizer, _, holder = compacted("AdamW")
    more = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    more.sum().backward()
    step(parameters, optimizer, 10, holder.take_gradients_)
    assert optimizer.state_dict()["param_groups"][1]["params"] == [len(parameters)]
    holder.release()
    assert optimizer.param_groups[1]["params"] == [more]


def test_an_optimizer_of_ones_own_with_wider_state():
    """Any class whose update goes element by element, and state in another dtype than its parameters'."""

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
    holder = Compact(optimizer, parameters, frozen, early=False)
    run(holder.take_gradients_, holder.restore_)
    assert parameters["p"].tolist() == [0.875, 1.25, 0.75, 0.875]
    assert parameters["q"].tolist() == [[0.875, 0.75], [1.25, 0.875]]
    saved = optimizer.state_dict()["state"]
    assert {i: (s["momentum"].dtype, s["momentum"].shape) for i, s in saved.items()} == {
        0: (torch.float32, (4,)),
        1: (torch.float32, (2, 2)),
    }
    torch.testing.assert_close(saved[1]["momentum"], torch.tensor([[0.0, 0.0199], [-0.0199, 0.0]]))
