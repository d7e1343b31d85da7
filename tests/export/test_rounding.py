"""What rounding keeps of a change: by dtype and size, and what does not fit."""

import pytest
import torch

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.rounding import DoesNotFit, RoundingStats, rounded_sum


def kept(relative: float, dtype: torch.dtype, grid: torch.dtype = torch.bfloat16) -> RoundingStats:
    """Return what is kept of a random change of weights that lie on a dtype's numbers."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(256, 256, generator=generator) * 0.02).to(grid)
    change = torch.randn(256, 256, generator=generator) * 0.02 * relative
    found = RoundingStats()
    before = base.clone(), change.clone()
    rounded_sum(base, change, dtype, found, "w")
    assert torch.equal(base, before[0]) and torch.equal(change, before[1])
    return found


def test_an_rl_sized_change_survives_float16_and_not_bfloat16():
    assert kept(4e-4, torch.float16).share > 0.85
    assert kept(4e-4, torch.bfloat16).share < 0.4
    assert kept(1e-2, torch.bfloat16).share > 0.9
    assert kept(1e-5, torch.float32).share == pytest.approx(1.0, abs=1e-3)


def test_bfloat16_keeps_nothing_where_rounding_the_base_moves_more_than_the_change():
    assert abs(kept(1e-4, torch.bfloat16, grid=torch.float16).share) < 0.2


def test_the_size_of_the_change_is_told():
    assert kept(1e-3, torch.float32).relative_change == pytest.approx(1e-3, rel=0.05)


def test_no_change_keeps_everything():
    assert RoundingStats().share == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_is_rounded_once(dtype):
    base, change = torch.randn(8, 8).half(), torch.randn(8, 8) * 0.01
    assert torch.equal(rounded_sum(base, change, dtype, RoundingStats(), "w"), (base.float() + change).to(dtype))


def test_a_number_too_large_for_float16_is_never_inf():
    base = torch.tensor([[1.0, 70000.0]], dtype=torch.bfloat16)
    for change in (None, torch.zeros(1, 2)):
        with pytest.raises(DoesNotFit, match="w"):
            rounded_sum(base, change, torch.float16, RoundingStats(), "w")
    assert torch.isfinite(rounded_sum(base, None, torch.float32, RoundingStats(), "w")).all()


def test_a_base_that_is_not_finite_is_refused():
    with pytest.raises(RunError, match="not finite"):
        rounded_sum(torch.tensor([1.0, float("nan")]).bfloat16(), None, torch.float16, RoundingStats(), "w")
