"""Continuations at many rates against one plain loop for each, and the fairness of the comparison."""

import math
from copy import deepcopy

import pytest
import torch
from torch.testing import assert_close

from benchmarks.quality import batched, rate_summary
from benchmarks.quality.rates import WAYS
from examples.models import MLPClassifier


def batches(steps):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=draw), torch.randint(3, (8,), generator=draw)) for _ in range(steps)]


@pytest.mark.parametrize("way", WAYS)
def test_members_take_the_steps_of_plain_runs_with_rates_and_frozen_elements_of_their_own(way):
    """Each member against a loop with torch's optimizer at that member's rate, frozen values put back by hand."""
    way, steps, warm, base = WAYS[way], 6, 3, 0.05
    rates = [base * r for r in way.rates(warm + steps)]
    torch.manual_seed(0)
    model = MLPClassifier(6, 3, (5,))
    data = batches(warm + steps)

    def plain(rates, data, factor, frozen, state=None):
        optimizer = way.optimizers(list(model.parameters()))
        if state is not None:
            optimizer.load_state_dict(deepcopy(state))  # which would share its tensors
        before = [p.detach().clone() for p in model.parameters()]
        for (x, y), rate in zip(data, rates, strict=True):
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.zero_grad()
            model.loss(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                for p, w, mask in zip(model.parameters(), before, frozen, strict=True):
                    p[mask] = w[mask]
        return optimizer

    nothing = [torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()]
    optimizer = plain(rates[:warm], data[:warm], 1.0, nothing)
    packed = optimizer.state_dict()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(2)
    frozen = [{n: torch.rand(w.shape, generator=draw) < f for n, w in start.items()} for f in (0.0, 0.5, 0.5)]
    factors = [1.0, 0.25, 4.0]
    live = {name: torch.stack([~mask[name] for mask in frozen]) for name in start}
    state = {name: {k: torch.clone(v) for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    members = batched.Members(model, start, live, torch.tensor(factors), state)
    found, losses = batched.train(members, way.optimizers, data[warm:], rates[warm:])
    assert losses.shape == (steps, 3)
    again, _ = batched.train(members, way.optimizers, data[warm:], rates[warm:])  # from the same state, counts included
    for name, w in found.items():
        assert torch.equal(again[name], w)
    for i, (factor, masks) in enumerate(zip(factors, frozen, strict=True)):
        model.load_state_dict(start, strict=False)
        plain(rates[warm:], data[warm:], factor, list(masks.values()), packed)
        for name, p in model.named_parameters():
            assert_close(found[name][i], p.detach(), rtol=1e-4, atol=1e-6)
            assert torch.equal(found[name][i][masks[name]], start[name][masks[name]])
            assert not torch.equal(found[name][i], start[name]) or masks[name].all()


def test_factors_are_chosen_on_validation_and_reported_on_test_losses():
    """By the mean over seeds; what diverged counts as 3 and is never chosen."""
    runs = rate_summary.Runs(
        {
            ("digits", seed): {
                "p": 10,
                "base": 0.1,
                "all_frozen": {"test": [3.0]},
                "unfrozen": {"factors": [1.0, 2.0], "val": [0.5, 0.4], "test": [0.9, 1.0 + 0.1 * seed]},
                "members": {
                    "random@0.8": {"factors": [1.0, 2.0], "val": [0.7, None], "test": [1.5 + 0.1 * seed, None]},
                    "progress@0.8": {"factors": [1.0, 2.0], "val": [0.6 - seed, 0.4], "test": [1.3, 0.1]},
                },
            }
            for seed in (0, 1)
        }
    )
    assert math.isclose(runs.gains["digits"], 1.95)
    random = rate_summary.lost(runs, "random", 0.8)
    assert random["digits"] == {0: {0.8: pytest.approx(0.5 / 1.95)}, 1: {0.8: pytest.approx(0.5 / 1.95)}}
    assert rate_summary.lost(runs, "random", 0.8, rate_summary.power(0.0, 2.0))["digits"][0][0.8] == 3.0
    progress = rate_summary.lost(runs, "progress", 0.8)["digits"]
    assert progress[0][0.8] == pytest.approx(0.3 / 1.95)  # of the factor 1, with the lower mean over both seeds
    apart = rate_summary.apart({"digits": progress}, random)["digits"]
    assert apart.tolist() == [pytest.approx(-0.2 / 1.95), pytest.approx(-0.3 / 1.95)]
