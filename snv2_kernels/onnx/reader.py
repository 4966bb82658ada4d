"""Reads an ONNX file that nobody vouches for: limits first, then protobuf, then arrays.

Protobuf messages of two bytes take a hundred in memory, so their number is counted in the bytes
before they are parsed. Tensors are read here, not by the package ``onnx``, whose external data may
lie anywhere.
"""

from __future__ import annotations

import math
import os
import reprlib
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

__all__ = ["Array", "File", "array_of", "described", "read_file"]

Array = NDArray[Any]

_MOST_BYTES = 100 << 20  # of the file itself
_MOST_ENTRIES = 200_000  # messages, texts and single numbers
_MOST_PACKED = 64 << 20  # bytes of packed numbers
_MOST_DEPTH = 32
MOST_TENSOR_BYTES = 100 << 20  # of all together
MOST_NODES = 20_000
_MOST_RANK = 8
_OLDEST, _NEWEST = 1, 25  # opsets

_TYPES: dict[int, tuple[str, str]] = {  # element types, and the fields that hold them but raw_data
    TensorProto.FLOAT: ("<f4", "float_data"),
    TensorProto.DOUBLE: ("<f8", "double_data"),
    TensorProto.FLOAT16: ("<f2", ""),
    TensorProto.UINT8: ("<u1", "int32_data"),
    TensorProto.INT8: ("<i1", "int32_data"),
    TensorProto.INT32: ("<i4", "int32_data"),
    TensorProto.INT64: ("<i8", "int64_data"),
    TensorProto.BOOL: ("?", "int32_data"),
}
_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")


def described(value: Any) -> str:
    """A name or number from the file, short enough for a message."""
    return reprlib.repr(value)


@dataclass
class File:
    """A parsed file."""

    path: Path
    graph: Any
    opsets: dict[str, int]  # by domain; "" is ONNX's own
    tensors: dict[str, Array] = field(default_factory=dict)  # initializers by name


def read_file(path: str | os.PathLike[str]) -> File:
    """Read a file and its tensors.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no ONNX file, damaged, too large, or names other files than one beside
            it.
    """
    file_path = Path(path)
    with open(file_path, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > _MOST_BYTES:
            raise ValueError(f"{size >> 20} MiB, expected at most {_MOST_BYTES >> 20}")
        data = opened.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"expected at most {_MOST_BYTES >> 20} MiB")
    _Scan(data).message(onnx.ModelProto.DESCRIPTOR, 0, len(data), 0)
    model: Any = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, which has no public place
        raise ValueError(f"not an ONNX file ({error})") from None
    del data
    graph = model.graph
    if not model.HasField("graph") or not graph.node:
        raise ValueError("not an ONNX file (it has no graph)")
    if len(graph.node) > MOST_NODES:
        raise ValueError(f"{len(graph.node)} nodes, expected at most {MOST_NODES}")
    if graph.sparse_initializer:
        raise ValueError("sparse initializers are not supported")
    file = File(file_path, graph, _opsets(model))
    left = MOST_TENSOR_BYTES
    for tensor in graph.initializer:
        if not tensor.name or tensor.name in file.tensors:
            raise ValueError(f"two initializers named {described(tensor.name)}")
        array = array_of(tensor, file_path.parent, left)
        left -= array.nbytes
        file.tensors[tensor.name] = array
    return file


def _opsets(model: Any) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise ValueError(f"two opsets for the domain {described(domain)}")
    if not _OLDEST <= opsets.get("", 0) <= _NEWEST:
        found = opsets.get("", "none")
        raise ValueError(f"opset {found}, expected {_OLDEST} to {_NEWEST}")
    return opsets


# Tensors --------------------------------------------------------------------------------------


def array_of(tensor: Any, folder: Path | None, left: int = MOST_TENSOR_BYTES) -> Array:
    """The numbers of a TensorProto.

    Args:
        tensor: as it was parsed.
        folder: where its external data may lie; None where it may have none.
        left: the most bytes that it may have.
    """
    name = f"tensor {described(tensor.name)}"
    dims = tuple(tensor.dims)
    if tensor.data_type not in _TYPES:
        raise ValueError(f"{name} has element type {tensor.data_type}, which is not supported")
    code, place = _TYPES[tensor.data_type]
    dtype = np.dtype(code)
    size = math.prod(dims) * dtype.itemsize
    if len(dims) > _MOST_RANK or not all(0 <= dim <= left for dim in dims) or size > left:
        raise ValueError(f"{name} has shape {described(dims)}, which is absurd")
    filled = [key for key in _FIELDS if len(getattr(tensor, key))]
    is_external = tensor.data_location == TensorProto.EXTERNAL
    if tensor.HasField("segment") or len(filled) + bool(tensor.raw_data) + is_external > 1:
        raise ValueError(f"{name} has its numbers in several places")
    if filled:
        return _listed(tensor, filled[0], place, dtype, name).reshape(dims)
    if is_external:
        if folder is None:
            raise ValueError(f"{name} may have no external data")
        raw = _external(tensor, folder, size, name)
    else:
        raw = tensor.raw_data
    if len(raw) != size:
        raise ValueError(f"{name} has {len(raw)} bytes, expected {size}")
    array = np.frombuffer(raw, dtype).reshape(dims)
    if dtype.kind == "b" and (array.view(np.uint8) > 1).any():
        raise ValueError(f"{name} has numbers that do not fit its type")
    return array


