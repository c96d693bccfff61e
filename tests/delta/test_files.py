"""Files: read by an independent reader, of values alone, of format 1, and damaged in 10,000 ways."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import nn

from lightning_gcfreeze import delta
from lightning_gcfreeze.delta import files
from lightning_gcfreeze.delta.__main__ import main
from tests.delta.bag import Bag, contents, masks, train_
from tests.oracles import delta_file


def of_bag(dtype=torch.float32):
    return delta.of(train_(Bag(dtype), masks()), masks())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_alone_and_their_mask_are_the_delta(dtype, tmp_path):
    """By our reader and the oracle, from a path, bytes, a dict of tensors; without the right mask, refused."""
    found, other = of_bag(dtype), delta.of(Bag(dtype), {"matrix": masks()["matrix"]})
    delta.save(found, tmp_path / "whole")
    delta.save(found, tmp_path / "values", mask=tmp_path / "whole")
    values, whole = ((tmp_path / name).read_bytes() for name in ("values", "whole"))
    assert len(values) < len(whole)
    expected = contents(train_(Bag(dtype), masks()))
    assert delta_file.applied(values, contents(Bag(dtype)), whole) == expected != contents(Bag(dtype))
    for mask in (found, whole, tmp_path / "whole", load_file(tmp_path / "whole")):
        for source in (values, tmp_path / "values", load_file(tmp_path / "values")):
            model = Bag(dtype)
            delta.apply(model, source, mask=mask)
            assert contents(model) == expected
    model = Bag(dtype)
    for mask, text in ((None, "values alone: pass the delta that has their places"), (other, "other names, shapes")):
        with pytest.raises(delta.MismatchError, match=text):
            delta.apply(model, values, mask=mask)
    with pytest.raises(delta.MismatchError, match="other names, shapes, dtypes or places than `mask`"):
        delta.save(found, tmp_path / "values", mask=other)
    assert contents(model) == contents(Bag(dtype))


def test_bytes_a_live_value():
    """In bfloat16, one element in a hundred live: 3.2 with places, 2.05 without."""
    model = nn.Sequential(*(nn.Linear(400, 400, bias=False) for _ in range(12))).to(torch.bfloat16)
    frozen = {name: torch.rand(p.shape) < 0.99 for name, p in model.named_parameters()}
    found = delta.of(model, frozen)
    live = sum(int((~mask).sum()) for mask in frozen.values())
    assert 3.0 < len(delta.pack(found)) / live <= 3.2
    assert 2.0 < len(delta.pack(found, mask=found)) / live <= 2.05


def test_a_file_of_format_1_is_read(tmp_path):
    """As version 0.1 saved it: no shapes, int32 places, no digest. To write it anew takes the model."""
    found = of_bag()
    old = {key: tensor for key, tensor in found.items() if not key.endswith(":shape")} | {"format": torch.tensor(1)}
    save_file(old, tmp_path / "old", metadata={"format": "pt", "lightning_gcfreeze": "delta 1"})
    model = Bag()
    delta.apply(model, tmp_path / "old")
    assert contents(model) == contents(train_(Bag(), masks())) != contents(Bag())
    with pytest.raises(delta.MismatchError, match=r"format 1, without shapes \('frozen_scalar'\)"):
        delta.pack(tmp_path / "old")


def test_the_file_names_its_base(tmp_path):
    """If it was said; `diff` always says it."""
    start, trained = Bag(), train_(Bag(), masks())
    delta.save(of_bag(), tmp_path / "delta", base=delta.fingerprint(start))
    assert delta.inspect(tmp_path / "delta").base == delta.fingerprint(start) != delta.fingerprint(trained)
    assert delta.inspect(delta.diff(start, trained)).base == delta.fingerprint(start)
    assert delta.inspect(of_bag()).base is None


def test_a_file_is_replaced_at_once_and_others_may_read_it(tmp_path):
    """With the permissions of any new file; nothing else is left in the folder, after a failure neither."""
    delta.save(of_bag(), tmp_path / "delta")
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "delta").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        delta.save(of_bag(), tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["delta", "folder", "plain"]


def rebuilt(file, **changes):
    """A file with other tensors, {key: array}, and a digest that is right."""
    coded = {key: tensor for key, tensor in load_file(file).items() if key != "digest"}
    return files.sealed(coded | {key: torch.from_numpy(np.array(value)) for key, value in changes.items()})


def lines(file):
    return json.loads(load_file(file)["layout"].numpy().tobytes())


def as_layout(found):
    return np.frombuffer(json.dumps(found, separators=(",", ":")).encode(), np.uint8).copy()


FORGED = {
    "10¹² elements": lambda found: [[*found[0][:2], [10**12], *found[0][3:]], *found[1:]],
    "10³⁰⁰ elements": lambda found: [[*found[0][:2], [10**300], *found[0][3:]], *found[1:]],
    "an empty axis": lambda found: [["a", "float32", [0, 10**18], "whole"], *found],
    "rows of nothing": lambda found: [["a", "float32", [10**9, 0], "rows", 8, 0, 1], *found],
    "a negative size": lambda found: [[*found[0][:2], [-1], *found[0][3:]], *found[1:]],
    "no dtype": lambda found: [[found[0][0], None, *found[0][2:]], *found[1:]],
    "another dtype": lambda found: [[found[0][0], "object", *found[0][2:]], *found[1:]],
    "another unit": lambda found: [[*found[0][:3], "columns"], *found[1:]],
    "the names turned round": lambda found: found[::-1],
    "one name twice": lambda found: [found[0], *found],
    "no list": lambda found: 3,
    "a list of numbers": lambda found: [1, 2],
    "a truth value": lambda found: [[*found[0][:2], [True], *found[0][3:]], *found[1:]],
    "too few": lambda found: found[:-1],
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_forged_layout_is_refused(forge, tmp_path):
    """Although its digests are right; and no memory is taken for what it claims."""
    import hashlib

    delta.save(of_bag(), tmp_path / "delta")
    layout = as_layout(forge(lines(tmp_path / "delta")))
    codes = load_file(tmp_path / "delta")["places"].numpy().tobytes()
    mask = np.frombuffer(hashlib.sha256(layout.tobytes() + codes).digest(), np.uint8).copy()
    with pytest.raises(delta.DeltaError):
        delta.apply(Bag(), rebuilt(tmp_path / "delta", layout=layout, mask=mask))


def test_a_layout_of_nested_lists_is_refused(tmp_path):
    """Deeper than Python can read."""
    delta.save(of_bag(), tmp_path / "delta")
    nested = np.frombuffer(b"[" * 200_000, np.uint8).copy()
    with pytest.raises(delta.CorruptFileError, match="layout of the delta's file cannot be read"):
        delta.load(rebuilt(tmp_path / "delta", layout=nested))


@pytest.mark.parametrize("key", ["format", "layout", "places", "frozen", "values", "mask", "digest"])
def test_no_tensor_of_a_file_may_be_missing(key, tmp_path):
    """A file with a part left out is no delta that changes less."""
    delta.save(of_bag(), tmp_path / "delta")
    tensors = {k: tensor for k, tensor in load_file(tmp_path / "delta").items() if k != key}
    save_file(tensors, tmp_path / "delta")
    with pytest.raises(delta.DeltaError, match=r"damaged|is it a delta's file"):
        delta.load(tmp_path / "delta")


@pytest.mark.slow
@pytest.mark.parametrize("values_only", [False, True])
def test_damaged_files_are_refused_or_give_the_right_model(values_only):
    """5,000 damages each: bits, bytes, pieces cut out, put in, moved. Few are harmless, as in the header's comment."""
    found = of_bag()
    data = delta.pack(found, mask=found if values_only else None)
    expected, draw = contents(train_(Bag(), masks())), np.random.default_rng(0)
    refused = 0
    for _ in range(5000):
        spoilt = bytearray(data)
        for _ in range(draw.integers(1, 4)):
            at = int(draw.integers(len(spoilt)) if draw.random() < 0.6 else draw.integers(min(len(spoilt), 900)))
            kind = draw.integers(6)
            length = int(draw.integers(1, 60))
            if kind == 0:
                spoilt[at] ^= 1 << draw.integers(8)
            elif kind == 1:
                spoilt[at] = draw.integers(256)
            elif kind == 2:
                del spoilt[at : at + length]
            elif kind == 3:
                spoilt[at:at] = draw.bytes(length)
            elif kind == 4:
                del spoilt[at:]
            else:
                spoilt[at : at + length] = spoilt[:length]
            if not spoilt:
                break
        model = Bag()
        try:
            delta.apply(model, bytes(spoilt), mask=found)
        except delta.DeltaError:
            refused += 1
            assert contents(model) == contents(Bag())
        else:
            assert contents(model) == expected
    assert refused > 4500


