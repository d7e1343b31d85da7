"""Generated tasks: `arithmetic`, and the tasks of the optional package reasoning-gym.

Training and held-out problems are disjoint by construction, and both depend on (options, seed) alone; the held-out ones
do not change with the number of training problems.
"""

import random
from dataclasses import dataclass, fields
from typing import Any, Literal

from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.recipe.data_sources import ARITHMETIC, REASONING_GYM
from lowmem_rlhf.suggest import did_you_mean

Row = dict[str, Any]
Split = Literal["train", "eval"]

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
ARITHMETIC_ROWS = 10_000  # problems trained on when data.train_size is absent and there are more
REASONING_GYM_ROWS = 2_000
_ATTEMPTS = 4  # reasoning-gym: problems generated for each one asked for, before its task counts as exhausted


def generate(
    source: str, options: dict[str, Any], split: Split, seed: int, train_size: int | None, eval_size: int
) -> list[Row]:
    """Return the problems of one split; the other split never holds any of them.

    Args:
        source: ``arithmetic`` or ``reasoning_gym/TASK``.
        options: the task's own options.
        split: ``train``, or ``eval`` for the ``eval_size`` held-out problems.
        seed: chooses the problems of both splits.
        train_size: number of training problems at most; None: up to 10,000 (arithmetic) or 2,000 (reasoning-gym).
        eval_size: number of held-out problems.

    Raises:
        UserError: unknown task or options, too few problems for ``eval_size``, or reasoning-gym is not installed.
    """
    if source == ARITHMETIC:
        return _arithmetic(_arithmetic_options(options), split, seed, train_size or ARITHMETIC_ROWS, eval_size)
    task = source.removeprefix(REASONING_GYM)
    return _reasoning_gym(task, options, split, seed, train_size or REASONING_GYM_ROWS, eval_size)


@dataclass(frozen=True)
class ArithmeticOptions:
    """Which problems there are: every (operation, a, b) with both numbers in [low, high]."""

    operations: tuple[str, ...] = ("+",)
    low: int = 1
    high: int = 20

    @property
    def count(self) -> int:
        """The number of different problems."""
        return len(self.operations) * (self.high - self.low + 1) ** 2

    def problem(self, index: int) -> Row:
        """Return problem number ``index`` in 0..count-1 as a row, for example ``3 + 5`` with answer ``8``."""
        span = self.high - self.low + 1
        rest, b = divmod(index, span)
        operation, a = divmod(rest, span)
        sign, a, b = self.operations[operation], a + self.low, b + self.low
        return {"question": f"{a} {sign} {b}", "answer": str(OPERATIONS[sign](a, b))}


def _arithmetic_options(options: dict[str, Any]) -> ArithmeticOptions:
    _check_names(options, [field.name for field in fields(ArithmeticOptions)], ARITHMETIC)
    values = dict(options)
    operations = values.get("operations", ["+"])
    operations = [operations] if isinstance(operations, str) else operations
    if not isinstance(operations, list | tuple) or not operations or any(sign not in OPERATIONS for sign in operations):
        raise UserError(
            f"data.options.operations: got {values.get('operations')!r}; give a list of one or more of "
            f"{', '.join(repr(sign) for sign in OPERATIONS)}"
        )
    values["operations"] = tuple(dict.fromkeys(operations))
    for name in ("low", "high"):
        if name in values and (isinstance(values[name], bool) or not isinstance(values[name], int)):
            raise UserError(f"data.options.{name}: got {values[name]!r}; give a whole number")
    made = ArithmeticOptions(**values)
    if made.low > made.high:
        raise UserError(f"data.options: low is {made.low} and high is {made.high}; low must not be above high")
    return made


def _arithmetic(task: ArithmeticOptions, split: Split, seed: int, train_size: int, eval_size: int) -> list[Row]:
    if 2 * eval_size > task.count:
        raise UserError(
            f"data.eval_size: got {eval_size}, but these arithmetic options give {task.count} different problems and "
            f"at most half of them can be held out; set data.eval_size={task.count // 2} or less, or widen low and high"
        )
    held_out = random.Random(f"arithmetic/eval/{seed}").sample(range(task.count), eval_size)
    if split == "eval":
        return [task.problem(index) for index in held_out]
    hidden = set(held_out)
    candidates = min(task.count, train_size + eval_size)
    drawn = random.Random(f"arithmetic/train/{seed}").sample(range(task.count), candidates)
    return [task.problem(index) for index in drawn if index not in hidden][:train_size]


def reasoning_gym_task(task: str, options: dict[str, Any], size: int = 1, seed: int = 0) -> Any:
    """Return reasoning-gym's data set of ``size`` problems of a task; it also carries the task's ``score_answer``.

    Raises:
        UserError: reasoning-gym is not installed, or does not know the task or its options.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"data.train: {REASONING_GYM}{task} needs the package reasoning-gym, which is not installed; "
            "run: pip install reasoning-gym"
        ) from error
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(
            f"data.train: {task!r} is no task of reasoning-gym {reasoning_gym.__version__}"
            f"{did_you_mean(task, DATASETS)} (it has {len(DATASETS)}, for example {', '.join(sorted(DATASETS)[:5])})"
        )
    names = [field.name for field in fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    _check_names(options, names, REASONING_GYM + task)
    try:
        return reasoning_gym.create_dataset(task, **options, size=size, seed=seed)
    except Exception as error:
        reason = one_line(error)
        raise UserError(f"data.options: {REASONING_GYM}{task} refuses {options}: {reason}") from error


def _reasoning_gym(
    task: str, options: dict[str, Any], split: Split, seed: int, train_size: int, eval_size: int
) -> list[Row]:
    held_out = _distinct(task, options, f"eval/{seed}", eval_size, hidden=set())
    if len(held_out) < eval_size:
        raise UserError(
            f"data.eval_size: got {eval_size}, but {REASONING_GYM}{task} gave only {len(held_out)} different problems "
            f"with these options; set data.eval_size={len(held_out) // 2} or less, or make the options wider"
        )
    if split == "eval":
        return held_out
    rows = _distinct(task, options, f"train/{seed}", train_size, hidden={row["question"] for row in held_out})
    if not rows:
        raise UserError(
            f"data.eval_size: got {eval_size}, which holds out every problem that {REASONING_GYM}{task} gives with "
            f"these options; set data.eval_size={eval_size // 2} or less, or make the options wider"
        )
    return rows


def _distinct(task: str, options: dict[str, Any], stream: str, size: int, hidden: set[str]) -> list[Row]:
    seed = random.Random(f"{REASONING_GYM}{task}/{stream}").randrange(2**31)
    problems = reasoning_gym_task(task, options, size=max(1, _ATTEMPTS * size), seed=seed)
    rows: list[Row] = []
    seen = set(hidden)
    for index in range(_ATTEMPTS * size):
        if len(rows) == size:
            break
        entry = problems[index]
        if entry["question"] not in seen:
            seen.add(entry["question"])
            row = {"question": entry["question"], "answer": entry["answer"]}
            rows.append({**row, "task": task, "task_options": options, "entry": entry})
    return rows


def _check_names(options: dict[str, Any], allowed: list[str], source: str) -> None:
    for name in options:
        if name not in allowed:
            raise UserError(
                f"data.options.{name}: {source} has no such option{did_you_mean(name, allowed)} "
                f"(allowed: {', '.join(allowed)})"
            )
