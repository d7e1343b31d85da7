"""What kinds of model a shared base can be, told from a ``config.json``: one sentence for each that it cannot.

The last check, for code of the model's own, looks into transformers' folder and imports nothing.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.counting import Counted
from lowmem_rlhf.architecture.families import family_of
from lowmem_rlhf.errors import UserError

ENCODERS = {
    *("albert", "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2"),
    *("distilbert", "electra", "ernie", "megatron-bert", "mpnet", "reformer", "rembert", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod"),
}
ENCODER_DECODERS = {"t5", "umt5", "mt5", "bart", "mbart", "pegasus", "marian", "led", "whisper", "t5gemma", "longt5"}
RECURRENT = {"mamba", "mamba2", "falcon_mamba", "xlstm"}  # no attention at all; and all of RWKV
SENSES = {
    "vision_config": "images",
    "visual": "images",
    "vision_tower": "images",
    "audio_config": "sound",
    "audio_encoder_config": "sound",
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_QUANTIZED_NAME = re.compile(r"(-unsloth)?-(bnb-4bit|bnb-8bit|awq|gptq|fp8|int4|int8|4bit|8bit|w4a16|w8a8)\b.*", re.I)
UNDONE = ("fp8", "mxfp4")  # kinds of quantized checkpoints that are made 16-bit first (`engine.dequantized_source`)
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
}


def check_kind(model: str, config: Mapping[str, Any], trust_remote_code: bool = True) -> str:
    """Return the model type of a config of a text-only, decoder-only model with attention, in 16 or 32 bits.

    `check_experts` looks at mixtures of experts.

    Raises:
        UserError: it is anything else, names no type, or needs code of its own that may not be run.
    """
    model_type = config.get("model_type")
    if not model_type or not isinstance(model_type, str):
        raise UserError(f"model {model!r}: its config.json has no model_type, so it is no transformers model")
    if config.get("is_encoder_decoder") or model_type in ENCODER_DECODERS:
        raise UserError(
            f"model {model!r} is an encoder-decoder ({model_type}); a decoder-only language model is needed"
        )
    if model_type in ENCODERS and not (config.get("is_decoder") or config.get("causal")):
        raise UserError(
            f"model {model!r} is an encoder ({model_type}): its attention sees the tokens that it would predict; a "
            "decoder-only language model is needed"
        )
    if sense := next((SENSES[key] for key in SENSES if config.get(key) is not None), None):
        raise UserError(f"model {model!r} ({model_type}) takes {sense} as well; a text-only model is needed")
    if isinstance(config.get("text_config"), Mapping) and config.get("hidden_size") is None:
        raise UserError(
            f"model {model!r} ({model_type}) is a language model inside a larger one (text_config in its config.json), "
            "which takes more than text; a text-only model is needed"
        )
    if model_type in RECURRENT or model_type.startswith("rwkv"):
        raise UserError(
            f"model {model!r} is recurrent ({model_type}) and has no attention, so its memory cannot be planned; take "
            "a transformer"
        )
    if config.get("quantization_config") and _method(config["quantization_config"]) not in UNDONE:
        raise UserError(already_quantized(model, config["quantization_config"]))
    if config.get("auto_map") and not trust_remote_code and not has_class(model_type):
        raise UserError(
            f"model {model!r} ({model_type}) runs code of its own (auto_map in its config.json), which transformers "
            "does not have; set trust_remote_code=true if you have read and trust it, or take another model"
        )
    return model_type


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config names more than one expert."""
    return _experts_of(config)[0] != ""


def _experts_of(config: Mapping[str, Any]) -> tuple[str, int]:
    sections = [config, *(config[key] for key in ("ffn_config",) if isinstance(config.get(key), Mapping))]
    named = ((key, section[key]) for section in sections for key in EXPERTS if section.get(key) not in (None, 0, 1))
    return next(named, ("", 0))


def check_experts(model: str, config: Mapping[str, Any], counted: Counted | None = None) -> None:
    """Refuse a mixture of experts whose parameters could not be counted on its class.

    Args:
        counted: on the model's class, where it could be asked: a config may name experts that the model does not have.

    Raises:
        UserError: it has experts, and nobody knows how many parameters they are.
    """
    name, number = _experts_of(config)
    if not name or counted is not None:
        return
    raise UserError(
        f"model {model!r} is a mixture of experts ({name} {number}) whose parameters could not be counted, so its "
        "memory cannot be planned; take one that transformers has a class for"
    )


def already_quantized(model: str, settings: Any) -> str:
    """Return the sentence for a checkpoint with a ``quantization_config``: how it was quantized, and what to take."""
    method = _method(settings)
    how = f" ({_METHODS.get(method, method)})" if method else ""
    original = _QUANTIZED_NAME.sub("", model)
    name = f", probably {original!r}" if original != model else ""
    return (
        f"model {model!r} is a checkpoint that is already quantized{how}; take the original 16-bit weights{name}: they "
        "are quantized while loading"
    )


def _method(settings: Any) -> str:
    return str(settings.get("quant_method", "") if isinstance(settings, Mapping) else "").lower()


def has_class(model_type: str) -> bool:
    """Say whether transformers has a class of its own for a model type."""
    if family_of(model_type).block:
        return True
    spec = importlib.util.find_spec("transformers")
    folder = Path(spec.origin).parent / "models" if spec and spec.origin else Path()
    return (folder / re.sub(r"\W", "_", model_type)).is_dir()
