"""The sections of a recipe that all algorithms share: hardware, adapters, data, generation, rewards, training.

Loads without torch. `recipe` holds the whole, and says how the sections go together.
"""

import re
from collections.abc import Mapping
from keyword import iskeyword
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from lowmem_rlhf.recipe.bounds import (
    LEAST_PENALTY,
    MOST_COEFFICIENT,
    MOST_COMPLETIONS,
    MOST_IN_A_PASS,
    MOST_LAYERS,
    MOST_PENALTY,
    MOST_PROMPTS,
    MOST_RANK,
    MOST_RATE,
    MOST_ROWS,
    MOST_SECONDS,
    MOST_STEPS,
    MOST_STOP_LENGTH,
    MOST_TOKENS,
    SEEDS,
    Temperature,
    TemperatureOrGreedy,
)
from lowmem_rlhf.recipe.errors import OptionErrors, explain
from lowmem_rlhf.recipe.field_roles import (
    BATCHING,
    FAULTS,
    JUDGED,
    LEARNED,
    LEARNED_AND_MEASURED,
    LENGTH,
    MEASURED,
    PLACEMENT,
    PRECISION,
    RECOMPUTING,
    RECORDS,
    SERVED,
    TRAINING_BATCHING,
    WHERE,
)
from lowmem_rlhf.recipe.file_names import check_name, check_path
from lowmem_rlhf.recipe.lora_shape import ALL, LoraShape
from lowmem_rlhf.recipe.section import Section
from lowmem_rlhf.recipe.server import ServerConfig, why_not_served

Auto = Literal["auto"]


def _layer_numbers(value: Any) -> Any:
    """Take numbers of layers and ranges of them, alone or in a list, as a list of numbers."""
    numbers: list[int] = []
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        ends = [one] if isinstance(one, int) else one.split("-") if isinstance(one, str) else []
        if isinstance(one, bool) or not 1 <= len(ends) <= 2 or not all(str(end).strip().isdecimal() for end in ends):
            raise ValueError(f"got {one!r}; give numbers of layers from 0, or ranges such as 8-15")
        first, last = int(ends[0]), int(ends[-1])
        if not first <= last < MOST_LAYERS:
            raise ValueError(f"got {one!r}; a range goes up, and a layer's number is below {MOST_LAYERS}")
        numbers += range(first, last + 1)
    if value is not None and not numbers:
        raise ValueError("got an empty list; write null for all layers")
    return None if value is None else sorted(set(numbers))


Layers = Annotated[list[int], BeforeValidator(_layer_numbers)]
MOST_GIGABYTES = 1024  # that a number without its unit can mean
CountOrAuto = Annotated[int, Field(ge=1, le=MOST_IN_A_PASS)] | Auto

