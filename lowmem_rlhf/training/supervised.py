"""Training from given texts on the packed, tiled engine: supervised fine-tuning, and reward models from pairs.

One optimizer step is exactly that of its whole batch, whatever the batch is cut into: the number of learned tokens, or
of pairs, is known before the first backward pass.

Shapes: S scored tokens of a micro-batch, N completions (two a pair).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lowmem_rlhf.algorithms.preferences import pair_loss
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.data.supervised import Pair, Supervised
from lowmem_rlhf.model.adapters import saved_adapter
from lowmem_rlhf.model.base import SharedBase
from lowmem_rlhf.model.packing import Group, scored_only
from lowmem_rlhf.model.roles import POLICY
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.recipe import Recipe
from lowmem_rlhf.report.live import LiveView
from lowmem_rlhf.run import RunDirectory
from lowmem_rlhf.training.heads import ahead, head_outputs, last_of_each, packed_outputs
from lowmem_rlhf.training.loop import Loop, StepResult
from lowmem_rlhf.training.update import PassSettings, packed_logprobs


def with_epochs(recipe: Recipe, examples: int) -> Recipe:
    """Return the recipe with ``training.max_steps`` set from ``num_train_epochs`` passes over so many examples."""
    training = recipe.training
    if training.num_train_epochs is None:
        return recipe
    steps = math.ceil(training.num_train_epochs * examples / training.prompts_per_step)
    return recipe.model_copy(update={"training": training.model_copy(update={"max_steps": steps})})


class SFT(Loop):
    """Supervised fine-tuning of the policy's adapter.

    Args:
        recipe, plan, base, run: see `Loop`.
        train, held_out: examples to learn from, and to measure the loss on.
        judge: returns results of held-out completions (accuracy, rewards), where the recipe has rewards.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        train: Sequence[Supervised],
        held_out: Sequence[Supervised],
        run: RunDirectory,
        judge: Callable[[str, LiveView], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(recipe, plan, base, run)
        self.stream = PromptStream(train, recipe.training.prompts_per_step, recipe.training.seed)
        self.held_out, self.judge = held_out, judge

    def one_step(self, view: LiveView) -> StepResult:
        """Learn from the next examples."""
        examples = self.stream.batch(self.step)
        groups, masks = _groups(examples), _masks(examples)
        learned = sum(one.learned_tokens for one in examples)

        def work(passes: PassSettings) -> tuple[float, float, int]:
            self.stepper.zero_grad()
            loss, entropy, fed = 0.0, 0.0, 0
            with self.base.role(POLICY):
                for part in self.base.layout.cut(groups, passes.micro_batch_tokens):
                    packed = scored_only(self.base.layout.lay_out(part, self.base.device), masks)
                    logps, entropies = packed_logprobs(self.base, packed, 1.0, passes.tile)
                    share = -logps.sum() / learned
                    (share * self.stepper.loss_scale).backward()
                    loss, entropy = loss + float(share.detach()), entropy + float(entropies.sum())
                    fed += packed.input_ids.numel()
                    view.phase("update", fed, None)
            return loss, entropy, fed

        with self.timed("update"):
            loss, entropy, fed = self.with_fewer_tokens(work, view)
            norm = self.stepper.step()
            self.base.adapters_changed()
            self.stepper.drop_gradients()
        metrics = {"loss": loss, "entropy": entropy / learned, "grad_norm": norm, "tokens/trained": fed}
        return StepResult({**metrics, "tokens/learned": learned, **self._held_out_loss(view)}, learned)

    def _held_out_loss(self, view: LiveView) -> dict[str, float]:
        every = self.recipe.sft.eval_steps
        if not every or not self.held_out or (self.step + 1) % every:
            return {}
        return {"eval/loss": self.loss(self.held_out, view)}

    @torch.no_grad()
    def loss(self, examples: Sequence[Supervised], view: LiveView) -> float:
        """Return the mean loss over all learned tokens of the examples, in the policy's role."""
        groups, masks = _groups(examples), _masks(examples)

        def work(passes: PassSettings) -> float:
            total = 0.0
            parts = self.base.layout.cut(groups, passes.micro_batch_tokens)
            with self.base.role(POLICY):
                for i, part in enumerate(parts):
                    packed = scored_only(self.base.layout.lay_out(part, self.base.device), masks)
                    logps, _ = packed_logprobs(self.base, packed, 1.0, passes.tile, entropy="none")
                    total -= float(logps.sum())
                    view.phase("evaluation", i + 1, len(parts))
            return total

        return self.scored(work, view) / sum(one.learned_tokens for one in examples)

    def evaluate(self, when: str, view: LiveView) -> dict[str, Any]:
        """Return the held-out loss, and what is said of sampled completions where the recipe has rewards."""
        if not self.held_out:
            return {}
        loss = self.loss(self.held_out, view)
        judged = self.judge(when, view) if self.judge else {"accuracy": None}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **judged, "problems": len(self.held_out)}


