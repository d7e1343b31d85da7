"""Recipes and overrides as people type them: texts stay texts, one length of a run, capitals, names of other programs.

After the case plain_values, with further inputs of each kind.
"""

import json
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import Field
from tiny_models import save_tiny

from lowmem_rlhf.algorithms.common.epochs import with_epochs
from lowmem_rlhf.display.lines import Lines
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.evaluation.target import open_run_target
from lowmem_rlhf.export.formats.table import check_options
from lowmem_rlhf.export.options import ExportOptions
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.progress import shown_by
from lowmem_rlhf.recipe.loading import find_recipe, load_recipe, validate_recipe
from lowmem_rlhf.recipe.names import ALIASES
from lowmem_rlhf.recipe.overrides import apply_override
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.section import Section
from lowmem_rlhf.recipe.server import ServerConfig
from lowmem_rlhf.recipe.values import read_values
from lowmem_rlhf.recipe.yaml_tree import read_yaml, write_yaml
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.session.train import train

HEAD = "model: m\nalgorithm: sft\ndata:\n  train: rows.jsonl\n"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN", "secret")
    with shown_by(Lines()):  # as on the command line
        yield tmp_path


def recipe(text: str = "", *overrides: str) -> Recipe:
    """Load a recipe of supervised fine-tuning; the text goes on in its data."""
    with open("mine.yaml", "w", encoding="utf-8", newline="") as file:
        file.write(HEAD + text)
    return load_recipe("mine.yaml", list(overrides))


