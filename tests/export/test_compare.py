"""The comparison with the live policy: by hand, and what it lets pass and refuses."""

import pytest
import torch

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.proof.compare import Bound, bound, compare

WIDE = Bound(10.0, 0.0)


def models(change: float = 1.0, noise: float = 0.0):
    """Return logits of a live policy, of its base, and of a precise copy of both; the first two with rounding noise."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale):
        return scale * torch.randn(200, 50, generator=generator)

    base = draw(2.0)
    policy = base + draw(change)
    return [policy + draw(noise)], [base + draw(noise)], [policy], [base]


def test_kl_and_agreement_are_those_of_torch():
    live, base, _, _ = models()
    other = [live[0] + 0.3 * base[0].roll(1, 0)]
    got = compare(live, base, other)
    p, q = live[0].log_softmax(-1), other[0].log_softmax(-1)
    want = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert got.mean_kl == pytest.approx(float(want), rel=1e-5)
    assert got.top1_agreement == pytest.approx(float((live[0].argmax(-1) == other[0].argmax(-1)).float().mean()))
    assert got.tokens == 200


def test_the_same_model_keeps_everything_and_the_base_nothing():
    live, base, _, _ = models()
    same, lost = compare(live, base, live), compare(live, base, base)
    assert (same.mean_kl, same.top1_agreement, same.kept) == (0.0, 1.0, pytest.approx(1.0))
    assert (lost.mean_kl, lost.kept) == (pytest.approx(lost.base_kl), 0.0)
    same.check("it", "the live policy", WIDE)
    with pytest.raises(RunError, match="has lost what training changed"):
        lost.check("it", "the live policy", WIDE)


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_a_change_below_the_noise_of_the_live_arithmetic_is_no_error(noise):
    live, base, policy, _ = models(change=0.05, noise=noise)
    found = compare(live, base, policy)
    assert found.kept > 0.4
    found.check("it", "the live policy", WIDE)


def test_a_lost_change_that_stands_out_of_the_noise_is_an_error():
    live, base, _, plain = models(change=0.2, noise=0.05)
    with pytest.raises(RunError, match="has lost"):
        compare(live, base, plain).check("it", "the live policy", WIDE)


def test_numbers_that_are_not_finite_are_an_error():
    live, base, _, _ = models()
    with pytest.raises(RunError, match="activations overflow"):
        compare(live, base, [torch.full((200, 50), float("nan"))]).check("it", "the live policy", WIDE)


def test_another_model_is_an_error():
    live, base, _, _ = models()
    other = compare(live, base, [live[0] + 0.2 * (live[0] - base[0])])
    with pytest.raises(RunError, match=r"it, loaded again, is not the live policy: their mean KL is .*at most 1e-05"):
        other.check("it", "the live policy", bound(other.tokens))


def test_a_bound_grows_with_what_is_explained_and_with_nothing_else():
    live, base, policy, _ = models(noise=0.1)
    rounding = compare(live, base, policy)
    plain, wide = bound(200), bound(200, [rounding])
    assert plain.mean_kl == 1e-5 and plain.top1_agreement == pytest.approx(1 - 0.05 - 3 / 200, abs=0.003)
    assert wide.mean_kl == pytest.approx(1e-5 + 4 * rounding.mean_kl) and wide.top1_agreement < plain.top1_agreement
    assert rounding.within(wide) and not rounding.within(plain)
    assert bound(200, least=0.5).top1_agreement < bound(200).top1_agreement
    told = rounding.verdict("it", "the live policy", wide)
    assert told["mean_kl"] < told["mean_kl_at_most"] and told["top1_agreement"] > told["top1_agreement_at_least"]


def test_an_adapter_that_changes_nothing_is_no_error():
    live, _, _, _ = models()
    compare(live, live, live).check("it", "the live policy", WIDE)
