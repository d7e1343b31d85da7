"""SharedBase: the base model once, and roles as states of it.

The adapters and heads of the roles, and how a role is entered, stand in `roles`; here a base is prepared and run.
"""

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem_rlhf.architecture.stops import stop_ids_of, turn_end
from lowmem_rlhf.architecture.vocabulary import missing_rows
from lowmem_rlhf.engine.attention import NAME as ATTENTION
from lowmem_rlhf.engine.attention import AttentionContext, NotPackable, PackedContext
from lowmem_rlhf.engine.decode.products import join_codes, set_decode_weights
from lowmem_rlhf.engine.decode.trial import try_fast_decoder
from lowmem_rlhf.engine.fused import fuse
from lowmem_rlhf.engine.grouped_lora import GroupedLoraLinear
from lowmem_rlhf.engine.head_trial import tried_head
from lowmem_rlhf.engine.host_embedding import HostEmbedding, embeddings_to_host
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.engine.lockstep import Lockstep
from lowmem_rlhf.engine.lora import ActiveAdapters, SharedLoraLinear, lora_config
from lowmem_rlhf.engine.mixers import pack_mixers
from lowmem_rlhf.engine.packing import Group, PackedBatch, pack
from lowmem_rlhf.engine.padded import (
    PACKED,
    PADDED,
    Layout,
    cache_follows_rows,
    forward_names,
    reads_ahead,
    training_modes,
    why_not_packed,
)
from lowmem_rlhf.engine.recompute import recompute_layers
from lowmem_rlhf.engine.roles import POLICY, REFERENCE, Roles
from lowmem_rlhf.engine.sharded import shard_layers
from lowmem_rlhf.engine.tokenizer import Tokens
from lowmem_rlhf.engine.wide import is_wide, widen
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.processes.world import begun
from lowmem_rlhf.recipe.lora_shape import LoraShape


