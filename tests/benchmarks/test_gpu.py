"""The command of `benchmarks.gpu`, on very small models and the CPU."""

import itertools
import json
import math
import time

import pytest
import torch
from torch import nn

from benchmarks import gpu
from benchmarks.gpu import command, models, parts, record, timing

CASES = [
    *(f"{name} f={f}, fused AdamW" for name in ("ViT", "GPT2") for f in ("0.9", "0.99")),
    *(f"{name} f={f}" for name in ("M4L", "M2") for f in ("0.9, Adam", "0.9, fused Adam", "0.99, fused Adam")),
]
SHARE = "plain, the CPU's part"
IN_MS, MOST = "step, as a ratio to plain, whose own is in ms", "most memory in a step, the model's included, MiB"


def tables() -> dict[str, tuple[list[str], list[str]]]:
    """Return the cases and ways that every table has to have."""
    names, trained = list(models.DEFAULT), [way for way in parts.FROZEN if way != "plain"]
    moments = [f"{name}, {moment}" for name in names for moment in ("observing", "the freeze", "frozen")]
    return {
        f"Frozen: {IN_MS}": (CASES, [*parts.FROZEN, SHARE]),
        f"Frozen: {MOST}": (CASES, [*parts.FROZEN]),
        "Frozen: optimizer state and indices, as a ratio to plain, whose own is in MiB": (CASES, [*parts.FROZEN]),
        "Frozen: trained parameters, as a ratio to (1 - f) of all": (CASES, trained),
        "Frozen: kernels launched in a step": (CASES, [*parts.LAUNCHING]),
        "Frozen: waits for the device in a step": (CASES, [*parts.LAUNCHING]),
        f"Observed: {IN_MS}": (names, [*parts.OBSERVED, SHARE]),
        f"Observed: {MOST}": (names, [*parts.OBSERVED]),
        "Observed: kernels launched in a step": (names, [*parts.OBSERVED]),
        "Observed: waits for the device in a step": (names, [*parts.OBSERVED]),
        "Selection of the lowest .9: ms, by the number of scores": (["1e+03", "1e+04"], [*parts.SELECTIONS]),
        "Selection: peak extra memory, as a ratio to the scores'": (["1e+03", "1e+04"], [*parts.SELECTIONS]),
        "Trainer: most memory in a step, MiB": (moments, [*parts.IN_MEMORY]),
        f"Trainer: {IN_MS}": (names, [*parts.IN_TRAINER]),
    }


