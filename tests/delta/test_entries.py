"""A delta and the weights of t0 are the trained model: to the bit in the model and in the file, or it is refused."""

import copy
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import Parameter

from lightning_gcfreeze import GradCovFreezeCallback, delta
from tests import cases
from tests.delta.bag import Bag, content, contents, damaged, masks, train_
from tests.oracles import delta_file

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@DTYPES
def test_t0_and_the_delta_are_the_trained_model(dtype, tmp_path):
    """Applied from memory and from a file, and read by hand: the bits are the trained ones, and they have moved."""
    start, trained = Bag(dtype), train_(Bag(dtype), masks())
    found = delta.of(trained, masks())
    delta.save(found, tmp_path / "delta.safetensors")
    by_hand = delta_file.applied((tmp_path / "delta.safetensors").read_bytes(), contents(start))
    assert by_hand == contents(trained) != contents(start)
    for source in (found, tmp_path / "delta.safetensors", str(tmp_path / "delta.safetensors")):
        model = Bag(dtype)
        places = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
        assert delta.apply_delta(model, source) is None
        assert contents(model) == contents(trained)
        assert {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()} == places
        assert content(model.cache) == content(start.cache) != content(trained.cache)
    assert contents(trained) == contents(train_(Bag(dtype), masks()))  # taking a delta changes nothing


def test_each_parameter_is_stored_in_the_form_that_takes_least():
    """Rows where whole rows are frozen, nothing but a fingerprint where all is, everything where that is smaller."""
    found = delta.of(train_(Bag(), masks()), masks())
    parts = {}
    for key in found.keys() - {"format"}:
        name, part = key.split(":")
        parts.setdefault(name, set()).add(part)
    forms = {
        ("whole",): ["scalar", "empty", "mostly_live", "live", "without_mask", "mean"],
        ("shape", "frozen"): ["frozen_scalar", "still"],
        ("elements", "values", "shape", "frozen"): ["vector", "matrix", "transposed", "kernel"],
        ("rows", "values", "shape", "frozen"): ["rows", "kernel_rows"],
    }
    assert parts == {name: set(form) for form, names in forms.items() for name in names}
    assert found["rows:rows"].tolist() == [0, 5, 10, 15]
    assert found["rows:values"].shape == (4, 3, 2)
    assert found["matrix:elements"].tolist() == np.flatnonzero(~masks()["matrix"].numpy()).tolist()
    assert all(t.is_contiguous() and t.device.type == "cpu" and not t.requires_grad for t in found.values())


def test_a_delta_is_a_copy():
    """Training on changes the module, not the delta."""
    module = train_(Bag(), masks())
    found = delta.of(module, masks())
    before = {key: content(tensor) for key, tensor in found.items()}
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.add_(1)
    assert {key: content(tensor) for key, tensor in found.items()} == before
    assert {key: content(tensor) for key, tensor in delta.of(module, masks()).items()} != before


