"""What processes send each other in a step, in bytes. No torch.

Gradients of adapters are fp32 and summed up once an optimizer step. What is sampled goes to all, as the update of a
step is spread over them anew: ids of tokens, and fp32 numbers for each. Of a shared base all layers are gathered for
every pass over them. Sums of losses and metrics are a few numbers, which are not counted.
"""

from dataclasses import asdict, dataclass

from lowmem_rlhf.planning.memory.resident import Memory
from lowmem_rlhf.planning.time.links import sent_gathering, sent_summing
from lowmem_rlhf.recipe.schema import Recipe

TOKEN_ID, NUMBER = 8, 4  # bytes of torch's int64 and of a log-prob, a value or a reward


@dataclass(frozen=True)
class Traffic:
    """What one process sends to the next in a step, in bytes.

    Attributes:
        gradients: of adapters, all optimizer steps of a step together.
        samples: completions, their log-probs, values and rewards.
        layers: of a shared base; 0 where each process holds all of it.
    """

    gradients: int
    samples: int
    layers: int

    @property
    def total(self) -> int:
        """All of it; the last process of a machine sends it to the next machine."""
        return self.gradients + self.samples + self.layers

    def to_dict(self) -> dict[str, int]:
        """Return plain values."""
        return {**asdict(self), "total": self.total}


def bytes_sent(recipe: Recipe, memory: Memory, processes: int, gathers: float = 0.0) -> Traffic:
    """Return what one process sends in a step.

    Args:
        recipe: with the prompts of the whole step.
        memory: of one process.
        gathers: passes over the layers in a step, of the process with the most of them.
    """
    gradients = recipe.spec.updates(recipe) * sent_summing(gradient_bytes(memory), processes)
    layers = gathers * sent_gathering(memory.base_layers(), processes) if memory.settings.base_shards > 1 else 0.0
    return Traffic(round(gradients), round(sent_gathering(sample_bytes(recipe), processes)), round(layers))


def gradient_bytes(memory: Memory) -> int:
    """Return the bytes of the gradients of all adapters that train."""
    return NUMBER * memory.one_adapter * memory.trained


def sample_bytes(recipe: Recipe) -> float:
    """Return the bytes of what a step samples, at full length: of each token its id, and a number from each role.

    These are the log-prob at which it was sampled, those of the policy and the reference, and the critic's value. The
    prompts are known to every process.
    """
    spec = recipe.spec
    if not spec.samples:
        return 0
    completions = recipe.training.prompts_per_step * recipe.generation.num_generations
    compared = spec.compared(recipe) if spec.reference else 0
    numbers = 1 + spec.scores_policy + compared + bool(spec.critic(recipe))
    tokens = recipe.generation.max_completion_length
    return completions * (tokens * (TOKEN_ID + NUMBER * numbers) + NUMBER * len(recipe.rewards))
