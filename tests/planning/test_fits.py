"""What fits: the cells are the plan's own words, more memory never fits less, and a longer run never fits more."""

import itertools
import json
import subprocess
import sys

import pytest
from planning_cases import card, cpu

from lowmem_rlhf.architecture.catalogue import catalogue, find
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.profiles import find_profile, load_profiles, profile_device
from lowmem_rlhf.planning.fits import (
    LENGTHS,
    chosen_models,
    fit,
    longest,
    one_card,
    shipped_cards,
    what_fits,
    with_algorithm,
    with_length,
)
from lowmem_rlhf.planning.inputs import budget_bytes
from lowmem_rlhf.planning.plan import can_fit, plan_for
from lowmem_rlhf.recipe.loading import load_recipe

ALGORITHMS = ("sft", "grpo", "ppo")
SMALL, LARGE = "Qwen/Qwen2.5-1.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("grpo_gsm8k", ["generation.max_completion_length=512"])


@pytest.fixture(scope="module")
def fits(recipe):
    return what_fits(recipe, shipped_cards(), {name: find(name) for name in (SMALL, LARGE, "microsoft/phi-4")})


def test_every_shipped_card_is_in_one_column_planned_for_the_least_of_them():
    cards, profiles = shipped_cards(), load_profiles()
    assert sorted(key for card in cards for key in card.profiles) == sorted(
        key for key, profile in profiles.items() if profile.tried and key != "cpu"
    )
    assert [card.device.total_bytes for card in cards] == sorted(card.device.total_bytes for card in cards)
    assert len({card.label for card in cards}) == len(cards) >= 10
    for column in cards:
        same = [profile_device(profiles[key]) for key in column.profiles]
        assert {device.bf16 for device in same} == {column.device.bf16}
        assert column.device.free_bytes == min(device.free_bytes for device in same)
        assert max(device.total_bytes for device in same) < 1.03 * column.device.total_bytes


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_bigger_card_never_fits_less(fits, algorithm):
    for bf16 in (False, True):
        kept = [(c.device.free_bytes, i) for i, c in enumerate(fits.cards) if c.device.bf16 is bf16]
        for cells in fits.cells[algorithm].values():
            row = [cells[index] for _, index in sorted(kept)]
            assert [cell.fits for cell in row] == sorted(cell.fits for cell in row)
    both = {cell.fits for cells in fits.cells[algorithm].values() for cell in cells}
    assert both == {True, False}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_cell_is_the_plan_of_its_run(fits, recipe, algorithm):
    run = with_algorithm(recipe, algorithm)
    for model, cells in fits.cells[algorithm].items():
        for column, cell in zip(fits.cards[::3], cells[::3], strict=True):
            plan = plan_for(run, column.device, "x", find(model))
            assert cell.fits == plan.fits and cell.micro_batch_tokens == plan.settings.micro_batch_tokens
            assert cell.peak_bytes == plan.memory["peak_bytes"]
            assert cell.room_bytes == budget_bytes(column.device) - cell.peak_bytes
            assert cell.fits == (cell.room_bytes >= 0) == (cell.lacks == "")
            assert ("8-bit moments" in cell.savings) == (plan.settings.optim == "adamw_8bit")
            assert cell.rollout_rows == (None if algorithm == "sft" else plan.settings.rollout_batch_size)
            tokens = 8 * 1024 if algorithm == "sft" else 8 * 8 * 512  # of a step's examples, or of its completions
            assert cell.tokens_per_second == (tokens / plan.time.step if plan.fits else None)
            assert cell.longest == longest(run, column.device, find(model))