def test_parameters_without_gradient_are_left_out_unless_they_have_a_mask():
    """A backbone that was never trained stays at home; what the freeze itself switched off does not."""
    module = nn.ModuleDict({"backbone": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    module["backbone"].requires_grad_(False)
    module["head"].weight.requires_grad_(False)
    found = delta.of(module, {"head.weight": torch.ones(2, 4, dtype=torch.bool)})
    assert found.keys() == {"format", "head.weight:shape", "head.weight:frozen", "head.bias:whole"}


def test_a_tied_parameter_is_stored_once_and_applied_to_both():
    """Under the first of its names; the other layer has the trained bits as well, and is still tied."""
    start = nn.ModuleDict({"embed": nn.Embedding(9, 4), "out": nn.Linear(4, 9, bias=False)})
    start["out"].weight = start["embed"].weight
    trained = copy.deepcopy(start)
    frozen = {"embed.weight": torch.arange(36).view(9, 4) % 5 > 0}
    train_(trained, frozen)
    found = delta.of(trained, frozen)
    assert found.keys() == {"format", *(f"embed.weight:{part}" for part in ("elements", "values", "shape", "frozen"))}
    assert contents(start) != contents(trained)
    delta.apply_delta(start, found)
    assert contents(start) == contents(trained)
    assert start["out"].weight is start["embed"].weight


@pytest.mark.parametrize("frozen", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_the_file_is_as_large_as_the_live_fraction(frozen, tmp_path):
    """A place takes .6 to 1 byte beside a value of 4: at most 1.4 (1 - f) of the state dict, rows 1.02 (1 - f)."""
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 200))
    save_file(model.state_dict(), tmp_path / "full")
    full = (tmp_path / "full").stat().st_size
    elements = {name: torch.rand(p.shape) < frozen for name, p in model.named_parameters()}
    rows = {name: (torch.rand(len(p)) < frozen).view(-1, *[1] * (p.dim() - 1)) for name, p in model.named_parameters()}
    rows = {name: mask.expand_as(model.get_parameter(name)) for name, mask in rows.items()}
    for masks_, times in ((elements, 1.4), (rows, 1.02)):
        delta.save(delta.of(model, masks_), tmp_path / "delta")
        live = sum(int((~mask).sum()) for mask in masks_.values()) / sum(mask.numel() for mask in masks_.values())
        size = (tmp_path / "delta").stat().st_size
        most = 1 if masks_ is elements and frozen <= 0.5 else times * live
        assert live * full * 0.99 <= size <= most * full + 2500


def flip_zero_(model):
    """A change of one bit in one frozen element that no comparison of numbers would see."""
    element = masks()["matrix"].nonzero()[0].tolist()
    assert model.matrix[tuple(element)] == 0
    model.matrix.data[tuple(element)] = -0.0


WRONG_MODELS = {
    "one bit": (flip_zero_, "not those of step t0: matrix differ"),
    "wholly frozen": (lambda model: model.still.data.add_(1), "not those of step t0: still differ"),
    "several": (
        lambda model: [p.data.add_(1) for p in model.parameters()],
        r"frozen_scalar, kernel, kernel_rows, .* and 3 more",
    ),
    "shape": (
        lambda model: setattr(model, "matrix", Parameter(model.matrix.data.view(15, 14))),
        r"'matrix' has the shape \(30, 7\) in the delta and \(15, 14\) in the model",
    ),
    "whole's shape": (lambda model: setattr(model, "live", Parameter(torch.ones(12))), r"takes values of \(12,\)"),
    "row's shape": (
        lambda model: setattr(model, "rows", Parameter(torch.ones(20, 6))),
        r"\(20, 3, 2\) in the delta and \(20, 6\) in",
    ),
    "row of nothing": (lambda model: setattr(model, "rows", Parameter(torch.ones(()))), r"delta and \(\) in the model"),
    "dtype": (lambda model: model.double(), "is torch.float64 of .* but the delta's are torch.float32"),
    "frozen dtype": (lambda model: setattr(model, "still", Parameter(model.still.data.half())), "t0: still differ"),
    "names": (lambda model: delattr(model, "vector"), "has vector, but the Bag has not"),
}
WRONG_DELTAS = {
    "prefix": (
        lambda d: {k if k == "format" else f"net.{k}": t for k, t in d.items()},
        r"net\.empty.* and 9 more, but",
    ),
    "no format": (lambda d: damaged(d, format=None), "has the format None, this version reads 1 and 2"),
    "format": (lambda d: damaged(d, format=torch.tensor(3)), "has the format 3, this version reads 1 and 2"),
    "no values": (lambda d: damaged(d, matrix__values=None), r"\['elements', 'frozen', 'shape'\] of 'matrix', but"),
    "no places": (
        lambda d: damaged(d, matrix__elements=None),
        r"\['frozen', 'shape', 'values'\] of 'matrix', but \['frozen'\]",
    ),
    "no fingerprint": (lambda d: damaged(d, rows__frozen=None), r"of 'rows', but \['frozen', 'rows', 'values'\] go"),
    "too much": (lambda d: damaged(d, matrix__whole=torch.ones(30, 7)), r"of 'matrix', but \['whole'\] go together"),
    "unknown part": (lambda d: damaged(d, matrix__sign=torch.ones(1)), "'sign', 'values'] of 'matrix'"),
    "too far": (
        lambda d: damaged(d, matrix__elements=d["matrix:elements"] + 3),
        r"'matrix' must ascend within \[0, 210\)",
    ),
    "negative": (
        lambda d: damaged(d, rows__rows=d["rows:rows"] - 1),
        r"rows of 'rows' must ascend within \[0, 20\), got \[-1",
    ),
    "twice": (lambda d: damaged(d, rows__rows=d["rows:rows"].clamp(max=5)), r"must ascend .*\[0, 5, 5, 5\]"),
    "no integers": (lambda d: damaged(d, rows__rows=d["rows:rows"].float()), "rows of 'rows' must ascend"),
    "other places": (lambda d: damaged(d, rows__rows=d["rows:rows"] + 1), "t0: rows differ"),
    "more values": (lambda d: damaged(d, rows__values=torch.ones(5, 3, 2)), r"takes values of \(4, 3, 2\)"),
    "other dtype": (lambda d: damaged(d, mean__whole=torch.ones(5).half()), "delta's are torch.float16"),
}
WRONG = [(spoil, None, text) for spoil, text in WRONG_MODELS.values()]
WRONG += [(None, spoil, text) for spoil, text in WRONG_DELTAS.values()]


@pytest.mark.parametrize(("spoil_model", "spoil_delta", "text"), WRONG, ids=[*WRONG_MODELS, *WRONG_DELTAS])
def test_what_does_not_fit_is_refused_and_nothing_is_written(spoil_model, spoil_delta, text):
    """The model has the bits that it had; without the damage the same delta moves it."""

    def start():
        model = Bag()
        model.matrix.data[tuple(masks()["matrix"].nonzero()[0].tolist())] = 0.0
        return model

    found = delta.of(train_(start(), masks()), masks())
    model = start()
    if spoil_model:
        spoil_model(model)
    before = contents(model)
    with pytest.raises(ValueError, match=text):
        delta.apply_delta(model, spoil_delta(found) if spoil_delta else found)
    assert contents(model) == before
    model = start()
    before = contents(model)
    delta.apply_delta(model, found)
    assert contents(model) != before


def test_weights_of_zeros_are_told_apart_by_dtype_and_places():
    """Where the bits left alone are all the same: another 16-bit format, or values for the next elements."""
    start = nn.Linear(20, 5, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(start.weight)
    frozen = {"weight": torch.arange(100).view(5, 20) % 10 > 0}
    found = delta.of(start, frozen)
    assert found["weight:elements"].tolist() == list(range(0, 100, 10))
    delta.apply_delta(start, found)
    with pytest.raises(ValueError, match="not those of step t0"):
        delta.apply_delta(start, damaged(found, weight__elements=found["weight:elements"] + 1))
    found = delta.of(start, {"weight": torch.ones(5, 20, dtype=torch.bool)})
    delta.apply_delta(start, found)
    with pytest.raises(ValueError, match="not those of step t0"):
        delta.apply_delta(start.half(), found)


def test_only_what_the_delta_leaves_alone_must_be_as_at_t0():
    """Other values in the live elements are no other weights: they are overwritten. So a delta can be applied twice."""
    trained = train_(Bag(), masks())
    found = delta.of(trained, masks())
    model = Bag()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_((~masks().get(name, torch.zeros(p.shape, dtype=torch.bool))).to(p.dtype))
    assert contents(model) != contents(Bag())
    for _ in range(2):
        delta.apply_delta(model, found)
        assert contents(model) == contents(trained)


def test_part_of_a_delta_is_a_delta():
    """With its format it is applied to what it names, and to nothing else."""
    trained = train_(Bag(), masks())
    part = {key: tensor for key, tensor in delta.of(trained, masks()).items() if key == "format" or "matrix" in key}
    model = Bag()
    delta.apply_delta(model, part)
    assert content(model.matrix) == content(trained.matrix) != content(Bag().matrix)
    assert {name for name, bits in contents(model).items() if bits != contents(Bag())[name]} == {"matrix"}


@pytest.mark.parametrize(
    ("frozen", "text"),
    [
        ({"weights": torch.ones(1, 1, dtype=torch.bool)}, "`frozen` has weights, no parameters of the Linear"),
        ({"weight": torch.ones(2, dtype=torch.bool)}, r"\(2, 3\) for 'weight'; got torch.bool of \(2,\)"),
        ({"weight": torch.ones(2, 3)}, r"A mask of `frozen` must be bool .* got torch.float32 of \(2, 3\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(frozen, text):
    with pytest.raises(ValueError, match=text):
        delta.of(nn.Linear(3, 2), frozen)


def test_what_is_no_delta_is_refused(tmp_path):
    """Neither another type nor another safetensors file."""
    with pytest.raises(TypeError, match="`delta` must be a mapping of tensors, or the path or bytes of a file, got 3"):
        delta.apply_delta(nn.Linear(3, 2), 3)
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / "weights")
    with pytest.raises(ValueError, match="has the format None, this version reads 1 and 2: is it a delta's file"):
        delta.apply_delta(nn.Linear(3, 2), tmp_path / "weights")


def test_without_the_extras_the_error_names_them(monkeypatch, tmp_path):
    found = delta.of(nn.Linear(3, 2), {})
    delta.save(found, tmp_path / "delta")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors: `pip install lightning-gcfreeze\[export\]`"):
        delta.save(found, tmp_path / "delta")
    with pytest.raises(ImportError, match=r"safetensors: `pip install lightning-gcfreeze\[export\]`"):
        delta.apply_delta(nn.Linear(3, 2), tmp_path / "delta")


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    fraction=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    by_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_mask_of_any_shape_there_and_back(shape, dtype, fraction, by_row, seed):
    """Trained bits from those of t0; from those with one frozen element changed an error, where one is told apart."""
    generator = torch.Generator().manual_seed(seed)
    start, trained, other = nn.Module(), nn.Module(), nn.Module()
    start.p = Parameter(torch.randn(shape, generator=generator).to(dtype))
    mask = torch.rand(shape[:1] if by_row else shape, generator=generator) < fraction
    frozen = {"p": mask.reshape([*mask.shape, *[1] * (len(shape) - mask.dim())]).expand(shape)}
    trained.p = Parameter(torch.where(frozen["p"], start.p.data, start.p.data + 1))
    other.p = Parameter(start.p.data.clone())
    found = delta.of(trained, frozen)
    assert frozen["p"].all() or content(start.p) != content(trained.p)
    if "p:whole" not in found:
        other.p.data.view(-1)[frozen["p"].flatten().nonzero()[-1]] += 1
        with pytest.raises(ValueError, match="not those of step t0: p differ"):
            delta.apply_delta(other, found)
    delta.apply_delta(start, found)
    assert content(start.p) == content(trained.p)


def test_a_frozen_run_from_t0_on():
    """Of a network with BatchNorm: the weights of t0 and the delta at the end give all that the run ended with."""
    module = cases.Regression(cases.convnet())
    freeze = GradCovFreezeCallback(t0=5, k=0.8)
    at_t0 = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if freeze.phase == "frozen" and not at_t0:
                at_t0.update(copy.deepcopy(pl_module.state_dict()))

    cases.trainer(callbacks=[freeze, Keep()]).fit(module, cases.loader())
    model = cases.Regression(cases.convnet())
    model.load_state_dict(at_t0)
    moved = {name for name, bits in contents(model).items() if bits != contents(module)[name]}
    assert {"network.1.weight", "network.2.running_var", "network.2.num_batches_tracked"} <= moved
    delta.apply_delta(model, delta.of(module, freeze.frozen))
    assert contents(model) == contents(module)
