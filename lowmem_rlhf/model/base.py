"""SharedBase: the base model once, and roles as states of it.

``policy`` is the base with its adapter, ``reference`` the same base with none, or with the frozen adapter that the
policy started from; ``critic`` and ``reward`` are adapters of their own with a head of one output. A role is entered
with a context manager and costs nothing: the layers look up which adapters are active.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.model.adapters import HEAD, WEIGHTS, SavedAdapter, saved_adapter
from lowmem_rlhf.model.attention import NAME as ATTENTION
from lowmem_rlhf.model.attention import AttentionContext, PackedContext
from lowmem_rlhf.model.decoding import lend_for_decoding
from lowmem_rlhf.model.fused import fuse
from lowmem_rlhf.model.lean import lean_decoder
from lowmem_rlhf.model.load import load_base
from lowmem_rlhf.model.logprobs import head_of
from lowmem_rlhf.model.lora import ActiveAdapters, SharedLoraLinear, lora_config
from lowmem_rlhf.model.packing import Group, PackedBatch
from lowmem_rlhf.model.padded import PACKED, PADDED, cache_follows_rows, forward_names, padded_modes, why_not_packed
from lowmem_rlhf.model.recompute import recompute_layers
from lowmem_rlhf.model.siblings import Siblings

POLICY, REFERENCE, START, CRITIC, REWARD = "policy", "reference", "start", "critic", "reward"


class SharedBase(nn.Module):
    """One frozen base and the adapters of all roles.

    Args:
        model: a loaded, frozen transformers causal LM; its linear layers get the policy adapter.
        tokenizer: its tokenizer.
        model_id: the name that goes into the adapter's file.
        r, lora_alpha, target_modules, use_rslora: the policy adapter, as in peft.
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
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self.why_padded = why_not_packed(model)
        self.packable = not self.why_padded
        self.layout = PACKED if self.packable else PADDED
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[assignment]
        self.tokenizer = tokenizer
        self.model_id = model_id
        self.active = ActiveAdapters()
        self.roles: dict[str, tuple[str, ...]] = {REFERENCE: (), POLICY: (POLICY,)}
        self.heads = nn.ModuleDict()  # of roles that give one number a position, fp32
        if self.packable:
            model.set_attn_implementation(ATTENTION)
        model.name_or_path = model_id  # peft puts it into the adapter's file
        config = lora_config(r, lora_alpha, target_modules, model_id, model.config.model_type, use_rslora)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.peft = get_peft_model(model, config, adapter_name=POLICY)
            except ValueError as error:
                raise UserError(f"lora.target_modules={target_modules!r} does not fit {model_id!r}: {error}") from error
        for layer in self.adapter_layers():
            layer.active = self.active
        if any(not isinstance(m, SharedLoraLinear) for m in self.peft.modules() if isinstance(m, LoraLayer)) or (
            isinstance(model.get_output_embeddings(), SharedLoraLinear)
        ):
            raise UserError(
                f"lora.target_modules={target_modules!r} names an embedding or the output head of {model_id!r}; only "
                "linear layers inside the model take adapters: give their names, or all-linear"
            )
        self.model: PreTrainedModel = self.peft.get_base_model()  # type: ignore[assignment]
        _switch_dropout_off(self.model)
        self.model.train()  # checkpointing only works in this mode, and in the other bitsandbytes repacks its weights
        fuse(self.model, self.dtype)
        self.decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        self.head = head_of(self.model)
        self._takes_positions, self._cache_name = forward_names(self.decoder)
        self._recomputable = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.keeps_cache = False  # one that `stock_states` can continue
        if not self.packable:
            padded_modes(self.model)
            self._check_head(model_id)
            self.keeps_cache = bool(self._cache_name) and cache_follows_rows(self)
        self.siblings = self._find_siblings()
        self.lean = lean_decoder(self) if self.packable else None

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
        """Be ``policy``, ``reference`` or another role that was added, inside the block.

        Raises:
            KeyError: there is no such role.
        """
        before, self.active.names = self.active.names, self.roles[name]
        try:
            yield self
        finally:
            self.active.names = before

    def add_role(
        self,
        role: str,
        r: int,
        lora_alpha: float,
        target_modules: str | list[str],
        seed: int = 0,
        use_rslora: bool = False,
        below: str = "",
    ) -> None:
        """Add a role with an adapter of its own, which starts at zero and trains.

        Args:
            role: its name, and the adapter's.
            r, lora_alpha, target_modules, seed, use_rslora: as for the policy's adapter.
            below: a frozen adapter that is active with it.
        """
        model = self.model
        config = lora_config(r, lora_alpha, target_modules, self.model_id, model.config.model_type, use_rslora)
        trains = {name: p.requires_grad for name, p in self.peft.named_parameters()}
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.peft.add_adapter(role, config)
        for name, p in self.peft.named_parameters():
            p.requires_grad_(trains.get(name, True))  # peft switches all adapters but its active one off
        self.roles[role] = (below, role) if below else (role,)

    def add_saved_role(self, role: str, saved: SavedAdapter) -> None:
        """Add a role with a frozen adapter, and its head if it has one, from disk.

        Raises:
            UserError: it does not fit this base.
        """
        self.add_role(role, saved.r, saved.lora_alpha, saved.target_modules, use_rslora=saved.use_rslora)
        self.load_adapter(saved.folder, role)
        if saved.head is not None:
            self.add_head(role)
            self.load_head(saved.folder, role)
        self.freeze(role)

    def start_from(self, saved: SavedAdapter) -> None:
        """Let the policy go on from a saved adapter; the reference is then the base with that adapter, frozen.

        Raises:
            UserError: it does not fit this base and the policy's adapter.
        """
        self.load_adapter(saved.folder, POLICY)
        self.refer_to(saved)

    def refer_to(self, saved: SavedAdapter) -> None:
        """Let the reference be the base with this adapter, frozen.

        Raises:
            UserError: it does not fit this base.
        """
        self.add_saved_role(START, saved)
        self.roles[REFERENCE] = (START,)

    def add_start(self, folder: Path) -> None:
        """Let the reference be the base with the adapter in this folder (see `refer_to`)."""
        self.refer_to(saved_adapter(str(folder), self.model_id))

    @torch.no_grad()
    def freeze(self, role: str) -> None:
        """Let nothing of a role's adapter and head train, and keep only the numbers that it multiplies with.

        They are A and the scaled B in the compute dtype: half of the memory of fp32 masters goes, no result changes.
        """
        for layer in self.adapter_layers():
            a, b = layer.masters(role)
            a.data, b.data = a.to(self.dtype), b.mul(layer.scaling[role]).to(self.dtype)
            layer.scaling[role] = 1.0
            a.requires_grad_(False)
            b.requires_grad_(False)
        self.adapters_changed()
        if role in self.heads:
            self.heads[role].requires_grad_(False)

    def add_head(self, role: str, bias: bool = False, std: float = 0.0, seed: int = 0) -> None:
        """Give a role a head of one output (a value, a score), fp32.

        Args:
            bias: whether it adds a number to every output; it starts at 0.
            std: of its initial weights; 0: they are zero, so that the head says 0.
            seed: of its initial weights.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        weight = torch.empty((1, self.hidden_size), dtype=torch.float32, device="cpu").normal_(generator=generator)
        head = nn.Linear(self.hidden_size, 1, bias=bias, dtype=torch.float32, device=self.device)
        with torch.no_grad():
            head.weight.copy_(weight * std)
            if bias:
                head.bias.zero_()
        self.heads[role] = head

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden states, H."""
        return int(self.head.module.in_features)  # type: ignore[arg-type]

    def outputs(self, role: str, states: torch.Tensor) -> torch.Tensor:
        """Return the numbers (S,) fp32 that a role's head gives for hidden states (S, H)."""
        return self.heads[role](states.float()).squeeze(-1)

    @torch.no_grad()
    def _find_siblings(self) -> list[Siblings]:
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
        found = [Siblings(group) for group in groups]
        for siblings in found:
            for layer in siblings.layers:
                layer.siblings = siblings
        return found

    def _check_called(self, called: set[SharedLoraLinear]) -> None:
        """An adapter that the model's forward passes by would learn nothing. Of experts, one token meets but a few."""
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, SharedLoraLinear)}
        idle = sorted({n.rsplit(".", 1)[-1] for n, m in layers.items() if m not in called and "expert" not in n})
        if idle:
            raise UserError(
                f"{type(self.model).__name__} multiplies with the weights of {', '.join(idle)} directly, so adapters "
                "there have no effect; name the other layers in lora.target_modules"
            )

    @contextmanager
    def decoding(self, dequantize: bool) -> Iterator["SharedBase"]:
        """Hold NF4 weights inside the block in a form for decoding (see `lend_for_decoding`)."""
        try:
            for siblings in self.siblings:
                lend_for_decoding(siblings, self.dtype, dequantize)
            yield self
        finally:
            for siblings in self.siblings:
                siblings.lend(None)

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
        given: dict[str, Any] = {"position_ids": position_ids} if self._takes_positions else {}
        if cache is not None:
            given[self._cache_name] = cache
        recomputing = [layer for layer in self._recomputable if layer.gradient_checkpointing and cache is not None]
        try:
            for layer in recomputing:  # such a layer would leave the cache out
                layer.gradient_checkpointing = False
            out = self.decoder(input_ids=input_ids, use_cache=cache is not None, return_dict=True, **given)
        finally:
            for layer in recomputing:
                layer.gradient_checkpointing = True
        return out.last_hidden_state.to(self.dtype)  # Mamba's is in fp32

    @torch.no_grad()
    def _check_head(self, model_id: str) -> None:
        """Try out that an architecture we know nothing of does no more for its logits than our `Head` does."""
        token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        ours = self.head.logits(self.stock_states(token, token)[0]).float()
        stock = self.model(input_ids=token, use_cache=False).logits[0].float()
        close = max(1e-4, 4 * torch.finfo(self.dtype).eps) * float(stock.abs().max())
        if not torch.allclose(ours, stock, rtol=0, atol=close):
            raise UserError(
                f"model {model_id!r} ({type(self.model).__name__}) computes more on the way to its logits than its "
                "output head and cannot be trained; take another model"
            )

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
        out = self.decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True, lowmem_context=context
        )
        return out.last_hidden_state[0]

    def next_hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """Return what `hidden_states` does, for a decoding pass: few rows, no gradient."""
        run = self.hidden_states if self.lean is None else self.lean.hidden_states
        return run(input_ids, position_ids, context)

    def set_gradient_checkpointing(self, layers: bool | int, offload: bool = False) -> None:
        """Recompute all layers, none or the first so many in the backward pass (see `recompute_layers`).

        Args:
            offload: their inputs wait in host memory; on a CPU this changes nothing.

        Raises:
            UserError: the model has fewer layers.
        """
        recompute_layers(self.model, layers, offload)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name.

        Raises:
            RuntimeError: nothing trains.
        """
        found = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}
        found |= {f"heads.{name}": p for name, p in self.heads.named_parameters() if p.requires_grad}
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
        """Write the adapter in peft's format (adapter_model.safetensors, adapter_config.json), and a head beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        if role in self.heads:
            state = {name: p.detach().to("cpu").contiguous() for name, p in self.heads[role].named_parameters()}
            save_file(state, folder / HEAD, metadata={"format": "pt"})
        if role not in self.peft.peft_config:
            return  # a head on another role's adapter
        save_file(self.adapter_state(role), folder / WEIGHTS, metadata={"format": "pt"})
        config = self.peft.peft_config[role]
        training, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = training

    def load_adapter(self, folder: Path, role: str = POLICY) -> None:
        """Put saved weights into the adapter of this role.

        Raises:
            UserError: the file is not of this base and adapter shape.
        """
        state = load_file(folder / WEIGHTS, device="cpu")
        have = self.adapter_state(role)
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in have.items()}:
            raise UserError(f"the adapter in {folder} does not fit this base: its tensors have other names or shapes")
        with torch.no_grad():
            set_peft_model_state_dict(self.peft, state, adapter_name=role)
        self.adapters_changed()

    def load_role(self, folder: Path, role: str = POLICY) -> None:
        """Put back what `save_adapter` wrote of a role.

        Raises:
            UserError: see `load_adapter` and `load_head`.
        """
        if role in self.peft.peft_config:
            self.load_adapter(folder, role)
        if role in self.heads:
            self.load_head(folder, role)

    def load_head(self, folder: Path, role: str) -> None:
        """Put saved weights into the head of this role.

        Raises:
            UserError: there are none, or they are of another width.
        """
        if not (folder / HEAD).is_file():
            raise UserError(
                f"{folder} holds an adapter without a head ({HEAD}): it gives no score; take a reward model's"
            )
        state, have = load_file(folder / HEAD, device="cpu"), dict(self.heads[role].named_parameters())
        if {n: t.shape for n, t in state.items()} != {n: p.shape for n, p in have.items()}:
            raise UserError(f"the head in {folder} does not fit this base: its tensors have other names or shapes")
        with torch.no_grad():
            for name, p in have.items():
                p.copy_(state[name])


def _switch_dropout_off(model: nn.Module) -> None:
    """The sampling policy must be the trained policy, so no dropout of the base is ever active."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # what goes to F.dropout
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
