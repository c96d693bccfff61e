"""Masks and fractions as pixels, compared with NumPy."""

from typing import Any

import numpy as np
import pytest
import torch

from lightning_gcfreeze.reporting import images

FROZEN = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor(False)}
SHAPES = {name: mask.shape for name, mask in FROZEN.items()}


def fraction_of(pixels: Any) -> Any:
    """The fraction that a colour stands for, by its red."""
    return (247 - np.asarray(pixels, float)[..., 0]) / (247 - 8)


def test_mask_image_of_a_small_matrix_has_a_pixel_for_each_element():
    ((tag, image),) = images.mask_images(FROZEN, SHAPES, 4)
    assert tag == "a"
    assert image.dtype == np.uint8
    frozen, live = [8, 48, 107], [247, 251, 255]
    assert image.tolist() == [[frozen, live], [frozen, frozen]]


def test_mask_image_of_a_large_matrix_has_the_means_of_its_cells():
    """300 x 200 in 128 x 128 cells of 2 or 3 rows and 1 or 2 columns; all elements count."""
    mask = torch.rand(300, 10, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    ((_, image),) = images.mask_images({"w": mask}, {"w": mask.shape}, 4)
    assert image.shape == (128, 128, 3)
    flat = mask.numpy().reshape(300, 200)
    for i, j in ((0, 0), (5, 77), (64, 3), (127, 127)):
        rows, columns = (slice(k * n // 128, (k + 1) * n // 128) for k, n in ((i, 300), (j, 200)))
        assert fraction_of(image[i, j]) == pytest.approx(flat[rows, columns].mean(), abs=0.003)


def test_mask_images_are_of_the_four_largest_matrices():
    """Vectors and empty matrices have none."""
    shapes = {"v": (999,), "empty": (0, 9), "a": (2, 2), "b": (3, 3), "c": (5, 5), "d": (4, 4), "e": (1, 2, 3)}
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    found = dict(images.mask_images(masks, sizes, 4))
    assert list(found) == ["c", "d", "b", "e"]
    assert found["e"].shape == (1, 6, 3)
    assert list(dict(images.mask_images(masks, sizes, 1))) == ["c"]
    assert dict(images.mask_images(masks, sizes, 0)) == {}


def test_heat_map_has_layers_from_top_to_bottom_and_steps_from_left_to_right():
    """Two layers: nothing until step 100, then 1/4 and 1, from step 300 on 1/2 and 1, until 400."""
    history = [(0, {}), (100, {"a": 0.25, "b": 1.0}), (300, {"a": 0.5, "b": 1.0})]
    fractions = fraction_of(images.heat_map(history, 400))
    height, width = fractions.shape
    for step, first, second in ((0, 0, 0), (98, 0, 0), (102, 0.25, 1), (298, 0.25, 1), (302, 0.5, 1), (400, 0.5, 1)):
        column = fractions[:, round(step / 400 * (width - 1))]
        np.testing.assert_allclose(column[: height // 2], first, atol=0.003)
        np.testing.assert_allclose(column[height // 2 :], second, atol=0.003)


@pytest.mark.parametrize("error", [TypeError, ImportError])
def test_heat_map_has_no_labels_where_pillow_has_no_font(monkeypatch, error):
    """As before version 10.1; training goes on."""

    def without_size(size: float) -> None:
        raise error

    monkeypatch.setattr("PIL.ImageFont.load_default", without_size)
    plain = images.heat_map([(0, {"a": 0.5})], 4)
    assert images.labelled(plain, ["a"], 0, 4) is plain


def test_labels_stand_beside_their_rows_and_steps_below():
    """The heat map is there as it was, and left of it, at the height of each row, something is written."""
    history = [(0, {}), (100, {"a": 0.25, "a.very.long.name.of.a.layer.that.is.cut": 1.0})]
    plain = images.heat_map(history, 400)
    picture = images.labelled(plain, list(history[-1][1]), 0, 400)
    (height, width), left = plain.shape[:2], picture.shape[1] - plain.shape[1]
    assert 60 < left < 250
    np.testing.assert_array_equal(picture[:height, left:], plain)
    for part in (
        picture[: height // 2, :left],
        picture[height // 2 : height, :left],
        picture[height:, left : left + 40],
    ):
        assert part.min() < 128
    assert picture[height:, left + width // 3 : left + width // 2].min() == 255
