"""What the README says exists: its commands, recipes, rewards, options and files."""

import re
from pathlib import Path

from typer.testing import CliRunner

from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.reward_model.settings import RewardModelSettings
from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.cli import app
from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes
from lowmem_rlhf.recipe.sections import LEARNED_REWARDS, REWARD_OPTIONS, GenerationConfig
from lowmem_rlhf.rewards.functions import SHIPPED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_commands_is_the_program_s():
    commands = README.split("## On your card")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z]+)[ `]", commands, re.MULTILINE))
    registered = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert documented == registered


def test_the_options_in_the_table_are_in_the_help():
    for line in re.findall(r"^\| `([a-z]+ [A-Z\[][^`]*)`", README, re.MULTILINE):
        name, options = line.split()[0], re.findall(r"--[a-z-]+", line)
        text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in options:
            assert option in text, f"{name} has no {option}"


def test_the_table_of_recipes_is_what_ships():
    section = README.split("## Recipes")[1].split("##")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(shipped_recipes())


def test_every_example_on_the_command_line_names_a_recipe_and_keys_that_exist():
    lines = re.findall(r"^lowmem-rlhf (?:plan|train) (.*)$", README, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = [quoted or plain for quoted, plain in re.findall(r"'([^']*)'|(\S+)", line.split("  ")[0])]
        load_recipe(words[0], [word for word in words[1:] if "=" in word])


def test_named_rewards_and_options_exist():
    shipped = re.search(r"^Shipped: (.*)$", README, re.MULTILINE)
    assert shipped
    assert set(re.findall(r"`(\w+)`", shipped.group(1))) == set(SHIPPED)
    sections = {"grpo": GRPOSettings, "generation": GenerationConfig, "ppo": PPOSettings}
    sections |= {"sft": SFTSettings, "reward_model": RewardModelSettings}
    for section, model in sections.items():
        for key in re.findall(rf"`{section}\.(\w+)[`=]", README):
            assert key in model.model_fields


def test_learned_rewards_and_their_options_exist():
    section = README.split("**Learned rewards**")[1].split("\n**")[0]
    shared = set(re.findall(r"`(\w+)`", section.split("The first two take")[1].split(".")[0]))
    items = [re.findall(r"`(\w+)`", item.split("\n\n")[0]) for item in section.split("\n- ")[1:]]
    listed = {item[0]: set(item[1:]) for item in items}
    assert {name: options | (shared if name in LEARNED_REWARDS else set()) for name, options in listed.items()} == {
        name: set(options.model_fields) for name, options in REWARD_OPTIONS.items()
    }


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
