"""The held-out results of a run while it goes on: when the next are due, which are the best, when the run ends early.

Everything follows from the rows in evaluation.json, so a resumed run stands where it stood.
"""

from collections.abc import Sequence
from typing import Any

from lowmem_rlhf.display.format import in_words, with_interval
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.held_out import (
    AFTER,
    BEFORE,
    BEST,
    COUNTS,
    DURING,
    STOPPED,
    best_of,
    during,
    headline,
    no_better_than_before,
    part,
    without_gain,
)
from lowmem_rlhf.suggest import did_you_mean


class HeldOut:
    """evaluation.json of a run that is under way.

    Args:
        recipe: of the run.
        run: where the results are written.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory) -> None:
        self._recipe, self._wanted, self._run = recipe, recipe.evaluation, run
        self._total = recipe.training.max_steps
        self.results: dict[str, Any] = {}

    def begin(self) -> None:
        """Read what there is."""
        self.results = self._run.evaluation()

    @property
    def remark(self) -> str:
        """What is to be said before the first step; empty for nothing."""
        every = self._wanted.steps
        if every is None or every <= self._total:
            return ""
        return f"evaluation.steps: {every} is more than the run's {self._total} steps, so only its ends are evaluated"

    def due(self, step: int) -> bool:
        """Whether an evaluation belongs after a step and is not there yet."""
        every = self._wanted.steps
        return every is not None and step > 0 and step % every == 0 and self.row(step) is None

    def row(self, step: int) -> dict[str, Any] | None:
        """Return the row of the evaluation after a step; None: there is none."""
        return next((row for row in during(self.results) if row["step"] == step), None)

    def add(self, when: str, results: dict[str, Any], step: int) -> bool:
        """Take an evaluation in; it is on the disk with the next `write`.

        Args:
            when: ``before``, ``during`` or ``after``.
            results: measures by name.
            step: the steps done.

        Returns:
            Whether it is the best one so far, and is to be kept.

        Raises:
            UserError: it lacks the measure that the recipe asks for.
        """
        results = self._with_headline(results)
        if self._wanted.steps is not None:
            results = {"step": step, **results}
        if when == DURING:
            self.results[DURING] = [*during(self.results), results]
        else:
            self.results[when] = results
        best = best_of(self.results, self._wanted) if self._wanted.keep_best else None
        if best is not None:
            self.results[BEST] = best
        return best is not None and best["step"] == step

    def write(self) -> None:
        """Write the results."""
        self._run.write_evaluation(self.results)

    def shown(self, step: int) -> str:
        """Return the evaluation after a step as a sentence."""
        row, name = self.row(step) or {}, headline(self.results)
        best = self.results.get(BEST) or {}
        return f"after step {step}: held-out {in_words(name)} {with_interval(row, name)}" + (
            ", the best so far" if best.get("step") == step else ""
        )

    def shown_before(self) -> str:
        """Return the evaluation before the first step as a sentence."""
        name = headline(self.results)
        return f"before training: held-out {in_words(name)} {with_interval(part(self.results, BEFORE), name)}"

    def ends(self, step: int) -> str:
        """Return why the run ends after a step that is not its last; empty where it goes on."""
        wanted = self._wanted
        if wanted.patience is None or step >= self._total or without_gain(self._moved(), wanted) < wanted.patience:
            return ""
        best = best_of(self.results, wanted)
        reached = f" (the best was {best['value']:.4g}, after step {best['step']})" if best else ""
        evaluations = "the last evaluation" if wanted.patience == 1 else f"the last {wanted.patience} evaluations"
        by = f" by more than {wanted.min_delta:g}" if wanted.min_delta else ""
        return (
            f"{evaluations} did not improve the held-out {in_words(headline(self.results))}{by}{reached}, so the run "
            f"ends after step {step} of {self._total}, as evaluation.patience={wanted.patience} asks"
        )

    def _moved(self) -> dict[str, Any]:
        """Return the evaluations of a policy that has moved: a critic may learn alone first."""
        still = self._recipe.spec.critic_warmup(self._recipe)
        return {**self.results, DURING: [row for row in during(self.results) if row["step"] > still]}

    def end(self, results: dict[str, Any], step: int) -> None:
        """Take the last evaluation in, and why the run ended early if it did."""
        self.add(AFTER, {key: value for key, value in results.items() if key != "step"}, step)
        self.results.pop(STOPPED, None)
        if sentence := self.ends(step):
            self.results[STOPPED] = sentence

    def summary(self) -> str:
        """Return which evaluation was the best, and whether its checkpoint is there; empty where none is to be kept."""
        best = self.results.get(BEST)
        if best is None:
            return ""
        kept = "is kept (--step best takes it)" if best["step"] in dict(self._run.checkpoints()) else "was not kept"
        text = (
            f"the best held-out {in_words(best['metric'])} was {best['value']:.4g}, after step {best['step']}; its "
            f"checkpoint {kept}"
        )
        if no_better_than_before(self.results, best, self._wanted):
            text += ", though it is not better than before training"
        return text

    def _with_headline(self, results: dict[str, Any]) -> dict[str, Any]:
        if self._wanted.metric == "auto":
            return results
        check_metric(self._recipe, [key for key in results if key not in ("headline", "intervals", "tasks", *COUNTS)])
        return {**results, "headline": self._wanted.metric}


def check_metric(recipe: Recipe, known: Sequence[str]) -> None:
    """Check that what evaluations are compared by is among what they measure.

    Raises:
        UserError: it is not.
    """
    name = recipe.evaluation.metric
    if name != "auto" and name not in known:
        raise UserError(
            f"evaluation.metric: got {name!r}; what this run measures is {', '.join(known)}{did_you_mean(name, known)}"
        )
