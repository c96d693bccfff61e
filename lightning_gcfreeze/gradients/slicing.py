"""Cut one sample out of a batch of any form, as a batch of one.

A batch is taken apart down to its tensors. Their first axes must agree on one length, the batch size S, or have the
length 1. A batch that cannot be cut with certainty is an error, because a wrong cut would go unnoticed.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

HINT = (
    "Give your module a method `gcfreeze_first_sample(self, batch)` that returns a batch of the same form"
    " that holds only the first sample."
)


class UnclearBatchError(ValueError):
    """The first sample of a batch cannot be cut out with certainty.

    The message says why, and that the module can do it by a method `gcfreeze_first_sample`.
    """


class Sample(NamedTuple):
    """A sample of a batch, to be cut out."""

    number: int = 0
    """0-based number of the sample in its batch."""
    copies: int = 1
    """How often the sample occurs in the new batch."""


def first_sample(batch: Any, copies: int = 1) -> tuple[Any, int]:
    """Cut the first sample out of a batch.

    A batch may be a tensor or NumPy array (samples along the first axis); a tuple, named tuple, list, mapping or
    dataclass of batches, nested to any depth; a list of S strings or numbers; a packed sequence; a PyG batch, or a
    graph like one, with the attributes ``edge_index`` and ``batch`` (as in Chemprop). Other objects without tensors are
    passed on unchanged. Tensors are copied, so that changes of the batch in place do not reach the sample.

    Args:
        batch: not modified.
        copies: how often the sample occurs in the new batch.

    Returns:
        A batch of the same form with `copies` samples in place of S, and S.

    Raises:
        UnclearBatchError: the tensors do not agree on S, there is nothing to cut, or an object holds tensors in a way
            that is not known here.
    """
    size = batch_size(batch)
    return _cut(batch, size, Sample(0, copies)), size


def cut(batch: Any, sample: Sample) -> Any:
    """Cut any sample out of a batch, which is not modified; forms and errors as for `first_sample`."""
    return _cut(batch, batch_size(batch), sample)


def batch_size(batch: Any) -> int:
    """Return the number of samples, S; forms and errors as for `first_sample`."""
    if type(batch) in (tuple, list) and all(type(part) is Tensor and part.dim() for part in batch):
        lengths = {len(part) for part in batch}  # the common case, without a walk
        if len(lengths) == 1:
            return lengths.pop()
    sizes = dict(_sizes(batch, "batch"))
    size = max(sizes.values(), default=0) or _length_of_lists(batch)
    if any(n not in (1, size) for n in sizes.values()):
        listing = ", ".join(f"{path}: {n}" for path, n in sizes.items())
        raise UnclearBatchError(f"The tensors of the batch differ in their first axis ({listing}). {HINT}")
    if not size:
        raise UnclearBatchError(f"There is nothing to cut in a batch of type {type(batch).__name__}. {HINT}")
    return size


def batch_size_or_none(batch: Any) -> int | None:
    """Return the number of samples, or None if it is not certain."""
    try:
        return batch_size(batch)
    except UnclearBatchError:
        return None


class _Leaf(NamedTuple):
    size: int | None  # number of samples; None: there is no axis to cut along
    cut: Callable[[Sample], Any]


class _Container(NamedTuple):
    items: dict[str, Any]  # suffix of the path -> item
    rebuild: Callable[[list[Any]], Any]


def _sizes(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield the path of each leaf and the number of samples in it."""
    if leaf := _as_leaf(value, path):
        if leaf.size is not None:
            yield path, leaf.size
    elif container := _as_container(value):
        for key, item in container.items.items():
            yield from _sizes(item, path + key)
    elif callable(getattr(value, "to", None)) or any(_holds_tensors(item) for item in _attributes(value).values()):
        raise UnclearBatchError(f"Cannot cut the first sample out of {path} of type {type(value).__name__}. {HINT}")


def _cut(value: Any, size: int, sample: Sample) -> Any:
    if leaf := _as_leaf(value, "batch"):
        return leaf.cut(sample if leaf.size == size else sample._replace(number=0))
    if _is_list_without_tensors(value):
        return value[sample.number : sample.number + 1] * sample.copies if len(value) == size else value
    if container := _as_container(value):
        return container.rebuild([_cut(item, size, sample) for item in container.items.values()])
    return value


def _as_leaf(value: Any, path: str) -> _Leaf | None:
    if isinstance(value, Tensor):
        if not value.dim():
            return _Leaf(None, lambda sample: value.clone())
        return _Leaf(len(value), lambda sample: _repeated(value, sample))
    if isinstance(value, PackedSequence):
        return _Leaf(int(value.batch_sizes[0]), lambda sample: _cut_packed(value, sample))
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.ndarray):
        if not value.ndim:
            return _Leaf(None, lambda sample: value.copy())
        return _Leaf(len(value), lambda sample: value[sample.number : sample.number + 1].repeat(sample.copies, axis=0))
    if hasattr(value, "get_example") and hasattr(value, "num_graphs"):  # a batch of PyG
        return _Leaf(value.num_graphs, lambda sample: _cut_pyg(value, sample))
    if isinstance(getattr(value, "edge_index", None), Tensor) and isinstance(getattr(value, "batch", None), Tensor):
        return _Leaf(int(value.batch.max()) + 1, lambda sample: _first_graph(value, sample, path))
    return None