# what `apply_chat_template` is given by this package itself
OWN_TEMPLATE_KWARGS = frozenset(
    {
        "conversation",
        "messages",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)


def _named(text: str) -> str:
    if not text.strip():
        raise ValueError(f"got {text!r}; it should not be empty")
    return text


def _regex(text: str, remedy: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"got {text!r}, which is no regular expression ({error}); {remedy}") from error


def _named_or_null(text: str) -> str:
    if not text.strip():
        raise ValueError(f"got {text!r}; write null for none")
    return text


Name = Annotated[str, AfterValidator(_named)]  # of a column, a split: never an empty text
NameOrNull = Annotated[str, AfterValidator(_named_or_null)] | None
# of a file, a folder or a repository
PathName = Annotated[str, AfterValidator(_named), AfterValidator(check_path)]
PathOrNull = Annotated[str, AfterValidator(_named_or_null), AfterValidator(check_path)] | None


class HardwareConfig(Section):
    """Which device to use, and settings the plan otherwise chooses."""

    device: Annotated[PathName, WHERE] = "auto"  # "auto" or any torch device string: cpu, cuda, cuda:1, ...
    profile: Annotated[Name, WHERE] = "auto"  # a name from `lowmem-rlhf profiles`
    vram: Annotated[NameOrNull, WHERE] = None  # plan for this much memory instead of what is free, for example 11GB
    # of the frozen base's weights; none: 16 bits
    quantization: Annotated[Literal["auto", "nf4", "int8", "none"], PRECISION] = "auto"
    # of products; adapters, losses and the optimizer stay in float32
    compute_dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], PRECISION] = "auto"
    # layers that are computed again in the backward pass: all, none, or a number: the first so many
    gradient_checkpointing: Annotated[bool | Annotated[int, Field(ge=0, le=MOST_LAYERS)] | Auto, RECOMPUTING] = "auto"
    offload_checkpoints: Annotated[bool | Auto, WHERE] = "auto"  # to host memory, between forward and backward pass
    # the token embedding lies in host memory (where it is not the head too)
    offload_embeddings: Annotated[bool | Auto, PLACEMENT] = "auto"
    offload_experts: Annotated[bool | Auto, PLACEMENT] = "auto"  # a mixture's, in NF4: each is fetched for its product
    micro_batch_tokens: Annotated[CountOrAuto, TRAINING_BATCHING] = "auto"  # packed tokens of one pass with gradients
    score_batch_tokens: Annotated[CountOrAuto, BATCHING] = "auto"  # of passes without gradients
    rollout_batch_size: Annotated[CountOrAuto, BATCHING] = "auto"  # completions generated at once
    # the layers of a base that no card holds are shared out among processes, and gathered one by one in each pass
    shard_base: Annotated[bool, WHERE] = False
    offload_base: Annotated[bool, WHERE] = False  # with shard_base: each process's share lies in host memory
    # of an NF4 base while it samples
    rollout_weights: Annotated[Literal["auto", "quantized", "joined", "dequantized"], WHERE] = "auto"
    keep_graphs: Annotated[bool | Auto, WHERE] = "auto"  # of decoding passes and their caches, from rollout to rollout
    logits_tile_tokens: Annotated[CountOrAuto, BATCHING] = "auto"  # positions whose logits exist at the same time
    # AdamW with its moments in 32 or in 8 bits
    optim: Annotated[Literal["auto", "adamw", "adamw_8bit"], PRECISION] = "auto"
    # hold the model against stock transformers (auto: not tested types), and its weights at the end against the start's
    check: Annotated[Literal["auto", "always"], WHERE] = "auto"
    probe: Annotated[bool | Auto, WHERE] = "auto"  # try the largest planned shapes before step 1; auto: not on a CPU

    @field_validator("vram", mode="before")
    @classmethod
    def _with_unit(cls, value: Any) -> Any:
        """Take a number without its unit as gigabytes, which is how cards are sold."""
        number = str(value).strip().removesuffix(".")
        if (
            value is None
            or isinstance(value, bool)
            or not (number.isascii() and number.replace(".", "", 1).isdecimal())
        ):
            return value
        if not 1 <= float(number) <= MOST_GIGABYTES:
            raise ValueError(
                f"got {number}; a number without its unit is of gigabytes, from 1 to {MOST_GIGABYTES}; write another "
                "with its unit, such as 11000MB"
            )
        return f"{number}GB"

    @model_validator(mode="after")
    def _offloads_what_is_shared(self) -> "HardwareConfig":
        if self.offload_base and not self.shard_base:
            line = "offload_base: got true without shard_base; only a base that processes share goes to host memory"
            raise OptionErrors([f"{line}: set shard_base to true as well"], below="")
        return self


