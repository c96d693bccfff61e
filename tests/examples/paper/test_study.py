"""Files of runs: the same bits by any number of processes, nothing computed twice, nothing half done."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.paper import study
from examples.paper.run import Run
from examples.paper.tasks import Settings

SHORT = Settings(
    "synthetic3",
    t0=2,
    steps=4,
    batch_size=32,
    lr=1e-2,
    orders=("variance", "random"),
    fractions=(0.0, 0.5, 1.0),
    seed=0,
)


def files(out):
    return sorted(path for path in out.rglob("*") if path.is_file())


def equal(one, other):
    return all(np.array_equal(getattr(one, field), getattr(other, field)) for field in ("train", "test", "frozen"))


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(tmp_path):
    units = [(SHORT, index) for index in range(3)]
    torch.set_num_threads(2)  # of this process: a worker sets its own, and so does a computation without workers
    side_by_side = list(study.compute(units, jobs=2, out=tmp_path / "two"))
    assert torch.get_num_threads() == 2
    alone = list(study.compute(units, jobs=1, out=tmp_path / "one"))
    assert torch.get_num_threads() == 1
    assert alone == units == sorted(side_by_side, key=lambda unit: unit[1])
    one, two = (study.load(SHORT, 3, tmp_path / folder) for folder in ("one", "two"))
    assert all(map(equal, one, two))
    assert not equal(one[0], one[1])


def test_runs_with_a_file_are_not_computed_again(tmp_path, monkeypatch):
    """Also if more runs are asked for; with any other setting they are."""
    computed = []

    def fake(settings, index):
        computed.append((settings, index))
        return Run(np.array([[index]]), np.array([[settings.t0]]), np.array([[[index == 0]]]))

    monkeypatch.setattr(study, "run", fake)
    units = [(SHORT, index) for index in range(3)]
    assert list(study.compute(units[:1], 1, tmp_path)) == units[:1]
    assert study.missing(units, tmp_path) == units[1:]
    assert list(study.compute(units[1:], 1, tmp_path)) == units[1:]
    assert study.missing(units, tmp_path) == []
    assert computed == units
    assert [run.train.item() for run in study.load(SHORT, 3, tmp_path)] == [0, 1, 2]
    for change in ({"t0": 3}, {"lr": 0.02}, {"fractions": (0.0, 1.0)}, {"seed": 1}, {"same_data": True}):
        other = replace(SHORT, **change)
        assert study.missing([(other, 0)], tmp_path) == list(study.compute([(other, 0)], 1, tmp_path)) == [(other, 0)]
    assert study.load(replace(SHORT, t0=3), 1, tmp_path)[0].test.item() == 3


def test_interrupted_run_leaves_no_file_and_finished_ones_stay(tmp_path, monkeypatch):

    def interrupted(settings, index):
        if index == 1:
            raise KeyboardInterrupt
        return Run(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1, 1), bool))

    monkeypatch.setattr(study, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(study.compute([(SHORT, index) for index in range(3)], 1, tmp_path))
    (finished,) = files(tmp_path)
    assert finished.name == "run000.npz"
    monkeypatch.setattr(study.np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        list(study.compute([(SHORT, 2)], 1, tmp_path))
    assert study.missing([(SHORT, index) for index in range(3)], tmp_path) == [(SHORT, 1), (SHORT, 2)]


@pytest.mark.slow
def test_error_in_a_worker_is_raised_in_the_main_process(tmp_path):
    wrong = replace(SHORT, orders=("alphabetical",))
    with pytest.raises(ValueError, match="alphabetical"):
        list(study.compute([(wrong, 0), (wrong, 1)], 2, tmp_path))
    assert files(tmp_path) == []


def test_runs_are_computed_again_when_the_code_changes(tmp_path, monkeypatch):
    """The sources that a run is computed by are part of its file's name."""
    done = Run(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1, 1), bool))
    monkeypatch.setattr(study, "run", lambda *_: done)
    list(study.compute([(SHORT, 0)], 1, tmp_path))
    sources = [path for pattern in study._SOURCES for path in Path(study.__file__).parents[2].glob(pattern)]
    assert {
        "callback.py",
        "lowest.py",
        "diagonal.py",
        "restore.py",
        "data.py",
        "models.py",
        "run.py",
        "tasks.py",
    } <= {path.name for path in sources}
    changed = tmp_path / "orderings.py"
    changed.write_text("another ordering")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [changed])
    study._code.cache_clear()
    assert study.missing([(SHORT, 0)], tmp_path) == [(SHORT, 0)]
    monkeypatch.undo()
    study._code.cache_clear()
    assert study.missing([(SHORT, 0)], tmp_path) == []


@pytest.mark.parametrize("library", ["torch", "pl", "np", "scipy", "sklearn"])
def test_runs_are_computed_again_with_another_version_of_a_library(library, tmp_path, monkeypatch):
    before = study._file(tmp_path, SHORT, 0)
    study._code.cache_clear()
    assert study._file(tmp_path, SHORT, 0) == before
    monkeypatch.setattr(getattr(study, library), "__version__", "0.0.0")
    study._code.cache_clear()
    changed = study._file(tmp_path, SHORT, 0)
    study._code.cache_clear()
    assert changed != before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "examples.paper",
        "boston",
        "--steps",
        "100000",
        "--jobs",
        "2",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(group := members_of(process.pid)) < 4 and time.monotonic() < deadline:  # itself, server, two workers
            time.sleep(0.5)
        assert len(group) >= 4
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while members_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert members_of(process.pid) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def members_of(session):
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found
