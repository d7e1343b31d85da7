"""Opening a base: loaded as a plan says, and held against stock transformers."""

from typing import TYPE_CHECKING, Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.detect import torch_reaches
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference.loaded import LoadedModel
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.processes.world import begun
from lowmem_rlhf.progress import message
from lowmem_rlhf.recipe.schema import Recipe

if TYPE_CHECKING:
    from lowmem_rlhf.architecture.adapters import SavedAdapter
    from lowmem_rlhf.engine.base import SharedBase


def open_base(
    recipe: Recipe,
    plan: Plan,
    adapter: "SavedAdapter | None" = None,
    loaded: LoadedModel | None = None,
    where: str = "",
    remedy: str = "",
) -> "SharedBase":
    """Load a base on the plan's device in the plan's precision, with an untrained policy adapter on it.

    Args:
        recipe: with the rank of `lora` known.
        adapter: whose shape the policy's adapter gets; None: the one that training begins with, or the recipe's `lora`.
        loaded: a model that is loaded already, which then is the base.
        where: what the message about loading ends with.
        remedy: what to do where memory runs out; absent: what the plan knows.

    Raises:
        UserError: torch does not reach the device, the model cannot be loaded, or an adapter does not suit it.
        RunError: the device's memory ran out.
    """
    import torch

    from lowmem_rlhf.architecture.adapters import saved_adapter
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.engine.load import as_base
    from lowmem_rlhf.engine.weights import broken_weights
    from lowmem_rlhf.hardware.memory import free_bytes
    from lowmem_rlhf.training.memory import opening_ladder

    check_computes(plan.device)
    if adapter is None and recipe.adapter:
        adapter = saved_adapter(recipe.adapter, recipe.model, recipe.revision)
    shape = {**_shape(recipe, adapter), "seed": recipe.training.seed}
    message(f"loading {recipe.model}{where}" if loaded is None else f"{recipe.model} is loaded already")

    experts = plan.memory.get("host", {}).get("experts", 0)
    if loaded is None and experts and experts > (free := free_bytes(torch.device("cpu"))):
        raise UserError(
            f"hardware.offload_experts: the experts take {experts / 2**30:.1f} GiB of host memory and "
            f"{free / 2**30:.1f} GiB are free; close other programs, or take a smaller model"
        )

    shard = recipe.hardware.shard_base and begun().several

    def load() -> SharedBase:
        return SharedBase.load(
            recipe.model,
            torch.device(plan.device.torch_device),
            plan.settings.quantization,
            plan.settings.compute_dtype,
            recipe.revision,
            recipe.trust_remote_code,
            plan.settings.offload_embeddings,
            plan.settings.offload_experts,
            plan.settings.rollout_weights == "joined" and not shard,
            shard,
            recipe.hardware.offload_base,
            **shape,
        )

    if loaded is None:
        ladder = opening_ladder(recipe, plan)
        if remedy:
            ladder.explain = lambda phase: f"close other programs that use it, or {remedy}"
        base = ladder.survive("loading", load, message, sizes=False)
        if getattr(base.model, "is_tower", False):
            message(f"of {recipe.model} the text tower alone is loaded; a merge writes the whole model back")
    else:
        loaded.check_weights(recipe)
        if unusable := broken_weights(loaded.model):
            raise UserError(f"model: the object has {unusable}: nothing can be computed with it; load it again")
        base = SharedBase(as_base(loaded.model), loaded.own_tokenizer(recipe), recipe.model, **shape)
        if plan.settings.rollout_weights == "joined":
            base.join_weights()
    base.chat_template_kwargs = recipe.data.chat_template_kwargs
    return base


def _shape(recipe: Recipe, adapter: "SavedAdapter | None") -> dict[str, Any]:
    """Return what `SharedBase.load` is told of the policy's adapter."""
    return (recipe.lora.shape() if adapter is None else adapter.shape).values


def held_against_stock(base: "SharedBase", recipe: Recipe, dequantize: bool) -> dict[str, Any]:
    """Hold a base against stock transformers, unless its type is one that the tests hold; return what plan.json says.

    Args:
        dequantize: how NF4 weights are held while sampling.

    Raises:
        UserError: it computes something else.
        RunError: the device's memory ran out.
    """
    from lowmem_rlhf.rollout.stock_check import TESTED_WITH, checked, is_tested

    if recipe.hardware.check == "auto" and is_tested(base.model):
        return {
            "said": f"{base.model.config.model_type} is held against transformers {TESTED_WITH} by this package's tests"
        }
    comparison = checked(base, dequantize)
    message(comparison.said)
    return comparison.to_dict()


def check_computes(device: Device) -> None:
    import torch

    if not torch_reaches(device.torch_device):
        raise UserError(
            f"{device.name} is here, but this torch ({torch.__version__}) cannot use it; install a CUDA build of "
            "torch, or set hardware.device=cpu"
        )
