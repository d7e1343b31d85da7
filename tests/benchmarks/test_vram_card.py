"""vram_card.py where there is no card: what it plans and what it says. Its steps were taken on a real one."""

import pytest
import torch
import vram_card

from lowmem_rlhf.hardware.profiles import find_profile, profile_device
from lowmem_rlhf.planning.plan import make_plan


@pytest.mark.parametrize("algorithm", ["sft", "grpo", "ppo"])
def test_a_case_is_planned_for_the_profiles_card(algorithm):
    given = vram_card.options().parse_args(["--prompt", "64", "--length", "32", "--set", "lora.r=8"])
    recipe = vram_card.recipe_of(given, "Qwen/Qwen2.5-0.5B-Instruct", algorithm)
    assert (recipe.hardware.device, recipe.hardware.profile) == ("cuda", "rtx-2080-ti") and recipe.lora.r == 8
    assert (recipe.data.max_prompt_length, recipe.generation.max_completion_length, recipe.sft.max_length) == (
        64,
        32,
        96,
    )
    plan = make_plan(recipe, profile_device(find_profile("rtx-2080-ti")), "rtx-2080-ti")
    assert plan.fits and plan.settings.compute_dtype == "float16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
def test_without_a_card_it_says_so():
    with pytest.raises(SystemExit, match=r"finds no CUDA card here; vram_measured\.py runs on a CPU"):
        vram_card.main([])
