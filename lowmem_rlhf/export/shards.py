"""Safetensors files, read and written some rows at a time.

The safetensors library maps a file into memory, where every page that was read counts as the process's, and writes a
file from tensors that all exist. A merge needs neither: it reads rows, changes them and writes them behind one another.
The format: https://github.com/huggingface/safetensors#format (8 bytes of length, a JSON header, the tensors' bytes).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_rlhf.architecture.families.wrappers import text_name
from lowmem_rlhf.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in NUMBERS.items()}
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_HEADER_LIMIT = 100_000_000  # as the library has it


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        dtype: as safetensors writes it (F16, BF16, ...).
        begin, end: its bytes in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_number(self) -> bool:
        """Whether it holds floating-point numbers, as opposed to codes, masks or counts."""
        return self.dtype in NUMBERS

    def rows(self, elements: int) -> Iterator[slice]:
        """Yield slices of the first dimension with about that many elements each; a scalar has one row."""
        count = self.shape[0] if self.shape else 1
        step = max(1, elements * count // max(1, self.elements))
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def read(self, rows: slice | None = None) -> torch.Tensor:
        """Return the tensor, or rows of its first dimension, on the CPU; a scalar has one row.

        Raises:
            UserError: the file ends before the tensor does.
        """
        shape, begin, end = self.shape, self.begin, self.end
        if rows is not None:
            shape = shape or (1,)
            stride = (end - begin) // shape[0]
            begin, end = begin + rows.start * stride, begin + rows.stop * stride
            shape = (rows.stop - rows.start, *shape[1:])
        return read_bytes(self.file, begin, end).view(NUMBERS[self.dtype]).view(shape)


def read_bytes(path: Path, begin: int, end: int) -> torch.Tensor:
    """Return a piece of a file as uint8.

    Raises:
        UserError: the file ends before that.
    """
    piece = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
    room, done = piece.numpy().data, 0
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while done < len(room):  # one call reads at most 2 GiB
            got = file.readinto(room[done:])
            if not got:
                raise UserError(f"{path} is cut off; fetch it again")
            done += got
    return piece


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name, in the order of their bytes.

    Raises:
        UserError: it is no whole safetensors file.
    """
    size = path.stat().st_size
    try:
        length = int.from_bytes(bytes(read_bytes(path, 0, 8)), "little")
        if length > min(size - 8, _HEADER_LIMIT):
            raise ValueError("the header is longer than the file")
        header = json.loads(bytes(read_bytes(path, 8, 8 + length)))
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); fetch it again") from error
    if any(one.end > size for one in tensors.values()):
        raise UserError(f"{path} is cut off: it has {size:,} bytes and its header speaks of more; fetch it again")
    return dict(sorted(tensors.items(), key=lambda item: item[1].begin))


def _stored(path: Path, start: int, entry: dict[str, Any]) -> Stored:
    begin, end = entry["data_offsets"]
    one = Stored(path, entry["dtype"], tuple(entry["shape"]), start + begin, start + end)
    if begin < 0 or end < begin or (one.is_number and end - begin != one.elements * _BYTES[one.dtype]):
        raise ValueError(f"a tensor of {one.shape} {one.dtype} lies in {end - begin} bytes")
    return one


def read_shards(folder: Path) -> dict[str, dict[str, Stored]]:
    """Return the tensors of a model folder: by file name, then by tensor name.

    Raises:
        UserError: there are no safetensors weights, or a file of the index is missing or lacks a tensor.
    """
    if (folder / SINGLE).is_file():
        return {SINGLE: read_header(folder / SINGLE)}
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder} holds neither {SINGLE} nor {INDEX}: the base's weights are gone or are not safetensors; fetch "
            "the model again"
        )
    try:
        places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if any(Path(name).name != name for name in files):
            raise ValueError("it names files outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} cannot be read ({error}); fetch the model again") from error
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} lacks {', '.join(missing[:3])}, which its {INDEX} names; the files were renamed or not all "
            "fetched: fetch the model again"
        )
    shards = {name: read_header(folder / name) for name in files}
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise UserError(
                f"{folder / name} holds no {tensor}, which {INDEX} places there; the files were mixed up or are of "
                "different revisions: fetch the model again"
            )
    return shards


def text_shards(shards: Mapping[str, Mapping[str, Stored]]) -> dict[str, dict[str, Stored]]:
    """Return the text tower of a model for images or sound, by file and by the text-only class's names."""
    named = {
        file: {name: stored for key, stored in tensors.items() if (name := text_name(key)) is not None}
        for file, tensors in shards.items()
    }
    return {file: tensors for file, tensors in named.items() if tensors}


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a model folder by name, from all of its files.

    Raises:
        UserError: as `read_shards`.
    """
    return {name: one for file in read_shards(folder).values() for name, one in file.items()}


FileLayout = Sequence[tuple[str, str, tuple[int, ...], int]]  # name, dtype, shape, bytes


def write_tensors(path: Path, layout: FileLayout, pieces: Iterable[torch.Tensor]) -> None:
    """Write a safetensors file.

    Args:
        layout: its tensors in the order in which their bytes come.
        pieces: those bytes: all rows of the first tensor in pieces of any size, then those of the second, ...

    Raises:
        OSError: it cannot be written, for example because the disk is full.
        ValueError: the pieces are not as long as the layout says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, dtype, shape, size in layout:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [total, total + size]}
        total += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin where their elements may lie
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            flat = piece.detach().cpu().contiguous().view(-1).view(torch.uint8)
            total -= file.write(flat.numpy().data)
    if total:
        raise ValueError(f"{path}: the pieces differ from the layout by {total} bytes")


def write_index(folder: Path, shards: Mapping[str, Iterable[str]], total: int) -> None:
    """Write the index of a model of several files: the tensors' names by file, and the bytes of all."""
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
