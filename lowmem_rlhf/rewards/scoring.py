"""Scoring completions: every reward function once for the whole batch, then the weighted sum (`combining`)."""

import copy
import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.files import dumps
from lowmem_rlhf.progress import message
from lowmem_rlhf.rewards.combining import totals
from lowmem_rlhf.rewards.functions import Completion, completion_text
from lowmem_rlhf.rewards.guarded import FunctionFault, finished, guarded, is_memory_fault
from lowmem_rlhf.rewards.loading import GIVEN, TEXTS, Reward, accepted, given_to
from lowmem_rlhf.rewards.process_state import new_threads
from lowmem_rlhf.rollout.scores import Scores

_FLOAT32 = (2 - 2**-23) * 2.0**127  # the largest number of float32, in which rewards are computed with
_SHOWN = 60  # characters of a value in a message


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[list[int]],
    columns: dict[str, list[Any]],
    trainer_state: Any = None,
    prompt_ids: Sequence[Sequence[int]] = (),
    prompt_texts: Sequence[str] = (),
    num_generations: int | None = None,
) -> Scores:
    """Score N completions with every reward function, each of which is given copies.

    One that has a parameter `texts` gets the completions as plain texts there, in place of a column of that name.

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
        num_generations: completions of a prompt, which stand together, for rewards that are normalised; None where
            nothing is learned: none is.

    Where a function does something wrong and its `on_error` is not ``fail``, the completions concerned get None or 0,
    which is said once and counted.

    Raises:
        RunError: a function whose `on_error` is ``fail`` raises, does not return in time, gives another number of
            values than N, or something that is no number of float32; or a sum of rewards is too large to learn from.
        KeyboardInterrupt, UserError, RuntimeError: as of `guarded`; the last one where the device's memory ran out.
    """
    metrics: dict[str, list[float]] = {}
    extra: dict[str, list[Any]] = {}
    lent = {
        "prompts": list(prompts),
        "completions": list(completions),
        "prompt_ids": list(prompt_ids),
        "prompt_texts": list(prompt_texts),
        "completion_ids": list(completion_ids),
        "trainer_state": trainer_state,
    }
    shared = {
        "log_extra": lambda column, values: extra.setdefault(str(column), []).extend(_recordable(v) for v in values),
        "log_metric": lambda name, value: metrics.setdefault(str(name), []).append(float(value)),
    }
    own = {name: values for name, values in columns.items() if name not in GIVEN}
    by_name, failures = {}, {}
    for reward in rewards:
        given = {**own, **reward.options, **lent}
        if TEXTS in given_to(reward.function):
            given[TEXTS] = [completion_text(completion) for completion in completions]
        values, failed = _scored(reward, given, shared, len(completions))
        by_name[reward.name] = values
        if reward.on_error != "fail":
            failures[reward.name] = failed
    total, raw = totals(rewards, by_name, num_generations)
    means = {name: sum(values) / len(values) for name, values in metrics.items()}
    return Scores(by_name, total, means, extra, failures, raw)


def _scored(
    reward: Reward, lent: dict[str, Any], shared: dict[str, Any], count: int
) -> tuple[list[float | None], tuple[int, int]]:
    """Return a function's values, and of how many completions there is none for an error, and for the time limit."""
    record, instead = reward.record, None if reward.on_error == "skip" else 0.0
    record.calls += 1
    try:
        found = _called(reward, lent, shared, count)
    except FunctionFault as fault:
        record.failed += 1
        _accept(reward, fault)
        return [instead] * count, (0, count) if fault.timed_out else (count, 0)
    faults = [value for value in found if isinstance(value, FunctionFault)]
    if faults:
        record.failed += len(faults) == count
        _accept(reward, faults[0])
    return [instead if isinstance(value, FunctionFault) else value for value in found], (len(faults), 0)


