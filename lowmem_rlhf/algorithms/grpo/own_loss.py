"""Losses of the user's own, ``grpo.loss_type: path.py:function``: tried before the run, and watched in it.

Shapes: S scored tokens of a micro-batch.
"""

import itertools
from dataclasses import fields, replace
from functools import wraps
from typing import Any

import torch

from lowmem_rlhf.algorithms.grpo.inputs import LossFunction, LossInputs
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.rewards.guarded import FunctionFault, guarded
from lowmem_rlhf.rewards.process_state import preserved
from lowmem_rlhf.user_code import describe, line_in, load_function


def load_own(name: str, settings: GRPOSettings) -> tuple[LossFunction, bool]:
    """Return the function of a ``path.py:function``, and whether completions without an advantage have no gradient.

    Raises:
        UserError: the file or the function is absent or fails; what the function returns is no loss of tokens; or it
            does not read what the settings leave out.
    """
    with preserved(path=False):
        function = load_function(name, "grpo.loss_type", "a loss", "(inputs)")
    needs_advantage = _needs_advantage(name, function, settings)
    _check_left_out(name, function, settings)
    return _checked(name, function), needs_advantage


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


def _needs_advantage(name: str, function: LossFunction, settings: GRPOSettings) -> bool:
    """Try a user's loss; return whether completions without an advantage have no gradient.

    Raises:
        UserError: it fails, or gives something else than a differentiable number a token, each token's alone.
    """
    trial = _trial(settings)
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


def _check_left_out(name: str, function: LossFunction, settings: GRPOSettings) -> None:
    """Check that tokens are left out by a user's loss, where the settings ask for it.

    Raises:
        UserError: they have a gradient.
    """
    if not settings.leave_out:
        return
    trial = _trial(settings)
    _, gradient = _tried(name, function, replace(trial, beta=0.0, kept=torch.zeros_like(trial.lengths)))
    if bool(gradient.any()):
        keys = " and ".join(f"grpo.{key}" for key in settings.leave_out)
        raise UserError(
            f"grpo.loss_type: {name} learns from tokens that {keys} leaves out; multiply its policy term by inputs.kept"
        )


def _trial(settings: GRPOSettings) -> LossInputs:
    """Return three completions of 2, 3 and 4 tokens."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    logps, old, ref = torch.randn((3, 9), generator=generator, dtype=torch.float32, device="cpu").mul(0.1).sub(1.0)
    lengths = torch.tensor([2.0] * 2 + [3.0] * 3 + [4.0] * 4, dtype=torch.float32, device="cpu")
    advantages = lengths - 3.25
    rows = torch.tensor([0] * 2 + [1] * 3 + [2] * 4, dtype=torch.long, device="cpu")
    kept = torch.ones_like(lengths) if settings.leave_out else None
    return LossInputs(logps, old, ref, advantages, lengths, None, 3, 9, 8, 0.2, 0.2, 0.1, rows, 3, kept, settings)


def _cut(inputs: LossInputs, part: slice) -> LossInputs:
    """Return the inputs of one completion's tokens."""
    names = ("logps", "old_logps", "ref_logps", "advantages", "lengths")
    own = {name: getattr(inputs, name)[part] for name in names}
    own["kept"] = None if inputs.kept is None else inputs.kept[part]
    return replace(inputs, **own, row_index=torch.zeros_like(inputs.row_index[part]), rows=1)


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
