"""The schema of a recipe: what a run is, in one YAML file. Loads without torch.

Hyper-parameters carry TRL's names. ``auto`` leaves a setting to the plan. Unknown keys are refused with a suggestion
and every error of a recipe is shown at once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BeforeValidator,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe_algorithms import (
    ClassifierSettings,
    GRPOSettings,
    PPOSettings,
    RewardModelSettings,
    Section,
    SFTSettings,
)
from lowmem_rlhf.recipe_errors import OptionErrors, explain
from lowmem_rlhf.recipe_trl import TRL_TRAINERS, check_trl_section, fill_trl_data, known_algorithm
from lowmem_rlhf.resources import shipped
from lowmem_rlhf.suggest import did_you_mean

Auto = Literal["auto"]
Own = Literal["grpo", "ppo", "rloo", "reinforce_plus_plus", "sft", "reward_model", "classifier"]
TRLs = Literal["trl/dpo", "trl/kto", "trl/orpo", "trl/cpo"]
Algorithm = Annotated[Literal[Own, TRLs], BeforeValidator(known_algorithm)]
ONLINE = ("grpo", "ppo", "rloo", "reinforce_plus_plus")  # algorithms that sample and score what they learn from


class HardwareConfig(Section):
    """Which device to use, and settings the plan otherwise chooses."""

    device: str = "auto"  # "auto" or any torch device string: cpu, cuda, cuda:1, ...
    profile: str = "auto"  # a name from `lowmem-rlhf profiles`
    vram: str | None = None  # plan for this much memory instead of what is free, for example 11GB
    quantization: Literal["auto", "nf4", "int8", "none"] = "auto"
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    gradient_checkpointing: bool | Annotated[int, Field(ge=0)] | Auto = "auto"  # a number: the first so many layers
    offload_checkpoints: bool | Auto = "auto"  # to host memory, between forward and backward pass
    offload_embeddings: bool | Auto = "auto"  # the token embedding lies in host memory (where it is not the head too)
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Auto = "auto"
    score_batch_tokens: Annotated[int, Field(ge=1)] | Auto = "auto"  # of passes without gradients
    rollout_batch_size: Annotated[int, Field(ge=1)] | Auto = "auto"  # completions generated at once
    rollout_weights: Literal["auto", "quantized", "dequantized"] = "auto"  # of an NF4 base while it samples
    logits_tile_tokens: Annotated[int, Field(ge=1)] | Auto = "auto"
    optim: Literal["auto", "adamw", "adamw_8bit"] = "auto"
    check: Literal["auto", "always"] = "auto"  # hold the model against stock transformers; auto: not tested types
    probe: bool | Auto = "auto"  # try the largest planned shapes before step 1; auto: not on a CPU


class LoraSettings(Section):
    """The adapters (peft's names). There is no dropout: the sampling policy must be the trained policy."""

    r: Annotated[int, Field(ge=1)] | Auto = "auto"
    lora_alpha: Annotated[float, Field(gt=0)] | Auto = "auto"  # auto: twice the rank
    target_modules: Literal["all-linear"] | list[str] = "all-linear"

    def alpha(self, r: int) -> float:
        """Return lora_alpha at a rank."""
        return 2.0 * r if self.lora_alpha == "auto" else self.lora_alpha

    @property
    def rank(self) -> int:
        """The rank, once it is known (a run's recipe has it from the plan).

        Raises:
            ValueError: it is left to the plan.
        """
        if self.r == "auto":
            raise ValueError("lora.r is auto; the plan of the run decides it")
        return self.r


class DataConfig(Section):
    """Where prompts come from and how a row becomes a prompt."""

    train: str  # a file (.jsonl, .json, .csv, .tsv, .parquet), a folder, a Hub id, "arithmetic", "reasoning_gym/TASK"
    eval: str | None = None  # held-out data; absent: the source's eval split, or rows taken out of train
    config: str | None = None  # the Hub data set's configuration, for example "main"
    train_split: str = "train"
    eval_split: str = "test"
    train_size: int | None = Field(None, ge=1)
    eval_size: int = Field(128, ge=0)
    field: str | None = None  # of a .json file: the key that its rows lie under; absent: found where only one can be
    options: dict[str, Any] = Field(default_factory=dict)  # options of a generated task
    prompt: str | None = "question"  # column: a text, or a list of chat messages; a.b: part b of a
    answer: str | None = "answer"  # column with the reference answer, given to rewards as `answer`
    completion: str | None = None  # sft: the column that is learned; absent: `answer`
    messages: str | None = None  # sft: a column of whole conversations, in place of prompt and completion
    text: str | None = None  # sft, classifier: a column of plain text, in place of prompt and completion
    label: str | None = None  # classifier: the column with the class; trl/kto: whether `completion` is a good answer
    chosen: str | None = None  # reward_model, trl/...: the column with the better answer (its default there: chosen)
    rejected: str | None = None  # reward_model, trl/...: the column with the worse answer (its default: rejected)
    margin: str | None = None  # reward_model: a column with how much better it is
    system: str | None = None  # system message of a chat prompt, or a text put before a plain one
    template: str | None = None  # the user's turn, with {column} place-holders; {column?} may be empty
    prompt_words: int | None = Field(None, ge=1)  # only so many first words of the prompt column: a text to go on with
    chat: bool | Auto = "auto"  # apply the tokenizer's chat template; auto: when it has one
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # given to the template: enable_thinking, ...
    max_prompt_length: int = Field(512, ge=1)  # tokens
    long_prompts: Literal["error", "drop"] = "error"
    bad_rows: Literal["error", "drop"] = "error"  # rows that cannot be learned from, for any reason; long ones included


class GenerationConfig(Section):
    """How completions are sampled."""

    num_generations: int = Field(8, ge=1)
    max_completion_length: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # 0: off
    min_p: float = Field(0.0, ge=0, lt=1)


class LearnedReward(Section):
    """The options that every learned reward has."""

    model: str  # a Hub id, a local folder, or package:PACKAGE/FOLDER, with safetensors weights
    revision: str | None = None
    device: str = "auto"  # auto: the policy's, where the plan leaves room for it, else the CPU; or any torch device
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: Annotated[int, Field(ge=1)] | None = None  # tokens read of a text; absent: all that the model can read
    batch_tokens: int = Field(4096, ge=1)  # tokens of one pass, padding included


class ClassifierReward(LearnedReward):
    """How sure a sequence classifier (BERT and the like) is of one class."""

    label: StrictInt | StrictStr | None = None  # the class, by name or index; a model with one logit needs none
    output: Literal["probability", "logit", "log_probability"] = "probability"
    text: Literal["completion", "prompt_and_completion"] = "completion"


class SimilarityReward(LearnedReward):
    """Cosine similarity of the completion's sentence embedding to that of a reference answer."""

    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    column: str = "answer"  # the reference answer


class AdapterRewardConfig(Section):
    """The score of a reward model's adapter on the policy's own base."""

    adapter: str  # a run of algorithm reward_model, or its adapter folder


LEARNED_REWARDS: dict[str, type[LearnedReward]] = {"classifier": ClassifierReward, "similarity": SimilarityReward}
REWARD_ADAPTER = "reward_adapter"
REWARD_OPTIONS: dict[str, type[Section]] = {**LEARNED_REWARDS, REWARD_ADAPTER: AdapterRewardConfig}


class RewardConfig(Section):
    """One reward with its weight."""

    function: str  # a shipped function or learned reward by name, or path.py:function
    name: str = ""  # the metric's name; default: the function's
    weight: float = 1.0
    options: dict[str, Any] = Field(default_factory=dict)  # of a function: extra keyword arguments

    @model_validator(mode="after")
    def _resolved(self) -> "RewardConfig":
        self.name = self.name or self.function.rsplit(":", 1)[-1]
        if section := REWARD_OPTIONS.get(self.function):
            try:
                self.options = section.model_validate(self.options).model_dump()
            except ValidationError as error:
                raise OptionErrors(explain(error.errors(), section)) from None
        return self


class TrainingConfig(Section):
    """The loop around the algorithm."""

    max_steps: int = Field(100, ge=0)
    num_train_epochs: int | None = Field(None, ge=1)  # in place of max_steps: passes over all examples
    prompts_per_step: int = Field(8, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)
    save_steps: int = Field(50, ge=1)
    save_total_limit: int = Field(2, ge=1)
    log_completions: int = Field(4, ge=0)  # completions a step written to samples.jsonl
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(default_factory=list)


class EvaluationConfig(Section):
    """Held-out evaluation before and after training."""

    accuracy: str = ""  # the reward whose value of at least 1 counts as correct; default: the first
    temperature: float | None = Field(None, ge=0)  # 0: greedy; absent: as in training
    num_samples: int = Field(1, ge=1)  # completions a problem


class Recipe(Section):
    """A run. Paths are taken as written: relative to the folder the command runs in."""

    name: str = ""
    description: str = ""
    algorithm: Algorithm = "grpo"
    adapter: str | None = None  # a run or adapter folder to continue from; the reference is then the model with it
    model: str  # a Hub id, a local folder, a .gguf file, or package:PACKAGE/FILE for a file inside an installed package
    revision: str | None = None
    trust_remote_code: bool = False
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    data: DataConfig
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    rewards: Annotated[
        list[Annotated[RewardConfig, BeforeValidator(lambda v: {"function": v} if isinstance(v, str) else v)]],
        Field(default_factory=list),
    ]  # an online algorithm needs at least one; for sft they judge held-out completions
    grpo: GRPOSettings = Field(default_factory=GRPOSettings)
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    sft: SFTSettings = Field(default_factory=SFTSettings)
    reward_model: RewardModelSettings = Field(default_factory=RewardModelSettings)
    classifier: ClassifierSettings = Field(default_factory=ClassifierSettings)
    trl: Annotated[dict[str, Any], BeforeValidator(check_trl_section)] = Field(default_factory=dict)  # TRL's own keys
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        self._fill_data()
        self._check_rewards()
        if self.hardware.offload_checkpoints is True and self.hardware.gradient_checkpointing in (False, 0):
            raise ValueError(
                "hardware.offload_checkpoints: got true, but with hardware.gradient_checkpointing=false there are no "
                "checkpoints; set only one of them"
            )
        comparing = {
            "grpo": self.grpo.scale_rewards != "none" and "GRPO",
            "rloo": "RLOO",
            "reinforce_plus_plus": self.ppo.group_baseline and "REINFORCE++ with ppo.group_baseline",
        }.get(self.algorithm)
        if self.generation.num_generations < 2 and comparing:
            raise ValueError(
                f"generation.num_generations: got 1; {comparing} compares the completions of a prompt with each other "
                "and needs at least 2"
            )
        if self.training.num_train_epochs is not None and self.algorithm in ONLINE:
            raise ValueError(
                "training.num_train_epochs: is for sft, reward_model and classifier; set training.max_steps"
            )
        if self.adapter is not None and self.algorithm == "classifier":
            raise ValueError("adapter: a classifier trains whole and has none; leave it out")
        return self

    def _fill_data(self) -> None:
        """Set the columns that follow from the algorithm, and check that those it needs are named."""
        data = self.data
        if self.algorithm == "reward_model":
            data.chosen, data.rejected = data.chosen or "chosen", data.rejected or "rejected"
        if trainer := TRL_TRAINERS.get(self.algorithm):
            fill_trl_data(data, trainer, self.training.prompts_per_step)
        elif self.trl:
            raise ValueError(f"trl: is for the algorithms {', '.join(TRL_TRAINERS)}; leave it out")
        if self.algorithm == "classifier" and not (data.text and data.label):
            raise ValueError("data.text, data.label: a classifier needs both, the columns with its text and its class")
        if data.text and data.messages:
            raise ValueError("data.text, data.messages: got both; an example is one of them")
        if data.prompt_words and (data.template is not None or data.text or data.messages):
            raise ValueError("data.prompt_words: is for data.prompt alone; leave it or template, text and messages out")
        if data.template is not None and (data.text or data.messages):
            raise ValueError("data.template: an example of data.text or data.messages is taken as it is; leave it out")
        self._check_ppo()
        if self.algorithm in ("reward_model", "classifier", *TRL_TRAINERS) or data.text or data.messages:
            data.answer = data.answer if "answer" in data.model_fields_set else None
        elif self.algorithm == "sft":
            if data.completion and "answer" not in data.model_fields_set:
                data.answer = None
            data.completion = data.completion or data.answer
            if data.completion is None:
                raise ValueError(
                    "data.completion: missing; name the column that is learned (or data.messages, data.text)"
                )

    def _check_ppo(self) -> None:
        ppo = self.ppo
        if ppo.bootstrap_truncated and ppo.score_position != "last":
            raise ValueError(
                "ppo.bootstrap_truncated: is for ppo.score_position=last; after_last has that slot already"
            )
        completions = self.training.prompts_per_step * self.generation.num_generations
        if self.algorithm in ONLINE[1:] and ppo.kl_target and completions > ppo.kl_horizon:
            raise ValueError(f"ppo.kl_horizon: got {ppo.kl_horizon:g} for steps of {completions} completions; raise it")
        adapters = [reward for reward in self.rewards if reward.function == REWARD_ADAPTER]
        if self.algorithm == "ppo" and ppo.critic == "reward" and not adapters:
            raise ValueError(f"ppo.critic: got reward, but no reward of this recipe is a {REWARD_ADAPTER}")

    def _check_rewards(self) -> None:
        names = [reward.name for reward in self.rewards]
        if self.algorithm in ONLINE and not names:
            raise ValueError(f"rewards: missing; {self.algorithm} needs at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: two rewards have the same name ({', '.join(names)}); give one a `name:`")
        if taken := {"mean", "std"}.intersection(names):
            raise ValueError(
                f"rewards: the name {taken.pop()!r} is taken by a metric of all rewards; give another `name:`"
            )
        self.evaluation.accuracy = self.evaluation.accuracy or (names[0] if names else "")
        if self.evaluation.accuracy and self.evaluation.accuracy not in names:
            raise ValueError(
                f"evaluation.accuracy: got {self.evaluation.accuracy!r}, which is no reward of this recipe "
                f"({', '.join(names)}){did_you_mean(self.evaluation.accuracy, names)}"
            )

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=120)


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """Return the file of a recipe given by path or by the name of a shipped one.

    Raises:
        UserError: there is no such recipe.
    """
    if recipe in (known := shipped_recipes()):
        return known[recipe]
    path = Path(recipe)
    if path.is_file():
        return path
    raise UserError(
        f"recipe {recipe!r} is neither a file nor a shipped recipe ({', '.join(known)}){did_you_mean(recipe, known)}"
    )


