"""Frozen records as plain JSON and back: what a class's annotations say is what is written and what is held on to.

Numbers that are not finite, which JSON does not have, are written as strings. A numpy array is written once however
many records share it, compressed.
"""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from llmq.fields import types_of

if TYPE_CHECKING:
    import numpy as np

MOST_BYTES = 1 << 28  # of the arrays of one record
PLAIN_NUMBER = re.compile(r"[<>|][biuf][1248]")  # a dtype as numpy spells it


def to_stored(record: Any) -> dict:
    """`record`, a dataclass of plain values, arrays, tuples and such dataclasses, as plain JSON."""
    arrays: dict[int, dict] = {}
    value = _plain(record, arrays)
    return {"value": value, "arrays": list(arrays.values())}


def from_stored(cls: type, stored: Mapping) -> Any:
    """The record of `cls` that `to_stored` wrote. Raises TypeError or ValueError for what does not fit its types."""
    if sum(map(_size, stored["arrays"])) > MOST_BYTES:
        raise ValueError(f"its arrays hold more than {MOST_BYTES >> 20} MiB")
    arrays = [_array(entry) for entry in stored["arrays"]]
    return _made(cls, stored["value"], arrays)


def _plain(value: Any, arrays: dict[int, dict]) -> Any:
    import numpy as np

    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), arrays) for f in fields(value)}
    if isinstance(value, np.ndarray):
        if id(value) not in arrays:
            data = base64.b64encode(zlib.compress(np.ascontiguousarray(value).tobytes(), 6)).decode()
            form = {"dtype": value.dtype.str, "shape": list(value.shape)}
            arrays[id(value)] = form | {"data": data, "number": len(arrays)}
        return {"array": arrays[id(value)]["number"]}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, arrays) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry, arrays) for entry in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _size(entry: Mapping) -> int:
    """The bytes of an array of plain numbers, whatever its data come to."""
    dtype, shape = entry["dtype"], entry["shape"]
    if not PLAIN_NUMBER.fullmatch(dtype) or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"an array cannot be of {dtype!r:.20} and {shape!r:.40}")
    return int(dtype[2]) * math.prod(shape)


def _array(entry: Mapping) -> np.ndarray:
    import numpy as np

    most = _size(entry) + 1  # a few bytes can unpack to gigabytes
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(entry["data"]), most)
    except zlib.error as error:
        raise ValueError(f"an array is damaged: {error}") from error
    return np.frombuffer(data, np.dtype(entry["dtype"])).reshape(entry["shape"])


def _made(kind: Any, value: Any, arrays: list[np.ndarray]) -> Any:
    import numpy as np

    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _made(next(choice for choice in arguments if choice is not NoneType), value, arrays)
    if is_dataclass(kind):
        return kind(**{name: _made(types_of(kind)[name], entry, arrays) for name, entry in value.items()})
    if kind is np.ndarray:
        return arrays[value["array"]]
    if origin in (tuple, list):
        each = arguments[:1] * len(value) if origin is list or arguments[1:] == (...,) else arguments
        return origin(_made(one, entry, arrays) for one, entry in zip(each, value, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        return {arguments[0](key): _made(arguments[1], entry, arrays) for key, entry in value.items()}
    if kind is float:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value
