"""The header of a GGUF file, read in milliseconds.

The ``gguf`` package's GGUFReader turns every vocabulary entry into an array, which takes seconds; a plan needs a few
numbers and the tensors' shapes. Arrays are therefore skipped and only counted. The value types and the layout come from
that package and from https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; a test compares both readers.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from lowmem_rlhf.errors import UserError

_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GGUFHeader:
    """What stands before the tensors.

    Attributes:
        fields: metadata by key; arrays of numbers as their values, arrays of texts as their length.
        shapes: tensor shapes by name, in GGUF's order (the contiguous dimension first: ``[inputs, outputs]``).
    """

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.at:
            raise ValueError("a text runs past the end of the file")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self.text()
        if kind is GGUFValueType.ARRAY:
            return self._array()
        return self.number(_FORMATS[kind])

    def _array(self) -> Any:
        kind, count = GGUFValueType(self.number("I")), self.number("Q")
        if kind is GGUFValueType.STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
            return count
        if kind is GGUFValueType.ARRAY:
            return [self._array() for _ in range(count)]
        values = struct.unpack_from(f"<{count}{_FORMATS[kind]}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{_FORMATS[kind]}")
        return list(values)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read metadata and tensor shapes of a little-endian GGUF file of version 2 or 3.

    Raises:
        UserError: the file is cut off or of another version.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Cursor(data))
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        raise UserError(
            f"model {str(path)!r}: the GGUF header cannot be read ({error}); fetch the file again"
        ) from error


def _read(cursor: _Cursor) -> GGUFHeader:
    cursor.at = 4  # the letters GGUF
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, expected 2 or 3")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.text()
        fields[key] = cursor.value(GGUFValueType(cursor.number("I")))
    shapes: dict[str, tuple[int, ...]] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        shapes[name] = tuple(cursor.number("Q") for _ in range(cursor.number("I")))
        cursor.at += 4 + 8  # the tensor's type and offset
    return GGUFHeader(fields, shapes)
