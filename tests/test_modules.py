"""Walks over modules."""

import pytest
from torch import nn

from lightning_gcfreeze import _modules


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
def test_batch_norms_without_statistics_are_found(layer, found):
    """Those in train mode without running statistics, by name; the others can do without a batch."""
    assert _modules.batch_norms_without_statistics(nn.ModuleDict({"part": layer})) == found
