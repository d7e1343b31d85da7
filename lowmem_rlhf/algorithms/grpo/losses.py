"""GRPO's losses: a table from ``grpo.loss_type`` to a pure function, and the user's own as ``path.py:function``.

A loss gives every scored token its share of the whole batch's loss; the loss is the sum over all tokens of the batch.
So a batch may be cut into micro-batches anywhere: each backward pass adds the gradient of its own tokens, and all that
a share is divided by is known before the first one.

The normalisations are those of GRPO (DeepSeekMath, arXiv 2402.03300), BNPO, Dr. GRPO (arXiv 2503.20783) and DAPO
(arXiv 2503.14476), with TRL's names.

Shapes: S scored tokens of a micro-batch, N completions of the whole batch.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import torch

from lowmem_rlhf.algorithms.grpo.math import token_loss
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.rewards.guarded import FunctionFault, guarded
from lowmem_rlhf.rewards.process_state import preserved
from lowmem_rlhf.user_code import describe, line_in, load_function


@dataclass(frozen=True)
class LossInputs:
    """What a loss is given.

    Attributes:
        logps: (S,) fp32 log-probs of the policy, in nats; the only one with a gradient.
        old_logps: (S,) of the policy that sampled; in the first iteration the values of ``logps``.
        ref_logps: (S,) of the reference; without beta only some completions have been scored with it, and the others
            have the values of ``logps``.
        advantages: (S,) of each token's completion.
        lengths: (S,) fp32, tokens of each token's completion.
        sampling_weights: (S,) of the correction for the sampler's log-probs (`math.importance_weights`); None: none.
        completions: N, completions without an advantage and masked ones included.
        tokens: tokens of all N completions but the masked ones, at least 1.
        max_completion_length: the limit on the tokens of a completion.
        epsilon_low, epsilon_high: how far a ratio may go from 1.
        beta: weight of the KL term.
    """

    logps: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor
    advantages: torch.Tensor
    lengths: torch.Tensor
    sampling_weights: torch.Tensor | None
    completions: int
    tokens: int
    max_completion_length: int
    epsilon_low: float
    epsilon_high: float
    beta: float


LossFunction = Callable[[LossInputs], torch.Tensor]


def clipped_surrogate(inputs: LossInputs) -> torch.Tensor:
    """Return the clipped surrogate and the KL term of each token (S,), not yet normalised; see `math.token_loss`."""
    return token_loss(
        inputs.logps,
        inputs.old_logps,
        inputs.advantages,
        inputs.epsilon_low,
        inputs.epsilon_high,
        inputs.ref_logps,
        inputs.beta,
        inputs.sampling_weights,
    )


def grpo(inputs: LossInputs) -> torch.Tensor:
    """The mean over the tokens of a completion, then over the completions."""
    return clipped_surrogate(inputs) * (inputs.completions * inputs.lengths).reciprocal()


def dapo(inputs: LossInputs) -> torch.Tensor:
    """The mean over all tokens. BNPO is the same here: TRL's differ only in which batch that is."""
    return clipped_surrogate(inputs) * (1.0 / inputs.tokens)


def dr_grpo(inputs: LossInputs) -> torch.Tensor:
    """The sum over all tokens, by as many as there may be."""
    return clipped_surrogate(inputs) * (1.0 / (inputs.completions * inputs.max_completion_length))


LOSSES: dict[str, LossFunction] = {"grpo": grpo, "bnpo": dapo, "dr_grpo": dr_grpo, "dapo": dapo}


@dataclass(frozen=True)
class Loss:
    """A loss that a recipe names.

    Attributes:
        function: see `LOSSES`.
        needs_advantage: without beta, a completion whose advantage is 0 has no gradient, and need not be computed.
    """

    function: LossFunction
    needs_advantage: bool = True


def load_loss(loss_type: str) -> Loss:
    """Return the loss of this name, or the function of a ``path.py:function``, which is executed on a small trial.

    Raises:
        UserError: there is no such loss; the file or the function is absent or fails; or what the function returns is
            no loss of tokens.
    """
    if loss_type in LOSSES:
        return Loss(LOSSES[loss_type])
    with preserved(path=False):
        function = load_function(loss_type, "grpo.loss_type", "a loss", "(inputs)")
    return Loss(_checked(loss_type, function), _needs_advantage(loss_type, function))


