"""From a loaded base to its trainer, with the roles that a recipe needs."""

from collections.abc import Sequence

from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.following import mix_into_reference
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.lora import SharedLoraLinear
from lowmem_rlhf.engine.roles import CRITIC, INITIAL, POLICY, REFERENCE, REWARD
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.shapes import starts_from_adapter
from lowmem_rlhf.recipe.lora_shape import LoraShape
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import REWARD_ADAPTER
from lowmem_rlhf.rewards.adapter import AdapterReward
from lowmem_rlhf.rewards.loading import Reward


def add_roles(base: SharedBase, recipe: Recipe, rewards: Sequence[Reward]) -> None:
    """Put on the base what a recipe needs besides the policy: its start, a critic, reward adapters; all or none.

    Raises:
        UserError: an adapter does not fit the base.
    """
    before = dict(base.roles)
    try:
        if recipe.adapter:
            saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision)
            if starts_from_adapter(recipe):
                base.start_from(saved)
            else:
                base.load_adapter(saved.folder)
        bind_rewards(base, rewards)
        if kind := recipe.spec.critic(recipe):
            _add_critic(base, recipe, kind)
        if follows := recipe.spec.follows(recipe):
            base.add_following(_shape(recipe), follows.rank)
            if recipe.adapter:  # which the policy holds by now
                mix_into_reference(base, alpha=1.0, mixed=0)
    except BaseException:  # they are added all or none, so that they can be added once more
        for role in {*(base.roles.keys() - before.keys()), *([REFERENCE] if base.follows else [])}:
            base.remove_role(role)
        base.roles.update(before)
        raise


def bind_rewards(base: SharedBase, rewards: Sequence[Reward]) -> None:
    """Put the reward adapters on the base.

    Raises:
        UserError: an adapter does not fit the base.
    """
    for number, one in enumerate(_adapters(rewards)):
        one.bind(base, f"{REWARD}_{number}" if number else REWARD)
        _check_layers(base, one)


def share_ladder(rewards: Sequence[Reward], ladder: Ladder) -> None:
    """Let the passes of the reward adapters be cut as all passes over the base are."""
    for one in _adapters(rewards):
        one.ladder = ladder


def _adapters(rewards: Sequence[Reward]) -> list[AdapterReward]:
    return [reward.function for reward in rewards if isinstance(reward.function, AdapterReward)]


def _check_layers(base: SharedBase, reward: AdapterReward) -> None:
    """The layers of a base carry the adapters of all its roles."""
    layers = {name: m for name, m in base.model.named_modules() if isinstance(m, SharedLoraLinear)}
    other = [name for name, layer in layers.items() if (POLICY in layer.lora_A) != (reward.role in layer.lora_A)]
    if other:
        names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in other}))
        its = reward.saved.shape.values
        keys = ("target_modules", *([key] if (key := "layers_to_transform") in its else []))
        raise UserError(
            f"rewards: {reward.name}: the adapter in {reward.saved.folder} and the policy's are not beside the same "
            f"layers ({names}); set {' and '.join(f'lora.{key} to {its[key]}' for key in keys)}"
        )


def _add_critic(base: SharedBase, recipe: Recipe, kind: str) -> None:
    """Add the critic: its own adapter above the start, one that begins as the reward model, or a head on the policy."""
    if kind == "policy":
        base.roles[CRITIC] = base.roles[POLICY]
        base.add_head(CRITIC, bias=True)
        return
    if kind == "reward":
        adapter = next(r.options["adapter"] for r in recipe.rewards if r.function == REWARD_ADAPTER)
        saved = saved_adapter(adapter, recipe.model, recipe.revision)
        base.add_role(CRITIC, **saved.shape.values)
        base.load_adapter(saved.folder, CRITIC)
        base.add_head(CRITIC)
        base.load_head(saved.folder, CRITIC)
        return
    start = INITIAL if INITIAL in base.roles else ""
    base.add_role(CRITIC, **_shape(recipe).values, seed=recipe.training.seed + 1, below=start)
    base.add_head(CRITIC, bias=True)


def _shape(recipe: Recipe) -> LoraShape:
    """Return the shape of the policy's adapter."""
    if recipe.adapter:
        return saved_adapter(recipe.adapter, recipe.model, recipe.revision).shape
    return recipe.lora.shape()
