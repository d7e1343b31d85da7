"""What a GGUF says of its model and transformers' reader leaves out: put into the configuration, or refused.

The reader drops what it has no name for. Gemma 2 and 3 need some of it, and one number that no GGUF states; the names
and the rule for that number are llama.cpp's.
"""

import re
from collections.abc import Mapping
from math import isclose, prod
from pathlib import Path
from typing import Any

import gguf

from lowmem_rlhf.architecture.families import family_of_gguf
from lowmem_rlhf.architecture.gguf_header import GGUFHeader, read_gguf_header
from lowmem_rlhf.engine.whole import few
from lowmem_rlhf.errors import UserError

# numbers that change what is computed -> their names in a configuration
_STATED = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "embedding_scale": "embedding_multiplier",
}
_REMEDY = "the model would compute something else; take its safetensors folder"


def complete_config(config: Any, file: Path) -> Any:
    """Put into a configuration that transformers read of a GGUF what that says further (of Gemma 2 and 3)."""
    fields = read_gguf_header(file).fields
    arch = str(fields.get("general.architecture"))
    layout = family_of_gguf(arch)[1].gguf
    if layout is None or not layout.wide_scale_layers:
        return config
    big = config.num_hidden_layers == layout.wide_scale_layers
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if big else config.head_dim
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := fields.get(f"{arch}.{name}")) is not None:
            setattr(config, name, cap)
    windowed = fields.get(f"{arch}.attention.sliding_window_pattern")
    if isinstance(windowed, list):
        config.layer_types = ["sliding_attention" if one else "full_attention" for one in windowed]
    if (base := fields.get(f"{arch}.rope.freq_base_swa")) is not None:
        config.rope_parameters["sliding_attention"]["rope_theta"] = base
    return config


def check_gguf(file: Path, model: Any) -> None:
    """Check that a model has all numbers of the GGUF that transformers read it from.

    Raises:
        UserError: tensors, a scaling of the positions or another number were left out.
    """
    header = read_gguf_header(file)
    arch, config = str(header.fields.get("general.architecture")), model.config
    scaling = header.fields.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" and not _scales_positions(config):
        raise UserError(f"GGUF file {file}: transformers leaves its {scaling} scaling of positions out; {_REMEDY}")
    for key, name in _STATED.items():
        stated, taken = header.fields.get(f"{arch}.{key}"), getattr(config, name, None)
        if isinstance(stated, int | float) and not isclose(stated, taken or 0.0, rel_tol=1e-5):
            raise UserError(f"GGUF file {file}: transformers leaves its {key}={stated:g} out; {_REMEDY}")
    _check_tensors(file, header, arch, model)


def _check_tensors(file: Path, header: GGUFHeader, arch: str, model: Any) -> None:
    shapes = {name: shape for name, shape in header.shapes.items() if not _further(name, header.fields, arch, model)}
    loaded = {p.data_ptr(): p.numel() for p in model.state_dict().values()}
    stored, read = sum(prod(shape) for shape in shapes.values()), sum(loaded.values())
    if stored != read:
        known = _gguf_names(arch, model)
        dropped = {name for name in shapes if known and name not in known and "_exps" not in name}
        what = f" ({few(dropped)})" if dropped else ""
        raise UserError(
            f"GGUF file {file}: of its {stored:,} numbers transformers makes a model of {read:,}{what}; {_REMEDY}"
        )


def _further(name: str, fields: Mapping[str, Any], arch: str, model: Any) -> bool:
    """Say whether a GGUF's tensor is rightly not read: a tied head's copy, or a layer that predicts further tokens."""
    if name == "output.weight" and model.config.tie_word_embeddings:
        return True
    block = re.match(r"blk\.(\d+)\.", name)
    further = f"{arch}.nextn_predict_layers" in fields
    return bool(further and block and int(block[1]) >= model.config.num_hidden_layers)


def _gguf_names(arch: str, model: Any) -> set[str]:
    """Return what a GGUF of this architecture calls the model's tensors."""
    kind = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), None)
    if kind is None:
        return set()
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    parts = [key.split(".") for key in model.state_dict()]
    candidates = (names.get_name(".".join(part[cut:]), (".weight", ".bias")) for part in parts for cut in range(3))
    return {name for name in candidates if name}


def _scales_positions(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return any(kind.get("rope_type", "default") != "default" for kind in kinds)
