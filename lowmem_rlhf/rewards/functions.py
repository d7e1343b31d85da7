"""The reward functions that ship with the package. Their signature is TRL's: ``f(prompts, completions, **columns)``.

Each takes chat completions (lists of messages) and plain ones (texts), gives one value a completion, or None where it
does not apply, and never raises on odd text. Keyword-only arguments other than columns are the options of
`rewards[].options`.
"""

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from lowmem_rlhf.data.values import is_missing, text_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.rewards.answers import is_answer, same_value, stated_answer
from lowmem_rlhf.rewards.evaluated_answers import is_evaluable
from lowmem_rlhf.rewards.time_limit import TimeLimitExceeded, limited

Completion = str | list[dict[str, Any]]
_OPENED = "<think>"
_SECONDS = 30.0  # for the scoring of one answer by reasoning-gym


def completion_text(completion: Completion) -> str:
    """Return the text of a completion: of its messages one after another, or of a plain one as it is."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def arithmetic_answer(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the answer that a completion states (see `stated_answer`) has the value of `answer`, otherwise 0.0."""
    return [_matches(one, reference_text(reference)) for one, reference in zip(completions, answer, strict=True)]


def gsm8k_answer(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the stated answer has the value after ``####`` in `answer`, otherwise 0.0.

    An `answer` without ``####`` is the value itself. The format is GSM8K's (arXiv 2110.14168).
    """
    return [_matches(one, gsm8k_value(reference)) for one, reference in zip(completions, answer, strict=True)]


def reference_text(value: Any) -> str | None:
    """Return the text of a reference that answers can be compared with, as in the file; None where there is none."""
    text = None if is_missing(value) else text_of(value)
    return text if is_answer(text) else None


def gsm8k_value(value: Any) -> str | None:
    """Return what stands behind ``####`` in a reference, or the reference itself, as `reference_text` does."""
    return reference_text(value.rpartition("####")[2].strip() if isinstance(value, str) else value)


def _matches(completion: Completion, reference: str | None) -> float | None:
    if reference is None:
        return None
    return float(same_value(reference, stated_answer(completion_text(completion))))


def think_format(
    completions: Sequence[Completion], prompt_texts: Sequence[str] = (), prompts: Sequence[Any] = (), **columns: Any
) -> list[float | None]:
    """1.0 where the answer is ``<think>reasoning</think>answer``, otherwise 0.0: TRL's `think_format_reward`.

    What the prompt has of the answer counts: a tag that it opens, as some chat templates do, or an answer that it ends
    in and that the completion goes on with.
    """
    from trl.rewards import think_format_reward

    before = begun_answers(len(completions), prompt_texts, prompts, _OPENED)
    texts = [begun + completion_text(one) for begun, one in zip(before, completions, strict=True)]
    return list(think_format_reward([[{"role": "assistant", "content": text}] for text in texts]))


def begun_answers(count: int, prompt_texts: Sequence[str], prompts: Sequence[Any], opened: str) -> list[str]:
    """Return the parts of N answers that stand in their prompts already.

    Args:
        count: N.
        prompt_texts, prompts: (N,) as rewards get them, or empty.
        opened: the tag that a chat template may end in, such as ``<think>``.
    """
    none = [""] * count
    return [_begun(*one, opened) for one in zip(prompt_texts or none, prompts or none, strict=True)]


def _begun(text: str, prompt: Any, opened: str) -> str:
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        return completion_text(prompt[-1:])
    return opened if text.rstrip().endswith(opened) else ""


def length(
    completions: Sequence[Completion],
    completion_ids: Sequence[list[int]],
    *,
    target: float,
    unit: Literal["tokens", "characters"] = "tokens",
    prefer: Literal["near", "below"] = "near",
    **columns: Any,
) -> list[float | None]:
    """1.0 at the target length, falling in a straight line to 0.0 at twice the target.

    Args:
        target: the length, in units.
        unit: count tokens, or characters of the text.
        prefer: ``near``: shorter ones lose as much as longer ones; ``below``: shorter ones keep 1.0.

    Raises:
        ValueError: an option has a value that is not allowed.
    """
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < math.inf:
        raise ValueError(f"target: got {target!r}; give a number above 0")
    if unit not in ("tokens", "characters"):
        raise ValueError(f"unit: got {unit!r}; give 'tokens' or 'characters'")
    if prefer not in ("near", "below"):
        raise ValueError(f"prefer: got {prefer!r}; give 'near' or 'below'")
    counted: Sequence[Any] = (
        completion_ids if unit == "tokens" else [completion_text(completion) for completion in completions]
    )
    over = [len(one) - target for one in counted]
    return [max(0.0, 1.0 - (max(0, n) if prefer == "below" else abs(n)) / target) for n in over]


def reasoning_gym_answer(
    completions: Sequence[Completion],
    task: list[str],
    task_options: list[dict[str, Any]],
    entry: list[dict[str, Any]],
    **columns: Any,
) -> list[float | None]:
    """The task's own score, 0.0 to 1.0, of what stands in the last ``<answer>...</answer>``, or of the whole answer.

    Reasoning up to ``</think>`` is not looked at. A text that the task's scoring cannot read scores 0.0, as does one
    that it would compute too long (see `evaluated_answers`). The columns are those of `data.train: reasoning_gym/TASK`.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    scores: list[float | None] = []
    for completion, name, options, problem in zip(completions, task, task_options, entry, strict=True):
        scorer = _scorer(name, json.dumps(options, sort_keys=True))
        scores.append(_score_of(scorer, name, _answer_part(completion_text(completion)), problem))
    return scores


def _score_of(scorer: Any, task: str, answer: str, problem: dict[str, Any]) -> float:
    if not is_evaluable(task, answer):
        return 0.0
    try:
        return float(limited(lambda: scorer.score_answer(answer, problem), _SECONDS, f"the scoring of {task}"))
    except (Exception, SystemExit, TimeLimitExceeded):  # some tasks' scoring fails on text that is not in their form
        return 0.0


def reads_problem(task: Any, task_options: Any, entry: Any) -> bool:
    """Whether `reasoning_gym_answer` can score answers to a problem: it can score the problem's own.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    if not (isinstance(task, str) and isinstance(task_options, dict) and isinstance(entry, dict)):
        return False
    try:
        scorer = _scorer(task, json.dumps(task_options, sort_keys=True))
        return math.isfinite(float(scorer.score_answer(str(entry.get("answer")), entry)))
    except UserError:
        raise
    except Exception:  # an entry of another task or version
        return False


@lru_cache(maxsize=8)
def _scorer(task: str, options: str) -> Any:
    from lowmem_rlhf.data.tasks import reasoning_gym_task

    return reasoning_gym_task(task, json.loads(options))


def _answer_part(text: str) -> str:
    text = text.rpartition("</think>")[2]
    opened = text.rpartition("<answer>")
    return (opened[2].partition("</answer>")[0] if opened[1] else text).strip()
