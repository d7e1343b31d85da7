"""Training with TRL's own trainers: their losses and metrics in this package's loop.

What a step does: TRL's collator makes padded micro-batches, TRL's ``compute_loss`` calls the policy and the reference
(two roles of one base, see `trl_model`), and the gradient of the whole step is taken as in every other algorithm: fp32
masters, loss scaling in float16, one optimizer step, smaller micro-batches when memory runs out. What is left out is
the loop of transformers' Trainer, with its mixed precision, pickled checkpoints and model cards.

A micro-batch counts by its examples, so means over examples are those of the step. Parts of a loss that TRL averages
over the tokens or compares within a micro-batch (ORPO's and CPO's likelihood, KTO's KL) are those of micro-batches, as
they are with TRL's gradient accumulation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lowmem_rlhf.algorithms.common.device_sums import added_up
from lowmem_rlhf.algorithms.common.epochs import with_epochs
from lowmem_rlhf.algorithms.trl.data import answer_tokens, batch_rows, pairs_among, tokens_of
from lowmem_rlhf.algorithms.trl.spec import TRL_TRAINERS
from lowmem_rlhf.algorithms.trl.trainers import make_trainer
from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.data.examples import TrainingData
from lowmem_rlhf.data.labelled import Example
from lowmem_rlhf.data.stream import PromptStream
from lowmem_rlhf.data.supervised import Pair
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.ladder import Ladder
from lowmem_rlhf.engine.load import first_sentence
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.passes import BatchLimits, micro_batches, packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.planning.plan import Plan
from lowmem_rlhf.processes.world import current
from lowmem_rlhf.progress import Progress, message
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.rewards.loading import Reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import ACCURACY, LOSS
from lowmem_rlhf.training.intervals import wilson
from lowmem_rlhf.training.loop import Loop, StepOutput
from lowmem_rlhf.training.memory import explain_shortage
from lowmem_rlhf.training.online import CompletionEvaluator

# what TRL measures on all logits, which are not there
NOT_MEASURED = ("logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens")


class TRLLoop(Loop):
    """The loop around one of TRL's trainers.

    Args:
        recipe, plan, base, run: see `Loop`.
        trainer: of `make_trainer`.
        train, held_out: examples to learn from, and to measure on.
        evaluator: samples and scores held-out completions, where the recipe has rewards.
        ladder: see `Loop`.
    """

    nothing_learned = "nothing was learned: no example was trained on"

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        base: SharedBase,
        trainer: Any,
        train: Sequence[Example],
        held_out: Sequence[Example],
        run: RunDirectory,
        evaluator: CompletionEvaluator | None = None,
        ladder: Ladder | None = None,
    ) -> None:
        super().__init__(recipe, plan, base, run, ladder=ladder)
        self.trainer, self.kind = trainer, TRL_TRAINERS[recipe.algorithm]
        self.stream = PromptStream(train, recipe.training.prompts_per_step, recipe.training.seed)
        self.held_out, self.evaluator = held_out, evaluator

    def one_step(self, progress: Progress) -> StepOutput:
        """Learn from the next examples."""
        examples = self.stream.batch(self.step)
        rows, model = batch_rows(examples, self.kind), self.trainer.model

        def work(limits: BatchLimits) -> tuple[dict[str, float], int]:
            self.optimizer.zero_grad()
            model.train()
            self._logged({"loss": 0.0})  # what a try that ran out of memory has left
            model.fed, means, done = 0, _Means(), 0
            with self.base.role(POLICY):  # for the backward pass, where layers may be computed again
                for part in self._cut_rows(examples, limits.micro_batch_tokens):  # of several processes: its share
                    loss = self.trainer.compute_loss(model, self._collated([rows[i] for i in part]))
                    (loss * (len(part) / len(rows) * self.optimizer.loss_scale)).backward()
                    means.add(self._logged({"loss": float(loss.detach())}), [examples[i] for i in part])
                    done += len(part)
                    progress.phase("update", done, len(rows))
            return means.result(), int(current().sum(model.fed)[0])

        with self.timed("update"):
            measured, fed = self.ladder.update(work, progress.message)
            norm = self.optimizer.step(measured["loss"], logits=measured.get("entropy", 0.0))
            self.base.adapters_changed()
            self.optimizer.drop_gradients()
        metrics = {**_named(measured), "grad_norm": norm, "tokens/trained": fed}
        return StepOutput(metrics, sum(map(answer_tokens, examples)))

    def evaluate(self, when: str, progress: Progress) -> dict[str, Any]:
        """Return TRL's metrics on held-out examples, how often the better answer is the likelier, and the evaluator's.

        ``accuracy`` is the evaluator's, or else the share of pairs whose better answer has the higher reward in the
        trainer's sense. With a reference there is no such share before training: every reward is 0.
        """
        if not self.held_out:
            return {}
        score, say = self.ladder.score, progress.message
        results = _named(score(lambda limits: self._measured(limits, progress), say))
        count, found = len(self.held_out), dict[str, list[float]]()
        headline = ACCURACY if ACCURACY in results else LOSS
        if headline == ACCURACY:  # a share of pairs, as nothing else has it
            found[ACCURACY] = found["rewards/accuracies"] = list(wilson(results[ACCURACY], count))
        if self.kind.reference and not (results.get("rewards/chosen") or results.get("rewards/rejected")):
            results["accuracy"] = None
            found = {}
        if pairs := pairs_among(self.held_out):
            likelier = score(lambda limits: self._likelier(pairs, limits, progress), say)
            results["logps/accuracy"] = likelier
            found["logps/accuracy"] = list(wilson(likelier, len(pairs)))
            headline = "logps/accuracy" if headline == LOSS else headline
        sampled: dict[str, Any] = self.evaluator.evaluate(when, progress) if self.evaluator else {"headline": headline}
        intervals = {**found, **sampled.get("intervals", {})}
        return {**results, **sampled, "problems": count, "intervals": intervals}

    @torch.no_grad()
    def _measured(self, limits: BatchLimits, progress: Progress) -> dict[str, float]:
        rows, model, means = batch_rows(self.held_out, self.kind), self.trainer.model, _Means()
        model.eval()
        done = 0
        for part in self._cut_rows(self.held_out, limits.micro_batch_tokens):
            inputs = self._collated([rows[i] for i in part])
            loss = self.trainer.prediction_step(model, inputs, prediction_loss_only=True)[0]
            logged = self._logged({"eval_loss": float(loss)})
            values = {key.removeprefix("eval_"): value for key, value in logged.items()}
            means.add(values, [self.held_out[i] for i in part])
            done += len(part)
            progress.phase("evaluation", done, len(rows))
        return means.result()

    @torch.no_grad()
    def _likelier(self, pairs: Sequence[Pair], limits: BatchLimits, progress: Progress) -> float:
        """Return the share of pairs whose better answer has the higher mean log-prob of a token."""
        groups = [Group(p.prompt_ids, [p.chosen_ids, p.rejected_ids], [2 * i, 2 * i + 1]) for i, p in enumerate(pairs)]
        means: dict[int, float] = {}

        def shown(done: int, total: int) -> None:
            progress.phase("evaluation", done, total)

        with self.base.role(POLICY):
            for packed in micro_batches(self.base, groups, limits.micro_batch_tokens, shown):
                logps, _ = packed_logprobs(self.base, packed, 1.0, limits.tile, entropy="none")
                each = [float(one.mean()) for one in logps.split(packed.lengths)]
                means.update(zip(packed.rows, each, strict=True))
        means = {row: mean for part in current().gather(means) for row, mean in part.items()}
        return sum(means[2 * i] > means[2 * i + 1] for i in range(len(pairs))) / len(pairs)

    def _cut_rows(self, examples: Sequence[Example], tokens: int) -> list[list[int]]:
        """Cut a batch into micro-batches of at most so many fed tokens, the longest examples first; one always fits.

        Among several processes these are this one's share of the examples.
        """
        padded = self.kind.full_logits or not self.base.packable

        def cost(i: int) -> int:
            once, rows, longest = tokens_of(examples[i])
            return rows * longest if padded else once

        parts: list[list[int]] = []
        room = 0
        own = current().own([cost(i) for i in range(len(examples))])
        for i in sorted(own, key=cost, reverse=True):
            need = cost(parts[-1][0]) if padded and parts else cost(i)  # padded to the longest, the first
            if parts and need <= room:
                parts[-1].append(i)
                room -= need
            else:
                parts.append([i])
                room = tokens - cost(i)
        return parts

    def _collated(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return TRL's batch of these rows on the device."""
        batch = self.trainer.data_collator(rows)
        return {key: x.to(self.base.device) if torch.is_tensor(x) else x for key, x in batch.items()}

    def _logged(self, values: dict[str, float]) -> dict[str, float]:
        """Let TRL add to these values what it measured in the passes since the last time; return all of it."""
        self.trainer.log(values)
        entry = self.trainer.state.log_history.pop()
        return {k: v for k, v in entry.items() if k.removeprefix("eval_") not in (*NOT_MEASURED, "step", "epoch")}