def refusal(text: str = "", *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe(text, *overrides)
    return str(caught.value)


def again(made: Recipe) -> Recipe:
    """Load what a run directory would hold of a recipe."""
    with open("again.yaml", "w", encoding="utf-8") as file:
        file.write(made.to_yaml())
    return load_recipe("again.yaml")


# Texts


@pytest.mark.parametrize(
    "typed", ["7", "007", "2026-11-28", "1e5", "1:30", "no", "true", "0x10", "1_000", ".5", "${x}"]
)
def test_a_name_is_the_text_that_was_typed(typed):
    assert recipe("", f"name={typed}").name == typed
    assert recipe(f"  system: {typed}\n").data.system == typed
    assert recipe(f"  prompt: {typed}\n").data.prompt == typed


@pytest.mark.parametrize(
    "typed",
    [
        "Price ${question}",
        "${oc.env:TOKEN}",
        "${question",
        "{question}",
        "# Title",
        "Q: {q} # end",
        "[x]",
        "- item",
        " lead and trail ",
        "it's",
        '"a" and "b"',
        "!bang & star * `tick` %",
        "\\boxed{x} \\frac{1}{2}",
        "a=b=c",
        "two\nlines\n",
    ],
)
def test_a_text_of_an_override_arrives_as_typed_and_stays_in_the_run(typed, capsys):
    for key in ("system", "template"):
        loaded = recipe("", f"data.{key}={typed}")
        assert getattr(loaded.data, key) == typed
        assert again(loaded) == loaded
        assert validate_recipe(yaml.safe_load(loaded.to_yaml())) == loaded
    assert capsys.readouterr().err == ""


def test_nothing_of_a_recipe_file_is_interpolated():
    loaded = recipe("  system: Price ${question}\n  template: '${oc.env:TOKEN} {question}'\n  options: {a: '${b}'}\n")
    assert loaded.data.system == "Price ${question}"
    assert loaded.data.template == "${oc.env:TOKEN} {question}" and loaded.data.options == {"a": "${b}"}
    assert "secret" not in loaded.to_yaml()


def test_quotes_around_an_override_are_yaml_s():
    assert recipe("", "data.system='a  b'").data.system == "a  b"
    assert recipe("", 'data.system="a\\nb"').data.system == "a\nb"
    assert recipe("", "name='7'").name == "7"


def test_null_is_none_where_none_may_be():
    loaded = recipe("  answer: gold\n  system: null\n  config: ~\n  label:\n", "data.eval=null")
    assert (loaded.data.system, loaded.data.config, loaded.data.label, loaded.data.eval) == (None, None, None, None)
    assert recipe("  system: 'null'\n").data.system == "null"
    assert "data.train: got None; it should be a text" in refusal("", "data.train=null")


def test_an_empty_text_is_a_text_but_no_name():
    assert recipe("", "data.system=").data.system == ""
    assert "data.answer: got ''; write null for none" in refusal("", "data.answer=")
    assert "data.label: got ''; write null for none" in refusal("  label: ''\n")
    assert "data.prompt: got ''; it should not be empty" in refusal("", "data.prompt=")


def test_values_that_no_schema_knows_are_those_of_yaml_1_2(capsys):
    row = "{a: 1, b: 1e-5, c: true, d: 2020-01-01, e: '1', f: 010, g: 12:30:00, h: null, i: [.5, x], j: 0b1}"
    want = {"a": 1, "b": 1e-5, "c": True, "d": "2020-01-01", "e": "1", "f": "010", "g": "12:30:00", "h": None}
    want |= {"i": [0.5, "x"], "j": "0b1"}
    loaded = recipe(f"  options: {row}\n")
    assert loaded.data.options == want
    assert recipe("", f"data.options={row}").data.options == want
    assert recipe("  options: {a: 1}\n", "data.options={b: {c: 2}}", "data.options.b.d={question}").data.options == {
        "a": 1,
        "b": {"c": 2, "d": "{question}"},
    }
    assert again(loaded) == loaded
    assert capsys.readouterr().err == ""
    assert recipe("", "data.chat_template_kwargs.enable_thinking=off").data.chat_template_kwargs == {
        "enable_thinking": "off"
    }
    assert "enable_thinking: is the text 'off'; what is true or false is written so" in capsys.readouterr().err


def test_a_text_that_looks_like_a_number_survives_the_run_s_recipe():
    for text in ("1e5", "-1E-3", "007", "1:30", "0x1f", "on", "~", "", "=", ".inf", "2020-01-01", "a\u2028b"):
        made = validate_recipe({"model": "m", "algorithm": "sft", "data": {"train": "d", "options": {"a": [text]}}})
        assert again(made).data.options == {"a": [text]}
        assert yaml.safe_load(made.to_yaml())["data"]["options"] == {"a": [text]}


@pytest.mark.parametrize("escape", ["\\boxed", "\\frac", "\\alpha", "\\vec", "\\e", "\\0"])
def test_double_quotes_that_eat_a_backslash_are_named(escape):
    said = refusal(f'  template: "{{q}} {escape}{{x}}"\n')
    assert "data.template: holds the control character U+" in said and "write the text in single quotes" in said
    assert recipe(f"  template: '{{q}} {escape}{{x}}'\n").data.template == f"{{q}} {escape}{{x}}"


def test_a_control_character_is_refused_wherever_it_stands():
    assert "rewards[0].options.text: holds the control character U+0008" in refusal(
        'rewards: [{function: length, options: {text: "\\b"}}]\n'
    )
    assert "data.system: holds the control character U+001B" in refusal("", "data.system=\x1b[1m")
    assert "line 5: holds the control character U+0007" in refusal("  system: a\x07\n")
    assert recipe('  system: "a\\tb\\nc"\n').data.system == "a\tb\nc"


def test_a_backslash_that_may_not_be_meant_is_said(capsys):
    assert recipe("", "data.template={q}\\nAnswer:").data.template == "{q}\\nAnswer:"
    assert "data.template: holds a backslash and an n, not a line break" in capsys.readouterr().err
    recipe("  system: 'Think.\\nAnswer.'\n")
    assert "data.system: holds a backslash and an n" in capsys.readouterr().err
    recipe('  system: "\\times and \\theta"\n')
    assert "not \\times; write the text in single quotes" in capsys.readouterr().err
    recipe("  system: '\\nabla \\neq \\times'\n", "data.template={q}\nAnswer:")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  system: a\n  system: b\n", "line 6: the key 'system' is given twice"),
        ("training: {seed: 1, seed: 2}\n", "line 5: the key 'seed' is given twice"),
        ("  template: Q: {q}\n", "line 5: mapping values are not allowed here; a text that holds ': ' needs quotes"),
        ("  template: {q} please\n", "a text that begins with a quote, { or [ needs quotes around it"),
        ("  template: {q}\n", "data.template: got a mapping ({...}); it should be a text, and one that begins with {"),
        (
            '  template: "\\sqrt{x}"\n',
            "found unknown escape character 's'; a text with backslashes is written",
        ),
        ("  system: !!python/name:os.system x\n", "line 5: the tag !!python/name:os.system has no meaning"),
        ("  options: &a [*a]\n", "line 5: an alias that holds itself"),
        ("  ? [a]\n  : b\n", "line 5: a key is one text"),
    ],
)
def test_what_is_no_recipe_is_named_with_its_line(text, said):
    assert said in refusal(text)


