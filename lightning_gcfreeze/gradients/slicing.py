"""The first sample of a batch of any form, as a batch of one.

A batch is taken apart down to its tensors. They must agree on one length along their first axis, the batch size S, or
have the length 1. What cannot be cut for certain is refused: a wrong cut would train on silently.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

WAY_OUT = (
    "Give your LightningModule a method `gcfreeze_first_sample(self, batch)` that returns a batch of the same form"
    " with nothing but the first sample in it."
)


class UnclearBatchError(ValueError):
    """The first sample cannot be cut out for certain; the message says why, and that the module can do it."""


def first_sample(batch: Any, copies: int = 1) -> tuple[Any, int]:
    """Cut the first sample out of a batch.

    Understood are tensors and NumPy arrays (samples along the first axis), tuples, named tuples, lists, mappings and
    dataclasses of these, nested as you like; lists of S strings or numbers; packed sequences; PyG batches and graphs
    like them, with the attributes ``edge_index`` and ``batch``. Other objects without tensors pass as they are.
    Tensors are copied: what `training_step` does to its batch in place does not reach the sample.

    Args:
        batch: of any of these forms. Not modified.
        copies: how often the sample is to stand in the new batch.

    Returns:
        The sample, a batch of the same form with `copies` in place of S samples, and S.

    Raises:
        UnclearBatchError: the tensors do not agree on S, there is nothing to cut, or an object holds tensors in a way
            that is not known here.
    """
    size = batch_size(batch)
    return _one(batch, size, 0, copies), size


def sample(batch: Any, index: int, copies: int = 1) -> Any:
    """Cut any other sample out of a batch; see `first_sample`, whose errors are these.

    Args:
        batch: not modified.
        index: of the sample, from 0.
        copies: how often it is to stand in the new batch.
    """
    return _one(batch, batch_size(batch), index, copies)


def batch_size(batch: Any) -> int:
    """S: see `first_sample`, whose errors are these."""
    if type(batch) in (tuple, list) and all(type(part) is Tensor and part.dim() for part in batch):
        lengths = {len(part) for part in batch}  # the common case, without a walk
        if len(lengths) == 1:
            return lengths.pop()
    sizes = dict(_sizes(batch, "batch"))
    size = max(sizes.values(), default=0) or _length_of_lists(batch)
    if any(n not in (1, size) for n in sizes.values()):
        listing = ", ".join(f"{path}: {n}" for path, n in sizes.items())
        raise UnclearBatchError(f"The tensors of the batch differ in their first axis ({listing}). {WAY_OUT}")
    if not size:
        raise UnclearBatchError(f"There is nothing to cut in a batch of type {type(batch).__name__}. {WAY_OUT}")
    return size


def batch_size_or_none(batch: Any) -> int | None:
    """S, or None where it is not clear."""
    try:
        return batch_size(batch)
    except UnclearBatchError:
        return None


class _Leaf(NamedTuple):
    size: int | None  # None: there is no axis to cut along
    one: Callable[[int, int], Any]  # index, copies -> the leaf with that sample, so many times


class _Container(NamedTuple):
    items: dict[str, Any]  # what to append to the path -> item
    rebuild: Callable[[list[Any]], Any]


def _sizes(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Where there is a leaf -> how many samples it holds."""
    if leaf := _as_leaf(value, path):
        if leaf.size is not None:
            yield path, leaf.size
    elif container := _as_container(value):
        for key, item in container.items.items():
            yield from _sizes(item, path + key)
    elif callable(getattr(value, "to", None)) or any(_holds_tensors(item) for item in _attributes(value).values()):
        raise UnclearBatchError(f"Cannot cut the first sample out of {path} of type {type(value).__name__}. {WAY_OUT}")


def _one(value: Any, size: int, index: int, copies: int) -> Any:
    if leaf := _as_leaf(value, "batch"):
        return leaf.one(index if leaf.size == size else 0, copies)
    if _is_list_without_tensors(value):
        return value[index : index + 1] * copies if len(value) == size else value
    if container := _as_container(value):
        return container.rebuild([_one(item, size, index, copies) for item in container.items.values()])
    return value


