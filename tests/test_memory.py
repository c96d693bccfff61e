"""What the package allocates beside what a run has anyway: at most one tensor at a time, and pieces of it."""

import pytest
import torch
from torch import nn, optim

from lightning_gcfreeze import _aside, _computed, orderings
from lightning_gcfreeze.decision import decide
from lightning_gcfreeze.gradients import momentum
from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.gradients.replay import isolated_gradient
from lightning_gcfreeze.observing import Observing
from lightning_gcfreeze.selection import lowest, radix
from tests.allocations import most_allocated
from tests.conformance import samples
from tests.gradients.observer import Observer

WIDTH, LAYERS = 256, 6
ONE = WIDTH * WIDTH * 4  # bytes of a weight in float32
ALL = LAYERS * ONE


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """As small beside a weight as they are beside a large model's."""
    monkeypatch.setattr(_computed, "PIECE_NUMEL", 2**10)
    monkeypatch.setattr(lowest, "SUMMED_NUMEL", 2**12)
    monkeypatch.setattr(radix, "MIN_CHUNK", 2**10)
    monkeypatch.setattr(_aside, "MIN_NBYTES", 2**10)


def deep():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def stepped():
    """A model and its optimizer after a step, and statistics of that step, as they are at t0."""
    module = deep()
    optimizer = optim.Adam(module.parameters())
    module(torch.randn(4, WIDTH)).square().mean().backward()
    optimizer.step()
    parameters = dict(module.named_parameters())
    observing = Observing(
        {n: p.detach() for n, p in parameters.items()}, needs=frozenset({"recent_mean", "second_moment"})
    )
    g_batch = batch_gradients(parameters)
    observing.observe(1, samples({n: 2 * g for n, g in g_batch.items()}), g_batch, "1/t")
    return parameters, optimizer, observing


def test_allocations_are_counted():
    """Three tensors of which two live at once, and one that is returned."""

    def call():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return torch.zeros(3000), second

    assert 16000 <= most_allocated(call) < 16000 + 500


@pytest.mark.parametrize(("granularity", "bound"), [("element", 2.6), ("row", 1.7), ("mixed", 5.6)])
@pytest.mark.parametrize("order", ["variance", "progress", "momentum", "snr"])
def test_decision_has_one_tensor_of_scores_in_memory_and_masks_of_a_bit(order, granularity, bound):
    """The evidence of all tensors, their scores or their masks would each be more. "mixed" makes a few copies."""
    parameters, optimizer, observing = stepped()
    if order == "snr":
        observing.moments["mean"] = observing.moments["recent_mean"]
    weights = {name: p.detach() for name, p in parameters.items()}
    moments = momentum.moments(optimizer, parameters, ["momentum", "update"])
    read = {"momentum": moments.momentum, "update": moments.update} if order == "momentum" else {}

    def call():
        order_of = orderings.ORDERINGS[order]
        costs = dict.fromkeys(weights, 64)
        return decide(observing, order_of, weights, 0, 3 * WIDTH * WIDTH, granularity, moments=read, costs=costs)

    most = most_allocated(call)
    assert most < bound * ONE  # a tensor of scores, its copy for the CPU's file, pieces, and a mask of bytes
    assert most > ONE  # something was counted


def test_gradient_of_a_step_is_scaled_tensor_by_tensor():
    parameters, _, observing = stepped()
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    taken = samples({name: p.grad for name, p in parameters.items()})

    def call():
        observing.observe(2, taken, batch_gradients(parameters, 4.0), "1/t")

    assert most_allocated(call) < 4 * ONE < ALL


@pytest.mark.parametrize("takes", [True, False])
def test_replayed_gradients_are_not_in_memory_at_once_where_they_are_taken(takes):
    """And the weights are not copied, which would be as much again as all gradients are where they are returned."""
    module = deep()
    x, seen = torch.randn(1, WIDTH), []
    most = most_allocated(
        lambda: isolated_gradient(
            module,
            lambda: module(x).square().mean(),
            dict(module.named_parameters()),
            (lambda name, gradient: seen.append(name)) if takes else None,
        )
    )
    assert (len(seen) == LAYERS) == takes
    assert most < (2.5 * ONE if takes else ALL + 2 * ONE)
    assert (most < ALL) == takes


def test_step_that_compares_has_one_replayed_gradient_and_one_captured_one():
    """The step observes for the first time, with the first sample of the batch as a batch of its own."""
    observer = Observer(Squares(), keep_each=False)
    x = torch.randn(4, WIDTH)
    source = observer.source
    source.begin_batch([x], 0)
    loss = observer.module.training_step([x], 0)
    source.begin_backward()
    loss.backward()
    source.end_backward()
    g_batch = batch_gradients(dict(observer.module.named_parameters()))
    most = most_allocated(lambda: source.gradients(1.0, g_batch, 4))
    assert len(source.choice.captured) == LAYERS
    assert most < 4 * ONE < ALL


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = deep()

    def training_step(self, batch, batch_idx):
        return self.network(batch[0]).square().mean()
