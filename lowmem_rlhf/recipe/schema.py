"""The schema of a whole recipe, and how its sections go together. Loads without torch."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from lowmem_rlhf.algorithms.classifier.settings import ClassifierSettings
from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.registry import DEFAULT, known, spec_of, specs
from lowmem_rlhf.algorithms.reward_model.settings import RewardModelSettings
from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.algorithms.trl.settings import check_trl_section
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.file_names import check_folder_name
from lowmem_rlhf.recipe.section import Section
from lowmem_rlhf.recipe.sections import (
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    HardwareConfig,
    LoraSettings,
    NameOrNull,
    PathName,
    PathOrNull,
    TrainingConfig,
)
from lowmem_rlhf.recipe.tasks import MixingConfig, RewardList, TaskConfig, data_of_all, rewards_of_all, spread
from lowmem_rlhf.recipe.yaml_tree import write_yaml
from lowmem_rlhf.suggest import did_you_mean

Algorithm = Annotated[str, BeforeValidator(known)]


class Recipe(Section):
    """A run. Paths are taken as written: relative to the folder the command runs in."""

    # of the run's folder below runs/; default: that of the recipe's file
    name: Annotated[str, AfterValidator(check_folder_name)] = ""
    description: str = ""  # a sentence for `lowmem-rlhf recipes` and for model cards
    # sft, reward_model, classifier, grpo, ppo, rloo, reinforce_plus_plus, trl/dpo and others of TRL (see
    # `algorithms.registry`), or a user's own: path.py:SPEC
    algorithm: Algorithm = DEFAULT
    adapter: PathOrNull = None  # a run or adapter folder to continue from; the reference is then the model with it
    # a Hub id, a local folder, a .gguf file, or package:PACKAGE/FILE for a file inside an installed package
    model: PathName
    revision: NameOrNull = None  # the model's branch, tag or commit on the Hub
    trust_remote_code: bool = False  # run the model's own Python code; for models whose makers you trust
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    data: DataConfig  # with tasks: see `tasks.data_of_all`
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    # an online algorithm needs at least one; for sft they judge held-out completions; with tasks: those of all
    rewards: RewardList = Field(default_factory=list)
    tasks: list[TaskConfig] = Field(default_factory=list)  # several data sets in one run, each with rewards of its own
    mixing: MixingConfig = Field(default_factory=MixingConfig)
    grpo: GRPOSettings = Field(default_factory=GRPOSettings)
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    sft: SFTSettings = Field(default_factory=SFTSettings)
    reward_model: RewardModelSettings = Field(default_factory=RewardModelSettings)
    classifier: ClassifierSettings = Field(default_factory=ClassifierSettings)
    trl: Annotated[dict[str, Any], BeforeValidator(check_trl_section)] = Field(default_factory=dict)  # TRL's own keys
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="before")
    @classmethod
    def _spread(cls, values: Any) -> Any:
        return spread(values) if isinstance(values, dict) else values

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what follows from the tasks, or the tasks where there are none."""
        values: dict[str, Any] = handler(self)
        for key in ("data", "rewards") if self.tasks else ("tasks", "mixing"):
            values.pop(key, None)
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.tasks:
            self._check_tasks()
        else:
            self._fill_data()
            self._check_rewards()
        self._check_evaluation()
        if self.hardware.offload_checkpoints is True and self.hardware.gradient_checkpointing in (False, 0):
            raise ValueError(
                "hardware.offload_checkpoints: got true, but with hardware.gradient_checkpointing=false there are no "
                "checkpoints; set only one of them"
            )
        if self.generation.num_generations < 2 and (comparing := self.spec.compares(self)):
            raise ValueError(
                f"generation.num_generations: got 1; {comparing} compares the completions of a prompt with each other "
                "and needs at least 2"
            )
        if self.training.num_train_epochs is not None and self.spec.samples:
            raise ValueError(
                "training.num_train_epochs: is for sft, reward_model and classifier; set training.max_steps"
            )
        if self.adapter is not None and self.spec.leaves == "model":
            raise ValueError(f"adapter: a {self.spec.title} trains whole and has none; leave it out")
        return self

    @property
    def spec(self) -> AlgorithmSpec:
        """The facts of the recipe's algorithm."""
        return spec_of(self.algorithm)

    @property
    def by_task(self) -> "dict[str, Recipe]":
        """The recipe of each task alone, by its name; without tasks the recipe itself, named by an empty text."""
        return {task.name: self._alone(task) for task in self.tasks} if self.tasks else {"": self}

    def of_task(self, name: str | None) -> "Recipe":
        """Return the recipe of one task; None: of the first.

        Raises:
            UserError: there is no such task.
        """
        tasks = self.by_task
        if name is None:
            return next(iter(tasks.values()))
        if not name or name not in tasks:
            raise UserError(
                f"task {name!r}: this run has one task only; leave it out"
                if not self.tasks
                else f"task {name!r}: the tasks of this run are {', '.join(tasks)}{did_you_mean(name, tasks)}"
            )
        return tasks[name]

    def _alone(self, task: TaskConfig) -> "Recipe":
        length = task.generation.max_completion_length or self.generation.max_completion_length
        update = {
            "tasks": [],
            "data": task.data,
            "rewards": task.rewards,
            "generation": self.generation.model_copy(update={"max_completion_length": length}),
            "evaluation": self.evaluation.model_copy(update={"accuracy": task.accuracy}),
        }
        return self.model_copy(update=update)

    def with_each(self, change: "Callable[[str, Recipe], Recipe]") -> "Recipe":
        """Return the recipe with a change of the data and rewards of each task; see `by_task`."""
        if not self.tasks:
            return change("", self)
        changed = [change(name, own) for name, own in self.by_task.items()]
        tasks = [
            task.model_copy(update={"data": own.data, "rewards": own.rewards})
            for task, own in zip(self.tasks, changed, strict=True)
        ]
        return self.model_copy(update={"tasks": tasks, "data": data_of_all(tasks), "rewards": rewards_of_all(tasks)})

    def _check_tasks(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: two tasks have the same name ({', '.join(names)}); each needs its own")
        if self.spec.rows not in ("prompts", "completions"):
            raise ValueError(f"tasks: {self.algorithm} learns from one data set; leave them out")
        if len({str(task.data.chat_template_kwargs) for task in self.tasks}) > 1:
            raise ValueError("tasks: data.chat_template_kwargs are of the tokenizer; set them in the recipe's `data`")
        if self.evaluation.accuracy:
            raise ValueError("evaluation.accuracy: is for a recipe without tasks; set tasks[0].accuracy and so on")
        if any(task.data.streaming for task in self.tasks):
            raise ValueError("data.streaming: is for one data set; leave it out, or the tasks")
        most = self.generation.max_completion_length
        for number, task in enumerate(self.tasks):
            length = task.generation.max_completion_length or most
            if length > most:
                raise ValueError(
                    f"tasks[{number}].generation.max_completion_length: got {length}, above the limit of all tasks, "
                    f"generation.max_completion_length={most}; lower it, or raise that"
                )
            if length < self.generation.min_new_tokens:
                raise ValueError(
                    f"tasks[{number}].generation.max_completion_length: got {length}, below "
                    f"generation.min_new_tokens={self.generation.min_new_tokens}; raise it, or lower that"
                )
            own = self._alone(task)
            try:
                own.model_copy(update={"rewards": rewards_of_all(self.tasks)})._fill_data()
                own._check_rewards()
            except ValueError as error:
                raise ValueError(_of_number(number, str(error))) from None
            task.accuracy = own.evaluation.accuracy
        self.data, self.rewards = data_of_all(self.tasks), rewards_of_all(self.tasks)

    def _fill_data(self) -> None:
        """Set the columns that follow from the algorithm, and check that those it needs are named."""
        data = self.data
        if data.bad_rows == "drop":
            data.long_prompts = "drop"  # a long row is a bad one
        self.spec.prepare(self)
        if self.trl and self.spec.section != "trl":
            there = ", ".join(spec.name for spec in specs() if spec.section == "trl")
            raise ValueError(f"trl: is for the algorithms {there}; leave it out")
        if data.text and data.messages:
            raise ValueError("data.text, data.messages: got both; an example is one of them")
        if data.prompt is None and not (data.chosen or data.template is not None or data.text or data.messages):
            raise ValueError(
                "data.prompt: got null, which is for pairs of whole conversations; name the prompt's column"
            )
        if data.prompt_words and (data.template is not None or data.text or data.messages):
            raise ValueError("data.prompt_words: is for data.prompt alone; leave it or template, text and messages out")
        if data.curriculum is not None and not self.spec.samples:
            raise ValueError(
                f"data.curriculum: is for algorithms that sample, and {self.algorithm} does not; leave it out"
            )
        if data.streaming:
            self._check_streaming()
        if data.few_shot is not None and (data.text or data.messages or data.prompt is None):
            raise ValueError(
                "data.few_shot: its examples are written as the prompts of a column or a template; leave it out of "
                "whole texts and conversations"
            )
        if data.template is not None and (data.text or data.messages):
            raise ValueError("data.template: an example of data.text or data.messages is taken as it is; leave it out")
        if self.spec.rows not in ("prompts", "completions") or data.text or data.messages:
            data.answer = data.answer if "answer" in data.model_fields_set else None
        elif self.spec.rows == "completions":
            if data.completion and "answer" not in data.model_fields_set:
                data.answer = None
            data.completion = data.completion or data.answer
            if data.completion is None:
                raise ValueError(
                    "data.completion: missing; name the column that is learned (or data.messages, data.text)"
                )

    def _check_streaming(self) -> None:
        """Check that a recipe asks for nothing that is known only of rows that are all at hand."""
        data, name = self.data, self.algorithm
        if self.spec.rows not in ("prompts", "completions"):
            raise ValueError(f"data.streaming: {name} reads all rows before it trains; leave data.streaming out")
        whole = {
            "data.curriculum": (data.curriculum is not None, "sorts all rows"),
            "data.train_size": (data.train_size is not None, "draws from all rows"),
            "data.field": (data.field is not None, "is for a JSON document, which is read as a whole"),
            "training.num_train_epochs": (self.training.num_train_epochs is not None, "needs the number of rows"),
            f"{self.spec.section}.set_aside_steps": (
                bool(getattr(self.spec.own(self), "set_aside_steps", 0)),
                "keeps account of all prompts",
            ),
        }
        for key, (is_set, why) in whole.items():
            if is_set:
                remedy = "; set training.max_steps" if "epochs" in key else ""
                raise ValueError(f"data.streaming: {key} {why}; leave one of them out{remedy}")
        if data.bad_rows != "drop":
            raise ValueError(
                "data.streaming: rows are read while the run goes on, and one that cannot be learned from would end "
                "it; set data.bad_rows=drop, which leaves them out and counts them"
            )

    def _check_rewards(self) -> None:
        names = [reward.name for reward in self.rewards]
        if self.spec.rewards == "needed" and not names:
            raise ValueError(f"rewards: missing; {self.algorithm} needs at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: two rewards have the same name ({', '.join(names)}); give one a `name:`")
        if taken := {"mean", "std"}.intersection(names):
            raise ValueError(
                f"rewards: the name {taken.pop()!r} is taken by a metric of all rewards; give another `name:`"
            )
        self._check_gates(names)
        for reward in self.rewards:
            if reward.normalize != "none" and not self.spec.samples:
                raise ValueError(
                    f"rewards: {reward.name}: normalize is for rewards that are learned from, and {self.algorithm} "
                    "only evaluates with them; leave it out"
                )
            if reward.normalize == "group" and self.generation.num_generations < 2:
                raise ValueError(
                    f"rewards: {reward.name}: normalize: group compares the completions of a prompt, and "
                    "generation.num_generations is 1; take at least 2, or normalize: batch"
                )
        self.evaluation.accuracy = self.evaluation.accuracy or (names[0] if names else "")
        if self.evaluation.accuracy and self.evaluation.accuracy not in names:
            raise ValueError(
                f"evaluation.accuracy: got {self.evaluation.accuracy!r}, which is no reward of this recipe "
                f"({', '.join(names)}){did_you_mean(self.evaluation.accuracy, names)}"
            )

    def _check_evaluation(self) -> None:
        wanted, own = self.evaluation, self.spec.section
        if wanted.steps is not None and not self.data.eval_size:
            raise ValueError(
                f"evaluation.steps: got {wanted.steps}, but nothing is held out (data.eval_size is 0); set "
                "data.eval_size=N, or leave evaluation.steps out"
            )
        if wanted.steps is not None and getattr(self.spec.own(self), "eval_steps", None) is not None:
            raise ValueError(
                f"{own}.eval_steps, evaluation.steps: got both; evaluation.steps measures all that {own}.eval_steps "
                f"does, so leave {own}.eval_steps out"
            )
        for key, is_set in (("keep_best", wanted.keep_best), ("patience", wanted.patience is not None)):
            if is_set and wanted.steps is None:
                raise ValueError(
                    f"evaluation.{key}: is for evaluations while the run goes on, and there are none; set "
                    f"evaluation.steps=N, or leave evaluation.{key} out"
                )
        if wanted.min_delta and wanted.patience is None:
            raise ValueError("evaluation.min_delta: is for evaluation.patience; set that to N, or leave it out")
        if wanted.keep_best and self.spec.leaves == "model":
            raise ValueError(f"evaluation.keep_best: a {self.spec.title}'s run keeps no checkpoints; leave it out")
        names = [f"reward/{name}" for name in ("mean", *(reward.name for reward in self.rewards))]
        if wanted.metric.startswith("reward/") and wanted.metric not in names:
            raise ValueError(
                f"evaluation.metric: got {wanted.metric!r}; of rewards this recipe has {', '.join(names)}"
                f"{did_you_mean(wanted.metric, names)}"
            )

    def _check_gates(self, names: list[str]) -> None:
        """Check that `requires` names rewards of this recipe, and that none requires itself by way of others."""
        gates = {reward.name: list(reward.gates) for reward in self.rewards}
        for name, required in gates.items():
            for other in required:
                if other not in names:
                    raise ValueError(
                        f"rewards: {name} requires {other!r}, which is no reward of this recipe "
                        f"({', '.join(names)}){did_you_mean(other, names)}"
                    )
        if circle := _circle(gates):
            raise ValueError(
                f"rewards: {' requires '.join(circle)}, a circle in which none would count; take one requires out"
            )

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML; of ``max_steps`` and ``num_train_epochs`` the one that was given.

        A section that was added belongs to its own algorithm's recipes alone, which other programs read as well.
        """
        values = self.model_dump(exclude=_added - {self.spec.section})
        del values["training"]["max_steps" if values["training"]["num_train_epochs"] else "num_train_epochs"]
        return write_yaml(values)


def _of_number(number: int, error: str) -> str:
    """Return an error about a recipe of one task alone as it is about the task of this number."""
    if error.startswith("evaluation.accuracy"):
        return f"tasks[{number}].{error.removeprefix('evaluation.')}"
    return f"tasks[{number}].{error}" if error.startswith(("data.", "rewards")) else error


def _circle(gates: dict[str, list[str]]) -> list[str]:
    """Return names each of which requires the next, the last being the first again; empty where there is no circle."""
    left = dict(gates)
    while free := [name for name, required in left.items() if not left.keys() & required]:
        for name in free:
            del left[name]
    way = list(left)[:1]
    while way and way[-1] not in way[:-1]:
        way.append(next(name for name in left[way[-1]] if name in left))
    return way[way.index(way[-1]) :] if way else []


_added: set[str] = set()  # sections of algorithms from outside


def add_section(key: str, settings: type[Section]) -> None:
    """Give recipes a section; one that was added before may be replaced.

    Raises:
        UserError: the key is one of every recipe.
    """
    if key in Recipe.model_fields and key not in _added:
        raise UserError(f"algorithm: {key!r} is a key of every recipe; give the spec another section")
    field = FieldInfo(annotation=settings, default_factory=settings)
    Recipe.model_fields[key] = field
    Recipe.model_rebuild(force=True)
    _added.add(key)
