"""Parameters by the module that they are shown as."""

import pytest
import torch

from lightning_gcfreeze.reporting import groups
from tests.reporting.encoder import ENCODER


def test_groups_of_an_encoder_are_its_layers():
    """Each layer is one; what is not parted evenly is not parted."""
    found = groups.by_module(ENCODER, 16)
    layers = [f"bert.encoder.layer.{i}" for i in range(12)]
    assert list(found) == ["bert.embeddings", *layers, "bert.pooler", "head.bias"]
    assert [name for members in found.values() for name in members] == ENCODER
    assert all(name.startswith(group) for group, members in found.items() for name in members)
    assert all(len(found[layer]) == 10 for layer in layers)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 14, 15, 16, 64])
def test_groups_are_no_more_than_allowed_and_hold_each_parameter_once(most):
    """Of several sets of names, some without modules."""
    for names in (ENCODER, [f"w{i}" for i in range(100)], [f"net.{i}.w" for i in range(100)], ["a", "a.b", "a.b.c"]):
        found = groups.by_module(names, most)
        assert len(found) <= most
        assert sorted(name for members in found.values() for name in members) == sorted(names)


def test_groups_of_few_parameters_are_the_parameters():
    names = [f"layer.{i}.weight" for i in range(16)]
    assert groups.by_module(names, 16) == {name: [name] for name in names}


def test_groups_of_names_without_a_module_are_all():
    assert list(groups.by_module([f"w{i}" for i in range(100)], 16)) == ["all"]


def test_no_groups_if_none_are_wanted():
    assert groups.by_module(["a", "b"], 0) == {}


def test_history_by_layer_begins_with_nothing_frozen_unless_masks_were_given():
    """Modules count by their elements."""
    shapes = {"net.a": torch.Size([3]), "net.b": torch.Size([1]), "head": torch.Size([2])}
    frozen = {"net.a": 1.0, "net.b": 0.0, "head": 0.5}
    by_layer = {"net": 0.75, "head": 0.5}
    assert groups.history_by_layer([(7, frozen)], shapes, 2) == [(0, {}), (7, by_layer)]
    assert groups.history_by_layer([(0, frozen)], shapes, 2) == [(0, by_layer)]
    assert groups.history_by_layer([], shapes, 2) == [(0, {})]