class SharedBase(Roles):
    """One frozen base and the adapters of all roles.

    Args:
        model: a loaded, frozen transformers causal LM; its linear layers get the policy adapter.
        tokenizer: its tokenizer.
        model_id: the name that goes into the adapter's file.
        r, lora_alpha, target_modules: the policy adapter, as in peft.
        more: of it: ``use_rslora``, ``layers_to_transform``, ``rank_pattern``, ``alpha_pattern``.
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
        **more: Any,
    ) -> None:
        super().__init__()
        self.why_padded = why_not_packed(model)
        self.mixers = 0  # layers that pass a state on and can be packed
        self.stock_attention = model.config._attn_implementation
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[assignment]
        self.tokenizer = tokenizer
        self.model_id = model_id
        self.active = ActiveAdapters()
        self.roles: dict[str, tuple[str, ...]] = {REFERENCE: (), POLICY: (POLICY,)}
        self.heads = nn.ModuleDict()  # of roles that give one number a position, fp32
        if self.packable:
            model.set_attn_implementation(ATTENTION)
            self.mixers = pack_mixers(model)
        model.name_or_path = model_id  # peft puts it into the adapter's file
        config = lora_config(LoraShape.of(r, lora_alpha, target_modules, **more), model_id, model)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.peft = get_peft_model(model, config, adapter_name=POLICY)
            except ValueError as error:
                raise UserError(f"lora.target_modules={target_modules!r} does not fit {model_id!r}: {error}") from error
        for layer in self.adapter_layers():
            layer.active = self.active
        self._check_adapted(model, target_modules)
        self.model: PreTrainedModel = self.peft.get_base_model()  # type: ignore[assignment]
        _switch_dropout_off(self.model)
        _need_no_mask(self.model)
        training_modes(self.model)
        fuse(self.model, self.dtype)
        if is_wide(self.model, self.dtype):
            widen(self.model, self.dtype)
        self.decoder = _decoder_of(self.model)
        self.head = tried_head(self.model, self.decoder, model_id)
        self._takes_positions, self._cache_name = forward_names(self.decoder)
        self._recomputable = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.keeps_cache = False  # one that `stock_states` can continue
        self.chat_template_kwargs: dict[str, Any] = {}  # that the run gives its chat template
        self._turn_end: tuple[Any, frozenset[int]] | None = None  # by tokenizer, chat template and what it is given
        self._missing: tuple[Any, torch.Tensor | None] | None = None  # of this tokenizer
        self.sharded = any(isinstance(one, DTensor) for one in self.model.parameters())
        self._lockstep = Lockstep(self, begun()) if self.sharded else None
        if self.packable:
            self.why_padded = self._why_not_packed_when_tried()
        if not self.packable:
            self._be_padded()
        self.grouped_layers = self._find_groups()
        fast = self.packable and not is_wide(self.model, self.dtype) and not self.sharded
        self.fast_decoder = try_fast_decoder(self) if fast else None

    @property
    def packable(self) -> bool:
        """Whether tokens are packed; otherwise rows are padded."""
        return not self.why_padded

    @property
    def layout(self) -> Layout:
        """How groups become batches."""
        return PACKED if self.packable else PADDED

    @property
    def captures(self) -> bool:
        """Whether nothing in a decoding pass is known to wait for the device, so that it may become a graph.

        LLM.int8 looks for outliers, experts are looked up by the tokens that they get, and embeddings or experts in
        host memory are copied from there; rotary factors may depend on the longest text (`rotary_limit`).
        """
        waits = any(
            isinstance(module, HostEmbedding)
            or type(module).__name__.endswith("Experts")
            or hasattr(getattr(module, "weight", None), "CB")
            for module in self.model.modules()
        )
        return not waits and self.rotary_limit is None

    def pad(self, why: str) -> None:
        """Take the padded path from now on, for the reason that ends the sentence "it cannot be packed"."""
        self.why_padded, self.fast_decoder = why, None
        self._be_padded()

    def _be_padded(self) -> None:
        if self.model.config._attn_implementation == ATTENTION:
            self.model.set_attn_implementation(self.stock_attention)
        if reads_ahead(self):
            raise UserError(
                f"model {self.model_id!r} ({type(self.model).__name__}) reads the text behind the token that it "
                "predicts, so nothing can be sampled from it; take a causal language model"
            )
        self.keeps_cache = bool(self._cache_name) and cache_follows_rows(self)

    @torch.no_grad()
    def _why_not_packed_when_tried(self) -> str:
        """Run a small packed row; return why that is not possible, as `why_not_packed` does."""
        batch = pack([Group([1, 2, 3], [[1, 2, 3], [2, 1]], [0, 1])], self.device)
        context = PackedContext(batch.buckets, self.device, keep=True)
        try:
            self.hidden_states(batch.input_ids, batch.position_ids, context)
        except NotPackable as error:
            return str(error)
        except TypeError:  # its forward takes no further keywords
            return "its layers do not hand on what its attention is called with"
        if not context.kept and not context.states:
            return "its attention cannot be replaced"
        if len({number for number, _ in context.states}) < self.mixers:
            return "its layers pass state from token to token, and do not hand on what they are called with"
        config = self.model.config.get_text_config()
        if getattr(config, "sliding_window", None) is None:
            return ""
        kinds = dict(enumerate(getattr(config, "layer_types", None) or ()))
        in_mask = [
            layer
            for layer, window in context.windows.items()
            if window is None and kinds.get(layer, "sliding_attention") == "sliding_attention"
        ]
        return "the window of its attention is in its mask alone" if in_mask else ""

    def _check_adapted(self, model: PreTrainedModel, target_modules: str | list[str]) -> None:
        """Check that every adapter lies beside a linear layer inside the model, and that peft loads what it saves."""
        name = f"lora.target_modules={target_modules!r}"
        if isinstance(model.get_output_embeddings(), SharedLoraLinear):
            raise UserError(
                f"{name} names the output head of {self.model_id!r}; only linear layers inside the model take "
                "adapters: give their names, or all-linear"
            )
        others = [(n, m) for n, m in self.peft.named_modules() if isinstance(m, LoraLayer) and not _is_ours(m)]
        linear = ", ".join(sorted({n.rsplit(".", 1)[-1] for n, m in self.peft.named_modules() if _is_ours(m)}))
        if not others:
            if lost := self._not_loaded_again():
                raise UserError(
                    f"{name}: peft does not load what it saves of {type(model).__name__}'s adapters beside "
                    f"{', '.join(lost)}; name other layers in lora.target_modules ({linear})"
                )
            return
        names = ", ".join(sorted({n.removesuffix(".base_layer").rsplit(".", 1)[-1] for n, _ in others}))
        if any(isinstance(m, ParamWrapper) for _, m in others):
            raise UserError(
                f"{name}: {type(model).__name__} keeps the weights of its {names} as parameters without a linear "
                f"layer, where adapters have no effect here; name linear layers in lora.target_modules ({linear})"
            )
        raise UserError(
            f"{name} names {names} of {self.model_id!r}, which is no linear layer; only linear layers inside the model "
            "take adapters: give their names, or all-linear"
        )

    @classmethod
    def load(
        cls,
        model: str,
        device: torch.device,
        quantization: str = "nf4",
        compute_dtype: str = "bfloat16",
        revision: str | None = None,
        trust_remote_code: bool = False,
        offload_embeddings: bool = False,
        offload_experts: bool = False,
        join: bool = False,
        shard: bool = False,
        offload_base: bool = False,
        **adapter: Any,
    ) -> "SharedBase":
        """Load the base once (see `load_base`) and add the policy adapter.

        Args:
            offload_embeddings: the token embedding lies in host memory (see `host_embedding`).
            offload_experts: experts in NF4 do (see `experts`).
            join: NF4 weights of layers with one input lie in one tensor, to be multiplied at once while decoding.
            shard: the layers are shared out among the processes of the run (see `sharded`).
            offload_base: each process's share of them lies in host memory.

        Raises:
            UserError: the model cannot be loaded, or cannot serve as a shared base.
        """
        at_first = torch.device("cpu") if shard else device
        loaded, tokenizer = load_base(
            model, quantization, compute_dtype, at_first, revision, trust_remote_code, offload_experts
        )
        if shard:
            shard_layers(loaded, _decoder_of(loaded), device, offload_base)
        base = cls(loaded, tokenizer, model_id=model, **adapter)
        if join:
            base.join_weights()
        if offload_embeddings:
            embeddings_to_host(base.model)
        return base

    @torch.no_grad()
    def _find_groups(self) -> list[GroupedLoraLinear]:
        """Run one token through the model and join the layers that are called with the same input in succession."""
        calls: list[tuple[SharedLoraLinear, torch.Tensor]] = []
        self.active.calls = calls
        self.states(self.layout.lay_out([Group([0], [[0]], [0])], self.device))
        self.active.calls = None
        groups: list[list[SharedLoraLinear]] = []
        last: torch.Tensor | None = None
        seen: set[SharedLoraLinear] = set()  # a layer that is called again (Zamba's shared block) stays where it is
        for layer, x in calls:
            if layer in seen:
                last = None
                continue
            seen.add(layer)
            if x is last:
                groups[-1].append(layer)
            else:
                groups.append([layer])
            last = x
        self._check_called(seen)
        grouped = [GroupedLoraLinear(layers) for layers in groups]
        for group in grouped:
            for layer in group.layers:
                layer.group = group
        return grouped

    def _not_loaded_again(self) -> list[str]:
        """Return the layers whose adapters peft saves under names that it does not take when it loads them."""
        state = get_peft_model_state_dict(self.peft, adapter_name=POLICY, save_embedding_layers=False)
        result: Any = set_peft_model_state_dict(self.peft, state, adapter_name=POLICY)
        missing = {name for name in result.missing_keys if ".lora_" in name and f".{POLICY}." in name}
        return sorted({name.rsplit(".lora_", 1)[0].rsplit("layers.", 1)[-1] for name in missing})

    def _check_called(self, called: set[SharedLoraLinear]) -> None:
        """An adapter that the model's forward passes by would learn nothing. A token is routed to few experts only."""
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, SharedLoraLinear)}
        idle = {name for name, m in layers.items() if m not in called and "expert" not in name}
        if not idle:
            return
        both = {n.rsplit(".", 1)[-1] for n in idle} & {n.rsplit(".", 1)[-1] for n in layers if n not in idle}

        def names(found: Collection[str]) -> str:  # with what they are in, where their own does not tell them apart
            return ", ".join(sorted({".".join(n.split(".")[-1 - bool(both) :]) for n in found}))

        raise UserError(
            f"{type(self.model).__name__} does not call its layers {names(idle)} when it reads a text (they belong to "
            "another part of it, or it multiplies with their weights directly), so adapters there have no effect; name "
            f"others in lora.target_modules ({names(layers.keys() - idle)})"
        )

    def join_weights(self) -> None:
        """Let NF4 weights of layers with one input lie in one tensor (see `decode.products.join_codes`)."""
        for group in self.grouped_layers:
            join_codes(group)

    def free(self) -> None:
        """Let go of the weights, whoever still holds the base: it computes nothing from now on."""
        self.let_go()
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.grad, tensor.data = None, tensor.data.new_empty(0)

    @contextmanager
    def decoding(self, dequantize: bool, join: bool = True) -> Iterator["SharedBase"]:
        """Hold NF4 weights inside the block in a form for decoding (see `set_decode_weights`)."""
        try:
            for group in () if self.sharded else self.grouped_layers:
                set_decode_weights(group, self.dtype, dequantize, join)
            yield self
        finally:
            for group in self.grouped_layers:
                group.set_decode_product(None)
                group.end_decoding()
            if self.fast_decoder is not None:
                self.fast_decoder.forget()

    def hold(self) -> None:
        """Keep what a captured decoding pass of this role reads at one place in memory, until `let_go`."""
        for group in self.grouped_layers:
            group.hold(self.dtype)

    def let_go(self) -> None:
        """End what `hold` began."""
        for group in self.grouped_layers:
            group.let_go()

    def states(self, batch: PackedBatch) -> torch.Tensor:
        """Return the last hidden states (T, H) of a batch of this base's layout, in this role."""
        if batch.buckets:
            context = PackedContext(batch.buckets, self.device)
            return self.hidden_states(batch.input_ids, batch.position_ids, context)
        return self.stock_states(batch.input_ids, batch.position_ids).flatten(0, 1)

    def stock_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache | None = None
    ) -> torch.Tensor:
        """Return the last hidden states (R, L, H) of rows under stock attention, in this role; a cache is continued."""
        keywords: dict[str, Any] = {"position_ids": position_ids} if self._takes_positions else {}
        if cache is not None:
            keywords[self._cache_name] = cache
        recomputing = [layer for layer in self._recomputable if layer.gradient_checkpointing and cache is not None]
        try:
            for layer in recomputing:  # such a layer would leave the cache out
                layer.gradient_checkpointing = False
            out = self._decoded(input_ids=input_ids, use_cache=cache is not None, return_dict=True, **keywords)
        finally:
            for layer in recomputing:
                layer.gradient_checkpointing = True
        return out.last_hidden_state.to(self.dtype)

    @property
    def note(self) -> str:
        """What a user should know about how this model is run; empty where it is packed."""
        if self.packable:
            return ""
        again = "" if self.keeps_cache else ", and the whole text for every token that is sampled"
        return (
            f"{type(self.model).__name__} cannot be packed ({self.why_padded}): rows are padded, and a prompt runs "
            f"once a completion in training{again}"
        )

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return the last hidden states (T, H) of a packed row, input_ids and position_ids (1, T), in this role."""
        out = self._decoded(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True, lowmem_context=context
        )
        return out.last_hidden_state[0].to(self.dtype)  # Mamba's is in fp32

    def _decoded(self, **keywords: Any) -> Any:
        if self._lockstep is None:
            return self.decoder(**keywords)
        return self._lockstep.run(lambda: self.decoder(**keywords))

    def next_hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return what `hidden_states` does, for a decoding pass: few rows, no gradient."""
        run = self.hidden_states if self.fast_decoder is None else self.fast_decoder.hidden_states
        return run(input_ids, position_ids, context)

    def set_gradient_checkpointing(self, layers: bool | int, offload: bool = False) -> None:
        """Recompute all layers, none or the first so many in the backward pass (see `recompute_layers`).

        Args:
            offload: their inputs wait in host memory; on a CPU this changes nothing.

        Raises:
            UserError: the model has fewer layers.
        """
        recompute_layers(self.model, layers, offload)

    @property
    def rotary_limit(self) -> int | None:
        """Tokens beyond which a text changes the rotary factors of all texts of its pass; None: it never does.

        So it is with transformers' ``dynamic`` and ``longrope`` kinds of them, which are made for one text at a time.
        """
        config: Any = self.model.config.get_text_config()
        factors = getattr(config, "rope_parameters", None) or {}
        for one in (factors, *(value for value in factors.values() if isinstance(value, dict))):
            if one.get("rope_type") in ("dynamic", "longrope"):
                original = one.get("original_max_position_embeddings")
                original = original or getattr(config, "original_max_position_embeddings", None)
                return int(original or config.max_position_embeddings)
        return None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token id at which the model ends a text or a turn: see `stop_ids_of`."""
        options = self.chat_template_kwargs
        key = (self.tokenizer, getattr(self.tokenizer, "chat_template", None), options)
        if self._turn_end is None or self._turn_end[0] != key:
            self._turn_end = (key, turn_end(self.tokenizer, **options))
        return stop_ids_of(self.tokenizer, self.model.config, self.model.generation_config, self._turn_end[1])

    @property
    def rows(self) -> int:
        """Rows of the token embedding: ids from there on cannot be read."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]

    @property
    def tokens(self) -> Tokens:
        """The tokenizer, the tokens that end a completion, and the rows of the embedding."""
        return Tokens(self.tokenizer, self.stop_ids, self.rows)

    @property
    def missing(self) -> torch.Tensor | None:
        """Which logits belong to no token, (V,) bool on the base's device; None where each has one."""
        if self._missing is None or self._missing[0] is not self.tokenizer:
            rows = missing_rows(self.tokenizer, self.head.vocabulary, self.stop_ids)
            mask = torch.zeros(self.head.vocabulary, dtype=torch.bool, device=self.device) if rows else None
            if mask is not None:
                mask[torch.tensor(rows, dtype=torch.long, device=self.device)] = True
            self._missing = (self.tokenizer, mask)
        return self._missing[1]


def _decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return what makes a model's last hidden states of token ids; some call their output head the decoder."""
    candidates = (
        model.get_decoder() if hasattr(model, "get_decoder") else None,
        model.base_model,
        getattr(model, "model", 0),
    )
    others = (m for m in candidates if isinstance(m, nn.Module) and m is not model)
    return next((m for m in others if "input_ids" in inspect.signature(m.forward).parameters), model.base_model)


def _is_ours(module: Any) -> bool:
    return isinstance(module, SharedLoraLinear)


def _need_no_mask(model: PreTrainedModel) -> None:
    """Let no module look for padding in what it reads, for which the host would wait at every pass.

    Packed rows have none, and in padded ones it stands behind what is read of a row.
    """
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = lambda *args, **kwargs: None  # type: ignore[assignment]


def _switch_dropout_off(model: nn.Module) -> None:
    """The sampling policy must be the trained policy, so no dropout of the base is ever active."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # what goes to F.dropout
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
