"""docs/reliability.md: every test that it names is there, and its table of wrong inputs is the one that is tested."""

import ast
import re
from functools import cache
from pathlib import Path

from bad_inputs import BAD_INPUTS, markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
REFERENCE = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_fault_of_the_page_has_its_test():
    page = PAGE.read_text(encoding="utf-8")
    rows = [
        line for line in page.split("## Wrong inputs")[0].splitlines() if line.startswith("| ") and "---" not in line
    ]
    faults = [row for row in rows if not row.startswith("| fault |")]
    assert len(faults) > 80
    for row in faults:
        references = REFERENCE.findall(row)
        assert references, row
        for file, name in references:
            assert name in functions(file), row


def test_the_table_of_wrong_inputs_is_the_tested_one():
    assert len(BAD_INPUTS) >= 80
    assert PAGE.read_text(encoding="utf-8").endswith(markdown() + "\n")
