"""Texts of models, data and runs of others: harmless in a terminal, in Markdown, in HTML and in a Modelfile."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from reports import data_of
from rich.console import Console
from tiny_runs import tiny_values, write_jsonl

from lowmem_rlhf.display.lines import Lines
from lowmem_rlhf.display.tables import plain_table
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.card.markdown import code, fenced, plain, table
from lowmem_rlhf.export.card.write import write_card
from lowmem_rlhf.plain_text import harmless
from lowmem_rlhf.recipe.loading import recipe_of, validate_recipe
from lowmem_rlhf.recipe.secrets import VARIABLES
from lowmem_rlhf.report.html import write_report
from lowmem_rlhf.run.directory import RECIPE, RunDirectory
from lowmem_rlhf.run.evaluations import append_evaluation

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "[x]: https://evil.example",
    "<https://evil.example>",
    "a | b | c",
    "```\n<b>out</b>\n```",
    "`` ` <i>",
    "# head",
    "- item",
    "1. item",
    "---",
    "&lt;b&gt; &#60;script&#62;",
    "\\<b> \\[x](y)",
    "line\n\n<b>two</b>\n| a | b |\n|---|---|",
    "tail \\",
    "*bold* ~~gone~~ $x$",
]
ESCAPES = "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\ \x1b[2Jgone\rover \x9b31m \x07 \x08"
TOKEN = "hf_" + "Ab1" * 10


def rendered(text: str) -> tuple[set[str], str]:
    """Return the kinds of what a reader of Markdown makes of a text, and all that it shows."""
    kinds, shown = set(), []

    def walk(tokens: Any) -> None:
        for token in tokens:
            kinds.add(token.type)
            shown.append(token.content if not token.children else "")
            walk(token.children or [])

    walk(MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text))
    return kinds, "".join(shown)


def addresses(text: str) -> set[str]:
    """Return where the links and images of a text lead."""
    inner = [child for token in MarkdownIt("commonmark").parse(text) for child in token.children or []]
    return {str(one.attrs[key]) for one in inner for key in ("href", "src") if key in one.attrs}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_markdown_is_shown_as_it_is(text):
    kinds, shown = rendered(plain(text))
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "text", "text_special"}
    assert shown == " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_in_code_in_a_block_and_in_a_cell_stays_there(text):
    kinds, shown = rendered(code(text))
    assert kinds == {"paragraph_open", "paragraph_close", "inline", "code_inline"} and shown == " ".join(text.split())
    kinds, shown = rendered(fenced(text, "yaml"))
    assert kinds == {"fence"} and shown == text + "\n"
    kinds, shown = rendered(table(("a", "b"), [(text, code(text))]))
    assert not {"html_inline", "html_block", "link_open", "image", "fence"} & kinds
    assert len(re.findall("⏎", shown)) == text.count("\n")
    cells = MarkdownIt("commonmark").enable("table").parse(table(("a", "b"), [(text, code(text))]))
    assert sum(token.type == "td_open" for token in cells) == 2


def hostile_run(folder: Path, text: str, steps: int = 1) -> RunDirectory:
    """Return a run of so many steps whose every text is hostile, as a run of others may be."""
    recipe = validate_recipe({"model": "org/base", "data": {"train": "arithmetic"}, "rewards": ["exact_match"]})
    plan = {
        "device": {"name": text, "total_bytes": 2**30, "free_bytes": 2**30, "notes": [text]},
        "settings": {"quantization": "nf4", text: text},
        "reasons": {"quantization": text},
        "memory": {"peak_bytes": 5, "budget_bytes": 10, "phases": {text: {text: 5}}},
    }
    run = RunDirectory.create(folder / "run", recipe, plan, resume=False)
    values = run.recipe_values()
    values |= {"name": text, "description": text, "model": text, "adapter": text, "revision": text}
    values["data"] |= {"train": text, "eval": text, "template": text, "system": text, "config": text}
    values["rewards"][0] |= {"function": text, "name": text}
    (run.path / RECIPE).write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    for step in range(1, steps + 1):
        run.log_metrics({"step": step, "reward/mean": 0.5, f"reward/{text}": 1.0, "time/step": 1.0})
    run.log_samples(1, [{"prompt": text, "completion": text, "rewards": {text: 1.0}, text: text}])
    run.write_evaluation({"before": {text: 0.1}, "after": {text: 0.2}})
    estimate = {text: {"value": 0.5, "low": 0.1, "high": 0.9}}
    append_evaluation(
        run.path, {"steps": 1, "data": text, "results": {text: estimate}, "counts": {text: 2}, "method": text}
    )
    return run


class Tags(HTMLParser):
    """The tags of a page and the addresses in them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_the_card_of_a_hostile_run_has_no_link_and_no_html_of_it(tmp_path):
    for number, text in enumerate(HOSTILE):
        curve = number < 3  # drawing takes the most of a card's time
        run = hostile_run(tmp_path / str(number), text, steps=int(curve))
        (folder := tmp_path / str(number) / "export").mkdir()
        write_card(folder, run, {"format": text, "onto": text, "dtype": text, "proof": {text: text, "prompts": 8}})
        head, card = (folder / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)
        assert yaml.safe_load(head.removeprefix("---"))["license"]
        kinds, _ = rendered(card)
        assert not {"html_inline", "html_block"} & kinds, text
        heads = [line for line in card.splitlines() if re.match("#+ ", line)]
        assert len(heads) == 7 + curve, text  # the name and the sections, without Use
        assert addresses(card) == {"recipe.yaml", *(["curve.png"] if curve else [])}, text


