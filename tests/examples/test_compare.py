"""The main job, short: what it prints, logs and draws, read from outside."""

import contextlib
import io

import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.compare import TASKS, Run, _fresh_logger, main, plot, table

# Pixels that are dark in all digits, units that are dead in a few steps: the callback is right to say so.
pytestmark = pytest.mark.filterwarnings("ignore:.* never had a gradient")

RUNS = {
    "variance": Run({"weight": (1, 1000), "bias": (2, 4)}, metric=0.25, seconds=1.0),
    "random": Run({"weight": (3, 1000), "bias": (0, 4)}, metric=0.5, seconds=2.0),
    None: Run({"weight": (0, 1000), "bias": (0, 4)}, metric=0.125, seconds=3.0),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder and the printed text of ``--quick``: 40 steps, the freeze after 20."""
    out = tmp_path_factory.mktemp("compare")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["--quick", "--out", str(out)])
    return out, printed.getvalue()


def _logged(out, task, twin):
    """``{tag: {step: value}}`` of a run's event files."""
    events = EventAccumulator(str(out / task / twin)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "fraction"), [("mnist", 0.8), ("boston", 241 / 301)])
def test_twins_are_equal_until_the_freeze_and_differ_afterwards(quick, task, fraction):
    variance, random, unfrozen = (_logged(quick[0], task, twin) for twin in ("variance", "random", "unfrozen"))
    losses = [twin["train/loss"] for twin in (variance, random, unfrozen)]
    assert losses[0].keys() == {9, 19, 29, 39}
    for step in (9, 19):
        assert losses[0][step] == losses[1][step] == losses[2][step]
    assert len({twin[39] for twin in losses}) == 3
    for twin in (variance, random):
        frozen = twin["gcfreeze/frozen_fraction"]
        assert {frozen[step] for step in frozen if step < 19} == {0.0}
        assert frozen[39] == pytest.approx(fraction)
    assert not [tag for tag in unfrozen if tag.startswith("gcfreeze")]


@pytest.mark.slow
def test_training_metrics_do_not_count_the_callbacks_replays(quick):
    """Boston's first epoch is 12 steps, all observed."""
    variance, unfrozen = (_logged(quick[0], "boston", twin) for twin in ("variance", "unfrozen"))
    for tag in ("train/mse", "train/mae", "train/r2"):
        assert variance[tag][11] == unfrozen[tag][11]


@pytest.mark.slow
def test_the_printed_table_has_the_counts_and_the_logged_test_metrics(quick):
    out, printed = quick
    lines = printed.splitlines()
    (mnist,) = (line for line in lines if "frozen in all" in line and "7,960" in line)
    (boston,) = (line for line in lines if "frozen in all" in line and "301" in line)
    assert [cell.strip() for cell in mnist.split("│")[2:5]] == ["6,368 of 7,960", "6,368 of 7,960", "0 of 7,960"]
    assert [cell.strip() for cell in boston.split("│")[2:5]] == ["241 of 301", "241 of 301", "0 of 301"]
    for task, metric in (("mnist", "accuracy"), ("boston", "mse")):
        (line,) = (line for line in lines if f"test {metric}" in line)
        logged = [_logged(out, task, twin)[f"test/{metric}"] for twin in ("variance", "random", "unfrozen")]
        assert [cell.strip() for cell in line.split("│")[2:5]] == [f"{v:.4f}" for (v,) in (t.values() for t in logged)]
    assert f"tensorboard --logdir {out}" in printed


@pytest.mark.slow
def test_figure_is_written_where_the_output_says(quick):
    out, printed = quick
    assert f"Picture: {out / 'frozen_per_layer.png'}" in printed
    pixels = imread(out / "frozen_per_layer.png")
    assert pixels.shape[1] > pixels.shape[0] > 400
    assert pixels.min() < 0.5 < pixels.max()


def test_table_has_a_row_for_each_tensor_and_their_sum():
    console = Console(file=io.StringIO(), width=100)
    console.print(table(TASKS[0], RUNS))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    assert [row for row in rows if row] == [
        ["frozen of weight", "1 of 1,000", "3 of 1,000", "0 of 1,000"],
        ["frozen of bias", "2 of 4", "0 of 4", "0 of 4"],
        ["frozen in all", "3 of 1,004", "3 of 1,004", "0 of 1,004"],
        ["test accuracy", "0.2500", "0.5000", "0.1250"],
        ["seconds", "1.0", "2.0", "3.0"],
    ]


def test_bars_are_fractions_of_each_tensor_side_by_side():
    panels = plot({"one": RUNS, "two": RUNS}, t0=7).axes
    assert [panel.get_title() for panel in panels] == ["one", "two"]
    for panel in panels:
        variance, random = panel.containers
        assert [bar.get_height() for bar in variance] == [0.001, 0.5]
        assert [bar.get_height() for bar in random] == [0.003, 0.0]
        for left, right in zip(variance, random, strict=True):
            assert left.get_x() + left.get_width() == pytest.approx(right.get_x())


def test_second_call_replaces_the_curves_of_the_first_only(tmp_path):
    folder = tmp_path / "mnist" / "random"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1.host").touch()
    (folder / "notes.txt").touch()
    assert _fresh_logger(tmp_path, "mnist/random").log_dir.rstrip("/") == str(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
