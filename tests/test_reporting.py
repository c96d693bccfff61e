"""Tags, values and images for loggers, compared with NumPy."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gcfreeze import reporting

FROZEN = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor(False)}
VARIANCE = {"a": torch.tensor([[0.0, 100.0], [0.01, 1.0]]), "b": torch.tensor(10.0)}
SHAPES = {name: mask.shape for name, mask in FROZEN.items()}
ENCODER = [
    "bert.embeddings.word.weight",
    "bert.embeddings.position.weight",
    "bert.embeddings.norm.weight",
    "bert.embeddings.norm.bias",
    *(
        f"bert.encoder.layer.{i}.{part}.{kind}"
        for i in range(12)
        for part in ("query", "key", "value", "output", "norm")
        for kind in ("weight", "bias")
    ),
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "head.bias",
]


def test_scalars_of_a_step_without_a_decision():
    """The fraction in all and of every parameter as they are given, and the steps, as plain floats."""
    tags = reporting.scalars({"a": 0.75, "b": 0.0}, fraction=0.6, observed=7)
    assert tags == {
        "gcfreeze/frozen_fraction": 0.6,
        "gcfreeze/observed_steps": 7.0,
        "gcfreeze/frozen_fraction_of/a": 0.75,
        "gcfreeze/frozen_fraction_of/b": 0.0,
    }
    assert {type(value) for value in tags.values()} == {float}


def test_scalars_after_a_decision_have_savings_traffic_and_finite_findings():
    """A value that is not finite is left out: loggers cannot draw it."""
    planning = {"gcfreeze/t0": 5.0, "gcfreeze/settling/overlap": math.nan}
    tags = reporting.scalars({}, 0.5, 3, {"gcfreeze/gradient_bytes": 8.0}, 12, planning, lr_factor=0.25)
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
    tags = reporting.scalars(fractions, 0.1, 1, shapes=shapes)
    sizes = np.array([3 * i for i in range(15)])
    mean = float((np.arange(15) % 5 / 4 * sizes).sum() / sizes.sum())
    assert {tag.removeprefix("gcfreeze/frozen_fraction_of/"): v for tag, v in tags.items() if tag.count("/") == 2} == {
        "first": pytest.approx(mean),
        "second.weight": 0.0,
        "third": 0.25,
    }


# Groups --------------------------------------------------------------------------------------------------------------


def test_groups_of_an_encoder_are_its_layers():
    """Each layer is one; what is not parted evenly is not parted."""
    found = reporting.groups(ENCODER, 16)
    layers = [f"bert.encoder.layer.{i}" for i in range(12)]
    assert list(found) == ["bert.embeddings", *layers, "bert.pooler", "head.bias"]
    assert [name for members in found.values() for name in members] == ENCODER
    assert all(name.startswith(group) for group, members in found.items() for name in members)
    assert all(len(found[layer]) == 10 for layer in layers)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 14, 15, 16, 64])
def test_groups_are_no_more_than_allowed_and_hold_each_parameter_once(most):
    """Of several sets of names, some without modules."""
    for names in (ENCODER, [f"w{i}" for i in range(100)], [f"net.{i}.w" for i in range(100)], ["a", "a.b", "a.b.c"]):
        found = reporting.groups(names, most)
        assert len(found) <= most
        assert sorted(name for members in found.values() for name in members) == sorted(names)


def test_groups_of_few_parameters_are_the_parameters():
    names = [f"layer.{i}.weight" for i in range(16)]
    assert reporting.groups(names, 16) == {name: [name] for name in names}


def test_groups_of_names_without_a_module_are_all():
    assert list(reporting.groups([f"w{i}" for i in range(100)], 16)) == ["all"]


# Histograms ----------------------------------------------------------------------------------------------------------


def test_histograms_are_of_log10_of_variances():
    """Of the variances that have one, for each parameter. Masks have none."""
    values = dict(reporting.histograms(VARIANCE, SHAPES))
    assert set(values) == {f"gcfreeze/log10_variance/{name}" for name in "ab"}
    for name in "ab":
        array = VARIANCE[name].numpy().flatten()
        np.testing.assert_allclose(
            values[f"gcfreeze/log10_variance/{name}"].numpy().flatten(), np.log10(array[array > 0]), rtol=1e-6
        )


@pytest.mark.parametrize("variance", [0.0, math.inf, math.nan])
def test_parameter_without_finite_variance_has_no_histogram_of_variance(variance):
    """log10 of 0 is no number, nor are those of a run that diverged; an empty histogram is an error for TensorBoard."""
    assert dict(reporting.histograms({"a": torch.full((2, 2), variance)}, SHAPES)) == {}


def test_histograms_do_not_share_memory_with_variances():
    """They are read only."""
    before = {name: tensor.clone() for name, tensor in VARIANCE.items()}
    for _, tensor in reporting.histograms(VARIANCE, SHAPES):
        tensor.add_(1.0)
    assert all(torch.equal(VARIANCE[name], before[name]) for name in before)


def test_histograms_of_many_parameters_are_of_at_most_eight_modules():
    """All values are in one of them."""
    variance = {name: torch.full((2, 3), 10.0**i) for i, name in enumerate(ENCODER[:38])}
    values = dict(reporting.histograms(variance, {name: v.shape for name, v in variance.items()}))
    assert len(values) <= 8
    found = torch.cat(list(values.values())).sort().values
    np.testing.assert_allclose(found, np.repeat(np.arange(38), 6), rtol=1e-5, atol=1e-5)


def test_histogram_of_a_large_tensor_is_of_evenly_spaced_values_of_all_columns(monkeypatch):
    """An even step through rows of a power of two would leave most columns out."""
    monkeypatch.setattr(reporting, "MAX_HISTOGRAM_NUMEL", 2**8)
    variance = {"a": (10.0 ** torch.arange(16.0)).repeat(256, 1)}
    ((_, values),) = reporting.histograms(variance, {"a": variance["a"].shape})
    assert len(values) == math.ceil(256 * 16 / 17)
    assert set(values.round().tolist()) == set(range(16))


# Images --------------------------------------------------------------------------------------------------------------


def fraction_of(pixels: Any) -> Any:
    """The fraction that a colour stands for, by its red."""
    return (247 - np.asarray(pixels, float)[..., 0]) / (247 - 8)


def test_mask_image_of_a_small_matrix_has_a_pixel_for_each_element():
    ((tag, image),) = reporting.mask_images(FROZEN, SHAPES)
    assert tag == "gcfreeze/frozen/a"
    assert image.dtype == np.uint8
    frozen, live = [8, 48, 107], [247, 251, 255]
    assert image.tolist() == [[frozen, live], [frozen, frozen]]


def test_mask_image_of_a_large_matrix_has_the_means_of_its_cells():
    """300 x 200 in 128 x 128 cells of 2 or 3 rows and 1 or 2 columns; all elements count."""
    mask = torch.rand(300, 10, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    ((_, image),) = reporting.mask_images({"w": mask}, {"w": mask.shape})
    assert image.shape == (128, 128, 3)
    flat = mask.numpy().reshape(300, 200)
    for i, j in ((0, 0), (5, 77), (64, 3), (127, 127)):
        rows, columns = (slice(k * n // 128, (k + 1) * n // 128) for k, n in ((i, 300), (j, 200)))
        assert fraction_of(image[i, j]) == pytest.approx(flat[rows, columns].mean(), abs=0.003)


def test_mask_images_are_of_the_four_largest_matrices():
    """Vectors and empty matrices have none."""
    shapes = {"v": (999,), "empty": (0, 9), "a": (2, 2), "b": (3, 3), "c": (5, 5), "d": (4, 4), "e": (1, 2, 3)}
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    found = dict(reporting.mask_images(masks, {name: torch.Size(shape) for name, shape in shapes.items()}))
    assert list(found) == [f"gcfreeze/frozen/{name}" for name in "cdbe"]
    assert found["gcfreeze/frozen/e"].shape == (1, 6, 3)


def test_heat_map_has_layers_from_top_to_bottom_and_steps_from_left_to_right():
    """Two layers: nothing until step 100, then 1/4 and 1, from step 300 on 1/2 and 1, until 400."""
    history = [(0, {}), (100, {"a": 0.25, "b": 1.0}), (300, {"a": 0.5, "b": 1.0})]
    fractions = fraction_of(reporting.heat_map(history, 400))
    height, width = fractions.shape
    for step, first, second in ((0, 0, 0), (98, 0, 0), (102, 0.25, 1), (298, 0.25, 1), (302, 0.5, 1), (400, 0.5, 1)):
        column = fractions[:, round(step / 400 * (width - 1))]
        np.testing.assert_allclose(column[: height // 2], first, atol=0.003)
        np.testing.assert_allclose(column[height // 2 :], second, atol=0.003)


# Loggers -------------------------------------------------------------------------------------------------------------


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


DECISION: Any = SimpleNamespace(frozen=FROZEN, variance=VARIANCE, shapes=SHAPES, fractions={"a": 0.75, "b": 0.0})


def test_board_gives_drawings_to_loggers_that_take_them_and_numbers_to_all():
    """When the masks have changed; the heat map also when a quarter more steps have passed, and at the end, once."""
    plain, tensorboard, board = Logger(), Logger(Experiment()), reporting.Board()
    loggers = [plain, tensorboard]
    board.begin(0, None)
    board.log(loggers, 4, {"gcfreeze/x": 1.0})
    assert tensorboard.experiment.histograms == tensorboard.experiment.images == []
    board.log(loggers, 8, {"gcfreeze/x": 2.0}, DECISION, has_changed=True)
    assert plain.metrics == tensorboard.metrics == [(4, {"gcfreeze/x": 1.0}), (8, {"gcfreeze/x": 2.0})]
    assert tensorboard.experiment.histograms == [(f"gcfreeze/log10_variance/{name}", 8) for name in "ab"]
    assert tensorboard.experiment.images == [("gcfreeze/frozen/a", 8), ("gcfreeze/frozen", 8)]
    for step in (9, 10, 11, 12, 13):
        board.log(loggers, step, {}, DECISION)
    board.draw(loggers, 13)
    board.draw(loggers, 14)
    assert tensorboard.experiment.images[2:] == [("gcfreeze/frozen", step) for step in (10, 13, 14)]
    assert len(tensorboard.experiment.histograms) == 2


def test_board_draws_nothing_where_images_cannot_be_compressed(monkeypatch):
    """Histograms are still there."""
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda name: None)
    tensorboard, board = Logger(Experiment()), reporting.Board()
    board.begin(0, None)
    board.log([tensorboard], 8, {}, DECISION, has_changed=True)
    assert tensorboard.experiment.images == []
    assert len(tensorboard.experiment.histograms) == 2


@pytest.mark.parametrize(("optimizer", "prefix"), [(None, ""), (0, ""), (2, "optimizer_2/")])
def test_board_of_one_of_several_optimizers_has_its_index_in_all_tags(optimizer, prefix):
    """Numbers, histograms and images."""
    tensorboard, board = Logger(Experiment()), reporting.Board(optimizer)
    board.begin(0, None)
    board.log([tensorboard], 8, {"gcfreeze/x": 2.0}, DECISION, has_changed=True)
    experiment, ((_, metrics),) = tensorboard.experiment, tensorboard.metrics
    tags = [*metrics, *(tag for tag, _ in experiment.histograms + experiment.images)]
    assert len(tags) == 5
    assert all(tag.startswith(f"gcfreeze/{prefix}") for tag in tags)