def test_anchors_merge_and_a_section_without_keys_is_its_default():
    loaded = recipe("  options: &o {a: 1, b: 2}\n  chat_template_kwargs: {<<: *o, b: 3}\ntraining:\n")
    assert loaded.data.chat_template_kwargs == {"a": 1, "b": 3} and loaded.training.max_steps == 100


class Small(Section):
    """A schema of a text and of values that no schema knows."""

    text: str = ""
    options: dict[str, Any] = Field(default_factory=dict)


LETTERS = st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t")
TEXTS = st.text(LETTERS) | st.text("0189eExob+-._:~#{}[]'\"\\ \n\ttruefalsn<=&*!|>%@`,", max_size=8)
VALUES = st.recursive(
    TEXTS | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXTS, inside, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.dictionaries(TEXTS, VALUES, max_size=3))
@example("\xa0", {"0": "\xa0", "1": "null\u3000", "2": "\u20037"})
def test_what_is_written_is_read_as_it_was(text, options):
    written = write_yaml({"text": text, "options": options})
    reading = read_values(read_yaml(written), Small)
    assert reading.values == yaml.safe_load(written) == {"text": text, "options": options} and not reading.problems


def test_line_feeds_are_written_as_their_escapes():
    assert write_yaml({"stop_strings": ["\n", "a\n"]}) == "stop_strings:\n- \"\\n\"\n- 'a\n\n  '\n"


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_a_text_that_is_neither_quoted_nor_null_arrives_as_typed(text):
    tree: dict[str, Any] = {}
    apply_override(tree, f"text={text}", Small)
    assume(text.strip() not in ("null", "Null", "NULL", "~"))
    assume(not (len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] and text.strip()[0] in "\"'"))
    assert read_values(tree, Small).values == {"text": text}


def test_no_depth_and_no_length_ends_in_a_traceback():
    assert "too deep" in refusal(f"  options: {'[' * 3000}{']' * 3000}\n")
    assert "training.seed: got '9" in refusal("", f"training.seed={'9' * 6000}")
    assert recipe("", f"data.options.a={'[' * 3000}").data.options == {"a": "[" * 3000}


# The case's values


def test_memory_without_a_unit_is_gigabytes(lowmem_rlhf):
    for options in (["hardware.vram=8000"], ["--vram", "8000"], ["--vram", "0.5"]):
        recipe()
        done = lowmem_rlhf("plan", "mine.yaml", *options)
        assert done.code == 2 and f"hardware.vram: got {options[-1].split('=')[-1]}; a number without" in done.err
    assert recipe("hardware: {vram: 11}\n").hardware.vram == "11GB"
    assert recipe("", "hardware.vram=8GB").hardware.vram == "8GB"