class LoraSettings(Section):
    """The adapters (peft's names). There is no dropout: the sampling policy must be the trained policy."""

    r: Annotated[int, Field(ge=1, le=MOST_RANK)] | Auto = "auto"  # the rank; auto: 16, or less where memory asks for it
    lora_alpha: Annotated[float, Field(gt=0, le=MOST_COEFFICIENT)] | Auto = "auto"  # auto: twice the rank
    # ends of names, or one regular expression that fits whole names of modules
    target_modules: Literal["all-linear"] | str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    use_rslora: bool = False  # scaled by alpha / sqrt(r) (arXiv 2312.03732) and not alpha / r
    layers_to_transform: Layers | None = None  # numbers of layers from 0, and ranges such as 8-15; null: all
    # other ranks and alphas of modules, by a regular expression that fits the end of their names
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=MOST_RANK)]] = Field(default_factory=dict)
    # as rank_pattern
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, le=MOST_COEFFICIENT)]] = Field(default_factory=dict)

    @field_validator("target_modules")
    @classmethod
    def _named_each(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            _named(name)
            if isinstance(value, list) and not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"got {name!r} in a list, which holds names or ends of names; a regular expression stands alone, "
                    "in quotes where it has a comma"
                )
        if isinstance(value, str) and value != ALL:
            _regex(value, "write all-linear, a list of names such as [q_proj, v_proj], or an expression")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern in value:
            _regex(pattern, "a key is the end of a module's name, or an expression for it")
        return value

    @model_validator(mode="after")
    def _layers_by_one_of_both(self) -> "LoraSettings":
        if self.layers_to_transform and isinstance(self.target_modules, str) and self.target_modules != ALL:
            raise OptionErrors(
                [
                    "layers_to_transform: got layers beside a regular expression in target_modules, which names the "
                    r"layers itself; write them there, such as .*\.(8|9)\..*_proj, or give target_modules as a list"
                ],
                below="",
            )
        return self

    def alpha(self, r: int) -> float:
        """Return lora_alpha at a rank; auto gives the scale 2, with rsLoRA at rank 16 and by it at all others."""
        if self.lora_alpha != "auto":
            return self.lora_alpha
        return 8.0 if self.use_rslora else 2.0 * r

    def shape(self, r: int | None = None) -> LoraShape:
        """Return the adapter's shape at a rank; without one it must be known (see `rank`)."""
        r = self.rank if r is None else r
        values = {key: getattr(self, key) for key in type(self).model_fields}
        return LoraShape.of(**{**values, "r": r, "lora_alpha": self.alpha(r)})

    @property
    def rank(self) -> int:
        """The rank, once it is known (a run's recipe has it from the plan).

        Raises:
            ValueError: it is left to the plan.
        """
        if self.r == "auto":
            raise ValueError("lora.r is auto; the plan of the run decides it")
        return self.r


class FewShotConfig(Section):
    """Solved examples that stand before each prompt; their rows have the columns that the prompt is made of."""

    file: PathOrNull = None  # of rows: the same examples before every prompt
    column: NameOrNull = None  # of the data: a list of rows, the examples of its own row
    count: int | None = Field(None, ge=1, le=MOST_COMPLETIONS)  # the first so many; absent: all
    answer: NameOrNull = None  # the column with an example's answer; absent: data.completion, or data.answer

    @model_validator(mode="after")
    def _one_source(self) -> "FewShotConfig":
        if (self.file is None) == (self.column is None):
            both = "got both file and column" if self.file else "file or column is missing"
            raise ValueError(f"{both}; give the one that the examples are in")
        return self


class CurriculumConfig(Section):
    """Begin with the easiest rows, and let in the others little by little (algorithms that sample)."""

    column: Name  # of numbers: the easier the smaller
    start: float = Field(0.2, gt=0, le=1)  # the share of rows that training begins with
    steps: int | None = Field(None, ge=1, le=MOST_STEPS)  # until all rows are in; absent: half of training.max_steps


