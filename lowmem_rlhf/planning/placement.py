"""Where a learned reward's model computes: beside the policy where the plan leaves room, else on the CPU. No torch.

A reward's need is its weights, which stay, and the largest pass over a batch of texts. The plan of the run is made
first and keeps its settings: a reward gets what the plan's largest phase leaves of the budget.
"""

from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.planning.inputs import gib
from lowmem_rlhf.planning.memory.resident import ALLOCATOR_FACTOR


def encoder_pass_bytes(hidden_size: int, intermediate_size: int, tokens: int, longest: int, width: int) -> int:
    """Bytes of one layer of an encoder in a pass without gradients over padded tokens.

    ``b * T * (9h + 3 dff)``: a layer's input, its residual stream, queries, keys and values, and its MLP; and ``b * T *
    L`` for a mask that has one number for each pair of tokens of a text. T tokens of the batch, L of the longest text.
    The tensors alive at once in a pass on a CPU come to 48 to 98 % of it (BERT, DistilBERT, GPT-2).
    """
    return width * tokens * (9 * hidden_size + 3 * intermediate_size + longest)


def reward_bytes(weights: int, work: int, device: str) -> int:
    """Bytes that a learned reward takes of a device: weights, the largest pass, and what a caching allocator holds."""
    return round((weights + work) * (ALLOCATOR_FACTOR if capabilities(device).caching_allocator else 1.0))


def reward_device(weights: int, work: int, policy_device: str, free_bytes: int) -> tuple[str, str]:
    """Choose the device of a learned reward.

    Args:
        weights: bytes of the model.
        work: bytes of its largest pass.
        policy_device: the torch device that the run computes on.
        free_bytes: what the plan's largest phase and the rewards placed before leave of that device's budget.
    """
    if capabilities(policy_device).on_cpu:
        return "cpu", "the policy computes on the CPU, too"
    need = reward_bytes(weights, work, policy_device)
    place = f"beside the policy, where the plan leaves {gib(max(0, free_bytes))}"
    if need <= free_bytes:
        return policy_device, f"its {gib(need)} fit {place}"
    return "cpu", f"its {gib(need)} do not fit {place}"
