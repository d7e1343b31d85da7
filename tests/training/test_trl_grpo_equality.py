"""TRL 1.16's GRPOTrainer is the oracle: its own advantages, masks, loss, gradients and optimizer steps on our batches.

TRL's side is a stock peft model loaded from our adapter folder, padded as TRL pads. What it is given is the recorded
completions (through its `rollout_func`), their rewards, and log-probs of the old policy where these matter.
"""

import pytest
import torch
from training_cases import (
    BETAS,
    LOSS_TYPES,
    REWARDS,
    Heard,
    base_of,
    close,
    drawn_with,
    gradients,
    ladder_of,
    limits_of,
    logps_of,
    objective_of,
    ragged_batch,
    settings_of,
    shifted,
    stepper_of,
    weights,
)
from trl_grpo_oracle import TOLERANCE, Oracle, advantages_of, word_tokenizer

from lowmem_rlhf.algorithms.grpo.metrics import update_metrics
from lowmem_rlhf.algorithms.grpo.update import update

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def with_oracle(tmp_path_factory, tokenizer):
    """Return a function that gives a base, and TRL's trainer of its adapter with other settings; few are ever made."""
    made = {}

    def given(tie: bool = False, temperature: float = 1.0, **settings):
        key = tie, temperature  # which are built into a trainer
        if key not in made:
            base, folder = base_of(tie=tie), tmp_path_factory.mktemp("oracle")
            oracle = Oracle(base, [ragged_batch()], [REWARDS], folder, tokenizer, temperature=temperature)
            made[key] = base, oracle
        made[key][1].configure(**settings)
        return made[key]

    return given


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale, with_oracle):
    _, oracle = with_oracle(scale_rewards=scale)
    theirs = oracle.inputs()["advantages"]
    assert theirs.abs().max() > 0.4
    assert (theirs == 0).sum() == 5  # the group without variance, and the completion without a reward
    torch.testing.assert_close(torch.tensor(advantages_of(REWARDS, scale)), theirs, rtol=1e-6, atol=1e-7)


CASES = [
    pytest.param(loss_type, beta, old, {}, {}, id=f"{loss_type}-{beta}-{'off' if old else 'on'}-policy")
    for loss_type in LOSS_TYPES
    for beta in BETAS
    for old in (False, True)
]
CASES += [
    pytest.param(loss_type, beta, True, changes, {}, id=f"{loss_type}-{beta}-{name}")
    for loss_type in LOSS_TYPES
    for beta, name, changes in [
        (0.04, "masked", {"mask_truncated_completions": True}),
        (0.0, "clip-higher", {"epsilon": 0.1, "epsilon_high": 0.28}),
    ]
]
CASES += [
    pytest.param(loss_type, beta, old, {}, {"temperature": 0.7}, id=f"{loss_type}-{beta}-temperature")
    for loss_type, beta, old in [
        ("grpo", 0.04, True),
        ("bnpo", 0.0, False),
        ("dr_grpo", 0.0, True),
        ("dapo", 0.04, False),
    ]
]
CASES += [pytest.param("dapo", 0.04, True, {}, {"tie": True}, id="dapo-0.04-tied-head")]


@pytest.mark.parametrize(("loss_type", "beta", "off_policy", "changes", "other"), CASES)
def test_loss_and_gradients(loss_type, beta, off_policy, changes, other, with_oracle):
    temperature = other.get("temperature", 1.0)
    batch = ragged_batch(advantages_of(REWARDS))
    settings = {"loss_type": loss_type, "beta": beta, **changes}
    base, oracle = with_oracle(other.get("tie", False), temperature=temperature, **settings)
    inputs = oracle.inputs()
    ref = logps_of(base, batch, "reference", temperature)
    old = shifted(logps_of(base, batch, "policy", temperature)) if off_policy else None
    inputs["ref_per_token_logps"] = oracle.padded(ref)
    if old:
        inputs["old_per_token_logps"] = oracle.padded(old)
    loss, theirs = oracle.gradients(inputs)

    stats, ours = gradients(
        base, batch, settings_of(**settings), limits_of(tokens=40, temperature=temperature), ref=ref, old_logps=old
    )

    assert abs(loss) > 1e-3 or not (off_policy or beta)  # on the policy and without KL the loss is a mean advantage
    assert stats.loss == pytest.approx(loss, rel=TOLERANCE, abs=1e-7)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    for name, gradient in ours.items():
        assert theirs[name].norm() > 1e-4, name
        assert close(gradient, theirs[name]) < TOLERANCE, name
    if off_policy and not beta:  # TRL also counts the tokens of completions without advantage, which we skip
        assert oracle.metric("clip_ratio/low_mean") > 0.02
        assert oracle.metric("clip_ratio/high_mean") > 0.02
        tokens = sum(len(c.ids) for c in batch.completions)
        assert stats.clipped_low / tokens == pytest.approx(oracle.metric("clip_ratio/low_mean"))
        assert stats.clipped_high / tokens == pytest.approx(oracle.metric("clip_ratio/high_mean"))
    if beta and not changes:
        assert stats.kl / stats.kl_tokens == pytest.approx(oracle.metric("kl"), rel=TOLERANCE)
        assert stats.entropy / stats.scored == pytest.approx(oracle.metric("entropy"), rel=TOLERANCE)


CORRECTIONS = [
    pytest.param(mode, loss_type, beta, old, masked, id=f"{mode}-{loss_type}-{'off' if old else 'on'}-policy")
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    for loss_type, beta, old, masked in [
        ("dapo", 0.04, False, False),
        ("grpo", 0.04, True, False),
        ("bnpo", 0.0, True, True),
    ]
]