def _listed(tensor: Any, found: str, place: str, dtype: np.dtype[Any], name: str) -> Array:
    """The numbers of a tensor in one of protobuf's lists."""
    if found != place:
        raise ValueError(f"{name} has its numbers in {found}, expected {place or 'raw_data'}")
    numbers = np.array(getattr(tensor, place))
    count = math.prod(tensor.dims)
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} numbers, expected {count}")
    array = numbers.astype(dtype)
    if not np.array_equal(array, numbers, equal_nan=dtype.kind == "f"):
        raise ValueError(f"{name} has numbers that do not fit its type")
    return array


def _external(tensor: Any, folder: Path, size: int, name: str) -> bytes:
    """The bytes of a tensor in another file: a regular one in the same folder."""
    told = {entry.key: entry.value for entry in tensor.external_data}
    location = told.get("location", "")
    if location in ("", ".", "..") or any(c in location for c in "/\\\0:"):
        raise ValueError(f"{name}: external data in {described(location)}, expected a bare name")
    try:
        offset, length = int(told.get("offset") or 0), int(told.get("length") or size)
    except ValueError:
        raise ValueError(f"{name}: offset and length of its external data are no numbers") from None
    path = folder / location
    try:
        kind = path.lstat()
        if not stat.S_ISREG(kind.st_mode):
            raise ValueError(f"{name}: {described(location)} is no regular file")
        if length != size or not 0 <= offset <= kind.st_size - length:
            raise ValueError(f"{name}: its external data does not fit: {length} at {offset}")
        no_link = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, os.O_RDONLY | no_link), "rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        reason = f"{described(location)} cannot be read: {error.strerror}"
        raise ValueError(f"{name}: {reason}") from None


# The wire format ------------------------------------------------------------------------------


class _Scan:
    """Counts what parsing a protobuf message would make."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._entries = self._packed = 0
        self._known: dict[str, dict[int, Any]] = {}

    def message(self, descriptor: Any, start: int, end: int, depth: int) -> None:
        """Goes through a message of a known kind, and those in it.

        Raises:
            ValueError: if it is damaged, or has more entries than a network has.
        """
        if depth > _MOST_DEPTH:
            raise ValueError("not an ONNX file (nested too deeply)")
        fields = self._fields(descriptor)
        at = start
        while at < end:
            self._entries += 1
            if self._entries > _MOST_ENTRIES or self._packed > _MOST_PACKED:
                raise ValueError("more entries than a network has")
            key, at = self._number(at, end)
            wire = key & 7
            if wire == 0:
                _, at = self._number(at, end)
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            elif wire == 2:
                length, at = self._number(at, end)
                if at + length > end:
                    raise ValueError("not an ONNX file (it ends too early)")
                self._content(fields.get(key >> 3), at, length, depth)
                at += length
            else:
                raise ValueError("not an ONNX file (of another format)")
        if at != end:
            raise ValueError("not an ONNX file (it ends too early)")

    def _number(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self._data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, at
        raise ValueError("not an ONNX file (a number without an end)")

    def _content(self, field: Any, at: int, length: int, depth: int) -> None:
        """Goes through what has a length: a message, text, bytes or packed numbers."""
        if field is None:
            return
        if field.message_type is not None:
            self.message(field.message_type, at, at + length, depth + 1)
        elif field.type == field.TYPE_STRING:
            try:
                self._data[at : at + length].decode()
            except UnicodeDecodeError:
                raise ValueError("not an ONNX file (a text that is not UTF-8)") from None
        elif field.type != field.TYPE_BYTES:
            self._packed += length

    def _fields(self, descriptor: Any) -> dict[int, Any]:
        """Fields by their number."""
        if descriptor.full_name not in self._known:
            self._known[descriptor.full_name] = {f.number: f for f in descriptor.fields}
        return self._known[descriptor.full_name]
