"""What a step tells: the rows of metrics.jsonl and samples.jsonl."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.training.dynamic_sampling import groups_apart
from lowmem_rlhf.training.evaluate import mean


@dataclass(frozen=True)
class Seen:
    """Completions of a run, and how many ended by themselves, got a reward, and have an unlike one in their group.

    Of those that were cut, ``cut_with_advantage`` had an advantage and an unlike one in their group; ``judged_apart``
    are those whose group has different rewards.
    """

    completions: int = 0
    ended: int = 0
    rewarded: int = 0
    unlike: int = 0
    judged_apart: int = 0
    cut_with_advantage: int = 0

    def with_rollout(self, rollout: Rollout) -> "Seen":
        """Return the counts with those of one more step."""
        alike = all_alike(rollout)
        rows = zip(rollout.completions, rollout.known_advantages, alike, strict=True)
        return Seen(
            self.completions + len(rollout.completions),
            self.ended + sum(not one.truncated for one in rollout.completions),
            self.rewarded + sum(total == total for total in rollout.scored.total),
            self.unlike + sum(not one for one in alike),
            self.judged_apart + sum(groups_apart(rollout)) * rollout.num_generations,
            self.cut_with_advantage + sum(c.truncated and bool(value) and not same for c, value, same in rows),
        )

    def why_nothing(self, max_completion_length: int, failed: Sequence[str] = (), cut_are_masked: bool = False) -> str:
        """Return why nothing was learned, where that shows here; empty where it does not.

        Args:
            failed: a sentence for each reward that failed in all of its calls.
            cut_are_masked: nothing is learned from completions that were cut.
        """
        masked = self.cut_with_advantage if cut_are_masked else 0
        no_cause = self.rewarded and self.ended and self.unlike and not masked and not failed
        if not self.completions or no_cause:
            return ""
        reasons, remedies = list(failed), ["mend the function"] if failed else []
        if not self.rewarded and not failed:
            reasons.append("no reward applied to any completion (reward/mean is null in every step)")
            remedies.append("look at the reward functions and at the reference answers that they are given")
        if not self.ended:
            reasons.append(f"every completion was cut at {max_completion_length} tokens before it had ended")
            remedies.append("raise generation.max_completion_length")
        if not self.unlike:
            reasons.append("all completions of each prompt were the same text, so that none is better than the others")
            remedies.append("raise generation.temperature, or take a model that knows more than one answer")
        if self.ended and masked:
            reasons.append(
                f"every completion with an advantage was cut at {max_completion_length} tokens, and such completions "
                "were left out (grpo.mask_truncated_completions)"
            )
            remedies.append("raise generation.max_completion_length, or set grpo.mask_truncated_completions=false")
        why = ", and ".join(reasons)
        return f"nothing was learned: {why}; look at samples.jsonl; {', and '.join(remedies)}"


def all_alike(rollout: Rollout) -> list[bool]:
    """Return of each completion whether all of its prompt's completions have the same tokens, and there are several.

    Whatever their rewards: advantages of a group that sum to zero then cancel in the gradient.
    """
    group = rollout.num_generations
    alike: list[bool] = []
    for start in range(0, len(rollout.completions), group):
        first, *others = (one.ids for one in rollout.completions[start : start + group])
        alike += [bool(others) and all(ids == first for ids in others)] * group
    return alike


def most_common(rollout: Rollout) -> float | None:
    """Return the share of the completions that have the commonest one's tokens; None where there is one prompt only."""
    if len({tuple(prompt) for prompt in rollout.prompts}) < 2:
        return None
    counts = Counter(tuple(one.ids) for one in rollout.completions)
    return counts.most_common(1)[0][1] / len(rollout.completions)


def silent_rewards(rollout: Rollout) -> list[str]:
    """Return a sentence for each reward that applied to no completion of the run's first step, and did not fail."""
    return [
        f"reward {name} gave None for all {len(values)} completions of step 1, so it applied to none; look at what "
        "the function returns and at the columns that it reads"
        for name, values in rollout.scored.by_name.items()
        if values and all(value is None for value in values) and not any(rollout.scored.failures.get(name, ()))
    ]