def test_names_with_commas_are_a_list_where_a_list_is_asked_for():
    assert recipe("", "lora.target_modules=q_proj,v_proj").lora.target_modules == ["q_proj", "v_proj"]
    assert recipe("lora: {target_modules: 'all-linear'}\n").lora.target_modules == "all-linear"
    assert recipe("", "lora.target_modules=ALL_linear").lora.target_modules == "all-linear"
    assert recipe("", "training.report_to=TensorBoard, wandb").training.report_to == ["tensorboard", "wandb"]
    assert recipe("training: {report_to: none}\n").training.report_to == []  # as TRL's and Unsloth's scripts say it
    assert recipe("", "training.report_to=none").training.report_to == []
    assert "training.report_to[1]: got 'none'" in refusal("", "training.report_to=wandb,none")
    assert [one.function for one in recipe("", "rewards=length,my.py:f").rewards] == ["length", "my.py:f"]
    assert recipe("", "lora.target_modules=.*q_proj").lora.target_modules == ".*q_proj"
    assert (
        recipe("", r"""lora.target_modules='.*\.\d{1,2}\..*q_proj'""").lora.target_modules == r".*\.\d{1,2}\..*q_proj"
    )
    said = refusal("", r"lora.target_modules=.*\.\d{1,2}\..*q_proj")
    assert r"got '.*\\.\\d{1' in a list, which holds names or ends of names; a regular expression stands alone" in said


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("algorithm=SFT", "sft"),
        ("hardware.quantization=NF4", "nf4"),
        ("hardware.compute_dtype=BF16", "bfloat16"),
        ("hardware.compute_dtype=torch.float16", "float16"),
        ("hardware.compute_dtype=fp32", "float32"),
        ("hardware.optim=AdamW-8bit", "adamw_8bit"),
        ("training.lr_scheduler_type=Cosine", "cosine"),
        ("grpo.loss_type=DR_GRPO", "dr_grpo"),
        ("hardware.probe=Auto", "auto"),
        ("hardware.probe=TRUE", True),
    ],
)
def test_choices_are_taken_in_capitals_and_by_their_short_names(override, value):
    found = recipe("", override)
    for part in override.split("=")[0].split("."):
        found = getattr(found, part)
    assert found == value


def test_an_export_takes_capitals(place):
    run = RunDirectory(place)
    options = check_options(ExportOptions(format="GGUF", onto="Original", quantize="Q4_K_M"), recipe(), run)
    assert (options.format, options.onto, options.quantize) == ("gguf", "original", "q4_k_m")
    assert check_options(ExportOptions(format="Merged", dtype="FP16"), recipe(), run).dtype == "float16"
    with pytest.raises(UserError, match=r"--quantize: got 'Q4_K_X'; give .*did you mean 'q4_k_m'"):
        check_options(ExportOptions(format="gguf", quantize="Q4_K_X"), recipe(), run)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lr=1e-5", "training.learning_rate"),
        ("training.lr=1e-5", "training.learning_rate"),
        ("batch_size=4", "training.prompts_per_step"),
        ("hardware.per_device_train_batch_size=4", "training.prompts_per_step"),
        ("epochs=3", "training.num_train_epochs"),
        ("training.steps=3", "training.max_steps"),
        ("max_steps=3", "training.max_steps"),
        ("sft.max_seq_length=3", "sft.max_length"),
        ("lora.alpha=3", "lora.lora_alpha"),
        ("rank=3", "lora.r"),
        ("generation.n=3", "generation.num_generations"),
        ("training.max_new_tokens=3", "generation.max_completion_length"),
        ("grpo.kl_coeff=3", "grpo.beta"),
        ("dataset=x", "data.train"),
        ("model_name=x", "model"),
        ("learningrat=3", "training.learning_rate"),
    ],
)
def test_names_of_other_programs_are_known(override, key):
    said = refusal("", override)
    assert "unknown key; did you mean" in said and f"'{key}'" in said.split("?")[0]


