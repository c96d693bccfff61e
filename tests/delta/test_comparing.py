"""diff, merge, overlap, patches and state_dict, against explicit loops over elements."""

import copy
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import Parameter

from lightning_gcfreeze import delta
from tests.delta.bag import Bag, content, contents, masks, train_


def changed(model, elements):
    """A copy with other values at some elements, {name: flat indices}."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, indices in elements.items():
            tensor = dict([*tuned.named_parameters(), *tuned.named_buffers()])[name]
            flat = tensor.flatten()
            flat[indices] += 1
            tensor.copy_(flat.view(tensor.shape))
    return tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_diff_gives_the_tuned_model_from_the_base(dtype):
    """NaN and -0.0 among the values; taken from modules and from state dicts."""
    start, trained = Bag(dtype), train_(Bag(dtype), masks())
    trained.cache = start.cache
    for before, after in ((start, trained), (start.state_dict(), trained.state_dict()), (start, trained.state_dict())):
        model = Bag(dtype)
        found = delta.diff(before, after)
        delta.apply(model, found)
        assert contents(model) == contents(trained) != contents(start)
        assert all(f"{name}:frozen" in found for name in ("still", "frozen_scalar"))


def test_diff_finds_the_elements_that_differ_in_bits():
    """-0.0 is not 0.0, and a NaN is itself."""
    base, tuned = nn.Linear(10, 4, bias=False), nn.Linear(10, 4, bias=False)
    with torch.no_grad():
        base.weight.zero_()
        base.weight[3, 3] = torch.nan
        tuned.weight.copy_(base.weight)
        tuned.weight[0, 7] = -0.0
    assert delta.diff(base, tuned)["weight:elements"].tolist() == [7]
    assert "weight:elements" not in delta.diff(base, copy.deepcopy(base))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn], ids=str
)
def test_other_dtypes(dtype):
    """Buffers of integers, complex parameters, 8-bit floats: compared, applied, saved."""
    base = nn.Module()
    base.register_buffer("table", torch.arange(64).view(8, 8).to(dtype))
    tuned = copy.deepcopy(base)
    tuned.table.view(torch.uint8)[3, 3] ^= 1
    found = delta.diff(base, tuned)
    assert contents(base) != contents(tuned)
    delta.apply(base, delta.pack(found))
    assert contents(base) == contents(tuned)


def test_tied_parameters_between_modules_and_files(tmp_path):
    """A state dict has a tied tensor twice, a module once: compared with a module, once."""
    base = nn.ModuleDict({"embed": nn.Embedding(9, 4), "out": nn.Linear(4, 9, bias=False)})
    base["out"].weight = base["embed"].weight
    tuned = changed(base, {"embed.weight": [3]})
    save_file({name: t.clone() for name, t in tuned.state_dict().items()}, tmp_path / "tuned")
    found = delta.diff(base, load_file(tmp_path / "tuned"))
    assert {key for key in found if ":" in key} == {
        f"embed.weight:{part}" for part in ("elements", "values", "shape", "frozen")
    }
    delta.apply(base, found)
    assert contents(base) == contents(tuned)
    assert base["out"].weight is base["embed"].weight


@pytest.mark.parametrize(
    ("tuned", "text"),
    [
        (lambda: nn.Linear(3, 2, bias=False), "Only one of the two models has bias"),
        (lambda: nn.Linear(4, 2), r"'weight' is torch.float32 of \(2, 3\) in the base and torch.float32 of \(2, 4\)"),
        (lambda: nn.Linear(3, 2).half(), "in the base and torch.float16"),
    ],
)
def test_models_that_cannot_be_compared(tuned, text):
    with pytest.raises(delta.MismatchError, match=text):
        delta.diff(nn.Linear(3, 2), tuned())


def test_disjoint_deltas_merge_to_the_model_that_has_them_all():
    """In any order, and applied one after another as well; `overlap` finds nothing."""
    base = Bag()
    parts = [{"matrix": [0, 50]}, {"matrix": [3], "vector": [2]}, {"still": [1], "mean": [0]}]
    deltas = [delta.diff(base, changed(base, part)) for part in parts]
    deltas = [
        {k: t for k, t in d.items() if k.split(":")[0] in {"format", *p}} for d, p in zip(deltas, parts, strict=True)
    ]
    everything = changed(base, {"matrix": [0, 3, 50], "vector": [2], "still": [1], "mean": [0]})
    for order in permutations(deltas):
        model = Bag()
        delta.apply(model, delta.merge(base, *order))
        assert contents(model) == contents(everything)
    assert contents(base) == contents(Bag()) != contents(everything)
    assert not delta.overlap(deltas[0], deltas[1])


def test_disjoint_masks_of_which_one_leaves_most_live_merge():
    """Places are kept however many there are: what is not written does not conflict."""
    base, live = nn.Linear(10, 10, bias=False), torch.rand(10, 10) < 0.6
    deltas = []
    for mask in (live, ~live):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            tuned.weight.add_(mask.float())
        deltas.append(delta.of(tuned, {"weight": ~mask}))
    assert not delta.overlap(*deltas)
    both = copy.deepcopy(base)
    delta.apply(both, delta.merge(base, *deltas))
    assert content(both.weight) == content(base.weight + 1)


def test_a_share_of_what_changed_by_masks():
    """Of two trainings one after the other, each part from the base; places that did not move are there as well."""
    base = nn.Linear(10, 4)
    first = changed(base, {"weight": [1, 2, 3]})
    second = changed(first, {"weight": [5, 6], "bias": [0]})
    frozen = {"weight": torch.ones(4, 10, dtype=torch.bool)}
    frozen["weight"].view(-1)[[5, 6, 7]] = False
    part = delta.diff(base, second, frozen=frozen)
    assert part["weight:elements"].tolist() == [5, 6, 7]
    assert part["bias:elements"].tolist() == [0]
    assert torch.equal(delta.masks(base, part)["weight"], frozen["weight"])
    model = copy.deepcopy(base)
    delta.apply(model, part)
    assert contents(model) == contents(changed(base, {"weight": [5, 6], "bias": [0]}))
    merged = delta.merge(base, part, delta.diff(base, first))
    assert delta.inspect(merged).base == delta.fingerprint(base)
    unnamed = delta.of(
        first, {"weight": ~torch.arange(10).lt(4).expand(4, 10), "bias": torch.ones(4, dtype=torch.bool)}
    )
    assert "base" not in delta.merge(base, {key: part[key] for key in part if "weight" not in key}, unnamed)
    with pytest.raises(
        delta.MismatchError, match=r"mask of 'weight' must be bool of \(4, 10\), got torch.float32 of \(4,\)"
    ):
        delta.diff(base, second, frozen={"weight": torch.ones(4)})


def test_masks_give_a_training_of_the_same_places():
    """Of every form of entry; only parameters have masks."""
    found = delta.of(train_(Bag(), masks()), masks())
    given = delta.masks(Bag(), found)
    assert all(torch.equal(given[name], mask) for name, mask in masks().items())
    assert given.keys() == masks().keys() | {"without_mask"}
    assert delta.pack(delta.of(Bag(), given), mask=found)


def test_overlapping_deltas():
    """The same bits are no conflict; other ones are an error that names the tensor, or the last wins."""
    base = nn.Linear(10, 4)
    first = changed(base, {"weight": [1, 2, 3]})
    second = changed(first, {"weight": [3, 5]})  # 1 and 2 as the first has them
    deltas = [delta.diff(base, first), delta.diff(base, second)]
    assert delta.overlap(*deltas) == {"weight": delta.Overlap(3, 1)}
    with pytest.raises(
        delta.ConflictError, match="Delta 1 writes other bits than an earlier one to 1 elements of 'weight'"
    ):
        delta.merge(base, *deltas)
    for order, winner in ((deltas, second), (deltas[::-1], first)):
        model = copy.deepcopy(base)
        delta.apply(model, delta.merge(base, *order, on_conflict="last"))
        expected = second.weight.detach().clone()
        expected[0, 3] = winner.weight[0, 3]
        assert content(model.weight) == content(expected)
    with pytest.raises(ValueError, match=r'"error" or "last", got \'first\''):
        delta.merge(base, *deltas, on_conflict="first")
    other = changed(base, {"weight": [30]})
    with pytest.raises(delta.WrongBaseError):
        delta.merge(other, *deltas)


def flat(found, name, shape):
    """{flat index: bytes} of what a delta writes to a tensor, by loops."""
    written = {}
    for unit in ("elements", "rows", "whole"):
        if f"{name}:{unit}" not in found:
            continue
        values = found[f"{name}:whole" if unit == "whole" else f"{name}:values"]
        rows = values.reshape(len(values), -1) if unit == "rows" else values.reshape(-1, 1)
        places = range(len(rows)) if unit == "whole" else found[f"{name}:{unit}"].tolist()
        for place, row in zip(places, rows, strict=True):
            for j, value in enumerate(row):
                written[place * len(row) + j] = content(value)
    return written


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.7, 1.0]), min_size=2, max_size=2), st.booleans(), st.integers(0, 99))
def test_overlap_and_merge_against_loops(fractions, by_row, seed):
    """Two deltas of random elements or rows, with values that coincide now and then."""
    generator = torch.Generator().manual_seed(seed)
    base = nn.Module()
    base.p = Parameter(torch.zeros(6, 5))
    found = []
    for fraction in fractions:
        live = torch.rand((6, 1) if by_row else (6, 5), generator=generator) < fraction
        values = torch.randint(1, 3, (6, 5), generator=generator).float()
        tuned = copy.deepcopy(base)
        tuned.p = Parameter(torch.where(live.expand(6, 5), values, base.p.data))
        found.append(delta.of(tuned, {"p": ~live.expand(6, 5)}))
    ours, theirs = (flat(d, "p", (6, 5)) for d in found)
    shared = ours.keys() & theirs.keys()
    differing = [i for i in shared if ours[i] != theirs[i]]
    assert delta.overlap(*found) == ({"p": (len(shared), len(differing))} if shared else {})
    if differing:
        with pytest.raises(delta.ConflictError, match=f"to {len(differing)} elements of 'p'"):
            delta.merge(base, *found)
    merged = flat(delta.merge(base, *found, on_conflict="last"), "p", (6, 5))
    expected = ours | theirs
    assert {i: bits for i, bits in merged.items() if i in expected} == expected
    assert all(bits == content(base.p.flatten()[i]) for i, bits in merged.items() if i not in expected)


def test_patches_give_the_trained_model_in_an_engine():
    """Scattered as vLLM does it: a flat copy of each tensor, values at the indices; NaN has no meaning there."""
    start, trained = Bag(), train_(Bag(), masks())
    found = delta.of(trained, masks())
    state = {name: tensor.numpy().copy() for name, tensor in start.state_dict().items()}
    for patch in delta.patches(start, found):
        array = state[patch.name]
        assert (patch.shape, patch.dtype, patch.values.dim()) == (array.shape, torch.float32, 1)
        values = patch.values.numpy()
        if patch.indices is None:
            state[patch.name] = values.reshape(array.shape)
            continue
        assert patch.indices.dtype == torch.int32
        new = array.reshape(-1).copy()
        for index, value in zip(patch.indices.tolist(), values, strict=True):
            new[index] = value
        state[patch.name] = new.reshape(array.shape)
    expected = {name: tensor.numpy() for name, tensor in trained.state_dict().items()}
    assert all(np.array_equal(state[name], expected[name], equal_nan=True) for name in expected)
    assert not {"still", "frozen_scalar"} & {patch.name for patch in delta.patches(start, found)}


def test_a_state_dict_for_those_without_this_package():
    """Of the trained model; the base keeps its bits."""
    start, trained = Bag(), train_(Bag(), masks())
    plain = Bag()
    plain.load_state_dict(delta.state_dict(start, delta.of(trained, masks())))
    assert contents(plain) == contents(trained) != contents(start)
    assert contents(start) == contents(Bag())


class WithExtraState(nn.Linear):
    def __init__(self, extra):
        super().__init__(4, 3)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    "differing", [[1.5, {"a": (torch.ones(2),)}], [{"a": torch.zeros(2)}, {"a": torch.ones(2)}], [(1,), (1, 2)]]
)
def test_what_is_no_tensor_must_not_differ(differing):
    """Of quantized modules, all weights are such: a delta without them would leave the base's."""
    with pytest.raises(delta.MismatchError, match="_extra_state"):
        delta.diff(*map(WithExtraState, differing))
    for extra in differing:
        assert "weight:whole" in delta.diff(WithExtraState(extra), WithExtraState(copy.deepcopy(extra)))