class _Means:
    """Means of what micro-batches (of all processes) measured, over examples, of the entropy over tokens.

    A metric that a micro-batch lacks is the mean of the others.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, float], part: Sequence[Example]) -> None:
        for key, value in values.items():
            count = sum(map(answer_tokens, part)) if key == "entropy" else len(part)
            self.sums[key] = self.sums.get(key, 0.0) + value * count
            self.counts[key] = self.counts.get(key, 0) + count

    def result(self) -> dict[str, float]:
        parts = current().gather((self.sums, self.counts))
        sums, counts = added_up([one for one, _ in parts]), added_up([one for _, one in parts])
        return {key: value / counts[key] for key, value in sums.items()}


def _named(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's metrics, with those that the package has too under its names as well."""
    ours = {"rewards/accuracies": "accuracy", "rewards/margins": "score/margin"}
    return {**metrics, **{name: metrics[key] for key, name in ours.items() if key in metrics}}


def _try_out(trainer: Any, base: SharedBase, rows: list[dict[str, Any]]) -> None:
    """Compute a loss once, before anything is written: some settings TRL looks at only then.

    Raises:
        UserError: TRL cannot compute it.
    """
    batch = {key: x.to(base.device) if torch.is_tensor(x) else x for key, x in trainer.data_collator(rows).items()}
    try:
        with torch.no_grad(), base.role(POLICY):
            trainer.compute_loss(trainer.model, batch)
    except (ValueError, NotImplementedError, NameError) as error:
        raise UserError(f"trl: TRL cannot compute its loss with these settings: {first_sentence(error)}") from error


