"""One GRPO step of our engine, piece by piece in the order of the training loop, timed and measured by phase.

Every completion has exactly the length that was asked for: the base's set of stop tokens is empty. The reward is a
number made from a hash of the completion's text.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_rlhf.algorithms.grpo.math import group_advantages
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.grpo.update import Objective, rows_to_train, update
from lowmem_rlhf.bench.meter import Meter, counter_for
from lowmem_rlhf.bench.work import ALPHA, BETA, LEARNING_RATE, RANK, hash_reward
from lowmem_rlhf.data.prompts import build_examples
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder, RolloutLimits
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.progress import Silence
from lowmem_rlhf.recipe.sections import DataConfig, TrainingConfig
from lowmem_rlhf.rollout.engine import Engine, own_engine
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.training.optimizer import Optimizer

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Cut:
    """What bounds the memory of a step.

    Attributes:
        rows: completions written at once (``rollout_batch_size``).
        micro_batch_tokens: packed tokens of one pass.
        tile: positions whose logits exist at once.
        checkpointing: layers whose activations are made again in the backward pass: all, none, or the first so many.
        dequantized: an NF4 base lends the rollout a 16-bit copy of its weights.
        keep_graphs: graphs of decoding passes live on until the next rollout.
    """

    rows: int
    micro_batch_tokens: int
    tile: int
    checkpointing: bool | int = True
    dequantized: bool = True
    keep_graphs: bool = False

    def ladder(self, device: torch.device) -> Ladder:
        """Return the sizes as the engine takes them."""
        return Ladder(
            device,
            rollout_batch_size=self.rows,
            micro_batch_tokens=self.micro_batch_tokens,
            score_batch_tokens=self.micro_batch_tokens,
            logits_tile_tokens=self.tile,
        )


class EndlessBase(SharedBase):
    """A base on which no token ends a completion, so that each has the length that was asked for."""

    stop_ids = frozenset()  # type: ignore[assignment]


class OurStep:
    """The base with a LoRA on all linear layers, its optimizer, and steps of them on whatever work is given.

    Args:
        model: as in a recipe.
        device: where everything lies.
        quantization, compute_dtype: as in a recipe's section ``hardware``.
    """

    def __init__(
        self, model: str, device: torch.device, quantization: str = "nf4", compute_dtype: str = "bfloat16"
    ) -> None:
        self.device, self.taken = device, 0
        self.base = EndlessBase.load(model, device, quantization, compute_dtype, r=RANK, lora_alpha=ALPHA)
        self.grpo = GRPOSettings(beta=BETA, loss_type="dapo")
        training = TrainingConfig(learning_rate=LEARNING_RATE, lr_scheduler_type="constant")
        half = compute_dtype == "float16"
        self.optimizer = Optimizer(self.base.trainable(), training, "adamw", 100, device, scale_loss=half)
        self._engines: dict[bool, Engine] = {}  # by whether NF4 weights are unpacked for a rollout

    def encode(self, questions: Sequence[str]) -> list[list[int]]:
        """Return the questions as prompts in the model's chat template."""
        data = DataConfig(train="questions", answer=None, max_prompt_length=10_000)
        rows = [{"question": question} for question in questions]
        return [list(example.prompt_ids) for example in build_examples(rows, data, self.base.tokenizer)]

    def measure(self, prompts: Prompts, generations: int, length: int, cut: Cut, count: bool = False) -> dict[str, Any]:
        """Take a step of B prompts x ``generations`` completions of ``length`` tokens; return its figures.

        Returns:
            ``seconds`` and ``peaks`` (bytes; only with ``count``) by phase, ``start_bytes`` that were live before,
            ``lengths`` and ``prompt_lengths`` in tokens, ``update_tokens`` that went through the update; ``note``, what
            is to be known of how tokens were decoded.
        """
        counter = counter_for(self.device) if count else None
        meter = Meter(self.device, counter)
        self.base.set_gradient_checkpointing(cut.checkpointing)
        with counter or nullcontext():
            start = counter.current if counter else 0
            lengths, tokens = self._step(meter, prompts, generations, length, cut)
        return {
            "seconds": dict(meter.seconds),
            "peaks": dict(meter.peaks),
            "start_bytes": start,
            "lengths": lengths,
            "prompt_lengths": [len(prompt) for prompt in prompts],
            "update_tokens": tokens,
            "note": getattr(self._engine(cut), "note", ""),
        }

    def _step(self, meter: Meter, prompts: Prompts, generations: int, length: int, cut: Cut) -> tuple[list[int], int]:
        passes = BatchLimits(1.0, cut.micro_batch_tokens, cut.tile)
        with meter.phase("rollout"):
            completions = self._rollout(prompts, generations, length, cut)
        with meter.phase("other"):
            batch, objective = self._batch(prompts, completions, generations), Objective.of(self.grpo, length)
            rows = rows_to_train(batch, objective)
        with meter.phase("score"), self.base.role("reference"):
            reference = completion_logprobs(self.base, batch.groups(rows), passes)
        with meter.phase("update"):
            done = update(self.base, self.optimizer, batch, objective, cut.ladder(self.device), reference, Silence())
        self.taken += 1
        return [len(completion.ids) for completion in completions], done.tokens

    def _rollout(self, prompts: Prompts, generations: int, length: int, cut: Cut) -> list[Completion]:
        limits = RolloutLimits(cut.rows, cut.micro_batch_tokens, cut.tile, keep_graphs=cut.keep_graphs)
        engine = self._engine(cut)
        with self.base.role("policy"):
            engine.sync()
            groups = engine.generate(prompts, generations, length, Sampling(), limits, seed=self.taken)
        return [completion for group in groups for completion in group]

    def _engine(self, cut: Cut) -> Engine:
        """Return the engine that a run takes on this device, with its graphs of the step before."""
        if cut.dequantized not in self._engines:
            self._engines[cut.dequantized] = own_engine(self.base, cut.dequantized)
        return self._engines[cut.dequantized]

    def _batch(self, prompts: Prompts, completions: Sequence[Completion], generations: int) -> Rollout:
        texts = self.base.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        rewards = torch.tensor([hash_reward(text) for text in texts]).view(-1, generations)
        advantages = group_advantages(rewards, "group").flatten().tolist()
        return Rollout(prompts, completions, generations, advantages=advantages)
