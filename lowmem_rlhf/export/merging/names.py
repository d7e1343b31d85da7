"""Which stored tensor belongs to which parameter of the model, and which of them the loader quantizes.

A checkpoint may name its tensors differently from the model: GPT-NeoX's head is ``embed_out``, GPT-2's files exist
with and without ``transformer.`` in front. The loader renames, adds or removes such a prefix, and so does this module.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from lowmem_rlhf.architecture.experts import expert_stacks
from lowmem_rlhf.architecture.families.wrappers import text_name
from lowmem_rlhf.engine.load import DTYPES, first_sentence, quantization_settings, quiet, text_only
from lowmem_rlhf.errors import UserError


@dataclass(frozen=True)
class Skeleton:
    """A model without its weights.

    Attributes:
        model_type: as transformers names it.
        shapes: of its parameters and buffers, by name.
        transposed: weights that are stored (in, out): GPT-2's Conv1D.
        renamed: the loader's own name for a stored tensor.
        quantized: for weights that the loader quantizes, bitsandbytes' parameter with its settings.
        wide: what the loader keeps in fp32 whatever the dtype.
    """

    model_type: str
    shapes: Mapping[str, tuple[int, ...]]
    transposed: frozenset[str]
    renamed: Callable[[str], str]
    quantized: Mapping[str, Any]
    wide: frozenset[str] = frozenset()


def skeleton(folder: Path, quantization: str, compute_dtype: str, trust_remote_code: bool = False) -> Skeleton:
    """Build the model of a folder without weights, and let the loader's own code choose what is quantized.

    Raises:
        UserError: its config cannot be read.
    """
    try:
        with quiet(), torch.device("meta"):
            config, tower = text_only(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
            renamed = (lambda name: text_name(name) or name) if tower else _renamings(model)
            wide = _kept_wide(model, DTYPES[compute_dtype])
            settings = quantization_settings(quantization, DTYPES[compute_dtype])
            if settings is not None:
                quantizer = AutoHfQuantizer.from_config(settings)
                quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"the model in {folder} cannot be built: {first_sentence(error)}") from error
    quantized = {} if settings is None else _quantized(model)
    return Skeleton(config.get_text_config().model_type, shapes, frozenset(transposed), renamed, quantized, wide)


def _kept_wide(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Return the names of parameters that a model class wants in fp32: some in float16 only, some in bfloat16 too."""
    wanted = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        wanted += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    return frozenset(
        name for name in model.state_dict() if any(re.search(rf"(^|\.){one}(\.|$)", name) for one in wanted)
    )


def _renamings(model: Any) -> Callable[[str], str]:
    """Return the loader's renaming of stored tensors; it is not public in transformers and may move."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:
        return str
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    return lambda name: apply_renamings(name, renamings)


def _quantized(model: nn.Module) -> dict[str, Any]:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

    kinds = (Linear4bit, Linear8bitLt)
    linears = {f"{name}.weight": m.weight for name, m in model.named_modules() if isinstance(m, kinds)}
    names = {module: name for name, module in model.named_modules()}
    stacks = [(f"{names[module]}.{name}", getattr(module, name)) for module, name in expert_stacks(model)]
    return linears | {name: stack for name, stack in stacks if isinstance(stack, Params4bit)}


def expert_settings(stored: str, quantized: Mapping[str, Any]) -> Any:
    """Return how a stored tensor of a single expert is quantized, as a part of its layer's stack; None if it is not.

    A file may hold the experts one by one (``mlp.experts.3.up_proj.weight``). They are quantized as the stack is: its
    blocks have scales of their own, and lie within one expert.
    """
    match = re.search(r"\blayers\.(\d+)\.(?:.+\.)?experts\.\d+\.\w+\.weight$", stored)
    return None if match is None else next((quantized[name] for name in stacks_of(int(match[1]), quantized)), None)


def stacks_of(layer: int, quantized: Mapping[str, Any]) -> list[str]:
    """Return the names of a decoder layer's stacks of experts."""
    return [name for name in quantized if not name.endswith(".weight") and f"layers.{layer}." in name]


def stored_names(
    parameters: Iterable[str], stored: Iterable[str], renamed: Callable[[str], str] = str
) -> dict[str, str]:
    """Return the model's name of each stored tensor: the same, renamed, or with a prefix more or less.

    Tensors whose name fits no parameter, or more than one, are left out.
    """
    known = set(parameters)
    endings: dict[str, list[str]] = {}
    for name in known:
        for ending in _endings(name):
            endings.setdefault(ending, []).append(name)
    matched: dict[str, str] = {}
    for tensor in stored:
        if tensor in known:
            matched[tensor] = tensor
            continue
        name = renamed(tensor)
        if name in known:
            matched[tensor] = name
            continue
        fits = endings.get(tensor, []) or [ending for ending in _endings(tensor) if ending in known][:1]
        if len(fits) == 1:
            matched[tensor] = fits[0]
    taken = list(matched.values())
    return {tensor: name for tensor, name in matched.items() if tensor == name or taken.count(name) == 1}


def _endings(name: str) -> list[str]:
    """Return a dotted name without its first part, without its first two, and so on."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