def test_the_report_of_a_hostile_run_has_its_own_tags_alone(tmp_path):
    plain_tags = Tags()
    plain_tags.feed(write_report(hostile_run(tmp_path / "plain", "text")).read_text(encoding="utf-8"))
    hostile = "\n".join(HOSTILE)
    report = write_report(hostile_run(tmp_path / "hostile", hostile))
    tags = Tags()
    tags.feed(report.read_text(encoding="utf-8"))
    assert tags.found == plain_tags.found and tags.attributes == plain_tags.attributes
    assert data_of(report)["samples"]["rows"][0]["completion"] == hostile


def test_control_characters_are_written_out(capsys):
    assert harmless("a\tb\n") == "a\tb\n"
    assert json.loads(harmless(json.dumps(ESCAPES, ensure_ascii=False))) == ESCAPES
    Lines().message(ESCAPES)
    Console(force_terminal=True, color_system=None).print(plain_table((ESCAPES,), [(ESCAPES,)]))
    shown = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown.err + shown.out)
    assert r"\u001b]8;;https" in shown.err.replace("\n", "")


@pytest.fixture
def escapes(tiny_model, tmp_path, monkeypatch) -> Path:
    """Return a recipe whose rows hold a terminal's sequences, in the folder that the process is in."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"question": f"{n}{ESCAPES}", "answer": "1", ESCAPES: "x"} for n in range(4)])
    values = tiny_values(tiny_model) | {"data": {"train": "rows.jsonl", "eval_size": 0, "max_prompt_length": 200}}
    Path("tiny.yaml").write_text(yaml.safe_dump(values))
    return Path("tiny.yaml")


@pytest.mark.parametrize("command", ["data", "plan", "train"])
def test_rows_with_a_terminal_s_sequences_are_shown_harmlessly(escapes, lowmem_rlhf, command):
    extra = ["--output", "run", "training.max_steps=1", "data.bad_rows=drop"] if command == "train" else []
    done = lowmem_rlhf(command, escapes, *extra)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.out + done.err)
    done = lowmem_rlhf(command, escapes, f"data.prompt=question{ESCAPES}")
    assert done.code == 2 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.out + done.err)


PLACES = [
    {"description": "with TEXT"},
    {"model": "https://user:TEXT@huggingface.co/org/model"},
    {"revision": "TEXT"},
    {"data": {"train": "https://user:TEXT@host/rows.jsonl"}},
    {"data": {"train": "rows.jsonl", "eval": "https://TEXT@host/rows.jsonl"}},
    {"data": {"train": "arithmetic", "options": {"key": "TEXT"}}},
    {"data": {"train": "arithmetic", "system": "TEXT"}},
    {"rewards": [{"function": "length", "options": {"target": 5, "token": "TEXT"}}]},
    {"trl": {"token": "TEXT"}, "algorithm": "trl/dpo"},
]


@pytest.mark.parametrize("place", PLACES, ids=[json.dumps(place)[:40] for place in PLACES])
@pytest.mark.parametrize("secret", [TOKEN, "of-the-environment-123"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(place, secret, monkeypatch):
    monkeypatch.setenv(VARIABLES[0], "of-the-environment-123")
    values = json.loads(json.dumps(place).replace("TEXT", secret))
    with pytest.raises(UserError, match=r"holds (what looks like|an address|the value of)") as caught:
        recipe_of({"model": "m", "data": {"train": "arithmetic"}, "rewards": ["exact_match"], **values})
    assert secret not in str(caught.value)


def test_secrets_and_the_home_folder_of_a_run_leave_it_masked(tmp_path, monkeypatch):
    home = tmp_path / "home" / "me"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv(VARIABLES[0], "of-the-environment-123")
    text = f"in {home / 'x'} {TOKEN} https://me:word@host of-the-environment-123"
    run = hostile_run(tmp_path, text)
    (folder := tmp_path / "export").mkdir()
    write_card(folder, run, {"format": "merged", "proof": {}})
    for file in (write_report(run), folder / "README.md", folder / RECIPE):
        written = file.read_text(encoding="utf-8")
        assert not [one for one in (str(home), TOKEN, "me:word", "of-the-environment") if one in written], file


def test_nothing_that_a_healthy_run_writes_holds_a_secret(tiny_model, tmp_path, monkeypatch, lowmem_rlhf):
    for name in VARIABLES:
        monkeypatch.setenv(name, f"secret-of-{name}")
    monkeypatch.chdir(tmp_path)
    values = tiny_values(tiny_model)
    values["training"] |= {"max_steps": 1}
    Path("tiny.yaml").write_text(yaml.safe_dump(values))
    assert lowmem_rlhf("train", "tiny.yaml", "--output", "run").code == 0
    assert lowmem_rlhf("export", "run", "--format", "adapter").code == 0
    files = [path for path in Path("run").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert b"secret-of-" not in path.read_bytes(), path
    exported = [path for path in Path("run/export/adapter").rglob("*") if path.is_file()]
    for path in exported:
        assert str(tiny_model).encode() not in path.read_bytes(), path


def test_no_module_unpickles_or_reads_yaml_that_makes_objects():
    package = Path(__file__).parents[2] / "lowmem_rlhf"
    forbidden = re.compile(
        r"torch\.load\(|pickle\.loads?\(|joblib|allow_pickle\s*=\s*True|yaml\.(load|unsafe_load|full_load)\(|"
        r"\bfrom pickle\b|weights_only\s*=\s*False|use_safetensors\s*=\s*False"
    )
    found = [str(path) for path in package.rglob("*.py") if forbidden.search(path.read_text(encoding="utf-8"))]
    assert found == []
