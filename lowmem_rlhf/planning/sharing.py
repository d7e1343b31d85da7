"""What holds of a base whose layers processes share out among them. No torch."""

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.inputs import PINNED, PlanInputs, gib
from lowmem_rlhf.planning.memory.resident import Memory, Settings


def check_sharing(inputs: PlanInputs) -> None:
    """Check that nothing is pinned that a shared base cannot have.

    Raises:
        UserError: something is.
    """
    shared = "hardware.shard_base"
    if inputs.pinned("quantization") == "int8":
        raise UserError(
            f"hardware.quantization: got int8 with {shared}, which shares out nf4 or none; take one of these"
        )
    if inputs.pinned("offload_experts"):
        raise UserError(
            f"hardware.offload_experts: got true with {shared}, which shares out experts too; leave one out"
        )
    if (pinned := inputs.pinned("rollout_weights")) in ("joined", "dequantized"):
        raise UserError(
            f"hardware.rollout_weights: got {pinned} with {shared}, whose layers are gathered as they lie; take "
            "quantized or auto"
        )


def sharing_reasons(inputs: PlanInputs, settings: Settings) -> dict[str, str]:
    """Return why a base is shared out as it is, by setting."""
    memory = Memory(inputs.dims, inputs.recipe, settings, inputs.device)
    share, whole = gib(memory.shard()), gib(memory.base_layers())
    where = "in host memory" if settings.offload_base else "on the card"
    return {
        "base_shards": f"{PINNED}: each process holds {share} of the {whole} of all layers, and gathers the others",
        "offload_base": f"{PINNED}: the share of a process lies {where}",
    }
