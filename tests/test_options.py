"""`Options`: what follows from the arguments together."""

import pytest

from lightning_gcfreeze import orderings
from lightning_gcfreeze.options import Options


@orderings.needs("second_moment", "update", variance=False)
def both(evidence):
    return {}


@pytest.mark.parametrize(
    ("arguments", "gains"),
    [
        ({}, {1: 1.0, 64: 1 / 64}),
        ({"gain": 0.3}, {1: 0.3, 64: 0.3}),
        ({"order": "progress"}, {1: 1.0, 64: 5 / 68}),
        ({"order": "momentum"}, {1: 1.0, 2: 0.1 / (1 - 0.9**2), 64: 0.1 / (1 - 0.9**64)}),
        ({"order": "momentum", "t0": 8, "every": 4}, {1: 1.0, 64: 1 - 0.9**4}),
        ({"order": both}, {64: 0.1 / (1 - 0.9**64)}),
        ({"order": both, "gain": 0.3}, {1: 1.0, 64: 0.3}),
    ],
    ids=str,
)
def test_gain_of_scores_is_that_of_the_noisiest_statistic(arguments, gains):
    """The optimizer's mean has a memory of ten steps, whatever `gain` is."""
    options = Options(**({"t0": 8, "k": 0.5} | arguments))
    assert {t: options.gain_of_scores(t) for t in gains} == pytest.approx(gains, rel=1e-6)
