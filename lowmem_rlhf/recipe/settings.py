"""The algorithms' sections of a recipe, and what every section is. Loads without torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from lowmem_rlhf.recipe.kinds import choices_of
from lowmem_rlhf.suggest import spelled


class Section(BaseModel):
    """A part of a recipe; a key that is not a field is an error, and a choice may be written in capitals."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @classmethod
    def kind_of(cls, key: str, given: Mapping[str, Any]) -> Any:
        """Return the annotation of a key's value; Any for a key that is no field.

        Args:
            key: the key.
            given: the texts that stand beside it.
        """
        return cls.model_fields[key].annotation if key in cls.model_fields else Any

    @model_validator(mode="before")
    @classmethod
    def _as_spelled(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: _chosen(value, cls.kind_of(key, {})) for key, value in values.items()}


def _chosen(value: Any, annotation: Any) -> Any:
    """Return a value with its texts as the annotation spells them, where it has such choices."""
    if isinstance(value, list):
        return [_chosen(one, annotation) for one in value]
    return spelled(value, choices_of(annotation)) if isinstance(value, str) else value


def _own_function(value: Any, chosen: ValidatorFunctionWrapHandler) -> Any:
    """Let a ``path.py:function`` pass beside the choices."""
    return value if isinstance(value, str) and ":" in value else chosen(value)


class GRPOSettings(Section):
    """GRPO's hyper-parameters under TRL's names."""

    beta: float = Field(0.0, ge=0)
    epsilon: float = Field(0.2, gt=0, lt=1)
    epsilon_high: float | None = Field(None, gt=0)
    # or a loss of one's own as path.py:function, see `algorithms.grpo.losses`
    loss_type: Annotated[Literal["grpo", "bnpo", "dr_grpo", "dapo"], WrapValidator(_own_function)] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    num_iterations: int = Field(1, ge=1)
    mask_truncated_completions: bool = False
    # TRL's vllm_importance_sampling_*: weigh tokens by how far sampling and the training pass differ in log-probs
    importance_sampling_correction: bool = False
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    importance_sampling_clip_max: float | None = Field(3.0, gt=0)
    importance_sampling_clip_min: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _ordered_bounds(self) -> "GRPOSettings":
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"importance_sampling_clip_min: got {low:g}; it should be less than importance_sampling_clip_max, "
                f"which is {high:g}"
            )
        if self.importance_sampling_correction and low is None and high is None:
            raise ValueError(
                "importance_sampling_correction: a bound is missing; give importance_sampling_clip_max or "
                "importance_sampling_clip_min"
            )
        return self


class PPOSettings(Section):
    """PPO's hyper-parameters, under the names of TRL's last PPO; RLOO and REINFORCE++ have those that fit them."""

    kl_coef: float = Field(0.05, ge=0)
    kl_estimator: Literal["k1", "k3"] = "k1"
    kl_target: float | None = Field(None, gt=0)  # nats a completion that an adaptive kl_coef aims at; absent: fixed
    kl_horizon: float = Field(10_000, gt=0)  # completions over which the adaptive coefficient changes
    num_ppo_epochs: int = Field(4, ge=1)
    num_mini_batches: int = Field(1, ge=1)
    cliprange: float = Field(0.2, gt=0)
    entropy_coef: float = Field(0.0, ge=0)
    target_kl: float | None = Field(None, gt=0)  # the epochs end once approx_kl is above 1.5 times this
    gamma: float = Field(1.0, gt=0, le=1)
    missing_eos_penalty: float | None = Field(None, ge=0)  # subtracted from the score of an answer that was cut
    normalize_scores: Literal["none", "batch", "running"] = "none"
    cliprange_reward: float | None = Field(None, gt=0)
    # PPO alone
    critic: Literal["adapter", "reward", "policy"] = "adapter"  # its own; its own, from the reward adapter; a head only
    lam: float = Field(0.95, ge=0, le=1)
    vf_coef: float = Field(0.1, gt=0)
    cliprange_value: float | None = Field(0.2, gt=0)
    whiten_rewards: bool = False
    bootstrap_truncated: bool = False  # an answer that was cut is worth what the critic expects from there
    score_position: Literal["last", "after_last"] = "last"  # after_last: one slot later, as TRL's PPO had it
    # RLOO alone
    normalize_advantages: bool = False
    # REINFORCE++ alone
    group_baseline: bool = False  # scores less their prompt's mean


class SFTSettings(Section):
    """Supervised fine-tuning, under TRL's names. Examples are always packed."""

    max_length: int = Field(1024, ge=2)  # tokens of an example
    completion_only_loss: bool = True  # False: prompts are learned too
    learn: Literal["last", "all"] = "last"  # of a conversation's answers: the last one, or each of them
    eval_steps: int | None = Field(None, ge=1)  # held-out loss every so many steps; absent: before and after


class RewardModelSettings(Section):
    """A reward model from preference pairs (Bradley-Terry), under TRL's names."""

    max_length: int = Field(1024, ge=2)  # tokens of a prompt with one answer
    center_rewards_coefficient: float | None = Field(None, gt=0)  # pulls the two scores' sum to 0
    eval_steps: int | None = Field(None, ge=1)


class ClassifierSettings(Section):
    """A sequence classifier (BERT and the like), trained whole; the `model` of the recipe is where it starts."""

    max_length: int | None = Field(None, ge=1)  # tokens read of a text; absent: all that the model can read
    batch_tokens: int = Field(4096, ge=1)  # tokens of one pass, padding included