def rollout_metrics(rollout: Rollout) -> dict[str, Any]:
    """Return rewards, lengths, and the share of groups whose completions all got the same reward.

    Those of each task in this step are behind ``task/NAME/``, with its ``prompts``.
    """
    metrics = _of_all(rollout)
    for task in dict.fromkeys(rollout.tasks or ()):
        own = rollout.of_task(task)
        told = {name: value for name, value in _of_all(own).items() if value is not None}  # not of others' rewards
        metrics |= {f"task/{task}/{name}": value for name, value in told.items()}
        metrics[f"task/{task}/prompts"] = len(own.prompts)
    return metrics


def _of_all(rollout: Rollout) -> dict[str, Any]:
    scores, completions = rollout.scored, rollout.completions
    totals = torch.tensor([t for t in scores.raw_total if t == t], dtype=torch.float32, device="cpu")
    lengths = [len(c.ids) for c in completions]
    with_signal = {row // rollout.num_generations for row, value in enumerate(rollout.known_advantages) if value}
    own = {
        "reward/mean": float(totals.mean()) if len(totals) else None,
        "reward/std": float(totals.std()) if len(totals) > 1 else 0.0,
        **{f"reward/{name}": mean(values) for name, values in scores.by_name.items()},
        **{f"reward/{name}/errors": errors for name, (errors, _) in scores.failures.items()},
        **{f"reward/{name}/timeouts": timeouts for name, (_, timeouts) in scores.failures.items()},
    }
    return {
        **own,
        **{name: value for name, value in scores.metrics.items() if name not in (*own, "step")},
        "prompt/mean_length": sum(len(prompt) for prompt in rollout.prompts) / len(rollout.prompts),
        "completion/mean_length": sum(lengths) / len(lengths),
        "completion/truncated": sum(c.truncated for c in completions) / len(lengths),
        "completion/most_common": most_common(rollout),
        "groups/without_signal": 1 - len(with_signal) / len(rollout.prompts),
        "tokens/generated": sum(lengths),
    }


def sampling_difference(rollout: Rollout, logps: dict[int, torch.Tensor]) -> float | None:
    """Mean absolute difference of the tokens' log-probs between sampling and the training pass."""
    total, count = 0.0, 0
    for row, trained in logps.items():
        sampled = torch.tensor(rollout.completions[row].logps, dtype=torch.float32, device=trained.device)
        total += float((trained - sampled).abs().sum())
        count += len(sampled)
    return total / count if count else None


def extremes(rollout: Rollout) -> list[dict[str, Any]]:
    """Return the completions of the highest and the lowest reward with their prompts; none where nothing was rewarded.

    Each has ``prompt`` (of messages the last one's text), ``completion`` and ``reward``.
    """
    assert rollout.questions is not None and rollout.texts is not None
    totals = rollout.scored.raw_total
    rows = [row for row, total in enumerate(totals) if total == total]
    if not rows:
        return []
    found = []
    for row in (max(rows, key=totals.__getitem__), min(reversed(rows), key=totals.__getitem__)):  # two, of equals
        question = rollout.questions[row // rollout.num_generations]
        prompt = question if isinstance(question, str) else question[-1].get("content")
        found.append({"prompt": str(prompt), "completion": rollout.texts[row], "reward": totals[row]})
    return found


def samples(rollout: Rollout, prompts: int) -> list[dict[str, Any]]:
    """Return the first completion of each of the first few prompts, with its numbers."""
    assert rollout.questions is not None and rollout.texts is not None
    group, scores = rollout.num_generations, rollout.scored
    rows = [
        {
            "prompt": rollout.questions[row // group],
            "completion": rollout.texts[row],
            "rewards": {name: values[row] for name, values in scores.by_name.items()},
            "advantage": rollout.known_advantages[row],
            "tokens": len(rollout.completions[row].ids),
            "truncated": rollout.completions[row].truncated,
            **({"task": rollout.tasks[row // group]} if rollout.tasks else {}),
        }
        for row in range(0, len(rollout.completions), group)[:prompts]
    ]
    for row, told in zip(range(0, len(rollout.completions), group), rows, strict=False):
        known = [name for name, values in scores.extra.items() if len(values) == len(rollout.texts)]
        told.update({name: scores.extra[name][row] for name in known if name not in (*told, "step")})
    return rows
