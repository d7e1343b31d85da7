"""Checkpoints that are published quantized: made 16-bit once, in the cache, and loaded from there.

FP8 (Ministral 3): ``X.weight`` in float8 e4m3 with ``X.weight_scale_inv``, one number or one for each block of rows and
columns. MXFP4 (gpt-oss): ``X_blocks`` and ``X_scales``, two 4-bit numbers a byte and a power of two for each 32.
Scales of activations are dropped: they belong to arithmetic that is not done here.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lowmem_rlhf.architecture.kinds import UNDONE
from lowmem_rlhf.architecture.source import cache_folder, is_local
from lowmem_rlhf.architecture.weight_files import INDEX, SINGLE
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.files import cached_folder, check_room, writing

logger = logging.getLogger(__name__)

_CONVERSION = 1
NOT_NEEDED = ["*.bin", "*.pth", "original/*", "metal/*", "consolidated*"]  # the same weights in other forms
_SCALE, _ACTIVATIONS = "_scale_inv", ("activation_scale", "input_scale")
_BLOCKS, _SCALES = "_blocks", "_scales"


def quantized_by(config: Mapping[str, Any]) -> str | None:
    """Return the method of a config.json's weights if it is one that is undone here, else None."""
    settings = config.get("quantization_config")
    method = str(settings.get("quant_method", "")).lower() if isinstance(settings, Mapping) else ""
    return method if method in UNDONE else None


def dequantized_folder(path: str, model: str, revision: str | None = None) -> str:
    """Return the folder with a model's 16-bit weights: its own, or one in the cache that is made of it.

    Args:
        path: a local folder, or a Hub id, whose files are fetched where they are needed.
        model: as in a recipe, for messages.

    Raises:
        UserError: the files cannot be fetched or read, or the disk is too small.
    """
    if not is_local(path):
        from lowmem_rlhf.architecture.hub import cached_config, fetch_config

        try:
            config_file = cached_config(path, revision) or fetch_config(path, revision)
        except UserError:  # for the loader to say
            return path
    else:
        config_file = Path(path) / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    if not (method := quantized_by(config)):
        return path
    if not is_local(path):
        from huggingface_hub import snapshot_download

        path = snapshot_download(path, revision=revision, ignore_patterns=NOT_NEEDED)
    return str(_convert(Path(path), model, method, config))


def _convert(folder: Path, model: str, method: str, config: dict[str, Any]) -> Path:
    files = [folder / SINGLE]
    if not files[0].is_file() and (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(named))]
    if absent := [one.name for one in files if not one.is_file()]:
        raise UserError(f"model {model!r} lacks {absent[0]} ({len(absent)} of {len(files)} files); fetch it again")
    stamp = "|".join(f"{one.name},{one.stat().st_size},{one.stat().st_mtime_ns}" for one in files)
    key = hashlib.sha256(f"{_CONVERSION}|{folder.resolve()}|{stamp}".encode()).hexdigest()[:12]
    target = cache_folder() / "dequantized" / f"{folder.name}-{key}"
    if target.is_dir():
        return target
    logger.warning(f"{model} is published in {method.upper()}: its 16-bit weights are made once, in {target}")
    with writing(
        target, UserError, "or set LOWMEM_RLHF_CACHE to a folder elsewhere: the 16-bit weights are kept there"
    ):
        size = sum(one.stat().st_size for one in files)
        check_room(target, size * (4 if method == "mxfp4" else 2))
        with cached_folder(target) as made:
            _write(folder, files, made, config)
    return target


def _write(folder: Path, files: list[Path], target: Path, config: dict[str, Any]) -> None:
    block = config["quantization_config"].get("weight_block_size")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for part in (value for value in plain.values() if isinstance(value, dict)):
        part.pop("quantization_config", None)
    places: dict[str, str] = {}
    where = {name: file for file in files for name in _names(file)}
    for file in files:
        tensors: dict[str, torch.Tensor] = {}
        for name in _names(file):
            if name.endswith((_SCALE, _SCALES, *_ACTIVATIONS)):
                continue
            value = _read(where, name)
            if name.endswith(_BLOCKS):
                name = name.removesuffix(_BLOCKS)
                value = _from_mxfp4(value, _read(where, name + _SCALES))
            elif value.dtype == torch.float8_e4m3fn:
                value = _from_fp8(value, _read(where, name + _SCALE), block)
            tensors[name] = value.contiguous()
            places[name] = file.name
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    if [one.name for one in files] != [SINGLE]:
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
    for other in folder.iterdir():
        if other.is_file() and other.suffix != ".safetensors" and other.name not in ("config.json", INDEX):
            shutil.copyfile(other, target / other.name)
    (target / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as stored:
        return list(stored.keys())


def _read(where: Mapping[str, Path], name: str) -> torch.Tensor:
    if name not in where:
        raise UserError(f"the quantized checkpoint lacks {name}; fetch the model again")
    with safe_open(where[name], "pt", device="cpu") as stored:
        return stored.get_tensor(name)  # type: ignore[no-any-return]


def _from_fp8(weight: torch.Tensor, scale: torch.Tensor, block: Any) -> torch.Tensor:
    """Return the bfloat16 numbers (out, in), or (experts, out, in), of float8 codes and their scales."""
    scale = scale.float()
    if scale.numel() > 1 and block and scale.dim() >= 2:
        rows, columns = (int(size) for size in block)
        scale = scale.repeat_interleave(rows, -2)[..., : weight.shape[-2], :]
        scale = scale.repeat_interleave(columns, -1)[..., : weight.shape[-1]]
    elif scale.numel() > 1:  # one a row
        scale = scale.reshape(*scale.shape[: weight.dim() - 1], 1) if scale.dim() < weight.dim() else scale
    return (weight.float() * scale).to(torch.bfloat16)


def _from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the bfloat16 numbers of 4-bit codes, as transformers lays them out for its gpt-oss class."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # type: ignore[no-any-return]
