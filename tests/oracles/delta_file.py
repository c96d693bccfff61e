"""A reader of delta files written from docs/delta-format.md alone: no torch, no safetensors, bit by bit."""

import hashlib
import json
from math import prod

SIZES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def tensors(data):
    """{key: (dtype, shape, bytes)} of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return {
        key: (
            entry["dtype"],
            tuple(entry["shape"]),
            data[end + entry["data_offsets"][0] : end + entry["data_offsets"][1]],
        )
        for key, entry in header.items()
        if key != "__metadata__"
    }


def checked(data):
    """The tensors of a file, {key: bytes}, after its digest was checked."""
    found = tensors(data)
    digest = hashlib.sha256()
    for key in sorted(found.keys() - {"digest"}):
        dtype, shape, content = found[key]
        digest.update(f"{key} {'int64' if dtype == 'I64' else 'uint8'} {shape}\n".encode())
        digest.update(content)
    assert digest.digest() == found["digest"][2]
    assert int.from_bytes(found["format"][2], "little") == 2
    return {key: content for key, (_, _, content) in found.items()}


def places(code, count, low_bits):
    """Places of live units: the gaps between them, one after another."""
    bits = [byte >> i & 1 for byte in code for i in range(8)]
    at = 8 * -(-count * low_bits // 8)
    place, found = -1, []
    for i in range(count):
        low = sum(bits[i * low_bits + j] << j for j in range(low_bits))
        high = 0
        while not bits[at]:
            high, at = high + 1, at + 1
        at += 1
        place += (high << low_bits) + low + 1
        found.append(place)
    assert len(bits) - at < 8
    assert not any(bits[at:])
    return found


def applied(data, base, mask=None):
    """The tuned tensors, {name: bytes}, from the base's; `mask` is a file with the places, if `data` has none."""
    file = checked(data)
    if mask is not None:
        assert "layout" not in file
        of_places = checked(mask)
        assert of_places["mask"] == file["mask"]
        file = {**{key: of_places[key] for key in ("layout", "places", "frozen")}, **file}
    assert hashlib.sha256(file["layout"] + file["places"]).digest() == file["mask"]
    tuned, at_place, at_value = dict(base), 0, 0
    for name, dtype, shape, unit, *coded in json.loads(file["layout"]):
        if unit == "frozen":
            continue
        count, low_bits, length = coded or (0, 0, 0)
        width = SIZES[dtype] * (prod(shape) if unit == "whole" else prod(shape[1:]) if unit == "rows" else 1)
        found = [0] if unit == "whole" else places(file["places"][at_place : at_place + length], count, low_bits)
        result = bytearray(base[name])
        for place in found:
            result[place * width : (place + 1) * width] = file["values"][at_value : at_value + width]
            at_value += width
        tuned[name], at_place = bytes(result), at_place + length
    assert at_value == len(file["values"])
    return tuned