def _as_container(value: Any) -> _Container | None:
    if isinstance(value, Mapping):
        return _Container({f"[{key!r}]": item for key, item in value.items()}, lambda items: _refill(value, items))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        attributes = _attributes(value)
        return _Container(
            {f".{name}": item for name, item in attributes.items()},
            lambda items: _with_attributes(value, dict(zip(attributes, items, strict=True))),
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = {f".{name}": item for name, item in zip(value._fields, value, strict=True)}
        return _Container(items, lambda items: type(value)(*items))
    if isinstance(value, list | tuple):
        return _Container({f"[{i}]": item for i, item in enumerate(value)}, type(value))
    return None


def _is_list_without_tensors(value: Any) -> bool:
    """Return whether it is a list of texts, numbers, …: one for each sample if it has S, else about the whole batch."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
        return False
    return len(value) > 0 and next(_sizes(value, ""), None) is None


def _length_of_lists(value: Any) -> int:
    """Return S of a batch without tensors, such as a list of texts; 0 if there is no list."""
    if _is_list_without_tensors(value):
        return len(value)
    container = _as_container(value)
    return max(map(_length_of_lists, container.items.values()), default=0) if container else 0


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, in its ``__dict__`` or in slots."""
    slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, list | tuple | set) and any(map(_holds_tensors, value)))


def _repeated(batch: Tensor, sample: Sample) -> Tensor:
    """Copy one sample of a dense or sparse tensor into new memory."""
    chosen = torch.full((sample.copies,), sample.number, dtype=torch.long, device=batch.device)
    return batch.detach().index_select(0, chosen).requires_grad_(batch.requires_grad)


def _refill(mapping: Mapping[Any, Any], items: list[Any]) -> Mapping[Any, Any]:
    filled = copy.copy(mapping) if isinstance(mapping, MutableMapping) else dict(mapping)
    for key, item in zip(mapping, items, strict=True):
        filled[key] = item
    return filled


def _with_attributes(value: Any, attributes: dict[str, Any]) -> Any:
    """Return a shallow copy with other attributes, also of a frozen dataclass or one with slots."""
    changed = copy.copy(value)
    for name, item in attributes.items():
        object.__setattr__(changed, name, item)
    return changed


def _cut_packed(packed: PackedSequence, sample: Sample) -> PackedSequence:
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    length = lengths[sample.number : sample.number + 1]
    one = pack_padded_sequence(
        _repeated(padded, sample)[:, : int(length)], length.repeat(sample.copies), batch_first=True
    )
    if packed.unsorted_indices is None:
        return one
    order = torch.arange(sample.copies, device=packed.unsorted_indices.device)
    return PackedSequence(one.data, one.batch_sizes, order, order)


def _cut_pyg(batch: Any, sample: Sample) -> Any:
    return type(batch).from_data_list([copy.deepcopy(batch.get_example(sample.number)) for _ in range(sample.copies)])


def _first_graph(graph: Any, sample: Sample, path: str) -> Any:
    """Cut out the first of several graphs that are stored one behind the other as one: nodes, edges, then the rest."""
    if sample != Sample():
        raise UnclearBatchError(f"Only the first graph of {path} can be cut out, and only once. {HINT}")
    is_first = graph.batch == 0
    of_first = is_first[graph.edge_index[0]]
    lengths = {  # in the batch -> in the first graph
        "nodes": (len(is_first), int(is_first.sum())),
        "edges": (len(of_first), int(of_first.sum())),
        "graphs": (int(graph.batch.max()) + 1, 1),
    }
    if not (is_first[: lengths["nodes"][1]].all() and of_first[: lengths["edges"][1]].all()):
        raise UnclearBatchError(f"The graphs of {path} are not stored one behind the other. {HINT}")
    attributes: dict[str, Any] = {}
    for name, value in _attributes(graph).items():
        if isinstance(value, Tensor) and value.dim():
            axis = value.dim() - 1 if "edge_index" in name and value.dim() == 2 else 0
            cuts = {cut for length, cut in lengths.values() if length == value.shape[axis]}
            if len(cuts) != 1:
                raise UnclearBatchError(
                    f"It is unclear whether {path}.{name} of shape {tuple(value.shape)} belongs to nodes, edges or"
                    f" graphs. {HINT}"
                )
            attributes[name] = value.narrow(axis, 0, cuts.pop()).clone()
        elif isinstance(value, int) and name.endswith("size") and value == lengths["graphs"][0]:
            attributes[name] = 1
    return _with_attributes(graph, attributes)
