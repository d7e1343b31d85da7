"""The online loop: prompts -> rollout -> rewards -> advantages -> packed micro-batches -> optimizer step.

One direction, a stage takes the previous one's values. All randomness is a function of (seed, step), so a resumed run
continues as the uninterrupted one would have.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from lowmem_rlhf.algorithms.grpo import group_advantages
from lowmem_rlhf.data.prompts import Example, PromptStream
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.memory import clock, is_out_of_memory, peak_bytes, reset_peak, with_less
from lowmem_rlhf.model.base import POLICY, SharedBase
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe import Recipe
from lowmem_rlhf.report.live import LiveView
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.rollout.generate import Completion, Limits, generate
from lowmem_rlhf.run import RunDirectory
from lowmem_rlhf.training.checkpoint import load_checkpoint, save_checkpoint
from lowmem_rlhf.training.evaluate import TrainerState, evaluate, reward_completions, sampling_of
from lowmem_rlhf.training.metrics import Rollout, rollout_metrics, samples, update_metrics
from lowmem_rlhf.training.optimizer import Stepper
from lowmem_rlhf.training.update import (
    LEAST_TOKENS,
    Batch,
    PassSettings,
    UpdateStats,
    measure,
    rows_to_train,
    score,
    update,
)

T = TypeVar("T")


class Trainer:
    """GRPO on a SharedBase.

    Args:
        recipe, plan: what to do and the chosen settings.
        base: the shared base with its policy adapter.
        rewards: the reward functions.
        train, held_out: prompts to train on and to evaluate on.
        run: where everything is written.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        rewards: Sequence[Reward],
        train: Sequence[Example],
        held_out: Sequence[Example],
        run: RunDirectory,
    ) -> None:
        self.recipe, self.base, self.rewards, self.held_out, self.run = recipe, base, rewards, held_out, run
        self.stream = PromptStream(train, recipe.training.prompts_per_step, recipe.training.seed)
        settings = plan.settings
        self.passes = PassSettings(
            recipe.generation.temperature, settings.micro_batch_tokens, settings.logits_tile_tokens
        )
        self.limits = Limits(settings.rollout_batch_size, settings.micro_batch_tokens, settings.logits_tile_tokens)
        self.dequantize = settings.rollout_weights == "dequantized"
        self.accelerator = _accelerator(base.device, recipe, run)
        set_seed(recipe.training.seed)
        base.set_gradient_checkpointing(settings.gradient_checkpointing, settings.offload_checkpoints)
        self.stepper = Stepper(
            base.trainable(),
            recipe.training,
            settings.optim,
            recipe.training.max_steps * recipe.grpo.num_iterations,
            base.device,
            scale_loss=base.dtype == torch.float16,
        )
        self.step = 0
        self.learned_tokens = 0  # completion tokens with an advantage, over all steps
        self._taken = 0  # optimizer steps of this process at the last finished step

    def resume(self) -> None:
        """Continue from the run's latest checkpoint; a run that has none yet starts over."""
        latest = self.run.latest_checkpoint()
        if latest is None:
            print("there is no checkpoint yet: the run starts over", flush=True)
            return
        print(f"going on after step {latest[0]}", flush=True)
        self.step, counters = load_checkpoint(latest[1], self.base, self.stepper)
        self.learned_tokens = counters["learned_tokens"]

    def train(self, view: LiveView) -> dict[str, Any]:
        """Run all steps and both evaluations; return evaluation.json's content.

        Raises:
            RunError: a reward function failed, memory ran out for good, or nothing was learned. The last finished
                step is kept as a checkpoint.
        """
        evaluation = self.run.evaluation()
        if self.held_out and "before" not in evaluation:
            self._evaluate("before", evaluation, view)
        try:
            while self.step < self.recipe.training.max_steps:
                self._train_step(view)
                if self.step % self.recipe.training.save_steps == 0:
                    self._save()
        except BaseException as error:
            if self.step and self.stepper.taken == self._taken:
                self._save()  # nothing of the finished steps is lost
            if is_out_of_memory(error):
                raise RunError(
                    f"the device's memory ran out in step {self.step + 1}; close other programs that use it, or set "
                    "hardware.quantization=nf4 or hardware.optim=adamw_8bit"
                ) from error
            raise
        finally:
            self.accelerator.end_training()
        if self.recipe.training.max_steps and not self.learned_tokens:
            raise RunError(
                "nothing was learned: in every step all completions of each prompt had the same reward, so no "
                "advantage was left; look at samples.jsonl, make the task easier or the reward finer, or raise "
                "generation.num_generations"
            )
        self._save()
        if self.held_out:
            self._evaluate("after", evaluation, view)
        with self.run.new_adapter() as folder:
            self.base.save_adapter(folder)
        return evaluation

    def _save(self) -> None:
        latest = self.run.latest_checkpoint()
        if latest is None or latest[0] < self.step:
            save_checkpoint(self.run, self.step, self.base, self.stepper, {"learned_tokens": self.learned_tokens})

    def _evaluate(self, when: str, evaluation: dict[str, Any], view: LiveView) -> None:
        def work(rows: int) -> dict[str, Any]:
            with self.base.role(POLICY), self.base.decoding(self.dequantize):
                return evaluate(
                    self.base,
                    self.held_out,
                    self.recipe,
                    self.rewards,
                    replace(self.limits, rows=rows),
                    TrainerState(self.step, self.recipe.training.max_steps),
                    lambda done, total: view.phase(f"evaluation {when}", done, total),
                )

        evaluation[when] = self._with_fewer_rows(work, view)
        self.run.write_evaluation(evaluation)

    def _with_fewer_rows(self, work: Callable[[int], T], view: LiveView) -> T:
        key = "hardware.rollout_batch_size"
        result, rows = with_less(work, self.limits.rows, 1, key, self.base.device, view.message)
        self.limits = replace(self.limits, rows=rows)
        return result

    def _train_step(self, view: LiveView) -> None:
        reset_peak(self.base.device)
        times = [clock(self.base.device)]
        rollout = self._rollout(view)
        times.append(clock(self.base.device))
        batch = self._batch(rollout)
        rows = rows_to_train(batch, self.recipe.grpo)
        ref_logps = self._reference(batch, rows, view)
        quiet = None if rows else self._measure(batch, ref_logps)
        times.append(clock(self.base.device))
        learning_rate = self.stepper.learning_rate
        # without an advantage there is no signal: the KL term's gradient is zero while policy and reference agree;
        # a warm-up begins with a learning rate of zero
        signal = [row for row in rows if batch.advantages[row]] if learning_rate else []
        before = self._adapter_sum() if signal and not self.learned_tokens else None
        skipped = self.stepper.skipped
        stats, tokens = update(
            self.base,
            self.stepper,
            batch,
            self.recipe.grpo,
            self.recipe.generation.max_completion_length,
            self.passes,
            ref_logps,
            view.message,
            lambda done, total: view.phase("update", done, total),
        )
        self.passes = replace(self.passes, micro_batch_tokens=tokens)
        times.append(clock(self.base.device))
        if quiet:
            stats = replace(quiet, loss=stats.loss, grad_norm=stats.grad_norm)
        if self.stepper.skipped == skipped:
            if before is not None and before == self._adapter_sum():
                raise RunError("the first optimizer step did not change the adapter: nothing would be learned")
            self.learned_tokens += sum(len(batch.completions[row].ids) for row in signal)
        self.step += 1
        self._taken = self.stepper.taken
        metrics = {
            "step": self.step,
            **rollout_metrics(rollout, batch),
            **update_metrics(batch, stats, self.recipe.grpo),
            "learning_rate": learning_rate,
            "loss_scale/skipped_steps": self.stepper.skipped,
            **{f"time/{name}": times[i + 1] - times[i] for i, name in enumerate(("rollout", "score", "update"))},
            "time/step": times[-1] - times[0],
            "memory/peak_bytes": peak_bytes(self.base.device),
        }
        self.run.log_metrics(metrics)
        self.run.log_samples(self.step, samples(rollout, batch, self.recipe.training.log_completions))
        self.accelerator.log({k: v for k, v in metrics.items() if v is not None}, step=self.step)
        view.step(metrics)

    def _rollout(self, view: LiveView) -> Rollout:
        generation, seed = self.recipe.generation, self.recipe.training.seed
        examples = self.stream.batch(self.step)

        def work(rows: int) -> list[list[Completion]]:
            with self.base.role(POLICY), self.base.decoding(self.dequantize):
                return generate(
                    self.base,
                    [example.prompt_ids for example in examples],
                    generation.num_generations,
                    generation.max_completion_length,
                    sampling_of(self.recipe),
                    replace(self.limits, rows=rows),
                    seed=(seed + 1) * 1_000_003 + self.step,
                    progress=lambda done, total: view.phase("rollout", done, total),
                )

        groups = self._with_fewer_rows(work, view)
        repeated = [example for example in examples for _ in range(generation.num_generations)]
        completions = [completion for group in groups for completion in group]
        view.phase("rewards")
        state = TrainerState(self.step, self.recipe.training.max_steps)
        scores, texts = reward_completions(self.rewards, self.base, repeated, completions, state)
        return Rollout(examples, completions, texts, scores)

    def _batch(self, rollout: Rollout) -> Batch:
        group = self.recipe.generation.num_generations
        rewards = torch.tensor(rollout.scores.total, dtype=torch.float32, device="cpu").view(-1, group)
        advantages = group_advantages(rewards, self.recipe.grpo.scale_rewards)
        prompts = [example.prompt_ids for example in rollout.examples]
        return Batch(prompts, rollout.completions, advantages.flatten().tolist(), group)

    def _reference(self, batch: Batch, rows: list[int], view: LiveView) -> dict[int, torch.Tensor]:
        """Score the reference: on all trained rows with beta, otherwise on one a group, to measure the KL."""
        if not self.recipe.grpo.beta:
            rows = list({row // batch.num_generations: row for row in rows}.values())
        rows = rows or list(range(0, len(batch.completions), batch.num_generations))

        def work(tokens: int) -> dict[int, torch.Tensor]:
            passes = replace(self.passes, micro_batch_tokens=tokens)
            with self.base.role("reference"):
                return score(self.base, batch, rows, passes, lambda done, total: view.phase("score", done, total))

        tokens = self.passes.micro_batch_tokens
        logps, tokens = with_less(
            work, tokens, LEAST_TOKENS, "hardware.micro_batch_tokens", self.base.device, view.message
        )
        self.passes = replace(self.passes, micro_batch_tokens=tokens)
        return logps

    def _measure(self, batch: Batch, ref_logps: dict[int, torch.Tensor]) -> UpdateStats:
        """What the metrics tell of the policy in a step that trains nothing, from the rows scored by the reference."""
        with self.base.role(POLICY):
            return measure(self.base, batch, self.passes, ref_logps)

    def _adapter_sum(self) -> float:
        """A number that any change of the adapter changes."""
        return sum(float(p.detach().cpu().double().abs().sum()) for p in self.stepper.parameters.values())


def _accelerator(device: torch.device, recipe: Recipe, run: RunDirectory) -> Accelerator:
    """Return accelerate's state on our device, with the recipe's trackers; nothing is placed or cast by it."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    trackers = list(recipe.training.report_to)
    accelerator = Accelerator(device_placement=False, log_with=trackers or None, project_dir=str(run.path))
    if trackers:
        accelerator.init_trackers(recipe.name, config={"algorithm": recipe.algorithm, "model": recipe.model})
    return accelerator
