"""Files of masks and of orders come back as they were written, or not at all."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_gcfreeze import masks

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (), "vector": (3,), "empty": (0, 4), "block": (2, 3, 5), "a name. with:öther": (8,), "wide": (1, 17),
}  # fmt: skip


def drawn(seed: int = 0) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    return {name: torch.from_numpy(np.asarray(random.random(shape) < 0.5)) for name, shape in SHAPES.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Names, in their order, dtypes, shapes and values."""
    return [*found] == [*expected] and all(
        (found[name].dtype, found[name].shape, found[name].tolist()) == (m.dtype, m.shape, m.tolist())
        for name, m in expected.items()
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of masks."""
    masks.save(drawn(), tmp_path / "masks.pt")
    return tmp_path / "masks.pt"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("as_path", [str, Path])
def test_masks_come_back_with_every_bit(tmp_path, seed, as_path):
    """Of every shape, whatever the rest of a byte holds; other masks come back as others."""
    path = as_path(tmp_path / "masks.pt")
    masks.save(drawn(seed), path)
    assert same(masks.load(path), drawn(seed))
    assert not same(masks.load(path), drawn(seed + 1))
    masks.save(drawn(seed + 1), path)  # an existing file is replaced
    assert same(masks.load(path), drawn(seed + 1))


def test_masks_in_any_memory_format_come_back_row_by_row(tmp_path):
    """Transposed, expanded and sliced ones."""
    random = torch.from_numpy(np.random.default_rng(0).random((6, 10)) < 0.5)
    odd = {"transposed": random.T, "expanded": random[:1].expand(7, 10), "sliced": random[1::2, ::3]}
    masks.save(odd, tmp_path / "masks.pt")
    assert same(masks.load(tmp_path / "masks.pt"), odd)


def test_file_takes_a_bit_for_each_element(tmp_path):
    """And a few hundred bytes a parameter."""
    masks.save({"w": torch.ones(1000, 1000, dtype=torch.bool)}, tmp_path / "masks.pt")
    assert 125_000 <= os.path.getsize(tmp_path / "masks.pt") < 125_000 + 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_order_comes_back_with_every_bit(tmp_path, dtype):
    """Scores keep their dtype; what is changed afterwards is not what was saved."""
    random = np.random.default_rng(0)
    scores = {name: torch.from_numpy(np.asarray(random.normal(size=s) * 9)).to(dtype) for name, s in SHAPES.items()}
    kept = {name: score.tolist() for name, score in scores.items()}
    masks.save_order(scores, tmp_path / "order.pt")
    found = masks.load_order(tmp_path / "order.pt")
    assert {name: score.tolist() for name, score in found.items()} == kept
    assert {(score.dtype, score.shape) for score in found.values()} == {(dtype, torch.Size(s)) for s in SHAPES.values()}


def test_files_hold_plain_types_only(file):
    """They load with ``weights_only=True``, as documented."""
    content = torch.load(file, weights_only=True)
    assert (content["kind"], content["format"]) == ("masks", 1)
    assert content["shapes"] == {name: list(shape) for name, shape in SHAPES.items()}
    assert content["tensors"]["wide"].tolist() == np.packbits(drawn()["wide"].numpy(), bitorder="little").tolist()


@pytest.mark.parametrize(("load", "kind"), [(masks.load, "masks"), (masks.load_order, "order")])
def test_file_that_is_not_there_or_cannot_be_read_says_so_itself(tmp_path, load, kind):
    """As any other file."""
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load(tmp_path / "nowhere.pt")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(
        ValueError, match=rf"empty.pt' cannot be read as a file of {kind}. Write one with `save_{kind}`"
    ):
        load(tmp_path / "empty.pt")


def test_truncated_file_is_refused_at_every_length(file):
    """Also if only the last byte is missing; the whole file is read."""
    data = file.read_bytes()
    for length in [*range(0, len(data), 61), *range(len(data) - 60, len(data))]:
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cannot be read as a file of masks|is damaged"):
            masks.load(file)
    file.write_bytes(data)
    assert same(masks.load(file), drawn())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_flipped_byte_is_refused_or_harmless_wherever_it_is(file):
    """Zip files have padding and dates, which do not matter; whatever is read has the bits that were written."""

    def read() -> dict[str, Tensor] | None:
        try:
            return masks.load(file)
        except ValueError:
            return None

    data, outcomes = file.read_bytes(), list[bool]()
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 0xFF if i % 2 else 1
        file.write_bytes(damaged)
        found = read()
        assert found is None or same(found, drawn()), i
        outcomes.append(found is None)
    assert 500 < sum(outcomes) < len(data) - 500


def forged(file: Path, **changes: Any) -> Path:
    """Write the content of a file with changes; None leaves a part out."""
    content = torch.load(file, weights_only=True) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, file)
    return file


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": {"w": torch.tensor([255], dtype=torch.uint8)}, "shapes": {"w": [8]}},
        {"tensors": {name: torch.zeros(-(-mask.numel() // 8), dtype=torch.uint8) for name, mask in drawn().items()}},
        {"shapes": {**{name: list(shape) for name, shape in SHAPES.items()}, "block": [5, 3, 2]}},
        {"shapes": {**{name: list(shape) for name, shape in SHAPES.items()}, "vector": [10**12]}},
        {"shapes": {**{name: list(shape) for name, shape in SHAPES.items()}, "vector": [-3]}},
        {"shapes": None},
        {"tensors": None},
        {"digest": None},
        {"digest": "none"},
        {"shapes": [1, 2]},
        {"tensors": {"vector": 3}},
    ],
    ids=str,
)
def test_content_that_was_changed_is_refused(file, changes):
    """Names, shapes and bits are all part of the digest, and each part has to be there."""
    with pytest.raises(ValueError, match=r"is damaged: its content is not what was written\. Write one"):
        masks.load(forged(file, **changes))


def test_fewer_bytes_than_elements_are_refused_with_a_right_digest_too(file):
    """NumPy would read zeros past the end: live elements in place of frozen ones."""
    from lightning_gcfreeze.masks import files

    content = torch.load(file, weights_only=True)
    content["shapes"]["wide"] = [1, 30]
    content["digest"] = files._digest(content)
    torch.save(content, file)
    with pytest.raises(ValueError, match="is damaged"):
        masks.load(file)


def test_another_kind_and_another_format_are_named(file, tmp_path):
    """With the way out."""
    masks.save_order({"w": torch.ones(3)}, tmp_path / "order.pt")
    with pytest.raises(ValueError, match=r"order.pt' holds an order, not masks. An order becomes masks by .*lowest"):
        masks.load(tmp_path / "order.pt")
    with pytest.raises(ValueError, match=r"masks\.pt' holds masks, not order"):
        masks.load_order(file)
    with pytest.raises(ValueError, match="has the format 99, and this version reads 1"):
        masks.load(forged(file, format=99))
    with pytest.raises(ValueError, match="has the format None, and this version reads 1"):
        masks.load(forged(file, format=None))
    with pytest.raises(ValueError, match="is no file of masks"):
        masks.load(forged(file, kind=["masks"]))


class Code:
    """Runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_run(tmp_path):
    """Neither in a pickle nor in a file of `torch.save`; `pickle.load` would run it."""
    ran = tmp_path / "ran"
    bare, saved = tmp_path / "bare.pt", tmp_path / "saved.pt"
    bare.write_bytes(pickle.dumps({"kind": "masks", "code": Code(ran)}))
    torch.save({"kind": "masks", "format": 1, "code": Code(ran)}, saved)
    for path in (bare, saved):
        with pytest.raises(ValueError, match="cannot be read as a file of masks"):
            masks.load(path)
    assert not ran.exists()
    pickle.loads(bare.read_bytes())
    assert ran.exists()


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript archive")
def test_files_of_other_kinds_are_refused(tmp_path):
    """A text, a state dict, a checkpoint, a delta, an array, a scripted module, a list."""
    model = nn.Linear(3, 2)
    writers = {
        "text": lambda path: path.write_text("network.0.weight: true\n"),
        "state_dict": lambda path: torch.save(model.state_dict(), path),
        "module": lambda path: torch.save(model, path),
        "bare masks": lambda path: torch.save(drawn(), path),
        "list": lambda path: torch.save([torch.ones(3)], path),
        "delta": lambda path: save_file({"w:values": torch.ones(3)}, path),
        "array": lambda path: np.save(path.with_suffix(".npy"), np.ones(3)) or path.with_suffix(".npy").rename(path),
    }
    for name, write in writers.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}' (cannot be read as a file of masks|is no file of masks)"):
            masks.load(tmp_path / name)
