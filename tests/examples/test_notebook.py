"""The notebook, without Jupyter: its code cells run in one namespace, and what its text promises is looked at."""

import json
import linecache
from pathlib import Path

import numpy as np
import pytest
import torch

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def names(cells, tmp_path_factory):
    """Return the notebook's names after its last cell. `inspect` finds the cells' source, as it does in Jupyter."""
    namespace = {"__name__": "quickstart"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                source, file = "".join(cell["source"]), f"<cell {number}>"
                linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
                exec(compile(source, file, "exec"), namespace)
    return namespace


def _bits(tensor):
    return tensor.detach().numpy().view(np.uint32)


def test_notebook_is_of_format_4_5_and_stores_no_outputs(cells):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    for cell in cells:
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
def test_notebook_freezes_nine_tenths_after_a_fifth_of_the_steps(names):
    masks = [mask.numpy() for mask in names["freeze"].frozen.values()]
    assert sum(map(np.sum, masks)) == round(0.9 * sum(map(np.size, masks)))
    assert names["T0"] == 80
    assert 20 * len(names["task"]) // 30 == 400


@pytest.mark.slow
def test_frozen_elements_of_notebook_keep_their_bits_and_live_ones_move(names):
    then, now = names["keep"].weights, names["tuned"].state_dict()
    moved = {name: _bits(now[name]) != _bits(then[name]) for name in now}
    frozen = {name: mask.numpy() for name, mask in names["freeze"].frozen.items()}
    assert not any(moved[name][frozen[name]].any() for name in now)
    assert sum(np.sum(moved[name]) for name in now) > 0.9 * sum(np.sum(~mask) for mask in frozen.values())


@pytest.mark.slow
def test_delta_of_notebook_is_small_and_is_applied_and_taken_back_to_the_bit(names):
    assert names["same"]
    assert names["reverted"]
    assert "tuned.safetensors" in names["sizes"]
    assert names["sizes"]["tuned.safetensors"] < 0.25 * names["sizes"]["tuned.pt"]
    assert "refused" in names, "the delta went onto another base"


@pytest.mark.slow
def test_frozen_network_of_notebook_learns_the_task(names):
    """Nothing is asked of the difference between frozen and not: that is one seed's."""
    results = names["results"]
    assert results["the base"] < 0.5
    assert results["90 % frozen"] > 0.85
    assert results["90 % frozen, by its delta"] == results["90 % frozen"]
    assert isinstance(names["received"], torch.nn.Module)