def test_the_issue_s_models_fit_on_the_11_gb_card_with_8_completions_of_512_tokens(recipe):
    names = "Qwen2.5-0.5B-Instruct,Qwen2.5-1.5B-Instruct,Qwen2.5-3B-Instruct,Llama-3.2-1B-Instruct,"
    names += "Llama-3.2-3B-Instruct,Llama-3.1-8B-Instruct"
    device = profile_device(find_profile("rtx-2080-ti"))
    found = what_fits(recipe, one_card(device, "rtx-2080-ti"), chosen_models(recipe, names))
    assert (
        found.generations == {"sft": 1, "grpo": 8, "ppo": 8}
        and found.lengths["grpo"]["generation.max_completion_length"] == 512
    )
    rows = found.cells["grpo"]
    assert len(rows) == 6 and rows["meta-llama/Llama-3.1-8B-Instruct"][0].precision == "nf4"
    for (cell,) in rows.values():
        assert cell.fits and cell.longest >= 512
    assert rows["meta-llama/Llama-3.1-8B-Instruct"][0].longest < rows["Qwen/Qwen2.5-1.5B-Instruct"][0].longest


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("model", "free"), [(LARGE, 6.5), (SMALL, 2.2)])
def test_the_longest_fits_and_the_next_length_does_not(recipe, algorithm, model, free):
    run, dims = with_algorithm(recipe, algorithm), find(model)
    found = longest(run, card(free), dims)
    after = next(length for length in LENGTHS if length > found)
    assert LENGTHS[0] < found < 32768
    assert fit(with_length(run, found), card(free), dims).fits
    assert not fit(with_length(run, after), card(free), dims).fits
    lengths = [64, 256, 1024, 4096, 16384]
    fitting = [fit(with_length(run, length), card(free), dims).fits for length in lengths]
    assert fitting == sorted(fitting, reverse=True) == [length <= found for length in lengths]


@pytest.mark.parametrize(
    "hardware", [{}, {"keep_graphs": True}, {"micro_batch_tokens": 2048}, {"quantization": "none"}]
)
def test_a_run_can_fit_where_its_plan_does(recipe, hardware):
    recipe = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=hardware)})
    found = set()
    for algorithm, length, free in itertools.product(("sft", "ppo"), (512, 4096, 16384), (2.2, 6.5)):
        run = with_length(with_algorithm(recipe, algorithm), length)
        try:
            possible = can_fit(run, card(free), find(SMALL))
        except UserError:
            possible = False
        assert possible == fit(run, card(free), find(SMALL), timed=False).fits
        found.add(possible)
    assert found == {True, False}


def test_more_memory_and_shorter_prompts_never_shorten_the_longest(recipe):
    dims = find(LARGE)
    found = [longest(recipe, card(free), dims) for free in (4, 6, 6.5, 8, 11, 16)]
    assert found == sorted(found) and found[0] == 0 < found[1] < found[-1]
    shorter = load_recipe("grpo_gsm8k", ["data.max_prompt_length=128"])
    assert longest(shorter, card(6.5), dims) >= longest(recipe, card(6.5), dims) > 0


def test_the_longest_is_bounded_by_the_positions_and_the_recipe_s_own_length_counts(recipe):
    dims = find("openai-community/gpt2")
    assert longest(recipe, card(80), dims) == 1024 - 512
    assert longest(with_algorithm(recipe, "sft"), card(80), dims) == 1024
    full = load_recipe("grpo_gsm8k", ["data.max_prompt_length=1024"])
    assert longest(full, card(80), dims) == 0
    # Between two lengths that are tried: what is known to fit is not understated.
    run = with_length(recipe, 333)
    fixed = run.model_copy(update={"hardware": run.hardware.model_copy(update={"micro_batch_tokens": 512 + 333})})
    assert longest(fixed, card(80), find(SMALL)) == 333


def test_what_is_pinned_and_does_not_fit_shows_what_it_lacks(recipe):
    hardware = recipe.hardware.model_copy(update={"quantization": "none", "optim": "adamw_8bit"})
    pinned = recipe.model_copy(update={"hardware": hardware})
    cell = fit(pinned, card(10.75), find("Qwen/Qwen2.5-7B-Instruct"))
    assert not cell.fits and cell.precision == "16-bit" and cell.room_bytes < -4 * 1024**3
    assert "GiB short" in cell.lacks and "weights take" in cell.lacks
    assert "8-bit moments" not in cell.savings  # asked for, not the plan's way out
    assert fit(recipe, card(10.75), find("Qwen/Qwen2.5-7B-Instruct")).fits


