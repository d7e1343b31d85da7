"""Every loss of TRL 1.16's GRPOTrainer, and what changes one: loss, gradients and metrics on the same batch as TRL's.

One trainer of TRL serves all cases; `Oracle.configure` gives it the settings of each.
"""

import json
from types import SimpleNamespace

import pytest
from training_cases import (
    REWARDS,
    base_of,
    close,
    drawn_with,
    gradients,
    limits_of,
    logps_of,
    ragged_batch,
    settings_of,
    shifted,
)
from trl_grpo_oracle import TOLERANCE, Oracle, advantages_of, word_tokenizer

from lowmem_rlhf.algorithms.grpo.entropy import EntropyCoefficient, high_entropy_tokens
from lowmem_rlhf.algorithms.grpo.metrics import update_metrics

pytestmark = pytest.mark.filterwarnings("ignore")
SEQUENCE = {"importance_sampling_level": "sequence"}
NARROW = {"epsilon": 0.03, "epsilon_high": 0.05}
LUSPO = {"loss_type": "luspo", **SEQUENCE}
CISPO = {"loss_type": "cispo", "epsilon_high": 1.2}
SAPO = {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.7}
VESPO = {"loss_type": "vespo"}
VESPO_OWN = {
    **VESPO,
    **dict(zip(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), (1, 2, 4, 1), strict=True)),
}
MASKED = {"mask_truncated_completions": True}
KL = {"beta": 0.04}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A base, a batch of it drawn by a policy some updates ago, the log-probs of all policies, and the oracle."""
    base, plain = base_of(), ragged_batch(advantages_of(REWARDS))
    policy, ref = logps_of(base, plain, "policy"), logps_of(base, plain, "reference")
    batch = drawn_with(plain, shifted(policy, by=0.3, seed=11))
    oracle = Oracle(base, [batch], [REWARDS], tmp_path_factory.mktemp("oracle"), word_tokenizer())
    return SimpleNamespace(base=base, batch=batch, policy=policy, ref=ref, old=shifted(policy), oracle=oracle)


def theirs(case, monkeypatch, old, correction, **settings):
    """Return TRL's loss and gradients."""
    oracle = case.oracle
    own = {f"vllm_{name}": value for name, value in correction.items()}
    own.setdefault("vllm_importance_sampling_correction", False)
    oracle.configure(**settings, **own)
    oracle.sampled_elsewhere()
    with monkeypatch.context() as patch:
        if old:  # the policy that TRL asks where it corrects is the one before the first update
            given = (oracle.padded(old), None, None)
            patch.setattr(oracle.trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: given)
        inputs = oracle.inputs()
    inputs["ref_per_token_logps"] = oracle.padded(case.ref)
    if old:
        inputs["old_per_token_logps"] = oracle.padded(old)
    return oracle.gradients(inputs)


def ours(case, old, applied=None, **given):
    settings = settings_of(**given)
    logps = {"ref": dict(case.ref), "old_logps": old}
    kept = None
    if settings.top_entropy_quantile < 1:
        kept = high_entropy_tokens(case.base, case.batch, settings, limits_of(40))
    coefficient = settings.entropy_coef if applied is None else applied
    return gradients(case.base, case.batch, settings, limits_of(40), **logps, kept=kept, entropy_coef=coefficient)


def differ(some, others) -> bool:
    return max(close(gradient, others[name]) for name, gradient in some.items()) > 0.01


