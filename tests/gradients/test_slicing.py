"""The first sample of batches of every form, and the batches that are refused."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_gcfreeze.gradients.slicing import UnclearBatchError, batch_size, first_sample

S = 3
HINT = r"Give your module a method `gcfreeze_first_sample\(self, batch\)`"

Pair = namedtuple("Pair", "x y")


class Encoding(UserDict):
    """Like the BatchEncoding of transformers: a mapping with a `to` and an attribute of its own."""

    def __init__(self, data, encodings=None):
        super().__init__(data)
        self.encodings = encodings

    def to(self, device):
        return self


@dataclass
class Plain:
    x: Tensor
    y: Tensor
    note: str = "as it is"


@dataclass(frozen=True)
class Unchangeable:
    x: Tensor
    y: Tensor


@dataclass(slots=True)
class Slotted:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Both:
    x: Tensor
    y: Tensor


@dataclass
class Derived:
    """One field is not among the arguments, and one argument is not a field."""

    x: Tensor
    scale: InitVar[float]
    y: Tensor = field(init=False)

    def __post_init__(self, scale):
        self.y = self.x.sum(1) * scale


@dataclass
class WithMore:
    """Keeps a tensor that is no field."""

    x: Tensor
    weight: InitVar[Tensor]

    def __post_init__(self, weight):
        self.weighted = self.x * weight


ALL = (0, 1, 2)  # the samples that there are


def x(ids=ALL):
    return torch.arange(4.0 * S).view(S, 4)[list(ids)]


def y(ids=ALL):
    return torch.arange(S)[list(ids)]


def of(ids, *things):
    """Those of the things, one a sample, that belong to the samples."""
    return [things[i] for i in ids]


FORMS = {  # a batch of the given samples
    "tensor": x,
    "tuple": lambda ids=ALL: (x(ids), y(ids)),
    "list": lambda ids=ALL: [x(ids), y(ids)],
    "named tuple": lambda ids=ALL: Pair(x(ids), y(ids)),
    "dict": lambda ids=ALL: {"x": x(ids), 7: y(ids)},
    "OrderedDict": lambda ids=ALL: OrderedDict(y=y(ids), x=x(ids)),
    "defaultdict": lambda ids=ALL: defaultdict(list, x=x(ids)),
    "UserDict": lambda ids=ALL: UserDict(x=x(ids), y=y(ids)),
    "batch encoding": lambda ids=ALL: Encoding({"input_ids": y(ids), "mask": x(ids) > 2}, encodings="kept"),
    "dataclass": lambda ids=ALL: Plain(x(ids), y(ids), "kept"),
    "frozen dataclass": lambda ids=ALL: Unchangeable(x(ids), y(ids)),
    "dataclass with slots": lambda ids=ALL: Slotted(x(ids), y(ids)),
    "frozen dataclass with slots": lambda ids=ALL: Both(x(ids), y(ids)),
    "dataclass with InitVar": lambda ids=ALL: Derived(x(ids), 2.0),
    "NumPy": lambda ids=ALL: (x(ids).numpy(), y(ids).numpy()),
    "NumPy scalars": lambda ids=ALL: (x(ids), np.array(5.0), np.float32(2.0)),
    "text beside a tensor": lambda ids=ALL: (x(ids), of(ids, "one", "two", "three")),
    "numbers beside a tensor": lambda ids=ALL: {"x": x(ids), "weights": tuple(of(ids, 0.5, 2, None))},
    "text alone": lambda ids=ALL: {"text": of(ids, "one", "two", "three")},
    "remarks": lambda ids=ALL: {
        "x": x(ids),
        "names": ["a", "b"],
        "epoch": 3,
        "split": "train",
        "no": None,
        "empty": [],
    },
    "nested": lambda ids=ALL: {
        "inputs": [x(ids), (y(ids), {"deep": Plain(x(ids), y(ids))})],
        "ids": of(ids, "a", "b", "c"),
    },
    "image batch": lambda ids=ALL: (
        torch.arange(S * 24.0).view(S, 2, 3, 4)[list(ids)].to(memory_format=torch.channels_last)
    ),
    "requires grad": lambda ids=ALL: (x(ids).requires_grad_(), y(ids)),
    "half and bool": lambda ids=ALL: (x(ids).bfloat16(), y(ids) > 0),
    "other objects": lambda ids=ALL: (x(ids), SimpleNamespace(length=3), {1, 2, 3}),
}


def parts(value: Any, path: str = "") -> dict[str, Any]:
    """What a batch is made of, by path: containers as their types, tensors as themselves. The tests' own walk."""
    if isinstance(value, Mapping):
        inner = {f"{path}[{key!r}]": item for key, item in value.items()}
    elif isinstance(value, list | tuple):
        inner = {f"{path}[{i}]": item for i, item in enumerate(value)}
    elif is_dataclass(value):
        inner = {f"{path}.{f.name}": getattr(value, f.name) for f in fields(value)}
    else:
        return {path: value}
    found = {path: type(value)}
    for key, item in inner.items():
        found |= parts(item, key)
    return found


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit, in every part: types, dtypes, shapes, values, requires_grad."""
    first, second = parts(one), parts(other)
    assert first.keys() == second.keys()
    for path, a in first.items():
        b = second[path]
        assert type(a) is type(b), path
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), path
            assert torch.equal(a, b), path
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, path
            np.testing.assert_array_equal(a, b, strict=True)
        else:
            assert a == b, path


@pytest.mark.parametrize("form", FORMS)
def test_first_sample_equals_the_batch_built_of_it(form):
    """Cut from a batch of three it equals, to the bit, the batch built of it alone; S is told, the batch untouched."""
    batch = FORMS[form]()
    sample, size = first_sample(batch)
    assert size == batch_size(batch) == S
    assert_same(sample, FORMS[form]((0,)))
    assert_same(batch, FORMS[form]())


@pytest.mark.parametrize("form", FORMS)
def test_batch_of_one_is_its_own_first_sample(form):
    """S = 1 is cut too: refusing it is not the business of this module."""
    batch = FORMS[form]((0,))
    sample, size = first_sample(batch)
    assert size == 1
    assert_same(sample, batch)


@pytest.mark.parametrize("form", FORMS)
def test_copies_of_the_first_sample_equal_the_batch_built_of_them(form):
    """Two or three, cut from all samples or from a batch of one, equal the batch that is built of it that often."""
    for copies in (2, 3):
        expected = FORMS[form]((0,) * copies)
        assert_same(first_sample(FORMS[form](), copies)[0], expected)
        assert_same(first_sample(FORMS[form]((0,)), copies)[0], expected)


def test_tensor_of_length_one_is_kept_for_every_sample():
    """Of length 1, it is part of every sample; beside two copies of a sample it may stand twice: it means the same."""
    batch = {"x": x(), "positions": torch.arange(4.0).view(1, 4)}
    sample, size = first_sample(batch)
    assert size == S
    assert_same(sample, {"x": x((0,)), "positions": batch["positions"]})
    twice = first_sample(batch, copies=2)[0]
    assert_same(twice["x"] + twice["positions"], (x() + batch["positions"])[[0, 0]])


@pytest.mark.parametrize("name", ["encodings", "default_factory"])
def test_attributes_of_a_mapping_are_kept(name):
    """A copy of the mapping itself is filled, so attributes and a default survive."""
    batch = {"encodings": FORMS["batch encoding"](), "default_factory": FORMS["defaultdict"]()}[name]
    sample, _ = first_sample(batch)
    assert getattr(sample, name) == getattr(batch, name) is not None


def test_immutable_mapping_becomes_a_dict():
    """It has no general way to be built anew; a dict answers the same questions."""
    sample, size = first_sample(MappingProxyType({"x": x(), "y": y()}))
    assert size == S
    assert_same(sample, {"x": x((0,)), "y": y((0,))})


def test_zero_dimensional_tensor_is_kept():
    """A temperature beside the samples has no first axis: like a number, it belongs to the batch as a whole."""
    sample, size = first_sample({"x": x(), "temperature": torch.tensor(0.5)})
    assert size == S
    assert_same(sample, {"x": x((0,)), "temperature": torch.tensor(0.5)})


def test_sparse_tensor_is_cut_along_its_first_axis():
    """It cannot be sliced; one row of it can be had all the same."""
    sample, size = first_sample((x().to_sparse(), y()))
    assert size == S
    assert torch.equal(sample[0].to_dense(), x((0,)))


@pytest.mark.parametrize(
    "things",
    [
        [np.int64(4), np.int64(5), np.int64(6)],
        [Path("a"), Path("b"), Path("c")],
        [["a dog"], ["a cat", "two cats"], ["a bird"]],
    ],
    ids=["NumPy's integers", "paths", "ragged lists"],
)
def test_list_of_s_objects_without_tensors_is_cut(things):
    """As with texts; passed on whole, three captions would meet one image."""
    sample, _ = first_sample((x(), things))
    assert sample[1] == things[:1]


def test_dataclass_attributes_that_are_no_fields_are_cut():
    """What ``__post_init__`` computed is part of the batch: left whole, one sample would meet the weights of three."""
    sample, _ = first_sample(WithMore(x(), torch.tensor(2.0)))
    assert torch.equal(sample.x, x((0,)))
    assert torch.equal(sample.weighted, 2 * x((0,)))


class TestCopies:
    """What `training_step` does to its batch must not reach the sample."""

    @staticmethod
    def spoil(batch):
        """Change every array of a batch in place."""
        for part in parts(batch).values():
            if isinstance(part, Tensor) and part.is_floating_point():
                part.data.add_(100.0)
            elif isinstance(part, Tensor):
                part.data.logical_not_()
            elif isinstance(part, np.ndarray):
                part += 100

    @pytest.mark.parametrize("form", [f for f in FORMS if f not in ("text alone", "NumPy scalars")])
    def test_in_place_change_of_the_batch_does_not_reach_the_sample(self, form):
        """The sample is as it was cut; the batch did change, and with it what a mere slice would have seen."""
        batch = FORMS[form]()
        sample, _ = first_sample(batch)
        slices = [part[:1] for part in parts(batch).values() if isinstance(part, Tensor | np.ndarray)]
        before = [piece.tolist() for piece in slices]
        self.spoil(batch)
        assert_same(sample, FORMS[form]((0,)))
        assert slices
        assert all(piece.tolist() != was for piece, was in zip(slices, before, strict=True))

    @pytest.mark.parametrize(
        "make",
        [lambda: torch.zeros(1, 4), lambda: torch.tensor(0.5), lambda: np.array(0.5)],
        ids=["of length 1", "without axes", "NumPy without axes"],
    )
    def test_tensors_that_are_not_cut_are_copied(self, make):
        """A table that all samples share, a temperature: a `training_step` may change them in place, too."""
        batch = {"x": x(), "shared": make()}
        sample, _ = first_sample(batch)
        self.spoil(batch)
        assert_same(sample, {"x": x((0,)), "shared": make()})
        assert batch["shared"].tolist() != make().tolist()

    @pytest.mark.parametrize("form", ["list", "dict", "batch encoding", "dataclass", "nested"])
    def test_replacing_an_item_of_the_batch_does_not_reach_the_sample(self, form):
        """``batch["x"] = …`` in a `training_step` fills the batch's container, not the sample's."""
        batch = FORMS[form]()
        sample, _ = first_sample(batch)
        if is_dataclass(batch):
            batch.x = None
        else:
            batch[0 if form == "list" else next(iter(batch))] = None
        assert_same(sample, FORMS[form]((0,)))


class TestPackedSequences:
    """Of different lengths, stored step by step."""

    @staticmethod
    def sequences(lengths, features=2):
        generator = torch.Generator().manual_seed(4)
        return [torch.randn(n, features, generator=generator) for n in lengths]

    @pytest.mark.parametrize("lengths", [(5, 3, 3, 1), (2, 2), (4,), (1, 1, 1)], ids=str)
    @pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
    def test_first_sequence_is_packed_alone(self, lengths, enforce_sorted):
        """It equals the packing of the first sequence in every field, whether the batch was sorted or not."""
        one = self.cut(self.sequences(lengths), enforce_sorted)
        self.assert_alone(one, self.sequences(lengths)[:1], enforce_sorted)

    def test_first_sequence_of_an_unsorted_batch_is_the_first_given(self):
        """An unsorted batch is stored longest first; its first sample may be the shortest."""
        one = self.cut(self.sequences((1, 5, 3)), enforce_sorted=False)
        self.assert_alone(one, self.sequences((1, 5, 3))[:1], enforce_sorted=False)

    def test_lstm_output_on_the_first_sequence_is_unchanged(self):
        """An LSTM makes the same of it, outputs and last state, as of the first sequence of the whole batch."""
        sequences = self.sequences((2, 5, 3))
        packed = pack_sequence(sequences, enforce_sorted=False)
        lstm = torch.nn.LSTM(2, 3).double()
        _, (h, c) = lstm(packed.to(torch.float64))
        _, (h_one, c_one) = lstm(first_sample(packed)[0].to(torch.float64))
        torch.testing.assert_close(h_one, h[:, :1])
        torch.testing.assert_close(c_one, c[:, :1])

    @pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
    def test_copies_of_a_sequence_are_packed_together(self, enforce_sorted):
        """Two copies equal the packing of the first sequence with itself."""
        sequences = self.sequences((5, 3, 1))
        twice, size = first_sample(pack_sequence(sequences, enforce_sorted), copies=2)
        assert size == S
        self.assert_alone(twice, [sequences[0], sequences[0]], enforce_sorted)

    def test_number_of_sequences_must_agree_with_other_tensors(self):
        """S is the number of sequences, not of steps or elements, and must agree with the rest of the batch."""
        packed = pack_sequence(self.sequences((1, 5, 3)), enforce_sorted=False)
        (one, target), size = first_sample((packed, y()))
        assert size == S
        assert torch.equal(target, y((0,)))
        self.assert_alone(one, self.sequences((1, 5, 3))[:1], enforce_sorted=False)
        with pytest.raises(UnclearBatchError, match=r"batch\[0\]: 3, batch\[1\]: 9"):
            first_sample((packed, torch.zeros(9)))

    @staticmethod
    def cut(sequences, enforce_sorted):
        packed = pack_sequence(sequences, enforce_sorted)
        one, size = first_sample(packed)
        assert size == len(sequences)
        packed.data.add_(100.0)  # reaches a sample that is not a copy
        return one

    @staticmethod
    def assert_alone(one, sequences, enforce_sorted):
        assert isinstance(one, PackedSequence)
        for ours, theirs in zip(one, pack_sequence(sequences, enforce_sorted), strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


class Graph:
    """Several graphs one behind the other as one, as PyG stores them: a plain object with attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@dataclass