@pytest.mark.slow
def test_each_way_of_each_part_has_a_figure_in_every_table(tmp_path):
    out, figures = tmp_path / "gpu.md", tmp_path / "gpu.json"
    assert gpu.main(["--tiny", "--out", str(out), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found.pop("notes") == []
    assert [*found] == [*tables()]
    for title, (cases, ways) in tables().items():
        assert [*found[title]] == cases, title
        for case, of_ways in found[title].items():
            assert [*of_ways] == ways, (title, case)
            assert all(isinstance(figure, float) and math.isfinite(figure) for figure in of_ways.values()), (
                title,
                case,
            )
    for title in (f"Frozen: {IN_MS}", f"Observed: {IN_MS}", f"Trainer: {IN_MS}"):
        assert all(figure > 0 for of_ways in found[title].values() for figure in of_ways.values())
    trained = found["Frozen: trained parameters, as a ratio to (1 - f) of all"]
    assert all(of_ways["element"] == pytest.approx(1, abs=0.01) for of_ways in trained.values())

    first, *lines = out.read_text(encoding="utf-8").splitlines()
    assert first.startswith(f"CPU, torch {torch.__version__}, `uv run ")
    assert first.endswith("benchmarks.gpu --tiny`")
    rows = [
        line.strip("|").split("|") for line in lines if line.startswith("| ") and not line.startswith(("| |", "| -"))
    ]
    columns = [math.ceil(len(cases) / record.COLUMNS) for cases, _ in tables().values()]
    assert len(rows) == sum(n * len(ways) for n, (_, ways) in zip(columns, tables().values(), strict=True))
    assert all(math.isfinite(float(cell)) for _, *cells in rows for cell in cells)


class Breaks:
    """A plain step that fails after so many calls."""

    def __init__(self, after: int, error: Exception) -> None:
        self.left, self.error = after, error
        self.share, self.state_bytes, self.index_bytes = 1.0, lambda: 0, lambda: 0

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


FEW = ["--parts", "frozen", "--models", "M1", "--fractions", "0.99"]


@pytest.mark.parametrize("tiny", [["--tiny"], ["--device", "cpu"]], ids=" ".join)
@pytest.mark.parametrize("calls", [0, 6], ids=["at its first steps", "while it is timed"])
def test_a_way_that_fails_is_named_and_makes_the_status_of_a_tiny_run_1(monkeypatch, tmp_path, tiny, calls):
    """The other ways have their figures; a run that is for its figures has done what it could."""
    monkeypatch.setattr(parts, "FROZEN", {"plain": parts.FROZEN["plain"], "element": parts.FROZEN["element"]})
    broken = {"row": ValueError("Planted."), "tensor": torch.OutOfMemoryError("Planted.")}
    for way, error in broken.items():
        monkeypatch.setitem(parts.FROZEN, way, ("movement", lambda *_, e=error, **__: Breaks(calls, e)))
    figures = tmp_path / "gpu.json"
    assert gpu.main([*FEW, *tiny, "--json", str(figures)]) == int(tiny == ["--tiny"])
    found = json.loads(figures.read_text(encoding="utf-8"))
    case = "M1 f=0.99, fused Adam"
    steps = found[f"Frozen: {IN_MS}"][case]
    assert (steps["row"], steps["tensor"]) == ("fails", "out of memory")
    assert steps["plain"] > 0
    assert steps["element"] > 0
    assert found["notes"][:2] == [
        f"frozen, {case}, row: ValueError: Planted.",
        f"frozen, {case}, tensor: out of memory",
    ]


@pytest.mark.parametrize("part", command.PARTS)
def test_a_part_that_fails_does_not_end_the_command(monkeypatch, capsys, part):
    def fails(*_):
        raise RuntimeError("Planted.")

    name = {"trainer": "in_trainer", "selection": "select"}.get(part, part)
    monkeypatch.setattr(parts, name, fails)
    assert gpu.main(["--tiny", "--parts", part, "--models", "M1,M2"]) == 1
    assert capsys.readouterr().out.count("RuntimeError: Planted.") == 2


def test_what_would_begin_after_the_budget_is_skipped_and_named(capsys):
    assert gpu.main(["--tiny", "--minutes", "0", "--tests"]) == 0
    out = capsys.readouterr().out
    assert "- tests: skipped, 0 minutes were over" in out
    for part, name in itertools.product(("frozen", "observed", "memory", "trainer"), models.DEFAULT):
        assert f"- {part}, {name}: skipped, 0 minutes were over" in out
    assert "- selection, 1e+03: skipped, 0 minutes were over" in out


@pytest.mark.parametrize("part", ["frozen", "memory", "trainer"])
def test_what_was_measured_before_the_budget_was_over_is_kept(monkeypatch, tmp_path, part):
    """The clock stands on 'late' from a call on that lies amid a piece."""
    calls = itertools.count()
    monkeypatch.setattr(record.Record, "is_late", lambda self: next(calls) >= 5)
    figures = tmp_path / "gpu.json"
    assert gpu.main([*FEW, "--tiny", "--parts", part, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    notes = found.pop("notes")
    assert any("skipped" in note and "element, by variance" in note for note in notes)
    cells = [cell for cases in found.values() for of_ways in cases.values() for cell in of_ways.values()]
    assert {cell for cell in cells if isinstance(cell, str)} == {"skipped"}
    assert any(isinstance(cell, float) for cell in cells)


@pytest.fixture
def nothing() -> record.Record:
    return record.Record(models.TINY, "cpu", ["CPU"], minutes=1.0)


def test_a_peak_is_that_of_the_way_alone(monkeypatch, nothing):
    """The models of earlier ways stay allocated, and do not count."""
    meter = {"now": 100.0, "most": 900.0}
    monkeypatch.setattr(timing, "allocated", lambda: meter["now"] * timing.MIB)
    monkeypatch.setattr(timing, "restart_peak", lambda: meter.update(most=meter["now"]))
    monkeypatch.setattr(timing, "peak", lambda: meter["most"] * timing.MIB)

    def takes(own: float, passing: float):
        def maker(model, batch):
            meter["now"] += own
            return lambda: meter.update(most=max(meter["most"], meter["now"] + passing))

        return maker

    makers = {"plain": takes(7, 5), "row": takes(3, 2)}
    _, _, peaks = timing.built(nothing, "here", makers, nn.Linear(1, 1), (torch.ones(1), torch.ones(1)))
    assert peaks == {"plain": 12, "row": 5}


def test_tests_are_counted_and_failed_ones_named(nothing, tmp_path):
    path = tmp_path / "test_three.py"
    path.write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n")
    command.run_tests(nothing, path)
    assert "test_three.py: 1 failed, 1 passed, 1 skipped" in nothing.text()
    assert any("test_b" in note for note in nothing.notes)
    assert nothing.has_failed


def test_tests_take_at_most_half_of_the_time(nothing, tmp_path):
    path = tmp_path / "test_long.py"
    path.write_text("import time\ndef test_a(): time.sleep(60)\n")
    nothing.minutes = 0.05
    start = time.perf_counter()
    command.run_tests(nothing, path)
    assert time.perf_counter() - start < 20
    assert "test_long.py: not finished in" in nothing.text()


def test_files_are_no_part_of_the_command_that_is_named(tmp_path, capsys):
    arguments = ["--tiny", "--minutes", "0", "--json", str(tmp_path / "a"), f"--out={tmp_path / 'b'}"]
    assert gpu.main(arguments) == 0
    assert (tmp_path / "b").read_text(encoding="utf-8").splitlines()[0].endswith("benchmarks.gpu --tiny --minutes 0`")


def test_unknown_parts_and_models_are_refused(capsys):
    for arguments, text in ((["--parts", "speed"], "unknown speed"), (["--models", "M9,M2"], "unknown M9;")):
        with pytest.raises(SystemExit):
            gpu.main(["--tiny", *arguments])
        assert text in capsys.readouterr().err


def test_the_models_have_the_parameters_of_those_they_stand_for():
    """ViT-B/16's 86.6 million; GPT-2's 124.4 without 0.8 of places, and with a head and its bias of 38.6 and 0.05."""
    assert models.MODELS["ViT"].n_parameters() == 86_567_656
    assert models.MODELS["GPT2"].n_parameters() == 124_439_808 - 1024 * 768 + 50257 * 769
    assert {*models.DEFAULT} <= {*models.TINY} == {*models.MODELS}