@pytest.mark.filterwarnings("ignore")
def test_quantized_modules_differ():
    first, second = (
        torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear}) for _ in range(2)
    )
    assert list(delta.diff(first, first)) == ["format", "base"]
    with pytest.raises(delta.MismatchError, match="_packed_params"):
        delta.diff(first, second)


class Renaming(nn.Module):
    """A module whose state dict has copies, some names of its own, and one tensor left out."""

    def __init__(self, left_out=()):
        super().__init__()
        torch.manual_seed(0)
        self.left_out = left_out
        self.first, self.last = nn.Linear(20, 20), nn.Linear(20, 20)
        self.last.weight = self.first.weight

    def state_dict(self, *args, **kwargs):
        return {n: t.clone() for n, t in super().state_dict(*args, **kwargs).items() if n not in self.left_out}


def test_a_state_dict_of_ones_own():
    base, tuned = Renaming(), Renaming()
    with torch.no_grad():
        tuned.first.weight[3, 5] += 1
        tuned.last.bias[2] += 1
    found = delta.diff(base, tuned)
    for name, tensor in delta.state_dict(base, found).items():
        assert torch.equal(tensor, tuned.state_dict()[name])
    left_out = Renaming(left_out=("last.bias",))
    assert delta.diff(left_out, tuned).keys() == found.keys()
    with pytest.raises(delta.MismatchError, match=r"does not have last\.bias"):
        delta.state_dict(left_out, found)


def test_state_dicts_that_have_a_tied_tensor_twice():
    """Their delta fits the module, unless it has other values under the other name."""
    base, tuned = Renaming(), Renaming()
    with torch.no_grad():
        tuned.first.weight[3, 5] += 1
    found = delta.diff(base.state_dict(), tuned.state_dict())
    assert "last.weight:values" in found
    with pytest.raises(delta.MismatchError, match=r"last\.weight"):
        delta.apply(base, found | {"last.weight:values": torch.zeros(1)})
    delta.apply(base, found)
    assert torch.equal(base.last.weight, tuned.last.weight)