class GraphRecord:
    """The same as a dataclass."""

    x: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    batch: Tensor
    y: Tensor
    batch_size: int
    name: str


def joined(graphs, kind=Graph):
    """Put graphs (nodes, edges) one behind the other; node k of graph g has the feature 10 g + k."""
    offsets = np.cumsum([0, *(nodes for nodes, _ in graphs)])
    edges = [(a + offset, b + offset) for (_, e), offset in zip(graphs, offsets, strict=False) for a, b in e]
    features = [10.0 * g + k for g, (nodes, _) in enumerate(graphs) for k in range(nodes)]
    return kind(
        x=torch.tensor(features).view(-1, 1),
        edge_index=torch.tensor(edges, dtype=torch.int64).view(-1, 2).t(),
        edge_attr=torch.tensor([float(100 * g + i) for g, (_, e) in enumerate(graphs) for i in range(len(e))]),
        batch=torch.tensor([g for g, (nodes, _) in enumerate(graphs) for _ in range(nodes)]),
        y=torch.arange(len(graphs)).view(-1, 1),
        batch_size=len(graphs),
        name="kept",
    )


RING, PATH, STAR = (
    (3, [(0, 1), (1, 2), (2, 0)]),
    (4, [(0, 1), (1, 2), (2, 3)]),
    (5, [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]),
)


