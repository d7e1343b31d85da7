"""TRL 1.16's GRPOTrainer as the oracle of batches that are recorded. Not a test module."""

import math
from copy import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tiny_models import EOS, VOCAB, tiny_model
from training_cases import LIMIT
from trl import GRPOConfig, GRPOTrainer

from lowmem_rlhf.algorithms.grpo.math import group_advantages
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.rollout.rollout import Rollout

TOLERANCE = 1e-4
# what GRPOTrainer's constructor keeps of its config under the same name, of what a loss reads
TAKEN_OVER = (
    *("beta", "loss_type", "importance_sampling_level", "mask_truncated_completions", "off_policy_mask_threshold"),
    *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "scale_rewards"),
    *(f"vllm_importance_sampling_{name}" for name in ("correction", "mode", "clip_min", "clip_max")),
)


def word_tokenizer() -> Any:
    """Return a tokenizer of the tiny model's ids, as words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"t{i}": i for i in range(VOCAB)}
    vocab["<pad>"], vocab["</s>"] = vocab.pop("t0"), vocab.pop(f"t{EOS}")
    made = Tokenizer(models.WordLevel(vocab, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


class Oracle:
    """TRL's trainer with the adapter that a base of ours has, fed with recorded batches, one an optimizer step."""

    def __init__(
        self,
        base: SharedBase,
        batches: list[Rollout],
        rewards: list[list[list[float]]],
        folder: Path,
        tokenizer: Any,
        **args: Any,
    ) -> None:
        self.batches, self.rewards, self.calls = batches, rewards, 0
        base.save_adapter(folder / "adapter")
        stock = tiny_model("llama", attn="sdpa", tie_word_embeddings=base.model.config.tie_word_embeddings)
        stock.generation_config.eos_token_id = EOS
        model = PeftModel.from_pretrained(stock, folder / "adapter", is_trainable=True)
        rows = len(batches[0].completions)
        settings = {
            "output_dir": str(folder / "trl"),
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 1,
            "num_generations": batches[0].num_generations,
            "max_completion_length": LIMIT,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "shuffle_dataset": False,
            "optim": "adamw_torch",
        }
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=self.reward,
            args=GRPOConfig(**{**settings, **args}),
            train_dataset=Dataset.from_list([{"prompt": str(b)} for b in range(len(batches[0].prompts))]),
            processing_class=tokenizer,
            rollout_func=self.rollout,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.model, self.args = self.trainer.model, self.trainer.args

    def configure(self, **args: Any) -> None:
        """Let the trainer have these settings in place of those that it was made with, as its constructor does."""
        trainer = self.trainer
        trainer.args = config = copy(self.args)  # a second GRPOConfig would reset accelerate's state
        for name, value in args.items():
            assert hasattr(config, name), name
            setattr(config, name, value)
        for name in TAKEN_OVER:
            setattr(trainer, name, getattr(config, name))
        trainer.epsilon_low = config.epsilon
        trainer.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        trainer._entropy_bonus_enabled = config.entropy_coef != 0.0 or config.use_adaptive_entropy
        trainer._last_world_entropy, trainer._entropy_window_stats = math.inf, None
        trainer.use_vllm = False

    def rollout(self, prompts: list[str], _: Any) -> dict[str, Any]:
        """Give the recorded completions of the prompts, in TRL's order."""
        batch = self.batches[self.calls]
        group, seen = batch.num_generations, dict.fromkeys(prompts, 0)
        self.rows = []
        for prompt in prompts:
            self.rows.append(int(prompt) * group + seen[prompt])
            seen[prompt] += 1
        assert sorted(self.rows) == list(range(len(batch.completions)))
        return {
            "prompt_ids": [list(batch.prompts[row // group]) for row in self.rows],
            "completion_ids": [batch.completions[row].ids for row in self.rows],
            "logprobs": [batch.completions[row].logps for row in self.rows] if self.trainer.use_vllm else None,
        }

    def reward(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """Give the recorded rewards; a NaN is TRL's None."""
        flat = [r for group in self.rewards[self.calls] for r in group]
        self.calls += 1
        return [None if math.isnan(flat[row]) else flat[row] for row in self.rows]

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what TRL makes of the recorded batch: padded ids, masks, advantages, the normaliser.

        The log-probs of a reference are not among it: the tests give those of ours.
        """
        group = self.batches[0].num_generations
        rows = [{"prompt": str(b)} for b in range(len(self.batches[0].prompts)) for _ in range(group)]
        self.model.train()
        beta, self.trainer.beta, self.calls = self.trainer.beta, 0.0, 0
        inputs = self.trainer._generate_and_score_completions(rows)
        self.trainer.beta = beta
        return inputs

    def sampled_elsewhere(self) -> None:
        """Let the trainer take the recorded log-probs for those of vLLM, whose weights are in step."""
        self.trainer.use_vllm = True
        self.trainer._last_loaded_step = self.trainer.state.global_step

    def padded(self, logps: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return log-probs by row as TRL has them; what stands on padding must not matter."""
        length = max(len(c.ids) for c in self.batches[0].completions)
        out = torch.full((len(logps), length), -7.0)
        for row, values in logps.items():
            out[row, : len(values)] = values
        return out

    def logps(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return TRL's own log-probs (N, longest completion) of the model as it is."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            return self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, keep)[0]

    def gradients(self, inputs: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the loss and every adapter gradient, named as ours."""
        self.model.zero_grad()
        loss = self.trainer.compute_loss(self.model, inputs)
        loss.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return loss.item(), {name.replace(".default.", ".policy."): grad for name, grad in found.items()}

    def metric(self, name: str) -> float:
        return self.trainer._metrics["train"][name][-1]


def advantages_of(rewards: list[list[float]], scale: str = "group") -> list[float]:
    """Return the advantages of all completions."""
    return group_advantages(torch.tensor(rewards), scale).flatten().tolist()
