"""SharedBase: the base model once, and roles as states of it.

``policy`` is the base with its adapter, ``reference`` the same base with none. A role is entered with a context
manager and costs nothing: the layers look up which adapters are active.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.model.attention import NAME as ATTENTION
from lowmem_rlhf.model.attention import AttentionContext
from lowmem_rlhf.model.load import load_base
from lowmem_rlhf.model.logprobs import Head
from lowmem_rlhf.model.lora import ActiveAdapters, SharedLoraLinear, dequantized, lora_config

POLICY = "policy"


class SharedBase(nn.Module):
    """One frozen base and the adapters of all roles.

    Args:
        model: a loaded, frozen transformers causal LM; its linear layers get the policy adapter.
        tokenizer: its tokenizer.
        model_id: the name that goes into the adapter's file.
        r, lora_alpha, target_modules: the policy adapter, as in peft.
        seed: of the adapter's initial weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        model_id: str,
        r: int = 16,
        lora_alpha: float = 32,
        target_modules: str | list[str] = "all-linear",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not _packable(model):
            raise UserError(
                f"model {model_id!r} ({type(model).__name__}) does not let its attention be replaced and cannot be "
                "trained packed; take a model of the Llama, Qwen, Mistral, Gemma, Phi or GPT-2 families"
            )
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[assignment]
        self.tokenizer = tokenizer
        self.active = ActiveAdapters()
        self.roles: dict[str, tuple[str, ...]] = {"reference": (), POLICY: (POLICY,)}
        model.set_attn_implementation(ATTENTION)
        model.name_or_path = model_id  # peft puts it into the adapter's file
        config = lora_config(r, lora_alpha, target_modules, model_id)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.peft = get_peft_model(model, config, adapter_name=POLICY)
            except ValueError as error:
                raise UserError(f"lora.target_modules={target_modules!r} does not fit {model_id!r}: {error}") from error
        for layer in self.adapter_layers():
            layer.active = self.active
        self.model: PreTrainedModel = self.peft.get_base_model()  # type: ignore[assignment]
        _switch_dropout_off(self.model)
        self.model.train()  # checkpointing only works in this mode
        self.decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        text = self.model.config.get_text_config()
        scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1.0)
        self.head = Head(self.model.get_output_embeddings(), scale, getattr(text, "final_logit_softcapping", None) or 0)

    @classmethod
    def load(
        cls,
        model: str,
        device: torch.device,
        quantization: str = "nf4",
        compute_dtype: str = "bfloat16",
        revision: str | None = None,
        trust_remote_code: bool = False,
        **adapter: Any,
    ) -> "SharedBase":
        """Load the base once (see `load_base`) and add the policy adapter.

        Raises:
            UserError: the model cannot be loaded, or cannot serve as a shared base.
        """
        loaded, tokenizer = load_base(model, quantization, compute_dtype, device, revision, trust_remote_code)
        return cls(loaded, tokenizer, model_id=model, **adapter)

    def adapter_layers(self) -> Iterator[SharedLoraLinear]:
        """Yield every layer that carries adapters."""
        return (m for m in self.peft.modules() if isinstance(m, SharedLoraLinear))

    @contextmanager
    def role(self, name: str) -> Iterator["SharedBase"]:
        """Be ``policy`` or ``reference`` inside the block.

        Raises:
            KeyError: there is no such role.
        """
        before, self.active.names = self.active.names, self.roles[name]
        try:
            yield self
        finally:
            self.active.names = before

    @contextmanager
    def dequantized(self, on: bool = True) -> Iterator["SharedBase"]:
        """Lend NF4 layers a 16-bit copy of their weights inside the block: same numbers, no dequantizing a pass.

        For passes without gradients; with ``on`` false nothing happens.
        """
        layers = list(self.adapter_layers()) if on else []
        try:
            for layer in layers:
                layer.dense = dequantized(layer.base_layer, self.dtype)
            yield self
        finally:
            for layer in layers:
                layer.dense = None

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return the last hidden states (T, H) of a packed row, input_ids and position_ids (1, T), in this role."""
        out = self.decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True, lowmem_context=context
        )
        return out.last_hidden_state[0]

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute every layer in the backward pass, or keep all activations."""
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = on
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name.

        Raises:
            RuntimeError: nothing trains.
        """
        found = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}
        if not found:
            raise RuntimeError("no parameter of the shared base is trainable: nothing would be learned")
        return found

    def adapters_changed(self) -> None:
        """To be called after every change of adapter weights: the 16-bit copies are made anew."""
        self.active.version += 1

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token id at which the model ends a text (generation config, config and tokenizer)."""
        ids: set[int] = set()
        for value in (
            getattr(self.model.generation_config, "eos_token_id", None),
            self.model.config.get_text_config().eos_token_id,
            self.tokenizer.eos_token_id,
        ):
            ids.update(value if isinstance(value, list) else [value] if value is not None else [])
        return frozenset(ids)

    def adapter_state(self, role: str = POLICY) -> dict[str, torch.Tensor]:
        """Return the adapter's weights under peft's names, on the CPU."""
        state = get_peft_model_state_dict(self.peft, adapter_name=role, save_embedding_layers=False)
        return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}

    def save_adapter(self, folder: Path, role: str = POLICY) -> None:
        """Write the adapter in peft's format: adapter_model.safetensors and adapter_config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.adapter_state(role), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self.peft.peft_config[role]
        training, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = training

    def load_adapter(self, folder: Path, role: str = POLICY) -> None:
        """Put saved weights into the adapter of this role.

        Raises:
            UserError: the file is not of this base and adapter shape.
        """
        state = load_file(folder / "adapter_model.safetensors", device="cpu")
        have = self.adapter_state(role)
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in have.items()}:
            raise UserError(f"the adapter in {folder} does not fit this base: its tensors have other names or shapes")
        with torch.no_grad():
            set_peft_model_state_dict(self.peft, state, adapter_name=role)
        self.adapters_changed()


def _switch_dropout_off(model: nn.Module) -> None:
    """The sampling policy must be the trained policy, so no dropout of the base is ever active."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # what goes to F.dropout
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _packable(model: PreTrainedModel) -> bool:
    """Say whether tokens of a model meet in nothing but attention of a kind that our function computes.

    Recurrent and convolutional layers would let completions of one row see each other; attention sinks (GPT-OSS)
    and compressed or chunked attention would be left out without a word.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and not getattr(model, "_is_stateful", False)
        and kinds <= {"full_attention", "sliding_attention"}
        and not any(name.endswith(".sinks") for name, _ in model.named_parameters())
    )
