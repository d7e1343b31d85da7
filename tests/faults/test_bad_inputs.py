"""The table of wrong inputs: each ends with its sentence and exit code 2, at once, and leaves nothing behind."""

import os
import shlex
import sys
from pathlib import Path

import pytest
from bad_inputs import BAD_INPUTS, LONG, markdown, matches, prepare, said

from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.session.train import train


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory) -> Path:
    """Return the folder with the table's files and a finished run."""
    folder = tmp_path_factory.mktemp("place")
    prepare(folder, tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_recipe("tiny.yaml"), Path("run"))
    return folder


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(("command", "sentence"), BAD_INPUTS, ids=[command[:60] for command, _ in BAD_INPUTS])
def test_a_wrong_input_gets_its_sentence(place, monkeypatch, lowmem_rlhf, tiny_model, command, sentence):
    if "pipe" in command and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes with names")
    monkeypatch.setitem(sys.modules, "trackio", None)  # as where it is not installed
    monkeypatch.chdir(place)
    before = listing(place)
    done = lowmem_rlhf(*[word.replace("LONG", LONG) for word in shlex.split(command)])
    text = said(done.err, place).replace(LONG, "LONG").replace(str(tiny_model), "./model")
    assert done.code == 2, done
    assert matches(sentence, text), text
    assert "Traceback" not in done.err + done.out
    assert listing(place) == before


def test_the_table_is_large_and_is_markdown():
    assert len(BAD_INPUTS) >= 100
    assert len({command for command, _ in BAD_INPUTS}) == len(BAD_INPUTS)
    lines = markdown().splitlines()
    assert len(lines) == len(BAD_INPUTS) + 2 and all(line.startswith("| ") and line.endswith(" |") for line in lines)


def test_a_sentence_of_the_table_is_not_any_text():
    assert matches("got ...; give a", "got 5; give a") and not matches("got ...; give a", "got 5; give b")
