"""report.html holds every part of a run as data, and nothing from elsewhere."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from reports import data_of

from lowmem_rlhf.page import report_data as limits
from lowmem_rlhf.page.html import whole_page
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.report.html import write_report
from lowmem_rlhf.run.directory import RunDirectory

EVIL = "<script src='https://evil.example/x.js'></script>"


@pytest.fixture
def run(tmp_path):
    recipe = validate_recipe(
        {
            "name": f"adder {EVIL}", "description": f"learns <b>to add</b> {EVIL}", "model": "tiny",
            "data": {"train": "arithmetic"}, "rewards": ["exact"],
        }
    )  # fmt: skip
    plan = {
        "fits": True,
        "device": {"name": f"Card {EVIL}", "total_bytes": 11 * 2**30, "free_bytes": 10 * 2**30},
        "settings": {"quantization": "nf4", "lora": {"r": 8}},
        "reasons": {"quantization": "16-bit takes > 6 GiB & more"},
        "memory": {"budget_bytes": 10 * 2**30, "peak_bytes": 3 * 2**30, "phases": {"rollout": {"base": 2**30}}},
    }
    return RunDirectory.create(tmp_path / "run", recipe, plan, resume=False)


def test_report_of_a_fresh_run(run):
    data = data_of(write_report(run))
    assert data["samples"] == {"rows": [], "left_out": 0} and data["columns"]["step"] == []
    assert data["run"]["evaluation"] == {} and data["run"]["step"] == 0


def test_report_has_every_part_of_a_run(run):
    for step in range(1, 6):
        run.log_metrics({"step": step, "reward/mean": 0.5 * step, "time/step": 30.0})
    chat = [{"role": "user", "content": f"2 < 3? {EVIL}"}]
    run.log_samples(5, [{"prompt": chat, "completion": f"yes {EVIL}", "rewards": {f"exact{EVIL}": 1.0}, "a": None}])
    evaluation = {"before": {"accuracy": 0.1, "problems": 64}, "after": {"accuracy": 0.4, "reward/exact": float("nan")}}
    run.write_evaluation(evaluation)
    path = write_report(run)
    assert path == run.path / "report.html"
    data = data_of(path)
    assert data["columns"]["columns"]["reward/mean"] == [0.5, 1.0, 1.5, 2.0, 2.5]
    [sample] = data["samples"]["rows"]
    assert sample["prompt"] == chat and sample["completion"] == f"yes {EVIL}"
    assert sample["rewards"] == {f"exact{EVIL}": 1.0}
    told = data["run"]
    assert told["plan"] == run.plan() and told["name"] == f"adder {EVIL}"
    assert told["evaluation"]["before"] == evaluation["before"]
    assert told["evaluation"]["after"] == {"accuracy": 0.4, "reward/exact": None}  # JSON has no NaN
    assert told["headline"]["text"] == "10.0% → 40.0%" and told["seconds"] == 150
    assert "prompts_per_step: 8" in told["recipe"] and ["device", f"Card {EVIL}"] in told["environment"]


def test_a_report_has_the_first_and_the_last_of_many_samples(run, monkeypatch):
    for step in range(1, 11):
        run.log_samples(step, [{"prompt": "p", "completion": f"{step}.{place}"} for place in range(3)])
    every = [f"{step}.{place}" for step in range(1, 11) for place in range(3)]

    def kept() -> list[str]:
        samples = data_of(write_report(run))["samples"]
        found = [row["completion"] for row in samples["rows"]]
        assert len(found) + samples["left_out"] == 30
        return found

    assert kept() == every
    monkeypatch.setattr(limits, "_AT_ONCE", 4)
    assert kept() == every
    monkeypatch.setattr(limits, "_ROWS", 11)
    assert kept() == [*every[:6], *every[-5:]]
    row = len(json.dumps(data_of(run.path / "report.html")["samples"]["rows"][0]))
    monkeypatch.setattr(limits, "_BYTES", 5 * row)
    assert kept() == [*every[:2], *every[-2:]]


class Parts(HTMLParser):
    """The tags of a page, their attributes, and the texts of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and (tag := self.tags[-1][0]) in ("script", "style") and data.strip():
            kind = self.tags[-1][1].get("type", tag)
            self.texts.append((kind, data))


def allowed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_a_report_needs_no_network_and_allows_its_own_scripts_alone(run):
    run.log_samples(1, [{"prompt": EVIL, "completion": EVIL, EVIL: EVIL}])
    parts = Parts(write_report(run).read_text(encoding="utf-8"))
    links = [value for _, attributes in parts.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(link.startswith(("#", "data:image/svg+xml,")) for link in links) and len(links) > 5
    assert not {tag for tag, _ in parts.tags} & {"iframe", "object", "form", "img"}
    assert not {key for _, attributes in parts.tags for key in attributes if key.startswith("on") or key == "style"}
    [policy] = [a["content"] for tag, a in parts.tags if tag == "meta" and "http-equiv" in a]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules and "unsafe" not in policy
    assert rules["script-src"].split() == [allowed(text) for kind, text in parts.texts if kind == "script"]
    assert rules["style-src"].split() == [allowed(text) for kind, text in parts.texts if kind == "style"]
    assert [kind for kind, _ in parts.texts] == ["style", "application/json", "script", "script"]
    assert all("url(" not in text and "@import" not in text for kind, text in parts.texts if kind == "style")


def test_no_script_makes_markup_of_texts():
    page, policy = whole_page(None, "secret")
    ours = [text for kind, text in Parts(page).texts if kind == "script"][-1]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\.style\b\.css", ours
    )
    assert "connect-src 'self'" in policy and "http-equiv" not in page  # the server says it


def test_the_charting_library_stands_with_its_licence(run):
    page = write_report(run).read_text(encoding="utf-8")
    assert "Permission is hereby granted" in page and "uPlot (v1.6.32)" in page