LOSSES = {
    "gspo": ({**SEQUENCE, "loss_type": "grpo", **NARROW}, {"loss_type": "grpo", **NARROW}),
    "gspo-kl-masked": ({**SEQUENCE, "loss_type": "grpo", **NARROW, **KL, **MASKED}, {"loss_type": "grpo", **KL}),
    "sequence-dapo": ({**SEQUENCE, **NARROW, **KL}, {**NARROW, **KL}),
    "sequence-bnpo": ({**SEQUENCE, "loss_type": "bnpo"}, {"loss_type": "bnpo"}),
    "sequence-dr_grpo": ({**SEQUENCE, "loss_type": "dr_grpo", **NARROW}, {"loss_type": "dr_grpo", **NARROW}),
    "luspo": ({**LUSPO, **NARROW}, {**SEQUENCE, **NARROW, "loss_type": "grpo"}),
    "luspo-kl-masked": ({**LUSPO, **NARROW, **KL, **MASKED}, {**LUSPO, **NARROW, **KL}),
    "cispo": (CISPO, {}),
    "cispo-kl": ({**CISPO, **KL}, CISPO),
    "cispo-sequence": ({**CISPO, "epsilon_high": 1.02, **SEQUENCE}, CISPO),
    "sapo": (SAPO, {"loss_type": "sapo"}),
    "sapo-kl-masked": ({**SAPO, **KL, **MASKED}, {**SAPO, **KL}),
    "sapo-sequence": ({**SAPO, **SEQUENCE}, SAPO),
    "vespo": (VESPO, {}),
    "vespo-kl-masked": ({**VESPO_OWN, **KL, **MASKED}, {**VESPO, **KL, **MASKED}),
    "delta": ({"delta": 1.3}, {}),
    "delta-sequence": ({**SEQUENCE, "loss_type": "grpo", **NARROW, "delta": 1.06}, {**SEQUENCE, "loss_type": "grpo"}),
    "biased-kl": ({"beta": 0.4, "use_bias_correction_kl": False}, {"beta": 0.4}),
    "biased-kl-sequence": ({"beta": 0.4, **SEQUENCE, "use_bias_correction_kl": False}, {"beta": 0.4, **SEQUENCE}),
    "off-policy-mask": ({"off_policy_mask_threshold": 0.02, **KL}, KL),
    "entropy-quantile": ({"top_entropy_quantile": 0.2}, {}),
    "entropy-quantile-0": ({"top_entropy_quantile": 0.0, "loss_type": "grpo"}, {"loss_type": "grpo"}),
    "entropy-quantile-kl-masked": ({"top_entropy_quantile": 0.3, **KL, **MASKED}, {**KL, **MASKED}),
    "entropy-quantile-luspo": ({**LUSPO, **NARROW, "top_entropy_quantile": 0.5}, {**LUSPO, **NARROW}),
    "entropy-bonus": ({"entropy_coef": 0.3}, {}),
    "entropy-bonus-masked": ({"loss_type": "grpo", "entropy_coef": 0.3, **MASKED}, {"loss_type": "grpo", **MASKED}),
    "both-entropies": (
        {**CISPO, **KL, "top_entropy_quantile": 0.4, "entropy_coef": 0.3, "off_policy_mask_threshold": 0.02},
        {**CISPO, **KL, "entropy_coef": 0.3},
    ),
    "off-policy-mask-vespo": ({**VESPO, "off_policy_mask_threshold": 0.02}, VESPO),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(name, case, monkeypatch):
    settings, without = LOSSES[name]
    loss, wanted = theirs(case, monkeypatch, case.old, {}, **settings)
    stats, got = ours(case, case.old, **settings)
    assert stats.loss == pytest.approx(loss, rel=TOLERANCE, abs=1e-7)
    assert got.keys() == wanted.keys()
    assert max(close(gradient, wanted[key]) for key, gradient in got.items()) < TOLERANCE
    assert differ(got, ours(case, case.old, **without)[1])
    _check_metrics(case, stats, settings)


def _check_metrics(case, stats, settings) -> None:
    """Compare with TRL's metrics; it counts the completions without an advantage, which only a KL term trains."""
    metric, kl = case.oracle.metric, settings.get("beta")
    metrics = update_metrics(case.batch, stats, settings_of(**settings))
    if kl:
        assert stats.kl / stats.kl_tokens == pytest.approx(metric("kl"), rel=TOLERANCE)
    masked = settings.get("mask_truncated_completions", False)
    kind = settings.get("loss_type", "dapo")
    completions = 10 if masked else 12
    count = (
        completions if settings.get("importance_sampling_level") else sum(len(c.ids) for c in case.batch.completions)
    )
    if kind == "vespo" and kl and not masked:
        assert metrics["vespo/phi_seq_mean"] == pytest.approx(metric("vespo/phi_seq_mean"), rel=TOLERANCE)
    elif kind == "cispo":
        assert stats.clipped_high / count == pytest.approx(metric("cispo_clip_ratio"), rel=TOLERANCE)
        assert stats.clipped_high > 0
    elif kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo") and not masked:
        assert stats.clipped_low / count == pytest.approx(metric("clip_ratio/low_mean"), rel=TOLERANCE)
        assert stats.clipped_high / count == pytest.approx(metric("clip_ratio/high_mean"), rel=TOLERANCE)
        assert stats.clipped_low + stats.clipped_high > 0 or "epsilon" not in settings
    if settings.get("entropy_coef"):
        assert stats.policy_loss == pytest.approx(metric("policy_loss"), rel=TOLERANCE)
    if kind in ("sapo", "vespo", "cispo"):
        assert "clip_ratio/low" not in metrics


ON_POLICY = [{**SEQUENCE, "loss_type": "grpo"}, LUSPO, CISPO, SAPO, VESPO]


@pytest.mark.parametrize("settings", ON_POLICY, ids=lambda settings: settings["loss_type"])
def test_on_the_policy(settings, case, monkeypatch):
    loss, wanted = theirs(case, monkeypatch, None, {}, **settings)
    stats, got = ours(case, None, **settings)
    assert stats.loss == pytest.approx(loss, rel=TOLERANCE, abs=1e-6)
    assert max(close(gradient, wanted[key]) for key, gradient in got.items()) < TOLERANCE


CORRECTED = [
    *((VESPO, mode, old) for mode in ("token_truncate", "token_mask") for old in (False, True)),
    ({**SEQUENCE, "loss_type": "grpo", **NARROW, **KL}, "sequence_truncate", True),
    ({**CISPO, **KL}, "token_mask", True),
]


@pytest.mark.parametrize(("settings", "mode", "off_policy"), CORRECTED)
def test_importance_correction(settings, mode, off_policy, case, monkeypatch):
    correction = {"correction": True, "mode": mode, "clip_min": 0.8, "clip_max": 1.25}
    correction = {f"importance_sampling_{name}": value for name, value in correction.items()}
    old = case.old if off_policy else None
    loss, wanted = theirs(case, monkeypatch, old, correction, **settings)
    stats, got = ours(case, old, **settings, **correction)
    assert stats.loss == pytest.approx(loss, rel=TOLERANCE, abs=1e-7)
    assert max(close(gradient, wanted[key]) for key, gradient in got.items()) < TOLERANCE
    assert differ(got, ours(case, old, **settings)[1])


def test_an_adaptive_entropy_coefficient_goes_trls_way(case):
    settings = {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.1,
        "entropy_coef_delta": 0.2,
        "entropy_coef_max": 0.4,
        "entropy_coef_min": 0.05,
        "entropy_target": 10.0,
    }
    oracle, own, steps = case.oracle, EntropyCoefficient(settings_of(**settings)), []
    oracle.configure(**settings)
    inputs = oracle.inputs()
    for target in (10.0, 10.0, 0.1, 0.1, 0.1):
        own.settings.entropy_target = oracle.trainer.args.entropy_target = target
        loss, wanted = oracle.gradients(inputs)
        stats, got = ours(case, None, applied=own.applied, **settings)
        steps.append(own.applied)
        own.update(stats.mean_entropy)
        assert own.value == pytest.approx(oracle.trainer.entropy_coef)
        assert own.entropy == pytest.approx(oracle.trainer._last_world_entropy, rel=TOLERANCE)
        assert stats.loss == pytest.approx(loss, rel=TOLERANCE, abs=1e-6)
        assert max(close(gradient, wanted[key]) for key, gradient in got.items()) < TOLERANCE
    assert steps == pytest.approx([0.0, 0.3, 0.0, 0.0, 0.0])
    again = EntropyCoefficient(settings_of(**settings))
    again.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert (again.value, again.entropy) == (own.value, own.entropy)
