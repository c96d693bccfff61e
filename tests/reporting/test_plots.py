"""Plots, by what matplotlib was told to draw."""

import sys

import matplotlib as mpl
import numpy as np
import pytest

from lightning_gcfreeze.reporting import plot_frozen, plot_mask

HISTORY = [(0, {}), (100, {"a": 0.25, "b": 1.0}), (300, {"a": 0.5, "b": 1.0})]


@pytest.fixture(autouse=True)
def _without_a_window():
    mpl.use("Agg")
    yield
    mpl.pyplot.close("all")


def test_frozen_fractions_are_cells_between_the_steps_of_changes():
    """The first layer is on top."""
    ax = plot_frozen(HISTORY, 400)
    (mesh,) = ax.collections
    np.testing.assert_array_equal(mesh.get_array(), [[0.0, 0.25, 0.5], [0.0, 1.0, 1.0]])
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 100, 300, 400])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.yaxis_inverted()
    assert mesh.get_clim() == (0.0, 1.0)
    ax.figure.canvas.draw()


def test_masks_given_and_changed_at_the_last_step_are_cells_as_well():
    ax = plot_frozen([(0, {"a": 0.5})], 0)
    np.testing.assert_array_equal(ax.collections[0].get_coordinates()[0, :, 0], [0, 1])
    ax = plot_frozen([(0, {}), (9, {"a": 0.5})], 9)
    np.testing.assert_array_equal(ax.collections[0].get_coordinates()[0, :, 0], [0, 9, 10])


@pytest.mark.parametrize(("shape", "drawn"), [((3, 4), (3, 4)), ((3, 2, 2), (3, 4)), ((5,), (1, 5)), ((), (1, 1))])
def test_mask_is_drawn_as_rows_and_columns(shape, drawn):
    """In the order of the parameter; the title says how much is frozen."""
    mask = np.random.default_rng(0).random(shape) < 0.5
    ax = plot_mask(mask, "layer.weight")
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), mask.reshape(drawn))
    assert ax.get_title() == f"layer.weight: {mask.mean():.1%} frozen"
    ax.figure.canvas.draw()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_mask_without_elements_is_an_empty_plot(shape):
    ax = plot_mask(np.zeros(shape, bool), "w")
    assert not ax.images
    assert ax.get_title() == "w: 0.0% frozen"
    ax.figure.canvas.draw()


def test_names_may_be_long_and_have_dollars():
    """The plot keeps most of the width, and no name is a formula."""
    name = "base_model.model.encoder.layers.11.attention.self.query.lora_A.default.$weight_$1"
    ax = plot_frozen([(0, {name: 0.5, "$": 1.0})], 8)
    ax.figure.canvas.draw()
    assert ax.get_position().width > 0.3
    assert ax.get_yticklabels()[0].get_text().endswith(r"lora_A.default.\$weight_\$1")
    plot_mask(np.eye(2) > 0, name).figure.canvas.draw()


def test_plotting_twice_leaves_the_first_layer_on_top():
    _, ax = mpl.pyplot.subplots()
    plot_frozen(HISTORY, 400, ax)
    plot_frozen(HISTORY, 400, ax)
    assert ax.yaxis_inverted()


def test_plots_go_on_axes_that_are_given():
    _, (left, right) = mpl.pyplot.subplots(1, 2)
    assert plot_frozen(HISTORY, 400, left) is left
    assert plot_mask(np.eye(3) > 0, "w", right) is right
    assert len(mpl.pyplot.get_fignums()) == 1


def test_plots_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (lambda: plot_frozen(HISTORY, 400), lambda: plot_mask(np.eye(2) > 0, "w")):
        with pytest.raises(ImportError, match="pip install matplotlib`, or the extra `plot` of lightning-gcfreeze"):
            plot()
