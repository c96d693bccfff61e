"""The tenants' training: one base, one mask, and comparisons at equal counts."""

import pytest
import torch

from examples.tenants import __main__ as command
from examples.tenants import data, encoder, tune
from examples.tenants.training import RATES, Fit, Result, accuracy, run, write_mask
from lightning_gcfreeze import apply_delta, delta, masks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    file = tmp_path_factory.mktemp("tenants") / "mask.pt"
    write_mask(file)
    return file


@pytest.fixture(scope="module")
def trained(mask):
    """Three steps of two tenants: {tenant: (result, file of the delta)}."""
    found = {}
    for tenant in ("peft", "pytest"):
        file = mask.parent / f"{tenant}.safetensors"
        found[tenant] = run(Fit(tenant, "ours", RATES["ours"], mask, file, steps=3)), file
    return found


def test_texts_are_the_same_in_every_call_and_none_is_in_both_splits():
    first = data.texts("peft")
    data.texts.cache_clear()
    assert data.texts("peft") == first
    train, test = data.splits("peft")
    rows = [tuple(row) for row in torch.cat([train.x, test.x]).tolist()]
    assert len(set(rows)) == len(rows) == len(encoder.KINDS) * (data.TRAIN + data.TEST)
    for split, count in ((train, data.TRAIN), (test, data.TEST)):
        assert split.y.bincount().tolist() == [count] * len(encoder.KINDS)


def test_texts_have_the_kind_of_what_they_stand_in(tmp_path, monkeypatch):
    """Of docstrings and raised messages that are long enough; what is private counts by where it is."""
    source = '''
class A(Exception):
    """A class with a docstring, long enough."""

    def _a(self):
        """A method with a docstring, long enough."""
        def inside():
            """A function within a method, long enough."""
        raise ValueError(f"A message of {inside} that is long enough.")

def short():
    """Too short."""
    raise A("A message without any names in it.", 1) from None
'''
    (tmp_path / "tests").mkdir()
    (tmp_path / "module.py").write_text(source)
    (tmp_path / "tests" / "test_module.py").write_text(source.replace("enough", "too much"))
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "__init__.py"
    package.write_text("")
    monkeypatch.setattr(data, "find_spec", lambda name: type("Spec", (), {"origin": str(package)}))
    assert set(data.sources("made")) == {
        ("class", "A class with a docstring, long enough."),
        ("method", "A method with a docstring, long enough."),
        ("function", "A function within a method, long enough."),
        ("error", "A message of … that is long enough."),
        ("error", "A message without any names in it."),
    }


def test_tenants_that_choose_rates_are_not_reported():
    assert not data.TENANTS.keys() & data.TUNING.keys()
    assert not set(data.TENANTS.values()) & set(data.TUNING.values())
    assert len(data.TENANTS) >= 12


def test_rates_in_use_were_tried_between_others():
    for method, rate in RATES.items():
        assert min(tune.TRIED[method]) < rate < max(tune.TRIED[method])


@pytest.mark.slow
def test_base_outside_the_mask_is_the_shipped_encoder_to_the_bit(mask, trained):
    frozen = masks.load(mask)
    shipped, tuned = encoder.base().state_dict(), encoder.base()
    apply_delta(tuned, trained["peft"][1])
    moved = 0
    for name, p in tuned.state_dict().items():
        before, now = shipped[name].view(torch.int32), p.view(torch.int32)
        held = frozen.get(name, torch.zeros(p.shape, dtype=torch.bool))
        assert torch.equal(before[held], now[held])
        moved += int((before[~held] != now[~held]).sum())
    assert moved > 10_000
    assert accuracy(tuned, data.splits("peft")[1]) == trained["peft"][0].accuracy


@pytest.mark.slow
def test_deltas_of_all_tenants_have_the_same_places_and_other_values(trained):
    one, other = (delta.load(file) for _, file in trained.values())
    assert one.keys() == other.keys()
    places = [name for name in one if name.endswith((":elements", ":rows", ":frozen"))]
    values = [name for name in one if name.endswith((":values", ":whole"))]
    assert sum(len(one[name]) for name in places if name.endswith(":elements")) > 200_000
    assert all(torch.equal(one[name], other[name]) for name in places)
    assert not all(torch.equal(one[name], other[name]) for name in values)


@pytest.mark.slow
def test_adapters_train_as_many_elements_as_the_mask_leaves(mask, trained):
    (result, file), *_ = trained.values()
    assert result.live == sum(int((~frozen).sum()) for frozen in masks.load(mask).values())
    assert result.shipped == file.stat().st_size
    for method in ("lora", "shira"):
        adapted = run(Fit("peft", method, RATES[method], mask, steps=1))
        assert adapted.live == pytest.approx(result.live, rel=0.01)
    whole = run(Fit("peft", "full", RATES["full"], mask, steps=1))
    alone = run(Fit("peft", "head", RATES["head"], mask, steps=1))
    assert (whole.live, alone.live) == (sum(p.numel() for p in encoder.base().encoder.parameters()), 0)
    assert alone.shipped < result.shipped < whole.shipped


@pytest.mark.slow
def test_command_trains_and_serves_tenants(tmp_path, capsys):
    """It leaves a delta of each, and prints what came of it."""
    command.main(["--quick", "--tenants", "2", "--jobs", "1", "--out", str(tmp_path)])
    names = {"torchmetrics.safetensors", "hypothesis.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == {"mask.pt", *names}
    printed = capsys.readouterr().out
    assert "torchmetrics is trained, 1 of 2." in printed
    for text in ("kB to ship", "60 requests in", "0 wrong answers", "the update is", "the same to the bit afterwards"):
        assert text in printed


def test_table_shows_means_over_tenants():
    results = [
        Result(tenant, method, 0.1, found, 2, 3000)
        for tenant, found in (("numpy", 0.25), ("scipy", 0.75))
        for method in command.METHODS
    ]
    columns = [list(column.cells) for column in command.table(results).columns]
    assert columns[0] == ["numpy", "scipy", "mean", "trained, encoder", "kB to ship"]
    assert all(column == ["0.250", "0.750", "0.500", "2", "3"] for column in columns[1:])


@pytest.mark.parametrize("option", [["--tenants", "1"], ["--tenants", "13"]])
def test_command_refuses_a_number_of_tenants_that_there_is_not(option):
    with pytest.raises(SystemExit):
        command.main(option)
