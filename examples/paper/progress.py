"""How much there is to do in a run, for the time that is left."""

from collections.abc import Mapping

from examples.paper.run import READINGS
from examples.paper.tasks import Name, Settings, n_parameters

STEPS_PER_SECOND = 600  # of processor time on a slow core
SECONDS: Mapping[str, Mapping[Name, float]] = {
    "l1_path": {"boston": 0.1, "mnist": 2.7, "synthetic1": 0.2, "synthetic2": 0.2},
    "elastic_net_path": {"boston": 0.1, "mnist": 2.7, "synthetic1": 0.2},
    "obd": {"mnist": 3.4},
    # One inverse for the three, of whose time each has a third.
    "obs": {"synthetic1": 1.9},
    "obd_freeze": {"synthetic1": 1.9},
    "obs_freeze": {"synthetic1": 1.9},
    "relevance": {"boston": 1.3, "mnist": 2.6, "synthetic1": 1.6, "synthetic2": 1.3, "synthetic3": 1.0},
    "belsley_noise": {"boston": 0.6, "synthetic2": 0.2, "synthetic3": 0.2},
    "belsley_laplace": {"boston": 0.6, "synthetic2": 0.2, "synthetic3": 0.2},
}
"""Of one run with one thread, where an order takes a tenth of a second or more, without what is in `WARM_UPS`."""
WARM_UPS = {*READINGS, "belsley_noise"}  # the orders that take all steps up to t0 once more


def work(settings: Settings) -> float:
    """The work of a run, in steps of a small model: a warm-up's count twice, as they compute single gradients, too."""
    p, members = n_parameters(settings.data), len(settings.orders) * len(settings.fractions)
    warm_ups = 1 + len(WARM_UPS.intersection(settings.orders))
    seconds = sum(SECONDS.get(order, {}).get(settings.data, 0.0) for order in settings.orders)
    after = (settings.steps - settings.t0) * (1 + 6e-6 * p * members)
    return settings.t0 * 2 * warm_ups + after + seconds * STEPS_PER_SECOND
