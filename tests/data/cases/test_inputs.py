"""A run knows its inputs and its folder: other rows, another base, an adapter of elsewhere, another working folder."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lowmem_rlhf.architecture.fingerprint import fingerprint
from lowmem_rlhf.data.provenance import rows_fingerprint
from lowmem_rlhf.data.values import JsonFloat
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.run.base_file import BASE
from lowmem_rlhf.run.directory import INPUTS, open_run
from lowmem_rlhf.run.start import LOCAL
from lowmem_rlhf.session.train import train

ROWS = [{"question": f"Say the colour of thing {n}.", "answer": f"colour {n % 3}", "size": n} for n in range(10)]
RECIPE = """\
algorithm: grpo
model: ./base/final
hardware: {device: cpu, quantization: none, compute_dtype: float32}
lora: {r: 2}
data: {train: rows.jsonl, eval_size: 2, max_prompt_length: 64}
generation: {num_generations: 2, max_completion_length: 4}
rewards: [{function: "judge.py:brief"}]
training: {max_steps: 1, prompts_per_step: 2, save_steps: 1}
"""
JUDGE = "def brief(completions, **columns):\n    return [1.0 / (1 + len(text)) for text in completions]\n"


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", autouse=True)
def no_report():
    from lowmem_rlhf.report import html

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_report", lambda run: run.path)
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_folder):
    """Return a folder with a model, rows, a reward and a recipe, all named by relative paths, and the run of these."""
    project = tmp_path_factory.mktemp("project") / "mine"
    shutil.copytree(tiny_folder, project / "base" / "final")
    write_rows(project / "rows.jsonl", ROWS)
    (project / "judge.py").write_text(JUDGE)
    (project / "first.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        train(load_recipe("first.yaml"), Path("runs/first"))
    return project


@pytest.fixture
def project(original, tmp_path, monkeypatch):
    """Return a copy of that folder as if the run had been started in it; it is the current folder."""
    copy = shutil.copytree(original, tmp_path / "mine")
    local = copy / "runs" / "first" / LOCAL
    local.write_text(json.dumps({**json.loads(local.read_text()), "start": str(copy)}))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def elsewhere(project, tmp_path, monkeypatch):
    """Return another current folder, which has other files under the names of the run's."""
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "rows.jsonl", ROWS[:4])
    monkeypatch.chdir(other)
    return other


def change_weights(folder, change=lambda tensor: tensor + 0.01):
    file = folder / "model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def refused(done, *parts):
    assert done.code == 2, done
    for part in parts:
        assert part in done.err, done.err
    assert "Traceback" not in done.err and done.err.count("error:") == 1


CHAT = ("chat", "--prompt", "hello", "--max-tokens", "2")


def on(run, words):
    return words[0], run, *words[1:]


# A run opened from another folder


@pytest.mark.parametrize("words", [CHAT, ("eval",), ("report",)], ids=lambda w: w[0])
def test_a_run_is_opened_from_another_folder(project, elsewhere, lowmem_rlhf, words):
    run = project / "runs" / "first"
    written = (run / "recipe.yaml").read_text()
    done = lowmem_rlhf(*on(run, words))
    assert done.code == 0, done.err
    assert (run / "recipe.yaml").read_text() == written and "model: ./base/final" in written


def test_a_run_goes_on_from_another_folder(project, elsewhere, lowmem_rlhf):
    run = project / "runs" / "first"
    done = lowmem_rlhf("train", project / "first.yaml", "--output", run, "--resume", "training.max_steps=2")
    assert done.code == 0, done.err
    values = open_run(run).recipe_values()
    assert (values["model"], values["data"]["train"]) == ("./base/final", "rows.jsonl")
    assert values["rewards"][0]["function"] == "judge.py:brief" and len(open_run(run).metrics()) == 2


@pytest.mark.parametrize(
    ("gone", "words", "said"),
    [
        ("base/final", CHAT, "model './base/final' does not exist"),
        ("base/final", ("export",), "model './base/final' does not exist"),
        ("rows.jsonl", ("eval",), "rows.jsonl"),
        ("judge.py", ("eval",), "there is no file judge.py"),
    ],
)
def test_a_path_that_is_gone_says_which_folder_it_is_relative_to(project, elsewhere, lowmem_rlhf, gone, words, said):
    (elsewhere / "rows.jsonl").unlink()
    (project / gone).rename(project / "away")
    done = lowmem_rlhf(*on(project / "runs" / "first", words))
    refused(done, said, f"the run was started in {project}; paths are relative to it")


def test_a_start_folder_that_is_gone_is_said_too(project, elsewhere, lowmem_rlhf):
    run = shutil.move(project / "runs" / "first", elsewhere / "first")
    project.rename(project.parent / "away")
    refused(lowmem_rlhf(*on(run, CHAT)), f"was started in {project}, which is not there any more; paths are relative")
    (run / LOCAL).unlink()  # as in runs of older versions
    refused(lowmem_rlhf(*on(run, CHAT)), "paths of a run are relative to the folder that it was started in")


