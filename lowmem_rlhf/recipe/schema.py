"""The schema of a whole recipe, and how its sections go together. Loads without torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lowmem_rlhf.recipe.sections import (
    REWARD_ADAPTER,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    HardwareConfig,
    LoraSettings,
    Name,
    NameOrNull,
    RewardConfig,
    TrainingConfig,
)
from lowmem_rlhf.recipe.settings import (
    ClassifierSettings,
    GRPOSettings,
    PPOSettings,
    RewardModelSettings,
    Section,
    SFTSettings,
)
from lowmem_rlhf.recipe.trl import TRL_TRAINERS, check_trl_section, fill_trl_data, known_algorithm
from lowmem_rlhf.recipe.yaml_tree import write_yaml
from lowmem_rlhf.suggest import did_you_mean

Own = Literal["grpo", "ppo", "rloo", "reinforce_plus_plus", "sft", "reward_model", "classifier"]
TRLs = Literal["trl/dpo", "trl/kto", "trl/orpo", "trl/cpo"]
Algorithm = Annotated[Literal[Own, TRLs], BeforeValidator(known_algorithm)]
ONLINE = ("grpo", "ppo", "rloo", "reinforce_plus_plus")  # algorithms that sample and score what they learn from


class Recipe(Section):
    """A run. Paths are taken as written: relative to the folder the command runs in."""

    name: str = ""
    description: str = ""
    algorithm: Algorithm = "grpo"
    adapter: NameOrNull = None  # a run or adapter folder to continue from; the reference is then the model with it
    model: (
        Name  # a Hub id, a local folder, a .gguf file, or package:PACKAGE/FILE for a file inside an installed package
    )
    revision: NameOrNull = None
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
        if data.bad_rows == "drop":
            data.long_prompts = "drop"  # a long row is a bad one
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
        if data.text and self.sft.learn == "all":
            raise ValueError("sft.learn: got all, which is for conversations; a text of data.text is learned whole")
        if data.prompt is None and not (data.chosen or data.template is not None or data.text or data.messages):
            raise ValueError(
                "data.prompt: got null, which is for pairs of whole conversations; name the prompt's column"
            )
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
        """Return the resolved recipe as YAML; of ``max_steps`` and ``num_train_epochs`` the one that was given."""
        values = self.model_dump()
        del values["training"]["max_steps" if values["training"]["num_train_epochs"] else "num_train_epochs"]
        return write_yaml(values)