class TestGraphs:
    """Cut like a batch of graphs, not along the first axis of each tensor."""

    @pytest.mark.parametrize("kind", [Graph, GraphRecord])
    @pytest.mark.parametrize(
        "graphs", [(PATH, STAR), (STAR, RING, PATH), (PATH,), ((2, []), STAR)], ids=["2", "3", "1", "no edges"]
    )
    def test_first_graph_equals_the_batch_built_of_it(self, kind, graphs):
        """Nodes, edges and targets are those of the first graph built alone, and copies."""
        batch = joined(graphs, kind)
        sample, size = first_sample(batch)
        assert size == len(graphs)
        for value in vars(batch).values():
            if isinstance(value, Tensor):
                value.add_(100)  # reaches a sample that is not a copy
        assert type(sample) is kind
        assert_same(vars(sample), vars(joined(graphs[:1], kind)))

    def test_number_of_graphs_must_agree_with_other_tensors(self):
        """Its size is the number of graphs, and must agree with the rest."""
        (graph, target), size = first_sample((joined([PATH, STAR]), torch.arange(2)))
        assert size == 2
        assert torch.equal(target, torch.arange(1))
        assert_same(vars(graph), vars(joined([PATH])))

    def test_tensor_of_ambiguous_length_is_an_error(self):
        """With 7 nodes and 7 edges, of which the first graph has 4 and 3, a tensor of length 7 may be either."""
        batch = joined([PATH, (3, [(0, 1), (1, 2), (2, 0), (0, 2)])])
        assert len(batch.x) == len(batch.edge_attr) == 7
        with pytest.raises(
            UnclearBatchError, match=rf"batch\.\w+ of shape \(.*7.*\) belongs to nodes, edges or graphs\. {HINT}"
        ):
            first_sample(batch)

    def test_tensor_of_unknown_length_is_an_error(self):
        """The error names the attribute and its shape."""
        batch = joined([PATH, STAR])
        batch.cells = torch.zeros(13, 2)
        with pytest.raises(
            UnclearBatchError, match=rf"batch\.cells of shape \(13, 2\) belongs to nodes, edges or graphs\. {HINT}"
        ):
            first_sample(batch)

    def test_copies_of_a_graph_are_an_error(self):
        """Copies of a graph would need other indices; the error says so instead of giving one."""
        with pytest.raises(
            UnclearBatchError,
            match=rf"Only the first graph of batch can be cut out, and only once\. {HINT}",
        ):
            first_sample(joined([PATH, STAR]), copies=2)

    def test_interleaved_graphs_are_an_error(self):
        """Nodes of the first graph behind nodes of the second: there is no front part to cut off."""
        batch = joined([PATH, STAR])
        batch.batch = batch.batch.flip(0)
        with pytest.raises(UnclearBatchError, match=rf"graphs of batch are not stored one behind the other\. {HINT}"):
            first_sample(batch)


