"""Opening a base: loaded as a plan says, and held against stock transformers."""

from typing import TYPE_CHECKING, Any

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference.loaded import LoadedModel
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.progress import message
from lowmem_rlhf.recipe.schema import Recipe

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase


def open_base(recipe: Recipe, plan: Plan, loaded: LoadedModel | None = None) -> "SharedBase":
    """Return the base of a run, loaded as its plan says, with the policy's adapter on it.

    Args:
        loaded: a model that is loaded already, which then is the base.

    Raises:
        UserError: the model cannot be loaded or cannot be the base of a run.
        RunError: the device's memory ran out.
    """
    import torch

    from lowmem_rlhf.architecture.adapters import saved_adapter
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.engine.load import as_base
    from lowmem_rlhf.hardware.memory import is_out_of_memory

    check_computes(plan.device)
    saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision) if recipe.adapter else None
    adapter: dict[str, Any] = {
        "r": recipe.lora.rank,
        "lora_alpha": recipe.lora.alpha(recipe.lora.rank),
        "target_modules": saved.target_modules if saved else recipe.lora.target_modules,
        "use_rslora": saved.use_rslora if saved else False,
        "seed": recipe.training.seed,
    }
    try:
        if loaded is not None:
            return SharedBase(as_base(loaded.model), loaded.own_tokenizer(recipe), recipe.model, **adapter)
        return SharedBase.load(
            recipe.model,
            torch.device(plan.device.torch_device),
            plan.settings.quantization,
            plan.settings.compute_dtype,
            recipe.revision,
            recipe.trust_remote_code,
            plan.settings.offload_embeddings,
            **adapter,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"the device's memory ran out while loading {recipe.model}; close other programs that use it, or set "
            "hardware.quantization=nf4"
        ) from error


def held_against_stock(base: "SharedBase", recipe: Recipe, dequantize: bool) -> dict[str, Any]:
    """Hold a base against stock transformers, unless its type is one that the tests hold; return what plan.json says.

    Args:
        dequantize: how NF4 weights are held while sampling.

    Raises:
        UserError: it computes something else.
        RunError: the device's memory ran out.
    """
    from lowmem_rlhf.hardware.memory import is_out_of_memory
    from lowmem_rlhf.rollout.stock_check import TESTED_WITH, checked, is_tested

    if recipe.hardware.check == "auto" and is_tested(base.model):
        return {
            "said": f"{base.model.config.model_type} is held against transformers {TESTED_WITH} by this package's tests"
        }
    try:
        found = checked(base, dequantize)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"the device's memory ran out while {recipe.model} was held against stock transformers; close other "
            "programs that use it, or set hardware.quantization=nf4"
        ) from error
    message(found.said)
    return found.to_dict()


def check_computes(device: Device) -> None:
    import torch

    if device.torch_device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{device.name} is here, but this torch ({torch.__version__}) cannot use it; install a CUDA build of "
            "torch, or set hardware.device=cpu"
        )