def test_a_run_that_moved_with_its_folder_is_opened(project, elsewhere, lowmem_rlhf):
    project.rename(elsewhere / "moved")
    done = lowmem_rlhf(*on(elsewhere / "moved" / "runs" / "first", ("eval",)))
    assert done.code == 0, done.err
    assert done.out.count("data rows.jsonl") == 1


def test_an_export_from_another_folder_takes_no_folder_of_this_machine_along(
    project, lowmem_rlhf, tmp_path, monkeypatch
):
    (project / "absolute.yaml").write_text(RECIPE.replace("./base", f"{project}/base"))
    assert lowmem_rlhf("train", "absolute.yaml", "--output", tmp_path / "run").code == 0
    monkeypatch.chdir(tmp_path)
    assert lowmem_rlhf("export", tmp_path / "run", "--format", "adapter").code == 0
    files = [path for path in (tmp_path / "run" / "export" / "adapter").rglob("*") if path.is_file()]
    assert {"adapter_config.json", BASE, "README.md", "recipe.yaml"} <= {path.name for path in files}
    assert LOCAL not in {path.name for path in files}
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes(), path


# Other rows


def test_the_run_directory_tells_its_inputs(project):
    inputs = json.loads((project / "runs" / "first" / INPUTS).read_text())
    held_out = inputs["data"]["eval"]
    assert (held_out["source"], held_out["rows"], inputs["data"]["train"]["rows"]) == ("rows.jsonl", 2, 8)
    assert inputs["base"]["model"] == "./base/final"
    assert {key: inputs["base"][key] for key in ("weights", "config", "tokenizer")} == {
        key: value for key, value in fingerprint("base/final").to_dict().items() if key != "kind"
    }


def resume(lowmem_rlhf, *overrides):
    return lowmem_rlhf("train", "first.yaml", "--output", "runs/first", "--resume", "training.max_steps=2", *overrides)


