"""The work that the bar shows: what runs have in common, and what single orders add."""

from dataclasses import replace

import pytest

from examples.paper.progress import SECONDS, STEPS_PER_SECOND, work
from examples.paper.related import RELATED, left_out
from examples.paper.run import READINGS
from examples.paper.tasks import TASKS, Settings, n_parameters

SHORT = Settings("boston", 100, 1000, 32, 3e-3, ("variance", "random"), (0.0, 0.5, 1.0), seed=0)


def added(order, settings=SHORT):
    return work(replace(settings, orders=(*settings.orders, order))) - work(settings)


def test_an_order_adds_its_seconds_in_steps():
    copies = added("snr")  # with its continuations, as each order
    assert 0 < copies < 10
    assert added("relevance") - copies == pytest.approx(SECONDS["relevance"]["boston"] * STEPS_PER_SECOND)
    assert added("obd") == pytest.approx(copies)


@pytest.mark.parametrize("order", [*READINGS, "belsley_noise"])
def test_an_order_that_observes_anew_adds_a_warm_up(order):
    later = replace(SHORT, t0=300)
    assert added(order, later) - added("snr", later) == pytest.approx(added(order) - added("snr") + 2 * 200)


def test_pruning_observes_all_steps_and_goes_on_with_none():
    assert work(replace(SHORT, prune=True, t0=1000)) == 2000


def test_times_are_of_orders_and_tasks_that_have_them():
    assert SECONDS.keys() <= RELATED.keys()
    for order, seconds in SECONDS.items():
        assert {task for task in TASKS if left_out(order, n_parameters(task)) is None} >= seconds.keys()