def _groups(examples: Sequence[Supervised]) -> list[Group]:
    return [Group(one.prompt_ids, [one.completion_ids], [row]) for row, one in enumerate(examples)]


def _masks(examples: Sequence[Supervised]) -> dict[int, tuple[bool, ...]]:
    """Return by row which tokens are learned, where not all are."""
    return {row: one.learned for row, one in enumerate(examples) if one.learned is not None}


class RewardModel(Loop):
    """A reward model from preference pairs: an adapter and a score head, read at an answer's last token.

    Both answers of a pair share their prompt's tokens in one row. The adapter takes the policy's place on the base.
    """

    nothing_learned = "nothing was learned: no pair was trained on"

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        train: Sequence[Pair],
        held_out: Sequence[Pair],
        run: RunDirectory,
    ) -> None:
        base.add_head(POLICY, std=(base.hidden_size + 1) ** -0.5, seed=recipe.training.seed)
        saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision) if recipe.adapter else None
        if saved is not None and saved.head is not None:
            base.load_head(saved.folder, POLICY)  # it goes on as a whole
        super().__init__(recipe, plan, base, run)
        self.stream = PromptStream(train, recipe.training.prompts_per_step, recipe.training.seed)
        self.held_out = held_out

    def one_step(self, view: LiveView) -> StepResult:
        """Learn from the next pairs."""
        pairs = self.stream.batch(self.step)
        groups = pair_groups(pairs)

        def work(passes: PassSettings) -> tuple[float, torch.Tensor, int]:
            self.stepper.zero_grad()
            scores = head_outputs(self.base, POLICY, groups, passes)
            ends = torch.stack([scores[row][-1] for row in range(2 * len(pairs))]).requires_grad_()  # (N,)
            loss = self._loss(ends, pairs)
            (slope,) = torch.autograd.grad(loss, ends)  # so the pairs may be cut anywhere
            fed = 0
            with self.base.role(POLICY):
                for part in self.base.layout.cut(groups, passes.micro_batch_tokens):
                    packed = self.base.layout.lay_out(part, self.base.device)
                    values = last_of_each(packed_outputs(self.base, POLICY, packed), packed)
                    rows = torch.tensor(packed.rows, dtype=torch.long, device=values.device)
                    ((values * slope.index_select(0, rows)).sum() * self.stepper.loss_scale).backward()
                    fed += packed.input_ids.numel()
                    view.phase("update", fed, None)
            return float(loss.detach()), ends.detach(), fed

        with self.timed("update"):
            loss, ends, fed = self.with_fewer_tokens(work, view)
            norm = self.stepper.step()
            self.base.adapters_changed()
            self.stepper.drop_gradients()
        metrics = {"loss": loss, "grad_norm": norm, "tokens/trained": fed, **_pair_metrics(ends, pairs)}
        every = self.recipe.reward_model.eval_steps
        if every and self.held_out and (self.step + 1) % every == 0:
            metrics |= {f"eval/{name}": value for name, value in self._measure(view).items()}
        return StepResult(metrics, sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs))

    def _loss(self, ends: torch.Tensor, pairs: Sequence[Pair]) -> torch.Tensor:
        margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float32, device=ends.device)
        return pair_loss(ends[::2], ends[1::2], margins, self.recipe.reward_model.center_rewards_coefficient).mean()

    def _measure(self, view: LiveView) -> dict[str, float]:
        groups = pair_groups(self.held_out)

        def shown(done: int, total: int) -> None:
            view.phase("evaluation", done, total)

        found = self.scored(lambda passes: head_outputs(self.base, POLICY, groups, passes, shown), view)
        ends = torch.stack([found[row][-1] for row in range(2 * len(self.held_out))])
        return {"loss": float(self._loss(ends, self.held_out)), **_pair_metrics(ends, self.held_out)}

    def evaluate(self, when: str, view: LiveView) -> dict[str, Any]:
        """Return loss, accuracy (of pairs) and mean margin on held-out pairs."""
        return {**self._measure(view), "problems": len(self.held_out)} if self.held_out else {}


def pair_groups(pairs: Sequence[Pair]) -> list[Group]:
    """Return a group for each pair, read to the last tokens: row 2i is the better answer, 2i + 1 the worse."""
    return ahead([Group(p.prompt_ids, [p.chosen_ids, p.rejected_ids], [2 * i, 2 * i + 1]) for i, p in enumerate(pairs)])


def _pair_metrics(ends: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the share of pairs in the right order, a tie being half, and the scores' mean difference and mean."""
    difference = (ends[::2] - ends[1::2]).float()
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return {
        "accuracy": float(right.mean()),
        "score/margin": float(difference.mean()),
        "score/mean": float(ends.mean()),
    }