def load_recipe(recipe: str, overrides: list[str] | None = None) -> Recipe:
    """Load a recipe and apply dotted overrides such as ``training.learning_rate=1e-5`` or ``rewards[0].weight=2``.

    Raises:
        UserError: no such recipe, not YAML, or values the schema refuses (all of them in one message).
    """
    path = find_recipe(recipe)
    try:
        values = OmegaConf.load(path)
        if not OmegaConf.is_dict(values):
            raise UserError(f"recipe {path} is not a mapping of keys to values")
        for override in overrides or []:
            _apply(values, override)
        plain = OmegaConf.to_container(values, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"recipe {path} cannot be read as YAML: {_reason(error)}") from error
    assert isinstance(plain, dict)
    plain["name"] = plain.get("name") or path.stem
    return validate_recipe({str(key): value for key, value in plain.items()}, source=str(recipe))


def _apply(values: Any, override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key.strip():
        raise UserError(f"override {override!r} is not of the form key=value, for example training.max_steps=10")
    try:
        OmegaConf.update(values, key.strip(), _override_value(text), merge=True)
    except IndexError as error:
        raise UserError(f"override {override!r} cannot be applied: the list has no item of that number") from error
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"override {override!r} cannot be applied: {_reason(error)}") from error


def _override_value(text: str) -> Any:
    """Return what YAML reads; a text is taken as it was written, colons and number signs included."""
    try:
        value: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
    except yaml.YAMLError:
        return text.strip()
    return text.strip() if isinstance(value["value"], str) and text.strip()[0] not in "\"'" else value["value"]


def _reason(error: Exception) -> str:
    """Return an error's text on one line, without OmegaConf's appendix on types."""
    return " ".join(str(error).split()).split(" full_key: ")[0]


def validate_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """Check plain values against the schema.

    Raises:
        UserError: one message with every error.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = explain(error.errors(), Recipe)
        head = f"recipe {source} has {'an error' if len(lines) == 1 else f'{len(lines)} errors'}:"
        raise UserError("\n".join([head, *(f"  {line}" for line in lines)])) from None
