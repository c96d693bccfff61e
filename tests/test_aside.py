"""Tensors that wait in a file come back to the bit, and a full disk costs memory instead of a run."""

import copy
import errno
import os
import pickle
import tempfile

import pytest
import torch
from torch.testing import assert_close

from lightning_gcfreeze import _aside
from lightning_gcfreeze._aside import Aside, put_aside
from tests.allocations import most_allocated

MANY = 2**30  # bytes that are said to be coming


def some():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 3, generator=generator),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "special": torch.tensor([0.0, -0.0, float("nan"), float("-inf"), 1e-45]),
        "integers": torch.arange(6).view(2, 3).t(),
    }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_tensors_of_any_kind_come_back_to_the_bit_and_in_new_memory():
    """-0.0, NaN and denormals too; whoever writes to what it got changes nothing for the next."""
    found = put_aside(some().items(), MANY)
    assert isinstance(found, Aside)
    assert_same(found, some())
    found["a"].zero_()
    assert_same(found, some())
    assert len(found) == 6
    assert "a" in found
    assert "b" not in found


def test_large_tensors_take_no_memory_once_they_were_put_aside():
    large = {str(i): torch.full((1000,), float(i)) for i in range(50)}
    assert most_allocated(lambda: put_aside(large.items(), MANY)) < 2 * 4000
    found = put_aside(large.items(), MANY)
    assert 4000 <= most_allocated(lambda: [found[name].sum() for name in found]) < 3 * 4000


def test_small_tensors_and_those_of_few_numbers_stay_in_memory():
    """A column that is expanded over its rows takes more room in a file."""
    assert type(put_aside(some().items(), _aside.MIN_NBYTES - 1)) is dict
    column = torch.arange(3.0)[:, None].expand(3, 1000)
    assert put_aside({"w": column}.items(), MANY)["w"] is column


def test_copies_read_the_same_file_and_pickles_hold_the_tensors():
    found = put_aside(some().items(), MANY)
    copied = copy.deepcopy({"both": [found, found]})["both"]
    assert copied[0] is copied[1]
    assert_same(copied[0], some())
    assert_same(copy.copy(found), some())
    loaded = pickle.loads(pickle.dumps(found))
    assert type(loaded) is dict
    assert_same(loaded, some())
    del found
    assert_same(copied[0], some())


def test_file_has_no_name_and_lies_where_tmpdir_says(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = put_aside(some().items(), MANY)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(found._file.number).st_size > 0


@pytest.mark.parametrize("written", [0, 1, 3])
def test_full_disk_costs_memory_and_a_warning(written, monkeypatch):
    """What was written before stays in the file."""
    left, original = [written], os.pwritev

    def pwritev(*args):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return original(*args)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with pytest.warns(UserWarning, match=r"stay in memory.*No space left on device.*Set TMPDIR"):
        found = put_aside(some().items(), MANY)
    assert_same(found, some())


def test_folder_that_cannot_be_written_to_costs_memory_and_a_warning(monkeypatch):
    def fails(**kwargs):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "TemporaryFile", fails)
    with pytest.warns(UserWarning, match="No usable temporary directory"):
        assert_same(put_aside(some().items(), MANY), some())


def test_writes_that_are_cut_short_go_on(monkeypatch):
    """The system may take and give a part at a time, 2 GiB at most."""
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda file, buffers, offset: write(file, [buffers[0][:5]], offset))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: read(file, [buffers[0][:3]], offset))
    assert_same(put_aside(some().items(), MANY), some())


def test_file_that_was_cut_is_an_error():
    found = put_aside({"w": torch.ones(1000)}.items(), MANY)
    os.ftruncate(found._file.number, 100)
    with pytest.raises(RuntimeError, match="'w' has been cut short"):
        found["w"]
