"""GRPO's numbers, against numbers worked out by hand."""

import math

import pytest
import torch

from lowmem_rlhf.algorithms.grpo.losses import LOSSES, LossInputs, measured
from lowmem_rlhf.algorithms.grpo.math import group_advantages, importance_weights, kl_term, off_policy_mask
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings

NAN = float("nan")


def advantages(rewards: list[list[float]], scale: str) -> torch.Tensor:
    return group_advantages(torch.tensor(rewards, dtype=torch.float32), scale)


def test_advantages_are_rewards_less_the_mean_of_their_group():
    assert advantages([[1, 0, 0, 1], [3, 5, 4, 4]], "none").tolist() == [[0.5, -0.5, -0.5, 0.5], [-1, 1, 0, 0]]


def test_group_scale_divides_by_each_groups_unbiased_deviation():
    got = advantages([[1, 0, 0, 1], [3, 5, 4, 4]], "group")
    first, second = math.sqrt(4 * 0.25 / 3) + 1e-4, math.sqrt(2 / 3) + 1e-4
    want = torch.tensor([[0.5 / first, -0.5 / first, -0.5 / first, 0.5 / first], [-1 / second, 1 / second, 0, 0]])
    torch.testing.assert_close(got, want)


def test_batch_scale_divides_by_the_deviation_of_all_rewards_around_their_common_mean():
    rewards = [[1.0, 0.0], [3.0, 5.0]]  # mean 2.25, squares 1.5625 + 5.0625 + 0.5625 + 7.5625 = 14.75
    deviation = math.sqrt(14.75 / 3) + 1e-4
    want = torch.tensor([[0.5, -0.5], [-1.0, 1.0]]) / deviation
    torch.testing.assert_close(advantages(rewards, "batch"), want)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_without_variance_has_no_advantage(scale):
    assert advantages([[0.7] * 3, [0.0, 1.0, 2.0]], scale)[0].tolist() == [0.0, 0.0, 0.0]


def test_a_completion_that_nothing_scored_is_left_out_of_mean_and_deviation():
    got = advantages([[1.0, NAN, 3.0, NAN], [NAN] * 4, [NAN, 2.0, NAN, NAN]], "group")
    deviation = math.sqrt(2) + 1e-4  # of 1 and 3
    torch.testing.assert_close(got[0], torch.tensor([-1 / deviation, 0, 1 / deviation, 0]))
    assert got[1:].tolist() == [[0.0] * 4] * 2  # nothing to compare with
    torch.testing.assert_close(
        advantages([[1.0, NAN, 3.0], [0.0, 0.0, NAN]], "batch")[0][0].item(), -1 / (2**0.5 + 1e-4)
    )


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale_rewards: got 'std'; allowed are group, batch and none"):
        advantages([[1.0, 2.0]], "std")


def inputs_of(ratios, advantages, lengths=(1,), ref: float = 0.0, weights=None, **settings) -> LossInputs:
    """The inputs of tokens with log-prob -1, by their ratios to the old policy and the reference's log-prob less 1."""
    logps = torch.full((len(ratios),), -1.0, requires_grad=True)
    old, given = logps.detach() - torch.tensor(ratios).log(), GRPOSettings.model_construct(**settings)
    rows = torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)])
    return LossInputs(
        logps,
        old,
        torch.full_like(old, -1.0 + ref),
        torch.tensor(advantages)[rows],
        torch.tensor(lengths, dtype=torch.float32)[rows],
        None if weights is None else torch.tensor(weights),
        completions=len(lengths),
        tokens=1,
        max_completion_length=8,
        epsilon_low=0.2,
        epsilon_high=given.epsilon_high or 0.3,
        beta=given.beta,
        row_index=rows,
        rows=len(lengths),
        settings=given,
    )


def loss_and_slope(inputs: LossInputs, loss_type: str = "dapo") -> tuple[list[float], list[float]]:
    """The losses of tokens, and the gradient of their sum."""
    loss = LOSSES[loss_type](inputs)
    return loss.tolist(), torch.autograd.grad(loss.sum(), inputs.logps)[0].tolist()


def loss_of(ratio: float, advantage: float, ref: float = 0.0, beta: float = 0.0):
    """Return the loss of one token, its gradient, and what is measured."""
    inputs = inputs_of([ratio], [advantage], ref=ref, beta=beta)
    (loss,), (slope,) = loss_and_slope(inputs)
    found = measured(inputs, inputs.ratio())
    kl = kl_term(inputs.ratio(), inputs.logps, inputs.ref_logps)
    return loss, slope, (kl, found["clipped_low"], found["clipped_high"])