CHANGES = {
    "a row more": ([*ROWS, {**ROWS[0], "question": "And this?"}], "(8 rows, now 9)"),
    "a row less": (ROWS[:-1], "(8 rows, now 7)"),
    "another answer": ([{**row, "answer": "blue"} for row in ROWS], "(8 rows as then, with other values"),
    "another order": (ROWS[::-1], "(8 rows as then, with other values or in another order)"),
    "another column": ([{**row, "note": ""} for row in ROWS], "(8 rows as then, with other values"),
    "a text for a number": ([{**row, "size": str(row["size"])} for row in ROWS], "(8 rows as then, with other"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_with_other_rows_is_refused(project, lowmem_rlhf, change):
    rows, said = CHANGES[change]
    write_rows(project / "rows.jsonl", rows)
    refused(resume(lowmem_rlhf), "the rows of rows.jsonl are not those that the run began with", said, "--output")
    assert len(open_run("runs/first").metrics()) == 1


def test_the_same_rows_in_other_bytes_are_the_same(project, lowmem_rlhf):
    text = "\n\n".join(json.dumps(dict(sorted(row.items())), indent=None, separators=(" ,", " : ")) for row in ROWS)
    (project / "rows.jsonl").write_text(text)
    assert resume(lowmem_rlhf).code == 0


def test_an_evaluation_is_never_on_rows_that_were_not_held_out(project, lowmem_rlhf, caplog):
    write_rows(project / "rows.jsonl", ROWS[::-1])
    refused(lowmem_rlhf("eval", "runs/first"), "not those that the run held out", "may have been trained on")
    refused(lowmem_rlhf("eval", "runs/first", "data.eval_size=1"), "may have been trained on")
    write_rows(project / "fresh.jsonl", [{**row, "question": f"Now {row['size']}?"} for row in ROWS])
    assert lowmem_rlhf("eval", "runs/first", "data.eval=fresh.jsonl", "data.eval_size=3").code == 0
    assert "held-out rows of fresh.jsonl are not those that the run held out (2 rows, now 3)" in caplog.text


def test_rows_are_told_apart_by_their_literals_and_order_not_by_their_columns_order():
    told = [
        [{"a": JsonFloat("1.50")}],
        [{"a": JsonFloat("1.5")}],
        [{"a": "1.5"}],
        [{"a": None}],
        [{"a": ""}],
        [{"a": [JsonFloat("1.0")]}],
        [{"a": [1]}],
        [{"a": "\ud800"}],
        [{"a": "b", "c": ""}, {}],
        [{}, {"a": "b", "c": ""}],
        [],
    ]
    assert len({rows_fingerprint(rows)["sha256"] for rows in told}) == len(told)
    assert rows_fingerprint([{"a": 1, "b": 2}]) == rows_fingerprint([{"b": 2, "a": 1}])


# Another base of the same name


@pytest.mark.parametrize("words", [CHAT, ("eval",), ("export",)], ids=lambda w: w[0])
def test_another_base_of_the_same_name_is_refused(project, lowmem_rlhf, words):
    change_weights(project / "base" / "final")
    refused(
        lowmem_rlhf(*on("runs/first", words)), "is not the base that the run in", "other weights", "restore the files"
    )


def test_a_resume_sees_weights_config_and_template(project, lowmem_rlhf, caplog):
    base = project / "base" / "final"
    config, template = (base / "config.json").read_text(), base / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    refused(resume(lowmem_rlhf), "--resume: model './base/final'", "other tokenizer or chat template")
    assert lowmem_rlhf(*on("runs/first", CHAT)).code == 0
    assert "has another tokenizer or chat template than the run in runs/first was trained with" in caplog.text
    template.unlink()
    settings = (base / "tokenizer_config.json").read_text()
    (base / "tokenizer_config.json").write_text(json.dumps({**json.loads(settings), "eos_token": "<pad>"}))
    refused(resume(lowmem_rlhf), "--resume: model './base/final'", "other tokenizer or chat template")
    (base / "tokenizer_config.json").write_text(json.dumps({**json.loads(settings), "note": "of no account"}))
    (base / "config.json").write_text(json.dumps({**json.loads(config), "rms_norm_eps": 0.5}))
    refused(resume(lowmem_rlhf), "--resume: model './base/final'", "other config.json")
    (base / "config.json").write_text(json.dumps({**json.loads(config), "transformers_version": "1.2.3"}))
    assert resume(lowmem_rlhf).code == 0
    change_weights(base)
    refused(resume(lowmem_rlhf, "training.max_steps=3"), "--resume: model './base/final'", "other weights")


def without_hashes(run: Path) -> None:
    """Let a run be one of before there were hashes."""
    for file in run.rglob("hashes.json"):
        file.unlink()
    for file in run.rglob("state.json"):
        values = json.loads(file.read_text())
        file.write_text(json.dumps({key: values[key] for key in ("step", "optimizer", "counters")}))


@pytest.mark.parametrize(
    "text", ['{"start": 5, "from_run": {}, "paths": 3}', '{"data": 5, "base": [], "learned": "x"}']
)
def test_a_run_whose_inputs_are_of_other_kinds_opens_as_before(project, lowmem_rlhf, text):
    for file in (INPUTS, LOCAL):
        (project / "runs" / "first" / file).write_text(text)
    without_hashes(project / "runs" / "first")
    assert "--trust-run" in lowmem_rlhf("eval", "runs/first").err  # it has lost its id, and lies elsewhere: once
    assert lowmem_rlhf("eval", "runs/first", "--trust-run").code == 0
    assert resume(lowmem_rlhf).code == 0


def test_a_run_without_inputs_opens_as_before(project, lowmem_rlhf):
    for file in [INPUTS, LOCAL, f"adapter/{BASE}", f"checkpoints/step-1/{BASE}"]:
        (project / "runs" / "first" / file).unlink()
    without_hashes(project / "runs" / "first")
    assert lowmem_rlhf("eval", "runs/first", "--trust-run").code == 0
    assert resume(lowmem_rlhf).code == 0


def test_a_start_adapter_is_found_from_anywhere_and_refused_once_it_was_trained_anew(project, lowmem_rlhf, monkeypatch):
    assert lowmem_rlhf("train", "first.yaml", "adapter=runs/first", "--output", "runs/second").code == 0
    monkeypatch.chdir(project.parent)
    assert lowmem_rlhf(*on("mine/runs/second", CHAT), "--compare").code == 0
    again = ("mine/first.yaml", "adapter=runs/first", "--output", "mine/runs/second", "--resume")
    done = lowmem_rlhf("train", *again, "training.max_steps=2")
    assert done.code == 0 and open_run("mine/runs/second").recipe_values()["adapter"] == "runs/first", done.err
    monkeypatch.chdir(project)
    file = project / "runs" / "first" / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    without_hashes(project / "runs" / "first")  # trained anew, it would have its own
    said = "adapter: runs/first is not what the run in runs/second was trained with: other weights"
    refused(lowmem_rlhf("eval", "runs/second"), said)
    refused(lowmem_rlhf(*on("runs/second", CHAT), "--compare"), said)
    again = ("train", "first.yaml", "adapter=runs/first", "--output", "runs/second", "--resume")
    refused(lowmem_rlhf(*again, "training.max_steps=3"), f"--resume: {said}")
    assert lowmem_rlhf(*on("runs/second", CHAT)).code == 0  # answers of the policy need no reference
