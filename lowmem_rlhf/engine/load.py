"""Load the one base: any transformers causal LM from the Hub, a folder or a GGUF file, as NF4, int8 or 16-bit."""

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lowmem_rlhf.architecture.families.wrappers import KEY_MAPPING, is_wrapper, text_name
from lowmem_rlhf.architecture.source import cache_folder, resolve_model
from lowmem_rlhf.engine.dequantized_source import dequantized_folder
from lowmem_rlhf.engine.experts import METHOD, split_experts
from lowmem_rlhf.engine.gguf_source import check_gguf, complete_config
from lowmem_rlhf.engine.whole import in_body, load_whole
from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.files import cached_folder, check_room, writing
from lowmem_rlhf.hardware.memory import is_out_of_memory

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CONVERSION = 2  # of GGUF files; 1 had not been checked for tensors that were left out


def load_base(
    model: str,
    quantization: str,
    compute_dtype: str,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offload_experts: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Return the frozen model on the device, with every dropout off, and its tokenizer.

    Args:
        model: as in a recipe (Hub id, folder, .gguf file, or package:PACKAGE/FILE).
        quantization: ``nf4`` (double quantization), ``int8`` or ``none``.
        compute_dtype: ``bfloat16``, ``float16`` or ``float32``; weights that are not quantized are kept in it.
        offload_experts: experts in NF4 go to host memory as they are quantized.

    Raises:
        UserError: the model cannot be found or read, or its files lack a tensor or hold another one.
    """
    path = resolve_model(model)
    if path.endswith(".gguf"):
        path = str(convert_gguf(Path(path)))
    dtype = DTYPES[compute_dtype]
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet(), torch.device("cpu"):  # what the loader makes for itself
        try:
            path = dequantized_folder(path, model, revision)
            config, tower = text_only(AutoConfig.from_pretrained(path, **common))
            if getattr(config, "quantization_config", None) is not None:
                raise UserError(
                    f"model {model!r} is a checkpoint that is already quantized; take the original 16-bit weights, "
                    "they are quantized while loading"
                )
            _switch_dropout_off(config)
            tokenizer = AutoTokenizer.from_pretrained(path, **common)
            loaded = load_whole(
                AutoModelForCausalLM,
                path,
                model,
                config=config,
                dtype=dtype,
                quantization_config=quantization_settings(quantization, dtype, offload_experts),
                device_map={"": str(device)},
                use_safetensors=True,
                **tower,
                **common,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"model {model!r} cannot be loaded: {first_sentence(error)}; give a Hub id that can be reached, a "
                "local folder in the transformers format with safetensors weights, or a .gguf file"
            ) from error
    if tower:
        loaded.is_tower = True  # type: ignore[assignment]
    return as_base(loaded), tokenizer


def text_only(config: Any) -> tuple[Any, dict[str, Any]]:
    """Return the configuration of a wrapper's text tower, and the keywords with which `load_whole` loads it alone.

    The tensors of other towers are not read from disk. A model that is no wrapper keeps its configuration.
    """
    if not is_wrapper(config.to_dict()):
        return config, {}
    text, whole = config.get_text_config(), config
    text.tie_word_embeddings = whole.tie_word_embeddings
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config"):
        if getattr(text, key, None) is None and getattr(whole, key, None) is not None:
            setattr(text, key, getattr(whole, key))
    return text, {"key_mapping": KEY_MAPPING, "may_hold": _beside_the_text}


def _beside_the_text(key: str, model: Any) -> bool:
    return text_name(key) is None and key.split(".")[0] != "lm_head" and not in_body(key, model)


def as_base(model: PreTrainedModel) -> PreTrainedModel:
    """Return a loaded model frozen, with its 4-bit codes kept in their order and every dropout off.

    Raises:
        UserError: its codes were reordered already.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UserError(
                "model: the object has run in evaluation mode, in which bitsandbytes reorders the 4-bit codes on this "
                "processor; load it again and give it before its first call"
            )
    model.requires_grad_(False)
    split_experts(model)
    _switch_dropout_off(model.config)
    _keep_order(model)
    return model


def quantization_settings(
    quantization: str, dtype: torch.dtype, offload_experts: bool = False
) -> BitsAndBytesConfig | None:
    """Return how the loader quantizes, which a merge onto the same numbers does again; None: not at all."""
    if quantization == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        settings.quant_method = METHOD  # type: ignore[assignment]
        settings.offload_experts = offload_experts  # type: ignore[attr-defined]
        return settings
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def _keep_order(model: PreTrainedModel) -> None:
    """Let bitsandbytes leave its 4-bit codes as they lie, whatever mode a layer is in.

    On CPUs with AVX-512 bf16 it (0.50.2) reorders them in place at a layer's first call in evaluation mode. The forward
    pass knows that order; the backward pass and whatever else reads the codes do not, and are wrong from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _switch_dropout_off(config: Any) -> None:
    """The sampling policy must be the trained policy, so no dropout of the base is ever active."""
    for key, value in vars(config).items():
        if ("dropout" in key or key.endswith(("pdrop", "_drop"))) and isinstance(value, float):
            setattr(config, key, 0.0)


def converted_folder(path: Path) -> Path:
    """Return where `convert_gguf` keeps a GGUF's model; it need not be there yet."""
    stat = path.stat()
    key = hashlib.sha256(f"{_CONVERSION}|{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    return cache_folder() / "gguf" / f"{path.stem}-{key}"


def convert_gguf(path: Path) -> Path:
    """Return a folder with the GGUF's model as 16-bit safetensors, made once and kept in the cache."""
    target = converted_folder(path)
    if target.is_dir():
        return target
    with quiet(), torch.device("cpu"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            config = complete_config(AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name), path)
            model = load_whole(
                AutoModelForCausalLM,
                str(path.parent),
                str(path),
                gguf_file=path.name,
                config=config,
                dtype=torch.float16,
            )
            check_gguf(path, model)
        except UserError:
            raise
        except Exception as error:  # transformers fails in many ways on a file of a kind that it does not know
            if isinstance(error, MemoryError) or is_out_of_memory(error):
                raise
            raise UserError(
                f"GGUF file {path} cannot be read: {first_sentence(error)}; take another GGUF of the model, or its "
                "safetensors folder"
            ) from error
        for mark in ("hf_quantizer", "is_quantized"):  # the loader marks the model as quantized; it no longer is
            if hasattr(model, mark):
                setattr(model, mark, None if mark == "hf_quantizer" else False)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with writing(target, UserError, "or set LOWMEM_RLHF_CACHE to a folder elsewhere: the GGUF is kept there"):
            check_room(target, sum(p.numel() * p.element_size() for p in model.parameters()))
            with cached_folder(target) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    return target


def first_sentence(error: Exception) -> str:
    """Return what an error says first, on one line."""
    text = one_line(error)
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