# ratio, advantage, loss, gradient with respect to the log-prob, clipped low, clipped high (range 0.8 to 1.3)
CASES = [
    (1.0, 2.0, -2.0, -2.0, 0, 0),
    (1.0, -2.0, 2.0, 2.0, 0, 0),
    (1.25, 1.0, -1.25, -1.25, 0, 0),  # above 1 + epsilon, below 1 + epsilon_high
    (1.5, 1.0, -1.3, 0.0, 0, 1),
    (1.5, -1.0, 1.5, 1.5, 0, 0),  # the worse of the two: not clipped
    (0.5, 1.0, -0.5, -0.5, 0, 0),
    (0.5, -1.0, 0.8, 0.0, 1, 0),
    (0.5, 0.0, 0.0, 0.0, 0, 0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "low", "high"), CASES)
def test_the_clipped_surrogate(ratio, advantage, loss, gradient, low, high):
    got, slope, (_, *clipped) = loss_of(ratio, advantage)
    assert got == pytest.approx(loss, abs=1e-6)
    assert slope == pytest.approx(gradient, abs=1e-6)
    assert [one.item() for one in clipped] == [low, high]


@pytest.mark.parametrize("ratio", [1.0, 1.25])
def test_the_kl_term_is_schulmans_k3_times_the_ratio(ratio):
    k3 = math.exp(0.5) - 0.5 - 1  # ref - logp = 0.5
    loss, gradient, (kl, _, _) = loss_of(ratio, 2.0, ref=0.5, beta=0.04)
    assert kl.item() == pytest.approx(ratio * k3)
    assert loss == pytest.approx(ratio * (-2 + 0.04 * k3))
    # the ratio's derivative is itself: r (k3 + k3') = r (exp(0.5) - 0.5 - 1 + 1 - exp(0.5)) = -0.5 r
    assert gradient == pytest.approx(ratio * (-2 + 0.04 * -0.5), rel=1e-5)


def test_a_biased_kl_term_has_no_ratio():
    settings = {"ref": 0.5, "beta": 0.04, "use_bias_correction_kl": False}
    (loss,), (slope,) = loss_and_slope(inputs_of([1.25], [2.0], **settings))
    assert loss == pytest.approx(-2 * 1.25 + 0.04 * (math.exp(0.5) - 1.5))
    assert slope == pytest.approx(-2 * 1.25 + 0.04 * (1 - math.exp(0.5)), rel=1e-5)


def test_without_beta_the_reference_is_only_measured():
    loss, gradient, (kl, _, _) = loss_of(1.0, 2.0, ref=0.5, beta=0.0)
    assert kl.item() == pytest.approx(math.exp(0.5) - 1.5)
    assert (loss, gradient) == (-2.0, -2.0)


# two completions of two and three tokens: how much likelier the training pass finds each token than the sampler did
RATIOS = [2.0, 0.5, 3.0, 2.0, 0.25]
IMPORTANCE = [
    ("token_truncate", None, 2.5, [2.0, 0.5, 2.5, 2.0, 0.25]),
    ("token_truncate", 0.4, None, [2.0, 0.5, 3.0, 2.0, 0.4]),
    ("token_mask", None, 2.5, [2.0, 0.5, 0.0, 2.0, 0.25]),
    ("token_mask", 0.4, 2.5, [2.0, 0.5, 0.0, 2.0, 0.0]),
    ("sequence_truncate", None, 1.2, [1.0, 1.0, 1.2, 1.2, 1.2]),
    ("sequence_mask", None, 1.2, [1.0, 1.0, 0.0, 0.0, 0.0]),
    ("sequence_mask", 1.1, None, [0.0, 0.0, 1.5, 1.5, 1.5]),
]


def ratios_to_weights(ratios, mode, low, high):
    sampling = torch.linspace(-3, -1, len(ratios))
    old = (sampling + torch.tensor(ratios).log()).requires_grad_()
    return importance_weights(old, sampling, [2, len(ratios) - 2], mode, low, high)


@pytest.mark.parametrize(("mode", "low", "high", "expected"), IMPORTANCE)
def test_importance_weights_are_bounded_ratios(mode, low, high, expected):
    got = ratios_to_weights(RATIOS, mode, low, high)
    assert got.tolist() == pytest.approx(expected)
    assert not got.requires_grad  # constants of the loss


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_equal_log_probs_have_importance_weights_of_one(mode):
    assert ratios_to_weights([1.0] * 5, mode, 0.9, 1.1).tolist() == pytest.approx([1.0] * 5)


def test_an_unknown_importance_mode_is_refused():
    with pytest.raises(ValueError, match=r"importance_sampling_mode: got 'token_clip'; allowed are token_truncate"):
        ratios_to_weights(RATIOS, "token_clip", None, 3.0)


def test_importance_weights_leave_the_kl_term_alone():
    def gradient(weight, advantage, beta):
        return loss_and_slope(inputs_of([1.0], [advantage], ref=0.5, weights=[weight], beta=beta))[1][0]

    assert gradient(0.5, 2.0, 0.0) == pytest.approx(-1.0)
    assert gradient(0.0, 2.0, 0.04) == pytest.approx(0.04 * -0.5)


