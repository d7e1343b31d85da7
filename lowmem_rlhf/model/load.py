"""Load the one base: any transformers causal LM from the Hub, a folder or a GGUF file, as NF4, int8 or 16-bit."""

import contextlib
import hashlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.memory import is_out_of_memory
from lowmem_rlhf.model.source import cache_folder, resolve_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_base(
    model: str,
    quantization: str,
    compute_dtype: str,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Return the frozen model on the device, with every dropout off, and its tokenizer.

    Args:
        model: as in a recipe (Hub id, folder, .gguf file, or package:PACKAGE/FILE).
        quantization: ``nf4`` (double quantization), ``int8`` or ``none``.
        compute_dtype: ``bfloat16``, ``float16`` or ``float32``; weights that are not quantized are kept in it.

    Raises:
        UserError: the model cannot be found or read.
    """
    path = resolve_model(model)
    if path.endswith(".gguf"):
        path = str(convert_gguf(Path(path)))
    dtype = DTYPES[compute_dtype]
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet(), torch.device("cpu"):  # what the loader makes for itself
        try:
            config = AutoConfig.from_pretrained(path, **common)
            if getattr(config, "quantization_config", None) is not None:
                raise UserError(
                    f"model {model!r} is a checkpoint that is already quantized; take the original 16-bit weights, "
                    "they are quantized while loading"
                )
            _switch_dropout_off(config)
            tokenizer = AutoTokenizer.from_pretrained(path, **common)
            loaded = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                quantization_config=quantization_settings(quantization, dtype),
                device_map={"": str(device)},
                use_safetensors=True,
                **common,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"model {model!r} cannot be loaded: {first_sentence(error)}; give a Hub id that can be reached, a "
                "local folder in the transformers format with safetensors weights, or a .gguf file"
            ) from error
    loaded.requires_grad_(False)
    return loaded, tokenizer


def quantization_settings(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how the loader quantizes, which a merge onto the same numbers does again; None: not at all."""
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def _switch_dropout_off(config: Any) -> None:
    """The sampling policy must be the trained policy, so no dropout of the base is ever active."""
    for key, value in vars(config).items():
        if ("dropout" in key or key.endswith(("pdrop", "_drop"))) and isinstance(value, float):
            setattr(config, key, 0.0)


def convert_gguf(path: Path) -> Path:
    """Return a folder with the GGUF's model as 16-bit safetensors, made once and kept in the cache."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_folder() / "gguf" / f"{path.stem}-{key}"
    if target.is_dir():
        return target
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with quiet(), torch.device("cpu"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**source)
            model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float16)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise UserError(
                f"GGUF file {path} cannot be read: {first_sentence(error)}; take another GGUF of the model, or its "
                "safetensors folder"
            ) from error
        for mark in ("hf_quantizer", "is_quantized"):  # the loader marks the model as quantized; it no longer is
            if hasattr(model, mark):
                setattr(model, mark, None if mark == "hf_quantizer" else False)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            with contextlib.suppress(OSError):  # another process was faster
                temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def first_sentence(error: Exception) -> str:
    """Return what an error says first, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the loaders' harmless lines out of the user's sight, and their bars where nobody watches."""
    from transformers.utils import logging as transformers_logging

    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