class DataConfig(Section):
    """Where prompts come from and how a row becomes a prompt."""

    # a file (.jsonl, .json, .csv, .tsv, .parquet), a folder, a Hub id, "arithmetic", "reasoning_gym/TASK"
    train: PathName
    # held-out data; absent: the source's eval split, or rows taken out of train
    eval: Annotated[PathOrNull, LEARNED_AND_MEASURED] = None
    config: NameOrNull = None  # the Hub data set's configuration, for example "main"
    train_split: Name = "train"  # of a source with several: what is trained on
    eval_split: Name = "test"  # of a source with several: what is held out
    train_size: int | None = Field(None, ge=1, le=MOST_ROWS)  # only so many rows, drawn by training.seed; absent: all
    streaming: bool = False  # read rows as they are needed; the set is never held as a whole
    shuffle_buffer: int = Field(1000, ge=1, le=MOST_ROWS)  # rows that are held and shuffled at a time, where streaming
    eval_size: Annotated[int, LEARNED_AND_MEASURED] = Field(128, ge=0, le=MOST_ROWS)  # held-out rows, at most; 0: none
    field: NameOrNull = None  # of a .json file: the key that its rows lie under; absent: found where only one can be
    options: dict[str, Any] = Field(default_factory=dict)  # options of a generated task
    prompt: Name | None = "question"  # column: text or messages; a.b: part b of a; null: what a pair shares
    answer: NameOrNull = "answer"  # column with the reference answer, given to rewards as `answer`
    completion: NameOrNull = None  # sft: the column that is learned; absent: `answer`
    messages: NameOrNull = None  # sft: a column of whole conversations, in place of prompt and completion
    text: NameOrNull = None  # sft, classifier: a column of plain text, in place of prompt and completion
    label: NameOrNull = None  # classifier: the column with the class; trl/kto: whether `completion` is a good answer
    chosen: NameOrNull = None  # reward_model, trl/...: the column with the better answer (its default there: chosen)
    rejected: NameOrNull = None  # reward_model, trl/...: the column with the worse answer (its default: rejected)
    margin: NameOrNull = None  # reward_model: a column with how much better it is
    system: str | None = None  # system message of a chat prompt, or a text put before a plain one
    few_shot: FewShotConfig | None = None
    curriculum: CurriculumConfig | None = None
    template: NameOrNull = None  # the user's turn, with {column} place-holders; {column?} may be empty
    # only so many first words of the prompt column: a text to go on with
    prompt_words: int | None = Field(None, ge=1, le=MOST_TOKENS)
    chat: bool | Auto = "auto"  # apply the tokenizer's chat template; auto: when it has one
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # given to the template: enable_thinking, ...
    max_prompt_length: Annotated[int, LEARNED_AND_MEASURED] = Field(512, ge=1, le=MOST_TOKENS)  # tokens
    # those above max_prompt_length are an error, or left out
    long_prompts: Annotated[Literal["error", "drop"], LEARNED_AND_MEASURED] = "error"
    bad_rows: Literal["error", "drop"] = "error"  # rows that cannot be learned from, for any reason; long ones included

    @field_validator("chat_template_kwargs")
    @classmethod
    def _of_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(OWN_TEMPLATE_KWARGS.intersection(value)):
            raise ValueError(
                f"got {', '.join(own)}, which this package sets itself; give what the chat template asks for, such as "
                "enable_thinking"
            )
        constants = ("true", "false", "none")
        if bad := [key for key in value if not key.isidentifier() or iskeyword(key) or key in constants]:
            raise ValueError(
                f"got {bad[0]!r}, which no chat template can read; give a name of letters, digits and underscores, "
                "such as enable_thinking"
            )
        return value


def _stop_string(value: str) -> str:
    if not value:
        raise ValueError("got an empty text, which every completion has; give the text that ends one, or leave it out")
    if len(value) > MOST_STOP_LENGTH:
        raise ValueError(f"got a text of {len(value)} characters; it should have at most {MOST_STOP_LENGTH}")
    return value


StopStrings = Annotated[
    list[Annotated[str, AfterValidator(_stop_string)]], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)
]