def _accept(reward: Reward, fault: FunctionFault) -> None:
    """Say what a function did, the first time, where the run goes on.

    Raises:
        RunError: the run does not.
    """
    if reward.on_error == "fail":
        raise RunError(str(fault)) from fault.__cause__ or fault
    if not reward.record.first_fault:
        what = "are left out of the sum" if reward.on_error == "skip" else "count as 0"
        message(
            f"{fault}; the values that it does not give {what}, as its on_error is {reward.on_error}: this is said "
            f"once, and counted as reward/{reward.name}/errors and reward/{reward.name}/timeouts"
        )
    reward.record.first_fault = reward.record.first_fault or str(fault)


def _called(
    reward: Reward, lent: dict[str, Any], shared: dict[str, Any], count: int
) -> list[float | FunctionFault | None]:
    """Call a function with copies: what it edits is neither trained on nor seen by the next function or step."""
    what = f"reward function {reward.name}"

    def call() -> list[float | FunctionFault | None]:
        copies = {name: _copied(value) for name, value in accepted(reward.function, lent).items()}
        result = reward.function(**copies, **accepted(reward.function, shared))
        return _values(what, finished(result, reward.timeout) if inspect.isawaitable(result) else result, count)

    if reward.learned:
        try:
            return call()
        except RunError as error:
            if is_memory_fault(error):
                raise RunError(f"reward {reward.name}: {error}") from error
            raise FunctionFault(f"reward {reward.name}: {error}") from error
    before = {thread.ident for thread in threading.enumerate()}
    try:
        step = getattr(lent["trainer_state"], "global_step", 0)
        return guarded(call, what, reward.source, reward.timeout, f"{reward.name}/{step}")
    finally:
        if (left := new_threads(before)) and not reward.record.threads_said:
            reward.record.threads_said = True
            message(
                f"{what} has left a thread running ({', '.join(left)}), for which the program waits at its end; let "
                "the function end it, or start it with daemon=True"
            )


def _copied(value: Any) -> Any:
    """Return what shares nothing with a value that one can edit; a list of token ids is copied in one piece."""
    if type(value) is not list:
        return value if isinstance(value, str | int | float | None) else copy.deepcopy(value)
    return value[:] if all(type(one) is int for one in value) else [_copied(one) for one in value]


def _recordable(value: Any) -> Any:
    """Return a value that samples.jsonl can hold: as it is, or as Python shows it."""
    try:
        dumps(value)
    except Exception:  # of any kind of object
        return repr(value)
    return value


def _values(what: str, result: Any, expected: int) -> list[float | FunctionFault | None]:
    """Return the values that a function gives, each a number, None, or what is wrong with it.

    Raises:
        FunctionFault: they are not a list of as many as there are completions.
    """
    single = getattr(result, "shape", None) == ()  # of a tensor or array that holds one number
    if single or isinstance(result, str | bytes | dict) or not hasattr(result, "__iter__"):
        raise FunctionFault(
            f"{what} returned a {type(result).__name__}; it must return a list of {expected} numbers, one a completion"
        )
    # the body of a generator runs here, and one that never ends is not followed for ever
    values = list(islice(result, expected + 1)) if isinstance(result, Iterator) else list(result)
    if len(values) != expected:
        more = "more than " if isinstance(result, Iterator) and len(values) > expected else ""
        counted = expected if more else len(values)
        raise FunctionFault(
            f"{what} returned {more}{counted} values for {expected} completions; it must return one each"
        )
    return [_number(what, index, value) for index, value in enumerate(values)]


def _number(what: str, index: int, value: Any) -> float | FunctionFault | None:
    if value is None:
        return None
    if isinstance(value, FunctionFault):
        return FunctionFault(f"{what}: {value}")
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if abs(number) <= _FLOAT32:
        return number
    shown = repr(value)
    return FunctionFault(
        f"{what} returned {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'} for completion {index + 1}; it "
        f"must return a finite number{' of float32' if math.isfinite(number) else ''}, or None where it does not apply"
    )
