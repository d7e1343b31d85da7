"""A model that a program has loaded already: what of it a run can use as its one copy of the base.

The object belongs to the run from then on: adapters are put beside its linear layers, and its attention is replaced.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.architecture.hub import cached_config
from lowmem_rlhf.architecture.source import is_local, resolve_model
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.capabilities import capabilities, kind_of
from lowmem_rlhf.recipe.schema import Recipe

COMPARED_ROWS = 8  # of each matrix of a loaded model that are held against its files


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
            "hardware.offload_experts": False,
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

    def check_weights(self, recipe: Recipe) -> None:
        """Hold the object's weights against its files, with which the run is opened and exported later.

        Of every weight in 16 bits or more that stands under one name in both, the first rows are compared; weights in
        NF4 or int8 are not.

        Raises:
            UserError: one differs.
        """
        import torch
        from safetensors import safe_open

        path = resolve_model(recipe.model)
        config = Path(path, "config.json") if is_local(path) else cached_config(path, recipe.revision)
        held, prefix = dict(self.model.named_parameters()), f"{self.model.base_model_prefix}."
        for file in sorted(config.parent.glob("*.safetensors")) if config else ():
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                    weight, part = held.get(name, held.get(prefix + name)), stored.get_slice(name)
                    if weight is None or not weight.is_floating_point() or tuple(weight.shape) != (*part.get_shape(),):
                        continue
                    rows = slice(COMPARED_ROWS if weight.dim() > 1 else None)
                    if not torch.equal(weight[rows].detach().cpu(), part[rows].to(weight.dtype)):
                        raise UserError(
                            f"model: {name} of the object is not the one in {recipe.model}, with which the run would "
                            "be opened and exported; save the object with save_pretrained, together with its "
                            "tokenizer, and give that folder"
                        )

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
