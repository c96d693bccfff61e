"""What is drawn is what the summary says."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from examples.paper import figures, tables
from examples.paper.related import RELATED
from examples.paper.run import READINGS, Run
from examples.paper.summary import summarise
from examples.paper.tasks import TASKS, Settings
from lightning_gcfreeze.orderings import ORDERINGS

ORDERS, FRACTIONS = ("variance", "random", "snr"), (0.0, 0.3, 0.6, 1.0)


def made(data, t0=100):
    """A summary of three made-up runs: losses that grow with the fraction, nested frozen sets."""
    rng = np.random.default_rng(t0)
    p = sum(parameter.numel() for parameter in TASKS[data].model().parameters())

    def sets():
        ranks = np.argsort(rng.random(p))
        return [ranks < round(f * p) for f in FRACTIONS]

    def losses():
        steps = (1 + 0.2 * rng.random((3, 4))) * [0, 1, 1, 1]
        return 1.0 + steps.cumsum(1) * [1, 1, 1, 0] + [0, 0, 0, 4.0]  # equal at both ends, as real ones are

    runs = [Run(losses(), losses(), np.array([sets() for _ in ORDERS])) for _ in range(3)]
    return summarise(Settings(data, t0, 200, 32, 0.1, ORDERS, FRACTIONS, seed=0), runs)


@pytest.fixture(scope="module")
def boston():
    return made("boston")


def test_loss_lines_are_the_means_and_two_have_bands(boston):
    for axes, stage in zip(figures.loss(boston, "title").axes, ("train", "test"), strict=True):
        for line, order in zip(axes.lines, ORDERS, strict=True):
            assert line.get_label() == order
            np.testing.assert_array_equal(line.get_xdata(), FRACTIONS)
            np.testing.assert_array_equal(line.get_ydata(), boston["orders"][order][stage]["mean"])
        assert len(axes.collections) == 2
        top = axes.collections[0].get_datalim(axes.transData).y1
        curve = boston["orders"]["variance"][stage]
        assert top == pytest.approx(max(np.add(curve["mean"], curve["std"])))


def test_panels_of_their_own_have_the_order_over_random_and_variance(boston):
    """As many panels as there are orders beside these two; the others of the last row are empty."""
    shown = [axes for axes in figures.multiples(boston, "title").axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["snr"]
    for line, order in zip(shown[0].lines, ("random", "variance", "snr"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), boston["orders"][order]["train"]["mean"])
    curve = boston["orders"]["snr"]["train"]
    top = shown[0].collections[0].get_datalim(shown[0].transData).y1
    assert top == pytest.approx(max(np.add(curve["mean"], curve["std"])))


def test_alpha_is_shown_by_place_and_sorted(boston):
    placed = {"variance": 0, "random": 1}
    panels = figures.alpha(boston, "title").axes
    for order, column in placed.items():
        share = np.array([boston["alpha"][order][str(f)] for f in FRACTIONS]).T
        np.testing.assert_array_equal(panels[column].images[0].get_array(), share)
        ordered = panels[2 + column].images[0].get_array()
        assert all(above.mean() >= below.mean() for above, below in pairwise(ordered))
        np.testing.assert_array_equal(np.sort(ordered.ravel()), np.sort(share.ravel()))


def test_stability_is_drawn_beside_chance(boston):
    overlap, counts = figures.stability(boston, "title").axes
    lines = {line.get_label(): line.get_ydata() for line in overlap.lines}
    assert list(lines) == [
        "variance", "variance, hidden units aligned", "random", "random, hidden units aligned", "chance",
    ]  # fmt: skip
    found = boston["stability"]
    np.testing.assert_array_equal(lines["variance"], [found["variance"][f]["jaccard"] for f in ("0.3", "0.6")])
    np.testing.assert_array_equal(lines["chance"], [found["chance"][f]["jaccard"] for f in ("0.3", "0.6")])
    assert sum(counts.lines[0].get_ydata()) == 301
    linear = figures.stability(made("synthetic3"), "title").axes[0]
    assert [line.get_label() for line in linear.lines] == ["variance", "random", "chance"]


def test_a_scan_draws_the_growth_at_the_middle_by_t0():
    summaries = [made("boston", t0) for t0 in (20, 80)]
    ends, costs = figures.scan(summaries, "title").axes
    for stage, end, line in (("train", -1, 0), ("train", 0, 1), ("test", -1, 2), ("test", 0, 3)):
        values = [summary["orders"]["random"][stage]["mean"][end] for summary in summaries]
        np.testing.assert_array_equal(ends.lines[line].get_ydata(), values)
    drawn = {container.get_label(): container[0].get_xydata().T for container in costs.containers}
    assert list(drawn) == ["variance", "snr"]
    for order, (t0s, growth) in drawn.items():
        assert t0s.tolist() == [20, 80]
        np.testing.assert_allclose(growth, [summary["growth"][order]["train"]["mean"][2] for summary in summaries])


def test_the_legend_of_a_scan_with_many_orders_hides_no_curve():
    """All orders are in it, below both panels and not in one of them."""
    orders = tuple(figures.ALL_STYLES)
    summaries = []
    for t0 in (20, 80):
        one = made("boston", t0)
        growth = dict.fromkeys((order for order in orders if order != "random"), one["growth"]["variance"])
        summaries.append({**one, "growth": growth})
    figure = figures.scan(summaries, "title")
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(orders)
    for axes in figure.axes:
        assert not axes.get_window_extent().overlaps(legend.get_window_extent())
    assert figure.axes[1].get_legend() is None


def _columns(text, heading):
    """The table below a heading of a Markdown text, by its first row."""
    lines = text.split(heading)[1].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    block = rows[: next((i for i, row in enumerate(rows) if i > 1 and row[0] == "frozen"), None)]
    return {name: [row[i] for row in block[2:]] for i, name in enumerate(block[0])}


def test_the_report_puts_published_values_beside_ours():
    summary = made("synthetic3")
    found = _columns(tables.report(summary, "title"), "## Loss, train")
    assert found["random, published"] == ["0.270", "1.10", "2.00", "2.80"]
    mean, std = (summary["orders"]["variance"]["train"][key][1] for key in ("mean", "std"))
    assert found["variance"][1] == f"{mean:#.3g} ± {std:#.3g}"
    assert "published" not in tables.report(made("boston"), "title")


def test_the_report_has_growth_and_differences_with_their_intervals(boston):
    text = tables.report(boston, "title")
    for heading, key in (("## Growth, test", "growth"), ("## Loss minus that of random, test", "paired")):
        found = boston[key]["snr"]["test"]
        low, high = found["interval"][2]
        assert _columns(text, heading)["snr"][2] == f"{found['mean'][2]:#.3g} [{low:#.3g}, {high:#.3g}]"


def test_the_report_ends_its_table_of_growth_with_the_whole_curve(boston):
    columns = _columns(tables.report(boston, "title"), "## Growth, train")
    found = boston["growth_over_curve"]["snr"]["train"]
    low, high = found["interval"]
    assert columns["frozen"][-1] == "curve"
    assert columns["snr"][-1] == f"{found['mean']:#.3g} [{low:#.3g}, {high:#.3g}]"


def test_the_report_says_under_what_settings(boston):
    assert "3 runs, t0 = 100 of 200 steps, S = 32, learning rate 0.1, p = 301, seed 0." in tables.report(boston, "t")
    assert "1000 objects, noise 1" in tables.report(made("synthetic3"), "title")


def test_every_ordering_of_the_experiments_has_a_line_of_its_own():
    assert figures.STYLE.keys() <= ORDERINGS.keys()
    assert list(figures.RELATED_STYLE) == list(RELATED)
    assert list(figures.READING_STYLE) == list(READINGS)
    assert len({style["color"] for style in figures.ALL_STYLES.values()}) == len(figures.ALL_STYLES)
    assert len(figures.ALL_STYLES) == 7 + len(READINGS) + len(RELATED)
