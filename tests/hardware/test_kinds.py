"""Only `hardware/` looks at the kind of a device; everyone else asks for a capability."""

import ast
import re
from pathlib import Path

import pytest

import lowmem_rlhf

PACKAGE = Path(lowmem_rlhf.__file__).parent
KIND = re.compile(r"(cpu|cuda|rocm|hip|mps|xpu|npu|hpu|mtia|musa|xla|vcard|privateuseone)(:\d*)?")
PREDICATES = {"startswith", "endswith", "removeprefix", "partition", "split", "fullmatch", "match"}
ASKED_OF_TORCH = {"torch.cuda", "torch.mps", "torch.xpu", "torch.npu", "torch.version.hip", "torch.version.cuda"}
ASKED_OF_A_TENSOR = {"is_cuda", "is_cpu", "is_mps", "is_xpu"}


def is_kind(node: ast.AST) -> bool:
    """Whether an expression is a kind of device: its name, several of them, or a torch device made of one."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and KIND.fullmatch(node.value) is not None
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(is_kind, node.elts))
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("device") and any(map(is_kind, node.args))


def is_test(node: ast.AST) -> bool:
    """Whether a node looks at the kind of a device: by comparing, by a string's beginning, by a case or by a module."""
    if isinstance(node, ast.Compare):
        return any(map(is_kind, (node.left, *node.comparators)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in PREDICATES and any(map(is_kind, node.args))
    if isinstance(node, ast.MatchValue):
        return is_kind(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr in ASKED_OF_A_TENSOR or ast.unparse(node) in ASKED_OF_TORCH
    return False


def lines_that_test_a_kind(source: str) -> list[int]:
    """Return the lines of a module that look at the kind of a device."""
    return sorted(node.lineno for node in ast.walk(ast.parse(source)) if is_test(node))


@pytest.mark.parametrize(
    "line",
    [
        'device.type == "cpu"',
        '"cuda" != x.device.type',
        'device.type in ("cuda", "xpu")',
        '"cuda" in device',
        'torch_device.startswith("cuda")',
        'name.startswith(("cuda:", "mps"))',
        'x.device == torch.device("cpu")',
        "torch.cuda.is_available()",
        "torch.version.hip",
        "x.is_cuda",
        'match device.type:\n    case "mps":\n        pass',
    ],
)
def test_the_counter_sees(line):
    assert len(lines_that_test_a_kind(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        'torch.device("cpu")',
        'x.to("cpu")',
        'device = "cpu" if start == "auto" else chosen',
        'load_file(path, device="cpu")',
        "a.device.type == b.device.type",
        "capabilities(device).on_cpu",
    ],
)
def test_the_counter_lets_pass(line):
    assert not lines_that_test_a_kind(line)


def test_only_hardware_looks_at_the_kind_of_a_device():
    files = [file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE / "hardware"]
    found = {str(file.relative_to(PACKAGE)): lines_that_test_a_kind(file.read_text(encoding="utf-8")) for file in files}
    assert len(files) > 200 and {name: lines for name, lines in found.items() if lines} == {}
    assert lines_that_test_a_kind((PACKAGE / "hardware" / "detect.py").read_text(encoding="utf-8"))
