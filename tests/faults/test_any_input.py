"""Any recipe, data file and run directory: it runs, or it ends in a sentence and an exit code; never a traceback.

LOWMEM_RLHF_EXAMPLES=20 tries twenty times as many.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import tiny_values

from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.values import section_of

MORE = int(os.environ.get("LOWMEM_RLHF_EXAMPLES", "1"))
KEYS = [
    *Recipe.model_fields,
    *(
        f"{key}.{name}"
        for key, field in Recipe.model_fields.items()
        if (section := section_of(field.annotation))
        for name in section.model_fields
    ),
    *("rewards[0].weight", "rewards[0].options.target", "rewards[0].name", "rewards[3].weight", "nonsense", "data.x"),
]
RUN_FILES = [
    *("recipe.yaml", "plan.json", "metrics.jsonl", "samples.jsonl", "evaluation.json", "inputs.json", "local.json"),
    *("adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "checkpoints", "report.html"),
    *("checkpoints/step-1", "checkpoints/step-1/adapter_config.json", "evaluations.jsonl"),
]

EXTREMES = [0, -1, 1, 0.5, 1e-300, 1e300, 10**12]
WORDS = ["auto", "none", "", "null", "~", "[", "{a"]
numbers = st.one_of(st.integers(-(2**70), 2**70), st.integers(-3, 40), st.floats(), st.sampled_from(EXTREMES))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.sampled_from(WORDS))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
json_rows = st.lists(
    st.one_of(
        st.fixed_dictionaries({"question": values, "answer": values}),
        st.dictionaries(st.text(max_size=8), values, max_size=3),
        values,
    ),
    max_size=5,
)


def examples(count: int) -> Any:
    """Return the settings of a test of so many examples, the same in every run."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count * MORE, deadline=None, derandomize=MORE == 1, database=None, suppress_health_check=checks
    )


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch) -> Path:
    """Return the folder that the process is in, with a recipe and its rows."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n}+{n}=", "answer": str(2 * n)} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny_values(tiny_model)
    values["data"] = {"train": "rows.jsonl", "eval_size": 0, "max_prompt_length": 64}
    values["training"] |= {"max_steps": 1, "prompts_per_step": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def ended_well(done: Any, codes: tuple[int, ...] = (0, 2)) -> None:
    """Check that a command ran, or ended with one of the codes and a sentence."""
    assert done.code in codes, done
    said = done.err + done.out
    assert "Traceback" not in said, said
    if done.code == 0:
        assert said.strip()
    else:
        last = done.err[done.err.index("error: ") :] if "error: " in done.err else ""
        assert len(last) > 20 or "Usage: " in done.err, f"silence or a puzzle: {done.err!r}"


@examples(60)
@given(changes=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3))
def test_any_values_of_a_recipe(folder, lowmem_rlhf, changes):
    recipe = yaml.safe_load((folder / "tiny.yaml").read_text())
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name and isinstance(recipe.get(section), dict):
            recipe[section][name] = value
        elif "[" not in key:
            recipe[section] = value
    text = yaml.safe_dump(recipe, allow_unicode=True)
    (folder / "changed.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    ended_well(lowmem_rlhf("plan", "changed.yaml"))


@examples(50)
@given(key=st.sampled_from(KEYS), value=values.map(lambda one: one if isinstance(one, str) else json.dumps(one)))
def test_any_override(folder, lowmem_rlhf, key, value):
    ended_well(lowmem_rlhf("plan", "tiny.yaml", f"{key}={value}"))


@examples(60)
@given(content=st.one_of(st.binary(max_size=60), st.text(alphabet=":-[]{}&*!|>'\"%@`#,? \n\tab1\\", max_size=60)))
def test_any_text_as_a_recipe(folder, lowmem_rlhf, content):
    (folder / "any.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    done = lowmem_rlhf("plan", "any.yaml")
    assert done.code == 2
    ended_well(done)


@examples(90)
@given(
    ending=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"]),
    content=st.one_of(
        st.binary(max_size=80),
        json_rows.map(lambda rows: "\n".join(map(json.dumps, rows))),
        json_rows.map(json.dumps),
        st.text(alphabet='question,answer;"\n\r\t01é', max_size=80).map(lambda text: "question,answer\n" + text),
    ),
)
def test_any_data_file(folder, lowmem_rlhf, ending, content):
    file = folder / f"any{ending}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    ended_well(lowmem_rlhf("data", "tiny.yaml", f"data.train={file.name}"))


@examples(4)
@given(rows=json_rows, seed=st.integers(0, 2**32 - 1), rate=st.floats(1e-6, 1.0), tokens=st.integers(1, 8))
def test_any_rows_are_trained_on_or_refused(folder, lowmem_rlhf, rows, seed, rate, tokens):
    (folder / "any.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(folder / "run", ignore_errors=True)
    changes = [f"training.seed={seed}", f"training.learning_rate={rate}", f"generation.max_completion_length={tokens}"]
    options = ["data.train=any.jsonl", "data.bad_rows=drop", "--output", "run"]
    ended_well(lowmem_rlhf("train", "tiny.yaml", *options, *changes), (0, 1, 2))


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    """Return a finished run with a checkpoint."""
    from lowmem_rlhf.recipe.loading import validate_recipe
    from lowmem_rlhf.session.train import train

    recipe = tiny_values(tiny_model)
    recipe["training"] |= {"max_steps": 1, "save_steps": 1}
    recipe["data"] |= {"eval_size": 2}
    return train(validate_recipe(recipe), tmp_path_factory.mktemp("finished") / "run").path


damages = st.lists(
    st.tuples(
        st.sampled_from(RUN_FILES),
        st.one_of(st.none(), st.binary(max_size=30), values.map(lambda one: json.dumps(one).encode())),
    ),
    min_size=1,
    max_size=3,
)


@examples(12)
@given(damage=damages, command=st.sampled_from(["report", "export", "chat", "eval"]))
def test_any_damage_of_a_run(finished, folder, lowmem_rlhf, damage, command):
    run = folder / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished, run)
    for name, content in damage:
        path = run / name
        if content is None:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        elif not path.is_dir() and path.parent.is_dir():
            path.write_bytes(content)
    options = {"export": ["--format", "adapter", "--dry-run"], "chat": ["--prompt", "1+1", "--max-tokens", "2"]}
    ended_well(lowmem_rlhf(command, run, *options.get(command, [])), (0, 1, 2))
