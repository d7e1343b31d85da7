"""The safetensors files of a model's folder: their headers, and whether the files are whole. No torch here."""

import json
import os
from pathlib import Path
from typing import Any

from lowmem_rlhf.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
_HEADER_LIMIT = 100_000_000  # as the safetensors library has it
_LFS = b"version https://git-lfs"


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors' bytes begin, and the tensors (the format: huggingface/safetensors#format).

    Raises:
        ValueError: it is no safetensors file; the message goes on from the file's name.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if _LFS.startswith(start) and len(start) == 8:
            raise ValueError("is a pointer of Git LFS and not the file itself: run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _HEADER_LIMIT:
            raise ValueError("is no safetensors file")
        if 8 + length > os.fstat(file.fileno()).st_size:
            raise ValueError("is cut short in its header")
        tensors = json.loads(file.read(length))
    if not isinstance(tensors, dict) or not tensors:
        raise ValueError("is no safetensors file")
    tensors.pop("__metadata__", None)
    return 8 + length, tensors


def check_weight_files(folder: Path, name: str) -> None:
    """Check that a folder's safetensors files are there and whole, and that the weights in them are numbers.

    A folder without such files, which is for its reader to refuse, passes.

    Args:
        name: the model's, for messages.

    Raises:
        UserError: a file is missing, cut short or no safetensors file, or a weight has an integer or 8-bit dtype.
    """
    for file in _files(folder, name):
        try:
            begin, tensors = header(file)
            size = file.stat().st_size
            end = begin + max((told["data_offsets"][1] for told in tensors.values()), default=0)
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            why = str(error) if type(error) is ValueError else "cannot be read as a safetensors file"
            raise UserError(f"model {name!r}: {file.name} {why}; fetch the model again") from error
        if end != size:
            what = f"is cut short: it has {size} bytes of {end}" if end > size else f"has {size - end} bytes too many"
            raise UserError(f"model {name!r}: {file.name} {what}; fetch the model again")
        others = {key: told["dtype"] for key, told in tensors.items() if told["dtype"] not in FLOATS}
        if codes := sorted(key for key in others if key.endswith(".weight")):
            raise UserError(
                f"model {name!r}: {file.name} has {len(codes)} weights that are no floating-point numbers of 16 bits "
                f"or more ({codes[0]} is {others[codes[0]]}), such as the codes of a quantized checkpoint; take the "
                "original 16-bit weights, they are quantized while loading"
            )


def _files(folder: Path, name: str) -> list[Path]:
    """Return the files with the weights, of one file or of several that an index names.

    Raises:
        UserError: the index cannot be read, or a file that it names is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / one for one in sorted(names)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"model {name!r}: {INDEX} cannot be read as an index of safetensors files; fetch the model again"
        ) from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"model {name!r}: {len(absent)} of the {len(files)} files that {INDEX} names are missing ({absent[0]}); "
            "fetch the model again"
        )
    return files
