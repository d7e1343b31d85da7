"""Opening a run for inference: its base in the precision it was trained in, with the trained adapter on it.

Torch is imported once what is wrong without it has been said.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.data.provenance import check_base, check_learned
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.detect import detect, torch_reaches
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference.chat.talk import Talk, Wish
from lowmem_rlhf.quiet import hush
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import ADAPTER, RunDirectory
from lowmem_rlhf.run.start import located, paths_explained

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase

logger = logging.getLogger(__name__)

JUDGES = {"reward_model": "a reward model, which gives scores", "classifier": "a classifier, which names classes"}


@contextmanager
def conversation(run: RunDirectory, step: int | None, device: str | None, wish: Wish) -> Iterator[Talk]:
    """Open a run's policy (see `open_policy`) and yield a conversation with it.

    Raises:
        UserError: as `open_policy`; or the adapter that training began with is gone, and answers should be compared.
        RunError: the device's memory ran out.
    """
    base, recipe = open_policy(run, step, device)
    if wish.compare:
        with paths_explained(run.path, run.recipe()):
            check_learned(run, recipe)
            add_start(base, recipe)
    with memory_explained(recipe), base.decoding(plan_settings(run).get("rollout_weights") == "dequantized"):
        yield Talk(base, recipe, wish)


def open_policy(run: RunDirectory, step: int | None = None, device: str | None = None) -> tuple["SharedBase", Recipe]:
    """Load the base of a run, in the precision of its plan, with the trained adapter as its policy.

    Args:
        step: of a checkpoint; None: the finished adapter.
        device: as in a recipe; None: that of the run's recipe.

    Raises:
        UserError: the run has no such adapter or no policy, or this machine cannot compute what the run did.
        RunError: the device's memory ran out.
    """
    kind = JUDGES.get(str(run.recipe_values().get("algorithm")))
    if kind:
        raise UserError(f"the run in {run.path} trained {kind} and no answers; give the run of a policy")
    return open_trained(run, step, device)


def open_trained(run: RunDirectory, step: int | None = None, device: str | None = None) -> tuple["SharedBase", Recipe]:
    """Load the base of a run as `open_policy` does; a reward model's adapter and head take the policy's place.

    Raises:
        UserError, RunError: as `open_policy`; or the model is not the base that the run was trained on.
    """
    written = run.recipe()
    recipe = located(written, run.path)
    with paths_explained(run.path, written):
        return _open(run, recipe, step, device), recipe


def _open(run: RunDirectory, recipe: Recipe, step: int | None, device: str | None) -> "SharedBase":
    folder, settings = policy_folder(run, step), plan_settings(run)
    hush()
    found = detect(device or recipe.hardware.device)
    check_device(found, settings["compute_dtype"])

    import torch
    from safetensors import SafetensorError

    from lowmem_rlhf.architecture.adapters import saved_adapter
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.engine.roles import POLICY

    say_base(run, recipe)
    saved = saved_adapter(str(folder), recipe.model, recipe.revision)
    print(f"loading {recipe.model} on {found.name}", file=sys.stderr, flush=True)
    with memory_explained(recipe):
        base = SharedBase.load(
            recipe.model,
            torch.device(found.torch_device),
            settings["quantization"],
            settings["compute_dtype"],
            recipe.revision,
            recipe.trust_remote_code,
            bool(settings.get("offload_embeddings")) and not found.on_cpu,
            r=saved.r,
            lora_alpha=saved.lora_alpha,
            target_modules=saved.target_modules,
            use_rslora=saved.use_rslora,
        )
    base.chat_template_kwargs = recipe.data.chat_template_kwargs
    check_base(run, recipe)  # once more: now a Hub's model is here
    try:
        if recipe.algorithm == "reward_model":
            base.add_head(POLICY)
        base.load_role(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {folder} cannot be read ({error}); take another checkpoint with --step") from error
    return base


def say_base(run: RunDirectory, recipe: Recipe) -> None:
    """Check that the recipe's model is the run's base (see `check_base`), and say what is to be said of it.

    Raises:
        UserError: it is another one.
    """
    if said := check_base(run, recipe):
        logger.warning(said)


def add_start(base: "SharedBase", recipe: Recipe) -> None:
    """Let the reference be what training began with, where that was an adapter.

    Raises:
        UserError: that adapter is gone or does not fit.
    """
    if recipe.adapter:
        from lowmem_rlhf.architecture.adapters import saved_adapter

        base.refer_to(saved_adapter(recipe.adapter, recipe.model, recipe.revision))


def policy_folder(run: RunDirectory, step: int | None) -> Path:
    """Return the folder of the run's finished adapter, or of the checkpoint of a step.

    Raises:
        UserError: it is not there; the message names the steps there are.
    """
    steps = dict(run.checkpoints())
    there = ", ".join(map(str, steps))
    if step is not None:
        if step not in steps:
            others = f"there is {there}" if steps else "there is none; leave --step out"
            raise UserError(f"--step {step}: the run in {run.path} holds no checkpoint of that step; {others}")
        return steps[step]
    if (run.path / ADAPTER).is_dir():
        return run.path / ADAPTER
    now = f", or take a checkpoint with --step ({there})" if steps else ""
    raise UserError(
        f"the run in {run.path} has no adapter yet; let it finish (the `train` that began it, with --output {run.path} "
        f"--resume, goes on){now}"
    )


def plan_settings(run: RunDirectory) -> dict[str, Any]:
    """Return the settings of a run's plan.

    Raises:
        UserError: the run has none.
    """
    settings = run.plan().get("settings")
    if not isinstance(settings, dict) or not {"quantization", "compute_dtype"} <= settings.keys():
        raise UserError(f"{run.path} holds no plan.json with the run's settings, so its precision is not known")
    return settings


def check_device(device: Device, dtype: str) -> None:
    """Check that torch reaches the device, and that the device computes in the run's dtype.

    Raises:
        UserError: it does not.
    """
    import torch

    if not torch_reaches(device.torch_device):
        raise UserError(
            f"{device.name} is here, but this torch ({torch.__version__}) cannot use it; take --device cpu, or install "
            "a CUDA build of torch"
        )
    if dtype == "bfloat16" and not device.bf16:
        raise UserError(f"the run computes in bfloat16, which {device.name} does not; take --device cpu")


@contextmanager
def memory_explained(recipe: Recipe) -> Iterator[None]:
    from lowmem_rlhf.hardware.memory import is_out_of_memory

    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"the device's memory ran out with {recipe.model}; close other programs that use it, lower --max-tokens, "
            "or take --device cpu"
        ) from error
