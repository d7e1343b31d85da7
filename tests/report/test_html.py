"""report.html holds every part of a run, escaped, and nothing from elsewhere."""

from html.parser import HTMLParser

import pytest

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
        "profile": "card",
        "settings": {"quantization": "nf4", "lora": {"r": 8}},
        "reasons": {"quantization": "16-bit takes > 6 GiB & more"},
        "memory": {
            "budget_bytes": 10 * 2**30, "peak_bytes": 3 * 2**30,
            "phases": {"rollout": {"base": 2**30, "cache": 2**31}, "update": {f"x{EVIL}": 2**30}},
        },
    }  # fmt: skip
    return RunDirectory.create(tmp_path / "run", recipe, plan, resume=False)


def test_report_of_a_fresh_run(run):
    text = write_report(run).read_text(encoding="utf-8")
    assert "no samples yet" in text and "no held-out evaluation yet" in text


def test_report_has_every_section_and_escapes(run):
    for step in range(1, 6):
        run.log_metrics({"step": step, "reward/mean": 0.1 * step, "time/step": 30.0, "memory/peak_bytes": 2**30})
    chat = [{"role": "user", "content": f"2 < 3? {EVIL}"}]
    run.log_samples(4, [{"prompt": "plain", "completion": "0"}] * 20)
    run.log_samples(
        5, [{"prompt": chat, "completion": f"yes </pre>{EVIL}", "rewards": {f"exact{EVIL}": 1.0}, "a": None}]
    )
    run.write_evaluation({"before": {"accuracy": 0.1, "problems": 64}, "after": {"accuracy": 0.4, "reward/exact": 0.4}})
    path = write_report(run)
    text = path.read_text(encoding="utf-8")
    assert path == run.path / "report.html"
    for title in ("Held-out evaluation", "Training", "Plan", "Memory", "Last samples", "Recipe"):
        assert f"<h2>{title}</h2>" in text
    for part in (
        "10.0% → 40.0%",
        "64 held-out problems",
        "4x",
        "16-bit takes &gt; 6 GiB &amp; more",
        "r=8",
        "3.00 GiB",
    ):
        assert part in text, part
    assert "user: 2 &lt; 3?" in text and "yes &lt;/pre&gt;" in text and "prompts_per_step: 8" in text
    assert text.count('class="sample"') == 12
    assert "2m30s" in text  # five steps of 30 seconds


def test_evaluations_while_it_trains_are_listed_and_why_it_ended_is_said(run):
    rows = [{"step": step, "reward/mean": step / 50, "headline": "reward/mean"} for step in (0, 10, 20)]
    stopped = "the last evaluation did not improve"
    more = {"during": rows[1:], "best": {"step": 10}, "stopped": stopped}
    run.write_evaluation({"before": rows[0], "after": rows[2], **more})
    text = write_report(run).read_text(encoding="utf-8")
    for part in ("held-out mean reward", "0 → 0.4", "2 evaluations while it trained", "0.2, the best", stopped):
        assert part in text, part
    assert "best, step 10" in text


def test_report_needs_no_network(run):
    run.log_samples(1, [{"prompt": EVIL, "completion": EVIL, EVIL: EVIL}])
    text = write_report(run).read_text(encoding="utf-8")
    tags: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(text)
    links = [value for _, attributes in tags for key, value in attributes.items() if key in ("src", "href", "srcset")]
    assert len(links) == 1 and links[0].startswith("data:image/png;base64,")
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object", "form"}
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
