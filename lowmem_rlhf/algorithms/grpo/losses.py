"""GRPO's losses: a table from ``grpo.loss_type`` to a pure function, and the user's own as ``path.py:function``.

A loss gives every scored token its share of the whole batch's loss; the loss is the sum over all tokens of the batch.
So a batch may be cut into micro-batches between any completions: each backward pass adds the gradient of its own
tokens, and all that a share is divided by is known before the first one.

The names are TRL's, and so are the numbers: docs/stages.md has the papers. A completion without an advantage has no
gradient in any of them while there is no KL term, and still counts in what the others are divided by.

Shapes: S scored tokens of a micro-batch, N completions of the whole batch.
"""

from dataclasses import dataclass

import torch

from lowmem_rlhf.algorithms.grpo.inputs import LossFunction, LossInputs
from lowmem_rlhf.algorithms.grpo.math import (
    clipped_surrogate,
    gamma_weights,
    out_of_range,
    soft_surrogate,
    truncated_surrogate,
)
from lowmem_rlhf.algorithms.grpo.own_loss import load_own
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings


def clipped(inputs: LossInputs) -> torch.Tensor:
    """Return the clipped surrogate and the KL term of each token (S,), not yet normalised."""
    ratio = inputs.ratio()
    bounds = (inputs.epsilon_low, inputs.epsilon_high, inputs.settings.delta)
    return inputs.objective(clipped_surrogate(ratio, inputs.advantages, *bounds), ratio)


def grpo(inputs: LossInputs) -> torch.Tensor:
    """The mean over the tokens of a completion, then over the completions."""
    return clipped(inputs) * (inputs.completions * inputs.lengths).reciprocal()


def dapo(inputs: LossInputs) -> torch.Tensor:
    """The mean over all tokens. BNPO is the same here: TRL's differ only in which batch that is."""
    return clipped(inputs) * (1.0 / inputs.tokens)


def dr_grpo(inputs: LossInputs) -> torch.Tensor:
    """The sum over all tokens, by as many as there may be."""
    return clipped(inputs) * (1.0 / (inputs.completions * inputs.max_completion_length))


def luspo(inputs: LossInputs) -> torch.Tensor:
    """The sum over the tokens of a completion, whose ratio is one, then the mean over the completions."""
    return clipped(inputs) * (1.0 / inputs.completions)


def cispo(inputs: LossInputs) -> torch.Tensor:
    """The log-prob of every token by its truncated ratio, so that none loses its gradient; the mean over all tokens."""
    ratio = inputs.ratio()
    surrogate = truncated_surrogate(ratio, inputs.advantages, inputs.logps, inputs.epsilon_high)
    return inputs.objective(surrogate, ratio) * (1.0 / inputs.tokens)


def sapo(inputs: LossInputs) -> torch.Tensor:
    """A sigmoid of the ratio in place of the clip; the mean over the tokens of a completion, then over these."""
    ratio, settings = inputs.ratio(), inputs.settings
    temperatures = (settings.sapo_temperature_pos, settings.sapo_temperature_neg)
    loss = inputs.objective(soft_surrogate(ratio, inputs.advantages, *temperatures), ratio)
    return loss * (inputs.completions * inputs.lengths).reciprocal()


def vespo(inputs: LossInputs) -> torch.Tensor:
    """The log-prob of every token by a weight of its completion that falls off both ways; the mean over all tokens."""
    ratio = inputs.ratio()
    surrogate = -vespo_weights(inputs) * inputs.advantages * inputs.logps
    return inputs.objective(surrogate, ratio, weighted=False) * (1.0 / inputs.tokens)


def vespo_weights(inputs: LossInputs) -> torch.Tensor:
    """Return VESPO's weight of each token's completion (S,); the sampler's difference is a part of it."""
    settings = inputs.settings
    return gamma_weights(
        inputs.logps - inputs.old_logps,
        inputs.advantages,
        inputs.sampling_weights,
        inputs.row_index,
        inputs.rows,
        (settings.vespo_k_pos, settings.vespo_k_neg),
        (settings.vespo_lambda_pos, settings.vespo_lambda_neg),
    )


LOSSES: dict[str, LossFunction] = {
    **{"grpo": grpo, "bnpo": dapo, "dr_grpo": dr_grpo, "dapo": dapo},
    **{"luspo": luspo, "cispo": cispo, "sapo": sapo, "vespo": vespo},
}


@torch.no_grad()
def measured(inputs: LossInputs, ratio: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what is told of a micro-batch's ratios: sums over tokens, or over completions where these have one ratio.

    ``clipped_low`` and ``clipped_high`` count those out of the clip range (CISPO: of weights that were truncated, with
    an advantage above 0), ``phi_seq`` sums VESPO's weights over completions. ``left_out`` counts tokens whose policy
    term does not count.
    """
    kind = inputs.settings.loss_type
    by_sequence = kind == "vespo" or inputs.settings.importance_sampling_level == "sequence"
    # the tokens of a completion count as one together
    each = inputs.lengths.reciprocal() if by_sequence else None
    found = {} if inputs.kept is None else {"left_out": (1 - inputs.kept).sum()}
    if kind == "sapo":
        return found
    shares: dict[str, torch.Tensor]
    if kind == "vespo":
        shares = {"phi_seq": vespo_weights(inputs)}
    elif kind == "cispo":
        shares = {"clipped_high": (ratio > inputs.epsilon_high) & (inputs.advantages > 0)}
    else:
        low, high = out_of_range(ratio, inputs.advantages, inputs.epsilon_low, inputs.epsilon_high)
        shares = {"clipped_low": low, "clipped_high": high}
    return {**found, **{name: (one if each is None else one * each).sum() for name, one in shares.items()}}


@dataclass(frozen=True)
class Loss:
    """A loss that a recipe names.

    Attributes:
        function: see `LOSSES`.
        needs_advantage: without beta, a completion whose advantage is 0 has no gradient, and need not be computed.
    """

    function: LossFunction
    needs_advantage: bool = True


def load_loss(loss_type: str, settings: GRPOSettings | None = None) -> Loss:
    """Return the loss of this name, or the function of a ``path.py:function``, which is executed on a small trial.

    Args:
        settings: what the trial's inputs have; None: the defaults.

    Raises:
        UserError: there is no such loss; the file or the function is absent or fails; or what the function returns is
            no loss of tokens.
    """
    if loss_type in LOSSES:
        return Loss(LOSSES[loss_type])
    return Loss(*load_own(loss_type, settings or GRPOSettings()))