@pytest.mark.parametrize(
    "changes",
    [
        {"values": lambda values: values[:, None]},
        {"values": lambda values: values[None]},
        {"format": lambda _: np.array(2 + 1j, np.complex64)},
        {"format": lambda _: np.array(2**64 - 1, np.uint64)},
    ],
    ids=["a column", "a row", "complex", "beyond int64"],
)
def test_tensors_of_another_shape_or_kind_are_refused(changes, tmp_path):
    """Although the digest is right."""
    delta.save(of_bag(), tmp_path / "delta")
    tensors = load_file(tmp_path / "delta")
    new = {key: change(tensors[key].numpy()) for key, change in changes.items()}
    for read in (delta.load, delta.inspect):
        with pytest.raises(delta.CorruptFileError):
            read(rebuilt(tmp_path / "delta", **new))


def test_rows_without_elements_take_no_memory():
    """They would be places that cost a bit each in the file and 32 bytes in memory."""
    codes = b"\xff" * 1000
    layout = json.dumps([["weight", "float32", [10**6, 0], "rows", 8000, 0, 1000]]).encode()
    forged = {
        "format": torch.tensor(2),
        "layout": files.as_tensor(layout),
        "places": files.as_tensor(codes),
        "frozen": torch.zeros(1, 32, dtype=torch.uint8),
        "values": files.as_tensor(b""),
        "mask": files.as_tensor(files.mask_hash(layout, codes)),
    }
    with pytest.raises(delta.CorruptFileError, match="layout"):
        delta.load(files.sealed(forged))