class FakeBatch:
    """What PyG's Batch offers: a list of data, one of which can be had back."""

    def __init__(self, data):
        self.data = data
        self.x = torch.cat([d["x"] for d in data])

    @classmethod
    def from_data_list(cls, data):
        return cls(data)

    def get_example(self, i):
        return self.data[i]

    @property
    def num_graphs(self):
        return len(self.data)


def test_pyg_batch_is_rebuilt_from_its_first_graph():
    """It is built anew from a copy of its first graph by its own class; the tests' stand-in has no other tensors."""
    batch = FakeBatch([{"x": torch.arange(2.0)}, {"x": torch.arange(5.0)}])
    sample, size = first_sample(batch)
    assert (type(sample), size, sample.num_graphs) == (FakeBatch, 2, 1)
    batch.data[0]["x"].add_(100.0)
    assert torch.equal(sample.x, torch.arange(2.0))
    assert torch.equal(sample.data[0]["x"], torch.arange(2.0))
    twice, _ = first_sample(FakeBatch([{"x": torch.arange(2.0)}, {"x": torch.arange(5.0)}]), copies=2)
    assert twice.num_graphs == 2
    assert torch.equal(twice.x, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert twice.data[0]["x"] is not twice.data[1]["x"]


class HasTo:
    """Can be moved to a device, so it holds tensors somewhere."""

    def to(self, device):
        return self


class HasSlots:
    __slots__ = ("hidden",)

    def __init__(self):
        self.hidden = x()


class TestErrors:
    """A wrong cut would train on silently, so what is not certain is an error with the way out."""

    @pytest.mark.parametrize(
        ("batch", "sizes"),
        [
            ((torch.zeros(3), torch.zeros(4)), r"batch\[0\]: 3, batch\[1\]: 4"),
            ({"a": {"b": [torch.zeros(2, 5)]}, "y": torch.zeros(5)}, r"batch\['a'\]\['b'\]\[0\]: 2, batch\['y'\]: 5"),
            (Pair(torch.zeros(3), np.zeros((4, 2))), r"batch\.x: 3, batch\.y: 4"),
            (Plain(torch.zeros(6), torch.zeros(7)), r"batch\.x: 6, batch\.y: 7"),
            ((torch.zeros(3), torch.zeros(0)), r"batch\[0\]: 3, batch\[1\]: 0"),
        ],
        ids=["tuple", "nested", "named tuple", "dataclass", "empty"],
    )
    def test_tensors_of_different_lengths_are_an_error(self, batch, sizes):
        """The error lists where each tensor is, and its length."""
        with pytest.raises(UnclearBatchError, match=rf"differ in their first axis \({sizes}\)\. {HINT}"):
            first_sample(batch)

    @pytest.mark.parametrize(
        "batch",
        [None, 3, "text", {}, [], {"a": None}, torch.tensor(1.0), torch.zeros(0, 3), np.array(1.0), object()],
        ids=["None", "int", "str", "dict", "list", "dict of None", "0-dim", "empty", "0-dim array", "object"],
    )
    def test_batch_without_samples_is_an_error(self, batch):
        """The error names the type of the batch."""
        with pytest.raises(UnclearBatchError, match=rf"of type {type(batch).__name__}\. {HINT}"):
            first_sample(batch)

    @pytest.mark.parametrize("where", ["batch", r"batch\[1\]"])
    @pytest.mark.parametrize(
        "opaque",
        [SimpleNamespace(x=x()), HasTo(), HasSlots(), SimpleNamespace(parts=[x()]), SimpleNamespace(parts={"x": x()})],
        ids=["attribute", "to", "slots", "list", "dict"],
    )
    def test_unknown_objects_that_hold_tensors_are_an_error(self, opaque, where):
        """Passed on whole they would be S samples among first ones; the error names place and type."""
        batch = opaque if where == "batch" else (x(), opaque)
        with pytest.raises(
            UnclearBatchError,
            match=rf"(out of|nothing to cut in a) {where} of type {type(opaque).__name__}\. {HINT}",
        ):
            first_sample(batch)

    def test_error_is_a_value_error(self):
        """It is a ValueError, so it can be caught without importing it."""
        with pytest.raises(ValueError, match=HINT):
            batch_size(None)
