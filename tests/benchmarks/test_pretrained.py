"""The study of pre-trained models, without the packages that ship them: its sounds, its search, its tables."""

import json

import numpy as np
import pytest
import torch

from benchmarks.pretrained import __main__ as command
from benchmarks.pretrained import report, sounds, tasks
from benchmarks.pretrained.run import METHODS, Fit


def test_pitch_of_an_ordinary_tone_is_where_its_samples_repeat():
    """By autocorrelation, to a tenth of a semitone or a sample."""
    sound, cents = sounds.tones(40, np.random.default_rng(0), rough=False)
    assert sound.std(1) == pytest.approx(1.0)
    for x, c in zip(sound, cents, strict=True):
        f0 = 10 * 2 ** (c / 1200)
        if f0 > 100:  # enough periods in a frame
            lag = sounds.RATE / f0
            shifted = [float(np.corrcoef(x[:-n], x[n:])[0, 1]) for n in range(1, 300)]
            best = max(range(round(0.7 * lag), round(1.3 * lag)), key=lambda n: shifted[n - 1])
            assert best == pytest.approx(lag, abs=1.5)
            assert shifted[best - 1] > 0.85


def test_rough_tone_has_no_fundamental():
    """And is mostly noise: its strongest partial is not where the pitch is."""
    sound, cents = sounds.tones(200, np.random.default_rng(0), rough=True)
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(sounds.FRAME))) ** 2
    bins = np.rint(10 * 2 ** (cents / 1200) / sounds.RATE * sounds.FRAME).astype(int)
    at_f0 = spectrum[np.arange(200), bins]
    third = spectrum[np.arange(200), 3 * bins]
    assert np.median(third / at_f0) > 2
    plain, cents = sounds.tones(200, np.random.default_rng(0), rough=False)
    spectrum = np.abs(np.fft.rfft(plain * np.hanning(sounds.FRAME))) ** 2
    bins = np.rint(10 * 2 ** (cents / 1200) / sounds.RATE * sounds.FRAME).astype(int)
    assert np.median(spectrum[np.arange(200), bins] / np.median(spectrum, axis=1)) > 50


def test_voice_has_formants_that_a_longer_tract_lowers():
    """The centre of the spectrum of many vowels, at one pitch."""
    draw = np.random.default_rng(0)

    def centre(tract):
        sound = sounds.speech(sounds.Speaker(120.0, tract, 0.3, 0.9), 4.0, draw)
        power = np.abs(np.fft.rfft(sound)) ** 2
        hertz = np.fft.rfftfreq(len(sound), 1 / sounds.RATE)
        return float((power * hertz).sum() / power.sum())

    assert centre(1.2) < 0.92 * centre(0.85)


def test_pitch_accuracy_counts_what_is_within_50_cents():
    cents = torch.tensor(sounds.CENTS[[100, 200]], dtype=torch.float32)
    outputs = torch.zeros(2, 360)
    outputs[0, 102] = outputs[1, 203] = 1.0  # 40 and 60 cents too high
    assert tasks.pitch_accuracy(outputs, cents) == 0.5
    outputs[0, 100] = 9.0
    sharp = torch.full((2, 360), -20.0)
    sharp[0, 99:102], sharp[1, 199:202] = 20.0, 20.0
    assert tasks.pitch_loss(sharp, cents) < tasks.pitch_loss(-sharp, cents)


def test_order_of_similarities_is_kept_by_rotations_alone():
    draw = torch.Generator().manual_seed(0)
    before = torch.nn.functional.normalize(torch.randn(30, 8, generator=draw), dim=1)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=draw))
    other = torch.nn.functional.normalize(torch.randn(30, 8, generator=draw), dim=1)
    assert tasks.similarity(before @ rotation, before, None) == pytest.approx(1.0, abs=1e-4)
    assert abs(tasks.similarity(other, before, None)) < 0.3


class Tiny(torch.nn.Module):
    """A network with a new head, that has learned nothing."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 20), torch.nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.features(x))

    def features(self, x):
        return torch.tanh(self.body(x))


TINY = tasks.Task(
    "tiny", "accuracy", "order", Tiny,
    lambda: tasks.Data(*[(X[rows], Y[rows]) for rows in (slice(0, 60), slice(60, 80), slice(80, 100))], X),
    torch.nn.functional.cross_entropy, tasks.accuracy, tasks.similarity,
    batch_size=10, steps=20, lr=0.01, new_head=True,
)  # fmt: skip
X = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*optimizer steps planned")
def test_methods_train_as_many_elements_of_the_body_as_they_say(method):
    """And the head in any case; all else is the network as it ships, to the bit."""
    fit = Fit(TINY, 0.5, 0.01, 0.01, seed=0, steps=20)
    trained = METHODS[method](fit)
    before, after = fit.module(0.01).state_dict(), trained.module.state_dict()
    assert not torch.equal(after["net.head.weight"], before["net.head.weight"])
    p = 20 * 6 + 20
    if method == "full":
        assert trained.live == p
        return
    assert trained.live == pytest.approx(p / 2, rel=0.5 if method in ("lora", "shira", "random_rows") else 0.0)
    if method in ("from_the_base", "probed", "random", "random_rows", "last_layers"):
        moved = sum(int((after[f"net.body.{n}"] != before[f"net.body.{n}"]).sum()) for n in ("weight", "bias"))
        assert moved == trained.live


def test_search_goes_on_until_the_best_rate_has_worse_neighbours(tmp_path, monkeypatch):
    """A parabola in log rate, with its top far from where the search begins; quality first, then the loss."""
    asked = []

    def kept(name, method, fraction, lr, base, seed, out):
        asked.append(lr)
        return {"val": -abs(np.log(lr / 0.3)), "val_loss": 1.0}

    monkeypatch.setattr(command, "kept", kept)
    monkeypatch.setitem(command.TASKS_BY_NAME, "tiny", TINY)
    found = command.tuned("tiny", "full", 0.0, 0.001, tmp_path)
    assert found == pytest.approx(0.256)
    assert max(asked) == pytest.approx(1.024)
    monkeypatch.setattr(command, "kept", lambda *args: {"left_out": "no rank"})
    assert command.tuned("tiny", "lora", 0.99, 0.001, tmp_path) is None


def test_diverged_runs_are_never_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "kept", lambda n, m, f, lr, *more: {"val": None if lr > 0.02 else lr, "val_loss": 1.0})
    monkeypatch.setitem(command.TASKS_BY_NAME, "tiny", TINY)
    assert command.tuned("tiny", "full", 0.0, 0.001, tmp_path) == pytest.approx(0.016)


def test_gain_is_the_share_of_what_training_all_improves():
    before = {"test": 0.2, "kept": 1.0}
    plain, half = [{"test": 0.9}, {"test": 0.7}], [{"test": 0.5}]
    assert report.gain(before, plain, half) == pytest.approx(0.5)
    run = {"test": 0.5, "kept": 0.9, "live": 5, "shipped": 2e6, "seconds": 3.0, "peak": 2**21, "lr": 0.1}
    monkey = {"full@0.0": [run | {"test": 0.8}], "recommended@0.9": [run], "lora@0.99": [{"left_out": "no rank"}]}
    text = report.of_task("crepe", before, monkey)
    row = next(line for line in text.splitlines() if "in place" in line)
    assert [cell.strip() for cell in row.split("|")[2:9]] == ["0.9", "0.1", "0.500", "0.50", "0.900", "2.00", "1.00"]
    assert "no rank" in text
    headline = report.headline({"crepe": before}, {"crepe": monkey})
    assert "0.50 (0.900)" in headline
    assert json.dumps(monkey)
