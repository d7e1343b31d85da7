"""A model that a program has loaded already: what of it a run can use as its one copy of the base.

The object belongs to the run from then on: adapters are put beside its linear layers, and its attention is replaced.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.hub import cached_config
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities, kind_of
from lowmem_rlhf.recipe.schema import Recipe

COMPARED = 2**24  # numbers of a loaded model that are held against its files


@dataclass(frozen=True)
class LoadedModel:
    """A transformers model with its tokenizer.

    Attributes:
        model: a causal language model on one device, in 16-bit, float32, NF4 or int8 weights.
        tokenizer: its tokenizer; None: that of its files.
    """

    model: Any
    tokenizer: Any = None

    @property
    def name(self) -> str:
        """The folder or Hub id that it was loaded from."""
        return str(getattr(self.model, "name_or_path", "") or "")

    def overrides(self) -> dict[str, Any]:
        """Return the recipe's keys that the object decides.

        Raises:
            UserError: it cannot be the base of a run.
        """
        self._check()
        parameter = self.model.get_input_embeddings().weight
        device = str(parameter.device)
        return {
            "model": self.name,
            "hardware.device": kind_of(device) if capabilities(device).on_cpu else device,
            "hardware.quantization": self._quantization(),
            "hardware.compute_dtype": str(parameter.dtype).removeprefix("torch."),
            "hardware.offload_embeddings": False,
        }

    def own_tokenizer(self, recipe: Recipe) -> Any:
        """Return the tokenizer of the model's files, once the given one is known to be the same.

        Raises:
            UserError: it is another one, which an export could not take along.
        """
        from lowmem_rlhf.engine.tokenizer import load_tokens

        tokens = load_tokens(recipe.model, recipe.revision, recipe.trust_remote_code)
        assert tokens is not None  # the Hub may be asked
        own, given = tokens.tokenizer, self.tokenizer
        if given is not None and _facts(own) != _facts(given):
            raise UserError(
                f"tokenizer: it differs from the one in {recipe.model} (vocabulary, special tokens or chat template), "
                "which is what the run's model would be used with; save model and tokenizer into one folder with "
                "save_pretrained and give that as model"
            )
        return own

    def _check(self) -> None:
        from transformers import PreTrainedModel

        model = self.model
        if hasattr(model, "peft_config"):
            raise UserError("model: got a model with adapters on it; give the base, and the adapter as adapter=FOLDER")
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise UserError(
                f"model: got a {type(model).__name__}; give a name, a folder, or transformers' causal language model"
            )
        if not self.name or not (Path(self.name).is_dir() or "/" in self.name):
            raise UserError(
                "model: the object was not loaded from a folder or the Hub, so nothing could open the run again; save "
                "it with save_pretrained, together with its tokenizer, and give the folder"
            )
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise UserError("model: the object lies on several devices; load it on one (device_map={'': DEVICE})")
        if (changed := self._changed_weight()) is not None:
            raise UserError(
                f"model: {changed} of the object is not the one in {self.name}, with which the run would be opened and "
                "exported; save the object with save_pretrained, together with its tokenizer, and give that folder"
            )

    def _changed_weight(self) -> str | None:
        """Return the name of a weight that differs from the one in the files, of those of 16 bits and more.

        The smallest are compared first, `COMPARED` numbers in all: whoever has trained a model has changed its norms.
        """
        import torch
        from safetensors import safe_open

        cached = None if Path(self.name).is_dir() else cached_config(self.name, None)
        folder = Path(self.name) if Path(self.name).is_dir() else cached and cached.parent
        if folder is None:
            return None
        held, prefix = dict(self.model.named_parameters()), f"{self.model.base_model_prefix}."
        left = COMPARED
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                sizes = {name: math.prod(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
                for name in sorted(sizes, key=sizes.__getitem__):
                    weight = held.get(name, held.get(prefix + name))
                    if sizes[name] > left or weight is None or not weight.is_floating_point():
                        continue
                    tensor = stored.get_tensor(name)
                    if tensor.shape == weight.shape:
                        left -= sizes[name]
                        if not torch.equal(weight.detach().cpu(), tensor.to(weight.dtype)):
                            return name
        return None

    def _quantization(self) -> str:
        settings = getattr(self.model.config, "quantization_config", None)
        if settings is None:
            return "none"
        read = settings.get if isinstance(settings, dict) else lambda key: getattr(settings, key, None)
        if read("load_in_8bit"):
            return "int8"
        if read("load_in_4bit") and read("bnb_4bit_quant_type") == "nf4" and read("bnb_4bit_use_double_quant"):
            return "nf4"
        raise UserError(
            "model: the object's quantization is none that a run uses; load it unquantized, with load_in_8bit=True, or "
            "with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)"
        )


def _facts(tokenizer: Any) -> tuple[Any, ...]:
    return (tokenizer.get_vocab(), tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None))
