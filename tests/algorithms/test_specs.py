"""What an algorithm is stands in its spec: no other room compares names, and every spec is whole."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem_rlhf
from lowmem_rlhf.algorithms.registry import names, spec_of, specs
from lowmem_rlhf.algorithms.spec import resolve
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.recipe.schema import Recipe

PACKAGE = Path(lowmem_rlhf.__file__).parent
SECTIONS = {spec.section for spec in specs()}


def named_by(node: ast.AST) -> bool:
    """Whether an expression holds an algorithm's name, alone or in a tuple, list or set."""
    return any(isinstance(one, ast.Constant) and one.value in names() for one in ast.walk(node))


def is_algorithm(node: ast.AST) -> bool:
    """Whether an expression is a recipe's ``algorithm``, as an attribute, a key or a variable."""
    if isinstance(node, ast.Call):
        function = node.func
        key = node.args[0] if node.args else None
        got = isinstance(function, ast.Attribute) and function.attr == "get"
        return got and isinstance(key, ast.Constant) and key.value == "algorithm"
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "algorithm"
    return getattr(node, "attr", getattr(node, "id", "")) == "algorithm"


def choices_by_name(tree: ast.AST) -> list[int]:
    """Return the lines that choose by an algorithm's name, or read another algorithm's section of a recipe."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            member = any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
            chosen = any(map(named_by, [node.left, *node.comparators])) or (member and is_algorithm(node.left))
        elif isinstance(node, ast.Match):
            chosen = is_algorithm(node.subject) or any(map(named_by, node.cases))
        elif isinstance(node, ast.Dict):
            chosen = sum(key is not None and named_by(key) for key in node.keys) > 1  # `classifier` is a reward, too
        elif isinstance(node, ast.Subscript):
            chosen = isinstance(node.slice, ast.Attribute) and is_algorithm(node.slice)
        elif isinstance(node, ast.Attribute):
            holder = getattr(node.value, "attr", getattr(node.value, "id", ""))
            chosen = node.attr in SECTIONS and holder in ("recipe", "resolved", "wanted", "trained")
        else:
            chosen = False
        if chosen:
            lines.append(node.lineno)
    return lines


def test_only_the_algorithms_own_rooms_choose_by_a_name():
    found = [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if PACKAGE / "algorithms" not in file.parents
        for line in choices_by_name(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        'recipe.algorithm == "ppo"',
        'recipe.algorithm != "sft"',
        'recipe.algorithm in ("reward_model", "classifier")',
        "recipe.algorithm in ONLINE",
        'values.get("algorithm") == "classifier"',
        'values["algorithm"] in {"sft": 1}',
        'least = 2 if key == "grpo" else 1',
        'match recipe.algorithm:\n    case "sft":\n        pass',
        'kind = {"grpo": 1, "ppo": 2}[name]',
        "kind = TRAINERS[recipe.algorithm]",
        "critic = recipe.ppo.critic",
        "length = self.recipe.sft.max_length",
    ],
)
def test_the_count_sees(text):
    assert choices_by_name(ast.parse(text))


def test_the_count_lets_facts_pass():
    text = 'recipe.spec.samples and recipe.spec.rows == "prompts" and section.model_fields["sft"] and case.recipe.data'
    assert choices_by_name(ast.parse(text)) == []


def test_an_unknown_name_is_an_error():
    assert [spec_of(name).name for name in names()] == list(names())
    with pytest.raises(UserError, match=r"^algorithm: got 'gpro'; it should be 'grpo', .*; did you mean 'grpo'\?$"):
        spec_of("gpro")


def test_an_algorithm_may_be_written_as_its_title():
    data = {"data": {"train": "x.jsonl"}, "model": "m", "rewards": ["gsm8k_answer"]}
    for written, name in (("REINFORCE++", "reinforce_plus_plus"), ("Reward Model", "reward_model"), ("GRPO", "grpo")):
        assert validate_recipe({**data, "algorithm": written}).algorithm == name


@pytest.mark.parametrize("spec", specs(), ids=names())
def test_what_a_spec_names_is_there(spec):
    assert spec.section in Recipe.model_fields
    if spec.settings is not None:
        assert Recipe.model_fields[spec.section].annotation is spec.settings
    for reference in (spec.planner, spec.build, spec.check, spec.learner, spec.run):
        assert reference is None or callable(resolve(reference))
    assert (spec.learner is not None) == spec.samples


def test_specs_load_without_torch():
    code = (
        "import sys; from lowmem_rlhf.algorithms import registry; from lowmem_rlhf.recipe import schema\n"
        "print(len(registry.names()), sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(names())} []\n"
