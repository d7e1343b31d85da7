"""The optimizer step: schedules, clipping, float16 loss scaling, and a state that survives a file bit for bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import at_rate
from torch import nn
from training_cases import (
    ADVANTAGES,
    Heard,
    base_of,
    close,
    gradients,
    ladder_of,
    limits_of,
    objective_of,
    ragged_batch,
    settings_of,
    stepper_of,
    weights,
)

from lowmem_rlhf.algorithms.grpo.update import update
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.training.optimizer import INITIAL_LOSS_SCALE, MOST_SKIPPED, OPTIMIZER, Optimizer


def parameters(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = shapes or ((96, 64), (7,))  # bitsandbytes keeps 8-bit moments from 4096 numbers on
    return {f"p{i}": nn.Parameter(torch.randn(shape, generator=generator)) for i, shape in enumerate(shapes)}


def saved(optimizer: Optimizer, folder: Path) -> dict[str, Any]:
    """Write the state's tensors as a checkpoint does; return the rest."""
    save_file({place: tensor.clone() for place, tensor in optimizer.tensors().items()}, folder / OPTIMIZER)
    return optimizer.plain()


def run(optimizer: Optimizer, first: int, last: int) -> list[float]:
    """Take steps first..last-1 with gradients that depend on the step alone; return the learning rates."""
    rates = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        optimizer.zero_grad()
        for p in optimizer.parameters.values():
            p.grad += torch.randn(p.shape, generator=generator)
        rates.append(optimizer.learning_rate)
        optimizer.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(optim, schedule, tmp_path):
    def optimizer() -> Optimizer:
        return stepper_of(
            parameters(),
            optim,
            total=8,
            learning_rate=0.1,
            lr_scheduler_type=schedule,
            warmup_steps=3,
            weight_decay=0.1,
        )

    whole = optimizer()
    rates = run(whole, 0, 7)
    half = optimizer()
    assert run(half, 0, 4) == rates[:4]
    plain = json.loads(json.dumps(saved(half, tmp_path)))

    resumed = optimizer()
    with torch.no_grad():
        for name, p in resumed.parameters.items():
            p.copy_(half.parameters[name])
    resumed.load(tmp_path, plain)
    assert resumed.learning_rate == rates[4]
    assert run(resumed, 4, 7) == rates[4:]
    for name, p in whole.parameters.items():
        assert torch.equal(p, resumed.parameters[name]), name
    for mine, theirs in zip(*(s.torch_optimizer.state.values() for s in (whole, resumed)), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
            assert same, key
            assert not isinstance(value, torch.Tensor) or value.dtype == theirs[key].dtype


def test_without_the_state_it_would_not_go_on_alike(tmp_path):
    whole, forgetful = (stepper_of(parameters(), learning_rate=0.1) for _ in range(2))
    run(whole, 0, 4)
    run(forgetful, 0, 3)
    fresh = stepper_of(forgetful.parameters, learning_rate=0.1)
    run(fresh, 3, 4)
    assert not torch.equal(whole.parameters["p0"], fresh.parameters["p0"])


def test_eight_bit_moments_are_eight_bit():
    optimizer = stepper_of(parameters(), "adamw_8bit")
    run(optimizer, 0, 1)
    state = list(optimizer.torch_optimizer.state.values())
    assert state[0]["state1"].dtype == torch.uint8
    assert state[1]["state1"].dtype == torch.float32


def test_a_state_of_other_parameters_is_refused(tmp_path):
    optimizer = stepper_of(parameters())
    run(optimizer, 0, 1)
    plain = saved(optimizer, tmp_path)
    with pytest.raises(UserError, match=r"has 'p1', which this run does not train"):
        stepper_of({"p0": optimizer.parameters["p0"]}).load(tmp_path, plain)
    more = {**parameters(), "p9": torch.nn.Parameter(torch.zeros(3))}
    with pytest.raises(UserError, match=r"lacks p9, which this run trains"):
        stepper_of(more).load(tmp_path, plain)


SCHEDULES = {
    "constant": [1.0] * 6,
    "constant_with_warmup": [0, 0.5, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "cosine": [0, 0.5, 1, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3))],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    optimizer = stepper_of(parameters(), total=6, learning_rate=1.0, lr_scheduler_type=schedule, warmup_steps=2)
    assert run(optimizer, 0, 6) == pytest.approx(SCHEDULES[schedule])


def test_gradients_are_clipped_to_the_norm_and_their_norm_is_returned():
    got = []
    for scale in (1.0, 50.0):
        optimizer = stepper_of(parameters((2,), (2,)), learning_rate=0.1, max_grad_norm=1.0)
        optimizer.zero_grad()
        for p, gradient in zip(optimizer.parameters.values(), ([3.0, 0.0], [0.0, 4.0]), strict=True):
            p.grad += scale * torch.tensor(gradient)
        assert optimizer.step() == pytest.approx(5 * scale)
        joined = torch.cat([p.grad for p in optimizer.parameters.values()])
        got.append(joined)
        torch.testing.assert_close(joined, torch.tensor([0.6, 0.0, 0.0, 0.8]))
    below = stepper_of(parameters((2,)), max_grad_norm=1.0)
    below.zero_grad()
    below.parameters["p0"].grad += 0.1
    below.step()
    torch.testing.assert_close(below.parameters["p0"].grad, torch.tensor([0.1, 0.1]))


# float16


def small_update(base, optimizer, size: float = 1.0, **training):
    batch = ragged_batch([a * size for a in ADVANTAGES])
    return update(base, optimizer, batch, objective_of(settings_of()), ladder_of(), {}, Heard())


def float16(adapter: float = 0.1, **training):
    base = base_of(dtype=torch.float16, adapter=adapter)
    return base, stepper_of(base.trainable(), scale_loss=True, learning_rate=1e-2, **training)


def test_a_float16_update_moves_the_adapter_as_a_float32_one_does():
    moved = []
    for dtype in (torch.float16, torch.float32):
        base = base_of(dtype=dtype)
        before = weights(base)
        optimizer = stepper_of(base.trainable(), scale_loss=dtype == torch.float16, learning_rate=1e-2)
        stats = small_update(base, optimizer)
        assert optimizer.loss_scale == (INITIAL_LOSS_SCALE if dtype == torch.float16 else 1.0)
        assert all(p.dtype == torch.float32 for p in base.trainable().values())
        moved.append(({n: p - before[n] for n, p in weights(base).items()}, stats))
    (half, half_stats), (full, full_stats) = moved
    assert half_stats.grad_norm == pytest.approx(full_stats.grad_norm, rel=0.02)  # unscaled before it is measured
    assert half_stats.loss == pytest.approx(full_stats.loss, rel=0.05, abs=1e-3)
    assert all(close(half[name], full[name]) < 0.3 for name in full)  # Adam's first step: mostly signs


def test_an_overflow_skips_the_step_halves_the_scale_and_is_counted():
    base, optimizer = float16()
    before = weights(base)
    optimizer.zero_grad()
    next(iter(base.trainable().values())).grad[0, 0] = float("inf")
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in weights(base).items())
    assert (optimizer.loss_scale, optimizer.skipped, optimizer.scheduler.last_epoch) == (INITIAL_LOSS_SCALE / 2, 1, 0)

    stats = small_update(base, optimizer)  # and the next one is taken, at the smaller scale
    assert math.isfinite(stats.grad_norm)
    assert (optimizer.loss_scale, optimizer.skipped, optimizer.scheduler.last_epoch) == (INITIAL_LOSS_SCALE / 2, 1, 1)
    assert all(not torch.equal(p, before[n]) for n, p in weights(base).items())