class GenerationConfig(Section):
    """How completions are sampled."""

    # completions of a prompt (a group)
    num_generations: Annotated[int, LEARNED_AND_MEASURED] = Field(8, ge=1, le=MOST_COMPLETIONS)
    max_completion_length: Annotated[int, LEARNED_AND_MEASURED] = Field(256, ge=1, le=MOST_TOKENS)  # tokens
    temperature: Annotated[Temperature, LEARNED_AND_MEASURED] = 1.0  # of sampling and of the log-probs that are trained
    # sample among the likeliest tokens that have this share together; 1: off
    top_p: Annotated[float, LEARNED_AND_MEASURED] = Field(1.0, gt=0, le=1)
    # sample among so many likeliest tokens; 0: off
    top_k: Annotated[int, LEARNED_AND_MEASURED] = Field(0, ge=0, le=MOST_TOKENS)
    # leave out tokens below this share of the likeliest one's probability; 0: off
    min_p: Annotated[float, LEARNED_AND_MEASURED] = Field(0.0, ge=0, lt=1)
    # of the logits of tokens that are in the prompt or the completion already: above 1 they become less likely; 1: off
    repetition_penalty: Annotated[float, LEARNED_AND_MEASURED] = Field(1.0, ge=LEAST_PENALTY, le=MOST_PENALTY)
    # no stop token is drawn before a completion has so many tokens; a stop string may still end it; 0: off
    min_new_tokens: Annotated[int, LEARNED_AND_MEASURED] = Field(0, ge=0, le=MOST_TOKENS)
    # a completion ends with the token that completes one of these texts; all of that token's text is kept
    stop_strings: Annotated[StopStrings, LEARNED_AND_MEASURED] = Field(default_factory=list)
    # what samples rollouts: auto, a server (vllm, llama_cpp), or what was registered (`rollout.engine.register_engine`)
    engine: Annotated[Name, LEARNED_AND_MEASURED] = "auto"
    server: Annotated[ServerConfig | None, SERVED] = None  # the server, where engine is one

    @property
    def controls(self) -> dict[str, Any]:
        """Those of repetition penalty, least length and stop strings that are on, under transformers' names."""
        names = ("repetition_penalty", "min_new_tokens", "stop_strings")
        off = GenerationConfig()
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(off, name)}

    @model_validator(mode="after")
    def _room_to_end(self) -> "GenerationConfig":
        if self.min_new_tokens > self.max_completion_length:
            raise OptionErrors(
                [
                    f"min_new_tokens: got {self.min_new_tokens}, more than max_completion_length="
                    f"{self.max_completion_length}, so that no stop token could end a completion; lower it, or raise "
                    "that"
                ],
                below="",
            )
        return self

    @property
    def shaping(self) -> list[str]:
        """The keys that are on and decide what is drawn beside the temperature."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens")
        off = {name: type(self).model_fields[name].default for name in names}
        return [name for name in names if getattr(self, name) != off[name]]

    @model_validator(mode="after")
    def _can_be_served(self) -> "GenerationConfig":
        if why := why_not_served(self.engine, self.server, self.shaping, self.temperature):
            raise OptionErrors([why], below="")
        return self


class LearnedReward(Section):
    """The options that every learned reward has."""

    model: PathName  # a Hub id, a local folder, or package:PACKAGE/FOLDER, with safetensors weights
    revision: NameOrNull = None  # of a model on the Hub: branch, tag or commit
    device: Name = "auto"  # auto: the policy's, where the plan leaves room for it, else the CPU; or any torch device
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of its weights and products
    # tokens read of a text; absent: all that the model can read
    max_length: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    batch_tokens: int = Field(4096, ge=1, le=MOST_IN_A_PASS)  # tokens of one pass, padding included


class ClassifierReward(LearnedReward):
    """How sure a sequence classifier (BERT and the like) is of one class."""

    # the class, by name or index; a model with one logit needs none
    label: Annotated[StrictInt, Field(ge=0, le=MOST_IN_A_PASS)] | StrictStr | None = None
    output: Literal["probability", "logit", "log_probability"] = "probability"  # what of the class is the value
    text: Literal["completion", "prompt_and_completion"] = "completion"  # what is read


class SimilarityReward(LearnedReward):
    """Cosine similarity of the completion's sentence embedding to that of a reference answer."""

    model: PathName = "sentence-transformers/all-MiniLM-L6-v2"
    column: Name = "answer"  # the reference answer


