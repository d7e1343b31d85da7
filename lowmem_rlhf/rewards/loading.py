"""From the `rewards` of a recipe to callables: shipped functions and learned rewards by name, the user's own as
``path.py:function``."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.python_objects import is_python, python_object
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import LEARNED_REWARDS, REWARD_ADAPTER, Normalize, OnError, RewardConfig
from lowmem_rlhf.rewards.options import check_options, options_of, parameters_of, unknown_option
from lowmem_rlhf.rewards.process_state import preserved
from lowmem_rlhf.rewards.shipped import FACTORIES, FUNCTIONS, GRADED, SHIPPED
from lowmem_rlhf.rewards.trl_rewards import is_trl, trl_factory, trl_function
from lowmem_rlhf.suggest import did_you_mean
from lowmem_rlhf.user_code import check_callable, file_of, is_user_code, load_function

if TYPE_CHECKING:
    from lowmem_rlhf.rewards.learned import DeviceBudget

# What every reward function is given besides the columns of the data and its own options: TRL's, and `prompt_texts`,
# the prompts as the model read them.
GIVEN = (
    *("prompts", "completions", "prompt_ids", "completion_ids", "prompt_texts"),
    *("trainer_state", "log_extra", "log_metric"),
)
TEXTS = "texts"  # the completions as plain texts, given to functions that name this parameter

# Of messages about a user's function: the recipe's key, what it is and how it is called.
_WORDS = ("rewards", "a reward function", "(prompts, completions, **columns)")
_NAMES = (*SHIPPED, *LEARNED_REWARDS, REWARD_ADAPTER)


@dataclass
class CallRecord:
    """What the calls of a reward function by this process have been.

    Attributes:
        failed: calls that gave no completion a value.
        first_fault: the sentence about the first one; empty: none.
        threads_said: whether threads that it left running were spoken of.
    """

    calls: int = 0
    failed: int = 0
    first_fault: str = ""
    threads_said: bool = False


@dataclass(frozen=True)
class Reward:
    """A reward function with its metric's name, its weight in the total and its options.

    Attributes:
        options: given with every call; a reward that was made of its options has none left.
        columns: columns of the data that it needs besides those its signature names.
        placement: ``device`` and ``reason`` of a learned reward's model.
        timeout, on_error: see `RewardConfig`.
        learned: whether it is a model of this package's, which needs no guard.
        judges_correct: whether a value of at least 1 means that an answer is right; None: nobody says.
        requires: `RewardConfig.gates`.
        normalize: see `RewardConfig`.
        record: of its calls.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    placement: dict[str, str] | None = None
    source: str = ""  # the user's file, as the recipe names it
    timeout: float | None = None
    on_error: OnError = "fail"
    learned: bool = False
    judges_correct: bool | None = None
    requires: dict[str, float | None] = field(default_factory=dict)
    normalize: Normalize = "none"
    record: CallRecord = field(default_factory=CallRecord, compare=False, repr=False)


def load_rewards(
    configs: list[RewardConfig],
    device: str = "cpu",
    free_bytes: int = 0,
    model: str = "",
    revision: str | None = None,
) -> list[Reward]:
    """Load the rewards of a recipe, in its order.

    The file of a ``path.py:function`` is the user's own code and is executed.

    Args:
        configs: the recipe's rewards.
        device: the policy's, where the models of learned rewards lie as well if they fit.
        free_bytes: what the plan leaves there.
        model, revision: the recipe's, which a reward adapter must belong to.

    Raises:
        UserError: unknown name; file absent or failing on import; function absent or not callable; options it does not
            take, lacks or refuses; a model that cannot be loaded or is of another kind.
    """
    if not any(config.function in LEARNED_REWARDS for config in configs):
        return [_load(config, None, model, revision) for config in configs]
    from lowmem_rlhf.rewards.learned import DeviceBudget

    budget = DeviceBudget(device, free_bytes)
    rewards: list[Reward] = []
    for config in configs:  # a model that several tasks judge by is loaded once
        same = next((one for one, other in zip(rewards, configs, strict=False) if _same_model(config, other)), None)
        if same is None:
            rewards.append(_load(config, budget, model, revision))
        else:
            own = replace(same, name=config.name, weight=config.weight, on_error=config.on_error, record=CallRecord())
            rewards.append(replace(own, requires=config.gates, normalize=config.normalize))
    return rewards


def _same_model(one: RewardConfig, other: RewardConfig) -> bool:
    return one.function in LEARNED_REWARDS and (one.function, one.options) == (other.function, other.options)


def rewards_by_task(recipe: Recipe, rewards: Sequence[Reward]) -> dict[str, list[Reward]]:
    """Return the rewards of each task of a recipe (see `Recipe.by_task`), of those that were loaded for all of it."""
    if not recipe.tasks:
        return {"": list(rewards)}
    loaded = list(zip(recipe.rewards, rewards, strict=True))
    return {
        task: [next(reward for config, reward in loaded if config == one) for one in own.rewards]
        for task, own in recipe.by_task.items()
    }


def placements(rewards: Iterable[Reward]) -> dict[str, dict[str, str]]:
    """Return by name where the models of learned rewards lie, and why."""
    return {reward.name: reward.placement for reward in rewards if reward.placement}


def failed_always(rewards: Iterable[Reward]) -> list[str]:
    """Return a sentence for each reward that has failed in every call of this process, with the first fault."""
    return [
        f"reward {reward.name} failed in each of its {reward.record.calls} calls, so nothing was learned from it: "
        f"{reward.record.first_fault}"
        for reward in rewards
        if reward.record.calls and reward.record.failed == reward.record.calls
    ]


