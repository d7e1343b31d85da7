"""Scoring completions: every reward function once for the whole batch, then the weighted sum."""

import asyncio
import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lowmem_rlhf.errors import LowmemError, RunError
from lowmem_rlhf.rewards.functions import Completion
from lowmem_rlhf.rewards.loading import GIVEN, Reward, accepted
from lowmem_rlhf.rollout.scores import Scores
from lowmem_rlhf.user_code import describe, line_in


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[list[int]],
    columns: dict[str, list[Any]],
    trainer_state: Any = None,
    prompt_ids: Sequence[Sequence[int]] = (),
    prompt_texts: Sequence[str] = (),
) -> Scores:
    """Score N completions with every reward function, each of which is given copies.

    A function that gives None for a completion is left out of its sum. Where every function gives None the total is
    NaN, as in TRL 1.16: such a completion is left out of its group's baseline and its advantage is 0.

    Args:
        rewards: the functions.
        prompts: (N,) what each completion answers: messages or texts.
        completions: (N,) lists of one assistant message for chat prompts, otherwise texts.
        completion_ids: (N,) token ids of each completion.
        columns: each column of the data, N values.
        trainer_state: given to the functions under this name (TRL's has `global_step`).
        prompt_ids: (N,) token ids of each prompt.
        prompt_texts: (N,) each prompt as the model read it, its chat template's tokens written out.

    Raises:
        RunError: a function raises, gives another number of values than N, or gives something that is not a number.
    """
    metrics: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}
    lent = {
        "prompts": list(prompts),
        "completions": list(completions),
        "prompt_ids": list(prompt_ids),
        "prompt_texts": list(prompt_texts),
        "completion_ids": list(completion_ids),
    }
    shared = {
        "trainer_state": trainer_state,
        "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
        "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
    }
    own = {name: values for name, values in columns.items() if name not in GIVEN}
    by_name = {}
    for reward in rewards:
        result = _call(reward, {**own, **reward.options, **lent}, shared)
        by_name[reward.name] = _values(reward.name, result, len(completions))
    weights = [reward.weight for reward in rewards]
    total = [_weighted(weights, row) for row in zip(*by_name.values(), strict=True)]
    return Scores(by_name, total, {name: sum(values) / len(values) for name, values in metrics.items()}, extra)


def _call(reward: Reward, lent: dict[str, Any], shared: dict[str, Any]) -> Any:
    """Call a function with copies: what it edits is neither trained on nor seen by the next function or step."""
    try:
        copies = {name: _copied(value) for name, value in accepted(reward.function, lent).items()}
        result = reward.function(**copies, **accepted(reward.function, shared))
        if inspect.isawaitable(result):
            result = _finished(result)
        return list(result) if isinstance(result, Iterator) else result  # the body of a generator runs here
    except RunError as error:
        raise RunError(f"reward {reward.name}: {error}") from error
    except LowmemError:
        raise
    except (Exception, SystemExit) as error:
        line = line_in(error, reward.source)
        place = "" if line is None else f" in {reward.source}, line {line}"
        raise RunError(f"reward function {reward.name} failed{place}: {describe(error)}") from error


def _copied(value: Any) -> Any:
    """Return what shares nothing with a value that one can edit; a list of token ids is copied in one piece."""
    if type(value) is not list:
        return value if isinstance(value, str | int | float | None) else copy.deepcopy(value)
    return value[:] if all(type(one) is int for one in value) else [_copied(one) for one in value]


def _finished(result: Any) -> Any:
    """Return what an asynchronous function gives; where a loop runs already (as in a notebook), in a thread."""

    async def awaited() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, awaited()).result()


def _values(name: str, result: Any, expected: int) -> list[float | None]:
    single = getattr(result, "shape", None) == ()  # of a tensor or array that holds one number
    if single or isinstance(result, str | bytes | dict) or not hasattr(result, "__iter__"):
        raise RunError(
            f"reward function {name} returned a {type(result).__name__}; it must return a list of {expected} numbers, "
            "one a completion"
        )
    values = list(result)
    if len(values) != expected:
        raise RunError(
            f"reward function {name} returned {len(values)} values for {expected} completions; it must return one each"
        )
    return [_number(name, index, value) for index, value in enumerate(values)]


def _number(name: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RunError(
            f"reward function {name} returned {value!r} for completion {index + 1}; it must return a finite number, or "
            "None where it does not apply"
        )
    return number


def _weighted(weights: list[float], row: tuple[float | None, ...]) -> float:
    parts = [weight * value for weight, value in zip(weights, row, strict=True) if value is not None]
    return math.fsum(parts) if parts else math.nan
