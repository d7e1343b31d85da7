"""Small batches, tiny models on disk and whole small runs for the tests of training. Not a test module."""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from tiny_models import EOS, VOCAB, fill_adapter, tiny_model

from lowmem_rlhf.algorithms.build import make_trainer
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.grpo.update import Objective, UpdateStats, backward
from lowmem_rlhf.data.examples import TrainingData
from lowmem_rlhf.data.prompts import build_examples
from lowmem_rlhf.data.sources import load_rows
from lowmem_rlhf.display.live import LiveView
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.passes import BatchLimits, completion_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.planning.run_plan import running_plan
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import TrainingConfig
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.rollout.rollout import Completion, Rollout
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.online import Trainer
from lowmem_rlhf.training.optimizer import Optimizer
from lowmem_rlhf.training.roles import add_roles

CPU = torch.device("cpu")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
BETAS = (0.0, 0.04)
LIMIT = 12  # tokens a completion may have
TRUNCATED = (4, 9)  # rows of `ragged_batch` that reached the limit without an end token
SYMBOLS = ["<pad>", "<s>", "<unk>", "</s>", *string.digits, *" +-*=?", *"abcdef"]

# Three prompts of four completions; the second group has equal rewards, one completion of the third none.
REWARDS = [[1.0, 0.0, 0.25, 0.5], [0.5, 0.5, 0.5, 0.5], [2.0, float("nan"), -1.0, 0.0]]
ADVANTAGES = [1.2, -0.7, 0.0, -0.5, 0.9, 0.0, -1.1, 0.3, -0.2, 1.5, 0.0, -1.4]


def close(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return how far a is from b, relative to b's norm."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def ragged_batch(
    advantages: Sequence[float] = ADVANTAGES, seed: int = 0, prompts: Sequence[int] = (5, 2, 9), vocab: int = VOCAB
) -> Rollout:
    """Return prompts with four completions each; all end with the end token but the `TRUNCATED`, at the limit."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(EOS + 1, vocab) for _ in range(count)]

    completions = []
    for row in range(4 * len(prompts)):
        if row in TRUNCATED:
            completions.append(Completion(tokens(LIMIT), [0.0] * LIMIT, True))
        else:
            length = draw.randrange(0, LIMIT - 1)
            completions.append(Completion([*tokens(length), EOS], [0.0] * (length + 1), False))
    return Rollout([tokens(n) for n in prompts], completions, 4, advantages=list(advantages))


def base_of(tie: bool = False, adapter: float = 0.1, dtype: torch.dtype = torch.float32, **changes: Any) -> SharedBase:
    """Return a tiny Llama's base with a non-zero adapter."""
    model = tiny_model("llama", tie_word_embeddings=tie, **changes).to(dtype)
    base = SharedBase(model, SimpleNamespace(eos_token_id=EOS), "tiny/llama", r=4, lora_alpha=8)
    if adapter:
        fill_adapter(base, size=adapter)
    return base


def settings_of(**changes: Any) -> GRPOSettings:
    """Return GRPO's settings."""
    return GRPOSettings.model_validate(changes)


def objective_of(settings: GRPOSettings, length: int = LIMIT) -> Objective:
    """Return what GRPO minimises with these settings."""
    return Objective.of(settings, length)


def limits_of(tokens: int = 10_000, tile: int = 64, temperature: float = 1.0) -> BatchLimits:
    """Return how passes are cut; by default not at all."""
    return BatchLimits(temperature, tokens, tile)


def ladder_of(tokens: int = 10_000, tile: int = 64, temperature: float = 1.0) -> Ladder:
    """Return a ladder whose passes are cut as those of `limits_of`."""
    sizes = {"micro_batch_tokens": tokens, "score_batch_tokens": tokens, "logits_tile_tokens": tile}
    return Ladder(CPU, rollout_batch_size=16, temperature=temperature, **sizes)


class Heard:
    """A display that keeps what was said, and how far each phase was."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown: list[tuple[int, int | None]] = []

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        self.shown.append((done, total))

    def message(self, text: str) -> None:
        self.said.append(text)


def stepper_of(
    parameters: dict[str, torch.nn.Parameter],
    optim: str = "adamw",
    total: int = 10,
    scale_loss: bool = False,
    **training: Any,
) -> Optimizer:
    """Return an optimizer; ``training`` are keys of the recipe's section."""
    return Optimizer(parameters, TrainingConfig.model_validate(training), optim, total, CPU, scale_loss)


def logps_of(base: SharedBase, batch: Rollout, role: str, temperature: float = 1.0) -> dict[int, torch.Tensor]:
    """Return the log-probs of all completions in a role."""
    with base.role(role):
        return completion_logprobs(
            base, batch.groups(range(len(batch.completions))), limits_of(temperature=temperature)
        )


