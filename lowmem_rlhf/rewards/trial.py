"""A reward tried on texts: no policy is loaded, and of learned rewards only their own model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.errors import explain
from lowmem_rlhf.recipe.kinds import is_text, item_of
from lowmem_rlhf.recipe.sections import REWARD_ADAPTER, REWARD_OPTIONS, RewardConfig
from lowmem_rlhf.recipe.yaml_tree import BadYAML, Scalar, Tree, read_yaml
from lowmem_rlhf.rewards.functions import Completion
from lowmem_rlhf.rewards.loading import Reward, load_rewards, needed_columns
from lowmem_rlhf.rewards.options import options_of, parameters_of
from lowmem_rlhf.rewards.scoring import score
from lowmem_rlhf.rewards.shipped import SHIPPED
from lowmem_rlhf.rewards.trl_rewards import is_trl, trl_factory


@dataclass(frozen=True)
class Trial:
    """What a reward says of texts.

    Attributes:
        values: of each text; None: it does not apply.
        metrics: what it reported with TRL's log_metric.
    """

    reward: str
    texts: list[str]
    values: list[float | None]
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        scored = [{"text": text, "value": value} for text, value in zip(self.texts, self.values, strict=True)]
        return {"reward": self.reward, "scored": scored, "metrics": self.metrics}


def try_reward(
    name: str,
    texts: Sequence[str],
    options: Sequence[str] = (),
    columns: Sequence[str] = (),
    chat: bool = False,
    tokenizer: str | None = None,
) -> Trial:
    """Score texts with one reward.

    Args:
        name: as in a recipe, ``path.py:function`` too.
        texts: the completions; the prompts are empty.
        options: ``KEY=VALUE`` each; the value is read as the option's type asks for.
        columns: ``KEY=VALUE`` each: one for all texts, or a key as often as there are texts; what begins with [ or {
            is YAML, all else a text.
        chat: give the completions as messages and not as plain texts.
        tokenizer: of this model, for rewards that count tokens.

    Raises:
        UserError: there is no such reward, text, option or column; or tokens are needed and no tokenizer is given.
        RunError: the function fails.
    """
    if not texts:
        raise UserError("rewards: no text to score; give one or more with --text TEXT (--text - reads standard input)")
    if name == REWARD_ADAPTER:
        raise UserError(f"rewards: {name} reads a policy's tokens on its base; measure it with `lowmem-rlhf eval RUN`")
    reward = _loaded(name, _keyed(options, "--option"))
    given = _columns(_keyed(columns, "--column"), len(texts))
    for column in (*needed_columns(reward.function), *reward.columns):
        if column not in (*given, *reward.options):
            raise UserError(f"rewards: {reward.name} reads a column {column!r}; give --column {column}=VALUE")
    completions: list[Completion] = [[{"role": "assistant", "content": one}] if chat else one for one in texts]
    prompts = [[{"role": "user", "content": ""}] if chat else ""] * len(texts)
    ids: list[Any] = _tokens(texts, tokenizer) if tokenizer else [_Untokenized(reward.name)] * len(texts)
    scores = score(
        [reward], prompts, completions, ids, given, prompt_ids=[[]] * len(texts), prompt_texts=[""] * len(texts)
    )
    return Trial(reward.name, list(texts), scores.by_name[reward.name], scores.metrics)


def _loaded(name: str, options: Mapping[str, list[str]]) -> Reward:
    if twice := [key for key, values in options.items() if len(values) > 1]:
        raise UserError(f"--option {twice[0]}: given twice; give each option once")
    types = _option_types(name)
    values = {key: _typed(text, types.get(key, Any)) for key, (text,) in options.items()}
    try:
        config = RewardConfig(function=name, options=values)
    except ValidationError as error:
        raise UserError(
            "; ".join(f"rewards: {name}: {line}" for line in explain(error.errors(), RewardConfig))
        ) from None
    return load_rewards([config])[0]


def _option_types(name: str) -> dict[str, Any]:
    """Return the annotation of each option, as far as there is one."""
    if name in REWARD_OPTIONS:
        return {key: one.annotation for key, one in REWARD_OPTIONS[name].model_fields.items()}
    if name in SHIPPED:
        return {key: one.annotation for key, one in options_of(SHIPPED[name]).items()}
    if is_trl(name) and (factory := trl_factory(name)) is not None:
        return {key: one.annotation for key, one in parameters_of(factory).items()}
    return {}


def _typed(text: str, annotation: Any) -> Any:
    """Return the value that a text of the command line means."""
    if is_text(annotation):
        return text
    if item_of(annotation) is str and not text.startswith("["):
        return [one.strip() for one in text.split(",")]
    try:
        return _plain(read_yaml(text), item_of(annotation) is str)
    except BadYAML:
        return text


def _plain(tree: Tree, texts: bool = False) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(one) for key, one in tree.items()}
    if isinstance(tree, list):
        return [_plain(one, texts) for one in tree]
    assert isinstance(tree, Scalar)
    return tree.text if texts else tree.value()


def _keyed(pairs: Sequence[str], flag: str) -> dict[str, list[str]]:
    keyed: dict[str, list[str]] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{flag}: got {pair!r}; give it as KEY=VALUE")
        keyed.setdefault(key.strip(), []).append(value)
    return keyed


def _columns(keyed: Mapping[str, list[str]], count: int) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for key, values in keyed.items():
        if len(values) not in (1, count):
            raise UserError(
                f"--column {key}: given {len(values)} times for {count} texts; give it once, or once for each text"
            )
        read = [_typed(value, Any) if value.startswith(("[", "{")) else value for value in values]
        columns[key] = read * count if len(read) == 1 else read
    return columns


def _tokens(texts: Sequence[str], model: str) -> list[list[int]]:
    from lowmem_rlhf.engine.tokenizer import load_tokens

    tokens = load_tokens(model)
    assert tokens is not None
    return [list(tokens.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


class _Untokenized(Sequence[int]):
    """The token ids of a text where there is no tokenizer: asked for, they are an error."""

    def __init__(self, reward: str) -> None:
        self.reward = reward

    def __len__(self) -> int:
        return self._missing()

    def __getitem__(self, place: Any) -> Any:
        return self._missing()

    def _missing(self) -> NoReturn:
        raise UserError(f"rewards: {self.reward} counts tokens, which needs a tokenizer; give --tokenizer MODEL")