def test_loss_scale_and_skipped_steps_are_saved(tmp_path):
    base, optimizer = float16()
    optimizer.zero_grad()
    next(iter(base.trainable().values())).grad[0, 0] = float("nan")
    optimizer.step()
    plain = json.loads(json.dumps(saved(optimizer, tmp_path)))
    _, resumed = float16()
    resumed.load(tmp_path, plain)
    assert (resumed.loss_scale, resumed.skipped) == (INITIAL_LOSS_SCALE / 2, 1)


def test_small_gradients_survive_float16_by_the_scale():
    tiny = 1e-5  # gradients of this size are below the smallest numbers of float16
    base, _ = float16()
    batch = ragged_batch([a * tiny for a in ADVANTAGES])
    _, lost = gradients(base, batch, settings_of(), limits_of())
    _, kept = gradients(base, batch, settings_of(), limits_of(), loss_scale=INITIAL_LOSS_SCALE)
    _, want = gradients(base_of(), batch, settings_of(), limits_of())
    for name, gradient in kept.items():
        assert close(gradient / INITIAL_LOSS_SCALE, want[name]) < 0.05, name
        assert close(lost[name], want[name]) > 0.3, name


def test_a_gradient_that_overflows_in_the_backward_pass_is_found():
    base, optimizer = float16()
    before = weights(base)
    stats = small_update(base, optimizer, size=1e6)
    assert not math.isfinite(stats.grad_norm)
    assert (optimizer.skipped, optimizer.scheduler.last_epoch) == (1, 0)
    assert all(torch.equal(p, before[n]) for n, p in weights(base).items())


