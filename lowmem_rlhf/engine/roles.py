"""The roles on a shared base: which adapters are active in each, their heads, and their files.

``policy`` is the base with its adapter, ``reference`` the same base with none, with the frozen adapter that the policy
started from, or with one of its own that follows the policy; ``critic`` and ``reward`` are adapters of their own with a
head of one output. A role is entered with a context manager and costs nothing: the layers look up which adapters are
active.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem_rlhf.architecture.adapters import HEAD, WEIGHTS, SavedAdapter
from lowmem_rlhf.architecture.families.wrappers import text_key
from lowmem_rlhf.engine.logprobs import Head
from lowmem_rlhf.engine.lora import ActiveAdapters, SharedLoraLinear, lora_config
from lowmem_rlhf.engine.whole import differing_tensors, few
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.lora_shape import LoraShape

POLICY, REFERENCE, INITIAL, CRITIC, REWARD = "policy", "reference", "initial", "critic", "reward"


class Roles(nn.Module):
    """What `SharedBase` has to do with roles.

    Attributes:
        roles: for each role the adapters that are active in it.
        heads: of roles that give one number a position, fp32.
    """

    peft: Any
    model: Any
    model_id: str
    head: Head
    device: torch.device
    dtype: torch.dtype
    active: ActiveAdapters
    roles: dict[str, tuple[str, ...]]
    heads: nn.ModuleDict

    def adapter_layers(self) -> Iterator[SharedLoraLinear]:
        """Yield every layer that carries adapters."""
        return (m for m in self.peft.modules() if isinstance(m, SharedLoraLinear))

    @contextmanager
    def role(self, name: str) -> Iterator["Roles"]:
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
        below: str = "",
        **more: Any,
    ) -> None:
        """Add a role with an adapter of its own, which starts at zero and trains.

        Args:
            role: its name, and the adapter's.
            r, lora_alpha, target_modules, seed, more: as for the policy's adapter.
            below: a frozen adapter that is active with it.
        """
        config = lora_config(LoraShape.of(r, lora_alpha, target_modules, **more), self.model_id, self.model)
        trains = {name: p.requires_grad for name, p in self.peft.named_parameters()}
        try:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.peft.add_adapter(role, config)
        except BaseException:
            self.remove_role(role)
            raise
        finally:
            for name, p in self.peft.named_parameters():
                # peft switches all adapters but its active one off, and renames weights of layers that had none yet
                p.requires_grad_(trains.get(name, f".{role}." in name))
        self.roles[role] = (below, role) if below else (role,)

    def remove_role(self, role: str) -> None:
        """Remove a role with its adapter and head, also one that was added in part only."""
        for layer in self.adapter_layers():
            for name in (*layer.adapter_layer_names, *layer.other_param_names):
                held = getattr(layer, name, None)
                if isinstance(held, dict | nn.ModuleDict | nn.ParameterDict) and role in held:
                    del held[role]
        for held in (self.peft.peft_config, self.roles, self.heads):
            if role in held:
                del held[role]
        self.adapters_changed()

    def add_saved_role(self, role: str, saved: SavedAdapter) -> None:
        """Add a role with a frozen adapter, and its head if it has one, from disk.

        Raises:
            UserError: it does not fit this base.
        """
        try:
            self.add_role(role, **saved.shape.values)
            self.load_adapter(saved.folder, role)
            if saved.head is not None:
                self.add_head(role)
                self.load_head(saved.folder, role)
            self.freeze(role)
        except ValueError as error:  # peft finds no such layers, or some that take no adapter
            self.remove_role(role)
            raise UserError(
                f"the adapter in {saved.folder} does not fit this base, whose layers are not those that it names "
                f"(target_modules {saved.shape.values['target_modules']!r}); give the model that it was trained on"
            ) from error
        except BaseException:
            self.remove_role(role)
            raise

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
        self.add_saved_role(INITIAL, saved)
        self.roles[REFERENCE] = (INITIAL,)

    @property
    def follows(self) -> bool:
        """Whether the reference has an adapter of its own, which follows the policy."""
        return REFERENCE in self.peft.peft_config

    @torch.no_grad()
    def add_following(self, shape: LoraShape, times: int) -> None:
        """Give the reference a frozen adapter of its own, fp32, that starts at zero; see `engine.following`.

        Args:
            shape: of the policy's adapter.
            times: its rank as a multiple of the policy's.
        """
        self.add_role(REFERENCE, **shape.widened(times).values)
        for layer in self.adapter_layers():
            for one in layer.masters(REFERENCE):
                one.zero_().requires_grad_(False)
        self.adapters_changed()

    def following(self) -> dict[str, nn.Parameter]:
        """Return the parameters of a reference that follows the policy, by name: they change and have no gradient."""
        return {name: p for name, p in self.peft.named_parameters() if is_following(name)}

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

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by name.

        Raises:
            RuntimeError: nothing trains.
        """
        parameters = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}
        parameters |= {f"heads.{name}": p for name, p in self.heads.named_parameters() if p.requires_grad}
        if not parameters:
            raise RuntimeError("no parameter of the shared base is trainable: nothing would be learned")
        return parameters

    def own_trainable(self, role: str) -> list[str]:
        """Return the names, of `trainable`, of what is a role's own: its adapter (``.lora_A.ROLE.``) and its head."""
        return [name for name in self.trainable() if f".{role}." in name]

    def adapters_changed(self) -> None:
        """To be called after every change of adapter weights: the 16-bit copies are made anew."""
        self.active.version += 1

    def adapter_state(
        self, role: str = POLICY, parameters: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the adapter's weights under peft's names, on the CPU.

        Args:
            parameters: by the names of `trainable`, to be taken in place of the base's own.
        """
        state = get_peft_model_state_dict(
            self.peft, state_dict=parameters, adapter_name=role, save_embedding_layers=False
        )
        return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}

    def save_adapter(
        self, folder: Path, role: str = POLICY, parameters: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write the adapter in peft's format (adapter_model.safetensors, adapter_config.json), and a head beside it.

        Args:
            parameters: see `adapter_state`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if role in self.heads:
            live = {f"heads.{role}.{name}": p for name, p in self.heads[role].named_parameters()}
            state = {name.rpartition(".")[2]: (parameters or live)[name] for name in live}
            state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
            save_file(state, folder / HEAD, metadata={"format": "pt"})
        if role not in self.peft.peft_config:
            return  # a head on another role's adapter
        save_file(self.adapter_state(role, parameters), folder / WEIGHTS, metadata={"format": "pt"})
        config = self.peft.peft_config[role]
        training, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(folder))
        config.inference_mode = training

    def load_adapter(self, folder: Path, role: str = POLICY) -> None:
        """Put saved weights into the adapter of this role.

        Raises:
            UserError: the file is not of this base and adapter shape.
        """
        state = {text_key(name): tensor for name, tensor in load_file(folder / WEIGHTS, device="cpu").items()}
        have = self.adapter_state(role)
        if misfit := differing_tensors(state, have):
            raise UserError(f"the adapter in {folder} does not fit this base: its files {misfit}")
        _check_numbers("adapter", folder, state)
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
        if misfit := differing_tensors(state, have):
            raise UserError(f"the head in {folder} does not fit this base: its files {misfit}")
        _check_numbers("head", folder, state)
        with torch.no_grad():
            for name, p in have.items():
                p.copy_(state[name])


def is_following(name: str) -> bool:
    """Whether a parameter, by its name, is of a reference that follows the policy: no other adapter is called so."""
    return f".lora_A.{REFERENCE}." in name or f".lora_B.{REFERENCE}." in name


def _check_numbers(what: str, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Check that the tensors of a file are finite numbers.

    Raises:
        UserError: one is not.
    """
    broken = {name for name, tensor in state.items() if not bool(tensor.isfinite().all())}
    if broken:
        raise UserError(
            f"the {what} in {folder} has values that are not finite in {few(broken)}: nothing can be computed with it; "
            "fetch it again, or take an earlier checkpoint of the run that it is from"
        )
