"""What the README and the pages of docs/ say exists: commands, recipes, rewards, options and files."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowmem_rlhf.algorithms.common.ppo_family import PPOSettings
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.algorithms.reward_model.settings import RewardModelSettings
from lowmem_rlhf.algorithms.sft.settings import SFTSettings
from lowmem_rlhf.cli import app
from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes
from lowmem_rlhf.recipe.sections import LEARNED_REWARDS, REWARD_OPTIONS, GenerationConfig
from lowmem_rlhf.rewards.options import options_of
from lowmem_rlhf.rewards.shipped import SHIPPED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
REWARDS = PAGES[ROOT / "docs" / "rewards.md"]


def test_the_table_of_commands_is_the_program_s():
    commands = README.split("## On your card")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z]+)[ `]", commands, re.MULTILINE))
    registered = {command.name or command.callback.__name__ for command in app.registered_commands}
    registered |= {group.name for group in app.registered_groups}
    assert documented == registered


def test_the_options_in_the_table_are_in_the_help():
    for name, line in re.findall(r"^\| `([a-z]+(?: [a-z]+)?) ([A-Z\[][^`]*)`", README, re.MULTILINE):
        options = re.findall(r"--[a-z-]+", line)
        text = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200"}).output
        for option in options:
            assert option in text, f"{name} has no {option}"


def test_the_table_of_recipes_is_what_ships():
    section = README.split("## Recipes")[1].split("##")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(shipped_recipes())


def test_every_example_on_the_command_line_names_a_recipe_and_keys_that_exist():
    lines = re.findall(r"^lowmem-rlhf (?:plan|train) (.*)$", README + REWARDS, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        words = [quoted or plain for quoted, plain in re.findall(r"'([^']*)'|(\S+)", line.split("  ")[0])]
        load_recipe(words[0], [word for word in words[1:] if "=" in word])


def test_named_rewards_and_options_exist():
    shipped = re.search(r"^Shipped: (.*)$", REWARDS, re.MULTILINE)
    assert shipped
    assert set(re.findall(r"`(\w+)`", shipped.group(1))) == set(SHIPPED)
    sections = {"grpo": GRPOSettings, "generation": GenerationConfig, "ppo": PPOSettings}
    sections |= {"sft": SFTSettings, "reward_model": RewardModelSettings}
    named = {
        section: {key for page in PAGES.values() for key in re.findall(rf"`{section}\.(\w+)[`=]", page)}
        for section in sections
    }
    assert all(named.values()), named
    for section, model in sections.items():
        assert named[section] <= set(model.model_fields)


def test_the_table_of_rewards_has_their_options():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", REWARDS.split("## Functions that ship")[1], re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", options)) - {"jsonschema"} for name, options in rows}
    with_options = {name: set(options_of(function)) for name, function in SHIPPED.items() if options_of(function)}
    assert documented == with_options


def test_learned_rewards_and_their_options_exist():
    section = REWARDS.split("## Learned rewards")[1]
    shared = set(re.findall(r"`(\w+)`", section.split("The first two take")[1].split(".")[0]))
    items = [re.findall(r"`(\w+)`", item.split("\n\n")[0]) for item in section.split("\n- ")[1:]]
    listed = {item[0]: set(item[1:]) for item in items}
    assert {name: options | (shared if name in LEARNED_REWARDS else set()) for name, options in listed.items()} == {
        name: set(options.model_fields) for name, options in REWARD_OPTIONS.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


def test_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {target for page in PAGES.values() for target in re.findall(r"^make ([\w-]+)", page, re.MULTILINE)}
    assert targets >= {"quickstart", "test", "check"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
