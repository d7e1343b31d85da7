"""Every number of a recipe has a least and a most value, and nothing else passes for a number."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from lowmem_rlhf.recipe.errors import explain
from lowmem_rlhf.recipe.file_names import check_folder_name, check_name, check_path
from lowmem_rlhf.recipe.kinds import kinds_of
from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.section import Section
from lowmem_rlhf.recipe.sections import REWARD_OPTIONS, HardwareConfig, RewardConfig
from lowmem_rlhf.recipe.values import section_of

# keys with values of any kind: they are given on to a task, a template, a function or TRL, which check them
OPEN = {"data.options", "data.chat_template_kwargs", "rewards.options", "trl"}
NEEDED: dict[type[Section], dict[str, Any]] = {
    RewardConfig: {"function": "length"},
    **{section: {"model": "m"} for section in REWARD_OPTIONS.values() if "model" in section.model_fields},
}
TOO_LARGE, TOO_SMALL = 10**30, -(10**30)


def sections() -> Iterator[tuple[str, type[Section]]]:
    yield "", Recipe
    for key, field in Recipe.model_fields.items():
        if section := section_of(field.annotation):
            yield f"{key}.", section
    yield "rewards.", RewardConfig
    yield from ((f"rewards.options.{name}.", section) for name, section in REWARD_OPTIONS.items())


def numbers() -> list[tuple[str, type[Section], str]]:
    return [
        (f"{key}{name}", section, name)
        for key, section in sections()
        for name, field in section.model_fields.items()
        if {int, float}.intersection(kinds_of(field.annotation))
    ]


def refused(section: type[Section], name: str, value: Any) -> str:
    """Return the sentence about the field; empty where the value is taken."""
    try:
        section.model_validate({**NEEDED.get(section, {}), name: value})
    except ValidationError as error:
        lines = [line for line in explain(error.errors(), section) if line.startswith(f"{name}: ")]
        return " ".join(lines)
    return ""


def test_the_open_keys_are_all_that_the_schema_says_nothing_about():
    open_keys = {
        f"{key}{name}"
        for key, section in sections()
        for name, field in section.model_fields.items()
        if "Any" in str(field.annotation)
    }
    assert open_keys == OPEN


@pytest.mark.parametrize(("key", "section", "name"), numbers(), ids=[key for key, *_ in numbers()])
def test_a_number_has_both_bounds_and_nothing_else_is_one(key, section, name):
    kinds = kinds_of(section.model_fields[name].annotation)
    assert "at most" in (said := refused(section, name, TOO_LARGE)) or "less than" in said, said
    assert "at least" in (said := refused(section, name, TOO_SMALL)) or "greater than" in said, said
    for value in (float("inf"), float("nan"), *(["ten", ""] if str not in kinds else [])):
        said = refused(section, name, value)
        assert "it should be" in said and "Unable" not in said, f"{value!r}: {said!r}"
    if float not in kinds:
        assert "whole number" in refused(section, name, 1.5)
    if bool not in kinds:
        assert "it should be" in refused(section, name, True)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_within_the_bounds(name):
    assert load_recipe(name, quiet=True).name == name


@pytest.mark.parametrize(
    ("typed", "held"),
    [("11", "11GB"), ("11.5", "11.5GB"), ("5.", "5GB"), (8, "8GB"), ("1024", "1024GB"), ("9MB", "9MB")],
)
def test_memory_without_a_unit_is_gigabytes(typed, held):
    assert HardwareConfig(vram=typed).vram == held


@pytest.mark.parametrize("typed", ["0", "0.5", "1025", 11000])
def test_memory_without_a_unit_that_can_be_no_gigabytes_is_refused(typed):
    with pytest.raises(ValidationError, match="is of gigabytes, from 1 to 1024; write another with its unit"):
        HardwareConfig(vram=typed)


@pytest.mark.parametrize("name", ["con", "NUL", "lpt1.txt", "x" * 201, "é" * 101, "a\x00", "a\x1b[1m", "a\nb"])
def test_a_name_that_no_folder_can_have(name):
    with pytest.raises(ValueError, match=r"Windows keeps|at most 200|control character"):
        check_folder_name(name)


@pytest.mark.parametrize("path", ["x" * 256, "x" * 5000, "a/" * 2001, "nul\x00.jsonl", "a\nb", "a\x9bb"])
def test_a_path_that_no_file_system_takes(path):
    with pytest.raises(ValueError, match=r"at most 4000|control character"):
        check_path(path)


def test_names_and_paths_that_are_fine():
    assert check_folder_name("console") == "console"
    assert check_name("x" * 200) == "x" * 200
    assert check_path("x" * 255) == "x" * 255
