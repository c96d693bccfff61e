"""Tags, values and images for loggers."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gcfreeze.reporting import board
from tests.reporting.encoder import ENCODER

FROZEN = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor(False)}
VARIANCE = {"a": torch.tensor([[0.0, 100.0], [0.01, 1.0]]), "b": torch.tensor(10.0)}
SHAPES = {name: mask.shape for name, mask in FROZEN.items()}


def test_scalars_of_a_step_without_a_decision():
    """The fraction in all and of every parameter as they are given, and the steps, as plain floats."""
    tags = board.scalars({"a": 0.75, "b": 0.0}, fraction=0.6, observed=7)
    assert tags == {
        "gcfreeze/frozen_fraction": 0.6,
        "gcfreeze/observed_steps": 7.0,
        "gcfreeze/frozen_fraction/a": 0.75,
        "gcfreeze/frozen_fraction/b": 0.0,
    }
    assert {type(value) for value in tags.values()} == {float}


def test_scalars_after_a_decision_have_savings_traffic_and_finite_findings():
    """A value that is not finite is left out: loggers cannot draw it."""
    planning = {"gcfreeze/t0": 5.0, "gcfreeze/settling/overlap": math.nan}
    tags = board.scalars({}, 0.5, 3, {"gcfreeze/gradient_bytes": 8.0}, 12, planning, lr_factor=0.25)
    assert tags == {
        "gcfreeze/frozen_fraction": 0.5,
        "gcfreeze/observed_steps": 3.0,
        "gcfreeze/gradient_bytes": 8.0,
        "gcfreeze/gradient_bytes_sent": 12.0,
        "gcfreeze/t0": 5.0,
        "gcfreeze/lr_factor": 0.25,
    }


def test_scalars_of_many_parameters_are_means_over_the_elements_of_modules():
    """Of 17 parameters in three modules, one of which has no elements; the sum over all stays right."""
    shapes = {f"first.{i}": torch.Size([i, 3]) for i in range(15)}
    shapes |= {"second.weight": torch.Size([0]), "third": torch.Size([])}
    fractions = {name: (i % 5) / 4 for i, name in enumerate(shapes)}
    tags = board.scalars(fractions, 0.1, 1, shapes=shapes)
    sizes = np.array([3 * i for i in range(15)])
    mean = float((np.arange(15) % 5 / 4 * sizes).sum() / sizes.sum())
    assert {tag.removeprefix("gcfreeze/frozen_fraction/"): v for tag, v in tags.items() if tag.count("/") == 2} == {
        "first": pytest.approx(mean),
        "second.weight": 0.0,
        "third": 0.25,
    }


# Histograms ---------------------------------------------------------------------------------------------------------


def test_histograms_are_of_log10_of_variances():
    """Of the variances that have one, for each parameter. Masks have none."""
    values = dict(board.histograms(VARIANCE, SHAPES))
    assert set(values) == {f"gcfreeze/log10_variance/{name}" for name in "ab"}
    for name in "ab":
        array = VARIANCE[name].numpy().flatten()
        np.testing.assert_allclose(
            values[f"gcfreeze/log10_variance/{name}"].numpy().flatten(), np.log10(array[array > 0]), rtol=1e-6
        )


@pytest.mark.parametrize("variance", [0.0, math.inf, math.nan])
def test_parameter_without_finite_variance_has_no_histogram_of_variance(variance):
    """log10 of 0 is no number, nor are those of a run that diverged; an empty histogram is an error for TensorBoard."""
    assert dict(board.histograms({"a": torch.full((2, 2), variance)}, SHAPES)) == {}


def test_histograms_do_not_share_memory_with_variances():
    """They are read only."""
    before = {name: tensor.clone() for name, tensor in VARIANCE.items()}
    for _, tensor in board.histograms(VARIANCE, SHAPES):
        tensor.add_(1.0)
    assert all(torch.equal(VARIANCE[name], before[name]) for name in before)


def test_histograms_of_many_parameters_are_of_at_most_eight_modules():
    """All values are in one of them."""
    variance = {name: torch.full((2, 3), 10.0**i) for i, name in enumerate(ENCODER[:38])}
    values = dict(board.histograms(variance, {name: v.shape for name, v in variance.items()}))
    assert len(values) <= 8
    found = torch.cat(list(values.values())).sort().values
    np.testing.assert_allclose(found, np.repeat(np.arange(38), 6), rtol=1e-5, atol=1e-5)


def test_histogram_of_a_large_tensor_is_of_evenly_spaced_values_of_all_columns(monkeypatch):
    """An even step through rows of a power of two would leave most columns out."""
    monkeypatch.setattr(board, "MAX_HISTOGRAM_NUMEL", 2**8)
    variance = {"a": (10.0 ** torch.arange(16.0)).repeat(256, 1)}
    ((_, values),) = board.histograms(variance, {"a": variance["a"].shape})
    assert len(values) == math.ceil(256 * 16 / 17)
    assert set(values.round().tolist()) == set(range(16))


# Loggers ------------------------------------------------------------------------------------------------------------


class Logger:
    """A logger that keeps what it is given."""

    def __init__(self, experiment: Any = None) -> None:
        self.experiment, self.metrics = experiment, []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((step, metrics))


class Experiment:
    """Takes histograms and images, as TensorBoard's writer does."""

    def __init__(self) -> None:
        self.histograms: list[tuple[str, int]] = []
        self.images: list[tuple[str, int]] = []

    def add_histogram(self, tag: str, values: Tensor, step: int) -> None:
        self.histograms.append((tag, step))

    def add_image(self, tag: str, image: Any, step: int, dataformats: str) -> None:
        assert (dataformats, image.shape[2]) == ("HWC", 3)
        self.images.append((tag, step))


