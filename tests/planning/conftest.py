"""Recipes for plans."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planning_cases import CONFIGS

from lowmem_rlhf.architecture import counting
from lowmem_rlhf.architecture.count_class import count_class
from lowmem_rlhf.architecture.counting import CannotCount
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered in this process."""
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    counting._of.cache_clear()
    yield tmp_path / "cache" / "counts"
    counting._of.cache_clear()


@pytest.fixture
def in_process(monkeypatch):
    """Count in this process, which has transformers already; return the configs that were counted."""
    asked = []

    def ask(config: str) -> dict[str, Any]:
        asked.append(config)
        try:
            return json.loads(json.dumps(count_class(json.loads(config))))
        except Exception as error:
            raise CannotCount(str(error)) from error

    monkeypatch.setattr(counting, "_ask", ask)
    return asked