@pytest.mark.parametrize(("mode", "loss_type", "beta", "off_policy", "masked"), CORRECTIONS)
def test_importance_correction(mode, loss_type, beta, off_policy, masked, with_oracle, monkeypatch):
    bounds = {"clip_min": 0.8, "clip_max": 1.25}
    settings = {"loss_type": loss_type, "beta": beta, "mask_truncated_completions": masked}
    own = {"importance_sampling_correction": True, "importance_sampling_mode": mode}
    own |= {f"importance_sampling_{name}": bound for name, bound in bounds.items()}
    base, oracle = with_oracle(**settings, **{f"vllm_{name}": value for name, value in own.items()})
    plain = ragged_batch(advantages_of(REWARDS))
    policy, ref = logps_of(base, plain, "policy"), logps_of(base, plain, "reference")
    batch = drawn_with(plain, shifted(policy, by=0.4, seed=11))
    monkeypatch.setattr(oracle, "batches", [batch])
    oracle.sampled_elsewhere()
    old = shifted(policy) if off_policy else None
    with monkeypatch.context() as patch:
        if old:  # the policy that TRL asks here is the one before the first update
            given = (oracle.padded(old), None, None)
            patch.setattr(oracle.trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: given)
        inputs = oracle.inputs()
    inputs["ref_per_token_logps"] = oracle.padded(ref)
    loss, theirs = oracle.gradients(inputs)

    asked = settings_of(**settings, **own)
    stats, ours = gradients(base, batch, asked, limits_of(tokens=40), ref=ref, old_logps=old)
    _, without = gradients(base, batch, settings_of(**settings), limits_of(), ref=ref, old_logps=old)

    assert stats.loss == pytest.approx(loss, rel=TOLERANCE, abs=1e-7)
    for name, gradient in ours.items():
        assert close(gradient, theirs[name]) < TOLERANCE, name
        assert close(gradient, without[name]) > 0.02, name
    if not off_policy:
        metrics = update_metrics(batch, stats, asked)
        for kind in ("min", "mean", "max"):
            name = f"sampling/importance_sampling_ratio/{kind}"
            assert metrics[name] == pytest.approx(oracle.metric(name), rel=TOLERANCE)
        theirs_mean = oracle.metric("sampling/sampling_logp_difference/mean")
        assert metrics["sampling/logp_difference"] == pytest.approx(theirs_mean, rel=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_policy_and_reference(temperature, with_oracle):
    batch = ragged_batch()
    base, oracle = with_oracle(temperature=temperature)
    inputs = oracle.inputs()
    mask = inputs["completion_mask"].bool()
    policy = oracle.logps(inputs)
    with oracle.model.disable_adapter():
        reference = oracle.logps(inputs)
    assert close(policy[mask], reference[mask]) > 0.01
    for role, theirs in (("policy", policy), ("reference", reference)):
        ours = oracle.padded(logps_of(base, batch, role, temperature))
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5)


STEPS = [
    pytest.param("dapo", 0.0, 1, 1, id="dapo"),
    pytest.param("dapo", 0.0, 4, 1, id="dapo-accumulated"),  # TRL in four passes, its normaliser over all of them
    pytest.param("grpo", 0.0, 1, 1, id="grpo"),
    pytest.param("dr_grpo", 0.0, 1, 2, id="dr_grpo-two-iterations"),
    pytest.param("bnpo", 0.04, 1, 2, id="bnpo-beta-two-iterations"),
]


@pytest.mark.parametrize(("loss_type", "beta", "accumulate", "iterations"), STEPS)
def test_optimizer_steps_of_trls_own_loop(loss_type, beta, accumulate, iterations, tmp_path, tokenizer):
    base = base_of(adapter=0 if beta else 0.1)  # TRL's reference is the adapter that it starts with
    rewards = [REWARDS, [[0.0, 1.0, 2.0, 0.5], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 3.0]]]
    prompts = [(5, 2, 9), (3, 7, 1)]
    batches = [ragged_batch(advantages_of(rewards[i]), seed=i, prompts=prompts[i]) for i in range(2)]
    total, lr, norm = 2 * iterations, 1e-2, 0.05
    before = weights(base)
    oracle = Oracle(
        base,
        batches,
        rewards,
        tmp_path,
        tokenizer,
        loss_type=loss_type,
        beta=beta,
        num_iterations=iterations,
        per_device_train_batch_size=12 // accumulate,
        gradient_accumulation_steps=accumulate,
        max_steps=total,
        learning_rate=lr,
        max_grad_norm=norm,
    )
    oracle.trainer.train()
    named = {name.replace(".default.", ".policy."): p.detach() for name, p in oracle.model.named_parameters()}
    logged = [row for row in oracle.trainer.state.log_history if "grad_norm" in row]

    optimizer = stepper_of(base.trainable(), total=total, learning_rate=lr, max_grad_norm=norm)
    settings = settings_of(loss_type=loss_type, beta=beta, num_iterations=iterations)
    for batch in batches:
        ref = logps_of(base, batch, "reference") if beta else {}
        stats = update(base, optimizer, batch, objective_of(settings), ladder_of(tokens=40), ref, Heard())
    assert oracle.calls == 2
    assert logged[-1]["grad_norm"] > norm  # so that clipping took part
    assert stats.grad_norm == pytest.approx(logged[-1]["grad_norm"], rel=1e-3)
    for name, after in weights(base).items():
        assert close(after, named[name]) < TOLERANCE, name
        moved = named[name] - before[name]
        assert moved.abs().max() > lr / 2, name
        assert close(after - before[name], moved) < 1e-3, name