DECISION: Any = SimpleNamespace(frozen=FROZEN, variance=VARIANCE, shapes=SHAPES)
UNDECIDED: Any = SimpleNamespace(steps=4, history=[], decision=None)


def frozen_at(steps: int) -> Any:
    """What is known after so many steps of a run that froze after step 8."""
    return SimpleNamespace(steps=steps, history=[(8, {"a": 0.75, "b": 0.0})], decision=DECISION)


def test_board_gives_drawings_to_loggers_that_take_them_and_numbers_to_all():
    """When the masks have changed; the heat map also when a quarter more steps have passed, and at the end, once."""
    plain, tensorboard, drawn = Logger(), Logger(Experiment()), board.Board()
    loggers = [plain, tensorboard]
    drawn.log(loggers, 4, {"gcfreeze/x": 1.0}, UNDECIDED)
    drawn.draw(loggers, 4, UNDECIDED)
    assert tensorboard.experiment.histograms == tensorboard.experiment.images == []
    drawn.log(loggers, 8, {"gcfreeze/x": 2.0}, frozen_at(8))
    assert plain.metrics == tensorboard.metrics == [(4, {"gcfreeze/x": 1.0}), (8, {"gcfreeze/x": 2.0})]
    assert tensorboard.experiment.histograms == [(f"gcfreeze/log10_variance/{name}", 8) for name in "ab"]
    assert tensorboard.experiment.images == [("gcfreeze/frozen/a", 8), ("gcfreeze/frozen", 8)]
    for step in (9, 10, 11, 12, 13):
        drawn.log(loggers, step, {}, frozen_at(step))
    drawn.draw(loggers, 13, frozen_at(13))
    drawn.draw(loggers, 14, frozen_at(14))
    assert tensorboard.experiment.images[2:] == [("gcfreeze/frozen", step) for step in (10, 13, 14)]
    assert len(tensorboard.experiment.histograms) == 2


def test_board_draws_nothing_where_images_cannot_be_compressed(monkeypatch):
    """Histograms are still there."""
    monkeypatch.setattr(board.importlib.util, "find_spec", lambda name: None)
    tensorboard = Logger(Experiment())
    board.Board().log([tensorboard], 8, {}, frozen_at(8))
    assert tensorboard.experiment.images == []
    assert len(tensorboard.experiment.histograms) == 2


@pytest.mark.parametrize(("optimizer", "prefix"), [(None, ""), (0, ""), (2, "optimizer_2/")])
def test_board_of_one_of_several_optimizers_has_its_index_in_all_tags(optimizer, prefix):
    """Numbers, histograms and images."""
    tensorboard = Logger(Experiment())
    board.Board(optimizer).log([tensorboard], 8, {"gcfreeze/x": 2.0}, frozen_at(8))
    experiment, ((_, metrics),) = tensorboard.experiment, tensorboard.metrics
    tags = [*metrics, *(tag for tag, _ in experiment.histograms + experiment.images)]
    assert len(tags) == 5
    assert all(tag.startswith(f"gcfreeze/{prefix}") for tag in tags)


def test_board_that_goes_on_draws_masks_of_later_steps_only():
    """Those of the run before are in its logs; masks that were given before any step are not."""
    for known, n_images in ((frozen_at(9), 1), (frozen_at(8), 2)):  # the heat map alone, or a mask as well
        tensorboard, drawn = Logger(Experiment()), board.Board()
        drawn.begin(known)
        drawn.log([tensorboard], 10, {}, frozen_at(10))
        assert len(tensorboard.experiment.images) == n_images


def test_heat_map_of_given_masks_is_drawn_at_the_first_step():
    """Step 0 of the loggers' axis is a step."""
    tensorboard, known = Logger(Experiment()), frozen_at(1)
    known.history = [(0, known.history[0][1])]
    board.Board().log([tensorboard], 0, {}, known)
    assert ("gcfreeze/frozen", 0) in tensorboard.experiment.images


def test_board_of_no_parameters_draws_the_heat_map_alone():
    """`log_parameters=0`: no histograms, no masks, no fractions."""
    tensorboard = Logger(Experiment())
    board.Board(most=0).log([tensorboard], 8, {}, frozen_at(8))
    assert tensorboard.experiment.images == [("gcfreeze/frozen", 8)]
    assert tensorboard.experiment.histograms == []
    assert set(board.scalars({"a": 0.5}, 0.5, 3, most=0)) == {"gcfreeze/frozen_fraction", "gcfreeze/observed_steps"}


def test_a_step_is_due_each_n_steps_and_when_there_is_news_but_once():
    """Steps are those of the optimizer: a batch without a step has the same."""
    drawn = board.Board()
    assert [drawn.is_due(step, 5, has_news=step == 7) for step in range(1, 11)] == [
        step in (5, 7, 10) for step in range(1, 11)
    ]
    drawn.log([], 10, {}, SimpleNamespace(steps=10, history=[], decision=None))
    assert not drawn.is_due(10, 5, has_news=True)
    assert not any(drawn.is_due(step, 0, has_news=False) for step in range(11, 20))
