"""The recipe's section `grpo`. Loads without torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from lowmem_rlhf.recipe.bounds import MOST_COEFFICIENT, MOST_EPOCHS, MOST_STEPS
from lowmem_rlhf.recipe.section import Section


def _own_function(value: Any, chosen: ValidatorFunctionWrapHandler) -> Any:
    """Let a ``path.py:function`` pass beside the choices."""
    return value if isinstance(value, str) and ":" in value else chosen(value)


class GRPOSettings(Section):
    """GRPO's hyper-parameters under TRL's names."""

    beta: float = Field(0.0, ge=0, le=MOST_COEFFICIENT)  # of the KL term to the reference; 0: no reference is run
    epsilon: float = Field(0.2, gt=0, lt=1)  # how far a ratio counts below 1, and above it without epsilon_high
    # how far it counts above 1; of cispo the largest weight itself
    epsilon_high: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)
    # or a loss of one's own as path.py:function, see `algorithms.grpo.losses`
    loss_type: Annotated[
        Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"], WrapValidator(_own_function)
    ] = "dapo"
    # one ratio a token, or one a completion: the geometric mean over its tokens (GSPO)
    importance_sampling_level: Literal["token", "sequence"] = "token"
    delta: float | None = Field(None, gt=1, le=MOST_COEFFICIENT)  # the most that a ratio counts where A is negative
    use_bias_correction_kl: bool = True  # the KL term times the ratio: the gradient is the KL's own (arXiv 2512.02556)
    # nats a token from sampling to now, above which completions with a negative advantage are left out
    off_policy_mask_threshold: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)
    sapo_temperature_pos: float = Field(1.0, gt=0, le=MOST_COEFFICIENT)  # sapo: of its soft gate, where A is positive
    sapo_temperature_neg: float = Field(1.05, gt=0, le=MOST_COEFFICIENT)  # sapo: of its soft gate, where A is negative
    # vespo: power of a completion's weight, where A is positive
    vespo_k_pos: float = Field(2.0, ge=0, le=MOST_COEFFICIENT)
    # vespo: decay of a completion's weight, where A is positive
    vespo_lambda_pos: float = Field(3.0, ge=0, le=MOST_COEFFICIENT)
    # vespo: power of a completion's weight, where A is negative
    vespo_k_neg: float = Field(3.0, ge=0, le=MOST_COEFFICIENT)
    # vespo: decay of a completion's weight, where A is negative
    vespo_lambda_neg: float = Field(2.0, ge=0, le=MOST_COEFFICIENT)
    # the share of tokens, those of the highest entropy, whose policy term counts
    top_entropy_quantile: float = Field(1.0, ge=0, le=1)
    entropy_coef: float = Field(0.0, ge=0, le=MOST_COEFFICIENT)  # of the entropy in the objective; 0: none
    # the coefficient goes up by delta after a step at or below the target (nats a token), and applies there only
    use_adaptive_entropy: bool = False
    entropy_target: float = Field(0.2, ge=0, le=MOST_COEFFICIENT)  # of use_adaptive_entropy, nats a token
    # of use_adaptive_entropy: what the coefficient changes by
    entropy_coef_delta: float = Field(0.005, ge=0, le=MOST_COEFFICIENT)
    entropy_coef_min: float = Field(0.0, ge=0, le=MOST_COEFFICIENT)  # of use_adaptive_entropy: the least coefficient
    entropy_coef_max: float = Field(1.0, ge=0, le=MOST_COEFFICIENT)  # of use_adaptive_entropy: the largest coefficient
    # the reference moves: every so many optimizer steps it becomes (1 - alpha) times itself and alpha times the policy
    sync_ref_model: bool = False
    ref_model_sync_steps: int = Field(512, ge=1, le=MOST_STEPS)  # optimizer steps between changes of the reference
    ref_model_mixup_alpha: float = Field(0.6, gt=0, le=1)  # the policy's share in a change
    # of the adapter that holds it, in ranks of the policy's (see `engine.following`)
    ref_model_rank_multiple: int = Field(2, ge=1, le=16)
    # what an advantage is divided by: the deviation of its group, of the step, or nothing
    scale_rewards: Literal["group", "batch", "none"] = "group"
    # the most batches of prompts that a step samples until every group has different rewards (DAPO's dynamic sampling)
    max_generation_batches: int = Field(1, ge=1, le=64)
    # steps for which a prompt whose completions all had the same reward is left out; 0: none is
    set_aside_steps: int = Field(0, ge=0, le=MOST_STEPS)
    num_iterations: int = Field(1, ge=1, le=MOST_EPOCHS)  # optimizer steps on each rollout
    mask_truncated_completions: bool = False  # completions that reached the limit teach nothing
    # TRL's vllm_importance_sampling_*: weigh tokens by how far sampling and the training pass differ in log-probs
    importance_sampling_correction: bool = False
    # bound the weights of tokens or completions, or leave out those beyond the bounds
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    # the largest weight of the correction
    importance_sampling_clip_max: float | None = Field(3.0, gt=0, le=MOST_COEFFICIENT)
    # the smallest weight of the correction
    importance_sampling_clip_min: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)

    @property
    def entropy_bonus(self) -> bool:
        """Whether the objective has entropy in it, be its coefficient 0 for a while."""
        return self.entropy_coef != 0 or self.use_adaptive_entropy

    @property
    def leave_out(self) -> list[str]:
        """The keys that leave the policy terms of some tokens out."""
        quantile = ["top_entropy_quantile"] if self.top_entropy_quantile < 1 else []
        return quantile + (["off_policy_mask_threshold"] if self.off_policy_mask_threshold is not None else [])

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
        least, most = self.entropy_coef_min, self.entropy_coef_max
        if self.use_adaptive_entropy and not least <= self.entropy_coef <= most:
            raise ValueError(
                f"entropy_coef: got {self.entropy_coef:g}; it should be from entropy_coef_min, which is {least:g}, to "
                f"entropy_coef_max, which is {most:g}"
            )
        return self

    @model_validator(mode="after")
    def _has_a_reference(self) -> "GRPOSettings":
        if self.sync_ref_model and not self.beta:
            raise ValueError(
                "sync_ref_model: got true with beta 0, where the loss has no reference that could follow the policy; "
                "set beta above 0 (0.04 is usual) or leave sync_ref_model out"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_loss(self) -> "GRPOSettings":
        kind, level = self.loss_type, self.importance_sampling_level
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if kind == "luspo" and level == "token":
            raise ValueError(
                "importance_sampling_level: got token; luspo is a loss of whole completions, set it to sequence"
            )
        if kind == "vespo" and level == "sequence":
            raise ValueError(
                "importance_sampling_level: got sequence; vespo weighs whole completions by itself, leave it at token"
            )
        if kind == "vespo" and self.importance_sampling_correction and "sequence" in self.importance_sampling_mode:
            raise ValueError(
                f"importance_sampling_mode: got {self.importance_sampling_mode}; vespo multiplies the weights of "
                "tokens itself, set it to token_truncate or token_mask"
            )
        if kind == "cispo" and high < 1:
            raise ValueError(
                f"epsilon_high: got {high:g}; for cispo it is the largest weight itself, which is 1 on the policy; "
                "set it to 1 or more (5 is usual)"
            )
        if self.delta is not None and kind in ("cispo", "sapo", "vespo"):
            raise ValueError(f"delta: {kind} has no clip range that it could bound; leave it out")
        if self.delta is not None and self.delta <= 1 + high:
            raise ValueError(f"delta: got {self.delta:g}; it should be above {1 + high:g}, where the clip range ends")
        return self
