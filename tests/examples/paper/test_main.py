"""The command from outside: what it writes, what it refuses, and that it goes on where it stopped."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from examples.paper import study
from examples.paper.__main__ import main
from examples.paper.figures import STYLE
from examples.paper.related import RELATED
from examples.paper.run import prepare, run
from examples.paper.tasks import TASKS, Settings

TINY = ["--runs", "2", "--t0", "4", "--steps", "9", "--lr", "0.02", "--seed", "5", "--jobs", "1"]
OPTIONS = [*TINY, "--fractions", "0.5", "--orders", "second_moment"]


def call(*argv):
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(argument) for argument in argv])
    return printed.getvalue()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("paper")
    return out, call("boston", *OPTIONS, "--out", out)


def test_json_has_the_numbers_of_the_runs(written):
    found = json.loads((written[0] / "boston.json").read_text())
    settings = Settings("boston", 4, 9, 32, 0.02, ("variance", "random", "second_moment"), (0.0, 0.5, 1.0), seed=5)
    runs = [run(settings, index) for index in (0, 1)]
    assert found["fractions"] == [0, 0.5, 1]
    assert list(found["orders"]) == ["variance", "random", "second_moment"]
    assert (found["t0"], found["steps"], found["batch_size"], found["lr"], found["runs"]) == (4, 9, 32, 0.02, 2)
    for i, curves in enumerate(found["orders"].values()):
        for stage in ("train", "test"):
            assert curves[stage]["runs"] == [getattr(one, stage)[i].tolist() for one in runs]
            np.testing.assert_allclose(curves[stage]["mean"], np.mean(curves[stage]["runs"], axis=0))
    assert np.array(found["alpha"]["variance"]["0.5"]).sum() == pytest.approx(150)  # half of 301, to even


def test_markdown_has_the_numbers_of_the_json(written):
    found = json.loads((written[0] / "boston.json").read_text())
    text = (written[0] / "boston.md").read_text()
    row = next(line for line in text.split("## ")[1].splitlines() if line.startswith("| 0.5 |"))
    means = [curves["train"]["mean"][1] for curves in found["orders"].values()]
    assert [float(cell.split("±")[0]) for cell in row.strip("| ").split("|")[1:]] == [round(m, 3) for m in means]


@pytest.mark.parametrize("picture", ["loss", "alpha", "stability"])
def test_figures_are_written(written, picture):
    pixels = imread(written[0] / f"boston_{picture}.png")
    assert min(pixels.shape[:2]) > 300
    assert pixels.min() < 0.5 < pixels.max()
    assert f"_{picture}.png" in written[1]


def test_second_call_computes_nothing(written, monkeypatch):
    before = (written[0] / "boston.json").read_bytes()
    monkeypatch.setattr(study, "run", lambda *_: pytest.fail("computed again"))
    assert "second_moment" in call("boston", *OPTIONS, "--out", written[0])
    assert (written[0] / "boston.json").read_bytes() == before


def test_interrupted_command_says_how_to_resume(tmp_path, monkeypatch):
    def interrupted(settings, index):
        if index:
            raise KeyboardInterrupt
        return run(settings, index)

    monkeypatch.setattr(study, "run", interrupted)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit, match="130"):
        main(["boston", *OPTIONS, "--out", str(tmp_path)])
    assert "the same command goes on from there" in " ".join(printed.getvalue().split())
    assert [path.name for path in tmp_path.rglob("*.*")] == ["run000.npz"]
    computed = []
    monkeypatch.setattr(study, "run", lambda settings, index: computed.append(index) or run(settings, index))
    call("boston", *OPTIONS, "--out", tmp_path)
    assert computed == [1]


def test_a_scan_trains_as_long_after_every_t0(tmp_path):
    options = ["--runs", "2", "--steps", "5", "--lr", "0.02", "--jobs", "1", "--fractions", "0.5"]
    printed = call("synthetic3", *options, "--scan-t0", "6, 2", "--out", tmp_path)
    found = json.loads((tmp_path / "synthetic3_t0.json").read_text())
    assert [(one["t0"], one["steps"]) for one in found] == [(2, 7), (6, 11)]
    ends = [[one["orders"]["random"]["train"]["mean"][end] for one in found] for end in (0, -1)]
    assert ends[1][0] > ends[1][1] > ends[0][1]  # more training before the freeze, less that it costs
    rows = (tmp_path / "synthetic3_t0.md").read_text().splitlines()[-2:]
    assert [row.split("|")[1].strip() for row in rows] == ["2", "6"]
    assert imread(tmp_path / "synthetic3_t0.png").shape[0] > 300
    assert "synthetic3_t0" in printed


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """From a command line to the units that it would compute."""

    class Planned(Exception):
        pass

    def stop(units, out):
        raise Planned(units)

    def plan(*argv):
        with pytest.raises(Planned) as caught:
            call(*argv, "--out", tmp_path)
        return caught.value.args[0]

    monkeypatch.setattr(study, "missing", stop)
    return plan


def test_all_are_the_five_experiments_with_their_own_settings(planned):
    units = planned("all")
    assert [(settings.data, index) for settings, index in units] == [(name, i) for name in TASKS for i in range(25)]
    for settings, _ in units:
        task = TASKS[settings.data]
        assert (settings.t0, settings.steps, settings.lr) == (task.t0, task.steps, task.lr)
        assert settings.fractions == tuple(i / 10 for i in range(11))
        assert len(settings.orders) == 7


def test_quick_is_five_runs_of_five_fractions_unless_told_otherwise(planned):
    units = planned("mnist", "--quick")
    assert [index for _, index in units] == [0, 1, 2, 3, 4]
    assert units[0][0].fractions == (0, 0.25, 0.5, 0.75, 1)
    units = planned("mnist", "--quick", "--runs", "3", "--fractions", "0.1, 0.2")
    assert [(index, settings.fractions) for settings, index in units] == [(i, (0, 0.1, 0.2, 1)) for i in range(3)]


def test_every_option_reaches_the_settings(planned):
    options = "--t0 7 --steps 9 --batch-size 16 --lr 0.5 --seed 11 --orders snr --objects 90 --noise 0.25 --same-data"
    (settings, _), _ = planned("synthetic1", *options.split(), "--fractions", "0.5", "--runs", "2")
    orders = ("variance", "random", "snr")
    assert settings == Settings("synthetic1", 7, 9, 16, 0.5, orders, (0, 0.5, 1), 11, 90, 0.25, True)


def test_of_all_only_the_synthetic_ones_have_objects_and_noise(planned):
    units = planned("all", "--objects", "90", "--noise", "0.25", "--runs", "2")
    found = {settings.data: (settings.objects, settings.noise) for settings, _ in units}
    real, regression = (1000, 1.0), (90, 0.25)
    assert found == {
        "boston": real, "mnist": real, "synthetic1": regression, "synthetic2": (90, 1.0), "synthetic3": regression,
    }  # fmt: skip


def test_a_scan_without_values_takes_the_tasks_four(planned):
    units = planned("boston", "--scan-t0", "--runs", "2")
    assert [settings.t0 for settings, _ in units] == sorted([*TASKS["boston"].scan] * 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["iris"], "invalid choice: 'iris'"),
        (["boston", "--orders", "variance,hessian"], "got hessian"),
        (["boston", "--fractions", "0.5,1.5"], r"must lie in \[0, 1\], got 1.5"),
        (["boston", "--fractions", "nan"], r"must lie in \[0, 1\], got nan"),
        (["boston", "--runs", "1"], "must be at least 2, got 1"),
        (["boston", "--t0", "0"], "must be at least 1, got 0"),
        (["boston", "--lr", "inf"], "must be .*, got inf"),
        (["boston", "--lr", "0"], "must be .*, got 0"),
        (["all", "--t0", "500", "--steps", "500"], "--steps 500 leaves boston none after t0 = 500"),
        (["boston", "--batch-size", "1"], "must be at least 2, got 1"),
        (["boston", "--fractions", "0,1"], "name at least one between them, got 0,1"),
        (["boston", "--fractions", "half"], "invalid list of fractions value: 'half'"),
        (["--scan-t0", "boston"], "invalid list of steps value: 'boston'"),
        (["boston", "--scan-t0", "5", "--t0", "7"], "--t0 7 and --scan-t0"),
        (["boston", "--prune", "--t0", "7"], "leave out --t0 and --scan-t0"),
        (["boston", "--prune", "--scan-t0"], "leave out --t0 and --scan-t0"),
        (["boston", "--noise", "0.5"], "--noise is not for boston"),
        (["synthetic2", "--noise", "0.5", "--objects", "2000"], "--noise is not for synthetic2"),
        (["boston", "--seed", "99999999999"], "must be from 0 to 1073741824, got 99999999999"),
        (["boston", "--out", __file__], "--out: .*exists"),
        (["boston", "--jobs", "two"], "invalid int value: 'two'"),
    ],
)
def test_invalid_option_is_refused_by_name(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_related_orders_are_added_on_request_where_they_fit(planned):
    """Those that need a matrix of all parameters only where these are few."""
    units = planned("all", "--related", "--runs", "2")
    orders = {settings.data: settings.orders for settings, _ in units}
    for data in ("boston", "synthetic2", "synthetic3"):
        assert orders[data] == (*STYLE, *RELATED)
    assert RELATED.keys() - set(orders["synthetic1"]) == {"belsley_noise", "belsley_laplace"}
    assert RELATED.keys() - set(orders["mnist"]) == {
        "belsley_noise", "belsley_laplace", "obs", "obd_freeze", "obs_freeze",
    }  # fmt: skip
    (settings, _), _ = planned("boston", "--orders", "obs,snr", "--runs", "2")
    assert settings.orders == ("variance", "random", "snr", "obs")


def test_pruning_takes_its_scores_after_the_last_step(planned):
    (settings, _), _ = planned("boston", "--prune", "--steps", "30", "--runs", "2")
    assert settings.prune
    assert settings.t0 == settings.steps == 30
    (settings, _), _ = planned("boston", "--runs", "2")
    assert not settings.prune


def test_pruning_is_written_beside_freezing_and_says_what_it_left_out(tmp_path):
    options = ["--runs", "2", "--steps", "6", "--jobs", "1", "--fractions", "0.5", "--orders", "obd,belsley_laplace"]
    printed = " ".join(call("synthetic1", "--prune", *options, "--out", tmp_path).split())
    found = json.loads((tmp_path / "synthetic1_prune.json").read_text())
    assert list(found["orders"]) == ["variance", "random", "obd"]
    assert list(found["left_out"]) == ["belsley_laplace"]
    text = (tmp_path / "synthetic1_prune.md").read_text()
    sentence = (
        "belsley_laplace is left out: it decomposes a 4,041 x 4,041 matrix anew after each of its parameters,"
        " and 1,000 is the most for that."
    )
    for report in (text, printed):
        assert sentence in report
    assert "set to zero after 6 steps" in text
    assert "| pruned | variance | random | obd |" in text
    assert "frozen" not in text + printed
    assert "pruned after step 6" in printed
    for picture in ("loss", "alpha", "stability"):
        assert imread(tmp_path / f"synthetic1_prune_{picture}.png").shape[0] > 300
    at_zero = [curves["train"]["runs"][1][-1] for curves in found["orders"].values()]
    y = prepare(Settings("synthetic1", 6, 6, 32, 1e-3, (), (), seed=0), 1).train.tensors[1]
    assert at_zero == pytest.approx([float(y.square().mean())] * 3)  # a network without weights returns 0