def whole(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return copies of all weights and of all that the optimizer keeps of them."""
    state = [v for one in optimizer.torch_optimizer.state.values() for v in one.values() if torch.is_tensor(v)]
    return [tensor.detach().clone() for tensor in [*optimizer.parameters.values(), *state]]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def a_step(optimizer: Optimizer, value: float, loss: float = 0.0, **before: float) -> float:
    """Take a step whose gradients are all this number."""
    optimizer.zero_grad()
    for p in optimizer.parameters.values():
        p.grad += value
    return optimizer.step(loss, **before)


FAULTS = {
    "nan gradient": ({"value": math.nan}, "the gradient (nan)"),
    "inf gradient": ({"value": math.inf}, "the gradient (inf)"),
    "loss": ({"value": 0.1, "loss": math.inf}, "the loss (inf)"),
    "logits": ({"value": 0.1, "loss": math.nan, "logits": math.nan}, "the logits (nan)"),
    "finite logits": ({"value": 0.1, "loss": math.nan, "logits": 2.0}, "the loss (nan)"),
}


# where the loss is scaled, its scale answers for the gradient
LEFT_OUT = [(fault, scaled) for fault in FAULTS for scaled in (False, True) if not (scaled and "gradient" in fault)]


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(("fault", "scaled"), LEFT_OUT)
def test_a_number_that_is_not_finite_leaves_the_step_out_and_several_end_the_run(fault, optim, scaled):
    broken, said = FAULTS[fault]
    optimizer = stepper_of(parameters(), optim, learning_rate=0.1, weight_decay=0.1, scale_loss=scaled)
    run(optimizer, 0, 2)
    before, scale = whole(optimizer), optimizer.loss_scale
    optimizer.at_step = 7
    for _ in range(MOST_SKIPPED - 1):
        assert not math.isfinite(a_step(optimizer, **broken))
    assert same(whole(optimizer), before) and optimizer.loss_scale == scale
    assert (optimizer.skipped, optimizer.taken, optimizer.scheduler.last_epoch) == (MOST_SKIPPED - 1, 2, 2)
    (sentence,) = optimizer.say()
    assert sentence.startswith(f"{said} of step 7 is not finite") and not optimizer.say()
    with pytest.raises(RunError) as caught:
        a_step(optimizer, **broken)
    assert f"the first was {said} of step 7." in str(caught.value) and "training.learning_rate" in str(caught.value)
    assert ("compute_dtype" in str(caught.value)) == scaled
    assert same(whole(optimizer), before)


def test_a_good_step_between_begins_the_count_anew_and_a_file_keeps_it(tmp_path):
    optimizer = stepper_of(parameters(), learning_rate=0.1)
    for _ in range(3):
        for _ in range(MOST_SKIPPED - 1):
            a_step(optimizer, math.nan)
        a_step(optimizer, 0.1)
    assert (optimizer.skipped, optimizer.taken) == (3 * (MOST_SKIPPED - 1), 3)
    for _ in range(MOST_SKIPPED - 1):
        a_step(optimizer, math.nan)
    plain = json.loads(json.dumps(saved(optimizer, tmp_path)))
    resumed = stepper_of(parameters(), learning_rate=0.1)
    resumed.load(tmp_path, plain)
    with pytest.raises(RunError, match="in a row"):
        a_step(resumed, math.nan)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_a_step_without_any_gradient_moves_nothing_but_the_schedule(optim, scaled):
    settings = {"learning_rate": 0.1, "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    optimizer = stepper_of(parameters(), optim, scale_loss=scaled, **settings)
    run(optimizer, 0, 2)  # so that there is a momentum
    before = whole(optimizer)
    assert a_step(optimizer, 0.0) == 0.0
    assert same(whole(optimizer), before)
    assert optimizer.scheduler.last_epoch == 3 and optimizer.learning_rate == pytest.approx(0.07)
    assert a_step(optimizer, 1e-30) == 0.0  # its square is zero in float32, and it is a gradient
    assert not same(whole(optimizer), before)


@pytest.mark.parametrize("scaled", [False, True])
def test_finite_gradients_whose_norm_is_beyond_float32_are_clipped_to_their_direction(scaled):
    optimizer = stepper_of(parameters((2,), (2,)), learning_rate=0.1, max_grad_norm=1.0, scale_loss=scaled)
    optimizer.zero_grad()
    for p, gradient in zip(optimizer.parameters.values(), ([3.0, 0.0], [0.0, 4.0]), strict=True):
        p.grad += torch.tensor(gradient) * 5e37
    assert optimizer.step() == pytest.approx(2.5e38 / optimizer.loss_scale, rel=1e-6)
    joined = torch.cat([p.grad for p in optimizer.parameters.values()])
    torch.testing.assert_close(joined, torch.tensor([0.6, 0.0, 0.0, 0.8]))
    assert optimizer.taken == 1


def test_weights_that_a_step_made_infinite_are_found():
    optimizer = stepper_of(parameters(), lr_scheduler_type="constant")
    at_rate(optimizer, 1e36)
    for step in range(1, 401):
        a_step(optimizer, 0.1)
        optimizer.at_step = step
        if step == 300:
            optimizer.check_weights()  # they are as large as 3e38 now, and still numbers
    with pytest.raises(RunError, match=r"2 of 2 trained tensors .*step 400 \(p0 first\).*learning_rate \(now 1e\+36"):
        optimizer.check_weights()


def test_float16_that_overflows_at_every_scale_is_an_error():
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = stepper_of({"w": parameter}, scale_loss=True)
    with pytest.raises(RunError, match=r"overflow .*compute_dtype"):
        for _ in range(40):
            optimizer.zero_grad()
            parameter.grad[0] = float("inf")
            optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(4))


def test_the_state_of_the_other_optimizer_is_refused(tmp_path):
    parameters = {"w": torch.nn.Parameter(torch.ones(4))}
    plain = saved(stepper_of(parameters), tmp_path)
    with pytest.raises(UserError, match=r"is adamw's.*hardware\.optim=adamw"):
        stepper_of(parameters, optim="adamw_8bit").load(tmp_path, plain)


@pytest.mark.parametrize("saved_scaled", [False, True])
def test_a_state_goes_over_to_and_from_loss_scaling(saved_scaled, tmp_path):
    parameters = {"w": torch.nn.Parameter(torch.ones(4))}
    plain = json.loads(json.dumps(saved(stepper_of(parameters, scale_loss=saved_scaled), tmp_path)))
    other = stepper_of(parameters, scale_loss=not saved_scaled)
    other.load(tmp_path, plain)
    assert other.loss_scale == (1.0 if saved_scaled else INITIAL_LOSS_SCALE)