def _checked(name: str, function: LossFunction) -> LossFunction:
    """Return a user's loss, called so that it cannot harm the run; what it gives is looked at in every micro-batch.

    Raises (when called):
        RunError: it fails, or gives something else than a finite number a token, with a gradient.
    """
    what, source, calls = f"grpo.loss_type: {name}", _file(name), itertools.count()

    @wraps(function)
    def call(inputs: LossInputs) -> torch.Tensor:
        own: dict[str, Any] = {
            one.name: value.clone() for one in fields(inputs) if torch.is_tensor(value := getattr(inputs, one.name))
        }
        try:
            loss: Any = guarded(lambda: function(replace(inputs, **own)), what, source, key=str(next(calls)))
        except FunctionFault as fault:
            raise RunError(str(fault)) from fault.__cause__
        if problem := _problem(loss, inputs.logps):
            raise RunError(f"{what} {problem}")
        finite = torch.isfinite(loss.detach())
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            value, logp, advantage = (float(one.detach()[first]) for one in (loss, inputs.logps, inputs.advantages))
            raise RunError(
                f"{what} gave {value} for a token (log-prob {logp:.4g}, advantage {advantage:.4g}); give a finite "
                "number a token"
            )
        return loss  # type: ignore[no-any-return]  # it is one

    return call


def _file(name: str) -> str:
    return name.rpartition(":")[0]


def _problem(loss: Any, logps: torch.Tensor) -> str:
    """Return what is wrong with what a loss gave for log-probs (S,); empty: nothing."""
    if not torch.is_tensor(loss) or loss.shape != logps.shape:
        got = f"a tensor of shape {tuple(loss.shape)}" if torch.is_tensor(loss) else f"a {type(loss).__name__}"
        return (
            f"gave {got} for inputs.logps of shape {tuple(logps.shape)}; give one number a token, whose sum over all "
            "tokens is the loss"
        )
    if not loss.requires_grad:
        return "gave a loss without a gradient; compute it from inputs.logps"
    return ""


def _needs_advantage(name: str, function: LossFunction) -> bool:
    """Try a user's loss; return whether completions without an advantage have no gradient.

    Raises:
        UserError: it fails, or gives something else than a differentiable number a token, each token's alone.
    """
    trial = _trial()
    whole, gradient = _tried(name, function, trial)
    parts = [_tried(name, function, _cut(trial, part)) for part in (slice(0, 2), slice(2, 5), slice(5, 9))]
    for got, wanted in ((0, whole), (1, gradient)):
        if not torch.allclose(torch.cat([part[got] for part in parts]), wanted, rtol=1e-4, atol=1e-7):
            raise UserError(
                f"grpo.loss_type: {name} gives a token another loss when its batch is cut into micro-batches; "
                "divide by inputs.tokens, inputs.completions or inputs.lengths and take no "
                "mean"
            )
    _, silent = _tried(name, function, replace(trial, advantages=torch.zeros_like(trial.advantages), beta=0.0))
    return not bool(silent.any())


def _trial() -> LossInputs:
    """Return three completions of 2, 3 and 4 tokens."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    logps, old, ref = torch.randn((3, 9), generator=generator, dtype=torch.float32, device="cpu").mul(0.1).sub(1.0)
    lengths = torch.tensor([2.0] * 2 + [3.0] * 3 + [4.0] * 4, dtype=torch.float32, device="cpu")
    advantages = lengths - 3.25
    return LossInputs(logps, old, ref, advantages, lengths, None, 3, 9, 8, 0.2, 0.2, 0.1)


def _cut(inputs: LossInputs, part: slice) -> LossInputs:
    names = ("logps", "old_logps", "ref_logps", "advantages", "lengths")
    return replace(inputs, **{name: getattr(inputs, name)[part] for name in names})


def _tried(name: str, function: LossFunction, inputs: LossInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a loss and its gradient, both (S,)."""
    logps = inputs.logps.clone().requires_grad_()
    with torch.enable_grad():
        try:
            loss: Any = guarded(lambda: function(replace(inputs, logps=logps)), f"grpo.loss_type: {name}")
        except FunctionFault as fault:
            error = fault.__cause__ or fault
            line = line_in(error, _file(name))
            place = "" if line is None else f", line {line}"
            raise UserError(f"grpo.loss_type: {name}{place} fails on a trial: {describe(error)}") from error
    if problem := _problem(loss, logps):
        raise UserError(f"grpo.loss_type: {name} {problem}")
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    return loss.detach(), gradient
