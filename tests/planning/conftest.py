"""Recipes for plans."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planning_cases import CONFIGS

from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.schema import Recipe


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a config.json, by a model's name or as given, and returns its folder."""

    def write(config: str | dict[str, Any]) -> str:
        target = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        values = CONFIGS[config] if isinstance(config, str) else config
        (target / "config.json").write_text(json.dumps(values))
        return str(target)

    return write


@pytest.fixture
def recipe(folder: Callable[..., str]) -> Callable[..., Recipe]:
    """Return a function that gives grpo_gsm8k with a model of ours and overrides."""

    def load(config: str | dict[str, Any], *overrides: str) -> Recipe:
        return load_recipe("grpo_gsm8k", [f"model={folder(config)}", *overrides])

    return load