def _as_leaf(value: Any, path: str) -> _Leaf | None:
    if isinstance(value, Tensor):
        if not value.dim():
            return _Leaf(None, lambda index, copies: value.clone())
        return _Leaf(len(value), lambda index, copies: _repeated(value, index, copies))
    if isinstance(value, PackedSequence):
        return _Leaf(int(value.batch_sizes[0]), lambda index, copies: _of_packed(value, index, copies))
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.ndarray):
        if not value.ndim:
            return _Leaf(None, lambda index, copies: value.copy())
        return _Leaf(len(value), lambda index, copies: value[index : index + 1].repeat(copies, axis=0))
    if hasattr(value, "get_example") and hasattr(value, "num_graphs"):  # a batch of PyG
        return _Leaf(value.num_graphs, lambda index, copies: _of_pyg(value, index, copies))
    if isinstance(getattr(value, "edge_index", None), Tensor) and isinstance(getattr(value, "batch", None), Tensor):
        return _Leaf(int(value.batch.max()) + 1, lambda index, copies: _first_graph(value, index, copies, path))
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
    """A list of texts, numbers, …: one a sample, if there are S of them, and else a remark on the batch."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields"):
        return False
    return len(value) > 0 and next(_sizes(value, ""), None) is None


def _length_of_lists(value: Any) -> int:
    """S of a batch without a single tensor, such as a list of texts; 0 if there is no list."""
    if _is_list_without_tensors(value):
        return len(value)
    container = _as_container(value)
    return max(map(_length_of_lists, container.items.values()), default=0) if container else 0


def _attributes(value: Any) -> dict[str, Any]:
    """What an object keeps, in its ``__dict__`` or in slots."""
    slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, list | tuple | set) and any(map(_holds_tensors, value)))


def _repeated(batch: Tensor, index: int, copies: int) -> Tensor:
    """One sample in new memory; of dense and sparse tensors."""
    chosen = torch.full((copies,), index, dtype=torch.long, device=batch.device)
    return batch.detach().index_select(0, chosen).requires_grad_(batch.requires_grad)


def _refill(mapping: Mapping[Any, Any], items: list[Any]) -> Mapping[Any, Any]:
    filled = copy.copy(mapping) if isinstance(mapping, MutableMapping) else dict(mapping)
    for key, item in zip(mapping, items, strict=True):
        filled[key] = item
    return filled


def _with_attributes(value: Any, attributes: dict[str, Any]) -> Any:
    """A shallow copy with other attributes; frozen dataclasses and ones with slots too."""
    changed = copy.copy(value)
    for name, item in attributes.items():
        object.__setattr__(changed, name, item)
    return changed


def _of_packed(packed: PackedSequence, index: int, copies: int) -> PackedSequence:
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    length = lengths[index : index + 1]
    one = pack_padded_sequence(
        _repeated(padded, index, copies)[:, : int(length)], length.repeat(copies), batch_first=True
    )
    if packed.unsorted_indices is None:
        return one
    as_they_are = torch.arange(copies, device=packed.unsorted_indices.device)
    return PackedSequence(one.data, one.batch_sizes, as_they_are, as_they_are)


def _of_pyg(batch: Any, index: int, copies: int) -> Any:
    return type(batch).from_data_list([copy.deepcopy(batch.get_example(index)) for _ in range(copies)])


def _first_graph(graph: Any, index: int, copies: int, path: str) -> Any:
    """The first of several graphs that are stored one behind the other as one graph: nodes, edges, then the rest."""
    if index or copies != 1:
        raise UnclearBatchError(
            f"The first graph of {path} can be cut, but no other, and it cannot be repeated. {WAY_OUT}"
        )
    is_first = graph.batch == 0
    of_first = is_first[graph.edge_index[0]]
    lengths = {  # in the batch -> in the first graph
        "nodes": (len(is_first), int(is_first.sum())),
        "edges": (len(of_first), int(of_first.sum())),
        "graphs": (int(graph.batch.max()) + 1, 1),
    }
    if not (is_first[: lengths["nodes"][1]].all() and of_first[: lengths["edges"][1]].all()):
        raise UnclearBatchError(f"The graphs of {path} are not stored one behind the other. {WAY_OUT}")
    attributes: dict[str, Any] = {}
    for name, value in _attributes(graph).items():
        if isinstance(value, Tensor) and value.dim():
            axis = value.dim() - 1 if "edge_index" in name and value.dim() == 2 else 0
            cuts = {cut for length, cut in lengths.values() if length == value.shape[axis]}
            if len(cuts) != 1:
                raise UnclearBatchError(f"Unclear what {path}.{name} of shape {tuple(value.shape)} counts. {WAY_OUT}")
            attributes[name] = value.narrow(axis, 0, cuts.pop()).clone()
        elif isinstance(value, int) and name.endswith("size") and value == lengths["graphs"][0]:
            attributes[name] = 1
    return _with_attributes(graph, attributes)