def shifted(logps: dict[int, torch.Tensor], by: float = 0.5, seed: int = 5) -> dict[int, torch.Tensor]:
    """Return log-probs of a policy some updates ago: every token's shifted by up to ``by`` either way."""
    generator = torch.Generator().manual_seed(seed)
    return {row: v + (2 * torch.rand(v.shape, generator=generator) - 1) * by for row, v in sorted(logps.items())}


def drawn_with(batch: Rollout, logps: dict[int, torch.Tensor]) -> Rollout:
    """Return the batch as if its tokens had been sampled with these log-probs."""
    drawn = [replace(c, logps=logps[row].tolist()) for row, c in enumerate(batch.completions)]
    return replace(batch, completions=drawn)


def gradients(
    base: SharedBase, batch: Rollout, settings: GRPOSettings, limits: BatchLimits, **logps: Any
) -> tuple[UpdateStats, dict[str, torch.Tensor]]:
    """Return what `backward` gives, and every adapter parameter's gradient."""
    for p in base.trainable().values():
        p.grad = torch.zeros_like(p)
    with base.role(POLICY):
        stats = backward(base, batch, objective_of(settings), limits, logps.pop("ref", {}), **logps)
    return stats, {name: p.grad.clone() for name, p in base.trainable().items()}  # type: ignore[union-attr]


def weights(base: SharedBase) -> dict[str, torch.Tensor]:
    """Return a copy of the adapter's weights."""
    return {name: p.detach().clone() for name, p in base.trainable().items()}


def make_tokenizer() -> Any:
    """Return a tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_model(folder: Path) -> Path:
    """Write a tiny random Llama with its tokenizer; one token in about twenty ends a text."""
    model = tiny_model("llama", vocab_size=len(SYMBOLS), bos_token_id=1)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(model: Path, **sections: Any) -> Recipe:
    """Return a recipe of four steps on the CPU; keys of its sections can be replaced."""
    values: dict[str, Any] = {
        "name": "small",
        "model": str(model),
        "hardware": {
            "device": "cpu",
            "quantization": "none",
            "compute_dtype": "float32",
            "gradient_checkpointing": False,
            "micro_batch_tokens": 4096,
            "rollout_batch_size": 16,
            "logits_tile_tokens": 64,
            "optim": "adamw",
        },
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {
            "train": "arithmetic",
            "template": "{question} =",
            "eval_size": 6,
            "train_size": 12,
            "max_prompt_length": 16,
        },
        "generation": {"num_generations": 4, "max_completion_length": 10},
        "rewards": [{"function": "length", "name": "digits", "options": {"target": 10}}],
        "grpo": {"beta": 0.04},
        "training": {
            "max_steps": 4,
            "prompts_per_step": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "save_steps": 100,
        },
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_recipe(values)


def digits(completions: Sequence[str], **columns: Any) -> list[float]:
    """The reward of the runs here: the share of a completion's characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


class Talk(LiveView):
    """A display that keeps what was said, and the phases that were shown."""

    def __init__(self, total: int, start: int = 0) -> None:
        super().__init__(total, start, Console(file=StringIO()))
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def trainer_of(recipe: Recipe, path: Path, reward: Callable[..., list[Any]] = digits, resume: bool = False) -> Trainer:
    """Return the trainer of a recipe as `session.train` makes it, with a reward function of the test."""
    plan = running_plan(recipe)
    base = SharedBase.load(
        recipe.model,
        CPU,
        plan.settings.quantization,
        plan.settings.compute_dtype,
        r=recipe.lora.r,
        lora_alpha=recipe.lora.lora_alpha,
        seed=recipe.training.seed,
    )
    add_roles(base, recipe, [])
    examples = build_examples(load_rows(recipe.data, "train"), recipe.data, base.tokenizer)
    held_out = build_examples(load_rows(recipe.data, "eval"), recipe.data, base.tokenizer)
    run = RunDirectory.create(path, recipe, plan.to_dict(), resume)
    data = TrainingData(examples, held_out, [])
    trainer = make_trainer(recipe, plan, base, [Reward("digits", reward)], data, lambda resolved: run)
    assert isinstance(trainer, Trainer)
    if resume:
        trainer.resume()
    return trainer


def train(trainer: Trainer) -> tuple[dict[str, Any], list[str]]:
    """Run a trainer to its end; return the evaluation and what was said on the way."""
    view = Talk(trainer.recipe.training.max_steps, trainer.step)
    with view:
        return trainer.train(view), view.said
