"""Language models inside a larger model for images or sound: their text tower is used alone. No torch here.

The checkpoint's config.json has a ``text_config``, and its files name the tower's tensors ``language_model.model.X``,
``model.language_model.X`` or ``model.text_model.X``; the text-only class calls them ``model.X``, the whole model's
class ``model.language_model.X``. Other tensors (towers for images, ``mtp.*`` for predicting several tokens) are not
read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TOWER = r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?"
_HEAD = r"^(?:model\.)?language_model\.lm_head\."
KEY_MAPPING = {_HEAD: "lm_head.", _TOWER: "model."}  # of `from_pretrained`: from the files' names to the text class's


@dataclass(frozen=True)
class Wrapper:
    """What a wrapper's config.json leaves unsaid.

    Attributes:
        text: the model type of its text tower.
        causal_lm: whether transformers' ``AutoModelForCausalLM`` gives its text-only class, and not the whole model's
            (or none).
        tied: whether its output head is its token embedding.
        module: what the whole model's class calls the text tower.
        defaults: of fields of ``text_config``.
    """

    text: str
    causal_lm: bool = False
    tied: bool = True
    module: str = "language_model"
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA3 = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
WRAPPERS = {
    "gemma3": Wrapper("gemma3_text", defaults={**_GEMMA3, "max_position_embeddings": 131072}),
    "gemma3n": Wrapper("gemma3n_text"),
    "gemma4": Wrapper("gemma4_text"),
    "gemma4_unified": Wrapper("gemma4_unified_text"),
    "mistral3": Wrapper("mistral"),
    "qwen3_5": Wrapper("qwen3_5_text", causal_lm=True, tied=False),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text", causal_lm=True, tied=False),
    "lfm2_vl": Wrapper("lfm2"),
    "lfm3_vl": Wrapper("lfm3"),
    "internvl": Wrapper("qwen2"),
    "smolvlm": Wrapper("llama", tied=False, module="text_model"),
    "idefics3": Wrapper("llama", tied=False, module="text_model"),
}


def auto_class(config: Mapping[str, Any]) -> str:
    """Return the name of transformers' auto class that loads a folder with this config.json whole."""
    return "AutoModelForMultimodalLM" if is_wrapper(config) else "AutoModelForCausalLM"


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a wrapper whose text tower can be used alone."""
    name = config.get("model_type")
    return isinstance(name, str) and name in WRAPPERS and isinstance(config.get("text_config"), Mapping)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config.json of a wrapper's text tower as a model of its own; any other one as it is."""
    if not is_wrapper(config):
        return config
    wrapper, inside = WRAPPERS[config["model_type"]], config["text_config"]
    shared = ("dtype", "torch_dtype", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id")
    text = {key: config[key] for key in shared if config.get(key) is not None}
    text |= {"model_type": wrapper.text, **wrapper.defaults, **inside}
    return {**text, "tie_word_embeddings": config.get("tie_word_embeddings", wrapper.tied)}


def text_name(stored: str) -> str | None:
    """Return the text-only class's name of a wrapper's stored tensor; None for what is not the text tower's."""
    for pattern, prefix in KEY_MAPPING.items():
        name, found = re.subn(pattern, prefix, stored)
        if found:
            return name
    return stored if stored.startswith("lm_head.") else None


def text_key(stored: str) -> str:
    """Return the text-only class's name of an adapter's tensor that carries the whole model's; others as they are."""
    start = re.match(r"base_model\.model\.", stored)
    rest = stored[start.end() :] if start else stored
    return stored if start is None or not re.match(_TOWER, rest) else start[0] + str(text_name(rest))


def wrapper_name(text: str, model_type: str) -> str:
    """Return the whole model's name of a module or parameter of its text-only class."""
    return re.sub(r"^model\.", f"model.{WRAPPERS[model_type].module}.", text)