# loss, settings, ratio, advantage, loss and gradient of a token with log-prob -1
OTHERS = [
    ("dapo", {"delta": 4.0}, 5.0, -1.0, 4.0, 0.0),  # bounded where PPO's loss is not
    ("dapo", {"delta": 4.0}, 3.0, -1.0, 3.0, 3.0),
    ("dapo", {"delta": 4.0}, 5.0, 1.0, -1.3, 0.0),
    ("cispo", {"epsilon_high": 5.0}, 2.0, 1.5, 3.0, -3.0),
    ("cispo", {"epsilon_high": 5.0}, 8.0, 1.5, 7.5, -7.5),  # truncated, and it has a gradient still
    ("cispo", {"epsilon_high": 5.0}, 0.5, -1.5, -0.75, 0.75),
    # 4 / t sigmoid(t (r - 1)), whose slope on the policy is r, whatever the temperature
    ("sapo", {"sapo_temperature_pos": 2.0}, 1.0, 1.5, -1.5, -1.5),
    ("sapo", {"sapo_temperature_neg": 0.5}, 1.0, -1.5, 6.0, 1.5),
    (
        "sapo",
        {"sapo_temperature_pos": 2.0},
        2.0,
        1.5,
        -3 / (1 + math.exp(-2)),
        -12 * math.exp(2) / (1 + math.exp(2)) ** 2,
    ),
    ("vespo", {}, 1.0, 1.5, 1.5, -1.5),
    ("vespo", {}, 2.0, 1.5, 1.5 * 4 * math.exp(-3), -1.5 * 4 * math.exp(-3)),  # 2 ** k and e ** (l - 2 l)
    ("vespo", {}, 2.0, -1.5, -1.5 * 8 * math.exp(-2), 1.5 * 8 * math.exp(-2)),
]


@pytest.mark.parametrize(("loss_type", "settings", "ratio", "advantage", "loss", "slope"), OTHERS)
def test_the_other_surrogates(loss_type, settings, ratio, advantage, loss, slope):
    got = loss_and_slope(inputs_of([ratio], [advantage], **settings), loss_type)
    assert got == (pytest.approx([loss], rel=1e-5), pytest.approx([slope], rel=1e-5, abs=1e-7))


def test_a_completion_has_one_ratio_the_geometric_mean_of_its_tokens():
    inputs = inputs_of([4.0, 1.0, 0.5, 0.5, 2.0], [1.0, -1.0], lengths=(2, 3), importance_sampling_level="sequence")
    second = 0.5 ** (1 / 3)
    assert inputs.ratio().tolist() == pytest.approx([2.0, 2.0, second, second, second])
    loss, slope = loss_and_slope(inputs)
    assert loss == pytest.approx([-1.3] * 2 + [0.8] * 3)  # both are clipped
    assert slope == [0.0] * 5
    found = measured(inputs, inputs.ratio())
    assert (found["clipped_low"].item(), found["clipped_high"].item()) == (pytest.approx(1.0), 1.0)  # completions
    free = inputs_of([1.2, 1.0, 1.0], [1.0, -1.0], lengths=(2, 1), importance_sampling_level="sequence")
    assert loss_and_slope(free)[1] == pytest.approx([-(1.2**0.5)] * 2 + [1.0])


def test_vespo_weighs_a_completion_by_the_product_of_its_ratios_and_of_the_samplers():
    weight = 3.0**2 * math.exp(3 - 9)
    two = inputs_of([2.0, 1.5], [1.0], lengths=(2,))
    assert loss_and_slope(two, "vespo")[0] == pytest.approx([weight] * 2)
    told = inputs_of([2.0, 1.5], [1.0], lengths=(2,), loss_type="vespo")
    assert measured(told, told.ratio())["phi_seq"].item() == pytest.approx(weight)
    drawn = inputs_of([2.0, 1.0], [1.0], lengths=(2,), weights=[1.0, 1.5])
    assert loss_and_slope(drawn, "vespo")[0] == pytest.approx([weight] * 2)
    masked = inputs_of([2.0, 1.0], [1.0], lengths=(2,), weights=[1.0, 0.0])
    assert loss_and_slope(masked, "vespo")[0] == pytest.approx([0.0] * 2, abs=1e-12)


def test_a_completion_that_the_policy_has_left_behind_is_left_out_where_its_advantage_is_negative():
    drawn, rows = torch.tensor([-1.0, -2.0] * 3), torch.tensor([0, 0, 1, 1, 2, 2])
    left = torch.tensor([0.4, 0.8] * 2 + [0.1, 0.8])  # means 0.6 and 0.45
    advantages, lengths = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0]), torch.full((6,), 2.0)
    kept = off_policy_mask(drawn - left, drawn, advantages, lengths, rows, 3, 0.5)
    assert kept.tolist() == [True, True, False, False, True, True]
    assert off_policy_mask(drawn + left, drawn, advantages, lengths, rows, 3, 0.5).all()  # likelier now, not less