def make_trl_loop(
    recipe: Recipe,
    plan: Plan,
    base: SharedBase,
    rewards: Sequence[Reward],
    data: TrainingData,
    run_directory: Callable[[Recipe], RunDirectory],
) -> TRLLoop:
    """Return the loop of a recipe with one of TRL's trainers, as `build.make_trainer`.

    Raises:
        UserError: the data or the ``trl:`` section does not suit the trainer.
    """
    train = data.train
    recipe = with_epochs(recipe, len(train))
    kind = TRL_TRAINERS[recipe.algorithm]
    ladder = Ladder.of(plan.settings, base.device, recipe.generation.temperature)
    ladder.explain = explain_shortage(recipe, plan, ladder)
    if recipe.adapter and kind.reference:
        saved = saved_adapter(recipe.adapter, recipe.model, recipe.revision)
        ladder.survive("loading", lambda: base.refer_to(saved), message, sizes=False)
    rows = batch_rows(train[:2], kind)

    def tried() -> Any:
        trainer = make_trainer(recipe, base, rows, plan.settings.logits_tile_tokens)
        _try_out(trainer, base, rows)
        return trainer

    trainer = ladder.survive("scoring", tried, message, sizes=False)
    evaluator = CompletionEvaluator(recipe, plan, base, rewards, data.prompts, ladder) if data.prompts else None
    return TRLLoop(recipe, plan, base, trainer, train, data.held_out, run_directory(recipe), evaluator, ladder)
