"""What freezing does with DTensors on a process, as one of two: each has half of the rows."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from lightning_gcfreeze.distributed import Shards, World, local
from lightning_gcfreeze.freezing import Compact, Holder, HoldPlan, ThawStates, compact
from tests.ranks import as_rank, own_mesh

WHOLE = {
    "a": torch.tensor([[True, True], [True, True], [True, False], [False, False]]),  # rank 0: nothing is live
    "b": torch.tensor([[False, False], [False, False], [True, True], [True, True]]),  # rank 1: nothing is live
    "c": torch.ones(4, 2, dtype=torch.bool),
    "d": torch.zeros(4, 2, dtype=torch.bool),
}
N_FROZEN = {name: int(mask.sum()) for name, mask in WHOLE.items()}
LIVE = {0: 4, 1: 3}
"""Live elements of partly frozen parameters, by rank."""


@pytest.fixture(params=[0, 1])
def rank(request):
    """Be one of two processes."""
    with as_rank(request.param, 2):
        yield request.param


@pytest.fixture(autouse=True, params=[0, 2**14], ids=["unbundled", "bundled"])
def small(request, monkeypatch):
    """Set the size up to which parameters are bundled."""
    monkeypatch.setattr(compact, "MAX_BUNDLED_NUMEL", request.param)
    return request.param


def sharded(seed=0):
    """Return parameters, their layout, and the local masks."""
    torch.manual_seed(seed)
    mesh = own_mesh(2)
    parameters = {
        name: Parameter(distribute_tensor(torch.randn(mask.shape), mesh, [Shard(0)], src_data_rank=None))
        for name, mask in WHOLE.items()
    }
    shards = Shards(parameters, World(2))
    return parameters, shards, shards.parts(WHOLE)


def stepped(parameters, optimizer):
    """Take a step with gradients of ones."""
    for p in parameters.values():
        p.grad = torch.ones_like(p, requires_grad=False)
    optimizer.step()


def test_each_process_steps_its_own_live_elements(rank):
    """A mask that is all True on one process only is partly frozen on both; the wholly frozen leaves the optimizer."""
    parameters, _, frozen = sharded()
    optimizer = torch.optim.AdamW(parameters.values(), 0.1)
    stepped(parameters, optimizer)
    before = {name: local(p.detach()).clone() for name, p in parameters.items()}
    holder = Compact(optimizer, parameters, frozen, n_frozen=N_FROZEN)
    for p in parameters.values():
        assert p.grad is None or p is parameters["d"]
        p.grad = torch.ones_like(p, requires_grad=False)
    holder.gather_gradients_()
    holder.gather_values_()
    (group,) = optimizer.param_groups
    free, vector = group["params"]
    assert free is parameters["d"]
    assert vector.shape == vector.grad.shape == (16 - N_FROZEN["a"] - N_FROZEN["b"],)
    assert len(local(vector)) == len(local(vector.grad)) == LIVE[rank]
    assert {key: local(v).numel() for key, v in optimizer.state[vector].items()} == {
        "step": 1, "exp_avg": LIVE[rank], "exp_avg_sq": LIVE[rank]
    }  # fmt: skip
    optimizer.step()
    holder.scatter_values_()
    assert group["params"] == [*parameters.values()]
    for name, p in parameters.items():
        assert torch.equal(local(p.detach()) != before[name], ~frozen[name]), name


def test_optimizer_has_its_parameters_until_the_last_backward_pass(rank):
    """Also after a step that a loss scaler has left out; then the gradients of the vector are gone, too."""
    parameters, _, frozen = sharded()
    optimizer = torch.optim.SGD(parameters.values(), 0.1)
    holder = Compact(optimizer, parameters, frozen, n_frozen=N_FROZEN)
    for _ in range(2):  # steps that are left out
        assert optimizer.param_groups[0]["params"] == [*parameters.values()]
        for p in parameters.values():
            p.grad = torch.ones_like(p, requires_grad=False)
        holder.gather_gradients_()
        *_, vector = optimizer.param_groups[0]["params"]
        assert torch.equal(local(vector.grad), torch.ones(LIVE[rank]))  # and not of two passes
        holder.begin_step()
        assert vector.grad is None
    holder.gather_gradients_()
    optimizer.state_dict()  # somebody saves before the step
    assert optimizer.param_groups[0]["params"] == [*parameters.values()]
    holder.before_update((optimizer,), {})
    assert optimizer.param_groups[0]["params"] != [*parameters.values()]
    holder.release()
    assert optimizer.param_groups[0]["params"] == [*parameters.values()]


def test_state_dict_has_dtensors_laid_out_as_parameters_are(rank):
    """Zero where frozen, and there where live; a fresh optimizer takes it."""
    parameters, _, frozen = sharded()
    optimizer = torch.optim.Adagrad(parameters.values(), 0.1)
    stepped(parameters, optimizer)
    holder = Compact(optimizer, parameters, frozen, n_frozen=N_FROZEN)
    saved = optimizer.state_dict()
    for i, (name, p) in enumerate(parameters.items()):
        total = saved["state"][i]["sum"]
        assert (total.shape, total.placements) == (p.shape, p.placements)
        assert torch.equal(local(total), (~frozen[name]).float()), name
    optimizer.load_state_dict(saved)
    holder.release()
    fresh = torch.optim.Adagrad(parameters.values(), 0.1)
    fresh.load_state_dict(saved)
    for name, p in parameters.items():
        assert torch.equal(local(fresh.state[p]["sum"]), local(optimizer.state[p]["sum"]))
        assert torch.equal(local(fresh.state[p]["sum"]), (~frozen[name]).float())


def test_frozen_gradients_are_zeroed_where_gradients_are_gathered_late(rank):
    """NaN included; live ones keep their bits, and parameters without a gradient have none afterwards."""
    parameters, _, frozen = sharded()
    optimizer = torch.optim.SGD(parameters.values(), 0.1)
    holder = Compact(optimizer, parameters, frozen, late=True, n_frozen=N_FROZEN)
    for name in "acd":
        p = parameters[name]
        p.grad = torch.full_like(p, 3.0, requires_grad=False)
        local(p.grad).masked_fill_(frozen[name], torch.nan)
    holder.mask_gradients_()
    assert parameters["b"].grad is None
    for name in "acd":
        assert torch.equal(local(parameters[name].grad), 3.0 * ~frozen[name]), name


def test_savings_are_those_of_this_process(rank):
    """Bytes of states and gradients are local; only what all processes have frozen gets no gradient."""
    parameters, _, frozen = sharded()
    module = nn.ParameterDict(parameters)
    optimizer = torch.optim.AdamW(parameters.values(), 0.1)
    stepped(parameters, optimizer)
    plan = HoldPlan("compact", late=False, puts_back=False, skips_gradients=True)
    holder = Holder(plan, optimizer, module, None, parameters, frozen, {}, resumed=False, n_frozen=N_FROZEN)
    savings = holder.savings
    assert savings.without_backward == ("c",)
    assert [p.requires_grad for p in parameters.values()] == [True, True, False, True]
    assert savings.before.gradients == 4 * 16
    assert savings.after.gradients == 4 * (4 + LIVE[rank])
    assert savings.before.state == 2 * 4 * 16 + 4 * 4
    assert savings.after.state == 2 * 4 * (4 + LIVE[rank]) + 2 * 4
    holder.release()
    assert all(p.requires_grad for p in parameters.values())


def test_states_of_thawing_shards_are_saved_whole_and_loaded_in_part():
    """A file has flat states in row-major order of the whole mask; a process keeps those of its own rows."""
    whole = {name: torch.arange(8.0).view(4, 2) for name in WHOLE}
    saved = {"masks": [WHOLE], "states": [{n: {"exp_avg": whole[n][mask]} for n, mask in WHOLE.items()}]}
    for rank in (0, 1):
        with as_rank(rank, 2):
            parameters, shards, frozen = sharded()
            optimizer = torch.optim.AdamW(parameters.values(), 0.1)
            stepped(parameters, optimizer)
            kept = ThawStates()
            kept.load_state_dict(saved)
            kept.to(parameters, shards)
            kept.to(parameters, shards)  # a tuner's trial has been taken back: nothing is cut twice
            kept.restore_to(optimizer, parameters, frozen)
            for name, mask in frozen.items():
                momentum = local(optimizer.state[parameters[name]]["exp_avg"])
                assert torch.equal(momentum[mask], whole[name][2 * rank : 2 * rank + 2][mask]), name
                assert (momentum[~mask] == 0.1).all() or mask.all()
    with as_rank(0, 1):
        mesh = own_mesh(1)
        parameters = {
            n: Parameter(distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)) for n, t in whole.items()
        }
        shards = Shards(parameters, World(1))
        kept = ThawStates()
        kept.load_state_dict(saved)
        kept.to(parameters, shards)
        again = kept.state_dict(shards)
        assert all(torch.equal(again["masks"][0][n], mask) for n, mask in WHOLE.items())
        assert all(torch.equal(again["states"][0][n]["exp_avg"], whole[n][mask]) for n, mask in WHOLE.items())