def test_a_run_that_is_refused_is_a_cell_with_the_sentence(recipe):
    model = "google/gemma-3-1b-it"
    hardware = recipe.hardware.model_copy(update={"compute_dtype": "bfloat16"})
    recipe = recipe.model_copy(update={"hardware": hardware})
    found = what_fits(
        recipe, (*one_card(card(11), "turing"), *one_card(card(11, bf16=True), "ada")), {model: find(model)}
    )
    refused, taken = found.cells["grpo"][model]
    assert not refused.fits and refused.precision is refused.room_bytes is None
    assert refused.lacks.startswith("hardware.compute_dtype: got bfloat16, which")
    assert taken.fits


def test_the_lengths_are_the_recipe_s_in_every_algorithm(recipe):
    supervised = with_algorithm(recipe, "sft")
    assert supervised.sft.max_length == 512 + 512 and not supervised.rewards
    assert with_algorithm(recipe, "ppo").generation == recipe.generation
    own = load_recipe("sft_qwen_gsm8k")
    assert with_algorithm(own, "sft") is own
    assert with_algorithm(own, "grpo").data == own.data
    alone = load_recipe("ppo_reward_adapter")
    counts = [with_algorithm(alone, algorithm).generation.num_generations for algorithm in ("ppo", "grpo")]
    assert counts == [1, 2]  # GRPO with one completion of a prompt is no run
    assert recipe.algorithm == "grpo" and recipe.rewards  # unchanged


def test_models_are_the_recipe_s_own_then_small_to_large(recipe):
    for names, count in ((None, 10), ("all", 40)):
        chosen = chosen_models(recipe, names)
        first, *others = chosen
        assert first == recipe.model and recipe.model not in others and len(chosen) >= count
        sizes = [chosen[name].num_parameters for name in others]
        assert sizes == sorted(sizes)
    assert set(catalogue()) == set(chosen_models(recipe, "all"))
    asked = chosen_models(recipe, "phi-4, qwen2.5-3b-instruct,meta-llama/Llama-3.2-1B")
    assert list(asked)[1:] == ["meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-3B-Instruct", "microsoft/phi-4"]


def test_a_local_folder_is_a_model_too(recipe, folder):
    path = folder("SmolLM2-135M")
    assert path in chosen_models(recipe, f"{path},phi-4")
    cells = what_fits(recipe, one_card(cpu(8), "cpu"), {path: chosen_models(recipe, path)[path]}).cells
    assert cells["sft"][path][0].fits


@pytest.mark.parametrize(
    ("names", "message"),
    [(" , ", "--models: got ' , '"), ("./nowhere", "'./nowhere' does not exist"), ("a b", "neither a path nor")],
)
def test_wrong_models_are_one_sentence(recipe, names, message):
    with pytest.raises(UserError, match=message):
        chosen_models(recipe, names)


def test_json_is_one_object_and_nothing_heavy_is_imported():
    code = (
        "import sys\n"
        "sys.argv = 'lowmem-rlhf plan grpo_gsm8k --all-profiles --models phi-4 --json'.split()\n"
        "from lowmem_rlhf.cli import main\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'bitsandbytes', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"recipe", "prompts_per_step", "cards", "models", "tables"}
    assert set(found["tables"]) == set(ALGORITHMS)
    for table in found["tables"].values():
        assert set(table) == {"lengths", "num_generations", "cells"}
        assert set(table["cells"]) == set(found["models"]) == {"Qwen/Qwen2.5-0.5B-Instruct", "microsoft/phi-4"}
        for cells in table["cells"].values():
            assert list(cells) == list(found["cards"])
            assert all(cell["fits"] or cell["lacks"] for cell in cells.values())
