"""`Savings`: totals, fractions and the table are those counted by hand."""

import pytest
import torch
from torch.nn import Parameter

from lightning_gcfreeze.freezing import savings
from lightning_gcfreeze.freezing.blocks import Block
from lightning_gcfreeze.freezing.savings import Footprint


def masks():
    """Return masks of a weight with two of four rows frozen, of a fully frozen weight, and of a live bias."""
    half = torch.zeros(4, 3, dtype=torch.bool)
    half[:2] = True
    return {
        "a.weight": half,
        "b.weight": torch.ones(2, 5, dtype=torch.bool),
        "b.bias": torch.zeros(2, dtype=torch.bool),
    }


def of(frozen, **change):
    arguments = {
        "uses_per_step": {"a.weight": 10, "b.weight": 100},
        "blocks": {"a.weight": Block(frozen["a.weight"])},
        "without_backward": ("b.weight",),
        "before": Footprint(2048, 1024),
        "after": Footprint(512, 256),
        "index_bytes": 16,
    }
    return savings.count_savings(frozen, **arguments | change)


def test_flops_are_two_for_each_element_and_use():
    """Half of a's product and all of b's are skipped; a bias is not counted."""
    found = of(masks())
    assert (found.parameters["a.weight"].flops, found.parameters["a.weight"].flops_skipped) == (240, 120)
    assert (found.parameters["b.weight"].flops, found.parameters["b.weight"].flops_skipped) == (2000, 2000)
    assert found.parameters["b.bias"].flops is None
    assert found.weight_gradient_flops_skipped == pytest.approx(2120 / 2240)
    assert found.without_backward == ("b.weight",)


def test_without_counted_uses_no_flops_are_claimed():
    """The step before the freeze could not be counted."""
    found = of(masks(), uses_per_step={})
    assert found.weight_gradient_flops_skipped == 0
    assert all(p.flops is None for p in found.parameters.values())


def test_scalars_are_the_totals():
    """Bytes of indices are added to those of the state."""
    assert of(masks()).scalars() == {
        "gcfreeze/optimizer_state_bytes": 512 + 16,
        "gcfreeze/gradient_bytes": 256,
        "gcfreeze/weight_gradient_flops_skipped": pytest.approx(2120 / 2240),
    }


def test_the_table_has_totals_and_a_row_for_each_parameter():
    """The whole text is compared."""
    assert of(masks()).table().splitlines() == [
        "The optimizer and its gradients take 26% of the memory that they took. About 32% of the work of linear layers"
        " and convolutions is skipped in each step.",
        "Optimizer state  2.0 KiB -> 512 B (25.0%), plus 16 B of indices",
        "Gradients        1.0 KiB -> 256 B (25.0%)",
        "Weight gradients 94.6% of the FLOPs are skipped; parameters without any gradient: 1",
        "Not saved        forward passes, activations, and gradients of activations behind the first live parameter",
        "parameter  elements  frozen  gradient FLOPs per step  skipped",
        "a.weight         12   50.0%                      240    50.0%",
        "b.weight         10  100.0%                    2,000   100.0%",
        "b.bias            2    0.0%              not counted",
        "not counted: not a weight of a linear layer or plain convolution, or its uses are unknown",
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"uses_per_step": {}}, "take 26% of the memory that they took."),
        (
            {"blocks": {}, "without_backward": ()},
            "they took. All weight gradients are computed, so a step takes about as long as before;"
            " `granularity='mixed'` or 'row' skips more.",
        ),
        (
            {"without_backward": (), "uses_per_step": {"a.weight": 10, "b.weight": 10}},
            "About 9% of the work of linear layers and convolutions is skipped in each step; `granularity='mixed'` or"
            " 'row' skips more.",
        ),
        ({"after": Footprint(2048, 1024)}, "take as much memory as before; `hold='compact'` saves it or tells why."),
    ],
    ids=["nothing counted", "nothing skipped", "some", "no memory"],
)
def test_verdict_says_what_the_freeze_is_worth_and_what_to_change(change, text):
    assert text in of(masks(), **change).verdict


def test_table_lists_the_largest_of_many_parameters():
    """In the order of the model."""
    frozen = masks() | {f"w{i}": torch.zeros(100 + i, dtype=torch.bool) for i in range(40)}
    lines = of(frozen).table().splitlines()
    assert lines[-2] == "… and 13 smaller ones"
    assert [line.split()[0] for line in lines[6:-2]] == [f"w{i}" for i in range(10, 40)]


def test_footprint_counts_state_and_gradients_of_the_optimizer():
    """Adam: two moments and a count of steps for each parameter; gradients of parameters that require one."""
    parameters = [Parameter(torch.zeros(10)), Parameter(torch.zeros(3, dtype=torch.bfloat16))]
    optimizer = torch.optim.Adam(parameters)
    assert Footprint.of(optimizer) == Footprint(0, 46)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert Footprint.of(optimizer) == Footprint(2 * 46 + 2 * 4, 46)
    parameters[0].requires_grad_(False)
    assert Footprint.of(optimizer).gradients == 6


@pytest.mark.parametrize(("count", "said"), [(1023, "1023 B"), (2**20, "1.0 MiB"), (5 * 2**40, "5120.0 GiB")])
def test_sizes_have_binary_units(count, said):
    """1 KiB is 1024 bytes."""
    assert savings._size(count) == said