class AdapterRewardConfig(Section):
    """The score of a reward model's adapter on the policy's own base."""

    adapter: PathName  # a run of algorithm reward_model, or its adapter folder


LEARNED_REWARDS: dict[str, type[LearnedReward]] = {"classifier": ClassifierReward, "similarity": SimilarityReward}
REWARD_ADAPTER = "reward_adapter"
REWARD_OPTIONS: dict[str, type[Section]] = {**LEARNED_REWARDS, REWARD_ADAPTER: AdapterRewardConfig}


OnError = Literal["fail", "skip", "zero"]
Normalize = Literal["none", "group", "batch"]


class RewardConfig(Section):
    """One reward with its weight."""

    # a shipped function or learned reward by name, or path.py:function
    function: Annotated[PathName, LEARNED_AND_MEASURED]
    # the metric's name; default: the function's
    name: Annotated[str, AfterValidator(check_name), LEARNED_AND_MEASURED] = ""
    # in the sum; 0: only measured
    weight: Annotated[float, LEARNED_AND_MEASURED] = Field(1.0, ge=-MOST_COEFFICIENT, le=MOST_COEFFICIENT)
    # counts only where another reward, by its name, is above 0; {NAME: threshold}: where that one reaches it
    requires: Annotated[str | dict[str, float] | None, LEARNED_AND_MEASURED] = None
    # standardise its values before they are weighted and learned from: over a prompt's completions, or the step's
    normalize: Annotated[Normalize, LEARNED_AND_MEASURED] = "none"
    # of a function: extra keyword arguments
    options: Annotated[dict[str, Any], LEARNED_AND_MEASURED] = Field(default_factory=dict)
    # of a function: seconds that one call, for all completions of a step, may take; null: any time
    timeout: Annotated[float | None, FAULTS] = Field(1800.0, gt=0, le=MOST_SECONDS)
    # what a call that fails means: the run ends, or its completions get no value of this reward, or the value 0
    on_error: Annotated[OnError, FAULTS] = "fail"

    @classmethod
    def kind_of(cls, key: str, given: Mapping[str, Any]) -> Any:
        """Return a field's annotation; the options of a learned reward have a schema of their own."""
        learned = REWARD_OPTIONS.get(str(given.get("function")))
        return learned if key == "options" and learned else super().kind_of(key, given)

    @property
    def gates(self) -> dict[str, float | None]:
        """The rewards that it requires, each with the value that it must reach; None: a value above 0."""
        if isinstance(self.requires, dict):
            return dict(self.requires)
        return {} if self.requires is None else {self.requires: None}

    @field_validator("requires", mode="before")
    @classmethod
    def _gates(cls, value: Any) -> Any:
        names = value if isinstance(value, dict) else [value]
        thresholds = value.values() if isinstance(value, dict) else ()
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in thresholds)
        bounded = numbers and all(abs(one) <= MOST_COEFFICIENT for one in thresholds)
        if value is not None and not (names and bounded and all(isinstance(one, str) and one for one in names)):
            raise ValueError(
                f"got {value!r}; give the name of another reward, or {{NAME: threshold}} with a number of at most "
                f"{MOST_COEFFICIENT:g}, or null"
            )
        return value

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

    max_steps: Annotated[int, LENGTH] = Field(100, ge=0, le=MOST_STEPS)  # rollouts, or batches of examples
    # in place of max_steps: passes over all examples
    num_train_epochs: Annotated[int | None, LENGTH] = Field(None, ge=1, le=MOST_STEPS)
    # of sft and classifier: examples, of reward_model: pairs
    prompts_per_step: Annotated[int, LEARNED] = Field(8, ge=1, le=MOST_PROMPTS)
    # of AdamW; an adapter takes about ten times what the whole model would
    learning_rate: Annotated[float, LEARNED] = Field(1e-5, gt=0, le=MOST_RATE)
    # how the learning rate goes on over the run's optimizer steps
    lr_scheduler_type: Annotated[Literal["constant", "constant_with_warmup", "linear", "cosine"], LEARNED] = "linear"
    # optimizer steps in which the learning rate rises from 0
    warmup_steps: Annotated[int, LEARNED] = Field(0, ge=0, le=MOST_STEPS)
    weight_decay: Annotated[float, LEARNED] = Field(0.0, ge=0, le=MOST_RATE)  # of AdamW
    # longer gradients are clipped to this
    max_grad_norm: Annotated[float, LEARNED] = Field(1.0, gt=0, le=MOST_COEFFICIENT)
    # of the order of rows, of sampling and of an adapter's start
    seed: Annotated[int, LEARNED] = Field(0, ge=0, le=SEEDS)
    # seconds after which a process of several that does not answer counts as lost
    ddp_timeout: Annotated[float, WHERE] = Field(600, ge=1, le=MOST_STEPS)
    save_steps: Annotated[int, RECORDS] = Field(50, ge=1, le=MOST_STEPS)  # a checkpoint after every so many steps
    save_total_limit: Annotated[int, RECORDS] = Field(2, ge=1, le=MOST_STEPS)  # the newest checkpoints that stay
    # completions a step written to samples.jsonl
    log_completions: Annotated[int, RECORDS] = Field(4, ge=0, le=MOST_IN_A_PASS)
    # trackers that are told as well (docs/trackers.md); TRL's `none` is the empty list
    report_to: Annotated[list[Literal["tensorboard", "wandb", "trackio", "mlflow"]], RECORDS] = Field(
        default_factory=list
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _to_none(cls, value: Any) -> Any:
        names = value if isinstance(value, list) else [value]
        return [] if [str(name).casefold() for name in names] == ["none"] and None not in names else value

    @field_validator("num_train_epochs", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool) and not (value >= 1 and value % 1 == 0):
            raise ValueError(
                f"got {value!r}; it should be a whole number of at least 1; for a part of the data set "
                "training.max_steps instead"
            )
        return value


class EvaluationConfig(Section):
    """Held-out evaluation before and after training, and while it goes on."""

    # the reward whose value of at least 1 counts as correct; default: the first
    accuracy: Annotated[str, MEASURED] = ""
    temperature: Annotated[TemperatureOrGreedy | None, MEASURED] = None  # 0: greedy; absent: as in training
    num_samples: Annotated[int, MEASURED] = Field(1, ge=1, le=MOST_COMPLETIONS)  # completions a problem
    steps: Annotated[int | None, RECORDS] = Field(None, ge=1, le=MOST_STEPS)  # also after every so many steps
    # the measure that is shown first and that tells which evaluation is the best, by its name in evaluation.json;
    # auto: what the task has (accuracy, else the mean reward, else the loss)
    metric: Annotated[Name, JUDGED] = "auto"
    greater_is_better: Annotated[bool | Auto, JUDGED] = "auto"  # auto: not of a loss, a perplexity and cut answers
    # keep the checkpoint of the best evaluation beyond training.save_total_limit; `--step best` takes it
    keep_best: Annotated[bool, RECORDS] = False
    # the run ends once so many evaluations have been no better than those before, by more than min_delta
    patience: Annotated[int | None, LENGTH] = Field(None, ge=1, le=MOST_STEPS)
    # by which an evaluation has to exceed those before to count as better
    min_delta: Annotated[float, LENGTH] = Field(0.0, ge=0, le=MOST_COEFFICIENT)
