"""What a change is checked with: hooks, marks, versions of Python and bounds that are stated once and agree."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_hooks_are_local_and_run_tools_that_make_install_brings():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} >= {"ruff-check", "ruff-format", "mypy"}
    assert {hook["language"] for hook in hooks} == {"system"}
    development = {Requirement(line).name for line in PROJECT["project"]["optional-dependencies"]["dev"]}
    tools = {tool for hook in hooks for tool in re.findall(r"^\.venv/bin/(\w+)", hook["entry"])}
    assert tools == {"ruff", "mypy"} <= development


def test_the_oldest_python_is_the_same_everywhere():
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PROJECT["tool"]["mypy"]["python_version"] == "3.11"
    named = [line.rsplit(" ", 1)[1] for line in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert named[0] == "3.11"
    assert "3.11" in SpecifierSet(importlib.metadata.metadata("trl")["Requires-Python"])


def test_make_test_oldest_reads_every_bound_but_torch_s():
    (pattern,) = re.findall(r"sed -n 's/(.*?)/\\1==\\2/p' pyproject.toml", MAKEFILE)
    pattern = pattern.replace(r"\(", "(").replace(r"\)", ")").replace("$$", "$")
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    read = {match[1] for line in lines if (match := re.match(pattern, line))}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    assert read == {Requirement(line).name for line in wanted if ">=" in line}
    assert "grep -v '^torch=='" in MAKEFILE


def test_the_pinned_releases_are_within_the_bounds():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    for line in PROJECT["project"]["dependencies"]:
        requirement = Requirement(line)
        assert pinned[requirement.name.lower().replace("_", "-")] in requirement.specifier, line


@pytest.mark.parametrize("folder", re.findall(r"--ignore=tests/,([\w ]+)\)", MAKEFILE)[0].split())
def test_the_folders_that_the_fast_tests_leave_out_exist(folder):
    assert list((ROOT / "tests" / folder).glob("test_*.py"))