PLAIN = {
    "weight:elements": torch.tensor([0], dtype=torch.int32),
    "weight:values": torch.zeros(1),
    "weight:shape": torch.tensor([3, 4]),
    "weight:frozen": torch.zeros(32, dtype=torch.uint8),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"weight:shape": torch.tensor(3)},
        {"weight:shape": torch.tensor([3.0, 4.0])},
        {"weight:values": None},
        {"weight:values": torch.tensor(1.0)},
        {"weight:values": torch.zeros(0)},
        {"weight:elements": torch.tensor(0, dtype=torch.int32)},
        {"weight:frozen": torch.zeros(3)},
        {"format": torch.tensor(2 + 1j)},
    ],
    ids=str,
)
def test_a_delta_in_memory_that_was_forged_is_refused(changes):
    """Saved as it is, as those of format 1 were."""
    found = {"format": torch.tensor(2)} | PLAIN | changes
    file = to_bytes({key: tensor for key, tensor in found.items() if tensor is not None})
    for use in (lambda f: delta.apply(nn.Linear(4, 3), f), lambda f: delta.overlap(f, f)):
        with pytest.raises(delta.DeltaError):
            use(file)


def test_names_in_a_file_do_not_steer_a_terminal(tmp_path, capsys, monkeypatch):
    found = {"format": torch.tensor(2), "a\x1b[2J\x9b\ud800:whole": torch.zeros(2)}
    delta.save(found, tmp_path / "delta")
    monkeypatch.setattr("sys.argv", ["delta", "inspect", str(tmp_path / "delta"), str(tmp_path / "none")])
    assert main() == 1
    output = capsys.readouterr()
    assert r"a\x1b[2J\x9b\ud800" in output.out
    assert "FileNotFoundError" in output.err
