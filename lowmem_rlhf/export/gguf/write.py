"""Merged weights as one GGUF file for llama.cpp, written by the user's own converter if there is one, else here."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.architecture.stops import turn_end
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.gguf.converter import (
    BY_QUANTIZER,
    PENALTY,
    PENALTY_LAST,
    convert,
    find_converter,
    find_quantizer,
    quantize,
    set_frame,
    tell_penalty,
)
from lowmem_rlhf.export.target import check_disk
from lowmem_rlhf.files import temp_path
from lowmem_rlhf.planning.memory.export import GGUF_BYTES
from lowmem_rlhf.progress import ProgressCallback, message

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

    from lowmem_rlhf.export.gguf.metadata import GGUFMetadata
    from lowmem_rlhf.export.gguf.tensors import Tensor

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bf16": 32}  # gguf.LlamaFileType
_HEADER_BYTES = 2**25  # vocabulary and merges, at most


def write_gguf(
    folder: Path,
    target: Path,
    kind: str,
    progress: ProgressCallback | None = None,
    device: "torch.device | None" = None,
    add_bos: bool | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Write a merged model as a GGUF. The file appears whole or not at all.

    A llama.cpp of the user's (``convert_hf_to_gguf.py`` and ``llama-quantize`` on the PATH or under ``$LLAMA_CPP``) is
    used where it is found, and that is reported. Our own writer holds only some rows of a tensor in memory.

    Args:
        folder: in the transformers format: config.json, the tokenizer's files, safetensors in one or several files.
        target: the file; an older one is replaced.
        kind: f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m.
        progress: called with bytes written and bytes in all.
        device: where K-quants are calculated; the CPU if None.
        add_bos: a BOS is put before every text; None: where the tokenizer does so.
        repetition_penalty: over the whole text, what llama.cpp samples with if it is told nothing else; 1: its own.

    Raises:
        UserError: the kind, the architecture or the tokenizer is not known.
        RunError: the disk is too small, or a number does not fit in float16.
        OSError: the file cannot be written.
    """
    if kind not in GGUF_BYTES:
        raise UserError(f"GGUF kind {kind!r} is not known; give {', '.join(GGUF_BYTES)}")
    temp, wide = temp_path(target), temp_path(target.with_suffix(".f16.gguf"))
    converter, quantizer = find_converter(), find_quantizer() if kind in BY_QUANTIZER else None
    try:
        first, first_kind = (wide, "f16") if quantizer else (temp, kind)
        _check_room(folder, target, first_kind)
        if converter and first_kind not in BY_QUANTIZER and convert(converter, folder, first, first_kind):
            set_frame(first, add_bos)
            tell_penalty(first, repetition_penalty)
        else:
            _write(folder, first, target.stem, first_kind, progress, device, add_bos, repetition_penalty)
        if quantizer:
            quantize(quantizer, first, temp, kind)
        with temp.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, target)
    finally:
        for path in (temp, wide):
            with suppress(OSError):
                path.unlink()


def _check_room(folder: Path, target: Path, kind: str) -> None:
    """Check the free disk roughly, from the size of the weights; our writer checks again with the exact size."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_disk(int(stored * GGUF_BYTES.get(kind, 2.0) / 4), target)


def _write(
    folder: Path,
    target: Path,
    name: str,
    kind: str,
    progress: ProgressCallback | None,
    device: "torch.device | None",
    add_bos: bool | None = None,
    repetition_penalty: float = 1.0,
) -> None:
    """Write with the gguf library; kind may be f32 too."""
    import torch
    from gguf import GGUFWriter
    from transformers import AutoConfig

    from lowmem_rlhf.export.gguf.metadata import describe
    from lowmem_rlhf.export.gguf.tensors import plan_tensors
    from lowmem_rlhf.export.gguf.tokenizer import describe_tokenizer
    from lowmem_rlhf.export.shards import read_tensors
    from lowmem_rlhf.export.tokenizer import load_tokenizer

    stored = read_tensors(folder)
    config = AutoConfig.from_pretrained(folder)
    metadata = describe(config)
    tokenizer = load_tokenizer(folder)
    keys = describe_tokenizer(tokenizer, config.vocab_size, second_stop(folder, config, tokenizer), add_bos)
    tensors = plan_tensors(stored, config, metadata, kind, config.vocab_size)
    total = sum(tensor.nbytes for tensor in tensors)
    check_disk(total + _HEADER_BYTES, target)
    for note in metadata.notes:
        message(note)
    writer = GGUFWriter(target, metadata.layout.name)
    _add_keys(writer, name, metadata, keys, kind)
    if repetition_penalty != 1.0:
        writer.add_float32(PENALTY, repetition_penalty)
        writer.add_int32(PENALTY_LAST, -1)  # all tokens of the text
    for tensor in tensors:
        _add_info(writer, tensor)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_tensors(writer, tensors, total, progress, device or torch.device("cpu"))
    finally:
        writer.close()


def second_stop(folder: Path, config: Any, tokenizer: Any) -> int | None:
    """Return a token other than the tokenizer's that ends an answer.

    It is the one with which the chat template ends a turn, else one of generation_config.json or config.json.
    """
    eos = tokenizer.eos_token_id
    if turn := turn_end(tokenizer).difference([eos]):
        return min(turn)
    path = folder / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    stops = config.eos_token_id if stops is None else stops
    return next((one for one in (stops if isinstance(stops, list) else [stops]) if one != eos), None)


def _add_keys(writer: "GGUFWriter", name: str, metadata: "GGUFMetadata", tokenizer: dict[str, Any], kind: str) -> None:
    """Add the metadata, each value in the type that llama.cpp reads it as."""
    arch = metadata.layout.name
    general: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in (general | {f"{arch}.{k}": v for k, v in metadata.keys.items()} | tokenizer).items():
        add[type(value)](key, value)


def _add_info(writer: "GGUFWriter", tensor: "Tensor") -> None:
    import numpy as np

    shape = tensor.shape  # elements, not bytes: the library counts a uint8 shape in bytes
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.type)


def _write_tensors(
    writer: "GGUFWriter", tensors: list["Tensor"], total: int, progress: ProgressCallback | None, device: "torch.device"
) -> None:
    """Write the tensors' bytes one after another, each at the offset that the library's header names."""
    assert writer.fout is not None
    file, done = writer.fout[0], 0
    writer.write_padding(file, file.tell())
    for tensor in tensors:
        start = done
        for piece in tensor.pieces(device):
            done += file.write(piece.numpy().data)
            if progress:
                progress(done, total)
        if done - start != tensor.nbytes:
            raise ValueError(f"{tensor.name} has {done - start} bytes, and its header says {tensor.nbytes}")
        writer.write_padding(file, tensor.nbytes)