def check_reward_columns(rewards: list[Reward], columns: Iterable[str]) -> None:
    """Check before a run that the data has every column that a reward function cannot do without.

    Raises:
        UserError: one is missing; the message names the columns there are.
    """
    columns = list(columns)
    for reward in rewards:
        for name in (*needed_columns(reward.function), *reward.columns):
            if name not in (*columns, *reward.options):
                hint = did_you_mean(name, columns)
                raise UserError(
                    f"rewards: {reward.name} needs a column {name!r}, which the data lacks{hint} "
                    f"(its columns: {', '.join(columns) or 'none'}); data.answer names the column given as 'answer'"
                )


def check_reward_function(function: Any, name: str) -> None:
    """Check that an object can be called as a reward function.

    Raises:
        UserError: it cannot.
    """
    check_callable(function, name, *_WORDS)


def given_to(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names that a reward function is given besides columns and options."""
    return (*GIVEN, TEXTS) if TEXTS in parameters_of(function) else GIVEN


def needed_columns(function: Callable[..., Any]) -> list[str]:
    """Return what a reward function cannot be called without, besides what it is always given: columns, or options."""
    return [
        name
        for name, one in parameters_of(function).items()
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and name not in given_to(function)
    ]


def accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a function takes: all of them when it has ``**kwargs``."""
    parameters = parameters_of(function)
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _load(config: RewardConfig, budget: "DeviceBudget | None", model: str, revision: str | None) -> Reward:
    reward = _alone(config, budget, model, revision)
    return replace(reward, requires=config.gates, normalize=config.normalize)


def _alone(config: RewardConfig, budget: "DeviceBudget | None", model: str, revision: str | None) -> Reward:
    """Return a reward without what it has to do with the others."""
    if config.function in LEARNED_REWARDS:
        return _learned(config, budget)
    if config.function == REWARD_ADAPTER:
        from lowmem_rlhf.rewards.adapter import load_adapter_reward

        adapter = load_adapter_reward(config.name, config.options["adapter"], model, revision)
        return Reward(config.name, adapter, config.weight, on_error=config.on_error, learned=True, judges_correct=False)
    function, options, source = _function(config)
    return Reward(
        config.name,
        function,
        config.weight,
        options,
        columns=getattr(function, "columns", ()) if config.function in FACTORIES else (),
        source=source,
        timeout=config.timeout,
        on_error=config.on_error,
        judges_correct=_judges_correct(config.function, function),
    )


def _judges_correct(name: str, function: Callable[..., Any]) -> bool | None:
    """Return what is known of a shipped function, or what the user's says of itself."""
    if name in SHIPPED:
        return name not in GRADED
    said = getattr(function, "judges_correct", None)
    return said if isinstance(said, bool) else None


def _function(config: RewardConfig) -> tuple[Callable[..., Any], dict[str, Any], str]:
    """Return a function, the options that its calls are given, and the user's file that it stands in."""
    name, options = config.function, dict(config.options)
    if is_trl(name):
        return *_of_trl(config), ""
    if name in FACTORIES:
        check_options(config.name, options_of(FACTORIES[name]), options)
        return _made(config, FACTORIES[name]), {}, ""
    if name in FUNCTIONS:
        _check_shipped(config)
        return FUNCTIONS[name], options, ""
    if is_python(name):
        function = python_object(name, "rewards")
        source = file_of(function)
    elif is_user_code(name):
        with preserved(path=False):
            function = load_function(name, *_WORDS)
        source = name.rpartition(":")[0]
    else:
        raise UserError(
            f"rewards: got {name!r}; give path.py:function or one of {', '.join(_NAMES)}{did_you_mean(name, _NAMES)}"
        )
    _check_users(config, function)
    return function, options, source


def _of_trl(config: RewardConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a function of TRL's, and the options that its calls are given."""
    factory = trl_factory(config.function)
    if factory is not None:
        check_options(config.name, parameters_of(factory), config.options)
        return _made(config, lambda **options: trl_function(config.function, options)), {}
    function = trl_function(config.function, {})
    optional = {
        name: one for name, one in parameters_of(function).items() if name not in GIVEN and one.default is not one.empty
    }
    check_options(config.name, optional, config.options)
    return function, dict(config.options)


def _made(config: RewardConfig, factory: Callable[..., Any]) -> Callable[..., Any]:
    try:
        return factory(**config.options)  # type: ignore[no-any-return]
    except ValueError as error:
        raise UserError(f"rewards: {config.name}: option {error}") from error


def _learned(config: RewardConfig, budget: "DeviceBudget | None") -> Reward:
    from lowmem_rlhf.rewards.learned import load_learned

    assert budget is not None
    function, device, reason = load_learned(config, budget)
    placement = {"model": config.options["model"], "device": device, "reason": reason}
    return Reward(
        config.name,
        function,
        config.weight,
        columns=function.columns,
        placement=placement,
        on_error=config.on_error,
        learned=True,
        judges_correct=False,
    )


def _check_users(config: RewardConfig, function: Callable[..., Any]) -> None:
    """Check that a user's function takes its options."""
    parameters = parameters_of(function)
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    given = given_to(function)
    allowed = [name for name in parameters if name not in given]
    for name in config.options:
        if name in given or (not anything and name not in allowed):
            raise unknown_option(config.name, name, allowed)


def _check_shipped(config: RewardConfig) -> None:
    """Check the options of a shipped function: its parameters that are given by keyword only."""
    function = FUNCTIONS[config.function]
    only = options_of(function)
    check_options(config.name, only, config.options)
    try:  # shipped functions check their options first, and accept a batch without completions
        empty: dict[str, list[Any]] = {
            name: [] for name in ("completions", "completion_ids", *needed_columns(function)) if name not in only
        }
        function(**empty, **config.options)
    except ValueError as error:
        raise UserError(f"rewards: {config.name}: option {error}") from error
