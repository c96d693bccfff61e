"""Files of runs: the same bits by any number of processes, nothing computed twice, nothing half done."""

from dataclasses import replace

import numpy as np
import pytest

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
    alone = list(study.compute(units, jobs=1, out=tmp_path / "one"))
    side_by_side = list(study.compute(units, jobs=2, out=tmp_path / "two"))
    assert alone == units == sorted(side_by_side, key=lambda unit: unit[1])
    one, two = (study.load(SHORT, 3, tmp_path / folder) for folder in ("one", "two"))
    assert all(map(equal, one, two))
    assert not equal(one[0], one[1])


def test_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    """Also with more runs than before; but with any other setting."""
    computed = []

    def fake(settings, index):
        computed.append((settings, index))
        return Run(np.array([[index]]), np.array([[settings.t0]]), np.array([[[index == 0]]]))

    monkeypatch.setattr(study, "run", fake)
    units = [(SHORT, index) for index in range(3)]
    assert list(study.compute(units[:1], 1, tmp_path)) == units[:1]
    assert list(study.compute(units, 1, tmp_path)) == units
    assert computed == units
    assert [run.train.item() for run in study.load(SHORT, 3, tmp_path)] == [0, 1, 2]
    for change in ({"t0": 3}, {"lr": 0.02}, {"fractions": (0.0, 1.0)}, {"seed": 1}, {"same_data": True}):
        other = replace(SHORT, **change)
        assert list(study.compute([(other, 0)], 1, tmp_path)) == [(other, 0)]
    assert len(computed) == 8
    assert study.load(replace(SHORT, t0=3), 1, tmp_path)[0].test.item() == 3


def test_an_interrupted_run_leaves_nothing_and_the_finished_ones_stay(tmp_path, monkeypatch):
    done, computed = Run(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1, 1), bool)), []

    def interrupted(settings, index):
        if index == 1:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(study, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(study.compute([(SHORT, index) for index in range(3)], 1, tmp_path))
    (finished,) = files(tmp_path)
    assert finished.name == "run000.npz"
    monkeypatch.setattr(study.np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        list(study.compute([(SHORT, 2)], 1, tmp_path))
    assert [path.name for path in files(tmp_path)] == ["run000.npz", "run002.tmp"]
    monkeypatch.undo()
    monkeypatch.setattr(study, "run", lambda settings, index: computed.append(index) or done)
    list(study.compute([(SHORT, index) for index in range(3)], 1, tmp_path))
    assert computed == [1, 2]  # what was broken off was not taken for a result


@pytest.mark.slow
def test_an_error_in_another_process_comes_back(tmp_path):
    wrong = replace(SHORT, orders=("alphabetical",))
    with pytest.raises(ValueError, match="alphabetical"):
        list(study.compute([(wrong, 0), (wrong, 1)], 2, tmp_path))
    assert files(tmp_path) == []