def test_every_suggestion_is_a_key():
    known = set(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        known |= {f"{name}.{key}" for key in getattr(field.annotation, "model_fields", {})}
    known |= {f"generation.server.{key}" for key in ServerConfig.model_fields}
    suggested = {key for keys in ALIASES.values() for key in keys if not key.startswith("data.chat_template_kwargs.")}
    assert len(suggested) > 30 and suggested <= known
    assert not {key.rsplit(".", 1)[-1] for key in known if "." not in key} & ALIASES.keys()


def test_what_is_no_key_says_where_it_is_set():
    assert "output_dir: unknown key; give --output" in refusal("", "output_dir=x")
    assert "training.bf16: unknown key; did you mean 'hardware.compute_dtype'?" in refusal("", "training.bf16=true")
    assert "lora.lora_dropout: unknown key; dropout is always off" in refusal("", "lora.lora_dropout=0.1")
    assert "trainig: unknown key; did you mean 'training'?" in refusal("", "trainig.seed=1")


def test_a_recipe_s_file_is_found_or_its_name_suggested(place):
    recipe()
    for name, hint in (
        ("mine.yml", "did you mean 'mine.yaml'?"),
        ("mine", "did you mean 'mine.yaml'?"),
        ("quickstart.yaml", "did you mean 'quickstart'?"),
        ("nowhere/..", "is neither a file nor a shipped recipe"),
        ("", "recipe: got ''; give a recipe's file"),
        (".", "is a folder; give the recipe's file, or the name of a shipped one; did you mean mine.yaml?"),
    ):
        with pytest.raises(UserError) as caught:
            find_recipe(name)
        assert hint in str(caught.value)
    (place / "mine.yaml").rename(place / "mine.yml")
    with pytest.raises(UserError, match=r"did you mean 'mine\.yml'\?"):
        find_recipe("mine.yaml")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.CSV", "rows.parquet", "rows.json.gz", "not_there.jsonl"])
def test_a_data_file_is_no_recipe(place, name):
    if name.startswith("rows"):
        (place / name).write_text('{"question": "2+3", "answer": "5"}\n' * 2)
    with pytest.raises(UserError) as caught:
        find_recipe(name)
    assert str(caught.value).endswith(f"data.train={name}")


def test_recipes_of_other_editors_are_read(place):
    text = HEAD + "  system: Grüße\n"
    for encoding in ("utf-8-sig", "utf-16", "utf-8"):
        (place / "mine.yaml").write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert load_recipe("mine.yaml").data.system == "Grüße"


# New keys


def test_keys_of_the_chat_template_that_are_ours_are_refused():
    said = refusal("", "data.chat_template_kwargs={tokenize: true, add_generation_prompt: false}")
    assert "data.chat_template_kwargs: got add_generation_prompt, tokenize, which this package sets itself" in said
    assert "return_dict" in refusal("  chat_template_kwargs: {return_dict: true, enable_thinking: false}\n")
    assert recipe("", "data.chat_template_kwargs.enable_thinking=false").data.chat_template_kwargs == {
        "enable_thinking": False
    }


def test_learning_all_answers_is_for_conversations():
    assert "sft.learn: got all, which is for conversations" in refusal("  text: page\n", "sft.learn=all")
    assert recipe("  messages: talk\n", "sft.learn=all").sft.learn == "all"


def test_a_long_row_is_a_bad_one():
    assert recipe("", "data.bad_rows=drop").data.long_prompts == "drop"
    assert recipe().data.long_prompts == "error" and recipe("", "data.long_prompts=drop").data.bad_rows == "error"


# How long a run is


def lengths(of: Recipe) -> tuple[int, int | None]:
    return of.training.max_steps, of.training.num_train_epochs


def test_of_steps_and_epochs_the_one_given_later_wins():
    epochs, steps = "training: {num_train_epochs: 3}\n", "training: {max_steps: 7}\n"
    assert lengths(recipe(epochs, "training.max_steps=5")) == (5, None)
    assert lengths(recipe(steps, "training.num_train_epochs=2"))[1] == 2
    assert lengths(recipe(epochs, "training={max_steps: 5}")) == (5, None)
    assert lengths(recipe(epochs, "training.num_train_epochs=null")) == (100, None)
    assert lengths(recipe(epochs, "training.num_train_epochs=null", "training.max_steps=4")) == (4, None)
    assert lengths(recipe("training: {max_steps: 7, num_train_epochs: null}\n")) == (7, None)


def test_two_lengths_in_a_file_are_refused():
    both = "training.max_steps, training.num_train_epochs: got both"
    assert f"{both}; a run has one length" in refusal("training: {max_steps: 7, num_train_epochs: 2}\n")


@pytest.mark.parametrize("epochs", ["0.5", "0", "-1", "1.5"])
def test_a_part_of_an_epoch_is_counted_in_steps(epochs):
    said = refusal("", f"training.num_train_epochs={epochs}")
    assert f"training.num_train_epochs: got {epochs}; it should be a whole number of at least 1" in said
    assert "training.max_steps instead" in said


def test_a_resolved_recipe_holds_one_length():
    by_epochs = with_epochs(recipe("training: {num_train_epochs: 2, prompts_per_step: 4}\n"), 10)
    kept = yaml.safe_load(by_epochs.to_yaml())["training"]
    assert by_epochs.training.max_steps == 5 and kept["num_train_epochs"] == 2 and "max_steps" not in kept
    kept = yaml.safe_load(recipe("training: {max_steps: 7}\n").to_yaml())["training"]
    assert kept["max_steps"] == 7 and "num_train_epochs" not in kept


def test_a_run_of_an_older_version_that_holds_both_is_read(place):
    (place / "old").mkdir()
    text = HEAD + "training: {max_steps: 3, num_train_epochs: 2}\n"
    (place / "old" / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match="got both"):
        load_recipe("old/recipe.yaml")
    (place / "old" / "plan.json").write_text("{}")
    assert load_recipe("old/recipe.yaml").training.num_train_epochs == 2


@pytest.mark.parametrize("algorithm", ["sft", "trl/dpo"])
def test_epochs_grow_on_a_resume_and_may_become_steps(algorithm, place):
    folder = save_tiny("llama", place / "m")
    rows = [{"question": f"{n}+1", "answer": str(n + 1), "chosen": str(n + 1), "rejected": "x"} for n in range(4)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "  eval_size: 0\nhardware: {device: cpu, quantization: none, compute_dtype: float32, check: auto}\n"
    text += "training: {num_train_epochs: 1, prompts_per_step: 2, save_steps: 1}\n"
    length = "trl.max_length=64" if algorithm.startswith("trl") else "sft.max_length=64"
    given = [f"model={folder}", f"algorithm={algorithm}", "lora.r=2", length]
    first = train(recipe(text, *given), place / "run")
    assert [row["step"] for row in first.metrics()] == [1, 2]
    grown = train(recipe(text, *given, "training.num_train_epochs=2"), place / "run", resume=True)
    assert [row["step"] for row in grown.metrics()] == [1, 2, 3, 4]
    assert grown.recipe_values()["training"]["num_train_epochs"] == 2
    if algorithm != "sft":
        return  # what follows is the same code
    assert open_run_target(OpenRun(grown), [], "cpu", judged=False).recipe.training.max_steps == 4
    longer = train(recipe(text, *given, "training.max_steps=5"), place / "run", resume=True)
    assert len(longer.metrics()) == 5 and longer.recipe_values()["training"]["max_steps"] == 5
    with pytest.raises(UserError, match=r"training\.max_steps: got 2, and the run in .* has taken 5 steps"):
        train(recipe(text, *given), place / "run", resume=True)
    assert len(longer.metrics()) == 5
