"""Opening a base: loaded as a plan says, and held against stock transformers."""

import sys
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.detect import torch_reaches
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe.schema import Recipe

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase


def open_base(recipe: Recipe, plan: Plan) -> "SharedBase":
    import torch

    from lowmem_rlhf.architecture.adapters import saved_adapter
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.hardware.memory import is_out_of_memory

    check_computes(plan.device)
    saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision) if recipe.adapter else None
    print(f"loading {recipe.model}", flush=True)
    try:
        return SharedBase.load(
            recipe.model,
            torch.device(plan.device.torch_device),
            plan.settings.quantization,
            plan.settings.compute_dtype,
            recipe.revision,
            recipe.trust_remote_code,
            plan.settings.offload_embeddings,
            r=recipe.lora.rank,
            lora_alpha=recipe.lora.alpha(recipe.lora.rank),
            target_modules=saved.target_modules if saved else recipe.lora.target_modules,
            use_rslora=saved.use_rslora if saved else False,
            seed=recipe.training.seed,
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
    print(found.said, file=sys.stderr, flush=True)
    return found.to_dict()


def check_computes(device: Device) -> None:
    import torch

    if not torch_reaches(device.torch_device):
        raise UserError(
            f"{device.name} is here, but this torch ({torch.__version__}) cannot use it; install a CUDA build of "
            "torch, or set hardware.device=cpu"
        )
