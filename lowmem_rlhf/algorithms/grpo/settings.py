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

    beta: float = Field(0.0, ge=0, le=MOST_COEFFICIENT)
    epsilon: float = Field(0.2, gt=0, lt=1)
    epsilon_high: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)
    # or a loss of one's own as path.py:function, see `algorithms.grpo.losses`
    loss_type: Annotated[Literal["grpo", "bnpo", "dr_grpo", "dapo"], WrapValidator(_own_function)] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    # the most batches of prompts that a step samples until every group has different rewards (DAPO's dynamic sampling)
    max_generation_batches: int = Field(1, ge=1, le=64)
    # steps for which a prompt whose completions all had the same reward is left out; 0: none is
    set_aside_steps: int = Field(0, ge=0, le=MOST_STEPS)
    num_iterations: int = Field(1, ge=1, le=MOST_EPOCHS)
    mask_truncated_completions: bool = False
    # TRL's vllm_importance_sampling_*: weigh tokens by how far sampling and the training pass differ in log-probs
    importance_sampling_correction: bool = False
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    importance_sampling_clip_max: float | None = Field(3.0, gt=0, le=MOST_COEFFICIENT)
    importance_sampling_clip_min: float | None = Field(None, gt=0, le=MOST_COEFFICIENT)

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
