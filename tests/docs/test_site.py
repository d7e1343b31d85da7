"""The site of docs/ builds strictly, every key of a recipe is in its reference, and its tables of names are true."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import keys as reference
import pytest
import python_api
import recipe_pages
from pydantic import BaseModel

import lowmem_rlhf as lm
from lowmem_rlhf.recipe.kinds import item_of, kinds_of
from lowmem_rlhf.recipe.loading import shipped_recipes
from lowmem_rlhf.recipe.names import suggestion
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import REWARD_OPTIONS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MIGRATING = (DOCS / "migrating.md").read_text(encoding="utf-8")


def leaves(section: type[BaseModel], prefix: str = "") -> set[str]:
    """Return every key with a value of its own, by another way than the reference: tasks with all that they may say."""
    found = set()
    for name, field in section.model_fields.items():
        kinds = [*kinds_of(field.annotation), *kinds_of(item_of(field.annotation))]
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not below:
            found.add(prefix + name)
        for one in below:
            found |= leaves(one, f"{prefix}{name}.")
    return found


def documented() -> dict[str, str]:
    """Return what the page of keys says of each, by its dotted name."""
    found, section = {}, ""
    for line in reference.page().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif row := re.match(r"\| `([^`]+)` \| `[^`]*` \| (.+?) \| (.*) \|$", line):
            name = row[1] if section in ("The recipe", "Options of learned rewards") else f"{section}.{row[1]}"
            found[name.replace("[]", "")] = row[3]
    return found


def test_every_key_of_a_recipe_is_in_the_reference_with_a_sentence():
    found = documented()
    wanted = leaves(Recipe)
    # a task's data and rewards are as the recipe's, and said once
    again = {name for name in wanted if name.startswith(("tasks.data.", "tasks.rewards."))}
    assert {name.removeprefix("tasks.") for name in again} <= set(found)
    lists = {"rewards", "tasks", "tasks.data", "tasks.rewards"}
    options = {f"{reward}: {name}" for reward, section in REWARD_OPTIONS.items() for name in section.model_fields}
    assert set(found) == (wanted - again) | lists | options
    assert {name for name, text in found.items() if len(text) < 3} == set()


def test_what_stands_beside_a_field_and_above_it_is_its_sentence():
    found = reference.comments(lm.Recipe) | reference.comments(REWARD_OPTIONS["classifier"])
    assert found["description"] == "a sentence for `lowmem-rlhf recipes` and for model cards"
    assert found["model"].startswith("a Hub id, a local folder")
    assert found["output"] == "what of the class is the value" and "a model with one logit" in found["label"]
    assert found["batch_tokens"] == "tokens of one pass, padding included"  # of the section that it comes from


def test_choices_and_bounds_are_told():
    told = {key.name: (key.kind, key.default) for key in reference.all_keys()}
    assert told["training.lr_scheduler_type"] == ("`constant`, `constant_with_warmup`, `linear`, `cosine`", "linear")
    assert told["grpo.epsilon"] == ("number > 0, < 1", "0.2")
    assert told["hardware.micro_batch_tokens"] == ("whole number ≥ 1 or `auto`", "auto")
    assert told["data.train"] == ("text", "needed") and told["grpo.delta"] == ("number > 1 or null", "absent")


def test_every_public_name_is_in_the_reference_of_the_python_api():
    named = [name for names in python_api.GROUPS.values() for name in names]
    assert sorted(named) == sorted(set(lm.__all__) - {"__version__", "algorithms"})
    assert all(f"::: lowmem_rlhf.{lm._PLACES[name]}.{name}\n" in python_api.page() for name in named)


def test_keys_that_pages_name_exist(monkeypatch):
    known = leaves(Recipe) | {key.name.replace("[]", "") for key in reference.all_keys()} | set(Recipe.model_fields)
    sections = "|".join(Recipe.model_fields)
    for page in DOCS.glob("*.md"):
        named = re.findall(rf"`((?:{sections})(?:\[\w*\])?\.[a-z_.]+)[`=:]", page.read_text(encoding="utf-8"))
        for name in named:
            plain = re.sub(r"\[\w*\]", "", name)
            if plain in ("recipe.yaml", "tasks.generation") or plain.startswith(("trl.", "data.options")):
                continue
            assert plain in known or plain.rpartition(".")[0] in known, f"{page.name}: {name}"


def tables(title: str) -> list[tuple[list[str], list[str]]]:
    """Return the names of both columns of each row under a heading of the page on migrating."""
    part = MIGRATING.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \| (`[^|]*) \|", part, re.MULTILINE)
    return [tuple(re.findall(r"`([^`]+)`", cell) for cell in row) for row in rows]


@pytest.mark.parametrize("title", ["From GRPOTrainer", "From PPOTrainer", "From Unsloth notebooks"])
def test_names_are_translated_into_keys_that_exist(title):
    known = {key.name for key in reference.all_keys()} | set(Recipe.model_fields)
    rows = tables(title)
    assert len(rows) >= 12
    for theirs, ours in rows:
        for name in ours:
            assert theirs and (name in known or name.startswith(("lowmem-rlhf ", "--"))), name


@pytest.mark.parametrize("title", ["From GRPOTrainer", "From PPOTrainer"])
def test_a_name_of_trl_as_a_key_is_led_to_the_one_here(title):
    """As the page says at its top; of gradient accumulation it names what cuts a step."""
    for theirs, ours in tables(title):
        roots = {re.split(r"[.\[]", name)[0] for name in ours} | {"hardware"}
        for name in set(theirs) - set(Recipe.model_fields):
            hint = suggestion([name], list(Recipe.model_fields), Recipe)
            assert hint and ("did you mean" not in hint or any(f"'{root}" in hint for root in roots)), (name, hint)


def test_names_of_grpo_are_those_of_the_installed_trl():
    from trl import GRPOConfig, GRPOTrainer

    there = {field.name for field in fields(GRPOConfig)} | set(inspect.signature(GRPOTrainer.__init__).parameters)
    named = {name for theirs, _ in tables("From GRPOTrainer") for name in theirs}
    assert named <= there, named - there


def test_defaults_that_are_said_to_be_equal_are():
    """Each GRPO key that has TRL's name has TRL's default, but for those that the table tells."""
    from trl import GRPOConfig

    trl = {field.name: field.default for field in fields(GRPOConfig)}
    told = {"max_completion_length"}
    values = {**Recipe.model_fields["grpo"].annotation().model_dump()}
    values |= Recipe.model_fields["generation"].annotation().model_dump()
    differ = {name for name, value in values.items() if name in trl and (trl[name] or 0) != (value or 0)}
    assert differ == told


def test_a_recipe_has_a_page_with_its_plan_and_its_twin(monkeypatch):
    monkeypatch.setattr(recipe_pages, "CARDS", ("rtx-2080-ti",))
    found = recipe_pages.pages()
    assert list(found) == list(shipped_recipes())
    for name, page in found.items():
        assert f"lowmem-rlhf train {name}\n" in page, name
        assert "| rtx-2080-ti | " in page or name == "style_classifier", name
    assert "lowmem-rlhf train sft_gpt2_gsm8k\nlowmem-rlhf train ppo_gpt2_gsm8k\n" in found["ppo_gpt2_gsm8k"]
    assert "| `grpo.beta` | `0.04` |" in found["grpo_gsm8k"] and "| `sft.max_length` | `1024` |" in found["sft_chat"]
    assert str(ROOT) not in "".join(found.values()) and str(ROOT.parent) + "/" not in "".join(found.values())


@pytest.mark.long
def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path, monkeypatch):
    """Every page is in the navigation, every link and anchor leads somewhere: else mkdocs warns, which is an error."""
    pytest.importorskip("mkdocstrings_handlers.python", reason="pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(recipe_pages, "CARDS", ("rtx-2080-ti",))
    build(load_config("mkdocs.yml", site_dir=str(tmp_path), strict=True))
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.html")}
    written = {page.with_suffix(".html").name for page in DOCS.glob("*.md")}
    assert pages >= written | {f"recipes/{name}.html" for name in shipped_recipes()} | {"index.html", "keys.html"}
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    for page in written:
        assert f'href="{page}"' in index or page == "index.html", page
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//", text), page.name
    assert "num_generations" in (tmp_path / "search" / "search_index.json").read_text(encoding="utf-8")
