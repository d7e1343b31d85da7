"""The table of families: its names are transformers' and llama.cpp's, and nothing else tells families apart by name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import gguf
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import lowmem_rlhf
from lowmem_rlhf.architecture import families
from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.architecture.families import FAMILIES, cohere, gemma, gpt, hybrid, llama, mamba, olmo
from lowmem_rlhf.architecture.families.block import Block
from lowmem_rlhf.architecture.families.row import Family, GGUFArchitecture
from lowmem_rlhf.export.gguf import metadata

PACKAGE = Path(lowmem_rlhf.__file__).parent
GGUF_NAMES = set(gguf.MODEL_ARCH_NAMES.values())
NAMES = {*CONFIG_MAPPING_NAMES, *FAMILIES, *GGUF_NAMES} - {"git"}  # which is a program, too
LOOK_UPS = {"get", "startswith", "endswith", "removeprefix", "setdefault", "pop"}
TINY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64},
}


def _texts(node: ast.AST | None) -> Iterator[str]:
    """Yield the strings that an expression consists of."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for part in node.elts:
            yield from _texts(part)


def _is_model_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).endswith(("model_type", "arch"))


def told_apart(source: str) -> list[str]:
    """Return where code tells families apart by name.

    That is: a model type that is compared with a string, and a string that is the name of a model type and is compared,
    a key, or in a set or sequence of such names.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = [text for side in sides for text in _texts(side)]
            names = texts if any(map(_is_model_type, sides)) else [text for text in texts if text in NAMES]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOK_UPS:
            texts = [text for argument in node.args for text in _texts(argument)]
            names = texts if _is_model_type(node.func.value) else [text for text in texts if text in NAMES]
        elif isinstance(node, ast.Dict):
            names = [text for key in node.keys for text in _texts(key) if text in NAMES]
        elif isinstance(node, ast.Set | ast.Tuple | ast.List):
            names = [text for text in _texts(node) if text in NAMES]
        elif isinstance(node, ast.Subscript):
            names = [text for text in _texts(node.slice) if text in NAMES]
        elif isinstance(node, ast.MatchValue):
            names = [text for text in _texts(node.value) if text in NAMES]
        found += [f"{node.lineno}: {name}" for name in names]
    return found


@pytest.mark.parametrize(
    "source",
    [
        'config.model_type == "brandnew"',
        'dims.model_type.startswith("brand")',
        'layout.arch in ("brandnew",)',
        'kind == "gemma3"',
        'layers = {"gemma2": 46}',
        'post_norm = {"olmo2"}',
        'pairs = ("llama",)',
        'layers.get("phi3")',
        'layers["phi3"]',
        'match kind:\n    case "gpt2":\n        pass',
    ],
)
def test_a_name_that_decides_is_found(source):
    assert len(told_apart(source)) >= 1


def test_a_name_that_decides_nothing_is_not_found():
    assert told_apart('keys = {"tokenizer.ggml.model": "gpt2"}\nf(config.model_type, "llama")\nkind == "packed"') == []


def test_only_the_architecture_room_tells_families_apart_by_name():
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "architecture"]
    assert len(files) > 200
    assert {str(p): found for p in files if (found := told_apart(p.read_text(encoding="utf-8")))} == {}


def test_each_family_is_one_row_under_the_name_that_transformers_has():
    files = [llama.ROWS, gemma.ROWS, gpt.ROWS, cohere.ROWS, olmo.ROWS, mamba.ROWS, hybrid.ROWS]
    assert sum(map(len, files)) == len(FAMILIES)
    assert set(FAMILIES) <= set(CONFIG_MAPPING_NAMES)


def test_what_a_row_says_of_gguf_is_in_llama_cpps_words():
    for model_type, family in FAMILIES.items():
        if family.gguf is None:
            continue
        assert family.gguf.name in GGUF_NAMES, model_type
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf.name)
        tensors = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[arch]}
        assert {f"blk.{{bid}}.{name}" for name in family.gguf.layer_names} <= tensors, model_type


def test_every_kind_of_metadata_has_its_function():
    kinds, nothing = get_args(GGUFArchitecture.__dataclass_fields__["metadata"].type)
    assert {*get_args(kinds)} == set(metadata._DESCRIBE) and nothing is type(None)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [("llama", "llama"), ("gemma3", "gemma3"), ("phi2", "phi"), ("command-r", "cohere"), ("brandnew", "brandnew")],
)
def test_the_model_type_that_a_gguf_is_read_as(name, model_type):
    assert families.family_of_gguf(name) == (model_type, FAMILIES.get(model_type, Family()))


def test_a_new_family_is_a_row(monkeypatch):
    row = Family(Block(norm_place="after", mlp_bias=True, window=16, full_every=2), overflows_float16=True)
    monkeypatch.setitem(FAMILIES, "brandnew", row)
    dims = dimensions_from_config({**TINY, "model_type": "brandnew"}, "x")
    assert dims.known and dims.note == "" and dims.overflows_float16
    assert (dims.norm_place, dims.sliding_window, dims.sliding_layers) == ("after", 16, 1)
    assert [x.name for x in dims.linears if x.bias] == ["gate_proj", "up_proj", "down_proj"]


def test_the_table_needs_no_torch():
    code = "import sys, lowmem_rlhf.architecture.families; sys.exit('torch' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
