"""Opening a run for inference: its base in the precision it was trained in, with the trained adapter on it.

Torch is imported once what is wrong without it has been said.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lowmem_rlhf.algorithms.registry import find_spec
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.hardware.detect import detect, torch_reaches
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference.base import open_base
from lowmem_rlhf.inference.chat.talk import ChatOptions, Talk
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.start import paths_explained

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase

JUDGES = {"scores": "which gives scores", "classes": "which names classes"}  # by what an algorithm's model gives


@contextmanager
def conversation(opened: OpenRun, device: str | None, options: ChatOptions) -> Iterator[Talk]:
    """Open a run's policy (see `open_policy`) and yield a conversation with it.

    Raises:
        UserError: as `open_policy`; there is no such task; or the adapter that training began with is gone, and answers
            should be compared.
        RunError: the device's memory ran out.
    """
    opened.recipe.of_task(options.task)  # before weights are loaded
    base, recipe = open_policy(opened, device), opened.recipe
    if options.compare:
        with paths_explained(opened.directory.path, opened.written):
            opened.check_initial_adapter()
            add_initial_adapter(base, recipe)
    dequantize = opened.plan.settings.rollout_weights == "dequantized"
    with memory_explained(recipe), base.decoding(dequantize):
        yield Talk(base, recipe.of_task(options.task), options)


def open_policy(opened: OpenRun, device: str | None = None) -> "SharedBase":
    """Load the base of a run, in the precision of its plan, with the trained adapter as its policy.

    Args:
        device: as in a recipe; None: that of the run's recipe.

    Raises:
        UserError: the run has no such adapter or no policy, or this machine cannot compute what the run did.
        RunError: the device's memory ran out.
    """
    run = opened.directory
    spec = find_spec(run.recipe_values().get("algorithm"))
    if spec is not None and (gives := JUDGES.get(spec.output)):
        raise UserError(
            f"the run in {run.path} trained a {spec.title}, {gives} and no answers; give the run of a policy"
        )
    return open_trained(opened, device)


def open_trained(opened: OpenRun, device: str | None = None) -> "SharedBase":
    """Load the base of a run as `open_policy` does; a reward model's adapter and head take the policy's place.

    Raises:
        UserError, RunError: as `open_policy`; or the model is not the base that the run was trained on.
    """
    with paths_explained(opened.directory.path, opened.written), memory_explained(opened.recipe):
        return _open(opened, device)


def _open(opened: OpenRun, device: str | None) -> "SharedBase":
    folder, plan, recipe = opened.adapter_folder, opened.plan, opened.recipe
    hardware = detect(device or recipe.hardware.device)
    check_device(hardware, plan.settings.compute_dtype)
    from safetensors import SafetensorError

    from lowmem_rlhf.engine.roles import POLICY

    adapter = opened.check()
    base = open_base(
        recipe, opened.plan_on(hardware), adapter, where=f" on {hardware.name}", remedy="take --device cpu"
    )
    opened.check_base(warn=False)  # once more: now a Hub's model is here
    try:
        if recipe.spec.output == "scores":
            base.add_head(POLICY)
        base.load_role(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {folder} cannot be read ({error}); take another checkpoint with --step") from error
    return base


def add_initial_adapter(base: "SharedBase", recipe: Recipe) -> None:
    """Let the reference be what training began with, where that was an adapter.

    Raises:
        UserError: that adapter is gone or does not fit.
    """
    if recipe.adapter:
        from lowmem_rlhf.architecture.adapters import saved_adapter

        base.refer_to(saved_adapter(recipe.adapter, recipe.model, recipe.revision))


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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"the device's memory ran out with {recipe.model}; close other programs that use it, lower --max-tokens, "
            "or take --device cpu"
        ) from error
